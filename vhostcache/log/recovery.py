"""Recovery: from superblocks, log and RAM tier of one cache to a log that can be written on.

Owns what a start writes to the cache file; decision.py says which start it is. It is the same code for the daemon, the
offline tools and the simulator: a cache is a `Disk`, and neither module knows files or time. Invariants:

- What has been found is made durable before a superblock says so. A new epoch stands in both superblocks before its
  first record is written.
- A crash at any moment of `recover` leaves a cache of which `recover` makes the same log. While the RAM tier is being
  appended the superblocks still name its file; a superblock of a younger epoch than the file that it names is an
  unfinished recovery, and the next one begins it again from the same place.

It never destages, and knows of the image only its stamp.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from vhostcache.errors import CacheCorruptError, CacheError
from vhostcache.log.decision import (
    LOST_TIER,
    BackendFacts,
    Decision,
    Finding,
    Group,
    Situation,
    examine,
    judge,
    named_tier,
    read_superblock,
)
from vhostcache.log.format import (
    blocks_to_ring_end,
    compose,
    header_blocks_for,
    header_words,
    offset_bytes,
    pad_words,
    parse_header,
    record_magic,
    ring_blocks_of,
)
from vhostcache.log.superblock import A_OFFSET_BYTES, B_OFFSET_BYTES, NO_TIER, Superblock
from vhostcache.log.tier import Tier
from vhostcache.log.walk import Disk, Progress, RecordFacts, Visit
from vhostcache.operations import BLOCK_BYTES

__all__ = [
    "BackendFacts",
    "Decision",
    "Disk",
    "Finding",
    "RecordFacts",
    "Recovered",
    "create",
    "examine",
    "named_tier",
    "read_superblock",
    "recover",
]


@dataclass(frozen=True)
class Recovered:
    """An opened log."""

    superblock: Superblock
    """As both copies on disk now are."""
    finding: Finding
    head_address: int
    next_seq: int
    previous_crc: int
    """Of the last record's header; 0 when there is none."""
    records: list[RecordFacts] = field(repr=False)
    """Tail to head in log order, pads too; empty when they were visited."""

    @property
    def ring_blocks(self) -> int:
        return self.superblock.ring_blocks

    @property
    def tail_address(self) -> int:
        return self.superblock.tail_address

    @property
    def tail_seq(self) -> int:
        return self.superblock.tail_seq

    @property
    def clean_address(self) -> int:
        return self.superblock.clean_address

    @property
    def durable_seq(self) -> int:
        return self.next_seq - 1


def create(disk: Disk, uuid: bytes, backend: BackendFacts, read_blocks: int = 0) -> Superblock:
    """Make an empty log in the file, whatever it holds. `uuid`: 16 random bytes, never those of an older cache.
    The last `read_blocks` are left to a read cache.

    A crash leaves no superblock, or a good one."""
    ring_blocks = ring_blocks_of(disk.size_bytes) - read_blocks
    assert ring_blocks > 0
    new = Superblock(
        uuid=uuid,
        backend_identity=backend.identity,
        backend_size_bytes=backend.size_bytes,
        backend_mtime_ns=backend.mtime_ns,
        ring_blocks=ring_blocks,
        epoch=0,
        open_seq=1,
        tail_address=ring_blocks,
        tail_seq=1,
        clean_address=ring_blocks,
        durable_address=ring_blocks,
        durable_seq=0,
        read_blocks=read_blocks,
        clean=True,
    )
    # Superblocks of a former cache here could be of a larger generation.
    disk.write(A_OFFSET_BYTES, bytes(2 * BLOCK_BYTES))
    disk.sync()
    _write_superblocks(disk, new, A_OFFSET_BYTES)
    return new


def recover(
    disk: Disk,
    tier: Tier | None,
    boot_id: bytes,
    backend: BackendFacts | None = None,
    *,
    tier_uuid: bytes = NO_TIER,
    subject: str = "cache",
    accept_lost_tier: bool = False,
    progress: Progress | None = None,
    visit: Visit | None = None,
    read_blocks: int | None = None,
) -> Recovered:
    """Open the log: a new epoch, and everything that was acknowledged is in it and durable.

    `tier_uuid` names the RAM-tier file of this opening. That file must be there before this is called, with the epoch
    `examine(...).next_epoch`, and the old one may be removed only when this has returned: at each moment the
    superblocks name a file that exists. CacheError: a row of the table refuses, and nothing has been changed. `visit`
    is handed every record in log order, also those that the decision then forgets (below `tail_address`).
    `read_blocks`: the size of the read cache from now on, if that is to be another one; the file has room for it.
    """
    situation = Situation(disk, tier, boot_id, backend, accept_lost_tier, progress, visit)
    finding = judge(situation, subject)
    if finding.error is not None:
        raise finding.error
    assert finding.superblock is not None
    log = _opened_log(finding)
    old = finding.superblock
    opening = dataclasses.replace(
        old,
        backend_size_bytes=backend.size_bytes if backend else old.backend_size_bytes,
        backend_mtime_ns=backend.mtime_ns if backend else old.backend_mtime_ns,
        epoch=finding.next_epoch,
        open_seq=log.next_seq,
        tail_address=log.tail_address,
        tail_seq=log.tail_seq,
        clean_address=max(old.clean_address, log.tail_address),
        durable_address=log.head_address,
        durable_seq=log.next_seq - 1,
        boot_id=boot_id,
        tier_uuid=old.tier_uuid if finding.replay else tier_uuid,
        read_blocks=old.read_blocks if read_blocks is None else read_blocks,
        clean=False,
        cold=False,
        generation=old.generation + 1,
    )
    # The copy that counts is written last, so that there is always one.
    first = B_OFFSET_BYTES if finding.copies[0] is old else A_OFFSET_BYTES
    disk.sync()
    _write_superblocks(disk, opening, first)
    if finding.replay:
        assert tier is not None
        _append(disk, opening, log, tier, finding.replay, visit, subject)
        disk.sync()
        opening = dataclasses.replace(
            opening,
            durable_address=log.head_address,
            durable_seq=log.next_seq - 1,
            tier_uuid=tier_uuid,
            generation=opening.generation + 1,
        )
        _write_superblocks(disk, opening, first)
    return Recovered(opening, finding, log.head_address, log.next_seq, log.previous_crc, log.records)


