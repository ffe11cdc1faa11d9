"""Records, superblocks and the RAM tier's header: what is written is read again, and nothing else is."""

from __future__ import annotations

import dataclasses
import random

from crc32c import crc32c

from vhostcache.log import superblock, tier
from vhostcache.log.format import (
    DATA,
    DISCARD,
    FLAG_PAD,
    PAD,
    RECORD_BLOCKS,
    REQUEST_BLOCKS,
    ZERO,
    compose,
    extent,
    header_blocks_for,
    header_words,
    pad_words,
    parse_header,
    record_magic,
    split_extent,
)
from vhostcache.log.superblock import Superblock
from vhostcache.log.tier import TierEntry, TierLayout

UUID = bytes(range(16))


def a_superblock() -> Superblock:
    return Superblock(
        uuid=UUID,
        backend_identity=b"file:8:1:1234",
        backend_size_bytes=1 << 30,
        backend_mtime_ns=-5,
        ring_blocks=8192,
        epoch=3,
        open_seq=77,
        tail_address=9000,
        tail_seq=40,
        clean_address=9100,
        durable_address=9500,
        durable_seq=76,
        boot_id=bytes(range(16, 32)),
        tier_uuid=bytes(range(32, 48)),
        write_cache=superblock.WRITE_CACHE_ON,
        clean=True,
        generation=12,
    )


def test_an_extent_word_holds_block_count_and_kind() -> None:
    for block, count, kind in ((0, 1, DATA), ((1 << 40) - 1, (1 << 20) - 1, DISCARD), (5, 1025, PAD), (7, 2, ZERO)):
        assert split_extent(extent(block, count, kind)) == (block, count, kind)


def test_a_header_is_read_as_it_was_composed() -> None:
    payload = [bytes([n]) * 4096 for n in range(3)]
    extents = [extent(9, 40, ZERO), extent(10, 2), extent(3, 1)]
    words = header_words(record_magic(UUID), 2, 11, 9000, 1, 3, extents, 8)
    data, crc = compose(words, 0xABCD, payload)
    header = parse_header(data)
    assert header is not None
    assert header.magic == record_magic(UUID)
    assert (header.epoch, header.seq, header.address, header.durable_seq) == (2, 11, 9000, 8)
    assert header.extents == tuple(extents)
    assert (header.previous_crc, header.crc) == (0xABCD, crc)
    assert list(header.crcs) == [crc32c(block) for block in payload]
    assert header.blocks == 4
    assert not header.is_pad


def test_the_largest_request_takes_two_header_blocks() -> None:
    assert header_blocks_for(1, RECORD_BLOCKS) == 1
    assert header_blocks_for(376, RECORD_BLOCKS) == 1
    assert header_blocks_for(377, RECORD_BLOCKS) == 2
    assert header_blocks_for(1, RECORD_BLOCKS + 1) == 2
    assert header_blocks_for(504, REQUEST_BLOCKS) == 2
    assert header_blocks_for(505, REQUEST_BLOCKS) == 0
    words = header_words(record_magic(UUID), 1, 1, 9000, 2, 1024, [extent(0, 1024)], 0)
    data, _ = compose(words, 0, [bytes(4096)] * 1024)
    header = parse_header(data)
    assert header is not None
    assert len(header.crcs) == 1024
    assert header.blocks == 1026
    assert parse_header(data[:4096]) is None


def test_a_pad_ends_where_the_ring_ends() -> None:
    for address, blocks in ((8192 + 8000, 192), (8192 + 8191, 1)):
        data, _ = compose(pad_words(record_magic(UUID), 1, 5, address, 8192, 4), 1, [])
        header = parse_header(data)
        assert header is not None
        assert header.is_pad
        assert header.blocks == blocks
        assert (address + header.blocks) % 8192 == 0


def test_no_bit_of_a_header_can_change_unseen() -> None:
    words = header_words(record_magic(UUID), 2, 11, 9000, 1, 1, [extent(10, 1)], 8)
    data, _ = compose(words, 7, [bytes(4096)])
    rng = random.Random(1)
    for bit in [*range(80 * 8), *rng.sample(range(80 * 8, 4096 * 8), 200)]:
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        assert parse_header(damaged) is None


def test_a_header_that_contradicts_itself_is_none_even_with_a_right_checksum() -> None:
    magic = record_magic(UUID)
    for extents, payload, flags in (
        ([extent(0, 2)], 1, 0),  # more data than payload
        ([extent(0, 1, ZERO)], 1, 0),  # payload without an extent
        ([extent(0, 1, PAD)], 0, 0),  # a pad's extent in a record that is none
        ([extent(0, 1)], 1, FLAG_PAD),
        ([extent(0, 1, PAD), extent(0, 1, PAD)], 0, FLAG_PAD),
        ([extent(0, 1)], 1, 2),  # a flag that there is not
        ([3 << 62 | extent(0, 1)], 1, 0),  # a kind that there is not
    ):
        words = header_words(magic, 1, 1, 9000, 1, payload, extents, 0, flags)
        assert parse_header(compose(words, 0, [bytes(4096)] * payload)[0]) is None


