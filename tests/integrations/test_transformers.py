"""transformers' models with `attn_implementation="oner_fast"`: what scripts compute that differ by that word alone."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oner_fast.integrations import fallback

transformers = pytest.importorskip("transformers", reason="needs transformers (pip install oner_fast[test])")

from oner_fast.integrations import transformers as ours  # noqa: E402
from oner_fast.integrations import transformers_packing  # noqa: E402

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 60, "max_position_embeddings": 32}
IMAGE = {**SIZES, "image_size": 32, "patch_size": 8}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LLAMA = {**TEXT, "num_key_value_heads": 2, "eos_token_id": None, "bos_token_id": 1, "pad_token_id": 0}
IDS = torch.arange(2, 26).view(3, 8) % 59 + 1
PADDED = torch.ones(3, 8, dtype=torch.long)
PADDED[0, 5:] = 0
PADDED[2, 7:] = 0
BEFORE = PADDED.flip(1)  # padding on the left, as generation has it


def config(kind: str, **options: Any) -> Any:
    return getattr(transformers, f"{kind}Config")(**options)


def make(kind: str, configuration: Any, attention: str) -> Any:
    torch.manual_seed(0)
    configuration = copy.deepcopy(configuration)
    configuration._attn_implementation = attention
    return getattr(transformers, kind)(configuration)


def llama(attention: str, **options: Any) -> Any:
    return make("LlamaForCausalLM", config("Llama", **{**LLAMA, **options}), attention)


def bert(attention: str, kind: str = "BertForMaskedLM", **options: Any) -> Any:
    return make(kind, config("Bert", **{**TEXT, **NO_DROPOUT, **options}), attention)


def mistral(attention: str) -> Any:
    return make("MistralForCausalLM", config("Mistral", **LLAMA, sliding_window=3), attention)


def two_towers(kind: str, attention: str) -> Any:
    text = {**TEXT, "max_position_embeddings": 8, "projection_dim": 32, "bos_token_id": 1, "eos_token_id": 59}
    return make(f"{kind}Model", config(kind, text_config=text, vision_config=IMAGE), attention)


def vit(attention: str) -> Any:
    return make("ViTForImageClassification", config("ViT", **IMAGE, **NO_DROPOUT, num_labels=3), attention)


at_length = pytest.mark.integrations
IMAGES = torch.linspace(-1, 1, 3 * 3 * 32 * 32).mul(50).sin().view(3, 3, 32, 32)
PAIRS = {"input_ids": IDS, "pixel_values": IMAGES, "return_loss": True}
LABELS = torch.where(PADDED.bool(), IDS, -100)
TRAININGS: dict[str, Any] = {
    "vit": (vit, {"pixel_values": IMAGES, "labels": torch.tensor([0, 1, 2])}, 4),
    "clip": (lambda a: two_towers("CLIP", a), PAIRS, 8),
    "clip padded": (lambda a: two_towers("CLIP", a), {**PAIRS, "attention_mask": PADDED}, 8),
    "siglip": (lambda a: two_towers("Siglip", a), PAIRS, 8),
    "siglip padded": (lambda a: two_towers("Siglip", a), {**PAIRS, "attention_mask": PADDED}, 8),
    "bert": (bert, {"input_ids": IDS, "labels": IDS}, 4),
    "bert padded": (bert, {"input_ids": IDS, "labels": LABELS, "attention_mask": PADDED}, 4),
    "llama": (llama, {"input_ids": IDS, "labels": IDS}, 4),
    "llama padded": (llama, {"input_ids": IDS, "labels": LABELS, "attention_mask": PADDED}, 4),
    "llama without cache": (llama, {"input_ids": IDS, "labels": IDS, "use_cache": False}, 4),
}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with ours.register():
        yield


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whether each attention of the test was served "packed" or "dense"."""
    calls: list[str] = []

    def counted(kind: str, original: Any, *given: Any, **options: Any) -> Tensor:
        calls.append(kind)
        out: Tensor = original(*given, **options)
        return out

    for owner, name, kind in ((ours, "_packed", "packed"), (ours.dense_attention, "attend", "dense")):
        monkeypatch.setattr(owner, name, partial(counted, kind, getattr(owner, name)))
    return calls


