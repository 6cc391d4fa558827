"""Credits of a data set's images, made safe for the page: text, whole numbers and web addresses alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from oner_fast import bounded_json
from oner_fast.data.dataset import sources_of

LICENCE_PAGES = {
    "CC-BY-SA-4.0": "https://creativecommons.org/licenses/by-sa/4.0/",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "MIT": "https://opensource.org/license/mit",
}


def credits_of(described: dict[str, Any]) -> list[dict[str, Any]]:
    """List the credits of `dataset.json`: `title`, `author`, `licence`, `samples`, `url` and `licence_page`.

    An entry that is no object is left out. A missing text becomes "unknown". `url` is None unless `web_address` takes
    it, so that no link of the page runs a script.
    """
    listed = described.get("attribution")
    return [_credit(entry) for entry in (listed if isinstance(listed, list) else []) if isinstance(entry, dict)]


def credits_of_data(data: str) -> list[dict[str, Any]]:
    """List the credits of data, each once; of several sources those of all, and of tars those of their folder.

    Raises ValueError where a `dataset.json` cannot be read.
    """
    found: list[dict[str, Any]] = []
    for source in map(Path, sources_of(data)):
        listing = (source if source.is_dir() else source.parent) / "dataset.json"
        if listing.is_file():
            every = credits_of(bounded_json.load_object(listing.read_bytes(), str(listing)))
            found += [credit for credit in every if credit not in found]
    return found


def web_address(text: Any) -> str | None:
    """Return `text` where it is an absolute http or https address, else None.

    White space, backslashes and characters without a shape are refused anywhere: browsers drop, rewrite or reorder
    them, so that `java<tab>script:` and `https:\\host` would mean something else than they say. So would
    `https://name@host`.
    """
    if not isinstance(text, str) or any(letter.isspace() or not letter.isprintable() for letter in text):
        return None
    if "\\" in text or not text.lower().startswith(("http://", "https://")):
        return None
    try:
        parts = urlsplit(text)
    except ValueError:
        return None
    return text if parts.hostname and "@" not in parts.netloc else None


def _credit(entry: dict[str, Any]) -> dict[str, Any]:
    texts = {name: _text(entry.get(name)) for name in ("title", "author", "licence")}
    return {
        **texts,
        "samples": count(entry.get("samples")),
        "url": web_address(entry.get("url")),
        "licence_page": LICENCE_PAGES.get(texts["licence"]),
    }


def count(value: Any) -> int:
    """Return a whole number of things; 0 where it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53 else 0


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value else "unknown"
