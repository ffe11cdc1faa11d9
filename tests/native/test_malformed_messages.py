"""Messages that no honest front-end sends: each costs at most the connection it came on.

After each test the `disk` fixture checks that the daemon lives, that a good front-end works, and that the guarded data
has not changed.
"""

import contextlib
import mmap
import os
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator

import pytest

from tests.frontend import (
    ADD_MEM_REG,
    F_LOG_ALL,
    F_PROTOCOL,
    F_VERSION_1,
    GET_CONFIG,
    GET_FEATURES,
    GET_INFLIGHT_FD,
    GET_PROTOCOL_FEATURES,
    GET_QUEUE_NUM,
    GET_VRING_BASE,
    GUEST,
    NEED_REPLY,
    OK,
    P_CONFIG,
    P_INFLIGHT,
    P_LOG_SHMFD,
    P_MEM_SLOTS,
    P_MQ,
    P_REPLY_ACK,
    P_SLAVE_REQ,
    REM_MEM_REG,
    SECTOR,
    SET_CONFIG,
    SET_FEATURES,
    SET_INFLIGHT_FD,
    SET_LOG_BASE,
    SET_LOG_FD,
    SET_MEM_TABLE,
    SET_OWNER,
    SET_PROTOCOL_FEATURES,
    SET_SLAVE_REQ_FD,
    SET_VRING_ADDR,
    SET_VRING_BASE,
    SET_VRING_CALL,
    SET_VRING_ENABLE,
    SET_VRING_ERR,
    SET_VRING_KICK,
    SET_VRING_NUM,
    T_IN,
    T_OUT,
    USER,
    VERSION,
    Descriptor,
    Frontend,
    GoneError,
    LateError,
    Part,
    RefusedError,
)
from tests.native.conftest import FREE, MIB, QUEUES, Disk, noise

PATIENCE_S = 0.3  # how long an answer is waited for where silence is right too


@contextlib.contextmanager
def memfd(size: int) -> Iterator[int]:
    fd = os.memfd_create("vhostcache-test", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def may_end() -> Iterator[None]:
    """What happens here may be refused or cost the connection."""
    with contextlib.suppress(GoneError, LateError, RefusedError):
        yield


def drain(f: Frontend) -> None:
    """Take what the daemon says, until it is silent or has gone."""
    f.sock.settimeout(PATIENCE_S)
    with contextlib.suppress(GoneError, LateError, OSError):
        while True:
            _, _, fds = f.receive()
            for fd in fds:
                os.close(fd)


def settle(f: Frontend) -> bool:
    """Wait until the daemon has read all messages sent. False if it has closed the connection."""
    try:
        f.sock.settimeout(10)
        f.send(GET_QUEUE_NUM)
        while True:
            request, _, fds = f.receive()
            for fd in fds:
                os.close(fd)
            if request == GET_QUEUE_NUM:
                return True
    except GoneError:
        return False


# -- every message, with every sort of payload --

PAYLOADS = {
    "nothing": b"",
    "a byte": b"\xff",
    "zeroes": bytes(8),
    "ones": b"\xff" * 8,
    "more ones": b"\xff" * 40,
    "random": random.Random(3).randbytes(272),
    "too much": random.Random(4).randbytes(300),
    "far too much": bytes(70000),
}


@pytest.mark.parametrize("started", [False, True], ids=["fresh", "started"])
@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS.keys())
def test_every_message_with_any_payload_costs_at_most_its_connection(disk: Disk, started: bool, payload: bytes) -> None:
    for request in range(51):
        with disk.frontend(start=started) as f, may_end():
            f.send(request, payload)
            settle(f)
    for request in (0xFF, 0x10000, 0xFFFFFFFF):
        with disk.frontend(start=started) as f, may_end():
            f.send(request, payload, flags=VERSION | NEED_REPLY)
            settle(f)


@pytest.mark.parametrize("fds", [1, 2, 8, 9, 50])
def test_every_message_with_any_number_of_descriptors_costs_at_most_its_connection(disk: Disk, fds: int) -> None:
    with memfd(65536) as fd:
        for request in range(51):
            for payload in (bytes(8), bytes(40)):
                with disk.frontend(start=request % 2 == 0) as f, may_end():
                    f.send(request, payload, [fd] * fds)
                    settle(f)


@pytest.mark.parametrize("size", [1, 300, 65536, 2**31 - 1, 2**31, 2**32 - 1])
def test_a_header_that_promises_a_payload_that_never_comes(disk: Disk, size: int) -> None:
    for request in (GET_FEATURES, SET_MEM_TABLE, SET_VRING_NUM, GET_CONFIG, SET_INFLIGHT_FD):
        with disk.frontend(start=False) as f, may_end():
            f.send(request, b"", size=size)


