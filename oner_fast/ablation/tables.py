"""The tables of a study, for Markdown and for the page alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from oner_fast.ablation.confidence import Difference, Spread, paired
from oner_fast.ablation.plan import Equal
from oner_fast.ablation.results import SHOWN, Comparison, RowResult, is_repeated
from oner_fast.evaluation.spaces import SPACES

EQUAL: dict[Equal, str] = {"steps": "equal steps", "flops": "equal operations", "time": "equal time"}
CLAIMS = (
    ("Two heads are ahead of one, with ITC", "two_heads", "itc"),
    ("Two towers are ahead of one, with ITC", "two_towers", "itc"),
    ("XMC rescues ITC", "xmc", "itc"),
    ("CIC adds to XMC", "xmc_cic", "xmc"),
    ("CMC is ahead of XMC + CIC", "cmc", "xmc_cic"),
)
"""The paper's order of the rows: a claim, the row that is to be ahead, and the other."""


@dataclass(frozen=True)
class Table:
    """A table with its heading, the note below it, column headings, and rows of cells."""

    title: str
    note: str
    headings: list[str]
    rows: list[list[str]]


def tables(results: Sequence[RowResult], comparisons: Sequence[Comparison]) -> list[Table]:
    """Build every table that has a row."""
    found = [_claims(results)]
    for equal, words in EQUAL.items():
        ladder = [each for each in results if each.row.group == "main" and each.equal == equal]
        if ladder:
            found += [_ladder(ladder, words), _spaces(ladder, words)]
    factors = [each for each in results if each.row.group != "main"]
    if factors:
        bases = [
            each
            for each in results
            if each.equal == "steps" and any(each.row.name in one.row.against for one in factors)
        ]
        found.append(_factors([*bases, *factors]))
    if comparisons:
        found.append(_differences(comparisons))
    return [table for table in found if table.rows]


def _claims(results: Sequence[RowResult]) -> Table:
    places = {(each.row.name, each.equal): each for each in results}
    rows = []
    for claim, ahead, behind in CLAIMS:
        for equal, words in EQUAL.items():
            one, other = places.get((ahead, equal)), places.get((behind, equal))
            if one is None or other is None or is_repeated(one, other, places):
                continue
            cells = [verdict(one, other, space) for space in SHOWN]
            if any(cells):
                rows.append([claim, words, *cells])
    return Table(
        "The paper's claims",
        "The difference of R@10 (the mean of both directions) in percentage points, over the seeds that both rows "
        "have, with its 95 % interval. A claim holds or is refuted where the interval leaves out 0.",
        ["claim", "compared at", *SHOWN],
        rows,
    )


def verdict(ahead: RowResult, behind: RowResult, space: str, measure: str = "recall@10") -> str:
    """Say by how many points a row is ahead of another, and whether that is decided; empty where they share no seed."""
    found = paired(ahead.by_seed(space, measure), behind.by_seed(space, measure))
    if found is None:
        return ""
    word = "one seed" if found.half is None else "undecided"
    if found.decided:
        word = "holds" if found.mean > 0 else "refuted"
    return f"{points(found)}, {word}"


def _ladder(results: Sequence[RowResult], words: str) -> Table:
    chance = next((each.chance for each in results if each.chance is not None), None)
    note = "Per cent, in the projection: mean and standard deviation over the seeds."
    if chance is not None:
        note += f" Chance gives {100 * chance:.1f} for R@10."
    headings = ["row", "FLOPs a pair", "steps", "seeds"]
    headings += ["I → T R@1", "I → T R@10", "T → I R@1", "T → I R@10", "zero-shot", "gap"]
    headings += ["paper: ImageNet", "COCO I → T R@1", "COCO T → I R@1"]
    rows = []
    for each in results:
        measured = ("image_to_text@1", "image_to_text@10", "text_to_image@1", "text_to_image@10", "zero_shot")
        cells = [share(each.spread("projection", name)) for name in measured]
        paper = each.row.paper
        beside = ["", "", ""]
        if paper is not None:
            beside = [f"{value:.1f}" for value in (paper.imagenet, paper.image_to_text[0], paper.text_to_image[0])]
        rows.append([*_about(each), *cells, _plain(each.spread("projection", "gap")), *beside])
    return Table(
        f"The rows at {words}",
        f"{note} The paper's figures are of ViT-B/16 on CC3M, another scale: only their order can be compared.",
        headings,
        rows,
    )


