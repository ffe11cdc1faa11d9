"""The backend as the core sees it: operations in groups, and who is told when a group has ended.

Owns the group numbers of one volume. A group is in use from the operations that name it until its completion, and is
told to exactly one owner, so nothing the engine reports can go astray. It does no I/O: it appends words to the
operation list.
"""

from collections.abc import Sequence
from typing import Final, Protocol

from vhostcache import operations as op

GROUPS_KEPT: Final = 64
"""Groups for those that others wait for: records, flushes, superblocks, destages."""


class Owner(Protocol):
    """Whoever waits for a group."""

    def io_done(self, result: int) -> None:
        """All operations of the group have ended; `result` is 0 or the first error, a negative errno."""


class BackendIo:
    """Appends operations of one volume; `operations` is the engine's list, shared by all volumes."""

    __slots__ = ("_free", "_owners", "_volume", "operations", "reads")

    def __init__(self, volume: int, operations: list[int], groups: int = op.GROUPS) -> None:
        self.operations = operations
        self._volume = volume << 8
        self._free = list(range(groups - 1, -1, -1))
        self._owners: list[Owner | None] = [None] * groups
        self.reads = 0
        """Of the backend, for the guest, ever."""

    @property
    def in_flight(self) -> int:
        """Groups in flight."""
        return len(self._owners) - len(self._free)

    def available(self) -> int:
        """How many more groups can be begun now."""
        return len(self._free)

    def spare(self) -> int:
        """How many of them guests' reads may take, with a log: what it needs to go on is kept."""
        return max(0, len(self._free) - GROUPS_KEPT)

    def begin(self, owner: Owner) -> int:
        """A new group, whose completion goes to `owner`; the caller has seen to it that one is available."""
        group = self._free.pop()
        self._owners[group] = owner
        return group

    def done(self, group: int, result: int) -> None:
        """The engine has reported a completion."""
        owner = self._owners[group]
        assert owner is not None, f"completion of group {group}, which is not in flight"
        self._owners[group] = None
        self._free.append(group)
        owner.io_done(result)

    def read(self, group: int, offset_bytes: int, size_bytes: int, slots: Sequence[int]) -> None:
        """Backend to slots."""
        self.reads += 1
        self.operations += (op.READ | self._volume | len(slots) << 32, group, offset_bytes, size_bytes)
        self.operations += slots

    def write(self, group: int, offset_bytes: int, size_bytes: int, slots: Sequence[int]) -> None:
        """Slots to backend."""
        self.operations += (op.WRITE | self._volume | len(slots) << 32, group, offset_bytes, size_bytes)
        self.operations += slots

    def read_direct(self, group: int, tag: int, payload_bytes: int, offset_bytes: int, size_bytes: int) -> None:
        """Backend to guest memory, `payload_bytes` into the request's payload."""
        self.reads += 1
        self.operations += (op.READ_DIRECT | tag << 8, group | payload_bytes << 32, offset_bytes, size_bytes)

    def read_request(self, tag: int, offset_bytes: int, size_bytes: int) -> None:
        """Backend to guest memory, a whole request, which the engine completes; only a failure is reported."""
        self.reads += 1
        self.operations += (op.READ_DIRECT | tag << 8 | 1 << 32, 0, offset_bytes, size_bytes)

    def write_direct(self, group: int, tag: int, offset_bytes: int, size_bytes: int) -> None:
        """Guest memory, which is aligned, to the backend: a whole request."""
        self.operations += (op.WRITE_DIRECT | tag << 8, group, offset_bytes, size_bytes)

    def flush(self, group: int) -> None:
        """Make durable every write whose completion has been reported."""
        self.operations += (op.FLUSH | self._volume, group)

    def zero(self, group: int, offset_bytes: int, size_bytes: int, may_unmap: bool) -> None:
        """Zero a range of the backend, deallocating it if it may."""
        self.operations += (op.ZERO | self._volume | may_unmap << 32, group, offset_bytes, size_bytes)

    def copy_slot(self, source: int, target: int) -> None:
        """Copy one block between slots."""
        self.operations += (op.SLOT_COPY | self._volume | source << 32, target)

    def zero_slot(self, slot: int, offset_bytes: int, size_bytes: int) -> None:
        """Zero a part of a slot."""
        self.operations += (op.SLOT_ZERO | self._volume | slot << 32, offset_bytes | size_bytes << 32)

    # --- the log ---

    def publish(self, seq: int, entries: Sequence[int]) -> None:
        """Entries of the RAM-tier file, extent word and slot in turn, all at once."""
        self.operations += (op.PUBLISH | self._volume | len(entries) // 2 << 32, seq)
        self.operations += entries

    def log_seq(self, seq: int) -> None:
        """What LOG1 publishes from now on belongs to this record."""
        self.operations += (op.LOG_SEQ | self._volume, seq)

    def retire(self, entries: int) -> None:
        """The first so many entries of the RAM-tier file are durable in the log."""
        self.operations += (op.RETIRE | self._volume, entries)

    def log_write(
        self,
        group: int,
        offset_bytes: int,
        headers: Sequence[int],
        words: Sequence[int],
        slots: Sequence[int],
        durable: bool = False,
    ) -> None:
        """Compose a record in its one or two header slots and write it. Without words: write the same again. `durable`:
        it ends when it is on the medium."""
        repeat = 0 if words else 1 << 32
        header = headers[0] | (headers[1] << 32 if len(headers) > 1 else 0)
        self.operations += (
            op.LOG_WRITE | self._volume | len(slots) << 32,
            group | repeat | durable << 33,
            offset_bytes,
            header,
            len(words),
        )
        self.operations += words
        self.operations += slots

    def store(self, group: int, offset_bytes: int, slots: Sequence[int]) -> None:
        """Slots to the read cache, where the blocks lie in a row."""
        self.operations += (op.STORE | self._volume | len(slots) << 32, group, offset_bytes)
        self.operations += slots

    def log_read(self, group: int, offset_bytes: int, slots: Sequence[int]) -> None:
        """Blocks of the log, which lie in a row, to slots; verified."""
        self.operations += (op.LOG_READ | self._volume | len(slots) << 32, group, offset_bytes)
        self.operations += slots

    def log_read_direct(self, group: int, tag: int, payload_bytes: int, offset_bytes: int, size_bytes: int) -> None:
        """Whole blocks of the log to guest memory, `payload_bytes` into the request's payload; verified."""
        self.operations += (op.LOG_READ_DIRECT | tag << 8, group | payload_bytes << 32, offset_bytes, size_bytes)

    def log_flush(self, group: int) -> None:
        """fdatasync of the cache file: covers what was reported as written before."""
        self.operations += (op.LOG_FLUSH | self._volume, group)

    def superblock(self, group: int, offset_bytes: int, words: Sequence[int]) -> None:
        """Write a superblock, given as 64-bit words without the trailing zeroes."""
        self.operations += (op.SUPERBLOCK | self._volume | len(words) << 32, group, offset_bytes)
        self.operations += words
