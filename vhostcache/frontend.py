"""The front-end's side of a vhost-user connection, as far as a virtio-blk driver needs it.

It owns the socket, the shared memory and the eventfds; what happens in the rings is its user's business. Every message
has a time-out: a server that does not answer is an error, never a hang. It never retries and never reconnects.
"""

import contextlib
import mmap
import os
import select
import socket
import struct
from dataclasses import dataclass
from enum import IntEnum
from types import TracebackType

HEADER = struct.Struct("<III")
VERSION = 0x1
REPLY = 0x4
NEED_REPLY = 0x8
CONFIG_BYTES = 60
GUEST_ADDRESS = 1 << 32  # where the shared memory lies, as the descriptors have it


class Message(IntEnum):
    """Requests of the vhost-user protocol that a block front-end sends."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32


class Feature(IntEnum):
    """Virtio feature bits."""

    SIZE_MAX = 1
    SEG_MAX = 2
    RO = 5
    BLK_SIZE = 6
    FLUSH = 9
    TOPOLOGY = 10
    CONFIG_WCE = 11
    MQ = 12
    DISCARD = 13
    WRITE_ZEROES = 14
    INDIRECT_DESC = 28
    EVENT_IDX = 29
    PROTOCOL_FEATURES = 30
    VERSION_1 = 32


class Protocol(IntEnum):
    """Protocol feature bits."""

    MQ = 0
    REPLY_ACK = 3
    CONFIG = 9
    INFLIGHT_SHMFD = 12


_WANTED = (
    Feature.SIZE_MAX,
    Feature.SEG_MAX,
    Feature.RO,
    Feature.BLK_SIZE,
    Feature.FLUSH,
    Feature.TOPOLOGY,
    Feature.CONFIG_WCE,
    Feature.MQ,
    Feature.DISCARD,
    Feature.WRITE_ZEROES,
    Feature.INDIRECT_DESC,
    Feature.EVENT_IDX,
    Feature.PROTOCOL_FEATURES,
    Feature.VERSION_1,
)


class FrontendError(Exception):
    """The server is not there, does not answer, or says what makes no sense. One line says which."""


@dataclass(frozen=True)
class DiskConfig:
    """The configuration space of a virtio block device, as far as it is of use here. Sizes in bytes."""

    capacity_bytes: int
    size_max_bytes: int
    seg_max: int
    block_bytes: int
    write_cache: bool
    num_queues: int
    max_discard_bytes: int
    max_write_zeroes_bytes: int

    @classmethod
    def parse(cls, space: bytes, features: int) -> "DiskConfig":
        """Fields whose feature was not negotiated are 0 (one queue, 512-byte blocks, no write cache)."""

        def has(feature: Feature) -> bool:
            return bool(features >> feature & 1)

        capacity, size_max, seg_max = struct.unpack_from("<QII", space, 0)
        (block,) = struct.unpack_from("<I", space, 20)
        wce, _, queues, discard = struct.unpack_from("<BBHI", space, 32)
        (zeroes,) = struct.unpack_from("<I", space, 48)
        return cls(
            capacity_bytes=capacity * 512,
            size_max_bytes=size_max if has(Feature.SIZE_MAX) else 0,
            seg_max=seg_max if has(Feature.SEG_MAX) else 0,
            block_bytes=block if has(Feature.BLK_SIZE) else 512,
            write_cache=bool(wce) if has(Feature.CONFIG_WCE) else has(Feature.FLUSH),
            num_queues=queues if has(Feature.MQ) else 1,
            max_discard_bytes=discard * 512 if has(Feature.DISCARD) else 0,
            max_write_zeroes_bytes=zeroes * 512 if has(Feature.WRITE_ZEROES) else 0,
        )


class Frontend:
    """A connection to a vhost-user-blk server: connect, then `share_memory`, `start_queue` for each, then the rings."""

    def __init__(
        self, path: str, timeout_s: float = 30.0, without: tuple[Feature, ...] = (), inflight: bool = True
    ) -> None:
        """Connect and negotiate all features of use here but those in `without`; `inflight`: with an in-flight area."""
        self.path = path
        self._wanted_features = sum(1 << f for f in _WANTED if f not in without)
        self._wanted_protocol = sum(1 << p for p in Protocol if inflight or p != Protocol.INFLIGHT_SHMFD)
        self.timeout_s = timeout_s
        self.memory: mmap.mmap | None = None
        self._fds: list[int] = []
        self._started: list[int] = []
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(timeout_s)
        try:
            self.sock.connect(path)
            self._negotiate()
        except OSError as error:
            self.close()
            raise FrontendError(f"{path}: {error.strerror or error}") from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Frontend":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave without a word, as a front-end that dies does. The memory goes when the last view of it does."""
        self.sock.close()
        while self._fds:
            os.close(self._fds.pop())

    # -- messages --

    def _send(self, message: Message, payload: bytes = b"", fds: tuple[int, ...] = (), flags: int = 0) -> None:
        data = HEADER.pack(message, VERSION | flags, len(payload)) + payload
        try:
            if socket.send_fds(self.sock, [data], list(fds)) != len(data):
                raise FrontendError(f"{self.path}: {message.name} was sent in part only")
        except TimeoutError as error:
            raise FrontendError(f"{self.path}: the server takes no messages ({message.name})") from error
        except OSError as error:
            raise FrontendError(f"{self.path}: {message.name}: {error.strerror}") from error

    def _receive(self, message: Message) -> tuple[bytes, list[int]]:
        fds: list[int] = []
        data = b""
        wanted = HEADER.size
        try:
            while len(data) < wanted:
                part, new, _, _ = socket.recv_fds(self.sock, wanted - len(data), 8)
                fds += new
                if not part:
                    raise FrontendError(f"{self.path}: the server closed the connection at {message.name}")
                data += part
                if len(data) == HEADER.size:
                    wanted += HEADER.unpack(data)[2]
                    if wanted > 4096:
                        raise FrontendError(f"{self.path}: the answer to {message.name} is {wanted} bytes long")
            if HEADER.unpack_from(data)[0] != message:
                raise FrontendError(
                    f"{self.path}: the server answered {message.name} with {HEADER.unpack_from(data)[0]}"
                )
        except TimeoutError as error:
            self._drop(fds)
            raise FrontendError(f"{self.path}: no answer to {message.name} in {self.timeout_s:g} s") from error
        except OSError as error:
            self._drop(fds)
            raise FrontendError(f"{self.path}: {message.name}: {error.strerror}") from error
        except FrontendError:
            self._drop(fds)
            raise
        return data[HEADER.size :], fds

    @staticmethod
    def _drop(fds: list[int]) -> None:
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)

    def _ask(self, message: Message, payload: bytes = b"") -> bytes:
        self._send(message, payload)
        answer, fds = self._receive(message)
        self._drop(fds)
        return answer

    def _ask_u64(self, message: Message) -> int:
        answer = self._ask(message)
        if len(answer) != 8:
            raise FrontendError(f"{self.path}: the answer to {message.name} is {len(answer)} bytes long, not 8")
        return int.from_bytes(answer, "little")

    def _tell(self, message: Message, payload: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        """Send what has no answer of its own; with REPLY_ACK, wait until the server says that it took it."""
        if not self.has_protocol(Protocol.REPLY_ACK):
            self._send(message, payload, fds)
            return
        self._send(message, payload, fds, NEED_REPLY)
        answer, new = self._receive(message)
        self._drop(new)
        if int.from_bytes(answer, "little") != 0:
            raise FrontendError(f"{self.path}: the server refused {message.name}")

    # -- negotiation --

    def has(self, feature: Feature) -> bool:
        """Whether a virtio feature was negotiated."""
        return bool(self.features >> feature & 1)

    def has_protocol(self, feature: Protocol) -> bool:
        """Whether a protocol feature was negotiated."""
        return bool(self.protocol >> feature & 1)

    def _negotiate(self) -> None:
        self.protocol = 0
        self._send(Message.SET_OWNER)
        offered = self._ask_u64(Message.GET_FEATURES)
        self.features = offered & self._wanted_features
        if not self.has(Feature.VERSION_1) or not self.has(Feature.PROTOCOL_FEATURES):
            raise FrontendError(f"{self.path}: not a virtio 1 device with protocol features (it offers {offered:#x})")
        protocol = self._ask_u64(Message.GET_PROTOCOL_FEATURES) & self._wanted_protocol
        self._send(Message.SET_PROTOCOL_FEATURES, protocol.to_bytes(8, "little"))
        self.protocol = protocol
        if not self.has_protocol(Protocol.CONFIG):
            raise FrontendError(f"{self.path}: the server has no configuration space: not a block device?")
        self.max_queues = self._ask_u64(Message.GET_QUEUE_NUM) if self.has_protocol(Protocol.MQ) else 1
        self._tell(Message.SET_FEATURES, self.features.to_bytes(8, "little"))
        self.config = DiskConfig.parse(self._config_space(), self.features)
        if self.config.num_queues:
            self.max_queues = min(self.max_queues, self.config.num_queues)

    def _config_space(self) -> bytes:
        answer = self._ask(Message.GET_CONFIG, struct.pack("<III", 0, CONFIG_BYTES, 0) + bytes(CONFIG_BYTES))
        if len(answer) != 12 + CONFIG_BYTES:
            raise FrontendError(f"{self.path}: the server did not give its configuration space")
        return answer[12:]

    # -- memory and queues --

    def share_memory(self, size_bytes: int) -> mmap.mmap:
        """One region, zeroed, at GUEST_ADDRESS."""
        fd = os.memfd_create("vhostcache-bench", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(fd, 0, size_bytes)
            memory = mmap.mmap(fd, size_bytes)
        except OSError as error:
            os.close(fd)
            raise FrontendError(f"{size_bytes >> 20} MiB of shared memory: {error.strerror}") from error
        self.memory = memory
        self._fds.append(fd)
        self._memory_fd = fd
        self._memory_bytes = size_bytes
        return memory

    def announce_memory(self, address: int) -> None:
        """Tell the server where the memory lies in our address space."""
        region = struct.pack("<IIQQQQ", 1, 0, GUEST_ADDRESS, self._memory_bytes, address, 0)
        self._address = address
        self._tell(Message.SET_MEM_TABLE, region, (self._memory_fd,))

    def track_inflight(self, queues: int, queue_size: int) -> None:
        """Get the in-flight area from the server and hand it back, as QEMU does, where the server wants one."""
        if not self.has_protocol(Protocol.INFLIGHT_SHMFD):
            return
        self._send(Message.GET_INFLIGHT_FD, struct.pack("<QQHHI", 0, 0, queues, queue_size, 0))
        answer, fds = self._receive(Message.GET_INFLIGHT_FD)
        self._fds += fds
        if len(fds) != 1 or len(answer) < 20:
            raise FrontendError(f"{self.path}: the server gave no in-flight area")
        self._tell(Message.SET_INFLIGHT_FD, answer, (fds[0],))

    def start_queue(self, index: int, size: int, descriptors: int, available: int, used: int) -> tuple[int, int]:
        """Start a queue whose rings lie at these offsets of the memory. Returns its kick and call eventfds."""
        kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        call = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._fds += [kick, call]
        self._tell(Message.SET_VRING_NUM, struct.pack("<II", index, size))
        self._tell(Message.SET_VRING_BASE, struct.pack("<II", index, 0))
        base = self._address
        self._tell(
            Message.SET_VRING_ADDR,
            struct.pack("<IIQQQQ", index, 0, base + descriptors, base + used, base + available, 0),
        )
        self._tell(Message.SET_VRING_KICK, index.to_bytes(8, "little"), (kick,))
        self._tell(Message.SET_VRING_CALL, index.to_bytes(8, "little"), (call,))
        self._tell(Message.SET_VRING_ENABLE, struct.pack("<II", index, 1))
        self._started.append(index)
        return kick, call

    def stop_queues(self) -> None:
        """Stop every queue started, in order. The server completes, or forgets, what is in flight there."""
        while self._started:
            self._ask(Message.GET_VRING_BASE, struct.pack("<II", self._started.pop(0), 0))

    def hung_up(self) -> bool:
        """Whether the server has closed the connection."""
        poll = select.poll()
        poll.register(self.sock, select.POLLRDHUP | select.POLLHUP)
        return bool(poll.poll(0))
