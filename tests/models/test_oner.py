from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oner_fast.models.oner import ImageInput, OneR, OneRConfig, Pass, PassOutput, TextInput
from oner_fast.nn import transformer
from oner_fast.nn.transformer import Attention, Block, Trunk

SMALL = OneRConfig(
    image_size=12, patch_size=4, width=8, depth=2, heads=2, vocab_size=13, max_text_tokens=6, embed_dim=5,
    projector_hidden=7,
)  # fmt: skip
LENGTHS = [3, 1, 5]
CELLS = 9


def tower(dtype: torch.dtype = torch.float64, **changes: Any) -> OneR:
    """Build a tower whose parameters are all far from zero, so that each matters."""
    model = OneR(OneRConfig(**{**vars(SMALL), **changes})).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if "norm" in name and "weight" in name else 0.0))
    return model


def texts(lengths: list[int] = LENGTHS) -> TextInput:
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return TextInput(torch.randint(13, (sum(lengths),)), ends)


def pictures(count: int = 3) -> Tensor:
    return torch.randint(256, (count, 3, 12, 12), dtype=torch.uint8)


def masks(count: int = 3, cells: int = CELLS, hidden: int = 4) -> Tensor:
    return torch.rand(count, cells).argsort(dim=1) < hidden


# The same tower in plain PyTorch, padded, one pass at a time.


def plain_patches(model: OneR, image: ImageInput) -> Tensor:
    """Embed patches by a convolution, put in mask tokens and add positions: (B, M, D)."""
    c, embedding = model.config, model.patch_embedding
    dtype = embedding.project.weight.dtype
    pixels = image.images.to(dtype) / (255 if image.images.dtype == torch.uint8 else 1)
    pixels = (pixels - torch.tensor(c.image_mean, dtype=dtype).view(3, 1, 1)) / torch.tensor(
        c.image_std, dtype=dtype
    ).view(3, 1, 1)
    weight = embedding.project.weight.view(c.width, 3, c.patch_size, c.patch_size)
    tokens = F.conv2d(pixels, weight, embedding.project.bias, stride=c.patch_size).flatten(2).transpose(1, 2)
    if image.cells is not None:
        tokens = tokens.gather(1, image.cells.unsqueeze(-1).expand(-1, -1, c.width))
    if image.masked is not None:
        tokens = torch.where(image.masked.unsqueeze(-1), embedding.mask_token, tokens)
    cells = torch.arange(tokens.shape[1]).expand(tokens.shape[:2]) if image.cells is None else image.cells
    return tokens + embedding.positions[cells]


def plain_words(model: OneR, text: TextInput) -> list[Tensor]:
    """Embed each caption: (L, D)."""
    embedding = model.word_embedding
    parts = text.input_ids.split(text.cu_seqlens.diff().tolist())
    return [embedding.words.weight[part] + embedding.positions[: len(part)] for part in parts]


