"""A real libvirtd: the one that runs here, or one of our own for the time of a test (no systemd is needed). As root
it is the system's, otherwise the user's session.
"""

import fcntl
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.guest import GuestError
from tests.guest.host import ENVIRONMENT

URI = "qemu:///system" if os.geteuid() == 0 else "qemu:///session"
START_TIMEOUT_S = 120


def virsh(*arguments: str | Path) -> str:
    line = ["virsh", "-q", "-c", URI, *(str(a) for a in arguments)]
    ended = subprocess.run(
        line, env=ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False
    )
    if ended.returncode != 0:
        raise GuestError(f"`{' '.join(line)}` ended with {ended.returncode}: {ended.stderr.strip()}")
    return ended.stdout


@contextmanager
def running(logs: Path) -> Iterator[None]:
    """libvirtd answers for as long as this lasts. There is one a machine: other test runs wait for their turn."""
    with Path(tempfile.gettempdir(), f"vhostcache-libvirt-{os.geteuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _answers():
            yield
        else:
            with _started(logs):
                yield


@contextmanager
def _started(logs: Path) -> Iterator[None]:
    logs.mkdir(parents=True, exist_ok=True)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        # virtlogd holds the guests' consoles.
        for name in ("virtlogd", "libvirtd"):
            line = [*_hide_kvm(logs), name]
            with (logs / f"{name}.log").open("wb") as log:
                processes.append(
                    subprocess.Popen(line, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
                )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _answers():
            ended = [p.args for p in processes if p.poll() is not None]
            if ended or time.monotonic() > deadline:
                raise GuestError(f"libvirtd does not answer{f'; ended: {ended}' if ended else ''}; logs: {logs}")
            time.sleep(0.2)
        yield
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(30)


def _hide_kvm(folder: Path) -> list[str]:
    """What runs a command without KVM: these guests do not use it, and where libvirt's QEMU may not open /dev/kvm,
    libvirtd starts several QEMUs at each call to find out again what they can do, which takes a minute in all. The
    command gets mounts of its own, with something else in place of /dev/kvm, and without the /dev that libvirt would
    make for each guest from that.
    """
    kvm, settings = Path("/dev/kvm"), Path("/etc/libvirt/qemu.conf")
    if os.geteuid() != 0 or not kvm.exists() or not settings.exists():
        return []
    nothing, ours = folder / "no-kvm", folder / "qemu.conf"
    nothing.touch(mode=0o600)
    ours.write_text(settings.read_text() + "\nnamespaces = []\n")
    script = f'mount --bind "$1" {kvm} && mount --bind "$2" {settings} && shift 2 && exec "$@"'
    line = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", str(nothing), str(ours)]
    # Where mounts cannot be made private, in a chroot for one, libvirtd takes its minute.
    tried = subprocess.run([*line, "true"], stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=False)
    return line if tried.returncode == 0 else []


def _answers() -> bool:
    try:
        virsh("hostname")
    except GuestError:
        return False
    return True
