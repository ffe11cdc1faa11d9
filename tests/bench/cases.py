"""What is measured, and against which bar. A case is one load; a bar is a ratio between two servers in one case."""

from dataclasses import dataclass

OURS, PEER, NULL, COPY = "vhostcache", "qemu-storage-daemon", "null", "null --copy"
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


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
    depths: tuple[int, ...] = (32, 1)
    sequential_bytes: tuple[int, ...] = (64 * KIB, MIB)


FULL = Scale(4 * GIB, 128 * MIB, "256MiB", runtime_s=2, sustained_s=30, idle_s=10, runs=3)
QUICK = Scale(
    96 * MIB,
    8 * MIB,
    "24MiB",
    runtime_s=0.15,
    sustained_s=0.3,
    idle_s=0.5,
    runs=1,
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

    @property
    def name(self) -> str:
        size = f"{self.bs // MIB} MiB" if self.bs >= MIB else f"{self.bs // KIB} KiB"
        over = f"{self.size // GIB} GiB" if self.size >= GIB else f"{self.size // MIB} MiB"
        return f"{self.rw} {size} QD{self.iodepth} over {over}, {'polling' if self.poll else 'sleeping'}"

    @property
    def unit(self) -> str:
        return "MiB/s" if self.bs >= 64 * KIB else "IOPS"


@dataclass(frozen=True)
class Bar:
    """In this case, ours must be at least `least` times `against`."""

    case: Case
    against: str
    least: float


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
