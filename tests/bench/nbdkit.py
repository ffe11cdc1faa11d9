"""nbdkit: an NBD server whose storage is memory or a file, and whose filters make it as slow as storage far away.

It runs on the front-end's processor: what is really far away takes none of the server's time.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.backend.servers import Server
from tests.bench.cases import MIB
from tests.bench.servers import CLIENT_CPU, BenchError

# How much may be sent at once after silence: more than the requests that are in flight, and less than a measurement.
BURST_S = 0.25
COUNTED = re.compile(r"^(read|write|flush|zero|trim): (\d+) ops", re.MULTILINE)


@dataclass(frozen=True)
class Storage:
    """What is served: `size_bytes` of memory, or a file; each read and write is answered so much later, and so much can
    be written (and read) in a second. 0: at once, and as much as it can.
    """

    size_bytes: int = 0
    file: Path | None = None
    delay_ms: int = 0
    mib_per_s: int = 0

    def plugin(self) -> list[str]:
        if self.file is not None:
            return ["file", str(self.file)]
        return ["memory", f"size={self.size_bytes}", "allocator=malloc"]


class Nbdkit(Server):
    """It can be killed, and started again on what its file holds."""

    def __init__(self, storage: Storage, folder: Path) -> None:
        program = shutil.which("nbdkit") or shutil.which("nbdkit", path="/usr/sbin:/sbin")
        if program is None:
            raise BenchError("nbdkit is not installed (Debian: nbdkit)")
        socket, pid_file = folder / "nbd.sock", folder / "nbd.pid"
        self._statistics = folder / "nbdkit.statistics"
        command = ["taskset", "-c", str(CLIENT_CPU), program, "--foreground", "--exit-with-parent"]
        # The first filter is the one that the client meets first.
        command += ["-U", str(socket), "-P", str(pid_file), "--filter=stats", "--filter=delay", "--filter=rate"]
        command += [*storage.plugin(), f"statsfile={self._statistics}"]
        if storage.delay_ms:
            command += [f"rdelay={storage.delay_ms}ms", f"wdelay={storage.delay_ms}ms"]
        if storage.mib_per_s:
            command += [f"rate={storage.mib_per_s * 8 * MIB}", f"burstiness={BURST_S}"]
        super().__init__(command, socket, pid_file)

    def counts(self) -> dict[str, int]:
        """Ends it. How many requests of each kind it has had; kinds that it has had none of are not there."""
        self.stop()
        return {kind: int(count) for kind, count in COUNTED.findall(self._statistics.read_text())}
