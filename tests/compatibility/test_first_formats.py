"""Files that the first version of oner_fast wrote load, resume and evaluate; files of a later version are refused.

`first_formats/` holds runs of ten steps by that version, trained on `pairs/` with `--threads 1 --precision fp32`:
`oner/` with the checkpoint of step 5 and the model of step 10, and `uta/`, whose teacher is not kept.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import oner_fast
from oner_fast.evaluation import cli as evaluation
from oner_fast.evaluation.folder import read_config
from oner_fast.models.files import load_model, load_uta, read_metadata
from oner_fast.train.config.serialization import load_json, save_json
from oner_fast.train.engine import checkpoint
from oner_fast.train.oner import __main__ as oner
from oner_fast.train.oner.settings import OneRConfiguration
from oner_fast.train.uta.settings import UTAConfiguration

FILES = Path(__file__).parent / "first_formats"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of OneR's run beside its data, which its configuration names relative to the working directory."""
    shutil.copytree(FILES / "oner", tmp_path / "oner")
    shutil.copytree(FILES / "pairs", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "oner"


def flags(run: Path) -> list[str]:
    """The command line of the run's configuration."""
    c = load_json(OneRConfiguration, run / "config.json")
    model = {name: getattr(c.model, name) for name in (
        "image_size", "patch_size", "width", "depth", "heads", "embed_dim", "projector_hidden", "max_text_tokens",
    )}  # fmt: skip
    others = {"predictor_hidden": c.objectives.predictor_hidden, "tokenizer_vocab": c.data.tokenizer_vocab}
    optim = {name: getattr(c.optim, name) for name in ("steps", "batch_size", "accum_freq", "warmup")}
    given = {**model, **others, **optim, "run_dir": run.name, "train_data": c.data.train_data, "workers": 0}
    given |= {"threads": 1, "precision": c.run.precision, "device": "cpu", "snapshot_every": 0}
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def test_a_run_resumes_to_the_model_that_the_first_version_trained(run: Path) -> None:
    before = load_file(run / "model.safetensors")
    (run / "model.safetensors").unlink()
    assert oner.main(flags(run)) == 0
    assert [path.name for path in checkpoint.saved(run / "checkpoints")] == ["step-00000005.pt", "step-00000010.pt"]
    after = load_file(run / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        # To the bit on the machine that wrote the files; another one may add in another order.
        torch.testing.assert_close(after[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_a_run_evaluates(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluation.main([str(run), "--data", "data/val-000000.tar"]) == 0, capsys.readouterr().err


def test_models_and_checkpoints_load(run: Path) -> None:
    model = oner_fast.load(run)
    assert model.encode_text(["a red image"]).shape == (1, 8)
    (run / "model.safetensors").unlink()
    assert oner_fast.load(run).encode_text(["a red image"]).shape == (1, 8)
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    for source in (FILES / "uta", FILES / "uta" / "checkpoints" / "step-00000010.pt"):
        assert oner_fast.load(source).encode_image(images).shape == (1, 8)


def test_configurations_load() -> None:
    assert load_json(OneRConfiguration, FILES / "oner" / "config.json").optim.accum_freq == 2
    assert load_json(UTAConfiguration, FILES / "uta" / "config.json").alignment.teacher == "clip"


def test_files_carry_a_version_and_a_newer_one_is_refused(run: Path) -> None:
    newer = r"has format version 2, and this oner_fast reads versions up to 1"

    path = run / "config.json"
    save_json(load_json(OneRConfiguration, path), path)
    written = json.loads(path.read_text())
    assert written["format_version"] == 1
    path.write_text(json.dumps(written | {"format_version": 2, "something": "new"}))
    for read in (lambda: load_json(OneRConfiguration, path), lambda: read_config(run)):
        with pytest.raises(ValueError, match=rf"config\.json {newer}"):
            read()

    path = run / "checkpoints" / "step-00000005.pt"
    state = torch.load(path, weights_only=True)
    assert state["format"] == 1
    torch.save(state | {"format": 2}, path)
    with pytest.raises(ValueError, match=rf"step-00000005\.pt {newer}"):
        checkpoint.load(path)

    for name, load in (("oner", load_model), ("uta", load_uta), ("uta", read_metadata)):
        path = FILES / name / "model.safetensors"
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        assert "format_version" not in metadata
        save_file(load_file(path), run / "newer.safetensors", metadata | {"format_version": "2"})
        with pytest.raises(ValueError, match=rf"newer\.safetensors {newer}"):
            load(run / "newer.safetensors")
