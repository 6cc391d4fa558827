"""The header of a safetensors file is read within bounds, and what is no header is refused in a sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import save

from oner_fast.models.safetensors_header import MAX_BYTES, TensorEntry, read_header

WHOLE = save(
    {"a": torch.zeros(2, 3), "b.c": torch.zeros(4, dtype=torch.bfloat16), "s": torch.tensor(1.0)}, {"format": "x"}
)


def file_of(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def test_a_whole_file_is_described(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(WHOLE)
    for header in (read_header(path), read_header(WHOLE)):
        assert header.metadata == {"format": "x"}
        assert header.tensors == {
            "a": TensorEntry("F32", (2, 3)), "b.c": TensorEntry("BF16", (4,)), "s": TensorEntry("F32", ()),
        }  # fmt: skip
    assert read_header(save({})).tensors == {} and read_header(save({})).metadata == {}


HOSTILE = {
    "nothing": b"",
    "seven bytes": b"\x01" * 7,
    "text": b"nothing of the kind",
    "longer than the file": (2**63).to_bytes(8, "little") + b"{}",
    "an array": file_of([]),
    "a number": file_of(b"1"),
    "cut json": file_of(b'{"a": '),
    "deep": file_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "deep in metadata": file_of({"__metadata__": {"a": [[[[[1]]]]]}}),
    "metadata no text": file_of({"__metadata__": {"a": 1}}),
    "metadata a list": file_of({"__metadata__": ["a"]}),
    "half a surrogate": file_of(b'{"__metadata__": {"a": "\\ud800"}}'),
    "not utf-8": file_of(b'{"\xff": 1}'),
    "entry a text": file_of({"a": "F32"}),
    "entry lacks a shape": file_of({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"1234"),
    "entry has more": file_of({"a": entry(more=1)}, b"1234"),
    "unknown dtype": file_of({"a": entry("X9")}, b"1234"),
    "dtype a list": file_of({"a": entry(["F32"])}, b"1234"),
    "negative shape": file_of({"a": entry(shape=[-1])}, b"1234"),
    "fraction": file_of({"a": entry(shape=[1.0])}, b"1234"),
    "flag": file_of({"a": entry(shape=[True])}, b"1234"),
    "shape of 2^40": file_of({"a": entry(shape=[2**40])}, b"1234"),
    "overflow": file_of({"a": entry(shape=[2**62, 4])}, b"1234"),
    "5,000 digits": file_of(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}'),
    "many dimensions": file_of({"a": entry(shape=[1] * 65)}, b"1234"),
    "offsets turned": file_of({"a": entry(offsets=[4, 0])}, b"1234"),
    "three offsets": file_of({"a": entry(offsets=[0, 4, 8])}, b"1234"),
    "a gap": file_of({"a": entry(offsets=[4, 8])}, b"12345678"),
    "an overlap": file_of({"a": entry(), "b": entry()}, b"1234"),
    "bytes left": file_of({"a": entry()}, b"12345"),
    "bytes missing": file_of({"a": entry()}, b"123"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_other_content_is_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(ValueError, match=r"model\.bin") as found:
        read_header(path)
    assert len(str(found.value)) < 500 and "\n" not in str(found.value)
    with pytest.raises(ValueError, match="given here"):
        read_header(HOSTILE[name], "given here")


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=4), st.integers(0, len(WHOLE)))
def test_what_is_taken_safetensors_takes_too(changes: list[tuple[int, int]], cut: int) -> None:
    content = bytearray(WHOLE)
    for place, value in changes:
        content[place] = value
    content = content[: len(WHOLE) - cut if cut < 4 else len(WHOLE)]
    try:
        header = read_header(bytes(content))
    except ValueError:
        return
    try:
        theirs = deserialize(bytes(content))
    except SafetensorError as error:
        assert "duplicate" in str(error)  # of two entries with one name, Python keeps the last
        return
    assert {name: tuple(found["shape"]) for name, found in theirs} == {
        name: found.shape for name, found in header.tensors.items()
    }


def test_the_largest_headers_stay_below_500_mb(tmp_path: Path) -> None:
    def largest(item: bytes) -> bytes:
        count = (MAX_BYTES - 64) // len(item)
        return file_of(b'{"__metadata__":{"a":[' + item * count + b"1]}}")

    paths = []
    for number, item in enumerate((b"[],", b"{},", b"300,", b"0.1,", b'"ab",')):
        paths.append(tmp_path / str(number))
        paths[-1].write_bytes(largest(item))
    paths.append(tmp_path / "long")
    paths[-1].write_bytes((MAX_BYTES + 1).to_bytes(8, "little") + b"{" + b" " * MAX_BYTES)
    script = (
        "import sys, resource\n"
        "from pathlib import Path\n"
        "from oner_fast.models.safetensors_header import read_header\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        read_header(Path(path))\n"
        "    except ValueError as error:\n"
        "        print(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    found = subprocess.run([sys.executable, "-c", script, *map(str, paths)], capture_output=True, text=True, check=True)
    *sentences, grown = found.stdout.splitlines()
    assert len(sentences) == len(paths), sentences
    assert int(grown) < 500
