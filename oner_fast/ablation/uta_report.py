"""Write the results of the study of UTA: `ablation.json`, `ablation.md`, and `ablation.html`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from oner_fast.ablation.charts import recall_chart
from oner_fast.ablation.plan import PlannedRun
from oner_fast.ablation.report import render, row_content, state_of, write_text
from oner_fast.ablation.results import RowResult, is_repeated
from oner_fast.ablation.tables import EQUAL, Table, flops, markdown, points, share, verdict
from oner_fast.ablation.uta_plan import Settings
from oner_fast.ablation.uta_results import COMPARED, PROBES, Comparison, compare, gather
from oner_fast.evaluation.folder import processor
from oner_fast.format_version import ABLATION, FIELD
from oner_fast.report import page
from oner_fast.report.content import versions

READING = (
    "Each row is the same recipe with the masks that its name says, towards the same frozen teacher. Rows at equal "
    "steps see the same images; rows at equal operations and at equal time take as many steps as those of UTA pay for. "
    "Operations and time are those of student and teacher together, without a cache. At equal steps the row without "
    "masks is the long distillation, which costs more. Rows whose operations do not differ are one run in all three."
)
CLAIMS = (
    ("Reversed block-wise masks are ahead of block-wise ones", "uta", "block"),
    ("Reversed block-wise masks are ahead of random ones", "uta", "random"),
    ("Random masks are ahead of block-wise ones", "random", "block"),
    ("UTA is ahead of distillation without masks", "uta", "full"),
)
"""A claim, the row that is to be ahead, and the other."""
_NAMES = {"recall@10": "R@10", "zero_shot@5": "zero-shot top-5"}
_COLOURS = ("joint", "image", "text", "right", "muted")


def write(
    out: Path, planned: Sequence[PlannedRun], settings: Settings, pace: Mapping[str, float], command: str
) -> Path:
    """Write the three files of a study from the runs that are done; returns the page's path."""
    results = gather(planned)
    comparisons = compare(results)
    found = tables(results, comparisons, pace)
    figures = out / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    content = _content(results, comparisons, settings, pace, command)
    write_text(out / "ablation.json", json.dumps(content, indent=1) + "\n")
    head = f"# UTA's masks\n\n{READING}\n\n{state_of(results, settings.quick)}\n\nMade by `{command}`.\n\n"
    write_text(out / "ablation.md", head + "\n".join(markdown(table) for table in found))
    path = out / "ablation.html"
    write_text(path, _page(results, found, settings, command, figures))
    return path


def tables(results: Sequence[RowResult], comparisons: Sequence[Comparison], pace: Mapping[str, float]) -> list[Table]:
    """Build every table that has a row."""
    found = [_claims(results)]
    for teacher in dict.fromkeys(_teacher(each) for each in results):
        for equal, words in EQUAL.items():
            rows = [each for each in results if _teacher(each) == teacher and each.equal == equal]
            if any(each.row.group != "teachers" for each in rows):
                found.append(_rows(rows, f"Towards {teacher}, at {words}", pace))
    found.append(_differences(comparisons))
    return [table for table in found if table.rows]


def _teacher(each: RowResult) -> str:
    return each.row.name.partition(".")[0]


def _splits(results: Sequence[RowResult]) -> list[str]:
    return list(dict.fromkeys(split for each in results for split in each.measures))


def _claims(results: Sequence[RowResult]) -> Table:
    places = {(each.row.name, each.equal): each for each in results}
    columns = [(split, measure) for split in _splits(results) for measure in COMPARED]
    rows = []
    for claim, ahead, behind in CLAIMS:
        for teacher in dict.fromkeys(_teacher(each) for each in results):
            for equal, words in EQUAL.items():
                one, other = places.get((f"{teacher}.{ahead}", equal)), places.get((f"{teacher}.{behind}", equal))
                if one is None or other is None or is_repeated(one, other, places):
                    continue
                cells = [verdict(one, other, split, measure) for split, measure in columns]
                if any(cells):
                    rows.append([claim, teacher, words, *cells])
    return Table(
        "The claims",
        "The difference in percentage points, over the seeds that both rows have, with its 95 % interval. A claim "
        "holds or is refuted where the interval leaves out 0. R@10 is the mean of both directions.",
        ["claim", "teacher", "compared at", *(f"{split}: {_NAMES[measure]}" for split, measure in columns)],
        rows,
    )


