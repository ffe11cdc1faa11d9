"""The engine's part in the log: records, reads that are verified, superblocks, the RAM tier and its publication."""

import errno
import mmap
import os
import random
import resource
import signal
import struct
import subprocess
import sys
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from crc32c import crc32c

from tests.frontend import IOERR, OK, T_IN, T_OUT, Part
from tests.unit.test_engine import Rig, backend_facts, volume
from vhostcache import engine as engine_module
from vhostcache import operations as op
from vhostcache.engine import Engine
from vhostcache.errors import EngineError
from vhostcache.log import format as log_format
from vhostcache.log import tier as log_tier

BLOCK = op.BLOCK_BYTES
RING_BLOCKS = 4096
RING_OFFSET = log_format.RING_OFFSET_BYTES
CACHE_BYTES = RING_OFFSET + RING_BLOCKS * BLOCK
SLOTS = 2200
LAYOUT = log_tier.TierLayout(SLOTS, 300)
UUID = bytes(range(16))
MAGIC = log_format.record_magic(UUID)
FIRST = RING_BLOCKS
"""The first log address."""


def tier_file(descriptor: int, layout: log_tier.TierLayout = LAYOUT) -> dict[str, int]:
    os.posix_fallocate(descriptor, 0, layout.size_bytes)
    os.pwrite(descriptor, log_tier.pack_header(layout, UUID, b"b" * 16, b"t" * 16, 1), 0)
    return {
        "slots": layout.slots,
        "tier_fd": descriptor,
        "tier_entries": layout.entries,
        "tier_entries_offset": layout.entries_offset_bytes,
        "tier_slab_offset": layout.slab_offset_bytes,
    }


class LogRig(Rig):
    """A rig with a cache file and a RAM tier, and its own idea of what the log holds."""

    def __init__(self, folder: Path, *, tier: int = -1, cache: int = -1, direct: bool = True, **options: Any) -> None:
        self.cache = self.buffered = cache
        if cache < 0:
            path = folder / "cache"
            path.touch()
            os.truncate(path, CACHE_BYTES)
            try:
                self.cache = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                pytest.skip("no direct I/O on the file system of the tests")
            self.buffered = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.tier = os.memfd_create("tier") if tier < 0 else tier
        changes = {
            **tier_file(self.tier),
            "cache_fd": self.cache,
            "ring_bytes": RING_BLOCKS * BLOCK,
            "align_mem_bytes": 512,
            "align_io_bytes": 512,
            "write_depth": 1,
            "request_max_bytes": 4 << 20,
        }
        super().__init__(folder, changes, **options)
        self.slots = engine_module.ffi.buffer(self.engine.slab(0), SLOTS * BLOCK)
        self.map = mmap.mmap(self.tier, 0)
        self.seq = 0
        self.head = FIRST
        self.previous_crc = 0
        self.expected: list[tuple[int, bytes]] = []

    def close(self) -> None:
        super().close()
        self.map.close()
        for descriptor in {self.cache, self.buffered, self.tier}:
            os.close(descriptor)

    def parsed(self) -> log_tier.Tier:
        result = log_tier.parse(bytes(self.map))
        assert result is not None
        return result

    def fill(self, slots: Sequence[int]) -> list[bytes]:
        """Content, different in each."""
        blocks = [random.Random(slot).randbytes(BLOCK) for slot in slots]
        for slot, block in zip(slots, blocks, strict=True):
            self.slots[slot * BLOCK : (slot + 1) * BLOCK] = block
        return blocks

    def record(
        self, group: int, headers: Sequence[int], slots: Sequence[int], extents: Sequence[int] | None = None
    ) -> list[int]:
        """The operation that writes the next record of these slots; what it leaves in the file is expected."""
        self.seq += 1
        if extents is None:
            extents = [log_format.extent(1000 + slot, 1) for slot in slots]
        words = log_format.header_words(
            MAGIC, 7, self.seq, self.head, len(headers), len(slots), extents, max(0, self.seq - 3)
        )
        payload = [bytes(self.slots[slot * BLOCK : (slot + 1) * BLOCK]) for slot in slots]
        header, self.previous_crc = log_format.compose(words, self.previous_crc, payload)
        offset = log_format.offset_bytes(self.head, RING_BLOCKS)
        self.expected.append((offset, header + b"".join(payload)))
        self.head += len(headers) + len(slots)
        named = headers[0] | (headers[1] << 32 if len(headers) > 1 else 0)
        return [op.LOG_WRITE | len(slots) << 32, group, offset, named, len(words), *words, *slots]

    def durable(self, group: int, headers: Sequence[int], slots: Sequence[int]) -> list[int]:
        """The same; it ends when it is on the medium."""
        code, name, *words = self.record(group, headers, slots, [log_format.extent(0, len(slots))])
        return [code, name | 1 << 33, *words]

    def run(self, *operations: Sequence[int], count: int | None = None) -> list[int]:
        """The results of I/O with groups 0, 1, ..."""
        self.done.clear()
        self.operations = [word for operation in operations for word in operation]
        wanted = len(operations) if count is None else count
        self.until(lambda: len(self.done) == wanted)
        return [result for _, result in sorted(self.done)]

    def on_disk(self, offset: int, size: int) -> bytes:
        return os.pread(self.buffered, size, offset)

    def flip(self, address: int, byte: int = 1234) -> None:
        offset = log_format.offset_bytes(address, RING_BLOCKS) + byte
        os.pwrite(self.buffered, bytes([os.pread(self.buffered, 1, offset)[0] ^ 16]), offset)
        os.fsync(self.buffered)

    def figures(self, name: str) -> Any:
        return self.engine.volume_statistics(0)[name]