def padded(sequences: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad sequences with 7s to (B, L, D), with (B, L) True at tokens."""
    longest = max(map(len, sequences))
    rows = [torch.cat([one, one.new_full((longest - len(one), one.shape[1]), 7.0)]) for one in sequences]
    seen = [torch.arange(longest) < len(one) for one in sequences]
    return torch.stack(rows), torch.stack(seen)


def plain_attention(attention: Attention, x: Tensor, source: Tensor, seen: Tensor) -> Tensor:
    width, heads = x.shape[-1], attention.heads

    def part(index: int, tokens: Tensor) -> Tensor:
        rows = slice(index * width, (index + 1) * width)
        mapped = F.linear(tokens, attention.qkv.weight[rows], attention.qkv.bias[rows])
        return mapped.view(*tokens.shape[:2], heads, width // heads).transpose(1, 2)

    query, key, value = part(0, x), part(1, source), part(2, source)
    scores = query @ key.transpose(-1, -2) / math.sqrt(width // heads)
    mixed = scores.masked_fill(~seen[:, None, None], -math.inf).softmax(-1) @ value
    return F.linear(mixed.transpose(1, 2).flatten(2), attention.out.weight, attention.out.bias)


def plain_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def plain_mlp(block: Block, x: Tensor) -> Tensor:
    hidden = F.linear(x, block.mlp.up.weight, block.mlp.up.bias)
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    return F.linear(hidden, block.mlp.out.weight, block.mlp.out.bias)


def plain_trunk(trunk: Trunk, streams: list[list[Tensor]]) -> list[list[Tensor]]:
    """Run one stream with self-attention, or two in lock step, each with keys from the other's same-layer input."""
    both = [padded(stream) for stream in streams]
    xs, seen = [x for x, _ in both], [mask for _, mask in both]
    for block in trunk.blocks:
        assert isinstance(block, Block)
        normed = [plain_norm(block.norm_attention, x) for x in xs]
        for index in range(len(xs)):
            other = len(xs) - 1 - index
            xs[index] = xs[index] + plain_attention(block.attention, normed[index], normed[other], seen[other])
        xs = [x + plain_mlp(block, plain_norm(block.norm_mlp, x)) for x in xs]
    xs = [plain_norm(trunk.norm, x) for x in xs]
    return [[row[mask] for row, mask in zip(x, s, strict=True)] for x, s in zip(xs, seen, strict=True)]


def sequences(model: OneR, image: ImageInput | None, text: TextInput | None) -> list[Tensor]:
    """Join [CLS], patches and words of each sample."""
    count = image.images.shape[0] if image is not None else text.cu_seqlens.shape[0] - 1  # type: ignore[union-attr]
    patches = [] if image is None else plain_patches(model, image)
    words = [] if text is None else plain_words(model, text)
    cls = model.cls_token.unsqueeze(0)
    return [torch.cat([cls, *(part[i] for part in (patches, words) if len(part))]) for i in range(count)]


def plain_output(outputs: list[Tensor], patches: int) -> PassOutput:
    cls = torch.stack([one[0] for one in outputs])
    words = torch.cat([one[1 + patches :] for one in outputs])
    spatial = torch.stack([one[1 : 1 + patches] for one in outputs]) if patches else None
    return PassOutput(cls, spatial, words if len(words) or not patches else None)


def plain_passes(model: OneR, passes: list[Pass]) -> dict[str, PassOutput]:
    given = {each.name: each for each in passes}
    found: dict[str, PassOutput] = {}
    for name, each in given.items():
        image, text = each.shown()
        patches = 0 if image is None else CELLS if image.cells is None else image.cells.shape[1]
        trunk = model.text_trunk if model.text_trunk is not None and name == "text" else model.trunk
        if name in ("image", "text", "image_text"):
            found[name] = plain_output(plain_trunk(trunk, [sequences(model, image, text)])[0], patches)
    if "image_given_text" in given:
        image, text = given["image_given_text"].image, given["text_given_image"].text
        assert image is not None
        patches = CELLS if image.cells is None else image.cells.shape[1]
        streams = plain_trunk(model.trunk, [sequences(model, image, None), sequences(model, None, text)])
        found["image_given_text"] = plain_output(streams[0], patches)
        found["text_given_image"] = plain_output(streams[1], 0)
    return found


def tensors(model: OneR, outputs: dict[Any, PassOutput]) -> list[Tensor]:
    """Compute all outputs and the projected [CLS] of each pass, by the pass's name."""
    found = []
    for name, output in sorted(outputs.items()):
        found += [each for each in output if each is not None] + [model.project(output.cls, name)]
    return found


def compare(model: OneR, passes: list[Pass], forward: float, backward: float) -> None:
    """Compare one packed batch with padded passes: each output, and the gradient of each parameter."""
    ours, theirs = tensors(model, model(passes)), tensors(model, plain_passes(model, passes))
    assert [each.shape for each in ours] == [each.shape for each in theirs]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=forward, atol=forward)
    upstream = [torch.randn_like(each) for each in ours]
    parameters = list(model.parameters())
    mine = torch.autograd.grad(ours, parameters, upstream, allow_unused=True)
    plain = torch.autograd.grad(theirs, parameters, upstream, allow_unused=True)
    for (name, parameter), one, other in zip(model.named_parameters(), mine, plain, strict=True):
        zeros = torch.zeros_like(parameter)
        one, other = zeros if one is None else one, zeros if other is None else other
        scale = max(float(other.abs().max()), 1.0)
        torch.testing.assert_close(one, other, rtol=0, atol=backward * scale, msg=lambda text, n=name: f"{n}: {text}")


