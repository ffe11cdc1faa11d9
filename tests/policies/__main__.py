"""`python -m tests.policies`: every policy on every trace at several sizes, as a table and as a figure.

The figures depend on the seed alone. `--blocks` and `--requests` make it smaller.
"""

import argparse
import random
from pathlib import Path
from typing import Any, Final

from tests.policies.contenders import POLICIES
from tests.policies.traces import TRACES

SIZES: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
"""Of the cache, as a part of the disk."""
SEED: Final = 1
HIT: Final = 0
WRITTEN: Final = 1

Results = dict[str, dict[str, list[tuple[float, float]]]]
"""Trace -> policy -> for each size: hits and blocks written to the cache, of all requests."""


def measure(blocks: int, requests: int) -> Results:
    results: Results = {}
    for name, make in TRACES.items():
        trace = make(random.Random(SEED), blocks, requests)
        results[name] = {}
        for policy, new in POLICIES.items():
            row = results[name][policy] = []
            for size in SIZES:
                cache = new(max(1, int(blocks * size)))
                hits = sum(cache.access(block) for block in trace)
                row.append((hits / len(trace), cache.written / len(trace)))
    return results


def table(results: Results, what: int) -> str:
    """Markdown: hits or writes, in per cent of the requests."""
    lines = ["| trace | cache | " + " | ".join(POLICIES) + " |", "|---" * (2 + len(POLICIES)) + "|"]
    for trace, rows in results.items():
        for i, size in enumerate(SIZES):
            cells = [f"{100 * rows[policy][i][what]:.1f}" for policy in POLICIES]
            lines.append(f"| {trace} | {100 * size:.0f} % | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: Results, path: Path) -> None:
    """Hits over the size of the cache, for each trace; below, what is written for them."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "vhostcache"  # the same figures give the same file
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(2, len(results), figsize=(11, 5), layout="constrained", sharex=True, sharey="row")
    for column, (trace, policies) in enumerate(results.items()):
        for what, title in ((HIT, "hits"), (WRITTEN, "blocks written to the cache")):
            axes: Any = rows[what][column]
            for policy, values in policies.items():
                ours = policy == "vhostcache"
                shown = [100 * value[what] for value in values]
                axes.plot(
                    [100 * size for size in SIZES],
                    shown,
                    label=policy,
                    marker=".",
                    linewidth=2.2 if ours else 1,
                    color="black" if ours else None,
                )
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g} %")
            axes.yaxis.set_major_formatter("{x:g} %")
            axes.tick_params(labelsize=7)
            if what == HIT:
                axes.set_title(trace, fontsize=9)
            else:
                axes.set_xlabel("cache, of the disk", fontsize=8)
            if column == 0:
                axes.set_ylabel(f"{title}, of all requests", fontsize=8)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
    rows[0][0].legend(fontsize=7, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.policies", description=__doc__)
    parser.add_argument("--blocks", type=int, default=20_000, help="of the disk")
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--figure", type=Path, help="where to draw, an SVG file")
    options = parser.parse_args()
    results = measure(options.blocks, options.requests)
    print("Hits, in per cent of the requests:\n")
    print(table(results, HIT))
    print("\nBlocks written to the cache, in per cent of the requests:\n")
    print(table(results, WRITTEN))
    if options.figure:
        plot(results, options.figure)


if __name__ == "__main__":
    main()