@pytest.fixture(params=["io_uring", "threads", "buffered"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LogRig]:
    rig = LogRig(tmp_path, force_threads=request.param == "threads", direct=request.param != "buffered")
    yield rig
    rig.close()


# -- checksums --


@pytest.mark.parametrize("portable", [0, 1])
def test_the_engines_crc32c_is_everybodys(portable: int) -> None:
    lib, ffi = engine_module.lib, engine_module.ffi
    assert lib.vhc_crc32c(b"123456789", 9, portable) == 0xE3069283
    data = random.Random(1).randbytes(5000)
    for start, size in [(0, 0), (0, 1), (0, 4096), (1, 4096), (3, 17), (7, 4993), (0, 5000)]:
        assert lib.vhc_crc32c(ffi.from_buffer(data) + start, size, portable) == crc32c(data[start : start + size])


# -- records --


def test_a_record_is_what_the_format_says_byte_for_byte(rig: LogRig) -> None:
    rig.previous_crc = 0xDEADBEEF
    rig.engine.log_start(0, rig.previous_crc)
    slots = [10, 11, 12, 50, 30, 31, 20]
    rig.fill(slots)
    rig.fill([5])  # the header's slot need not be empty
    assert rig.run(rig.record(0, [5], slots)) == [0]
    ((offset, expected),) = rig.expected
    assert offset == RING_OFFSET, "the first address is the ring's beginning"
    assert rig.on_disk(offset, len(expected)) == expected
    assert bytes(rig.slots[5 * BLOCK : 6 * BLOCK]) == expected[:BLOCK]
    header = log_format.parse_header(expected)
    assert header is not None
    assert list(rig.engine.log_crcs(0)[: 1 + len(slots) + 1]) == [0, *header.crcs, 0]
    assert rig.figures("log_ops") == [0, 1, 0, 0]
    assert rig.figures("log_bytes") == [0, len(expected), 0, 0]
    assert rig.figures("backend_ops") == [0, 0, 0, 0]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 255, 256])
def test_a_record_may_have_any_number_of_blocks(rig: LogRig, count: int) -> None:
    slots = [10 + 2 * i for i in range(count)]
    rig.fill(slots)
    assert rig.run(rig.record(0, [5], slots, [log_format.extent(77, count)])) == [0]
    ((offset, expected),) = rig.expected
    assert rig.on_disk(offset, len(expected)) == expected


