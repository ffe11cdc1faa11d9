import contextlib
import ctypes
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

NOBODY = 65534
PR_CAPBSET_DROP = 24
CAP_DAC_OVERRIDE = 1
CAP_DAC_READ_SEARCH = 2


@contextlib.contextmanager
def _as_ordinary_user() -> Iterator[None]:
    """Root may do everything; everybody else already is ordinary."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if before == 0:
            os.seteuid(0)


def _drop_override() -> None:
    """Before exec: what root may do in spite of permissions is dropped for good, what root owns stays readable."""
    if os.geteuid() != 0:
        return
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        if ctypes.CDLL(None, use_errno=True).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            os._exit(99)


@pytest.fixture
def heeding_permissions() -> dict[str, Any]:
    """Options for subprocess.run: a program that permissions apply to, root's too."""
    return {"preexec_fn": _drop_override}


@pytest.fixture
def as_ordinary_user() -> Callable[[], contextlib.AbstractContextManager[None]]:
    return _as_ordinary_user


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every user can read; pytest's own are private."""
    folder = Path(tempfile.mkdtemp(prefix="vhostcache-"))
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)
