"""Read and write the arrays of an index, `<tar>.index.npz`. Whatever the file holds, reading stays within its size."""

import io
import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from oner_fast.atomic import remove_leftovers, write_atomic

_LARGEST_HEADER = 256  # bytes of the description of an array in an .npz file


def write_arrays(target: Path, arrays: dict[str, NDArray[Any]], mtime_ns: int) -> None:
    """Write arrays atomically, with equal bytes for equal arrays, and set the file's time of change. Raises OSError."""

    def write(file: BinaryIO) -> None:
        np.savez(file, allow_pickle=False, **cast(Any, arrays))
        file.flush()
        os.utime(file.fileno(), ns=(mtime_ns, mtime_ns))

    remove_leftovers(target.parent, target.name)
    write_atomic(target, write)


def read_arrays(path: Path, kinds: dict[str, tuple[str, int]]) -> dict[str, NDArray[Any]]:
    """Read the arrays that `kinds` names, each with its dtype and number of dimensions.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no .npz file of such arrays.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {name: _array(archive, name, *kind) for name, kind in kinds.items()}
    except OSError:
        raise
    except Exception as error:  # zipfile raises whatever it meets first in damaged bytes
        raise ValueError(f"{path} is no index: {type(error).__name__}: {error}") from error


def _array(archive: zipfile.ZipFile, name: str, dtype: str, dimensions: int) -> NDArray[Any]:
    entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise ValueError(f"{name} is compressed")
    if entry.file_size > os.path.getsize(cast(str, archive.filename)):
        raise ValueError(f"{name} is larger than its file")
    data = archive.read(entry)
    start = io.BytesIO(data[: _LARGEST_HEADER + 16])
    if np.lib.format.read_magic(start) != (1, 0):
        raise ValueError(f"{name} has another version of the array format")
    read: Any = np.lib.format.read_array_header_1_0  # stubs before NumPy 2.4 lack the limit, which every version takes
    shape, fortran, found = read(start, max_header_size=_LARGEST_HEADER)
    if found != np.dtype(dtype) or len(shape) != dimensions or (fortran and dimensions > 1):
        raise ValueError(f"{name} is {found} of shape {shape}")
    content = memoryview(data)[start.tell() :]
    count = 1
    for length in shape:
        count *= length
    if min(shape, default=0) < 0 or count * found.itemsize != len(content):
        raise ValueError(f"{name} has {len(content)} bytes for shape {shape}")
    return np.frombuffer(content, dtype=found, count=count).reshape(shape)
