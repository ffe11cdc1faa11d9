"""One seed drives a guest, the real core and recovery, and a world that fails: see world.py."""
