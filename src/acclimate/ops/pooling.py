"""Pooling over one or two spatial dimensions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..errors import BadInput
from ..ir import Type
from .convolution import check_window, out_size
from .coupling import by_letters
from .row import Attr, Cost, Example, Row

_WINDOW = {
    "kernel": Attr("i2", pad=1),
    "stride": Attr("i2", pad=1),
    "before": Attr("i2", pad=0),
    "after": Attr("i2", pad=0),
    "dilation": Attr("i2", pad=1),
}
_AVERAGE = {
    "kernel": Attr("i2", pad=1),
    "stride": Attr("i2", pad=1),
    "before": Attr("i2", pad=0),
    "after": Attr("i2", pad=0),
    "extra": Attr("i2", pad=0),
    "include_pad": Attr("i", 1),
}


def _sizes(x: Type, attrs: Any, after: Any, dilation: Any) -> tuple[int, ...]:
    if len(x.shape) not in (3, 4):
        raise BadInput("pooling takes (N, C, W) or (N, C, H, W)", where=str(x))
    check_window(attrs, x, attrs["kernel"])
    sizes = tuple(
        out_size(*v)
        for v in zip(
            x.shape[2:], attrs["kernel"], attrs["stride"], attrs["before"], after, dilation, strict=True
        )
    )
    if min(sizes) < 1:
        raise BadInput("a pooling's output is empty", where=str(x), number=f"output {sizes}")
    return sizes


def _max_shape(attrs: Any, x: Type) -> list[Type]:
    shape = (*x.shape[:2], *_sizes(x, attrs, attrs["after"], attrs["dilation"]))
    area = math.prod(attrs["kernel"])
    if area > 65535:
        raise BadInput(
            "a max-pool window is too large", where=str(x), number=f"{area} elements, at most 65535"
        )
    return [Type(shape, x.dtype), Type(shape, "u8" if area < 256 else "u16")]


def _max_pool(attrs: Any, x: Any) -> list[Any]:
    flat = x.ndim == 3
    kernel, stride, before, after, dilation = (
        ((1 if k in ("kernel", "stride", "dilation") else 0), *attrs[k]) if flat else attrs[k]
        for k in _WINDOW
    )
    if flat:
        x = x[:, :, None]
    out = [out_size(*v) for v in zip(x.shape[2:], kernel, stride, before, after, dilation, strict=True)]
    lowest = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
    p = np.pad(x, [(0, 0), (0, 0), *zip(before, after, strict=True)], constant_values=lowest)
    taps = [
        p[
            :,
            :,
            i * dilation[0] : i * dilation[0] + stride[0] * (out[0] - 1) + 1 : stride[0],
            j * dilation[1] : j * dilation[1] + stride[1] * (out[1] - 1) + 1 : stride[1],
        ]
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]
    stack = np.stack(taps)
    y, index = stack.max(0), stack.argmax(0)
    return [y[:, :, 0], index[:, :, 0]] if flat else [y, index]


def _max_pool_grad(attrs: Any, d: Any, index: Any) -> list[Any]:
    flat = d.ndim == 3
    kernel, stride, before, after, dilation = (
        ((1 if k in ("kernel", "stride", "dilation") else 0), *attrs[k]) if flat else attrs[k]
        for k in _WINDOW
    )
    size = (1, *attrs["size"]) if flat else tuple(attrs["size"])
    if flat:
        d, index = d[:, :, None], index[:, :, None]
    x = np.zeros((*d.shape[:2], *size), d.dtype)
    n, c, i, j = np.indices(d.shape)
    row = i * stride[0] - before[0] + index // kernel[1] * dilation[0]
    col = j * stride[1] - before[1] + index % kernel[1] * dilation[1]
    inside = (row >= 0) & (row < size[0]) & (col >= 0) & (col < size[1])
    np.add.at(x, (n[inside], c[inside], row[inside], col[inside]), d[inside])
    return [x[:, :, 0] if flat else x]


def _avg_shape(attrs: Any, x: Type) -> list[Type]:
    after = tuple(a + e for a, e in zip(attrs["after"], attrs["extra"], strict=True))
    return [Type((*x.shape[:2], *_sizes(x, attrs, after, (1,) * (len(x.shape) - 2))))]


def _avg_pool_matrix(
    attrs: Any, size: int, axis: int, out: int, include_pad: bool
) -> tuple[np.ndarray, np.ndarray]:
    """0/1 matrix (out, size) of which input each output sums, and how many elements each window counts."""
    k, s, b, a = (attrs[n][axis] for n in ("kernel", "stride", "before", "after"))
    m = np.zeros((out, size))
    count = np.zeros(out)
    for i in range(out):
        low, high = i * s - b, min(i * s - b + k, size + a)
        count[i] = (high - low) if include_pad else max(0, min(high, size) - max(low, 0))
        m[i, max(low, 0) : max(0, min(high, size))] = 1
    return m, count


def _avg_pool_linear(attrs: Any, size: Any, out: Any) -> list[np.ndarray]:
    """The average as one matrix a spatial dimension; the window's count is a product, so it separates."""
    mats = []
    for axis, (s, o) in enumerate(zip(size, out, strict=True)):
        m, count = _avg_pool_matrix(attrs, s, axis, o, bool(attrs["include_pad"]))
        mats.append(m / np.maximum(count, 1)[:, None])
    return mats


