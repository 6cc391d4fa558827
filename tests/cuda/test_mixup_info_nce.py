from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oner_fast.benchmarks.gpuless.architectures import GATED, shared_block_limit

DTYPES = [torch.float16, torch.bfloat16]
PLAN = ("row_chunks", "column_chunks", "row_tiles_each", "column_tiles_each")


def inverse_norm(x: Tensor) -> Tensor:
    """1 / norm as the op passes it on: 0 for a row of zeros."""
    norm = x.double().norm(dim=1)
    return torch.where(norm < 1e-12, 0.0, 1 / norm)


def pack(
    lib: Any, x: Tensor, other: Tensor | None = None, mix: Tensor | None = None, inverse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Pack a side with mixup_pack: its rows, and the factors that make them unit vectors."""
    padded = -(-x.shape[1] // 8) * 8
    out, rest = lib.poison(x.shape[0], padded, dtype=x.dtype), lib.poison(x.shape[0], dtype=torch.float32)
    lib.call("mixup_pack", dict(
        x=x, other=other, mix=mix, inverse_norm=inverse, out=out, rest=rest, rows=x.shape[0], row_stride=x.stride(0),
        column_stride=x.stride(1), other_row_stride=0 if other is None else other.stride(0),
        other_column_stride=0 if other is None else other.stride(1), mix_step=0 if mix is None else mix.ndim,
        width=x.shape[1], padded=padded, number=lib.number(x),
    ))  # fmt: skip
    return out, rest


def statistics(
    lib: Any, query: Tensor, query_factor: Tensor | None, key: Tensor, key_factor: Tensor | None, scale: float,
    partner: Tensor | None = None, first_pair: int = 0, columns_too: bool = True, plan: Any = None,
    codes: tuple[Tensor, ...] = (), **settings: Any,
) -> list[Tensor]:  # fmt: skip
    rows, columns = query.shape[0], key.shape[0]
    if plan is None:
        chosen = lib.fill("mixup_plan", rows=rows, columns=columns)
        plan = [getattr(chosen, name) for name in PLAN]
    given = dict(zip(PLAN, plan, strict=True))
    names = ("row_max", "row_sum", "column_max", "column_sum", "own", "shared")
    sizes = (rows, rows, columns * columns_too, columns * columns_too, rows, 0 if partner is None else rows)
    out = {name: lib.poison(size, dtype=torch.float32) for name, size in zip(names, sizes, strict=True)}
    asked = {name: tensor for name, tensor in out.items() if tensor.numel()}
    scratch = dict(row_parts=lib.poison(2, given["column_chunks"], rows, dtype=torch.float32))
    if columns_too:
        scratch["column_parts"] = lib.poison(2, given["row_chunks"], columns, dtype=torch.float32)
    if len(codes) == 4:
        scratch["own_parts"] = lib.poison(given["column_chunks"], rows, dtype=torch.float32)
    asked |= dict(zip(("query_code", "key_code", "row_share", "column_share"), codes, strict=False))
    lib.call("mixup_statistics", dict(
        query=query, key=key, query_factor=query_factor, key_factor=key_factor, scale=torch.tensor([scale]),
        partner=partner, query_stride=query.stride(0), key_stride=key.stride(0), first_pair=first_pair, rows=rows,
        columns=columns, width=query.shape[1], number=lib.number(query), **asked, **scratch, **given,
    ), **settings)  # fmt: skip
    return list(out.values())


def check(found: list[Tensor], logits: Tensor, first_pair: int, partner: Tensor | None, tolerance: float) -> None:
    """Against exact logits [M, N]: log-sum-exp of rows and columns, and the logits of both targets, 0 where there is
    none."""
    row_max, row_sum, column_max, column_sum, own, shared = (each.double() for each in found)
    close = dict(rtol=0, atol=tolerance)
    torch.testing.assert_close(row_max, logits.amax(1), **close)
    torch.testing.assert_close(row_max + row_sum.log(), logits.logsumexp(1), **close)
    if column_max.numel():
        torch.testing.assert_close(column_max, logits.amax(0), **close)
        torch.testing.assert_close(column_max + column_sum.log(), logits.logsumexp(0), **close)

    def at(targets: Tensor) -> Tensor:
        inside = (targets >= 0) & (targets < logits.shape[1])
        chosen = logits.gather(1, targets.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
        return torch.where(inside, chosen, 0.0)

    torch.testing.assert_close(own, at(torch.arange(logits.shape[0]) + first_pair), **close)
    if partner is not None:
        torch.testing.assert_close(shared, at(partner), **close)


def side(rows: int, width: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    x = (torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)
    return x, inverse_norm(x).float()


def exact_logits(query: Tensor, key: Tensor, scale: float) -> Tensor:
    return scale * F.normalize(query.double(), dim=1) @ F.normalize(key.double(), dim=1).T


@pytest.mark.parametrize("columns_too", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_the_reference(library: Any, dtype: torch.dtype, columns_too: bool) -> None:
    lib, scale = library("mixup_info_nce"), 20.0
    (query, of_query), (key, of_key) = side(70, 40, dtype, 1), side(150, 40, dtype, 2)
    partner = torch.randint(150, (70,), generator=torch.Generator().manual_seed(3))
    found = statistics(lib, query, of_query, key, of_key, scale, partner, 33, columns_too, seed=1, shuffle=1)
    check(found, exact_logits(query, key, scale), 33, partner, 2e-5)
    again = statistics(lib, query, of_query, key, of_key, scale, partner, 33, columns_too, seed=2, shuffle=2)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("plan", [(1, 1, 2, 3), (2, 1, 1, 3), (1, 2, 2, 2)])
def test_chunks_of_many_tiles(library: Any, plan: tuple[int, ...]) -> None:
    """One block meets several tiles, so that stages of the next are loaded while one is finished."""
    lib, scale, dtype = library("mixup_info_nce"), 100.0, torch.bfloat16
    (query, of_query), (key, of_key) = side(200, 72, dtype, 1), side(300, 72, dtype, 2)
    partner = torch.randint(300, (200,), generator=torch.Generator().manual_seed(3))
    found = statistics(lib, query, of_query, key, of_key, scale, partner, 90, True, plan, seed=3)
    check(found, exact_logits(query, key, scale), 90, partner, 1e-4)


@pytest.mark.parametrize("first_pair", [-40, 5, 60, 2**40, -(2**40)])
def test_targets_may_lie_outside_the_block(library: Any, first_pair: int) -> None:
    lib, (query, of_query), (key, of_key) = (
        library("mixup_info_nce"),
        side(70, 8, DTYPES[0], 1),
        side(66, 8, DTYPES[0], 2),
    )
    partner = torch.randint(-70, 140, (70,), generator=torch.Generator().manual_seed(3))
    partner[:2] = torch.tensor([2**62, -(2**62)])
    found = statistics(lib, query, of_query, key, of_key, 10.0, partner, first_pair)
    check(found, exact_logits(query, key, 10.0), first_pair, partner, 2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_and_odd_sides_are_packed(library: Any, dtype: torch.dtype) -> None:
    lib, generator = library("mixup_info_nce"), torch.Generator().manual_seed(0)
    x, other, key = (torch.randn(20, 37, generator=generator).to(dtype) for _ in range(3))
    x[3], other[3] = x[3] * 1e-6, other[3] * 1e-6
    x[4], other[4] = 0, 0
    for mix in (torch.tensor(0.3), torch.rand(20, generator=generator)):
        share = mix.double().unsqueeze(-1) if mix.ndim else mix.double()
        mixed = (1 - share) * x.double() + share * other.double()
        query, of_query = pack(lib, x, other, mix, inverse_norm(mixed).float())
        assert query[:, 37:].eq(0).all()
        unit = query[:, :37].double() * of_query.double().unsqueeze(1)
        torch.testing.assert_close(unit, F.normalize(mixed, dim=1), rtol=torch.finfo(dtype).eps, atol=1e-6)
        plain, of_plain = pack(lib, key.T.contiguous().T, inverse=inverse_norm(key).float())
        assert torch.equal(plain[:, :37], key)
        found = statistics(lib, query, of_query, plain, of_plain, 5.0)
        check(found, 5 * unit @ F.normalize(key.double(), dim=1).T, 0, None, 2e-5)
    unit_keys = F.normalize(key.float(), dim=1).to(dtype)
    packed, ones = pack(lib, unit_keys)
    assert torch.equal(packed[:, :37], unit_keys) and ones.eq(1).all()


def test_unit_keys_strides_and_extreme_logits(library: Any) -> None:
    lib, (query, of_query) = library("mixup_info_nce"), side(10, 16, DTYPES[1], 1)
    room = torch.zeros(12, 24, dtype=DTYPES[1])
    room[:, :16] = F.normalize(torch.randn(12, 16), dim=1)
    keys = room[:, :16]
    query, of_query = (keys[:10] * 4).contiguous(), of_query.fill_(0.25)
    found = statistics(lib, query, of_query, keys, None, 1000.0)
    check(found, 1000 * (query.double() * 0.25) @ keys.double().T, 0, None, 1e-3)
    query[3, 2], query[4, 1] = float("nan"), float("inf")
    row_max, row_sum, column_max, column_sum, own, _ = statistics(lib, query, of_query, keys, None, 2.0)
    loss = row_max + row_sum.log() - own
    assert loss[[3, 4]].isnan().all() and not loss[[0, 1, 2, 5, 6, 7, 8, 9]].isnan().any()
    assert (column_max + column_sum.log()).isnan().all()


def test_rows_without_norms_are_taken_as_they_are(library: Any) -> None:
    """Both sides in place, and mixed: no factor is read where there is none."""
    lib, generator = library("mixup_info_nce"), torch.Generator().manual_seed(4)
    x, other, key = (torch.randn(70, 40, generator=generator).to(DTYPES[1]) for _ in range(3))
    found = statistics(lib, x, None, key, None, 0.5)
    check(found, 0.5 * x.double() @ key.double().T, 0, None, 2e-5)
    mixed, ones = pack(lib, x, other, torch.tensor(0.3))
    exact = 0.7 * x.double() + 0.3 * other.double()
    assert ones.eq(1).all() and ((mixed.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()
    check(statistics(lib, mixed, ones, key, None, 0.5), 0.5 * mixed.double() @ key.double().T, 0, None, 2e-5)


@pytest.mark.parametrize("columns_too", [True, False])
@pytest.mark.parametrize("plan", [None, (1, 1, 2, 3), (1, 2, 2, 2)])
@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pairs_with_equal_codes(
    library: Any, dtype: torch.dtype, positive: bool, plan: tuple[int, ...] | None, columns_too: bool
) -> None:
    """Small classes, codes that nobody shares, and own pairs inside and outside of the keys."""
    if dtype == torch.float16 and plan:
        pytest.skip("the same kernel")
    lib, scale, first_pair = library("mixup_info_nce"), 20.0, 190
    (query, of_query), (key, of_key) = side(200, 40, dtype, 1), side(300, 40, dtype, 2)
    generator = torch.Generator().manual_seed(4)
    query_code = torch.randint(-1, 40, (200,), generator=generator, dtype=torch.int32)
    key_code = torch.randint(-2, 40, (300,), generator=generator, dtype=torch.int32)
    key_code[key_code == -1] = -2
    shares = [torch.rand(n, generator=generator) for n in (200, 300)]
    codes = (query_code, key_code, *shares) if positive else (query_code, key_code)
    found = statistics(
        lib, query, of_query, key, of_key, scale, None, first_pair, columns_too, plan, codes, seed=1, shuffle=1
    )
    logits = exact_logits(query, key, scale)
    own = (torch.arange(200) + first_pair).unsqueeze(1) == torch.arange(300)
    equal = query_code.unsqueeze(1) == key_code
    if positive:
        weight = shares[0].double().unsqueeze(1) + shares[1].double()
        torch.testing.assert_close(
            found[4].double(), torch.where(equal | own, weight * logits, 0.0).sum(1), rtol=0, atol=1e-3
        )
        found[4] = torch.where(own, logits, 0.0).sum(1).float()
    else:
        logits = logits.masked_fill(equal & ~own, -torch.inf)
    check(found, logits, first_pair, None, 2e-5)


def test_a_row_whose_keys_are_all_ignored_merges_to_what_the_others_have(library: Any) -> None:
    """Its maximum is the logit of an ignored pair, beside which every other has the whole sum."""
    lib, (query, of_query), (key, of_key) = (
        library("mixup_info_nce"),
        side(4, 8, DTYPES[1], 1),
        side(5, 8, DTYPES[1], 2),
    )
    codes = (torch.tensor([1, 1, 2, -1], dtype=torch.int32), torch.ones(5, dtype=torch.int32))
    row_max, row_sum, *_ = statistics(lib, query, of_query, key, of_key, 3.0, None, 70, codes=codes)
    assert row_max[:2].eq(-1e38).all() and row_sum.isfinite().all() and row_max[2:].gt(-4).all()


def test_offsets_beyond_32_bits(library: Any) -> None:
    lib, (query, of_query) = library("mixup_info_nce"), side(2, 8, DTYPES[0], 1)
    room = torch.empty(2**31 + 64, dtype=DTYPES[0])
    keys = room.as_strided((3, 8), (2**30, 1))
    keys.copy_(torch.randn(3, 8))
    of_keys = inverse_norm(keys).float()
    found = statistics(lib, query, of_query, keys, of_keys, 3.0, stats=False, global_race=False)
    check(found, exact_logits(query, keys.clone(), 3.0), 0, None, 2e-5)


def test_the_plan_covers_every_tile_with_bounded_scratch(library: Any) -> None:
    lib = library("mixup_info_nce")
    for rows, columns in (
        (1, 1),
        (128, 129),
        (4096, 4096),
        (1000, 32768),
        (2**17, 2**17),
        (2**20 + 1, 7),
        (300, 2**24),
    ):
        plan = lib.fill("mixup_plan", rows=rows, columns=columns)
        for count, chunks, each in (
            (rows, plan.row_chunks, plan.row_tiles_each), (columns, plan.column_chunks, plan.column_tiles_each)
        ):  # fmt: skip
            tiles = -(-count // 128)
            assert chunks >= 1 and (chunks - 1) * each < tiles <= chunks * each
        assert plan.row_chunks * plan.column_chunks <= 1024 and plan.row_chunks <= 32
        assert plan.column_chunks * rows * 8 <= max(256 * rows, 8 * 128 * 1024)


@pytest.mark.parametrize("dtype", DTYPES)
def test_counted_bytes_and_instructions(library: Any, dtype: torch.dtype) -> None:
    lib, (query, of_query), (key, of_key) = library("mixup_info_nce"), side(256, 64, dtype, 1), side(256, 64, dtype, 2)
    statistics(lib, query, of_query, key, of_key, 10.0)
    stats = lib.log[0]
    assert stats.tensor_flops == 2 * 256 * 256 * 64
    for kind, access in stats.memory.items():
        if kind == "shared_ld":
            assert access.wavefronts == access.ideal_wavefronts
    scratch = 2 * 2 * 2 * 256 * 4
    ideal = 2 * 256 * 64 * 2 + 2 * 256 * 4 + 256 * 4
    assert stats.unique_read_bytes + stats.unique_write_bytes <= 1.02 * (ideal + scratch) + 64


def test_shared_memory_fits_a_block_and_leaves_room_for_two(library: Any) -> None:
    """It is asked for, since it is more than 48 KiB. With the kilobyte that every block takes, two blocks fit into the
    164 KiB of an A100."""
    lib, (query, of_query) = library("mixup_info_nce"), side(4, 8, DTYPES[0], 1)
    statistics(lib, query, of_query, query, of_query, 1.0, columns_too=False, plan=(1, 1, 1, 1))
    statistics_bytes = lib.shared[0]
    assert all(48 << 10 < statistics_bytes <= (shared_block_limit(target) or 0) for target in GATED)
    assert 2 * (statistics_bytes + 1024) <= 164 << 10
