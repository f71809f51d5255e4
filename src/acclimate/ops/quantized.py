"""Integer ops, by the semantics of TFLite's reference kernels, and their gradients.

An int8 tensor stands for scale * (q - zero). Gradients are float32 and with respect to what the integers stand for, so
that the gradient of a whole network is that of its de-quantised twin, and a step of gradient descent on it is what is
called quantisation-aware scaling (Lin et al., "On-Device Training Under 256KB Memory", 2022: the gradient of the
integers divided by the square of their scale). Where a clamp held an output back no gradient passes; the last output of
the ops that clamp holds one bit an element: the rounded value lay within low..high.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import BadInput
from ..ir import Type
from .arithmetic import mask
from .convolution import (
    _CASES,
    _GEOMETRY,
    _conv,
    _conv_input_grad,
    _conv_shape,
    _conv_weight_grad,
    _input_grad_shape,
    _macs,
    _out,
    _take_weight_grad,
    _weight_grad_shape,
)
from .pooling import _AVERAGE, _AVG, _avg_pool_matrix, _avg_shape, _window_cost
from .random import uniform
from .row import Attr, Cost, Example, Row

LOW, HIGH = -128, 127
ADD_SHIFT = 20  # bits that an addition gains before it scales its inputs
RESIDUAL = 256  # parts of a weight's step that its residual counts
MAX_TAPS = 65535  # products that an int32 sums without overflow
NEAREST, STOCHASTIC = 0, 1

# -- integer arithmetic --------------------------------------------------------------------------------------------


def multiplier(real: float) -> tuple[int, int]:
    """(m, shift) with real = m * 2^(shift - 31) and m in [2^30, 2^31), as TFLite's QuantizeMultiplier."""
    if not (math.isfinite(real) and real >= 0):
        raise BadInput("a scale ratio must be finite and not negative", number=repr(real))
    if real == 0:
        return 0, 0
    fraction, shift = math.frexp(real)
    q = math.floor(fraction * 2**31 + 0.5)
    if q == 2**31:
        q, shift = q // 2, shift + 1
    if shift < -31:
        return 0, 0
    if shift > 30:
        return 2**31 - 1, 30
    return q, shift


def multipliers(real: Any) -> tuple[np.ndarray, np.ndarray]:
    """`multiplier` of each of several numbers, as two int32 arrays."""
    pairs = [multiplier(float(r)) for r in np.atleast_1d(np.asarray(real, np.float64))]
    return np.array([p[0] for p in pairs], np.int32), np.array([p[1] for p in pairs], np.int32)


def scaled(x: Any, m: Any, shift: Any) -> Any:
    """x * m * 2^(shift - 31) in integers, rounded twice as TFLite does: MultiplyByQuantizedMultiplier."""
    x, m, shift = (np.asarray(v, np.int64) for v in (x, m, shift))
    x = np.clip(x << np.maximum(shift, 0), -(2**31), 2**31 - 1)
    high = (x * m + (1 << 30)) >> 31
    right = np.maximum(-shift, 0)
    rest = high & ((1 << right) - 1)
    half = (((1 << right) - 1) >> 1) + (high < 0)
    return (high >> right) + (rest > half)


def half_away(x: Any) -> Any:
    """Rounded to whole numbers, halves away from zero; exact."""
    whole = np.trunc(x)
    return whole + np.where(np.abs(x - whole) >= 0.5, np.sign(x), 0)


def _bounded(attrs: Any, y: Any) -> list[Any]:
    low, high = attrs["low"], attrs["high"]
    return [np.clip(y, low, high).astype(np.int8), (y >= low) & (y <= high)]


def _wrapped(x: Any) -> Any:
    """As an int32 holds it."""
    return ((x + 2**31) & (2**32 - 1)) - 2**31


# -- forward -------------------------------------------------------------------------------------------------------


def _quantize(a: Any, x: Any) -> list[Any]:
    y = np.asarray(x, np.float32) / np.float32(a["scale"])
    y = half_away(np.clip(np.nan_to_num(y, nan=0.0), -1e6, 1e6).astype(np.float64)) + a["zero"]
    return _bounded({"low": LOW, "high": HIGH}, y)


