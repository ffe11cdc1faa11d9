"""One seed: a guest, the real core and recovery, and a world that fails.

A run is a number of openings of one log. Each opening recovers, lets the guest read the whole disk (the oracle of
guest.py judges it), works for a while, and ends in the death of the process, a power loss or a clean shutdown, at any
operation. The last one drains, and the backend is compared. Everything is decided by the seed; sizes are small, so that
the log wraps, fills, and is checkpointed all the time.
"""

import random
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from tests.sim.engine import (
    BACKEND_READ,
    BACKEND_SYNC,
    BACKEND_WRITE,
    CACHE_READ,
    CACHE_SYNC,
    CACHE_WRITE,
    EIO,
    ENOSPC,
    RING_BLOCK,
    Engine,
    Io,
    LogRecord,
    Tier,
)
from tests.sim.guest import Guest, Request, Wrong, describe
from tests.sim.medium import BLOCK, SECTOR, ZEROES, Crash, Medium, SyncDisk, blocks_of
from vhostcache import operations as op
from vhostcache.errors import OperationError
from vhostcache.eviction import Eviction
from vhostcache.log import read_ring, recovery
from vhostcache.log import superblock as superblocks
from vhostcache.log import tier as log_tier
from vhostcache.log.destage import TURN_BLOCKS
from vhostcache.log.recovery import BackendFacts, Recovered
from vhostcache.log.sources import StagingRead
from vhostcache.log.unreadable import ATTEMPTS, RETRY_NS
from vhostcache.log_volume import LogVolume, LogVolumeSettings

MILLISECOND: Final = 1_000_000
UUID: Final = bytes(range(16))
GROUPS: Final = 160
"""Fewer than the engine has: running out of them is to happen too."""
CHANGES: Final = (op.REQUEST_DISCARD, op.REQUEST_ZERO, op.REQUEST_ZERO_UNMAP)

PATIENCE_NS: Final = (ATTEMPTS - 1) * RETRY_NS
"""A block that cannot be read is not to be given up before."""
SECTORS_MOST: Final = 2
"""Bad ones and losses at a time: the smallest rings keep room for two records that say so."""

STATES: Final = (
    "a bad sector",
    "a bad sector is given up",
    "a bad sector is read",
    "a bad sector where the log may end is refused",
    "a fault of a sector passes",
    "a changed image is refused",
    "a fill",
    "a loss is appended again",
    "a loss is noted in the log",
    "a lost RAM tier is refused",
    "a power loss lost what was not flushed",
    "a record is written again",
    "a record of zeroes only",
    "a request with a record of its own",
    "backend has no space",
    "backend outage",
    "blocks are read ahead",
    "blocks go to the read cache",
    "backend read failed",
    "backend sync failed",
    "backend write failed",
    "bit flip",
    "bit flip under way",
    "blocks are destaged",
    "cache outage",
    "cache read failed",
    "cache sync failed",
    "cache write failed",
    "clean blocks are written for their neighbours' sake",
    "changes wait for room",
    "checkpoint",
    "clean shutdown",
    "crash between two operations",
    "crash in a backend flush",
    "crash in a backend read",
    "crash in a cache sync",
    "crash in a checkpoint",
    "crash in a destage",
    "crash in a log read",
    "crash in a log write",
    "crash in recovery",
    "crash when the image has grown",
    "drained",
    "hand-over",
    "parked requests",
    "power loss",
    "process crash",
    "reconnect",
    "recovery: cold",
    "recovery: evict",
    "recovery: replay",
    "recovery: warm",
    "resubmitted requests",
    "rot found by a read",
    "rot found by recovery",
    "rot in the newest durable record passes for the end of the log",
    "several records in flight",
    "the disk grows",
    "the image alone is looked at",
    "the policy changes",
    "the RAM tier is read byte by byte",
    "the RAM tier's ring is full",
    "the backend is read for a whole object",
    "the cache device reads nothing for a while",
    "the backend is read into guest memory",
    "the log is full",
    "the read cache is read",
    "the read cache is warm",
    "the log is read",
    "the log is read into guest memory",
    "the log wraps",
    "a record that is durable by itself",
    "write cache switched",
    "zeroes are destaged",
)
"""What a run can reach; a test sees to it that all are reached."""


@dataclass(frozen=True)
class Sizes:
    """How large everything is, how the guest behaves, and what fails how often."""

    blocks: int
    missing_sectors: int
    """The volume's last block lacks so many."""
    object_blocks: int
    slots: int
    entries: int
    record_blocks: int
    ring_blocks: int
    read_blocks: int
    """Of the read cache; 0: there is none."""
    fill_blocks: int
    readahead_blocks: int
    streams: float
    """Share of the reads that go on where one has ended."""
    direct_blocks: int
    openings: int
    steps: int
    rare: float
    """Share of steps with something rare: see `World.rare`."""
    shutdowns: float
    """Share of clean ones among the ends of an opening."""
    burst: int
    """Requests at once."""
    depth: int
    """Requests in flight."""
    hot_blocks: int
    """What most requests are about."""
    whole: float
    """Share of requests of whole blocks."""
    writes: float
    flushes: float
    acknowledge_durable: bool
    ignore_flush: bool
    sync_interval_ms: int
    flush_window_ms: int
    checkpoint_interval_ms: int
    destage_after_ms: int
    destage: bool
    ordered: bool
    """The policy."""
    policies: bool
    """It changes, from opening to opening."""
    looks: float
    """Share of steps in which the image alone is looked at, in that policy."""
    max_batched_objects: int
    max_blocks: int
    """Of one write to the backend; 0: any number."""
    preferred_blocks: int
    wants_whole_objects: bool
    patience: float
    """Share of steps in which I/O in flight is left alone."""
    backend_patience: float
    """Of the I/O that would end, the share that does not, if it is on the backend: a slow one."""
    cache_faults: float
    backend_faults: float
    flips: float
    """Of one bit in the cache file, per restart."""
    recovery_crashes: float
    power: float
    """Share of power losses among the crashes."""
    bad_sectors: float = 0.0
    """Share of steps in which something of the log cannot be read any more."""
    turn_blocks: int = TURN_BLOCKS
    """After so many a destage goes on in the next turn."""


