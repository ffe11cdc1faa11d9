"""What of a volume may be changed while it is served, and how that is asked for.

Owns the list of these settings. Their values are validated by the models that the configuration file is validated by,
so they mean the same and are refused with the same words. A change lasts as long as the daemon does: the next start
reads the file. It touches no volume: the daemon hands it the result.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from vhostcache.config import (
    Batched,
    CheckpointIntervalNs,
    DestageAfterNs,
    SyncIntervalNs,
    Threshold,
    VolumeConfig,
)
from vhostcache.config_values import OnOff, found
from vhostcache.errors import UsageError

_VOLUME: Final[dict[str, Any]] = {
    "destage_after": DestageAfterNs,
    "destage_threshold": Threshold,
    "max_batched_objects": Batched,
}
_CACHE: Final[dict[str, Any]] = {
    "destage": OnOff,
    "sync_interval": SyncIntervalNs,
    "checkpoint_interval": CheckpointIntervalNs,
}
NAMES: Final = (*_VOLUME, *_CACHE)
DURATIONS: Final = ("destage_after", "sync_interval", "checkpoint_interval")


def changed(config: VolumeConfig, values: Mapping[str, object]) -> tuple[VolumeConfig, dict[str, int | bool]]:
    """The configuration with these values, and the values as the core takes them: durations in nanoseconds.
    UsageError: nothing is to be changed."""
    subject = f"volume '{config.name}'"
    if not values:
        raise UsageError(subject, "nothing is to be set", ", ".join(f"{name}=VALUE" for name in NAMES))
    known: dict[str, int | bool] = {}
    for name, value in values.items():
        kind = _VOLUME.get(name) or _CACHE.get(name)
        if kind is None:
            guess = difflib.get_close_matches(name, NAMES, 1)
            hint = f" (did you mean '{guess[0]}'?)" if guess else ""
            raise UsageError(subject, f"'{name[:40]}' cannot be set; allowed: {', '.join(NAMES)}{hint}")
        if config.cache.path is None and name != "destage_after":
            raise UsageError(subject, f"{name} is of no use without a cache file")
        try:
            known[name] = TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            context = error.errors()[0].get("ctx", {})
            allowed = f"{context.get('why', '')}allowed: {context.get('allowed', 'another kind of value')}"
            raise UsageError(subject, f"{name}: found {found(value)}; {allowed}") from None
    cache = config.cache.model_copy(update={name: value for name, value in known.items() if name in _CACHE})
    volume = {name: value for name, value in known.items() if name in _VOLUME}
    return config.model_copy(update={**volume, "cache": cache}), known


def current(config: VolumeConfig) -> dict[str, int | float | bool]:
    """As they are, for people and programs: durations in seconds."""
    names = NAMES if config.cache.path is not None else ("destage_after",)
    values = {name: getattr(config if name in _VOLUME else config.cache, name) for name in names}
    return {name: value / 10**9 if name in DURATIONS else value for name, value in values.items()}
