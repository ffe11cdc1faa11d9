"""Every kind of request, in every legal shape, does what it says."""

import struct
from collections.abc import Callable

import pytest

from tests.frontend import (
    F_CONFIG_WCE,
    F_DISCARD,
    F_FLUSH,
    F_RO,
    F_WRITE_ZEROES,
    IOERR,
    OK,
    SECTOR,
    T_DISCARD,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
    Frontend,
    Part,
)
from tests.native.conftest import BOTH_ENGINES, DISK_BYTES, FREE, MIB, QUEUES, Disk, noise

WCE_OFFSET = 32


@BOTH_ENGINES
def test_what_is_written_is_read_back_at_every_size_and_alignment(disk: Disk) -> None:
    with disk.frontend() as f:
        expected = bytearray(noise(MIB, "background"))
        f.write(FREE, bytes(expected))
        for i, (offset, length) in enumerate(
            [
                (0, 512),
                (512, 512),
                (3584, 1024),
                (4096, 4096),
                (4608, 8192),
                (65536 - 512, 65536),
                (100 * 512, 77 * 512),
            ]
        ):
            data = noise(length, i)
            f.write(FREE + offset, data)
            expected[offset : offset + length] = data
            assert f.read(FREE + offset, length) == data
        assert f.read(FREE, MIB) == expected
        f.flush()
        assert disk.after_power_loss(FREE, MIB) == expected


@BOTH_ENGINES
def test_the_first_and_the_last_sector_are_part_of_the_disk(disk: Disk) -> None:
    with disk.frontend() as f:
        assert f.capacity == DISK_BYTES
        assert f.read(0, SECTOR) == disk.guard[:SECTOR]
        data = noise(SECTOR, "last")
        f.write(DISK_BYTES - SECTOR, data)
        assert f.read(DISK_BYTES - SECTOR, SECTOR) == data


@BOTH_ENGINES
def test_overlapping_writes_one_after_the_other_leave_the_newest_data(disk: Disk) -> None:
    with disk.frontend() as f:
        base = FREE + MIB
        expected = bytearray(32768)
        f.write(base, bytes(32768))
        for i in range(200):
            at, length = (i * 7919 % 60) * 512, (1 + i % 5) * 512
            data = noise(length, i)
            f.write(base + at, data)
            expected[at : at + length] = data
        assert f.read(base, 32768) == expected


@BOTH_ENGINES
def test_what_was_flushed_is_durable(disk: Disk) -> None:
    with disk.frontend() as f:
        for i in range(50):
            f.write(FREE + 2 * MIB + i * 12288, noise(4096, i))
        f.flush()
        there = disk.after_power_loss(FREE + 2 * MIB, 50 * 12288)
        assert [there[i * 12288 :][:4096] for i in range(50)] == [noise(4096, i) for i in range(50)]


@BOTH_ENGINES
def test_discarded_blocks_read_as_zeroes_and_nothing_else_changes(disk: Disk) -> None:
    with disk.frontend() as f:
        assert f.features >> F_DISCARD & 1
        base = FREE + 4 * MIB
        data = noise(65536, "discard")
        f.write(base, data)
        f.discard(base + 8192, 16384)
        after = data[:8192] + bytes(16384) + data[8192 + 16384 :]
        assert f.read(base, 65536) == after
        f.flush()
        assert disk.after_power_loss(base, 65536) == after


@BOTH_ENGINES
@pytest.mark.parametrize("unmap", [False, True])
def test_write_zeroes_zeroes_exactly_its_range(disk: Disk, unmap: bool) -> None:
    with disk.frontend() as f:
        assert f.features >> F_WRITE_ZEROES & 1
        base = FREE + 5 * MIB
        data = noise(65536, "zeroes")
        f.write(base, data)
        f.write_zeroes(base + 512, 20480 + 512, unmap)
        after = data[:512] + bytes(20992) + data[512 + 20992 :]
        assert f.read(base, 65536) == after
        f.flush()
        assert disk.after_power_loss(base, 65536) == after


