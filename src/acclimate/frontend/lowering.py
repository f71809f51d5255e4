"""What both front ends make of picking by index, arithmetic, matrix products and layers: operators of the op table.

Like the functions of `common` that move elements, these take *things*; what the batch may not do raises `Untaken`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..ir import Dim
from ..ops import TABLE
from ..ops.arithmetic import mask
from .common import (
    LARGE,
    Builder,
    Compared,
    Erf,
    Ref,
    Untaken,
    concat,
    expand,
    flatten,
    like,
    merge,
    slice_axis,
    swap,
    to_last,
    transpose,
    unsqueeze,
    view,
)

# -- picking by index --------------------------------------------------------------------------------------------------


def pad_by_copies(b: Builder, x: Any, axis: int, before: int, after: int, mode: str) -> Any:
    """Reflecting, replicating or circular padding of one axis, which takes the rows from x itself."""
    n = b.length(x, axis)
    how: Any = {"replicate": "edge", "circular": "wrap"}.get(mode, mode)
    rows = np.pad(np.arange(n), (before, after), mode=how)
    return take(b, x, axis, rows)


def take(b: Builder, x: Any, axis: int, index: Any) -> Any:
    """x at constant indices along an axis, such that a gradient exists wherever a parameter lies upstream."""
    shape = b.shape(x)
    axis %= len(shape)
    index = np.asarray(index).astype(np.int64)
    if not isinstance(x, Ref):
        return np.take(np.asarray(x), index, axis)
    if index.ndim != 1:
        y = take(b, x, axis, index.reshape(-1))
        return view(b, y, [*b.shape(y)[:axis], *index.shape, *b.shape(y)[axis + 1 :]])
    n = b.length(x, axis)
    if index.size == 0 or (index >= n).any() or (index < -n).any():
        raise Untaken("an index that is out of range or empty")
    index = np.where(index < 0, index + n, index)
    runs = _runs([int(i) for i in index])
    if len(runs) <= 16:
        return concat(b, [slice_axis(b, x, axis, s, s + (k - 1) * t + 1, t) for s, t, k in runs], axis)
    if x not in b.learned:
        names = b.graph.constant(f"{b.stem or 'model'}.index", index, "i32")
        return b.emit("take", x, Ref(names), axis=axis)
    if index.size * n > 1 << 20:
        raise Untaken(f"{index.size} rows are picked out of {n} that are learned, which has no gradient row")
    return along(b, x, axis, np.eye(n, dtype=np.float32)[index])


def take_many(b: Builder, x: Any, index: Any) -> Any:
    """x at constant index tuples (..., k) into its first k axes."""
    index = np.asarray(index)
    k = index.shape[-1]
    shape = tuple(b.length(x, i) for i in range(k))
    flat = np.ravel_multi_index(tuple(np.moveaxis(index % np.array(shape), -1, 0)), shape)
    return take(b, flatten(b, x, 0, k - 1), 0, flat)


def _runs(index: list[int]) -> list[tuple[int, int, int]]:
    """Indices as (start, step, count), greedily."""
    runs, i = [], 0
    while i < len(index):
        step = index[i + 1] - index[i] if i + 1 < len(index) else 1
        k = 1
        while step > 0 and i + k < len(index) and index[i + k] - index[i + k - 1] == step:
            k += 1
        if k == 2 and step > 1 and i + 2 < len(index):
            k = 1
        runs.append((index[i], step if k > 1 else 1, k))
        i += k
    return runs


# -- arithmetic ------------------------------------------------------------------------------------------------------

_FOLD: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
}


def number(thing: Any) -> float | None:
    """The thing as a Python float where it is one number, known now."""
    if isinstance(thing, (Ref, Erf, Compared, Dim)) or thing is None:
        return None
    data = np.asarray(thing)
    return float(data.reshape(-1)[0]) if data.size == 1 and data.dtype.kind in "biuf" else None


def affine(b: Builder, x: Any, scale: float = 1.0, shift: float = 0.0) -> Any:
    """scale * x + shift; affines in a row become one."""
    if isinstance(x, Erf):
        return Erf(x.source, x.scale * scale, x.shift * scale + shift)
    if not isinstance(x, Ref):
        return np.asarray(x) * scale + shift
    before = b.producer(x, "affine")
    if before is not None:
        x, shift = Ref(before.inputs[0]), shift + scale * before.attrs["shift"]
        scale = scale * before.attrs["scale"]
    if abs(scale - 1) < 1e-12 and shift == 0:
        return x
    return b.emit("affine", x, scale=float(scale), shift=float(shift))


def binary(b: Builder, op: str, x: Any, y: Any) -> Any:
    """add, sub, mul or div with broadcasting; a number becomes an affine."""
    for operand in (x, y):
        if isinstance(operand, Dim):
            raise Untaken("the batch size is used as a number")
    if op == "mul" and isinstance(x, Erf) != isinstance(y, Erf):
        gelu = _gelu(b, *((x, y) if isinstance(x, Erf) else (y, x)))
        if gelu is not None:
            return gelu
    c, d = number(x), number(y)
    if d is not None and (np.ndim(y) <= len(b.shape(x))) and not (op == "div" and d == 0):
        return affine(
            b, x, *{"add": (1.0, d), "sub": (1.0, -d), "mul": (d, 0.0), "div": (1 / (d or 1), 0.0)}[op]
        )
    if c is not None and (np.ndim(x) <= len(b.shape(y))):
        if op == "div":
            return affine(b, b.emit("reciprocal", y) if isinstance(y, Ref) else 1 / np.asarray(y), c)
        return affine(b, y, *{"add": (1.0, c), "sub": (-1.0, c), "mul": (c, 0.0)}[op])
    if not isinstance(x, (Ref, Erf)) and not isinstance(y, (Ref, Erf)):
        return _FOLD[op](x, y)
    known = (
        (_biased(b, x, y) or _biased(b, y, x))
        if op == "add"
        else _normalized(b, x, y)
        if op == "div"
        else None
    )
    if known is not None:
        return known
    return b.emit(
        op, *_aligned(b, b.value(x) if isinstance(x, Erf) else x, b.value(y) if isinstance(y, Erf) else y)
    )


def _aligned(b: Builder, x: Any, y: Any) -> list[Any]:
    """Both operands, where one was stretched to a baked-in batch with that undone."""
    things = [x, y]
    rank = max(len(b.shape(t)) for t in things)
    for i in range(-rank, 0):
        sizes: list[Any] = [b.shape(t)[i] if -i <= len(b.shape(t)) else 1 for t in things]
        for me, other in ((0, 1), (1, 0)):
            if isinstance(sizes[other], Dim) and not isinstance(sizes[me], Dim) and sizes[me] != 1:
                if sizes[me] != sizes[other].coefficient * (b.baked or 0):
                    raise Untaken(f"an axis of {sizes[me]} meets the batch", batch=True)
                things[me] = like(b, things[me], i % len(b.shape(things[me])), sizes[other])
    return things


def _gelu(b: Builder, phi: Erf, x: Any) -> Any:
    """x * (erf(x / sqrt(2)) + 1) and its multiples, or None."""
    (source, k), (base, factor) = _unscaled(b, phi.source), _unscaled(b, x)
    if (
        source != base
        or not math.isclose(k, math.sqrt(0.5), rel_tol=1e-4)
        or not math.isclose(phi.scale, phi.shift)
    ):
        return None
    return affine(b, b.emit("gelu", Ref(base)), 2 * phi.scale * factor)


def _biased(b: Builder, x: Any, bias: Any) -> Any:
    """x + bias as the bias of the matrix product that made x, where nothing else reads it; or None."""
    viewed = b.producer(x, "reshape")
    made = b.producer(viewed.inputs[0] if viewed is not None else x, "matmul")
    if made is None or len(made.inputs) > 2 or b.shape(bias) != b.shape(Ref(made.outputs[0]))[-1:]:
        return None
    if (
        b.shape(x)[-1:] != b.shape(bias)
        or {x, made.outputs[0]} & b.shared
        or len(b.shape(Ref(made.outputs[0]))) != 2
    ):
        return None
    return view(b, b.emit("matmul", *map(Ref, made.inputs), bias, **made.attrs), b.shape(x))


def _normalized(b: Builder, x: Any, y: Any) -> Any:
    """Layer norm where x / y spells it out: (s - mean(s)) / sqrt(mean((s - mean(s))^2) + eps); or None."""
    chain, at = [], y
    for op in ("sqrt", "affine", "mean", "square"):
        node = b.producer(at, op)
        if node is None:
            return None
        chain.append(node)
        at = node.inputs[0]
    _, shifted, mean, _ = chain
    centred = b.producer(x, "sub")
    subtracted = b.producer(centred.inputs[1], "mean") if centred is not None else None
    if centred is None or subtracted is None or at != x or shifted.attrs["scale"] != 1:
        return None
    last = (mask((len(b.shape(x)) - 1,)), 1)
    if subtracted.inputs[0] != centred.inputs[0] or any(
        (m.attrs["axes"], m.attrs["keep"]) != last for m in (mean, subtracted)
    ):
        return None
    return b.emit("layer_norm", Ref(centred.inputs[0]), eps=shifted.attrs["shift"])


def unary(b: Builder, op: str, x: Any, **attrs: Any) -> Any:
    """One of the table's element-wise ops, folded on constants."""
    if isinstance(x, Ref):
        return b.emit(op, x, **attrs)
    row = TABLE[op]
    return np.asarray(row.ref(row.fill(attrs), np.asarray(x, np.float32))[0])


