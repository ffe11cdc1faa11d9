"""Whether the cache device reads at all, asked when it has not read something: see unreadable.py.

Reads a few blocks of the log, one after the other, into a slot of the asker's. Whatever is there will do: a checksum
that is wrong says that something has been read. It keeps nothing from being overwritten meanwhile.
"""

from collections.abc import Callable

from vhostcache.backend_io import BackendIo
from vhostcache.log import format as fmt

EBADMSG = 74


class Probe:
    """Tells `then` which of these log addresses could be read, and which not; `others` are asked when none could."""

    __slots__ = ("_addresses", "_bad", "_good", "_io", "_others", "_ring_blocks", "_slot", "_then")

    def __init__(
        self,
        io: BackendIo,
        ring_blocks: int,
        addresses: list[int],
        others: list[int],
        slot: int,
        then: Callable[[list[int], list[int]], None],
    ) -> None:
        self._io = io
        self._ring_blocks = ring_blocks
        self._addresses = addresses
        self._others = others
        self._slot = slot
        self._then = then
        self._good: list[int] = []
        self._bad: list[int] = []
        self._next()

    def _next(self) -> None:
        if not (self._addresses or self._good):
            self._addresses, self._others = self._others, []
        if self._addresses:
            offset = fmt.offset_bytes(self._addresses[-1], self._ring_blocks)
            self._io.log_read(self._io.begin(self), offset, [self._slot])
        else:
            self._then(self._good, self._bad)

    def io_done(self, result: int) -> None:
        (self._good if result in (0, -EBADMSG) else self._bad).append(self._addresses.pop())
        self._next()
