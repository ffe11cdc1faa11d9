"""Putting load on something: our load generator on a server, or fio on the image."""

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.bench.servers import CLIENT_CPU, SERVER_CPU, VHOSTCACHE, BenchError


def bench(socket: Path, *options: str, timeout_s: float = 600) -> dict[str, Any]:
    """One run of `vhostcache bench`. Returns its report."""
    command = [str(VHOSTCACHE), "bench", str(socket), *options, "--cpus", str(CLIENT_CPU), "--json"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    if run.returncode != 0:
        raise BenchError(f"{' '.join(command[1:])}: {run.stderr.strip()}")
    report: dict[str, Any] = json.loads(run.stdout)
    return report


def sequential_write(image: Path, size: int, runtime_s: float) -> float:
    """Bytes a second of fio's 1 MiB writes, QD4, over and over from one end of the image to the other."""
    job = f"--filename={image} --size={size} --rw=write --bs=1m --iodepth=4 --direct=1 --ioengine=io_uring"
    timing = f"--time_based --runtime={max(1, round(runtime_s))} --output-format=json"
    command = ["taskset", "-c", str(SERVER_CPU), "fio", "--name=sequential", *job.split(), *timing.split()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=runtime_s + 60, check=False)
    if run.returncode != 0:
        raise BenchError(f"fio: {run.stderr.strip() or run.stdout.strip()}")
    # What fio has to say to a person comes before its JSON.
    return float(json.loads(run.stdout[run.stdout.index("{") :])["jobs"][0]["write"]["bw_bytes"])
