import contextlib
import dataclasses
import errno
import fcntl
import gc
import mmap
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vhostcache.backend import file as file_module
from vhostcache.backend import locks
from vhostcache.backend.file import FileBackend
from vhostcache.errors import ImageError

MIB = 1 << 20
OPEN_S = 30  # a safety net for QEMU's programs


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as created:
        created.truncate(MIB)
    return path


@pytest.fixture
def opened() -> Iterator[Callable[..., FileBackend]]:
    backends = []

    def opener(path: Path | str, read_only: bool = False, direct: bool = True) -> FileBackend:
        backend = FileBackend(str(path), read_only, direct, lock_wait_s=0)
        backends.append(backend)
        return backend

    yield opener
    for backend in backends:
        backend.close()


Opener = Callable[..., FileBackend]
AsUser = Callable[[], contextlib.AbstractContextManager[None]]


def refusal(path: Path | str, read_only: bool = False, direct: bool = True) -> str:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ImageError) as caught:
        FileBackend(str(path), read_only, direct, lock_wait_s=0)
    assert len(os.listdir("/proc/self/fd")) == before, "a refused image leaves no descriptor open"
    assert str(caught.value).isprintable()
    assert caught.value.exit_status == 1
    return str(caught.value)


def qemu_io(path: Path, *options: str, command: str = "read 0 512") -> subprocess.CompletedProcess[str]:
    program = shutil.which("qemu-io")
    assert program, "qemu-utils is installed"
    return subprocess.run(
        [program, *options, "-f", "raw", "-c", command, str(path)], capture_output=True, text=True, timeout=OPEN_S
    )


# Facts.


def test_an_image_is_opened_as_the_mode_asks(image: Path, opened: Opener) -> None:
    facts = opened(image).facts
    assert (facts.size_bytes, facts.read_only, facts.direct) == (MIB, False, True)
    assert facts.align_io_bytes in (512, 4096)
    assert os.get_inheritable(facts.descriptor) is False


def test_page_cache_asks_for_no_alignment(image: Path, opened: Opener) -> None:
    facts = opened(image, direct=False).facts
    assert (facts.direct, facts.align_mem_bytes, facts.align_io_bytes) == (False, 1, 1)


def test_what_statx_tells_is_what_direct_io_needs(image: Path, opened: Opener) -> None:
    """A read with that alignment works, through the descriptor that the engine is given."""
    facts = opened(image).facts
    with mmap.mmap(-1, 8192) as memory, memoryview(memory)[: facts.align_io_bytes] as window:
        assert os.preadv(facts.descriptor, [window], facts.align_io_bytes) == facts.align_io_bytes


