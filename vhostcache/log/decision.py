"""What a start would find and do: the decision table.

Owns the judgement of a cache from its superblocks, its RAM tier, its log and the stamp of its image. Invariant: what a
flush has made durable is found again, or the start is refused. Nothing is truncated silently: the log ends where the
first record fails, unless that place lies below the durable address, or something else says that the record was durable
once. Then it is damage, and a person decides. (What nothing else speaks of is ambiguous: damage to the records of the
very last flush, when nothing has been written since, looks like power loss before that flush.)

It only reads. recovery.py does what is decided here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from struct import Struct
from typing import Final, NamedTuple

from vhostcache.errors import CacheCorruptError, CacheError
from vhostcache.log import superblock as superblocks
from vhostcache.log.format import (
    DATA,
    FLAG_PAD,
    RECORD_MAX_BLOCKS,
    RING_OFFSET_BYTES,
    blocks_to_ring_end,
    extent,
    offset_bytes,
    record_magic,
    ring_blocks_of,
    split_extent,
)
from vhostcache.log.superblock import A_OFFSET_BYTES, NO_TIER, Superblock
from vhostcache.log.tier import Tier
from vhostcache.log.walk import NEVER, Disk, Progress, Visit, Walk, look_ahead, walk
from vhostcache.operations import BLOCK_BYTES

_FIELDS: Final = Struct("<6Q")
"""The first words of a record's header."""


@dataclass(frozen=True)
class BackendFacts:
    """The image as it is now, to be compared with what the superblock says of it."""

    identity: bytes
    size_bytes: int
    mtime_ns: int
    """Of its data; 0: nobody can tell, as with a block device."""
    is_marked: bool = False
    """It says itself that this cache is its own."""
    is_accepted: bool = False
    """A person says that it is good as it is, whoever has changed it."""


class Decision(Enum):
    """What a start does."""

    REFUSE = "refuse"
    CORRUPT = "refuse, damaged"
    WARM = "go on with the log as it is"
    REPLAY = "append to the log what only the RAM tier has, and go on"
    EVICT = "keep what the image does not have, and forget the rest"
    COLD = "begin with an empty log"


class Group(NamedTuple):
    """What the RAM tier has of one record."""

    seq: int
    extents: tuple[int, ...]
    """Zero and discard extents first, then data extents, which list `slots` in order."""
    slots: tuple[int, ...]


@dataclass(frozen=True)
class Finding:
    """What a start would find and do. Nothing has been changed."""

    decision: Decision
    what: str
    """What was found: the row of the decision table, in half a sentence."""
    error: CacheError | None
    superblock: Superblock | None
    copies: tuple[Superblock | None, Superblock | None]
    walk: Walk | None
    """None when the log was not looked at."""
    replay: tuple[Group, ...] = ()
    evicts: bool = False
    """Records that the image has are forgotten: somebody else may have written it since."""

    @property
    def next_epoch(self) -> int:
        """The epoch that a start opens; it belongs into the header of a new RAM-tier file."""
        return self.superblock.epoch + 1 if self.superblock else 1

    @property
    def is_damaged(self) -> bool:
        """Something is not what was written there, whether that matters or not."""
        cut_short = bool(self.superblock and self.walk and self.walk.head_address < self.superblock.durable_address)
        return cut_short or self.decision is Decision.CORRUPT

    @property
    def is_dirty(self) -> bool:
        """There is something that the image does not have."""
        if self.superblock is None:
            return False
        head = self.walk.head_address if self.walk else self.superblock.durable_address
        return bool(self.replay) or self.superblock.clean_address < head


def examine(
    disk: Disk,
    tier: Tier | None,
    boot_id: bytes,
    backend: BackendFacts | None = None,
    *,
    subject: str = "cache",
    accept_lost_tier: bool = False,
    progress: Progress | None = None,
    visit: Visit | None = None,
) -> Finding:
    """What a start would find and do; it only reads.

    `tier`: the RAM-tier file that the superblock names (see `named_tier`), None if there is none. `backend` None: the
    image is not judged. `accept_lost_tier`: what was in a RAM tier that is gone may be lost, because its guest is gone
    too. `visit` is handed the records instead of the result, before the decision has been made."""
    return judge(Situation(disk, tier, boot_id, backend, accept_lost_tier, progress, visit), subject)


