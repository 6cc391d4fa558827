"""`oner-fast eval`: its file, its output, and its messages about bad input."""

import json
from pathlib import Path
from typing import Any

import pytest

import oner_fast
from oner_fast.data.dataset import PairDataset
from oner_fast.evaluation.cli import main
from oner_fast.evaluation.embed import embed_split, spaced
from oner_fast.evaluation.folder import find_data, read_metrics


def test_evaluation_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run)]) == 0
    result = json.loads((run / "evaluation.json").read_text())
    assert set(result) == {"val", "val_seen_words", "val_new_words", "about", "format_version"}
    val = result["val"]
    assert val["pairs"] == 8
    assert val["captions"] == 7  # "blue circle" twice
    for direction, queries, gallery in (("image_to_text", 8, 7), ("text_to_image", 7, 8)):
        figures = val[direction]
        assert {f"{what}@{k}" for what in ("R", "chance") for k in (1, 5, 10)} <= set(figures)
        assert figures["R@1"] == 1.0
        assert (figures["queries"], figures["gallery"]) == (queries, gallery)
    assert val["image_to_text"]["chance@1"] == pytest.approx(1 / 7)
    assert val["text_to_image"]["chance@1"] == pytest.approx((6 / 8 + 2 / 8) / 7)
    assert 0 <= val["modality_gap"] <= 2
    assert val["image_text_to_image"]["R@1"] == 1.0
    assert set(val["image_text_to_image"]) >= {"image_only", "text_only"}
    # "up" and "purple" never occur in training.
    assert result["val_new_words"]["captions"] == 3
    assert result["val_seen_words"]["captions"] == 4
    assert result["val_seen_words"]["text_to_image"]["gallery"] == 8
    printed = capsys.readouterr().out
    assert "val, new words" in printed
    assert "100 %" in printed
    assert "\x1b" not in printed


def test_two_evaluations_give_equal_figures(run: Path) -> None:
    assert main([str(run)]) == 0
    first = (run / "evaluation.json").read_bytes()
    assert main([str(run), "--batch-size", "3"]) == 0
    assert (run / "evaluation.json").read_bytes() == first


def test_a_collapsed_model_scores_zero(run: Path, reader: Any) -> None:
    reader.collapsed = True
    assert main([str(run)]) == 0
    val = json.loads((run / "evaluation.json").read_text())["val"]
    assert val["image_to_text"]["R@5"] == 0.0
    assert val["text_to_image"]["R@5"] == 0.0
    assert val["spread"]["image"] < 1e-6


def test_two_trunks_have_no_composed_queries(run: Path, reader: Any) -> None:
    reader.config.shared_trunk = False
    assert main([str(run)]) == 0
    assert "image_text_to_image" not in json.loads((run / "evaluation.json").read_text())["val"]


def test_other_data_and_a_limit_can_be_given(run: Path, data: Path) -> None:
    tar = data / "val-000000.tar"
    assert main([str(run), "--data", str(tar), "--limit", "4"]) == 0
    result = json.loads((run / "evaluation.json").read_text())["other_data"][str(tar)]
    assert result["val"]["pairs"] == 4
    assert result["val_seen_words"]["captions"] == 4  # the training words still come from the run's own data


