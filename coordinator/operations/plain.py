"""Requests and answers as JSON's types, for Admin.Perform, `--json` and the JSON API.

Dataclasses become objects, bytes and protobuf messages hex, numbers that are not finite null. The
way back is strict: unknown fields and wrong types are refused.
"""

import dataclasses
import enum
import math
import types
import typing
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from protos.contract.errors import UsageError

_Kind = TypeVar("_Kind")


def plain_from_response(value: Any) -> Any:
    """Dataclasses, tuples, bytes, enums and protobuf messages as JSON's types; bytes become hex."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain_from_response(getattr(value, field.name))
            for field in dataclasses.fields(value)
        }
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Message):
        return value.SerializeToString().hex()
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): plain_from_response(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain_from_response(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def from_plain(kind: type[_Kind], plain: Any) -> _Kind:
    """The inverse of `plain_from_response` for a named type. Raises UsageError for what does not
    fit.
    """
    found: _Kind = _parse(kind, plain, name="arguments")
    return found


def _parse(kind: Any, plain: Any, *, name: str) -> Any:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _parse_fields(kind, plain, name=name)
    if origin in (types.UnionType, typing.Union):
        chosen = next(part for part in parts if part is not type(None))
        return None if plain is None else _parse(chosen, plain, name=name)
    if origin is tuple and isinstance(plain, list):
        return tuple(_parse(parts[0], item, name=name) for item in plain)
    if origin is dict and isinstance(plain, dict):
        return {key: _parse(parts[1], item, name=name) for key, item in plain.items()}
    try:
        if kind is bytes and isinstance(plain, str):
            return bytes.fromhex(plain)
        if isinstance(kind, type) and issubclass(kind, Message) and isinstance(plain, str):
            parse: Any = kind
            return parse.FromString(bytes.fromhex(plain))
    except (ValueError, DecodeError) as error:
        raise UsageError(
            f"{name} is not hex of the expected kind: {error}",
            allowed="an even number of hex digits",
            remedy="use this version's client",
        ) from error
    if kind is float and type(plain) in (int, float):
        return float(plain)
    if type(plain) is not kind:
        raise UsageError(
            f"{name} = {plain!r}",
            allowed=f"a value of type {kind!r}",
            remedy="use this version's client",
        )
    return plain


def _parse_fields(kind: Any, plain: Any, *, name: str) -> Any:
    kinds = typing.get_type_hints(kind)
    if not isinstance(plain, dict) or not set(plain) <= set(kinds):
        raise UsageError(
            f"{name} for {kind.__name__}: {plain!r}"[:300],
            allowed=f"an object with {', '.join(kinds)}",
            remedy="use this version's client",
        )
    values = {key: _parse(kinds[key], item, name=f"{name}.{key}") for key, item in plain.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise UsageError(
            f"{name} for {kind.__name__}: {error}",
            allowed="the fields of this version",
            remedy="use this version's client",
        ) from error
