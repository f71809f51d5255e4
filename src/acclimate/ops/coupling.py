"""Which channels of a graph's tensors go together: what pruning may remove, and all that it must remove with it.

Each axis of a value carries a label an index. Equal labels are one *unit*, which is there as a whole or not at all.
Label 0 is fixed: an axis of the input or the output, one whose channels an op mixes (softmax, layer norm), one of size
1. A row's `couple` ties the labels of a node's inputs and gives those of its outputs; `narrow` gives the attributes of
the op on what is left. Without a rule an op on whole shapes (`*`) works element by element, and all axes that any other
op meets are fixed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ir import Type
from .row import Row, parse

Labels = list[np.ndarray]  # an array of labels for each axis
_FAR = 1 << 40  # added to what is moved, so that a padding value is not taken for it


class Units:
    """Labels, and which of them are tied: disjoint sets, each known by its smallest label."""

    def __init__(self) -> None:
        self._parent = [0]
        self.made: list[tuple[str, np.ndarray]] = []  # (tensor, the units that its layer makes)
        self.met: list[tuple[str, np.ndarray]] = []  # (tensor, the units that its layer sums over)

    def fresh(self, count: int) -> np.ndarray:
        """Labels that nothing ties yet."""
        first = len(self._parent)
        self._parent += range(first, first + count)
        return np.arange(first, first + count)

    def axes(self, shape: Sequence[int]) -> Labels:
        """Of a parameter or constant: free along each axis."""
        return [self.fresh(n) if n > 1 else np.zeros(1, np.int64) for n in shape]

    def find(self, labels: np.ndarray) -> np.ndarray:
        """For each label the one that its unit is known by."""
        return np.array([self._find(n) for n in labels.ravel().tolist()], np.int64).reshape(labels.shape)

    def _find(self, n: int) -> int:
        while self._parent[n] != n:
            self._parent[n] = self._parent[self._parent[n]]
            n = self._parent[n]
        return n

    def tie(self, a: np.ndarray, b: Any) -> np.ndarray:
        """Let labels that stand side by side be of one unit; returns a."""
        for n, m in zip(*(v.ravel().tolist() for v in np.broadcast_arrays(a, b)), strict=True):
            n, m = self._find(n), self._find(m)
            self._parent[max(n, m)] = min(n, m)
        return a

    def fix(self, *axes: np.ndarray) -> None:
        for labels in axes:
            self.tie(labels, 0)


def fixed(shape: Sequence[int]) -> Labels:
    return [np.zeros(n, np.int64) for n in shape]


@dataclass(frozen=True)
class Call:
    """A node as its rule sees it. `inputs`: [] for one that is absent; `outputs`: None for one that was left out."""

    units: Units
    row: Row
    attrs: Mapping[str, Any]
    names: Sequence[str]
    inputs: Sequence[Labels]
    outputs: Sequence[Type | None]

    def makes(self, j: int, axis: int) -> np.ndarray:
        """The axis of weight j along which its layer makes channels."""
        self.units.made.append((self.names[j], self.inputs[j][axis]))
        return self.inputs[j][axis]

    def meets(self, j: int, axis: int, other: np.ndarray) -> None:
        """Tie the axis of weight j over which its layer sums to what it meets there."""
        self.units.met.append((self.names[j], self.inputs[j][axis]))
        self.units.tie(self.inputs[j][axis], other)


def outputs_of(call: Call) -> list[Labels]:
    """Labels of a node's outputs, by its row; its inputs are tied by the way."""
    if call.row.couple is not None:
        return call.row.couple(call)
    ins, outs = parse(call.row.signature)
    if ins and all(p.dims in ("*", "1") for p in (*ins, *outs)):
        return by_letters(call)
    call.units.fix(*(axis for labels in call.inputs for axis in labels))
    return [fixed(t.shape) if t else [] for t in call.outputs]


# -- rules ---------------------------------------------------------------------------------------------------------