FOCUS: Final[tuple[dict[str, Any], ...]] = (
    # The same few blocks again and again, destaged at once, while newer data stays volatile.
    {
        "burst": 2,
        "writes": 0.95,
        "whole": 1.0,
        "flushes": 0.1,
        "patience": 0.1,
        "hot_blocks": 8,
        "record_blocks": 8,
        "sync_interval_ms": 1000,
        "checkpoint_interval_ms": 3,
        "destage_after_ms": 0,
    },
    # Many small records and many ends: what a former opening has left lies where new records come.
    {
        "openings": 4,
        "steps": 14,
        "power": 1.0,
        "burst": 2,
        "flushes": 0.05,
        "writes": 1.0,
        "patience": 0.1,
        "whole": 1.0,
        "record_blocks": 4,
        "shutdowns": 0.0,
        "sync_interval_ms": 1000,
    },
    # A small log under much pressure.
    {"ring_blocks": 40, "depth": 24, "burst": 4, "writes": 0.95, "patience": 0.4, "destage_after_ms": 1000},
    # One flush interval after the other reaches the backend, over many restarts.
    {
        "openings": 4,
        "ordered": True,
        "policies": False,
        "looks": 0.3,
        "burst": 2,
        "flushes": 0.2,
        "writes": 0.95,
        "whole": 1.0,
        "patience": 0.1,
        "hot_blocks": 6,
        "checkpoint_interval_ms": 2000,
        "destage_after_ms": 0,
        "shutdowns": 0.0,
    },
    # The write cache goes on and off, and daemons come and go.
    {"openings": 4, "rare": 0.1, "shutdowns": 0.6},
    # What a small log has to hold for long rots.
    {
        "openings": 3,
        "steps": 200,
        "rare": 0.15,
        "flips": 0.7,
        "ring_blocks": 40,
        "depth": 24,
        "burst": 4,
        "writes": 0.95,
        "whole": 1.0,
        "hot_blocks": 24,
        "destage": True,
    },
)
"""What some runs look at more closely."""


def choose_sizes(rng: random.Random) -> Sizes:
    """Independent of one another, but for runs with a focus."""
    focus = int(rng.random() * 3 * len(FOCUS))
    sizes = choose_independent_sizes(rng)
    return replace(sizes, **FOCUS[focus]) if focus < len(FOCUS) else sizes


def choose_independent_sizes(rng: random.Random) -> Sizes:
    random_number = rng.random

    def pick(low: int, high: int) -> int:
        return low + int(random_number() * (high - low + 1))

    blocks = pick(12, 56)
    trouble = random_number()
    object_blocks = (4, 8)[pick(0, 1)]
    return Sizes(
        blocks=blocks,
        missing_sectors=(0, 0, 3, 7)[pick(0, 3)],
        object_blocks=object_blocks,
        slots=op.FIRST_SLOT + pick(max(20, 3 * object_blocks + 3), 40),
        entries=pick(24, 64),
        record_blocks=pick(4, 8),
        ring_blocks=pick(40, 200) if random_number() < 0.5 else pick(40, 80),
        read_blocks=pick(20, 60) if random_number() < 0.6 else 0,
        fill_blocks=(1, 1, 4)[pick(0, 2)],
        readahead_blocks=(0, 4, 16)[pick(0, 2)],
        streams=random_number(),
        direct_blocks=(2, 8, 32)[pick(0, 2)],
        openings=pick(1, 4),
        steps=pick(10, 90),
        rare=(0.005, 0.015, 0.05)[pick(0, 2)],
        shutdowns=(0.1, 0.25, 0.5)[pick(0, 2)],
        burst=pick(1, 4),
        depth=(1, 4, 12, 24)[pick(0, 3)],
        hot_blocks=min(blocks, pick(2, 24)),
        whole=random_number(),
        writes=0.3 + 0.6 * random_number(),
        flushes=(0.02, 0.1, 0.3)[pick(0, 2)],
        acknowledge_durable=random_number() < 0.1,
        ignore_flush=random_number() < 0.04,
        sync_interval_ms=(2, 50, 1000)[pick(0, 2)],
        flush_window_ms=(0, 0, 0, 1)[pick(0, 3)],
        checkpoint_interval_ms=(3, 20, 2000)[pick(0, 2)],
        destage_after_ms=(0, 5, 1000)[pick(0, 2)],
        destage=random_number() < 0.85,
        ordered=random_number() < 0.35,
        policies=random_number() < 0.1,
        looks=0.03,
        max_batched_objects=(1, 2, 8)[pick(0, 2)],
        max_blocks=(0, 0, 2)[pick(0, 2)],
        preferred_blocks=(0, 0, 2)[pick(0, 2)],
        wants_whole_objects=random_number() < 0.2,
        backend_patience=(0.0, 0.0, 0.8)[pick(0, 2)],
        patience=(0.1, 0.4, 0.8)[pick(0, 2)],
        cache_faults=(0.02, 0.2)[pick(0, 1)] if 0.5 <= trouble < 0.65 else 0.0,
        backend_faults=(0.05, 0.4)[pick(0, 1)] if 0.6 <= trouble < 0.8 else 0.0,
        flips=0.6 if trouble > 0.9 else 0.0,
        recovery_crashes=(0.0, 0.2, 0.6)[pick(0, 2)],
        power=(0.3, 0.6, 0.9)[pick(0, 2)],
    )


