"""Runs vhostcache, with another pause before the cache device is asked again: `retry_after.py SECONDS ARGUMENTS...`."""

import sys

from vhostcache import cli
from vhostcache.log import destage, unreadable

for module in (unreadable, destage):
    module.RETRY_NS = int(float(sys.argv[1]) * 1_000_000_000)  # type: ignore[misc]

cli.main(sys.argv[2:])
