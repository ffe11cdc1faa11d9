"""`python -m tests.bench`: run the cases, print each bar's ratio, write the results, a plot and a table.

Runs are interleaved: each repetition goes through all servers of a case before the next, so that drift of the machine
meets all of them. The figure of a case is the median of its runs.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench.backends import BackendBench
from tests.bench.cases import COPY, FIO, FULL, MIB, OURS, PEER, QUICK, Bar, Case, Scale, Steady, log_cases, make_cases
from tests.bench.load import bench, sequential_write
from tests.bench.logs import Caches, Fact, LogBench
from tests.bench.over_time import Timeline
from tests.bench.report import markdown, plot, plot_over_time, put_between_marks
from tests.bench.servers import CLIENT_CPU, ROOT, SERVER_CPU, VHOSTCACHE, BenchError, Running, Server, known_servers
from tests.frontend import Frontend

MEMORY_OVERHEAD_BYTES = 100 * MIB
IDLE_SHARE = 0.001  # of one processor: a tenth of a percent is nothing that could be measured otherwise
VERIFIED_LOG_BYTES = 64 * MIB
SETTLE_S = 7.0  # after load: destaging by age has come to its end

console = Console(highlight=False)


@dataclass
class Results:
    """Everything that was measured, as it goes into the JSON file."""

    scale: Scale
    cases: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # case -> server -> figure of each run
    latency_us: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)  # ... of the last run
    idle_share: dict[str, float] = field(default_factory=dict)
    memory_bytes: int = 0
    verified_bytes: dict[str, int] = field(default_factory=dict)
    facts: list[Fact] = field(default_factory=list)
    over_time: Timeline | None = None

    def median(self, case: Case, server: str) -> float:
        return statistics.median(self.cases[case.name][server])


def make_image(path: Path, size: int) -> None:
    """A raw image that is really allocated and full of data: holes would be unfairly fast."""
    if path.exists() and path.stat().st_size == size and path.stat().st_blocks * 512 >= size:
        return
    console.print(f"image: {path}, {size // MIB} MiB of data")
    path.parent.mkdir(parents=True, exist_ok=True)
    block = os.urandom(8 * MIB)
    with path.open("wb") as file:
        for i in range(0, size, len(block)):
            file.write(block[: size - i])
        os.fsync(file.fileno())
    kind = subprocess.run(["stat", "-f", "-c", "%T", path], capture_output=True, text=True, check=True).stdout.strip()
    if kind in ("tmpfs", "ramfs"):
        raise BenchError(f"{path} is on {kind}: the image has to be on a disk (--dir)")


def load_options(case: Case) -> list[str]:
    options = ["--rw", case.rw, "--bs", str(case.bs), "--iodepth", str(case.iodepth), "--size", str(case.size)]
    return [*options, *(["--poll"] if case.poll else []), *(["--fsync", str(case.fsync)] if case.fsync else [])]


def measure(case: Case, running: Running) -> tuple[float, dict[str, float]]:
    """The figure of one run, in the case's unit, and its latencies in microseconds."""
    if case.warm:
        # Twice over at random: sequential reads would bypass a cache that knows what it does.
        ios = str(2 * case.size // case.bs)
        warm = ["--rw", case.rw, "--bs", str(case.bs), "--iodepth", "32", "--size", str(case.size)]
        bench(running.socket, *warm, "--number_ios", ios, "--poll")
    report = bench(running.socket, *load_options(case), "--runtime", str(case.runtime_s))
    (job,) = report["jobs"]
    (direction,) = (job[kind] for kind in ("read", "write") if job[kind]["total_ios"])
    if report["error"] or direction["total_ios"] == 0:
        raise BenchError(f"{case.name} on {running.server.name}: {report['error'] or 'nothing was done'}")
    p = direction["clat_ns"]["percentile"]
    latencies = {
        name: p[key] / 1000 for name, key in (("p50", "50.000000"), ("p99", "99.000000"), ("p99.9", "99.900000"))
    }
    latencies["max"] = direction["clat_ns"]["max"] / 1000
    return direction["bw_bytes"] / MIB if case.unit == "MiB/s" else direction["iops"], latencies


class Bench:
    """One pass over all that is to be measured."""

    def __init__(self, scale: Scale, image: Path, folder: Path, caches: Caches) -> None:
        self.scale, self.image, self.folder, self.caches = scale, image, folder, caches
        self.servers = known_servers()
        self.results = Results(scale)
        self.logs = LogBench(scale, self.servers[OURS], image, folder, caches)
        self.backends = BackendBench(scale, self.servers, image, folder, caches)
        self.scenarios = {**self.logs.scenarios, **self.backends.scenarios}

    def start(self, server: Server, size: int, options: Sequence[str] = ()) -> Running:
        return Running(server, self.image, size, self.scale.ram, self.folder, options)

    def run_case(self, case: Case) -> None:
        figures = self.results.cases.setdefault(case.name, {name: [] for name in case.servers})
        for _ in range(self.scale.runs):
            for name in case.servers:
                if name == FIO:
                    figures[name].append(sequential_write(self.image, case.size, case.runtime_s) / case.unit_bytes)
                    continue
                with self.start(self.servers[name], case.size, self._log_options(case, name)) as running:
                    figure, latencies = measure(case, running)
                    figures[name].append(figure)
                    known = self.results.latency_us.setdefault(case.name, {})
                    latencies["max"] = max(latencies["max"], known.get(name, latencies)["max"])  # of all runs
                    known[name] = latencies
                    if name == OURS and not case.log_bytes:
                        self.results.memory_bytes = max(self.results.memory_bytes, running.memory_bytes())
        shown = ", ".join(f"{name} {self.results.median(case, name):,.0f}" for name in case.servers)
        console.print(f"{case.name} [{case.unit}]: {shown}")

    def _log_options(self, case: Case, server: str) -> list[str]:
        """An empty log for ours, if the case has one; anybody else finds the image without one."""
        if not case.log_bytes:
            return []
        self.caches.make(case.log_bytes)
        return (
            self.caches.options(case.log_bytes, "--destage", "on" if case.destage else "off") if server == OURS else []
        )

    def run_scenario(self, name: str) -> None:
        """One of those on a disk with a log, or on a slow backend behind one."""
        for fact in self.scenarios[name]():
            self.results.facts.append(fact)
            console.print(f"{fact.what}: {fact.found}", soft_wrap=True)
        self.results.over_time = self.backends.timeline

    def run_idle(self) -> None:
        """Processor time of a daemon that has worked: with a guest that is silent, and with none."""
        with self.start(self.servers[OURS], self.scale.image_bytes) as running:
            bench(running.socket, "--rw", "randrw", "--iodepth", "32", "--runtime", "0.3", "--size", "16m")
            with Frontend(running.socket, queues=2) as frontend:
                frontend.write(0, frontend.read(0, 4096))
                frontend.flush()
                time.sleep(min(SETTLE_S, self.scale.idle_s))
                self.results.idle_share["guest silent"] = self._share(running)
            time.sleep(0.2)
            self.results.idle_share["no guest"] = self._share(running)
        for state, share in self.results.idle_share.items():
            console.print(f"idle, {state}: {share * 100:.4f} % of one processor")

    def _share(self, running: Running) -> float:
        before = running.cpu_ns()
        time.sleep(self.scale.idle_s)
        return (running.cpu_ns() - before) / 1e9 / self.scale.idle_s

    def run_verification(self) -> None:
        """What is fast must be right: one verified load on each server that keeps data."""
        for name in (OURS, PEER, COPY):
            self._verify(name, name, ())
        self.caches.make(VERIFIED_LOG_BYTES)
        self._verify(f"{OURS} with a log", OURS, self.caches.options(VERIFIED_LOG_BYTES))
        self.caches.release()

    def _verify(self, name: str, server: str, options: Sequence[str]) -> None:
        with self.start(self.servers[server], self.scale.fits_bytes, options) as running:
            load = ["--rw", "randrw", "--bs", "4k", "--iodepth", "32", "--numjobs", "2", "--fsync", "64"]
            size = ["--size", str(self.scale.fits_bytes), "--number_ios", "4000"]
            report = bench(running.socket, *load, *size, "--verify", "crc32c")
            self.results.verified_bytes[name] = report["jobs"][0]["verified_bytes"]
            if not self.results.verified_bytes[name]:
                raise BenchError(f"{name}: nothing was verified")


@dataclass(frozen=True)
class Verdict:
    """A bar, what was measured, and whether that clears it."""

    what: str
    found: str
    bar: str
    cleared: bool


def ram_bytes(scale: Scale) -> int:
    assert scale.ram.endswith("MiB")
    return int(scale.ram[:-3]) * MIB


def judge(results: Results, bars: Iterable[Bar], steady: Iterable[Steady]) -> list[Verdict]:
    verdicts = []
    for bar in bars:
        ratio = results.median(bar.case, OURS) / results.median(bar.case, bar.against)
        what = f"{bar.case.name}: ours / {bar.against}"
        verdicts.append(Verdict(what, f"{ratio:.2f}x", f"≥ {bar.least:g}x", ratio >= bar.least))
    for demand in steady:
        latency = results.latency_us[demand.case.name][OURS]
        stall_s, spread = latency["max"] / 1e6, latency["p99.9"] / latency["p50"]
        what = f"{demand.case.name}: longest request"
        verdicts.append(Verdict(what, f"{stall_s:.3f} s", f"≤ {demand.stall_s:g} s", stall_s <= demand.stall_s))
        what = f"{demand.case.name}: p99.9 / p50"
        verdicts.append(Verdict(what, f"{spread:.1f}x", f"≤ {demand.spread:g}x", spread <= demand.spread))
    verdicts += [Verdict(fact.what, fact.found, fact.bar, fact.cleared) for fact in results.facts if fact.has_bar]
    for state, share in results.idle_share.items():
        found = f"{share * 100:.4f} %"
        verdicts.append(Verdict(f"idle, {state}: of one processor", found, f"< {IDLE_SHARE:.1%}", share < IDLE_SHARE))
    if results.memory_bytes:
        limit = ram_bytes(results.scale) + MEMORY_OVERHEAD_BYTES
        found = f"{results.memory_bytes / MIB:.0f} MiB"
        what = f"memory, at most, with --ram {results.scale.ram}"
        verdicts.append(Verdict(what, found, f"≤ {limit // MIB} MiB", results.memory_bytes <= limit))
    return verdicts


def print_verdicts(verdicts: list[Verdict]) -> None:
    table = Table(box=None, title="Bars", title_justify="left")
    for heading in ("", "measured", "bar", ""):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=bool(heading))
    for v in verdicts:
        table.add_row(v.what, v.found, v.bar, "[green]yes" if v.cleared else "[red]no")
    console.print(table)


