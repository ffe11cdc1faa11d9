"""Random sectors on a disk, the same in the guest and on the host: `python3 sectors.py DEVICE SEED COUNT` writes them
in a guest, `model` says what the disk must hold then. Standard library only, and Debian 12's Python: the guest has no
more.
"""

import mmap
import os
import random
import sys
from collections.abc import Iterator

SECTOR = 512
LONGEST = 96 * SECTOR


def writes(seed: int, count: int, size: int) -> Iterator[tuple[int, bytes]]:
    """Offset and data, in order. They overlap, begin and end within blocks, and reach to the last sector."""
    generator = random.Random(seed)
    sectors = size // SECTOR
    # A small area that is written again and again, and the whole disk.
    for number in range(count):
        length = generator.randint(1, LONGEST // SECTOR)
        first = generator.randrange(0, min(sectors, 2048) if number % 2 else sectors)
        length = min(length, sectors - first)
        if number % 16 == 0:
            first = sectors - length
        yield first * SECTOR, generator.randbytes(length * SECTOR)


def model(seed: int, count: int, size: int) -> bytearray:
    disk = bytearray(size)
    for offset, data in writes(seed, count, size):
        disk[offset : offset + len(data)] = data
    return disk


def write_all(device: str, seed: int, count: int) -> None:
    """Writes around the page cache, so that each request arrives as it is; flushes now and then; reads every write
    back.
    """
    descriptor = os.open(device, os.O_RDWR | os.O_DIRECT)
    size = os.lseek(descriptor, 0, os.SEEK_END)
    expected = model(seed, count, size)
    with mmap.mmap(-1, LONGEST) as buffer:
        for number, (offset, data) in enumerate(writes(seed, count, size)):
            buffer[: len(data)] = data
            with memoryview(buffer) as view, view[: len(data)] as part:
                if os.pwrite(descriptor, part, offset) != len(data):
                    sys.exit(f"short write at {offset}")
            if number % 64 == 63:
                os.fsync(descriptor)
        for offset, data in writes(seed, count, size):
            with memoryview(buffer) as view, view[: len(data)] as part:
                if os.preadv(descriptor, [part], offset) != len(data):
                    sys.exit(f"short read at {offset}")
                if part != expected[offset : offset + len(data)]:
                    sys.exit(f"what was read at {offset} is not what was written there")
    os.fsync(descriptor)
    os.close(descriptor)
    print(f"{count} writes on {size} bytes")


if __name__ == "__main__":
    write_all(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
