"""Exported folders give the embeddings of `oner_fast.load`: in PyTorch to 1e-5, in ONNX as near as the command says."""

from __future__ import annotations

import contextlib
import io
import json
import re
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import oner_fast
from oner_fast.data.tokenizer import Tokenizer
from oner_fast.export.cli import Options, export, main
from oner_fast.export.convert import plain_tower
from oner_fast.export.hub.plain_tower import PlainTower
from oner_fast.export.model_card import model_card
from oner_fast.export.onnx_errors import padded
from oner_fast.models.files import save_model
from oner_fast.models.oner import OneR, OneRConfig
from oner_fast.models.optional_packages import optional_package

TEXTS = ["arrow", "big red cat", "Été [MASK] of the cat, bold", ""]
CONFIG = OneRConfig(
    image_size=24,
    patch_size=8,
    width=32,
    depth=2,
    heads=2,
    max_text_tokens=12,
    embed_dim=16,
    projector_hidden=24,
)


def pictures(count: int = 3) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (30, 41 + n, 3), dtype=np.uint8)) for n in range(count)]


def make_run(folder: Path, **changes: Any) -> Path:
    """A run with a tower of random weights, figures, and data that state a licence."""
    tokenizer = Tokenizer.train(["arrow up", "big red cat", "bold cat", "été"] * 3, 90)
    torch.manual_seed(1)
    tower = OneR(replace(CONFIG, vocab_size=tokenizer.vocab_size, **changes))
    with torch.no_grad():
        for weights in tower.parameters():  # fresh biases are 0 and fresh branches small: a mistake would not show
            weights.add_(0.2 * torch.randn_like(weights))
    data = folder / "data"
    data.mkdir(parents=True)
    with tarfile.open(data / "val-000000.tar", "w") as tar:
        for number, picture in enumerate(pictures(4)):
            out = io.BytesIO()
            picture.save(out, "png")
            for suffix, content in (("png", out.getvalue()), ("txt", f"cat {number}".encode())):
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    splits = {"val": {"samples": 4, "shards": [{"file": "val-000000.tar", "samples": 4}]}}
    credit = {"title": "Drawn | here", "author": "A <b>", "licence": "CC-BY-4.0", "samples": 1234}
    listing = {"name": "tiny", "format": 1, "splits": splits, "attribution": [credit]}
    (data / "dataset.json").write_text(json.dumps(listing))
    run = folder / "run"
    run.mkdir()
    save_model(run / "model.safetensors", tower, tokenizer.to_json())
    settings = {"data": {"train_data": str(data)}, "run": {"recipe": "mine"}}
    (run / "config.json").write_text(json.dumps(settings))
    figures = {f"{kind}{k}": k / 40 for kind in ("R@", "chance@") for k in (1, 5, 10)} | {"queries": 5, "gallery": 4321}
    (run / "evaluation.json").write_text(json.dumps({"val": {"data": str(data), "text_to_image": figures}}))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def two_towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose every map exists twice, with linear heads."""
    return make_run(tmp_path_factory.mktemp("two"), shared_trunk=False, shared_head=False, projector_hidden=0)


def blocks(folder: Path) -> list[str]:
    """The Python blocks of a folder's README, in order."""
    return re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() < 1e-5)


