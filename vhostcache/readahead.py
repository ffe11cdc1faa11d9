"""Readahead: what a sequential stream will ask for next, fetched from the backend before it does.

Owns the streams that are being watched and the fills that were begun for them. A stream is reads that follow one
another, or nearly: who appends compressed clusters reads the sectors at their ends, and what comes over several queues
is not in order. From the third on its window is fetched, which doubles as long as the stream goes on, up to a limit.
What has been fetched waits in its slots, outside the map and so outside the eviction queues: it answers the stream's
reads, and is thrown away when the stream has passed it, has stopped, or somebody needs the slots. Fills.by_block names
it meanwhile, so a write poisons it like any fill. It never decides what else is read.
"""

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final

from vhostcache import operations as op
from vhostcache.fill import Fill, Fills

STREAMS_MAX: Final = 16
BEGINS_AT: Final = 3
"""Reads in a row that make a stream."""
FIRST_BLOCKS: Final = 32
"""The window at first, 128 KiB, if the reads are not larger."""
PIECE_BLOCKS: Final = 64
"""Of one fill: what comes first is to be there first."""
LARGE_BLOCKS: Final = 32
"""Reads of 128 KiB go past RAM."""
NEAR_BLOCKS: Final = 8
"""A read so near to where a stream is belongs to it; so does what a fill may have brought in between, which is not seen
here."""
IDLE_NS: Final = 2_000_000_000
"""A stream that has stopped gives its slots back after this."""


class Stream:
    """`next`: the block behind the farthest that it has read."""

    __slots__ = ("fills", "frontier", "next", "reads", "used_ns", "window")

    def __init__(self) -> None:
        self.next = 0
        self.reads = 0
        self.window = 0
        self.frontier = 0
        """Fetched, or being fetched, up to here."""
        self.fills: deque[Fill] = deque()
        self.used_ns = 0


class Readahead:
    """`fetch(first, count)` begins a fill of blocks that only the backend has, or does not: None."""

    def __init__(
        self,
        fills: Fills,
        window_max: int,
        held_max: int,
        fill_blocks: int,
        end: Callable[[], int],
        fetch: Callable[[int, int], Fill | None],
    ) -> None:
        self._fills = fills
        self._window_max = window_max
        self._held_max = held_max
        self._near = fill_blocks + NEAR_BLOCKS
        self._end = end
        self._fetch = fetch
        self._streams: OrderedDict[int, Stream] = OrderedDict()
        """By their next block, in units of `_near`; the one that was used last comes last."""
        self.held = 0
        """Blocks fetched or being fetched, and not given back."""
        self.counters = {"readahead_blocks": 0, "readahead_wasted_blocks": 0}

    def read(self, first: int, end: int, now_ns: int, deep: bool) -> None:
        """Blocks `first` .. `end - 1` are asked for now. `deep`: the guest has others under way besides."""
        stream = self._find(first)
        if stream is None:
            stream = Stream()
            if len(self._streams) >= STREAMS_MAX:
                self._drop(self._streams.popitem(last=False)[1])
        stream.reads += first >= stream.next
        stream.next = max(stream.next, end)
        stream.used_ns = now_ns
        other = self._streams.pop(stream.next // self._near, None)
        if other is not None:  # they have met
            if other.frontier > stream.frontier:
                stream, other = other, stream
            self._drop(other)
        self._streams[stream.next // self._near] = stream
        while stream.fills and self._is_passed(stream.fills[0], first):
            self._give_back(stream.fills.popleft())
        # A guest that has its next large reads under way already reads ahead by itself, and without a copy.
        if stream.reads >= BEGINS_AT and not (deep and end - first >= LARGE_BLOCKS):
            self._advance(stream, stream.next, end - first)

    def _find(self, first: int) -> Stream | None:
        """The stream that this read belongs to, no longer among the others."""
        near = self._near
        for key in range((first - near) // near, (first + near) // near + 1):
            stream = self._streams.get(key)
            if stream is not None and -near <= first - stream.next <= near:
                del self._streams[key]
                return stream
        return None

    def _is_passed(self, fill: Fill, first: int) -> bool:
        count = len(fill.slots)
        end = fill.first + count
        if end > first:
            return False
        # What has been read, somebody who is a little behind may want again, but not more than others want room.
        return end <= first - self._near or (len(fill.read) == count and 2 * self.held > self._held_max)

    def _advance(self, stream: Stream, position: int, request_blocks: int) -> None:
        frontier = max(stream.frontier, position)
        if frontier - position > stream.window // 2:
            return
        stream.window = min(max(2 * stream.window, 4 * request_blocks, FIRST_BLOCKS), self._window_max)
        target = min(position + stream.window, self._end())
        while frontier < target:
            count = min(PIECE_BLOCKS, target - frontier, self._held_max - self.held)
            if count <= 0:
                break
            fill = self._fetch(frontier, count)
            if fill is not None:
                fill.ahead = True
                stream.fills.append(fill)
                self.held += len(fill.slots)
                self.counters["readahead_blocks"] += len(fill.slots)
                frontier = fill.first + len(fill.slots)
            else:
                frontier += count
        stream.frontier = frontier

    def expire(self, now_ns: int) -> int:
        """Give up streams that have stopped; returns when to look again, in ns."""
        streams = self._streams
        while self.held and streams:
            key, stream = next(iter(streams.items()))
            if now_ns < stream.used_ns + IDLE_NS:
                return stream.used_ns + IDLE_NS
            del streams[key]
            self._drop(stream)
        return op.NEVER

    def drop_all(self) -> None:
        """Give back everything, and watch for new streams."""
        while self._streams:
            self._drop(self._streams.popitem()[1])

    def _drop(self, stream: Stream) -> None:
        while stream.fills:
            self._give_back(stream.fills.popleft())

    def _give_back(self, fill: Fill) -> None:
        self.held -= len(fill.slots)
        self.counters["readahead_wasted_blocks"] += len(fill.slots) - len(fill.read)
        self._fills.give_back(fill)
