"""A guest migrates under I/O between two daemons that share an image and have caches of their own."""

import os
import shutil
from pathlib import Path

from avocado import Test
from tests.guest import host
from tests.guest.daemon import Daemon
from tests.guest.lab import Lab, fio_job, verify, write, write_command
from tests.guest.qemu import Disk, Guest

BEFORE, DURING, AFTER = fio_job(0, 8, seed=21), fio_job(64, 24, seed=22), fio_job(128, 24, seed=23)
AGAIN = BEFORE.replace("seed=21", "seed=24")
SLOW = 64 << 10  # bytes a second, at which a migration does not end


def hammer(guest: Guest, job: str) -> None:
    """Writes and verifies it again and again, with a flush now and then, until `finish`."""
    loop = f"while [ ! -e /tmp/stop ]; do {write_command(job, '--fsync=32')} || exit 1; done"
    guest.begin(f"rm -f /tmp/stop; ({loop})")


def finish(guest: Guest) -> None:
    guest.wait_for_requests()
    guest.run("touch /tmp/stop")
    guest.finish(timeout_s=300)


class Migration(Test):
    timeout = 900

    def setUp(self) -> None:
        self.lab = Lab(Path(self.outputdir))
        self.image = self.lab.image()
        self.guests = 0
        self.ram_dir = Path(f"/dev/shm/vhostcache-migration-{os.getpid()}")

    def tearDown(self) -> None:
        self.lab.close()
        shutil.rmtree(self.ram_dir, ignore_errors=True)

    def export(self, side: str, *options: str, cache: bool = True) -> Daemon:
        if cache:
            options += (f"--cache={self.lab.folder / side}.cache", "--cache-size=128MiB", f"--ram-dir={self.ram_dir}")
        return self.lab.export(self.image, "--ram=32MiB", *options, socket=side)

    def guest(self, side: str, *, incoming: bool = False) -> Guest:
        return self.lab.guest(Disk(self.lab.socket(side)), incoming=self.uri() if incoming else None)

    def uri(self) -> str:
        return f"unix:{self.lab.folder}/migration"

    def migrate(self, source: Guest, side: str) -> Guest:
        """All of it. The source's QEMU ends."""
        destination = self.guest(side, incoming=True)
        source.throttle_migration(0)
        source.migrate(self.uri())
        source.wait_for_migration()
        source.kill()
        return destination

    def there_and_back(self, *, cache: bool) -> None:
        a = self.export("a", *(["--drain-on-exit"] if cache else []), cache=cache)
        b = self.export("b", "--incoming", cache=cache)
        guest = self.guest("a")
        write(guest, BEFORE)
        hammer(guest, DURING)
        guest = self.migrate(guest, "b")
        finish(guest)
        self.assertEqual(len(a.wait_for("handed-over")), 1)
        self.assertEqual(len(b.wait_for("taken-over")), 1)
        for job in (BEFORE, DURING):
            verify(guest, job)
        # What A has cached of this is old now.
        write(guest, AGAIN)
        hammer(guest, AFTER)
        guest = self.migrate(guest, "a")
        finish(guest)
        self.assertEqual(len(a.wait_for("taken-over")), 1)
        for job in (AGAIN, DURING, AFTER):
            verify(guest, job)
        guest.power_off()
        a.stop()
        b.stop()

    def test_a_guest_goes_there_and_back_under_io(self) -> None:
        self.there_and_back(cache=True)
        for job in (AGAIN, DURING, AFTER):
            host.verify_fio(self.image, job)

    def test_a_guest_goes_there_and_back_without_cache_files(self) -> None:
        self.there_and_back(cache=False)
        for job in (AGAIN, DURING, AFTER):
            host.verify_fio(self.image, job)

    def test_a_migration_that_is_cancelled_changes_nothing_and_the_next_one_succeeds(self) -> None:
        a = self.export("a", "--drain-on-exit")
        b = self.export("b", "--incoming")
        guest = self.guest("a")
        write(guest, BEFORE)
        hammer(guest, DURING)
        destination = self.guest("b", incoming=True)
        guest.throttle_migration(SLOW)
        guest.migrate(self.uri())
        a.wait_for("migrating")
        guest.wait_for_requests()
        guest.cancel_migration()
        guest.wait_for_requests()
        destination.kill()
        # Later still: the guest stands still here, and the disk has gone over.
        destination = self.guest("b", incoming=True)
        guest.throttle_migration(0)
        guest.migrate(self.uri(), pauses=True)
        guest.wait_for_migration("pre-switchover")
        a.wait_for("handed-over")
        guest.cancel_migration()
        guest.wait_for_requests()
        self.assertEqual(len(a.wait_for("taken-over")), 1)
        self.assertEqual(b.events("taken-over"), [])
        destination.kill()
        guest = self.migrate(guest, "b")
        finish(guest)
        for job in (BEFORE, DURING):
            verify(guest, job)
        guest.power_off()
        a.stop()
        b.stop()
        host.drain_cache(self.lab.folder / "b.cache", self.image, self.ram_dir)
        for job in (BEFORE, DURING):
            host.verify_fio(self.image, job)

    def test_a_destination_whose_daemon_is_killed_before_the_first_request_goes_on(self) -> None:
        a = self.export("a", "--drain-on-exit")
        b = self.export("b", "--incoming", "--drain-on-exit")
        guest = self.guest("a")
        write(guest, BEFORE)
        hammer(guest, DURING)
        destination = self.guest("b", incoming=True)
        b.wait_for("connected")
        guest.throttle_migration(SLOW)
        guest.migrate(self.uri())
        a.wait_for("migrating")
        b.kill()
        b.start()
        guest.throttle_migration(0)
        guest.wait_for_migration()
        guest.kill()
        finish(destination)
        for job in (BEFORE, DURING):
            verify(destination, job)
        destination.power_off()
        a.stop()
        b.stop()
        for job in (BEFORE, DURING):
            host.verify_fio(self.image, job)