@pytest.mark.parametrize("flags", [0, 2, 3, 4, 5, 8, 12, 0xFFFFFFFF])
def test_odd_flags_cost_at_most_the_connection(disk: Disk, flags: int) -> None:
    with disk.frontend(start=False) as f, may_end():
        f.send(GET_FEATURES, flags=flags)
        drain(f)


@pytest.mark.parametrize("cut", [1, 6, 11, 12, 15])
def test_half_a_message_and_then_silence_holds_up_nobody_for_ever(disk: Disk, cut: int) -> None:
    message = struct.pack("<III", SET_FEATURES, VERSION, 8) + bytes(8)
    with disk.frontend(start=False) as f:
        f.send_raw(message[:cut])
        time.sleep(0.05)
    disk.assert_good()


@pytest.mark.parametrize("request_number", [SET_SLAVE_REQ_FD, SET_VRING_CALL, SET_MEM_TABLE])
@pytest.mark.parametrize("whole", [True, False])
def test_a_front_end_that_gives_away_its_own_socket_cannot_stay_when_it_is_gone(
    disk: Disk, request_number: int, whole: bool
) -> None:
    with disk.frontend(start=False) as f, may_end():
        f.send_raw(struct.pack("<III", request_number, VERSION, 0 if whole else 8), [f.sock.fileno()])
        f.expect_gone()
    disk.assert_good()


def test_a_message_that_comes_byte_by_byte_is_understood(disk: Disk) -> None:
    with disk.frontend(start=False) as f, may_end():
        for byte in struct.pack("<III", GET_FEATURES, VERSION, 0):
            f.send_raw(bytes([byte]))
            time.sleep(0.005)
        request, answer, _ = f.receive()
        assert (request, len(answer)) == (GET_FEATURES, 8)


def test_many_messages_at_once_are_all_answered_in_order(disk: Disk) -> None:
    with disk.frontend(start=False) as f:
        f.send_raw(struct.pack("<III", GET_FEATURES, VERSION, 0) * 20 + struct.pack("<III", GET_QUEUE_NUM, VERSION, 0))
        answers = [f.receive() for _ in range(21)]
        assert [a[0] for a in answers] == [GET_FEATURES] * 20 + [GET_QUEUE_NUM]
        assert len({a[1] for a in answers[:20]}) == 1


def test_noise_on_the_socket_costs_only_its_connection(disk: Disk) -> None:
    for seed in range(30):
        with disk.frontend(start=False) as f, may_end():
            f.send_raw(random.Random(seed).randbytes(1 + seed * 37))


# -- features --


def test_a_driver_without_version_1_is_refused(disk: Disk) -> None:
    with disk.frontend(start=False) as f, may_end():
        f.send(SET_FEATURES, (1 << F_PROTOCOL).to_bytes(8, "little"))
        drain(f)


@pytest.mark.parametrize("features", [0, 2**64 - 1, 1 << F_VERSION_1, 1 << 33, 1 << 34 | 1 << F_VERSION_1])
def test_features_that_were_never_offered_do_no_harm(disk: Disk, features: int) -> None:
    with disk.frontend(start=False) as f, may_end():
        f.send(SET_FEATURES, features.to_bytes(8, "little"))
        f.share()
        f.start(0)
        f.write(FREE, bytes(4096))


@pytest.mark.parametrize("protocol", [2**64 - 1, 1 << 14, 1 << 8, 1 << 63, 1 << 13 | 1 << 12])
def test_protocol_features_that_were_never_offered_do_no_harm(disk: Disk, protocol: int) -> None:
    with disk.frontend(start=False) as f, may_end():
        f.send(SET_PROTOCOL_FEATURES, protocol.to_bytes(8, "little"))
        f.send(SET_FEATURES, (1 << F_VERSION_1 | 1 << F_PROTOCOL).to_bytes(8, "little"))
        f.share()
        f.start(0)
        f.write(FREE, bytes(4096))


# -- queues --

INDEX_MESSAGES = [SET_VRING_NUM, SET_VRING_BASE, GET_VRING_BASE, SET_VRING_ENABLE]


@pytest.mark.parametrize("request_number", INDEX_MESSAGES)
@pytest.mark.parametrize("index", [QUEUES, 64, 255, 256, 257, 65536, 2**31, 2**32 - 1])
def test_a_queue_that_does_not_exist_costs_the_connection(disk: Disk, request_number: int, index: int) -> None:
    with disk.frontend() as f:
        f.send(request_number, struct.pack("<II", index, 128 if request_number == SET_VRING_NUM else 1))
        f.expect_gone()


