"""The modality gap, which is the distance between images and texts in the shared space, and a flat map of both.

The gap is the distance between the centroids of the L2-normalised image and text embeddings. Read it
together with the spread of each: where all embeddings have collapsed to a point, the gap is small too.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

_NAME = re.compile(r"step-.*\.npz")


def modality_gap(image: Tensor, text: Tensor) -> float:
    """Euclidean distance, in [0, 2], between the centroids of the normalised (N, E) images and (M, E) texts."""
    return float((_centroid(image) - _centroid(text)).norm())


def spread(embeddings: Tensor) -> float:
    """Root mean square distance, in [0, 1], of the normalised (N, E) rows to their centroid; 0 is total collapse."""
    rows = _normalised(embeddings)
    return float((rows - rows.mean(0)).square().sum(1).mean().sqrt())


@dataclass(frozen=True)
class Snapshot:
    """Embeddings of a fixed validation subset at one step of training: `image` (n, E) and `text` (n, E) float32."""

    step: int
    image: Tensor
    text: Tensor


def load_snapshots(folder: Path) -> list[Snapshot]:
    """Load each `step-*.npz` in a folder (arrays `image`, `text`, scalar `step`), by step; none gives an empty list.

    Raises:
        ValueError: a file lacks one of those arrays, or they are not the finite embeddings of some pairs.
    """
    import numpy

    found: list[Snapshot] = []
    # Unlike a glob, a list says where the folder cannot be read.
    names = os.listdir(folder) if folder.is_dir() else []
    for path in sorted(folder / name for name in names if _NAME.fullmatch(name)):
        try:
            with numpy.load(path) as arrays:
                image, text = (torch.from_numpy(arrays[name].astype("float32")) for name in ("image", "text"))
                snapshot = Snapshot(int(arrays["step"]), image, text)
            if found and found[0].image.shape[1:] != image.shape[1:]:
                raise ValueError("its embeddings have another width than those of the other snapshots")
            _check_embeddings(snapshot)
        except MemoryError:
            raise
        except Exception as error:  # numpy and zipfile raise many kinds on damaged files
            raise ValueError(
                f"{path} is not a snapshot (arrays image, text and step): {error}; remove it to go on without it"
            ) from error
        found.append(snapshot)
    return sorted(found, key=lambda snapshot: snapshot.step)


def _check_embeddings(snapshot: Snapshot) -> None:
    for name, rows in (("image", snapshot.image), ("text", snapshot.text)):
        if rows.ndim != 2 or 0 in rows.shape or rows.shape[1] != snapshot.image.shape[1]:
            raise ValueError(f"{name} has shape {tuple(rows.shape)}, and (N, E) is needed")
        if not bool(rows.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinity")


@dataclass(frozen=True)
class PcaBasis:
    """Two principal axes: `mean` (E,), `axes` (2, E) orthonormal, and `explained`, the share of variance of each."""

    mean: Tensor
    axes: Tensor
    explained: tuple[float, float]

    def project(self, embeddings: Tensor) -> Tensor:
        """Project (N, E) embeddings, L2-normalised first, to coordinates (N, 2) float64."""
        return (_normalised(embeddings) - self.mean) @ self.axes.T


def fit_basis(snapshots: Sequence[Snapshot]) -> PcaBasis:
    """Fit one basis to all the given snapshots, images and texts together, so that their maps share axes.

    The largest component of each axis is positive, so that the map is always the same.
    """
    if not snapshots:
        raise ValueError("a basis needs at least one snapshot")
    rows = torch.cat([_normalised(part) for snapshot in snapshots for part in (snapshot.image, snapshot.text)])
    if rows.shape[1] < 2:
        raise ValueError(f"a map in two dimensions needs embeddings of width 2 or more, got {rows.shape[1]}")
    mean = rows.mean(0)
    centred = rows - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    axes = vectors.flip(1)[:, :2].T
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    total = float(values.clamp_min(0).sum()) or 1.0
    first, second = (float(values[-1 - i].clamp_min(0)) / total for i in range(2))
    return PcaBasis(mean, axes * torch.sign(largest), (first, second))


def _normalised(rows: Tensor) -> Tensor:
    if rows.dim() != 2 or not len(rows):
        raise ValueError(f"embeddings need shape (N, E) with N > 0, got {tuple(rows.shape)}")
    return F.normalize(rows.detach().cpu().double(), dim=1)


def _centroid(rows: Tensor) -> Tensor:
    return _normalised(rows).mean(0)
