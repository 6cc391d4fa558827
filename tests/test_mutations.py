"""The check of the list of mutants, on a small tree."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).with_name("mutations.py")


@pytest.fixture
def mutations(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("mutations", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutations", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "add.py").write_text("x = tl.load(p, mask=m)\ntl.store(p, x)\n")
    (tmp_path / "test_add.py").write_text("def test_add_is_exact(): ...\n")
    return tmp_path


def test_mutants_that_no_longer_fit_the_tree_are_reported(mutations: Any, tree: Path) -> None:
    good = mutations.Mutant("kernels/add.py", "test_add.py", "no mask", ", mask=m", "", "is_exact")
    assert mutations.problems([good], tree) == []
    wrong = {
        "must occur once in kernels/add.py, and occurs 2 times": replace(good, old="p, ", name="twice"),
        "and occurs 0 times": replace(good, old="gone", name="gone"),
        "it changes nothing": replace(good, new=good.old, name="same"),
        "no test of test_add.py has is_wrong_": replace(good, select="is_wrong_", name="no test"),
    }
    for says, mutant in wrong.items():
        (problem,) = mutations.problems([good, mutant], tree)
        assert problem.startswith(f"{mutant}: ") and says in problem
    assert mutations.problems([good, good], tree) == ["kernels/add.py: no mask: 2 mutants have this name"]
    assert mutations.problems([], tree) == ["kernels/add.py: it has no mutant"]
