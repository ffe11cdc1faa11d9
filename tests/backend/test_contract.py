"""What the core may rely on, whatever stands behind and between (csrc/backend.h): the same tests for all cases."""

import errno
import random
from collections.abc import Callable

import pytest

from tests.backend.cases import DISK_BYTES, MIB, Stand
from tests.backend.device import BLOCK, SLOTS, Device, volume
from vhostcache.engine import Engine
from vhostcache.errors import EngineError

ROUNDS = 200
AT_ONCE = 24


def noise(length: int, seed: object) -> bytes:
    return random.Random(repr(seed)).randbytes(length)


# -- data --


def test_what_was_written_is_read_at_any_alignment_that_is_allowed(device: Device) -> None:
    step, rng = device.step, random.Random(1)
    for number in range(25):
        offset = rng.randrange(0, device.size - 128 * 1024, step)
        length = rng.randrange(step, 100 * 1024, step)
        data = noise(length, number)
        device.put(offset, data)
        assert device.get(offset, length) == data
        inner = rng.randrange(0, length, step)
        assert device.get(offset + inner, length - inner) == data[inner:]


def test_scattered_slots_are_one_write_and_one_read(device: Device) -> None:
    data = noise(200 * BLOCK, "scattered")
    device.put(3 * BLOCK, data)
    assert device.get(3 * BLOCK, len(data)) == data
    assert device.get(3 * BLOCK + device.step, device.step) == data[device.step : 2 * device.step]


def test_the_slots_of_zeroes_write_zeroes(device: Device) -> None:
    device.put(MIB, b"\xff" * (6 * BLOCK))
    assert device.wait(device.write_slots(MIB + BLOCK, [1, 2, 1, 1])) == [0]
    assert device.get(MIB, 6 * BLOCK) == b"\xff" * BLOCK + bytes(4 * BLOCK) + b"\xff" * BLOCK


def test_the_largest_operation_is_done_whole(device: Device) -> None:
    data = noise((SLOTS - 100) * BLOCK, "large")  # more segments than one system call takes
    device.put(BLOCK, data)
    assert device.get(BLOCK, len(data)) == data


def test_the_last_bytes_of_the_device_are_there(device: Device) -> None:
    for length in (device.step, BLOCK, 9 * BLOCK):
        data = noise(length, ("end", length))
        device.put(device.size - length, data)
        assert device.get(device.size - length, length) == data


