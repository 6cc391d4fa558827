"""open_clip's towers by our ops: the same numbers from the same draws, the same state, and a training that agrees."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oner_fast import _extension
from oner_fast.models.optional_packages import optional_package

if find_spec("open_clip") is None:
    pytest.skip("needs open_clip (pip install $(oner-fast requirements clip))", allow_module_level=True)

from oner_fast.integrations import open_clip as ours
from oner_fast.integrations.open_clip_towers import exactly_causal

pytestmark = pytest.mark.skipif(not _extension.status().loaded, reason=_extension.status().reason or "built")
towers = optional_package("open_clip").transformer
VISION = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
CUSTOM = {"block_type": "custom", "qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True}


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    yield
    ours.unpatch()


def tiny(patch_dropout: float = 0.0, custom: bool = False, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    torch.manual_seed(1)
    extra = CUSTOM if custom else {}
    model = optional_package("open_clip").CustomTextCLIP(
        16, VISION | extra | {"patch_dropout": patch_dropout}, TEXT | extra | more, output_dict=True
    )
    return model.to(dtype)


def batch(dtype: torch.dtype = torch.float64, count: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(count, 3, 32, 32, generator=generator, dtype=dtype),
        torch.randint(1, 49, (count, 8), generator=generator),
    )


def outcome(model: Any, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The features of a batch and the gradients of all parameters, from draws that are the same each time."""
    torch.manual_seed(3)
    out = model(*batch(dtype))
    total = (out["image_features"] * out["text_features"].flip(0)).sum() * out["logit_scale"]
    wanted = [x for x in model.parameters() if x.requires_grad]
    gradients = torch.autograd.grad(total, wanted, allow_unused=True)
    return [total.detach(), *(torch.zeros(()) if x is None else x for x in gradients)]


