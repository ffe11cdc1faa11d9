# ruff: noqa: E501 - the table of refusals has one case a line
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from vhostcache.config import (
    GIB,
    KIB,
    MIB,
    Config,
    format_size,
    json_schema,
    load,
    parse_duration,
    parse_size,
)
from vhostcache.errors import UsageError

GOOD = """\
control: control.sock
log_format: json
poll_max_us: 20
volumes:
  - &first
    name: vda
    socket: vda.sock
    backend: {type: file, path: vda.img}
    ram: 64MiB
    mode: writeback
    object_size: 1M
    num_queues: 4
    destage_after: 500ms
    cache: {direct: on, path: vda.cache, size: 8GiB, sync_interval: 200ms, destage: off}
  - <<: *first
    cache: {}
    name: logs
    socket: /run/logs.sock
    socket_mode: "0660"
    backend:
      path: /dev/logs
    read_only: yes
    serial: LOGS-1
    write_depth: 8
"""


def write(folder: Path, text: str | bytes) -> str:
    path = folder / "disks.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def refused(folder: Path, text: str | bytes) -> str:
    with pytest.raises(UsageError) as caught:
        load(write(folder, text))
    message = str(caught.value)
    assert message.isprintable()
    assert caught.value.exit_status == 2
    return message.replace(f"{folder}/", "")


def test_a_file_describes_volumes_and_its_paths_are_relative_to_it(tmp_path: Path) -> None:
    config = load(write(tmp_path, GOOD))
    first, second = config.volumes
    assert config.control == str(tmp_path / "control.sock")
    assert (config.log_format, config.poll_max_us) == ("json", 20)
    assert first.socket == str(tmp_path / "vda.sock")
    assert first.backend.path == str(tmp_path / "vda.img")
    assert (first.ram, first.object_size, first.num_queues) == (64 * MIB, MIB, 4)
    assert first.destage_after == 500_000_000
    assert (first.cache_mode.writeback, first.cache_mode.direct) == (True, True)
    assert second.socket == "/run/logs.sock"
    assert second.socket_mode == 0o660
    assert second.backend.path == "/dev/logs"
    assert second.read_only
    assert (second.serial_text, second.write_depth) == ("LOGS-1", 8)
    cache = first.cache
    assert (cache.path, cache.size, cache.sync_interval) == (str(tmp_path / "vda.cache"), 8 * GIB, 200_000_000)
    assert (cache.destage, cache.drain_on_exit, cache.ram_dir) == (False, False, None)
    assert second.cache.path is None
    assert second.ram == 64 * MIB, "a merged key comes from the alias"


def test_defaults_are_those_of_the_documentation(tmp_path: Path) -> None:
    config = load(write(tmp_path, "volumes: [{name: a, socket: s, backend: {path: i}}]"))
    volume = config.volumes[0]
    assert (config.control, config.log_format, config.poll_max_us) == (None, "console", 50)
    assert (volume.ram, volume.object_size, volume.num_queues) == (256 * MIB, 4 * MIB, 64)
    assert (volume.mode, volume.read_only, volume.serial_text) == ("none", False, "a")
    assert (volume.socket_mode, volume.destage_after) == (0o600, 5 * 10**9)
    cache = volume.cache
    assert (cache.path, cache.size, cache.ram_dir) == (None, None, None)
    assert (cache.sync_interval, cache.flush_window, cache.checkpoint_interval) == (10**9, 0, 60 * 10**9)
    assert (cache.destage, cache.drain_on_exit) == (True, False)
    assert (volume.fill_bytes, volume.backend_timeout) == (4096, None)