@pytest.fixture(autouse=True)
def _told() -> Iterator[None]:
    """No test leaves attention to PyTorch unless it says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", fallback.Fallback)
        yield


def train(model: nn.Module, inputs: dict[str, Any]) -> tuple[list[float], dict[str, Tensor | None]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[at_length] if name in ("clip", "siglip", "bert") else []) for name in TRAININGS]
)
def test_one_word_trains_to_the_same_losses(name: str, served: list[str]) -> None:
    build, inputs, calls = TRAININGS[name]
    model = build("sdpa")
    theirs = train(model, inputs)
    assert not served
    own = build("oner_fast")
    found = train(own, inputs)
    assert served == ["dense"] * calls
    torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-5)
    assert own.state_dict().keys() == model.state_dict().keys()


LENGTHS = (3, 7, 1, 5)
ROW = torch.arange(1, 17).view(1, 16) * 7 % 59
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS]).view(1, 16)
ENDS = torch.tensor([0, 3, 10, 11, 16], dtype=torch.int32)
BOUNDARIES = {"cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS, "max_length_q": 7, "max_length_k": 7}


def one_by_one(model: Any, row: Tensor, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.cat([model(input_ids=each).logits for each in row.split(lengths, 1)], dim=1)


@pytest.mark.parametrize("build", [bert, llama])
@pytest.mark.parametrize("inputs", ["position_ids", "cu_seq_lens", "without cache"])
def test_a_packed_row_is_its_sequences_one_by_one(build: Any, inputs: str, served: list[str]) -> None:
    expected = one_by_one(build("sdpa").eval(), ROW)
    own = build("oner_fast").eval()
    given: dict[str, Any] = {"position_ids": POSITIONS, **(BOUNDARIES if inputs == "cu_seq_lens" else {})}
    if inputs == "cu_seq_lens":  # the boundaries count alone; positions that do not restart are learned ones
        given["position_ids"] = torch.arange(16).view(1, 16)
        expected = None
    if inputs == "without cache":
        given["use_cache"] = False
    out = own(input_ids=ROW, **given).logits
    assert served == ["packed"] * 2
    if expected is not None:
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    changed = ROW.clone()
    changed[:, 10] = 58  # a sequence by itself
    differs = (own(input_ids=changed, **given).logits != out).any(-1)[0]
    assert differs.tolist() == [place == 10 for place in range(16)]


@pytest.mark.parametrize("build", [bert, llama])
def test_rows_of_packed_sequences_stay_apart(build: Any, served: list[str]) -> None:
    rows = torch.cat([ROW, ROW.flip(1)])
    lengths = (9, 7)
    positions = torch.cat([POSITIONS, torch.cat([torch.arange(n) for n in lengths]).view(1, 16)])
    plain = build("sdpa").eval()
    expected = torch.cat([one_by_one(plain, rows[:1]), one_by_one(plain, rows[1:], lengths)])
    out = build("oner_fast").eval()(input_ids=rows, position_ids=positions).logits
    assert served == ["packed"] * 2
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_a_packed_row_trains_as_its_sequences(served: list[str]) -> None:
    gradients = []
    for attention in ("sdpa", "oner_fast"):
        model = llama(attention)
        out = one_by_one(model, ROW) if attention == "sdpa" else model(input_ids=ROW, position_ids=POSITIONS).logits
        out.log_softmax(-1).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert served == ["packed"] * 2
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("positions", "boundaries"),
    [
        ([[0, 1, 2, 3]], None),
        ([[5, 6, 7, 8]], None),  # a continued sequence
        ([[0, 1, 5, 6]], None),  # kept patches
        ([[3, 1, 2, 0]], None),  # another order
        ([[0, 1, 0, 1]], [0, 2, 4]),
        ([[2, 3, 2, 2]], [0, 2, 3, 4]),  # RoBERTa counts from 2
        ([[0, 1, 2, 3], [0, 0, 1, 2]], [0, 4, 5, 8]),
        ([[0, 2, 4, 6], [0, 1, 0, 1]], [0, 4, 6, 8]),  # the first row jumps, the second restarts
    ],
)
def test_positions_that_restart_are_packed_and_others_are_not(
    positions: list[list[int]], boundaries: list[int] | None
) -> None:
    given = torch.tensor(positions)
    found = transformers_packing.of_positions(given, len(positions), 4)
    assert (found if found is None else found.tolist()) == boundaries
    again = transformers_packing.of_positions(given, len(positions), 4)
    assert again is found
    given[:] = torch.tensor([0, 0, 0, 1])  # the same tensor with other positions is read again
    found = transformers_packing.of_positions(given, len(positions), 4)
    assert found is not None and found.tolist()[:4] == [0, 1, 2, 4]


@pytest.mark.parametrize("given", ["mask", "mask without cache", "cache"])
@pytest.mark.parametrize("build", [bert, llama, mistral])
def test_packed_rows_stay_apart_beside_padding_and_windows(build: Any, given: str) -> None:
    rows, ends = IDS[:2], ((3, 2), (5, 3))
    seen = torch.tensor([[1] * 5 + [0] * 3, [1] * 8])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 0], [0, 1, 2, 3, 4, 0, 1, 2]])
    plain = build("sdpa").eval()
    expected = torch.cat([one_by_one(plain, row[None, : sum(n)], n)[0] for row, n in zip(rows, ends, strict=True)])
    options: dict[str, Any] = {"use_cache": "without" not in given, "attention_mask": seen if "mask" in given else None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fallback.Fallback)
        out = build("oner_fast").eval()(input_ids=rows, position_ids=positions, **options).logits
    torch.testing.assert_close(out[seen.bool()], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hidden", [0, 1], ids=["0 0 0 1", "1 1 0 1"])  # positions of padding in various versions
def test_positions_of_padding_are_not_taken_for_packing(hidden: int, served: list[str]) -> None:
    positions = (BEFORE.cumsum(1) - 1).masked_fill(BEFORE == 0, hidden)
    for build in (bert, llama):
        theirs, found = (
            build(name).eval()(input_ids=IDS, attention_mask=BEFORE, position_ids=positions).logits[BEFORE.bool()]
            for name in ("sdpa", "oner_fast")
        )
        torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-5)
    assert served == ["dense"] * 4


@pytest.mark.parametrize("kind", ["BloomForCausalLM", "GptOssForCausalLM"])
def test_models_that_sdpa_does_not_serve_keep_their_own_attention(kind: str) -> None:
    if kind == "BloomForCausalLM":  # its layers add the mask to the scores, positions included
        configuration = config("Bloom", vocab_size=60, hidden_size=32, n_layer=2, n_head=4)
    else:
        experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}
        configuration = config("GptOss", **{**LLAMA, **experts}, layer_types=["full_attention"] * 2)
    expected = make(kind, configuration, "eager").eval()(input_ids=IDS, attention_mask=PADDED).logits
    found: list[Any] = []
    reason = f"the attention of {kind} to its own code"
    with pytest.warns(fallback.Fallback, match=reason):
        found.append(make(kind, configuration, "oner_fast").eval())
    assert torch.equal(found[0](input_ids=IDS, attention_mask=PADDED).logits, expected)


@pytest.mark.parametrize("mask", [None, PADDED, BEFORE], ids=["whole", "right", "left"])
def test_padding_hides_keys_from_every_token_that_sees_any(mask: Tensor | None, served: list[str]) -> None:
    for build in (bert, llama):
        theirs, found = (
            build(name).eval()(input_ids=IDS, attention_mask=mask).logits for name in ("sdpa", "oner_fast")
        )
        sees = torch.ones(3, 8).bool() if mask is None or build is bert else mask.cumsum(1) > 0
        torch.testing.assert_close(found[sees], theirs[sees], rtol=1e-4, atol=1e-5)
        assert found.isfinite().all()
    assert served == ["dense"] * 4


QUICK = [("dynamic", "left", "greedy"), ("static", "left", "greedy"), ("dynamic", "whole", "sampling")]
SEARCHES: dict[str, dict[str, Any]] = {"greedy": {}, "beams": {"num_beams": 2}, "sampling": {"do_sample": True}}


@pytest.mark.parametrize(
    ("cache", "mask", "search"),
    [
        pytest.param(
            cache,
            mask,
            search,
            marks=[] if (cache, hidden, search) in QUICK else [at_length],
            id=f"{cache} {hidden} {search}",
        )
        for cache in ("dynamic", "static")
        for hidden, mask in (("whole", None), ("left", BEFORE))
        for search in SEARCHES
    ],
)
def test_generation_is_the_same(cache: str, mask: Tensor | None, search: str, served: list[str]) -> None:
    found = []
    for attention in ("sdpa", "oner_fast"):
        model = llama(attention).eval()
        torch.manual_seed(4)
        options = {"max_new_tokens": 6, "cache_implementation": cache, **SEARCHES[search]}
        found.append(
            model.generate(IDS, attention_mask=mask, return_dict_in_generate=True, output_scores=True, **options)
        )
    assert torch.equal(found[0].sequences, found[1].sequences) and found[0].sequences.shape == (3, 14)
    torch.testing.assert_close(found[1].scores, found[0].scores, rtol=1e-4, atol=1e-4)
    assert served == ["dense"] * 12  # layers and tokens


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_cache_is_continued_by_several_tokens(cache: str, served: list[str]) -> None:
    found = []
    for attention in ("sdpa", "oner_fast"):
        model = llama(attention).eval()
        kept = (
            transformers.DynamicCache(config=model.config)
            if cache == "dynamic"
            else transformers.StaticCache(config=model.config, max_cache_len=12)
        )
        for part in (slice(0, 3), slice(3, 7), slice(7, 8)):
            out = model(input_ids=IDS[:, part], cache=kept, attention_mask=BEFORE[:, : part.stop]).logits
        found.append(out)
    assert served == ["dense"] * 6
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_a_decoder_attends_to_an_encoder(served: list[str]) -> None:
    encoded = torch.linspace(-1, 1, 3 * 8 * 32).mul(9).sin().view(3, 8, 32)
    inputs = {"encoder_hidden_states": encoded, "encoder_attention_mask": PADDED}
    # The keys of the encoder are as many as the queries, whose positions restart.
    inputs["position_ids"] = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    options = {"kind": "BertLMHeadModel", "is_decoder": True, "add_cross_attention": True}
    own = bert("oner_fast", **options).eval()(input_ids=IDS, use_cache=False, **inputs).logits
    theirs = bert("sdpa", **options).eval()
    parts = []
    for part in (slice(0, 4), slice(4, 8)):
        inputs["position_ids"] = torch.arange(4).view(1, 4)
        parts.append(theirs(input_ids=IDS[:, part], use_cache=False, **inputs).logits)
    assert served == ["packed", "dense"] * 2
    torch.testing.assert_close(own, torch.cat(parts, 1), rtol=1e-4, atol=1e-5)


def told(call: Any) -> list[str]:
    """Return the reasons that two equal calls give."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
        call()
    start = "oner_fast leaves this attention to PyTorch: "
    messages = [str(each.message) for each in found if issubclass(each.category, fallback.Fallback)]
    assert all(message.startswith(start) for message in messages)
    return [message.removeprefix(start) for message in messages]


