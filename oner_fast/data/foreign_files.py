"""Name files that are called .tar and are something else."""

from pathlib import Path

from oner_fast.foreign_content import compression, is_lfs_pointer, web_page


def refuse_compressed(path: Path, start: bytes) -> None:
    """Raise ValueError, with the remedy, where a file that begins with `start` is compressed."""
    found = compression(start)
    if found is None:
        return
    compressed = path.name if path.name.endswith(f".{found.suffix}") else f"{path.name}.{found.suffix}"
    rename = "" if compressed == path.name else f"mv {path.name} {compressed} && "
    raise ValueError(
        f"{path} is {found.name}-compressed, and samples are read from plain tars in any order; decompress it with "
        f"`{rename}{found.command} {compressed}`"
    )


def what_it_is(start: bytes) -> str:
    """Say what a file that begins with `start` is instead of a tar; "" where that is not known."""
    if not start:
        return "is empty (0 bytes), not a tar"
    if page := web_page(start):
        return f"is {page}, not a tar; a store answers so in place of a file that it refuses"
    if is_lfs_pointer(start):
        return "is a Git LFS pointer, not a tar; fetch the file with `git lfs pull`"
    if start.startswith(b"PK\x03\x04"):
        return "is a zip file, not a tar; unpack it and make a tar"
    return ""
