"""The configuration: one shape for `serve` (a YAML file) and `export` (options).

Owns the models, the units (sizes, durations) and the error messages: every one names the file, line, column and key,
what was found there and what is allowed. Unknown and duplicate keys are refused, so that a typing error never becomes
a default.

Never touches an image or a socket; those are opened by the daemon.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from vhostcache.config_backend import BACKENDS, WRAPPERS, BackendConfig, WrapConfig
from vhostcache.config_values import (
    DURATION_SCHEMA,
    GIB,
    KIB,
    MIB,
    SERIAL_BYTES,
    SIZE_SCHEMA,
    SOCKET_PATH_BYTES,
    TIB,
    FilePath,
    Model,
    ModeName,
    Name,
    OnOff,
    Permissions,
    Range,
    Serial,
    SocketPath,
    count_schema,
    format_size,
    found,
    no_text,
    one_of,
    parse_duration,
    parse_size,
    quantity,
)
from vhostcache.errors import UsageError, one_line, why
from vhostcache.modes import DEFAULT, Mode, resolve

__all__ = ["GIB", "KIB", "MIB", "TIB", "Config", "VolumeConfig", "format_size", "load", "parse_duration", "parse_size"]

CONFIG_BYTES: Final = 1 << 20
CONFIG_NODES: Final = 100_000  # after aliases: a file of 1 MiB may stand for much more
VOLUMES: Final = 256  # each costs its ram, three descriptors, and a place in every status answer

RAM: Final = Range(8 * MIB, 8 * TIB, "a size from 8MiB, such as 256MiB or 4G, in steps of 4KiB", multiple_of=4096)
OBJECT: Final = Range(
    64 * KIB, 64 * MIB, "a power of two from 64KiB to 64MiB, such as 4MiB", multiple_of=4096, power_of_two=True
)
QUEUES: Final = Range(1, 64, "a number from 1 to 64")
DEPTH: Final = Range(1, 256, "a number from 1 to 256")
POLL: Final = Range(0, 10_000, "microseconds from 0 (never poll) to 10000")
DESTAGE_AFTER: Final = Range(10**6, 3600 * 10**9, "a duration from 1ms to 1h, such as 5s or 500ms")
DESTAGE_THRESHOLD: Final = Range(0, 90, "a percentage from 0 to 90")
BATCHED: Final = Range(1, 64, "a number from 1 to 64")
CACHE: Final = Range(64 * MIB, 16 * TIB, "a size from 64MiB to 16TiB, such as 8GiB, in steps of 4KiB", multiple_of=4096)
SYNC_INTERVAL: Final = Range(10**6, 60 * 10**9, "a duration from 1ms to 1min, such as 1s")
FLUSH_WINDOW: Final = Range(0, 10**8, "a duration from 0 (do not wait) to 100ms, such as 200us")
HAND_OVER_TIMEOUT: Final = Range(10**9, 3600 * 10**9, "a duration from 1s to 1h, such as 30s")
CHECKPOINT_INTERVAL: Final = Range(10**9, 3600 * 10**9, "a duration from 1s to 1h, such as 60s")
FILL: Final = Range(
    4 * KIB, MIB, "a power of two from 4KiB to 1MiB, such as 64KiB", multiple_of=4096, power_of_two=True
)
READAHEAD: Final = Range(0, 64 * MIB, "a size up to 64MiB, such as 4MiB, or 0 for none", multiple_of=4096)
REMOTE_READAHEAD_BYTES: Final = 4 * MIB
REMOTE_FILL_BYTES: Final = 64 * KIB  # a remote backend takes as long for this as for 4 KiB
READ_CACHE: Final = Range(
    16 * MIB, 8 * TIB, "a size from 16MiB to 8TiB, such as 2GiB, in steps of 4KiB", multiple_of=4096
)
BACKEND_TIMEOUT: Final = Range(10**6, 24 * 3600 * 10**9, "a duration from 1ms to 24h, such as 30s")
IMAGE: Final = Range(512, 16 * TIB, "a multiple of 512 up to 16TiB, such as 4GiB", multiple_of=512)

RamBytes = Annotated[int, BeforeValidator(quantity(RAM, parse_size)), WithJsonSchema(SIZE_SCHEMA)]
ObjectBytes = Annotated[int, BeforeValidator(quantity(OBJECT, parse_size)), WithJsonSchema(SIZE_SCHEMA)]
CacheBytes = Annotated[int, BeforeValidator(quantity(CACHE, parse_size)), WithJsonSchema(SIZE_SCHEMA)]
ReadCacheBytes = Annotated[int, BeforeValidator(quantity(READ_CACHE, parse_size)), WithJsonSchema(SIZE_SCHEMA)]
ReadaheadBytes = Annotated[int, BeforeValidator(quantity(READAHEAD, parse_size)), WithJsonSchema(SIZE_SCHEMA)]
FillBytes = Annotated[int, BeforeValidator(quantity(FILL, parse_size)), WithJsonSchema(SIZE_SCHEMA)]
BackendTimeoutNs = Annotated[
    int, BeforeValidator(quantity(BACKEND_TIMEOUT, parse_duration)), WithJsonSchema(DURATION_SCHEMA)
]
DestageAfterNs = Annotated[
    int, BeforeValidator(quantity(DESTAGE_AFTER, parse_duration)), WithJsonSchema(DURATION_SCHEMA)
]
SyncIntervalNs = Annotated[
    int, BeforeValidator(quantity(SYNC_INTERVAL, parse_duration)), WithJsonSchema(DURATION_SCHEMA)
]
FlushWindowNs = Annotated[int, BeforeValidator(quantity(FLUSH_WINDOW, parse_duration)), WithJsonSchema(DURATION_SCHEMA)]
HandOverTimeoutNs = Annotated[
    int, BeforeValidator(quantity(HAND_OVER_TIMEOUT, parse_duration)), WithJsonSchema(DURATION_SCHEMA)
]
CheckpointIntervalNs = Annotated[
    int, BeforeValidator(quantity(CHECKPOINT_INTERVAL, parse_duration)), WithJsonSchema(DURATION_SCHEMA)
]


Queues = Annotated[int, BeforeValidator(quantity(QUEUES, no_text)), count_schema(QUEUES)]
Depth = Annotated[int, BeforeValidator(quantity(DEPTH, no_text)), count_schema(DEPTH)]
Threshold = Annotated[int, BeforeValidator(quantity(DESTAGE_THRESHOLD, no_text)), count_schema(DESTAGE_THRESHOLD)]
Policy = Annotated[Literal["merged", "ordered"], BeforeValidator(one_of("merged", "ordered"))]
Batched = Annotated[int, BeforeValidator(quantity(BATCHED, no_text)), count_schema(BATCHED)]
PollUs = Annotated[int, BeforeValidator(quantity(POLL, no_text)), count_schema(POLL)]


# The models.


class CacheConfig(Model):
    """The cache file, and the mode's parts (writeback, direct, no_flush: the names are QEMU's), each of which may be
    overridden.
    """

    path: FilePath | None = Field(
        None,
        description="the cache file or block device that holds the log, on local storage; relative to the "
        "configuration file; none: the cache is in RAM only",
    )
    size: CacheBytes | None = Field(
        None, description="its size when it is made; a block device, and one that exists, has its own"
    )
    read_cache: ReadCacheBytes | None = Field(
        None,
        description="keep what is read from the backend, over restarts, in so much more of the cache file, or in this "
        "part of a device; none: only RAM and the log answer reads; may be changed at any start",
    )
    sync_interval: SyncIntervalNs = Field(
        10**9, description="the longest that an acknowledged write stays volatile without a flush"
    )
    flush_window: FlushWindowNs = Field(0, description="how long a flush waits for others, to share one fdatasync")
    checkpoint_interval: CheckpointIntervalNs = Field(
        60 * 10**9, description="how often what has reached the image is recorded in the cache file"
    )
    destage: OnOff = Field(True, description="write to the image as usual; off: only when the log has no room left")
    drain_on_exit: OnOff = Field(
        False, description="at the end write everything to the image; off: it stays in the log"
    )
    ram_dir: FilePath | None = Field(
        None,
        description="the folder, on a tmpfs, of the files that hold the RAM tier; by default /dev/shm/vhostcache-UID",
    )
    writeback: OnOff | None = Field(None, description="acknowledge a write when it is in the cache")
    direct: OnOff | None = Field(None, description="open the backend with O_DIRECT")
    no_flush: OnOff | None = Field(None, description="answer flushes without performing them: unsafe")

    @model_validator(mode="after")
    def _has_a_path(self) -> Self:
        useless = [key for key in _NEED_A_CACHE if key in self.model_fields_set]
        if self.path is None and useless:
            raise PydanticCustomError("no_cache", "{key} is of no use without path", {"key": useless[0]})
        return self


_NEED_A_CACHE: Final = (
    *(
        "size",
        "read_cache",
        "sync_interval",
        "flush_window",
        "checkpoint_interval",
        "destage",
        "drain_on_exit",
        "ram_dir",
    ),
)


_NEED_A_LOG: Final = ("destage_threshold", "policy", "max_batched_objects")


class VolumeConfig(Model):
    """One disk."""

    name: Name = Field(description="what events, status and statistics call the volume")
    socket: SocketPath = Field(description="the vhost-user socket to listen on; relative to the configuration file")
    socket_mode: Permissions = Field(0o600, description="permissions of the socket, in octal")
    backend: BackendConfig = Field(description="where the data ends up")
    mode: ModeName = Field(DEFAULT, description="QEMU's cache mode")
    cache: CacheConfig = Field(
        default_factory=CacheConfig,  # type: ignore[arg-type]
        description="the cache file, and parts of the mode to override",
    )
    ram: RamBytes = Field(256 * MIB, description="bound of the RAM tier")
    object_size: ObjectBytes = Field(4 * MIB, description="unit of destaging; the guest is told to prefer it")
    num_queues: Queues = Field(64, description="the most queues a guest may use")
    read_only: OnOff = Field(False, description="serve a read-only disk")
    serial: Serial | None = Field(
        None, description="the disk's serial number; by default the name's first 20 characters"
    )
    write_depth: Depth = Field(16, description="the most destaging writes in flight on the backend at once")
    destage_after: DestageAfterNs = Field(
        5 * 10**9,
        description="dirty data older than this is destaged without a flush; with a cache file objects that have not "
        "been written for so long, or are dirty for twelve times that; seconds, or '500ms', '5s'",
    )
    destage_threshold: Threshold = Field(
        50, description="percent of the log: with more than this not yet on the backend, destaging does not wait"
    )
    policy: Policy = Field(
        "merged",
        description="merged: any object, in the order that merges best; ordered: one flush interval of the guest after "
        "the other, so that without the cache the image is a flushed state and some of the next writes",
    )
    max_batched_objects: Batched = Field(
        8, description="the most objects on their way to the backend at once; fewer where it gains nothing by more"
    )
    incoming: OnOff = Field(
        False,
        description="another daemon may have the image: take it, and the cache, when a guest starts to use the disk",
    )
    hand_over_timeout: HandOverTimeoutNs = Field(
        30 * 10**9,
        description="in a live migration, how long the source may keep its QEMU waiting while it drains, and how long "
        "the destination tries to take the image before it cuts off its QEMU",
    )

    fill_size: FillBytes | None = Field(
        None,
        description="what is read from the backend at once, aligned, for a read that only it can answer; by default as "
        "much as is asked for of a file, and 64KiB of a remote backend",
    )
    readahead: ReadaheadBytes | None = Field(
        None,
        description="the most that is read ahead of a sequential stream; by default nothing of a file, whose host does "
        "that, and 4MiB of a remote backend",
    )
    backend_timeout: BackendTimeoutNs | None = Field(
        None,
        description="a read that only the backend can answer fails when it has waited for so long; by default it waits "
        "until it is answered",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        # Destaging one object while another fills, reads that bypass the cache, and room for new writes.
        if self.ram < 4 * self.object_size:
            raise PydanticCustomError(
                "ram_too_small",
                "ram {ram} is too small for objects of {object}; allowed: at least {least}, or a smaller object_size",
                {
                    "ram": format_size(self.ram),
                    "object": format_size(self.object_size),
                    "least": format_size(4 * self.object_size),
                },
            )
        useless = [key for key in _NEED_A_LOG if key in self.model_fields_set]
        if self.cache.path is None and useless:
            raise PydanticCustomError("no_cache", "{key} is of no use without cache.path", {"key": useless[0]})
        if self.read_only and self.cache.path is not None:
            raise PydanticCustomError(
                "read_only_cache", "a read_only disk has no use for a cache file; leave cache.path out", {}
            )
        return self

    @property
    def cache_mode(self) -> Mode:
        """Of the guest's cache: QEMU's word for it."""
        return resolve(self.mode, self.cache.writeback, self.cache.direct, self.cache.no_flush)

    @property
    def fill_bytes(self) -> int:
        """The unit of fills."""
        if self.fill_size is not None:
            return self.fill_size
        return 4 * KIB if self.backend.type == "file" else REMOTE_FILL_BYTES

    @property
    def readahead_bytes(self) -> int:
        """The largest window of readahead."""
        if self.readahead is not None:
            return self.readahead
        return 0 if self.backend.type == "file" else REMOTE_READAHEAD_BYTES

    @property
    def serial_text(self) -> str:
        return self.serial if self.serial is not None else self.name[:SERIAL_BYTES]


class Config(Model):
    """One daemon."""

    volumes: list[VolumeConfig] = Field(min_length=1, max_length=VOLUMES)
    control: SocketPath | None = Field(None, description="control socket; none without this key")
    log_format: Annotated[Literal["console", "json"], BeforeValidator(one_of("console", "json"))] = Field(
        "console", description="how events are written to standard error"
    )
    io_engine: Annotated[Literal["auto", "threads"], BeforeValidator(one_of("auto", "threads"))] = Field(
        "auto", description="auto: io_uring, and a pool of threads where it is forbidden; threads: the pool always"
    )
    poll_max_us: PollUs = Field(50, description="upper bound of adaptive polling; 0: never poll")


def json_schema() -> dict[str, Any]:
    schema = Config.model_json_schema(mode="validation")
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "vhostcache configuration"
    return schema


# Reading a file.


def load(path: str) -> Config:
    """The configuration in a YAML file. UsageError names the place and what is allowed there."""
    try:
        with open(path, "rb") as file:
            data = file.read(CONFIG_BYTES + 1)
    except OSError as error:
        raise UsageError(f"configuration '{path}'", why(error), "a readable YAML file") from error
    if len(data) > CONFIG_BYTES:
        raise UsageError(f"configuration '{path}'", "is larger than 1MiB", "a YAML file that a person could write")
    tree = _Tree(path)
    value = tree.build(data)
    if not isinstance(value, dict):
        raise tree.error((), f"found {found(value)}; allowed: a mapping with the key volumes")
    try:
        config = Config.model_validate(value)
    except ValidationError as error:
        raise _explain(error, Config, tree.error) from None
    config = _relative_to(config, Path(path).absolute().parent, tree.error)
    refuse_duplicates(config, tree.error)
    return config


def refuse_duplicates(config: Config, at: _Raise) -> None:
    """Raise what `at` makes of the second of two volumes that share what they cannot share."""
    taken: dict[tuple[str, str], _Place] = {}
    if config.control is not None:
        taken["socket", os.path.realpath(config.control)] = ("control",)
    for index, volume in enumerate(config.volumes):
        here: _Place = ("volumes", index)
        access = "reader" if volume.read_only else "writer"
        uses: list[tuple[str, str, _Place]] = [
            ("name", volume.name, (*here, "name")),
            ("socket", os.path.realpath(volume.socket), (*here, "socket")),
            (access, volume.backend.resource, (*here, "backend", volume.backend.main_key)),
        ]
        if volume.cache.path is not None:
            uses.append(("cache", os.path.realpath(volume.cache.path), (*here, "cache", "path")))
        for kind, value, place in uses:
            # Readers share an image with readers, a writer with nobody; a cache file is nothing else.
            conflicts = {
                "reader": ["writer", "cache"],
                "writer": ["writer", "reader", "cache"],
                "cache": ["cache", "writer", "reader"],
            }.get(kind, [kind])
            for conflict in conflicts:
                if (conflict, value) in taken:
                    other = _spell(taken[conflict, value])
                    raise at(place, f"found '{one_line(value)}', which is that of {other} too; allowed: one of each")
            taken.setdefault((kind, value), place)


def _relative_to(config: Config, folder: Path, at: _Raise) -> Config:
    """Paths in a file are relative to it: the daemon may be started from anywhere."""

    def fix(path: str, *place: str | int) -> str:
        absolute = str(folder / path)
        size = len(os.fsencode(absolute))
        if size > SOCKET_PATH_BYTES:
            raise at(
                place,
                f"found '{absolute}'; allowed: at most {SOCKET_PATH_BYTES} bytes (this one has {size}): "
                "use a shorter folder, such as /run",
            )
        return absolute

    volumes = []
    for index, volume in enumerate(config.volumes):
        socket = fix(volume.socket, "volumes", index, "socket")
        backend = volume.backend.relative_to(str(folder))
        cache = volume.cache.model_copy(
            update={
                key: str(folder / value)
                for key in ("path", "ram_dir")
                if (value := getattr(volume.cache, key)) is not None
            }
        )
        volumes.append(volume.model_copy(update={"socket": socket, "backend": backend, "cache": cache}))
    control = fix(config.control, "control") if config.control is not None else None
    return config.model_copy(update={"volumes": volumes, "control": control})


_Place = tuple[str | int, ...]
_Raise = Callable[[_Place, str], UsageError]


class _Tree:
    """A YAML document as plain values, and where each of them stands in the file."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._marks: dict[_Place, yaml.Mark] = {}
        self._nodes = 0
        self._scalars = yaml.constructor.SafeConstructor()

    def build(self, data: bytes) -> object:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = data[: error.start].count(b"\n") + 1
            raise UsageError(f"{self._path}:{line}", "is not UTF-8 text", "a YAML file") from None
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = f"{self._path}:{mark.line + 1}:{mark.column + 1}" if mark else self._path
            raise UsageError(place, f"is not YAML: {error.problem or error.context}") from None
        except yaml.YAMLError as error:
            raise UsageError(self._path, f"is not YAML: {error}") from None
        except RecursionError:
            raise UsageError(self._path, "is nested too deeply") from None
        if node is None:
            raise UsageError(self._path, "is empty", "a mapping with the key volumes")
        return self._value(node, (), ())

    def error(self, place: _Place, message: str) -> UsageError:
        """At the place, or at the nearest one around it that stands in the file."""
        at = place
        while at not in self._marks and at:
            at = at[:-1]
        mark = self._marks.get(at)
        where = f"{self._path}:{mark.line + 1}:{mark.column + 1}" if mark else self._path
        key = _spell(place)
        return UsageError(where, f"{key}: {message}" if key else message)

    def _value(self, node: yaml.Node, place: _Place, around: tuple[yaml.Node, ...]) -> object:
        self._nodes += 1
        self._marks.setdefault(place, node.start_mark)
        if node in around or len(around) > 50 or self._nodes > CONFIG_NODES:
            raise self.error(place, "is nested too deeply, or stands for too much")
        around = (*around, node)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, place, around)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(child, (*place, index), around) for index, child in enumerate(node.value)]
        if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.endswith((":binary", ":timestamp")):
            return node.value
        try:
            return self._scalars.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            raise self.error(place, f"found '{node.value}', which is not a value: {one_line(str(error))}") from None

    def _mapping(self, node: yaml.MappingNode, place: _Place, around: tuple[yaml.Node, ...]) -> dict[str, object]:
        own: dict[str, object] = {}
        merged: dict[str, object] = {}
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                sources = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                for source in sources:
                    value = self._value(source, (*place, "<<"), around)
                    if not isinstance(value, dict):
                        raise self.error((*place, "<<"), f"found {found(value)}; allowed: an alias of a mapping")
                    for key, item in value.items():
                        merged.setdefault(key, item)
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                self._marks[*place, "?"] = key_node.start_mark
                raise self.error((*place, "?"), "found a list or mapping as a key; allowed: a word")
            key = key_node.value
            if key in own:
                first = self._marks[*place, key]
                self._marks[*place, key] = key_node.start_mark
                raise self.error((*place, key), f"found twice (first in line {first.line + 1}); allowed: once")
            own[key] = self._value(value_node, (*place, key), around)
            self._marks[*place, key] = key_node.start_mark
        return {**merged, **own}


