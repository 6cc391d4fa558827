"""The file `evaluation.json` of a run: figures by data and split, to which each evaluation adds its own.

Its entries are the splits of the run's own data. `other_data` holds the same entries for each other place: the data of
`--data`, the captions of `--coco-json`, the images of `--image-folder`. Each place has its own `about`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from oner_fast import bounded_json
from oner_fast.format_version import EVALUATION, FIELD, check_format_version

OTHERS = "other_data"
_PARTS = ("_seen_words", "_new_words")


def read_evaluation(run: Path) -> dict[str, Any]:
    """Content of evaluation.json; empty where the run was not evaluated. A file without a version is read too.

    Raises:
        ValueError: the file is not JSON, or a newer oner_fast wrote it.
    """
    path = run / "evaluation.json"
    if not path.is_file():
        return {}
    try:
        content = bounded_json.load_object(path.read_bytes(), str(path))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON; move it away and run `oner-fast eval` again: {error}") from error
    check_format_version(path, content.get(FIELD), EVALUATION)
    return content


def merged(content: dict[str, Any], place: str, entries: dict[str, Any]) -> dict[str, Any]:
    """Return `content` with the entries of one place added; an entry of the same place and split is replaced.

    Args:
        content: the file's content.
        place: the data that were evaluated; empty for the run's own.
        entries: figures by split, and `about`.
    """
    others = content.get(OTHERS)
    others = dict(others) if isinstance(others, dict) else {}
    own = {key: value for key, value in content.items() if key not in (FIELD, OTHERS)}
    if place:
        before = others.get(place)
        others[place] = _added(before if isinstance(before, dict) else {}, entries)
    else:
        own = _added(own, entries)
    return {FIELD: EVALUATION, **own, **({OTHERS: others} if others else {})}


def flattened(content: dict[str, Any]) -> dict[str, Any]:
    """Return one entry for each place and split: the run's own under their names, others as `place: split`."""
    flat = {key: value for key, value in content.items() if key not in (FIELD, OTHERS)}
    others = content.get(OTHERS)
    for place, entries in (others if isinstance(others, dict) else {}).items():
        name = Path(str(place)).name or str(place)
        for key, entry in (entries if isinstance(entries, dict) else {}).items():
            if key == "about" or not isinstance(entry, dict):
                continue
            if "top1" in entry:  # the classification of a folder of classes
                flat.setdefault(name, {})[key] = {"class": entry}
            else:
                flat[name if key == "coco" else f"{name}: {key}"] = entry
    return flat


def _added(before: dict[str, Any], entries: dict[str, Any]) -> dict[str, Any]:
    """Replace each split that was evaluated again, with its parts."""
    again = {key for key in entries for key in (key, *(key + part for part in _PARTS))}
    return {key: value for key, value in before.items() if key not in again} | entries
