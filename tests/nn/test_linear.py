"""The linear layer of packed batches: nn.Linear's result and gradients for any number of rows."""

import pytest
import torch
from torch import Tensor, nn

from oner_fast.nn.linear import Linear, packed_linear


def gradients(layer: nn.Linear, x: Tensor, grad: Tensor, autocast: bool) -> list[Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    y.backward(grad.to(y.dtype))
    assert x.grad is not None and layer.weight.grad is not None and layer.bias.grad is not None
    return [y.detach(), x.grad, layer.weight.grad.clone(), layer.bias.grad.clone()]


def layers(seed: int = 0) -> tuple[Linear, nn.Linear]:
    torch.manual_seed(seed)
    ours, plain = Linear(24, 40), nn.Linear(24, 40)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 127, 128, 129, 200, 1000])
def test_bfloat16_errs_no_more_than_the_plain_layer(rows: int) -> None:
    ours, plain = layers()
    x, grad = torch.randn(rows, 24), torch.randn(rows, 40)
    exact = gradients(plain.double(), x.double(), grad.double(), autocast=False)
    plain.float()
    ours_error = [(a.double() - b).norm() for a, b in zip(gradients(ours, x, grad, True), exact, strict=True)]
    plain_error = [(a.double() - b).norm() for a, b in zip(gradients(plain, x, grad, True), exact, strict=True)]
    unit = torch.finfo(torch.bfloat16).eps
    for mine, theirs, reference in zip(ours_error, plain_error, exact, strict=True):
        assert mine <= 1.5 * theirs + 0.1 * unit * reference.norm()


@pytest.mark.parametrize("rows", [65, 200])
def test_float32_equals_the_plain_layer_to_the_bit(rows: int) -> None:
    ours, plain = layers()
    x, grad = torch.randn(rows, 24), torch.randn(rows, 40)
    for a, b in zip(gradients(ours, x, grad, False), gradients(plain, x, grad, False), strict=True):
        assert torch.equal(a, b)


def test_rows_do_not_depend_on_the_number_of_later_rows() -> None:
    ours, _ = layers()
    x = torch.randn(300, 24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(x)[:130], ours(x[:130]), rtol=0.01, atol=0.01)


def test_without_bias_and_without_weight_gradient() -> None:
    x = torch.randn(100, 24, requires_grad=True)
    weight = torch.randn(40, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = packed_linear(x, weight, None)
    y.sum().backward()
    assert x.grad is not None and weight.grad is None
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x), rtol=0.02, atol=0.2)
