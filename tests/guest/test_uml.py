"""user-mode-linux on our disks: file systems, verified data, discards, odd sizes; judged on the host after the daemon
has ended.
"""

import contextlib
import filecmp
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.guest import host, sectors, uml
from tests.guest.daemon import Daemon, create_image

MIB = 1 << 20
# What a daemon may use beside its `ram`.
OVERHEAD_MIB = 100
SOAK = int(os.environ.get("SOAK_SECONDS", "0"))
# Writes and verifies.
FIO = (
    f"fio --directory={uml.DISK} --name=t --size=24m --numjobs=2 --rw=randrw --bsrange=4k-64k --ioengine=libaio"
    " --iodepth=16 --direct=1 --fsync=24"
    " --verify=crc32c --verify_fatal=1 --minimal --output=/dev/null"
)
# The same for as long as `make soak` says; small in `make test`.
LONG_FIO = f"{FIO} --time_based --runtime={SOAK}" if SOAK else FIO
TIMEOUT_S = 120 + 2 * SOAK
SECTORS_SCRIPT = Path(sectors.__file__)


@pytest.mark.parametrize("mode", ["writeback", "none", "writethrough", "directsync", "unsafe"])
def test_ext4_survives_verified_writes_and_a_clean_check_in_every_mode(tmp_path: Path, mode: str) -> None:
    image, socket = tmp_path / "disk.img", tmp_path / "vda.sock"
    create_image(image, "512MiB")
    with Daemon.export(image, socket, "--mode", mode):
        output = uml.run(
            f"""
            mkfs.ext4 -q /dev/vda
            mount /dev/vda {uml.DISK}
            {LONG_FIO if mode == "none" else FIO}
            sync
            umount {uml.DISK}
            e2fsck -fn /dev/vda
            mount /dev/vda {uml.DISK}
            cd {uml.DISK}
            echo "@@ sums"
            find . -type f -exec sha256sum {{}} +
            echo "@@ end"
            cd /
            umount {uml.DISK}
            echo "@@ cache $(cat /sys/block/vda/queue/write_cache)"
            """,
            [socket],
            tmp_path / "uml",
            timeout_s=TIMEOUT_S,
        )
    expected_cache = "write through" if mode in ("writethrough", "directsync") else "write back"
    assert f"@@ cache {expected_cache}\n" in output
    host.check_ext4(image)
    host.compare_sums(_sums(output), host.ext4_sums(image, tmp_path / "files"))


def test_xfs_survives_verified_writes_and_reads_the_same_without_us(tmp_path: Path) -> None:
    image, socket = tmp_path / "disk.img", tmp_path / "vda.sock"
    create_image(image, "512MiB")
    sums = "cd {folder}; echo '@@ sums'; find . -type f -exec sha256sum {{}} +; echo '@@ end'; cd /; umount {folder}"
    with Daemon.export(image, socket):
        output = uml.run(
            f"mkfs.xfs -q /dev/vda; mount /dev/vda {uml.DISK}; {LONG_FIO}; umount {uml.DISK};"
            f" xfs_repair -n /dev/vda; mount /dev/vda {uml.DISK}; " + sums.format(folder=uml.DISK),
            [socket],
            tmp_path / "uml",
            timeout_s=TIMEOUT_S,
        )
    host.check_xfs(image)
    # No tool reads files out of an xfs image without mounting it, so a kernel does, through its own block driver and
    # without the daemon.
    without = uml.run(
        f"mount -t xfs -o ro,norecovery /dev/ubda {uml.PLAIN}; " + sums.format(folder=uml.PLAIN),
        [],
        tmp_path / "plain",
        images=[image],
    )
    host.compare_sums(_sums(output), _sums(without))


def test_writes_that_exceed_the_ram_tier_many_times_go_on(tmp_path: Path) -> None:
    image, socket = tmp_path / "disk.img", tmp_path / "vda.sock"
    create_image(image, "256MiB")
    with Daemon.export(image, socket, "--ram", "16MiB", "--object-size", "1MiB") as daemon:
        uml.run(
            "fio --name=t --filename=/dev/vda --size=192m --rw=randwrite --bs=16k --direct=1"
            " --ioengine=libaio --iodepth=32"
            " --verify=crc32c --verify_fatal=1 --minimal --output=/dev/null",
            [socket],
            tmp_path / "uml",
        )
        assert daemon.anonymous_bytes() <= (16 + OVERHEAD_MIB) * MIB
        statistics = daemon.stop()["vda"]
    assert statistics["errors"] == 0
    # It was what it claims to be: many times more was dirty, in turn, than fits. Whether a write has to wait depends
    # on the disk's speed; what happens to those that do is shown in tests/core.
    assert statistics["blocks_destaged"] > 4 * statistics["ram_blocks"]
    assert statistics["bytes"]["write"] == 192 * MIB
    assert host.allocated_bytes(image) >= 192 * MIB


@pytest.mark.parametrize("extra", [512, 3584, 4096 - 512 + 65536])
def test_a_disk_that_is_no_multiple_of_4_kib_keeps_every_sector(tmp_path: Path, extra: int) -> None:
    image, socket = tmp_path / "disk.img", tmp_path / "vda.sock"
    size = 24 * MIB + extra
    create_image(image, str(size))
    seed, count = 20240 + extra, 1500
    with Daemon.export(image, socket):
        uml.run(f"python3 -B {SECTORS_SCRIPT} /dev/vda {seed} {count}", [socket], tmp_path / "uml")
    assert image.stat().st_size == size
    (tmp_path / "expected").write_bytes(sectors.model(seed, count, size))
    assert filecmp.cmp(image, tmp_path / "expected", shallow=False)


