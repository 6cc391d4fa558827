"""The loader against webdataset's own pipeline, on a synthetic tar of JPEGs."""

from __future__ import annotations

import io
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor

from oner_fast.benchmarks.cases import OURS
from oner_fast.benchmarks.timing import Candidate, Samples, interleave
from oner_fast.data.dataset import PairDataset
from oner_fast.data.images import RANDOMS, ImageTransform, decode
from oner_fast.data.loader import PairLoader

SAME, PIL = "webdataset, our decoding", "webdataset, PIL"


class LoaderContest:
    """A round makes one batch of uint8 images and captions, in this process.

    Every contender reads the same tar without end and crops at random. webdataset's pipeline shuffles within a buffer,
    as its users do.
    """

    SAMPLES: ClassVar[int] = 96
    BATCH: ClassVar[int] = 16
    WIDTH: ClassVar[int] = 320
    HEIGHT: ClassVar[int] = 256
    SIZE: ClassVar[int] = 224
    SHAPE: ClassVar[str] = f"{BATCH} JPEGs of {WIDTH} x {HEIGHT} to {SIZE} px"

    def __enter__(self) -> LoaderContest:
        self._folder = tempfile.TemporaryDirectory()
        self.tar = Path(self._folder.name) / "train-00000.tar"
        write_tar(self.tar, self.SAMPLES, (self.WIDTH, self.HEIGHT))
        return self

    def __exit__(self, *raised: object) -> None:
        self._folder.cleanup()

    def runs(self) -> dict[str, Callable[[int], Tensor]]:
        """Make the contenders: each call returns the images of its next batch (B, 3, S, S)."""
        loader = PairLoader(
            PairDataset(str(self.tar)), None, batch_size=self.BATCH, seed=0, image_size=self.SIZE,
            transform=self._transform(),
        )  # fmt: skip
        ours = iter(loader)
        same, pil = self._webdataset(self._by_our_transform()), self._webdataset(self._by_pil())
        return {
            OURS: lambda call: next(ours).images,
            SAME: lambda call: next(same),
            PIL: lambda call: next(pil),
        }

    def samples(self, seconds: float, least_rounds: int) -> dict[str, Samples]:
        """Measure the contenders in turn, for so many seconds and rounds at least."""
        candidates = [Candidate(name, run) for name, run in self.runs().items()]
        return interleave(candidates, seconds=seconds, least_rounds=least_rounds)

    def _transform(self) -> ImageTransform:
        return ImageTransform(self.SIZE, (0.5, 1.0))

    def _webdataset(self, convert: Callable[[bytes], Tensor]) -> Iterator[Tensor]:
        pipeline = webdataset.WebDataset(str(self.tar), shardshuffle=False, empty_check=False).shuffle(self.SAMPLES)
        samples: Any = iter(pipeline.to_tuple("jpg", "txt").repeat())
        while True:
            pairs = [next(samples) for _ in range(self.BATCH)]
            captions = [text.decode() for _, text in pairs]
            yield torch.stack([convert(jpeg) for jpeg, _ in pairs])
            del captions

    def _by_our_transform(self) -> Callable[[bytes], Tensor]:
        transform, draw = self._transform(), np.random.default_rng(0)

        def convert(jpeg: bytes) -> Tensor:
            return transform(decode(jpeg, "image", transform.decode_side), draw.integers(2**32, size=RANDOMS))

        return convert

    def _by_pil(self) -> Callable[[bytes], Tensor]:
        """Make what a user of PIL alone writes: open, crop a random half to all of the area, resize."""
        draw = np.random.default_rng(0)

        def convert(jpeg: bytes) -> Tensor:
            image = Image.open(io.BytesIO(jpeg)).convert("RGB")
            share = draw.uniform(0.5, 1.0) ** 0.5
            width, height = (int(length * share) for length in image.size)
            left, top = int(draw.integers(image.width - width + 1)), int(draw.integers(image.height - height + 1))
            box = (left, top, left + width, top + height)
            image = image.resize((self.SIZE, self.SIZE), Image.Resampling.BICUBIC, box)
            return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

        return convert


def write_tar(path: Path, samples: int, size: tuple[int, int]) -> None:
    """Write a tar of `samples` pairs in webdataset's format: smooth random JPEGs of `size`, and captions."""
    draw = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for number in range(samples):
            coarse = draw.integers(256, size=(size[1] // 16, size[0] // 16, 3), dtype=np.uint8)
            encoded = io.BytesIO()
            Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(encoded, "JPEG", quality=90)
            for name, data in ((f"{number:05}.jpg", encoded.getvalue()), (f"{number:05}.txt", b"a picture")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