def all_passes(masked: bool, dropped: bool) -> list[Pass]:
    cells = torch.stack([torch.randperm(CELLS)[:6].sort().values for _ in range(3)]) if dropped else None
    hidden = [masks(3, 6 if dropped else CELLS) if masked else None for _ in range(2)]
    images = pictures()
    first, joint = (ImageInput(images, cells, each) for each in hidden)
    text, other = texts(), texts()
    return [
        Pass("image", first), Pass("text", text=text), Pass("image_text", joint, other),
        Pass("image_given_text", first), Pass("text_given_image", text=text),
    ]  # fmt: skip


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropped", [False, True])
def test_packed_passes_equal_padded_ones(masked: bool, dropped: bool) -> None:
    compare(tower(), all_passes(masked, dropped), 1e-10, 1e-10)


def test_packed_passes_equal_padded_ones_in_float32() -> None:
    compare(tower(torch.float32), all_passes(True, False), 2e-5, 1e-4)


@pytest.mark.parametrize("order", [[0], [1], [2], [2, 1, 0], [4, 0, 3]])
def test_passes_may_be_chosen_and_ordered_freely(order: list[int]) -> None:
    passes = all_passes(True, False)
    compare(tower(), [passes[index] for index in order], 1e-10, 1e-10)


def test_two_trunks_and_two_heads_equal_their_padded_passes() -> None:
    passes = all_passes(True, True)[:2]
    compare(tower(shared_trunk=False), passes, 1e-10, 1e-10)
    compare(tower(shared_trunk=False, shared_head=False), passes, 1e-10, 1e-10)
    compare(tower(shared_head=False), all_passes(True, True), 1e-10, 1e-10)


@pytest.mark.parametrize("masked", [False, True])
def test_shapes(masked: bool) -> None:
    model = tower(torch.float32)
    outputs = model(all_passes(masked, False))
    assert list(outputs) == ["image", "text", "image_text", "image_given_text", "text_given_image"]
    patches, words = (3, CELLS, 8), (9, 8)
    for name, first, second in (
        ("image", patches, None), ("text", None, words), ("image_text", patches, words),
        ("image_given_text", patches, None), ("text_given_image", None, words),
    ):  # fmt: skip
        output = outputs[name]
        assert output.cls.shape == (3, 8)
        assert (None if output.patches is None else tuple(output.patches.shape)) == first
        assert (None if output.words is None else tuple(output.words.shape)) == second
        assert model.project(output.cls, name).shape == (3, 5)
    text = texts()
    assert model.encode_image(pictures()).shape == (3, 5)
    assert model.encode_text(text.input_ids, text.cu_seqlens).shape == (3, 5)
    assert model.encode_image_text(pictures(), text.input_ids, text.cu_seqlens).shape == (3, 5)
    assert model.encode_patches(pictures()).shape == (3, CELLS, 5)


def test_encoders_return_the_projected_passes() -> None:
    model, image, text = tower(), ImageInput(pictures()), texts()
    plain = plain_passes(model, [Pass("image", image), Pass("text", text=text), Pass("image_text", image, text)])
    ids = text.input_ids, text.cu_seqlens
    torch.testing.assert_close(model.encode_image(image.images), model.head(plain["image"].cls))
    torch.testing.assert_close(model.encode_text(*ids), model.head(plain["text"].cls))
    torch.testing.assert_close(model.encode_image_text(image.images, *ids), model.head(plain["image_text"].cls))
    patches = plain["image"].patches
    assert patches is not None
    torch.testing.assert_close(model.encode_patches(image.images), model.head(patches))


