"""The reference implementations of the ops in plain PyTorch: the specification of the library on one page.

Every test compares with these functions, run in float64. They keep whatever autograd keeps, so they run only when asked
for: where nothing is compiled, implementations of bounded memory serve. The ops themselves have the same names,
arguments and errors; they are in the files beside this one, one op in each.
`implementation` is accepted so that the signatures agree, and is ignored. Masks are not here: they have no
floating-point result, and stand in `oner_fast.ops.patch_masks`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from oner_fast.ops import attention_checks, attention_dropout, checks, contrast_checks, distill_checks
from oner_fast.ops.by_length import attend_by_length
from oner_fast.ops.collectives import exchanged, gather_rows, gather_rows_without_gradient, sum_loss

LEAST_NORM = 1e-12  # a shorter row has no direction


def _wide(tensor: Tensor) -> Tensor:
    """Convert to float32, or keep float64: the dtype of all statistics."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def masked_gather(
    tokens: Tensor,
    kept: Tensor,
    positions: Tensor | None = None,
    prefix: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Gather `tokens[b, kept[b, k]] + positions[kept[b, k]]` for (B, K), behind the prefix: (B, P + K, D).

    `tokens` is (B, N, D), `positions` (N, D) and `prefix` (P, D). With `cu_seqlens` (B + 1,) int32, `kept` is flat (T,)
    and the result is the pair of (T + B * P, D) and the new boundaries (B + 1,).
    """
    cu_seqlens = checks.as_int32("masked_gather", "cu_seqlens", cu_seqlens)
    checks.masked_gather(tokens, kept, positions, prefix, cu_seqlens)
    batch, cells, width = tokens.shape
    placed = tokens if positions is None else tokens + positions
    if cu_seqlens is None:
        visible = placed.gather(1, kept.unsqueeze(-1).expand(-1, -1, width))
        return visible if prefix is None else torch.cat([prefix.expand(batch, -1, -1), visible], dim=1)
    sample = _sample_of_row(cu_seqlens, kept.shape[0])
    rows = placed.reshape(batch * cells, width).index_select(0, sample * cells + kept)
    if prefix is None:
        return rows, cu_seqlens.clone()
    length = prefix.shape[0]
    arange = torch.arange(batch, device=kept.device)
    # Row t of sample b moves to t + (b + 1) P, behind the prefix rows of the samples up to its own.
    target_rows = torch.arange(kept.shape[0], device=kept.device) + (sample + 1) * length
    target_prefix = (cu_seqlens[:-1] + arange * length).unsqueeze(1) + torch.arange(length, device=kept.device)
    order = torch.cat([target_prefix.flatten(), target_rows])
    source = torch.cat([prefix.repeat(batch, 1), rows])
    cu_seqlens_out = cu_seqlens + torch.arange(batch + 1, device=kept.device, dtype=torch.int32) * length
    return source.index_select(0, torch.argsort(order)), cu_seqlens_out


def gather_patches(
    images: Tensor,
    kept: Tensor,
    patch_size: int,
    mean: Tensor | Sequence[float] | None = None,
    std: Tensor | Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise and flatten the kept patches of images (B, C, H, W): (B, K, C * patch_size**2).

    A patch is laid out as the weight of a patch convolution. uint8 images are scaled to [0, 1], others are not. Then
    (x - mean) / std is applied to each channel. With `cu_seqlens` it is ragged as in `masked_gather` without a prefix.
    """
    cu_seqlens = checks.as_int32("gather_patches", "cu_seqlens", cu_seqlens)
    checks.gather_patches(images, kept, patch_size, mean, std, dtype, cu_seqlens)
    result = dtype or (torch.float32 if images.dtype == torch.uint8 else images.dtype)
    wide = torch.float64 if torch.float64 in (images.dtype, result) else torch.float32
    pixels = images.to(wide) / 255 if images.dtype == torch.uint8 else images.to(wide)
    if mean is not None:
        pixels = pixels - torch.as_tensor(mean, dtype=wide, device=images.device).view(-1, 1, 1)
    if std is not None:
        pixels = pixels / torch.as_tensor(std, dtype=wide, device=images.device).view(-1, 1, 1)
    patches = F.unfold(pixels, patch_size, stride=patch_size).transpose(1, 2).to(result)
    return masked_gather(patches, kept, cu_seqlens=cu_seqlens)


