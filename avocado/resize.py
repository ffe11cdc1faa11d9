"""A disk that grows under a mounted file system at work, with and without a cache file."""

import os
import subprocess
from pathlib import Path

from avocado import Test
from tests.guest import VHOSTCACHE, host
from tests.guest.lab import MIB, Lab, fio_job, write
from tests.guest.qemu import Guest

START_MIB, STEPS_MIB = 256, (320, 384, 512)


class Resize(Test):
    timeout = 900

    def setUp(self) -> None:
        self.lab = Lab(Path(self.outputdir))
        self.image = self.lab.image(size=f"{START_MIB}MiB")
        self.ram_dir = Path(f"/dev/shm/vhostcache-guest-{os.getpid()}")

    def tearDown(self) -> None:
        self.lab.close()
        for path in self.ram_dir.glob("*"):
            path.unlink()
        if self.ram_dir.exists():
            self.ram_dir.rmdir()

    def cached(self) -> tuple[str, ...]:
        cache = ("--cache", str(self.lab.folder / "vda.cache"), "--cache-size", "128MiB", "--ram", "32MiB")
        return (*cache, "--ram-dir", str(self.ram_dir), "--destage-after", "200ms", "--drain-on-exit")

    def resize(self, guest: Guest, size_mib: int) -> None:
        """The guest sees it without being asked to look."""
        subprocess.run([VHOSTCACHE, "resize", self.lab.socket(), f"{size_mib}MiB"], check=True)
        guest.wait_for(f"[ $(cat /sys/block/vda/size) = {size_mib * MIB // 512} ]")

    def grow_a_file_system_at_work(self, *options: str) -> None:
        daemon = self.lab.export(self.image, *options)
        guest = self.lab.guest()
        guest.run("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt")
        guest.begin(
            "n=0; until [ -e /tmp/enough ]; do n=$((n + 1)); dd if=/dev/urandom of=/mnt/f$((n % 40)) bs=64k count=$((n"
            " % 7 + 1)) conv=fsync 2>/dev/null || exit 1; done"
        )
        for size_mib in STEPS_MIB:
            self.resize(guest, size_mib)
            guest.run("resize2fs /dev/vda")
            guest.wait_for_requests()
        guest.run("touch /tmp/enough")
        guest.finish(timeout_s=300)
        # More than there was room for.
        guest.run(f"dd if=/dev/urandom of=/mnt/large bs=1M count={START_MIB + 64} conv=fsync 2>/dev/null")
        sums = host.parse_sums(guest.run("cd /mnt && find . -type f -exec sha256sum {} +"))
        guest.run("umount /mnt && e2fsck -fn /dev/vda")
        guest.power_off()
        daemon.stop()
        self.assertEqual(self.image.stat().st_size, STEPS_MIB[-1] * MIB)
        host.check_ext4(self.image)
        host.compare_sums(sums, host.ext4_sums(self.image, self.lab.folder / "files"))

    def test_a_file_system_grows_while_it_is_written_to(self) -> None:
        self.grow_a_file_system_at_work("--mode", "writeback")

    def test_a_file_system_grows_while_it_is_written_to_through_a_cache(self) -> None:
        self.grow_a_file_system_at_work(*self.cached())

    def test_a_guest_is_told_although_the_daemon_was_killed_before_it_could(self) -> None:
        daemon = self.lab.export(self.image, *self.cached())
        guest = self.lab.guest()
        job = fio_job(0, 16, seed=3)
        write(guest, job)
        daemon.kill()
        os.truncate(self.image, STEPS_MIB[0] * MIB)  # the first step of a resize
        daemon.start()
        guest.wait_for(f"[ $(cat /sys/block/vda/size) = {STEPS_MIB[0] * MIB // 512} ]", timeout_s=60)
        later = fio_job(START_MIB, 16, seed=4)
        write(guest, later)
        guest.power_off()
        daemon.stop()
        for one in (job, later):
            host.verify_fio(self.image, one)
