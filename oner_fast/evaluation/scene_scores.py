"""Evaluate a model on pictures whose phrases have boxes: localisation, text-guided reasoning and composed queries."""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from oner_fast.data.images import decode
from oner_fast.evaluation.boxes import Box, BoxedPicture
from oner_fast.evaluation.composed import ComposedQuery, shuffle_key
from oner_fast.evaluation.embed import Encoder, JointEncoder, embed_texts, name_left_out
from oner_fast.evaluation.fusion import composed_figures, word_shifts
from oner_fast.evaluation.pointing import evaluate_localisation, padded
from oner_fast.evaluation.reasoning import questions, reasoning_figures
from oner_fast.evaluation.sharing import gathered, mine
from oner_fast.evaluation.zero_shot import TEMPLATES, class_embeddings

MARGIN = 0.125
"""White around a cut-out thing on each side, as a share of its longer side."""


def evaluate_scenes(
    loaded: Encoder,
    pictures: Sequence[BoxedPicture],
    *,
    joint: bool,
    templates: Sequence[str] = TEMPLATES,
    probes: Sequence[str] = (),
    batch_size: int = 64,
    limit: int = 512,
) -> dict[str, Any]:
    """Score scenes whose things are known.

    Args:
        loaded: the model.
        pictures: the scenes.
        joint: whether the model embeds a picture and a text in one pass; only then there are figures of reasoning and
            of composed queries.
        templates: prompts of the class names in reasoning.
        probes: training captions, by which the shift of a name is known (`fusion.word_shifts`).
        batch_size: pictures embedded at once.
        limit: greatest number of composed queries.

    Returns:
        `localisation` (`pointing.evaluate_localisation`), `reasoning` (`reasoning.reasoning_figures`) and
        `image_text_to_image` (`composed.composed_recall` of F(I,T), with `image_only`, `text_only` and `fusions`).
    """
    pictures, damaged = _readable(pictures)
    name_left_out(damaged)
    found: dict[str, Any] = {"localisation": evaluate_localisation(loaded, pictures, batch_size=batch_size)}
    if joint:
        both = cast(JointEncoder, loaded)
        image = _embed(both, [_whole(picture) for picture in pictures], None, batch_size)
        found |= (
            {"reasoning": reasoning} if (reasoning := _reasoning(both, pictures, image, templates, batch_size)) else {}
        )
        composed = _composed(both, pictures, image, probes, batch_size, limit)
        found |= {"image_text_to_image": composed} if composed else {}
    return found | {"damaged": len(damaged)}


def scene_queries(
    pictures: Sequence[BoxedPicture], *, limit: int = 512, seed: int = 0
) -> list[tuple[ComposedQuery, Box]]:
    """Make composed queries: a thing cut out of one scene, and the name of another thing.

    Right are the scenes that show both. The scene that the thing is cut out of does not show the other one, and is no
    answer. There is one query at most for two concepts in this order, and `limit` in all, chosen by the seed.

    Returns:
        Each query with the box of its thing in the scene `query.image`.
    """
    shows: dict[str, dict[int, Box]] = {}
    for row, picture in enumerate(pictures):
        for phrase in picture.phrases:
            shows.setdefault(phrase.concept, {}).setdefault(row, phrase.boxes[0])
    found: dict[tuple[str, str], tuple[ComposedQuery, Box]] = {}
    for picture in pictures:
        for own in picture.phrases:
            for added in picture.phrases:
                pair = (own.concept, added.concept)
                if own.concept == added.concept or pair in found:
                    continue
                targets = sorted(shows[own.concept].keys() & shows[added.concept].keys())
                others = sorted(shows[own.concept].keys() - shows[added.concept].keys())
                if others:
                    row = min(others, key=lambda one: shuffle_key(seed, f"{pictures[one].name} {pair}"))
                    found[pair] = ComposedQuery(row, added.text, targets), shows[own.concept][row]
    order = sorted(found, key=lambda pair: shuffle_key(seed, f"{pair}"))
    return [found[pair] for pair in order[:limit]]


