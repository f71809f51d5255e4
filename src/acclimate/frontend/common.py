"""What both front ends share: the Builder, batch-independent shapes, and lowerings to the op table.

A front end walks a foreign graph and calls functions of this module on *things*: a `Ref` (name of a value in the
Graph), a numpy array (a constant, not yet in the Graph), or a Python number. Constants are folded on the way.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from ..errors import BadInput, Unsupported
from ..ir import Dim, Graph, Node, reachable
from ..ops import TABLE, emit, parse, verify, with_batch
from ..ops.arithmetic import mask
from ..ops.row import MAX_ARGS

#: Graphs are built at this batch, which no size of a model equals or divides, and re-instantiated at the end.
BASE_BATCH = 1_000_003
#: Stands for infinity in constants (masks), so that nothing downstream meets inf - inf.
LARGE = 1e30
#: A tile is a concatenation: so many copies along an axis at most.
MOST_COPIES = 1024


#: Rewrites that both front ends name.
RECURRENT = (
    "recurrent layers are not taken yet; a 1-D convolution or attention over the sequence needs less memory"
)
OUTSIDE = "do it on the model's output, outside of the model"
#: What a foreign node that could not be taken stands for.
LOST = object()


class Ref(str):
    """Name of a value in the Graph being built."""


class Constant(np.ndarray):
    """A constant array that may know the user's name for it."""

    stem = ""


def constant(array: Any, stem: str = "") -> Constant:
    """`array` as a Constant called `stem`."""
    out = np.array(array).view(Constant)
    out.stem = stem
    return out


