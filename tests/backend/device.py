"""A volume on some backend, as the core drives it: operations by the dozen, with their data in slots."""

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from vhostcache import engine as engine_module
from vhostcache import operations as op
from vhostcache.engine import Engine, EngineBackend

BLOCK = op.BLOCK_BYTES
SLOTS = 2100
PATIENCE_S = 60.0
READ, WRITE, FLUSH, ZERO = "read", "write", "flush", "zero"


class Device:
    """Makes an engine and, by `make`, the backend in it. `results` has how each operation ended, by its number."""

    def __init__(self, make: Callable[[Engine], EngineBackend], *, threads: bool = False, **changes: Any) -> None:
        self.engine = Engine(poll_max_us=0, force_threads=threads)
        try:
            self.backend = make(self.engine)
            self.facts = self.backend.facts
            self.engine.add_volume(**volume(self.backend, read_only=self.facts.read_only, **changes))
        except BaseException:
            self.engine.close()
            raise
        self.slab: Any = engine_module.ffi.buffer(self.engine.slab(0), SLOTS * BLOCK)
        self.results: dict[int, int] = {}
        self.ended: list[int] = []  # in which order
        self.events: list[tuple[int, int]] = []
        self._free = list(range(op.FIRST_SLOT, SLOTS))
        random.Random(0).shuffle(self._free)  # so that the slots of an operation are seldom neighbours
        self._held: dict[int, list[int]] = {}
        self._reads: dict[int, tuple[int, int, list[int]]] = {}
        self._next = 0
        self._words: list[int] = []

    def close(self) -> None:
        self.slab = b""
        self.engine.close()

    def __enter__(self) -> "Device":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def step(self) -> int:
        """Of offsets and lengths."""
        return self.facts.align_io_bytes

    @property
    def size(self) -> int:
        return self.facts.size_bytes

    # Begin, and see how it ended. Each returns the operation's number.

    def write(self, offset: int, data: bytes) -> int:
        group, slots, skip = self._begin(offset, len(data))
        done = 0
        for slot in slots:
            part = data[done : done + BLOCK - skip]
            at = slot * BLOCK + skip
            self.slab[at : at + len(part)] = part
            done += len(part)
            skip = 0
        self._words += [op.WRITE | len(slots) << 32, group | offset % BLOCK << 32, offset, len(data), *slots]
        return group

    def write_slots(self, offset: int, slots: Sequence[int]) -> int:
        """Of whole blocks; slots 1 and 2 are zeroes."""
        group = self._number()
        self._words += [op.WRITE | len(slots) << 32, group, offset, len(slots) * BLOCK, *slots]
        return group

    def read(self, offset: int, length: int) -> int:
        group, slots, skip = self._begin(offset, length)
        for slot in slots:
            self.slab[slot * BLOCK : (slot + 1) * BLOCK] = b"\xee" * BLOCK
        self._reads[group] = (skip, length, slots)
        self._words += [op.READ | len(slots) << 32, group | skip << 32, offset, length, *slots]
        return group

    def read_other(self, index: int, offset: int) -> int:
        """A block of another volume of the engine."""
        group = self._number()
        self._words += [op.READ | index << 8 | 1 << 32, group, offset, BLOCK, op.FIRST_SLOT]
        return group

    def flush(self) -> int:
        group = self._number()
        self._words += [op.FLUSH, group]
        return group

    def zero(self, offset: int, length: int, may_unmap: bool = True) -> int:
        group = self._number()
        self._words += [op.ZERO | int(may_unmap) << 32, group, offset, length]
        return group

    def data(self, group: int) -> bytes:
        """What a read has brought."""
        skip, length, slots = self._reads.pop(group)
        whole = b"".join(self.slab[slot * BLOCK : (slot + 1) * BLOCK] for slot in slots)
        self._give_back(group)
        return bytes(whole[skip : skip + length])

    def turn(self, timeout_ns: int = 20_000_000) -> None:
        words, self._words = self._words, []
        result = self.engine.turn(words, timeout_ns)
        for kind, argument in zip(result.event_kind[: result.events], result.event_arg[: result.events], strict=True):
            self.events.append((kind, argument))
        for index in range(result.completions):
            group, outcome = result.done_group[index], result.done_result[index]
            assert group not in self.results, f"operation {group} has ended twice"
            assert outcome <= 0, f"operation {group} ended with {outcome}"
            self.results[group] = outcome
            self.ended.append(group)
            if group not in self._reads or outcome:
                self._reads.pop(group, None)
                self._give_back(group)

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, (
                f"in vain; {len(self.results)} of {self._next} have ended: {self.events}"
            )
            self.turn()

    def wait(self, *groups: int) -> list[int]:
        """How they ended: 0 or a negative errno each. Without any: all."""
        wanted = groups or tuple(range(self._next))
        self.until(lambda: all(group in self.results for group in wanted))
        return [self.results[group] for group in wanted]

    # And in one step.

    def put(self, offset: int, data: bytes) -> None:
        assert self.wait(self.write(offset, data)) == [0]

    def get(self, offset: int, length: int) -> bytes:
        group = self.read(offset, length)
        assert self.wait(group) == [0]
        return self.data(group)

    def sync(self) -> None:
        assert self.wait(self.flush()) == [0]

    def _number(self) -> int:
        self._next += 1
        assert self._next <= op.GROUPS
        return self._next - 1

    def _begin(self, offset: int, length: int) -> tuple[int, list[int], int]:
        skip = offset % BLOCK
        count = -(-(skip + length) // BLOCK)
        while len(self._free) < count:
            self.turn()
        slots = [self._free.pop() for _ in range(count)]
        group = self._number()
        self._held[group] = slots
        return group, slots, skip

    def _give_back(self, group: int) -> None:
        self._free += self._held.pop(group, [])


def volume(backend: EngineBackend, **changes: Any) -> dict[str, Any]:
    return {
        "listen_fd": -1,
        "backend": backend,
        "size_bytes": backend.facts.size_bytes,
        "slots": SLOTS,
        "object_bytes": 4 << 20,
        "num_queues": 1,
        "write_cache": True,
        "write_depth": 64,
        "discard_max_bytes": 1 << 20,
        "serial": "backend",
        **changes,
    }
