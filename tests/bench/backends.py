"""A slow backend behind a cache, beside qemu-storage-daemon with the same backend and no cache.

The backend is nbdkit. Each scenario starts with an empty log and a new nbdkit, and ends both. What a scenario has
written is looked for in the backend itself, once ours has drained and ended: copied from there by qemu-img, and checked
block by block by a load generator that reads it from a qemu-storage-daemon.
"""

import re
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.bench.cases import KIB, MIB, OURS, PEER, Scale, in_words
from tests.bench.load import bench
from tests.bench.logs import Caches, Fact, on_processor
from tests.bench.nbdkit import Nbdkit, Storage
from tests.bench.over_time import Recorder, Timeline, longest_s, waited_s
from tests.bench.servers import CLIENT_CPU, BenchError, Running, Server, peer_on_nbd
from tests.guest import GuestError, uml

DELAY_MS = 2
CONVERT_DELAY_MS = 5
FLUSH_EVERY = 16
OBJECT_BYTES = 4 * MIB
COMPLETED = re.compile(r"Run completed in ([\d.]+) seconds")
TOOK = re.compile(r"^took (\d+) ms$", re.MULTILINE)
COPY_TIMEOUT_S = 600
CONVERT_TIMEOUT_S = 1800
PHRASE = b"What is said more than once takes less room when it is compressed. "


