"""A float model becomes int8: ranges from calibration data, then `ops.integer.lower`.

Activations are affine, one scale a tensor; weights symmetric, one scale an output channel; biases int32 at the scale
of the sums. Batch norms fold into the layer before; one that stands alone becomes a depthwise 1 x 1 convolution. What
has no integer form runs in float, between conversions, and is listed by `quantization_report`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from . import passes
from .classes import IN_USE
from .data import Dataset
from .errors import BadInput, WrongUse
from .grad import predict_graph, prune
from .ir import Graph, Node, Quant, Value, graph_of
from .layout import arrange
from .objective import LOSSES, Loss, resolve
from .ops import TABLE, emit, verify, with_batch
from .ops.integer import (
    HIGH,
    LOW,
    MOST,
    Int,
    affine,
    averages,
    channel_axis,
    float_nodes,
    form,
    lower,
    norms_as_convolutions,
    sources,
    without_float_quants,
)
from .ops.quantized import half_away
from .program import build
from .runtime import Session

BINS = 2048  # of a histogram of activations
PERCENTILE = 99.99
SHRINKS = np.linspace(0.2, 1.0, 81)  # parts of a range that the MSE method tries
BATCH_BYTES = 32 << 20  # of activations that are looked at together
MOST_BATCH = 64
#: The smallest scale of an output channel, as a part of the median one: dead channels can learn again.
LEAST_SCALE = 2.0**-12

Tell = Callable[[str, int, int, str], None]


class Layer(NamedTuple):
    """A node that runs on int8. `inputs`: its activations; `output`: where its result is quantised, "" if it keeps
    its input's scale."""

    name: str
    node: Node
    inputs: tuple[str, ...]
    output: str


def quantize(
    model: Graph,
    calibration: Any = None,
    method: str = "minmax",
    percentile: float = PERCENTILE,
    per_channel: bool = True,
    keep_float: Sequence[str] = (),
    bits: int = 8,
) -> Graph:
    """The int8 graph of a float model, as it predicts (batch norm on running statistics, no dropout).

    model: a float Graph. calibration: x as the model takes it, (n, ...), unlabelled; also (x, y), a Dataset, or a
    mapping of input roles to arrays. A few hundred typical samples do. What `fake_quantize` gave holds all scales and
    takes no calibration, nor any other option.
    method: how the range of an activation is chosen. "minmax": all that was seen; "percentile": the middle
    `percentile` per cent; "mse": the part of it with the smallest mean squared error (as TensorRT and others do).
    per_channel: one weight scale an output channel, else one a tensor. keep_float: names of layers or parameters that
    stay in float. bits: of a weight, 2 to 8, in an int8.
    Parameters keep their names; `graph.values[name].quant` holds their scales. A layer whose batch norm was folded
    has a `bias`. The graph's x is int8, with its scale in `quant`; its output is float logits.
    Scales and zero points follow Jacob et al., 2018 (arXiv 1712.05877) and the TFLite 8-bit specification.
    Raises BadInput for data that do not suit the model, WrongUse for options that do not exist.

    >>> int8 = acclimate.quantize(model, x[:256])                                     # doctest: +SKIP
    >>> plan = acclimate.plan(int8, device="nano33ble")                               # doctest: +SKIP
    """
    if any(TABLE[n.op].fakes for n in graph_of(model).nodes):
        given = (method, percentile, per_channel, tuple(keep_float), bits)
        if calibration is not None or given != ("minmax", PERCENTILE, True, (), 8):
            raise WrongUse(
                "this graph holds its scales already",
                where="calibration" if calibration is not None else "options",
                action="quantize(model), with nothing else",
            )
        return lower(model)
    return Quantization(model, calibration, method, percentile, per_channel, keep_float, bits).graph