def _readable(pictures: Sequence[BoxedPicture]) -> tuple[list[BoxedPicture], list[str]]:
    good, damaged = [], []
    for picture in pictures:
        try:
            decode(picture.read(), picture.name)
            good.append(picture)
        except (OSError, ValueError) as error:
            damaged.append(str(error))
    return good, damaged


def _reasoning(
    loaded: JointEncoder, pictures: Sequence[BoxedPicture], image: Tensor, templates: Sequence[str], batch_size: int
) -> dict[str, Any] | None:
    names = list(dict.fromkeys(phrase.text for picture in pictures for phrase in picture.phrases))
    asked = questions(pictures, names)
    if not asked:
        return None
    classes = class_embeddings(
        lambda prompts: embed_texts(loaded, prompts, batch_size=batch_size), names, templates, batch_size=1 << 20
    )
    hints, far = [one.hint for one in asked], [one.absent_hint for one in asked]
    places = {text: row for row, text in enumerate(dict.fromkeys([*hints, *far]))}
    described = embed_texts(loaded, list(places), batch_size=batch_size)
    shown = [_whole(pictures[one.picture]) for one in asked]
    return reasoning_figures(
        image[[one.picture for one in asked]],
        described[[places[text] for text in hints]],
        described[[places[text] for text in far]],
        _embed(loaded, shown, hints, batch_size),
        _embed(loaded, shown, far, batch_size),
        classes,
        asked,
    )


def _composed(
    loaded: JointEncoder,
    pictures: Sequence[BoxedPicture],
    gallery: Tensor,
    probes: Sequence[str],
    batch_size: int,
    limit: int,
) -> dict[str, Any] | None:
    made = scene_queries(pictures, limit=limit)
    if not made:
        return None
    queries, added = [query for query, _ in made], [query.word for query, _ in made]
    shown = [_cut_out(pictures[query.image], box) for query, box in made]
    image = _embed(loaded, shown, None, batch_size)
    both = _embed(loaded, shown, added, batch_size)
    text = embed_texts(loaded, added, batch_size=batch_size)
    asked_for = [" ".join(map(str, query.targets)) for query in queries]
    shift = word_shifts(loaded, added, probes, batch_size=batch_size)
    return composed_figures(image, text, both, gallery, queries, asked_for, shift)


def _whole(picture: BoxedPicture) -> Callable[[], Image.Image]:
    return lambda: padded(decode(picture.read(), picture.name))


def _cut_out(picture: BoxedPicture, box: Box) -> Callable[[], Image.Image]:
    """Cut a box out of a picture and centre it on a white square with a margin."""

    def draw() -> Image.Image:
        left, top, width, height = box
        part = decode(picture.read(), picture.name).crop(
            (math.floor(left), math.floor(top), math.ceil(left + width), math.ceil(top + height))
        )
        side = max(part.size) + 2 * round(MARGIN * max(part.size))
        square = Image.new("RGB", (side, side), "white")
        square.paste(part, ((side - part.width) // 2, (side - part.height) // 2))
        return square

    return draw


def _embed(
    loaded: JointEncoder, draw: Sequence[Callable[[], Image.Image]], texts: Sequence[str] | None, batch_size: int
) -> Tensor:
    """Embed images by F(I), or with a text each by F(I,T): (N, E) float32."""
    batches = math.ceil(len(draw) / batch_size)
    parts = []
    with torch.inference_mode():
        for number in mine(batches):
            rows = slice(number * batch_size, (number + 1) * batch_size)
            pixels = torch.stack([loaded.preprocess(one()) for one in draw[rows]])
            if texts is None:
                parts.append(loaded.encode_image(pixels).float().cpu())
            else:
                parts.append(loaded.encode_image_text(pixels, list(texts[rows])).float().cpu())
    return torch.cat(gathered(parts, batches))
