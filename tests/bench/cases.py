"""What is measured, and against which bar. A case is one load; a bar is a ratio between two servers in one case."""

from dataclasses import dataclass

OURS, PEER, NULL, COPY = "vhostcache", "qemu-storage-daemon", "null", "null --copy"
FIO = "fio, sequential"  # no server: fio on the host writes 1 MiB, QD4, from one end of the image to the other
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True)
class LogScale:
    """How large and how long, of what has a log. None of the loads fills its log, except the sustained one."""

    held_bytes: int  # the log while destaging is off, and how long that takes
    held_s: float
    log_bytes: int  # the log while destaging is on
    sustained_s: float
    flushed_s: float
    slow_s: float  # at each delay of the backend
    delays_ms: tuple[int, ...]
    flush_rounds: int
    dirty_bytes: int  # what a killed daemon leaves
    large_bytes: int  # a cache that is hardly used
    dbench_s: int
    dbench_clients: int
    dbench_runs: int
    dbench_with_log: bool  # in directsync mode, too
    dbench_delays_ms: tuple[int, ...]  # of the backend


@dataclass(frozen=True)
class BackendScale:
    """How large and how long, of what has a slow backend behind it."""

    disk_bytes: int
    log_bytes: int
    flushed_s: float  # flushed random writes onto ours; the peer's figure is steady from the beginning
    peer_s: float
    merged_bytes: int  # is written all over by random writes, so many times
    merged_times: int
    full_mib_per_s: int  # of the backend that is the bottleneck; the log is as large as the disk there
    full_s: float
    reads_s: float
    converted_bytes: int
    foreground_s: float
    dirty_bytes: int  # is drained meanwhile, with so much bandwidth
    drain_mib_per_s: int
    phase_s: float  # of each phase of the plot over time


@dataclass(frozen=True)
class Scale:
    """How large and how long. `image_bytes` exceeds `ram` many times over; `fits_bytes` fits it."""

    image_bytes: int
    fits_bytes: int
    ram: str
    runtime_s: float
    sustained_s: float
    idle_s: float
    runs: int
    log: LogScale
    backend: BackendScale
    depths: tuple[int, ...] = (32, 1)
    sequential_bytes: tuple[int, ...] = (64 * KIB, MIB)


FULL = Scale(
    4 * GIB,
    128 * MIB,
    "256MiB",
    runtime_s=2,
    sustained_s=30,
    idle_s=10,
    runs=3,
    log=LogScale(
        held_bytes=16 * GIB,
        held_s=15,
        log_bytes=8 * GIB,
        sustained_s=60,
        flushed_s=15,
        slow_s=10,
        delays_ms=(0, 10, 100),
        flush_rounds=200,
        dirty_bytes=4 * GIB,
        large_bytes=64 * GIB,
        dbench_s=20,
        dbench_clients=4,
        dbench_runs=3,
        dbench_with_log=True,
        dbench_delays_ms=(0, 2),
    ),
    backend=BackendScale(
        disk_bytes=GIB,
        log_bytes=4 * GIB,
        flushed_s=60,
        peer_s=15,
        merged_bytes=256 * MIB,
        merged_times=16,
        full_mib_per_s=64,
        full_s=40,
        reads_s=4,
        converted_bytes=1000 * MIB,
        foreground_s=10,
        dirty_bytes=2 * GIB,
        drain_mib_per_s=64,
        phase_s=15,
    ),
)
QUICK = Scale(
    96 * MIB,
    8 * MIB,
    "24MiB",
    runtime_s=0.15,
    sustained_s=0.3,
    idle_s=0.5,
    runs=1,
    log=LogScale(
        held_bytes=128 * MIB,
        held_s=0.3,
        log_bytes=64 * MIB,
        sustained_s=1,
        flushed_s=0.3,
        slow_s=2,
        delays_ms=(0, 10),
        flush_rounds=5,
        dirty_bytes=16 * MIB,
        large_bytes=256 * MIB,
        dbench_s=2,
        dbench_clients=2,
        dbench_runs=1,
        dbench_with_log=False,
        dbench_delays_ms=(0,),
    ),
    backend=BackendScale(
        disk_bytes=32 * MIB,
        log_bytes=128 * MIB,
        flushed_s=0.5,
        peer_s=0.5,
        merged_bytes=8 * MIB,
        merged_times=16,
        full_mib_per_s=64,
        full_s=1,
        reads_s=0.3,
        converted_bytes=8 * MIB,
        foreground_s=0.5,
        dirty_bytes=48 * MIB,
        drain_mib_per_s=8,
        phase_s=1,
    ),
    depths=(32,),
    sequential_bytes=(MIB,),
)


