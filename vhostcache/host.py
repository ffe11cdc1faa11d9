"""What the daemon asks of the host that it runs on: descriptors, its supervisor; and a command line for QEMU."""

from __future__ import annotations

import contextlib
import os
import resource
import shlex
import socket

from vhostcache.config import VolumeConfig


def qemu_arguments(config: VolumeConfig) -> str:
    """The lines that attach the disk, for a shell."""
    identity = config.name if config.name[0].isalpha() else f"disk-{config.name}"
    path = os.path.abspath(config.socket).replace(",", ",,")
    queues = config.num_queues if "num_queues" in config.model_fields_set else min(4, config.num_queues)
    words = [
        ["-m", "1G", "-object", "memory-backend-memfd,id=mem,size=1G,share=on", "-machine", "memory-backend=mem"],
        ["-chardev", f"socket,id={identity},path={path},reconnect=1"],
        ["-device", f"vhost-user-blk-pci,chardev={identity},num-queues={queues}"],
    ]
    lines = " \\\n  ".join(shlex.join(line) for line in words)
    return f"# QEMU arguments for '{config.name}' (size= is the guest's memory, as -m says it):\n  {lines}"


def raise_descriptor_limit(volumes: int) -> None:
    """Each volume has an image, a listener, a connection, and for each of up to 64 queues a kick and a call
    descriptor.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 256 + volumes * (16 + 2 * 64 + 32)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def notify_supervisor(message: str) -> None:
    """systemd's sd_notify: one datagram to the socket that it names, if it does."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.setblocking(False)
        sender.connect("\0" + address[1:] if address[0] == "@" else address)
        sender.send(message.encode())
