"""Read JSON that others wrote: bounded in size and depth, and refused in one sentence."""

from __future__ import annotations

import json
from typing import Any

MAX_DEPTH = 64


def loads(data: bytes | str, what: str, *, max_bytes: int | None = None, max_depth: int = MAX_DEPTH) -> Any:
    """Parse a JSON text of any source.

    Args:
        data: the text, or its UTF-8 bytes; a byte order mark at its start is ignored.
        what: the name of the text in errors, such as a file's path.
        max_bytes: greatest length of `data`; None for no limit.
        max_depth: greatest number of objects and arrays inside each other.

    Returns:
        The value. Every string in it can be encoded as UTF-8.

    Raises:
        ValueError: the text is too long, too deep, not UTF-8 or no JSON; the message starts with `what`.
    """
    if max_bytes is not None and len(data) > max_bytes:
        raise ValueError(f"{what}: its JSON has {len(data):,} bytes, and at most {max_bytes:,} are read")
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data.removeprefix("\ufeff")
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"{what}: its JSON is nested deeper than {max_depth} levels") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{what}: its JSON is not UTF-8 ({error.reason} at byte {error.start})") from error
    except ValueError as error:
        raise ValueError(f"{what}: its JSON cannot be read ({error})") from error
    _check(value, what, max_depth)
    return value


def load_object(
    data: bytes | str, what: str, *, max_bytes: int | None = None, max_depth: int = MAX_DEPTH
) -> dict[str, Any]:
    """Parse a JSON text whose outermost value must be an object. Takes, returns and raises as `loads`."""
    value = loads(data, what, max_bytes=max_bytes, max_depth=max_depth)
    if not isinstance(value, dict):
        raise ValueError(f"{what}: its JSON is a {type(value).__name__}, and an object is needed")
    return value


def shown(value: Any, most: int = 80) -> str:
    """Write a value of a foreign file for an error: its `repr`, cut to `most` characters."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def _check(value: Any, what: str, max_depth: int) -> None:
    """Refuse values deeper than `max_depth`, and strings that UTF-8 cannot encode. Level by level, not recursive."""
    level = [value]
    depth = 0
    while level:
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item)
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
            elif isinstance(item, str) and not item.isascii():
                _encodable(item, what)
        if inner:
            depth += 1
            if depth > max_depth:
                raise ValueError(f"{what}: its JSON is nested deeper than {max_depth} levels")
        level = inner


def _encodable(text: str, what: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{what}: a string of its JSON holds half a surrogate pair at {error.start}") from error
