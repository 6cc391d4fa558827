"""Random access to the image-text pairs of tars in webdataset's format, img2dataset's tars included."""

import glob
import logging
import os
import threading
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

from oner_fast.bounded_json import load_object
from oner_fast.data.budget import BUDGET, excess
from oner_fast.data.listing import read_listing
from oner_fast.data.tar_folders import splits_named, tars_in, unlisted
from oner_fast.data.tar_headers import BLOCK
from oner_fast.data.tar_index import IMAGE, META, TEXT, TarIndex, load_index
from oner_fast.data.tar_scan import printable

logger = logging.getLogger("oner_fast.data")

_OPEN_FILES = 256
_LIMITS = {IMAGE: "image_bytes", TEXT: "caption_bytes", META: "json_bytes"}
_NAMES = {IMAGE: "image", TEXT: "caption", META: "json"}


class CorruptSample(ValueError):
    """A sample cannot be read, or is over its budget: `name` says which, `why` says why."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(name, why)
        self.name = name
        self.why = why

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"


@dataclass(frozen=True)
class RawPair:
    """A pair as stored: the encoded image, its caption, and the metadata of its json member."""

    key: str
    image: bytes
    caption: str
    meta: dict[str, Any]


class PairDataset:
    """The pairs of a split, numbered from 0 in the order of the shards' names and of the samples in each shard.

    Each process opens a file when it first reads from it.

    Args:
        path: a dataset folder, a tar, a glob or brace pattern, several of those with `::` between them, or a list of
            those.
        split: the split of a folder to read. Its shards are those that `dataset.json` lists, else `<split>-*.tar`,
            else, for "train", every tar.

    Attributes:
        damage: the damage that the indexes found, one sentence each, also logged once. A damaged sample keeps its
            number and raises CorruptSample when it is read.
        skipped: a sentence for each rule by which members that are no part of a sample are left out.

    Raises:
        ValueError: nothing matches `path`, the split is unknown, a tar is compressed, or there is no sample.
    """

    path: str | Path | Sequence[str | Path]
    damage: list[str]
    skipped: list[str]

    def __init__(self, path: str | Path | Sequence[str | Path], split: str = "train") -> None:
        self.path = path
        self.split = split
        shards = [(load_index(tar, expected), expected) for tar, expected in _shards(path, split)]
        self._take([index for index, _ in shards])
        self.damage = []
        for index, expected in shards:
            self.damage += index.damage
            if expected is not None and len(index) > expected:
                self.damage.append(f"{index.path.name}: {len(index)} samples, and dataset.json lists {expected}")
        self.skipped = [sentence for index, _ in shards for sentence in index.skipped]
        for sentence in self.damage:
            logger.warning("damaged data: %s", sentence)
        for sentence in self.skipped:
            logger.info("left out: %s", sentence)
        if len(self) == 0:
            why = (self.damage or self.skipped or ["the tars hold no image or caption members"])[0]
            raise ValueError(f"no samples in {path}: {why}")

    @classmethod
    def of_indexes(cls, indexes: Sequence[TarIndex]) -> Self:
        """Read the samples of indexes that are held in memory, in their order."""
        dataset = cls.__new__(cls)
        dataset.path, dataset.split = [index.path for index in indexes], ""
        dataset.damage, dataset.skipped = [], []
        dataset._take(indexes)
        return dataset

    def _take(self, indexes: Sequence[TarIndex]) -> None:
        ends = [0, *accumulate(len(index) for index in indexes)]
        self._shards, self._first, self._length = list(indexes), ends[:-1], ends[-1]
        self._reset()

    def _reset(self) -> None:
        self._files: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_files", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; the next read opens them again."""
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)
        self._files = OrderedDict()

    @property
    def indexes(self) -> list[TarIndex]:
        """Indexes of the tars, in order."""
        return list(self._shards)

    @property
    def shards(self) -> list[Path]:
        """Paths of the tars, in order."""
        return [shard.path for shard in self._shards]

    def name(self, i: int) -> str:
        """Name of sample `i` for messages: its tar and its key. Raises IndexError outside the dataset."""
        shard, row = self._locate(i)
        index = self._shards[shard]
        key = index.key(row)
        if not key.isprintable():
            key = repr(key)[1:-1]
        return f"{printable(index.path.name)}:{key or f'sample {row}'}"

    def read(self, i: int, meta: bool = True) -> RawPair:
        """Read sample `i`. Where `meta` is false, its metadata are left empty.

        Raises:
            CorruptSample: a member is missing, cut off or malformed, is not the one that was indexed, or is larger than
                `budget.BUDGET` allows; or the caption is empty.
            IndexError: `i` is outside the dataset.
        """
        shard, row = self._there(i)
        text = self._member(i, shard, row, TEXT)
        fields = self._fields(i, shard, row) if meta or text is None else {}
        image = self.picture(i)
        caption = caption_of(self.name(i), text, fields)
        return RawPair(self._shards[shard].key(row), image, caption, fields if meta else {})

    def picture(self, i: int) -> bytes:
        """Read the encoded image of sample `i`, which may lack a caption. Raises as `read` does."""
        shard, row = self._there(i)
        image = self._member(i, shard, row, IMAGE)
        if image is None:
            raise CorruptSample(self.name(i), "it has no image")
        return image

    def caption(self, i: int) -> str:
        """Read the caption of sample `i` without its image. Raises as `read` does."""
        shard, row = self._there(i)
        text = self._member(i, shard, row, TEXT)
        return caption_of(self.name(i), text, self._fields(i, shard, row) if text is None else {})

    def meta(self, i: int) -> dict[str, Any]:
        """Read the json member of sample `i` without its image; empty where there is none. Raises as `read`."""
        shard, row = self._there(i)
        return self._fields(i, shard, row)

    def captions(self) -> Iterator[str]:
        """Iterate over the readable captions, in order; the log names each that cannot be read."""
        for i in range(len(self)):
            try:
                yield self.caption(i)
            except CorruptSample as error:
                logger.warning("left out of the captions: %s", error)

    def _locate(self, i: int) -> tuple[int, int]:
        if not 0 <= i < self._length:
            raise IndexError(f"sample {i} is not in a dataset of {self._length}")
        shard = bisect_right(self._first, i) - 1
        return shard, i - self._first[shard]

    def _there(self, i: int) -> tuple[int, int]:
        """Locate a sample of which at least one member is there."""
        shard, row = self._locate(i)
        if (self._shards[shard].offsets[row] < 0).all():
            raise CorruptSample(self.name(i), "it was lost with a damaged part of its tar")
        return shard, row

    def _fields(self, i: int, shard: int, row: int) -> dict[str, Any]:
        data = self._member(i, shard, row, META)
        return fields_of(self.name(i), data) if data is not None else {}

    def _member(self, i: int, shard: int, row: int, kind: int) -> bytes | None:
        index = self._shards[shard]
        offset, size = int(index.offsets[row, kind]), int(index.sizes[row, kind])
        if offset < 0:
            return None
        if over := excess(_LIMITS[kind], size):
            raise CorruptSample(self.name(i), over)
        try:
            with self._lock:
                data = os.pread(self._open(shard), BLOCK + size, offset - BLOCK)
        except OSError as error:
            raise CorruptSample(self.name(i), f"cannot be read ({error.strerror})") from error
        if len(data) != BLOCK + size:
            there = max(0, len(data) - BLOCK)
            raise CorruptSample(self.name(i), f"cut off: {there} of {size} bytes at byte {offset}")
        if zlib.crc32(memoryview(data)[:BLOCK]) != int(index.checksums[row, kind]):
            raise CorruptSample(self.name(i), self._other_header(index, _NAMES[kind], offset))
        return data[BLOCK:]

    @staticmethod
    def _other_header(index: TarIndex, what: str, offset: int) -> str:
        tar = index.path.stat()
        if (tar.st_size, tar.st_mtime_ns) != (index.tar_size, index.tar_mtime_ns):
            return f"the tar changed since its index was made, so the {what} at byte {offset} may be another sample's"
        return f"the header of its {what}, before byte {offset}, is not the one that was indexed: the tar is damaged"

    def _open(self, shard: int) -> int:
        descriptor = self._files.get(shard)
        if descriptor is None:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            descriptor = os.open(self._shards[shard].path, os.O_RDONLY | os.O_CLOEXEC)
            self._files[shard] = descriptor
        self._files.move_to_end(shard)
        return descriptor


