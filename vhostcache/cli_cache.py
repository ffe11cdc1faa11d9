"""The commands for a cache that no daemon has open: info, check, drain, dump.

They open and lock the files, and print; what is computed is in vhostcache.log. All but `drain` open the cache file for
reading only. A cache file in use is refused by its lock.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import click

from vhostcache import cli_words as words
from vhostcache.cli_options import ConfigOption, given, tls_options
from vhostcache.errors import ImageError, UsageError, why

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from vhostcache.backend.base import Backend, Opened
    from vhostcache.backend.file import FileBackend
    from vhostcache.cachefile import CacheFile
    from vhostcache.config import VolumeConfig
    from vhostcache.config_backend import FileBackendConfig, NbdBackendConfig, QsdBackendConfig
    from vhostcache.log.offline import CorruptRange
    from vhostcache.log.offline import Image as Writer
    from vhostcache.log.recovery import BackendFacts, Finding
    from vhostcache.log.superblock import Superblock
    from vhostcache.log.tier import Tier

EXIT_CLEAN: Final = 0
EXIT_DIRTY: Final = 1
EXIT_CORRUPT: Final = 2
CORRUPT_SHOWN: Final = 100
_AGAIN: Final = "the cache still has everything: drain again when that is mended"
ZERO_BYTES: Final = 64 << 20  # at once, so that Ctrl-C is heard

_CACHE: Final = click.argument("cache", type=click.Path())
_RAM_DIR: Final = click.option(
    "--ram-dir", type=click.Path(), metavar="FOLDER", help="Where the daemon has its RAM tier, if that is not usual."
)


_MAYBE_CACHE: Final = click.argument("cache", type=click.Path(), required=False)
_CONFIG: Final = click.option(
    "--config", type=click.Path(), metavar="FILE", help="Take cache file and image from this configuration of `serve`."
)
_VOLUME: Final = click.option("--volume", metavar="NAME", help="Which of its volumes, if it has several.")
_BACKEND: Final = click.option(
    "--backend", type=click.Path(), metavar="IMAGE", help="The image that it belongs to, or the URI of an NBD export."
)


@click.command(short_help="Show what is in a cache file.")
@_CACHE
@click.option("--top", type=click.IntRange(0), default=10, show_default=True, help="How many dirty objects to list.")
@_RAM_DIR
def info_command(cache: str, top: int, ram_dir: str | None) -> None:
    """Show CACHE: its superblocks, its log, what the image does not have yet, and what a start would do.

    \b
      vhostcache info /var/cache/vda.cache
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    with _opened(cache, ram_dir) as (file, tier):
        finding = _examine(file, tier)
        _print_superblocks(console, finding)
        if finding.walk is not None:
            _print_log(console, finding)
            _print_dirty(console, finding, top)
        console.print()
        console.print(Text(f"A start would {finding.decision.value}: {finding.what}.", style="bold"))
        if finding.error is not None and finding.error.hint:
            console.print(Text(f"What to do: {finding.error.hint}."))


@click.command(short_help="Read all of a cache file and hold it against its checksums.")
@_MAYBE_CACHE
@_BACKEND
@tls_options
@_CONFIG
@_VOLUME
@_RAM_DIR
@click.pass_context
def check_command(
    context: click.Context,
    /,
    cache: str | None,
    backend: str | None,
    config: str | None,
    volume: str | None,
    ram_dir: str | None,
    **tls: Any,
) -> None:
    """Read all of CACHE, which is not changed, and hold every block against its checksum.

    With an image it also says whether they belong together.

    Exit status: 0 clean: the image has everything. 1 dirty: it has not, or a start would be refused. 2 corrupt; what
    is damaged is listed as ranges of the disk.

    \b
      vhostcache check /var/cache/vda.cache --backend disk.img
      vhostcache check --config disks.yaml --volume vda
    """
    from vhostcache.log import offline

    chosen = _Chosen(cache, backend, config, volume, ram_dir, given(context, tls))
    cache = chosen.cache
    with _opened(cache, chosen.ram_dir) as (file, tier), _image(chosen, read_only=True) as image:
        facts = _facts(image.backend, file) if image is not None else None
        finding = _examine(file, tier, facts)
        corrupt: list[offline.CorruptRange] = []
        lost: list[offline.CorruptRange] = []
        if finding.walk is not None and finding.superblock is not None:
            lost = offline.DirtyMap(finding.walk.records, finding.superblock.clean_address).lost()
            with _bar("checking") as bar:
                task = bar.add_task("", total=None)
                corrupt = offline.check_payload(
                    file,
                    finding.superblock,
                    finding.walk.records,
                    lambda done, total: bar.update(task, completed=done, total=total),
                )
    for damaged in corrupt[:CORRUPT_SHOWN]:
        click.echo(f"corrupt: {damaged.size_bytes} bytes at {damaged.offset_bytes} of the disk, record {damaged.seq}")
    if len(corrupt) > CORRUPT_SHOWN:
        click.echo(f"corrupt: {len(corrupt) - CORRUPT_SHOWN} more ranges")
    for damaged in lost[:CORRUPT_SHOWN]:
        click.echo(
            f"lost: {damaged.size_bytes} bytes at {damaged.offset_bytes} of the disk, until they are overwritten"
        )
    if len(lost) > CORRUPT_SHOWN:
        click.echo(f"lost: {len(lost) - CORRUPT_SHOWN} more ranges")
    if finding.error is not None:
        click.echo(f"vhostcache: {finding.error}", err=True)
    if corrupt or lost or finding.is_damaged:
        click.echo(f"{cache}: corrupt")
        sys.exit(EXIT_CORRUPT)
    dirty = finding.error is not None or finding.is_dirty
    records = len(finding.walk.records) if finding.walk else 0
    click.echo(f"{cache}: {'dirty' if dirty else 'clean'}, {words.count(records, 'record')}, no damage")
    sys.exit(EXIT_DIRTY if dirty else EXIT_CLEAN)


