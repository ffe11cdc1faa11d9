"""The commands that serve disks: `export` one image, by options, `serve` many, from a file.

They make a configuration of what was asked for, and run the daemon until it ends. An option is refused with the words
that the file's key is refused with, and is called by its own name there.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from vhostcache.cli_options import GroupedCommand, daemon_options, given, volume_options
from vhostcache.cli_words import version
from vhostcache.errors import EXIT_RUNTIME, Error, UsageError

if TYPE_CHECKING:
    from vhostcache.config import Config


@click.command(cls=GroupedCommand, short_help="Serve one image as a disk.")
@click.argument("image", type=click.Path())
@volume_options
@click.option("--shutdown-on-disconnect", is_flag=True, help="End when the guest has gone.")
@click.option(
    "--discard-dirty-data",
    is_flag=True,
    help="If the cache is lost or unusable: give up what only it held.",
)
@click.pass_context
def export_command(
    context: click.Context, /, image: str, shutdown_on_disconnect: bool, discard_dirty_data: bool, **options: Any
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
      vhostcache export nbds://server/export --socket /run/vda.sock --tls-certificates /etc/pki/nbd
    """
    config = _export_config(context, image, options)
    _run(config, shutdown_on_disconnect, {config.volumes[0].name} if discard_dirty_data else set())


@click.command(short_help="Serve many disks from one YAML file.")
@click.argument("file", metavar="CONFIG", type=click.Path())
@daemon_options
@click.option("--check", is_flag=True, help="Only say whether the file is right.")
@click.option("--incoming", is_flag=True, help="All disks come by live migration, as with `incoming: on`.")
@click.option(
    "--discard-dirty-data",
    multiple=True,
    metavar="NAME",
    help="If this volume's cache is lost or unusable: give up what only it held.  May be given several times.",
)
def serve_command(file: str, check: bool, incoming: bool, discard_dirty_data: tuple[str, ...], **options: Any) -> None:
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
    if incoming:
        options["volumes"] = [volume.model_copy(update={"incoming": True}) for volume in config.volumes]
    if check:
        click.echo(f"{file}: {len(config.volumes)} volume{'s' if len(config.volumes) != 1 else ''}, all right")
        return
    config = config.model_copy(update={key: value for key, value in options.items() if value is not None})
    _run(config, shutdown_on_disconnect=False, discard_dirty_data=set(discard_dirty_data))


def _export_config(context: click.Context, image: str, options: dict[str, Any]) -> Config:
    from pydantic import ValidationError

    from vhostcache.config import Config, explain_options, refuse_duplicates
    from vhostcache.config_backend import is_nbd_uri

    here = ("volumes", 0)
    is_nbd = is_nbd_uri(image)
    backend: dict[str, Any] = {"type": "nbd", "uri": image} if is_nbd else {"type": "file", "path": image}
    volume: dict[str, Any] = {"backend": backend, "cache": {}}
    values: dict[str, Any] = {"volumes": [volume], "control": f"{options['socket']}.control"}
    # In messages a key is called by its option.
    names: dict[tuple[str | int, ...], str] = {(*here, "backend", key): "IMAGE" for key in ("path", "uri")}
    for option, value in given(context, options):
        *outer, key = option.place
        names[option.place if option.of_daemon else (*here, *option.place)] = option.opts[0]
        if value is None:
            continue
        if outer == ["backend"] and not is_nbd:
            raise UsageError(option.opts[0], f"is of no use with '{image}'; allowed: together with an NBD URI")
        holder = values if option.of_daemon else volume[outer[0]] if outer else volume
        holder[key] = value

    def at(place: tuple[str | int, ...], message: str) -> UsageError:
        return UsageError(names.get(place, ".".join(map(str, place))), message)

    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise explain_options(error, names) from None
    refuse_duplicates(config, at)
    return config


def _run(config: Config, shutdown_on_disconnect: bool, discard_dirty_data: set[str]) -> None:
    from vhostcache.daemon import Daemon
    from vhostcache.events import EventLog

    log = EventLog(config.log_format)
    try:
        status = Daemon(
            config, log, version(), shutdown_on_disconnect, _output, discard_dirty_data=discard_dirty_data
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
