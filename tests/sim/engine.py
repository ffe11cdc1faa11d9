"""A simulated engine: executes operation words as csrc/engine.cdef says, over a simulated cache file and backend.

Owns the slab, the RAM tier's ring of entries, the crc table and the I/O in flight. I/O ends in any order, well or
badly, as the world decides. It asserts the contract: live tags, slots in range, bytes under a write unchanged until it
ends, no two overlapping writes in flight, no ring overflow. Data is passed on as references to immutable blocks, which
is what makes it fast.
"""

import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from crc32c import crc32c

from tests.sim.guest import Guest, Request
from tests.sim.medium import BLOCK, SECTOR, ZEROES, Crash, Medium
from vhostcache import operations as op
from vhostcache.log import format as log_format
from vhostcache.log import tier as log_tier

if TYPE_CHECKING:
    from vhostcache.log_volume import LogVolume

EIO: Final = 5
ENOSPC: Final = 28
EBADMSG: Final = 74
RING_BLOCK: Final = log_format.RING_OFFSET_BYTES // BLOCK

# Kinds of I/O: what it is on, and what it does.
CACHE_WRITE: Final = 0
CACHE_READ: Final = 1
CACHE_SYNC: Final = 2
BACKEND_WRITE: Final = 3
BACKEND_READ: Final = 4
BACKEND_SYNC: Final = 5
KIND_NAMES: Final = ("cache write", "cache read", "cache sync", "backend write", "backend read", "backend sync")
CRASHES: Final = (
    "crash in a log write",
    "crash in a log read",
    "crash in a cache sync",
    "crash in a destage",
    "crash in a backend read",
    "crash in a backend flush",
)


class Tier:
    """A RAM-tier file: the ring of entries, and the slots, which are the slab."""

    def __init__(self, capacity: int, slab: list[bytes], uuid: bytes, epoch: int) -> None:
        self.capacity = capacity
        self.slab = slab
        self.uuid = uuid
        self.epoch = epoch
        self.ring: list[tuple[int, int, int]] = [(0, 0, 0)] * capacity
        self.head = 0
        self.tail = 0

    def append(self, seq: int, word: int, slot: int) -> None:
        assert self.head - self.tail < self.capacity, "the RAM tier's ring overflows"
        self.ring[self.head % self.capacity] = (seq, word, slot)
        self.head += 1

    def file(self, volume_uuid: bytes, boot_id: bytes) -> bytes:
        """The file as it is on tmpfs, byte by byte."""
        layout = log_tier.TierLayout(len(self.slab), self.capacity)
        data = bytearray(layout.size_bytes)
        data[:BLOCK] = log_tier.pack_header(layout, volume_uuid, boot_id, self.uuid, self.epoch)
        struct.pack_into("<Q", data, log_tier.HEAD_OFFSET_BYTES, self.head)
        struct.pack_into("<Q", data, log_tier.TAIL_OFFSET_BYTES, self.tail)
        for index in range(max(0, self.head - self.capacity), self.head):
            offset = log_tier.entry_offset_bytes(layout, index)
            data[offset : offset + log_tier.ENTRY_BYTES] = log_tier.pack_entry(*self.ring[index % self.capacity])
        data[layout.slab_offset_bytes :] = b"".join(self.slab)
        return bytes(data)

    def found(self, volume_uuid: bytes, boot_id: bytes) -> "SlabTier":
        """What a new process reads in it, without the bytes in between."""
        entries = tuple(log_tier.TierEntry(*self.ring[i % self.capacity]) for i in range(self.tail, self.head))
        layout = log_tier.TierLayout(len(self.slab), self.capacity)
        found = SlabTier(volume_uuid, boot_id, self.uuid, self.epoch, layout, self.head, self.tail, entries)
        object.__setattr__(found, "slab", self.slab)
        return found


class SlabTier(log_tier.Tier):
    """As `tier.parse` makes it."""

    slab: list[bytes]

    def read_slot(self, slot: int) -> bytes:
        return self.slab[slot]


class Io:
    """One I/O in flight, of `count` blocks from `block` on."""

    __slots__ = (
        "block",
        "count",
        "covers",
        "data",
        "durable",
        "group",
        "kind",
        "payload",
        "size",
        "skip",
        "slots",
        "tag",
    )

    def __init__(self, kind: int, group: int, block: int, count: int) -> None:
        self.kind = kind
        self.group = group
        self.block = block
        self.count = count
        self.data: list[bytes] = []
        self.slots: list[int] = []
        self.covers: dict[int, bytes] = {}
        self.durable = False
        self.tag = -1
        self.payload = self.size = self.skip = 0

    def __repr__(self) -> str:
        return f"{KIND_NAMES[self.kind]} {self.block}+{self.count} group {self.group:#x}"


