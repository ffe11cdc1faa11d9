"""Runs in user-mode-linux: `python3 -m tests.guest.replay CACHE IMAGE LOG DEVICE` serves IMAGE with the cache CACHE,
and asks for all that LOG, a log of dm-log-writes, has. After each flush that was answered it puts a mark into the log
of the dm-log-writes device DEVICE: how many writes had been answered before the flush was asked for.
"""

import subprocess
import sys
from pathlib import Path

from tests.frontend import Frontend, Request
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

        for step in steps(Path(log)):
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


def mark(device: str, done: int) -> None:
    subprocess.run(["dmsetup", "message", "--noudevsync", device, "0", "mark", str(done)], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