def test_a_large_request_has_two_header_blocks_and_more_segments_than_the_kernel_takes_at_once(rig: LogRig) -> None:
    slots = [10 + 2 * i for i in range(1024)]
    rig.fill(slots)
    assert rig.run(rig.record(0, [5, 8], slots, [log_format.extent(0, 1024)])) == [0]
    ((offset, expected),) = rig.expected
    assert len(expected) == 1026 * BLOCK
    assert rig.on_disk(offset, len(expected)) == expected
    assert rig.figures("log_ops") == [0, 2, 0, 0]
    assert rig.run([op.LOG_READ | 1024 << 32, 0, RING_OFFSET + 2 * BLOCK, *range(1100, 2124)]) == [0]
    assert bytes(rig.slots[1100 * BLOCK : 2124 * BLOCK]) == expected[2 * BLOCK :]


def test_a_record_without_payload_is_its_header(rig: LogRig) -> None:
    assert rig.run(rig.record(0, [5], [], [log_format.extent(0, 100, log_format.DISCARD)])) == [0]
    ((offset, expected),) = rig.expected
    assert len(expected) == BLOCK
    assert rig.on_disk(offset, BLOCK) == expected


def test_records_are_written_and_synced_in_one_operation_of_any_size(rig: LogRig) -> None:
    slots = [10 + 2 * i for i in range(1024)]
    rig.fill(slots)
    assert rig.run(rig.durable(0, [5], slots[:3])) == [0]
    assert rig.figures("log_ops") == [0, 1, 1, 0]
    # Others are on their way meanwhile, and one has more segments than the kernel takes at once.
    operations = [rig.durable(0, [7, 9], slots), rig.record(1, [11], slots[:5]), [op.LOG_FLUSH, 2]]
    assert rig.run(*operations, rig.durable(3, [13], slots[5:6])) == [0] * 4
    for offset, expected in rig.expected:
        assert rig.on_disk(offset, len(expected)) == expected
    assert rig.figures("log_errors") == 0


def test_an_engine_that_ends_waits_for_what_is_being_synced(rig: LogRig) -> None:
    rig.fill(range(10, 500))
    operations = [rig.durable(0, [5], range(10, 250)), [op.LOG_FLUSH, 1], rig.durable(2, [6], range(250, 500))]
    rig.operations = [word for operation in operations for word in operation]
    rig.turn(0)
    rig.engine.close()
    for offset, expected in rig.expected:
        assert rig.on_disk(offset, len(expected)) == expected


def test_a_record_may_end_where_the_ring_ends_and_the_next_begins_where_it_begins(rig: LogRig) -> None:
    rig.fill(range(10, 14))
    rig.head = FIRST + RING_BLOCKS - 3
    assert rig.run(rig.record(0, [5], [10, 11]), rig.record(1, [6], [12, 13])) == [0, 0]
    assert [offset for offset, _ in rig.expected] == [CACHE_BYTES - 3 * BLOCK, RING_OFFSET]
    for offset, expected in rig.expected:
        assert rig.on_disk(offset, len(expected)) == expected


def test_many_records_are_in_flight_at_once_and_each_names_the_one_before(rig: LogRig) -> None:
    count = 40
    rig.fill(range(100, 100 + 5 * count))
    records = [rig.record(i, [10 + i], range(100 + 5 * i, 105 + 5 * i)) for i in range(count)]
    assert rig.run(*records) == [0] * count, "the backend's write depth of 1 is not theirs"
    previous = 0
    for offset, expected in rig.expected:
        assert rig.on_disk(offset, len(expected)) == expected
        header = log_format.parse_header(expected)
        assert header is not None
        assert header.previous_crc == previous
        previous = header.crc


def test_a_repeated_write_computes_nothing_anew(rig: LogRig) -> None:
    rig.fill([10, 11])
    first = rig.record(0, [5], [10, 11])
    assert rig.run(first, rig.record(1, [6], [10])) == [0, 0]
    offset, expected = rig.expected[0]
    os.pwrite(rig.buffered, bytes(3 * BLOCK), offset)
    os.fsync(rig.buffered)
    rig.slots[10 * BLOCK : 11 * BLOCK] = b"!" * BLOCK
    assert rig.run([op.LOG_WRITE | 2 << 32, 0 | 1 << 32, offset, 5, 0, 10, 11]) == [0]
    assert rig.on_disk(offset, 3 * BLOCK) == expected[:BLOCK] + b"!" * BLOCK + expected[2 * BLOCK :]
    assert rig.engine.log_crcs(0)[1] == crc32c(expected[BLOCK : 2 * BLOCK])
    assert rig.run(rig.record(0, [7], [11])) == [0]
    offset, expected = rig.expected[2]
    assert rig.on_disk(offset, len(expected)) == expected, "the chain goes on from the newest record"


