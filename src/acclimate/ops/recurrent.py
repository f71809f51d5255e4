"""Recurrent layers over whole sequences: LSTM, GRU and the plain cell, one row a layer and direction.

Sequences are (N, T, F). A weight stacks its gates' rows as torch does: LSTM i, f, g, o; GRU r, z, n. The input
product lies within the row, so that no array of T steps of all gates exists unless it is saved for backward.

Backward through time needs each step's record: LSTM (i, f, g, o, c), GRU (r, z, n and what the reset gate meets or
makes), plain (h). `segment` = 0 saves all T of them. `segment` = k saves the state before every k-th step, and
backward makes the records of one segment at a time again by the same arithmetic (Chen et al. 2016, arXiv:1604.06174;
Gruslys et al. 2016, arXiv:1606.03401): memory T / k + k instead of T, for one more forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import BadInput
from ..ir import Type
from .coupling import Call, Labels, fixed
from .row import Attr, Cost, Example, Row


@dataclass(frozen=True)
class Cell:
    """A kind of cell. `gates`, `record`: rows of its weights and floats of a step's record, in units of H."""

    name: str
    gates: int
    record: int
    states: int  # 2: h and c, 1: h
    attr: str = ""  # the cell's own switch
    default: int = 0


LSTM = Cell("lstm", 4, 5, 2)
GRU = Cell("gru", 3, 4, 1, "reset_after", 1)
RNN = Cell("rnn", 1, 1, 1, "relu")


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def _step(cell: Cell, a: Any, xs: Any, h: Any, c: Any, w: Any, b: Any) -> tuple[Any, Any, Any]:
    """(h, c, record) after a step. xs: the input's part of the gates, with its bias; w, b: the hidden ones."""
    n = h.shape[-1]
    if cell is RNN:
        pre = xs + h @ w.T + b
        h = np.maximum(pre, 0) if a["relu"] else np.tanh(pre)
        return h, c, h
    if cell is LSTM:
        i, f, g, o = np.split(xs + h @ w.T + b, 4, -1)
        i, f, g, o = _sigmoid(i), _sigmoid(f), np.tanh(g), _sigmoid(o)
        c = f * c + i * g
        return o * np.tanh(c), c, np.concatenate([i, f, g, o, c], -1)
    r, z = np.split(_sigmoid(xs[:, : 2 * n] + h @ w[: 2 * n].T + b[: 2 * n]), 2, -1)
    if a["reset_after"]:
        met = h @ w[2 * n :].T + b[2 * n :]
        new = np.tanh(xs[:, 2 * n :] + r * met)
    else:
        met = r * h
        new = np.tanh(xs[:, 2 * n :] + met @ w[2 * n :].T + b[2 * n :])
    return (1 - z) * new + z * h, c, np.concatenate([r, z, new, met], -1)


def _run(cell: Cell, a: Any, x: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any, h: Any, c: Any) -> Any:
    """Outputs, last c, records, and the state before each step, all at their place in the sequence."""
    n, t = x.shape[:2]
    size = w_hh.shape[1]
    xs = x @ w_ih.T + (0 if b_ih is None else b_ih)
    b = np.zeros(len(w_hh), x.dtype) if b_hh is None else b_hh
    h = np.zeros((n, size), x.dtype) if h is None else h
    c = np.zeros((n, size), x.dtype) if c is None else c
    y = np.zeros((n, t, size), x.dtype)
    records = np.zeros((n, t, cell.record * size), x.dtype)
    before = []
    for s in _times(a, t):
        before.append(np.concatenate([h, c], -1)[:, : cell.states * size])
        h, c, records[:, s] = _step(cell, a, xs[:, s], h, c, w_hh, b)
        y[:, s] = h
    return y, c, records, np.stack(before, 1)


def _times(a: Any, t: int) -> range:
    return range(t - 1, -1, -1) if a["reverse"] else range(t)


def _forward(cell: Cell) -> Callable[..., list[Any]]:
    def ref(a: Any, x: Any, w_ih: Any, w_hh: Any, *more: Any) -> list[Any]:
        b_ih, b_hh, h, c = (*more, None, None, None, None)[:4]
        y, c, records, before = _run(cell, a, x, w_ih, w_hh, b_ih, b_hh, h, c)
        saved = before[:, :: a["segment"]] if a["segment"] else records
        work = np.zeros(cell.record * w_hh.shape[1])
        return [y, work, c, saved] if cell is LSTM else [y, work, saved]

    return ref


