"""From the configuration of a volume to one that is served: backend, cache, core, and the engine's part.

Owns the order: the backend is opened, the cache is claimed, and when everything of all volumes has been had, each is
added to the engine. The same steps bring the storage to a volume that comes by live migration; then nobody is waited
for, and all but the last has a thread. What is opened is put on the caller's stack.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Set
from typing import Any, Final

from vhostcache.assembly import CacheClaim, Tell, claim_without_cache, prepare_cache
from vhostcache.backend.base import Backend, Opened
from vhostcache.backend.file import LOCK_WAIT_S as IMAGE_LOCK_WAIT_S
from vhostcache.backend.opening import open_backend, stack_backend
from vhostcache.cachefile import LOCK_WAIT_S as CACHE_LOCK_WAIT_S
from vhostcache.config import VolumeConfig
from vhostcache.engine import Engine
from vhostcache.events import EventLog
from vhostcache.handover import Away, HandOver, Storage
from vhostcache.host import notify_supervisor
from vhostcache.log.format import REQUEST_BLOCKS
from vhostcache.log.superblock import WRITE_CACHE_OFF, WRITE_CACHE_UNKNOWN
from vhostcache.log_volume import LogVolume
from vhostcache.map import slots_for_ram
from vhostcache.served import Served, log_volume_settings, volume_settings
from vhostcache.sockets import Listener
from vhostcache.volume import Volume
from vhostcache.volumes import Volumes

DISCARD_MAX_BYTES: Final = 64 << 20  # what one DISCARD or WRITE_ZEROES may name: a bound for what one request starts
REQUEST_MAX_BYTES: Final = (REQUEST_BLOCKS - 1) * 4096  # with a log; unaligned it touches one block more


class Composition:
    """See the module. `storage` makes what hand-over does with the storage of the volume of that number."""

    def __init__(
        self,
        engine: Engine,
        log: EventLog,
        volumes: Volumes,
        discard_dirty_data: Set[str],
        storage: Callable[[int], Storage],
    ) -> None:
        self._engine = engine
        self._log = log
        self._volumes = volumes
        self._discard_dirty_data = discard_dirty_data
        self._storage = storage

    def open_backend(self, volume: VolumeConfig, stack: contextlib.ExitStack, waits: bool = True) -> Backend:
        """Not `waits`: whoever has it is not waited for."""
        wait_s = IMAGE_LOCK_WAIT_S if waits else 0.0
        backend = open_backend(volume, self._engine, wait_s, locked=not (waits and volume.incoming))
        stack.callback(backend.close)
        if waits:
            for warning in backend.warnings:
                self._log.notice(volume.name, warning.event, warning.fields)
        return backend

    def claim(
        self,
        volume: VolumeConfig,
        backend: Backend,
        stack: contextlib.ExitStack,
        waits: bool = True,
        tell: Tell | None = None,
    ) -> CacheClaim | None:
        """Its cache file, if it has one; of a volume that comes later only what can be refused, or takes long. `tell`:
        instead of the log."""
        discard = volume.name in self._discard_dirty_data and waits

        def log(level: str, event: str, fields: dict[str, Any]) -> None:
            getattr(self._log, level)(event, volume=volume.name, **fields)
            if event in ("recovering", "making-cache"):
                notify_supervisor(f"EXTEND_TIMEOUT_USEC={30 * 10**6}")

        tell = tell or log
        if volume.incoming and waits:
            prepare_cache(volume, tell)
            return None
        if volume.cache.path is None:
            claim_without_cache(backend, discard, tell)
            return None
        wait_s = CACHE_LOCK_WAIT_S if waits else 0.0
        claim = CacheClaim(volume, backend, discard, tell, wait_s, handed_over=not waits)
        stack.callback(claim.close)
        return claim

    def serve(
        self,
        config: VolumeConfig,
        backend: Backend,
        listener: Listener,
        claim: CacheClaim | None,
        attach_to: int | None = None,
        top: Opened | None = None,
    ) -> Served:
        """A volume and its storage; or its storage alone, which comes to the volume `attach_to`."""
        facts, mode = backend.facts, config.cache_mode
        top = top or stack_backend(config, backend, self._engine)
        common: dict[str, Any] = {
            "listen_fd": listener.detach() if attach_to is None else -1,
            "backend": top,
            "size_bytes": facts.size_bytes,
            "slots": slots_for_ram(config.ram),
            "object_bytes": config.object_size,
            "num_queues": config.num_queues,
            "read_only": config.read_only,
            "write_cache": mode.writeback,
            "write_depth": config.write_depth,
            "discard_max_bytes": DISCARD_MAX_BYTES,
            "serial": config.serial_text,
            "attach_to": attach_to,
            "request_max_bytes": REQUEST_MAX_BYTES if config.cache.path is not None else 0,
        }
        if config.incoming and attach_to is None:
            return self._serve_away(config, backend, listener, common)
        if claim is not None:
            return self._serve_logged(config, backend, listener, claim, common)
        index = self._engine.add_volume(**common)
        assert index in (len(self._volumes.served), common["attach_to"])
        volume = Volume(volume_settings(index, config, facts), self._volumes.operations)
        hand_over = self._hand_over(index, config)
        served = Served(config, backend, top, listener, volume, hand_over, write_cache=mode.writeback)
        served.write_cache_unknown = attach_to is not None  # who had it before us has told the guest something
        return served

    def _hand_over(self, index: int, config: VolumeConfig, away: bool = False) -> HandOver:
        return HandOver(self._storage(index), config.hand_over_timeout, away)

    def _serve_away(self, config: VolumeConfig, backend: Backend, listener: Listener, common: dict[str, Any]) -> Served:
        """A volume whose storage another daemon may have."""
        common["backend"].close()  # what it is is known
        backend.close()
        index = self._engine.add_volume(**{**common, "backend": None}, detached=True)
        hand_over = self._hand_over(index, config, away=True)
        away = Away(backend.facts.size_bytes)
        return Served(config, backend, None, listener, away, hand_over, write_cache=config.cache_mode.writeback)

    def _serve_logged(
        self, config: VolumeConfig, backend: Backend, listener: Listener, claim: CacheClaim, common: dict[str, Any]
    ) -> Served:
        """A volume with a log, which is recovered here."""
        mode = config.cache_mode
        recovered = claim.recovered or claim.open()
        assert claim.file is not None
        # No front-end says again what its guest has been told.
        write_cache = mode.writeback and recovered.superblock.write_cache != WRITE_CACHE_OFF
        index = self._engine.add_volume(
            **{**common, "write_cache": write_cache},
            align_mem_bytes=claim.file.align_mem_bytes,
            align_io_bytes=claim.file.align_io_bytes,
            cache_fd=claim.file.descriptor,
            ring_bytes=recovered.ring_blocks * 4096,
            store_bytes=claim.read_cache[0].positions * 4096 if claim.read_cache else 0,
            tier_fd=claim.tier_fd,
            tier_entries_offset=claim.layout.entries_offset_bytes,
            tier_entries=claim.layout.entries,
            tier_slab_offset=claim.layout.slab_offset_bytes,
        )
        assert index in (len(self._volumes.served), common["attach_to"])
        self._engine.log_start(index, recovered.previous_crc)
        with self._engine.log_crcs(index) as crcs:
            for record in recovered.records:
                if record.payload_blocks:
                    first = (record.address + record.header_blocks) % recovered.ring_blocks
                    crcs[first : first + record.payload_blocks] = memoryview(record.crcs)
            if claim.read_cache and claim.read_cache[1]:
                crcs[recovered.ring_blocks :] = memoryview(claim.read_cache[1]).cast("I")
        settings = log_volume_settings(index, config, backend.facts, claim.layout)
        eviction = claim.read_cache[0] if claim.read_cache else None
        volume = LogVolume(settings, self._volumes.operations, recovered, eviction=eviction)
        claim.read_cache = None
        recovered.records.clear()
        return Served(
            config,
            backend,
            common["backend"],
            listener,
            volume,
            self._hand_over(index, config),
            claim,
            write_cache=write_cache,
            write_cache_unknown=recovered.superblock.write_cache == WRITE_CACHE_UNKNOWN
            or (claim.is_new and common["attach_to"] is not None),
        )
