"""Requests and answers as JSON's types, for Admin.Perform, `--json` and the JSON API.

Dataclasses become objects, bytes and protobuf messages hex, numbers that are not finite null. The way
back is strict: unknown fields and wrong types are refused.
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


def from_plain(kind: type[_Kind], plain: Any, *, name: str = "arguments") -> _Kind:
    """The inverse of `plain_from_response` for a type that is named. Raises UsageError for what does not fit."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass_from_plain(kind, plain, name=name)
    if origin in (types.UnionType, typing.Union):
        if plain is None:
            return typing.cast(_Kind, None)
        return typing.cast(
            _Kind,
            from_plain(next(part for part in parts if part is not type(None)), plain, name=name),
        )
    if origin is tuple and isinstance(plain, list):
        return typing.cast(_Kind, tuple(from_plain(parts[0], item, name=name) for item in plain))
    if origin is dict and isinstance(plain, dict):
        return typing.cast(
            _Kind, {key: from_plain(parts[1], item, name=name) for key, item in plain.items()}
        )
    try:
        if kind is bytes and isinstance(plain, str):
            return typing.cast(_Kind, bytes.fromhex(plain))
        if isinstance(kind, type) and issubclass(kind, Message) and isinstance(plain, str):
            return typing.cast(_Kind, kind.FromString(bytes.fromhex(plain)))
    except (ValueError, DecodeError) as error:
        raise UsageError(f"{name} is not hex of the expected kind: {error}") from error
    if kind is float and type(plain) in (int, float):
        return typing.cast(_Kind, float(plain))
    if type(plain) is not kind:
        raise UsageError(
            f"{name} = {plain!r}",
            allowed=f"a value of type {kind!r}",
            remedy="use this version's client",
        )
    return typing.cast(_Kind, plain)


def _dataclass_from_plain(kind: Any, plain: Any, *, name: str) -> Any:
    kinds = typing.get_type_hints(kind)
    if not isinstance(plain, dict) or not set(plain) <= set(kinds):
        raise UsageError(
            f"{name} for {kind.__name__}: {plain!r}"[:300],
            allowed=f"an object with {', '.join(kinds)}",
            remedy="use this version's client",
        )
    values = {
        key: from_plain(kinds[key], value, name=f"{name}.{key}") for key, value in plain.items()
    }
    try:
        return kind(**values)
    except TypeError as error:
        raise UsageError(
            f"{name} for {kind.__name__}: {error}", remedy="use this version's client"
        ) from error