@click.command(short_help="Write what only a cache file has back to its image.")
@_MAYBE_CACHE
@_BACKEND
@tls_options
@_CONFIG
@_VOLUME
@click.option(
    "--accept-lost-ram",
    is_flag=True,
    help="Go on without a RAM tier that is gone: writes that were not flushed are lost. Power the guest off first.",
)
@click.option(
    "--give-up-damaged",
    is_flag=True,
    help="Go on where data is damaged or cannot be read: it is lost, and the image keeps its older version of it.",
)
@click.option(
    "--accept-moved",
    is_flag=True,
    help="Go on where the cache knows its image by another path or address, and the image cannot be marked.",
)
@click.option(
    "--accept-changed-image",
    is_flag=True,
    help="Go on where others have changed the image since (grown it, for one): CACHE's data is written over it."
    " A file system that others have mounted meanwhile may be damaged by that. Never an image that has shrunk.",
)
@_RAM_DIR
@click.pass_context
def drain_command(
    context: click.Context,
    /,
    cache: str | None,
    backend: str | None,
    config: str | None,
    volume: str | None,
    accept_lost_ram: bool,
    give_up_damaged: bool,
    accept_moved: bool,
    accept_changed_image: bool,
    ram_dir: str | None,
    **tls: Any,
) -> None:
    """Write everything that only CACHE has back to its image, as a daemon would.

    Afterwards the image stands on its own, and the cache is clean. A drain that is interrupted can be started again.

    \b
      vhostcache drain /var/cache/vda.cache --backend disk.img
      vhostcache drain /var/cache/vda.cache --backend nbd://server/export
      vhostcache drain --config disks.yaml --volume vda
    """
    from vhostcache import cachefile
    from vhostcache.assembly import boot_id
    from vhostcache.backend.mark import Mark
    from vhostcache.log import offline, recovery
    from vhostcache.tierfile import TierFolder

    chosen = _Chosen(cache, backend, config, volume, ram_dir, given(context, tls))
    cache, ram_dir = chosen.cache, chosen.ram_dir
    if chosen.backend is None:
        raise UsageError("--backend", "the image is missing", "an image or an NBD URI, or --config")
    subject = cachefile.subject(cache)
    with _opened(cache, ram_dir, write=True) as (file, tier), _image(chosen, read_only=False) as image:
        assert image is not None
        mark = image.backend.read_mark()
        facts = _facts(image.backend, file, accept_moved, accept_changed_image)
        with _bar("draining") as bar:
            task = bar.add_task("", total=None)
            recovered = recovery.recover(
                file,
                tier,
                boot_id(),
                facts,
                subject=subject,
                accept_lost_tier=accept_lost_ram,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
            written = offline.drain(
                file,
                recovered.superblock,
                recovered.records,
                image.writer,
                subject=subject,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
                give_up=_say_lost if give_up_damaged else None,
            )
        image.backend.settle()
        facts = _facts(image.backend, file, accept_moved, accept_changed_image)
        closed = recovery.close(file, recovered.superblock, facts, destaged=True)
        if mark is not None and mark.uuid == closed.uuid:
            image.backend.write_mark(Mark(closed.uuid, closed.epoch, dirty=False))
        if os.path.isdir(folder := _ram_folder(ram_dir)):
            TierFolder(folder).remove(closed.uuid)
    click.echo(f"{chosen.backend.label}: {words.size(written * 4096)} written, {cache} is clean")


def _say_lost(ranges: list[CorruptRange]) -> None:
    for lost in ranges:
        click.echo(
            f"given up: {lost.size_bytes} bytes at {lost.offset_bytes} of the disk; they are older now", err=True
        )


@click.command(short_help="Print the records of a cache file as JSON lines.")
@_CACHE
def dump_command(cache: str) -> None:
    """Print the superblocks and the records of CACHE, a JSON object a line, and last why the log ends there.

    \b
      vhostcache dump /var/cache/vda.cache | jq -c 'select(.seq >= 100)'
    """
    from vhostcache.cachefile import CacheFile
    from vhostcache.log import offline
    from vhostcache.log.walk import walk

    with CacheFile(cache, read_only=True, lock_wait_s=0.0) as file:
        finding = _examine(file, None)
        for name, copy in zip("AB", finding.copies, strict=True):
            click.echo(json.dumps({"superblock": name, **_superblock_fields(copy)}))
        if finding.superblock is None:
            assert finding.error is not None
            raise finding.error
        found = finding.walk or walk(file, finding.superblock)
        for line in offline.dump(file, finding.superblock, found.records):
            click.echo(json.dumps(line))
        click.echo(json.dumps({"end": found.head_address, "next_seq": found.next_seq, "why": found.end}))


# Opening.


@contextlib.contextmanager
def _opened(cache: str, ram_dir: str | None, write: bool = False) -> Iterator[tuple[CacheFile, Tier | None]]:
    """The cache file, locked, and the RAM tier that it names, if that is there."""
    from vhostcache.cachefile import CacheFile
    from vhostcache.log import recovery, tier
    from vhostcache.tierfile import TierFolder

    with CacheFile(cache, read_only=not write, lock_wait_s=0.0) as file:
        named = recovery.named_tier(file)
        folder = _ram_folder(ram_dir)
        descriptor = TierFolder(folder).open(*named) if named is not None and os.path.isdir(folder) else None
        if descriptor is None:
            yield file, None
            return
        try:
            size = os.fstat(descriptor).st_size
            mapped = mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ) if size else None
        finally:
            os.close(descriptor)
        # Unmapped with the process: what was read from it may still point into it.
        yield file, tier.parse(mapped) if mapped is not None else None


