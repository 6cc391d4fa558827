"""The compiled ops have no second derivative, and say so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from oner_fast import _extension
from oner_fast.ops import (
    gather_patches,
    masked_gather,
    mixup_info_nce,
    padded_attention,
    sigmoid_loss,
    token_alignment,
    varlen_attention,
)

pytestmark = pytest.mark.skipif(not _extension.status().loaded, reason=_extension.status().reason or "built")

X, Y = (torch.randn(2, 4, 4).requires_grad_() for _ in range(2))
IMAGES = torch.randn(2, 3, 4, 4).requires_grad_()
KEPT, CU_SEQLENS = torch.tensor([[3, 0], [1, 1]]), torch.tensor([0, 2], dtype=torch.int32)
CALLS = {
    "masked_gather": lambda: masked_gather(X, KEPT, implementation="cpp"),
    "gather_patches": lambda: gather_patches(IMAGES, KEPT, 2, implementation="cpp"),
    "mixup_info_nce": lambda: mixup_info_nce(X[0], Y[0], 5.0, implementation="cpp"),
    "sigmoid_loss": lambda: sigmoid_loss(X[0], Y[0], 5.0, -1.0, implementation="cpp"),
    "varlen_attention": lambda: varlen_attention(X, Y, Y, CU_SEQLENS, implementation="cpp"),
    "padded_attention": lambda: padded_attention(X[None], Y[None], Y[None], implementation="cpp"),
    "token_alignment": lambda: token_alignment(X, Y, implementation="cpp"),
}


@pytest.mark.parametrize("op", CALLS)
def test_a_second_derivative_is_refused(op: str) -> None:
    out: Tensor = CALLS[op]()
    leaf = IMAGES if op == "gather_patches" else X
    upstream = torch.ones_like(out, requires_grad=True)
    (first,) = torch.autograd.grad(out, leaf, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice.*once_differentiable"):
        first.square().sum().backward()
