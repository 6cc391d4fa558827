"""The real open_clip and clip_benchmark evaluate a OneR run, a UTA run and a CLIP run of ours, unchanged."""

from __future__ import annotations

import importlib.util
import json
import pickle
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import oner_fast
from oner_fast.data.tokenizer import Tokenizer
from oner_fast.evaluation.coco import read_captions
from oner_fast.evaluation.run import evaluate_retrieval, evaluate_zero_shot
from oner_fast.evaluation.zero_shot import class_embeddings
from oner_fast.loaded_model import LoadedModel
from oner_fast.models.clip import CLIPConfig, build_clip, save_clip
from oner_fast.models.files import SCALE, save_model, save_uta
from oner_fast.models.oner import OneR, OneRConfig
from oner_fast.models.optional_packages import optional_package
from oner_fast.models.uta import UTA, UTAConfig

for package in ("open_clip", "sklearn", "clip_benchmark"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}", allow_module_level=True)
optional_package("open_clip")  # mends a torchvision that does not fit torch, which the others import too
classification = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
retrieval = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
linear_probe = pytest.importorskip("clip_benchmark.metrics.linear_probe")

counts_hits = pytest.mark.skipif(
    tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4),
    reason="NumPy 2.4 ended a conversion with which open_clip 3.3 and clip_benchmark 1.6 count hits; needs numpy<2.4",
)
NAMES = ["red", "green", "blue", "white", "black", "pink", "grey"]
CAPTIONS = [f"a {name} {shape}" for name in NAMES for shape in ("square", "field", "wall of paint that is very large")]
TOKENIZER = Tokenizer.train([*CAPTIONS, "a picture of a thing", "the drawing"], 400)
ONER = OneRConfig(
    image_size=16, patch_size=8, width=16, depth=1, heads=2, vocab_size=TOKENIZER.vocab_size, max_text_tokens=10,
    embed_dim=12, projector_hidden=16,
)  # fmt: skip
CLIP = CLIPConfig(
    image_size=16, patch_size=8, vision_width=32, vision_layers=1, vision_heads=2, text_width=16, text_layers=1,
    text_heads=2, context_length=12, embed_dim=12,
)  # fmt: skip
STUDENT = UTAConfig(24, 8, width=32, depth=1, heads=2, mlp_hidden=40, embed_dim=12)
KINDS = ("oner", "uta", "clip")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each kind, untrained."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("runs")
    save_model(root / "oner" / "model.safetensors", OneR(ONER), TOKENIZER.to_json(), 1.5)
    save_clip(root / "clip", build_clip(CLIP), CLIP)
    save_uta(root / "uta" / "model.safetensors", UTA(STUDENT), {"teacher": str(root / "clip"), SCALE: "2.5"})
    return root


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, runs: Path) -> LoadedModel:
    return oner_fast.load(runs / request.param)


def picture(number: int, label: int, size: tuple[int, int] = (30, 24)) -> Image.Image:
    """Draw noise around a colour of the class."""
    generator = torch.Generator().manual_seed(number)
    colour = torch.randint(40, 215, (3,), generator=torch.Generator().manual_seed(100 + label))
    noise = torch.randint(-30, 31, (*size, 3), generator=generator)
    return Image.fromarray((colour + noise).to(torch.uint8).numpy())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder of seven classes of three pictures, with captions of each in COCO's form."""
    root = tmp_path_factory.mktemp("images")
    entries = []
    for label, name in enumerate(sorted(NAMES)):
        (root / name).mkdir()
        for number in range(3):
            file = f"{name}/{number}.png"
            picture(10 * label + number, label).save(root / file)
            sentences = [{"raw": f"a {name} {what} {number}"} for what in ("square", "field")]
            entries.append({"filename": file, "split": "test", "sentences": sentences})
    (root / "captions.json").write_text(json.dumps({"images": entries}))
    return root


