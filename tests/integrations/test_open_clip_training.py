"""open_clip's own training command, with our ops by one line and without: the losses that it logs agree."""

from __future__ import annotations

import json
import logging
import re
import runpy
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from oner_fast.models.optional_packages import optional_package

if find_spec("open_clip") is None or find_spec("pandas") is None:
    pytest.skip("needs open_clip's trainer (pip install 'open_clip_torch[training]')", allow_module_level=True)

from oner_fast.integrations import open_clip as ours

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "open_clip_training.py"
LOSSES = re.compile(r"(\w*[Ll]oss): ([0-9.e+-]+) \(")
COCA = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}  # as wide as embed_dim
# amp, the default precision, is bfloat16 on a CPU. open_clip rounds logits to it, and SigLIP's begin at -10.
ROUNDED = 2**-8


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    yield
    ours.unpatch()


def logged(folder: Path) -> list[tuple[str, float]]:
    (log,) = folder.glob("logs/*/out.log")
    found = [(name, float(value)) for name, value in LOSSES.findall(log.read_text())]
    assert found
    return found


def example(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> dict[str, Any]:
    """Run the example with these arguments in a new folder; what it logs lies in `logs`."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
    handlers = logging.root.handlers[:]
    levels = {
        logger: logger.level for logger in (logging.root, *map(logging.getLogger, logging.root.manager.loggerDict))
    }
    try:
        return runpy.run_path(str(EXAMPLE), run_name="__main__")
    finally:  # open_clip's command sets up logging for the whole process
        logging.root.handlers[:] = handlers
        for logger, level in levels.items():
            logger.setLevel(level)


def both(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str
) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """The losses that the example logs, and those of the same command without our line."""
    example(monkeypatch, tmp_path / "patched", *arguments)
    ours.unpatch()
    with monkeypatch.context() as without:
        without.setattr(ours, "patch", lambda: None)
        example(monkeypatch, tmp_path / "plain", *arguments)
    return logged(tmp_path / "patched"), logged(tmp_path / "plain")


def agree(found: list[tuple[str, float]], right: list[tuple[str, float]], rel: float = 1e-4) -> None:
    assert [name for name, _ in found] == [name for name, _ in right]
    assert [x for _, x in found] == pytest.approx([x for _, x in right], rel=rel)


def test_the_example_logs_the_losses_of_open_clip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, right = both(monkeypatch, tmp_path)
    agree(found, right)
    assert len(found) == 8  # four steps, each with its contrastive loss and its sum
    states = []
    for name in ("patched", "plain"):
        (path,) = (tmp_path / name).glob("logs/*/checkpoints/epoch_1.pt")
        states.append(torch.load(path, weights_only=True)["state_dict"])
    assert list(states[0]) == list(states[1])


@pytest.mark.integrations
@pytest.mark.parametrize(
    ("more", "rel"),
    [
        ("--siglip", ROUNDED),
        ("--siglip --precision fp32", 1e-4),
        ("--accum-freq 2", 1e-4),
        ("--grad-checkpointing", 1e-4),
        ("--precision amp_bf16", 3e-2),
        ("--precision pure_bf16", 3e-2),
        ("--torchcompile", 1e-4),
        ("--lock-image --lock-image-unlocked-groups 1", 1e-4),
    ],
)
def test_options_of_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, more: str, rel: float) -> None:
    short = runpy.run_path(str(EXAMPLE))["SHORT"]
    agree(*both(monkeypatch, tmp_path, *short.split(), *more.split()), rel=rel)


@pytest.mark.integrations
def test_captions_and_distillation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = runpy.run_path(str(EXAMPLE))
    coca = {**given["TINY"], "multimodal_cfg": COCA, "custom_text": True}
    coca["vision_cfg"] = {**coca["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    coca["text_cfg"] = {**coca["text_cfg"], "width": COCA["width"], "embed_cls": True, "output_tokens": True}
    (tmp_path / "coca_tiny.json").write_text(json.dumps(coca))
    optional_package("open_clip").add_model_config(tmp_path / "coca_tiny.json")
    # open_clip leaves the decoder's last projection as the memory was, which may hold NaN.
    decoder = optional_package("open_clip").transformer.MultimodalTransformer
    made = decoder.__init__

    def initialised(self: Any, *arguments: Any, **options: Any) -> None:
        made(self, *arguments, **options)
        torch.nn.init.normal_(self.text_projection, std=0.02)

    monkeypatch.setattr(decoder, "__init__", initialised)
    whole = f"{given['SHORT']} --precision fp32"
    short = whole.replace("--model tiny", "--model coca_tiny")
    (tmp_path / "coca").mkdir()
    with pytest.warns(UserWarning, match="attn_mask is 3-dimensional"):
        agree(*both(monkeypatch, tmp_path / "coca", *short.split()))
    (tmp_path / "distill").mkdir()
    example(monkeypatch, tmp_path / "distill" / "teacher", *whole.split())
    (weights,) = (tmp_path / "distill" / "teacher").glob("logs/*/checkpoints/epoch_1.pt")
    distill = f"{whole} --distill-model tiny --distill-pretrained {weights}"
    found, right = both(monkeypatch, tmp_path / "distill", *distill.split())
    assert {name for name, _ in found} == {"Contrastive_loss", "Distill_loss", "Loss"}
    agree(found, right)
