"""A vhostcache daemon under test: the installed program, started as a user starts it, read through its JSON events."""

import json
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.guest import VHOSTCACHE, GuestError

Event = dict[str, Any]
READY_TIMEOUT_S = 30.0
# The drain writes everything that is dirty; on a slow disk that is the whole `ram`.
STOP_TIMEOUT_S = 120.0


def create_image(path: Path, size: str) -> None:
    subprocess.run(
        [VHOSTCACHE, "create", path, "--size", size], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )


class Daemon:
    """`arguments` are those of the command line, without `--log-format`. Events go to the file `log`, which collects
    those of all starts; `events` returns those of the latest.
    """

    def __init__(self, log: Path, *arguments: str | Path) -> None:
        self.log = log
        self.program = [str(VHOSTCACHE)]
        self.arguments = [str(a) for a in arguments]
        self._process: subprocess.Popen[bytes] | None = None
        self._log_offset = 0

    @classmethod
    def export(cls, image: Path, socket: Path, *options: str, log: Path | None = None) -> Self:
        return cls(log or socket.with_suffix(".log"), "export", image, "--socket", socket, *options)

    @classmethod
    def serve(cls, config: Path, *, log: Path | None = None) -> Self:
        return cls(log or config.with_suffix(".log"), "serve", config)

    def start(self) -> Self:
        self.launch()
        self.wait_for("ready", READY_TIMEOUT_S)
        return self

    def launch(self) -> None:
        """Starts it and waits for nothing."""
        assert self._process is None, "already started"
        with self.log.open("ab") as log:
            self._log_offset = log.tell()
            self._process = subprocess.Popen(
                [*self.program, *self.arguments, "--log-format", "json"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            if error is None:
                self.stop()
            else:
                self.kill()

    @property
    def running(self) -> bool:
        return self._process is not None

    @property
    def pid(self) -> int:
        assert self._process is not None, "not running"
        return self._process.pid

    def anonymous_bytes(self) -> int:
        """Its own memory: what it has mapped of guests' memory is not in it."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise GuestError("no RssAnon in /proc")

    def events(self, kind: str | None = None) -> list[Event]:
        with self.log.open("rb") as log:
            log.seek(self._log_offset)
            complete = log.read().rpartition(b"\n")[0].splitlines()
        found = []
        for line in complete:
            try:
                event = json.loads(line)
            except ValueError:
                raise GuestError(f"the daemon wrote what is no JSON event: {line!r} (in {self.log})") from None
            if kind is None or event["event"] == kind:
                found.append(event)
        return found

    def wait_for(self, kind: str, timeout_s: float = 30.0, count: int = 1) -> list[Event]:
        """Waits until `count` events of that kind have been written."""
        assert self._process is not None, "not running"
        deadline = time.monotonic() + timeout_s
        while True:
            ended = self._process.poll()
            found = self.events(kind)
            if len(found) >= count:
                return found
            if ended is not None:
                raise GuestError(f"the daemon ended with {ended} before its event '{kind}': {self.log}\n{self._tail()}")
            if time.monotonic() > deadline:
                raise GuestError(
                    f"no event '{kind}' from the daemon within {timeout_s:.0f} s: {self.log}\n{self._tail()}"
                )
            time.sleep(0.02)

    def statistics(self) -> dict[str, Event]:
        """The statistics events of now, by volume."""
        assert self._process is not None, "not running"
        before = len(self.events("statistics"))
        self._process.send_signal(signal.SIGUSR1)
        volumes = len(self.events("volume"))
        return {event["volume"]: event for event in self.wait_for("statistics", count=before + volumes)[before:]}

    def stop(self) -> dict[str, Event]:
        """SIGTERM; the daemon drains, says what it did and exits 0. The statistics events, by volume."""
        assert self._process is not None, "not running"
        self._process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> dict[str, Event]:
        """Waits until the daemon has ended by itself, with status 0. The statistics events, by volume."""
        assert self._process is not None, "not running"
        process, self._process = self._process, None
        try:
            code = process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise GuestError(
                f"the daemon did not end within {STOP_TIMEOUT_S:.0f} s: {self.log}\n{self._tail()}"
            ) from None
        if code != 0:
            raise GuestError(f"the daemon ended with {code}: {self.log}\n{self._tail()}")
        return {event["volume"]: event for event in self.events("statistics")}

    def kill(self) -> None:
        """SIGKILL: what a crash leaves."""
        assert self._process is not None, "not running"
        process, self._process = self._process, None
        process.kill()
        process.wait()

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-10:])