class Pictures(Dataset[Any]):
    """The pictures of a folder with their labels, or captions, in clip_benchmark's form."""

    def __init__(self, folder: Path, transform: Any, captions: bool = False) -> None:
        self.classes = sorted(NAMES)
        self.folder, self.transform, self.captions = folder, transform, captions
        self.entries = json.loads((folder / "captions.json").read_text())["images"]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, row: int) -> Any:
        entry = self.entries[row]
        image = self.transform(Image.open(self.folder / entry["filename"]))
        if self.captions:
            return image, [sentence["raw"] for sentence in entry["sentences"]]
        return image, self.classes.index(entry["filename"].partition("/")[0])


def together(pairs: list[tuple[torch.Tensor, list[str]]]) -> tuple[torch.Tensor, list[list[str]]]:
    return torch.stack([image for image, _ in pairs]), [captions for _, captions in pairs]


def test_open_clip_builds_the_classifier(model: LoadedModel) -> None:
    open_clip = optional_package("open_clip")
    templates = open_clip.OPENAI_IMAGENET_TEMPLATES[:3]
    found = open_clip.build_zero_shot_classifier(model, model.tokenize, NAMES, templates, num_classes_per_batch=3)
    ours = class_embeddings(model.encode_text, NAMES, templates)
    torch.testing.assert_close(found.T, ours, rtol=0, atol=1e-6)
    texts = [template("{}") for template in templates]
    torch.testing.assert_close(open_clip.build_zero_shot_classifier(model, model.tokenize, NAMES, texts), found)
    torch.testing.assert_close(class_embeddings(model.encode_text, NAMES, texts), ours)
    legacy = open_clip.build_zero_shot_classifier_legacy(model, model.tokenize, NAMES, templates)
    torch.testing.assert_close(legacy, found, rtol=0, atol=1e-6)
    assert not found.is_inference()  # a probe on top can save it for its gradient


@counts_hits
def test_open_clips_training_script_evaluates(model: LoadedModel, folder: Path) -> None:
    zero_shot = pytest.importorskip("open_clip_train.zero_shot")
    open_clip = optional_package("open_clip")
    classifier = open_clip.build_zero_shot_classifier(model, model.tokenize, sorted(NAMES), ["a {}"])
    loader = DataLoader(Pictures(folder, model.preprocess), batch_size=8)
    args = Namespace(device="cpu", precision="fp32", batch_size=8)
    top1, top5 = zero_shot.run(model, classifier, loader, args)
    found = evaluate_zero_shot(model, folder, classes=sorted(NAMES), templates=["a {}"], ties="topk")
    assert (found["top1"], found["top5"]) == pytest.approx((top1, top5), abs=1e-6)


@counts_hits
@pytest.mark.parametrize("amp", [False, True])
def test_clip_benchmark_classifies(model: LoadedModel, folder: Path, amp: bool) -> None:
    loader = DataLoader(Pictures(folder, model.preprocess), batch_size=64)
    templates = ["a {c}", "the drawing of a {c}"]
    found = classification.evaluate(model, loader, model.tokenize, sorted(NAMES), templates, "cpu", amp=amp)
    assert 0 < found["acc5"] < 1
    if not amp:
        ours = evaluate_zero_shot(model, folder, templates=templates, ties="topk")
        assert (ours["top1"], ours["top5"]) == pytest.approx((found["acc1"], found["acc5"]), abs=1e-6)
        assert ours["ties"] == "topk"


def test_clip_benchmark_retrieves(model: LoadedModel, folder: Path) -> None:
    loader = DataLoader(Pictures(folder, model.preprocess, captions=True), batch_size=64, collate_fn=together)
    found = retrieval.evaluate(model, loader, model.tokenize, "cpu", amp=False, recall_k_list=[1, 5, 10])
    ours = evaluate_retrieval(model, read_captions(folder / "captions.json", folder), batch_size=64, ties="topk")
    for k in (1, 5, 10):
        assert ours["image_to_text"][f"R@{k}"] == pytest.approx(found[f"text_retrieval_recall@{k}"], abs=1e-6)
        assert ours["text_to_image"][f"R@{k}"] == pytest.approx(found[f"image_retrieval_recall@{k}"], abs=1e-6)


