"""What a disk can do for a guest: several of them, many queues, its write cache, discards, being read-only, and a
daemon that restarts.
"""

from pathlib import Path

import yaml

from avocado import Test
from tests.guest import GuestError, host
from tests.guest.lab import MIB, Lab, fio_job, verify, write, write_command
from tests.guest.qemu import Disk

FIRST, SECOND = fio_job(0, 24, seed=21), fio_job(64, 24, seed=22)
# How often the daemon is restarted under a guest at work.
RESTARTS = 3


class Disks(Test):
    timeout = 600

    def setUp(self) -> None:
        self.lab = Lab(Path(self.outputdir))

    def tearDown(self) -> None:
        self.lab.close()

    def test_two_disks_of_one_daemon(self) -> None:
        images = {"vda": self.lab.image("a"), "vdb": self.lab.image("b", "128MiB")}
        volumes = [
            {
                "name": name,
                "socket": str(self.lab.socket(name)),
                "ram": "32MiB",
                "backend": {"type": "file", "path": str(image)},
            }
            for name, image in images.items()
        ]
        config = self.lab.folder / "vhostcache.yaml"
        config.write_text(yaml.safe_dump({"volumes": volumes}))
        daemon = self.lab.serve(config)
        guest = self.lab.guest(Disk(self.lab.socket("vda"), slot=0), Disk(self.lab.socket("vdb"), slot=1))
        self.assertEqual(
            guest.run("echo $(cat /sys/block/vda/serial) $(cat /sys/block/vdb/serial)").split(), ["vda", "vdb"]
        )
        jobs = {"vda": FIRST, "vdb": SECOND}
        both = " & ".join(write_command(job, "--fsync=32", device=f"/dev/{name}") for name, job in jobs.items())
        guest.run(f"{both} & first=$!; wait; wait $first")
        for name, job in jobs.items():
            verify(guest, job, device=f"/dev/{name}")
        guest.power_off()
        statistics = daemon.stop()
        self.assertEqual(set(statistics), set(images))
        for name, image in images.items():
            host.verify_fio(image, jobs[name])

    def test_four_queues_for_four_processors(self) -> None:
        image = self.lab.image()
        daemon = self.lab.export(image)
        guest = self.lab.guest(Disk(self.lab.socket(), queues=4), processors=4)
        self.assertEqual(guest.run("nproc; ls /sys/block/vda/mq").split(), ["4", "0", "1", "2", "3"])
        # One job a processor, so that each queue has its own.
        jobs = [fio_job(48 * number, 8, seed=30 + number) for number in range(4)]
        commands = " & ".join(
            f"taskset {1 << number:x} {write_command(job, '--fsync=32')}" for number, job in enumerate(jobs)
        )
        guest.run(f"{commands} & wait")
        for job in jobs:
            verify(guest, job)
        used = guest.run("grep -E 'virtio[0-9]+-req' /proc/interrupts").splitlines()
        self.assertEqual(len(used), 4)
        for line in used:
            self.assertGreater(sum(int(word) for word in line.split()[1:5]), 0, line)
        guest.power_off()
        daemon.stop()
        for job in jobs:
            host.verify_fio(image, job)

    def test_the_daemon_follows_the_guests_write_cache(self) -> None:
        image = self.lab.image()
        daemon = self.lab.export(image)
        guest = self.lab.guest()
        self.assertEqual(guest.run("cat /sys/block/vda/cache_type"), "write back")
        guest.run("echo 'write through' > /sys/block/vda/cache_type")
        self.assertEqual(
            guest.run("cat /sys/block/vda/cache_type /sys/block/vda/queue/write_cache").splitlines(),
            ["write through"] * 2,
        )
        # Without a flush: a write-through disk has to have it in the image when it says so.
        write(guest, FIRST, "--do_verify=0")
        host.verify_fio(image, FIRST)
        guest.run("echo 'write back' > /sys/block/vda/cache_type")
        self.assertEqual(guest.run("cat /sys/block/vda/cache_type"), "write back")
        write(guest, SECOND, "--do_verify=0", "--end_fsync=1")
        host.verify_fio(image, SECOND)
        verify(guest, FIRST)
        guest.power_off()
        daemon.stop()
        for job in (FIRST, SECOND):
            host.verify_fio(image, job)

    def test_a_daemon_that_restarts_is_not_noticed_by_the_guest(self) -> None:
        image = self.lab.image()
        daemon = self.lab.export(image)
        guest = self.lab.guest()
        command = write_command(FIRST, "--loops=3", "--fsync=16")
        guest.begin(command)
        for _ in range(RESTARTS):
            guest.wait_for_requests()
            daemon.stop()
            daemon.start()
            daemon.wait_for("connected")
        guest.finish(timeout_s=300)
        self.assertNotIn("I/O error", guest.run("dmesg"))
        guest.power_off()
        daemon.stop()
        host.verify_fio(image, FIRST)

    def test_discarded_and_zeroed_ranges_are_holes(self) -> None:
        image = self.lab.image()
        daemon = self.lab.export(image)
        guest = self.lab.guest()
        write(guest, fio_job(0, 32, seed=41))
        guest.run("/tools/blkdiscard -o 8M -l 8M /dev/vda && /tools/blkdiscard -z -o 24M -l 4M /dev/vda && sync")
        for offset, length in ((8, 8), (24, 4)):
            guest.run(
                f"dd if=/dev/vda bs=1M skip={offset} count={length} 2>/dev/null | cmp -n {length * MIB} - /dev/zero"
            )
            self.assertEqual(host.holes(image, offset * MIB, (offset + length) * MIB), length * MIB)
        self.assertEqual(
            host.holes(image, 0, 8 * MIB)
            + host.holes(image, 16 * MIB, 24 * MIB)
            + host.holes(image, 28 * MIB, 32 * MIB),
            0,
        )
        guest.run("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt && yes | head -c 67108864 > /mnt/large && sync")
        self.assertGreaterEqual(host.allocated_bytes(image), 64 * MIB)
        guest.run("rm /mnt/large && sync && /tools/fstrim /mnt && umount /mnt")
        guest.power_off()
        daemon.stop()
        self.assertLess(host.allocated_bytes(image), 48 * MIB)
        host.check_ext4(image)

    def test_a_read_only_disk_refuses_writes_and_keeps_its_image(self) -> None:
        image = self.lab.image(size="64MiB")
        with image.open("r+b") as file:
            file.write(b"what the host wrote\n" * 1024)
        before = host.file_sum(image)
        daemon = self.lab.export(image, "--read-only")
        guest = self.lab.guest()
        self.assertEqual(
            guest.run("cat /sys/block/vda/ro; head -n 1 /dev/vda").splitlines(), ["1", "what the host wrote"]
        )
        with self.assertRaises(GuestError):
            guest.run("dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=fsync")
        self.assertEqual(guest.run("sha256sum < /dev/vda").split()[0], before)
        guest.power_off()
        daemon.stop()
        self.assertEqual(host.file_sum(image), before)
