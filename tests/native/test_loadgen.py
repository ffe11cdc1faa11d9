"""`vhostcache bench`: it measures any server, verifies what it wrote, and says in one line what is wrong with a server.

A verification that never fails proves nothing, so here it is shown data that was lost, torn, misplaced and old; and a
server of our own that breaks every rule.
"""

import itertools
import json
import mmap
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.native.conftest import DISK_BYTES, FREE, MIB, QUEUES, Disk, bench
from vhostcache._loadgen import lib

PROGRAM = Path(sys.executable).with_name("vhostcache")
QSD = "qemu-storage-daemon"
SEED = ("--seed", "4711")
SHAPE = ("--offset", "4m", "--size", "8m")


def test_crc32c_is_crc32c() -> None:
    assert lib.lg_crc32c(0, b"123456789", 9) == 0xE3069283
    assert lib.lg_crc32c(0, bytes(32), 32) == 0x8A9136AA
    assert lib.lg_crc32c(lib.lg_crc32c(0, b"1234", 4), b"56789", 5) == 0xE3069283


def test_histogram_buckets_are_in_order_and_narrow() -> None:
    bounds = [lib.lg_bucket_ns(i) for i in range(3000)]
    assert bounds == sorted(set(bounds))
    assert all(b < 128 or (c - b) / b < 0.016 for b, c in itertools.pairwise(bounds))


# -- against the real daemon --


def job_of(result: subprocess.CompletedProcess[str]) -> dict[str, object]:
    assert result.returncode == 0, result.stderr
    (job,) = json.loads(result.stdout)["jobs"]
    return job


@pytest.mark.parametrize("poll", [(), ("--poll",)], ids=["sleeping", "polling"])
@pytest.mark.parametrize(
    "options",
    [
        ("--rw", "randwrite", "--bs", "4k", "--iodepth", "32", "--fsync", "16"),
        ("--rw", "randrw", "--bs", "4k", "--iodepth", "16", "--numjobs", str(QUEUES)),
        ("--rw", "randrw", "--bs", "512", "--iodepth", "32"),
        ("--rw", "randwrite", "--bs", "1536", "--iodepth", "8", "--fsync", "7", "--indirect"),
        ("--rw", "write", "--bs", "64k", "--iodepth", "4"),
        ("--rw", "rw", "--bs", "256k", "--iodepth", "4", "--no-event-idx"),
        ("--rw", "randwrite", "--bs", "1m", "--iodepth", "2", "--no-inflight"),
        ("--rw", "randwrite", "--bs", "4k", "--iodepth", "1", "--fsync", "1"),
        ("--rw", "randzero", "--bs", "16k", "--iodepth", "8"),
        ("--rw", "zero", "--bs", "4k", "--iodepth", "8", "--numjobs", "2"),
    ],
    ids=lambda o: " ".join(o),
)
def test_verified_load_verifies(disk: Disk, options: tuple[str, ...], poll: tuple[str, ...]) -> None:
    result = bench(disk.socket, *options, *poll, "--offset", "8m", "--size", "32m", "--io_size", "6m", "--verify",
                   "crc32c", "--json")  # fmt: skip
    job = job_of(result)
    assert job["verified_bytes"] > 0
    if "--fsync" in options:
        assert job["sync"]["total_ios"] > 0
    if poll:
        assert job["interrupts"] == 0


def test_load_larger_than_the_ram_verifies(disk: Disk) -> None:
    result = bench(disk.socket, "--rw", "randwrite", "--bs", "64k", "--iodepth", "16", "--offset", "4m", "--io_size",
                   "100m", "--verify", "crc32c", "--json")  # fmt: skip
    assert job_of(result)["verified_bytes"] > 0


def test_trims_are_done_and_counted(disk: Disk) -> None:
    job = job_of(bench(disk.socket, "--rw", "randtrim", "--bs", "64k", "--number_ios", "50", *SHAPE, "--json"))
    assert job["trim"]["total_ios"] == 50
    assert job["trim"]["io_bytes"] == 50 * 65536


