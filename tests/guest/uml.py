"""user-mode-linux: another kernel, with a virtio-blk driver and a vhost-user front-end that share nothing with QEMU.
It boots in a second from this machine's own root file system (read-only), so that a script in it has all of this
machine's programs.

It must never run without its KILL time-out and its bounded output: when its back-end dies it loops for ever,
printing.
"""

import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase

from tests.guest import GuestError

MODULES = Path("/usr/lib/uml/modules")
OUTPUT_LIMIT_BYTES = 8 << 20
# virtio device number of a block device, in the kernel's virtio_ids.h.
VIRTIO_ID_BLOCK = 2

# On a busy machine user-mode-linux now and then loses its first process before that has run anything (ptrace cannot
# read its registers). Nothing has used the disk then, so it is booted again.
BOOTS = 10
_BEGIN, _END = "@@ begins", "@@ ended with"

# Nothing of the host's tree may be covered by a mount: it holds the scripts that run here.
DISK, PLAIN = "/dev/shm/disk", "/dev/shm/plain"

_INIT = """#!/bin/sh
echo "{begin}"
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C HOME=/dev/shm TMPDIR=/dev/shm
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev 2>/dev/null
mkdir -p /dev/shm
mount -t tmpfs tmpfs /dev/shm
mkdir {mount_points}
insmod {modules}/kernel/drivers/block/virtio_blk.ko
(
set -e
{checks}
{script}
) 2>&1 </dev/null
echo "{end} $?"
busybox poweroff -f
"""


def run(
    script: str,
    disks: Sequence[Path],
    folder: Path,
    *,
    images: Sequence[Path] = (),
    drives: Sequence[Path] = (),
    timeout_s: int = 120,
) -> str:
    """Runs a shell script as root of a user-mode-linux with vhost-user disks /dev/vda, vdb, ... and, through its own
    block driver, plain files as /dev/ubda, ubdb, ...: first `images`, read-only, then `drives`. Its output; a command
    of the script that fails is an error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    init = folder / "init"
    modules = sorted(MODULES.iterdir())[-1]
    # Without its disk a script would fill the guest's memory in its stead.
    names = [f"vd{letter}" for letter in ascii_lowercase[: len(disks)]]
    checks = "\n".join(f'test -b /dev/{name} || {{ echo "there is no /dev/{name}"; exit 1; }}' for name in names)
    init.write_text(
        _INIT.format(
            modules=modules, checks=checks, script=script, begin=_BEGIN, end=_END, mount_points=f"{DISK} {PLAIN}"
        )
    )
    init.chmod(0o755)
    log = folder / "uml.log"
    line = [
        "setpriv",  # whoever waits for it may be killed
        "--pdeathsig",
        "TERM",
        "timeout",
        "-s",
        "KILL",
        str(timeout_s),
        "linux.uml",
        "mem=512M",
        "root=/dev/root",
        "rootfstype=hostfs",
        "rootflags=/",
        "ro",
    ]
    line += [f"init={init}", "con=null", "con0=fd:0,fd:1", "con1=null", "quiet"]
    line += [f"virtio_uml.device={socket}:{VIRTIO_ID_BLOCK}" for socket in disks]
    line += [f"ubd{number}r={image}" for number, image in enumerate(images)]
    line += [f"ubd{number}={drive}" for number, drive in enumerate(drives, len(images))]
    for _ in range(BOOTS):
        output, code = _boot(line, folder, log)
        if _BEGIN in output:
            break
    if f"\n{_END} 0\n" not in output:
        tail = "\n".join(output.splitlines()[-25:])
        raise GuestError(f"the script in user-mode-linux did not succeed (exit status {code}); log: {log}\n{tail}")
    return output


def _boot(line: list[str], folder: Path, log: Path) -> tuple[str, int]:
    """Its output, also in `log`, and its exit status."""
    with tempfile.TemporaryDirectory(prefix="vhostcache-uml-", dir="/dev/shm") as memory:
        process = subprocess.Popen(
            line,
            env={**os.environ, "TMPDIR": memory, "HOME": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert process.stdout is not None
        with process.stdout as stream, log.open("wb") as file:
            written = 0
            while block := os.read(stream.fileno(), 65536):
                written += file.write(block)
                if written > OUTPUT_LIMIT_BYTES:
                    os.killpg(process.pid, signal.SIGKILL)
                    break
        code = process.wait()
    return log.read_text(errors="replace").replace("\r", ""), code
