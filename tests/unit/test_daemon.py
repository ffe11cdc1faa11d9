import errno
import gc
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.fake_engine import (
    EVENT_BAD_REQUEST,
    EVENT_FEATURES,
    EVENT_QUEUE,
    EVENT_RESUMED,
    EVENT_WCE,
    FakeEngine,
    Result,
    Step,
)
from vhostcache import operations as op
from vhostcache.backend.file import FileBackend
from vhostcache.config import MIB, Config
from vhostcache.control import query
from vhostcache.daemon import Daemon
from vhostcache.errors import ImageError, SocketError
from vhostcache.events import EventLog
from vhostcache.host import qemu_arguments
from vhostcache.volume import Volume

FLUSH_BIT = 1 << 9


class Run:
    """A daemon over fake engines, in this process; signals are real."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engine = FakeEngine()
        self.output: list[str] = []
        self.status = -1
        self.log_path = folder / "log"

    def image(self, name: str = "a.img", size: int = 64 * MIB) -> Path:
        path = self.folder / name
        with path.open("wb") as image:
            image.truncate(size)
        return path

    def volume(self, name: str = "a", **keys: Any) -> dict[str, Any]:
        image = self.folder / f"{name}.img"
        if not image.exists():
            self.image(image.name)
        return {
            "name": name,
            "socket": str(self.folder / name),
            "backend": {"path": str(image)},
            "ram": 16 * MIB,
            **keys,
        }

    def serve(self, *steps: Step, volumes: list[dict[str, Any]] | None = None, **options: Any) -> int:
        top = {key: options.pop(key) for key in ("control", "io_engine") if key in options}
        config = Config.model_validate({"volumes": volumes or [self.volume()], **top})
        descriptor = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        log = EventLog("json", descriptor)
        self.engine.steps = list(steps)

        def make(poll_max_us: int, force_threads: bool) -> Any:
            self.engine.poll_max_us, self.engine.force_threads = poll_max_us, force_threads
            return self.engine

        try:
            self.status = Daemon(config, log, "1.2.3", output=self.output.append, engine_class=make, **options).run()
        finally:
            log.close()
            os.close(descriptor)
        return self.status

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.log_path.read_text().splitlines()]
        return [event for event in found if kind is None or event["event"] == kind]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    frozen = gc.get_freeze_count()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGPIPE)
    before = {number: signal.getsignal(number) for number in numbers}
    yield Run(tmp_path)
    for number, handler in before.items():
        signal.signal(number, handler)
    assert gc.isenabled(), "the collector is on again"
    if not frozen:
        gc.unfreeze()


# Steps.


def connect(engine: FakeEngine, result: Result) -> None:
    engine.connect(result)


def terminate(engine: FakeEngine, result: Result) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def nothing(engine: FakeEngine, result: Result) -> None:
    pass


def event(kind: int, argument: int = 0, volume: int = 0) -> Step:
    return lambda engine, result: result.event(kind, volume, argument)


def write(*tags: int, volume: int = 0) -> Step:
    def step(engine: FakeEngine, result: Result) -> None:
        for tag in tags:
            result.request(op.REQUEST_WRITE, tag, sector=8 * tag, volume=volume)

    return step


def flush(tag: int) -> Step:
    return lambda engine, result: result.request(op.REQUEST_FLUSH, tag, 0, 0)


def until(condition: Callable[[FakeEngine], bool]) -> Step:
    """Turns, until it holds."""

    def step(engine: FakeEngine, result: Result) -> None:
        if not condition(engine):
            engine.steps.insert(0, step)

    return step


def answered(*tags: int) -> Step:
    return until(lambda engine: all(tag in engine.answers for tag in tags))


# Start.


def test_ready_comes_last_when_every_socket_accepts(run: Run) -> None:
    assert run.serve(terminate) == 0
    names = [found["event"] for found in run.events()]
    assert names.index("volume") < names.index("ready") < names.index("stopping") < names.index("statistics")
    (ready,) = run.events("ready")
    assert ready["volumes"] == ["a"]
    assert ready["pid"] == os.getpid()
    assert run.engine.started == [0]
    assert run.engine.closed


def test_the_engine_is_told_what_the_configuration_and_the_image_say(run: Run) -> None:
    volume = run.volume(object_size="1MiB", num_queues=3, serial="S1", write_depth=5, mode="writethrough")
    run.serve(terminate, volumes=[volume])
    (given,) = run.engine.volumes
    assert given["size_bytes"] == given["backend"].size_bytes == 64 * MIB
    assert given["object_bytes"] == MIB
    assert (given["num_queues"], given["serial"], given["write_depth"]) == (3, "S1", 5)
    assert (given["write_cache"], given["read_only"]) == (False, False)
    assert given["backend"].align_io_bytes == 1, "writethrough goes through the page cache"
    assert given["slots"] * 4096 <= 16 * MIB


def test_the_arguments_that_attach_the_disk_are_printed_before_ready(run: Run) -> None:
    run.serve(terminate, volumes=[run.volume("vda", num_queues=2)])
    (text,) = run.output
    assert f"socket,id=vda,path={run.folder}/vda,reconnect=1" in text
    assert "vhost-user-blk-pci,chardev=vda,num-queues=2" in text
    assert "memory-backend-memfd,id=mem,size=1G,share=on" in text


def test_qemu_arguments_are_safe_for_qemu_and_a_shell(run: Run) -> None:
    config = Config.model_validate(
        {"volumes": [{"name": "0-disk", "socket": "/tmp/a b,c/s", "backend": {"path": "x"}}]}
    ).volumes[0]
    text = qemu_arguments(config)
    assert "'socket,id=disk-0-disk,path=/tmp/a b,,c/s,reconnect=1'" in text
    assert "num-queues=4" in text


def test_nothing_starts_if_one_of_many_is_refused(run: Run) -> None:
    good, bad = run.volume("good"), run.volume("bad")
    (run.folder / "bad.img").unlink()
    with pytest.raises(ImageError):
        run.serve(volumes=[good, bad])
    assert run.engine.volumes == []
    assert sorted(os.listdir(run.folder)) == ["good.img", "log"]
    FileBackend(good["backend"]["path"], False, False, lock_wait_s=0).close()


def test_a_socket_that_is_taken_leaves_the_others_closed(run: Run) -> None:
    first, second = run.volume("first"), run.volume("second")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(second["socket"])
        other.listen()
        with pytest.raises(SocketError):
            run.serve(volumes=[first, second])
    assert not (run.folder / "first").exists()
    assert (run.folder / "second").exists()


def test_a_supervisor_is_told_when_it_is_ready_and_when_it_stops(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(run.folder / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(run.folder / "notify"))
        run.serve(terminate)
        supervisor.settimeout(5)
        assert supervisor.recv(100) == b"READY=1"
        assert supervisor.recv(100) == b"STOPPING=1"


def test_where_io_uring_is_forbidden_it_says_so_once(run: Run) -> None:
    run.engine.has_io_uring = False
    run.serve(terminate)
    assert run.events("no-io-uring")[0]["level"] == "warning"
    assert run.events("ready")[0]["io_uring"] is False


def test_threads_that_were_asked_for_are_no_news(run: Run) -> None:
    run.serve(terminate, io_engine="threads")
    assert run.engine.force_threads
    assert not run.events("no-io-uring")


# Requests.


def test_a_flush_is_answered_when_the_write_before_it_is_on_the_backend_and_flushed(run: Run) -> None:
    assert run.serve(connect, write(1, 2), answered(1, 2), flush(3), answered(3), terminate) == 0
    assert run.engine.answers == {1: 0, 2: 0, 3: 0}
    kinds = [kind for kind, _ in run.engine.log]
    assert kinds.index("write") < kinds.index("flush")


def test_requests_of_two_volumes_in_one_turn_go_to_their_own(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def both(engine: FakeEngine, result: Result) -> None:
        for volume in (1, 0):
            for tag in (1, 2, 3):
                result.request(op.REQUEST_WRITE, 10 * volume + tag, sector=8 * tag, volume=volume)

    def connect_both(engine: FakeEngine, result: Result) -> None:
        engine.connect(result, 0)
        engine.connect(result, 1)

    seen: dict[int, list[int]] = {}
    real = Volume.requests

    def spy(volume: Volume, what: Any, tag: Any, sector: Any, sectors: Any, now_ns: int) -> None:
        assert len(what) == len(tag) == len(sector) == len(sectors)
        seen.setdefault(volume.settings.index, []).extend(tag)
        real(volume, what, tag, sector, sectors, now_ns)

    monkeypatch.setattr(Volume, "requests", spy)
    run.serve(connect_both, both, answered(1, 2, 3, 11, 12, 13), terminate, volumes=[run.volume("a"), run.volume("b")])
    assert set(run.engine.answers.values()) == {0}
    assert {volume for kind, volume in run.engine.log if kind == "write"} == {0, 1}
    assert seen == {1: [11, 12, 13], 0: [1, 2, 3]}
    by_volume = {found["volume"]: found for found in run.events("statistics")}
    assert set(by_volume) == {"a", "b"}


def test_an_idle_daemon_sleeps_without_end(run: Run) -> None:
    run.serve(nothing, nothing, nothing, terminate)
    assert run.engine.waited_ns[2:4] == [-1, -1]


def test_after_work_it_collects_once_and_sleeps_again_without_end(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    collections: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda: collections.append(1))

    def forget(engine: FakeEngine, result: Result) -> None:
        engine.waited_ns.clear()

    asleep = until(lambda engine: engine.waited_ns[-1:] == [-1])
    run.serve(connect, write(1), answered(1), flush(2), answered(2), forget, asleep, nothing, nothing, terminate)
    assert len(collections) == 2, "at the start, and when it has been idle"


# The guest's write cache.


def writes_are_durable(run: Run, *before: Step, **keys: Any) -> bool:
    """Whether a write after these steps is acknowledged only when the backend has been flushed."""
    seen: list[list[str]] = []

    def look(engine: FakeEngine, result: Result) -> None:
        seen.append([kind for kind, _ in engine.log])

    run.serve(connect, *before, write(7), answered(7), look, terminate, volumes=[run.volume(**keys)])
    return seen[0][-1:] == ["flush"]


def test_write_back_acknowledges_from_ram_and_write_through_from_the_backend(run: Run) -> None:
    assert not writes_are_durable(run, event(EVENT_FEATURES, FLUSH_BIT))
    run.engine = FakeEngine()
    assert writes_are_durable(run, event(EVENT_FEATURES, FLUSH_BIT), mode="writethrough")


def test_a_guest_that_cannot_flush_gets_write_through(run: Run) -> None:
    assert writes_are_durable(run, event(EVENT_FEATURES, 0))


def test_a_guest_that_switches_its_write_cache_off_gets_write_through(run: Run) -> None:
    assert writes_are_durable(run, event(EVENT_FEATURES, FLUSH_BIT), event(EVENT_WCE, 0))
    (found,) = run.events("write-cache")
    assert found["enabled"] is False


def test_that_state_survives_the_front_ends_leaving(run: Run) -> None:
    def leave(engine: FakeEngine, result: Result) -> None:
        engine.disconnect(result)

    steps = (event(EVENT_FEATURES, FLUSH_BIT), event(EVENT_WCE, 0), leave, connect, event(EVENT_FEATURES, FLUSH_BIT))
    assert writes_are_durable(run, *steps)


@pytest.mark.parametrize("features_first", [True, False])
def test_a_guest_of_an_earlier_process_gets_write_through_until_it_flushes(run: Run, features_first: bool) -> None:
    features, resumed = event(EVENT_FEATURES, FLUSH_BIT), event(EVENT_RESUMED)
    steps = [features, resumed, features] if features_first else [resumed, features]
    assert writes_are_durable(run, *steps)
    run.engine = FakeEngine()
    assert not writes_are_durable(run, *steps, flush(5), answered(5))


# Signals and stopping.


def test_everything_dirty_is_written_and_flushed_before_it_ends(run: Run) -> None:
    assert run.serve(connect, write(1, 2, 3), answered(1, 2, 3), terminate) == 0
    kinds = [kind for kind, _ in run.engine.log]
    assert "write" in kinds
    assert kinds[-1] == "flush"
    assert run.engine.stopped == [0]
    assert [found["volume"] for found in run.events("drained")] == ["a"]
    assert sorted(os.listdir(run.folder)) == ["a.img", "log"], "sockets and their locks are gone"


def test_what_a_guest_has_left_behind_is_written_too(run: Run) -> None:
    def leave(engine: FakeEngine, result: Result) -> None:
        engine.disconnect(result)

    volume = run.volume(destage_after="1h")
    assert run.serve(connect, write(1), answered(1), leave, nothing, terminate, volumes=[volume]) == 0
    assert [kind for kind, _ in run.engine.log] == ["write", "flush"]


def test_a_signal_that_comes_after_the_end_changes_nothing(run: Run) -> None:
    assert run.serve(terminate) == 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_each_way_to_ask_for_the_end_is_understood(run: Run, number: signal.Signals) -> None:
    assert run.serve(lambda engine, result: os.kill(os.getpid(), number)) == 0
    assert run.events("stopping")[0]["reason"] == number.name


def test_a_second_interrupt_loses_nothing_and_says_that_it_still_drains(run: Run) -> None:
    broken = [True]

    def fail(kind: str) -> int:
        return -errno.EIO if broken[0] and kind == "write" else 0

    def interrupt(engine: FakeEngine, result: Result) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def repair(engine: FakeEngine, result: Result) -> None:
        broken[0] = False

    run.engine.io_result = fail
    drained = until(lambda engine: "still-draining" in run.log_path.read_text())
    assert run.serve(connect, write(1), answered(1), interrupt, nothing, nothing, interrupt, drained, repair) == 0
    (found,) = run.events("still-draining")
    assert found["signal"] == "SIGINT"
    assert run.events("draining")[0]["dirty_bytes"] == 4096
    assert run.events("backend-error")[0]["error"] == "input/output error"
    assert run.events("backend-recovered")[0]["level"] == "info"
    kinds = [kind for kind, _ in run.engine.log]
    assert kinds[-2:] == ["write", "flush"]


def test_statistics_come_at_the_signal_and_at_the_end_one_event_a_volume(run: Run) -> None:
    def usr1(engine: FakeEngine, result: Result) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    run.serve(usr1, nothing, nothing, nothing, nothing, terminate, volumes=[run.volume("a"), run.volume("b")])
    found = run.events("statistics")
    assert [event["volume"] for event in found] == ["a", "b", "a", "b"]
    for field in ("requests", "bytes", "backend_operations", "backend_bytes", "merge_ratio", "latency_us", "depth"):
        assert field in found[0]
    assert "flushes_received" in found[0]


def test_with_shutdown_on_disconnect_it_drains_when_the_guest_has_gone(run: Run) -> None:
    def leave(engine: FakeEngine, result: Result) -> None:
        engine.disconnect(result)

    assert run.serve(connect, write(1), answered(1), leave, shutdown_on_disconnect=True) == 0
    assert [kind for kind, _ in run.engine.log][-1] == "flush"


def test_without_it_the_guest_may_come_back(run: Run) -> None:
    def leave(engine: FakeEngine, result: Result) -> None:
        engine.disconnect(result, reason=1)

    run.serve(connect, leave, connect, write(1), answered(1), terminate)
    assert len(run.events("connected")) == 2
    assert run.events("protocol-error")[0]["error"] == "the ring is bent"


def test_a_guests_bad_requests_and_queues_are_told(run: Run) -> None:
    queue = event(EVENT_QUEUE, 3 | 1 << 16 | 5 << 32)
    run.serve(connect, event(EVENT_BAD_REQUEST, 7), queue, terminate)
    assert run.events("bad-request")[0]["count"] == 7
    found = run.events("queue")[0]
    assert (found["queue"], found["started"], found["resubmitted"]) == (3, True, 5)


# An image that shrinks.


def test_an_image_that_shrank_stops_its_volume_alone_and_the_exit_status_says_so(run: Run) -> None:
    def shrink(engine: FakeEngine, result: Result) -> None:
        os.truncate(run.folder / "a.img", MIB)

    def connect_both(engine: FakeEngine, result: Result) -> None:
        engine.connect(result, 0)
        engine.connect(result, 1)

    stopped = until(lambda engine: engine.stopped == [0])
    status = run.serve(
        connect_both,
        shrink,
        write(1, volume=0),
        stopped,
        write(2, volume=1),
        answered(1, 2),
        terminate,
        volumes=[run.volume("a"), run.volume("b")],
    )
    assert status == 1
    (found,) = run.events("image-shrank")
    assert (found["volume"], found["level"], found["size_bytes"]) == ("a", "error", MIB)
    assert run.engine.answers[2] == 0, "the other volume goes on"


def test_a_read_beyond_the_end_of_the_image_is_how_it_is_noticed_too(run: Run) -> None:
    def shrink(engine: FakeEngine, result: Result) -> None:
        os.truncate(run.folder / "a.img", MIB)
        engine.io_result = lambda kind: -errno.ENODATA if kind == "read" else 0
        result.request(op.REQUEST_READ, 1, sector=0, sectors=8)

    assert run.serve(connect, shrink) == 1
    assert run.engine.answers[1] == 1
    assert len(run.events("image-shrank")) == 1


# Control.


def test_status_is_answered_while_requests_come(run: Run) -> None:
    control = str(run.folder / "control")
    answers: list[dict[str, Any]] = []

    def ask(engine: FakeEngine, result: Result) -> None:
        thread = threading.Thread(target=lambda: answers.append(query(control, "status")))
        thread.start()
        engine.steps[:0] = [until(lambda engine: not thread.is_alive())]

    volumes = [run.volume(f"v{number}", ram=4 * MIB * 4) for number in range(20)]
    run.serve(connect, write(1), answered(1), ask, terminate, volumes=volumes, control=control)
    (answer,) = answers
    assert (answer["version"], answer["pid"], answer["state"]) == ("1.2.3", os.getpid(), "serving")
    assert [volume["name"] for volume in answer["volumes"]] == [f"v{number}" for number in range(20)]
    first = answer["volumes"][0]
    assert (first["connected"], first["dirty_bytes"], first["state"]) == (True, 4096, "serving")
    assert not os.path.exists(control)


def test_a_control_server_that_is_killed_is_started_again(run: Run) -> None:
    control = str(run.folder / "control")
    answers: list[dict[str, Any]] = []

    def children() -> set[int]:
        return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))

    others = children()

    def kill(engine: FakeEngine, result: Result) -> None:
        (server,) = children() - others
        os.kill(server, signal.SIGKILL)
        thread = threading.Thread(target=lambda: answers.append(query(control, "status")))
        engine.steps[:0] = [
            until(lambda engine: "control-server-started" in run.log_path.read_text()),
            lambda engine, result: thread.start(),
            until(lambda engine: bool(answers)),
        ]

    run.serve(kill, terminate, control=control)
    assert len(run.events("control-server-died")) == 1
    assert answers[0]["state"] == "serving"
