import errno
import fcntl
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vhostcache import cachefile
from vhostcache.cachefile import CacheFile
from vhostcache.errors import CacheError

MIB = 1 << 20
SIZE = 64 * MIB


def refused(path: Path, **options: float) -> str:
    with pytest.raises(CacheError) as caught:
        CacheFile(str(path), lock_wait_s=0.0, **options)  # type: ignore[arg-type]
    return str(caught.value)


def test_a_new_file_is_allocated_private_blank_and_locked(tmp_path: Path) -> None:
    path = tmp_path / "vda.cache"
    with CacheFile.create(str(path), SIZE) as cache:
        status = path.stat()
        assert (status.st_size, status.st_mode & 0o777) == (SIZE, 0o600)
        assert status.st_blocks * 512 >= SIZE
        assert not cache.is_sparse
        assert cache.is_blank
        assert cache.size_bytes == SIZE
        assert "is in use by another process" in refused(path)
    CacheFile(str(path)).close()


def extents_never_written(path: Path) -> int:
    found = subprocess.run(["filefrag", "-v", str(path)], capture_output=True, text=True, check=False).stdout
    return found.count("unwritten")


def test_a_new_file_can_be_written_with_zeroes_where_it_never_was(tmp_path: Path) -> None:
    path = tmp_path / "vda.cache"
    told: list[tuple[int, int]] = []
    with CacheFile.create(str(path), SIZE) as cache:
        if not extents_never_written(path):
            pytest.skip("this file system allocates written blocks, or does not tell")
        cache.write(8 * MIB, b"precious" * 512)
        cache.sync()
        assert cache.prewrite(0.0, lambda done, of: None) == SIZE - 4096
        assert cache.prewrite(60.0, lambda done, of: told.append((done, of))) == 0
        assert not extents_never_written(path)
        assert told[-1] == (SIZE - 4096, SIZE - 4096)
        assert cache.read(8 * MIB, 8192) == b"precious" * 512 + bytes(4096)
        assert cache.is_blank
        assert cache.prewrite(60.0, lambda done, of: None) == 0


def test_an_existing_file_is_never_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(CacheError):
        CacheFile.create(str(path), SIZE)
    assert path.read_text() == "data"


def test_a_file_that_has_no_room_is_one_line_and_is_gone_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CacheError, match="cannot be allocated: no space is left"):
        CacheFile.create(str(tmp_path / "vda.cache"), SIZE)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"the folder '.*/none' does not exist"):
        CacheFile.create(str(tmp_path / "none" / "vda.cache"), SIZE)


def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is not a file" in refused(tmp_path / "pipe")
    assert "is not a file" in refused(tmp_path)
    assert "does not exist" in refused(tmp_path / "none")


def test_a_dying_predecessor_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "vda.cache"
    first = CacheFile.create(str(path), SIZE)
    timer = threading.Timer(0.3, first.close)
    timer.start()
    began = time.monotonic()
    CacheFile(str(path)).close()
    assert time.monotonic() - began > 0.1
    timer.join()


def test_the_lock_is_on_the_descriptor_that_does_the_io_and_dies_with_the_last_of_it(tmp_path: Path) -> None:
    path = tmp_path / "vda.cache"
    CacheFile.create(str(path), SIZE).close()
    code = (
        "import sys, os, time; from vhostcache.cachefile import CacheFile; c = CacheFile(sys.argv[1]);"
        "os.set_inheritable(c.descriptor, True); import subprocess;"
        "h = subprocess.Popen(['sleep', '30'], pass_fds=[c.descriptor]); print(h.pid, flush=True); time.sleep(30)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    helper = int(owner.stdout.readline())
    try:
        owner.kill()
        owner.wait()
        assert "is in use" in refused(path), "a helper of the dead daemon may still write"
    finally:
        os.kill(helper, 9)
        owner.stdout.close()
    CacheFile(str(path)).close()


def test_readers_share_and_a_reader_keeps_a_writer_out(tmp_path: Path) -> None:
    path = tmp_path / "vda.cache"
    CacheFile.create(str(path), SIZE).close()
    with CacheFile(str(path), read_only=True), CacheFile(str(path), read_only=True):
        assert "is in use" in refused(path)


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 4096), (4096, 3 * MIB), (1, 5), (4095, 2), (SIZE - 4096, 4096), (SIZE - 1, 1), (8192, 0)]
)
def test_any_range_can_be_read(tmp_path: Path, offset: int, size: int) -> None:
    data = bytes(range(256)) * (4 * MIB // 256)
    with CacheFile.create(str(tmp_path / "vda.cache"), SIZE) as cache:
        cache.write(0, data)
        cache.write(SIZE - 4096, data[:4096])
        cache.sync()
        assert not cache.is_blank
        expected = data + bytes(SIZE - len(data) - 4096) + data[:4096]
        assert cache.read(offset, size) == expected[offset : offset + size]


def test_reading_past_the_end_says_where_the_end_is(tmp_path: Path) -> None:
    path = tmp_path / "vda.cache"
    with CacheFile.create(str(path), SIZE) as cache:
        os.truncate(path, 10 * 4096)
        with pytest.raises(CacheError, match="ends at byte 40960"):
            cache.read(9 * 4096, 8192)


def test_a_file_with_holes_is_recognised_and_can_be_allocated_again(tmp_path: Path) -> None:
    path = tmp_path / "vda.cache"
    with path.open("wb") as file:
        file.truncate(SIZE)
    with CacheFile(str(path)) as cache:
        assert cache.is_sparse
        cache.allocate(SIZE)
        assert not cache.is_sparse


def test_a_file_system_without_direct_io_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cachefile, "direct_alignment", lambda descriptor: None)
    with CacheFile.create(str(tmp_path / "vda.cache"), SIZE) as cache:
        assert [warning.event for warning in cache.warnings] == ["no-direct-io"]
        assert not fcntl.fcntl(cache.descriptor, fcntl.F_GETFL) & os.O_DIRECT
        cache.write(4096, b"x" * 4096)
        assert cache.read(4096, 4096) == b"x" * 4096


def test_closing_lets_go_of_the_lock_even_if_the_description_lives_on(tmp_path: Path) -> None:
    path = tmp_path / "vda.cache"
    cache = CacheFile.create(str(path), SIZE)
    other = os.dup(cache.descriptor)
    cache.close()
    cache.close()
    with CacheFile(str(path), lock_wait_s=0.0):
        request = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        found = struct.unpack("hhqqi4x", fcntl.fcntl(other, fcntl.F_OFD_GETLK, request))
        assert found[0] == fcntl.F_WRLCK
    os.close(other)