@pytest.mark.parametrize("may_unmap", [False, True], ids=["keep", "unmap"])
def test_zeroed_ranges_read_as_zeroes_and_their_neighbours_stay(device: Device, may_unmap: bool) -> None:
    step, rng = device.step, random.Random(2)
    for offset, length in (
        (0, 64 * BLOCK),
        (MIB + step, 40 * BLOCK + step),
        (device.size - 2 * BLOCK, 2 * BLOCK),
        *((rng.randrange(0, device.size // 2, step), rng.randrange(step, 200_000, step)) for _ in range(4)),
    ):
        first, last = max(0, offset - step), min(device.size, offset + length + step)
        device.put(first, b"\xaa" * (last - first))
        assert device.wait(device.zero(offset, length, may_unmap)) == [0]
        expected = b"\xaa" * (offset - first) + bytes(length) + b"\xaa" * (last - offset - length)
        assert device.get(first, last - first) == expected


def test_a_large_part_of_the_device_is_zeroed_at_once(device: Device) -> None:
    device.put(4 * MIB - BLOCK, b"\x77" * (2 * BLOCK))
    assert device.wait(device.zero(4 * MIB, 8 * MIB)) == [0]
    assert device.get(4 * MIB - BLOCK, 2 * BLOCK) == b"\x77" * BLOCK + bytes(BLOCK)
    assert device.get(10 * MIB, 2 * MIB) == bytes(2 * MIB)


def test_what_was_flushed_is_there_for_the_next_engine(stand: Stand) -> None:
    data = noise(300_000 // 4096 * 4096, "kept")
    first = stand.device()
    first.put(5 * MIB, data)
    first.sync()
    first.close()
    assert stand.device().get(5 * MIB, len(data)) == data


# -- many at once --


def test_many_operations_at_once_all_end_once(device: Device) -> None:
    count = 60 if device.facts.align_io_bytes > 4096 else 300
    blocks = [noise(BLOCK, number) for number in range(count)]
    writes = [device.write(number * 2 * BLOCK, block) for number, block in enumerate(blocks)]
    assert set(device.wait(*writes)) == {0}
    reads = [device.read(number * 2 * BLOCK, BLOCK) for number in range(count)]
    flushes = [device.flush() for _ in range(5)]
    assert set(device.wait(*reads, *flushes)) == {0}
    assert [device.data(read) for read in reads] == blocks


def test_random_operations_agree_with_a_model(stand: Stand) -> None:
    device, rng = stand.device(), random.Random(3)
    model = bytearray(device.size)
    assert device.wait(device.zero(0, device.size)) == [0]
    rounds = ROUNDS // 4 if stand.case.slow else ROUNDS
    busy: dict[int, tuple[int, int, bytes | None]] = {}  # offset, end, what is read there

    def settle(group: int) -> None:
        _, _, expected = busy.pop(group)
        assert device.results[group] == 0
        if expected is not None:
            assert device.data(group) == expected

    for number in range(rounds):
        while len(busy) >= AT_ONCE:
            device.turn()
            for group in [group for group in busy if group in device.results]:
                settle(group)
        length = device.step * rng.randint(1, max(1, rng.choice([8192, 65536, 300_000]) // device.step))
        offset = rng.randrange(0, device.size - length, device.step)
        end = offset + length
        kind = rng.choices(["write", "read", "zero", "flush"], [5, 4, 1, 1])[0]
        if kind == "flush":
            busy[device.flush()] = (0, 0, None)
        elif any(offset < other_end and start < end for start, other_end, _ in busy.values()):
            continue  # the core never has two at once in one place
        elif kind == "write":
            model[offset:end] = data = noise(length, number)
            busy[device.write(offset, data)] = (offset, end, None)
        elif kind == "read":
            busy[device.read(offset, length)] = (offset, end, bytes(model[offset:end]))
        else:
            model[offset:end] = bytes(length)
            busy[device.zero(offset, length, rng.random() < 0.5)] = (offset, end, None)
    device.wait(*busy)
    for group in list(busy):
        settle(group)
    for start in range(0, device.size, 4 * MIB):
        assert device.get(start, 4 * MIB) == model[start : start + 4 * MIB]


# -- errors --


def test_an_error_comes_once_and_as_a_negative_errno(stand: Stand) -> None:
    device = stand.device(("fault", "errno=ENOSPC nth=3 kind=write"), ("trace", f"file={stand.folder}/errors"))
    results = [device.wait(device.write(number * BLOCK, bytes(BLOCK)))[0] for number in range(5)]
    assert results == [0, 0, -errno.ENOSPC, 0, 0]
    statistics = device.engine.volume_statistics(0)
    assert statistics["backend_errors"] == 1
    assert statistics["backend_ops"] == [0, 5, 0, 0]


# -- facts --


def test_the_facts_are_sound(device: Device) -> None:
    facts = device.facts
    assert facts.size_bytes == DISK_BYTES
    assert facts.size_bytes % max(512, facts.align_io_bytes) == 0
    assert facts.align_io_bytes <= BLOCK
    assert facts.align_io_bytes.bit_count() == facts.align_mem_bytes.bit_count() == 1
    assert not facts.read_only
    assert facts.can_flush


def test_before_a_volume_has_it_each_operation_can_be_waited_for(stand: Stand) -> None:
    with Engine(poll_max_us=0, force_threads=stand.case.threads) as engine:
        backend = stand.case.open(stand.folder)(engine)
        data = noise(5 * MIB, "sync")
        backend.write(MIB, data)
        backend.flush()
        assert backend.read(MIB, len(data)) == data
        backend.zero(2 * MIB, MIB)
        assert backend.read(2 * MIB - BLOCK, 2 * BLOCK) == data[MIB - BLOCK : MIB] + bytes(BLOCK)
        for offset, length in ((DISK_BYTES, BLOCK), (DISK_BYTES - BLOCK, 2 * BLOCK)):
            with pytest.raises(OSError, match="Invalid argument"):
                backend.read(offset, length)


# -- the end --


@pytest.mark.parametrize("turns", [0, 1, 3])
def test_an_engine_closes_while_operations_are_under_way(stand: Stand, turns: int) -> None:
    device = stand.device()
    for number in range(40):
        device.write(number * 16 * BLOCK, bytes(8 * BLOCK))
        device.read((number * 16 + 8) * BLOCK, 8 * BLOCK)
    device.flush()
    device.zero(8 * MIB, MIB)
    device.turn(0)
    for _ in range(turns):
        device.turn(0)
    device.close()


def test_a_backend_can_be_closed_and_opened_again(stand: Stand) -> None:
    with Engine(poll_max_us=0, force_threads=stand.case.threads) as engine:
        make: Callable[[Engine], object] = stand.case.open(stand.folder)
        for number in range(3):
            backend = stand.case.open(stand.folder)(engine)
            backend.write(number * BLOCK, noise(BLOCK, number))
            backend.close()
        assert make
        backend = stand.case.open(stand.folder)(engine)
        assert backend.read(0, 3 * BLOCK) == b"".join(noise(BLOCK, number) for number in range(3))


def test_one_backend_is_for_one_volume(stand: Stand) -> None:
    with Engine(poll_max_us=0) as engine:
        backend = stand.case.open(stand.folder)(engine)
        engine.add_volume(**volume(backend, read_only=False))
        with pytest.raises(EngineError, match="in use"):
            engine.add_volume(**volume(backend, read_only=False))
        with pytest.raises(EngineError, match="in use"):
            engine.wrap_backend(backend, "retry")
