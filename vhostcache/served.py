"""One volume and all that belongs to it, as the daemon keeps it beside the loop: configuration, storage, what is known
of its guest, how far its end has come.

Owns the settings that a configuration and a backend make for the core, what the core is told of the guest's write
cache, and what `status` says of a volume. It does no I/O.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, Final

from vhostcache import metrics, tunables
from vhostcache.assembly import CacheClaim
from vhostcache.backend.base import Backend, Facts, Opened
from vhostcache.config import VolumeConfig
from vhostcache.errors import why_number
from vhostcache.guest_requests import VolumeSettings
from vhostcache.handover import Away, HandOver
from vhostcache.log.tier import TierLayout
from vhostcache.log_volume import LogVolume, LogVolumeSettings
from vhostcache.map import slots_for_ram
from vhostcache.resize import Growth
from vhostcache.sockets import Listener
from vhostcache.volume import NEVER, Volume

_ERRORS: Final = ("backend_error", "backend_held", "read_error")
"""Of the core: the errno of what goes wrong now."""


class State(Enum):
    SERVING = "serving"
    DRAINING = "draining"
    STOPPED = "stopped"


@dataclass
class Served:
    """One volume and all that belongs to it, away from the hot path."""

    config: VolumeConfig
    backend: Backend
    top: Opened | None  # of the backend and its wrappers
    listener: Listener
    volume: Volume | LogVolume | Away
    hand_over: HandOver
    claim: CacheClaim | None = None
    state: State = State.SERVING
    connected: bool = False
    failed: bool = False
    failure: str = ""  # if it is the image's
    # The guest's write cache: as configured or as the guest has set it; whether it may flush; and whether it may
    # believe something else, because an earlier process has told it so.
    write_cache: bool = True
    flush_negotiated: bool = True
    write_cache_unknown: bool = False
    came_over: bool = False  # by migration, perhaps with its guest, which may connect once more
    told: bool | None = None
    closing: bool = False
    log_progress: tuple[int, ...] | None = None  # at the end: how far the log had come ...
    give_up_at_ns: int = NEVER  # ... and when to wait no longer for more
    gave_up: bool = False  # on its backend, which is not there: what is dirty stays in the log
    growth: Growth | None = None
    growing: bool = False  # the backend has grown, and the superblocks are to say so
    resize_error: str = ""  # of the last one

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def is_away(self) -> bool:
        """Another daemon may have the image."""
        return isinstance(self.volume, Away)

    @property
    def drains(self) -> bool:
        """At the end everything goes to the image. With a cache file it may as well stay there."""
        if self.is_away:
            return False
        return self.claim is None or (self.config.cache.drain_on_exit and not (self.failed or self.gave_up))

    def tell_write_cache(self) -> None:
        """Tell the core what the guest believes, when that has changed. Without FLUSH a guest has no way to ask."""
        enabled = self.write_cache and self.flush_negotiated
        if self.claim is not None and self.write_cache and not enabled:
            # Now. What it will be told by a driver that can is not for this one to decide, nor for the superblock.
            self.volume.write_cache_unknown()
            self.told = None
            return
        if enabled == self.told or self.is_away:
            return
        self.told = enabled
        self.volume.set_write_cache(enabled)
        if enabled and self.write_cache_unknown:
            self.volume.write_cache_unknown()

    def status(self, now_ns: int) -> dict[str, Any]:
        """From counters that cost nothing to read."""
        config, core = self.config, self.volume.statistics()
        return {
            "name": self.name,
            "state": "failed" if self.failed else self.state.value,
            "failure": self.failure or None,
            "storage": self.hand_over.where.value,
            "storage_waits_for": self.hand_over.waits_for or None,
            "connected": self.connected,
            "socket": config.socket,
            "backend": config.backend.label,
            "backend_status": self._backend_status(now_ns),
            "mode": config.cache_mode.name,
            "write_through": bool(core.get("write_through")),
            "read_only": config.read_only,
            "size_bytes": self.volume.size_bytes,
            "resize": self._resize_state(),
            "ram_bytes": config.ram,
            "dirty_bytes": core["dirty_blocks"] * 4096,
            "cached_bytes": core["cached_blocks"] * 4096,
            "hits": core["hits"],
            "misses": core["misses"],
            "flushes_received": core["flushes_received"],
            "flushes_performed": core["flushes_performed"],
            "settings": tunables.current(config),
            **{key: why_number(-core[key]) if core.get(key) else None for key in _ERRORS},
            "waiting": {"room": core.get("waiting_for_room", 0), "backend": core.get("waiting_for_backend", 0)},
            "cache": None if self.claim is None else {"path": self.claim.path, **metrics.log_status(core)},
        }

    def _backend_status(self, now_ns: int) -> dict[str, Any]:
        status = self.backend.status(now_ns)
        if self.top is not None and status.get("state", "connected") != "connected":
            counted = self.top.statistics()
            status["waiting"] = counted["in_flight"] + counted["waiting"]
        return status

    def _resize_state(self) -> dict[str, Any] | None:
        running = self.growth is not None or self.growing
        return {"running": running, "error": self.resize_error} if running or self.resize_error else None

    def cache_fields(self) -> dict[str, Any]:
        """Of its `volume` event."""
        claim = self.claim
        if claim is None or claim.file is None:
            return {}
        return {"cache": claim.path, "cache_bytes": claim.file.size_bytes, "write_cache": self.write_cache}


def volume_settings(index: int, config: VolumeConfig, facts: Facts) -> VolumeSettings:
    """What the core has to know of a volume without a cache file."""
    mode = config.cache_mode
    return VolumeSettings(
        index=index,
        size_bytes=facts.size_bytes,
        object_bytes=config.object_size,
        slots=slots_for_ram(config.ram),
        acknowledge_durable=not mode.writeback,
        ignore_flush=mode.no_flush,
        destage_after_ns=config.destage_after,
        fill_bytes=config.fill_bytes,
        readahead_bytes=config.readahead_bytes,
        backend_timeout_ns=config.backend_timeout or 0,
        can_abandon=facts.can_abandon,
    )


def log_volume_settings(index: int, config: VolumeConfig, facts: Facts, layout: TierLayout) -> LogVolumeSettings:
    """What the core has to know of a volume with a cache file."""
    cache = config.cache
    common = asdict(volume_settings(index, config, facts))
    return LogVolumeSettings(
        **{**common, "slots": layout.slots},
        tier_entries=layout.entries,
        wants_whole_objects=facts.wants_whole_objects,
        sync_interval_ns=cache.sync_interval,
        flush_window_ns=cache.flush_window,
        checkpoint_interval_ns=cache.checkpoint_interval,
        destage=cache.destage,
        destage_threshold_percent=config.destage_threshold,
        max_batched_objects=config.max_batched_objects,
        ordered=config.policy == "ordered",
        preferred_bytes=facts.preferred_bytes,
        max_bytes=facts.max_bytes,
    )
