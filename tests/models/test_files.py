from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from oner_fast.models.files import FORMAT, config_from_dict, load_model, save_model
from oner_fast.models.oner import OneR, OneRConfig

SMALL = OneRConfig(
    image_size=8, patch_size=4, width=8, depth=1, heads=2, vocab_size=13, max_text_tokens=6, embed_dim=5,
    projector_hidden=7, image_mean=(0.1, 0.2, 0.3),
)  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"shared_trunk": False, "shared_head": False, "grad_checkpointing": True}])
def test_round_trip(tmp_path: Path, changes: dict[str, Any]) -> None:
    tower = OneR(OneRConfig(**{**asdict(SMALL), **changes}))
    path = tmp_path / "deep" / "model.safetensors"
    save_model(path, tower, '{"a tokenizer": 1}')
    assert os.listdir(path.parent) == ["model.safetensors"]
    again, tokenizer = load_model(str(path))
    assert again.config == tower.config and isinstance(again.config.image_mean, tuple)
    assert tokenizer == '{"a tokenizer": 1}' and not again.training
    for (name, one), (other_name, other) in zip(tower.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other_name and torch.equal(one, other)
    before = path.read_bytes()
    for _ in range(4):
        save_model(path, again, tokenizer)
        assert path.read_bytes() == before


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no model file .*none"):
        load_model(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="there is no model file"):
        load_model(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_model(path)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="not a model of oner_fast: its format is None"):
        load_model(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, OneR(SMALL), "{}")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_model(path)


def test_weights_must_fit_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    state = {**OneR(SMALL).state_dict(), "extra": torch.zeros(1)}
    save_file(state, path, {"format": FORMAT, "config": json.dumps(asdict(SMALL)), "tokenizer": "{}"})
    with pytest.raises(ValueError, match=r"the weights do not fit the configuration beside them(.|\n)*extra"):
        load_model(path)


def test_an_unknown_setting_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown model settings height, size; known: depth, embed_dim.*width"):
        config_from_dict({**asdict(SMALL), "size": 1, "height": 2})
    assert config_from_dict(json.loads(json.dumps(asdict(SMALL)))) == SMALL
