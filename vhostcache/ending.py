"""The end of a daemon and of each of its volumes: nothing of what was acknowledged is left behind unless it must be.

Owns how far each volume's end has come: the engine takes no more requests, everything goes to the image where there is
no log (or drain_on_exit says so), the log is closed. A backend that is not there is waited for only where nothing else
keeps the data, and a cache device that is dead for a while (CACHE_FAILS_NS, CACHE_SILENT_NS). It closes no file: that
is done when all have ended.
"""

from __future__ import annotations

from typing import Final

from vhostcache.backend.base import Notice
from vhostcache.engine import Engine
from vhostcache.events import EventLog
from vhostcache.handover import Away
from vhostcache.host import notify_supervisor
from vhostcache.log_volume import LogVolume
from vhostcache.served import Served, State
from vhostcache.volume import NEVER, Volume
from vhostcache.volumes import Volumes

SECOND_NS: Final = 1_000_000_000
DONE: Final = -1
CACHE_FAILS_NS: Final = 5 * SECOND_NS  # so long an end waits for a cache device that answers with errors,
CACHE_SILENT_NS: Final = 60 * SECOND_NS  # and so long for one that does not answer
_ABANDONED: Final = (
    "nothing is lost as long as the host runs and that file stays: mend the device and start again, which takes up both"
)


class Ending:
    """See the module."""

    def __init__(self, volumes: Volumes, engine: Engine, log: EventLog) -> None:
        self._volumes = volumes
        self._engine = engine
        self._log = log
        self._progress_at_ns = NEVER
        self.has_begun = False
        self.abandons = False
        """A cache device that is dead."""

    # Its beginning.

    def begin(self, reason: str) -> None:
        """Of all volumes."""
        self.has_begun = True
        self._log.info("stopping", reason=reason)
        notify_supervisor("STOPPING=1")
        for index in range(len(self._volumes.served)):
            self._stop_volume(index)

    def hasten(self, signal_name: str) -> None:
        """It has begun, and somebody asks once more."""
        served = self._volumes.served
        for index, one in enumerate(served):
            if one.state is State.DRAINING:
                self._give_up(index)
        loses = any(one.claim is None for one in served if one.state is not State.STOPPED)
        what = "loses what is dirty" if loses else "leaves the rest to the next start"
        self._log.warning("still-draining", signal=signal_name, hint=f"only SIGKILL ends it now, and {what}")

    def fail(self, index: int, notice: Notice) -> None:
        """This volume cannot go on; the others can. The exit status will say so."""
        served = self._volumes.served[index]
        words = notice.event.replace("-", " ")
        served.failure = f"{words}: {hint}" if (hint := notice.fields.get("hint")) else words
        served.failed = True
        self._stop_volume(index)

    def _stop_volume(self, index: int) -> None:
        served = self._volumes.served[index]
        if served.state is State.SERVING:
            served.state = State.DRAINING
            self._engine.stop_volume(index)
            if served.drains:
                served.volume.drain()
            self._volumes.wake(index)
            self._progress_at_ns = 0
            self._volumes.rare = True
            self.give_up_if_lost(index)

    def give_up_if_lost(self, index: int) -> None:
        """A volume that stops does not wait for a server that is not there, if its log may keep what is dirty."""
        served = self._volumes.served[index]
        if served.state is State.DRAINING and served.backend.is_lost and not served.drains:
            self._give_up(index)

    def _give_up(self, index: int) -> None:
        """End without the backend. The front-end submits to the next daemon what has not been answered."""
        served = self._volumes.served[index]
        volume, top = served.volume, served.top
        if not isinstance(volume, LogVolume) or served.gave_up or top is None:
            return
        served.failed = served.failed or served.drains
        served.gave_up = True
        self._log.warning(
            "backend-given-up", volume=served.name, hint="the log keeps what is dirty, for the next start"
        )
        volume.drain(False)
        if served.backend.kind != "file":  # whose I/O ends by itself
            top.give_up()
        self._engine.disconnect_volume(index)
        self._volumes.wake(index)

    # How it goes on.

    def step(self, now_ns: int) -> int:
        """Once a turn in which something rare is to be done. Returns when it wants the next one; DONE: every volume has
        stopped."""
        volumes = self._volumes
        if not any(served.state is State.DRAINING for served in volumes.served):
            return NEVER
        if volumes.operations:
            return 0  # not yet seen by the engine
        for index, served in enumerate(volumes.served):
            if served.state is not State.DRAINING:
                continue
            if (not served.connected and self._has_ended(index, served)) or self._gives_up(served, now_ns):
                served.state = State.STOPPED
                served.listener.close()
        if all(served.state is State.STOPPED for served in volumes.served):
            return DONE
        return self._progress(now_ns)

    def _has_ended(self, index: int, served: Served) -> bool:
        """Drained, and the log, if there is one, closed."""
        volume = served.volume
        if served.growth is not None or served.growing:
            return False
        if served.drains and not served.closing:
            if not volume.drained:
                return False
            self._log.info("drained", volume=served.name)
        if isinstance(volume, Volume | Away):
            return True
        if not served.closing:
            self.close_log(index)
        if volume.closed:
            dirty = volume.statistics()["dirty_blocks"]
            self._log.info("closed", volume=served.name, dirty_bytes=dirty * 4096)
            if volume.read_ring is not None and served.claim is not None and served.claim.recovered is not None:
                with self._engine.log_crcs(index) as crcs:
                    kept = crcs[served.claim.recovered.ring_blocks :].tobytes()
                served.claim.keep_read_cache(volume.read_ring.eviction, kept)
        return volume.closed

    def close_log(self, index: int, cold: bool = False) -> None:
        """Begin to; there must be no front-end. `cold`: nothing in it is to be believed again."""
        served = self._volumes.served[index]
        served.closing = True
        if isinstance(served.volume, LogVolume):
            served.volume.close(lambda: served.backend.settle().mtime_ns, cold)
        self._volumes.wake(index)

    def _gives_up(self, served: Served, now_ns: int) -> bool:
        """Whether its cache device is dead: nothing of what waits for it can be answered any more. What was flushed is
        on that device, what was acknowledged in the RAM tier's file; both stay as they are, for the next start."""
        volume = served.volume
        if not isinstance(volume, LogVolume) or served.claim is None:
            return False
        progress = volume.log_progress
        if progress is None or progress != served.log_progress:
            served.log_progress = progress
            patience_ns = CACHE_FAILS_NS if volume.cache_fails else CACHE_SILENT_NS
            served.give_up_at_ns = NEVER if progress is None else now_ns + patience_ns
            return False
        if volume.cache_fails:
            served.give_up_at_ns = min(served.give_up_at_ns, now_ns + CACHE_FAILS_NS)
        if now_ns < served.give_up_at_ns:
            return False
        fields = {"cache": served.claim.path, "ram_tier": served.claim.abandon(), "hint": _ABANDONED}
        self._log.error("cache-abandoned", volume=served.name, **fields)
        served.failed = True
        self.abandons = True
        return True

    def _progress(self, now_ns: int) -> int:
        """Say once a second how far it has come, and when to say it next."""
        if now_ns >= self._progress_at_ns:
            self._progress_at_ns = now_ns + SECOND_NS
            for served in self._volumes.served:
                if served.state is State.DRAINING:
                    dirty = served.volume.statistics()["dirty_blocks"]
                    event = "draining" if served.drains and not served.closing else "closing"
                    self._log.info(event, volume=served.name, dirty_bytes=dirty * 4096, connected=served.connected)
        return self._progress_at_ns