# Each: a change of GOOD, and what the one line has to say.
CACHE = "cache: {direct: on, path: vda.cache, size: 8GiB, sync_interval: 200ms, destage: off}"
FILE = "backend: {type: file, path: vda.img}"
REFUSED = [
    ("size: 8GiB", "size: 63MiB", "volumes[0].cache.size: found '63MiB'", "a size from 64MiB to 16TiB"),
    ("size: 8GiB", "size: 8GB", "volumes[0].cache.size: found '8GB'", "write 'GiB'"),
    ("size: 8GiB", "size: 67108865", "volumes[0].cache.size: found '67108865'", "in steps of 4KiB"),
    ("size: 8GiB", "sice: 8GiB", "volumes[0].cache.sice: is not a key here", "did you mean 'size'?"),
    ("sync_interval: 200ms", "sync_interval: 0", "volumes[0].cache.sync_interval: found '0'", "from 1ms to 1min"),
    ("sync_interval: 200ms", "flush_window: 1s", "volumes[0].cache.flush_window: found '1s'", "to 100ms"),
    ("sync_interval: 200ms", "checkpoint_interval: 1ms", "volumes[0].cache.checkpoint_interval: found '1ms'", "from 1s to 1h"),
    ("destage: off", "destage: never", "volumes[0].cache.destage: found 'never'", "on, off"),
    ("destage: off", "ram_dir: ''", "volumes[0].cache.ram_dir: found ''", "a path"),
    ("path: vda.cache, ", "", "disks.yaml:14:25: volumes[0].cache.size: is of no use without a cache file", "together with cache.path"),
    ("path: vda.cache, size: 8GiB", "drain_on_exit: on", "volumes[0].cache.", "is of no use without a cache file"),
    ("path: vda.cache", "path: vda.img", "volumes[0].cache.path: found", "volumes[0].backend.path too"),
    ("path: /dev/logs", "path: vda.cache", "volumes[1].backend.path: found", "volumes[0].cache.path too"),
    ("cache: {direct: on, path", "read_only: on\n    cache: {path", "volumes[0].cache.path: a read_only disk has no use for a cache file", ""),
    ("    ram: 64MiB", "    ramm: 64MiB", "disks.yaml:9:5: volumes[0].ramm: is not a key here", "did you mean 'ram'?"),
    ("mode: writeback", "mode: writebak", "disks.yaml:10:5: volumes[0].mode: found 'writebak'; allowed: writeback, none,", "did you mean 'writeback'?"),
    ("mode: writeback", "mode: 7", "volumes[0].mode: found '7'", "unsafe"),
    ("ram: 64MiB", "ram: 64MB", "volumes[0].ram: found '64MB'", "write 'MiB'"),
    ("ram: 64MiB", "ram: lots", "volumes[0].ram: found 'lots'; not a size", "such as 256MiB"),
    ("ram: 64MiB", "ram: -1", "volumes[0].ram: found '-1'", "from 8MiB"),
    ("ram: 64MiB", "ram: on", "volumes[0].ram: found true", "from 8MiB"),
    ("ram: 64MiB", "ram: 1.5", "volumes[0].ram: found '1.5'", "from 8MiB"),
    ("ram: 64MiB", "ram: 8388609", "volumes[0].ram: found '8388609'", "in steps of 4KiB"),
    ("mode: writeback", "fill_size: 12KiB", "volumes[0].fill_size: found '12KiB'", "power of two from 4KiB to 1MiB"),
    ("mode: writeback", "readahead: 65MiB", "volumes[0].readahead: found '65MiB'", "up to 64MiB"),
    ("mode: writeback", "backend_timeout: 0", "volumes[0].backend_timeout: found '0'", "from 1ms to 24h"),
    ("object_size: 1M", "object_size: 32MiB", "volumes[0].ram: ram 64MiB is too small", "at least 128MiB"),
    ("object_size: 1M", "object_size: 3MiB", "volumes[0].object_size: found '3MiB'", "power of two"),
    ("object_size: 1M", "object_size: 4KiB", "volumes[0].object_size: found '4KiB'", "from 64KiB to 64MiB"),
    ("num_queues: 4", "num_queues: 65", "volumes[0].num_queues: found '65'", "1 to 64"),
    ("num_queues: 4", "num_queues: four", "volumes[0].num_queues: found 'four'", "1 to 64"),
    ("destage_after: 500ms", "destage_after: never", "volumes[0].destage_after: found 'never'", "from 1ms to 1h"),
    ("destage_after: 500ms", "destage_threshold: 91", "volumes[0].destage_threshold: found '91'", "from 0 to 90"),
    ("destage_after: 500ms", "policy: order", "volumes[0].policy: found 'order'", "merged, ordered (did you mean 'ordered'?)"),
    ("destage_after: 500ms", "max_batched_objects: 0", "volumes[0].max_batched_objects: found '0'", "from 1 to 64"),
    (CACHE, "cache: {direct: 1}", "volumes[0].cache.direct: found '1'", "on, off"),
    (CACHE, "cache: {no-flush: on}", "volumes[0].cache.no-flush: is not a key here", "did you mean 'no_flush'?"),
    (CACHE, "cache: on", "volumes[0].cache: found true", "writeback, direct, no_flush"),
    ("backend: {type: file, path: vda.img}", "backend: vda.img", "volumes[0].backend: found 'vda.img'", "the keys type, path"),
    ("backend: {type: file, path: vda.img}", "backend: {type: ndb, path: x}", "disks.yaml:8:15: volumes[0].backend.type: found 'ndb'", "allowed: file, nbd, qsd (did you mean 'nbd'?)"),
    ("backend: {type: file, path: vda.img}", "backend: {type: file}", "volumes[0].backend: the key 'path' is missing", ""),
    (FILE, "backend: {type: 7, path: x}", "volumes[0].backend.type: found '7'", "allowed: file, nbd, qsd"),
    (FILE, "backend: {type: nbd, path: x}", "volumes[0].backend.path: is not a key here", "allowed: type, uri, connections"),
    (FILE, "backend: {type: nbd}", "volumes[0].backend: the key 'uri' is missing", ""),
    (FILE, "backend: {type: nbd, uri: 7}", "volumes[0].backend.uri: found '7'", "an NBD URI, such as nbd://host/export"),
    (FILE, "backend: {type: nbd, uri: 'http://h/'}", "volumes[0].backend.uri: found 'http://h/'", "an NBD URI"),
    (FILE, "backend: {type: nbd, uri: 'nbd://h:x/'}", "volumes[0].backend.uri: found 'nbd://h:x/'", "port"),
    (FILE, "backend: {type: nbd, uri: 'nbd:///x'}", "volumes[0].backend.uri: found 'nbd:///x'; no host", ""),
    (FILE, "backend: {type: nbd, uri: 'nbd+unix:///'}", "volumes[0].backend.uri: found", "?socket=PATH at the end"),
    (FILE, "backend: {type: nbd, uri: 'nbd+unix://x?socket=y'}", "volumes[0].backend.uri: found", "three slashes"),
    (FILE, "backend: {type: nbd, uri: 'nbd://h', connections: 17}", "volumes[0].backend.connections: found '17'", "from 1 to 16"),
    (FILE, "backend: {type: nbd, uri: 'nbd://h', tls_psk_file: x}", "volumes[0].backend.tls_psk_file: is of no use", "together with an nbds:// or"),
    (FILE, "backend: {type: nbd, uri: 'nbds://h', tls_psk_file: x, tls_certificates: y}", "volumes[0].backend.tls_psk_file: found", "one of the two"),
    (FILE, "backend: {type: qsd}", "volumes[0].backend: the key 'blockdev' is missing", ""),
    (FILE, "backend: {type: qsd, blockdev: disk.qcow2}", "volumes[0].backend.blockdev: found 'disk.qcow2'", "{driver: qcow2, file: {driver: file, filename: PATH}}"),
    (FILE, "backend: {type: qsd, blockdev: {filename: x}}", "volumes[0].backend.blockdev: found a mapping", "a 'driver' in every block device"),
    (FILE, "backend: {type: qsd, blockdev: {driver: raw, file: {filename: x}}}", "volumes[0].backend.blockdev: found a mapping", "a 'driver' in every block device"),
    (FILE, "backend: {type: qsd, blockdev: {driver: file}, objects: [{id: x}]}", "volumes[0].backend.objects: found a list", "{qom-type: secret, id: key0, file: PATH}"),
    (FILE, "backend: {path: x, wrap: {delay: {}}}", "volumes[0].backend.wrap: found a mapping", "a list"),
    (FILE, "backend: {path: x, wrap: [{dealy: {}}]}", "volumes[0].backend.wrap[0].dealy: is not a key here", "did you mean 'delay'?"),
    (FILE, "backend: {path: x, wrap: [{delay: {}, retry: {}}]}", "volumes[0].backend.wrap[0]: found a mapping", "one of delay, fault, trace, retry in each"),
    (FILE, "backend: {path: x, wrap: [{delay: {read: soon}}]}", "volumes[0].backend.wrap[0].delay.read: found 'soon'", "from 0 to 1h"),
    (FILE, "backend: {path: x, wrap: [{fault: {erno: EIO}}]}", "volumes[0].backend.wrap[0].fault.erno: is not a key here", "did you mean 'errno'?"),
    (FILE, "backend: {path: x, wrap: [{fault: {errno: EWHAT}}]}", "volumes[0].backend.wrap[0].fault.errno: found 'EWHAT'", "the name of an error"),
    (FILE, "backend: {path: x, wrap: [{fault: {kind: [read, seek]}}]}", "volumes[0].backend.wrap[0].fault.kind: found a list", "read, write, flush, zero, or a list"),
    (FILE, "backend: {path: x, wrap: [{fault: {probability: 2}}]}", "volumes[0].backend.wrap[0].fault.probability: found '2'", "from 0 to 1"),
    (FILE, "backend: {path: x, wrap: [{fault: {torn: on, hang: on}}]}", "volumes[0].backend.wrap[0].fault.hang: found beside torn", "one of the two"),
    (FILE, "backend: {path: x, wrap: [{retry: {kind: flush}}]}", "volumes[0].backend.wrap[0].retry.kind: found 'flush'", "read, write, zero"),
    (FILE, "backend: {path: x, wrap: [{delay: {rate: 0}}]}", "volumes[0].backend.wrap[0].delay.rate: found '0'", "a size"),
    ("name: vda", "name: 'v d a'", "volumes[0].name: found 'v d a'", "letters, digits"),
    ("name: logs", "name: vda", "disks.yaml:17:5: volumes[1].name: found 'vda', which is that of volumes[0].name too", ""),
    ("socket: /run/logs.sock", "socket: ./vda.sock", "volumes[1].socket: found", "volumes[0].socket too"),
    ("socket: /run/logs.sock", "socket: control.sock", "volumes[1].socket: found", "that of control too"),
    ("path: /dev/logs", "path: x/../vda.img", "volumes[1].backend.path: found", "volumes[0].backend.path too"),
    ("socket: /run/logs.sock", f"socket: /{'x' * 107}", "volumes[1].socket: found", "at most 107 bytes (this one has 108)"),
    ('socket_mode: "0660"', "socket_mode: 0660", "volumes[1].socket_mode: found '432'", "in quotes"),
    ('socket_mode: "0660"', 'socket_mode: "0444"', "volumes[1].socket_mode: found '0444'", "the owner must"),
    ("serial: LOGS-1", "serial: 012345678901234567890", "volumes[1].serial: found", "1 to 20"),
    ("serial: LOGS-1", "serial: größe", "volumes[1].serial: found 'größe'", "ASCII"),
    ("write_depth: 8", "write_depth: 0", "volumes[1].write_depth: found '0'", "from 1 to 256"),
    ("log_format: json", "log_format: xml", "disks.yaml:2:1: log_format: found 'xml'", "console, json"),
    ("log_format: json", "io_engine: uring", "disks.yaml:2:1: io_engine: found 'uring'", "auto, threads"),
    ("poll_max_us: 20", "poll_max_us: 20ms", "poll_max_us: found '20ms'", "0 (never poll) to 10000"),
    ("poll_max_us: 20", "name: x", "disks.yaml:3:1: name: is not a key here; allowed: volumes, control, log_format, io_engine, poll_max_us", ""),
    ("poll_max_us: 20", "log_format: json", "disks.yaml:3:1: log_format: found twice (first in line 2)", ""),
    ("    write_depth: 8\n", "    write_depth: 8\n    name: again\n", "volumes[1].name: found twice (first in line 17)", ""),
    ("volumes:", "volume:", "disks.yaml:4:1: volume: is not a key here", "did you mean 'volumes'?"),
    ("read_only: yes", "read_only: {", "disks.yaml:", "is not YAML"),
    ("    name: logs", "\t  name: logs", "disks.yaml:17:1: is not YAML", ""),
    ("<<: *first", "<<: 3", "found '3'; allowed: an alias of a mapping", ""),
    ("<<: *first", "<<: *second", "is not YAML", "undefined alias"),
    ("name: vda", "name: !!python/object:os.system x", "disks.yaml:6:", "volumes[0].name"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "place", "advice"), REFUSED, ids=[f"{new.strip()[:40]}" for _, new, _, _ in REFUSED]
)
def test_what_is_wrong_is_told_with_its_place_and_what_is_allowed(
    tmp_path: Path, old: str, new: str, place: str, advice: str
) -> None:
    assert GOOD.count(old) >= 1
    message = refused(tmp_path, GOOD.replace(old, new, 1))
    assert place in message
    assert advice in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- 1", "found a list; allowed: a mapping"),
        ("volumes: []", "volumes: found an empty list"),
        ("volumes: {}", "volumes: found a mapping; allowed: a list"),
        ("volumes: [7]", "volumes[0]: found '7'; allowed: a mapping with the keys name, socket"),
        ("volumes:\n", "volumes: found nothing"),
        ("control: x", "the key 'volumes' is missing"),
        ("volumes: [{}]", "volumes[0]: the key 'name' is missing (and 2 more)"),
        ("? [a]\n: 1", "a list or mapping as a key"),
        ("a: &a [*a]", "is nested too deeply"),
        ("a: 1\n--- \nb: 2", "is not YAML"),
        (b"a: \xff", ":1: is not UTF-8"),
        (b"a: 1\nb: \xfe", ":2: is not UTF-8"),
        ("x: \x07", "is not YAML"),
        ("[" * 2000, "is n"),
    ],
)
def test_what_is_no_configuration_at_all_is_refused(tmp_path: Path, text: str | bytes, words: str) -> None:
    assert words in refused(tmp_path, text)


