"""Compare the sizes of a model in a file with those of a configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any


def require_same_sizes(name: str, there: Any, here: Any, free: Collection[str]) -> None:
    """Refuse weights of other sizes than the configuration's.

    Args:
        name: the file that holds the weights.
        there: the dataclass of the sizes in it.
        here: that of the configuration, of the same class.
        free: the fields that may differ.

    Raises:
        ValueError: a field differs; the message gives both values, and the flags that take those of the file.
    """
    names = [each.name for each in dataclasses.fields(here) if each.name not in free]
    differing = [each for each in names if getattr(there, each) != getattr(here, each)]
    if differing:
        given = ", ".join(f"{each} {getattr(there, each)}" for each in differing)
        needed = ", ".join(f"{each} {getattr(here, each)}" for each in differing)
        flags = " ".join(_flag(each, getattr(there, each)) for each in differing)
        raise ValueError(f"{name} holds a model of {given}, and this training needs {needed}; give {flags}")


def _flag(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
