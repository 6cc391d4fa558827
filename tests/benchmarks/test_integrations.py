"""`oner-fast bench integrations`: both sides compute the same, and the page holds what was measured."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from oner_fast.benchmarks.integrations import command
from oner_fast.benchmarks.integrations.command import PROJECTS, backward, distance, markdown, measure
from oner_fast.benchmarks.integrations.subjects import Pair, Subject, subjects


def made(ours: Callable[[Tensor], Tensor]) -> Subject:
    def make(dtype: torch.dtype) -> Pair:
        x = torch.linspace(1, 2, 8, dtype=torch.float64).to(dtype).requires_grad_()
        unused = torch.ones(2, dtype=dtype, requires_grad=True)
        return Pair(lambda: (x * x).exp().sum(), lambda: ours(x), [x, unused], [x, unused])

    return Subject("timm", "a sum", "patch()", make)


def test_figures_are_those_of_both_sides() -> None:
    (found,) = measure(made(lambda x: 1.5 * (x**2).exp().sum()), ["float32"], 0.01)
    assert found.losses[0] < 1e-6 and found.losses[1] == pytest.approx(0.5, rel=1e-5)
    assert found.gradients[0] < 1e-6 and found.gradients[1] == pytest.approx(0.5, rel=1e-5)
    assert found.kept[0] == found.kept[1] == 32 and found.speed.p50 > 0  # exp keeps its result
    page = markdown([found], "a machine")
    assert "a machine" in page and "## float32" in page and "bfloat16" not in page
    assert "| timm | a sum | `patch()` |" in page


def test_distances_are_relative_to_all_gradients_together() -> None:
    exact = [torch.tensor(2.0), torch.tensor([3.0, 0.0]), torch.tensor([4.0])]
    found = [torch.tensor(2.2), torch.tensor([3.0, 1.0]), torch.tensor([4.0])]
    assert distance(found, exact) == pytest.approx((0.1, 0.2))


def test_both_lines_are_measured_on_the_same_numbers() -> None:
    if find_spec("open_clip") is None:
        pytest.skip("needs open_clip (pip install $(oner-fast requirements clip))")
    assert {one.project for one in subjects(True)} == set(PROJECTS)
    subject = next(one for one in subjects(True) if "`ClipLoss`" in one.name)
    pair = subject.make(torch.float64)
    torch.testing.assert_close(backward(pair.ours, pair.leaves), backward(pair.theirs, pair.leaves))


def test_bad_options_are_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for options, words in ((["--seconds", "0"], "--seconds must be positive"), (["--project", "x"], "invalid choice")):
        with pytest.raises(SystemExit):
            command.main(options)
        assert words in capsys.readouterr().err
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        command.main(["--project", "timm"])
    assert "timm not installed here" in capsys.readouterr().err


def test_the_page_is_written_after_each_subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "subjects", lambda quick: [made(lambda x: (x * x).exp().sum())])
    monkeypatch.setattr(command, "find_spec", lambda name: True)
    out = tmp_path / "folder" / "page.md"
    options = ["--project", "timm", "--dtypes", "float32", "--seconds", "0.01"]
    assert command.main([*options, "--out", str(out)]) == 0
    assert "| timm | a sum |" in out.read_text()
