"""Mixup-contrastive InfoNCE: the loss of ITC, XMC, CIC and CMC (OneR, section 3), and of CLIP."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from oner_fast.ops import checks, reference
from oner_fast.ops.implementations import choose, register

register("mixup_info_nce", "reference", reference.mixup_info_nce)


def mixup_info_nce(
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor | float,
    *,
    query_other: Tensor | None = None,
    key_other: Tensor | None = None,
    mix: Tensor | float = 0.5,
    partner: Tensor | None = None,
    partner_weight: Tensor | None = None,
    symmetric: bool = True,
    group: dist.ProcessGroup | None = None,
    implementation: str | None = None,
) -> Tensor:
    """InfoNCE of two sets of embeddings, each optionally the mixture of two, with targets optionally shared with a
    partner.

    q = normalise(query), or normalise((1 - mix) query + mix query_other); k likewise; normalise(x) = x / max(|x|,
    1e-12). logits = logit_scale * q @ k.T. The loss is the mean over rows of the cross-entropy or, ``symmetric``,
    the mean of that and the same over columns.

    Args:
        query, key: (N, D) float32, float16, bfloat16 or float64, not normalised. Row i of each belongs to pair i.
        logit_scale: a number or a 0-d tensor (gradient if it asks for one): 1 / temperature.
        query_other, key_other: (N, D), mixed into query and key.
        mix: the share of the other, a number or (N,); gradient if it asks for one. OneR: 1/2.
        partner: (N,) int64: row i's target is i with 1 - partner_weight[i] and partner[i] with partner_weight[i]
            (images mixed at the input). A global index where ``group`` is given.
        partner_weight: (N,), 0.5 where not given.
        symmetric: False: rows only, MoCo v3's query-to-key form.
        group: every rank returns the loss of the concatenated batch; gradients are W times the derivative (W ranks),
            so that DDP's mean is the single-process gradient. Local N may differ.
        implementation: force one by name; see ``oner-fast doctor``.

    Returns:
        0-d float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError, IndexError: an argument's shape, dtype, device or value is not as above.
    """
    checks.is_tensor("mixup_info_nce", "query", query)
    serving = choose("mixup_info_nce", query.device.type, implementation, dtype=query.dtype)
    return serving.function(
        query, key, logit_scale, query_other=query_other, key_other=key_other, mix=mix, partner=partner,
        partner_weight=partner_weight, symmetric=symmetric, group=group,
    )  # fmt: skip
