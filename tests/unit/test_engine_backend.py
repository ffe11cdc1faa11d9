"""The engine's backends, without a front-end: what they are, and I/O that is waited for."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_engine import DISK_BYTES, MIB, backend_facts, volume
from vhostcache.engine import Engine, EngineBackend
from vhostcache.errors import EngineError


@pytest.fixture(params=[False, True], ids=["io_uring", "threads"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine(poll_max_us=0, force_threads=request.param) as engine:
        yield engine


@pytest.fixture
def image(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "disk.img", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    os.truncate(descriptor, DISK_BYTES)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def backend(engine: Engine, image: int) -> EngineBackend:
    return engine.file_backend(backend_facts(image))


def refusal(action: Callable[[], object]) -> int | None:
    """The errno with which it is refused."""
    try:
        action()
    except OSError as error:
        return error.errno
    return 0


def test_what_is_written_is_read_again_zeroed_and_flushed(backend: EngineBackend, image: int) -> None:
    data = os.urandom(9 * MIB + 12345)
    backend.write(777, data)
    assert backend.read(777, len(data)) == data
    assert os.pread(image, len(data), 777) == data
    backend.zero(MIB, 5 * MIB)
    backend.flush()
    assert os.pread(image, 5 * MIB, MIB) == bytes(5 * MIB)
    assert os.pread(image, 100, MIB - 100) == data[MIB - 877 : MIB - 777]


def test_what_lies_outside_or_between_blocks_is_an_error(engine: Engine, image: int) -> None:
    backend = engine.file_backend(backend_facts(image, align_io_bytes=512))
    for offset, size in ((DISK_BYTES, 512), (DISK_BYTES - 512, 1024), (1, 512), (512, 100)):
        assert refusal(lambda: backend.read(offset, size)) == errno.EINVAL  # noqa: B023


def test_a_read_only_backend_is_not_written(engine: Engine, image: int) -> None:
    backend = engine.file_backend(backend_facts(image, read_only=True))
    for action in (lambda: backend.write(0, b"x" * 512), lambda: backend.zero(0, 512)):
        assert refusal(action) == errno.EROFS
    with pytest.raises(EngineError, match="read-only"):
        engine.add_volume(**volume(backend=backend))


def test_an_image_that_shrank_says_so(backend: EngineBackend, image: int) -> None:
    os.truncate(image, MIB + 100)
    assert refusal(lambda: backend.read(MIB, 4096)) == errno.ENODATA


def test_the_facts_are_those_that_were_given(engine: Engine, image: int) -> None:
    facts = backend_facts(image, preferred_bytes=65536, wants_whole_objects=True, can_trim=False, max_bytes=MIB)
    assert engine.file_backend(facts).facts == facts


@pytest.mark.parametrize(
    "changes",
    [
        {"size_bytes": 0},
        {"size_bytes": 1000},
        {"size_bytes": 512, "align_io_bytes": 4096},
        {"align_io_bytes": 0},
        {"align_io_bytes": 8192},
        {"align_mem_bytes": 3},
    ],
)
def test_a_backend_that_cannot_be_is_refused_with_one_line(engine: Engine, changes: dict[str, Any]) -> None:
    with pytest.raises(EngineError) as caught:
        engine.file_backend(backend_facts(-1, **changes))
    assert "\n" not in str(caught.value)


def test_two_volumes_do_not_share_a_backend(engine: Engine, backend: EngineBackend) -> None:
    engine.add_volume(**volume(backend=backend))
    with pytest.raises(EngineError, match="in use"):
        engine.add_volume(**volume(backend=backend))


def test_a_closed_backend_lets_go_of_its_file(engine: Engine, image: int, tmp_path: Path) -> None:
    backend = engine.file_backend(backend_facts(image))
    backend.flush()
    backend.close()
    backend.close()
    other = engine.file_backend(backend_facts(image))
    other.write(0, b"again" * 100)
    assert (tmp_path / "disk.img").read_bytes()[:5] == b"again"
