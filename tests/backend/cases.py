"""The backends and stacks of wrappers that the contract is held against."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.backend.device import Device
from tests.backend.servers import Server, nbdkit, qemu_img, qemu_storage_daemon
from vhostcache.backend.base import Facts
from vhostcache.backend.file import direct_alignment
from vhostcache.engine import Engine, EngineBackend

MIB = 1 << 20
DISK_BYTES = 16 * MIB

Wrap = tuple[str, str]
"""A kind, and its parameters."""
Make = Callable[[Engine], EngineBackend]
Lowest = Callable[[Path], Make]

ALL_WRAPPERS: tuple[Wrap, ...] = (
    ("fault", "kind=read,write,zero probability=0.1 seed=1"),
    ("fault", "kind=write probability=0.1 seed=2 torn=1 errno=ETIMEDOUT"),
    ("delay", "read=100000 write=300000 jitter=500000 seed=3 rate=1000000000"),
    ("trace", "file=TRACE"),
    ("retry", "attempts=100 first=10000 max=100000"),
)


@dataclass
class Case:
    """A backend that the contract is held against."""

    name: str
    lowest: Lowest | None = None  # a file in the folder; None: what the server serves
    wraps: tuple[Wrap, ...] = ()
    threads: bool = False
    serve: Callable[[Path], Server] | None = None
    slow: bool = False  # so less of everything

    def open(self, folder: Path) -> Make:
        lowest = self.lowest(folder) if self.lowest is not None else nbd(f"nbd+unix:///?socket={folder}/nbd.sock")

        def make(engine: Engine) -> EngineBackend:
            backend = lowest(engine)
            for kind, parameters in self.wraps:
                backend = engine.wrap_backend(backend, kind, parameters.replace("TRACE", str(folder / "trace")))
            return backend

        return make


def file(folder: Path, *, direct: bool = False, read_only: bool = False) -> Make:
    """An image in the folder, made when it is not there. It stays open as long as the process: engines come and go."""
    path = folder / "disk.img"
    created = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    if os.fstat(created).st_size == 0:
        os.truncate(created, DISK_BYTES)
    os.close(created)
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | (os.O_DIRECT if direct else 0)
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    open_files.append(descriptor)
    alignment = direct_alignment(descriptor) if direct else (1, 1)
    if alignment is None:
        pytest.skip("no direct I/O here")
    facts = Facts(descriptor, DISK_BYTES, read_only, direct, *alignment)
    return lambda engine: engine.file_backend(facts)


open_files: list[int] = []


def direct_file(folder: Path) -> Make:
    return file(folder, direct=True)


def nbd(uri: str, **options: Any) -> Make:
    return lambda engine: engine.nbd_backend(uri, **options)


# Servers, each with its image in the folder.


def memory(*options: str, through: str | None = None) -> Callable[[Path], Server]:
    """With a filter and its options."""
    filters = [f"--filter={through}"] if through is not None else []
    return lambda folder: nbdkit(folder, *filters, "memory", str(DISK_BYTES), *options)


def served_file(folder: Path) -> Server:
    (folder / "served.img").touch()
    os.truncate(folder / "served.img", DISK_BYTES)
    return nbdkit(folder, "file", folder / "served.img")


def image(kind: str, *blockdevs: str, objects: tuple[str, ...] = (), **options: str) -> Callable[[Path], Server]:
    """An image of this kind, served by qemu-storage-daemon."""

    def serve(folder: Path) -> Server:
        path = folder / f"served.{kind}"
        secrets = [word for text in objects for word in ("--object", text)]
        values = [word for key, value in options.items() for word in ("-o", f"{key.replace('_', '-')}={value}")]
        qemu_img("create", *secrets, "-f", kind, *values, path, str(DISK_BYTES))
        nodes = [f"driver=file,node-name=file,filename={path}", *blockdevs]
        return qemu_storage_daemon(folder, *secrets, *(word for text in nodes for word in ("--blockdev", text)))

    return serve


def several(folder: Path) -> Make:
    """Connections to the server of the folder."""
    return nbd(f"nbd+unix:///?socket={folder}/nbd.sock", connections=4)


SECRET = "secret,id=secret,data=sesame"
QSD_RAW = image("raw", "driver=raw,node-name=disk,file=file")
QSD_QCOW2 = image("qcow2", "driver=qcow2,node-name=disk,file=file,discard=unmap")
QSD_COMPRESSED = image("qcow2", "driver=qcow2,node-name=image,file=file", "driver=compress,node-name=disk,file=image")
QSD_LUKS = image(
    "luks",
    "driver=luks,node-name=disk,file=file,key-secret=secret",
    objects=(SECRET,),
    key_secret="secret",
    iter_time="10",
    hash_alg="sha512",  # with a faster one QEMU 7.2 may find its clock too coarse
)

RETRY: Wrap = ("retry", "first=100000 attempts=1000")

FILE_CASES = [
    Case("file", file),
    Case("file-threads", file, threads=True),
    Case("file-direct", direct_file),
    Case("file-direct-threads", direct_file, threads=True),
]
WRAPPER_CASES = [
    Case("delay", file, (("delay", "read=200000 write=500000 flush=100000 zero=1000 jitter=400000 seed=9"),)),
    Case("delay-rate", file, (("delay", "rate=200000000"),)),
    Case("fault-never", file, (("fault", "probability=0"),)),
    Case("trace", file, (("trace", "file=TRACE"),)),
    Case("retry", file, (RETRY,)),
    Case("retry-fault", direct_file, (("fault", "kind=read,write,zero probability=0.2"), RETRY)),
    Case("all", file, ALL_WRAPPERS),
    Case("all-direct-threads", direct_file, ALL_WRAPPERS, threads=True),
]
NBD_CASES = [
    Case("nbd-memory", serve=memory()),
    Case("nbd-memory-threads", serve=memory(), threads=True),
    Case("nbd-file", serve=served_file),
    Case("nbd-connections", several, serve=served_file),
    Case("nbd-delay", serve=memory("rdelay=1ms", "wdelay=2ms", through="delay"), slow=True),
    Case("nbd-rate", serve=memory("rate=1G", through="rate"), slow=True),
    Case("nbd-errors", serve=memory("error-rate=20%", "error-extents-rate=0", through="error"), wraps=(RETRY,)),
    Case("nbd-no-zero", serve=memory(through="nozero")),
    Case("nbd-no-extents", serve=memory(through="noextents")),
    Case("nbd-blocks", serve=memory("blocksize-minimum=4096", "blocksize-maximum=64K", through="blocksize-policy")),
    Case("nbd-all", serve=memory(), wraps=ALL_WRAPPERS),
    Case("qsd-raw", serve=QSD_RAW),
    Case("qsd-qcow2", serve=QSD_QCOW2),
    Case("qsd-luks", serve=QSD_LUKS),
]
CASES = [*FILE_CASES, *WRAPPER_CASES, *NBD_CASES]


@dataclass
class Stand:
    """A case with its server, if it has one, and a place for files."""

    case: Case
    folder: Path
    devices: list[Device] = field(default_factory=list)

    def device(self, *wraps: Wrap) -> Device:
        """A new engine with a volume on it. The disk keeps what was written before."""
        make = self.case.open(self.folder)

        def wrapped(engine: Engine) -> EngineBackend:
            backend = make(engine)
            for kind, parameters in wraps:
                backend = engine.wrap_backend(backend, kind, parameters)
            return backend

        device = Device(wrapped, threads=self.case.threads)
        self.devices.append(device)
        return device