def fake_quantize(model: Graph, calibration: Any, learn_scales: bool = False, **options: Any) -> Graph:
    """A float graph that computes as `quantize`'s int8 graph does, and learns: quantisation-aware training.

    Weights pass `fake_quant`, activations `quantize` and `dequantize`, where and at the scales that `quantize` with the
    same options would; gradients pass all of them as if nothing were rounded, but where a clamp held (Jacob et
    al. 2018, arXiv:1712.05877). The batch norms are folded and learn as part of the weights. A bias stays as it is:
    its int32 is finer than the step of an activation. learn_scales: weight scales are parameters too,
    `<weight>.scale` (Esser et al. 2020, arXiv:1902.08153). What was learned becomes int8 without another calibration:

    >>> fake = acclimate.fake_quantize(model, x[:256], bits=4)                        # doctest: +SKIP
    >>> learner = acclimate.Learner(acclimate.plan(fake, scheme="full")).fit(x, y)    # doctest: +SKIP
    >>> int8 = acclimate.quantize(fake.with_data(learner.parameters()))               # doctest: +SKIP
    """
    return Quantization(model, calibration, **options).fake(learns=True, learn_scales=learn_scales)


def quantization_report(
    model: Graph,
    calibration: Any,
    x: Any,
    y: Any = None,
    loss: str | Loss = "cross_entropy",
    tell: Tell = lambda *_: None,
    **options: Any,
) -> dict[str, Any]:
    """What quantising costs, layer by layer, as a dict that prints and goes into JSON.

    model, calibration, options: as `quantize` takes them. x, y: samples and labels on which accuracy is measured
    (without y only signal-to-noise ratios are). `layers`: a row for each integer layer with `snr_db` and `cosine` of
    its output in the int8 graph against the float model's on x, and `accuracy_alone`: of the float model when only
    this layer is quantised. `float_layers`: what runs in float, and why. `accuracy_float`, `accuracy_int8`: of the
    whole.
    """
    return Quantization(model, calibration, **options).report(x, y, loss, tell)


# -- the float graph, with batch norms folded --------------------------------------------------------------------------


def fold(model: Graph) -> Graph:
    """The model as it predicts, batch norms folded or made depthwise convolutions; parameters keep their names."""
    before = predict_graph(model)
    biases = {
        n.inputs[1]: n.inputs[2] for n in before.nodes if TABLE[n.op].roles.get(2) and len(n.inputs) > 2
    }
    graph = prune(passes.prepare(before, {IN_USE}))
    names: dict[str, str] = {}
    pairs: list[tuple[str, str]] = []  # a folded weight and its bias
    for node in graph.nodes:
        if TABLE[node.op].roles.get(1) != "weight" or len(node.inputs) < 3 or ".folded" not in node.inputs[1]:
            continue
        weight = node.inputs[1].partition(".folded")[0]
        bias = biases.get(weight) or (
            weight.removesuffix("weight") + "bias" if weight.endswith("weight") else f"{weight}.bias"
        )
        pairs.append((node.inputs[1], node.inputs[2]))
        for old, new in zip(pairs[-1], (weight, bias), strict=True):
            if new not in graph.values and new not in names.values():
                names[old] = new
    values = {names.get(n, n): replace(v, name=names.get(n, n)) for n, v in graph.values.items()}
    learned = {*model.parameters(), *names.values()}
    sparse = {n for n, v in model.parameters().items() if v.sparse}
    graph.values = {
        n: replace(v, kind="parameter", sparse=n in sparse) if v.kind == "constant" and n in learned else v
        for n, v in values.items()
    }
    graph.nodes = [replace(n, inputs=tuple(names.get(i, i) for i in n.inputs)) for n in graph.nodes]
    graph.aliases = {a: n for a, n in model.aliases.items() if n in graph.values}
    order: list[str] = []  # a bias that is new stands behind its weight
    for name in before.values:
        order += [name, *(names[b] for w, b in pairs if names.get(w) == name and b in names)]
    graph.values = {n: graph.values[n] for n in dict.fromkeys([*order, *graph.values]) if n in graph.values}
    return without_float_quants(norms_as_convolutions(graph))


# -- which nodes, and where their values are quantised ----------------------------------------------------------------


def _layer_name(graph: Graph, node: Node) -> str:
    for i, role in TABLE[node.op].roles.items():
        if role == "weight" and i < len(node.inputs) and graph.values[node.inputs[i]].kind == "parameter":
            return node.inputs[i].removesuffix("weight").rstrip(".") or node.inputs[i]
    return node.outputs[0]


def _named(graph: Graph, node: Node) -> set[str]:
    """What a user may call a node: its layer, its parameters, its output."""
    parameters = {n for n in node.inputs if n and graph.values[n].kind == "parameter"}
    return {_layer_name(graph, node), node.outputs[0], *parameters}


