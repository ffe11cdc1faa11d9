"""`vhostcache set` and `vhostcache retry`: a running daemon is told something about a disk."""

from __future__ import annotations

import click
import yaml

_CONTROL = click.option(
    "--control",
    type=click.Path(),
    metavar="PATH",
    help="Control socket of the daemon that serves the disk.  [default: NAME is one, or the disk's own socket]",
)


@click.command(name="set", short_help="Change settings of a disk while it is in use.")
@click.argument("name")
@click.argument("values", nargs=-1, required=True, metavar="KEY=VALUE...")
@_CONTROL
def set_command(name: str, values: tuple[str, ...], control: str | None) -> None:
    """Change settings of the disk NAME, all of them or none, until the daemon ends.

    They are destage, destage_after, destage_threshold, max_batched_objects, sync_interval and checkpoint_interval, with
    the values that the configuration file takes.

    \b
      vhostcache set /run/vda.sock destage=off
      vhostcache set --control /run/vhostcache/control.sock vda destage_threshold=30 sync_interval=200ms
    """
    from vhostcache.control import find_volume, query
    from vhostcache.errors import UsageError

    wanted: dict[str, object] = {}
    for text in values:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"'{text}'", "is not a setting", "KEY=VALUE, such as destage_threshold=30")
        if key in wanted:
            raise UsageError(f"'{key}'", "is set twice", "once")
        wanted[key] = _plain(value)
    control, name = find_volume(name, control)
    for key, now in query(control, "set", {"name": name, "values": wanted}).items():
        click.echo(f"{key}: {_words(now)}")


@click.command(name="retry", short_help="Try at once what a disk's backend has refused.")
@click.argument("name")
@_CONTROL
def retry_command(name: str, control: str | None) -> None:
    """Do not wait for the next attempt to write to the backend of the disk NAME: it has been mended.

    \b
      vhostcache retry /run/vda.sock
    """
    from vhostcache.control import find_volume, query

    control, name = find_volume(name, control)
    query(control, "retry", {"name": name})


def _plain(text: str) -> object:
    """As YAML would have it: on, off, numbers."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return text
    return value if isinstance(value, bool | int | float | str) else text


def _words(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g} s" if isinstance(value, float) else str(value)
