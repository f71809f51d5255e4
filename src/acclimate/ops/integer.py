"""From a float graph with quantised points to int8: which integer row stands in for which float row.

A graph says what is quantised by itself: where a value passes `quantize` and `dequantize`, and where a weight has a
`quant`, or passes a row that `fakes` one while it learns. Such a graph runs as it is (fake quantisation); `lower` turns
whatever lies between two such points and has an integer form into integer rows, and leaves the rest in float.
Calibration and files of other tools both end here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ..errors import BadInput
from ..ir import Graph, Node, Quant, Type, Value
from . import TABLE, emit, parse, verify
from .arithmetic import axes_of
from .quantized import HIGH, LOW, add_attrs, conv_attrs, half_away, multiplier

MOST = 2**31 - 1  # of an accumulator
LEAST = 1e-12  # of the scale of a weight
STEP = 1e-5  # of the differences that give the slopes of a table


class Int(NamedTuple):
    """An int8 value of a graph, and the numbers scale * (q - zero) that it stands for."""

    name: str
    scale: float
    zero: int

    @property
    def quant(self) -> Quant:
        return Quant(np.array([self.scale]), self.zero)


# -- numbers -------------------------------------------------------------------------------------------------------


def to_int8(x: Any, scale: float, zero: int) -> np.ndarray:
    """The int8 that stand for the numbers x, saturated."""
    return np.clip(half_away(np.asarray(x, np.float64) / scale) + zero, LOW, HIGH).astype(np.int8)


def affine(low: float, high: float) -> tuple[float, int]:
    """(scale, zero) of int8 for numbers from low to high: the range is widened to hold 0, and 0 is exact."""
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise BadInput("a range is not finite", number=f"{low} to {high}", action="look for NaN in the data")
    if high - low < np.finfo(np.float32).tiny * 256:  # a value that is always 0
        high = low + 1.0
    scale = float(np.float32((high - low) / (HIGH - LOW)))
    return scale, int(np.clip(half_away(LOW - low / scale), LOW, HIGH))


# -- what has an integer form --------------------------------------------------------------------------------------


def _known(graph: Graph, name: str) -> bool:
    return bool(name) and graph.values[name].data is not None


def _is_conv(graph: Graph, node: Node) -> bool:
    return _known(graph, node.inputs[1]) and all(_known(graph, n) for n in node.inputs[2:] if n)


def _is_linear(graph: Graph, node: Node) -> bool:
    return _is_conv(graph, node) and not node.attrs["ta"] and len(graph.shape(node.inputs[1])) == 2


def _is_sum(graph: Graph, node: Node) -> bool:
    a, b = node.inputs
    alike = tuple(graph.shape(a)) == tuple(graph.shape(b))
    return alike and not _known(graph, a) and not _known(graph, b)


def _is_spatial_mean(graph: Graph, node: Node) -> bool:
    shape = graph.shape(node.inputs[0])
    axes = axes_of(node.attrs["axes"], len(shape))
    return len(shape) in (3, 4) and axes == tuple(range(2, len(shape)))


#: float row -> (what its integer form needs, whether this node can have it)
_FORMS: Mapping[str, tuple[str, Any]] = {
    "conv": ("weighted", _is_conv),
    "matmul": ("weighted", _is_linear),
    "add": ("sum", _is_sum),
    "avg_pool": ("keep", lambda graph, node: True),
    "mean": ("keep", _is_spatial_mean),
}


def form(graph: Graph, node: Node) -> str:
    """How a float node runs on int8: "" for not at all.

    "weighted": with a weight of its own; "sum"; "table": a look-up of 256 entries; "join": its inputs share a scale;
    "keep": its output has its input's scale.
    """
    row = TABLE[node.op]
    if node.op in _FORMS:
        kind, possible = _FORMS[node.op]
        return kind if possible(graph, node) else ""
    inputs, outputs = parse(row.signature)
    if row.view or inputs and inputs[0].dtype == "t":
        return "join" if inputs[0].repeated else "keep"
    plain = len(inputs) == 1 and inputs[0].dims == "*" == outputs[0].dims and inputs[0].dtype == "f32"
    return "table" if plain and outputs[0].dtype == "f32" and not row.updates else ""


def averages(graph: Graph, node: Node) -> bool:
    """Does a node keep its input's scale, but not its very numbers, so that its result is rounded?"""
    row = TABLE[node.op]
    return form(graph, node) == "keep" and not row.view and parse(row.signature)[0][0].dtype != "t"


