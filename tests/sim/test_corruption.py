"""Damaged cache files: what is wrong is found, or does not matter; never is anything wrong read."""

import contextlib
from collections import Counter

import pytest

from tests.sim.medium import Crash, SyncDisk
from tests.sim.world import World
from vhostcache.errors import OperationError
from vhostcache.log import recovery

FLIPS = 1000


def test_a_thousand_bit_flips_are_found_or_harmless() -> None:
    """The last opening of each run reads everything after a flip."""
    states: Counter[str] = Counter()
    seed = 0
    while states["bit flip"] < FLIPS:
        try:
            states.update(World(seed, flips=1.0, openings=2).run())
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        seed += 1
    assert states["rot found by recovery"] > 0
    assert states["rot found by a read"] > 0


@pytest.mark.parametrize("seed", range(4))
def test_a_truncated_log_is_refused_at_every_length(seed: int) -> None:
    # What is missing of a read cache behind the log is only colder.
    world = World(seed, openings=1, steps=60, flips=0.0, ring_blocks=60, read_blocks=0)
    world.create()
    assert world.open()
    with contextlib.suppress(Crash):  # an end like any other
        world.work(60)
    world.stop()
    whole = world.cache.live
    for blocks in range(len(whole)):
        world.cache.live = whole[:blocks]
        with pytest.raises(OperationError):
            recovery.recover(SyncDisk(world.cache), None, world.boot_id(), accept_lost_tier=True)
    world.cache.live = whole
    assert world.open()
