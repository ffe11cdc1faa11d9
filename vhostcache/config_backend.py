"""What a volume's `backend` may be in a configuration: file, nbd or qsd, and what is wrapped around it.

Owns the models, and how a backend is told from another without opening it: `label` for people, `resource` for what two
volumes cannot share. Relative paths are made absolute by `relative_to`; within `blockdev` they stay as they are, and
qemu-storage-daemon is started in `folder`.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, Self
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit, urlunsplit

from pydantic import BeforeValidator, Discriminator, Field, PrivateAttr, Tag, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from vhostcache.config_values import (
    DURATION_SCHEMA,
    SIZE_SCHEMA,
    TIB,
    FilePath,
    Model,
    OnOff,
    Range,
    count_schema,
    no_text,
    parse_duration,
    parse_size,
    quantity,
    refuse,
)

URI_SCHEMES: Final = ("nbd", "nbds", "nbd+unix", "nbds+unix")
NBD_PORT: Final = 10809

CONNECTIONS: Final = Range(1, 16, "a number from 1 to 16")
PAUSE: Final = Range(0, 3600 * 10**9, "a duration from 0 to 1h, such as 2ms")
COUNT: Final = Range(0, 1 << 30, "a number from 0")
ATTEMPTS: Final = Range(1, 1000, "a number from 1 to 1000")
ORDINAL: Final = Range(1, 1 << 30, "a number from 1")
PLACE: Final = Range(0, 16 * TIB, "a place on the disk, such as 0 or 4MiB")
BYTE_COUNT: Final = Range(1, 16 * TIB, "a size, such as 64KiB or 100MiB")

Connections = Annotated[int, BeforeValidator(quantity(CONNECTIONS, no_text)), count_schema(CONNECTIONS)]
PauseNs = Annotated[int, BeforeValidator(quantity(PAUSE, parse_duration)), WithJsonSchema(DURATION_SCHEMA)]
Count = Annotated[int, BeforeValidator(quantity(COUNT, no_text)), count_schema(COUNT)]
Attempts = Annotated[int, BeforeValidator(quantity(ATTEMPTS, no_text)), count_schema(ATTEMPTS)]
Ordinal = Annotated[int, BeforeValidator(quantity(ORDINAL, no_text)), count_schema(ORDINAL)]
Place = Annotated[int, BeforeValidator(quantity(PLACE, parse_size)), WithJsonSchema(SIZE_SCHEMA)]
ByteCount = Annotated[int, BeforeValidator(quantity(BYTE_COUNT, parse_size)), WithJsonSchema(SIZE_SCHEMA)]

# Wrappers. What the C side is given is `parameters`: every field by its name, durations in ns, switches as 0 and 1.

_KINDS: Final = ("read", "write", "flush", "zero")
_REPEATABLE: Final = ("read", "write", "zero")


def _kinds(*allowed: str) -> Callable[[object], object]:
    def validate(value: object) -> object:
        words = value if isinstance(value, list) else [value]
        if not words or len(set(map(str, words))) != len(words) or any(word not in allowed for word in words):
            raise refuse(f"{', '.join(allowed)}, or a list of them")
        return tuple(words)

    return validate


def _kinds_schema(*allowed: str) -> WithJsonSchema:
    one = {"type": "string", "enum": list(allowed)}
    return WithJsonSchema({"anyOf": [one, {"type": "array", "items": one, "minItems": 1, "uniqueItems": True}]})


def _error(value: object) -> object:
    if not isinstance(value, str) or value not in errno.errorcode.values():
        raise refuse("the name of an error, such as EIO, ENOSPC or ETIMEDOUT")
    return value


def _chance(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise refuse("a number from 0 to 1, such as 0.01")
    return float(value)


Kinds = Annotated[tuple[str, ...], BeforeValidator(_kinds(*_KINDS)), _kinds_schema(*_KINDS)]
RepeatableKinds = Annotated[tuple[str, ...], BeforeValidator(_kinds(*_REPEATABLE)), _kinds_schema(*_REPEATABLE)]
ErrorName = Annotated[str, BeforeValidator(_error), WithJsonSchema({"type": "string", "pattern": "^E[A-Z0-9]+$"})]
Chance = Annotated[float, BeforeValidator(_chance), WithJsonSchema({"type": "number", "minimum": 0, "maximum": 1})]


class Wrapper(Model):
    """Stands between the cache and the backend."""

    def parameters(self) -> str:
        """ "key=value ..." for the engine; a space or backslash in a value has a backslash before it."""
        values = {key: value for key, value in self.model_dump().items() if value is not None}
        return " ".join(f"{key}={_spelled(value)}" for key, value in values.items())


def _spelled(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return f"{value:.12f}".rstrip("0").rstrip(".")
    return str(value).replace("\\", "\\\\").replace(" ", "\\ ")


class DelayConfig(Wrapper):
    """Every operation takes longer."""

    read: PauseNs = Field(0, description="added to each read")
    write: PauseNs = Field(0, description="added to each write")
    flush: PauseNs = Field(0, description="added to each flush")
    zero: PauseNs = Field(0, description="added to each discard and write of zeroes")
    jitter: PauseNs = Field(0, description="added to all of them, by chance, between nothing and this")
    seed: Count = Field(0, description="of the chance")
    rate: ByteCount | None = Field(
        None, description="bytes a second that go through, reads and writes together; none: any"
    )


class FaultConfig(Wrapper):
    """Some operations fail, for tests: those that everything below applies to."""

    kind: Kinds = Field(_KINDS, description="read, write, flush, zero, or a list of them; by default all")
    errno: ErrorName = Field("EIO", description="what they fail with")
    nth: Ordinal | None = Field(None, description="only the first, second, ... of those that are meant")
    probability: Chance | None = Field(None, description="the chance of each to fail, from 0 to 1")
    seed: Count = Field(0, description="of the chance, and of where a write is torn")
    offset: Place | None = Field(None, description="only what touches the part of the disk that begins here")
    size: ByteCount | None = Field(None, description="and is this long; without it, to the end")
    after: PauseNs = Field(0, description="not before so long after the start")
    during: PauseNs | None = Field(None, description="for so long; by default for ever")
    while_exists: FilePath | None = Field(
        None, description="only while this file is there; relative to the configuration file"
    )
    torn: OnOff = Field(False, description="a part of it, between nothing and all but the last piece, is written first")
    hang: OnOff = Field(False, description="nothing is heard of it until its time is over, or the volume stops")

    @model_validator(mode="after")
    def _is_one_of_them(self) -> Self:
        if self.torn and self.hang:
            raise PydanticCustomError("needless", "found beside torn; allowed: one of the two", {"key": "hang"})
        return self


class TraceConfig(Wrapper):
    """Every operation is written down."""

    file: FilePath = Field(description="one line an operation is appended to it; relative to the configuration file")


class RetryConfig(Wrapper):
    """What fails for a reason that passes is tried again before the cache hears of it. Flushes never are: what was
    written before one that failed may be lost.
    """

    kind: RepeatableKinds = Field(_REPEATABLE, description="read, write, zero, or a list of them; by default all three")
    attempts: Attempts = Field(10, description="how often in all")
    first: PauseNs = Field(100 * 10**6, description="the pause before the second attempt; it doubles each time")
    max: PauseNs = Field(5 * 10**9, description="the longest pause")


class WrapConfig(Model):
    """One wrapper."""

    delay: DelayConfig | None = Field(None, description="every operation takes longer")
    fault: FaultConfig | None = Field(None, description="some operations fail, for tests")
    trace: TraceConfig | None = Field(None, description="every operation is written down")
    retry: RetryConfig | None = Field(None, description="what fails is tried again")

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if len(self.model_fields_set) != 1:
            raise refuse("one of delay, fault, trace, retry in each entry of the list")
        return self

    @property
    def kind(self) -> str:
        return next(iter(self.model_fields_set))

    @property
    def wrapper(self) -> Wrapper:
        found = getattr(self, self.kind)
        assert isinstance(found, Wrapper)
        return found

    def relative_to(self, folder: str) -> Self:
        paths = {
            key: os.path.join(folder, path)
            for key in ("file", "while_exists")
            if (path := getattr(self.wrapper, key, None))
        }
        return self.model_copy(update={self.kind: self.wrapper.model_copy(update=paths)})


# Backends.

_WRAP: Final = "what stands between the cache and the backend, the outermost last"


class _Backend(Model):
    wrap: list[WrapConfig] = Field(default_factory=list, max_length=8, description=_WRAP)

    def relative_to(self, folder: str) -> Self:
        """With paths that hold wherever the daemon is started."""
        return self.model_copy(update={"wrap": [wrap.relative_to(folder) for wrap in self.wrap]})


class FileBackendConfig(_Backend):
    """A raw image or a block device of this host."""

    type: Annotated[Literal["file"], Field(description="the kind of backend")] = "file"
    path: FilePath = Field(description="a raw image or a block device; relative to the configuration file")

    main_key: ClassVar[str] = "path"

    @property
    def label(self) -> str:
        return self.path

    @property
    def resource(self) -> str:
        return os.path.realpath(self.path)

    def relative_to(self, folder: str) -> Self:
        return super().relative_to(folder).model_copy(update={"path": os.path.join(folder, self.path)})


def _uri(value: object) -> object:
    allowed = "an NBD URI, such as nbd://host/export, nbds://host/export or nbd+unix:///export?socket=PATH"
    if not isinstance(value, str) or not is_nbd_uri(value) or not value.isprintable() or " " in value:
        raise refuse(allowed)
    try:
        parts = urlsplit(value)
        _ = parts.port
    except ValueError as error:
        raise refuse(allowed, f"{str(error).lower()}; ") from None
    sockets = parse_qs(parts.query).get("socket", [])
    if parts.scheme.endswith("+unix"):
        if len(sockets) != 1:
            raise refuse("?socket=PATH at the end of an nbd+unix URI")
        if parts.netloc.rpartition("@")[2]:
            raise refuse(f"{parts.scheme}:///EXPORT?socket=PATH, with three slashes")
    elif not parts.hostname:
        raise refuse(allowed, "no host; ")
    elif sockets:
        raise refuse(f"a socket together with {parts.scheme}+unix only")
    return value


def is_nbd_uri(text: str) -> bool:
    return text.partition(":")[0].lower() in URI_SCHEMES and "://" in text


class NbdBackendConfig(_Backend):
    """An export of an NBD server."""

    type: Annotated[Literal["nbd"], Field(description="the kind of backend")]
    uri: Annotated[
        str,
        BeforeValidator(_uri),
        WithJsonSchema({"type": "string", "pattern": r"^[nN][bB][dD][sS]?(\+[uU][nN][iI][xX])?://"}),
    ] = Field(description="such as nbd://host/export, nbds://host/export or nbd+unix:///export?socket=PATH")
    connections: Connections = Field(4, description="the most connections; several only if the server allows it")
    tls_certificates: FilePath | None = Field(
        None,
        description="the folder with ca-cert.pem and, if the server wants them, client-cert.pem and client-key.pem",
    )
    tls_psk_file: FilePath | None = Field(None, description="a file with pre-shared keys, instead of certificates")
    tls_username: Annotated[str, Field(min_length=1, max_length=255)] | None = Field(
        None, description="whose pre-shared key; by default this user's"
    )
    tls_verify: OnOff = Field(True, description="refuse a server whose certificate does not hold, or not for this host")

    main_key: ClassVar[str] = "uri"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        given = [key for key in type(self).model_fields if key.startswith("tls_") and key in self.model_fields_set]
        if given and not self.uses_tls:
            raise PydanticCustomError(
                "needless",
                "is of no use without TLS; allowed: together with an nbds:// or nbds+unix:// URI",
                {"key": given[0]},
            )
        if self.tls_certificates is not None and self.tls_psk_file is not None:
            raise PydanticCustomError(
                "needless", "found beside tls_certificates; allowed: one of the two", {"key": "tls_psk_file"}
            )
        return self

    @property
    def uses_tls(self) -> bool:
        return urlsplit(self.uri).scheme.startswith("nbds")

    @property
    def label(self) -> str:
        return self.uri

    @property
    def resource(self) -> str:
        """Where it leads, however it is spelled."""
        parts = urlsplit(self.uri)
        export = unquote(parts.path.removeprefix("/"))
        if parts.scheme.endswith("+unix"):
            return f"nbd+unix:{os.path.realpath(parse_qs(parts.query)['socket'][0])}:{export}"
        return f"nbd://{parts.hostname}:{parts.port or NBD_PORT}/{export}"

    def relative_to(self, folder: str) -> Self:
        changed = {
            key: os.path.join(folder, path)
            for key in ("tls_certificates", "tls_psk_file")
            if (path := getattr(self, key))
        }
        parts = urlsplit(self.uri)
        query = parse_qs(parts.query, keep_blank_values=True)
        if "socket" in query:
            query["socket"] = [os.path.join(folder, query["socket"][0])]
            text = urlencode(query, doseq=True, safe="/", quote_via=quote)
            changed["uri"] = (
                urlunsplit(parts._replace(query=text))
                if parts.netloc
                else f"{parts.scheme}://{parts.path or '/'}?{text}"
            )
        return super().relative_to(folder).model_copy(update=changed)


_QEMU_WORDS: Final = (
    "detect-zeroes",
    "locking",
)  # enumerations with `on` and `off` in them, which YAML reads as booleans
# What does not decide which bytes are meant.
_TUNABLES: Final = frozenset(
    {
        *("node-name", "cache", "aio", "aio-max-batch", "discard", "detect-zeroes", "read-only", "auto-read-only"),
        *("force-share", "locking", "pass-discard-request", "pass-discard-snapshot", "pass-discard-other"),
        *("cache-size", "l2-cache-size", "l2-cache-entry-size", "refcount-cache-size", "cache-clean-interval"),
        *("lazy-refcounts", "overlap-check", "readahead", "timeout", "reconnect-delay", "open-timeout", "key-secret"),
        *("password-secret", "encrypt", "tls-creds", "discard-no-unref", "user", "iothread"),
    }
)
_FILTERS: Final = frozenset({"compress", "throttle", "copy-on-read", "raw"})
_PLACES: Final = ("filename", "url", "image", "path", "target", "export", "device", "volume")
_LOCAL: Final = frozenset({"file", "host_device"})


def _blockdev(value: object) -> object:
    if not isinstance(value, dict):
        raise refuse(
            "QEMU's description of a block device, such as {driver: qcow2, file: {driver: file, filename: PATH}}"
        )
    expanded = _expand(value)
    for node in _nodes(expanded):
        if not isinstance(node.get("driver"), str):
            raise refuse("a 'driver' in every block device, such as qcow2, raw, luks, file, rbd or https")
    return expanded


def _expand(value: object) -> Any:
    """Of "file.driver: x", as QEMU's command line has it, {file: {driver: x}}; and words where YAML has booleans."""
    if isinstance(value, list):
        return [_expand(item) for item in value]
    if not isinstance(value, dict):
        return value
    result: dict[str, Any] = {}
    for key, item in value.items():
        first, dot, rest = str(key).partition(".")
        item = _expand({rest: item} if dot else item)
        if key in _QEMU_WORDS and isinstance(item, bool):
            item = "on" if item else "off"
        if isinstance(item, dict) and isinstance(result.get(first), dict):
            result[first] = {**result[first], **item}
        elif first in result:
            raise refuse("once", f"'{first}' twice; ")
        else:
            result[first] = item
    return result