def _back(cell: Cell, a: Any, record: Any, h: Any, c: Any, dh: Any, dc: Any, w: Any) -> Any:
    """(gradients of the input's and the hidden part of the gates, of h and c before the step, what meets w)."""
    size = w.shape[1]
    part = [record[:, i * size : (i + 1) * size] for i in range(cell.record)]
    if cell is RNN:
        d = dh * (part[0] > 0) if a["relu"] else dh * (1 - part[0] ** 2)
        return d, d, d @ w, None
    if cell is LSTM:
        i, f, g, o, now = part
        top = np.tanh(now)
        dc = dc + dh * o * (1 - top**2)
        d = [dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g**2), dh * top * o * (1 - o)]
        d = np.concatenate(d, -1)
        return d, d, d @ w, dc * f
    r, z, new, met = part
    d_new = dh * (1 - z) * (1 - new**2)
    d_z = dh * (h - new) * z * (1 - z)
    if a["reset_after"]:
        d_r = d_new * met * r * (1 - r)
        hidden = np.concatenate([d_r, d_z, d_new * r], -1)
        return np.concatenate([d_r, d_z, d_new], -1), hidden, dh * z + hidden @ w, None
    d_met = d_new @ w[2 * size :]
    d = np.concatenate([d_met * h * r * (1 - r), d_z, d_new], -1)
    return d, d, dh * z + d_met * r + d[:, : 2 * size] @ w[: 2 * size], None


