"""The backend as the core sees it: operations in groups, and who is told when a group has ended.

Owns the group numbers of one volume. A group is in use from the operations that name it until its completion, and is
told to exactly one owner, so nothing the engine reports can go astray. It does no I/O: it appends words to the
operation list.
"""

from collections.abc import Sequence
from typing import Protocol

from vhostcache import operations as op


class Owner(Protocol):
    """Whoever waits for a group."""

    def io_done(self, result: int) -> None:
        """All operations of the group have ended; `result` is 0 or the first error, a negative errno."""


class BackendIo:
    """Appends operations of one volume; `operations` is the engine's list, shared by all volumes."""

    __slots__ = ("_free", "_owners", "_volume", "operations")

    def __init__(self, volume: int, operations: list[int], groups: int = op.GROUPS) -> None:
        self.operations = operations
        self._volume = volume << 8
        self._free = list(range(groups - 1, -1, -1))
        self._owners: list[Owner | None] = [None] * groups

    @property
    def in_flight(self) -> int:
        """Groups in flight."""
        return len(self._owners) - len(self._free)

    def available(self) -> int:
        """How many more groups can be begun now."""
        return len(self._free)

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
        self.operations += (op.READ | self._volume | len(slots) << 32, group, offset_bytes, size_bytes)
        self.operations += slots

    def write(self, group: int, offset_bytes: int, size_bytes: int, slots: Sequence[int]) -> None:
        """Slots to backend."""
        self.operations += (op.WRITE | self._volume | len(slots) << 32, group, offset_bytes, size_bytes)
        self.operations += slots

    def read_direct(self, group: int, tag: int, payload_bytes: int, offset_bytes: int, size_bytes: int) -> None:
        """Backend to guest memory, `payload_bytes` into the request's payload."""
        self.operations += (op.READ_DIRECT | tag << 8, group | payload_bytes << 32, offset_bytes, size_bytes)

    def read_request(self, tag: int, offset_bytes: int, size_bytes: int) -> None:
        """Backend to guest memory, a whole request, which the engine completes; only a failure is reported."""
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
