"""Read a user's pairs from a folder: images, each with a `.txt` of the same name beside it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from oner_fast.data.budget import BUDGET
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

HIDDEN = "hidden files and folders"
OTHER = "files that are neither images nor captions"
TWICE = "folders reached twice"
UNREADABLE = "files and folders that cannot be read"

_TEXT = ".txt"


def folder_pairs(source: Path) -> Found:
    """Read the pairs of a folder and its subfolders, those behind symbolic links included.

    Suffixes count in upper and lower case. Two images of the same name share the caption beside them. A folder is read
    once, however many links lead to it. What gives no pair is left out by a rule and named.
    """
    walk = _Walk(source)
    pairs: list[Pair] = []
    images: list[tuple[str, str | None]] = []
    for files in walk.folders():
        images += _with_captions(files, walk.left_out)
    images.sort(key=lambda one: one[0].split(os.sep))
    for i, (image, text) in enumerate(images):
        found = _caption(source, image, text)
        if isinstance(found, LeftOut):
            walk.left_out.append(found)
        else:
            pairs.append(Pair(i, source / image, printable(image), found))
    walk.left_out.sort(key=lambda one: (one.rule, one.line))
    return Found(pairs, walk.left_out)


def _with_captions(files: list[str], left_out: list[LeftOut]) -> Iterator[tuple[str, str | None]]:
    """Yield each image among the files of one folder with the caption file of the same name."""
    captions: dict[str, str] = {}
    images = []
    for file in sorted(files, reverse=True):  # a.txt comes after a.TXT, and is the one that counts
        stem, suffix = os.path.splitext(file)
        if suffix.lower() == _TEXT:
            if stem in captions:
                left_out.append(LeftOut(NO_PICTURE, f"{printable(captions[stem])}: {printable(file)} comes before it"))
            captions[stem] = file
        elif suffix.lower() in SUFFIXES:
            images.append(file)
        else:
            left_out.append(LeftOut(OTHER, f"{printable(file)}: {suffix or 'no suffix'}"))
    used = set()
    for file in images:
        stem = os.path.splitext(file)[0]
        used.add(stem)
        yield file, captions.get(stem)
    for stem in captions.keys() - used:
        left_out.append(LeftOut(NO_PICTURE, f"{printable(captions[stem])}: no image beside it"))


def _caption(source: Path, image: str, text: str | None) -> str | LeftOut:
    """Read the caption of an image, both relative to `source`."""
    name = printable(image)
    if text is None:
        wanted = os.path.basename(os.path.splitext(image)[0]) + _TEXT
        return LeftOut(NO_CAPTION, f"{name}: no {printable(wanted)} beside it")
    path = source / text
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return LeftOut(UNREADABLE, f"{printable(text)}: not a regular file")
        with path.open("rb") as file:
            data = file.read(2 * BUDGET.caption_bytes + 1)
        caption = plain_caption(data.decode("utf-8-sig", "strict"))
    except OSError as error:
        return LeftOut(UNREADABLE, f"{printable(text)}: {error.strerror}")
    except UnicodeDecodeError:
        if len(data) <= 2 * BUDGET.caption_bytes:
            return LeftOut(NO_CAPTION, f"{name}: its caption is not UTF-8")
        caption = ""
    if len(data) > 2 * BUDGET.caption_bytes or is_too_long(caption):
        return LeftOut(LONG_CAPTION, f"{name}: a caption over {BUDGET.caption_bytes:,} bytes")
    if "\0" in caption:
        return LeftOut(NO_CAPTION, f"{name}: its caption holds a NUL byte; is it UTF-16?")
    return caption or LeftOut(NO_CAPTION, f"{name}: its caption is empty")


@dataclass
class _Walk:
    """Walk over the folders below `root`: first the real ones, then those behind symbolic links."""

    root: Path
    left_out: list[LeftOut] = field(default_factory=list)

    def folders(self) -> Iterator[list[str]]:
        """Yield the files of each folder, as paths relative to the root."""
        seen: set[tuple[int, int]] = set()
        real: list[str] = [""]
        linked: list[str] = []
        while real or linked:
            folder = real.pop() if real else linked.pop(0)
            try:
                status = os.stat(self.root / folder)
                if (status.st_dev, status.st_ino) in seen:
                    self._leave_out(TWICE, folder, "its files are read under another name")
                    continue
                seen.add((status.st_dev, status.st_ino))
                with os.scandir(self.root / folder) as entries:
                    found = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                if not folder:
                    raise
                self._leave_out(UNREADABLE, folder, error.strerror or "unreadable")
                continue
            files = []
            for entry in found:
                path = os.path.join(folder, entry.name)
                if entry.name.startswith("."):
                    self._leave_out(HIDDEN, path, "its name begins with a dot")
                elif _is(entry, stat.S_ISDIR):
                    (linked if entry.is_symlink() else real).append(path)
                elif _is(entry, stat.S_ISREG):
                    files.append(path)
                else:
                    self._leave_out(UNREADABLE, path, "a broken link" if entry.is_symlink() else "not a regular file")
            yield files

    def _leave_out(self, rule: str, path: str, why: str) -> None:
        self.left_out.append(LeftOut(rule, f"{printable(path)}: {why}"))


def _is(entry: os.DirEntry[str], kind: Callable[[int], bool]) -> bool:
    """Tell whether an entry, or what its link leads to, is of a kind; False where the link leads nowhere."""
    try:
        return kind(entry.stat().st_mode)
    except OSError:
        return False