def read_superblock(disk: Disk) -> Superblock | None:
    """The one that counts; None: there is none, or none is whole."""
    return superblocks.newest(*read_superblocks(disk))


def named_tier(disk: Disk) -> tuple[bytes, bytes] | None:
    """The uuids, of cache and RAM tier, under which `examine` will want to see a RAM-tier file; None: not any."""
    superblock = read_superblock(disk)
    if superblock is None or superblock.clean or superblock.tier_uuid == NO_TIER:
        return None
    return superblock.uuid, superblock.tier_uuid


class Situation:
    """What there is, found out when a row of the table asks for it: no row looks further than it must."""

    def __init__(
        self,
        disk: Disk,
        tier: Tier | None,
        boot_id: bytes,
        backend: BackendFacts | None,
        accept_lost_tier: bool,
        progress: Progress | None,
        visit: Visit | None,
    ) -> None:
        self.disk = disk
        self.offered_tier = tier
        self.boot_id = boot_id
        self.backend = backend
        self.accept_lost_tier = accept_lost_tier
        self.progress = progress
        self.visit = visit

    # Superblocks.

    @cached_property
    def copies(self) -> tuple[Superblock | None, Superblock | None]:
        return read_superblocks(self.disk)

    @cached_property
    def newest(self) -> Superblock | None:
        return superblocks.newest(*self.copies)

    @property
    def superblock(self) -> Superblock:
        assert self.newest is not None
        return self.newest

    @property
    def versions(self) -> list[int]:
        """The format versions that the superblocks claim to have, damaged or not."""
        if self.disk.size_bytes < RING_OFFSET_BYTES:
            return []
        found = (superblocks.version_in(data) for data in _superblock_blocks(self.disk))
        return [version for version in found if version is not None]

    @property
    def contradicts_itself(self) -> bool:
        block = self.superblock
        a, b = self.copies
        ordered = block.tail_address <= block.clean_address <= block.durable_address
        fits = block.durable_address - block.tail_address <= block.ring_blocks
        counted = block.tail_seq <= block.durable_seq + 1 and block.open_seq <= block.durable_seq + 1
        return not (ordered and fits and counted) or (a is not None and b is not None and a.uuid != b.uuid)

    # The RAM tier.

    @property
    def same_boot(self) -> bool:
        return self.superblock.boot_id == self.boot_id

    @property
    def needs_tier(self) -> bool:
        block = self.superblock
        return not block.clean and self.same_boot and block.tier_uuid != NO_TIER

    @property
    def tier_is_named(self) -> bool:
        tier, block = self.offered_tier, self.superblock
        return (
            tier is not None
            and (tier.uuid, tier.tier_uuid, tier.boot_id) == (block.uuid, block.tier_uuid, block.boot_id)
            and tier.epoch <= block.epoch
        )

    @property
    def tier(self) -> Tier | None:
        """The RAM tier that counts."""
        return self.offered_tier if self.needs_tier and self.tier_is_named else None

    # The log.

    @property
    def unfinished_recovery(self) -> bool:
        """The RAM tier is older than the epoch: what this epoch has written is its unfinished re-append."""
        return self.tier is not None and self.tier.epoch < self.superblock.epoch

    @cached_property
    def walk(self) -> Walk:
        block = self.superblock
        stop = block.durable_address if block.clean or self.unfinished_recovery else NEVER
        return walk(self.disk, block, stop_address=stop, progress=self.progress, visit=self.visit)

    @property
    def log_broken(self) -> bool:
        return self.walk.head_address < self.superblock.durable_address

    @property
    def lacks_what_is_unreadable(self) -> bool:
        """Something behind the durable address cannot be read, and the RAM tier has not everything from there on."""
        return self.walk.is_unreadable and not (self.replay and self.replay[0].seq <= self.walk.next_seq)

    @property
    def miscounted(self) -> bool:
        """The durable address is reached with another seq than the superblock has for it."""
        block, found = self.superblock, self.walk
        return found.head_address == block.durable_address and found.next_seq != block.durable_seq + 1

    @cached_property
    def witness_seq(self) -> int:
        """A record behind the end that says that the one missing there was durable; 0: there is none."""
        block, found = self.superblock, self.walk
        if block.clean or self.unfinished_recovery:
            return 0
        witness = look_ahead(self.disk, block, found.head_address, found.next_seq)
        return witness.seq if witness else 0

    @property
    def tier_goes_on_later(self) -> bool:
        """Everything before the RAM tier's oldest entry was durable; only a pad has no entry."""
        if not self.replay:
            return False
        missing = self.replay[0].seq - self.walk.next_seq
        pad_is_near = blocks_to_ring_end(self.walk.head_address, self.superblock.ring_blocks) < RECORD_MAX_BLOCKS
        return missing > pad_is_near or (missing == 1 and self.damaged_record_at_head)

    @property
    def damaged_record_at_head(self) -> bool:
        """What fails there is no pad, nor something older: it is the record that belongs there, but for some bits."""
        found, ring_blocks = self.walk, self.superblock.ring_blocks
        if self.unfinished_recovery:
            return False  # what stands there is what it has appended
        data = self.disk.read(offset_bytes(found.head_address, ring_blocks), BLOCK_BYTES)
        magic, epoch, seq, address, _, counts = _FIELDS.unpack_from(data)
        expected = (record_magic(self.superblock.uuid), found.next_seq, found.head_address)
        alike = sum(a == b for a, b in zip((magic, seq, address), expected, strict=True))
        return epoch == self.superblock.epoch and alike > 1 and not counts >> 32 & FLAG_PAD

    @cached_property
    def replay(self) -> tuple[Group, ...]:
        return _groups(self.tier, self.walk.next_seq) if self.tier else ()

    # The image.

    @property
    def is_dirty(self) -> bool:
        return bool(self.replay) or self.superblock.clean_address < self.walk.head_address

    @property
    def nothing_dirty_was_closed(self) -> bool:
        return self.superblock.clean and self.superblock.clean_address >= self.superblock.durable_address

    @property
    def is_foreign(self) -> bool:
        return self.backend is not None and self.backend.identity != self.superblock.backend_identity

    @property
    def other_size(self) -> bool:
        return self.backend is not None and self.backend.size_bytes != self.superblock.backend_size_bytes

    @property
    def only_grown(self) -> bool:
        """It is the image that the log belongs on, and larger: a resize that was cut short, or that somebody has begun
        by hand. One that cannot be marked is known by its path alone, which means the same as long as the host runs.
        """
        backend, block = self.backend, self.superblock
        if backend is None or backend.size_bytes <= block.backend_size_bytes:
            return False
        return backend.is_marked or self.same_boot

    @property
    def other_mtime(self) -> bool:
        known = self.superblock.backend_mtime_ns
        return self.backend is not None and 0 not in (known, self.backend.mtime_ns) and self.backend.mtime_ns != known

    @property
    def image_changed(self) -> bool:
        """Since an orderly end. After any other the image is younger than the superblock because of ourselves."""
        block = self.superblock
        return block.cold or (self.other_size and not self.only_grown) or (block.clean and self.other_mtime)

    @property
    def change_is_accepted(self) -> bool:
        """What others have done to the image is to stay; what it lacks is here. There has to be room for that."""
        backend, block = self.backend, self.superblock
        return (
            backend is not None
            and backend.is_accepted
            and not block.cold
            and backend.size_bytes >= block.backend_size_bytes
        )

    @property
    def image_is_younger(self) -> bool:
        """Without an orderly end that says little: we ourselves may have written it after the last superblock."""
        block = self.superblock
        return not block.clean and self.other_mtime and block.tail_address < block.clean_address

    @property
    def how_changed(self) -> str:
        if self.other_size:
            assert self.backend is not None
            return f"the image has {self.backend.size_bytes} bytes, and had {self.superblock.backend_size_bytes}"
        return "the image has been given away" if self.superblock.cold else "the image has been written by others"


