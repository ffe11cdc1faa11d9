"""The control server: a helper process between people and the loop.

Run by the daemon as `python -I -S control_server.py LISTEN_FD LOOP_FD VERSION`, never imported by it. Standard library
only: it starts in a few milliseconds and stays small.

It speaks JSON lines like QEMU's QMP to any number of clients (docs/control-protocol.md), and asks the loop by one
datagram at a time, a command and its arguments. Answers to questions are kept for a moment, so that a flood of clients
costs the loop at most ten small answers a second; what changes something is passed on each time, one after the other.
Every client has limits: the length of a line, what it leaves unread, how long it may be silent when others wait. It
ends when the loop does.

Never trusts a client: names and types of arguments are checked here, what they mean by the loop.
"""

from __future__ import annotations

import json
import select
import signal
import socket
import sys
import time

LINE_BYTES = 4096  # of a request; the longest one that makes sense has some 60
CLIENTS = 16
UNREAD_BYTES = 1 << 20  # of answers that a client has not taken
UNREAD_S = 2.0
ANSWER_BYTES = 400_000
ANSWER_KEPT_S = 0.1
LOOP_TIMEOUT_S = 5.0

QUESTIONS = ("status",)  # without arguments: everybody within a moment may have the same answer
CHANGES: dict[str, dict[str, type]] = {  # with arguments, all of which must be there
    "resize": {"name": str, "size_bytes": int},
    "set": {"name": str, "values": dict},
    "retry": {"name": str},
}
COMMANDS = (*QUESTIONS, *CHANGES, "query-commands")


_TYPE_NAMES = {str: "a string", int: "a whole number", dict: "an object"}


class Client:
    """One connection: what it has sent so far, and what it has still to read."""

    def __init__(self, connection: socket.socket, now: float) -> None:
        self.connection = connection
        self.received = b""
        self.to_send = b""
        self.waiting = False  # for the loop's answer; its next request is not looked at before
        self.identity: object = None
        self.has_identity = False
        self.last_s = now  # when it last did something