class Size(Dim):
    """A Dim that survives multiplication, and knows where in its axis the batch lies: outer * batch * inner."""

    outer: int

    def __new__(cls, coefficient: int, outer: int = 1) -> Size:
        self = cast("Size", super().__new__(cls, coefficient, BASE_BATCH))
        self.outer = outer
        return self

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, (Dim, float)) or int(other) < 1:
            return int(self) * (other if isinstance(other, float) else int(other))
        return Size(self.coefficient * int(other))

    __rmul__ = __mul__

    def __add__(self, other: Any) -> Any:
        if isinstance(other, Size):
            return Size(self.coefficient + other.coefficient)
        return self if other == 0 else int(self) + other

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        if isinstance(other, Size) and self.coefficient > other.coefficient:
            return Size(self.coefficient - other.coefficient)
        return self if other == 0 else int(self) - other

    def __floordiv__(self, other: Any) -> Any:
        if isinstance(other, (Dim, float)) or not other or self.coefficient % int(other):
            return int(self) // (other if isinstance(other, float) else int(other))
        return Size(self.coefficient // int(other))


class Untaken(Exception):
    """A node that cannot be taken, and why. `batch`: another reading of a baked-in batch may help."""

    def __init__(self, why: str, batch: bool = False) -> None:
        super().__init__(why)
        self.why, self.batch = why, batch


class Retry(Exception):
    """The reading of an ambiguous baked-in batch led nowhere; another one is open."""


class UnsupportedNode(NamedTuple):
    """One line of `Unsupported.nodes`."""

    op: str
    where: str
    why: str
    rewrite: str

    def __str__(self) -> str:
        return f"{self.op} at {self.where or 'an unknown place'}: {self.why}" + (
            f"; rewrite: {self.rewrite}" if self.rewrite else ""
        )


@dataclass(frozen=True)
class Erf:
    """scale * erf(source) + shift, which only a GELU may use."""

    source: Ref
    scale: float = 1.0
    shift: float = 0.0


@dataclass(frozen=True)
class Compared:
    """source > bound (or its negation), which only a piecewise function that the table has may use."""

    source: Ref
    bound: float
    above: bool


@dataclass
class Builder:
    """A Graph under construction.

    `baked`: the batch that the foreign model's literal shapes hold, None where they hold none.
    `choices`: which reading to take at each ambiguous shape; `readings`: which was taken, out of how many;
    `settled`: fail rather than try another one.
    """

    baked: int | None = None
    choices: tuple[int, ...] = ()
    graph: Graph = field(default_factory=lambda: Graph(BASE_BATCH))
    where: str = ""
    stem: str = ""
    failures: list[UnsupportedNode] = field(default_factory=list)
    settled: bool = False
    readings: list[tuple[int, int]] = field(default_factory=list)
    made: dict[str, Node] = field(default_factory=dict)
    learned: set[str] = field(default_factory=set)  # values that depend on a parameter
    constants: dict[Any, str] = field(default_factory=dict)
    shared: set[str] = field(default_factory=set)  # values that the foreign graph uses more than once
    dropouts: int = 0

    # -- values ------------------------------------------------------------------------------------------------
    def input(self, shape: Sequence[int]) -> Ref:
        return Ref(self.graph.input("x", (Size(1), *(int(s) for s in shape[1:]))))

    def parameter(self, name: str, data: np.ndarray) -> Ref:
        """A parameter under the user's name."""
        self.learned.add(name)
        return Ref(self.graph.persistent(name, data))

    def state(self, data: Any, stem: str) -> Ref:
        """A persistent value that the model keeps track of, such as a running mean."""
        name = getattr(data, "stem", "") or self.graph.fresh(f"{self.stem}.{stem}" if self.stem else stem)
        if name not in self.graph.values:
            self.graph.persistent(name, np.asarray(data), "state")
        return Ref(name)

    def value(self, thing: Any) -> Ref:
        """The thing as a value of the Graph; equal constants are one value."""
        if isinstance(thing, Ref):
            return thing
        if isinstance(thing, Erf):
            raise Untaken("erf is only taken as a part of GELU, x * (1 + erf(x / sqrt(2))) / 2")
        if isinstance(thing, Compared):
            raise Untaken("a comparison that depends on the data")
        if isinstance(thing, Dim):
            raise Untaken("the batch size is used as a number")
        data = np.asarray(thing)
        if data.dtype.kind not in "biuf":
            raise Untaken(f"a constant of type {data.dtype}")
        data = np.clip(data.astype(np.float32), -LARGE, LARGE)
        key = (data.shape, data.tobytes())
        if key not in self.constants:
            stem = getattr(thing, "stem", "") or f"{self.stem or 'model'}.constant"
            self.constants[key] = self.graph.constant(stem, data)
        return Ref(self.constants[key])

    def shape(self, thing: Any) -> tuple[int, ...]:
        return tuple(self.graph.shape(thing)) if isinstance(thing, Ref) else np.shape(thing)

    def length(self, thing: Any, axis: int) -> int:
        """The size of an axis that must not be the batch."""
        size = self.shape(thing)[axis]
        if isinstance(size, Dim):
            raise Untaken("the batch lies where a fixed size is needed", batch=True)
        return int(size)

    def emit(self, op: str, *things: Any, **attrs: Any) -> Any:
        """Add a node; its output's Ref (its first output's where the others are optional)."""
        inputs = [self.value(t) if t is not None else "" for t in things]
        name = f"{self.stem}.{op}" if self.stem else op
        try:
            out = emit(self.graph, op, *inputs, name=name, where=self.where, **attrs)
        except BadInput as error:
            raise Untaken(
                f"{error.what} ({error.number})" if error.number else error.what, batch=True
            ) from error
        node = self.graph.nodes[-1]
        self.made.update({n: node for n in node.outputs if n})
        if any(n in self.learned for n in inputs):
            self.learned.update(n for n in node.outputs if n)
        if self.readings:
            self._check_samples_apart(node)
        return Ref(out if isinstance(out, str) else out[0])

    def producer(self, thing: Any, op: str) -> Node | None:
        """The node that made `thing`, where it is an `op`."""
        node = self.made.get(thing) if isinstance(thing, str) else None
        return node if node is not None and node.op == op else None

    def _check_samples_apart(self, node: Node) -> None:
        """A guess at where the batch lies was wrong if it lets the samples of a batch mix."""

        def marked(name: str) -> list[int]:
            return [i for i, s in enumerate(self.graph.shape(name)) if isinstance(s, Dim)]

        ins, out = [marked(n) for n in node.inputs if n], marked(node.outputs[0])
        pattern = parse(TABLE[node.op].signature)[0][0].dims
        last = len(self.graph.shape(node.outputs[0])) - 1
        if any(ins) and (
            len(out) != 1 or (pattern.startswith("N") and ins[0] != [0]) or (pattern == "~D" and last in out)
        ):
            raise Untaken("the samples of a batch would mix", batch=True)

    # -- what could not be taken ---------------------------------------------------------------------------------
    def fail(self, op: str, error: Untaken, rewrite: str = "") -> None:
        """Remember a node that cannot be taken; Retry where another reading of the batch is open."""
        if error.batch:
            self._retry()
        self.failures.append(UnsupportedNode(op, self.where, error.why, rewrite))

    def _retry(self) -> None:
        if not self.settled and any(c + 1 < n for c, n in self.readings):
            raise Retry

    def choose(self, count: int) -> int:
        """Which of `count` readings of an ambiguous shape to take."""
        if count == 1:
            return 0
        chosen = self.choices[len(self.readings)] if len(self.readings) < len(self.choices) else 0
        self.readings.append((chosen, count))
        return chosen

    def next_choices(self) -> tuple[int, ...]:
        """The choices for the next attempt: the last one that has another reading moves on."""
        readings = list(self.readings)
        while readings[-1][0] + 1 >= readings[-1][1]:
            readings.pop()
        return (*(c for c, _ in readings[:-1]), readings[-1][0] + 1)

    def finish(self, output: Any, batch: int, aliases: dict[str, str], source: str) -> Graph:
        """The verified Graph at the given batch, without what the output does not need."""
        if self.failures:
            raise unsupported(self.failures, source)
        if not isinstance(output, Ref):
            raise BadInput("the model's output does not depend on its input", where=source)
        g = self.graph
        g.outputs = {"output": str(output)}
        g.nodes = reachable(g, [output])
        used = {n for node in g.nodes for n in (*node.inputs, *node.outputs)} | {output, *g.inputs.values()}
        g.values = {k: v for k, v in g.values.items() if k in used}
        g.aliases = {k: v for k, v in aliases.items() if v in g.values}
        try:
            verify(g, "import")
            for n in (2, 3):
                verify(with_batch(g, n), f"setting the batch to {n}")
        except BadInput as error:
            self._retry()
            raise Unsupported(
                "the model's shapes do not follow its batch size",
                where=error.where or source,
                number=error.what,
                action="export the model with a dynamic batch dimension",
            ) from error
        rows = self.shape(output)[:1]
        if not rows or not isinstance(rows[0], Dim) or (self.readings and rows[0].coefficient != 1):
            self._retry()
            raise Unsupported(
                "the model's output does not have a row a sample",
                where=source,
                number=f"{g.type(output)} for x {g.type(g.inputs['x'])}",
                action="return a tensor whose axis 0 is the batch",
            )
        return with_batch(g, batch)


def unsupported(nodes: Sequence[UnsupportedNode], source: str) -> Unsupported:
    """One error that lists all nodes that cannot be taken."""
    return Unsupported(
        f"{len(nodes)} node{'s' * (len(nodes) > 1)} of the model cannot be taken",
        where=source,
        number="".join(f"\n  {node}" for node in nodes) + "\n",
        action="rewrite these lines of the model and export it again",
        nodes=tuple(nodes),
    )


def attempts(convert: Callable[[Builder], Graph], baked: int | None, limit: int = 200) -> Graph:
    """What `convert` makes of a Builder, tried with each reading of a baked-in batch until none contradicts itself."""
    choices: tuple[int, ...] = ()
    for _ in range(limit):
        b = Builder(baked, choices)
        try:
            return convert(b)
        except Retry:
            choices = b.next_choices()
    return convert(Builder(baked, settled=True))


def check_file(path: Any, what: str) -> Path:
    """The path of a file that is there and not empty."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"there is no {what} file here", where=str(path), action="check the path")
    if path.stat().st_size == 0:
        raise BadInput(
            f"the {what} file is empty", where=str(path), number="0 bytes", action="export the model again"
        )
    return path


def first_line(error: BaseException) -> str:
    """The kind of an exception and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def is_library(file: str) -> bool:
    """Whether a source file is torch's or ours rather than the user's."""
    file = file.replace("\\", "/")
    return "/torch/" in file or "/acclimate/frontend/" in file or "<" in file


def user_line(trace: str) -> str:
    """The innermost of the user's own source lines in a stack trace, or nothing."""
    found = re.findall(r'File "([^"]+)", line (\d+), in (\S+)(?:\n\s*(.*))?', trace)
    for file, line, function, text in reversed(found):
        if not is_library(file):
            return f"{Path(file).name}:{line}, in {function}{': ' if text else ''}{text.strip()}"
    return ""


# -- shapes: reshape, transpose, slice, join -----------------------------------------------------------------------


def batch_readings(
    before: int,
    baked: int,
    source: Sequence[int],
    target: Sequence[int],
    free: int = -1,
) -> list[tuple[int, int]]:
    """Where in `target` the batch can lie, likeliest first: (axis, factor of that axis in front of the batch).

    `before`: product of the sizes in front of the batch, the same on both sides of a reshape. `source` and `target`
    hold concrete sizes at the batch `baked`; `free`: the axis that the user left open. Likeliest is an axis that is
    the batch and nothing else; then, where the reshape splits what follows the batch (into heads), that part of it;
    then what precedes it (tokens).
    """
    cuts = set(np.multiply.accumulate([int(s) for s in source]))
    splits = any(
        cut > before * baked and cut not in cuts for cut in np.multiply.accumulate([int(t) for t in target])
    )
    found, prefix = [], 1
    for axis, size in enumerate(target):
        outer = before // prefix
        if before % prefix == 0 and size % (outer * baked) == 0:
            found.append((size != baked or outer != 1, axis != free, -axis if splits else axis, axis, outer))
        prefix *= size
    found.sort()
    if baked > 1 and found and not found[0][0]:
        found = found[:1]
    return [(axis, outer) for *_, axis, outer in found]


def _fill(target: Sequence[int], total: int) -> list[int]:
    """`target` with its -1 worked out."""
    if list(target).count(-1) > 1:
        raise Untaken(f"a reshape to {tuple(target)}")
    rest = math.prod(s for s in target if s != -1)
    return [(total // rest if rest else 0) if s == -1 else s for s in target]


def reshape(b: Builder, x: Any, target: Sequence[int]) -> Any:
    """x under another shape, which may hold one -1 and, where the model was exported so, a baked-in batch."""
    shape = b.shape(x)
    marked = [i for i, s in enumerate(shape) if isinstance(s, Dim)]
    target = [t if isinstance(t, Dim) else operator.index(t) for t in target]
    if not marked or len(marked) > 1:
        return view(b, x, _fill(target, math.prod(shape)))
    mark = shape[marked[0]]
    before = math.prod(shape[: marked[0]]) * getattr(mark, "outer", 1)
    exact = _fill(target, math.prod(shape))
    if b.baked is None or any(isinstance(t, Dim) for t in target):
        if math.prod(exact) != math.prod(shape):
            raise Untaken(f"a reshape of {b.graph.type(x)} to {tuple(target)}", batch=True)
        prefix = 1
        for i, size in enumerate(exact):
            if isinstance(size, Dim):
                if before % prefix:
                    raise Untaken(f"a reshape that moves the batch within {b.graph.type(x)}", batch=True)
                exact[i] = Size(size.coefficient, before // prefix)
                break
            prefix *= size
        return view(b, x, exact)
    source = [s.coefficient * b.baked if isinstance(s, Dim) else s for s in shape]
    total = math.prod(source)
    literal = _fill(target, total)
    if math.prod(literal) != total:
        raise Untaken(f"a reshape of {b.graph.type(x)} to {tuple(target)} at batch {b.baked}", batch=True)
    readings = batch_readings(before, b.baked, source, literal, target.index(-1) if -1 in target else -1)
    if not readings:
        raise Untaken(f"no axis of {tuple(target)} can hold the batch of {b.graph.type(x)}", batch=True)
    axis, outer = readings[b.choose(len(readings))]
    literal[axis] = Size(literal[axis] // b.baked, outer)
    return view(b, x, literal)


def view(b: Builder, x: Any, shape: Sequence[int]) -> Any:
    """x under a shape that is known exactly; reshapes in a row become one."""
    if not isinstance(x, Ref):
        return constant(np.reshape(x, shape), getattr(x, "stem", ""))
    before = b.producer(x, "reshape")
    if before is not None:
        x = Ref(before.inputs[0])
    if tuple(shape) == b.shape(x):
        return x
    return b.emit("reshape", x, shape=tuple(shape))


def transpose(b: Builder, x: Any, perm: Sequence[int]) -> Any:
    """Permute the axes; axes of size one move for free, and permutations in a row become one."""
    perm = tuple(p % len(perm) for p in perm)
    if not isinstance(x, Ref):
        return np.transpose(x, perm)
    shape = b.shape(x)
    target = [shape[p] for p in perm]
    real = [i for i, s in enumerate(shape) if s != 1]
    moved = [real.index(p) for p in perm if p in real]
    x = view(b, x, [shape[i] for i in real])
    before = b.producer(x, "transpose")
    if before is not None:
        x, moved = Ref(before.inputs[0]), [before.attrs["perm"][p] for p in moved]
    if moved != sorted(moved):
        x = b.emit("transpose", x, perm=tuple(moved))
    return view(b, x, target)


def swap(b: Builder, x: Any, i: int, j: int) -> Any:
    """Exchange two axes."""
    perm = list(range(len(b.shape(x))))
    if perm:
        perm[i], perm[j] = perm[j], perm[i]
    return transpose(b, x, perm)


def to_last(b: Builder, x: Any, axis: int) -> tuple[Any, list[int]]:
    """x with `axis` moved to the end, and the permutation that moves it back."""
    rank = len(b.shape(x))
    axis %= rank
    perm = [i for i in range(rank) if i != axis] + [axis]
    return transpose(b, x, perm), [int(i) for i in np.argsort(perm)]


def unsqueeze(b: Builder, x: Any, axes: Sequence[int]) -> Any:
    """New axes of size one, counted in the result."""
    rank = len(b.shape(x)) + len(axes)
    new, old = {a % rank for a in axes}, iter(b.shape(x))
    return view(b, x, [1 if i in new else next(old) for i in range(rank)])


def squeeze(b: Builder, x: Any, axes: Sequence[int] | None) -> Any:
    """Drop axes of size one; axes that are larger stay."""
    shape = b.shape(x)
    chosen = range(len(shape)) if axes is None else {a % len(shape) for a in axes}
    return view(b, x, [s for i, s in enumerate(shape) if i not in chosen or isinstance(s, Dim) or s != 1])


def flatten(b: Builder, x: Any, first: int, last: int) -> Any:
    """Merge the axes first..last into one."""
    shape = list(b.shape(x)) or [1]
    first, last = first % len(shape), last % len(shape)
    return _merge(b, x, shape, first, last)


def _merge(b: Builder, x: Any, shape: list[int], first: int, last: int) -> Any:
    """The axes first..last as one, which knows where in it the batch lies."""
    size = math.prod(shape[first : last + 1])
    for i in range(first, last + 1):
        if isinstance(shape[i], Dim) and isinstance(size, Dim):
            size = Size(size.coefficient, math.prod(shape[first:i]) * getattr(shape[i], "outer", 1))
    return view(b, x, [*shape[:first], size, *shape[last + 1 :]])


def part(b: Builder, x: Any, start: Sequence[int], step: Sequence[int], size: Sequence[int]) -> Any:
    """A regular part of x: `size` elements from `start` with `step` along each axis."""
    if not isinstance(x, Ref):
        return np.asarray(x)[
            tuple(slice(s, s + (n - 1) * t + 1, t) for s, t, n in zip(start, step, size, strict=True))
        ]
    shape = b.shape(x)
    if tuple(size) == shape:
        return x
    if any(n < 1 for n in size):
        raise Untaken(f"an empty slice of {b.graph.type(x)}")
    before = b.producer(x, "transpose")
    if before is not None:  # cut first where nothing is left to permute then
        perm = before.attrs["perm"]
        moved = [p for p, n in zip(perm, size, strict=True) if n != 1]
        if moved == sorted(moved):
            inverse = [perm.index(i) for i in range(len(perm))]
            cut = part(b, Ref(before.inputs[0]), *([v[i] for i in inverse] for v in (start, step, size)))
            return transpose(b, cut, perm)
    return b.emit("slice", x, start=tuple(map(int, start)), step=tuple(map(int, step)), size=tuple(size))


def slice_axis(b: Builder, x: Any, axis: int, start: int | None, end: int | None, step: int = 1) -> Any:
    """x[start:end:step] along one axis, with Python's meaning of negative and too large bounds."""
    shape = list(b.shape(x))
    axis %= len(shape)
    if step < 1:
        raise Untaken("a slice with a negative step")
    whole = isinstance(shape[axis], Dim)
    if whole and step == 1 and start in (None, 0) and (end is None or end >= shape[axis]):
        return x
    at = slice(start, end, step).indices(int(shape[axis]))
    start, count = at[0], len(range(*at))
    if whole and count * 2 > shape[axis] // BASE_BATCH:
        raise Untaken("a slice along the batch")
    sizes = list(shape)
    sizes[axis] = count
    starts, steps = [0] * len(shape), [1] * len(shape)
    starts[axis], steps[axis] = start, step
    return part(b, x, starts, steps, sizes)


def select(b: Builder, x: Any, axis: int, index: int) -> Any:
    """x at one index of an axis, which is dropped."""
    shape = b.shape(x)
    axis %= len(shape)
    index = int(index)
    if isinstance(shape[axis], Dim) and index < 0:
        raise Untaken("a sample of the batch is picked from its end")
    index = index + shape[axis] if index < 0 else index
    return squeeze(b, slice_axis(b, x, axis, index, index + 1), [axis])


def split(b: Builder, x: Any, axis: int, sizes: Sequence[int]) -> tuple[Any, ...]:
    """Consecutive parts of the given sizes along an axis."""
    if isinstance(b.shape(x)[axis], Dim):
        raise Untaken("the batch is split")
    ends = np.cumsum(sizes)
    return tuple(slice_axis(b, x, axis, int(e - n), int(e)) for e, n in zip(ends, sizes, strict=True))


def _like(b: Builder, x: Any, axis: int, size: int) -> Any:
    """x with its `axis` stretched to `size`, undoing a stretch to the baked-in batch first."""
    shape = list(b.shape(x))
    if shape[axis] != 1:
        before = b.producer(x, "expand")
        if not isinstance(x, Ref) and np.ptp(np.asarray(x), axis=axis).max(initial=0) == 0:
            x = np.take(np.asarray(x), [0], axis)
        elif before is not None and (1, *b.shape(Ref(before.inputs[0])))[axis - len(shape)] == 1:
            small = [1 if i == axis else s for i, s in enumerate(shape)]
            x = expand(b, Ref(before.inputs[0]), small)
        else:
            raise Untaken(f"an axis of {shape[axis]} meets the batch", batch=True)
        shape[axis] = 1
    shape[axis] = size
    return expand(b, x, shape)


def concat(b: Builder, things: Sequence[Any], axis: int) -> Any:
    """Join along an axis; where some hold the batch and others are the same for all samples, these are repeated."""
    things = [t for t in things if b.shape(t) != (0,)]
    rank = len(b.shape(things[0]))
    axis %= rank
    if not any(isinstance(t, Ref) for t in things):
        return np.concatenate(things, axis)
    for i in range(rank):
        marks = [b.shape(t)[i] for t in things if isinstance(b.shape(t)[i], Dim)]
        if i != axis and marks:
            things = [t if isinstance(b.shape(t)[i], Dim) else _like(b, t, i, marks[0]) for t in things]
    most = MAX_ARGS - 2
    while len(things) > 1:
        things = [
            b.emit("concat", *things[i : i + most], axis=axis) if len(things[i : i + most]) > 1 else things[i]
            for i in range(0, len(things), most)
        ]
    return things[0]


def expand(b: Builder, x: Any, target: Sequence[int]) -> Any:
    """Repeat along axes of size one; -1 keeps an axis."""
    shape = b.shape(x)
    new = len(target) - len(shape)
    if new < 0:
        raise Untaken(f"an expand of {shape} to {tuple(target)}")
    padded = (1,) * new + shape
    out = []
    for have, want in zip(padded, target, strict=True):
        same = want == -1 or (
            isinstance(have, Dim) and b.baked is not None and want in (1, have.coefficient * b.baked)
        )
        out.append(have if same or have == want else want)
    if not isinstance(x, Ref) and not any(isinstance(s, Dim) for s in out):
        return np.broadcast_to(x, out)
    if tuple(out) == padded:
        return view(b, x, out)
    return b.emit("expand", x, shape=tuple(out))


def repeat(b: Builder, x: Any, times: Sequence[int]) -> Any:
    """Tile x: `times` an axis, new axes in front."""
    x = unsqueeze(b, x, range(len(times) - len(b.shape(x))))
    for axis, n in enumerate(times):
        shape = list(b.shape(x))
        if shape[axis] == 1 and n != 1:
            x = expand(b, x, [n if i == axis else s for i, s in enumerate(shape)])
        elif n > MOST_COPIES:
            raise Untaken(f"it repeats {n} times, and at most {MOST_COPIES} are taken")
        elif n != 1:
            x = concat(b, [x] * int(n), axis)
    return x


def pad(b: Builder, x: Any, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> Any:
    """Surround with a constant; negative padding cuts."""
    shape = b.shape(x)
    if min(*before, *after, 0) < 0:
        low = [max(-v, 0) for v in before]
        size = [s - lo - max(-v, 0) if lo or v < 0 else s for s, lo, v in zip(shape, low, after, strict=True)]
        x = part(b, x, low, [1] * len(shape), size)
    before, after = [max(int(v), 0) for v in before], [max(int(v), 0) for v in after]
    if not any((*before, *after)):
        return x
    if not isinstance(x, Ref):
        return np.pad(x, list(zip(before, after, strict=True)), constant_values=value)
    if any(n and isinstance(s, Dim) for s, p, q in zip(shape, before, after, strict=True) for n in (p, q)):
        raise Untaken("padding along the batch")
    return b.emit(
        "pad", x, before=tuple(before), after=tuple(after), value=float(np.clip(value, -LARGE, LARGE))
    )


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
                things[me] = _like(b, things[me], i % len(b.shape(things[me])), sizes[other])
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
    y = _merge(b, view(b, y, whole), whole, 0, max(len(lead) - 1, 0))
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
        return squeeze_exactly(b, matmul(b, unsqueeze(b, x, [0]), y), -2)
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
            _like(b, t, i, s) if isinstance(s, Dim) and not isinstance(b.shape(t)[i], Dim) else t
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
    if causal:
        bias = np.tril(np.ones((b.length(q, -2), b.length(k, -2)), np.bool_))
    if bias is not None and not isinstance(bias, Ref) and np.asarray(bias).dtype == np.bool_:
        bias = np.where(bias, 0.0, -LARGE).astype(np.float32)
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
                _merge(b, thing, shape, i, i + len(group) - 1)
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