@pytest.mark.parametrize("index", [QUEUES, 64, 255, 256, 2**31, 2**32 - 1])
def test_addresses_for_a_queue_that_does_not_exist_cost_the_connection(disk: Disk, index: int) -> None:
    with disk.frontend() as f:
        f.send(SET_VRING_ADDR, struct.pack("<IIQQQQ", index, 0, USER, USER, USER, 0))
        f.expect_gone()


@pytest.mark.parametrize("request_number", [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR])
@pytest.mark.parametrize("value", [QUEUES, 64, 255, 255 | 256, 2**32 - 1, 2**64 - 1])
def test_an_eventfd_for_a_queue_that_does_not_exist_costs_the_connection(
    disk: Disk, request_number: int, value: int
) -> None:
    with disk.frontend() as f:
        fd = os.eventfd(0)
        try:
            f.send(request_number, value.to_bytes(8, "little"), [] if value & 256 else [fd])
            f.expect_gone()
        finally:
            os.close(fd)


@pytest.mark.parametrize("number", [0, 3, 100, 1025, 2048, 32768, 65535, 65536, 2**31, 2**32 - 1])
def test_a_queue_of_an_impossible_size_costs_the_connection(disk: Disk, number: int) -> None:
    with disk.frontend(start=False) as f:
        f.negotiate()
        f.share()
        f.track_inflight()
        f.send(SET_VRING_NUM, struct.pack("<II", 0, number))
        f.expect_gone()


def test_a_queue_that_was_never_set_up_is_not_served(disk: Disk) -> None:
    """Kick without size, addresses or memory."""
    for upto in range(4):
        with disk.frontend(start=False) as f, may_end():
            f.negotiate()
            if upto >= 1:
                f.share()
            if upto >= 2:
                f.send(SET_VRING_NUM, struct.pack("<II", 0, 128))
            if upto >= 3:
                f.send(SET_VRING_BASE, struct.pack("<II", 0, 65535))
            kick = os.eventfd(1)
            f.send(SET_VRING_KICK, bytes(8), [kick])
            f.send(SET_VRING_ENABLE, struct.pack("<II", 0, 1))
            os.eventfd_write(kick, 1)
            settle(f)
            os.close(kick)


@pytest.mark.parametrize("base", [1, 127, 128, 1000, 65535])
def test_a_queue_that_starts_elsewhere_in_its_ring_harms_only_its_sender(disk: Disk, base: int) -> None:
    with disk.frontend(protocol=(P_MQ, P_REPLY_ACK, P_CONFIG)) as f, may_end():
        f.stop(0)
        f.send(SET_VRING_BASE, struct.pack("<II", 0, base))
        queue = f.queues[0]
        f.send(SET_VRING_KICK, bytes(8), [queue.kick_fd])
        f.send(SET_VRING_CALL, bytes(8), [queue.call_fd])
        f.send(SET_VRING_ENABLE, struct.pack("<II", 0, 1))
        queue.kick()
        settle(f)


@pytest.mark.parametrize(
    ("which", "address"),
    [
        (which, address)
        for which in ("descriptors", "available", "used")
        for address in (0, USER - 1, USER + 16 * MIB, USER + 16 * MIB - 1, USER + 16 * MIB - 16, 2**64 - 1, USER + 1)
    ],
)
def test_rings_outside_the_memory_cost_the_connection(disk: Disk, which: str, address: int) -> None:
    """Also those that begin inside and end outside; and unaligned ones, which may work."""
    alive = False
    with disk.frontend(start=False) as f, may_end():
        f.negotiate()
        f.share()
        f.track_inflight()
        f.send(SET_VRING_NUM, struct.pack("<II", 0, 128))
        places = {"descriptors": USER, "used": USER + 4096, "available": USER + 8192} | {which: address}
        ring = struct.pack("<IIQQQQ", 0, 0, places["descriptors"], places["used"], places["available"], 0)
        f.send(SET_VRING_ADDR, ring)
        kick = os.eventfd(1)
        f.send(SET_VRING_KICK, bytes(8), [kick])
        f.send(SET_VRING_ENABLE, struct.pack("<II", 0, 1))
        f.memory.put_u16(8192 + 2, 1)
        os.eventfd_write(kick, 1)
        os.close(kick)
        alive = settle(f)
    assert not alive or address == USER + 1, "a ring outside the memory was accepted"


