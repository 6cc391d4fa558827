"""`icons`: emoji and icons in colour from npm packages, and game-icons, in one colour but rich in concepts."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from oner_fast.data.sources import npm
from oner_fast.data.sources.building import Build, default_workers, report, versions
from oner_fast.data.sources.concepts import caption_of_name
from oner_fast.data.sources.drawings import Drawing, IconSet, build_drawings
from oner_fast.data.sources.emoji_names import EmojiNames
from oner_fast.data.sources.progress import say

# Versions are fixed, so that the same pictures come out next year.
SETS = {
    "noto": "1.2.9",
    "noto-v1": "1.2.5",
    "twemoji": "1.2.5",
    "openmoji": "1.2.29",
    "fluent-emoji-flat": "1.2.6",
    "emojione": "1.2.3",
    "emojione-v1": "1.2.3",
    "fxemoji": "1.2.2",
    "streamline-emojis": "1.2.4",
    "flat-color-icons": "1.2.3",
    "fluent-color": "1.2.21",
    "icon-park": "1.2.4",
    "streamline-color": "1.2.2",
    "streamline-ultimate-color": "1.2.2",
    "streamline-flex-color": "1.2.2",
    "streamline-sharp-color": "1.2.2",
    "streamline-plump-color": "1.2.2",
    "streamline-freehand-color": "1.2.2",
    "streamline-kameleon-color": "1.2.2",
    "streamline-cyber-color": "1.2.2",
    "streamline-stickies-color": "1.2.2",
    "marketeq": "1.2.2",
    "meteocons": "1.2.4",
    "flag": "1.2.12",
    "circle-flags": "1.2.11",
    "game-icons": "1.2.4",
}
EMOJI_NAMES = ("emojibase-data", "17.0.0")
EMOJI_SETS = frozenset(list(SETS)[:8])
FLAG_SETS = frozenset({"flag", "circle-flags"})
LICENCES = frozenset({"MIT", "Apache-2.0", "CC-BY-3.0", "CC-BY-4.0", "CC-BY-SA-4.0"})

# Mozilla's emoji: a hand of their own (flat, muted, without outlines, other poses and crops), yet nearly every concept
# is also drawn by the sets trained on, so that what the split measures is the style and not the vocabulary.
STYLE = "fxemoji"

_PACKAGES = ("resvg-py", "pillow", "webdataset")
_SKIN_TONE = re.compile(r"(^|-)(light|medium|medium-light|medium-dark|dark)-skin-tone")
_SHORTCODES = tuple(f"en/shortcodes/{name}.json" for name in ("cldr", "emojibase-legacy", "iamcal", "joypixels"))
# What tells two drawings of one thing apart, and is no word for it: sizes, counters, "flat" and "duo" twins.
_VARIANT = re.compile(r"(-(\d+|flat|duo|fill|one|two|three|four|five|six))+$")


def build_icons(
    output: str | Path,
    *,
    size: int = 64,
    workers: int | None = None,
    style: str = STYLE,
    sets: Sequence[str] = tuple(SETS),
    cache: str | Path | None = None,
    limit: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Builds the dataset `icons` in the folder `output`, or completes it; returns what `dataset.json` holds.

    `size`: pixels a side. `workers`: processes that draw; the bytes do not depend on it. `style`: the set that is never
    trained on and makes the split "style". `sets`: which sets to take. `cache`: where the tarballs are kept, by default
    `npm-cache` beside `output`. `limit`: only so many drawings, evenly from every set. Raises ValueError where `output`
    holds another build and `overwrite` is false, or a set is unknown; NpmError where npm is missing or fails.
    """
    if size < 8:
        raise ValueError(f"size is {size}; pictures need at least 8 pixels a side")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    for name in (*sets, style):
        if name not in SETS:
            raise ValueError(f"unknown set {name!r}; known: {', '.join(SETS)}")
    packages = {f"@iconify-json/{name}": SETS[name] for name in SETS if name in sets} | {EMOJI_NAMES[0]: EMOJI_NAMES[1]}
    options = {"image_size": size, "limit": limit, "style": style, "packages": packages | versions(*_PACKAGES)}
    build = Build(output, "icons", options, overwrite)
    if build.finished:
        content = build.dataset()
        report(content, build.output, "was complete already")
        return content
    folder = Path(cache) if cache is not None else build.output.parent / "npm-cache"
    drawings = list(icon_drawings(npm.fetch(packages, folder)))
    if limit is not None:
        drawings = [drawings[i * len(drawings) // limit] for i in range(min(limit, len(drawings)))]
    say(f"icons: {len(drawings):,} drawings at {size} pixels into {build.output}")
    return build_drawings(build, drawings, size, default_workers() if workers is None else workers, frozenset({style}))


def icon_drawings(tarballs: Mapping[str, Path]) -> Iterator[Drawing]:
    """Every drawing of the packages (name -> tarball, emojibase-data among them), in a fixed order."""
    names = EmojiNames(*npm.read_json(tarballs[EMOJI_NAMES[0]], "en/data.json", *_SHORTCODES))
    for package, path in tarballs.items():
        if package != EMOJI_NAMES[0]:
            icons, info, chars = npm.read_json(path, "icons.json", "info.json", "chars.json")
            yield from _set_drawings(icons, _icon_set(icons["prefix"], info), chars, names)


def _icon_set(name: str, info: dict[str, Any]) -> IconSet:
    licence, author = info["license"].get("spdx", "none"), info["author"]
    if licence not in LICENCES:
        raise ValueError(f"set {name} is under {licence}; only {', '.join(sorted(LICENCES))} may be used")
    url = author.get("url") or info["license"].get("url") or f"https://icon-sets.iconify.design/{name}/"
    return IconSet(name, info["name"], author["name"], licence, url)


def _set_drawings(
    icons: dict[str, Any], icon_set: IconSet, chars: dict[str, str], names: EmojiNames
) -> Iterator[Drawing]:
    points: dict[str, list[str]] = {}
    for point, name in chars.items():
        points.setdefault(name, []).append(point)
    also: dict[str, list[str]] = {}
    for alias, entry in icons.get("aliases", {}).items():
        if entry.keys() <= {"parent"}:
            also.setdefault(entry["parent"], []).append(caption_of_name(alias))
    for name, entry in sorted(icons["icons"].items()):
        if entry.get("hidden") or _SKIN_TONE.search(name):
            continue
        described = _describe(icon_set.name, name, points.get(name, []), names)
        if described is not None:
            caption, tags = described
            tags = tuple(dict.fromkeys(tag for tag in (*tags, *also.get(name, [])) if tag != caption))
            yield Drawing(icon_set, name, _svg(icons, entry), caption, tags)


def _describe(set_name: str, name: str, points: Sequence[str], names: EmojiNames) -> tuple[str, tuple[str, ...]] | None:
    """The caption and tags of an icon; None where it has a skin tone or no words."""
    if set_name in FLAG_SETS:
        flag = names.flag(name.removesuffix("-1x1").removesuffix("-4x3"))
        return (flag, ()) if flag else None
    if set_name not in EMOJI_SETS:
        return caption_of_name(_VARIANT.sub("", name)), ()
    if points and all(names.has_skin_tone(point) for point in points):
        return None
    found = next((names.by_points[point] for point in points if point in names.by_points), None)
    found = found or names.by_name(name)
    if found:
        return found.label, found.tags
    # this set writes its names without gaps; only those that emojibase knows can be read
    return None if set_name == "fxemoji" else (caption_of_name(name), ())


def _svg(icons: dict[str, Any], entry: dict[str, Any]) -> str:
    left, top, width, height = (
        entry.get(field, icons.get(field, default))
        for field, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{entry["body"]}</svg>'
    )