def sources(graph: Graph, node: Node) -> tuple[str, ...]:
    """The inputs of a node with an integer form that would be int8 activations."""
    kind = form(graph, node)
    return tuple(n for n in node.inputs if n) if kind in ("sum", "join") else node.inputs[:1]


def channel_axis(node: Node) -> int:
    """The axis of a "weighted" node's weight along which its output channels lie."""
    return 1 if "tb" in node.attrs and not node.attrs["tb"] else 0


# -- nodes ---------------------------------------------------------------------------------------------------------


def conv(
    graph: Graph,
    x: Int,
    weight: tuple[str, np.ndarray, np.ndarray],
    bias: tuple[str, np.ndarray] | None,
    y: tuple[float, int],
    name: str,
    geometry: Mapping[str, Any],
    low: int = LOW,
    high: int = HIGH,
    where: str = "",
) -> Int:
    """Add a q_conv with its parameters and constants.

    weight: name, int8 (O, C/groups, ...), float32 scales (O,). bias: name, int32 (O,) at x.scale * scales. y: scale and
    zero point of the output. A parameter that the graph already holds with the same numbers is shared.
    """
    w_name, w, w_scale = weight
    scales = np.broadcast_to(np.asarray(w_scale, np.float32), (w.shape[0],))
    w_name = _parameter(graph, w_name, w, "i8", Quant(w_scale))
    b_name = ""
    if bias is not None:
        room = (
            2**31 - 1 - 255 * 128 * (w.size // len(w))
        )  # so that no sum wraps; dead channels have such biases
        held = np.clip(bias[1], -room, room)
        b_name = _parameter(graph, bias[0], held, "i32", Quant(np.float64(x.scale) * scales))
    if w.ndim != len(graph.shape(x.name)):
        w_name = emit(graph, "reshape", w_name, name=f"{w_name}.view", shape=(*w.shape, 1))
    attrs, *ratios = conv_attrs(x[1:], scales, y)
    pair = [
        graph.constant(f"{name}.{s}", r, "i32") for s, r in zip(("multiplier", "shift"), ratios, strict=True)
    ]
    attrs |= {k: geometry[k] for k in ("stride", "before", "after", "dilation", "groups")}
    attrs |= {"low": low, "high": high}
    return Int(emit(graph, "q_conv", x.name, w_name, b_name, *pair, name=name, where=where, **attrs), *y)


def _parameter(graph: Graph, name: str, data: np.ndarray, dtype: str, quant: Quant) -> str:
    have = graph.values.get(name)
    if have is not None and have.data is not None and have.quant is not None and have.type.dtype == dtype:
        if np.array_equal(have.data, data) and np.array_equal(have.quant.scale, quant.scale):
            return name
    return graph.persistent(graph.fresh(name), data, dtype=dtype, quant=quant)


def add(
    graph: Graph,
    a: Int,
    b: Int,
    y: tuple[float, int],
    name: str,
    low: int = LOW,
    high: int = HIGH,
    where: str = "",
) -> Int:
    """Add a q_add."""
    attrs: dict[str, Any] = dict(add_attrs(a[1:], b[1:], y, low, high))
    return Int(emit(graph, "q_add", a.name, b.name, name=name, where=where, **attrs), *y)


def rescale(graph: Graph, x: Int, y: tuple[float, int], name: str) -> Int:
    """The same numbers at another scale; nothing where it is the same one."""
    if (np.float32(x.scale), x.zero) == (np.float32(y[0]), y[1]):
        return x
    m, shift = multiplier(float(np.float32(x.scale)) / float(np.float32(y[0])))
    attrs: Any = {"x_zero": x.zero, "y_zero": y[1], "multiplier": m, "shift": shift}
    return Int(emit(graph, "q_rescale", x.name, name=name, **attrs), *y)


def mean(graph: Graph, x: Int, name: str, where: str = "") -> Int:
    """The mean over all spatial dimensions, which stay as ones; the scale is kept."""
    kernel = tuple(int(s) for s in graph.shape(x.name)[2:])
    none = (0,) * len(kernel)
    attrs = {"kernel": kernel, "stride": kernel, "before": none, "after": none, "extra": none}
    return x._replace(name=emit(graph, "q_avg_pool", x.name, name=name, where=where, **attrs))


# -- the walk ------------------------------------------------------------------------------------------------------


def lower(graph: Graph) -> Graph:
    """The graph with integer rows wherever they can stand; unchanged where nothing is quantised.

    Values keep their names: an int8 value that of the float value before its `quantize`. Parameters become int8 and
    int32 under their own names and shapes, with a `quant`; the weight of a product x @ w is stored as (O, K). An input
    that is only read quantised is int8 itself. Outputs are float.
    """
    graph = settled(graph)
    if any(node.op == "quantize" for node in graph.nodes):
        return _Lowering(norms_as_convolutions(graph)).run()
    return without_float_quants(graph)


def without_float_quants(graph: Graph) -> Graph:
    """The graph with float weights that are no longer said to be rounded."""
    new = graph
    for name, value in graph.values.items():
        if value.quant is not None and value.type.dtype == "f32":
            new = graph.copy() if new is graph else new
            new.values[name] = replace(value, quant=None)
    return new


def settled(graph: Graph) -> Graph:
    """The graph with each weight that a row `fakes` rounded for good, and its `quant` beside it; itself without any."""
    if not any(TABLE[n.op].fakes for n in graph.nodes):
        return graph
    new = graph.copy()
    new.nodes = []
    names: dict[str, str] = {}
    for node in graph.nodes:
        if TABLE[node.op].fakes:
            value, scale = (graph.values[n] for n in node.inputs)
            assert value.data is not None and scale.data is not None
            real = TABLE[node.op].ref(node.attrs, value.data.astype(np.float64), scale.data)[0]
            positive = np.maximum(np.abs(scale.data), LEAST)  # one that was learned may have crossed zero
            new.values[value.name] = replace(value, data=real.astype(np.float32), quant=Quant(positive))
            names[node.outputs[0]] = value.name
        else:
            new.nodes.append(replace(node, inputs=tuple(names.get(n, n) for n in node.inputs)))
    return new


def norms_as_convolutions(graph: Graph) -> Graph:
    """The graph with each batch norm whose statistics are given as a depthwise 1 x 1 convolution.

    Its weight and bias have the names of the norm's, unless others use them too; each weight is the one number of its
    channel, so that it is exact.
    """
    new, uses = graph.copy(), graph.consumers()
    new.nodes = []
    for node in graph.nodes:
        if node.op != "batch_norm" or not all(_known(graph, n) for n in node.inputs[1:]):
            new.nodes.append(node)
            continue
        x, gamma, beta, mean, var = node.inputs
        data = {n: np.asarray(graph.values[n].data, np.float64) for n in node.inputs[1:]}
        factor = data[gamma] / np.sqrt(data[var] + node.attrs["eps"])
        column, shape = len(graph.shape(x)) == 2, graph.shape(x)
        rank = max(len(shape) - 2, 1)
        names = [
            n if len(uses[n]) == 1 and gamma != beta else new.fresh(f"{node.outputs[0]}.{part}")
            for n, part in ((gamma, "weight"), (beta, "bias"))
        ]
        arrays = [factor.reshape(-1, *(1,) * (rank + 1)), data[beta] - data[mean] * factor]
        scale = np.where(factor == 0, 1.0, np.abs(factor)) / HIGH
        for name, array, quant in zip(names, arrays, (Quant(scale), None), strict=True):
            array = array.astype(np.float32)
            new.values[name] = Value(name, Type(array.shape), "parameter", array, quant)
        geometry: Any = {
            "stride": (1,) * rank,
            "before": (0,) * rank,
            "after": (0,) * rank,
            "dilation": (1,) * rank,
        }
        if column:
            x = emit(new, "reshape", x, name=f"{node.outputs[0]}.column", shape=(*shape, 1))
        out = emit(new, "conv", x, *names, where=node.where, groups=len(factor), **geometry)
        if column:
            out = emit(new, "reshape", out, shape=shape)
        last = new.nodes[-1]
        new.nodes[-1] = replace(last, outputs=(node.outputs[0], *last.outputs[1:]))
        del new.values[out]
    return verify(new, "making convolutions of batch norms")


class _Sink(NamedTuple):
    """Where a node's result is quantised: after clamps and views `through`, by `node`, as int8 from low to high.

    `name`: of the value that is quantised there.
    """

    through: tuple[Node, ...]
    node: Node
    y: tuple[float, int]
    low: int
    high: int
    name: str


class _Lowering:
    def __init__(self, graph: Graph) -> None:
        self.old, self.new = graph, Graph(graph.batch, aliases=dict(graph.aliases))
        self.uses, self.kept = graph.consumers(), set(graph.outputs.values())
        self.ints: dict[str, Int] = {}  # float values that are exactly what an int8 one stands for
        self.q: dict[str, Int] = {}  # int8 values of the old graph
        self.reals: dict[str, str] = {}  # float values that the new graph holds
        self.done: set[int] = set()

    def run(self) -> Graph:
        for role, name in self.old.inputs.items():
            self._input(role, name)
        for node in self.old.nodes:
            if id(node) not in self.done and not self._rule(node):
                self._as_it_is(node)
        self.new.outputs = {role: self.real(name) for role, name in self.old.outputs.items()}
        values = self.new.values  # parameters in the order in which the model declares them
        order = [n for n in self.old.values if n in values and values[n].kind != "temp"]
        self.new.values = {n: values[n] for n in dict.fromkeys([*order, *values])}
        self.new.aliases = {a: n for a, n in self.new.aliases.items() if n in values}
        return verify(self.new, "lowering to integers")

    def _input(self, role: str, name: str) -> None:
        type_ = self.old.type(name)
        readers = self.uses[name]
        same = {(n.op, n.attrs.get("scale"), n.attrs.get("zero")) for n in readers}
        if len(same) == 1 and readers[0].op == "quantize" and name not in self.kept:
            made = Int("", readers[0].attrs["scale"], readers[0].attrs["zero"])
            made = made._replace(name=self.new.input(role, type_.shape, "i8", made.quant))
            for node in readers:
                self.q[node.outputs[0]] = made
                self.done.add(id(node))
        else:
            self.reals[name] = self.new.input(role, type_.shape, type_.dtype)

    def real(self, name: str) -> str:
        """The float value `name` in the new graph."""
        if name not in self.reals:
            if name in self.ints:
                x = self.ints[name]
                self.reals[name] = emit(
                    self.new, "dequantize", x.name, name=f"{x.name}.real", scale=x.scale, zero=x.zero
                )
            else:
                value = self.old.values[name]
                assert value.kind != "temp", name
                self.reals[name] = self.new.add(replace(value, name=self.new.fresh(name), quant=None))
        return self.reals[name]

    def _as_it_is(self, node: Node) -> None:
        inputs = [(self.q[n].name if n in self.q else self.real(n)) if n else "" for n in node.inputs]
        outputs = []
        for name in node.outputs:
            if name:
                made = self.new.add(replace(self.old.values[name], name=self.new.fresh(name)))
                if self.old.type(name).dtype == "i8":
                    self.q[name] = Int(made, 1.0, 0)
                else:
                    self.reals[name] = made
                outputs.append(made)
            else:
                outputs.append("")
        self.new.nodes.append(replace(node, inputs=tuple(inputs), outputs=tuple(outputs)))

    # -- rules: each returns whether it took the node -----------------------------------------------------------------
    def _rule(self, node: Node) -> bool:
        if node.op == "quantize":
            return self._quantize(node)
        if node.op == "dequantize" and node.inputs[0] in self.q:
            x = self.q[node.inputs[0]]
            self.ints[node.outputs[0]] = x._replace(scale=node.attrs["scale"], zero=node.attrs["zero"])
            return True
        kind = form(self.old, node)
        if not kind or any(n not in self.ints for n in sources(self.old, node)):
            return False
        rule: Any = getattr(self, f"_{kind}")
        return bool(rule(node))

    def _quantize(self, node: Node) -> bool:
        (name,), (out, *_) = node.inputs, node.outputs
        y = (node.attrs["scale"], node.attrs["zero"])
        if name in self.ints:
            self.q[out] = rescale(self.new, self.ints[name], y, f"{name}.rescaled")
        else:
            made = emit(self.new, "quantize", self.real(name), name=f"{name}.int8", scale=y[0], zero=y[1])
            self.q[out] = Int(made, *y)
        return True

    def _sink(self, name: str) -> _Sink | None:
        """Where the value `name` is quantised, if all that lies between are clamps that nobody else reads."""
        through: list[Node] = []
        low, high = -math.inf, math.inf
        while len(self.uses[name]) == 1 and name not in self.kept:
            (node,) = self.uses[name]
            if node.op == "quantize":
                y = (node.attrs["scale"], node.attrs["zero"])
                bounds = [
                    b if math.isinf(b) else float(np.clip(half_away(b / y[0]) + y[1], LOW, HIGH))
                    for b in (low, high)
                ]
                return _Sink(
                    tuple(through), node, y, int(max(bounds[0], LOW)), int(min(bounds[1], HIGH)), name
                )
            row = TABLE[node.op]
            if any(node.outputs[1:]) or (row.bounds is None and not row.view):
                return None
            if row.bounds is not None:
                more = row.bounds(node.attrs)
                low, high = max(low, more[0]), min(high, more[1])
            through.append(node)
            name = node.outputs[0]
        return None

    def _drain(self, sink: _Sink, made: Int) -> bool:
        shape = self.old.shape(sink.name)
        if tuple(self.new.shape(made.name)) != tuple(shape):
            made = made._replace(name=emit(self.new, "reshape", made.name, name=sink.name, shape=shape))
        self.q[sink.node.outputs[0]] = made
        self.done |= {id(n) for n in (*sink.through, sink.node)}
        return True

    def _weighted(self, node: Node) -> bool:
        x, weight = self.ints[node.inputs[0]], self.old.values[node.inputs[1]]
        sink = self._sink(node.outputs[0])
        if sink is None or weight.quant is None:
            return False
        axis = channel_axis(node)
        if weight.quant.scale.size not in (1, weight.shape[axis]):
            return False
        w, scale = self._weight(weight, axis)
        bias = None
        if len(node.inputs) > 2 and node.inputs[2]:
            bias = self._bias(self.old.values[node.inputs[2]], x.scale * scale.astype(np.float64), node)
        geometry: Mapping[str, Any] = node.attrs
        if w.ndim == 2:
            column = (*self.new.shape(x.name), 1)
            x = x._replace(name=emit(self.new, "reshape", x.name, name=f"{x.name}.column", shape=column))
            geometry = {"stride": (1,), "before": (0,), "after": (0,), "dilation": (1,), "groups": 1}
        name = self._stem(sink, node)
        clamp = sink.low, sink.high
        y = conv(
            self.new, x, (node.inputs[1], w, scale), bias, sink.y, name, geometry, *clamp, where=node.where
        )
        return self._drain(sink, y)

    def _stem(self, sink: _Sink, node: Node) -> str:
        """The name of an integer node: its sink's, which a reshape may need for itself."""
        views = any(TABLE[n.op].view for n in sink.through)
        return node.outputs[0] if views and sink.name != node.outputs[0] else sink.name

    def _weight(self, value: Value, axis: int) -> tuple[np.ndarray, np.ndarray]:
        """(int8 (O, ...), scale) of a weight."""
        assert value.data is not None and value.quant is not None
        data = np.moveaxis(value.data, axis, 0)
        scale = value.quant.scale
        q = half_away(data / scale.astype(np.float64).reshape(-1, *(1,) * (data.ndim - 1)))
        return np.ascontiguousarray(np.clip(q, LOW, HIGH)).astype(np.int8), scale

    def _bias(self, value: Value, scale: np.ndarray, node: Node) -> tuple[str, np.ndarray]:
        assert value.data is not None
        q = half_away(value.data.astype(np.float64) / scale)
        if np.abs(q).max(initial=0) > MOST:
            raise BadInput(
                "a bias does not fit into int32 at its scale",
                where=f"{value.name} of {node.outputs[0]} {node.where}".strip(),
                number=f"{np.abs(q).max():.4g}, at most {MOST}",
                action="quantise the float model with acclimate.quantize, which widens the weight's scale",
            )
        return value.name, q.astype(np.int32)

    def _sum(self, node: Node) -> bool:
        sink = self._sink(node.outputs[0])
        if sink is None:
            return False
        a, b = (self.ints[n] for n in node.inputs)
        return self._drain(
            sink, add(self.new, a, b, sink.y, self._stem(sink, node), sink.low, sink.high, node.where)
        )

    def _table(self, node: Node) -> bool:
        sink = self._sink(node.outputs[0])
        if sink is None or any(node.outputs[1:]):
            return False
        x = self.ints[node.inputs[0]]
        every = (np.arange(LOW, HIGH + 1) - x.zero) * np.float64(np.float32(x.scale))

        def reals(at: np.ndarray) -> np.ndarray:
            with np.errstate(all="ignore"):
                y: np.ndarray = TABLE[node.op].ref(node.attrs, at)[0]
                for clamp in sink.through:
                    y = y if TABLE[clamp.op].view else TABLE[clamp.op].ref(clamp.attrs, y)[0]
            return y

        y = reals(every)
        if not np.isfinite(y).all():
            return False
        q = half_away(y / np.float64(np.float32(sink.y[0]))) + sink.y[1]
        slopes = np.nan_to_num((3 * y - 4 * reals(every - STEP) + reals(every - 2 * STEP)) / (2 * STEP))
        slopes[(q < LOW) | (q > HIGH)] = 0.0
        name = self.new.constant(f"{sink.name}.table", np.clip(q, LOW, HIGH), "i8")
        made = emit(
            self.new,
            "q_table",
            x.name,
            name,
            name=self._stem(sink, node),
            where=node.where,
            slopes=tuple(slopes.astype(np.float32).tolist()),
        )
        return self._drain(sink, Int(made, *sink.y))

    def _join(self, node: Node) -> bool:
        sink = self._sink(node.outputs[0])
        xs = [self.ints[n] for n in node.inputs]
        y = sink.y if sink is not None and sink.name == node.outputs[0] else (xs[0].scale, xs[0].zero)
        same = [rescale(self.new, x, y, f"{x.name}.rescaled") for x in xs]
        made = emit(
            self.new, node.op, *(x.name for x in same), name=node.outputs[0], where=node.where, **node.attrs
        )
        self.ints[node.outputs[0]] = Int(made, *y)
        return True

    def _keep(self, node: Node) -> bool:
        if any(node.outputs[1:]):
            return False
        x, out = self.ints[node.inputs[0]], node.outputs[0]
        if node.op == "mean":
            made = mean(self.new, x, f"{out}.mean" if not node.attrs["keep"] else out, node.where)
            if not node.attrs["keep"]:
                made = made._replace(
                    name=emit(self.new, "reshape", made.name, name=out, shape=self.old.shape(out))
                )
            self.ints[out] = made
            return True
        rest = [self.real(n) if n else "" for n in node.inputs[1:]]
        op, attrs = node.op, dict(node.attrs)
        if op == "avg_pool":
            op = "q_avg_pool"
            if attrs.pop("include_pad") and any((*attrs["before"], *attrs["after"])):  # zeros that count
                sides: Any = {k: (0, 0, *attrs[k]) for k in ("before", "after")}
                padded = emit(self.new, "pad", x.name, name=f"{out}.pad", value=float(x.zero), **sides)
                x = x._replace(name=padded)
                attrs |= dict.fromkeys(sides, (0,) * len(attrs["kernel"]))
        if "value" in attrs:  # what padding stands for
            attrs["value"] = float(to_int8(attrs["value"], x.scale, x.zero))
        made_name = emit(self.new, op, x.name, *rest, name=out, where=node.where, **attrs)
        self.ints[out] = x._replace(name=made_name)
        return True


def float_nodes(graph: Graph) -> list[Node]:
    """The nodes of a quantised graph that compute in float."""
    seen = []
    for node in graph.nodes:
        reals = all(graph.type(n).dtype == "f32" for n in node.outputs if n)
        if reals and node.op != "dequantize" and not TABLE[node.op].view:
            seen.append(node)
    return seen
