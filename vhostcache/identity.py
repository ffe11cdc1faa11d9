"""Whether a cache file and an image belong together.

Owns the judgement, as a list of cases: who is refused, who starts cold, who may be used as it is. Invariants: a cache
whose dirty data may be the newest is never put aside without being told to, and data of another image, of another time
or from behind a changed image is never served. What is found, what was expected and what to do stand in one line.

An image says by its mark which cache it belongs to (backend/mark.py). Where there can be none (block devices, file
systems without extended attributes) the cache remembers the image by its path and size, and an old copy of a cache
file cannot be told from the real one.

Size and time of the image, and the cache file itself, are judged by log/recovery.py. Pure: reads and writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from vhostcache.backend.base import Stamp
from vhostcache.backend.mark import Mark
from vhostcache.cachefile import subject as cache_subject
from vhostcache.errors import CacheError
from vhostcache.log.recovery import BackendFacts
from vhostcache.log.superblock import Superblock

_ACCEPT: Final = "`vhostcache drain --accept-changed-image`"
DISCARD: Final = "or give up what only the cache held: --discard-dirty-data"


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
    can_be_marked: bool


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


def with_cache(image: Image, path: str, superblock: Superblock, accept_changed: bool = False) -> Judgement:
    """What becomes of a cache file that has a superblock. RefusedError: nothing, until somebody decides.

    `accept_changed`: an image without a mark is taken as it is; one with an old mark is not, for it lacks what was
    written back since."""
    _belongs(image, path, superblock)
    if accept_changed and image.mark is None:
        return Judgement(Action.USE)
    if image.mark is not None and image.mark.uuid != superblock.uuid:
        return Judgement(Action.COLD, f"{image.subject} has been used with another cache since")
    changed = _change(image, superblock)
    if not changed:
        return Judgement(Action.USE)
    if not may_be_dirty(superblock):
        return Judgement(Action.COLD, f"{image.subject} {changed}")
    raise RefusedError(
        image.subject,
        changed,
        f"as it was left to '{path}', which has data that is not in it",
        "restore the image" + (", or write it there as it is now: " + _ACCEPT if image.mark is None else ""),
    )


def after_others(image: Image, superblock: Superblock) -> Judgement:
    """Of a cache that could be used, but for another daemon that may have had the image since: only a mark can tell."""
    if image.can_be_marked or may_be_dirty(superblock):
        return Judgement(Action.USE)
    return Judgement(Action.COLD, f"nothing tells whether {image.subject} has been in other hands since")


def may_be_dirty(superblock: Superblock) -> bool:
    """Whether the log may hold what the image does not have."""
    return not (superblock.clean and superblock.clean_address >= superblock.durable_address)


def backend_facts(image: Image, superblock: Superblock | None) -> BackendFacts:
    """For recovery, which compares them: an image with the cache's mark belongs to it wherever it has moved."""
    marked = superblock is not None and image.mark is not None and image.mark.uuid == superblock.uuid
    known = superblock.backend_identity if marked and superblock is not None else image.stamp.identity
    return BackendFacts(known, image.size_bytes, image.stamp.mtime_ns, marked)


def _change(image: Image, superblock: Superblock) -> str:
    """What its mark says of an image that is not as the cache has left it; empty: nothing."""
    if image.mark is None:
        # It is marked before the first epoch begins.
        if image.can_be_marked and superblock.epoch > 0:
            return "has lost the mark of its cache: it has been replaced, or used without it"
        return ""
    # A start that dies may leave the mark behind the superblock. An orderly end cannot.
    if superblock.clean and image.mark.epoch < superblock.epoch:
        return f"is an old copy: its mark says epoch {image.mark.epoch}, its cache {superblock.epoch}"
    return ""


def _belongs(image: Image, path: str, superblock: Superblock) -> None:
    """To this image, and at this time."""
    mark, known = image.mark, superblock.backend_identity
    if mark is None:
        # Its mark may be gone with the file that was replaced at this path: that is a change, not another image.
        if known != image.stamp.identity:
            raise _foreign(image, path)
        return
    if mark.uuid != superblock.uuid:
        if known != image.stamp.identity:
            raise _foreign(image, path)
        if not mark.dirty and not may_be_dirty(superblock):
            return
        raise RefusedError(
            cache_subject(path),
            f"has the uuid {superblock.uuid.hex()}",
            f"{mark.uuid.hex()}, which {image.subject} has been used with since",
            "use that cache file",
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
        "choose another file; if it is the same image at another path or address, `vhostcache drain --accept-moved` "
        "writes the cache back to it",
        discardable=False,
    )
