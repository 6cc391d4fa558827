"""Read the header of a safetensors file, without torch: names, dtypes and shapes of its tensors, and its metadata."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oner_fast import bounded_json

MAX_BYTES = 32 * 2**20
"""Greatest length of a header. A vocabulary of a million words takes about half of it."""
MAX_CONTAINERS = 1_000_000
"""Greatest number of `{` and `[` in a header. Each tensor has three; their objects take the memory of a parser."""

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the file: its dtype in safetensors' words, such as `F32`, and its shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """The tensors by name, and the metadata."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]


def read_header(source: Path | bytes, name: str | None = None) -> Header:
    """Read and check the header alone; no tensor is read, and memory stays below 500 MB whatever the file holds.

    Args:
        source: the file, or its first bytes up to its whole content.
        name: the file's name in errors; the path by default.

    Raises:
        ValueError: it is not a safetensors file, or its header and its size disagree; the message names the file.
        OSError: the file cannot be read.
    """
    if isinstance(source, bytes):
        return _parsed(source[:8], source[8 : 8 + MAX_BYTES], len(source), name or "the file")
    name = name or str(source)
    with source.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(8)
        length = int.from_bytes(first, "little")
        return _parsed(first, file.read(length) if length <= min(size, MAX_BYTES) else b"", size, name)


def _parsed(first: bytes, rest: bytes, size: int, name: str) -> Header:
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > size - 8:
        raise ValueError(
            f"{name} is not a safetensors file, or is cut short: it has {size:,} bytes, and its header would end at "
            f"byte {8 + length:,}"
        )
    if length > MAX_BYTES:
        raise ValueError(f"{name}: its header has {length:,} bytes, and at most {MAX_BYTES:,} are read")
    text = rest[:length]
    if text[:1] != b"{":
        raise ValueError(f"{name} is not a safetensors file: no header begins at byte 8")
    if text.count(b"{") + text.count(b"[") > MAX_CONTAINERS:
        raise ValueError(f"{name}: its header holds more than {MAX_CONTAINERS:,} objects and lists")
    values = bounded_json.load_object(text, f"{name} is not a safetensors file", max_depth=4)
    metadata = values.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{name} is not a safetensors file: its metadata are not texts by name")
    spans = {tensor: _span(name, tensor, entry) for tensor, entry in values.items()}
    place = 0
    for tensor, (_, begin, end) in sorted(spans.items(), key=lambda item: item[1][1:]):
        if begin != place:
            raise ValueError(f"{name} is damaged: the tensor {tensor!r} begins at byte {begin:,}, not at {place:,}")
        place = end
    if 8 + length + place != size:
        raise ValueError(
            f"{name} is not a safetensors file, or is cut short: it has {size:,} bytes, and its header describes "
            f"{8 + length + place:,}"
        )
    return Header({tensor: entry for tensor, (entry, _, _) in spans.items()}, metadata)


def _span(name: str, tensor: str, entry: Any) -> tuple[TensorEntry, int, int]:
    """Check one entry; returns it with the place of its bytes."""
    problem = f"{name} is not a safetensors file: the entry of its tensor {tensor[:80]!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{problem} needs dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{problem} has an unknown dtype {str(dtype)[:40]!r}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2 or len(shape) > 64:
        raise ValueError(f"{problem} has a shape or offsets that are no list of whole numbers")
    begin, end = offsets
    if math.prod(shape) * _BITS[dtype] != (end - begin) * 8:
        raise ValueError(f"{problem} has {end - begin:,} bytes, which do not fit {dtype} {list(shape)[:8]}")
    return TensorEntry(dtype, tuple(shape)), begin, end


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and 0 <= one < 2**63 for one in value)
