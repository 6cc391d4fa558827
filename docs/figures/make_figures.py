"""Draw the figures of the documentation: `python docs/figures/make_figures.py`.

The masks are draws of the library itself, and the bars are read from the committed benchmark report. Everything else
is a sketch with the real proportions of a small example. Nothing is random: the files change only with their sources.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch

from oner_fast.benchmarks.charts.colours import WIDE
from oner_fast.benchmarks.charts.speed import speed
from oner_fast.benchmarks.drawing import Drawing
from oner_fast.benchmarks.report import Report
from oner_fast.ops.patch_masks import Pattern, draw_masks

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / "benchmarks" / "results" / "cpu" / "results.json"
WIDTH = 600
PATCHES, WORDS = 9, (4, 7, 2)  # of the three pairs that are packed
VISIBLE = {(2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (3, 3), (4, 1), (4, 2), (4, 3), (1, 2), (1, 3), (1, 1)}


def packing() -> Drawing:
    """Draw one step's sequences padded to the longest, and the same tokens packed."""
    d = Drawing(WIDTH, 382, "A padded batch beside the packed one")
    passes = [("F(I)", True, False), ("F(T)", False, True), ("F(I,T)", True, True)]
    rows = [
        (name, ["cls"] + ["image"] * (PATCHES * image) + ["word"] * (count * text))
        for name, image, text in passes
        for count in WORDS
    ]
    longest = max(len(row) for _, row in rows)
    tokens = sum(len(row) for _, row in rows)
    d.text(20, 30, f"Padded to the longest: {len(rows)} x {longest} = {len(rows) * longest} tokens")
    for i, (name, row) in enumerate(rows):
        y = 46 + 21 * i
        if i % len(WORDS) == 1:
            d.text(20, y + 14, name, "soft")
        for j, kind in enumerate(row + ["faint"] * (longest - len(row))):
            d.rect(90 + 24 * j, y, 22, 17, kind)
    y = 46 + 21 * len(rows) + 36
    d.text(20, y, f"Packed: {tokens} tokens, no padding")
    cell = (WIDTH - 40) / tokens
    boundaries = list(itertools.accumulate((len(row) for _, row in rows), initial=0))
    for j, kind in enumerate(kind for _, row in rows for kind in row):
        d.rect(20 + cell * j, y + 14, cell - 0.8, 30, kind, round=1)
    for boundary in boundaries:
        x = 20 + cell * boundary
        d.line(x - 0.4, y + 10, x - 0.4, y + 52, "ink", width=1)
        d.text(x, y + 66, str(boundary), "soft", size=12, anchor="middle")
    d.text(20, y + 88, "cu_seqlens", "soft", size=13)
    x = 130
    for kind, words in (("cls", "[CLS]"), ("image", "patch"), ("word", "word"), ("faint", "padding")):
        d.rect(x, y + 77, 14, 13, kind)
        d.text(x + 20, y + 88, words, "soft", size=13)
        x += 84
    return d


def oner_passes() -> Drawing:
    """Draw the passes of student and teacher, and the contrasts between them."""
    d = Drawing(WIDTH, 430, "The passes of OneR's student and teacher, and the contrasts between their embeddings")
    d.text(160, 32, "Student", anchor="middle")
    d.text(160, 50, "masked input, gradient", "soft", size=13, anchor="middle")
    d.text(470, 32, "Teacher", anchor="middle")
    d.text(470, 50, "moving average, no gradient", "soft", size=13, anchor="middle")
    student = [("image", "image", "", "F(I)"), ("caption", "word", "", "F(T)"), ("both", "image", "word", "F(I,T)")]
    for i, (name, colour, second, output) in enumerate(student):
        x = 20 + 96 * i
        _input(d, x, name, colour, second)
        d.arrow(x + 44, 100, x + 44, 122)
        d.arrow(x + 44, 178, x + 44, 200)
        _output(d, x, 202, output)
    for i, (name, colour, output) in enumerate([("image", "image", "F(I)"), ("caption", "word", "F(T)")]):
        x = 376 + 96 * i
        _input(d, x, name, colour, "")
        d.arrow(x + 44, 100, x + 44, 122)
        d.arrow(x + 44, 178, x + 44, 200)
        _output(d, x, 202, output)
    for x, w, words in ((20, 280, "one trunk, one head"), (376, 184, "the same, averaged")):
        d.rect(x, 124, w, 52, "faint", round=6)
        d.text(x + w / 2, 155, words, anchor="middle")
    d.arrow(304, 150, 372, 150, "cls")
    d.text(338, 142, "EMA", "cls", size=13, anchor="middle")
    rows = [
        ("ITC", "F(I)  against  F(T),   F(T)  against  F(I)", "image"),
        ("XMC", "(F(I) + F(T)) / 2  against  (F(I) + F(T)) / 2", "soft"),
        ("CIC", "(F(I|T) + F(T|I)) / 2  against  (F(I) + F(T)) / 2", "soft"),
        ("CMC", "F(I,T)  against  (F(I) + F(T)) / 2", "image"),
    ]
    d.text(20, 272, "Contrasts: student against teacher", "soft", size=13)
    for i, (name, words, colour) in enumerate(rows):
        y = 298 + 25 * i
        d.text(20, y, name, colour)
        d.text(70, y, words)
    d.text(20, 410, "OneR uses ITC and CMC, with masked words and masked patches beside them.", "soft", size=13)
    return d