def caption_of(name: str, text: bytes | None, fields: dict[str, Any]) -> str:
    """Caption of a sample, from its text member or else its metadata, without surrounding white space.

    Raises CorruptSample(name, why) where there is none, it is empty or too long, is not UTF-8 or holds a NUL byte.
    """
    if text is None:
        caption = fields.get("caption")
        if not isinstance(caption, str):
            raise CorruptSample(name, "it has no caption")
        length = len(caption.encode("utf-8", "replace"))
    else:
        caption, length = "", len(text)
    if over := excess("caption_bytes", length):
        raise CorruptSample(name, over)
    if text is not None:
        try:
            caption = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise CorruptSample(name, f"its caption is not UTF-8 ({error.reason})") from error
    caption = caption.strip()
    if "\0" in caption:  # zeroed bytes, or UTF-16
        raise CorruptSample(name, "its caption holds a NUL byte")
    if not caption:
        raise CorruptSample(name, "its caption is empty")
    return caption


def fields_of(name: str, data: bytes) -> dict[str, Any]:
    """Fields of a json member. Raises CorruptSample(name, why) where it holds no JSON object within the budget."""
    if over := excess("json_bytes", len(data)):
        raise CorruptSample(name, over)
    try:
        return load_object(data, name, max_depth=BUDGET.json_depth)
    except ValueError as error:
        raise CorruptSample(name, str(error).removeprefix(f"{name}: ")) from error


