"""Read a user's pairs from a CSV or TSV file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from oner_fast.data.picture_formats import SUFFIXES
from oner_fast.data.sources.pair_types import (
    LONG_CAPTION,
    NO_CAPTION,
    NO_PICTURE,
    Found,
    LeftOut,
    Pair,
    is_too_long,
    plain_caption,
    printable,
)
from oner_fast.data.sources.tables import BadRow, Table, lines_of

_SHOWN = 50  # columns that an error names, and characters of each


@dataclass(frozen=True)
class Columns:
    """The columns of a table, and the character between them (None: found from the header line)."""

    image: str
    caption: str
    separator: str | None = None


def table_pairs(source: Path, columns: Columns, root: Path) -> Found:
    """Read the pairs of a table; relative paths of images start at `root`.

    A row is named by the number of the line where it starts.

    Raises:
        ValueError: the table lacks the columns, has one of them twice, or is not UTF-8.
    """
    with source.open("rb") as file:
        table = Table(lines_of(file), printable(source), columns.separator, (columns.image, columns.caption))
        return pairs_of(table, columns, root, printable(source))


def pairs_of(table: Table, columns: Columns, root: Path, name: str) -> Found:
    """Read the pairs of an open table, which is called `name` in errors. Raises as `table_pairs`."""
    image, caption = (_column(table, key, name) for key in (columns.image, columns.caption))
    if image == caption:
        raise ValueError(f"column {columns.image!r} is named for images and captions: --csv-caption-key names another")

    def begins_row(fields: Sequence[str]) -> bool:
        return fields[image].strip().lower().endswith(SUFFIXES)

    pairs: list[Pair] = []
    left_out: list[LeftOut] = []
    for i, row in enumerate(table.rows(begins_row)):
        if isinstance(row, BadRow):
            left_out.append(LeftOut(row.rule, f"row {row.line}: {row.why}"))
            continue
        path, text = plain_path(row.fields[image]), plain_caption(row.fields[caption])
        if not path:
            left_out.append(LeftOut(NO_PICTURE, f"row {row.line}: no picture"))
        elif not text:
            left_out.append(LeftOut(NO_CAPTION, f"row {row.line}: no caption"))
        elif is_too_long(text):
            left_out.append(LeftOut(LONG_CAPTION, f"row {row.line}: a caption of {len(text.encode()):,} bytes"))
        else:
            pairs.append(Pair(i, root / path, printable(path), text))
    return Found(pairs, left_out)


def plain_path(text: str) -> str:
    """Strip white space around a path; what programs write for a missing one gives ""."""
    path = text.strip()
    return path if plain_caption(path) else ""


def _column(table: Table, key: str, name: str) -> int:
    found = table.header.count(key)
    if found == 1:
        return table.header.index(key)
    if found:
        raise ValueError(f"{name} has {found} columns {key!r}; rename all but one")
    more = f" and {len(table.header) - _SHOWN:,} more" if len(table.header) > _SHOWN else ""
    columns = ", ".join(column[:_SHOWN] for column in table.header[:_SHOWN]) + more
    raise ValueError(
        f"no column {key!r} in {name}; it has {columns}: name its columns with --csv-img-key and --csv-caption-key"
    )