def _backward(cell: Cell) -> Callable[..., list[Any]]:
    def ref(a: Any, d_y: Any, x: Any, w_ih: Any, w_hh: Any, *more: Any) -> list[Any]:
        b_ih, b_hh, h0, c0, y, saved, d_c = _arguments(cell, more)
        n, t = x.shape[:2]
        size, k = w_hh.shape[1], a["segment"]
        zero = np.zeros((n, size), x.dtype)
        h0, c0 = (zero if v is None else v for v in (h0, c0))
        if k:  # the records again, a segment at a time
            order = list(_times(a, t))
            y, records = np.zeros((n, t, size), x.dtype), np.zeros((n, t, cell.record * size), x.dtype)
            for i in range(0, t, k):
                at = np.sort(order[i : i + k])
                state = saved[:, i // k]
                y[:, at], _, records[:, at], before = _run(
                    cell, a, x[:, at], w_ih, w_hh, b_ih, b_hh, state[:, :size], state[:, size:]
                )
        else:
            records = y if saved is None else saved
        dx, dw_ih, dw_hh = np.zeros_like(x), np.zeros_like(w_ih), np.zeros_like(w_hh)
        db_ih, db_hh = np.zeros(len(w_hh), x.dtype), np.zeros(len(w_hh), x.dtype)
        dh, dc = zero, zero if d_c is None else d_c
        order = list(_times(a, t))
        for i in range(t - 1, -1, -1):
            s = order[i]
            if k and i % k == 0:
                h, c = saved[:, i // k, :size], saved[:, i // k, size:]
            else:
                h = y[:, order[i - 1]] if i else h0
                c = records[:, order[i - 1], 4 * size :] if i and cell is LSTM else c0
            if d_y is not None:
                dh = dh + d_y[:, s]
            d, hidden, dh, dc = _back(cell, a, records[:, s], h, c, dh, dc, w_hh)
            dx[:, s] = d @ w_ih
            dw_ih += d.T @ x[:, s]
            dw_hh += hidden.T @ h
            if cell is GRU and not a["reset_after"]:
                dw_hh[2 * size :] += hidden[:, 2 * size :].T @ (records[:, s, 3 * size :] - h)
            db_ih += d.sum(0)
            db_hh += hidden.sum(0)
        work = np.zeros(_work(cell, a, t, size))
        out = [dx, dw_ih, dw_hh, db_ih, db_hh, dh]
        return [*out, dc, work] if cell is LSTM else [*out, work]

    return ref


def _arguments(cell: Cell, more: Sequence[Any]) -> tuple[Any, ...]:
    """b_ih, b_hh, h0, c0, y, saved, d_c of a gradient row's inputs after the weights."""
    more = (*more, *[None] * 7)
    if cell is LSTM:
        return tuple(more[:7])
    return (*more[:3], None, *more[3:5], None)


def _work(cell: Cell, a: Any, t: int, size: int) -> int:
    """Floats that backward works in: gradients of the gates and the state, and a segment's records and states."""
    return (2 * cell.gates + 2 + (cell.record + 1) * a["segment"]) * size


def _saved(cell: Cell, a: Any, n: int, t: int, size: int) -> Type:
    k = a["segment"]
    return Type((n, -(-t // k), cell.states * size) if k else (n, t, cell.record * size))


def _check(cell: Cell, a: Any, x: Type, w_ih: Type, w_hh: Type) -> tuple[int, int, int]:
    """(N, T, H) of a row's arguments."""
    (n, t), (gates, size) = x.shape[:2], w_hh.shape
    if gates != cell.gates * size:
        raise BadInput(
            f"the hidden weight of {cell.name} must have {cell.gates} rows a unit",
            where=str(w_hh),
            number=f"{gates} rows, {size} units",
        )
    if not 0 <= a["segment"] <= t:
        raise BadInput("a segment is no part of the sequence", number=f"{a['segment']} of {t} steps")
    return n, t, size


def _forward_shape(cell: Cell) -> Callable[..., list[Type]]:
    def shape(a: Any, x: Type, w_ih: Type, w_hh: Type, *more: Any) -> list[Type]:
        n, t, size = _check(cell, a, x, w_ih, w_hh)
        last = [Type((n, size))] if cell is LSTM else []
        return [Type((n, t, size)), Type((cell.record * size,)), *last, _saved(cell, a, n, t, size)]

    return shape


def _backward_shape(cell: Cell) -> Callable[..., list[Type]]:
    def shape(a: Any, d_y: Any, x: Type, w_ih: Type, w_hh: Type, *more: Any) -> list[Type]:
        n, t, size = _check(cell, a, x, w_ih, w_hh)
        y, saved = _arguments(cell, more)[4:6]
        want = _saved(cell, a, n, t, size)
        if saved is None or saved.shape != want.shape or (not a["segment"] and y is None):
            raise BadInput(
                f"what {cell.name} saved does not fit the segment",
                number=f"{saved}, must be {want}" + ("" if a["segment"] else ", and the output"),
            )
        bias, state = Type((w_hh.shape[0],)), [Type((n, size))] * cell.states
        return [x, w_ih, w_hh, bias, bias, *state, Type((_work(cell, a, t, size),))]

    return shape


def _forward_cost(cell: Cell) -> Callable[..., Cost]:
    def cost(a: Any, ins: Any, outs: Any) -> Cost:
        steps, size = ins[0].shape[0] * ins[0].shape[1], ins[2].shape[1]
        return Cost(
            mac=steps * (ins[1].size + ins[2].size),
            elementwise=steps * 3 * cell.gates * size,
            transcendental=steps * (5 if cell is LSTM else cell.gates) * size,
        )

    return cost


def _backward_cost(cell: Cell) -> Callable[..., Cost]:
    def cost(a: Any, ins: Any, outs: Any) -> Cost:
        _, x, w_ih, w_hh = ins[:4]
        steps, size = x.shape[0] * x.shape[1], w_hh.shape[1]
        macs = w_hh.size + (w_ih.size if outs[0] else 0) + sum(o.size for o in outs[1:3] if o)
        again = _forward_cost(cell)(a, ins[1:], outs) if a["segment"] else Cost()
        return Cost(
            mac=steps * macs + again.mac,
            elementwise=steps * 8 * cell.gates * size + again.elementwise,
            transcendental=(steps * size if cell is LSTM else 0) + again.transcendental,
        )

    return cost


def _grad(cell: Cell) -> Callable[..., list[str]]:
    def grad(tape: Any, node: Any, d_y: str, *more: str) -> list[str]:
        x, w_ih, w_hh, b_ih, b_hh, h0, c0 = (*node.inputs, *[""] * 4)[:7]
        lstm, k = cell is LSTM, node.attrs["segment"]
        names = (x, w_ih, w_hh, b_ih, b_hh, h0, *([c0] if lstm else []))
        wanted = [bool(n) and tape.wants(n) for n in names]
        one_bias = cell is not GRU or not node.attrs["reset_after"]  # both biases have one gradient
        if one_bias:
            wanted[3:5] = [wanted[3] or wanted[4], False]
        y = "" if k else node.outputs[0]
        saved = y if cell is RNN and not k else tape.keep_output(node, 3 if lstm else 2)
        biases = (b_ih, b_hh) if k else ("", "")
        starts = ("", "") if k else (h0, c0)
        d = tape.emit(
            f"{cell.name}_grad",
            d_y,
            x,
            w_ih,
            w_hh,
            *biases,
            *starts[: cell.states],
            y,
            saved,
            *([more[1]] if lstm else []),
            **node.attrs,
            unused=tuple(i for i, w in enumerate(wanted) if not w),
        )
        found = list(d[: len(names)])
        if one_bias:
            found[3:5] = [found[3] if n and tape.wants(n) else "" for n in (b_ih, b_hh)]
        return found

    return grad


def _couple(call: Call) -> list[Labels]:
    """A hidden unit goes with its row of each gate; the input's features are summed over."""
    (x, _, w_hh, *more), units = call.inputs, call.units
    units.fix(x[1])
    call.meets(1, 1, x[2])
    call.meets(2, 1, w_hh[1])
    hidden = w_hh[1]
    for j in (1, 2):
        units.tie(call.makes(j, 0).reshape(-1, len(hidden)), hidden)
    for labels in filter(None, more):  # biases (G), states (N, H)
        units.tie(labels[-1].reshape(-1, len(hidden)), hidden)
    _, *rest = call.outputs
    last = [([x[0], hidden] if len(t.shape) == 2 else fixed(t.shape)) if t else [] for t in rest]
    return [[x[0], x[1], hidden], *last]


def _attrs(cell: Cell) -> dict[str, Attr]:
    own = {cell.attr: Attr("i", cell.default)} if cell.attr else {}
    return {"reverse": Attr("i", 0), "segment": Attr("i", 0), **own}


def _variants(cell: Cell) -> list[dict[str, int]]:
    own = ({cell.attr: v} for v in (1 - cell.default, cell.default)) if cell.attr else ({}, {})
    return [{"reverse": r, "segment": k, **o} for (r, k), o in zip(((0, 0), (1, 2)), own, strict=True)] + [
        {"reverse": 1, "segment": 0},
        {"reverse": 0, "segment": 3},
        {"reverse": 1, "segment": 5},
    ]


def _shapes(cell: Cell, i: int) -> tuple[tuple[int, ...] | None, ...]:
    n, t, f, h = ((2, 5, 3, 4), (3, 5, 9, 4), (1, 6, 4, 4), (2, 7, 3, 17), (2, 5, 3, 2))[i]
    g = cell.gates * h
    bias, state = [(g,)] * 2 if i != 2 else [None] * 2, [(n, h) if i % 2 == 0 else None] * cell.states
    return ((n, t, f), (g, f), (g, h), *bias, *state)


def _backward_example(cell: Cell, i: int, attrs: dict[str, int]) -> Example:
    x, w_ih, w_hh, *more = _shapes(cell, i)
    assert x and w_hh
    (n, t), h, k = x[:2], w_hh[1], attrs["segment"]
    saved = _saved(cell, attrs, n, t, h).shape
    last = [(n, h) if i % 2 == 0 else None] if cell is LSTM else []
    y = None if k else (n, t, h)
    return Example(((n, t, h), x, w_ih, w_hh, *more, y, saved, *last), attrs, {2: "small", 3: "small"})


def _rows(cell: Cell, doc: str) -> tuple[Row, Row]:
    variants = list(enumerate(_variants(cell)))
    state, last, d_c, d_state = (
        ("NH?, NH?", "NH?, ", ", NH?", "NH?, NH?") if cell is LSTM else ("NH?", "", "", "NH?")
    )
    return (
        Row(
            cell.name,
            f"NTF, GF, GH, G?, G?, {state} -> NTH, L, {last}NSR?",
            doc + " Inputs: x, weights and biases of the input and of the hidden state, initial state."
            " Further outputs: scratch (left zero), "
            + ("the last c, " if cell is LSTM else "")
            + "what backward needs.",
            _forward(cell),
            tuple(Example(_shapes(cell, i), a, {1: "small", 2: "small"}) for i, a in variants),
            attrs=_attrs(cell),
            shape=_forward_shape(cell),
            grad=_grad(cell),
            cost=_forward_cost(cell),
            check=True,
            in_place=(0,),
            couple=_couple,
            roles={1: "weight", 2: "weight", 3: "bias", 4: "bias"},
        ),
        Row(
            f"{cell.name}_grad",
            f"NTH?, NTF, GF, GH, G?, G?, {state}, NTH?, NSR?{d_c} -> NTF?, GF?, GH?, G?, G?, {d_state}, L",
            f"Gradients of {cell.name} back through time: x, weights, biases, initial state; and scratch (left zero).",
            _backward(cell),
            tuple(_backward_example(cell, i, a) for i, a in variants),
            attrs=_attrs(cell),
            shape=_backward_shape(cell),
            cost=_backward_cost(cell),
            check=True,
            in_place=(0, 1),
            no_grad="second derivatives are not needed",
        ),
    )


ROWS = (
    *_rows(LSTM, "LSTM: c = f c + i g, h = o tanh(c); gates of W_ih x + b_ih + W_hh h + b_hh."),
    *_rows(
        GRU,
        "GRU: h = (1 - z) n + z h; the reset gate scales the hidden part of n after its product (reset_after) "
        "or h before it.",
    ),
    *_rows(RNN, "Plain recurrence: h = tanh(W_ih x + b_ih + W_hh h + b_hh), or relu of it."),
)
