"""The committed ratios: how they are made, and which new ratio or count is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from oner_fast.benchmarks import ratios
from oner_fast.benchmarks.ratios import Committed, Processor, Ratios, merged, processor_of
from oner_fast.benchmarks.record import Entry, Record, write

FACTS = {"cpu": "EPYC", "kernels": "avx512", "matrix_units": "", "threads": 2}
HERE = "EPYC, avx512 kernels, 2 threads"
VERSIONS = {"torch": "2.13.0+cpu"}
KEY = "token_alignment (2, 3) float32"


def entry(ratio: float = 2.0, kind: str = "op", served: str = "cpp", saved: int = 8) -> Entry:
    seconds = {"oner_fast": [1.0], "eager": [ratio]}
    return Entry(KEY, kind, "token_alignment", "(2, 3)", "float32", served, seconds, best="eager", ratio=ratio,
                 counts={"saved_bytes": saved})  # fmt: skip


def record(ratio: float, **changes: object) -> Record:
    made = Record("a machine", FACTS, VERSIONS, "abc", False, [entry(ratio)])
    return replace(made, **changes)  # type: ignore[arg-type]


def committed(*values: float, name: str = HERE, kind_of_torch: str = "2.13.0+cpu") -> Ratios:
    one = Processor(
        name, "a machine", kind_of_torch, ["abc"], {KEY: Committed("cpp", list(values), {"saved_bytes": 8})}
    )
    return Ratios({name: one})


def test_a_processor_is_named_by_what_ratios_depend_on() -> None:
    assert processor_of(FACTS) == HERE
    assert processor_of({**FACTS, "matrix_units": "amx_bf16"}) == "EPYC, avx512 kernels and amx_bf16, 2 threads"


def test_on_the_same_processor_the_bound_follows_the_spread() -> None:
    # As far below the lowest as that is below the highest: 1.2 * 1.2 / 2.0.
    assert committed(2.0, 1.8, 1.2).processors[HERE].entries[KEY].bound() == pytest.approx(0.72)
    # Runs that hardly differ leave three tenths.
    assert committed(2.0, 2.0, 1.99).processors[HERE].entries[KEY].bound() == pytest.approx(1.393)


def test_a_ratio_below_the_bound_is_a_regression() -> None:
    known = committed(2.0, 1.8, 1.6)
    assert known.regression(entry(1.13), HERE) == ""
    said = known.regression(entry(1.11), HERE)
    assert said == (
        f"{KEY}: 1.11x of eager; on this processor it was 1.60 to 2.00, and less than 1.12 is a clear regression"
    )


def test_on_another_processor_half_of_the_lowest_median_is_the_bound() -> None:
    known = Ratios({**committed(2.0, 1.8, 1.6).processors, **committed(1.0, 1.2, 1.4, name="Xeon").processors})
    assert known.regression(entry(0.61), "another") == ""
    assert "on other processors it was 1.20 to 1.80, and less than 0.60" in known.regression(entry(0.59), "another")


def test_what_is_not_committed_is_not_judged() -> None:
    known = committed(2.0, 1.8, 1.6)
    assert known.regression(entry(0.1, served="portable"), HERE) == ""
    assert known.regression(replace(entry(0.1), key="another"), HERE) == ""
    assert known.regression(replace(entry(), best="", ratio=None), HERE) == ""
    assert Ratios().regression(entry(0.1), HERE) == ""


def test_a_count_must_be_the_committed_one() -> None:
    known = committed(2.0, 1.8, 1.6)
    assert known.wrong_count(entry(saved=8), HERE, VERSIONS) == ""
    assert known.wrong_count(entry(saved=9), "another", VERSIONS) == f"{KEY}: saved_bytes is 9, and was 8 in abc"
    # PyTorch's layers decide what a step keeps: another torch or processor may differ.
    step = entry(kind="step", saved=9)
    assert known.wrong_count(step, HERE, VERSIONS) != ""
    assert known.wrong_count(step, HERE, {"torch": "2.15.0"}) == known.wrong_count(step, "another", VERSIONS) == ""


def test_records_are_merged_into_one_processor() -> None:
    found = merged([record(2.0), record(1.8, commit="abd"), record(1.6)])
    assert (found.name, found.torch, found.commits) == (HERE, "2.13.0+cpu", ["abc", "abd", "abc"])
    assert found.entries == {KEY: Committed("cpp", [2.0, 1.8, 1.6], {"saved_bytes": 8})}


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ([], "2 records were given, and the spread needs at least 3 runs"),
        ([record(1.6, facts={**FACTS, "threads": 1})], "one processor, and these have EPYC"),
        ([record(1.6, versions={"torch": "2.15.0"})], "one torch, and these have 2.13.0"),
        ([record(1.6, entries=[entry(saved=9)])], "the implementation or a count differs"),
        ([record(1.6, entries=[])], "1 of 3 records lack it"),
        ([record(1.8)], "a record is given twice"),
    ],
)
def test_records_that_do_not_belong_together_are_refused(last: list[Record], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merged([record(2.0), record(1.8), *last])


def test_the_command_writes_the_file_and_keeps_other_processors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ratios.json"
    ratios.write(committed(1.0, 1.2, 1.4, name="Xeon"), out)
    paths = []
    for number, ratio in enumerate((2.0, 1.8, 1.6)):
        paths.append(str(tmp_path / f"{number}.json"))
        write(record(ratio), paths[-1])
    assert ratios.main([*paths, "--out", str(out)]) == 0
    assert f"{KEY}: 2.00, 1.80, 1.60; a clear regression below 1.12" in capsys.readouterr().out
    found = ratios.read(out)
    assert set(found.processors) == {HERE, "Xeon"} and found.processors[HERE].entries[KEY].ratios == [2.0, 1.8, 1.6]
    assert ratios.main([paths[0], "--out", str(out)]) == 2
    assert "oner-fast bench ratios: 1 records were given" in capsys.readouterr().err


def test_a_damaged_file_is_refused_and_a_missing_one_is_empty(tmp_path: Path) -> None:
    assert ratios.read(tmp_path / "none.json") == Ratios()
    path = tmp_path / "ratios.json"
    whole = '{"processors": {"a": {"machine": "m", "torch": "2", "commits": ["c"], "entries": {"k": %s}}}}'
    good = '{"served": "cpp", "ratios": [1.0], "counts": {}}'
    path.write_text(whole % good, encoding="utf-8")
    assert ratios.read(path).processors["a"].entries["k"].bound() == pytest.approx(0.7)
    for text in (
        '{"processors": {"a": {}}}',
        "[1]",
        "[" * 10_000,
        whole % good.replace("[1.0]", "[]"),
        whole % good.replace("1.0", "0"),
        whole % good.replace("1.0", "NaN"),
        whole % good.replace("1.0", '"fast"'),
        (whole % good).replace('["c"]', "[]"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="cannot be read .*: write it again with `make ratios`"):
            ratios.read(path)