def _input(d: Drawing, x: float, name: str, first: str, second: str) -> None:
    d.rect(x, 70, 44 if second else 88, 28, first, round=4)
    if second:
        d.rect(x + 44, 70, 44, 28, second, round=4)
    d.text(x + 44, 89, name, "ground", size=14, anchor="middle")


def _output(d: Drawing, x: float, y: float, words: str) -> None:
    d.frame(x + 8, y, 72, 30, "ink")
    d.text(x + 44, y + 20, words, size=14, anchor="middle")


def contrast_tiles() -> Drawing:
    """Draw the N x N logits of the contrast with the one block that exists at a time."""
    d = Drawing(WIDTH, 380, "The logits of mixup_info_nce, of which one block exists at a time")
    x0, y0, w, h, columns, rows = 84, 70, 56, 32, 4, 8
    d.text(x0 + columns * w / 2, 30, "keys: N rows of D", anchor="middle")
    d.text(30, y0 - 12, "queries", size=14)
    for j in range(columns):
        d.rect(x0 + w * j, 42, w - 2, 18, "key" if j == 2 else "faint")
    for i in range(rows):
        d.rect(30, y0 + h * i, 40, h - 2, "image" if i == 4 else "faint")
        for j in range(columns):
            done = j < 2 or (j == 2 and i < 4)
            now = (i, j) == (4, 2)
            d.rect(x0 + w * j, y0 + h * i, w - 2, h - 2, "word" if now else "faint" if done else "ground", edge="edge")
        d.rect(x0 + columns * w + 10, y0 + h * i, 12, h - 2, "cls")
    for j in range(columns):
        d.rect(x0 + w * j, y0 + rows * h + 8, w - 2, 12, "cls")
    x = 352
    notes = [
        ("word", "the block that exists now", "(128 queries x 256 keys at most)"),
        ("faint", "blocks already summed,", "then dropped"),
        ("ground", "blocks still to come", ""),
        ("cls", "what is kept: a maximum and a", "sum of each row and column"),
    ]
    for i, (colour, first, second) in enumerate(notes):
        y = 92 + 58 * i
        d.rect(x, y - 12, 14, 14, colour, edge="edge")
        d.text(x + 22, y, first, size=13)
        d.text(x + 22, y + 18, second, size=13)
    d.text(30, 368, "Backward makes each block of logits again; N x N numbers are never stored.", "soft", size=13)
    return d


