"""The command line.

Every command is imported when it is called, so that `--help` is quick. What is wrong with what the user asked for is
one line on standard error; exit status 2 for a wrong question (options, configuration), 1 where the world says no.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from vhostcache import cli_words as words
from vhostcache.errors import EXIT_RUNTIME, EXIT_USAGE, Error, UsageError, one_line, why
from vhostcache.modes import DEFAULT, MODES

if TYPE_CHECKING:
    from vhostcache.config import Config

PROGRAM: Final = "vhostcache"

# Commands that live in other modules, and how the list of commands describes them.
_ELSEWHERE: Final = {
    "status": ("vhostcache.cli_status", "status_command", "Ask a running daemon how it is."),
    "bench": ("vhostcache.loadgen", "bench_command", "Put load on a vhost-user-blk server and measure it."),
    "info": ("vhostcache.cli_cache", "info_command", "Show what is in a cache file."),
    "check": ("vhostcache.cli_cache", "check_command", "Hold all of a cache file against its checksums."),
    "drain": ("vhostcache.cli_cache", "drain_command", "Write what only a cache file has back to its image."),
    "dump": ("vhostcache.cli_cache", "dump_command", "Print the records of a cache file as JSON lines."),
    "set": ("vhostcache.cli_tune", "set_command", "Change settings of a disk while it is in use."),
    "retry": ("vhostcache.cli_tune", "retry_command", "Try at once what a disk's backend has refused."),
}


class _Commands(click.Group):
    """The list of commands; those of other modules are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        order = [
            "create",
            "export",
            "serve",
            "status",
            "resize",
            "set",
            "retry",
            "info",
            "check",
            "drain",
            "dump",
            "bench",
            "schema",
            "version",
        ]
        return [name for name in order if name in self.commands or name in _ELSEWHERE]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _ELSEWHERE:
            return super().get_command(ctx, cmd_name)
        module, name, _ = _ELSEWHERE[cmd_name]
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for name in self.list_commands(ctx):
            about = _ELSEWHERE[name][2] if name in _ELSEWHERE else self.commands[name].get_short_help_str(70)
            rows.append((name, about))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


_DURATIONS: Final = ("HAND_OVER_TIMEOUT", "DESTAGE_AFTER", "SYNC_INTERVAL", "FLUSH_WINDOW", "CHECKPOINT_INTERVAL")


class _Quantity(click.ParamType):  # type: ignore[type-arg]
    """A size or a duration, checked by the rule of its configuration key; it stays text, as in a file."""

    name = "quantity"

    def __init__(self, limits: str) -> None:
        self._limits = limits

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from pydantic_core import PydanticCustomError

        from vhostcache import config

        limits = getattr(config, self._limits)
        parse = config.parse_duration if self._limits in _DURATIONS else config.parse_size
        try:
            limits.check(parse(value))
        except ValueError as error:
            why_not = "" if isinstance(error, PydanticCustomError) else f"{error}; "
            self.fail(f"found '{value}'; {why_not}allowed: {limits.allowed}", param, ctx)
        return str(value)


_ON_OFF: Final = click.Choice(["on", "off"])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def cli() -> None:
    """A write-back cache daemon for the disks of QEMU guests.

    It serves virtio-blk disks over vhost-user, keeps the guest's writes in RAM, and turns many small requests into few
    large ones to the image behind. A guest's flush is answered when everything before it is in the image.

    \b
      vhostcache create disk.img --size 4GiB
      vhostcache export disk.img --socket /run/vda.sock
          prints the QEMU arguments that attach the disk, and serves it until Ctrl-C
      vhostcache status /run/vda.sock.control
      vhostcache serve disks.yaml
          many disks from one file; `vhostcache schema` describes it

    Exit status: 0 done, 1 the world says no (one line says how), 2 a wrong option or configuration.
    """