def _end(graph: Graph, uses: Mapping[str, list[Node]], name: str) -> tuple[str, list[Node]]:
    """Where the result `name` of an integer layer is quantised: after the clamps and views that it goes through."""
    through: list[Node] = []
    kept = set(graph.outputs.values())
    while len(uses[name]) == 1 and name not in kept:
        (node,) = uses[name]
        row = TABLE[node.op]
        if (row.bounds is None and not row.view) or any(node.outputs[1:]):
            break
        through.append(node)
        name = node.outputs[0]
    return name, through


def _feeds_weights(graph: Graph, uses: Mapping[str, list[Node]], name: str, kept: Mapping[int, str]) -> bool:
    """Is a value read by a layer with weights, at once or after ops that keep its scale?"""
    for node in uses[name]:
        kind = form(graph, node)
        if kind == "weighted" and id(node) not in kept and node.inputs[0] == name:
            return True
        if kind in ("keep", "join") and _feeds_weights(graph, uses, node.outputs[0], kept):
            return True
    return False


def _layers(graph: Graph, keep_float: Sequence[str]) -> tuple[list[Layer], set[str], dict[int, str]]:
    """(what runs on int8, the inputs that are int8, why other nodes do not, by their ids)."""
    uses = graph.consumers()
    kept: dict[int, str] = {}
    for wanted in keep_float:
        found = [
            n for n in graph.nodes if any(s == wanted or s.startswith(f"{wanted}.") for s in _named(graph, n))
        ]
        if not found:
            known = [_layer_name(graph, n) for n in graph.nodes if form(graph, n) == "weighted"]
            raise WrongUse(
                "keep_float names no layer", number=repr(wanted), action=f"one of {', '.join(known[:12])}"
            )
        kept |= {id(n): "kept by keep_float" for n in found}
    for name in graph.parameters():
        users = uses[name]
        if (
            len({(form(graph, n), channel_axis(n), n.inputs[1:2] == (name,), id(n) in kept) for n in users})
            > 1
        ):
            kept |= {id(n): "its weight is shared by layers that need it otherwise" for n in users}
    inputs_of_graph = {n for n in graph.inputs.values() if _feeds_weights(graph, uses, n, kept)}
    ints = set(inputs_of_graph)
    layers: list[Layer] = []
    passed: set[int] = set()
    for node in graph.nodes:
        kind = form(graph, node)
        if not kind or id(node) in kept or id(node) in passed:
            continue
        inputs = sources(graph, node)
        if kind != "weighted" and not all(n in ints for n in inputs):
            continue
        output = node.outputs[0]
        if kind in ("weighted", "sum", "table"):
            output, through = _end(graph, uses, output)
            passed |= {id(n) for n in through}
        ints.add(output)
        layers.append(Layer(_layer_name(graph, node), node, inputs, "" if kind == "keep" else output))
    return layers, inputs_of_graph, kept


def _points(graph: Graph, layers: Sequence[Layer]) -> dict[str, str]:
    """value -> the value whose range it has: itself, or what it is made of by ops that keep the scale."""
    made = {layer.output for layer in layers}
    keeps = {n.node.outputs[0]: n.inputs[0] for n in layers if not n.output}
    root: dict[str, str] = {}
    for layer in layers:
        for name in (*layer.inputs, layer.output):
            if name and name not in root:
                at = name
                while at not in made and at in keeps:
                    at = keeps[at]
                root[name] = at
    return root


def _share_joined(graph: Graph, layers: Sequence[Layer], ranges: dict[str, tuple[float, int]]) -> None:
    """What is only made to be joined gets the range of the whole, so that nothing is rescaled."""
    uses, made = graph.consumers(), {layer.output for layer in layers}
    for layer in reversed(layers):
        if len(layer.inputs) > 1 and form(graph, layer.node) == "join":
            for name in layer.inputs:
                if name in made and len(uses[name]) == 1 and name not in graph.outputs.values():
                    ranges[name] = ranges[layer.output]


# -- ranges ------------------------------------------------------------------------------------------------------------


