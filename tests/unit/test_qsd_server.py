"""The supervision of a qemu-storage-daemon, with the real one, and with programs that misbehave."""

import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vhostcache.backend.base import NEVER, Notice
from vhostcache.backend.qsd_server import QsdServer
from vhostcache.config_backend import QsdBackendConfig
from vhostcache.errors import ImageError

MIB = 1 << 20
WAIT_S = 60.0  # for what comes in milliseconds, on a machine that is busy


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=WAIT_S).stdout


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Supervised:
    """A server, and what the daemon's loop does for it."""

    def __init__(self, server: QsdServer) -> None:
        self.server = server
        self.notices: list[Notice] = []
        self._watched: list[int] = []
        server.watch(self._watched.append)

    def until(self, event: str) -> Notice:
        deadline_s = time.monotonic() + WAIT_S
        while not any(notice.event == event for notice in self.notices):
            assert time.monotonic() < deadline_s, self.notices
            left_s = (self.server.wake_at_ns - time.monotonic_ns()) / 1e9
            self._watched[:] = [fd for fd in self._watched if is_open(fd)]
            select.select(self._watched, [], [], max(0.0, min(left_s, 1.0)))
            self.notices += self.server.look(time.monotonic_ns())
        return next(notice for notice in self.notices if notice.event == event)


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., QsdServer]]:
    servers: list[QsdServer] = []

    def make(blockdev: dict[str, Any], read_only: bool = False, direct: bool = False, **keys: Any) -> QsdServer:
        values = {"type": "qsd", "blockdev": blockdev, **keys}
        config = QsdBackendConfig.model_validate(values).relative_to(str(tmp_path))
        servers.append(QsdServer(config, "volume 'a'", read_only, direct))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def qcow2(tmp_path: Path) -> dict[str, Any]:
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "a.qcow2", "64M")
    return {"driver": "qcow2", "file": {"driver": "file", "filename": "a.qcow2"}}


def program(folder: Path, text: str) -> str:
    """A program that is no qemu-storage-daemon. `qmp` is its socket."""
    path = folder / "program"
    head = "import os, re, signal, socket, sys, time\n"
    head += "qmp = socket.socket(fileno=int(re.search(r'fd=(\\d+)', ' '.join(sys.argv))[1]))\n"
    path.write_text(f"#!{sys.executable} -IS\n{head}{text}\n")
    path.chmod(0o755)
    return str(path)


def test_it_serves_what_qemu_opens_on_a_socket_that_only_this_user_reaches(
    make: Callable[..., QsdServer], qcow2: dict[str, Any]
) -> None:
    server = make(qcow2)
    server.start()
    assert os.stat(os.path.dirname(server.socket_path)).st_mode & 0o777 == 0o700
    assert json.loads(run("qemu-img", "info", "--output=json", server.uri))["virtual-size"] == 64 * MIB
    run("qemu-io", "-f", "raw", "-c", "write -P 7 1M 64k", server.uri)
    assert server.node is not None
    assert (server.node.size_bytes, server.node.cluster_bytes) == (64 * MIB, 65536)
    server.close()
    assert not os.path.exists(os.path.dirname(server.socket_path))


def test_what_was_written_is_in_the_image_after_the_end(
    make: Callable[..., QsdServer], qcow2: dict[str, Any], tmp_path: Path
) -> None:
    server = make({"driver": "compress", "file": qcow2})
    server.start()
    run("qemu-io", "-f", "raw", "-c", "write -P 7 1M 64k", server.uri)
    assert server.stop()
    assert "Pattern verification failed" not in run(
        "qemu-io", "-f", "qcow2", "-c", "read -P 7 1M 64k", tmp_path / "a.qcow2"
    )
    run("qemu-img", "check", tmp_path / "a.qcow2")


def test_a_secret_stands_in_no_command_line(make: Callable[..., QsdServer], tmp_path: Path) -> None:
    secret = {"qom-type": "secret", "id": "key0", "data": "opensesame"}
    (tmp_path / "key").write_text("opensesame")
    (tmp_path / "x").write_bytes(bytes(10 * MIB))
    # qemu-img would try for seconds how many iterations this processor does.
    luks1 = ("--type", "luks1", "--pbkdf-force-iterations", "1000", "--key-file")
    run("cryptsetup", "luksFormat", "-q", *luks1, tmp_path / "key", tmp_path / "x")
    luks = {"driver": "luks", "key-secret": "key0", "file": {"driver": "file", "filename": "x"}}
    server = make(luks, objects=[secret])
    server.start()
    assert server.node is not None
    assert server.node.size_bytes == 8 * MIB
    assert b"opensesame" not in Path(f"/proc/{server.pid}/cmdline").read_bytes()