def clamp(b: Builder, x: Any, low: float | None, high: float | None) -> Any:
    """min(max(x, low), high); either bound may be missing."""
    low, high = -math.inf if low is None else float(low), math.inf if high is None else float(high)
    if low == -math.inf and high == math.inf:
        return x
    if low == 0 and high == math.inf:
        return unary(b, "relu", x)
    return unary(b, "hard_tanh", x, low=low, high=high)


def power(b: Builder, x: Any, exponent: Any) -> Any:
    """x to a power of which one side is constant, composed of products, square roots and reciprocals, or of exp."""
    base, fixed = number(x), number(exponent)
    if fixed is None:
        if base is None or base <= 0:
            raise Untaken("a power whose exponent is not one constant")
        return unary(b, "exp", affine(b, exponent, math.log(base)))
    exponent = fixed
    if exponent < 0:
        return unary(b, "reciprocal", power(b, x, -exponent))
    whole, half = divmod(exponent, 1.0)
    if half not in (0.0, 0.5) or whole > 16:
        raise Untaken(f"the power {exponent} is not a small multiple of 1/2")
    factor, result = x, unary(b, "sqrt", x) if half else None
    bits = int(whole)
    while bits:
        if bits & 1:
            result = factor if result is None else binary(b, "mul", result, factor)
        bits >>= 1
        factor = unary(b, "square", factor) if bits else factor
    return affine(b, x, 0.0, 1.0) if result is None else result


