"""Whether a cache file and an image belong together.

Owns the judgement, as a list of cases: who is refused, who starts cold, who may be used as it is. Invariants: a cache
whose dirty data may be the newest is never put aside without being told to, and data of another image, of another time
or from behind a changed image is never served. What is found, what was expected and what to do stand in one line.

An image says by its mark which cache it belongs to (backend/mark.py). Where there can be none (block devices, file
systems without extended attributes) the cache remembers the image by its path and size, and an old copy of a cache
file cannot be told from the real one.

Pure: reads and writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from vhostcache.backend.base import Stamp
from vhostcache.backend.mark import Mark
from vhostcache.cachefile import BLOCK_BYTES, HEAD_BYTES
from vhostcache.cachefile import subject as cache_subject
from vhostcache.errors import CacheError
from vhostcache.log.superblock import Superblock

DISCARD: Final = "or give up what only the cache held: --discard-dirty-data"

# The first byte of a superblock's backend identity; what follows is the image's own word for itself.
_MARKED: Final = b"m"  # the image has carried this cache's mark
_UNMARKED: Final = b"p"


class Action(Enum):
    USE = "the log as it is"
    COLD = "a new log; nothing is lost by that"
    FRESH = "a new log where there is none"


@dataclass(frozen=True)
class Judgement:
    action: Action
    reason: str = ""


@dataclass(frozen=True)
class Image:
    """What is known of an image before it is served."""

    subject: str
    size_bytes: int
    stamp: Stamp
    mark: Mark | None


class RefusedError(CacheError):
    """A start that is refused. `discardable`: it need not be, if its user gives up what only the cache held."""

    def __init__(self, subject: str, found: str, expected: str = "", hint: str = "", discardable: bool = True) -> None:
        super().__init__(subject, found, expected, f"{hint}, {DISCARD}" if discardable else hint)
        self.discardable = discardable


def without_cache(image: Image) -> None:
    """Refuse to serve the image by itself if a cache has newer data."""
    if image.mark is not None and image.mark.dirty:
        raise RefusedError(
            image.subject,
            f"its newest data is in a cache (uuid {image.mark.uuid.hex()}, epoch {image.mark.epoch})",
            "to be opened together with that",
            "start with its --cache, or write it back with `vhostcache drain`",
        )


def with_new_cache(image: Image, path: str) -> Judgement:
    """There is no cache file yet, or an empty one."""
    if image.mark is not None and image.mark.dirty:
        raise RefusedError(
            cache_subject(path),
            "does not exist, or is empty",
            f"the cache with the newest data of {image.subject} (uuid {image.mark.uuid.hex()}, "
            f"epoch {image.mark.epoch})",
            "find that file",
        )
    return Judgement(Action.FRESH)


def no_cache_file(path: str) -> RefusedError:
    """What stands there is neither empty nor a cache."""
    return RefusedError(
        cache_subject(path),
        "holds something that is not a vhostcache cache, or neither of its superblocks can be read",
        "a cache file, or a new name",
        "choose another file; if it was a cache: `vhostcache check` says more",
        discardable=False,
    )


def with_cache(image: Image, path: str, size_bytes: int, superblock: Superblock) -> Judgement:
    """What becomes of a cache file that has a superblock. RefusedError: nothing, until somebody decides."""
    dirty = may_be_dirty(superblock)
    _belongs(image, path, superblock)
    needed = HEAD_BYTES + superblock.ring_blocks * BLOCK_BYTES
    if size_bytes < needed:
        raise RefusedError(
            cache_subject(path),
            f"is {size_bytes} bytes large",
            f"{needed}",
            "it has been truncated: give it its size back from a copy",
        )
    changed = _change(image, superblock)
    if not changed:
        return Judgement(Action.USE)
    if not dirty:
        return Judgement(Action.COLD, f"{image.subject} {changed}")
    raise RefusedError(
        image.subject,
        changed,
        f"as it was left to its cache '{path}', which has data that is not in it",
        "restore the image",
    )


def may_be_dirty(superblock: Superblock) -> bool:
    """Whether the log may hold what the image does not have."""
    return not (superblock.clean and superblock.clean_address >= superblock.durable_address)


def backend_identity(image: Image, uuid: bytes) -> bytes:
    """For the superblock of the cache with this uuid."""
    marked = image.mark is not None and image.mark.uuid == uuid
    return (_MARKED if marked else _UNMARKED) + image.stamp.identity


def _belongs(image: Image, path: str, superblock: Superblock) -> None:
    """To this image, and at this time."""
    mark, known = image.mark, superblock.backend_identity
    if mark is None:
        # Its mark may be gone with the file that was replaced at this path: that is a change, not another image.
        if known[1:] != image.stamp.identity:
            raise _foreign(image, path)
        return
    if mark.uuid != superblock.uuid:
        if known[1:] != image.stamp.identity:
            raise _foreign(image, path)
        raise RefusedError(
            cache_subject(path),
            f"has the uuid {superblock.uuid.hex()}",
            f"{mark.uuid.hex()}, which {image.subject} has been used with since",
            "use that cache file",
            discardable=mark.dirty or may_be_dirty(superblock),
        )
    if mark.epoch > superblock.epoch:
        raise RefusedError(
            cache_subject(path),
            f"is an old copy (epoch {superblock.epoch})",
            f"epoch {mark.epoch}, with which {image.subject} was last used",
            "use the newer one",
        )


def _foreign(image: Image, path: str) -> RefusedError:
    return RefusedError(
        cache_subject(path),
        "belongs to another image",
        f"the cache of {image.subject}, or a new name",
        "choose another file; if the image has only been moved and cannot be marked, move it back",
        discardable=False,
    )


def _change(image: Image, superblock: Superblock) -> str:
    """How the image differs from what the cache left behind; empty if it does not."""
    if superblock.backend_size_bytes != image.size_bytes:
        return f"has {image.size_bytes} bytes instead of {superblock.backend_size_bytes}"
    if superblock.backend_identity[:1] == _MARKED and image.mark is None:
        return "has lost the mark of its cache: it has been replaced, or used without it"
    left = superblock.backend_mtime_ns if superblock.clean else 0
    if left and left != image.stamp.mtime_ns:
        return "has been changed since it was last used with its cache"
    return ""
