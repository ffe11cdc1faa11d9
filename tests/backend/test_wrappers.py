"""What each wrapper adds, on a file: delay, fault, retry, trace."""

import contextlib
import errno
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.backend.cases import MIB, Wrap, file
from tests.backend.device import BLOCK, Device
from tests.frontend import GET_VRING_BASE
from tests.unit.test_engine import Rig
from vhostcache import operations as op
from vhostcache.backend.base import Facts
from vhostcache.engine import Engine, EngineBackend
from vhostcache.errors import EngineError

HOUR = 3600 * 10**9
Make = Callable[..., Device]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """A device on a file in tmp_path, with these wrappers around it; T/ in their parameters is that folder."""
    made: list[Device] = []

    def make(*wraps: Wrap) -> Device:
        made.append(Device(wrapped(tmp_path, *wraps)))
        return made[-1]

    yield make
    for device in made:
        device.close()


def wrapped(folder: Path, *wraps: Wrap) -> Callable[[Engine], EngineBackend]:
    lowest = file(folder)

    def make(engine: Engine) -> EngineBackend:
        backend = lowest(engine)
        for kind, parameters in wraps:
            backend = engine.wrap_backend(backend, kind, parameters.replace("T/", f"{folder}/"))
        return backend

    return make


def lines(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()]


# -- parameters --


@pytest.mark.parametrize(
    ("kind", "parameters", "message"),
    [
        ("dealy", "", "there is no wrapper 'dealy'; there are delay, fault, retry, trace"),
        ("delay", "red=1", "delay: 'red=1' is not a parameter; there are read, write, flush, zero, jitter, seed, rate"),
        ("delay", "read", "delay: 'read' is not a parameter"),
        ("delay", "read=1 read=2", "delay: 'read' comes twice"),
        ("delay", "read=1ms", "delay: 'read=1ms': allowed: a whole number from 0 to 3600000000000"),
        ("delay", "read=-1", "allowed: a whole number"),
        ("delay", "read= 1", "allowed: a whole number"),
        ("delay", "seed=99999999999999999999999", "allowed: a whole number"),
        ("delay", "rate=0", "allowed: a whole number from 1"),
        ("fault", "errno=EWHAT", "fault: 'errno=EWHAT': allowed: the name of an error, such as EIO or ENOSPC"),
        ("fault", "kind=read,seek", "allowed: read, write, flush, zero, or several of them with commas between"),
        ("fault", "kind=", "allowed: read, write"),
        ("fault", "kind=read,", "allowed: read, write"),
        ("fault", "probability=1.5", "allowed: a number from 0 to 1, such as 0.01"),
        ("fault", "probability=1e-3", "allowed: a number from 0 to 1"),
        ("fault", "nth=0", "allowed: a whole number from 1"),
        ("fault", "torn=1 hang=1", "fault: what hangs cannot be torn too; allowed: torn=1 or hang=1"),
        ("retry", "attempts=0", "allowed: a whole number from 1"),
        ("retry", "kind=flush", "retry: a flush that failed cannot be repeated"),
        ("trace", "", "trace: the parameter 'file' is missing"),
        ("trace", "file=", "trace: 'file=': allowed: a path"),
        ("trace", "file=/no/such/folder/trace", "trace: cannot write to '/no/such/folder/trace': No such file"),
        ("trace", "file=/dev/null", "trace: '/dev/null' is not a regular file"),
    ],
)
def test_what_cannot_be_is_refused_with_one_line(tmp_path: Path, kind: str, parameters: str, message: str) -> None:
    with Engine(poll_max_us=0) as engine:
        backend = file(tmp_path)(engine)
        with pytest.raises(EngineError) as caught:
            engine.wrap_backend(backend, kind, parameters)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert engine.wrap_backend(backend, "retry").facts == backend.facts, "what was refused has changed nothing"


def test_a_path_may_have_spaces_and_backslashes(make: Make, tmp_path: Path) -> None:
    make(("trace", r"  file=T/a\ b\\c  ")).put(0, bytes(BLOCK))
    assert (tmp_path / "a b\\c").exists()


# -- delay --