def _ram_folder(ram_dir: str | None) -> str:
    from vhostcache.tierfile import default_folder

    return ram_dir or default_folder()


class _Chosen:
    """What the options name: a cache file, and perhaps what it belongs to."""

    backend: FileBackendConfig | NbdBackendConfig | QsdBackendConfig | None = None

    def __init__(
        self,
        cache: str | None,
        backend: str | None,
        config: str | None,
        volume: str | None,
        ram_dir: str | None,
        tls: Iterable[tuple[ConfigOption, Any]],
    ) -> None:
        from vhostcache.config import MIB

        options = {option.opts[0]: (option.place[-1], value) for option, value in tls if value is not None}

        self.object_bytes = 64 * MIB  # a multiple of every cluster
        if options and (backend is None or not backend.lower().startswith("nbds")):
            raise UsageError(
                next(iter(options)), "is of no use without TLS; allowed: together with --backend nbds://..."
            )
        if config is not None:
            if backend is not None:
                raise UsageError("--backend", "found beside --config", "one of the two")
            found = _volume_of(config, volume)
            self.backend, self.object_bytes = found.backend, found.object_size
            cache = cache or found.cache.path
            ram_dir = ram_dir or found.cache.ram_dir
        elif volume is not None:
            raise UsageError("--volume", "found without --config", "both or none")
        elif backend is not None:
            self.backend = _backend_config(backend, options)
        if not cache:
            raise UsageError("CACHE", "the cache file is missing", "its path, or --config and --volume")
        self.cache, self.ram_dir = cache, ram_dir


def _volume_of(config: str, volume: str | None) -> VolumeConfig:
    from vhostcache.config import load

    volumes = load(config).volumes
    names = ", ".join(one.name for one in volumes)
    if volume is None and len(volumes) > 1:
        raise UsageError("--volume", f"'{config}' has several volumes", f"one of {names}")
    found = next((one for one in volumes if volume in (None, one.name)), None)
    if found is None:
        raise UsageError("--volume", f"found '{volume}'; allowed: {names}")
    return found