def test_rings_moved_while_they_run_harm_only_their_sender(disk: Disk) -> None:
    for _ in range(10):
        with disk.frontend() as f, may_end():
            requests = [f.start_write(FREE + i * 4096, bytes(4096)) for i in range(30)]
            f.send(SET_VRING_ADDR, struct.pack("<IIQQQQ", 0, 0, USER + 4 * MIB, USER + 5 * MIB, USER + 6 * MIB, 0))
            f.send(SET_VRING_NUM, struct.pack("<II", 0, 256))
            f.queues[0].kick()
            settle(f)
            del requests


# -- eventfds that are none --


def odd_descriptors() -> dict[str, Callable[[], tuple[int, list[int]]]]:
    """Each makes a descriptor to send, and the list of those to close afterwards."""

    def null() -> tuple[int, list[int]]:
        fd = os.open("/dev/null", os.O_RDWR)
        return fd, [fd]

    def zero() -> tuple[int, list[int]]:
        fd = os.open("/dev/zero", os.O_RDWR)
        return fd, [fd]

    def pipe_read() -> tuple[int, list[int]]:
        reading, writing = os.pipe()
        return reading, [reading, writing]

    def full_pipe() -> tuple[int, list[int]]:
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing, bytes(4096))
        os.set_blocking(writing, True)
        return writing, [reading, writing]

    def broken_pipe() -> tuple[int, list[int]]:
        reading, writing = os.pipe()
        os.close(reading)
        return writing, [writing]

    def full_eventfd() -> tuple[int, list[int]]:
        fd = os.eventfd(0)  # blocking: whoever adds to it without care waits for ever
        os.eventfd_write(fd, 2**64 - 2)
        return fd, [fd]

    def blocking_eventfd() -> tuple[int, list[int]]:
        fd = os.eventfd(0)
        return fd, [fd]

    def semaphore() -> tuple[int, list[int]]:
        fd = os.eventfd(0, os.EFD_SEMAPHORE)
        os.eventfd_write(fd, 2**40)
        return fd, [fd]

    def file() -> tuple[int, list[int]]:
        fd = os.memfd_create("file")
        os.write(fd, bytes(64))
        return fd, [fd]

    def a_socket() -> tuple[int, list[int]]:
        left, right = socket.socketpair()
        a, b = left.detach(), right.detach()
        return a, [a, b]

    def listening() -> tuple[int, list[int]]:
        s = socket.socket(socket.AF_UNIX)
        s.bind(f"\0vhostcache-test-{os.getpid()}-{time.monotonic_ns()}")
        s.listen()
        fd = s.detach()
        return fd, [fd]

    def folder() -> tuple[int, list[int]]:
        fd = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
        return fd, [fd]

    makers = [
        *(null, zero, pipe_read, full_pipe, broken_pipe, full_eventfd, blocking_eventfd, semaphore),
        *(file, a_socket, listening, folder),
    ]
    return {m.__name__: m for m in makers}


ODD = odd_descriptors()


@pytest.mark.parametrize("request_number", [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR], ids=["kick", "call", "err"])
@pytest.mark.parametrize("kind", ODD)
def test_an_eventfd_that_is_none_harms_only_its_sender(disk: Disk, request_number: int, kind: str) -> None:
    fd, to_close = ODD[kind]()
    try:
        with disk.frontend() as f, may_end():
            f.send(request_number, bytes(8), [fd])
            settle(f)
            requests = [f.start_write(FREE + i * 4096, bytes(4096)) for i in range(8)]
            time.sleep(0.02)
            for request in requests:
                f.queues[0].kick()
                f.finish(request, timeout_s=0.2)
        disk.assert_good()
    finally:
        for each in to_close:
            os.close(each)


@pytest.mark.parametrize("kind", ODD)
def test_a_memory_that_is_none_costs_at_most_the_connection(disk: Disk, kind: str) -> None:
    fd, to_close = ODD[kind]()
    try:
        for request, payload in (
            (SET_MEM_TABLE, struct.pack("<IIQQQQ", 1, 0, GUEST, 65536, USER, 0)),
            (SET_INFLIGHT_FD, struct.pack("<QQHHI", 65536, 0, 1, 128, 0)),
            (SET_LOG_BASE, struct.pack("<QQ", 65536, 0)),
            (SET_LOG_FD, b""),
            (SET_SLAVE_REQ_FD, b""),
        ):
            protocol = (P_MQ, P_CONFIG, P_INFLIGHT, P_LOG_SHMFD, P_SLAVE_REQ)
            with disk.frontend(start=False, protocol=protocol) as f, may_end():
                f.negotiate()
                f.send(request, payload, [fd])
                settle(f)
    finally:
        for each in to_close:
            os.close(each)


# -- memory --


def table(*regions: tuple[int, int, int, int], count: int | None = None) -> bytes:
    return struct.pack("<II", len(regions) if count is None else count, 0) + b"".join(
        struct.pack("<QQQQ", *r) for r in regions
    )