def test_a_delay_holds_what_it_is_for_and_nothing_else(make: Make) -> None:
    device = make(("delay", f"write={HOUR}"))
    held = device.write(0, b"\xff" * BLOCK)
    device.wait(device.read(0, BLOCK), device.zero(MIB, BLOCK), device.flush())
    assert held not in device.results


def test_nothing_ends_before_its_delay_is_over(make: Make) -> None:
    device = make(("delay", "read=30000000 write=20000000 jitter=1000 seed=5"))
    for begin, least_s in ((lambda: device.write(0, bytes(BLOCK)), 0.02), (lambda: device.read(0, BLOCK), 0.03)):
        begun = time.monotonic()
        device.wait(begin())
        assert time.monotonic() - begun >= least_s


def test_a_rate_is_not_exceeded(make: Make) -> None:
    device = make(("delay", f"rate={4 * MIB}"))
    begun = time.monotonic()
    device.wait(*(device.write(number * 65536, bytes(65536)) for number in range(8)))
    assert time.monotonic() - begun >= 512 * 1024 / (4 * MIB)


# -- fault --


def test_each_write_in_turn_fails_until_none_is_left_that_could(make: Make) -> None:
    for number in range(1, 7):
        device = make(("fault", f"kind=write nth={number}"))
        results = [
            device.wait(device.write(at * BLOCK, bytes(BLOCK)), device.read(at * BLOCK, BLOCK)) for at in range(5)
        ]
        assert [read for _, read in results] == [0] * 5
        assert [write for write, _ in results] == [-errno.EIO if at + 1 == number else 0 for at in range(5)]


def test_a_fault_may_be_of_a_kind_and_of_any_errno(make: Make) -> None:
    device = make(("fault", "kind=flush errno=EROFS"), ("fault", "kind=read,zero errno=ETIMEDOUT"))
    groups = [device.write(0, bytes(BLOCK)), device.flush(), device.read(MIB, BLOCK), device.zero(2 * MIB, BLOCK)]
    assert device.wait(*groups) == [0, -errno.EROFS, -errno.ETIMEDOUT, -errno.ETIMEDOUT]


def test_a_fault_may_be_in_one_place_only(make: Make) -> None:
    device = make(("fault", f"offset={MIB} size={BLOCK}"))
    touching = [(MIB - BLOCK, 2 * BLOCK), (MIB, 1), (MIB + BLOCK - 1, BLOCK), (MIB - 1, 3 * BLOCK)]
    others = [(MIB - BLOCK, BLOCK), (MIB + BLOCK, BLOCK), (0, 512)]
    assert set(device.wait(*(device.read(*place) for place in touching))) == {-errno.EIO}
    assert set(device.wait(*(device.read(*place) for place in others))) == {0}
    assert device.wait(device.flush()) == [0], "a flush has no place"


def test_chance_is_decided_by_the_seed(make: Make) -> None:
    def outcome(seed: int) -> list[int]:
        device = make(("fault", f"probability=0.3 seed={seed}"))
        return [device.wait(device.read(number * BLOCK, BLOCK))[0] for number in range(100)]

    first = outcome(7)
    assert 10 < sum(map(bool, first)) < 50
    assert outcome(7) == first
    assert outcome(8) != first


def test_a_fault_lasts_as_long_as_a_file_is_there(make: Make, tmp_path: Path) -> None:
    device = make(("fault", "while_exists=T/broken"))
    assert device.wait(device.flush()) == [0]
    (tmp_path / "broken").touch()
    assert device.wait(device.flush(), device.read(0, BLOCK)) == [-errno.EIO] * 2
    (tmp_path / "broken").unlink()
    assert device.wait(device.flush()) == [0]


def test_a_fault_has_its_time(make: Make) -> None:
    for parameters, expected in ((f"after={HOUR}", 0), ("during=0", 0), (f"during={HOUR}", -errno.EIO)):
        device = make(("fault", parameters))
        assert device.wait(device.read(0, BLOCK)) == [expected]


