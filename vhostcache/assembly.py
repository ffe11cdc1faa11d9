"""One volume's cache, from its files to a log that can be written on, and back.

Owns the order in which a start and an end go, so that a crash between any two steps leaves what the next start
understands:

    claim    the cache file is opened and locked, or not there yet; it is judged by the image's mark; nothing is written
    open     a new log, if one is due: superblocks, then the image's mark
             a new RAM-tier file, complete; recovery, whose superblocks name it; the old file goes
             the image's mark says the new epoch, and dirty: after that the first request may come
    close    the superblocks say clean and how the image was left; then the mark says the same; the RAM-tier file goes

A claim that never served anybody is closed like one that did. What has not been closed in good order stays as it is,
RAM-tier file and all: that is what the next start recovers from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import time
import uuid
from collections.abc import Callable
from typing import Any, Final

from vhostcache import identity
from vhostcache.backend.base import Backend
from vhostcache.backend.mark import Mark
from vhostcache.cachefile import HEAD_BYTES, LOCK_WAIT_S, CacheFile
from vhostcache.cachefile import subject as cache_subject
from vhostcache.config import VolumeConfig, format_size
from vhostcache.errors import CacheError, UsageError
from vhostcache.eviction import Eviction
from vhostcache.identity import Action, Image, Judgement, RefusedError
from vhostcache.log import read_ring, recovery, superblock, tier
from vhostcache.log.recovery import Decision, Finding, Recovered
from vhostcache.log.superblock import Superblock
from vhostcache.log.tier import Tier, TierLayout
from vhostcache.map import slots_for_ram
from vhostcache.tierfile import TierFolder

BOOT_ID_VARIABLE: Final = "VHOSTCACHE_BOOT_ID"  # for tests: in place of the kernel's, another one is another boot
_BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"
_PROGRESS_S: Final = 1.0
_PREWRITE_S: Final = 30.0  # of a new cache file; what is left is only slower to flush until it has been written once

Tell = Callable[[str, str, dict[str, Any]], None]
"""Level, event, fields: something for the log."""


def boot_id() -> bytes:
    """Which run of this machine it is: what lies on a tmpfs is of no other."""
    text = os.environ.get(BOOT_ID_VARIABLE, "")
    try:
        if not text:
            with open(_BOOT_ID, encoding="ascii") as file:
                text = file.read()
        return uuid.UUID(text.strip()).bytes
    except (OSError, ValueError) as error:
        raise CacheError("boot id", f"'{text.strip() or _BOOT_ID}' is not one: {error}") from error


def image_of(backend: Backend) -> Image:
    """What is known of an image that has been opened."""
    return Image(
        subject=backend.identity,
        size_bytes=backend.facts.size_bytes,
        stamp=backend.stamp(),
        mark=backend.read_mark(),
        can_be_marked=backend.can_be_marked,
    )


def claim_without_cache(backend: Backend, discard: bool, tell: Tell) -> None:
    """The image is to be served by itself: refuse that while a cache has newer data, and end its belonging to any."""
    image = image_of(backend)
    try:
        identity.without_cache(image)
    except RefusedError as refusal:
        if not discard or backend.facts.read_only:
            raise
        tell("warning", "dirty-data-discarded", {"reason": refusal.found})
    if image.mark is not None and not backend.facts.read_only:
        # Its cache would not know what is written now.
        backend.write_mark(None)


def prepare_cache(config: VolumeConfig, tell: Tell) -> None:
    """Of a volume that comes later: what takes long, and what can be refused. A cache file that is not there yet is
    made; one that is there may be in use."""
    path = config.cache.path
    if path is None or os.path.lexists(path):
        return
    if config.cache.size is None:
        raise UsageError(cache_subject(path), "does not exist, or is empty", "--cache-size, to make it")
    with CacheFile.create(path, config.cache.size + (config.cache.read_cache or 0)) as file:
        _prewrite(file, tell)


def _prewrite(file: CacheFile, tell: Tell) -> None:
    """A new one, all of it, unless that takes too long."""
    told_s = time.monotonic()

    def progress(done_bytes: int, of_bytes: int) -> None:
        nonlocal told_s
        if time.monotonic() - told_s >= _PROGRESS_S:
            told_s = time.monotonic()
            tell("info", "making-cache", {"cache": file.path, "bytes": done_bytes, "of_bytes": of_bytes})

    left_bytes = file.prewrite(_PREWRITE_S, progress)
    if left_bytes:
        fields = {"cache": file.path, "bytes": left_bytes, "reason": f"it would take more than {_PREWRITE_S:.0f} s"}
        tell("info", "cache-not-prewritten", fields)


class CacheClaim:
    """A volume's cache file, claimed. Then `open`, and at the end `close`."""

    def __init__(
        self,
        config: VolumeConfig,
        backend: Backend,
        discard: bool,
        tell: Tell,
        lock_wait_s: float = LOCK_WAIT_S,
        handed_over: bool = False,
    ) -> None:
        """CacheError, UsageError: nothing has been changed, and nothing is left open. `handed_over`: another daemon has
        had the image, or may have."""
        assert config.cache.path is not None
        self.path = config.cache.path
        self._config = config
        self._backend = backend
        self._discard = discard
        self._tell = tell
        self._lock_wait_s = lock_wait_s
        self._handed_over = handed_over
        self._folder: TierFolder | None = None
        self._made_file = False
        self._marked_by_us = False
        self._abandoned = False
        self.tier_fd = -1
        self.layout = TierLayout(slots_for_ram(config.ram), slots_for_ram(config.ram))
        self.recovered: Recovered | None = None
        self.read_cache: tuple[Eviction, bytes] | None = None
        """What the read cache has, and its crcs: as found by `open`, as left when `keep_read_cache` was called."""
        self.served = False
        self.file: CacheFile | None = None
        try:
            self._judgement = self._judge()
        except BaseException:
            self._let_go()
            raise

    @property
    def is_new(self) -> bool:
        """The log began with this start: it knows nothing of the guest."""
        cold = self.recovered is not None and self.recovered.finding.decision is Decision.COLD
        return cold or self._judgement.action is not Action.USE

    # Claiming.

    def _judge(self) -> Judgement:
        image = image_of(self._backend)
        exists = os.path.lexists(self.path)
        if exists:
            self.file = CacheFile(self.path, lock_wait_s=self._lock_wait_s)
            for warning in self.file.warnings:
                self._tell("warning", warning.event, warning.fields)
        try:
            if self.file is None or self.file.is_blank:
                judgement = identity.with_new_cache(image, self.path)
                self._new_size_bytes()
                return judgement
            found = self._superblock()
            if found is None:
                if not self._looks_like_a_cache():
                    raise identity.no_cache_file(self.path)
                return Judgement(Action.USE)  # recovery has more to say
            self._refuse_another_size(found)
            judgement = identity.with_cache(image, self.path, found)
            if self._handed_over and judgement.action is Action.USE:
                return identity.after_others(image, found)
            return judgement
        except RefusedError as refusal:
            if not self._discard or not refusal.discardable:
                raise
            self._new_size_bytes()
            return self._discarded(refusal.found)

    def _superblock(self) -> Superblock | None:
        return superblock.newest(*self._superblocks())

    def _superblocks(self) -> list[Superblock | None]:
        return [superblock.unpack(block) for block in self._copies()]

    def _copies(self) -> list[bytes]:
        assert self.file is not None
        offsets = (superblock.A_OFFSET_BYTES, superblock.B_OFFSET_BYTES)
        end = self.file.size_bytes
        return [self.file.read(offset, 4096) if offset + 4096 <= end else b"" for offset in offsets]

    def _looks_like_a_cache(self) -> bool:
        return any(superblock.version_in(block) is not None for block in self._copies())

    def _refuse_another_size(self, found: Superblock) -> None:
        assert self.file is not None
        asked = self._config.cache.size
        made = HEAD_BYTES + found.ring_blocks * 4096
        if asked is not None and not self.file.is_device and asked != made and self.file.size_bytes >= made:
            raise UsageError(
                cache_subject(self.path),
                f"is {format_size(made)} large",
                f"{format_size(asked)}, as --cache-size says",
                "leave that out, or drain it and make a new one under another name",
            )

    def _new_size_bytes(self) -> int:
        """Of the log to be made."""
        from vhostcache.config import CACHE

        if self.file is not None and self.file.is_device:
            size = self.file.size_bytes
            if size < CACHE.minimum:
                raise CacheError(cache_subject(self.path), f"is {size} bytes large", "at least 64MiB")
            return size
        asked = self._config.cache.size
        found = self._superblock() if self.file is not None else None
        if asked is None and found is not None:
            return HEAD_BYTES + found.ring_blocks * 4096
        if asked is None and self.file is not None and self.file.size_bytes >= CACHE.minimum:
            return self.file.size_bytes // 4096 * 4096
        if asked is None:
            raise UsageError(cache_subject(self.path), "does not exist, or is empty", "--cache-size, to make it")
        return asked

    def _discarded(self, reason: str, dirty_bytes: int | None = None) -> Judgement:
        fields = {"cache": self.path, "reason": reason, "dirty_bytes": dirty_bytes}
        self._tell("warning", "dirty-data-discarded", fields)
        return Judgement(Action.FRESH, reason)

    # Opening.

    def open(self) -> Recovered:
        """The log, durable and of a new epoch, and the RAM tier's file. CacheError: one line, and what was there is
        still there."""
        self._folder = TierFolder(self._config.cache.ram_dir)
        if not self._folder.is_memory:
            self._tell("warning", "ram-dir-not-tmpfs", {"ram_dir": self._folder.path})
        boot = boot_id()
        self._make_file()
        assert self.file is not None
        if self._judgement.action is Action.COLD:
            self._tell_cold(self._judgement.reason)
        if self._judgement.action is not Action.USE:
            self._begin_anew()
        elif self._discard:
            self._discard_if_refused(boot)
        began_s = time.monotonic()
        self.recovered = recovered = self._recover(boot)
        self._report(recovered, time.monotonic() - began_s)
        block = recovered.superblock
        self._folder.remove(block.uuid, keep=[block.tier_uuid])
        self._mark(Mark(block.uuid, block.epoch, dirty=True))
        self._load_read_cache(recovered)
        return recovered

    def _make_file(self) -> None:
        if self.file is None:
            self.file = CacheFile.create(self.path, self._new_size_bytes() + self._read_bytes)
            self._made_file = True
            _prewrite(self.file, self._tell)
            for warning in self.file.warnings:
                self._tell("warning", warning.event, warning.fields)
        elif self.file.is_sparse:
            self.file.allocate(self.file.size_bytes)

    def _begin_anew(self) -> None:
        """An empty log. The image is told, before it can have anything."""
        assert self.file is not None
        size_bytes, read_bytes = self._new_size_bytes(), self._read_bytes
        if self.file.is_device:
            self._refuse_small_device(read_bytes)
        else:
            size_bytes += read_bytes
        if self.file.size_bytes < size_bytes:
            self.file.allocate(size_bytes)
            _prewrite(self.file, self._tell)
        new = uuid.uuid4().bytes
        facts = identity.backend_facts(image_of(self._backend), None)
        block = recovery.create(self.file, new, facts, read_bytes // 4096)
        state = superblock.WRITE_CACHE_ON if self._config.cache_mode.writeback else superblock.WRITE_CACHE_OFF
        self._write_superblocks(dataclasses.replace(block, write_cache=state, generation=block.generation + 1))
        self._mark(Mark(new, block.epoch, dirty=False))

    # The read cache, behind the log.

    @property
    def _read_bytes(self) -> int:
        """What was asked for."""
        return self._config.cache.read_cache or 0

    def _refuse_small_device(self, read_bytes: int) -> None:
        from vhostcache.config import CACHE

        assert self.file is not None
        if read_bytes and self.file.size_bytes - read_bytes < CACHE.minimum:
            raise UsageError(
                cache_subject(self.path),
                f"has {format_size(self.file.size_bytes)}",
                f"room for a read_cache of {format_size(read_bytes)} and a log of {format_size(CACHE.minimum)}",
                "choose a smaller read_cache",
            )

    def _make_room_for_reads(self, before: Superblock) -> int:
        """How many blocks the read cache has from now on. The log stays as it is: a file grows, a device cannot."""
        assert self.file is not None
        wanted = self._read_bytes // 4096
        end = HEAD_BYTES + before.ring_blocks * 4096
        if self.file.size_bytes < end:
            return wanted  # recovery has more to say
        if self.file.is_device:
            room = (self.file.size_bytes - end) // 4096
            if wanted > room:
                fields = {"cache": self.path, "bytes": room * 4096, "wanted_bytes": wanted * 4096}
                self._tell("warning", "read-cache-smaller", {**fields, "reason": "the log has the rest of the device"})
            return min(wanted, room)
        if self.file.size_bytes < end + wanted * 4096:
            self.file.allocate(end + wanted * 4096)
        return wanted

    def _load_read_cache(self, recovered: Recovered) -> None:
        assert self.file is not None
        block = recovered.superblock
        end = HEAD_BYTES + (block.ring_blocks + block.read_blocks) * 4096
        before = recovered.finding.superblock
        if before is not None and before.read_blocks > block.read_blocks and not self.file.is_device:
            self.file.cut(end)  # it has become smaller
        positions = read_ring.positions_of(block.read_blocks)
        if not positions:
            return
        found = None
        with contextlib.suppress(CacheError):
            found = read_ring.load(self.file, recovered)
        self.read_cache = found or (Eviction(positions), b"")
        used = self.read_cache[0].main_count + self.read_cache[0].small_count
        self._tell("info", "read-cache", {"bytes": positions * 4096, "used_bytes": used * 4096, "warm": bool(found)})

    def keep_read_cache(self, eviction: Eviction, crcs: bytes) -> None:
        """What it has, after an end in good order: `close` writes it."""
        self.read_cache = eviction, crcs

    def _discard_if_refused(self, boot: bytes) -> None:
        assert self.file is not None
        with self._old_tier() as old:
            finding = recovery.examine(
                self.file, old, boot, self._backend_facts(), subject=cache_subject(self.path), progress=self._progress()
            )
        # A newer program's cache is not lost, but for that program.
        if finding.error is not None and (finding.superblock is not None or self._is_our_version()):
            self._new_size_bytes()
            self._judgement = self._discarded(finding.what, _dirty_bytes(finding))
            self._begin_anew()

    def _is_our_version(self) -> bool:
        return any(superblock.version_in(block) == superblock.VERSION for block in self._copies())

    def _backend_facts(self) -> recovery.BackendFacts:
        return identity.backend_facts(image_of(self._backend), self._superblock())

    @contextlib.contextmanager
    def _old_tier(self) -> Any:
        """The RAM tier of the opening that was not closed, if there was one and it is there."""
        assert self.file is not None
        assert self._folder is not None
        named = recovery.named_tier(self.file)
        descriptor = self._folder.open(*named) if named is not None else None
        if descriptor is None:
            yield None
            return
        try:
            if os.fstat(descriptor).st_size == 0:
                yield None
                return
            mapped = mmap.mmap(descriptor, 0, mmap.MAP_SHARED, mmap.PROT_READ)
        finally:
            os.close(descriptor)
        found: Tier | None = None
        try:
            found = tier.parse(mapped)
            yield found
        finally:
            if found is not None:
                found.data.release()
            with contextlib.suppress(BufferError):
                mapped.close()

    def _recover(self, boot: bytes) -> Recovered:
        assert self.file is not None
        assert self._folder is not None
        before = self._superblock()
        if before is None or self.file.size_bytes < HEAD_BYTES:
            return recovery.recover(self.file, None, boot, subject=cache_subject(self.path))  # it refuses
        read_blocks = self._make_room_for_reads(before)
        name = uuid.uuid4().bytes
        # What starts that failed have left must not add up.
        self._folder.remove(before.uuid, keep=[copy.tier_uuid for copy in self._superblocks() if copy is not None])
        self.tier_fd = self._folder.create(before.uuid, name, self.layout.size_bytes)
        os.pwrite(self.tier_fd, tier.pack_header(self.layout, before.uuid, boot, name, before.epoch + 1), 0)
        try:
            with self._old_tier() as old:
                return recovery.recover(
                    self.file,
                    old,
                    boot,
                    self._backend_facts(),
                    tier_uuid=name,
                    subject=cache_subject(self.path),
                    progress=self._progress(),
                    read_blocks=read_blocks,
                )
        except BaseException:
            with contextlib.suppress(CacheError):
                if recovery.named_tier(self.file) != (before.uuid, name):
                    os.unlink(self._folder.file_path(before.uuid, name))
            raise

    def _progress(self) -> Callable[[int, int], None]:
        """Says once a second how far recovery has come."""
        next_s = time.monotonic() + _PROGRESS_S

        def told(done_blocks: int, known_blocks: int) -> None:
            nonlocal next_s
            if time.monotonic() >= next_s:
                next_s = time.monotonic() + _PROGRESS_S
                self._tell("info", "recovering", {"blocks": done_blocks, "of_blocks": known_blocks})

        return told

    def _tell_cold(self, reason: str) -> None:
        self._tell("warning", "cache-cold", {"cache": self.path, "reason": reason})

    def _report(self, recovered: Recovered, took_s: float) -> None:
        if recovered.finding.decision is Decision.COLD:
            self._tell_cold(recovered.finding.what)
        self._tell(
            "info",
            "recovered",
            {
                "cache": self.path,
                "decision": recovered.finding.decision.name.lower(),
                "found": recovered.finding.what,
                "records": len(recovered.records),
                "blocks": sum(record.payload_blocks for record in recovered.records),
                "ram_tier_records": len(recovered.finding.replay),
                "dirty_bytes": max(0, recovered.head_address - recovered.clean_address) * 4096,
                "epoch": recovered.superblock.epoch,
                "seconds": round(took_s, 3),
            },
        )

    # Closing.

    def close(self) -> None:
        """Everything that was served is in the log, if its superblocks say so; all I/O has ended. Lets go of all."""
        try:
            if self.file is not None and self.recovered is not None and not self._abandoned:
                self._close_log(self.recovered)
        finally:
            self._let_go()

    def abandon(self) -> str:
        """The cache device is dead: nothing is read from it or written to it any more, and the RAM tier's file stays.
        Returns that file's path."""
        assert self.recovered is not None
        assert self._folder is not None
        self._abandoned = True
        block = self.recovered.superblock
        return self._folder.file_path(block.uuid, block.tier_uuid)

    def _close_log(self, recovered: Recovered) -> None:
        assert self.file is not None
        assert self._folder is not None
        if self.served:
            found = self._superblock()
            if found is None or not found.clean:
                return
            if self.read_cache is not None and self.read_cache[1]:
                with contextlib.suppress(CacheError):  # the next start finds it empty
                    read_ring.save(self.file, found, *self.read_cache)
        else:
            mtime_ns = self._backend.stamp().mtime_ns
            block = recovered.superblock
            found = dataclasses.replace(block, clean=True, backend_mtime_ns=mtime_ns, generation=block.generation + 1)
            self._write_superblocks(found)
        self._mark(Mark(found.uuid, found.epoch, dirty=identity.may_be_dirty(found)))
        self._folder.remove(found.uuid)

    def _let_go(self) -> None:
        if self.tier_fd >= 0:
            os.close(self.tier_fd)
            self.tier_fd = -1
        if self.file is not None:
            if self._made_file and not self.served:
                with contextlib.suppress(OSError):
                    os.unlink(self.path)
                if self._marked_by_us:
                    self._backend.write_mark(None)
            self.file.close()
            self.file = None

    def _mark(self, mark: Mark) -> None:
        self._marked_by_us = self._backend.write_mark(mark) or self._marked_by_us

    def _write_superblocks(self, block: Superblock) -> None:
        assert self.file is not None
        for offset in (superblock.A_OFFSET_BYTES, superblock.B_OFFSET_BYTES):
            self.file.write(offset, block.pack())
            self.file.sync()


def _dirty_bytes(finding: Finding) -> int | None:
    """What of the log the image does not have, as far as the log could be read."""
    if finding.superblock is None:
        return None
    head = finding.walk.head_address if finding.walk is not None else finding.superblock.durable_address
    return max(0, head - finding.superblock.clean_address) * 4096
