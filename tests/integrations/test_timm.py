"""timm's models under `patch()`: what a script computes that differs from another by that line alone."""

from __future__ import annotations

import importlib.util
import io
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oner_fast.integrations import dense_attention, fallback
from oner_fast.models.optional_packages import optional_package
from oner_fast.ops import masked_gather

if importlib.util.find_spec("timm") is None:
    pytest.skip("needs timm (pip install $(oner-fast requirements clip))", allow_module_level=True)

from oner_fast.integrations import timm as integration
from oner_fast.integrations.timm import patch, unpatch

timm = optional_package("timm")

TRAIN = """
import timm, torch
{line}
torch.manual_seed(0)
model = {model}
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
losses = []
for step in range(2):
    images = torch.rand(3, 3, {side}, {side})
    loss = torch.nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
gradients = {{name: p.grad for name, p in model.named_parameters()}}
"""
LINE = "import oner_fast.integrations.timm; oner_fast.integrations.timm.patch()"
TINY = "img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3"


def vit(options: str, name: str = "VisionTransformer") -> str:
    return f"timm.models.vision_transformer.{name}({TINY}, {options})"


MODELS = {
    "cls": vit("patch_drop_rate=0.5, proj_drop_rate=0.1"),
    "no cls": vit("class_token=False, global_pool='avg', patch_drop_rate=0.3"),
    "registers": vit("reg_tokens=3, patch_drop_rate=0.5, qk_norm=True"),
    "dynamic": vit("dynamic_img_size=True, patch_drop_rate=0.5"),
    "pooled": vit("class_token=False, global_pool='map'"),
    "parallel": vit("block_fn=timm.models.vision_transformer.ParallelScalingBlock"),
    "eva": f"timm.models.eva.Eva({TINY}, use_rot_pos_emb=True, patch_drop_rate=0.5)",
}


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    yield
    unpatch()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the queries that our attention has served."""
    shapes: list[tuple[int, ...]] = []
    original = dense_attention.attend

    def attend(query: Tensor, *rest: Any, **options: Any) -> Tensor:
        shapes.append(tuple(query.shape))
        return original(query, *rest, **options)

    monkeypatch.setattr(dense_attention, "attend", attend)
    return shapes


def run(model: str, line: str, side: int = 32) -> dict[str, Any]:
    space: dict[str, Any] = {}
    exec(TRAIN.format(model=model, line=line, side=side), space)
    return space


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.integrations] if name not in ("cls", "registers", "pooled") else [])
        for name in MODELS
    ],
)
def test_one_line_trains_to_the_same_losses(name: str, served: list[Any]) -> None:
    side = 40 if name == "dynamic" else 32
    theirs = run(MODELS[name], "", side)
    assert not served
    with warnings.catch_warnings():
        warnings.simplefilter("error", fallback.Fallback)
        ours = run(MODELS[name], LINE, side)
    assert len(served) == 2 * (3 if name == "pooled" else 2)  # steps and layers
    torch.testing.assert_close(ours["losses"], theirs["losses"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours["gradients"], theirs["gradients"], rtol=1e-4, atol=1e-5)
    assert ours["model"].state_dict().keys() == theirs["model"].state_dict().keys()


@pytest.mark.parametrize("with_indices", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("ordered", [False, True])
def test_patch_dropout_keeps_timms_bits(
    with_indices: bool, prefix: int, ordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered: list[tuple[int, ...]] = []

    def gather(tokens: Tensor, rows: Tensor) -> Tensor:
        gathered.append(tuple(tokens.shape))
        return masked_gather(tokens, rows)

    monkeypatch.setattr(integration, "masked_gather", gather)
    kind = timm.layers.PatchDropoutWithIndices if with_indices else timm.layers.PatchDropout
    layer = kind(0.4, num_prefix_tokens=prefix, ordered=ordered)
    x = torch.randn(3, 12, 8)

    def both() -> list[Tensor]:
        torch.manual_seed(1)
        tokens = x.clone().requires_grad_()
        out = layer(tokens)
        first, *rest = out if with_indices else (out,)
        first.square().sum().backward()
        assert tokens.grad is not None
        return [first, tokens.grad, *rest]

    theirs = both()
    with patch(attention=False):
        ours = both()
        assert gathered == [(3, 12, 8)]
        layer.eval()
        out = layer(x)
        assert (out[0] if with_indices else out) is x
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(our, their)


def _objects() -> list[Any]:
    owners = ["timm.layers.patch_dropout", "timm.layers"]
    modules = [
        "timm.layers.attention",
        "timm.layers.attention_pool",
        "timm.models.eva",
        "timm.models.vision_transformer",
    ]
    import sys

    found = [sys.modules[name].patch_dropout_forward for name in owners]
    return found + [sys.modules[name].F for name in modules]


def test_unpatch_puts_the_same_objects_back() -> None:
    before = _objects()
    with patch():
        assert not any(now is old for now, old in zip(_objects(), before, strict=True))
        patch()  # swaps nothing more
    assert all(now is old for now, old in zip(_objects(), before, strict=True))
    patch(attention=False)
    assert [now is old for now, old in zip(_objects(), before, strict=True)] == [False] * 2 + [True] * 4
    unpatch()
    unpatch()
    assert all(now is old for now, old in zip(_objects(), before, strict=True))
    assert timm.layers.attention.F is nn.functional


def test_an_unpatch_leaves_what_somebody_else_has_put_there(monkeypatch: pytest.MonkeyPatch) -> None:
    patch(attention=False)

    def theirs() -> None: ...

    with monkeypatch.context() as later:
        later.setattr(timm.layers, "patch_dropout_forward", theirs)
        with pytest.raises(RuntimeError, match="timm.layers.patch_dropout_forward was replaced again after patch"):
            unpatch()
        assert timm.layers.patch_dropout_forward is theirs


@pytest.fixture
def layer() -> nn.Module:
    return timm.layers.Attention(32, num_heads=4, qkv_bias=True).eval()


X = torch.linspace(-1, 1, 3 * 7 * 32).sin().view(3, 7, 32)
KEYS = torch.ones(3, 1, 1, 7, dtype=torch.bool)
KEYS[1, ..., 5:] = False
PAIRS = torch.ones(7, 7, dtype=torch.bool).tril().expand(3, 1, 7, 7)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        ({"is_causal": True}, None),
        ({"attn_mask": KEYS}, None),
        ({"attn_mask": PAIRS}, "its mask differs between queries or heads"),
        ({"attn_mask": torch.zeros(7, 7)}, "its mask is an additive bias"),
    ],
)
def test_masks_are_served_or_left_to_pytorch_by_name(
    options: dict[str, Any], reason: str | None, layer: nn.Module, served: list[Any]
) -> None:
    theirs = layer(X, **options)
    with patch(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ours = [layer(X, **options) for _ in range(2)]
    assert len(served) == (2 if reason is None else 0)
    assert [str(each.message) for each in told] == (
        [] if reason is None else [f"oner_fast leaves this attention to PyTorch: {reason}"]
    )
    for our in ours:
        torch.testing.assert_close(our, theirs, rtol=1e-5, atol=1e-6)


def test_dropped_weights_follow_the_seed(served: list[Any]) -> None:
    layer = timm.layers.Attention(32, num_heads=4, attn_drop=0.5)
    with patch():
        found = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            found.append(layer(X))
        assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
        torch.manual_seed(3)
        mean = torch.stack([layer(X) for _ in range(50)]).mean(0)
    assert len(served) == 53
    exact = layer.eval()(X)
    assert (mean - exact).abs().max() < 0.4 * (found[0] - exact).abs().max()


def test_attention_without_fusion_keeps_its_softmax(layer: Any, served: list[Any]) -> None:
    layer.fused_attn = False
    weights: list[Tensor] = []
    layer.attn_drop.register_forward_hook(lambda module, args, out: weights.append(out))
    theirs = layer(X)
    with patch():
        assert torch.equal(layer(X), theirs)
    assert not served and weights[1].shape == (3, 4, 7, 7)


def test_a_patched_model_is_pickled_and_saved_as_any_other(layer: nn.Module) -> None:
    with patch():
        ours = layer(X)
        text, file = pickle.dumps(layer), io.BytesIO()
        torch.save(layer, file)
    file.seek(0)
    for copy in (pickle.loads(text), torch.load(file, weights_only=False)):
        assert type(copy) is timm.layers.Attention
        torch.testing.assert_close(copy(X), ours, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype(dtype: torch.dtype, served: list[Any]) -> None:
    layer = timm.layers.Attention(32, num_heads=4, qk_norm=True, norm_layer=nn.LayerNorm)
    exact = layer(X)
    with torch.autocast("cpu", dtype):
        theirs = layer(X)
        with patch():
            ours = layer(X)
    assert served and ours.dtype == theirs.dtype == dtype
    worst = (theirs - exact).abs().max()
    assert (ours - exact).abs().max() <= 2 * worst


def test_a_compiled_model_is_one_graph() -> None:
    model = eval(MODELS["registers"], {"timm": timm})
    images = torch.rand(2, 3, 32, 32)
    found = []
    for patched in (False, True):
        if patched:
            patch()
        torch.manual_seed(3)
        model.zero_grad()
        torch._dynamo.reset()
        loss = torch.compile(model, backend="aot_eager", fullgraph=True)(images).square().sum()
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_graphs_of_other_tools_do_not_need_us(layer: nn.Module, served: list[Any]) -> None:
    theirs = layer(X)
    with patch(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graphs = [
            torch.fx.symbolic_trace(layer),
            torch.jit.script(layer),
            torch.jit.trace(layer, X, check_trace=False),
            torch.export.export(layer, (X,)).module(),
        ]
    assert not served
    for graph in graphs:
        assert "oner_fast::" not in str(graph.graph)
        torch.testing.assert_close(graph(X), theirs, rtol=1e-5, atol=1e-6)
