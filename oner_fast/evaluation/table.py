"""Print the figures of evaluation.json as a table: by rich on a terminal, elsewhere as aligned plain text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from oner_fast.evaluation.record import part_of

DIRECTIONS = {
    "image_to_text": "image → text",
    "text_to_image": "text → image",
    "image_text_to_image": "image + text → image",
}
# An ending of a split's name, and the part that it stands for: by whether training captions hold all the words of a
# caption, or by whether the pictures have boxes.
PARTS = {"_seen_words": "training words", "_new_words": "new words", "_boxes": "with boxes"}
KS = (1, 5, 10)
CLASSIFIERS = {"zero_shot": "zero-shot", "knn": "k-NN", "linear_probe": "linear probe"}


def split_title(name: str) -> str:
    """Title of a split: `val_new_words` -> `val, new words`; `val_seen_words` -> `val, training words`."""
    for part, words in PARTS.items():
        if name.endswith(part):
            return f"{name.removesuffix(part)}, {words}"
    return name


def percent(share: float) -> str:
    """Format a share in per cent, with as many decimals as matter."""
    value = 100 * share
    return f"{value:.0f} %" if value >= 99.95 else f"{value:.1f} %" if value >= 1 or value == 0 else f"{value:.2f} %"


def times(share: float, by_chance: float) -> str:
    """Format a share as a multiple of chance."""
    ratio = share / by_chance if by_chance else 0.0
    return f"{ratio:.0f}×" if ratio >= 10 else f"{ratio:.1f}×"


def rows(evaluation: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (split, direction, figures) of each retrieval in the evaluation."""
    for split, entry in evaluation.items():
        for direction in DIRECTIONS:
            if isinstance(entry, dict) and direction in entry:
                yield split, direction, entry[direction]