@cli.command(short_help="Make a new, empty raw image.")
@click.argument("image", type=click.Path())
@click.option(
    "--size", type=_Quantity("IMAGE"), required=True, metavar="SIZE", help="Such as 4GiB or 512M; a multiple of 512."
)
def create(image: str, size: str) -> None:
    """Make IMAGE, a new raw disk image full of zeroes.

    It is sparse: it takes room on the disk as data is written into it. A file that already exists is never touched.

    \b
      vhostcache create disk.img --size 4GiB
    """
    import os

    from vhostcache.config import format_size, parse_size
    from vhostcache.errors import ImageError

    size_bytes = parse_size(size)

    subject = f"image '{image}'"
    try:
        descriptor = os.open(image, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError as error:
        raise ImageError(subject, "already exists", "a new name", "nothing has been changed") from error
    except FileNotFoundError as error:
        raise ImageError(
            subject, f"the folder '{os.path.dirname(image) or '.'}' does not exist", hint="make it first"
        ) from error
    except OSError as error:
        raise ImageError(subject, why(error)) from error
    try:
        os.ftruncate(descriptor, size_bytes)
        os.fsync(descriptor)
    except OSError as error:
        os.unlink(image)
        raise ImageError(
            subject, f"cannot be {size_bytes} bytes large: {why(error)}", hint="it has been removed again"
        ) from error
    finally:
        os.close(descriptor)
    click.echo(f"{image}: {format_size(size_bytes)}")


def _volume_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of one volume, in the order of `--help`."""
    options = [
        click.option("--name", default="vda", show_default=True, help="What events and statistics call the disk."),
        click.option(
            "--mode",
            type=click.Choice(list(MODES)),
            default=DEFAULT,
            show_default=True,
            help="QEMU's cache mode, see above.",
        ),
        click.option(
            "--cache",
            "cache_path",
            type=click.Path(),
            metavar="FILE",
            help="Keep a log of writes in this file or block device on local storage: flushes no longer wait for the "
            "image, and nothing acknowledged is lost with the daemon.  [default: none, the cache is in RAM only]",
        ),
        click.option(
            "--cache-size",
            type=_Quantity("CACHE"),
            metavar="SIZE",
            help="Of a new cache file, from 64MiB; it is allocated at once.",
        ),
        click.option(
            "--read-cache",
            type=_Quantity("READ_CACHE"),
            metavar="SIZE",
            help="Keep what is read from the image too, in so much more of the cache file.  [default: none]",
        ),
        click.option(
            "--sync-interval",
            type=_Quantity("SYNC_INTERVAL"),
            metavar="TIME",
            help="With --cache: the longest that a write stays volatile without a flush.  [default: 1s]",
        ),
        click.option(
            "--flush-window",
            type=_Quantity("FLUSH_WINDOW"),
            metavar="TIME",
            help="With --cache: how long a flush waits for others to share its fdatasync.  [default: 0]",
        ),
        click.option(
            "--checkpoint-interval",
            type=_Quantity("CHECKPOINT_INTERVAL"),
            metavar="TIME",
            help="With --cache: how often to record what has reached the image.  [default: 60s]",
        ),
        click.option(
            "--destage",
            type=_ON_OFF,
            help="With --cache: off: write to the image only when the log has no room left.  [default: on]",
        ),
        click.option(
            "--ram-dir",
            type=click.Path(),
            metavar="DIR",
            help="With --cache: the folder, on a tmpfs, of the RAM tier's file.  [default: /dev/shm/vhostcache-UID]",
        ),
        click.option(
            "--drain-on-exit",
            is_flag=True,
            default=None,
            help="With --cache: at the end write everything to the image.  [default: it stays in the cache]",
        ),
        click.option("--cache-writeback", type=_ON_OFF, help="Override this part of the mode."),
        click.option("--cache-direct", type=_ON_OFF, help="Override this part of the mode."),
        click.option("--cache-no-flush", type=_ON_OFF, help="Override this part of the mode."),
        click.option(
            "--ram",
            type=_Quantity("RAM"),
            metavar="SIZE",
            default="256MiB",
            show_default=True,
            help="Bound of the RAM tier.",
        ),
        click.option(
            "--object-size",
            type=_Quantity("OBJECT"),
            metavar="SIZE",
            default="4MiB",
            show_default=True,
            help="Unit in which writes are merged: a power of two, 64KiB to 64MiB.",
        ),
        click.option(
            "--num-queues", type=click.IntRange(1, 64), help="The most queues the guest may use.  [default: 64]"
        ),
        click.option("--read-only", is_flag=True, help="Serve a read-only disk; readers may share an image."),
        click.option("--serial", metavar="TEXT", help="The disk's serial number.  [default: its name]"),
        click.option(
            "--write-depth",
            type=click.IntRange(1, 256),
            help="The most large writes at once on the image.  [default: 16]",
        ),
        click.option(
            "--destage-after",
            type=_Quantity("DESTAGE_AFTER"),
            metavar="TIME",
            default="5s",
            show_default=True,
            help="Dirty data older than this goes to the image without a flush.",
        ),
        click.option(
            "--incoming",
            is_flag=True,
            default=None,
            help="For live migration: another daemon may have the image; take it when a guest starts to use the disk.",
        ),
        click.option(
            "--hand-over-timeout",
            type=_Quantity("HAND_OVER_TIMEOUT"),
            metavar="TIME",
            help="For live migration: how long a QEMU may have to wait for it.  [default: 30s]",
        ),
        click.option(
            "--socket-mode",
            metavar="OCTAL",
            help="Permissions of the socket; 0660 or 0666 if QEMU is another user.  [default: 0600]",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


# The keys of `cache` in a configuration, and the options that stand for them.
_CACHE_OPTIONS: Final = {
    "path": "cache_path",
    "size": "cache_size",
    **{
        key: key for key in ("read_cache", "sync_interval", "flush_window", "checkpoint_interval", "destage", "ram_dir")
    },
    "drain_on_exit": "drain_on_exit",
    **{part: f"cache_{part}" for part in ("writeback", "direct", "no_flush")},
}

_LOG_FORMAT: Final = click.option(
    "--log-format", type=click.Choice(["console", "json"]), help="Of the events on standard error.  [default: console]"
)
_IO_ENGINE: Final = click.option(
    "--io-engine",
    type=click.Choice(["auto", "threads"]),
    help="auto: io_uring, or a pool of threads where it is forbidden.  [default: auto]",
)
_POLL: Final = click.option(
    "--poll-max-us",
    type=click.IntRange(0, 10_000),
    help="The longest to poll before sleeping, in microseconds; 0: never poll.  [default: 50]",
)


@cli.command(short_help="Serve one image as a disk.")
@click.argument("image", type=click.Path())
@click.option("--socket", required=True, type=click.Path(), metavar="PATH", help="The vhost-user socket to listen on.")
@_volume_options
@click.option("--shutdown-on-disconnect", is_flag=True, help="End when the guest has gone.")
@click.option(
    "--discard-dirty-data",
    is_flag=True,
    help="Where the cache is lost or cannot be used: give up what only it held, and start with an empty one.",
)
@click.option("--control", type=click.Path(), metavar="PATH", help="Control socket.  [default: SOCKET.control]")
@_LOG_FORMAT
@_POLL
@_IO_ENGINE
def export(
    image: str,
    socket: str,
    control: str | None,
    shutdown_on_disconnect: bool,
    discard_dirty_data: bool,
    **options: Any,
) -> None:
    """Serve IMAGE (a raw image, a block device or the URI of an NBD export) as a virtio disk at a vhost-user socket.

    Other formats, such as qcow2, and everything else that QEMU opens are served by `serve`, from a configuration.

    Prints the QEMU arguments that attach it, then one line an event. SIGTERM or Ctrl-C drains: everything goes to the
    image, or with --cache to the cache file (and with --drain-on-exit to the image); the exit status is 0. SIGUSR1
    prints statistics.

    With --cache the image and the cache file belong together: until everything has been written to the image, the
    image is refused without its cache file. `vhostcache drain` does that for a disk that is not served.

    \b
    Modes, as QEMU's:      a write is acknowledged    image opened   guest flush
      writeback            in the RAM tier            page cache     writes everything to the image, flushes it;
                                                                     with --cache: makes the log durable
      none                 in the RAM tier            O_DIRECT       the same
      writethrough         when it is in the image,   page cache     already true
                           or durable in the log
      directsync           the same                   O_DIRECT       already true
      unsafe               in the RAM tier            page cache     ignored

    \b
    Examples:
      vhostcache export disk.img --socket /run/vda.sock
      vhostcache export disk.img --socket /run/vda.sock --cache /ssd/vda.cache --cache-size 8GiB
      vhostcache export disk.img --socket /run/vda.sock --ram 1GiB --mode none --num-queues 4
      vhostcache export /dev/vg0/guest --socket /run/vda.sock --socket-mode 0666 --log-format json
      vhostcache export nbd://server/export --socket /run/vda.sock --cache /ssd/vda.cache --cache-size 8GiB
    """
    config = _export_config(image, socket, control or f"{socket}.control", options)
    _serve(config, shutdown_on_disconnect, {config.volumes[0].name} if discard_dirty_data else set())


@cli.command(short_help="Serve many disks from one YAML file.")
@click.argument("file", metavar="CONFIG", type=click.Path())
@_LOG_FORMAT
@_POLL
@_IO_ENGINE
@click.option("--check", is_flag=True, help="Only say whether the file is right.")
@click.option("--incoming", is_flag=True, help="All disks come by live migration, as with `incoming: on`.")
@click.option(
    "--discard-dirty-data",
    multiple=True,
    metavar="NAME",
    help="Where this volume's cache is lost or cannot be used: give up what only it held.  May be given several times.",
)
def serve(file: str, check: bool, incoming: bool, discard_dirty_data: tuple[str, ...], **options: Any) -> None:
    """Serve the disks that CONFIG, a YAML file, describes. All of them start, or none.

    \b
      control: control.sock              # for `vhostcache status`; paths are relative to the file
      volumes:
        - name: vda
          socket: vda.sock
          backend: {type: file, path: disk.img}
          ram: 256MiB
          mode: none                     # writeback, none, writethrough, directsync, unsafe
        - name: logs
          socket: logs.sock
          backend: {type: nbd, uri: "nbd://server/logs"}
          object_size: 1MiB
          cache: {path: /ssd/logs.cache, size: 8GiB}

    Options given here win over the file. `vhostcache schema` prints every key with its meaning.
    """
    from vhostcache.config import load

    config = load(file)
    unknown = set(discard_dirty_data) - {volume.name for volume in config.volumes}
    if unknown:
        names = ", ".join(volume.name for volume in config.volumes)
        raise UsageError("--discard-dirty-data", f"found '{unknown.pop()}'; allowed: {names}")
    if check:
        click.echo(f"{file}: {len(config.volumes)} volume{'s' if len(config.volumes) != 1 else ''}, all right")
        return
    if incoming:
        options["volumes"] = [volume.model_copy(update={"incoming": True}) for volume in config.volumes]
    config = config.model_copy(update={key: value for key, value in options.items() if value is not None})
    _serve(config, shutdown_on_disconnect=False, discard_dirty_data=set(discard_dirty_data))


@cli.command(short_help="Make a disk larger while it is in use.")
@click.argument("name")
@click.argument("size", type=_Quantity("IMAGE"))
@click.option(
    "--control",
    type=click.Path(),
    metavar="PATH",
    help="Control socket of the daemon that serves the disk.  [default: NAME is one, or the disk's own socket]",
)
def resize(name: str, size: str, control: str | None) -> None:
    """Give the disk NAME that SIZE: its image is extended, and a running guest is told. Disks are never made smaller.

    A block device and an NBD export have to be grown first, by whatever means they have; SIZE is what they have then.

    \b
      vhostcache resize --control /run/vhostcache/control.sock vda 20GiB
      vhostcache resize /run/vda.sock 20GiB
    """
    from vhostcache.config import parse_size
    from vhostcache.control import find_volume, resize_and_wait

    control, name = find_volume(name, control)
    size_bytes = resize_and_wait(control, name, parse_size(size))
    click.echo(f"{name}: {words.size(size_bytes)} ({size_bytes} bytes)")


@cli.command(short_help="Print the JSON schema of the YAML file.")
def schema() -> None:
    """Print the JSON schema of `serve`'s configuration: every key, its meaning and its default."""
    from vhostcache.config import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


@cli.command(short_help="Print the version.")
def version() -> None:
    """Print the version."""
    click.echo(f"{PROGRAM} {_version()}")


def main(arguments: list[str] | None = None) -> NoReturn:
    """The program. Whatever goes wrong, it is one line and an exit status."""
    try:
        result = cli.main(args=arguments, prog_name=PROGRAM, standalone_mode=False)
        sys.exit(result if isinstance(result, int) else 0)
    except Error as error:
        _fail(str(error), error.exit_status)
    except click.UsageError as error:
        name = error.ctx.command_path if error.ctx is not None else PROGRAM
        _fail(f"{error.format_message()} (see {name} --help)", EXIT_USAGE)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(EXIT_RUNTIME)


def _fail(message: str, status: int) -> NoReturn:
    click.echo(f"{PROGRAM}: {one_line(message)}", err=True)
    sys.exit(status)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed(PROGRAM)
    except PackageNotFoundError:
        return "(not installed)"


def _export_config(image: str, socket: str, control: str, options: dict[str, Any]) -> Config:
    from pydantic import ValidationError

    from vhostcache.config import Config, explain_options, refuse_duplicates
    from vhostcache.config_backend import is_nbd_uri

    top = {key: options.pop(key) for key in ("log_format", "poll_max_us", "io_engine")}
    cache = {key: options.pop(name) for key, name in _CACHE_OPTIONS.items()}
    parts = ("writeback", "direct", "no_flush", "destage")
    volume = {
        "socket": socket,
        "backend": {"type": "nbd", "uri": image} if is_nbd_uri(image) else {"type": "file", "path": image},
        "cache": {key: value == "on" if key in parts else value for key, value in cache.items() if value is not None},
        **{key: value for key, value in options.items() if value is not None},
    }
    # In messages a key is called by its option.
    here = ("volumes", 0)
    names: dict[tuple[str | int, ...], str] = {(*here, key): f"--{key.replace('_', '-')}" for key in (*volume, "ram")}
    names |= {(*here, "backend", "path"): "IMAGE", (*here, "backend", "uri"): "IMAGE", ("control",): "--control"}
    names |= {(*here, "cache", key): f"--{name.replace('_', '-')}" for key, name in _CACHE_OPTIONS.items()}
    names[(*here, "cache", "path")] = "--cache"

    def at(place: tuple[str | int, ...], message: str) -> UsageError:
        return UsageError(names.get(place, ".".join(map(str, place))), message)

    values = {
        "volumes": [volume],
        "control": control,
        **{key: value for key, value in top.items() if value is not None},
    }
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise explain_options(error, names) from None
    refuse_duplicates(config, at)
    return config


def _serve(config: Config, shutdown_on_disconnect: bool, discard_dirty_data: set[str]) -> None:
    from vhostcache.daemon import Daemon
    from vhostcache.events import EventLog

    log = EventLog(config.log_format)
    try:
        status = Daemon(
            config, log, _version(), shutdown_on_disconnect, _output, discard_dirty_data=discard_dirty_data
        ).run()
    except Error as error:
        if config.log_format != "json":
            raise
        log.error("refused", error=str(error))  # who reads JSON reads nothing else
        status = error.exit_status
    except Exception:
        log.exception("internal-error", hint="a fault in vhostcache itself: please report it")
        status = EXIT_RUNTIME
    finally:
        log.close()
    sys.exit(status)


def _output(text: str) -> None:
    """To standard output, which may be closed."""
    try:
        click.echo(text)
    except OSError:
        sys.stdout = None  # nobody reads it: later writes go nowhere