def _spaces(results: Sequence[RowResult], words: str) -> Table:
    rows = []
    for each in results:
        shares = [share(each.spread(space, "recall@10")) for space in SPACES]
        rows.append([each.row.title, *shares, *(_plain(each.spread(space, "gap")) for space in SHOWN)])
    return Table(
        f"Where one looks, at {words}",
        "R@10 in per cent (the mean of both directions) in each space, and the modality gap. Two towers of CLIP's own "
        "meet in one space.",
        ["row", *(f"R@10 {space}" for space in SPACES), *(f"gap {space}" for space in SHOWN)],
        rows,
    )


def _factors(results: Sequence[RowResult]) -> Table:
    rows = []
    for each in results:
        shares = [share(each.spread(space, "recall@10")) for space in SHOWN]
        rows.append(
            [
                *_about(each),
                *shares,
                share(each.spread("projection", "zero_shot")),
                _plain(each.spread("projection", "gap")),
            ]
        )
    return Table(
        "The open factors, at equal steps",
        "R@10 in per cent (the mean of both directions) in each space; zero-shot and gap in the projection.",
        ["row", "FLOPs a pair", "steps", "seeds", *(f"R@10 {space}" for space in SHOWN), "zero-shot", "gap"],
        rows,
    )


def _differences(comparisons: Sequence[Comparison]) -> Table:
    rows = [
        [
            each.row.title,
            each.against.title,
            EQUAL[each.equal],
            str(max(one.count for one in each.differences.values())),
            *(points(each.differences[space]) if space in each.differences else "" for space in SPACES),
        ]
        for each in comparisons
    ]
    return Table(
        "Differences, paired by seed",
        "R@10 (the mean of both directions) of the row minus that of the other, in percentage points. Runs of one seed "
        "see the same pairs, crops and masks in the same order. The interval is Student's, at 95 %, of the mean over "
        "seeds; * marks one that leaves out 0. No interval is corrected for the number of comparisons: of twenty "
        "without any difference one is marked by chance.",
        ["row", "against", "compared at", "seeds", *SPACES],
        rows,
    )


def _about(each: RowResult) -> list[str]:
    return [each.row.title, flops(each.pair_flops), f"{each.steps:,}", f"{each.done} of {len(each.planned)}"]


def flops(count: float) -> str:
    """Format a number of operations."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g}"


def share(found: Spread | None) -> str:
    """Format a share in per cent, with its deviation; empty where there is none."""
    if found is None:
        return ""
    beside = "" if found.deviation is None else f" ± {100 * found.deviation:.1f}"
    return f"{100 * found.mean:.1f}{beside}"


def _plain(found: Spread | None) -> str:
    if found is None:
        return ""
    return f"{found.mean:.2f}" + ("" if found.deviation is None else f" ± {found.deviation:.2f}")


def points(found: Difference) -> str:
    """Format a difference of shares in percentage points, with its interval."""
    sign = "+" if found.mean >= 0 else "−"
    interval = "" if found.half is None else f" ± {100 * found.half:.1f}"
    return f"{sign}{abs(100 * found.mean):.1f}{interval}{'*' if found.decided else ''}"


def markdown(table: Table) -> str:
    """Write a table in Markdown, with its heading and note."""
    lines = [f"## {table.title}", "", table.note, ""]
    lines += ["| " + " | ".join(table.headings) + " |", "|" + "---|" * len(table.headings)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table.rows]
    return "\n".join(lines) + "\n"