def _rows(results: Sequence[RowResult], title: str, pace: Mapping[str, float]) -> Table:
    splits = _splits(results)
    probes = sorted(
        {
            (split, name)
            for each in results
            for split, seeds in each.measures.items()
            for measures in seeds.values()
            for name in measures
            if name.startswith(PROBES)
        }
    )
    headings = ["row", "steps", "images", "FLOPs an image", "FLOPs a run", "minutes a run", "seeds"]
    measured = [(split, name) for split in splits for name in ("image_to_text@10", "text_to_image@10", "zero_shot@5")]
    measured += probes
    headings += [f"{split}: {_column(name)}" for split, name in measured]
    rows = []
    for each in results:
        run = each.planned[0]
        cells = [share(each.spread(split, name)) for split, name in measured]
        if each.row.group == "teachers":
            rows.append([each.row.title, "", "", "", "", "", f"{each.done} of {len(each.planned)}", *cells])
            continue
        images = run.config.optim.batch_size * run.config.optim.steps
        seconds = pace.get(each.row.name)
        minutes = "" if seconds is None else f"{seconds * run.config.optim.steps / 60:.1f}"
        about = [f"{each.steps:,}", f"{images:,}", flops(each.pair_flops), flops(run.flops), minutes]
        rows.append([each.row.title, *about, f"{each.done} of {len(each.planned)}", *cells])
    chance = {
        split: seeds[next(iter(seeds))]["chance@10"] for each in results for split, seeds in each.measures.items()
    }
    note = (
        "Per cent: mean and standard deviation over the seeds. Operations and minutes include the teacher's; minutes "
    )
    note += "are the measured pace of whole steps times their number."
    if chance:
        note += " Chance of R@10: " + ", ".join(f"{split} {100 * value:.1f}" for split, value in chance.items()) + "."
    return Table(title, note, headings, rows)


def _column(name: str) -> str:
    ways = {"image_to_text@10": "I → T R@10", "text_to_image@10": "T → I R@10", **_NAMES}
    return ways.get(name, name.replace("knn_", "k-NN, ").replace("linear_probe_", "probe, "))


def _differences(comparisons: Sequence[Comparison]) -> Table:
    splits = list(dict.fromkeys(split for each in comparisons for split in each.differences))
    columns = [(split, measure) for split in splits for measure in COMPARED]
    rows = []
    for each in comparisons:
        cells, count = [], 0
        for split, measure in columns:
            difference = each.differences.get(split, {}).get(measure)
            cells.append("" if difference is None else points(difference))
            count = max(count, 0 if difference is None else difference.count)
        teacher = each.row.name.partition(".")[0]
        rows.append([each.row.title, each.against.title, teacher, EQUAL[each.equal], str(count), *cells])
    return Table(
        "Differences, paired by seed",
        "The row minus the other, in percentage points. Runs of one seed see the same images and crops in the same "
        "order. The interval is Student's, at 95 %, of the mean over seeds; * marks one that leaves out 0. No interval "
        "is corrected for the number of comparisons.",
        ["row", "against", "teacher", "compared at", "seeds", *(f"{split}: {_NAMES[name]}" for split, name in columns)],
        rows,
    )


def _content(
    results: Sequence[RowResult],
    comparisons: Sequence[Comparison],
    settings: Settings,
    pace: Mapping[str, float],
    command: str,
) -> dict[str, Any]:
    rows = [
        {
            **row_content(each),
            "flops_an_image": each.pair_flops,
            "flops_a_run": each.planned[0].flops,
            "seconds_a_step": pace.get(each.row.name),
        }
        for each in results
    ]
    differences = [
        {
            "row": each.row.name,
            "against": each.against.name,
            "equal": each.equal,
            "splits": {
                split: {name: asdict(one) | {"decided": one.decided} for name, one in found.items()}
                for split, found in each.differences.items()
            },
        }
        for each in comparisons
    ]
    about = {"command": command, "versions": dict(versions()), "processor": processor()}
    return {FIELD: ABLATION, "about": about, "settings": asdict(settings), "rows": rows, "differences": differences}


def _page(results: Sequence[RowResult], found: Sequence[Table], settings: Settings, command: str, figures: Path) -> str:
    splits = _splits(results)
    colours = dict(zip(splits, _COLOURS, strict=False))
    charts = []
    for teacher in dict.fromkeys(_teacher(each) for each in results):
        for equal, words in EQUAL.items():
            rows = [each for each in results if _teacher(each) == teacher and each.equal == equal]
            if any(each.done for each in rows if each.row.group != "teachers"):
                charts.append(
                    (
                        f"the rows towards {teacher}, {words}",
                        recall_chart(f"r-{teacher}-{equal}", rows, figures, colours),
                    )
                )
    return render(
        {
            "title": "UTA's masks",
            "question": ("Which masks", "teach", "the most for the same cost?"),
            "tables": found,
            "recall": charts,
            "gaps": [],
            "maps": [],
            "compared_at": "",
            "colours": colours,
            "reading": READING,
            "state": state_of(results, settings.quick),
            "settings": settings,
            "command": command,
            "versions": versions(),
            "processor": processor(),
            "policy": page.POLICY,
        }
    )
