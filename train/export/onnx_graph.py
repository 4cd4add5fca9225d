"""Build an ONNX graph operator by operator; values are identified by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, checker, helper, numpy_helper

from lit_fast.storage import paths
from lit_fast.version import __version__

# The first operator set with LayerNormalization, and the file format of its time: onnxruntime 1.12 reads it.
OPSET = 17
IR_VERSION = 8

# A protocol buffer holds at most 2 GiB; 16 MiB are reserved for the graph without weights.
MAX_WEIGHT_BYTES = (1 << 31) - (1 << 24)


class Graph:
    """Operators, in the order in which they were added, and their weights."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []

    def add(self, operator: str, *inputs: str | np.ndarray | np.generic, **attributes: Any) -> str:
        """Add an operator on values or constants; return the name of its output."""
        names = [
            x if isinstance(x, str) else self.weight(f"constant_{len(self._weights)}", x) for x in inputs
        ]
        output = f"{operator}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, names, [output], name=output, **attributes))
        return output

    def weight(self, name: str, array: Any) -> str:
        """Add an array that is stored with the graph; return its name."""
        self._weights.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def save(
        self,
        path: str,
        inputs: tuple[str, type, Sequence[int]],
        output: str,
        width: int,
        metadata: Mapping[str, str],
    ) -> None:
        """Write the graph and check the file.

        Args:
          path: the local file; weights larger than `MAX_WEIGHT_BYTES` are stored in `<path>.data`.
          inputs: the input's name, its dtype, and its shape without the leading batch axis, which is of any length.
          output: the value that becomes "embeddings", float32 [batch, width].
          width: of the output.
          metadata: stored in the file by name.
        """
        name, dtype, shape = inputs
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        nodes = [*self._nodes, helper.make_node("Identity", [output], ["embeddings"], name="embeddings")]
        graph = helper.make_graph(
            nodes,
            paths.stem(path),
            [helper.make_tensor_value_info(name, kind, ["batch", *shape])],
            [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["batch", width])],
            self._weights,
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="lit_fast",
            producer_version=__version__,
        )
        helper.set_model_props(model, dict(metadata))
        external = sum(len(weight.raw_data) for weight in self._weights) > MAX_WEIGHT_BYTES
        onnx.save_model(model, path, save_as_external_data=external, location=f"{paths.name(path)}.data")
        checker.check_model(path, full_check=True)