def test_the_report_has_fios_fields_and_adds_up(disk: Disk) -> None:
    job = job_of(bench(disk.socket, "--rw", "randrw", "--number_ios", "2000", "--iodepth", "8", *SHAPE, "--json"))
    assert job["read"]["total_ios"] + job["write"]["total_ios"] == 2000
    for kind in ("read", "write"):
        latency = job[kind]["clat_ns"]
        assert latency["N"] == job[kind]["total_ios"]
        p = latency["percentile"]
        assert latency["min"] <= p["50.000000"] <= p["99.000000"] <= p["99.900000"] <= latency["max"]
        assert latency["min"] <= latency["mean"] <= latency["max"]
        assert job[kind]["io_bytes"] == 4096 * latency["N"]


def test_a_run_can_be_verified_later_by_its_seed(disk: Disk) -> None:
    load = ("--rw", "randrw", "--iodepth", "16", "--numjobs", "2", "--number_ios", "700", *SHAPE, *SEED)
    assert bench(disk.socket, *load).returncode == 0
    again = bench(disk.socket, *load, "--verify_only")
    assert again.returncode != 0, "what was written without --verify carries no mark"
    assert bench(disk.socket, *load, "--verify", "crc32c").returncode == 0
    assert job_of(bench(disk.socket, *load, "--verify_only", "--json"))["verified_bytes"] > 0
    other = bench(disk.socket, *load[:-1], "4712", "--verify_only")
    assert other.returncode == 1
    assert "another run" in other.stderr or "write" in other.stderr


def test_what_a_broken_off_run_had_acknowledged_can_be_verified(make_disk: Callable[..., Disk], tmp_path: Path) -> None:
    disk, state = make_disk(), str(tmp_path / "state")
    load = ("--rw", "randwrite", "--iodepth", "16", *SHAPE, "--verify_state", state)
    stop = threading.Timer(0.7, disk.daemon.stop)
    stop.start()
    result = bench(disk.socket, *load, "--runtime", "30", "--verify", "crc32c")
    stop.join()
    assert result.returncode == 1
    assert "closed the connection" in result.stderr
    disk.daemon.start()
    job = job_of(bench(disk.socket, *load, "--verify_only", "--json"))
    assert job["verified_bytes"] > 0
    disk.assert_good()


def test_what_one_run_writes_another_may_verify(disk: Disk, tmp_path: Path) -> None:
    load = ("--rw", "randwrite", "--iodepth", "16", "--number_ios", "500", *SHAPE)
    load += ("--verify_state", str(tmp_path / "state"))
    job = job_of(bench(disk.socket, *load, "--verify", "crc32c", "--do_verify", "0", "--json"))
    assert job["verified_bytes"] == 0
    assert job_of(bench(disk.socket, *load, "--verify_only", "--json"))["verified_bytes"] > 0


def test_a_series_adds_up_to_the_whole_run(disk: Disk) -> None:
    load = ("--rw", "randrw", "--iodepth", "8", "--numjobs", "2", "--number_ios", "3000", "--fsync", "16", *SHAPE)
    job = job_of(bench(disk.socket, *load, "--log_avg_msec", "20", "--json"))
    series = job["series"]
    for kind in ("read", "write", "sync"):
        assert sum(interval[kind]["ios"] for interval in series if kind in interval) == job[kind]["total_ios"]
    assert all(a["end_s"] == b["begin_s"] for a, b in itertools.pairwise(series))
    busy = [interval["write"]["lat_ns"] for interval in series if "write" in interval]
    assert all(p["50.000000"] <= p["99.000000"] <= p["100.000000"] for p in busy)
    # The upper bound of a bucket.
    assert max(p["100.000000"] for p in busy) >= job["write"]["clat_ns"]["max"] * 0.999


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda old, other: bytes(4096), "found zeroes"),
        (lambda old, other: other, "found write"),
        (lambda old, other: old[:1024] + bytes([old[1024] ^ 1]) + old[1025:], "torn"),
        (lambda old, other: b"\xa5" * 4096, "not ours"),
    ],
    ids=["lost", "misplaced", "torn", "foreign"],
)
def test_damage_is_found_and_named(
    make_disk: Callable[..., Disk], damage: Callable[[bytes, bytes], bytes], complaint: str
) -> None:
    disk = make_disk()
    load = ("--rw", "write", "--offset", "4m", "--size", "1m", *SEED)
    assert bench(disk.socket, *load, "--verify", "crc32c", "--end_fsync").returncode == 0
    disk.daemon.stop()
    old, other = disk.in_image(FREE + 20480, 4096), disk.in_image(FREE + 40960, 4096)
    with disk.image.open("r+b") as image:
        image.seek(FREE + 20480)
        image.write(damage(old, other))
    disk.daemon.start()
    result = bench(disk.socket, *load, "--verify_only")
    assert result.returncode == 1
    assert f"offset {FREE + 20480}" in result.stderr
    assert complaint in result.stderr
    assert result.stderr.count("\n") == 1
    disk.assert_good()


