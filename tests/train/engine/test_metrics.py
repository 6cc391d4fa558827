import json
import math
import sys

import numpy
import pytest
import torch

from oner_fast.train.engine.metrics import MetricLog, read_metrics


def strict(text):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_one_line_a_step_flushed_at_once(tmp_path):
    log = MetricLog(tmp_path / "run", tensorboard=False)
    log.write(1, {"loss": torch.tensor(1.5), "lr": numpy.float32(0.25), "skipped_steps": numpy.int64(2), "note": "a"})
    lines = log.path.read_text().splitlines()
    assert [strict(line) for line in lines] == [{"step": 1, "loss": 1.5, "lr": 0.25, "skipped_steps": 2, "note": "a"}]
    log.close()
    log.close()


def test_nonfinite_values_become_null_with_a_flag(tmp_path):
    with MetricLog(tmp_path, tensorboard=False) as log:
        log.write(1, {"loss": math.nan, "grad_norm": torch.tensor(math.inf), "lr": 1.0})
    assert strict(log.path.read_text()) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "lr": 1.0,
        "nonfinite": ["loss", "grad_norm"],
    }


def test_resuming_drops_later_lines_and_a_torn_one(tmp_path):
    with MetricLog(tmp_path, tensorboard=False) as log:
        for step in (1, 2, 3, 4):
            log.write(step, {"loss": float(step)})
    before = log.path.read_bytes()
    log.path.write_bytes(before + b'{"step": 5, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    with MetricLog(tmp_path, resume_step=2, tensorboard=False) as log:
        log.write(3, {"loss": 30.0})
    assert [(line["step"], line["loss"]) for line in read_metrics(log.path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert log.path.read_bytes().startswith(before[: before.index(b'{"step": 3')])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_whole_object_without_end_of_line_is_torn_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    with MetricLog(tmp_path, resume_step=9, tensorboard=False) as log:
        log.write(10, {})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 10}\n'


def test_damage_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        MetricLog(tmp_path, tensorboard=False)
    assert path.read_bytes() == b'{"step": 1}\nnonsense\n{"step": 2}\n'


@pytest.mark.parametrize(
    ("metrics", "kind", "text"),
    [
        ({"loss": [1.0]}, TypeError, "'loss' must be a number"),
        ({"loss": torch.ones(2)}, ValueError, "'loss' must have one element"),
        ({"step": 2}, ValueError, "cannot be named 'step'"),
    ],
)
def test_bad_metrics_write_nothing(tmp_path, metrics, kind, text):
    with MetricLog(tmp_path, tensorboard=False) as log:
        with pytest.raises(kind, match=text):
            log.write(1, metrics)
        assert log.path.read_text() == ""


def test_other_ranks_touch_no_file(tmp_path):
    with MetricLog(tmp_path / "run", enabled=False) as log:
        log.write(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_without_tensorboard_lines_are_still_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    with MetricLog(tmp_path) as log:
        log.write(1, {"loss": 1.0})
    assert len(read_metrics(tmp_path)) == 1
    assert not (tmp_path / "tensorboard").exists()


def test_tensorboard_has_no_step_twice_after_resuming(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": float(step), "note": "text", "bad": math.nan})
    with MetricLog(tmp_path, resume_step=1) as log:
        log.write(2, {"loss": 20.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 20.0)]