@dataclass(frozen=True)
class Row:
    holds: Callable[[Situation], bool]
    decision: Decision
    found: Callable[[Situation], str] | str
    expected: Callable[[Situation], str] | str = ""
    hint: str = ""
    reads_log: bool = True
    """The log has been looked at when this row decides."""


_UNCHANGED: Final = "nothing has been changed"
LOST_TIER: Final = "power the guest off and use `vhostcache drain --accept-lost-ram`"
_GIVE_UP: Final = "restore the cache file, or give up what the image does not have with --discard-dirty-data"

# The first row that holds decides. They go from what is cheap to look at to what is dear, and no row is reached that
# could not be judged because of what a row above has found.
DECISIONS: Final = (
    # Whether this is a cache at all.
    Row(
        lambda s: s.newest is None and not s.versions,
        Decision.REFUSE,
        "is not a cache of vhostcache: it has no superblock",
        "a file that `--cache` has made",
        _UNCHANGED,
        reads_log=False,
    ),
    Row(
        lambda s: s.newest is None and superblocks.VERSION not in s.versions,
        Decision.REFUSE,
        lambda s: f"is of format version {s.versions[0]}",
        f"version {superblocks.VERSION}",
        "use the vhostcache that made it",
        reads_log=False,
    ),
    Row(
        lambda s: s.newest is None,
        Decision.CORRUPT,
        "both superblocks are damaged",
        "at least one with a right checksum",
        _GIVE_UP,
        reads_log=False,
    ),
    Row(
        lambda s: s.superblock.ring_blocks > ring_blocks_of(s.disk.size_bytes),
        Decision.REFUSE,
        lambda s: f"has {s.disk.size_bytes} bytes: it has been truncated",
        "at least the size with which it was made",
        _GIVE_UP,
        reads_log=False,
    ),
    Row(
        lambda s: s.contradicts_itself,
        Decision.CORRUPT,
        "its superblocks contradict themselves",
        "tail, clean and durable address in this order",
        _GIVE_UP,
        reads_log=False,
    ),
    Row(
        lambda s: s.is_foreign,
        Decision.REFUSE,
        lambda s: f"belongs to another image ({_spell(s.superblock.backend_identity)})",
        "the cache of this image",
        "name another cache file, or serve that image",
        reads_log=False,
    ),
    # Whether the RAM tier is there, when there must be one (hazard 12).
    Row(
        lambda s: s.needs_tier and s.offered_tier is None and not s.accept_lost_tier,
        Decision.REFUSE,
        "was not closed, and its RAM-tier file is gone: what was acknowledged and not yet flushed is lost",
        "the RAM-tier file, which stays until the host restarts",
        f"{LOST_TIER}, which takes the disk back to a moment not before its last flush",
        reads_log=False,
    ),
    Row(
        lambda s: s.needs_tier and not s.tier_is_named and not s.accept_lost_tier,
        Decision.REFUSE,
        lambda s: f"was not closed, and the RAM-tier file is of another opening (epoch {_tier_epoch(s)})",
        "the RAM-tier file that the superblock names",
        f"this cache file may be an old copy; if it is not, {LOST_TIER}",
        reads_log=False,
    ),
    Row(
        lambda s: s.tier is not None and s.tier.fault != "" and not s.accept_lost_tier,
        Decision.CORRUPT,
        lambda s: f"the RAM-tier file is damaged: {s.tier.fault if s.tier else ''}",
        "entries of this cache",
        LOST_TIER,
        reads_log=False,
    ),
    # Whether the log is whole (hazard 6).
    Row(
        lambda s: s.log_broken and s.nothing_dirty_was_closed,
        Decision.COLD,
        lambda s: f"the log is damaged at address {s.walk.head_address}, and the image has everything that is in it",
    ),
    Row(
        lambda s: s.log_broken,
        Decision.CORRUPT,
        lambda s: (
            f"the log is damaged at address {s.walk.head_address} "
            f"(byte {offset_bytes(s.walk.head_address, s.superblock.ring_blocks)}): {s.walk.end}"
        ),
        lambda s: f"record {s.walk.next_seq}; all below address {s.superblock.durable_address} is known to be durable",
        _GIVE_UP,
    ),
    Row(
        lambda s: s.lacks_what_is_unreadable,
        Decision.CORRUPT,
        lambda s: f"the log {s.walk.end}, where record {s.walk.next_seq} may be",
        "a device that reads it, or a record known to be the last",
        f"try again; {_GIVE_UP}",
    ),
    Row(
        lambda s: s.miscounted,
        Decision.CORRUPT,
        lambda s: f"the durable address {s.superblock.durable_address} holds record {s.walk.next_seq}",
        lambda s: f"record {s.superblock.durable_seq + 1}",
        _GIVE_UP,
    ),
    Row(
        lambda s: s.witness_seq > 0,
        Decision.CORRUPT,
        lambda s: (
            f"the log is damaged at address {s.walk.head_address} "
            f"(byte {offset_bytes(s.walk.head_address, s.superblock.ring_blocks)}): {s.walk.end}"
        ),
        lambda s: f"record {s.walk.next_seq}, which record {s.witness_seq} behind it says was durable",
        _GIVE_UP,
    ),
    Row(
        lambda s: s.tier_goes_on_later,
        Decision.CORRUPT,
        lambda s: f"the log ends before record {s.walk.next_seq}: {s.walk.end}",
        lambda s: f"the records up to {s.replay[0].seq}, with which the RAM tier goes on",
        _GIVE_UP,
    ),
    # Whether the image is the one that the log belongs on (hazard 11).
    Row(
        lambda s: s.image_changed and s.is_dirty and not s.change_is_accepted,
        Decision.REFUSE,
        lambda s: f"{s.how_changed}, while there is data here that it does not have",
        "the image as it was left",
        "restore the image, or write that over it as it is now with `vhostcache drain --accept-changed-image`, or give "
        "it up with --discard-dirty-data",
    ),
    Row(
        lambda s: s.image_changed and not s.is_dirty,
        Decision.COLD,
        lambda s: f"{s.how_changed}, and has everything that was here",
    ),
    # Everything is well.
    Row(
        lambda s: bool(s.replay),
        Decision.REPLAY,
        lambda s: f"was not closed; the RAM tier has {len(s.replay)} more record{'s' if len(s.replay) > 1 else ''}",
    ),
    Row(lambda s: s.image_changed, Decision.EVICT, lambda s: f"{s.how_changed}, and is accepted as it is"),
    Row(lambda s: s.superblock.clean, Decision.WARM, "was closed in good order"),
    Row(
        lambda s: s.image_is_younger,
        Decision.EVICT,
        "was not closed, and the image is younger than the last superblock",
    ),
    Row(lambda s: True, Decision.WARM, "was not closed; all that is needed is in the log"),
)


