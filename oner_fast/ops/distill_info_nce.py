"""distill_info_nce: the contrast's logits of a student against those of a teacher, as TinyCLIP and open_clip do."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from oner_fast.dtypes import statistics_dtype, widest_dtype
from oner_fast.ops import checks, contrast_checks, distill_checks, reference
from oner_fast.ops.collectives import exchanged, gather_rows, gather_rows_without_gradient, sum_loss
from oner_fast.ops.contrast_arguments import one_number
from oner_fast.ops.implementations import Facts, register
from oner_fast.ops.library import define, raw_ops
from oner_fast.ops.serve import serve
from oner_fast.ops.transforms import Values, differentiable

# For each row (5, n), and each column (5, N): the student's largest logit, the sum of its exponentials, the same two of
# the teacher, and the sum of the teacher's exponentials times the student's logits.


@define(
    "distill_info_nce(Tensor query, Tensor key, Tensor logit_scale, Tensor teacher_query, Tensor teacher_key, "
    "Tensor teacher_logit_scale, bool columns_too) -> (Tensor, Tensor)",
    portable="distill_info_nce.statistics",
)
def _forward_shape(
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    teacher_logit_scale: Tensor,
    columns_too: bool,
) -> tuple[Tensor, Tensor]:
    dtype, columns = statistics_dtype(query), key.shape[0] if columns_too else 0
    return query.new_empty((5, query.shape[0]), dtype=dtype), query.new_empty((5, columns), dtype=dtype)


@define(
    "distill_info_nce_backward(Tensor query, Tensor key, Tensor logit_scale, Tensor teacher_query, Tensor teacher_key, "
    "Tensor teacher_logit_scale, Tensor rows, Tensor columns, Tensor weight, bool need_key) "
    "-> (Tensor, Tensor, Tensor)",
    portable="distill_info_nce.backward",
)
def _backward_shape(
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    teacher_logit_scale: Tensor,
    rows: Tensor,
    columns: Tensor,
    weight: Tensor,
    need_key: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    to_key = query.new_empty(key.shape, dtype=key.dtype) if need_key else query.new_empty(0, dtype=rows.dtype)
    return query.new_empty(query.shape), to_key, query.new_empty((), dtype=rows.dtype)


class _DistillInfoNce:
    """The sum of the terms of all rows (and columns), and its gradients.

    Saved are the inputs, and five numbers for each row and each column; backward computes the logits again.
    """

    @staticmethod
    def compute(
        query: Tensor,
        key: Tensor,
        logit_scale: Tensor,
        teacher_query: Tensor,
        teacher_key: Tensor,
        teacher_logit_scale: Tensor,
        columns_too: bool,
        backend: str,
    ) -> Values:
        rows, columns = raw_ops(backend).distill_info_nce(
            query, key, logit_scale, teacher_query, teacher_key, teacher_logit_scale, columns_too
        )
        widest = widest_dtype(query.device)
        terms = [x[0] + x[1].log() - x[4] / x[3] for x in (rows, columns)]
        loss = terms[0].sum(0, keepdim=True, dtype=widest) + terms[1].sum(0, keepdim=True, dtype=widest)
        return loss.to(rows.dtype).squeeze(0), rows, columns

    @staticmethod
    def remember(ctx: Any, arguments: Values, results: Values) -> None:
        *tensors, _, ctx.backend = arguments
        ctx.save_for_backward(*tensors, *results[1:])

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> Values:
        need = ctx.needs_input_grad[:3]
        found = raw_ops(ctx.backend).distill_info_nce_backward(*ctx.saved_tensors, grad, need[1])
        scale = ctx.saved_tensors[2]
        to_query, to_key, to_scale = found[0], found[1], found[2].to(scale.dtype)
        return (
            *(x if wanted else None for x, wanted in zip((to_query, to_key, to_scale), need, strict=True)),
            *[None] * 5,
        )


_distill_info_nce = differentiable("distill_info_nce", _DistillInfoNce)


def sum_of_rows(
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor | float,
    teacher_query: Tensor,
    teacher_key: Tensor,
    teacher_logit_scale: Tensor | float,
    *,
    columns_too: bool = False,
    backend: str = "portable",
) -> Tensor:
    """Sum the cross-entropies of n rows against N keys, and of the columns where asked for; the rows enter as they are.

    Args:
        query: (n, D) floating-point.
        key: (N, D) in the dtype of the query.
        logit_scale: a number or a tensor of shape () or (1,).
        teacher_query: (n, E).
        teacher_key: (N, E).
        teacher_logit_scale: a number or a tensor of shape () or (1,).
        columns_too: add the cross-entropies of the columns.
        backend: the implementation of the raw ops.

    Returns:
        The sum, 0-d: float32, or float64 where the query is.
    """
    scale, teacher_scale = (one_number(x, query.device) for x in (logit_scale, teacher_logit_scale))
    total: Tensor = _distill_info_nce(
        query, key, scale, teacher_query.detach(), teacher_key.detach(), teacher_scale.detach(), columns_too, backend
    )
    return total


def _compiled(
    backend: str,
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor | float,
    teacher_query: Tensor,
    teacher_key: Tensor,
    teacher_logit_scale: Tensor | float,
    *,
    symmetric: bool,
    normalized: bool,
    group: dist.ProcessGroup | None,
) -> Tensor:
    sizes = None
    if group is not None:
        contrast_checks.matrix("distill_info_nce", "query", query)
        (sizes,) = exchanged((query.shape[0],), query.device, group)
    total = None if sizes is None else sum(sizes)
    distill_checks.arguments(query, key, logit_scale, teacher_query, teacher_key, teacher_logit_scale, total)
    if not normalized:
        query, key, teacher_query, teacher_key = (_unit(x) for x in (query, key, teacher_query, teacher_key))
    add = partial(sum_of_rows, backend=backend)
    if group is None or sizes is None:
        loss = add(query, key, logit_scale, teacher_query, teacher_key, teacher_logit_scale, columns_too=symmetric)
        return loss / (query.shape[0] * (1 + symmetric))

    def against_all(one: Tensor, other: Tensor, teacher: Tensor, teacher_other: Tensor) -> Tensor:
        keys = gather_rows(other, sizes, group)
        teacher_keys = gather_rows_without_gradient(teacher_other.detach(), sizes, group)
        return add(one, keys, logit_scale, teacher, teacher_keys, teacher_logit_scale)

    loss = against_all(query, key, teacher_query, teacher_key)
    if symmetric:
        loss = loss + against_all(key, query, teacher_key, teacher_query)
    return sum_loss(loss / (sum(sizes) * (1 + symmetric)), group)


def _unit(rows: Tensor) -> Tensor:
    """Return unit rows in the dtype of statistics; autocast casts none of what makes them."""
    return reference.unit(rows.to(statistics_dtype(rows)))


_shapes = partial(_compiled, "portable")
register("distill_info_nce", "reference", reference.distill_info_nce, preference=-10)
register("distill_info_nce", "portable", partial(_compiled, "portable"))


def facts(query: Tensor, key: Tensor | None = None, *rest: Any, **options: Any) -> Facts:
    """Return the facts of a call with these arguments, by which its implementation is chosen; nothing is computed."""
    dtype = checks.common_dtype(query, key) or query.dtype
    return "distill_info_nce", query.device.type, {"dtype": dtype}


def distill_info_nce(
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor | float,
    teacher_query: Tensor,
    teacher_key: Tensor,
    teacher_logit_scale: Tensor | float,
    *,
    symmetric: bool = True,
    normalized: bool = False,
    group: dist.ProcessGroup | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Compute the cross-entropy of a student's contrastive logits against the softmax of a teacher's.

    With normalise(x) = x / |x|, the student's logits are logit_scale * normalise(query) @ normalise(key).T, and the
    teacher's likewise. The loss is the mean over rows of -sum_j softmax(teacher)_ij log_softmax(student)_ij or, where
    `symmetric`, the mean of that and of the same over columns. Neither matrix of logits is ever whole, except in the
    reference. Dtypes are cast by the rules of `mixup_info_nce`, for the student and for the teacher by themselves.

    Args:
        query: (N, D) float32, float16, bfloat16 or float64; at least one row over all ranks.
        key: (N, D).
        logit_scale: the student's 1 / temperature, a finite number or a floating-point tensor of shape () or (1,). It
            may take a gradient.
        teacher_query: (N, E), the teacher's rows. E need not be D. The teacher takes no gradient.
        teacher_key: (N, E).
        teacher_logit_scale: the teacher's 1 / temperature; it takes no gradient.
        symmetric: add the cross-entropy over columns.
        normalized: take the rows as they are, without a norm.
        group: compute the loss of the batch that the ranks hold together, in rank order; local N may differ. Each rank
            gathers the rows of all. Gradients are W times the derivative (W ranks), so that the mean that DDP takes is
            the gradient of a single process.
        implementation: force one by name; see `oner_fast.ops.implementations`.

    Returns:
        The loss, 0-d: float32, or float64 where a row of the student is float64.

    Raises:
        TypeError: a dtype does not fit, or an argument is no tensor.
        ValueError: a shape or device does not fit.
        RuntimeError: the forced implementation cannot run this call.
    """
    checks.is_tensor("distill_info_nce", "query", query)
    distill_checks.options(symmetric, normalized, group)
    query, key = distill_checks.same_dtype(query, key)
    teacher_query, teacher_key = distill_checks.same_dtype(teacher_query, teacher_key)
    loss: Tensor = serve(facts(query, key), implementation, query, _shapes)(
        query, key, logit_scale, teacher_query, teacher_key, teacher_logit_scale, symmetric=symmetric,
        normalized=normalized, group=group,
    )  # fmt: skip
    return loss
