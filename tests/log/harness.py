"""A cache file in memory, a writer that fills it as the daemon would, and a RAM-tier file for it."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from vhostcache.errors import CacheUnreadableError
from vhostcache.log import superblock as superblocks
from vhostcache.log import tier as tiers
from vhostcache.log.format import (
    DATA,
    blocks_to_ring_end,
    compose,
    extent,
    header_blocks_for,
    header_words,
    offset_bytes,
    pad_words,
    record_magic,
    split_extent,
)
from vhostcache.log.recovery import BackendFacts, Recovered, create, recover
from vhostcache.log.superblock import Superblock
from vhostcache.log.tier import Tier, TierLayout
from vhostcache.log.walk import RecordFacts

BLOCK = 4096
UUID = bytes(range(100, 116))
BOOT = b"this boot of it."
OTHER_BOOT = b"the boot before."
TIER = b"tier of opening1"
NEXT_TIER = b"tier of opening2"
IMAGE = BackendFacts(b"8:1:1234", 1 << 30, 1_000_000_000)


class CrashError(Exception):
    """Power, or the process, is gone."""


class MemoryDisk:
    """Writes are volatile until `sync`. After `operations_left` writes and syncs it fails for good."""

    def __init__(self, ring_blocks: int) -> None:
        self.data = bytearray((256 + ring_blocks) * BLOCK)
        self.unsynced: list[tuple[int, bytes]] = []
        """What a write has overwritten, oldest first."""
        self.operations_left = -1
        self.read_bytes = 0
        self.log: list[tuple[str, int]] = []
        self.bad: set[int] = set()
        """Offsets of blocks that cannot be read until they are written."""

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    def read(self, offset: int, size: int) -> bytes:
        assert offset % BLOCK == size % BLOCK == 0
        assert 0 < size <= len(self.data) - offset
        self.read_bytes += size
        for at in range(offset, offset + size, BLOCK):
            if at in self.bad:
                raise CacheUnreadableError("cache", f"cannot be read at byte {at}: input/output error")
        return bytes(self.data[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        assert offset % BLOCK == len(data) % BLOCK == 0
        assert offset + len(data) <= len(self.data)
        self._count()
        self.log.append(("write", offset))
        for at in range(0, len(data), BLOCK):
            self.unsynced.append((offset + at, bytes(self.data[offset + at : offset + at + BLOCK])))
            self.bad.discard(offset + at)
        self.data[offset : offset + len(data)] = data

    def sync(self) -> None:
        self._count()
        self.log.append(("sync", 0))
        self.unsynced.clear()

    def _count(self) -> None:
        if self.operations_left == 0:
            raise CrashError
        self.operations_left -= 1

    def lose_power(self, rng: random.Random) -> None:
        """Of each block that was written and not synced, some write is the last that arrived, or half of it."""
        for offset, before in reversed(self.unsynced):
            fate = rng.randrange(3)
            if fate == 0:
                self.data[offset : offset + BLOCK] = before
            elif fate == 1:
                half = rng.randrange(1, 8) * 512
                self.data[offset + half : offset + BLOCK] = before[half:]
        self.unsynced.clear()

    def copy(self) -> MemoryDisk:
        other = MemoryDisk(0)
        other.data = bytearray(self.data)
        other.unsynced = list(self.unsynced)
        return other

    def flip(self, offset: int, bit: int = 0) -> None:
        self.data[offset] ^= 1 << bit

    @property
    def superblocks(self) -> tuple[Superblock | None, Superblock | None]:
        return superblocks.unpack(bytes(self.data[:BLOCK])), superblocks.unpack(bytes(self.data[BLOCK : 2 * BLOCK]))

    @property
    def superblock(self) -> Superblock:
        newest = superblocks.newest(*self.superblocks)
        assert newest is not None
        return newest


class TierFile:
    """The engine's part: entries and slots."""

    def __init__(self, tier_uuid: bytes = TIER, epoch: int = 1, slots: int = 64, uuid: bytes = UUID) -> None:
        self.layout = TierLayout(slots, 256)
        self.data = bytearray(self.layout.size_bytes)
        self.data[:BLOCK] = tiers.pack_header(self.layout, uuid, BOOT, tier_uuid, epoch)
        self.head = self.tail = 0
        self._slot = 3

    def publish(self, seq: int, block: int, content: bytes) -> None:
        slot, self._slot = self._slot, self._slot + 1
        offset = self.layout.slab_offset_bytes + slot * BLOCK
        self.data[offset : offset + BLOCK] = content
        self.publish_entry(seq, extent(block, 1), slot)

    def publish_entry(self, seq: int, word: int, slot: int = 0) -> None:
        offset = tiers.entry_offset_bytes(self.layout, self.head)
        self.data[offset : offset + tiers.ENTRY_BYTES] = tiers.pack_entry(seq, word, slot)
        self.head += 1
        self.data[tiers.HEAD_OFFSET_BYTES : tiers.HEAD_OFFSET_BYTES + 8] = self.head.to_bytes(8, "little")

    def retire(self, tail: int) -> None:
        self.tail = tail
        self.data[tiers.TAIL_OFFSET_BYTES : tiers.TAIL_OFFSET_BYTES + 8] = tail.to_bytes(8, "little")

    def parse(self) -> Tier:
        found = tiers.parse(self.data)
        assert found is not None
        return found


