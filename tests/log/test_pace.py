"""The pace of writes as the log fills, with a clock of its own."""

from itertools import pairwise

from vhostcache.log.pace import LEAST_RATE, Pacer

MS = 1_000_000
SECOND = 1000 * MS
RING = 1_000_000


def accepted(pacer: Pacer, offered: int = 1000) -> int:
    """Blocks that are accepted now."""
    count = 0
    while count < offered and pacer.take(1):
        count += 1
    return count


def test_writes_are_free_while_there_is_room() -> None:
    pacer = Pacer(RING)
    for ms in range(2000):
        pacer.update(int(RING * 0.5), 0, 0, ms * MS)
    assert not pacer.active
    assert accepted(pacer) == 1000


def test_writes_settle_at_the_rate_at_which_objects_become_clean_many_at_a_time() -> None:
    pacer = Pacer(RING)
    head, clean = RING * 0.9, 0.0
    by_second: list[int] = []
    waits: list[int] = []
    waited = 0
    for ms in range(60_000):
        if ms % 1500 == 1499:
            clean += 30_000  # 20,000 a second
        pacer.update(int(head), int(clean), int(clean), ms * MS)
        count = accepted(pacer)
        head += count
        if ms % 1000 == 0:
            by_second.append(0)
        by_second[-1] += count
        waited = 0 if count else waited + 1
        if ms >= 20_000:
            waits.append(waited)
    assert head - clean < RING
    late = by_second[20:]
    assert 15_000 < sum(late) / len(late) < 25_000
    assert min(late) > 10_000
    assert max(waits) <= 5  # ms, though nothing becomes clean for 1500


def test_a_log_of_which_every_object_has_blocks_at_the_tail_settles_all_the_same() -> None:
    """The clean address stands still while the objects have their turns, and leaps when all of them have had it."""
    pacer = Pacer(RING)
    objects = 250
    dirty_since = [0.0] * objects
    head = RING * 0.5
    turned = 0
    by_second: list[int] = []
    for ms in range(120_000):
        clean = min(dirty_since)
        if ms % 50 == 0:  # an object, of which every write is as likely to be
            turned += int(head - clean) // objects
            dirty_since[dirty_since.index(clean)] = head
        pacer.update(int(head), int(clean), turned, ms * MS)
        count = accepted(pacer, 200)
        head += count
        if ms % 1000 == 0:
            by_second.append(0)
        by_second[-1] += count
        assert head - clean < RING
    late = by_second[60:]
    assert max(late) < 2 * min(late)
    assert min(by_second) > LEAST_RATE


def test_a_backend_that_stands_still_leaves_a_trickle() -> None:
    pacer = Pacer(RING)
    for ms in range(20_000):
        pacer.update(int(RING * 0.94), 0, 0, ms * MS)
    assert pacer.active
    assert LEAST_RATE < pacer.rate < RING / 100 / 5
    pacer.update(int(RING * 0.96), 0, 0, 21 * SECOND)
    assert pacer.rate == LEAST_RATE


def test_a_backend_that_stands_still_slows_writes_down_little_by_little() -> None:
    pacer = Pacer(RING)
    head = RING * 0.5
    by_second: list[int] = []
    for ms in range(40_000):
        pacer.update(int(head), 0, 0, ms * MS)
        count = accepted(pacer, 100)
        head += count
        if ms % 1000 == 0:
            by_second.append(0)
        by_second[-1] += count
    assert head < RING
    slowed = by_second[3:]
    assert all(later > 0.8 * earlier for earlier, later in pairwise(slowed))
