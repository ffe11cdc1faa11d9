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
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from vhostcache.errors import UsageError, one_line, why
from vhostcache.modes import DEFAULT, MODES, Mode, resolve
from vhostcache.sockets import PATH_BYTES

SOCKET_PATH_BYTES: Final = PATH_BYTES
CONFIG_BYTES: Final = 1 << 20
CONFIG_NODES: Final = 100_000  # after aliases: a file of 1 MiB may stand for much more
VOLUMES: Final = 256  # each costs its ram, three descriptors, and a place in every status answer
SERIAL_BYTES: Final = 20

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
TIB: Final = 1 << 40

_UNITS: Final = {"": 1, "b": 1, "k": KIB, "m": MIB, "g": GIB, "t": TIB}
_SIZE: Final = re.compile(r"\s*(\d+)(?:\.(\d+))?\s*(?:([kmgt])(i?b)?|b)?\s*", re.IGNORECASE | re.ASCII)
_DURATION: Final = re.compile(r"\s*(\d+)(?:\.(\d+))?\s*(us|ms|s|min|h)?\s*", re.ASCII)
_DURATION_UNITS_NS: Final = {"us": 10**3, "ms": 10**6, "s": 10**9, "min": 60 * 10**9, "h": 3600 * 10**9}
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)


# Units.


def parse_size(text: str) -> int:
    """Bytes. "256MiB" = "256M" = 256 * 2**20, as in QEMU. ValueError says what is wrong."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError("not a size")
    whole, fraction, unit, suffix = match.groups()
    if suffix and suffix.lower() == "b":
        raise ValueError(f"'{unit}B' could mean 1000 or 1024: write '{unit.upper()}iB'")
    factor = _UNITS[(unit or "").lower()]
    size = int(whole) * factor
    if fraction:
        rest, remainder = divmod(int(fraction) * factor, 10 ** len(fraction))
        if remainder:
            raise ValueError("not a whole number of bytes")
        size += rest
    return size


def format_size(size_bytes: int) -> str:
    for unit, factor in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if size_bytes >= factor and size_bytes % factor == 0:
            return f"{size_bytes // factor}{unit}"
    return str(size_bytes)


def parse_duration(text: str) -> int:
    """Nanoseconds. A number alone is seconds."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError("not a duration")
    whole, fraction, unit = match.groups()
    factor = _DURATION_UNITS_NS[unit or "s"]
    return int(whole) * factor + (int(fraction) * factor // 10 ** len(fraction) if fraction else 0)


def _refuse(allowed: str, why: str = "") -> PydanticCustomError:
    return PydanticCustomError("not_allowed", "{why}{allowed}", {"allowed": allowed, "why": why})


@dataclass(frozen=True)
class Range:
    """What a number may be, and how that is said."""

    minimum: int
    maximum: int
    allowed: str
    multiple_of: int = 1
    power_of_two: bool = False

    def check(self, value: int) -> int:
        if not self.minimum <= value <= self.maximum or value % self.multiple_of:
            raise _refuse(self.allowed)
        if self.power_of_two and value & (value - 1):
            raise _refuse(self.allowed)
        return value


def _quantity(limits: Range, parse: Callable[[str], int]) -> Callable[[object], int]:
    def validate(value: object) -> int:
        if isinstance(value, str):
            try:
                value = parse(value)
            except ValueError as error:
                raise _refuse(limits.allowed, f"{error}; ") from None
        elif isinstance(value, float) and parse is parse_duration and value >= 0:
            value = parse(f"{value:.6f}")
        elif isinstance(value, int) and not isinstance(value, bool) and parse is parse_duration:
            value = value * 10**9
        if not isinstance(value, int) or isinstance(value, bool):
            raise _refuse(limits.allowed)
        return limits.check(value)

    return validate


def _no_text(text: str) -> int:
    raise ValueError("not a number")


_SIZE_SCHEMA: Final = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        {"type": "string", "pattern": r"^\s*[0-9]+(\.[0-9]+)?\s*([kKmMgGtT]([iI][bB])?|[bB])?\s*$"},
    ]
}
_DURATION_SCHEMA: Final = {
    "anyOf": [
        {"type": "number", "minimum": 0},
        {"type": "string", "pattern": r"^\s*[0-9]+(\.[0-9]+)?\s*(us|ms|s|min|h)?\s*$"},
    ]
}

