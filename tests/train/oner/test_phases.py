"""Begin with the weights of a run (`--init-from`), and begin new phases of a run (`--resume OLD --run-dir NEW`)."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import oner_fast
from oner_fast.nn.positions import resample_grid
from oner_fast.train.engine import checkpoint, loop
from oner_fast.train.oner import __main__ as oner

SETTINGS: dict[str, Any] = {
    "image_size": 12, "patch_size": 4, "width": 16, "depth": 1, "heads": 2, "embed_dim": 8, "projector_hidden": 16,
    "predictor_hidden": 16, "max_text_tokens": 8, "tokenizer_vocab": 80, "batch_size": 8, "steps": 4, "warmup": 1,
    "lr": 1e-3, "save_every": 2, "log_every_n_steps": 1, "snapshot_every": 0, "workers": 0, "threads": 1,
    "precision": "fp32", "device": "cpu", "keep_checkpoints": 3,
}  # fmt: skip


def make_pairs(path: Path, words: str, count: int = 17) -> Path:
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            png = io.BytesIO()
            Image.new("RGB", (20, 14 + i), (12 * i, 255 - 12 * i, 7 * i)).save(png, "PNG")
            for name, data in ((f"{i}.png", png.getvalue()), (f"{i}.txt", f"{words} number {i % 4}".encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


class Bench:
    """A finished run of four steps, and commands that begin from it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, make_pairs(folder / "pairs.tar", "a red cat")
        self.old = folder / "old"
        assert self.train("old") == 0

    def words(self, run: str, **changes: Any) -> list[str]:
        settings = {"train_data": self.data, "run_dir": self.folder / run, **SETTINGS, **changes}
        return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]

    def train(self, run: str, **changes: Any) -> int:
        try:
            return oner.main(self.words(run, **changes))
        except SystemExit as error:
            return int(error.code or 0)

    def state(self, run: str, step: int) -> dict[str, Any]:
        return checkpoint.load(self.folder / run / "checkpoints" / f"step-{step:08d}.pt")

    def lines(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / run / "metrics.jsonl").read_text().splitlines()]

    def lineage(self, run: str) -> list[dict[str, Any]]:
        return json.loads((self.folder / run / "lineage.json").read_text())["lineage"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The finished run, once; a test uses folders of its own names beside it."""
    return Bench(tmp_path_factory.mktemp("phases"))


STILL = {"lr": 0.0, "min_lr": 0.0, "steps": 1, "warmup": 0, "save_every": 1, "momentum": 1.0}


@pytest.mark.parametrize("source", ["old", "old/model.safetensors", "old/checkpoints/step-00000004.pt"])
def test_the_weights_are_those_of_the_source(bench: Bench, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = f"weights {source.count('/')} {source[-2:]}"
    assert bench.train(run, init_from=bench.folder / source, **STILL) == 0
    assert "begins with the weights of" in capsys.readouterr().out
    before, after = bench.state("old", 4), bench.state(run, 1)
    whole = source.endswith(".pt")
    for name, tensor in before["student"].items():
        new = name.startswith(("word_head", "patch_head")) and not whole
        assert torch.equal(after["student"][name], tensor) != new, name
    for name, tensor in before["teacher"].items():
        assert torch.equal(after["teacher"][name], tensor), name
    assert after["tokenizer"] == before["tokenizer"]
    (origin,) = bench.lineage(run)
    assert origin["kind"] == "weights" and len(origin["sha256"]) == 64
    assert origin["step"] == (4 if whole else None)
    assert origin["file"] == str(bench.folder / (source if "." in source else f"{source}/model.safetensors"))
    assert json.loads((bench.folder / run / "config.json").read_text())["run"]["init_from"].endswith(source)


def test_positions_are_resampled_and_longer_texts_repeat_the_last_position(bench: Bench) -> None:
    assert bench.train("larger", init_from=bench.old, image_size=24, max_text_tokens=11, **STILL) == 0
    before, after = (oner_fast.load(bench.folder / run).model.state_dict() for run in ("old", "larger"))
    patches, words = "patch_embedding.positions", "word_embedding.positions"
    assert torch.equal(after[patches], resample_grid(before[patches], 6)) and after[patches].shape == (36, 16)
    assert torch.equal(after[words][:8], before[words])
    assert torch.equal(after[words][8:], before[words][7:].expand(3, -1))
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - {patches, words})


def test_words_of_other_data_are_counted(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    other = make_pairs(bench.folder / "other.tar", "a Ω cart")
    with caplog.at_level("INFO"):
        assert bench.train("other words", init_from=bench.old, train_data=other, **STILL) == 0
    # "a", "number" and 0 to 3 are known; "cart" is read as "ca" and "##r" and so on; the Greek letter is unknown.
    assert "of 85 words in 17 captions, 17 (20.0%) are read in pieces, and 17 (20.0%) become [UNK]" in caplog.text
    assert "gives tower, predictor; new are word_head, patch_head" in caplog.text
    assert (bench.folder / "other words" / "tokenizer.json").read_text() == (bench.old / "tokenizer.json").read_text()


def test_a_run_from_weights_resumes_with_the_same_command(bench: Bench) -> None:
    assert bench.train("twice", init_from=bench.old, seed=1) == 0
    before = (bench.folder / "twice" / "model.safetensors").read_bytes()
    origins = bench.lineage("twice")
    os.remove(bench.folder / "twice" / "checkpoints" / "step-00000004.pt")
    assert bench.train("twice", init_from=bench.old, seed=1) == 0
    assert (bench.folder / "twice" / "model.safetensors").read_bytes() == before
    assert bench.lineage("twice") == origins and len(origins) == 1


def test_a_new_phase_carries_weights_moments_and_teacher_over(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[dict[str, Any]] = []
    original = loop.Training.run

    def run(self: Any, stop: Any) -> str | None:
        copies = {name: each.clone() for name, each in self.student.state_dict().items()}
        groups = self.optimizer.state_dict()
        seen.append({"student": copies, "moments": groups["state"], "wd": groups["param_groups"][0]["weight_decay"]})
        return original(self, stop)

    monkeypatch.setattr(loop.Training, "run", run)
    assert bench.train("phase", resume=bench.old, steps=6, lr=5e-4, wd=0.25) == 0
    assert "a new phase: begins with weights and optimiser state of" in capsys.readouterr().out
    before = bench.state("old", 4)
    assert all(torch.equal(seen[0]["student"][name], each) for name, each in before["student"].items())
    assert seen[0]["wd"] == 0.25
    assert seen[0]["moments"].keys() == before["optimizer"]["state"].keys()
    lines = bench.lines("phase")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and lines[0]["lr"] == 5e-4
    (origin,) = bench.lineage("phase")
    assert (origin["kind"], origin["step"], origin["given"]) == ("phase", 4, str(bench.old))
    # A kill, and the same command: the same bits as without it.
    model = (bench.folder / "phase" / "model.safetensors").read_bytes()
    os.remove(bench.folder / "phase" / "checkpoints" / "step-00000006.pt")
    assert bench.train("phase", resume=bench.old, steps=6, lr=5e-4, wd=0.25) == 0
    assert "resumed after step 4" in capsys.readouterr().out
    assert (bench.folder / "phase" / "model.safetensors").read_bytes() == model
    # A phase of a phase keeps the whole lineage.
    assert bench.train("third", resume=bench.folder / "phase", steps=1, warmup=0) == 0
    assert [each["step"] for each in bench.lineage("third")] == [4, 6]


def test_a_finished_run_begins_a_phase_with_the_same_settings_too(bench: Bench) -> None:
    assert bench.train("again", resume=bench.old) == 0
    assert bench.lineage("again")[0]["kind"] == "phase" and len(bench.lines("again")) == 4


def test_an_unfinished_run_with_the_same_settings_is_continued(bench: Bench) -> None:
    assert bench.train("fork", resume=bench.old / "checkpoints" / "step-00000002.pt") == 0
    assert bench.lineage("fork")[0]["kind"] == "continuation"
    assert (bench.folder / "fork" / "model.safetensors").read_bytes() == (bench.old / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("run", "changes", "message"),
    [
        (
            "old",
            {"steps": 8},
            "other settings (steps 4 -> 8); to train on, begin a new phase with --resume {old} --run",
        ),
        ("old", {"lr": 0.5}, "or with --init-from {old} --run-dir NEW (its weights alone)"),
        ("old", {"init_from": "{old}"}, "began with other weights; leave out --init-from {old} to continue it"),
        ("new", {"init_from": "{old}", "resume": "{old}"}, "give either --resume {old}"),
        ("new", {"init_from": "/nowhere"}, "init_from '/nowhere': there is no such run or file"),
        ("new", {"init_from": "{folder}"}, "holds neither model.safetensors nor a checkpoint"),
        ("new", {"init_from": "{old}/config.json"}, "is not a safetensors file"),
        ("new", {"init_from": "{old}", "width": 8, "heads": 1}, "needs width 8, heads 1; give --width 16 --heads 2"),
        ("new", {"init_from": "{old}", "heads": 4}, "holds a model of heads 2, and this training needs heads 4"),
        ("new", {"init_from": "{old}", "predictor_hidden": 8}, "[16, 8], and [8, 8] is needed; give --predictor-hid"),
        ("new", {"init_from": "{old}", "init_gap": 1}, "leave it out where --init-from gives trained ones"),
        ("new", {"init_from": "{old}", "tokenizer": "{folder}/words.txt"}, "leave out --tokenizer"),
        (
            "new",
            {"resume": "{old}", "width": 8},
            "(width 16 -> 8), and the optimiser's state belongs to them; --init-fr",
        ),
        ("new", {"resume": "{old}", "mim": 0, "steps": 2}, "step-00000004.pt takes the weights alone"),
    ],
)
def test_refusals_name_the_remedy(
    bench: Bench, run: str, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (bench.folder / "words.txt").write_text("[PAD]\n[UNK]\n[MASK]\na\n")
    places = {"old": bench.old, "folder": bench.folder}
    given = {name: value.format(**places) if isinstance(value, str) else value for name, value in changes.items()}
    assert bench.train(run, **given) == 1
    assert message.format(**places) in capsys.readouterr().err
    assert not (bench.folder / "new").exists()


def test_a_finished_run_says_how_to_train_on(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.train("old") == 0
    said = capsys.readouterr().out
    assert (
        f"step 4 of 4 was done already; to train on, begin a new phase with --resume {bench.old} --run-dir NEW" in said
    )


def test_a_dry_run_reads_the_weights_and_leaves_nothing(bench: Bench, check_dry_run: Any) -> None:
    check_dry_run(oner.main, bench.words("dry", init_from=bench.old, image_size=24), "4 steps of 8 samples")
    assert not (bench.folder / "dry").exists()
