"""A vhost-user front-end for tests, in plain Python: slow, flexible, and as wicked as a test wants it to be.

It shares no code with `vhostcache.frontend`. `Frontend` is the well-behaved one, in layers that a test may use one by
one: raw messages (`send`, `receive`), requests with answers (`ask`, `tell`), set-up (`negotiate`, `share`, `start`),
queues that take any descriptors (`Queue.put`, `Queue.publish`), and disk operations (`read`, `write`, `flush`, ...).
Nothing waits for ever.
"""

import contextlib
import mmap
import os
import select
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

TIMEOUT_S = 20.0
GUEST = 0x1_0000_0000  # where the shared memory lies in guest-physical addresses
USER = 0x7F00_0000_0000  # ... and in what we say is our address space
SECTOR = 512
PAGE = 4096

# Messages
GET_FEATURES, SET_FEATURES, SET_OWNER, RESET_OWNER, SET_MEM_TABLE, SET_LOG_BASE, SET_LOG_FD = 1, 2, 3, 4, 5, 6, 7
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE, SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR = range(
    8, 15
)
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_QUEUE_NUM, SET_VRING_ENABLE = 15, 16, 17, 18
SET_SLAVE_REQ_FD, GET_CONFIG, SET_CONFIG, GET_INFLIGHT_FD, SET_INFLIGHT_FD = 21, 24, 25, 31, 32
GET_MAX_MEM_SLOTS, ADD_MEM_REG, REM_MEM_REG = 36, 37, 38
VERSION, REPLY, NEED_REPLY = 1, 4, 8

# Virtio features
F_SIZE_MAX, F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH, F_TOPOLOGY, F_CONFIG_WCE, F_MQ = 1, 2, 5, 6, 9, 10, 11, 12
F_DISCARD, F_WRITE_ZEROES, F_INDIRECT, F_EVENT_IDX, F_PROTOCOL, F_VERSION_1 = 13, 14, 28, 29, 30, 32
F_LOG_ALL = 26
ALL_FEATURES = (
    *(F_SIZE_MAX, F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH, F_TOPOLOGY, F_CONFIG_WCE, F_MQ, F_DISCARD, F_WRITE_ZEROES),
    *(F_INDIRECT, F_EVENT_IDX),
)
# Protocol features
P_MQ, P_LOG_SHMFD, P_REPLY_ACK, P_SLAVE_REQ, P_CONFIG, P_INFLIGHT, P_MEM_SLOTS = 0, 1, 3, 5, 9, 12, 15

# Kinds of request, and statuses
T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
UNWRITTEN = 0xEE  # what a status byte and read buffers hold before the device has written them
D_NEXT, D_WRITE, D_INDIRECT = 1, 2, 4


class GoneError(Exception):
    """The daemon has closed the connection."""


class LateError(AssertionError):
    """The daemon has not done in time what it should have done."""


class RefusedError(AssertionError):
    """The daemon has answered with an error where the test wanted none."""


@dataclass
class Part:
    """A piece of a request in shared memory: readable or writable by the device."""

    address: int  # guest-physical
    length: int
    writable: bool

    def split(self, *lengths: int) -> list["Part"]:
        """The same memory in several pieces; the last takes the rest."""
        parts, at = [], self.address
        for length in (*lengths, self.length - sum(lengths)):
            parts.append(Part(at, length, self.writable))
            at += length
        return parts


@dataclass
class Descriptor:
    """One entry of a descriptor table, with nothing checked."""

    address: int
    length: int
    flags: int = 0
    next: int = 0

    def pack(self) -> bytes:
        return struct.pack("<QIHH", self.address & (2**64 - 1), self.length & (2**32 - 1), self.flags, self.next)