def _q_conv(a: Any, x: Any, w: Any, b: Any, m: Any, shift: Any) -> list[Any]:
    acc = _conv(a, x.astype(np.int64) - a["x_zero"], w.astype(np.int64))[0]
    channel = (1, -1) + (1,) * (acc.ndim - 2)
    if b is not None:
        acc = _wrapped(acc + b.astype(np.int64).reshape(channel))
    return _bounded(a, scaled(acc, m.reshape(channel), shift.reshape(channel)) + a["y_zero"])


def _q_conv_shape(attrs: Any, x: Type, w: Type, *rest: Type | None) -> list[Type]:
    if math.prod(w.shape[1:]) > MAX_TAPS:
        raise BadInput(
            "a convolution sums too many products for an int32",
            where=f"{x}, weight {w}",
            number=f"{math.prod(w.shape[1:])}, at most {MAX_TAPS}",
        )
    y = _conv_shape(attrs, x, w)[0].shape
    return [Type(y, "i8"), Type(y, "bit")]


def _q_add(a: Any, x: Any, z: Any) -> list[Any]:
    def part(q: Any, name: str) -> Any:
        raised = (q.astype(np.int64) - a[f"{name}_zero"]) << ADD_SHIFT
        return scaled(raised, a[f"{name}_multiplier"], a[f"{name}_shift"])

    total = part(x, "a") + part(z, "b")
    return _bounded(a, scaled(total, a["y_multiplier"], a["y_shift"]) + a["y_zero"])


def add_attrs(a: Any, b: Any, y: Any, low: int = LOW, high: int = HIGH) -> dict[str, int]:
    """Attributes of q_add for a, b and y given as (scale, zero)."""
    most = 2 * max(float(np.float32(a[0])), float(np.float32(b[0])))
    ratios = {
        "a": float(np.float32(a[0])) / most,
        "b": float(np.float32(b[0])) / most,
        "y": most / (2**ADD_SHIFT * float(np.float32(y[0]))),
    }
    attrs = {"a_zero": int(a[1]), "b_zero": int(b[1]), "y_zero": int(y[1]), "low": low, "high": high}
    for name, ratio in ratios.items():
        attrs[f"{name}_multiplier"], attrs[f"{name}_shift"] = multiplier(ratio)
    return attrs


def conv_attrs(x: Any, w_scale: Any, y: Any) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """(attributes of q_conv but geometry and clamp, multiplier, shift) for x and y given as (scale, zero)."""
    xs, ys = float(np.float32(x[0])), float(np.float32(y[0]))
    real = xs * np.asarray(w_scale, np.float32).astype(np.float64) / ys
    attrs = {"x_zero": int(x[1]), "y_zero": int(y[1]), "x_scale": xs, "y_scale": ys}
    return attrs, *multipliers(real)


def _weight_scale(tape: Any, node: Any) -> str:
    """What one step of each output channel's weights is, from what scales its sums."""
    values = tape.graph.values
    m, shift = (np.asarray(values[n].data, np.float64) for n in node.inputs[3:5])
    scale = m * 2.0 ** (shift - 31) * node.attrs["y_scale"] / node.attrs["x_scale"]
    return tape.graph.constant(f"{node.outputs[0]}.w_scale", scale)


