"""English names of emoji from `emojibase-data`, by code points, by squeezed name, and for flags."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from oner_fast.data.sources.concepts import caption_of_name

_NOT_ALNUM = re.compile(r"[^a-z0-9]+")
_TONES = frozenset({"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"})
_COUNTRIES_OF_GB = {"gb-eng": "flag england", "gb-sct": "flag scotland", "gb-wls": "flag wales"}


@dataclass(frozen=True)
class EmojiName:
    """Name of an emoji in lower case, and other words for it."""

    label: str
    tags: tuple[str, ...]


class EmojiNames:
    """Names of a `data.json` of emojibase (a list of objects with hexcode, label and tags) and of its `shortcodes`.

    `shortcodes` are any number of objects hexcode -> short name or names; they only help to find an emoji by its name.
    """

    def __init__(self, data: Sequence[dict[str, Any]], *shortcodes: Mapping[str, str | list[str]]) -> None:
        self.by_points: dict[str, EmojiName] = {}
        self._squeezed: dict[str, EmojiName] = {}
        self._flags: dict[str, str] = {}
        for entry in data:
            label = caption_of_name(entry["label"])
            tags = tuple(tag for tag in map(caption_of_name, entry.get("tags", ())) if tag != label)
            name = EmojiName(label, tags)
            points = self.plain(entry["hexcode"])
            self.by_points[points] = name
            self._squeezed.setdefault(_NOT_ALNUM.sub("", label), name)
            letters = [int(point, 16) - 0x1F1E6 for point in points.split("-")]
            if len(letters) == 2 and all(0 <= letter < 26 for letter in letters):
                self._flags["".join(chr(ord("a") + letter) for letter in letters)] = label
        for table in shortcodes:
            for hexcode, codes in table.items():
                known = self.by_points.get(self.plain(hexcode))
                for code in [codes] if isinstance(codes, str) else codes:
                    if known:
                        self._squeezed.setdefault(_NOT_ALNUM.sub("", code.lower()), known)

    @staticmethod
    def plain(hexcode: str) -> str:
        """Code points in lower case, without the variation selector."""
        return "-".join(point for point in hexcode.lower().split("-") if point != "fe0f")

    @staticmethod
    def has_skin_tone(points: str) -> bool:
        """Whether the code points include a skin tone."""
        return not _TONES.isdisjoint(points.split("-"))

    def by_name(self, name: str) -> EmojiName | None:
        """Emoji whose name is `name` without blanks and punctuation ("aerialtramway"), or None."""
        return self._squeezed.get(_NOT_ALNUM.sub("", name.lower().replace("flag-for-", "flag-")))

    def flag(self, code: str) -> str | None:
        """Name of a flag, from its region's code ("al": "flag albania") or from words; None for other codes."""
        if code in self._flags:
            return self._flags[code]
        if code in _COUNTRIES_OF_GB:
            return _COUNTRIES_OF_GB[code]
        parts = code.split("-")
        if max(map(len, parts)) < 4 or parts[0] == "lang":
            return None
        return f"flag {caption_of_name(' '.join(part for part in parts if len(part) > 2))}"
