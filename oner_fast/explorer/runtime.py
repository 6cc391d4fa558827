"""onnxruntime-web, which runs the model in the page: fetched once with npm, checked, and kept."""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

from oner_fast.data.sources.npm import NpmError, digest, fetch, tarball

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""SHA-512 that the registry published with that version."""
SCRIPT = "package/dist/ort.wasm.bundle.min.mjs"
WASM = "package/dist/ort-wasm-simd-threaded.wasm"
LICENCE = """MIT License

Copyright (c) Microsoft Corporation

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated \
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the \
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit \
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the \
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE \
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR \
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR \
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE."""


@dataclass(frozen=True)
class Runtime:
    """The two files of onnxruntime-web that a page needs: a JavaScript module, and WebAssembly for one thread."""

    script: bytes
    wasm: bytes


def cache_folder() -> Path:
    """The folder that keeps the package: `oner_fast` under XDG_CACHE_HOME, by default `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oner_fast"


def find_runtime(given: Path | None = None) -> Runtime:
    """Read onnxruntime-web from a tarball.

    Args:
        given: the tarball of npm; by default it is taken from the cache, where npm puts it at the first use.

    Raises:
        FileNotFoundError: there is no such tarball.
        ValueError: it is another package, another version or damaged, or npm could not fetch it; the message says what
            to do without a network.
    """
    name = f"{PACKAGE}@{VERSION}"
    if given is not None:
        if not given.is_file():
            raise FileNotFoundError(f"there is no file {given} (given with --runtime)")
        if digest(given) != INTEGRITY:
            raise ValueError(f"{given} is not the tarball of {name}; make it with `npm pack {name}`")
        return _read(given)
    try:
        return _read(fetch({PACKAGE: VERSION}, cache_folder(), {name: INTEGRITY})[PACKAGE])
    except NpmError as error:
        raise ValueError(
            f"the page needs {name}, which npm could not give ({error}); without a network, run `npm pack {name}` "
            f"where there is one, and give the file {tarball(PACKAGE, VERSION)} with --runtime"
        ) from error


def _read(path: Path) -> Runtime:
    found = {}
    with tarfile.open(path) as tar:
        for name in (SCRIPT, WASM):
            file = tar.extractfile(name)
            assert file is not None, f"{path} lacks {name}"
            found[name] = file.read()
    return Runtime(found[SCRIPT], found[WASM])
