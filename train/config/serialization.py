"""Dataclasses as plain JSON values, and back with every value checked."""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import enum
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from oner_fast.atomic import write_atomic
from oner_fast.format_version import CONFIGURATION, FIELD, check_format_version

C = TypeVar("C")


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a dataclass instance to plain JSON values.

    Tuples become lists, enums their names, paths strings, and non-finite floats `"inf"`, `"-inf"` or `"nan"`.
    """
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"to_dict needs a dataclass instance, got {config!r}")
    return {f.name: _plain(getattr(config, f.name), f.name) for f in dataclasses.fields(config) if f.init}


def _plain(value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise TypeError(f"{where}: a configuration cannot hold a {type(value).__name__}")


def from_dict(cls: type[C], data: Mapping[str, Any], where: str = "") -> C:
    """The inverse of `to_dict`: build `cls` from plain values, checking every one.

    A field that is missing takes its default, so that an older file still loads.

    Raises:
        ValueError: an unknown key, a missing field without default, or a value outside a Literal or enum.
        TypeError: a value of a wrong type. Both name the place, such as `optim.betas[1]`.
    """
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise TypeError(f"from_dict needs a dataclass, got {cls!r}")
    place = where or cls.__name__
    if not isinstance(data, Mapping):
        raise TypeError(f"{place}: needs an object with the fields of {cls.__name__}, got {data!r}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    unknown = [str(key) for key in data if key not in fields]
    if unknown:
        near = difflib.get_close_matches(unknown[0], fields, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{place}: unknown {', '.join(map(repr, unknown))}.{hint} Known: {', '.join(fields)}")
    hints = typing.get_type_hints(cls)
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], f"{where}.{name}" if where else name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{place}: {name!r} is missing")
    return cls(**values)


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is Literal:
        for choice in arguments:
            if type(choice) is type(value) and choice == value:
                return value
        raise ValueError(f"{where}: needs one of {', '.join(map(repr, arguments))}, got {value!r}")
    if origin is tuple or kind is tuple:
        return _convert_tuple(arguments, value, where)
    if origin in (list, collections.abc.Sequence) or kind is list:
        if not isinstance(value, list):
            raise TypeError(f"{where}: needs a list, got {value!r}")
        item = arguments[0] if arguments else Any
        return [_convert(item, one, f"{where}[{index}]") for index, one in enumerate(value)]
    if origin in (dict, collections.abc.Mapping) or kind is dict:
        if not isinstance(value, Mapping):
            raise TypeError(f"{where}: needs an object, got {value!r}")
        item = arguments[1] if arguments else Any
        return {key: _convert(item, one, f"{where}.{key}") for key, one in value.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return from_dict(kind, value, where)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        if isinstance(value, str) and value in kind.__members__:
            return kind[value]
        raise ValueError(f"{where}: needs one of {', '.join(kind.__members__)}, got {value!r}")
    return _convert_scalar(kind, value, where)


def _convert_scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is float and (type(value) in (int, float) or value in ("inf", "-inf", "nan")):
        return float(value)
    if kind in (bool, int, str) and type(value) is kind:
        return value
    if kind in (None, types.NoneType) and value is None:
        return None
    if isinstance(kind, type) and issubclass(kind, Path) and isinstance(value, str):
        return kind(value)
    raise TypeError(f"{where}: needs {_name(kind)}, got {value!r} ({type(value).__name__})")


def _convert_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{where}: needs a list, got {value!r}")
    kinds: Sequence[Any] = arguments
    if not arguments:
        kinds = [Any] * len(value)
    elif len(arguments) == 2 and arguments[1] is Ellipsis:
        kinds = [arguments[0]] * len(value)
    if len(kinds) != len(value):
        raise ValueError(f"{where}: needs {len(kinds)} values, got {len(value)}: {value!r}")
    pairs = enumerate(zip(kinds, value, strict=True))
    return tuple(_convert(kind, one, f"{where}[{index}]") for index, (kind, one) in pairs)


def _convert_union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and types.NoneType in arguments:
        return None
    kinds = [kind for kind in arguments if kind is not types.NoneType]
    problem: Exception | None = None
    # An exact match first, so that 3 stays an integer in `float | int` and "x" a string in `Path | str`.
    for kind in sorted(kinds, key=lambda kind: kind is not type(value)):
        try:
            return _convert(kind, value, where)
        except (TypeError, ValueError) as error:
            problem = error
    if len(kinds) == 1 and problem is not None:
        raise problem
    raise TypeError(f"{where}: needs {' or '.join(map(_name, arguments))}, got {value!r}")


def _name(kind: Any) -> str:
    if kind is types.NoneType:
        return "null"
    return kind.__name__ if isinstance(kind, type) else str(kind)


def save_json(config: Any, path: Path | str) -> None:
    """Write `to_dict` of `config` and the format version to `path` atomically; make its folder where needed."""
    path = Path(path)
    text = json.dumps({FIELD: CONFIGURATION, **to_dict(config)}, indent=2, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: file.write(text.encode()))


def load_json(cls: type[C], path: Path | str) -> C:
    """Read what `save_json` wrote as an instance of `cls`.

    Raises:
        ValueError: the file is not JSON or has a newer format, or as in `from_dict`; the message names the file.
        TypeError: as in `from_dict`.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if isinstance(data, dict):
        check_format_version(path, data.pop(FIELD, None), CONFIGURATION)
    try:
        return from_dict(cls, data)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{path}: {error}") from error
