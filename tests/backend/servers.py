"""NBD servers to stand behind a backend: nbdkit and qemu-storage-daemon, on unix sockets of their own."""

import contextlib
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

START_S = 20.0


class Server:
    """A server that is ready when its PID file is there. It may be killed and started again."""

    def __init__(
        self, command: Sequence[str | Path], path: Path, pid_file: Path, listener: socket.socket | None = None
    ) -> None:
        self.socket = path
        self.listener = listener  # is passed on, and stays open here
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
            passed = [] if self.listener is None else [self.listener.fileno()]
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=passed
            )
        deadline = time.monotonic() + START_S
        while not self._pid_file.exists() or not self._pid_file.read_text().strip():
            assert self._process.poll() is None, f"{self._command[0]} has ended: {self._log.read_text()}"
            assert time.monotonic() < deadline, f"{self._command[0]} is not ready: {self._log.read_text()}"
            time.sleep(0.01)
        return self

    @property
    def address(self) -> str:
        """HOST:PORT, where it listens on TCP."""
        assert self.listener is not None
        host, port = self.listener.getsockname()
        return f"{host}:{port}"

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        self.stop()
        if self.listener is not None:
            self.listener.close()

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            self.kill()

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def nbdkit(folder: Path, *arguments: str | Path) -> Server:
    """`arguments`: filters, options, the plugin and its own."""
    path, pid_file = folder / "nbd.sock", folder / "nbd.pid"
    return Server(
        ["nbdkit", "--foreground", "--exit-with-parent", "-U", path, "-P", pid_file, *arguments], path, pid_file
    )


def nbdkit_tcp(folder: Path, *arguments: str | Path) -> Server:
    """On a port of the loopback interface that stays the same. (The socket is made here and handed over as systemd
    does.)
    """
    listener = socket.create_server(("127.0.0.1", 0))
    script = f'exec 3<&{listener.fileno()}; export LISTEN_FDS=1 LISTEN_PID=$$; exec nbdkit "$@"'
    pid_file = folder / "nbd.pid"
    words = ["--foreground", "--exit-with-parent", "-P", pid_file, *arguments]
    return Server(["bash", "-c", script, "nbdkit", *words], folder / "none.sock", pid_file, listener)


def qemu_storage_daemon(folder: Path, *arguments: str | Path) -> Server:
    """`arguments` make the node `disk`, which is exported."""
    path, pid_file = folder / "nbd.sock", folder / "nbd.pid"
    options = [
        *("--nbd-server", f"addr.type=unix,addr.path={path}"),
        *("--export", "type=nbd,id=export,node-name=disk,name=,writable=on"),
    ]
    return Server(
        ["setpriv", "--pdeathsig=TERM", "qemu-storage-daemon", "--pidfile", pid_file, *arguments, *options],
        path,
        pid_file,
    )


def qemu_img(*arguments: str | Path) -> None:
    subprocess.run(
        ["qemu-img", *(str(word) for word in arguments)],
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        timeout=60,
    )
