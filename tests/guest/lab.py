"""What a functional test needs: images, daemons and guests that all end with it. Logs are kept, images and sockets
are not.
"""

import shutil
import tempfile
from pathlib import Path

from tests.guest import GuestError, host
from tests.guest.daemon import Daemon, create_image
from tests.guest.qemu import Disk, Guest

MIB = 1 << 20
FIO_OPTIONS = "--direct=1 --ioengine=libaio --iodepth=16 --minimal --output=/dev/null"


def fio_job(region_mib: int, size_mib: int, seed: int = 1) -> str:
    """Random 4 KiB writes that cover the `size_mib` from `region_mib` on once, each block with a checksum; what
    writes and verifies share.
    """
    return (
        f"--name=t --offset={region_mib}m --size={size_mib}m --rw=randwrite --bs=4k --randseed={seed}"
        " --verify=crc32c --verify_fatal=1"
    )


class Lab:
    def __init__(self, logs: Path) -> None:
        self.logs = logs
        # A short path: a socket's has at most 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="vhostcache-"))
        self._daemons: list[Daemon] = []
        self._guests: list[Guest] = []

    def close(self) -> None:
        for guest in self._guests:
            if guest.running:
                guest.kill()
        for daemon in self._daemons:
            if daemon.running:
                daemon.kill()
        shutil.rmtree(self.folder)

    def image(self, name: str = "disk", size: str = "256MiB") -> Path:
        path = self.folder / f"{name}.img"
        create_image(path, size)
        return path

    def socket(self, name: str = "vda") -> Path:
        return self.folder / f"{name}.sock"

    def export(self, image: Path, *options: str, socket: str = "vda") -> Daemon:
        """A running `vhostcache export` on the socket `vda`, or another one."""
        log = self.logs / ("daemon.log" if socket == "vda" else f"daemon-{socket}.log")
        return self._started(Daemon.export(image, self.socket(socket), *options, log=log))

    def serve(self, config: Path) -> Daemon:
        return self._started(Daemon.serve(config, log=self.logs / "daemon.log"))

    def guest(
        self, *disks: Disk, processors: int = 2, reboots: bool = False, incoming: Path | str | None = None
    ) -> Guest:
        """A booted guest whose disks are all there; without `disks`, one on the socket `vda`."""
        attached = disks or (Disk(self.socket()),)
        folder = self.logs / f"guest{len(self._guests)}"
        guest = Guest(folder, attached, processors=processors, reboots=reboots, incoming=incoming)
        self._guests.append(guest)
        return guest.start()

    def _started(self, daemon: Daemon) -> Daemon:
        self._daemons.append(daemon)
        return daemon.start()


def write(guest: Guest, job: str, *options: str, device: str = "/dev/vda") -> None:
    """Writes a job's region in the guest, flushing now and then and at the end, and verifies it there."""
    guest.run(write_command(job, *options, device=device))


def write_command(job: str, *options: str, device: str = "/dev/vda") -> str:
    options = options or ("--fsync=32", "--end_fsync=1")
    return f"fio --filename={device} {job} {' '.join(options)} {FIO_OPTIONS}"


def verify(guest: Guest, job: str, device: str = "/dev/vda") -> None:
    guest.run(f"fio --filename={device} {job} --verify_only {FIO_OPTIONS}")


def check_that_verify_notices(image: Path, job: str, offset: int) -> None:
    """A canary: the host's verify has to fail on a copy of the image with one byte changed."""
    copy = image.with_suffix(".canary")
    shutil.copyfile(image, copy)
    with copy.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))
    try:
        host.verify_fio(copy, job)
    except GuestError:
        return
    finally:
        copy.unlink()
    raise GuestError("the host's verify did not notice a changed byte")
