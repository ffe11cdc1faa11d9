"""A disk with a cache file, whose guest and daemon are killed together. avocado/kills.py kills the daemon alone."""

import os
import subprocess
from pathlib import Path

from avocado import Test
from tests.guest import host
from tests.guest.lab import Lab


class Cache(Test):
    timeout = 600

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
