"""From a configuration to an opened backend with its wrappers around it."""

from __future__ import annotations

from vhostcache.backend.base import Backend, Opened, Opener
from vhostcache.backend.file import LOCK_WAIT_S, FileBackend
from vhostcache.backend.nbd import NbdBackend
from vhostcache.backend.qsd import QsdBackend
from vhostcache.config import VolumeConfig
from vhostcache.config_backend import FileBackendConfig, NbdBackendConfig
from vhostcache.errors import EngineError, UsageError


def open_backend(
    volume: VolumeConfig, opener: Opener, lock_wait_s: float = LOCK_WAIT_S, locked: bool = True
) -> Backend:
    """ImageError: one line, and nothing is left open. Not `locked`: to look at, and to be closed again before anybody
    does I/O. May wait, and touches nothing of the engine: any thread may call it."""
    config = volume.backend
    if isinstance(config, FileBackendConfig):
        return FileBackend(config.path, volume.read_only, volume.cache_mode.direct, lock_wait_s, locked)
    if isinstance(config, NbdBackendConfig):
        return NbdBackend(config, opener, volume.read_only)
    return QsdBackend(
        config, opener, volume.read_only, volume.cache_mode.direct, volume.object_size, lock_wait_s, locked
    )


def stack_backend(volume: VolumeConfig, backend: Backend, opener: Opener) -> Opened:
    """What the engine serves the volume from: the backend, and what is wrapped around it, the outermost last.
    UsageError: the engine has let go of it."""
    top = backend.attach(opener)
    for number, wrap in enumerate(volume.backend.wrap):
        try:
            top = opener.wrap_backend(top, wrap.kind, wrap.wrapper.parameters())
        except EngineError as error:
            top.close()
            where = f"volume '{volume.name}', backend.wrap[{number}].{wrap.kind}"
            raise UsageError(where, error.found, error.expected, error.hint) from error
    return top
