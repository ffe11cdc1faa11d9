"""What nbd and qsd backends are to the daemon: facts, identity, marks, and what becomes of a connection. The NBD client
is the engine's; here is one that only takes notes."""

import errno
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vhostcache.assembly import image_of
from vhostcache.backend.base import Facts
from vhostcache.backend.mark import NAME, Mark
from vhostcache.backend.nbd import Connection, NbdBackend
from vhostcache.backend.opening import open_backend, stack_backend
from vhostcache.backend.qsd import QsdBackend
from vhostcache.composition import Composition
from vhostcache.config import VolumeConfig
from vhostcache.config_backend import NbdBackendConfig, QsdBackendConfig
from vhostcache.errors import EngineError, ImageError, UsageError
from vhostcache.handover import Away
from vhostcache.resize import Growth
from vhostcache.storage import VolumeStorage
from vhostcache.taking import Takings
from vhostcache.volumes import Volumes

MIB = 1 << 20
CONNECTED, LOST, REFUSED = 1, 2, 3
SECOND_NS = 10**9


@dataclass
class Opened:
    facts: Facts
    message: str = ""
    closed: bool = False

    def attach(self) -> "Opened":
        return self

    def close(self) -> None:
        self.closed = True


@dataclass
class Opener:
    """Stands for the engine."""

    facts: Facts = field(
        default_factory=lambda: Facts(
            descriptor=-1, size_bytes=64 * MIB, read_only=False, direct=False, align_mem_bytes=1, align_io_bytes=1
        )
    )
    error: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    opened: list[Opened] = field(default_factory=list)

    def nbd_link(self, uri: str, **options: Any) -> Any:
        self.asked.append({"uri": uri, **options})
        if self.error:
            raise EngineError("backend", self.error)
        self.opened.append(Opened(self.facts))
        return self.opened[-1]

    def file_backend(self, facts: Facts) -> Any:
        raise NotImplementedError

    def wrap_backend(self, below: Any, kind: str, parameters: str) -> Any:
        raise EngineError("backend", "no such file")


def nbd(opener: Opener, read_only: bool = False, **keys: Any) -> NbdBackend:
    config = NbdBackendConfig.model_validate({"type": "nbd", "uri": "nbd://host/disk", **keys})
    return NbdBackend(config, opener, read_only)


# NBD.


def test_an_nbd_backend_is_connected_as_configured() -> None:
    opener = Opener()
    backend = nbd(opener, True, uri="nbds://me@host/disk", connections=2, tls_psk_file="/k", tls_verify=False)
    assert opener.asked == [
        {
            "uri": "nbds://me@host/disk",
            "connections": 2,
            "read_only": True,
            "tls_certificates": None,
            "tls_psk_file": "/k",
            "tls_username": None,
            "tls_verify": False,
            "uncompressed_uri": None,
        }
    ]
    assert backend.facts.size_bytes == 64 * MIB
    assert backend.attach(opener) is opener.opened[0]


def test_an_nbd_backend_is_known_by_where_it_leads_and_cannot_be_marked() -> None:
    backend = nbd(Opener(), uri="nbd://Host:10809/disk")
    image = image_of(backend)
    assert (image.stamp.identity, image.stamp.mtime_ns) == (b"nbd://host:10809/disk", 0)
    assert (image.mark, image.can_be_marked) == (None, False)
    assert not backend.write_mark(Mark(bytes(16), 1, dirty=True))
    assert backend.settle() == image.stamp
    long = nbd(Opener(), uri=f"nbd://host/{'x' * 99}").stamp().identity
    assert len(long) == 64
    assert long != nbd(Opener(), uri=f"nbd://host/y{'x' * 98}").stamp().identity


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"read_only": True}, "is read-only; expected one that can be written; use --read-only"),
        ({"size_bytes": 0}, "is empty"),
        ({"size_bytes": 1000}, "has a size of 1000 bytes; expected a multiple of 512"),
    ],
)
def test_an_export_that_will_not_do_is_refused(facts: dict[str, Any], words: str) -> None:
    opener = Opener()
    opener.facts = replace(opener.facts, **facts)
    with pytest.raises(ImageError, match=f"export 'nbd://host/disk': {words}"):
        nbd(opener)
    assert opener.opened[0].closed


def test_a_server_that_cannot_be_reached_is_refused() -> None:
    with pytest.raises(ImageError, match="export 'nbd://host/disk': connection refused"):
        nbd(Opener(error="connection refused"))


