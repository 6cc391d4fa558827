"""The examples for Lightning and Accelerate run, and repeat the losses of a plain loop."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from oner_fast.models.optional_packages import optional_package

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
STEPS = 8


def example(name: str, package: str) -> Any:
    """Import an example, whose package imports a torchvision that may not fit torch."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    if importlib.util.find_spec("torchvision") is not None:
        optional_package("torchvision")
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def plain(module: Any, loss_of: Any, steps: int) -> float:
    """Train in a plain loop from the same weights, on the same data."""
    torch.manual_seed(0)
    model = module.Contrast()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = torch.zeros(())
    for batch in DataLoader(module.pairs(8 * steps), batch_size=8, collate_fn=module.collate):
        optimiser.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimiser.step()
    return float(loss)


@pytest.mark.filterwarnings("ignore")
def test_lightning_needs_nothing() -> None:
    module = example("lightning_contrast", "lightning")

    def loss_of(model: Any, batch: Any) -> torch.Tensor:
        model.log = lambda *_: None
        loss: torch.Tensor = model.training_step(batch, 0)
        return loss

    found = module.main(STEPS)
    assert found == plain(module, loss_of, STEPS)
    first = module.main(1)
    assert found < first and module.main(STEPS, precision="bf16-mixed") < first


@pytest.mark.filterwarnings("ignore")
def test_accelerate_needs_nothing() -> None:
    module = example("accelerate_contrast", "accelerate")
    found = module.main(STEPS)
    assert found == plain(module, lambda model, batch: model(*batch), STEPS)
    assert found < module.main(1)
