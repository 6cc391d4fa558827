"""Count the floating-point operations that an image of UTA needs: student, forward and backward, and teacher."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from oner_fast.models.forward_flops import uta_flops
from oner_fast.models.teacher import Teacher
from oner_fast.train.engine.throughput import FORWARD_AND_BACKWARD
from oner_fast.train.uta.settings import UTAConfiguration


def student_flops(config: UTAConfiguration) -> float:
    """Count the student's operations for one image, forward and backward, without recomputation.

    A branch that stochastic depth skips counts in full, because it is computed and multiplied by 0.
    """
    alignment, model = config.alignment, config.model
    hidden = alignment.hidden(model.cells)
    masked_out = hidden if alignment.objective == "uta" else 0
    # Mask tokens enter in place of hidden patches, which are not embedded.
    embedded = model.cells - hidden
    return FORWARD_AND_BACKWARD * uta_flops(model, [1 + model.cells - masked_out], embedded)


@torch.no_grad()
def teacher_flops(teacher: Teacher, image_size: int) -> float:
    """Count the teacher's operations for one image (3, S, S) by running it once."""
    device = next(teacher.parameters()).device
    images = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device=device)
    # As two products, because the counter does not know each backend's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        teacher.tokens(images)
    return float(counter.get_total_flops())
