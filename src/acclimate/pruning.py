"""Pruning: channels removed with all that goes with them, or single connections set to zero for good.

What goes together is derived from the rows of the op table (`ops/coupling.py`), what is worth keeping from a criterion.
A pruned model is an ordinary Graph: it is planned, learned and scored as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from . import passes
from .errors import WrongUse
from .grad import predict_graph
from .ir import Dim, Graph, Node, Value, graph_of
from .layout import arrange
from .learner import Learner
from .ops import TABLE, cost, infer, verify, with_batch
from .ops.coupling import Call, Labels, Units, fixed, outputs_of
from .planner import compile_plan
from .schemes import layers

#: criterion -> what it is. The last two need data: per sample, g is the gradient of the loss.
CRITERIA: Mapping[str, str] = {
    "l1": "sum of |w| of what makes a channel (Li et al. 2017, arXiv:1608.08710) times that of what it meets",
    "l2": "sum of w^2 of what makes a channel times that of what it meets",
    "random": "nothing: what any other criterion has to beat",
    "taylor": "mean over samples of |sum of w g| (Molchanov et al. 2019, arXiv:1906.10771)",
    "fisher": "mean over samples of (sum of w g)^2 / 2 (Theis et al. 2018, arXiv:1801.05787)",
}
WITH_DATA = ("taylor", "fisher")
SAMPLES = 256  # that these look at, at most


@dataclass(frozen=True)
class Group:
    """Channels that the same layers make, so that they compete with each other. `weights`: those layers', by name."""

    weights: tuple[str, ...]
    units: np.ndarray  # labels, sorted

    @property
    def name(self) -> str:
        """The first of its weights, which stands for all."""
        return self.weights[0]


@dataclass(frozen=True)
class Coupling:
    """The units of a graph: labels of each value by axis, found; 0 is fixed."""

    labels: Mapping[str, Labels]
    groups: tuple[Group, ...]
    made: Mapping[str, tuple[int, ...]]  # weight -> axes along which its layer makes channels
    met: Mapping[str, tuple[int, ...]]  # weight -> axes over which its layer sums


def coupling(graph: Graph) -> Coupling:
    """Which channels go together, and which of them can be removed."""
    units = Units()
    labels: dict[str, Labels] = {"": []}
    home: dict[str, str] = {}  # a weight under another shape -> the weight
    for value in graph.values.values():
        if value.kind != "temp":
            labels[value.name] = fixed(value.shape) if value.kind == "input" else units.axes(value.shape)
            home[value.name] = value.name if value.kind == "parameter" else ""
    for node in graph.nodes:
        row = TABLE[node.op]
        types = [graph.type(n) if n else None for n in node.outputs]
        call = Call(units, row, node.attrs, node.inputs, [labels[n] for n in node.inputs], types)
        labels.update(zip(node.outputs, outputs_of(call), strict=True))
        if row.view or row.moves or row.fakes:
            home[node.outputs[0]] = home.get(node.inputs[0], "")
    units.fix(*(axis for name in graph.outputs.values() for axis in labels[name]))
    found = {name: [units.find(axis) for axis in axes] for name, axes in labels.items() if name}
    makers: dict[int, list[str]] = {}
    for name, axis in units.made:
        for unit in np.unique(units.find(axis)).tolist():
            if unit and home.get(name) and home[name] not in makers.setdefault(unit, []):
                makers[unit].append(home[name])
    groups: dict[tuple[str, ...], list[int]] = {}
    for unit, names in sorted(makers.items()):
        if names:
            groups.setdefault(tuple(names), []).append(unit)

    def axes_of(noted: list[tuple[str, np.ndarray]]) -> dict[str, tuple[int, ...]]:
        out: dict[str, tuple[int, ...]] = {}
        for name, axis in noted:
            weight, its = home.get(name), set(units.find(axis).tolist()) - {0}
            if weight:
                axes = [i for i, own in enumerate(found[weight]) if its & set(own.tolist())]
                out[weight] = tuple(sorted({*out.get(weight, ()), *axes}))
        return out

    whole = tuple(Group(names, np.array(units_)) for names, units_ in groups.items() if len(units_) > 1)
    return Coupling(found, whole, axes_of(units.made), axes_of(units.met))


def without(graph: Graph, coupled: Coupling, removed: np.ndarray) -> Graph:
    """The graph without some units: smaller tensors, the same nodes."""

    def kept(name: str) -> list[np.ndarray]:
        return [~np.isin(axis, removed) for axis in coupled.labels[name]] if name else []

    new = Graph(graph.batch, {}, [], dict(graph.inputs), dict(graph.outputs), dict(graph.aliases))
    for value in graph.values.values():
        if value.kind == "temp":
            continue
        if value.data is not None and value.data.ndim:
            data = np.ascontiguousarray(value.data[np.ix_(*kept(value.name))])
            value = replace(value, data=data, type=replace(value.type, shape=data.shape))
        new.values[value.name] = value
    for node in graph.nodes:
        row, attrs = TABLE[node.op], node.attrs
        masks = kept(node.outputs[0])
        if row.narrow is not None:
            shape = tuple(
                _left(d, m, graph.batch) for d, m in zip(graph.shape(node.outputs[0]), masks, strict=True)
            )
            attrs = row.narrow(attrs, [kept(n) for n in node.inputs], [kept(n) for n in node.outputs], shape)
        types = infer(row, attrs, [new.type(n) if n else None for n in node.inputs], node.where)
        for name, type_ in zip(node.outputs, types, strict=True):
            if name:
                new.values[name] = Value(name, type_)
        new.nodes.append(Node(node.op, node.inputs, node.outputs, attrs, node.where))
    return verify(new, "pruning")


