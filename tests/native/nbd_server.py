"""An NBD server in a thread of the test, that does to its client what a real one seldom does when it is wanted.

It speaks the fixed newstyle negotiation, simple replies, and one request at a time. What is written is volatile until
it is flushed, and `lose_power` forgets it.
"""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

READ, WRITE, DISCONNECT, FLUSH, TRIM, _, WRITE_ZEROES, BLOCK_STATUS = range(8)
REQUEST = struct.Struct(">IHHQQI")
REPLY = struct.Struct(">IIQ")
REQUEST_MAGIC, REPLY_MAGIC, OPTION_REPLY_MAGIC = 0x25609513, 0x67446698, 0x3E889045565A9
HAS_FLAGS, FLAG_READ_ONLY, CAN_FLUSH, CAN_TRIM, CAN_ZERO, CAN_MULTI_CONN = 1, 2, 4, 32, 64, 256
OPT_EXPORT_NAME, OPT_ABORT, OPT_GO = 1, 2, 7
OPT_STRUCTURED_REPLY, OPT_SET_META_CONTEXT = 8, 10
REP_ACK, REP_INFO, REP_META_CONTEXT, REP_ERR_UNSUPPORTED = 1, 3, 4, 0x80000001
CONTEXT, CHUNK_DATA, CHUNK_BLOCK_STATUS, CHUNK_ERROR = 77, 1, 5, 0x8001
INFO_EXPORT, INFO_BLOCK_SIZE, INFO_NONSENSE = 0, 3, 0x4242

Answer = Callable[["NbdServer", socket.socket, int, int, int, int], bool]
"""Asked for each request (server, connection, kind, cookie, offset, length): True if it has dealt with it."""


@dataclass
class NbdServer:
    """`kinds`: the requests seen. `answer` may be set at any time; it is called in a connection's thread."""

    path: Path
    size: int
    flags: int = HAS_FLAGS | CAN_FLUSH | CAN_ZERO | CAN_MULTI_CONN
    blocks: tuple[int, int, int] | None = None
    answer: Answer | None = None
    structured: bool = False  # then `answer` has to answer what is in a block
    greeting: bytes | None = None  # instead of a negotiation
    talks: bool = False  # without end, instead of finishing the negotiation
    kinds: list[int] = field(default_factory=list)
    connections: int = 0

    def __post_init__(self) -> None:
        self.durable = bytearray(self.size)
        self.volatile = bytearray(self.size)
        self.go = threading.Event()  # requests wait for it
        self.go.set()
        self.talking = threading.Event()
        self.interrupted = threading.Event()
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        self._listener: socket.socket | None = None

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.path}"

    def start(self) -> "NbdServer":
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(16)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Like a killed process: every connection ends."""
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        self._listener = None
        self.drop_connections()

    def drop_connections(self) -> None:
        with self._lock:
            connections, self._open = self._open, []
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def grow(self, size: int) -> None:
        """Who connects from now on sees it."""
        for content in (self.durable, self.volatile):
            content.extend(bytes(size - len(content)))
        self.size = size

    def lose_power(self) -> None:
        self.volatile[:] = self.durable

    def __enter__(self) -> "NbdServer":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.go.set()
        self.stop()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with self._lock:
                    self._open.append(connection)
                    self.connections += 1
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, EOFError):
            if self.greeting is not None:
                connection.sendall(self.greeting)
                connection.recv(1)
                return
            self._negotiate(connection)
            while self._request(connection):
                pass

    def _negotiate(self, connection: socket.socket) -> None:
        connection.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        receive(connection, 4)
        while True:
            _, option, length = struct.unpack(">8sII", receive(connection, 16))
            receive(connection, length)
            if option == OPT_GO and self.talks:
                self._talk(connection)
            if option == OPT_GO:
                export = struct.pack(">HQH", INFO_EXPORT, self.size, self.flags)
                self._reply(connection, option, REP_INFO, export)
                if self.blocks is not None:
                    self._reply(connection, option, REP_INFO, struct.pack(">HIII", INFO_BLOCK_SIZE, *self.blocks))
                self._reply(connection, option, REP_ACK, b"")
                return
            if self.structured and option == OPT_STRUCTURED_REPLY:
                self._reply(connection, option, REP_ACK, b"")
                continue
            if self.structured and option == OPT_SET_META_CONTEXT:
                self._reply(connection, option, REP_META_CONTEXT, struct.pack(">I", CONTEXT) + b"base:allocation")
                self._reply(connection, option, REP_ACK, b"")
                continue
            if option == OPT_ABORT:
                raise EOFError
            self._reply(connection, option, REP_ERR_UNSUPPORTED, b"")

    @staticmethod
    def _reply(connection: socket.socket, option: int, kind: int, data: bytes) -> None:
        connection.sendall(option_reply(option, kind, data))

    def _talk(self, connection: socket.socket) -> None:
        words = option_reply(OPT_GO, REP_INFO, struct.pack(">H", INFO_NONSENSE)) * 1000
        try:
            while True:
                connection.sendall(words)
                self.talking.set()
        finally:
            self.interrupted.set()

    def _request(self, connection: socket.socket) -> bool:
        magic, _, kind, cookie, offset, length = REQUEST.unpack(receive(connection, REQUEST.size))
        assert magic == REQUEST_MAGIC
        data = receive(connection, length) if kind == WRITE else b""
        if kind == DISCONNECT:
            return False
        self.go.wait()
        self.kinds.append(kind)
        answer = self.answer
        if answer is not None and answer(self, connection, kind, cookie, offset, length):
            return True
        self.execute(kind, offset, length, data)
        read = bytes(self.volatile[offset : offset + length]) if kind == READ else b""
        if kind == READ and self.structured:
            connection.sendall(chunk(CHUNK_DATA, cookie, struct.pack(">Q", offset) + read))
        else:
            connection.sendall(REPLY.pack(REPLY_MAGIC, 0, cookie) + read)
        return True

    def execute(self, kind: int, offset: int, length: int, data: bytes) -> None:
        with self._lock:
            if kind == WRITE:
                self.volatile[offset : offset + length] = data
            elif kind == WRITE_ZEROES:
                self.volatile[offset : offset + length] = bytes(length)
            elif kind == FLUSH:
                self.durable[:] = self.volatile


def receive(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = connection.recv(length - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def option_reply(option: int, kind: int, data: bytes) -> bytes:
    return struct.pack(">QIII", OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def chunk(kind: int, cookie: int, payload: bytes, last: bool = True) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, last, kind, cookie, len(payload)) + payload


def block_status(cookie: int, *entries: tuple[int, int]) -> bytes:
    """(bytes, flags): 1 a hole, 2 zeroes."""
    return chunk(
        CHUNK_BLOCK_STATUS, cookie, struct.pack(">I", CONTEXT) + b"".join(struct.pack(">II", *e) for e in entries)
    )


def fail(errno_on_the_wire: int) -> Answer:
    def answer(server: NbdServer, connection: socket.socket, kind: int, cookie: int, offset: int, length: int) -> bool:
        connection.sendall(REPLY.pack(REPLY_MAGIC, errno_on_the_wire, cookie))
        return True

    return answer


def send(data: Callable[[int, int], bytes]) -> Answer:
    """These bytes (of cookie and length) instead of an answer; once, then the server behaves."""

    def answer(server: NbdServer, connection: socket.socket, kind: int, cookie: int, offset: int, length: int) -> bool:
        server.answer = None
        connection.sendall(data(cookie, length))
        return True

    return answer
