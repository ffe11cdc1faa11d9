"""What the value of a configuration key may be: sizes, durations, counts, words, paths, each with its error message.

Owns the units and how "allowed" is said. Knows no key and no model.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, WithJsonSchema
from pydantic_core import PydanticCustomError

from vhostcache.modes import MODES
from vhostcache.sockets import PATH_BYTES

SOCKET_PATH_BYTES: Final = PATH_BYTES
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


def refuse(allowed: str, why: str = "") -> PydanticCustomError:
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
            raise refuse(self.allowed)
        if self.power_of_two and value & (value - 1):
            raise refuse(self.allowed)
        return value


def quantity(limits: Range, parse: Callable[[str], int]) -> Callable[[object], int]:
    def validate(value: object) -> int:
        if isinstance(value, str):
            try:
                value = parse(value)
            except ValueError as error:
                raise refuse(limits.allowed, f"{error}; ") from None
        elif isinstance(value, float) and parse is parse_duration and value >= 0:
            value = parse(f"{value:.6f}")
        elif isinstance(value, int) and not isinstance(value, bool) and parse is parse_duration:
            value = value * 10**9
        if not isinstance(value, int) or isinstance(value, bool):
            raise refuse(limits.allowed)
        return limits.check(value)

    return validate


def no_text(text: str) -> int:
    raise ValueError("not a number")


SIZE_SCHEMA: Final = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        {"type": "string", "pattern": r"^\s*[0-9]+(\.[0-9]+)?\s*([kKmMgGtT]([iI][bB])?|[bB])?\s*$"},
    ]
}
DURATION_SCHEMA: Final = {
    "anyOf": [
        {"type": "number", "minimum": 0},
        {"type": "string", "pattern": r"^\s*[0-9]+(\.[0-9]+)?\s*(us|ms|s|min|h)?\s*$"},
    ]
}


def count_schema(limits: Range) -> WithJsonSchema:
    return WithJsonSchema({"type": "integer", "minimum": limits.minimum, "maximum": limits.maximum})


# Words and paths.


def one_of(*allowed: str) -> Callable[[object], object]:
    def validate(value: object) -> object:
        if value not in allowed or not isinstance(value, str):
            guess = difflib.get_close_matches(str(value), allowed, 1)
            hint = f" (did you mean '{guess[0]}'?)" if guess else ""
            raise refuse(", ".join(allowed) + hint)
        return value

    return validate


def _name(value: object) -> object:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise refuse("1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit")
    return value


def _serial(value: object) -> object:
    fits = isinstance(value, str) and value.isascii() and value.isprintable() and 1 <= len(value) <= SERIAL_BYTES
    if not fits:
        raise refuse(f"1 to {SERIAL_BYTES} printable ASCII characters")
    return value


def _path(value: object) -> object:
    if not isinstance(value, str) or not value or "\0" in value:
        raise refuse("a path")
    return value


def _socket_path(value: object) -> object:
    if not isinstance(value, str) or not value or "\0" in value:
        raise refuse("the path of a unix socket")
    size = len(os.fsencode(value))
    if size > SOCKET_PATH_BYTES:
        raise refuse(
            f"a path of at most {SOCKET_PATH_BYTES} bytes (this one has {size}): use a shorter folder, such as /run"
        )
    return value


def _permissions(value: object) -> object:
    allowed = "octal permissions in quotes, such as '0600' or '0660'"
    if not isinstance(value, str) or not re.fullmatch(r"0?o?[0-7]{3,4}", value):
        raise refuse(allowed)
    bits = int(value.lstrip("0o") or "0", 8)
    if bits & ~0o777 or not bits & 0o600 == 0o600:
        raise refuse(allowed, "the owner must keep reading and writing; ")
    return bits


def _on_off(value: object) -> object:
    if not isinstance(value, bool):
        raise refuse("on, off, true or false")
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
ModeName = Annotated[str, BeforeValidator(one_of(*MODES)), WithJsonSchema({"type": "string", "enum": list(MODES)})]


class Model(BaseModel):
    """Part of a configuration: unknown keys are refused, and nothing changes once it has been checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=False)


def found(value: object) -> str:
    """How a wrong value is quoted."""
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
