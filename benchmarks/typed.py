"""Make a dataclass of JSON from elsewhere, after checking every value against the annotation of its field."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

from oner_fast.benchmarks.values import cleaned, count, number, of
from oner_fast.bounded_json import shown

T = TypeVar("T")


def made(kind: type[T], found: Any, what: str) -> T:
    """Make an instance of a dataclass.

    Args:
        kind: a dataclass whose fields are bool, int, float, str, lists and dicts of them, dataclasses, None and Any.
        found: the dict.
        what: its place, for errors.

    Raises:
        ValueError: a field is missing, unknown or of another type, or a number is not finite.
    """
    found = of(found, dict, what)
    hints: Mapping[str, Any] = typing.get_type_hints(kind)
    if unknown := [name for name in found if name not in hints]:
        raise ValueError(f"{what} has the field {shown(unknown[0])}, which this version does not know")
    for one in fields(kind):  # type: ignore[arg-type]
        if one.name not in found and one.default is MISSING and one.default_factory is MISSING:
            raise ValueError(f"{what} has no {one.name!r}")
    return kind(**{name: _checked(hints[name], value, f"{what}.{name}") for name, value in found.items()})


def _checked(hint: Any, value: Any, what: str) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        (other,) = [one for one in inner if one is not types.NoneType]
        return None if value is None else _checked(other, value, what)
    if origin is list:
        return [_checked(inner[0], one, what) for one in of(value, list, what)]
    if origin is dict:
        return {
            cleaned(key, what): _checked(inner[1], one, f"{what}[{key!r}]")
            for key, one in of(value, dict, what).items()
        }
    if is_dataclass(hint):
        return made(typing.cast("type[Any]", hint), value, what)
    simple: dict[Any, Any] = {float: number, int: count, str: cleaned, bool: lambda one, place: of(one, bool, place)}
    return simple[hint](value, what) if hint in simple else value
