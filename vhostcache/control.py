"""The loop's side of the control socket, and the client that `vhostcache status` and its like are.

The server is a process of its own (control_server.py): a second Python thread here would cost the loop most of its
speed. It asks by one datagram at a time over a socket pair that the engine watches. A server that dies is started
again, ever more slowly; one that hangs disturbs nobody. The listening socket is the daemon's, so clients are not
refused meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

from vhostcache.errors import ControlError, UsageError, why
from vhostcache.sockets import Listener

_SERVER: Final = Path(__file__).with_name("control_server.py")
_QUESTION_BYTES: Final = 1 << 16
_ANSWER_BYTES: Final = 400_000  # 1.5 KiB for each of 256 volumes; Linux lets 425 KB through in one piece
_FIRST_DELAY_NS: Final = 100_000_000
_LAST_DELAY_NS: Final = 10_000_000_000
_HEALTHY_NS: Final = 60_000_000_000  # a server that has lived this long starts the delays anew
_SILENT: Final[Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)  # stderr is for events alone
_CLIENT_TIMEOUT_S: Final = 15.0
_RESIZE_POLL_S: Final = 0.2

NEVER: Final = 1 << 62


class Question(NamedTuple):
    """What a client wants of the daemon; its arguments are of the types that the server knows (control_server.py)."""

    command: str
    arguments: dict[str, Any]


NO_QUESTION: Final = Question("", {})


class ControlChannel:
    """Starts, answers and restarts the control server.

    `watch` is given every new descriptor, and stays with it until it is closed.
    """

    def __init__(self, listener: Listener, version: str, watch: Callable[[int], None]) -> None:
        self._listener = listener
        self._version = version
        self._watch = watch
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._delay_ns = _FIRST_DELAY_NS
        self._started_ns = 0
        self.restart_at_ns = NEVER
        self.restarts = 0

    @property
    def server_pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    def start(self, now_ns: int) -> None:
        self._reap()
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        except OSError as error:
            raise ControlError("control server", f"cannot be started: {why(error)}") from error
        with theirs:
            ours.setblocking(False)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * _ANSWER_BYTES)
            descriptors = (self._listener.fileno(), theirs.fileno())
            # -I -S: nothing from the environment or site-packages is imported. subprocess starts it by vfork, never by
            # fork.
            command = [sys.executable, "-I", "-S", str(_SERVER), *map(str, descriptors), self._version]
            try:
                self._process = subprocess.Popen(command, pass_fds=descriptors, **_SILENT)
            except OSError as error:
                ours.close()
                raise ControlError("control server", f"cannot be started: {why(error)}") from error
        self._socket = ours
        self._started_ns = now_ns
        self.restart_at_ns = NEVER
        self._watch(ours.fileno())

    def readable(self, now_ns: int) -> Question | None:
        """What the server asks for, to be answered by `reply` or `refuse`; NO_QUESTION if it is nothing after all.

        None: the server has died, and is to be started again at `restart_at_ns`.
        """
        if self._socket is None:
            return NO_QUESTION
        try:
            question = self._socket.recv(_QUESTION_BYTES)
        except BlockingIOError:
            return NO_QUESTION
        except OSError:
            question = b""
        if not question:
            self._lost(now_ns)
            return None
        asked = json.loads(question)
        return Question(asked["execute"], asked["arguments"])

    def reply(self, value: Any) -> None:
        """Answer the last question. If the server has died meanwhile, or does not read, nobody gets the answer."""
        self._send({"return": value})

    def refuse(self, reason: str) -> None:
        """The same, with a reason why not."""
        self._send({"error": reason})

    def _send(self, message: dict[str, Any]) -> None:
        if self._socket is None:
            return
        answer = json.dumps(message, separators=(",", ":")).encode()
        if len(answer) > _ANSWER_BYTES:
            answer = json.dumps({"error": "the answer is too large"}).encode()
        with contextlib.suppress(OSError):
            self._socket.send(answer, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def restart(self, now_ns: int) -> None:
        self.restarts += 1
        try:
            self.start(now_ns)
        except ControlError:
            self._schedule(now_ns)
            raise

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._reap()
        self._listener.close()

    def _lost(self, now_ns: int) -> None:
        assert self._socket is not None
        self._socket.close()  # which also ends the watch
        self._socket = None
        if now_ns - self._started_ns > _HEALTHY_NS:
            self._delay_ns = _FIRST_DELAY_NS
        self._schedule(now_ns)

    def _schedule(self, now_ns: int) -> None:
        self.restart_at_ns = now_ns + self._delay_ns
        self._delay_ns = min(2 * self._delay_ns, _LAST_DELAY_NS)

    def _reap(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def control_path(path: str) -> str:
    """The control socket, when a disk's own is named: that is what people have at hand."""
    return f"{path}.control" if not path.endswith(".control") and os.path.exists(f"{path}.control") else path


def find_volume(name: str, control: str | None) -> tuple[str, str]:
    """The control socket and the name of a disk that people have named by its name, or by a socket of its own.
    UsageError: that one serves several."""
    if control is not None:
        return control_path(control), name
    path = control_path(name)
    names = [volume["name"] for volume in query(path, "status")["volumes"]]
    if len(names) != 1:
        raise UsageError(f"control socket '{path}'", "serves several disks", "--control, and a disk's name")
    return path, names[0]


def query(path: str, command: str, arguments: dict[str, Any] | None = None) -> Any:
    """Ask the daemon behind a control socket. ControlError: one line."""
    subject = f"control socket '{path}'"
    hint = "is the daemon running, and was it started with this control socket?"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        connection.settimeout(_CLIENT_TIMEOUT_S)
        try:
            connection.connect(os.fspath(path))
            with connection.makefile("rwb") as stream:
                greeting = json.loads(stream.readline(1 << 16))
                if "vhostcache" not in greeting:
                    raise ValueError
                message = {"execute": command} | ({"arguments": arguments} if arguments else {})
                stream.write(json.dumps(message).encode() + b"\n")
                stream.flush()
                answer = json.loads(stream.readline(2 * _ANSWER_BYTES))
        except TimeoutError as error:
            raise ControlError(subject, f"does not answer within {_CLIENT_TIMEOUT_S:.0f} s") from error
        except ConnectionRefusedError as error:
            raise ControlError(subject, "nobody listens there", hint=hint) from error
        except OSError as error:
            raise ControlError(subject, why(error), hint=hint) from error
        except (ValueError, TypeError) as error:
            raise ControlError(subject, "does not speak vhostcache's control protocol") from error
    if "return" not in answer:
        raise ControlError(subject, str(answer.get("error", {}).get("desc", "an answer without a value")))
    return answer["return"]


def resize_and_wait(path: str, name: str, size_bytes: int) -> int:
    """Give a disk another size and wait for the end of it, which may be long: with a log it is a checkpoint, and the
    storage may be slow. Returns the size that the disk has. ControlError: one line."""
    query(path, "resize", {"name": name, "size_bytes": size_bytes})
    while True:
        volumes = {volume["name"]: volume for volume in query(path, "status")["volumes"]}
        state = volumes[name]["resize"]
        if state is None:
            return int(volumes[name]["size_bytes"])
        if not state["running"]:
            raise ControlError("", state["error"])
        time.sleep(_RESIZE_POLL_S)
