"""The page of a report: valid, self-contained, readable without seeing it, and true to the rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import oner_fast.cli
from oner_fast.benchmarks.cases import OURS
from oner_fast.benchmarks.charts.colours import DARK, LIGHT, NARROW, WIDE
from oner_fast.benchmarks.charts.dots import Line, Point, Scale, dots
from oner_fast.benchmarks.charts.speed import limit_ratio, speed
from oner_fast.benchmarks.charts.stack import Stack, kinds, stacked
from oner_fast.benchmarks.page.figures import nearer, style
from oner_fast.benchmarks.page.report import _factor
from oner_fast.benchmarks.record import Entry, LimitShare, Record, write
from oner_fast.benchmarks.report import Report
from oner_fast.benchmarks.rows import GRADIENTS, OUTPUTS, Quantiles, Row, Times

Problems = Callable[[str], list[str]]
HOSTILE = '"><script>alert(1)</script>&amp;'
CLIP = "eager open_clip ClipLoss, amp_bf16"


def op(name: str = "mixup_info_nce", ratio: float = 2.0, dtype: str = "bfloat16") -> Row:
    row = Row(name, "N 8, D 4", dtype, "cpp", best="compiled a", share=0.5, speedup=Quantiles(ratio - 0.1, ratio, 2.2))
    row.times = {OURS: Times(0.1, 0.2, 0.3, 5, 0.0), "compiled a": Times(0.3, 0.4, 0.5, 5, 1.0)}
    peaks = {OURS: 2**20, "compiled a": 40 * 2**20}
    row.memory = {key: {"peak": peak, "saved": 0, "saved_beyond_inputs": 0} for key, peak in peaks.items()}
    row.precision = {
        OURS: {OUTPUTS: 1e-8, GRADIENTS: 4e-3},
        "compiled a": {OUTPUTS: 1e-5, GRADIENTS: 3e-3},
        CLIP: {OUTPUTS: 2e-3, GRADIENTS: 2e-2},
        f"{CLIP}, float32 norms": {OUTPUTS: 1e-6, GRADIENTS: 8e-3},
    }
    return row


def step() -> Row:
    row = Row("step", "width 8", "fp32", "oner_fast.train", best="plain, compiled", speedup=Quantiles(1, 1.5, 2))
    row.times = {OURS: Times(1, 2, 3, 5, 0), "plain, compiled": Times(2, 3, 4, 5, 0)}
    row.breakdown = {
        OURS: {"linear layers": 1.5, "attention": 0.4, "rest": 0.1},
        "plain, compiled": {"linear layers": 1.6, "fused by torch.compile": 1.3, "rest": 0.1},
    }
    row.floor = {"gemm": 1.2}
    return row


def page_of(*rows: Row, finished: bool = True) -> str:
    return Report("oner-fast bench ops", "a machine", {}, list(rows), finished, "ab" * 20).html()


def test_a_page_is_valid_and_needs_nothing_else(problems: Problems, parsed: Any) -> None:
    text = page_of(op(), op("gather_patches", 0.8, "float32"), step())
    assert problems(text) == []
    page = parsed(text)
    said = " ".join(page.text)
    for words in ("a machine", "oner-fast bench ops", "ab" * 20, "Speed, and the machine's limit", "Every candidate"):
        assert words in said
    assert "faster than the fastest of PyTorch in 2 of 3 rows: 0.80x (gather_patches, float32) to 2.00x" in said
    assert (
        "at best 40 times smaller than the smallest of the others (mixup_info_nce, bfloat16), and nowhere larger"
        in said
    )
    assert "open_clip's contrast is up to 100 times ours in the loss and up to 2 times in the gradients" in said
    # Four figures, at both widths.
    widths = [svg["width"] for svg in page.all("svg")]
    assert widths == [str(WIDE), str(NARROW)] * 4
    policy = next(one["content"] for one in page.all("meta") if one.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "script" not in policy and "img-src" not in policy


def test_what_comes_from_elsewhere_is_escaped(problems: Problems, parsed: Any) -> None:
    row = op()
    row.op = row.shape = HOSTILE
    row.unavailable[HOSTILE] = HOSTILE
    row.notes = [HOSTILE]
    row.times[HOSTILE] = row.times["compiled a"]
    text = Report(HOSTILE, HOSTILE, {}, [row], True, HOSTILE).html()
    assert problems(text) == [] and "<script" not in text
    assert HOSTILE in " ".join(parsed(text).text)


def test_rows_without_figures_leave_their_section_out(problems: Problems) -> None:
    text = page_of(Row("masked_gather", "tiny", "float32"), finished=False)
    assert problems(text) == [] and "<svg" not in text
    assert "This run was not finished" in text and "Precision" not in text
    assert problems(page_of()) == []


def test_the_more_precise_form_of_open_clips_loss_counts() -> None:
    (found,) = nearer([op(), op("masked_gather")])[:1]
    assert (found.outputs, found.gradients) == (pytest.approx(100), pytest.approx(2))
    assert "100 times ours in the loss and 2 times in the gradients (N 8, D 4)" in page_of(op())
    without = op()
    without.precision = {name: errors for name, errors in without.precision.items() if CLIP not in name}
    assert nearer([without]) == [] and "open_clip" not in page_of(without)


def test_candidates_have_a_style_by_their_name() -> None:
    names = [
        OURS,
        f"{OURS} triton",
        "compiled a",
        "plain, compiled",
        "eager a",
        "plain, eager",
        CLIP,
        "open_clip, eager",
    ]
    found = ["ours", "ours", "compiled", "compiled", "eager", "eager", "peer", "peer"]
    assert [style(name) for name in names] == found


def test_the_limit_stands_where_ours_would_be_at_it() -> None:
    row = op(ratio=1.5)
    assert limit_ratio(row) == 3.0
    chart = speed([row], 940)
    bar, track = (float(chart_width(chart.inline(), colour)) for colour in ("ours", "track"))
    assert track / bar == pytest.approx(2.0, rel=1e-3)
    assert "at 50% of the limit" in chart.title


def chart_width(svg: str, colour: str) -> str:
    rectangle = [line for line in svg.splitlines() if f'class="{colour}"' in line][-1]
    return rectangle.partition(' width="')[2].partition('"')[0]


def test_stacks_add_up_to_the_whole() -> None:
    seconds = {f"kind {number}": 1.0 / 2**number for number in range(12)} | {"rest": 0.5}
    stacks = [Stack("ours", seconds, "float32", mark=1.0)]
    assert kinds(stacks) == [f"kind {number}" for number in range(5)]  # the others are below 2.5 %
    svg = stacked(stacks, "a step", "the limit").inline()
    shares = [line.rpartition(", ")[2] for line in svg.split("<title>") if "ours: " in line]
    assert sum(int(share.partition("%")[0]) for share in shares) == pytest.approx(100, abs=3)
    assert "everything else" in svg and "the limit" in svg


def test_points_lie_on_a_logarithmic_scale() -> None:
    points = [Point("ours", 0.0, "a"), *(Point("eager", 10.0**power, "b") for power in range(-2, 3))]
    svg = dots([Line("op", "float32", points, "said")], Scale(1e-2, str, {"ours": "ours", "eager": "eager"}), "errors")
    drawn = [line for line in svg.inline().splitlines() if line.startswith("<g><title>b")]
    places = [float(line.partition(' x="')[2].partition('"')[0]) for line in drawn]
    steps = [later - earlier for earlier, later in pairwise(places)]
    assert steps == [pytest.approx(steps[0], abs=0.01)] * 4 and steps[0] > 0
    zero = next(line for line in svg.inline().splitlines() if line.startswith("<g><title>a"))
    # Zero is drawn at the least value of the scale; a square's x is its left edge.
    assert float(zero.partition(' cx="')[2].partition('"')[0]) == pytest.approx(places[0] + 4.5, abs=0.01)


def test_both_themes_have_every_colour() -> None:
    assert LIGHT.keys() == DARK.keys()


def record() -> Record:
    seconds = {OURS: [0.1, 0.2, 0.1], "compiled a": [0.2, 0.4, 0.2], "eager a": [0.4, 0.8, 0.4]}
    entry = Entry(
        "token_alignment tiny float32", "op", "token_alignment", "tiny", "float32", "cpp", seconds, best="compiled a",
        ratio=2.0, limit=LimitShare("limit: copy", 1e9, "GB/s", 0.8), errors={OURS: {OUTPUTS: 1e-8, GRADIENTS: 1e-7}},
        counts={"graph_breaks": 0}, breakdown={"oner_fast": {"linear layers": 0.75, "rest": 0.25}},
    )  # fmt: skip
    return Record("a machine", {"threads": 2}, {"torch": "2.13"}, "c" * 40, True, [entry], "2026-11-30T10:00:00")


@pytest.mark.parametrize("ratio", [1e-20, 1e6, 1e20])
def test_a_ratio_of_any_size_is_drawn(ratio: float, problems: Problems) -> None:
    text = page_of(op(ratio=ratio))
    assert problems(text) == [] and len(text) < 200_000


def test_a_record_has_a_page(tmp_path: Path, problems: Problems) -> None:
    write(record(), tmp_path / "record.json")
    assert oner_fast.cli.main(["bench", "page", str(tmp_path / "record.json"), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.html").read_text()
    assert problems(text) == []
    for words in ("2.00x", "c" * 40 + "+", "2026-11-30 10:00 UTC", "80%: 0.8 of 1 GB/s", "linear layers"):
        assert words in text
    again = Report.read(tmp_path / "out" / "results.json")
    assert again.rows[0].eager == "eager a" and again.rows[0].speedup_eager and again.rows[0].speedup_eager.p50 == 4.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "has neither rows nor machine_info"),
        ('{"rows": [{}]}', "is no results.json of `oner-fast bench ops`"),
        ("[", "its JSON cannot be read"),
    ],
)
def test_a_file_that_is_neither_is_named(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.json").write_text(text)
    assert oner_fast.cli.main(["bench", "page", str(tmp_path / "x.json")]) == 2
    said = capsys.readouterr().err
    assert message in said and "x.json" in said
    assert oner_fast.cli.main(["bench", "page", str(tmp_path / "none.json")]) == 2


BROKEN: dict[str, tuple[list[str], object]] = {
    "and needs to be a str": (["op"], 3),
    "and needs to be a finite number": (["times", OURS, "p50"], "fast"),
    "is nan, and needs to be a finite number": (["times", OURS, "p20"], math.nan),
    "needs to lie between 1e-21": (["times", OURS, "p80"], 0),
    "names 'other', and has no time of it": (["best"], "other"),
    "memory has no 'peak'": (["memory", OURS], {}),
    "names 'luck', and has no criterion of it": (["target"], {"luck": 1}),
    "names 'x', and has no time of it": (["breakdown"], {"x": {"rest": 1}}),
    "has an empty name": (["memory", " "], {"peak": 1, "saved": 1, "saved_beyond_inputs": 1}),
    "the field 'later', which this version does not know": (["later"], 1),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_figures_are_refused_in_one_sentence(
    message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Report("oner-fast bench ops", "a machine", {}, [op()]).as_dict()
    (*path, last), value = BROKEN[message]
    place = data["rows"][0]
    for name in path:
        place = place[name]
    place[last] = value
    (tmp_path / "x.json").write_text(json.dumps(data))
    assert oner_fast.cli.main(["bench", "page", str(tmp_path / "x.json")]) == 2
    said = capsys.readouterr().err
    assert message in said and "x.json is no results.json" in said and said.count("\n") == 1
    assert [one.name for one in tmp_path.iterdir()] == ["x.json"]


def test_a_page_replaces_no_figures_of_another_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Report("oner-fast bench ops", "a machine", {}, [op()], True).write(tmp_path)
    before = (tmp_path / "results.json").read_text()
    write(record(), tmp_path / "record.json")
    assert oner_fast.cli.main(["bench", "page", str(tmp_path / "record.json")]) == 2
    assert "results.json holds other figures" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == before
    for _ in range(2):  # its own figures are written again
        assert oner_fast.cli.main(["bench", "page", str(tmp_path / "results.json")]) == 0
        assert oner_fast.cli.main(["bench", "page", str(tmp_path / "record.json"), "--out", str(tmp_path / "out")]) == 0


def test_the_committed_report_is_the_page_of_its_figures(problems: Problems) -> None:
    root = Path(__file__).resolve().parents[2]
    text = (root / "docs" / "figures" / "benchmark_report.html").read_text()
    rows = json.loads((root / "benchmarks" / "results" / "cpu" / "results.json").read_text())["rows"]
    assert problems(text) == [] and len(rows) >= 10
    assert text.count("<summary>") >= len(rows)


@pytest.mark.parametrize(("value", "said"), [(1.2345, "1.23"), (39.62, "39.6"), (100.0, "100"), (2984.0, "2,980")])
def test_a_factor_is_written_without_an_exponent(value: float, said: str) -> None:
    assert _factor(value) == said