@pytest.mark.parametrize(
    ("blockdev", "words"),
    [
        ({"driver": "qcow3"}, "'driver' does not accept value 'qcow3'"),
        ({"driver": "file", "filename": "none"}, "Could not open 'none': No such file or directory"),
        ({"driver": "file", "filename": "x", "cash": {}}, "'cash' is unexpected"),
        ({"driver": "qcow2", "file": {"driver": "file", "filename": "/dev/null"}}, "/dev/null"),
    ],
)
def test_what_qemu_refuses_is_told_in_its_own_words(
    make: Callable[..., QsdServer], blockdev: dict[str, Any], words: str
) -> None:
    server = make(blockdev)
    with pytest.raises(ImageError) as caught:
        server.start()
    message = str(caught.value)
    assert message.startswith("volume 'a': qemu-storage-daemon says: ")
    assert words in message
    assert message.isprintable()
    assert server.pid == 0, "nothing is left running"


def test_a_program_that_is_not_there_is_named_with_its_package(make: Callable[..., QsdServer]) -> None:
    with pytest.raises(ImageError, match=r"program 'no-such-qsd' is not there.*qemu-system-common"):
        make({"driver": "null-co"}, binary="no-such-qsd")


def test_an_image_that_somebody_else_has_is_refused(make: Callable[..., QsdServer], qcow2: dict[str, Any]) -> None:
    make(qcow2).start()
    with pytest.raises(ImageError, match=r"Failed to get .*lock.*; stop who else uses it"):
        make(qcow2).start(lock_wait_s=0.3)


def test_an_image_whose_last_user_is_just_going_is_waited_for(
    make: Callable[..., QsdServer], qcow2: dict[str, Any], tmp_path: Path
) -> None:
    holder = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", "-c", "read 0 512", "-c", "sleep 1000", tmp_path / "a.qcow2"], stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline()
        make(qcow2).start(lock_wait_s=WAIT_S)


def test_a_read_only_volume_opens_it_for_reading(make: Callable[..., QsdServer], qcow2: dict[str, Any]) -> None:
    server = make(qcow2, read_only=True)
    server.start()
    assert server.node is not None
    assert server.node.read_only
    make(qcow2, read_only=True).start()


def test_the_mode_decides_over_the_page_cache_if_the_user_does_not(
    make: Callable[..., QsdServer], qcow2: dict[str, Any]
) -> None:
    server = make(qcow2, direct=True)
    server.start()
    assert server.node is not None
    assert server.node.direct or server.warnings, "tmpfs may have no O_DIRECT"
    server.close()
    server = make({**qcow2, "cache": {"direct": False}}, direct=True)
    server.start()
    assert server.node is not None
    assert not server.node.direct


def test_one_that_is_killed_is_started_again(make: Callable[..., QsdServer], qcow2: dict[str, Any]) -> None:
    server = make(qcow2)
    server.start()
    run("qemu-io", "-f", "raw", "-c", "write -P 7 1M 64k", "-c", "flush", server.uri)
    loop, first = Supervised(server), server.pid
    os.kill(first, signal.SIGKILL)
    died = loop.until("qsd-died")
    assert died.fields["status"] == "signal 9"
    assert not is_alive(first), "it is reaped before the next one is started"
    assert loop.until("qsd-restarted").fields == {"pid": server.pid, "restarts": 1}
    assert server.pid != first
    assert server.wake_at_ns == NEVER
    run("qemu-io", "-f", "raw", "-c", "read -P 7 1M 64k", server.uri)


def test_one_that_cannot_come_back_is_tried_ever_more_slowly(
    make: Callable[..., QsdServer], qcow2: dict[str, Any], tmp_path: Path
) -> None:
    server = make(qcow2)
    server.start()
    loop = Supervised(server)
    (tmp_path / "a.qcow2").rename(tmp_path / "away")
    os.kill(server.pid, signal.SIGKILL)
    first = loop.until("qsd-failed")
    assert "No such file" in first.fields["error"]
    loop.notices.clear()
    assert loop.until("qsd-failed").fields["again_in_s"] > first.fields["again_in_s"]
    (tmp_path / "away").rename(tmp_path / "a.qcow2")
    loop.until("qsd-restarted")


