"""Runs vhostcache and kills it before a step of a start or an end: `die_at.py COUNT ARGUMENTS...`.

Steps are what changes files outside the loop: blocks of the cache file, its fdatasyncs, the image's mark, RAM-tier
files. With a COUNT that is not reached it runs to its end. `resize:COUNT` counts the steps of a resize instead.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

from vhostcache import cli, commands
from vhostcache.backend import mark, opening
from vhostcache.backend.file import FileBackend
from vhostcache.cachefile import CacheFile
from vhostcache.engine import Engine
from vhostcache.log.checkpoint import Checkpointer
from vhostcache.tierfile import TierFolder

what, _, count = sys.argv[1].rpartition(":")
left = int(count)


def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    def step(*arguments: Any, **options: Any) -> Any:
        global left
        left -= 1
        if left == 0:
            os._exit(9)
        return function(*arguments, **options)

    return step


STEPS: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (CacheFile, ("write", "sync", "allocate")),
    (TierFolder, ("create", "remove")),
    (mark, ("write", "remove")),
    (os, ("pwrite",)),
)


class Resizing(FileBackend):
    """Its fsync and its end are steps as well."""

    def resize(self, size_bytes: int) -> None:
        fsync, os.fsync = os.fsync, counted(os.fsync)
        try:
            super().resize(size_bytes)
        finally:
            os.fsync = fsync


def growing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of superblocks, those that have another size of the image than before."""
    step = counted(function)

    def write(self: Checkpointer, offset_bytes: int) -> None:
        grows = self.backend_size_bytes != self.superblock.backend_size_bytes
        (step if grows else function)(self, offset_bytes)

    return write


if what == "resize":
    setattr(Checkpointer, "_write", growing(Checkpointer._write))  # noqa: B010 - mypy
    opening.FileBackend = Resizing  # type: ignore[misc]
    STEPS = (
        (os, ("ftruncate",)),
        (commands.Commands, ("_backend_has_grown",)),
        (Engine, ("grow_volume",)),
    )

for owner, names in STEPS:
    for name in names:
        setattr(owner, name, counted(getattr(owner, name)))

cli.main(sys.argv[2:])