def judge(situation: Situation, subject: str) -> Finding:
    row = next(row for row in DECISIONS if row.holds(situation))
    found = row.found(situation) if callable(row.found) else row.found
    expected = row.expected(situation) if callable(row.expected) else row.expected
    error = None
    if row.decision in (Decision.REFUSE, Decision.CORRUPT):
        kind = CacheCorruptError if row.decision is Decision.CORRUPT else CacheError
        error = kind(subject, found, expected, row.hint)
    return Finding(
        row.decision,
        found,
        error,
        situation.newest,
        situation.copies,
        situation.walk if row.reads_log else None,
        situation.replay if row.reads_log and row.decision is not Decision.COLD else (),
        row.decision in (Decision.REPLAY, Decision.EVICT) and (situation.image_is_younger or situation.image_changed),
    )


def _tier_epoch(situation: Situation) -> int:
    return situation.offered_tier.epoch if situation.offered_tier else 0


def _spell(identity: bytes) -> str:
    text = identity.decode("ascii", "replace")
    return text if text.isprintable() else identity.hex()


# Helpers.


def _superblock_blocks(disk: Disk) -> tuple[bytes, bytes]:
    both = disk.read(A_OFFSET_BYTES, 2 * BLOCK_BYTES)
    return both[:BLOCK_BYTES], both[BLOCK_BYTES:]


