from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from oner_fast.benchmarks.cases import OURS
from oner_fast.benchmarks.limits import Limit
from oner_fast.benchmarks.report import Report
from oner_fast.benchmarks.rows import GRADIENTS, OUTPUTS, Row
from oner_fast.benchmarks.timing import Candidate, Samples
from oner_fast.benchmarks.words import verdict


def row() -> Row:
    made = Row("mixup_info_nce", "N 8, D 4", "float32", served="cpp", target={"speedup": 1.5, "memory_share": 0.1})
    samples = {
        OURS: Samples(OURS, [1.0, 1.0, 1.0]),
        "eager a": Samples("eager a", [3.0, 3.0, 3.0]),
        "compiled a": Samples("compiled a", [2.0, 2.0, 2.0]),
        "limit: mm": Samples("limit: mm", [0.5, 0.5, 0.5]),
        "limit: copy": Samples("limit: copy", [0.1, 0.1, 0.1]),
    }
    limits = [Limit(Candidate("limit: mm", print), 1e9), Limit(Candidate("limit: copy", print), 1e9, "copy")]
    made.add_times(samples, ["eager a"], limits, {"gemm": 5e8, "copy": 1e8})
    made.profiles = {OURS: {"forward": {"an_op": 0.75, "outside operations": 0.05}, "backward": {"its_backward": 0.2}}}
    made.memory = {
        OURS: {"peak": 2 * 2**20, "saved": 10, "saved_beyond_inputs": 1},
        "compiled a": {"peak": 10 * 2**20, "saved": 10, "saved_beyond_inputs": 1},
    }
    made.judge(["compiled a"])
    return made


def test_ratios_and_shares() -> None:
    made = row()
    assert (made.best, made.eager) == ("compiled a", "eager a")
    assert made.speedup and made.speedup.p50 == 2.0 and made.speedup_eager and made.speedup_eager.p50 == 3.0
    # Half of the limit's work takes twice its time.
    assert made.share == pytest.approx(0.25) and made.limit_rate == 2e9 and made.rate == 5e8
    assert (made.limit, made.limit_unit) == ("limit: mm", "GFLOP/s")
    assert made.floor == {"gemm": pytest.approx(0.25), "copy": pytest.approx(0.01)}
    assert made.met == {"speedup": True, "memory_share": False}
    assert verdict(made) == "1.5x of the best: met; memory at most 1/10 of compiled: MISSED"


def test_verdicts() -> None:
    made = Row("masked_gather", "tiny", "float32", target={"memory_bytes": 3e8, "share": 0.5})
    assert verdict(made) == "memory at most 300 MB: not measured; 50% of the limit: not measured"
    made.memory = {OURS: {"peak": 3 * 10**8 + 1, "saved": 0, "saved_beyond_inputs": 0}}
    made.judge([])
    assert verdict(made).startswith("memory at most 300 MB: MISSED")
    assert verdict(Row("masked_gather", "tiny", "float32")) == "no target"
    assert verdict(Row("masked_gather", "tiny", "float32", refused={OURS: "wrong"})) == "REFUSED"


def test_a_report_read_from_its_json_is_equal(tmp_path: Path) -> None:
    report = Report("oner-fast bench ops", "a machine", {"threads": 2}, [row()], finished=True)
    report.write(tmp_path)
    data = tmp_path / "results.json"
    again = Report.read(data)
    assert again.as_dict() == report.as_dict() == json.loads(data.read_text())
    assert again.markdown(["speed", "memory"]) == (tmp_path / "report.md").read_text()


def test_the_page_shows_ratios_targets_and_refusals(tmp_path: Path) -> None:
    page = Report("oner-fast bench ops", "a machine", {}, [row()]).markdown()
    for words in (
        "Machine: a machine",
        "not finished",
        "mixup_info_nce (cpp)",
        "2.00x",
        "3.00x",
        "25%: 0.5 of 2 GFLOP/s",
        "MISSED",
    ):
        assert words in page
    refused = row()
    refused.refused = {OURS: "result 0: relative error 1, allowed 0.1"}
    page = Report("oner-fast bench ops", "a machine", {}, [refused], finished=True).markdown()
    assert "REFUSED" in page and "refused, wrong: oner_fast: result 0" in page and "not finished" not in page


def test_a_missed_target_shows_where_the_time_goes() -> None:
    missed = row()
    page = Report("c", "m", {}, [missed]).markdown()
    assert "The machine needs 250 ms for its products at the best product's rate; 10 ms for its bytes" in page
    assert "| oner_fast | forward | 800 | an_op 750, outside operations 50 |" in page
    assert "| oner_fast | backward | 200 | its_backward 200 |" in page
    missed.met = dict.fromkeys(missed.met, True)
    assert "stands in the way" not in Report("c", "m", {}, [missed]).markdown()


def test_the_charts_stand_beside_the_markdown(tmp_path: Path) -> None:
    written = Report("c", "m", {}, [row()], finished=True).write(tmp_path)
    assert [path.name for path in written] == ["results.json", "speed.svg", "memory.svg", "report.md", "report.html"]
    for name in ("speed", "memory"):
        drawing = ElementTree.parse(tmp_path / f"{name}.svg").getroot()
        assert drawing.attrib["role"] == "img" and drawing[0].text
        assert f"![{name}]({name}.svg)" in (tmp_path / "report.md").read_text()
    assert [path.name for path in Report("c", "m", {}, []).write(tmp_path / "empty")][1] == "report.md"


def test_names_from_elsewhere_stay_text_in_markdown(tmp_path: Path) -> None:
    name = "a|b\n# c [x](http://e.org) <img src=x>"
    hostile = replace(
        row(), op=name, shape=name, dtype=name, served=name, notes=[name], parts={name: 0.5},
        memory={name: {"peak": 1, "saved": 1, "saved_beyond_inputs": 0}},
        times={name: row().times[OURS]}, refused={name: name}, best=name, speedup=None, speedup_eager=None,
    )  # fmt: skip
    text = Report(name, name, {}, [hostile], True, name, name).markdown()
    assert not re.search(r"[\[\]<>]", text.replace(f"`{' '.join(name.split())}`", ""))
    assert not [line for line in text.splitlines() if line.startswith("# c")]
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_errors_stand_apart_for_outputs_and_gradients() -> None:
    made = row()
    made.target = {}
    made.precision = {OURS: {OUTPUTS: 1e-8, GRADIENTS: 2e-7}}
    assert "| oner_fast | 1000 | 1000 | 1000 | 3 | 1.0e-08 | 2.0e-07 | 0.0 |" in Report("c", "m", {}, [made]).markdown()