def _avg_pool(attrs: Any, x: Any) -> list[Any]:
    out = _avg_shape(attrs, Type(x.shape))[0].shape[2:]
    mats = [m.astype(x.dtype) for m in _avg_pool_linear(attrs, x.shape[2:], out)]
    return [
        np.einsum("ncw,qw->ncq", x, mats[0])
        if x.ndim == 3
        else np.einsum("nchw,ph,qw->ncpq", x, *mats, optimize=True)
    ]


def _avg_pool_grad(attrs: Any, d: Any) -> list[Any]:
    mats = [m.astype(d.dtype) for m in _avg_pool_linear(attrs, attrs["size"], d.shape[2:])]
    return [
        np.einsum("ncq,qw->ncw", d, mats[0])
        if d.ndim == 3
        else np.einsum("ncpq,ph,qw->nchw", d, *mats, optimize=True)
    ]


def _window_cost(attrs: Any, ins: Any, outs: Any) -> Cost:
    return Cost(
        elementwise=max(ins[0].size, outs[0].size)
        * max(1, math.prod(attrs["kernel"]) // math.prod(attrs["stride"]))
    )


def _like_output(d: Type, x: Type, out: Type) -> list[Type]:
    if d.shape != out.shape:
        raise BadInput(
            "a gradient does not have the shape of the pooling's output", where=f"{d}", number=f"output {out}"
        )
    return [x]


def _max_grad_shape(attrs: Any, d: Type, index: Type) -> list[Type]:
    x = Type((*d.shape[:2], *attrs["size"]))
    out, position = _max_shape(attrs, x)
    if index != position:
        raise BadInput(
            "the saved positions are not those of this pooling",
            where=f"{index}",
            number=f"must be {position}",
        )
    return _like_output(d, x, out)


def _avg_grad_shape(attrs: Any, d: Type) -> list[Type]:
    x = Type((*d.shape[:2], *attrs["size"]))
    return _like_output(d, x, _avg_shape(attrs, x)[0])


def _max_grad(tape: Any, node: Any, d: str, _: str = "") -> list[str]:
    index = tape.keep_output(node, 1)
    return [tape.emit("max_pool_grad", d, index, size=tape.graph.shape(node.inputs[0])[2:], **node.attrs)]


def _holds_input(attrs: Any) -> bool:
    """Does every window hold an element that is not padding, whatever the input's size?"""
    sides = zip(attrs["kernel"], attrs["before"], attrs["after"], attrs["dilation"], strict=True)
    return all(d == 1 and max(b, a) < k for k, b, a, d in sides)


_MAX = (
    ((2, 3, 8, 8), dict(kernel=(2, 2), stride=(2, 2), before=(0, 0), after=(0, 0), dilation=(1, 1))),
    ((1, 2, 9, 7), dict(kernel=(3, 3), stride=(2, 2), before=(1, 1), after=(1, 1), dilation=(1, 1))),
    ((1, 2, 9, 9), dict(kernel=(3, 2), stride=(2, 1), before=(1, 0), after=(1, 1), dilation=(2, 2))),
    ((1, 1, 18, 18), dict(kernel=(17, 17), stride=(1, 1), before=(0, 0), after=(0, 0), dilation=(1, 1))),
    ((2, 3, 21), dict(kernel=(4,), stride=(4,), before=(0,), after=(3,), dilation=(1,))),
)
_AVG = (
    (
        (2, 3, 8, 8),
        dict(kernel=(2, 2), stride=(2, 2), before=(0, 0), after=(0, 0), extra=(0, 0), include_pad=1),
    ),
    (
        (1, 2, 9, 7),
        dict(kernel=(3, 3), stride=(2, 2), before=(1, 1), after=(1, 0), extra=(0, 1), include_pad=1),
    ),
    (
        (1, 2, 9, 7),
        dict(kernel=(3, 3), stride=(2, 1), before=(1, 1), after=(1, 1), extra=(0, 0), include_pad=0),
    ),
    ((2, 3, 21), dict(kernel=(5,), stride=(3,), before=(2,), after=(2,), extra=(2,), include_pad=0)),
)

ROWS = (
    Row(
        "max_pool",
        "NC~:t -> NC~:t, NC~:u8/u16?",
        "Largest of each window; the second output is its position in the window.",
        _max_pool,
        tuple(Example((s,), a, d) for s, a in _MAX for d in ({}, {0: "i8"})),
        attrs=_WINDOW,
        shape=_max_shape,
        grad=_max_grad,
        couple=by_letters,
        largest=_holds_input,
        cost=_window_cost,
        check=True,
        fast=True,
    ),
    Row(
        "max_pool_grad",
        "NC~, NC~:u8/u16 -> NC~",
        "Send each gradient to the position its maximum came from.",
        _max_pool_grad,
        tuple(
            Example(
                (_max_shape(a, Type(s))[0].shape,) * 2,
                {**a, "size": s[2:]},
                {1: f"below:{math.prod(a['kernel'])}"},
            )
            for s, a in _MAX
        ),
        attrs={**_WINDOW, "size": Attr("-")},
        check=True,
        cost=_window_cost,
        shape=_max_grad_shape,
        no_grad="second derivatives are not needed",
    ),
    Row(
        "avg_pool",
        "NC~ -> NC~",
        "Mean of each window; `extra` is padding that is never counted (ceil mode).",
        _avg_pool,
        tuple(Example((s,), a) for s, a in _AVG),
        attrs=_AVERAGE,
        shape=_avg_shape,
        cost=_window_cost,
        check=True,
        couple=by_letters,
        grad=lambda tape, node, d: [
            tape.emit("avg_pool_grad", d, size=tape.graph.shape(node.inputs[0])[2:], **node.attrs)
        ],
        fast=True,
    ),
    Row(
        "avg_pool_grad",
        "NC~ -> NC~",
        "Spread each gradient evenly over its window.",
        _avg_pool_grad,
        tuple(Example((_avg_shape(a, Type(s))[0].shape,), {**a, "size": s[2:]}) for s, a in _AVG),
        attrs={**_AVERAGE, "size": Attr("-")},
        check=True,
        cost=_window_cost,
        shape=_avg_grad_shape,
        no_grad="second derivatives are not needed",
        fast=True,
    ),
)
