"""SIGKILL to the daemon under a guest at work: with a cache file the guest has nothing to notice but a pause.

KILLS says how often each test kills (4 without it). Half of the kills are followed by another one in the midst of the
recovery. What each pause was is reported, and bounded only as far as the slowest machine keeps it.
"""

import logging
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

from avocado import Test
from tests.guest import GuestError, host
from tests.guest.daemon import Daemon
from tests.guest.lab import Lab, fio_job, write_command
from tests.guest.qemu import Guest

KILLS = int(os.environ.get("KILLS", "4"))
SEED = int(os.environ.get("KILLS_SEED", "1"))
# Of a start to the guest's next completed request. QEMU tries to connect once a second.
PAUSE_LIMIT_S = 60.0
RECOVERY_WAIT_S = 20.0
# Small: a longer run writes the log all around again and again, and the RAM tier is full.
CACHE = ("--cache-size", "64MiB", "--ram", "16MiB", "--object-size", "1MiB", "--checkpoint-interval", "1s")

progress = logging.getLogger("avocado.test.progress")


def _pass(seed: int | str, number: str) -> str:
    """A fio job whose every block names its pass and its place: data of an earlier pass, which has the right checksum
    too and which fio's crc32c takes for good, is found.
    """
    job = fio_job(8, 12).replace("--randseed=1", f"--randseed={seed}")
    return job.replace("--verify=crc32c", f"--verify=pattern --verify_pattern=0x{number}%o")


class Kills(Test):
    timeout = 600 + 30 * KILLS

    def setUp(self) -> None:
        self.lab = Lab(Path(self.outputdir))
        self.image = self.lab.image()
        self.cache = self.lab.folder / "cache"
        # On a tmpfs, as the default is; short-lived as this test is.
        self.ram_dir = Path("/dev/shm") / self.lab.folder.name
        self.random = random.Random(SEED)
        self.pauses: list[tuple[float, float]] = []

    def tearDown(self) -> None:
        self.lab.close()
        for file in self.ram_dir.glob("*"):
            file.unlink()
        if self.ram_dir.exists():
            self.ram_dir.rmdir()

    def test_verified_writes_survive_kills_of_the_daemon(self) -> None:
        daemon, guest = self._start()
        command = write_command(_pass("$n", "$(printf %08x $n)"), "--fsync=24", "--verify_backlog=512")
        loop = f"n=1; while {command}; do echo $n >/tmp/done; [ -e /tmp/stop ] && exit 0; n=$((n + 1)); done; exit 1"
        guest.begin(f"({loop})")
        self._kill_again_and_again(daemon, guest)
        guest.wait_for("[ -e /tmp/done ]")  # so there are two passes
        guest.run("touch /tmp/stop")
        guest.finish(timeout_s=300)
        last = int(guest.run("cat /tmp/done"))
        self._end(daemon, guest)
        self.assertGreater(last, 1)
        host.verify_fio(self.image, _pass(last, f"{last:08x}"))
        # A canary: data of the pass before is not taken for it.
        with self.assertRaises(GuestError):
            host.verify_fio(self.image, _pass(last - 1, f"{last - 1:08x}"))

    def test_a_file_system_survives_kills_of_the_daemon(self) -> None:
        daemon, guest = self._start()
        guest.run("mkfs.ext4 -q /dev/vda && mount -o discard /dev/vda /mnt")
        fio = (
            "fio --directory=/mnt/$n --name=f --nrfiles=40 --filesize=4k-256k --rw=randwrite --bs=4k --fsync_on_close=1"
        )
        fio += " --verify=crc32c --verify_fatal=1 --randseed=$n --minimal --output=/dev/null"
        # The files of three passes stay, those before are removed: their blocks are discarded and used again.
        work = f"mkdir /mnt/$n && {fio} && rm -rf /mnt/$((n - 3))"
        loop = f"n=1; while {work}; do [ -e /tmp/stop ] && exit 0; n=$((n + 1)); done; exit 1"
        guest.begin(f"({loop})")
        self._kill_again_and_again(daemon, guest)
        guest.run("touch /tmp/stop")
        guest.finish(timeout_s=300)
        guest.run("sync; echo 3 >/proc/sys/vm/drop_caches")
        sums = host.parse_sums(guest.run("cd /mnt && find . -type f -exec sha256sum {} +"))
        guest.run("umount /mnt")
        self._end(daemon, guest)
        host.check_ext4(self.image)
        host.compare_sums(sums, host.ext4_sums(self.image, self.lab.folder / "files"))

    def _start(self) -> tuple[Daemon, Guest]:
        options = ("--cache", str(self.cache), *CACHE, "--ram-dir", str(self.ram_dir))
        return self.lab.export(self.image, *options), self.lab.guest()

    def _kill_again_and_again(self, daemon: Daemon, guest: Guest) -> None:
        in_recovery = 0
        for number in range(KILLS):
            time.sleep(self.random.uniform(0.0, 1.5))
            daemon.kill()
            if number % 2:
                in_recovery += self._kill_in_recovery(daemon)
            started_s = time.monotonic()
            daemon.start()
            ready_s = time.monotonic()
            guest.wait_for_requests(requests=1)
            pause = ready_s - started_s, time.monotonic() - ready_s
            self.pauses.append(pause)
            found = daemon.events("recovered")[0]
            progress.info(
                "kill %d: ready after %.2f s, I/O %.2f s later; %s, %d records, %d more in RAM",
                number + 1,
                *pause,
                found["decision"],
                found["records"],
                found["ram_tier_records"],
            )
            self.assertLess(sum(pause), PAUSE_LIMIT_S)
        report = ", ".join(f"{name} {min(s):.2f} to {max(s):.2f} s" for name, s in self._figures())
        self.whiteboard = f"{KILLS} kills and {in_recovery} in recovery: {report}"
        progress.info(self.whiteboard)

    def _kill_in_recovery(self, daemon: Daemon) -> bool:
        """Starts the daemon and kills it once it has begun to recover: from then on there are two RAM tiers, until
        the new one's superblocks are durable. False: it was over too soon.
        """
        daemon.launch()
        deadline = time.monotonic() + RECOVERY_WAIT_S
        while len(list(self.ram_dir.iterdir())) < 2 and not daemon.events("ready"):
            self.assertLess(time.monotonic(), deadline, "the daemon does not recover")
        time.sleep(self.random.choice([0.0, self.random.uniform(0.0, 0.05)]))
        over = bool(daemon.events("recovered"))
        daemon.kill()
        return not over

    def _figures(self) -> Iterator[tuple[str, list[float]]]:
        yield "ready after", [ready for ready, _ in self.pauses]
        yield "then I/O after", [io for _, io in self.pauses]

    def _end(self, daemon: Daemon, guest: Guest) -> None:
        """What the guest has to say, one more kill, and then the image without the daemon."""
        messages = guest.run("dmesg")
        for bad in ("I/O error", "EXT4-fs error", "blocked for more than", "Remounting"):
            self.assertNotIn(bad, messages)
        guest.power_off()
        daemon.kill()
        host.check_cache(self.cache, self.image, self.ram_dir, dirty=True)
        host.drain_cache(self.cache, self.image, self.ram_dir)
        host.check_cache(self.cache, self.image, self.ram_dir, dirty=False)