def test_a_superblock_is_read_as_it_was_packed() -> None:
    block = a_superblock()
    assert len(block.pack()) == 4096
    assert superblock.unpack(block.pack()) == block
    cold = dataclasses.replace(block, clean=False, cold=True, backend_identity=b"")
    assert superblock.unpack(cold.pack()) == cold
    words = block.words()
    assert b"".join(word.to_bytes(8, "little") for word in words).ljust(4096, b"\0") == block.pack()
    assert words[-1] != 0


def test_no_bit_of_a_superblock_can_change_unseen() -> None:
    packed = a_superblock().pack()
    for bit in [*range(300 * 8), *random.Random(1).sample(range(300 * 8, 4096 * 8), 200)]:
        damaged = bytearray(packed)
        damaged[bit // 8] ^= 1 << bit % 8
        assert superblock.unpack(bytes(damaged)) is None


def test_the_superblock_of_the_larger_generation_counts() -> None:
    old = a_superblock()
    new = dataclasses.replace(old, generation=13)
    assert superblock.newest(old, new) is new
    assert superblock.newest(new, old) is new
    assert superblock.newest(None, old) is old
    assert superblock.newest(old, None) is old
    assert superblock.newest(None, None) is None


def a_tier(layout: TierLayout) -> bytearray:
    data = bytearray(layout.size_bytes)
    data[:4096] = tier.pack_header(layout, UUID, b"b" * 16, b"t" * 16, 4)
    return data


def publish(data: bytearray, layout: TierLayout, tail: int, entries: list[tuple[int, int, int]]) -> None:
    for index, entry in enumerate(entries, tail):
        offset = tier.entry_offset_bytes(layout, index)
        data[offset : offset + tier.ENTRY_BYTES] = tier.pack_entry(*entry)
    data[tier.TAIL_OFFSET_BYTES : tier.TAIL_OFFSET_BYTES + 8] = tail.to_bytes(8, "little")
    data[tier.HEAD_OFFSET_BYTES : tier.HEAD_OFFSET_BYTES + 8] = (tail + len(entries)).to_bytes(8, "little")


def test_a_tier_gives_the_entries_between_tail_and_head_over_the_end_of_their_ring() -> None:
    layout = TierLayout(10, 200)
    assert layout.slab_offset_bytes == 4096 + 8192
    assert layout.size_bytes == 4096 + 8192 + 10 * 4096
    data = a_tier(layout)
    data[layout.slab_offset_bytes + 5 * 4096 : layout.slab_offset_bytes + 6 * 4096] = b"x" * 4096
    publish(data, layout, 399, [(7, extent(1, 1), 5), (8, extent(0, 100, DISCARD), 0)])
    found = tier.parse(data)
    assert found is not None
    assert (found.uuid, found.boot_id, found.tier_uuid, found.epoch) == (UUID, b"b" * 16, b"t" * 16, 4)
    assert found.entries == (TierEntry(7, extent(1, 1), 5), TierEntry(8, extent(0, 100, DISCARD), 0))
    assert found.fault == ""
    assert found.read_slot(5) == b"x" * 4096


def test_a_new_tier_is_empty() -> None:
    found = tier.parse(a_tier(TierLayout(10, 200)))
    assert found is not None
    assert found.entries == ()
    assert found.fault == ""


def test_a_tier_that_is_damaged_short_or_something_else_is_none() -> None:
    layout = TierLayout(10, 200)
    data = a_tier(layout)
    assert tier.parse(b"") is None
    assert tier.parse(bytes(layout.size_bytes)) is None
    assert tier.parse(data[:-1]) is None
    for byte in (9, 13, 16, 50, 70, 90, 511):
        damaged = bytearray(data)
        damaged[byte] ^= 1
        assert tier.parse(damaged) is None


def test_entries_that_cannot_be_are_a_fault() -> None:
    layout = TierLayout(10, 200)
    for entry in ((7, extent(1, 1), 10), (7, extent(1, 2), 3), (0, extent(1, 1), 3), (7, extent(1, 1, PAD), 0)):
        data = a_tier(layout)
        publish(data, layout, 0, [entry])
        found = tier.parse(data)
        assert found is not None
        assert "entry 0" in found.fault
        assert found.entries == ()
    publish(data, layout, 0, [(1, extent(1, 1), 3)] * 201)
    found = tier.parse(data)
    assert found is not None
    assert "201" in found.fault
