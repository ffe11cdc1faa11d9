"""A guest over time: its log fills, is drained, and the backend is gone for a while and comes back.

Six phases of the same length. The guest writes as fast as it can, or one block and a flush after the other.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tests.bench.cases import MIB
from tests.bench.load import bench
from tests.bench.nbdkit import Nbdkit
from tests.bench.servers import Running

FAST = ("--rw", "randwrite", "--bs", "4k", "--iodepth", "32")
FLUSHED = ("--rw", "randwrite", "--bs", "4k", "--iodepth", "1", "--fsync", "1")
INTERVAL_MS = 250
LOOK_S = 0.5
# Nothing may complete for as long as the backend is gone, and that is no fault.
PATIENCE_S = 600


@dataclass
class Timeline:
    """What the plot shows; seconds count from the beginning."""

    phases: list[dict[str, Any]] = field(default_factory=list)  # name, begin_s, end_s
    gone_s: list[float] = field(default_factory=list)  # when the backend went and when it came back
    load: list[dict[str, Any]] = field(default_factory=list)  # intervals of the load generator
    log: list[dict[str, float]] = field(default_factory=list)  # at_s, used_bytes, dirty_bytes
    log_bytes: int = 0


class Recorder:
    """Runs the phases on a server that is ready, and kills and starts its backend meanwhile."""

    def __init__(self, running: Running, nbd: Nbdkit, size: int, phase_s: float) -> None:
        self._running, self._nbd, self._size, self._phase_s = running, nbd, size, phase_s
        self._origin_s = time.monotonic()
        self.found = Timeline()

    def run(self) -> Timeline:
        done = threading.Event()
        looks = threading.Thread(target=self._look_now_and_then, args=(done,))
        looks.start()
        try:
            self._run_phases()
        finally:
            done.set()
            looks.join()
        return self.found

    def _run_phases(self) -> None:
        self._load("as fast as it can", FAST)
        self._load("a flush after each write", FLUSHED)
        self._nbd.kill()
        self.found.gone_s.append(self._now_s())
        self._load("a flush after each write", FLUSHED)
        self._load("as fast as it can", FAST, phases=2, after_one=self._bring_back)
        self._load("a flush after each write", FLUSHED)

    def _bring_back(self) -> None:
        self._nbd.start()
        self.found.gone_s.append(self._now_s())

    def _load(
        self, name: str, options: tuple[str, ...], phases: int = 1, after_one: Callable[[], None] | None = None
    ) -> None:
        with ThreadPoolExecutor(1) as pool:
            load = pool.submit(self._run_load, options, phases * self._phase_s)
            if after_one is not None:
                # Here: what a thread of its own had started would end with it.
                time.sleep(self._phase_s)
                after_one()
            job = load.result()
        end_s = self._now_s()
        begin_s = end_s - job["job_runtime"] / 1000
        self.found.phases.append({"name": name, "begin_s": begin_s, "end_s": end_s})
        for interval in job["series"]:
            self.found.load.append(
                {**interval, "begin_s": begin_s + interval["begin_s"], "end_s": begin_s + interval["end_s"]}
            )

    def _run_load(self, options: tuple[str, ...], runtime_s: float) -> dict[str, Any]:
        often = ("--log_avg_msec", str(INTERVAL_MS), "--size", str(self._size), "--timeout", str(PATIENCE_S))
        report = bench(self._running.socket, *options, *often, "--runtime", str(runtime_s), timeout_s=2 * PATIENCE_S)
        (job,) = report["jobs"]
        found: dict[str, Any] = job
        return found

    def _look_now_and_then(self, done: threading.Event) -> None:
        while True:
            status = self._running.status()
            self.found.log_bytes = status["cache"]["log_bytes"]
            self.found.log.append(
                {
                    "at_s": self._now_s(),
                    "used_bytes": status["cache"]["log_used_bytes"],
                    "dirty_bytes": status["dirty_bytes"],
                }
            )
            if done.wait(LOOK_S):
                return

    def _now_s(self) -> float:
        return time.monotonic() - self._origin_s


def longest_s(timeline: Timeline, kind: str, begin_s: float, end_s: float) -> float:
    """The longest request of that kind that ended in that time."""
    among = [i[kind]["lat_ns"] for i in timeline.load if kind in i and begin_s <= i["end_s"] <= end_s]
    return max((lat["100.000000"] for lat in among), default=0) / 1e9


def waited_s(timeline: Timeline) -> float:
    """From the backend's return to the next write that was answered; 0 if none had to wait."""
    back_s = timeline.gone_s[1]
    after = [i["begin_s"] for i in timeline.load if "write" in i and i["end_s"] > back_s]
    return max(0.0, min(after) - back_s)


def mib_per_s(interval: dict[str, Any]) -> float:
    """Of 4 KiB writes."""
    ios = interval["write"]["ios"] if "write" in interval else 0
    result: float = ios * 4096 / MIB / max(interval["end_s"] - interval["begin_s"], 1e-3)
    return result
