"""Mixup-contrastive InfoNCE: the loss of ITC, XMC, CIC and CMC (OneR, section 3), and of CLIP."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from oner_fast.ops import checks, reference
from oner_fast.ops.collectives import gather_rows_without_gradient, row_counts_and_any
from oner_fast.ops.implementations import choose, register
from oner_fast.ops.library import define, raw_ops, statistics_dtype, why_not_triton

_SIDE = "Tensor {0}, Tensor? {0}_other, Tensor? {0}_mix, "


@define("mixup_inverse_norms(Tensor x, Tensor? other, Tensor? mix) -> Tensor", triton="mixup_info_nce.inverse_norms")
def _inverse_norms_shape(x: Tensor, other: Tensor | None, mix: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], dtype=statistics_dtype(x))


@define(
    "mixup_info_nce_statistics("
    + _SIDE.format("query")
    + "Tensor query_inverse_norm, "
    + _SIDE.format("key")
    + "Tensor? key_inverse_norm, Tensor logit_scale, Tensor? partner, SymInt first_pair, bool columns_too) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    triton="mixup_info_nce.statistics",
)
def _statistics_shape(
    query: Tensor,
    query_other: Tensor | None,
    query_mix: Tensor | None,
    query_inverse_norm: Tensor,
    key: Tensor,
    key_other: Tensor | None,
    key_mix: Tensor | None,
    key_inverse_norm: Tensor | None,
    logit_scale: Tensor,
    partner: Tensor | None,
    first_pair: int,
    columns_too: bool,
) -> tuple[Tensor, ...]:
    rows, columns = query.shape[0], key.shape[0] if columns_too else 0
    sizes = (rows, rows, columns, columns, rows, 0 if partner is None else rows)
    return tuple(query.new_empty(size, dtype=statistics_dtype(query)) for size in sizes)


@define(
    "mixup_info_nce_backward("
    + _SIDE.format("query")
    + "Tensor query_inverse_norm, "
    + _SIDE.format("key")
    + "Tensor? key_inverse_norm, Tensor logit_scale, Tensor? partner, SymInt first_pair, Tensor row_max, "
    "Tensor row_weight, Tensor? column_max, Tensor? column_weight, Tensor own_weight, Tensor? partner_weight, "
    "bool need_key) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    triton="mixup_info_nce.backward",
    atomic="mixup_info_nce.backward_with_atomics",
)
def _backward_shape(
    query: Tensor,
    query_other: Tensor | None,
    query_mix: Tensor | None,
    query_inverse_norm: Tensor,
    key: Tensor,
    key_other: Tensor | None,
    key_mix: Tensor | None,
    key_inverse_norm: Tensor | None,
    logit_scale: Tensor,
    partner: Tensor | None,
    first_pair: int,
    row_max: Tensor,
    row_weight: Tensor,
    column_max: Tensor | None,
    column_weight: Tensor | None,
    own_weight: Tensor,
    partner_weight: Tensor | None,
    need_key: bool,
) -> tuple[Tensor, ...]:
    def side(x: Tensor, other: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
        one_a_row = x.new_empty(0 if other is None else x.shape[0], dtype=wide)
        return [
            torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format),
            torch.empty_like(x, memory_format=torch.contiguous_format) if other is not None else x.new_empty(0),
            one_a_row,
        ]

    wide = statistics_dtype(query)
    keys = [query.new_empty(0, dtype=wide) for _ in range(3)]
    if need_key:
        keys = side(key, key_other, wide if key_inverse_norm is None else key.dtype)
    return (*side(query, query_other, query.dtype), *keys, query.new_empty((), dtype=wide))


@define(
    "mixup_partner_sums(Tensor partner, Tensor values, SymInt columns) -> Tensor", triton="mixup_info_nce.partner_sums"
)
def _partner_sums_shape(partner: Tensor, values: Tensor, columns: int) -> Tensor:
    return values.new_empty(columns)


def _partner_sums(backend: str, partner: Tensor, values: Tensor, columns: int) -> Tensor:
    """(columns,): the sum of the values (n,) whose partner (n,) is that column, in a fixed order."""
    if backend == "cpp":
        return values.new_zeros(columns).index_add(0, partner, values)
    return raw_ops(backend).mixup_partner_sums(partner, values, columns)


@dataclass(frozen=True)
class _Targets:
    """The targets of rows and columns: row i has 1 - weight_i on its own pair and weight_i on its partner."""

    weight: Tensor | None  # (n,) of the local rows; None: all on the own pair
    mass: Tensor | None  # (N,) sum of the targets of each column; None: 1
    backend: str

    def of_rows(self, own: Tensor, shared: Tensor) -> Tensor:
        return own if self.weight is None else (1 - self.weight) * own + self.weight * shared

    def of_columns(self, own: Tensor, shared: Tensor, partner: Tensor | None, first: int, columns: int) -> Tensor:
        """(N,): what the local rows add to each column's mean logit of its targets."""
        total = own.new_zeros(columns)
        if self.weight is None or self.mass is None or partner is None:
            total[first : first + own.shape[0]] = own
            return total
        total[first : first + own.shape[0]] = (1 - self.weight) * own
        return (total + _partner_sums(self.backend, partner, self.weight * shared, columns)) * self.share_of_column()

    def share_of_column(self) -> Tensor:
        """1 / mass, 0 where a column has no target."""
        assert self.mass is not None
        return torch.where(self.mass == 0, 0.0, 1 / self.mass)


