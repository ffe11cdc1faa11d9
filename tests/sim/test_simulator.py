"""Many seeds of the simulator, the states that they must reach, and the planted bugs that it must find."""

from collections.abc import Iterable

import pytest

from tests.sim import canaries
from tests.sim.runner import Outcome, run_parallel, run_seed
from tests.sim.world import STATES

SEEDS = 20_000
CANARY_SEEDS = 15_000


def collect(outcomes: Iterable[Outcome]) -> Outcome:
    total = Outcome()
    for outcome in outcomes:
        total.seeds += outcome.seeds
        total.states.update(outcome.states)
        total.failures += outcome.failures
    return total


@pytest.fixture(scope="module")
def many_seeds() -> Outcome:
    return collect(run_parallel(0, SEEDS, failures_max=5))


def test_no_seed_breaks_a_promise(many_seeds: Outcome) -> None:
    lines = [f"seed {s}: {text}\n  again: python -m tests.sim --seed {s} --trace" for s, text in many_seeds.failures]
    assert not many_seeds.failures, "\n".join(lines)
    assert many_seeds.seeds == SEEDS


@pytest.mark.parametrize("state", STATES)
def test_the_seeds_reach_every_state(many_seeds: Outcome, state: str) -> None:
    assert many_seeds.states[state] > 0


def test_a_seed_says_all() -> None:
    assert [run_seed(seed) for seed in range(20)] == [run_seed(seed) for seed in range(20)]


@pytest.mark.parametrize("name", sorted(canaries.CANARIES))
def test_the_simulator_finds_the_canary(name: str) -> None:
    found = collect(run_parallel(0, CANARY_SEEDS, canary=name))
    assert found.failures, f"{found.seeds} seeds do not find the bug {name}"
