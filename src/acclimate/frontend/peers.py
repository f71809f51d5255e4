"""The published int8 networks of Tiny Training Engine (Lin et al., 2022, MIT): their weights and structure as arrays.

`config.json`: `first_conv`, `blocks` of `pointwise1`, `depthwise`, `pointwise2` and `residual`, `feature_mix`,
`classifier`. A convolution has a kernel, stride, groups and `params`: names of arrays and the scales of its input and
output. ReLU is in the clamp: zero stands at -128. x is 128 x 128 pixels scaled to -1..1 (pixel / 127.5 - 1).
Parameters are called by their places: blocks.9.pointwise1.weight, classifier.bias.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import BadInput, Unsupported, WrongUse
from ..ir import Dim, Graph
from ..ops import emit, verify
from ..ops import integer as q
from ..ops.quantized import half_away

CONFIG = "config.json"
CHANNELS = 3
MOST_SIDE = 4096
PARTS = ("pointwise1", "depthwise", "pointwise2")


def published(
    told: Any, arrays: Mapping[str, np.ndarray], classes: int | None = None, seed: int = 0
) -> Graph:
    """The int8 Graph of a published network.

    classes: replace the 1000-class classifier by a fresh one: float weights uniform within 1 / sqrt(features) from
    `seed`, quantised, biases 0, at the input scale of the published one; its logits keep that one's scale, with
    zero point 0. Raises BadInput for a file that is not consistent, Unsupported for parts that none of these nets has.
    """
    if classes is not None and (isinstance(classes, bool) or not isinstance(classes, int) or classes < 1):
        raise WrongUse("classes must be a whole number from 1", number=repr(classes), action="classes=10")
    if not isinstance(seed, int) or seed < 0:
        raise WrongUse("seed must be a whole number from 0", number=repr(seed), action="seed=0")
    graph, net = Graph(), _Net(arrays)
    first = told["first_conv"]
    side = net.whole(first["in_shape"], 1, MOST_SIDE, "first_conv")
    y = net.scale(first["params"], "x", "first_conv")
    x = q.Int("x", *y)
    graph.input("x", (Dim(1, 1), CHANNELS, side, side), "i8", x.quant)
    x = net.conv(graph, x, first, "first_conv")
    for i, block in enumerate(told["blocks"]):
        name = f"blocks.{i}"
        if block.get("se") is not None:
            raise Unsupported("a squeeze-and-excitation part is not read", where=name)
        skip = x
        for part in PARTS:
            if block[part] is not None:
                x = net.conv(graph, x, block[part], f"{name}.{part}")
        if block["residual"] is not None:
            x = net.residual(graph, skip, x, block["residual"], f"{name}.residual")
    if told.get("feature_mix") is not None:
        x = net.conv(graph, x, told["feature_mix"], "feature_mix")
    x = q.mean(graph, x, "pool")
    head = told["classifier"]
    x = (
        net.conv(graph, x, head, "classifier")
        if classes is None
        else net.fresh(graph, x, head, classes, seed)
    )
    logits = emit(graph, "reshape", x.name, name="logits", shape=(Dim(1, 1), graph.shape(x.name)[1]))
    graph.outputs["output"] = emit(graph, "dequantize", logits, name="output", scale=x.scale, zero=x.zero)
    return verify(graph, "loading")


class _Net:
    """What the parts of a network are read with."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.arrays = arrays

    def whole(self, value: Any, low: int, high: int, where: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise BadInput("a number is out of range", where=where, number=f"{value!r}, {low} to {high}")
        return value

    def scale(self, params: Any, which: str, where: str) -> tuple[float, int]:
        scale = params[f"{which}_scale"]
        if not isinstance(scale, float) or not math.isfinite(scale) or not scale >= np.finfo(np.float32).tiny:
            raise BadInput("a scale must be positive", where=where, number=repr(scale)[:40])
        return float(np.float32(scale)), self.whole(params[f"{which}_zero"], q.LOW, q.HIGH, where)

    def array(self, params: Any, which: str, dtype: Any, where: str) -> np.ndarray:
        name = params[which]["array"]
        array = self.arrays.get(name)
        if array is None or array.dtype != dtype:
            raise BadInput(f"the {which} is missing, or of another type", where=where, number=repr(name)[:60])
        return array

    def same(self, x: q.Int, y: tuple[float, int], where: str) -> None:
        if x[1:] != y:
            raise BadInput(
                "a layer reads another scale than the one before it writes",
                where=where,
                number=f"{x[1:]}, {y}",
            )

    def conv(self, graph: Graph, x: q.Int, told: Any, name: str) -> q.Int:
        params = told["params"]
        w = self.array(params, "weight", np.int8, name)
        bias = self.array(params, "bias", np.int32, name)
        scales = self.array(params, "w_scales", np.float32, name)
        size = w.shape[:1]
        if w.ndim != 4 or bias.shape != size or scales.shape != size or not size[0]:
            raise BadInput(
                "a convolution's arrays do not fit",
                where=name,
                number=f"{w.shape} {bias.shape} {scales.shape}",
            )
        if not (np.isfinite(scales) & (scales > 0)).all():
            raise BadInput("a scale must be positive", where=name, number=f"{scales.min()}")
        kernel = tuple(int(k) for k in w.shape[2:])
        if (
            told["kernel_size"] != list(kernel)
            or any(k % 2 == 0 for k in kernel)
            or told.get("act") is not None
        ):
            raise BadInput("a kernel must be odd, and of the weight's size", where=name, number=str(kernel))
        self.same(x, self.scale(params, "x", name), name)
        stride = self.whole(told["stride"], 1, 64, name)
        groups = self.whole(told["groups"], 1, 1 << 16, name)
        return self._emit(graph, x, w, bias, scales, self.scale(params, "y", name), name, stride, groups)

    def _emit(
        self,
        graph: Graph,
        x: q.Int,
        w: np.ndarray,
        bias: np.ndarray,
        scales: np.ndarray,
        y: tuple[float, int],
        name: str,
        stride: int = 1,
        groups: int = 1,
    ) -> q.Int:
        around = tuple((int(k) - 1) // 2 for k in w.shape[2:])
        geometry = {
            "stride": (stride,) * 2,
            "before": around,
            "after": around,
            "dilation": (1, 1),
            "groups": groups,
        }
        weight = (f"{name}.weight", w, scales)
        return q.conv(graph, x, weight, (f"{name}.bias", bias), y, name, geometry)

    def residual(self, graph: Graph, skip: q.Int, x: q.Int, told: Any, name: str) -> q.Int:
        if told.get("kernel_size") is not None:
            raise Unsupported("a convolution on a skip path is not read", where=name)
        self.same(skip, self.scale(told["params"], "x", name), name)
        return q.add(graph, skip, x, self.scale(told["params"], "y", name), name)

    def fresh(self, graph: Graph, x: q.Int, told: Any, classes: int, seed: int) -> q.Int:
        features = int(graph.shape(x.name)[1])
        bound = 1 / math.sqrt(features)
        real = np.random.default_rng(seed).uniform(-bound, bound, (classes, features, 1, 1))
        scales = (np.abs(real).max((1, 2, 3)) / q.HIGH).astype(np.float32)
        w = half_away(real / scales.astype(np.float64).reshape(-1, 1, 1, 1)).astype(np.int8)
        y = self.scale(told["params"], "y", "classifier")[0], 0
        return self._emit(graph, x, w, np.zeros(classes, np.int32), scales, y, "classifier")
