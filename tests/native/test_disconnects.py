"""A front-end may leave, stop and come back at any moment; so may the daemon. Nothing is lost, doubled or invented."""

import os
import random
import signal
import struct
import time
from collections.abc import Callable

import pytest

from tests.frontend import OK, P_CONFIG, P_MQ, P_REPLY_ACK, T_OUT, Frontend, GoneError, Request
from tests.native.conftest import BOTH_ENGINES, FREE, MIB, QUEUES, Disk, noise
from vhostcache.backend import locks

WITHOUT_INFLIGHT = (P_MQ, P_REPLY_ACK, P_CONFIG)
INFLIGHT_HEADER = struct.Struct("<QHHHH")  # features, version, descriptors, last batch, used index
INFLIGHT_STATE = struct.Struct("<B5xHQ")  # in flight, next, counter


def write_storm(f: Frontend, seed: object, count: int = 30, queues: int = 1, base: int = FREE) -> list[Request]:
    """Writes published and not waited for; write i is on queue i % queues."""
    return [f.start_write(base + i * 16384, noise(16384, (seed, i)), queue=i % queues) for i in range(count)]


@BOTH_ENGINES
def test_what_was_acknowledged_before_a_disconnect_is_there_after_it(disk: Disk) -> None:
    for round_number in range(10):
        with disk.frontend() as f:
            requests = write_storm(f, round_number)
            for request in requests[:15]:
                assert f.finish(request).status == OK
        with disk.frontend() as f:
            for i in range(15):
                assert f.read(FREE + i * 16384, 16384) == noise(16384, (round_number, i))


@BOTH_ENGINES
def test_a_write_cut_off_by_a_disconnect_is_there_wholly_or_sector_by_sector_not_at_all(disk: Disk) -> None:
    for round_number in range(10):
        with disk.frontend(protocol=WITHOUT_INFLIGHT) as f:
            old = [noise(16384, ("old", round_number, i)) for i in range(30)]
            for i, data in enumerate(old):
                f.write(FREE + i * 16384, data)
            write_storm(f, ("cut", round_number))
        with disk.frontend() as f:
            for i in range(30):
                found, new = f.read(FREE + i * 16384, 16384), noise(16384, (("cut", round_number), i))
                for at in range(0, 16384, 512):
                    assert found[at : at + 512] in (old[i][at : at + 512], new[at : at + 512])


@BOTH_ENGINES
def test_requests_in_flight_at_a_disconnect_are_done_by_the_next_connection(disk: Disk) -> None:
    for round_number in range(10):
        first = disk.frontend(queues=QUEUES, memory=16 * MIB)
        requests = write_storm(first, round_number, count=80, queues=QUEUES)
        if round_number % 2:
            first.finish(requests[0], 0)
            requests[0] = None  # type: ignore[call-overload]
        first.disconnect()
        with disk.frontend(queues=QUEUES, resume=first) as f:
            for i, request in enumerate(requests):
                if request is not None:
                    assert f.finish(request, i % QUEUES).status == OK
            for queue in f.queues:
                queue.collect()
                assert queue.completed == {}, "a request was completed twice"
                assert queue.last_used == queue.next_available
            for i in range(80):
                assert f.read(FREE + i * 16384, 16384) == noise(16384, (round_number, i))