def explain_options(error: ValidationError, options: dict[_Place, str]) -> UsageError:
    """The same explanation where the values came from options: places become their names."""
    names = {str(place[-1]): option for place, option in options.items()} | {"cache.path": "--cache"}
    spelled = "|".join(re.escape(key) for key in names if not key.isalpha())

    def at(place: _Place, message: str) -> UsageError:
        message = re.sub(rf"\b({spelled})\b", lambda match: names[match[0]], message)
        return UsageError(options.get(place) or _spell(place), message)

    return _explain(error, Config, at)


def _explain(error: ValidationError, model: type[BaseModel], at: _Raise) -> UsageError:
    # A mistyped key explains the missing one.
    details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    first = _explain_one(tuple(details[0]["loc"]), details[0], model, at)
    return UsageError("", f"{first} (and {len(details) - 1} more)") if len(details) > 1 else first


def _explain_one(place: _Place, detail: Any, model: type[BaseModel], at: _Raise) -> UsageError:
    kind, value = detail["type"], found(detail.get("input"))
    context = detail.get("ctx", {})
    allowed = _keys_at(model, place)
    inner = place  # as the models are nested: with the kind of backend, which no file has
    if "backend" in place[:-1] and place[place.index("backend") + 1] in BACKENDS:
        at_kind = place.index("backend") + 1
        place = (*place[:at_kind], *place[at_kind + 1 :])
    if kind == "extra_forbidden":
        allowed = _keys_at(model, inner[:-1])
        guess = difflib.get_close_matches(str(place[-1]), allowed, 1)
        hint = f" (did you mean '{guess[0]}'?)" if guess else ""
        return at(place, f"is not a key here; allowed: {', '.join(allowed)}{hint}")
    if kind == "missing":
        return at(place[:-1], f"the key '{place[-1]}' is missing")
    if kind == "not_allowed":
        return at(place, f"found {value}; {context['why']}allowed: {context['allowed']}")
    if kind == "ram_too_small":
        return at((*place, "ram"), detail["msg"])
    if kind == "read_only_cache":
        return at((*place, "cache", "path"), detail["msg"])
    if kind == "no_cache":
        return at((*place, context["key"]), "is of no use without a cache file; allowed: together with cache.path")
    if kind == "needless":
        return at((*place, context["key"]), detail["msg"])
    if kind == "union_tag_invalid":
        guess = difflib.get_close_matches(context["tag"], _KINDS, 1)
        hint = f" (did you mean '{guess[0]}'?)" if guess else ""
        return at((*place, "type"), f"found '{context['tag']}'; allowed: {', '.join(_KINDS)}{hint}")
    if kind == "union_tag_not_found" and isinstance(detail.get("input"), dict):
        return at((*place, "type"), f"found {found(detail['input'].get('type'))}; allowed: {', '.join(_KINDS)}")
    if kind == "too_short":
        return at(place, "found an empty list; allowed: at least one volume")
    if kind == "too_long":
        what = "volumes" if place == ("volumes",) else "entries"
        return at(place, f"found {context['actual_length']} {what}; allowed: at most {context['max_length']}")
    if kind in ("model_type", "model_attributes_type", "dict_type", "union_tag_not_found"):
        return at(place, f"found {value}; allowed: a mapping with the keys {', '.join(allowed)}")
    if kind == "list_type":
        return at(place, f"found {value}; allowed: a list{' of volumes' if place == ('volumes',) else ''}")
    return at(place, f"found {value}; {detail['msg'].lower()}")


_KINDS: Final = [str(kind) for kind in BACKENDS]
_INNER: Final[dict[str | int, type[BaseModel]]] = {
    "volumes": VolumeConfig,
    "backend": BACKENDS["file"],
    "cache": CacheConfig,
    "wrap": WrapConfig,
    **WRAPPERS,
}


def _keys_at(model: type[BaseModel], place: _Place) -> list[str]:
    current: type[BaseModel] = model
    for before, part in zip((None, *place), place, strict=False):
        is_kind = before == "backend" and part in BACKENDS
        current = BACKENDS[str(part)] if is_kind else _INNER.get(part, current)
    return sorted(current.model_fields, key=lambda key: key == "wrap")


def _spell(place: _Place) -> str:
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
