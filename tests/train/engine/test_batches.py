"""Sources of batches: the same training reads tars on disk and streams."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from oner_fast.data.tokenizer import Tokenizer
from oner_fast.train.config.common import Data
from oner_fast.train.engine.batches import build_tokenizer, is_stream, open_batches
from oner_fast.train.engine.distributed import World
from oner_fast.train.oner import __main__ as oner

WORDS = ["red", "green", "blue", "dark", "light"]


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    path = tmp_path / "pairs-000000.tar"
    with tarfile.open(path, "w") as file:
        for number in range(24):
            picture = io.BytesIO()
            Image.new("RGB", (16, 16), (number * 10, 40, 250 - number * 10)).save(picture, "PNG")
            caption = f"a {WORDS[number % 5]} picture"
            for extension, data in (("png", picture.getvalue()), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{number:06d}.{extension}")
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    return path


def flags(data: str, run: Path, *more: str) -> list[str]:
    small = "--image-size 16 --patch-size 8 --width 16 --depth 1 --heads 2 --embed-dim 8 --projector-hidden 16"
    small += " --predictor-hidden 16 --steps 3 --warmup 1 --batch-size 8 --save-every 3 --threads 1 --workers 0"
    return [*small.split(), "--train-data", data, "--run-dir", str(run), "--snapshot-every", "2", *more]


def test_streams_are_recognised_by_their_addresses() -> None:
    assert is_stream("pipe:cat a.tar") and is_stream("https://example.org/{00..09}.tar") and is_stream("s3://a/b.tar")
    assert not is_stream("data/pictograms") and not is_stream("data/{00..09}.tar")


def test_a_stream_needs_a_tokenizer_and_says_so() -> None:
    with pytest.raises(ValueError, match="streamed train_data needs --tokenizer PATH"):
        build_tokenizer(Data(train_data="pipe:cat pairs.tar"))


def test_training_from_a_stream_says_that_resume_is_not_exact(
    tar: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    Tokenizer.train([f"a {word} picture" for word in WORDS] * 2, 64).save(tokenizer)
    run = tmp_path / "run"
    assert oner.main(flags(f"pipe:cat {tar}", run, "--tokenizer", str(tokenizer))) == 0
    assert (run / "model.safetensors").is_file()
    assert "a resumed run begins a new pass" in caplog.text


def test_training_from_one_tar_on_disk(tar: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert oner.main(flags(str(tar), run)) == 0
    assert json.loads((run / "config.json").read_text())["data"]["train_data"] == str(tar)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 3 and lines[-1]["skipped_steps"] == 0


def test_missing_data_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert oner.main(flags(str(tmp_path / "nowhere"), tmp_path / "run")) == 1
    assert "nowhere" in capfd.readouterr().err


def test_recorded_checksums_are_compared_when_asked(tar: Path) -> None:
    content = bytearray(tar.read_bytes())
    record = {"file": tar.name, "samples": 24, "sha256": hashlib.sha256(content).hexdigest()}
    (tar.parent / "dataset.json").write_text(json.dumps({"splits": {"train": {"shards": [record]}}}))
    config = SimpleNamespace(
        data=Data(train_data=str(tar.parent), workers=0, verify_data=True),
        model=SimpleNamespace(image_size=16),
        optim=SimpleNamespace(batch_size=8),
        run=SimpleNamespace(seed=0),
    )
    world = World(0, 1, 0, torch.device("cpu"))
    assert next(open_batches(config, None, world)).images.shape == (8, 3, 16, 16)
    content[600] ^= 1
    tar.write_bytes(content)
    with pytest.raises(ValueError, match="pairs-000000.tar is not the file that was built: its sha256 is"):
        open_batches(config, None, world)
    config.data = Data(train_data="pipe:cat pairs.tar", verify_data=True)
    with pytest.raises(ValueError, match="no recorded checksums: leave out --verify-data"):
        open_batches(config, None, world)
