"""varlen_attention: flash attention forward over packed sequences, and the functions that backward shares.

A program owns one tile of BLOCK_M queries of one sequence and head, and finds its sequence on the device (see
`attention_rows`). `padded_attention` launches the same kernels for sequences that are padded.

FLOPs for each head: 4 Lq Lk Dh, about half of it under a causal mask, which skips whole tiles. Bytes from DRAM: Q, K, V
and the result once, and 8 bytes of statistics for each query and head. Each tile of queries reads K and V of its
sequence, from L2 after the first. The head dimension is split into one or two powers of two (80 = 64 + 16, 88 and
96 = 64 + 32, where 88 multiplies 8 zeros).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from oner_fast.kernels.attention_dropout import kept
from oner_fast.kernels.attention_rows import head_of, input_of, keys_of, load_tile, offsets_of, store_tile, tile_of
from oner_fast.kernels.launch import Compilation, Configuration, architecture_of, configuration, triton_type

OP = "varlen_attention"
_SMALLEST = 2.0**-126
_LARGEST_TILE = 128
_LEVELS = 1 << 16
# Sizes differ from batch to batch, so no kernel is specialised for one that is 1 or a multiple of 16.
SIZES = ["sequences", "queries", "keys", "heads", "dropped"]
STRIDES = [f"{x}_{axis}" for x in ("grad", "out", "query", "key", "value") for axis in ("row", "head", "batch")]


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def forward_kernel(
    query, key, value, out, statistics, cu_seqlens_q, cu_seqlens_k, seen, seed, sequences, queries, keys, heads,
    scale_log2, dropped, made_up,
    query_row, query_head, query_batch, key_row, key_head, key_batch, value_row, value_head, value_batch,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, VEC: tl.constexpr, CAUSAL: tl.constexpr,
    NEGATIVE: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attend. `seen` counts the keys of padded sequences, and of each of their queries under a causal mask."""
    sequence, begin, length, first = tile_of(tl.program_id(0), cu_seqlens_q, sequences, queries, BLOCK_M, PADDED)
    if (first < 0) | (first >= length):
        return
    head = tl.program_id(1)
    begin_k, length_k = keys_of(cu_seqlens_k, seen, sequence, queries, keys, PADDED, CAUSAL)
    rows = first + tl.arange(0, BLOCK_M)
    own = rows < length
    offset = length_k - length  # under a causal mask, query i sees the keys up to i + offset

    q = input_of(query, sequence, begin, first, query_row, head, query_head, query_batch, VEC, PADDED)
    k = input_of(key, sequence, begin_k, 0, key_row, head // GROUP, key_head, key_batch, VEC, PADDED)
    v = input_of(value, sequence, begin_k, 0, value_row, head // GROUP, value_head, value_batch, VEC, PADDED)
    q0 = load_tile(q + offsets_of(query_row, BLOCK_M, D0, VEC), own, 0, D0, HEAD_DIM)
    k0_at, v0_at = offsets_of(key_row, BLOCK_N, D0, VEC), offsets_of(value_row, BLOCK_N, D0, VEC)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    if D1 > 0:
        q1 = load_tile(q + offsets_of(query_row, BLOCK_M, D1, VEC), own, D0, D1, HEAD_DIM)
        k1_at, v1_at = offsets_of(key_row, BLOCK_N, D1, VEC), offsets_of(value_row, BLOCK_N, D1, VEC)
        acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    until = length_k
    last = length_k - 1
    if CAUSAL:
        if PADDED:
            counts = tl.minimum(tl.load(seen + begin.to(tl.int64) + rows, mask=own, other=0), length_k)
            until = tl.max(counts, 0)
            last = (counts - 1)[:, None]
        else:
            until = tl.minimum(first + BLOCK_M + offset, length_k)
            last = tl.minimum(rows + offset, last)[:, None]
    for start in range(0, until, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        real = columns < length_k
        k0 = load_tile(k + k0_at, real, 0, D0, HEAD_DIM)
        scores = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if D1 > 0:
            k1 = load_tile(k + k1_at, real, D0, D1, HEAD_DIM)
            scores = tl.dot(q1, tl.trans(k1), scores, input_precision=PRECISION)
        v0 = load_tile(v + v0_at, real, 0, D0, HEAD_DIM)
        scores = tl.where(columns[None, :] <= last, scores, float("inf") if NEGATIVE else float("-inf"))
        largest = tl.min(scores, 1) if NEGATIVE else tl.max(scores, 1)
        larger = tl.maximum(maximum, largest * scale_log2)
        base = tl.where(larger == float("-inf"), 0.0, larger)
        weights = tl.math.exp2(scores * scale_log2 - base[:, None])
        shrink = tl.math.exp2(maximum - base)
        total = total * shrink + tl.sum(weights, 1)
        if seed is not None:
            weights = tl.where(kept(seed, sequence, head, rows, start, dropped, BLOCK_N), weights, 0.0)
        narrow = weights.to(v0.dtype)
        acc0 = tl.dot(narrow, v0, acc0 * shrink[:, None], input_precision=PRECISION)
        if D1 > 0:
            v1 = load_tile(v + v1_at, real, D0, D1, HEAD_DIM)
            acc1 = tl.dot(narrow, v1, acc1 * shrink[:, None], input_precision=PRECISION)
        k += BLOCK_N * VEC * key_row.to(tl.int64)
        v += BLOCK_N * VEC * value_row.to(tl.int64)
        maximum = larger

    blind = (rows + offset < 0) if CAUSAL else (rows < 0)
    if PADDED:
        blind = (counts <= 0) if CAUSAL else (rows < 0)
    blind = blind | (length_k == 0)
    inverse = tl.where(blind, 0.0, 1.0 / total)
    at = (begin + rows).to(tl.int64) * heads + head
    every = queries
    if PADDED:
        every = queries * sequences
    tl.store(statistics + at, tl.where(blind, 0.0, maximum), mask=own)
    tl.store(statistics + at + every.to(tl.int64) * heads, inverse, mask=own)
    if seed is not None:
        inverse = inverse * made_up
    row = heads * HEAD_DIM
    o = head_of(out, begin + first, row, head, HEAD_DIM, 1)
    blind, inverse = blind[:, None], inverse[:, None]
    store_tile(o + offsets_of(row, BLOCK_M, D0, 1), tl.where(blind, 0.0, acc0 * inverse), own, 0, D0, HEAD_DIM)
    if D1 > 0:
        store_tile(o + offsets_of(row, BLOCK_M, D1, 1), tl.where(blind, 0.0, acc1 * inverse), own, D0, D1, HEAD_DIM)


def head_blocks(head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Split the head dimension: one power of two that holds it, or two where they pad less; the second may be 0."""
    least = 32 if dtype == torch.float32 else 16  # products of 16 float32 numbers are unrolled into spills
    whole = max(16, triton.next_power_of_2(head_dim))
    if whole == head_dim or whole == 16:
        return whole, 0
    rest = max(least, triton.next_power_of_2(head_dim - whole // 2))
    return (whole // 2, rest) if rest < whole // 2 else (whole, 0)


def tiles(
    kernel: str, head_dim: int, dtype: torch.dtype, architecture: int, *, drops: bool = False
) -> Configuration:  # fmt: skip
    """Return the committed tile of a kernel for a head dimension and dtype; one that `drops` weights has its own."""
    numbers = sum(head_blocks(head_dim, dtype))
    limit = next(size for size in ((64, 128, 256) if drops else (32, 64, 80, 96, 128, 256)) if size >= numbers)
    wide = "_fp32" if dtype == torch.float32 else ""
    return configuration(OP, f"{kernel}_dropout" if drops else kernel, f"head_dim_{limit}{wide}", architecture)


def constants(head_dim: int, dtype: torch.dtype, causal: bool, vector: int, group: int) -> dict[str, Any]:
    """Return the constexpr arguments that the kernels share."""
    d0, d1 = head_blocks(head_dim, dtype)
    # Six bfloat16 products cost as much as three tf32 products and err half as much, as little as float32 itself. They
    # need more registers, which rows of more than 64 numbers leave no room for. The interpreter has tf32x3 alone.
    thirds = d0 + d1 <= 64 and not triton.knobs.runtime.interpret
    precision = "tf32" if dtype != torch.float32 else "bf16x6" if thirds else "tf32x3"
    return {
        "HEAD_DIM": head_dim, "D0": d0, "D1": d1, "VEC": vector, "CAUSAL": causal, "PRECISION": precision,
        "GROUP": group,
    }  # fmt: skip


def dense(x: Tensor) -> Tensor:
    """Return x, or a contiguous copy where the kernels cannot read it.

    The kernels load a row as vectors, so its numbers must be adjacent. Offsets within a tile have 32 bits.
    """
    apart = x.stride(-1) != 1 and x.shape[-1] > 1
    return x.contiguous() if apart or x.stride(-3) * _LARGEST_TILE >= 2**31 else x


def vector_of(*tensors: Tensor) -> int:
    """Return how many numbers 16 bytes hold if all rows, heads and sequences start at multiples of 16 bytes, else 1."""
    size = 16 // tensors[0].element_size()
    return size if all(stride % size == 0 for x in tensors for stride in x.stride()[:-1]) else 1


def strides(x: Tensor, vector: int, *, padded: bool = False) -> tuple[int, int, int]:
    """Return the strides of rows, of heads and, of `padded` (B, N, H, Dh), of sequences, in vectors of `vector`."""
    first = 1 if padded else 0
    return x.stride(first) // vector, x.stride(first + 1) // vector, x.stride(0) // vector if padded else 0


def draws(dropped: int, seed: Tensor | None) -> tuple[Tensor | None, int, float]:
    """Return the arguments of kernels that drop weights: the seed, None without, the level, and the factor of others.

    As in `oner_fast.ops.attention_dropout`, `dropped` of 65536 draws drop a weight.
    """
    return (seed, dropped, _LEVELS / (_LEVELS - dropped)) if dropped else (None, 0, 1.0)


def boundaries(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return contiguous boundaries of both sides; raise ValueError unless they have equally many sequences."""
    cu_q = cu_seqlens_q.contiguous()
    cu_k = cu_q if cu_seqlens_k is None else cu_seqlens_k.contiguous()
    if cu_q.shape != cu_k.shape:
        raise ValueError(f"{OP}: cu_seqlens_k must have shape {tuple(cu_q.shape)}, got {tuple(cu_k.shape)}")
    return cu_q, cu_k


def log2_scale(scale: float) -> float:
    """Return the scale of scores in base 2, never 0, so that masked scores stay infinite."""
    return scale / math.log(2) or _SMALLEST


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float,
    dropped: int = 0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the result (T, H, Dh) and float32 statistics (2, T, H): the largest score in base 2 and 1 / sum."""
    rows, heads, head_dim = query.shape
    out = query.new_empty(query.shape)
    statistics = query.new_empty((2, rows, heads), dtype=torch.float32)
    if out.numel() == 0 or cu_seqlens_q.shape[0] == 1:
        return out.zero_(), statistics.zero_()
    query, key, value = dense(query), dense(key), dense(value)
    cu_q, cu_k = boundaries(cu_seqlens_q, cu_seqlens_k)
    vector = vector_of(query, key, value)
    tile = tiles("forward", head_dim, query.dtype, architecture_of(query), drops=dropped > 0)
    sequences = cu_q.shape[0] - 1
    seed, *rate = draws(dropped, dropout_seed)
    forward_kernel[(rows // tile.blocks["BLOCK_M"] + sequences, heads)](
        query, key, value, out, statistics, cu_q, cu_k, None, seed, sequences, rows, key.shape[0], heads,
        log2_scale(scale), *rate, *strides(query, vector), *strides(key, vector), *strides(value, vector),
        NEGATIVE=scale < 0, PADDED=False, **constants(head_dim, query.dtype, causal, vector, heads // key.shape[1]),
        **tile.launch,
    )  # fmt: skip
    return out, statistics


def argument_types(names: list[str], dtype: torch.dtype) -> dict[str, str]:
    """Return the types of a kernel's arguments by their names."""
    narrow, types = f"*{triton_type(dtype)}", {}
    for name in names:
        if name in ("statistics", "numbers"):
            types[name] = "*fp32"
        elif name.startswith("cu_seqlens") or name == "seen":
            types[name] = "*i32"
        elif name == "seed":
            types[name] = "*i64"
        elif name.startswith("scale") or name == "made_up":
            types[name] = "fp32"
        elif name in SIZES or name in STRIDES:
            types[name] = "i32"
        elif name.islower():
            types[name] = narrow
    return types


def compilation(
    kernel: Any, name: str, head_dim: int, dtype: torch.dtype, causal: bool, *, drops: bool = False,
    padded: bool = False, **more: Any,
) -> Compilation:  # fmt: skip
    """Return the kernel as a launch specialises it for rows that start at multiples of 16 bytes.

    A kernel that is not `padded` has no `seen`, one that is has no boundaries, and one that does not drop has no seed.
    """
    tile = tiles(name, head_dim, dtype, 80, drops=drops)
    absent = dict.fromkeys(["cu_seqlens_q", "cu_seqlens_k"] if padded else ["seen"])
    absent |= {} if drops else {"seed": None}
    constexprs = {**constants(head_dim, dtype, causal, 16 // dtype.itemsize, 1), "PADDED": padded, **more}
    names = list(kernel.arg_names)
    marks = [triton_type(dtype), *["causal"] * causal, *["dropout"] * drops]
    return Compilation(
        name=f"{'padded' if padded else 'varlen'}_attention_{name}_{head_dim}_{'_'.join(marks)}",
        kernel=kernel,
        signature={one: kind for one, kind in argument_types(names, dtype).items() if one not in absent},
        constexprs={one: value for one, value in {**absent, **constexprs, **tile.blocks}.items() if one in names},
        options=tile.options,
        tensor_cores=name != "rows",
    )


Specialisation = tuple[int, torch.dtype, bool]  # head dimension, dtype, whether causal


def specialisations() -> list[Specialisation]:
    """List every kernel that the report compiles."""
    half = [(size, torch.bfloat16, False) for size in (32, 64, 80, 88, 96, 128, 256)]
    wide = [(size, torch.float32, False) for size in (32, 64, 80, 96, 128)]
    return [*half, *wide, (64, torch.float16, False), *((size, torch.bfloat16, True) for size in (64, 96, 128, 256))]


def dropping() -> list[Specialisation]:
    """List every kernel with dropout that the report compiles: one for each tile."""
    half = [(size, torch.bfloat16, False) for size in (64, 128, 256)]
    return [*half, (64, torch.float32, False), (128, torch.float32, False)]


def compilations() -> list[Compilation]:
    """List forward for every specialisation."""
    plain = [compilation(forward_kernel, "forward", *each, NEGATIVE=False) for each in specialisations()]
    return [
        *plain, *(compilation(forward_kernel, "forward", *each, NEGATIVE=False, drops=True) for each in dropping())
    ]  # fmt: skip