def area_of(f: Frontend, queue: int) -> int:
    """Where a queue's part of the in-flight area begins: parts are aligned to 64 bytes."""
    return queue * -(-(16 + 16 * f.queue_size) // 64) * 64


def mark_in_flight(f: Frontend, head: int, counter: int, queue: int = 0) -> None:
    at = area_of(f, queue) + INFLIGHT_HEADER.size + 16 * head
    os.pwrite(f.inflight_fd, INFLIGHT_STATE.pack(1, 0, counter), at)


def in_flight(f: Frontend, queue: int = 0) -> list[int]:
    area = os.pread(f.inflight_fd, 16 * f.queue_size, area_of(f, queue) + INFLIGHT_HEADER.size)
    return [i for i in range(f.queue_size) if area[16 * i]]


@BOTH_ENGINES
def test_requests_that_the_area_says_were_in_flight_are_resubmitted_in_their_order(disk: Disk) -> None:
    """As if a back-end had died with four overlapping writes taken and not completed."""
    first = disk.frontend()
    first.write(FREE, bytes(8192))
    assert in_flight(first) == []
    first.stop(0)
    writes = [noise(8192, ("in order", i)) for i in range(4)]
    heads = [
        first.queues[0].chain([first.header(T_OUT, FREE // 512), first.out(data), first.room(1)]) for data in writes
    ]
    first.queues[0].offer(*heads)
    first.memory.put_u16(first.queues[0].available + 2, first.queues[0].next_available)
    for head, counter in zip(heads, (7, 5, 6, 4), strict=True):  # taken in the order 3, 1, 2, 0
        mark_in_flight(first, head, counter)
    first.disconnect()
    with disk.frontend(resume=first) as f:
        for head in heads:
            f.queues[0].wait(head)
        assert in_flight(f) == []
        assert f.read(FREE, 8192) == writes[0], "the newest of the resubmitted writes is not what stands there"


@BOTH_ENGINES
def test_nothing_is_left_in_the_area_when_all_is_done(disk: Disk) -> None:
    with disk.frontend(queues=QUEUES) as f:
        for i, request in enumerate(write_storm(f, "area", count=60, queues=QUEUES)):
            assert f.finish(request, i % QUEUES).status == OK
        assert [in_flight(f, q) for q in range(QUEUES)] == [[]] * QUEUES


# -- stopping a queue --


@BOTH_ENGINES
@pytest.mark.parametrize("queues", [1, QUEUES])
def test_a_queue_stopped_in_mid_flight_has_completed_all_it_took(disk: Disk, queues: int) -> None:
    """Without an in-flight area nothing may be left open: the front-end could not tell."""
    for round_number in range(10):
        with disk.frontend(queues=queues, protocol=WITHOUT_INFLIGHT, queue_size=256) as f:
            requests = write_storm(f, round_number, count=60, queues=queues)
            bases = [f.stop(q) for q in range(queues)]
            used = [f.memory.u16(queue.used + 2) for queue in f.queues]
            assert bases == used, "taken and not completed"
            snapshot = f.memory.get(f.queues[0].used, 6 + 8 * f.queue_size)
            time.sleep(0.02)
            assert f.memory.get(f.queues[0].used, 6 + 8 * f.queue_size) == snapshot, "a stopped queue was written to"
            for q in range(queues):
                f.start(q, base=bases[q])
                f.queues[q].kick()
            for i, request in enumerate(requests):
                assert f.finish(request, i % queues).status == OK
            for i in range(60):
                assert f.read(FREE + i * 16384, 16384) == noise(16384, (round_number, i))


@BOTH_ENGINES
def test_a_queue_stopped_in_mid_flight_goes_on_with_its_in_flight_area(disk: Disk) -> None:
    for round_number in range(10):
        with disk.frontend() as f:
            requests = write_storm(f, round_number)
            f.stop(0)
            f.start(0)
            f.queues[0].kick()
            for request in requests:
                assert f.finish(request).status == OK
            f.queues[0].collect()
            assert f.queues[0].completed == {}
            for i in range(30):
                assert f.read(FREE + i * 16384, 16384) == noise(16384, (round_number, i))


@BOTH_ENGINES
def test_a_stopped_queue_takes_nothing_while_the_others_work(disk: Disk) -> None:
    with disk.frontend(queues=2) as f:
        f.stop(0)
        request = f.start_write(FREE, noise(4096, "stopped"), queue=0)
        for i in range(50):
            f.write(FREE + MIB + i * 4096, noise(4096, i), queue=1)
        assert not f.queues[0].is_done(request.head)
        f.start(0)
        f.queues[0].kick()
        assert f.finish(request).status == OK


@BOTH_ENGINES
def test_a_guest_may_reset_the_device_and_begin_again(disk: Disk) -> None:
    """All queues stopped, everything negotiated anew, as at a reboot."""
    with disk.frontend(queues=2) as f:
        f.write(FREE, noise(4096, "before the reset"))
        for _ in range(20):
            for q in range(2):
                f.stop(q)
                f.queues[q].reset()
            os.close(f.inflight_fd)
            f.inflight_fd = -1
            f.negotiate()
            f.share()
            f.track_inflight()
            for q in range(2):
                f.start(q)
            assert f.read(FREE, 4096, queue=1) == noise(4096, "before the reset")


# -- the daemon goes and comes back --


@pytest.fixture
def own_disk(make_disk: Callable[..., Disk]) -> Disk:
    """A disk whose daemon the test may stop and start."""
    return make_disk()


def test_after_sigterm_everything_acknowledged_is_in_the_image(own_disk: Disk) -> None:
    disk = own_disk
    with disk.frontend() as f:
        for i in range(200):
            f.write(FREE + i * 12288, noise(8192, i))
        disk.daemon.stop()
        f.expect_gone()
    for i in range(200):
        assert disk.in_image(FREE + i * 12288, 8192) == noise(8192, i)
    disk.daemon.start()
    disk.assert_good()


def test_sigterm_in_the_middle_of_a_storm_loses_and_doubles_nothing(own_disk: Disk) -> None:
    disk = own_disk
    first = disk.frontend(queues=QUEUES)
    requests = write_storm(first, "sigterm", count=80, queues=QUEUES)
    disk.daemon.stop()
    first.disconnect()
    disk.daemon.start()
    with disk.frontend(queues=QUEUES, resume=first) as f:
        for i, request in enumerate(requests):
            assert f.finish(request, i % QUEUES).status == OK
        for i in range(80):
            assert f.read(FREE + i * 16384, 16384) == noise(16384, ("sigterm", i))
    disk.assert_good()


def test_requests_in_flight_when_the_daemon_is_killed_are_done_by_the_next(own_disk: Disk) -> None:
    disk = own_disk
    for round_number in range(5):
        first = disk.frontend(queues=QUEUES)
        first.write(FREE + 8 * MIB, noise(65536, ("flushed", round_number)))
        first.flush()
        requests = write_storm(first, ("killed", round_number), count=80, queues=QUEUES)
        time.sleep(random.Random(round_number).random() / 500)
        disk.daemon.kill()
        first.disconnect()
        disk.daemon.start()
        with disk.frontend(queues=QUEUES, resume=first) as f:
            # What was acknowledged and not flushed may be lost with the daemon: it keeps no log yet.
            done_before = {i for i, r in enumerate(requests) if f.queues[i % QUEUES].is_done(r.head)}
            for i, request in enumerate(requests):
                assert f.finish(request, i % QUEUES).status == OK
            for i in range(80):
                if i not in done_before:
                    assert f.read(FREE + i * 16384, 16384) == noise(16384, (("killed", round_number), i))
            assert f.read(FREE + 8 * MIB, 65536) == noise(65536, ("flushed", round_number))
    disk.assert_good()


def test_a_second_signal_during_the_drain_changes_nothing(own_disk: Disk) -> None:
    disk = own_disk
    with disk.frontend() as f:
        for i in range(20):
            f.write(FREE + i * MIB, noise(MIB, i))
        os.kill(disk.daemon.pid, signal.SIGTERM)
        os.kill(disk.daemon.pid, signal.SIGINT)
        disk.daemon.stop()
    for i in range(20):
        assert disk.in_image(FREE + i * MIB, MIB) == noise(MIB, i)
    disk.daemon.start()


def test_a_socket_left_by_a_killed_daemon_is_replaced(own_disk: Disk) -> None:
    own_disk.daemon.kill()
    assert own_disk.socket.exists()
    own_disk.daemon.start()
    own_disk.assert_good()


@BOTH_ENGINES
def test_a_front_end_that_is_killed_in_the_middle_is_forgotten(disk: Disk) -> None:
    """A process that dies closes its socket and takes its memory with it, at whatever moment."""
    for round_number in range(15):
        child = os.fork()
        if child == 0:
            try:
                f = Frontend(disk.socket, queues=QUEUES)
                while True:
                    for i, request in enumerate(write_storm(f, "child", count=60, queues=QUEUES)):
                        f.finish(request, i % QUEUES)
            except (GoneError, AssertionError, OSError):
                pass
            finally:
                os._exit(0)
        time.sleep(0.05 + random.Random(round_number).random() / 50)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with disk.frontend() as f:
        for i in range(60):
            assert f.read(FREE + i * 16384, 16384) == noise(16384, ("child", i))


def test_the_image_is_free_the_moment_the_daemon_has_ended(own_disk: Disk) -> None:
    """An io_uring outlives its process by a little: the lock must not."""
    for _ in range(10):
        with own_disk.frontend() as f:
            for i in range(30):
                f.write(FREE + i * 65536, noise(65536, i))
        own_disk.daemon.stop()
        descriptor = os.open(own_disk.image, os.O_RDWR)
        try:
            locks.lock(descriptor, read_only=False)
        finally:
            os.close(descriptor)
        own_disk.daemon.start()
