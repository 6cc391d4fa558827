"""`oner-fast ablate uta`: a tiny study with its teacher, which is stopped, continued and extended."""

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

from oner_fast.ablation import cli, uta_pace
from oner_fast.ablation.uta_plan import Settings, configured, teacher_source
from oner_fast.ablation.uta_rows import REFERENCE
from oner_fast.models.optional_packages import optional_package
from oner_fast.train.uta.training import UTATraining

FLAGS = ["--quick", "--steps", "4", "--threads", "1", "--device", "cpu", "--teachers", "clip"]
ROWS = ["--rows", "random", "full"]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def ablate(data: Path, out: Path, *flags: str) -> int:
    return cli.main(["uta", "--data", str(data), "--out", str(out), *FLAGS, *ROWS, *flags])


def done(out: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("runs/*/evaluation.json")}


def test_a_study_from_its_teacher_to_its_page(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    optional_package("open_clip")  # or the test is skipped for want of it
    out, original, calls = tmp_path / "study", UTATraining.step_once, []
    monkeypatch.setattr(uta_pace, "ROUNDS", 1)
    monkeypatch.setattr(uta_pace, "_seconds", lambda config, out: 1.5 if config.alignment.objective != "uta" else 1.0)

    def stopped(self: Any, batch: Any) -> Any:
        calls.append(batch.step)
        if len(calls) == 6:  # in the second student
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch)

    monkeypatch.setattr(UTATraining, "step_once", stopped)
    assert ablate(pairs, out, "--seeds", "1") == 130
    captured = capsys.readouterr()
    assert "The teacher itself" in captured.out and "the pace of 3 rows, in turns" in captured.out
    assert "stopped; the same command continues from there" in captured.err
    assert sorted(done(out)) == ["clip.teacher", "clip.uta-4-seed0"]
    assert (out / "cache" / "clip-seed0").is_dir()  # the other rows of the seed need it

    before = done(out)
    assert ablate(pairs, out, "--seeds", "1") == 0
    assert calls[4:8] == [0, 1, 2, 3]  # the second run went on, the first was left
    assert before.items() <= done(out).items() and not (out / "cache" / "clip-seed0").exists()
    assert "the pace of" not in capsys.readouterr().out

    before, count = done(out), len(calls)
    assert ablate(pairs, out, "--seeds", "2", "--no-cache") == 0
    assert before.items() <= done(out).items()
    content = json.loads((out / "ablation.json").read_text())
    rows = {(row["row"], row["equal"]): row for row in content["rows"]}
    steps = {key: row["steps"] for key, row in rows.items()}
    assert steps["clip.random", "time"] == 4 and steps["clip.full", "steps"] == 4
    assert steps["clip.full", "time"] == 3  # 4 steps at 1.0 s pay for 2.67 at 1.5 s
    assert len(calls) == count + 12 + sum({steps["clip.full", each] for each in ("flops", "time")} - {4})
    full = rows["clip.full", "steps"]
    assert full["seconds_a_step"] == 1.5 and full["flops_an_image"] > rows["clip.uta", "steps"]["flops_an_image"]
    evaluation = json.loads((out / "runs" / "clip.full-4-seed1" / "evaluation.json").read_text())["val"]
    shares = [evaluation[way]["R@10"] for way in ("image_to_text", "text_to_image")]
    assert full["figures"]["val"]["1"]["recall@10"] == pytest.approx(sum(shares) / 2)
    difference = next(
        each for each in content["differences"] if (each["against"], each["equal"]) == ("clip.full", "steps")
    )
    uta = rows["clip.uta", "steps"]["figures"]["val"]
    wanted = [uta[seed]["recall@10"] - full["figures"]["val"][seed]["recall@10"] for seed in ("0", "1")]
    found = difference["splits"]["val"]["recall@10"]
    assert found["count"] == 2 and found["mean"] == pytest.approx(sum(wanted) / 2)
    # A row that is the same run in two comparisons is compared once.
    assert [each["equal"] for each in content["differences"] if each["against"] == "clip.random"] == ["steps"]

    page, text = (out / "ablation.html").read_text(), (out / "ablation.md").read_text()
    assert not re.search(r"(src|href)=\"(?!#|data:)", page) and "<script" not in page
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and page.count("<svg") == 3
    assert "Towards clip, at equal time" in text
    count = len(done(out))
    assert f"{count} of {count} runs are done" in text
    assert "| No masks (feature distillation) | 4 | 128 |" in text

    # The tables hold the whole study, also where fewer rows and seeds are asked for.
    assert cli.main(["uta", "--data", str(pairs), "--out", str(out), *FLAGS, "--rows", "uta", "--seeds", "1"]) == 0
    again = json.loads((out / "ablation.json").read_text())
    assert again["rows"] == content["rows"] and again["differences"] == content["differences"]

    # A pace is that of whole steps, leaves nothing, and is measured once.
    monkeypatch.undo()
    settings = Settings(data=str(pairs), quick=True, steps=4)
    config = configured(settings.base(), REFERENCE, teacher_source(str(out / "runs" / "clip.teacher"), settings, out))
    before = sorted(path.name for path in out.iterdir())
    pace = uta_pace.measure(out, {"another": config}, print)
    assert pace["another"] > 0 and pace["clip.uta"] == 1.0 and uta_pace.measure(out, {"another": config}, print) == pace
    assert sorted(path.name for path in out.iterdir()) == before

    capsys.readouterr()
    assert ablate(pairs, out, "--seeds", "3", "--list") == 0
    listed = capsys.readouterr().out
    assert "2/3" in listed and "equal time" in listed and "clip.teacher" in listed
    assert cli.main(["uta", "--data", str(pairs), "--out", str(out), "--quick", "--teachers", "clip"]) == 1
    assert "other settings (steps 4 -> None): give those of before, or another --out" in capsys.readouterr().err


def test_bad_flags_are_named(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    optional_package("open_clip")
    for flags, message in (
        (["--rows", "nothing"], "no such row or group"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--recipe", "oner_tiny_pictograms_cpu"], "belongs to 'oner-fast train oner'"),
        (["--teachers", "runs/none"], "there is no folder runs/none"),
    ):
        assert ablate(pairs, tmp_path / "study", *flags) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "study").exists()
