"""`vhostcache bench`: a load generator with fio's option names, for any vhost-user-blk server.

This module plans a load, runs it (csrc/loadgen drives the rings, one thread a queue) and reports it. It is a front-end
like any other: it knows nothing of the daemon, and works with other servers. It never retries: the first request that
fails, or data that is not what was written, ends the run with one line and exit status 1.
"""

import json
import os
import re
import struct
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from vhostcache._loadgen import ffi, lib
from vhostcache.frontend import GUEST_ADDRESS, Feature, Frontend, FrontendError
from vhostcache.loadgen_series import Series

MAX_QUEUE_SIZE = 1024  # the largest ring that libvhost-user takes
MIN_QUEUE_SIZE = 128  # QEMU's default
MAX_VERIFY_BYTES = 4096
PERCENTILES = (1.0, 50.0, 90.0, 99.0, 99.9, 99.99)
WAIT_SLICE_MS = 100
STATE_HEADER = struct.Struct("<8sQQIIQQ")
STATE_MAGIC = b"vhcstate"

# fio's names: which kind of request, whether in random order, and whether mixed with reads.
PATTERNS = {
    "read": ("read", False, False),
    "write": ("write", False, False),
    "randread": ("read", True, False),
    "randwrite": ("write", True, False),
    "rw": ("write", False, True),
    "readwrite": ("write", False, True),
    "randrw": ("write", True, True),
    "trim": ("trim", False, False),
    "randtrim": ("trim", True, False),
    "zero": ("zero", False, False),
    "randzero": ("zero", True, False),
}
KINDS = {"read": lib.LG_READ, "write": lib.LG_WRITE, "trim": lib.LG_DISCARD, "zero": lib.LG_ZERO, "sync": lib.LG_FLUSH}


class LoadError(Exception):
    """The load cannot be run, or it failed: one line says why."""


@dataclass(frozen=True)
class Load:
    """What is asked for; the fields have fio's names and meanings. Sizes in bytes, times in seconds, 0 = not given."""

    socket: str
    rw: str = "randread"
    bs: int = 4096
    iodepth: int = 1
    numjobs: int = 1
    runtime: float = 0
    size: int = 0
    offset: int = 0
    number_ios: int = 0
    io_size: int = 0
    rwmixread: int = 50
    fsync: int = 0
    end_fsync: bool = False
    verify: bool = False
    do_verify: bool = True
    verify_only: bool = False
    verify_state: str | None = None
    seed: int | None = None
    poll: bool = False
    event_idx: bool = True
    indirect: bool = False
    inflight: bool = True
    cpus: tuple[int, ...] = ()
    timeout: float = 30
    log_avg_msec: int = 0

    def check(self) -> None:
        """Raise LoadError for what no server could do."""
        if self.bs % 512 or not 512 <= self.bs <= 64 << 20:
            raise LoadError(f"--bs {self.bs}: a block is a multiple of 512 bytes, at most 64 MiB")
        if self.offset % 512:
            raise LoadError(f"--offset {self.offset}: not a multiple of 512")
        if self.verify and PATTERNS[self.rw][0] == "trim":
            raise LoadError("--verify: what was trimmed may read as anything, so it cannot be verified")
        if self.verify_only and self.verify_state is None and (self.seed is None or self.runtime):
            raise LoadError(
                "--verify_only repeats a run whose extent is known: give --seed and no --runtime, or --verify_state"
            )


