"""The servers that are measured. Each runs on the server's processor from the first, and ends with its context."""

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vhostcache.control import query

SERVER_CPU = 0
CLIENT_CPU = 1
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 180.0  # the drain of a full RAM tier onto a slow disk
QUEUES = 4

VHOSTCACHE = Path(sys.executable).with_name("vhostcache")
ROOT = Path(__file__).resolve().parents[2]


class BenchError(Exception):
    """The bench cannot be run, or a server or a run failed. One line."""


@dataclass(frozen=True)
class Server:
    """How to start one kind of server. `arguments` may hold {image}, {socket}, {size}, {ram}."""

    name: str
    arguments: tuple[str, ...]
    on_image: bool

    def command(self, image: Path | str, sock: Path, size: int, ram: str) -> list[str]:
        values = {"image": str(image), "socket": str(sock), "size": str(size), "ram": ram}
        return [argument.format(**values) for argument in self.arguments]


def null_backend() -> str:
    """Where the build has put it."""
    found = sorted(ROOT.glob("build*/**/null-backend"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise BenchError("null-backend has not been built: `make setup` does that")
    return str(found[-1])


def known_servers() -> dict[str, Server]:
    qsd = shutil.which("qemu-storage-daemon")
    if qsd is None:
        raise BenchError("qemu-storage-daemon is not installed (Debian: qemu-utils or qemu-system-x86)")
    null = null_backend()
    export = f"vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={{socket}},writable=on,num-queues={QUEUES}"
    servers = [
        Server(
            "vhostcache",
            (
                *(str(VHOSTCACHE), "export", "{image}", "--socket", "{socket}", "--mode", "none", "--ram", "{ram}"),
                *("--num-queues", str(QUEUES), "--log-format", "json"),
            ),
            on_image=True,
        ),
        Server(
            "qemu-storage-daemon",
            (
                *(qsd, "--blockdev", "file,node-name=file,filename={image},cache.direct=on,aio=io_uring,discard=unmap"),
                *("--blockdev", "raw,node-name=disk,file=file,discard=unmap", "--export", export),
            ),
            on_image=True,
        ),
        Server("null", (null, "--socket", "{socket}", "--size", "{size}", "--queues", str(QUEUES)), on_image=False),
        Server(
            "null --copy",
            (null, "--socket", "{socket}", "--size", "{size}", "--queues", str(QUEUES), "--copy"),
            on_image=False,
        ),
    ]
    return {server.name: server for server in servers}


def peer_on_nbd(peer: Server) -> Server:
    """The same, with an NBD server's unix socket as its image."""
    at = peer.arguments.index("--blockdev")
    nbd = "nbd,node-name=file,server.type=unix,server.path={image},cache.direct=on,discard=unmap"
    return replace(peer, arguments=(*peer.arguments[: at + 1], nbd, *peer.arguments[at + 2 :]))


class Running:
    """A server that accepts connections."""

    def __init__(
        self, server: Server, image: Path | str, size: int, ram: str, folder: Path, options: Sequence[str] = ()
    ) -> None:
        self.server = server
        self.socket = folder / f"{server.name.replace(' ', '')}.sock"
        self.log = folder / f"{server.name.replace(' ', '')}.log"
        self.socket.unlink(missing_ok=True)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                ["taskset", "-c", str(SERVER_CPU), *server.command(image, self.socket, size, ram), *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._wait_until_it_listens()

    def _wait_until_it_listens(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
                sock.connect(str(self.socket))
                return
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                self.process.wait()
                last = self.log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
                raise BenchError(f"{self.server.name} does not listen: {last[0]}")
            time.sleep(0.02)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.returncode is not None:
            return  # killed
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise BenchError(f"{self.server.name} did not end within {STOP_TIMEOUT_S:g} s of SIGTERM") from error
        if self.server.name == "vhostcache" and status != 0 and error is None:
            raise BenchError(f"vhostcache ended with {status}: {self.log.read_text(errors='replace')[-500:]}")

    def kill(self) -> None:
        """SIGKILL: what a crash leaves."""
        self.process.kill()
        self.process.wait()

    # -- what vhostcache says --

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Its events of that kind, as far as their lines are complete."""
        complete = self.log.read_text(errors="replace").rpartition("\n")[0].splitlines()
        found = [json.loads(line) for line in complete if line.startswith("{")]
        return [event for event in found if event["event"] == kind]

    def wait_for(self, kind: str, count: int = 1, timeout_s: float = START_TIMEOUT_S) -> dict[str, Any]:
        """The `count`th event of that kind."""
        deadline = time.monotonic() + timeout_s
        while len(found := self.events(kind)) < count:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(
                    f"{self.server.name}: no event '{kind}': {self.log.read_text(errors='replace')[-500:]}"
                )
            time.sleep(0.01)
        return found[count - 1]

    def statistics(self) -> dict[str, Any]:
        """Of now."""
        before = len(self.events("statistics"))
        self.process.send_signal(signal.SIGUSR1)
        return self.wait_for("statistics", before + 1)

    def status(self) -> dict[str, Any]:
        """Of its one volume, through the control socket."""
        (found,) = query(f"{self.socket}.control", "status")["volumes"]
        volume: dict[str, Any] = found
        return volume

    # -- what it costs --

    def _processes(self) -> list[Path]:
        """The server and its children. (taskset has become the server.)"""
        found, look = [], [self.process.pid]
        while look:
            pid = look.pop()
            found.append(Path(f"/proc/{pid}"))
            for task in Path(f"/proc/{pid}/task").iterdir():
                look += [int(child) for child in (task / "children").read_text().split()]
        return found

    def cpu_ns(self) -> int:
        """Processor time used until now, by all threads of all its processes."""
        total = 0
        for process in self._processes():
            for task in (process / "task").iterdir():
                total += int((task / "schedstat").read_text().split()[0])
        return total

    def memory_bytes(self) -> int:
        """Proportional set size of all its processes: what is shared with others counts in part."""
        total = 0
        for process in self._processes():
            lines = (process / "smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) << 10
        return total
