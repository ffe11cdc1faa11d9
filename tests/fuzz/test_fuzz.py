"""The fuzz targets: their corpus runs clean, and each finds a bug that was planted for it. `make fuzz` fuzzes."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ["requests", "frontend"]


def fuzz(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "scripts/fuzz", *arguments], capture_output=True, text=True, errors="replace", timeout=600, check=False
    )


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    name = os.environ.get("CLANG", "clang-14")
    assert shutil.which(name), f"{name} is missing: `make setup-test` installs it"


@pytest.mark.parametrize("target", TARGETS)
def test_every_input_of_the_corpus_runs_clean(target: str) -> None:
    inputs = sorted((ROOT / "tests/fuzz/corpus" / target).iterdir())
    assert inputs
    run = fuzz("--run", target, *inputs)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stderr.count("Executed ") == len(inputs)


@pytest.mark.parametrize("target", TARGETS)
def test_a_planted_bug_is_found(target: str) -> None:
    run = fuzz("--canary", target)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "reproduced by" in run.stdout
