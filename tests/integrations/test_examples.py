"""The example scripts of the documentation run as they stand, and their losses fall."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from oner_fast.remedies import install_command

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
NEEDS = {
    "timm_finetuning": ("timm", 12),
    "transformers_packed_bert": ("transformers", 20),
    "lightning_contrast": ("lightning", 30),
    "accelerate_contrast": ("accelerate", 30),
}


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    """End what an example has patched or registered."""
    yield
    for name, end in (("timm", "unpatch"), ("transformers", "unregister")):
        if importlib.util.find_spec(name) is not None:
            getattr(importlib.import_module(f"oner_fast.integrations.{name}"), end)()


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_trains(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    package, steps = NEEDS[name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package} ({install_command(package)})")
    losses = load(name).main(steps)
    assert len(losses) == steps
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert f"in {steps} steps" in capsys.readouterr().out


def test_a_packed_bert_reads_each_sentence_alone() -> None:
    pytest.importorskip("transformers", reason="needs transformers (pip install oner_fast[test])")
    example = load("transformers_packed_bert")
    rows = example.sentences(5)
    pack = example.DataCollatorWithFlattening(return_tensors="pt")
    config = example.BertConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_attention_heads=2)
    torch.manual_seed(0)
    model = example.AutoModelForMaskedLM.from_config(config, attn_implementation="oner_fast").eval()
    inputs = pack(rows)
    inputs.pop("labels")
    packed = model(**inputs).logits[0]
    alone = torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
