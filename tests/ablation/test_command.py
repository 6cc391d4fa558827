"""`oner-fast ablate oner`: a tiny study that is stopped, continued and extended, and refused with other settings."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from oner_fast.ablation import cli, study
from oner_fast.ablation.plan import Settings, plan
from oner_fast.ablation.results import gather
from oner_fast.ablation.rows import chosen_rows
from oner_fast.evaluation.record import add, model_digest
from oner_fast.models.optional_packages import optional_package
from oner_fast.train.engine.loop import Training
from oner_fast.train.engine.run_lock import run_lock

FLAGS = ["--quick", "--steps", "4", "--threads", "1", "--device", "cpu"]
ROWS = ["--rows", "clip", "itc", "cmc", "itc.no_predictor"]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def ablate(data: Path, out: Path, *flags: str) -> int:
    return cli.main(["oner", "--data", str(data), "--out", str(out), *FLAGS, *flags])


def times(out: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("runs/*/evaluation.json")}


def test_a_study_from_its_first_signal_to_its_page(
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    optional_package("open_clip")  # or the test is skipped for want of it
    out, original, calls = tmp_path / "study", Training.step_once, []

    def stopped(self: Any, batch: Any) -> Any:
        calls.append(batch.step)
        if len(calls) == 6:  # in the second run
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch)

    monkeypatch.setattr(Training, "step_once", stopped)
    one = ["--seeds", "1", "--equal", "steps"]
    assert ablate(pairs, out, *ROWS, *one) == 130
    captured = capsys.readouterr()
    assert "run 1 of 4: Two towers, CLIP's own, seed 0, 4 steps" in captured.out
    assert "run 2 of 4: One tower, ITC" in captured.out and "run 3 of 4" not in captured.out
    assert "stopped; the same command continues from there" in captured.err
    assert list(times(out)) == ["clip-4-seed0"]
    assert "1 of 4 runs are done" in (out / "ablation.md").read_text()

    before = times(out)
    assert ablate(pairs, out, *ROWS, *one) == 0
    assert calls[:6] == [0, 1, 2, 3, 0, 1] and calls[6:8] == [2, 3]  # the second run went on, the first was left
    assert "run 2 of 4: One tower, ITC" in capsys.readouterr().out
    assert before.items() <= times(out).items() and len(times(out)) == 4

    # More seeds are added; nothing that is done is done again.
    before, count = times(out), len(calls)
    assert ablate(pairs, out, *ROWS, "--seeds", "2", "--equal", "steps") == 0
    assert before.items() <= times(out).items() and len(times(out)) == 8 and len(calls) == count + 16

    content = json.loads((out / "ablation.json").read_text())
    rows = {row["row"]: row for row in content["rows"]}
    assert list(rows) == ["clip", "itc", "cmc", "itc.no_predictor"]
    figures = rows["cmc"]["figures"]
    assert list(figures) == ["backbone", "projection", "predictor", "teacher", "max"]
    evaluation = json.loads((out / "runs" / "cmc-4-seed1" / "evaluation.json").read_text())["val"]
    shares = [evaluation["spaces"]["teacher"][way]["R@10"] for way in ("image_to_text", "text_to_image")]
    assert figures["teacher"]["1"]["recall@10"] == pytest.approx(sum(shares) / 2)
    assert list(rows["clip"]["figures"]) == ["projection"]
    # The gap of the same pairs in the same space, in every row, the first before any step.
    assert all(row["gap"]["projection"]["steps"][0] == 0 for row in rows.values())
    assert len({tuple(row["gap"]["projection"]["steps"]) for row in rows.values()}) == 1
    assert rows["itc"]["flops_a_pair"] > rows["clip"]["flops_a_pair"]
    difference = next(each for each in content["differences"] if each["row"] == "cmc")
    assert difference["against"] == "itc" and difference["recall@10"]["predictor"]["count"] == 2
    wanted = [
        figures["projection"][seed]["recall@10"] - rows["itc"]["figures"]["projection"][seed]["recall@10"]
        for seed in ("0", "1")
    ]
    assert difference["recall@10"]["projection"]["mean"] == pytest.approx(sum(wanted) / 2)

    page = (out / "ablation.html").read_text()
    assert not re.search(r"(src|href)=\"(?!#|data:)", page) and "<script" not in page
    assert page.count("<svg") >= 2 + len(rows) - 1 and "8 of 8 runs are done" in page
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))

    # A later command for other rows keeps the tables of those that are there.
    assert ablate(pairs, out, "--rows", "itc.no_predictor", "--seeds", "1", "--equal", "steps") == 0
    again = json.loads((out / "ablation.json").read_text())
    assert [(row["row"], row["equal"], row["figures"]) for row in again["rows"]] == [
        (name, "steps", row["figures"]) for name, row in rows.items()
    ]

    # Between training and evaluation: the run is evaluated, and not trained again.
    (out / "runs" / "itc-4-seed0" / "evaluation.json").unlink()
    count = len(calls)
    assert ablate(pairs, out, *ROWS, "--seeds", "2", "--equal", "steps") == 0 and len(calls) == count

    capsys.readouterr()
    assert ablate(pairs, out, *ROWS, "--seeds", "3", "--list") == 0
    listed = capsys.readouterr().out
    assert "2/3" in listed and "equal operations" in listed and "FLOPs" in listed

    # Other settings are refused with the remedy, and nothing changes.
    assert cli.main(["oner", "--data", str(pairs), "--out", str(out), *FLAGS[:1], *ROWS]) == 1
    assert "other settings (steps 4 -> None): give those of before, or another --out" in capsys.readouterr().err
    path = out / "runs" / "itc-4-seed0" / "config.json"
    config = json.loads(path.read_text())
    config["objectives"]["temperature"] = 0.3
    path.write_text(json.dumps(config))
    assert ablate(pairs, out, *ROWS) == 1
    assert "objectives.temperature 0.3 -> 0.2): move it away to train it anew" in capsys.readouterr().err


def test_data_without_held_out_pairs_are_refused_before_a_run(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar, out = pairs / "train-000000.tar", tmp_path / "study"
    assert ablate(tar, out, *ROWS) == 1
    assert f"{tar} has no split 'val', whose figures the tables hold; it has train: give --val-data" in (
        capsys.readouterr().err
    )
    assert not out.exists()
    # Training pairs given as validation data are refused by the run; the right command may follow in the same folder.
    assert ablate(tar, out, *ROWS, "--val-data", str(tar)) == 1
    assert "is no validation data" in capsys.readouterr().err
    assert ablate(tar, out, *ROWS, "--val-data", str(pairs / "val-000000.tar"), "--list") == 0


def test_an_evaluation_without_the_studys_figures_is_named(pairs: Path, tmp_path: Path) -> None:
    settings = Settings(data=str(pairs), steps=4, quick=True)
    (run,) = plan(settings, chosen_rows(["itc"]), ("steps",), [0], tmp_path)
    run.folder.mkdir(parents=True)
    (run.folder / "model.safetensors").write_bytes(b"weights")
    for entries, message in (({}, "no entry 'val'"), ({"val": {"data": "d", "spaces": {"backbone": {}}}}, "KeyError")):
        add(run.folder, entries, {"model": model_digest(run.folder)})
        with pytest.raises(ValueError, match=f"{message}.*remove the file, and the same command evaluates"):
            gather([run])


def test_settings_bind_a_study_once_a_run_has_begun(tmp_path: Path) -> None:
    study.begin(tmp_path, Settings(steps=4))
    study.check_settings(tmp_path, Settings(steps=5))
    (tmp_path / "runs" / "itc-4-seed0").mkdir(parents=True)
    (tmp_path / "runs" / "itc-4-seed0" / "config.json").write_text("{}")
    study.check_settings(tmp_path, Settings(steps=4))
    with pytest.raises(ValueError, match="other settings .steps 4 -> 5.: give those of before, or another --out"):
        study.check_settings(tmp_path, Settings(steps=5))
    (tmp_path / study.FILE).write_text('{"steps": ')
    with pytest.raises(ValueError, match=r"study\.json: its JSON cannot be read .*; remove it, and the same command"):
        study.check_settings(tmp_path, Settings(steps=4))


def test_a_run_that_another_study_trains_is_named(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with run_lock(tmp_path / "study" / "runs" / "itc-4-seed0"):
        assert ablate(pairs, tmp_path / "study", "--rows", "itc", "--seeds", "1", "--equal", "steps") == 1
    error = capsys.readouterr().err
    assert "itc-4-seed0 is in use by process" in error and error.endswith("--run-dir; of a study, another --out\n")


def test_bad_flags_are_named(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in (
        (["--rows", "nothing"], "no such row or group"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--recipe", "uta_tiny_icons_cpu"], "belongs to 'oner-fast train uta'"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--rows"], "--rows needs a row or a group"),
        (["--rows", "itc.cold", "--equal", "flops"], "--rows itc.cold names factors"),
        (["--val-data", str(tmp_path / "none")], "given with --val-data"),
    ):
        assert ablate(pairs, tmp_path / "study", *flags) == 1
        assert message in capsys.readouterr().err
    assert cli.main(["oner", "--data", str(tmp_path / "none")]) == 1
    assert "none" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()
    assert study.FILE == "study.json"
