"""Compare ONNX graphs with the tower that they came from, on real images and texts."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import Tensor

from oner_fast.data.splits import open_split, splits_of
from oner_fast.evaluation.embed import spaced
from oner_fast.evaluation.folder import find_data, unnamed_split
from oner_fast.export.convert import plain_tower
from oner_fast.export.onnx_graph import WEIGHTS
from oner_fast.loading import Loaded

SAMPLES = 64


def samples(loaded: Loaded, run: Path) -> tuple[Tensor, list[str]]:
    """Take images (B, 3, S, S) uint8 and captions of the run's data; noise and single words where there are none."""
    images, texts = [], []
    try:
        data = find_data(run, None)
        unnamed = unnamed_split(run, data)
        known = splits_of(data, unnamed)
        dataset = open_split(data, next((name for name in known if name != "train"), known[0]), unnamed)
    except FileNotFoundError:
        return _noise(loaded)
    for row in spaced(len(dataset), SAMPLES):
        with contextlib.suppress(ValueError):  # a damaged picture
            pair = dataset.read(row)
            images.append(loaded.preprocess(pair.image))
            texts.append(pair.caption)
    return (torch.stack(images), texts) if images else _noise(loaded)


def _noise(loaded: Loaded) -> tuple[Tensor, list[str]]:
    side, generator = loaded.config.image_size, torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (SAMPLES, 3, side, side), dtype=torch.uint8, generator=generator)
    ids = torch.randint(loaded.tokenizer.first_word_id, loaded.tokenizer.vocab_size, (SAMPLES,), generator=generator)
    return pixels, [loaded.tokenizer.decode([number]) for number in ids.tolist()]


def errors(
    loaded: Loaded, graphs: dict[str, onnx.ModelProto], weights: bytes, pixels: Tensor, texts: list[str]
) -> dict[str, float]:
    """Compute the greatest difference of a component of each graph's embeddings from float32 PyTorch's."""
    ids, mask = padded(loaded, texts)
    tower = plain_tower(loaded.model)
    with torch.inference_mode():
        right = {"image": tower.encode_image(pixels), "text": tower.encode_text(ids, mask)}
        right |= {"patches": tower.encode_patches(pixels)}
        if "image_text" in graphs:
            right["image_text"] = tower.encode_image_text(pixels, ids, mask)
    given = {"pixels": pixels.numpy(), "input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / WEIGHTS).write_bytes(weights)
        for name, graph in graphs.items():
            path = Path(folder) / f"{name}.onnx"
            path.write_bytes(graph.SerializeToString())
            onnx.checker.check_model(str(path))
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            (embedding,) = session.run(None, {each.name: given[each.name] for each in session.get_inputs()})
            found[name] = float((torch.from_numpy(embedding) - right[name]).abs().max())
    return found


def padded(loaded: Loaded, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Turn texts into ids and mask (B, T) int64."""
    packed = loaded.tokenizer(texts, loaded.config.max_text_tokens)
    rows = packed.input_ids.split(packed.cu_seqlens.diff().tolist())
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=loaded.tokenizer.pad_id)
    lengths = packed.cu_seqlens.diff()
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()
