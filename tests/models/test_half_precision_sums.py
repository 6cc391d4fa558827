"""Gradients of rows that many tokens share, in bfloat16, added in the order and the dtype of CUDA's kernels.

Under `torch.use_deterministic_algorithms(True)` CUDA computes `index_add` and an accumulating `index_put` as a sorted,
serial sum that is rounded to the dtype of the gradient after each addend. The CPU adds in another way, so no ordinary
test on a CPU sees the error. `CudaSums` computes these operations as CUDA does.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from oner_fast import ops
from oner_fast.models.oner import ImageInput, OneR, OneRConfig, Pass, TextInput, Wanted
from oner_fast.models.sentence_encoder import SentenceEncoder
from oner_fast.models.uta import UTA, UTAConfig
from oner_fast.nn.drop_path import branch_factors
from oner_fast.nn.embeddings import PatchEmbedding, WordEmbedding, _PlaceTokens
from oner_fast.nn.heads import MaskedPatchHead, MaskedWordHead, Predictor, Projector
from oner_fast.nn.packed_rows import cumulative
from oner_fast.ops import library

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)
IMAGES, SIDE, PATCH, WIDTH, WORDS, LONGEST = 48, 16, 4, 16, 11, 6
CELLS = (SIDE // PATCH) ** 2


class CudaSums(TorchDispatchMode):
    """Compute sums into shared rows as CUDA's deterministic kernels do, or, with `exact`, in float64.

    Row sums (`index_add`, accumulating `index_put`, `scatter_add` and the gradient of an embedding) are serial and
    rounded to the result's dtype after each addend. Reductions (`sum` and `mean`) have float32 accumulators. With
    `exact` both add in float64 and round once.

    Attributes:
        shared: the row sums of a half type in which a row had several addends, by operation, with the most addends.
    """

    def __init__(self, exact: bool = False) -> None:
        super().__init__()
        self.exact = exact
        self.shared: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket
        if name in (aten.index_add, aten.index_add_):
            to, dim, index, source = args
            assert dim == 0 and not kwargs, (dim, kwargs)
            return self._into(func, to, self._add(name, to, index, source))
        if name in (aten.index_put, aten.index_put_, aten._unsafe_index_put, aten._index_put_impl_):
            to, indices, values = args[:3]
            if args[3] if len(args) > 3 else kwargs.get("accumulate", False):
                (index,) = indices
                return self._into(func, to, self._add(name, to, index, values.expand(*index.shape, *to.shape[1:])))
        if name in (aten.scatter_add, aten.scatter_add_):
            to, dim, index, source = args
            return self._into(func, to, self._scatter(name, to, dim, index, source))
        if name is aten.embedding_dense_backward:
            grad, index, count, padding, by_frequency = args
            assert not by_frequency
            rows = grad.reshape(-1, grad.shape[-1])
            found = self._add(name, rows.new_zeros(count, rows.shape[1]), index.flatten(), rows)
            if padding >= 0:
                found[padding] = 0
            return found
        if name in (aten.sum, aten.mean) and args[0].dtype in HALF and kwargs.get("dtype") is None:
            wide = torch.float64 if self.exact else torch.float32
            return func(args[0].to(wide), *args[1:], **kwargs).to(args[0].dtype)
        assert name not in (aten.index_reduce, aten.scatter_reduce, aten._embedding_bag_backward), name
        return func(*args, **kwargs)

    @staticmethod
    def _into(func: Any, to: Tensor, found: Tensor) -> Tensor:
        return to.copy_(found) if func._schema.is_mutable else found

    def _scatter(self, name: Any, to: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
        places = torch.arange(to.numel()).view(to.shape).narrow(0, 0, to.shape[0])
        for axis, size in enumerate(index.shape):
            places = places if axis == dim else places.narrow(axis, 0, size)
        picked = source[tuple(slice(0, size) for size in index.shape)].flatten()
        return self._add(name, to.flatten(), places.gather(dim, index).flatten(), picked).view(to.shape)

    def _add(self, name: Any, to: Tensor, index: Tensor, rows: Tensor) -> Tensor:
        index, rows = index.flatten(), rows.reshape(index.numel(), *to.shape[1:])
        counts = index.bincount(minlength=to.shape[0])
        most = int(counts.max()) if len(index) else 0
        if most > 1 and to.dtype in HALF:
            self.shared[str(name)] = max(most, self.shared.get(str(name), 0))
        if self.exact or most <= 1:
            return to.double().index_add(0, index, rows.double()).to(to.dtype)
        if to.dtype not in HALF:
            return to.index_add(0, index, rows)  # the CPU's is serial
        sums, order, first = to.clone(), index.argsort(stable=True), counts.cumsum(0) - counts
        for place in range(most):  # the place-th addend of every row that has so many
            some = (counts > place).nonzero().squeeze(1)
            sums[some] = (sums[some].float() + rows[order[first[some] + place]].float()).to(to.dtype)
        return sums


@pytest.fixture(autouse=True)
def _portable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute the ops in plain PyTorch, whose own operations a dispatch mode then sees."""
    monkeypatch.setenv("ONER_FAST_IMPLEMENTATION", "portable")
    torch.set_num_threads(1)  # small tensors
    torch.use_deterministic_algorithms(True)