def test_every_form_of_data_is_taken(run: Path, data: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    content = (data / "val-000000.tar").read_bytes()
    for name in ("00000.tar", "00001.tar"):
        (shards / name).write_bytes(content)
    forms = [
        [shards],
        [shards / "*.tar"],
        [shards / "{00000..00001}.tar"],
        [shards / "00000.tar", shards / "00001.tar"],
    ]
    for form in forms:
        assert main([str(run), "--no-zero-shot", "--data", *map(str, form)]) == 0
        found = json.loads((run / "evaluation.json").read_text())["other_data"][" ".join(map(str, form))]
        assert found["val"]["pairs"] == 16
    (shards / "00000.tar").rename(shards / "train-0.tar")
    (shards / "00001.tar").rename(shards / "train-1.tar")
    assert main([str(run), "--data", str(shards)]) == 2
    assert main([str(run), "--data", str(shards), "--split", "train"]) == 0
    assert "train" in json.loads((run / "evaluation.json").read_text())["other_data"][str(shards)]


def test_an_evaluation_adds_to_the_file(run: Path, data: Path) -> None:
    path = run / "evaluation.json"
    old = {"val": {"pairs": 1}, "val_new_words": {"pairs": 1}, "style": {"pairs": 2}, "coco": {"pairs": 3}}
    path.write_text(json.dumps(old | {"about": {}}))  # a file without a version
    assert main([str(run)]) == 0
    own = json.loads(path.read_text())
    assert own["val"]["pairs"] == 8 and own["style"] == {"pairs": 2} and own["coco"] == {"pairs": 3}
    assert main([str(run), "--data", str(data / "val-000000.tar")]) == 0
    both = json.loads(path.read_text())
    assert {key: value for key, value in both.items() if key != "other_data"} == own
    path.write_text(json.dumps({"format_version": 2}))
    assert main([str(run)]) == 2
    assert json.loads(path.read_text()) == {"format_version": 2}


def test_the_runs_validation_data_are_the_default(run: Path, data: Path) -> None:
    named = {"train_data": str(data / "train-000000.tar"), "val_data": str(data / "val-000000.tar")}
    (run / "config.json").write_text(json.dumps({"data": named}))
    assert find_data(run).open("val").captions()
    assert main([str(run)]) == 0
    result = json.loads((run / "evaluation.json").read_text())
    assert result["val"]["pairs"] == 8 and result["val_new_words"]["captions"] == 3
    (run / "config.json").write_text(json.dumps({"data": {"train_data": named["val_data"]}}))
    assert main([str(run)]) == 2
    assert main([str(run), "--split", "train"]) == 0
    assert json.loads((run / "evaluation.json").read_text()).keys() >= {"val", "train"}


def test_a_damaged_image_is_left_out_and_counted(data: Path, reader: Any) -> None:
    tar = data / "val-000000.tar"
    content = bytearray(tar.read_bytes())
    at = content.find(b"\x89PNG")
    content[at + 8 : at + 60] = bytes(52)
    tar.write_bytes(content)
    embedded = embed_split(reader, PairDataset(data, split="val"))
    assert len(embedded.image) == 7
    assert embedded.rows == list(range(1, 8))
    assert len(embedded.damaged) == 1


def test_spaced() -> None:
    assert spaced(10, None) == list(range(10))
    assert spaced(10, 4) == [0, 2, 5, 7]
    with pytest.raises(ValueError, match="at least 1"):
        spaced(10, 0)


def fails(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("oner-fast eval: ")
    return captured.err


def test_errors_say_what_is_missing(run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no run folder" in fails([str(tmp_path / "none")], capsys)
    (tmp_path / "empty").mkdir()
    assert "neither model.safetensors nor a checkpoint" in fails([str(tmp_path / "empty")], capsys)
    assert "no data at" in fails([str(run), "--data", str(tmp_path / "gone")], capsys)
    assert "has no split 'style'; it has train, val" in fails([str(run), "--split", "style"], capsys)
    assert "go together" in fails([str(run), "--coco-json", "x.json"], capsys)
    (run / "config.json").write_text(json.dumps({"data": {"train_data": "elsewhere"}}))
    assert "is not at elsewhere; give its folder with --data" in fails([str(run)], capsys)
    (run / "config.json").write_text("{")
    assert "not valid JSON" in fails([str(run)], capsys)
    (run / "config.json").unlink()
    assert "names no data; give its folder with --data" in fails([str(run)], capsys)
    (data / "dataset.json").write_text(json.dumps({"splits": {"train": {}}}))
    assert "nothing is held out" in fails([str(run), "--data", str(data)], capsys)
    assert not (run / "evaluation.json").exists()


def test_an_interrupted_evaluation_writes_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(oner_fast, "load", stop, raising=False)
    assert main([str(run)]) == 130
    assert "nothing was written" in capsys.readouterr().err


def test_metrics_of_a_resumed_run(run: Path) -> None:
    lines = [{"step": 10, "loss": 3.0}, {"step": 20, "loss": 2.0}, {"step": 10, "loss": 2.5}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3')
    assert read_metrics(run) == [{"step": 10, "loss": 2.5}, {"step": 20, "loss": 2.0}]
    assert find_data(run).splits == ("train", "val")