class BackendBench:
    """The scenarios. Each returns its facts; its name is what `--only` looks for."""

    def __init__(self, scale: Scale, servers: dict[str, Server], image: Path, folder: Path, caches: Caches) -> None:
        self.scale, self.backend = scale, scale.backend
        self.ours, self.peer_on_file = servers[OURS], servers[PEER]
        self.peer = peer_on_nbd(self.peer_on_file)
        self.image, self.folder, self.caches = image, folder, caches
        self.timeline: Timeline | None = None
        self.scenarios = {
            "nbd: flushed random writes": self.flushed_writes,
            "nbd: writes merged into one": self.merged,
            "nbd: full log": self.full_log,
            "nbd: sequential": self.sequential,
            "nbd: random reads": self.random_reads,
            "nbd: qemu-img convert": self.convert,
            "nbd: foreground while draining": self.foreground,
            "nbd: over time": self.over_time,
        }

    # -- what each is made of --

    def nbdkit(self, storage: Storage) -> Nbdkit:
        return Nbdkit(storage, self.folder)

    def memory(self, size: int, *, delay_ms: int = DELAY_MS, mib_per_s: int = 0) -> Nbdkit:
        return self.nbdkit(Storage(size_bytes=size, delay_ms=delay_ms, mib_per_s=mib_per_s))

    @contextmanager
    def start(self, nbd: Nbdkit, *options: str, log_bytes: int, keep: bool = False) -> Iterator[Running]:
        """Ours on that backend, ready, with an empty log unless the log is to be kept."""
        if not keep:
            self.caches.make(log_bytes)
        options = tuple(self.caches.options(log_bytes, *options))
        with Running(self.ours, nbd.uri, 0, self.scale.ram, self.folder, options) as running:
            running.wait_for("ready")
            yield running

    def start_peer(self, nbd: Nbdkit) -> Running:
        return Running(self.peer, str(nbd.socket), 0, self.scale.ram, self.folder)

    @contextmanager
    def copy(self, nbd: Nbdkit) -> Iterator[Path]:
        """What the backend holds, as a file."""
        path = self.image.with_suffix(".copy")
        command = ["qemu-img", "convert", "-f", "raw", "-O", "raw", "-m", "16", "-W", nbd.uri, str(path)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=COPY_TIMEOUT_S, check=False)
        try:
            if run.returncode != 0:
                raise BenchError(f"{' '.join(command)}: {run.stderr.strip()}")
            yield path
        finally:
            path.unlink(missing_ok=True)

    def verify(self, nbd: Nbdkit, load: list[str]) -> int:
        """Bytes in the backend that are what the load has written; anything else is an error."""
        with self.copy(nbd) as copy, Running(self.peer_on_file, copy, 0, self.scale.ram, self.folder) as running:
            report = bench(running.socket, *load, "--verify_only")
        verified = int(report["jobs"][0]["verified_bytes"])
        if not verified:
            raise BenchError("nothing was verified in the backend")
        return verified

    def last_statistics(self, running: Running) -> dict[str, Any]:
        """Of a server that has ended, after it has drained."""
        found = running.events("statistics")[-1]
        if found["dirty_blocks"]:
            raise BenchError(f"{found['dirty_blocks']} blocks were not drained to the backend")
        return found

    @contextmanager
    def file_elsewhere(self) -> Iterator[Path]:
        """A copy of the image, full of data, that is on none of this machine's disks."""
        with tempfile.TemporaryDirectory(prefix="vhostcache-bench-", dir="/dev/shm") as folder:
            path = Path(folder) / "disk.img"
            shutil.copyfile(self.image, path)
            yield path

    # -- random writes with flushes --

    def flushed_writes(self) -> list[Fact]:
        return [fact for depth, least in ((32, 10), (1, 20)) for fact in self._flushed_at(depth, least)]

    def _flushed_at(self, depth: int, least: float) -> list[Fact]:
        size, state = self.backend.disk_bytes, self.folder / "verify"
        load = ["--rw", "randwrite", "--bs", "4k", "--iodepth", str(depth), "--fsync", str(FLUSH_EVERY)]
        load += ["--size", str(size)]
        kept = ["--verify_state", str(state)]
        written = ["--verify", "crc32c", "--do_verify", "0"]
        with self.memory(size) as nbd:
            with self.start(nbd, "--drain-on-exit", log_bytes=self.backend.log_bytes) as running:
                report = bench(
                    running.socket, *load, *kept, *written, "--runtime", str(self.backend.flushed_s), "--timeout", "120"
                )
            self.last_statistics(running)
            verified = self.verify(nbd, load + kept)
        ours, latency = report["jobs"][0]["write"]["iops"], report["jobs"][0]["write"]["clat_ns"]
        flush = report["jobs"][0]["sync"]["lat_ns"]
        with self.memory(size) as nbd, self.start_peer(nbd) as running:
            report = bench(running.socket, *load, *written, "--runtime", str(self.backend.peer_s))
        peer = report["jobs"][0]["write"]["iops"]
        name = f"{DELAY_MS} ms away, 4 KiB random writes, QD{depth}, flush every {FLUSH_EVERY}"
        return [
            Fact(f"{name}: ours for {self.backend.flushed_s:g} s", ours, "IOPS"),
            Fact(f"{name}: qemu-storage-daemon", peer, "IOPS"),
            Fact(f"{name}: ours / qemu-storage-daemon", ours / peer, "x", least=least),
            Fact(f"{name}: p99 of a write", latency["percentile"]["99.000000"] / 1000, "µs"),
            Fact(f"{name}: p99 of a flush", flush["percentile"]["99.000000"] / 1000, "µs"),
            Fact(f"{name}: longest write", latency["max"] / 1e9, "s"),
            Fact(f"{name}: verified in the backend", verified / MIB, "MiB"),
        ]

    # -- what reaches the backend --

    def merged(self) -> list[Fact]:
        """Each block is written many times over, so that none is left which has not been written; nbdkit counts."""
        facts = []
        for name, options in (("destaged meanwhile", ()), ("destaged at the end", ("--destage", "off"))):
            size = self.backend.merged_bytes
            writes = self.backend.merged_times * size // (4 * KIB)
            load = ["--rw", "randwrite", "--bs", "4k", "--iodepth", "32", "--size", str(size)]
            with self.memory(size) as nbd:
                log_bytes = max(self.backend.log_bytes, 2 * self.backend.merged_times * size)
                with self.start(nbd, "--drain-on-exit", *options, log_bytes=log_bytes) as running:
                    bench(running.socket, *load, "--number_ios", str(writes), "--end_fsync")
                counted = self.last_statistics(running)["backend_operations"]
                found = nbd.counts()
            if found.get("write", 0) < counted["write"]:
                raise BenchError(f"nbdkit counted {found.get('write', 0)} writes, ours {counted['write']}")
            what = f"4 KiB random writes over {in_words(size)}, {name}"
            merged = writes / max(1, found.get("write", 0))
            facts.append(Fact(f"{what}: the guest's writes for one that reaches the backend", merged, "", least=50))
            if options:
                # Every object is wholly dirty then.
                facts.append(Fact(f"{what}: reads from the backend", found.get("read", 0), "reads", most=0))
        return facts

    # -- the backend is the bottleneck --

    def full_log(self) -> list[Fact]:
        size, rate = self.backend.disk_bytes, self.backend.full_mib_per_s
        log_bytes = max(64 * MIB, size)
        load = ["--rw", "randwrite", "--bs", "4k", "--iodepth", "32", "--size", str(size), "--timeout", "120"]
        with self.memory(size, mib_per_s=rate) as nbd:
            bare = self._bare_mib_per_s(nbd)
        with self.memory(size, mib_per_s=rate) as nbd, self.start(nbd, log_bytes=log_bytes) as running:
            bench(running.socket, *load, "--number_ios", str(3 * log_bytes // 2 // (4 * KIB)))
            before = running.statistics()["backend_bytes"]["write"]
            report = bench(running.socket, *load, "--runtime", str(self.backend.full_s))
            after = running.statistics()["backend_bytes"]["write"]
        (job,) = report["jobs"]
        ours = job["write"]["bw_bytes"] / MIB
        written = (after - before) / MIB / job["job_runtime"] * 1000
        name = f"log of {in_words(log_bytes)} full, backend of {rate} MiB/s"
        return [
            Fact(f"{name}: 4 MiB writes to the backend alone", bare, "MiB/s"),
            Fact(f"{name}: 4 KiB random writes over {in_words(size)}", ours, "MiB/s"),
            Fact(f"{name}: that / 4 MiB writes to the backend alone", ours / bare, "x", least=0.9),
            Fact(f"{name}: written to the backend meanwhile", written, "MiB/s"),
            Fact(f"{name}: longest request", job["write"]["clat_ns"]["max"] / 1e9, "s", most=1),
        ]

    def _bare_mib_per_s(self, nbd: Nbdkit) -> float:
        """Of 4 MiB writes, eight at once, long enough that what may be sent at once at first does not count."""
        count = max(8, round(self.backend.full_mib_per_s * max(2.0, self.backend.full_s / 6) * MIB / OBJECT_BYTES))
        command = ["qemu-img", "bench", "-w", "-t", "none", "-f", "raw", "-s", str(OBJECT_BYTES), "-d", "8"]
        command += ["-c", str(count), nbd.uri]
        run = subprocess.run(command, capture_output=True, text=True, timeout=COPY_TIMEOUT_S, check=False)
        found = COMPLETED.search(run.stdout)
        if run.returncode != 0 or found is None:
            raise BenchError(f"{' '.join(command)}: {run.stderr.strip() or run.stdout.strip()}")
        return count * OBJECT_BYTES / MIB / float(found[1])

    # -- sequential, and reads --

    def sequential(self) -> list[Fact]:
        facts = []
        with self.file_elsewhere() as path:
            for rw in ("write", "read"):
                load = ["--rw", rw, "--bs", "1m", "--iodepth", "8", "--runtime", str(self.backend.reads_s)]
                facts += self._beside_the_peer(f"1 MiB {rw}s, QD8", path, load, "bw_bytes", 0.95)
        return facts

    def random_reads(self) -> list[Fact]:
        runtime = ["--runtime", str(self.backend.reads_s)]
        load = ["--rw", "randread", "--bs", "4k", "--iodepth", "32"]
        region = min(self.backend.disk_bytes, self.scale.image_bytes)
        size = ["--size", str(region)]
        hits = [*load, *size, *runtime]
        write = ["--rw", "write", "--bs", "1m", "--iodepth", "8", *size]
        # All but a fiftieth is read. In order it would pass by the read cache.
        read = [
            "--rw",
            "randread",
            "--bs",
            "64k",
            "--iodepth",
            "32",
            "--number_ios",
            str(4 * region // (64 * KIB)),
            *size,
        ]
        with self.file_elsewhere() as path:
            facts = self._beside_the_peer("4 KiB random reads that miss, QD32", path, [*load, *runtime], "iops", 0.9)
            name = "4 KiB random reads of what is in the log, QD32"
            facts += self._beside_the_peer(name, path, hits, "iops", 5, before=write)
            name = "4 KiB random reads of what is in the read cache, QD32"
            kept = 2 * region
            return facts + self._beside_the_peer(name, path, hits, "iops", 5, before=read, read_cache_bytes=kept)

    def _beside_the_peer(
        self,
        what: str,
        file: Path,
        load: list[str],
        figure: str,
        least: float,
        *,
        before: Sequence[str] = (),
        read_cache_bytes: int = 0,
    ) -> list[Fact]:
        """Ours with an empty log, after another load if there is one, and the peer, by turns."""
        unit, factor = ("MiB/s", MIB) if figure == "bw_bytes" else ("IOPS", 1)
        direction = "write" if "write" in load else "read"
        storage = Storage(file=file, delay_ms=DELAY_MS)
        found: dict[str, list[float]] = {OURS: [], PEER: []}
        for _ in range(self.scale.runs):
            with self.nbdkit(storage) as nbd:
                options = ("--read-cache", str(read_cache_bytes)) if read_cache_bytes else ()
                with self.start(nbd, *options, log_bytes=self.backend.log_bytes) as running:
                    if before:
                        bench(running.socket, *before)
                    found[OURS].append(bench(running.socket, *load)["jobs"][0][direction][figure] / factor)
            with self.nbdkit(storage) as nbd, self.start_peer(nbd) as running:
                found[PEER].append(bench(running.socket, *load)["jobs"][0][direction][figure] / factor)
        ours, peer = statistics.median(found[OURS]), statistics.median(found[PEER])
        name = f"{DELAY_MS} ms away, {what}"
        return [
            Fact(f"{name}: ours", ours, unit),
            Fact(f"{name}: qemu-storage-daemon", peer, unit),
            Fact(f"{name}: ours / qemu-storage-daemon", ours / peer, "x", least=least),
        ]

    # -- a compressed image --

    def convert(self) -> list[Fact]:
        """`qemu-img convert -c` in user-mode-linux onto the disk: each compressed cluster is a write, and begins and
        ends within a sector."""
        size = self.backend.converted_bytes
        source = self.image.with_suffix(".source")
        self._make_source(source, size)
        try:
            ours = self._convert(source, size, "none", ours=True)
            direct = self._convert(source, size, "none", ours=False)
            cached = self._convert(source, size, "writeback", ours=False)
        finally:
            source.unlink()
        name = f"qemu-img convert -c of {in_words(size)}, {CONVERT_DELAY_MS} ms away"
        return [
            Fact(f"{name}: ours, -t none", ours, "s"),
            Fact(f"{name}: qemu-storage-daemon, -t none", direct, "s"),
            Fact(f"{name}: qemu-storage-daemon, through the guest's page cache", cached, "s"),
            Fact(f"{name}: how much faster than qemu-storage-daemon, -t none", direct / ours, "x", least=20),
            Fact(f"{name}: how much faster than through the guest's page cache", cached / ours, "x", least=1),
        ]

    def _make_source(self, path: Path, size: int) -> None:
        """A quarter of each 4 KiB does not compress."""
        with path.open("wb") as file, Path("/dev/urandom").open("rb") as random:
            while file.tell() < size:
                piece = bytearray((PHRASE * (4 * KIB // len(PHRASE) + 1))[: 4 * KIB] * 128)
                for at in range(0, len(piece), 4 * KIB):
                    piece[at : at + KIB] = random.read(KIB)
                file.write(piece[: size - file.tell()])

    def _convert(self, source: Path, size: int, cache_mode: str, *, ours: bool) -> float:
        """Seconds. What the backend holds at the end is the source."""
        disk = size + 64 * MIB  # the format's own
        with self.memory(disk, delay_ms=CONVERT_DELAY_MS) as nbd:
            log_bytes = max(self.backend.log_bytes, 64 * MIB)
            with self.start(nbd, "--drain-on-exit", log_bytes=log_bytes) if ours else self.start_peer(nbd) as running:
                took = self._convert_in_a_guest(source, cache_mode, running.socket)
            with self.copy(nbd) as copy:
                command = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(source), str(copy)]
                run = subprocess.run(command, capture_output=True, text=True, timeout=COPY_TIMEOUT_S, check=False)
            if run.returncode != 0:
                raise BenchError(f"what was converted is not its source: {run.stdout.strip()} {run.stderr.strip()}")
        return took

    def _convert_in_a_guest(self, source: Path, cache_mode: str, socket: Path) -> float:
        script = f"""
            begin=$(date +%s%N)
            qemu-img convert -c -f raw -O qcow2 -t {cache_mode} {source} /dev/vda
            sync
            echo "took $((($(date +%s%N) - begin) / 1000000)) ms"
            """
        try:
            with on_processor(CLIENT_CPU):
                output = uml.run(script, [socket], self.folder / "uml", timeout_s=CONVERT_TIMEOUT_S)
        except GuestError as error:
            raise BenchError(str(error)) from error
        found = TOOK.search(output)
        if found is None:
            raise BenchError(f"the guest did not say how long it took: {self.folder / 'uml'}")
        return int(found[1]) / 1000

    # -- a guest beside the destager --

    def foreground(self) -> list[Fact]:
        """A guest's reads and writes of a region that is in the log, while the rest of the log is drained and while
        nothing is."""
        dirty, rate = self.backend.dirty_bytes, self.backend.drain_mib_per_s
        region = max(8 * MIB, self.backend.disk_bytes // 4)
        log_bytes = 2 * (dirty + region)
        fill = ["--rw", "randwrite", "--bs", "64k", "--iodepth", "32", "--size", str(dirty), "--offset", str(region)]
        fill += ["--number_ios", str(dirty // (64 * KIB))]
        whole = ["--rw", "write", "--bs", "1m", "--iodepth", "8", "--size", str(region)]
        load = ["--rw", "randrw", "--bs", "4k", "--iodepth", "4", "--fsync", "32", "--size", str(region)]
        load += ["--runtime", str(self.backend.foreground_s)]
        with self.memory(region + dirty, mib_per_s=rate) as nbd:
            with self.start(nbd, "--destage", "off", log_bytes=log_bytes) as running:
                bench(running.socket, *whole)
                bench(running.socket, *fill, "--end_fsync")
                quiet = bench(running.socket, *load)["jobs"][0]
            # The log is as it was left.
            draining = ("--destage", "on", "--destage-after", "50ms")
            with self.start(nbd, *draining, log_bytes=log_bytes, keep=True) as running:
                before = running.statistics()["backend_bytes"]["write"]
                busy = bench(running.socket, *load)["jobs"][0]
                after = running.statistics()
        if not after["dirty_blocks"]:
            raise BenchError("the log was drained before the guest had been measured")
        name = f"guest at work, QD4, while a log drains at {rate} MiB/s"
        drained = (after["backend_bytes"]["write"] - before) / MIB / busy["job_runtime"] * 1000
        facts = [Fact(f"{name}: drained", drained, "MiB/s")]
        for kind in ("read", "write"):
            late = [job[kind]["clat_ns"]["percentile"]["99.000000"] / 1000 for job in (quiet, busy)]
            facts.append(Fact(f"{name}: p99 of a {kind}, not draining", late[0], "µs"))
            facts.append(Fact(f"{name}: p99 of a {kind}, draining", late[1], "µs"))
            facts.append(Fact(f"{name}: p99 of a {kind}, draining / not", late[1] / late[0], "x", most=2))
        return facts

    # -- the plot --

    def over_time(self) -> list[Fact]:
        """Also an outage's test: a request that failed would end the load generator with an error."""
        size, rate = self.backend.disk_bytes, self.backend.full_mib_per_s
        log_bytes = max(64 * MIB, size)
        # nbdkit's memory would be gone with it.
        with (
            self.file_elsewhere() as path,
            self.nbdkit(Storage(file=path, delay_ms=DELAY_MS, mib_per_s=rate)) as nbd,
        ):
            # Often: what a checkpoint has not told of counts as dirty.
            options = ("--drain-on-exit", "--checkpoint-interval", "1s")
            with self.start(nbd, *options, log_bytes=log_bytes) as running:
                found = self.timeline = Recorder(running, nbd, size, self.backend.phase_s).run()
            self.last_statistics(running)
        _, there, gone, *_ = found.phases
        name = f"backend gone for {found.gone_s[1] - found.gone_s[0]:.0f} s"
        usual = longest_s(found, "sync", there["begin_s"], there["end_s"])
        meanwhile = longest_s(found, "sync", gone["begin_s"], gone["end_s"])
        return [
            Fact("longest flush, backend there", usual * 1000, "ms"),
            Fact(f"{name}: longest flush while the log has room", meanwhile * 1000, "ms"),
            Fact(f"{name}: from its return to the next write, log full", waited_s(found), "s"),
        ]
