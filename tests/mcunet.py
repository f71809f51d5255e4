"""The published int8 mcunet-5fps as a graph, from its arrays and config.json, with a head of a few classes."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from acclimate.ir import Dim, Graph, Quant
from acclimate.ops import emit, verify
from acclimate.ops.quantized import add_attrs, conv_attrs

HEAD = (0.15, 0)  # scale and zero point of the new head's logits


def available() -> bool:
    return (Path(os.environ.get("ACCLIMATE_PEERS", "")) / "mcunet-5fps.npz").is_file()


needs_mcunet = pytest.mark.skipif(
    not available(), reason="ACCLIMATE_PEERS names no folder with mcunet-5fps.npz"
)


@cache
def arrays():
    with np.load(Path(os.environ["ACCLIMATE_PEERS"]) / "mcunet-5fps.npz", allow_pickle=False) as file:
        found = {name: file[name] for name in file.files}
    return found, json.loads(bytes(found["config.json"]).decode())


def _conv(graph, name, x, layer):
    found, _ = arrays()
    p, k = layer["params"], layer["kernel_size"]
    quant = Quant(found[p["w_scales"]["array"]])
    w, b = found[p["weight"]["array"]], found[p["bias"]["array"]]
    graph.persistent(f"{name}.weight", w, "parameter", "i8", quant)
    graph.persistent(f"{name}.bias", b, "parameter", "i32", Quant(np.float32(p["x_scale"]) * quant.scale))
    attrs, m, shift = conv_attrs((p["x_scale"], p["x_zero"]), quant.scale, (p["y_scale"], p["y_zero"]))
    pad = tuple((s - 1) // 2 for s in k)
    return emit(
        graph,
        "q_conv",
        x,
        f"{name}.weight",
        f"{name}.bias",
        graph.constant(f"{name}.multiplier", m, "i32"),
        graph.constant(f"{name}.shift", shift, "i32"),
        name=name,
        stride=(layer["stride"],) * 2,
        before=pad,
        after=pad,
        dilation=(1, 1),
        groups=layer["groups"],
        **attrs,
    )


def mcunet(batch: int = 1, classes: int = 10, size: int = 128, blocks: int | None = None) -> Graph:
    """blocks: only so many of its 14, then the head (on as many channels as there are)."""
    found, config = arrays()
    graph = Graph(batch)
    first = config["first_conv"]
    p = first["params"]
    x = graph.input("x", (Dim(1, batch), 3, size, size), "i8", Quant(p["x_scale"], p["x_zero"]))
    x, out = _conv(graph, "first", x, first), p
    for i, block in enumerate(config["blocks"][:blocks]):
        source = x
        for part in ("pointwise1", "depthwise", "pointwise2"):
            if block[part]:
                x, out = _conv(graph, f"{i}.{part}", x, block[part]), block[part]["params"]
        if block["residual"]:
            r = block["residual"]["params"]
            scales = (
                (out["y_scale"], out["y_zero"]),
                (r["x_scale"], r["x_zero"]),
                (r["y_scale"], r["y_zero"]),
            )
            x, out = emit(graph, "q_add", x, source, name=f"{i}.add", **add_attrs(*scales)), r
    side = graph.shape(x)[2:]
    x = emit(graph, "q_avg_pool", x, kernel=side, stride=side, before=(0, 0), after=(0, 0), extra=(0, 0))
    c, rng = graph.shape(x)[1], np.random.default_rng(0)
    scale = np.full(classes, 0.002, np.float32)
    x_q = (out["y_scale"], out["y_zero"])
    graph.persistent(
        "classifier.weight", rng.integers(-90, 91, (classes, c, 1, 1)), "parameter", "i8", Quant(scale)
    )
    bias = Quant(np.float32(x_q[0]) * scale)
    graph.persistent("classifier.bias", np.zeros(classes), "parameter", "i32", bias)
    attrs, m, shift = conv_attrs(x_q, scale, HEAD)
    m, shift = (
        graph.constant("classifier.multiplier", m, "i32"),
        graph.constant("classifier.shift", shift, "i32"),
    )
    one = {"stride": (1, 1), "before": (0, 0), "after": (0, 0), "dilation": (1, 1), "groups": 1}
    names = ("classifier.weight", "classifier.bias", m, shift)
    x = emit(graph, "q_conv", x, *names, name="classifier", **one, **attrs)
    x = emit(graph, "dequantize", x, scale=HEAD[0], zero=HEAD[1])
    graph.outputs["output"] = emit(graph, "reshape", x, shape=(Dim(1, batch), classes))
    return verify(graph)
