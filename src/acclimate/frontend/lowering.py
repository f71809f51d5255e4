"""What both front ends make of picking by index, arithmetic and matrix products: operators of the op table.

Like the functions of `common` that move elements, these take *things*; what the batch may not do raises `Untaken`.
"""

from __future__ import annotations

import math
import string
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
    expand,
    flatten,
    like,
    merge,
    pad,
    slice_axis,
    swap,
    to_last,
    transpose,
    unsqueeze,
    view,
)

MAX_WINDOW = 65535  # elements of a max-pool's window
MOST_FACTORS = 64  # of a product, each of which is a node

# -- picking by index --------------------------------------------------------------------------------------------------


def pad_by_copies(b: Builder, x: Any, axis: int, before: int, after: int, mode: str) -> Any:
    """Reflecting, replicating or circular padding of one axis, which takes the rows from x itself."""
    n = b.length(x, axis)
    how: Any = {"replicate": "edge", "circular": "wrap"}.get(mode, mode)
    rows = np.pad(np.arange(n), (before, after), mode=how)
    return take(b, x, axis, rows)


def take(b: Builder, x: Any, axis: int, index: Any) -> Any:
    """x at constant indices along an axis: a slice where they are evenly spaced."""
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
    if len(runs) == 1:
        start, step, count = runs[0]
        return slice_axis(b, x, axis, start, start + (count - 1) * step + 1, step)
    names = b.graph.constant(f"{b.stem or 'model'}.index", index, "i32")
    return b.emit("take", x, Ref(names), axis=axis)


def take_many(b: Builder, x: Any, index: Any) -> Any:
    """x at constant index tuples (..., k) into its first k axes."""
    index = np.asarray(index)
    k = index.shape[-1]
    shape = tuple(b.length(x, i) for i in range(k))
    flat = np.ravel_multi_index(tuple(np.moveaxis(index % np.array(shape), -1, 0)), shape)
    return take(b, flatten(b, x, 0, k - 1), 0, flat)


def gather(b: Builder, x: Any, axis: int, index: Any) -> Any:
    """Picks along one axis, by a constant index that is the same along all others."""
    if isinstance(index, Ref):
        stretched = b.producer(index, "expand")
        index = b.graph.values[stretched.inputs[0]].data if stretched is not None else None
    if index is None:
        raise Untaken("an index that depends on the data")
    shape = b.shape(x)
    axis, index = axis % len(shape), np.asarray(index)
    rows = np.moveaxis(index, axis, -1).reshape(-1, index.shape[axis])
    whole = all(
        n in (1, m) or (isinstance(m, Dim) and n == m.coefficient * (b.baked or 0))
        for i, (n, m) in enumerate(zip(index.shape, shape, strict=True))
        if i != axis
    )
    if not whole or (rows != rows[0]).any():
        raise Untaken("an index that differs along another axis")
    return take(b, x, axis, rows[0])


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
    if isinstance(x, Compared):
        x = b.value(x)
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
    x, y = (b.value(t) if isinstance(t, Compared) else t for t in (x, y))
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
    x = b.value(x) if isinstance(x, (Erf, Compared)) else x
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
    """x to a power; to a whole one by products and reciprocals, to one that is no constant as exp(log(x) exponent)."""
    base, fixed = number(x), number(exponent)
    if fixed is None and not isinstance(x, Ref) and not isinstance(exponent, Ref):
        return np.power(x, exponent)
    if fixed is None:
        if base is not None and base > 0:
            return unary(b, "exp", affine(b, exponent, math.log(base)))
        return unary(b, "exp", binary(b, "mul", unary(b, "log", x), exponent))
    exponent = fixed
    whole, half = divmod(abs(exponent), 1.0)
    if half not in (0.0, 0.5) or whole > 16:
        return unary(b, "pow", x, exponent=exponent)
    if exponent < 0:
        return unary(b, "reciprocal", power(b, x, -exponent))
    factor, result = x, unary(b, "sqrt", x) if half else None
    bits = int(whole)
    while bits:
        if bits & 1:
            result = factor if result is None else binary(b, "mul", result, factor)
        bits >>= 1
        factor = unary(b, "square", factor) if bits else factor
    return affine(b, x, 0.0, 1.0) if result is None else result