def test_a_superblock_is_its_words_and_zeroes_and_a_flush_has_a_group(rig: LogRig) -> None:
    os.pwrite(rig.buffered, b"\xff" * 3 * BLOCK, 0)
    os.fsync(rig.buffered)
    words = [random.Random(3).getrandbits(64) for _ in range(30)]
    full = list(range(512))
    results = rig.run([op.SUPERBLOCK | 30 << 32, 0, 0, *words], [op.SUPERBLOCK | 512 << 32, 1, BLOCK, *full])
    assert results == [0, 0]
    assert rig.run([op.LOG_FLUSH, 0]) == [0]
    assert rig.on_disk(0, BLOCK) == array("Q", words).tobytes().ljust(BLOCK, b"\0")
    assert rig.on_disk(BLOCK, BLOCK) == array("Q", full).tobytes()
    assert rig.on_disk(2 * BLOCK, BLOCK) == b"\xff" * BLOCK
    assert rig.figures("log_ops") == [0, 0, 1, 2]


# -- what the world says --


def test_a_cache_file_that_cannot_be_written_is_the_groups_result(tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"")
    rig = LogRig(tmp_path, cache=os.open(tmp_path / "cache", os.O_RDONLY))
    rig.fill([10])
    assert rig.run(rig.record(0, [5], [10]), [op.SUPERBLOCK | 1 << 32, 1, 0, 1]) == [-errno.EBADF] * 2
    assert rig.figures("log_errors") == 2
    assert rig.figures("backend_errors") == 0
    rig.close()


@pytest.mark.parametrize("threads", [False, True])
def test_a_full_device_is_the_groups_result(tmp_path: Path, threads: bool) -> None:
    rig = LogRig(tmp_path, cache=os.open("/dev/full", os.O_RDWR), force_threads=threads)
    rig.fill([10])
    assert rig.run(rig.record(0, [5], [10]), [op.LOG_FLUSH, 1]) == [-errno.ENOSPC, -errno.EINVAL]
    assert rig.run(rig.durable(0, [5], [10])) == [-errno.ENOSPC]
    rig.close()


def test_a_write_beyond_the_limit_of_the_files_size_is_an_error_and_no_signal(rig: LogRig) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    rig.fill([10])
    os.truncate(rig.buffered, RING_OFFSET)
    resource.setrlimit(resource.RLIMIT_FSIZE, (RING_OFFSET, before[1]))
    try:
        assert rig.run(rig.record(0, [5], [10])) == [-errno.EFBIG]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_record_that_could_be_written_only_in_part_is_an_error(rig: LogRig) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    rig.fill(range(10, 20))
    os.truncate(rig.buffered, RING_OFFSET)
    resource.setrlimit(resource.RLIMIT_FSIZE, (RING_OFFSET + 3 * BLOCK, before[1]))
    try:
        assert rig.run(rig.record(0, [5], range(10, 20))) == [-errno.EFBIG]
        rig.head = FIRST
        assert rig.run(rig.durable(0, [5], range(10, 20))) == [-errno.EFBIG]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_cache_file_that_shrank_is_no_data(rig: LogRig) -> None:
    os.truncate(rig.buffered, RING_OFFSET)
    assert rig.run([op.LOG_READ | 2 << 32, 0, RING_OFFSET, 10, 11]) == [-errno.ENODATA]


# -- reads --


def read_blocks(group: int, address: int, slots: Sequence[int]) -> list[int]:
    return [op.LOG_READ | len(slots) << 32, group, log_format.offset_bytes(address, RING_BLOCKS), *slots]


def test_blocks_of_the_log_are_read_into_any_slots(rig: LogRig) -> None:
    blocks = rig.fill(range(10, 40))
    assert rig.run(rig.record(0, [5], range(10, 40))) == [0]
    targets = [200, 100, 101, 102, 7, *range(300, 325)]
    assert rig.run(read_blocks(0, FIRST + 1, targets)) == [0]
    for slot, block in zip(targets, blocks, strict=True):
        assert bytes(rig.slots[slot * BLOCK : (slot + 1) * BLOCK]) == block