def test_floats_in_0_to_1_are_the_same_image() -> None:
    model, images = tower(), pictures()
    torch.testing.assert_close(model.encode_image(images), model.encode_image(images.double() / 255))


def test_one_trunk_one_head_and_two_input_maps() -> None:
    """Only the input maps belong to one modality."""
    model = tower()
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {
        "patch_embedding", "word_embedding", "cls_token", "trunk", "head",
    }  # fmt: skip
    parts = {name.split(".", 1)[1] for name, _ in model.named_parameters() if name.startswith(("patch_", "word_"))}
    assert parts == {"project.weight", "project.bias", "positions", "mask_token", "words.weight"}
    common = {name for name, _ in model.named_parameters() if not name.startswith(("patch_", "word_"))}
    passes = all_passes(True, False)
    for each, own in ((passes[0], "patch_embedding"), (passes[1], "word_embedding")):
        model.zero_grad()
        output = model([each])[each.name]
        tokens = output.patches if output.words is None else output.words
        (model.project(output.cls, each.name).square().sum() + tokens.square().sum()).backward()
        used = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert used == common | {name for name, _ in model.named_parameters() if name.startswith(own)}


def test_no_token_or_embedding_marks_the_modality() -> None:
    """The trunk's input is exactly [CLS], patches with positions and words with positions, in this order."""
    model, image, text = tower(), ImageInput(pictures()), texts()
    seen: list[Tensor] = []
    model.trunk.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model([Pass("image_text", image, text)])
    expected = torch.cat(sequences(model, image, text))
    torch.testing.assert_close(seen[0], expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(seen[0][0], model.cls_token) and torch.equal(seen[0][1 + CELLS + 3], model.cls_token)


def test_no_padding_token_is_ever_computed() -> None:
    model = tower()
    seen: list[int] = []
    model.trunk.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[0]))
    model(all_passes(False, False))
    words = sum(LENGTHS)
    assert seen == [2 * 3 * (1 + CELLS) + 2 * (3 + words) + 3 * (1 + CELLS) + words]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pixels_of_masked_patches_change_nothing(dtype: torch.dtype) -> None:
    model, images, masked = tower(dtype), torch.rand(3, 3, 12, 12, dtype=dtype), masks()
    text = texts()
    spots = masked.view(3, 1, 3, 3).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = torch.where(spots, math.nan, images)
    first, second = (
        model([Pass("image", each), Pass("image_text", each, text)])
        for each in (ImageInput(images, masked=masked), ImageInput(other, masked=masked))
    )
    for one, two in zip(tensors(model, first), tensors(model, second), strict=True):
        assert one.isfinite().all() and torch.equal(one, two)


def test_pixels_of_dropped_patches_are_never_read() -> None:
    model, images = tower(), torch.rand(2, 3, 12, 12, dtype=torch.float64)
    cells = torch.tensor([[0, 2, 4, 5, 8], [1, 2, 3, 6, 7]])
    kept = torch.zeros(2, CELLS, dtype=torch.bool).scatter_(1, cells, True)
    spots = kept.view(2, 1, 3, 3).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = torch.where(spots, images, math.nan)
    whole = model.patch_embedding(images)
    dropped = model.patch_embedding(other, cells)
    torch.testing.assert_close(dropped, whole.gather(1, cells.unsqueeze(-1).expand(-1, -1, 8)), rtol=1e-12, atol=1e-12)


