import copy
import math

import pytest
import torch
from torch import nn

from oner_fast.train.engine.optimizer import build_adamw, clip_grad_norm, decays, parameter_groups, set_lr


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 4))
        self.mask_token = nn.Parameter(torch.randn(1, 4))
        self.patch_positions = nn.Parameter(torch.randn(9, 4))
        self.word_position_embedding = nn.Embedding(5, 4)
        self.words = nn.Embedding(7, 4)
        self.patch = nn.Conv2d(3, 4, 2)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 4)
        self.mask_decoder = nn.Linear(4, 4)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Parameter(torch.randn(4, 4), requires_grad=False)


def test_groups_by_name():
    optimizer = build_adamw(Tower(), lr=1e-3, weight_decay=0.05)
    decay, rest = optimizer.param_groups
    assert decay["param_names"] == ["words.weight", "patch.weight", "head.weight", "mask_decoder.weight"]
    assert rest["param_names"] == [
        "cls_token",
        "mask_token",
        "patch_positions",
        "logit_scale",
        "word_position_embedding.weight",
        "patch.bias",
        "norm.weight",
        "norm.bias",
        "head.bias",
        "mask_decoder.bias",
    ]
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.05, 0.0)
    assert decay["betas"] == (0.9, 0.98) and decay["eps"] == 1e-6 and decay["fused"] is True


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("trunk.pos_embed", False),
        ("image.positional_embedding", False),
        ("positions.weight", False),
        ("embed.cls", False),
        ("mask_embedding.weight", False),
        ("blocks.0.attention.composition.weight", True),
        ("cls_head.weight", True),
        ("masking_head.weight", True),
        ("preposition.weight", True),
    ],
)
def test_names_are_matched_by_whole_words(name, expected):
    assert decays(name, torch.zeros(2, 2)) is expected
    assert decays(name, torch.zeros(2)) is False


def test_fused_equals_the_formula_and_is_repeatable():
    torch.manual_seed(0)
    tower = Tower().double()
    steps = []
    for fused in (True, True, None):
        model = copy.deepcopy(tower)
        optimizer = build_adamw(model, lr=1e-2, weight_decay=0.1)
        if fused is None:
            groups = parameter_groups(model, 0.1)
            optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98), eps=1e-6, foreach=False, fused=False)
        for step in range(3):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.cos(parameter.detach() * (step + 1))
            optimizer.step()
        steps.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(steps[0], steps[1])
    torch.testing.assert_close(steps[0], steps[2], rtol=1e-12, atol=1e-12)


def test_state_loads_into_a_new_optimiser():
    torch.manual_seed(0)
    model = Tower()
    optimizer = build_adamw(model, lr=1e-2)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    twin = copy.deepcopy(model)
    other = build_adamw(twin, lr=1e-2)
    other.load_state_dict(optimizer.state_dict())
    for one in (model, twin):
        for parameter in one.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    set_lr(optimizer, 0.5)
    set_lr(other, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
    optimizer.step()
    other.step()
    for left, right in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("model", [nn.LayerNorm(4), nn.Linear(4, 4, bias=False)], ids=["none decays", "all decay"])
def test_one_of_the_groups_may_be_empty(model):
    optimizer, other = (build_adamw(copy.deepcopy(model), lr=1e-2) for _ in range(2))
    assert sorted(len(group["params"]) for group in optimizer.param_groups) == sorted(
        [0, len(list(model.parameters()))]
    )
    assert all(len(group["param_names"]) == len(group["params"]) for group in optimizer.param_groups)
    before = [x.detach().clone() for group in optimizer.param_groups for x in group["params"]]
    for _ in range(2):
        for one in (optimizer, other):
            for parameter in (x for group in one.param_groups for x in group["params"]):
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        other.load_state_dict(optimizer.state_dict())
    after = [x for group in optimizer.param_groups for x in group["params"]]
    assert all((x - y).abs().min() > 1e-3 for x, y in zip(before, after, strict=True))


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="ReLU has no parameter that requires a gradient"):
        build_adamw(nn.ReLU(), lr=1e-3)


def test_gradient_norm_before_clipping():
    left, right, without = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    left.grad, right.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    parameters = [left, right, without]
    assert clip_grad_norm(iter(parameters), None).item() == 5.0
    assert clip_grad_norm(parameters, 10.0).item() == 5.0 and left.grad[0] == 3.0
    assert clip_grad_norm(iter(parameters), 1.0).item() == 5.0
    torch.testing.assert_close(torch.stack([left.grad, right.grad]), torch.tensor([[0.6, 0.0], [0.0, 0.8]]))
    left.grad[1] = math.nan
    assert math.isnan(clip_grad_norm(parameters, 1.0).item())
    assert clip_grad_norm([without], 1.0).item() == 0.0
    with pytest.raises(ValueError, match="max_norm must be positive"):
        clip_grad_norm(parameters, 0.0)