def mask_draws() -> Drawing:
    """Draw three masks of each pattern, half of 14 x 14 patches, as the library draws them."""
    d = Drawing(WIDTH, 660, "Draws of random, block-wise and reversed block-wise masks")
    patterns: tuple[tuple[Pattern, str], ...] = (
        ("random", "random"),
        ("block", "block-wise"),
        ("reversed_block", "reversed block-wise"),
    )
    side, cell = 14, 12
    for i, (pattern, words) in enumerate(patterns):
        y = 42 + 206 * i
        d.text(24, y - 12, words)
        _, kept = draw_masks(0, 0, torch.arange(3), (side, side), side * side // 2, pattern)
        for k in range(3):
            x = 24 + 190 * k
            d.rect(x, y, cell * side - 1, cell * side - 1, "faint")
            places = (divmod(place, side) for place in kept[k].tolist())
            d.squares([(x + cell * column, y + cell * row) for row, column in places], cell - 1, "image")
    d.rect(24, 637, 12, 12, "image")
    d.text(42, 648, "visible", "soft", size=13)
    d.rect(112, 637, 12, 12, "faint")
    d.text(130, 648, "masked: exactly half of the patches in every draw", "soft", size=13)
    return d


def uta_alignment() -> Drawing:
    """Draw UTA's student, which sees half of a picture, beside the teacher that sees all of it."""
    d = Drawing(WIDTH, 500, "UTA aligns the student's visible tokens with the teacher's at the same places")
    side, cell = 6, 22
    left, right = 60, 408
    d.text(left + 66, 30, "Student, from scratch", anchor="middle")
    d.text(right + 66, 30, "CLIP, frozen", anchor="middle")
    for x, all_seen in ((left, False), (right, True)):
        for row, column in itertools.product(range(side), range(side)):
            seen = all_seen or (row, column) in VISIBLE
            d.rect(x + cell * column, 44 + cell * row, cell - 2, cell - 2, "image" if seen else "faint")
        d.arrow(x + 66, 180, x + 66, 204)
        d.rect(x - 24, 206, 180, 44, "faint", round=6)
        d.arrow(x + 66, 252, x + 66, 276)
    d.text(left + 66, 233, f"ViT: {len(VISIBLE)} tokens + [CLS]", size=14, anchor="middle")
    d.text(right + 66, 233, "ViT: 36 tokens + [CLS]", size=14, anchor="middle")
    d.text(300, 104, "the same crop", "soft", size=13, anchor="middle")
    d.text(300, 122, "masked patches", "soft", size=13, anchor="middle")
    d.text(300, 140, "are never read", "soft", size=13, anchor="middle")
    top = 308
    for x, teacher in ((left, False), (right, True)):
        d.rect(x, top - 26, cell - 2, cell - 2, "cls")
        d.text(x + 28, top - 11, "[CLS]", "soft", size=13)
        for row, column in itertools.product(range(side), range(side)):
            place = (x + cell * column, top + cell * row, cell - 2, cell - 2)
            if (row, column) in VISIBLE:
                d.rect(*place, "key" if teacher else "image")
            elif teacher:
                d.rect(*place, "faint")
    d.arrow(left + 78, top - 16, right - 6, top - 16, both=True)
    for row in (1, 2, 3, 4):
        y = top + cell * row + 10
        d.arrow(left + cell * 4 + 4, y, right + cell - 6, y, both=True)
    d.text(300, top + 12, "cosine at the same place", size=13, anchor="middle")
    d.text(300, 476, "loss: -cosine, averaged over [CLS] and the visible places", "soft", size=13, anchor="middle")
    return d


def masked_gather() -> Drawing:
    """Draw the rows that masked_gather reads and writes for one sample."""
    d = Drawing(WIDTH, 270, "masked_gather writes the prefix and the kept tokens with their positions")
    kept = (1, 2, 5, 6, 9)
    cell, x0 = 38, 130
    d.text(20, 50, "tokens")
    d.text(20, 92, "positions")
    d.text(20, 232, "result")
    for j in range(12):
        x = x0 + cell * j
        d.rect(x, 32, cell - 4, 26, "image" if j in kept else "faint", round=3)
        d.rect(x, 74, cell - 4, 26, "key" if j in kept else "faint", round=3)
        d.text(x + 17, 50, str(j), "ground" if j in kept else "soft", size=13, anchor="middle")
        d.text(x + 17, 92, str(j), "ground" if j in kept else "soft", size=13, anchor="middle")
    d.rect(x0, 212, cell - 4, 30, "cls", round=3)
    d.text(x0 + 17, 232, "[CLS]", "ground", size=12, anchor="middle")
    for i, j in enumerate(kept):
        x = x0 + cell * (i + 1)
        d.rect(x, 212, cell - 4, 15, "image", round=3)
        d.rect(x, 227, cell - 4, 15, "key", round=3)
        d.line(x0 + cell * j + 17, 102, x + 17, 208, "soft", width=1.2)
        d.text(x + 17, 232, str(j), "ground", size=13, anchor="middle")
    d.text(x0 + cell * 6 + 12, 226, "one pass; masked tokens", "soft", size=13)
    d.text(x0 + cell * 6 + 12, 243, "are never read", "soft", size=13)
    return d


def gather_patches() -> Drawing:
    """Draw the kept patches of an image and the rows that gather_patches makes of them."""
    d = Drawing(WIDTH, 260, "gather_patches reads the pixels of the kept patches alone")
    kept = [(0, 1), (1, 0), (1, 2), (2, 2), (3, 1), (3, 3)]
    for row, column in itertools.product(range(4), range(4)):
        x, y = 30 + 46 * column, 50 + 46 * row
        if (row, column) not in kept:
            d.rect(x, y, 44, 44, "faint")
            continue
        for a, b in itertools.product(range(4), range(4)):
            d.rect(x + 11 * b, y + 11 * a, 10, 10, "image" if (a + b) % 2 else "key", round=1)
    d.text(30, 34, "uint8 image, (3, H, W)", size=14)
    d.arrow(232, 140, 292, 140)
    d.text(312, 34, "float32 rows, (K, 3 x P x P)", size=14)
    for i in range(len(kept)):
        for b in range(24):
            d.rect(312 + 11 * b, 54 + 30 * i, 10, 20, "image" if b % 2 else "key", round=1)
    d.text(312, 250, "read, normalised and cast in one pass", "soft", size=13)
    return d


def varlen_attention() -> Drawing:
    """Draw the scores of padded attention beside those of packed attention."""
    d = Drawing(WIDTH, 350, "Packed attention computes the diagonal blocks alone")
    lengths = (9, 4, 7, 3)
    cell = 10
    longest, total = max(lengths), sum(lengths)
    d.text(24, 32, f"Padded: {len(lengths) * longest**2} scores")
    for k, length in enumerate(lengths):
        x, y = 24 + (longest * cell + 14) * (k % 2), 48 + (longest * cell + 14) * (k // 2)
        for i, j in itertools.product(range(longest), range(longest)):
            d.rect(x + cell * j, y + cell * i, cell - 1, cell - 1, "image" if max(i, j) < length else "faint", round=1)
    x0 = 300
    boundaries = list(itertools.accumulate(lengths, initial=0))
    d.text(x0, 32, f"Packed: {sum(n * n for n in lengths)} scores")
    d.frame(x0 - 1, 47, total * cell + 1, total * cell + 1, "edge")
    for start, length in zip(boundaries, lengths, strict=False):
        for i, j in itertools.product(range(length), range(length)):
            d.rect(x0 + cell * (start + j), 48 + cell * (start + i), cell - 1, cell - 1, "image", round=1)
    for boundary in boundaries:
        d.text(x0 + cell * boundary, 48 + cell * total + 18, str(boundary), "soft", size=13, anchor="middle")
    d.text(x0, 48 + cell * total + 38, "cu_seqlens", "soft", size=13)
    d.rect(24, 276, 12, 12, "image")
    d.text(42, 287, "scores that are used", "soft", size=13)
    d.rect(24, 298, 12, 12, "faint")
    d.text(42, 309, "padding, computed and masked", "soft", size=13)
    return d


def speedup() -> Drawing:
    """Draw the ratios of the committed report, with the machine's limit."""
    report = Report.read(RESULTS)
    return speed(report.rows, WIDE, "Times as fast as the fastest of PyTorch", _measured(report))


def _measured(report: Report) -> str:
    facts = report.machine_facts
    cores = f"{facts['cores']} cores of {facts['cpu']}" + (
        f" ({facts['matrix_units']})" if facts["matrix_units"] else ""
    )
    return f"{cores}, torch {facts['torch']}, {report.started[:10]}. Forward and backward; p20 to p80."


FIGURES = (
    packing,
    oner_passes,
    contrast_tiles,
    mask_draws,
    uta_alignment,
    masked_gather,
    gather_patches,
    varlen_attention,
    speedup,
)


def main() -> None:
    """Write every figure, and the page of the committed benchmark report."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="the folder; beside this file by default")
    folder = parser.parse_args().out
    for figure in FIGURES:
        figure().save(folder / f"{figure.__name__}.svg")
    (folder / "benchmark_report.html").write_text(Report.read(RESULTS).html(), encoding="utf-8")


if __name__ == "__main__":
    main()
