"""`oner-fast bench uta`: the three students compute what their names say, and the table shows the figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from oner_fast.benchmarks import student
from oner_fast.models.clip import CLIPConfig, build_clip, save_clip
from oner_fast.models.uta import UTAConfig

SMALL = UTAConfig(image_size=32, patch_size=8, width=16, depth=2, heads=2, mlp_hidden=24, embed_dim=8)
SETTING = student.Setting(SMALL, 3, "cpu", "fp32")


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_gathering_later_gives_the_same_gradients(ratio: float) -> None:
    ours, later = SETTING.step(student.VISIBLE, ratio)(), SETTING.step(student.GATHERED, ratio)()
    assert len(ours) == len(later) > 20
    for one, other in zip(ours, later, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_mask_tokens_replace_hidden_patches() -> None:
    names = {name: len(SETTING.step(name, 0.5)()) for name in student.NAMES}
    assert names[student.MASK_TOKENS] == names[student.VISIBLE] + 1
    hidden = student.uta_flops(SMALL, [17]), student.uta_flops(SMALL, [9])
    assert hidden[0] > 1.8 * hidden[1]


def test_the_table_lists_ratios_and_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(student, "UTA_SIZES", {"tiny": SMALL})
    peaks = iter(range(1, 7))
    monkeypatch.setattr(student.Setting, "peak", lambda self, name, ratio: next(peaks) << 20)
    out = tmp_path / "new" / "uta.md"
    arguments = ["--size", "tiny", "--mask-ratios", "0", "0.5", "--rounds", "2", "--batch-size", "2", "--out", str(out)]
    assert student.main(arguments) == 0
    rows = [line for line in out.read_text().splitlines() if line.startswith("| 0")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[:3] for row in cells] == [["0", "17", "1.00"], ["0.5", "9", "0.53"]]
    assert [row[-3:] for row in cells] == [["1", "2", "3"], ["4", "5", "6"]]
    assert cells[0][4] == "1.00" and "32 px, patch 8" in capsys.readouterr().out


def test_the_teachers_tokens_are_measured_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = CLIPConfig(
        image_size=32, patch_size=8, vision_width=16, vision_layers=1, vision_heads=2, text_width=16, text_layers=1,
        text_heads=2, context_length=8, embed_dim=8,
    )  # fmt: skip
    save_clip(tmp_path, build_clip(sizes), sizes)
    monkeypatch.setattr(student.Setting, "peak", lambda self, name, ratio: 0)
    steps = student.teacher_steps(SETTING, str(tmp_path), tmp_path / "cache")
    computed, cached = steps[student.COMPUTED](), steps[student.CACHED]()
    assert computed is not None and cached is not None
    torch.testing.assert_close(computed, cached.float(), rtol=2**-8, atol=0)
    rows, targets = student.measure(SETTING, [0.5], 2, lambda text: None, str(tmp_path))
    text = student.markdown(SETTING, rows, targets)
    assert f"| {student.COMPUTED} | " in text and f"| {student.CACHED} | " in text


def test_the_peak_is_measured_in_its_own_process() -> None:
    sizes = UTAConfig(image_size=64, patch_size=8, width=64, depth=2, heads=2, mlp_hidden=96, embed_dim=8)
    wide = student.Setting(sizes, 32, "cpu", "fp32")
    seen, fed = wide.peak(student.VISIBLE, 0.75), wide.peak(student.MASK_TOKENS, 0.75)
    assert 1 << 20 < seen < fed / 2


def test_wrong_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        student.main(["--mask-ratios", "1"])
    assert "mask ratios must be in [0, 1)" in capsys.readouterr().err
