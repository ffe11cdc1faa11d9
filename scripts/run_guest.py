#!/usr/bin/env python3
"""`make run`: a real QEMU guest on a disk behind vhostcache, with a cache file, hammered in the guest, the daemon
killed in the midst of it, and checked on the host. `make shell`: its console.
"""

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from tests.guest import ROOT, GuestError, host, report
from tests.guest.daemon import Daemon, create_image
from tests.guest.qemu import Disk, Guest

IMAGE_SIZE = "4GiB"
RAM = "64MiB"
CACHE_SIZE = "1GiB"
# 2 x 12,288 random writes of 4 KiB with an fsync after each 32nd, each block with a checksum that a second pass
# verifies.
HAMMER = (
    "fio --directory=/mnt --name=hammer --numjobs=2 --size=48m --rw=randwrite --bs=4k --fsync=32 --direct=1"
    " --ioengine=libaio --iodepth=16"
    " --verify=crc32c --verify_fatal=1 --randseed=1 --group_reporting"
)
# 16,384 random writes of 4 KiB and one fsync: what a cache can merge.
BURST = (
    "fio --directory=/mnt --name=burst --size=64m --rw=randwrite --bs=4k --end_fsync=1 --direct=1"
    " --ioengine=libaio --iodepth=16 --verify=crc32c --verify_fatal=1 --randseed=2"
)
# Many small files, each fsynced when it is closed.
FILES = (
    "fio --directory=/mnt --name=files --nrfiles=150 --filesize=4k-64k --rw=write --bs=4k --fsync_on_close=1"
    " --openfiles=1 --file_service_type=sequential --verify=crc32c --verify_fatal=1"
)
# What goes on while the daemon is killed.
UNDER_FIRE = HAMMER.replace("--name=hammer", "--name=killed").replace("--randseed=1", "--randseed=3")
PROGRESS = " --eta=always --eta-newline=500ms"
KILL_AT_PERCENT = 40
PERCENT = re.compile(r"\[(\d+)\.\d+%\]")

console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)


class Steps:
    """What is going on, a line a step: live on a terminal, plain lines elsewhere."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = TaskID(0)
        self._reported = 0

    @contextmanager
    def step(self, title: str, *, measured: bool = False) -> Iterator[list[str]]:
        """One step. What the caller puts into the yielded list is shown behind its title when it is done."""
        self._reported = 0
        if console.is_terminal:
            self._task = self._progress.add_task(title, total=100 if measured else None)
        else:
            console.print(f"... {title}")
        start = time.monotonic()
        notes: list[str] = []
        try:
            yield notes
        except BaseException:
            self._end()
            console.print(f"[bold red]✗[/] {title}")
            raise
        self._end()
        note = f": {', '.join(notes)}" if notes else ""
        console.print(f"[bold green]✓[/] {title}{note} [dim]({time.monotonic() - start:.1f} s)[/]")

    def line(self, line: str) -> None:
        """A line of fio's, which may say how far it is."""
        found = PERCENT.search(line)
        if found is None:
            return
        percent = int(found[1])
        if console.is_terminal:
            self._progress.update(self._task, completed=percent)
        elif percent >= self._reported + 25:
            self._reported = percent
            console.print(f"    {percent} %")

    def _end(self) -> None:
        if console.is_terminal:
            self._progress.remove_task(self._task)


