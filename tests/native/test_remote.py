"""Disks on an NBD server, and on all that a qemu-storage-daemon opens: what arrives there, what an outage does, which
cache belongs to what. qemu-img looks at the images, never the program under test."""

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.backend.servers import Server, nbdkit
from tests.frontend import T_FLUSH, Frontend
from tests.guest import VHOSTCACHE, GuestError
from tests.native.conftest import MIB, NativeDaemon, noise

DISK_BYTES = 64 * MIB
TIMEOUT_S = 60
FORMATS = ["raw", "qcow2", "compressed", "luks"]
KEY = "opensesame"
DIE_AT = Path(__file__).with_name("die_at.py")


def run(*command: str | Path, check: bool = True) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
    return done


def make_image(path: Path, kind: str) -> dict[str, Any]:
    """An empty image of that kind, and what a configuration says of it."""
    node: dict[str, Any] = {"driver": "file", "filename": path.name}
    if kind == "raw":
        path.write_bytes(b"")
        os.truncate(path, DISK_BYTES)
        return {"blockdev": {"driver": "raw", "file": node}}
    if kind == "luks":
        key = path.with_name("key")
        key.write_text(KEY)
        path.write_bytes(b"")
        os.truncate(path, DISK_BYTES + 2 * MIB)
        # qemu-img would try for seconds how many iterations this processor does.
        luks1 = ("--type", "luks1", "--pbkdf-force-iterations", "1000", "--key-file")
        run("cryptsetup", "luksFormat", "-q", *luks1, key, path)
        secret = {"qom-type": "secret", "id": "key0", "file": "key"}
        return {"blockdev": {"driver": "luks", "key-secret": "key0", "file": node}, "objects": [secret]}
    options = "refcount_bits=1" if kind == "compressed" else "refcount_bits=16"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, str(DISK_BYTES))
    if kind == "qcow2":
        return {"blockdev": {"driver": "qcow2", "file": node}}
    return {"blockdev": {"driver": "compress", "file": {"driver": "qcow2", "file": node}}}


def content(path: Path, kind: str, killed: bool = False) -> bytes:
    """Of the disk in an image, as qemu-img reads it. A killed server may have left reference counts that are too high,
    as QEMU does by design; they are mended first."""
    if killed and kind in ("qcow2", "compressed"):
        run("qemu-img", "check", "-r", "all", path, check=False)
    raw = path.with_suffix(".out")
    if kind == "luks":
        options = f"driver=luks,key-secret=key0,file.filename={path}"
        secret = f"secret,id=key0,file={path.with_name('key')}"
        run("qemu-img", "convert", "--object", secret, "--image-opts", options, "-O", "raw", raw)
    else:
        run("qemu-img", "convert", "-f", "raw" if kind == "raw" else "qcow2", "-O", "raw", path, raw)
    if kind in ("qcow2", "compressed"):
        run("qemu-img", "check", path)
    found = raw.read_bytes()
    raw.unlink()
    return found