def sources_of(path: str) -> list[str]:
    """Take apart the sources that a string names: `a::b` are a and b, as for open_clip.

    A file or folder that has such a name is one source.

    Raises:
        ValueError: there is nothing before or after a `::`.
    """
    if "::" not in path or Path(path).exists():
        return [path]
    sources = path.split("::")
    if not all(sources):
        raise ValueError(f"{path!r} has nothing on one side of '::', which stands between two sources")
    return sources


def _shards(path: str | Path | Sequence[str | Path], split: str) -> list[tuple[Path, int | None]]:
    """Tars that a path names, each with its number of samples where dataset.json states it."""
    if not isinstance(path, (str, Path)):
        return [shard for one in path for shard in _shards(one, split)]
    if len(several := sources_of(str(path))) > 1:
        return [shard for one in several for shard in _shards(one, split)]
    place = Path(path)
    if place.is_dir():
        return _folder(place, split)
    if place.is_file():
        return [(place, None)]
    found = sorted(Path(match) for pattern in _braces(str(path)) for match in glob.glob(pattern, recursive=True))
    if not found:
        raise ValueError(f"no dataset at {str(path)!r}: no such folder or tar, and as a pattern it matches no file")
    return [(tar, None) for tar in found]


def _folder(folder: Path, split: str) -> list[tuple[Path, int | None]]:
    splits = read_listing(folder)
    if splits is not None:
        if split not in splits:
            raise ValueError(f"unknown split {split!r} in {folder}; it has {', '.join(splits)}")
        missing = [shard.path.name for shard in splits[split] if not shard.path.is_file()]
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(missing)}, which its dataset.json lists; build the data again")
        for sentence in unlisted(folder, {shard.path for shards in splits.values() for shard in shards}):
            logger.warning("left out: %s", sentence)
        return [(shard.path, shard.samples) for shard in splits[split]]
    found = tars_in(folder)
    tars, compressed = found.tars, found.compressed
    chosen = [tar for tar in tars if tar.name.startswith(f"{split}-")]
    named = splits_named(tars)
    if not chosen and split == "train" and not named:
        chosen = tars
    if compressed and not chosen:
        raise ValueError(
            f"{folder} holds {len(compressed)} compressed tars, such as {compressed[0]}, and samples are read from "
            "plain tars in any order; decompress them, for example with `gzip -d *.tar.gz`"
        )
    of_no_split = [tar.name for tar in tars if tar not in chosen and "-" not in tar.name]
    if chosen and of_no_split:
        found.others.append(f"{len(of_no_split):,} tars named by no split, such as {of_no_split[0]}")
    for sentence in found.left_out():
        logger.warning("left out of %s: %s", folder, sentence)
    if not chosen:
        known = f"splits found: {', '.join(named)}" if named else f"{len(tars)} tars found, none named by a split"
        raise ValueError(f"no tar of split {split!r} in {folder}; {known}")
    return [(tar, None) for tar in chosen]


def _braces(pattern: str) -> list[str]:
    """Expand webdataset's brace ranges, such as shard-{00000..00009}.tar."""
    if "{" not in pattern:
        return [pattern]
    import braceexpand  # webdataset installs it; only such patterns need it

    return list(braceexpand.braceexpand(pattern))
