"""Chosen outputs equal those of the whole pass, and the last block computes no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from oner_fast.models.forward_flops import trunk_flops
from oner_fast.models.oner import ImageInput, OneR, OneRConfig, Pass, PassName, PassOutput, TextInput, Wanted

SIZES: dict[str, Any] = {
    "image_size": 12, "patch_size": 4, "width": 8, "depth": 3, "heads": 2, "vocab_size": 29, "max_text_tokens": 9,
    "embed_dim": 5, "projector_hidden": 7,
}  # fmt: skip
CHOSEN: dict[PassName, Wanted] = {
    # 3 images of 9 patches, and 10 words; in any order, and one of them twice.
    "image": Wanted(patches=torch.tensor([26, 0, 13, 13, 4])),
    "text": Wanted(words=torch.tensor([9, 0, 3])),
    "image_text": Wanted(torch.tensor([8, 9, 2]), torch.tensor([5, 1])),
}


def tower(**changes: Any) -> OneR:
    torch.manual_seed(0)
    model = OneR(OneRConfig(**{**SIZES, **changes})).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def passes() -> list[Pass]:
    draw = torch.Generator().manual_seed(1)
    image = ImageInput(torch.rand(3, 3, 12, 12, generator=draw, dtype=torch.float64))
    text = TextInput(torch.randint(29, (10,), generator=draw), torch.tensor([0, 4, 5, 10], dtype=torch.int32))
    return [
        Pass("image", image), Pass("text", text=text), Pass("image_text", image, text),
        Pass("image_given_text", image), Pass("text_given_image", text=text),
    ]  # fmt: skip


def chosen(output: PassOutput, wanted: Wanted) -> PassOutput:
    """Select the outputs that `wanted` names from a whole output."""
    patches = None if wanted.patches is None else output.patches.flatten(0, 1)[wanted.patches]  # type: ignore[union-attr]
    words = None if wanted.words is None else output.words[wanted.words]  # type: ignore[index]
    return PassOutput(output.cls, patches, words)


def loss_and_gradients(model: OneR, outputs: dict[PassName, PassOutput]) -> list[Tensor]:
    found = [each for name in sorted(outputs) for each in outputs[name] if each is not None]
    model.zero_grad()
    torch.stack([(each.sin() * (index + 1)).sum() for index, each in enumerate(found)]).sum().backward()
    return [*found, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("changes", [{}, {"grad_checkpointing": True}, {"depth": 1}, {"shared_trunk": False}])
def test_chosen_outputs_equal_those_of_the_whole_pass(changes: dict[str, Any]) -> None:
    model = tower(**changes).train()
    given = passes()[: 2 if changes.get("shared_trunk") is False else 5]
    whole = model(given)
    expected = {each.name: chosen(whole[each.name], CHOSEN.get(each.name, Wanted())) for each in given}
    wanted = loss_and_gradients(model, expected)
    found = loss_and_gradients(model, model(given, CHOSEN))
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_the_last_block_computes_only_chosen_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tower(), []
    for block in model.trunk.blocks:
        block.mlp.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].shape[0]))
    model(passes()[:3], CHOSEN)
    tokens = 3 * 10 + 13 + (3 * 10 + 10)
    distinct = (3 + 4) + (3 + 3) + (3 + 3 + 2)
    # A row that is wanted twice may be computed twice.
    assert rows[:2] == [tokens, tokens] and distinct <= rows[2] <= distinct + 1


def test_nothing_wanted_gives_cls_alone() -> None:
    model = tower()
    whole, outputs = model(passes()), model(passes(), {})
    for name, output in outputs.items():
        assert output.patches is None and output.words is None
        torch.testing.assert_close(output.cls, whole[name].cls, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shared_head", [True, False])
def test_projecting_all_passes_together_changes_nothing(shared_head: bool) -> None:
    model = tower(shared_head=shared_head)
    outputs = model(passes(), {})
    together = model.project_cls(outputs)
    assert list(together) == list(outputs)
    for name, projected in together.items():
        torch.testing.assert_close(projected, model.project(outputs[name].cls, name), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "wanted"), [("image", Wanted(words=torch.tensor([0]))), ("text", Wanted(torch.tensor([0])))]
)
def test_outputs_that_a_pass_lacks_are_refused(name: PassName, wanted: Wanted) -> None:
    with pytest.raises(ValueError, match="has none"):
        tower()(passes()[:2], {name: wanted})


def test_operations_of_chosen_outputs() -> None:
    config = OneRConfig(**SIZES)
    lengths = [10, 5]
    assert trunk_flops(config, lengths, wanted=lengths) == trunk_flops(config, lengths)
    # For [CLS] alone: keys and values of all tokens, and everything else for one row of each sequence.
    saved = trunk_flops(config, lengths) - trunk_flops(config, lengths, wanted=[1, 1])
    assert saved == 2 * 8**2 * 10 * (15 - 2) + 4 * 8 * (10 * 9 + 5 * 4)
