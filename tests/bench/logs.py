"""What has a log, beyond loads: flushes against a slow backend, group commit, what is written for a byte accepted,
starts after a crash and after a good end, memory, and a file system's workload in a guest.

Owns the cache files, which lie beside the image. Each scenario starts with an empty log and leaves the image without a
cache; figures go into `Results.facts`, and a bar on one of them is a `Limit` there.
"""

import contextlib
import mmap
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.bench.cases import GIB, KIB, MIB, Scale, in_words
from tests.bench.load import bench
from tests.bench.servers import CLIENT_CPU, QUEUES, SERVER_CPU, BenchError, Running, Server
from tests.frontend import T_FLUSH, Frontend
from tests.guest import GuestError, uml

SPARE_BYTES = 2 * GIB  # left free on the disk
HEAD_BYTES = MIB  # superblocks; zeroed, a cache file is empty
MARK = "user.vhostcache"
FLUSHES_AT_ONCE = 16
DBENCH_LOAD = Path("/usr/share/dbench/client.txt")
DBENCH_RESULT = re.compile(r"Throughput ([\d.]+) MB/sec.*max_latency=([\d.]+) ms")
DBENCH_DISK_BYTES = 2 * GIB


@dataclass(frozen=True)
class Fact:
    """One figure, and the bar on it if there is one: at most `most`, or at least `least`."""

    what: str
    value: float
    unit: str
    most: float | None = None
    least: float | None = None

    @property
    def has_bar(self) -> bool:
        return self.most is not None or self.least is not None

    @property
    def cleared(self) -> bool:
        return (self.most is None or self.value <= self.most) and (self.least is None or self.value >= self.least)

    @property
    def bar(self) -> str:
        limit = f"≤ {self.most:g}" if self.most is not None else f"≥ {self.least:g}"
        return f"{limit} {self.unit}".rstrip()

    @property
    def found(self) -> str:
        number = f"{self.value:,.0f}" if self.value >= 100 else f"{self.value:.3g}"
        return f"{number} {self.unit}" if self.unit else f"{self.value:.3f}".removesuffix(".000")


