"""Random requests, random kills: the disk against a model of it. A failure prints its seed; SEED repeats it.

A kill takes the daemon only: memory and tmpfs stay, and the front-end goes on where it was. Power loss takes all of
them: the disk then is what it was after some prefix of the requests, which reaches at least to the last flush.
"""

import os
import random
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.frontend import OK, T_DISCARD, T_OUT, T_WRITE_ZEROES, Frontend, GoneError, Request
from tests.guest import GuestError
from tests.native.conftest import FREE, MIB, NativeDaemon
from vhostcache.backend.file import FileBackend

REGION = 8 * MIB  # from FREE on
DISK_BYTES = 64 * MIB
ROUNDS = 12
SOAK_SECONDS = float(os.environ.get("SOAK_SECONDS", "0"))
IN_FLIGHT = 8
DIE_AT = Path(__file__).with_name("die_at.py")
MEMORY = 64 * MIB

Change = tuple[int, int, bytes]  # kind, offset in the region, what is there afterwards


class Victim:
    def __init__(self, folder: Path, ram_dir: Path, *options: str) -> None:
        self.image, self.ram_dir = folder / "vda.img", ram_dir
        with self.image.open("wb") as file:
            file.truncate(DISK_BYTES)
        self.cache = folder / "vda.cache"
        arguments = ("--cache", str(self.cache), "--cache-size", "64MiB", "--ram-dir", str(ram_dir))
        arguments += ("--ram", "16MiB", "--object-size", "1MiB", "--sync-interval", "20ms", *options)
        arguments += ("--destage-after", "50ms", "--checkpoint-interval", "1s")
        self.daemon = NativeDaemon.export(self.image, folder / "vda.sock", *arguments)
        self.socket = folder / "vda.sock"
        self.content = bytearray(REGION)

    def change(self, chance: random.Random, busy: list[tuple[int, int]]) -> Change | None:
        """Something that touches nothing that is in flight."""
        length = 512 * chance.choice((1, 3, 8, 8, 8, 8, 16, 17, 64, 256, 700))
        offset = 512 * chance.randrange((REGION - length) // 512)
        if chance.random() < 0.7:
            offset -= offset % 4096
        if any(offset < end and start < offset + length for start, end in busy):
            return None
        kind = chance.choices((T_OUT, T_DISCARD, T_WRITE_ZEROES), (20, 2, 1))[0]
        return kind, offset, chance.randbytes(length) if kind == T_OUT else bytes(length)

    def submit(self, frontend: Frontend, change: Change) -> Request:
        kind, offset, data = change
        sector = (FREE + offset) // 512
        if kind == T_OUT:
            return frontend.start_write(FREE + offset, data)
        part = frontend.ranges((sector, len(data) // 512, 0))
        return frontend.submit([frontend.header(kind), part, frontend.room(1)])

    def apply(self, change: Change) -> None:
        _, offset, data = change
        self.content[offset : offset + len(data)] = data

    def forget(self) -> None:
        """As if there had never been a cache."""
        self.cache.unlink(missing_ok=True)
        backend = FileBackend(str(self.image), read_only=False, direct=False)
        backend.write_mark(None)
        backend.close()

    def read(self, frontend: Frontend) -> bytes:
        return b"".join(frontend.read(FREE + at, 128 << 10) for at in range(0, REGION, 128 << 10))


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Victim]:
    ram_dir = Path(f"/dev/shm/vhostcache-test-{uuid.uuid4().hex}")
    victim = Victim(tmp_path, ram_dir)
    yield victim
    victim.daemon.reap()
    shutil.rmtree(ram_dir, ignore_errors=True)


@pytest.fixture
def chance() -> random.Random:
    seed = int(os.environ.get("SEED", "0")) or random.SystemRandom().getrandbits(32)
    print(f"SEED={seed}")
    return random.Random(seed)


def rounds() -> Iterator[int]:
    end = time.monotonic() + SOAK_SECONDS
    done = 0
    while done < ROUNDS or time.monotonic() < end:
        yield done
        done += 1


def kill_in(daemon: NativeDaemon, delay_s: float) -> threading.Timer:
    timer = threading.Timer(delay_s, lambda: os.kill(daemon.pid, 9))
    timer.start()
    return timer


def test_nothing_acknowledged_is_lost_by_kills_at_random_moments(victim: Victim, chance: random.Random) -> None:
    victim.daemon.start()
    frontend = Frontend(victim.socket, memory=MEMORY)
    flying: dict[int, tuple[Request, Change]] = {}

    def collect() -> None:
        queue = frontend.queues[0]
        queue.collect()
        for head in [head for head in flying if queue.is_done(head)]:
            request, change = flying.pop(head)
            assert frontend.finish(request).status == OK
            victim.apply(change)

    for _ in rounds():
        timer = kill_in(victim.daemon, chance.uniform(0.02, 0.4))
        try:
            while True:
                collect()
                busy = [(change[1], change[1] + len(change[2])) for _, change in flying.values()]
                change = victim.change(chance, busy) if len(flying) < IN_FLIGHT else None
                if change is not None:
                    request = victim.submit(frontend, change)
                    flying[request.head] = (request, change)
                elif flying:
                    frontend.wait_event([frontend.queues[0].call_fd], time.monotonic() + 20)
                if frontend.is_gone():
                    break
        except GoneError:
            pass
        timer.join()
        victim.daemon.kill()
        frontend.disconnect()
        while chance.random() < 0.4:
            # Killed while it starts: before, in or after its recovery.
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(victim.daemon, "wait_for", lambda *_: [])
                victim.daemon.start()
            time.sleep(chance.uniform(0.15, 0.5))
            victim.daemon.kill()
        victim.daemon.start()
        frontend = Frontend(victim.socket, resume=frontend)
        for request, change in flying.values():
            assert frontend.finish(request).status == OK
            victim.apply(change)
        flying.clear()
        assert victim.read(frontend) == victim.content
    frontend.close()


def test_after_power_loss_the_disk_is_a_prefix_that_reaches_to_the_last_flush(
    victim: Victim, chance: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in rounds():
        victim.daemon.start()
        unflushed: list[Change] = []
        with Frontend(victim.socket, memory=MEMORY) as frontend:
            there = victim.read(frontend)
            assert there == victim.content
            timer = kill_in(victim.daemon, chance.uniform(0.02, 0.4))
            try:
                while True:
                    change = victim.change(chance, [])
                    if change is not None:
                        unflushed.append(change)
                        assert frontend.finish(victim.submit(frontend, change)).status == OK
                    if chance.random() < 0.03:
                        frontend.flush()
                        for flushed in unflushed:
                            victim.apply(flushed)
                        unflushed.clear()
            except GoneError:
                pass
            timer.join()
        victim.daemon.kill()
        shutil.rmtree(victim.ram_dir)
        monkeypatch.setenv("VHOSTCACHE_BOOT_ID", str(uuid.uuid4()))
        victim.daemon.start()
        with Frontend(victim.socket, memory=MEMORY) as frontend:
            there = victim.read(frontend)
        lost = len(unflushed)
        while victim.content != there:
            assert unflushed, f"no prefix of {lost} unflushed requests makes the disk what it is"
            victim.apply(unflushed.pop(0))
        if chance.random() < 0.5:
            victim.daemon.stop()
        else:
            victim.daemon.kill()


# Every step of a start and of an end.


def runs_to_its_end(daemon: NativeDaemon) -> bool:
    """Started, and then stopped; False: it has died on the way."""
    try:
        daemon.start()
        daemon.stop()
    except GuestError as error:
        daemon.reap()
        if "ended with 9" not in str(error):
            raise
        return False
    return True


@pytest.mark.parametrize("state", ["crashed", "new", "drained"])
def test_a_start_that_dies_at_any_step_is_no_obstacle_for_the_next(victim: Victim, state: str) -> None:
    """And neither is an end. COUNT = 1, 2, 3, ... until nothing dies any more."""
    plain, data = victim.daemon.program, random.Random(state).randbytes(MIB)
    if state == "drained":
        victim.daemon.arguments.append("--drain-on-exit")
    if state != "new":
        victim.daemon.start()
        with Frontend(victim.socket, memory=MEMORY) as frontend:
            frontend.write(FREE, data)
        if state == "crashed":
            victim.daemon.kill()
        else:
            victim.daemon.stop()
    died = True
    count = 0
    while died:
        count += 1
        if state == "new":
            victim.forget()
        victim.daemon.program = [sys.executable, str(DIE_AT), str(count)]
        died = not runs_to_its_end(victim.daemon)
        victim.daemon.program = plain
        victim.daemon.start()
        with Frontend(victim.socket, memory=MEMORY) as frontend:
            if state != "new":
                assert frontend.read(FREE, MIB) == data, f"step {count}"
            data = random.Random(count).randbytes(MIB)
            frontend.write(FREE, data)
        if state == "crashed":
            victim.daemon.kill()
        else:
            victim.daemon.stop()
        assert len(list(victim.ram_dir.iterdir())) == (1 if state == "crashed" else 0)
    assert count > 8