def test_a_flipped_bit_is_found_after_a_second_look_and_its_neighbours_are_read(rig: LogRig) -> None:
    rig.fill(range(10, 18))
    assert rig.run(rig.record(0, [5], range(10, 18))) == [0]
    rig.flip(FIRST + 4)
    results = rig.run(
        read_blocks(0, FIRST + 1, range(100, 108)),
        read_blocks(1, FIRST + 1, range(110, 113)),
        read_blocks(2, FIRST + 4, [120]),
        read_blocks(3, FIRST + 5, range(130, 134)),
    )
    assert results == [-errno.EBADMSG, 0, -errno.EBADMSG, 0]
    assert rig.figures("log_crc_errors") == 2
    assert rig.figures("log_errors") == 2
    assert rig.figures("log_ops")[0] == 6, "those that were wrong were read twice"


def test_what_recovery_put_into_the_crc_table_decides(rig: LogRig) -> None:
    (block,) = rig.fill([10])
    os.pwrite(rig.buffered, block, RING_OFFSET + 9 * BLOCK)
    os.fsync(rig.buffered)
    assert rig.run(read_blocks(0, FIRST + 9, [20])) == [-errno.EBADMSG]
    rig.engine.log_crcs(0)[9] = crc32c(block)
    assert rig.run(read_blocks(0, FIRST + 9, [20])) == [0]


def direct(
    tag: int, address: int, blocks: int, *, group: int = 0, payload_offset: int = 0, alone: bool = False
) -> list[int]:
    offset = log_format.offset_bytes(address, RING_BLOCKS)
    return [op.LOG_READ_DIRECT | tag << 8 | alone << 32, group | payload_offset << 32, offset, blocks * BLOCK]


class Reading:
    """A guest's read of blocks of the log, which the core answers with LOG_READ_DIRECT."""

    def __init__(self, rig: LogRig, *rooms: tuple[int, int], alias: bool = False, sector: int = 0) -> None:
        """`rooms`: length and alignment of the segments of guest memory; with `alias`, all are the first one."""
        self.rig = rig
        self.frontend = rig.frontend()
        f = self.frontend
        parts = [f.room(length, align) for length, align in rooms]
        if alias:
            parts = [parts[0]] * len(parts)
        rig.answering = False
        self.request = f.submit([f.header(T_IN, sector), *parts, f.room(1)])
        rig.until(lambda: rig.requests)
        ((self.what, self.tag, _),) = rig.requests
        rig.requests.clear()

    def answer(self, status: int = OK) -> tuple[int, bytes]:
        self.rig.operations = [op.COMPLETE | self.tag << 8 | status << 32]
        return self.answered()

    def answered(self) -> tuple[int, bytes]:
        result = self.rig.during(lambda: self.frontend.finish(self.request))
        self.frontend.close()
        return result.status, result.data


@pytest.mark.parametrize(
    ("rooms", "aligned"),
    [
        ([(8 * BLOCK, BLOCK)], True),
        ([(BLOCK, BLOCK)] * 8, True),
        ([(8 * BLOCK, 512)], True),
        ([(512, 512), (7 * BLOCK, BLOCK), (BLOCK - 512, BLOCK)], True),
        ([(100, 1), (8 * BLOCK - 100, 1)], False),
    ],
)
def test_the_log_is_read_into_guest_memory_of_any_shape(
    rig: LogRig, rooms: list[tuple[int, int]], aligned: bool
) -> None:
    blocks = rig.fill(range(10, 18))
    assert rig.run(rig.record(0, [5], range(10, 18))) == [0]
    reading = Reading(rig, *rooms)
    assert bool(reading.what & op.REQUEST_ALIGNED) == aligned
    # The second half of the payload comes first in the log, and the first one last.
    results = rig.run(
        direct(reading.tag, FIRST + 1, 4, group=0, payload_offset=4 * BLOCK), direct(reading.tag, FIRST + 5, 4, group=1)
    )
    assert results == [0, 0]
    assert reading.answer() == (OK, b"".join(blocks[4:] + blocks[:4]))


