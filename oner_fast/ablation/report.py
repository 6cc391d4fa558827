"""Write a study's results: `ablation.json`, `ablation.md`, and `ablation.html`, which needs no other file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from oner_fast.ablation.charts import SPACE_COLOURS, gap_charts, map_charts, recall_chart
from oner_fast.ablation.plan import PlannedRun, Settings
from oner_fast.ablation.results import Comparison, RowResult, compare, gather
from oner_fast.ablation.tables import EQUAL, Table, markdown, tables
from oner_fast.atomic import write_atomic
from oner_fast.evaluation.folder import processor
from oner_fast.format_version import ABLATION, FIELD
from oner_fast.report import page
from oner_fast.report.content import versions

READING = (
    "Each row is the same recipe with the changes that its name says. Rows at equal steps take the same number of "
    "steps; rows at equal operations take as many as the operations of the whole of OneR (+ CMC) allow them. Every "
    "figure is of held-out pairs and names its space: backbone ([CLS] of the trunk), projection (the student's), "
    "predictor (query through the student's predictor, gallery from the averaged teacher), teacher (both sides), and "
    "max (the greater of backbone and projection)."
)


def write(out: Path, planned: Sequence[PlannedRun], settings: Settings, command: str) -> Path:
    """Write the three files of a study from the runs that are done; returns the page's path."""
    results = gather(planned)
    comparisons = compare(results)
    found = tables(results, comparisons)
    figures = out / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    write_text(out / "ablation.json", json.dumps(_content(results, comparisons, settings, command), indent=1) + "\n")
    head = f"# OneR's ablation\n\n{READING}\n\n{state_of(results, settings.quick)}\n\nMade by `{command}`.\n\n"
    write_text(out / "ablation.md", head + "\n".join(markdown(table) for table in found))
    path = out / "ablation.html"
    write_text(path, _page(results, found, settings, command, figures))
    return path


def write_text(path: Path, text: str) -> None:
    """Write a file at once."""
    write_atomic(path, lambda file: file.write(text.encode("utf-8", "replace")))


def state_of(results: Sequence[RowResult], quick: bool) -> str:
    """Say how many runs are done."""
    folders = {run.folder for each in results for run in each.planned}
    done = {
        run.folder for each in results for run in each.planned if run.seed in next(iter(each.measures.values()), {})
    }
    warning = " The models are tiny (--quick), and their figures mean nothing." if quick else ""
    return f"{len(done)} of {len(folders)} runs are done.{warning}"


def _content(
    results: Sequence[RowResult], comparisons: Sequence[Comparison], settings: Settings, command: str
) -> dict[str, Any]:
    rows = [
        {
            **row_content(each),
            "flops_a_pair": each.pair_flops,
            "chance@10": each.chance,
            "paper": None if each.row.paper is None else asdict(each.row.paper),
            "gap": {space: asdict(curve) for space, curve in each.gaps.items()},
        }
        for each in results
    ]
    differences = [
        {
            "row": each.row.name,
            "against": each.against.name,
            "equal": each.equal,
            "recall@10": {space: asdict(one) | {"decided": one.decided} for space, one in each.differences.items()},
        }
        for each in comparisons
    ]
    about = {"command": command, "versions": dict(versions()), "processor": processor()}
    return {FIELD: ABLATION, "about": about, "settings": asdict(settings), "rows": rows, "differences": differences}


def row_content(each: RowResult) -> dict[str, Any]:
    """Describe a row, its runs and its figures as values for JSON."""
    return {
        "row": each.row.name,
        "title": each.row.title,
        "group": each.row.group,
        "equal": each.equal,
        "steps": each.steps,
        "runs": {run.seed: run.folder.name for run in each.planned},
        "figures": each.measures,
        "summary": {
            part: {name: _summary(each, part, name) for name in next(iter(seeds.values()))}
            for part, seeds in each.measures.items()
        },
    }


def _summary(each: RowResult, space: str, measure: str) -> dict[str, Any] | None:
    found = each.spread(space, measure)
    return None if found is None else asdict(found)


def _page(results: Sequence[RowResult], found: Sequence[Table], settings: Settings, command: str, figures: Path) -> str:
    ladder = {equal: [each for each in results if each.row.group == "main" and each.equal == equal] for equal in EQUAL}
    shown = {equal: rows for equal, rows in ladder.items() if any(each.done for each in rows)}
    factors = [each for each in results if each.row.group != "main" and each.done]
    first = next(iter(shown.values()), [])
    content = {
        "title": "OneR's ablation",
        "question": ("What keeps one tower from", "collapsing", "?"),
        "tables": found,
        "recall": [
            (EQUAL[equal], recall_chart(f"recall-{equal}", rows, figures)) for equal, rows in shown.items()
        ] + ([("the open factors", recall_chart("recall-factors", factors, figures))] if factors else []),
        "gaps": gap_charts(first, figures),
        "maps": map_charts(first, figures),
        "compared_at": EQUAL[next(iter(shown))] if shown else "",
        "colours": SPACE_COLOURS,
        "reading": READING,
        "state": state_of(results, settings.quick),
        "settings": settings,
        "command": command,
        "versions": versions(),
        "processor": processor(),
        "policy": page.POLICY,
    }  # fmt: skip
    return render(content)


def render(content: dict[str, Any]) -> str:
    """Fill the page's template."""
    environment = Environment(
        loader=FileSystemLoader([Path(__file__).parent, Path(page.__file__).parent]),
        autoescape=select_autoescape(["html", "html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("ablation.html.j2").render(content)
