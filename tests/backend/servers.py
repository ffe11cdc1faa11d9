"""NBD servers to stand behind a backend: nbdkit and qemu-storage-daemon, on unix sockets of their own."""

import contextlib
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

START_S = 20.0


class Server:
    """A server that is ready when its PID file is there. It may be killed and started again."""

    def __init__(self, command: Sequence[str | Path], socket: Path, pid_file: Path) -> None:
        self.socket = socket
        self._command, self._pid_file = [str(word) for word in command], pid_file
        self._log = pid_file.with_suffix(".log")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.socket}"

    def start(self) -> Self:
        self._pid_file.unlink(missing_ok=True)
        self.socket.unlink(missing_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while not self._pid_file.exists() or not self._pid_file.read_text().strip():
            assert self._process.poll() is None, f"{self._command[0]} has ended: {self._log.read_text()}"
            assert time.monotonic() < deadline, f"{self._command[0]} is not ready: {self._log.read_text()}"
            time.sleep(0.01)
        return self

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            self.kill()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def nbdkit(folder: Path, *arguments: str | Path) -> Server:
    """`arguments`: filters, options, the plugin and its own."""
    socket, pid_file = folder / "nbd.sock", folder / "nbd.pid"
    return Server(
        ["nbdkit", "--foreground", "--exit-with-parent", "-U", socket, "-P", pid_file, *arguments], socket, pid_file
    )


def qemu_storage_daemon(folder: Path, *arguments: str | Path) -> Server:
    """`arguments` make the node `disk`, which is exported."""
    socket, pid_file = folder / "nbd.sock", folder / "nbd.pid"
    options = [
        *("--nbd-server", f"addr.type=unix,addr.path={socket}"),
        *("--export", "type=nbd,id=export,node-name=disk,name=,writable=on"),
    ]
    return Server(["qemu-storage-daemon", "--pidfile", pid_file, *arguments, *options], socket, pid_file)


def qemu_img(*arguments: str | Path) -> None:
    subprocess.run(
        ["qemu-img", *(str(word) for word in arguments)],
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        timeout=60,
    )
