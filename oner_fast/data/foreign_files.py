"""Name files that are called .tar and are something else."""

from pathlib import Path

_COMPRESSED = (
    (b"\x1f\x8b", "gzip", "gz", "gzip -d"),
    (b"BZh", "bzip2", "bz2", "bzip2 -d"),
    (b"\xfd7zXZ\0", "xz", "xz", "xz -d"),
    (b"\x28\xb5\x2f\xfd", "zstd", "zst", "zstd -d"),
    (b"\x04\x22\x4d\x18", "lz4", "lz4", "lz4 -d"),
)
_OTHERS = (
    (b"<!doctype html", "is an HTML page, not a tar; was it downloaded in full and with permission?"),
    (b"<html", "is an HTML page, not a tar; was it downloaded in full and with permission?"),
    (b"<?xml", "is an XML text, not a tar; a store answers so in place of a file that it refuses"),
    (b"version https://git-lfs", "is a Git LFS pointer, not a tar; fetch the file with `git lfs pull`"),
    (b"pk\x03\x04", "is a zip file, not a tar; unpack it and make a tar"),
)


def refuse_compressed(path: Path, start: bytes) -> None:
    """Raise ValueError, with the remedy, where a file that begins with `start` is compressed."""
    for magic, name, suffix, command in _COMPRESSED:
        if start.startswith(magic):
            compressed = path.name if path.name.endswith(f".{suffix}") else f"{path.name}.{suffix}"
            rename = "" if compressed == path.name else f"mv {path.name} {compressed} && "
            raise ValueError(
                f"{path} is {name}-compressed, and samples are read from plain tars in any order; decompress it with "
                f"`{rename}{command} {compressed}`"
            )


def what_it_is(start: bytes) -> str:
    """Say what a file that begins with `start` is instead of a tar; "" where that is not known."""
    if not start:
        return "is empty (0 bytes), not a tar"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((sentence for magic, sentence in _OTHERS if text.startswith(magic)), "")
