"""Traces of block numbers, in the style of those that caches are usually measured with; the seed decides everything.

- zipf: few blocks are popular, with the exponent that block traces show (0.9);
- scan+zipf: the same, and every now and then a backup or virus scan reads everything once, in order;
- loop: a program reads the same range over and over, larger than most caches;
- shift: a zipf whose popular blocks are others after a while: what was learnt has to be forgotten.
"""

import random
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Final

ZIPF_EXPONENT: Final = 0.9


def _popular(rng: random.Random, blocks: int, count: int) -> list[int]:
    weights = list(accumulate((rank + 1) ** -ZIPF_EXPONENT for rank in range(blocks)))
    order = list(range(blocks))
    rng.shuffle(order)
    return rng.choices(order, cum_weights=weights, k=count)


def zipf(rng: random.Random, blocks: int, count: int) -> list[int]:
    return _popular(rng, blocks, count)


def scan_and_zipf(rng: random.Random, blocks: int, count: int) -> list[int]:
    """A third of the requests are of scans, each over half of the disk."""
    popular = iter(_popular(rng, blocks, count))

    def requests() -> Iterator[int]:
        scanned = 0
        while True:
            yield from (next(popular) for _ in range(blocks))
            yield from (at % blocks for at in range(scanned, scanned + blocks // 2))
            scanned += blocks // 2

    source = requests()
    return [next(source) for _ in range(count)]


def loop(rng: random.Random, blocks: int, count: int) -> list[int]:
    """Half of the disk in order, again and again, one request in ten elsewhere."""
    length = blocks // 2
    return [at % length if rng.random() < 0.9 else rng.randrange(blocks) for at in range(count)]


def shift(rng: random.Random, blocks: int, count: int) -> list[int]:
    """Four times the popularity changes wholly."""
    return [block for _ in range(4) for block in _popular(rng, blocks, count // 4)]


TRACES: Final[dict[str, Callable[[random.Random, int, int], list[int]]]] = {
    "zipf": zipf,
    "scan+zipf": scan_and_zipf,
    "loop": loop,
    "shift": shift,
}