class Caches:
    """The cache file, one at a time, and the folder of its RAM tier."""

    def __init__(self, image: Path) -> None:
        self.image = image
        self.path = image.with_suffix(".cache")
        self.ram_folder = Path(tempfile.mkdtemp(prefix="vhostcache-bench-", dir="/dev/shm"))

    def __enter__(self) -> "Caches":
        self.release()  # after a run that was broken off
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
        shutil.rmtree(self.ram_folder)

    def remove(self) -> None:
        """Also what the image says of it: its data is given up."""
        self.path.unlink(missing_ok=True)
        self.release()

    def release(self) -> None:
        """The image is one without a cache from now on; what only the cache held is given up."""
        with contextlib.suppress(OSError):
            os.removexattr(self.image, MARK)

    def options(self, size: int, *more: str) -> list[str]:
        command = ["--cache", str(self.path), "--cache-size", str(size), "--ram-dir", str(self.ram_folder)]
        return [*command, *more]

    def room_bytes(self) -> int:
        """The largest cache file that fits the disk."""
        status = os.statvfs(self.path.parent)
        mine = self.path.stat().st_blocks * 512 if self.path.exists() else 0
        return max(0, status.f_bavail * status.f_frsize + mine - SPARE_BYTES)

    def make(self, size: int) -> None:
        """An empty one, each block of which has been written before, as in all but the first lap of a log's life.

        The first write to a block that is only allocated costs the file system an entry in its journal.
        """
        if self.room_bytes() < size:
            raise BenchError(f"{self.path}: a cache of {in_words(size)} does not fit the disk (--dir)")
        self.release()
        zeroes = mmap.mmap(-1, 8 * MIB)  # aligned
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        try:
            have = os.fstat(descriptor).st_size
            os.ftruncate(descriptor, min(have, size))
            for at in (*range(0, HEAD_BYTES, MIB), *range(min(have, size), size, len(zeroes))):
                length = min(len(zeroes), size - at) if at else HEAD_BYTES
                with memoryview(zeroes) as whole, whole[:length] as piece:
                    os.pwritev(descriptor, [piece], at)
            if have == 0:
                os.pwritev(descriptor, [zeroes], 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
            zeroes.close()


class LogBench:
    """The scenarios. Each returns its facts; its name is what `--only` looks for."""

    def __init__(self, scale: Scale, server: Server, image: Path, folder: Path, caches: Caches) -> None:
        self.scale, self.log = scale, scale.log
        self.server, self.image, self.folder, self.caches = server, image, folder, caches
        self.scenarios = {
            "log: flushes with a slow backend": self.slow_backend,
            "log: flushes at once": self.flushes_at_once,
            "log: bytes written for each accepted": self.written_per_accepted,
            "log: recovery and memory": self.recovery,
            "log: clean restart of a large cache": self.clean_restart,
            "log: dbench in user-mode-linux": self.dbench,
        }

    def start(self, *options: str, server: Server | None = None, size: int = 0) -> Running:
        """Ours, with a log; ready."""
        options = tuple(self.caches.options(size or self.log.log_bytes, *options))
        running = Running(
            server or self.server, self.image, self.scale.image_bytes, self.scale.ram, self.folder, options
        )
        running.wait_for("ready")
        return running

    def start_without_log(self, *options: str, server: Server) -> Running:
        running = Running(server, self.image, self.scale.image_bytes, self.scale.ram, self.folder, options)
        running.wait_for("ready")
        return running

    def _slow(self, delay_ms: int) -> Server:
        """Ours, with a backend that takes so much longer."""
        program = (sys.executable, "-P", "-m", "tests.bench.slow_backend", str(delay_ms))
        return Server(self.server.name, (*program, *self.server.arguments[1:]), on_image=True)

    # -- flushes --

    def slow_backend(self) -> list[Fact]:
        """A flush's latency while the destager is at work on a backend that takes its time."""
        p50: dict[int, list[float]] = {delay: [] for delay in self.log.delays_ms}
        p99: dict[int, list[float]] = {delay: [] for delay in self.log.delays_ms}
        bare: list[float] = []
        for _ in range(self.scale.runs):
            self.caches.make(self.log.log_bytes)
            bare.append(self._bare_p99_us())
            for delay in self.log.delays_ms:
                latency = self._flush_latency(delay)
                p50[delay].append(latency["50.000000"] / 1000)
                p99[delay].append(latency["99.000000"] / 1000)
        first = self.log.delays_ms[0]
        floor_us = statistics.median(bare)
        facts = [Fact("write 4 KiB + fdatasync on the host, p99", floor_us, "µs")]
        for delay in self.log.delays_ms:
            name = f"flush, backend takes {delay} ms"
            typical, late = statistics.median(p50[delay]), statistics.median(p99[delay])
            facts.append(Fact(f"{name}: p50", typical, "µs"))
            facts.append(Fact(f"{name}: p99", late, "µs"))
            facts.append(Fact(f"{name}: p99 / p99 of a bare write + fdatasync", late / floor_us, "x", most=2))
            if delay != first:
                # Within noise: the machine's own runs differ by as much.
                same = typical / statistics.median(p50[first])
                facts.append(Fact(f"{name}: p50 / p50 at {first} ms", same, "x", most=1.25))
        return facts

    def _flush_latency(self, delay_ms: int) -> dict[str, float]:
        self.caches.make(self.log.log_bytes)
        with self.start("--destage-after", "50ms", server=self._slow(delay_ms)) as running:
            load = ["--rw", "randwrite", "--bs", "4k", "--iodepth", "1", "--fsync", "1", "--poll"]
            report = bench(running.socket, *load, "--runtime", str(self.log.slow_s))
            if not running.statistics()["backend_operations"]["write"]:
                raise BenchError("nothing was destaged while flushes were measured")
        percentiles: dict[str, float] = report["jobs"][0]["sync"]["lat_ns"]["percentile"]
        return percentiles

    def _bare_p99_us(self) -> float:
        """Of a 4 KiB write, one behind the other, and a fdatasync, on the same file, by the server's processor."""
        block = mmap.mmap(-1, 4 * KIB)
        block[:] = os.urandom(4 * KIB)
        took = []
        descriptor = os.open(self.caches.path, os.O_RDWR | os.O_DIRECT)
        try:
            with on_processor(SERVER_CPU):
                end = time.monotonic() + self.log.slow_s
                at = HEAD_BYTES
                while time.monotonic() < end or len(took) < 100:
                    start = time.perf_counter_ns()
                    os.pwritev(descriptor, [block], at)
                    os.fdatasync(descriptor)
                    took.append(time.perf_counter_ns() - start)
                    at += 4 * KIB
                    at = at if at < self.log.log_bytes else HEAD_BYTES
        finally:
            os.close(descriptor)
        return statistics.quantiles(took, n=100)[98] / 1000

    def flushes_at_once(self) -> list[Fact]:
        """Sixteen flushes, four on each of four queues: how many fdatasyncs of the cache file that takes."""
        self.caches.make(self.log.log_bytes)
        with self.start("--destage", "off") as running, Frontend(running.socket, queues=QUEUES) as frontend:
            before = running.statistics()["log"]["operations"]["flush"]
            for number in range(self.log.flush_rounds):
                requests = []
                for queue in range(QUEUES):
                    frontend.write((number * QUEUES + queue) * 4 * KIB, b"\1" * 4 * KIB, queue)
                    parts = [[frontend.header(T_FLUSH), frontend.room(1)] for _ in range(FLUSHES_AT_ONCE // QUEUES)]
                    heads = [frontend.queues[queue].chain(two) for two in parts]
                    frontend.queues[queue].offer(*heads)
                    requests += [(queue, head) for head in heads]
                for queue in range(QUEUES):
                    frontend.queues[queue].publish()
                for queue, head in requests:
                    frontend.queues[queue].wait(head)
            syncs = running.statistics()["log"]["operations"]["flush"] - before
        each = syncs / self.log.flush_rounds
        return [Fact(f"fdatasyncs for {FLUSHES_AT_ONCE} flushes at once", each, "", most=4)]

    # -- costs --

    def written_per_accepted(self) -> list[Fact]:
        """Bytes that go to the cache device, superblocks included, for each byte of the guest's."""
        self.caches.make(self.log.log_bytes)
        loads = (
            ("full records", ["--iodepth", "32"], 1.05),
            ("4 KiB + flush", ["--iodepth", "1", "--fsync", "1"], 2.1),
        )
        facts = []
        with self.start("--destage", "off") as running:
            count = min(self.log.log_bytes // 4, GIB) // (4 * KIB)
            for name, load, most in loads:
                before = running.statistics()
                number = str(count if len(load) == 2 else count // 16)
                bench(running.socket, "--rw", "randwrite", "--bs", "4k", *load, "--number_ios", number, "--end_fsync")
                after = running.statistics()
                written = sum(after["log"]["bytes"][k] - before["log"]["bytes"][k] for k in ("write", "superblock"))
                accepted = after["bytes"]["write"] - before["bytes"]["write"]
                facts.append(
                    Fact(f"bytes written to the log for one accepted, {name}", written / accepted, "", most=most)
                )
        return facts

    def recovery(self) -> list[Fact]:
        """Random writes without destaging, SIGKILL, and the time until the next daemon is ready."""
        dirty = self.log.dirty_bytes
        size = max(2 * dirty, self.log.log_bytes)
        self.caches.make(size)
        load = ["--rw", "randwrite", "--bs", "4k", "--iodepth", "32", "--poll"]
        with self.start("--destage", "off", size=size) as running:
            # The RAM tier fills first; what memory grows by from then on is the map's and the log's.
            bench(running.socket, *load, "--number_ios", str(min(dirty // 4, 512 * MIB) // (4 * KIB)))
            memory, used = running.memory_bytes(), running.statistics()["log"]["used_blocks"]
            bench(running.socket, *load, "--number_ios", str(dirty // (4 * KIB)))
            memory = running.memory_bytes() - memory
            used = (running.statistics()["log"]["used_blocks"] - used) * 4 * KIB
            running.kill()
        start = time.monotonic()
        with self.start("--destage", "off", size=size) as running:
            took = time.monotonic() - start
            event = running.wait_for("recovered")
            again = running.memory_bytes()
        gib = event["dirty_bytes"] / GIB
        return [
            Fact(f"start after SIGKILL with {gib:.1f} GiB dirty in the log", took, "s"),
            Fact("start after SIGKILL, for each GiB dirty", took / gib, "s", most=1),
            Fact("memory for each GiB of log in use", memory / MIB / (used / GIB), "MiB", most=4),
            Fact("memory after that start, RAM tier included", again / MIB, "MiB"),
        ]

    def clean_restart(self) -> list[Fact]:
        """A large cache file, allocated and hardly written, closed in good order."""
        self.caches.remove()
        size = min(self.log.large_bytes, self.caches.room_bytes() // GIB * GIB)
        size = size or self.log.large_bytes
        start = time.monotonic()
        with self.start(size=size) as running:
            first = time.monotonic() - start
            load = ["--rw", "randwrite", "--bs", "4k", "--iodepth", "32", "--poll"]
            bench(running.socket, *load, "--number_ios", str(64 * MIB // (4 * KIB)))
        took = []
        for _ in range(self.scale.runs):
            start = time.monotonic()
            with self.start(size=size):
                took.append(time.monotonic() - start)
        self.caches.remove()
        return [
            Fact(f"first start of a cache of {in_words(size)}", first, "s"),
            Fact(f"clean restart of a cache of {in_words(size)}", statistics.median(took), "s", most=1),
        ]

    # -- a file system --

    def dbench(self) -> list[Fact]:
        """The disk with its log, and the same disk in directsync mode, under ext4; `-s` opens files for synchronous
        writes. The bars stand on directsync without a log, which puts each write into the image."""
        if shutil.which("dbench") is None:
            raise BenchError("dbench is not installed (Debian: dbench)")
        return [fact for delay in self.log.dbench_delays_ms for fact in self._dbench_with(delay)]

    def _dbench_with(self, delay_ms: int) -> list[Fact]:
        ours, base, logged = "write-back with a log", "directsync", "directsync with a log"
        server = self._slow(delay_ms) if delay_ms else self.server
        where = f", backend takes {delay_ms} ms" if delay_ms else ""
        names = (ours, base, logged) if self.log.dbench_with_log else (ours, base)
        results: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for _ in range(1 if delay_ms else self.log.dbench_runs):
            for name in names:
                self.caches.make(self.log.log_bytes)
                mode = ("--mode", "none" if name == ours else "directsync")
                start = self.start_without_log if name == base else self.start
                with start(*mode, server=server) as running:
                    for sync, result in zip(("", " -s"), self._dbench_run(running.socket), strict=True):
                        results.setdefault((name, sync), []).append(result)
        facts = []
        for sync, least in (("", 2.2), (" -s", 1.6)):
            what = f"dbench{sync}{where}"
            rate, latency = {}, {}
            for name in names:
                rate[name] = statistics.median(r for r, _ in results[name, sync])
                latency[name] = statistics.median(t for _, t in results[name, sync])
                facts.append(Fact(f"{what}, {name}", rate[name], "MB/s"))
                facts.append(Fact(f"{what}, {name}: maximal latency", latency[name], "ms"))
            # A run of a second or two may be too short for any figure. No bar stands on a backend that is made slow.
            ratio = rate[ours] / (rate[base] or 0.01)
            facts.append(Fact(f"{what}: {ours} / {base}", ratio, "x", least=None if delay_ms else least))
            late = latency[ours] / (latency[base] or 0.01)
            most = None if delay_ms else 1
            facts.append(Fact(f"{what}: maximal latency, {ours} / {base}", late, "x", most=most))
        return facts

    def _dbench_run(self, socket: Path) -> list[tuple[float, float]]:
        """(MB/s, maximal latency in ms) without and with -s, in one guest."""
        command = f"dbench -c {DBENCH_LOAD} -D {uml.DISK} -t {self.log.dbench_s}"
        clients = self.log.dbench_clients
        size = min(DBENCH_DISK_BYTES, self.scale.image_bytes) // MIB
        script = f"""
            mkfs.ext4 -q -F -E lazy_itable_init=0,nodiscard /dev/vda {size}M
            mount /dev/vda {uml.DISK}
            sync
            {command} {clients}
            rm -rf {uml.DISK}/clients
            sync
            {command} -s {clients}
            umount {uml.DISK}
            """
        try:
            with on_processor(CLIENT_CPU):
                output = uml.run(script, [socket], self.folder / "uml", timeout_s=60 + 6 * self.log.dbench_s)
        except GuestError as error:
            raise BenchError(str(error)) from error
        found = [(float(rate), float(latency)) for rate, latency in DBENCH_RESULT.findall(output)]
        if len(found) != 2:
            raise BenchError(f"dbench did not say how fast it was: {self.folder / 'uml'}\n{output[-500:]}")
        return found


@contextlib.contextmanager
def on_processor(cpu: int) -> Iterator[None]:
    """This process and what it starts meanwhile."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
