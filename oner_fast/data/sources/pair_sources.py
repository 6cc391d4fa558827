"""Read a user's own pairs of images and captions from a table or a folder."""

from pathlib import Path

from oner_fast.data.sources.pair_folders import folder_pairs
from oner_fast.data.sources.pair_tables import Columns, table_pairs
from oner_fast.data.sources.pair_types import Found, printable


def read_source(source: Path, columns: Columns, root: Path | None = None, limit: int | None = None) -> Found:
    """Read the pairs of a table, or of a folder with a `.txt` beside each image.

    Args:
        source: a CSV or TSV file, or a folder.
        columns: the columns of a table.
        root: the folder where a table's relative paths start; the folder of the table by default.
        limit: keep only this many pairs, the first ones.

    Raises:
        ValueError: there is no such file or folder, it is a device or pipe, it has no pair, or a table lacks the
            columns, has one of them twice, or is not UTF-8.
    """
    if source.is_dir():
        found = folder_pairs(source)
    elif source.is_file():
        found = table_pairs(source, columns, source.parent if root is None else root)
    elif source.exists():
        raise ValueError(f"no pairs at {printable(source)}: it is a device or pipe; save the table to a file first")
    else:
        raise ValueError(f"no pairs at {printable(source)}: no such file or folder")
    pairs = found.pairs[:limit]
    if not pairs:
        why = "; ".join(one.line for one in found.left_out[:5]) or "it has no rows"
        raise ValueError(f"no pairs in {printable(source)}: {why}")
    return Found(pairs, found.left_out)
