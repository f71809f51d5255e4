"""What both front ends make of layers: convolutions, norms, pooling, attention, recurrence.

These take *things* like the functions of `lowering`, of which many are made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..ir import Dim
from .common import (
    LARGE,
    Builder,
    Compared,
    Ref,
    Untaken,
    concat,
    expand,
    flatten,
    like,
    pad,
    slice_axis,
    swap,
    transpose,
    unsqueeze,
    view,
)
from .lowering import (
    MAX_WINDOW,
    affine,
    along,
    binary,
    clamp,
    largest,
    matmul,
    number,
    power,
    reduce,
    softmax,
    squeeze_exactly,
    take,
    unary,
)


def spread(value: Any, rank: int) -> tuple[int, ...]:
    """One number, or one number for all, as a tuple of one a spatial dimension."""
    value = [value] if isinstance(value, int) else [int(v) for v in value]
    return tuple(value * rank if len(value) == 1 else value)


def convolution(b: Builder, x: Any, w: Any, bias: Any, **geometry: Any) -> Any:
    """A convolution; `geometry`: stride, before, after, dilation, groups."""
    rank = len(b.shape(x)) - 2
    if rank not in (1, 2):
        raise Untaken(f"a convolution over {rank} spatial dimensions; one or two are taken")
    groups = geometry.pop("groups", 1)
    return b.emit("conv", x, w, bias, **{k: spread(v, rank) for k, v in geometry.items()}, groups=int(groups))


def dropout(b: Builder, x: Any, p: float) -> Any:
    """Dropout on the counter "dropout_step", which all dropouts of a model share."""
    if not p:
        return x
    if p >= 1:
        raise Untaken("dropout of everything")
    if "dropout_step" not in b.graph.values:
        b.graph.persistent("dropout_step", np.zeros(1), "state", "i32")
    b.dropouts += 1
    return b.emit("dropout", x, Ref("dropout_step"), p=float(p), salt=b.dropouts)


def scale_shift(b: Builder, x: Any, gamma: Any, beta: Any) -> Any:
    """gamma * x + beta a channel (axis 1); either may be None."""
    ones = [1] * (len(b.shape(x)) - 2)
    for op, v in (("mul", gamma), ("add", beta)):
        if v is not None:
            x = binary(b, op, x, view(b, v, [*b.shape(v), *ones]))
    return x


def batch_norm(
    b: Builder,
    x: Any,
    gamma: Any,
    beta: Any,
    mean: Any,
    var: Any,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """Batch norm on given statistics, or in training on those of the batch."""
    channels = b.length(x, 1)
    if isinstance(mean, Ref):  # statistics that the graph itself computes
        ones = [channels, *[1] * (len(b.shape(x)) - 2)]
        x = binary(b, "sub", x, view(b, mean, ones))
        return scale_shift(
            b, binary(b, "mul", x, power(b, affine(b, view(b, var, ones), 1.0, eps), -0.5)), gamma, beta
        )
    gamma = np.ones(channels, np.float32) if gamma is None else gamma
    beta = np.zeros(channels, np.float32) if beta is None else beta
    mean, var = b.state(mean, "running_mean"), b.state(var, "running_var")
    if not training:
        return b.emit("batch_norm", x, gamma, beta, mean, var, eps=eps)
    if momentum is None:
        raise Untaken("batch norm with a cumulative average")
    return b.emit("batch_norm_train", x, gamma, beta, mean, var, eps=eps, momentum=momentum)


def normalize(b: Builder, x: Any, shape: Sequence[int], gamma: Any, beta: Any, eps: float) -> Any:
    """Layer norm over the last `len(shape)` axes."""
    n, whole = len(shape), b.shape(x)
    if n > 1:
        x = flatten(b, x, -n, -1)
        gamma, beta = (v if v is None else view(b, v, [math.prod(shape)]) for v in (gamma, beta))
    return view(b, b.emit("layer_norm", x, gamma, beta, eps=eps), whole)


def group_norm(b: Builder, x: Any, groups: int, gamma: Any, beta: Any, eps: float) -> Any:
    """Group norm of (N, C, ...); as many groups as channels make it instance norm."""
    shape = b.shape(x)
    y = view(b, x, [shape[0], groups, math.prod(shape[1:]) // groups])
    return scale_shift(b, view(b, b.emit("layer_norm", y, eps=eps), shape), gamma, beta)


def batch_only_norm(b: Builder, x: Any, gamma: Any, beta: Any, eps: float) -> Any:
    """Batch norm that keeps no statistics: each channel over the batch, also at prediction."""
    perm = [1, 0, *range(2, len(b.shape(x)))]
    y = transpose(b, x, perm)
    flat = flatten(b, y, 1, -1) if len(perm) > 2 else y
    y = view(b, b.emit("layer_norm", flat, eps=eps), b.shape(y))
    return scale_shift(b, transpose(b, y, perm), gamma, beta)


def _pool(b: Builder, x: Any, attrs: Any, ceil: bool, dilation: Sequence[int]) -> tuple[int, ...]:
    """How far windows reach past the padded end, one number a spatial dimension; 0 unless sizes are rounded up."""
    extra = []
    for n, k, s, p, q, d in zip(
        b.shape(x)[2:], *(attrs[a] for a in ("kernel", "stride", "before", "after")), dilation, strict=True
    ):
        reach = d * (k - 1) + 1
        count = -(-(n + p + q - reach) // s) + 1
        count -= (count - 1) * s >= n + p
        extra.append(max(0, (count - 1) * s + reach - n - p - q) if ceil else 0)
    return tuple(extra)


def pool(
    b: Builder,
    op: str,
    x: Any,
    kernel: Any,
    stride: Any,
    before: Any,
    after: Any = None,
    ceil: bool = False,
    dilation: Any = 1,
    include_pad: bool = True,
) -> Any:
    """max_pool or avg_pool; an empty stride is the kernel."""
    rank = len(b.shape(x)) - 2
    if rank not in (1, 2):
        raise Untaken(
            f"pooling over {rank} spatial dimensions; one or two are taken, after batch and channels"
        )
    attrs = {"kernel": spread(kernel, rank), "before": spread(before, rank)}
    attrs["stride"] = spread(stride, rank) if stride not in (None, [], ()) else attrs["kernel"]
    attrs["after"] = attrs["before"] if after is None else spread(after, rank)
    dilation = spread(dilation, rank)
    extra = _pool(b, x, attrs, ceil, dilation)
    if (
        op == "max_pool"
        and math.prod(attrs["kernel"]) > MAX_WINDOW
        and attrs["kernel"] == tuple(b.shape(x)[2:])
        and not any((*attrs["before"], *attrs["after"]))
    ):
        return largest(b, x, range(-rank, 0), True)
    if op == "max_pool":
        attrs["after"] = tuple(a + e for a, e in zip(attrs["after"], extra, strict=True))
        return b.emit(op, x, **attrs, dilation=dilation)
    return b.emit(op, x, **attrs, extra=extra, include_pad=int(include_pad))


def adaptive_pool(b: Builder, op: str, x: Any, sizes: Sequence[int | None]) -> Any:
    """avg_pool or max_pool to given output sizes; averages whose windows differ are matrices."""
    rank = len(sizes)
    shape = b.shape(x)
    goal = [s if g is None else int(g) for g, s in zip(sizes, shape[-rank:], strict=True)]
    if op == "avg_pool" and goal == [1] * rank:
        return reduce(b, "mean", x, range(-rank, 0), True)
    if not any(s % g for s, g in zip(shape[-rank:], goal, strict=True)):
        kernel = [s // g for s, g in zip(shape[-rank:], goal, strict=True)]
        return x if kernel == [1] * rank else pool(b, op, x, kernel, kernel, 0)
    for axis, g in zip(range(len(shape) - rank, len(shape)), goal, strict=True):
        n = b.length(x, axis)
        if (
            op == "max_pool" and g != n
        ):  # windows of one length, the shorter ones with their last row repeated
            ends = [(i * n // g, -(-(i + 1) * n // g)) for i in range(g)]
            longest = max(end - start for start, end in ends)
            y = take(b, x, axis, [min(start + k, end - 1) for start, end in ends for k in range(longest)])
            y = view(b, y, [*b.shape(y)[:axis], g, longest, *b.shape(y)[axis + 1 :]])
            x = largest(b, y, [axis + 1], False)
            continue
        rows = [(np.arange(n) >= i * n // g) & (np.arange(n) < -(-(i + 1) * n // g)) for i in range(g)]
        x = along(b, x, axis, np.array([r / r.sum() for r in rows])) if g != n else x
    return x


def upsample_nearest(b: Builder, x: Any, sizes: Sequence[int]) -> Any:
    """Repeat each element along the spatial axes, to sizes that are multiples of the present ones."""
    shape = list(b.shape(x))
    times = [int(g) // int(s) for g, s in zip(sizes, shape[2:], strict=True)]
    apart, wide = shape[:2], shape[:2]
    for s, t in zip(shape[2:], times, strict=True):
        apart, wide = [*apart, s, 1], [*wide, s, t]
    return view(b, expand(b, view(b, x, apart), wide), [*shape[:2], *sizes])


def resample(b: Builder, x: Any, matrices: Sequence[np.ndarray]) -> Any:
    """Interpolation of the spatial axes, a matrix (out, in) an axis; by repeating or picking where that is all."""
    shape = b.shape(x)[2:]
    picked = [
        m.argmax(1) if ((m == 1).sum(1) == 1).all() and ((m != 0).sum(1) == 1).all() else None
        for m in matrices
    ]
    repeats = [
        p is not None and len(p) % n == 0 and np.array_equal(p, np.repeat(np.arange(n), len(p) // n))
        for p, n in zip(picked, shape, strict=True)
    ]
    if all(repeats):
        return upsample_nearest(b, x, [len(m) for m in matrices])
    for axis, (matrix, index) in enumerate(zip(matrices, picked, strict=True), 2):
        x = along(b, x, axis, matrix) if index is None else take(b, x, axis, index)
    return x


def unshuffle(b: Builder, x: Any, r: int) -> Any:
    """(N, C, H r, W r) to (N, C r r, H, W)."""
    n, c, h, w = b.shape(x)
    y = transpose(b, view(b, x, [n, c, h // r, r, w // r, r]), [0, 1, 3, 5, 2, 4])
    return view(b, y, [n, c * r * r, h // r, w // r])


def channel_shuffle(b: Builder, x: Any, groups: int) -> Any:
    """Channels of g groups, taken one of each in turn."""
    shape = b.shape(x)
    y = view(b, x, [shape[0], groups, shape[1] // groups, *shape[2:]])
    return view(b, swap(b, y, 1, 2), shape)


def embedding(b: Builder, table: Any, index: Any, padding: int = -1) -> Any:
    """Rows of a table at constant indices, or at those that the data holds; `padding`: a row that does not learn."""
    if not isinstance(index, Ref):
        if padding >= 0 and isinstance(table, Ref) and (np.asarray(index) == padding).any():
            fixed = b.emit("detach", take(b, table, 0, [padding]))
            n = b.length(table, 0)
            table = concat(
                b,
                [
                    t
                    for t in (
                        slice_axis(b, table, 0, 0, padding) if padding else None,
                        fixed,
                        slice_axis(b, table, 0, padding + 1, None) if padding + 1 < n else None,
                    )
                    if t is not None
                ],
                0,
            )
        return take(b, table, 0, index)
    return b.emit("embedding", table, index, padding=int(padding))


def detach(b: Builder, x: Any) -> Any:
    """x, which no gradient passes."""
    return b.emit("detach", x) if isinstance(x, Ref) else x


def convolution_transposed(
    b: Builder,
    x: Any,
    w: Any,
    bias: Any,
    *,
    stride: Any,
    before: Any,
    after: Any,
    extra: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """A transposed convolution: the input gradient of the convolution with the same weight (in, out / groups, ...).

    before, after: what is cut off the output; extra: what its end is longer by.
    """
    rank = len(b.shape(x)) - 2
    if rank not in (1, 2):
        raise Untaken(f"a transposed convolution over {rank} spatial dimensions; one or two are taken")
    stride, dilation, before, after, extra = (
        spread(v, rank) for v in (stride, dilation, before, after, extra)
    )
    kernel = [int(k) for k in b.shape(w)[2:]]
    span = [
        (n - 1) * s + d * (k - 1) + 1
        for n, s, d, k in zip(b.shape(x)[2:], stride, dilation, kernel, strict=True)
    ]
    cut = [a - e for a, e in zip(after, extra, strict=True)]
    inside = min(*before, *cut, 0) >= 0  # else nothing is cut by the op, and the result is padded
    size = [n - p - q if inside else n for n, p, q in zip(span, before, cut, strict=True)]
    if min(size) < 1:
        raise Untaken(f"a transposed convolution whose output is empty: {tuple(size)}")
    y = b.emit(
        "conv_input_grad",
        x,
        w,
        size=tuple(size),
        stride=stride,
        before=before if inside else (0,) * rank,
        after=tuple(cut) if inside else (0,) * rank,
        dilation=dilation,
        groups=int(groups),
    )
    if not inside:
        y = pad(b, y, [0, 0, *(-p for p in before)], [0, 0, *(-q for q in cut)])
    return scale_shift(b, y, None, bias)


def pixel_shuffle(b: Builder, x: Any, r: int) -> Any:
    """(N, C r r, H, W) to (N, C, H r, W r)."""
    n, c, h, w = b.shape(x)
    y = transpose(b, view(b, x, [n, c // (r * r), r, r, h, w]), [0, 1, 4, 2, 5, 3])
    return view(b, y, [n, c // (r * r), h * r, w * r])


def softplus(b: Builder, x: Any, beta: float = 1.0) -> Any:
    """log(1 + exp(beta x)) / beta."""
    return affine(b, unary(b, "softplus", affine(b, x, beta)), 1 / beta)


def larger(b: Builder, x: Any, y: Any, sign: float = 1.0) -> Any:
    """The larger of two tensors, element by element; the smaller with sign -1."""
    for a, c in ((x, number(y)), (y, number(x))):
        if c is not None:
            return clamp(b, a, c, None) if sign > 0 else clamp(b, a, None, c)
    return binary(b, "add", x, affine(b, unary(b, "relu", affine(b, binary(b, "sub", y, x), sign)), sign))


def attention(
    b: Builder,
    q: Any,
    k: Any,
    v: Any,
    bias: Any,
    causal: bool,
    dropout_p: float,
    scale: float | None,
) -> Any:
    """Scaled dot-product attention over (..., L, D): softmax(q k' scale + bias) v. A boolean bias says what to keep.

    With fewer heads (axis -3) in k and v than in q, each serves as many heads of q as follow each other.
    """
    if len(b.shape(q)) > 2 and b.shape(k)[-3] != b.shape(q)[-3] and b.shape(k)[-3] != 1:
        heads = np.repeat(np.arange(b.length(k, -3)), b.length(q, -3) // b.length(k, -3))
        k, v = take(b, k, -3, heads), take(b, v, -3, heads)
    scores = matmul(b, affine(b, q, b.shape(q)[-1] ** -0.5 if scale is None else scale), swap(b, k, -1, -2))
    kept = np.tril(np.ones((b.length(q, -2), b.length(k, -2)), np.bool_)) if causal else None
    if isinstance(bias, Compared) or (isinstance(bias, Ref) and bias in b.truths):
        bias = affine(b, bias, LARGE, -LARGE)
    elif bias is not None and not isinstance(bias, Ref) and np.asarray(bias).dtype == np.bool_:
        kept, bias = np.asarray(bias) if kept is None else np.asarray(bias) & kept, None
    if kept is not None:
        if not kept.any(-1).all():
            raise Untaken("a row of the attention mask that keeps nothing")
        mask_bias = np.where(kept, 0.0, -LARGE).astype(np.float32)
        bias = mask_bias if bias is None else binary(b, "add", bias, mask_bias)
    if bias is not None:
        scores = binary(b, "add", scores, bias)
    return matmul(b, dropout(b, softmax(b, scores, -1), dropout_p), v)


# -- recurrent layers --------------------------------------------------------------------------------------------------


def _is_zero(b: Builder, x: Any) -> bool:
    """Whether a thing is known to hold zeros only, also once expanded to the batch."""
    if x is None or not isinstance(x, Ref):
        return x is None or not np.any(np.asarray(x))
    for op in ("reshape", "slice", "transpose", "expand"):
        before = b.producer(x, op)
        if before is not None:
            return _is_zero(b, Ref(before.inputs[0]))
    data = b.graph.values[x].data
    return b.graph.values[x].kind == "constant" and not np.any(data)


def recurrent(
    b: Builder, cell: str, x: Any, weights: Sequence[Any], states: Sequence[Any], reverse: bool, **attrs: Any
) -> tuple[Any, tuple[Any, ...]]:
    """One layer in one direction: outputs (N, T, H) and the last states, each (N, H).

    x (N, T, F); weights: of the input, of the hidden state, and their biases (or None); states (N, H), None for zero.
    """
    gates, size = b.shape(weights[1])
    if b.shape(weights[0])[0] != gates:
        raise Untaken("a projection of the hidden state (proj_size)")
    rows = [s for s in b.shape(x)[:1] if isinstance(s, Dim)]
    starts = [
        None
        if _is_zero(b, s)
        else like(b, s, 0, rows[0])
        if rows and not isinstance(b.shape(s)[0], Dim)
        else s
        for s in states
    ]
    keep = (3,) if cell == "lstm" else (2,)
    y = b.emit(cell, x, *weights, *starts, reverse=int(reverse), unused=keep, **attrs)
    c_last = b.graph.nodes[-1].outputs[2]
    end = 0 if reverse else b.length(x, 1) - 1
    last = squeeze_exactly(b, slice_axis(b, y, 1, end, end + 1), 1)
    return y, (last, Ref(c_last)) if cell == "lstm" else (last,)


def stacked_recurrent(
    b: Builder,
    cell: str,
    x: Any,
    weights: Sequence[Sequence[Any]],
    states: Sequence[Any],
    layers: int,
    both: bool,
    p: float,
    **attrs: Any,
) -> tuple[Any, ...]:
    """Layers over (N, T, F), as torch stacks them: outputs, and the last states (layers * directions, N, H).

    weights: one list a layer and direction; states (layers * directions, N, H) each. Dropout lies between layers.
    """
    directions = 2 if both else 1
    last = []
    for layer in range(layers):
        sides = []
        for side in range(directions):
            i = layer * directions + side
            starts = [
                None if _is_zero(b, s) else squeeze_exactly(b, slice_axis(b, s, 0, i, i + 1), 0)
                for s in states
            ]
            y, ends = recurrent(b, cell, x, weights[i], starts, bool(side), **attrs)
            sides.append(y)
            last.append(ends)
        x = concat(b, sides, 2) if both else sides[0]
        if layer + 1 < layers:
            x = dropout(b, x, p)
    return x, *(concat(b, [unsqueeze(b, s, [0]) for s in kind], 0) for kind in zip(*last, strict=True))
