"""A QEMU guest's life with one disk: boot, I/O, reset, unplugging, and being killed."""

import time
from pathlib import Path

from avocado import Test
from tests.guest import host
from tests.guest.lab import MIB, Lab, check_that_verify_notices, fio_job, verify, write, write_command
from tests.guest.qemu import Disk

FIRST, SECOND, THIRD = fio_job(0, 24, seed=11), fio_job(64, 24, seed=12), fio_job(128, 24, seed=13)


class OneDisk(Test):
    timeout = 600

    def setUp(self) -> None:
        self.lab = Lab(Path(self.outputdir))
        self.image = self.lab.image()

    def tearDown(self) -> None:
        self.lab.close()

    def test_a_guest_boots_and_finds_the_disk_that_was_described(self) -> None:
        daemon = self.lab.export(self.image, "--name", "system", "--object-size", "2MiB")
        guest = self.lab.guest()
        queue = "/sys/block/vda/queue"
        found = guest.run(
            f"cat /sys/block/vda/size; echo $(cat /sys/block/vda/serial); cat {queue}/logical_block_size"
            f" {queue}/physical_block_size {queue}/optimal_io_size"
            f" {queue}/write_cache; ls /sys/block/vda/mq | wc -l"
        ).splitlines()
        self.assertEqual(found, [str(256 * MIB // 512), "system", "512", "4096", str(2 * MIB), "write back", "2"])
        write(guest, FIRST)
        guest.power_off()
        daemon.stop()
        host.verify_fio(self.image, FIRST)
        check_that_verify_notices(self.image, FIRST, offset=5 * MIB + 123)

    def test_a_command_reaches_the_guest_whole_although_an_earlier_one_ends_meanwhile(self) -> None:
        """What all the others stand on: busybox's `read` forgets half a line when a child of its shell ends."""
        self.lab.export(self.image)
        guest = self.lab.guest()
        guest.run("(until [ -e /tmp/go ]; do sleep 0.1; done; sleep 0.5) >/dev/null 2>&1 &")
        guest.run("touch /tmp/go")
        guest.console.send_bytes(b"echo the first half ")
        time.sleep(1.5)  # the one in the background ends here
        self.assertEqual(guest.run("and the second"), "the first half and the second")

    def test_a_file_system_made_in_the_guest_is_clean_and_whole_on_the_host(self) -> None:
        daemon = self.lab.export(self.image)
        guest = self.lab.guest()
        guest.run("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt")
        guest.run(
            "fio --directory=/mnt --name=f --nrfiles=40 --filesize=4k-128k --rw=randwrite --bs=4k --fsync_on_close=1"
            " --minimal --output=/dev/null"
        )
        sums = host.parse_sums(guest.run("cd /mnt && find . -type f -exec sha256sum {} +"))
        guest.run("umount /mnt")
        guest.power_off()
        daemon.stop()
        host.check_ext4(self.image)
        self.assertEqual(len(sums), 40)
        host.compare_sums(sums, host.ext4_sums(self.image, self.lab.folder / "files"))

    def test_a_reset_in_the_midst_of_io_keeps_what_was_flushed(self) -> None:
        daemon = self.lab.export(self.image)
        guest = self.lab.guest(reboots=True)
        write(guest, FIRST)
        guest.begin(write_command(SECOND, "--loops=1000", "--do_verify=0"))
        guest.reset()
        guest.wait_for("test -b /dev/vda")
        verify(guest, FIRST)
        write(guest, THIRD)
        guest.reset()
        guest.wait_for("test -b /dev/vda")
        verify(guest, THIRD)
        guest.power_off()
        daemon.stop()
        for job in (FIRST, THIRD):
            host.verify_fio(self.image, job)

    def test_a_disk_is_unplugged_and_plugged_in_again(self) -> None:
        daemon = self.lab.export(self.image)
        disk = Disk(self.lab.socket())
        guest = self.lab.guest(disk)
        write(guest, FIRST)
        for job in (SECOND, THIRD):
            guest.unplug(disk)
            guest.run("test ! -e /dev/vda")
            # It was flushed, so it is in the image, although the daemon has not ended.
            host.verify_fio(self.image, FIRST)
            guest.plug(disk)
            guest.wait_for("test -b /dev/vda")
            verify(guest, FIRST)
            write(guest, job)
        guest.power_off()
        daemon.stop()
        for job in (FIRST, SECOND, THIRD):
            host.verify_fio(self.image, job)

    def test_a_guest_killed_in_the_midst_of_io_makes_room_for_the_next(self) -> None:
        daemon = self.lab.export(self.image)
        first = self.lab.guest()
        write(first, FIRST)
        first.begin(write_command(SECOND, "--loops=1000", "--do_verify=0"))
        first.kill()
        second = self.lab.guest()
        verify(second, FIRST)
        write(second, SECOND)
        second.power_off()
        daemon.stop()
        for job in (FIRST, SECOND):
            host.verify_fio(self.image, job)

    def test_the_daemon_ends_with_its_guest_when_asked_to(self) -> None:
        daemon = self.lab.export(self.image, "--shutdown-on-disconnect")
        guest = self.lab.guest()
        # Not flushed by the guest: the daemon's drain has to do it.
        write(guest, FIRST, "--do_verify=0")
        guest.power_off()
        daemon.wait()
        host.verify_fio(self.image, FIRST)
