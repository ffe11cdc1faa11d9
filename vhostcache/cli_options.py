"""The options that stand for keys of the configuration, in the groups in which `--help` shows them.

Owns what each option is called and how it is explained, and which key it stands for: `ConfigOption.place`. What a value
may be is said by the configuration (config.py), which is imported when one is given. Nothing here decides anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeVar

import click

from vhostcache.modes import DEFAULT, MODES

Command = TypeVar("Command", bound=Callable[..., Any])

# What a value may be.


class _Quantity(click.ParamType):  # type: ignore[type-arg]
    """Checked by the limits of its configuration key; it stays text, as in a file, but for numbers."""

    def __init__(self, name: str, limits: str) -> None:
        self.name = name
        self._limits = limits

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | int:
        from pydantic_core import PydanticCustomError

        from vhostcache import config, config_backend

        limits = getattr(config, self._limits, None) or getattr(config_backend, self._limits)
        parse = {"size": config.parse_size, "time": config.parse_duration, "number": _number}[self.name]
        try:
            number = limits.check(parse(str(value)))
        except ValueError as error:
            why_not = "" if isinstance(error, PydanticCustomError) else f"{error}; "
            self.fail(f"found '{value}'; {why_not}allowed: {limits.allowed}", param, ctx)
        return int(number) if self.name == "number" else str(value)


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("not a number") from None


def size(limits: str) -> _Quantity:
    return _Quantity("size", limits)


def _time(limits: str) -> _Quantity:
    return _Quantity("time", limits)


def _count(limits: str) -> _Quantity:
    return _Quantity("number", limits)


class _OnOff(click.Choice[str]):
    """As YAML has it."""

    def __init__(self) -> None:
        super().__init__(["on", "off"])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(value, param, ctx) == "on"


# Options in groups.


class ConfigOption(click.Option):
    """Stands for a key of the configuration. `place`: the keys from a volume to it, or from the daemon's top."""

    def __init__(self, declarations: list[str], *, key: str, group: str, of_daemon: bool = False, **more: Any) -> None:
        super().__init__(declarations, **more)
        self.group = group
        self.place = tuple(key.split("."))
        self.of_daemon = of_daemon