BIAS = torch.linspace(-2, 2, 64).view(1, 1, 8, 8)


@pytest.mark.parametrize(
    ("build", "inputs", "reason"),
    [
        (lambda a: llama(a), {"attention_mask": BIAS}, "its mask is an additive bias"),
        (lambda a: llama(a), {"attention_mask": 0.1 * BIAS.mT < BIAS}, "its mask differs between queries or heads"),
        (
            mistral,
            {"attention_mask": PADDED},
            "it has a sliding window",
        ),
    ],
    ids=["bias", "pairs", "window"],
)
def test_what_is_not_served_goes_to_sdpa_with_one_warning(
    build: Any, inputs: dict[str, Any], reason: str, served: list[str]
) -> None:
    theirs, model = build("sdpa").eval(), build("oner_fast").eval()
    found: list[Tensor] = []
    assert told(lambda: found.append(model(input_ids=IDS, **inputs).logits)) == [reason]
    assert not served
    for out in found:
        assert torch.equal(out, theirs(input_ids=IDS, **inputs).logits)


class Layer(nn.Module):
    """A layer as transformers calls attention from."""

    is_causal = False


def heads(batch: int = 3, length: int = 8, count: int = 4) -> Tensor:
    return torch.linspace(-1, 1, batch * count * length * 8).mul(31).sin().view(batch, count, length, 8)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"position_bias": BIAS}, "it has an additive bias"),
        ({"output_attentions": True}, "attention weights are asked for"),
    ],
)
@pytest.mark.parametrize("mask", ["none", "keys", "causal", "sequences", "positions"])
def test_a_fallback_means_the_same_as_ours(mask: str, options: dict[str, Any], reason: str) -> None:
    q = heads(1)
    numbers = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    masks = {
        "keys": torch.tensor([1, 1, 1, 1, 1, 0, 0, 0]).bool(),
        "causal": torch.tensor([0, 0, 1, 1, 1, 1, 1, 1]).to(torch.uint8),
        "sequences": numbers.int(),
    }
    given = {} if mask != "positions" else {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])}
    own = masks[mask].view(1, 1, 1, 8) if mask in masks else None
    own_bias = {**options, "position_bias": torch.zeros(1, 1, 8, 8)} if "position_bias" in options else options
    expected, _ = ours.attention(Layer(), q, q, q, own, **given)
    found: list[Tensor] = []
    assert told(lambda: found.append(ours.attention(Layer(), q, q, q, own, **given, **own_bias)[0])) == [reason]
    seen = slice(2, 8) if mask == "causal" else slice(0, 8)  # hidden queries differ
    torch.testing.assert_close(found[0][:, seen], expected[:, seen], rtol=1e-4, atol=1e-5)