def test_what_becomes_of_a_connection_is_told_once() -> None:
    connection = Connection("nbd://host/disk")
    assert connection.status(5 * SECOND_NS) == {"state": "connected", "reconnects": 0}
    assert connection.happened(CONNECTED, "", 0) is None
    lost = connection.happened(LOST, "connection refused", SECOND_NS)
    assert lost is not None
    assert (lost.event, lost.fields) == ("backend-lost", {"backend": "nbd://host/disk", "error": "connection refused"})
    assert connection.happened(LOST, "connection refused", 2 * SECOND_NS) is None
    assert connection.happened(REFUSED, "another size", 3 * SECOND_NS) is not None
    assert connection.status(4 * SECOND_NS) == {
        "state": "refused",
        "reconnects": 0,
        "seconds": 3.0,
        "error": "another size",
    }
    back = connection.happened(CONNECTED, "", 11 * SECOND_NS)
    assert back is not None
    assert (back.event, back.fields) == ("backend-recovered", {"backend": "nbd://host/disk", "seconds": 10.0})
    assert connection.status(12 * SECOND_NS) == {"state": "connected", "reconnects": 1}


def disk(**keys: Any) -> VolumeConfig:
    backend = {"type": "nbd", "uri": "nbd://host/disk", **keys}
    return VolumeConfig.model_validate({"name": "a", "socket": "/run/a.sock", "backend": backend})


def test_the_engine_lets_go_of_an_export_whose_wrapper_is_refused() -> None:
    opener, config = Opener(), disk(wrap=[{"trace": {"file": "/none/a"}}])
    backend = open_backend(config, opener)
    with pytest.raises(UsageError, match=r"volume 'a', backend.wrap\[0\].trace: no such file"):
        stack_backend(config, backend, opener)
    assert opener.opened[0].closed


def taken(opener: Any, size_bytes: int = MIB) -> str:
    """What is said when a guest arrives that knows a disk of that size, while another daemon has it."""
    volumes, nobody, takings = Volumes(), cast(Any, None), Takings(lambda: None)
    volumes.served.append(cast(Any, SimpleNamespace(config=disk(), volume=Away(size_bytes))))
    composition = Composition(opener, nobody, volumes, frozenset(), nobody)
    storage = VolumeStorage(0, volumes, opener, nobody, lambda: composition, nobody, nobody, takings)
    assert storage.take() is None, "it has a thread"
    takings.join()
    said = storage.take()
    assert said is not None
    return said


def test_the_engine_lets_go_of_an_export_that_has_become_too_small_for_a_guest_that_arrives() -> None:
    opener = Opener()
    assert taken(opener, 65 * MIB).startswith("export 'nbd://host/disk': is 67108864 bytes large")
    assert opener.opened[0].closed


def test_what_the_host_refuses_when_a_guest_arrives_stops_no_other_volume() -> None:
    class Broke(Opener):
        def nbd_link(self, uri: str, **options: Any) -> Any:
            raise OSError(errno.EMFILE, "")

    assert taken(Broke()) == "the storage cannot be opened: too many files are open in this process"


def test_a_backend_that_breaks_down_while_it_grows_has_not_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = nbd(Opener())
    monkeypatch.setattr(backend, "resize", lambda size_bytes: 1 // 0)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    growth = Growth(backend, 128 * MIB, lambda: None)
    growth.join()
    assert growth.ended
    assert growth.error


# qemu-storage-daemon.


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "refcount_bits=1", path, "64M")
    try:
        os.setxattr(tmp_path, "user.vhostcache", b"x")
    except OSError:
        pytest.skip("no extended attributes here")
    return path


@pytest.fixture
def qsd(image: Path) -> Iterator[Callable[..., QsdBackend]]:
    opened: list[QsdBackend] = []

    def open_it(
        opener: Opener,
        compress: bool = False,
        read_only: bool = False,
        object_bytes: int = MIB,
        **options: Any,
    ) -> QsdBackend:
        blockdev: dict[str, Any] = {"driver": "qcow2", "file": {"driver": "file", "filename": str(image)}}
        if compress:
            blockdev = {"driver": "compress", "file": blockdev}
        config = QsdBackendConfig.model_validate({"type": "qsd", "blockdev": blockdev})
        opened.append(QsdBackend(config, opener, read_only, False, object_bytes, **options))
        return opened[-1]

    yield open_it
    for backend in opened:
        backend.close()


def write(opener: Opener) -> None:
    run("qemu-io", "-f", "raw", "-c", "write -P 7 1M 64k", "-c", "flush", opener.asked[-1]["uri"])


def test_compressed_clusters_are_wanted_whole(qsd: Callable[..., QsdBackend]) -> None:
    plain = qsd(Opener())
    assert not plain.facts.wants_whole_objects
    plain.close()
    compressed = qsd(Opener(), compress=True)
    assert compressed.facts.wants_whole_objects
    assert compressed.facts.preferred_bytes == 65536
    assert compressed.status(0)["pid"] > 0


