"""A small data set and a model for it: each image's colour encodes its number, and the model knows the captions."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import oner_fast
from oner_fast.evaluation.splits import words

TRAIN = ["red square", "blue square", "red circle", "arrow left", "arrow right"]
VAL = ["blue circle", "Blue Circle", "arrow", "arrow up", "square left", "purple square", "blue arrow", "blue arrow up"]


def picture(number: int) -> bytes:
    """Draw a PNG of one colour, which encodes its number."""
    out = io.BytesIO()
    Image.new("RGB", (20, 20), (number, 255 - number, 50)).save(out, "png")
    return out.getvalue()


@pytest.fixture
def draw() -> Callable[[int], bytes]:
    """The function that draws such images."""
    return picture


class Reader:
    """Embed an image as the words of its caption plus a small part of its own, so that retrieval is nearly perfect."""

    def __init__(self, captions: dict[int, str], *, width: int = 32, collapsed: bool = False) -> None:
        self.captions, self.width, self.collapsed = captions, width, collapsed
        self.config = SimpleNamespace(shared_trunk=True)

    def _words(self, text: str) -> Tensor:
        total = torch.zeros(self.width)
        for word in words(text) or ["nothing"]:
            seed = int(hashlib.sha1(word.encode()).hexdigest()[:8], 16)
            total += torch.randn(self.width, generator=torch.Generator().manual_seed(seed))
        return torch.ones(self.width) if self.collapsed else total

    def preprocess(self, image: Image.Image) -> Tensor:
        return torch.tensor(image.getpixel((0, 0)), dtype=torch.uint8)[:, None, None].expand(3, 16, 16).contiguous()

    def _caption(self, pixels: Tensor) -> str:
        return self.captions[int(pixels[0, 0, 0])]

    def encode_image(self, images: Tensor) -> Tensor:
        return F.normalize(torch.stack([self._words(self._caption(one)) for one in images]), dim=1)

    def encode_text(self, texts: list[str]) -> Tensor:
        return F.normalize(torch.stack([self._words(text) for text in texts]), dim=1)

    def encode_image_text(self, images: Tensor, texts: list[str]) -> Tensor:
        both = [self._words(self._caption(one) + " " + text) for one, text in zip(images, texts, strict=True)]
        return F.normalize(torch.stack(both), dim=1)

    def encode_patches(self, images: Tensor) -> Tensor:
        return self.encode_image(images)[:, None].expand(-1, 16, -1)


def write_split(path: Path, first: int, captions: list[str], also: dict[int, list[str]] | None = None) -> None:
    with tarfile.open(path, "w") as tar:
        for number, caption in enumerate(captions, start=first):
            meta = {"caption": caption} | ({"also": also[number]} if also and number in also else {})
            members = {"png": picture(number), "txt": caption.encode(), "json": json.dumps(meta).encode()}
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{number:06d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set with a train and a val split."""
    folder = tmp_path / "data"
    folder.mkdir()
    splits: dict[str, Any] = {}
    for name, first, captions in (("train", 0, TRAIN), ("val", 100, VAL)):
        write_split(folder / f"{name}-000000.tar", first, captions)
        shard = {"file": f"{name}-000000.tar", "samples": len(captions)}
        splits[name] = {"samples": len(captions), "captions": len(captions), "shards": [shard]}
    (folder / "dataset.json").write_text(json.dumps({"name": "colours", "format": 1, "splits": splits}))
    return folder


@pytest.fixture
def reader() -> Reader:
    return Reader(dict(enumerate(VAL, start=100)))


@pytest.fixture
def run(tmp_path: Path, data: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder whose model is the reader."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "config.json").write_text(json.dumps({"data": {"train_data": str(data)}}))
    monkeypatch.setattr(oner_fast, "load", lambda path, device, **_: reader, raising=False)
    return folder