def _backend_config(backend: str, options: dict[str, tuple[str, Any]]) -> FileBackendConfig | NbdBackendConfig:
    """`options`: name -> key of the backend, value."""
    from pydantic import ValidationError

    from vhostcache.config_backend import FileBackendConfig, NbdBackendConfig, is_nbd_uri

    try:
        if is_nbd_uri(backend):
            return NbdBackendConfig.model_validate({"type": "nbd", "uri": backend, **dict(options.values())})
        return FileBackendConfig(path=backend)
    except ValidationError as error:
        detail = error.errors()[0]
        context = detail.get("ctx", {})
        names = {key: name for name, (key, _) in options.items()}
        wrong = next((key for key in (context.get("key"), *detail["loc"]) if key in names), None)
        if wrong is not None:
            message = re.sub(r"\btls_\w+", lambda match: names[match[0]], detail["msg"])
            raise UsageError(names[str(wrong)], message) from None
        raise UsageError("--backend", f"found '{backend}'; allowed: {context.get('allowed', 'a path')}") from None


@dataclass(frozen=True)
class _OpenImage:
    backend: Backend
    writer: Writer


@contextlib.contextmanager
def _image(chosen: _Chosen, read_only: bool) -> Iterator[_OpenImage | None]:
    from vhostcache.backend.file import FileBackend
    from vhostcache.config_backend import FileBackendConfig

    config = chosen.backend
    if config is None:
        yield None
    elif isinstance(config, FileBackendConfig):
        file = FileBackend(config.path, read_only=read_only, direct=False, lock_wait_s=0.0)
        with contextlib.closing(file):
            yield _OpenImage(file, _FileWriter(config.path, file))
    else:
        with _connected(config, read_only, chosen.object_bytes) as image:
            yield image


@contextlib.contextmanager
def _connected(config: NbdBackendConfig | QsdBackendConfig, read_only: bool, object_bytes: int) -> Iterator[_OpenImage]:
    """Through the engine, which has the client."""
    from vhostcache.backend.nbd import NbdBackend
    from vhostcache.backend.qsd import QsdBackend
    from vhostcache.config_backend import NbdBackendConfig
    from vhostcache.engine import Engine

    with contextlib.ExitStack() as stack:
        backends = stack.enter_context(contextlib.ExitStack())  # closed after the engine
        engine = stack.enter_context(Engine(poll_max_us=0))
        backend: Backend
        if isinstance(config, NbdBackendConfig):
            backend = NbdBackend(config, engine, read_only)
        else:
            backend = QsdBackend(config, engine, read_only, False, object_bytes)
        backends.callback(backend.close)
        yield _OpenImage(backend, _EngineWriter(backend, backend.attach(engine)))


def _facts(image: Backend, file: CacheFile, accept_moved: bool = False, accept_changed: bool = False) -> BackendFacts:
    """The image, judged by its mark first: an old copy of a cache file is told by that alone."""
    from vhostcache import identity
    from vhostcache.assembly import image_of
    from vhostcache.log import recovery

    block = recovery.read_superblock(file)
    found = image_of(image)
    if block is not None and accept_moved and not found.can_be_marked:
        found = replace(found, stamp=replace(found.stamp, identity=block.backend_identity))
    if block is not None:
        identity.with_cache(found, file.path, block, accept_changed)
    return replace(identity.backend_facts(found, block), is_accepted=accept_changed)


