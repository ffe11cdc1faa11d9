import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vhostcache.errors import SocketError
from vhostcache.sockets import Listener

AsUser = Callable[[], contextlib.AbstractContextManager[None]]


def refusal(path: Path) -> str:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SocketError) as caught:
        Listener(str(path))
    assert len(os.listdir("/proc/self/fd")) == before, "a refused socket leaves no descriptor open"
    assert str(caught.value).isprintable()
    return str(caught.value)


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def test_a_socket_accepts_and_its_path_goes_when_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = Listener(str(path))
    assert connects(path)
    assert os.get_inheritable(listener.fileno()) is False
    assert os.get_blocking(listener.fileno()) is False
    listener.close()
    listener.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("permissions", [0o600, 0o660, 0o666])
def test_permissions_are_what_was_asked_for(tmp_path: Path, permissions: int) -> None:
    before = os.umask(0o022)
    try:
        listener = Listener(str(tmp_path / "s"), permissions)
        assert (tmp_path / "s").stat().st_mode & 0o777 == permissions
        listener.close()
        assert os.umask(0o022) == 0o022, "the umask is as it was"
    finally:
        os.umask(before)


def test_the_path_of_a_detached_listener_is_still_ours_to_remove(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = Listener(str(path))
    descriptor = listener.detach()
    assert connects(path)
    listener.close()
    assert not path.exists()
    os.close(descriptor)


def test_a_second_starter_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = Listener(str(path))
    assert "is in use by a running vhostcache" in refusal(path)
    assert connects(path)
    first.close()
    Listener(str(path)).close()


def test_another_program_that_listens_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        assert "is in use by another process" in refusal(path)
        assert connects(path)
        assert os.listdir(tmp_path) == ["s"]


def test_another_program_whose_backlog_is_full_is_refused_too(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen(0)
        clients = []
        for _ in range(3):
            client = socket.socket(socket.AF_UNIX)
            client.setblocking(False)
            client.connect_ex(str(path))
            clients.append(client)
        assert "is in use" in refusal(path)
        for client in clients:
            client.close()


def test_the_socket_of_a_killed_daemon_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    code = (
        "import sys, time; from vhostcache.sockets import Listener;"
        "keep = Listener(sys.argv[1]); print('up', flush=True); time.sleep(60)"
    )
    daemon = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert daemon.stdout is not None
    assert daemon.stdout.readline() == b"up\n"
    daemon.send_signal(signal.SIGKILL)
    daemon.wait()
    daemon.stdout.close()
    assert sorted(os.listdir(tmp_path)) == ["s", "s.lock"]
    assert not connects(path)
    listener = Listener(str(path))
    assert connects(path)
    listener.close()
    assert os.listdir(tmp_path) == []


def test_what_is_not_a_socket_is_never_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    assert "something that is not a socket is there" in refusal(path)
    assert path.read_text() == "precious"
    path.unlink()
    path.symlink_to("elsewhere")
    assert "something that is not a socket is there" in refusal(path)
    assert path.is_symlink()


def test_a_path_that_does_not_fit_is_refused_with_its_length(tmp_path: Path) -> None:
    name = "x" * (108 - len(str(tmp_path)) - 1)
    assert "is 108 bytes long; expected at most 107" in refusal(tmp_path / name)
    Listener(str(tmp_path / name[1:])).close()


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    assert f"the folder '{tmp_path}/none' does not exist" in refusal(tmp_path / "none" / "s")


def test_a_folder_without_permission_is_one_line(public_folder: Path, as_ordinary_user: AsUser) -> None:
    public_folder.chmod(0o555)
    with as_ordinary_user():
        message = refusal(public_folder / "s")
    assert "permission denied" in message


def test_a_path_that_somebody_else_has_taken_meanwhile_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = Listener(str(path))
    path.unlink()
    path.write_text("precious")
    listener.close()
    assert path.read_text() == "precious"


def test_nobody_gets_in_before_it_listens(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = Listener(str(path), listening=False)
    descriptor = listener.detach()
    try:
        with socket.socket(socket.AF_UNIX) as client:
            with pytest.raises(ConnectionRefusedError):
                client.connect(str(path))
            with pytest.raises(SocketError, match="in use by a running vhostcache"):
                Listener(str(path))
            listener.listen()
            client.connect(str(path))
    finally:
        os.close(descriptor)
        listener.close()
    assert not path.exists()