@contextlib.contextmanager
def sums(exact: bool = False) -> Iterator[CudaSums]:
    mode, plain = CudaSums(exact), library._PlainPyTorch.context

    @contextlib.contextmanager
    def inside(self: Any, first: Tensor) -> Iterator[None]:
        with plain(self, first), mode:
            yield

    with pytest.MonkeyPatch.context() as patch, mode:
        patch.setattr(library._PlainPyTorch, "context", inside)
        yield mode


def spaced(exact: Tensor) -> Tensor:
    """Return the distance of neighbouring bfloat16 numbers at each value, and at the root mean square where it is less.

    The root mean square is the gradient's own scale: elements that happen to be near zero are sums of addends that are
    not, and no float32 sum has more digits than its addends.
    """
    exact = exact.double()
    scale = exact.abs().clamp(min=exact.square().mean().sqrt().item(), max=None).clamp(min=1e-30)
    return 2.0 ** (scale.log2().floor() - 7)


def ulps(found: Tensor, exact: Tensor) -> float:
    return float(((found.double() - exact.double()).abs() / spaced(exact)).max())


def pixels() -> Tensor:
    return torch.randint(256, (IMAGES, 3, SIDE, SIDE), dtype=torch.uint8)


def masks(hidden: int = CELLS // 2) -> Tensor:
    return torch.rand(IMAGES, CELLS).argsort(dim=1) < hidden


def texts() -> TextInput:
    lengths = torch.randint(2, LONGEST, (IMAGES,))
    return TextInput(torch.randint(WORDS, (int(lengths.sum()),)), cumulative(lengths))


def patch_embedding(mask_token: bool = True) -> PatchEmbedding:
    return PatchEmbedding(SIDE, PATCH, WIDTH, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), mask_token)


# Modules whose shared rows have a plain sum of the gradient's rows as their gradient. That sum is known in float64.


def shared_sources() -> dict[str, tuple[nn.Module, Callable[[Any], Tensor], tuple[str, ...]]]:
    images, masked, text = pixels(), masks(), texts()
    dropped = torch.stack([torch.randperm(CELLS)[:9] for _ in range(IMAGES)])
    some = torch.stack([torch.randperm(9) < 4 for _ in range(IMAGES)])
    boundaries = cumulative(torch.full((IMAGES,), 9))
    image = patch_embedding()
    tower = OneR(
        OneRConfig(
            image_size=SIDE, patch_size=PATCH, width=WIDTH, depth=1, heads=2, vocab_size=WORDS,
            max_text_tokens=LONGEST, embed_dim=8, projector_hidden=8,
        )
    )  # fmt: skip
    uta = UTA(UTAConfig(SIDE, PATCH, width=WIDTH, depth=1, heads=2, mlp_hidden=24, embed_dim=8))
    both = ("mask_token", "positions")
    return {
        "masked patches": (image, lambda m: m(images, None, masked), both),
        "masked patches among few": (image, lambda m: m(images, dropped, some), both),
        "all patches": (image, lambda m: m(images), ("positions", "project.bias")),
        "packed patches": (image, lambda m: m.packed(images, dropped.flatten(), boundaries), ("positions",)),
        "words": (
            WordEmbedding(WORDS, LONGEST, WIDTH),
            lambda m: m(text.input_ids, text.cu_seqlens),
            ("words.weight", "positions"),
        ),
        "[CLS] of OneR": (
            tower,
            lambda m: embedded(m, images, masked, text),
            ("cls_token", "word_embedding.words.weight", "word_embedding.positions", "patch_embedding.mask_token"),
        ),
        "[CLS] of UTA": (uta, lambda m: m._embed(images, dropped, None)[0], ("cls_token", "cls_position")),
        "[CLS] of packed UTA": (
            uta, lambda m: m._embed_packed(images, dropped.flatten(), boundaries)[0], ("cls_token", "cls_position"),
        ),
    }  # fmt: skip


