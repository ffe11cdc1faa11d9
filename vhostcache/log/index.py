"""The index: the newest durable log address of every block that the log holds.

Object number -> a page of values `address << 1 | is_zero`, one a block, 0 for absent. Addresses only grow, so comparing
them replaces bookkeeping: a value below the tail is evicted (the backend has it), one below the object's destaged
address is clean, the larger of two is the newer. A few blocks of an object are kept in a dictionary, many in an array;
an object that is zero as a whole takes no page. Memory follows the blocks cached: 8 bytes a block in a full page.

Owns also which objects are dirty, in the order in which they became so, and from which address on: the log below the
oldest of these addresses is clean. It never does I/O and never decides what to destage.

Data enters when its record is durable. Zeroes enter when they are accepted, so that nobody reads what lies beneath
them; their object becomes dirty when their record is durable, like any other.
"""

from array import array
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import Final

FEW_SHARE: Final = 32
"""A page becomes an array when more than one block in 32 of its object is in it."""
FILLED_RUN: Final = 64
"""So many blocks in a row, and more, are a stream."""
SWEEP: Final = 256
"""Objects looked at in one go when pages are freed, about 0.1 ms."""
SOME_OBJECTS: Final = 8
"""Objects in which places of the log are looked for, about 0.5 ms."""


class ObjectIndex:
    """One object's page. `zero`: a value that holds for every block that has no newer one. Below the address `destaged`
    it is clean."""

    __slots__ = ("destaged", "few", "newest", "page", "zero")

    def __init__(self, destaged: int) -> None:
        self.few: dict[int, int] = {}
        self.page: array[int] | None = None
        self.zero = 0
        self.destaged = destaged
        self.newest = 0
        """The newest value of zeroes in it."""