def _sample_of_row(cu_seqlens: Tensor, rows: int) -> Tensor:
    """Return the sample that each packed row belongs to: (T,) int64."""
    index = torch.arange(rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), index, right=True)


def mixed(first: Tensor, other: Tensor | None, mix: Tensor | float) -> Tensor:
    """Compute (1 - mix) first + mix other for rows (N, D), with mix a number or (N,), in float32 or float64."""
    wide = _wide(first)
    if other is None:
        return wide
    weight = (
        mix.to(wide.dtype)
        if isinstance(mix, Tensor)
        else torch.tensor(float(mix), dtype=wide.dtype, device=first.device)
    )
    weight = weight.unsqueeze(-1) if weight.ndim else weight
    return (1 - weight) * wide + weight * _wide(other)


def unit(rows: Tensor) -> Tensor:
    """Divide rows (..., D) by their norms.

    A row has no direction where its norm is below 1e-12: it becomes a row of zeros and takes a gradient of 0. A row
    whose squares overflow becomes NaN.
    """
    squares = rows.square().sum(-1, keepdim=True)
    no_direction = squares < LEAST_NORM**2
    squares = squares.masked_fill(no_direction, 1.0).masked_fill(squares.isinf(), float("nan"))
    return (rows / squares.sqrt()).masked_fill(no_direction, 0.0)


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
    normalized: bool = False,
    logit_bias: Tensor | float | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    same: str = "positive",
    group: dist.ProcessGroup | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Compute the cross-entropy of logit_scale * q @ k.T + logit_bias (N, N) over rows and, where `symmetric`, columns.

    q and k are query and key, mixed and, unless `normalized`, made `unit` rows. The targets of row i are P[i, :], with
    P[i, i] += 1 - w_i and P[i, partner_i] += w_i. Those of column j are P[:, j] / sum_i P[i, j]; a column whose sum is
    0 adds nothing. Both means divide by N. With `group` the batch is that of all ranks, concatenated in rank order.
    The result is 0-d.

    With ids, let M[i, j] say that i = j, or that query_ids[i] = key_ids[j] and this id is not -1. `key_ids` is
    `query_ids` where it is not given. With `same="positive"`, the targets of row i are M[i, :] / sum_j M[i, j], and
    those of column j are M[:, j] / sum_i M[i, j]. With `same="ignore"`, the target is the diagonal, and a pair with
    i != j and M[i, j] leaves the sum of exponentials of its row and that of its column. Without `symmetric` there is no
    column term, as without ids. Ids and `partner` cannot be given together: both define the targets.
    """
    checks.flag("mixup_info_nce", "symmetric", symmetric)
    contrast_checks.options("mixup_info_nce", normalized, partner, query_ids, key_ids, same, group)
    query, key, query_other, key_other = contrast_checks.rows_of_one_dtype(query, key, query_other, key_other)
    if group is not None:
        contrast_checks.matrix("mixup_info_nce", "query", query)
    sizes = None
    if group is not None:
        kind = contrast_checks.kind_of_ids(query_ids, same)
        sizes, kinds = exchanged((query.shape[0], kind), query.device, group)
        contrast_checks.ids_of_ranks("mixup_info_nce", kinds)
    total = None if sizes is None else sum(sizes)
    contrast_checks.arguments(
        "mixup_info_nce", query, key, logit_scale, query_other, key_other, mix, partner, partner_weight, logit_bias,
        query_ids, key_ids, total,
    )  # fmt: skip
    with torch.autocast(query.device.type, enabled=False):
        q, k = mixed(query, query_other, mix), mixed(key, key_other, mix)
        q, k = (q, k) if normalized else (unit(q), unit(k))
        scale = logit_scale.to(q.device, q.dtype) if isinstance(logit_scale, Tensor) else float(logit_scale)
        bias = logit_bias.to(q.device, q.dtype) if isinstance(logit_bias, Tensor) else float(logit_bias or 0)
        rows = q.shape[0]
        weight = q.new_full((rows,), 0.5) if partner_weight is None else partner_weight.detach().to(q.dtype)
        if group is None or sizes is None:
            start, all_partner, all_weight = 0, partner, weight
            logits = scale * (q @ k.T) + bias  # [N, N]
            transposed = logits.T
        else:
            start = sum(sizes[: dist.get_rank(group)])
            all_partner = None if partner is None else gather_rows_without_gradient(partner, sizes, group)
            all_weight = weight if partner is None else gather_rows_without_gradient(weight, sizes, group)
            logits = scale * (q @ gather_rows(k, sizes, group).T) + bias  # [n, N]
            transposed = scale * (k @ gather_rows(q, sizes, group).T) + bias if symmetric else logits  # [n, N]
        own = torch.arange(rows, device=q.device)
        if query_ids is None:
            loss = _row_entropy(logits, own, start, partner, weight).sum()
            if symmetric:
                loss = (loss + _column_entropy(transposed, own, start, all_partner, all_weight).sum()) / 2
        else:
            ids, others = query_ids, query_ids if key_ids is None else key_ids
            all_ids, all_others = ids, others
            if group is not None and sizes is not None:
                all_ids, all_others = (gather_rows_without_gradient(x, sizes, group) for x in (ids, others))
            loss = _entropy_with_ids(logits, own + start, ids, all_others, same).sum()
            if symmetric:
                loss = (loss + _entropy_with_ids(transposed, own + start, others, all_ids, same).sum()) / 2
        loss = loss / (rows if total is None else total)
        return loss if group is None else sum_loss(loss, group)


def _entropy_with_ids(logits: Tensor, own: Tensor, ids: Tensor, others: Tensor, same: str) -> Tensor:
    """Return the cross-entropy of each row, (n,), with ids (n,) of rows and others (N,) of columns; own (n,)."""
    diagonal = own.unsqueeze(1) == torch.arange(others.shape[0], device=own.device)
    equal = (ids.unsqueeze(1) == others) & (ids != -1).unsqueeze(1)
    if same == "ignore":
        logits = logits.masked_fill(equal & ~diagonal, float("-inf"))
        return logits.logsumexp(dim=1) - logits.gather(1, own.unsqueeze(1)).squeeze(1)
    positive = equal | diagonal
    return logits.logsumexp(dim=1) - torch.where(positive, logits, 0.0).sum(1) / positive.sum(1)


def _row_entropy(logits: Tensor, own: Tensor, start: int, partner: Tensor | None, weight: Tensor) -> Tensor:
    target = logits.gather(1, (own + start).unsqueeze(1)).squeeze(1)
    if partner is not None:
        target = (1 - weight) * target + weight * logits.gather(1, partner.unsqueeze(1)).squeeze(1)
    return logits.logsumexp(dim=1) - target


def _column_entropy(transposed: Tensor, own: Tensor, start: int, partner: Tensor | None, weight: Tensor) -> Tensor:
    """Return the cross-entropy of each local column, (n,).

    `transposed` [n, N] holds the n local columns of the logits; `partner` and `weight` (N,) are those of all rows.
    """
    total = transposed.logsumexp(dim=1)
    target = transposed.gather(1, (own + start).unsqueeze(1)).squeeze(1)
    columns, rows = transposed.shape
    if partner is None or columns == 0:
        return total - target
    mine = (partner >= start) & (partner < start + columns)
    column = (partner - start).clamp(0, columns - 1)  # of a row whose partner is elsewhere any column, with share 0
    share = torch.where(mine, weight, 0.0)
    own_share = 1 - weight[start : start + columns]
    mass = own_share.index_add(0, column, share)
    chosen = transposed.flatten().gather(0, column * rows + torch.arange(rows, device=own.device))
    target = (own_share * target).index_add(0, column, torch.where(mine, share * chosen, 0.0))
    empty = mass == 0
    return torch.where(empty, 0.0, total - target / torch.where(empty, 1.0, mass))


def sigmoid_loss(
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    query_other: Tensor | None = None,
    key_other: Tensor | None = None,
    mix: Tensor | float = 0.5,
    partner: Tensor | None = None,
    partner_weight: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    same: str = "positive",
    normalized: bool = False,
    group: dist.ProcessGroup | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Compute -1/N sum_ij (T[i, j] log sigmoid(l[i, j]) + (1 - T[i, j]) log sigmoid(-l[i, j])); 0-d.

    l = logit_scale * q @ k.T + logit_bias (N, N), with q and k as in `mixup_info_nce`. The targets are T[i, i] = 1 and
    0 elsewhere. With partners, T[i, i] += -w_i and T[i, partner_i] += w_i. With ids and M[i, j] of `mixup_info_nce`,
    `same="positive"` makes T = M, and `same="ignore"` leaves out the pairs with i != j and M[i, j]. With `group` the
    batch is that of all ranks, concatenated in rank order.
    """
    op = "sigmoid_loss"
    contrast_checks.options(op, normalized, partner, query_ids, key_ids, same, group)
    query, key, query_other, key_other = contrast_checks.rows_of_one_dtype(query, key, query_other, key_other)
    sizes = None
    if group is not None:
        contrast_checks.matrix(op, "query", query)
        sizes, kinds = exchanged((query.shape[0], contrast_checks.kind_of_ids(query_ids, same)), query.device, group)
        contrast_checks.ids_of_ranks(op, kinds)
    total = None if sizes is None else sum(sizes)
    contrast_checks.arguments(
        op, query, key, logit_scale, query_other, key_other, mix, partner, partner_weight, logit_bias, query_ids,
        key_ids, total,
    )  # fmt: skip
    with torch.autocast(query.device.type, enabled=False):
        q, k = mixed(query, query_other, mix), mixed(key, key_other, mix)
        q, k = (q, k) if normalized else (unit(q), unit(k))
        scale = logit_scale.to(q.device, q.dtype) if isinstance(logit_scale, Tensor) else float(logit_scale)
        bias = logit_bias.to(q.device, q.dtype) if isinstance(logit_bias, Tensor) else float(logit_bias or 0)
        rows, start, ids = q.shape[0], 0, query_ids if key_ids is None else key_ids
        if group is not None and sizes is not None:
            start, k = sum(sizes[: dist.get_rank(group)]), gather_rows(k, sizes, group)
            ids = None if ids is None else gather_rows_without_gradient(ids, sizes, group)
        logits = scale * (q @ k.T) + bias  # [n, N]
        own = torch.arange(rows, device=q.device) + start
        diagonal = own.unsqueeze(1) == torch.arange(k.shape[0], device=q.device)
        target, ignored = diagonal.to(q.dtype), None
        if partner is not None:
            weight = q.new_full((rows,), 0.5) if partner_weight is None else partner_weight.detach().to(q.dtype)
            shared = torch.zeros_like(target).scatter(1, partner.unsqueeze(1), weight.unsqueeze(1))
            target = target * (1 - weight).unsqueeze(1) + shared
        elif query_ids is not None and ids is not None:
            equal = (query_ids.unsqueeze(1) == ids) & (query_ids != -1).unsqueeze(1)
            if same == "positive":
                target = (equal | diagonal).to(q.dtype)
            else:
                ignored = equal & ~diagonal
        terms = -(target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits))
        terms = terms if ignored is None else terms.masked_fill(ignored, 0.0)
        loss = terms.sum() / (rows if total is None else total)
        return loss if group is None else sum_loss(loss, group)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | int | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Compute softmax(scale Q K^T) V, where sequence i of the query attends to sequence i of the key: (T, H, Dh).

    A causal mask aligns both sequences at their ends. A query that sees no key gives 0 and takes no gradient. Weights
    are dropped after the softmax, as `oner_fast.ops.attention_dropout` says.
    """
    attention_checks.varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, scale)
    seed = attention_dropout.seed_of("varlen_attention", dropout_p, dropout_seed, query)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)

    def attend(q: Tensor, k: Tensor, v: Tensor, sequences: tuple[int, ...]) -> Tensor:
        """Attend within n sequences of one length: q (n, H, Lq, Dh), k and v (n, Hk, Lk, Dh)."""
        lq, lk = q.shape[2], k.shape[2]
        seen = torch.ones(lq, lk, dtype=torch.bool, device=q.device).tril(lk - lq) if causal else None
        kept = None
        if seed is not None:
            numbers = torch.tensor(sequences, device=q.device)
            places = torch.arange(lq, device=q.device)
            kept = attention_dropout.kept(
                seed, attention_dropout.level(dropout_p), numbers, q.shape[1], places, lk
            )  # fmt: skip
        return _attend(q, k, v, seen, kept, scale, dropout_p)

    with torch.autocast(query.device.type, enabled=False):
        result = attend_by_length(attend, _wide(query), _wide(key), _wide(value), cu_seqlens_q, cu_seqlens_k)
    return result.to(query.dtype)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, kept: Tensor | None, scale: float, dropout_p: float
) -> Tensor:
    """Attend with q (n, H, Lq, Dh), k and v (n, Hk, Lk, Dh); `seen` and `kept` broadcast to (n, H, Lq, Lk)."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = (q * scale) @ k.transpose(-1, -2)  # [n, H, Lq, Lk]
    blind = None
    if seen is not None:
        blind = ~seen.any(dim=-1, keepdim=True)
        scores = scores.masked_fill(~(seen | blind), float("-inf"))
    weights = scores.softmax(dim=-1)
    if kept is not None:
        weights = (weights * attention_dropout.made_up(attention_dropout.level(dropout_p))).masked_fill(~kept, 0.0)
    out = weights @ v
    return out if blind is None else out.masked_fill(blind, 0.0)


