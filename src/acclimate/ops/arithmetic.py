"""Arithmetic with broadcasting, and reductions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..errors import BadInput
from ..ir import Dim, Type
from .coupling import elementwise, reduced
from .row import Attr, Cost, Example, Row, clamping

_PAIRS = (
    Example(((2, 3, 4), (2, 3, 4))),
    Example(((2, 3, 4, 5), (3, 1, 1))),
    Example(((4, 1, 6), (5, 1))),
    Example(((7, 9), (9,))),
    Example(((3, 4), (1,))),
)
_POSITIVE = tuple(Example(e.inputs, {}, {1: "positive"}) for e in _PAIRS)


def broadcast(attrs: Any, a: Type, b: Type) -> list[Type]:
    """numpy's rule; a Dim survives where it is the larger of the two."""
    rank = max(len(a.shape), len(b.shape))
    out = []
    for x, y in zip(
        (1,) * (rank - len(a.shape)) + tuple(a.shape),
        (1,) * (rank - len(b.shape)) + tuple(b.shape),
        strict=True,
    ):
        if x != y and 1 not in (x, y):
            raise BadInput("shapes do not broadcast", where=f"{a} and {b}")
        out.append(y if x == 1 and not (y == 1 and isinstance(x, Dim)) else x)
    return [Type(tuple(out))]


def reduce_to(tape: Any, d: str, shape: tuple[int, ...]) -> str:
    """Undo a broadcast: sum `d` over the axes along which `shape` was stretched."""
    have = tape.graph.shape(d)
    if tuple(have) == tuple(shape):
        return d
    padded = (1,) * (len(have) - len(shape)) + tuple(shape)
    axes = tuple(i for i, (h, s) in enumerate(zip(have, padded, strict=True)) if h != s)
    if axes:
        d = tape.emit("sum", d, axes=mask(axes), keep=1)
    return tape.reshape(d, shape)


def mask(axes: tuple[int, ...]) -> int:
    """Axes as a bit mask, the form in which attributes hold them."""
    return sum(1 << i for i in set(axes))


def axes_of(bits: int, rank: int) -> tuple[int, ...]:
    return tuple(i for i in range(rank) if bits >> i & 1)


def _add_grad(sign: float) -> Any:
    def rule(tape: Any, node: Any, d: str) -> list[str]:
        a, b = node.inputs
        db = ""
        if tape.wants(b):
            db = reduce_to(tape, d, tape.graph.shape(b))
            if sign < 0:
                db = tape.emit("affine", db, scale=-1.0)
        return [reduce_to(tape, d, tape.graph.shape(a)) if tape.wants(a) else "", db]

    return rule


def _mul_grad(tape: Any, node: Any, d: str) -> list[str]:
    a, b = node.inputs
    return [
        reduce_to(tape, tape.emit("mul", d, other), tape.graph.shape(me)) if tape.wants(me) else ""
        for me, other in ((a, b), (b, a))
    ]


def _div_grad(tape: Any, node: Any, d: str) -> list[str]:
    a, b = node.inputs
    q = tape.emit("div", d, b)
    da = reduce_to(tape, q, tape.graph.shape(a)) if tape.wants(a) else ""
    db = ""
    if tape.wants(b):
        db = tape.emit(
            "affine", reduce_to(tape, tape.emit("mul", q, node.outputs[0]), tape.graph.shape(b)), scale=-1.0
        )
    return [da, db]


def _keep_grad(tape: Any, node: Any, d: str) -> list[str]:
    a, b = node.inputs
    return [reduce_to(tape, tape.emit("keep", d, b), tape.graph.shape(a)) if tape.wants(a) else "", ""]


def _reduced(attrs: Any, x: Type) -> list[Type]:
    axes = axes_of(attrs["axes"], len(x.shape))
    if attrs["axes"] >> len(x.shape):
        raise BadInput("an axis is out of range", where=str(x), number=str(attrs["axes"]))
    return [
        Type(tuple(1 if i in axes else s for i, s in enumerate(x.shape) if attrs["keep"] or i not in axes))
    ]


def _reduce_grad(mean: bool) -> Any:
    def rule(tape: Any, node: Any, d: str) -> list[str]:
        x = tape.graph.type(node.inputs[0])
        axes = axes_of(node.attrs["axes"], len(x.shape))
        d = tape.reshape(d, tuple(1 if i in axes else s for i, s in enumerate(x.shape)))
        if mean:
            d = tape.emit("affine", d, scale=1.0 / math.prod(x.shape[i] for i in axes))
        return [tape.emit("expand", d, shape=x.shape)]

    return rule