def _targets(
    partner: Tensor | None,
    weight: Tensor | None,
    dtype: torch.dtype,
    rows: int,
    sizes: tuple[int, ...] | None,
    group: dist.ProcessGroup | None,
    first: int,
    backend: str,
) -> _Targets:
    if partner is None:
        return _Targets(None, None, backend)
    own = torch.full((rows,), 0.5, dtype=dtype, device=partner.device) if weight is None else weight.detach().to(dtype)
    every_partner, every_weight = partner, own
    if group is not None and sizes is not None:
        every_partner = gather_rows_without_gradient(partner, sizes, group)
        every_weight = gather_rows_without_gradient(own, sizes, group)
    shared = _partner_sums(backend, every_partner, every_weight, every_weight.shape[0])
    return _Targets(own, 1 - every_weight + shared, backend)


def _columns_of_all_ranks(
    maximum: Tensor, total: Tensor, target: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum, sum of exp(logit - maximum) and mean target logit of each column over the rows of all ranks."""
    highest = maximum.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack([total * (maximum - highest).exp(), target])
    dist.all_reduce(sums, group=group)
    return highest, sums[0], sums[1]


class _MixupInfoNce(torch.autograd.Function):
    """Saves the inputs and O(N) statistics; the logits are made again in backward."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        key: Tensor,
        logit_scale: Tensor,
        query_other: Tensor | None,
        key_other: Tensor | None,
        mix: Tensor,
        partner: Tensor | None,
        partner_weight: Tensor | None,
        symmetric: bool,
        sizes: tuple[int, ...] | None,
        group: dist.ProcessGroup | None,
        keys_wanted: bool,
        backend: str,
    ) -> Tensor:
        raw = raw_ops(backend)
        rows, dtype = query.shape[0], statistics_dtype(query)
        first = 0 if group is None or sizes is None else sum(sizes[: dist.get_rank(group)])
        total = rows if sizes is None else sum(sizes)
        query_side = (query, query_other, mix, raw.mixup_inverse_norms(query, query_other, mix))
        key_norm = raw.mixup_inverse_norms(key, key_other, mix)
        key_side: tuple[Tensor | None, ...] = (key, key_other, mix, key_norm)
        if group is not None and sizes is not None:
            key_side = (_all_unit_keys(key, key_other, mix, key_norm, sizes, group), None, None, None)
        row_max, row_sum, column_max, column_sum, own, shared = raw.mixup_info_nce_statistics(
            *query_side, *key_side, logit_scale, partner, first, symmetric
        )
        targets = _targets(partner, partner_weight, dtype, rows, sizes, group, first, backend)
        # Summed in float64, so that no order of the sum shows in float32.
        loss = (row_max - targets.of_rows(own, shared) + row_sum.log()).sum(dtype=torch.float64)
        if symmetric:
            target = targets.of_columns(own, shared, partner, first, total)
            if group is not None:
                column_max, column_sum, target = _columns_of_all_ranks(column_max, column_sum, target, group)
            entropy = column_max - target + column_sum.log()
            if targets.mass is not None:
                entropy = torch.where(targets.mass == 0, 0.0, entropy)
            loss = (loss + entropy[first : first + rows].sum(dtype=torch.float64)) / 2
        if group is not None:
            dist.all_reduce(loss, group=group)
        columns = (column_max, column_sum) if symmetric else (None, None)
        ctx.save_for_backward(
            *query_side, key, key_other, key_norm, logit_scale, partner, row_max, row_sum, *columns,
            targets.weight, targets.mass,
        )  # fmt: skip
        ctx.sizes, ctx.group, ctx.first, ctx.total, ctx.keys_wanted = sizes, group, first, total, keys_wanted
        ctx.backend = backend
        return (loss / total).to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (
            query, query_other, mix, query_norm, key, key_other, key_norm, logit_scale, partner, row_max, row_sum,
            column_max, column_sum, weight, mass,
        ) = ctx.saved_tensors  # fmt: skip
        sizes, group, first, total = ctx.sizes, ctx.group, ctx.first, ctx.total
        need_key = any(ctx.needs_input_grad[i] for i in (1, 4)) or (ctx.needs_input_grad[5] and key_other is not None)
        key_side: tuple[Tensor | None, ...] = (key, key_other, mix, key_norm)
        need_unit_keys = need_key
        if group is not None:
            key_side = (_all_unit_keys(key, key_other, mix, key_norm, sizes, group), None, None, None)
            need_unit_keys = ctx.keys_wanted  # where any rank needs them, all take part in the exchange
        world = 1 if group is None else dist.get_world_size(group)
        each = grad.to(row_sum.dtype) * world / (total if column_sum is None else 2 * total)
        own_weight, partner_weight, column_weight = _weights(
            each, _Targets(weight, mass, ctx.backend), partner, column_sum, first, query.shape[0]
        )
        to_query, to_query_other, to_mix, to_key, to_key_other, to_key_mix, to_scale = (
            raw_ops(ctx.backend).mixup_info_nce_backward(
                query, query_other, mix, query_norm, *key_side, logit_scale, partner, first,
                row_max, each / row_sum, column_max, column_weight, own_weight, partner_weight, need_unit_keys,
            )
        )  # fmt: skip
        if group is not None and ctx.keys_wanted:
            dist.all_reduce(to_key, group=group)
            if need_key:
                to_key, to_key_other, to_key_mix = _through_normalisation(
                    to_key[first : first + key.shape[0]], key, key_other, mix, key_norm
                )
        gradient_of_mix = None
        if ctx.needs_input_grad[5]:
            parts = [x for x, other in ((to_mix, query_other), (to_key_mix, key_other)) if other is not None]
            each_row = torch.stack(parts).sum(0) if parts else torch.zeros_like(query_norm)
            gradient_of_mix = (each_row if mix.ndim else each_row.sum()).to(mix.dtype)
        need = ctx.needs_input_grad
        return (
            to_query if need[0] else None,
            to_key if need[1] else None,
            to_scale.to(logit_scale.dtype) if need[2] else None,
            to_query_other if need[3] else None,
            to_key_other if need[4] else None,
            gradient_of_mix,
            *(None,) * 7,
        )


