"""What the engine says of a volume's front-end: it comes and goes, starts and stops queues, switches its write cache.

Owns what each of these events means for the volume, for hand-over and for the log of events. A front-end may repeat
them as often as it likes, so what is written of them is limited.
"""

from __future__ import annotations

from typing import Final

from vhostcache.ending import Ending
from vhostcache.engine import Engine
from vhostcache.events import EventLog
from vhostcache.served import Served, State
from vhostcache.volumes import Volumes

EVENT_CONNECTED: Final = 1
EVENT_DISCONNECTED: Final = 2
EVENT_FEATURES: Final = 3
EVENT_WCE: Final = 4
EVENT_QUIESCE: Final = 5
EVENT_QUEUE: Final = 6
EVENT_RESUMED: Final = 8
EVENT_BAD_REQUEST: Final = 9
EVENT_HAND_OVER: Final = 11

FEATURE_FLUSH: Final = 1 << 9  # VIRTIO_BLK_F_FLUSH
FEATURE_LOG_ALL: Final = 1 << 26  # VHOST_F_LOG_ALL: the front-end migrates


class GuestEvents:
    """See the module."""

    def __init__(
        self, volumes: Volumes, engine: Engine, log: EventLog, ending: Ending, shutdown_on_disconnect: bool
    ) -> None:
        self._volumes = volumes
        self._engine = engine
        self._log = log
        self._ending = ending
        self._shutdown_on_disconnect = shutdown_on_disconnect

    def happened(self, kind: int, index: int, argument: int, now_ns: int) -> None:
        """One event of the engine."""
        served = self._volumes.served[index]
        volume, log, name = served.volume, self._log, served.name
        if kind == EVENT_QUIESCE:
            volume.quiesce(bool(argument))
            served.hand_over.quiesced(now_ns)
            self._volumes.rare = self._volumes.rare or served.hand_over.busy
        elif kind == EVENT_CONNECTED:
            served.connected = True
            volume.connected()
            log.limited(now_ns, "info", "connected", name)
        elif kind == EVENT_DISCONNECTED:
            self._disconnected(served, argument, index, now_ns)
        elif kind == EVENT_FEATURES:
            served.flush_negotiated = bool(argument & FEATURE_FLUSH)
            served.tell_write_cache()
            served.hand_over.migrating(bool(argument & FEATURE_LOG_ALL))
            self._volumes.wake(index)
            log.limited(now_ns, "info", "features", name, features=f"{argument:#x}", flush=served.flush_negotiated)
        elif kind == EVENT_WCE:
            served.write_cache = bool(argument)
            served.write_cache_unknown = False
            served.told = None
            served.tell_write_cache()
            log.limited(now_ns, "info", "write-cache", name, enabled=served.write_cache)
        elif kind == EVENT_RESUMED:
            # What it has been told stands in the superblock, if that is not new itself.
            served.write_cache_unknown = served.write_cache_unknown or served.claim is None or served.claim.is_new
            served.told = None
            served.tell_write_cache()
            log.limited(now_ns, "info", "resumed", name)
        elif kind == EVENT_QUEUE:
            self._queue(served, argument, now_ns)
        elif kind == EVENT_HAND_OVER:
            served.hand_over.asked(now_ns)
            self._volumes.rare = True
        elif kind == EVENT_BAD_REQUEST:
            log.limited(now_ns, "warning", "bad-request", name, count=argument)

    def _queue(self, served: Served, argument: int, now_ns: int) -> None:
        queue, started = argument & 0xFFFF, bool(argument >> 16 & 1)
        if started:
            served.hand_over.queue_started(queue, now_ns)
        else:
            served.hand_over.queue_stopped(queue)
        self._volumes.rare = self._volumes.rare or served.hand_over.busy
        fields = {"queue": queue, "started": started, "resubmitted": argument >> 32}
        self._log.limited(now_ns, "info", "queue", served.name, **fields)

    def _disconnected(self, served: Served, reason: int, index: int, now_ns: int) -> None:
        served.connected = False
        served.hand_over.disconnected()
        served.volume.disconnected()
        if served.write_cache_unknown and served.claim is None and not served.came_over:
            # The next front-end brings its own history.
            served.write_cache_unknown = False
            served.told = None
        if reason:
            message = self._engine.volume_message(index)
            self._log.limited(now_ns, "warning", "protocol-error", served.name, error=message)
        self._log.limited(now_ns, "info", "disconnected", served.name)
        if served.state is State.DRAINING and served.drains:
            served.volume.drain()  # what was accepted since the first time
        elif self._shutdown_on_disconnect:
            self._ending.begin("the front-end has disconnected")
