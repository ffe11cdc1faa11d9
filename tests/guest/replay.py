"""Runs in user-mode-linux: `python3 -m tests.guest.replay CACHE IMAGE LOG DEVICE` serves IMAGE with the cache CACHE,
and asks for all that LOG, a log of dm-log-writes, has. After each flush that was answered it puts a mark into the log
of the dm-log-writes device DEVICE: how many writes had been answered before the flush was asked for.
"""

import subprocess
import sys
import time
from pathlib import Path

from tests.frontend import Frontend, Request
from tests.guest import GuestError
from tests.guest.daemon import Daemon
from tests.guest.log_writes import steps

IN_FLIGHT = 8
MEMORY = 64 << 20
OPTIONS = ("--ram", "16MiB", "--object-size", "1MiB", "--destage-after", "1s", "--checkpoint-interval", "1s")


def main(cache: str, image: str, log: str, device: str) -> None:
    folder = Path("/dev/shm")
    options = ("--cache", cache, "--ram-dir", str(folder / "ram"), *OPTIONS)
    daemon = Daemon.export(Path(image), folder / "vda.sock", *options)
    daemon.start()
    done = 0
    flying: list[tuple[int, int, Request]] = []
    with Frontend(folder / "vda.sock", memory=MEMORY) as frontend:

        def finish() -> None:
            nonlocal done
            for _, _, request in flying:
                frontend.insist(frontend.finish(request), "write")
            done += len(flying)
            flying.clear()

        work = list(steps(Path(log)))
        for number, step in enumerate(work):
            if number == 2 * len(work) // 3:
                finish()
                wait_for_destaging(daemon)
            if isinstance(step, str):
                continue
            if step is None:
                finish()
                frontend.flush()
                mark(device, done)
                continue
            offset, data = step
            end = offset + len(data)
            # What overlaps is not in flight together: its order would be anybody's.
            if len(flying) == IN_FLIGHT or any(offset < e and o < end for o, e, _ in flying):
                finish()
            flying.append((offset, end, frontend.start_write(offset, data)))
        finish()
    print(daemon.stop()["vda"]["log"])


def wait_for_destaging(daemon: Daemon) -> None:
    """So that there are moments behind it, however fast the machine is."""
    deadline = time.monotonic() + 60
    while not daemon.statistics()["vda"]["blocks_destaged"]:
        if time.monotonic() > deadline:
            raise GuestError("nothing is destaged")
        time.sleep(0.1)


def mark(device: str, done: int) -> None:
    subprocess.run(["dmsetup", "message", "--noudevsync", device, "0", "mark", str(done)], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