def test_without_descriptors_it_is_tried_again_later(make: Callable[..., QsdServer], qcow2: dict[str, Any]) -> None:
    server = make(qcow2)
    server.start()
    loop, limits = Supervised(server), resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        os.kill(server.pid, signal.SIGKILL)
        assert "too many files are open" in loop.until("qsd-failed").fields["error"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    loop.until("qsd-restarted")


def test_a_daemon_with_many_descriptors_starts_and_ends_it(
    make: Callable[..., QsdServer], qcow2: dict[str, Any]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], 2048), limits[1]))
    many: list[int] = []
    try:
        while not many or many[-1] < 1024:
            many.append(os.dup(0))
        server = make(qcow2)
        server.start()
        assert server.stop()
        server.close()
    finally:
        for descriptor in many:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_one_whose_exports_do_not_come_back_after_a_resize_is_replaced(
    make: Callable[..., QsdServer], tmp_path: Path
) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "refcount_bits=1", tmp_path / "a.qcow2", "64M")
    qcow2 = {"driver": "qcow2", "file": {"driver": "file", "filename": "a.qcow2"}}
    server = make({"driver": "compress", "file": qcow2})
    server.start()
    loop = Supervised(server)
    with ThreadPoolExecutor(1) as threads:
        growth = threads.submit(server.resize, 64 * MIB + 512)  # QEMU exports only whole clusters then
        loop.until("qsd-died")
        with pytest.raises(ImageError, match="not a multiple of request alignment"):
            growth.result(WAIT_S)


def test_what_it_says_is_told_line_by_line(make: Callable[..., QsdServer], tmp_path: Path) -> None:
    says = "os.write(2, b'qemu-storage-daemon: one\\ntw\\x07o\\nhalf a'); time.sleep(1000)"
    server = make({"driver": "null-co"}, binary=program(tmp_path, says))
    with pytest.raises(ImageError, match="says: nothing for 1 s, while it opens the image"):
        server.start(time_limit_s=1)
    dies = "os.write(2, b'qemu-storage-daemon: one\\ntw\\x07o\\nhalf a'); sys.exit(3)"
    server = make({"driver": "null-co"}, binary=program(tmp_path, dies))
    with pytest.raises(ImageError, match="says: half a"):
        server.start()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sys.exit(3)", r"nothing, and ends \(exit status 3\)"),
        ("os.kill(os.getpid(), 11)", r"nothing, and ends \(signal 11\)"),
        ("qmp.sendall(b'hello\\n'); time.sleep(1000)", "something that is not QMP"),
        ("qmp.sendall(b'[]\\n'); time.sleep(1000)", "something that is not QMP"),
        ("qmp.sendall(b'{}\\n' * 1000); time.sleep(1000)", "something that is not QMP"),
        ("qmp.sendall(b'x' * (2 << 20)); time.sleep(1000)", "something that is not QMP"),
        ("qmp.close(); time.sleep(1000)", r"nothing, and ends \(still running\)"),
    ],
)
def test_a_program_that_misbehaves_is_refused_and_ended(
    make: Callable[..., QsdServer], tmp_path: Path, text: str, words: str
) -> None:
    server = make({"driver": "null-co"}, binary=program(tmp_path, text))
    with pytest.raises(ImageError, match=words):
        server.start()
    assert server.pid == 0


def test_one_that_does_not_end_is_killed(make: Callable[..., QsdServer], tmp_path: Path) -> None:
    server = make(
        {"driver": "null-co"},
        binary=program(
            tmp_path, "signal.signal(15, signal.SIG_IGN); qmp.recv(9); qmp.sendall(b'{}\\n'); time.sleep(1000)"
        ),
    )
    server._launch(time.monotonic_ns())
    pid = server.pid
    while not select.select([server._qmp], [], [], 1.0)[0]:
        assert is_alive(pid)
    assert not server.stop(time_limit_s=0.2)
    assert not is_alive(pid)


def test_it_dies_with_its_daemon_whatever_ends_that(tmp_path: Path, qcow2: dict[str, Any]) -> None:
    text = f"""
import os, time
from vhostcache.backend.qsd_server import QsdServer
from vhostcache.config_backend import QsdBackendConfig
config = QsdBackendConfig(type="qsd", blockdev={qcow2!r}).relative_to({str(tmp_path)!r})
server = QsdServer(config, "x", False, False)
server.start()
print(server.pid, os.path.dirname(server.socket_path), flush=True)
time.sleep(1000)
"""
    with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None
        words = daemon.stdout.readline().split()
        pid = int(words[0])
        assert is_alive(pid)
        daemon.kill()
    deadline_s = time.monotonic() + WAIT_S
    while is_alive(pid):
        assert time.monotonic() < deadline_s, "an orphan"
        time.sleep(0.01)
    for entry in Path(words[1]).iterdir():
        entry.unlink()
    os.rmdir(words[1])