def _weights(
    each: Tensor, targets: _Targets, partner: Tensor | None, column_sum: Tensor | None, first: int, rows: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What the gradient with respect to the logits takes from targets, and the weight of a column's exponentials."""
    share = None
    column_weight = None if column_sum is None else each / column_sum
    if targets.mass is not None and column_weight is not None:
        column_weight = torch.where(targets.mass == 0, 0.0, column_weight)
        share = targets.share_of_column()
    both = 1.0 if column_sum is None else 2.0
    if targets.weight is None or partner is None:
        return (each * both).expand(rows).contiguous(), None, column_weight
    own_share = 1.0 if share is None else 1 + share[first : first + rows]
    partner_share = 1.0 if share is None else 1 + share.index_select(0, partner)
    return each * (1 - targets.weight) * own_share, each * targets.weight * partner_share, column_weight


def _all_unit_keys(
    key: Tensor,
    other: Tensor | None,
    mix: Tensor,
    inverse_norm: Tensor,
    sizes: tuple[int, ...],
    group: dist.ProcessGroup,
) -> Tensor:
    """(N, D) unit vectors of all ranks, in the keys' dtype."""
    mixed = reference.mixed(key, other, mix)
    return gather_rows_without_gradient((mixed * inverse_norm.unsqueeze(1)).to(key.dtype), sizes, group)


def _through_normalisation(
    gradient: Tensor, key: Tensor, other: Tensor | None, mix: Tensor, inverse_norm: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """From the gradient to this rank's unit keys to those of key, key_other and each row's mix."""
    mixed, inverse = reference.mixed(key, other, mix), inverse_norm.unsqueeze(1)
    along = torch.where(inverse >= 1e12, 0.0, inverse * inverse * (gradient * mixed).sum(1, keepdim=True))
    inner = inverse * (gradient - along * mixed)
    if other is None:
        return inner.to(key.dtype), None, None
    share = mix.unsqueeze(-1) if mix.ndim else mix
    to_mix = (inner * (other.to(inner.dtype) - key.to(inner.dtype))).sum(1)
    return ((1 - share) * inner).to(key.dtype), (share * inner).to(key.dtype), to_mix


def _compiled(
    backend: str,
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor | float,
    *,
    query_other: Tensor | None,
    key_other: Tensor | None,
    mix: Tensor | float,
    partner: Tensor | None,
    partner_weight: Tensor | None,
    symmetric: bool,
    group: dist.ProcessGroup | None,
) -> Tensor:
    sizes, keys_wanted = None, False
    if group is not None:
        own = (key, *(() if key_other is None else (key_other, mix)))
        wanted = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in own)
        sizes, keys_wanted = row_counts_and_any(query.shape[0], wanted, query.device, group)
    total = None if sizes is None else sum(sizes)
    checks.mixup_info_nce(query, key, logit_scale, query_other, key_other, mix, partner, partner_weight, total)
    dtype = statistics_dtype(query)
    scale = logit_scale if isinstance(logit_scale, Tensor) else _number(logit_scale, torch.float64, query.device)
    share = mix.to(dtype) if isinstance(mix, Tensor) else _number(mix, dtype, query.device)
    loss: Tensor = _MixupInfoNce.apply(
        query, key, scale, query_other, key_other, share, partner, partner_weight, symmetric, sizes, group, keys_wanted,
        backend,
    )  # fmt: skip
    return loss


def _number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0-d, written by a kernel on its device: a copy from the host would wait for it."""
    return torch.full((), value, dtype=dtype, device=device)


register("mixup_info_nce", "reference", reference.mixup_info_nce)
register("mixup_info_nce", "cpp", partial(_compiled, "cpp"), devices=("cpu",), preference=100, compiled=True)


def _why_not_triton(device: str, **facts: Any) -> list[str]:
    found = why_not_triton(device, **facts)
    if facts.get("dtype") == torch.float64:
        found.append("the Triton kernels have float32 statistics and no float64 products")
    return found


def _why_not_atomic(device: str, **facts: Any) -> list[str]:
    found = _why_not_triton(device, **facts)
    if torch.are_deterministic_algorithms_enabled():
        found.append("it adds atomically, in no fixed order, and torch.use_deterministic_algorithms(True) is set")
    return found


register(
    "mixup_info_nce", "triton", partial(_compiled, "triton"), devices=("cuda",), on_request=("cpu",), preference=50,
    reasons=_why_not_triton,
)  # fmt: skip
register(
    "mixup_info_nce", "triton_atomic", partial(_compiled, "triton_atomic"), devices=("cuda",), on_request=("cpu",),
    preference=-1, reasons=_why_not_atomic,
)  # fmt: skip


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