def close(disk: Disk, opened: Superblock, backend: BackendFacts, *, destaged: bool) -> Superblock:
    """The end in good order of an opening in which nothing has been appended; `destaged`: the image has it all."""
    disk.sync()
    closed = dataclasses.replace(
        opened,
        backend_size_bytes=backend.size_bytes,
        backend_mtime_ns=backend.mtime_ns,
        clean_address=opened.durable_address if destaged else opened.clean_address,
        clean=True,
        generation=opened.generation + 1,
    )
    _write_superblocks(disk, closed, A_OFFSET_BYTES)
    return closed


# What the decisions do.


@dataclass
class _Log:
    """The log that is being opened."""

    tail_address: int
    tail_seq: int
    head_address: int
    next_seq: int
    previous_crc: int
    records: list[RecordFacts]


def _opened_log(finding: Finding) -> _Log:
    """The part of the log that is kept."""
    block, found = finding.superblock, finding.walk
    assert block is not None
    assert found is not None
    if finding.decision is Decision.COLD:
        head, seq = max((found.head_address, found.next_seq), (block.durable_address, block.durable_seq + 1))
        return _Log(head, seq, head, seq, 0, [])
    tail, tail_seq, records = block.tail_address, block.tail_seq, found.records
    if finding.evicts:
        tail, tail_seq = found.dirty_address, found.dirty_seq
        records = [record for record in records if record.address >= tail]
    return _Log(tail, tail_seq, found.head_address, found.next_seq, found.previous_crc, records)


def _append(
    disk: Disk, opening: Superblock, log: _Log, tier: Tier, groups: Sequence[Group], visit: Visit | None, subject: str
) -> None:
    """Write what only the RAM tier has, one record a group, in the order of their seqs."""
    magic = record_magic(opening.uuid)
    keep = visit or log.records.append
    for group in groups:
        payload = [tier.read_slot(slot) for slot in group.slots]
        header_blocks = header_blocks_for(len(group.extents), len(payload))
        if header_blocks == 0:
            raise CacheCorruptError(
                subject,
                f"the RAM tier has {len(group.extents)} extents and {len(payload)} blocks of record {group.seq}",
                "what fits into a record",
                LOST_TIER,
            )
        blocks = header_blocks + len(payload)
        if blocks > blocks_to_ring_end(log.head_address, opening.ring_blocks):
            words = pad_words(
                magic, opening.epoch, log.next_seq, log.head_address, opening.ring_blocks, opening.durable_seq
            )
            _append_record(disk, opening, log, words, [], keep, subject)
        words = header_words(
            magic,
            opening.epoch,
            log.next_seq,
            log.head_address,
            header_blocks,
            len(payload),
            group.extents,
            opening.durable_seq,
        )
        _append_record(disk, opening, log, words, payload, keep, subject)


def _append_record(
    disk: Disk,
    opening: Superblock,
    log: _Log,
    words: list[int],
    payload: list[bytes],
    keep: Visit,
    subject: str,
) -> None:
    data, crc = compose(words, log.previous_crc, payload)
    header = parse_header(data)
    assert header is not None
    if log.head_address + header.blocks > opening.tail_address + opening.ring_blocks:
        # The writer keeps room for what it acknowledges.
        raise CacheError(
            subject,
            f"the log has no room for what is only in the RAM tier (record {log.next_seq})",
            "the room that is kept for it",
            "this is a fault in vhostcache: please report it, and keep the RAM-tier file",
        )
    disk.write(offset_bytes(log.head_address, opening.ring_blocks), b"".join([data, *payload]))
    keep(RecordFacts(header.address, header.seq, header.header_blocks, len(payload), header.extents, header.crcs))
    log.head_address += header.blocks
    log.next_seq += 1
    log.previous_crc = crc


# Superblocks.


def _write_superblocks(disk: Disk, block: Superblock, first: int) -> None:
    packed = block.pack()
    for offset in (first, A_OFFSET_BYTES + B_OFFSET_BYTES - first):
        disk.write(offset, packed)
        disk.sync()