def compare(b: Builder, x: Any, y: Any, above: bool) -> Compared:
    """x > y (or x < y) for a number y; at equality both sides of what follows must agree."""
    if isinstance(x, Ref) and number(y) is not None:
        return Compared(x, number(y) or 0.0, above)
    if isinstance(y, Ref) and number(x) is not None:
        return Compared(y, number(x) or 0.0, not above)
    raise Untaken("a comparison of two tensors")


def where(b: Builder, condition: Any, x: Any, y: Any) -> Any:
    """x where a constant condition holds, y elsewhere; or the piecewise function that a comparison spells out."""
    if isinstance(condition, Compared):
        return _piecewise(b, condition, *((x, y) if condition.above else (y, x)))
    if isinstance(condition, Ref):
        raise Untaken("a choice that depends on the data")
    keep = np.asarray(condition).astype(np.float32)
    one = [np.clip(t, -LARGE, LARGE) if not isinstance(t, Ref) else t for t in (x, y)]
    return binary(b, "add", binary(b, "mul", one[0], keep), binary(b, "mul", one[1], 1 - keep))


def _piecewise(b: Builder, test: Compared, high: Any, low: Any) -> Any:
    """`high` above the bound and `low` below it, where this is relu, leaky relu, clamp, abs or a guarded softplus."""
    x, bound = test.source, test.bound
    (base, slope), soft = _unscaled(b, low), b.producer(_unscaled(b, low)[0], "softplus")
    if high == x and number(low) == bound:
        return clamp(b, x, bound, None)
    if low == x and number(high) == bound:
        return clamp(b, x, None, bound)
    if high == x and base == x and bound == 0 and (slope >= 0 or slope == -1):
        return unary(b, "leaky_relu", x, slope=slope) if slope >= 0 else unary(b, "abs", x)
    if soft is not None and bound >= 10:
        bases = {_unscaled(b, t)[0] for t in (Ref(soft.inputs[0]), x, high)}
        if len(bases) == 1:
            return low  # equal to `high` there, but for less than exp(-10)
    raise Untaken("a choice that depends on the data")


def reduce(b: Builder, op: str, x: Any, axes: Sequence[int] | None, keep: bool) -> Any:
    """The "sum" or "mean" over axes; over all where `axes` is None or empty."""
    rank = len(b.shape(x))
    chosen = tuple(sorted({a % rank for a in axes} if axes else range(rank)))
    if not isinstance(x, Ref):
        return getattr(np, op)(x, axis=chosen, keepdims=keep)
    if not chosen:
        return x
    return b.emit(op, x, axes=mask(chosen), keep=int(keep))


