"""The read cache's index and policy, against a dictionary."""

import random

import pytest

from vhostcache.eviction import LOOKS_MAX, Eviction


@pytest.mark.parametrize("positions", [1, 2, 50, 300])
def test_it_holds_what_a_dictionary_would(positions: int) -> None:
    rng = random.Random(positions)
    cache = Eviction(positions)
    model: dict[int, int] = {}
    for _ in range(20_000):
        block, choice = int(rng.paretovariate(0.7)) % 5000, rng.random()
        position = cache.find(block)
        assert position == model.get(block, 0)
        if position:
            cache.hit(position)
            if choice < 0.05:
                cache.drop(position, keep=False)
                del model[block]
        elif cache.wants(block):
            position = cache.take()
            model = {other: at for other, at in model.items() if at != position}
            if choice < 0.1:
                cache.give_back(position)
            else:
                cache.admit(block, position)
                model[block] = position
        if choice > 0.999:
            found = cache.found_in(block, block + 3000)
            assert sorted(found) == sorted(at for other, at in model.items() if block <= other < block + 3000)
        if choice < 0.002:
            copy = Eviction(positions)
            packed = cache.packed()
            assert len(packed) == Eviction.size_bytes(positions)
            copy.unpack(cache.numbers(), memoryview(packed))
            cache = copy
    assert cache.small_count + cache.main_count == len(model) <= positions


def test_a_position_that_is_held_is_given_to_nobody_else() -> None:
    cache = Eviction(4)
    held = [cache.take() for _ in range(4)]
    assert sorted(held) == [1, 2, 3, 4]
    assert cache.take() == 0
    cache.admit(7, held[0])
    cache.drop(cache.find(7), keep=True)
    assert cache.take() == 0
    cache.give_back(held[0])
    assert cache.take() == held[0]


def test_a_scan_does_not_sweep_what_is_asked_for_often() -> None:
    cache = Eviction(100)
    for block in [*range(100)] * 3:
        position = cache.find(block)
        if position:
            cache.hit(position)
        elif cache.wants(block):
            cache.admit(block, cache.take())
    for block in range(1000, 3000):
        if cache.wants(block):
            cache.admit(block, cache.take())
    assert sum(1 for block in range(100) if cache.find(block)) >= 90


def test_an_eviction_ends_soon_although_everything_has_been_hit() -> None:
    cache = Eviction(20 * LOOKS_MAX)
    for block in range(cache.positions):
        cache.admit(block, cache.take())
        for _ in range(3):
            cache.hit(cache.find(block))
    for round_ in range(40):
        before = bytes(cache.flags)
        cache.admit(cache.positions + round_, cache.take())
        cache.hit(cache.find(cache.positions + round_))
        assert sum(a != b for a, b in zip(before, cache.flags, strict=True)) <= LOOKS_MAX + 1
    assert cache.small_count + cache.main_count == cache.positions