def test_an_old_write_is_found(make_disk: Callable[..., Disk]) -> None:
    """The same blocks written twice: the first version is right in itself, and still wrong."""
    disk = make_disk()
    once = ("--rw", "write", "--offset", "4m", "--size", "1m", *SEED, "--end_fsync")
    assert bench(disk.socket, *once, "--verify", "crc32c").returncode == 0
    old = disk.in_image(FREE, 4096)
    twice = (*once, "--io_size", "2m")
    assert bench(disk.socket, *twice, "--verify", "crc32c").returncode == 0
    disk.daemon.stop()
    assert disk.in_image(FREE, 4096) != old
    with disk.image.open("r+b") as image:
        image.seek(FREE)
        image.write(old)
    disk.daemon.start()
    result = bench(disk.socket, *twice, "--verify_only")
    assert result.returncode == 1
    assert "found write 1 of" in result.stderr
    disk.assert_good()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--bs", "4x"), "is not a size"),
        (("--bs", "100"), "multiple of 512"),
        (("--offset", "100"), "multiple of 512"),
        (("--size", "1g"), "does not fit"),
        (("--offset", "64m"), "does not fit"),
        (("--numjobs", str(QUEUES + 1)), f"{QUEUES} queues"),
        (("--size", "4k", "--numjobs", "2"), "less than one block"),
        (("--rw", "trim", "--verify", "crc32c"), "cannot be verified"),
        (("--verify_only",), "--seed"),
        (("--cpus", "x"), "list of processors"),
        (("--cpus", "999"), "--cpus 999"),
        (("--verify_only", "--verify_state", "/nonexistent"), "/nonexistent"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(disk: Disk, options: tuple[str, ...], complaint: str) -> None:
    result = bench(disk.socket, *options)
    assert result.returncode in (1, 2)
    assert complaint in result.stderr
    assert result.stderr.startswith("vhostcache: ")
    assert result.stderr.count("\n") == 1


def test_a_read_only_disk_is_not_written(make_disk: Callable[..., Disk]) -> None:
    disk = make_disk("--read-only")
    result = bench(disk.socket, "--rw", "randwrite", "--number_ios", "1")
    assert (result.returncode, "read-only" in result.stderr) == (1, True)
    assert bench(disk.socket, "--rw", "randread", "--number_ios", "100").returncode == 0


def test_no_server_is_said_in_one_line(tmp_path: Path) -> None:
    result = bench(tmp_path / "nobody.sock")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "No such file" in result.stderr


# -- against another server --


def test_qemu_storage_daemon_is_driven_and_verified(tmp_path: Path) -> None:
    image, sock = tmp_path / "disk.img", tmp_path / "qsd.sock"
    image.write_bytes(bytes(16 * MIB))
    server = subprocess.Popen(
        [
            *(QSD, "--blockdev", f"file,node-name=f,filename={image}"),
            *("--export", f"vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={sock},writable=on,num-queues=2"),
        ]
    )
    try:
        deadline = time.monotonic() + 20
        while not sock.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        for poll in ((), ("--poll",)):
            load = ("--rw", "randrw", "--iodepth", "16", "--numjobs", "2", "--io_size", "4m", "--fsync", "8", *poll)
            assert job_of(bench(sock, *load, "--verify", "crc32c", "--json"))["verified_bytes"] > 0
    finally:
        server.kill()
        server.wait()


# -- against servers that misbehave --


class Server:
    """A vhost-user back-end for one connection and one queue, in a thread, that does as its `serve` pleases.

    `serve(server)` is called whenever the queue has been kicked, and may use `heads` and `complete`.
    """

    FEATURES = 1 << 32 | 1 << 30 | 1 << 9 | 1 << 14
    PROTOCOL = 1 << 0 | 1 << 3 | 1 << 9

    def __init__(self, path: Path, serve: Callable[["Server"], None]) -> None:
        self.serve = serve
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(1)
        self.replies = True
        self.taken = 0
        self.kick = self.call = -1
        self.fds: list[int] = []
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def close(self) -> None:
        """The front-end has ended, and so does the thread."""
        self.thread.join(30)
        self.listener.close()
        for fd in self.fds:
            os.close(fd)

    def run(self) -> None:
        self.sock, _ = self.listener.accept()
        with self.sock:
            while True:
                ready, _, _ = select.select([self.sock, *([self.kick] if self.kick >= 0 else [])], [], [], 30)
                if self.kick in ready:
                    os.eventfd_read(self.kick)
                    try:
                        self.serve(self)
                    except ConnectionAbortedError:
                        return
                elif self.sock in ready and not self.message():
                    return

    def message(self) -> bool:
        data, fds, _, _ = socket.recv_fds(self.sock, 12, 8)
        if len(data) < 12:
            return False
        request, flags, size = struct.unpack("<III", data)
        payload = self.sock.recv(size) if size else b""
        self.fds += fds
        answers = {
            1: self.FEATURES.to_bytes(8, "little"),
            11: payload,
            15: self.PROTOCOL.to_bytes(8, "little"),
            17: (1).to_bytes(8, "little"),
            24: payload[:12] + struct.pack("<Q", DISK_BYTES // 512) + bytes(52),
        }
        if request == 5:
            _, size, self.user, _ = struct.unpack_from("<QQQQ", payload, 8)
            self.memory = mmap.mmap(fds[0], size)
        elif request == 8:
            self.size = struct.unpack("<II", payload)[1]
        elif request == 9:
            _, _, desc, used, available, _ = struct.unpack("<IIQQQQ", payload)
            self.desc, self.used, self.available = (a - self.user for a in (desc, used, available))
        elif request == 12:
            self.kick = fds[0]
        elif request == 13:
            self.call = fds[0]
        if request in answers and self.replies:
            self.sock.sendall(struct.pack("<III", request, 5, len(answers[request])) + answers[request])
        elif flags & 8:
            self.sock.sendall(struct.pack("<III", request, 5, 8) + bytes(8))
        return True

    def heads(self) -> list[int]:
        """What the front-end has published since the last call."""
        (index,) = struct.unpack_from("<H", self.memory, self.available + 2)
        found = []
        while self.taken != index:
            found.append(struct.unpack_from("<H", self.memory, self.available + 4 + 2 * (self.taken % self.size))[0])
            self.taken = (self.taken + 1) & 0xFFFF
        return found

    def status(self, head: int, value: int) -> None:
        """Write the status byte of a chain."""
        at = self.desc + 16 * head
        while True:
            address, _, flags, following = struct.unpack_from("<QIHH", self.memory, at)
            if not flags & 1:
                self.memory[address - (1 << 32)] = value
                return
            at = self.desc + 16 * following

    def complete(self, *heads: int, advance: int | None = None) -> None:
        (index,) = struct.unpack_from("<H", self.memory, self.used + 2)
        for i, head in enumerate(heads):
            struct.pack_into("<II", self.memory, self.used + 4 + 8 * ((index + i) % self.size), head, 1)
        after = (index + (len(heads) if advance is None else advance)) & 0xFFFF
        struct.pack_into("<H", self.memory, self.used + 2, after)
        os.eventfd_write(self.call, 1)


def good(server: Server) -> None:
    heads = server.heads()
    for head in heads:
        server.status(head, 0)
    server.complete(*heads)


def silent(server: Server) -> None:
    pass


def dies(server: Server) -> None:
    raise ConnectionAbortedError


def unknown_head(server: Server) -> None:
    server.complete(99)


def huge_head(server: Server) -> None:
    server.complete(2**32 - 1)


def inside_of_a_chain(server: Server) -> None:
    server.complete(server.heads()[0] + 1)


def the_same_twice(server: Server) -> None:
    head = server.heads()[0]
    server.status(head, 0)
    server.complete(head, head)


def index_jumps(server: Server) -> None:
    server.complete(advance=1000)


def index_goes_back(server: Server) -> None:
    server.complete(advance=-1)


def no_status(server: Server) -> None:
    server.complete(*server.heads())


def io_errors(server: Server) -> None:
    heads = server.heads()
    for head in heads:
        server.status(head, 1)
    server.complete(*heads)


def unsupported(server: Server) -> None:
    heads = server.heads()
    for head in heads:
        server.status(head, 2)
    server.complete(*heads)


def stops_after_a_while(server: Server) -> None:
    if server.taken < 100:
        good(server)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[Callable[[Server], None]], Path]]:
    servers: list[Server] = []

    def start(how: Callable[[Server], None]) -> Path:
        path = tmp_path / f"{len(servers)}.sock"
        servers.append(Server(path, how))
        return path

    yield start
    for server in servers:
        server.close()


