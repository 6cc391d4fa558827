"""The fused ops, each usable by itself in other people's code.

The reference implementations of all of them stand together in `oner_fast.ops.reference`.
"""

from oner_fast import _cuda_extension
from oner_fast.ops import flop_formulas, library
from oner_fast.ops.distill_info_nce import distill_info_nce
from oner_fast.ops.gather_patches import gather_patches
from oner_fast.ops.masked_gather import masked_gather
from oner_fast.ops.mixup_info_nce import mixup_info_nce
from oner_fast.ops.padded_attention import padded_attention
from oner_fast.ops.patch_masks import boundaries, draw_masks, patch_mask
from oner_fast.ops.sigmoid_loss import sigmoid_loss
from oner_fast.ops.token_alignment import token_alignment
from oner_fast.ops.varlen_attention import varlen_attention

# Both libraries are loaded here, not at the first call, which may be one that torch.compile traces.
_cuda_extension.status()
library.choose_cuda_ops()
flop_formulas.register()

__all__ = [
    "boundaries",
    "distill_info_nce",
    "draw_masks",
    "gather_patches",
    "masked_gather",
    "mixup_info_nce",
    "padded_attention",
    "patch_mask",
    "sigmoid_loss",
    "token_alignment",
    "varlen_attention",
]