def backend(folder: Path, text: str) -> Any:
    return load(write(folder, f"volumes: [{{name: a, socket: s, backend: {text}}}]")).volumes[0].backend


@pytest.mark.parametrize(
    ("given", "uri", "resource"),
    [
        ("nbd://Host/a%20b", "nbd://Host/a%20b", "nbd://host:10809/a b"),
        ("nbds://me@host:99", "nbds://me@host:99", "nbd://host:99/"),
        ("nbd+unix:///?socket=/x/y", "nbd+unix:///?socket=/x/y", "nbd+unix:/x/y:"),
        ("nbd+unix:///e?socket=x%20.sock", "nbd+unix:///e?socket={folder}/x%20.sock", "nbd+unix:{folder}/x .sock:e"),
    ],
)
def test_an_nbd_backend_is_known_by_where_it_leads(tmp_path: Path, given: str, uri: str, resource: str) -> None:
    found = backend(tmp_path, f"{{type: nbd, uri: '{given}'}}")
    assert found.uri == uri.format(folder=tmp_path)
    assert found.resource == resource.format(folder=tmp_path.resolve())


def test_files_beside_an_nbd_backend_are_relative_to_the_configuration(tmp_path: Path) -> None:
    found = backend(tmp_path, "{type: nbd, uri: 'nbds://h', tls_certificates: pki, wrap: [{trace: {file: t}}]}")
    assert (found.tls_certificates, found.wrap[0].trace.file) == (f"{tmp_path}/pki", f"{tmp_path}/t")