@pytest.mark.parametrize("seed", range(8))
def test_a_torn_write_has_written_a_beginning_and_nothing_else(make: Make, tmp_path: Path, seed: int) -> None:
    length = 20 * BLOCK + 512
    device = make(("fault", f"torn=1 kind=write seed={seed}"))
    assert device.wait(device.write(MIB + 512, b"\xff" * length)) == [-errno.EIO]
    content = (tmp_path / "disk.img").read_bytes()
    written = content.count(b"\xff")
    assert content[MIB + 512 : MIB + 512 + written] == b"\xff" * written
    assert written < length
    assert written % 512 == 0


def test_a_torn_zeroing_has_zeroed_a_beginning_and_nothing_else(make: Make, tmp_path: Path) -> None:
    make().put(0, b"\xff" * MIB)
    device = make(("fault", "torn=1 kind=zero seed=4"))
    assert device.wait(device.zero(0, MIB)) == [-errno.EIO]
    content = (tmp_path / "disk.img").read_bytes()[:MIB]
    zeroed = content.count(b"\0")
    assert content == bytes(zeroed) + b"\xff" * (MIB - zeroed)
    assert 0 < zeroed < MIB


def test_what_hangs_goes_on_when_the_file_has_gone(make: Make, tmp_path: Path) -> None:
    device = make(("fault", "hang=1 while_exists=T/away"))
    (tmp_path / "away").touch()
    data = b"\x5a" * BLOCK
    hanging = [device.write(number * BLOCK, data) for number in range(30)] + [device.flush()]
    for _ in range(3):
        device.turn()
    assert not device.results
    (tmp_path / "away").unlink()
    assert set(device.wait(*hanging)) == {0}
    assert device.get(29 * BLOCK, BLOCK) == data


def test_what_hangs_fails_when_the_volume_stops(make: Make) -> None:
    device = make(("fault", "hang=1 errno=ETIMEDOUT"))
    hanging = [device.write(number * BLOCK, bytes(BLOCK)) for number in range(10)]
    device.turn()
    device.engine.stop_volume(0)
    assert set(device.wait(*hanging)) == {-errno.ETIMEDOUT}
    assert device.wait(device.flush()) == [-errno.ETIMEDOUT], "and nothing hangs from then on"


# -- retry --


def test_what_fails_for_a_while_succeeds(make: Make, tmp_path: Path) -> None:
    device = make(
        ("trace", "file=T/below"),
        ("fault", "kind=read,write,zero probability=0.5 seed=1"),
        ("fault", "kind=write probability=0.3 torn=1 seed=2 errno=ECONNRESET"),
        ("retry", "first=1000 max=100000 attempts=1000"),
        ("trace", "file=T/above"),
    )
    blocks = [bytes([number]) * (3 * BLOCK) for number in range(1, 60)]
    assert set(device.wait(*(device.write(at * 4 * BLOCK, block) for at, block in enumerate(blocks)))) == {0}
    assert [device.get(at * 4 * BLOCK, 3 * BLOCK) for at in range(len(blocks))] == blocks
    device.close()
    above = lines(tmp_path / "above")
    assert len(above) == 2 * len(blocks)
    assert {line[5] for line in above} == {"ok"}
    assert {line[3] for line in above} == {str(3 * BLOCK)}
    assert {int(line[3]) <= 3 * BLOCK for line in lines(tmp_path / "below")} == {True}


def test_after_so_many_attempts_the_error_comes_up(make: Make, tmp_path: Path) -> None:
    device = make(("fault", "errno=ENOTCONN"), ("trace", "file=T/below"), ("retry", "first=1000 attempts=4"))
    assert device.wait(device.write(0, bytes(BLOCK))) == [-errno.ENOTCONN]
    device.close()
    assert [line[5] for line in lines(tmp_path / "below")] == ["ENOTCONN"] * 4


@pytest.mark.parametrize("name", ["ENOSPC", "EROFS", "EPERM", "EINVAL", "ENODATA"])
def test_what_time_does_not_mend_comes_up_at_once(make: Make, name: str) -> None:
    device = make(("fault", f"errno={name} nth=1"), ("retry", f"first={HOUR}"))
    assert device.wait(device.write(0, bytes(BLOCK))) == [-getattr(errno, name)]


def test_a_flush_that_failed_is_never_repeated(make: Make) -> None:
    device = make(("fault", "kind=flush nth=1"), ("retry", f"first={HOUR}"))
    assert device.wait(device.flush()) == [-errno.EIO], "what was written before may be lost: the core has to know"
    assert device.wait(device.flush()) == [0]


