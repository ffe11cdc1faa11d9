import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vhostcache import control_server
from vhostcache.control import NEVER, NO_QUESTION, ControlChannel, Question, query
from vhostcache.errors import ControlError
from vhostcache.sockets import Listener

TIMEOUT_S = 20.0  # a safety net


class Loop:
    """The daemon's side, in a thread: counts the questions and answers them, if it is told to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.questions = 0
        self.asked: list[Question] = []
        self.answering = threading.Event()
        self.answering.set()
        self.value: Any = {"state": "serving"}
        self.watched: list[int] = []
        self.channel = ControlChannel(Listener(str(path)), "9.9", self.watched.append)
        self.channel.start(time.monotonic_ns())
        self._ended = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended:
            if not self.answering.wait(0.05):
                continue
            ready, _, _ = select.select([self.watched[-1]], [], [], 0.05)
            if ready:
                question = self.channel.readable(time.monotonic_ns())
                if question is None:
                    return
                if question.command:
                    self.questions += 1
                    self.asked.append(question)
                    self.channel.reply(self.value)

    def close(self) -> None:
        self._ended = True
        self._thread.join()
        self.channel.close()


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    loop = Loop(tmp_path / "control")
    yield loop
    loop.close()


class Client:
    """A connection to the control socket, greeting taken."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(TIMEOUT_S)
        self.socket.connect(str(path))
        self.stream = self.socket.makefile("rb")
        self.greeting = self.receive()

    def send(self, message: object) -> None:
        self.socket.sendall((message if isinstance(message, bytes) else json.dumps(message).encode()) + b"\n")

    def receive(self) -> Any:
        line = self.stream.readline()
        return json.loads(line) if line else None

    def ask(self, message: object) -> Any:
        self.send(message)
        return self.receive()

    def close(self) -> None:
        self.stream.close()
        self.socket.close()


@pytest.fixture
def connect(loop: Loop) -> Iterator[Callable[[], Client]]:
    clients = []

    def connector() -> Client:
        clients.append(Client(loop.path))
        return clients[-1]

    yield connector
    for client in clients:
        client.close()


Connect = Callable[[], Client]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_greets_like_qmp_and_answers_a_command(connect: Connect) -> None:
    client = connect()
    assert client.greeting == {
        "vhostcache": {"version": "9.9", "commands": ["status", "resize", "set", "retry", "query-commands"]}
    }
    assert client.ask({"execute": "status"}) == {"return": {"state": "serving"}}
    names = ("status", "resize", "set", "retry", "query-commands")
    assert client.ask({"execute": "query-commands"}) == {"return": [{"name": name} for name in names]}


def test_an_identity_comes_back_with_its_answer(connect: Connect) -> None:
    client = connect()
    assert client.ask({"execute": "status", "id": 7}) == {"return": {"state": "serving"}, "id": 7}
    assert client.ask({"execute": "nonsense", "id": [1, {"a": None}]})["id"] == [1, {"a": None}]
    assert "id" not in client.ask({"execute": "status"})


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (b"not json", "GenericError"),
        (b"\xff\xfe", "GenericError"),
        (b"[" * 4000, "GenericError"),
        ([1], "GenericError"),
        (7, "GenericError"),
        ({}, "GenericError"),
        ({"execute": 3}, "GenericError"),
        ({"execute": "quit"}, "CommandNotFound"),
        ({"execute": "status", "arguments": {"x": 1}}, "GenericError"),
        ({"execute": "status", "extra": 1}, "GenericError"),
    ],
)
def test_nonsense_gets_an_error_and_the_connection_goes_on(connect: Connect, message: object, kind: str) -> None:
    client = connect()
    answer = client.ask(message)
    assert answer["error"]["class"] == kind
    assert answer["error"]["desc"]
    assert client.ask({"execute": "status"}) == {"return": {"state": "serving"}}


def test_a_change_reaches_the_loop_with_its_arguments_and_each_time(loop: Loop, connect: Connect) -> None:
    loop.value = {"wanted_bytes": 8192}
    clients = [connect(), connect()]
    for client in clients:
        client.send({"execute": "resize", "arguments": {"name": "vda", "size_bytes": 8192}, "id": 1})
    for client in clients:
        assert client.receive() == {"return": {"wanted_bytes": 8192}, "id": 1}
    assert loop.asked == [Question("resize", {"name": "vda", "size_bytes": 8192})] * 2


