"""What a guest left in its image, judged on the host by other programs than ours, after the daemon has ended."""

import hashlib
import os
import subprocess
from pathlib import Path

from tests.guest import VHOSTCACHE, GuestError

# sbin is not on a user's PATH in Debian.
ENVIRONMENT = {**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin", "LC_ALL": "C"}
CHECK_TIMEOUT_S = 120


def _check(*command: str | Path) -> str:
    return _run(0, *command)


def _run(status: int, *command: str | Path) -> str:
    """What a command prints that has to end with `status`."""
    line = [str(c) for c in command]
    ended = subprocess.run(
        line,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=CHECK_TIMEOUT_S,
        check=False,
    )
    if ended.returncode != status:
        raise GuestError(f"`{' '.join(line)}` ended with {ended.returncode}:\n{ended.stdout}{ended.stderr}")
    return ended.stdout


def check_ext4(image: Path) -> str:
    """e2fsck over the whole image, changing nothing; its closing line."""
    return _check("e2fsck", "-fn", image).strip().splitlines()[-1]


def check_xfs(image: Path) -> None:
    _check("xfs_repair", "-n", "-f", image)


def parse_sums(output: str) -> dict[str, str]:
    """sha256sum's lines as name -> sum."""
    return {
        name.removeprefix("./"): digest for digest, name in (line.split(maxsplit=1) for line in output.splitlines())
    }


def ext4_sums(image: Path, folder: Path) -> dict[str, str]:
    """SHA-256 of each file in an ext4 image, by its path in there. The files are copied to `folder`, without mounting
    anything.
    """
    folder.mkdir(parents=True)
    _check("debugfs", "-R", f'rdump / "{folder}"', image)
    return {str(path.relative_to(folder)): file_sum(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def file_sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def compare_sums(guest: dict[str, str], image: dict[str, str]) -> None:
    """Equal, and not empty."""
    if not guest:
        raise GuestError("the guest named no file to compare")
    differing = sorted(name for name in guest.keys() | image.keys() if guest.get(name) != image.get(name))
    if differing:
        raise GuestError(
            f"{len(differing)} of {len(guest)} files in the image are not what the guest wrote:"
            f" {', '.join(differing[:5])}"
        )


def allocated_bytes(image: Path) -> int:
    return image.stat().st_blocks * 512


def holes(image: Path, start: int, end: int) -> int:
    """Bytes of [start, end) that are holes in the image."""
    found = 0
    with image.open("rb") as file:
        position = start
        while position < end:
            try:
                data = min(os.lseek(file.fileno(), position, os.SEEK_DATA), end)
            except OSError:  # ENXIO: no data up to the end of the file
                data = end
            found += data - position
            position = min(os.lseek(file.fileno(), data, os.SEEK_HOLE), end) if data < end else end
    return found


def verify_fio(image: Path, job: str) -> None:
    """fio's own verify of what a `Guest.write` job left, read from the image."""
    _check(
        "fio",
        f"--filename={image}",
        *job.split(),
        "--verify_only",
        "--verify_state_save=0",
        "--ioengine=psync",
        "--minimal",
    )


def check_cache(cache: Path, image: Path, ram_dir: Path, *, dirty: bool) -> None:
    """`vhostcache check`: no damage, and `dirty` or clean as it has to be."""
    _run(1 if dirty else 0, VHOSTCACHE, "check", cache, "--backend", image, "--ram-dir", ram_dir)


def drain_cache(cache: Path, image: Path, ram_dir: Path) -> None:
    _check(VHOSTCACHE, "drain", cache, "--backend", image, "--ram-dir", ram_dir)