def compare(b: Builder, x: Any, y: Any, above: bool, strict: bool = True) -> Any:
    """x > y, or x < y with above=False, or with equality without `strict`: 1 where it holds, 0 elsewhere."""
    if isinstance(x, Ref) and number(y) is not None:
        return Compared(x, number(y) or 0.0, above, strict)
    if isinstance(y, Ref) and number(x) is not None:
        return Compared(y, number(x) or 0.0, not above, strict)
    if not isinstance(x, Ref) and not isinstance(y, Ref):
        return {
            (True, True): np.greater,
            (True, False): np.greater_equal,
            (False, True): np.less,
            (False, False): np.less_equal,
        }[above, strict](x, y)
    test = b.emit("greater", *(_aligned(b, x, y) if above == strict else _aligned(b, y, x)))
    return b.truth(test) if strict else inverted(b, test)


def equal(b: Builder, x: Any, y: Any) -> Any:
    """1 where x == y, 0 elsewhere."""
    if not isinstance(x, (Ref, Compared)) and not isinstance(y, (Ref, Compared)):
        return np.equal(x, y)
    more, less = (b.value(compare(b, b.value(x), y, above)) for above in (True, False))
    return inverted(b, b.truth(binary(b, "add", more, less)))


def inverted(b: Builder, test: Any) -> Any:
    """The negation of a truth value."""
    if isinstance(test, Compared):
        return test.negated()
    return b.truth(affine(b, test, -1.0, 1.0)) if isinstance(test, Ref) else np.logical_not(test)


def both(b: Builder, x: Any, y: Any) -> Any:
    """Where both truth values hold."""
    return b.truth(binary(b, "mul", *(_truth(b, t) for t in (x, y))))


def either(b: Builder, x: Any, y: Any) -> Any:
    """Where at least one truth value holds."""
    return inverted(b, both(b, inverted(b, x), inverted(b, y)))


def differs(b: Builder, x: Any, y: Any) -> Any:
    """Where exactly one of two truth values holds."""
    return b.truth(unary(b, "abs", binary(b, "sub", *(_truth(b, t) for t in (x, y)))))


def _truth(b: Builder, test: Any) -> Any:
    """A truth value as 0 and 1."""
    return (
        b.value(test) if isinstance(test, Compared) else test if isinstance(test, Ref) else np.float32(test)
    )


def keep(b: Builder, x: Any, test: Any) -> Any:
    """x where the test holds, 0 elsewhere, whatever x is there."""
    if number(x) == 0:
        return np.float32(0)
    if not isinstance(x, Ref) or not isinstance(test, Ref):
        return binary(b, "mul", x, test)
    return b.emit("keep", *_aligned(b, x, test))


def sign(b: Builder, x: Any) -> Any:
    """-1, 0 or 1; flat."""
    return binary(b, "sub", b.value(compare(b, x, 0.0, True)), b.value(compare(b, x, 0.0, False)))


def where(b: Builder, condition: Any, x: Any, y: Any) -> Any:
    """x where a constant condition holds, y elsewhere; or the piecewise function that a comparison spells out."""
    x, y = (b.value(t) if isinstance(t, (Erf, Compared)) else t for t in (x, y))
    x, y = (t if isinstance(t, Ref) else np.clip(np.asarray(t, np.float32), -LARGE, LARGE) for t in (x, y))
    if isinstance(condition, Compared):
        known = _piecewise(b, condition, *((x, y) if condition.above else (y, x)))
        if known is not None:
            return known
    test, rest = (_truth(b, t) for t in (condition, inverted(b, condition)))
    return binary(b, "add", keep(b, x, test), keep(b, y, rest))