BAD_TABLES = {
    "no regions": (table(), 0),
    "more than fit": (table(*[(GUEST + i * MIB, MIB, USER + i * MIB, 0) for i in range(8)], count=9), 8),
    "many more than fit": (table((GUEST, MIB, USER, 0), count=2**32 - 1), 1),
    "more than descriptors": (table((GUEST, MIB, USER, 0), (GUEST + MIB, MIB, USER + MIB, 0)), 1),
    "fewer than descriptors": (table((GUEST, MIB, USER, 0)), 2),
    "no descriptor": (table((GUEST, MIB, USER, 0)), 0),
    "an empty region": (table((GUEST, 0, USER, 0)), 1),
    "a region beyond its file": (table((GUEST, 2**40, USER, 0)), 1),
    "an offset beyond its file": (table((GUEST, MIB, USER, 2**40)), 1),
    "an unaligned offset": (table((GUEST, MIB, USER, 4097)), 1),
    "an unaligned region": (table((GUEST + 1, MIB - 3, USER + 5, 0)), 1),
    "guest addresses that overflow": (table((2**64 - 4096, MIB, USER, 0)), 1),
    "user addresses that overflow": (table((GUEST, MIB, 2**64 - 4096, 0)), 1),
    "sizes that overflow": (table((GUEST, 2**64 - 1, USER, 0)), 1),
    "size and offset that overflow": (table((GUEST, 2**64 - 4096, USER, 8192)), 1),
    "overlapping regions": (table((GUEST, 2 * MIB, USER, 0), (GUEST + MIB, 2 * MIB, USER + MIB, 0)), 2),
    "the same region twice": (table((GUEST, MIB, USER, 0), (GUEST, MIB, USER, 0)), 2),
    "a cut table": (table((GUEST, MIB, USER, 0))[:-9], 1),
}


@pytest.mark.parametrize("name", BAD_TABLES)
@pytest.mark.parametrize("running", [False, True], ids=["fresh", "running"])
def test_a_bad_memory_table_costs_at_most_the_connection(disk: Disk, name: str, running: bool) -> None:
    payload, fds = BAD_TABLES[name]
    with memfd(4 * MIB) as fd, disk.frontend(start=running) as f, may_end():
        if running:
            for i in range(20):
                f.start_write(FREE + i * 4096, bytes(4096))
        else:
            f.negotiate()
        f.send(SET_MEM_TABLE, payload, [fd] * fds)
        if settle(f):
            f.send(SET_VRING_NUM, struct.pack("<II", 0, 128))
            f.send(SET_VRING_ADDR, struct.pack("<IIQQQQ", 0, 0, USER, USER + 4096, USER + 8192, 0))
            kick = os.eventfd(1)
            f.send(SET_VRING_KICK, bytes(8), [kick])
            f.send(SET_VRING_ENABLE, struct.pack("<II", 0, 1))
            os.eventfd_write(kick, 1)
            os.close(kick)
            settle(f)


def test_a_memory_table_may_be_replaced_while_requests_are_in_flight(disk: Disk) -> None:
    """QEMU does that when memory is plugged in or a BAR is mapped."""
    with disk.frontend(memory=32 * MIB) as f:
        for round_number in range(20):
            requests = [f.start_write(FREE + i * 16384, noise(16384, (round_number, i))) for i in range(20)]
            f.share()
            assert all(f.finish(r).status == OK for r in requests)
            assert f.read(FREE + 5 * 16384, 16384) == noise(16384, (round_number, 5))


