"""A disk with a cache file under a real guest: its daemon is killed again and again, and the guest does not notice."""

import os
import random
import subprocess
import time
from pathlib import Path

from avocado import Test
from tests.guest import host
from tests.guest.lab import Lab, fio_job, verify, write_command

FIRST = fio_job(0, 24, seed=51)
# How often the daemon is killed under a guest at work; `make soak` does it a hundred times.
KILLS = int(os.environ.get("KILLS", "6"))
AGAIN_S = 1.0  # from the start of a new daemon to the guest's requests


class Cache(Test):
    timeout = 1800

    def setUp(self) -> None:
        self.lab = Lab(Path(self.outputdir))
        self.image = self.lab.image()
        self.ram_dir = Path(f"/dev/shm/vhostcache-guest-{os.getpid()}")
        self.options = ("--cache", str(self.lab.folder / "vda.cache"), "--cache-size", "128MiB", "--ram", "32MiB")
        self.options += ("--ram-dir", str(self.ram_dir), "--destage-after", "200ms")

    def tearDown(self) -> None:
        self.lab.close()
        for path in self.ram_dir.glob("*"):
            path.unlink()
        if self.ram_dir.exists():
            self.ram_dir.rmdir()

    def test_a_daemon_that_is_killed_again_and_again_is_not_noticed_by_the_guest(self) -> None:
        seed = random.SystemRandom().getrandbits(32)
        self.log.info("seed %d", seed)
        moments = random.Random(seed)
        daemon = self.lab.export(self.image, *self.options)
        guest = self.lab.guest()
        # Each block is verified after every loop: what was acknowledged before a kill has to be there after it.
        fio = write_command(FIRST, "--fsync=64")
        guest.begin(f"ok=0; while [ ! -e /tmp/stop ]; do {fio} || {{ ok=1; break; }}; done; [ $ok = 0 ]")
        for _ in range(KILLS):
            guest.wait_for_requests()
            time.sleep(moments.uniform(0, 0.5))
            daemon.kill()
            began = time.monotonic()
            daemon.start()
            self.assertLess(time.monotonic() - began, AGAIN_S + 1.0, "seconds until it is ready, Python's start too")
            if moments.random() < 0.3:  # in the midst of taking up again
                daemon.kill()
                daemon.start()
            daemon.wait_for("connected")
        guest.run("touch /tmp/stop")
        guest.finish(timeout_s=300)
        self.assertNotIn("I/O error", guest.run("dmesg"))
        daemon.kill()
        daemon.start()
        verify(guest, FIRST)
        guest.power_off()
        daemon.arguments.append("--drain-on-exit")
        daemon.stop()
        daemon.start()
        daemon.stop()
        host.verify_fio(self.image, FIRST)

    def test_a_file_system_is_whole_after_the_daemon_and_the_guest_were_killed(self) -> None:
        daemon = self.lab.export(self.image, *self.options)
        guest = self.lab.guest()
        guest.run("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt")
        guest.run("for i in $(seq 50); do head -c 20000 /dev/urandom > /mnt/$i; done; sync")
        sums = host.parse_sums(guest.run("cd /mnt && find . -type f -exec sha256sum {} +"))
        guest.begin("while true; do dd if=/dev/urandom of=/mnt/later bs=4k count=500 conv=fsync 2>/dev/null; done")
        daemon.kill()
        guest.kill()
        daemon.arguments.append("--drain-on-exit")
        daemon.start()
        daemon.stop()
        replayed = subprocess.run(["e2fsck", "-fp", self.image], capture_output=True, text=True)
        self.assertIn(replayed.returncode, (0, 1), replayed.stdout)
        host.check_ext4(self.image)
        found = host.ext4_sums(self.image, self.lab.folder / "files")
        found.pop("later", None)
        host.compare_sums(sums, found)
