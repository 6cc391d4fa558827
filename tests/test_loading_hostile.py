"""`oner_fast.load` of files that are damaged, of another kind or hostile: a sentence, little memory, no network."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file

import oner_fast
from oner_fast.data.tokenizer import Tokenizer
from oner_fast.models.clip import CLIPConfig, build_clip, save_clip
from oner_fast.models.files import FORMAT, UTA_FORMAT, load_uta, save_model, save_uta
from oner_fast.models.oner import OneR, OneRConfig
from oner_fast.models.teacher import is_fetched, load_teacher
from oner_fast.models.uta import UTA, UTAConfig
from oner_fast.train.engine import checkpoint

TOKENIZER = Tokenizer.train(["a red square", "a green circle above a blue square", "blue"], 60)
ONER = OneRConfig(
    image_size=16, patch_size=8, width=8, depth=2, heads=2, vocab_size=TOKENIZER.vocab_size, max_text_tokens=6,
    embed_dim=5, projector_hidden=7,
)  # fmt: skip
STUDENT = UTAConfig(24, 8, width=32, depth=2, heads=2, mlp_hidden=40, embed_dim=12)
CLIP = CLIPConfig(
    image_size=16, patch_size=8, vision_width=32, vision_layers=1, vision_heads=2, text_width=16, text_layers=1,
    text_heads=2, context_length=8, embed_dim=12,
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **more: Any) -> NoReturn:
        raise AssertionError("a file made the loader open a connection")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with whole models: `oner.safetensors`, `uta.safetensors`, the folder `clip`, and two checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    tower, student, clip = OneR(ONER), UTA(STUDENT), build_clip(CLIP)
    save_model(folder / "oner.safetensors", tower, TOKENIZER.to_json())
    save_uta(folder / "uta.safetensors", student, {"teacher": "clip"})
    save_clip(folder / "clip", clip, CLIP)
    return folder


def oner_file(path: Path, changes: dict[str, Any], whole: Path, **metadata: str) -> Path:
    """A file of OneR's weights whose configuration is changed."""
    config = json.dumps({**asdict(ONER), **changes})
    known = {"format": FORMAT, "config": config, "tokenizer": TOKENIZER.to_json()}
    save_file(load_file(whole / "oner.safetensors"), path, known | metadata)
    return path


def oner_state(whole: Path, **changes: Any) -> dict[str, Any]:
    tower = {f"tower.{name}": tensor for name, tensor in load_file(whole / "oner.safetensors").items()}
    state = {"student": tower, "model_config": json.dumps(asdict(ONER)), "tokenizer": TOKENIZER.to_json()}
    return state | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depth": 10**6}, "asks for 1,000,000 blocks, and the weights hold 2"),
        ({"depth": 1}, "asks for 1 blocks, and the weights hold 2"),
        ({"depth": 2**31 - 1}, "blocks"),
        ({"vocab_size": 2**40}, "vocab_size must be a whole number from 1 to"),
        ({"vocab_size": 2**30}, "word_embedding.words.weight has shape"),
        ({"width": 2**30}, "no model has these sizes|has shape"),
        ({"width": 9}, "width must be a multiple of heads"),
        ({"image_size": 2**30}, "positions has shape|no model has these sizes"),
        ({"patch_size": 7}, "image_size must be a multiple of patch_size"),
        ({"mlp_ratio": 1e29}, "no model has these sizes|has shape"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio must be a finite number above 0"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio must be a finite number"),
        ({"mlp_ratio": True}, "mlp_ratio must be"),
        ({"depth": "2"}, "depth must be a whole number"),
        ({"depth": True}, "depth must be a whole number"),
        ({"depth": 0}, "depth must be a whole number"),
        ({"depth": -1}, "depth must be a whole number"),
        ({"depth": None}, "depth must be a whole number"),
        ({"depth": 2.5}, "depth must be a whole number"),
        ({"patch_size": 0}, "patch_size must be a whole number"),
        ({"mlp_ratio": 1e300}, "mlp_ratio must be a finite number"),
        ({"image_mean": [1.0]}, "patch_embedding.project.weight has shape"),
        ({"depth": 2.0}, "depth must be a whole number"),
        ({"shared_trunk": 1}, "shared_trunk must be true or false"),
        ({"shared_trunk": False}, "missing text_trunk|the weights hold 0"),
        ({"image_mean": [0.5] * 10**4}, "image_mean must be 1 to 16 finite numbers"),
        ({"image_mean": "abc"}, "image_mean must be"),
        ({"image_std": [0.0, 1.0, 1.0]}, "image_std must be above 0"),
        ({"image_mean": [0.5] * 4}, "patch_embedding.project.weight has shape"),
        ({"hidden": 3}, "unknown model settings hidden"),
        ({"__class__": "x"}, "unknown model settings __class__"),
    ],
)
def test_a_configuration_is_compared_before_anything_is_built(
    changes: dict[str, Any], words: str, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words) as found:
        oner_fast.load(oner_file(tmp_path / "m.safetensors", changes, whole))
    assert "m.safetensors" in str(found.value)
    saved = checkpoint.save(tmp_path, 1, oner_state(whole, model_config=json.dumps({**asdict(ONER), **changes})), 0)
    with pytest.raises(ValueError, match=words):
        oner_fast.load(saved)


