"""An index serves the one version of the tar that it was made of, and no index that others wrote can mislead."""

import json
import logging
import os
import shutil
import time
import zipfile

import numpy as np
import pytest

from oner_fast.data.dataset import CorruptSample, PairDataset
from oner_fast.data.tar_index import TEXT, TarIndex, load_index


def captioned(tars, path, word, samples=40):
    """A tar whose size and image headers do not depend on the captions: `word` is padded, as tars are."""
    members = [
        member
        for i in range(samples)
        for member in ((f"{i:04d}.txt", f"{word} {i}".encode()), (f"{i:04d}.png", tars.draw(i)))
    ]
    return tars.write(path, members)


def test_captions_of_another_length_are_read_anew(tars, tmp_path):
    path = captioned(tars, tmp_path / "a.tar", "a cat")
    PairDataset(path)
    size = path.stat().st_size
    captioned(tars, path, "a small dog")
    assert path.stat().st_size == size
    data = PairDataset(path)
    assert list(data.captions()) == [f"a small dog {i}" for i in range(40)]


@pytest.mark.parametrize("changed", [range(40), range(20), range(0, 40, 2)])
def test_the_probe_reads_text_headers_where_even_the_time_of_change_is_kept(tars, tmp_path, changed):
    path = captioned(tars, tmp_path / "a.tar", "a cat")
    load_index(path)
    status = path.stat()
    members = [
        member
        for i in range(40)
        for member in (
            (f"{i:04d}.txt", f"{'a small dog' if i in changed else 'a cat'} {i}".encode()),
            (f"{i:04d}.png", tars.draw(i)),
        )
    ]
    tars.write(path, members)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    captions = list(PairDataset(path).captions())
    assert captions == [f"{'a small dog' if i in changed else 'a cat'} {i}" for i in range(40)]


def test_a_changed_member_that_no_probe_meets_is_never_read_as_another(tars, tmp_path):
    path = captioned(tars, tmp_path / "a.tar", "a cat", samples=400)
    index = load_index(path)
    status = path.stat()
    place = int(index.offsets[123, TEXT])
    data = bytearray(path.read_bytes())
    data[place - 512] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    dataset = PairDataset(path)
    with pytest.raises(CorruptSample, match="0123: the header of its caption, before byte .* the tar is damaged"):
        dataset.read(123)
    assert sum(1 for _ in dataset.captions()) == 399


def test_a_tar_replaced_while_it_is_read_gives_no_wrong_pair(tars, tmp_path):
    path = captioned(tars, tmp_path / "a.tar", "a cat")
    dataset = PairDataset(path)
    assert dataset.read(3).caption == "a cat 3"
    captioned(tars, path, "a small dog")  # the file that is open is written over
    for i in range(40):
        with pytest.raises(CorruptSample, match="the tar changed since its index was made"):
            dataset.read(i)


def test_a_changed_tar_is_said_and_indexed_once(tars, tmp_path, caplog):
    path = captioned(tars, tmp_path / "a.tar", "a cat")
    load_index(path)
    captioned(tars, path, "a cat", samples=41)
    with caplog.at_level(logging.WARNING, "oner_fast.data"):
        assert len(load_index(path)) == 41
        assert len(load_index(path)) == 41
    (record,) = caplog.records
    assert (
        "a.tar changed since its index was made, and is indexed again; it had 40 samples and has 41" in record.message
    )


def test_a_copied_tar_is_indexed_again_without_a_word(tars, tmp_path, caplog):
    path = captioned(tars, tmp_path / "a.tar", "a cat")
    load_index(path)
    before = TarIndex.file(path).read_bytes()
    (tmp_path / "copy").mkdir()
    for file in tmp_path.glob("a.tar*"):
        shutil.copyfile(file, tmp_path / "copy" / file.name)
        time.sleep(0.01)
    load_index(tmp_path / "copy" / "a.tar")
    assert not caplog.records
    assert TarIndex.file(tmp_path / "copy" / "a.tar").read_bytes() == before
    assert TarIndex.file(path).stat().st_mtime_ns == path.stat().st_mtime_ns