def test_a_block_device_of_qemu_may_be_nested_or_dotted(tmp_path: Path) -> None:
    nested = backend(tmp_path, "{type: qsd, blockdev: {driver: qcow2, file: {driver: file, filename: a.qcow2}}}")
    dotted = backend(tmp_path, "{type: qsd, blockdev: {driver: qcow2, file.driver: file, file.filename: a.qcow2}}")
    assert nested.blockdev == dotted.blockdev
    assert nested.image == f"{tmp_path}/a.qcow2"
    assert nested.resource == f"{tmp_path.resolve()}/a.qcow2"
    assert nested.label == f"qcow2:{tmp_path}/a.qcow2"
    assert not nested.compresses
    locking = backend(tmp_path, "{type: qsd, blockdev: {driver: file, locking: off, filename: a}}")
    assert locking.blockdev["locking"] == "off", "YAML has a boolean there, and QEMU a word"


def test_what_only_says_how_to_use_a_block_device_does_not_change_what_it_is(tmp_path: Path) -> None:
    one = "{type: qsd, blockdev: {driver: qcow2, cache: {direct: on}, l2-cache-size: 4194304, file: {driver: https, url: 'https://me:secret@h/x'}}}"
    two = "{type: qsd, blockdev: {driver: qcow2, file: {url: 'https://me:secret@h/x', driver: https}}}"
    other = "{type: qsd, blockdev: {driver: qcow2, file: {url: 'https://me:secret@h/y', driver: https}}}"
    assert backend(tmp_path, one).resource == backend(tmp_path, two).resource != backend(tmp_path, other).resource
    assert backend(tmp_path, one).label == "qcow2:https:https://h/x"


