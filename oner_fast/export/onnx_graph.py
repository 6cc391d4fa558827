"""Write ONNX graphs node by node, with weights that several graphs share in one file beside them.

Weights are stored in float16 or int8 on request. Every graph turns them into float32 first, so that sums are exact, and
onnxruntime does so once, when it loads the graph.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Precision = Literal["float32", "float16", "int8"]
WEIGHTS = "weights.bin"
OPSET = 20  # the first with Gelu
IR_VERSION = 9  # of the time of that opset, so that older onnxruntimes read it
_ALIGN = 64
_SMALL = 64  # elements of a tensor that is not worth shortening, such as the mean of the colours


class Weights:
    """The file of weights that the graphs of a folder share.

    Attributes:
        precision: form of matrices in the file; vectors and small tensors stay float32.
        content: the file's bytes.
    """

    def __init__(self, tensors: dict[str, NDArray[np.float32]], precision: Precision) -> None:
        """Take float32 weights by name; those of linear layers are (inputs, outputs)."""
        self.tensors, self.precision = tensors, precision
        self.content = bytearray()
        self._placed: dict[str, tuple[int, int]] = {}

    def stored(self, name: str, axis: int) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        """Return a weight as the file holds it, and its scale: one number along every axis but `axis`, or None."""
        tensor = self.tensors[name]
        if tensor.size < _SMALL or tensor.ndim < 2 or self.precision == "float32":
            return tensor, None
        if self.precision == "float16":
            return tensor.astype(np.float16), None
        others = tuple(each for each in range(tensor.ndim) if each != axis % tensor.ndim)
        scale = np.maximum(np.abs(tensor).max(others, keepdims=True), 1e-12) / 127
        return np.rint(tensor / scale).astype(np.int8), scale.astype(np.float32)

    def initializer(self, name: str, array: NDArray[Any]) -> TensorProto:
        """Put an array into the file, once for all graphs, and return the entry that refers to it."""
        if name not in self._placed:
            self.content += b"\0" * (-len(self.content) % _ALIGN)
            self._placed[name] = (len(self.content), array.nbytes)
            self.content += np.ascontiguousarray(array).tobytes()
        offset, length = self._placed[name]
        proto = TensorProto(name=name, dims=array.shape, data_location=TensorProto.EXTERNAL)
        proto.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
        for key, value in (("location", WEIGHTS), ("offset", str(offset)), ("length", str(length))):
            proto.external_data.add(key=key, value=value)
        return proto


class Graph:
    """One graph under construction. A value is its name, as in ONNX."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._decoded: dict[str, str] = {}
        self._count = 0

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node; returns the name of its output, or a list of them where there are several."""
        names = [f"{kind.lower()}_{self._count + number}" for number in range(outputs)]
        self._count += outputs
        self._nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, values: Any, dtype: Any = np.int64) -> str:
        """Name of a small constant."""
        array = np.asarray(values, dtype)
        name = f"{array.dtype}_{'_'.join(map(str, array.flatten().tolist()))}_{array.ndim}"
        self._initializers.setdefault(name, numpy_helper.from_array(array, name))
        return name

    def weight(self, name: str, axis: int = -1) -> str:
        """Name of a weight in float32. In int8, each place along `axis` has a scale of its own."""
        if name not in self._decoded:
            array, scale = self._weights.stored(name, axis)
            scales = None if scale is None else self._scale(name, scale)
            self._decoded[name] = self._decode(self._entry(name, array), array, scales)
        return self._decoded[name]

    def rows(self, name: str, ids: str) -> str:
        """Rows `ids` of a weight (N, D) in float32; the others are not converted."""
        array, scale = self._weights.stored(name, 0)
        taken = self.op("Gather", self._entry(name, array), ids, axis=0)
        scales = None if scale is None else self.op("Gather", self._scale(name, scale), ids, axis=0)
        return self._decode(taken, array, scales)

    def model(
        self, inputs: dict[str, tuple[int, list[str | int]]], output: str, shape: list[str | int]
    ) -> onnx.ModelProto:
        """Finish the graph: inputs are type and shape by name, and `output` becomes `embedding`, float32."""
        self._nodes.append(helper.make_node("Identity", [output], ["embedding"]))
        graph = helper.make_graph(
            self._nodes,
            "oner",
            [helper.make_tensor_value_info(name, kind, dims) for name, (kind, dims) in inputs.items()],
            [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, shape)],
            list(self._initializers.values()),
        )
        opset = helper.make_opsetid("", OPSET)
        return helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="oner_fast")

    def _entry(self, name: str, array: NDArray[Any]) -> str:
        self._initializers.setdefault(name, self._weights.initializer(name, array))
        return name

    def _scale(self, name: str, scale: NDArray[np.float32]) -> str:
        return self._entry(f"{name}.scale", scale)

    def _decode(self, value: str, array: NDArray[Any], scale: str | None) -> str:
        if array.dtype != np.float32:
            value = self.op("Cast", value, to=TensorProto.FLOAT)
        return value if scale is None else self.op("Mul", value, scale)
