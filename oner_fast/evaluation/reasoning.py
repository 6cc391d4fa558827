"""Score text-guided reasoning: does a text that is added to a picture move the answer to what the text means?

Classes are scored against F(I,T), the embedding of a picture and a text in one pass (OneR, section 1, "Text-guided
reasoning"). Each picture shows several things. The text is one word of the name of one of them, drawn by seed; so the
name has at least two words, and the text is not the answer. The questions are our choice:

* Three classes: the thing that the text means, another thing of the picture, and something that the picture does not
  show. `joint` is the share answered by the first. `moved` is that share among the pictures whose answer without a text
  is another one. `spoiled` is the share of answers by the third class when the text is a word of its name, among the
  pictures whose answer without a text is a thing that they show.
* All classes of the data: how often the thing that the text means has the greatest score (`top1`), or one of the five
  greatest (`top5`).

Beside F(I,T) stand the picture alone, the text alone, and the mean of F(I) and F(T). A tie counts as a miss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from oner_fast.data.sources.concepts import STOP_WORDS
from oner_fast.evaluation.boxes import BoxedPicture, Phrase
from oner_fast.evaluation.composed import shuffle_key
from oner_fast.evaluation.splits import words

WAYS = ("image_only", "text_only", "joint", "mean")


@dataclass(frozen=True)
class Question:
    """A picture (row) and three classes (rows of the names) with a hint for the first and for the third."""

    picture: int
    asked: int
    other: int
    absent: int
    hint: str
    absent_hint: str


def questions(pictures: Sequence[BoxedPicture], names: Sequence[str], *, seed: int = 0) -> list[Question]:
    """Make one question for each picture that allows one.

    Args:
        pictures: pictures with phrases.
        names: the classes: each distinct phrase.
        seed: decides which thing and which word is asked for.
    """
    place = {name: row for row, name in enumerate(names)}
    hinted = [(name, hints) for name in names if (hints := _hints(name))]
    found = []
    for row, picture in enumerate(pictures):
        order = sorted(picture.phrases, key=lambda one: shuffle_key(seed, f"{picture.name} {one.text}"))
        asked = next((one for one in order if _hints(one.text)), None)
        other = next((one for one in order if asked is not None and not _share(one, asked)), None)
        if asked is None or other is None:
            continue
        shown = {word for one in picture.phrases for word in words(one.text)}
        start = int(shuffle_key(seed, f"absent {picture.name}")[:8], 16)
        absent = next(
            (
                hinted[(start + step) % len(hinted)]
                for step in range(len(hinted))
                if shown.isdisjoint(words(hinted[(start + step) % len(hinted)][0]))
            ),
            None,
        )
        if absent is not None:
            name, hints = absent
            hint = _chosen(_hints(asked.text), f"{seed} {picture.name}")
            far = _chosen(hints, f"{seed} {picture.name}")
            found.append(Question(row, place[asked.text], place[other.text], place[name], hint, far))
    return found


def reasoning_figures(
    image: Tensor,
    hint: Tensor,
    absent_hint: Tensor,
    joint: Tensor,
    absent_joint: Tensor,
    classes: Tensor,
    asked: Sequence[Question],
) -> dict[str, Any]:
    """Compute the figures of Q questions.

    Args:
        image: (Q, E) F(I) of each question's picture.
        hint, absent_hint: (Q, E) F(T) of its two hints.
        joint, absent_joint: (Q, E) F(I,T) of its picture with each hint.
        classes: (C, E) embeddings of the names.
        asked: the questions.

    Returns:
        `questions`; `three_classes` with `chance` and the share of right answers of each of `WAYS`, `moved` and
        `spoiled` with `pictures` and the shares, and `absent_before`, the answers by the third class without a text;
        `all_classes` with `classes` and, for each way, `top1` and `top5` beside `chance@1` and `chance@5`.
    """
    rows = torch.tensor([[one.asked, one.other, one.absent] for one in asked])
    right = {"image_only": image, "text_only": hint, "joint": joint, "mean": _mean(image, hint)}
    wrong = {"text_only": absent_hint, "joint": absent_joint, "mean": _mean(image, absent_hint)}
    three = {way: _answers(query, classes, rows) for way, query in right.items()}
    led = {way: _answers(query, classes, rows) for way, query in wrong.items()}
    before = three["image_only"]
    elsewhere, sound = before != 0, (before == 0) | (before == 1)
    total = len(classes)
    return {
        "questions": len(asked),
        "three_classes": {
            "chance": 1 / 3,
            **{way: _part(answers == 0) for way, answers in three.items()},
            "absent_before": _part(before == 2),
            "moved": {
                "pictures": int(elsewhere.sum()),
                **{way: _part(three[way][elsewhere] == 0) for way in WAYS if way != "image_only"},
            },
            "spoiled": {
                "pictures": int(sound.sum()),
                **{way: _part(led[way][sound] == 2) for way in WAYS if way != "image_only"},
            },
        },
        "all_classes": {
            "classes": total,
            "chance@1": 1 / total,
            "chance@5": min(5, total) / total,
            **{way: _top(query, classes, rows[:, 0]) for way, query in right.items()},
        },
    }


def _answers(query: Tensor, classes: Tensor, rows: Tensor) -> Tensor:
    """Choose among a few classes (Q, K) each: (Q,) int64 places in `rows`; -1 where the greatest scores are equal."""
    scores = (query.double().unsqueeze(1) * classes.double()[rows]).sum(-1)
    best, place = scores.max(1)
    return torch.where((scores == best[:, None]).sum(1) == 1, place, -1)


def _top(query: Tensor, classes: Tensor, own: Tensor) -> dict[str, float]:
    scores = query.double() @ classes.double().T
    ahead = (scores >= scores.gather(1, own[:, None])).sum(1) - 1
    return {"top1": _part(ahead < 1) or 0.0, "top5": _part(ahead < 5) or 0.0}


def _part(hits: Tensor) -> float | None:
    return int(hits.sum()) / len(hits) if len(hits) else None


def _mean(first: Tensor, second: Tensor) -> Tensor:
    return F.normalize(first + second, dim=-1)


def _hints(name: str) -> list[str]:
    """Words of a name that can be added as a text: nothing where the name has one word, which would be the answer."""
    several = list(dict.fromkeys(words(name)))
    return [word for word in several if word not in STOP_WORDS and not word.isdigit()] if len(several) > 1 else []


def _chosen(hints: Sequence[str], key: str) -> str:
    return min(hints, key=lambda word: shuffle_key(0, f"{key} {word}"))


def _share(one: Phrase, other: Phrase) -> bool:
    return not set(words(one.text)).isdisjoint(words(other.text))