def run(folder: Path, sockets: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    image, socket = folder / "disk.img", sockets / "vda.sock"
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        steps = Steps(progress)
        with steps.step("make the image") as notes:
            create_image(image, IMAGE_SIZE)
            notes += [f"{IMAGE_SIZE}, {host.allocated_bytes(image) >> 10} KiB of it allocated"]
        cache = ("--cache", str(folder / "vda.cache"), "--cache-size", CACHE_SIZE, "--drain-on-exit")
        daemon = Daemon.export(image, socket, "--ram", RAM, *cache, log=folder / "daemon.log")
        with steps.step("start the daemon") as notes:
            daemon.start()
            notes += [f"cache file {CACHE_SIZE}", f"RAM {RAM}", f"process {daemon.pid}"]
        try:
            sums, statistics = hammer(steps, folder, Disk(socket), daemon)
            with steps.step("stop the daemon, which drains the cache"):
                daemon.stop()
        except BaseException:
            if daemon.running:
                daemon.kill()
            raise
        with steps.step("check the file system on the host") as notes:
            notes.append(host.check_ext4(image).removeprefix(f"{image}: "))
        with steps.step("compare checksums, guest and image") as notes:
            host.compare_sums(sums, host.ext4_sums(image, folder / "files"))
            notes.append(f"{len(sums)} files are the same")
            shutil.rmtree(folder / "files")
    console.print()
    console.print(report.traffic(statistics))
    console.print(f"[dim](before the kill; {statistics['log']['fdatasyncs']:,} fdatasyncs of the log)[/]")
    allocated = host.allocated_bytes(image) >> 20
    console.print(f"image {allocated} MiB allocated of {IMAGE_SIZE}; logs and image: {folder.relative_to(ROOT)}")


def hammer(steps: Steps, folder: Path, disk: Disk, daemon: Daemon) -> tuple[dict[str, str], dict[str, Any]]:
    """What happens in the guest. The checksums of its files, and the daemon's statistics before it was killed."""
    with steps.step("boot the guest") as notes:
        guest = Guest(folder, [disk]).start()
        notes.append(guest.run("echo Linux $(uname -r), $(nproc) processors, $(ls /sys/block/vda/mq | wc -l) queues"))
    try:
        with steps.step("mkfs.ext4, mount"):
            guest.run("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt")
        with steps.step("random 4 KiB writes with an fsync after each 32, then verify", measured=True):
            guest.run(HAMMER + PROGRESS, timeout_s=600, on_line=steps.line)
        with steps.step("random 4 KiB writes and one fsync, then verify", measured=True):
            guest.run(BURST + PROGRESS, timeout_s=600, on_line=steps.line)
        with steps.step("small files, each fsynced, then verify", measured=True):
            guest.run(FILES + PROGRESS, timeout_s=600, on_line=steps.line)
        with steps.step("unmount, mount, verify again", measured=True):
            guest.run("umount /mnt && mount /dev/vda /mnt")
            for job in (HAMMER, BURST):
                guest.run(job + " --verify_only" + PROGRESS, timeout_s=600, on_line=steps.line)
        with steps.step("compare counters, guest and daemon") as notes:
            guest.run("umount /mnt")
            counters = report.GuestCounters.parse(guest.run("cat /sys/block/vda/stat"))
            statistics = daemon.statistics()["vda"]
            report.compare_counters(counters, statistics)
            notes.append(f"{counters.writes:,} writes, {counters.write_bytes >> 20} MiB")
        with steps.step("kill -9 the daemon under random writes, start it again, verify", measured=True) as notes:
            guest.run("mount /dev/vda /mnt")
            killed_s = 0.0

            def kill_once(line: str) -> None:
                nonlocal killed_s
                steps.line(line)
                found = PERCENT.search(line)
                if found is not None and int(found[1]) >= KILL_AT_PERCENT and not killed_s:
                    killed_s = time.monotonic()
                    daemon.kill()
                    daemon.start()
                    killed_s = time.monotonic() - killed_s

            guest.run(UNDER_FIRE + PROGRESS, timeout_s=600, on_line=kill_once)
            if not killed_s:
                raise GuestError("fio ended before the daemon could be killed")
            recovered = daemon.events("recovered")[0]
            notes += [
                f"served again after {killed_s:.1f} s",
                f"{recovered['ram_tier_records']} records of {recovered['records']} from the RAM tier",
            ]
        with steps.step("checksums in the guest") as notes:
            sums = host.parse_sums(guest.run("cd /mnt && find . -type f -exec sha256sum {} +"))
            notes.append(f"{len(sums)} files")
        with steps.step("unmount, power off"):
            guest.run("umount /mnt")
            guest.power_off()
    except BaseException:
        if guest.running:
            guest.kill()
        raise
    return sums, statistics


def shell(folder: Path, sockets: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    image, socket = folder / "disk.img", sockets / "vda.sock"
    if not image.exists():
        create_image(image, IMAGE_SIZE)
    guest = Guest(folder, [Disk(socket)])
    line = [*guest.command_line(), "-append", "console=ttyS0 quiet panic=-1 vhc.shell", "-serial", "mon:stdio"]
    cache = ("--cache", str(folder / "vda.cache"), "--cache-size", CACHE_SIZE)
    with Daemon.export(image, socket, "--ram", RAM, *cache, log=folder / "daemon.log") as daemon:
        console.print(f"disk: {image.relative_to(ROOT)} (kept); daemon's log: {daemon.log.relative_to(ROOT)}")
        console.print(f"[dim]{shlex.join(line)}[/]")
        code = subprocess.run(line, check=False).returncode
        statistics = daemon.stop()["vda"]
    console.print()
    console.print(report.traffic(statistics))
    if code != 0:
        raise GuestError(f"QEMU ended with {code}")


def main() -> int:
    action = {"run": run, "shell": shell}[sys.argv[1]]
    folder = ROOT / ".cache" / sys.argv[1]
    try:
        # A socket's path has at most 107 bytes, and this folder may be anywhere.
        with tempfile.TemporaryDirectory(prefix="vhostcache-") as sockets:
            action(folder, Path(sockets))
    except KeyboardInterrupt:
        console.print("[red]interrupted[/]")
        return 130
    except (GuestError, OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
        console.print(f"[bold red]FAILED[/]: {type(error).__name__}: {error}")
        console.print(
            f"logs and image: {folder.relative_to(ROOT)} (daemon.log, qemu.log, kernel.log, console.log, disk.img)"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
