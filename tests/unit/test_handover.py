"""The state machine of a hand-over, over a storage that a test controls."""

from typing import Any

import pytest

from vhostcache.handover import NEVER, REMIND_NS, RETRY_NS, Away, HandOver, Where

SECOND = 10**9
TIMEOUT = 30 * SECOND


class Storage:
    """Does what the test says, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.can_be_locked = True
        self.calls: list[str] = []
        self.events: list[str] = []
        self.is_drained = self.is_closed = self.is_stuck = False
        self.reason: str | None = ""

    def tell(self, level: str, event: str, **fields: Any) -> None:
        self.events.append(event)

    def hurry(self, on: bool) -> None:
        self.calls.append("hurry" if on else "do not hurry")

    def drain(self, on: bool) -> None:
        self.calls.append("drain" if on else "do not drain")

    def drained(self) -> bool:
        return self.is_drained

    def close(self) -> None:
        self.calls.append("close")

    def closed(self) -> bool:
        return self.is_closed

    def let_go(self) -> None:
        self.calls.append("let go")

    def take(self) -> str | None:
        if self.reason == "":
            self.calls.append("take")
        return self.reason

    def stop_taking(self) -> None:
        self.calls.append("stop taking")

    def stopped(self) -> None:
        self.calls.append("stopped")

    def give_up(self) -> bool:
        self.calls.append("give up")
        return self.is_stuck

    def cut_off(self) -> None:
        self.calls.append("cut off")

    def dirty_bytes(self) -> int:
        return 4096

    def lost_bytes(self) -> int:
        return 0


@pytest.fixture
def storage() -> Storage:
    return Storage()


@pytest.fixture
def held(storage: Storage) -> HandOver:
    """Served, by one queue, when its last queue is asked to stop in a migration."""
    hand_over = HandOver(storage, TIMEOUT)
    hand_over.queue_started(0, 0)
    hand_over.migrating(True)
    hand_over.asked(0)
    assert storage.calls == ["hurry", "drain"]
    return hand_over


@pytest.fixture
def away(storage: Storage) -> HandOver:
    return HandOver(storage, TIMEOUT, away=True)


def test_it_is_let_go_of_when_it_is_drained_and_closed_and_the_queue_stops_by_that(
    held: HandOver, storage: Storage
) -> None:
    assert held.step(SECOND) == TIMEOUT
    storage.is_drained = True
    held.step(2 * SECOND)
    assert storage.calls[2:] == ["close"]
    storage.is_closed = True
    assert held.step(3 * SECOND) == NEVER
    assert storage.calls[3:] == ["let go"]
    assert held.where is Where.AWAY
    held.queue_stopped(0)
    held.disconnected()
    assert not held.busy
    assert storage.events == ["migrating", "handing-over", "handed-over"]


def test_an_image_that_takes_too_long_stays_here_the_queue_stops_and_the_hand_over_goes_on(
    held: HandOver, storage: Storage
) -> None:
    assert held.step(TIMEOUT) == TIMEOUT + REMIND_NS
    assert storage.calls[2:] == ["stopped"]
    held.queue_stopped(0)
    held.disconnected()
    held.step(TIMEOUT + REMIND_NS)
    assert storage.events[2:] == ["hand-over-late"] * 2
    storage.is_drained = storage.is_closed = True
    held.step(10 * TIMEOUT)
    assert storage.calls[3:] == ["close", "let go"]


def test_while_its_storage_is_being_opened_nothing_is_said_of_it(away: HandOver, storage: Storage) -> None:
    storage.reason = None
    away.queue_started(0, 0)
    assert away.step(0) == RETRY_NS
    assert not storage.events
    storage.reason = ""
    away.step(1)
    assert away.is_held
    assert storage.events == ["taken-over"]


@pytest.mark.parametrize("how", ["the queue stops", "it takes too long", "the front-end goes"])
def test_what_is_being_opened_is_let_go_of_when_nobody_waits_any_more(
    away: HandOver, storage: Storage, how: str
) -> None:
    storage.reason = None
    away.queue_started(0, 0)
    away.step(0)
    if how == "the queue stops":
        away.queue_stopped(0)
    elif how == "the front-end goes":
        away.disconnected()
    else:
        away.step(TIMEOUT)
        assert storage.events == ["take-over-failed"]
    assert "stop taking" in storage.calls
    assert away.where is Where.AWAY


def test_a_guest_that_goes_on_here_keeps_what_was_not_drained(held: HandOver, storage: Storage) -> None:
    held.step(TIMEOUT)
    held.queue_stopped(0)
    held.queue_started(0, TIMEOUT)
    assert held.is_held
    assert storage.calls[3:] == ["do not drain", "hurry"]
    held.migrating(False)
    assert storage.calls[5:] == ["do not hurry"]


def test_without_locks_nothing_is_answered_before_the_image_has_everything(held: HandOver, storage: Storage) -> None:
    storage.can_be_locked = False
    held.step(10 * TIMEOUT)
    assert "stopped" not in storage.calls
    assert "hand-over-late" in storage.events


def test_a_front_end_that_dies_before_it_was_answered_has_not_migrated(held: HandOver, storage: Storage) -> None:
    held.disconnected()
    assert held.is_held
    assert storage.calls[2:] == ["do not drain", "do not hurry"]
    assert storage.events[2:] == ["hand-over-cancelled"]


def test_a_guest_that_goes_on_here_while_the_log_is_closed_takes_it_back(held: HandOver, storage: Storage) -> None:
    storage.is_drained = True
    held.step(0)
    held.step(TIMEOUT)
    held.queue_stopped(0)
    held.queue_started(0, TIMEOUT)
    storage.is_closed = True
    held.step(TIMEOUT)
    assert held.is_held
    assert storage.calls[2:] == ["close", "stopped", "let go", "take", "hurry"]


def test_a_cancelled_migration_changes_nothing(storage: Storage) -> None:
    hand_over = HandOver(storage, TIMEOUT)
    hand_over.queue_started(0, 0)
    hand_over.migrating(True)
    hand_over.migrating(True)
    hand_over.migrating(False)
    assert storage.calls == ["hurry", "do not hurry"]
    assert not hand_over.busy


@pytest.mark.parametrize("stuck", [True, False])
def test_a_guest_whose_requests_nothing_answers_does_not_migrate(storage: Storage, stuck: bool) -> None:
    storage.is_stuck = stuck
    hand_over = HandOver(storage, TIMEOUT)
    hand_over.quiesced(0)
    assert not hand_over.busy, "it does not migrate"
    hand_over.migrating(True)
    hand_over.quiesced(SECOND)
    hand_over.quiesced(2 * SECOND)
    assert hand_over.step(SECOND + TIMEOUT) == 2 * SECOND + TIMEOUT
    assert hand_over.step(2 * SECOND + TIMEOUT) == NEVER
    assert storage.calls == ["hurry", "give up"]
    assert storage.events == ["migrating", "hand-over-refused"][: 1 + stuck]
    assert hand_over.is_held
    assert not hand_over.busy


def test_it_is_taken_when_the_first_queue_starts(away: HandOver, storage: Storage) -> None:
    assert not away.busy
    away.queue_started(0, 0)
    away.queue_started(1, 0)
    assert away.busy
    assert away.step(0) == NEVER
    assert away.is_held
    assert storage.calls == ["take"]


def test_what_another_daemon_has_is_tried_for_again_and_again(away: HandOver, storage: Storage) -> None:
    storage.reason = "is in use"
    away.queue_started(0, 0)
    assert away.step(0) == RETRY_NS
    assert away.where is Where.TAKING
    away.step(RETRY_NS)
    assert storage.events == ["take-over-waits"]
    storage.reason = "has its newest data elsewhere"
    away.step(2 * RETRY_NS)
    assert storage.events == ["take-over-waits"] * 2
    away.step(2 * REMIND_NS)
    assert storage.events == ["take-over-waits"] * 3
    storage.reason = ""
    away.step(2 * REMIND_NS + RETRY_NS)
    assert away.is_held


def test_who_waits_too_long_is_cut_off_and_may_come_again(away: HandOver, storage: Storage) -> None:
    storage.reason = "is in use"
    away.queue_started(0, 0)
    away.step(0)
    assert away.step(TIMEOUT) == NEVER
    assert storage.calls == ["stop taking", "cut off"]
    assert storage.events[-1] == "take-over-failed"
    away.disconnected()
    assert not away.busy
    storage.reason = ""
    away.queue_started(0, 2 * TIMEOUT)
    away.step(2 * TIMEOUT)
    assert away.is_held


@pytest.mark.parametrize("leaves", ["stops", "disconnects"])
def test_nobody_is_waited_for_who_has_left(away: HandOver, storage: Storage, leaves: str) -> None:
    storage.reason = "is in use"
    away.queue_started(0, 0)
    away.step(0)
    if leaves == "stops":
        away.queue_stopped(0)
    else:
        away.disconnected()
    assert not away.busy
    assert away.where is Where.AWAY


def test_a_queue_that_stops_where_nothing_is_held_is_answered_at_once(away: HandOver, storage: Storage) -> None:
    away.asked(0)
    assert storage.calls == ["stopped"]


def test_a_volume_without_storage_takes_part_in_nothing() -> None:
    core = Away(1 << 20)
    assert core.tick(0) == NEVER
    assert core.drained
    core.connected()
    core.quiesce(True)
    core.set_write_cache(False)
    core.write_cache_unknown()
    core.drain()
    core.disconnected()
    assert set(core.statistics().values()) == {0}
    with pytest.raises(AssertionError):
        core.requests([1], [0], [0], [8], 0)
    with pytest.raises(AssertionError):
        core.io_done(0, 0)
