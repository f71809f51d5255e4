"""The table of ATen operators that are taken.

Each is taken by one small function of `TABLE`, `(b, a)`: `a` holds the operator's arguments under the names of its
schema, and its first one also as `a.x`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..ir import Dim
from . import common as c
from . import lowering as f
from .common import LOST, Builder, Ref, Untaken


def _same(kernel: Any, dilation: Any) -> tuple[list[int], list[int]]:
    """Padding before and after that keeps the size; the odd one goes to the end."""
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return [t // 2 for t in total], [t - t // 2 for t in total]


def _conv(b: Builder, a: Any) -> Any:
    kernel = b.shape(a.weight)[2:]
    if getattr(a, "transposed", False):
        raise Untaken("a transposed convolution")
    dilation, padding = f.spread(a.dilation, len(kernel)), a.padding
    if isinstance(padding, str):
        before, after = _same(kernel, dilation) if padding == "same" else ([0], [0])
    else:
        before = after = padding
    return f.convolution(
        b,
        a.x,
        a.weight,
        a.bias,
        stride=a.stride,
        before=before,
        after=after,
        dilation=dilation,
        groups=a.groups,
    )


def _addmm(b: Builder, a: Any) -> Any:
    x, w = (a.mat1, a.mat2) if hasattr(a, "mat1") else (a.batch1, a.batch2)
    if a.alpha == 1 and a.beta == 1 and len(b.shape(a.x)) == 1 and len(b.shape(x)) == 2:
        return f.linear(b, x, w, a.x, tb=0)
    product = f.affine(b, f.matmul(b, x, w), a.alpha)
    return product if a.beta == 0 else f.binary(b, "add", product, f.affine(b, a.x, a.beta))


def _add(op: str) -> Callable[..., Any]:
    def rule(b: Builder, a: Any) -> Any:
        other = a.other if a.alpha == 1 else f.binary(b, "mul", a.other, a.alpha)
        return f.binary(b, op, a.x, other)

    return rule


def _rsub(b: Builder, a: Any) -> Any:
    return f.binary(b, "sub", a.other, a.x if a.alpha == 1 else f.affine(b, a.x, a.alpha))


def _div(b: Builder, a: Any) -> Any:
    if getattr(a, "rounding_mode", None):
        raise Untaken("a division that rounds")
    return f.binary(b, "div", a.x, a.other)


def _pow(b: Builder, a: Any) -> Any:
    return f.power(b, a.x, a.exponent)


def _batch_norm(b: Builder, a: Any) -> Any:
    mean, var = getattr(a, "running_mean", None), getattr(a, "running_var", None)
    if mean is None:
        return (f.batch_only_norm(b, a.x, a.weight, a.bias, a.eps), None, None)
    training = getattr(a, "training", False)
    y = f.batch_norm(b, a.x, a.weight, a.bias, mean, var, training, a.momentum, a.eps)
    return (y, None, None, None, None)


def _instance_norm(b: Builder, a: Any) -> Any:
    if a.use_input_stats:
        if a.running_mean is not None:
            raise Untaken("instance norm that tracks statistics while it trains")
        return f.group_norm(b, a.x, b.length(a.x, 1), a.weight, a.bias, a.eps)
    return f.batch_norm(b, a.x, a.weight, a.bias, a.running_mean, a.running_var, False, 0.0, a.eps)


def _rms_norm(b: Builder, a: Any) -> Any:
    axes = range(-len(a.normalized_shape), 0)
    eps = a.eps if a.eps is not None else float(np.finfo(np.float32).eps)
    power = f.reduce(b, "mean", f.unary(b, "square", a.x), axes, True)
    y = f.binary(b, "mul", a.x, f.power(b, f.affine(b, power, 1.0, eps), -0.5))
    return y if a.weight is None else f.binary(b, "mul", y, a.weight)


def _native_dropout(b: Builder, a: Any) -> Any:
    return (f.dropout(b, a.x, a.p if a.train in (None, True) else 0.0), None)


def _bernoulli(b: Builder, a: Any) -> Any:
    """The mask of dropout of whole channels: ones that are dropped, scaled back."""
    ones = _filled(b, 1.0, b.shape(a.x))
    return f.affine(b, f.dropout(b, b.value(ones), 1 - a.p), a.p)


def _filled(b: Builder, value: float, shape: Any) -> Any:
    """A constant of one value; its axes that are the batch are expanded."""
    small = np.full([1 if isinstance(s, Dim) else int(s) for s in shape], value, np.float32)
    return c.expand(b, small, shape) if any(isinstance(s, Dim) for s in shape) else small


def _creation(value: float | None, argument: str = "size") -> Callable[..., Any]:
    def rule(b: Builder, a: Any) -> Any:
        shape = b.shape(a.x) if argument == "like" else getattr(a, argument)
        fill = f.number(a.fill_value) if value is None else value
        if fill is None:
            raise Untaken("a tensor filled with a value that depends on the data")
        return _filled(b, fill, shape)

    return rule


def _max_pool(rank: int, tuple_: bool = False) -> Callable[..., Any]:
    def rule(b: Builder, a: Any) -> Any:
        y = f.pool(
            b,
            "max_pool",
            a.x,
            f.spread(a.kernel_size, rank),
            a.stride,
            a.padding,
            ceil=a.ceil_mode,
            dilation=a.dilation,
        )
        return (y, LOST) if tuple_ else y

    return rule


def _avg_pool(b: Builder, a: Any) -> Any:
    if getattr(a, "divisor_override", None) is not None:
        raise Untaken("average pooling with divisor_override")
    return f.pool(
        b,
        "avg_pool",
        a.x,
        a.kernel_size,
        a.stride,
        a.padding,
        ceil=a.ceil_mode,
        include_pad=a.count_include_pad,
    )


def _pad(b: Builder, a: Any) -> Any:
    rank, mode = len(b.shape(a.x)), getattr(a, "mode", "constant")
    before, after = [0] * rank, [0] * rank
    for i in range(len(a.pad) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = a.pad[2 * i], a.pad[2 * i + 1]
    if mode == "constant":
        return c.pad(b, a.x, before, after, float(a.value or 0))
    x = a.x
    for axis in range(rank):
        x = f.pad_by_copies(b, x, axis, before[axis], after[axis], mode) if before[axis] or after[axis] else x
    return x


def _index(b: Builder, a: Any) -> Any:
    given = [(axis, i) for axis, i in enumerate(a.indices) if i is not None]
    if len(given) != 1 or isinstance(given[0][1], Ref):
        raise Untaken("indexing by several tensors, or by one that depends on the data")
    axis, index = given[0]
    if np.asarray(index).dtype == np.bool_:
        index = np.flatnonzero(index) if np.ndim(index) == 1 else None
    if index is None:
        raise Untaken("indexing by a mask of several dimensions")
    return f.take(b, a.x, axis, index)


def _constant_index(b: Builder, a: Any) -> Any:
    if isinstance(a.index, Ref):
        raise Untaken("an index that depends on the data")
    return f.take(b, a.x, a.dim, np.asarray(a.index).reshape(-1))


def _embedding(b: Builder, a: Any) -> Any:
    if isinstance(a.indices, (Ref, Dim)):
        raise Untaken("an embedding of the input")
    return f.take(b, a.weight, 0, a.indices)


def _scatter(b: Builder, a: Any, start: int, end: int, step: int, source: Any) -> Any:
    """x with a part along one axis replaced."""
    shape = b.shape(a.x)
    axis = a.dim % len(shape)
    if isinstance(shape[axis], Dim) and not start and (end is None or end >= shape[axis]):
        return c.expand(b, source, shape)
    at = range(*slice(start, end, step).indices(b.length(a.x, axis)))
    if len(at) == shape[axis]:
        return c.expand(b, source, shape)
    if step != 1:
        raise Untaken("a write to every n-th element")
    parts = [
        c.slice_axis(b, a.x, axis, 0, at.start) if at.start else None,
        source,
        c.slice_axis(b, a.x, axis, at.stop, None) if at.stop < shape[axis] else None,
    ]
    return c.concat(b, [p for p in parts if p is not None], axis)


def _select_scatter(b: Builder, a: Any) -> Any:
    size = b.length(a.x, a.dim)
    source = c.unsqueeze(b, a.src, [a.dim % len(b.shape(a.x))])
    return _scatter(b, a, a.index % size, a.index % size + 1, 1, source)


def _slice_scatter(b: Builder, a: Any) -> Any:
    return _scatter(b, a, a.start, a.end, a.step, a.src)


def _split(b: Builder, a: Any) -> Any:
    size = b.length(a.x, a.dim)
    step = a.split_size
    return c.split(b, a.x, a.dim, [min(step, size - i) for i in range(0, size, step)])


def _chunk(b: Builder, a: Any) -> Any:
    a.split_size = -(-b.length(a.x, a.dim) // a.chunks)
    return _split(b, a)


def _unbind(b: Builder, a: Any) -> Any:
    return tuple(c.select(b, a.x, a.dim, i) for i in range(b.length(a.x, a.dim)))


def _flip(b: Builder, a: Any) -> Any:
    x = a.x
    for axis in a.dims:
        x = f.take(b, x, axis, np.arange(b.length(x, axis))[::-1])
    return x


def _roll(b: Builder, a: Any) -> Any:
    x = a.x
    if not a.dims:
        raise Untaken("a roll of the flattened tensor")
    for shift, axis in zip(a.shifts, a.dims, strict=True):
        x = f.take(b, x, axis, np.roll(np.arange(b.length(x, axis)), shift))
    return x


def _cumsum(b: Builder, a: Any) -> Any:
    n = b.length(a.x, a.dim)
    return f.along(b, a.x, a.dim, np.tril(np.ones((n, n))))


def _attention(b: Builder, a: Any) -> Any:
    if getattr(a, "enable_gqa", False):
        raise Untaken("attention with fewer heads for keys than for queries")
    return f.attention(b, a.query, a.key, a.value, a.attn_mask, a.is_causal, a.dropout_p, a.scale)


def _upsample_nearest(b: Builder, a: Any) -> Any:
    shape = b.shape(a.x)[2:]
    sizes = a.output_size or [int(s * f) for s, f in zip(shape, a.scale_factors, strict=True)]
    return f.upsample_nearest(b, a.x, sizes)


def _interpolate(mode: str) -> Callable[..., Any]:
    """Linear or cubic interpolation is one constant matrix a spatial dimension."""

    def rule(b: Builder, a: Any) -> Any:
        import torch

        x, shape = a.x, b.shape(a.x)
        for i, axis in enumerate(range(2, len(shape))):
            n = b.length(x, axis)
            eye = torch.eye(n).reshape(n, 1, n, 1) if mode == "bicubic" else torch.eye(n).reshape(n, 1, n)
            how = {"size": a.output_size[i]} if a.output_size else {"scale_factor": a.scale_factors[i]}
            if mode == "bicubic":
                how = {k: (v, 1) for k, v in how.items()}
            matrix = torch.nn.functional.interpolate(eye, **how, mode=mode, align_corners=a.align_corners)
            x = f.along(b, x, axis, matrix.reshape(n, -1).T.numpy())
        return x

    return rule


def _weight_norm(b: Builder, a: Any) -> Any:
    v, g = a.x, a.g
    axes = [i for i in range(len(b.shape(v))) if i != a.dim] if a.dim != -1 else None
    length = f.power(b, f.reduce(b, "sum", f.unary(b, "square", v), axes, True), 0.5)
    return f.binary(b, "mul", v, f.binary(b, "div", g, length))


def _norm(b: Builder, a: Any) -> Any:
    order = f.number(getattr(a, "ord", getattr(a, "p", 2)))
    order = 2.0 if order is None else order
    axes, keep = getattr(a, "dim", None), getattr(a, "keepdim", False)
    if order == 1:
        return f.reduce(b, "sum", f.unary(b, "abs", a.x), axes, keep)
    if order == math.inf:
        return f.largest(b, f.unary(b, "abs", a.x), axes, keep)
    if order != 2:
        raise Untaken(f"a norm of order {order}")
    return f.unary(b, "sqrt", f.reduce(b, "sum", f.unary(b, "square", a.x), axes, keep))


def _reduce(op: str) -> Callable[..., Any]:
    def rule(b: Builder, a: Any) -> Any:
        dim = getattr(a, "dim", None)
        return f.reduce(
            b, op, a.x, [dim] if isinstance(dim, int) else dim, bool(getattr(a, "keepdim", False))
        )

    return rule


def _variance(root: bool) -> Callable[..., Any]:
    def rule(b: Builder, a: Any) -> Any:
        unbiased = getattr(a, "unbiased", True)
        correction = getattr(a, "correction", None)
        correction = float(unbiased) if correction is None else float(correction)
        y = f.variance(b, a.x, getattr(a, "dim", None), correction, bool(getattr(a, "keepdim", False)))
        return f.unary(b, "sqrt", y) if root else y

    return rule


def _extreme(sign: float) -> Callable[..., Any]:
    """max or min, over axes or between two tensors."""

    def rule(b: Builder, a: Any) -> Any:
        if hasattr(a, "other"):
            return f.larger(b, a.x, a.other, sign)
        dim = getattr(a, "dim", None)
        axes = [dim] if isinstance(dim, int) else dim
        y = f.affine(b, f.largest(b, f.affine(b, a.x, sign), axes, bool(getattr(a, "keepdim", False))), sign)
        return (y, LOST) if isinstance(dim, int) and not hasattr(a, "amax") else y

    return rule


def _amax(sign: float) -> Callable[..., Any]:
    return lambda b, a: f.affine(b, f.largest(b, f.affine(b, a.x, sign), a.dim, a.keepdim), sign)


def _log_sum_exp(b: Builder, a: Any) -> Any:
    axes = [a.dim] if isinstance(a.dim, int) else a.dim
    if len(axes) != 1:
        raise Untaken("logsumexp over several axes")
    rest = f.binary(b, "sub", a.x, f.softmax(b, a.x, axes[0], log=True))  # the same along the axis
    y = c.slice_axis(b, rest, axes[0], 0, 1)
    return y if a.keepdim else c.squeeze(b, y, axes)


def _glu(b: Builder, a: Any) -> Any:
    half = b.length(a.x, a.dim) // 2
    x, gate = c.split(b, a.x, a.dim, [half, half])
    return f.binary(b, "mul", x, f.unary(b, "sigmoid", gate))


def _elu(b: Builder, a: Any) -> Any:
    alpha, scale = float(a.alpha), float(getattr(a, "scale", 1.0))
    if float(getattr(a, "input_scale", 1.0)) != 1:
        raise Untaken("elu with input_scale")
    return f.affine(b, f.unary(b, "elu", a.x, alpha=alpha), scale)


def _celu(b: Builder, a: Any) -> Any:
    return f.affine(b, f.unary(b, "elu", f.affine(b, a.x, 1 / a.alpha), alpha=1.0), a.alpha)


def _selu(b: Builder, a: Any) -> Any:
    return f.affine(b, f.unary(b, "elu", a.x, alpha=1.6732632423543772), 1.0507009873554805)


def _leaky_relu(b: Builder, a: Any) -> Any:
    if a.negative_slope < 0:
        raise Untaken(f"a leaky relu of negative slope {a.negative_slope}")
    return f.unary(b, "leaky_relu", a.x, slope=float(a.negative_slope))


def _rrelu(b: Builder, a: Any) -> Any:
    if getattr(a, "training", False):
        raise Untaken("rrelu draws random slopes")
    return f.unary(b, "leaky_relu", a.x, slope=(a.lower + a.upper) / 2)


def _softplus(b: Builder, a: Any) -> Any:
    return f.softplus(b, a.x, float(a.beta))


def _threshold(b: Builder, a: Any) -> Any:
    if a.threshold != a.value:
        raise Untaken("a threshold that jumps")
    return f.clamp(b, a.x, a.threshold, None)


def _clamp(b: Builder, a: Any) -> Any:
    low, high = getattr(a, "min", None), getattr(a, "max", None)
    bounds = [None if v is None else f.number(v) for v in (low, high)]
    if any(v is None and w is not None for v, w in zip(bounds, (low, high), strict=True)):
        x = a.x if low is None else f.larger(b, a.x, low)
        return x if high is None else f.larger(b, x, high, -1.0)
    return f.clamp(b, a.x, *bounds)


def _cast(b: Builder, a: Any) -> Any:
    import torch

    dtype = getattr(a, "dtype", None)
    if isinstance(dtype, torch.dtype) and not dtype.is_floating_point and isinstance(a.x, Ref):
        raise Untaken(f"a conversion of the data to {dtype}")
    return a.x


def _masked_fill(b: Builder, a: Any) -> Any:
    return f.where(b, a.mask, a.value, a.x)


def _where_self(b: Builder, a: Any) -> Any:
    return f.where(b, a.condition, a.x if a.x is not a.condition else a.self, a.other)


def _outer(b: Builder, a: Any) -> Any:
    other = a.vec2 if hasattr(a, "vec2") else a.other
    return f.binary(b, "mul", c.unsqueeze(b, a.x, [1]), c.unsqueeze(b, other, [0]))


def _add_product(op: str) -> Callable[..., Any]:
    def rule(b: Builder, a: Any) -> Any:
        return f.binary(b, "add", a.x, f.affine(b, f.binary(b, op, a.tensor1, a.tensor2), float(a.value)))

    return rule


def _lerp(b: Builder, a: Any) -> Any:
    return f.binary(b, "add", a.x, f.binary(b, "mul", f.binary(b, "sub", a.end, a.x), a.weight))


def _expand_as(b: Builder, a: Any) -> Any:
    return c.expand(b, a.x, b.shape(a.other))


def _same_shape(b: Builder, a: Any) -> Any:
    return c.reshape(b, a.x, b.shape(a.other))


def _size(b: Builder, a: Any) -> Any:
    return b.shape(a.x)[a.dim] if hasattr(a, "dim") else list(b.shape(a.x))


def _fill(b: Builder, a: Any) -> Any:
    value = f.number(a.value)
    if value is None:
        raise Untaken("a fill with a value that depends on the data")
    return _filled(b, value, b.shape(a.x))


def _squeeze(b: Builder, a: Any) -> Any:
    dim = getattr(a, "dim", None)
    return c.squeeze(b, a.x, [dim] if isinstance(dim, int) else dim)


def _unfold(b: Builder, a: Any) -> Any:
    """Patches as columns: a convolution whose weight is the identity."""
    n, channels = b.shape(a.x)[:2]
    area = math.prod(a.kernel_size)
    eye = np.tile(np.eye(area, dtype=np.float32).reshape(area, 1, *a.kernel_size), (int(channels), 1, 1, 1))
    y = f.convolution(
        b,
        a.x,
        eye,
        None,
        stride=a.stride,
        before=a.padding,
        after=a.padding,
        dilation=a.dilation,
        groups=channels,
    )
    return c.flatten(b, y, 2, 3)


def _detach(b: Builder, a: Any) -> Any:
    if a.x in b.learned:
        raise Untaken("a gradient is stopped in the middle of what learns")
    return a.x


def _simple(op: str) -> Callable[..., Any]:
    return lambda b, a: f.unary(b, op, a.x)


def _nothing(b: Builder, a: Any) -> Any:
    return a.x


def _recurrent(cell: str, **attrs: int) -> Callable[..., Any]:
    """nn.LSTM, nn.GRU and nn.RNN: outputs and the last states."""

    def rule(b: Builder, a: Any) -> Any:
        if hasattr(a, "batch_sizes"):
            raise Untaken("sequences of different lengths, packed")
        each, count = 4 if a.has_biases else 2, a.num_layers * (2 if a.bidirectional else 1)
        if len(a.params) != each * count:
            raise Untaken("a projection of the hidden state (proj_size)")
        if len(b.shape(a.x)) != 3:
            raise Untaken("a recurrent layer on one sequence without a batch")
        weights = [a.params[i * each : (i + 1) * each] + [None] * (4 - each) for i in range(count)]
        x = a.x if a.batch_first else c.swap(b, a.x, 0, 1)
        p = a.dropout if a.train else 0.0
        states = a.hx if isinstance(a.hx, (list, tuple)) else [a.hx]
        y, *last = f.stacked_recurrent(b, cell, x, weights, states, a.num_layers, a.bidirectional, p, **attrs)
        return (y if a.batch_first else c.swap(b, y, 0, 1), *last)

    return rule


def _recurrent_cell(cell: str, **attrs: int) -> Callable[..., Any]:
    """nn.LSTMCell and its kin: a sequence of one step."""

    def rule(b: Builder, a: Any) -> Any:
        states = a.hx if isinstance(a.hx, (list, tuple)) else [a.hx]
        weights = [a.w_ih, a.w_hh, a.b_ih, a.b_hh]
        _, last = f.recurrent(b, cell, c.unsqueeze(b, a.x, [1]), weights, states, False, **attrs)
        return last if cell == "lstm" else last[0]

    return rule


RANDOM = {
    "bernoulli",
    "rand",
    "randn",
    "randint",
    "rand_like",
    "randn_like",
    "normal",
    "normal_functional",
    "uniform",
    "native_dropout",
    "dropout",
    "randperm",
    "multinomial",
    "rrelu_with_noise_functional",
    "alpha_dropout",
    "feature_alpha_dropout",
    "exponential",
}

TABLE: dict[str, Callable[[Builder, Any], Any]] = {
    # layers
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "_convolution"), _conv),
    "linear": lambda b, a: f.linear(b, a.x, a.weight, a.bias),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm"), _addmm),
    "addmv": lambda b, a: f.binary(
        b, "add", f.affine(b, f.matmul(b, a.mat, a.vec), a.alpha), f.affine(b, a.x, a.beta)
    ),
    **dict.fromkeys(("mm", "bmm"), lambda b, a: f.matmul(b, a.x, a.mat2)),
    **dict.fromkeys(("matmul", "__matmul__"), lambda b, a: f.matmul(b, a.x, a.other)),
    "mv": lambda b, a: f.matmul(b, a.x, a.vec),
    **dict.fromkeys(
        ("dot", "vdot"), lambda b, a: f.matmul(b, a.x, a.tensor if hasattr(a, "tensor") else a.other)
    ),
    **dict.fromkeys(("outer", "ger"), _outer),
    "einsum": lambda b, a: f.einsum(b, a.equation, a.tensors),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(
        (
            "_native_batch_norm_legit",
            "_native_batch_norm_legit_functional",
            "native_batch_norm",
            "_native_batch_norm_legit_no_training",
            "cudnn_batch_norm",
            "_batch_norm_with_update_functional",
            "_batch_norm_no_update",
        ),
        _batch_norm,
    ),
    "batch_norm": lambda b, a: _batch_norm(b, a)[0],
    "layer_norm": lambda b, a: f.normalize(b, a.x, a.normalized_shape, a.weight, a.bias, a.eps),
    "native_layer_norm": lambda b, a: (
        f.normalize(b, a.x, a.normalized_shape, a.weight, a.bias, a.eps),
        None,
        None,
    ),
    "group_norm": lambda b, a: f.group_norm(b, a.x, a.num_groups, a.weight, a.bias, a.eps),
    "native_group_norm": lambda b, a: (f.group_norm(b, a.x, a.group, a.weight, a.bias, a.eps), None, None),
    "instance_norm": _instance_norm,
    "rms_norm": _rms_norm,
    "_weight_norm": _weight_norm,
    "embedding": _embedding,
    # recurrent layers
    "lstm": _recurrent("lstm"),
    "gru": _recurrent("gru"),
    "rnn_tanh": _recurrent("rnn"),
    "rnn_relu": _recurrent("rnn", relu=1),
    "lstm_cell": _recurrent_cell("lstm"),
    "gru_cell": _recurrent_cell("gru"),
    "rnn_tanh_cell": _recurrent_cell("rnn"),
    "rnn_relu_cell": _recurrent_cell("rnn", relu=1),
    # dropout
    "native_dropout": _native_dropout,
    "dropout": lambda b, a: f.dropout(b, a.x, a.p if a.train else 0.0),
    "bernoulli.p": _bernoulli,
    # pooling and resizing
    "max_pool1d": _max_pool(1),
    "max_pool2d": _max_pool(2),
    "max_pool1d_with_indices": _max_pool(1, True),
    "max_pool2d_with_indices": _max_pool(2, True),
    "avg_pool1d": _avg_pool,
    "avg_pool2d": _avg_pool,
    **dict.fromkeys(
        ("adaptive_avg_pool1d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d"),
        lambda b, a: f.adaptive_pool(b, "avg_pool", a.x, a.output_size),
    ),
    **dict.fromkeys(
        ("adaptive_max_pool1d", "adaptive_max_pool2d"),
        lambda b, a: (f.adaptive_pool(b, "max_pool", a.x, a.output_size), LOST),
    ),
    "upsample_nearest1d": _upsample_nearest,
    "upsample_nearest2d": _upsample_nearest,
    "upsample_linear1d": _interpolate("linear"),
    "upsample_bilinear2d": _interpolate("linear"),
    "upsample_bicubic2d": _interpolate("bicubic"),
    "pixel_shuffle": lambda b, a: f.pixel_shuffle(b, a.x, a.upscale_factor),
    "im2col": _unfold,
    # activations
    **{
        op: _simple(op)
        for op in ("relu", "sigmoid", "tanh", "silu", "exp", "log", "sqrt", "square", "abs", "reciprocal")
    },
    "hardswish": _simple("hard_swish"),
    "hardsigmoid": _simple("hard_sigmoid"),
    "relu6": lambda b, a: f.clamp(b, a.x, 0.0, 6.0),
    "hardtanh": lambda b, a: f.clamp(b, a.x, a.min_val, a.max_val),
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max", "clip"), _clamp),
    "leaky_relu": _leaky_relu,
    "rrelu": _rrelu,
    "elu": _elu,
    "celu": _celu,
    "selu": _selu,
    "threshold": _threshold,
    "prelu": lambda b, a: f.prelu(b, a.x, a.weight),
    "_prelu_kernel": lambda b, a: f.prelu(b, a.x, a.weight),
    "gelu": lambda b, a: f.unary(b, "gelu", a.x, tanh=int(a.approximate == "tanh")),
    "softplus": _softplus,
    "log_sigmoid": lambda b, a: f.affine(b, f.softplus(b, f.affine(b, a.x, -1.0)), -1.0),
    "log_sigmoid_forward": lambda b, a: (f.affine(b, f.softplus(b, f.affine(b, a.x, -1.0)), -1.0), None),
    "mish": lambda b, a: f.binary(b, "mul", a.x, f.unary(b, "tanh", f.softplus(b, a.x))),
    "softsign": lambda b, a: f.binary(b, "div", a.x, f.affine(b, f.unary(b, "abs", a.x), 1.0, 1.0)),
    "tanhshrink": lambda b, a: f.binary(b, "sub", a.x, f.unary(b, "tanh", a.x)),
    "glu": _glu,
    "erf": lambda b, a: c.Erf(a.x),
    **dict.fromkeys(("softmax", "_softmax", "_safe_softmax"), lambda b, a: f.softmax(b, a.x, a.dim)),
    **dict.fromkeys(("log_softmax", "_log_softmax"), lambda b, a: f.softmax(b, a.x, a.dim, log=True)),
    "logsumexp": _log_sum_exp,
    # arithmetic
    "add": _add("add"),
    "sub": _add("sub"),
    "rsub": _rsub,
    "div": _div,
    "pow": _pow,
    **dict.fromkeys(("mul", "multiply"), lambda b, a: f.binary(b, "mul", a.x, a.other)),
    "true_divide": _div,
    "divide": _div,
    "addcmul": _add_product("mul"),
    "addcdiv": _add_product("div"),
    "lerp": _lerp,
    "neg": lambda b, a: f.affine(b, a.x, -1.0),
    "rsqrt": lambda b, a: f.power(b, a.x, -0.5),
    "log1p": lambda b, a: f.unary(b, "log", f.affine(b, a.x, 1.0, 1.0)),
    "expm1": lambda b, a: f.affine(b, f.unary(b, "exp", a.x), 1.0, -1.0),
    "exp2": lambda b, a: f.unary(b, "exp", f.affine(b, a.x, math.log(2))),
    "log2": lambda b, a: f.affine(b, f.unary(b, "log", a.x), 1 / math.log(2)),
    "log10": lambda b, a: f.affine(b, f.unary(b, "log", a.x), 1 / math.log(10)),
    "mean": _reduce("mean"),
    "sum": _reduce("sum"),
    "var": _variance(False),
    "std": _variance(True),
    "var_mean": lambda b, a: (_variance(False)(b, a), _reduce("mean")(b, a)),
    "max": _extreme(1.0),
    "min": _extreme(-1.0),
    "amax": _amax(1.0),
    "amin": _amax(-1.0),
    "maximum": _extreme(1.0),
    "minimum": _extreme(-1.0),
    "linalg_vector_norm": _norm,
    "norm": _norm,
    "cumsum": _cumsum,
    **dict.fromkeys(("gt", "ge"), lambda b, a: f.compare(b, a.x, a.other, True)),
    **dict.fromkeys(("lt", "le"), lambda b, a: f.compare(b, a.x, a.other, False)),
    "isnan": lambda b, a: np.zeros((), np.bool_),
    "masked_fill": _masked_fill,
    "where": _where_self,
    "fill": _fill,
    # shapes
    **dict.fromkeys(
        ("view", "_unsafe_view", "reshape", "_reshape_copy"),
        lambda b, a: c.reshape(b, a.x, a.size if hasattr(a, "size") else a.shape),
    ),
    "copy": lambda b, a: c.expand(b, a.src, b.shape(a.x)),
    "view_as": _same_shape,
    "reshape_as": _same_shape,
    "expand_as": _expand_as,
    "flatten": lambda b, a: c.flatten(b, a.x, a.start_dim, a.end_dim),
    "unflatten": lambda b, a: c.reshape(
        b,
        a.x,
        [
            *b.shape(a.x)[: a.dim % len(b.shape(a.x))],
            *a.sizes,
            *b.shape(a.x)[a.dim % len(b.shape(a.x)) + 1 :],
        ],
    ),
    "permute": lambda b, a: c.transpose(b, a.x, a.dims),
    **dict.fromkeys(("transpose", "swapaxes"), lambda b, a: c.swap(b, a.x, a.dim0, a.dim1)),
    **dict.fromkeys(("t", "numpy_T"), lambda b, a: c.swap(b, a.x, 0, -1)),
    **dict.fromkeys(("mT", "adjoint"), lambda b, a: c.swap(b, a.x, -1, -2)),
    "unsqueeze": lambda b, a: c.unsqueeze(b, a.x, [a.dim]),
    "squeeze": _squeeze,
    "expand": lambda b, a: c.expand(b, a.x, a.size),
    "broadcast_to": lambda b, a: c.expand(b, a.x, a.size),
    "repeat": lambda b, a: c.repeat(b, a.x, a.repeats),
    "tile": lambda b, a: c.repeat(b, a.x, a.dims),
    "cat": lambda b, a: c.concat(b, a.tensors, a.dim),
    "stack": lambda b, a: c.concat(b, [c.unsqueeze(b, t, [a.dim]) for t in a.tensors], a.dim),
    "split": _split,
    "chunk": _chunk,
    "unbind": _unbind,
    "split_with_sizes": lambda b, a: c.split(b, a.x, a.dim, a.split_sizes),
    "slice": lambda b, a: c.slice_axis(b, a.x, a.dim, a.start, a.end, a.step),
    "select": lambda b, a: c.select(b, a.x, a.dim, a.index),
    "narrow": lambda b, a: c.slice_axis(b, a.x, a.dim, a.start, a.start + a.length),
    "select_scatter": _select_scatter,
    "slice_scatter": _slice_scatter,
    "index": _index,
    "index_select": _constant_index,
    "flip": _flip,
    "roll": _roll,
    "pad": _pad,
    "constant_pad_nd": _pad,
    # creation, with a size that holds the batch
    **{
        new + name: _creation(v)
        for new in ("", "new_")
        for name, v in (("zeros", 0.0), ("ones", 1.0), ("empty", 0.0), ("full", None))
    },
    **{
        f"{name}_like": _creation(v, "like")
        for name, v in (("zeros", 0.0), ("ones", 1.0), ("empty", 0.0), ("full", None))
    },
    # no-ops
    "detach": _detach,
    **dict.fromkeys(
        (
            "clone",
            "contiguous",
            "alias",
            "lift_fresh_copy",
            "lift",
            "dropout_",
            "feature_dropout",
            "view_of",
            "positive",
            "_assert_tensor_metadata",
            "_assert_scalar",
            "_assert_async",
            "sym_constrain_range",
            "sym_constrain_range_for_size",
        ),
        _nothing,
    ),
    **dict.fromkeys(("to", "_to_copy", "type_as", "float", "double", "half"), _cast),
    **dict.fromkeys(("sym_size", "size"), _size),
    "sym_numel": lambda b, a: math.prod(b.shape(a.x)),
}


#: operator -> the nearest thing that is taken
REWRITES: dict[str, str] = {
    **dict.fromkeys(
        ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution"),
        "nn.Upsample(scale_factor=2) and a convolution",
    ),
    "conv3d": "fold one spatial dimension into the channels and use conv2d",
    **dict.fromkeys(
        ("lstm", "gru", "rnn_tanh", "rnn_relu"),
        "sequences (N, T, F) of one length; a linear layer for proj_size",
    ),
    **dict.fromkeys(
        ("gt", "lt", "ge", "le", "eq", "ne", "sign", "floor", "ceil", "round", "where", "heaviside"),
        "compute it with relu, clamp or sigmoid; comparisons have no gradient",
    ),
    **dict.fromkeys(("argmax", "argmin", "topk", "sort", "argsort"), c.OUTSIDE),
    **dict.fromkeys(
        ("sin", "cos", "tan", "erf", "atan", "sinh", "cosh"),
        "compute constant tables in __init__; use tanh or gelu",
    ),
    "embedding": "embed outside of the model and pass floats, or multiply one-hot floats by a linear layer",
    "avg_pool2d": "avg_pool2d without divisor_override, and a multiplication",
    "index": "slices and torch.cat; or index_select by one constant index",
    "gather": "slices and torch.cat, or a product with a one-hot mask",
    "instance_norm": "track_running_stats=False, or .eval() on this layer",
    "adaptive_max_pool2d": "a max_pool2d with a fixed kernel",
    "upsample_nearest2d": "an integer scale_factor, or mode='bilinear'",
    "pow": "squares, products, sqrt; or exp(p * log(x)) where x is positive",
    "detach": "leave it out; what learns is for the update set to say",
    "buffer update": "keep what is tracked in batch norm, or outside of the model",
    "alpha_dropout": "nn.Dropout",
    "feature_alpha_dropout": "nn.Dropout2d",
    "hardshrink": "x - clamp(x, -lambd, lambd), which is a soft shrink",
    "cdist": "a product of matrices and sums of squares",
}