def test_a_filter_around_an_image_does_not_change_what_it_is(tmp_path: Path) -> None:
    plain = backend(tmp_path, "{type: qsd, blockdev: {driver: qcow2, file: {driver: file, filename: a}}}")
    small = backend(
        tmp_path, "{type: qsd, blockdev: {driver: compress, file: {driver: qcow2, file: {driver: file, filename: a}}}}"
    )
    assert plain.canonical == small.canonical
    assert small.compresses


def test_a_file_and_an_image_in_it_are_not_both_served(tmp_path: Path) -> None:
    text = """volumes:
    - {name: a, socket: a.s, backend: {path: x}}
    - {name: b, socket: b.s, backend: {type: qsd, blockdev: {driver: qcow2, file: {driver: file, filename: x}}}}
    """
    assert "volumes[1].backend.blockdev: found" in refused(tmp_path, text)


def test_wrappers_are_given_to_the_engine_as_words(tmp_path: Path) -> None:
    found = backend(
        tmp_path,
        """path: x, wrap: [{delay: {read: 2ms, rate: 1MiB}}, {fault: {errno: ENOSPC, probability: 1.0e-3}},
        {fault: {kind: [read, write], torn: on, while_exists: a b}}, {trace: {file: /back\\slash}}, {retry: {}}]""".join(
            "{}"
        ),
    )
    assert [(wrap.kind, wrap.wrapper.parameters()) for wrap in found.wrap] == [
        ("delay", "read=2000000 write=0 flush=0 zero=0 jitter=0 seed=0 rate=1048576"),
        ("fault", "kind=read,write,flush,zero errno=ENOSPC probability=0.001 seed=0 after=0 torn=0 hang=0"),
        ("fault", f"kind=read,write errno=EIO seed=0 after=0 while_exists={tmp_path}/a\\ b torn=1 hang=0"),
        ("trace", "file=/back\\\\slash"),
        ("retry", "kind=read,write,zero attempts=10 first=100000000 max=5000000000"),
    ]


