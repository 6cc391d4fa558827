"""The mutants fit the kernels: the text that each replaces occurs once, and the tests that it names exist."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def tool() -> Any:
    spec = importlib.util.spec_from_file_location("mutations", ROOT / "tests" / "mutations.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutations"] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


MUTATIONS = tool()
MUTANTS = MUTATIONS.mutants()


def test_what_a_mutant_replaces_occurs_once() -> None:
    counts = {str(x): (ROOT / x.file).read_text(encoding="utf-8").count(x.old) for x in MUTANTS}
    assert {name: count for name, count in counts.items() if count != 1} == {}
    assert len(counts) == len(MUTANTS) > 100  # no two of one name
    assert all(x.old != x.new for x in MUTANTS)


def test_the_tests_of_a_mutant_exist() -> None:
    for path in {x.tests for x in MUTANTS}:
        text = (ROOT / path).read_text(encoding="utf-8")
        names = re.findall(r"def (test_\w+)", text)
        for mutant in (x for x in MUTANTS if x.tests == path):
            words = [x for x in re.findall(r"[a-z_]{8,}", mutant.select) if not x.startswith("dtype")]
            assert words and all(any(word in name for name in names) for word in words), mutant


def test_every_kernel_has_mutants() -> None:
    kernels = {
        str(path.relative_to(ROOT))
        for path in [*(ROOT / "kernels").glob("*.py"), *(ROOT / "csrc" / "cuda").glob("*.cu*")]
        if re.search(r"tl\.(load|store)\(|__global__", path.read_text(encoding="utf-8"))
    }
    assert kernels == {x.file for x in MUTANTS}


def test_a_mutant_that_fits_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_text("x = 1\nx = 1\n")
    mutant = MUTATIONS.Mutant("kernel.py", "tests/test_x.py", "twice", "x = 1", "x = 2", "all")
    with pytest.raises(ValueError, match="kernel.py: twice: .* must occur once in kernel.py, and occurs 2 times"):
        MUTATIONS.apply(mutant, tmp_path)
