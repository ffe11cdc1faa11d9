"""`make bench`: how fast, beside qemu-storage-daemon on the same image and a null back-end that does nothing."""