def test_aliases_cannot_make_a_small_file_stand_for_a_huge_one(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert "stands for too much" in refused(tmp_path, "\n".join(lines))


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    assert "larger than 1MiB" in refused(tmp_path, b"#" * (MIB + 1))


def test_more_volumes_than_a_daemon_takes_are_refused(tmp_path: Path) -> None:
    text = "volumes:\n" + "".join(f"- {{name: v{n}, socket: s{n}, backend: {{path: i{n}}}}}\n" for n in range(257))
    assert "volumes: found 257 volumes; allowed: at most 256" in refused(tmp_path, text)


def test_a_path_that_is_too_long_only_beside_its_file_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 60)
    folder.mkdir()
    message = refused(folder, f"volumes: [{{name: a, socket: {'s' * 60}, backend: {{path: i}}}}]")
    assert re.search(r"disks.yaml:1:\d+: volumes\[0\].socket: found .*at most 107 bytes", message)


@pytest.mark.parametrize("path", ["/", "/nowhere/disks.yaml"])
def test_a_file_that_cannot_be_read_is_named(path: str) -> None:
    with pytest.raises(UsageError, match=f"configuration '{path}': (is a directory|does not exist)"):
        load(path)


def test_two_readers_may_share_an_image_and_a_writer_shares_with_nobody(tmp_path: Path) -> None:
    text = "volumes:\n" + "".join(
        f"- {{name: v{n}, socket: s{n}, backend: {{path: same}}, read_only: {{}}}}\n" for n in range(2)
    )
    load(write(tmp_path, text.replace("{}", "on")))
    message = refused(tmp_path, text.replace("{}", "on", 1).replace("{}", "off"))
    assert "volumes[1].backend.path: found" in message
    message = refused(tmp_path, text.replace("{}", "off", 1).replace("{}", "on"))
    assert "volumes[1].backend.path: found" in message


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("4k", 4 * KIB),
        ("4K", 4 * KIB),
        ("4KiB", 4 * KIB),
        ("256M", 256 * MIB),
        (" 256 MiB ", 256 * MIB),
        ("1.5GiB", 3 * GIB // 2),
        ("2T", 2048 * GIB),
        ("77b", 77),
    ],
)
def test_sizes_are_in_powers_of_1024_as_in_qemu(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1", "1e3", "0x10", "4 5", "4MB", "0.3", "1.0001K", "१K", "4Mi", "4P"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|could mean|whole number"):
        parse_size(text)