def _left(size: int, mask: np.ndarray, batch: int) -> int:
    """A dimension after pruning; one that scales with the batch still does."""
    count = int(mask.sum())
    if count == size:
        return size
    return Dim(count // batch, batch) if isinstance(size, Dim) else count


# -- what is worth keeping -----------------------------------------------------------------------------------------


def _weights(graph: Graph) -> list[str]:
    """The parameters that pruning ranks: weights of layers, not vectors."""
    return [n for layer in layers(graph) for n, role in layer.parameters.items() if role == "weight"]


def _samples(
    graph: Graph, names: list[str], criterion: str, data: Any, loss: Any, seed: int
) -> Iterator[dict[str, np.ndarray]]:
    """For each sample (once, where the criterion needs none) an array a weight, to be summed over what is removed."""
    values = {n: np.asarray(graph.values[n].data, np.float64) for n in names}
    if criterion not in WITH_DATA:
        yield {n: np.abs(w) if criterion == "l1" else w * w for n, w in values.items()}
    else:
        x, y = np.asarray(data[0]), np.asarray(data[1])
        learner = Learner(
            compile_plan(predict_graph(graph), scheme=dict.fromkeys(names), loss=loss, must_fit=False)
        )
        for i in np.random.default_rng(seed).permutation(len(x))[:SAMPLES]:
            grads = learner.gradients(x[i : i + 1], y[i : i + 1])
            yield {n: values[n] * grads[n] for n in names}


_PER_SAMPLE: Mapping[str, Callable[[Any], Any]] = {"taylor": np.abs, "fisher": lambda s: s * s / 2}


def unit_scores(
    graph: Graph,
    coupled: Coupling,
    criterion: str = "l2",
    data: Any = None,
    loss: Any = "cross_entropy",
    seed: int = 0,
) -> np.ndarray:
    """A score for each label; the least is removed first.

    Of weights alone, the product of both sides is what no rescaling of one against the other changes. Of data, the sum
    over the weights that a channel meets: w g there is what the loss loses, to first order, when the channel is scaled
    down.
    """
    count = 1 + max(int(a.max(initial=0)) for axes in coupled.labels.values() for a in axes)
    if criterion == "random":
        return np.random.default_rng(seed).random(count)

    def summed(arrays: Mapping[str, np.ndarray], side: Mapping[str, tuple[int, ...]]) -> np.ndarray:
        out = np.zeros(count)
        for name, array in arrays.items():
            for i in side.get(name, ()):
                np.add.at(
                    out, coupled.labels[name][i], array.sum(tuple(j for j in range(array.ndim) if j != i))
                )
        return out

    names = [
        n for n in _weights(graph) if n in coupled.met or n in coupled.made and criterion not in WITH_DATA
    ]
    samples = _samples(graph, names, criterion, data, loss, seed)
    if criterion not in WITH_DATA:
        (weights,) = samples
        return summed(weights, coupled.made) * summed(weights, coupled.met)
    return np.mean([_PER_SAMPLE[criterion](summed(one, coupled.met)) for one in samples], 0)


# -- pruning -------------------------------------------------------------------------------------------------------


def prune(
    model: Graph,
    channels: float | Mapping[str, float] | None = None,
    connections: float | Mapping[str, float] | None = None,
    criterion: str = "l2",
    data: tuple[np.ndarray, np.ndarray] | None = None,
    loss: Any = "cross_entropy",
    seed: int = 0,
) -> Graph:
    """A new Graph with less of `model`, which stays as it is.

    channels: the share of channels to remove, of every group of layers that go together or by name (shell patterns of
    weights, `{"layer3.*": 0.5}`). They are gone, and everything coupled to them: batch norms, depthwise
    convolutions, what a skip adds, what comes out of concatenation or flattening, inputs of later layers. One of each
    group always stays. connections: the share of each weight's elements to set to zero, of all weights or by name. A
    zero keeps its bytes; learning leaves it zero in a float graph (fake quantised too), but not in an int8 one. Both:
    channels first. criterion: one of CRITERIA; "taylor" and "fisher" look at data = (x, y) with `loss`. seed: of what
    is random.

    Raises WrongUse for a share outside [0, 1), a name that matches no weight, or one that cannot be pruned.

    >>> from acclimate.zoo import digits_cnn
    >>> small = prune(digits_cnn(), channels=0.5)
    >>> sum(v.type.size for v in small.parameters().values())
    2182
    """
    graph_of(model)
    if channels is None and connections is None:
        raise WrongUse("nothing is to be pruned", action="channels=0.5, or connections=0.9")
    if criterion not in CRITERIA:
        raise WrongUse(f"no criterion is called {criterion!r}", action=f"one of {', '.join(CRITERIA)}")
    if criterion in WITH_DATA and (data is None or len(data[0]) == 0 or len(data[0]) != len(data[1])):
        raise WrongUse(f"{criterion} looks at labelled samples", where="data", action="data=(x, y)")
    if channels is not None:
        coupled = coupling(model)
        scores = unit_scores(model, coupled, criterion, data, loss, seed)
        shares = _shares(channels, [g.weights for g in coupled.groups], "channels")
        model = without(model, coupled, least(coupled, shares, scores))
    if connections is not None:
        model = _disconnected(model, connections, criterion, data, loss, seed)
    return model


def least(coupled: Coupling, shares: list[float], scores: np.ndarray) -> np.ndarray:
    """Labels of the units to remove: of each group its share with the least score, but never all."""
    out = [np.zeros(0, np.int64)]
    for group, share in zip(coupled.groups, shares, strict=True):
        count = min(round(share * len(group.units)), len(group.units) - 1)
        out.append(group.units[np.argsort(scores[group.units], kind="stable")[:count]])
    return np.concatenate(out)


def each_alone(
    model: Graph,
    share: float,
    criterion: str = "l2",
    data: Any = None,
    loss: Any = "cross_entropy",
    seed: int = 0,
) -> Iterator[tuple[Group, Graph]]:
    """For each group of layers the model without this share of that group alone: how much each can spare."""
    coupled = coupling(model)
    scores = unit_scores(model, coupled, criterion, data, loss, seed)
    for group in coupled.groups:
        only = _shares({group.name: share}, [group.weights], "channels")
        yield group, without(model, coupled, least(replace(coupled, groups=(group,)), only, scores))


def size(graph: Graph) -> dict[str, int]:
    """`parameters`; `nonzero` of them; `macs` to predict one sample, and `nonzero_macs` without those by a zero weight,
    which dense kernels do all the same; `predict_arena_bytes`."""
    predicts = predict_graph(with_batch(graph, 1))
    values = list(graph.parameters().values())
    macs = nonzero = 0
    for node in predicts.nodes:
        work = cost(predicts, node)
        macs += work.mac + work.dw_mac
        weights = [graph.values[n].data for n in node.inputs if n in graph.values and graph.values[n].sparse]
        share = np.count_nonzero(weights[0]) / weights[0].size if weights and weights[0] is not None else 1.0
        nonzero += round(share * (work.mac + work.dw_mac))
    return {
        "parameters": sum(v.type.size for v in values),
        "nonzero": sum(
            int(np.count_nonzero(v.data)) if v.sparse and v.data is not None else v.type.size for v in values
        ),
        "macs": macs,
        "nonzero_macs": nonzero,
        "predict_arena_bytes": arrange(passes.run(passes.prepare(predicts, set()))).arena_bytes,
    }


def _disconnected(model: Graph, connections: Any, criterion: str, data: Any, loss: Any, seed: int) -> Graph:
    names = _weights(model)
    shares = _shares(connections, [(n,) for n in names], "connections")
    random = np.random.default_rng(seed)
    total = {
        n: random.random(model.shape(n)) if criterion == "random" else np.zeros(model.shape(n)) for n in names
    }
    for sample in () if criterion == "random" else _samples(model, names, criterion, data, loss, seed):
        for name, array in sample.items():
            total[name] += _PER_SAMPLE.get(criterion, np.asarray)(array)
    new = model.copy()
    for name, share in zip(names, shares, strict=True):
        count = round(share * total[name].size)
        if count:
            weight = np.array(model.values[name].data)
            weight.ravel()[np.argsort(total[name], axis=None, kind="stable")[:count]] = 0
            new.values[name] = replace(model.values[name], data=weight, sparse=True)
    return new


def _shares(given: Any, names: list[tuple[str, ...]], what: str) -> list[float]:
    """The share of each of several groups of weights."""
    by_name = dict(given) if isinstance(given, Mapping) else {"*": given}
    for pattern, share in by_name.items():
        if not isinstance(share, (int, float, np.number)) or not 0 <= share < 1:
            raise WrongUse(
                f"a share of {what} lies in [0, 1)", where=pattern, number=repr(share), action=f"{what}=0.5"
            )
        if not any(fnmatchcase(n, pattern) for group in names for n in group):
            raise WrongUse(
                f"no weight whose {what} can be pruned is called so",
                where=pattern,
                action=f"one of {', '.join(g[0] for g in names[:8])}{' ...' if len(names) > 8 else ''}",
            )
    out = []
    for group in names:
        wanted = {float(share) for p, share in by_name.items() for n in group if fnmatchcase(n, p)}
        if len(wanted) > 1:
            raise WrongUse(
                f"layers that share their {what} are given several shares",
                where=", ".join(group),
                number=str(sorted(wanted)),
                action="one share for all of them",
            )
        out.append(wanted.pop() if wanted else 0.0)
    return out
