"""An NBD server in a thread, in plain Python: honest, unless a test tells it to lie.

`lies` maps the number of a command (0, 1, ... over all connections) to a function of the connection and that command;
`greet` and `describe` replace the handshake. It keeps its data in `content`.
"""

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

NBD_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, CHUNK_MAGIC = 0x25609513, 0x67446698, 0x668E33EF
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED_REPLY, LIST_META, SET_META = 1, 2, 3, 5, 6, 7, 8, 9, 10
ACK, REPLY_INFO, UNSUPPORTED = 1, 3, 0x80000001
READ, WRITE, DISCONNECT, FLUSH, TRIM, CACHE, ZERO, BLOCK_STATUS = range(8)
HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_ZEROES = 1, 2, 4, 8, 32, 64
EIO = 5


@dataclass
class Command:
    kind: int
    cookie: int
    offset: int
    length: int
    data: bytes


@dataclass
class Lies:
    """What is not as it should be."""

    greeting: bytes | None = None
    size_bytes: int | None = None
    flags: int | None = None
    block_sizes: tuple[int, int, int] | None = None
    structured: bool = False
    commands: dict[int, Callable[["Connection", Command], None]] = field(default_factory=dict)


class Closed(Exception):  # noqa: N818  it is no error
    """The other side has gone, or this one goes."""


class Connection:
    def __init__(self, server: "Liar", link: socket.socket) -> None:
        self.server, self.link = server, link
        self.structured = False

    def receive(self, length: int) -> bytes:
        found = bytearray()
        while len(found) < length:
            part = self.link.recv(length - len(found))
            if not part:
                raise Closed
            found += part
        return bytes(found)

    def send(self, data: bytes) -> None:
        self.link.sendall(data)

    def simple(self, cookie: int, error: int = 0, data: bytes = b"") -> None:
        self.send(struct.pack(">IIQ", SIMPLE_REPLY_MAGIC, error, cookie) + data)

    def chunk(self, cookie: int, kind: int, data: bytes = b"", *, done: bool = True, length: int = -1) -> None:
        size = len(data) if length < 0 else length
        self.send(struct.pack(">IHHQI", CHUNK_MAGIC, int(done), kind, cookie, size) + data)

    # The handshake.

    def greet(self) -> None:
        lies = self.server.lies
        if lies.greeting is not None:
            self.send(lies.greeting)
            raise Closed
        self.send(struct.pack(">QQH", NBD_MAGIC, OPTION_MAGIC, 3))
        self.receive(4)
        while not self.option():
            pass

    def option(self) -> bool:
        _, option, length = struct.unpack(">QII", self.receive(16))
        self.receive(length)
        if option in (GO, INFO):
            self.describe(option)
            return bool(option == GO)
        if option == STRUCTURED_REPLY and self.server.lies.structured:
            self.structured = True
            self.option_reply(option, ACK)
        elif option == SET_META and self.structured:
            self.option_reply(option, ACK)
        elif option == ABORT:
            raise Closed
        elif option == EXPORT_NAME:
            self.send(struct.pack(">QH", self.size_bytes, self.flags) + bytes(124))
            return True
        else:
            self.option_reply(option, UNSUPPORTED)
        return False

    @property
    def size_bytes(self) -> int:
        told = self.server.lies.size_bytes
        return len(self.server.content) if told is None else told

    @property
    def flags(self) -> int:
        told = self.server.lies.flags
        return HAS_FLAGS | SEND_FLUSH | SEND_ZEROES | SEND_TRIM if told is None else told

    def describe(self, option: int) -> None:
        self.option_reply(option, REPLY_INFO, struct.pack(">HQH", 0, self.size_bytes, self.flags))
        if self.server.lies.block_sizes is not None:
            self.option_reply(option, REPLY_INFO, struct.pack(">HIII", 3, *self.server.lies.block_sizes))
        self.option_reply(option, ACK)

    def option_reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self.send(struct.pack(">QIII", OPTION_REPLY_MAGIC, option, kind, len(data)) + data)

    # Commands.

    def serve(self) -> None:
        while True:
            _, _, kind, cookie, offset, length = struct.unpack(">IHHQQI", self.receive(28))
            data = self.receive(length) if kind == WRITE else b""
            if kind == DISCONNECT:
                raise Closed
            command = Command(kind, cookie, offset, length, data)
            lie = self.server.next_lie()
            if lie is not None:
                lie(self, command)
            else:
                self.answer(command)

    def answer(self, command: Command) -> None:
        content, end = self.server.content, command.offset + command.length
        with self.server.lock:
            if command.kind == WRITE:
                content[command.offset : end] = command.data
            elif command.kind in (ZERO, TRIM):
                content[command.offset : end] = bytes(command.length)
            data = bytes(content[command.offset : end]) if command.kind == READ else b""
        if command.kind == READ and self.structured:
            self.chunk(command.cookie, 1, struct.pack(">Q", command.offset) + data)
        else:
            self.simple(command.cookie, 0, data)


class Liar:
    def __init__(self, path: Path, size_bytes: int, lies: Lies | None = None) -> None:
        self.path, self.content = path, bytearray(size_bytes)
        self.lies = lies or Lies()
        self.commands = self.connections = 0
        self.lock = threading.Lock()
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.path}"

    def next_lie(self) -> Callable[[Connection, Command], None] | None:
        with self.lock:
            number = self.commands
            self.commands += 1
        return self.lies.commands.get(number)

    def __enter__(self) -> Self:
        self._listener.bind(os.fspath(self.path))
        self._listener.listen(16)
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for link in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()
        self._listener.close()

    def _start(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(link)
            connection = Connection(self, link)
            self._start(lambda connection=connection: self._run(connection))

    def _run(self, connection: Connection) -> None:
        with connection.link, contextlib.suppress(Closed, OSError, struct.error):
            connection.greet()
            connection.serve()
