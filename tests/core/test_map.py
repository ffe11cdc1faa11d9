"""The map's memory and its bookkeeping."""

import random
import tracemalloc

from vhostcache.map import BOOKKEEPING_BYTES, Map
from vhostcache.readcache import ReadCache


def test_memory_follows_the_blocks_cached_whatever_the_size_of_the_volume() -> None:
    """Random 4 KiB writes over 16 TiB, which would take a page table 20 GiB (hazard 20)."""
    blocks = 20_000
    rng = random.Random(1)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    block_map = Map(3 + blocks, 1024)
    cache = ReadCache(block_map)
    for block in rng.sample(range(16 << 28), blocks):
        block_map.place(block, block_map.take(1)[0], 0)
    for number in list(block_map.dirty):
        for block in block_map.take_dirty(number):
            slot = block_map.where[block]
            block_map.state[slot] = 2
            cache.admit(slot)
    used = tracemalloc.get_traced_memory()[0] - before
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert used / blocks <= BOOKKEEPING_BYTES
    assert peak / blocks <= 4 * BOOKKEEPING_BYTES


def test_slots_taken_together_are_neighbours() -> None:
    block_map = Map(3 + 16, 4)
    assert block_map.take(4) == [3, 4, 5, 6]
    assert block_map.take(1) == [7]


def test_an_object_is_full_when_all_its_blocks_are_dirty_and_not_any_more_when_one_is_forgotten() -> None:
    block_map = Map(3 + 16, 4)
    block_map.place_run(4, block_map.take(4), 1)
    assert list(block_map.full) == [1]
    block_map.forget(6)
    assert not block_map.full
    assert block_map.dirty[1] == {4, 5, 7}
    block_map.check()