def test_the_mask_token_takes_a_masked_patchs_place() -> None:
    embedding, images, masked = tower().patch_embedding, pictures(), masks()
    tokens, whole = embedding(images, masked=masked), embedding(images)
    assert tokens.shape == whole.shape
    places = torch.arange(CELLS).expand(3, CELLS)
    assert torch.equal(tokens[masked], embedding.mask_token + embedding.positions[places[masked]])
    torch.testing.assert_close(tokens[~masked], whole[~masked], rtol=1e-12, atol=1e-12)
    everything = embedding(images, masked=torch.ones(3, CELLS, dtype=torch.bool))
    assert torch.equal(everything, (embedding.mask_token + embedding.positions).expand(3, -1, -1))


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    model, images, text = tower(torch.float32), pictures(), texts()
    ids = text.input_ids.clone()
    ids[3:] = torch.randint(13, (6,))
    changed = torch.cat([images[:1], pictures(2)])
    for first, second in (
        (model.encode_image(images), model.encode_image(changed)),
        (model.encode_text(text.input_ids, text.cu_seqlens), model.encode_text(ids, text.cu_seqlens)),
        (
            model.encode_image_text(images, text.input_ids, text.cu_seqlens),
            model.encode_image_text(changed, ids, text.cu_seqlens),
        ),
    ):
        assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])


def test_a_ragged_batch_equals_its_samples_one_by_one() -> None:
    model, images, text = tower(), pictures(), texts([3, 0, 6])
    together = model.encode_image_text(images, text.input_ids, text.cu_seqlens)
    words = model.encode_text(text.input_ids, text.cu_seqlens)
    for i, ids in enumerate(text.input_ids.split([3, 0, 6])):
        ends = torch.tensor([0, len(ids)], dtype=torch.int32)
        torch.testing.assert_close(model.encode_image_text(images[i : i + 1], ids, ends)[0], together[i])
        torch.testing.assert_close(model.encode_text(ids, ends)[0], words[i])


def test_the_order_of_words_matters() -> None:
    model, text = tower(), texts([5])
    turned = model.encode_text(text.input_ids.flip(0), text.cu_seqlens)
    assert not torch.allclose(model.encode_text(text.input_ids, text.cu_seqlens), turned)


@pytest.mark.parametrize("training", [True, False])
def test_checkpointing_gives_equal_gradients(monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    calls: list[object] = []
    original = transformer.checkpoint

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments[0])
        return original(*arguments, **options)

    monkeypatch.setattr(transformer, "checkpoint", counted)
    plainly = tower(torch.float32).train(training)
    model = OneR(OneRConfig(**{**vars(SMALL), "grad_checkpointing": True})).train(training)
    model.load_state_dict(plainly.state_dict())
    passes = all_passes(True, False)
    found = []
    for each in (plainly, model):
        outputs = tensors(each, each(passes))
        found.append(torch.autograd.grad([one.square().sum() for one in outputs], list(each.parameters())))
    assert len(calls) == (2 if training else 0)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        model(passes)
    assert len(calls) == (2 if training else 0)


def test_two_trunks_share_only_cls_and_head() -> None:
    model = tower(shared_trunk=False)
    assert model.text_trunk is not None
    passes = all_passes(False, False)
    model.zero_grad()
    model.project(model([passes[1]])["text"].cls, "text").sum().backward()
    assert all(parameter.grad is None for parameter in model.trunk.parameters())
    assert all(parameter.grad is not None for parameter in model.text_trunk.parameters())
    with pytest.raises(ValueError, match="two trunks run the passes image and text only"):
        model(passes[:3])


def test_the_text_head_is_for_the_text_pass_alone() -> None:
    model = tower(shared_head=False)
    cls = torch.randn(3, 8, dtype=torch.float64)
    assert model.text_head is not None
    assert torch.equal(model.project(cls, "text"), model.text_head(cls))
    for name in ("image", "image_text", "image_given_text", "text_given_image"):
        assert torch.equal(model.project(cls, name), model.head(cls))  # type: ignore[arg-type]


