"""Storage that is slow, far away, and not always there: the guest has nothing to notice but that it waits.

OUTAGE_S says how long an outage lasts that the log has room for (3 seconds without it).
"""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import yaml

from avocado import Test
from tests.backend.servers import Server, nbdkit
from tests.guest import GuestError, host
from tests.guest.daemon import Daemon
from tests.guest.lab import MIB, Lab, fio_job, write_command
from tests.guest.qemu import Guest
from vhostcache.control import query

OUTAGE_S = float(os.environ.get("OUTAGE_S", "3"))
OUTAGES = 2
DRAIN_TIMEOUT_S = 120.0
NO_MESSAGES = ("I/O error", "EXT4-fs error", "Remounting")
# What the log has room for, and what it has not.
LITTLE, MUCH = fio_job(0, 16, seed=81), fio_job(32, 80, seed=82)


class Backends(Test):
    timeout = 600 + 3 * int(OUTAGE_S)

    def setUp(self) -> None:
        self.lab = Lab(Path(self.outputdir))
        # On a tmpfs, as the default is; short-lived as this test is.
        self.ram_dir = Path("/dev/shm") / self.lab.folder.name
        self.servers: list[Server] = []

    def tearDown(self) -> None:
        self.lab.close()
        for server in self.servers:
            server.kill()
        for file in self.ram_dir.glob("*"):
            file.unlink()
        if self.ram_dir.exists():
            self.ram_dir.rmdir()

    def test_ext4_on_a_qcow2_far_away_whose_storage_and_server_die_and_return(self) -> None:
        image = self.lab.folder / "disk.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "256M"], check=True)
        os.truncate(image, 320 * MIB)  # an NBD export does not grow with what is written into it
        storage = self._far_away(image)
        nbd = {"driver": "nbd", "server": {"type": "unix", "path": str(storage.socket)}}
        daemon = self._serve({"type": "qsd", "blockdev": {"driver": "qcow2", "file": nbd}}, "256MiB")
        guest = self.lab.guest()
        guest.run("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt")
        fio = "fio --directory=/mnt/$n --name=f --nrfiles=20 --filesize=4k-256k --rw=randwrite --bs=4k"
        fio += " --fsync_on_close=1 --verify=crc32c --verify_fatal=1 --randseed=$n --minimal --output=/dev/null"
        work = f"mkdir /mnt/$n && {fio} && rm -rf /mnt/$((n - 3))"
        guest.begin(f"(n=1; while {work}; do [ -e /tmp/stop ] && exit 0; n=$((n + 1)); done; exit 1)")
        for number in range(OUTAGES):
            storage.kill()
            guest.wait_for_requests(requests=100)
            storage.start()
            guest.wait_for_requests(requests=100)
            os.kill(self._status(daemon)["backend_status"]["pid"], signal.SIGKILL)
            daemon.wait_for("backend-recovered", timeout_s=60, count=number + 1)
            guest.wait_for_requests(requests=100)
        guest.run("touch /tmp/stop")
        guest.finish(timeout_s=300)
        guest.run("sync; echo 3 >/proc/sys/vm/drop_caches")
        sums = host.parse_sums(guest.run("cd /mnt && find . -type f -exec sha256sum {} +"))
        guest.run("umount /mnt")
        self._check_messages(guest)
        guest.power_off()
        daemon.stop()
        storage.stop()
        raw = self.lab.folder / "disk.raw"
        subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw], check=True)
        host.check_ext4(raw)
        host.compare_sums(sums, host.ext4_sums(raw, self.lab.folder / "files"))

    def test_an_outage_is_a_pause_at_most_and_ends_by_itself(self) -> None:
        image = self.lab.image()
        storage = self._far_away(image)
        daemon = self._serve({"type": "nbd", "uri": storage.uri}, "64MiB")
        guest = self.lab.guest()
        # The log has room: nothing waits.
        storage.kill()
        began_s = time.monotonic()
        guest.run(write_command(LITTLE, "--fsync=32", "--end_fsync=1"))
        while (left_s := OUTAGE_S - (time.monotonic() - began_s)) > 0:
            guest.run("dd if=/dev/zero of=/dev/vda bs=4k seek=60000 count=1 oflag=direct conv=fsync 2>/dev/null")
            time.sleep(min(left_s, 1.0))
        self.assertGreater(self._status(daemon)["dirty_bytes"], 0)
        storage.start()
        self._wait_until_drained(daemon)
        host.verify_fio(image, LITTLE)

        # It has not: writes wait, and are answered in the end.
        storage.kill()
        guest.begin(write_command(MUCH, "--do_verify=0", "--fsync=256", "--end_fsync=1"))
        self._wait_until_writes_wait(daemon)
        with self.assertRaises(GuestError):
            guest.wait_for("[ -e /tmp/status ]", timeout_s=1.0)
        storage.start()
        guest.finish(timeout_s=300)
        self._wait_until_drained(daemon)
        host.verify_fio(image, MUCH)
        self._check_messages(guest)
        guest.power_off()
        daemon.stop()
        host.verify_fio(image, LITTLE)

    def _far_away(self, image: Path) -> Server:
        """Each read and write of it takes ten milliseconds."""
        slow = ("--filter=delay", "file", str(image), "rdelay=10ms", "wdelay=10ms")
        server = nbdkit(self.lab.folder, *slow)
        self.servers.append(server)
        return server.start()

    def _serve(self, backend: dict[str, Any], log_size: str) -> Daemon:
        cache = {"path": "vda.cache", "size": log_size, "ram_dir": str(self.ram_dir), "drain_on_exit": True}
        volume = {"name": "vda", "socket": str(self.lab.socket()), "ram": "32MiB", "destage_after": "200ms"}
        config = self.lab.folder / "vhostcache.yaml"
        volumes = [{**volume, "cache": cache, "backend": backend}]
        config.write_text(yaml.safe_dump({"control": str(self._control), "volumes": volumes}))
        return self.lab.serve(config)

    @property
    def _control(self) -> Path:
        return self.lab.folder / "control.sock"

    def _status(self, daemon: Daemon) -> dict[str, Any]:
        """Of the volume, as `vhostcache status` has it."""
        assert daemon.running
        (found,) = query(str(self._control), "status")["volumes"]
        volume: dict[str, Any] = found
        return volume

    def _wait_until_drained(self, daemon: Daemon) -> None:
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        while dirty_bytes := self._status(daemon)["dirty_bytes"]:
            self.assertLess(time.monotonic(), deadline, f"{dirty_bytes} bytes are not in the backend")
            time.sleep(0.2)

    def _wait_until_writes_wait(self, daemon: Daemon) -> None:
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        while True:
            if daemon.statistics()["vda"]["waiting_for_room"]:
                return
            self.assertLess(time.monotonic(), deadline, "the log does not get full")
            time.sleep(0.2)

    def _check_messages(self, guest: Guest) -> None:
        messages = guest.run("dmesg")
        for bad in NO_MESSAGES:
            self.assertNotIn(bad, messages)
