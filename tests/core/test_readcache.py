"""The read cache's order of eviction, and that its work is bounded."""

import random
from collections import OrderedDict

from vhostcache.map import CLEAN, DIRTY, Map, slots_for_ram
from vhostcache.operations import FIRST_SLOT
from vhostcache.readcache import HITS_MAX, ReadCache


class Cache:
    """A map and a read cache used for reads only."""

    def __init__(self, blocks: int) -> None:
        self.map = Map(FIRST_SLOT + blocks, 16)
        self.cache = ReadCache(self.map)

    def read(self, block: int) -> bool:
        slot = self.map.where.get(block)
        if slot is not None:
            self.cache.hits[slot] = min(self.cache.hits[slot] + 1, HITS_MAX)
            return True
        if not self.map.free:
            assert self.cache.evict(1) == 1
        slot = self.map.take(1)[0]
        self.map.where[block] = slot
        self.map.block_of[slot] = block
        self.map.state[slot] = CLEAN
        self.cache.admit(slot)
        return False


def lru_hits(trace: list[int], size: int) -> int:
    kept: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for block in trace:
        if block in kept:
            hits += 1
            kept.move_to_end(block)
        else:
            kept[block] = None
            if len(kept) > size:
                kept.popitem(last=False)
    return hits


def zipf(rng: random.Random, blocks: int, count: int) -> list[int]:
    weights = [1 / (rank + 1) for rank in range(blocks)]
    return rng.choices(range(blocks), weights, k=count)


def test_a_scan_does_not_sweep_out_what_is_read_often() -> None:
    cache = Cache(100)
    for _ in range(4):
        for block in range(50):
            cache.read(block)
    for block in range(1000, 3000):
        cache.read(block)
    assert sum(cache.read(block) for block in range(50)) > 40


def test_hits_are_at_least_those_of_lru_on_zipf_with_scans() -> None:
    rng = random.Random(7)
    trace = zipf(rng, 2000, 20_000)
    for start in range(0, 20_000, 4000):
        trace[start:start] = range(100_000 + start, 100_000 + start + 400)
    cache = Cache(200)
    assert sum(cache.read(block) for block in trace) >= lru_hits(trace, 200)


def test_a_block_evicted_unhit_and_read_again_goes_to_the_main_queue() -> None:
    cache = Cache(20)
    for block in range(25):
        cache.read(block)
    assert 0 not in cache.map.where
    cache.read(0)
    for block in range(100, 160):
        cache.read(block)
    assert 0 in cache.map.where


def test_only_clean_slots_are_evicted() -> None:
    cache = Cache(8)
    for block in range(8):
        cache.read(block)
    for block in range(5):
        cache.map.mark_dirty(block, cache.map.where[block], 0)
    assert cache.cache.evict(8) == 3
    assert all(cache.map.state[cache.map.where[block]] == DIRTY for block in range(5))
    cache.map.check()


def test_a_cache_in_which_everything_is_hot_gives_up_a_slot_after_a_bounded_search() -> None:
    cache = Cache(20_000)
    for block in range(20_000):
        cache.read(block)
    cache.cache.hits[:] = bytes([HITS_MAX]) * len(cache.cache.hits)
    assert cache.cache.evict(1) == 1
    queued = len(cache.cache._main) + len(cache.cache._small)
    assert queued == 19_999


def test_the_queues_never_outgrow_the_slots() -> None:
    cache = Cache(50)
    rng = random.Random(3)
    for _ in range(5000):
        block = rng.randrange(200)
        cache.read(block)
        slot = cache.map.where[block]
        if rng.random() < 0.3:
            cache.map.mark_dirty(block, slot, 0) if cache.map.state[slot] == CLEAN else None
        if rng.random() < 0.3 and cache.map.state[slot] == DIRTY:
            cache.map._discard_dirty(block)
            cache.map.state[slot] = CLEAN
            cache.cache.admit(slot)
        if not any(state == CLEAN for state in cache.map.state):
            break
        assert len(cache.cache._main) + len(cache.cache._small) <= 50


def test_ram_pays_for_the_map_too() -> None:
    slots = slots_for_ram(256 << 20)
    assert slots * 4096 < 256 << 20
    assert slots * 4096 > 0.9 * (256 << 20)
