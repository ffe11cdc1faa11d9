"""A simulated engine, guest and backend around the real core, with an oracle.

The engine executes operation lists exactly as csrc/engine.cdef says and asserts the contract: live tags, groups in
flight once, slots in range, bytes under a backend write unchanged until it ends. I/O ends in any order, or fails, as
the caller decides. A failed backend flush loses the writes it should have covered, as a page cache does; zeroed ranges
(metadata) still read as zeroes, but are no more durable than the writes.

Oracle, per 512-byte sector: a read may return any value that a write in flight during the read gave it, or the newest
completed one (several if they were concurrent). A completed flush has made one of those durable.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from vhostcache import operations as op
from vhostcache.guest_requests import VolumeSettings
from vhostcache.map import Map
from vhostcache.volume import Volume

SECTOR = op.SECTOR_BYTES
BLOCK = op.BLOCK_BYTES
EIO = 5
CHANGES = (op.WRITE, op.ZERO, op.WRITE_DIRECT)


def sector_bytes(value: int) -> bytes:
    return struct.pack("<Q", value) * (SECTOR // 8)


def sector_value(data: bytes | bytearray | memoryview) -> int:
    """The value a sector holds; -1 for a torn one."""
    values = set(struct.unpack(f"<{SECTOR // 8}Q", data))
    return values.pop() if len(values) == 1 else -1


@dataclass
class Request:
    kind: int
    sector: int
    sectors: int
    payload: bytearray = field(repr=False)
    values: list[int] = field(default_factory=list, repr=False)
    allowed: list[set[int]] = field(default_factory=list, repr=False)
    concurrent: dict[int, set[int]] = field(default_factory=dict, repr=False)
    """Sector -> values of other changes in flight at the same time as this one."""


@dataclass
class Io:
    kind: int
    group: int
    offset: int
    size: int
    slots: list[int]
    snapshot: bytes = b""
    tag: int = 0
    payload: int = 0
    covers: dict[int, int] = field(default_factory=dict)
    """Of a flush: sector -> value."""


class Backend:
    """Sectors, volatile and durable."""

    def __init__(self, sectors: int) -> None:
        self.volatile = [0] * sectors
        self.durable = [0] * sectors
        self.unflushed: set[int] = set()
        self.zeroed: set[int] = set()
        self.past_ram: set[int] = set()

    def store(self, sector: int, value: int, zeroes: bool = False, past_ram: bool = False) -> None:
        self.volatile[sector] = value
        self.unflushed.add(sector)
        (self.zeroed.add if zeroes else self.zeroed.discard)(sector)
        (self.past_ram.add if past_ram else self.past_ram.discard)(sector)


class Harness:
    def __init__(
        self,
        size_sectors: int = 8 * 48 + 3,
        slots: int = 3 + 24,
        object_blocks: int = 8,
        groups: int = 64,
        acknowledge_durable: bool = False,
        fill_blocks: int = 1,
        direct_blocks: int = 32,
        timeout_ns: int = 0,
        readahead_blocks: int = 0,
        can_abandon: bool = False,
    ) -> None:
        self.size_sectors = size_sectors
        self.operations: list[int] = []
        self.volume = Volume(
            VolumeSettings(
                index=0,
                size_bytes=size_sectors * SECTOR,
                object_bytes=object_blocks * BLOCK,
                slots=slots,
                acknowledge_durable=acknowledge_durable,
                fill_bytes=fill_blocks * BLOCK,
                destage_after_ns=1000,
                direct_bytes=direct_blocks * BLOCK,
                backend_timeout_ns=timeout_ns,
                readahead_bytes=readahead_blocks * BLOCK,
                can_abandon=can_abandon,
            ),
            self.operations,
            groups=groups + 64,
        )
        self.slab = bytearray(slots * BLOCK)
        self.backend = Backend(size_sectors)
        self.io: list[Io] = []
        self.group_pending: dict[int, int] = {}
        self.group_result: dict[int, int] = {}
        self.live: dict[int, Request] = {}
        self.possible: list[set[int]] = [{0} for _ in range(size_sectors)]
        self.next_value = 1
        self.next_tag = 1
        self.now_ns = 1
        self.fail_next = 0
        self.incoming: list[tuple[int, int, int, int]] = []
        self.completed = 0
        self.errors = 0
        self.dropped: list[Request] = []

    @property
    def map(self) -> Map:
        return self.volume._map

    # --- the guest ---

    def submit(self, kind: int, sector: int = 0, sectors: int = 0, flags: int = 0) -> int:
        tag = self.next_tag
        self.next_tag = tag % 10000 + 1
        assert tag not in self.live
        request = Request(kind, sector, sectors, bytearray(sectors * SECTOR))
        covered = range(sector, sector + sectors)
        if kind == op.REQUEST_WRITE:
            request.values = list(range(self.next_value, self.next_value + sectors))
            self.next_value += sectors
            request.payload[:] = b"".join(map(sector_bytes, request.values))
        elif kind in (op.REQUEST_ZERO, op.REQUEST_ZERO_UNMAP, op.REQUEST_DISCARD):
            request.values = [0] * sectors
        elif kind == op.REQUEST_READ:
            request.allowed = [set(self.possible[s]) for s in covered]
        elif kind == op.REQUEST_FLUSH:
            request.allowed = [set(values) for values in self.possible]
        if request.values:
            self._changes_begin(request, covered)
        self.live[tag] = request
        self.incoming.append((kind | flags | op_flag_aligned, tag, sector, sectors))
        return tag

    def _changes_begin(self, request: Request, covered: range) -> None:
        for other in self.live.values():
            shared = range(max(covered.start, other.sector), min(covered.stop, other.sector + other.sectors))
            for s in shared if other.values else ():
                mine, its = request.values[s - request.sector], other.values[s - other.sector]
                request.concurrent.setdefault(s, set()).add(its)
                other.concurrent.setdefault(s, set()).add(mine)
            if other.allowed:
                seen = covered if other.kind == op.REQUEST_FLUSH else shared
                for s in seen:
                    other.allowed[s - other.sector].add(request.values[s - request.sector])
        for s, value in zip(covered, request.values, strict=True):
            self.possible[s].add(value)

    def _completed(self, tag: int, status: int) -> None:
        request = self.live.pop(tag)
        self.completed += 1
        covered = range(request.sector, request.sector + request.sectors)
        if status != op.STATUS_OK:
            self.errors += 1
            return
        if request.values:
            for s, value in zip(covered, request.values, strict=True):
                self.possible[s] = {value} | request.concurrent.get(s, set())
        elif request.kind == op.REQUEST_READ:
            for i, s in enumerate(covered):
                value = sector_value(request.payload[i * SECTOR : (i + 1) * SECTOR])
                assert value in request.allowed[i], f"sector {s} reads {value}, allowed {request.allowed[i]}"
        elif request.kind == op.REQUEST_FLUSH:
            self.check_durable(request.allowed)

    def check_durable(self, allowed: list[set[int]]) -> None:
        for s, value in enumerate(self.backend.durable):
            assert value in allowed[s], f"sector {s} is durable as {value}, allowed {allowed[s]}"

    # --- the engine ---

    def turn(self) -> None:
        """What the daemon does in a turn: requests, tick, operations."""
        self.turn_until()

    def turn_until(self) -> int:
        """The same; returns when the core wants the next one."""
        if self.incoming:
            columns = list(zip(*self.incoming, strict=True))
            self.incoming = []
            self.volume.requests(*columns, self.now_ns)
        deadline_ns = self.volume.tick(self.now_ns)
        self.execute()
        return max(deadline_ns, self.now_ns)

    def advance(self, duration_ns: int) -> None:
        self.now_ns += duration_ns

    def execute(self) -> None:
        words = iter(list(self.operations))
        self.operations.clear()
        for word in words:
            self._operation(word & 255, word >> 8 & 0xFFFFFF, word >> 32, words)

    def _operation(self, code: int, name: int, argument: int, words: Iterator[int]) -> None:
        if code in (op.IN1, op.OUT1):
            request = self.live[name]
            assert request.sectors == 8
            self._copy(code == op.IN1, request, 0, BLOCK, 0, [argument])
            self._completed(name, op.STATUS_OK)
        elif code in (op.IN, op.OUT):
            word, skip = next(words), next(words)
            slots = [next(words) for _ in range(argument)]
            self._copy(code == op.IN, self.live[name], word & 0xFFFFFFFF, word >> 32, skip, slots)
        elif code == op.COMPLETE:
            self._completed(name, argument)
        elif code == op.DROP:
            self.dropped.append(self.live.pop(name))
        elif code == op.SLOT_COPY:
            target = next(words)
            assert target >= op.FIRST_SLOT
            self._slab_write(target, 0, bytes(self.slab[argument * BLOCK : (argument + 1) * BLOCK]))
        elif code == op.SLOT_ZERO:
            word = next(words)
            self._slab_write(argument, word & 0xFFFFFFFF, bytes(word >> 32))
        elif code in (op.READ, op.WRITE):
            group, offset, size = next(words), next(words), next(words)
            assert group >> 32 == 0
            slots = [next(words) for _ in range(argument)]
            assert (argument - 1) * BLOCK < size <= argument * BLOCK
            assert offset + size <= self.size_sectors * SECTOR
            snapshot = self._gather(slots, size) if code == op.WRITE else b""
            self._begin_io(Io(code, group, offset, size, slots, snapshot))
        elif code == op.READ_DIRECT and argument:
            word, offset, size = next(words), next(words), next(words)
            assert size == len(self.live[name].payload)
            self._begin_io(Io(code, op.FAILED_TAG | name, offset, size, [], tag=name))
        elif code == op.WRITE_DIRECT:
            group, offset, size = next(words), next(words), next(words)
            assert size == len(self.live[name].payload)
            assert offset == self.live[name].sector * SECTOR
            self._begin_io(Io(code, group, offset, size, [], snapshot=bytes(self.live[name].payload), tag=name))
        elif code == op.READ_DIRECT:
            word, offset, size = next(words), next(words), next(words)
            assert (word >> 32) + size <= len(self.live[name].payload)
            self._begin_io(Io(code, word & 0xFFFFFFFF, offset, size, [], tag=name, payload=word >> 32))
        elif code == op.FLUSH:
            assert not any(io.kind == op.FLUSH for io in self.io), "two backend flushes at once"
            covers = {s: self.backend.volatile[s] for s in self.backend.unflushed}
            self._begin_io(Io(code, next(words), 0, 0, [], covers=covers))
            self.backend.unflushed = set()
        elif code == op.ZERO:
            self._begin_io(Io(code, next(words), next(words), next(words), []))
        else:
            raise AssertionError(f"unknown operation {code}")

    def _begin_io(self, io: Io) -> None:
        assert io.group < op.GROUPS or io.group & op.FAILED_TAG
        self.group_pending[io.group] = self.group_pending.get(io.group, 0) + 1
        if io.kind in CHANGES:
            for other in self.io:
                overlap = other.offset < io.offset + io.size and io.offset < other.offset + other.size
                assert not (overlap and other.kind in CHANGES), "two writes of the same range in flight"
        self.io.append(io)

    def _gather(self, slots: list[int], size: int) -> bytes:
        return b"".join(bytes(self.slab[s * BLOCK : (s + 1) * BLOCK]) for s in slots)[:size]

    def _slab_write(self, slot: int, offset: int, data: bytes) -> None:
        assert offset + len(data) <= BLOCK
        self.slab[slot * BLOCK + offset : slot * BLOCK + offset + len(data)] = data

    def _copy(self, into_slots: bool, request: Request, payload: int, size: int, skip: int, slots: list[int]) -> None:
        assert payload + size <= len(request.payload)
        assert skip < BLOCK
        assert (len(slots) - 1) * BLOCK < skip + size <= len(slots) * BLOCK
        assert request.kind == (op.REQUEST_WRITE if into_slots else op.REQUEST_READ)
        for slot in slots:
            assert slot >= op.FIRST_SLOT
            part = min(size, BLOCK - skip)
            if into_slots:
                self._slab_write(slot, skip, bytes(request.payload[payload : payload + part]))
            else:
                request.payload[payload : payload + part] = self.slab[slot * BLOCK + skip : slot * BLOCK + skip + part]
            payload += part
            size -= part
            skip = 0

    # --- the backend ---

    def end_io(self, index: int, fail: bool = False, errno: int = EIO) -> None:
        """One I/O ends, well or badly; the caller chooses which."""
        io = self.io.pop(index % len(self.io))
        first, count = io.offset // SECTOR, io.size // SECTOR
        if io.kind == op.WRITE_DIRECT:
            for i in range(count // 2 if fail else count):
                self.backend.store(
                    first + i, sector_value(io.snapshot[i * SECTOR : (i + 1) * SECTOR]), past_ram=not fail
                )
        elif io.kind == op.WRITE:
            assert io.snapshot == self._gather(io.slots, io.size), "a block changed while it was being written"
            for i in range(count // 2 if fail else count):
                self.backend.store(first + i, sector_value(io.snapshot[i * SECTOR : (i + 1) * SECTOR]))
        elif io.kind == op.ZERO:
            for s in range(first, first + (count // 2 if fail else count)):
                self.backend.store(s, 0, zeroes=True)
        elif io.kind in (op.READ, op.READ_DIRECT) and not fail:
            data = b"".join(sector_bytes(self.backend.volatile[s]) for s in range(first, first + count))
            if io.kind == op.READ:
                for i, slot in enumerate(io.slots):
                    self._slab_write(slot, 0, data[i * BLOCK : (i + 1) * BLOCK])
            else:
                self.live[io.tag].payload[io.payload : io.payload + io.size] = data
        elif io.kind == op.FLUSH:
            self._end_flush(io, fail)
        if fail:
            self.group_result[io.group] = -errno
        self.group_pending[io.group] -= 1
        if not self.group_pending[io.group]:
            del self.group_pending[io.group]
            if io.group & op.FAILED_TAG and not fail:
                self._completed(io.tag, op.STATUS_OK)
                return
            self.volume.io_done(io.group, self.group_result.pop(io.group, 0))

    def _end_flush(self, io: Io, fail: bool) -> None:
        for s, value in io.covers.items():
            if not fail:
                self.backend.durable[s] = value
            elif s not in self.backend.unflushed and s not in self.backend.zeroed:
                self._lose(s)

    def _lose(self, sector: int) -> None:
        """A write that RAM has no copy of any more: the flush that fails tells the guest."""
        old = self.backend.volatile[sector] = self.backend.durable[sector]
        past_ram = sector in self.backend.past_ram
        if past_ram:
            self.possible[sector].add(old)
        # What the backend is being asked for while it loses what it had not flushed may be what was there before:
        # docs/ARCHITECTURE.md says so. It is not known here which of the reads under way that is.
        reads = [io for io in self.io if io.kind in (op.READ, op.READ_DIRECT)]
        being_read = any(io.offset <= sector * SECTOR < io.offset + io.size for io in reads)
        if not (past_ram or being_read):
            return
        for request in self.live.values():
            if request.allowed and request.kind == op.REQUEST_FLUSH:
                if past_ram:
                    request.allowed[sector].add(old)
            elif request.allowed and request.sector <= sector < request.sector + request.sectors:
                request.allowed[sector - request.sector].add(old)

    # --- the front-end leaves and comes back ---

    def reconnect(self) -> int:
        """The connection breaks: everything is settled, then the front-end submits again what was not answered; returns
        how many."""
        self.volume.quiesce(may_drop=True)
        self.execute()
        # The engine has requests that the core has not seen: it forgets them.
        for _, tag, _, _ in self.incoming:
            self.dropped.append(self.live.pop(tag))
        self.incoming = []
        for _ in range(10_000):
            if not self.live:
                break
            if self.io:
                self.end_io(0)
            self.turn()
        assert not self.live, "requests that a dropped connection can't settle"
        self.volume.disconnected()
        self.volume.connected()
        again, self.dropped = self.dropped, []
        for request in again:
            self.live[self.next_tag] = request
            self.incoming.append((request.kind | op_flag_aligned, self.next_tag, request.sector, request.sectors))
            self.next_tag += 1
        return len(again)

    # --- the end ---

    def settle(self) -> None:
        """Let everything come to its end without faults, then compare the backend with what the guest may expect."""
        self.volume.drain()
        for _ in range(20_000):
            self.turn()
            if self.io:
                self.end_io(0)
            elif self.volume.drained and not self.live and not self.incoming:
                break
            else:
                self.advance(10_000_000_000)
        else:
            raise AssertionError(f"does not come to rest: {self.live}, {self.volume.statistics()}")
        self.check_durable(self.possible)
        self.map.check()
        assert self.volume._io.in_flight == 0


op_flag_aligned = 256