class NamedCuda(str):
    """A device of this machine that passes for cuda where clip_benchmark asks for it by name."""

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return other == "cuda" or str.__eq__(self, other)  # type: ignore[arg-type]


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for kind in (torch.Tensor, torch.nn.Module):
        monkeypatch.setattr(kind, "cuda", lambda self: self)
    yield NamedCuda("cpu")


@counts_hits
@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_clip_benchmark_fits_a_linear_probe(model: LoadedModel, folder: Path, without_gpu: str, tmp_path: Path) -> None:
    data = Pictures(folder, model.preprocess)
    loaders = [DataLoader(data, batch_size=8) for _ in range(2)]
    found = linear_probe.evaluate(
        model, *loaders, -1, 8, 0, 0.3, 30, "run", 0, str(tmp_path / "features"), without_gpu, amp=False
    )
    kept = torch.load(tmp_path / "features" / "run" / "features_train.pt", weights_only=True)
    pixels = torch.stack([image for image, _ in data])
    torch.testing.assert_close(kept, model.encode_image(pixels), rtol=0, atol=1e-6)
    assert found["lp_acc1"] >= 1 / 7 and found["normalized"]


def test_a_clip_run_gives_what_open_clip_itself_gives(runs: Path, folder: Path) -> None:
    open_clip, ours = optional_package("open_clip"), oner_fast.load(runs / "clip")
    theirs, transform = open_clip.create_model_from_pretrained(f"local-dir:{runs}/clip")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{runs}/clip")
    assert torch.equal(ours.tokenize(CAPTIONS), tokenizer(CAPTIONS))
    assert ours.tokenize.context_length == tokenizer.context_length == 12
    square = picture(1, 1, (16, 16))
    with torch.no_grad():
        image, text, scale = theirs.eval()(transform(square)[None], tokenizer(CAPTIONS))
    found = ours(ours.preprocess(square)[None], ours.tokenize(CAPTIONS))
    for one, other in zip(found, (image, text, scale), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(ours.logit_scale, theirs.logit_scale.detach())


def test_texts_are_taken_as_strings_ids_and_packed_ids(model: LoadedModel, runs: Path) -> None:
    expected = model.encode_text(CAPTIONS)
    ids = model.tokenize(CAPTIONS)
    assert ids.shape == (len(CAPTIONS), model.tokenize.context_length) and ids.dtype == torch.int64
    torch.testing.assert_close(model.encode_text(ids), expected)
    torch.testing.assert_close(model.encode_text(ids.int()), expected)
    assert torch.equal(model.tokenize(CAPTIONS[0]), ids[:1])
    raw = model.encode_text(ids, normalize=False)
    torch.testing.assert_close(F.normalize(raw, dim=-1), expected)
    assert not torch.allclose(raw.norm(dim=-1), torch.ones(len(raw)))
    if isinstance(model, oner_fast.loading.Loaded):
        packed = model.tokenizer(CAPTIONS, ONER.max_text_tokens)
        torch.testing.assert_close(model.encode_text(packed.to("cpu")), expected)
        assert model.tokenize(CAPTIONS, 5).shape[1] == 5
        images = torch.zeros(len(CAPTIONS), 3, 16, 16, dtype=torch.uint8)
        torch.testing.assert_close(model.encode_image_text(images, ids), model.encode_image_text(images, CAPTIONS))
        with pytest.raises(ValueError, match="context_length must be from 1 to 10, which the model reads, got 11"):
            model.tokenize(CAPTIONS, 11)
    else:
        with pytest.raises(ValueError, match="context_length must be 12, which the model reads, got 5"):
            model.tokenize(CAPTIONS, 5)
        with pytest.raises(TypeError, match="packed ids are OneR's alone"):
            model.encode_text(TOKENIZER(CAPTIONS))


def test_images_may_be_floats_and_embeddings_raw(model: LoadedModel) -> None:
    side = model.preprocess.image_size
    pixels = torch.randint(256, (2, 3, side, side), dtype=torch.uint8)
    expected = model.encode_image(pixels)
    torch.testing.assert_close(model.encode_image(pixels / 255), expected)
    torch.testing.assert_close(F.normalize(model.encode_image(pixels, normalize=False), dim=-1), expected)
    patches = model.encode_patches(pixels, normalize=False)
    torch.testing.assert_close(F.normalize(patches, dim=-1), model.encode_patches(pixels))
    for wrong, told in ((pixels.float(), "from 0 to 255"), ((pixels / 255 - 0.45) / 0.25, "floats from -1.8")):
        with pytest.raises(ValueError, match=f"{told}.*use its own preprocess"):
            model.encode_image(wrong)


def test_the_scale_is_that_of_the_training(runs: Path, tmp_path: Path) -> None:
    scales = {name: float(oner_fast.load(runs / name).logit_scale) for name in KINDS}
    assert scales == pytest.approx({"oner": 1.5, "uta": 2.5, "clip": 2.6593}, abs=1e-4)
    save_model(tmp_path / "m.safetensors", OneR(ONER), TOKENIZER.to_json())
    assert float(oner_fast.load(tmp_path / "m.safetensors").logit_scale) == 0
    save_uta(tmp_path / "u.safetensors", UTA(STUDENT), {"teacher": str(runs / "clip")})
    assert float(oner_fast.load(tmp_path / "u.safetensors").logit_scale) == pytest.approx(2.6593, abs=1e-4)
    save_uta(tmp_path / "u.safetensors", UTA(STUDENT), {SCALE: "1e9"})
    with pytest.raises(ValueError, match="log_logit_scale must be a number between -20 and 20, got '1e9'"):
        oner_fast.load(tmp_path / "u.safetensors")


def test_a_loaded_model_is_a_frozen_module(model: LoadedModel) -> None:
    assert model.train() is model and not any(part.training for part in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert pickle.loads(pickle.dumps(model.preprocess)) == model.preprocess  # for a loader's workers
    images, texts, scale = model(text=CAPTIONS)
    assert images is None and texts is not None and float(scale) == pytest.approx(float(model.logit_scale.exp()))
    assert model.logit_bias is None


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        (torch.ones(3, dtype=torch.int64), ValueError, r"shape \(B, L\).*got \(3,\)"),
        (torch.ones(1, 4), TypeError, "integer dtype, got torch.float32"),
        (torch.full((2, 4), TOKENIZER.pad_id), ValueError, "text 0 of the tokens holds padding alone"),
        (torch.tensor([[5, TOKENIZER.pad_id, 5]]), ValueError, "text 0 .* before its end; pad at the end"),
        (torch.full((1, 11), 5), ValueError, "text 0 of the tokens has 11 ids, and the model reads 10"),
        (torch.tensor([[5, 9999]]), ValueError, "ids from 5 to 9999, and the model embeds 0 to"),
    ],
)
def test_bad_ids_are_named(ids: torch.Tensor, error: type[Exception], words: str, runs: Path) -> None:
    with pytest.raises(error, match=words):
        oner_fast.load(runs / "oner").encode_text(ids)


