"""`python -m tests.sim --seeds 20000`: the simulator. `--seed N --trace` plays one seed and says what happens."""

import argparse
import sys
import time
import traceback

from tests.sim import canaries
from tests.sim.runner import Outcome, begin, run_parallel, run_seed
from tests.sim.world import STATES


def main() -> int:
    """Returns the exit status: 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=20_000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--jobs", type=int, default=0, help="processes; 0: one a core")
    parser.add_argument("--seconds", type=float, default=0.0, help="stop after so long")
    parser.add_argument("--failures", type=int, default=1, help="stop after so many")
    parser.add_argument("--seed", type=int, help="only this one, in this process")
    parser.add_argument("--trace", action="store_true", help="with --seed: say what happens")
    parser.add_argument("--canary", choices=sorted(canaries.CANARIES), help="plant this bug, which must be found")
    options = parser.parse_args()
    if options.seed is not None:
        return _play(options.seed, options.trace, options.canary or "")
    begun = shown = time.monotonic()
    total = Outcome()
    for outcome in run_parallel(
        options.first, options.seeds, options.jobs, options.canary or "", options.failures, options.seconds
    ):
        total.seeds += outcome.seeds
        total.states.update(outcome.states)
        for seed, text in outcome.failures:
            total.failures.append((seed, text))
            print(f"seed {seed}: {text}", flush=True)
        now = time.monotonic()
        if now > shown + 5:
            shown = now
            print(
                f"{total.seeds} of {options.seeds} seeds, {total.seeds / (now - begun):.0f}/s, "
                f"{len(total.states)} of {len(STATES)} states reached, {len(total.failures)} failures",
                flush=True,
            )
    _report(total, time.monotonic() - begun)
    return 1 if total.failures else 0


def _play(seed: int, trace: bool, canary: str) -> int:
    begin(canary)
    try:
        states = run_seed(seed, trace)
    except Exception:  # noqa: BLE001 - it is shown, whatever it is
        traceback.print_exc(file=sys.stdout)
        return 1
    print(f"seed {seed}: ok, {', '.join(sorted(states))}")
    return 0


def _report(total: Outcome, seconds: float) -> None:
    print(f"{total.seeds} seeds in {seconds:.1f} s, {total.seeds / max(seconds, 0.001):.0f}/s")
    for state, seeds in sorted(total.states.items(), key=lambda item: -item[1]):
        print(f"  {seeds:8d} seeds  {state}")
    for state in sorted(set(STATES) - total.states.keys()):
        print(f"     never        {state}")
    for seed, text in total.failures:
        print(f"FAILED seed {seed}: {text}\n  again: python -m tests.sim --seed {seed} --trace")


if __name__ == "__main__":
    sys.exit(main())
