"""Quantised ONNX files: float operators between QuantizeLinear and DequantizeLinear (the QDQ form).

Weights become float parameters that know their scale, activations pass `quantize` and `dequantize`; `ops.integer.lower`
makes integers of what lies between. uint8 is read as int8 shifted by 128, which stands for the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import Unsupported
from ..ir import Quant
from .common import Builder, Ref, Untaken

_SHIFT = {np.dtype(np.int8): 0, np.dtype(np.uint8): 128}
#: what exporters add to the name of a tensor that they quantise
_ENDINGS = ("_quantized", "_DequantizeLinear", "_QuantizeLinear", "_dequantized", "_dq", "_q")


def _plain(name: str) -> str:
    """The user's name of a quantised tensor."""
    for ending in _ENDINGS:
        name = name.removesuffix(ending)
    return name


def read_weights(nodes: list[Any], tensors: dict[str, np.ndarray], source: str) -> dict[str, Quant]:
    """Replace stored weights and the nodes that de-quantise them by float tensors, in place; the scales of each.

    Float weights that the file itself rounds, as after quantisation-aware training, count as stored.
    """
    constants = {n.outputs[0]: n.attrs["value"] for n in nodes if n.op == "Constant" and "value" in n.attrs}
    known = dict(tensors) | {name: _array(t) for name, t in constants.items()}
    names: dict[str, str] = {}  # of an integer tensor: the user's
    quants: dict[str, Quant] = {}
    for node in [n for n in nodes if n.op in ("QuantizeLinear", "DequantizeLinear")]:
        parts = [known.get(name) for name in node.inputs if name]
        if any(p is None for p in parts) or node.attrs.get("block_size") or len(parts) < 2:
            continue
        stored, scale = np.asarray(parts[0]), np.asarray(parts[1], np.float32)
        zero = np.asarray(parts[2]) if len(parts) > 2 else np.zeros(scale.shape, np.uint8)
        axis = node.attrs.get("axis", 1) % max(stored.ndim, 1)
        shape = [-1 if i == axis else 1 for i in range(stored.ndim)] if scale.size > 1 else [1] * stored.ndim
        if node.op == "QuantizeLinear":
            if zero.dtype not in _SHIFT or stored.dtype.kind != "f":
                continue
            q = np.rint(stored / scale.reshape(shape)) + zero.astype(np.int32).reshape(shape)
            ends = np.iinfo(zero.dtype)
            known[node.outputs[0]] = np.clip(q, ends.min, ends.max).astype(zero.dtype)
            names[node.outputs[0]] = node.inputs[0]
            nodes.remove(node)
            continue
        if stored.dtype not in (*_SHIFT, np.dtype(np.int32)):
            continue
        zero = zero.astype(np.int64) if len(parts) > 2 else np.zeros(scale.shape, np.int64)
        real = (stored.astype(np.int64) - zero.reshape(shape)) * scale.astype(np.float64).reshape(shape)
        name = names.get(node.inputs[0]) or _plain(node.inputs[0])
        if name in tensors and name != names.get(node.inputs[0]):
            name = node.outputs[0]
        tensors[name] = real.astype(np.float32)
        nodes.remove(node)
        readers = [n for n in nodes if node.outputs[0] in n.inputs]
        for other in readers:
            other.inputs = [name if i == node.outputs[0] else i for i in other.inputs]
        if stored.dtype in _SHIFT and any(
            _is_weight(n, name, axis, stored.ndim, scale.size) for n in readers
        ):
            if (zero != _SHIFT[stored.dtype]).any():
                raise Unsupported(
                    "weights are quantised with a zero point",
                    where=f"{name} in {source}",
                    number=f"zero point {int(zero.reshape(-1)[0])}",
                    action="quantise weights symmetrically (onnxruntime: weight_type=QuantType.QInt8)",
                )
            quants[name] = Quant(scale.reshape(-1))
    return quants


def _array(tensor: Any) -> np.ndarray:
    from onnx import numpy_helper

    return numpy_helper.to_array(tensor)


def _is_weight(node: Any, name: str, axis: int, rank: int, scales: int) -> bool:
    """Is `name` the weight of a node, with its scales along the output channels?"""
    if len(node.inputs) < 2 or node.inputs[1] != name:
        return False
    channels: Mapping[str, int] = {
        "Conv": 0,
        "Gemm": 0 if node.attrs.get("transB") else 1,
        "MatMul": rank - 1,
    }
    return node.op in channels and (scales == 1 or channels[node.op] == axis)


def _scale(node: Any) -> dict[str, Any]:
    """Scale and zero point of an activation, as int8 has them."""
    scale, zero = node.get(1), node.get(2)
    if isinstance(scale, Ref) or isinstance(zero, Ref):
        raise Untaken("its scale depends on the data")
    zero = np.zeros(1, np.uint8) if zero is None else np.asarray(zero)
    if np.size(scale) != 1 or zero.dtype not in _SHIFT or zero.size != 1:
        raise Untaken(f"an activation of type {zero.dtype} with {np.size(scale)} scales")
    return {
        "scale": float(np.float32(np.asarray(scale).reshape(()))),
        "zero": int(zero.reshape(())) - _SHIFT[zero.dtype],
    }


def quantize(b: Builder, node: Any) -> Any:
    return b.emit("quantize", node.x, **_scale(node))


def dequantize(b: Builder, node: Any) -> Any:
    if not isinstance(node.x, Ref) or b.graph.type(node.x).dtype != "i8":
        raise Untaken("integers that no QuantizeLinear made")
    return b.emit("dequantize", node.x, **_scale(node))
