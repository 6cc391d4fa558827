"""Read a user's own pairs of images and captions from a table or a folder."""

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Pair:
    """An image and its caption.

    `row` numbers the pair in its source, `image` is the path to read, and `name` is that path as the source gives it.
    """

    row: int
    image: Path
    name: str
    caption: str


@dataclass(frozen=True)
class Columns:
    """The columns of a table, and the character between them (None: found from the header line)."""

    image: str
    caption: str
    separator: str | None = None


@dataclass(frozen=True)
class Found:
    """The pairs of a source, and one line for each row or image that was left out."""

    pairs: list[Pair]
    dropped: list[str]


def read_source(source: Path, columns: Columns, root: Path) -> Found:
    """Read the pairs of a table, or of a folder with a `.txt` beside each image.

    Raises:
        ValueError: there is no such file or folder, or a table lacks the columns, is not UTF-8 or is malformed.
    """
    if source.is_dir():
        return _folder_pairs(source)
    if source.is_file():
        return _table_pairs(source, columns, root)
    raise ValueError(f"no pairs at {source}: no such file or folder")


def digest(pairs: Sequence[Pair]) -> str:
    """SHA-1, in hexadecimal, of the rows, names and captions."""
    found = hashlib.sha1()
    for pair in pairs:
        found.update(f"{pair.row}\t{pair.name}\t{pair.caption}\n".encode())
    return found.hexdigest()


def _table_pairs(source: Path, columns: Columns, root: Path) -> Found:
    pairs: list[Pair] = []
    dropped: list[str] = []
    try:
        with source.open(newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            file.seek(0)
            table = csv.DictReader(file, delimiter=columns.separator or ("\t" if "\t" in header else ","))
            known = list(table.fieldnames or [])
            for key in (columns.image, columns.caption):
                if key not in known:
                    raise ValueError(f"no column {key!r} in {source}; it has {', '.join(known) or 'none'}")
            for i, row in enumerate(table):
                name = (row[columns.image] or "").strip()
                caption = " ".join((row[columns.caption] or "").split())
                if name and caption:
                    pairs.append(Pair(i, root / name, name, caption))
                else:
                    dropped.append(f"row {i + 2}: no {'caption' if name else 'picture'}")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8: {error}") from error
    except csv.Error as error:
        raise ValueError(f"{source} cannot be read as a table: {error}") from error
    return Found(pairs, dropped)


def _folder_pairs(source: Path) -> Found:
    pairs: list[Pair] = []
    dropped: list[str] = []
    images = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    for i, image in enumerate(images):
        name = image.relative_to(source).as_posix()
        try:
            caption = " ".join(image.with_suffix(".txt").read_text(encoding="utf-8").split())
        except FileNotFoundError:
            dropped.append(f"{name}: no {image.with_suffix('.txt').name} beside it")
            continue
        except UnicodeDecodeError:
            dropped.append(f"{name}: its caption is not UTF-8")
            continue
        if caption:
            pairs.append(Pair(i, image, name, caption))
        else:
            dropped.append(f"{name}: its caption is empty")
    return Found(pairs, dropped)