def machine() -> dict[str, str]:
    """What the figures were measured on."""

    def first_line(*command: str) -> str:
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        return (run.stdout.splitlines() or ["unknown"])[0]

    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": f"{os.cpu_count()} x {models[0].split(':')[1].strip() if models else platform.machine()}",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "peer": first_line("qemu-storage-daemon", "--version"),
        "vhostcache": first_line(str(VHOSTCACHE), "version"),
    }


def as_json(results: Results, verdicts: list[Verdict]) -> dict[str, Any]:
    return {
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "scale": asdict(results.scale),
        "cases": results.cases,
        "latency_us": results.latency_us,
        "idle_share": results.idle_share,
        "memory_bytes": results.memory_bytes,
        "verified_bytes": results.verified_bytes,
        "facts": [{"what": f.what, "value": f.value, "unit": f.unit, "found": f.found} for f in results.facts],
        "over_time": asdict(results.over_time) if results.over_time else None,
        "verdicts": [vars(v) for v in verdicts],
    }


def check_machine() -> None:
    cpus = os.sched_getaffinity(0)
    if not {SERVER_CPU, CLIENT_CPU} <= cpus:
        raise BenchError(f"the bench needs processors {SERVER_CPU} and {CLIENT_CPU}; there are {sorted(cpus)}")


