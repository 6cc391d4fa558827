"""Compute the towers of an `open_clip.CLIP` by this library's ops: the same parameters and embeddings, but faster.

Captions are packed without padding, patches go from bytes to the first product in one pass, and the last block of each
tower computes only the token that is pooled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from oner_fast import ops
from oner_fast.data.batch import TokenizedText
from oner_fast.models.clip import CLIPConfig, check_images
from oner_fast.nn.linear import packed_linear
from oner_fast.nn.packed_rows import place_in_caption, select_rows
from oner_fast.nn.transformer import Kept


def pack_tokens(ids: Tensor) -> TokenizedText:
    """Remove the padding after each end token from the output of CLIP's tokenizer, (B, context_length) on the CPU.

    The end token has the greatest id. Attention is causal, so no later token changes its output, which is the
    embedding.
    """
    lengths = ids.argmax(dim=1) + 1
    shown = torch.arange(ids.shape[1]) < lengths.unsqueeze(1)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    packed = ids[shown]
    return TokenizedText(packed, cu_seqlens, torch.zeros_like(packed, dtype=torch.int32)).measured()


def encode_image(model: nn.Module, images: Tensor, config: CLIPConfig) -> Tensor:
    """Compute `model.encode_image` of uint8 (B, 3, S, S), or floats in [0, 1], not yet normalised: (B, embed_dim).

    Raises:
        ValueError: the shape is not (B, 3, image_size, image_size).
    """
    check_images(images, config)
    visual: Any = model.visual
    batch, cells, width = images.shape[0], config.grid**2, config.vision_width
    device = images.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
    kept = torch.arange(cells, device=device).expand(batch, cells)
    patches = ops.gather_patches(images, kept, config.patch_size, config.image_mean, config.image_std, dtype)
    tokens = packed_linear(patches.flatten(0, 1), visual.conv1.weight.flatten(1), None).view(batch, cells, width)
    cls = visual.class_embedding.to(tokens.dtype).expand(batch, 1, width)
    x = torch.cat([cls, tokens], dim=1) + visual.positional_embedding
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * (1 + cells)
    first, tokens = starts[:-1].long(), visual.ln_pre(x.flatten(0, 1))
    pooled = _run(visual.transformer, tokens, starts, first, longest=1 + cells, causal=False)
    return visual.ln_post(pooled) @ visual.proj


def encode_text(model: nn.Module, text: TokenizedText) -> Tensor:
    """Compute `model.encode_text` of packed captions (see `pack_tokens`): (B, embed_dim)."""
    clip: Any = model
    starts = text.cu_seqlens
    places = place_in_caption(starts, text.input_ids.shape[0])
    x = clip.token_embedding(text.input_ids) + select_rows(clip.positional_embedding, places)
    longest = clip.positional_embedding.shape[0] if text.longest is None else text.longest
    pooled = _run(clip.transformer, x, starts, starts[1:].long() - 1, longest=longest, causal=True)
    return clip.ln_final(pooled) @ clip.text_projection


def _run(transformer: Any, x: Tensor, cu_seqlens: Tensor, pooled: Tensor, *, longest: int, causal: bool) -> Tensor:
    """Run the blocks on packed tokens (T, D); the last computes only the rows `pooled` (B,), one a sequence: (B, D).

    `longest` is an upper bound of the sequences' lengths.
    """
    one_each = torch.arange(cu_seqlens.shape[0], dtype=torch.int32, device=x.device)
    for block in transformer.resblocks[:-1]:
        x = _block(block, x, cu_seqlens, None, longest, causal)
    return _block(transformer.resblocks[-1], x, cu_seqlens, Kept(pooled, one_each), longest, causal)


def _block(block: Any, x: Tensor, cu_seqlens: Tensor, kept: Kept | None, longest: int, causal: bool) -> Tensor:
    attention, width = block.attn, x.shape[1]
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    hidden = block.ln_1(x)
    if kept is None:
        query, key, value = packed_linear(hidden, weight, bias).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
        boundaries = cu_seqlens
    else:
        query = packed_linear(hidden.index_select(0, kept.rows), weight[:width], bias[:width])
        query = query.unflatten(-1, (attention.num_heads, -1))
        pair = packed_linear(hidden, weight[width:], bias[width:]).unflatten(-1, (2, attention.num_heads, -1))
        key, value = pair.unbind(1)
        boundaries, x = kept.cu_seqlens, x.index_select(0, kept.rows)
    # Queries are aligned at the end, so that the one query of an end token sees its whole caption.
    mixed = ops.varlen_attention(
        query, key, value, boundaries, cu_seqlens, max_seqlen_q=longest, max_seqlen_k=longest, causal=causal
    )
    x = x + packed_linear(mixed.flatten(1), attention.out_proj.weight, attention.out_proj.bias)
    up, down = block.mlp.c_fc, block.mlp.c_proj
    wide = block.mlp.gelu(packed_linear(block.ln_2(x), up.weight, up.bias))
    return x + packed_linear(wide, down.weight, down.bias)
