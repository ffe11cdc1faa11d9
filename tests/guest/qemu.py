"""A QEMU guest: Debian's cloud kernel and the initramfs of scripts/build-guest, on an emulated processor. Driven over
QMP, and by shell commands over its second serial console (tests/guest/init is the other end there).
"""

import contextlib
import shlex
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from qemu.qmp.legacy import QEMUMonitorProtocol

from tests.guest import GUEST_FOLDER, GuestError

MEMORY_MIB = 512
BOOT_TIMEOUT_S = 120.0
COMMAND_TIMEOUT_S = 120.0
EXIT_TIMEOUT_S = 60.0
MIGRATION_TIMEOUT_S = 120.0
# PCI Express slots that a disk can be put into, at the start or while the guest runs.
SLOTS = 4


@dataclass(frozen=True)
class Disk:
    """A vhost-user disk. `name` is QEMU's id of it, and also says the slot: d0 is in the first."""

    socket: Path
    slot: int = 0
    queues: int = 2

    @property
    def name(self) -> str:
        return f"d{self.slot}"


class Console:
    """Shell commands over a stream: a line there, its output and `@@ <exit status>` back."""

    def __init__(self, stream: socket.socket, log: Path) -> None:
        self._stream = stream
        self._log = log.open("ab", buffering=0)
        self._buffer = b""

    def close(self) -> None:
        self._stream.close()
        self._log.close()

    def line(self, deadline: float) -> str | None:
        """The next line that is not empty, None when the guest has ended. A carriage return ends a line too: fio's
        progress.
        """
        while True:
            line, end, rest = self._buffer.partition(b"\n")
            if end:
                self._buffer = rest
                if line:
                    return line.decode(errors="replace")
                continue
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._stream.settimeout(left)
            try:
                received = self._stream.recv(65536)
            except ConnectionResetError:
                received = b""
            if not received:
                return None
            self._log.write(received)
            self._buffer += received.replace(b"\r", b"\n")

    def send(self, command: str) -> None:
        assert "\n" not in command
        self._log.write(f"$ {command}\n".encode())
        self.send_bytes(command.encode() + b"\n")

    def send_bytes(self, part: bytes) -> None:
        """A part of a line."""
        self._stream.sendall(part)


