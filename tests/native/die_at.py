"""Runs vhostcache and kills it before a step of a start or an end: `die_at.py COUNT ARGUMENTS...`.

Steps are what changes files outside the loop: blocks of the cache file, its fdatasyncs, the image's mark, RAM-tier
files. With a COUNT that is not reached it runs to its end.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

from vhostcache import cli
from vhostcache.backend import mark
from vhostcache.cachefile import CacheFile
from vhostcache.tierfile import TierFolder

left = int(sys.argv[1])


def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    def step(*arguments: Any, **options: Any) -> Any:
        global left
        left -= 1
        if left == 0:
            os._exit(9)
        return function(*arguments, **options)

    return step


for owner, names in (
    (CacheFile, ("write", "sync", "allocate")),
    (TierFolder, ("create", "remove")),
    (mark, ("write", "remove")),
    (os, ("pwrite",)),
):
    for name in names:
        setattr(owner, name, counted(getattr(owner, name)))

cli.main(sys.argv[2:])
