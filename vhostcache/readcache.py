"""Which clean block to give up: S3-FIFO over the slots of the RAM tier.

A block that is clean for the first time enters a small queue, a tenth of the clean blocks; only one that is hit there
moves on to the main queue. What leaves the small queue unhit is remembered by number (the ghosts), and goes to the main
queue directly when it comes back. So a scan passes through the small queue and leaves the main one alone. Source: Yang
et al., FIFO queues are all you need for cache eviction, SOSP 2023.

Owns the queues and hit counts. Entries may be stale: a slot that has been overwritten or freed since keeps its place in
the queue and is skipped when it comes up, so each slot stands in the queues at most once and they never outgrow the
slots. It never evicts anything but CLEAN slots.
"""

from collections import deque
from typing import Final

from vhostcache.map import CLEAN, FREE, ORPHAN, PINNED, Map, run_end

SMALL_SHARE: Final = 10
"""The small queue gets one part in ten."""
HITS_MAX: Final = 3
LOOKS_MAX: Final = 1024
"""Entries given a second chance in one call, about 0.2 ms."""


class ReadCache:
    """The order of eviction of a map's clean slots."""

    __slots__ = (
        "_ghost_order",
        "_ghosts",
        "_ghosts_max",
        "_main",
        "_map",
        "_queued",
        "_run_slots",
        "_run_slots_max",
        "_runs",
        "_small",
        "evictions",
        "hits",
    )

    def __init__(self, block_map: Map) -> None:
        self._map = block_map
        self._small: deque[int] = deque()
        self._main: deque[int] = deque()
        self._queued = bytearray(block_map.slots)
        self._runs: deque[list[int]] = deque()
        """Slots that were written together, oldest first: see `admit_run`."""
        self._run_slots = 0
        self._run_slots_max = block_map.slots // 2
        self._ghosts: set[int] = set()
        self._ghost_order: deque[int] = deque()
        """Ghosts, oldest first; one that has come back stays until its turn. (A dict that is emptied from the front is
        searched from its beginning each time.)"""
        self._ghosts_max = block_map.slots
        self.hits = bytearray(block_map.slots)
        """Slot -> hits since it was admitted or last passed over, at most HITS_MAX; counted by the reader."""
        self.evictions = 0

    def admit(self, slot: int) -> None:
        """The slot has just become CLEAN."""
        if self._queued[slot]:
            return
        self._queued[slot] = 1
        self.hits[slot] = 0
        block = self._map.block_of[slot]
        if block in self._ghosts:
            self._ghosts.remove(block)
            self._main.append(slot)
        else:
            self._small.append(slot)

    def admit_run(self, slots: list[int]) -> None:
        """Slots that have just become CLEAN because the log has them. What is written is seldom read soon: they go
        together, in the order of writing, but for those that are hit. They may take half of RAM before they go first.
        """
        self._runs.append(slots)
        self._run_slots += len(slots)
        while self._run_slots > self._map.slots:
            self._disband_run()

    def _disband_run(self) -> None:
        """The oldest run is only in the way: most of its slots have been overwritten since, or RAM is large."""
        for slot in self._take_run():
            self.admit(slot)

    def _take_run(self) -> list[int]:
        """Give up the oldest run: what was hit in it goes to the main queue, what is clean besides is returned."""
        slots = self._runs.popleft()
        self._run_slots -= len(slots)
        state, queued, hits = self._map.state, self._queued, self.hits
        first, end, count = slots[0], run_end(slots), len(slots)
        if end and state.count(CLEAN, first, end) == queued.count(0, first, end) == hits.count(0, first, end) == count:
            return slots
        left: list[int] = []
        for slot in slots:
            if state[slot] != CLEAN or queued[slot]:
                continue
            if hits[slot]:
                hits[slot] = 0
                queued[slot] = 1
                self._main.append(slot)
            else:
                left.append(slot)
        return left

    def unpin(self, slots: list[int]) -> None:
        """Slots that were PINNED are CLEAN again, or free when their blocks have been overwritten meanwhile."""
        state = self._map.state
        for slot in slots:
            if state[slot] == PINNED:
                state[slot] = CLEAN
                self.admit(slot)
            else:
                assert state[slot] == ORPHAN
                self._map.release(slot)

    def is_wanted(self, block: int) -> bool:
        """Whether a block that missed has earned a place: it is a ghost. If not, it now is one."""
        if block in self._ghosts:
            return True
        self._remember(block)
        return False

    def _remember(self, block: int) -> None:
        order = self._ghost_order
        self._ghosts.add(block)
        order.append(block)
        if len(order) > self._ghosts_max:
            self._ghosts.discard(order.popleft())

    def take_one(self) -> int:
        """Give up one clean block and take its slot; 0 if none is clean. For misses of one block, which are many."""
        block_map = self._map
        if not block_map.free and not self.evict(1):
            return 0
        return block_map.free.pop()

    def evict(self, count: int) -> int:
        """Free `count` clean slots, or some more, or as many as there are; returns how many.

        Second chances end after a bounded number of looks, so that a cache in which everything has been hit does not
        hold the loop."""
        freed = 0
        small, main = self._small, self._main
        looks = LOOKS_MAX + 2 * count
        while freed < count and (small or main or self._runs):
            if self._runs and (self._run_slots > self._run_slots_max or not (small or main)):
                freed += self._evict_run()
                continue
            looks -= 1
            if looks == 0:
                self.hits[:] = bytes(len(self.hits))
            if small and (not main or len(small) * SMALL_SHARE >= len(small) + len(main)):
                freed += self._evict_small()
            else:
                freed += self._evict_main()
        self.evictions += freed
        return freed

    def _evict_run(self) -> int:
        block_map = self._map
        freed = self._take_run()
        deque(map(block_map.where.__delitem__, map(block_map.block_of.__getitem__, freed)), maxlen=0)
        block_map.set_state(freed, FREE)
        block_map.free.extend(reversed(freed))  # the last ones are taken first
        return len(freed)

    def _evict_small(self) -> int:
        slot = self._small.popleft()
        block_map = self._map
        if block_map.state[slot] != CLEAN:
            self._queued[slot] = 0
            return 0
        if self.hits[slot]:
            self.hits[slot] = 0
            self._main.append(slot)
            return 0
        self._remember(block_map.block_of[slot])
        return self._free(slot)

    def _evict_main(self) -> int:
        slot = self._main.popleft()
        if self._map.state[slot] != CLEAN:
            self._queued[slot] = 0
            return 0
        if self.hits[slot]:
            self.hits[slot] -= 1
            self._main.append(slot)
            return 0
        return self._free(slot)

    def _free(self, slot: int) -> int:
        self._queued[slot] = 0
        block_map = self._map
        del block_map.where[block_map.block_of[slot]]
        block_map.state[slot] = FREE
        block_map.free.append(slot)
        return 1
