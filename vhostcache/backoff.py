"""Pauses between attempts, and what the errors of a backend mean for them.

Owns when something that has failed is tried again. An error that passes by itself (a lost connection, a medium error)
is retried after 0.1 s, then ever more slowly, at least every 5 s. One that only a person can end (no space, read-only,
not permitted), and a part of the backend that could not be read for ten seconds while it has to be, holds what depends
on it: that is said once, with what to do, and tried every 10 s, or at once when somebody asks for it. Nothing is ever
given up. It imports no clock: time is handed in.
"""

import errno
from typing import Final

FIRST_NS: Final = 100_000_000
MOST_NS: Final = 5_000_000_000
HELD_NS: Final = 10_000_000_000
HINTS: Final = {
    errno.ENOSPC: "make room where the backend is stored",
    errno.EDQUOT: "raise the quota where the backend is stored, or make room",
    errno.EROFS: "make the backend writable again",
    errno.EPERM: "allow writing to the backend",
    errno.EACCES: "allow writing to the backend",
}
"""Errors that do not pass by themselves."""
READ_HINT: Final = "mend the backend: what cannot be read there is a part of what has to be written as a whole"
READS_MOST: Final = 8
"""Failed reads in a row of the same place, 0.1 + ... + 5 s apart, that hold it too."""


class Backoff:
    """`failed` and `succeeded` tell it; before `at_ns` nothing is to be tried again."""

    __slots__ = ("_pause_ns", "at_ns", "failures")

    def __init__(self) -> None:
        self._pause_ns = 0
        self.at_ns = 0
        self.failures = 0
        """In a row."""

    def failed(self, now_ns: int, held: bool = False) -> None:
        """Once more. `held`: it will not pass by itself."""
        self.failures += 1
        self._pause_ns = HELD_NS if held else min(max(2 * self._pause_ns, FIRST_NS), MOST_NS)
        self.at_ns = now_ns + self._pause_ns

    def succeeded(self) -> None:
        """The next failure is the first."""
        self._pause_ns = 0
        self.at_ns = 0
        self.failures = 0


class Trouble:
    """A backend's failures: who has failed and not succeeded since, when to try again, and what to tell people.

    Others who have not failed go on: a failure in a row of them, or of a flush, makes everybody wait for `at_ns`; a
    failure between successes only the one that failed. A number says who: an object, or something below zero."""

    __slots__ = ("_everybody", "_failing", "_notices", "_well", "error", "failures", "held")

    def __init__(self, notices: list[tuple[str, dict[str, object]]]) -> None:
        self._notices = notices
        self._everybody = Backoff()
        self._failing: dict[int, Backoff] = {}
        self._well = True
        """The last that was heard was good."""
        self.failures = 0
        self.held = 0
        """The errno that holds it; 0: it is not held."""
        self.error = 0
        """The errno of the last failure; 0: all that has failed has succeeded since."""

    @property
    def at_ns(self) -> int:
        """Before this nobody is to try."""
        return self._everybody.at_ns

    @property
    def probing(self) -> bool:
        """Nothing has succeeded since the last failure: one attempt at a time will do."""
        return not self._well

    def __bool__(self) -> bool:
        """Whether anything is failing."""
        return bool(self._failing)

    def own_ns(self, who: int) -> int:
        """Before this the one that has failed is not to try again."""
        own = self._failing.get(who)
        return own.at_ns if own is not None else 0

    @property
    def failing(self) -> int:
        """How many have failed and not succeeded since."""
        return len(self._failing)

    def waits(self, who: int, now_ns: int, others_first: bool = False) -> bool:
        """Whether this one is not to be tried yet. `others_first`: nor if it has failed at all."""
        own = self._failing.get(who)
        return own is not None and (others_first or now_ns < own.at_ns)

    def failed(self, who: int, operation: str, result: int, now_ns: int, everybody: bool = False) -> None:
        """`result` is a negative errno. `everybody`: nobody can go on."""
        self.failures += 1
        number = self.error = -result
        first = not self._failing
        own = self._failing.setdefault(who, Backoff())
        held = number in HINTS or (operation == "read" and own.failures + 1 >= READS_MOST)
        if held and number != self.held:
            hint = HINTS.get(number, READ_HINT)
            self._notices.append(("backend-held", {"operation": operation, "errno": number, "hint": hint}))
            self.held = number
        elif first:
            self._notices.append(("backend-error", {"operation": operation, "errno": number}))
        own.failed(now_ns, held)
        if everybody or not self._well:
            self._everybody.failed(now_ns, held)
        self._well = False

    def succeeded(self, who: int) -> None:
        """The backend has done something for this one."""
        if not self._failing:
            return
        self._well = True
        self._everybody.succeeded()
        if self._failing.pop(who, None) is not None and not self._failing:
            self.held = self.error = 0
            self._notices.append(("backend-recovered", {}))

    def retry(self) -> None:
        """Somebody says that it has been mended: do not wait any longer."""
        self._everybody.succeeded()
        for own in self._failing.values():
            own.succeeded()
