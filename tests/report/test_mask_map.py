"""The map of masking probabilities: its values and its file."""

from pathlib import Path

import pytest
from PIL import Image

from oner_fast.report.mask_map import main, masking_probabilities


def test_probabilities_of_the_three_patterns() -> None:
    """Compare with UTA's figures on a 16 x 16 grid, to their second decimal and four binomial deviations."""
    for pattern, corner, centre in (("random", 0.5, 0.5), ("block", 0.05, 0.86), ("reversed_block", 0.95, 0.14)):
        share = masking_probabilities(pattern, draws=400)  # type: ignore[arg-type]
        assert share.mean().item() == pytest.approx(0.5, abs=1e-12)
        for found, expected in ((share[::15, ::15], corner), (share[7:9, 7:9], centre)):
            deviation = (expected * (1 - expected) / 400) ** 0.5
            assert (found - expected).abs().max() < 0.005 + 4 * deviation


def test_the_command_writes_a_png_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures" / "masks.png"
    assert main([str(path), "--draws", "50", "--grid", "6"]) == 0
    assert "masks.png" in capsys.readouterr().out
    with Image.open(path) as picture:
        assert picture.width > 2 * picture.height
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 20
    first = path.read_bytes()
    assert main([str(path), "--draws", "50", "--grid", "6"]) == 0
    assert path.read_bytes() == first
    assert main([str(path), "--draws", "0"]) == 1
    assert "draws must be at least 1" in capsys.readouterr().err
