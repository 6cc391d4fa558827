"""Cached features are the computed ones within the stated error, of the very pictures asked for, or absent."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from oner_fast.data.batch import PairBatch, TokenizedText
from oner_fast.data.dataset import PairDataset
from oner_fast.data.images import EvalTransform, ImageTransform
from oner_fast.models.clip import CLIPConfig, build_clip, save_clip
from oner_fast.models.teacher import Teacher, load_teacher
from oner_fast.train.uta.teacher_cache import FeatureCache, data_identity, feature_key
from oner_fast.train.uta.teacher_features import TeacherFeatures

KEY = {"teacher": "abc", "seed": 0, "transform": "none"}
SHAPE = (5, 24)


def features(count: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def images(count: int = 3, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=draw)


def open_cache(folder: Path, dtype: Any = "bf16", **key: Any) -> FeatureCache:
    return FeatureCache(folder, {**KEY, **key}, shape=SHAPE, dtype=dtype)


def test_bf16_is_exact_to_its_rounding(tmp_path: Path) -> None:
    exact = features()
    kept = open_cache(tmp_path).put(7, images(), exact)
    found = open_cache(tmp_path).get(7, images())
    assert found is not None and torch.equal(found, exact.bfloat16()) and torch.equal(found, kept)
    assert open_cache(tmp_path).get(8, images()) is None


def test_int8_is_within_its_stated_error(tmp_path: Path) -> None:
    exact = features()
    exact[0, 0] = 0.0
    exact[1, 1, 3] = 60.0  # an outlier coarsens its own token alone
    cache = open_cache(tmp_path, "int8")
    kept = cache.put(7, images(), exact)
    found = cache.get(7, images())
    assert found is not None and torch.equal(found, kept) and found.dtype == torch.float32
    step = exact.abs().amax(-1, keepdim=True) / 127
    assert ((found - exact).abs() <= 0.5001 * step).all() and not found[0, 0].any()
    errors = 1 - torch.cosine_similarity(found.double(), exact.double(), dim=-1)
    errors[0, 0] = 0.0  # zeros are kept exactly
    cache.put(8, images(), exact * 2)
    stated = cache.error()
    assert stated is not None and stated.tokens == 2 * 15
    assert stated.largest == pytest.approx(float(errors.max()), rel=1e-4)
    assert stated.mean == pytest.approx(float(errors.mean()), rel=1e-4) and 1e-6 < stated.mean < 1e-3


@pytest.mark.parametrize("dtype, size", [("bf16", 5 * 24 * 2), ("int8", 5 * 28)])
def test_the_size_on_disk_is_the_stated_one(dtype: str, size: int, tmp_path: Path) -> None:
    cache = open_cache(tmp_path, dtype)
    assert cache.bytes_per_sample == size and cache.bytes_on_disk == 0 and cache.error() is None
    cache.put(0, images(200), features(200))
    assert 200 * size <= cache.bytes_on_disk <= 200 * size + 1024


def test_another_key_is_refused_by_name(tmp_path: Path) -> None:
    open_cache(tmp_path)
    with pytest.raises(ValueError, match=r"other settings \(seed 0 -> 1\)"):
        open_cache(tmp_path, seed=1)
    with pytest.raises(ValueError, match="dtype 'bf16' -> 'int8'"):
        open_cache(tmp_path, "int8")
    with pytest.raises(ValueError, match="place None -> 3"):
        open_cache(tmp_path, place=3)
    with pytest.raises(ValueError, match="bf16, int8, got 'fp8'"):
        open_cache(tmp_path, "fp8")
    with pytest.raises(ValueError, match=r"shape \(3, 5, 24\), got \(3, 5, 23\)"):
        open_cache(tmp_path).put(0, images(), features()[..., :23])


@pytest.mark.parametrize("damage", ["bit", "cut", "empty"])
def test_damage_is_found_and_counts_as_absent(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = open_cache(tmp_path)
    cache.put(7, images(), features())
    (file,) = tmp_path.glob("step-*")
    data = bytearray(file.read_bytes())
    data[-100] ^= 4
    file.write_bytes({"bit": bytes(data), "cut": bytes(data[:-9]), "empty": b""}[damage])
    assert cache.get(7, images()) is None and file.name in caplog.text
    cache.put(7, images(), features())
    assert cache.get(7, images()) is not None


def test_features_of_other_images_are_not_returned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = open_cache(tmp_path)
    cache.put(7, images(), features())
    assert cache.get(7, images(seed=1)) is None and "of other images" in caplog.text


def test_two_ranks_write_files_of_their_own(tmp_path: Path) -> None:
    first, second = open_cache(tmp_path), open_cache(tmp_path)
    first.put(7, images(seed=0), features(seed=0), place=0)
    second.put(7, images(seed=1), features(seed=1), place=3)
    for place in (0, 1):
        found = first.get(7, images(seed=place), place=3 * place)
        assert found is not None and torch.equal(found, features(seed=place).bfloat16())
    assert len(list(tmp_path.glob("step-*"))) == 2


def test_a_killed_writer_leaves_nothing_that_is_read(tmp_path: Path) -> None:
    open_cache(tmp_path)
    leftover = tmp_path / ".step-00000007-0-3.safetensors.1-ab.tmp"
    leftover.write_bytes(b"half")
    assert open_cache(tmp_path).get(7, images()) is None and not leftover.exists()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    config = CLIPConfig(
        image_size=16, patch_size=8, vision_width=16, vision_layers=1, vision_heads=2,
        text_width=8, text_layers=1, text_heads=1, context_length=5, embed_dim=24,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    save_clip(folder, build_clip(config), config)
    return load_teacher(folder)


def batch(step: int) -> PairBatch:
    text = TokenizedText(torch.zeros(0, dtype=torch.int64), torch.zeros(4, dtype=torch.int32), torch.zeros(0))
    return PairBatch(images(seed=step), text, torch.arange(6, 9), [""] * 3, step, 0)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_runs_with_an_empty_and_a_filled_cache_get_the_same_bits(dtype: Any, teacher: Teacher, tmp_path: Path) -> None:
    runs = []
    for _ in range(2):
        queue = TeacherFeatures(teacher, open_cache(tmp_path, dtype))
        queue.submit(batch(0))
        seen = []
        for step in range(3):
            queue.submit(batch(step + 1))
            seen.append(queue.take(batch(step))[1])
        runs.append((seen, queue.computed, queue.cached))
    (cold, *counts), (warm, *again) = runs
    assert counts == [4, 0] and again == [1, 3]  # the batch that was submitted last was never taken, so never stored
    for step, (first, second) in enumerate(zip(cold, warm, strict=True)):
        assert torch.equal(first, second) and first.dtype == teacher.dtype
        torch.testing.assert_close(first, teacher.tokens(batch(step).images), rtol=0.02, atol=0.02)


def test_without_a_cache_the_features_come_from_the_teacher(teacher: Teacher) -> None:
    queue = TeacherFeatures(teacher)
    for step in (0, 1, 5):
        queue.submit(batch(step))
    for step, computed in ((0, 3), (5, 3), (6, 4)):  # 1 is dropped, 6 was never submitted
        assert torch.equal(queue.take(batch(step))[1], teacher.tokens(batch(step).images))
        assert queue.computed == computed
    assert not queue.overlaps


def test_the_key_follows_data_crop_and_seed(teacher: Teacher, tmp_path: Path) -> None:
    for name in ("train-000000.tar", "train-000001.tar"):
        with tarfile.open(tmp_path / name, "w") as tar:
            for suffix in (".png", ".txt"):
                tar.addfile(tarfile.TarInfo(f"0{suffix}"))
    data = PairDataset(tmp_path)
    base = feature_key(teacher, data, ImageTransform(16), seed=0, batch_size=8)
    assert base == feature_key(teacher, PairDataset(tmp_path), ImageTransform(16), seed=0, batch_size=8)
    others = [
        feature_key(teacher, data, ImageTransform(16), seed=1, batch_size=8),
        feature_key(teacher, data, ImageTransform(16), seed=0, batch_size=4),
        feature_key(teacher, data, ImageTransform(16, flip=0.0), seed=0, batch_size=8),
        feature_key(teacher, data, EvalTransform(16), seed=0, batch_size=8),
    ]
    assert all(other != base for other in others)
    assert data_identity(PairDataset(tmp_path / "train-000000.tar")) != base["data"]
