"""Becomes qemu-storage-daemon: arguments are the process that has started this one, and the command.

A program of its own, so that the daemon need not fork: what is set here stays over exec. It dies with the daemon,
whatever ends that one: an orphan would go on writing to an image that the next daemon believes to have for itself.
Imports nothing of vhostcache.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        return  # it has died before that
    # Ctrl-C goes to the whole foreground group, and what is dirty is still to be written.
    os.setpgid(0, 0)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