def largest(b: Builder, x: Any, axes: Sequence[int] | None, keep: bool) -> Any:
    """The maximum over axes, as a max-pool over one window."""
    shape = b.shape(x)
    rank = len(shape)
    axes = sorted({a % rank for a in axes} if axes else range(rank))
    perm = [i for i in range(rank) if i not in axes] + axes
    y = transpose(b, x, perm)
    count = math.prod(shape[a] for a in axes)
    if isinstance(count, Dim):
        raise Untaken("a maximum over the batch")
    lead = b.shape(y)[: rank - len(axes)]
    whole = [*lead, 1, count] if lead else [1, 1, count]
    y = merge(b, view(b, y, whole), whole, 0, max(len(lead) - 1, 0))
    y = b.emit("max_pool", y, kernel=(count,), stride=(1,), before=(0,), after=(0,), dilation=(1,))
    return view(b, y, [1 if i in axes else s for i, s in enumerate(shape) if keep or i not in axes])


def variance(b: Builder, x: Any, axes: Sequence[int] | None, correction: float, keep: bool) -> Any:
    """The variance over axes, with `correction` taken off the number of elements."""
    shape = b.shape(x)
    axes = [a % len(shape) for a in axes] if axes else list(range(len(shape)))
    count = math.prod(shape[a] for a in axes)
    if isinstance(count, Dim) and correction:
        raise Untaken("an unbiased variance over the batch")
    squares = unary(b, "square", binary(b, "sub", x, reduce(b, "mean", x, axes, True)))
    return affine(
        b, reduce(b, "mean", squares, axes, keep), 1.0 if not correction else count / (count - correction)
    )


# -- matrix products -------------------------------------------------------------------------------------------------


def _operand(b: Builder, x: Any, flag: int) -> tuple[Any, int]:
    """x with the flag that transposes its last two axes, such that the permutation before it moves least."""
    before = b.producer(x, "transpose")
    if before is None:
        return x, flag
    perm, n = before.attrs["perm"], len(before.attrs["perm"])
    swapped = (*perm[:-2], perm[-1], perm[-2])
    if swapped == tuple(range(n)):
        return Ref(before.inputs[0]), 1 - flag
    if swapped[-1] == n - 1:  # whole rows move then
        return b.emit("transpose", Ref(before.inputs[0]), perm=swapped), 1 - flag
    return x, flag


def _unscaled(b: Builder, x: Any) -> tuple[Any, float]:
    """x without a constant factor, and the factor."""
    before = b.producer(x, "affine")
    if before is None or before.attrs["shift"]:
        return x, 1.0
    return Ref(before.inputs[0]), before.attrs["scale"]


def linear(b: Builder, x: Any, w: Any, bias: Any = None, tb: int = 1) -> Any:
    """x (..., K) times w (O, K), or (K, O) with tb=0, plus bias (O,)."""
    w, tb = _operand(b, w, tb)
    rank = len(b.shape(x))
    rows = b.shape(x)[:-1]
    if rank == 2:
        x, ta = _operand(b, x, 0)
        return b.emit("matmul", x, w, bias, ta=ta, tb=tb)
    flat = flatten(b, x, 0, -2) if rank > 2 else view(b, x, [1, *b.shape(x)])
    y = b.emit("matmul", flat, w, bias, tb=tb)
    return view(b, y, [*rows, b.shape(y)[-1]])


