"""Runs seeds, on one core or all of them, and counts the states they reach.

A failing seed is a number: `python -m tests.sim --seed N --trace` plays it again.
"""

import gc
import multiprocessing
import os
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from tests.sim import canaries
from tests.sim.world import World

CHUNK: Final = 50
"""Seeds handed to a worker at once."""


@dataclass
class Outcome:
    """Of a number of seeds."""

    seeds: int = 0
    states: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)
    """(seed, what went wrong in one line)."""


_fixed: dict[str, Any] = {}
"""Sizes that the canary in this process wants, to be found sooner."""
_begun: list[str] = []


def begin(canary: str) -> None:
    """Prepare this process: the collector only runs between chunks, and the bug, if one is wanted, is planted."""
    gc.disable()
    gc.freeze()
    _begun.append(canary)
    if canary:
        canaries.plant(canary)
        _fixed.update(canaries.SIZES.get(canary, {}))


def run_seed(seed: int, trace: bool = False) -> Counter[str]:
    """One run; raises what it finds."""
    return World(seed, trace, **_fixed).run()


def run_seeds(first: int, count: int, failures_max: int = 1) -> Outcome:
    """One after the other, in this process."""
    outcome = Outcome()
    for seed in range(first, first + count):
        try:
            outcome.states.update(run_seed(seed).keys())
        except Exception as error:  # noqa: BLE001 - whatever it is, the seed is what matters
            outcome.failures.append((seed, _one_line(error)))
        outcome.seeds += 1
        if len(outcome.failures) >= failures_max:
            break
    return outcome


def _one_line(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error).split("\n")[0]
    return f"{type(error).__name__}: {text} ({os.path.basename(where.filename)}:{where.lineno})"


def _work(job: tuple[int, int, int, str]) -> Outcome:
    first, count, failures_max, canary = job
    if not _begun:
        begin(canary)
    outcome = run_seeds(first, count, failures_max)
    gc.collect()
    return outcome


def run_parallel(
    first: int, count: int, jobs: int = 0, canary: str = "", failures_max: int = 1, seconds: float = 0.0
) -> Iterator[Outcome]:
    """Outcomes of chunks, as they come; stops after `failures_max` failures, or after so many seconds."""
    work = [
        (seed, min(CHUNK, first + count - seed), failures_max, canary) for seed in range(first, first + count, CHUNK)
    ]
    failures = 0
    until = time.monotonic() + seconds if seconds else float("inf")
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs or os.cpu_count()) as pool:
        for outcome in pool.imap_unordered(_work, work):
            yield outcome
            failures += len(outcome.failures)
            if failures >= failures_max or time.monotonic() > until:
                pool.terminate()
                return
