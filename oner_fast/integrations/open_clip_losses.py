"""open_clip's losses by our ops: the same values and gradients, and no matrix of logits.

Over W ranks open_clip's flags mean the following. Here l is the loss of the whole batch, and l_r the loss of the rows
and columns of rank r, so that l is the mean of all l_r.

| `local_loss` | `gather_with_grad` | value | gradient of the features | gradient of `logit_scale` |
|---|---|---|---|---|
| no | no | l | that of l | that of l |
| no | yes | l | W times that of l | that of l |
| yes | no | l_r | that of l_r by the rank's own rows, the gathered ones being constants | that of l_r |
| yes | yes | l_r | that of the sum of all l_r | that of l_r |

`mixup_info_nce(group=)` returns l, W times the gradient of l for the features, and for `logit_scale` gradients whose
mean over the ranks is that of l.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from oner_fast.integrations.fallback import tell
from oner_fast.integrations.swaps import Function, stands_for
from oner_fast.models.optional_packages import optional_package
from oner_fast.ops import checks, distill_info_nce, mixup_info_nce
from oner_fast.ops.distill_checks import same_dtype
from oner_fast.ops.distill_info_nce import sum_of_rows
from oner_fast.ops.row_info_nce import row_info_nce

_theirs = optional_package("open_clip").loss
_CLIP, _DISTILL = _theirs.ClipLoss, _theirs.DistillClipLoss
_PARTS = {name: getattr(_CLIP, name) for name in ("get_logits", "get_ground_truth")}


class _OfTheBatch(torch.autograd.Function):
    """Return both sides and logit_scale unchanged, and turn the gradients of `group=` into those of open_clip."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, logit_scale: Tensor, factor: float) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.factor = factor
        return image.view_as(image), text.view_as(text), logit_scale.view_as(logit_scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        to_image, to_text = (
            x * ctx.factor if need else None for x, need in zip(grads[:2], ctx.needs_input_grad, strict=False)
        )
        to_scale = None
        if ctx.needs_input_grad[2]:
            to_scale = grads[2].to(torch.promote_types(grads[2].dtype, torch.float32), copy=True)
            dist.all_reduce(to_scale)
            to_scale = (to_scale / dist.get_world_size()).to(grads[2].dtype)
        return to_image, to_text, to_scale, None


def _of_the_batch(loss: Any, image: Tensor, text: Tensor, logit_scale: Tensor | float) -> tuple[Any, ...]:
    factor = 1.0 if loss.gather_with_grad else 1 / loss.world_size
    if isinstance(logit_scale, Tensor):
        return _OfTheBatch.apply(image, text, logit_scale, factor)
    return *_OfTheBatch.apply(image, text, image.new_zeros(()), factor)[:2], logit_scale


def _gathered(loss: Any, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Gather the features of all ranks as open_clip does for a local loss."""
    images, texts = _theirs.gather_features(
        image, text, local_loss=True, gather_with_grad=loss.gather_with_grad, rank=loss.rank,
        world_size=loss.world_size,
    )  # fmt: skip
    return images, texts


def contrast(loss: Any, image: Tensor, text: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Compute open_clip's contrastive loss with the flags of its module `loss`; image and text (n, D) -> 0-d."""
    if loss.world_size == 1:
        return mixup_info_nce(image, text, logit_scale, normalized=True)
    if not loss.local_loss:
        image, text, logit_scale = _of_the_batch(loss, image, text, logit_scale)
        return mixup_info_nce(image, text, logit_scale, normalized=True, group=dist.group.WORLD)
    images, texts = _gathered(loss, image, text)
    first = loss.rank * image.shape[0]
    by_image = row_info_nce(image, texts, logit_scale, first)
    return (by_image + row_info_nce(text, images, logit_scale, first)) / 2


def distillation(loss: Any, student: tuple[Any, ...], teacher: tuple[Any, ...]) -> Tensor:
    """Compute open_clip's distillation loss; student and teacher are (image, text, logit_scale) each."""
    if loss.world_size == 1:
        return distill_info_nce(*student, *teacher, normalized=True)
    if not loss.local_loss:
        student = _of_the_batch(loss, *student)
        return distill_info_nce(*student, *teacher, normalized=True, group=dist.group.WORLD)
    images, texts = _gathered(loss, *student[:2])
    of_teacher = _gathered(loss, *teacher[:2])
    total = _rows(student[0], texts, student[2], teacher[0], of_teacher[1], teacher[2])
    total = total + _rows(student[1], images, student[2], teacher[1], of_teacher[0], teacher[2])
    return total / (2 * student[0].shape[0])


def _rows(query: Tensor, keys: Tensor, scale: Any, teacher: Tensor, teacher_keys: Tensor, teacher_scale: Any) -> Tensor:
    query, keys = same_dtype(query, keys)
    teacher, teacher_keys = same_dtype(teacher, teacher_keys)
    return sum_of_rows(query, keys, scale, teacher, teacher_keys, teacher_scale)


def why_not(loss: Any, parts: dict[str, Any], image: Any, text: Any, scale: Any, bias: Any = None) -> str | None:
    """Say why our ops cannot serve a call of one of open_clip's losses; None where they can.

    `parts` are the functions of the loss that our ops pass over, by name; a subclass may have its own.
    """
    for name, own in parts.items():
        if name in vars(loss) or getattr(type(loss), name) is not own:
            return f"{type(loss).__name__} has a {name} of its own"
    if loss.world_size > 1 and getattr(loss, "use_horovod", False):
        return "use_horovod=True exchanges features by Horovod, and our ops use torch.distributed alone"
    return _why_not_features(image, text, scale, bias) or _why_not_ranks(loss.rank, loss.world_size)


def _why_not_features(image: Any, text: Any, logit_scale: Any, logit_bias: Any = None) -> str | None:
    for name, x in (("image_features", image), ("text_features", text)):
        if not isinstance(x, Tensor) or x.ndim != 2 or x.dtype not in checks.FLOATING:
            return f"{name} are {_shown(x)}, and our ops take floating-point rows (N, D)"
    if image.shape != text.shape or image.device != text.device:
        return f"image_features are {_shown(image)} and text_features {_shown(text)}, which are no pairs"
    if image.shape[0] == 0:
        return "the batch is empty"
    for name, x in (("logit_scale", logit_scale), ("logit_bias", logit_bias)):
        if isinstance(x, Tensor) and (x.ndim > 1 or x.numel() != 1 or x.dtype not in checks.FLOATING):
            return f"{name} is {_shown(x)}, and our ops take one floating-point number"
    return None


def _why_not_ranks(rank: int, world_size: int) -> str | None:
    if world_size == 1:
        return None
    if not dist.is_available() or not dist.is_initialized():
        return f"world_size is {world_size}, and no process group is initialised"
    if (rank, world_size) != (dist.get_rank(), dist.get_world_size()):
        return (
            f"rank {rank} of {world_size} was given, and the process group says {dist.get_rank()} of "
            f"{dist.get_world_size()}"
        )
    return None


def _shown(x: Any) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__


def with_bias(loss: Tensor, logit_bias: Any) -> Tensor:
    """Let a bias take its gradient, which is 0: a softmax does not change with it. One that is not finite is NaN."""
    if not isinstance(logit_bias, Tensor):
        return loss
    one = 1 + 0.0 * logit_bias.reshape(1)
    return (loss.reshape(1) * one.to(loss.device, loss.dtype)).squeeze(0)


def clip_forward(original: Function) -> Function:
    """Make the forward of ClipLoss by our ops; `original` serves what they cannot."""

    def forward(
        self: Any,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Any,
        logit_bias: Any = None,
        output_dict: bool = False,
    ) -> Any:
        if reason := why_not(self, _PARTS, image_features, text_features, logit_scale, logit_bias):
            tell("open_clip.loss.ClipLoss", "its own code", reason)
            return original(self, image_features, text_features, logit_scale, logit_bias, output_dict)
        total_loss = with_bias(contrast(self, image_features, text_features, logit_scale), logit_bias)
        return {"contrastive_loss": total_loss} if output_dict else total_loss

    return stands_for(forward, original)


def distill_forward(original: Function) -> Function:
    """Make the forward of DistillClipLoss by our ops; `original` serves what they cannot."""

    def forward(
        self: Any,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Any,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Any,
        output_dict: bool = False,
    ) -> Any:
        student = (image_features, text_features, logit_scale)
        teacher = (dist_image_features, dist_text_features, dist_logit_scale)
        if reason := why_not(self, _PARTS, *student) or _why_not_teacher(self, student, teacher):
            tell("open_clip.loss.DistillClipLoss", "its own code", reason)
            return original(self, *student, *teacher, output_dict)
        losses = contrast(self, *student), distillation(self, student, teacher)
        return {"contrastive_loss": losses[0], "distill_loss": losses[1]} if output_dict else losses

    return stands_for(forward, original)


def _why_not_teacher(loss: Any, student: tuple[Any, ...], teacher: tuple[Any, ...]) -> str | None:
    if "dist_loss" in vars(loss) or type(loss).dist_loss is not _DISTILL.dist_loss:
        return f"{type(loss).__name__} has a dist_loss of its own"
    if reason := _why_not_features(*teacher):
        return f"of the teacher, {reason}"
    if teacher[0].shape[0] != student[0].shape[0] or teacher[0].device != student[0].device:
        return f"the student's features are {_shown(student[0])} and the teacher's {_shown(teacher[0])}"
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in teacher):
        return "the teacher's features want a gradient, and our op gives none"
    return None


class ClipLoss(_CLIP):  # type: ignore[misc, valid-type]
    """open_clip's ClipLoss by `mixup_info_nce`: the same flags, values and gradients.

    Raises:
        ValueError: `use_horovod` is set.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        if use_horovod:
            raise ValueError(
                "use_horovod=True is not served: our ops exchange features by torch.distributed; start with torchrun, "
                "or take open_clip.loss.ClipLoss"
            )
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod)

    forward = clip_forward(_CLIP.forward)


class CoCaLoss(_theirs.CoCaLoss, ClipLoss):  # type: ignore[misc, name-defined]
    """open_clip's CoCaLoss, whose contrastive half is computed by `ClipLoss` above and whose captions are not."""


class DistillClipLoss(_DISTILL, ClipLoss):  # type: ignore[misc, valid-type]
    """open_clip's DistillClipLoss by `mixup_info_nce` and `distill_info_nce`; the teacher's logits are never stored."""

    forward = distill_forward(_DISTILL.forward)
