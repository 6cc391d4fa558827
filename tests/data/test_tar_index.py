import json
import tarfile

import numpy as np
import pytest

from oner_fast.data import tar_index
from oner_fast.data.tar_index import IMAGE, META, TEXT, TarIndex, build_index, load_index


def bytes_at(index, i, kind):
    with index.path.open("rb") as file:
        file.seek(index.offsets[i, kind])
        return file.read(index.sizes[i, kind])


def header_place(path, name):
    with tarfile.open(path) as tar:
        return tar.getmember(name).offset


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 0x55
    path.write_bytes(data)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_index_finds_the_written_members(tars, tmp_path, form):
    long = "folder/" * 20 + "x" * 120  # longer than a header holds
    members = tars.pairs(range(5)) + [("a/b/key.jpg", b"J"), ("a/b/key.txt", "über".encode())]
    if form != tarfile.USTAR_FORMAT:
        members += [(f"{long}.png", b"L"), (f"{long}.txt", b"long"), ("ключ.png", b"K"), ("ключ.txt", b"key")]
    index = build_index(tars.write(tmp_path / "a.tar", members, form))
    assert index.damage == []
    assert index.keys[:6] == [f"{i:09d}" for i in range(5)] + ["a/b/key"]
    assert index.keys[6:] == ([long, "ключ"] if form != tarfile.USTAR_FORMAT else [])
    contents = dict(members)
    for i, key in enumerate(index.keys):
        assert bytes_at(index, i, TEXT) == contents[f"{key}.txt"]
        assert bytes_at(index, i, IMAGE) == (contents.get(f"{key}.png") or contents[f"{key}.jpg"])
    assert bytes_at(index, 2, META) == contents["000000002.json"]
    assert index.offsets[5, META] == index.sizes[5, META] == -1


def test_agrees_with_tarfile_on_offsets(tars, tmp_path):
    path = tars.write(tmp_path / "a.tar", tars.pairs(range(30)))
    index = build_index(path)
    with tarfile.open(path) as tar:
        expected = [member.offset_data for member in tar if member.name.endswith(".png")]
    assert index.offsets[:, IMAGE].tolist() == expected