def matmul(b: Builder, x: Any, y: Any) -> Any:
    """numpy's product of any two ranks, as one product of matrices or of stacks of them."""
    if not isinstance(x, Ref) and not isinstance(y, Ref):
        return np.matmul(x, y)
    if len(b.shape(x)) == 1:
        return squeeze_exactly(b, matmul(b, unsqueeze(b, x, [0]), y), -2 if len(b.shape(y)) > 1 else -1)
    if len(b.shape(y)) == 1:
        return squeeze_exactly(b, matmul(b, x, unsqueeze(b, y, [1])), -1)
    lead = b.shape(y)[:-2]
    if math.prod(lead) == 1 and len(lead) <= len(b.shape(x)) - 2:
        return linear(b, x, view(b, y, b.shape(y)[-2:]), tb=0)
    y, factor = _unscaled(b, y)
    if factor != 1:
        x = affine(b, x, factor)
    x, ta = _operand(b, x, 0)
    y, tb = _operand(b, y, 0)
    rank = max(len(b.shape(x)), len(b.shape(y)))
    x, y = (unsqueeze(b, t, range(rank - len(b.shape(t)))) for t in (x, y))
    stack = [
        q if isinstance(q, Dim) or p == 1 else p
        for p, q in zip(b.shape(x)[:-2], b.shape(y)[:-2], strict=True)
    ]
    for i, s in enumerate(stack):
        x, y = (
            like(b, t, i, s) if isinstance(s, Dim) and not isinstance(b.shape(t)[i], Dim) else t
            for t in (x, y)
        )
    x, y = (flatten(b, expand(b, t, [*stack, *b.shape(t)[-2:]]), 0, -3) for t in (x, y))
    (x, ta), (y, tb) = _operand(b, x, ta), _operand(b, y, tb)
    z = b.emit("matmul", x, y, ta=ta, tb=tb)
    return view(b, z, [*stack, *b.shape(z)[-2:]])


def squeeze_exactly(b: Builder, x: Any, axis: int) -> Any:
    """x without an axis that is known to be of size one."""
    shape = list(b.shape(x))
    del shape[axis]
    return view(b, x, shape)


def along(b: Builder, x: Any, axis: int, matrix: np.ndarray) -> Any:
    """A constant matrix (out, in) applied along one axis."""
    y, back = to_last(b, x, axis)
    return transpose(b, linear(b, y, np.asarray(matrix, np.float32)), back)


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
    """Scaled dot-product attention over (..., L, D): softmax(q k' scale + bias) v. A boolean bias says what to keep."""
    scores = matmul(b, affine(b, q, b.shape(q)[-1] ** -0.5 if scale is None else scale), swap(b, k, -1, -2))
    kept = np.tril(np.ones((b.length(q, -2), b.length(k, -2)), np.bool_)) if causal else None
    if bias is not None and not isinstance(bias, Ref) and np.asarray(bias).dtype == np.bool_:
        kept, bias = np.asarray(bias) if kept is None else np.asarray(bias) & kept, None
    if kept is not None:
        if not kept.any(-1).all():
            raise Untaken("a row of the attention mask that keeps nothing")
        mask_bias = np.where(kept, 0.0, -LARGE).astype(np.float32)
        bias = mask_bias if bias is None else binary(b, "add", bias, mask_bias)
    if bias is not None:
        scores = binary(b, "add", scores, bias)
    return matmul(b, dropout(b, softmax(b, scores, -1), dropout_p), v)


def einsum(b: Builder, equation: str, things: Sequence[Any]) -> Any:
    """einsum of one or two tensors, each letter at most once in each."""
    left, _, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if (
        "." in equation
        or "->" not in equation
        or len(terms) > 2
        or any(len(set(t)) < len(t) for t in (*terms, out))
    ):
        raise Untaken(
            f"einsum {equation!r}: an explicit output, one or two operands and no repeated letter are taken"
        )
    x, y = things[0], things[1] if len(things) > 1 else np.ones(())
    tx, ty = terms[0], terms[1] if len(terms) > 1 else ""
    for letter in sorted(set(tx) - set(ty) - set(out)):
        x, tx = reduce(b, "sum", x, [tx.index(letter)], False), tx.replace(letter, "")
    for letter in sorted(set(ty) - set(tx) - set(out)):
        y, ty = reduce(b, "sum", y, [ty.index(letter)], False), ty.replace(letter, "")
    if len(things) == 1:
        return transpose(b, x, [tx.index(c) for c in out])
    both, inner = [c for c in tx if c in ty and c in out], [c for c in tx if c in ty and c not in out]
    only_x, only_y = [c for c in tx if c not in ty], [c for c in ty if c not in tx]
    sizes = {**dict(zip(ty, b.shape(y), strict=True)), **dict(zip(tx, b.shape(x), strict=True))}

    def matrix(thing: Any, term: str, *groups: list[str]) -> Any:
        thing = transpose(b, thing, [term.index(c) for g in groups for c in g])
        for i, group in enumerate(groups):
            shape = list(b.shape(thing))
            thing = (
                merge(b, thing, shape, i, i + len(group) - 1)
                if group
                else view(b, thing, [*shape[:i], 1, *shape[i:]])
            )
        return thing

    z = matmul(b, matrix(x, tx, both, only_x, inner), swap(b, matrix(y, ty, both, only_y, inner), 1, 2))
    z = view(b, z, [sizes[c] for c in (*both, *only_x, *only_y)])
    order = [*both, *only_x, *only_y]
    return transpose(b, z, [order.index(c) for c in out])