@pytest.mark.parametrize(
    "arguments",
    [
        *({}, [], 7, None, {"name": "vda"}, {"name": 1, "size_bytes": 1}),
        *({"name": "vda", "size_bytes": size} for size in ("8192", True, 1.5)),
        {"name": "vda", "size_bytes": 8192, "more": 1},
    ],
)
def test_a_change_with_other_arguments_does_not_reach_the_loop(loop: Loop, connect: Connect, arguments: object) -> None:
    answer = connect().ask({"execute": "resize", "arguments": arguments})
    assert answer["error"]["desc"] == "'resize' takes the arguments 'name' (a string), 'size_bytes' (a whole number)"
    assert loop.questions == 0


def test_a_change_is_seen_by_the_next_question_at_once(loop: Loop, connect: Connect) -> None:
    client = connect()
    assert client.ask({"execute": "status"}) == {"return": {"state": "serving"}}
    loop.value = {"state": "changed"}
    client.ask({"execute": "resize", "arguments": {"name": "vda", "size_bytes": 8192}})
    assert client.ask({"execute": "status"}) == {"return": {"state": "changed"}}


def test_several_commands_in_one_packet_are_answered_in_order(connect: Connect) -> None:
    client = connect()
    lines = [json.dumps({"execute": name, "id": n}).encode() for n, name in enumerate(["status", "x", "status"])]
    client.send(b"\n".join(lines))
    assert [client.receive()["id"] for _ in lines] == [0, 1, 2]


def test_a_command_may_come_byte_by_byte(connect: Connect) -> None:
    client = connect()
    for byte in b'{"execute": "status"}\n':
        client.socket.sendall(bytes([byte]))
    assert "return" in client.receive()


def test_a_line_without_end_is_cut_off(connect: Connect) -> None:
    client = connect()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for _ in range(100):
            client.socket.sendall(b"x" * control_server.LINE_BYTES)
    with contextlib.suppress(ConnectionResetError):
        answer = client.receive()
        assert answer is None or "longer than" in answer["error"]["desc"]
        assert client.receive() is None
    assert "return" in connect().ask({"execute": "status"})


def test_a_flood_of_clients_costs_the_loop_few_answers(loop: Loop, connect: Connect) -> None:
    started = time.monotonic()
    client = connect()
    for _ in range(500):
        client.ask({"execute": "status"})
    elapsed = time.monotonic() - started
    assert 1 <= loop.questions <= elapsed / control_server.ANSWER_KEPT_S + 2


def test_many_who_ask_at_once_share_one_question(loop: Loop, connect: Connect) -> None:
    clients = [connect() for _ in range(control_server.CLIENTS)]
    loop.answering.clear()
    time.sleep(0.1)
    for client in clients:
        client.send({"execute": "status"})
    time.sleep(0.1)
    loop.answering.set()
    for client in clients:
        assert client.receive() == {"return": {"state": "serving"}}
    assert loop.questions <= 2


def test_one_more_client_than_allowed_takes_the_place_of_the_quietest(connect: Connect) -> None:
    clients = [connect() for _ in range(control_server.CLIENTS)]
    for client in clients[1:]:
        client.ask({"execute": "status"})
    newest = connect()
    assert clients[0].receive() is None, "the one that had never asked has been dropped"
    assert "return" in newest.ask({"execute": "status"})
    assert "return" in clients[1].ask({"execute": "status"})


def test_one_that_asks_and_never_reads_is_dropped_and_holds_up_nobody(loop: Loop, connect: Connect) -> None:
    loop.value = {"text": "x" * 50_000}
    greedy = connect()
    with contextlib.suppress(BrokenPipeError):
        while _writable(greedy.socket):
            greedy.send({"execute": "status"})
    assert "return" in connect().ask({"execute": "status"})
    gone = select.poll()
    gone.register(greedy.socket, 0)
    assert gone.poll(TIMEOUT_S * 1000), "the server has closed it"


def _writable(connection: socket.socket) -> bool:
    return bool(select.select([], [connection], [], 0.2)[1])


def test_a_loop_that_does_not_answer_is_told_to_those_who_wait(loop: Loop, connect: Connect) -> None:
    loop.answering.clear()
    time.sleep(0.1)
    client = connect()
    client.send({"execute": "status"})
    assert client.receive() == {"error": {"class": "GenericError", "desc": "the daemon does not answer"}}
    loop.answering.set()
    wait_for(lambda: loop.questions == 1)
    assert "return" in client.ask({"execute": "status"})


def test_an_answer_that_is_too_large_is_an_error(loop: Loop, connect: Connect) -> None:
    loop.value = "x" * 400_000
    assert connect().ask({"execute": "status"})["error"]["desc"] == "the answer is too large"