def test_regions_added_and_removed_one_by_one(disk: Disk) -> None:
    protocol = (P_MQ, P_REPLY_ACK, P_CONFIG, P_MEM_SLOTS)
    with memfd(MIB) as fd, disk.frontend(protocol=protocol) as f:
        if not f.protocol >> P_MEM_SLOTS & 1:
            return
        region = struct.pack("<QQQQQ", 0, GUEST + 64 * MIB, MIB, USER + 64 * MIB, 0)
        f.tell(ADD_MEM_REG, region, [fd])
        with mmap.mmap(fd, MIB) as memory:
            memory[:4096] = noise(4096, "plugged in")
            part = Part(GUEST + 64 * MIB, 4096, writable=False)
            assert f.request(T_OUT, FREE // SECTOR, part).status == OK
            assert f.read(FREE, 4096) == noise(4096, "plugged in")
        f.tell(REM_MEM_REG, region, [])
        with may_end():
            f.request(T_OUT, FREE // SECTOR, Part(GUEST + 64 * MIB, 4096, writable=False))


def test_more_regions_than_there_are_slots_cost_at_most_the_connection(disk: Disk) -> None:
    with memfd(MIB) as fd, disk.frontend(protocol=(P_MQ, P_CONFIG, P_MEM_SLOTS)) as f, may_end():
        for i in range(600):
            region = struct.pack("<QQQQQ", 0, GUEST + (64 + i) * MIB, MIB, USER + (64 + i) * MIB, 0)
            f.send(ADD_MEM_REG, region, [fd])
        settle(f)


def test_removing_the_memory_under_the_rings_costs_at_most_the_connection(disk: Disk) -> None:
    for message in (REM_MEM_REG, ADD_MEM_REG):
        with disk.frontend(protocol=(P_MQ, P_CONFIG, P_MEM_SLOTS)) as f, may_end():
            for i in range(20):
                f.start_write(FREE + i * 4096, bytes(4096))
            fds = [] if message == REM_MEM_REG else [f.memory.fd]
            f.send(message, bytes(8) + f.region(), fds)
            f.queues[0].kick()
            settle(f)
            f.finish(f.start_write(FREE, bytes(4096)), timeout_s=0.3)


# -- memory that is taken away: SIGBUS in the daemon, if it is careless --


def test_rings_that_are_truncated_away_cost_only_the_connection(disk: Disk) -> None:
    with disk.frontend() as f:
        f.write(FREE, bytes(4096))
        kick = f.queues[0].kick_fd
        os.ftruncate(f.memory.fd, 0)
        os.eventfd_write(kick, 1)
        f.expect_gone()


@pytest.mark.parametrize("kind", [T_IN, T_OUT])
@pytest.mark.parametrize("length", [512, 4096, 65536])
def test_data_that_is_truncated_away_is_an_error_for_its_sender(disk: Disk, kind: int, length: int) -> None:
    with disk.frontend(memory=16 * MIB) as f, may_end():
        f.write(FREE, noise(65536, "before"))
        header, status = f.header(kind, FREE // SECTOR), f.room(1)
        os.ftruncate(f.memory.fd, 8 * MIB)
        f.do([header, Part(GUEST + 12 * MIB, length, kind == T_IN), status])
    # A read that came to nothing: what stands on the disk is what was written, or zeroes of the pages taken away.
    with disk.frontend() as f:
        found = f.read(FREE, 65536)
        before = noise(65536, "before")
        assert found == before or (kind == T_OUT and found[length:] == before[length:])


def test_a_header_or_a_table_that_is_truncated_away_is_an_error_for_its_sender(disk: Disk) -> None:
    for flags in (0, 4):
        with disk.frontend(memory=16 * MIB) as f, may_end():
            status = f.room(1)
            os.ftruncate(f.memory.fd, 8 * MIB)
            queue = f.queues[0]
            queue.put(0, Descriptor(GUEST + 12 * MIB, 16, flags | (0 if flags else 1), 1))
            queue.put(1, Descriptor(status.address, 1, 2))
            queue.submit(0)
            queue.wait(0, timeout_s=2)


def test_truncation_in_the_middle_of_a_storm_of_requests_costs_only_the_connection(disk: Disk) -> None:
    for size in (0, 4096, MIB):
        with disk.frontend(queue_size=512) as f, may_end():
            for i in range(60):
                f.start_write(FREE + i * 65536, noise(65536, i))
                f.start_read(FREE + i * 65536, 65536)
            os.ftruncate(f.memory.fd, size)
            os.eventfd_write(f.queues[0].kick_fd, 1)
            f.expect_gone(5)


def test_a_memory_shorter_than_its_table_says_costs_at_most_the_connection(disk: Disk) -> None:
    with memfd(4096) as fd, disk.frontend(start=False) as f, may_end():
        f.negotiate()
        f.send(SET_MEM_TABLE, table((GUEST, 16 * MIB, USER, 0)), [fd])
        f.start(0)
        f.write(FREE, bytes(4096))


# -- in-flight areas that lie --


def area_message(size: int, offset: int, queues: int, queue_size: int) -> bytes:
    return struct.pack("<QQHHI", size, offset, queues, queue_size, 0)


@pytest.mark.parametrize(
    ("queues", "queue_size"), [(0, 128), (65535, 128), (QUEUES + 1, 128), (1, 0), (1, 65535), (1, 1025), (65535, 65535)]
)
def test_an_in_flight_area_of_an_impossible_shape_is_not_given(disk: Disk, queues: int, queue_size: int) -> None:
    with disk.frontend(start=False) as f, may_end():
        f.negotiate()
        f.send(GET_INFLIGHT_FD, area_message(0, 0, queues, queue_size))
        drain(f)


@pytest.mark.parametrize(
    ("size", "offset", "queues", "queue_size"),
    [
        (0, 0, 1, 128),
        (1, 0, 1, 128),
        (64, 0, 1, 128),
        (2**40, 0, 1, 128),
        (2**64 - 1, 0, 1, 128),
        (65536, 2**40, 1, 128),
        (65536, 4095, 1, 128),
        (65536, 2**64 - 4096, 1, 128),
        (65536, 0, 0, 128),
        (65536, 0, 65535, 128),
        (65536, 0, 1, 0),
        (65536, 0, 1, 16),
        (65536, 0, 1, 65535),
        (65536, 0, 65535, 65535),
        (65536, 65536, 1, 128),
    ],
)
def test_an_in_flight_area_that_lies_about_its_size_costs_at_most_the_connection(
    disk: Disk, size: int, offset: int, queues: int, queue_size: int
) -> None:
    with memfd(65536) as fd, disk.frontend(start=False) as f, may_end():
        f.negotiate()
        f.share()
        f.send(SET_INFLIGHT_FD, area_message(size, offset, queues, queue_size), [fd])
        f.start(0)
        for i in range(40):
            f.write(FREE + i * 4096, bytes(4096))


def test_an_in_flight_area_of_noise_costs_at_most_the_connection(disk: Disk) -> None:
    """A count of descriptors, a last batch and states that are out of any bounds."""
    for seed in range(40):
        rng = random.Random(seed)
        with memfd(65536) as fd, disk.frontend(start=False) as f, may_end():
            os.pwrite(fd, rng.randbytes(65536) if seed % 2 else b"\1" * 65536, 0)
            if seed % 4 < 2:  # plausible head, wild rest
                os.pwrite(fd, struct.pack("<QHHHH", 0, 1, rng.choice([128, 129, 65535]), rng.randrange(65536), seed), 0)
            f.negotiate()
            f.share()
            f.send(SET_INFLIGHT_FD, area_message(65536, 0, 1, 128), [fd])
            f.start(0)
            settle(f)
            f.finish(f.start_write(FREE, bytes(4096)), timeout_s=0.1)


def test_an_in_flight_area_that_is_truncated_away_costs_only_the_connection(disk: Disk) -> None:
    """The daemon's own areas are sealed; a front-end may bring another."""
    with memfd(65536) as fd, disk.frontend(start=False) as f, may_end():
        f.negotiate()
        f.share()
        f.send(SET_INFLIGHT_FD, area_message(65536, 0, 1, 128), [fd])
        f.start(0)
        f.write(FREE, bytes(4096))
        os.ftruncate(fd, 0)
        f.write(FREE, bytes(4096))


def test_an_in_flight_area_that_changes_under_the_daemon_costs_at_most_the_connection(disk: Disk) -> None:
    with disk.frontend() as f, may_end():
        size = os.fstat(f.inflight_fd).st_size
        with mmap.mmap(f.inflight_fd, size) as area:
            for seed in range(50):
                area[:] = random.Random(seed).randbytes(size)
                f.finish(f.start_write(FREE, bytes(4096)), timeout_s=1)


# -- the configuration space --


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 0), (0, 61), (0, 256), (0, 257), (60, 1), (59, 2), (256, 1), (2**32 - 1, 1), (0, 2**32 - 1), (2**31, 2**31)],
)
def test_configuration_outside_the_space_is_refused(disk: Disk, offset: int, size: int) -> None:
    for request in (GET_CONFIG, SET_CONFIG):
        with disk.frontend() as f, may_end():
            f.send(request, struct.pack("<III", offset, size, 0) + b"\xff" * min(size, 256))
            settle(f)
    with disk.frontend() as f:
        assert int.from_bytes(f.config(8), "little") == os.stat(disk.image).st_size // SECTOR


