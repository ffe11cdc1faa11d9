"""Every fault point: the Nth operation on the cache, on the backend, or of a recovery fails, for N = 0, 1, 2, ... until
the scenario runs through. In each, the process dies twice or the power fails, and everything is checked."""

import pytest

from tests.sim.world import World

SCENARIOS = (1, 2, 3, 4)
QUIET = {
    "openings": 3,
    "steps": 60,
    "cache_faults": 0.0,
    "backend_faults": 0.0,
    "flips": 0.0,
    "recovery_crashes": 0.0,
    "shutdowns": 0.2,
}


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("what", ["cache", "backend", "recovery"])
def test_any_one_operation_may_fail(what: str, scenario: int) -> None:
    number = 0
    while True:
        world = World(scenario, **QUIET)
        world.fail_at = {what: number}
        try:
            world.run()
        except Exception as error:
            raise AssertionError(f"scenario {scenario}, {what} operation {number} fails") from error
        if world.operations_seen[what] <= number:
            break
        number += 1
    assert number > 10
