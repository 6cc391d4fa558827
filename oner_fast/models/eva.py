"""Convert UTA's weights to and from other names: the released layout (EVA's), and that of timm's `Eva`.

A conversion only splits, joins and reshapes, so a round trip gives the same bits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from oner_fast.models.resampling import resample_positions
from oner_fast.models.uta import UTAConfig

State = dict[str, Tensor]
Layout = Literal["oner_fast", "eva", "timm"]

_PREFIXES = ("visual.trunk.", "visual.", "trunk.")
_BLOCK = {
    "norm_attention.weight": "norm1.weight", "norm_attention.bias": "norm1.bias",
    "attention.out.weight": "attn.proj.weight", "attention.out.bias": "attn.proj.bias",
    "norm_mlp.weight": "norm2.weight", "norm_mlp.bias": "norm2.bias",
}  # fmt: skip
_EVA = {
    "attention.q_bias": "attn.q_bias", "attention.v_bias": "attn.v_bias",
    "mlp.norm.weight": "mlp.ffn_ln.weight", "mlp.norm.bias": "mlp.ffn_ln.bias",
    "mlp.out.weight": "mlp.w3.weight", "mlp.out.bias": "mlp.w3.bias",
}  # fmt: skip
_TIMM = {
    "attention.q_bias": "attn.q_proj.bias", "attention.v_bias": "attn.v_proj.bias",
    "mlp.norm.weight": "mlp.norm.weight", "mlp.norm.bias": "mlp.norm.bias",
    "mlp.out.weight": "mlp.fc2.weight", "mlp.out.bias": "mlp.fc2.bias",
}  # fmt: skip
_QKV = ("attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight")


class _Row(NamedTuple):
    """One of our tensors: the names that hold its rows in another layout, in order, and its shape there."""

    ours: str
    theirs: tuple[str, ...]
    shape: tuple[int, ...] = ()


def to_eva(state: Mapping[str, Tensor], config: UTAConfig) -> State:
    """Convert the state dict of a `oner_fast.models.uta.UTA` to the released layout.

    Its names are `blocks.0.attn.q_proj.weight`, `attn.q_bias`, `mlp.w1` (gate), `w2` (value), `ffn_ln`, `w3`. The
    tables of RoPE are not in it.
    """
    return _convert(state, config, "eva")


def to_timm(state: Mapping[str, Tensor], config: UTAConfig) -> State:
    """Convert the state dict of a `oner_fast.models.uta.UTA` to the layout of timm's `Eva` (`qkv_fused=False`).

    Its names are `attn.q_proj.bias`, `mlp.fc1_g` (gate), `fc1_x` (value), `norm`, `fc2`. open_clip puts `visual.trunk.`
    in front.
    """
    return _convert(state, config, "timm")


def from_eva(state: Mapping[str, Tensor], config: UTAConfig) -> State:
    """Invert `to_eva`, for a state dict with or without `visual.` in front of its names.

    Products may be fused (`attn.qkv`, `mlp.w12`). RoPE's tables, a mask token that `config` lacks and a text tower are
    ignored, and positions of another grid are resampled.

    Raises:
        ValueError: names are missing or unknown, or a shape does not fit `config`; the message lists them.
    """
    return _revert(state, config, "eva")


def from_timm(state: Mapping[str, Tensor], config: UTAConfig) -> State:
    """Invert `to_timm`, for names with or without `visual.trunk.` in front; otherwise as `from_eva`."""
    return _revert(state, config, "timm")


def layout_of(state: Mapping[str, Tensor]) -> Layout:
    """Name the layout of a state dict. Raises ValueError where it is unknown."""
    if "cls_position" in state:
        return "oner_fast"
    names = without_prefix(state).keys()
    for layout, mark in (("eva", r"mlp\.w(1|12)\.weight"), ("timm", r"mlp\.fc1(_g)?\.weight")):
        if any(re.fullmatch(r"blocks\.0\." + mark, name) for name in names):
            return layout  # type: ignore[return-value]
    some = ", ".join(sorted(state)[:5]) or "nothing"
    raise ValueError(f"these weights are in no layout known here (oner_fast, EVA or timm's Eva with SwiGLU): {some}")


def without_prefix(state: Mapping[str, Tensor]) -> State:
    """Entries of a CLIP's vision tower, under the tower's own names; all entries where there is no prefix."""
    for prefix in _PREFIXES:
        if f"{prefix}pos_embed" in state:
            return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
    return dict(state)


def _rows(config: UTAConfig, layout: Layout) -> Iterator[_Row]:
    """Every tensor of the model except the positions of [CLS] and patches, which other layouts join into one tensor."""
    c, side = config, config.patch_size
    yield _Row("cls_token", ("cls_token",), (1, 1, c.width))
    if c.mask_token:
        yield _Row("patch_embedding.mask_token", ("mask_token",), (1, 1, c.width))
    yield _Row("patch_embedding.project.weight", ("patch_embed.proj.weight",), (c.width, len(c.image_mean), side, side))
    yield _Row("patch_embedding.project.bias", ("patch_embed.proj.bias",))
    gate, value = ("mlp.w1", "mlp.w2") if layout == "eva" else ("mlp.fc1_g", "mlp.fc1_x")
    for index in range(c.depth):
        ours, theirs = f"trunk.blocks.{index}.", f"blocks.{index}."
        for one, other in (_BLOCK | (_EVA if layout == "eva" else _TIMM)).items():
            yield _Row(ours + one, (theirs + other,))
        yield _Row(ours + "attention.qkv.weight", tuple(theirs + name for name in _QKV))
        for kind in ("weight", "bias"):
            yield _Row(f"{ours}mlp.gate_value.{kind}", (f"{theirs}{gate}.{kind}", f"{theirs}{value}.{kind}"))
    for kind in ("weight", "bias"):
        yield _Row(f"trunk.norm.{kind}", (f"norm.{kind}",))
        yield _Row(f"head.{kind}", (f"head.{kind}",))


def _convert(state: Mapping[str, Tensor], config: UTAConfig, layout: Layout) -> State:
    positions = torch.cat([state["cls_position"].unsqueeze(0), state["patch_embedding.positions"]])
    result = {"pos_embed": positions.unsqueeze(0)}
    for row in _rows(config, layout):
        parts = state[row.ours].chunk(len(row.theirs))
        for name, part in zip(row.theirs, parts, strict=True):
            result[name] = part.clone().view(row.shape or part.shape)
    return result


def _revert(state: Mapping[str, Tensor], config: UTAConfig, layout: Layout) -> State:
    given = _unfused(without_prefix(state), layout)
    rows = list(_rows(config, layout))
    wanted = {"pos_embed", *(name for row in rows for name in row.theirs)}
    missing = sorted(wanted - given.keys())
    unknown = sorted(name for name in given.keys() - wanted if "rope" not in name and name != "mask_token")
    if any("attn.inner_attn_ln" in name or "attn.norm" in name for name in unknown):
        raise ValueError(
            "these weights have a norm inside attention (attn.norm or attn.inner_attn_ln), as EVA-02-CLIP's do; UTA's "
            "student has none. Load such a CLIP whole, by the name of its model in open_clip: "
            "oner_fast.load('FILE:EVA02-B-16')"
        )
    if missing or unknown:
        raise ValueError(
            f"these weights ({layout} layout) are not those of the given configuration: "
            f"missing {_listed(missing)}; unknown {_listed(unknown)}"
        )
    positions = resample_positions(given["pos_embed"], config.grid).squeeze(0)
    result = {"cls_position": positions[0].clone(), "patch_embedding.positions": positions[1:].clone()}
    for row in rows:
        for name in row.theirs:
            if row.shape and given[name].shape != row.shape:
                raise ValueError(f"{name} must have shape {row.shape}, got {tuple(given[name].shape)}")
        joined = torch.cat([given[name] for name in row.theirs])
        # A convolution's weight becomes a Linear's; a token (1, 1, D) becomes (D,).
        result[row.ours] = joined.flatten({4: 1, 3: 0}[joined.ndim]) if row.shape else joined
    return result


def _unfused(state: State, layout: Layout) -> State:
    """Split fused products, and rename the biases of timm's fused layout to those of its split layout."""
    result: State = {}
    for name, tensor in state.items():
        block, _, end = name.rpartition("attn.")
        fused, kind = re.fullmatch(r"(.*mlp\.)(?:w12|fc1)\.(weight|bias)", name), name.rpartition(".")[2]
        if block and end == "qkv.weight":
            names = [block + each for each in _QKV]
        elif block and layout == "timm" and end in ("q_bias", "v_bias"):
            names = [f"{block}attn.{end[0]}_proj.bias"]
        elif fused:
            gate, value = ("w1", "w2") if layout == "eva" else ("fc1_g", "fc1_x")
            names = [f"{fused[1]}{each}.{kind}" for each in (gate, value)]
        else:
            names = [name]
        result |= dict(zip(names, tensor.chunk(len(names)), strict=True))
    return result


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") or "none"
