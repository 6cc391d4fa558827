"""PTX on the CPU, from its text: parsing, parameters, checks. Needs a C++ compiler alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from oner_fast.benchmarks.gpuless.ptx import Kernel, KernelFault, PtxError

HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n"
# Each thread copies one number to the place that an offset names.
COPY = (
    HEAD
    + """
.visible .entry copy(.param .u64 source, .param .u64 target, .param .u32 shift)
{
  .reg .b32 %r<4>;
  .reg .b64 %rd<6>;
  ld.param.u64 %rd1, [source];
  ld.param.u64 %rd2, [target];
  ld.param.u32 %r1, [shift];
  mov.u32 %r2, %tid.x;
  mul.wide.u32 %rd3, %r2, 4;
  add.s64 %rd4, %rd1, %rd3;
  ld.global.b32 %r3, [%rd4];
  mul.wide.u32 %rd5, %r1, 4;
  add.s64 %rd2, %rd2, %rd5;
  add.s64 %rd2, %rd2, %rd3;
  st.global.b32 [%rd2], %r3;
  ret;
}
"""
)
# The second warp reads from shared memory what the first wrote.
EXCHANGE = (
    HEAD
    + """
.visible .entry exchange(.param .u64 out)
{
  .reg .pred %p;
  .reg .b32 %r<5>;
  .reg .b64 %rd<4>;
  .shared .align 4 .b8 room[256];
  ld.param.u64 %rd1, [out];
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, room;
  mad.lo.u32 %r3, %r1, 4, %r2;
  st.shared.u32 [%r3], %r1;
  BARRIER
  xor.b32 %r4, %r1, 32;
  mad.lo.u32 %r3, %r4, 4, %r2;
  ld.shared.u32 %r4, [%r3];
  mul.wide.u32 %rd2, %r1, 4;
  add.s64 %rd3, %rd1, %rd2;
  st.global.u32 [%rd3], %r4;
  ret;
}
"""
)


@pytest.fixture(autouse=True)
def compiler(needs: Callable[..., None]) -> None:
    needs("g++")


def test_a_kernel_copies_and_is_counted() -> None:
    x, y = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    stats = Kernel(COPY).launch(1, 64, [x, y, 0])
    assert torch.equal(x, y)
    assert (stats.unique_read_bytes, stats.unique_write_bytes) == (256, 256)
    assert stats.memory["global_ld"].sectors == 8 and stats.summary()["global_ld_efficiency"] == 1.0


def test_an_access_outside_the_tensors_says_where() -> None:
    x, y = torch.arange(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    with pytest.raises(KernelFault, match=r"OUT OF BOUNDS .* lane 31.* at byte 128 of a tensor of 128 bytes"):
        Kernel(COPY).launch(1, 32, [x, y, 1])


def test_an_address_that_is_not_aligned_is_caught() -> None:
    x, y = torch.zeros(132, dtype=torch.uint8), torch.zeros(64, dtype=torch.int32)
    with pytest.raises(KernelFault, match="MISALIGNED"):
        Kernel(COPY).launch(1, 32, [x[1:130], y, 0])


def test_two_blocks_that_write_one_place_are_a_race_unless_told_otherwise() -> None:
    x, y = torch.arange(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    with pytest.raises(KernelFault, match="GLOBAL RACE.*writes what block 0 wrote"):
        Kernel(COPY).launch(2, 32, [x, y, 0])
    Kernel(COPY).launch(2, 32, [x, y, 0], global_race=False)


def test_a_barrier_between_warps_is_needed() -> None:
    out = torch.zeros(64, dtype=torch.int32)
    Kernel(EXCHANGE.replace("BARRIER", "bar.sync 0;")).launch(1, 64, [out], seed=1)
    assert torch.equal(out, torch.arange(64, dtype=torch.int32) ^ 32)
    with pytest.raises(KernelFault, match="SHARED RACE"):
        Kernel(EXCHANGE.replace("BARRIER", "")).launch(1, 64, [out])


def test_a_barrier_that_half_of_the_warps_reach_is_a_deadlock() -> None:
    half = "setp.lt.u32 %p, %r1, 32; @%p bar.sync 1, 64;"
    with pytest.raises(KernelFault, match="DEADLOCK"):
        Kernel(EXCHANGE.replace("BARRIER", half)).launch(1, 64, [torch.zeros(64, dtype=torch.int32)], race=False)


def test_an_endless_loop_is_stopped() -> None:
    with pytest.raises(KernelFault, match="HANG"):
        Kernel(EXCHANGE.replace("BARRIER", "again: bra again;")).launch(
            1, 64, [torch.zeros(64, dtype=torch.int32)], max_steps=1000
        )


def test_an_unknown_instruction_or_modifier_is_named_with_its_line() -> None:
    body = "{\n.reg .b32 %r<3>;\nSTATEMENT\nret;\n}\n"
    for statement, says in (
        ("dp4a.s32.s32 %r1, %r2, %r2, %r1;", r"line 7: dp4a\.s32\.s32"),
        ("ld.global.b32.strange %r1, [%r2];", r"modifier \.strange is not emulated: PTX line 7"),
        ("add.u32 %r1, %r2, nothing;", "operand nothing not understood: PTX line 7"),
    ):
        with pytest.raises(PtxError, match=says):
            Kernel(HEAD + ".visible .entry k()\n" + body.replace("STATEMENT", statement))


def test_arguments_have_to_fit_the_parameters() -> None:
    kernel, x = Kernel(COPY), torch.zeros(32, dtype=torch.int32)
    for given, says in (
        ([x, x], "copy has 3 parameters, 2 arguments given"),
        ([x, x, x], "shift is .u32, not a pointer"),
        ([x, x, 0.5], "shift is .u32, not a float"),
        ([x, x, b"12345"], "shift: 5 bytes given, 4 wanted"),
    ):
        with pytest.raises(TypeError, match=says):
            kernel.launch(1, 32, given)
    with pytest.raises(ValueError, match="not a block size"):
        kernel.launch(1, 2048, [x, x, 0])


def test_a_kernel_is_found_by_a_part_of_its_name() -> None:
    two = COPY + EXCHANGE.replace(HEAD, "").replace("BARRIER", "")
    assert Kernel(two, "exch").name == "exchange"
    with pytest.raises(PtxError, match=r"no kernel fits 'absent'; the PTX has \['copy', 'exchange'\]"):
        Kernel(two, "absent")
    with pytest.raises(PtxError, match="several kernels fit None"):
        Kernel(two)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(PtxError, match="no-such-compiler not found"):
        Kernel(COPY)
