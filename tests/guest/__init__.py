"""Real guests on vhostcache's disks: the daemon, QEMU guests, user-mode-linux, and checks of the image on the host."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GUEST_FOLDER = ROOT / ".cache" / "guest"
VHOSTCACHE = Path(sys.executable).parent / "vhostcache"


class GuestError(AssertionError):
    """What a guest, a daemon or an image was expected to do and did not; names the log that tells more."""
