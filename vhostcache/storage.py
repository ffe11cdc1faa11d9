"""What hand-over does with one volume's storage: image, cache and locks are let go of, and taken, while it is served.

Invariant: all of it or nothing. What cannot be had leaves everything as it was, and is tried again by handover.py,
which decides when. What may wait is opened in a thread (taking.py), and is the engine's only after that.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from vhostcache.assembly import CacheClaim, Tell
from vhostcache.backend.base import Backend
from vhostcache.backend.opening import stack_backend
from vhostcache.composition import Composition
from vhostcache.config import VolumeConfig
from vhostcache.ending import Ending
from vhostcache.engine import Engine
from vhostcache.errors import Error, ImageError, why
from vhostcache.events import EventLog
from vhostcache.handover import RETRY_NS, Away
from vhostcache.log_volume import LogVolume
from vhostcache.served import Served
from vhostcache.taking import Taking, Takings
from vhostcache.volumes import Volumes


class VolumeStorage:
    """Of the volume of that number; a `handover.Storage`. `watch` is given each backend that comes."""

    def __init__(
        self,
        index: int,
        volumes: Volumes,
        engine: Engine,
        log: EventLog,
        composition: Callable[[], Composition],
        ending: Ending,
        watch: Callable[[int, Backend], None],
        takings: Takings,
    ) -> None:
        self._index = index
        self._volumes = volumes
        self._engine = engine
        self._log = log
        self._composition = composition
        self._ending = ending
        self._watch = watch
        self._takings = takings
        self._taking: Taking[tuple[Backend, CacheClaim | None]] | None = None
        self._told: deque[tuple[str, str, dict[str, Any]]] = deque()  # by its thread
        self._reason = ""
        self._again_at_ns = 0

    @property
    def _served(self) -> Served:
        return self._volumes.served[self._index]

    @property
    def can_be_locked(self) -> bool:
        return self._served.backend.can_be_locked

    def tell(self, level: str, event: str, **fields: Any) -> None:
        getattr(self._log, level)(event, volume=self._served.name, **fields)

    def hurry(self, on: bool) -> None:
        if not isinstance(self._served.volume, Away):
            self._served.volume.hurry(on)
            self._volumes.wake(self._index)

    def drain(self, on: bool) -> None:
        volume = self._served.volume
        assert not isinstance(volume, Away)
        volume.drain(on, then_cold=on)
        self._volumes.wake(self._index)

    def drained(self) -> bool:
        served = self._served
        # What is lost in the log would seem to be there, and old, on the other side.
        return served.volume.drained and served.growth is None and not served.growing and not self.lost_bytes()

    def dirty_bytes(self) -> int:
        return self._served.volume.statistics()["dirty_blocks"] * 4096

    def lost_bytes(self) -> int:
        return self._served.volume.statistics().get("lost_blocks", 0) * 4096

    def close(self) -> None:
        self._engine.hold_volume(self._index, True)
        self._served.backend.retire()
        self._volumes.rare = True  # it may want to be looked at

    def closed(self) -> bool:
        served, volume = self._served, self._served.volume
        if not served.backend.is_retired:
            return False
        if not served.closing:
            self._ending.close_log(self._index, cold=True)
        return volume.idle and (not isinstance(volume, LogVolume) or volume.closed)

    def stopped(self) -> None:
        self._engine.volume_stopped(self._index)

    def give_up(self) -> bool:
        return self._engine.give_up_volume(self._index)

    def cut_off(self) -> None:
        self._engine.disconnect_volume(self._index)

    def let_go(self) -> None:
        """Another daemon may have the image."""
        served = self._served
        self._engine.detach_volume(self._index)
        self._engine.hold_volume(self._index, False)
        assert served.top is not None
        served.top.close()
        served.top = None
        if served.config.cache_mode.no_flush and served.claim is None:
            served.backend.settle()  # no flush has said that it is there
        try:
            if served.claim is not None:
                served.claim.close()
        except (Error, OSError) as error:
            # The image's mark keeps the other daemon from it.
            self._log.error("hand-over-failed", volume=served.name, error=str(error), hint="vhostcache drain")
        finally:
            served.backend.close()
        served.claim = None
        served.closing = False
        served.volume = Away(served.volume.size_bytes)
        self._volumes.exchanged(self._index)

    def take(self) -> str | None:
        now_ns = time.monotonic_ns()
        taking = self._taking
        if taking is None and now_ns < self._again_at_ns:
            return self._reason
        if taking is None:
            self._taking = self._begin_taking()
            return None
        ended = taking.ended
        while self._told:
            level, event, fields = self._told.popleft()
            self.tell(level, event, **fields)
        if not ended:
            return None
        self._taking = None
        try:
            self._serve(*taking.result())
        except Error as error:
            self._reason = str(error)
        except OSError as error:  # no more descriptors, for one; the other volumes are not to hear of it
            self._reason = f"the storage cannot be opened: {why(error)}"
        else:
            taking.keep()
            return ""
        taking.abandon()
        self._again_at_ns = now_ns + RETRY_NS
        return self._reason

    def stop_taking(self) -> None:
        if self._taking is not None:
            self._taking.abandon()
        self._taking = None

    def _begin_taking(self) -> Taking[tuple[Backend, CacheClaim | None]]:
        served = self._served
        told = self._told = deque()
        open_it = partial(
            _open, self._composition(), served.config, served.volume.size_bytes, lambda *words: told.append(words)
        )
        return self._takings.begin(open_it)

    def _serve(self, backend: Backend, claim: CacheClaim | None) -> None:
        """What has been opened. Error: it cannot be served."""
        served, composition = self._served, self._composition()
        size_bytes, told_bytes = backend.facts.size_bytes, served.volume.size_bytes
        with contextlib.ExitStack() as stack:
            top = stack_backend(served.config, backend, self._engine)
            stack.callback(top.close)
            new = composition.serve(served.config, backend, served.listener, claim, self._index, top)
            stack.pop_all()
        if claim is not None:
            claim.served = True
        served.backend, served.top, served.claim, served.volume = backend, top, claim, new.volume
        self._watch(self._index, backend)
        served.write_cache = served.write_cache and new.write_cache
        served.write_cache_unknown, served.told = new.write_cache_unknown, None
        served.came_over = True
        self._engine.set_write_cache(self._index, served.write_cache)
        self._volumes.exchanged(self._index)
        if size_bytes > told_bytes:
            self._engine.grow_volume(self._index, size_bytes)
        if served.connected:
            served.volume.connected()
        served.tell_write_cache()
        self._volumes.wake(self._index)


def _open(
    composition: Composition, config: VolumeConfig, told_bytes: int, tell: Tell, stack: contextlib.ExitStack
) -> tuple[Backend, CacheClaim | None]:
    """Image, cache and locks. Not in the loop: nothing here is the engine's. Error: it cannot be had now, and nothing
    has been changed."""
    backend = composition.open_backend(config, stack, waits=False)
    size_bytes = backend.facts.size_bytes
    if size_bytes < told_bytes:
        raise ImageError(
            backend.identity, f"is {size_bytes} bytes large", f"{told_bytes}, as the front-end has been told"
        )
    claim = composition.claim(config, backend, stack, waits=False, tell=tell)
    if claim is not None:
        claim.open()
    return backend, claim