def test_heads_hold_no_batch_statistics() -> None:
    model = tower(shared_head=False)
    assert {type(module) for module in model.head.modules()} - {type(model.head)} == {nn.Linear, nn.LayerNorm, nn.GELU}
    sizes = [module.weight.shape for module in model.head if isinstance(module, nn.Linear)]
    assert sizes == [(7, 8), (7, 7), (5, 7)]
    assert not list(model.buffers())


def test_the_default_is_vit_b_16() -> None:
    config = OneRConfig()
    with torch.device("meta"):
        model = OneR(config)
    trunk = sum(parameter.numel() for parameter in model.trunk.parameters())
    assert trunk == 12 * (12 * 768**2 + 13 * 768) + 2 * 768
    assert model.patch_embedding.positions.shape == (196, 768) and model.word_embedding.positions.shape == (78, 768)


def test_bf16_autocast_is_close_to_float32() -> None:
    model = tower(torch.float32)
    passes = all_passes(True, False)
    plain = tensors(model, model(passes))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = tensors(model, model(passes))
    for one, other in zip(plain, cast, strict=True):
        assert (one - other.float()).norm() < 0.05 * one.norm()


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (lambda: [], "at least one pass"),
        (lambda: [Pass("text", text=texts())] * 2, r"each pass may be given once, got \['text', 'text'\]"),
        (lambda: [Pass("image", text=texts())], "pass image needs an image input, got None"),
        (lambda: [Pass("text", ImageInput(pictures()))], "pass text needs a text input, got None"),
        (lambda: [Pass("image_text", ImageInput(pictures()))], "pass image_text needs a text input"),
        (lambda: [Pass("image_given_text", ImageInput(pictures()))], "together with text_given_image; give both"),
        (lambda: [Pass("text_given_image", text=texts())], "together with image_given_text; give both"),
        (lambda: [Pass("image_text", ImageInput(pictures(2)), texts())], "one caption for each image, got 2 and 3"),
        (
            lambda: [Pass("image_given_text", ImageInput(pictures())), Pass("text_given_image", text=texts([1]))],
            "image_given_text and text_given_image need one caption for each image, got 1 and 3",
        ),
        (lambda: [Pass("image", ImageInput(pictures(0)))], "pass image must hold at least one sample"),
        (lambda: [Pass("text", text=texts([]))], "pass text must hold at least one sample"),
        (lambda: [Pass("image", ImageInput(pictures()[..., :8]))], r"shape \(B, C, 12, 12\), or.*got.*12, 8\)"),
        (lambda: [Pass("text", text=texts([7]))], "captions may hold 6 tokens, got one of 7"),
        (
            lambda: [Pass("image", ImageInput(pictures(2), masked=torch.eye(2, 9).bool() | (torch.arange(9) == 0)))],
            r"same number of patches in every image, got \[1, 2\]",
        ),
    ],
)
def test_bad_passes_are_named(passes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tower()(passes())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 9}, "width must be a multiple of heads, got width 9 and heads 2"),
        ({"image_size": 13}, "image_size must be a multiple of patch_size 4, got 13"),
    ],
)
def test_bad_sizes_are_named(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tower(**changes)


def test_linear_maps_of_the_trunk_begin_by_their_fan_in() -> None:
    torch.manual_seed(0)
    model = OneR(OneRConfig(**{**vars(SMALL), "width": 64, "depth": 3}))
    for name, module in model.trunk.named_modules():
        if isinstance(module, nn.Linear):
            gain = 1 / math.sqrt(6) if name.endswith(".out") else 1.0  # branches: 2 x depth of them are added
            assert module.weight.std().item() * math.sqrt(module.in_features) == pytest.approx(gain, rel=0.05), name
            assert not module.bias.any()


def test_a_projector_without_hidden_layers_is_linear() -> None:
    model = tower(projector_hidden=0)
    assert [tuple(each.shape) for each in model.head.state_dict().values()] == [(5, 8), (5,)]
    cls = torch.randn(4, 8, dtype=torch.float64)
    assert torch.equal(model.head(cls), F.linear(cls, model.head[0].weight, model.head[0].bias))
