"""Fake quantisation: floats rounded to what integers of a scale can hold, with a gradient that learning can use."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..errors import BadInput
from ..ir import Type
from .coupling import Call, Labels
from .quantized import HIGH, LOW, half_away
from .row import Attr, Cost, Example, Row


def _check(attrs: Any, x: Type, scale: Type) -> None:
    if not 0 <= attrs["axis"] < len(x.shape):
        raise BadInput("an axis is out of range", where=str(x), number=str(attrs["axis"]))
    if scale.size not in (1, x.shape[attrs["axis"]]):
        raise BadInput("there is one scale, or one an index of the axis", where=f"{x}, scale {scale}")
    if not LOW <= attrs["low"] <= attrs["zero"] <= attrs["high"] <= HIGH:
        raise BadInput(
            "integers run from low to high around zero, within int8",
            where=str(x),
            number=f"{attrs['low']}, {attrs['zero']}, {attrs['high']}",
        )


def _shape(attrs: Any, x: Type, scale: Type) -> list[Type]:
    _check(attrs, x, scale)
    return [x, Type(x.shape, "bit")]


def _grad_shape(attrs: Any, d: Type, x: Type, scale: Type) -> list[Type]:
    _check(attrs, x, scale)
    return [scale]


def _along(attrs: Any, x: Any, scale: Any) -> Any:
    return (
        scale if scale.size == 1 else scale.reshape([-1 if i == attrs["axis"] else 1 for i in range(x.ndim)])
    )


def integers(attrs: Any, x: Any, scale: Any) -> tuple[Any, Any]:
    """(round(x / scale) + zero, the same between low and high), whole numbers in float64."""
    with np.errstate(all="ignore"):
        v = np.asarray(x, np.float32) / np.asarray(_along(attrs, x, scale), np.float32)
    q = half_away(np.clip(np.nan_to_num(v, nan=0.0), -1e6, 1e6).astype(np.float64)) + attrs["zero"]
    return q, np.clip(q, attrs["low"], attrs["high"])


def _fake_quant(a: Any, x: Any, scale: Any) -> list[Any]:
    q, held = integers(a, x, scale)
    return [(held - a["zero"]) * _along(a, x, scale), q == held]


def _scale_grad(a: Any, d: Any, x: Any, scale: Any) -> list[Any]:
    q, held = integers(a, x, scale)
    with np.errstate(all="ignore"):
        slope = held - a["zero"] - np.where(q == held, np.nan_to_num(x / _along(a, x, scale)), 0)
    others = tuple(i for i in range(x.ndim) if scale.size == 1 or i != a["axis"])
    gain = 1 / math.sqrt(x.size // scale.size * max(1, a["high"] - a["zero"]))
    return [(d * slope).sum(others).reshape(scale.shape) * gain]


def _grad(tape: Any, node: Any, d: str, *_: str) -> list[str]:
    x, scale = node.inputs
    dx = tape.emit("gate_bits", d, tape.keep_output(node, 1)) if tape.wants(x) else ""
    return [dx, tape.emit("fake_quant_scale_grad", d, x, scale, **node.attrs) if tape.wants(scale) else ""]


def _couple(call: Call) -> list[Labels]:
    x, scale = call.inputs
    if len(scale[0]) > 1:
        call.units.tie(scale[0], x[call.attrs["axis"]])
    return [x, x if call.outputs[1] else []]


_ATTRS = {"axis": Attr("i", 0), "low": Attr("i", LOW + 1), "high": Attr("i", HIGH), "zero": Attr("i", 0)}
_CASES = (
    ((5, 3, 7), (5,), {"low": -7, "high": 7}),
    ((4, 6), (6,), {"axis": 1, "low": -2, "high": 1}),
    ((3, 41), (1,), {"low": -8, "high": 7, "zero": -3}),
)

ROWS = (
    Row(
        "fake_quant",
        "*, S -> *, *:bit?",
        "scale * (q - zero), q = round(x / scale) + zero between low and high, halves away from zero; one scale, or "
        "one an index of `axis`. The bits hold where q was not clamped: there the gradient passes.",
        _fake_quant,
        tuple(Example((x, s), a, {1: "positive"}) for x, s, a in _CASES),
        attrs=_ATTRS,
        shape=_shape,
        grad=_grad,
        couple=_couple,
        fakes=True,
        roles={0: "weight", 1: "scale"},
        in_place=(0,),
        check=True,
        cost=lambda a, i, o: Cost(elementwise=4 * o[0].size),
    ),
    Row(
        "fake_quant_scale_grad",
        "*, *, S -> S",
        "Gradient of fake_quant's scale from d and x: sum of d * (q - zero - x / scale), without x / scale where q was "
        "clamped, over sqrt(elements a scale * (high - zero)) (Esser et al. 2020, arXiv:1902.08153).",
        _scale_grad,
        tuple(Example((x, x, s), a, {2: "positive"}) for x, s, a in _CASES),
        attrs=_ATTRS,
        shape=_grad_shape,
        no_grad="second derivatives are not needed",
        check=True,
        cost=lambda a, i, o: Cost(elementwise=6 * i[0].size),
    ),
)
