"""Requests and rings that no honest driver makes. A bad request gets an error status; a bad ring costs the connection.

After each test the `disk` fixture checks that the daemon lives, that a good front-end works, and that the guarded data
has not changed.
"""

import random
import struct

import pytest

from tests.frontend import (
    D_INDIRECT,
    D_NEXT,
    D_WRITE,
    GUEST,
    IOERR,
    OK,
    SECTOR,
    T_DISCARD,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
    UNSUPP,
    UNWRITTEN,
    Descriptor,
    Frontend,
    GoneError,
    Part,
    Result,
)
from tests.native.conftest import DISK_BYTES, FREE, MIB, Disk, noise

SECTORS = DISK_BYTES // SECTOR


def outcome(f: Frontend, parts: list[Part], indirect: bool = False) -> int | None:
    """The status of a request; None if it cost the connection."""
    try:
        return f.do(parts, indirect=indirect).status
    except GoneError:
        return None


def assert_still_works(f: Frontend) -> None:
    data = noise(4096, "still works")
    f.write(FREE, data)
    assert f.read(FREE, 4096) == data


# -- bad requests in good chains: an error for them, and the connection goes on --


@pytest.mark.parametrize("length", [1, 4, 8, 15])
def test_a_header_too_short_is_an_io_error(disk: Disk, length: int) -> None:
    with disk.frontend() as f:
        header = f.header(T_OUT, FREE // SECTOR)
        assert f.do([Part(header.address, length, writable=False), f.room(1)]).status == IOERR
        assert_still_works(f)


def test_a_request_without_any_header_is_an_io_error(disk: Disk) -> None:
    with disk.frontend() as f:
        assert f.do([f.room(4096), f.room(1)]).status == IOERR
        assert f.do([f.room(1)]).status == IOERR
        assert_still_works(f)


def test_a_request_without_a_status_byte_harms_only_its_sender(disk: Disk) -> None:
    with disk.frontend() as f:
        f.write(FREE, bytes(4096))
        head = f.queues[0].chain([f.header(T_OUT, FREE // SECTOR), f.out(noise(4096, "no status"))])
        try:
            f.queues[0].submit(head)
            assert f.queues[0].wait(head) == 0
            assert f.read(FREE, 4096) == bytes(4096), "a request without a status byte was carried out"
        except GoneError:
            pass


def test_a_chain_of_nothing_but_a_header_harms_only_its_sender(disk: Disk) -> None:
    with disk.frontend() as f:
        head = f.queues[0].chain([f.header(T_FLUSH)])
        try:
            f.queues[0].submit(head)
            assert f.queues[0].wait(head) == 0
        except GoneError:
            pass


@pytest.mark.parametrize("kind", [T_IN, T_OUT])
def test_data_in_the_wrong_direction_is_an_io_error(disk: Disk, kind: int) -> None:
    with disk.frontend() as f:
        before = f.read(FREE, 4096)
        data = f.room(4096) if kind == T_OUT else f.out(bytes(4096))
        result = f.request(kind, FREE // SECTOR, data)
        assert result.status == IOERR
        if kind == T_OUT:
            assert result.data == bytes([UNWRITTEN]) * 4096, "a write's data was written to"
        assert f.read(FREE, 4096) == before
        assert_still_works(f)


def test_a_read_with_data_on_both_sides_harms_nobody(disk: Disk) -> None:
    with disk.frontend() as f:
        f.write(FREE, noise(4096, "both"))
        result = f.request(T_IN, FREE // SECTOR, f.out(bytes(512)), f.room(4096))
        assert result.status == IOERR or result.data == noise(4096, "both")
        assert_still_works(f)


@pytest.mark.parametrize("kind", [T_IN, T_OUT])
@pytest.mark.parametrize(
    ("sector", "length"),
    [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (SECTORS - 7, 4096),
        (SECTORS + 1, 4096),
        (SECTORS - MIB // SECTOR + 1, MIB),
        (2**63, 4096),
        (2**64 - 1, 512),
        (2**64 - 8, 4096),
        (2**55, 4096),
        (2**55 - 1, 4096),
        (2**55 - 8, 4096),
        (2**54 + 3, 4096),
        (2**32, 4096),
    ],
)
def test_beyond_the_end_of_the_disk_is_an_io_error(disk: Disk, kind: int, sector: int, length: int) -> None:
    with disk.frontend() as f:
        data = f.room(length) if kind == T_IN else f.out(b"\xff" * length)
        result = f.request(kind, sector, data)
        assert result.status == IOERR
        if kind == T_IN:
            assert result.data == bytes([UNWRITTEN]) * length, "an answer of bytes to a read beyond the end"
        assert_still_works(f)


@pytest.mark.parametrize("kind", [T_IN, T_OUT])
@pytest.mark.parametrize("length", [1, 511, 513, 4095, 4097, 65537])
def test_a_length_that_is_not_a_multiple_of_512_is_an_io_error(disk: Disk, kind: int, length: int) -> None:
    with disk.frontend() as f:
        f.write(FREE, noise(65536 + 4096, "odd"))
        result = f.request(kind, FREE // SECTOR, f.room(length) if kind == T_IN else f.out(b"\xff" * length))
        assert result.status == IOERR
        assert f.read(FREE, 65536 + 4096) == noise(65536 + 4096, "odd")


@pytest.mark.parametrize("kind", [T_IN, T_OUT])
def test_a_request_without_data_is_answered(disk: Disk, kind: int) -> None:
    with disk.frontend() as f:
        assert f.request(kind, FREE // SECTOR).status in (OK, IOERR)
        assert f.request(kind, SECTORS).status in (OK, IOERR)
        assert f.request(kind, 2**64 - 1).status == IOERR
        assert_still_works(f)


@pytest.mark.parametrize("kind", [2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 16, 24, 255, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_an_unknown_kind_of_request_is_unsupported(disk: Disk, kind: int) -> None:
    with disk.frontend() as f:
        assert f.request(kind, FREE // SECTOR).status == UNSUPP
        assert f.request(kind, FREE // SECTOR, f.out(bytes(512))).status == UNSUPP
        assert f.request(kind, FREE // SECTOR, f.room(512)).status == UNSUPP
        assert_still_works(f)


def test_a_priority_is_of_no_concern(disk: Disk) -> None:
    with disk.frontend() as f:
        assert f.do([f.header(T_IN, FREE // SECTOR, ioprio=2**32 - 1), f.room(512), f.room(1)]).status == OK


@pytest.mark.parametrize("length", [1, 19, 21, 4096])
def test_an_identity_in_a_buffer_of_another_size_is_answered(disk: Disk, length: int) -> None:
    with disk.frontend() as f:
        result = f.request(T_GET_ID, 0, f.room(length))
        assert result.status in (OK, IOERR)
        assert set(result.data[20:]) <= {0, UNWRITTEN}
        assert_still_works(f)


def test_an_identity_without_room_or_into_readable_memory_is_answered(disk: Disk) -> None:
    with disk.frontend() as f:
        assert f.request(T_GET_ID, 0).status in (OK, IOERR)
        assert f.request(T_GET_ID, 0, f.out(bytes(20))).status in (OK, IOERR)
        assert_still_works(f)


@pytest.mark.parametrize("sector", [0, 1, 2**64 - 1])
def test_a_flush_may_name_any_sector_and_carry_anything(disk: Disk, sector: int) -> None:
    with disk.frontend() as f:
        assert f.request(T_FLUSH, sector).status in (OK, IOERR)
        assert f.request(T_FLUSH, sector, f.out(bytes(512))).status in (OK, IOERR)
        assert f.request(T_FLUSH, sector, f.room(512)).status in (OK, IOERR)
        assert_still_works(f)


@pytest.mark.parametrize("kind", [T_DISCARD, T_WRITE_ZEROES])
@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ([(SECTORS, 8, 0)], {IOERR}),
        ([(SECTORS - 7, 8, 0)], {IOERR}),
        ([(2**64 - 1, 1, 0)], {IOERR}),
        ([(2**64 - 8, 8, 0)], {IOERR}),
        ([(2**55, 8, 0)], {IOERR}),
        ([(0, 2**32 - 1, 0)], {IOERR}),
        ([(8, 2**32 - 1, 0)], {IOERR}),
        ([(FREE // SECTOR, 0, 0)], {OK, IOERR}),
        ([(FREE // SECTOR, 8, 2)], {UNSUPP}),
        ([(FREE // SECTOR, 8, 2**32 - 1)], {UNSUPP}),
        ([(FREE // SECTOR, 8, 0)] * 1000, {IOERR, UNSUPP}),
    ],
)
def test_a_bad_range_is_refused(disk: Disk, kind: int, ranges: list[tuple[int, int, int]], expected: set[int]) -> None:
    with disk.frontend() as f:
        f.write(FREE, noise(4096, "ranges"))
        assert f.request(kind, 0, f.ranges(*ranges)).status in expected
        if expected != {OK, IOERR}:
            assert f.read(FREE, 4096) == noise(4096, "ranges"), "a refused request was carried out"
        assert_still_works(f)


def test_a_discard_that_asks_to_unmap_is_unsupported(disk: Disk) -> None:
    with disk.frontend() as f:
        f.write(FREE, noise(4096, "unmap"))
        assert f.request(T_DISCARD, 0, f.ranges((FREE // SECTOR, 8, 1))).status == UNSUPP
        assert f.read(FREE, 4096) == noise(4096, "unmap")


@pytest.mark.parametrize("kind", [T_DISCARD, T_WRITE_ZEROES])
def test_a_good_range_beside_a_bad_one_is_not_carried_out_alone(disk: Disk, kind: int) -> None:
    with disk.frontend() as f:
        f.write(FREE, noise(8192, "beside"))
        result = f.request(kind, 0, f.ranges((FREE // SECTOR, 8, 0), (SECTORS, 8, 0)))
        assert result.status in (IOERR, UNSUPP)
        assert f.read(FREE, 8192) == noise(8192, "beside")


@pytest.mark.parametrize("kind", [T_DISCARD, T_WRITE_ZEROES])
@pytest.mark.parametrize("length", [0, 1, 8, 15, 17, 31, 4096])
def test_ranges_of_an_odd_size_are_refused(disk: Disk, kind: int, length: int) -> None:
    with disk.frontend() as f:
        f.write(FREE, noise(4096, "odd ranges"))
        data = (struct.pack("<QII", FREE // SECTOR, 8, 0) + bytes(8192))[:length]
        assert f.request(kind, 0, *([f.out(data)] if length else [])).status in (IOERR, UNSUPP)
        if length < 16:
            assert f.read(FREE, 4096) == noise(4096, "odd ranges")
        assert_still_works(f)


@pytest.mark.parametrize("kind", [T_DISCARD, T_WRITE_ZEROES])
def test_ranges_in_writable_memory_are_refused(disk: Disk, kind: int) -> None:
    with disk.frontend() as f:
        assert f.request(kind, 0, f.room(16)).status in (IOERR, UNSUPP)
        assert_still_works(f)


def test_ranges_may_be_cut_anywhere(disk: Disk) -> None:
    with disk.frontend() as f:
        f.write(FREE, noise(8192, "cut"))
        part = f.ranges((FREE // SECTOR, 8, 0))
        assert f.request(T_WRITE_ZEROES, 0, *part.split(1, 6, 5)).status == OK
        assert f.read(FREE, 8192) == bytes(4096) + noise(8192, "cut")[4096:]


def test_more_segments_than_advertised_are_refused_or_right(disk: Disk) -> None:
    with disk.frontend(queue_size=1024) as f:
        (_, _, seg_max) = struct.unpack_from("<QII", f.config())
        pieces = min(seg_max + 50, 1000)
        data = noise(pieces * 512, "segments")
        result = f.request(T_OUT, FREE // SECTOR, *f.out(data).split(*[512] * (pieces - 1)))
        assert result.status in (OK, IOERR)
        if result.status == OK:
            assert f.read(FREE, len(data)) == data
        assert_still_works(f)


def test_a_larger_request_than_advertised_is_refused_or_right(disk: Disk) -> None:
    with disk.frontend(memory=64 * MIB) as f:
        data = noise(20 * MIB, "large")
        try:
            result = f.request(T_OUT, FREE // SECTOR, f.out(data))
            assert result.status in (OK, IOERR)
            if result.status == OK:
                assert f.read(FREE, MIB) == data[:MIB]
                assert f.read(FREE + 19 * MIB, MIB) == data[-MIB:]
        except GoneError:
            pytest.fail("a request that is too large cost the connection, where an error would do")


def test_a_thousand_bad_requests_among_good_ones_do_not_disturb_these(disk: Disk) -> None:
    with disk.frontend() as f:
        rng = random.Random(17)
        for i in range(300):
            good = f.start_write(FREE + i * 4096, noise(4096, i))
            bad = [
                f.submit([f.header(rng.randrange(2**32), rng.randrange(2**64)), f.room(512), f.room(1)]),
                f.submit([f.header(T_IN, SECTORS + i), f.room(512), f.room(1)]),
                f.submit([f.header(T_OUT, FREE // SECTOR), f.out(b"\xff" * 100), f.room(1)]),
            ]
            assert f.finish(good).status == OK
            assert all(f.finish(b).status in (IOERR, UNSUPP) for b in bad)
        for i in range(300):
            assert f.read(FREE + i * 4096, 4096) == noise(4096, i)


# -- bad chains: the connection may end, and nothing else --


def one(f: Frontend, *descriptors: Descriptor) -> Result | None:
    """Submit hand-made descriptors, the first at the head. None if the connection ended."""
    queue = f.queues[0]
    for i, descriptor in enumerate(descriptors):
        queue.put(i, descriptor)
    try:
        queue.submit(0)
        return Result(0, b"", queue.wait(0, timeout_s=10))
    except GoneError:
        return None


def test_a_descriptor_that_follows_itself_ends_the_connection(disk: Disk) -> None:
    with disk.frontend() as f:
        header = f.header(T_OUT)
        assert one(f, Descriptor(header.address, 16, D_NEXT, 0)) is None


def test_a_long_loop_of_descriptors_ends_the_connection(disk: Disk) -> None:
    with disk.frontend() as f:
        header = f.header(T_OUT)
        loop = [Descriptor(header.address, 16, D_NEXT, (i + 1) % 128) for i in range(128)]
        assert one(f, *loop) is None


@pytest.mark.parametrize("following", [128, 129, 1024, 65535])
def test_a_next_descriptor_outside_the_table_ends_the_connection(disk: Disk, following: int) -> None:
    with disk.frontend() as f:
        header = f.header(T_IN)
        assert one(f, Descriptor(header.address, 16, D_NEXT, following)) is None


@pytest.mark.parametrize("head", [128, 129, 1024, 32768, 65535])
def test_a_head_outside_the_table_ends_the_connection(disk: Disk, head: int) -> None:
    with disk.frontend() as f:
        f.queues[0].submit(head)
        f.expect_gone()


@pytest.mark.parametrize("jump", [129, 1000, 32768, 65535])
def test_an_available_index_that_jumps_ends_the_connection(disk: Disk, jump: int) -> None:
    with disk.frontend() as f:
        assert_still_works(f)
        queue = f.queues[0]
        queue.next_available = (queue.next_available + jump) & 0xFFFF
        queue.publish()
        f.expect_gone()


def test_an_available_index_ahead_of_its_heads_harms_only_its_sender(disk: Disk) -> None:
    """Entries that were never filled name descriptor 0, which is whatever it is."""
    with disk.frontend() as f:
        queue = f.queues[0]
        queue.next_available += 100
        queue.publish()
        f.expect_gone()


@pytest.mark.parametrize(
    ("address", "length"),
    [
        (0, 4096),
        (GUEST - 1, 4096),
        (GUEST - 4096, 8192),
        (GUEST + 16 * MIB, 4096),
        (GUEST + 16 * MIB - 1, 4096),
        (GUEST + 16 * MIB - 512, 1024),
        (2**64 - 1, 1),
        (2**64 - 4096, 4096),
        (2**64 - 4096, 8192),
        (GUEST, 2**32 - 1),
        (GUEST, 2**31),
    ],
)
@pytest.mark.parametrize("kind", [T_IN, T_OUT])
def test_data_outside_the_memory_never_is_touched(disk: Disk, kind: int, address: int, length: int) -> None:
    with disk.frontend() as f:
        header, status = f.header(kind, FREE // SECTOR), f.room(1)
        flags = D_NEXT | (D_WRITE if kind == T_IN else 0)
        used = one(
            f,
            Descriptor(header.address, 16, D_NEXT, 1),
            Descriptor(address, length, flags, 2),
            Descriptor(status.address, 1, D_WRITE),
        )
        assert used is None or f.content(status)[0] in (IOERR, UNSUPP)


@pytest.mark.parametrize("address", [0, GUEST - 16, GUEST + 16 * MIB - 8, 2**64 - 8])
def test_a_header_outside_the_memory_is_not_read(disk: Disk, address: int) -> None:
    with disk.frontend() as f:
        status = f.room(1)
        used = one(f, Descriptor(address, 16, D_NEXT, 1), Descriptor(status.address, 1, D_WRITE))
        assert used is None or f.content(status)[0] in (IOERR, UNSUPP)


@pytest.mark.parametrize("address", [0, GUEST - 1, GUEST + 16 * MIB, 2**64 - 1])
def test_a_status_outside_the_memory_is_not_written(disk: Disk, address: int) -> None:
    with disk.frontend() as f:
        header = f.header(T_FLUSH)
        used = one(f, Descriptor(header.address, 16, D_NEXT, 1), Descriptor(address, 1, D_WRITE))
        assert used is None or used.used == 0


@pytest.mark.parametrize("which", ["header", "data", "status"])
def test_a_descriptor_of_no_bytes_harms_only_its_sender(disk: Disk, which: str) -> None:
    with disk.frontend() as f:
        header, data, status = f.header(T_IN, FREE // SECTOR), f.room(512), f.room(1)
        parts = {"header": header, "data": data, "status": status}
        parts[which] = Part(parts[which].address, 0, parts[which].writable)
        assert outcome(f, list(parts.values())) in (None, OK, IOERR, UNWRITTEN)


def test_a_readable_descriptor_behind_a_writable_one_harms_only_its_sender(disk: Disk) -> None:
    with disk.frontend() as f:
        parts = [f.header(T_OUT, FREE // SECTOR), f.room(1), f.out(bytes(512)), f.room(1)]
        assert outcome(f, parts) in (None, IOERR)


def test_the_longest_chain_that_a_ring_holds_is_answered(disk: Disk) -> None:
    with disk.frontend(queue_size=1024) as f:
        data = noise(1022, "longest")
        parts = [f.header(T_OUT, FREE // SECTOR), *f.out(data).split(*[1] * 1021), f.room(1)]
        assert len(parts) == 1024
        assert outcome(f, parts) in (None, IOERR)


def test_chains_that_share_descriptors_are_each_answered_or_end_the_connection(disk: Disk) -> None:
    with disk.frontend() as f:
        queue = f.queues[0]
        head = queue.chain([f.header(T_IN, FREE // SECTOR), f.room(512), f.room(1)])
        try:
            queue.submit(*[head] * 50)
            for _ in range(50):
                queue.wait(head)
                if queue.last_used == queue.next_available:
                    break
            assert_still_works(f)
        except GoneError:
            pass


# -- indirect tables --


@pytest.mark.parametrize("length", [0, 1, 8, 15, 17, 24, 2**32 - 1, 2**32 - 16])
def test_an_indirect_table_of_an_odd_size_ends_the_connection(disk: Disk, length: int) -> None:
    with disk.frontend() as f:
        address, _ = f.queues[0].table([f.header(T_IN, FREE // SECTOR), f.room(512), f.room(1)])
        assert one(f, Descriptor(address, length, D_INDIRECT)) is None


@pytest.mark.parametrize("address", [0, GUEST - 16, GUEST + 16 * MIB, GUEST + 16 * MIB - 16, 2**64 - 16])
def test_an_indirect_table_outside_the_memory_ends_the_connection(disk: Disk, address: int) -> None:
    with disk.frontend() as f:
        assert one(f, Descriptor(address, 48, D_INDIRECT)) is None


def test_a_table_within_a_table_is_refused(disk: Disk) -> None:
    with disk.frontend() as f:
        inner, length = f.queues[0].table([f.header(T_OUT, FREE // SECTOR), f.out(b"\xff" * 512), f.room(1)])
        f.write(FREE, bytes(512))
        outer = f.memory.allocate(16)
        f.memory.put(outer, Descriptor(inner, length, D_INDIRECT).pack())
        one(f, Descriptor(GUEST + outer, 16, D_INDIRECT))
    with disk.frontend() as f:
        assert f.read(FREE, 512) == bytes(512), "a nested table was carried out"


def test_a_loop_in_an_indirect_table_ends_the_connection(disk: Disk) -> None:
    with disk.frontend() as f:
        header = f.header(T_OUT, FREE // SECTOR)
        table = f.memory.allocate(32)
        f.memory.put(table, Descriptor(header.address, 16, D_NEXT, 1).pack())
        f.memory.put(table + 16, Descriptor(header.address, 16, D_NEXT, 0).pack())
        assert one(f, Descriptor(GUEST + table, 32, D_INDIRECT)) is None


@pytest.mark.parametrize("following", [2, 3, 4096, 65535])
def test_a_next_entry_outside_its_indirect_table_ends_the_connection(disk: Disk, following: int) -> None:
    with disk.frontend() as f:
        header = f.header(T_OUT, FREE // SECTOR)
        table = f.memory.allocate(32)
        f.memory.put(table, Descriptor(header.address, 16, D_NEXT, following).pack())
        f.memory.put(table + 16, Descriptor(f.room(1).address, 1, D_WRITE).pack())
        assert one(f, Descriptor(GUEST + table, 32, D_INDIRECT)) is None


def test_an_indirect_descriptor_with_a_follower_harms_only_its_sender(disk: Disk) -> None:
    with disk.frontend() as f:
        address, length = f.queues[0].table([f.header(T_IN, FREE // SECTOR), f.room(512), f.room(1)])
        one(f, Descriptor(address, length, D_INDIRECT | D_NEXT, 1), Descriptor(f.room(1).address, 1, D_WRITE))


def test_a_huge_indirect_table_is_answered_or_ends_the_connection(disk: Disk) -> None:
    with disk.frontend() as f:
        data = noise(5000, "huge")
        parts = [f.header(T_OUT, FREE // SECTOR), *f.out(data).split(*[1] * 4999), f.room(1)]
        assert outcome(f, parts, indirect=True) in (None, IOERR)


# -- a ring that changes under the daemon --


def test_requests_that_point_into_the_rings_themselves_harm_only_their_sender(disk: Disk) -> None:
    for at in ("descriptors", "available", "used"):
        with disk.frontend() as f:
            queue = f.queues[0]
            f.write(FREE, noise(4096, "rings"))
            target = Part(GUEST + getattr(queue, at), 4096, writable=True)
            head = queue.chain([f.header(T_IN, FREE // SECTOR), target, f.room(1)])
            try:
                queue.submit(head)
                queue.wait(head, timeout_s=0.5)
            except (GoneError, AssertionError):
                pass  # the front-end has overwritten its own rings: anything may come of that, here


def test_a_used_index_that_the_front_end_changes_harms_only_itself(disk: Disk) -> None:
    with disk.frontend() as f:
        queue = f.queues[0]
        for value in (0, 1, 1000, 65535):
            f.memory.put_u16(queue.used + 2, value)
            requests = [f.queues[0].chain([f.header(T_FLUSH), f.room(1)]) for _ in range(8)]
            try:
                queue.submit(*requests)
            except GoneError:
                break
        f.memory.put_u16(queue.used + 2, 4711)


def test_random_rings_never_kill_the_daemon(disk: Disk) -> None:
    """A fuzz test in small: the C part has a real one."""
    for seed in range(60):
        rng = random.Random(seed)
        with disk.frontend(queue_size=64) as f:
            queue = f.queues[0]
            free = range(FREE // SECTOR, SECTORS)  # what is carried out by chance must not reach the guarded data
            headers = [f.header(kind, rng.choice(free)).address for kind in (T_IN, T_OUT, T_FLUSH, T_GET_ID) * 4]
            for i in range(64):
                length = rng.choice([0, 1, 16, 512, 4096, rng.randrange(2**32)])
                flags = rng.choice([0, 1, 1, 2, 3, 4, 5, 7, rng.randrange(65536)])
                address = rng.choice(
                    [GUEST + rng.randrange(16 * MIB), rng.randrange(2**64), rng.choice(headers), rng.choice(headers)]
                )
                queue.put(i, Descriptor(address, length, flags, rng.randrange(80)))
            try:
                queue.submit(*[rng.randrange(64) for _ in range(rng.randrange(1, 64))])
                queue.wait(-1, timeout_s=0.05)
            except (GoneError, AssertionError):
                pass