def test_what_nobody_serves_is_refused_by_name() -> None:
    q = heads()
    with pytest.raises(ValueError, match="no attention sinks"):
        ours.attention(Layer(), q, q, q, None, s_aux=torch.zeros(4))
    with pytest.raises(ValueError, match="no keys that an indexer chose"):
        ours.attention(Layer(), q, q, q, None, indices=torch.zeros(3, 8, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="does not support `softcap`"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours.attention(Layer(), q, q, q, None, softcap=30.0)
    ends = {"cu_seq_lens_q": torch.tensor([0, 24], dtype=torch.int32)}
    with pytest.raises(ValueError, match="together with a mask that hides keys"):
        ours.attention(Layer(), q, q, q, torch.ones(3, 1, 1, 8, dtype=torch.bool), **ends)
    with pytest.raises(ValueError, match="a sliding window of 5 is not served"):
        ours.attention(Layer(), q, q, q, None, sliding_window=5, **ends)
    with pytest.raises(ValueError, match="reached a cross-attention"):
        ours.attention(type("CrossAttention", (Layer,), {})(), q, q, q, None, **ends)


def test_a_model_is_pickled_and_its_name_ends_with_the_registration() -> None:
    model = bert("oner_fast").eval()
    out = model(input_ids=IDS).logits
    again = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(again(input_ids=IDS).logits, out)
    before = {name: dict(each._global_mapping) for name, each in _interfaces().items()}
    ours.unregister()
    for name, each in _interfaces().items():
        assert each._global_mapping == {key: kept for key, kept in before[name].items() if key != "oner_fast"}
    with pytest.raises(KeyError, match="oner_fast"):
        again(input_ids=IDS)
    again.set_attn_implementation("sdpa")
    torch.testing.assert_close(again(input_ids=IDS).logits, out, rtol=1e-4, atol=1e-5)
    ours.register()
    again.set_attn_implementation("oner_fast")
    torch.testing.assert_close(again(input_ids=IDS).logits, out)


def _interfaces() -> dict[str, Any]:
    return {"attention": ours.AttentionInterface, "mask": ours.AttentionMaskInterface}


COMPILED = {
    "bert": (bert, {"input_ids": IDS, "labels": IDS}),
    "llama": (llama, {"input_ids": IDS, "labels": IDS}),
    "bert packed": (bert, {"input_ids": ROW, "labels": ROW, "position_ids": POSITIONS}),
    "llama packed": (llama, {"input_ids": ROW, "labels": ROW, "position_ids": POSITIONS, **BOUNDARIES}),
    "llama packed by positions": (llama, {"input_ids": ROW, "labels": ROW, "position_ids": POSITIONS}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "llama packed" else [at_length]) for name in COMPILED]
)
def test_a_compiled_model_is_one_graph(name: str) -> None:
    build, inputs = COMPILED[name]
    found = []
    for compiled in (False, True):
        model = build("oner_fast")
        torch._dynamo.reset()
        loss = (torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model)(**inputs).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_dropped_weights_follow_the_seed(served: list[str]) -> None:
    model = bert("oner_fast", attention_probs_dropout_prob=0.3)
    for inputs in ({"input_ids": IDS, "attention_mask": PADDED}, {"input_ids": ROW, "position_ids": POSITIONS}):
        found = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            found.append(model(**inputs).logits)
        assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert served == ["dense"] * 6 + ["packed"] * 6


def test_autocast_computes_in_its_dtype(served: list[str]) -> None:
    exact = bert("sdpa").eval()(input_ids=IDS, attention_mask=PADDED).logits[PADDED.bool()]
    found = []
    for attention in ("sdpa", "oner_fast"):
        model = bert(attention).eval()
        with torch.autocast("cpu", torch.bfloat16):
            found.append(model(input_ids=IDS, attention_mask=PADDED).logits[PADDED.bool()])
    assert served == ["dense"] * 2 and found[1].dtype == found[0].dtype
    assert (found[1] - exact).abs().max() <= 2 * (found[0] - exact).abs().max()
