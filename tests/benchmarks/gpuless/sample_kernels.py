"""Triton kernels on which the checkers are tried, right ones and wrong ones, and functions that launch them."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def matmul(
    A,
    B,
    C,
    M,
    N,
    K,
    stride_am,
    stride_bk,
    stride_cm,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr = tl.float32,
):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), dtype=ACC)
    for k in range(0, K, BK):
        rk = k + tl.arange(0, BK)
        a = tl.load(A + rm[:, None] * stride_am + rk[None, :], mask=(rm[:, None] < M) & (rk[None, :] < K), other=0.0)
        b = tl.load(B + rk[:, None] * stride_bk + rn[None, :], mask=(rk[:, None] < K) & (rn[None, :] < N), other=0.0)
        acc = tl.dot(a, b, acc, out_dtype=ACC)
    tl.store(
        C + rm[:, None] * stride_cm + rn[None, :],
        acc.to(C.dtype.element_ty),
        mask=(rm[:, None] < M) & (rn[None, :] < N),
    )


@triton.jit
def softmax(X, Y, stride, N, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(X + row * stride + c, mask=c < N, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, axis=0))
    tl.store(Y + row * stride + c, (e / tl.sum(e, axis=0)).to(Y.dtype.element_ty), mask=c < N)


@triton.jit
def flash_fwd(
    Q,
    K,
    V,
    OUT,
    LSE,
    scale,
    stride_h,
    stride_s,
    N_CTX,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    start, h = tl.program_id(0), tl.program_id(1)
    base = h.to(tl.int64) * stride_h
    rm, rd = start * BM + tl.arange(0, BM), tl.arange(0, D)
    q = tl.load(Q + base + rm[:, None] * stride_s + rd[None, :], mask=rm[:, None] < N_CTX, other=0.0)
    m_i = tl.full((BM,), -float("inf"), tl.float32)
    l_i = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    end = (start + 1) * BM if CAUSAL else N_CTX
    for n in range(0, end, BN):
        rn = n + tl.arange(0, BN)
        k = tl.load(K + base + rn[None, :] * stride_s + rd[:, None], mask=rn[None, :] < N_CTX, other=0.0)
        s = tl.dot(q, k) * (scale * 1.44269504)
        mask = rn[None, :] < N_CTX
        if CAUSAL:
            mask = mask & (rm[:, None] >= rn[None, :])
        s = tl.where(mask, s, -1.0e30)
        m_new = tl.maximum(m_i, tl.max(s, 1))
        p = tl.exp2(s - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        v = tl.load(V + base + rn[:, None] * stride_s + rd[None, :], mask=rn[:, None] < N_CTX, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
        m_i = m_new
    tl.store(
        OUT + base + rm[:, None] * stride_s + rd[None, :],
        (acc / l_i[:, None]).to(OUT.dtype.element_ty),
        mask=rm[:, None] < N_CTX,
    )
    tl.store(LSE + h * N_CTX + rm, (m_i + tl.log2(l_i)) * 0.6931471805599453, mask=rm < N_CTX)


@triton.jit
def flash_bwd(
    Q,
    K,
    V,
    DO,
    DQ,
    DK,
    DV,
    LSE,
    DELTA,
    scale,
    stride_h,
    stride_s,
    N_CTX,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """One program for each block of keys; dq is added up atomically."""
    start, h = tl.program_id(0), tl.program_id(1)
    base = h.to(tl.int64) * stride_h
    rn, rd = start * BN + tl.arange(0, BN), tl.arange(0, D)
    nm = rn < N_CTX
    k = tl.load(K + base + rn[:, None] * stride_s + rd[None, :], mask=nm[:, None], other=0.0)
    v = tl.load(V + base + rn[:, None] * stride_s + rd[None, :], mask=nm[:, None], other=0.0)
    dk = tl.zeros((BN, D), tl.float32)
    dv = tl.zeros((BN, D), tl.float32)
    first = (start * BN // BM) * BM if CAUSAL else 0
    for m in range(first, N_CTX, BM):
        rm = m + tl.arange(0, BM)
        mm = rm < N_CTX
        q = tl.load(Q + base + rm[:, None] * stride_s + rd[None, :], mask=mm[:, None], other=0.0)
        do = tl.load(DO + base + rm[:, None] * stride_s + rd[None, :], mask=mm[:, None], other=0.0)
        lse = tl.load(LSE + h * N_CTX + rm, mask=mm, other=0.0)
        delta = tl.load(DELTA + h * N_CTX + rm, mask=mm, other=0.0)
        mask = mm[:, None] & nm[None, :]
        if CAUSAL:
            mask = mask & (rm[:, None] >= rn[None, :])
        p = tl.where(mask, tl.exp(tl.dot(q, tl.trans(k)) * scale - lse[:, None]), 0.0)
        dv = tl.dot(tl.trans(p).to(do.dtype), do, dv)
        ds = p * (tl.dot(do, tl.trans(v)) - delta[:, None]) * scale
        dk = tl.dot(tl.trans(ds).to(q.dtype), q, dk)
        tl.atomic_add(
            DQ + base + rm[:, None] * stride_s + rd[None, :], tl.dot(ds.to(k.dtype), k), mask=mm[:, None], sem="relaxed"
        )
    tl.store(DK + base + rn[:, None] * stride_s + rd[None, :], dk.to(DK.dtype.element_ty), mask=nm[:, None])
    tl.store(DV + base + rn[:, None] * stride_s + rd[None, :], dv.to(DV.dtype.element_ty), mask=nm[:, None])


@triton.jit
def add_rows(X, Y, n, BLOCK: tl.constexpr):
    """Every program adds a row to the same vector: a race."""
    i = tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(Y + i) + tl.load(X + tl.program_id(0) * n + i))


@triton.jit
def add_rows_atomically(X, Y, n, BLOCK: tl.constexpr):
    """The same without the race."""
    i = tl.arange(0, BLOCK)
    tl.atomic_add(Y + i, tl.load(X + tl.program_id(0) * n + i))


@triton.jit
def note_order(out, counter):
    """Each program notes how many ran before it."""
    tl.store(out + tl.program_id(0), tl.atomic_add(counter, 1))


@triton.jit
def sum_masked(X, Y, n, BLOCK: tl.constexpr):
    """A masked load without `other`: the masked lanes are undefined."""
    i = tl.arange(0, BLOCK)
    tl.store(Y, tl.sum(tl.load(X + i, mask=i < n)))


@triton.jit(noinline=True)
def polynomial(x, c):
    return (x * c + 1) * x


@triton.jit
def call_function(X, Y, c):
    i = tl.program_id(0)
    tl.store(Y + i, polynomial(polynomial(tl.load(X + i), c), c))


@triton.jit
def far_rows(X, Y, stride):
    """Offsets beyond 2**31."""
    row = tl.program_id(0).to(tl.int64)
    tl.store(Y + row, tl.load(X + row * stride))


@triton.jit
def copy_block(source, target, BM: tl.constexpr):
    """The arguments are tensor descriptors made on the host."""
    at = [tl.program_id(0) * BM, 0]
    target.store(at, source.load(at) * 2)


@triton.jit
def multiply(X, Y, a, b):
    tl.store(Y, tl.load(X) * (a * b))


@triton.autotune([triton.Config({"BLOCK": 64}, num_warps=2), triton.Config({"BLOCK": 128}, num_warps=4)], key=["n"])
@triton.jit
def double_tuned(X, Y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i, mask=i < n, other=0) * 2, mask=i < n)


def run_matmul(a: Tensor, b: Tensor, **options: Any) -> Tensor:
    """The product, in a result that was NaN before."""
    rows, columns = a.shape[0], b.shape[1]
    c = torch.full((rows, columns), float("nan"), dtype=a.dtype)
    sizes = {"BM": 64, "BN": 32, "BK": 32} | options
    matmul[lambda meta: (triton.cdiv(rows, meta["BM"]), triton.cdiv(columns, meta["BN"]))](
        a, b, c, rows, columns, a.shape[1], a.stride(0), b.stride(0), c.stride(0), **sizes
    )
    return c


def run_flash(inputs: list[Tensor], causal: bool = True, length: int | None = None) -> tuple[list[Tensor], Tensor]:
    """Attention of query, key and value [heads, length, width]: its result, three gradients, and the log-sum-exps.

    `length` is what the kernels are told, the inputs' own where it is None.
    """
    q, k, v, do = inputs
    heads, tokens, width = q.shape
    o, lse, scale = torch.empty_like(q), torch.empty(heads, tokens), width**-0.5
    strides, blocks = (tokens * width, width), {"D": width, "BM": 64, "BN": 32, "CAUSAL": causal, "num_stages": 2}
    flash_fwd[(triton.cdiv(tokens, 64), heads)](q, k, v, o, lse, scale, *strides, length or tokens, **blocks)
    delta = (o.float() * do.float()).sum(-1).contiguous()
    dq, dk, dv = torch.zeros(heads, tokens, width), torch.empty_like(k), torch.empty_like(v)
    flash_bwd[(triton.cdiv(tokens, 32), heads)](q, k, v, do, dq, dk, dv, lse, delta, scale, *strides, tokens, **blocks)
    return [o, dq, dk, dv], lse
