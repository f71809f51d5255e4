"""Activations: element by element, one input. Piecewise linear ones need one bit an element for their gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import BadInput
from ..ir import Type
from .row import Attr, Cost, Example, Row

_SHAPES = (Example(((2, 3, 5, 5),)), Example(((4, 37),)))
_erf = np.vectorize(math.erf, otypes=[np.float64])


def _transcendental(attrs: Any, ins: Any, outs: Any) -> Cost:
    return Cost(transcendental=outs[0].size, elementwise=2 * outs[0].size)


# -- piecewise linear: y = x inside (low, high), slope * x or a bound outside ------------------------------------


def _gate_grad(low: str | float, high: str | float, slope: str | float) -> Callable[..., Any]:
    def rule(tape: Any, node: Any, d: str, *_: str) -> list[str]:
        def get(v: Any) -> float:
            return float(node.attrs[v]) if isinstance(v, str) else v

        return [tape.emit("gate", d, node.outputs[0], low=get(low), high=get(high), slope=get(slope))]

    return rule


def _gate(attrs: Any, d: Any, y: Any) -> list[Any]:
    inside = (y > attrs["low"]) & (y < attrs["high"])
    return [np.where(inside, d, d * d.dtype.type(attrs["slope"]))]


_GATE = {"low": Attr("f", 0.0), "high": Attr("f", math.inf), "slope": Attr("f", 0.0)}

PIECEWISE = (
    Row(
        "relu",
        "* -> *, *:bit?",
        "max(x, 0); the second output holds x > 0, one bit an element.",
        lambda a, x: [np.maximum(x, 0), x > 0],
        _SHAPES,
        in_place=(0,),
        grad=_gate_grad(0.0, math.inf, 0.0),
        bounds=lambda a: (0.0, math.inf),
        fast=True,
    ),
    Row(
        "hard_tanh",
        "* -> *, *:bit?",
        "min(max(x, low), high), such as ReLU6; the bits hold low < x < high.",
        lambda a, x: [np.clip(x, a["low"], a["high"]), (x > a["low"]) & (x < a["high"])],
        tuple(Example(e.inputs, {"low": -0.5, "high": 0.7}) for e in _SHAPES),
        attrs={"low": Attr("f", -1.0), "high": Attr("f", 1.0)},
        in_place=(0,),
        grad=_gate_grad("low", "high", 0.0),
        bounds=lambda a: (a["low"], a["high"]),
        fast=True,
    ),
    Row(
        "leaky_relu",
        "* -> *, *:bit?",
        "x where x > 0, slope * x elsewhere (slope >= 0).",
        lambda a, x: [np.where(x > 0, x, x * x.dtype.type(a["slope"])), x > 0],
        tuple(Example(e.inputs, {"slope": 0.1}) for e in _SHAPES),
        attrs={"slope": Attr("f", 0.01)},
        in_place=(0,),
        grad=_gate_grad(0.0, math.inf, "slope"),
    ),
    Row(
        "gate",
        "*, * -> *",
        "d where low < y < high, slope * d elsewhere: the gradient of piecewise linear ops.",
        _gate,
        tuple(Example((e.inputs[0], e.inputs[0]), {"low": -0.5, "high": 0.7, "slope": 0.1}) for e in _SHAPES),
        attrs=_GATE,
        in_place=(0,),
        compact=(1, "gate_bits", ("slope",)),
        no_grad="second derivatives are not needed",
    ),
    Row(
        "gate_bits",
        "*, *:bit -> *",
        "The same from saved bits: d where the bit is set, slope * d elsewhere.",
        lambda a, d, bits: [np.where(bits, d, d * d.dtype.type(a["slope"]))],
        tuple(Example((e.inputs[0], e.inputs[0]), {"slope": 0.1}, {1: "bits"}) for e in _SHAPES),
        attrs={"slope": Attr("f", 0.0)},
        in_place=(0,),
        gates=True,
        no_grad="second derivatives are not needed",
    ),
)


# -- smooth: the gradient row takes d and what was saved, the input x or the output y ----------------------------


def _smooth(
    name: str,
    doc: str,
    fn: Callable[..., Any],
    dfn: Callable[..., Any],
    saved: str,
    attrs: dict[str, Attr] | None = None,
    values: dict[str, Any] | None = None,
    domain: str = "normal",
    shape: Callable[..., Any] | None = None,
    fast: bool = False,
) -> tuple[Row, Row]:
    attrs, values = attrs or {}, values or {}

    def grad(tape: Any, node: Any, d: str) -> list[str]:
        return [
            tape.emit(f"{name}_grad", d, node.inputs[0] if saved == "x" else node.outputs[0], **node.attrs)
        ]

    one = tuple(Example(e.inputs, values, {0: domain}) for e in _SHAPES)
    two = tuple(Example((e.inputs[0], e.inputs[0]), values, {1: domain}) for e in _SHAPES)
    return (
        Row(
            name,
            "* -> *",
            doc,
            lambda a, x: [fn(x, a)],
            one,
            attrs=attrs,
            grad=grad,
            shape=shape,
            cost=_transcendental,
            fast=fast,
            in_place=(0,),
        ),
        Row(
            f"{name}_grad",
            "*, * -> *",
            f"Gradient of {name} from d and its saved {'input' if saved == 'x' else 'output'}.",
            lambda a, d, s: [d * dfn(s, a)],
            two,
            attrs=attrs,
            cost=_transcendental,
            fast=fast,
            in_place=(0,),
            no_grad="second derivatives are not needed",
        ),
    )


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def _gelu(x: Any, a: Any) -> Any:
    if a["tanh"]:
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def _gelu_slope(x: Any, a: Any) -> Any:
    if a["tanh"]:
        t = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
    return 0.5 * (1 + _erf(x / math.sqrt(2))) + x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _elu_shape(a: Any, x: Type) -> list[Type]:
    if a["alpha"] < 0:
        raise BadInput(
            "elu takes an alpha from zero: below, its output does not tell its slope", where=str(x)
        )
    return [x]


def _hard_swish_slope(x: Any, a: Any) -> Any:
    return np.where(x <= -3, 0, np.where(x >= 3, 1, (2 * x + 3) / 6)).astype(x.dtype)


SMOOTH = (
    *_smooth("sigmoid", "1 / (1 + exp(-x)).", lambda x, a: _sigmoid(x), lambda y, a: y * (1 - y), "y"),
    *_smooth("tanh", "Hyperbolic tangent.", lambda x, a: np.tanh(x), lambda y, a: 1 - y * y, "y"),
    *_smooth(
        "gelu",
        "x * Phi(x), exact by erf, or the tanh approximation.",
        _gelu,
        _gelu_slope,
        "x",
        {"tanh": Attr("i", 0)},
        fast=True,
    ),
    *_smooth(
        "silu",
        "x * sigmoid(x).",
        lambda x, a: x * _sigmoid(x),
        lambda x, a: _sigmoid(x) * (1 + x * (1 - _sigmoid(x))),
        "x",
    ),
    *_smooth(
        "hard_swish",
        "x * min(max(x + 3, 0), 6) / 6.",
        lambda x, a: x * np.clip(x + 3, 0, 6) / 6,
        _hard_swish_slope,
        "x",
    ),
    *_smooth(
        "hard_sigmoid",
        "min(max(x + 3, 0), 6) / 6.",
        lambda x, a: np.clip(x + 3, 0, 6) / 6,
        lambda x, a: ((x > -3) & (x < 3)).astype(x.dtype) / 6,
        "x",
    ),
    *_smooth(
        "elu",
        "x where x > 0, alpha * (exp(x) - 1) elsewhere.",
        lambda x, a: np.where(x > 0, x, a["alpha"] * np.expm1(np.minimum(x, 0))),
        lambda y, a: np.where(y > 0, 1, y + a["alpha"]),
        "y",
        {"alpha": Attr("f", 1.0)},
        shape=_elu_shape,
    ),
    *_smooth("softplus", "log(1 + exp(x)).", lambda x, a: np.logaddexp(x, 0), lambda x, a: _sigmoid(x), "x"),
    *_smooth("exp", "Exponential.", lambda x, a: np.exp(x), lambda y, a: y, "y"),
    *_smooth("log", "Natural logarithm.", lambda x, a: np.log(x), lambda x, a: 1 / x, "x", domain="positive"),
    *_smooth("sqrt", "Square root.", lambda x, a: np.sqrt(x), lambda y, a: 0.5 / y, "y", domain="positive"),
    *_smooth("square", "x * x.", lambda x, a: x * x, lambda x, a: 2 * x, "x"),
    *_smooth("abs", "Absolute value.", lambda x, a: np.abs(x), lambda x, a: np.sign(x), "x"),
    *_smooth("reciprocal", "1 / x.", lambda x, a: 1 / x, lambda y, a: -y * y, "y", domain="positive"),
    *_smooth(
        "pow",
        "x to a constant power; below zero only whole powers are numbers.",
        lambda x, a: x ** x.dtype.type(a["exponent"]),
        lambda x, a: a["exponent"] * x ** x.dtype.type(a["exponent"] - 1),
        "x",
        {"exponent": Attr("f")},
        {"exponent": 1.7},
        domain="positive",
    ),
    *_smooth(
        "erf",
        "Error function.",
        lambda x, a: _erf(x),
        lambda x, a: 2 / math.sqrt(math.pi) * np.exp(-x * x),
        "x",
    ),
    *_smooth(
        "sin",
        "Sine; its error stays below 2e-7 up to |x| = 1e9.",
        lambda x, a: np.sin(x),
        lambda x, a: np.cos(x),
        "x",
    ),
)


# -- steps: flat wherever they have a slope ----------------------------------------------------------------------

_WHOLE = (np.floor, np.ceil, np.round, np.trunc)


def _round_shape(a: Any, x: Type) -> list[Type]:
    if not 0 <= a["mode"] < len(_WHOLE):
        raise BadInput("no way of rounding has this number", where=str(x), number=str(a["mode"]))
    return [x]


STEPS = (
    Row(
        "round",
        "* -> *",
        "A whole number: mode 0 the next below, 1 above, 2 the nearest (halves to even), 3 towards zero.",
        lambda a, x: [_WHOLE[a["mode"]](x)],
        tuple(Example(((4, 37),), {"mode": m}) for m in range(len(_WHOLE))),
        attrs={"mode": Attr("i")},
        shape=_round_shape,
        check=True,
        in_place=(0,),
        grad=lambda tape, node, d: [""],
    ),
)

ROWS = PIECEWISE + SMOOTH + STEPS
