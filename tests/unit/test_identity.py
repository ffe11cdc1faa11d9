"""Which cache may be used with which image: one case a test, in the words that its user reads."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from vhostcache import identity
from vhostcache.backend import mark
from vhostcache.backend.base import Stamp
from vhostcache.backend.file import FileBackend
from vhostcache.backend.mark import Mark
from vhostcache.errors import ImageError
from vhostcache.identity import Action, Image, Judgement, RefusedError
from vhostcache.log.superblock import Superblock

MIB = 1 << 20
UUID, OTHER = bytes(range(16)), bytes(range(1, 17))
RING = (63 * MIB) // 4096
PLAIN = Image("image 'a'", 64 * MIB, Stamp(b"the path of a", 1000), None, can_be_marked=True)
MARKED = replace(PLAIN, mark=Mark(UUID, 7, dirty=True))
CLEAN_MARK = replace(PLAIN, mark=Mark(UUID, 7, dirty=False))
CLEAN = Superblock(
    uuid=UUID,
    backend_identity=PLAIN.stamp.identity,
    backend_size_bytes=64 * MIB,
    backend_mtime_ns=1000,
    ring_blocks=RING,
    epoch=7,
    open_seq=5,
    tail_address=RING + 10,
    tail_seq=5,
    clean_address=RING + 30,
    durable_address=RING + 30,
    durable_seq=9,
    clean=True,
)
DIRTY = replace(CLEAN, clean_address=RING + 20)  # closed in good order, with data that is not in the image
CRASHED = replace(DIRTY, clean=False, backend_mtime_ns=0)


def judge(image: Image, superblock: Superblock) -> Judgement:
    return identity.with_cache(image, "c", superblock)


def refused(image: Image, superblock: Superblock, discardable: bool = True) -> str:
    with pytest.raises(RefusedError) as caught:
        judge(image, superblock)
    assert caught.value.discardable == discardable
    assert ("--discard-dirty-data" in str(caught.value)) == discardable
    return str(caught.value)


def test_an_image_without_its_mark_may_be_accepted_and_an_old_copy_may_not() -> None:
    assert "drain --accept-changed-image" in refused(PLAIN, DIRTY)
    assert identity.with_cache(PLAIN, "c", DIRTY, accept_changed=True).action is Action.USE
    old = replace(MARKED, mark=Mark(UUID, 6, dirty=True))
    assert "--accept-changed-image" not in refused(old, DIRTY)
    with pytest.raises(RefusedError, match="is an old copy"):
        identity.with_cache(old, "c", DIRTY, accept_changed=True)
    other = replace(PLAIN, stamp=Stamp(b"another path", 1000))
    with pytest.raises(RefusedError, match="another image"):
        identity.with_cache(other, "c", DIRTY, accept_changed=True)


@pytest.mark.parametrize("superblock", [CLEAN, DIRTY, CRASHED])
def test_a_cache_and_its_image_are_used_together(superblock: Superblock) -> None:
    for image in (MARKED, CLEAN_MARK):
        assert judge(image, superblock).action is Action.USE


def test_an_image_that_has_moved_is_known_by_its_mark() -> None:
    moved = replace(MARKED, stamp=Stamp(b"another path", 1000))
    assert judge(moved, CRASHED).action is Action.USE


def test_where_there_are_no_marks_the_path_decides() -> None:
    device = replace(PLAIN, can_be_marked=False)
    assert judge(device, DIRTY).action is Action.USE
    moved = replace(device, stamp=Stamp(b"another path", 1000))
    assert "belongs to another image" in refused(moved, DIRTY, discardable=False)


def test_where_there_are_no_marks_a_cache_that_has_nothing_of_its_own_is_not_believed_after_a_hand_over() -> None:
    device = replace(PLAIN, can_be_marked=False)
    assert identity.after_others(device, CLEAN).action is Action.COLD
    assert identity.after_others(device, CRASHED).action is Action.USE
    assert identity.after_others(CLEAN_MARK, CLEAN).action is Action.USE


def test_recovery_is_told_that_a_marked_image_is_the_one_it_knows() -> None:
    moved = replace(MARKED, stamp=Stamp(b"another path", 1000))
    assert identity.backend_facts(moved, CLEAN).identity == CLEAN.backend_identity
    assert identity.backend_facts(replace(moved, mark=None), CLEAN).identity == b"another path"
    assert identity.backend_facts(moved, None).identity == b"another path"


def test_another_images_cache_is_refused_even_if_dirty_data_may_be_discarded() -> None:
    other = Image("image 'b'", 64 * MIB, Stamp(b"the path of b", 5), Mark(OTHER, 3, dirty=True), True)
    assert "belongs to another image" in refused(other, CLEAN, discardable=False)
    assert "belongs to another image" in refused(replace(other, mark=None), DIRTY, discardable=False)


def test_a_cache_that_the_image_has_given_up_for_another_one_is_refused() -> None:
    image = replace(PLAIN, mark=Mark(OTHER, 3, dirty=True))
    assert f"expected {OTHER.hex()}, which image 'a' has been used with since" in refused(image, CRASHED)
    refused(image, CLEAN)
    refused(replace(PLAIN, mark=Mark(OTHER, 3, dirty=False)), DIRTY)
    assert judge(replace(PLAIN, mark=Mark(OTHER, 3, dirty=False)), CLEAN).action is Action.COLD


def test_an_older_copy_of_the_cache_is_refused() -> None:
    for old in (CLEAN, DIRTY, CRASHED):
        line = refused(MARKED, replace(old, epoch=6))
        assert "is an old copy (epoch 6); expected epoch 7" in line


def test_a_start_that_died_between_superblock_and_mark_is_no_obstacle() -> None:
    assert judge(MARKED, replace(CRASHED, epoch=9)).action is Action.USE


def test_an_older_copy_of_the_image_is_refused_if_the_cache_has_newer_data_and_else_starts_cold() -> None:
    old = replace(PLAIN, mark=Mark(UUID, 6, dirty=True))
    assert "is an old copy: its mark says epoch 6, its cache 7" in refused(old, DIRTY)
    assert judge(old, CLEAN).action is Action.COLD


def test_an_image_that_has_lost_its_mark_has_been_replaced() -> None:
    assert "has lost the mark of its cache" in refused(PLAIN, CRASHED)
    assert judge(PLAIN, CLEAN).action is Action.COLD
    assert judge(PLAIN, replace(CLEAN, epoch=0)).action is Action.USE, "its first start died before it was marked"


def test_an_image_whose_newest_data_is_in_a_cache_is_refused_without_it() -> None:
    for image in (PLAIN, CLEAN_MARK):
        identity.without_cache(image)
        assert identity.with_new_cache(image, "c").action is Action.FRESH
    with pytest.raises(RefusedError, match=f"newest data is in a cache .uuid {UUID.hex()}, epoch 7.*drain"):
        identity.without_cache(MARKED)
    with pytest.raises(RefusedError, match=f"does not exist.*newest data of image 'a' .uuid {UUID.hex()}"):
        identity.with_new_cache(MARKED, "c")


def test_a_foreign_file_is_never_overwritten() -> None:
    assert not identity.no_cache_file("c").discardable


# Marks.


def test_a_mark_is_text_that_can_be_read_again() -> None:
    for dirty in (False, True):
        assert Mark.parse(Mark(UUID, 12, dirty).text()) == Mark(UUID, 12, dirty)
    for text in (
        "",
        "2 x 1 dirty",
        f"1 {UUID.hex()} -1 dirty",
        f"1 {UUID.hex()} 1 red",
        "1 zz 1 dirty",
        "1 00 1 dirty",
    ):
        assert Mark.parse(text) is None


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.img"
    with path.open("wb") as file:
        file.truncate(MIB)
        try:
            os.setxattr(file.fileno(), mark.NAME, b"x")
            os.removexattr(file.fileno(), mark.NAME)
        except OSError:
            pytest.skip("no extended attributes here")
    return path


def test_an_image_keeps_its_mark_and_its_time(image: Path) -> None:
    backend = FileBackend(str(image), False, False)
    assert backend.read_mark() is None
    before = backend.stamp()
    assert backend.write_mark(Mark(UUID, 1, dirty=True))
    backend.close()
    backend = FileBackend(str(image), True, False)
    assert backend.read_mark() == Mark(UUID, 1, dirty=True)
    assert backend.stamp() == before
    backend.close()
    moved = image.rename(image.with_name("b.img"))
    backend = FileBackend(str(moved), False, False)
    assert backend.read_mark() == Mark(UUID, 1, dirty=True)
    assert backend.stamp().identity != before.identity
    backend.write_mark(None)
    backend.write_mark(None)
    assert backend.read_mark() is None
    backend.close()


def test_a_mark_that_nobody_understands_is_refused(image: Path) -> None:
    os.setxattr(image, mark.NAME, b"9 from the future")
    backend = FileBackend(str(image), False, False)
    with pytest.raises(ImageError, match="is '9 from the future'; expected '1 UUID EPOCH dirty' or 'clean'"):
        backend.read_mark()
    backend.close()


def test_a_copy_by_content_does_not_take_the_mark_along(image: Path) -> None:
    os.setxattr(image, mark.NAME, Mark(UUID, 1, dirty=True).text().encode())
    subprocess.run(["cp", image, image.with_name("copy")], check=True)
    backend = FileBackend(str(image.with_name("copy")), False, False)
    assert backend.read_mark() is None
    backend.close()


def test_where_no_mark_can_be_kept_nothing_is_wrong(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "")

    for name in ("setxattr", "getxattr", "removexattr"):
        monkeypatch.setattr(os, name, unsupported)
    backend = FileBackend(str(image), False, False)
    assert backend.read_mark() is None
    assert not backend.write_mark(Mark(UUID, 1, dirty=True))
    backend.write_mark(None)
    backend.close()


def test_links_to_an_image_lead_to_the_same_identity(image: Path) -> None:
    link = image.with_name("link")
    link.symlink_to(image)
    first, second = FileBackend(str(image), True, False), FileBackend(str(link), True, False)
    assert first.stamp().identity == second.stamp().identity
    first.close()
    second.close()
