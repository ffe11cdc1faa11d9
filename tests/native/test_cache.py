"""A disk with a cache file, on the real daemon: what a kill leaves, what power loss leaves, and who is refused."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.frontend import T_FLUSH, GoneError, RefusedError
from tests.guest import VHOSTCACHE, GuestError
from tests.native.conftest import DISK_BYTES, FREE, MIB, Disk, NativeDaemon, bench, noise
from vhostcache.backend import mark
from vhostcache.backend.mark import Mark

WCE_OFFSET = 32  # struct virtio_blk_config
TIMEOUT_S = 60
BOOT = "VHOSTCACHE_BOOT_ID"


class CachedDisk(Disk):
    """A disk whose daemon has a cache file and a RAM-tier folder of its own."""

    def __init__(self, folder: Path, ram_dir: Path, *options: str, name: str = "vda") -> None:
        self.ram_dir = ram_dir
        image, socket, cache = (folder / f"{name}.{kind}" for kind in ("img", "sock", "cache"))
        # Nothing is written to the image just because time goes by, if a test does not want it.
        common = ("--ram", "32MiB", "--cache-size", "64MiB", "--ram-dir", str(ram_dir), "--cache", str(cache))
        super().__init__(image, socket, NativeDaemon.export(image, socket, *common, "--destage", "off", *options))
        self.cache: Path = cache
        self.make_image()

    def use(self, *options: str) -> None:
        """Other options from the next start on."""
        self.daemon.arguments += options

    def command(self, *options: str) -> "subprocess.CompletedProcess[str]":
        command = [VHOSTCACHE, *self.daemon.arguments, *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL)

    def refused(self, *options: str, status: int = 1) -> str:
        """The one line with which a start ends."""
        before = self.image.read_bytes()
        done = self.command(*options)
        assert done.returncode == status, done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("vhostcache: ")]
        assert len(lines) == 1, done.stderr
        assert self.image.read_bytes() == before, "a refusal touches nothing"
        return lines[0]

    def lose_power(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """After a kill: the tmpfs is gone, and the machine has another boot id."""
        shutil.rmtree(self.ram_dir)
        monkeypatch.setenv(BOOT, str(uuid.uuid4()))

    def mark(self) -> Mark | None:
        try:
            return Mark.parse(os.getxattr(self.image, mark.NAME).decode())
        except OSError:
            return None

    def tier_files(self) -> list[str]:
        return os.listdir(self.ram_dir)


@pytest.fixture
def ram_dir() -> Iterator[Path]:
    path = Path(f"/dev/shm/vhostcache-test-{uuid.uuid4().hex}")
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def disk(tmp_path: Path, ram_dir: Path) -> Iterator[CachedDisk]:
    try:
        os.setxattr(tmp_path, mark.NAME, b"x")
    except OSError:
        pytest.skip("no extended attributes here")
    disk = CachedDisk(tmp_path, ram_dir)
    yield disk
    disk.daemon.reap()


def write_pieces(disk: CachedDisk, seed: str, count: int = 40, flush: bool = False) -> None:
    with disk.frontend() as f:
        for i in range(count):
            f.write(FREE + i * 12288, noise(4096 + 512 * (i % 9), (seed, i)))
        if flush:
            f.flush()


def has_pieces(disk: CachedDisk, seed: str, count: int = 40) -> bool:
    with disk.frontend() as f:
        return all(
            f.read(FREE + i * 12288, 4096 + 512 * (i % 9)) == noise(4096 + 512 * (i % 9), (seed, i))
            for i in range(count)
        )


def recovered(disk: CachedDisk) -> dict[str, Any]:
    (event,) = disk.daemon.events("recovered")
    return event


# What is kept.


def test_acknowledged_writes_survive_a_kill_without_any_flush(disk: CachedDisk) -> None:
    for round_ in range(4):
        disk.daemon.start()
        if round_:
            assert has_pieces(disk, f"round {round_ - 1}")
        write_pieces(disk, f"round {round_}")
        disk.daemon.kill()
    disk.daemon.start()
    assert has_pieces(disk, "round 3")
    assert recovered(disk)["ram_tier_records"] >= 1
    assert len(disk.tier_files()) == 1, "the old ones are gone"
    disk.assert_good()


def test_discards_and_zeroes_survive_a_kill_too(disk: CachedDisk) -> None:
    disk.daemon.start()
    data = noise(65536, "zeroes")
    with disk.frontend() as f:
        f.write(FREE, data)
        f.flush()
        f.discard(FREE + 4096, 8192)
        f.write_zeroes(FREE + 32768 + 512, 4096)
        f.write(FREE + 8192, b"n" * 4096)
    disk.daemon.kill()
    expected = bytearray(data)
    expected[4096:12288] = bytes(8192)
    expected[33280:37376] = bytes(4096)
    expected[8192:12288] = b"n" * 4096
    disk.daemon.start()
    with disk.frontend() as f:
        assert f.read(FREE, len(data)) == bytes(expected)


def test_flushed_writes_survive_power_loss_and_what_comes_back_is_a_prefix(
    disk: CachedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.daemon.start()
    write_pieces(disk, "flushed", flush=True)
    with disk.frontend() as f:
        for i in range(30):
            f.write(FREE + 8 * MIB + i * 4096, noise(4096, ("later", i)))
    disk.daemon.kill()
    disk.lose_power(monkeypatch)
    disk.daemon.start()
    assert has_pieces(disk, "flushed")
    assert recovered(disk)["ram_tier_records"] == 0
    with disk.frontend() as f:
        there = [f.read(FREE + 8 * MIB + i * 4096, 4096) == noise(4096, ("later", i)) for i in range(30)]
    assert there == sorted(there, reverse=True), "no write without those before it"
    disk.assert_good()


def test_in_write_through_every_acknowledged_write_survives_power_loss(
    disk: CachedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.use("--mode", "writethrough")
    disk.daemon.start()
    write_pieces(disk, "through")
    disk.daemon.kill()
    disk.lose_power(monkeypatch)
    disk.daemon.start()
    assert has_pieces(disk, "through")


def test_after_sync_interval_a_write_survives_power_loss_without_a_flush(
    disk: CachedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.use("--sync-interval", "10ms")
    disk.daemon.start()
    write_pieces(disk, "synced")
    time.sleep(0.5)
    disk.daemon.kill()
    disk.lose_power(monkeypatch)
    disk.daemon.start()
    assert has_pieces(disk, "synced")


def test_an_orderly_end_keeps_dirty_data_in_the_log_and_the_next_start_is_warm(
    disk: CachedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = disk.image.read_bytes()
    disk.daemon.start()
    write_pieces(disk, "warm")
    statistics = disk.daemon.stop()["vda"]
    assert statistics["backend_operations"]["write"] == 0
    (closed,) = disk.daemon.events("closed")
    assert closed["dirty_bytes"] > 0
    assert disk.image.read_bytes() == before
    assert disk.tier_files() == []
    found = disk.mark()
    assert found is not None
    assert (found.epoch, found.dirty) == (1, True)
    disk.lose_power(monkeypatch)  # which an orderly end does not mind
    disk.daemon.start()
    assert recovered(disk)["decision"] == "warm"
    assert has_pieces(disk, "warm")
    assert disk.daemon.stop()["vda"]["backend_operations"]["read"] == 0, "all of it came from the log"


def test_what_the_image_has_stays_warm_over_an_orderly_end_as_well(disk: CachedDisk) -> None:
    disk.use("--destage", "on", "--destage-after", "10ms", "--checkpoint-interval", "1s")
    disk.daemon.start()
    write_pieces(disk, "destaged", flush=True)
    disk.daemon.wait_for("disconnected")
    for _ in range(100):
        if has_pieces(disk, "destaged") and disk.in_image(FREE, 4096) == noise(4096, ("destaged", 0)):
            break
    disk.daemon.stop()
    disk.daemon.start()
    assert recovered(disk)["decision"] == "warm"
    assert has_pieces(disk, "destaged")
    assert disk.daemon.stop()["vda"]["backend_operations"]["read"] == 0


def test_drain_on_exit_writes_everything_to_the_image_which_then_goes_its_own_way(
    disk: CachedDisk, tmp_path: Path
) -> None:
    disk.use("--drain-on-exit")
    disk.daemon.start()
    write_pieces(disk, "drained")
    disk.daemon.stop()
    assert disk.daemon.events("drained")
    (closed,) = disk.daemon.events("closed")
    assert closed["dirty_bytes"] == 0
    for i in range(40):
        size = 4096 + 512 * (i % 9)
        assert disk.in_image(FREE + i * 12288, size) == noise(size, ("drained", i))
    found = disk.mark()
    assert found is not None
    assert not found.dirty
    plain = NativeDaemon.export(disk.image, tmp_path / "plain.sock", "--ram", "32MiB")
    with plain:
        assert disk.mark() is None, "its cache does not know what is written now"
    disk.daemon.start()
    (cold,) = disk.daemon.events("cache-cold")
    assert "has lost the mark of its cache" in cold["reason"]
    assert has_pieces(disk, "drained")


def test_a_front_end_that_stays_goes_on_after_a_kill_as_if_nothing_had_happened(disk: CachedDisk) -> None:
    disk.daemon.start()
    first = disk.frontend()
    for i in range(100):
        first.write(FREE + i * 4096, noise(4096, ("before", i)))
    disk.daemon.kill()
    first.disconnect()
    disk.daemon.start()
    with disk.frontend(resume=first) as f:
        for i in range(100):
            assert f.read(FREE + i * 4096, 4096) == noise(4096, ("before", i))
        f.write(FREE, noise(4096, "after"))
        assert f.read(FREE, 4096) == noise(4096, "after")


def test_requests_in_flight_at_a_kill_are_taken_up_again(disk: CachedDisk) -> None:
    disk.daemon.start()
    first = disk.frontend()
    first.write(FREE, noise(4096, "old"))
    os.kill(disk.daemon.pid, signal.SIGSTOP)
    requests = [first.start_write(FREE + i * 4096, noise(4096, ("flying", i))) for i in range(8)]
    disk.daemon.kill()
    first.disconnect()
    disk.daemon.start()
    with disk.frontend(resume=first) as f:
        for request in requests:
            f.finish(request)
        for i in range(8):
            assert f.read(FREE + i * 4096, 4096) == noise(4096, ("flying", i))


def test_a_write_cache_that_the_guest_has_switched_off_stays_off_over_a_kill(
    disk: CachedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.daemon.start()
    with disk.frontend() as f:
        assert f.config()[WCE_OFFSET] == 1
        f.set_config(WCE_OFFSET, b"\0")
        f.write(FREE, noise(4096, "through"))
    disk.daemon.kill()
    disk.daemon.start()
    assert disk.daemon.events("volume")[0]["write_cache"] is False
    with disk.frontend() as f:
        assert f.config()[WCE_OFFSET] == 0
        f.write(FREE + MIB, noise(4096, "still through"))
    disk.daemon.kill()
    disk.lose_power(monkeypatch)
    disk.daemon.start()
    with disk.frontend() as f:
        assert f.read(FREE, 4096) == noise(4096, "through")
        assert f.read(FREE + MIB, 4096) == noise(4096, "still through")


def test_a_guest_that_keeps_its_write_cache_does_not_lose_it_by_a_kill(disk: CachedDisk) -> None:
    disk.daemon.start()
    first = disk.frontend()
    first.write(FREE, noise(4096, "one"))
    disk.daemon.kill()
    first.disconnect()
    disk.daemon.start()
    with disk.frontend(resume=first) as f:
        for i in range(64):
            f.write(FREE + i * 4096, noise(4096, i))
    log = disk.daemon.stop()["vda"]["log"]
    assert log["fdatasyncs"] < 32, "it is not in write-through"


def test_a_bios_that_cannot_flush_does_not_decide_for_the_system_that_comes_after_it(disk: CachedDisk) -> None:
    disk.daemon.start()
    with disk.frontend(features=()) as f:
        f.write(FREE, noise(4096, "boot"))
    disk.daemon.kill()
    disk.daemon.start()
    assert disk.daemon.events("volume")[0]["write_cache"] is True
    with disk.frontend() as f:
        assert f.read(FREE, 4096) == noise(4096, "boot")
        f.flush()
        for i in range(64):
            f.write(FREE + i * 4096, noise(4096, i))
    log = disk.daemon.stop()["vda"]["log"]
    assert log["fdatasyncs"] < 32, "it is not in write-through"


def test_load_with_destaging_and_wrap_around_is_verified(disk: CachedDisk) -> None:
    disk.use("--destage", "on", "--destage-after", "10ms")
    disk.daemon.start()
    options = ("--rw", "randrw", "--bs", "4k", "--iodepth", "16", "--offset", "4m", "--fsync", "64")
    result = bench(disk.socket, *options, "--number_ios", "40000", "--verify", "crc32c")
    assert result.returncode == 0, result.stderr
    disk.assert_good()
    log = disk.daemon.stop()["vda"]["log"]
    assert log["head"] > 2 * log["blocks"], "the ring has been written all around"
    assert log["crc_errors"] == 0
    disk.daemon.start()
    disk.assert_good()


def test_statistics_and_status_tell_of_the_log(disk: CachedDisk) -> None:
    disk.daemon.start()
    write_pieces(disk, "counted", flush=True)
    status = subprocess.run(
        [VHOSTCACHE, "status", "--json", f"{disk.socket}.control"], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    (volume,) = json.loads(status.stdout)["volumes"]
    assert volume["cache"]["path"] == str(disk.cache)
    assert volume["cache"]["log_bytes"] == 63 * MIB
    assert volume["cache"]["log_used_bytes"] > 0
    log = disk.daemon.stop()["vda"]["log"]
    assert log["records"] >= 1
    assert log["fdatasyncs"] >= 1
    assert log["mean_payload_bytes"] >= 4096
    assert log["written_per_accepted"] > 0.9
    assert log["operations"]["write"] >= 1


def test_several_disks_with_caches_start_together_or_not_at_all(tmp_path: Path, ram_dir: Path) -> None:
    disks = [CachedDisk(tmp_path, ram_dir, name=name) for name in ("one", "two")]
    volumes = [
        {
            "name": d.image.stem,
            "socket": str(d.socket),
            "backend": {"path": str(d.image)},
            "ram": "32MiB",
            "cache": {"path": str(d.cache), "size": "64MiB", "ram_dir": str(ram_dir)},
        }
        for d in disks
    ]
    config = tmp_path / "disks.yaml"
    config.write_text(yaml.safe_dump({"volumes": volumes}))
    disks[1].cache.write_bytes(b"precious" * 1000)
    done = subprocess.run([VHOSTCACHE, "serve", config], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert "is not a vhostcache cache" in done.stderr
    assert not disks[0].cache.exists(), "nothing is left of the first one"
    assert disks[0].mark() is None
    assert disks[1].cache.read_bytes() == b"precious" * 1000
    disks[1].cache.unlink()
    with NativeDaemon.serve(config) as daemon:
        for d in disks:
            with d.frontend() as f:
                f.write(FREE, noise(4096, d.image.stem))
        daemon.kill()
        daemon.start()
        for d in disks:
            with d.frontend() as f:
                assert f.read(FREE, 4096) == noise(4096, d.image.stem)


# Who is refused. Each line says what was found and what to do.


def dirty(disk: CachedDisk) -> None:
    """The cache has what the image does not have, and nobody serves it."""
    disk.daemon.start()
    write_pieces(disk, "dirty")
    disk.daemon.stop()


def crashed(disk: CachedDisk) -> None:
    """The same, after a kill."""
    disk.daemon.start()
    write_pieces(disk, "dirty")
    disk.daemon.kill()


def clean(disk: CachedDisk) -> None:
    """The image has everything."""
    disk.daemon.start()
    write_pieces(disk, "dirty")
    disk.daemon.arguments.append("--drain-on-exit")
    disk.daemon.stop()
    disk.daemon.start()
    disk.daemon.stop()
    disk.daemon.arguments.remove("--drain-on-exit")


@pytest.mark.parametrize("state", [dirty, crashed])
def test_a_dirty_image_without_its_cache_is_refused(disk: CachedDisk, state: Any, tmp_path: Path) -> None:
    state(disk)
    plain = ("export", disk.image, "--socket", tmp_path / "plain")
    for options in ((), ("--read-only",)):
        done = subprocess.run([VHOSTCACHE, *plain, *options], capture_output=True, text=True, timeout=TIMEOUT_S)
        assert done.returncode == 1
        assert "its newest data is in a cache" in done.stderr
        assert "vhostcache drain" in done.stderr
    with NativeDaemon.export(disk.image, tmp_path / "plain", "--discard-dirty-data") as daemon:
        assert daemon.events("dirty-data-discarded")
        assert disk.mark() is None


@pytest.mark.parametrize("state", [dirty, crashed])
def test_a_cache_file_that_is_gone_is_refused_until_its_data_is_given_up(disk: CachedDisk, state: Any) -> None:
    state(disk)
    disk.cache.unlink()
    at = disk.daemon.arguments.index("--cache-size")
    size = disk.daemon.arguments[at : at + 2]
    # Who has left out the size is not told to make a new one.
    del disk.daemon.arguments[at : at + 2]
    assert "--discard-dirty-data" in disk.refused()
    disk.use(*size)
    line = disk.refused()
    assert "does not exist, or is empty" in line
    assert "--discard-dirty-data" in line
    assert not disk.cache.exists()
    disk.use("--discard-dirty-data")
    disk.daemon.start()
    (event,) = disk.daemon.events("dirty-data-discarded")
    assert "does not exist" in event["reason"]
    assert not has_pieces(disk, "dirty")
    disk.assert_good()


def test_the_cache_of_another_image_is_refused_whatever_may_be_discarded(
    disk: CachedDisk, tmp_path: Path, ram_dir: Path
) -> None:
    dirty(disk)
    other = CachedDisk(tmp_path, ram_dir, name="other")
    other.daemon.arguments[other.daemon.arguments.index(str(other.cache))] = str(disk.cache)
    for options in ((), ("--discard-dirty-data",)):
        assert "belongs to another image" in other.refused(*options)
    disk.daemon.start()
    assert has_pieces(disk, "dirty")


def test_an_old_copy_of_the_cache_is_refused(disk: CachedDisk, tmp_path: Path) -> None:
    dirty(disk)
    shutil.copy(disk.cache, tmp_path / "copy")
    disk.daemon.start()
    write_pieces(disk, "newer")
    disk.daemon.stop()
    disk.cache.rename(tmp_path / "newest")
    shutil.copy(tmp_path / "copy", disk.cache)
    line = disk.refused()
    assert "is an old copy (epoch 1); expected epoch 2" in line
    shutil.move(tmp_path / "newest", disk.cache)
    disk.daemon.start()
    assert has_pieces(disk, "newer")


def test_a_truncated_cache_file_is_refused(disk: CachedDisk) -> None:
    crashed(disk)
    for size in (32 * MIB, 2 * MIB, MIB):
        os.truncate(disk.cache, size)
        assert "truncated" in disk.refused()
    os.truncate(disk.cache, 4096)
    assert "vhostcache: cache '" in disk.refused()
    disk.use("--discard-dirty-data")
    disk.daemon.start()
    assert disk.daemon.events("dirty-data-discarded")
    assert disk.cache.stat().st_size == 64 * MIB
    disk.assert_good()


def test_an_image_of_another_size_or_time_is_refused_if_the_cache_has_newer_data(disk: CachedDisk) -> None:
    dirty(disk)
    times = disk.image.stat()
    os.truncate(disk.image, DISK_BYTES + 4096)
    assert f"has {DISK_BYTES + 4096} bytes" in disk.refused()
    os.truncate(disk.image, DISK_BYTES)
    assert "has been written by others" in disk.refused()
    os.utime(disk.image, ns=(times.st_atime_ns, times.st_mtime_ns))
    disk.daemon.start()
    assert has_pieces(disk, "dirty")


def test_an_image_that_was_changed_makes_a_clean_cache_cold(disk: CachedDisk) -> None:
    clean(disk)
    with disk.image.open("r+b") as file:
        file.seek(FREE)
        file.write(b"c" * 4096)
    disk.daemon.start()
    assert recovered(disk)["decision"] == "cold"
    with disk.frontend() as f:
        assert f.read(FREE, 4096) == b"c" * 4096
    disk.assert_good()


def test_an_image_that_was_replaced_is_refused_if_the_cache_has_newer_data(disk: CachedDisk, tmp_path: Path) -> None:
    crashed(disk)
    subprocess.run(["cp", disk.image, tmp_path / "copy"], check=True)
    disk.image.rename(tmp_path / "original")
    (tmp_path / "copy").rename(disk.image)
    assert "has lost the mark of its cache" in disk.refused()
    (tmp_path / "original").rename(disk.image)
    disk.daemon.start()
    assert has_pieces(disk, "dirty")


def test_a_ram_tier_that_is_gone_in_the_same_boot_is_refused(disk: CachedDisk) -> None:
    crashed(disk)
    for name in disk.tier_files():
        (disk.ram_dir / name).unlink()
    assert "its RAM-tier file is gone" in disk.refused()


def test_a_ram_tier_folder_of_another_user_is_refused(disk: CachedDisk) -> None:
    disk.ram_dir.mkdir(0o700)
    disk.ram_dir.chmod(0o777)
    assert "has the mode 0777" in disk.refused()
    assert not disk.cache.exists()
    assert disk.mark() is None


def test_a_tmpfs_that_is_too_small_is_one_line(disk: CachedDisk) -> None:
    disk.use("--ram", "4TiB")
    assert "for the RAM tier; use less --ram" in disk.refused()
    assert not disk.cache.exists()
    assert disk.mark() is None


def test_another_file_is_never_taken_for_a_cache(disk: CachedDisk) -> None:
    disk.cache.write_bytes(noise(MIB, "a file of somebody"))
    for options in ((), ("--discard-dirty-data",)):
        assert "holds something that is not a vhostcache cache" in disk.refused(*options)
    assert disk.cache.read_bytes() == noise(MIB, "a file of somebody")


def test_a_file_that_was_made_empty_for_it_is_taken(disk: CachedDisk) -> None:
    disk.cache.touch()
    disk.daemon.start()
    assert disk.cache.stat().st_size == 64 * MIB
    disk.assert_good()


def test_a_new_cache_needs_a_size_and_an_old_one_keeps_its_own(disk: CachedDisk) -> None:
    at = disk.daemon.arguments.index("--cache-size")
    del disk.daemon.arguments[at : at + 2]
    assert "expected --cache-size, to make it" in disk.refused(status=2)
    with_size = ("--cache-size", "64MiB")
    disk.use(*with_size)
    disk.daemon.start()
    disk.daemon.stop()
    disk.daemon.arguments[-1] = "128MiB"
    assert "is 64MiB large; expected 128MiB" in disk.refused(status=2)
    del disk.daemon.arguments[-2:]
    disk.daemon.start()


def test_two_daemons_cannot_have_one_cache(disk: CachedDisk, tmp_path: Path) -> None:
    disk.daemon.start()
    other = CachedDisk(tmp_path, disk.ram_dir, name="other")
    other.daemon.arguments[other.daemon.arguments.index(str(other.cache))] = str(disk.cache)
    assert "is in use by another process" in other.refused()
    disk.assert_good()


def test_both_superblocks_damaged_is_said_and_can_be_given_up(disk: CachedDisk) -> None:
    crashed(disk)
    with disk.cache.open("r+b") as file:
        for offset in (100, 4196):
            file.seek(offset)
            file.write(b"rot")
    assert "superblock" in disk.refused()
    disk.use("--discard-dirty-data")
    disk.daemon.start()
    assert disk.daemon.events("dirty-data-discarded")
    disk.assert_good()


def test_an_old_copy_of_the_image_is_refused(disk: CachedDisk, tmp_path: Path) -> None:
    dirty(disk)
    subprocess.run(["cp", "-a", disk.image, tmp_path / "copy"], check=True)
    disk.daemon.start()
    write_pieces(disk, "newer")
    disk.daemon.stop()
    disk.image.rename(tmp_path / "newest")
    shutil.move(tmp_path / "copy", disk.image)
    assert "is an old copy: its mark says epoch 1, its cache 2" in disk.refused()


def test_discarding_has_no_effect_on_a_cache_that_can_be_used(disk: CachedDisk) -> None:
    crashed(disk)
    disk.use("--discard-dirty-data")
    disk.daemon.start()
    assert has_pieces(disk, "dirty")
    assert not disk.daemon.events("dirty-data-discarded")


def test_an_image_that_shrinks_ends_the_volume_and_the_log_keeps_what_it_has(disk: CachedDisk) -> None:
    disk.daemon.start()
    write_pieces(disk, "dirty", flush=True)
    os.truncate(disk.image, MIB)
    with disk.frontend() as f, contextlib.suppress(GoneError, RefusedError):
        f.read(32 * MIB, 65536)
        f.read(33 * MIB, 65536)
    with pytest.raises(GuestError, match="ended with 1"):
        disk.daemon.wait()
    assert disk.daemon.events("image-shrank")
    assert disk.daemon.events("closed")
    assert "has 1048576 bytes" in disk.refused()
    os.truncate(disk.image, DISK_BYTES)
    assert "has been written by others" in disk.refused()


# Block devices: no marks, and no size but their own.


@pytest.fixture
def loops() -> Iterator[Callable[[Path], Path]]:
    """Files as block devices."""
    with contextlib.ExitStack() as stack:

        def make(file: Path) -> Path:
            with file.open("ab") as device:
                device.truncate(64 * MIB)
            done = subprocess.run(["losetup", "--find", "--show", file], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no loop devices here: {done.stderr.strip()}")
            stack.callback(subprocess.run, ["losetup", "--detach", done.stdout.strip()], check=True)
            return Path(done.stdout.strip())

        yield make


def test_image_and_cache_may_be_block_devices(
    tmp_path: Path, ram_dir: Path, loops: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = CachedDisk(tmp_path, ram_dir)
    image, cache = loops(disk.image), loops(disk.cache)
    arguments = disk.daemon.arguments
    arguments[arguments.index(str(disk.image))] = str(image)
    arguments[arguments.index(str(disk.cache))] = str(cache)
    at = arguments.index("--cache-size")
    del arguments[at : at + 2]
    try:
        disk.daemon.start()
        write_pieces(disk, "device")
        disk.daemon.kill()
        disk.daemon.start()
        assert recovered(disk)["ram_tier_records"] >= 1
        assert has_pieces(disk, "device")
        with disk.frontend() as f:
            f.flush()
        disk.daemon.kill()
        disk.lose_power(monkeypatch)
        disk.daemon.start()
        assert has_pieces(disk, "device")
        disk.daemon.stop()
        other = loops(tmp_path / "other")
        arguments[arguments.index(str(image))] = str(other)
        done = disk.command()
        assert "belongs to another image" in done.stderr
    finally:
        disk.daemon.reap()


def test_a_dead_cache_device_does_not_hold_up_the_end_and_nothing_acknowledged_is_lost(disk: CachedDisk) -> None:
    disk.daemon.start()
    with disk.frontend() as f:
        f.write(FREE, noise(65536, "flushed"))
        f.flush()
        # From now on every write to the ring fails (EFBIG), and those to the superblocks do not.
        resource.prlimit(disk.daemon.pid, resource.RLIMIT_FSIZE, (MIB, resource.RLIM_INFINITY))
        f.write(FREE + MIB, noise(65536, "acknowledged"))
        waiting = f.submit([f.header(T_FLUSH), f.room(1)])
        disk.daemon.wait_for("cache-error")
        with pytest.raises(GuestError, match="ended with 1"):
            disk.daemon.stop()
        (event,) = disk.daemon.events("cache-abandoned")
        assert Path(event["ram_tier"]).exists()
        assert not f.queues[0].is_done(waiting.head), "a flush that was not one is not answered"
    disk.daemon.start()
    with disk.frontend() as f:
        assert f.read(FREE, 65536) == noise(65536, "flushed")
        assert f.read(FREE + MIB, 65536) == noise(65536, "acknowledged")
    disk.assert_good()
