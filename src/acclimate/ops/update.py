"""Writing persistent values: optimisers, running statistics, accumulators, counters, and gradient clipping.

`index`, where given, names the channels along `axis` that learn; gradient and moments hold only those.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import BadInput
from ..ir import Type
from .row import Attr, Cost, Example, Row

_WHY = "an update is not differentiated"


def _learned(a: Any, w: Any, index: Any) -> Any:
    return w if index is None else np.take(w, index, a["axis"])


def _write(a: Any, w: Any, index: Any, new: Any) -> Any:
    if index is None:
        return new
    w = w.copy()
    w[(slice(None),) * a["axis"] + (index,)] = new
    return w


def _sgd(a: Any, w: Any, g: Any, lr: Any, buf: Any = None, index: Any = None) -> list[Any]:
    p = _learned(a, w, index)
    g = g + a["weight_decay"] * p
    if buf is not None:
        buf = a["momentum"] * buf + g
        g = g + a["momentum"] * buf if a["nesterov"] else buf
    return [_write(a, w, index, p - lr[0] * g), buf]


def _adam(a: Any, w: Any, g: Any, lr: Any, m: Any, v: Any, t: Any, index: Any = None) -> list[Any]:
    p, step = _learned(a, w, index), int(t[0]) + 1
    b1, b2 = float(np.float32(a["beta1"])), float(np.float32(a["beta2"]))  # as the kernel reads them
    if a["decoupled"]:
        p = p * (1 - lr[0] * a["weight_decay"])
    else:
        g = g + a["weight_decay"] * p
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    p = p - lr[0] / (1 - b1**step) * m / (np.sqrt(v / (1 - b2**step)) + a["eps"])
    return [_write(a, w, index, p), m, v]


def _check(attrs: Any, w: Type, g: Type, moments: Any, index: Type | None) -> list[Type]:
    want = tuple(w.shape)
    if index is not None:
        axis = attrs["axis"]
        if not 0 <= axis < len(want):
            raise BadInput("an axis is out of range", where=str(w), number=str(axis))
        want = (*want[:axis], index.shape[0], *want[axis + 1 :])
    for name, t in (("gradient", g), *(("moment", m) for m in moments if m is not None)):
        if tuple(t.shape) != want:
            raise BadInput(
                f"the {name} does not have the shape that learns", where=f"{t}", number=f"must be {want}"
            )
    return []


def _ema(a: Any, running: Any, new: Any) -> list[Any]:
    return [(1 - a["momentum"]) * running + a["momentum"] * a["scale"] * new]


def kept_channels(size: Any, share: float) -> np.ndarray:
    """Which channels of `size` (N, C) are kept: of each sample the largest share, and equals of the last of it."""
    k = count_kept(size.shape[1], share)
    return size >= np.sort(size, 1)[:, -k][:, None]


def count_kept(channels: int, share: float) -> int:
    return max(1, min(channels, int(np.ceil(np.float32(share) * np.float32(channels)))))


def _keep_top(a: Any, d: Any) -> list[Any]:
    size = np.abs(d).reshape(*d.shape[:2], -1).sum(-1)
    keep = kept_channels(size, a["share"]).reshape(*size.shape, *(1,) * (d.ndim - 2))
    return [np.where(keep, d, 0), size]


_SGD = {
    "axis": Attr("i", 0),
    "momentum": Attr("f", 0.0),
    "nesterov": Attr("i", 0),
    "weight_decay": Attr("f", 0.0),
}
_ADAM = {
    "axis": Attr("i", 0),
    "beta1": Attr("f", 0.9),
    "beta2": Attr("f", 0.999),
    "eps": Attr("f", 1e-8),
    "weight_decay": Attr("f", 0.0),
    "decoupled": Attr("i", 0),
}
_W, _PART = (6, 5, 3), (6, 2, 3)

ROWS = (
    Row(
        "sgd",
        "~, ~, 1, ~?, P:i32? ->",
        "w -= lr * (g + weight_decay * w), with momentum or Nesterov momentum (as torch).",
        _sgd,
        (
            Example((_W, _W, (1,)), {"weight_decay": 0.1}),
            Example((_W, _W, (1,), _W), {"momentum": 0.9}),
            Example((_W, _W, (1,), _W), {"momentum": 0.9, "nesterov": 1, "weight_decay": 0.01}),
            Example((_W, _PART, (1,), _PART, (2,)), {"momentum": 0.9, "axis": 1}, {4: "index:5"}),
            Example((_W, (2, 5, 3), (1,), None, (2,)), {"axis": 0}, {4: "index:6"}),
        ),
        attrs=_SGD,
        shape=lambda a, w, g, lr, buf, index: _check(a, w, g, (buf,), index),
        updates=(0, 3),
        check=True,
        no_grad=_WHY,
        cost=lambda a, i, o: Cost(elementwise=4 * i[1].size),
    ),
    Row(
        "adam",
        "~, ~, 1, ~, ~, 1:i32, P:i32? ->",
        "Adam, or AdamW with decoupled=1; t counts the steps taken before this one (as torch).",
        _adam,
        (
            Example((_W, _W, (1,), _W, _W, (1,)), {"weight_decay": 0.1}, {4: "positive", 5: "step"}),
            Example(
                (_W, _W, (1,), _W, _W, (1,)),
                {"weight_decay": 0.1, "decoupled": 1},
                {4: "positive", 5: "step"},
            ),
            Example(
                (_W, _PART, (1,), _PART, _PART, (1,), (2,)),
                {"axis": 1},
                {4: "positive", 5: "step", 6: "index:5"},
            ),
        ),
        attrs=_ADAM,
        shape=lambda a, w, g, lr, m, v, t, index: _check(a, w, g, (m, v), index),
        updates=(0, 3, 4),
        check=True,
        no_grad=_WHY,
        cost=lambda a, i, o: Cost(elementwise=12 * i[1].size, transcendental=i[1].size),
    ),
    Row(
        "keep_top",
        "NC~ -> NC~, NC",
        "Of each sample the channels with the largest sums of |d|, a share of them; the others become zero. The "
        "second output is those sums.",
        _keep_top,
        (
            Example(((2, 7, 4, 3),), {"share": 0.3}),
            Example(((3, 5),), {"share": 0.5}),
            Example(((1, 40, 6),), {"share": 0.01}),
        ),
        attrs={"share": Attr("f")},
        shape=lambda a, d: [d, Type(d.shape[:2])],
        check=True,
        no_grad=_WHY,
        cost=lambda a, i, o: Cost(elementwise=2 * i[0].size),
    ),
    Row(
        "ema",
        "*, * ->",
        "running = (1 - momentum) * running + momentum * scale * new.",
        _ema,
        (Example(((7,), (7,)), {"momentum": 0.1, "scale": 1.25}),),
        attrs={"momentum": Attr("f"), "scale": Attr("f", 1.0)},
        updates=(0,),
        no_grad=_WHY,
        shape=lambda a, *_: [],
    ),
    Row(
        "accumulate",
        "*, * ->",
        "total += new.",
        lambda a, total, new: [total + new],
        (Example(((5, 4), (5, 4))),),
        updates=(0,),
        adds=True,
        no_grad=_WHY,
        shape=lambda a, *_: [],
    ),
    Row(
        "clear",
        "* ->",
        "Set to zero.",
        lambda a, total: [np.zeros_like(total)],
        (Example(((5, 4),)),),
        updates=(0,),
        no_grad=_WHY,
        shape=lambda a, *_: [],
    ),
    Row(
        "increment",
        "1:i32 ->",
        "Add one to a counter.",
        lambda a, t: [t + 1],
        (Example(((1,),), {}, {0: "step"}),),
        updates=(0,),
        no_grad=_WHY,
        shape=lambda a, *_: [],
    ),
    Row(
        "sum_squares",
        "~ -> 1",
        "Sum of the squares of all elements.",
        lambda a, x: [np.array([(x * x).sum()])],
        (Example(((5, 40),)),),
        no_grad=_WHY,
        cost=lambda a, i, o: Cost(elementwise=2 * i[0].size),
    ),
    Row(
        "clip_scale",
        "1 -> 1",
        "min(1, max_norm / (sqrt(x) + 1e-6)): what clips gradients whose squared norm is x.",
        lambda a, x: [np.minimum(1, a["max_norm"] / (np.sqrt(x) + 1e-6))],
        (Example(((1,),), {"max_norm": 0.5}, {0: "positive"}),),
        attrs={"max_norm": Attr("f")},
        no_grad=_WHY,
    ),
)
