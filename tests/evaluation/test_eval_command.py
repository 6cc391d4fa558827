"""`oner-fast eval`: its file, its output, and its messages about bad input."""

import json
from pathlib import Path
from typing import Any

import pytest

import oner_fast
from oner_fast.data.dataset import PairDataset
from oner_fast.evaluation.cli import main
from oner_fast.evaluation.embed import embed_split, name_left_out, spaced
from oner_fast.evaluation.folder import find_data, read_metrics
from oner_fast.evaluation.record import add, model_digest, read_figures, read_record
from oner_fast.evaluation.table import plain_lines, show

TRAIN = ["red square", "blue square", "red circle", "arrow left", "arrow right"]  # the training captions of `data`


def test_evaluation_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run)]) == 0
    result = json.loads((run / "evaluation.json").read_text())
    assert set(result) == {"val", "val_seen_words", "val_new_words", "about"}
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
    result = json.loads((run / "evaluation.json").read_text())
    assert result["val"]["pairs"] == 4
    assert result["val_seen_words"]["captions"] == 4  # the training words still come from the run's own data


def test_a_damaged_image_is_left_out_counted_and_named(
    data: Path, reader: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tar = data / "val-000000.tar"
    content = bytearray(tar.read_bytes())
    at = content.find(b"\x89PNG")
    content[at + 8 : at + 60] = bytes(52)
    tar.write_bytes(content)
    embedded = embed_split(reader, PairDataset(data, split="val"))
    assert len(embedded.image) == 7
    assert embedded.rows == list(range(1, 8))
    assert len(embedded.damaged) == 1
    assert caplog.messages == [f"left out: {embedded.damaged[0]}"] and "val-000000.tar:000100" in caplog.text


def test_of_many_left_out_the_first_are_named_and_the_others_counted(caplog: pytest.LogCaptureFixture) -> None:
    name_left_out([f"tar:{number}: cut off" for number in range(25)])
    assert caplog.messages == [*(f"left out: tar:{number}: cut off" for number in range(20)), "left out: 5 more"]


def test_spaced() -> None:
    assert spaced(10, None) == list(range(10))
    assert spaced(10, 4) == [0, 2, 5, 7]
    with pytest.raises(ValueError, match="at least 1"):
        spaced(10, 0)


def fails(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(argv) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("oner-fast eval: ")
    return captured.err


def test_errors_say_what_is_missing(run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no run folder" in fails([str(tmp_path / "none")], capsys)
    (tmp_path / "empty").mkdir()
    assert "neither model.safetensors nor a checkpoint" in fails([str(tmp_path / "empty")], capsys)
    assert "no data at" in fails([str(run), "--data", str(tmp_path / "gone")], capsys)
    assert "no split 'style'; it has train, val" in fails([str(run), "--split", "style"], capsys)
    assert "go together" in fails([str(run), "--coco-json", "x.json"], capsys)
    (run / "config.json").write_text(json.dumps({"data": {"train_data": "elsewhere"}}))
    assert "are not at elsewhere; give their place with --data" in fails([str(run)], capsys)
    (run / "config.json").write_text("{")
    assert "its JSON cannot be read" in fails([str(run)], capsys)
    (run / "config.json").unlink()
    assert "names no data; give its folder with --data" in fails([str(run)], capsys)
    (data / "dataset.json").write_text(json.dumps({"splits": {"train": {"shards": []}}}))
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
    assert Path(find_data(run, None)).is_dir()


def test_damaged_lines_of_metrics_are_left_out(run: Path) -> None:
    damaged = [
        b"\xff\xfe",
        b"[" * 5000,
        b"null",
        b'{"step": true}',
        b'{"step": -1}',
        b'{"step": 1e400}',
        b'{"step": "3"}',
    ]
    (run / "metrics.jsonl").write_bytes(b"\n".join([*damaged, b'{"step": 10, "loss": 3.0}', *damaged]))
    assert read_metrics(run) == [{"step": 10, "loss": 3.0}]


def test_a_configuration_of_any_depth_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.json").write_text('{"data":' * 100_000)
    assert "config.json: its JSON is nested deeper than 64 levels" in fails([str(run)], capsys)


def test_the_record_names_the_recipe(run: Path, data: Path) -> None:
    (run / "config.json").write_text(json.dumps({"data": {"train_data": str(data)}, "run": {"recipe": "a_recipe_cpu"}}))
    assert main([str(run)]) == 0
    assert record(run)["about"]["recipe"] == "a_recipe_cpu"


def record(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "evaluation.json").read_text())
    return content


def test_an_evaluation_of_other_data_erases_nothing(run: Path, data: Path, tmp_path: Path, draw: Any) -> None:
    assert main([str(run)]) == 0
    first = record(run)
    other = tmp_path / "other"
    other.mkdir()
    (data / "val-000000.tar").rename(other / "000.tar")
    classes = tmp_path / "classes"
    for number in (100, 102):
        (classes / f"kind {number}").mkdir(parents=True)
        (classes / f"kind {number}" / "a.png").write_bytes(draw(number))
    assert main([str(run), "--data", str(other)]) == 0
    assert main([str(run), "--image-folder", str(classes)]) == 0
    both = record(run)
    assert {key: both[key] for key in first if key != "about"} == {key: first[key] for key in first if key != "about"}
    assert (both[f"{other}:val"]["data"], both[f"{other}:val"]["split"]) == (str(other), "val")
    assert both["zero_shot"]["data"] == str(classes)
    assert both["val"]["data"] == str(data)
    again = tmp_path / "again"
    classes.rename(again)
    assert main([str(run), "--image-folder", str(again), "--batch-size", "1"]) == 0
    assert set(record(run)) == {*both, f"{again}:zero_shot"}
    assert main([str(run), "--data", str(other), "--limit", "4"]) == 0
    assert record(run)[f"{other}:val"]["pairs"] == 4
    assert record(run)["val"]["pairs"] == 8


def test_figures_of_an_earlier_model_are_kept_aside(run: Path, reader: Any, capsys: pytest.CaptureFixture[str]) -> None:
    reader.captions |= dict(enumerate(TRAIN))
    assert main([str(run)]) == 0
    before = (run / "evaluation.json").read_bytes()
    digest = record(run)["about"]["model"]
    (run / "model.safetensors").write_bytes(b"other weights")
    assert main([str(run), "--split", "train"]) == 0
    assert set(record(run)) == {"train", "train_seen_words", "about"}
    aside = run / f"evaluation.{digest[:8]}.json"
    assert aside.read_bytes() == before
    assert str(aside) in capsys.readouterr().out


def test_figures_of_other_weights_are_shown_on_no_page(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    add(tmp_path, {"coco": {"data": "d", "pairs": 1}}, {"model": None})  # of a checkpoint, during the training
    assert set(read_figures(tmp_path)) == {"coco", "about"}
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert read_figures(tmp_path) == {}
    assert f"run `oner-fast eval {tmp_path}` again" in caplog.text
    _, aside = add(tmp_path, {"val": {"data": "d", "pairs": 2}}, {"model": model_digest(tmp_path)})
    assert aside is not None and aside.name == "evaluation.earlier.json"
    assert set(read_figures(tmp_path)) == {"val", "about"}
    (tmp_path / "evaluation.json").write_text('{"val": {"pairs": 3}, "about": {"format_version": 1}}')
    assert read_figures(tmp_path)["val"]["pairs"] == 3  # a record that states no weights


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", ""], "--data is empty"),
        (["--boxes", ""], "--boxes is empty"),
        (["--classes", "imagenet"], "--classes needs --image-folder"),
        (["--boxes-split", "test"], "--boxes-split needs --boxes"),
        (["--coco-captions", "0"], "--coco-captions needs --coco-json"),
        (["--coco-split", "val"], "--coco-split needs --coco-json"),
        (["--boxes", ".", "--boxes-images", "."], "--boxes-images goes with a json in --boxes, and . is a folder"),
    ],
)
def test_options_that_would_mean_nothing_are_refused(
    run: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main([str(run), *flags]) == 1
    assert message in capsys.readouterr().err
    assert not (run / "evaluation.json").exists()


def test_figures_kept_aside_are_not_replaced(tmp_path: Path) -> None:
    kept = []
    for number, digest in enumerate(("aaaaaaaaa", "b", "aaaaaaaaa", "b", "../../../x", "b")):
        _, aside = add(tmp_path, {"val": {"data": "d", "pairs": number}}, {"model": digest})
        kept += [aside] if aside else []
    assert [path.name for path in kept] == [
        "evaluation.aaaaaaaa.json", "evaluation.b.json", "evaluation.aaaaaaaa.2.json", "evaluation.b.2.json",
        "evaluation.________.json",
    ]  # fmt: skip
    assert [json.loads(path.read_text())["val"]["pairs"] for path in kept] == [0, 1, 2, 3, 4]


def test_data_whose_path_is_no_utf8_are_recorded(tmp_path: Path) -> None:
    add(tmp_path, {"val": {"data": "d\udcff", "pairs": 1}}, {})
    assert read_record(tmp_path)["val"]["data"] == "d?"


def test_names_from_the_data_are_no_markup(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    figures = {"queries": 1} | {f"{name}@{k}": 1.0 for name in ("R", "chance") for k in (1, 5, 10)}
    tops = {f"{name}{k}": 1.0 for name in ("top", "chance@") for k in (1, 5)} | {"images": 1, "classes": 1}
    entry = {"image_to_text": figures, "knn": {"[/b]": tops}, "modality_gap": 0.5}
    evaluation = {"[/x] a very long name of a split": entry}
    show(evaluation)
    assert capsys.readouterr().out.count("[/x] a very long name") == 3
    heading, line = plain_lines(evaluation)[:2]
    assert line.startswith("[/x] a very long name of a split  image → text")
    assert line.index("image → text") == heading.index("query → gallery")


def test_a_record_without_data_or_model_is_added_to(run: Path, data: Path) -> None:
    assert main([str(run)]) == 0
    old = record(run)
    for entry in old.values():
        entry.pop("data", None)
        entry.pop("model", None)
    (run / "evaluation.json").write_text(json.dumps(old | {"coco": {"pairs": 3}}))
    assert main([str(run)]) == 0
    assert record(run)["coco"] == {"pairs": 3}
    assert record(run)["val"]["data"] == str(data)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": ' * 1000, '{"about": {"format_version": 2}}'])
def test_a_record_that_cannot_be_read_is_not_overwritten(
    run: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "evaluation.json").write_text(content)
    assert "evaluation.json" in fails([str(run)], capsys)
    assert (run / "evaluation.json").read_text() == content


def test_training_images_are_evaluated_when_asked_for(run: Path, data: Path, reader: Any, capsys: Any) -> None:
    reader.captions |= dict(enumerate(TRAIN))
    assert main([str(run), "--split", "train", "val"]) == 0
    assert record(run)["train"]["pairs"] == 5
    (data / "val-000000.tar").unlink()
    (data / "dataset.json").unlink()
    assert "--split train" in fails([str(run)], capsys)
    assert main([str(run), "--split", "train", "--limit", "2"]) == 0
    assert record(run)["train"]["pairs"] == 2


@pytest.mark.parametrize(
    "form",
    ["{0}", "{0}/*.tar", "{0}/{{00000..00001}}.tar", "{0}/00000.tar", "{0}/00000.tar::{0}/{{00001..00001}}.tar"],
)
@pytest.mark.parametrize("given", ["--data", "val_data"])
def test_held_out_data_take_every_form_that_training_data_take(
    run: Path, data: Path, tmp_path: Path, form: str, given: str
) -> None:
    from oner_fast.report.cli import Options, _examples

    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(2):
        (shards / f"{number:05d}.tar").write_bytes((data / "val-000000.tar").read_bytes())
    place = form.format(shards)
    flags = ["--data", place] if given == "--data" else []
    if given == "val_data":
        (run / "config.json").write_text(json.dumps({"data": {"train_data": str(data), "val_data": place}}))
    assert main([str(run), *flags]) == 0
    assert record(run)["val"]["pairs"] == (8 if form == "{0}/00000.tar" else 16)
    assert record(run)["val_new_words"]["captions"] == 3  # the words of the training data count
    assert _examples(Options(run, data=place if flags else None))[:2] == (place, "val")


def test_training_data_are_no_validation_data(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from oner_fast.report.cli import Options, _examples

    tar = str(data / "train-000000.tar")
    (run / "config.json").write_text(json.dumps({"data": {"train_data": tar}}))
    assert "only a train split" in fails([str(run)], capsys)
    with pytest.raises(ValueError, match="no split 'val'; it has train"):
        _examples(Options(run, split="val"))
    assert _examples(Options(run))[:2] == (tar, "train")  # the page says so


@pytest.mark.parametrize("way", ["path", "link", "hard link", "copy", "folder"])
def test_training_tars_are_recognised_under_any_name(
    run: Path,
    data: Path,
    tmp_path: Path,
    reader: Any,
    way: str,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    from oner_fast.report.cli import Options, _examples

    reader.captions |= dict(enumerate(TRAIN))
    tar, other = data / "train-000000.tar", tmp_path / "elsewhere" / "held-out.tar"
    (run / "config.json").write_text(json.dumps({"data": {"train_data": str(tar)}}))
    other.parent.mkdir()
    {
        "path": lambda: other.symlink_to(tar),
        "link": lambda: other.symlink_to(tar),
        "hard link": lambda: other.hardlink_to(tar),
        "copy": lambda: other.write_bytes(tar.read_bytes()),
        "folder": lambda: other.write_bytes(tar.read_bytes()),
    }[way]()
    given = str({"path": tar, "folder": other.parent}.get(way, other))
    if way == "folder":
        other.rename(other.with_name("val-000000.tar"))  # it calls itself a validation split
        how = "a copy with the same bytes as"
        assert f"was trained on {given}/val-000000.tar ({how}" in fails([str(run), "--data", given], capsys)
        with pytest.raises(ValueError, match="a copy with the same bytes"):
            _examples(Options(run, data=given))
        return
    # Named by --data, they are evaluated for what they are; `val` is asked for in vain.
    assert main([str(run), "--data", given]) == 0 and "the figures of training pairs, none held out" in caplog.text
    assert record(run)["train"]["pairs"] == 5 and "val" not in record(run)
    assert "has no split 'val'; it has train" in fails([str(run), "--data", given, "--split", "val"], capsys)
    # Held-out tars beside it do not help.
    mixed = f"{data / 'val-000000.tar'}::{given}"
    assert "so that it is no validation data; give held-out data" in fails([str(run), "--data", mixed], capsys)
    assert main([str(run), "--data", str(data / "val-000000.tar")]) == 0
    assert record(run)["val"]["pairs"] == 8


def test_a_stream_or_lost_training_data_leave_the_question_open(
    run: Path, data: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    for named, why in (("pipe:cat {0..3}.tar", "was trained on a stream"), ("gone", "are not at gone")):
        (run / "config.json").write_text(json.dumps({"data": {"train_data": named}}))
        caplog.clear()
        assert main([str(run), "--data", str(data)]) == 0
        assert "holds training pairs is not known" in caplog.text and why in caplog.text
    assert "no data at" in fails([str(run), "--data", "pipe:cat {0..3}.tar"], capsys)
