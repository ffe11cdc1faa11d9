"""What happens to the machine around a disk at work: memory is added, it is paused, it is saved and restored."""

from pathlib import Path

from avocado import Test
from tests.guest import host
from tests.guest.lab import Lab, fio_job, verify, write_command

JOB = fio_job(0, 16, seed=61)
WORK = write_command(JOB, "--loops=3", "--fsync=16")
PAUSES = 5


class Machine(Test):
    timeout = 600

    def setUp(self) -> None:
        self.lab = Lab(Path(self.outputdir))
        self.image = self.lab.image()
        self.daemon = self.lab.export(self.image)

    def tearDown(self) -> None:
        self.lab.close()

    def test_memory_is_plugged_in_while_requests_are_in_flight(self) -> None:
        guest = self.lab.guest()
        before = int(guest.run("awk '/MemTotal/ {print $2}' /proc/meminfo"))
        guest.begin(WORK)
        guest.add_memory(512)
        guest.wait_for_requests()
        # The guest's own driver puts the module to use; then requests live in it too.
        guest.run("for m in /sys/devices/system/memory/memory*/state; do echo online > $m 2>/dev/null; done; true")
        guest.finish(timeout_s=300)
        self.assertGreater(int(guest.run("awk '/MemTotal/ {print $2}' /proc/meminfo")), before + 400 * 1024)
        # More than the first half of the memory: buffers of these reads are in the module.
        guest.run("dd if=/dev/zero of=/dev/shm/fill bs=1M count=200 2>/dev/null")
        guest.run("dd if=/dev/vda of=/tmp/copy bs=1M count=128 2>/dev/null && cmp -n 134217728 /tmp/copy /dev/vda")
        verify(guest, JOB)
        guest.power_off()
        self.daemon.stop()
        host.verify_fio(self.image, JOB)

    def test_the_machine_is_paused_again_and_again(self) -> None:
        guest = self.lab.guest()
        guest.begin(WORK)
        for _ in range(PAUSES):
            guest.wait_for_requests(requests=500)
            guest.pause()
            guest.resume()
        guest.finish(timeout_s=300)
        guest.power_off()
        self.daemon.stop()
        host.verify_fio(self.image, JOB)

    def test_the_machine_is_saved_while_it_works_and_restored(self) -> None:
        """The daemon writes into the guest's memory while that is being saved, and has to log where."""
        first = self.lab.guest()
        first.begin(WORK)
        state = self.lab.folder / "state"
        first.save(state)
        second = self.lab.guest(incoming=state)
        second.wait_for_requests()
        second.finish(timeout_s=300)
        verify(second, JOB)
        second.power_off()
        self.daemon.stop()
        host.verify_fio(self.image, JOB)