RAM: Final = Range(8 * MIB, 8 * TIB, "a size from 8MiB, such as 256MiB or 4G, in steps of 4KiB", multiple_of=4096)
OBJECT: Final = Range(
    64 * KIB, 64 * MIB, "a power of two from 64KiB to 64MiB, such as 4MiB", multiple_of=4096, power_of_two=True
)
QUEUES: Final = Range(1, 64, "a number from 1 to 64")
DEPTH: Final = Range(1, 256, "a number from 1 to 256")
POLL: Final = Range(0, 10_000, "microseconds from 0 (never poll) to 10000")
DESTAGE_AFTER: Final = Range(10**6, 3600 * 10**9, "a duration from 1ms to 1h, such as 5s or 500ms")
CACHE: Final = Range(64 * MIB, 16 * TIB, "a size from 64MiB to 16TiB, such as 8GiB, in steps of 4KiB", multiple_of=4096)
SYNC_INTERVAL: Final = Range(10**6, 60 * 10**9, "a duration from 1ms to 1min, such as 1s")
FLUSH_WINDOW: Final = Range(0, 10**8, "a duration from 0 (do not wait) to 100ms, such as 200us")
CHECKPOINT_INTERVAL: Final = Range(10**9, 3600 * 10**9, "a duration from 1s to 1h, such as 60s")
IMAGE: Final = Range(512, 16 * TIB, "a multiple of 512 up to 16TiB, such as 4GiB", multiple_of=512)

RamBytes = Annotated[int, BeforeValidator(_quantity(RAM, parse_size)), WithJsonSchema(_SIZE_SCHEMA)]
ObjectBytes = Annotated[int, BeforeValidator(_quantity(OBJECT, parse_size)), WithJsonSchema(_SIZE_SCHEMA)]
CacheBytes = Annotated[int, BeforeValidator(_quantity(CACHE, parse_size)), WithJsonSchema(_SIZE_SCHEMA)]
DestageAfterNs = Annotated[
    int, BeforeValidator(_quantity(DESTAGE_AFTER, parse_duration)), WithJsonSchema(_DURATION_SCHEMA)
]
SyncIntervalNs = Annotated[
    int, BeforeValidator(_quantity(SYNC_INTERVAL, parse_duration)), WithJsonSchema(_DURATION_SCHEMA)
]
FlushWindowNs = Annotated[
    int, BeforeValidator(_quantity(FLUSH_WINDOW, parse_duration)), WithJsonSchema(_DURATION_SCHEMA)
]
CheckpointIntervalNs = Annotated[
    int, BeforeValidator(_quantity(CHECKPOINT_INTERVAL, parse_duration)), WithJsonSchema(_DURATION_SCHEMA)
]


def _count_schema(limits: Range) -> WithJsonSchema:
    return WithJsonSchema({"type": "integer", "minimum": limits.minimum, "maximum": limits.maximum})


Queues = Annotated[int, BeforeValidator(_quantity(QUEUES, _no_text)), _count_schema(QUEUES)]
Depth = Annotated[int, BeforeValidator(_quantity(DEPTH, _no_text)), _count_schema(DEPTH)]
PollUs = Annotated[int, BeforeValidator(_quantity(POLL, _no_text)), _count_schema(POLL)]


# Words and paths.


def _one_of(*allowed: str) -> Callable[[object], object]:
    def validate(value: object) -> object:
        if value not in allowed or not isinstance(value, str):
            guess = difflib.get_close_matches(str(value), allowed, 1)
            hint = f" (did you mean '{guess[0]}'?)" if guess else ""
            raise _refuse(", ".join(allowed) + hint)
        return value

    return validate