def arrays(path):
    with np.load(TarIndex.file(path)) as stored:
        return dict(stored)


def sentences(value):
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


HOSTILE = {
    "another format": lambda a: a | {"format": np.int64(1)},
    "a format that is text": lambda a: a | {"format": np.array("2")},
    "ragged offsets": lambda a: a | {"offsets": a["offsets"][:-1]},
    "two columns": lambda a: a | {"offsets": a["offsets"][:, :2].copy()},
    "one dimension": lambda a: a | {"offsets": a["offsets"].ravel()},
    "floats": lambda a: a | {"sizes": a["sizes"].astype(np.float64)},
    "objects": lambda a: a | {"sizes": a["sizes"].astype(object)},
    "big-endian": lambda a: a | {"sizes": a["sizes"].astype(">i8")},
    "by columns": lambda a: a | {"sizes": np.asfortranarray(a["sizes"])},
    "offsets beyond the file": lambda a: a | {"offsets": a["offsets"] + (1 << 40)},
    "offsets that overflow": lambda a: a | {"offsets": np.full_like(a["offsets"], (1 << 63) - 1)},
    "offsets below a header": lambda a: a | {"offsets": np.full_like(a["offsets"], 3)},
    "negative sizes": lambda a: a | {"sizes": -a["sizes"] - 5},
    "sizes beyond the file": lambda a: a | {"sizes": a["sizes"] + (1 << 40)},
    "fewer checksums": lambda a: a | {"checksums": a["checksums"][1:]},
    "keys that go back": lambda a: a | {"name_ends": a["name_ends"][::-1].copy()},
    "keys past their end": lambda a: a | {"name_ends": a["name_ends"] + 5},
    "negative keys": lambda a: a | {"name_ends": a["name_ends"] - 100},
    "damage that is no JSON": lambda a: a | {"damage": np.frombuffer(b"\xff{", np.uint8)},
    "damage that is no list": lambda a: a | {"damage": sentences({"a": 1})},
    "damage of numbers": lambda a: a | {"damage": sentences([1, 2])},
    "deep damage": lambda a: a | {"damage": np.frombuffer(b"[" * 100_000, np.uint8)},
    "half a surrogate pair": lambda a: a | {"damage": np.frombuffer(b'["\\ud800"]', np.uint8)},
    "a missing column": lambda a: {name: value for name, value in a.items() if name != "skipped"},
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_index_is_built_again(tars, tmp_path, change):
    path = captioned(tars, tmp_path / "a.tar", "a cat", samples=6)
    good = load_index(path)
    file = TarIndex.file(path)
    whole, changed = file.read_bytes(), change(arrays(path))
    with file.open("wb") as out:
        np.savez(out, allow_pickle=True, **changed)
    os.utime(file, ns=(1, path.stat().st_mtime_ns))
    again = load_index(path)
    assert again.same_samples(good) and file.read_bytes() == whole


def npy(shape, dtype="<i8", data=b""):
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        npy((1 << 40, 3)),
        npy((-1, 3)),
        npy((1 << 62, 1 << 62)),
        npy("()", "O"),
        npy("(1, (2, 3))"),
        b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535,
        b"\x93NUMPY\x03\x00",
        b"",
    ],
)
def test_an_array_of_another_shape_than_its_bytes_is_not_allocated(tars, tmp_path, content):
    path = captioned(tars, tmp_path / "a.tar", "a cat", samples=6)
    good = load_index(path)
    file = TarIndex.file(path)
    with zipfile.ZipFile(file) as whole:
        entries = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(file, "w") as out:
        for name, data in (entries | {"offsets.npy": content}).items():
            out.writestr(name, data)
    assert load_index(path).same_samples(good)


def test_a_compressed_index_is_not_unpacked(tars, tmp_path):
    path = captioned(tars, tmp_path / "a.tar", "a cat", samples=6)
    good = load_index(path)
    with zipfile.ZipFile(TarIndex.file(path), "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("offsets.npy", npy((1 << 23, 3), data=bytes(24 << 23)))
    assert load_index(path).same_samples(good)
