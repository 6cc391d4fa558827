"""The compiled ops keep to PyTorch's stable ABI: one build serves every torch from the oldest promised one on."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch

import oner_fast.ops  # noqa: F401 - loads the extension
from oner_fast import _extension

ROOT = Path(__file__).resolve().parents[1]
SYSTEM = r"libc|libm|libgcc_s|libstdc\+\+|libpthread|libdl|ld-linux-[\w-]+"
compiled = pytest.mark.skipif(not _extension.status().loaded, reason=_extension.status().reason or "built")


def output(tool: str, *arguments: str) -> list[str]:
    """Run a tool of binutils on the extension."""
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed (apt install binutils)")
    command = [tool, *arguments, str(_extension.library_path())]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@compiled
def test_the_library_needs_nothing_of_torch_but_its_stable_functions() -> None:
    undefined = [line.split()[-1] for line in output("nm", "-D", "--undefined-only")]
    needed = {name for name in undefined if re.match(r"(aoti_)?torch_", name)}
    assert {"torch_library_impl", "torch_parallel_for"} <= needed
    # The others have a version of a system library, or are weak: the linker's own, and those of the C++ library.
    weak = {line.split()[-1] for line in output("nm", "-D", "--undefined-only") if line.split()[0] in "wv"}
    others = [
        name
        for name in undefined
        if name not in needed | weak and not re.search(r"@@?(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$", name)
    ]
    assert others == []
    assert not [name for name in weak if re.search(r"c10|2at|5torch", name)]


@compiled
def test_the_library_links_torch_and_the_system_alone() -> None:
    libraries = re.findall(r"\(NEEDED\).*\[(.+?)\.so", "\n".join(output("readelf", "-d", "-W")))
    assert "libtorch_cpu" in libraries
    assert [name for name in libraries if not re.fullmatch(f"libtorch_cpu|{SYSTEM}", name)] == []


def test_no_source_includes_a_header_of_one_version() -> None:
    included = {
        (path.name, header)
        for folder in ("common", "cpu", "cuda")
        for path in (ROOT / "csrc" / folder).rglob("*.*")
        for header in re.findall(r"#include <((?:ATen|c10|torch)/[^>]+)>", path.read_text(encoding="utf-8"))
    }
    stable = r"torch/(headeronly|csrc/stable|csrc/inductor/aoti_torch/(c|generated))/.+"
    assert {header for _, header in included if not re.fullmatch(stable, header)} == set()
    assert included


@compiled
def test_the_build_says_what_it_serves() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    report = _extension.build_report()
    if "oldest_torch" in report:  # ONER_FAST_LIBRARY may name a build without a report
        assert f"torch>={report['oldest_torch']}" in project["dependencies"]
        assert torch.__version__ >= report["oldest_torch"]


@compiled
def test_an_index_that_only_a_kernel_reads_stays_an_index_error() -> None:
    """Under torch.compile no value is checked in Python."""
    kept = torch.full((3, 2), 9)
    with pytest.raises(IndexError, match=r"kept must hold values in \[0, 4\), found 9"):
        torch.ops.oner_fast.masked_gather(torch.zeros(3, 4, 5), kept, None, None, None)


@compiled
def test_memory_that_runs_out_is_named() -> None:
    tokens, kept = torch.zeros(1, 1, 1).expand(1, 1, 2**45), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"oner_fast: no .* of shape \[1, 1, 35184372088832\]"):
        torch.ops.oner_fast.masked_gather(tokens, kept, None, None, None)
