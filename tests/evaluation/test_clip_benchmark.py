"""R@k equals that of the real `clip_benchmark` on the same embeddings, with ties, and from the json to the figures."""

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from oner_fast.evaluation.coco import read_captions
from oner_fast.evaluation.retrieval import KS, Ties, caption_gallery, retrieval
from oner_fast.evaluation.run import evaluate_retrieval

published = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")


class Stored:
    """A model of clip_benchmark's interface whose inputs are embeddings."""

    def encode_image(self, images: Tensor) -> Tensor:
        return images

    def encode_text(self, texts: Tensor) -> Tensor:
        return texts


def published_recall(image: Tensor, text: Tensor, captions: list[list[str]], batch: int) -> dict[str, float]:
    """Let clip_benchmark evaluate: its loader gives images with a list of captions each."""
    rows = iter(text)
    texts = [[(caption, next(rows)) for caption in several] for several in captions]
    loader = [(image[i : i + batch], texts[i : i + batch]) for i in range(0, len(image), batch)]

    def tokenizer(pairs: list[tuple[str, Tensor]]) -> Tensor:
        return torch.stack([row for _, row in pairs])

    found: dict[str, float] = published.evaluate(Stored(), loader, tokenizer, "cpu", amp=False, recall_k_list=list(KS))
    return found


def check(found: dict[str, dict[str, float | int]], expected: dict[str, float]) -> None:
    for k in KS:
        assert found["image_to_text"][f"R@{k}"] == pytest.approx(expected[f"text_retrieval_recall@{k}"], abs=1e-6)
        assert found["text_to_image"][f"R@{k}"] == pytest.approx(expected[f"image_retrieval_recall@{k}"], abs=1e-6)


def draw(rows: int, seed: int, *, coarse: bool) -> Tensor:
    """Draw embeddings; coarse ones are few different vectors, so that most queries tie with several items."""
    made = torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))
    return F.normalize(made[:, :4].sign() if coarse else made, dim=1)


@pytest.mark.parametrize(("coarse", "ties"), [(False, "miss"), (False, "topk"), (True, "topk")])
@pytest.mark.parametrize("images", [11, 150])
def test_recall_equals_clip_benchmark(coarse: bool, ties: Ties, images: int) -> None:
    captions = [[f"{i} {j}" for j in range(1 + i % 5)] for i in range(images)]
    count = sum(map(len, captions))
    image, text = draw(images, 1, coarse=coarse), draw(count, 2, coarse=coarse)
    owner = torch.tensor([i for i, several in enumerate(captions) for _ in several])
    text = text if coarse else F.normalize(text + image[owner], dim=1)  # half of the queries find their match
    matches = caption_gallery(captions, distinct=False, equal_captions_match=False).matches
    expected = published_recall(image, text, captions, batch=7)
    check(retrieval(image, text, matches, ties=ties), expected)
    assert 0 < expected["image_retrieval_recall@1"] < 1
    if coarse:  # by default ties are misses
        assert retrieval(image, text, matches)["text_to_image"]["R@1"] < expected["image_retrieval_recall@1"]


class Reader:
    """A model for images of one colour each, which encodes their number, and for captions."""

    def preprocess(self, image: Image.Image) -> Tensor:
        return torch.tensor(image.getpixel((0, 0)), dtype=torch.uint8)[:, None, None]

    def encode_image(self, images: Tensor) -> Tensor:
        return torch.stack([draw(1, int(one[0, 0, 0]), coarse=False)[0] for one in images])

    def encode_text(self, texts: list[str]) -> Tensor:
        return torch.stack([draw(1, zlib.crc32(text.encode()), coarse=False)[0] for text in texts])

    encode_patches = encode_image


@pytest.mark.parametrize("ties", ["miss", "topk"])
def test_first_five_captions_of_karpathys_json_give_clip_benchmarks_figures(tmp_path: Path, ties: Ties) -> None:
    captions = {n: [f"caption {n} {j}" for j in range(5 + n % 3)] for n in range(12)}
    captions[3][1] = captions[7][0].upper()  # the same words at another image
    for number in captions:
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    entries: list[dict[str, Any]] = [
        {"filename": f"{n}.png", "split": "test", "sentences": [{"raw": text} for text in texts]}
        for n, texts in captions.items()
    ]
    (tmp_path / "karpathy.json").write_text(json.dumps({"images": entries}))
    reader = Reader()
    found = evaluate_retrieval(reader, read_captions(tmp_path / "karpathy.json", tmp_path), batch_size=5, ties=ties)
    firsts = [texts[:5] for texts in captions.values()]
    image = torch.cat([draw(1, n, coarse=False) for n in captions])
    text = reader.encode_text([caption for several in firsts for caption in several])
    check(found, published_recall(image, text, firsts, batch=4))
    assert (found["captions"], found["captions_left_out"], found["ties"]) == (60, 12, ties)
    equal = found["equal_captions"]
    assert equal["captions"] == 2
    for way in ("image_to_text", "text_to_image"):
        assert all(equal[way][f"R@{k}"] >= found[way][f"R@{k}"] for k in KS)