@pytest.mark.parametrize("towers", ["run", "two_towers"])
def test_ten_lines_of_plain_pytorch_give_the_same_embeddings(
    towers: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = request.getfixturevalue(towers)
    assert main([str(run), "--to", "plain", "--out", str(tmp_path)]) == 0
    loading, use, pixels = blocks(tmp_path)
    lines = [line for line in loading.splitlines() if line and not line.startswith(("import ", "from "))]
    assert len(lines) == 10 + (towers == "two_towers") and max(map(len, lines)) <= 120
    assert "oner_fast" not in loading + use + pixels
    picture = pictures(1)[0]
    picture.save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for block in (pixels, loading):
        exec(block, namespace)
    namespace["pixels"] = torch.from_numpy(namespace["pixels"])
    results = []
    for statement in use.splitlines():
        if statement.startswith("embed("):
            with torch.no_grad():
                results.append(eval(statement, namespace))
        else:
            exec(statement, namespace)
    loaded = oner_fast.load(run)
    expected = [loaded.encode_text(["a red apple"]), loaded.encode_image(picture)]
    if towers == "run":
        expected.append(loaded.encode_image_text(picture, ["a red apple"]))
    assert len(results) == len(expected)
    assert all(close(ours, theirs) for ours, theirs in zip(expected, results, strict=True))


@pytest.mark.parametrize("towers", ["run", "two_towers"])
def test_transformers_gives_the_same_embeddings(
    towers: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with contextlib.suppress(ModuleNotFoundError):
        optional_package("timm")  # a torchvision whose compiled part does not fit torch can be imported after this
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (oner_fast[test])")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    run = request.getfixturevalue(towers)
    folder = tmp_path / "model"
    export(Options(run, to="transformers", out=folder))
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    preprocess = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    loaded = oner_fast.load(run)
    text = tokenizer(TEXTS[:3], padding=True, truncation=True, return_tensors="pt")
    image = preprocess(pictures())
    with torch.no_grad():
        assert close(loaded.encode_text(TEXTS[:3]), model(**text).embeds)
        assert close(loaded.encode_image(pictures()), model(**image).embeds)
        assert close(loaded.encode_patches(pictures()), model.get_patch_features(image["pixel_values"]))
        if towers == "run":
            assert close(loaded.encode_image_text(pictures(), TEXTS[:3]), model(**image, **text).embeds)
        with pytest.raises(ValueError, match="give pixel_values, input_ids, or both"):
            model()


def rounded(folder: Path, loaded: Any) -> PlainTower:
    """The tower with the weights as the folder's graphs store them, in float32."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed (oner_fast[export])")
    stored = {
        each.name: onnx.numpy_helper.to_array(each).astype(np.float32)
        for name in ("image", "image_text", "text")
        for each in onnx.load(folder / f"{name}.onnx").graph.initializer
    }
    tower = plain_tower(loaded.model)
    state = tower.state_dict()
    for name, before in state.items():
        weights = torch.from_numpy(stored[name] * stored.get(f"{name}.scale", np.float32(1)))
        linear = name.startswith(("trunk", "head")) and before.ndim == 2
        state[name] = weights.T if linear else weights
    tower.load_state_dict(state)
    return tower


@pytest.mark.parametrize(("precision", "step"), [("float32", 0.0), ("float16", 2**-11), ("int8", 1 / 254)])
def test_onnx_graphs_compute_with_the_stored_weights(
    precision: str, step: float, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They equal PyTorch with the rounded weights to 1e-5, and no weight is rounded by more than half a step."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (oner_fast[export])")
    assert main([str(run), "--to", "onnx", "--precision", precision, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    loaded = oner_fast.load(run)
    tower, exact = rounded(tmp_path, loaded), plain_tower(loaded.model).state_dict()
    for name, weights in tower.state_dict().items():
        assert (weights - exact[name]).abs().max() <= step * exact[name].abs().max() * 1.001, name
    ids, mask = padded(loaded, TEXTS)
    pixels = torch.stack([loaded.preprocess(picture) for picture in pictures(len(TEXTS))])
    given = {"pixels": pixels.numpy(), "input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    expected = {
        "image": tower.encode_image(pixels),
        "text": tower.encode_text(ids, mask),
        "patches": tower.encode_patches(pixels),
        "image_text": tower.encode_image_text(pixels, ids, mask),
    }
    for name, ours in expected.items():
        stated = re.search(rf"^{name}: differs from float32 by (\S+) at most$", said, re.MULTILINE)
        assert stated and (float(stated[1]) < 1e-5) == (precision == "float32"), name
        session = onnxruntime.InferenceSession(tmp_path / f"{name}.onnx")
        wanted = {each.name: given[each.name] for each in session.get_inputs()}
        assert close(ours, torch.from_numpy(session.run(None, wanted)[0])), name
    sizes = {"float32": 4, "float16": 2, "int8": 1}
    parameters = sum(each.numel() for name, each in loaded.model.named_parameters() if "mask_token" not in name)
    assert 1 <= (tmp_path / "weights.bin").stat().st_size / (parameters * sizes[precision]) < 1.6


def test_graphs_of_two_towers_read_no_pairs(two_towers: Path, tmp_path: Path) -> None:
    out, errors = export(Options(two_towers, to="onnx", out=tmp_path, precision="float32"))
    assert errors.keys() == {"image", "text", "patches"} and max(errors.values()) < 1e-5
    assert not (out / "image_text.onnx").exists()


def test_the_card_holds_figures_and_licences(run: Path) -> None:
    out, _ = export(Options(run, to="plain"))
    assert out == run / "export" / "plain"
    card = (out / "README.md").read_text()
    assert "| val | text → image | 5 | 4,321 | 2.5 % (2.5 %) | 12.5 % (12.5 %) | 25.0 % (25.0 %) |" in card
    assert "| Drawn \\| here | A &lt;b> | CC-BY-4.0 | 1,234 |" in card
    parameters = sum(each.numel() for each in oner_fast.load(run).model.parameters())
    assert f"{parameters - CONFIG.width:,} parameters" in card and "recipe `mine`" in card  # less the mask token


def test_a_fine_tuned_model_credits_the_data_behind_the_weights_that_it_began_with(run: Path, tmp_path: Path) -> None:
    first, data = tmp_path / "first", tmp_path / "earlier"
    for folder in (first, data, tmp_path / "tuned"):
        folder.mkdir()
    (data / "dataset.json").write_text(
        json.dumps({"attribution": [{"title": "Earlier", "author": "B", "licence": "CC-BY-SA-4.0", "samples": 7}]})
    )
    (first / "config.json").write_text(json.dumps({"data": {"train_data": str(data)}}))
    gone = str(tmp_path / "gone" / "checkpoints" / "step-00000007.pt")
    before = [
        {"kind": "phase", "given": gone, "file": gone, "sha256": "0", "step": 7},
        {"kind": "weights", "given": str(first), "file": str(first / "model.safetensors"), "sha256": "0", "step": None},
        {"kind": "continuation", "given": "x", "file": "/x/checkpoints/step-00000001.pt", "sha256": "0", "step": 1},
    ]
    tuned = tmp_path / "tuned"
    (tuned / "config.json").write_bytes((run / "config.json").read_bytes())
    (tuned / "lineage.json").write_text(json.dumps({"format_version": 1, "lineage": before}))
    config = {"shared_trunk": True, "image_size": 24, "embed_dim": 16, "max_text_tokens": 12}
    card = model_card(tuned, config, 5, "")
    assert "began with the weights of gone/step-00000007.pt, after 7 steps, then first/model.safetensors." in card
    assert "| Earlier | B | CC-BY-SA-4.0 | 7 |" in card and "| Drawn \\| here |" in card
    assert "The data of gone/step-00000007.pt, after 7 steps, with whose weights it began, are not listed here." in card
    (tuned / "lineage.json").write_text(json.dumps({"format_version": 1, "lineage": [before[0] | {"file": 5}]}))
    with pytest.raises(ValueError, match="is no list of the runs before this one"):
        model_card(tuned, config, 5, "")


def test_a_run_without_figures_and_data_says_so(run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    card = (export(Options(bare, to="plain"))[0] / "README.md").read_text()
    assert "has not been evaluated" in card and "state no licence" in card


def test_no_file_but_those_of_an_earlier_export_is_replaced(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    project = tmp_path / "project"
    project.mkdir()
    (project / "README.md").write_text("mine")
    for out, name in ((run, "config.json"), (project, "README.md")):
        for form in ("plain", "onnx"):
            assert main([str(run), "--to", form, "--out", str(out)]) == 1
            assert f"{out} holds {name}, which no export wrote" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert (project / "README.md").read_text() == "mine" and len(list(project.iterdir())) == 1
    out = tmp_path / "new"
    for _ in range(2):
        assert main([str(run), "--to", "plain", "--out", str(out)]) == 0


def test_what_cannot_be_exported_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), "--to", "plain", "--precision", "int8"]) == 1
    assert "--to plain writes float32, got --precision int8" in capsys.readouterr().err
    assert main([str(tmp_path / "none"), "--to", "plain"]) == 1
    assert "no run folder" in capsys.readouterr().err
    (run / "evaluation.json").rename(run / "kept.json")
    (run / "evaluation.json").write_text(json.dumps({"val": {"text_to_image": {"R@1": 0.5}}}))
    assert main([str(run), "--to", "plain"]) == 1
    assert "lacks a figure of val" in capsys.readouterr().err
    (run / "kept.json").replace(run / "evaluation.json")
    monkeypatch.setattr(oner_fast, "load", lambda _: object(), raising=False)
    assert main([str(run), "--to", "plain"]) == 1
    assert "holds no tower of OneR" in capsys.readouterr().err