def _inputs_of(graph: Graph, given: Any) -> dict[str, np.ndarray]:
    """Samples for each input role, checked."""
    if isinstance(given, Dataset):
        given = given.x
    if isinstance(given, tuple) and len(given) == 2:
        given = given[0]
    if not isinstance(given, Mapping):
        given = {"x": given}
    if set(given) != set(graph.inputs):
        raise BadInput(
            "the data do not name the model's inputs",
            number=f"{', '.join(map(str, given))}, must be {', '.join(graph.inputs)}",
        )
    out = {}
    for role, name in graph.inputs.items():
        try:
            array = np.asarray(given[role], np.float32)
        except (TypeError, ValueError) as error:
            raise BadInput("data must be an array of numbers", where=role, number=str(error)[:100]) from error
        want = tuple(int(s) for s in graph.shape(name)[1:])
        if array.shape[1:] != want or not len(array):
            raise BadInput(
                "data do not have the shape that the model takes",
                where=role,
                number=f"{array.shape}, must be (n, {', '.join(map(str, want))}) with n from 1",
            )
        if not np.isfinite(array).all():
            bad = int(np.argmax(~np.isfinite(array).reshape(len(array), -1).all(1)))
            raise BadInput(
                "data hold a NaN or infinity",
                where=role,
                number=f"sample {bad}",
                action="leave it out, or repair it",
            )
        out[role] = array
    if len({len(a) for a in out.values()}) != 1:
        raise BadInput("inputs differ in length", number=", ".join(str(len(a)) for a in out.values()))
    return out