def test_two_disks_of_one_daemon_do_not_mix(tmp_path: Path) -> None:
    volumes = []
    for name in ("vda", "vdb"):
        create_image(tmp_path / f"{name}.img", "32MiB")
        volumes.append(
            {
                "name": name,
                "socket": str(tmp_path / f"{name}.sock"),
                "backend": {"type": "file", "path": str(tmp_path / f"{name}.img")},
            }
        )
    config = tmp_path / "vhostcache.yaml"
    config.write_text(yaml.safe_dump({"volumes": volumes}))
    with Daemon.serve(config):
        uml.run(
            f"python3 -B {SECTORS_SCRIPT} /dev/vda 1 1000 & first=$!;"
            f" python3 -B {SECTORS_SCRIPT} /dev/vdb 2 1000; wait $first",
            [tmp_path / "vda.sock", tmp_path / "vdb.sock"],
            tmp_path / "uml",
        )
    for seed, name in ((1, "vda"), (2, "vdb")):
        (tmp_path / "expected").write_bytes(sectors.model(seed, 1000, 32 * MIB))
        assert filecmp.cmp(tmp_path / f"{name}.img", tmp_path / "expected", shallow=False)


@pytest.mark.parametrize(
    ("what", "command"),
    [
        ("discard", "blkdiscard -o 8388608 -l 25165824 /dev/vda"),
        ("write zeroes that may unmap", "fallocate -p -o 8388608 -l 25165824 /dev/vda"),
        ("write zeroes that stay allocated", "blkdiscard -z -o 8388608 -l 25165824 /dev/vda"),
    ],
    ids=["discard", "zero_unmap", "zero"],
)
def test_what_the_guest_discards_or_zeroes_reads_as_zeroes_and_is_a_hole(
    tmp_path: Path, what: str, command: str
) -> None:
    """In a range of whole objects and in one that begins and ends within blocks; the data around them stays."""
    image, socket = tmp_path / "disk.img", tmp_path / "vda.sock"
    create_image(image, "64MiB")
    fill = "yes 'the quick brown fox' | head -c 67108864 > /dev/vda; sync"
    small = command.replace("8388608", "1049088").replace("25165824", "10240")
    zeroes = "cmp -n 25165824 -i 8388608:0 /dev/vda /dev/zero; cmp -n 10240 -i 1049088:0 /dev/vda /dev/zero"
    with Daemon.export(image, socket):
        uml.run(f"{fill}; {command}; {small}; sync; {zeroes}", [socket], tmp_path / "uml")
    line = b"the quick brown fox\n"
    expected = bytearray((line * (64 * MIB // len(line) + 1))[: 64 * MIB])
    expected[8 * MIB : 32 * MIB] = bytes(24 * MIB)
    expected[1049088 : 1049088 + 10240] = bytes(10240)
    assert image.read_bytes() == expected
    assert host.holes(image, 32 * MIB, 64 * MIB) == 0
    if "stay allocated" in what:
        assert host.allocated_bytes(image) >= 64 * MIB
    else:
        assert host.holes(image, 8 * MIB, 32 * MIB) == 24 * MIB
        assert host.allocated_bytes(image) <= 40 * MIB + MIB


def test_fstrim_gives_the_room_of_deleted_files_back(tmp_path: Path) -> None:
    image, socket = tmp_path / "disk.img", tmp_path / "vda.sock"
    create_image(image, "512MiB")
    with Daemon.export(image, socket) as daemon:
        files = f"yes | head -c 128M > {uml.DISK}/large; yes | head -c 1M > {uml.DISK}/small; sync"
        fill = f"mkfs.ext4 -q /dev/vda; mount /dev/vda {uml.DISK}; {files}"
        uml.run(f"{fill}; umount {uml.DISK}", [socket], tmp_path / "fill")
        daemon.stop()
        full = host.allocated_bytes(image)
        assert full >= 128 * MIB
        daemon.start()
        uml.run(
            f"mount /dev/vda {uml.DISK}; rm {uml.DISK}/large; sync; fstrim -v {uml.DISK}; umount {uml.DISK}",
            [socket],
            tmp_path / "trim",
        )
    assert host.allocated_bytes(image) <= full - 120 * MIB
    host.check_ext4(image)
    assert list(host.ext4_sums(image, tmp_path / "files")) == ["small"]


def _sums(output: str) -> dict[str, str]:
    return host.parse_sums(output.partition("@@ sums\n")[2].partition("@@ end\n")[0])


def test_it_ends_when_whoever_waits_for_it_is_killed(tmp_path: Path) -> None:
    """A bench that is interrupted must not leave a kernel running."""
    waits = f"from tests.guest import uml; uml.run('sleep 100', [], __import__('pathlib').Path({str(tmp_path)!r}))"

    def running() -> bool:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it has just ended
                words = path.read_bytes().split(b"\0")
                if words[0].endswith(b"linux.uml") and f"init={tmp_path}/init".encode() in words:
                    return True
        return False

    def wait_until(wanted: bool) -> None:
        deadline = time.monotonic() + 60
        while running() is not wanted:
            assert time.monotonic() < deadline
            time.sleep(0.1)

    with subprocess.Popen([sys.executable, "-c", waits]) as waiting:
        wait_until(True)
        waiting.kill()
        waiting.wait()
        wait_until(False)
