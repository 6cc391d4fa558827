"""The parts of a step: the count of each, the time that it takes at the assumed rates, and their sum."""

from __future__ import annotations

from dataclasses import dataclass

from oner_fast.budget import flops, tiles
from oner_fast.budget.assumptions import Assumptions
from oner_fast.budget.elementwise import bytes_of
from oner_fast.budget.machine import Machine
from oner_fast.budget.techniques import State, techniques
from oner_fast.budget.workload import Workload

GRADIENT_BYTES = 4


@dataclass(frozen=True)
class Part:
    """One part of a step: its time in seconds, and the count and rate that it comes from, in words."""

    name: str
    seconds: float
    count: str


@dataclass(frozen=True)
class Estimate:
    """Estimate of a step in one state.

    Args:
        state: before, now or after.
        parts: its parts, in order; their seconds add up to the step's.
        model_flops: FLOPs that the step needs on one GPU, without recomputation and tiles.
        peak_flops: the GPU's peak.
    """

    state: State
    parts: tuple[Part, ...]
    model_flops: float
    peak_flops: float

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return sum(part.seconds for part in self.parts)

    @property
    def mfu(self) -> float:
        """FLOPs that the step needs as a share of the peak."""
        return self.model_flops / (self.seconds * self.peak_flops)

    def part(self, name: str) -> Part:
        """Find a part by its name."""
        return next(part for part in self.parts if part.name == name)


@dataclass(frozen=True)
class Setting:
    """Setting of an estimate: a workload on a machine of several ranks.

    Args:
        work: the part of one GPU.
        machine: the GPU.
        ranks: number of GPUs.
        parameters: trained parameters; `averaged` is the number of the teacher's.
        operations: leaf operations that the host starts in a step.
        assumed: the assumptions.
    """

    work: Workload
    machine: Machine
    ranks: int
    parameters: int
    averaged: int
    operations: int
    assumed: Assumptions = Assumptions()


def estimate(setting: Setting, state: State, has: frozenset[str] | None = None) -> Estimate:
    """Estimate a step in a state, or with the techniques `has` where they are given."""
    has = techniques(state) if has is None else has
    work, machine = setting.work, setting.machine
    parts = [
        _products(setting),
        _attention(setting, "short attention" in has),
        _passes(setting, "fused passes" in has),
        _mask_token(setting, "mask token" in has),
        _rows(setting, "counting sort" in has),
        _contrast(setting, "gathered keys" in has),
        _optimiser(setting),
        _embeddings(setting),
        _communication(setting),
    ]
    parts.append(_host(setting, "no waits" in has, sum(part.seconds for part in parts)))
    needed = sum(each.flops for each in flops.products(work, again=False)) + flops.contrast_flops(work, setting.ranks)
    needed += flops.attention_flops(work, flops.MODEL_BACKWARD, again=False)
    return Estimate(state, tuple(parts), needed, machine.peak_flops)


def _products(setting: Setting) -> Part:
    count, machine = sum(each.flops for each in flops.products(setting.work)), setting.machine
    rate = machine.product_share * machine.peak_flops
    words = f"{count / 1e12:.1f} TFLOP at {machine.product_share:.0%} of {machine.peak_flops / 1e12:.0f} TFLOP/s"
    return Part("matrix products", count / rate, words)


def _attention(setting: Setting, short: bool) -> Part:
    work, machine = setting.work, setting.machine
    needed = flops.attention_flops(work, flops.ATTENTION_BACKWARD if short else flops.TRITON_BACKWARD)
    filled = tiles.efficiency(work.student, tiles.SHORT if short else tiles.TRITON)
    share = machine.fused_attention_share if short else machine.attention_share
    products = flops.ATTENTION_FORWARD + (flops.ATTENTION_BACKWARD if short else flops.TRITON_BACKWARD)
    words = (
        f"{needed / 1e12:.2f} TFLOP of {products} products, {filled:.2f} of the tiles filled, "
        f"at {share:.0%} of the peak"
    )
    moved = _attention_bytes(setting)
    seconds = max(needed / filled / (share * machine.peak_flops), moved / machine.bytes_per_second)
    return Part("attention", seconds, words)


def _attention_bytes(setting: Setting) -> float:
    """Count the bytes of attention's inputs, outputs and gradients in bfloat16, each once a direction."""
    work, forward, backward = setting.work, 4, 8  # tensors of (tokens, width)
    tokens = (forward + backward) * work.student.tokens + forward * work.teacher.tokens
    return float(2 * tokens * work.model.width * work.model.depth)


def _passes(setting: Setting, fused: bool) -> Part:
    moved = bytes_of(setting.work, fused)
    return Part("element-wise passes", moved / setting.machine.bytes_per_second, _bytes(moved, setting.machine))


