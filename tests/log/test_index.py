"""The index of the log on its own."""

import random

import pytest

from vhostcache.log.index import LogIndex

SHIFT = 6
OBJECTS = 6
BLOCKS = OBJECTS << SHIFT


@pytest.mark.parametrize("seed", range(40))
def test_a_range_is_found_as_block_by_block(seed: int) -> None:
    rng = random.Random(seed)
    index = LogIndex(SHIFT, 0, 0)
    address = 1
    for _ in range(rng.randrange(30)):
        first = rng.randrange(BLOCKS)
        count = rng.choice((1, 1, 3, 20, 64))
        count = min(count, BLOCKS - first)
        if rng.random() < 0.7:
            index.add(range(first, first + count), address, 1)
        else:
            index.zero(first, first + count, address, kept=False)
        address += count + 1
        if rng.random() < 0.2:
            index.tail = rng.randrange(index.tail, address)
    for _ in range(300):
        start = rng.randrange(BLOCKS)
        end = rng.randrange(start, BLOCKS + 1)
        assert index.has_any(start, end) == any(index.lookup(block) for block in range(start, end))
