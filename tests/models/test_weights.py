from __future__ import annotations

import io
import json
import os
import pickle
import resource
import socket
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import oner_fast
from oner_fast.data.tokenizer import Tokenizer
from oner_fast.models.files import FORMAT, UTA_FORMAT, load_uta, save_uta
from oner_fast.models.oner import OneR, OneRConfig
from oner_fast.models.uta import UTA, UTAConfig

TOKENIZER = Tokenizer.train(["a red square", "a blue circle"], 60)
ONER = OneRConfig(16, 8, 8, 1, 2, vocab_size=TOKENIZER.vocab_size, max_text_tokens=6, embed_dim=5, projector_hidden=7)
STUDENT = UTAConfig(16, 8, width=8, depth=1, heads=2, mlp_hidden=8, embed_dim=5)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def write(path: Path, changes: dict[str, Any] | None = None, state: dict[str, Any] | None = None, **about: Any) -> Path:
    metadata: dict[str, Any] = {
        "format": FORMAT, "config": json.dumps(asdict(ONER) | (changes or {})), "tokenizer": TOKENIZER.to_json(),
    } | about  # fmt: skip
    save_file(
        state or OneR(ONER).state_dict(), path, {key: value for key, value in metadata.items() if value is not None}
    )
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"depth": 10**6}, {"vocab_size": 2**40}, {"vocab_size": 2**31 - 1}, {"width": 2**30}, {"image_size": 2**30},
        {"patch_size": 0}, {"patch_size": -1}, {"depth": -1}, {"depth": 2.5}, {"heads": 0}, {"width": "8"},
        {"max_text_tokens": 2**32}, {"mlp_ratio": 1e300}, {"embed_dim": None}, {"image_mean": [1.0]}, {"depth": 2},
        {"image_std": "abc"}, {"unknown": 1}, {"shared_trunk": False}, {"image_std": 1}, {"image_mean": []},
        {"image_mean": [0, 0, None]}, {"image_std": [1, 1, True]}, {"image_std": [1, 1, 10**400]}, {"shared_trunk": 1},
        {"depth": True}, {"width": 8.0}, {"mlp_ratio": [4.0]}, {"mlp_ratio": True}, {"mlp_ratio": float("nan")},
    ],
)  # fmt: skip
def test_a_hostile_configuration_is_refused_before_it_is_built(changes: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="model.safetensors|unknown model settings"):
        oner_fast.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def _changed(**entries: Any) -> Callable[[], dict[str, Any]]:
    def state() -> dict[str, Any]:
        found: dict[str, Any] = {**OneR(ONER).state_dict(), **entries}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    return state


@pytest.mark.parametrize(
    ("state", "named"),
    [
        (_changed(cls_token=None), "lacks cls_token"),
        (_changed(more=torch.zeros(1)), "holds more, which the model lacks"),
        (_changed(cls_token=torch.zeros(9)), r"cls_token has shape \(9,\), and \(8,\) is needed"),
        (_changed(cls_token=torch.zeros(8, dtype=torch.int32)), "cls_token holds torch.int32"),
        (_changed(cls_token=torch.zeros(8, dtype=torch.complex64)), "cls_token holds torch.complex64"),
    ],
)
def test_weights_that_do_not_fit_are_named(state: Callable[[], dict[str, Any]], named: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"model.safetensors: the weights do not fit the configuration: .*{named}"):
        oner_fast.load(write(tmp_path / "model.safetensors", state=state()))


@pytest.mark.parametrize(
    "about",
    [
        {"config": None}, {"config": "["}, {"config": "[" * 100_000}, {"config": "[]"}, {"config": "3"},
        {"tokenizer": None}, {"tokenizer": "{}"}, {"tokenizer": "x"}, {"tokenizer": "[" * 100_000},
        {"tokenizer": json.dumps({"model": []})}, {"format": "other"}, {"format_version": "9"},
        {"format_version": "9" * 5000}, {"format_version": "²"},
        {"tokenizer": TOKENIZER.to_json().replace('"[MASK]":2', '"[MASK]":4294967296')},
        {"tokenizer": TOKENIZER.to_json().replace('"[MASK]":2', '"[MASK]":-1')},
    ],
)  # fmt: skip
def test_metadata_that_cannot_be_used_are_named(about: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model.safetensors"):
        oner_fast.load(write(tmp_path / "model.safetensors", **about))


def _compressed() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * 1_000_000)
    return out.getvalue()


FILES = {
    "empty": (b"", "is empty"),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "Git LFS pointer.*git lfs pull",
    ),
    "page": (b"\n<!DOCTYPE html><html></html>", "web page"),
    "words": (b"not a model, just words", "is not a safetensors file"),
    "header": ((1 << 60).to_bytes(8, "little") + b"{}" * 10, "cut short"),
    "nested": ((100_000).to_bytes(8, "little") + b"[" * 100_000, "not a safetensors file"),
    "zip": (b"PK\x03\x04 cut short", "cut short or damaged"),
    "compressed": (_compressed(), "compressed"),
    "code": (pickle.dumps(print), "cannot be read as a PyTorch checkpoint"),
    "list": (pickle.dumps([1, 2]), "cannot be read|holds a list"),
    "short": (b"\x80", "cannot be read"),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "model.pth.tar", "model"])
def test_other_files_are_named(kind: str, name: str, tmp_path: Path) -> None:
    content, named = FILES[kind]
    (tmp_path / name).write_bytes(content)
    for read in (oner_fast.load, load_uta):
        with pytest.raises(ValueError, match=f"{name}.*({named})"):
            read(tmp_path / name)


