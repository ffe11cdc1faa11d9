"""The C engine behind vhostcache.engine, in this process, with a core of a few lines and a front-end in a thread."""

import functools
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.frontend import (
    F_LOG_ALL,
    GET_VRING_BASE,
    P_CONFIG,
    P_INFLIGHT,
    P_LOG_SHMFD,
    P_MQ,
    P_REPLY_ACK,
    SET_FEATURES,
    SET_LOG_BASE,
    SET_MEM_TABLE,
    Frontend,
)
from vhostcache import engine as engine_module
from vhostcache import operations as op
from vhostcache.backend.base import Facts
from vhostcache.engine import Engine, TurnResult
from vhostcache.errors import EngineError

MIB = 1 << 20
DISK_BYTES = 16 * MIB
SLOTS = 64
CONNECTED, DISCONNECTED, QUIESCE, QUEUE, READABLE, RESUMED, HAND_OVER = 1, 2, 5, 6, 7, 8, 11
PATIENCE_S = 20.0


class Rig:
    """An engine with one volume, and a core that answers what `answers` says: True, or the kinds of request."""

    def __init__(
        self,
        folder: Path,
        changes: dict[str, Any] | None = None,
        facts: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.path = folder / "disk.sock"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        listener.listen(16)
        listener.setblocking(False)
        self.image = os.open(folder / "disk.img", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        os.truncate(self.image, DISK_BYTES)
        self.engine = Engine(poll_max_us=0, **options)
        self.backend = self.engine.file_backend(backend_facts(self.image, **(facts or {})))
        self.engine.add_volume(**volume(listen_fd=listener.detach(), backend=self.backend, **(changes or {})))
        self.engine.start_volume(0)
        self.operations: list[int] = []
        self.events: list[tuple[int, int]] = []
        self.requests: list[tuple[int, int, int]] = []  # (what, tag, sector), not yet settled
        self.seen: list[int] = []  # sectors, in the order in which requests were reported
        self.done: list[tuple[int, int]] = []
        self.answering = True

    def close(self) -> None:
        self.engine.close()
        os.close(self.image)

    def turn(self, timeout_ns: int = 10_000_000) -> TurnResult:
        words, self.operations = self.operations, []
        result = self.engine.turn(words, timeout_ns)
        if result.events:
            self.events += zip(result.event_kind, result.event_arg, strict=True)
        if result.completions:
            self.done += zip(result.done_group, result.done_result, strict=True)
        if result.requests:
            self.requests += zip(result.what, result.tag, result.sector, strict=True)
            self.seen += result.sector
        if self.answering:
            self.settle(op.COMPLETE)
        return result

    def settle(self, opcode: int) -> None:
        self.operations += [opcode | tag << 8 for _, tag, _ in self.requests]
        self.requests.clear()

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"in vain; events: {self.events}, requests: {self.requests}"
            self.turn()

    def during(self, action: Callable[[], Any]) -> Any:
        """What a front-end does, which waits for our answers, while the engine turns."""
        outcome: list[tuple[Any, Exception | None]] = []

        def run() -> None:
            try:
                outcome.append((action(), None))
            except Exception as error:  # noqa: BLE001  it is raised again, in the test's own thread
                outcome.append((None, error))

        thread = threading.Thread(target=run)
        thread.start()
        self.until(lambda: outcome)
        thread.join()
        value, error = outcome[0]
        if error is not None:
            raise error
        return value

    def frontend(self, **options: Any) -> Frontend:
        frontend = self.during(lambda: Frontend(self.path, **options))
        assert isinstance(frontend, Frontend)
        return frontend

    def quiesces(self) -> list[int]:
        return [argument for kind, argument in self.events if kind == QUIESCE]


def backend_facts(descriptor: int, **changes: Any) -> Facts:
    facts = Facts(descriptor, DISK_BYTES, read_only=False, direct=False, align_mem_bytes=1, align_io_bytes=1)
    return replace(facts, **changes)


def volume(**changes: Any) -> dict[str, Any]:
    config = {
        "listen_fd": -1,
        "size_bytes": DISK_BYTES,
        "slots": SLOTS,
        "object_bytes": MIB,
        "num_queues": 2,
        "read_only": False,
        "write_cache": True,
        "align_mem_bytes": 1,
        "align_io_bytes": 1,
        "write_depth": 2,
        "discard_max_bytes": MIB,
        "serial": "unit",
    }
    return {**config, **changes}


@pytest.fixture(params=[False, True], ids=["io_uring", "threads"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path, force_threads=request.param)
    yield rig
    rig.close()


# -- the contract's numbers --


def test_the_cores_numbers_are_the_engines() -> None:
    lib = engine_module.lib
    names = {
        **{
            f"VHC_OP_{name}": name
            for name in ("IN1", "OUT1", "IN", "OUT", "COMPLETE", "DROP", "SLOT_COPY", "SLOT_ZERO")
        },
        **{f"VHC_OP_{name}": name for name in ("READ", "WRITE", "READ_DIRECT", "WRITE_DIRECT", "FLUSH", "ZERO")},
        **{f"VHC_OP_{name}": name for name in ("LOG_WRITE", "LOG_READ", "LOG_READ_DIRECT", "LOG_FLUSH", "SUPERBLOCK")},
        **{f"VHC_OP_{name}": name for name in ("PUBLISH", "LOG1", "LOG_SEQ", "RETIRE")},
        **{
            f"VHC_REQ_{name}": f"REQUEST_{name}" for name in ("READ", "WRITE", "FLUSH", "DISCARD", "ZERO", "ZERO_UNMAP")
        },
        "VHC_GROUPS": "GROUPS",
        "VHC_FIRST_SLOT": "FIRST_SLOT",
        "VHC_FAILED_TAG": "FAILED_TAG",
        "VHC_REQ_ALIGNED": "REQUEST_ALIGNED",
        "VHC_REQ_DEEP": "REQUEST_DEEP",
    }
    for theirs, ours in names.items():
        assert getattr(lib, theirs) == getattr(op, ours), ours


@pytest.mark.parametrize(
    "changes",
    [
        {"size_bytes": 0},
        {"size_bytes": 1000},
        {"size_bytes": DISK_BYTES + 512},
        {"slots": 3},
        {"num_queues": 0},
        {"num_queues": 65},
        {"object_bytes": 1000},
        {"align_mem_bytes": 3},
        {"align_io_bytes": 0},
        {"write_depth": 0},
        {"cache_fd": 0},
        {"cache_fd": 0, "ring_bytes": 4095},
        {"tier_fd": 0},
        {"tier_fd": 0, "tier_entries": 10, "tier_entries_offset": 0, "tier_slab_offset": 8192},
        {"tier_fd": 0, "tier_entries": 171, "tier_entries_offset": 4096, "tier_slab_offset": 8192},
        {"tier_fd": 0, "tier_entries": 170, "tier_entries_offset": 4096, "tier_slab_offset": 8192},
        {"request_max_bytes": 2048},
    ],
)
def test_a_volume_that_cannot_be_is_refused_with_one_line(changes: dict[str, int]) -> None:
    with Engine(poll_max_us=0) as engine:
        backend = engine.file_backend(backend_facts(-1))
        with pytest.raises(EngineError) as caught:
            engine.add_volume(**volume(backend=backend, **changes))
    assert "\n" not in str(caught.value)


def test_an_engine_may_be_closed_twice() -> None:
    engine = Engine()
    engine.close()
    engine.close()


# -- waiting --


def test_a_turn_without_news_ends_at_its_deadline() -> None:
    with Engine(poll_max_us=50) as engine:
        deadline_ns = time.monotonic_ns() + 20_000_000
        turns = 0
        while (left_ns := deadline_ns - time.monotonic_ns()) > 0:
            result = engine.turn([], left_ns)
            assert (result.requests, result.completions, result.events) == (0, 0, 0)
            turns += 1
        assert turns < 100, "it comes back all the time, and not only when a signal ends a turn early"


def test_a_watched_descriptor_is_reported_while_it_is_readable() -> None:
    reader, writer = os.pipe()
    with Engine() as engine:
        engine.watch(reader, 7)
        assert engine.turn([], 0).events == 0
        os.write(writer, b"x")
        for _ in range(2):
            result = engine.turn([], -1)
            assert list(zip(result.event_kind, result.event_volume, strict=True)) == [(READABLE, 7)]
        os.read(reader, 1)
        assert engine.turn([], 0).events == 0
    os.close(reader)
    os.close(writer)


# -- I/O --


def test_slots_are_written_read_copied_and_zeroed(rig: Rig) -> None:
    block = op.BLOCK_BYTES
    buffer = engine_module.ffi.buffer(rig.engine.slab(0), SLOTS * block)
    for slot in range(3, 9):
        buffer[slot * block : (slot + 1) * block] = bytes([slot]) * block
    rig.operations = [
        *(op.SLOT_COPY | 0 << 8 | 3 << 32, 10),
        *(op.SLOT_ZERO | 0 << 8 | 10 << 32, 100 | 200 << 32),
        *(op.WRITE | 0 << 8 | 3 << 32, 1, 4 * block, 3 * block, 10, 4, 1),  # a copied slot, another, and zeroes
        *(op.WRITE | 0 << 8 | 2 << 32, 1, 20 * block, 2 * block - 512, 5, 6),  # the second is written in part
    ]
    rig.until(lambda: rig.done)
    assert rig.done == [(1, 0)], "one completion for a group"
    written = os.pread(rig.image, 3 * block, 4 * block)
    copied = bytes([3]) * 100 + bytes(200) + bytes([3]) * (block - 300)
    assert written == copied + bytes([4]) * block + bytes(block)
    assert os.pread(rig.image, 2 * block, 20 * block) == bytes([5]) * block + bytes([6]) * (block - 512) + bytes(512)
    rig.done.clear()
    rig.operations = [op.READ | 0 << 8 | 2 << 32, 2 | 512 << 32, 4 * block, block, 20, 21]
    rig.until(lambda: rig.done)
    assert rig.done == [(2, 0)]
    assert bytes(buffer[20 * block + 512 : 21 * block]) + bytes(buffer[21 * block : 21 * block + 512]) == copied


def test_writes_beyond_the_depth_wait_and_are_all_done(rig: Rig) -> None:
    for group in range(40):
        rig.operations += [op.WRITE | 1 << 32, group, group * 4096, 4096, 1]
    rig.operations += [op.FLUSH, 100]
    rig.until(lambda: len(rig.done) == 41)
    assert sorted(rig.done) == [(group, 0) for group in (*range(40), 100)]
    assert rig.engine.volume_statistics(0)["backend_ops"] == [0, 40, 1, 0]


def test_an_image_that_shrank_is_no_data(rig: Rig) -> None:
    os.truncate(rig.image, 4096 + 100)
    rig.operations = [op.READ | 1 << 32, 1, 4096, 4096, 5, op.READ | 1 << 32, 2, 65536, 4096, 6]
    rig.until(lambda: len(rig.done) == 2)
    assert sorted(rig.done) == [(1, -61), (2, -61)]


@pytest.mark.parametrize("may_unmap", [0, 1])
def test_zeroing_leaves_zeroes_and_the_size(rig: Rig, may_unmap: int) -> None:
    os.pwrite(rig.image, b"\xff" * 65536, 0)
    rig.operations = [op.ZERO | may_unmap << 32, 3, 4096, 8192]
    rig.until(lambda: rig.done)
    assert rig.done == [(3, 0)]
    assert os.pread(rig.image, 65536, 0) == b"\xff" * 4096 + bytes(8192) + b"\xff" * (65536 - 12288)
    assert os.fstat(rig.image).st_size == DISK_BYTES


# -- requests, and a front-end that stops queues, changes memory or leaves --


def test_requests_are_answered_and_their_figures_kept(rig: Rig) -> None:
    with rig.frontend() as f:
        rig.during(lambda: f.write(8192, bytes(4096)))
        rig.during(f.flush)
        stats = rig.engine.volume_statistics(0)
        assert stats["requests"] == [0, 1, 1, 0, 0, 0]
        assert stats["bytes"] == [0, 4096, 0, 0, 0, 0]
        assert (sum(stats["latency"][1]), sum(stats["latency"][2])) == (1, 1)
        assert (stats["inflight"], stats["inflight_max"]) == (0, 1)


def stuck(rig: Rig, f: Frontend, *sectors: int, queue: int = 0) -> None:
    """Writes that the core has and does not answer."""
    rig.answering = False
    for sector in sectors:
        f.start_write(sector * 512, bytes(512), queue)
    expected = len(rig.requests) + len(sectors)
    rig.until(lambda: len(rig.requests) == expected)


def test_a_queue_with_an_in_flight_area_stops_when_its_requests_are_dropped_and_starts_with_them(rig: Rig) -> None:
    with rig.frontend() as f:
        stuck(rig, f, 8, 16, 24)
        f.send(GET_VRING_BASE, struct.pack("<II", 0, 0))
        rig.until(rig.quiesces)
        assert rig.quiesces() == [1], "they may be dropped: the area remembers them"
        rig.settle(op.DROP)
        assert rig.during(f.receive)[0] == GET_VRING_BASE
        rig.seen.clear()
        rig.during(lambda: f.start(0))
        rig.until(lambda: len(rig.requests) == 3)
        assert rig.seen == [8, 16, 24], "in the order in which they were made"
        assert (QUEUE, 0 | 1 << 16 | 3 << 32) in rig.events
        assert RESUMED not in [kind for kind, _ in rig.events], "the area is our own"
        rig.settle(op.COMPLETE)
        rig.turn()


def test_a_request_dropped_for_another_queues_sake_is_reported_again(rig: Rig) -> None:
    with rig.frontend(queues=2) as f:
        stuck(rig, f, 8, queue=0)
        stuck(rig, f, 16, 24, queue=1)
        f.send(GET_VRING_BASE, struct.pack("<II", 0, 0))
        rig.until(rig.quiesces)
        rig.seen.clear()
        rig.settle(op.DROP)
        rig.during(f.receive)
        rig.until(lambda: len(rig.requests) == 2)
        assert rig.seen == [16, 24]
        rig.settle(op.COMPLETE)
        rig.turn()
        f.queues[1].collect()
        assert len(f.queues[1].completed) == 2


def test_without_an_in_flight_area_a_queue_stops_only_when_all_is_answered(rig: Rig) -> None:
    with rig.frontend(protocol=(P_MQ, P_REPLY_ACK, P_CONFIG)) as f:
        stuck(rig, f, 8)
        f.send(GET_VRING_BASE, struct.pack("<II", 0, 0))
        rig.until(rig.quiesces)
        assert rig.quiesces() == [0]
        rig.settle(op.COMPLETE)
        assert rig.during(f.receive)[0] == GET_VRING_BASE
        f.queues[0].collect()
        assert len(f.queues[0].completed) == 1


def test_while_the_dirty_log_is_on_nothing_may_be_dropped(rig: Rig) -> None:
    log = os.memfd_create("log")
    log_bytes = (0x1_0000_0000 + 16 * MIB) // 4096 // 8 + 4096
    os.truncate(log, log_bytes)
    protocol = (P_MQ, P_REPLY_ACK, P_CONFIG, P_INFLIGHT, P_LOG_SHMFD)
    with rig.frontend(protocol=protocol) as f:
        rig.during(lambda: f.ask(SET_LOG_BASE, struct.pack("<QQ", log_bytes, 0), [log]))
        stuck(rig, f, 8)
        rig.during(lambda: f.tell(SET_FEATURES, (f.features | 1 << F_LOG_ALL).to_bytes(8, "little")))
        assert rig.quiesces() == [], "switching the log on waits for nobody"
        f.send(GET_VRING_BASE, struct.pack("<II", 0, 0))
        rig.until(rig.quiesces)
        assert rig.quiesces() == [0]
        rig.settle(op.COMPLETE)
        rig.until(lambda: HAND_OVER in [kind for kind, _ in rig.events])
        rig.engine.volume_stopped(0)
        rig.during(f.receive)
        assert any(os.pread(log, log_bytes, 0)), "the answer has made a page dirty"


def test_a_volume_without_storage_answers_messages_and_takes_no_requests(rig: Rig) -> None:
    log = os.memfd_create("log")
    log_bytes = (0x1_0000_0000 + 16 * MIB) // 4096 // 8 + 4096
    os.truncate(log, log_bytes)
    protocol = (P_MQ, P_REPLY_ACK, P_CONFIG, P_INFLIGHT, P_LOG_SHMFD)
    with rig.frontend(protocol=protocol) as f:
        rig.during(lambda: f.write(8192, bytes(4096)))
        rig.during(lambda: f.ask(SET_LOG_BASE, struct.pack("<QQ", log_bytes, 0), [log]))
        rig.during(lambda: f.tell(SET_FEATURES, (f.features | 1 << F_LOG_ALL).to_bytes(8, "little")))
        for _ in range(2):
            rig.events.clear()
            f.send(GET_VRING_BASE, struct.pack("<II", 0, 0))
            rig.until(lambda: (HAND_OVER, 0) in rig.events)
            rig.engine.detach_volume(0)
            rig.backend.close()
            rig.during(f.receive)
            assert rig.during(lambda: f.capacity) == DISK_BYTES
            rig.during(lambda: f.start(0))
            write = f.start_write(8192, bytes(4096))
            for _ in range(5):
                rig.turn(1_000_000)
            assert not f.queues[0].is_done(write.head)
            rig.backend = rig.engine.file_backend(backend_facts(rig.image))
            rig.engine.add_volume(**volume(backend=rig.backend), attach_to=0)
            assert rig.during(functools.partial(f.finish, write)).status == 0
    os.close(log)


def test_memory_stays_until_the_requests_in_it_are_settled(rig: Rig) -> None:
    with rig.frontend() as f:
        stuck(rig, f, 8)
        f.send(SET_MEM_TABLE, struct.pack("<II", 1, 0) + f.region(), [f.memory.fd])
        rig.until(rig.quiesces)
        assert rig.quiesces() == [0], "the queue goes on afterwards, and nothing would bring a dropped request back"
        what, tag, _ = rig.requests.pop()
        assert what & op.REQUEST_KIND_MASK == op.REQUEST_WRITE
        rig.operations += [op.IN | tag << 8 | 1 << 32, 512 << 32, 0, 5, op.COMPLETE | tag << 8]
        rig.answering = True
        rig.during(lambda: f.write(8192, bytes(4096)))


def test_a_front_end_that_leaves_is_settled_before_the_next_one_comes(rig: Rig) -> None:
    f = rig.frontend()
    stuck(rig, f, 8, 16)
    f.disconnect()
    rig.until(rig.quiesces)
    assert rig.quiesces() == [1]
    assert DISCONNECTED not in [kind for kind, _ in rig.events]
    before = len(rig.events)
    connecting = threading.Thread(target=lambda: Frontend(rig.path, start=False).close())
    connecting.start()
    for _ in range(5):
        rig.turn(1_000_000)
    assert len(rig.events) == before, "the next one waits"
    rig.settle(op.COMPLETE)
    rig.until(lambda: [kind for kind, _ in rig.events[before:]][:2] == [DISCONNECTED, CONNECTED])
    connecting.join()
    assert not f.queues[0].completed, "nobody was there to be answered"
    f.close()


def test_a_stopped_volume_answers_what_it_has_and_takes_nothing_more(rig: Rig) -> None:
    with rig.frontend() as f:
        stuck(rig, f, 8)
        rig.engine.stop_volume(0)
        rig.until(rig.quiesces)
        assert rig.quiesces() == [0]
        f.start_write(8192, bytes(512))
        rig.turn()
        assert len(rig.requests) == 1, "taken after the stop"
        rig.settle(op.COMPLETE)
        rig.until(lambda: DISCONNECTED in [kind for kind, _ in rig.events])
        f.queues[0].collect()
        assert len(f.queues[0].completed) == 1
        with socket.socket(socket.AF_UNIX) as late, pytest.raises(ConnectionRefusedError):
            late.connect(str(rig.path))


def test_an_area_of_a_back_end_before_us_is_announced(rig: Rig, tmp_path: Path) -> None:
    area = bytearray(2112)
    struct.pack_into("<QHHHH", area, 0, 0, 1, 128, 0, 0)
    fd = os.memfd_create("area")
    os.write(fd, area)
    f = rig.frontend(start=False)
    f.inflight_fd, f.inflight = fd, struct.pack("<QQHHI", len(area), 0, 1, 128, 0)
    rig.during(lambda: (f.negotiate(), f.share(), f.track_inflight(), f.start(0)))
    rig.until(lambda: RESUMED in [kind for kind, _ in rig.events])
    rig.during(lambda: f.write(0, bytes(512)))
    f.close()


def test_a_direct_read_lands_in_guest_memory_wherever_that_is(rig: Rig) -> None:
    os.pwrite(rig.image, bytes(range(256)) * 64, 0)
    rig.answering = False
    with rig.frontend() as f:
        request = f.start_read(0, 8192)
        rig.until(lambda: rig.requests)
        (_, tag, _) = rig.requests.pop()
        rig.operations = [
            op.READ_DIRECT | tag << 8,
            5,
            0,
            512,
            op.READ_DIRECT | tag << 8,
            6 | 512 << 32,
            512,
            8192 - 512,
        ]
        rig.until(lambda: len(rig.done) == 2)
        assert sorted(rig.done) == [(5, 0), (6, 0)]
        rig.operations = [op.COMPLETE | tag << 8]
        assert rig.during(lambda: f.finish(request)).data == (bytes(range(256)) * 64)[:8192]


def test_an_engine_may_end_with_requests_and_io_in_flight(rig: Rig) -> None:
    f = rig.frontend()
    stuck(rig, f, 8, 16)
    rig.operations = [op.WRITE | 1 << 32, 1, 0, 4096, 5, op.FLUSH, 2]
    rig.turn(0)
    rig.engine.close()
    f.close()