def _batch(graph: Graph, names: Sequence[str]) -> int:
    """Samples to look at together."""
    one = with_batch(graph, 1)
    return int(np.clip(BATCH_BYTES // max(1, sum(one.type(n).size_bytes for n in names)), 1, MOST_BATCH))


def _values(
    graph: Graph, names: Sequence[str], data: Mapping[str, np.ndarray], batch: int = 0
) -> Iterator[list[np.ndarray]]:
    """The values `names` of a graph, batch after batch, by the C runtime."""
    count, batch = len(next(iter(data.values()))), batch or _batch(graph, names)
    inner = [n for n in dict.fromkeys(names) if graph.values[n].kind == "temp"]
    roles = {n: role for role, n in graph.inputs.items()}
    sessions: dict[int, Session] = {}
    for start in range(0, count, batch):
        part = {role: a[start : start + batch] for role, a in data.items()}
        n = min(batch, count - start)
        if inner and n not in sessions:
            sized = with_batch(graph, n).copy()
            sized.outputs = {f"value {i}": name for i, name in enumerate(inner)}
            sessions[n] = Session(build({"run": arrange(passes.run(sized))}))
        fed = {role: quantized(graph.values[graph.inputs[role]], a) for role, a in part.items()}
        out = sessions[n].run("run", **fed) if inner else {}
        by_name = {name: out[f"value {i}"] for i, name in enumerate(inner)}
        yield [by_name[name] if name in by_name else fed[roles[name]] for name in names]


def quantized(value: Value, x: np.ndarray) -> np.ndarray:
    """Float data as an input takes them: int8 where it has a `quant`."""
    if value.quant is None or value.type.dtype != "i8" or x.dtype == np.int8:
        return x
    attrs = {"scale": float(value.quant.scale[0]), "zero": value.quant.zero}
    return np.asarray(TABLE["quantize"].ref(attrs, x)[0])


def calibrate(
    graph: Graph,
    names: Sequence[str],
    data: Mapping[str, np.ndarray],
    method: str,
    percentile: float = PERCENTILE,
) -> dict[str, tuple[float, float]]:
    """(low, high) of each of some values of a float graph on samples; see `quantize` for the methods."""
    if method not in METHODS:
        raise WrongUse(
            "no calibration is called that", number=repr(method), action=f"one of {', '.join(METHODS)}"
        )
    if not isinstance(percentile, (int, float)) or not 50 < percentile <= 100:
        raise WrongUse(
            "percentile must be above 50, at most 100", number=repr(percentile), action="percentile=99.99"
        )
    low, high = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    for arrays in _values(graph, names, data):
        low = np.minimum(low, [a.min() for a in arrays])
        high = np.maximum(high, [a.max() for a in arrays])
    for name, *ends in zip(names, low, high, strict=True):
        if not np.isfinite(ends).all():
            raise BadInput("an activation overflows on the calibration data", where=name, number=f"{ends}")
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    choose = METHODS[method]
    if choose is None:
        return {n: (float(a), float(b)) for n, a, b in zip(names, low, high, strict=True)}
    counts = np.zeros((len(names), BINS), np.int64)
    wide = np.where(high > low, high - low, 1.0)
    for arrays in _values(graph, names, data):
        for i, a in enumerate(arrays):
            at = ((a.reshape(-1) - low[i]) * (BINS / wide[i])).astype(np.int64)
            counts[i] += np.bincount(np.clip(at, 0, BINS - 1), minlength=BINS)
    return {
        n: choose(counts[i], float(low[i]), float(low[i] + wide[i]), percentile) for i, n in enumerate(names)
    }


def _by_percentile(counts: np.ndarray, low: float, high: float, percentile: float) -> tuple[float, float]:
    """The range with half of what is left out below it and half above, to the width of a bin."""
    beyond = counts.sum() * (1 - percentile / 100) / 2
    width = (high - low) / BINS
    first = int(np.argmax(np.cumsum(counts) > beyond))
    last = BINS - 1 - int(np.argmax(np.cumsum(counts[::-1]) > beyond))
    return low + first * width, low + (last + 1) * width


def _by_mse(counts: np.ndarray, low: float, high: float, percentile: float) -> tuple[float, float]:
    """The shrunk range with the smallest mean squared error of the numbers counted; ends shrink by themselves."""
    at = low + (np.arange(BINS) + 0.5) * (high - low) / BINS
    used = counts > 0
    at, weight = at[used], counts[used]

    def error(a: float, b: float) -> float:
        scale, zero = affine(a, b)
        q = np.clip(np.round(at / scale) + zero, LOW, HIGH)
        return float((weight * (at - scale * (q - zero)) ** 2).sum())

    best = (error(low, high), low, high)
    for part in SHRINKS[:-1]:
        for a, b in ((low * part, high * part), (low, high * part), (low * part, high)):
            best = min(best, (error(a, b), a, b))
    return best[1:]


#: name -> (counts of a histogram, its low and high end, percentile) -> (low, high); None: the ends themselves
METHODS: Mapping[str, Callable[..., tuple[float, float]] | None] = {
    "minmax": None,
    "percentile": _by_percentile,
    "mse": _by_mse,
}


# -- weights -----------------------------------------------------------------------------------------------------------


def weight_scales(
    w: np.ndarray, bias: np.ndarray | None, x_scale: float, bits: int = 8, per_channel: bool = True
) -> np.ndarray:
    """Symmetric scales of a weight (O, ...), float32: one an output channel, or a single one.

    Wide enough for the bias to fit beside the largest sum of products in an int32, whatever the weights may become.
    """
    flat = np.abs(w.reshape(len(w), -1).astype(np.float64))
    most = 2 ** (bits - 1) - 1
    scale = flat.max(1, initial=0.0) / most
    live = scale[scale > 0]
    usual = float(np.median(live)) if live.size else 1.0 / most
    scale = np.where(scale > 0, np.maximum(scale, usual * LEAST_SCALE), usual)
    if bias is not None:
        room = MOST - flat.shape[1] * (HIGH - LOW) * HIGH
        if room < 1:
            raise BadInput(
                "a layer sums too many products for an int32",
                number=f"{flat.shape[1]} taps",
                action="leave it out with keep_float=",
            )
        scale = np.maximum(scale, np.abs(bias.astype(np.float64)) / (x_scale * room) * (1 + 1e-6))
    if not per_channel:
        scale = scale.max(keepdims=True)
    return scale.astype(np.float32)


# -- all together ------------------------------------------------------------------------------------------------------


@dataclass
class Quantization:
    """One model's way to int8."""

    model: Graph
    calibration: Any
    method: str = "minmax"
    percentile: float = PERCENTILE
    per_channel: bool = True
    keep_float: Sequence[str] = ()
    bits: int = 8

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in range(2, 9):
            raise WrongUse("bits of a weight must be from 2 to 8", number=repr(self.bits), action="bits=8")
        if isinstance(self.keep_float, str):
            self.keep_float = (self.keep_float,)
        if any(v.quant is not None for v in graph_of(self.model).values.values()):
            raise WrongUse("this graph is quantised already", action="give the float model")
        if self.calibration is None:
            raise WrongUse(
                "ranges are measured on samples", where="calibration", action="quantize(model, x[:256])"
            )
        self.float_graph = fold(self.model)
        self.layers, self._int8_inputs, self._kept = _layers(self.float_graph, self.keep_float)
        if not self.layers:
            raise BadInput(
                "no layer of this model has an integer form",
                number=", ".join(sorted({n.op for n in self.float_graph.nodes})),
                action="keep it in float",
            )
        data = _inputs_of(self.float_graph, self.calibration)
        self.samples = len(next(iter(data.values())))
        self._root = _points(self.float_graph, self.layers)
        names = list(dict.fromkeys(self._root.values()))
        ends = calibrate(self.float_graph, names, data, self.method, self.percentile)
        self.ranges = {name: affine(*ends[name]) for name in names}
        _share_joined(self.float_graph, self.layers, self.ranges)
        self.weights = self._weights()

    @cached_property
    def graph(self) -> Graph:
        """The int8 graph."""
        return lower(self.fake())

    def _weights(self) -> dict[str, Quant]:
        """The scales of every weight; one that several layers share gets the widest."""
        graph = self.float_graph
        scales: dict[str, np.ndarray] = {}
        for layer in self.layers:
            if form(graph, layer.node) != "weighted":
                continue
            w, b = (graph.values[n].data if n else None for n in (*layer.node.inputs[1:], "")[:2])
            assert w is not None
            w = np.moveaxis(w, channel_axis(layer.node), 0)
            x_scale = self.ranges[self._root[layer.inputs[0]]][0]
            s = weight_scales(w, b, x_scale, self.bits, self.per_channel)
            name = layer.node.inputs[1]
            scales[name] = np.maximum(scales[name], s) if name in scales else s
        return {name: Quant(s) for name, s in scales.items()}

    def fake(self, only: Layer | None = None, learns: bool = False, learn_scales: bool = False) -> Graph:
        """The float graph with its numbers rounded to what int8 can hold, everywhere or in one layer.

        learns: weights are rounded whenever the graph runs, not once, so that they learn; learn_scales: so do their
        scales.
        """
        old, layers = self.float_graph, self.layers if only is None else [only]
        chosen = {id(layer.node): layer for layer in layers}
        ends = {layer.output for layer in layers if layer.output}
        averaged = {n.node.outputs[0]: n.inputs[0] for n in layers if averages(old, n.node)}
        ends |= averaged.keys()
        new = old.copy()
        new.nodes = []

        def rounded(name: str) -> str:
            scale, zero = self.ranges[self._root[averaged.get(name, name)]]
            q = emit(new, "quantize", name, name=f"{name}.q", scale=scale, zero=zero)
            return str(emit(new, "dequantize", q, name=f"{name}.dq", scale=scale, zero=zero))

        # value -> its rounded twin; what is made in float is rounded for the integer layers only
        held = {n: rounded(n) for n in self._int8_inputs if only is None}
        here: dict[str, str] = {}
        weights: dict[str, str] = {}
        keeps = {layer.node.outputs[0] for layer in layers if not layer.output}
        for node in old.nodes:
            names = dict(held)
            layer = chosen.get(id(node))
            if layer is not None:
                for name in {*layer.inputs} - held.keys() - keeps:
                    here[name] = names[name] = here.get(name) or rounded(name)
                if form(old, node) == "weighted":
                    weight = node.inputs[1]
                    if not learns:
                        self._round_weight(new, node)
                    elif weight not in weights:
                        weights[weight] = self._fake_weight(
                            new, node, "parameter" if learn_scales else "constant"
                        )
                    names |= weights
            new.nodes.append(replace(node, inputs=tuple(names.get(n, n) for n in node.inputs)))
            held.update({name: rounded(name) for name in node.outputs if name in ends})
        new.outputs = {role: held.get(n, n) for role, n in old.outputs.items()}
        return verify(new, "fake quantisation")

    def _fake_weight(self, graph: Graph, node: Node, kind: str) -> str:
        name, most = node.inputs[1], 2 ** (self.bits - 1) - 1
        scale = self.weights[name].scale
        s = graph.persistent(graph.fresh(f"{name}.scale"), scale, kind)
        attrs = {"axis": channel_axis(node), "low": -most, "high": most}
        return str(emit(graph, "fake_quant", name, s, name=f"{name}.fake", **attrs))

    def _round_weight(self, graph: Graph, node: Node) -> None:
        name, axis = node.inputs[1], channel_axis(node)
        value, quant = self.float_graph.values[name], self.weights[node.inputs[1]]
        assert value.data is not None
        data = np.moveaxis(value.data, axis, 0).astype(np.float64)
        scale = quant.scale.astype(np.float64).reshape(-1, *(1,) * (data.ndim - 1))
        most = 2 ** (self.bits - 1) - 1
        real = np.clip(half_away(data / scale), -most, most) * scale
        real = np.ascontiguousarray(np.moveaxis(real, 0, axis), np.float32)
        graph.values[name] = replace(value, data=real, quant=quant)

    # -- what it costs -----------------------------------------------------------------------------------------------
    def float_layers(self) -> list[dict[str, str]]:
        """The nodes that run in float, and why."""
        kept = {n.outputs[0]: self._kept[id(n)] for n in self.float_graph.nodes if id(n) in self._kept}
        rows = []
        for node in float_nodes(self.graph):
            why = "its input is float" if form(self.graph, node) else "no integer form"
            why = kept.get(node.outputs[0], why)
            rows.append({"name": node.outputs[0], "op": node.op, "why": why, "where": node.where})
        return rows

    def report(
        self,
        x: Any,
        y: Any = None,
        loss: str | Loss = "cross_entropy",
        tell: Tell = lambda *_: None,
    ) -> dict[str, Any]:
        """See `quantization_report`."""
        data = _inputs_of(self.float_graph, x)
        count = len(next(iter(data.values())))
        target = None
        if y is not None:
            if np.shape(y)[:1] != (count,):
                raise BadInput("x and y differ in length", number=f"x {count}, y {np.shape(y)}")
            target = resolve(loss, LOSSES, "loss").check(
                np.asarray(y), self.model.type(self.model.outputs["output"])
            )

        def accuracy(graph: Graph) -> float:
            logits = np.concatenate([a for (a,) in _values(graph, [graph.outputs["output"]], data)])
            return float(resolve(loss, LOSSES, "loss").correct(logits, target))

        rows: list[dict[str, Any]] = [
            {"name": layer.name, "op": layer.node.op, "output": layer.output}
            for layer in self.layers
            if layer.output
        ]
        for row, quality in zip(rows, self._qualities([str(r["output"]) for r in rows], data), strict=True):
            row |= quality
        out: dict[str, Any] = {
            "kind": "quantize",
            "method": self.method,
            "calibration_samples": self.samples,
            "samples": count,
            "parameter_bytes_float": self.float_graph.parameter_bytes(),
            "parameter_bytes_int8": self.graph.parameter_bytes(),
            "layers": rows,
            "float_layers": self.float_layers(),
        }
        if y is not None:
            whole = accuracy(self.float_graph)
            out |= {"accuracy_float": whole, "accuracy_int8": accuracy(self.graph)}
            chosen = [layer for layer in self.layers if layer.output]
            for i, (row, layer) in enumerate(zip(rows, chosen, strict=True)):
                tell("layers", i, len(rows), layer.name)
                row["accuracy_alone"] = accuracy(self.fake(layer))
                row["cost"] = whole - row["accuracy_alone"]
            tell("layers", len(rows), len(rows), "")
        return out

    def _qualities(self, names: Sequence[str], data: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
        """Signal-to-noise ratio and cosine of values of the int8 graph against the float ones."""
        signal, noise, other, product = np.zeros((4, len(names)))
        batch = _batch(self.float_graph, names)
        pairs = zip(*(_values(g, names, data, batch) for g in (self.float_graph, self.graph)), strict=True)
        for real, found in pairs:
            for i, (name, a, q) in enumerate(zip(names, real, found, strict=True)):
                b = q
                if q.dtype == np.int8:
                    scale, zero = self.ranges[name]
                    b = Int(name, scale, zero).quant.real(q)
                a64, b64 = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
                signal[i] += a64 @ a64
                noise[i] += (a64 - b64) @ (a64 - b64)
                other[i] += b64 @ b64
                product[i] += a64 @ b64
        return [
            {
                "snr_db": 10 * math.log10(s / n) if s > 0 and n > 0 else None,
                "cosine": p / math.sqrt(s * o) if s > 0 and o > 0 else None,
            }
            for s, n, o, p in zip(signal, noise, other, product, strict=True)
        ]
