"""Blocks of the log that the cache device does not read: which are tried again, and which are given up.

Only the log has their newest version, so nothing is given up lightly; but their addresses hold the tail, and a log that
waits for ever for a bad sector ends full, with all writes of the guest waiting. The rule:

- an attempt counts when it comes RETRY_NS after the last one that counted, so a fault that passes loses nothing;
- it counts only if, right after it, other places of the log (its witnesses) can be read, all of them, and the log can
  be written. If not, it is the device that fails and no sector of it, and counting begins anew: a device that is gone
  for however long loses nothing. Witnesses that cannot be read while others can are not asked again;
- a block that ATTEMPTS attempts in a row have not read is given up. That it is lost has to become durable in the log
  (losses.py), so the device has to write and sync as well.

Owns the attempts. Invariant: a block has attempts only while the newest destage of its object could not read it: one
that has been read since, overwritten or lost has none. What was given up stays so until all of its object is settled:
in the policy `ordered` a version that has been overwritten is asked for again until then. It does no I/O and knows no
clock.
"""

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

ATTEMPTS: Final = 5
RETRY_NS: Final = 10_000_000_000
WITNESSES: Final = 4
"""Other places of the log that are read to find out whether the device reads at all."""
ELSEWHERE_MOST: Final = 1024
"""Of those that could not be read so many are known, then it is begun anew."""


class Attempt(NamedTuple):
    """What is known of a block that could not be read."""

    address: int
    counted: int
    last_ns: int
    """When one counted last."""


def tried_again(before: Attempt | None, address: int, now_ns: int) -> Attempt:
    """The block at this log address could not be read, once more or (`before` is None) for the first time."""
    if before is None or before.address != address:
        return Attempt(address, 1, now_ns)
    if now_ns - before.last_ns < RETRY_NS:
        return before
    return Attempt(address, before.counted + 1, now_ns)


class UnreadableBlocks:
    """`judge` each destage that has left some out, `forget` the object when one has read all."""

    __slots__ = ("_objects", "elsewhere")

    def __init__(self) -> None:
        self._objects: dict[int, dict[int, Attempt]] = {}
        """Object -> block -> attempts."""
        self.elsewhere: set[int] = set()
        """Other addresses that could not be read: no witnesses."""

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._objects)

    @property
    def count(self) -> int:
        """How many are to be tried again."""
        return sum(one.counted < ATTEMPTS for blocks in self._objects.values() for one in blocks.values())

    def addresses(self, numbers: Iterable[int] | None = None) -> set[int]:
        """Where they are in the log; of these objects, or of all."""
        chosen = self._objects if numbers is None else numbers
        return {one.address for number in chosen for one in self._objects.get(number, {}).values()}

    def device_reads(self, good: Sequence[int], bad: Sequence[int]) -> bool:
        """What the witnesses say, which could be read or not."""
        if good:
            if len(self.elsewhere) >= ELSEWHERE_MOST:
                self.elsewhere.clear()
            self.elsewhere.update(bad)
        return bool(good) and not bad

    def forget(self, number: int) -> None:
        """All of the object has been read, overwritten or given up."""
        self._objects.pop(number, None)

    def judge(
        self, number: int, blocks: Sequence[tuple[int, int]], device_works: bool, now_ns: int
    ) -> tuple[list[tuple[int, int]], dict[int, int]]:
        """All that a destage of the object could not read: (block, address). `device_works`: as the rule says. Returns
        those that are given up; and of the others, block by block, how many attempts have counted."""
        before = self._objects.pop(number, {})
        if not device_works:
            return [], dict.fromkeys((block for block, _ in blocks), 0)
        attempts = self._objects[number] = {
            block: tried_again(before.get(block), address, now_ns) for block, address in blocks
        }
        given_up = [(block, one.address) for block, one in attempts.items() if one.counted >= ATTEMPTS]
        return given_up, {block: one.counted for block, one in attempts.items() if one.counted < ATTEMPTS}