class Writer:
    """Writes records behind what has been recovered, as the core and the engine do together."""

    def __init__(self, disk: MemoryDisk, recovered: Recovered) -> None:
        self.disk = disk
        self.block = recovered.superblock
        self.address = recovered.head_address
        self.seq = recovered.next_seq
        self.previous_crc = recovered.previous_crc
        self.durable_seq = recovered.durable_seq
        self.durable_address = recovered.head_address
        self.clean_address = recovered.clean_address
        self.addresses: dict[int, int] = {}

    def record(self, extents: Sequence[int], payload: Sequence[bytes] = (), header_blocks: int = 0) -> int:
        """Write one, and a pad before it where it must be; returns its seq."""
        header_blocks = header_blocks or header_blocks_for(len(extents), len(payload))
        blocks = header_blocks + len(payload)
        ring = self.block.ring_blocks
        magic = record_magic(self.block.uuid)
        if blocks > blocks_to_ring_end(self.address, ring):
            words = pad_words(magic, self.block.epoch, self.seq, self.address, ring, self.durable_seq)
            self._write(words, (), blocks_to_ring_end(self.address, ring))
        words = header_words(
            magic, self.block.epoch, self.seq, self.address, header_blocks, len(payload), extents, self.durable_seq
        )
        self._write(words, payload, blocks)
        return self.seq - 1

    def write(self, block: int, content: bytes, *more: bytes) -> int:
        payload = [fill(content), *map(fill, more)]
        return self.record([extent(block, len(payload))], payload)

    def _write(self, words: list[int], payload: Sequence[bytes], blocks: int) -> None:
        assert self.address + blocks <= self.block.tail_address + self.block.ring_blocks
        data, self.previous_crc = compose(words, self.previous_crc, payload)
        self.disk.write(offset_bytes(self.address, self.block.ring_blocks), data + b"".join(payload))
        self.addresses[self.seq] = self.address
        self.address += blocks
        self.seq += 1

    def flush(self) -> None:
        self.disk.sync()
        self.durable_seq = self.seq - 1
        self.durable_address = self.address

    def checkpoint(self, *, clean: bool = False, tail_seq: int | None = None, destaged: bool = False) -> Superblock:
        """Write both superblocks: what is durable, and where the tail and the clean address go."""
        tail = self.block.tail_address, self.block.tail_seq
        if tail_seq is not None:
            tail = self.addresses.get(tail_seq, self.address), tail_seq
        if destaged:
            self.clean_address = self.durable_address
        self.block = dataclasses.replace(
            self.block,
            tail_address=tail[0],
            tail_seq=tail[1],
            clean_address=max(self.clean_address, tail[0]),
            durable_address=self.durable_address,
            durable_seq=self.durable_seq,
            clean=clean,
            generation=self.block.generation + 1,
        )
        for offset in (0, BLOCK):
            self.disk.write(offset, self.block.pack())
            self.disk.sync()
        return self.block


def fill(content: bytes) -> bytes:
    return (content * (BLOCK // len(content) + 1))[:BLOCK]


def new_cache(ring_blocks: int = 64) -> MemoryDisk:
    disk = MemoryDisk(ring_blocks)
    create(disk, UUID, IMAGE)
    return disk


def open_cache(ring_blocks: int = 64) -> tuple[MemoryDisk, Writer]:
    """A new cache, opened once."""
    disk = new_cache(ring_blocks)
    return disk, Writer(disk, recover(disk, None, BOOT, IMAGE, tier_uuid=TIER))


def contents(disk: MemoryDisk, records: Sequence[RecordFacts], ring_blocks: int) -> dict[int, bytes | None]:
    """Block -> what the log says it holds (None: zeroes)."""
    newest: dict[int, tuple[int, bytes | None]] = {}
    for record in records:
        address = record.address + record.header_blocks
        for word in record.extents:
            block, count, kind = split_extent(word)
            if kind > 2:
                continue
            for at in range(block, block + count):
                found: tuple[int, bytes | None] = (record.address, None)
                if kind == DATA:
                    offset = offset_bytes(address, ring_blocks)
                    found = (address, bytes(disk.data[offset : offset + BLOCK]))
                    address += 1
                if found[0] >= newest.get(at, (-1, None))[0]:
                    newest[at] = found
    return {block: content for block, (_, content) in newest.items()}