class LogRecord(NamedTuple):
    """A record as it was written, from `block` of the cache file on."""

    block: int
    count: int
    seq: int
    durable_seq: int
    data: list[bytes]


class Engine:
    """See the module. `countdown` operations more, then a Crash (negative: never)."""

    def __init__(
        self,
        rng: random.Random,
        guest: Guest,
        cache: Medium,
        backend: Medium,
        operations: list[int],
        tier: Tier,
        ring_blocks: int,
        positions: int = 0,
    ) -> None:
        self.rng = rng
        self.guest = guest
        self.cache = cache
        self.backend = backend
        self.operations = operations
        self.slab = tier.slab
        self.tier = tier
        self.ring_blocks = ring_blocks
        self.crcs = [0] * (ring_blocks + positions)
        self.positions = positions
        self.previous_crc = 0
        self.log_seq = 0
        self.io: list[Io] = []
        self.landed: list[Io] = []
        """Writes that have ended since the last turn."""
        self.group_pending: dict[int, int] = {}
        self.group_result: dict[int, int] = {}
        self.done: list[tuple[int, int]] = []
        """Groups to report in the next turn."""
        self.incoming: list[tuple[int, int, int, int]] = []
        self.sources: dict[int, Request] = {}
        """Slot -> the write whose payload was copied there, until it is published."""
        self.zeroed_parts: dict[int, tuple[int, int]] = {}
        """Slot -> what was zeroed in it last, until it is published: first sector, end."""
        self.countdown = -1
        self.deadline_ns = 0
        self.trace = False
        self.record_blocks = 1 << 20
        self.records: list[LogRecord] = []
        self.states: Counter[str] = Counter()
        self.loses: Callable[[int], None] = lambda block: None
        """Told of each block that the log is about to say is lost."""

    # --- the turn, as the daemon's loop has it ---

    def turn(self, volume: "LogVolume", now_ns: int) -> None:
        """Execute, report, and let the core think."""
        if self.operations:
            self.execute()
        if self.landed:
            for io in self.landed:
                (self.cache if io.kind == CACHE_WRITE else self.backend).reported.update(
                    zip(range(io.block, io.block + io.count), io.data, strict=True)
                )
            self.landed = []
        touched = bool(self.incoming or self.done)
        if self.incoming:
            columns = list(zip(*self.incoming, strict=True))
            self.incoming = []
            volume.requests(columns[0], columns[1], columns[2], columns[3], now_ns)
        if self.done:
            done, self.done = self.done, []
            for group, result in done:
                volume.io_done(group, result)
        if touched or now_ns >= self.deadline_ns:
            self.deadline_ns = volume.tick(now_ns)

    def submit(self, request: Request) -> None:
        """The guest puts it in its queue."""
        self.incoming.append(
            (request.kind | op.REQUEST_ALIGNED, self.guest.submit(request), request.sector, request.sectors)
        )
        if self.trace:
            print(f"    submit {request} tag {request.tag}")

    def forget_incoming(self) -> None:
        """Requests that the core has not seen go back to the front-end."""
        for _, tag, _, _ in self.incoming:
            self.guest.drop(tag)
        self.incoming = []

    # --- operations ---

    def execute(self) -> None:
        """The operation list, in order."""
        words = list(self.operations)
        self.operations.clear()
        stream = iter(words)
        slab, guest = self.slab, self.guest
        for word in stream:
            if self.countdown >= 0:
                self.countdown -= 1
                if self.countdown < 0:
                    if word & 255 == op.LOG1:
                        self._log1_in_part(word >> 8 & 0xFFFFFF, word >> 32)
                    raise Crash
            code, name, argument = word & 255, word >> 8 & 0xFFFFFF, word >> 32
            if self.trace:
                print(f"    op {_NAMES.get(code, code)} {name} {argument:#x}")
            if code == op.LOG1:
                request = guest.live[name]
                assert argument >= op.FIRST_SLOT
                assert len(request.data) == BLOCK
                assert request.sector % 8 == 0
                slab[argument] = request.data
                block = request.sector >> 3
                self.tier.append(self.log_seq, log_format.extent(block, 1, log_format.DATA), argument)
                guest.accept(request)
                guest.completed(name, op.STATUS_OK)
            elif code == op.OUT1:
                request = guest.live[name]
                assert request.sectors == 8
                request.payload = bytearray(slab[argument])
                guest.completed(name, op.STATUS_OK)
            elif code == op.COMPLETE:
                guest.completed(name, argument)
            elif code == op.IN1:
                request = guest.live[name]
                assert len(request.data) == BLOCK
                slab[argument] = request.data
                guest.completed(name, op.STATUS_OK)
            else:
                self._operation(code, name, argument, stream)

    def _log1_in_part(self, tag: int, slot: int) -> None:
        """The process dies in the middle of it."""
        request, choice = self.guest.live[tag], self.rng.random()
        if choice < 0.6:
            self.slab[slot] = request.data
        if choice < 0.3:
            self.tier.append(self.log_seq, log_format.extent(request.sector >> 3, 1, log_format.DATA), slot)
            self.guest.accept(request)

    def _operation(self, code: int, name: int, argument: int, words: Iterator[int]) -> None:
        if code in (op.IN, op.OUT):
            word, skip = next(words), next(words)
            slots = [next(words) for _ in range(argument)]
            self._copy(code == op.IN, self.guest.live[name], word & 0xFFFFFFFF, word >> 32, skip, slots)
        elif code == op.PUBLISH:
            self._publish(argument, words)
        elif code == op.LOG_WRITE:
            self._log_write(argument, words)
        elif code == op.LOG_FLUSH:
            io = Io(CACHE_SYNC, next(words), 0, 0)
            io.covers, self.cache.reported = self.cache.reported, {}
            self._begin(io)
        elif code == op.SUPERBLOCK:
            group, offset = next(words), next(words)
            data = struct.pack(f"<{argument}Q", *(next(words) for _ in range(argument)))
            assert len(data) <= BLOCK
            assert offset in (0, BLOCK)
            io = Io(CACHE_WRITE, group, offset // BLOCK, 1)
            io.data = [data + bytes(BLOCK - len(data))]
            self._begin(io)
        elif code == op.STORE:
            self._store_blocks(argument, words)
        elif code in (op.LOG_READ, op.LOG_READ_DIRECT):
            self._log_read(code, name, argument, words)
        elif code == op.LOG_SEQ:
            self.log_seq = next(words)
        elif code == op.RETIRE:
            tail = next(words)
            assert self.tier.tail <= tail <= self.tier.head
            self.tier.tail = tail
        elif code == op.DROP:
            self.guest.drop(name)
        elif code == op.SLOT_COPY:
            self._store(next(words), 0, self.slab[argument])
        elif code == op.SLOT_ZERO:
            word = next(words)
            offset, size = word & 0xFFFFFFFF, word >> 32
            self._store(argument, offset, bytes(size))
            self.zeroed_parts[argument] = (offset // SECTOR, (offset + size) // SECTOR)
        else:
            self._backend_operation(code, name, argument, words)

    def _backend_operation(self, code: int, name: int, argument: int, words: Iterator[int]) -> None:
        if code in (op.READ, op.WRITE):
            group, offset, size = next(words), next(words), next(words)
            slots = [next(words) for _ in range(argument)]
            assert group >> 32 == 0
            assert offset % BLOCK == 0
            assert (argument - 1) * BLOCK < size <= argument * BLOCK
            assert offset + size <= self.guest.size_sectors * SECTOR
            io = Io(BACKEND_WRITE if code == op.WRITE else BACKEND_READ, group, offset // BLOCK, argument)
            io.slots = slots
            self.states["blocks are destaged" if code == op.WRITE else "a fill"] += 1
            if code == op.WRITE:
                io.data = [self.slab[slot] for slot in slots]
                if size % BLOCK:
                    io.slots = slots[:-1]
                    io.data[-1] = io.data[-1][: size % BLOCK] + bytes(BLOCK - size % BLOCK)
            self._begin(io)
        elif code == op.READ_DIRECT:
            word, offset, size = next(words), next(words), next(words)
            first, end = offset // BLOCK, -(-(offset + size) // BLOCK)
            io = Io(BACKEND_READ, op.FAILED_TAG | name if argument else word & 0xFFFFFFFF, first, end - first)
            io.tag, io.payload, io.size, io.skip = name, word >> 32, size, offset - first * BLOCK
            assert io.payload + size <= len(self.guest.live[name].payload)
            self.states["the backend is read into guest memory"] += 1
            self._begin(io)
        elif code == op.FLUSH:
            assert not any(io.kind == BACKEND_SYNC for io in self.io), "two backend flushes at once"
            io = Io(BACKEND_SYNC, next(words), 0, 0)
            io.covers, self.backend.reported = self.backend.reported, {}
            self._begin(io)
        elif code == op.ZERO:
            group, offset, size = next(words), next(words), next(words)
            assert offset % BLOCK == 0
            count = -(-size // BLOCK)
            io = Io(BACKEND_WRITE, group, offset // BLOCK, count)
            assert offset + size <= self.guest.size_sectors * SECTOR
            assert size % BLOCK == 0 or offset + size == self.guest.size_sectors * SECTOR
            io.data = [ZEROES] * count
            self.states["zeroes are destaged"] += 1
            self._begin(io)
        else:
            raise AssertionError(f"unknown operation {code}")

    def _copy(self, into_slots: bool, request: Request, payload: int, size: int, skip: int, slots: list[int]) -> None:
        assert skip < BLOCK
        assert (len(slots) - 1) * BLOCK < skip + size <= len(slots) * BLOCK
        slab = self.slab
        if into_slots:
            assert request.kind == op.REQUEST_WRITE
            data = request.data
            assert payload + size <= len(data)
            self.sources.update(dict.fromkeys(slots, request))
            for slot in slots:
                part = min(size, BLOCK - skip)
                if part == BLOCK:
                    assert slot >= op.FIRST_SLOT
                    slab[slot] = data if len(data) == BLOCK else data[payload : payload + BLOCK]
                else:
                    self._store(slot, skip, data[payload : payload + part])
                    self.sources[slot] = request
                payload += part
                size -= part
                skip = 0
            return
        assert request.kind == op.REQUEST_READ
        target = request.payload
        assert payload + size <= len(target)
        for slot in slots:
            assert slot > 0
            part = min(size, BLOCK - skip)
            target[payload : payload + part] = slab[slot] if part == BLOCK else slab[slot][skip : skip + part]
            payload += part
            size -= part
            skip = 0

    def _store(self, slot: int, offset: int, data: bytes) -> None:
        assert slot >= op.FIRST_SLOT
        assert offset + len(data) <= BLOCK
        old = self.slab[slot]
        self.sources.pop(slot, None)
        self.slab[slot] = data if len(data) == BLOCK else old[:offset] + data + old[offset + len(data) :]

    # --- the RAM tier ---

    def _publish(self, count: int, words: Iterator[int]) -> None:
        seq = next(words)
        data: dict[int, bytes] = {}
        zeroed: set[int] = set()
        found: set[Request] = set()
        parts: set[tuple[int, int, int]] = set()
        for _ in range(count):
            word, slot = next(words), next(words)
            block, blocks, kind = log_format.split_extent(word)
            assert blocks > 0
            assert block + blocks <= self.guest.blocks
            if kind == log_format.DATA:
                assert blocks == 1
                assert slot >= op.FIRST_SLOT
                data[block] = self.slab[slot]
                if slot in self.sources:
                    found.add(self.sources.pop(slot))
                elif slot in self.zeroed_parts:
                    parts.add((block, *self.zeroed_parts.pop(slot)))
                zeroed.discard(block)
            elif kind == log_format.LOST:
                assert slot == 0
                assert count == 1, "nothing else is published with a loss"
                self.states["a loss is noted in the log"] += 1
                self.loses(block)
                self.tier.append(seq, word, slot)
                return
            else:
                assert kind in (log_format.ZERO, log_format.DISCARD)
                assert slot == 0
                zeroed.update(range(block, block + blocks))
                for b in range(block, block + blocks):
                    data.pop(b, None)
            self.tier.append(seq, word, slot)
        self.guest.published(data, zeroed, found, parts)

    # --- the log ---

    def _log_write(self, count: int, words: Iterator[int]) -> None:
        word, offset, headers, length = next(words), next(words), next(words), next(words)
        header_words = [next(words) for _ in range(length)]
        slots = [next(words) for _ in range(count)]
        group, repeat, durable = word & 0xFFFFFFFF, word >> 32 & 1, word >> 33
        header_slots = [slot for slot in (headers & 0xFFFFFFFF, headers >> 32) if slot]
        assert header_slots
        payload = [self.slab[slot] for slot in slots]
        if not repeat:
            header, self.previous_crc = log_format.compose(header_words, self.previous_crc, payload)
            assert len(header) == len(header_slots) * BLOCK
            for i, slot in enumerate(header_slots):
                assert slot >= op.FIRST_SLOT
                self.slab[slot] = header[i * BLOCK : (i + 1) * BLOCK]
            self._remember_crcs(header, header_words, offset, len(header_slots), count)
            states = self.states
            if header_words[5] >> 32 & log_format.FLAG_PAD:
                states["the log wraps"] += 1
            elif not count:
                states["a record of zeroes only"] += 1
            elif count > self.record_blocks:
                states["a request with a record of its own"] += 1
            if any(other.kind == CACHE_WRITE for other in self.io):
                states["several records in flight"] += 1
        else:
            assert length == 0
            self.states["a record is written again"] += 1
        io = Io(CACHE_WRITE, group, offset // BLOCK, len(header_slots) + count)
        assert offset % BLOCK == 0
        assert io.block >= RING_BLOCK
        assert io.block + io.count <= RING_BLOCK + self.ring_blocks, "a record beyond the ring's end"
        io.slots = header_slots + slots
        io.data = [self.slab[slot] for slot in io.slots]
        io.durable = bool(durable)
        if durable:
            self.states["a record that is durable by itself"] += 1
        if repeat:
            first = next(record for record in reversed(self.records) if record.block == io.block)
            assert all(a is b for a, b in zip(io.data, first.data, strict=True)), "not what was written the first time"
        else:
            self.records.append(LogRecord(io.block, io.count, header_words[2], header_words[6], io.data))
        self._begin(io)

    def _remember_crcs(self, header: bytes, words: list[int], offset: int, headers: int, count: int) -> None:
        """The crcs stand right behind the extents."""
        position = offset // BLOCK - RING_BLOCK + headers
        extents = words[5] & 0xFFFFFFFF
        self.crcs[position : position + count] = struct.unpack_from(f"<{count}I", header, 64 + 8 * extents)

    def _store_blocks(self, count: int, words: Iterator[int]) -> None:
        group, offset = next(words), next(words)
        io = Io(CACHE_WRITE, group, offset // BLOCK, count)
        io.slots = [next(words) for _ in range(count)]
        io.data = [self.slab[slot] for slot in io.slots]
        first = io.block - RING_BLOCK
        assert self.ring_blocks <= first <= first + count <= self.ring_blocks + self.positions
        assert not any(other.kind == CACHE_READ and _overlap(io, other) for other in self.io)
        self.crcs[first : first + count] = [crc32c(data) for data in io.data]
        self.states["blocks go to the read cache"] += 1
        self._begin(io)

    def _log_read(self, code: int, name: int, count: int, words: Iterator[int]) -> None:
        word, offset = next(words), next(words)
        direct = code == op.LOG_READ_DIRECT
        size = next(words) if direct else count * BLOCK
        assert offset % BLOCK == 0
        assert size % BLOCK == 0
        assert size > 0
        io = Io(CACHE_READ, word & 0xFFFFFFFF, offset // BLOCK, size // BLOCK)
        assert io.block >= RING_BLOCK
        in_ring = io.block < RING_BLOCK + self.ring_blocks
        end = RING_BLOCK + self.ring_blocks + (0 if in_ring else self.positions)
        assert io.block + io.count <= end, "a log read beyond the ring's end"
        if not in_ring:
            self.states["the read cache is read"] += 1
            assert not any(other.kind == CACHE_WRITE and _overlap(io, other) for other in self.io)
        if direct:
            io.tag, io.payload, io.size = name, word >> 32, size
            assert io.payload + size <= len(self.guest.live[name].payload)
        else:
            assert word >> 32 == 0
            io.slots = [next(words) for _ in range(count)]
        self.states["the log is read into guest memory" if direct else "the log is read"] += 1
        self._begin(io)

    # --- I/O ---

    def _begin(self, io: Io) -> None:
        assert io.group < op.GROUPS or io.group & op.FAILED_TAG
        self.group_pending[io.group] = self.group_pending.get(io.group, 0) + 1
        if io.kind in (CACHE_WRITE, BACKEND_WRITE):
            for other in self.io:
                if other.kind == io.kind and other.block < io.block + io.count and io.block < other.block + other.count:
                    raise AssertionError(f"two writes of the same range in flight: {io}, {other}")
        elif io.kind == CACHE_SYNC:
            assert not any(other.kind == CACHE_SYNC for other in self.io), "two cache syncs at once"
        self.io.append(io)

    def end_io(self, index: int, fail: int = 0) -> None:
        """One I/O ends, well or badly (an errno); the core hears of it in the next turn."""
        io = self.io[index]
        self.io[index] = self.io[-1]
        self.io.pop()
        result = -fail
        if self.trace:
            print(f"    end {io} {result}")
        kind = io.kind
        if kind in (CACHE_WRITE, BACKEND_WRITE):
            for slot, data in zip(io.slots, io.data, strict=False):
                assert self.slab[slot] is data, f"slot {slot} changes while it is being written: {io}"
            self.land(io, bool(fail))
            if io.durable:
                if fail:
                    # As a failed sync: of what was written before, some may be lost.
                    covers, self.cache.reported = self.cache.reported, {}
                    self.cache.sync_failed(covers)
                    for other in self.io:
                        if other.kind == CACHE_SYNC:
                            self.cache.sync_failed(other.covers)
                else:
                    self.cache.synced(dict(zip(range(io.block, io.block + io.count), io.data, strict=True)))
            if kind == CACHE_WRITE and io.block == 1 and not fail:
                self.states["checkpoint"] += 1
        elif kind in (CACHE_READ, BACKEND_READ):
            if not fail:
                result = self._read(io)
        elif kind == CACHE_SYNC:
            (self.cache.sync_failed if fail else self.cache.synced)(io.covers)
        else:
            (self.backend.sync_failed if fail else self.backend.synced)(io.covers)
        group = io.group
        if result:
            self.group_result[group] = result
        self.group_pending[group] -= 1
        if not self.group_pending[group]:
            del self.group_pending[group]
            result = self.group_result.pop(group, 0)
            if group & op.FAILED_TAG and not result:
                self.guest.completed(io.tag, op.STATUS_OK)
            else:
                self.done.append((group, result))

    def land(self, io: Io, torn: bool) -> None:
        """A write reaches the device, or parts of it do."""
        medium = self.cache if io.kind == CACHE_WRITE else self.backend
        if not torn:
            for block, data in enumerate(io.data, io.block):
                medium.land(block, data)
            self.landed.append(io)
            return
        for block, data in enumerate(io.data, io.block):
            choice = self.rng.random()
            if choice < 0.3:
                medium.land(block, data)
            elif choice < 0.5:
                medium.land(block, medium.tear(block, data))

    def _read(self, io: Io) -> int:
        medium = self.cache if io.kind == CACHE_READ else self.backend
        blocks = medium.live[io.block : io.block + io.count]
        if io.kind == CACHE_READ:
            if any(io.block <= block < io.block + io.count for block in self.cache.bad):
                self.states["a bad sector is read"] += 1
                return -EIO
            position = io.block - RING_BLOCK
            for crc, data in zip(self.crcs[position : position + io.count], blocks, strict=True):
                if crc32c(data) != crc:
                    return -EBADMSG
        if io.tag >= 0:
            data = blocks[0] if io.count == 1 else b"".join(blocks)
            self.guest.live[io.tag].payload[io.payload : io.payload + io.size] = data[io.skip : io.skip + io.size]
            return 0
        for slot, data in zip(io.slots, blocks, strict=True):
            assert slot >= op.FIRST_SLOT
            self.slab[slot] = data
        return 0

    def die(self) -> None:
        """The process ends: each I/O in flight may still land, or a part of it, and nothing after that."""
        for io in self.io:
            self.states["crash in a checkpoint" if io.kind == CACHE_WRITE and io.block < 2 else CRASHES[io.kind]] += 1
            if io.kind in (CACHE_WRITE, BACKEND_WRITE):
                choice = self.rng.random()
                if choice < 0.4:
                    self.land(io, torn=False)
                elif choice < 0.7:
                    self.land(io, torn=True)
        self.io = []
        self.landed = []
        self.forget_incoming()


def _overlap(io: Io, other: Io) -> bool:
    return io.block < other.block + other.count and other.block < io.block + io.count


_NAMES: Final = {
    value: name
    for name, value in vars(op).items()
    if isinstance(value, int) and not name.startswith(("REQUEST", "STATUS", "SECTOR", "BLOCK", "FIRST", "GROUPS", "_"))
}