def _nodes(node: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The block device, and what it lies on."""
    seen: Mapping[str, Any] | None = node
    while isinstance(seen, Mapping):
        yield seen
        seen = seen.get("file")


def _objects(value: object) -> object:
    if not isinstance(value, list) or not all(
        isinstance(item, dict) and {"qom-type", "id"} <= set(item) for item in value
    ):
        raise refuse("a list of QEMU's objects, such as [{qom-type: secret, id: key0, file: PATH}]")
    return [_expand(item) for item in value]


class QsdBackendConfig(_Backend):
    """Whatever QEMU can open, through a qemu-storage-daemon that belongs to this volume."""

    type: Annotated[Literal["qsd"], Field(description="the kind of backend")]
    blockdev: Annotated[
        dict[str, Any],
        BeforeValidator(_blockdev),
        WithJsonSchema({"type": "object"}),
    ] = Field(
        description="QEMU's description of the block device, as for its --blockdev; "
        "relative paths are relative to the configuration file"
    )
    objects: Annotated[
        list[dict[str, Any]],
        BeforeValidator(_objects),
        WithJsonSchema({"type": "array", "items": {"type": "object", "required": ["qom-type", "id"]}}),
    ] = Field(
        default_factory=list,
        max_length=32,
        description="QEMU's objects that it refers to, such as secrets, as for --object",
    )
    binary: FilePath = Field("qemu-storage-daemon", description="the program")

    _folder: str = PrivateAttr(default="")

    main_key: ClassVar[str] = "blockdev"

    @property
    def folder(self) -> str:
        """What paths in it are relative to."""
        return self._folder or os.getcwd()

    @property
    def image(self) -> str | None:
        """The file or device of this host that it all lies in, if there is one."""
        *_, last = _nodes(self.blockdev)
        name = last.get("filename")
        return os.path.join(self.folder, name) if last["driver"] in _LOCAL and isinstance(name, str) else None

    @property
    def drivers(self) -> list[str]:
        """Of the block device and what it lies on, the outermost first."""
        return [node["driver"] for node in _nodes(self.blockdev)]

    @property
    def compresses(self) -> bool:
        return "compress" in self.drivers

    @property
    def label(self) -> str:
        """Such as 'qcow2:/path/disk.qcow2' or 'raw:rbd:image'."""
        *_, last = _nodes(self.blockdev)
        names = [name for name in self.drivers if name != "file"]
        where = next((str(last[key]) for key in _PLACES if key in last), "")
        return ":".join([*names, self.image or re.sub(r"//[^/@]*@", "//", where)])

    @property
    def resource(self) -> str:
        return os.path.realpath(self.image) if self.image is not None else f"qsd:{self.canonical}"

    @property
    def canonical(self) -> str:
        """What it is, without what only says how it is to be used; for comparing."""
        kept = _without_tunables(self.blockdev)
        if self.image is not None:
            formats = [name for name in self.drivers if name not in _FILTERS | _LOCAL]
            return ":".join([*formats, os.path.realpath(self.image)])
        return json.dumps(kept, sort_keys=True, separators=(",", ":"), default=str)

    def relative_to(self, folder: str) -> Self:
        changed = super().relative_to(folder)
        if os.sep in self.binary:
            changed = changed.model_copy(update={"binary": os.path.join(folder, self.binary)})
        changed._folder = folder
        return changed


def _without_tunables(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_tunables(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_tunables(item) for key, item in value.items() if key not in _TUNABLES}
    return value


def _type_of(value: object) -> str | None:
    """Which model is meant; None: none can be."""
    found = value.get("type", "file") if isinstance(value, dict) else getattr(value, "type", None)
    return found if isinstance(found, str) else None


BACKENDS: Final[dict[str | int, type[Model]]] = {
    "file": FileBackendConfig,
    "nbd": NbdBackendConfig,
    "qsd": QsdBackendConfig,
}
WRAPPERS: Final[dict[str | int, type[Model]]] = {
    "delay": DelayConfig,
    "fault": FaultConfig,
    "trace": TraceConfig,
    "retry": RetryConfig,
}

BackendConfig = Annotated[
    Annotated[FileBackendConfig, Tag("file")]
    | Annotated[NbdBackendConfig, Tag("nbd")]
    | Annotated[QsdBackendConfig, Tag("qsd")],
    Discriminator(_type_of),
]