@dataclass
class Latency:
    """The distribution of one kind of request, in ns."""

    count: int = 0
    total_bytes: int = 0
    min_ns: int = 0
    max_ns: int = 0
    sum_ns: float = 0
    square_ns: float = 0
    buckets: dict[int, int] = field(default_factory=dict)

    def add(self, result: Any, kind: int) -> None:
        """Add one queue's counters."""
        n = result.requests[kind]
        if n == 0:
            return
        self.min_ns = result.min_ns[kind] if self.count == 0 else min(self.min_ns, result.min_ns[kind])
        self.max_ns = max(self.max_ns, result.max_ns[kind])
        self.count += n
        self.total_bytes += result.bytes[kind]
        self.sum_ns += result.sum_ns[kind]
        self.square_ns += result.square_ns[kind]
        for bucket, hits in enumerate(ffi.unpack(result.histogram[kind], lib.LG_HISTOGRAM)):
            if hits:
                self.buckets[bucket] = self.buckets.get(bucket, 0) + hits

    @property
    def mean_ns(self) -> float:
        return self.sum_ns / self.count if self.count else 0.0

    @property
    def deviation_ns(self) -> float:
        if not self.count:
            return 0.0
        return float(max(0.0, self.square_ns / self.count - self.mean_ns**2) ** 0.5)

    def percentile_ns(self, percent: float) -> int:
        """The latency that `percent` of the requests did not exceed (to 1.6 %)."""
        seen = 0
        for bucket in sorted(self.buckets):
            seen += self.buckets[bucket]
            if seen >= self.count * percent / 100:
                return min(self.max_ns, int(lib.lg_bucket_ns(bucket + 1)) - 1)
        return self.max_ns

    def as_fio(self) -> dict[str, Any]:
        """The object that fio calls clat_ns."""
        return {
            "min": self.min_ns,
            "max": self.max_ns,
            "mean": self.mean_ns,
            "stddev": self.deviation_ns,
            "N": self.count,
            "percentile": {f"{p:.6f}": self.percentile_ns(p) for p in PERCENTILES} if self.count else {},
        }


@dataclass
class Report:
    """What a run did. `error` is "" or the one line that says how it failed."""

    load: Load
    seed: int
    disk_bytes: int = 0
    error: str = ""
    runtime_s: float = 0
    kinds: dict[str, Latency] = field(default_factory=dict)
    kicks: int = 0
    interrupts: int = 0
    verified_bytes: int = 0
    series: list[dict[str, Any]] = field(default_factory=list)

    def iops(self, kind: str) -> float:
        return self.kinds[kind].count / self.runtime_s if self.runtime_s and kind in self.kinds else 0.0

    def bytes_per_s(self, kind: str) -> float:
        return self.kinds[kind].total_bytes / self.runtime_s if self.runtime_s and kind in self.kinds else 0.0

    def _fio_direction(self, kind: str) -> dict[str, Any]:
        latency = self.kinds.get(kind, Latency())
        return {
            "io_bytes": latency.total_bytes,
            "io_kbytes": latency.total_bytes >> 10,
            "bw_bytes": int(self.bytes_per_s(kind)),
            "bw": int(self.bytes_per_s(kind)) >> 10,
            "iops": self.iops(kind),
            "runtime": round(self.runtime_s * 1000),
            "total_ios": latency.count,
            "clat_ns": latency.as_fio(),
        }

    def as_json(self) -> dict[str, Any]:
        """fio's JSON, as far as it applies; `zero`, `verified_bytes`, `kicks`, `interrupts` and `series` are ours."""
        options = asdict(self.load) | {"seed": self.seed, "cpus": list(self.load.cpus)}
        sync = self.kinds.get("sync", Latency())
        return {
            "timestamp": int(time.time()),
            "global options": options,
            "disk_bytes": self.disk_bytes,
            "error": self.error,
            "jobs": [
                {
                    "jobname": "bench",
                    "error": int(bool(self.error)),
                    "job_runtime": round(self.runtime_s * 1000),
                    **{kind: self._fio_direction(kind) for kind in ("read", "write", "trim", "zero")},
                    "sync": {"total_ios": sync.count, "lat_ns": sync.as_fio()},
                    "verified_bytes": self.verified_bytes,
                    "kicks": self.kicks,
                    "interrupts": self.interrupts,
                    **({"series": self.series} if self.load.log_avg_msec else {}),
                }
            ],
        }

    def table(self) -> Table:
        load = self.load
        title = f"{load.rw} bs={load.bs} iodepth={load.iodepth} numjobs={load.numjobs}" + (" poll" if load.poll else "")
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("", no_wrap=True)
        for head in ("requests", "IOPS", "MiB/s", "mean µs", "p50", "p99", "p99.9", "max µs"):
            table.add_column(head, justify="right", no_wrap=True)
        for kind, latency in self.kinds.items():
            if latency.count:
                times = [latency.mean_ns, *(latency.percentile_ns(p) for p in (50, 99, 99.9)), latency.max_ns]
                table.add_row(
                    kind,
                    f"{latency.count:,}",
                    f"{self.iops(kind):,.0f}",
                    f"{self.bytes_per_s(kind) / (1 << 20):,.1f}",
                    *(f"{t / 1000:,.1f}" if t < 1e6 else f"{t / 1000:,.0f}" for t in times),
                )
        return table


