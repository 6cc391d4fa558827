"""Check the values of a model's configuration that comes from a file."""

from __future__ import annotations

import math
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar

from oner_fast.bounded_json import shown

MAX_INT = 2**31 - 1
_MAX_CHANNELS = 16


C = TypeVar("C")


def from_dict(config: type[C], values: dict[str, Any], name: str) -> C:
    """Make the dataclass `config` from JSON values.

    Each field must have a default, which decides the kind of its value: a flag; a whole number from 1 to `MAX_INT`, or
    from the field's `metadata["least"]`; a finite number above 0; or a few finite numbers, read as a tuple. Fields that
    are not given keep their defaults.

    Raises:
        ValueError: an unknown key, a value of another kind, or values that do not fit each other; the message starts
            with `name`.
    """
    known = {field.name: field for field in fields(config)}  # type: ignore[arg-type]
    if unknown := values.keys() - known:
        raise ValueError(
            f"{name}: unknown model settings {', '.join(sorted(unknown))[:200]}; known: {', '.join(sorted(known))}"
        )
    settings = {key: _value(value, known[key], f"{name}: {key}") for key, value in values.items()}
    try:
        return config(**settings)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _value(value: Any, field: Field[Any], name: str) -> Any:
    default, least = field.default, field.metadata.get("least", 1)
    assert default is not MISSING
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {shown(value)}")
    elif isinstance(default, int):
        if type(value) is not int or not least <= value <= MAX_INT:
            raise ValueError(f"{name} must be a whole number from {least} to {MAX_INT:,}, got {shown(value)}")
    elif isinstance(default, float):
        if not _number(value) or value <= 0:
            raise ValueError(f"{name} must be a finite number above 0, got {shown(value)}")
    else:
        few = isinstance(value, list | tuple) and 1 <= len(value) <= _MAX_CHANNELS
        if not few or not all(_number(each) for each in value):
            raise ValueError(f"{name} must be 1 to {_MAX_CHANNELS} finite numbers, got {shown(value)}")
        if name.endswith("std") and min(value) <= 0:
            raise ValueError(f"{name} must be above 0, got {shown(value)}")
        return tuple(value)
    return value


def _number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e30 and math.isfinite(value)
