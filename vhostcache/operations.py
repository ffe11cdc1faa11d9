"""The words of an operation list, as csrc/engine.cdef defines them.

The core speaks to the engine in these numbers only; a test compares each with the engine's own. Word 0 of an operation
is `opcode | (tag or volume) << 8 | argument << 32`.
"""

from typing import Final

IN1: Final = 1
OUT1: Final = 2
IN: Final = 3
OUT: Final = 4
COMPLETE: Final = 5
DROP: Final = 6
SLOT_COPY: Final = 7
SLOT_ZERO: Final = 8
READ: Final = 9
WRITE: Final = 10
READ_DIRECT: Final = 11
FLUSH: Final = 12
ZERO: Final = 13
WRITE_DIRECT: Final = 14
LOG_WRITE: Final = 15
LOG_READ: Final = 16
LOG_READ_DIRECT: Final = 17
LOG_FLUSH: Final = 18
SUPERBLOCK: Final = 19
PUBLISH: Final = 20
LOG1: Final = 21
LOG_SEQ: Final = 22
RETIRE: Final = 23
STORE: Final = 24

GROUPS: Final = 16384
FIRST_SLOT: Final = 3
FAILED_TAG: Final = 1 << 31

REQUEST_READ: Final = 0
REQUEST_WRITE: Final = 1
REQUEST_FLUSH: Final = 2
REQUEST_DISCARD: Final = 3
REQUEST_ZERO: Final = 4
REQUEST_ZERO_UNMAP: Final = 5
REQUEST_KIND_MASK: Final = 255
REQUEST_ALIGNED: Final = 256
REQUEST_DEEP: Final = 512
"""A read beside which the guest has others under way."""

STATUS_OK: Final = 0
STATUS_IOERR: Final = 1
STATUS_UNSUPP: Final = 2

SECTOR_BYTES: Final = 512
BLOCK_BYTES: Final = 4096
BLOCK_SECTORS: Final = 8
NEVER: Final = 1 << 62
"""A deadline that does not come, in nanoseconds."""