class Job:
    """A load on a connected front-end: shared memory, started queues and the C job. A context manager."""

    def __init__(self, load: Load, seed: int) -> None:
        self.load = load
        self.seed = seed
        kind, _, _ = PATTERNS[load.rw]
        self.frontend = Frontend(
            load.socket,
            load.timeout,
            without=() if load.event_idx else (Feature.EVENT_IDX,),
            inflight=load.inflight,
        )
        try:
            self._check_disk(kind)
            self._job = self._start()
        except BaseException:
            self.frontend.close()
            raise

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self._job = None  # its threads have ended; the memory may go
        self.frontend.close()

    # -- planning --

    def _check_disk(self, kind: str) -> None:
        load, disk, frontend = self.load, self.frontend.config, self.frontend
        size = load.size or disk.capacity_bytes - load.offset
        if load.offset + size > disk.capacity_bytes or size <= 0:
            raise LoadError(
                f"--offset {load.offset} --size {size} does not fit the disk of {disk.capacity_bytes} bytes"
            )
        self.blocks = size // load.numjobs // load.bs
        if self.blocks == 0:
            raise LoadError(f"{size} bytes for {load.numjobs} queues: less than one block of {load.bs} each")
        if load.numjobs > frontend.max_queues:
            raise LoadError(f"--numjobs {load.numjobs}: the server has {frontend.max_queues} queues")
        if load.bs % disk.block_bytes or load.offset % disk.block_bytes:
            raise LoadError(f"--bs and --offset must be multiples of the disk's block size, {disk.block_bytes}")
        if frontend.has(Feature.RO) and kind != "read" and not load.verify_only:
            raise LoadError("the disk is read-only")
        if (load.fsync or load.end_fsync) and not frontend.has(Feature.FLUSH):
            raise LoadError("the server offers no flush")
        limits = {
            "trim": (Feature.DISCARD, disk.max_discard_bytes),
            "zero": (Feature.WRITE_ZEROES, disk.max_write_zeroes_bytes),
        }
        if kind in limits:
            feature, most = limits[kind]
            if not frontend.has(feature):
                raise LoadError(f"the server offers no {feature.name.lower().replace('_', ' ')}")
            if most and load.bs > most:
                raise LoadError(f"--bs {load.bs}: the server takes at most {most} bytes a {kind}")

    def _requests(self) -> int:
        """Requests of each queue; 0 = as many as the time allows."""
        load = self.load
        if load.number_ios:
            return load.number_ios
        if load.io_size:
            return max(1, load.io_size // load.bs)
        return 0 if load.runtime else self.blocks

    def _c_config(self) -> Any:
        load, disk = self.load, self.frontend.config
        kind, is_random, mixed = PATTERNS[load.rw]
        config = ffi.new("lg_config *")
        config.read_percent = load.rwmixread if mixed else 100 if kind == "read" else 0
        config.kind = KINDS["write" if kind == "read" else kind]
        config.random = is_random
        config.block_bytes = load.bs
        config.depth = load.iodepth
        config.segment_bytes = min(disk.size_max_bytes or load.bs, load.bs)
        config.queues = load.numjobs
        config.event_idx = self.frontend.has(Feature.EVENT_IDX)
        config.poll = load.poll
        config.flush_every = load.fsync
        config.flush_at_end = load.end_fsync
        config.verify = load.verify or load.verify_only
        config.verify_bytes = MAX_VERIFY_BYTES if load.bs % MAX_VERIFY_BYTES == 0 else 512
        config.requests = self._requests()
        config.runtime_ns = int(load.runtime * 1e9)
        config.timeout_ns = int(load.timeout * 1e9)
        config.seed = self.seed
        config.guest_address = GUEST_ADDRESS
        segments = -(-load.bs // config.segment_bytes)
        if disk.seg_max and segments > disk.seg_max:
            raise LoadError(f"--bs {load.bs}: the server takes at most {disk.seg_max} segments a request")
        self._choose_ring(config, segments)
        return config

    def _choose_ring(self, config: Any, segments: int) -> None:
        can_indirect = self.frontend.has(Feature.INDIRECT_DESC)
        if self.load.indirect and not can_indirect:
            raise LoadError("--indirect: the server offers no indirect descriptors")
        config.indirect = self.load.indirect
        if lib.lg_descriptors(config) > MAX_QUEUE_SIZE and can_indirect:
            config.indirect = 1
        needed = lib.lg_descriptors(config)
        if needed > MAX_QUEUE_SIZE or segments + 2 > MAX_QUEUE_SIZE:
            raise LoadError(
                f"--iodepth {self.load.iodepth} --bs {self.load.bs} needs a ring of {needed} descriptors; "
                f"{MAX_QUEUE_SIZE} is the most"
            )
        config.queue_size = max(MIN_QUEUE_SIZE, 1 << (needed - 1).bit_length())

    def _start(self) -> Any:
        load, frontend = self.load, self.frontend
        self._config = self._c_config()
        layout = ffi.new("lg_layout *")
        lib.lg_measure(self._config, layout)
        memory = frontend.share_memory(layout.bytes * load.numjobs)
        self._memory = ffi.from_buffer("uint8_t[]", memory, require_writable=True)
        frontend.announce_memory(int(ffi.cast("uintptr_t", self._memory)))
        frontend.track_inflight(load.numjobs, self._config.queue_size)
        queues = ffi.new("lg_queue_config[]", load.numjobs)
        for i, queue in enumerate(queues):
            at = layout.bytes * i
            queue.memory_offset = at
            queue.offset_bytes = load.offset + i * self.blocks * load.bs
            queue.blocks = self.blocks
            queue.cpu = load.cpus[i % len(load.cpus)] if load.cpus else -1
            queue.kick_fd, queue.call_fd = frontend.start_queue(
                i, self._config.queue_size, at + layout.descriptors, at + layout.available, at + layout.used
            )
        job = lib.lg_new(self._config, queues, self._memory)
        if not job:
            raise LoadError("out of memory")
        return ffi.gc(job, lib.lg_free)

    # -- running --

    def run_phase(self, phase: int, watch: Callable[[int], None]) -> list[Any]:
        """Run one phase to its end. Returns the queues' results; raises LoadError with the first that failed."""
        error = lib.lg_start(self._job, phase)
        if error:
            raise LoadError(f"threads: {os.strerror(-error)}")
        running = True
        while running:
            try:
                running = bool(lib.lg_wait(self._job, min(WAIT_SLICE_MS, self.load.log_avg_msec or WAIT_SLICE_MS)))
                if running and self.frontend.hung_up():
                    # Let threads that have met an error of their own say so first.
                    lib.lg_stop(self._job, b"the server closed the connection")
                watch(lib.lg_progress(self._job))
            except KeyboardInterrupt:  # wherever it came: who leaves here waits for the threads all the same
                lib.lg_stop(self._job, ffi.NULL)
        return [lib.lg_get_result(self._job, i) for i in range(self.load.numjobs)]

    def histograms(self) -> dict[str, list[int]]:
        """Hits in each bucket until now, by kind, while it runs."""
        found: dict[str, list[int]] = {}
        for name, kind in KINDS.items():
            each = [
                ffi.unpack(lib.lg_get_result(self._job, i).histogram[kind], lib.LG_HISTOGRAM)
                for i in range(self.load.numjobs)
            ]
            found[name] = each[0] if len(each) == 1 else [sum(column) for column in zip(*each, strict=True)]
        return found

    def error(self) -> str:
        """What the first queue that failed says, or ""."""
        for i in range(self.load.numjobs):
            text = bytes(ffi.string(lib.lg_get_result(self._job, i).error)).decode()
            if text:
                return text
        return ""

    # -- what a verification expects, kept between runs --

    def save_state(self, path: str) -> None:
        """Write the newest acknowledged and issued write of every piece."""
        load = self.load
        with Path(path).open("wb") as file:
            file.write(STATE_HEADER.pack(STATE_MAGIC, self.seed, load.offset, load.bs, load.numjobs, self.blocks, 0))
            for i in range(load.numjobs):
                pieces = ffi.new("uint64_t *")
                table = lib.lg_expected(self._job, i, pieces)
                file.write(ffi.buffer(table, 8 * pieces[0]))

    def load_state(self, path: str) -> None:
        """Read what save_state wrote, for a load of the same shape."""
        load = self.load
        shape = STATE_HEADER.pack(STATE_MAGIC, self.seed, load.offset, load.bs, load.numjobs, self.blocks, 0)
        try:
            with Path(path).open("rb") as file:
                if file.read(STATE_HEADER.size) != shape:
                    raise LoadError(f"{path}: is the state of a run with other --offset, --bs, --size or --numjobs")
                for i in range(load.numjobs):
                    pieces = ffi.new("uint64_t *")
                    table = lib.lg_expected(self._job, i, pieces)
                    ffi.memmove(table, file.read(8 * pieces[0]), 8 * pieces[0])
        except (OSError, ValueError) as error:
            raise LoadError(f"{path}: {error}") from error


def state_seed(path: str) -> int:
    """The seed of the run that wrote this state."""
    try:
        with Path(path).open("rb") as file:
            magic, seed, *_ = STATE_HEADER.unpack(file.read(STATE_HEADER.size))
    except (OSError, struct.error) as error:
        raise LoadError(f"{path}: {error}") from error
    if magic != STATE_MAGIC:
        raise LoadError(f"{path}: not a state of verification")
    return int(seed)


def _choose_seed(load: Load) -> int:
    if load.seed is not None:
        return load.seed
    if load.verify_only and load.verify_state is not None:
        return state_seed(load.verify_state)
    # A run that is verified must not take an earlier run's data for its own.
    return int.from_bytes(os.urandom(4), "little")


def run(load: Load, watch: Callable[[int], None] = lambda _: None) -> Report:
    """Run a load to its end and verify it.

    Raises LoadError or FrontendError if it could not be started; a load that failed has the reason in its report.
    """
    load.check()
    report = Report(load, _choose_seed(load))
    if load.cpus:
        try:
            os.sched_setaffinity(0, load.cpus)
        except OSError as error:
            raise LoadError(f"--cpus {','.join(map(str, load.cpus))}: {error.strerror}") from error
    with Job(load, report.seed) as job:
        report.disk_bytes = job.frontend.config.capacity_bytes
        try:
            _run_phases(job, report, watch)
        finally:
            if load.verify_state is not None and not load.verify_only:
                job.save_state(load.verify_state)
        if not report.error:
            job.frontend.stop_queues()
    return report


def _run_phases(job: Job, report: Report, watch: Callable[[int], None]) -> None:
    load = job.load
    if not load.verify_only:
        results = _run_load(job, report, watch)
        report.error = job.error()
        report.runtime_s = max(r.runtime_ns for r in results) / 1e9
        for name, kind in KINDS.items():
            latency = report.kinds.setdefault(name, Latency())
            for result in results:
                latency.add(result, kind)
        report.kicks = sum(r.kicks for r in results)
        report.interrupts = sum(r.interrupts for r in results)
        report.verified_bytes = _verified_bytes(results, load)
    elif load.verify_state is not None:
        job.load_state(load.verify_state)
    else:
        job.run_phase(lib.LG_REPLAY, watch)
    if ((load.verify and load.do_verify) or load.verify_only) and not report.error:
        results = job.run_phase(lib.LG_VERIFY, watch)
        report.error = job.error()
        report.verified_bytes += _verified_bytes(results, load)


def _run_load(job: Job, report: Report, watch: Callable[[int], None]) -> list[Any]:
    """The load itself, and its series if one is wanted."""
    interval_s = job.load.log_avg_msec / 1000
    if not interval_s:
        return job.run_phase(lib.LG_RUN, watch)
    series = Series(job.histograms, lib.lg_bucket_ns)
    started_s = time.monotonic()
    due_s = interval_s

    def watch_and_mark(done: int) -> None:
        nonlocal due_s
        watch(done)
        now_s = time.monotonic() - started_s
        if now_s >= due_s:
            series.mark(now_s)
            due_s = now_s + interval_s

    results = job.run_phase(lib.LG_RUN, watch_and_mark)
    series.mark(time.monotonic() - started_s)
    report.series = series.intervals
    return results


def _verified_bytes(results: list[Any], load: Load) -> int:
    piece = MAX_VERIFY_BYTES if load.bs % MAX_VERIFY_BYTES == 0 else 512
    return int(sum(r.verified for r in results)) * piece


# ---- the command ----


def parse_size(text: str | int) -> int:
    """fio's sizes: 4k, 128m, 1g; also 4KiB. Powers of 1024."""
    match = re.fullmatch(r"(\d+)([kmgt]?)(i?b)?", str(text).strip().lower())
    if not match:
        raise click.BadParameter(f"{text!r} is not a size (such as 4k, 128m, 1g)")
    return int(match[1]) << (10 * " kmgt".index(match[2] or " "))


def parse_cpus(text: str | tuple[int, ...]) -> tuple[int, ...]:
    """A list of processors: 1 or 0,2 or 0-3."""
    if isinstance(text, tuple):
        return text
    cpus: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part.strip())
        if not match:
            raise click.BadParameter(f"{text!r} is not a list of processors (such as 1 or 0,2 or 0-3)")
        cpus += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(cpus)


@click.command("bench", short_help="Put load on a vhost-user-blk server and measure it.")
@click.argument("socket", type=click.Path(exists=False))
@click.option("--rw", type=click.Choice(list(PATTERNS)), default="randread", show_default=True, help="What to do.")
@click.option("--bs", type=parse_size, metavar="SIZE", default="4k", show_default=True, help="Bytes of one request.")
@click.option(
    "--iodepth", type=click.IntRange(1, MAX_QUEUE_SIZE), default=1, show_default=True, help="In flight, a queue."
)
@click.option("--numjobs", type=click.IntRange(1, 256), default=1, show_default=True, help="Queues, a thread for each.")
@click.option("--runtime", type=click.FloatRange(0, 1e6), default=0, help="Seconds; without it, once over --size.")
@click.option(
    "--size",
    type=parse_size,
    metavar="SIZE",
    default="0",
    help="Bytes of the disk to use, shared out among the queues. Default: all.",
)
@click.option("--offset", type=parse_size, metavar="SIZE", default="0", help="Where on the disk to begin.")
@click.option("--number_ios", "--number-ios", type=click.IntRange(0), default=0, help="Requests of each queue.")
@click.option(
    "--io_size", "--io-size", type=parse_size, metavar="SIZE", default="0", help="Bytes that each queue transfers."
)
@click.option("--rwmixread", type=click.IntRange(0, 100), default=50, show_default=True, help="Percent reads in a mix.")
@click.option(
    "--fsync", "--fdatasync", type=click.IntRange(0), default=0, help="A flush after so many writes, drained."
)
@click.option("--end_fsync", "--end-fsync", is_flag=True, help="A flush at the end.")
@click.option(
    "--verify", type=click.Choice(["crc32c"]), help="Write data that describes itself, read it back, check it."
)
@click.option(
    "--do_verify",
    "--do-verify",
    type=click.BOOL,
    default=True,
    metavar="0|1",
    help="0: write what --verify writes, and leave it to a run with --verify_only to read it back.",
)
@click.option(
    "--verify_only", "--verify-only", is_flag=True, help="Only check what a run with these options has written."
)
@click.option(
    "--verify_state",
    "--verify-state",
    type=click.Path(dir_okay=False),
    help="Keep what was acknowledged in this file; --verify_only reads it (also after a run that broke off).",
)
@click.option(
    "--seed", "--randseed", type=click.IntRange(0, 2**32 - 1), help="Repeat a run. Default: a new one each time."
)
@click.option("--poll", is_flag=True, help="Spin on the used ring instead of sleeping.")
@click.option("--event-idx/--no-event-idx", default=True, help="Use VIRTIO_RING_F_EVENT_IDX where it is offered.")
@click.option("--indirect", is_flag=True, help="Use indirect descriptors.")
@click.option("--inflight/--no-inflight", default=True, help="Use the in-flight area where it is offered.")
@click.option(
    "--cpus",
    "--cpus_allowed",
    type=parse_cpus,
    metavar="LIST",
    default=(),
    help="Processors to run on, such as 1 or 0,2.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0.1, 1e6),
    default=30,
    show_default=True,
    help="Give up when nothing completes for so many seconds.",
)
@click.option(
    "--log_avg_msec",
    "--log-avg-msec",
    type=click.IntRange(0, 3_600_000),
    default=0,
    help="Requests and latencies of each interval of so many milliseconds, in the JSON's `series`.",
)
@click.option("--json", "as_json", is_flag=True, help="fio's JSON on standard output.")
def bench_command(as_json: bool, verify: str | None, **options: Any) -> None:
    """Drive the vhost-user-blk server at SOCKET as a guest's virtio driver would, and measure it.

    The options have fio's names. Each queue (--numjobs) has a thread and its own part of --size. With --verify crc32c
    all that was written is read back and checked at the end; a mismatch names the offset, what was expected and what
    was found.

    \b
    vhostcache bench /run/vda.sock --rw randwrite --bs 4k --iodepth 32 --runtime 5
    vhostcache bench /run/vda.sock --rw randrw --size 128m --number_ios 100000 --iodepth 16 --verify crc32c
    vhostcache bench /run/vda.sock --rw write --bs 1m --iodepth 8 --runtime 5 --poll --cpus 1

    Exit status: 0 done (and verified), 1 a request, the server or the verification failed, 2 wrong options.
    """
    load = Load(verify=verify is not None, **options)
    console = Console(stderr=True)
    try:
        if as_json or not console.is_terminal:
            report = run(load)
        else:
            with console.status("…") as status:
                report = run(load, lambda done: status.update(f"{load.rw}: {done:,} requests"))
    except (LoadError, FrontendError) as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))
    else:
        _print(report)
    if report.error:
        raise click.ClickException(report.error)


def _print(report: Report) -> None:
    console = Console()
    if any(latency.count for latency in report.kinds.values()):
        console.print(report.table())
        console.print(
            f"{report.runtime_s:.2f} s, {report.kicks:,} kicks, {report.interrupts:,} interrupts, seed {report.seed}",
            highlight=False,
        )
    if report.verified_bytes and not report.error:
        console.print(f"verified: {report.verified_bytes / (1 << 20):,.1f} MiB are what was written", highlight=False)


if __name__ == "__main__":
    bench_command.main(prog_name="vhostcache bench")
