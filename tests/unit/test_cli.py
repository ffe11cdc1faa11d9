"""The installed program, as a subprocess: what a user sees when something is wrong; and nothing has been touched."""

import contextlib
import io
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import BaseModel
from rich.console import Console

from tests.guest import VHOSTCACHE
from vhostcache.cli_options import ConfigOption
from vhostcache.cli_serve import export_command
from vhostcache.cli_status import print_status, remarks, troubles
from vhostcache.config import CacheConfig, Config, VolumeConfig, parse_duration, parse_size
from vhostcache.config_backend import NbdBackendConfig

TIMEOUT_S = 60  # a safety net
MIB = 1 << 20


def vhostcache(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [VHOSTCACHE, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        stdin=subprocess.DEVNULL,
        **options,
    )


def refused(status: int, *arguments: str | Path, **options: Any) -> str:
    """The one line on standard error."""
    done = vhostcache(*arguments, **options)
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("vhostcache: ")
    return lines[0]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(64 * MIB)
    return path


@contextlib.contextmanager
def served(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A daemon that is ready; killed at the end if it still lives."""
    command = [str(VHOSTCACHE), *map(str, arguments), "--log-format", "json"]
    daemon = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )
    try:
        assert daemon.stderr is not None
        for line in daemon.stderr:
            if json.loads(line)["event"] == "ready":
                break
        else:
            raise AssertionError(f"it ended with {daemon.wait()}")
        yield daemon
    finally:
        daemon.kill()
        daemon.communicate()


def stop(daemon: subprocess.Popen[str], number: int = signal.SIGTERM) -> list[dict[str, Any]]:
    """The events from the signal to its end."""
    daemon.send_signal(number)
    _, errors = daemon.communicate(timeout=TIMEOUT_S)
    return [json.loads(line) for line in errors.splitlines()]


# Help.


@pytest.mark.parametrize("command", ["create", "export", "serve", "status", "schema", "bench", "version"])
def test_every_command_has_help_and_stands_in_the_list(command: str) -> None:
    assert f"\n  {command}" in vhostcache("--help").stdout
    done = vhostcache(command, "--help")
    assert done.returncode == 0
    assert f"Usage: vhostcache {command}" in done.stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from vhostcache import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'pydantic', 'yaml', 'structlog', 'rich.table', 'cffi', 'vhostcache.engine'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=TIMEOUT_S)


def test_every_mode_is_explained_in_the_help() -> None:
    text = vhostcache("export", "--help").stdout
    for mode in ("writeback", "none", "writethrough", "directsync", "unsafe"):
        assert f"\n    {mode} " in text


def keys(model: type[BaseModel], *around: str) -> Iterator[tuple[str, ...]]:
    """Of a model and the models in it."""
    for key in model.model_fields:
        if key == "cache":
            yield from keys(CacheConfig, *around, key)
        elif key == "backend":
            yield from keys(NbdBackendConfig, *around, key)
        else:
            yield (*around, key)


def config_options() -> dict[tuple[str, ...], ConfigOption]:
    return {option.place: option for option in export_command.params if isinstance(option, ConfigOption)}


def test_every_key_of_the_file_is_an_option_of_export() -> None:
    in_the_file = {*keys(VolumeConfig), *keys(Config)} - {("volumes",)}
    # What IMAGE says, and what is for tests.
    in_the_file -= {("backend", key) for key in ("type", "uri", "wrap")}
    assert set(config_options()) == in_the_file


def test_every_option_is_explained_in_one_line_and_says_its_default() -> None:
    help_text = vhostcache("export", "--help", env={**os.environ, "COLUMNS": "110"}).stdout
    models: dict[str, type[BaseModel]] = {"cache": CacheConfig, "backend": NbdBackendConfig}
    for place, option in config_options().items():
        (line,) = [line for line in help_text.splitlines() if line.startswith(f"  {option.opts[0]} ")]
        said = re.search(r"\[default: (.*)\]", line)
        model = Config if option.of_daemon else models.get(place[0], VolumeConfig) if place[1:] else VolumeConfig
        default = model.model_fields[place[-1]].default
        if default in (None, False) or model.model_fields[place[-1]].is_required():
            continue  # none, or a rule
        assert said is not None, line
        value: object = {"on": True}.get(said[1], said[1])
        if option.type.name in ("size", "time"):
            value = (parse_size if option.type.name == "size" else parse_duration)(said[1])
        elif place == ("socket_mode",):
            value = int(said[1], 8)
        assert str(value) == str(default), line


def test_the_version_is_that_of_the_package() -> None:
    done = vhostcache("version")
    assert done.stdout.startswith("vhostcache ")
    assert done.stdout.split()[1][0].isdigit()


# Wrong questions: exit status 2.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["exprot"], "No such command 'exprot'"),
        (["export", "x.img"], "Missing option '--socket'"),
        (["export", "x.img", "--socket", "s", "--mode", "writebak"], "'writebak' is not one of 'writeback', 'none'"),
        (["export", "x.img", "--socket", "s", "--ram", "256MB"], "write 'MiB'"),
        (["export", "x.img", "--socket", "s", "--ram", "1k"], "--ram': found '1k'; allowed: a size from 8MiB"),
        (["export", "x.img", "--socket", "s", "--ram", "8MiB"], "--ram: ram 8MiB is too small for objects of 4MiB"),
        (["export", "x.img", "--socket", "s", "--object-size", "3M"], "a power of two from 64KiB to 64MiB"),
        (["export", "x.img", "--socket", "s", "--num-queues", "0"], "--num-queues"),
        (["export", "x.img", "--socket", "s", "--cache-direct", "maybe"], "'maybe' is not one of 'on', 'off'"),
        (["export", "x.img", "--socket", "s", "--name", "a b"], "--name: found 'a b'; allowed: 1 to 64 letters"),
        (["export", "x.img", "--socket", "s", "--serial", "x" * 21], "--serial: found"),
        (["export", "x.img", "--socket", "s", "--socket-mode", "9"], "--socket-mode: found '9'"),
        (["export", "x.img", "--socket", "/" + "s" * 107], "--socket: found"),
        (["export", "x.img", "--socket", "/" + "s" * 100], "--control: found"),
        (["export", "x.img", "--socket", "s", "--control", "s"], "--socket: found"),
        (["export", "", "--socket", "s"], "IMAGE: found ''; allowed: a path"),
        (["export", "x.img", "--socket", "s", "--destage-after", "soon"], "--destage-after': found 'soon'"),
        (
            ["export", "x.img", "--socket", "s", "--cache-size", "8GiB"],
            "--cache-size: is of no use without a cache file",
        ),
        (
            ["export", "x.img", "--socket", "s", "--cache", "c", "--cache-size", "1M"],
            "found '1M'; allowed: a size from 64",
        ),
        (
            ["export", "x.img", "--socket", "s", "--cache", "c", "--sync-interval", "1h"],
            "'--sync-interval': found '1h'",
        ),
        (["export", "x.img", "--socket", "s", "--cache", "c", "--destage", "no"], "'no' is not one of 'on', 'off'"),
        (["export", "x.img", "--socket", "s", "--cache", "x.img"], "--cache: found '"),
        (["export", "x.img", "--socket", "s", "--cache", "c", "--read-only"], "--cache: a --read-only disk has no use"),
        (
            ["export", "x.img", "--socket", "s", "--destage-threshold", "30"],
            "--destage-threshold: is of no use without a cache file; allowed: together with --cache",
        ),
        (
            ["export", "x.img", "--socket", "s", "--cache", "c", "--destage-threshold", "91"],
            "found '91'; allowed: a percentage from 0 to 90",
        ),
        (["export", "x.img", "--socket", "s", "--cache", "c", "--policy", "both"], "'both' is not one of 'merged', 'o"),
        (["export", "x.img", "--socket", "s", "--fill-size", "3k"], "found '3k'; allowed: a power of two from 4KiB"),
        (["export", "x.img", "--socket", "s", "--backend-timeout", "x"], "not a duration; allowed: a duration from"),
        (["export", "x.img", "--socket", "s", "--connections", "2"], "--connections: is of no use with 'x.img'; allow"),
        (["export", "nbd://h", "--socket", "s", "--connections", "17"], "found '17'; allowed: a number from 1 to 16"),
        (
            ["export", "nbd://h", "--socket", "s", "--tls-psk-file", "k"],
            "--tls-psk-file: is of no use without TLS; allowed: together with an nbds:// or nbds+unix:// URI",
        ),
        (
            ["export", "nbds://h", "--socket", "s", "--tls-psk-file", "k", "--tls-certificates", "f"],
            "--tls-psk-file: found beside --tls-certificates; allowed: one of the two",
        ),
        (["drain", "c", "--backend", "nbd://h", "--tls-verify", "off"], "--tls-verify: is of no use without TLS"),
        (["drain", "c", "--config", "f", "--tls-verify", "off"], "--tls-verify: is of no use without TLS"),
        (
            ["check", "c", "--backend", "nbds://h", "--tls-psk-file", "k", "--tls-certificates", "f"],
            "--tls-psk-file: found beside --tls-certificates; allowed: one of the two",
        ),
        (["create", "x.img"], "Missing option '--size'"),
        (["create", "x.img", "--size", "1000"], "found '1000'; allowed: a multiple of 512"),
        (["create", "x.img", "--size", "0"], "a multiple of 512"),
        (["create", "x.img", "--size", "1P"], "not a size"),
        (["serve", "/nowhere.yaml"], "configuration '/nowhere.yaml': does not exist"),
        (["status"], "Missing argument"),
    ],
)
def test_a_wrong_question_is_one_line_and_exit_status_two(tmp_path: Path, arguments: list[str], words: str) -> None:
    assert words in refused(2, *arguments, cwd=tmp_path)
    assert os.listdir(tmp_path) == []


def test_an_error_in_a_file_names_file_line_key_and_what_is_allowed(tmp_path: Path) -> None:
    config = tmp_path / "disks.yaml"
    config.write_text("volumes:\n- name: a\n  socket: s\n  backend: {path: i}\n  mode: writebak\n")
    line = refused(2, "serve", config)
    assert f"{config}:5:3: volumes[0].mode: found 'writebak'; allowed: writeback, none, writethrough" in line
    assert line.endswith("(did you mean 'writeback'?)")
    config.write_text(config.read_text().replace("mode: writebak", "modus: none"))
    assert f"{config}:5:3: volumes[0].modus: is not a key here; allowed: name, socket," in refused(2, "serve", config)


# A world that says no: exit status 1.


def test_a_missing_image_is_one_line(tmp_path: Path) -> None:
    line = refused(1, "export", "none.img", "--socket", "s", cwd=tmp_path)
    assert "image 'none.img': does not exist" in line
    assert "vhostcache create 'none.img' --size" in line
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", [0, 1, 511, 1000, 64 * MIB + 1])
def test_a_size_that_is_not_a_multiple_of_512_is_one_line_and_the_image_stays(tmp_path: Path, size: int) -> None:
    image = tmp_path / "odd.img"
    image.write_bytes(b"x" * min(size, 1000))
    os.truncate(image, size)
    before = image.stat()
    assert "a multiple of 512" in refused(1, "export", image, "--socket", tmp_path / "s")
    assert (image.stat().st_size, image.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert os.listdir(tmp_path) == ["odd.img"]


def test_no_permission_is_one_line(tmp_path: Path, image: Path, heeding_permissions: dict[str, Any]) -> None:
    image.chmod(0o444)
    line = refused(1, "export", image, "--socket", tmp_path / "s", **heeding_permissions)
    assert "permission denied" in line
    assert "--read-only" in line
    assert os.listdir(tmp_path) == ["disk.img"]


def test_a_socket_of_a_living_process_is_refused_and_left_alone(tmp_path: Path, image: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "s"))
        other.listen()
        assert "is in use by another process" in refused(1, "export", image, "--socket", tmp_path / "s")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "s"))


def test_a_second_daemon_on_the_image_is_refused_and_the_first_goes_on(tmp_path: Path, image: Path) -> None:
    with served("export", image, "--socket", tmp_path / "a") as first:
        line = refused(1, "export", image, "--socket", tmp_path / "b")
        assert f"image '{image}': is in use" in line
        assert not (tmp_path / "b").exists()
        done = subprocess.run(
            ["qemu-io", "-f", "raw", "-c", "write 0 512", image], capture_output=True, text=True, timeout=TIMEOUT_S
        )
        assert 'Failed to get "write" lock' in done.stderr
        assert stop(first)[-1]["event"] == "statistics"
        assert first.returncode == 0


def test_who_reads_json_reads_a_refusal_as_json(tmp_path: Path) -> None:
    done = vhostcache("export", tmp_path / "none.img", "--socket", tmp_path / "s", "--log-format", "json")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    event = json.loads(line)
    assert (event["event"], event["level"]) == ("refused", "error")
    assert "does not exist" in event["error"]


def test_a_second_daemon_on_the_socket_is_refused_and_the_first_goes_on(tmp_path: Path, image: Path) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(bytes(MIB))
    with served("export", image, "--socket", tmp_path / "s") as first:
        assert "is in use by a running vhostcache" in refused(1, "export", other, "--socket", tmp_path / "s")
        assert vhostcache("status", tmp_path / "s.control").returncode == 0
        stop(first)
        assert first.returncode == 0


def test_a_killed_daemon_leaves_nothing_that_stops_the_next(tmp_path: Path, image: Path) -> None:
    with served("export", image, "--socket", tmp_path / "s") as first:
        first.kill()
        first.wait()
        assert (tmp_path / "s").exists()
        with served("export", image, "--socket", tmp_path / "s") as second:
            stop(second)
            assert second.returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["disk.img"]


def test_nothing_starts_if_one_of_many_disks_is_refused(tmp_path: Path, image: Path) -> None:
    config = tmp_path / "disks.yaml"
    disks = [
        {"name": "good", "socket": "good", "backend": {"path": "disk.img"}},
        {"name": "bad", "socket": "bad", "backend": {"path": "none.img"}},
    ]
    config.write_text(yaml.safe_dump({"volumes": disks}))
    assert "none.img': does not exist" in refused(1, "serve", config)
    assert sorted(os.listdir(tmp_path)) == ["disk.img", "disks.yaml"]


def test_an_image_that_shrinks_is_one_clear_event_and_exit_status_one(tmp_path: Path, image: Path) -> None:
    with served("export", image, "--socket", tmp_path / "s") as daemon:
        os.truncate(image, MIB)
        # A read beyond the end finds out at once; an idle daemon looks when it is next used.
        bench = vhostcache("bench", tmp_path / "s", "--rw", "read", "--bs", "64k", "--offset", "32m", "--size", "1m")
        assert bench.returncode == 1
        _, errors = daemon.communicate(timeout=TIMEOUT_S)
        events = [json.loads(line) for line in errors.splitlines()]
        (shrank,) = [event for event in events if event["event"] == "image-shrank"]
        assert (shrank["size_bytes"], shrank["expected_bytes"]) == (MIB, 64 * MIB)
        assert daemon.returncode == 1
    assert image.stat().st_size == MIB, "nothing has been written"


# create.


def test_a_new_image_is_sparse_and_full_of_zeroes(tmp_path: Path) -> None:
    done = vhostcache("create", tmp_path / "new.img", "--size", "4GiB")
    assert done.stdout == f"{tmp_path}/new.img: 4GiB\n"
    status = (tmp_path / "new.img").stat()
    assert status.st_size == 4 << 30
    assert status.st_blocks < 100


def test_an_existing_file_is_never_touched(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    assert "already exists" in refused(1, "create", path, "--size", "1M")
    assert path.read_text() == "data"
    link = tmp_path / "link"
    link.symlink_to("elsewhere")
    assert "already exists" in refused(1, "create", link, "--size", "1M")
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_that_is_missing_or_closed_is_one_line(tmp_path: Path, heeding_permissions: dict[str, Any]) -> None:
    assert "the folder" in refused(1, "create", tmp_path / "none" / "x", "--size", "1M")
    tmp_path.chmod(0o555)
    line = refused(1, "create", tmp_path / "x", "--size", "1M", **heeding_permissions)
    tmp_path.chmod(0o755)
    assert "permission denied" in line


def test_a_size_that_the_file_system_cannot_hold_leaves_no_file(tmp_path: Path) -> None:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))

    assert "cannot be" in refused(1, "create", tmp_path / "x", "--size", "2M", preexec_fn=limit)
    assert os.listdir(tmp_path) == []


# schema, serve --check, status.


def test_the_schema_is_printed_as_json() -> None:
    schema = json.loads(vhostcache("schema").stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert "volumes" in schema["required"]


def test_a_file_can_be_checked_without_starting_anything(tmp_path: Path) -> None:
    config = tmp_path / "disks.yaml"
    config.write_text("volumes: [{name: a, socket: s, backend: {path: none.img}}]")
    assert vhostcache("serve", "--check", config).stdout == f"{config}: 1 volume, all right\n"
    assert os.listdir(tmp_path) == ["disks.yaml"]


def test_status_is_a_table_for_people_and_json_for_programs(tmp_path: Path, image: Path) -> None:
    with served("export", image, "--socket", tmp_path / "s", "--name", "root") as daemon:
        table = vhostcache("status", tmp_path / "s.control").stdout
        assert "root" in table
        assert "serving" in table
        answer = json.loads(vhostcache("status", "--json", tmp_path / "s").stdout)
        (volume,) = answer["volumes"]
        assert (volume["name"], volume["connected"], volume["size_bytes"]) == ("root", False, 64 * MIB)
        assert answer["pid"] == daemon.pid
        stop(daemon)
        assert "control': " in refused(1, "status", tmp_path / "s.control")


def volume_status(**changes: Any) -> dict[str, Any]:
    """What a daemon says of a volume where all is well."""
    cache = {
        "path": "/ssd/root.cache",
        "log_bytes": 1 << 30,
        "log_used_bytes": 900 * MIB,
        "volatile_bytes": 0,
        "unreadable_bytes": 0,
        "lost_bytes": 0,
        "log_hits": 10,
        "pace_bytes_per_s": None,
        "log_full": False,
        "fails": False,
        "read_cache": {"bytes": 512 * MIB, "used_bytes": 128 * MIB, "hits": 30},
    }
    volume = {
        "name": "root",
        "state": "serving",
        "failure": None,
        "storage": "held",
        "storage_waits_for": None,
        "connected": True,
        "backend_status": {"type": "nbd", "state": "connected"},
        "mode": "none",
        "write_through": False,
        "read_only": False,
        "size_bytes": 4 << 30,
        "resize": None,
        "ram_bytes": 256 * MIB,
        "dirty_bytes": 256 * MIB,
        "cached_bytes": 64 * MIB,
        "hits": 40,
        "misses": 20,
        "flushes_received": 1234,
        "backend_error": None,
        "backend_held": None,
        "read_error": None,
        "waiting": {"room": 0, "backend": 0},
        "settings": {"destage": True},
        "cache": {**cache, **changes.pop("cache", {})},
    }
    return {**volume, **changes}


def printed(*volumes: dict[str, Any]) -> list[str]:
    console = Console(width=200, record=True, file=io.StringIO())
    print_status(console, {"version": "9", "pid": 7, "uptime_s": 60, "state": "serving", "volumes": volumes})
    return console.export_text().splitlines()


def test_a_volume_that_is_well_is_one_line_with_log_and_read_cache() -> None:
    title, headings, line = printed(volume_status())
    assert title.rstrip() == "vhostcache 9, process 7, serving for 60 s"
    values = dict(zip(re.split(r"  +", headings.strip()), re.split(r"  +", line.strip()), strict=True))
    assert values == {
        "volume": "root",
        "state": "serving",
        "guest": "connected",
        "mode": "none",
        "backend": "nbd connected",
        "size": "4 GiB",
        "dirty": "256 MiB",
        "ram": "25 % of 256 MiB",
        "dirty log": "25 % of 1 GiB",
        "read cache": "25 % of 512 MiB",
        "its hits": "60 %",
        "all hits": "80 %",
        "flushes": "1,234",
    }


def test_without_a_cache_file_there_is_no_log_and_no_read_cache() -> None:
    _, headings, line = printed({**volume_status(misses=0, hits=0), "cache": None})
    values = dict(zip(re.split(r"  +", headings.strip()), re.split(r"  +", line.strip()), strict=True))
    assert [values[key] for key in ("dirty log", "read cache", "its hits", "all hits")] == ["-", "-", "-", "-"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"backend_status": {"type": "nbd", "state": "lost", "seconds": 12.3, "error": "refused", "waiting": 3}},
         "backend lost for 12 s: refused (3 operations waiting)"),
        ({"backend_held": "no space", "backend_error": "no space"}, "backend held: no space (when it is mended: vhost"),
        ({"backend_error": "input/output error"}, "backend cannot be written: input/output error (it is tried again"),
        ({"waiting": {"room": 0, "backend": 1}, "read_error": "timed out"}, "1 request waiting to read the backend"),
        ({"cache": {"fails": True}}, "cache device fails: '/ssd/root.cache': no write is acknowledged"),
        ({"cache": {"unreadable_bytes": 4096}}, "the cache device cannot read 4 KiB that only the log has"),
        ({"cache": {"lost_bytes": 8192}}, "8 KiB lost in the log"),
        ({"failure": "image shrank: give it back"}, "failed: image shrank: give it back"),
        ({"storage": "waiting", "storage_waits_for": "is in use"}, "the guest waits for its storage: is in use"),
        ({"resize": {"running": False, "error": "no space"}}, "the last resize has failed: no space"),
    ],
)  # fmt: skip
def test_status_says_what_goes_wrong(changes: dict[str, Any], line: str) -> None:
    (found,) = troubles(volume_status(**changes))
    assert found.startswith(line)
    assert printed(volume_status(**changes))[-1].startswith(f"root: {line}")


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({}, []),
        ({"cache": {"pace_bytes_per_s": 8 * MIB}, "dirty_bytes": 768 * MIB, "waiting": {"room": 2, "backend": 0}},
         ["writes are slowed to 8 MiB a second: 75 % of the log is dirty", "2 writes waiting"]),
        ({"cache": {"log_full": True}, "dirty_bytes": 1 << 30, "waiting": {"room": 1, "backend": 0}},
         ["1 write waiting for room in the log: 100 % of the log is dirty"]),
        ({"cache": {"fails": True}, "waiting": {"room": 1, "backend": 0}}, ["1 write waiting for the cache device"]),
        ({"settings": {"destage": False}}, ["destage is off: the image gets nothing before the log is full"]),
        ({"resize": {"running": True, "error": ""}}, ["is being resized"]),
    ],
)  # fmt: skip
def test_status_says_what_waits_and_what_is_unusual(changes: dict[str, Any], lines: list[str]) -> None:
    assert list(remarks(volume_status(**changes))) == lines


# serve, and the life of a daemon.


def test_many_disks_are_served_from_one_file_with_relative_paths(tmp_path: Path) -> None:
    disks: list[dict[str, Any]] = []
    for name in ("one", "two"):
        (tmp_path / f"{name}.img").write_bytes(bytes(MIB))
        disks.append({"name": name, "socket": f"{name}.s", "backend": {"path": f"{name}.img"}, "ram": "16MiB"})
    config = tmp_path / "disks.yaml"
    config.write_text(yaml.safe_dump({"volumes": disks, "control": "control.s"}))
    with served("serve", config) as daemon:
        for disk in disks:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(tmp_path / disk["socket"]))
        answer = json.loads(vhostcache("status", "--json", tmp_path / "control.s").stdout)
        assert [volume["name"] for volume in answer["volumes"]] == ["one", "two"]
        events = stop(daemon, signal.SIGINT)
        assert daemon.returncode == 0
    assert {event["volume"] for event in events if event["event"] == "statistics"} == {"one", "two"}
    assert sorted(os.listdir(tmp_path)) == ["disks.yaml", "one.img", "two.img"]


def test_the_socket_has_the_permissions_that_were_asked_for(tmp_path: Path, image: Path) -> None:
    with served("export", image, "--socket", tmp_path / "s", "--socket-mode", "0666") as daemon:
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o666
        assert (tmp_path / "s.control").stat().st_mode & 0o777 == 0o600
        stop(daemon)


def test_closed_standard_descriptors_stop_nothing(tmp_path: Path, image: Path) -> None:
    with served("export", image, "--socket", tmp_path / "s") as daemon:
        assert daemon.stdout is not None
        assert daemon.stderr is not None
        daemon.stdout.close()
        daemon.stderr.close()
        assert vhostcache("status", tmp_path / "s.control").returncode == 0
        daemon.send_signal(signal.SIGUSR1)
        assert vhostcache("status", tmp_path / "s.control").returncode == 0
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(TIMEOUT_S) == 0
        daemon.stdout = daemon.stderr = None


def test_an_idle_daemon_uses_no_processor_time(tmp_path: Path, image: Path) -> None:
    with served("export", image, "--socket", tmp_path / "s") as daemon:

        def ticks() -> int:
            fields = Path(f"/proc/{daemon.pid}/stat").read_text().rpartition(")")[2].split()
            return int(fields[11]) + int(fields[12])

        def switches() -> int:
            text = Path(f"/proc/{daemon.pid}/status").read_text()
            return int(text.split("voluntary_ctxt_switches:")[1].split()[0])

        time.sleep(0.5)
        before = ticks(), switches()
        time.sleep(2)
        assert (ticks(), switches()) == before, "it has not even woken up"
        stop(daemon)