class Guest:
    """A guest with `disks`; its logs are in `folder`: qemu.log, kernel.log, console.log."""

    def __init__(
        self,
        folder: Path,
        disks: Sequence[Disk],
        *,
        processors: int = 2,
        reboots: bool = False,
        incoming: Path | str | None = None,
    ) -> None:
        """`incoming`: a file that a guest was saved to, which is restored; or the URI at which one is waited for."""
        self.folder = folder
        self._disks = list(disks)
        self._processors = processors
        self._reboots = reboots
        self._incoming = incoming
        self._process: subprocess.Popen[bytes] | None = None

    def command_line(self) -> list[str]:
        """QEMU's, without the monitor and the consoles."""
        line = ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-M", "q35,vmport=off", "-cpu", "max"]
        line += ["-nodefaults", "-no-user-config", "-display", "none", "-smp", str(self._processors)]
        # Room for a memory module.
        line += ["-m", f"{MEMORY_MIB}M,slots=1,maxmem=2G"]
        line += ["-object", f"memory-backend-memfd,id=m0,size={MEMORY_MIB}M,share=on", "-machine", "memory-backend=m0"]
        line += [] if self._reboots else ["-no-reboot"]
        line += ["-kernel", str(GUEST_FOLDER / "vmlinuz"), "-initrd", str(GUEST_FOLDER / "initramfs")]
        for slot in range(SLOTS):
            line += ["-device", f"pcie-root-port,id=slot{slot},chassis={slot + 1}"]
        for disk in self._disks:
            line += ["-chardev", f"socket,id=c-{disk.name},path={disk.socket},reconnect=1"]
            line += [
                "-device",
                f"vhost-user-blk-pci,id={disk.name},chardev=c-{disk.name},bus=slot{disk.slot},num-queues={disk.queues}",
            ]
        return line

    def start(self) -> Self:
        """Starts QEMU and waits until the guest takes commands."""
        self.folder.mkdir(parents=True, exist_ok=True)
        monitor, monitor_end = socket.socketpair()
        console, console_end = socket.socketpair()
        line = self.command_line()
        line += ["-incoming", "defer"] if self._incoming else []
        line += ["-append", "console=ttyS0 loglevel=6 panic=-1", "-serial", f"file:{self.folder / 'kernel.log'}"]
        line += ["-chardev", f"socket,id=console,fd={console_end.fileno()}", "-serial", "chardev:console"]
        line += ["-chardev", f"socket,id=monitor,fd={monitor_end.fileno()}", "-mon", "chardev=monitor,mode=control"]
        with (self.folder / "qemu.log").open("ab") as log, monitor_end, console_end:
            self._process = subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[monitor_end.fileno(), console_end.fileno()],
            )
        self.console = Console(console, self.folder / "console.log")
        self.qmp = QEMUMonitorProtocol(monitor)
        self.qmp.settimeout(COMMAND_TIMEOUT_S)
        try:
            self.qmp.connect()
            if isinstance(self._incoming, str):
                self.qmp.cmd("migrate-incoming", uri=self._incoming)
            elif self._incoming:
                self._restore(self._incoming)
            else:
                self.wait_ready()
        except BaseException:
            self.kill()
            raise
        return self

    @classmethod
    def attach(cls, console: Console, logs: Path) -> Self:
        """The console of a guest that somebody else has started; waits until it takes commands."""
        guest = cls(logs, [])
        guest.console = console
        console.send("")
        guest.wait_ready()
        return guest

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            if error is None:
                self.power_off()
            else:
                self.kill()

    # -------------------------------------------------------------------------------------------------- inside the
    # guest

    def wait_ready(self, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Waits until the guest has booted, the first time or again."""
        self._read_until("@@ ready", "the guest's boot", timeout_s, None)

    def run(
        self, command: str, *, timeout_s: float = COMMAND_TIMEOUT_S, on_line: Callable[[str], None] | None = None
    ) -> str:
        """Runs a shell command in the guest; its output. A status other than 0 is an error."""
        self.console.send(command)
        status, output = self._read_until("@@ ", command, timeout_s, on_line)
        if status != "@@ 0":
            raise GuestError(f"in the guest, `{command}` ended with {status[3:]}:\n{output}\n(logs: {self.folder})")
        return output

    def begin(self, command: str, *, device: str = "vda", requests: int = 200) -> None:
        """Starts a command in the background and waits until the disk has ended `requests` more of its requests.
        `finish` waits for the command.
        """
        self.run(
            f"rm -f /tmp/status; ({command}; echo $? >/tmp/status.new; mv /tmp/status.new /tmp/status)"
            " >/tmp/output 2>&1 &"
        )
        self.wait_for_requests(device, requests)

    def wait_for_requests(self, device: str = "vda", requests: int = 200) -> None:
        """Waits until the disk has ended that many more requests."""
        counter = f"awk '{{print $1 + $5}}' /sys/block/{device}/stat"
        self.run(f"{counter} >/tmp/before")
        self.wait_for(f"[ $({counter}) -ge $(($(cat /tmp/before) + {requests})) ]")

    def finish(self, timeout_s: float = COMMAND_TIMEOUT_S) -> None:
        self.wait_for("[ -e /tmp/status ]", timeout_s)
        status = self.run("cat /tmp/status")
        if status != "0":
            output = self.run("cat /tmp/output")
            raise GuestError(f"in the guest, what had begun ended with {status}:\n{output}\n(logs: {self.folder})")

    def wait_for(self, command: str, timeout_s: float = 30.0) -> str:
        """Repeats a command in the guest until it succeeds."""
        loop = f"n=0; until {command}; do n=$((n + 1)); [ $n -lt {int(timeout_s * 5)} ] || exit 1; sleep 0.2; done"
        return self.run(loop, timeout_s=2 * timeout_s + COMMAND_TIMEOUT_S)

    def _read_until(
        self, end: str, what: str, timeout_s: float, on_line: Callable[[str], None] | None
    ) -> tuple[str, str]:
        deadline = time.monotonic() + timeout_s
        lines: list[str] = []
        while True:
            try:
                line = self.console.line(deadline)
            except TimeoutError:
                tail = "\n".join(lines[-10:])
                raise GuestError(f"{what} took more than {timeout_s:.0f} s; logs: {self.folder}\n{tail}") from None
            if line is None:
                raise GuestError(f"the guest ended during {what}; logs: {self.folder}\n{self._log_tails()}")
            if line.startswith(end):
                return line, "\n".join(lines)
            lines.append(line)
            if on_line is not None:
                on_line(line)

    # ------------------------------------------------------------------------------------------------ around the guest

    def event(self, name: str, timeout_s: float = 30.0) -> dict[str, Any]:
        """Waits for one of QEMU's events; those before it are dropped."""
        deadline = time.monotonic() + timeout_s
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise GuestError(f"no {name} from QEMU within {timeout_s:.0f} s; logs: {self.folder}")
            try:
                event = self.qmp.pull_event(wait=left)
            except TimeoutError:
                continue
            if event is not None and event["event"] == name:
                return event

    def plug(self, disk: Disk) -> None:
        address = {"type": "unix", "data": {"path": str(disk.socket)}}
        backend = {"type": "socket", "data": {"addr": address, "server": False, "reconnect": 1}}
        self.qmp.cmd("chardev-add", id=f"c-{disk.name}", backend=backend)
        self.qmp.cmd(
            "device_add",
            driver="vhost-user-blk-pci",
            id=disk.name,
            chardev=f"c-{disk.name}",
            bus=f"slot{disk.slot}",
            **{"num-queues": disk.queues},
        )

    def unplug(self, disk: Disk, timeout_s: float = 60.0) -> None:
        """Asks the guest to let go of the disk and waits until it has."""
        self.qmp.clear_events()
        self.qmp.cmd("device_del", id=disk.name)
        while self.event("DEVICE_DELETED", timeout_s)["data"].get("device") != disk.name:
            pass
        self.qmp.cmd("chardev-remove", id=f"c-{disk.name}")

    def reset(self) -> None:
        """The reset button; waits until the guest is up again."""
        self.qmp.cmd("system_reset")
        self.wait_ready()

    def add_memory(self, size_mib: int) -> None:
        """Plugs in a memory module: every vhost-user back-end gets a new memory table."""
        self.qmp.cmd("object-add", **{"qom-type": "memory-backend-memfd"}, id="m1", size=size_mib << 20, share=True)
        self.qmp.cmd("device_add", driver="pc-dimm", id="dimm1", memdev="m1")

    def pause(self) -> None:
        """Stops the processors, and with them the disk's queues."""
        self.qmp.cmd("stop")

    def resume(self) -> None:
        self.qmp.cmd("cont")

    def save(self, file: Path) -> None:
        """Writes the running guest to a file, as a live migration does: it runs on until the last moment. Then ends
        QEMU.
        """
        self.qmp.cmd("migrate", uri=f"exec:cat > {shlex.quote(str(file))}")
        self._wait_for_migration()
        self.kill()

    def _restore(self, file: Path) -> None:
        self.qmp.cmd("migrate-incoming", uri=f"exec:cat {shlex.quote(str(file))}")
        self._wait_for_migration()

    def migrate(self, uri: str, *, pauses: bool = False) -> None:
        """Begins a live migration. `pauses`: it stops before the other side may start, until `go_on_with_migration`."""
        capabilities = [{"capability": "pause-before-switchover", "state": pauses}]
        self.qmp.cmd("migrate-set-capabilities", capabilities=capabilities)
        self.qmp.cmd("migrate", uri=uri)

    def go_on_with_migration(self) -> None:
        self.wait_for_migration("pre-switchover")
        self.qmp.cmd("migrate-continue", state="pre-switchover")

    def cancel_migration(self) -> None:
        self.qmp.cmd("migrate_cancel")
        self.wait_for_migration("cancelled")

    def wait_for_migration(self, wanted: str = "completed") -> None:
        """Waits until QEMU says that of its migration."""
        deadline = time.monotonic() + MIGRATION_TIMEOUT_S
        while (status := cast(dict[str, Any], self.qmp.cmd("query-migrate")).get("status")) != wanted:
            if status in ("failed", "completed", "cancelled") or time.monotonic() > deadline:
                raise GuestError(f"the migration is {status}, not {wanted}; logs: {self.folder}")
            time.sleep(0.05)

    def throttle_migration(self, bytes_per_s: int) -> None:
        """So slow that it does not end by itself, or (0) as fast as it can."""
        self.qmp.cmd("migrate-set-parameters", **{"max-bandwidth": bytes_per_s})

    def _wait_for_migration(self) -> None:
        deadline = time.monotonic() + MIGRATION_TIMEOUT_S
        while True:
            status = cast(dict[str, Any], self.qmp.cmd("query-migrate")).get("status")
            if status == "completed":
                return
            if status == "failed" or time.monotonic() > deadline:
                raise GuestError(f"the migration to or from a file is {status}; logs: {self.folder}")
            time.sleep(0.1)

    def power_off(self) -> None:
        assert self._process is not None
        self.console.send("poweroff -f")
        try:
            code = self._process.wait(EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise GuestError(
                f"the guest did not power off within {EXIT_TIMEOUT_S:.0f} s; logs: {self.folder}"
            ) from None
        self._forget()
        if code != 0:
            raise GuestError(f"QEMU ended with {code}; logs: {self.folder}\n{self._log_tails()}")

    @property
    def running(self) -> bool:
        return self._process is not None

    def kill(self) -> None:
        """SIGKILL to QEMU, in the middle of whatever it does."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._forget()

    def _forget(self) -> None:
        self._process = None
        self.console.close()
        with contextlib.suppress(EOFError):  # it has ended by itself
            self.qmp.close()

    def _log_tails(self) -> str:
        tails = []
        for name in ("qemu.log", "kernel.log"):
            log = self.folder / name
            if log.exists():
                tails += [f"{name}:", *log.read_text(errors="replace").splitlines()[-5:]]
        return "\n".join(tails)
