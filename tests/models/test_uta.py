"""UTA's student against plain PyTorch, its forms against each other, and counts of parameters and operations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from oner_fast import _extension
from oner_fast.models.forward_flops import uta_flops
from oner_fast.models.uta import UTA, UTA_SIZES, UTAConfig
from oner_fast.nn.positions import resample_grid
from oner_fast.nn.rope import rope_angles
from oner_fast.nn.rotary_transformer import RotaryBlock
from oner_fast.nn.swiglu import silu_gate

SMALL = UTAConfig(16, 4, width=16, depth=2, heads=2, mlp_hidden=12, embed_dim=5, rope_theta=30.0)
CELLS = 16


def student(dtype: torch.dtype = torch.float64, **changes: Any) -> UTA:
    """Build a student whose parameters are all far from zero, so that each matters."""
    model = UTA(UTAConfig(**{**vars(SMALL), **changes})).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if "norm" in name and "weight" in name else 0.0))
    return model


def pictures(count: int = 3) -> Tensor:
    return torch.randint(256, (count, 3, 16, 16), dtype=torch.uint8)


def some_cells(count: int = 3, kept: int = 6) -> Tensor:
    return torch.rand(count, CELLS).argsort(dim=1)[:, :kept]


def plain_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias


def plain(model: UTA, images: Tensor, kept: Tensor | None = None, masked: Tensor | None = None) -> Tensor:
    """Embed all patches, add positions, then drop some, and rotate by matrices: (B, 1 + K, E)."""
    c, embedding = model.config, model.patch_embedding
    mean, std = (torch.tensor(each, dtype=torch.float64).view(3, 1, 1) for each in (c.image_mean, c.image_std))
    pixels = (images.double() / 255 - mean) / std
    weight = embedding.project.weight.view(c.width, 3, c.patch_size, c.patch_size)
    tokens = F.conv2d(pixels, weight, embedding.project.bias, stride=c.patch_size).flatten(2).transpose(1, 2)
    if masked is not None:
        assert embedding.mask_token is not None
        tokens = torch.where(masked.unsqueeze(-1), embedding.mask_token, tokens)
    kept = torch.arange(CELLS).expand(len(images), CELLS) if kept is None else kept
    tokens = (tokens + embedding.positions).gather(1, kept.unsqueeze(-1).expand(-1, -1, c.width))
    x = torch.cat([(model.cls_token + model.cls_position).expand(len(images), 1, -1), tokens], dim=1)
    angles = rope_angles(c.grid, c.width // c.heads, c.rope_theta, c.rope_grid)[kept]  # [B, K, Dh / 2]
    for block in model.trunk.blocks:
        assert isinstance(block, RotaryBlock)
        x = x + plain_attention(block, plain_norm(block.norm_attention, x), angles, c.heads)
        mlp, normed = block.mlp, plain_norm(block.norm_mlp, x)
        gate, value = F.linear(normed, mlp.gate_value.weight, mlp.gate_value.bias).split(c.mlp_hidden, dim=-1)
        hidden = plain_norm(mlp.norm, gate / (1 + (-gate).exp()) * value)
        x = x + F.linear(hidden, mlp.out.weight, mlp.out.bias)
    return F.linear(plain_norm(model.trunk.norm, x), model.head.weight, model.head.bias)


def plain_attention(block: RotaryBlock, x: Tensor, angles: Tensor, heads: int) -> Tensor:
    attention, width = block.attention, x.shape[-1]
    biases = (attention.q_bias, torch.zeros(width, dtype=x.dtype), attention.v_bias)
    query, key, value = (
        (x @ weight.t() + bias).unflatten(-1, (heads, -1)).transpose(1, 2)
        for weight, bias in zip(attention.qkv.weight.split(width), biases, strict=True)
    )

    def turn(each: Tensor) -> Tensor:
        cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
        patches = each[:, :, 1:]
        a, b = patches[..., 0::2], patches[..., 1::2]
        pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
        return torch.cat([each[:, :, :1], pairs.flatten(-2)], dim=2)

    scores = turn(query) @ turn(key).transpose(-1, -2) / math.sqrt(width // heads)
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    return mixed @ attention.out.weight.t() + attention.out.bias


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_outputs_and_gradients_equal_plain_pytorchs() -> None:
    model, images, kept = student(), pictures(), some_cells()
    factor = torch.randn(3, 7, 5, dtype=torch.float64)
    parameters = list(model.parameters())
    ours, theirs = model(images, kept), plain(model, images, kept)
    same(ours, theirs)
    for name, one, other in zip(
        [name for name, _ in model.named_parameters()],
        torch.autograd.grad((ours * factor).sum(), parameters),
        torch.autograd.grad((theirs * factor).sum(), parameters),
        strict=True,
    ):
        assert one.abs().max() > 0, name
        same(one, other)


def test_all_cells_enter_by_default() -> None:
    model, images = student(), pictures()
    all_cells = torch.arange(CELLS).expand(3, CELLS)
    same(model(images), plain(model, images))
    same(model(images, all_cells), model(images))
    shuffled = all_cells[:, torch.randperm(CELLS)]
    same(model(images, shuffled)[:, 1:], model(images)[:, 1:].gather(1, shuffled.unsqueeze(-1).expand(-1, -1, 5)))


def test_packed_images_may_keep_different_numbers_of_cells() -> None:
    model, images = student(), pictures()
    kept = [torch.randperm(CELLS)[:count] for count in (4, 0, 9)]
    cu_seqlens = torch.tensor([0, 4, 4, 13], dtype=torch.int32)
    outputs, cu_out = model(images, torch.cat(kept), cu_seqlens)
    assert cu_out.tolist() == [0, 5, 6, 16] and cu_out.dtype == torch.int32
    for index, one in enumerate(outputs.split([5, 1, 10])):
        same(one, plain(model, images[index : index + 1], kept[index].unsqueeze(0))[0])
    same(model(images, kept[0].expand(3, 4))[0], outputs[:5])


def test_masked_cells_become_mask_tokens_in_their_places() -> None:
    model, images = student(mask_token=True), pictures()
    masked = torch.zeros(3, CELLS, dtype=torch.bool).scatter(1, some_cells(), True)
    outputs = model(images, masked=masked)
    same(outputs, plain(model, images, masked=masked))
    outputs.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(ValueError, match="either kept or masked"):
        model(images, some_cells(), masked=masked)
    with pytest.raises(ValueError, match="mask_token=False"):
        student()(images, masked=masked)
    with pytest.raises(ValueError, match="flat kept"):
        model(images, None, torch.tensor([0, 1, 2, 3], dtype=torch.int32))


def test_encoders_return_parts_of_the_forward() -> None:
    model, images = student().eval(), pictures()
    outputs = model(images)
    same(model.encode_image(images), outputs[:, 0])
    same(model.encode_patches(images), outputs[:, 1:])
    same(model.head(model.encode_image(images, projected=False)), outputs[:, 0])
    assert model.encode_patches(images, projected=False).shape == (3, CELLS, 16)


def test_floating_images_are_in_the_unit_interval_before_they_are_normalised() -> None:
    model, images = student(torch.float32), pictures()
    floats = (images.float() / 255 - torch.tensor(SMALL.image_mean).view(3, 1, 1)) / torch.tensor(SMALL.image_std).view(
        3, 1, 1
    )
    torch.testing.assert_close(model(images.float() / 255), model(images))
    assert not torch.allclose(model(floats), model(images), atol=1e-2)


def test_checkpointing_changes_no_gradient() -> None:
    model, images, kept = student(grad_checkpointing=True), pictures(), some_cells()
    found = []
    for model.trunk.grad_checkpointing in (True, False):
        model.zero_grad()
        model(images, kept).square().sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*found, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


def test_bfloat16_autocast() -> None:
    model, images, kept = student(torch.float32), pictures(12), some_cells(12)
    exact = model(images, kept)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(images, kept)
    outputs.float().square().sum().backward()
    assert outputs.dtype == torch.bfloat16
    assert F.cosine_similarity(outputs.float(), exact, dim=-1).min() > 0.99
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_silu_gate() -> None:
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(silu_gate, x)
    same(silu_gate(x), F.silu(x[:, :4]) * x[:, 4:])


def test_branches_start_smaller_the_deeper_they_are() -> None:
    torch.manual_seed(0)
    model = UTA(UTAConfig(16, 4, width=64, depth=3, heads=2, mlp_hidden=96, embed_dim=64))
    std = 0.02
    for layer, block in enumerate(model.trunk.blocks, start=1):
        assert isinstance(block, RotaryBlock)
        for linear in (block.attention.out, block.mlp.out):
            assert linear.weight.std().item() == pytest.approx(std / math.sqrt(2 * layer), rel=0.06)
            assert linear.bias.abs().max() == 0
        assert block.attention.qkv.weight.std().item() == pytest.approx(std, rel=0.06)
        assert block.mlp.gate_value.weight.std().item() == pytest.approx(std, rel=0.06)
    for weight in (model.head.weight, model.patch_embedding.project.weight, model.patch_embedding.positions):
        assert weight.std().item() == pytest.approx(std, rel=0.1)


@pytest.mark.parametrize(("size", "millions"), [("b", 86.6), ("l", 304.6), ("g", 1013.4)])
def test_parameters_of_the_sizes(size: str, millions: float) -> None:
    with torch.device("meta"):
        model = UTA(UTA_SIZES[size])
    c = UTA_SIZES[size]
    block = 4 * c.width**2 + 3 * c.width + 3 * c.width * c.mlp_hidden + 4 * c.mlp_hidden + c.width + 4 * c.width
    rest = (3 * c.patch_size**2 + 1) * c.width + (2 + c.cells + 2) * c.width + (c.width + 1) * c.embed_dim
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == c.depth * block + rest
    assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize(("size", "whole", "half"), [("b", 23.4, 11.4), ("l", 81.3, 40.0), ("g", 267, 132)])
def test_operations_of_the_sizes(size: str, whole: float, half: float) -> None:
    """Check GMAC at 224 px and patch 14, with 256 patches or half of them, and [CLS]."""
    config = UTAConfig(**{**vars(UTA_SIZES[size]), "image_size": 224, "patch_size": 14})
    assert uta_flops(config, [257]) / 2e9 == pytest.approx(whole, rel=0.005)
    assert uta_flops(config, [129]) / 2e9 == pytest.approx(half, rel=0.005)


@pytest.mark.skipif(not _extension.status().loaded, reason=_extension.status().reason or "built")
def test_operations_equal_the_count_of_a_run() -> None:
    model, images = student(torch.float32), pictures()
    cu_seqlens = torch.tensor([0, 4, 5, 13], dtype=torch.int32)
    kept = torch.cat([torch.randperm(CELLS)[:count] for count in (4, 1, 8)])
    with FlopCounterMode(display=False) as counter:
        model(images, kept, cu_seqlens)
    assert counter.get_total_flops() == uta_flops(SMALL, [5, 2, 9])
    masked = torch.zeros(3, CELLS, dtype=torch.bool).scatter(1, some_cells(), True)
    model = student(torch.float32, mask_token=True)
    with FlopCounterMode(display=False) as counter:
        model(images, masked=masked)
    assert counter.get_total_flops() == uta_flops(SMALL, [17] * 3, patches=30)


def test_images_of_another_size_take_resampled_positions_and_their_own_rotations() -> None:
    model = student()
    larger = student(image_size=24)
    name = "patch_embedding.positions"
    larger.load_state_dict(model.state_dict() | {name: resample_grid(model.patch_embedding.positions.detach(), 6)})
    images = torch.randint(256, (2, 3, 24, 24), dtype=torch.uint8)
    kept, ends = torch.tensor([0, 7, 35, 3, 8]), torch.tensor([0, 3, 5], dtype=torch.int32)
    for _ in range(2):  # the second time from memory
        with torch.inference_mode():
            same(model.encode_image(images), larger.encode_image(images))
        with torch.no_grad():
            same(model.encode_patches(images), larger.encode_patches(images))
            same(model(images, kept, ends)[0], larger(images, kept, ends)[0])
    with pytest.raises(ValueError, match="multiple of the patch size 4"):
        model.encode_image(images[..., :22, :22])