def _name(value: object) -> object:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise _refuse("1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit")
    return value


def _serial(value: object) -> object:
    fits = isinstance(value, str) and value.isascii() and value.isprintable() and 1 <= len(value) <= SERIAL_BYTES
    if not fits:
        raise _refuse(f"1 to {SERIAL_BYTES} printable ASCII characters")
    return value


def _path(value: object) -> object:
    if not isinstance(value, str) or not value or "\0" in value:
        raise _refuse("a path")
    return value


def _socket_path(value: object) -> object:
    if not isinstance(value, str) or not value or "\0" in value:
        raise _refuse("the path of a unix socket")
    size = len(os.fsencode(value))
    if size > SOCKET_PATH_BYTES:
        raise _refuse(
            f"a path of at most {SOCKET_PATH_BYTES} bytes (this one has {size}): use a shorter folder, such as /run"
        )
    return value


def _permissions(value: object) -> object:
    allowed = "octal permissions in quotes, such as '0600' or '0660'"
    if not isinstance(value, str) or not re.fullmatch(r"0?o?[0-7]{3,4}", value):
        raise _refuse(allowed)
    bits = int(value.lstrip("0o") or "0", 8)
    if bits & ~0o777 or not bits & 0o600 == 0o600:
        raise _refuse(allowed, "the owner must keep reading and writing; ")
    return bits


def _on_off(value: object) -> object:
    if not isinstance(value, bool):
        raise _refuse("on, off, true or false")
    return value


Name = Annotated[str, BeforeValidator(_name), WithJsonSchema({"type": "string", "pattern": f"^{_NAME.pattern}$"})]
Serial = Annotated[
    str, BeforeValidator(_serial), WithJsonSchema({"type": "string", "minLength": 1, "maxLength": SERIAL_BYTES})
]
FilePath = Annotated[str, BeforeValidator(_path), WithJsonSchema({"type": "string", "minLength": 1})]
SocketPath = Annotated[
    str,
    BeforeValidator(_socket_path),
    WithJsonSchema({"type": "string", "minLength": 1, "maxLength": SOCKET_PATH_BYTES}),
]
Permissions = Annotated[
    int, BeforeValidator(_permissions), WithJsonSchema({"type": "string", "pattern": "^0?o?[0-7]{3,4}$"})
]
OnOff = Annotated[bool, BeforeValidator(_on_off), WithJsonSchema({"type": "boolean"})]
ModeName = Annotated[str, BeforeValidator(_one_of(*MODES)), WithJsonSchema({"type": "string", "enum": list(MODES)})]


# The models.


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=False)


class CacheConfig(_Model):
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
    *("size", "sync_interval", "flush_window", "checkpoint_interval", "destage", "drain_on_exit", "ram_dir"),
)


class BackendConfig(_Model):
    """Where the data ends up."""

    type: Annotated[Literal["file"], BeforeValidator(_one_of("file")), Field(description="the kind of backend")] = (
        "file"
    )
    path: FilePath = Field(description="a raw image or a block device; relative to the configuration file")


class VolumeConfig(_Model):
    """One disk."""

    name: Name = Field(description="what events, status and statistics call the volume")
    socket: SocketPath = Field(description="the vhost-user socket to listen on; relative to the configuration file")
    socket_mode: Permissions = Field(0o600, description="permissions of the socket, in octal")
    backend: BackendConfig
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
        5 * 10**9, description="dirty data older than this is destaged without a flush; seconds, or '500ms', '5s'"
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
    def serial_text(self) -> str:
        return self.serial if self.serial is not None else self.name[:SERIAL_BYTES]


