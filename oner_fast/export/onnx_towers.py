"""OneR's four encoders as ONNX graphs: images, texts, images with texts, and patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto
from torch import Tensor

from oner_fast.export.onnx_graph import Graph, Precision, Weights

_HIDDEN = -1e9  # added to the logit of a place that is no word
_IDS = (TensorProto.INT64, ["batch", "words"])


def towers(
    config: dict[str, Any], state: dict[str, Tensor], precision: Precision
) -> tuple[dict[str, onnx.ModelProto], bytes]:
    """Make the graphs of a tower.

    Args:
        config: sizes, as `oner_fast.export.convert.plain_config` gives them.
        state: weights, as `oner_fast.export.convert.plain_state` names them.
        precision: form in which the weights are stored.

    Returns:
        The graphs by name (`image`, `text`, `patches`, and `image_text` where one trunk reads both), and the bytes of
        the file `weights.bin` that they share.
    """
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    linear = {name for name in arrays if name.endswith("weight") and arrays[name].ndim == 2 and name != "words.weight"}
    weights = Weights({name: each.T if name in linear else each for name, each in arrays.items()}, precision)
    kinds: dict[str, Callable[[_Tower], onnx.ModelProto]] = {
        "image": _Tower.image,
        "text": _Tower.text,
        "patches": _Tower.patches,
    }
    if config["shared_trunk"]:
        kinds["image_text"] = _Tower.image_text
    graphs = {name: make(_Tower(config, weights)) for name, make in kinds.items()}
    return graphs, bytes(weights.content)


class _Tower:
    """The parts of one graph."""

    def __init__(self, config: dict[str, Any], weights: Weights) -> None:
        self.config, self.graph = config, Graph(weights)
        self.pixels = (TensorProto.UINT8, ["batch", 3, config["image_size"], config["image_size"]])

    def image(self) -> onnx.ModelProto:
        hidden = self._trunk(self._with_cls(self._image_tokens()), "trunk", None)
        return self._model({"pixels": self.pixels}, self._project(self._cls(hidden), "head"))

    def patches(self) -> onnx.ModelProto:
        g = self.graph
        hidden = self._trunk(self._with_cls(self._image_tokens()), "trunk", None)
        rest = g.op("Slice", hidden, g.constant([1]), g.constant([np.iinfo(np.int64).max]), g.constant([1]))
        count = (self.config["image_size"] // self.config["patch_size"]) ** 2
        shape = ["batch", count, self.config["embed_dim"]]
        return g.model({"pixels": self.pixels}, self._project(rest, "head"), shape)

    def text(self) -> onnx.ModelProto:
        trunk = "trunk" if self.config["shared_trunk"] else "text_trunk"
        head = "head" if self.config["shared_head"] else "text_head"
        hidden = self._trunk(self._with_cls(self._text_tokens()), trunk, self._mask(1))
        inputs = {"input_ids": _IDS, "attention_mask": _IDS}
        return self._model(inputs, self._project(self._cls(hidden), head))

    def image_text(self) -> onnx.ModelProto:
        tokens = self.graph.op("Concat", self._image_tokens(), self._text_tokens(), axis=1)
        before = 1 + (self.config["image_size"] // self.config["patch_size"]) ** 2
        hidden = self._trunk(self._with_cls(tokens), "trunk", self._mask(before))
        inputs = {"pixels": self.pixels, "input_ids": _IDS, "attention_mask": _IDS}
        return self._model(inputs, self._project(self._cls(hidden), "head"))

    def _model(self, inputs: dict[str, Any], output: str) -> onnx.ModelProto:
        return self.graph.model(inputs, output, ["batch", self.config["embed_dim"]])

    def _image_tokens(self) -> str:
        g, patch = self.graph, self.config["patch_size"]
        scaled = g.op("Div", g.op("Cast", "pixels", to=TensorProto.FLOAT), g.constant(255, np.float32))
        normal = g.op("Div", g.op("Sub", scaled, g.weight("mean")), g.weight("std"))
        maps = g.op("Conv", normal, g.weight("patches.weight", 0), g.weight("patches.bias"), strides=[patch, patch])
        rows = g.op("Transpose", g.op("Reshape", maps, g.constant([0, 0, -1])), perm=[0, 2, 1])
        return g.op("Add", rows, g.weight("patch_positions", 0))

    def _text_tokens(self) -> str:
        g = self.graph
        words = g.rows("words.weight", "input_ids")
        length = g.op("Shape", "input_ids", start=1, end=2)
        places = g.op("Slice", g.weight("word_positions", 0), g.constant([0]), length, g.constant([0]))
        return g.op("Add", words, places)

    def _with_cls(self, tokens: str) -> str:
        g = self.graph
        batch = g.op("Shape", tokens, start=0, end=1)
        shape = g.op("Concat", batch, g.constant([1, self.config["width"]]), axis=0)
        return g.op("Concat", g.op("Expand", g.weight("cls"), shape), tokens, axis=1)

    def _mask(self, before: int) -> str:
        """Logits to add, (B, 1, 1, before + T): 0 where a place may be attended to."""
        g = self.graph
        kept = g.op("Cast", "attention_mask", to=TensorProto.FLOAT)
        kept = g.op("Pad", kept, g.constant([0, before, 0, 0]), g.constant(1, np.float32))
        hidden = g.op("Mul", g.op("Sub", g.constant(1, np.float32), kept), g.constant(_HIDDEN, np.float32))
        return g.op("Unsqueeze", hidden, g.constant([1, 2]))

    def _trunk(self, x: str, name: str, mask: str | None) -> str:
        for layer in range(self.config["depth"]):
            x = self._block(x, f"{name}.layers.{layer}", mask)
        return self._norm(x, f"{name}.norm")

    def _block(self, x: str, name: str, mask: str | None) -> str:
        g, width, heads = self.graph, self.config["width"], self.config["heads"]
        qkv = self._linear(self._norm(x, f"{name}.norm1"), f"{name}.self_attn.in_proj_")
        parts = g.op("Split", qkv, outputs=3, axis=-1, num_outputs=3)
        shape = g.constant([0, 0, heads, width // heads])
        query, key, value = (g.op("Reshape", part, shape) for part in parts)
        query = g.op("Transpose", query, perm=[0, 2, 1, 3])
        key = g.op("Transpose", key, perm=[0, 2, 3, 1])
        value = g.op("Transpose", value, perm=[0, 2, 1, 3])
        logits = g.op("Mul", g.op("MatMul", query, key), g.constant((width // heads) ** -0.5, np.float32))
        logits = logits if mask is None else g.op("Add", logits, mask)
        mixed = g.op("MatMul", g.op("Softmax", logits, axis=-1), value)
        mixed = g.op("Reshape", g.op("Transpose", mixed, perm=[0, 2, 1, 3]), g.constant([0, 0, width]))
        x = g.op("Add", x, self._linear(mixed, f"{name}.self_attn.out_proj."))
        hidden = g.op("Gelu", self._linear(self._norm(x, f"{name}.norm2"), f"{name}.linear1."))
        return g.op("Add", x, self._linear(hidden, f"{name}.linear2."))

    def _project(self, x: str, name: str) -> str:
        g = self.graph
        hidden = ((0, 1), (3, 4)) if self.config["head_width"] else ()
        for linear, norm in hidden:
            x = g.op("Gelu", self._norm(self._linear(x, f"{name}.{linear}."), f"{name}.{norm}"))
        x = self._linear(x, f"{name}.{3 * len(hidden)}.")
        length = g.op("ReduceL2", x, g.constant([-1]), keepdims=1)
        return g.op("Div", x, g.op("Max", length, g.constant(1e-12, np.float32)))

    def _cls(self, hidden: str) -> str:
        return self.graph.op("Gather", hidden, self.graph.constant(0), axis=1)

    def _linear(self, x: str, name: str) -> str:
        g = self.graph
        return g.op("Add", g.op("MatMul", x, g.weight(f"{name}weight")), g.weight(f"{name}bias"))

    def _norm(self, x: str, name: str) -> str:
        g = self.graph
        scale, bias = g.weight(f"{name}.weight"), g.weight(f"{name}.bias")
        return g.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=1e-5)