def _q_avg_pool(a: Any, x: Any) -> list[Any]:
    out = _avg_shape(a, Type(x.shape))[0].shape[2:]
    flat = {**a, "include_pad": 0}
    pairs = [
        _avg_pool_matrix(flat, s, i, o, False) for i, (s, o) in enumerate(zip(x.shape[2:], out, strict=True))
    ]
    total = x.astype(np.int64)
    for i, (m, _) in enumerate(pairs):
        total = np.moveaxis(np.tensordot(total, m.astype(np.int64), (2 + i, 1)), -1, 2 + i)
    count = np.maximum(pairs[0][1].astype(np.int64), 1)
    if len(pairs) == 2:
        count = count[:, None] * np.maximum(pairs[1][1].astype(np.int64), 1)
    mean = np.sign(total) * ((np.abs(total) + count // 2) // count)
    return [np.clip(mean, a["low"], a["high"]).astype(np.int8)]


def _table(a: Any, x: Any, table: Any) -> list[Any]:
    return [table[x.astype(np.int64) - LOW]]


# -- gradients -----------------------------------------------------------------------------------------------------


def _passed(tape: Any, node: Any, d: str, output: int = 1) -> str:
    """d where nothing was clamped."""
    return tape.emit("gate_bits", d, tape.keep_output(node, output))


def _q_conv_grad(tape: Any, node: Any, d: str, *_: str) -> list[str]:
    x, w, b = node.inputs[:3]
    graph, wants = tape.graph, tape.wants
    if not any(n and wants(n) for n in (x, w, b)):
        return ["", "", "", "", ""]
    d = _passed(tape, node, d)
    geometry = {name: node.attrs[name] for name in _GEOMETRY}
    zero, scale = node.attrs["x_zero"], node.attrs["x_scale"]
    dx = dw = db = ""
    if wants(x):
        size = graph.shape(x)[2:]
        dx = tape.emit("q_conv_input_grad", d, w, _weight_scale(tape, node), size=size, **geometry)
    if wants(w):
        kernel = graph.shape(w)[2:]
        dw = tape.emit("q_conv_weight_grad", x, d, kernel=kernel, x_zero=zero, x_scale=scale, **geometry)
    if b and wants(b):
        db = tape.emit("sum", d, axes=mask((0, *range(2, len(graph.shape(d))))))
    return [dx, dw, db, "", ""]


def _input_grad(a: Any, d: Any, w: Any, scale: Any, bits: Any = None) -> list[Any]:
    if bits is not None:
        d = np.where(bits, d, 0)
    real = w.astype(d.dtype) * scale.astype(d.dtype).reshape(-1, *(1,) * (w.ndim - 1))
    return _conv_input_grad(a, d, real)


def _input_grad_types(attrs: Any, d: Type, w: Type, scale: Type, bits: Type | None) -> list[Type]:
    if bits is not None and tuple(bits.shape) != tuple(d.shape):
        raise BadInput("there is one bit an element", where=f"{d}, {bits}")
    return _input_grad_shape(attrs, d, w)


def _like_first(attrs: Any, x: Type, *rest: Type) -> list[Type]:
    if rest[-1].shape != (256,):
        raise BadInput("a table has an entry for each int8", where=str(rest[-1]))
    return [x]


def _weight_grad(a: Any, x: Any, d: Any) -> list[Any]:
    real = (x.astype(d.dtype) - a["x_zero"]) * d.dtype.type(np.float32(a["x_scale"]))
    return _conv_weight_grad(a, real, d)


# -- update --------------------------------------------------------------------------------------------------------


def _q_sgd(
    a: Any,
    w: Any,
    g: Any,
    lr: Any,
    scale: Any,
    buf: Any = None,
    rest: Any = None,
    step: Any = None,
    index: Any = None,
) -> list[Any]:
    f = np.float32
    at = (slice(None),) * a["axis"] + (slice(None) if index is None else index,)
    p, g = w[at], g.astype(f)
    s = np.asarray(scale, f)
    if s.size > 1 and a["axis"] == 0 and index is not None:
        s = s[index]
    s = s.reshape(-1, *(1,) * (w.ndim - 1))
    g = g + f(a["weight_decay"]) * (p.astype(f) * s)
    if buf is not None:
        buf = f(a["momentum"]) * buf.astype(f) + g
        g = g + f(a["momentum"]) * buf if a["nesterov"] else buf
    by = np.asarray(lr, f)[0] * g / s
    bound = f(2**30)
    by = np.clip(np.nan_to_num(by, nan=0.0, posinf=bound, neginf=-bound), -bound, bound).astype(np.float64)
    if rest is not None:
        by = half_away(np.clip(by * RESIDUAL, -(2.0**30), 2.0**30)).astype(np.int64)
        value = p.astype(np.int64) * RESIDUAL + rest - by
        value = np.clip(value, LOW * RESIDUAL, HIGH * RESIDUAL + RESIDUAL // 2 - 1)
        new = (value + RESIDUAL // 2) >> 8
        rest = (value - new * RESIDUAL).astype(np.int8)
    elif a["rounding"] == STOCHASTIC:
        u = uniform(int(step[0]), int(a["salt"]), p.size).reshape(p.shape).astype(np.float64)
        new = p.astype(np.int64) - np.floor(by + u).astype(np.int64)
    else:
        new = p.astype(np.int64) - half_away(by).astype(np.int64)
    low, high = (LOW, HIGH) if w.dtype == np.int8 else (-(2**31), 2**31 - 1)
    out = w.copy()
    out[at] = np.clip(new, low, high).astype(w.dtype)
    return [out, buf, rest]


def _q_sgd_check(a: Any, w: Type, g: Type, lr: Type, scale: Type, *rest: Type | None) -> list[Type]:
    buf, residual, step, index = rest
    want = tuple(w.shape)
    if index is not None:
        if not 0 <= a["axis"] < len(want):
            raise BadInput("an axis is out of range", where=str(w), number=str(a["axis"]))
        want = (*want[: a["axis"]], index.shape[0], *want[a["axis"] + 1 :])
    for name, t in (("gradient", g), ("moment", buf), ("residual", residual)):
        if t is not None and tuple(t.shape) != want:
            raise BadInput(
                f"the {name} does not have the shape that learns", where=str(t), number=f"must be {want}"
            )
    if scale.size != 1 and (not w.shape or scale.size != w.shape[0]):
        raise BadInput("there is one scale, or one an output channel", where=f"{w}, scale {scale}")
    if residual is not None and w.dtype != "i8":
        raise BadInput("only int8 weights have a residual", where=str(w))
    if a["rounding"] and step is None:
        raise BadInput("stochastic rounding needs a step counter", where=str(w))
    return []


_CLAMP = {"low": Attr("i", LOW), "high": Attr("i", HIGH)}
_Q_CONV = {
    **_GEOMETRY,
    "x_zero": Attr("i", 0),
    "y_zero": Attr("i", 0),
    **_CLAMP,
    "x_scale": Attr("-", 1.0),
    "y_scale": Attr("-", 1.0),
}
_Q_ADD = {
    **{f"{n}_zero": Attr("i", 0) for n in "aby"},
    **{f"{n}_{what}": Attr("i") for n in "aby" for what in ("multiplier", "shift")},
    **_CLAMP,
}
_Q_AVERAGE = {k: v for k, v in _AVERAGE.items() if k != "include_pad"}
_SCALE = {"scale": Attr("f"), "zero": Attr("i", 0)}
_FIXED = {3: "multiplier", 4: "shift"}
_ZEROS = ({"x_zero": 3, "y_zero": -7}, {"x_zero": -128, "y_zero": -128, "low": -128, "high": 90}, {})
_SHAPES = (Example(((3, 4, 5),)), Example(((2, 33),)))
_NO_SECOND = "second derivatives are not needed"
_WHY = "an update is not differentiated"


def _examples(attrs: Mapping[str, Any], inputs: int = 1) -> tuple[Example, ...]:
    return tuple(Example(e.inputs * inputs, attrs) for e in _SHAPES)


ROWS = (
    Row(
        "quantize",
        "* -> *:i8, *:bit?",
        "round(x / scale) + zero, saturated; halves are rounded away from zero.",
        _quantize,
        _examples({"scale": 0.02, "zero": -5}),
        attrs=_SCALE,
        check=True,
        grad=lambda tape, node, d, *_: [_passed(tape, node, d)],
    ),
    Row(
        "dequantize",
        "*:i8 -> *",
        "scale * (q - zero).",
        lambda a, q: [(q.astype(np.float64) - a["zero"]) * float(np.float32(a["scale"]))],
        _examples({"scale": 0.02, "zero": -5}),
        attrs=_SCALE,
        check=True,
        grad=lambda tape, node, d: [d],
    ),
    Row(
        "q_conv",
        "NC~:i8, Oc~:i8, O:i32?, O:i32, O:i32 -> NO~:i8, NO~:bit?",
        "Integer convolution: sums of (x - x_zero) * w with an optional bias, times multiplier * 2^(shift - 31) of the "
        "output channel, plus y_zero, clamped.",
        _q_conv,
        tuple(
            Example(
                (x, w, None if i == 1 else (w[0],), (w[0],), (w[0],)),
                {**g, **_ZEROS[i % 3]},
                {2: "bias", **_FIXED},
            )
            for i, (x, w, g) in enumerate(_CASES)
        ),
        attrs=_Q_CONV,
        shape=_q_conv_shape,
        grad=_q_conv_grad,
        check=True,
        fast=True,
        fixed=(3, 4),
        roles={1: "weight", 2: "bias"},
        cost=lambda a, i, o: _macs(a, o[0].size, i[1].shape),
    ),
    Row(
        "q_conv_input_grad",
        "NO~, Oc~:i8, O, NO~:bit? -> NC~",
        "Gradient of an integer convolution with respect to its input; scale: of each output channel's weights. Where "
        "the bits are not set, d counts as zero.",
        _input_grad,
        tuple(
            Example(
                (_out(x, w, g), w, (w[0],), *((_out(x, w, g),) if i % 2 else ())),
                {**g, "size": x[2:]},
                {2: "positive", 3: "bits"},
            )
            for i, (x, w, g) in enumerate(_CASES)
        ),
        attrs={**_GEOMETRY, "size": Attr("i2", pad=1)},
        shape=_input_grad_types,
        gated=3,
        check=True,
        fast=True,
        no_grad=_NO_SECOND,
        cost=lambda a, i, o: _macs(a, i[0].size, i[1].shape),
    ),
    Row(
        "q_conv_weight_grad",
        "NC~:i8, NO~ -> Oc~",
        "Gradient of an integer convolution with respect to what its weights stand for.",
        _weight_grad,
        tuple(
            Example((x, _out(x, w, g)), {**g, "kernel": w[2:], "x_zero": 5, "x_scale": 0.05})
            for x, w, g in _CASES
        ),
        attrs={**_GEOMETRY, "kernel": Attr("i2", pad=1), "x_zero": Attr("i", 0), "x_scale": Attr("f", 1.0)},
        shape=_weight_grad_shape,
        take=_take_weight_grad,
        channel_of=1,
        check=True,
        fast=True,
        no_grad=_NO_SECOND,
        cost=lambda a, i, o: _macs(a, i[1].size, o[0].shape),
    ),
    Row(
        "q_add",
        "*:i8, *:i8 -> *:i8, *:bit?",
        "Sum of two integer tensors of different scales, in the scale of the result, clamped (TFLite's Add).",
        _q_add,
        _examples(add_attrs((0.03, 4), (0.05, -9), (0.06, 2), -100, 100), 2),
        attrs=_Q_ADD,
        in_place=(0, 1),
        check=True,
        fast=True,
        grad=lambda tape, node, d, *_: [_passed(tape, node, d)] * 2,
    ),
    Row(
        "q_rescale",
        "*:i8 -> *:i8, *:bit?",
        "The same numbers in another scale: y_zero + (x - x_zero) * multiplier * 2^(shift - 31), clamped.",
        lambda a, x: _bounded(
            a, scaled(x.astype(np.int64) - a["x_zero"], a["multiplier"], a["shift"]) + a["y_zero"]
        ),
        _examples({"x_zero": 3, "y_zero": -20, "multiplier": 1518500250, "shift": 1}),
        attrs={
            "x_zero": Attr("i", 0),
            "y_zero": Attr("i", 0),
            "multiplier": Attr("i"),
            "shift": Attr("i"),
            **_CLAMP,
        },
        in_place=(0,),
        check=True,
        grad=lambda tape, node, d, *_: [_passed(tape, node, d)],
    ),
    Row(
        "q_avg_pool",
        "NC~:i8 -> NC~:i8",
        "Mean of each window, padding left out, halves rounded away from zero, clamped; the scale stays (TFLite's "
        "AveragePool).",
        _q_avg_pool,
        tuple(Example((s,), {k: v for k, v in a.items() if k != "include_pad"}) for s, a in _AVG),
        attrs={**_Q_AVERAGE, **_CLAMP},
        shape=lambda a, x: [Type(_avg_shape(a, x)[0].shape, "i8")],
        check=True,
        grad=lambda tape, node, d: [
            tape.emit(
                "avg_pool_grad",
                d,
                size=tape.graph.shape(node.inputs[0])[2:],
                include_pad=0,
                **{k: node.attrs[k] for k in _Q_AVERAGE},
            )
        ],
        cost=_window_cost,
    ),
    Row(
        "q_table",
        "*:i8, T:i8 -> *:i8",
        "table[x + 128]: any function of one number. `slopes`: its derivative at each of the 256, for the gradient.",
        _table,
        tuple(Example((*e.inputs, (256,))) for e in _SHAPES),
        attrs={"slopes": Attr("-", ())},
        shape=_like_first,
        in_place=(0,),
        check=True,
        grad=lambda tape, node, d: [
            tape.emit(
                "q_table_grad",
                d,
                node.inputs[0],
                tape.graph.constant("slopes", np.array(node.attrs["slopes"] or (0.0,) * 256)),
            ),
            "",
        ],
    ),
    Row(
        "q_table_grad",
        "*, *:i8, T -> *",
        "d * slopes[x + 128].",
        lambda a, d, x, slopes: [d * slopes[x.astype(np.int64) - LOW]],
        tuple(Example((*e.inputs * 2, (256,))) for e in _SHAPES),
        shape=_like_first,
        in_place=(0,),
        check=True,
        no_grad=_NO_SECOND,
    ),
    Row(
        "q_sgd",
        "~:i8/i32, ~, 1, S, ~?, ~:i8?, 1:i32?, P:i32? ->",
        "Gradient descent on integers: w -= round(lr * g / scale), saturated; g and scale are those of what w stands "
        "for. rounding 0: half away from zero, 1: stochastic, from the step counter and the salt. With a residual, "
        "one more int8 an element, what rounding would lose is kept for the next step.",
        _q_sgd,
        (
            Example(
                ((6, 5, 3), (6, 5, 3), (1,), (6,)), {"weight_decay": 0.1}, {2: "positive", 3: "positive"}
            ),
            Example(
                ((6, 5, 3), (6, 5, 3), (1,), (1,), None, None, (1,)),
                {"rounding": 1, "salt": 5},
                {2: "positive", 3: "positive", 6: "step"},
            ),
            Example(
                ((6, 5, 3), (6, 2, 3), (1,), (6,), (6, 2, 3), (6, 2, 3), None, (2,)),
                {"axis": 1, "momentum": 0.9},
                {2: "positive", 3: "positive", 7: "index:5"},
            ),
            Example(
                ((6, 5), (2, 5), (1,), (6,), None, (2, 5), None, (2,)),
                {"axis": 0},
                {2: "positive", 3: "positive", 7: "index:6"},
            ),
            Example(((7,), (7,), (1,), (7,)), {"momentum": 0.5}, {0: "bias", 2: "positive", 3: "positive"}),
        ),
        attrs={
            "axis": Attr("i", 0),
            "momentum": Attr("f", 0.0),
            "nesterov": Attr("i", 0),
            "weight_decay": Attr("f", 0.0),
            "rounding": Attr("i", NEAREST),
            "salt": Attr("i", 0),
        },
        shape=_q_sgd_check,
        updates=(0, 4, 5),
        fixed=(7,),
        check=True,
        no_grad=_WHY,
        cost=lambda a, i, o: Cost(elementwise=6 * i[1].size),
    ),
)