def test_only_the_kinds_that_were_asked_for_are_tried_again(make: Make) -> None:
    device = make(("fault", ""), ("retry", f"first={HOUR} kind=write"))
    assert device.wait(device.read(0, BLOCK), device.zero(MIB, BLOCK)) == [-errno.EIO] * 2


@pytest.mark.parametrize(
    ("wraps", "expected"),
    [
        ([("fault", "errno=EHOSTUNREACH"), ("retry", f"first={HOUR} max={HOUR}")], errno.EHOSTUNREACH),
        ([("delay", f"write={HOUR}")], errno.ESHUTDOWN),
        ([("fault", "hang=1 errno=ETIMEDOUT")], errno.ETIMEDOUT),
    ],
)
def test_what_is_held_fails_when_the_backend_is_given_up(make: Make, wraps: list[Wrap], expected: int) -> None:
    device = make(*wraps)
    waiting = [device.write(number * BLOCK, bytes(BLOCK)) for number in range(10)]
    device.turn()
    assert not device.results
    device.backend.give_up()
    assert set(device.wait(*waiting)) == {-expected}


# -- trace --


def test_a_trace_has_a_line_for_each_operation(make: Make, tmp_path: Path) -> None:
    device = make(("fault", "kind=flush errno=ENOSPC"), ("trace", "file=T/trace"))
    before = time.time()
    device.wait(device.write(MIB + 512, bytes(3 * BLOCK)))
    device.wait(device.read(0, 512))
    device.wait(device.zero(2 * MIB, MIB))
    device.wait(device.flush())
    device.until(lambda: (tmp_path / "trace").read_text().count("\n") == 4)  # while it runs, and soon
    found = lines(tmp_path / "trace")
    assert [(line[1:4], line[5]) for line in found] == [
        (["write", str(MIB + 512), str(3 * BLOCK)], "ok"),
        (["read", "0", "512"], "ok"),
        (["zero", str(2 * MIB), str(MIB)], "ok"),
        (["flush", "0", "0"], "ENOSPC"),
    ]
    assert all(before - 1 <= float(line[0]) <= time.time() + 1 for line in found)
    assert all(float(line[4]) >= 0 for line in found)


def test_a_trace_is_complete_when_the_backend_is_closed_and_goes_on_with_the_next(make: Make, tmp_path: Path) -> None:
    for round_ in range(1, 3):
        device = make(("trace", "file=T/trace"))
        device.wait(*(device.write(number * BLOCK, bytes(BLOCK)) for number in range(500)))
        device.close()
        assert len(lines(tmp_path / "trace")) == 500 * round_


# -- a front-end that wants its memory back --


@pytest.mark.parametrize(
    "wrap", [("delay", f"read={HOUR}"), ("fault", "hang=1"), ("retry", f"first={HOUR} max={HOUR}")]
)
def test_a_read_that_is_held_does_not_hold_up_a_queue_that_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrap: Wrap
) -> None:
    wraps = (("fault", "kind=read"), wrap) if wrap[0] == "retry" else (wrap,)
    plain = Engine.file_backend

    def with_wraps(engine: Engine, facts: Facts) -> EngineBackend:
        backend = plain(engine, facts)
        for kind, parameters in wraps:
            backend = engine.wrap_backend(backend, kind, parameters)
        return backend

    monkeypatch.setattr(Engine, "file_backend", with_wraps)
    rig = Rig(tmp_path)
    with contextlib.closing(rig), rig.frontend() as frontend:
        rig.answering = False
        frontend.start_read(0, BLOCK)
        rig.until(lambda: rig.requests)
        rig.operations = [op.READ_DIRECT | rig.requests[0][1] << 8 | 1 << 32, 0, 0, BLOCK]
        rig.turn()
        frontend.send(GET_VRING_BASE, struct.pack("<II", 0, 0))
        rig.until(rig.quiesces)
        assert rig.quiesces() == [1]
        rig.settle(op.DROP)
        assert rig.during(frontend.receive)[0] == GET_VRING_BASE
