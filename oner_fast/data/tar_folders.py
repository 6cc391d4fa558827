"""Find the tars of a folder, and name the files called like tars that are not taken."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from oner_fast.data.tar_scan import printable

_COMPRESSED = re.compile(r"\.(tgz|tar\.(gz|bz2|xz|zst|lz4))$", re.IGNORECASE)


@dataclass(frozen=True)
class TarFolder:
    """The files of a folder by name, sorted.

    Attributes:
        tars: the regular files with the suffix `.tar`, in upper or lower case.
        compressed: names of the compressed tars.
        others: a sentence for each folder, broken link or device that is called like a tar.
    """

    tars: list[Path]
    compressed: list[str]
    others: list[str]

    def left_out(self) -> list[str]:
        """A sentence for each rule or file that is not taken."""
        if not self.compressed:
            return self.others
        count = len(self.compressed)
        noun = "a compressed tar is" if count == 1 else f"{count:,} compressed tars are"
        return [f"{noun} not read, such as {self.compressed[0]}; decompress it first", *self.others]


def tars_in(folder: Path) -> TarFolder:
    """List the tars of a folder, not those of its subfolders. Raises OSError."""
    tars, compressed, others = [], [], []
    for path in sorted(folder.iterdir()):
        if _COMPRESSED.search(path.name):
            compressed.append(printable(path.name))
        elif path.suffix.lower() == ".tar" and path.is_file():
            tars.append(path)
        elif path.suffix.lower() == ".tar":
            kind = "a folder" if path.is_dir() else "a device or pipe" if path.exists() else "a broken link"
            others.append(f"{printable(path.name)}: {kind}, not a tar")
    return TarFolder(tars, compressed, others)


def splits_named(tars: list[Path]) -> list[str]:
    """Names of splits that tars carry before their last dash, such as `val` in `val-000000.tar`; sorted."""
    return sorted({tar.name.rpartition("-")[0] for tar in tars} - {""})


def unlisted(folder: Path, listed: set[Path]) -> list[str]:
    """Name the tars of a folder that its `dataset.json` does not list, in one sentence if there are any."""
    names = [tar.name for tar in tars_in(folder).tars if tar not in listed]
    if not names:
        return []
    noun = "a tar is" if len(names) == 1 else f"{len(names):,} tars are"
    return [f"{noun} not read, since {folder / 'dataset.json'} does not list it, such as {printable(names[0])}"]