@dataclass(frozen=True)
class Case:
    """One load on several servers, sleeping or polling."""

    rw: str
    bs: int
    iodepth: int
    poll: bool
    size: int  # of the disk that is used, from its beginning
    runtime_s: float
    servers: tuple[str, ...]
    warm: bool = False  # go over `size` once before, unmeasured
    log_bytes: int = 0  # ours has a log of this size
    destage: bool = True  # and writes it to the image while it has room
    fsync: int = 0  # a drained flush after so many writes

    @property
    def name(self) -> str:
        name = f"{self.rw} {in_words(self.bs)} QD{self.iodepth} over {in_words(self.size)}"
        name += ", polling" if self.poll else ", sleeping"
        if self.log_bytes:
            name += f", log of {in_words(self.log_bytes)}{'' if self.destage else ' not destaged'}"
        if self.fsync:
            name += f", flush every {self.fsync}" if self.fsync > 1 else ", flush after each"
        return name

    @property
    def unit(self) -> str:
        return "MiB/s" if self.bs >= 64 * KIB else "IOPS"

    @property
    def unit_bytes(self) -> int:
        """What one of its unit is: for a server that is measured in bytes."""
        return MIB if self.unit == "MiB/s" else self.bs


def in_words(size: int) -> str:
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if size >= unit:
            return f"{size // unit} {name}"
    return f"{size // KIB} KiB"


@dataclass(frozen=True)
class Bar:
    """In this case, ours must be at least `least` times `against`."""

    case: Case
    against: str
    least: float


@dataclass(frozen=True)
class Steady:
    """In this case no request of ours may take longer than `stall_s`, and the p99.9 at most `spread` times the p50."""

    case: Case
    stall_s: float = 1.0
    spread: float = 10.0


def log_cases(scale: Scale) -> tuple[list[Case], list[Bar], list[Steady]]:
    """Loads on a disk with a log, beside the peer, which has none and writes to the image."""
    log = scale.log

    def case(depth: int, runtime_s: float, size: int, fsync: int = 0, fio: bool = False) -> Case:
        servers = (OURS, PEER, FIO) if fio else (OURS, PEER)
        options = {"log_bytes": size, "destage": not fio, "fsync": fsync}
        return Case("randwrite", 4 * KIB, depth, True, scale.image_bytes, runtime_s, servers, **options)

    held = case(32, log.held_s, log.held_bytes, fio=True)
    sustained = case(32, log.sustained_s, log.log_bytes)
    grouped = case(32, log.flushed_s, log.log_bytes, fsync=16)
    single = case(1, log.flushed_s, log.log_bytes, fsync=1)
    bars = [Bar(held, PEER, 3.0), Bar(held, FIO, 0.5), Bar(sustained, PEER, 2.0), Bar(grouped, PEER, 2.0)]
    return [held, sustained, grouped, single], [*bars, Bar(single, PEER, 1.0)], [Steady(sustained)]


def make_cases(scale: Scale) -> tuple[list[Case], list[Bar]]:
    """The matrix, with the bars that stand on it."""
    cases: list[Case] = []
    bars: list[Bar] = []
    for poll in (True, False):
        everyone = (OURS, PEER, NULL, COPY) if poll else (OURS, PEER, COPY)
        for rw in ("randwrite", "randread"):
            for depth in scale.depths:
                case = Case(rw, 4 * KIB, depth, poll, scale.fits_bytes, scale.runtime_s, everyone, warm=True)
                cases.append(case)
                if poll:
                    bars.append(Bar(case, PEER, 4.0 if depth == 32 else 2.0))
                if poll and depth == 32:
                    bars.append(Bar(case, COPY, 0.2))
        for size in scale.sequential_bytes:
            for rw in ("write", "read"):
                case = Case(rw, size, 8, poll, scale.image_bytes, scale.runtime_s, (OURS, PEER))
                cases.append(case)
                if size == MIB:
                    bars.append(Bar(case, PEER, 0.95))
    sustained = Case("randwrite", 4 * KIB, 32, True, scale.image_bytes, scale.sustained_s, (OURS, PEER))
    cold = Case("randread", 4 * KIB, 32, True, scale.image_bytes, scale.sustained_s / 3, (OURS, PEER))
    cases += [sustained, cold]
    bars += [Bar(sustained, PEER, 1.3), Bar(cold, PEER, 1.3)]
    return cases, bars