def test_bad_ids_of_a_clip_are_named(runs: Path) -> None:
    clip = oner_fast.load(runs / "clip")
    with pytest.raises(ValueError, match=r"need shape \(B, 12\) for .*clip, got \(1, 4\); use its tokenize"):
        clip.encode_text(torch.ones(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="ids from 1 to 70000, and .* embeds 0 to 49407"):
        clip.encode_text(torch.tensor([[1] * 11 + [70000]]))


@counts_hits
def test_the_example_of_the_documentation_runs(runs: Path, folder: Path) -> None:
    path = Path(__file__).parents[2] / "docs" / "examples" / "evaluate_run.py"
    spec = importlib.util.spec_from_file_location("evaluate_run", path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    found = example.zero_shot(str(runs / "oner"), str(folder))
    assert found.keys() == {"acc1", "acc5", "mean_per_class_recall", "open_clip_acc1"}
    assert all(0 <= value <= 1 for value in found.values())
    page = (path.parents[1] / "integrations" / "models.md").read_text()
    body = path.read_text().partition('"""Classify the images of a folder zero-shot."""\n')[2].partition("\n\nif ")[0]
    shown = [line.strip() for line in body.splitlines() if line.strip().startswith(("model =", "images =", "scores ="))]
    assert len(shown) == 3 and all(line in page for line in shown)