@pytest.mark.parametrize("size", [0, 1, 512, 4 * KIB, 4 * MIB, 5 * GIB, 1000, 1536])
def test_a_size_is_written_as_it_can_be_read(size: int) -> None:
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize(
    ("text", "ns"), [("5", 5 * 10**9), ("5s", 5 * 10**9), ("1.5s", 1_500_000_000), ("500ms", 5 * 10**8), ("2min", 120 * 10**9), ("1h", 3600 * 10**9), ("10us", 10_000)]
)  # fmt: skip
def test_durations_have_units_and_a_number_alone_is_seconds(text: str, ns: int) -> None:
    assert parse_duration(text) == ns


@pytest.mark.parametrize("value", [5, 5.0, "5s", "5000ms"])
def test_a_duration_may_be_a_number(tmp_path: Path, value: object) -> None:
    text = f"volumes: [{{name: a, socket: s, backend: {{path: i}}, destage_after: {value}}}]"
    assert load(write(tmp_path, text)).volumes[0].destage_after == 5 * 10**9


def as_plain(text: str) -> Any:
    return yaml.safe_load(text)


def test_the_schema_is_a_schema_and_accepts_what_the_program_accepts() -> None:
    schema = json.loads(json.dumps(json_schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(as_plain(GOOD), schema, cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("ram: 64MiB", "ramm: 64MiB"),
        ("mode: writeback", "mode: writebak"),
        ("ram: 64MiB", "ram: 64MB"),
        ("num_queues: 4", "num_queues: 65"),
        ("name: vda", "name: 'v d a'"),
        ("backend: {type: file, path: vda.img}", "backend: {}"),
        ('socket_mode: "0660"', "socket_mode: 0660"),
    ],
)
def test_the_schema_refuses_what_the_program_refuses(old: str, new: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(as_plain(GOOD.replace(old, new, 1)), json_schema(), cls=jsonschema.Draft202012Validator)


def test_every_key_has_a_description_in_the_schema() -> None:
    schema = json_schema()
    for model in (schema, *schema["$defs"].values()):
        for key, about in model["properties"].items():
            assert about.get("description") or "$ref" in about or key == "volumes", key


def test_every_example_is_a_configuration() -> None:
    examples = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
    for example in examples:
        assert load(str(example)).volumes
        jsonschema.validate(as_plain(example.read_text()), json_schema(), cls=jsonschema.Draft202012Validator)


def test_a_configuration_cannot_be_changed_after_it_has_been_checked(tmp_path: Path) -> None:
    config = load(write(tmp_path, GOOD))
    with pytest.raises(ValueError, match="frozen"):
        config.volumes[0].ram = 1
    assert isinstance(config, Config)
