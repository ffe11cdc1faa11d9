"""`vhostcache status`: how daemons and their volumes are, for people as a table and for programs as JSON.

Owns what of an answer is shown: a line a volume, and below it a line for each thing that goes wrong, waits, or is not
as usual. It asks, and changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import click

from vhostcache.cli_words import count, duration, share, size

if TYPE_CHECKING:
    from rich.console import Console

_BAD: Final = ("failed", "waiting")  # `away` is as usual for a disk that has left, or is expected
_WIDTH: Final = 200  # where no terminal says how wide a line is: one line a volume
_WORDS: Final = ("volume", "state", "guest", "mode", "backend")
_FIGURES: Final = ("size", "dirty", "ram", "dirty log", "read cache", "its hits", "all hits", "flushes")


@click.command(short_help="Ask a running daemon how it is.")
@click.argument("sockets", nargs=-1, required=True, metavar="CONTROL_SOCKET...", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="One JSON object a daemon, a line each.")
def status_command(sockets: tuple[str, ...], as_json: bool) -> None:
    """Ask daemons over their control sockets. `export` listens on SOCKET.control, `serve` on the file's `control`.

    A line for each volume, and below them what goes wrong, what waits and for what, and what is not as usual.

    \b
      dirty        what the image does not have yet
      ram          how much of the RAM tier is in use; it fills with what is read and written, and stays full
      dirty log    how much of the log the image does not have; above 60 % writes become slower
      read cache   how much of it is in use
      its hits     of the blocks that neither RAM nor log had, those that the read cache had
      all hits     of the blocks that were read, those that the image was not asked for

    \b
      vhostcache status /run/vda.sock.control
      vhostcache status --json /run/vhostcache/control.sock | jq .volumes[].dirty_bytes
    """
    from vhostcache.control import control_path, query

    answers = [query(control_path(path), "status") for path in sockets]
    if as_json:
        for answer in answers:
            click.echo(json.dumps(answer))
        return

    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    for answer in answers:
        print_status(console, answer)


def print_status(console: Console, answer: dict[str, Any]) -> None:
    """What one daemon has answered."""
    from rich.table import Table
    from rich.text import Text

    uptime = duration(float(answer["uptime_s"]))
    title = f"vhostcache {answer['version']}, process {answer['pid']}, {answer['state']} for {uptime}"
    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in _WORDS:
        table.add_column(heading)
    for heading in _FIGURES:
        table.add_column(heading, justify="right")
    for volume in answer["volumes"]:
        state, backend = _state(volume), _backend(volume)
        table.add_row(
            Text(volume["name"]),
            Text(state, style="bold red" if state in _BAD else ""),
            "connected" if volume["connected"] else "absent",
            Text(_mode(volume)),
            Text(backend, style="bold red" if _is_lost(volume) else ""),
            *_figures(volume),
        )
    console.print(table)
    for volume in answer["volumes"]:
        for line in troubles(volume):
            console.print(Text(f"{volume['name']}: {line}", style="bold red"), soft_wrap=True)
        for line in remarks(volume):
            console.print(Text(f"{volume['name']}: {line}"), soft_wrap=True)


def _figures(volume: dict[str, Any]) -> tuple[str, ...]:
    cache = volume["cache"] or {"log_bytes": 0, "log_hits": 0, "read_cache": None}
    reads = cache["read_cache"] or {"bytes": 0, "used_bytes": 0, "hits": 0}
    hits = volume["hits"] + cache["log_hits"] + reads["hits"]
    return (
        size(volume["size_bytes"]),
        size(volume["dirty_bytes"]),
        _part(volume["cached_bytes"], volume["ram_bytes"]),
        _part(volume["dirty_bytes"], cache["log_bytes"]),
        _part(reads["used_bytes"], reads["bytes"]),
        share(reads["hits"], reads["hits"] + volume["misses"]) if reads["bytes"] else "-",
        share(hits, hits + volume["misses"]),
        f"{volume['flushes_received']:,}",
    )


def _part(part: int, whole: int) -> str:
    return f"{share(part, whole)} of {size(whole)}" if whole else "-"


def _state(volume: dict[str, Any]) -> str:
    """Of a volume, or where its storage is, if that is not here."""
    here = volume["state"] != "serving" or volume["storage"] == "held"
    return str(volume["state"] if here else volume["storage"])


def _mode(volume: dict[str, Any]) -> str:
    extra = ", read-only" if volume["read_only"] else ""
    if volume["write_through"] and volume["mode"] not in ("writethrough", "directsync"):
        extra += ", write-through"
    return f"{volume['mode']}{extra}"


def _backend(volume: dict[str, Any]) -> str:
    backend = volume["backend_status"]
    return " ".join(filter(None, (backend["type"], backend.get("state"))))


def _is_lost(volume: dict[str, Any]) -> bool:
    return bool(volume["backend_status"].get("state", "connected") != "connected")


def troubles(volume: dict[str, Any]) -> Iterator[str]:
    """What somebody should look at, and who waits for it."""
    backend, cache, waiting = volume["backend_status"], volume["cache"], volume["waiting"]
    if volume["failure"]:
        yield f"failed: {volume['failure']}"
    if volume["storage_waits_for"]:
        yield f"the guest waits for its storage: {volume['storage_waits_for']}"
    if _is_lost(volume):
        waits = f" ({count(backend['waiting'], 'operation')} waiting)" if backend.get("waiting") else ""
        yield f"backend {backend['state']} for {duration(backend['seconds'])}: {backend['error']}{waits}"
    if volume["backend_held"]:
        yield f"backend held: {volume['backend_held']} (when it is mended: vhostcache retry)"
    elif volume["backend_error"]:
        yield f"backend cannot be written: {volume['backend_error']} (it is tried again; what it lacks is kept)"
    if waiting["backend"]:
        why = f": {volume['read_error']}" if volume["read_error"] else ""
        yield f"{count(waiting['backend'], 'request')} waiting to read the backend{why}"
    if cache is not None and cache["fails"]:
        yield f"cache device fails: '{cache['path']}': no write is acknowledged until it works again"
    if cache is not None and cache["unreadable_bytes"]:
        yield f"the cache device cannot read {size(cache['unreadable_bytes'])} that only the log has: it is tried again"
    if cache is not None and cache["lost_bytes"]:
        yield f"{size(cache['lost_bytes'])} lost in the log: they cannot be read until the guest overwrites them"
    if volume["resize"] and volume["resize"]["error"]:
        yield f"the last resize has failed: {volume['resize']['error']}"


def remarks(volume: dict[str, Any]) -> Iterator[str]:
    """What is under way, or as somebody has set it."""
    cache = volume["cache"]
    dirty = f"{share(volume['dirty_bytes'], cache['log_bytes'])} of the log is dirty" if cache is not None else ""
    if cache is not None and cache["pace_bytes_per_s"]:
        yield f"writes are slowed to {size(cache['pace_bytes_per_s'])} a second: {dirty}"
    if volume["waiting"]["room"]:
        yield f"{count(volume['waiting']['room'], 'write')} waiting{_for_room(cache, dirty)}"
    if cache is not None and not volume["settings"]["destage"]:
        yield "destage is off: the image gets nothing before the log is full"
    if volume["resize"] and volume["resize"]["running"]:
        yield "is being resized"


def _for_room(cache: dict[str, Any] | None, dirty: str) -> str:
    if cache is None:
        return " for room in RAM: all of it is dirty"
    if cache["fails"]:
        return " for the cache device"
    if cache["log_full"]:
        return f" for room in the log: {dirty}"
    return "" if cache["pace_bytes_per_s"] else " for room in RAM, until more of it is in the log"
