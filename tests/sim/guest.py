"""The guest and the oracle: what it has asked for, what it may see, and what must still be there.

Owns the order of acceptance: a change is accepted at the moment the engine publishes it in the RAM tier. The content of
each block published must be exactly what the newest content with that request on top of it gives, whole requests at
once; so the order is known, and everything else follows from it:
- a read returns, for each sector, a value that it had between the read's submission and its answer;
- after the death of the process everything accepted and answered is there (promise 1);
- after a power loss the whole disk is the state after some prefix of the order, which reaches at least to the last
  answered flush, or the last write answered in write-through (promise 2).
It never looks into the core.
"""

import struct
from collections.abc import Callable
from typing import Final

from tests.sim.medium import BLOCK, SECTOR, ZEROES
from vhostcache import operations as op

SECTORS: Final = BLOCK // SECTOR
_TAILS: Final = [struct.pack("<Q", s + 1) * (SECTOR // 8 - 1) for s in range(1024)]
ZERO_KINDS: Final = (op.REQUEST_DISCARD, op.REQUEST_ZERO, op.REQUEST_ZERO_UNMAP)


class Wrong(AssertionError):  # noqa: N818 - it is what the oracle says
    """A promise is broken."""


class Request:
    """One virtio-blk request; it lives until it is answered, over connections and processes."""

    __slots__ = (
        "accepted",
        "answered",
        "data",
        "durable",
        "failed",
        "index",
        "kind",
        "payload",
        "pieces",
        "sector",
        "sectors",
        "serial",
        "since",
        "tag",
    )

    def __init__(self, kind: int, sector: int, sectors: int, serial: int) -> None:
        self.kind = kind
        self.sector = sector
        self.sectors = sectors
        self.serial = serial
        self.tag = 0
        self.accepted = False
        """Of a change: since it was submitted last."""
        self.answered = False
        self.failed = False
        self.index = 0
        """Its place in the order of acceptance, when it was accepted last."""
        self.since = 0
        """Of a read: changes accepted when it was submitted. Of a flush: what it has to make durable."""
        self.durable = False
        """Submitted when the guest believed in write-through."""
        self.data = b""
        self.payload = bytearray()
        self.pieces: list[tuple[int, int, int, bytes]] = []
        """Of a change: (block, first sector in it, end, content)."""

    def __repr__(self) -> str:
        names = {0: "read", 1: "write", 2: "flush", 3: "discard", 4: "zero", 5: "zero-unmap"}
        where = f" {self.sector}+{self.sectors}" if self.sectors else ""
        aligned = "" if (self.sector | self.sectors) % 8 else f" (blocks {self.sector // 8}+{self.sectors // 8})"
        return f"{names[self.kind]}#{self.serial}{where}{aligned if where else ''}"


class Guest:
    """See the module; `size_sectors` need not be whole blocks, the rest of the last block is zeroes."""

    def __init__(self, size_sectors: int) -> None:
        self.size_sectors = size_sectors
        self.blocks = -(-size_sectors // SECTORS)
        self.live: dict[int, Request] = {}
        """Requests the engine has, by tag."""
        self.homeless: list[Request] = []
        """Not answered, to be submitted to the next connection."""
        self.base = [ZEROES] * self.blocks
        self.state = list(self.base)
        """After everything accepted."""
        self.accepted: list[list[tuple[int, bytes]]] = []
        """In order: (block, new content)."""
        self.history: list[list[tuple[int, bytes]]] = [[(0, ZEROES)] for _ in range(self.blocks)]
        """Block -> (accepted changes, content then on)."""
        self.floor = 0
        """So many accepted changes have been promised to survive a power loss."""
        self.answered = 0
        """All answered changes are among the first so many accepted."""
        self.timeline: list[list[tuple[int, bytes]]] = []
        """All changes that went before `base`, since the disk was made: those that power losses have taken are not
        among them."""
        self.raised: list[tuple[int, int]] = []
        """Each time when the floor was raised: the new one, and how many changes were accepted then, in the whole
        timeline."""
        self.write_through = False
        self.unsafe = False
        """Flushes promise nothing."""
        self.errors_allowed = False
        self.may_fail: Callable[[Request], bool] = lambda request: False
        """Whether this one may be answered with an error, if not all may."""
        self.errors = 0
        self.probes: set[int] = set()
        """Serials of reads that the oracle makes itself, to see what is there."""
        self.serial = 0
        self.next_tag = 1

    # --- requests ---

    def make(self, kind: int, sector: int = 0, sectors: int = 0) -> Request:
        """A new request, to be given to `submit`."""
        self.serial += 1
        request = Request(kind, sector, sectors, self.serial)
        if kind == op.REQUEST_WRITE:
            request.data = _content(self.serial, sector, sectors)
        elif kind == op.REQUEST_READ:
            request.payload = bytearray(sectors * SECTOR)
        if kind != op.REQUEST_READ and sectors:
            self._cut(request)
        return request

    def _cut(self, request: Request) -> None:
        sector, end = request.sector, request.sector + request.sectors
        data = request.data
        while sector < end:
            block, first = divmod(sector, SECTORS)
            count = min(SECTORS - first, end - sector)
            start = (sector - request.sector) * SECTOR
            if not data:
                content = ZEROES if count == SECTORS else bytes(count * SECTOR)
            elif count * SECTOR == len(data):
                content = data
            else:
                content = data[start : start + count * SECTOR]
            request.pieces.append((block, first, first + count, content))
            sector += count

    def submit(self, request: Request) -> int:
        """The engine takes it from the queue, for the first time or again; returns its tag."""
        tag = self.next_tag
        while tag in self.live:
            tag = tag % 60000 + 1
        self.next_tag = tag % 60000 + 1
        request.tag = tag
        request.accepted = False
        self.live[tag] = request
        kind = request.kind
        if kind == op.REQUEST_FLUSH:
            request.since = self.answered
        if kind == op.REQUEST_READ and not request.since:
            request.since = len(self.accepted)
        request.durable = self.write_through
        return tag

    def drop(self, tag: int) -> None:
        """The engine gives it back without an answer."""
        self.homeless.append(self.live.pop(tag))

    def grow(self, size_sectors: int) -> None:
        """Its disk is larger: what is new reads as zeroes."""
        assert size_sectors >= self.size_sectors
        self.size_sectors = size_sectors
        more = -(-size_sectors // SECTORS) - self.blocks
        self.blocks += more
        self.base += [ZEROES] * more
        self.state += [ZEROES] * more
        self.history += [[(0, ZEROES)] for _ in range(more)]

    # --- acceptance ---

    def accept(self, request: Request) -> None:
        """It takes effect now."""
        state, history = self.state, self.history
        index = len(self.accepted)
        changes = []
        for block, first, end, content in request.pieces:
            if end - first != SECTORS:
                old = state[block]
                content = old[: first * SECTOR] + content + old[end * SECTOR :]
            state[block] = content
            history[block].append((index + 1, content))
            changes.append((block, content))
        self.accepted.append(changes)
        request.accepted = True
        request.index = index

    def published(
        self, data: dict[int, bytes], zeroed: set[int], found: set[Request], parts: set[tuple[int, int, int]]
    ) -> None:
        """These blocks have been published at once, with these writes in them, or with these parts (block, first
        sector, end) zeroed: apply, compare."""
        state = self.state
        for request in sorted(found, key=lambda request: request.serial):
            if request.answered or request.accepted:
                raise Wrong(f"{request} is published again")
            self.accept(request)
        if not found:
            self._publish_zeroes(parts, zeroed)
        for block, content in data.items():
            if state[block] is not content and state[block] != content:
                raise Wrong(
                    f"block {block} is published as {describe(content)}, the newest content is {describe(state[block])}"
                    f", requests {[self.live[t] for t in self.live if self.live[t].pieces]}"
                )
        for block in zeroed:
            if state[block] != ZEROES:
                raise Wrong(f"block {block} is published as zeroes, its newest content is {describe(state[block])}")
        for request in found:
            for block, _, _, _ in request.pieces:
                if block not in data and block not in zeroed:
                    raise Wrong(f"{request} is published without block {block}")

    def _publish_zeroes(self, parts: set[tuple[int, int, int]], zeroed: set[int]) -> None:
        """Find the discard or write-zeroes: whole blocks are published as zeroes, parts of blocks as data."""
        for request in self.live.values():
            if request.kind not in ZERO_KINDS or request.accepted:
                continue
            its_parts = {
                (block, first, end)
                for block, first, end, _ in request.pieces
                if first or (end != SECTORS and block * SECTORS + end != self.size_sectors)
            }
            if its_parts == parts and {p[0] for p in request.pieces} - {p[0] for p in parts} == zeroed:
                self.accept(request)
                return

    def foreign_write(self, block: int) -> None:
        """Somebody else writes to the image."""
        self.serial += 1
        sectors = min(SECTORS, self.size_sectors - block * SECTORS)
        request = Request(op.REQUEST_WRITE, block * SECTORS, sectors, self.serial)
        request.data = _content(self.serial, request.sector, sectors)
        self._cut(request)
        self.accept(request)
        self.answered = self.floor = request.index + 1

    # --- answers ---

    def completed(self, tag: int, status: int) -> None:
        """The engine has answered."""
        if tag not in self.live:
            raise Wrong(f"tag {tag} is answered although no request has it")
        request = self.live.pop(tag)
        kind = request.kind
        request.answered = True
        if status:
            self.errors += 1
            request.failed = True
            if not (self.errors_allowed or self.may_fail(request)):
                raise Wrong(f"{request} is answered with status {status} although nothing has failed")
        elif kind == op.REQUEST_READ:
            if request.serial not in self.probes:
                self._check_read(request)
        elif kind == op.REQUEST_FLUSH:
            if request.since > self.floor and not self.unsafe:
                self._raise_floor(request.since)
        else:
            if not request.accepted:
                self._accept_without_effect(request)
            if request.index >= self.answered:
                self.answered = request.index + 1
            if request.durable and self.write_through and request.index >= self.floor:
                self._raise_floor(request.index + 1)

    def _raise_floor(self, floor: int) -> None:
        self.floor = floor
        before = len(self.timeline)
        self.raised.append((before + floor, before + len(self.accepted)))

    def _accept_without_effect(self, request: Request) -> None:
        for twin in self.live.values():
            # Of two that zero the same, the other one was found when this one was published.
            if twin.accepted and twin.pieces == request.pieces:
                request.accepted, request.index, twin.accepted = True, twin.index, False
                return
        for block, first, end, content in request.pieces:
            if self.state[block][first * SECTOR : end * SECTOR] != content:
                raise Wrong(f"{request} is answered but was not published")
        self.accept(request)

    def _check_read(self, request: Request) -> None:
        state, payload = self.state, request.payload
        sector, end = request.sector, request.sector + request.sectors
        position = 0
        while sector < end:
            block, first = divmod(sector, SECTORS)
            count = min(SECTORS - first, end - sector)
            got = payload[position : position + count * SECTOR]
            newest = state[block]
            if got != (newest if count == SECTORS else newest[first * SECTOR : (first + count) * SECTOR]):
                self._check_sectors(request, block, first, got)
            position += count * SECTOR
            sector += count

    def _check_sectors(self, request: Request, block: int, first: int, got: bytearray) -> None:
        allowed = []
        for index, content in reversed(self.history[block]):
            allowed.append(content)
            if index <= request.since:
                break
        for i in range(0, len(got), SECTOR):
            offset = first * SECTOR + i
            if not any(content[offset : offset + SECTOR] == got[i : i + SECTOR] for content in allowed):
                values = [value_of(content[offset : offset + SECTOR]) for content in allowed]
                raise Wrong(
                    f"{request}: block {block} sector {offset // SECTOR} reads {value_of(got[i : i + SECTOR])}, "
                    f"allowed {values}"
                )

    # --- after a restart ---

    def park(self) -> None:
        """No process has these requests any more."""
        self.homeless = sorted([*self.live.values(), *self.homeless], key=lambda request: request.serial)
        self.live = {}

    def check(self, disk: list[bytes | None], floor: int) -> int:
        """`disk` must be the state after at least `floor` accepted changes; returns after how many. None: not known."""
        current = list(self.base)
        differing = {b for b in range(self.blocks) if disk[b] is not None and current[b] != disk[b]}
        matching = -1
        if not differing and floor == 0:
            matching = 0
        for count, changes in enumerate(self.accepted, 1):
            for block, content in changes:
                current[block] = content
                if content == disk[block] or disk[block] is None:
                    differing.discard(block)
                else:
                    differing.add(block)
            if not differing and count >= floor:
                matching = count
        if matching < 0:
            raise Wrong(self._explain(disk, floor))
        return matching

    def check_known(self, disk: list[bytes | None]) -> None:
        """Every sector must be zeroes, or something that was once written there."""
        for block, content in enumerate(disk):
            for i in range(0, BLOCK if content else 0, SECTOR):
                assert content is not None
                value = value_of(content[i : i + SECTOR])
                if value != "0" and not value.endswith(f"@{block * SECTORS + i // SECTOR}"):
                    raise Wrong(f"block {block} holds {value}, which was never written there")

    def _explain(self, disk: list[bytes | None], floor: int) -> str:
        lines = [f"the disk is no prefix of the {len(self.accepted)} accepted changes from {floor} on:"]
        for block in range(self.blocks):
            versions = [(0, self.base[block])]
            for count, changes in enumerate(self.accepted, 1):
                versions += [(count, content) for b, content in changes if b == block]
            found = disk[block]
            if found is None:
                continue
            at = [count for count, content in versions if content == found]
            wanted = [count for count, _ in versions]
            if not at or at[-1] != wanted[-1]:
                lines.append(f"block {block}: {describe(found)} is of {at or 'never'}, changed at {wanted}")
        return "\n  ".join(lines)

    def check_image(self, image: list[bytes]) -> None:
        """What the backend has, alone: a flushed state, and of the writes before the next flush was answered any. As
        a disk with a volatile cache would be found, some time ago."""
        total = len(self.timeline) + len(self.accepted)
        lows = [0, *(low for low, _ in self.raised)]
        highs = [*(high for _, high in self.raised), total]
        possible = set(range(len(lows)))
        history: dict[int, list[tuple[int, bytes]]] = {}
        for count, changes in enumerate([*self.timeline, *self.accepted], 1):
            for block, content in changes:
                history.setdefault(block, [(0, ZEROES)]).append((count, content))
        for block, found in enumerate(image):
            versions = history.get(block, [(0, ZEROES)])
            lasts = [count for count, _ in versions[1:]] + [total + 1]
            for i in range(0, BLOCK, SECTOR):
                sector = found[i : i + SECTOR]
                spans = [
                    (count, last)
                    for (count, content), last in zip(versions, lasts, strict=True)
                    if content is found or content[i : i + SECTOR] == sector
                ]
                left = {k for k in possible if any(first <= highs[k] and last > lows[k] for first, last in spans)}
                if not left:
                    raise Wrong(
                        f"the image alone is no flushed state with some of the next interval's writes: block {block} "
                        f"is of {spans}, the blocks before allow {[(lows[k], highs[k]) for k in possible]} of {total}"
                    )
                possible = left

    def settled(self, disk: list[bytes], guest_died: bool, count: int) -> None:
        """What is there now, after `count` accepted changes, is the truth; what was not answered is to be submitted
        again, unless the guest is dead."""
        self.timeline += self.accepted[:count]
        self.raised = [(low, min(high, len(self.timeline))) for low, high in self.raised]
        self.base = disk
        self.state = list(disk)
        self.accepted = []
        self.history = [[(0, content)] for content in disk]
        self.floor = self.answered = 0
        self.park()
        if guest_died:
            self.homeless = []
        for request in self.homeless:
            request.accepted = False
            request.since = 0


def _content(serial: int, sector: int, sectors: int) -> bytes:
    """Unlike that of any other request, and of any other place."""
    parts = [struct.pack("<Q", serial)] * (2 * sectors)
    parts[1::2] = _TAILS[sector : sector + sectors]
    return b"".join(parts)


def value_of(sector: bytes | bytearray) -> str:
    """The write a sector comes from, for people."""
    head, second = struct.unpack_from("<QQ", sector)
    if not any(sector):
        return "0"
    if head and bytes(sector[8:]) == struct.pack("<Q", second) * (SECTOR // 8 - 1):
        return f"#{head}@{second - 1}"
    return f"garbage:{bytes(sector[:8]).hex()}"


def describe(content: bytes) -> str:
    """The writes a block comes from, for people."""
    return " ".join(value_of(content[i : i + SECTOR]).partition("@")[0] for i in range(0, BLOCK, SECTOR))