def test_a_truncated_file_and_a_folder_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is not a safetensors file"):
        oner_fast.load(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is a device or a pipe, and a model file is needed"):
        oner_fast.load(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is a folder"):
        load_uta(tmp_path)


@pytest.mark.parametrize("name", ["weights.pt", "weights.ckpt", "weights.pth.tar", "weights"])
@pytest.mark.parametrize("envelope", [(), ("state_dict",), ("model",), ("state_dict_ema",), ("state_dict", "module")])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_state_dicts_of_other_trainers_are_read(
    name: str, envelope: tuple[str, ...], prefix: str, tmp_path: Path
) -> None:
    student = UTA(STUDENT)
    content: dict[str, Any] = {prefix + key: tensor for key, tensor in student.state_dict().items()}
    for key in envelope:
        content = {key: content, "epoch": 3}
    if envelope == ("state_dict_ema",):
        content["state_dict"] = {key: tensor + 1 for key, tensor in content["state_dict_ema"].items()}
    torch.save(content, tmp_path / name)
    found = load_uta(tmp_path / name, STUDENT)
    assert all(torch.equal(one, other) for one, other in zip(found.parameters(), student.parameters(), strict=True))


def test_weights_without_a_configuration_are_named(tmp_path: Path) -> None:
    torch.save({"state_dict": UTA(STUDENT).state_dict()}, tmp_path / "w.ckpt")
    with pytest.raises(ValueError, match=r"w.ckpt holds \d+ tensors and no configuration.*load_uta\(path, config\)"):
        oner_fast.load(tmp_path / "w.ckpt")


def test_a_compiled_model_loads(tmp_path: Path) -> None:
    tower = OneR(ONER)
    wrapped = {f"_orig_mod.{key}": tensor for key, tensor in tower.state_dict().items()}
    found: Any = oner_fast.load(write(tmp_path / "model.safetensors", state=wrapped))
    assert torch.equal(found.model.cls_token, tower.cls_token)


@pytest.mark.parametrize("teacher", ["ViT-B-32:openai", "hf-hub:owner/name", "timm:vit_base_patch16_clip_224.openai"])
def test_a_model_file_fetches_nothing(teacher: str, tmp_path: Path) -> None:
    save_uta(tmp_path / "model.safetensors", UTA(STUDENT), {"teacher": teacher})
    loaded: Any = oner_fast.load(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"would be downloaded; allow it by naming it"):
        loaded.encode_text(["a"])


def test_a_hostile_student_is_refused(tmp_path: Path) -> None:
    for changes in ({"image_size": 8 << 20}, {"depth": 10**6}, {"rope_grid": 0}, {"heads": 0}):
        about = {"format": UTA_FORMAT, "config": json.dumps(asdict(STUDENT) | changes)}
        save_file(UTA(STUDENT).state_dict(), tmp_path / "model.safetensors", about)
        if changes == {"rope_grid": 0}:
            continue
        with pytest.raises(ValueError, match="model.safetensors"):
            oner_fast.load(tmp_path / "model.safetensors")


def _checkpoint(path: Path, more: dict[Any, Any] | None = None, **entries: Any) -> Path:
    state: dict[str, Any] = {
        "student": {f"tower.{name}": tensor for name, tensor in OneR(ONER).state_dict().items()} | (more or {}),
        "model_config": json.dumps(asdict(ONER)), "tokenizer": TOKENIZER.to_json(), "step": 1, "format": 1,
    } | entries  # fmt: skip
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    "tensor",
    [
        None, 3, "x", [torch.zeros(8)], {}, torch.zeros(8, device="meta"), torch.zeros(8).to_sparse(),
        torch.zeros(1, dtype=torch.complex64),
    ],
)  # fmt: skip
def test_a_checkpoint_whose_entry_is_no_dense_tensor_is_named(tensor: Any, tmp_path: Path) -> None:
    path = _checkpoint(tmp_path / "step-00000001.pt", {"tower.cls_token": tensor})
    with pytest.raises(ValueError, match=r"step-00000001\.pt: the weights do not fit the configuration: cls_token"):
        oner_fast.load(path)


@pytest.mark.parametrize(
    "entries",
    [
        {"model_config": 3}, {"model_config": b"{}"}, {"tokenizer": None}, {"kind": []}, {"kind": 3}, {"student": []},
        {"kind": UTA_FORMAT, "model_config": 3}, {"kind": "oner_fast.clip", "model_config": '{"image_mean": 1}'},
        {"kind": "oner_fast.clip", "model_config": '{"embed_dim": 2.5}'},
        {"kind": UTA_FORMAT, "model_config": json.dumps(asdict(STUDENT)), "student": UTA(STUDENT).state_dict(),
         "teacher": 3},
    ],
)  # fmt: skip
def test_a_checkpoint_whose_entries_have_other_types_is_named(entries: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"step-00000001\.pt"):
        oner_fast.load(_checkpoint(tmp_path / "step-00000001.pt", **entries))


def test_keys_that_are_no_names_belong_to_no_tower(tmp_path: Path) -> None:
    path = _checkpoint(tmp_path / "step-00000001.pt", {None: torch.zeros(1), 3: torch.zeros(1), (1, 2): None})
    assert oner_fast.load(path).encode_text(["red"]).shape == (1, 5)