def test_a_size_with_which_qemu_would_not_export_it_any_more_is_refused(
    qsd: Callable[..., QsdBackend], image: Path
) -> None:
    opener = Opener()
    backend = qsd(opener, compress=True)
    with pytest.raises(ImageError, match=r"cannot have 67112960 bytes; expected a multiple of 65536"):
        backend.resize(64 * MIB + 4096)
    write(opener)
    backend.close()
    opener.facts = replace(opener.facts, align_io_bytes=4096)
    with pytest.raises(ImageError, match=r"cannot have 67109376 bytes; expected a multiple of 4096"):
        qsd(opener).resize(64 * MIB + 512)


def test_objects_smaller_than_a_compressed_cluster_are_refused(qsd: Callable[..., QsdBackend], image: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M,refcount_bits=1", image, "64M")
    with pytest.raises(ImageError, match=r"clusters of 2097152 bytes; expected an object_size that is a multiple"):
        qsd(Opener(), compress=True, object_bytes=MIB)
    qsd(Opener(), compress=True, object_bytes=2 * MIB)


def test_an_image_whose_compressed_clusters_qemu_can_damage_is_refused(
    qsd: Callable[..., QsdBackend], image: Path
) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "64M")
    with pytest.raises(ImageError, match=r"has reference counts of 16 bits.*expected refcount_bits=1; make it anew"):
        qsd(Opener(), compress=True)
    qsd(Opener(), compress=True, read_only=True).close()
    qsd(Opener())


def test_the_file_in_which_it_lies_is_marked_as_an_image_is(qsd: Callable[..., QsdBackend], image: Path) -> None:
    backend = qsd(Opener())
    assert backend.can_be_marked
    assert backend.read_mark() is None
    mark = Mark(bytes(range(16)), 3, dirty=True)
    assert backend.write_mark(mark)
    assert backend.read_mark() == mark
    backend.close()
    assert Mark.parse(os.getxattr(image, NAME).decode()) == mark
    backend = qsd(Opener())
    assert backend.write_mark(None)
    assert backend.read_mark() is None


def test_a_change_behind_our_back_is_seen_and_our_own_is_not(qsd: Callable[..., QsdBackend], image: Path) -> None:
    opener = Opener()
    backend = qsd(opener)
    before = backend.stamp()
    write(opener)
    left = backend.settle()
    assert left.mtime_ns != before.mtime_ns
    backend.close()
    backend = qsd(Opener())
    assert backend.stamp() == left
    assert backend.settle() == left, "only opening and closing it changes nothing"
    backend.close()
    run("qemu-io", "-f", "qcow2", "-c", "write -P 8 2M 64k", image)
    assert qsd(Opener()).stamp().mtime_ns != left.mtime_ns


def test_a_filter_around_it_does_not_make_it_another_image(qsd: Callable[..., QsdBackend]) -> None:
    plain = qsd(Opener())
    known = plain.stamp().identity
    plain.close()
    assert qsd(Opener(), compress=True).stamp().identity == known


def test_once_settled_the_process_has_gone_in_good_order_and_nobody_is_alarmed(
    qsd: Callable[..., QsdBackend], image: Path
) -> None:
    opener = Opener()
    backend = qsd(opener)
    write(opener)
    backend.settle()
    run("qemu-io", "-f", "qcow2", "-c", "read -P 7 1M 64k", image)  # its locks are free
    assert backend.happened(LOST, "the server has gone", 0) is None
    assert backend.look(0) == []


def test_a_process_that_is_retired_ends_while_nobody_waits_and_has_closed_the_image(
    qsd: Callable[..., QsdBackend], image: Path
) -> None:
    opener = Opener()
    backend = qsd(opener)
    write(opener)
    backend.retire()
    deadline_s = time.monotonic() + 60
    while not backend.is_retired:
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
        assert backend.look(time.monotonic_ns()) == []
    assert backend.wake_at_ns > 1 << 61
    run("qemu-io", "-f", "qcow2", "-c", "read -P 7 1M 64k", image)
    left = backend.settle()
    backend.close()
    assert qsd(Opener()).stamp() == left


def test_what_another_has_open_can_be_looked_at_and_not_be_opened(qsd: Callable[..., QsdBackend]) -> None:
    first = qsd(Opener())
    with pytest.raises(ImageError, match=r"is in use: another vhostcache has it"):
        qsd(Opener(), lock_wait_s=0.0)
    opener = Opener()
    opener.facts = replace(opener.facts, read_only=True)  # as the server says then
    looked_at = qsd(opener, locked=False)
    assert looked_at.facts.size_bytes == 64 * MIB
    assert not looked_at.facts.read_only
    looked_at.close()
    first.close()
    qsd(Opener(), lock_wait_s=0.0)


def test_a_client_that_cannot_connect_leaves_no_process(qsd: Callable[..., QsdBackend], image: Path) -> None:
    with pytest.raises(ImageError, match=r"block device 'qcow2:.*a.qcow2': no"):
        qsd(Opener(error="no"))
    run("qemu-io", "-f", "qcow2", "-c", "write 0 64k", image)
