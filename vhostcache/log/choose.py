"""Which object is destaged next, in the policy `merged`.

Owns no object: the index has them, in the order in which they became dirty, and in a queue from whose front they are
looked at. An object that has just been written is left alone for `destage_after`, but no longer than HOT_FACTOR times
that since it became dirty: a hot object is neither rewritten for ever nor starved. When the log needs room the oldest
goes first, whatever it is, for it holds the tail.
"""

from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Final

from vhostcache.log.index import LogIndex

HOT_FACTOR: Final = 12
"""An object that is written all the time is destaged after so many times `destage_after` (a minute)."""
LOOKS: Final = 32
"""Objects looked at in one turn, about 0.3 ms."""
SAMPLES: Final = 8
"""How far the log had come is known for so many moments within `destage_after`."""
NOBODY: Final = -1


class Chooser:
    """`look` once a turn, then one of the others. `waits`: says of an object that it can't be destaged now."""

    __slots__ = ("_filled_next", "_history", "_index", "_neighbour", "_now_ns", "_quiet_below", "_waits")

    def __init__(self, index: LogIndex, waits: Callable[[int], bool], durable: int) -> None:
        self._index = index
        self._waits = waits
        self._history: deque[tuple[int, int]] = deque([(0, durable)])
        """(time, durable address then)"""
        self._quiet_below = durable
        """What is durable below has not been written for `destage_after`."""
        self._now_ns = 0
        self._filled_next = True
        self._neighbour = NOBODY

    def look(self, now_ns: int, durable: int, after_ns: int) -> None:
        """The log is durable up to there now."""
        self._now_ns = now_ns
        history = self._history
        step_ns = max(1, after_ns // SAMPLES)
        if len(history) > 1 and history[-1][0] // step_ns == now_ns // step_ns:
            history[-1] = (now_ns, durable)
        else:
            history.append((now_ns, durable))
        while len(history) > 1 and history[1][0] <= now_ns - after_ns:
            history.popleft()
        self._quiet_below = history[0][1]

    def _is_left(self, number: int, after_ns: int, whole: bool) -> bool:
        """Whether it had better wait: it is being written, or, where whole objects are wanted, not full."""
        index = self._index
        if self._now_ns - index.since_ns[number] >= HOT_FACTOR * after_ns:
            return False
        if index.newest(number) >= self._quiet_below:
            return True
        return whole and index.count_dirty(number) < index.object_blocks

    def aged(self, after_ns: int, whole: bool, waiting: int) -> tuple[int, int]:
        """One that is old enough, or NOBODY, and when to look again; `waiting` may not be destaged now."""
        index, now_ns = self._index, self._now_ns
        again_ns = now_ns + 100_000_000
        for number in list(islice(index.queue, LOOKS + waiting)):
            due_ns = index.queue[number] + after_ns
            if now_ns < due_ns:
                return NOBODY, due_ns
            if self._waits(number):
                continue
            if not self._is_left(number, after_ns, whole):
                return number, now_ns
            index.put_off(number, now_ns)
            again_ns = now_ns
        return NOBODY, again_ns

    def pressed(self, after_ns: int, whole: bool, waiting: int, room: bool) -> int:
        """One, or NOBODY. `room`: the log has some left, so it need not be the oldest."""
        if room:
            number = self._worthwhile(after_ns, whole, waiting)
            if number != NOBODY:
                self._neighbour = number + 1
                return number
        for number in islice(self._index.dirty, LOOKS + waiting):
            if not self._waits(number):
                return number
        return NOBODY

    def _worthwhile(self, after_ns: int, whole: bool, waiting: int) -> int:
        """In turn one that is dirty as a whole and the one behind the last, or else one that nobody has written of
        late."""
        index = self._index
        self._filled_next = not self._filled_next
        if not self._filled_next:
            for number in islice(index.filled, LOOKS):
                if number in index.dirty and not self._waits(number):
                    return number
        number = self._neighbour
        if number in index.dirty and not self._waits(number) and not self._is_left(number, after_ns, whole):
            return number
        for number in list(islice(index.queue, LOOKS + waiting)):
            looked_ns = index.queue[number]
            if looked_ns > index.since_ns[number] and self._now_ns - looked_ns < after_ns:
                break  # from here on all of them have been put off of late
            if self._waits(number):
                continue
            if not self._is_left(number, after_ns, whole):
                return number
            index.put_off(number, self._now_ns)
        return NOBODY