def _reads_all(attrs: Any, ins: Any, outs: Any) -> Cost:
    return Cost(elementwise=ins[0].size)


_REDUCE = {"axes": Attr("i"), "keep": Attr("i", 0)}
_REDUCTIONS = tuple(
    Example((s,), {"axes": m, "keep": k})
    for s, m, k in (
        ((3, 4, 5, 6), 0b1101, 0),
        ((3, 4, 5, 6), 0b1100, 1),
        ((3, 4, 5), 0b010, 0),
        ((4, 7), 0b01, 0),
        ((5, 3), 0b11, 0),
    )
)

ROWS = (
    clamping(
        Row(
            "add",
            "~, ~ -> ~",
            "a + b with broadcasting.",
            lambda a, x, y: [x + y],
            _PAIRS,
            shape=broadcast,
            grad=_add_grad(1.0),
            couple=elementwise,
            in_place=(0, 1),
            check=True,
            fast=True,
            roles={0: "bias", 1: "bias"},
        ),
        bits=True,
    ),
    Row(
        "sub",
        "~, ~ -> ~",
        "a - b with broadcasting.",
        lambda a, x, y: [x - y],
        _PAIRS,
        shape=broadcast,
        grad=_add_grad(-1.0),
        couple=elementwise,
        in_place=(0, 1),
        check=True,
    ),
    Row(
        "mul",
        "~, ~ -> ~",
        "a * b with broadcasting.",
        lambda a, x, y: [x * y],
        _PAIRS,
        shape=broadcast,
        grad=_mul_grad,
        couple=elementwise,
        in_place=(0, 1),
        check=True,
        roles={0: "scale", 1: "scale"},
    ),
    Row(
        "div",
        "~, ~ -> ~",
        "a / b with broadcasting.",
        lambda a, x, y: [x / y],
        _POSITIVE,
        shape=broadcast,
        grad=_div_grad,
        couple=elementwise,
        in_place=(0, 1),
        check=True,
    ),
    Row(
        "affine",
        "* -> *",
        "scale * x + shift with constants.",
        lambda a, x: [x * x.dtype.type(a["scale"]) + x.dtype.type(a["shift"])],
        (Example(((3, 7),), {"scale": -1.5, "shift": 0.25}),),
        attrs={"scale": Attr("f", 1.0), "shift": Attr("f", 0.0)},
        in_place=(0,),
        grad=lambda tape, node, d: [tape.emit("affine", d, scale=node.attrs["scale"])],
    ),
    Row(
        "sum",
        "~ -> ~",
        "Sum over the axes of a bit mask.",
        lambda a, x: [np.sum(x, axis=axes_of(a["axes"], x.ndim), keepdims=bool(a["keep"]))],
        _REDUCTIONS,
        attrs=_REDUCE,
        shape=_reduced,
        grad=_reduce_grad(False),
        couple=reduced,
        cost=_reads_all,
        check=True,
    ),
    Row(
        "mean",
        "~ -> ~",
        "Mean over the axes of a bit mask.",
        lambda a, x: [np.mean(x, axis=axes_of(a["axes"], x.ndim), keepdims=bool(a["keep"]))],
        _REDUCTIONS,
        attrs=_REDUCE,
        shape=_reduced,
        grad=_reduce_grad(True),
        couple=reduced,
        cost=_reads_all,
        check=True,
    ),
    Row(
        "greater",
        "~, ~ -> ~",
        "1 where a > b, 0 elsewhere, with broadcasting; flat wherever it has a slope.",
        lambda a, x, y: [(x > y).astype(x.dtype)],
        _PAIRS,
        shape=broadcast,
        grad=lambda tape, node, d: ["", ""],
        couple=elementwise,
        in_place=(0, 1),
        check=True,
    ),
    Row(
        "keep",
        "~, ~ -> ~",
        "a where b is not zero, 0 elsewhere (also where a is not a number), with broadcasting.",
        lambda a, x, y: [np.where(y != 0, x, x.dtype.type(0))],
        tuple(Example(e.inputs, {}, {1: "target"}) for e in _PAIRS),
        shape=broadcast,
        grad=_keep_grad,
        couple=elementwise,
        in_place=(0, 1),
        check=True,
    ),
)
