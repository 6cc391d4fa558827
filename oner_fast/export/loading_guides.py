"""Markdown that shows how each kind of exported folder is loaded, for its model card."""

from __future__ import annotations

from typing import Any

_PIXELS = """
An image becomes pixels by reducing its shorter side and cutting out the centre square (uint8, NumPy):

```python
from PIL import Image
import numpy as np

picture, size = Image.open("picture.png").convert("RGB"), {size}
width, height = (round(side * size / min(picture.size)) for side in picture.size)
left, top = (width - size) // 2, (height - size) // 2
picture = picture.resize((width, height), Image.Resampling.BICUBIC)
picture = picture.crop((left, top, left + size, top + size))
pixels = np.array(picture).transpose(2, 0, 1)[None]  # (1, 3, {size}, {size})
```
"""


def plain_guide(config: dict[str, Any]) -> str:
    """Show the ten lines that load the folder of `--to plain`, and how they are used."""
    copies = ["trunk"] * (not config["shared_trunk"]) + ["head"] * (not config["shared_head"])
    copied = ", ".join(f'"text_{name}": deepcopy({name})' for name in copies)
    more = f"parts.update({{{copied}}})\n" if copies else ""
    of_text = "".join(f', {"run" if name == "trunk" else name}=parts["text_{name}"]' for name in copies)
    pair = "embed(torch.cat([image(pixels), text(ids)], 1))  # the image with the text, in one pass\n"
    layers = "Linear(d, h), LayerNorm(h), GELU(), Linear(h, h), LayerNorm(h), GELU(), Linear(h, e)"
    layers = layers if config["head_width"] else "Linear(d, e)"
    return f"""## Load it

{"Eleven" if copies else "Ten"} lines of plain PyTorch after the imports, in this folder:

```python
import json
{"from copy import deepcopy" + chr(10) if copies else ""}from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import {"GELU, " if config["head_width"] else ""}Conv2d, LayerNorm, Linear, ModuleDict, Sequential
from torch.nn import TransformerEncoder, TransformerEncoderLayer
from torch.nn.functional import normalize

c, w = json.loads(Path("config.json").read_text()), load_file("model.safetensors")
d, h, e, p = (c[name] for name in ("width", "head_width", "embed_dim", "patch_size"))
layer = TransformerEncoderLayer(d, c["heads"], c["mlp_width"], 0, "gelu", batch_first=True, norm_first=True)
trunk = TransformerEncoder(layer, c["depth"], LayerNorm(d), enable_nested_tensor=False)
head = Sequential({layers})
parts = ModuleDict({{"patches": Conv2d(3, d, p, p), "trunk": trunk, "head": head}}).eval()
{more}parts.load_state_dict({{name: each for name, each in w.items() if name.split(".")[0] in parts}})
image = lambda pixels: parts["patches"]((pixels / 255 - w["mean"]) / w["std"]).flatten(2).mT + w["patch_positions"]
text = lambda ids: w["words.weight"][ids] + w["word_positions"][: ids.shape[1]]
embed = lambda x, run=trunk, head=head: normalize(head(run(torch.cat([w["cls"].expand(len(x), 1, -1), x], 1))[:, 0]))
```

`embed` gives a row of {config["embed_dim"]} numbers for each image or text. The product of two rows is their cosine:

```python
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
ids = torch.tensor([tokenizer.encode("a red apple").ids[: c["max_text_tokens"]]])  # texts of one length at once
embed(text(ids){of_text})
embed(image(pixels))  # a tensor of uint8 (B, 3, {config["image_size"]}, {config["image_size"]})
{pair if config["shared_trunk"] else ""}```
{_PIXELS.format(size=config["image_size"])}
"""


def transformers_guide(config: dict[str, Any]) -> str:
    """Show how the folder of `--to transformers` is loaded."""
    pair = "model(**image, **text).embeds  # each image with its text, in one pass\n" if config["shared_trunk"] else ""
    return f"""## Load it

```python
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

folder = "."  # this folder
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
preprocess = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)

text = tokenizer(["a red apple"], padding=True, truncation=True, return_tensors="pt")
image = preprocess([Image.open("picture.png")])
model(**text).embeds, model(**image).embeds  # (B, {config["embed_dim"]}), L2-normalised
{pair}```

`trust_remote_code=True` runs the Python files of this folder; they import PyTorch, Pillow and transformers.

"""


def onnx_guide(config: dict[str, Any], errors: dict[str, float], precision: str) -> str:
    """Show how the folder of `--to onnx` is used, and what its precision costs."""
    size = config["image_size"]
    table = "\n".join(f"| `{name}.onnx` | {error:.1e} |" for name, error in errors.items())
    pair = ", or `image_text.onnx` with the inputs of both" if config["shared_trunk"] else ""
    stored = {
        "float32": "The weights are float32.",
        "float16": "Matrices are stored in float16 and vectors in float32; sums are float32.",
        "int8": "Matrices are stored in int8 with a scale for each output, and vectors in float32; sums are float32.",
    }[precision]
    return f"""## Use it

The graphs share `weights.bin`, which must lie beside them. {stored}
Inputs are `pixels` uint8 (B, 3, {size}, {size}), and `input_ids` and `attention_mask` int64 (B, T).
The output `embedding` is L2-normalised, (B, {config["embed_dim"]}); that of `patches.onnx` has a row for each patch.

```python
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

ids = np.array([Tokenizer.from_file("tokenizer.json").encode("a red apple").ids[:{config["max_text_tokens"]}]])
session = onnxruntime.InferenceSession("text.onnx")
(embedding,) = session.run(None, {{"input_ids": ids, "attention_mask": np.ones_like(ids)}})
```

Take `image.onnx` with `{{"pixels": pixels}}` for images{pair}.
{_PIXELS.format(size=size)}
The greatest difference of an embedding's component from float32 PyTorch:

| Graph | Error |
|---|---|
{table}

"""
