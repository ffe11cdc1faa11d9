"""Losses: blocks of which the log had the newest version, and has it no more.

A block that fails its checksum twice when it is to be destaged has rotted, and one that cannot be read is given up at
last (unreadable.py). Nobody has its data any more; but that it is lost must not be forgotten, or its reads would show
what the backend still has. So the log says so: an extent of kind LOST takes the place of the data. From then on reads
of the block are answered with an error, also after a restart, until the guest overwrites it; destaging has nothing to
do with it, and the log's tail goes on past the data.

Invariants: an extent LOST is appended only while nothing newer is known of its block; the clean address never passes
the newest such extent of a block that is still lost. When the log has gone on for a part of its ring, the extent is
appended again. A little room in the ring is for losses alone: the log may be full because of what has rotted.
"""

from itertools import islice
from typing import Final

from vhostcache.backend_io import BackendIo
from vhostcache.log import format as fmt
from vhostcache.log.index import LogIndex
from vhostcache.log.writer import INTERNAL, ZEROES_MAX, LogWriter
from vhostcache.map import CLEAN, PINNED, Map

MOVE_SHARE: Final = 4
"""A loss is appended again when the log has gone on for a fourth of its ring."""


class Losses:
    """`record` when something was found lost, `schedule` once a turn while anything is."""

    def __init__(self, block_map: Map, io: BackendIo, index: LogIndex, writer: LogWriter) -> None:
        self._map = block_map
        self._io = io
        self._index = index
        self._writer = writer
        self._moving_seq = 0
        """The record in which losses are being appended again."""

    def record(self, block: int, address: int) -> int | None:
        """The block's version at this log address is lost. Returns the record that has to be durable before that
        address may be forgotten; 0: it can be read after all; None: there is no room now, ask again."""
        writer, block_map = self._writer, self._map
        slot = block_map.where.get(block)
        if self._index.lookup(block) != address << 1 or (
            slot is not None and block_map.state[slot] not in (CLEAN, PINNED)
        ):
            writer.commit(INTERNAL)
            return writer.accepted_seq  # something newer is on its way
        if slot is not None:
            return 0
        if not writer.take_room(0, 1, 1, urgent=True):
            return None
        record = writer.open
        assert record is not None
        words = record.zeroes
        last = fmt.split_extent(words[-1]) if words else (0, 0, fmt.ZERO)
        if last[2] == fmt.LOST and last[0] + last[1] == block:
            words[-1] = fmt.extent(last[0], last[1] + 1, fmt.LOST)
        else:
            words.append(fmt.extent(block, 1, fmt.LOST))
        writer.published += 1
        self._io.publish(record.seq, (fmt.extent(block, 1, fmt.LOST), 0))
        writer.commit(INTERNAL)
        return record.seq

    def schedule(self) -> None:
        """Append again what the tail would come to otherwise."""
        index, writer = self._index, self._writer
        index.forget_overwritten(writer.durable_address)
        if not index.lost or writer.durable_seq < self._moving_seq:
            return
        if writer.head - next(iter(index.lost.values())) < writer.ring_blocks // MOVE_SHARE:
            return
        for block, address in list(islice(index.lost.items(), ZEROES_MAX)):
            seq = self.record(block, address)
            if seq is None:
                break
            self._moving_seq = max(self._moving_seq, seq)
