"""The policy `ordered`: one flush interval after the other, from what the records say.

Owns the records that are durable in the log and not yet on the backend, in log order; the *cuts*, which are the log
addresses at which a guest's flush was committed; and the *step* under way: what lies between the address below which
everything is on the backend (`done`) and the end of some record. Invariants:
- no cut lies inside a step, so a step is a part of one flush interval, and what the backend has at any moment is what
  it had at the last cut and some of the writes before the next one;
- a step writes the versions that its records have, not the newest ones: those may belong to a later interval;
- a step begins when the one before is flushed on the backend and both superblocks know it (hazard 17): a step that
  a crash repeats must not undo a later one.

An interval may be cut further, at the end of any record: that is what happens when it is longer than STEP_BLOCKS or the
log is full, and to everything that a start finds, for the log does not say where flushes were. The index has the newest
versions only and is asked for nothing here. It never does I/O.
"""

from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from vhostcache.log import format as fmt

STEP_BLOCKS: Final = 1 << 16
"""A step ends with the record in which it has so many (256 MiB): what is known of them is in memory, 16 MiB."""
GATHERED_BLOCKS: Final = 1024
"""Blocks of records that are looked at in one turn, about 0.3 ms."""
ZERO: Final = 1


class OrderedRecord(NamedTuple):
    """What a record changes."""

    address: int
    end: int
    first: int
    """Address of the first of its blocks."""
    zeroes: tuple[int, ...]
    """Extent words."""
    blocks: "array[int]"
    since_ns: int


class StepObject:
    """What a step changes of an object: values as in the index."""

    __slots__ = ("values", "zero")

    def __init__(self) -> None:
        self.values: dict[int, int] = {}
        """Block -> value."""
        self.zero = 0
        """That of all other blocks; 0: they are not changed."""


class OrderedQueue:
    """`add` each record when it is durable, `cut` at each commit of a guest's flush. Then `begin`, `gather` until it is
    true, `values` of the objects, and `finish` when they are on the backend, durably."""

    def __init__(self, object_shift: int, done: int) -> None:
        self._shift = object_shift
        self._mask = (1 << object_shift) - 1
        self.done = done
        """Everything below this address is on the backend, and durable there."""
        self._records: deque[OrderedRecord] = deque()
        self._cuts: deque[int] = deque()
        self._newest: dict[int, int] = {}
        """Object -> the record that has changed it last."""
        self.running = False
        """A step is under way."""
        self._end = done
        """Of the step, as far as it has been gathered."""
        self._gathered = False
        self._blocks = 0
        self._step: dict[int, StepObject] = {}
        self.pending: dict[int, None] = {}
        """Objects of the step that are not on their way, nor written."""

    # --- what the log has taken ---

    def cut(self, address: int) -> None:
        """A guest's flush makes everything below this durable."""
        if address > self.done and not (self._cuts and self._cuts[-1] >= address):
            self._cuts.append(address)

    def add(
        self, address: int, first: int, end: int, zeroes: Iterable[int], blocks: Sequence[int], now_ns: int
    ) -> None:
        """A record is durable: its blocks lie in a row from `first` on, its zeroes count as older than these."""
        shift, newest = self._shift, self._newest
        for number in {block >> shift for block in blocks}:
            newest[number] = address
        kept = []
        for word in zeroes:
            block, count, kind = fmt.split_extent(word)
            if kind in (fmt.ZERO, fmt.DISCARD):
                kept.append(word)
                for number in range(block >> shift, ((block + count - 1) >> shift) + 1):
                    newest[number] = address
        self._records.append(OrderedRecord(address, end, first, tuple(kept), array("Q", blocks), now_ns))

    def recover(self, address: int, first: int, end: int, zeroes: Iterable[int], blocks: Sequence[int]) -> None:
        """The same for a record that a start has found. Nobody knows where the flushes were: anywhere."""
        if end <= self.done:
            return
        clean = max(0, self.done - first)  # another policy may have come so far
        self.add(address, first + clean, end, zeroes if address >= self.done else (), blocks[clean:], 0)
        self.cut(end)

    # --- steps ---

    @property
    def empty(self) -> bool:
        """Everything that is durable in the log is on the backend."""
        return not (self._records or self.running)

    @property
    def first_end(self) -> int:
        """Where the oldest record ends; there is one."""
        return self._records[0].end

    @property
    def since_ns(self) -> int:
        """When the oldest record became durable; there is one."""
        return self._records[0].since_ns

    def begin(self) -> None:
        """A new step; there is a record for it."""
        assert not self.running
        self.running = True
        self._gathered = False
        self._blocks = 0
        while self._cuts and self._cuts[0] <= self.done:
            self._cuts.popleft()

    def gather(self, limit: int) -> bool:
        """Find out what the step changes, some records at a time, and none that ends above the address `limit`. True:
        all is known."""
        looked = 0
        while not self._gathered:
            if (
                not self._records
                or self._records[0].end > limit
                or (self._cuts and self._end >= self._cuts[0])
                or self._blocks >= STEP_BLOCKS
            ):
                self._gathered = True
                self.pending = dict.fromkeys(sorted(self._step))
                break
            if looked >= GATHERED_BLOCKS:
                return False
            record = self._records.popleft()
            looked += self._apply(record) + 16
            self._end = record.end
        return True

    def _apply(self, record: OrderedRecord) -> int:
        """Returns how many blocks are to be remembered for it; an object of zeroes counts as one."""
        step, shift = self._step, self._shift
        before = self._blocks
        value = record.address << 1 | ZERO
        for word in record.zeroes:
            block, count, _ = fmt.split_extent(word)
            end = block + count
            for number in range(block >> shift, ((end - 1) >> shift) + 1):
                entry = self._entry(number)
                start, stop = max(block, number << shift), min(end, (number + 1) << shift)
                if stop - start == self._mask + 1:
                    entry.values = {}
                    entry.zero = value
                    self._blocks += 1
                else:
                    entry.values.update(dict.fromkeys(range(start, stop), value))
                    self._blocks += stop - start
        value = record.first << 1
        for at in record.blocks:
            number = at >> shift
            found = step.get(number)
            (found if found is not None else self._entry(number)).values[at] = value
            value += 2
        self._blocks += len(record.blocks)
        return self._blocks - before

    def _entry(self, number: int) -> StepObject:
        entry = self._step.get(number)
        if entry is None:
            entry = self._step[number] = StepObject()
        return entry

    @property
    def end(self) -> int:
        """The address at which the step ends."""
        return self._end

    def values(self, number: int) -> list[tuple[int, int]]:
        """What the step writes of an object: blocks in ascending order, each with its value."""
        entry = self._step[number]
        if not entry.zero:
            return sorted(entry.values.items())
        first, get = number << self._shift, entry.values.get
        return [(block, get(block, entry.zero)) for block in range(first, first + self._mask + 1)]

    @property
    def is_empty_step(self) -> bool:
        """The step changes nothing: there was only padding."""
        return not self._step

    def finish(self) -> list[tuple[int, bool]]:
        """The step is on the backend. Returns its objects, and whether they have been changed since."""
        newest, end = self._newest, self._end
        changed = []
        for number in self._step:
            since = newest[number] >= end
            if not since:
                del newest[number]
            changed.append((number, since))
        self.done = end
        self._step = {}
        self.running = False
        return changed