class World:
    """One run. `run()` raises when a promise is broken."""

    def __init__(self, seed: int, trace: bool = False, **fixed: Any) -> None:
        """`fixed`: sizes that the seed does not choose."""
        self.seed = seed
        self.trace = trace
        self.rng = random.Random(seed)
        sizes = replace(choose_sizes(self.rng), **fixed)
        self.sectors = random.Random(f"bad sectors of {seed}")
        """Apart, so that they change nothing in the life of other seeds."""
        if not (fixed or sizes.flips) and self.sectors.random() < 0.15:
            sizes = replace(sizes, bad_sectors=0.05, steps=2 * sizes.steps)
        if "turn_blocks" not in fixed and random.Random(f"turns of {seed}").random() < 0.5:
            sizes = replace(sizes, turn_blocks=1)
        self.sizes = sizes
        self.states: Counter[str] = Counter()
        size = self.sizes
        self.guest = Guest(size.blocks * 8 - size.missing_sectors)
        self.guest.unsafe = size.ignore_flush
        self.guest.write_through = size.acknowledge_durable and not size.ignore_flush
        self.cache = Medium(RING_BLOCK + size.ring_blocks + size.read_blocks, self.rng)
        self.backend = Medium(size.blocks, self.rng)
        self.tiers: dict[bytes, Tier] = {}
        """The files on tmpfs, by their uuid."""
        self.tiers_made = 0
        self.boot = 1
        self.now_ns = 1_000_000_000
        self.engine: Engine
        self.volume: LogVolume
        self.fail_at: dict[str, int] = {}
        """"cache", "backend" or "recovery" -> the number of the operation that fails: for every fault point."""
        self.operations_seen: Counter[str] = Counter()
        """How many were counted for that."""
        self.image_sectors = self.guest.size_sectors
        self.guest_died = False
        self.flips: list[tuple[int, bytes, bytes]] = []
        """Bits that have flipped: block of the cache file, before, after."""
        self.healing: dict[int, int] = {}
        """Block of the cache file that cannot be read -> when it can again."""
        self.healed: dict[int, int] = {}
        """Block of the cache file that can be read again -> for how long it could not, in ns."""
        self.broken: set[int] = set()
        """What has been there, as in the index: none of it breaks twice."""
        self.suspects: set[int] = set()
        """Blocks of the disk of which the log had something there."""
        self.cache_reads_from_ns = 0
        """Until then the cache device reads nothing at all."""
        self.image_changed = False
        """By others."""
        self.image_has_been_changed = False
        self.growing = False
        self.rot_may_pass = False
        self.tier_lost = False
        """Somebody has deleted the RAM-tier file while the guest lives."""
        self.records: list[LogRecord] = []
        """What the engine has written to the log, in order."""
        self.calm = False
        """Nothing fails for now."""
        self.migrations = random.Random(f"migrations of {seed}")
        """Apart, so that they change nothing else of a seed's life."""
        self.is_handed_over = False
        self.backend_outage_until_ns = 0
        self.backend_full_until_ns = 0
        self.cache_outage_until_ns = 0
        self.closed_cleanly = False
        self.stream = 0
        """Where a read in sequence goes on."""

    # --- from beginning to end ---

    def run(self) -> Counter[str]:
        """All openings; returns the states reached."""
        self.create()
        openings = self.sizes.openings
        for number in range(openings):
            if not self.open():
                return self.states
            last = number == openings - 1
            try:
                if not last and self.rng.random() < 0.3:
                    self.engine.countdown = int(self.rng.random() * 400)
                self.work(self.sizes.steps)
                if last:
                    self.finish()
                    self.check_once_more()
                    return self.states
                if self.rng.random() < self.sizes.shutdowns:
                    if self.migrations.random() < 0.25 and not (self.flips or self.suspects):
                        self.hand_over()
                    else:
                        self.close()
            except Crash:
                self.states["crash between two operations"] += 1
            self.stop()
            if self.closed_cleanly and self.rng.random() < 0.06 and not self.is_handed_over:
                self.write_the_image()
            if not (self.guest_died or self.closed_cleanly) and self.rng.random() < 0.03:
                self.note("the RAM-tier file is deleted")
                self.tiers = {}
                self.tier_lost = True
        return self.states

    def check_once_more(self) -> None:
        """What has been drained is there whatever happens now."""
        if self.rng.random() < (0.3 if self.flips else 0.7):
            return
        self.guest.floor = self.guest.answered
        self.stop()
        self.open()

    def note(self, text: str) -> None:
        """For --trace."""
        if self.trace:
            print(f"{self.now_ns / 1e6:12.3f} ms  {text}")

    # --- openings ---

    def boot_id(self) -> bytes:
        return self.boot.to_bytes(16, "little")

    def backend_facts(self) -> BackendFacts:
        return BackendFacts(b"image", self.image_sectors * SECTOR, self.backend.stamp, is_marked=True)

    def create(self) -> None:
        """A new cache file."""
        recovery.create(SyncDisk(self.cache), UUID, self.backend_facts(), self.sizes.read_blocks)

    def open(self) -> bool:
        """Recover, start the core, read everything; False if the log was refused, and rightly so."""
        if self.guest.serial and self.rng.random() < self.sizes.flips:
            self.rot()
        self.rot_may_pass = False
        found = superblocks.newest(*(superblocks.unpack(self.cache.live[block]) for block in (0, 1)))
        died_open = found is not None and not found.clean
        while True:
            if not all(self.rot_is_known(*flip) for flip in self.flips):
                self.rot_may_pass = True
            countdown = 1 + int(self.rng.random() * 8) if self.rng.random() < self.sizes.recovery_crashes else -1
            disk = SyncDisk(self.cache, countdown, (lambda: self.is_the_one("recovery")) if self.fail_at else None)
            try:
                recovered, tier = self.recover(disk)
            except Crash:
                self.note(f"crash in recovery at its operation {countdown}")
                self.states["crash in recovery"] += 1
                # What the RAM tier has of an unreadable record is being appended anew: if it goes now, so does that.
                self.rot_may_pass = self.rot_may_pass or bool(self.cache.bad)
                self.stop()
                continue
            except OSError:
                self.states["a start fails"] += 1
                continue  # it is tried again, of course
            except OperationError as error:
                self.note(f"refused: {error}")
                if self.tier_lost:
                    self.states["a lost RAM tier is refused"] += 1
                    self.power_loss()  # the way out: the guest is off
                    continue
                return self.refused(error)
            if self.tier_lost and died_open:
                raise Wrong("the log is opened although its RAM tier is lost")
            break
        if self.is_handed_over and recovered.records:
            raise Wrong("a log is believed whose image has been in other hands")
        self.is_handed_over = False
        self.tier_lost = False
        self.states[f"recovery: {recovered.finding.decision.name.lower()}"] += 1
        self.note(f"recovered: {recovered.finding.what}, {recovered}")
        self.image_changed = False
        self.start(recovered, tier)
        return self.judge()

    def recover(self, disk: SyncDisk) -> tuple[Recovered, Tier]:
        """As the daemon does it: the new RAM-tier file is there before the superblocks name it, the old one goes after
        that."""
        live = self.cache.live
        block = superblocks.newest(superblocks.unpack(live[0]), superblocks.unpack(live[1]))
        old = self.tiers.get(block.tier_uuid) if block else None
        self.tiers_made += 1
        name = self.tiers_made.to_bytes(16, "little")
        size = self.sizes
        new = Tier(size.entries, [ZEROES] * size.slots, name, block.epoch + 1 if block else 1)
        self.tiers[name] = new
        found: log_tier.Tier | None = None
        if old and self.rng.random() < 0.05:
            found = log_tier.parse(old.file(UUID, self.boot_id()))
            self.states["the RAM tier is read byte by byte"] += 1
        elif old:
            found = old.found(UUID, self.boot_id())
        recovered = recovery.recover(disk, found, self.boot_id(), self.backend_facts(), tier_uuid=name)
        self.tiers = {name: new}
        return recovered, new

    def start(self, recovered: Recovered, tier: Tier) -> None:
        """A new process: engine and core. The disk is as large as the image."""
        size = self.sizes
        self.guest.grow(self.image_sectors)
        self.growing = False
        operations: list[int] = []
        self.engine = engine = Engine(
            self.rng,
            self.guest,
            self.cache,
            self.backend,
            operations,
            tier,
            recovered.ring_blocks,
            read_ring.positions_of(size.read_blocks),
        )
        engine.trace = self.trace
        engine.states = self.states
        engine.records = self.records
        engine.loses = self.loses
        self.guest.may_fail = self.may_fail
        engine.record_blocks = size.record_blocks
        engine.previous_crc = recovered.previous_crc
        for record in recovered.records:
            position = (record.address + record.header_blocks) % recovered.ring_blocks
            engine.crcs[position : position + record.payload_blocks] = record.crcs
        self.volume = LogVolume(
            LogVolumeSettings(
                index=0,
                size_bytes=self.guest.size_sectors * SECTOR,
                object_bytes=size.object_blocks * BLOCK,
                slots=size.slots,
                tier_entries=size.entries,
                acknowledge_durable=size.acknowledge_durable,
                ignore_flush=size.ignore_flush,
                sync_interval_ns=size.sync_interval_ms * MILLISECOND,
                flush_window_ns=size.flush_window_ms * MILLISECOND,
                checkpoint_interval_ns=size.checkpoint_interval_ms * MILLISECOND,
                destage_after_ns=size.destage_after_ms * MILLISECOND,
                destage=size.destage,
                max_batched_objects=size.max_batched_objects,
                max_bytes=size.max_blocks * BLOCK,
                wants_whole_objects=size.wants_whole_objects,
                preferred_bytes=size.preferred_blocks * BLOCK,
                ordered=self.ordered(),
                record_blocks=size.record_blocks,
                turn_blocks=size.turn_blocks,
                fill_bytes=size.fill_blocks * BLOCK,
                readahead_bytes=size.readahead_blocks * BLOCK,
                direct_bytes=size.direct_blocks * BLOCK,
            ),
            operations,
            recovered,
            groups=GROUPS,
            eviction=self.load_read_cache(recovered),
        )

    def load_read_cache(self, recovered: Recovered) -> Eviction | None:
        """As the daemon does it."""
        positions = read_ring.positions_of(recovered.superblock.read_blocks)
        if not positions:
            return None
        found = read_ring.load(SyncDisk(self.cache), recovered)
        if found is None:
            return Eviction(positions)
        self.states["the read cache is warm"] += 1
        eviction, crcs = found
        self.engine.crcs[recovered.ring_blocks :] = memoryview(crcs).cast("I").tolist()
        return eviction

    def ordered(self) -> bool:
        """Whether the policy of this opening is that."""
        if self.sizes.policies and self.rng.random() < 0.5:
            self.states["the policy changes"] += 1
            return not self.sizes.ordered
        return self.sizes.ordered

    def look_at_the_image(self) -> None:
        """As if cache, RAM and host were lost in this moment: in the policy `ordered` there is a promise for that."""
        size = self.sizes
        if not size.ordered or size.policies or self.flips or self.suspects or self.image_has_been_changed:
            return
        alone = Medium(0, self.rng)
        alone.live = list(self.backend.live)
        alone.versions = {block: list(versions) for block, versions in self.backend.versions.items()}
        alone.power_loss(int(self.rng.random() * 5))
        self.guest.check_image(alone.live)
        self.states["the image alone is looked at"] += 1

    def judge(self) -> bool:
        """Read the whole disk: it must be what was promised. Then the front-end submits again what was not answered."""
        guest = self.guest
        disk = self.read_everything()
        # What has been accepted may have been read: it must not vanish while the guest lives, nor over a shutdown.
        floor = guest.floor if self.guest_died and not self.closed_cleanly else len(guest.accepted)
        try:
            count = guest.check(disk, floor)
        except Wrong:
            if not self.rot_may_pass:
                raise
            # Destaged or not, the newest durable record cannot be told from one that was never whole.
            if self.flips:
                self.states["rot in the newest durable record passes for the end of the log"] += 1
            # But nothing of it, nor of what came after it, had been destaged.
            guest.check(disk, 0)
            return False
        self.note(f"found {count} of {len(guest.accepted)} accepted changes, {floor} promised")
        if count < len(guest.accepted):
            self.states["a power loss lost what was not flushed"] += 1
        if self.flips or (None in disk and self.guest_died and not self.closed_cleanly):
            return False
        guest.settled(
            [guest.state[b] if disk[b] is None else disk[b] for b in range(guest.blocks)], self.guest_died, count
        )
        if self.guest_died:
            guest.write_through = self.sizes.acknowledge_durable and not self.sizes.ignore_flush
        self.volume.connected()
        if not self.guest_died and not self.closed_cleanly:
            # The in-flight area that the front-end brings has been used. After a shutdown the log itself must know.
            self.volume.write_cache_unknown()
        self.guest_died = self.closed_cleanly = False
        self.resubmit()
        return True

    def read_everything(self) -> list[bytes | None]:
        """Through the core, undisturbed; None for what is answered with an error."""
        guest, engine = self.guest, self.engine
        step = 1 if self.flips or self.suspects else 8
        probes = []
        self.calm = True
        guest.park()
        for block in range(0, guest.blocks, step):
            sectors = min(8 * step, guest.size_sectors - 8 * block)
            probes.append(guest.make(op.REQUEST_READ, 8 * block, sectors))
            guest.probes.add(probes[-1].serial)
            engine.submit(probes[-1])
            if len(probes) % 4 == 0:
                self.until(lambda: not guest.live, "reading everything")
        self.until(lambda: not guest.live, "reading everything")
        self.calm = False
        disk: list[bytes | None] = []
        for probe in probes:
            if probe.failed:
                if self.flips:
                    self.states["rot found by a read"] += 1
                elif not self.may_fail(probe):
                    raise Wrong(f"{probe} fails after recovery")
                disk.append(None)
            else:
                data = bytes(probe.payload)
                disk += blocks_of(data + bytes(-len(data) % BLOCK))
        return disk

    def rot(self) -> None:
        """A bit in the cache file flips."""
        where = self.rng.random()
        if where < 0.25:
            block = int(8 * where)
        elif where < 0.75 and self.records:
            record = self.records[-1 - int(self.rng.random() * min(12, len(self.records)))]
            block = record.block + int(self.rng.random() * record.count)
        else:
            block = RING_BLOCK + int(self.rng.random() * self.sizes.ring_blocks)
        self.note(f"a bit of block {block} flips")
        before = self.cache.live[block]
        self.cache.flip(block, int(self.rng.random() * BLOCK * 8))
        twice = next((flip for flip in self.flips if flip[0] == block and flip[2] is before), None)
        if twice:
            self.flips.remove(twice)
            before = twice[1]
        self.flips.append((block, before, self.cache.live[block]))
        self.guest.errors_allowed = True
        self.states["bit flip"] += 1

    def rot_is_known(self, block: int, before: bytes, after: bytes) -> bool:
        """Whether something else says that what was in this block was durable, or nothing needs it."""
        live = self.cache.live
        hit = next((r for r in reversed(self.records) if r.block <= block < r.block + r.count), None)
        if hit is None or live[block] != after or before != hit.data[block - hit.block]:
            return True
        known = superblocks.newest(superblocks.unpack(live[0]), superblocks.unpack(live[1]))
        if known is None or known.durable_seq >= hit.seq:
            return True
        tier = self.tiers.get(known.tier_uuid)
        if tier and tier.tail < tier.head and tier.ring[tier.tail % tier.capacity][0] > hit.seq:
            return True
        return any(r.durable_seq >= hit.seq and live[r.block] == r.data[0] for r in self.records if r.seq > hit.seq)

    # --- bad sectors ---

    def break_a_sector(self) -> None:
        """Something that the log has cannot be read any more; for a while, or until it is overwritten."""
        index, random_number = self.volume._index, self.sectors.random
        values = {block: index.lookup(block) for block in range(self.guest.blocks)}
        found = [
            block
            for block, value in values.items()
            if value and not value & 1 and value not in self.broken and not index.is_lost(block)
        ]
        if not found or len(self.cache.bad) + len(index.lost) >= SECTORS_MOST:
            return
        block = found[int(random_number() * len(found))]
        sector = RING_BLOCK + (values[block] >> 1) % self.sizes.ring_blocks
        self.note(f"block {sector} of the cache file, which has block {block}, cannot be read")
        self.states["a bad sector"] += 1
        self.suspects.add(block)
        self.broken.add(values[block])
        self.cache.bad[sector] = self.now_ns
        self.healing.pop(sector, None)
        self.healed.pop(sector, None)
        if random_number() < 0.5:
            self.healing[sector] = self.now_ns + int(random_number() * 60_000) * MILLISECOND

    def stutters(self, io: Io) -> bool:
        """Whether a read for a destage fails that would succeed when it is repeated: of several blocks."""
        if not self.sizes.bad_sectors or io.count < 2 or self.sectors.random() >= 0.3:
            return False
        return isinstance(self.volume._io._owners[io.group], StagingRead)

    def heal(self) -> None:
        for sector in [sector for sector, when_ns in self.healing.items() if when_ns <= self.now_ns]:
            del self.healing[sector]
            since_ns = self.cache.bad.pop(sector, None)
            if since_ns is not None:
                self.healed[sector] = self.now_ns - since_ns
                self.note(f"block {sector} of the cache file can be read again")
                self.states["a fault of a sector passes"] += 1

    def loses(self, block: int) -> None:
        """The log is about to say that this is lost: only what cannot be read is, and has not been for long."""
        value = self.volume._index.lookup(block)
        overwritten = value & 1  # since this turn began
        if overwritten or self.flips or self.sizes.cache_faults or self.volume._index.is_lost(block):
            return
        sector = RING_BLOCK + (value >> 1) % self.sizes.ring_blocks
        if sector not in self.cache.bad and sector not in self.healed:
            raise Wrong(f"block {block} is given up, and its sector is good")
        # There may have been no room to say so before it could be read again.
        bad_ns = self.now_ns - self.cache.bad[sector] if sector in self.cache.bad else self.healed[sector]
        if bad_ns < PATIENCE_NS:
            raise Wrong(f"block {block} is given up after {bad_ns // MILLISECOND} ms")
        self.states["a bad sector is given up"] += 1

    def may_fail(self, request: Request) -> bool:
        """Whether the request touches what a bad sector had."""
        first, end = request.sector // 8, -(-(request.sector + request.sectors) // 8)
        return any(first <= block < end for block in self.suspects)

    def write_the_image(self) -> None:
        """Somebody else changes the image while no daemon serves it."""
        self.note("the image is written by others")
        block = int(self.rng.random() * self.guest.blocks)
        self.guest.foreign_write(block)
        self.backend.live[block] = self.guest.state[block]
        self.backend.stamp += 1
        self.image_changed = self.image_has_been_changed = True

    def refused(self, error: OperationError) -> bool:
        """The log could not be opened: only rot is a reason for that."""
        if self.image_changed:
            self.states["a changed image is refused"] += 1
            return False
        if self.cache.bad and "cannot be read at byte" in str(error):
            self.refused_for_a_bad_sector(error)
            return False
        if all(block < 2 for block, _, _ in self.flips) and len(self.flips) < 2:
            raise Wrong(f"recovery refuses a cache that is in order: {error}")
        self.states["rot found by recovery"] += 1
        return False

    def refused_for_a_bad_sector(self, error: OperationError) -> None:
        """Rightly so where nobody knows whether the log goes on there."""
        ring_blocks = self.sizes.ring_blocks
        block = superblocks.newest(*(superblocks.unpack(self.cache.live[at]) for at in (0, 1)))
        assert block is not None
        (sector,) = (at for at in self.cache.bad if f" {at * BLOCK}:" in str(error))
        address = block.tail_address + (sector - RING_BLOCK - block.tail_address) % ring_blocks
        if address < block.durable_address:
            raise Wrong(f"a bad sector under data that need not be read yet keeps the log from being opened: {error}")
        self.states["a bad sector where the log may end is refused"] += 1

    # --- work ---

    def work(self, steps: int) -> None:
        """Let the guest and the world do what the seed says."""
        random_number = self.rng.random
        size, engine, guest, volume = self.sizes, self.engine, self.guest, self.volume
        for _ in range(steps):
            choice = random_number()
            if choice < 0.6:
                for _ in range(1 + int(random_number() * size.burst)):
                    if len(guest.live) < size.depth:
                        self.submit_random()
            elif choice > 1 - size.rare:
                self.rare()
            self.advance()
            if size.bad_sectors:
                self.wear_out()
            engine.turn(volume, self.now_ns)
            if volume._ahead is not None and volume._ahead.held:
                self.states["blocks are read ahead"] += 1
            if volume._room:
                self.states["changes wait for room"] += 1
            if volume._parked:
                self.states["parked requests"] += 1
            if volume._losses._moving_seq:
                self.states["a loss is appended again"] += 1
            if volume._writer.space_wanted:
                self.states["the log is full"] += 1
            if volume._writer.entries_room() < 2:
                self.states["the RAM tier's ring is full"] += 1
            if size.ordered and random_number() < size.looks:
                self.look_at_the_image()
            counters = volume._destager.counters
            if counters["blocks_bridged"]:
                self.states["clean blocks are written for their neighbours' sake"] += 1
            if volume._destager._sources.blocks_read_back:
                self.states["the backend is read for a whole object"] += 1
            if random_number() >= size.patience:
                self.end_some()

    def advance(self) -> None:
        choice = self.rng.random()
        if choice < 0.7:
            self.now_ns += 20_000
        elif choice < 0.97:
            self.now_ns += int(3 * MILLISECOND * choice)
        else:
            self.now_ns += 400 * MILLISECOND

    def wear_out(self) -> None:
        """The cache device gets bad sectors, or does not read at all; time flies meanwhile, now and then."""
        random_number = self.sectors.random
        choice = random_number()
        if choice < self.sizes.bad_sectors:
            self.break_a_sector()
        elif choice > 1 - self.sizes.bad_sectors / 10:
            self.states["the cache device reads nothing for a while"] += 1
            self.guest.errors_allowed = True
            self.cache_reads_from_ns = self.now_ns + int(random_number() * 100_000) * MILLISECOND
        elif self.cache.bad and random_number() < 0.1:
            self.now_ns += RETRY_NS
        self.heal()

    def submit_random(self) -> None:
        size, random_number = self.sizes, self.rng.random
        choice = random_number()
        if choice < size.flushes and not self.guest.write_through:  # else it would see no reason for one
            self.engine.submit(self.guest.make(op.REQUEST_FLUSH))
            return
        choice = random_number()
        if choice < size.writes:
            kind = op.REQUEST_WRITE if random_number() < 0.88 else CHANGES[int(random_number() * 3)]
        else:
            kind = op.REQUEST_READ
        blocks = size.hot_blocks if random_number() < 0.8 else self.guest.blocks
        sectors = self.guest.size_sectors
        if kind == op.REQUEST_READ and random_number() < size.streams:
            sector = self.stream if self.stream < sectors else 0
            count = min(8, sectors - sector)
            self.stream = sector + count
            self.engine.submit(self.guest.make(kind, sector, count))
            return
        if random_number() < size.whole:
            block = min(int(random_number() * blocks), sectors // 8 - 1)
            count = min((1, 1, 1, 1, 2, 3, 5, 9)[int(random_number() * 8)], sectors // 8 - block)
            self.engine.submit(self.guest.make(kind, block * 8, count * 8))
        else:
            sector = min(int(random_number() * blocks * 8), sectors - 1)
            count = min((1, 2, 3, 7, 8, 9, 16, 30)[int(random_number() * 8)], sectors - sector)
            self.engine.submit(self.guest.make(kind, sector, count))

    def rare(self) -> None:
        """The guest switches its write cache, the front-end reconnects, the backend is gone for a while."""
        choice = self.rng.random()
        if choice < 0.4:
            # A flush on its way would say to the next process that the guest believes in a write cache.
            on = self.rng.random() < 0.5 or any(r.kind == op.REQUEST_FLUSH for r in self.guest.live.values())
            self.note(f"write cache {'on' if on else 'off'}")
            self.states["write cache switched"] += 1
            self.engine.execute()  # what the core has decided before it hears of it
            self.volume.set_write_cache(on)
            self.guest.write_through = (not on or self.sizes.acknowledge_durable) and not self.sizes.ignore_flush
            self.engine.deadline_ns = 0
        elif choice < 0.6:
            self.reconnect()
        elif choice < 0.7:
            self.grow()
        elif self.sizes.flips and self.rng.random() < 0.3:
            self.states["bit flip under way"] += 1
            self.rot()
        elif self.sizes.backend_faults and self.rng.random() < 0.5:
            self.states["backend has no space"] += 1
            self.backend_full_until_ns = self.now_ns + int(self.rng.random() * 30_000) * MILLISECOND
            if self.rng.random() < 0.3:
                self.volume.retry()  # too early, most of the time
        elif self.sizes.backend_faults:
            self.states["backend outage"] += 1
            self.backend_outage_until_ns = self.now_ns + int(self.rng.random() * 2000) * MILLISECOND
        elif self.sizes.cache_faults:
            self.states["cache outage"] += 1
            self.cache_outage_until_ns = self.now_ns + int(self.rng.random() * 2000) * MILLISECOND

    def grow(self) -> None:
        """The image grows, then the superblocks, then the disk; death may come between."""
        if self.growing or self.image_sectors > 800:
            return
        self.image_sectors += 1 + int(self.rng.random() * 20)
        size_sectors = self.image_sectors
        self.note(f"the image grows to {size_sectors} sectors")
        self.backend.grow(-(-size_sectors // 8))
        if self.rng.random() < 0.2:
            self.states["crash when the image has grown"] += 1
            raise Crash

        def grown() -> None:
            self.engine.execute()  # what the core has decided before
            self.guest.grow(size_sectors)
            self.growing = False
            self.states["the disk grows"] += 1

        self.growing = True
        self.volume.grow(size_sectors * SECTOR, grown)
        self.engine.deadline_ns = 0

    def end_some(self) -> None:
        """Some of the I/O in flight ends."""
        random_number, engine = self.rng.random, self.engine
        for _ in range(1 + int(random_number() * 3)):
            if not engine.io:
                return
            index = int(random_number() * len(engine.io))
            if engine.io[index].kind > CACHE_SYNC and random_number() < self.sizes.backend_patience:
                continue
            self.end(index)

    def end(self, index: int) -> None:
        io = self.engine.io[index]
        self.engine.end_io(index, self.fails(io))

    def fails(self, io: Io) -> int:
        """The errno with which this I/O is to fail, or 0."""
        if self.calm:
            return 0
        on_cache = io.kind <= CACHE_SYNC
        if self.fail_at:
            failed = self.is_the_one("cache" if on_cache else "backend")
        elif on_cache:
            failed = self.sizes.cache_faults > 0 and (
                self.now_ns < self.cache_outage_until_ns or self.rng.random() < self.sizes.cache_faults
            )
        else:
            failed = self.sizes.backend_faults > 0 and (
                self.now_ns < self.backend_outage_until_ns or self.rng.random() < self.sizes.backend_faults
            )
        if io.kind == CACHE_READ:
            failed = failed or self.now_ns < self.cache_reads_from_ns
            if not failed and self.stutters(io):
                return EIO
        full = io.kind == BACKEND_WRITE and self.now_ns < self.backend_full_until_ns
        if not (failed or full):
            return 0
        # What a backend refuses is tried again.
        self.guest.errors_allowed = self.guest.errors_allowed or on_cache
        self.states[_FAILURES[io.kind]] += 1
        return ENOSPC if full else EIO

    def is_the_one(self, name: str) -> bool:
        """Whether this operation is the one that is to fail."""
        number = self.operations_seen[name]
        self.operations_seen[name] += 1
        return number == self.fail_at.get(name)

    # --- the front-end leaves and comes back ---

    def reconnect(self) -> None:
        """The connection breaks: everything is settled, then the front-end submits again what was not answered."""
        self.note("reconnect")
        self.states["reconnect"] += 1
        self.leave()
        self.volume.connected()
        if self.rng.random() < 0.5:
            self.volume.write_cache_unknown()
        self.resubmit()

    def leave(self) -> None:
        engine, volume = self.engine, self.volume
        volume.quiesce(may_drop=True)
        engine.deadline_ns = 0
        engine.execute()
        engine.forget_incoming()
        for _ in range(10_000):
            if not self.guest.live:
                break
            if engine.io:
                self.end(int(self.rng.random() * len(engine.io)))
            else:
                self.now_ns = max(self.now_ns, min(engine.deadline_ns, self.now_ns + 100 * MILLISECOND))
            engine.turn(volume, self.now_ns)
        if self.guest.live:
            raise Wrong(f"a dropped connection does not settle: {list(self.guest.live.values())}")
        volume.disconnected()

    def resubmit(self) -> None:
        again, self.guest.homeless = self.guest.homeless, []
        if again:
            self.states["resubmitted requests"] += 1
        for request in again:
            self.engine.submit(request)

    # --- endings ---

    def close(self) -> None:
        """A clean shutdown: the front-end goes first."""
        self.note("close")
        self.leave()
        self.volume.close(lambda: self.backend.stamp)
        self.engine.deadline_ns = 0
        self.until(lambda: self.volume.closed, "close")
        if self.volume.read_ring is not None:
            live, crcs = self.cache.live, self.engine.crcs[self.sizes.ring_blocks :]
            block = superblocks.newest(superblocks.unpack(live[0]), superblocks.unpack(live[1]))
            assert block is not None
            disk = SyncDisk(self.cache, 1 + int(self.rng.random() * 4) if self.rng.random() < 0.1 else -1)
            read_ring.save(disk, block, self.volume.read_ring.eviction, struct.pack(f"<{len(crcs)}I", *crcs))
        self.states["clean shutdown"] += 1
        self.closed_cleanly = True

    def hand_over(self) -> None:
        """The guest migrates to another daemon, changes something there, and comes back. Nothing but the superblocks
        says so: the image has no mark and no time of change."""
        self.note("hand over")
        self.calm = True
        self.volume.hurry(True)
        self.until(lambda: not self.guest.live and not self.engine.incoming, "answering")
        self.volume.drain(then_cold=True)
        self.engine.deadline_ns = 0
        self.until(lambda: self.volume.drained, "draining")
        self.volume.close(lambda: self.backend.stamp, cold=True)
        self.engine.deadline_ns = 0
        self.until(lambda: self.volume.closed, "close")
        self.calm = False
        self.states["hand-over"] += 1
        self.closed_cleanly = self.is_handed_over = True
        for block, content in enumerate(self.guest.state):
            if self.backend.versions.get(block, [self.backend.live[block]])[0] != content:
                raise Wrong(f"block {block} of the image is not what the guest wrote, and another daemon has it")
        for _ in range(1 + int(self.migrations.random() * self.guest.blocks)):
            block = int(self.migrations.random() * self.guest.blocks)
            self.guest.foreign_write(block)
            self.backend.live[block] = self.guest.state[block]
            self.backend.versions.pop(block, None)

    def finish(self) -> None:
        """Without faults any more: every request is answered, the log is drained, the backend is right."""
        self.note("finish")
        self.engine.countdown = -1
        self.backend_outage_until_ns = self.backend_full_until_ns = self.cache_outage_until_ns = 0
        self.cache_reads_from_ns = 0
        self.sizes = replace(self.sizes, cache_faults=0.0, backend_faults=0.0)
        if self.flips:
            self.look_at_the_rotten()
            return
        self.until(lambda: not self.guest.live and not self.engine.incoming, "answering")
        self.volume.drain()
        self.engine.deadline_ns = 0
        self.until(lambda: self.volume.drained, "draining")
        self.look_at_the_notices()
        lost = self.look_at_the_lost() if self.suspects else set()
        for block, content in enumerate(self.guest.state):
            versions = self.backend.versions.get(block)
            durable = versions[0] if versions else self.backend.live[block]
            if durable != content and block not in lost:
                raise Wrong(f"after draining, block {block} of the backend is not what the guest wrote")
        self.states["drained"] += 1

    def look_at_the_notices(self) -> None:
        """Nothing of the log is overwritten while it is still to be read."""
        if not (self.flips or self.suspects) and any(name == "log-corrupt" for name, _ in self.volume.notices):
            raise Wrong("a block of the log is said to have rotted, and none has")

    def look_at_the_lost(self) -> set[int]:
        """What was given up is answered with errors, and the image has an older version of it."""
        guest = self.guest
        lost = {block for block in range(guest.blocks) if self.volume._index.is_lost(block)}
        guest.check_known([self.backend.live[block] for block in range(guest.blocks)])
        for block, content in enumerate(self.read_everything()):
            if content is not None and (block in lost or content != guest.state[block]):
                raise Wrong(
                    f"block {block} reads {describe(content)}, and {'is lost' if block in lost else 'should not'}"
                )
        return lost

    def look_at_the_rotten(self) -> None:
        """With rot in it, a log goes on and drains all the same. Nothing wrong gets to the backend; and what was not
        rotten is there."""
        guest = self.guest
        self.until(lambda: not guest.live and not self.engine.incoming, "answering, with rot in the log,")
        self.volume.drain()
        self.engine.deadline_ns = 0
        self.until(lambda: self.volume.drained, "draining, with rot in the log,")
        guest.check_known(list(self.backend.live))
        for block, content in enumerate(self.read_everything()):
            if content is not None and content != guest.state[block]:
                raise Wrong(f"block {block} reads {describe(content)}, and should be {describe(guest.state[block])}")

    def until(self, done: Callable[[], bool], what: str) -> None:
        """Turn until it is done; time goes on only when nothing else does."""
        engine, volume = self.engine, self.volume
        for _ in range(20_000):
            engine.turn(volume, self.now_ns)
            if engine.io:
                self.end(int(self.rng.random() * len(engine.io)))
            elif engine.operations or engine.done:
                pass
            elif done():
                return
            elif engine.deadline_ns >= op.NEVER:
                break
            else:
                # Bad sectors are given up after a minute or so, however often a checkpoint is due.
                least_ns = 100 * MILLISECOND if self.cache.bad else 1
                self.now_ns = max(self.now_ns + least_ns, engine.deadline_ns)
                self.heal()
        raise Wrong(f"{what} does not end: {list(self.guest.live.values())} {volume.statistics()}")

    def stop(self) -> None:
        """The process is gone, by itself or with the machine."""
        if hasattr(self, "engine"):
            self.look_at_the_notices()
            self.engine.die()
            self.look_at_the_image()
        if self.rng.random() < self.sizes.power:
            self.power_loss()
        else:
            self.note("the process dies" if not self.closed_cleanly else "the process ends")
            if not self.closed_cleanly:
                self.states["process crash"] += 1

    def power_loss(self) -> None:
        self.note("power loss")
        self.states["power loss"] += 1
        mode = int(self.rng.random() * 5)
        self.cache.power_loss(mode)
        self.backend.power_loss(int(self.rng.random() * 5) if self.rng.random() < 0.5 else mode)
        self.tiers = {}
        self.tier_lost = False
        self.boot += 1
        self.guest_died = True


_FAILURES: Final = {
    CACHE_WRITE: "cache write failed",
    CACHE_READ: "cache read failed",
    CACHE_SYNC: "cache sync failed",
    BACKEND_WRITE: "backend write failed",
    BACKEND_READ: "backend read failed",
    BACKEND_SYNC: "backend sync failed",
}