class Memory:
    """A memfd shared with the daemon, and a bump allocator that begins again when it is through."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.fd = os.memfd_create("vhostcache-test", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self.map = mmap.mmap(self.fd, size)
        self._heap = self._next = 0

    def close(self) -> None:
        self.map.close()
        os.close(self.fd)

    def reserve(self, length: int, align: int = PAGE) -> int:
        """An offset that is never given out again."""
        at = -(-self._heap // align) * align
        self._heap = self._next = at + length
        assert self._heap <= self.size, "the test's memory is too small"
        return at

    def allocate(self, length: int, align: int = 16) -> int:
        at = -(-self._next // align) * align
        if at + length > self.size:
            at = -(-self._heap // align) * align
            assert at + length <= self.size, "the test's memory is too small"
        self._next = at + length
        return at

    def get(self, at: int, length: int) -> bytes:
        return self.map[at : at + length]

    def put(self, at: int, data: bytes) -> None:
        self.map[at : at + len(data)] = data

    def u16(self, at: int) -> int:
        return int.from_bytes(self.map[at : at + 2], "little")

    def put_u16(self, at: int, value: int) -> None:
        self.map[at : at + 2] = (value & 0xFFFF).to_bytes(2, "little")


@dataclass
class Result:
    """How a request ended."""

    status: int
    data: bytes
    used: int  # bytes that the device says it has written


@dataclass
class Request:
    """A request in flight."""

    head: int
    status_at: int
    parts: list[Part] = field(default_factory=list)


class Queue:
    """A split virtqueue, driver's side, without EVENT_IDX suppression: every publication kicks."""

    def __init__(self, frontend: "Frontend", index: int, size: int) -> None:
        memory = frontend.memory
        self.frontend, self.index, self.size = frontend, index, size
        self.descriptors = memory.reserve(16 * size)
        self.available = memory.reserve(6 + 2 * size)
        self.used = memory.reserve(6 + 8 * size)
        self.kick_fd = self.call_fd = -1
        self.next_available = self.last_used = self.next_descriptor = 0
        self.completed: dict[int, int] = {}
        self.busy = bytearray(size)  # descriptors in flight
        self.counts: dict[int, int] = {}  # ... of the chain with this head

    def reset(self) -> None:
        """Empty rings that begin at 0, as after a reset of the device."""
        memory = self.frontend.memory
        memory.put(self.available, bytes(6 + 2 * self.size))
        memory.put(self.used, bytes(6 + 8 * self.size))
        self.next_available = self.last_used = 0
        self.completed, self.counts, self.busy = {}, {}, bytearray(self.size)

    # -- descriptors, as wicked as wanted --

    def put(self, index: int, descriptor: Descriptor) -> None:
        self.frontend.memory.put(self.descriptors + 16 * (index % self.size), descriptor.pack())

    def take(self, count: int) -> int:
        """The first of `count` neighbouring descriptors that are not in flight."""
        for start in (self.next_descriptor, 0):
            first = self.busy.find(bytes(count), start)
            if first >= 0:
                self.next_descriptor = first + count
                self.busy[first : first + count] = b"\1" * count
                self.counts[first] = count
                return first
        raise AssertionError("the test has more requests in flight than the ring holds")

    def chain(self, parts: Sequence[Part]) -> int:
        """Lay out a chain in the ring. Returns its head."""
        head = self.take(len(parts))
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            flags = (D_WRITE if part.writable else 0) | (0 if last else D_NEXT)
            self.put(head + i, Descriptor(part.address, part.length, flags, 0 if last else head + i + 1))
        return head

    def table(self, parts: Sequence[Part]) -> tuple[int, int]:
        """Lay out an indirect table. Returns its guest address and length."""
        memory = self.frontend.memory
        at = memory.allocate(16 * len(parts), 16)
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            flags = (D_WRITE if part.writable else 0) | (0 if last else D_NEXT)
            memory.put(at + 16 * i, Descriptor(part.address, part.length, flags, 0 if last else i + 1).pack())
        return GUEST + at, 16 * len(parts)

    def indirect_chain(self, parts: Sequence[Part]) -> int:
        head = self.take(1)
        address, length = self.table(parts)
        self.put(head, Descriptor(address, length, D_INDIRECT))
        return head

    # -- the rings --

    def offer(self, *heads: int) -> None:
        """Put heads into the available ring, without publishing."""
        for head in heads:
            self.frontend.memory.put_u16(self.available + 4 + 2 * (self.next_available % self.size), head)
            self.next_available = (self.next_available + 1) & 0xFFFF

    def publish(self) -> None:
        self.frontend.memory.put_u16(self.available + 2, self.next_available)
        self.kick()

    def kick(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self.kick_fd, 1)

    def submit(self, *heads: int) -> None:
        self.offer(*heads)
        self.publish()

    def collect(self) -> None:
        """Take what the device has completed into `completed`."""
        memory = self.frontend.memory
        # The used event of EVENT_IDX: tell us about the next one.
        memory.put_u16(self.available + 4 + 2 * self.size, self.last_used)
        while memory.u16(self.used + 2) != self.last_used:
            at = self.used + 4 + 8 * (self.last_used % self.size)
            head, length = struct.unpack("<II", memory.get(at, 8))
            self.completed[head] = length
            count = self.counts.pop(head, 0)
            self.busy[head : head + count] = bytes(count)
            self.last_used = (self.last_used + 1) & 0xFFFF
            memory.put_u16(self.available + 4 + 2 * self.size, self.last_used)

    def wait(self, head: int, timeout_s: float = TIMEOUT_S) -> int:
        """Wait until a chain is completed. Returns the length the device gave. Raises GoneError, or LateError."""
        deadline = time.monotonic() + timeout_s
        while True:
            self.collect()
            if head in self.completed:
                return self.completed.pop(head)
            self.frontend.wait_event([self.call_fd], deadline)

    def is_done(self, head: int) -> bool:
        self.collect()
        return head in self.completed


