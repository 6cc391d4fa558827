"""`icons`: coloured emoji and icons from npm packages, and game-icons, which have one colour but many concepts."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from oner_fast.data.sources import npm, npm_lock
from oner_fast.data.sources.building import Build, default_workers, report, versions
from oner_fast.data.sources.concepts import SPLIT_RULE, caption_of_name
from oner_fast.data.sources.drawings import Drawing, IconSet, build_drawings
from oner_fast.data.sources.emoji_names import EmojiNames
from oner_fast.data.sources.progress import say

# The versions are fixed, so that a build next year gives the same images.
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

# Mozilla's emoji have a style of their own: flat, muted, without outlines, with other poses and crops. The sets trained
# on draw nearly all of their concepts too, so that the split measures the style and not the vocabulary.
STYLE = "fxemoji"

_PACKAGES = ("resvg-py", "pillow", "webdataset")
_SKIN_TONE = re.compile(r"(^|-)(light|medium|medium-light|medium-dark|dark)-skin-tone")
_SHORTCODES = tuple(f"en/shortcodes/{name}.json" for name in ("cldr", "emojibase-legacy", "iamcal", "joypixels"))
# Words of names that tell apart two drawings of one thing but do not name it: sizes, counters, "flat" and "duo" twins.
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
    """Build the dataset `icons` in the folder `output`, or complete it; returns the content of `dataset.json`.

    Args:
        output: the folder of the dataset.
        size: pixels a side.
        workers: processes that draw, one for each processor by default; the bytes do not depend on it.
        style: the set that makes the split "style" and is never trained on.
        sets: the sets to take.
        cache: the folder that keeps the fetched packages; `npm-cache` beside `output` by default.
        limit: take only this many drawings, evenly from all sets.
        overwrite: replace another build in `output`.

    Raises:
        ValueError: a set is unknown, an option is out of range, or `output` holds another build.
        NpmError: npm is missing or fails, or a package is not the one that was published.
    """
    if size < 8:
        raise ValueError(f"size is {size}; images need at least 8 pixels a side")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    for name in (*sets, style):
        if name not in SETS:
            raise ValueError(f"unknown set {name!r}; known: {', '.join(SETS)}")
    packages = {f"@iconify-json/{name}": SETS[name] for name in SETS if name in sets} | {EMOJI_NAMES[0]: EMOJI_NAMES[1]}
    options = {
        "image_size": size,
        "limit": limit,
        "split_rule": SPLIT_RULE,
        "style": style,
        "packages": packages | versions(*_PACKAGES),
    }
    build = Build(output, "icons", options, overwrite)
    if build.finished:
        content = build.dataset()
        report(content, build.output, "was complete already")
        return content
    folder = Path(cache) if cache is not None else build.output.parent / "npm-cache"
    drawings = list(icon_drawings(npm.fetch(packages, folder, npm_lock.INTEGRITY)))
    if limit is not None:
        drawings = [drawings[i * len(drawings) // limit] for i in range(min(limit, len(drawings)))]
    say(f"icons: {len(drawings):,} drawings at {size} pixels into {build.output}")
    return build_drawings(build, drawings, size, default_workers() if workers is None else workers, frozenset({style}))


def icon_drawings(tarballs: Mapping[str, Path]) -> Iterator[Drawing]:
    """Yield every drawing of the packages (name -> tarball, emojibase-data among them), in a fixed order."""
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
    """Caption and tags of an icon; None where it has a skin tone or no words."""
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
    # this set writes names without blanks; only names that emojibase knows can be split into words
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