def run(arguments: argparse.Namespace) -> int:
    check_machine()
    scale = QUICK if arguments.quick else FULL
    if arguments.runs:
        scale = replace(scale, runs=arguments.runs, log=replace(scale.log, dbench_runs=arguments.runs))
    image = arguments.dir / f"disk-{scale.image_bytes // MIB}.img"
    cases, bars = make_cases(scale)
    with_log, bars_with_log, steady = log_cases(scale)
    cases = [c for c in cases + with_log if not arguments.only or arguments.only in c.name]
    bars = [b for b in bars + bars_with_log if b.case in cases]
    steady = [s for s in steady if s.case in cases]
    make_image(image, scale.image_bytes)
    with tempfile.TemporaryDirectory(prefix="vhostcache-bench-") as folder, Caches(image) as caches:
        bench_run = Bench(scale, image, Path(folder), caches)
        bench_run.run_verification()
        for case in cases:
            bench_run.run_case(case)
        for name in bench_run.scenarios:
            if not arguments.only or arguments.only in name:
                bench_run.run_scenario(name)
        caches.remove()
        if not arguments.only:
            bench_run.run_idle()
    verdicts = judge(bench_run.results, bars, steady)
    print_verdicts(verdicts)
    data = as_json(bench_run.results, verdicts)
    output = arguments.output or arguments.dir / ("quick.json" if arguments.quick else "result.json")
    output.write_text(json.dumps(data, indent=1) + "\n")
    console.print(f"results: {output}")
    if arguments.docs:
        plot(data, ROOT / "docs" / "performance.svg")
        if data["over_time"]:
            plot_over_time(data["over_time"], ROOT / "docs" / "over-time.svg")
        put_between_marks(ROOT / "docs" / "performance.md", markdown(data))
        console.print("docs/performance.md and docs/performance.svg have these figures now")
    if arguments.strict and not all(v.cleared for v in verdicts):
        return 1
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small and short: that everything runs, not how fast")
    parser.add_argument("--dir", type=Path, default=ROOT / ".cache" / "bench", help="where the image lies: a real disk")
    parser.add_argument("--runs", type=int, help="repetitions of each case")
    parser.add_argument("--only", help="only cases and scenarios with this in their name")
    parser.add_argument("--output", type=Path, help="the JSON file")
    parser.add_argument("--docs", action="store_true", help="write the figures into docs/performance.md")
    parser.add_argument("--strict", action="store_true", help="exit 1 if a bar is not cleared")
    arguments = parser.parse_args()
    try:
        sys.exit(run(arguments))
    except BenchError as error:
        sys.exit(f"bench: {error}")


if __name__ == "__main__":
    main()
