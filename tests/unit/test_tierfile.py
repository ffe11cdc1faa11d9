import errno
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from vhostcache.errors import CacheError
from vhostcache.tierfile import TierFolder, default_folder

VOLUME, OTHER, FIRST, SECOND = (uuid.UUID(int=n).bytes for n in range(1, 5))


@pytest.fixture
def folder() -> Iterator[Path]:
    """On a tmpfs, as it should be."""
    path = Path(f"/dev/shm/vhostcache-test-{os.getpid()}")
    path.mkdir(0o755)
    yield path
    for child in sorted(path.rglob("*"), reverse=True):
        child.rmdir() if child.is_dir() and not child.is_symlink() else child.unlink()
    path.rmdir()


def refused(path: Path) -> str:
    with pytest.raises(CacheError) as caught:
        TierFolder(str(path))
    return str(caught.value)


def test_the_folder_is_made_for_this_user_alone(folder: Path) -> None:
    tiers = TierFolder(str(folder / "mine"))
    assert (folder / "mine").stat().st_mode & 0o777 == 0o700
    assert tiers.is_memory
    assert TierFolder(str(folder / "mine")).path == tiers.path
    assert default_folder() == f"/dev/shm/vhostcache-{os.geteuid()}"


def test_a_file_is_allocated_private_and_new(folder: Path) -> None:
    tiers = TierFolder(str(folder / "mine"))
    os.close(tiers.create(VOLUME, FIRST, 1 << 20))
    status = os.stat(tiers.file_path(VOLUME, FIRST))
    assert (status.st_size, status.st_mode & 0o777) == (1 << 20, 0o600)
    assert status.st_blocks * 512 >= 1 << 20
    with pytest.raises(CacheError, match="cannot be made"):
        tiers.create(VOLUME, FIRST, 1 << 20)


def test_one_file_is_found_and_the_others_of_the_volume_are_removed(folder: Path) -> None:
    tiers = TierFolder(str(folder / "mine"))
    for volume, tier in ((VOLUME, FIRST), (VOLUME, SECOND), (OTHER, FIRST)):
        os.close(tiers.create(volume, tier, 4096))
    found = tiers.open(VOLUME, FIRST)
    assert found is not None
    os.close(found)
    tiers.remove(VOLUME, keep=[SECOND])
    assert tiers.open(VOLUME, FIRST) is None
    assert len(os.listdir(tiers.path)) == 2
    tiers.remove(VOLUME)
    assert os.listdir(tiers.path) == [os.path.basename(tiers.file_path(OTHER, FIRST))]


def test_a_folder_that_others_may_enter_is_refused(folder: Path) -> None:
    assert "has the mode 0755" in refused(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_a_folder_that_another_user_has_put_there_is_refused(
    folder: Path, as_ordinary_user: Callable[[], AbstractContextManager[None]]
) -> None:
    folder.chmod(0o777)
    with as_ordinary_user():
        (folder / "mine").mkdir(0o700)
    assert "belongs to user 65534" in refused(folder / "mine")


def test_a_link_or_a_file_in_the_folders_place_is_refused(folder: Path) -> None:
    (folder / "real").mkdir(0o700)
    (folder / "link").symlink_to(folder / "real")
    assert "is not a folder" in refused(folder / "link")
    (folder / "file").touch()
    assert "is not a folder" in refused(folder / "file")


def test_a_link_in_a_files_place_is_not_followed(folder: Path) -> None:
    tiers = TierFolder(str(folder / "mine"))
    os.symlink("/etc/passwd", tiers.file_path(VOLUME, FIRST))
    with pytest.raises(CacheError, match="too many symbolic links"):
        tiers.open(VOLUME, FIRST)
    with pytest.raises(CacheError, match="cannot be made"):
        tiers.create(VOLUME, FIRST, 4096)


def test_a_tmpfs_that_is_too_small_is_one_line_and_leaves_no_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "")

    tiers = TierFolder(str(folder / "mine"))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CacheError, match=r"bytes free; expected 4096 for the RAM tier; use less --ram"):
        tiers.create(VOLUME, FIRST, 4096)
    assert os.listdir(tiers.path) == []


def test_a_folder_on_a_disk_is_told_from_a_tmpfs(tmp_path: Path) -> None:
    tiers = TierFolder(str(tmp_path / "mine"))
    kinds = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if " - tmpfs " in line]
    on_tmpfs = any(tmp_path.stat().st_dev == os.makedev(*map(int, line.split()[2].split(":"))) for line in kinds)
    assert tiers.is_memory == on_tmpfs
