"""Every member of a tar is taken, or counted and named with the rule; a file that is no tar is called what it is."""

import bz2
import gzip
import io
import json
import lzma
import tarfile

import pytest

from oner_fast.data.dataset import CorruptSample, PairDataset
from oner_fast.data.tar_index import build_index

DOT = "a key ends at the first dot of its name; rename it with no other dot"


@pytest.mark.parametrize(
    "names, taken, counted",
    [
        (["photo.v2.jpg", "photo.v2.txt"], 1, {"v2": 2}),
        (["22.05.png", "22.05.txt", "22.png", "22.txt", "23.05.png"], 2, {"05": 3}),
        (["a/b.c/photo.v2.JPG"], 1, {"v2": 1}),
        ([f"{i}.v2.webp" for i in range(7)], 1, {"v2": 7}),
    ],
)
def test_keys_with_dots_are_damage(tars, tmp_path, names, taken, counted):
    members = [(name, tars.draw(1)) for name in names] + tars.pair(0)
    index = build_index(tars.write(tmp_path / "a.tar", members))
    assert len(index) == taken
    said = [one for one in index.damage if DOT in one]
    assert len(said) == 1 and sum(counted.values()) == int(said[0].split()[1])
    assert repr(names[0]) in said[0]


def test_a_column_that_every_sample_has_is_left_out_by_rule(tars, tmp_path):
    members = [m for i in range(4) for m in [*tars.pair(i), (f"{i:09d}.seg.png", b"s"), (f"{i:09d}.npy", b"n")]]
    index = build_index(tars.write(tmp_path / "a.tar", members))
    assert index.damage == []
    assert [one.split(": ")[1].split(" (")[0] for one in sorted(index.skipped)] == ["4 members are not taken"] * 2
    assert any("'seg.png' is another column of the samples" in one for one in index.skipped)


def test_members_of_other_kinds_are_counted_by_rule(tars, tmp_path):
    members = [("README", b"x"), ("__meta__.json", b"{}"), (".hidden.png", b"x"), ("a.npy", b"n"), *tars.pair(0)]
    data = PairDataset(tars.write(tmp_path / "a.tar", members))
    assert len(data) == 1 and data.damage == []
    assert len(data.skipped) == 4 and all("a.tar: 1 member is not taken (" in one for one in data.skipped)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_called_as_pictures_are_damage(tars, tmp_path, kind):
    path = tars.write(tmp_path / "a.tar", tars.pair(0))
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("link.png")
        info.type, info.linkname = kind, "000000000.png"
        tar.addfile(info)
    index = build_index(path)
    assert len(index) == 1
    assert any("1 member is not taken (a " in one and "only plain files are read" in one for one in index.damage)


FOREIGN = [
    ("x.tar.gz", gzip.compress, r"x.tar.gz is gzip-compressed.* `gzip -d x.tar.gz`"),
    ("y.tar", gzip.compress, r"y.tar is gzip-compressed.* `mv y.tar y.tar.gz && gzip -d y.tar.gz`"),
    ("x.tar.xz", lzma.compress, "xz-compressed.* `xz -d x.tar.xz`"),
    ("x.tar", bz2.compress, "bzip2-compressed"),
    ("x.tar", lambda _: b"\x28\xb5\x2f\xfd" + bytes(600), "zstd-compressed"),
    ("x.tar", lambda _: b"\xef\xbb\xbf\n <!DOCTYPE html><html>", "is an HTML page, not a tar"),
    ("x.tar", lambda _: b"<html>404</html>" * 99, "is an HTML page, not a tar"),
    ("x.tar", lambda _: b'<?xml version="1.0"?><Error>', "is an XML text, not a tar"),
    ("x.tar", lambda _: b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer.*git lfs pull"),
    ("x.tar", lambda _: b"PK\x03\x04" + bytes(50), "is a zip file, not a tar"),
    ("x.tar", lambda _: b"", r"is empty \(0 bytes\)"),
    ("x.tar", lambda _: b"just text", "is not a tar"),
    ("x.tar", lambda _: b"\x89PNG" * 200, "is not a tar"),
]


@pytest.mark.parametrize("name, make, why", FOREIGN)
def test_a_file_that_is_no_tar_is_called_what_it_is(tars, tmp_path, name, make, why):
    plain = tars.write(tmp_path / "plain", tars.pairs(range(2))).read_bytes()
    (tmp_path / name).write_bytes(make(plain))
    with pytest.raises(ValueError, match=why):
        PairDataset(tmp_path / name)


def test_a_folder_of_compressed_tars(tars, tmp_path, caplog):
    (tmp_path / "0.tar.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "1.tgz").write_bytes(b"\x1f\x8b")
    with pytest.raises(ValueError, match=r"holds 2 compressed tars, such as 0.tar.gz, .* `gzip -d \*.tar.gz`"):
        PairDataset(tmp_path)
    tars.write(tmp_path / "2.tar", tars.pair(0))
    assert len(PairDataset(tmp_path)) == 1
    assert "2 compressed tars are not read, such as 0.tar.gz" in caplog.text


@pytest.mark.parametrize(
    "extension, data, why",
    [
        ("txt", b"a" * (65 << 10), "caption_bytes 66,560, at most 65,536"),
        ("json", b" " * (2 << 20), "json_bytes 2,097,152, at most 1,048,576"),
        ("json", b"[" * 100_000, "its JSON is nested deeper than 32 levels"),
        ("json", b'{"caption": "\\ud800"}', "half a surrogate pair"),
        ("json", json.dumps({"caption": "é" * 40_000}).encode(), "caption_bytes 80,000, at most"),
        ("json", b'{"caption": ' + b"9" * 5000 + b"}", "its JSON cannot be read"),
    ],
)
def test_a_sample_over_the_budget_is_corrupt_and_named(tars, tmp_path, extension, data, why):
    members = [("k.png", tars.draw(0)), (f"k.{extension}", data), *tars.pair(1)]
    dataset = PairDataset(tars.write(tmp_path / "a.tar", members))
    with pytest.raises(CorruptSample, match=f"a.tar:k: .*{why}"):
        dataset.read(0)
    assert dataset.read(1).caption == tars.caption(1)


def test_a_byte_order_mark_is_no_part_of_a_caption(tars, tmp_path):
    members = [("k.png", tars.draw(0)), ("k.txt", b"\xef\xbb\xbfa cat")]
    assert PairDataset(tars.write(tmp_path / "a.tar", members)).read(0).caption == "a cat"


def test_keys_cannot_write_into_the_log(tars, tmp_path):
    members = [("a\n\x1b[31mb.png", tars.draw(0))]
    data = PairDataset(tars.write(tmp_path / "a.tar", members))
    assert data.name(0) == r"a.tar:a\n\x1b[31mb"
    buffer = io.BytesIO(data.picture(0))
    assert buffer.getvalue() == tars.draw(0)
