"""Run a program where io_uring is forbidden: `python forbid_io_uring.py PROGRAM [ARGUMENTS]`."""

import ctypes
import errno
import os
import struct
import sys

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
IO_URING_SETUP = 425  # on every architecture
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, FAIL = 0x7FFF0000, 0x00050000


def forbid_io_uring() -> None:
    """As a container's seccomp filter does: io_uring_setup fails with EPERM, in this process and its children."""
    program = (
        struct.pack("<HBBI", LOAD, 0, 0, 0)
        + struct.pack("<HBBI", JUMP_IF_EQUAL, 0, 1, IO_URING_SETUP)
        + struct.pack("<HBBI", RETURN, 0, 0, FAIL | errno.EPERM)
        + struct.pack("<HBBI", RETURN, 0, 0, ALLOW)
    )
    instructions = ctypes.create_string_buffer(program)
    argument = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(instructions)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, argument, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


if __name__ == "__main__":
    forbid_io_uring()
    os.execv(sys.argv[1], sys.argv[1:])
