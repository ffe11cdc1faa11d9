"""Two daemons that share an image, and a front-end that does what QEMU does in a live migration."""

import contextlib
import itertools
import os
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.backend.servers import nbdkit, qemu_img
from tests.frontend import (
    F_LOG_ALL,
    GUEST,
    OK,
    P_CONFIG,
    P_INFLIGHT,
    P_LOG_SHMFD,
    P_MQ,
    P_REPLY_ACK,
    SET_FEATURES,
    SET_LOG_BASE,
    SET_VRING_ADDR,
    T_IN,
    UNSUPP,
    USER,
    Frontend,
    Memory,
    Queue,
)
from tests.native.conftest import DISK_BYTES, FREE, GUARD_BYTES, MIB, NativeDaemon, noise
from tests.native.nbd_server import NbdServer

PROTOCOL = (P_MQ, P_REPLY_ACK, P_CONFIG, P_INFLIGHT, P_LOG_SHMFD)
PAGE = 4096
LOG_BYTES = (GUEST + 64 * MIB) // PAGE // 8
F_LOG_RING = 1  # VHOST_VRING_F_LOG


class Migrating(Frontend):
    """A front-end with a log of dirty pages, which can be switched on and off."""

    log = -1

    def begin(self) -> None:
        if self.log < 0:
            self.log = os.memfd_create("log")
            os.truncate(self.log, LOG_BYTES)
            self.ask(SET_LOG_BASE, struct.pack("<QQ", LOG_BYTES, 0), [self.log])
        self.tell(SET_FEATURES, (self.features | 1 << F_LOG_ALL).to_bytes(8, "little"))
        for queue in self.queues:
            self.tell(SET_VRING_ADDR, self.vring_address(queue))

    def cancel(self) -> None:
        self.tell(SET_FEATURES, self.features.to_bytes(8, "little"))

    def vring_address(self, queue: Queue) -> bytes:
        return struct.pack(
            "<IIQQQQ",
            queue.index,
            F_LOG_RING,
            USER + queue.descriptors,
            USER + queue.used,
            USER + queue.available,
            GUEST + queue.used,
        )

    def dirty_pages(self) -> set[int]:
        """Offsets in the memory, of the pages that the log names."""
        data = os.pread(self.log, LOG_BYTES, 0)
        first = GUEST // PAGE
        return {(page - first) * PAGE for page in range(first, LOG_BYTES * 8) if data[page // 8] >> page % 8 & 1}

    def disconnect(self) -> None:
        super().disconnect()
        if self.log >= 0:
            os.close(self.log)
            self.log = -1


class Side:
    """A daemon, and how to get at its disk."""

    def __init__(self, folder: Path, ram_dir: Path, image: Path, name: str, *options: str, cache: bool) -> None:
        """The image is a path, unless the first of the options is a URI."""
        self.folder, self.name, self.image = folder, name, image
        self.socket, self.cache = folder / f"{name}.sock", folder / f"{name}.cache"
        if cache:
            options += (f"--cache={self.cache}", "--cache-size=64MiB", f"--ram-dir={ram_dir}")
        place: Path | str = image
        if options and options[0].startswith("nbd"):
            place, *rest = options
            options = tuple(rest)
        self.daemon = NativeDaemon(
            folder / f"{name}.log", "export", place, "--socket", self.socket, "--ram=32MiB", *options
        )

    def frontend(self, queues: int = 2) -> Migrating:
        return Migrating(self.socket, queues=queues, protocol=PROTOCOL)

    def waiting(self, queues: int = 2) -> Migrating:
        """A QEMU that waits for its guest: it has looked at the disk, and shown its memory."""
        frontend = Migrating(self.socket, queues=queues, protocol=PROTOCOL, start=False)
        frontend.negotiate()
        assert frontend.capacity == DISK_BYTES
        frontend.share()
        frontend.track_inflight()
        return frontend

    def seen(self, event: str) -> int:
        return len(self.daemon.events(event))


@pytest.fixture
def ram_dir() -> Iterator[Path]:
    path = Path(f"/dev/shm/vhostcache-test-{os.getpid()}-{time.monotonic_ns()}")
    path.mkdir(mode=0o700)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, DISK_BYTES)
        file.write(noise(GUARD_BYTES, "guard"))
    return path


@pytest.fixture
def make(tmp_path: Path, ram_dir: Path, image: Path) -> Iterator[Callable[..., Side]]:
    with contextlib.ExitStack() as stack:

        def start(words: str, *options: str, cache: bool = True) -> Side:
            name, *more = words.split()
            options += tuple(more)
            side = Side(tmp_path, ram_dir, image, name, *options, cache=cache)
            stack.callback(side.daemon.reap)
            side.daemon.start()
            return side

        yield start


def stop(frontend: Frontend) -> None:
    for queue in range(len(frontend.queues)):
        frontend.stop(queue)


def start(frontend: Frontend, queues: int = 2) -> None:
    for queue in range(queues):
        frontend.start(queue)


def fill(frontend: Frontend, seed: object, count: int = 64) -> dict[int, bytes]:
    """Blocks here and there; none is flushed."""
    written = {FREE + 5 * PAGE * number: noise(PAGE, (seed, number)) for number in range(count)}
    for number, (offset, data) in enumerate(written.items()):
        frontend.write(offset, data, queue=number % 2)
    return written


def check(frontend: Frontend, written: dict[int, bytes]) -> None:
    for number, (offset, data) in enumerate(written.items()):
        assert frontend.read(offset, PAGE, queue=number % 2) == data
    assert frontend.read(0, 65536) == noise(GUARD_BYTES, "guard")[:65536]


@pytest.mark.parametrize("kind", ["cache", "read-cache", "no-cache"])
def test_what_was_written_is_there_on_the_other_side_and_back_again(make: Callable[..., Side], kind: str) -> None:
    options = ["--read-cache=32MiB"] if kind == "read-cache" else []
    a, b = (make(name, *options, cache=kind != "no-cache") for name in ("a", "b --incoming"))
    sides = [a, b, a, b]
    source = a.frontend()
    written: dict[int, bytes] = {}
    for number, (here, there) in enumerate(itertools.pairwise(sides)):
        written |= fill(source, number, 64 - 16 * number)
        check(source, written)
        destination = there.waiting()
        source.begin()
        written |= fill(source, ("later", number), 8)
        stop(source)
        here.daemon.wait_for("handed-over", count=number // 2 + 1)
        start(destination)
        check(destination, written)
        there.daemon.wait_for("taken-over", count=number // 2 + 1)
        source.close()
        source = destination
    source.flush()
    source.close()
    a.daemon.stop()
    b.daemon.stop()


def test_a_destination_waits_for_what_the_source_still_has(make: Callable[..., Side]) -> None:
    a, b = make("a"), make("b", "--incoming")
    with a.frontend() as source, b.waiting() as destination:
        written = fill(source, "a")
        start(destination)
        read = destination.start_read(FREE, PAGE)
        b.daemon.wait_for("take-over-waits")
        assert not destination.queues[0].is_done(read.head)
        source.begin()
        stop(source)
        assert destination.finish(read).data == written[FREE]
        check(destination, written)


def test_a_destination_that_waits_in_vain_is_cut_off_and_may_come_again(make: Callable[..., Side]) -> None:
    a, b = make("a"), make("b", "--incoming", "--hand-over-timeout=1s")
    with a.frontend() as source:
        written = fill(source, "a")
        with b.waiting() as destination:
            start(destination)
            destination.expect_gone()
        b.daemon.wait_for("take-over-failed")
        source.begin()
        stop(source)
        with b.frontend() as destination:
            check(destination, written)


def test_a_migration_that_is_cancelled_in_time_changes_nothing(make: Callable[..., Side]) -> None:
    a, b = make("a"), make("b", "--incoming")
    with a.frontend() as source:
        written = fill(source, "before")
        with b.waiting():
            source.begin()
            written |= fill(source, "while", 8)
            source.cancel()
        stop(source)  # as a paused guest does
        assert a.seen("handing-over") == 0
        start(source)
        written |= fill(source, "after", 8)
        check(source, written)
    assert b.seen("taken-over") == 0
    b.daemon.stop()
    a.daemon.stop()


def test_a_guest_that_goes_on_at_its_source_after_all_gets_its_disk_back(make: Callable[..., Side]) -> None:
    a, b = make("a"), make("b", "--incoming")
    with a.frontend() as source, b.waiting() as destination:
        written = fill(source, "before")
        source.begin()
        stop(source)
        start(source)  # the destination has died
        written |= fill(source, "after", 8)
        check(source, written)
        a.daemon.wait_for("taken-over")
        stop(source)
        start(destination)
        check(destination, written)


@pytest.mark.parametrize("when", ["before the first kick", "after it"])
def test_a_destination_that_is_killed_and_started_again_goes_on(make: Callable[..., Side], when: str) -> None:
    a, b = make("a"), make("b", "--incoming")
    with a.frontend() as source:
        written = fill(source, "a")
        source.begin()
        with b.waiting() as destination:
            if when == "after it":
                stop(source)
                start(destination)
                written |= fill(destination, "b", 16)
            b.daemon.kill()
        b.daemon.start()
        if when != "after it":
            stop(source)
        with b.frontend() as destination:
            check(destination, written)
    a.daemon.stop()


def test_what_a_killed_source_has_left_is_not_passed_over(make: Callable[..., Side]) -> None:
    """No lock is left, but the image's mark says that its newest data is elsewhere."""
    a, b = make("a", "--destage=off"), make("b", "--incoming")
    with a.frontend() as source, b.waiting() as destination:
        written = fill(source, "a")
        a.daemon.kill()
        start(destination)
        # The locks of the dead live a moment longer than they do.
        while "newest data" not in b.daemon.wait_for("take-over-waits")[-1]["reason"]:
            time.sleep(0.05)
        a.daemon.arguments.append("--drain-on-exit")
        a.daemon.start().stop()
        check(destination, written)


def test_the_destination_writes_through_until_its_guest_flushes(make: Callable[..., Side]) -> None:
    """Nobody knows what the guest was told of its write cache; a new connection makes no difference."""
    a, b = make("a", cache=False), make("b", "--incoming", cache=False)
    with a.frontend() as source, b.waiting() as destination:
        source.begin()
        stop(source)
        start(destination)
        destination.write(FREE, noise(PAGE, 1))
        destination.disconnect()
        with Migrating(b.socket, queues=2, protocol=PROTOCOL, resume=destination) as again:
            again.write(FREE + PAGE, noise(PAGE, 2))
            with b.image.open("rb") as file:
                file.seek(FREE)
                assert file.read(2 * PAGE) == noise(PAGE, 1) + noise(PAGE, 2)
            again.flush()


def serve(folder: Path, ram_dir: Path, image: Path, name: str, **keys: object) -> NativeDaemon:
    volume = {
        "name": name,
        "socket": f"{name}.sock",
        "ram": "32MiB",
        "cache": {"path": f"{name}.cache", "size": "64MiB", "ram_dir": str(ram_dir)},
        "backend": {"path": str(image)},
        **keys,
    }
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump({"volumes": [volume]}))
    return NativeDaemon.serve(config)


def test_a_source_whose_image_is_away_keeps_it_and_lets_go_when_it_can(
    make: Callable[..., Side], tmp_path: Path, ram_dir: Path, image: Path
) -> None:
    folder = tmp_path
    outage = folder / "outage"
    fault = {"fault": {"kind": ["write", "flush", "zero"], "while_exists": str(outage)}}
    backend = {"path": str(image), "wrap": [fault]}
    daemon = serve(folder, ram_dir, image, "a", backend=backend, hand_over_timeout="1s", destage_after="1h")
    b = make("b", "--incoming")
    try:
        daemon.start()
        with Migrating(folder / "a.sock", queues=2, protocol=PROTOCOL) as source, b.waiting() as destination:
            written = fill(source, "a")
            outage.touch()
            source.begin()
            stop(source)  # it is answered, late
            daemon.wait_for("hand-over-late")
            assert not daemon.events("handed-over")
            start(destination)
            read = destination.start_read(FREE, PAGE)
            b.daemon.wait_for("take-over-waits")
            # The guest may as well go on here.
            start(source)
            written |= fill(source, "more", 8)
            daemon.wait_for("hand-over-cancelled")
            stop(source)
            outage.unlink()
            daemon.wait_for("handed-over")
            assert destination.finish(read).data == written[FREE]
            check(destination, written)
    finally:
        daemon.reap()


def test_a_guest_whose_requests_nothing_answers_stays_where_they_are(
    make: Callable[..., Side], tmp_path: Path, ram_dir: Path, image: Path
) -> None:
    outage = tmp_path / "outage"
    fault = {"fault": {"kind": "read", "while_exists": str(outage)}}
    backend = {"path": str(image), "wrap": [fault]}
    daemon = serve(tmp_path, ram_dir, image, "a", backend=backend, hand_over_timeout="1s")
    b = make("b", "--incoming", "--hand-over-timeout=1s")
    try:
        daemon.start()
        with Migrating(tmp_path / "a.sock", queues=2, protocol=PROTOCOL) as source:
            outage.touch()
            reads = [source.start_read(8192 * queue, PAGE, queue=queue) for queue in range(2)]
            source.begin()
            with b.waiting() as destination:
                stop(source)
                daemon.wait_for("hand-over-refused")
                start(destination)
                destination.expect_gone()
            outage.unlink()
            source.cancel()
            start(source)
            for queue, read in enumerate(reads):
                assert source.finish(read, queue=queue).data == noise(GUARD_BYTES, "guard")[8192 * queue :][:PAGE]
            source.begin()
            stop(source)
            daemon.wait_for("handed-over")  # a slow disk may take longer than its second
    finally:
        daemon.reap()


class Shadowed(Memory):
    """Remembers what the driver has written: what is different is the device's work."""

    shadow: bytearray

    def put(self, at: int, data: bytes) -> None:
        self.shadow[at : at + len(data)] = data
        super().put(at, data)

    def put_u16(self, at: int, value: int) -> None:
        self.shadow[at : at + 2] = (value & 0xFFFF).to_bytes(2, "little")
        super().put_u16(at, value)

    def changed_pages(self) -> set[int]:
        now, before = bytes(self.map), bytes(self.shadow)
        return {at for at in range(0, self.size, PAGE) if now[at : at + PAGE] != before[at : at + PAGE]}


@pytest.mark.parametrize("engine", ["auto", "threads"])
@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
def test_the_dirty_log_names_every_page_that_the_device_has_changed(
    make: Callable[..., Side], cache: bool, engine: str
) -> None:
    side = make("a", "--io-engine", engine, cache=cache)
    # Rings so large that the event index behind them has a page of its own.
    with Migrating(side.socket, protocol=PROTOCOL, queue_size=1024, memory=64 * MIB) as frontend:
        fill_one = {FREE + 5 * PAGE * number: noise(PAGE, number) for number in range(16)}
        for offset, data in fill_one.items():
            frontend.write(offset, data)
        frontend.flush()
        memory = frontend.memory
        memory.__class__ = Shadowed
        assert isinstance(memory, Shadowed)
        memory.shadow = bytearray(memory.map)
        frontend.begin()
        # From RAM, the log and the image; through slots, directly, and by way of a bounce buffer; more than once.
        places = [(0, PAGE), (FREE, PAGE), (FREE, 3 * PAGE), (FREE + 512, 1024), (8 * MIB, 512), (16 * MIB, MIB)]
        for offset, length in places:
            for align in (16, 512, PAGE):
                for indirect in (False, True):
                    parts = [frontend.header(T_IN, offset // 512), frontend.room(length, align), frontend.room(1)]
                    assert frontend.do(parts, indirect=indirect).status == OK
        frontend.write(20 * MIB, noise(PAGE, "w"))
        frontend.write(20 * MIB + 512, noise(512, "w"))
        frontend.write(21 * MIB, noise(MIB, "w"))
        frontend.discard(22 * MIB, MIB)
        frontend.write_zeroes(20 * MIB, PAGE)
        frontend.flush()
        assert frontend.get_id()
        assert frontend.request(99, 0).status == UNSUPP
        frontend.stop()
        changed, dirty = memory.changed_pages(), frontend.dirty_pages()
        assert not changed - dirty, "pages that have changed and are not in the log"
        used = frontend.queues[0].used
        assert {used // PAGE * PAGE, (used + 4 + 8 * 1024) // PAGE * PAGE} <= changed
        assert len(changed) > 1000
        assert len(dirty) < memory.size // PAGE // 2, "it does not just name everything"


def test_an_nbd_export_goes_over_and_no_old_cache_is_believed(make: Callable[..., Side], tmp_path: Path) -> None:
    """It has neither locks nor marks: the source answers when the server has everything, and a cache that was left in
    good order may be older than that."""
    with nbdkit(tmp_path, "memory", str(DISK_BYTES)) as server:
        b = make("b", server.uri, "--drain-on-exit")
        with b.frontend() as old:
            fill(old, "old")
            old.flush()
        b.daemon.stop()
        a = make("a", server.uri)
        b.daemon.arguments.append("--incoming")
        b.daemon.start()
        with a.frontend() as source, b.waiting() as destination:
            written = fill(source, "new")
            source.begin()
            written |= fill(source, "newer", 8)
            stop(source)
            start(destination)
            for offset, data in written.items():
                assert destination.read(offset, PAGE) == data
            b.daemon.wait_for("cache-cold")
            stop(source)
            destination.begin()
            stop(destination)
            start(source)
            for offset, data in written.items():
                assert source.read(offset, PAGE) == data
        a.daemon.stop()
        b.daemon.stop()


FORMATS = pytest.mark.parametrize("kind", ["raw", "qcow2"])


@pytest.fixture
def qemu_disk(image: Path) -> Callable[[str], dict[str, object]]:
    """The image, as a backend that a qemu-storage-daemon opens."""

    def make(kind: str) -> dict[str, object]:
        path = image
        if kind != "raw":
            path = image.with_suffix(f".{kind}")
            qemu_img("convert", "-f", "raw", "-O", kind, image, path)
        return {"type": "qsd", "blockdev": {"driver": kind, "file": {"driver": "file", "filename": str(path)}}}

    return make


@pytest.fixture
def served(tmp_path: Path, ram_dir: Path, image: Path) -> Iterator[Callable[..., NativeDaemon]]:
    with contextlib.ExitStack() as stack:

        def start(name: str, **keys: object) -> NativeDaemon:
            daemon = serve(tmp_path, ram_dir, image, name, **keys)
            stack.callback(daemon.reap)
            return daemon.start()

        yield start


def at(folder: Path, name: str, start: bool = True) -> Migrating:
    """A front-end whose guest runs there, or is to come."""
    frontend = Migrating(folder / f"{name}.sock", queues=2, protocol=PROTOCOL, start=start)
    if not start:
        frontend.negotiate()
        assert frontend.capacity == DISK_BYTES
        frontend.share()
        frontend.track_inflight()
    return frontend


@FORMATS
@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
def test_what_qemu_opens_goes_over_and_back_again(
    served: Callable[..., NativeDaemon],
    qemu_disk: Callable[[str], dict[str, object]],
    tmp_path: Path,
    kind: str,
    cache: bool,
) -> None:
    backend = qemu_disk(kind)
    keys = {"backend": backend} if cache else {"backend": backend, "cache": {}}
    a, b = served("a", **keys), served("b", incoming=True, **keys)
    written: dict[int, bytes] = {}
    source = at(tmp_path, "a")
    for number, (here, there, name) in enumerate(((a, b, "b"), (b, a, "a"), (a, b, "b"))):
        written |= fill(source, number, 32 - 8 * number)
        destination = at(tmp_path, name, start=False)
        source.begin()
        written |= fill(source, ("later", number), 8)
        stop(source)
        here.wait_for("handed-over", count=number // 2 + 1)
        start(destination)
        check(destination, written)
        there.wait_for("taken-over", count=number // 2 + 1)
        source.close()
        source = destination
    source.flush()
    source.close()
    for daemon in (a, b):
        assert not daemon.events("qsd-died")
        daemon.stop()


@FORMATS
def test_a_guest_that_goes_on_at_its_source_gets_back_what_qemu_had_open(
    served: Callable[..., NativeDaemon], qemu_disk: Callable[[str], dict[str, object]], tmp_path: Path, kind: str
) -> None:
    backend = qemu_disk(kind)
    a, b = served("a", backend=backend), served("b", backend=backend, incoming=True)
    with at(tmp_path, "a") as source, at(tmp_path, "b", start=False) as destination:
        written = fill(source, "before")
        source.begin()
        stop(source)
        start(source)
        written |= fill(source, "after", 8)
        check(source, written)
        a.wait_for("taken-over")
        stop(source)
        start(destination)
        check(destination, written)
    b.stop()
    a.stop()


@FORMATS
def test_what_one_qemu_has_open_another_waits_for(
    served: Callable[..., NativeDaemon], qemu_disk: Callable[[str], dict[str, object]], tmp_path: Path, kind: str
) -> None:
    """QEMU itself lets two of them write to a raw image."""
    backend = qemu_disk(kind)
    served("a", backend=backend, cache={})
    b = served("b", backend=backend, cache={}, incoming=True)
    with at(tmp_path, "a") as source, at(tmp_path, "b", start=False) as destination:
        written = fill(source, "a")
        start(destination)
        read = destination.start_read(FREE, PAGE)
        assert "is in use" in b.wait_for("take-over-waits")[0]["reason"]
        assert not destination.queues[0].is_done(read.head)
        source.begin()
        stop(source)
        assert destination.finish(read).data == written[FREE]
        check(destination, written)


def test_other_disks_go_on_while_an_image_is_being_opened(tmp_path: Path) -> None:
    """The server accepts the guest's daemon, and says nothing."""
    (tmp_path / "other.img").write_bytes(noise(MIB, "other"))
    with NbdServer(tmp_path / "nbd.sock", DISK_BYTES) as server:
        volumes = [
            {"name": "b", "socket": "b.sock", "backend": {"type": "nbd", "uri": server.uri}, "incoming": True},
            {"name": "other", "socket": "other.sock", "backend": {"path": "other.img"}},
        ]
        (tmp_path / "both.yaml").write_text(yaml.safe_dump({"volumes": [{**v, "ram": "32MiB"} for v in volumes]}))
        daemon = NativeDaemon.serve(tmp_path / "both.yaml")
        try:
            daemon.start()
            with at(tmp_path, "b", start=False) as guest, Frontend(tmp_path / "other.sock") as other:
                server.greeting = b"NBDMAGIC"
                before = server.connections
                start(guest)
                read = guest.start_read(FREE, PAGE)
                while server.connections == before:
                    time.sleep(0.01)
                for number in range(20):
                    assert other.read(number * PAGE, PAGE) == noise(MIB, "other")[number * PAGE :][:PAGE]
                assert not daemon.events("take-over-waits"), "it has not given up before the other disk was served"
                assert not guest.queues[0].is_done(read.head)
                server.greeting = None
                server.drop_connections()
                assert guest.finish(read).status == OK
        finally:
            daemon.reap()


SLOW_TO_END = """#!/bin/bash
trap 'while [ ! -e go ]; do sleep 0.02; done; kill $child; wait $child; exit' TERM
qemu-storage-daemon "$@" &
child=$!
wait
"""


def test_other_disks_go_on_while_an_image_is_being_closed(
    qemu_disk: Callable[[str], dict[str, object]], tmp_path: Path
) -> None:
    (tmp_path / "other.img").write_bytes(noise(MIB, "other"))
    slow = tmp_path / "slow"
    slow.write_text(SLOW_TO_END)
    slow.chmod(0o755)
    volumes = [
        {"name": "a", "socket": "a.sock", "backend": {**qemu_disk("qcow2"), "binary": str(slow)}},
        {"name": "other", "socket": "other.sock", "backend": {"path": "other.img"}},
    ]
    (tmp_path / "both.yaml").write_text(yaml.safe_dump({"volumes": [{**v, "ram": "32MiB"} for v in volumes]}))
    daemon = NativeDaemon.serve(tmp_path / "both.yaml")
    try:
        daemon.start()
        with at(tmp_path, "a") as source, Frontend(tmp_path / "other.sock") as other:
            fill(source, "a")
            source.begin()
            stopping = threading.Thread(target=stop, args=(source,))
            stopping.start()
            daemon.wait_for("handing-over")
            for number in range(20):
                assert other.read(number * PAGE, PAGE) == noise(MIB, "other")[number * PAGE :][:PAGE]
            assert not daemon.events("handed-over")
            (tmp_path / "go").touch()
            stopping.join()
            daemon.wait_for("handed-over")
    finally:
        (tmp_path / "go").touch()
        daemon.reap()
