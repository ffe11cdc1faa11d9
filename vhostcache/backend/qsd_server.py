"""A qemu-storage-daemon that belongs to one volume, and its supervision.

Owns the process, its private socket (in a folder of this user's own, mode 0700) and the dialogue that sets it up: QMP,
JSON lines over a socket pair, so that secrets stand in no command line and a refusal comes in QEMU's own words.

Invariants: never are two of them alive; the next is started only when the last one is reaped. It dies with this process
(qsd_launcher.py). What it still had on its way into a local image then holds the image's locks, which the next one has
to get first.

`start` waits, at the start. After that everything is done in `look`, which never does: its descriptors are given to
`watch`, and `wake_at_ns` says when it wants to be called anyway. A process that dies is started again, ever more
slowly.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import math
import os
import queue
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from vhostcache.backend.base import NEVER, Notice
from vhostcache.config_backend import QsdBackendConfig
from vhostcache.errors import ImageError, one_line, why
from vhostcache.sockets import PATH_BYTES

START_S: Final = 60.0  # what opening an image over a network may take
LOCK_WAIT_S: Final = 5.0  # a killed daemon's last writes may still be on their way, and hold the image's locks
STOP_S: Final = 30.0  # and what closing one may take

_LAUNCHER: Final = Path(__file__).with_name("qsd_launcher.py")
_FOLDER_PREFIX: Final = "vhostcache-qsd-"
_EXPORT: Final = "vhostcache"
_UNCOMPRESSED: Final = "uncompressed"
_FIRST_DELAY_NS: Final = 100_000_000
_LAST_DELAY_NS: Final = 10_000_000_000
_HEALTHY_NS: Final = 60_000_000_000  # one that has lived this long starts the delays anew
_REAP_NS: Final = 10_000_000
_LINE_BYTES: Final = 1 << 20  # of QMP
_READ_BYTES: Final = 1 << 16
_MESSAGE_CHARS: Final = 500
_MESSAGES: Final = 16  # kept, to say at its death what it said last


class Node:
    """What the first answer said of the block device."""

    def __init__(self, found: dict[str, Any], around: list[dict[str, Any]]) -> None:
        image = found.get("image", {})
        self.size_bytes = int(image.get("virtual-size", 0))
        self.cluster_bytes = int(image.get("cluster-size", 0))
        self.read_only = bool(found.get("ro", False))
        self.direct = bool(found.get("cache", {}).get("direct", False))
        details = [node["image"].get("format-specific", {}).get("data", {}) for node in around if not node.get("ro")]
        self.refcount_bits = max((int(one.get("refcount-bits", 0)) for one in details), default=0)  # of qcow2


class QsdServer:
    """See the module. `subject` is what messages call it. `shared`: to look at what another has open, without locks."""

    def __init__(
        self, config: QsdBackendConfig, subject: str, read_only: bool, direct: bool, shared: bool = False
    ) -> None:
        self._config = config
        self._subject = subject
        self._read_only = read_only or shared
        self._shared = shared
        self._direct = direct
        self._watch: Callable[[int], None] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._qmp: socket.socket | None = None
        self._stderr = -1
        self._received = b""
        self._heard = b""
        self._said: deque[str] = deque(maxlen=_MESSAGES)
        self._waiting: deque[str] = deque()  # commands whose answers are to come
        self._error = ""
        self._delay_ns = _FIRST_DELAY_NS
        self._started_ns = 0
        self._stopping = False
        self._kill_at_ns = NEVER
        self._answers: queue.SimpleQueue[dict[str, Any] | None] | None = None  # to whoever resizes
        self.node: Node | None = None
        self.ready = False
        self.restarts = 0
        self.wake_at_ns = NEVER
        self.warnings: tuple[Notice, ...] = ()
        self._binary = shutil.which(config.binary)
        if self._binary is None:
            raise ImageError(
                subject,
                f"the program '{config.binary}' is not there",
                "qemu-storage-daemon, which belongs to QEMU",
                "on Debian and Ubuntu: apt install qemu-system-common; elsewhere: `binary` says where it is",
            )
        self._folder, self._folder_lock = _make_folder(subject)
        self.socket_path = os.path.join(self._folder, "nbd")

    @property
    def uri(self) -> str:
        """Where it serves its only export."""
        return f"nbd+unix:///?socket={self.socket_path}"

    @property
    def uncompressed_uri(self) -> str | None:
        """Where it serves the same without its compress filter, if it has one on top: that refuses to write where data
        that did not shrink has been stored as it is."""
        if self._config.blockdev["driver"] != "compress" or self._read_only:
            return None
        return f"nbd+unix:///{_UNCOMPRESSED}?socket={self.socket_path}"

    @property
    def is_stopping(self) -> bool:
        """Its end is ours."""
        return self._stopping

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    # The start, which waits.

    def start(self, time_limit_s: float = START_S, lock_wait_s: float = LOCK_WAIT_S) -> None:
        """Until it serves. ImageError: QEMU's own words, and nothing is left running."""
        locks_until_s = time.monotonic() + lock_wait_s
        while True:
            error = self._try(time_limit_s)
            if not error:
                return
            self._end()
            if _is_locked(error) and time.monotonic() < locks_until_s:
                time.sleep(0.1)
            elif self._direct and "O_DIRECT" in error:
                self._direct = False
                fields = {"backend": self._config.label, "reason": error, "instead": "the page cache is used"}
                self.warnings = (Notice("no-direct-io", fields),)
            else:
                hint = "stop who else uses it" if _is_locked(error) else "see `blockdev` and `objects`"
                raise ImageError(self._subject, f"qemu-storage-daemon says: {error}", hint=hint)

    def _try(self, time_limit_s: float) -> str:
        """What is wrong, or "" once it serves."""
        deadline_s = time.monotonic() + time_limit_s
        self._launch(time.monotonic_ns())
        while not self.ready and not self._error:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return f"nothing for {time_limit_s:.0f} s, while it opens the image"
            assert self._qmp is not None
            descriptors = [self._qmp.fileno(), *([self._stderr] if self._stderr >= 0 else [])]
            _wait_readable(descriptors, left_s)
            self._hear()
            if self._read_qmp() and not self.ready and not self._error:
                self._error = self._last_words()
        return self._error

    def _last_words(self) -> str:
        """Of one that has gone before it has answered."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        self._hear()
        status = self._process.poll()
        return self._said[-1] if self._said else f"nothing, and ends ({_how(status)})"

    def _launch(self, now_ns: int) -> None:
        assert self._process is None
        assert self._binary is not None
        self._received = self._heard = b""
        self._error = ""
        self._said.clear()
        self.ready = False
        self._started_ns = now_ns
        self.wake_at_ns = now_ns + int(START_S * 1e9)
        ours, theirs, heard, said = self._make_channels()
        # -I -S: nothing from the environment or site-packages is imported. subprocess starts it by vfork, never by
        # fork.
        command = [
            *(sys.executable, "-I", "-S", str(_LAUNCHER), str(os.getpid()), self._binary),
            *("--chardev", f"socket,id=qmp,fd={theirs.fileno()}", "--monitor", "chardev=qmp,mode=control"),
        ]
        try:
            self._process = (
                _starter()
                .submit(
                    subprocess.Popen,
                    command,
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    cwd=self._config.folder,
                )
                .result()
            )
        except OSError as error:
            ours.close()
            os.close(heard)
            raise ImageError(self._subject, f"qemu-storage-daemon cannot be started: {why(error)}") from error
        finally:
            theirs.close()
            os.close(said)
        ours.setblocking(False)
        os.set_blocking(heard, False)
        self._qmp, self._stderr = ours, heard
        self._ask()
        if self._watch is not None:
            self._watch(ours.fileno())
            self._watch(heard)

    def _make_channels(self) -> tuple[socket.socket, socket.socket, int, int]:
        """For QMP, ours and its; and its standard error, to be read and to be written."""
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                return ours, theirs, *os.pipe2(os.O_CLOEXEC)
            except OSError:
                ours.close()
                theirs.close()
                raise
        except OSError as error:
            raise ImageError(self._subject, f"qemu-storage-daemon cannot be started: {why(error)}") from error

    def _ask(self) -> None:
        """Everything at once: answers come in order, and after an error this one is given up."""
        assert self._qmp is not None
        node = self._blockdev()
        commands: list[tuple[str, dict[str, Any]]] = [
            ("qmp_capabilities", {}),
            *(("object-add", made) for made in self._config.objects),
            ("blockdev-add", node),
            ("query-named-block-nodes", {"flat": True}),
            ("nbd-server-start", {"addr": {"type": "unix", "data": {"path": self.socket_path}}}),
            *(("block-export-add", export) for export in self._exports(node)),
        ]
        self._waiting = deque(["greeting", *(command for command, _ in commands)])
        lines = [json.dumps({"execute": command, "arguments": given}, default=str) for command, given in commands]
        with contextlib.suppress(OSError):  # it has died, as will be seen
            self._qmp.sendall("".join(f"{line}\n" for line in lines).encode())

    def _exports(self, node: dict[str, Any]) -> list[dict[str, Any]]:
        exports = [self._export(_EXPORT, node["node-name"], "")]
        if self.uncompressed_uri is not None:
            exports.append(self._export(_UNCOMPRESSED, node["file"]["node-name"], _UNCOMPRESSED))
        return exports

    def _export(self, identifier: str, node_name: str, name: str) -> dict[str, Any]:
        writable = not self._read_only
        return {"type": "nbd", "id": identifier, "node-name": node_name, "name": name, "writable": writable}

    def _blockdev(self) -> dict[str, Any]:
        """What the user has given wins. Layers below take `discard` and `cache` over, unless they say otherwise."""
        given = self._config.blockdev
        cache = {"direct": self._direct, **given.get("cache", {})}
        made = {"discard": "unmap", "node-name": _EXPORT, **given, "cache": cache}
        if self.uncompressed_uri is not None:
            made["file"] = {"node-name": _UNCOMPRESSED, **given["file"]}
        if self._read_only:
            made["read-only"] = True
        if self._shared:
            made["force-share"] = True
        return made

    # While it serves.

    def watch(self, watch: Callable[[int], None]) -> None:
        """From now on each of its descriptors is given to `watch`, and stays with it until it is closed."""
        self._watch = watch
        if self._qmp is not None:
            watch(self._qmp.fileno())
        if self._stderr >= 0:
            watch(self._stderr)

    def look(self, now_ns: int) -> list[Notice]:
        """Something may be readable, or `wake_at_ns` has come. What has happened, for the log. Never waits."""
        notices = [Notice("qsd-message", {"message": line}) for line in self._hear()]
        if self._stopping:
            self._go_on_stopping(now_ns)
            return notices
        if self._qmp is not None:
            was_ready = self.ready
            gone = self._read_qmp()
            if self.ready and not was_ready:
                self.wake_at_ns = NEVER
                self.restarts += 1
                notices.append(Notice("qsd-restarted", {"pid": self.pid, "restarts": self.restarts}))
            elif not self.ready and not gone and not self._error and now_ns >= self.wake_at_ns:
                self._error = f"nothing for {START_S:.0f} s, while it opens the image"
            if gone or self._error:
                self._lost(now_ns)
        if self._qmp is None and now_ns >= self.wake_at_ns:
            notices += self._again(now_ns)
        return notices

    def _lost(self, now_ns: int) -> None:
        """It has died, or must: to be reaped first, and then to be started again."""
        assert self._process is not None
        self._process.kill()
        self._close_descriptors()
        self.wake_at_ns = now_ns
        if (answers := self._answers) is not None:
            answers.put(None)

    def _again(self, now_ns: int) -> list[Notice]:
        if self._process is not None:
            status = self._process.poll()
            if status is None:  # a write in the kernel, say: it must land before another may follow
                self.wake_at_ns = now_ns + _REAP_NS
                return []
            self._process = None
            if self.ready and now_ns - self._started_ns > _HEALTHY_NS:
                self._delay_ns = _FIRST_DELAY_NS
            was_ready, self.ready = self.ready, False
            self.wake_at_ns = now_ns + self._delay_ns
            again = {"again_in_s": self._delay_ns / 1e9}
            self._delay_ns = min(2 * self._delay_ns, _LAST_DELAY_NS)
            said = self._error or (self._said[-1] if self._said else "")
            if was_ready:
                return [Notice("qsd-died", {"status": _how(status), "message": said, **again})]
            return [Notice("qsd-failed", {"error": said or _how(status), **again})]
        try:
            self._launch(now_ns)
        except ImageError as error:
            self.wake_at_ns = now_ns + self._delay_ns
            self._delay_ns = min(2 * self._delay_ns, _LAST_DELAY_NS)
            return [Notice("qsd-failed", {"error": str(error), "again_in_s": self._delay_ns / 1e9})]
        return []

    # Growing: the one thing that is asked of it while it serves, from a thread of its own.

    def resize(self, size_bytes: int) -> None:
        """QEMU changes the size of nothing that is exported, so the exports go for a moment, as in an outage. Waits.
        ImageError: in QEMU's words; it serves on as it was, or its successor does."""
        node = self._blockdev()
        exports = self._exports(node)
        is_exported = False
        self._answers = queue.SimpleQueue()
        try:
            for export in exports:
                self._command("block-export-del", {"id": export["id"], "mode": "hard"})
                self._expect(lambda answer: answer.get("event") == "BLOCK_EXPORT_DELETED")
            try:
                self._command("block_resize", {"node-name": node["node-name"], "size": size_bytes})
                self._expect(lambda answer: "return" in answer)
            finally:
                for export in exports:
                    self._command("block-export-add", export)
                    self._expect(lambda answer: "return" in answer)
                is_exported = True
        finally:
            self._answers = None
            if not is_exported and (process := self._process) is not None:
                process.kill()  # the next one begins with its exports

    def _command(self, command: str, given: dict[str, Any]) -> None:
        line = json.dumps({"execute": command, "arguments": given}) + "\n"
        try:
            assert self._qmp is not None
            self._qmp.sendall(line.encode())
        except (OSError, AssertionError) as error:
            raise ImageError(self._subject, "its qemu-storage-daemon has just died", hint="try it again") from error

    def _expect(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        assert self._answers is not None
        while True:
            try:
                answer = self._answers.get(timeout=START_S)
            except queue.Empty:
                raise ImageError(self._subject, f"says nothing for {START_S:.0f} s") from None
            if answer is None:
                raise ImageError(self._subject, "its qemu-storage-daemon has just died", hint="try it again")
            if "error" in answer:
                said = one_line(str(answer["error"].get("desc")))[:_MESSAGE_CHARS]
                raise ImageError(self._subject, f"qemu-storage-daemon says: {said}")
            if wanted(answer):
                return

    # What it says.

    def _read_qmp(self) -> bool:
        """True: it has gone."""
        assert self._qmp is not None
        while True:
            try:
                data = self._qmp.recv(_READ_BYTES)
            except BlockingIOError:
                return False
            except OSError:
                return True
            if not data:
                return True
            self._received += data
            *lines, self._received = self._received.split(b"\n")
            for line in lines:
                self._take(line)
            if len(self._received) > _LINE_BYTES:
                self._error = self._error or "something that is not QMP"
                return False

    def _take(self, line: bytes) -> None:
        try:
            answer = json.loads(line)
            answers = self._answers
            if answers is not None and self.ready:
                answers.put(dict(answer))
            if "event" in answer or self.ready:
                return
            command = self._waiting.popleft()
            if "error" in answer:
                self._error = self._error or one_line(str(answer["error"]["desc"]))[:_MESSAGE_CHARS]
                return
            content = answer["QMP" if command == "greeting" else "return"]
            if command == "query-named-block-nodes":
                name = self._config.blockdev.get("node-name", _EXPORT)
                self.node = Node(next(node for node in content if node["node-name"] == name), content)
        except (ValueError, TypeError, KeyError, IndexError, StopIteration, AttributeError):
            self._error = self._error or "something that is not QMP"
            return
        self.ready = not self._waiting and not self._error

    def _hear(self) -> list[str]:
        """The lines on its standard error since the last time."""
        lines: list[str] = []
        while self._stderr >= 0:
            try:
                data = os.read(self._stderr, _READ_BYTES)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                os.close(self._stderr)
                self._stderr = -1
            self._heard += data
            *whole, self._heard = self._heard.split(b"\n")
            if not data or len(self._heard) > _READ_BYTES:
                whole, self._heard = [*whole, self._heard], b""
            lines += [one_line(text.decode(errors="replace"))[:_MESSAGE_CHARS] for text in whole if text.strip()]
        lines = [line.removeprefix("qemu-storage-daemon: ") for line in lines]
        self._said.extend(lines)
        return lines

    # The end.

    @property
    def is_alive(self) -> bool:
        """Whether there is a process, or one to be reaped."""
        return self._process is not None

    def begin_to_stop(self, now_ns: int, time_limit_s: float) -> None:
        """As `stop`, without waiting: `look` does the rest."""
        self._stopping = True
        if self._process is not None:
            self._process.terminate()
            self._kill_at_ns = now_ns + int(time_limit_s * 1e9)
            self.wake_at_ns = now_ns + _REAP_NS

    def _go_on_stopping(self, now_ns: int) -> None:
        if self._qmp is not None and self._read_qmp():  # it would be readable all the time
            self._qmp.close()
            self._qmp = None
        if self._process is not None and self._process.poll() is None:
            if now_ns >= self._kill_at_ns:
                self._process.kill()
            self.wake_at_ns = now_ns + _REAP_NS
            return
        self.wake_at_ns = NEVER
        if self._process is not None:
            self._end()

    def stop(self, time_limit_s: float = STOP_S) -> bool:
        """End it in good order; all it had is written, and the image is let go. False: it had to be killed. Waits."""
        self._stopping = True
        self.wake_at_ns = NEVER
        if self._process is None:
            return True
        self._process.terminate()
        deadline_s = time.monotonic() + time_limit_s
        while self._process.poll() is None:
            if time.monotonic() >= deadline_s:
                self._end()
                return False
            if self._stderr >= 0:
                _wait_readable([self._stderr], 0.02)
                self._hear()  # or it would wait for room in the pipe
            else:
                time.sleep(0.005)
        in_order = self._process.returncode == 0
        self._end()
        return in_order

    def close(self) -> None:
        """More than once is allowed."""
        self.stop()
        if self._folder_lock >= 0:
            shutil.rmtree(self._folder, ignore_errors=True)
            os.close(self._folder_lock)
            self._folder_lock = -1

    def _end(self) -> None:
        """Now, whatever it is doing; and it is gone then."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self._close_descriptors()
        self.ready = False

    def _close_descriptors(self) -> None:
        self._hear()
        if self._qmp is not None:
            self._qmp.close()  # which also ends the watch
            self._qmp = None
        if self._stderr >= 0:
            os.close(self._stderr)
            self._stderr = -1


@functools.cache
def _starter() -> ThreadPoolExecutor:
    """The thread that starts them, whoever asks for one. It lives as long as this process: the kernel kills them when
    the *thread* that has started them ends."""
    return ThreadPoolExecutor(1, "qsd")


def _wait_readable(descriptors: list[int], time_limit_s: float) -> None:
    """Not by select, which knows no descriptors above 1023."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    poll.poll(math.ceil(time_limit_s * 1000))


def _is_locked(error: str) -> bool:
    return "Failed to get" in error and "lock" in error


def _how(status: int | None) -> str:
    if status is None:
        return "still running"
    return f"signal {-status}" if status < 0 else f"exit status {status}"


def _make_folder(subject: str) -> tuple[str, int]:
    """A folder for the socket, and a descriptor that keeps a lock on it; those of daemons that were killed go."""
    ours = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]  # systemd's, where nothing else can be written
    candidates = [ours, os.environ.get("XDG_RUNTIME_DIR", ""), "/run", tempfile.gettempdir(), "/tmp"]
    for base in candidates:
        longest = len(os.fsencode(os.path.join(base, f"{_FOLDER_PREFIX}12345678", "nbd")))
        if not os.path.isabs(base) or longest > PATH_BYTES or not os.access(base, os.W_OK | os.X_OK):
            continue
        with contextlib.suppress(OSError):
            _remove_stale(base)
            path = tempfile.mkdtemp(prefix=_FOLDER_PREFIX, dir=base)  # mode 0700
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            return path, descriptor
    raise ImageError(subject, "there is no folder for its socket", "XDG_RUNTIME_DIR, /run or /tmp, writable")


def _remove_stale(base: str) -> None:
    for entry in Path(base).glob(f"{_FOLDER_PREFIX}*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(entry, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                status = os.fstat(descriptor)
                # A new one is not locked yet for a moment.
                if status.st_uid == os.geteuid() and time.time() - status.st_mtime > 60:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(entry, ignore_errors=True)
            finally:
                os.close(descriptor)