def test_a_direct_read_of_the_whole_request_answers_it(rig: LogRig) -> None:
    (block,) = rig.fill([10])
    assert rig.run(rig.record(0, [5], [10])) == [0]
    reading = Reading(rig, (BLOCK, BLOCK))
    rig.operations = direct(reading.tag, FIRST + 1, 1, alone=True)
    rig.done.clear()
    assert reading.answered() == (OK, block)
    assert rig.done == []


def test_guest_memory_that_changed_since_it_was_read_is_read_again_and_right(rig: LogRig) -> None:
    """Both blocks go into one page of guest memory, so the first is never there when it is looked at."""
    blocks = rig.fill([10, 11])
    assert rig.run(rig.record(0, [5], [10, 11])) == [0]
    reading = Reading(rig, (BLOCK, BLOCK), (BLOCK, BLOCK), alias=True)
    assert rig.run(direct(reading.tag, FIRST + 1, 2)) == [0]
    assert reading.answer() == (OK, blocks[1] * 2)
    assert rig.figures("log_ops")[0] == 2
    assert rig.figures("log_crc_errors") == 0


@pytest.mark.parametrize("align", [1, BLOCK])
def test_a_flipped_bit_never_reaches_the_guest_as_data(rig: LogRig, align: int) -> None:
    rig.fill(range(10, 14))
    assert rig.run(rig.record(0, [5], range(10, 14))) == [0]
    rig.flip(FIRST + 3)
    reading = Reading(rig, (4 * BLOCK, align))
    assert rig.run(direct(reading.tag, FIRST + 1, 4)) == [-errno.EBADMSG]
    assert reading.answer(IOERR)[0] == IOERR
    assert rig.figures("log_crc_errors") == 1
    reading = Reading(rig, (BLOCK, align))
    assert rig.run(direct(reading.tag, FIRST + 3, 1, alone=True), count=1) == [-errno.EBADMSG]
    assert rig.done[0][0] == op.FAILED_TAG | reading.tag
    assert reading.answer(IOERR)[0] == IOERR


# -- the RAM tier --


def test_what_is_published_is_found_by_whoever_reads_the_file(rig: LogRig) -> None:
    assert (rig.parsed().head, rig.parsed().entries) == (0, ())
    discard = log_format.extent(500, 700, log_format.DISCARD)
    rig.operations = [
        *(op.PUBLISH | 2 << 32, 5, log_format.extent(9, 1), 20, log_format.extent(10, 1), 21),
        *(op.PUBLISH | 1 << 32, 6, discard, 0),
    ]
    rig.fill([20])
    rig.turn(0)
    found = rig.parsed()
    assert (found.tail, found.head, found.fault) == (0, 3, "")
    assert found.entries == ((5, log_format.extent(9, 1), 20), (5, log_format.extent(10, 1), 21), (6, discard, 0))
    assert found.read_slot(3) == bytes(BLOCK)


def test_the_ring_of_entries_goes_round_as_its_tail_moves(rig: LogRig) -> None:
    for i in range(1000):
        if i >= LAYOUT.entries:
            rig.operations += [op.RETIRE, i - LAYOUT.entries + 1]
        rig.operations += [op.PUBLISH | 1 << 32, i + 1, log_format.extent(i, 1), 3 + i % 50]
    rig.turn(0)
    found = rig.parsed()
    assert (found.tail, found.head, found.fault) == (1000 - LAYOUT.entries, 1000, "")
    assert [entry.seq for entry in found.entries] == [*range(1001 - LAYOUT.entries, 1001)]
    rig.operations = [op.RETIRE, 1000]
    rig.turn(0)
    assert rig.parsed().entries == ()


def test_one_block_is_copied_published_and_answered_in_one_operation(rig: LogRig) -> None:
    with rig.frontend() as f:
        rig.answering = False
        request = f.start_write(40 * BLOCK, b"z" * BLOCK)
        rig.until(lambda: rig.requests)
        ((_, tag, _),) = rig.requests
        rig.operations = [op.LOG_SEQ, 12, op.LOG1 | tag << 8 | 33 << 32]
        assert rig.during(lambda: f.finish(request)).status == OK
    found = rig.parsed()
    assert found.entries == ((12, log_format.extent(40, 1), 33),)
    assert found.read_slot(33) == b"z" * BLOCK