def _piecewise(b: Builder, test: Compared, high: Any, low: Any) -> Any:
    """`high` above the bound and `low` below it, where it is relu, leaky relu, clamp, abs or a guarded softplus."""
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
    return None


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
    if count > MAX_WINDOW:
        if len(axes) > 1:
            y = largest(b, x, axes[1:], True)
            y = largest(b, y, axes[:1], True)
        else:  # in pieces, the last one filled up with what is never the largest
            pieces = -(-count // MAX_WINDOW)
            y = pad(b, y, [0] * rank, [*[0] * (rank - 1), pieces * MAX_WINDOW - count], -LARGE)
            y = largest(b, view(b, y, [*b.shape(y)[:-1], pieces, MAX_WINDOW]), [-1], False)
            y = largest(b, y, [-1], False)
        return view(b, y, [1 if i in axes else s for i, s in enumerate(shape) if keep or i not in axes])
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
    if len(b.shape(x)) == len(b.shape(y)) == 1:
        return reduce(b, "sum", binary(b, "mul", x, y), [0], False)
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


def einsum(b: Builder, equation: str, things: Sequence[Any]) -> Any:
    """einsum; several operands are taken two at a time, from the left."""
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        letters = left.replace(",", "").replace("...", "")
        out = "..." * ("..." in left) + "".join(sorted(s for s in set(letters) if letters.count(s) == 1))
    if "..." in left:  # as many unused letters, aligned at the end
        free = [s for s in string.ascii_letters if s not in equation]
        ranks = [len(b.shape(t)) - len(s.replace("...", "")) for s, t in zip(terms, things, strict=True)]
        rest = free[: max(r for r, s in zip(ranks, terms, strict=True) if "..." in s)]
        terms = [
            s.replace("...", "".join(rest[len(rest) - max(r, 0) :]))
            for r, s in zip(ranks, terms, strict=True)
        ]
        out = out.replace("...", "".join(rest))
    if any(len(set(t)) < len(t) for t in (*terms, out)):
        raise Untaken(f"einsum {equation!r}: a letter that is repeated in one operand, a diagonal")
    while len(terms) > 2:
        later = set("".join(terms[2:]) + out)
        kept = "".join(s for s in dict.fromkeys(terms[0] + terms[1]) if s in later)
        things = [einsum(b, f"{terms[0]},{terms[1]}->{kept}", things[:2]), *things[2:]]
        terms = [kept, *terms[2:]]
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


def product(b: Builder, x: Any, axes: Sequence[int] | None, keep: bool) -> Any:
    """The product over axes, of as many factors as they have elements."""
    shape = b.shape(x)
    rank = len(shape)
    axes = sorted({a % rank for a in axes} if axes else range(rank))
    y = flatten(b, transpose(b, x, [*(i for i in range(rank) if i not in axes), *axes]), rank - len(axes), -1)
    if b.length(y, -1) > MOST_FACTORS:
        raise Untaken(f"a product of more than {MOST_FACTORS} factors")
    first, *more = (slice_axis(b, y, -1, i, i + 1) for i in range(b.length(y, -1)))
    for factor in more:
        first = binary(b, "mul", first, factor)
    return view(b, first, [1 if i in axes else s for i, s in enumerate(shape) if keep or i not in axes])


def remainder(b: Builder, x: Any, y: Any, mode: int) -> Any:
    """x - y * (x / y, rounded by `mode` of the row "round")."""
    quotient = unary(b, "round", binary(b, "div", x, y), mode=mode)
    return binary(b, "sub", x, binary(b, "mul", quotient, y))


def cosine(b: Builder, x: Any) -> Any:
    return unary(b, "sin", affine(b, x, 1.0, math.pi / 2))


def exp_pair(b: Builder, x: Any, op: str) -> Any:
    """Half of exp(x) and exp(-x), added (cosh) or subtracted (sinh)."""
    return binary(b, op, *(affine(b, unary(b, "exp", affine(b, x, s)), 0.5) for s in (1.0, -1.0)))


def log_sum_exp(b: Builder, x: Any, axes: Sequence[int] | None, keep: bool) -> Any:
    """log(sum(exp(x))) over axes, from the largest one up."""
    shape = b.shape(x)
    rank = len(shape)
    axes = sorted({a % rank for a in axes} if axes else range(rank))
    perm = [i for i in range(rank) if i not in axes] + axes
    y = flatten(b, transpose(b, x, perm), rank - len(axes), -1)
    rest = binary(b, "sub", y, b.emit("log_softmax", y))  # the same in the whole row
    rest = slice_axis(b, rest, -1, 0, 1)
    return view(b, rest, [1 if i in axes else s for i, s in enumerate(shape) if keep or i not in axes])


def leaky_relu(b: Builder, x: Any, slope: float) -> Any:
    """x where positive, slope * x elsewhere."""
    if slope >= 0:
        return unary(b, "leaky_relu", x, slope=slope)
    return prelu(b, x, np.float32(slope))  # the output's sign does not say which side it came from


def prelu(b: Builder, x: Any, slope: Any) -> Any:
    """x where positive, slope * x elsewhere, with a learned slope: relu(x) - slope * relu(-x)."""
    negative = unary(b, "relu", affine(b, x, -1.0))
    shape = b.shape(slope)
    if len(shape) == 1 and len(b.shape(x)) > 2 and shape[0] != 1:
        slope = view(b, slope, [*shape, *[1] * (len(b.shape(x)) - 2)])
    return binary(b, "sub", unary(b, "relu", x), binary(b, "mul", slope, negative))


def softmax(b: Builder, x: Any, axis: int, log: bool = False) -> Any:
    """Softmax, or its logarithm, along any axis."""
    y, back = to_last(b, x, axis)
    return transpose(b, b.emit("log_softmax" if log else "softmax", y), back)