class Frontend:
    """A front-end that is ready for requests on `queues` queues once entered (or made), unless `start` is false.

    `features`: the virtio features to take where offered (None: all known). `resume`: a former front-end whose memory,
    rings and in-flight area go on.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        queues: int = 1,
        queue_size: int = 128,
        memory: int = 16 << 20,
        features: Iterable[int] | None = None,
        protocol: Iterable[int] = (P_MQ, P_REPLY_ACK, P_CONFIG, P_INFLIGHT),
        resume: "Frontend | None" = None,
        start: bool = True,
    ) -> None:
        self.path = str(path)
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        self.features = self.protocol = 0
        self.inflight_fd = -1
        self.inflight: bytes = b""
        self.wanted = (*(ALL_FEATURES if features is None else features), F_PROTOCOL, F_VERSION_1)
        self.wanted_protocol = tuple(protocol)
        self.queue_count, self.queue_size = queues, queue_size
        self.memory = Memory(memory) if resume is None else resume.memory
        self.queues: list[Queue] = []
        if resume is not None:
            self.inflight_fd, self.inflight = resume.inflight_fd, resume.inflight
            self.queues = resume.queues
            for queue in self.queues:
                queue.frontend = self
            resume.memory_is_mine = False
        self.memory_is_mine = True
        try:
            self.connect()
            if start:
                self.negotiate()
                self.share()
                self.track_inflight()
                for i in range(queues):
                    self.start(i)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def connect(self) -> None:
        """Connect, and wait while the daemon's queue of connections is full (EAGAIN, on a socket with a time-out)."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            try:
                self.sock.connect(self.path)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.001)

    def disconnect(self) -> None:
        """Leave without a word. The memory stays, for another front-end to resume."""
        self.sock.close()
        for queue in self.queues:
            for fd in (queue.kick_fd, queue.call_fd):
                if fd >= 0:
                    os.close(fd)
            queue.kick_fd = queue.call_fd = -1

    def close(self) -> None:
        if not self.memory_is_mine:
            self.sock.close()
            return
        self.disconnect()
        if self.inflight_fd >= 0:
            os.close(self.inflight_fd)
            self.inflight_fd = -1
        self.memory.close()
        self.memory_is_mine = False

    # -- messages --

    def send(
        self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = VERSION, size: int | None = None
    ) -> None:
        """Send a message; `size` overrides the length that its header states."""
        header = struct.pack("<III", request, flags, len(payload) if size is None else size)
        self.send_raw(header + payload, fds)

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        try:
            sent = socket.send_fds(self.sock, [data], list(fds)) if fds else self.sock.send(data)
            if sent < len(data):
                self.sock.sendall(data[sent:])
        except (BrokenPipeError, ConnectionResetError) as error:
            raise GoneError(f"at sending {len(data)} bytes") from error

    def _recv(self, count: int) -> tuple[bytes, list[int]]:
        data, fds = b"", []
        while len(data) < count:
            try:
                part, new, _, _ = socket.recv_fds(self.sock, count - len(data), 16)
            except ConnectionResetError as error:
                raise GoneError("reset") from error
            except TimeoutError as error:
                raise LateError("no message from the daemon") from error
            if not part:
                raise GoneError("end of file")
            data += part
            fds += new
        return data, fds

    def receive(self) -> tuple[int, bytes, list[int]]:
        """The next message: request, payload, descriptors."""
        header, fds = self._recv(12)
        request, flags, size = struct.unpack("<III", header)
        assert flags == VERSION | REPLY, f"flags {flags:#x} in an answer"
        assert size <= 512, f"an answer of {size} bytes"
        payload, more = self._recv(size)
        return request, payload, fds + more

    def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """Send what has an answer of its own. Returns its payload."""
        self.send(request, payload, fds)
        answered, answer, new = self.receive()
        for fd in new:
            os.close(fd)
        assert answered == request, f"message {request} was answered by {answered}"
        return answer

    def ask_u64(self, request: int, payload: bytes = b"") -> int:
        answer = self.ask(request, payload)
        assert len(answer) == 8
        return int.from_bytes(answer, "little")

    def tell(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send what has none; with REPLY_ACK, ask for one and insist that it says 0."""
        if not self.protocol >> P_REPLY_ACK & 1:
            self.send(request, payload, fds)
            return
        self.send(request, payload, fds, VERSION | NEED_REPLY)
        answered, answer, _ = self.receive()
        assert answered == request, f"message {request} was answered by {answered}"
        if answer != bytes(8):
            raise RefusedError(f"message {request} was refused: {answer.hex()}")

    def wait_event(self, fds: Sequence[int], deadline: float) -> None:
        """Wait until one of these eventfds (which it resets) or the end of the connection comes."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise LateError("nothing happened in time")
        poll = select.poll()
        poll.register(self.sock, select.POLLIN | select.POLLRDHUP)
        for fd in fds:
            poll.register(fd, select.POLLIN)
        ready = dict(poll.poll(left * 1000))
        for fd in fds:
            if ready.get(fd, 0) & select.POLLIN:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)
        if ready.get(self.sock.fileno(), 0) & (select.POLLRDHUP | select.POLLHUP | select.POLLERR):
            raise GoneError("while waiting")

    def expect_gone(self, timeout_s: float = TIMEOUT_S) -> None:
        """Assert that the daemon closes this connection."""
        deadline = time.monotonic() + timeout_s
        self.sock.settimeout(1)
        while time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                try:
                    data, fds, _, _ = socket.recv_fds(self.sock, 4096, 16)
                except (ConnectionResetError, BrokenPipeError):
                    return
                for fd in fds:
                    os.close(fd)
                if not data:
                    return
        raise LateError("the daemon has not closed the connection")

    def is_gone(self) -> bool:
        poll = select.poll()
        poll.register(self.sock, select.POLLRDHUP)
        return bool(poll.poll(0))

    def watch_config(self) -> socket.socket:
        """Where the daemon says that the configuration space has changed; P_SLAVE_REQ must have been taken."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self.tell(SET_SLAVE_REQ_FD, b"", [theirs.fileno()])
        ours.settimeout(TIMEOUT_S)
        return ours

    # -- set-up --

    def negotiate(self) -> None:
        self.tell(SET_OWNER)
        self.offered = self.ask_u64(GET_FEATURES)
        self.features = self.offered & sum(1 << f for f in self.wanted)
        self.offered_protocol = self.ask_u64(GET_PROTOCOL_FEATURES)
        protocol = self.offered_protocol & sum(1 << p for p in self.wanted_protocol)
        self.send(SET_PROTOCOL_FEATURES, protocol.to_bytes(8, "little"))
        self.protocol = protocol
        self.tell(SET_FEATURES, self.features.to_bytes(8, "little"))

    def region(self, guest: int = GUEST, size: int | None = None, user: int = USER, offset: int = 0) -> bytes:
        """A region of a memory table; by default the one of all our memory."""
        return struct.pack("<QQQQ", guest, self.memory.size if size is None else size, user, offset)

    def share(self) -> None:
        self.tell(SET_MEM_TABLE, struct.pack("<II", 1, 0) + self.region(), [self.memory.fd])

    def track_inflight(self) -> None:
        """Ask for an in-flight area, unless a former front-end has left one; and hand it to the daemon."""
        if not self.protocol >> P_INFLIGHT & 1:
            return
        if self.inflight_fd < 0:
            self.send(GET_INFLIGHT_FD, struct.pack("<QQHHI", 0, 0, self.queue_count, self.queue_size, 0))
            _, self.inflight, fds = self.receive()
            assert len(fds) == 1, "an in-flight area is one descriptor"
            self.inflight_fd = fds[0]
        self.tell(SET_INFLIGHT_FD, self.inflight, [self.inflight_fd])

    def vring_address(self, queue: Queue) -> bytes:
        return struct.pack(
            "<IIQQQQ", queue.index, 0, USER + queue.descriptors, USER + queue.used, USER + queue.available, 0
        )

    def start(self, index: int, base: int | None = None) -> Queue:
        """Start a queue; one that is not new goes on at `base`, or else at its used index."""
        if index == len(self.queues):
            self.queues.append(Queue(self, index, self.queue_size))
        queue = self.queues[index]
        for old in (queue.kick_fd, queue.call_fd):
            if old >= 0:
                os.close(old)
        queue.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        queue.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        base = self.memory.u16(queue.used + 2) if base is None else base
        self.tell(SET_VRING_NUM, struct.pack("<II", index, queue.size))
        self.tell(SET_VRING_BASE, struct.pack("<II", index, base))
        self.tell(SET_VRING_ADDR, self.vring_address(queue))
        self.tell(SET_VRING_KICK, index.to_bytes(8, "little"), [queue.kick_fd])
        self.tell(SET_VRING_CALL, index.to_bytes(8, "little"), [queue.call_fd])
        self.tell(SET_VRING_ENABLE, struct.pack("<II", index, 1))
        return queue

    def stop(self, index: int = 0) -> int:
        """Stop a queue. Returns where the daemon stands in the available ring."""
        answer = self.ask(GET_VRING_BASE, struct.pack("<II", index, 0))
        answered, base = struct.unpack("<II", answer)
        assert answered == index
        return int(base)

    def config(self, length: int = 60, offset: int = 0) -> bytes:
        answer = self.ask(GET_CONFIG, struct.pack("<III", offset, length, 0) + bytes(length))
        assert struct.unpack_from("<II", answer) == (offset, length)
        return answer[12:]

    def set_config(self, offset: int, data: bytes) -> None:
        self.tell(SET_CONFIG, struct.pack("<III", offset, len(data), 0) + data)

    @property
    def capacity(self) -> int:
        return int.from_bytes(self.config(8), "little") * SECTOR

    # -- requests --

    def out(self, data: bytes, align: int = 16) -> Part:
        """Data for the device to read."""
        at = self.memory.allocate(len(data), align)
        self.memory.put(at, data)
        return Part(GUEST + at, len(data), writable=False)

    def room(self, length: int, align: int = 16) -> Part:
        """Room for the device to write to."""
        at = self.memory.allocate(length, align)
        self.memory.put(at, bytes([UNWRITTEN]) * length)
        return Part(GUEST + at, length, writable=True)

    def header(self, kind: int, sector: int = 0, ioprio: int = 0) -> Part:
        return self.out(struct.pack("<IIQ", kind, ioprio, sector))

    def content(self, part: Part) -> bytes:
        return self.memory.get(part.address - GUEST, part.length)

    def submit(self, parts: Sequence[Part], queue: int = 0, indirect: bool = False) -> Request:
        """Send a request made of these parts; the last byte of the last is taken to be its status."""
        q = self.queues[queue]
        head = q.indirect_chain(parts) if indirect else q.chain(parts)
        q.submit(head)
        return Request(head, parts[-1].address - GUEST + parts[-1].length - 1, list(parts))

    def finish(self, request: Request, queue: int = 0, timeout_s: float = TIMEOUT_S) -> Result:
        used = self.queues[queue].wait(request.head, timeout_s)
        data = b"".join(self.content(p) for p in request.parts if p.writable)
        return Result(self.memory.get(request.status_at, 1)[0], data[:-1], used)

    def do(self, parts: Sequence[Part], queue: int = 0, indirect: bool = False) -> Result:
        return self.finish(self.submit(parts, queue, indirect), queue)

    def request(self, kind: int, sector: int, *parts: Part, queue: int = 0, indirect: bool = False) -> Result:
        """A request with an ordinary header and status around `parts`."""
        return self.do([self.header(kind, sector), *parts, self.room(1)], queue, indirect)

    @staticmethod
    def insist(result: Result, what: str) -> None:
        if result.status != OK:
            raise RefusedError(f"{what}: status {result.status}")

    def start_write(self, offset: int, data: bytes, queue: int = 0) -> Request:
        return self.submit([self.header(T_OUT, offset // SECTOR), self.out(data), self.room(1)], queue)

    def start_read(self, offset: int, length: int, queue: int = 0) -> Request:
        return self.submit([self.header(T_IN, offset // SECTOR), self.room(length), self.room(1)], queue)

    def write(self, offset: int, data: bytes, queue: int = 0, indirect: bool = False) -> None:
        result = self.request(T_OUT, offset // SECTOR, self.out(data), queue=queue, indirect=indirect)
        self.insist(result, f"write of {len(data)} bytes at {offset}")

    def read(self, offset: int, length: int, queue: int = 0, indirect: bool = False) -> bytes:
        result = self.request(T_IN, offset // SECTOR, self.room(length), queue=queue, indirect=indirect)
        self.insist(result, f"read of {length} bytes at {offset}")
        return result.data

    def flush(self, queue: int = 0) -> None:
        self.insist(self.request(T_FLUSH, 0, queue=queue), "flush")

    def ranges(self, *ranges: tuple[int, int, int]) -> Part:
        """Segments of a DISCARD or WRITE_ZEROES: sector, sectors, flags."""
        return self.out(b"".join(struct.pack("<QII", *r) for r in ranges))

    def discard(self, offset: int, length: int) -> None:
        result = self.request(T_DISCARD, 0, self.ranges((offset // SECTOR, length // SECTOR, 0)))
        self.insist(result, "discard")

    def write_zeroes(self, offset: int, length: int, unmap: bool = False) -> None:
        result = self.request(T_WRITE_ZEROES, 0, self.ranges((offset // SECTOR, length // SECTOR, int(unmap))))
        self.insist(result, "write zeroes")

    def get_id(self) -> str:
        result = self.request(T_GET_ID, 0, self.room(20))
        assert result.status == OK
        return result.data.split(b"\0")[0].decode()