class RemoteDisk:
    """A volume that is served from a configuration file, and what should be on it."""

    def __init__(
        self,
        folder: Path,
        ram_dir: Path,
        backend: dict[str, Any],
        cached: bool,
        empty: bytes | None = None,
        **keys: Any,
    ) -> None:
        self.folder, self.ram_dir, self.backend = folder, ram_dir, backend
        self.config, self.socket = folder / "disk.yaml", folder / "disk.sock"
        self.keys: dict[str, Any] = {"ram": "32MiB", "object_size": "1MiB", **keys}
        if cached:
            self.keys["cache"] = {"path": "disk.cache", "size": "64MiB", "ram_dir": str(ram_dir)}
        self.expected = bytearray(DISK_BYTES if empty is None else empty)
        self.daemon = NativeDaemon.serve(self.config)
        self.write_config()

    def write_config(self, **cache: Any) -> None:
        if cache:
            self.keys["cache"] = {**self.keys["cache"], **cache}
        volume: dict[str, Any] = {"name": "vda", "socket": "disk.sock", "backend": self.backend, **self.keys}
        self.config.write_text(yaml.safe_dump({"volumes": [volume], "control": "control.sock"}))

    def write(self, frontend: Frontend, offset: int, data: bytes) -> None:
        frontend.write(offset, data)
        self.expected[offset : offset + len(data)] = data

    def change(self, frontend: Frontend, seed: str, count: int = 60, unit: int = 512) -> None:
        """Writes of all sizes and alignments, zeroes, discards; whole blocks only, if parts would have to be read."""
        chance = random.Random(seed)
        for number in range(count):
            size = 512 * chance.choice([1, 3, 8, 16, 128, 256, 512])
            size = -(-size // unit) * unit
            offset = unit * chance.randrange((24 * MIB - size) // unit)
            kind = chance.random()
            if kind < 0.1:
                frontend.write_zeroes(offset, size, unmap=chance.random() < 0.5)
                self.expected[offset : offset + size] = bytes(size)
            elif kind < 0.2:
                frontend.discard(offset, size)
                self.expected[offset : offset + size] = bytes(size)
            else:
                # What shrinks and what does not is stored in different ways where it is compressed.
                data = noise(size, (seed, number)) if chance.random() < 0.5 else bytes([number + 1]) * size
                self.write(frontend, offset, data)

    def assert_reads(self, frontend: Frontend) -> None:
        for offset in range(0, 26 * MIB, MIB // 2):
            assert frontend.read(offset, MIB // 2) == self.expected[offset : offset + MIB // 2], offset

    def refused(self, *options: str) -> str:
        done = run(VHOSTCACHE, "serve", self.config, *options, check=False)
        assert done.returncode == 1, done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("vhostcache: ")]
        assert len(lines) == 1, done.stderr
        return lines[0]

    def qsd_pid(self) -> int:
        """Of the daemon's own, by the status that it gives."""
        threads = Path(f"/proc/{self.daemon.pid}/task").glob("*/children")
        children = [child for thread in threads for child in thread.read_text().split()]
        (pid,) = [int(pid) for pid in children if b"qemu-storage-da" in Path(f"/proc/{pid}/comm").read_bytes()]
        return pid


@pytest.fixture
def ram_dir() -> Iterator[Path]:
    path = Path(f"/dev/shm/vhostcache-test-{uuid.uuid4().hex}")
    yield path
    for entry in path.glob("*"):
        entry.unlink()
    if path.exists():
        path.rmdir()


MakeDisk = Callable[..., RemoteDisk]


@pytest.fixture
def qsd_disk(tmp_path: Path, ram_dir: Path) -> Iterator[MakeDisk]:
    made: list[RemoteDisk] = []

    def make(kind: str = "qcow2", cached: bool = True, **keys: Any) -> RemoteDisk:
        backend = {"type": "qsd", **make_image(tmp_path / "disk.image", kind)}
        empty = content(tmp_path / "disk.image", kind)  # of luks: noise
        made.append(RemoteDisk(tmp_path, ram_dir, backend, cached, empty, **keys))
        return made[-1]

    yield make
    for disk in made:
        disk.daemon.reap()


# qemu-storage-daemon.


@pytest.mark.parametrize("cached", [False, True], ids=["ram", "cache"])
@pytest.mark.parametrize("kind", FORMATS)
def test_what_a_guest_writes_is_in_the_image(qsd_disk: MakeDisk, tmp_path: Path, kind: str, cached: bool) -> None:
    disk = qsd_disk(kind, cached)
    if cached:
        disk.write_config(drain_on_exit=True)
    with disk.daemon, Frontend(disk.socket) as frontend:
        disk.change(frontend, f"first {kind}")
        frontend.flush()
        disk.change(frontend, f"second {kind}")
        disk.assert_reads(frontend)
    assert content(tmp_path / "disk.image", kind) == disk.expected


@pytest.mark.parametrize("cached", [False, True], ids=["ram", "cache"])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_server_killed_in_the_midst_of_writing_is_an_outage(
    qsd_disk: MakeDisk, tmp_path: Path, kind: str, cached: bool
) -> None:
    disk = qsd_disk(kind, cached, destage_after="1ms")
    if cached:
        disk.write_config(drain_on_exit=True)
    with disk.daemon, Frontend(disk.socket) as frontend:
        for round_ in range(1, 3):
            disk.change(frontend, f"before {round_}", 20)
            flush = frontend.submit([frontend.header(T_FLUSH), frontend.room(1)])
            os.kill(disk.qsd_pid(), signal.SIGKILL)
            disk.change(frontend, f"meanwhile {round_}", 20)
            assert frontend.finish(flush, timeout_s=TIMEOUT_S).status == 0
            frontend.flush()
            disk.daemon.wait_for("qsd-restarted", count=round_)
        disk.assert_reads(frontend)
    assert len(disk.daemon.events("qsd-died")) == 2
    assert not disk.daemon.events("request-failed")
    assert content(tmp_path / "disk.image", kind, killed=True) == disk.expected


@pytest.mark.parametrize("kind", ["qcow2", "compressed"])
def test_a_killed_daemon_takes_its_server_with_it_and_nothing_acknowledged_is_lost(
    qsd_disk: MakeDisk, tmp_path: Path, kind: str
) -> None:
    disk = qsd_disk(kind, destage_after="1ms")
    for round_ in range(2):
        disk.daemon.start()
        with Frontend(disk.socket) as frontend:
            disk.assert_reads(frontend)
            disk.change(frontend, f"round {round_}", 40)
            pid = disk.qsd_pid()
            disk.daemon.kill()
        deadline_s = time.monotonic() + TIMEOUT_S
        while Path(f"/proc/{pid}/exe").exists():
            assert time.monotonic() < deadline_s, "an orphan"
            time.sleep(0.01)
    run(VHOSTCACHE, "drain", "--config", disk.config)
    assert content(tmp_path / "disk.image", kind, killed=True) == disk.expected


def test_an_image_in_a_local_file_is_refused_without_its_cache(qsd_disk: MakeDisk, tmp_path: Path) -> None:
    disk = qsd_disk()
    disk.write_config(destage=False)
    with disk.daemon, Frontend(disk.socket) as frontend:
        disk.change(frontend, "x", 20)
    cache = disk.keys.pop("cache")
    disk.write_config()
    assert "its newest data is in a cache" in disk.refused()
    disk.keys["cache"] = cache
    disk.write_config()
    other = tmp_path / "other"
    run("qemu-img", "create", "-q", "-f", "qcow2", other, str(DISK_BYTES))
    disk.backend["blockdev"]["file"]["filename"] = "other"
    disk.write_config()
    assert "belongs to another image" in disk.refused()
    disk.backend["blockdev"]["file"]["filename"] = "disk.image"
    disk.write_config()
    with disk.daemon, Frontend(disk.socket) as frontend:
        disk.assert_reads(frontend)
    assert run(VHOSTCACHE, "check", "--config", disk.config, check=False).returncode == 1, "dirty"
    (tmp_path / "disk.image").rename(tmp_path / "moved")
    disk.backend["blockdev"] = {"driver": "raw", "file": disk.backend["blockdev"]}
    disk.backend["blockdev"]["file"]["file"]["filename"] = "moved"
    disk.write_config()
    done = run(VHOSTCACHE, "drain", "disk.cache", "--config", disk.config, "--volume", "vda", check=False)
    assert done.returncode != 0, "no such cache file here"
    done = run(VHOSTCACHE, "drain", tmp_path / "disk.cache", "--config", disk.config, "--volume", "vda")
    assert "is clean" in done.stdout
    assert content(tmp_path / "moved", "qcow2") == disk.expected
    assert run(VHOSTCACHE, "check", "--config", disk.config).returncode == 0


def test_an_image_changed_by_others_is_not_served_from_an_old_cache(qsd_disk: MakeDisk, tmp_path: Path) -> None:
    disk = qsd_disk()
    disk.write_config(drain_on_exit=True)
    with disk.daemon, Frontend(disk.socket) as frontend:
        disk.change(frontend, "x", 20)
    disk.daemon.start()  # it has not been changed, but for what its own end has written
    assert disk.daemon.events("recovered")[0]["decision"] == "warm"
    disk.daemon.stop()
    run("qemu-io", "-f", "qcow2", "-c", "write -P 5 1M 64k", tmp_path / "disk.image")
    disk.expected[MIB : MIB + 65536] = b"\5" * 65536
    disk.daemon.start()
    assert disk.daemon.events("cache-cold")
    with Frontend(disk.socket) as frontend:
        disk.assert_reads(frontend)


def test_what_qemu_cannot_open_is_one_line_in_its_words(qsd_disk: MakeDisk, tmp_path: Path) -> None:
    disk = qsd_disk("raw")
    disk.backend["blockdev"] = {"driver": "qcow2", "file": {"driver": "file", "filename": "disk.image"}}
    disk.write_config()
    assert "Image is not in qcow2 format" in disk.refused()
    disk.backend["binary"] = "./no-such-program"
    disk.write_config()
    assert "qemu-system-common" in disk.refused()
    assert not (tmp_path / "disk.cache").exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_an_image_that_qemu_opens_grows_while_it_is_in_use(qsd_disk: MakeDisk, tmp_path: Path, kind: str) -> None:
    disk = qsd_disk(kind)
    disk.write_config(drain_on_exit=True)
    with disk.daemon, Frontend(disk.socket) as frontend:
        disk.change(frontend, "before", 20)
        grown = DISK_BYTES + 16 * MIB
        done = run(VHOSTCACHE, "resize", "vda", str(grown), "--control", tmp_path / "control.sock")
        assert "80 MiB" in done.stdout
        assert frontend.capacity == grown
        disk.change(frontend, "after", 20)
        end = noise(65536, "end")
        frontend.write(grown - len(end), end)
        frontend.flush()
        disk.assert_reads(frontend)
    found = content(tmp_path / "disk.image", kind)
    assert (len(found), found[:DISK_BYTES], found[-len(end) :]) == (grown, disk.expected, end)
    with disk.daemon, Frontend(disk.socket) as frontend:
        assert frontend.capacity == grown


# NBD.


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    image = tmp_path / "disk.image"
    image.write_bytes(b"")
    os.truncate(image, DISK_BYTES)
    with nbdkit(tmp_path, "file", image) as server:
        yield server


@pytest.fixture
def nbd_disk(tmp_path: Path, ram_dir: Path, server: Server) -> Iterator[MakeDisk]:
    made: list[RemoteDisk] = []

    def make(cached: bool = True, **keys: Any) -> RemoteDisk:
        backend = {"type": "nbd", "uri": "nbd+unix:///?socket=nbd.sock"}
        made.append(RemoteDisk(tmp_path, ram_dir, backend, cached, **keys))
        return made[-1]

    yield make
    for disk in made:
        disk.daemon.reap()


@pytest.mark.parametrize("cached", [False, True], ids=["ram", "cache"])
def test_an_nbd_server_that_comes_and_goes_loses_nothing(
    nbd_disk: MakeDisk, server: Server, tmp_path: Path, cached: bool
) -> None:
    disk = nbd_disk(cached, destage_after="1ms")
    if cached:
        disk.write_config(drain_on_exit=True)
    with disk.daemon, Frontend(disk.socket) as frontend:
        for round_ in range(1, 3):
            disk.change(frontend, f"before {round_}", 20)
            flush = frontend.submit([frontend.header(T_FLUSH), frontend.room(1)])
            server.kill()
            if cached:
                disk.change(frontend, f"meanwhile {round_}", 20, unit=4096)
            disk.daemon.wait_for("backend-lost", count=round_)
            server.start()
            assert frontend.finish(flush, timeout_s=TIMEOUT_S).status == 0
            disk.daemon.wait_for("backend-recovered", count=round_)
        disk.assert_reads(frontend)
    assert content(tmp_path / "disk.image", "raw") == disk.expected


def resize(folder: Path, size_bytes: int) -> "subprocess.CompletedProcess[str]":
    return run(VHOSTCACHE, "resize", "vda", str(size_bytes), "--control", folder / "control.sock", check=False)


@pytest.mark.parametrize("cached", [False, True], ids=["ram", "cache"])
def test_an_export_that_its_server_has_grown_grows_while_it_is_in_use(
    nbd_disk: MakeDisk, tmp_path: Path, cached: bool
) -> None:
    disk = nbd_disk(cached, destage_after="1ms")
    if cached:
        disk.write_config(drain_on_exit=True)
    image, grown, end = tmp_path / "disk.image", DISK_BYTES + 16 * MIB, noise(65536, "end")
    with disk.daemon, Frontend(disk.socket) as frontend:
        disk.change(frontend, "before", 20)
        refused = resize(tmp_path, grown).stderr
        assert f"has {DISK_BYTES} bytes; expected {grown}; grow it at its server first" in refused
        os.truncate(image, grown)
        assert f"has {grown} bytes already; ask for these" in resize(tmp_path, grown - MIB).stderr
        assert "80 MiB" in resize(tmp_path, grown).stdout
        assert frontend.capacity == grown
        disk.change(frontend, "after", 20)
        frontend.write(grown - len(end), end)
        frontend.flush()
        disk.assert_reads(frontend)
        assert frontend.read(grown - len(end), len(end)) == end
        assert not disk.daemon.events("backend-lost")
    found = content(image, "raw")
    assert (len(found), found[:DISK_BYTES], found[-len(end) :]) == (grown, disk.expected, end)
    with disk.daemon, Frontend(disk.socket) as frontend:
        assert frontend.capacity == grown
        disk.assert_reads(frontend)


@pytest.mark.parametrize("step", range(1, 5))
def test_a_kill_at_each_step_while_an_export_grows_loses_nothing(nbd_disk: MakeDisk, tmp_path: Path, step: int) -> None:
    """1: when the server has been asked; 2 and 3: before the first and the second superblock; 4: when they have been
    written, and the guest has not been told."""
    disk = nbd_disk()
    grown = DISK_BYTES + 16 * MIB
    disk.daemon.program = [sys.executable, str(DIE_AT), f"resize:{step}"]
    disk.daemon.start()
    with Frontend(disk.socket) as frontend:
        disk.change(frontend, "before", 20)
        frontend.flush()
        disk.change(frontend, "acknowledged", 20)
        os.truncate(tmp_path / "disk.image", grown)
        assert resize(tmp_path, grown).returncode != 0
    with pytest.raises(GuestError):
        disk.daemon.wait()
    disk.daemon.program = [str(VHOSTCACHE)]
    with disk.daemon, Frontend(disk.socket) as frontend:
        assert frontend.capacity == grown
        disk.assert_reads(frontend)
        frontend.write(grown - 4096, noise(4096, "end"))
        frontend.flush()


def test_a_server_that_is_away_grows_nothing(nbd_disk: MakeDisk, server: Server, tmp_path: Path) -> None:
    disk = nbd_disk()
    with disk.daemon, Frontend(disk.socket) as frontend:
        server.kill()
        refused = resize(tmp_path, DISK_BYTES + MIB)
        assert refused.returncode == 1
        assert len(refused.stderr.splitlines()) == 1
        assert frontend.capacity == DISK_BYTES


def test_a_cache_knows_its_export_by_where_it_is(nbd_disk: MakeDisk, server: Server, tmp_path: Path) -> None:
    disk = nbd_disk()
    disk.write_config(destage=False)
    with disk.daemon, Frontend(disk.socket) as frontend:
        disk.change(frontend, "x", 20)
    with disk.daemon, Frontend(disk.socket) as frontend:
        assert disk.daemon.events("recovered")[0]["decision"] == "warm"
        disk.assert_reads(frontend)
    os.symlink(tmp_path / "nbd.sock", tmp_path / "link.sock")  # another way to the same
    os.rename(tmp_path / "nbd.sock", tmp_path / "moved.sock")
    cache, moved = tmp_path / "disk.cache", f"nbd+unix:///?socket={tmp_path}/moved.sock"
    refused = run(VHOSTCACHE, "drain", cache, "--backend", moved, "--ram-dir", disk.ram_dir, check=False)
    assert refused.returncode == 1
    assert "belongs to another image" in refused.stderr
    assert "--accept-moved" in refused.stderr
    drain = ("drain", cache, "--backend", moved, "--ram-dir", disk.ram_dir, "--accept-moved")
    assert "is clean" in run(VHOSTCACHE, *drain).stdout
    assert content(tmp_path / "disk.image", "raw") == disk.expected


def test_a_server_that_is_not_there_at_the_start_is_refused(nbd_disk: MakeDisk, server: Server, tmp_path: Path) -> None:
    disk = nbd_disk()
    server.stop()
    assert "export 'nbd+unix:///?socket=" in disk.refused()
    assert not (tmp_path / "disk.cache").exists()


def test_export_takes_the_uri_of_an_nbd_server(server: Server, tmp_path: Path) -> None:
    socket = tmp_path / "disk.sock"
    daemon = NativeDaemon(tmp_path / "log", "export", server.uri, "--socket", socket, "--ram", "16MiB")
    with daemon:
        with Frontend(socket) as frontend:
            frontend.write(MIB, noise(65536, "export"))
            frontend.flush()
            assert (tmp_path / "disk.image").read_bytes()[MIB : MIB + 65536] == noise(65536, "export")
        status = run(VHOSTCACHE, "status", "--json", socket).stdout
        assert '"backend_status": {"type": "nbd", "state": "connected", "reconnects": 0}' in status


def test_a_server_with_tls_is_served_and_drained_to_by_options_alone(tmp_path: Path) -> None:
    image, keys, socket, cache = (tmp_path / name for name in ("disk.img", "keys.psk", "s", "cache"))
    image.write_bytes(bytes(DISK_BYTES))
    keys.write_text("alice:" + "5a" * 32 + "\n")
    tls = ("--tls-psk-file", str(keys), "--tls-username", "alice")
    ram = ("--ram-dir", str(tmp_path / "ram"))
    with nbdkit(tmp_path, "--tls=require", f"--tls-psk={keys}", "file", image) as server:
        uri = f"nbds+unix:///?socket={server.socket}"
        caching = ("--cache", str(cache), "--cache-size", "64MiB", *ram, "--ram", "32MiB", "--destage", "off")
        tuned = ("--policy", "ordered", "--max-batched-objects", "2", "--destage-threshold", "90", "--readahead", "0")
        with NativeDaemon(tmp_path / "log", "export", uri, "--socket", socket, *caching, *tuned, *tls) as daemon:
            with Frontend(socket) as frontend:
                frontend.write(MIB, noise(MIB, "tls"))
                frontend.flush()
            daemon.stop()
        refused = run(VHOSTCACHE, "drain", cache, "--backend", uri, *ram, check=False)
        assert refused.returncode == 1
        assert refused.stderr.count("\n") == 1
        run(VHOSTCACHE, "drain", cache, "--backend", uri, *tls, *ram)
    assert image.read_bytes()[MIB : 2 * MIB] == noise(MIB, "tls")
