"""Small tars of drawn images for the tests of the data."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

WORDS = [
    "red",
    "green",
    "blue",
    "round",
    "square",
    "arrow",
    "heart",
    "sun",
    "moon",
    "cloud",
    "house",
    "tree",
    "up",
    "down",
    "left",
    "right",
    "bold",
    "outline",
]

Member = tuple[str, bytes]


class Tars:
    """Make images, samples and tars."""

    @staticmethod
    def draw(i: int, side: int = 24, kind: str = "PNG") -> bytes:
        """Draw an image that differs from all others."""
        y, x = np.mgrid[:side, :side]
        pixels = np.stack([(x * (i % 7 + 1) * 9) % 256, (y * (i % 5 + 1) * 9) % 256, (x + y + i * 13) % 256], axis=2)
        out = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(out, kind)
        return out.getvalue()

    @staticmethod
    def caption(i: int) -> str:
        """Make a caption of one to three words and a number."""
        return " ".join(WORDS[(i * (k + 3) + k) % len(WORDS)] for k in range(i % 3 + 1)) + f" {i}"

    @classmethod
    def pair(cls, i: int, extension: str = "png") -> list[Member]:
        """Members of sample `i`, named as img2dataset names them."""
        key, kind = f"{i:09d}", {"png": "PNG", "jpg": "JPEG"}[extension]
        meta = json.dumps({"caption": cls.caption(i), "key": key, "concept": str(i)}).encode()
        return [
            (f"{key}.{extension}", cls.draw(i, kind=kind)),
            (f"{key}.txt", cls.caption(i).encode()),
            (f"{key}.json", meta),
        ]

    @classmethod
    def pairs(cls, numbers: Iterable[int], extension: str = "png") -> list[Member]:
        """Members of several samples."""
        return [member for i in numbers for member in cls.pair(i, extension)]

    @staticmethod
    def write(path: Path, members: Iterable[Member], form: int = tarfile.USTAR_FORMAT) -> Path:
        """Write a tar of the members in order."""
        with tarfile.open(path, "w", format=form) as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    @classmethod
    def folder(cls, folder: Path, samples: int = 40, shards: int = 2, listed: bool = True) -> Path:
        """Write a dataset folder of `samples` pairs, with dataset.json where `listed`."""
        folder.mkdir()
        per_shard = -(-samples // shards)
        entries = []
        for k in range(shards):
            numbers = range(k * per_shard, min(samples, (k + 1) * per_shard))
            name = f"train-{k:06d}.tar"
            cls.write(folder / name, cls.pairs(numbers))
            entries.append({"file": name, "samples": len(numbers)})
        if listed:
            listing = {"name": "test", "format": 1, "splits": {"train": {"samples": samples, "shards": entries}}}
            (folder / "dataset.json").write_text(json.dumps(listing))
        return folder


@pytest.fixture(scope="session")
def tars() -> type[Tars]:
    """The class that makes images, samples and tars."""
    return Tars