def test_the_server_ends_with_the_loop(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "control")
    process = loop.channel._process
    assert process is not None
    assert loop.channel._socket is not None
    loop._ended = True
    loop._thread.join()
    loop.channel._socket.close()
    assert process.wait(TIMEOUT_S) == 0
    loop.channel._socket = None
    loop.close()


def test_signals_of_a_terminal_leave_the_server_alone(loop: Loop, connect: Connect) -> None:
    client = connect()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        os.kill(loop.channel.server_pid, number)
    assert "return" in client.ask({"execute": "status"})


def test_the_server_is_small_and_imports_nothing_of_ours(loop: Loop, connect: Connect) -> None:
    connect()
    status = Path(f"/proc/{loop.channel.server_pid}/status").read_text()
    assert int(status.split("VmRSS:")[1].split()[0]) < 20_000
    assert "vhostcache/engine" not in Path(f"/proc/{loop.channel.server_pid}/maps").read_text()
    descriptors = os.listdir(f"/proc/{loop.channel.server_pid}/fd")
    assert len(descriptors) < 10, "it inherits nothing but its two sockets"


def test_a_dead_server_is_started_again_ever_more_slowly_and_clients_only_wait(tmp_path: Path) -> None:
    watched: list[int] = []
    channel = ControlChannel(Listener(str(tmp_path / "control")), "9.9", watched.append)
    now_ns = 0
    delays = []
    channel.start(now_ns)
    for _ in range(9):
        os.kill(channel.server_pid, signal.SIGKILL)
        assert select.select([watched[-1]], [], [], TIMEOUT_S)[0]
        assert channel.readable(now_ns) is None
        delays.append((channel.restart_at_ns - now_ns) // 10**6)
        now_ns = channel.restart_at_ns
        channel.restart(now_ns)
        assert channel.restart_at_ns == NEVER
    assert delays == [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]
    client = Client(tmp_path / "control")
    assert client.greeting
    client.close()
    now_ns += 61 * 10**9
    os.kill(channel.server_pid, signal.SIGKILL)
    assert select.select([watched[-1]], [], [], TIMEOUT_S)[0]
    assert channel.readable(now_ns) is None
    assert channel.restart_at_ns - now_ns == 100 * 10**6, "one that had lived long starts anew"
    channel.close()
    assert not (tmp_path / "control").exists()


def test_a_server_that_hangs_does_not_hold_up_the_loop(tmp_path: Path) -> None:
    watched: list[int] = []
    channel = ControlChannel(Listener(str(tmp_path / "control")), "9.9", watched.append)
    channel.start(0)
    os.kill(channel.server_pid, signal.SIGSTOP)
    assert channel.readable(0) == NO_QUESTION
    for _ in range(1000):
        channel.reply({"text": "x" * 10_000})
    channel.close()


# The client.


def test_query_returns_what_the_daemon_returns(loop: Loop) -> None:
    assert query(str(loop.path), "status") == {"state": "serving"}


def test_query_says_in_one_line_what_is_wrong(tmp_path: Path, loop: Loop) -> None:
    def message(path: Path, command: str = "status") -> str:
        with pytest.raises(ControlError) as caught:
            query(str(path), command)
        return str(caught.value)

    assert "does not exist; is the daemon running" in message(tmp_path / "none")
    (tmp_path / "file").touch()
    assert "nobody listens there" in message(tmp_path / "file")
    assert "the commands are" in message(loop.path, "quit")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "other"))
        other.listen()
        thread = threading.Thread(target=_speak_nonsense, args=[other])
        thread.start()
        assert "does not speak vhostcache's control protocol" in message(tmp_path / "other")
        thread.join()
    assert "too long" in message(tmp_path / ("x" * 200))


def _speak_nonsense(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.sendall(b'{"QMP": {}}\n')


def test_the_server_runs_by_itself_without_our_package() -> None:
    """-I -S: no site-packages, no environment."""
    listener, loop = socket.socket(socket.AF_UNIX), socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind("")
    listener.listen()
    descriptors = (listener.fileno(), loop[1].fileno())
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", control_server.__file__, *map(str, descriptors), "1"],
        pass_fds=descriptors,
        env={},
    )
    loop[1].close()
    client = socket.socket(socket.AF_UNIX)
    client.connect(listener.getsockname())
    client.settimeout(TIMEOUT_S)
    assert client.recv(1000).startswith(b'{"vhostcache"')
    loop[0].close()
    assert process.wait(TIMEOUT_S) == 0
    client.close()
    listener.close()
