"""The superblock: where the log begins, what of it is known to be safe, and whose it is.

Owns the layout of its 4096 bytes. There are two copies, in blocks 0 and 1 of the cache file, and they are written one
after the other with an fdatasync after each, so that one of them is always whole. The newer one counts; the older one
describes the same log with an older tail, which is why ring space is reused only below the tail of both.
It never does I/O.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from struct import Struct
from typing import Final

from crc32c import crc32c

from vhostcache.operations import BLOCK_BYTES

A_OFFSET_BYTES: Final = 0
B_OFFSET_BYTES: Final = BLOCK_BYTES
MAGIC: Final = b"vhcache\xe9"
VERSION: Final = 1
IDENTITY_BYTES: Final = 64
NO_TIER: Final = bytes(16)
"""The tier uuid of an opening that has no RAM-tier file: nothing acknowledged is missing from the log."""

WRITE_CACHE_OFF: Final = 0
WRITE_CACHE_ON: Final = 1
WRITE_CACHE_UNKNOWN: Final = 2

_FLAG_CLEAN: Final = 1
_FLAG_COLD: Final = 2

# magic, version, crc, uuid, generation | ring, epoch, open seq, tail address, tail seq, clean, durable address, durable
# seq | boot id, tier uuid, write cache, flags | backend size, mtime, identity's length, 0, identity |
# blocks of the read cache
_LAYOUT: Final = Struct(f"<8sII16sQ8Q16s16sIIQqII{IDENTITY_BYTES}sQ")
_CRC_BYTES: Final = 12


@dataclass(frozen=True)
class Superblock:
    uuid: bytes
    """Of the volume's cache: 16 bytes, in every record's magic and in the RAM-tier file."""
    backend_identity: bytes
    """What the image said it is, at most 64 bytes; empty: not known."""
    backend_size_bytes: int
    backend_mtime_ns: int
    ring_blocks: int
    epoch: int
    open_seq: int
    """The first record of this epoch."""
    tail_address: int
    tail_seq: int
    """The record at the tail; the next one to come when the log is empty."""
    clean_address: int
    """Everything below is on the backend."""
    durable_address: int
    durable_seq: int
    """The last record below the durable address."""
    boot_id: bytes = bytes(16)
    """Of the host's run in which this opening began."""
    tier_uuid: bytes = NO_TIER
    write_cache: int = WRITE_CACHE_UNKNOWN
    clean: bool = False
    """Closed in good order: all of the log is durable, and the RAM tier was empty."""
    cold: bool = False
    """Nothing cached may be believed: the image has been in other hands."""
    read_blocks: int = 0
    """Of the read cache, behind the ring. Programs that do not know the field leave it 0: there is none then."""
    generation: int = 1
    """Of two copies, the one with the larger number is newer."""

    def pack(self) -> bytes:
        """The block, 4096 bytes."""
        block = bytearray(BLOCK_BYTES)
        block[: _LAYOUT.size] = self._packed()
        return bytes(block)

    def words(self) -> list[int]:
        """The block as u64 words, without the zeroes at its end."""
        words = array("Q", self._packed()).tolist()
        while words[-1] == 0:
            words.pop()
        return words

    def _packed(self) -> bytes:
        assert len(self.uuid) == len(self.boot_id) == len(self.tier_uuid) == 16
        assert len(self.backend_identity) <= IDENTITY_BYTES
        packed = bytearray(
            _LAYOUT.pack(
                MAGIC,
                VERSION,
                0,
                self.uuid,
                self.generation,
                self.ring_blocks,
                self.epoch,
                self.open_seq,
                self.tail_address,
                self.tail_seq,
                self.clean_address,
                self.durable_address,
                self.durable_seq,
                self.boot_id,
                self.tier_uuid,
                self.write_cache,
                self.clean * _FLAG_CLEAN | self.cold * _FLAG_COLD,
                self.backend_size_bytes,
                self.backend_mtime_ns,
                len(self.backend_identity),
                0,
                self.backend_identity,
                self.read_blocks,
            )
        )
        crc = crc32c(bytes(BLOCK_BYTES - len(packed)), crc32c(packed))
        packed[_CRC_BYTES : _CRC_BYTES + 4] = crc.to_bytes(4, "little")
        return bytes(packed)


def unpack(data: bytes) -> Superblock | None:
    """The superblock in this block, or None: not one, of another version, or damaged."""
    if len(data) < BLOCK_BYTES or data[:8] != MAGIC:
        return None
    block = bytearray(data[:BLOCK_BYTES])
    block[_CRC_BYTES : _CRC_BYTES + 4] = bytes(4)
    (
        _,
        version,
        crc,
        uuid,
        generation,
        ring_blocks,
        epoch,
        open_seq,
        tail_address,
        tail_seq,
        clean_address,
        durable_address,
        durable_seq,
        boot_id,
        tier_uuid,
        write_cache,
        flags,
        size_bytes,
        mtime_ns,
        identity_bytes,
        _,
        identity,
        read_blocks,
    ) = _LAYOUT.unpack_from(data)
    if version != VERSION or crc32c(block) != crc:
        return None
    return Superblock(
        uuid=uuid,
        backend_identity=identity[:identity_bytes],
        backend_size_bytes=size_bytes,
        backend_mtime_ns=mtime_ns,
        ring_blocks=ring_blocks,
        epoch=epoch,
        open_seq=open_seq,
        tail_address=tail_address,
        tail_seq=tail_seq,
        clean_address=clean_address,
        durable_address=durable_address,
        durable_seq=durable_seq,
        boot_id=boot_id,
        tier_uuid=tier_uuid,
        write_cache=write_cache,
        clean=flags & _FLAG_CLEAN != 0,
        cold=flags & _FLAG_COLD != 0,
        read_blocks=read_blocks,
        generation=generation,
    )


def version_in(data: bytes) -> int | None:
    """The format version that this block claims, or None when it does not look like a superblock at all."""
    return int.from_bytes(data[8:12], "little") if data[:8] == MAGIC else None


def newest(a: Superblock | None, b: Superblock | None) -> Superblock | None:
    """The one that counts; of two equal ones the first."""
    if a is None or b is None:
        return a or b
    return b if b.generation > a.generation else a