def classifications(evaluation: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield the images' name, the classifier's name and the figures of each classification in the evaluation."""
    for key, entry in evaluation.items():
        if not isinstance(entry, dict):
            continue
        if part_of(key) in CLASSIFIERS and "top1" in entry:  # an ImageFolder's classification is an entry of its own
            folder = Path(entry["data"]).name if key != part_of(key) else "image folder"
            yield folder, CLASSIFIERS[part_of(key)], entry
            continue
        for name, title in CLASSIFIERS.items():
            found = entry.get(name, {})
            if "top1" in found:
                yield split_title(key), f"{title}, concept", found
            else:
                yield from ((split_title(key), f"{title}, {label}", figures) for label, figures in found.items())


def spaces(evaluation: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (split, space, figures) of each space in which the evaluation measured retrieval."""
    for split, entry in evaluation.items():
        found = entry.get("spaces", {}) if isinstance(entry, dict) else {}
        yield from ((split, space, figures) for space, figures in found.items() if "image_to_text" in figures)


SPACE_HEADINGS = ("image → text R@1", "R@10", "text → image R@1", "R@10", "zero-shot top-1", "gap")


def space_cells(figures: dict[str, Any]) -> list[str]:
    """Format the figures of a space under `SPACE_HEADINGS`; a figure that the space lacks stays empty."""
    shares = [percent(figures[direction][f"R@{k}"]) for direction in list(DIRECTIONS)[:2] for k in (1, 10)]
    top = figures.get("zero_shot")
    gap = figures.get("modality_gap")
    return [*shares, percent(top["top1"]) if top else "", "" if gap is None else f"{gap:.3f}"]


def show(evaluation: dict[str, Any]) -> None:
    """Print the figures to standard output."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        print("\n".join(plain_lines(evaluation)))
        return
    table = Table(title="Retrieval (in brackets: chance, and the multiple of it)", title_justify="left")
    for heading in ("split", "query → gallery"):
        table.add_column(heading)
    for heading in ("queries", *(f"R@{k}" for k in KS)):
        table.add_column(heading, justify="right")
    last = None
    for split, direction, figures in rows(evaluation):
        if last not in (None, split):
            table.add_section()
        cells = [
            f"[bold]{percent(figures[f'R@{k}'])}[/] [dim]({_beside(figures, k)})[/]" for k in KS if f"R@{k}" in figures
        ]
        table.add_row(
            escape(split_title(split)) if split != last else "", DIRECTIONS[direction], str(figures["queries"]), *cells
        )
        last = split
    console.print(table)
    if named := list(spaces(evaluation)):
        table = Table(title="In each space", title_justify="left")
        for heading in ("split", "space"):
            table.add_column(heading)
        for heading in SPACE_HEADINGS:
            table.add_column(heading, justify="right")
        last = None
        for split, space, figures in named:
            if last not in (None, split):
                table.add_section()
            table.add_row(escape(split_title(split)) if split != last else "", space, *space_cells(figures))
            last = split
        console.print(table)
    if found := list(classifications(evaluation)):
        table = Table(title="Classification (in brackets: chance, and the multiple of it)", title_justify="left")
        table.add_column("images of")
        table.add_column("how, label")
        for heading in ("images", "classes", "top-1", "top-5", "most frequent class"):
            table.add_column(heading, justify="right")
        for pictures, how, figures in found:
            cells = [f"[bold]{percent(figures[f'top{k}'])}[/] [dim]({_beside_top(figures, k)})[/]" for k in (1, 5)]
            table.add_row(
                escape(pictures),
                escape(how),
                str(figures["images"]),
                str(figures["classes"]),
                *cells,
                _majority(figures),
            )
        console.print(table)
    for line in _other_lines(evaluation):
        console.print(line, highlight=False, markup=False)


def plain_lines(evaluation: dict[str, Any]) -> list[str]:
    """The same table as lines of text."""
    headings = "".join(f"{f'R@{k} (chance, times)':>26}" for k in KS)
    titles = [split_title(split) for split, _, _ in rows(evaluation)]
    wide = max([16, *map(len, titles), *(len(pictures) for pictures, _, _ in classifications(evaluation))]) + 2
    lines = [f"{'split':<{wide}}{'query → gallery':<23}{'queries':>8}{headings}"]
    for split, direction, figures in rows(evaluation):
        cells = [f"{percent(figures[f'R@{k}'])} ({_beside(figures, k)})" for k in KS if f"R@{k}" in figures]
        lines.append(
            f"{split_title(split):<{wide}}{DIRECTIONS[direction]:<23}{figures['queries']:>8}"
            + "".join(f"{cell:>26}" for cell in cells)
        )
    if named := list(spaces(evaluation)):
        lines.append(f"{'split':<{wide}}{'space':<12}" + "".join(f"{heading:>18}" for heading in SPACE_HEADINGS))
        for split, space, figures in named:
            shown = "".join(f"{cell:>18}" for cell in space_cells(figures))
            lines.append(f"{split_title(split):<{wide}}{space:<12}{shown}")
    if found := list(classifications(evaluation)):
        tops = "".join(f"{f'top-{k} (chance, times)':>26}" for k in (1, 5))
        lines.append(
            f"{'images of':<{wide}}{'how, label':<23}{'images':>8}{'classes':>9}{tops}{'most frequent class':>21}"
        )
        for pictures, how, figures in found:
            cells = [f"{percent(figures[f'top{k}'])} ({_beside_top(figures, k)})" for k in (1, 5)]
            lines.append(
                f"{pictures:<{wide}}{how:<23}{figures['images']:>8}{figures['classes']:>9}"
                + "".join(f"{cell:>26}" for cell in cells)
                + f"{_majority(figures):>21}"
            )
    return lines + _other_lines(evaluation)


def _beside_top(figures: dict[str, Any], k: int) -> str:
    return f"{percent(figures[f'chance@{k}'])}, {times(figures[f'top{k}'], figures[f'chance@{k}'])}"


def _majority(figures: dict[str, Any]) -> str:
    """Share of the most frequent class among the images; zero-shot figures have none."""
    return percent(figures["majority"]) if "majority" in figures else ""


def _beside(figures: dict[str, Any], k: int) -> str:
    return f"{percent(figures[f'chance@{k}'])}, {times(figures[f'R@{k}'], figures[f'chance@{k}'])}"


def _other_lines(evaluation: dict[str, Any]) -> list[str]:
    lines = []
    for split, entry in evaluation.items():
        if isinstance(entry, dict) and "modality_gap" in entry:
            spread = entry.get("spread", {})
            beside = f" (spread of images {spread['image']:.3f}, of texts {spread['text']:.3f})" if spread else ""
            lines.append(f"modality gap, {split_title(split)}: {entry['modality_gap']:.3f}{beside}")
        equal = entry.get("equal_captions") if isinstance(entry, dict) else None
        if equal and equal["captions"]:
            shares = ", ".join(
                f"{DIRECTIONS[way]} " + " / ".join(percent(equal[way][f"R@{k}"]) for k in KS)
                for way in ("image_to_text", "text_to_image")
            )
            lines.append(
                f"{split_title(split)}: {equal['captions']:,} captions stand word for word at another image too; "
                f"R@1 / 5 / 10 where these count as right: {shares}"
            )
        if isinstance(entry, dict) and entry.get("captions_left_out"):
            lines.append(f"{split_title(split)}: {entry['captions_left_out']:,} further captions were not evaluated")
        if isinstance(entry, dict) and entry.get("damaged"):
            lines.append(f"left out of {split_title(split)}: {entry['damaged']} damaged images")
        if isinstance(entry, dict) and (lost := entry.get("damaged_training")):
            lines.append(f"left out of what {split_title(split)} learnt from: {lost} damaged images")
    return lines