def padded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | int | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Compute softmax(scale Q K^T) V for (B, H, N, Dh) over the keys (B, Hk, Nk, Dh) that are no padding.

    A key is attended to where its place is below its sample's number of `key_lengths` (B,), or where `key_mask` (B, Nk)
    is True. A causal mask aligns N queries and Nk keys at their ends, padding included. A query that sees no key gives
    0 and takes no gradient; what padding holds changes nothing. Weights are dropped as in `varlen_attention`, where the
    sample is the sequence and only keys that are no padding are counted.
    """
    attention_checks.padded(query, key, value, key_lengths, key_mask, scale)
    seed = attention_dropout.seed_of("padded_attention", dropout_p, dropout_seed, query)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    (batch, heads, rows, _), keys = query.shape, key.shape[2]
    if key_lengths is not None:
        key_mask = torch.arange(keys, device=key.device) < key_lengths.unsqueeze(1)
    real = torch.ones(batch, keys, dtype=torch.bool, device=key.device) if key_mask is None else key_mask
    seen = real.view(batch, 1, 1, keys).expand(-1, 1, rows, -1)
    if causal:
        seen = seen & torch.ones(rows, keys, dtype=torch.bool, device=key.device).tril(keys - rows)
    kept = None
    if seed is not None:
        numbers, places = torch.arange(batch, device=key.device), torch.arange(rows, device=key.device)
        kept = attention_dropout.kept(seed, attention_dropout.level(dropout_p), numbers, heads, places, keys)
        place = (real.cumsum(1) - 1).clamp(min=0)  # among the sample's keys that are no padding
        kept = kept.gather(3, place.view(batch, 1, 1, keys).expand(-1, heads, rows, -1))
    with torch.autocast(query.device.type, enabled=False):
        unreal = ~real.view(batch, 1, keys, 1)
        k, v = _wide(key).masked_fill(unreal, 0.0), _wide(value).masked_fill(unreal, 0.0)
        result = _attend(_wide(query), k, v, seen, kept, scale, dropout_p)
    return result.to(query.dtype)


def token_alignment(
    student: Tensor, teacher: Tensor, kept: Tensor | None = None, *, implementation: str | None = None
) -> Tensor:
    """Compute minus the mean cosine of student (B, K, D) and teacher (B, N, D) at kept (B, K); 0-d.

    The cosine is that of `unit` rows. The teacher takes no gradient.
    """
    checks.token_alignment(student, teacher, kept)
    with torch.autocast(student.device.type, enabled=False):
        target = teacher.detach()
        if kept is not None:
            target = target.gather(1, kept.unsqueeze(-1).expand(-1, -1, student.shape[-1]))
        wide = torch.float64 if student.dtype == torch.float64 else torch.float32
        student, target = student.to(wide), target.to(wide)
        return -(unit(student) * unit(target)).sum(-1).mean()


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
    """Compute the cross-entropy of the student's logits (N, N) against the teacher's softmax; over columns too.

    The student's logits are logit_scale * q @ k.T, where q and k are query and key, made `unit` rows unless
    `normalized`. The teacher's likewise. The loss is the mean over rows of -sum_j softmax(teacher)_ij
    log_softmax(student)_ij or, where `symmetric`, the mean of that and of the same over columns. The teacher takes no
    gradient. With `group` the batch is that of all ranks, concatenated in rank order. The result is 0-d.
    """
    distill_checks.options(symmetric, normalized, group)
    query, key = distill_checks.same_dtype(query, key)
    teacher_query, teacher_key = distill_checks.same_dtype(teacher_query, teacher_key)
    sizes = None
    if group is not None:
        contrast_checks.matrix("distill_info_nce", "query", query)
        (sizes,) = exchanged((query.shape[0],), query.device, group)
    total = None if sizes is None else sum(sizes)
    distill_checks.arguments(query, key, logit_scale, teacher_query, teacher_key, teacher_logit_scale, total)
    with torch.autocast(query.device.type, enabled=False):
        student = [_wide(x) if normalized else unit(_wide(x)) for x in (query, key)]
        teacher = [x.detach().to(student[0].dtype) for x in (teacher_query, teacher_key)]
        teacher = teacher if normalized else [unit(x) for x in teacher]
        scale, teacher_scale = (
            x.to(query.device, student[0].dtype) if isinstance(x, Tensor) else float(x)
            for x in (logit_scale, teacher_logit_scale)
        )
        losses = []
        for one, other in ((0, 1), (1, 0)) if symmetric else ((0, 1),):
            keys, teacher_keys = student[other], teacher[other]
            if group is not None and sizes is not None:
                keys = gather_rows(keys, sizes, group)
                teacher_keys = gather_rows_without_gradient(teacher_keys, sizes, group)
            wanted = (teacher_scale * (teacher[one] @ teacher_keys.T)).detach().softmax(dim=1)  # [n, N]
            found = (scale * (student[one] @ keys.T)).log_softmax(dim=1)
            losses.append(-(wanted * found).sum())
        loss = sum(losses[1:], losses[0]) / (len(losses) * (query.shape[0] if total is None else total))
        return loss if group is None else sum_loss(loss, group)
