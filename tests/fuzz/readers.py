"""The readers of files from elsewhere, each with seeds and with the check that a fuzzer calls on any bytes.

A check raises nothing for any input: what its reader may raise is caught in it, and everything else is a finding, as is
a broken invariant of the result.
"""

from __future__ import annotations

import functools
import io
import json
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BLOCK = 512
_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where files need no disk
_FOLDER = tempfile.TemporaryDirectory(prefix="oner-fast-fuzz-", dir=_MEMORY)
FOLDER = Path(_FOLDER.name)


@dataclass(frozen=True)
class Reader:
    """A reader under test: `seeds` makes valid files, `check` reads any bytes, `dictionary` helps the fuzzer."""

    seeds: Callable[[], list[bytes]]
    check: Callable[[bytes], None]
    dictionary: tuple[str, ...] = ()


def picture(kind: str = "PNG", side: int = 12, mode: str = "RGB", **options: object) -> bytes:
    """A small image file."""
    from PIL import Image

    pixels = (np.arange(side * side * 3).reshape(side, side, 3) * 7 % 256).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind, **options)
    return out.getvalue()


def tar_of(names: list[str], form: int = tarfile.USTAR_FORMAT, owner: str = "") -> bytes:
    """A tar of small members."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for number, name in enumerate(names):
            data = {"json": b'{"caption": "a"}', "txt": b"a cat"}.get(name.rpartition(".")[2], b"picture")
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname = len(data), number // 2 + 1, owner
            tar.addfile(info, io.BytesIO(data))
    content = out.getvalue().rstrip(b"\0")
    return content + bytes(-len(content) % BLOCK) + bytes(2 * BLOCK)  # a short end keeps inputs small


def with_checksums(data: bytes) -> bytes:
    """Give each block that looks like a header its right checksum, so that a fuzzer passes the first test."""
    fixed = bytearray(data)
    for start in range(0, len(fixed) - BLOCK + 1, BLOCK):
        if fixed[start + 257 : start + 262] == b"ustar":
            fixed[start + 148 : start + 156] = b" " * 8
            fixed[start + 148 : start + 156] = b"%06o\0 " % sum(fixed[start : start + BLOCK])
    return bytes(fixed)


def _tar_seeds() -> list[bytes]:
    names = [f"{i:04d}.{kind}" for i in range(4) for kind in ("png", "txt")]
    long = ["folder/" * 20 + "x" * 120 + ".png", "ü.json"]
    seeds = [tar_of(names), tar_of(names, owner="oner_fast"), tar_of(["photo.v2.jpg", "README", "__a__.json"])]
    seeds += [tar_of(long, form) for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    zeroed = bytearray(tar_of(names))
    zeroed[4 * BLOCK : 7 * BLOCK] = bytes(3 * BLOCK)
    return [b"\1" + seed for seed in (*seeds, bytes(zeroed))] + [b"\0" + seeds[0], b"\0\x1f\x8b\x08"]


def check_tar(data: bytes) -> None:
    """List, scan and number a tar; read each sample of it."""
    from oner_fast.data.dataset import CorruptSample, PairDataset
    from oner_fast.data.tar_headers import Damage, members
    from oner_fast.data.tar_index import build_index, indexes_only_in_memory

    fix, content = data[:1] > b"\0", data[1:]
    content = with_checksums(content) if fix else content
    size, last = len(content), -1
    for found in members(io.BytesIO(content), size):
        if isinstance(found, Damage):
            assert 0 <= found.offset <= found.end <= size
            found.why.encode()
        else:
            assert found.offset > last and found.size >= 0
            assert found.whole == (found.offset + found.size <= size)
            last = found.offset
    path = FOLDER / "fuzz.tar"
    path.write_bytes(content)
    try:
        plain = build_index(path)
    except ValueError as error:
        assert str(path) in str(error)
        return
    again = build_index(path, len(plain) + 3, earlier=plain)
    assert len(again) >= len(plain) + 3
    there = (plain.offsets >= 0).any(axis=1)
    assert np.array_equal(again.offsets[(again.offsets >= 0).any(axis=1)], plain.offsets[there])
    assert (plain.offsets[plain.offsets >= 0] + plain.sizes[plain.offsets >= 0] <= size).all()
    for sentence in (*plain.damage, *plain.skipped, *again.damage):
        sentence.encode()
    assert len(plain.damage) <= size // 100 + 20
    with indexes_only_in_memory():
        try:
            dataset = PairDataset(path)
        except ValueError:
            return
    for i in range(len(dataset)):
        dataset.name(i).encode()
        try:
            assert dataset.read(i).caption.strip()
        except CorruptSample as error:
            str(error).encode()
    dataset.close()


def _pax_seeds() -> list[bytes]:
    return [
        b"x13 path=a.png\n",
        b"x11 size=7\n20 GNU.sparse.name=k\n",
        b"Lfolder/a.png\0",
        b"x30 mtime=1350244992.023960108\n",
    ]


def check_pax(data: bytes) -> None:
    """Read any bytes as the PAX records or the long name before a member."""
    kind = b"L" if data[:1] == b"L" else b"x"
    content = data[1:]
    header = bytearray(BLOCK)
    for start, text in ((0, b"ext"), (124, b"%011o" % len(content)), (156, kind), (257, b"ustar\x0000")):
        header[start : start + len(text)] = text
    member = tar_of(["k.png", "k.txt"])
    check_tar(b"\1" + bytes(header) + content + bytes(-len(content) % BLOCK) + member)


_COLUMNS = ("offsets", "sizes", "checksums", "names", "name_ends", "damage", "skipped", "tar_size", "format")


@functools.cache
def _valid_index() -> bytes:
    from oner_fast.data.tar_index import TarIndex, build_index

    path = FOLDER / "index.tar"
    path.write_bytes(tar_of([f"{i:04d}.{kind}" for i in range(3) for kind in ("png", "txt")]))
    build_index(path).save()
    return TarIndex.file(path).read_bytes()


def _index_seeds() -> list[bytes]:
    whole = _valid_index()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        columns = [bytes([i]) + archive.read(f"{name}.npy") for i, name in enumerate(_COLUMNS)]
    return [b"\xff" + whole, *columns]


def check_index(data: bytes) -> None:
    """Read any bytes as an index, or as one of its columns."""
    from oner_fast.data.dataset import CorruptSample, PairDataset
    from oner_fast.data.tar_index import TarIndex, build_index, stored_index

    path = FOLDER / "index.tar"
    whole = _valid_index()
    chosen, content = data[:1], data[1:]
    if chosen and chosen[0] < len(_COLUMNS):
        with zipfile.ZipFile(io.BytesIO(whole)) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        entries[f"{_COLUMNS[chosen[0]]}.npy"] = content
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for name, entry in entries.items():
                archive.writestr(name, entry)
        content = out.getvalue()
    file = TarIndex.file(path)
    file.write_bytes(content)
    tar = path.stat()
    os.utime(file, ns=(tar.st_mtime_ns, tar.st_mtime_ns))
    index, _ = stored_index(path)
    if index is None:
        return
    assert index.offsets.shape == index.sizes.shape == index.checksums.shape == (len(index), 3)
    there = index.offsets != -1
    assert (index.offsets[there] >= BLOCK).all() and (index.offsets[there] <= index.tar_size).all()
    assert (index.sizes[there] <= index.tar_size - index.offsets[there]).all()
    assert all(isinstance(line, str) for line in (*index.damage, *index.skipped))
    "".join(index.keys).encode()
    build_index(path, earlier=index)
    dataset = PairDataset.of_indexes([index])
    for i in range(min(len(dataset), 20)):
        try:
            dataset.read(i)
        except CorruptSample as error:
            str(error).encode()
    dataset.close()


def _table_seeds() -> list[bytes]:
    rows = b'filepath,title\na.png,a cat\nb.png,"a cat, black"\nc.png,"two\nlines"\n'
    return [
        rows,
        rows.replace(b",", b"\t"),
        b"\xef\xbb\xbf" + rows,
        b'filepath,title\na.png,a,b\nb.png,"open\nc.png,x\n',
    ]


def check_table(data: bytes) -> None:
    """Read any bytes as a table of pairs."""
    from oner_fast.data.sources.pair_sources import read_source
    from oner_fast.data.sources.pair_tables import Columns

    path = FOLDER / "pairs.csv"
    path.write_bytes(data)
    try:
        found = read_source(path, Columns("filepath", "title"))
    except ValueError as error:
        str(error).encode()
        return
    assert len({pair.row for pair in found.pairs}) == len(found.pairs)
    for pair in found.pairs:
        assert pair.caption.strip() and pair.name.strip()
        pair.caption.encode()
    for left in found.left_out:
        left.line.encode()


def _json_seeds() -> list[bytes]:
    listing = {"format": 1, "splits": {"train": {"shards": [{"file": "a.tar", "samples": 3, "sha256": "0"}]}}}
    texts = (json.dumps(listing), '{"caption": "a\\u00e9\\ud83d\\ude00"}', "[[1, -2.5e3, null, true], {}]", "NaN")
    return [text.encode() for text in texts] + [b"[" * 5000, b'{"a":' * 5000]


def check_json(data: bytes) -> None:
    """Read any bytes as a value, as the metadata of a sample and as a `dataset.json`."""
    from oner_fast import bounded_json
    from oner_fast.data.dataset import CorruptSample, caption_of, fields_of
    from oner_fast.data.listing import parse_listing

    try:
        value = bounded_json.loads(data, "fuzz")
    except ValueError as error:
        assert str(error).startswith("fuzz: ") and "\n" not in str(error).removesuffix("\n")
    else:
        json.dumps(value, ensure_ascii=False).encode()
    try:
        assert caption_of("k", None, fields_of("k", data)).strip()
    except CorruptSample as error:
        str(error).encode()
    try:
        splits = parse_listing(data, FOLDER / "dataset.json")
    except ValueError as error:
        assert "dataset.json" in str(error)
        return
    for shard in (shard for shards in splits.values() for shard in shards):
        assert os.path.normpath(shard.path).startswith(f"{FOLDER}/") and shard.samples >= 0


def _captions_seeds() -> list[bytes]:
    images = [{"id": 1, "file_name": "a.png", "caption": "two dogs"}, {"id": 2, "file_name": "b/a.png", "caption": "é"}]
    notes = [
        {"id": 4, "image_id": 1, "bbox": [0, 0, 4, 4.5], "tokens_positive": [[0, 3], [4, 8]], "caption": "a dog"},
        {"id": 5, "image_id": 2, "bbox": [1, 2, 3, 4], "caption": "it"},
    ]
    refs = [{"image_id": 1, "ann_id": 4, "split": "val", "sentences": [{"raw": "left"}, {"sent": "him"}]}]
    karpathy = [{"filename": "a.png", "filepath": "b", "split": "test", "sentences": [{"raw": "a dog"}, {"raw": "x"}]}]
    forms: list[dict[str, object]] = [
        {"images": images, "annotations": notes},
        {"images": images, "annotations": notes, "refs": refs},
        {"images": karpathy},
    ]
    return [json.dumps(form).encode() for form in forms]


def check_captions(data: bytes) -> None:
    """Read any bytes as json of pictures with boxes, and as json of pictures with captions."""
    from oner_fast.evaluation.boxes import read_boxes
    from oner_fast.evaluation.coco import read_captions

    path, images = FOLDER / "captions.json", FOLDER / "captions"
    images.mkdir(exist_ok=True)
    (images / "a.png").touch()
    path.write_bytes(data)
    try:
        for boxed in read_boxes(path, images):
            assert boxed.phrases and boxed.read() == b""
            for phrase in boxed.phrases:
                assert phrase.text.strip() and phrase.boxes
                assert all(len(box) == 4 and min(box[2:]) > 0 and max(map(abs, box)) < 1e9 for box in phrase.boxes)
    except (ValueError, FileNotFoundError) as error:
        assert "captions" in str(error), f"an error that does not name the file: {error}"
    try:
        for captioned in read_captions(path, images):
            assert captioned.path.is_file() and captioned.left_out >= 0
            assert captioned.captions and all(caption.strip() for caption in captioned.captions)
    except (ValueError, FileNotFoundError) as error:
        assert "captions" in str(error), f"an error that does not name the file: {error}"


_CONFIGURATION = {"image_size": 8, "patch_size": 4, "width": 8, "depth": 1, "heads": 1, "embed_dim": 4}


def _model_seeds() -> list[bytes]:
    from oner_fast.models.files import save_model
    from oner_fast.models.oner import OneR, OneRConfig

    words = {"vocab_size": 8, "max_text_tokens": 4, "projector_hidden": 4}
    names = set(OneRConfig.__dataclass_fields__)
    tower = OneR(OneRConfig(**{name: value for name, value in (_CONFIGURATION | words).items() if name in names}))
    save_model(FOLDER / "seed.safetensors", tower, "{}")
    data = (FOLDER / "seed.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].rstrip()
    return [b"\0" + header, b"\1" + json.loads(header)["__metadata__"]["config"].encode()]


def check_model(data: bytes) -> None:
    """Read any bytes as the header of a model file, or as the configuration in one, before tensors of zeros."""
    from oner_fast.models.files import load_model, read_metadata

    header = data[1:]
    if data[:1] == b"\1":
        whole = json.loads(_model_header()[0])
        whole["__metadata__"]["config"] = header.decode("utf-8", "replace")
        header = json.dumps(whole).encode()
    path = FOLDER / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(_model_header()[1]))
    for read in (read_metadata, load_model):
        try:
            read(path)
        except ValueError as error:
            assert str(path) in str(error), f"an error that does not name the file: {error}"


@functools.cache
def _model_header() -> tuple[bytes, int]:
    """The header of a valid model file, and the length of its tensors in bytes."""
    header = _model_seeds()[0][1:]
    tensors = (FOLDER / "seed.safetensors").read_bytes()
    return header, len(tensors) - 8 - int.from_bytes(tensors[:8], "little")


def _picture_seeds() -> list[bytes]:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    plain = [picture(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")]
    return [*plain, picture("JPEG", exif=exif.tobytes()), picture("PNG", mode="LA"), picture("PNG", mode="I;16")]


def check_picture(data: bytes) -> None:
    """Read any bytes as an image."""
    from oner_fast.data.dataset import CorruptSample
    from oner_fast.data.images import EvalTransform, decode

    try:
        image = decode(data, "fuzz")
    except CorruptSample as error:
        str(error).encode()
        return
    assert image.mode == "RGB" and min(image.size) >= 1
    assert EvalTransform(16)(image).shape == (3, 16, 16)


READERS = {
    "tar": Reader(_tar_seeds, check_tar, ("ustar\\x0000", "oner_fast", ".png", "L", "x", "g", "S")),
    "pax": Reader(_pax_seeds, check_pax, ("path=", "size=", "GNU.sparse.", "\\xed\\xa0\\x80")),
    "index": Reader(_index_seeds, check_index, ("<i8", "|O", "'shape': (", "True")),
    "table": Reader(_table_seeds, check_table, ('\\"\\"', "filepath", "title", "\\xef\\xbb\\xbf", "\\x00")),
    "json": Reader(_json_seeds, check_json, ('\\"splits\\"', '\\"caption\\"', "\\\\ud800", "1e999", "NaN", "../")),
    "captions": Reader(
        _captions_seeds,
        check_captions,
        ('\\"bbox\\"', '\\"tokens_positive\\"', '\\"refs\\"', '\\"sentences\\"', "1e400", "[["),
    ),
    "model": Reader(_model_seeds, check_model, ('\\"__metadata__\\"', '\\"config\\"', '\\"depth\\"', "1000000")),
    "picture": Reader(_picture_seeds, check_picture, ("IHDR", "iCCP", "eXIf", "Exif\\x00\\x00", "IDAT")),
}