class Config(_Model):
    """One daemon."""

    volumes: list[VolumeConfig] = Field(min_length=1, max_length=VOLUMES)
    control: SocketPath | None = Field(None, description="control socket; none without this key")
    log_format: Annotated[Literal["console", "json"], BeforeValidator(_one_of("console", "json"))] = Field(
        "console", description="how events are written to standard error"
    )
    io_engine: Annotated[Literal["auto", "threads"], BeforeValidator(_one_of("auto", "threads"))] = Field(
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
        raise tree.error((), f"found {_found(value)}; allowed: a mapping with the key volumes")
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
        image = os.path.realpath(volume.backend.path)
        access = "reader" if volume.read_only else "writer"
        uses: list[tuple[str, str, _Place]] = [
            ("name", volume.name, (*here, "name")),
            ("socket", os.path.realpath(volume.socket), (*here, "socket")),
            (access, image, (*here, "backend", "path")),
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
        if "path" not in place and size > SOCKET_PATH_BYTES:
            raise at(
                place,
                f"found '{absolute}'; allowed: at most {SOCKET_PATH_BYTES} bytes (this one has {size}): "
                "use a shorter folder, such as /run",
            )
        return absolute

    volumes = []
    for index, volume in enumerate(config.volumes):
        path = fix(volume.backend.path, "volumes", index, "backend", "path")
        socket = fix(volume.socket, "volumes", index, "socket")
        backend = volume.backend.model_copy(update={"path": path})
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
                        raise self.error((*place, "<<"), f"found {_found(value)}; allowed: an alias of a mapping")
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

    def at(place: _Place, message: str) -> UsageError:
        return UsageError(options.get(place) or _spell(place), message)

    return _explain(error, Config, at)


def _explain(error: ValidationError, model: type[BaseModel], at: _Raise) -> UsageError:
    # A mistyped key explains the missing one.
    details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    first = _explain_one(tuple(details[0]["loc"]), details[0], model, at)
    return UsageError("", f"{first} (and {len(details) - 1} more)") if len(details) > 1 else first


def _explain_one(place: _Place, detail: Any, model: type[BaseModel], at: _Raise) -> UsageError:
    kind, found = detail["type"], _found(detail.get("input"))
    context = detail.get("ctx", {})
    if kind == "extra_forbidden":
        allowed = _keys_at(model, place[:-1])
        guess = difflib.get_close_matches(str(place[-1]), allowed, 1)
        hint = f" (did you mean '{guess[0]}'?)" if guess else ""
        return at(place, f"is not a key here; allowed: {', '.join(allowed)}{hint}")
    if kind == "missing":
        return at(place[:-1], f"the key '{place[-1]}' is missing")
    if kind == "not_allowed":
        return at(place, f"found {found}; {context['why']}allowed: {context['allowed']}")
    if kind == "ram_too_small":
        return at((*place, "ram"), detail["msg"])
    if kind == "read_only_cache":
        return at((*place, "cache", "path"), detail["msg"])
    if kind == "no_cache":
        return at((*place, context["key"]), "is of no use without a cache file; allowed: together with cache.path")
    if kind == "too_short":
        return at(place, "found an empty list; allowed: at least one volume")
    if kind == "too_long":
        return at(place, f"found {len(detail['input'])} volumes; allowed: at most {VOLUMES}")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return at(place, f"found {found}; allowed: a mapping with the keys {', '.join(_keys_at(model, place))}")
    if kind == "list_type":
        return at(place, f"found {found}; allowed: a list of volumes")
    return at(place, f"found {found}; {detail['msg'].lower()}")


def _keys_at(model: type[BaseModel], place: _Place) -> list[str]:
    current: type[BaseModel] = model
    for part in place:
        if isinstance(part, int):
            current = VolumeConfig
        elif part == "backend":
            current = BackendConfig
        elif part == "cache":
            current = CacheConfig
    return list(current.model_fields)


def _found(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    text = str(value)
    return f"'{text[:80]}…'" if len(text) > 80 else f"'{text}'"


def _spell(place: _Place) -> str:
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
