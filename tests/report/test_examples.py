"""The choice of examples: some drawn by seed regardless of the outcome, and separately the best and the worst."""

import torch
from torch.nn import functional as F

from oner_fast.evaluation.embed import SplitEmbeddings
from oner_fast.evaluation.retrieval import caption_gallery
from oner_fast.report.curves import series, smoothed
from oner_fast.report.examples import choose, image_examples, text_examples
from oner_fast.report.style import COLOURS, page_svg

COUNT = 40


def split(noise: float, seed: int = 0) -> SplitEmbeddings:
    generator = torch.Generator().manual_seed(seed)
    captions = [[f"thing {i}"] for i in range(COUNT)]
    text = F.normalize(torch.randn(COUNT, 16, generator=generator), dim=1)
    image = F.normalize(text + noise * torch.randn(COUNT, 16, generator=generator), dim=1)
    return SplitEmbeddings(image, text, caption_gallery(captions), captions, list(range(COUNT)), [])


def test_the_draw_does_not_depend_on_the_outcome() -> None:
    drawn = [
        [example.caption for example in image_examples(split(noise, seed), str, seed=3).drawn]
        for noise, seed in ((0.0, 0), (0.5, 1), (9.0, 2))
    ]
    assert drawn[0] == drawn[1] == drawn[2]
    other = [example.caption for example in image_examples(split(0.0), str, seed=4).drawn]
    assert other != drawn[0]


def test_best_succeed_worst_fail_and_none_is_shown_twice() -> None:
    for make in (image_examples, text_examples):
        panels = make(split(0.9), str, seed=0)
        assert len(panels.drawn) == 6
        assert all(example.rank == 1 and example.hits[0].right for example in panels.best)
        ranks = [example.rank for example in panels.worst]
        assert ranks == sorted(ranks, reverse=True)
        assert ranks[-1] > 1
        shown = [example.caption for part in (panels.drawn, panels.best, panels.worst) for example in part]
        assert len(shown) == len(set(shown))


def test_hits_are_the_five_nearest_in_order() -> None:
    embedded = split(0.6)
    for example in text_examples(embedded, str, seed=0).drawn:
        row = embedded.gallery.texts.index(example.caption)
        scores = embedded.text[row].double() @ embedded.image.double().T
        assert [int(hit.picture or -1) for hit in example.hits] == scores.argsort(descending=True)[:5].tolist()
        assert [hit.right for hit in example.hits] == [hit.caption == example.caption for hit in example.hits]
        assert (example.rank <= 5) == any(hit.right for hit in example.hits)


def test_choose_prefers_the_widest_margin_and_the_last_rank() -> None:
    ranks, margins = torch.tensor([0, 0, 9, 5, 0]), torch.tensor([0.1, 0.5, -1.0, -0.5, 0.3])
    drawn, best, worst = choose(list("abcde"), ranks, margins, seed=0, drawn=0, best=2, worst=1)
    assert (drawn, best, worst) == ([], [1, 4], [2])


def test_smoothing_does_not_lag_and_keeps_a_constant() -> None:
    line = [float(i) for i in range(20)]
    assert smoothed(line, 3)[3:17] == line[3:17]
    assert smoothed([2.0] * 5, 10) == [2.0] * 5
    assert smoothed([1.0, 3.0], 0) == [1.0, 3.0]


def test_series_leaves_out_values_that_are_not_finite() -> None:
    metrics = [{"step": 1, "x": 2}, {"step": 2, "x": None}, {"step": 3}, {"step": 4, "x": float("nan")}]
    assert series(metrics, "x") == ([1], [2.0])


def test_ids_are_unique_to_a_chart() -> None:
    svg = (
        '<?xml version="1.0"?><svg height="1" viewBox="0 0 9 9" xmlns="http://www.w3.org/2000/svg">'
        f'<g id="figure_1"><path id="m1" style="fill: {COLOURS["image"]}"/><use xlink:href="#m1"/></g></svg>'
    )
    page = page_svg(svg, "loss")
    assert page.startswith('<svg class="chart" viewBox="0 0 9 9"')
    assert 'id="loss-m1"' in page
    assert 'href="#loss-m1"' in page
    assert "figure_1" not in page
    assert "var(--image)" in page
    assert "http" not in page