@pytest.mark.parametrize("offset", [0, 8, 20, 31, 33, 34, 56])
def test_only_the_write_cache_can_be_set(disk: Disk, offset: int) -> None:
    with disk.frontend() as f:
        before = f.config()
    with disk.frontend() as f, may_end():
        f.send(SET_CONFIG, struct.pack("<III", offset, 1, 0) + b"\x5a")
        settle(f)
    with disk.frontend() as f:
        assert f.config() == before


@pytest.mark.parametrize("value", [2, 255])
def test_an_odd_value_for_the_write_cache_is_no_third_state(disk: Disk, value: int) -> None:
    with disk.frontend() as f, may_end():
        f.send(SET_CONFIG, struct.pack("<III", 32, 1, 0) + bytes([value]))
        settle(f)
    with disk.frontend() as f:
        assert f.config()[32] in (0, 1)
        f.set_config(32, b"\1")


# -- the dirty log --


@pytest.mark.parametrize(("size", "offset"), [(0, 0), (4096, 0), (2**40, 0), (2**64 - 1, 0), (65536, 2**40), (1, 1)])
def test_a_dirty_log_too_small_for_the_memory_costs_at_most_the_connection(disk: Disk, size: int, offset: int) -> None:
    """libvhost-user asserts that the log is large enough: no front-end may end the daemon by that."""
    protocol = (P_MQ, P_REPLY_ACK, P_CONFIG, P_LOG_SHMFD)
    with memfd(65536) as fd, disk.frontend(protocol=protocol) as f, may_end():
        f.send(SET_LOG_BASE, struct.pack("<QQ", size, offset), [fd])
        settle(f)
        features = f.features | 1 << F_LOG_ALL
        f.send(SET_FEATURES, features.to_bytes(8, "little"))
        f.send(SET_VRING_ADDR, struct.pack("<IIQQQQ", 0, 1, *rings(f), 2**40))
        settle(f)
        f.finish(f.start_read(FREE, 4096), timeout_s=1)


