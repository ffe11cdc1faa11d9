"""The core against the oracle of tests/core/harness.py: any interleaving of requests, completions and faults."""

import random

import pytest

from tests.core.harness import Harness
from vhostcache import operations as op

CHANGES = (op.REQUEST_DISCARD, op.REQUEST_ZERO, op.REQUEST_ZERO_UNMAP)


def random_run(seed: int, faults: bool, steps: int = 400) -> Harness:
    """One run, decided by its seed alone."""
    rng = random.Random(seed)
    harness = Harness(
        size_sectors=8 * rng.choice((16, 40, 100)) + rng.choice((0, 0, 1, 5)),
        slots=3 + rng.choice((8, 24, 60)),
        object_blocks=rng.choice((1, 4, 16)),
        acknowledge_durable=rng.random() < 0.15,
        fill_blocks=rng.choice((1, 1, 4)),
        direct_blocks=rng.choice((1, 4, 32)),
        readahead_blocks=rng.choice((0, 0, 8, 32)),
    )
    stream = 0
    whole = rng.random()
    fault_rate = rng.choice((0.0, 0.05, 0.3)) if faults else 0.0
    for _ in range(steps):
        choice = rng.random()
        if choice < 0.1 and len(harness.live) < 40:
            sectors = min(rng.choice((8, 8, 24)), harness.size_sectors - stream)
            harness.submit(op.REQUEST_READ, stream, sectors)
            stream = (stream + sectors) % harness.size_sectors
        elif choice < 0.4 and len(harness.live) < 40:
            submit_random(harness, rng, whole)
        elif choice < 0.45 and len(harness.live) < 40:
            harness.submit(op.REQUEST_FLUSH)
        elif choice < 0.7:
            harness.turn()
        elif choice < 0.97:
            if harness.io:
                harness.end_io(rng.randrange(len(harness.io)), fail=rng.random() < fault_rate)
        elif choice < 0.98:
            harness.volume.set_write_cache(rng.random() < 0.5)
        else:
            harness.advance(rng.choice((10, 2000, 200_000_000)))
        if rng.random() < 0.005:
            harness.reconnect()
        if rng.random() < 0.02:
            harness.execute()
            harness.map.check()
    harness.settle()
    return harness


def submit_random(harness: Harness, rng: random.Random, whole: float) -> None:
    kind = rng.choice((op.REQUEST_WRITE, op.REQUEST_WRITE, op.REQUEST_READ, op.REQUEST_READ, rng.choice(CHANGES)))
    size = harness.size_sectors
    if rng.random() < whole:
        block = rng.randrange(size // 8)
        blocks = min(rng.choice((1, 1, 1, 2, 5, 12, 40)), size // 8 - block)
        harness.submit(kind, 8 * block, 8 * blocks)
    else:
        sector = rng.randrange(size)
        harness.submit(kind, sector, min(rng.choice((1, 2, 7, 8, 9, 30, 100)), size - sector))


@pytest.mark.parametrize("start", range(0, 400, 50))
def test_reads_and_flushes_are_right_in_any_interleaving(start: int) -> None:
    for seed in range(start, start + 50):
        harness = random_run(seed, faults=False)
        assert harness.errors == 0, f"seed {seed}"


@pytest.mark.parametrize("start", range(0, 400, 50))
def test_backend_faults_lose_nothing_that_was_acknowledged(start: int) -> None:
    for seed in range(10_000 + start, 10_000 + start + 50):
        random_run(seed, faults=True)
