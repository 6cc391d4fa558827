"""A cache on disk of a frozen teacher's image tokens, so that they are computed once for many runs.

The batch of a step is a pure function of (seed, step), crops included. Runs that share data, crop, seed and batch size
(other students, ablations, other initialisations) therefore see the same images at the same step. An entry is one
rank's part of one step. It also holds a checksum of the images that it was computed from, and is returned only for
those images.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from oner_fast.atomic import remove_leftovers, write_atomic
from oner_fast.data.dataset import PairDataset
from oner_fast.data.images import EvalTransform, ImageTransform
from oner_fast.models.teacher import Teacher

logger = logging.getLogger("oner_fast.train")

CacheType = Literal["bf16", "int8"]
MANIFEST = "cache.json"
VERSION = 1


@dataclass(frozen=True)
class CacheError:
    """1 - cosine between tokens as computed and as stored: the largest and the mean over `tokens` tokens."""

    largest: float
    mean: float
    tokens: int


def data_identity(dataset: PairDataset) -> str:
    """Return the SHA-256 of the names and sizes of a data set's tars, and of its number of samples."""
    described = [[path.name, path.stat().st_size] for path in dataset.shards] + [[len(dataset)]]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def feature_key(
    teacher: Teacher,
    dataset: PairDataset,
    transform: ImageTransform | EvalTransform,
    *,
    seed: int,
    batch_size: int,
) -> dict[str, Any]:
    """Return the key of a `FeatureCache`: everything that determines the teacher's tokens of a step.

    `batch_size` is global. The number of ranks is not part of the key: entries name their places in the global batch.
    """
    return {
        "teacher": teacher.fingerprint,
        "data": data_identity(dataset),
        "transform": repr(transform),
        "seed": seed,
        "batch_size": batch_size,
    }


class FeatureCache:
    """Tokens (B, T, D) by step: one file per entry, never half-written; several ranks and runs may share a folder.

    Args:
        folder: made where it is absent.
        key: everything that the tokens depend on, JSON values by name (see `feature_key`).
        shape: (T, D) of one sample.
        dtype: `bf16`, or `int8` with one float32 scale a token (the largest magnitude over 127): half the bytes.

    Raises:
        ValueError: the folder was filled under another key, shape or dtype; the text names the differences.
    """

    def __init__(self, folder: Path | str, key: Mapping[str, Any], *, shape: tuple[int, int], dtype: CacheType) -> None:
        if dtype not in get_args(CacheType):
            raise ValueError(f"dtype must be one of {', '.join(get_args(CacheType))}, got {dtype!r}")
        self.folder, self.shape, self.dtype = Path(folder), tuple(shape), dtype
        self._warned = False
        self.folder.mkdir(parents=True, exist_ok=True)
        written = {"version": VERSION, "shape": list(shape), "dtype": dtype, "key": dict(key)}
        mine = json.loads(json.dumps(written))
        path = self.folder / MANIFEST
        if not path.is_file():
            text = json.dumps(mine, indent=2) + "\n"
            write_atomic(path, lambda file: file.write(text.encode()))
            return
        theirs = json.loads(path.read_text())
        if theirs != mine:
            raise ValueError(
                f"{self.folder} holds features for other settings ({'; '.join(_differences(theirs, mine))}); "
                "give another folder, or delete it"
            )
        remove_leftovers(self.folder)

    @property
    def bytes_per_sample(self) -> int:
        """Bytes on disk of one sample's tokens, without headers."""
        tokens, width = self.shape
        return tokens * (2 * width if self.dtype == "bf16" else width + 4)

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of all entries together."""
        return sum(path.stat().st_size for path in self.folder.glob("step-*.safetensors"))

    def get(self, step: int, images: Tensor, place: int = 0) -> Tensor | None:
        """Return the tokens (B, T, D) of a step's images, or None where they are not stored.

        A damaged entry, or one of other images, is logged and counts as absent.

        Args:
            images: (B, 3, S, S) uint8 on the CPU, the images of the step from `place` of the global batch on.

        Returns:
            bfloat16 (`bf16`) or float32 (`int8`).
        """
        path = self._path(step, place, images.shape[0])
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            logger.warning("cached features %s cannot be read and are computed again: %s", path, error)
            return None
        if metadata.get("crc") != _checksum(*(tensors[name] for name in sorted(tensors))):
            logger.warning("cached features %s are damaged and are computed again", path)
            return None
        if metadata.get("pictures") != _checksum(images):
            logger.warning("cached features %s are of other images and are computed again", path)
            return None
        return self._restore(tensors)

    def put(self, step: int, images: Tensor, features: Tensor, place: int = 0) -> Tensor:
        """Store the tokens (B, T, D) of a step's images; return them as `get` will.

        Where the disk takes no more, one warning says so and nothing is stored.

        Raises:
            ValueError: another shape than the cache's.
        """
        expected = (images.shape[0], *self.shape)
        if tuple(features.shape) != expected:
            raise ValueError(f"features must have shape {expected}, got {tuple(features.shape)}")
        exact = features.detach().cpu()
        tensors = self._reduce(exact)
        restored = self._restore(tensors)
        errors = 1 - F.cosine_similarity(restored.double(), exact.double(), dim=-1)
        errors = errors.masked_fill((restored == exact).all(dim=-1), 0.0)  # a token of zeros has no cosine
        metadata = {
            "crc": _checksum(*(tensors[name] for name in sorted(tensors))),
            "pictures": _checksum(images),
            "largest_error": repr(float(errors.max())),
            "mean_error": repr(float(errors.mean())),
            "tokens": str(errors.numel()),
        }
        data = save(tensors, metadata)
        try:
            write_atomic(self._path(step, place, images.shape[0]), lambda file: file.write(data))
        except OSError as error:
            if not self._warned:
                logger.warning("features cannot be cached, and the run goes on without: %s", error)
            self._warned = True
        return restored

    def error(self) -> CacheError | None:
        """Return the error of storing over all entries of the folder; None where there is no entry."""
        largest, total, count = 0.0, 0.0, 0
        for path in sorted(self.folder.glob("step-*.safetensors")):
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
            tokens = int(metadata["tokens"])
            largest = max(largest, float(metadata["largest_error"]))
            total, count = total + tokens * float(metadata["mean_error"]), count + tokens
        return CacheError(largest, total / count, count) if count else None

    def _path(self, step: int, place: int, count: int) -> Path:
        return self.folder / f"step-{step:08d}-{place}-{count}.safetensors"

    def _reduce(self, exact: Tensor) -> dict[str, Tensor]:
        if self.dtype == "bf16":
            return {"features": exact.to(torch.bfloat16).contiguous()}
        values = exact.float()
        scale = values.abs().amax(dim=-1) / 127
        codes = (values / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)).round()
        return {"features": codes.to(torch.int8).contiguous(), "scale": scale.contiguous()}

    def _restore(self, tensors: Mapping[str, Tensor]) -> Tensor:
        if self.dtype == "bf16":
            return tensors["features"]
        return tensors["features"].float() * tensors["scale"].unsqueeze(-1)


def _checksum(*tensors: Tensor) -> str:
    crc = 0
    for tensor in tensors:
        crc = zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def _differences(theirs: dict[str, Any], mine: dict[str, Any]) -> list[str]:
    """List the differences by name, such as `seed 0 -> 1`."""
    before = {**{name: value for name, value in theirs.items() if name != "key"}, **theirs.get("key", {})}
    now = {**{name: value for name, value in mine.items() if name != "key"}, **mine["key"]}
    return [
        f"{name} {before.get(name)!r} -> {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