def test_only_pairs_count(tars, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "x"
        tar.addfile(link)
    assert len(build_index(tmp_path / "a.tar")) == 0
    members = [("README", b"x"), ("__meta__.json", b"{}"), ("k.seg.png", b"s"), ("k.npy", b"n"), *tars.pair(1)]
    assert build_index(tars.write(tmp_path / "b.tar", members)).keys == ["000000001"]


def test_upper_case_extensions_and_scattered_members(tars, tmp_path):
    members = [("a.PNG", b"1"), ("b.jpg", b"2"), ("a.txt", b"a"), ("b.txt", b"b")]
    index = build_index(tars.write(tmp_path / "a.tar", members))
    assert index.keys == ["a", "b"] and index.damage == []
    assert bytes_at(index, 1, TEXT) == b"b"


def test_the_index_is_saved_beside_the_tar_with_fixed_bytes(tars, tmp_path):
    path = tars.write(tmp_path / "a.tar", tars.pairs(range(4)))
    first = load_index(path)
    stored = TarIndex.file(path).read_bytes()
    assert TarIndex.file(path).name == "a.tar.index.npz"
    TarIndex.file(path).unlink()
    load_index(path)
    assert TarIndex.file(path).read_bytes() == stored
    again = load_index(path)
    assert again.keys == first.keys and np.array_equal(again.offsets, first.offsets)
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["a.tar", "a.tar.index.npz"]


def test_a_current_index_is_used_without_a_scan(tars, tmp_path, monkeypatch):
    path = tars.write(tmp_path / "a.tar", tars.pairs(range(4)))
    load_index(path)
    monkeypatch.setattr(tar_index, "scan_tar", lambda *_: pytest.fail("scanned"))
    assert len(load_index(path)) == 4


@pytest.mark.parametrize("content", [b"", b"not a zip", None])
def test_a_damaged_or_foreign_index_is_rebuilt(tars, tmp_path, content):
    path = tars.write(tmp_path / "a.tar", tars.pairs(range(4)))
    load_index(path)
    file = TarIndex.file(path)
    file.write_bytes(file.read_bytes()[:200] if content is None else content)
    assert len(load_index(path)) == 4
    assert len(file.read_bytes()) > 200


def test_another_tar_of_the_same_size_is_noticed(tars, tmp_path):
    path = tars.write(tmp_path / "a.tar", [("a.png", b"1" * 100), ("a.txt", b"a")])
    size, _ = path.stat().st_size, load_index(path)
    tars.write(path, [("b.txt", b"b"), ("b.png", b"2" * 90)])
    assert path.stat().st_size == size
    index = load_index(path)
    assert index.keys == ["b"] and bytes_at(index, 0, IMAGE) == b"2" * 90


def test_a_folder_that_cannot_be_written_is_read(tars, tmp_path, monkeypatch):
    path = tars.write(tmp_path / "a.tar", tars.pairs(range(4)))

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(TarIndex, "save", refuse)
    assert len(load_index(path)) == 4
    assert not TarIndex.file(path).exists()


def test_a_damaged_header_loses_only_its_member(tars, tmp_path):
    path = tars.write(tmp_path / "a.tar", tars.pairs(range(6)))
    whole = build_index(path)
    place = header_place(path, "000000003.png")
    flip(path, place + 130)
    index = build_index(path)
    assert index.keys == whole.keys
    expected = whole.offsets.copy()
    expected[3, IMAGE] = -1
    assert np.array_equal(index.offsets, expected)
    assert "a.tar: header is damaged (checksum " in index.damage[0]
    assert f"at byte {place} after key '000000002'" in index.damage[0]
    assert index.damage[1:] == ["a.tar: key '000000003' has no whole image"]


def test_a_lost_last_header(tars, tmp_path):
    path = tars.write(tmp_path / "a.tar", tars.pairs(range(3)))
    flip(path, header_place(path, "000000002.json") + 3)
    index = build_index(path)
    assert index.keys == ["000000000", "000000001", "000000002"]
    assert index.offsets[2, META] == -1 and len(index.damage) == 1


@pytest.mark.parametrize("cut", [0, 200, 512, 530])
def test_a_truncated_tar_keeps_its_complete_samples(tars, tmp_path, cut):
    path = tars.write(tmp_path / "a.tar", tars.pairs(range(6)))
    place = header_place(path, "000000004.png")
    path.write_bytes(path.read_bytes()[: place + cut])
    index = build_index(path)
    assert index.keys == [f"{i:09d}" for i in range(5 if cut >= 512 else 4)]
    assert (index.offsets[:4] >= 0).all() and (index.offsets[4:] == -1).all()
    assert any("tar is cut off" in sentence for sentence in index.damage)
    if cut >= 512:
        assert "key '000000004': png is cut off" in index.damage[0]


def test_zeroed_bytes_in_the_middle(tars, tmp_path):
    path = tars.write(tmp_path / "a.tar", tars.pairs(range(6)))
    start, stop = header_place(path, "000000002.png"), header_place(path, "000000003.png")
    data = path.read_bytes()
    path.write_bytes(data[:start] + bytes(stop - start) + data[stop:])
    index = build_index(path)
    assert index.keys == [f"{i:09d}" for i in range(6)]
    assert index.offsets[2].tolist() == [-1, -1, -1] and (np.delete(index.offsets, 2, axis=0) > 0).all()
    assert f"zeroed bytes, with {len(data) - stop} bytes of tar after them at byte {start}" in index.damage[0]


def test_missing_and_duplicate_members_are_named(tars, tmp_path):
    members = [("a.png", b"1"), ("b.txt", b"b"), ("c.png", b"3"), ("c.txt", b"c"), ("c.txt", b"again")]
    index = build_index(tars.write(tmp_path / "a.tar", members))
    assert index.keys == ["a", "b", "c"]
    assert bytes_at(index, 2, TEXT) == b"c"
    assert "key 'c' has a second txt" in index.damage[0]
    assert index.damage[1:] == ["a.tar: key 'b' has no whole image", "a.tar: key 'a' has no caption"]


def test_sizes_beyond_octal(tars, tmp_path):
    path = tars.write(tmp_path / "a.tar", tars.pair(0), tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    size = len(tars.draw(0))
    data[124:136] = b"\x80" + size.to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    index = build_index(path)
    assert index.damage == [] and bytes_at(index, 0, IMAGE) == tars.draw(0)
    assert json.loads(bytes_at(index, 0, META))["key"] == "000000000"


def test_a_file_that_is_no_tar(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"x" * 5000)
    index = build_index(tmp_path / "a.tar")
    assert len(index) == 0 and index.damage[0] == "a.tar: is not a tar: it begins with b'xxxxxxxxxxxxxxxx'"
    (tmp_path / "b.tar").write_bytes(b"")
    assert build_index(tmp_path / "b.tar").damage == ["b.tar: is empty (0 bytes), not a tar"]
    assert [len(load_index(path)) for path in sorted(tmp_path.glob("*.tar"))] == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar"]  # no index beside a wrong file
    with pytest.raises(OSError):
        build_index(tmp_path / "c.tar")