class LogIndex:
    """All objects. `object_shift`: blocks of an object, as a power of two. Addresses below `tail` are evicted, those
    below `clean` were on the backend when this began."""

    __slots__ = (
        "_clean",
        "_dirty_pages",
        "_few_max",
        "_in_flight",
        "_left",
        "_mask",
        "_objects",
        "_restored",
        "_shift",
        "_sweep",
        "_zero_newest",
        "dirty",
        "filled",
        "kept",
        "lost",
        "ordered_below",
        "queue",
        "since_ns",
        "tail",
    )

    def __init__(self, object_shift: int, tail: int, clean: int) -> None:
        self._shift = object_shift
        self._mask = (1 << object_shift) - 1
        self._few_max = max(1, (1 << object_shift) // FEW_SHARE)
        self._objects: dict[int, ObjectIndex] = {}
        self.tail = tail
        self._clean = clean
        self.dirty: OrderedDict[int, int] = OrderedDict()
        """Object -> its first dirty address. They ascend."""
        self.since_ns: dict[int, int] = {}
        """Object -> when it became dirty."""
        self.queue: OrderedDict[int, int] = OrderedDict()
        """Dirty objects -> the same, or when they were put off last. It ascends, but for those that were restored."""
        self.filled: OrderedDict[int, None] = OrderedDict()
        """Objects whose end a long run of neighbouring blocks has reached: most likely they are dirty as a whole."""
        self.ordered_below: int | None = None
        """See `ordered`; None: objects are destaged in any order."""
        self._restored: dict[int, int] = {}
        """Objects in `dirty` whose destage has failed -> first dirty address, out of the order."""
        self._left: dict[int, int] = {}
        """Objects in `dirty` that were left so by their last destage -> from which address on. They ascend, and are out
        of the order there."""
        self._in_flight: dict[int, int] = {}
        """Object that is being destaged -> its first dirty address."""
        self.kept: dict[int, None] = {}
        """Addresses of records whose zeroes stay allocated on the backend, in order; all others may be unmapped."""
        self.lost: dict[int, int] = {}
        """Block that is lost -> the newest extent that says so. They ascend; some may have been overwritten since."""
        self._dirty_pages: dict[int, array[int]] = {}
        """Of dirty objects, the pages that are arrays (some may be missing): what is written again and again."""
        self._zero_newest = 0
        """The newest value of zeroes."""
        self._sweep: Iterator[int] | None = None

    @property
    def object_blocks(self) -> int:
        """Blocks of an object."""
        return self._mask + 1

    # --- reading ---

    def lookup(self, block: int) -> int:
        """The block's value, or 0 if only the backend has it."""
        entry = self._objects.get(block >> self._shift)
        if entry is None:
            return 0
        page = entry.page
        value = entry.few.get(block & self._mask, 0) if page is None else page[block & self._mask]
        value = max(value, entry.zero)
        return value if value >> 1 >= self.tail else 0

    def has_any(self, first: int, end: int) -> bool:
        """Whether lookup() finds any of these blocks."""
        while first < end:
            stop = min(end, (first | self._mask) + 1)
            entry = self._objects.get(first >> self._shift)
            if entry is not None:
                at = first & self._mask
                until = at + stop - first
                if entry.page is not None:
                    newest = max(entry.page[at:until])
                else:
                    newest = max((value for place, value in entry.few.items() if at <= place < until), default=0)
                newest = max(newest, entry.zero)
                if newest and newest >> 1 >= self.tail:
                    return True
            first = stop
        return False

    def some_addresses(self, most: int, turn: int, but: Collection[int]) -> list[int]:
        """Log addresses of some data, in different objects if there are, none of `but`; others with another `turn`."""
        count = len(self._objects)
        first = turn * SOME_OBJECTS % count if SOME_OBJECTS < count < 4096 else 0
        low = self.tail << 1
        found: list[list[int]] = []
        for entry in islice(self._objects.values(), first, first + SOME_OBJECTS):
            page: Iterable[int] = entry.few.values() if entry.page is None else entry.page
            addresses = [value >> 1 for value in page if value >= low and value and not value & 1]
            found.append([address for address in addresses if address not in but])
        chosen = [
            addresses[(turn + i) % len(addresses)] for i in range(most) for addresses in found if i < len(addresses)
        ]
        return chosen[:most]

    # --- what the log has taken ---

    def _entry(self, number: int) -> ObjectIndex:
        entry = self._objects.get(number)
        if entry is None:
            entry = self._objects[number] = ObjectIndex(self._clean)
        return entry

    def _grow(self, entry: ObjectIndex) -> None:
        page = array("Q", bytes(8 << self._shift))
        for offset, value in entry.few.items():
            page[offset] = value
        entry.page = page
        entry.few = {}

    def _touch(self, number: int, address: int, now_ns: int) -> None:
        if number not in self.dirty:
            self.dirty[number] = address
            self.since_ns[number] = self.queue[number] = now_ns

    def add(self, blocks: Sequence[int], address: int, now_ns: int) -> None:
        """Blocks whose payload is now durable at `address`, `address + 1`, ... They are dirty."""
        shift, mask = self._shift, self._mask
        find = self._dirty_pages.get
        value = address << 1
        newest = value > self._zero_newest  # newer than anything in the index
        count = len(blocks)
        if newest and count > 1 and blocks[-1] - blocks[0] == count - 1 and blocks[0] >> shift == blocks[-1] >> shift:
            page = find(blocks[0] >> shift)
            if page is not None:
                offset = blocks[0] & mask
                page[offset : offset + count] = array("Q", range(value, value + 2 * count, 2))
                if count >= FILLED_RUN:
                    self._find_filled(blocks)
                return
        for block in blocks:
            page = find(block >> shift)
            if page is not None and newest:
                page[block & mask] = value
            else:
                self._add(block, value, now_ns)
            value += 2
        if len(blocks) >= FILLED_RUN:
            self._find_filled(blocks)

    def _find_filled(self, blocks: Sequence[int]) -> None:
        """Whether this has filled objects up: its first or last run of neighbours reaches the end of one."""
        shift = self._shift
        last = len(blocks) - 1
        for first, end in ((0, last // 2), (last // 2 + 1, last)):
            if blocks[end] - blocks[first] != end - first:
                continue
            for number in range(blocks[first] >> shift, (blocks[end] + 1) >> shift):
                self.filled[number] = None

    def _add(self, block: int, value: int, now_ns: int) -> None:
        number, offset = block >> self._shift, block & self._mask
        entry = self._put(number, offset, value)
        if number not in self.dirty:
            self.dirty[number] = value >> 1
            self.since_ns[number] = self.queue[number] = now_ns
        if entry.page is not None:
            self._dirty_pages[number] = entry.page

    def _put(self, number: int, offset: int, value: int) -> ObjectIndex:
        entry = self._entry(number)
        if entry.page is not None:
            entry.page[offset] = max(entry.page[offset], value)
        else:
            entry.few[offset] = max(entry.few.get(offset, 0), value)
            if len(entry.few) > self._few_max:
                self._grow(entry)
        return entry

    def zero(self, first: int, end: int, address: int, kept: bool) -> None:
        """Blocks `first` .. `end - 1` read as zeroes from now on, by an extent whose header is at `address`. `kept`: it
        and the others of its record are to stay allocated."""
        if kept:
            self.kept[address] = None
        shift, mask = self._shift, self._mask
        value = address << 1 | 1
        self._zero_newest = max(self._zero_newest, value)
        for number in range(first >> shift, ((end - 1) >> shift) + 1):
            entry = self._entry(number)
            entry.newest = max(entry.newest, value)
            start, stop = max(first, number << shift), min(end, (number + 1) << shift)
            if stop - start == mask + 1:
                # All of the page is older: it was durable before this extent was accepted.
                entry.zero = max(entry.zero, value)
                entry.few = {}
                entry.page = None
                self._dirty_pages.pop(number, None)
                continue
            if entry.page is None and len(entry.few) + stop - start > self._few_max:
                self._grow(entry)
            page: array[int] | dict[int, int] = entry.few if entry.page is None else entry.page
            for offset in range(start & mask, (start & mask) + stop - start):
                if entry.page is not None:
                    page[offset] = max(page[offset], value)
                else:
                    page[offset] = max(entry.few.get(offset, 0), value)

    def zero_durable(self, first: int, end: int, address: int, now_ns: int) -> None:
        """The record of such an extent is durable: its objects are dirty."""
        for number in range(first >> self._shift, ((end - 1) >> self._shift) + 1):
            self._entry(number)
            self._touch(number, address, now_ns)

    def lose(self, first: int, end: int, address: int) -> None:
        """Of these blocks what is older than `address` is lost, and a durable record there says so. Its header's
        address is their value: who reads there finds that it fails its checksum."""
        shift, mask = self._shift, self._mask
        value = address << 1
        for block in range(first, end):
            entry = self._entry(block >> shift)
            offset = block & mask
            old = entry.few.get(offset, 0) if entry.page is None else entry.page[offset]
            if max(old, entry.zero) < value:
                self._put(block >> shift, offset, value)
                entry.newest = max(entry.newest, value)
                self.lost.pop(block, None)
                self.lost[block] = address

    def is_clean(self, block: int, address: int) -> bool:
        """Whether the backend has what the block was at this address."""
        return address < self._objects[block >> self._shift].destaged

    def forget_clean(self, first: int, count: int, address: int) -> int:
        """The log does not give what it has at `address`, `address + 1`, ... of neighbouring blocks. Those of them that
        the backend has too, and nothing newer is known of, are read from there from now on. Returns how many."""
        forgotten = 0
        for block in range(first, first + count):
            at = address + block - first
            if self.lookup(block) != at << 1 or not self.is_clean(block, at) or block in self.lost:
                continue
            entry = self._objects[block >> self._shift]
            if entry.zero >> 1 >= self.tail and entry.zero:
                continue  # these older zeroes would come to light
            if entry.page is not None:
                entry.page[block & self._mask] = 0
            else:
                del entry.few[block & self._mask]
            forgotten += 1
        return forgotten

    def is_lost(self, block: int) -> bool:
        """Whether the block has not been overwritten since it was lost."""
        address = self.lost.get(block)
        return address is not None and self.lookup(block) == address << 1

    def forget_overwritten(self, durable: int) -> None:
        """The oldest losses, if their blocks have newer content below the address `durable`."""
        while self.lost:
            block, address = next(iter(self.lost.items()))
            value = self.lookup(block)
            if value == address << 1 or value >> 1 >= durable:
                return
            del self.lost[block]

    def recover(self, blocks: Sequence[int], address: int) -> None:
        """`add` for a record that recovery has found: what lies below the clean address is clean."""
        old = min(max(self._clean - address, 0), len(blocks))
        for at, block in enumerate(blocks[:old], address):
            self._put(block >> self._shift, block & self._mask, at << 1)
        self.add(blocks[old:] if old else blocks, address + old, 0)

    def recover_zero(self, first: int, end: int, address: int, kept: bool) -> None:
        """The same for zeroes."""
        self.zero(first, end, address, kept)
        if address >= self._clean:
            self.zero_durable(first, end, address, 0)

    def recover_loss(self, first: int, end: int, address: int) -> None:
        """The same for what is lost. Below the clean address it has been overwritten, or lost once more."""
        if address >= self._clean:
            self.lose(first, end, address)

    # --- destaging ---

    def begin_destage(self, number: int, left: int = 0, now_ns: int = 0) -> int:
        """The object is in flight, and not dirty any more, but for what is durable from the address `left` on, if that
        is not 0; it grows from call to call. Returns its first dirty address."""
        assert number not in self._in_flight
        self._left.pop(number, None)
        first = min(self.dirty.pop(number), self._restored.pop(number, 1 << 62))
        del self.since_ns[number]
        del self.queue[number]
        self.filled.pop(number, None)
        self._dirty_pages.pop(number, None)
        self._in_flight[number] = first
        if left:
            self.dirty[number] = self._left[number] = left
            self.since_ns[number] = self.queue[number] = now_ns
        return first

    def put_off(self, number: int, now_ns: int) -> None:
        """The dirty object goes to the end of the queue: it is to be left for a while."""
        self.queue[number] = now_ns
        self.queue.move_to_end(number)

    def newest(self, number: int) -> int:
        """The log address of the object's newest block."""
        entry = self._objects[number]
        page: Iterable[int] = entry.few.values() if entry.page is None else entry.page
        return max(max(page, default=0), entry.zero, entry.newest) >> 1

    def count_dirty(self, number: int) -> int:
        """How many of the object's blocks are dirty, durable or not."""
        entry = self._objects[number]
        low = max(entry.destaged << 1, 1)
        if entry.zero >= low:
            return self._mask + 1
        page: Iterable[int] = entry.few.values() if entry.page is None else entry.page
        return sum(1 for value in page if value >= low)

    def dirty_blocks(self, number: int, vouched: int, durable: int) -> tuple[list[tuple[int, int]], bool, bool]:
        """The object's dirty blocks in ascending order, each with its value, as far as they lie below the address
        `vouched`; and whether there are others below `durable`, and above."""
        entry = self._objects[number]
        low, high, zero = entry.destaged << 1, vouched << 1, entry.zero
        base = number << self._shift
        if zero >= low and zero:
            page = entry.page
            get = entry.few.get
            values = [
                (base + offset, max(zero, get(offset, 0) if page is None else page[offset]))
                for offset in range(self._mask + 1)
            ]
        elif entry.page is not None:
            page = entry.page
            low = max(low, 1)
            values = [(base + offset, value) for offset, value in enumerate(page) if value >= low]
            if max(page) < high:
                return values, False, False
        else:
            values = [(base + offset, value) for offset, value in sorted(entry.few.items()) if value >= low]
        below = [pair for pair in values if pair[1] < high]
        if len(below) == len(values):
            return below, False, False
        newer = [value >> 1 for _, value in values if value >= high]
        return below, min(newer) < durable, max(newer) >= durable

    def destaged(self, number: int, address: int) -> None:
        """Everything below `address` in the object is on the backend, and durable there."""
        del self._in_flight[number]
        self._objects[number].destaged = address

    def restore(self, number: int, now_ns: int) -> None:
        """A destage has failed: the object is as dirty as it was."""
        first = self._in_flight.pop(number)
        self._restored[number] = min(first, self._restored.get(number, first))
        if number not in self.dirty:
            self.dirty[number] = first
            self.since_ns[number] = self.queue[number] = now_ns
        self.dirty.move_to_end(number, last=False)

    def ordered(self, changed: list[tuple[int, bool]], address: int) -> None:
        """In the policy `ordered` everything below `address` is on the backend, and durable there: these objects were
        the last to come; each may have been changed since."""
        self.ordered_below = address
        for number, since in changed:
            self._objects[number].destaged = address
            if not since:
                del self.dirty[number], self.since_ns[number], self.queue[number]
                self._left.pop(number, None)
                self.filled.pop(number, None)
                self._dirty_pages.pop(number, None)

    def clean_below(self, durable: int) -> int:
        """The address below which everything is on the backend; `durable` if nothing is dirty or lost."""
        oldest = durable if self.ordered_below is None else self.ordered_below
        if self.dirty and self.ordered_below is None:
            # Restored objects stand first, out of order; behind them the order holds.
            for number in self.dirty:
                oldest = min(oldest, self.dirty[number])
                if number not in self._restored:
                    break
            if self._left:
                oldest = min(oldest, next(iter(self._left.values())))
        if self.lost:
            oldest = min(oldest, next(iter(self.lost.values())))
        return min((oldest, *self._restored.values(), *self._in_flight.values()))

    # --- memory ---

    def sweep(self) -> bool:
        """Free pages that lie wholly below the tail, some objects at a time; False: done for now."""
        if self._sweep is None:
            self._sweep = iter(list(self._objects))
            while self.kept and next(iter(self.kept)) < self.tail:
                del self.kept[next(iter(self.kept))]
        tail = self.tail << 1
        for _ in range(SWEEP):
            number = next(self._sweep, None)
            if number is None:
                self._sweep = None
                return False
            entry = self._objects.get(number)
            if entry is None or number in self.dirty or number in self._in_flight:
                continue
            # Nothing in it is newer than what was destaged last, but for zeroes that are not durable yet.
            if entry.destaged << 1 <= tail and entry.newest < tail:
                del self._objects[number]
        return True
