"""The record of a run's evaluations, `evaluation.json`: one entry for each part of each data set."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from oner_fast.atomic import write_atomic
from oner_fast.bounded_json import load_object
from oner_fast.format_version import EVALUATION, FIELD, check_format_version

logger = logging.getLogger("oner_fast.evaluation")

FILE = "evaluation.json"
ABOUT = "about"
MODELS = ("model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "lit_model.safetensors")


def read_record(run: Path) -> dict[str, Any]:
    """Read the evaluations of a run; empty where it was not evaluated. Raises ValueError where they cannot be read."""
    path = run / FILE
    if not path.is_file():
        return {}
    try:
        record = load_object(path.read_bytes(), str(path))
    except ValueError as error:
        raise ValueError(f"{error}; remove it and run `oner-fast eval` again") from error
    about = record.get(ABOUT)
    check_format_version(path, about.get(FIELD) if isinstance(about, dict) else None, EVALUATION)
    return record


def read_figures(run: Path) -> dict[str, Any]:
    """Read the evaluations of a run's present weights, for pages that show them as the run's own.

    Figures of other weights, as of a run that was trained on since, are left out, and a warning says so.

    Raises ValueError where the record cannot be read.
    """
    record = read_record(run)
    if _is_of_others(record, model_digest(run)):
        logger.warning(
            "%s holds figures of other weights than the run has now, which are left out; run `oner-fast eval %s` again",
            run / FILE,
            run,
        )
        return {}
    return record


def _is_of_others(record: dict[str, Any], model: str | None) -> bool:
    """Tell whether a record states the digest of other weights than `model`: None stands for those of a checkpoint."""
    about = record.get(ABOUT)
    return isinstance(about, dict) and "model" in about and about["model"] != model


def model_digest(run: Path) -> str | None:
    """SHA-256 of the run's exported model, in hexadecimal; None where only checkpoints hold it."""
    for name in MODELS:
        if (run / name).is_file():
            with (run / name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
    return None


def add(run: Path, entries: dict[str, dict[str, Any]], about: dict[str, Any]) -> tuple[dict[str, Any], Path | None]:
    """Add evaluations to a run's record, and replace those of the same data and part.

    The key of an entry is its part's name (`val`, `val_new_words`, `coco`, `zero_shot`, ...). Where entries of other
    data have that key, it is `DATA:NAME`. Entries of another model would be figures of weights that are gone: the
    record that holds them is moved aside.

    Args:
        run: the run folder.
        entries: figures by the part's name; each entry states its `data`.
        about: what holds for all of them; `model` in it is the digest of the weights.

    Returns:
        The entries under their keys, with `about`; and the path of the record that was moved aside, if any.

    Raises:
        ValueError: the record that exists cannot be read.
        OSError: the record cannot be written.
    """
    record = read_record(run)
    about = {FIELD: EVALUATION, **about}
    aside = None
    if _is_of_others(record, about.get("model")):
        aside = _free_place(run, str(record[ABOUT]["model"] or "earlier"))
        (run / FILE).replace(aside)
        record = {}
    named = {_key(record, name, str(entry["data"])): entry for name, entry in entries.items()}
    record = {key: entry for key, entry in record.items() if key != ABOUT} | named | {ABOUT: about}
    # A path whose bytes are no UTF-8 has letters that UTF-8 lacks; a question mark stands for each.
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    write_atomic(run / FILE, lambda file: file.write(text.encode("utf-8", "replace")))
    return named | {ABOUT: about}, aside


def _free_place(run: Path, digest: str) -> Path:
    """Name the file that keeps the figures of an earlier model; no file that is there already is replaced."""
    name = f"evaluation.{re.sub('[^0-9a-z]', '_', digest[:8])}"
    places = (run / (f"{name}.json" if number == 1 else f"{name}.{number}.json") for number in itertools.count(1))
    return next(place for place in places if not os.path.lexists(place))


def part_of(key: str) -> str:
    """Name of the part that a key of the record stands for: `flickr:val` -> `val`."""
    return key.rpartition(":")[2]


def _key(record: dict[str, Any], name: str, data: str) -> str:
    """Key of the part `name` of `data` beside the entries of a record."""
    owner = record.get(name)
    # An entry without `data` was written before entries stated theirs; it is of the run's own data.
    if not isinstance(owner, dict) or owner.get("data", data) == data:
        return name
    return f"{data}:{name}"