def embedded(tower: OneR, images: Tensor, masked: Tensor, text: TextInput) -> Tensor:
    """Embed the packed tokens of two passes: the input of the trunk."""
    seen = list[Tensor]()
    hook = tower.trunk.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    shown = ImageInput(images, None, masked)
    tower([Pass("image_text", shown, text), Pass("text", text=text)])
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", list(shared_sources()))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shared_rows_against_float64(name: str, dtype: torch.dtype) -> None:
    """The gradient's rows are numbers of bfloat16, so that only the sum can be off."""
    module, run, sources = shared_sources()[name]
    exact = copy.deepcopy(module).double()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = run(module)
    grad = (torch.randn(out.shape) + 0.5).bfloat16()
    run(exact).backward(grad.double())
    with sums() as seen:
        out.backward(grad.to(out.dtype))
    parameters, wanted = dict(module.named_parameters()), dict(exact.named_parameters())
    for source in sources:
        found, right = parameters[source].grad, wanted[source].grad
        assert found is not None and right is not None and right.abs().max() > 10, source
        assert ulps(found, right) <= 1, f"{source} is off by {ulps(found, right):.1f} ulp of bfloat16"
    assert not seen.shared


def test_the_mask_token_has_derivatives_of_both_orders_and_transforms() -> None:
    order = masks()[:3].long().argsort(dim=1, stable=True)
    tokens, token = torch.randn(3, CELLS // 2, 2, dtype=torch.float64), torch.randn(2, dtype=torch.float64)

    def place(tokens: Tensor, token: Tensor) -> Tensor:
        placed: Tensor = _PlaceTokens.apply(tokens, token, order)
        return placed

    assert torch.autograd.gradcheck(place, (tokens.requires_grad_(), token.requires_grad_()))
    assert torch.autograd.gradgradcheck(place, (tokens, token))
    many = torch.randn(4, 2, dtype=torch.float64)
    found = torch.vmap(torch.func.grad(lambda one: place(tokens.detach(), one).square().sum()))(many)
    torch.testing.assert_close(found, 2 * many * 3 * (CELLS - CELLS // 2))
    nothing = torch.zeros(3, 0, 2, dtype=torch.float64)  # all cells masked, then none
    assert torch.equal(place(nothing, token), token.expand(3 * CELLS, 2))
    assert torch.equal(place(torch.ones(3, CELLS, 2), token.float()), torch.ones(3 * CELLS, 2))


# Whole models: the same backward pass twice, with CUDA's sums and with those of float64.


def close_to_exact(module: nn.Module, run: Callable[[], Tensor]) -> None:
    gradients = list[dict[str, Tensor]]()
    for exact in (False, True):
        module.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16), sums(exact) as seen:
            run().backward()
        assert not seen.shared, f"row sums in half precision: {seen.shared}"
        gradients.append({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})
    found, right = gradients
    assert found.keys() == right.keys() and len(found) > 1
    off = {name: ulps(found[name], right[name]) for name in found}
    assert max(off.values()) <= 1, {name: by for name, by in off.items() if by > 1}


def test_all_passes_of_oner() -> None:
    tower = OneR(
        OneRConfig(
            image_size=SIDE, patch_size=PATCH, width=WIDTH, depth=1, heads=2, vocab_size=WORDS,
            max_text_tokens=LONGEST, embed_dim=8, projector_hidden=8,
        )
    )  # fmt: skip
    heads = nn.ModuleDict(
        {
            "tower": tower,
            "predictor": Predictor(8, 12),
            "words": MaskedWordHead(WIDTH, WORDS),
            "patches": MaskedPatchHead(WIDTH, 3 * PATCH**2),
            "projector": Projector(WIDTH, 12, 8),
        }
    )
    images, masked, text = pixels(), masks(), texts()
    shown, hidden = ImageInput(images), ImageInput(images, None, masked)
    passes = [
        Pass("image", shown),
        Pass("text", text=text),
        Pass("image_text", hidden, text),
        Pass("image_given_text", shown, text),
        Pass("text_given_image", shown, text),
    ]
    places = masked.flatten().nonzero().squeeze(1)
    wanted = {"image_text": Wanted(places, torch.arange(0, len(text.input_ids), 2))}

    def run() -> Tensor:
        found = tower(passes, wanted)
        total = sum((heads["predictor"](x).float() * 3).square().mean() for x in tower.project_cls(found).values())
        both = found["image_text"]
        logits = heads["words"](both.words, tower.word_embedding.words.weight)
        total = total + logits.float().logsumexp(1).mean() + heads["patches"](both.patches).float().abs().mean()
        return total + heads["projector"](both.cls).float().square().mean()

    close_to_exact(heads, run)


@pytest.mark.parametrize("kind", ["kept", "packed", "masked", "drop path"])
def test_students_of_uta(kind: str) -> None:
    config = UTAConfig(SIDE, PATCH, width=WIDTH, depth=1, heads=2, mlp_hidden=24, embed_dim=8, mask_token=True)
    uta, images = UTA(config), pixels()
    kept = torch.stack([torch.randperm(CELLS)[:9] for _ in range(IMAGES)])
    target = torch.randn(IMAGES, 1 + CELLS, 8)

    def run() -> Tensor:
        if kind == "packed":
            return uta(images, kept.flatten(), cumulative(torch.full((IMAGES,), 9)))[0].float().square().mean()
        if kind == "masked":
            rows = torch.nn.functional.pad(kept + 1, (1, 0))
            return ops.token_alignment(ops.masked_gather(uta(images, masked=masks()), rows), target, rows)
        factors = branch_factors(0.2, 1, 0, 0, torch.arange(IMAGES)) if kind == "drop path" else None
        rows = torch.nn.functional.pad(kept + 1, (1, 0))
        return ops.token_alignment(uta(images, kept, branch_factors=factors), target, rows)

    close_to_exact(uta, run)


def test_packed_towers_of_clip() -> None:
    clip = pytest.importorskip("oner_fast.models.clip")
    from oner_fast.models.clip_packed import encode_image, encode_text, pack_tokens

    config = clip.CLIPConfig(
        image_size=SIDE, patch_size=PATCH, vision_width=WIDTH, vision_layers=1, vision_heads=2, text_width=WIDTH,
        text_layers=1, text_heads=2, context_length=LONGEST, vocab_size=WORDS, embed_dim=8,
    )  # fmt: skip
    model = clip.build_clip(config)
    images, ids = pixels(), torch.randint(WORDS - 1, (IMAGES, LONGEST))
    ids[torch.arange(IMAGES), torch.randint(1, LONGEST, (IMAGES,))] = WORDS - 1

    def run() -> Tensor:
        image, text = encode_image(model, images, config), encode_text(model, pack_tokens(ids))
        return ops.mixup_info_nce(image.float(), text.float(), model.logit_scale.exp())

    close_to_exact(model, run)


def test_the_sentence_encoder() -> None:
    encoder = SentenceEncoder(WORDS, WIDTH, 2, 2, 24, LONGEST)
    ids = torch.randint(1, WORDS, (IMAGES, LONGEST))
    close_to_exact(encoder, lambda: encoder(ids).float().square().mean())
