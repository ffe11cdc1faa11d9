"""The table and the plots of a result, for docs/performance.md.

`python -m tests.bench.report RESULT.json` draws the plots of a result that is there, as far as it has what they show.
"""

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from tests.bench.over_time import mib_per_s
from tests.bench.servers import ROOT

MIB = 1 << 20
BEGIN, END = "<!-- figures: `make bench` writes from here -->", "<!-- to here -->"
YES_NO = {True: "yes", False: "**no**"}
COLOURS = {"vhostcache": "#0b7285", "qemu-storage-daemon": "#e8590c", "null --copy": "#adb5bd", "null": "#dee2e6"}


def medians(data: dict[str, Any], case: str) -> dict[str, float]:
    return {server: statistics.median(runs) for server, runs in data["cases"][case].items()}


def unit(case: str) -> str:
    return "MiB/s" if " 64 KiB " in case or " 1 MiB " in case else "IOPS"


def markdown(data: dict[str, Any]) -> str:
    """The figures as tables."""
    m, scale = data["machine"], data["scale"]
    where = (
        f"Measured on {data['date']}: {m['processor']}, Linux {m['kernel']}, Python {m['python']}, {m['peer']}, "
        f"{m['vhostcache']}. Median of {scale['runs']} interleaved runs; server on one processor, front-end on another."
    )
    lines = [
        where,
        "",
        "| bar | measured | asked for | |",
        "| --- | ---: | ---: | --- |",
        *(f"| {v['what']} | {v['found']} | {v['bar']} | {YES_NO[v['cleared']]} |" for v in data["verdicts"]),
        "",
        "| load | unit | vhostcache | qemu-storage-daemon | ratio | null, copying | null | p50 / p99, µs (ours) |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in data["cases"]:
        found = medians(data, case)
        ours, peer = found["vhostcache"], found["qemu-storage-daemon"]
        nulls = [f"{found[n]:,.0f}" if n in found else "" for n in ("null --copy", "null")]
        latency = data["latency_us"][case]["vhostcache"]
        lines.append(
            f"| {case} | {unit(case)} | {ours:,.0f} | {peer:,.0f} | {ours / peer:.2f} | {nulls[0]} | {nulls[1]} | "
            f"{latency['p50']:,.0f} / {latency['p99']:,.0f} |"
        )
    if data["facts"]:
        lines += ["", "| with a log, and with NBD behind it | measured |", "| --- | ---: |"]
        lines += [f"| {fact['what']} | {fact['found']} |" for fact in data["facts"]]
    return "\n".join(lines)


def put_between_marks(page: Path, text: str) -> None:
    """Replace what stands between the marks of the page."""
    old = page.read_text()
    before, _, rest = old.partition(BEGIN)
    _, mark, after = rest.partition(END)
    assert mark, f"{page} has no marks for the figures"
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def pyplot_of_matplotlib() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "vhostcache"  # the same figures give the same file
    from matplotlib import pyplot

    return pyplot


def plot(data: dict[str, Any], path: Path) -> None:
    """Bars of each case, relative to qemu-storage-daemon."""
    pyplot = pyplot_of_matplotlib()
    cases = list(data["cases"])
    servers = ["vhostcache", "qemu-storage-daemon"]
    figure, axes = pyplot.subplots(figsize=(9, 0.36 * len(cases) + 1.2), layout="constrained")
    height = 0.8 / len(servers)
    for s, server in enumerate(servers):
        ratios = [medians(data, c)[server] / medians(data, c)["qemu-storage-daemon"] for c in cases]
        places = [i + s * height for i in range(len(cases))]
        axes.barh(places, ratios, height, label=server, color=COLOURS[server])
        if server == "vhostcache":
            for place, ratio in zip(places, ratios, strict=True):
                axes.text(ratio, place, f" {ratio:.1f}x", va="center", fontsize=7)
    axes.set_yticks([i + height / 2 for i in range(len(cases))], cases, fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(left=0.3)
    axes.set_xticks([t for t in (0.5, 1, 2, 5, 10, 20, 50, 100) if t <= 2 * axes.get_xlim()[1]])
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.minorticks_off()
    axes.axvline(1, color=COLOURS["qemu-storage-daemon"], linewidth=0.8)
    axes.set_xlabel("throughput relative to qemu-storage-daemon (logarithmic)", fontsize=8)
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 1.08), ncols=2, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def plot_over_time(found: dict[str, Any], path: Path) -> None:
    """Throughput, latency and what is in the log, one above the other."""
    pyplot = pyplot_of_matplotlib()
    figure, (rate, latency, log) = pyplot.subplots(3, 1, figsize=(9, 6.5), sharex=True, layout="constrained")
    ours, late = COLOURS["vhostcache"], COLOURS["qemu-storage-daemon"]
    edges = [i["begin_s"] for i in found["load"]] + [found["load"][-1]["end_s"]]
    rate.stairs([mib_per_s(i) for i in found["load"]], edges, color=ours)
    rate.set_yscale("symlog", linthresh=1)
    rate.set_ylim(bottom=0)
    rate.set_ylabel("4 KiB writes, MiB/s", fontsize=8)
    for kind, name, colour in (("write", "write", ours), ("sync", "flush", late)):
        at = [i["end_s"] for i in found["load"]]
        for key, style, what in (("50.000000", "-", "p50"), ("100.000000", ":", "longest")):
            # Not a number: a gap in the line.
            values = [i[kind]["lat_ns"][key] / 1e6 if kind in i else math.nan for i in found["load"]]
            latency.plot(at, values, style, color=colour, linewidth=1, label=f"{name}, {what}")
    latency.set_yscale("log")
    latency.set_ylabel("latency, ms", fontsize=8)
    latency.legend(fontsize=7, ncols=4, frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    at = [look["at_s"] for look in found["log"]]
    log.fill_between(at, [look["dirty_bytes"] / MIB for look in found["log"]], color=ours, alpha=0.3, linewidth=0)
    log.axhline(found["log_bytes"] / MIB, color="black", linewidth=0.8, linestyle="--")
    log.set_ylim(bottom=0)
    log.set_ylabel("not yet in the backend, MiB\n(dashed: the log's size)", fontsize=8)
    log.set_xlabel("seconds", fontsize=8)
    for axes in (rate, latency, log):
        axes.axvspan(*found["gone_s"], color=COLOURS["null --copy"], alpha=0.35, linewidth=0)
        axes.tick_params(labelsize=7)
        for phase in found["phases"]:
            axes.axvline(phase["begin_s"], color=COLOURS["null"], linewidth=0.8, zorder=0)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    top = rate.get_xaxis_transform()
    for phase in found["phases"]:
        rate.text(phase["begin_s"], 1.02, f" {phase['name']}", transform=top, fontsize=7)
    rate.text(sum(found["gone_s"]) / 2, 0.9, "backend gone", transform=top, fontsize=7, ha="center", va="top")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.bench.report RESULT.json")
    data = json.loads(Path(sys.argv[1]).read_text())
    if data["cases"]:
        plot(data, ROOT / "docs" / "performance.svg")
    if data.get("over_time"):
        plot_over_time(data["over_time"], ROOT / "docs" / "over-time.svg")


if __name__ == "__main__":
    main()