@pytest.mark.parametrize("poll", [(), ("--poll",)], ids=["sleeping", "polling"])
@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        (silent, "completed nothing"),
        (stops_after_a_while, "completed nothing"),
        (dies, "closed the connection"),
        (unknown_head, "not in flight"),
        (huge_head, "not in flight"),
        (inside_of_a_chain, "not in flight"),
        (the_same_twice, "not in flight"),
        (index_jumps, "broke the used ring"),
        (index_goes_back, "broke the used ring"),
        (no_status, "without a status"),
        (io_errors, "I/O error"),
        (unsupported, "unsupported"),
    ],
)
def test_a_server_that_misbehaves_gives_one_line_and_status_1(
    serve: Callable[[Callable[[Server], None]], Path],
    how: Callable[[Server], None],
    complaint: str,
    poll: tuple[str, ...],
) -> None:
    result = bench(serve(how), "--rw", "randwrite", "--iodepth", "4", "--runtime", "20", "--timeout", "0.5", *poll)
    assert result.returncode == 1
    assert complaint in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_honest_server_in_python_is_enough(serve: Callable[[Callable[[Server], None]], Path]) -> None:
    result = bench(serve(good), "--rw", "randwrite", "--iodepth", "4", "--number_ios", "300", "--fsync", "10", "--json")
    assert job_of(result)["write"]["total_ios"] == 300


def test_a_server_that_forgets_its_data_is_found_out(serve: Callable[[Callable[[Server], None]], Path]) -> None:
    result = bench(serve(good), "--rw", "write", "--size", "1m", "--verify", "crc32c")
    assert result.returncode == 1
    assert "verification failed at offset" in result.stderr


def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "mute.sock"))
    listener.listen(1)
    result = bench(tmp_path / "mute.sock", "--timeout", "0.5")
    listener.close()
    assert result.returncode == 1
    assert "no answer to GET_FEATURES" in result.stderr


def test_ctrl_c_ends_a_run_with_its_figures(disk: Disk) -> None:
    queues = len(disk.daemon.events("queue"))
    process = subprocess.Popen(
        [PROGRAM, "bench", disk.socket, "--rw", "randread", "--iodepth", "4", "--runtime", "60", "--json"],
        stdout=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores it, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        disk.daemon.wait_for("queue", count=queues + 1)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        try:
            out, _ = process.communicate(timeout=30)
        finally:
            process.kill()
    assert json.loads(out)["jobs"][0]["read"]["total_ios"] > 0
