"""The contrastive losses of OneR: ITC, XMC, CIC, CMC."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor

from oner_fast import ops
from oner_fast.models.oner import PassName
from oner_fast.train.engine.repeated_captions import ids_of_captions
from oner_fast.train.oner.settings import Objectives


def contrastive_losses(
    query: Mapping[PassName, Tensor],
    key: Mapping[PassName, Tensor],
    logit_scale: Tensor | float,
    objectives: Objectives,
    group: dist.ProcessGroup | None = None,
    ids: Tensor | None = None,
) -> dict[str, Tensor]:
    """Compute the losses whose weight is above 0: unweighted, 0-d, by name.

    Args:
        query: the student's embeddings (N, E) of its passes, after the predictor where there is one.
        key: the teacher's embeddings (N, E) of `image` and `text` (the student's own where there is no teacher).
        logit_scale: 1 / temperature.
        group: the ranks whose batches together are the batch of the contrast.
        ids: `caption_ids` of the pairs, (N,), which `objectives.same_caption` needs unless it is "negative".
    """

    same = {} if ids is None else ids_of_captions(ids, objectives.same_caption)

    def info_nce(
        first: Tensor, second: Tensor, *, query_other: Tensor | None = None, key_other: Tensor | None = None
    ) -> Tensor:
        return ops.mixup_info_nce(
            first,
            second,
            logit_scale,
            query_other=query_other,
            key_other=key_other,
            symmetric=objectives.symmetric,
            **same,
            group=group,
        )

    image, text = key["image"], key["text"]
    losses: dict[str, Tensor] = {}
    if objectives.itc:
        forward = info_nce(query["image"], text)
        # A symmetric loss of the student's own embeddings is its own swapped form.
        if objectives.momentum_teacher or not objectives.symmetric:
            losses["itc"] = (forward + info_nce(query["text"], image)) / 2
        else:
            losses["itc"] = forward
    if objectives.xmc:
        losses["xmc"] = info_nce(query["image"], image, query_other=query["text"], key_other=text)
    if objectives.cic:
        context = query["image_given_text"], query["text_given_image"]
        losses["cic"] = info_nce(context[0], image, query_other=context[1], key_other=text)
    if objectives.cmc:
        losses["cmc"] = info_nce(query["image_text"], image, key_other=text)
    return losses