def served(outputs: Tensor) -> set[str]:
    """The names of our ops in the graph of a tensor."""
    names, waiting, seen = set(), [outputs.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(getattr(node, "_forward_cls", type(node)).__name__)
            waiting += [each for each, _ in node.next_functions]
    return names & {"varlen_attention", "masked_gather", "mixup_info_nce"}


@pytest.mark.parametrize("custom", [False, True])
def test_towers_give_the_same_numbers_from_the_same_draws(custom: bool) -> None:
    model = tiny(0.5, custom)
    right = outcome(model)
    with warnings.catch_warnings(), ours.patch():
        warnings.simplefilter("error")
        found = outcome(model)
        features = model(*batch())["image_features"], model(*batch())["text_features"]
    for one, two in zip(found, right, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
    assert served(features[0]) == {"varlen_attention", "masked_gather"} and served(features[1]) == {"varlen_attention"}
    model.eval()
    right = outcome(model)
    with ours.patch():
        for one, two in zip(outcome(model), right, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_patch_dropout_keeps_the_same_tokens_bit_for_bit(first: bool, dtype: torch.dtype) -> None:
    drop, x = towers.PatchDropout(0.7, exclude_first_token=first), torch.randn(3, 11, 4).to(dtype)
    torch.manual_seed(5)
    right, after = drop(x), torch.rand(1)
    with ours.patch():
        torch.manual_seed(5)
        assert torch.equal(drop(x), right) and torch.equal(torch.rand(1), after)


def test_masks_that_are_exactly_causal() -> None:
    causal = torch.full((6, 6), float("-inf")).triu_(1)
    assert exactly_causal(causal) and exactly_causal(causal[:4, :4]) and exactly_causal(causal.bfloat16())
    assert not exactly_causal(torch.zeros(6, 6))
    causal[2, 1] = -1.0  # the answer of before is not kept
    assert not exactly_causal(causal) and exactly_causal(causal[:2, :2])
    with torch.inference_mode():
        other = torch.full((3, 3), float("-inf")).triu_(1)
        assert exactly_causal(other)
        other.zero_()
        assert not exactly_causal(other)
    assert not exactly_causal(torch.full((6, 6), torch.finfo(torch.float32).min).triu_(1))
    assert not exactly_causal(causal.to("meta"))


def test_memory_that_another_mask_takes_over_gets_its_own_answer() -> None:
    for turn in range(200):
        mask = torch.full((4, 4), float("-inf")).triu_(1) if turn % 2 else torch.zeros(4, 4)
        assert exactly_causal(mask) == bool(turn % 2)
        del mask


def test_cross_attention_and_sequence_first_inputs() -> None:
    for batch_first in (True, False):
        block = towers.ResidualAttentionBlock(32, 2, is_cross_attention=True, batch_first=batch_first).double()
        q, k, v = (torch.randn(3, n, 32, dtype=torch.float64) for n in (4, 6, 6))
        q, k, v = (x if batch_first else x.transpose(0, 1) for x in (q, k, v))
        right = block(q, k, k), block(q, k, v), block(q)
        with ours.patch():
            found = block(q, k, k), block(q, k, v), block(q)
        for one, two in zip(found, right, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)
            assert served(one) == {"varlen_attention"} and not served(two)


def with_hook() -> tuple[nn.Module, dict[str, Any]]:
    block = towers.ResidualAttentionBlock(32, 2)
    block.attn.register_forward_hook(lambda module, inputs, output: None)
    return block, {}


def with_dropout() -> tuple[nn.Module, dict[str, Any]]:
    block = towers.ResidualAttentionBlock(32, 2)
    block.attn.dropout = 0.5
    return block, {}


def with_mask(mask: Tensor) -> tuple[nn.Module, dict[str, Any]]:
    return towers.ResidualAttentionBlock(32, 2), {"attn_mask": mask}


def with_attention(**options: Any) -> tuple[nn.Module, dict[str, Any]]:
    return towers.Attention(32, 2, **options), {}


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (with_hook, "Block to its own code: attn has hooks"),
        (with_dropout, r"Block to its own code: attn drops attention weights \(dropout 0.5\)"),
        (lambda: with_mask(torch.randn(4, 4)), "Block to its own code: attn_mask is not exactly causal"),
        (lambda: with_mask(torch.zeros(6, 4, 4)), "Block to its own code: attn_mask is 3-dimensional"),
        (lambda: with_attention(attn_drop=0.5), r"Attention to its own code: it drops attention weights"),
    ],
)
def test_what_cannot_be_served_goes_to_open_clip_with_one_warning(made: Any, reason: str) -> None:
    module, options = made()
    x = torch.randn(3, 4, 32)
    torch.manual_seed(0)
    right = module(x, **options)
    with ours.patch(), pytest.warns(UserWarning, match=reason) as told:
        module(x, **options)
        torch.manual_seed(0)
        assert torch.equal(module(x, **options), right)
    assert len(told) == 1


def test_patch_dropout_of_other_shapes_goes_to_open_clip() -> None:
    drop, x = towers.PatchDropout(0.5), torch.arange(40).view(2, 10, 2)
    torch.manual_seed(0)
    right = drop(x)
    with ours.patch(), pytest.warns(UserWarning, match=r"PatchDropout to its own code: x is \(2, 10, 2\) torch.int64"):
        torch.manual_seed(0)
        assert torch.equal(drop(x), right)


def test_padded_text_goes_to_open_clip() -> None:
    """Masks of the batch's own padding are not served."""
    tower = towers.TextTransformer(8, 50, 32, 2, 2, no_causal_mask=True, use_pad_mask=True).eval()
    texts = torch.where(torch.arange(8) < 5, batch()[1], 0)
    right = tower(texts)
    with ours.patch(), pytest.warns(UserWarning, match="attn_mask is 3-dimensional"):
        assert torch.equal(tower(texts), right)


def test_state_dicts_and_pickles_stay_open_clips() -> None:
    plain = tiny(0.5)
    with ours.patch():
        patched = tiny(0.5)
        assert list(patched.state_dict()) == list(plain.state_dict())
        assert all(torch.equal(x, plain.state_dict()[name]) for name, x in patched.state_dict().items())
        patched.load_state_dict(plain.state_dict())
        sent = pickle.dumps(patched.visual)
    assert b"oner_fast" not in sent
    images = batch()[0]
    torch.testing.assert_close(pickle.loads(sent).eval()(images), plain.visual.eval()(images))


def test_torch_compile_and_checkpointing() -> None:
    model = tiny(0.0, dtype=torch.float32)
    right = outcome(model, torch.float32)
    with ours.patch(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for one, two in zip(outcome(compiled, torch.float32), right, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
        model.set_grad_checkpointing()
        for one, two in zip(outcome(model, torch.float32), right, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_autocast_is_no_less_exact() -> None:
    model = tiny(dtype=torch.float32)
    images, texts = batch(torch.float32)
    exact = [model.double()(images.double(), texts)[f"{side}_features"] for side in ("image", "text")]
    model.float()

    def errors() -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            out = model(images, texts)
        pairs = zip((out["image_features"], out["text_features"]), exact, strict=True)
        return [(one.double() - right).norm() for one, right in pairs]

    theirs = errors()
    with ours.patch():
        found = errors()
    assert all(one <= 1.5 * two for one, two in zip(found, theirs, strict=True)), (found, theirs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_scripted_traced_and_exported_models_hold_open_clips_own_code() -> None:
    """They are files for other machines, which may lack our package."""
    for custom in (False, True):
        model = tiny(0.5, custom, dtype=torch.float32).eval()
        images = batch(torch.float32)[0]
        right = model.visual(images)
        with ours.patch():
            scripted = torch.jit.script(model.visual)
            traced = torch.jit.trace(model.visual, images, check_trace=False)
            exported = torch.export.export(model.visual, (images,))
        for made in (scripted, traced):
            torch.testing.assert_close(made(images), right)
            graph = str(made.inlined_graph)
            assert "oner_fast::" not in graph and "PythonOp" not in graph
        assert "oner_fast" not in exported.graph_module.code


SCRIPT = """
import torch
import open_clip
from open_clip.loss import ClipLoss

{line}
torch.manual_seed(0)
vision = dict(layers=2, width=32, head_width=16, patch_size=8, image_size=32, patch_dropout=0.5)
text = dict(context_length=8, vocab_size=50, width=32, heads=2, layers=2)
model, loss = open_clip.CLIP(16, vision, text), ClipLoss(cache_labels=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
losses = []
for step in range(6):
    images, texts = torch.randn(8, 3, 32, 32), torch.randint(1, 49, (8, 8))
    total = loss(*model(images, texts))
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    losses.append(total.item())
weights = model.state_dict()
"""


def test_a_script_that_differs_by_one_line_trains_to_the_same_losses() -> None:
    results = []
    for line in ("", "import oner_fast.integrations.open_clip as fast; fast.patch()"):
        names: dict[str, Any] = {}
        exec(compile(SCRIPT.format(line=line), "script", "exec"), names)
        results.append(names)
    plain, patched = results
    assert patched["losses"] == pytest.approx(plain["losses"], rel=2e-5) and len(set(plain["losses"])) == 6
    assert list(patched["weights"]) == list(plain["weights"])
    for name, one in patched["weights"].items():
        torch.testing.assert_close(one, plain["weights"][name], rtol=1e-4, atol=1e-5)
