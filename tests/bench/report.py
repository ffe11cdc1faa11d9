"""The table and the plot of a result, for docs/performance.md."""

import statistics
from pathlib import Path
from typing import Any

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
        lines += ["", "| with a log | measured |", "| --- | ---: |"]
        lines += [f"| {fact['what']} | {fact['found']} |" for fact in data["facts"]]
    return "\n".join(lines)


def put_between_marks(page: Path, text: str) -> None:
    """Replace what stands between the marks of the page."""
    old = page.read_text()
    before, _, rest = old.partition(BEGIN)
    _, mark, after = rest.partition(END)
    assert mark, f"{page} has no marks for the figures"
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def plot(data: dict[str, Any], path: Path) -> None:
    """Bars of each case, relative to qemu-storage-daemon."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "vhostcache"  # the same figures give the same file
    from matplotlib import pyplot

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