def read_superblocks(disk: Disk) -> tuple[Superblock | None, Superblock | None]:
    if disk.size_bytes < RING_OFFSET_BYTES:
        return None, None
    a, b = _superblock_blocks(disk)
    return superblocks.unpack(a), superblocks.unpack(b)


def _groups(tier: Tier, first_seq: int) -> tuple[Group, ...]:
    """The entries from that record on, as the records that they were to become."""
    entries: dict[int, list[tuple[int, int]]] = {}
    for entry in tier.entries:
        if entry.seq >= first_seq:
            entries.setdefault(entry.seq, []).append((entry.extent, entry.slot))
    return tuple(_group(seq, entries[seq]) for seq in sorted(entries))


def _group(seq: int, entries: list[tuple[int, int]]) -> Group:
    slot_of: dict[int, int] = {}
    extents: list[int] = []
    for word, slot in entries:
        block, count, kind = split_extent(word)
        if kind == DATA:
            slot_of[block] = slot
            continue
        extents.append(word)
        for gone in [data for data in slot_of if block <= data < block + count]:
            del slot_of[gone]
    blocks = sorted(slot_of)
    first = 0
    for index in range(1, len(blocks) + 1):
        if index == len(blocks) or blocks[index] != blocks[index - 1] + 1:
            extents.append(extent(blocks[first], index - first))
            first = index
    return Group(seq, tuple(extents), tuple(slot_of[block] for block in blocks))
