"""A disk's destaging is changed while it is served, and a backend that has refused writes is mended."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest import VHOSTCACHE
from tests.native.conftest import DISK_BYTES, Disk, NativeDaemon, noise

BLOCK = 4096


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk with a cache file, whose backend has no space as long as the file `full` is there."""
    image, socket, config = (tmp_path / name for name in ("disk.img", "disk.sock", "disk.yaml"))
    config.write_text(
        f"""
control: {socket}.control
volumes:
  - name: disk
    socket: {socket}
    backend:
      path: {image}
      wrap: [{{fault: {{kind: write, errno: ENOSPC, while_exists: full}}}}]
    ram: 32MiB
    num_queues: 4
    cache: {{path: disk.cache, size: 64MiB, destage: off}}
    destage_after: 10ms
"""
    )
    disk = Disk(image, socket, NativeDaemon.serve(config))
    disk.make_image()
    disk.daemon.start()
    try:
        yield disk
    finally:
        (tmp_path / "full").unlink(missing_ok=True)
        disk.end()


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([VHOSTCACHE, *arguments], capture_output=True, text=True, timeout=60, check=False)


def status(disk: Disk) -> dict[str, object]:
    answer = run("status", "--json", disk.socket)
    assert answer.returncode == 0, answer.stderr
    (volume,) = json.loads(answer.stdout)["volumes"]
    assert isinstance(volume, dict)
    return volume


def write_and_flush(disk: Disk, data: bytes, offset: int = DISK_BYTES // 2) -> None:
    with disk.frontend() as frontend:
        frontend.write(offset, data)
        frontend.flush()


def test_settings_are_changed_all_or_none_and_seen_in_the_status(disk: Disk) -> None:
    answer = run("set", disk.socket, "destage_threshold=30", "sync_interval=200ms", "destage=off")
    assert (answer.returncode, answer.stderr) == (0, "")
    assert "destage_threshold: 30\n" in answer.stdout
    assert "destage: off\n" in answer.stdout
    answer = run("set", disk.socket, "destage_threshold=40", "sync_interval=never")
    assert answer.returncode == 1
    assert "sync_interval: found 'never'" in answer.stderr
    assert answer.stderr.count("\n") == 1
    settings = status(disk)["settings"]
    assert isinstance(settings, dict)
    assert (settings["destage_threshold"], settings["sync_interval"]) == (30, 0.2)
    assert run("set", disk.socket, "destage_threshold").returncode == 2


def test_destaging_is_switched_on(disk: Disk) -> None:
    data = noise(BLOCK, "switched on")
    write_and_flush(disk, data)
    assert disk.in_image(DISK_BYTES // 2, BLOCK) != data
    assert run("set", disk.socket, "destage=on").returncode == 0
    disk.daemon.wait_for("settings")
    assert wait_until_clean(disk)["backend_held"] is None
    assert disk.in_image(DISK_BYTES // 2, BLOCK) == data


def test_a_backend_without_space_holds_and_goes_on_when_somebody_has_mended_it(disk: Disk, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.touch()
    assert run("set", disk.socket, "destage=on").returncode == 0
    data = noise(BLOCK, "no space")
    write_and_flush(disk, data)
    (held,) = disk.daemon.wait_for("backend-held")
    assert "room" in held["hint"]
    assert "no space is left" in str(status(disk)["backend_held"])
    assert "disk: backend held: no space is left" in run("status", disk.socket).stdout
    write_and_flush(disk, data, DISK_BYTES // 2 + BLOCK)  # the guest does not notice
    full.unlink()
    assert run("retry", disk.socket).returncode == 0
    disk.daemon.wait_for("backend-recovered")
    wait_until_clean(disk)
    assert disk.in_image(DISK_BYTES // 2, 2 * BLOCK) == 2 * data


def wait_until_clean(disk: Disk) -> dict[str, object]:
    """Everything is in the image."""
    for _ in range(600):
        volume = status(disk)
        if volume["dirty_bytes"] == 0:
            return volume
        time.sleep(0.05)
    raise AssertionError(f"it stays dirty: {volume}")
