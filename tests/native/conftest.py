"""Native tests drive the real daemon through its socket, as a guest's front-end does."""

import contextlib
import os
import random
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.frontend import Frontend
from tests.guest.daemon import Daemon

MIB = 1 << 20
DISK_BYTES = 64 * MIB
GUARD_BYTES = MIB  # the first of the disk holds what no test may change
SCRATCH = 2 * MIB  # where `assert_good` writes
FREE = 4 * MIB  # from here on a test does as it likes
QUEUES = 4


def noise(length: int, seed: object) -> bytes:
    return random.Random(repr(seed)).randbytes(length)


class Disk:
    """A volume of a daemon: its image, its socket, and what it has to be good for after every test."""

    def __init__(self, image: Path, socket: Path, daemon: Daemon) -> None:
        self.image, self.socket, self.daemon = image, socket, daemon
        self.guard = noise(GUARD_BYTES, image.name)
        self.cache: Path | None = None
        self._round = 0

    def make_image(self) -> None:
        with self.image.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, DISK_BYTES)
            file.write(self.guard)

    def frontend(self, **arguments: Any) -> Frontend:
        return Frontend(self.socket, **arguments)

    def in_image(self, offset: int, length: int) -> bytes:
        """What the image holds, without the daemon's help."""
        with self.image.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def after_power_loss(self, offset: int, length: int) -> bytes:
        """What the disk would hold if power failed now."""
        if self.cache is None:
            return self.in_image(offset, length)
        with tempfile.TemporaryDirectory(dir=self.image.parent) as folder:
            image, cache = Path(folder) / "image", Path(folder) / "cache"
            # The cache first: what has left it since is in the image.
            for source, copy in ((self.cache, cache), (self.image, image)):
                subprocess.run(["cp", "--preserve=xattr", "--sparse=always", source, copy], check=True)
            subprocess.run(
                [Path(sys.executable).with_name("vhostcache"), "drain", cache, "--backend", image],
                env={**os.environ, "VHOSTCACHE_BOOT_ID": str(uuid.uuid4())},
                check=True,
                capture_output=True,
                timeout=60,
            )
            with image.open("rb") as file:
                file.seek(offset)
                return file.read(length)

    def end(self) -> None:
        """SIGTERM has to do; and the guarded data is in the image as it was."""
        try:
            if self.daemon.is_alive():
                self.daemon.stop()
                assert self.in_image(0, GUARD_BYTES) == self.guard, "data that no test touched has changed in the image"
        finally:
            self.daemon.reap()

    def assert_good(self) -> None:
        """The daemon lives, a good front-end works on every queue, and nobody's data has changed."""
        assert self.daemon.is_alive(), "the daemon has died"
        self._round += 1
        with self.frontend(queues=QUEUES) as frontend:
            for queue in range(QUEUES):
                data = noise(3 * 4096, (self._round, queue))
                at = SCRATCH + queue * 65536
                frontend.write(at, data, queue=queue)
                assert frontend.read(at, len(data), queue=queue, indirect=True) == data
            frontend.flush()
            assert frontend.read(0, 65536) == self.guard[:65536]
            assert frontend.read(GUARD_BYTES - 65536, 65536) == self.guard[-65536:]


class NativeDaemon(Daemon):
    """Keeps its log short of what the guest tests need, and can say whether it lives."""

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def reap(self) -> None:
        """Leave no process behind, whatever has happened."""
        if self._process is not None:
            self.kill()

    def open_files(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def mappings(self) -> int:
        return len(Path(f"/proc/{self.pid}/maps").read_text().splitlines())


@pytest.fixture(scope="module")
def make_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Disk]]:
    """Start daemons that live as long as the module: `make_disk(*options)`."""
    with contextlib.ExitStack() as stack:

        def make(*options: str) -> Disk:
            folder = tmp_path_factory.mktemp("disk")
            image, socket = folder / "disk.img", folder / "disk.sock"
            arguments = ["--ram", "32MiB", "--num-queues", str(QUEUES), *options]
            if CACHED in options:
                arguments[arguments.index(CACHED)] = f"--cache={folder / 'disk.cache'}"
                arguments.append("--cache-size=64MiB")
            disk = Disk(image, socket, NativeDaemon.export(image, socket, *arguments))
            if CACHED in options:
                disk.cache = folder / "disk.cache"
            disk.make_image()
            stack.callback(disk.end)
            disk.daemon.start()
            return disk

        yield make


CACHED = "--cache"  # in `make_disk`'s options: a cache file beside the image

# Where io_uring is forbidden a pool of threads stands in, and passes the same tests; so does a disk with a cache file.
BOTH_ENGINES = pytest.mark.parametrize(
    "module_disk",
    [(), ("--io-engine", "threads"), (CACHED,), (CACHED, "--io-engine", "threads")],
    ids=["io_uring", "threads", "cache", "cache-threads"],
    indirect=True,
    scope="module",
)


@pytest.fixture(scope="module")
def module_disk(make_disk: Callable[..., Disk], request: pytest.FixtureRequest) -> Disk:
    return make_disk(*getattr(request, "param", ()))


@pytest.fixture
def disk(module_disk: Disk) -> Iterator[Disk]:
    """A disk shared by the module's tests. After each of them the daemon must still be the same, and good."""
    pid = module_disk.daemon.pid
    yield module_disk
    assert module_disk.daemon.pid == pid
    module_disk.assert_good()


def bench(socket: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run `vhostcache bench` to its end."""
    program = Path(sys.executable).with_name("vhostcache")
    return subprocess.run(
        [program, "bench", socket, *options], capture_output=True, text=True, timeout=120, check=False
    )