def test_a_ram_tier_file_that_is_too_small_is_refused() -> None:
    tier = os.memfd_create("tier")
    changes = tier_file(tier)
    with Engine() as engine:
        backend = engine.file_backend(backend_facts(-1))
        os.truncate(tier, LAYOUT.size_bytes - BLOCK)
        with pytest.raises(EngineError, match="RAM-tier"):
            engine.add_volume(**volume(backend=backend, **changes))
        os.pwrite(tier, struct.pack("<Q", LAYOUT.entries + 1), log_tier.HEAD_OFFSET_BYTES)
        os.truncate(tier, LAYOUT.size_bytes)
        with pytest.raises(EngineError, match="RAM-tier"):
            engine.add_volume(**volume(backend=backend, **changes))
    os.close(tier)


def write_until_killed(folder: str, threads: str) -> None:
    """In a process of its own: one block after the other, each in a slot of its own; what was answered is said."""
    tier = os.open(Path(folder) / "tier", os.O_RDWR)
    rig = LogRig(Path(folder), tier=tier, force_threads=bool(int(threads)))
    rig.answering = False
    with rig.frontend() as f:
        for i in range(LAYOUT.entries):
            request = f.start_write(i * BLOCK, bytes([i % 251]) * BLOCK)
            rig.until(lambda: rig.requests)
            ((_, tag, _),) = rig.requests
            rig.requests.clear()
            rig.operations = [op.LOG_SEQ, 1 + i // 10, op.LOG1 | tag << 8 | (3 + i) << 32]
            rig.turn(0)
            f.queues[0].collect()
            assert request.head in f.queues[0].completed
            print(i, flush=True)
    signal.pause()


@pytest.mark.parametrize("threads", [0, 1])
@pytest.mark.parametrize("answers", [1, 17, 120])
def test_an_answered_write_outlives_a_killed_process(tmp_path: Path, threads: int, answers: int) -> None:
    (tmp_path / "tier").touch()
    program = f"from {__name__} import write_until_killed as run; run({str(tmp_path)!r}, {str(threads)!r})"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        said = [int(child.stdout.readline()) for _ in range(answers)]
        child.kill()
        said += [int(line) for line in child.stdout.read().split()]
        assert child.wait() == -signal.SIGKILL
    found = log_tier.parse((tmp_path / "tier").read_bytes())
    assert found is not None
    assert found.fault == ""
    assert found.tail == 0
    assert found.head in (len(said), len(said) + 1), "at most one more was published than was said to be"
    for i, entry in enumerate(found.entries):
        assert entry == (1 + i // 10, log_format.extent(i, 1), 3 + i)
        assert found.read_slot(entry.slot) == bytes([i % 251]) * BLOCK


# -- the size of requests --


def refused(rig: LogRig, kind: int, size: int) -> bool:
    with rig.frontend(memory=48 << 20) as f:
        pieces: list[Part] = []
        while size:
            part = min(size, 1 << 20)
            pieces.append(f.out(bytes(part)) if kind == T_OUT else f.room(part))
            size -= part
        return bool(rig.during(lambda: f.request(kind, 0, *pieces)).status == IOERR)


@pytest.mark.parametrize("kind", [T_IN, T_OUT])
def test_a_request_beyond_the_limit_is_refused(rig: LogRig, kind: int) -> None:
    assert not refused(rig, kind, 4 << 20)
    assert refused(rig, kind, (4 << 20) + 512)
    assert rig.figures("bad_requests") == 1


@pytest.mark.parametrize("limit", [0, 4096, 5000, 512 << 10, 1 << 20, 4 << 20, 64 << 20])
def test_what_a_guest_is_invited_to_send_is_within_the_limit(tmp_path: Path, limit: int) -> None:
    rig = Rig(tmp_path, {"request_max_bytes": limit})
    with rig.frontend() as f:
        size_max, seg_max = struct.unpack("<II", rig.during(lambda: f.config(16))[8:])
    rig.close()
    assert size_max * seg_max <= (limit or 16 << 20)
    assert size_max >= BLOCK
    assert size_max % BLOCK == 0
    assert seg_max >= 1
    if limit in (0, 64 << 20):
        assert (size_max, seg_max) == (128 << 10, 126), "as without a limit"
