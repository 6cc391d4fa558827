import builtins
from pathlib import Path
from typing import Any

import pytest

for package in ("tyro", "rich", "webdataset", "PIL", "numpy"):
    pytest.importorskip(package, reason="needs the train extra")

from PIL import Image  # noqa: E402

from oner_fast.data.dataset import PairDataset  # noqa: E402
from oner_fast.data.sources.cli import NAMES, main  # noqa: E402
from oner_fast.remedies import install_extra_command  # noqa: E402


def test_pairs_and_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    (tmp_path / "p.csv").write_text("picture,words\na.png,red thing\n")
    command = ["pairs", str(tmp_path / "p.csv"), "--output", str(tmp_path / "out"), "--validation-percent", "0"]
    command += ["--csv-img-key", "picture", "--csv-caption-key", "words", "--csv-separator", ","]
    assert main(command) == 0
    assert "train: 1 images, 1 captions" in capsys.readouterr().err
    assert PairDataset(tmp_path / "out").read(0).caption == "red thing"
    assert main(command) == 0
    assert "was complete already" in capsys.readouterr().err
    (index := tmp_path / "out" / "train-000000.tar.index.npz").unlink()
    assert main(["index", str(tmp_path / "out" / "train-000000.tar")]) == 0
    assert index.exists()
    assert main(["index", str(tmp_path / "absent.tar")]) == 1
    assert "no such file" in capsys.readouterr().err


def test_wrong_command_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pictogram"]) == 2
    assert "unknown name 'pictogram'; known: pictograms, icons, scenes, pairs, index" in capsys.readouterr().err
    assert main(["pictograms", "--size", "large"]) == 2
    assert main(["pairs", str(tmp_path)]) == 2
    assert main(["pairs", str(tmp_path / "absent"), "--output", str(tmp_path / "out")]) == 1
    assert "no such file or folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in NAMES)


def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without_tyro(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "tyro":
            raise ModuleNotFoundError("No module named 'tyro'", name="tyro")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tyro)
    assert main(["pictograms", "--output", str(tmp_path / "out")]) == 1
    assert f"the package 'tyro' is not installed: {install_extra_command('demo')}" in capsys.readouterr().err


def test_an_interruption_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictograms = pytest.importorskip("oner_fast.data.sources.pictograms", reason="needs the demo extra")

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pictograms, "build_pictograms", interrupted)
    assert main(["pictograms", "--output", str(tmp_path)]) == 130
    assert "the same command continues" in capsys.readouterr().err
