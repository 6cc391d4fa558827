"""`oner-fast eval` under torchrun's environment: the same bytes of evaluation.json for 1, 2 and 3 ranks."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from oner_fast.evaluation.cli import main
from oner_fast.evaluation.sharing import gathered, mine, shared, speaks
from oner_fast.process_group import World

SIZES = (3, 2, 1)


def rank_main(rank: int, arguments: list[str]) -> None:
    """Evaluate in groups of 3, 2 and 1 ranks, one after the other; each group has its own copy of the run."""
    torch.set_num_threads(1)
    for size, port in zip(SIZES, arguments[0].split(","), strict=True):
        if rank >= size:
            return
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        assert main([f"{arguments[1]}/{size}", *arguments[2:]]) == 0


def free_ports(count: int) -> list[int]:
    """Find ports that nothing listens on; all are held until the last is found, so that they differ."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def save_model(folder: Path, captions: list[str], data: Path) -> None:
    """Write a run with a model of random weights."""
    from oner_fast.data.tokenizer import Tokenizer
    from oner_fast.models.files import save_model
    from oner_fast.models.oner import OneR, OneRConfig

    tokenizer = Tokenizer.train(captions, 120)
    config = OneRConfig(
        image_size=16, patch_size=8, width=8, depth=1, heads=2, vocab_size=tokenizer.vocab_size, max_text_tokens=6,
        embed_dim=5, projector_hidden=7,
    )  # fmt: skip
    torch.manual_seed(0)
    save_model(folder / "model.safetensors", OneR(config), tokenizer.to_json())
    (folder / "config.json").write_text(json.dumps({"data": {"train_data": str(data)}}))


def test_any_number_of_ranks_gives_the_same_figures(data: Path, tmp_path: Path, draw: Any) -> None:
    content = bytearray((data / "val-000000.tar").read_bytes())
    at = content.find(b"\x89PNG")
    content[at + 8 : at + 60] = bytes(52)  # the first image is damaged
    (data / "val-000000.tar").write_bytes(content)
    for size in SIZES:
        save_model(tmp_path / "runs" / str(size), ["blue circle", "red arrow up", "square left"], data)
    images = [(f"{n}.png", [f"blue {n}", f"arrow {n}"][: 1 + n % 2]) for n in range(7)]
    folder = tmp_path / "images" / "blue"
    folder.mkdir(parents=True)
    for number, (name, _) in enumerate(images):
        (folder / name).write_bytes(draw(number))
    (tmp_path / "images" / "red").mkdir()
    (tmp_path / "images" / "red" / "x.png").write_bytes(draw(9))
    notes = [{"image_id": name, "caption": caption} for name, several in images for caption in several]
    coco = {"images": [{"id": name, "file_name": name} for name, _ in images], "annotations": notes}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    flags = ["--data", str(data), "--batch-size", "3", "--knn", "--image-folder", str(tmp_path / "images")]
    flags += ["--coco-json", str(tmp_path / "coco.json"), "--coco-images", str(folder)]
    ports = ",".join(map(str, free_ports(len(SIZES))))
    command = [sys.executable, __file__]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), ports, str(tmp_path / "runs"), *flags],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(max(SIZES))
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0, 0], "\n".join(outputs)
    three, two, one = ((tmp_path / "runs" / str(size) / "evaluation.json").read_bytes() for size in SIZES)
    assert one == two == three
    found = json.loads(one)
    assert (found["val"]["pairs"], found["val"]["damaged"], found["coco"]["captions"]) == (7, 1, 10)
    assert found["val"]["image_text_to_image"]["queries"] > 0 and found["zero_shot"]["images"] == 8
    # Rank 0 alone writes the table and the warning about the damaged image.
    assert outputs[0].count("evaluation.json") == 3 and outputs[0].count("left out: ") == 3
    assert outputs[1:] == ["", ""]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("batches", [0, 1, 2, 7])
def test_each_batch_belongs_to_one_rank(size: int, batches: int) -> None:
    taken = []
    for rank in range(size):
        with shared(World(rank, size, rank, torch.device("cpu"))):
            taken += list(mine(batches))
            assert speaks() == (rank == 0)
            with shared(World(0, 1, 0, torch.device("cpu")), quiet=True):
                assert not speaks() and mine(batches) == range(batches)
    assert sorted(taken) == list(range(batches))
    assert mine(batches) == range(batches) and gathered(["a"] * batches, batches) == ["a"] * batches


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), sys.argv[2:])