def by_letters(call: Call) -> list[Labels]:
    """Axes of one letter in the signature go together; those that no letter names are fixed.

    For rows that keep channels apart: a channel of y depends on the same channel of x and on no other.
    """
    ins, outs = parse(call.row.signature)

    def keys(dims: str, rank: int) -> Sequence[Any]:
        if dims == "*":
            return range(rank)
        head, _, tail = dims.partition("~")
        return [*head, *"1" * (rank - len(head) - len(tail)), *tail]

    known: dict[Any, np.ndarray] = {}
    for pattern, labels in zip(ins, call.inputs, strict=False):
        for key, axis in zip(keys(pattern.dims, len(labels)), labels, strict=True):
            if key == "1":
                call.units.fix(axis)
            else:
                known[key] = call.units.tie(known.get(key, axis), axis)

    def labels_of(dims: str, shape: Sequence[int]) -> Labels:
        found = zip(keys(dims, len(shape)), shape, strict=True)
        return [np.zeros(n, np.int64) if k == "1" else known[k] for k, n in found]

    return [labels_of(p.dims, t.shape) if t else [] for p, t in zip(outs, call.outputs, strict=True)]


def elementwise(call: Call) -> list[Labels]:
    """Element by element, with broadcasting."""
    (first, *rest), given = call.outputs, [labels for labels in call.inputs if labels]
    assert first is not None
    rank = len(first.shape)
    whole = [[np.zeros(1, np.int64)] * (rank - len(labels)) + labels for labels in given]
    y = [_side_by_side(call.units, [axes[i] for axes in whole], n) for i, n in enumerate(first.shape)]
    return [y, *(y if t else [] for t in rest)]


def _side_by_side(units: Units, axes: Sequence[np.ndarray], size: int) -> np.ndarray:
    """One axis of several tensors, of which those of size 1 are stretched."""
    first, *others = [a for a in axes if len(a) == size]
    for other in others:
        units.tie(first, other)
    return first


def joined(call: Call) -> list[Labels]:
    """Concatenated along the attribute `axis`."""
    (y,), at = call.outputs, call.attrs["axis"]
    assert y is not None
    parts = [[labels[i] for labels in call.inputs] for i in range(len(y.shape))]
    return [
        [
            np.concatenate(part) if i == at else _side_by_side(call.units, part, y.shape[i])
            for i, part in enumerate(parts)
        ]
    ]


def reduced(call: Call) -> list[Labels]:
    """A sum or mean over the axes of the bit mask `axes`."""
    bits, out = call.attrs["axes"], []
    for i, axis in enumerate(call.inputs[0]):
        if not bits >> i & 1:
            out.append(axis)
            continue
        call.units.fix(axis)
        if call.attrs["keep"]:
            out.append(np.zeros(1, np.int64))
    return [out]


def rowwise(call: Call) -> list[Labels]:
    """Along the last axis everything depends on everything; the other axes stay apart."""
    call.units.fix(*(labels[-1] for labels in call.inputs if labels))
    return [call.inputs[0][: len(t.shape)] if t else [] for t in call.outputs]


def moved(call: Call) -> list[Labels]:
    """The first input's elements in other places: the row's reference moves their labels.

    An axis that is cut into several stays free along the largest, and is tied along the others (one choice for all
    heads of an attention); of two free axes that become one, both are fixed.
    """
    units, labels = call.units, call.inputs[0]
    (out,) = call.outputs
    assert out is not None
    shape, rank = [len(a) for a in labels], len(labels)
    y = fixed(out.shape)
    taken = set()
    for a, axis in enumerate(labels):
        roots = units.find(axis)
        if not roots.any():
            continue
        index = np.broadcast_to(
            np.arange(shape[a]).reshape([-1 if i == a else 1 for i in range(rank)]), shape
        )
        source = np.asarray(call.row.ref(call.attrs, index + _FAR)[0]) - _FAR
        there = source >= 0
        found = np.where(there, roots[np.where(there, source, 0)], -1)
        spread = [b for b in range(found.ndim) if _varies(found, b)]
        if not spread:  # one unit alone cannot be removed
            units.fix(axis)
            continue
        b = max(spread, key=lambda i: found.shape[i])
        slabs = np.moveaxis(found, b, 0).reshape(found.shape[b], -1)
        new = slabs.max(1)
        for slab, label in zip(slabs, new, strict=True):
            units.tie(np.unique(slab[slab >= 0]), label)
        padding = new < 0
        new[padding] = units.fresh(int(padding.sum()))
        if b in taken:
            units.fix(new, y[b])
        else:
            y[b] = new
            taken.add(b)
    return [y]


def _varies(labels: np.ndarray, axis: int) -> bool:
    """Whether labels differ along an axis, where there are any (from 0)."""
    least = np.where(labels < 0, np.iinfo(labels.dtype).max, labels).min(axis)
    return bool((labels.max(axis) > least).any())