def test_hostile_sizes_stay_below_500_mb(whole: Path, tmp_path: Path) -> None:
    hostile: list[dict[str, Any]] = [
        {"depth": 2**31 - 1}, {"vocab_size": 2**31 - 1}, {"width": 2**31 - 2}, {"projector_hidden": 2**31 - 1},
        {"image_size": 8 * 2**26}, {"mlp_ratio": 1e9}, {"max_text_tokens": 2**31 - 1},
    ]  # fmt: skip
    paths = [oner_file(tmp_path / f"{number}.safetensors", each, whole) for number, each in enumerate(hostile)]
    paths.append(checkpoint.save(tmp_path, 1, oner_state(whole, model_config=json.dumps({"depth": 10**6})), 0))
    script = (
        "import resource, sys, oner_fast\n"
        "oner_fast.load\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        oner_fast.load(path)\n"
        "    except ValueError as error:\n"
        "        print(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    argv = [sys.executable, "-c", script, *map(str, paths)]
    *sentences, grown = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(sentences) == len(paths) and int(grown) < 500, (sentences, grown)


def test_parts_that_are_missing_or_more_are_named(whole: Path, tmp_path: Path) -> None:
    path, state = tmp_path / "m.safetensors", load_file(whole / "oner.safetensors")
    known = {"format": FORMAT, "config": json.dumps(asdict(ONER)), "tokenizer": TOKENIZER.to_json()}
    changed: list[tuple[dict[str, torch.Tensor], dict[str, str], str]] = [
        (state, {k: v for k, v in known.items() if k != "config"}, "lacks 'config' in its metadata"),
        (state, {k: v for k, v in known.items() if k != "tokenizer"}, "lacks 'tokenizer'"),
        (state, known | {"config": "[]"}, "its JSON is a list, and an object is needed"),
        (state, known | {"config": "{"}, "its JSON cannot be read"),
        (state, known | {"config": "[" * 10**5}, "nested deeper"),
        ({k: v for k, v in state.items() if k != "cls_token"}, known, "missing cls_token"),
        (state | {"more": torch.zeros(1)}, known, "extra more"),
        (state | {"cls_token": torch.zeros(9)}, known, r"cls_token has shape \[9\], and \[8\] is needed"),
        (state | {"cls_token": torch.zeros(8, dtype=torch.int64)}, known, "cls_token has dtype I64"),
        (state, known | {"format_version": "9"}, "has format version 9"),
        (state, known | {"format": "other"}, "its format is 'other'"),
        (state | {"cls_token": torch.zeros(8, dtype=torch.complex64)}, known, "cls_token has dtype C64"),
        (state | {"cls_token": torch.zeros(8, dtype=torch.bool)}, known, "cls_token has dtype BOOL"),
        (state | {"module.cls_token": torch.zeros(8)}, known, "holds 'cls_token' twice"),
        ({}, known, "the weights hold 0|missing"),
    ]
    for tensors, metadata, words in changed:
        save_file(tensors, path, metadata)
        with pytest.raises(ValueError, match=words) as found:
            oner_fast.load(path)
        assert "m.safetensors" in str(found.value) and "\n" not in str(found.value)


def test_other_floats_and_wrapped_names_are_read(whole: Path, tmp_path: Path) -> None:
    state = load_file(whole / "oner.safetensors")
    known = {"format": FORMAT, "config": json.dumps(asdict(ONER)), "tokenizer": TOKENIZER.to_json()}
    for prefix, dtype in (("_orig_mod.", None), ("module.", torch.float64), ("module._orig_mod.", torch.float16)):
        for suffix in ("", ".safetensors", ".bin", ".v2"):
            path = tmp_path / f"model{suffix}"
            save_file({prefix + name: tensor.to(dtype or tensor.dtype) for name, tensor in state.items()}, path, known)
            loaded = oner_fast.load(path)
            for name, tensor in loaded.model.state_dict().items():
                assert tensor.dtype == torch.float32
                torch.testing.assert_close(tensor, state[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t["model"]["vocab"].update(x=2**32), "the id of 'x' must be a whole number below"),
        (lambda t: t["model"]["vocab"].update(x=2**24 - 1), "has ids up to 16777215, and the model embeds"),
        (lambda t: t["model"]["vocab"].update(x=-1), "the id of 'x'"),
        (lambda t: t["model"]["vocab"].update(x=1.5), "the id of 'x'"),
        (lambda t: t["model"]["vocab"].update(x="1"), "the id of 'x'"),
        (lambda t: t["model"]["vocab"].update(x=3), "two pieces have the same id"),
        (lambda t: t["model"]["vocab"].pop("[MASK]"), r"the vocabulary has no \[MASK\]"),
        (lambda t: t["model"].update(vocab=[]), "holds no vocabulary"),
        (lambda t: t["model"].update(type="BPE"), "holds a BPE model"),
        (lambda t: t.update(model=3), "lacks 'model'"),
        (lambda t: t.update(normalizer={"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}), "Replace"),
        (lambda t: t.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "Precompiled"),
        (lambda t: t.update(normalizer={"type": "BertNormalizer", "lowercase": 3}), "cannot be read"),
        (lambda t: t.update(normalizer={"type": "Sequence", "normalizers": [[]]}), "normalizer 'None'"),
        (lambda t: t.update(normalizer="x"), "normalizer 'None'"),
    ],
)
def test_a_tokenizer_is_checked(change: Any, words: str, whole: Path, tmp_path: Path) -> None:
    values = json.loads(TOKENIZER.to_json())
    change(values)
    text = json.dumps(values)
    with pytest.raises(ValueError, match=words) as found:
        oner_fast.load(oner_file(tmp_path / "m.safetensors", {}, whole, tokenizer=text))
    assert "m.safetensors" in str(found.value)
    if "has ids up to" not in words:
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            Tokenizer.load(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 10**5, '{"model": ' * 10**5, '"\\ud800"', "\x00"])
def test_a_tokenizer_of_other_json_is_refused(text: str, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the tokenizer in .*m\.safetensors"):
        oner_fast.load(oner_file(tmp_path / "m.safetensors", {}, whole, tokenizer=text))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
KINDS = {
    "empty": (b"", "is empty"),
    "lfs": (LFS, "is a Git LFS pointer; fetch the file with git lfs pull"),
    "html": (b"\n<!DOCTYPE html><html>404</html>", "is an HTML or XML page"),
    "html with a mark": (b"\xef\xbb\xbf<html>", "is an HTML or XML page"),
    "xml": (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "is an HTML or XML page"),
    "gzip": (b"\x1f\x8b\x08\x00" * 9, "compressed with gzip"),
    "zstd": (b"\x28\xb5\x2f\xfd" * 9, "compressed with zstd"),
    "gguf": (b"GGUF\x03\0\0\0", "is a GGUF file"),
    "hdf5": (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
    "text": (b"notes", "is not a safetensors file"),
    "zeros": (bytes(4096), "is not a safetensors file"),
    "pickle": (pickle.dumps({"a": print}, 2), "holds objects of|damaged or is no PyTorch file"),
    "list": (pickle.dumps([1, 2], 2), "damaged or is no PyTorch file|holds a list"),
    "cut pickle": (b"\x80\x02}q\x00", "damaged or is no PyTorch file"),
    "cut zip": (b"PK\x03\x04" + bytes(30), "is damaged or cut short"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_files_are_named_whatever_their_suffix(kind: str, tmp_path: Path) -> None:
    content, words = KINDS[kind]
    for name in ("model", "model.safetensors", "model.pt", "model.pth.tar", "last.ckpt"):
        path = tmp_path / name
        path.write_bytes(content)
        for read in (oner_fast.load, lambda file: load_uta(file, STUDENT)):
            with pytest.raises(ValueError, match=words) as found:
                read(path)
            assert str(path) in str(found.value) and "\n" not in str(found.value)


def torch_bytes(content: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    torch.save(content, out, **options)
    return out.getvalue()


def test_zip_archives_that_torch_did_not_write_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
    with pytest.raises(ValueError, match=r"model\.pt is a compressed zip archive"):
        oner_fast.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "b")
    with pytest.raises(ValueError, match="is a zip archive and no PyTorch file"):
        oner_fast.load(path)
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path)
    with pytest.raises(ValueError, match="is a TorchScript archive, which holds code"):
        oner_fast.load(path)
    with pytest.raises(FileNotFoundError, match="it is a directory"):
        load_uta(tmp_path, STUDENT)
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(ValueError, match="is a named pipe or a device"):
        oner_fast.load(tmp_path / "pipe.pt")
    whole = torch_bytes({"a": torch.zeros(1000)})
    flipped = bytearray(whole)
    flipped[whole.index(bytes(1000)) + 500] = 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match="the checksum of its member .* does not match"):
        load_uta(path, STUDENT)
    for cut in (4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"model\.pt is (damaged|no)"):
            oner_fast.load(path)


def test_an_error_of_the_system_stays_one(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **more: Any) -> NoReturn:
        raise RuntimeError("unable to mmap 120 bytes from file </a/b>: Cannot allocate memory (12)")

    path = tmp_path / "w.pt"
    path.write_bytes(torch_bytes({"a": torch.zeros(2)}))
    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    for file in (path, whole / "oner.safetensors"):
        with pytest.raises(OSError, match=file.name) as found:
            oner_fast.load(file)
        assert found.value.errno == errno.ENOMEM


def test_weights_without_a_configuration_name_the_way(whole: Path, tmp_path: Path) -> None:
    state = load_file(whole / "oner.safetensors")
    for name in ("model.pt", "model.pth.tar", "last.ckpt", "model"):
        path = tmp_path / name
        path.write_bytes(torch_bytes({"state_dict": state, "epoch": 3}))
        with pytest.raises(
            ValueError, match=r"is not a checkpoint of this library: it holds epoch, state_dict; .*load_uta"
        ):
            oner_fast.load(path)


def test_checkpoints_of_a_run_are_checked(whole: Path, tmp_path: Path) -> None:
    wide = torch.zeros(1, 8).expand(10**9, 8)
    cases = [
        ({"kind": "other"}, "a model of an unknown kind, 'other'"),
        ({"kind": 7}, "unknown kind"),
        ({"student": None}, "is not a checkpoint of a tower"),
        ({"student": {}}, "holds no weights"),
        ({"student": {"tower.cls_token": 3}}, "holds no weights"),
        ({"model_config": 3}, "the text 'model_config' is missing"),
        ({"tokenizer": 3}, "the text 'tokenizer' is missing"),
        ({"tokenizer": "{}"}, "the tokenizer in .* lacks 'model'"),
        ({"student": oner_state(whole)["student"] | {"tower.word_embedding.words.weight": wide}}, "and the file has"),
    ]
    for changes, words in cases:
        path = checkpoint.save(tmp_path, 1, oner_state(whole, **changes), 0)
        with pytest.raises(ValueError, match=words) as found:
            oner_fast.load(path)
        assert str(path) in str(found.value) and "\n" not in str(found.value)
    state = oner_state(whole)
    state["student"] = {f"_orig_mod.{name}": tensor for name, tensor in state["student"].items()}
    path = checkpoint.save(tmp_path, 1, state, 0).rename(tmp_path / "moved.ckpt")
    assert isinstance(oner_fast.load(path).model, OneR)


CONVENTIONS: dict[str, Any] = {
    "plain": lambda s: s,
    "ordered": lambda s: OrderedDict(s),
    "state_dict": lambda s: {"state_dict": s, "epoch": 1, "arch": "x"},
    "model": lambda s: {"model": s, "optimizer": {"state": {}}},
    "module": lambda s: {"module": s},
    "averaged": lambda s: {"state_dict": {k: v + 1 for k, v in s.items()}, "state_dict_ema": s},
    "model_ema": lambda s: {"model": {k: v + 1 for k, v in s.items()}, "model_ema": s},
    "ddp": lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
    "compiled": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "compiled ddp": lambda s: {"model": {f"module._orig_mod.{k}": v for k, v in s.items()}},
    "ddp compiled": lambda s: {"model": {f"_orig_mod.module.{k}": v for k, v in s.items()}},
    "compiled trunk": lambda s: {k.replace("trunk.", "trunk._orig_mod."): v for k, v in s.items()},
    "nested": lambda s: {"state_dict": {"model": s}},
}


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_weights_are_read_under_every_convention(convention: str, whole: Path, tmp_path: Path) -> None:
    state = load_file(whole / "uta.safetensors")
    wrapped = CONVENTIONS[convention](state)
    for name, old in (("uta.pt", False), ("uta.pth.tar", False), ("last.ckpt", True), ("uta", True)):
        path = tmp_path / name
        path.write_bytes(torch_bytes(wrapped, _use_new_zipfile_serialization=not old))
        loaded = load_uta(path, STUDENT).state_dict()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())


def test_a_student_is_compared_before_it_is_built(whole: Path, tmp_path: Path) -> None:
    path, state = tmp_path / "m.safetensors", load_file(whole / "uta.safetensors")
    for changes, words in (
        ({"depth": 10**6}, "asks for 1,000,000 blocks"),
        ({"image_size": 8 * 2**20}, "positions has shape|no model has these sizes"),
        ({"mlp_hidden": 2**31 - 1}, "has shape"),
        ({"rope_theta": 0.0}, "rope_theta must be a finite number above 0"),
        ({"heads": 16}, "multiple of 4"),
        ({"rope_grid": 0}, "rope_grid must be a whole number"),
        ({"mask_token": True}, "missing patch_embedding.mask_token"),
    ):
        config = json.dumps({**asdict(STUDENT), **changes})
        save_file(state, path, {"format": UTA_FORMAT, "config": config})
        with pytest.raises(ValueError, match=words):
            oner_fast.load(path)


@pytest.mark.parametrize(
    "source", ["hf-hub:owner/name", "ViT-B-32:openai", "timm:vit_base_patch16_clip_224.openai", "no.pt:ViT-B-32"]
)
def test_a_students_file_fetches_no_text_tower(source: str, tmp_path: Path) -> None:
    save_uta(tmp_path / "m.safetensors", UTA(STUDENT), {"teacher": source})
    loaded = oner_fast.load(tmp_path / "m.safetensors")
    assert loaded.encode_image(torch.zeros(1, 3, 24, 24, dtype=torch.uint8)).shape == (1, 12)
    with pytest.raises(ValueError, match=r"may have to be fetched; ask for it: oner_fast.load\(..., text_tower="):
        loaded.encode_text(["a"])


def test_a_model_with_a_part_of_a_hub_counts_as_fetched(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(b"x")
    assert is_fetched(f"{tmp_path}/w.pt:roberta-ViT-B-32") and not is_fetched(f"{tmp_path}/w.pt:ViT-B-32")
    assert not is_fetched(str(tmp_path)) and not is_fetched(f"local-dir:{tmp_path}") and is_fetched("https://a.org/x")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["model_cfg"]["text_cfg"].update(hf_model_name="owner/name"), "which would be fetched from a hub"),
        (lambda c: c["model_cfg"]["vision_cfg"].update(timm_model_name="hf-hub:owner/name"), "fetched from a hub"),
        (lambda c: c["model_cfg"]["text_cfg"].update(tokenizer_kwargs={"trust_remote_code": True}), "run code"),
        (lambda c: c["model_cfg"]["vision_cfg"].update(layers=10**6), "asks for layers 1,000,000"),
        (lambda c: c["model_cfg"]["vision_cfg"].update(width=2**40), "asks for width"),
        (lambda c: c["model_cfg"]["text_cfg"].update(vocab_size=2**40), "asks for vocab_size"),
        (lambda c: c["model_cfg"]["text_cfg"].update(vocab_size=2**21), "the model has .* numbers"),
        (lambda c: c["model_cfg"]["text_cfg"].update(context_length=10**5), "context_length is 100,000"),
        (lambda c: c["model_cfg"]["text_cfg"].update(width="x"), "no model has these sizes"),
        (lambda c: c["model_cfg"].update(text_cfg=3), "lacks 'text_cfg'"),
        (lambda c: c["model_cfg"].update(embed_dim=None), "no model has these sizes"),
        (lambda c: c.update(model_cfg=[]), "lacks 'model_cfg'"),
        (lambda c: c.update(preprocess_cfg=3), "preprocess_cfg"),
    ],
)
def test_a_clips_folder_is_checked(change: Any, words: str, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(whole / "clip", folder)
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words) as found:
        oner_fast.load(folder)
    assert str(folder) in str(found.value)


def test_a_clips_weights_are_checked(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(whole / "clip", folder)
    weights = folder / "open_clip_model.safetensors"
    for content, words in ((b"", "is empty"), (LFS, "git lfs pull"), (weights.read_bytes()[:-9], "cut short")):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match=words) as found:
            oner_fast.load(folder)
        assert str(weights) in str(found.value)
    (folder / "open_clip_config.json").write_text("[" * 10**5)
    with pytest.raises(ValueError, match="nested deeper"):
        oner_fast.load(folder)


@pytest.mark.parametrize("name", ["weights.ckpt", "weights"])
def test_a_teachers_file_is_read_under_every_convention(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224")
    state = {f"_orig_mod.{key}": tensor for key, tensor in model.state_dict().items()}
    path = tmp_path / name
    path.write_bytes(torch_bytes({"state_dict_ema": state, "epoch": 3}))
    teacher = load_teacher(f"{path}:timm:vit_tiny_patch16_224").model.state_dict()
    assert all(torch.equal(teacher[key], tensor) for key, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="timm has no model 'nothing'"):
        load_teacher(f"{path}:timm:nothing")
    path.write_bytes(LFS)
    with pytest.raises(ValueError, match="git lfs pull"):
        load_teacher(f"{path}:timm:vit_tiny_patch16_224")
