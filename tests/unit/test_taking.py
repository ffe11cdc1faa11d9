"""Opening a storage in a thread: what was opened is kept by one side, or closed."""

import contextlib
import threading

import pytest

from vhostcache.errors import ImageError
from vhostcache.taking import Taking


class Storage:
    """Is opened when the test says so, and may be closed once."""

    def __init__(self, error: Exception | None = None) -> None:
        self.go, self.woken = threading.Event(), threading.Event()
        self.closed = 0
        self.error = error
        self.taking = Taking(self.take, self.woken.set)

    def take(self, stack: contextlib.ExitStack) -> str:
        stack.callback(self.close)
        assert self.go.wait(60)
        if self.error is not None:
            raise self.error
        return "storage"

    def close(self) -> None:
        self.closed += 1
        raise OSError("it is heard by nobody")

    def end(self) -> Taking[str]:
        self.go.set()
        assert self.woken.wait(60)
        self.taking.join()
        return self.taking


def test_what_was_opened_is_whose_who_keeps_it() -> None:
    storage = Storage()
    assert not storage.taking.ended
    assert storage.end().ended
    assert storage.taking.result() == "storage"
    storage.taking.keep()
    storage.taking.abandon()
    storage.taking.join()
    assert storage.closed == 0


@pytest.mark.parametrize("early", [True, False], ids=["before it ends", "after it"])
def test_what_nobody_wants_is_closed(early: bool) -> None:
    storage = Storage()
    if early:
        storage.taking.abandon()
    storage.end()
    storage.taking.abandon()
    storage.taking.join()
    assert storage.closed == 1


def test_why_it_could_not_be_opened_is_raised_where_it_is_asked_for() -> None:
    storage = Storage(ImageError("image", "is in use"))
    with pytest.raises(ImageError, match="image: is in use"):
        storage.end().result()
    assert storage.closed == 1