def softmax(b: Builder, x: Any, axis: int, log: bool = False) -> Any:
    """Softmax, or its logarithm, along any axis."""
    y, back = to_last(b, x, axis)
    return transpose(b, b.emit("log_softmax" if log else "softmax", y), back)


# -- layers ----------------------------------------------------------------------------------------------------------


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
    if op == "max_pool":
        attrs["after"] = tuple(a + e for a, e in zip(attrs["after"], extra, strict=True))
        return b.emit(op, x, **attrs, dilation=dilation)
    return b.emit(op, x, **attrs, extra=extra, include_pad=int(include_pad))


def adaptive_pool(b: Builder, op: str, x: Any, sizes: Sequence[int | None]) -> Any:
    """avg_pool or max_pool to given output sizes; averages whose windows overlap are matrices."""
    rank = len(sizes)
    shape = b.shape(x)
    goal = [s if g is None else int(g) for g, s in zip(sizes, shape[-rank:], strict=True)]
    if op == "avg_pool" and goal == [1] * rank:
        return reduce(b, "mean", x, range(-rank, 0), True)
    if not any(s % g for s, g in zip(shape[-rank:], goal, strict=True)):
        kernel = [s // g for s, g in zip(shape[-rank:], goal, strict=True)]
        return x if kernel == [1] * rank else pool(b, op, x, kernel, kernel, 0)
    if op == "max_pool":
        raise Untaken(f"adaptive max-pool of {shape[-rank:]} to {tuple(goal)}, which does not divide it")
    for axis, g in zip(range(len(shape) - rank, len(shape)), goal, strict=True):
        n = b.length(x, axis)
        rows = [(np.arange(n) >= i * n // g) & (np.arange(n) < -(-(i + 1) * n // g)) for i in range(g)]
        x = along(b, x, axis, np.array([r / r.sum() for r in rows])) if g != n else x
    return x


def upsample_nearest(b: Builder, x: Any, sizes: Sequence[int]) -> Any:
    """Repeat each element along the spatial axes, to sizes that are multiples of the present ones."""
    shape = list(b.shape(x))
    times = [int(g) // int(s) for g, s in zip(sizes, shape[2:], strict=True)]
    if [t * s for t, s in zip(times, shape[2:], strict=True)] != list(sizes):
        raise Untaken(f"nearest upsampling of {tuple(shape[2:])} to {tuple(sizes)}, which is not a multiple")
    apart, wide = shape[:2], shape[:2]
    for s, t in zip(shape[2:], times, strict=True):
        apart, wide = [*apart, s, 1], [*wide, s, t]
    return view(b, expand(b, view(b, x, apart), wide), [*shape[:2], *sizes])


def pixel_shuffle(b: Builder, x: Any, r: int) -> Any:
    """(N, C r r, H, W) to (N, C, H r, W r)."""
    n, c, h, w = b.shape(x)
    y = transpose(b, view(b, x, [n, c // (r * r), r, r, h, w]), [0, 1, 4, 2, 5, 3])
    return view(b, y, [n, c // (r * r), h * r, w * r])


def softplus(b: Builder, x: Any, beta: float = 1.0) -> Any:
    """log(1 + exp(beta x)) / beta."""
    return affine(b, unary(b, "softplus", affine(b, x, beta)), 1 / beta)


def prelu(b: Builder, x: Any, slope: Any) -> Any:
    """x where positive, slope * x elsewhere, with a learned slope: relu(x) - slope * relu(-x)."""
    negative = unary(b, "relu", affine(b, x, -1.0))
    shape = b.shape(slope)
    if len(shape) == 1 and len(b.shape(x)) > 2 and shape[0] != 1:
        slope = view(b, slope, [*shape, *[1] * (len(b.shape(x)) - 2)])
    return binary(b, "sub", unary(b, "relu", x), binary(b, "mul", slope, negative))


def larger(b: Builder, x: Any, y: Any, sign: float = 1.0) -> Any:
    """The larger of two tensors, element by element; the smaller with sign -1."""
    for a, c in ((x, number(y)), (y, number(x))):
        if c is not None:
            return clamp(b, a, c, None) if sign > 0 else clamp(b, a, None, c)
    return binary(b, "add", x, affine(b, unary(b, "relu", affine(b, binary(b, "sub", y, x), sign)), sign))


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
