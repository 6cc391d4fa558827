"""Headers that no writer of tars makes: each is damage, the scan ends, and it allocates no more than the tar holds."""

import io
import tarfile
import time

import pytest

from oner_fast.data.tar_headers import BLOCK, Damage, Member, members


def header(name=b"k.png", size=b"00000000004", kind=b"0", mtime=b"00000000000", owner=b""):
    """A header with a right checksum and any fields."""
    block = bytearray(BLOCK)
    for start, field in ((0, name), (124, size), (136, mtime), (156, kind), (257, b"ustar\x0000"), (265, owner)):
        block[start : start + len(field)] = field
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data):
    return data + bytes(-len(data) % BLOCK)


def listed(tar):
    return list(members(io.BytesIO(tar), len(tar)))


GOOD = header() + padded(b"good")
END = bytes(2 * BLOCK)
NUMBERS = [
    b"-1000",
    b"+0000000004",
    b"0_0",
    b"0000000008",
    b"0x4",
    b"\xff" * 12,
    b"\xff" * 11 + b"\x01",
    b"4 4",
    b"\xb2",
]


@pytest.mark.parametrize("size", [*NUMBERS, b"\x80" + b"\xff" * 11, b"\xbf" + b"\xff" * 11])
def test_sizes_that_are_no_numbers_are_damage(size):
    damage, member = listed(header(b"bad.png", size) + padded(b"data") + GOOD + END)
    assert isinstance(damage, Damage) and "header is damaged (size " in damage.why
    assert (damage.offset, damage.end) == (0, 2 * BLOCK)
    assert isinstance(member, Member) and (member.name, member.offset, member.size) == ("k.png", 3 * BLOCK, 4)


@pytest.mark.parametrize("size", [b"77777777777", b"\x80" + bytes(6) + b"\x7f" + b"\xff" * 4, b"00000100000"])
def test_a_size_beyond_the_file_costs_its_member_alone(size):
    tar = header(b"bad.png", size) + padded(b"data") + GOOD + END
    bad, damage, good = listed(tar)
    assert isinstance(bad, Member) and not bad.whole
    assert isinstance(damage, Damage) and f"passes the end of the tar at {len(tar)}" in damage.why
    assert isinstance(good, Member) and good.whole and good.offset == 3 * BLOCK


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g"])
def test_names_and_records_larger_than_the_file_are_not_read(kind):
    size = b"\x80" + (1 << 40).to_bytes(11, "big")
    damage, member = listed(header(b"ext", size, kind) + GOOD + END)
    assert isinstance(damage, Damage) and "pass the end of the tar" in damage.why
    assert isinstance(member, Member) and member.name == "k.png"


@pytest.mark.parametrize("kind", [b"L", b"x"])
def test_a_name_of_two_megabytes_is_damage_and_its_member_is_not_misnamed(kind):
    size = 2 << 20
    tar = header(b"ext", b"%011o" % size, kind) + padded(b"n" * size) + header(b"cut") + padded(b"data") + GOOD + END
    damage, member = listed(tar)
    assert isinstance(damage, Damage) and f"have {size} bytes" in damage.why
    assert isinstance(member, Member) and member.name == "k.png"


def pax(record):
    return header(b"pax", b"%011o" % len(record), b"x") + padded(record)


def record(key, value):
    body = b" " + key + b"=" + value + b"\n"
    length = len(body) + 1
    while len(b"%d" % length) + len(body) != length:
        length = len(b"%d" % length) + len(body)
    return b"%d" % length + body


@pytest.mark.parametrize(
    "records",
    [
        record(b"size", b"9" * 5000),
        record(b"size", b"-1000"),
        record(b"size", "²".encode()),
        record(b"size", b""),
        b"9" * 5000 + b" path=x\n",
        b"0 path=x\n",
        b"-5 path=x\n",
        b"999 path=x\n",
        b"12 path=k.jp",
        b"path=x\n",
        b"\0" * 40,
    ],
)
def test_malformed_records_cost_their_member_alone(records):
    damage, member = listed(pax(records) + header(b"bad.png") + padded(b"data") + GOOD + END)
    assert isinstance(damage, Damage) and "PAX records before it" in damage.why and len(damage.why) < 200
    assert isinstance(member, Member) and member.name == "k.png"


def test_names_keep_bytes_that_are_not_utf8():
    surrogate = b"\xed\xa0\x80.png"
    (member,) = listed(pax(record(b"path", surrogate)) + GOOD + END)
    assert isinstance(member, Member) and member.name.encode("utf-8", "surrogateescape") == surrogate


def test_only_plain_files_are_plain():
    forms = {
        b"1": "hard link",
        b"2": "symbolic link",
        b"5": "folder",
        b"3": "device",
        b"6": "fifo",
        b"V": "unknown kind",
    }
    for kind, form in forms.items():
        first, second = listed(header(b"k.jpg", b"0", kind) + GOOD + END)
        assert isinstance(first, Member) and first.form == form
        assert isinstance(second, Member) and second.form == "file"
    sparse = pax(record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.name", b"s.png"))
    (member,) = listed(sparse + GOOD + END)
    assert isinstance(member, Member) and (member.name, member.form) == ("s.png", "sparse file")


def test_a_link_has_no_data_whatever_its_size_says():
    first, second = listed(header(b"k.jpg", b"00000004000", b"2") + GOOD + END)
    assert isinstance(first, Member) and isinstance(second, Member) and second.offset == 2 * BLOCK


def test_a_sparse_member_of_gnu_continues_its_map():
    block = bytearray(header(b"s.png", b"00000001000", b"S"))
    block[482] = 1
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    more = bytearray(BLOCK)
    more[504] = 1
    tar = bytes(block) + bytes(more) + bytes(BLOCK) + b"d" * BLOCK + GOOD + END
    first, second = listed(tar)
    assert isinstance(first, Member) and first.form == "sparse file" and first.offset == 3 * BLOCK
    assert isinstance(second, Member) and second.name == "k.png"


def test_many_hostile_headers_take_linear_time():
    bad = header(b"bad.png", b"-1000")
    tar = bad * 20_000 + GOOD + END
    start = time.perf_counter()
    found = listed(tar)
    assert time.perf_counter() - start < 20
    assert len(found) == 2 and isinstance(found[1], Member)
    tar = header(b"bad.png", b"77777777777") * 5_000 + GOOD + END
    assert sum(isinstance(one, Damage) for one in listed(tar)) == 5_000


def test_agrees_with_tarfile_on_every_form(tars, tmp_path):
    long = "folder/" * 30 + "x" * 200 + ".png"
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        names = ["a.png", "ü.txt"] + ([long] if form != tarfile.USTAR_FORMAT else [])
        path = tars.write(tmp_path / "a.tar", [(name, name.encode()) for name in names], form)
        found = listed(path.read_bytes())
        with tarfile.open(path) as tar:
            expected = [(one.name, one.offset_data, one.size) for one in tar]
        assert [(one.name, one.offset, one.size) for one in found if isinstance(one, Member)] == expected
