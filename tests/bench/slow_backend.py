"""`python -m tests.bench.slow_backend DELAY_MS export ...`: vhostcache with a backend that takes longer.

Each read, write, flush and zeroing of the image is carried out at once, and reported to the core DELAY_MS after it has
ended, as a distant storage's answer would be; the cache file is as fast as it is. That needs no privilege and no
module of the kernel (dm-delay, FUSE), and leaves the daemon otherwise as it is installed. Not delayed: reads that
bypass the core's groups, of which a load of writes makes none.
"""

import functools
import heapq
import sys
from collections.abc import Iterator
from typing import Any

from vhostcache import cli, daemon
from vhostcache import operations as op
from vhostcache.engine import Engine

# Words of an operation, of which `n` stands in its first word. LOG_WRITE has a length of its own besides.
FIXED_WORDS = {
    op.IN1: 1,
    op.OUT1: 1,
    op.IN: 3,
    op.OUT: 3,
    op.COMPLETE: 1,
    op.DROP: 1,
    op.SLOT_COPY: 2,
    op.SLOT_ZERO: 2,
    op.READ: 4,
    op.WRITE: 4,
    op.READ_DIRECT: 4,
    op.FLUSH: 2,
    op.ZERO: 4,
    op.WRITE_DIRECT: 4,
    op.LOG_WRITE: 5,
    op.LOG_READ: 3,
    op.LOG_READ_DIRECT: 4,
    op.LOG_FLUSH: 2,
    op.SUPERBLOCK: 3,
    op.PUBLISH: 2,
    op.LOG1: 1,
    op.LOG_SEQ: 2,
    op.RETIRE: 2,
}
WITH_SLOTS = {op.IN, op.OUT, op.READ, op.WRITE, op.LOG_WRITE, op.LOG_READ, op.SUPERBLOCK}
ON_BACKEND = {op.READ, op.WRITE, op.FLUSH, op.ZERO, op.WRITE_DIRECT}


def backend_groups(words: list[int]) -> Iterator[int]:
    """The groups of I/O on the image in a list of operations. There is one volume."""
    at = 0
    while at < len(words):
        opcode, argument = words[at] & 0xFF, words[at] >> 32
        if opcode in ON_BACKEND or (opcode == op.READ_DIRECT and argument == 0):
            yield words[at + 1] & 0xFFFFFFFF
        length = FIXED_WORDS[opcode]
        if opcode in WITH_SLOTS:
            length += argument
        if opcode == op.LOG_WRITE:
            length += words[at + 4]
        elif opcode == op.PUBLISH:
            length += 2 * argument
        at += length
    assert at == len(words), "an operation of another length"


class SlowEngine(Engine):
    """The engine, but for when it says that I/O on the backend has ended."""

    def __init__(self, *arguments: Any, delay_ns: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._delay_ns = delay_ns
        self._on_backend: set[int] = set()
        self._held: list[tuple[int, int, int, int]] = []  # a heap: due, volume, group, result

    def turn(self, operations: list[int], timeout_ns: int) -> Any:
        self._on_backend.update(backend_groups(operations))
        if self._held:
            until_ns = max(0, self._held[0][0] - self._result.now_ns)
            timeout_ns = until_ns if timeout_ns < 0 else min(timeout_ns, until_ns)
        result = super().turn(operations, timeout_ns)
        now_ns, held = result.now_ns, self._held
        done = []
        if result.completions:
            for volume, group, status in zip(result.done_volume, result.done_group, result.done_result, strict=True):
                if group in self._on_backend:
                    self._on_backend.remove(group)
                    heapq.heappush(held, (now_ns + self._delay_ns, volume, group, status))
                else:
                    done.append((volume, group, status))
        while held and held[0][0] <= now_ns:
            done.append(heapq.heappop(held)[1:])
        result.completions = len(done)
        if done:
            result.done_volume, result.done_group, result.done_result = map(list, zip(*done, strict=True))
        return result


def main() -> None:
    delay_ns = int(float(sys.argv[1]) * 1e6)
    slow = functools.partial(SlowEngine, delay_ns=delay_ns)
    daemon.Daemon = functools.partial(daemon.Daemon, engine_class=slow)  # type: ignore[assignment,misc]
    cli.main(sys.argv[2:])


if __name__ == "__main__":
    main()