def _examine(file: CacheFile, tier: Tier | None, facts: BackendFacts | None = None) -> Finding:
    from vhostcache.assembly import boot_id
    from vhostcache.cachefile import subject
    from vhostcache.log import recovery

    with _bar("reading") as bar:
        task = bar.add_task("", total=None)
        return recovery.examine(
            file,
            tier,
            boot_id(),
            facts,
            subject=subject(file.path),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _bar(what: str) -> Progress:
    """On standard error, and only where a person looks at it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


class _EngineWriter:
    """The image behind a server, for `offline.drain`."""

    def __init__(self, backend: Backend, opened: Opened) -> None:
        self._subject = backend.identity
        self._opened = opened
        self.size_bytes = backend.facts.size_bytes

    def write(self, offset: int, data: bytes) -> None:
        with self._attempt(f"cannot be written at byte {offset}"):
            self._opened.write(offset, data)

    def write_zeroes(self, offset: int, size: int, unmap: bool) -> None:
        with self._attempt(f"cannot be zeroed at byte {offset}"):
            for at in range(offset, offset + size, ZERO_BYTES):
                self._opened.zero(at, min(ZERO_BYTES, offset + size - at))

    def sync(self) -> None:
        with self._attempt("cannot be flushed"):
            self._opened.flush()

    @contextlib.contextmanager
    def _attempt(self, what: str) -> Iterator[None]:
        try:
            yield
        except InterruptedError:
            raise KeyboardInterrupt from None
        except OSError as error:
            raise ImageError(self._subject, f"{what}: {why(error)}", hint=_AGAIN) from error


class _FileWriter:
    """The image, for `offline.drain`."""

    def __init__(self, path: str, backend: FileBackend) -> None:
        self._subject = f"image '{path}'"
        self._descriptor = backend.facts.descriptor
        self.size_bytes = backend.facts.size_bytes

    def write(self, offset: int, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                count = os.pwrite(self._descriptor, view, offset)
                view = view[count:]
                offset += count
        except OSError as error:
            raise ImageError(self._subject, f"cannot be written at byte {offset}: {why(error)}", hint=_AGAIN) from error

    def write_zeroes(self, offset: int, size: int, unmap: bool) -> None:
        # Linux, <linux/falloc.h>: KEEP_SIZE | PUNCH_HOLE, and ZERO_RANGE | KEEP_SIZE
        mode = 0x03 if unmap else 0x11
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.fallocate(self._descriptor, mode, ctypes.c_longlong(offset), ctypes.c_longlong(size)) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            error = OSError(number, "")
            raise ImageError(self._subject, f"cannot be zeroed at byte {offset}: {why(error)}", hint=_AGAIN) from error
        for at in range(offset, offset + size, 1 << 20):
            self.write(at, bytes(min(1 << 20, offset + size - at)))

    def sync(self) -> None:
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise ImageError(self._subject, f"cannot be synced: {why(error)}", hint=_AGAIN) from error


# Printing.


def _superblock_fields(block: Superblock | None) -> dict[str, object]:
    if block is None:
        return {"damaged": True}
    fields = {key: value.hex() if isinstance(value, bytes) else value for key, value in vars(block).items()}
    identity = block.backend_identity.decode("utf-8", "replace")
    return fields | ({"backend_identity": identity} if identity.isprintable() else {})


def _print_superblocks(console: Console, finding: Finding) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("superblock", "A", "B"):
        table.add_column(heading, overflow="fold")
    a, b = (_superblock_fields(copy) for copy in finding.copies)
    for key in [*a, *(key for key in b if key not in a)]:
        values = str(a.get(key, "")), str(b.get(key, ""))
        table.add_row(key.replace("_", " "), values[0], "same" if values[0] == values[1] else values[1])
    console.print(table)


def _print_log(console: Console, finding: Finding) -> None:
    block, walk = finding.superblock, finding.walk
    assert block is not None
    assert walk is not None
    used = walk.head_address - block.tail_address
    payload = sum(record.payload_blocks for record in walk.records)
    console.print()
    console.print(
        f"log: {words.size(used * 4096)} of {words.size(block.ring_blocks * 4096)}, "
        f"{words.count(len(walk.records), 'record')}, "
        f"{words.size(payload * 4096)} of data; addresses {block.tail_address} to {walk.head_address}, "
        f"clean below {block.clean_address}, durable below {block.durable_address}"
    )
    if finding.replay:
        blocks = sum(len(group.slots) for group in finding.replay)
        console.print(
            f"RAM tier: {words.count(len(finding.replay), 'more record')}, {words.size(blocks * 4096)} of data"
        )


def _print_dirty(console: Console, finding: Finding, top: int) -> None:
    from rich.table import Table

    from vhostcache.log import offline

    block, walk = finding.superblock, finding.walk
    assert block is not None
    assert walk is not None
    objects = offline.DirtyMap(walk.records, block.clean_address).summary()
    data = sum(one.data_blocks for one in objects)
    zeroes = sum(one.zero_blocks for one in objects)
    lost = sum(one.lost_blocks for one in objects)
    console.print(
        f"dirty: {words.size(data * 4096)} of data and {words.size(zeroes * 4096)} of zeroes, "
        + (f"{words.size(lost * 4096)} lost, " if lost else "")
        + f"in {words.count(len(objects), 'object')} of {words.size(offline.OBJECT_BYTES)}"
    )
    if not objects or top == 0:
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("object", "offset", "dirty data", "zeroes"):
        table.add_column(heading, justify="right")
    for one in objects[:top]:
        table.add_row(
            str(one.number),
            str(one.number * offline.OBJECT_BYTES),
            words.size(one.data_blocks * 4096),
            words.size(one.zero_blocks * 4096),
        )
    console.print(table)
    if len(objects) > top:
        console.print(f"and {len(objects) - top} more")