def _mask_token(setting: Setting, summed: bool) -> Part:
    repeats, machine = setting.work.masked_patches, setting.machine
    if summed:
        moved = repeats * setting.work.model.width * GRADIENT_BYTES
        return Part("mask token", moved / machine.bytes_per_second, _bytes(moved, machine))
    each = setting.assumed.repeat
    return Part("mask token", repeats * each, f"{repeats:,} additions one after another, {each * 1e6:.2f} us each")


def _rows(setting: Setting, sorted_once: bool) -> Part:
    work, assumed, machine = setting.work, setting.assumed, setting.machine
    rows = work.student.tokens
    if sorted_once:
        count = rows * assumed.row_instructions
        words = f"{count / 1e6:.1f} M instructions of a counting sort of {rows:,} rows"
        return Part("row selection", count / machine.instructions_per_second, words)
    count = assumed.pair_instructions * rows**2 / work.config.optim.accum_freq  # a micro-batch's rows meet each other
    seconds = count / machine.instructions_per_second + rows * assumed.entry
    return Part("row selection", seconds, f"{count / 1e9:.1f} G instructions, and {rows:,} entries by one thread")


def _contrast(setting: Setting, gathered: bool) -> Part:
    work, assumed, machine = setting.work, setting.assumed, setting.machine
    count = flops.contrasts(work)
    seconds = flops.contrast_flops(work, setting.ranks) / (machine.attention_share * machine.peak_flops)
    if setting.ranks == 1 or not count:
        return Part("contrast", seconds, f"{count} matrices of logits on one GPU")
    if gathered:
        collectives = count + 2  # images' and texts' keys, and what each loss sums over the ranks
        words = f"{collectives} collectives, {assumed.collective * 1e6:.0f} us each"
        return Part("contrast", seconds + collectives * assumed.collective, words)
    hops = count * assumed.hops * setting.ranks
    return Part("contrast", seconds + hops * assumed.hop, f"{hops} hops of {assumed.hop * 1e6:.0f} us")


def _optimiser(setting: Setting) -> Part:
    assumed = setting.assumed
    moved = setting.parameters * assumed.parameter_bytes + setting.averaged * assumed.teacher_bytes
    return Part("optimiser and EMA", moved / setting.machine.bytes_per_second, _bytes(moved, setting.machine))


def _embeddings(setting: Setting) -> Part:
    work, assumed = setting.work, setting.assumed
    model = work.model
    moved = (work.student.tokens + work.teacher.tokens) * model.width * assumed.embedding_bytes
    moved += work.masked_words * model.vocab_size * assumed.vocabulary_bytes
    moved += work.masked_patches * len(model.image_mean) * model.patch_size**2 * assumed.pixel_bytes
    return Part("embeddings and losses", moved / setting.machine.bytes_per_second, _bytes(moved, setting.machine))


def _communication(setting: Setting) -> Part:
    if setting.ranks == 1:
        return Part("communication", 0.0, "one GPU")
    assumed, machine = setting.assumed, setting.machine
    sent = 2 * setting.parameters * GRADIENT_BYTES * (setting.ranks - 1) / setting.ranks
    whole = sent / machine.network_bytes_per_second
    words = (
        f"{sent / 1e9:.2f} GB all-reduced at {machine.network_bytes_per_second / 1e9:.0f} GB/s, "
        f"{assumed.hidden_communication:.0%} hidden"
    )
    return Part("communication", whole * (1 - assumed.hidden_communication), words)


def _host(setting: Setting, never_waits: bool, busy: float) -> Part:
    """Count what the host adds: its work where the GPU idles, and launches beyond the GPU's own time."""
    assumed, work = setting.assumed, setting.work
    accumulated = work.config.optim.accum_freq
    # Of two passes the first is a forward, a third of a step's operations.
    started = setting.operations * accumulated * (4 if accumulated > 1 else 3) // 3
    late = max(0.0, started * assumed.launch - busy)
    hidden = f"{started:,} operations of {assumed.launch * 1e6:.0f} us, {late * 1e3:.0f} ms of them not hidden"
    if never_waits:
        return Part("host", late, hidden)
    images = work.pairs * len(work.model.image_mean) * work.model.image_size**2
    copied = assumed.copies * images / setting.machine.copy_bytes_per_second
    words = f"{hidden}; {assumed.waits} waits, {assumed.copies} blocking copies, masks"
    return Part("host", late + assumed.waits * assumed.wait + copied + assumed.masks, words)


def _bytes(moved: float, machine: Machine) -> str:
    return f"{moved / 1e9:.1f} GB at {machine.bytes_per_second / 1e12:.2g} TB/s"