@BOTH_ENGINES
def test_zeroes_over_dirty_data_and_data_over_zeroes_keep_their_order(disk: Disk) -> None:
    with disk.frontend() as f:
        base = FREE + 6 * MIB
        for i in range(30):
            f.write(base, noise(16384, i))
            f.write_zeroes(base + 4096, 8192, unmap=bool(i & 1))
            f.write(base + 8192, noise(4096, (i, "over")))
            expected = noise(16384, i)[:4096] + bytes(4096) + noise(4096, (i, "over")) + noise(16384, i)[12288:]
            assert f.read(base, 16384) == expected
            if i % 10 == 0:
                f.flush()
                assert disk.after_power_loss(base, 16384) == expected


@BOTH_ENGINES
def test_a_discard_of_several_ranges_discards_them_all(disk: Disk) -> None:
    with disk.frontend() as f:
        (segments,) = struct.unpack_from("<I", f.config(), 40)
        base = FREE + 7 * MIB
        data = noise(65536, "ranges")
        f.write(base, data)
        count = min(segments, 4)
        ranges = [((base + i * 16384) // SECTOR, 8, 0) for i in range(count)]
        assert f.request(T_DISCARD, 0, f.ranges(*ranges)).status == OK
        for i in range(count):
            assert f.read(base + i * 16384, 4096) == bytes(4096)
            assert f.read(base + i * 16384 + 4096, 4096) == data[i * 16384 + 4096 :][:4096]


@BOTH_ENGINES
def test_write_zeroes_of_several_ranges_zeroes_them_all(disk: Disk) -> None:
    with disk.frontend() as f:
        (segments,) = struct.unpack_from("<I", f.config(), 52)
        base = FREE + 8 * MIB
        f.write(base, noise(65536, "ranges"))
        count = min(segments, 4)
        ranges = [((base + i * 16384) // SECTOR, 8, 0) for i in range(count)]
        assert f.request(T_WRITE_ZEROES, 0, f.ranges(*ranges)).status == OK
        for i in range(count):
            assert f.read(base + i * 16384, 4096) == bytes(4096)


def test_the_serial_number_is_the_volumes_name(make_disk: Callable[..., Disk]) -> None:
    disk = make_disk("--name", "a-disk-of-its-own")
    with disk.frontend() as f:
        assert f.get_id() == "a-disk-of-its-own"
        # Exactly twenty bytes are written, NUL-padded.
        result = f.request(T_GET_ID, 0, f.room(20))
        assert result.data == b"a-disk-of-its-own".ljust(20, b"\0")


# -- legal shapes of a chain: a driver of virtio 1 may cut the bytes of a request as it likes --


def a_write(f: Frontend, data: bytes, sector: int) -> tuple[Part, Part, Part]:
    return f.header(T_OUT, sector), f.out(data), f.room(1)


@BOTH_ENGINES
def test_a_header_may_be_split_over_descriptors(disk: Disk) -> None:
    with disk.frontend() as f:
        data = noise(4096, "split header")
        header, payload, status = a_write(f, data, (FREE + 9 * MIB) // SECTOR)
        assert f.do([*header.split(1, 7), payload, status]).status == OK
        assert f.read(FREE + 9 * MIB, 4096) == data
        room = f.room(4096)
        result = f.do([*f.header(T_IN, (FREE + 9 * MIB) // SECTOR).split(15), room, f.room(1)], indirect=True)
        assert (result.status, result.data) == (OK, data)


@BOTH_ENGINES
def test_header_and_data_may_share_a_descriptor(disk: Disk) -> None:
    with disk.frontend() as f:
        data = noise(4096, "together")
        whole = f.out(struct.pack("<IIQ", T_OUT, 0, (FREE + 9 * MIB) // SECTOR) + data)
        assert f.do([whole, f.room(1)]).status == OK
        assert f.read(FREE + 9 * MIB, 4096) == data


@BOTH_ENGINES
def test_data_and_status_may_share_a_descriptor(disk: Disk) -> None:
    with disk.frontend() as f:
        data = noise(4096, "with status")
        f.write(FREE + 9 * MIB, data)
        result = f.do([f.header(T_IN, (FREE + 9 * MIB) // SECTOR), f.room(4097)])
        assert (result.status, result.data) == (OK, data)


@BOTH_ENGINES
def test_a_header_may_be_followed_by_data_in_its_own_descriptor_in_pieces(disk: Disk) -> None:
    with disk.frontend() as f:
        data = noise(8192, "pieces")
        whole = f.out(struct.pack("<IIQ", T_OUT, 0, (FREE + 9 * MIB) // SECTOR) + data)
        assert f.do([*whole.split(5, 100, 1000, 3000), f.room(1)]).status == OK
        assert f.read(FREE + 9 * MIB, 8192) == data


@BOTH_ENGINES
@pytest.mark.parametrize("pieces", [[512] * 7, [1, 511, 3000], [4095], [3, 3, 3, 3], [1] * 60])
@pytest.mark.parametrize("indirect", [False, True])
def test_data_may_be_cut_anywhere(disk: Disk, pieces: list[int], indirect: bool) -> None:
    with disk.frontend() as f:
        data = noise(4096, pieces)
        header, payload, status = a_write(f, data, (FREE + 10 * MIB) // SECTOR)
        assert f.do([header, *payload.split(*pieces), status], indirect=indirect).status == OK
        room = f.room(4096, align=1)
        result = f.do([f.header(T_IN, (FREE + 10 * MIB) // SECTOR), *room.split(*pieces), f.room(1)], indirect=indirect)
        assert (result.status, result.data) == (OK, data)


@BOTH_ENGINES
def test_unaligned_memory_is_as_good_as_aligned(disk: Disk) -> None:
    with disk.frontend() as f:
        for shift in (1, 7, 511, 513, 4095):
            data = noise(16384, shift)
            at = f.memory.reserve(32768) + shift
            f.memory.put(at, data)
            part = Part(2**32 + at, 16384, writable=False)
            assert f.do([f.header(T_OUT, (FREE + 11 * MIB) // SECTOR), part, f.room(1)]).status == OK
            f.memory.put(at, bytes(16384))
            part = Part(2**32 + at, 16384, writable=True)
            assert f.do([f.header(T_IN, (FREE + 11 * MIB) // SECTOR), part, f.room(1)]).status == OK
            assert f.memory.get(at, 16384) == data


@BOTH_ENGINES
def test_the_used_length_says_what_was_written(disk: Disk) -> None:
    with disk.frontend() as f:
        assert f.request(T_IN, FREE // SECTOR, f.room(4096)).used == 4097
        assert f.request(T_OUT, FREE // SECTOR, f.out(bytes(4096))).used == 1
        assert f.request(T_FLUSH, 0).used == 1
        assert f.request(T_GET_ID, 0, f.room(20)).used == 21


@BOTH_ENGINES
def test_many_requests_in_flight_on_all_queues_complete_each_exactly_once(disk: Disk) -> None:
    with disk.frontend(queues=QUEUES, memory=32 * MIB) as f:
        requests = []
        for i in range(30 * QUEUES):
            at = FREE + 16 * MIB + i * 8192
            requests.append((f.start_write(at, noise(8192, i), queue=i % QUEUES), i % QUEUES))
        for request, queue in requests:
            assert f.finish(request, queue).status == OK
        for queue in f.queues:
            queue.collect()
            assert queue.completed == {}
            assert queue.last_used == queue.next_available
        for i in range(30 * QUEUES):
            assert f.read(FREE + 16 * MIB + i * 8192, 8192, queue=i % QUEUES) == noise(8192, i)


@BOTH_ENGINES
def test_more_than_the_ram_can_be_written_without_an_error(disk: Disk) -> None:
    with disk.frontend(memory=16 * MIB) as f:
        for i in range(44):
            f.write(FREE + 16 * MIB + i * MIB, noise(MIB, i))
        f.flush()
        for i in range(44):
            assert f.read(FREE + 16 * MIB + i * MIB, MIB) == noise(MIB, i)


# -- the configuration space and the write cache --


@BOTH_ENGINES
def test_the_configuration_space_says_what_the_disk_is(disk: Disk) -> None:
    with disk.frontend() as f:
        space = f.config(60)
        capacity, _, seg_max = struct.unpack_from("<QII", space)
        (block,) = struct.unpack_from("<I", space, 20)
        physical_exponent, alignment, minimal, optimal = struct.unpack_from("<BBHI", space, 24)
        wce, _, queues = struct.unpack_from("<BBH", space, WCE_OFFSET)
        assert (capacity, block) == (DISK_BYTES // SECTOR, 512)
        assert seg_max >= 1
        assert (block << physical_exponent, alignment) == (4096, 0)
        assert minimal * block <= 4096
        assert optimal * block == 4 * MIB
        assert (wce, queues) == (1, QUEUES)


@BOTH_ENGINES
def test_every_length_of_the_configuration_space_is_the_beginning_of_the_longest(disk: Disk) -> None:
    with disk.frontend() as f:
        whole = f.config(60)
        for length in range(1, 61):
            assert f.config(length) == whole[:length]


@BOTH_ENGINES
def test_the_guest_can_switch_the_write_cache_off_and_on(disk: Disk) -> None:
    with disk.frontend() as f:
        assert f.features >> F_CONFIG_WCE & 1
        assert f.features >> F_FLUSH & 1
        f.write(FREE + 12 * MIB, noise(4096, "written back before"))
        f.set_config(WCE_OFFSET, b"\0")
        assert f.config()[WCE_OFFSET] == 0
        for i in range(10):
            data = noise(4096, ("through", i))
            f.write(FREE + 13 * MIB + i * 8192, data)
            if i % 5 == 0:
                there = disk.after_power_loss(FREE + 13 * MIB + i * 8192, 4096)
                assert there == data, "write-through, but not durable"
        assert disk.after_power_loss(FREE + 12 * MIB, 4096) == noise(4096, "written back before")
        f.set_config(WCE_OFFSET, b"\1")
        assert f.config()[WCE_OFFSET] == 1
        f.write(FREE + 13 * MIB, noise(4096, "back again"))
        f.flush()
        assert disk.after_power_loss(FREE + 13 * MIB, 4096) == noise(4096, "back again")


@BOTH_ENGINES
def test_without_a_negotiated_flush_every_write_is_through(disk: Disk) -> None:
    with disk.frontend(features=()) as f:
        for i in range(10):
            data = noise(4096, ("no flush", i))
            f.write(FREE + 14 * MIB + i * 4096, data)
            if i % 5 == 0:
                assert disk.after_power_loss(FREE + 14 * MIB + i * 4096, 4096) == data


# -- read-only --


def test_a_read_only_disk_can_be_read_and_not_changed(make_disk: Callable[..., Disk]) -> None:
    disk = make_disk("--read-only")
    with disk.frontend() as f:
        assert f.features >> F_RO & 1
        assert f.read(0, 65536) == disk.guard[:65536]
        assert f.request(T_OUT, FREE // SECTOR, f.out(b"x" * 4096)).status == IOERR
        assert f.request(T_FLUSH, 0).status == OK
        f.set_config(WCE_OFFSET, b"\0")
        for kind in (T_DISCARD, T_WRITE_ZEROES):
            assert f.request(kind, 0, f.ranges((FREE // SECTOR, 8, 0))).status != OK
        assert f.read(FREE, 4096) == bytes(4096)
    # Nor by a driver that pretends not to know.
    with disk.frontend(features=()) as f:
        assert f.request(T_OUT, 0, f.out(b"x" * 4096)).status == IOERR
        assert f.read(0, 4096) == disk.guard[:4096]
    assert disk.after_power_loss(0, len(disk.guard)) == disk.guard
