"""GPUs by the rates that good kernels reach on them, every one of which is an assumption with a name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """One GPU of a cluster.

    Args:
        name: its name.
        peak_flops: FLOP/s of bfloat16 products on the data sheet, without sparsity.
        product_share: share of the peak that large matrix products reach.
        attention_share: share of the peak that attention kernels for short sequences reach on full tiles.
        fused_attention_share: the same for kernels that hold keys and values of a whole sequence in shared memory.
        bytes_per_second: memory bandwidth that good kernels reach, not the data sheet's.
        instructions_per_second: warp instructions a second, at 90 % of the issue rate of all multiprocessors.
        network_bytes_per_second: bytes a second that each GPU reduces in an all-reduce over nodes.
        copy_bytes_per_second: pageable host memory to the GPU.
    """

    name: str
    peak_flops: float
    product_share: float
    attention_share: float
    fused_attention_share: float
    bytes_per_second: float
    instructions_per_second: float
    network_bytes_per_second: float
    copy_bytes_per_second: float


_HOPPER = {
    "peak_flops": 989e12,
    "product_share": 0.65,
    "attention_share": 0.16,
    "fused_attention_share": 0.22,
    "instructions_per_second": 132 * 4 * 1.755e9 * 0.9,
    "network_bytes_per_second": 180e9,
    "copy_bytes_per_second": 20e9,
}
MACHINES = {
    "A100": Machine(
        name="A100 80GB",
        peak_flops=312e12,
        product_share=0.73,
        attention_share=0.28,
        fused_attention_share=0.40,
        bytes_per_second=1700e9,
        instructions_per_second=108 * 4 * 1.41e9 * 0.9,
        network_bytes_per_second=90e9,
        copy_bytes_per_second=12e9,
    ),
    "H100": Machine(name="H100 SXM", bytes_per_second=2800e9, **_HOPPER),
    "H200": Machine(name="H200", bytes_per_second=4000e9, **_HOPPER),
}