class Server:
    """All of it, in one thread around poll."""

    def __init__(self, listener: socket.socket, loop: socket.socket, version: str) -> None:
        self.listener = listener
        self.loop = loop
        self.version = version
        self.clients: dict[int, Client] = {}
        self.waiting: dict[str, list[Client]] = {command: [] for command in QUESTIONS}
        self.changes: list[tuple[Client, str, dict[str, object]]] = []  # in order; one of each client at most
        self.asked = ""  # the command that the loop is answering
        self.asked_for: Client | None = None  # whose change that is
        self.asked_s = 0.0
        self.kept: dict[str, tuple[float, object]] = {}
        self.poll = select.poll()
        self.poll.register(listener, select.POLLIN)
        self.poll.register(loop, select.POLLIN)

    def run(self) -> None:
        """Until the loop is gone."""
        while True:
            timeout_ms = 1000 if self.clients else None
            for descriptor, events in self.poll.poll(timeout_ms):
                if descriptor == self.loop.fileno():
                    if not self.answer_from_loop():
                        return
                elif descriptor == self.listener.fileno():
                    self.accept()
                elif (client := self.clients.get(descriptor)) is not None:
                    if events & select.POLLOUT:
                        self.flush(client)
                    if events & (select.POLLIN | select.POLLHUP | select.POLLERR):
                        self.receive(client)
            self.drop_slow()

    def accept(self) -> None:
        try:
            connection, _ = self.listener.accept()
        except OSError:
            return
        connection.setblocking(False)
        now = time.monotonic()
        if len(self.clients) >= CLIENTS:
            self.drop(min(self.clients.values(), key=lambda client: client.last_s))
        client = Client(connection, now)
        self.clients[connection.fileno()] = client
        self.poll.register(connection, select.POLLIN)
        self.send(client, {"vhostcache": {"version": self.version, "commands": list(COMMANDS)}})

    def receive(self, client: Client) -> None:
        try:
            data = client.connection.recv(LINE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.drop(client)
            return
        client.last_s = time.monotonic()
        client.received += data
        self.serve(client)

    def serve(self, client: Client) -> None:
        """Its complete lines, one after the other: the next one when the one before has been answered."""
        while not client.waiting and self.clients.get(client.connection.fileno()) is client:
            line, end, rest = client.received.partition(b"\n")
            if not end:
                break
            client.received = rest
            if line.strip():
                self.execute(client, line)
        if len(client.received) > LINE_BYTES:
            client.has_identity = False
            self.fail(client, "GenericError", f"a line is longer than {LINE_BYTES} bytes")
            self.drop(client)

    def execute(self, client: Client, line: bytes) -> None:
        client.has_identity = False
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            self.fail(client, "GenericError", "not a line of JSON")
            return
        if not isinstance(request, dict):
            self.fail(client, "GenericError", "expected an object with the key 'execute'")
            return
        client.has_identity = "id" in request
        client.identity = request.pop("id", None)
        command = request.pop("execute", None)
        arguments = request.pop("arguments", {})
        if not isinstance(command, str) or request:
            self.fail(client, "GenericError", "expected the keys 'execute' and 'id' alone")
        elif command not in COMMANDS:
            self.fail(client, "CommandNotFound", f"the commands are {', '.join(COMMANDS)}")
        elif command in CHANGES:
            self.change(client, command, arguments)
        elif arguments != {}:
            self.fail(client, "GenericError", f"'{command}' takes no arguments")
        elif command == "query-commands":
            self.reply(client, "return", [{"name": name} for name in COMMANDS])
        else:
            self.ask(client, command)

    def ask(self, client: Client, command: str) -> None:
        now = time.monotonic()
        kept = self.kept.get(command)
        if kept is not None and now - kept[0] < ANSWER_KEPT_S:
            self.reply(client, "return", kept[1])
            return
        client.waiting = True
        self.waiting[command].append(client)
        self.ask_loop()

    def change(self, client: Client, command: str, arguments: object) -> None:
        wanted = CHANGES[command]
        given = arguments if isinstance(arguments, dict) else {}
        # An exact type: true is an int too.
        if given.keys() != wanted.keys() or any(type(given[name]) is not kind for name, kind in wanted.items()):
            names = ", ".join(f"'{name}' ({_TYPE_NAMES[kind]})" for name, kind in wanted.items())
            self.fail(client, "GenericError", f"'{command}' takes the arguments {names}")
            return
        client.waiting = True
        self.changes.append((client, command, given))
        self.ask_loop()

    def ask_loop(self) -> None:
        if self.asked:
            return
        client: Client | None = None
        arguments: dict[str, object] = {}
        if self.changes:
            client, command, arguments = self.changes.pop(0)
        else:
            command = next((command for command, clients in self.waiting.items() if clients), "")
        if not command:
            return
        try:
            self.loop.send(json.dumps({"execute": command, "arguments": arguments}).encode())
        except OSError:
            return  # the end of the loop is seen when it is read
        self.asked, self.asked_s, self.asked_for = command, time.monotonic(), client

    def answer_from_loop(self) -> bool:
        """False: the loop is gone."""
        try:
            data = self.loop.recv(ANSWER_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not data:
            return False
        command, self.asked = self.asked, ""
        answer = json.loads(data)
        clients = self.take_waiting(command)
        if command in self.waiting and "error" not in answer:
            self.kept[command] = (time.monotonic(), answer["return"])
        elif command in CHANGES:
            self.kept.clear()
        for client in clients:
            if self.clients.get(client.connection.fileno()) is client:
                client.waiting = False
                if "error" in answer:
                    self.fail(client, "GenericError", answer["error"])
                else:
                    self.reply(client, "return", answer["return"])
                self.serve(client)
        self.ask_loop()
        return True

    def take_waiting(self, command: str) -> list[Client]:
        """Those for whom the loop was asked this."""
        if command in self.waiting:
            clients, self.waiting[command] = self.waiting[command], []
            return clients
        client, self.asked_for = self.asked_for, None
        return [client] if client is not None else []

    def reply(self, client: Client, kind: str, value: object) -> None:
        message: dict[str, object] = {kind: value}
        if client.has_identity:
            message["id"] = client.identity
        self.send(client, message)

    def fail(self, client: Client, kind: str, description: str) -> None:
        self.reply(client, "error", {"class": kind, "desc": description})

    def send(self, client: Client, message: object) -> None:
        if not client.to_send:
            client.last_s = time.monotonic()
        client.to_send += json.dumps(message).encode() + b"\n"
        self.flush(client)

    def flush(self, client: Client) -> None:
        try:
            sent = client.connection.send(client.to_send, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.drop(client)
            return
        if sent:
            client.to_send = client.to_send[sent:]
            client.last_s = time.monotonic()
        if len(client.to_send) > UNREAD_BYTES:
            self.drop(client)
            return
        # Who does not read is not read from either.
        wanted = select.POLLOUT if client.to_send else select.POLLIN
        self.poll.modify(client.connection, wanted)

    def drop_slow(self) -> None:
        now = time.monotonic()
        for client in list(self.clients.values()):
            if client.to_send and now - client.last_s > UNREAD_S:
                self.drop(client)
        if self.asked and now - self.asked_s > LOOP_TIMEOUT_S:
            # The loop may be waiting for a disk; its clients should not wait with it. The late answer is taken when it
            # comes.
            for client in self.take_waiting(self.asked):
                if self.clients.get(client.connection.fileno()) is client:
                    client.waiting = False
                    self.fail(client, "GenericError", "the daemon does not answer")

    def drop(self, client: Client) -> None:
        if self.clients.pop(client.connection.fileno(), None) is not None:
            self.poll.unregister(client.connection)
            client.connection.close()


def main() -> None:
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # a terminal sends them to the whole group
    listener = socket.socket(fileno=int(sys.argv[1]))
    loop = socket.socket(fileno=int(sys.argv[2]))
    listener.setblocking(False)
    loop.setblocking(False)
    Server(listener, loop, sys.argv[3]).run()


if __name__ == "__main__":
    main()
