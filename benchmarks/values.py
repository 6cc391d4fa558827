"""Check values of JSON from elsewhere, and refuse them in one sentence that names the place and the value."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from oner_fast.bounded_json import shown

# The largest integer that a float holds exactly.
MOST_COUNT = 2**53
MOST_NUMBER = 1e300
# What begins or ends markup: of HTML, links, pictures, code, emphasis, cells, mentions, references and addresses.
_MARKUP = re.compile(r"[<>&\[\]`*|~@#\\]|(?<!\w)_|_(?!\w)|(?<=http):|(?<=https):|(?<=www)\.")
# Control characters, those without a width, and those that end a line.
_CONTROL = ("Cc", "Cf", "Zl", "Zp")


def get(found: Mapping[str, Any], name: str, kind: type, what: str, remedy: str = "") -> Any:
    """Return the value of a name, as `of` checks it; `remedy` ends the message where the name is missing."""
    if name not in found:
        raise ValueError(f"{what} has no {name!r}" + (f"; {remedy}" if remedy else ""))
    return of(found[name], kind, f"{what}.{name}")


def of(value: Any, kind: type, what: str) -> Any:
    """Return the value, where it is of the type; a string is checked as `printable` does."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{what} is {shown(value)}, and needs to be a {kind.__name__}")
    return printable(str(value), what) if kind is str else value


def printable(text: str, what: str) -> str:
    """Refuse characters that would move a terminal's cursor, or turn the direction of the text behind them."""
    if not text.isprintable() and any(unicodedata.category(one) in _CONTROL for one in text):
        raise ValueError(f"{what} holds a control character: {shown(ascii(text))}")
    return text


def cleaned(text: Any, what: str) -> str:
    """Return a text on one line, with a question mark for each control character."""
    if not isinstance(text, str):
        raise ValueError(f"{what} is {shown(text)}, and needs to be a str")
    return "".join("?" if unicodedata.category(one) in _CONTROL else one for one in " ".join(text.split()))


def in_markdown(text: str) -> str:
    """Escape a text, so that Markdown shows it as it is: on one line, in a cell of a table too."""
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", " ".join(text.split()))


def filled(text: Any, what: str) -> str:
    """Return a name, which is a printable string with more than spaces."""
    if not of(text, str, what).strip():
        raise ValueError(f"{what} has an empty name")
    return str(text)


def count(value: Any, what: str) -> int:
    """Return an integer that a float holds exactly."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{what} is {shown(value)}, and needs to be an integer")
    return int(between(value, -MOST_COUNT, MOST_COUNT, what))


def number(value: Any, what: str) -> float:
    """Return a finite number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value != value or abs(value) == math.inf:
        raise ValueError(f"{what} is {shown(value)}, and needs to be a finite number")
    return float(between(value, -MOST_NUMBER, MOST_NUMBER, what))


def at_least_0(value: Any, what: str) -> float:
    """Return a finite number that is not negative."""
    return float(between(number(value, what), 0.0, MOST_NUMBER, what))


def between(value: int | float, low: float, high: float, what: str) -> int | float:
    """Return the value, where it lies in the closed interval."""
    if not low <= value <= high:
        raise ValueError(f"{what} is {shown(value)}, and needs to lie between {low:g} and {high:g}")
    return value
