"""Policies to compare: each is asked for a block, says whether it hit, and admits it. The read cache itself is one."""

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final, Protocol

from vhostcache.eviction import Eviction


class Policy(Protocol):
    """A cache of block numbers."""

    written: int
    """Blocks admitted: each is a write to the cache device."""

    def access(self, block: int) -> bool:
        """Whether it was there."""


class Fifo:
    def __init__(self, size: int) -> None:
        self.size = size
        self.blocks: OrderedDict[int, int] = OrderedDict()
        self.written = 0

    def hit(self, block: int) -> None:
        """It is there."""

    def access(self, block: int) -> bool:
        if block in self.blocks:
            self.hit(block)
            return True
        if len(self.blocks) == self.size:
            self.evict()
        self.blocks[block] = 0
        self.written += 1
        return False

    def evict(self) -> None:
        self.blocks.popitem(last=False)


class Lru(Fifo):
    def hit(self, block: int) -> None:
        self.blocks.move_to_end(block)


class Clock(Fifo):
    def hit(self, block: int) -> None:
        self.blocks[block] = 1

    def evict(self) -> None:
        while True:
            block, visited = self.blocks.popitem(last=False)
            if not visited:
                return
            self.blocks[block] = 0


class Sieve:
    """Zhang et al., SIEVE is simpler than LRU, NSDI 2024: the hand goes from old to new, and what it spares stays in
    place."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.newer: dict[int, int] = {}
        self.older: dict[int, int] = {}
        self.visited: dict[int, bool] = {}
        self.first = self.last = self.hand = -1  # newest, oldest
        self.written = 0

    def access(self, block: int) -> bool:
        if block in self.visited:
            self.visited[block] = True
            return True
        if len(self.visited) == self.size:
            self.evict()
        self.older[block], self.newer[block] = self.first, -1
        if self.first >= 0:
            self.newer[self.first] = block
        self.first = block
        if self.last < 0:
            self.last = block
        self.visited[block] = False
        self.written += 1
        return False

    def evict(self) -> None:
        block = self.hand if self.hand >= 0 else self.last
        while self.visited[block]:
            self.visited[block] = False
            block = self.newer[block] if self.newer[block] >= 0 else self.last
        newer, older = self.newer.pop(block), self.older.pop(block)
        self.hand = newer
        if newer >= 0:
            self.older[newer] = older
        else:
            self.first = older
        if older >= 0:
            self.newer[older] = newer
        else:
            self.last = newer
        del self.visited[block]


class S3Fifo:
    """Yang et al., FIFO queues are all you need for cache eviction, SOSP 2023."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.small_size = max(1, size // 10)
        self.small: deque[int] = deque()
        self.main: deque[int] = deque()
        self.hits: dict[int, int] = {}
        self.ghosts: OrderedDict[int, None] = OrderedDict()
        self.written = 0

    def access(self, block: int) -> bool:
        if block in self.hits:
            self.hits[block] = min(3, self.hits[block] + 1)
            return True
        while len(self.hits) >= self.size:
            self.evict()
        if block in self.ghosts:
            del self.ghosts[block]
            self.main.append(block)
        else:
            self.small.append(block)
        self.hits[block] = 0
        self.written += 1
        return False

    def evict(self) -> None:
        if len(self.small) >= self.small_size or not self.main:
            block = self.small.popleft()
            if self.hits[block]:
                self.hits[block] = 0
                self.main.append(block)
                return
            del self.hits[block]
            self.ghosts[block] = None
            if len(self.ghosts) > self.size - self.small_size:
                self.ghosts.popitem(last=False)
            return
        while True:
            block = self.main.popleft()
            if not self.hits[block]:
                del self.hits[block]
                return
            self.hits[block] -= 1
            self.main.append(block)


class Ours:
    """vhostcache's own."""

    def __init__(self, size: int) -> None:
        self.cache = Eviction(size)
        self.written = 0

    def access(self, block: int) -> bool:
        cache = self.cache
        position = cache.find(block)
        if position:
            cache.hit(position)
            return True
        if cache.wants(block):
            cache.admit(block, cache.take())
            self.written += 1
        return False


POLICIES: Final[dict[str, Callable[[int], Policy]]] = {
    "FIFO": Fifo,
    "LRU": Lru,
    "CLOCK": Clock,
    "SIEVE": Sieve,
    "S3-FIFO": S3Fifo,
    "vhostcache": Ours,
}