class GroupedCommand(click.Command):
    """Shows its options in groups, in columns; those without one are the daemon's."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                groups.setdefault(getattr(parameter, "group", _DAEMON), []).append(record)
        width = max(len(name) for rows in groups.values() for name, _ in rows)
        for title in sorted(groups, key=lambda title: title == _DAEMON):
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), about) for name, about in groups[title]])


_DAEMON: Final = "The daemon"


def _options(group: str, *made: tuple[str, str, dict[str, Any]]) -> list[Callable[[Any], Any]]:
    return [click.option(flag, cls=ConfigOption, key=key, group=group, **more) for flag, key, more in made]


def _option(flag: str, key: str, about: str, kind: Any = None, **more: Any) -> tuple[str, str, dict[str, Any]]:
    return flag, key, {"help": about, "type": kind, **more}


def _flag(flag: str, key: str, about: str) -> tuple[str, str, dict[str, Any]]:
    return flag, key, {"help": about, "is_flag": True, "default": None}


_FOLDER: Final[dict[str, Any]] = {"kind": click.Path(), "metavar": "FOLDER"}
_FILE: Final[dict[str, Any]] = {"kind": click.Path(), "metavar": "FILE"}
_PATH: Final[dict[str, Any]] = {"kind": click.Path(), "metavar": "PATH"}

_DISK: Final = _options(
    "The disk",
    _option("--socket", "socket", "The vhost-user socket to listen on.", **_PATH, required=True),
    _option(
        "--socket-mode",
        "socket_mode",
        "Its permissions; 0660 or 0666 if QEMU is another user.  [default: 0600]",
        metavar="OCTAL",
    ),
    _option("--name", "name", "What events and statistics call the disk.", default="vda", show_default=True),
    _option("--serial", "serial", "Its serial number.  [default: its name]", metavar="TEXT"),
    _option("--num-queues", "num_queues", "The most queues the guest may use.  [default: 64]", _count("QUEUES")),
    _flag("--read-only", "read_only", "Serve a read-only disk; readers may share an image."),
)
_CACHE: Final = _options(
    "The cache",
    _option(
        "--mode",
        "mode",
        "QEMU's cache mode, see above.",
        click.Choice(list(MODES)),
        metavar="MODE",
        default=DEFAULT,
        show_default=True,
    ),
    _option(
        "--cache-writeback",
        "cache.writeback",
        "Instead of the mode's: acknowledge writes from RAM.",
        _OnOff(),
    ),
    _option("--cache-direct", "cache.direct", "Instead of the mode's: open the image with O_DIRECT.", _OnOff()),
    _option("--cache-no-flush", "cache.no_flush", "Instead of the mode's: ignore the guest's flushes.", _OnOff()),
    _option("--ram", "ram", "Bound of the RAM tier.  [default: 256MiB]", size("RAM")),
)
_CACHE_FILE: Final = _options(
    "The cache file",
    _option(
        "--cache", "cache.path", "A log of writes, on fast local storage: file or device.  [default: RAM only]", **_FILE
    ),
    _option("--cache-size", "cache.size", "Of a new cache file, from 64MiB; it is allocated at once.", size("CACHE")),
    _option(
        "--read-cache",
        "cache.read_cache",
        "Keep what is read, too, in so much more of the file.  [default: none]",
        size("READ_CACHE"),
    ),
    _option(
        "--ram-dir",
        "cache.ram_dir",
        "Where the RAM tier is kept: a tmpfs.  [default: /dev/shm/vhostcache-UID]",
        **_FOLDER,
    ),
    _option(
        "--sync-interval",
        "cache.sync_interval",
        "The longest that a write stays volatile without a flush.  [default: 1s]",
        _time("SYNC_INTERVAL"),
    ),
    _option(
        "--flush-window",
        "cache.flush_window",
        "How long a flush waits for others to share its fdatasync.  [default: 0]",
        _time("FLUSH_WINDOW"),
    ),
    _option(
        "--checkpoint-interval",
        "cache.checkpoint_interval",
        "How often to record what has reached the image.  [default: 60s]",
        _time("CHECKPOINT_INTERVAL"),
    ),
)
_DESTAGING: Final = _options(
    "Writing to the image",
    _option(
        "--object-size",
        "object_size",
        "Unit in which writes are merged: a power of two.  [default: 4MiB]",
        size("OBJECT"),
    ),
    _option(
        "--destage-after",
        "destage_after",
        "How long dirty data may rest before it goes there.  [default: 5s]",
        _time("DESTAGE_AFTER"),
    ),
    _option("--write-depth", "write_depth", "The most large writes at once.  [default: 16]", _count("DEPTH")),
)
_LOG_DESTAGING: Final = _options(
    "Writing to the image, with --cache",
    _option(
        "--destage",
        "cache.destage",
        "off: write to the image only when the log has no room left.  [default: on]",
        _OnOff(),
    ),
    _option(
        "--destage-threshold",
        "destage_threshold",
        "Above this share of the log dirty data does not rest.  [default: 50]",
        _count("DESTAGE_THRESHOLD"),
        metavar="PERCENT",
    ),
    _option(
        "--policy",
        "policy",
        "merged: any object; ordered: in the order of flushes.  [default: merged]",
        click.Choice(["merged", "ordered"]),
        metavar="POLICY",
    ),
    _option(
        "--max-batched-objects",
        "max_batched_objects",
        "The most objects from the log at once.  [default: 8]",
        _count("BATCHED"),
    ),
    _flag("--drain-on-exit", "cache.drain_on_exit", "Write everything at the end.  [default: it stays in the log]"),
)
_READING: Final = _options(
    "Reading from the image",
    _option(
        "--fill-size",
        "fill_size",
        "Unit in which it is read.  [default: as asked for; from a server 64KiB]",
        size("FILL"),
    ),
    _option(
        "--readahead",
        "readahead",
        "The most to read ahead of a stream.  [default: 0; from a server 4MiB]",
        size("READAHEAD"),
    ),
    _option(
        "--backend-timeout",
        "backend_timeout",
        "Fail reads that have waited for it for so long.  [default: they wait]",
        _time("BACKEND_TIMEOUT"),
    ),
)
_NBD: Final = "An NBD server"
_CONNECTIONS: Final = _options(
    _NBD,
    _option(
        "--connections",
        "backend.connections",
        "The most connections, if the server allows several.  [default: 4]",
        _count("CONNECTIONS"),
    ),
)
_TLS: Final = _options(
    _NBD,
    _option(
        "--tls-certificates",
        "backend.tls_certificates",
        "For TLS: ca-cert.pem; client-cert.pem and client-key.pem if it wants them.",
        **_FOLDER,
    ),
    _option("--tls-psk-file", "backend.tls_psk_file", "For TLS: pre-shared keys, instead of certificates.", **_FILE),
    _option("--tls-username", "backend.tls_username", "Whose pre-shared key.  [default: this user's]", metavar="TEXT"),
    _option(
        "--tls-verify",
        "backend.tls_verify",
        "off: take any certificate, whoever has it.  [default: on]",
        _OnOff(),
    ),
)
_MIGRATION: Final = _options(
    "Live migration",
    _flag("--incoming", "incoming", "Another daemon may have the image: take it when a guest starts here."),
    _option(
        "--hand-over-timeout",
        "hand_over_timeout",
        "How long a QEMU may have to wait for it.  [default: 30s]",
        _time("HAND_OVER_TIMEOUT"),
    ),
)
_ALL_DAEMONS: Final = _options(
    _DAEMON,
    _option(
        "--log-format",
        "log_format",
        "Of the events on standard error.  [default: console]",
        click.Choice(["console", "json"]),
        of_daemon=True,
    ),
    _option(
        "--poll-max-us",
        "poll_max_us",
        "Microseconds to poll before sleeping, at most; 0: never poll.  [default: 50]",
        _count("POLL"),
        of_daemon=True,
    ),
    _option(
        "--io-engine",
        "io_engine",
        "auto: io_uring, or threads where it is forbidden.  [default: auto]",
        click.Choice(["auto", "threads"]),
        of_daemon=True,
    ),
)
_CONTROL: Final = _options(
    _DAEMON,
    _option("--control", "control", "Control socket.  [default: SOCKET.control]", **_PATH, of_daemon=True),
)


def _with(command: Command, *groups: list[Callable[[Any], Any]]) -> Command:
    for decorate in reversed([option for group in groups for option in group]):
        command = decorate(command)
    return command


def volume_options(command: Command) -> Command:
    """Those of one disk and of the daemon that serves it."""
    return _with(
        command,
        *(_DISK, _CACHE, _CACHE_FILE, _DESTAGING, _LOG_DESTAGING, _READING, _CONNECTIONS, _TLS, _MIGRATION),
        *(_CONTROL, _ALL_DAEMONS),
    )


def daemon_options(command: Command) -> Command:
    """Those of a daemon whose disks stand in a file."""
    return _with(command, _ALL_DAEMONS)


def tls_options(command: Command) -> Command:
    """Those without which an NBD server with TLS is not reached."""
    return _with(command, _TLS)


def given(context: click.Context, options: Mapping[str, Any]) -> Iterator[tuple[ConfigOption, Any]]:
    """The options of the command that stand for keys, and their values; None: not given."""
    for parameter in context.command.params:
        if isinstance(parameter, ConfigOption):
            assert parameter.name is not None
            yield parameter, options[parameter.name]