def rings(f: Frontend) -> tuple[int, int, int]:
    queue = f.queues[0]
    return USER + queue.descriptors, USER + queue.used, USER + queue.available


def test_a_dirty_log_that_is_truncated_away_costs_only_the_connection(disk: Disk) -> None:
    protocol = (P_MQ, P_REPLY_ACK, P_CONFIG, P_LOG_SHMFD)
    with memfd(MIB) as fd, disk.frontend(protocol=protocol) as f, may_end():
        f.send(SET_LOG_BASE, struct.pack("<QQ", MIB, 0), [fd])
        settle(f)
        f.send(SET_FEATURES, (f.features | 1 << F_LOG_ALL).to_bytes(8, "little"))
        f.finish(f.start_read(FREE, 4096), timeout_s=1)
        os.ftruncate(fd, 0)
        f.finish(f.start_read(FREE, 4096), timeout_s=1)


# -- storms --


def test_a_front_end_that_asks_and_never_listens_is_dropped_or_waits_alone(disk: Disk) -> None:
    """The answers fill the socket; the daemon must not sit in sendmsg for it."""
    with disk.frontend(start=False) as f:
        f.sock.settimeout(2)
        f.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        message = struct.pack("<III", GET_PROTOCOL_FEATURES, VERSION, 0)
        with contextlib.suppress(GoneError, TimeoutError):
            for _ in range(200):
                f.send_raw(message * 500)
    disk.assert_good()


def test_connections_that_come_and_go_in_a_storm_leave_nothing_behind(disk: Disk) -> None:
    disk.assert_good()
    files, mappings = disk.daemon.open_files(), disk.daemon.mappings()
    for i in range(200):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(disk.socket))
        if i % 3:
            sock.send(
                struct.pack("<III", SET_OWNER, VERSION, 0) + struct.pack("<III", GET_FEATURES, VERSION, 0)[: i % 13]
            )
        sock.close()
    for i in range(60):
        with disk.frontend(start=i % 2 == 0, queues=QUEUES) as f, may_end():
            if i % 4 == 0:
                f.start_write(FREE, bytes(4096))
    disk.assert_good()
    deadline = time.monotonic() + 10
    while disk.daemon.open_files() > files + 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert disk.daemon.open_files() <= files + 2, "descriptors of dead connections are still open"
    assert disk.daemon.mappings() <= mappings + 16, "memory of dead connections is still mapped"


def test_a_second_front_end_on_a_busy_disk_does_not_disturb_the_first(disk: Disk) -> None:
    with disk.frontend() as first:
        first.write(FREE, noise(4096, "first"))
        others = []
        for _ in range(5):
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(1)
            with contextlib.suppress(OSError):
                sock.connect(str(disk.socket))
                sock.send(struct.pack("<III", SET_OWNER, VERSION, 0))
            others.append(sock)
        assert first.read(FREE, 4096) == noise(4096, "first")
        first.write(FREE, noise(4096, "still first"))
        for sock in others:
            sock.close()
        assert first.read(FREE, 4096) == noise(4096, "still first")


def test_descriptors_are_closed_on_exec_and_kept_from_children(disk: Disk) -> None:
    for entry in os.listdir(f"/proc/{disk.daemon.pid}/fdinfo"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/{disk.daemon.pid}/fdinfo/{entry}") as info:
            flags = int(next(line for line in info if line.startswith("flags:")).split()[1], 8)
            assert int(entry) <= 2 or flags & os.O_CLOEXEC, f"descriptor {entry} would be inherited"