def test_a_kernel_that_does_not_tell_the_alignment_is_asked_by_trying(
    image: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = opened(image).facts.align_io_bytes
    monkeypatch.setattr(file_module, "_statx_alignment", lambda descriptor: None)
    descriptor = os.open(image, os.O_RDONLY | os.O_DIRECT)
    try:
        assert file_module.direct_alignment(descriptor) == (told, told)
    finally:
        os.close(descriptor)


def test_a_file_system_without_direct_io_is_used_through_the_page_cache_and_says_so(
    image: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_module, "_statx_alignment", lambda descriptor: (0, 0))
    backend = opened(image)
    assert backend.facts.direct is False
    assert [warning.event for warning in backend.warnings] == ["no-direct-io"]
    assert not fcntl.fcntl(backend.facts.descriptor, fcntl.F_GETFL) & os.O_DIRECT


def test_a_file_system_that_refuses_o_direct_at_opening_does_too(
    image: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def no_direct(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "invalid argument")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", no_direct)
    backend = opened(image)
    assert backend.facts.direct is False
    assert "refuses" in backend.warnings[0].fields["reason"]


def test_a_size_that_direct_io_cannot_reach_means_page_cache(
    image: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    with image.open("r+b") as file:
        file.truncate(MIB + 512)
    monkeypatch.setattr(file_module, "_statx_alignment", lambda descriptor: (512, 4096))
    backend = opened(image)
    assert (backend.facts.direct, backend.facts.size_bytes) == (False, MIB + 512)
    assert "not a multiple of the 4096 bytes" in backend.warnings[0].fields["reason"]


# Refusals.


def test_a_missing_image_is_refused_with_the_command_that_makes_one(tmp_path: Path) -> None:
    message = refusal(tmp_path / "none.img")
    assert "none.img': does not exist; expected a raw image or a block device; make one: vhostcache create" in message


def test_what_is_not_an_image_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        assert "is a socket" in refusal(tmp_path / "socket")
    assert "is a directory" in refusal(tmp_path)
    assert "is a pipe" in refusal(tmp_path / "pipe", read_only=True)
    assert "is a character device" in refusal("/dev/null")


@pytest.mark.parametrize(
    ("size", "words"), [(0, "is empty"), (1000, "has a size of 1000 bytes; expected a multiple of 512")]
)
def test_an_odd_size_is_refused_and_the_image_stays_as_it_is(image: Path, size: int, words: str) -> None:
    os.truncate(image, size)
    assert words in refusal(image)
    assert image.stat().st_size == size


def test_no_permission_is_one_line_with_advice(public_folder: Path, as_ordinary_user: AsUser) -> None:
    image = public_folder / "disk.img"
    image.write_bytes(bytes(MIB))
    image.chmod(0o444)
    with as_ordinary_user():
        message = refusal(image)
        FileBackend(str(image), read_only=True, direct=False, lock_wait_s=0).close()
    assert "permission denied" in message
    assert "--read-only" in message


def test_a_dangling_link_and_a_loop_are_refused(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    assert "does not exist" in refusal(tmp_path / "dangling")
    assert "too many symbolic links" in refusal(tmp_path / "loop")


# Locks, against QEMU's own programs.


def test_a_second_writer_is_refused_and_so_is_a_reader_beside_a_writer(image: Path, opened: Opener) -> None:
    opened(image)
    assert "is in use" in refusal(image)
    assert "is in use" in refusal(image, read_only=True)


def test_readers_share_and_keep_writers_out(image: Path, opened: Opener) -> None:
    opened(image, read_only=True)
    opened(image, read_only=True)
    assert "lets nobody else write it" in refusal(image)


def test_closing_lets_go_of_the_locks(image: Path, opened: Opener) -> None:
    opened(image).close()
    opened(image)


def test_a_refused_start_leaves_no_lock_behind(image: Path, opened: Opener) -> None:
    first = opened(image)
    refusal(image)
    first.close()
    assert qemu_io(image, command="write 0 512").returncode == 0


def test_qemu_cannot_write_what_we_serve_nor_open_it_for_itself(image: Path, opened: Opener) -> None:
    opened(image)
    refused = qemu_io(image, command="write -P 1 0 512")
    assert refused.returncode != 0
    assert 'Failed to get "write" lock' in refused.stderr
    resized = subprocess.run(
        ["qemu-img", "resize", "-f", "raw", image, "2M"], capture_output=True, text=True, timeout=OPEN_S
    )
    assert resized.returncode != 0
    assert "lock" in resized.stderr
    assert image.read_bytes() == bytes(MIB)


def test_a_reader_of_qemus_keeps_no_reader_of_ours_out_but_a_writer(image: Path, opened: Opener) -> None:
    opened(image, read_only=True)
    assert qemu_io(image, "-r").returncode == 0
    assert qemu_io(image, command="write 0 512").returncode != 0


class StorageDaemon:
    """A qemu-storage-daemon that has the image open for an export."""

    def __init__(self, image: Path, writable: bool) -> None:
        socket_path = image.with_suffix(".qsd")
        pid_file = image.with_suffix(".pid")
        write = "on" if writable else "off"
        self.process = subprocess.Popen(
            [
                "qemu-storage-daemon",
                *("--blockdev", f"driver=file,node-name=f,filename={image},read-only={'off' if writable else 'on'}"),
                *(
                    "--export",
                    f"vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={socket_path},writable={write}",
                ),
                *("--pidfile", str(pid_file)),
            ],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid_file = pid_file

    def wait_until_open(self) -> bool:
        """False if it has been refused."""
        deadline = time.monotonic() + OPEN_S
        while time.monotonic() < deadline:
            if self.pid_file.exists():
                return True
            if self.process.poll() is not None:
                return False
            time.sleep(0.01)
        raise AssertionError("qemu-storage-daemon neither starts nor ends")

    def errors(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def __enter__(self) -> "StorageDaemon":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()


def test_what_a_storage_daemon_serves_is_refused(image: Path) -> None:
    with StorageDaemon(image, writable=True) as daemon:
        assert daemon.wait_until_open()
        assert "is in use: another process writes it" in refusal(image)
        assert "is in use: another process writes it" in refusal(image, read_only=True)


def test_a_storage_daemon_refuses_what_we_serve(image: Path, opened: Opener) -> None:
    opened(image)
    with StorageDaemon(image, writable=True) as daemon:
        assert not daemon.wait_until_open()
        assert "lock" in daemon.errors()


def test_a_reader_of_ours_and_a_reading_storage_daemon_share(image: Path, opened: Opener) -> None:
    with StorageDaemon(image, writable=False) as daemon:
        assert daemon.wait_until_open()
        opened(image, read_only=True)


def test_a_lock_that_is_given_up_in_time_is_waited_for(image: Path) -> None:
    """The last writes of a killed daemon still hold its locks until they have landed."""
    code = (
        "import os, sys, time; from vhostcache.backend import locks;"
        "fd = os.open(sys.argv[1], os.O_RDWR); locks.lock(fd, False); print('locked', flush=True); time.sleep(0.3)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(image)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    FileBackend(str(image), read_only=False, direct=False, lock_wait_s=OPEN_S).close()
    holder.wait(OPEN_S)
    holder.stdout.close()


def test_a_file_system_without_locks_is_refused(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, read_only: bool) -> None:
        raise OSError(errno.ENOLCK, "")

    monkeypatch.setattr(locks, "lock", no_locks)
    assert "cannot be locked" in refusal(image)


# While it is served.


def test_an_image_that_shrank_is_noticed_and_one_that_grew_is_not(image: Path, opened: Opener) -> None:
    backend = opened(image)
    assert backend.check() is None
    os.truncate(image, 2 * MIB)
    assert backend.check() is None
    os.truncate(image, MIB - 512)
    notice = backend.check()
    assert notice is not None
    assert notice.event == "image-shrank"
    assert notice.fields["size_bytes"] == MIB - 512
    assert notice.fields["expected_bytes"] == MIB


def test_looking_leaves_no_garbage_for_a_collector_that_is_off(image: Path, opened: Opener) -> None:
    backend = opened(image)
    backend.check()
    gc.collect()
    gc.disable()
    try:
        for _ in range(100):
            assert backend.check() is None
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_without_statx_an_image_that_shrank_is_noticed_all_the_same(
    image: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_module, "_LIBRARY_STATX", None)
    backend = opened(image)
    assert backend.facts.direct
    os.truncate(image, MIB - 512)
    assert backend.check() is not None


def test_closing_twice_closes_once(image: Path, opened: Opener) -> None:
    backend = opened(image)
    backend.close()
    backend.close()


# Growing.


def test_a_file_grows_by_a_hole_and_stays_locked(image: Path, opened: Opener) -> None:
    backend = opened(image)
    for size in (MIB + 4096, 3 * MIB, 3 * MIB):
        backend.resize(size)
        assert backend.facts.size_bytes == image.stat().st_size == size
    assert image.stat().st_blocks == 0
    assert "is in use" in refusal(image)
    assert backend.check() is None


def test_a_file_that_others_have_grown_is_taken_as_it_is(image: Path, opened: Opener) -> None:
    backend = opened(image)
    os.truncate(image, 2 * MIB)
    with pytest.raises(ImageError, match=f"has {2 * MIB} bytes already; ask for these"):
        backend.resize(MIB + 4096)
    assert backend.facts.size_bytes == MIB
    backend.resize(2 * MIB)
    assert backend.facts.size_bytes == 2 * MIB


def test_a_device_is_not_extended(image: Path, opened: Opener) -> None:
    backend = opened(image)
    backend._is_device = True
    with pytest.raises(ImageError, match=f"has {MIB} bytes; expected {2 * MIB}; a device has to be grown by hand"):
        backend.resize(2 * MIB)
    os.truncate(image, 2 * MIB)  # by hand
    backend.resize(2 * MIB)
    assert backend.facts.size_bytes == 2 * MIB


@pytest.mark.parametrize("call", ["ftruncate", "fsync"])
def test_a_file_that_cannot_grow_stays_as_it_is(
    image: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    backend = opened(image)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(ImageError, match=f"cannot be given {2 * MIB} bytes: no space is left"):
        backend.resize(2 * MIB)
    assert backend.facts.size_bytes == MIB


def test_direct_io_asks_for_a_size_of_its_own(image: Path, opened: Opener) -> None:
    backend = opened(image)
    backend.facts = dataclasses.replace(backend.facts, direct=True, align_io_bytes=4096)
    with pytest.raises(ImageError, match="expected a multiple of 4096"):
        backend.resize(MIB + 512)
    assert image.stat().st_size == MIB
