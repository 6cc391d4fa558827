import io
import re

import pytest
from rich.console import Console

from oner_fast.train.engine.progress import Progress

METRICS = {
    "loss/itc": 2.5,
    "loss": 3.14159,
    "loss/mlm": 0.64159,
    "lr": 1e-3,
    "grad_norm": 0.987,
    "samples_per_second": 512.34,
    "data_wait": 0.034,
    "mfu": 0.41,
    "gap/projection": 0.8,
    "seconds": 9.0,
}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def plain(width=80):
    return Console(file=io.StringIO(), force_terminal=False, width=width)


def test_plain_lines_are_aligned_and_greppable():
    console, clock = plain(), Clock()
    with Progress(200, every=10, console=console, clock=clock) as progress:
        for step in range(1, 201):
            clock.now += 2.0
            progress.update(step, METRICS if step > 1 else {"loss": 10.0, "loss/itc": 5.0, "loss/mlm": 5.0})
    lines = console.file.getvalue().splitlines()
    steps = [int(re.match(r"step +(\d+)/200  loss ", line)[1]) for line in lines]
    assert steps == [1, *range(10, 201, 10)]
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) > 80
    assert re.sub(" +", " ", lines[1]) == (
        "step 10/200 loss 3.1416 itc 2.5000 mlm 0.6416 lr 1.0e-03 grad 0.99 smp/s 512.3 wait 3% mfu 41% gap 0.800 "
        "left 0:06:20"
    )
    assert re.search(r"lr +- ", lines[0]) and lines[-1].endswith("left 0:00:00")


def test_plain_values_stay_and_notes_pass_unchanged():
    console = plain(width=20)
    with Progress(10, start=4, every=5, console=console) as progress:
        progress.note("saved [checkpoints]/step-00000004.pt and a long line that is not wrapped")
        progress.update(5, {"loss": 1.0, "mfu": None})
        progress.update(6, {"loss": float("nan")})
        progress.update(10, {"lr": 0.5})
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "saved [checkpoints]/step-00000004.pt and a long line that is not wrapped"
    assert [line[:10] for line in lines[1:]] == ["step  5/10", "step 10/10"]
    assert re.search(r"loss +nan .*lr 5\.0e-01", lines[2])


def test_a_terminal_gets_a_bar_and_a_table():
    console, clock = Console(file=io.StringIO(), force_terminal=True, width=120, _environ={"TERM": "xterm"}), Clock()
    with Progress(1000, start=500, console=console, clock=clock, title="oner") as progress:
        assert progress.live
        clock.now = 30.0
        progress.update(510, METRICS)
        progress.note("a note [not markup]")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    assert "a note [not markup]" in text
    last = [line.rstrip() for line in text.splitlines()[-3:]]
    assert re.fullmatch(r"oner .*510/1000 left 0:24:30", last[0])
    assert last[1].split() == ["loss", "itc", "mlm", "lr", "grad", "smp/s", "wait", "mfu", "gap"]
    assert last[2].split() == ["3.1416", "2.5000", "0.6416", "1.0e-03", "0.99", "512.3", "3%", "41%", "0.800"]


def test_the_terminal_comes_back_after_an_error():
    console = Console(file=io.StringIO(), force_terminal=True, width=100, _environ={"TERM": "xterm"})
    with pytest.raises(RuntimeError, match="boom"), Progress(10, console=console) as progress:
        progress.update(1, METRICS)
        raise RuntimeError("boom")
    assert console.file.getvalue().count("\x1b[?25l") == console.file.getvalue().count("\x1b[?25h") == 1
    progress.close()


def test_time_left_follows_the_recent_pace():
    clock = Clock()
    progress = Progress(1000, console=plain(), clock=clock, enabled=False)
    assert progress.seconds_left() is None
    clock.now = 100.0
    progress.update(1, {})
    assert progress.seconds_left() == pytest.approx(100.0 * 999)
    for step in range(2, 102):
        clock.now += 0.5
        progress.update(step, {})
    assert progress.seconds_left() == pytest.approx(0.5 * 899)


def test_other_ranks_show_nothing():
    console = plain()
    with Progress(10, console=console, enabled=False) as progress:
        progress.update(10, METRICS)
        progress.note("x")
    assert console.file.getvalue() == ""


@pytest.mark.parametrize("bad", [{"total": 0}, {"total": 5, "start": 6}, {"total": 5, "every": 0}])
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match="needs total >= 1"):
        Progress(**bad)
