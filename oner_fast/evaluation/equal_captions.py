"""Captions that stand word for word at another image too.

In the published protocol each caption matches its own image alone, so that an equal caption of another image is a wrong
answer. How often that happens, and what R@k is where such captions count as right, is reported beside it.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from oner_fast.evaluation.retrieval import KS, Ties, caption_gallery, retrieval


def equal_caption_figures(
    image: Tensor, text: Tensor, captions: Sequence[Sequence[str]], *, ties: Ties = "miss"
) -> dict[str, Any]:
    """Count captions that equal a caption of another image up to case and blanks; give R@k where they are right.

    Args:
        image: (N, E) L2-normalised.
        text: (M, E) L2-normalised, a row for each caption, image by image.
        captions: the captions of each image.
        ties: as for `retrieval.retrieval`.

    Returns:
        `captions`, the number of such captions, and `image_to_text` and `text_to_image` with R@1, R@5 and R@10.
    """
    matches = caption_gallery(captions, distinct=False).matches
    images_of = matches.text.bincount(minlength=matches.texts)
    scores = retrieval(image, text, matches, ties=ties)
    shares = {way: {f"R@{k}": figures[f"R@{k}"] for k in KS} for way, figures in scores.items()}
    return {"captions": int((images_of > 1).sum()), **shares}
