"""Pruning: what is left computes what the whole model does with the removed channels silent; zeros stay zero."""

from __future__ import annotations

from dataclasses import replace

import models
import numpy as np
import pytest
from models import torch
from torch import nn

import acclimate
from acclimate import pruning
from acclimate.errors import WrongUse
from acclimate.grad import predict_graph
from acclimate.ir import Graph
from acclimate.ops import emit, evaluate, verify, with_batch
from acclimate.zoo import digits_cnn


class Recurrent(nn.Module):
    """A convolution, two kinds of recurrent layers, and a head: hidden units go with a row of each gate."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3, padding=1)
        self.gru = nn.GRU(8, 6, batch_first=True, bidirectional=True)
        self.lstm, self.head = nn.LSTM(12, 5, batch_first=True), nn.Linear(5, 4)

    def forward(self, x):
        x, _ = self.gru(torch.relu(self.conv(x)).transpose(1, 2))
        return self.head(self.lstm(x)[0][:, -1])


class Shuffled(nn.Module):
    """Groups whose channels are shuffled, a transposed convolution, squeeze and excitation, unequal shortcuts."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(2, 12, 3, padding=1)
        self.b = nn.Conv2d(12, 12, 1, groups=3)
        self.c = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.up = nn.ConvTranspose2d(12, 6, 2, 2)
        self.down, self.gate = nn.Linear(6, 3), nn.Linear(3, 6)
        self.head = nn.Linear(6 * 8 * 8, 3)

    def forward(self, x):
        y = self.b(torch.relu(self.a(x)))
        y = y.reshape(-1, 3, 4, 4, 4).transpose(1, 2).reshape(-1, 12, 4, 4)
        y = torch.relu(self.up(self.c(y)))
        s = torch.sigmoid(self.gate(torch.relu(self.down(y.mean((2, 3))))))
        return self.head((y * s[:, :, None, None]).flatten(1))


OWN = {"recurrent": (Recurrent, (1, 3, 9)), "shuffled": (Shuffled, (1, 2, 4, 4))}


def graph_of(name):
    if name not in OWN:
        return models.exported(name)[1]
    torch.manual_seed(0)
    build, shape = OWN[name]
    return acclimate.from_torch(build().eval(), torch.zeros(shape))


def silenced(graph: Graph, coupled: pruning.Coupling, removed: np.ndarray) -> Graph:
    """The whole graph with each value multiplied by zero wherever a removed channel stands in it."""
    new = Graph(graph.batch, {}, [], dict(graph.inputs), {}, dict(graph.aliases))
    names: dict[str, str] = {}

    def mask(name):
        gone = [np.isin(axis, removed) for axis in coupled.labels[name]]
        if not any(g.any() for g in gone):
            return name
        keep = np.ones(graph.shape(name), np.float32)
        for i, g in enumerate(gone):
            keep[(slice(None),) * i + (g,)] = 0
        return emit(new, "mul", name, new.constant(f"{name}.keep", keep))

    for value in graph.values.values():
        new.values[value.name] = value
    for node in graph.nodes:
        new.nodes.append(replace(node, inputs=tuple(names.get(n, n) for n in node.inputs)))
        names |= {n: mask(n) for n in node.outputs if n and graph.type(n).dtype == "f32"}
    new.outputs = {role: names.get(n, n) for role, n in graph.outputs.items()}
    return verify(new)


def zeroed(graph, coupled, removed):
    """The whole graph with zeros for every parameter's element that goes with a removed channel."""
    data = {}
    for name, value in graph.parameters().items():
        data[name] = np.array(value.data)
        for i, axis in enumerate(coupled.labels[name]):
            data[name][(slice(None),) * i + (np.isin(axis, removed),)] = 0
    return graph.with_data(data)


def output(graph, x):
    env = evaluate(graph, {graph.inputs["x"]: x}, np.float64)
    return env[graph.outputs["output"]]


#: model -> the share of its weights that half of the channels leave, at most
LEFT = {
    "classic": 0.5,
    "residual": 0.35,
    "post": 0.5,
    "inverted": 0.5,
    "signal": 0.5,
    "attention": 0.9,
    "tied": 0.6,
    "branches": 0.65,
    "recurrent": 0.4,
    "shuffled": 0.5,
}


@pytest.mark.parametrize("name", LEFT)
@pytest.mark.parametrize("seed", (0, 1))
def test_what_is_left_computes_what_the_whole_does_with_the_rest_silent(name, seed):
    graph = with_batch(predict_graph(graph_of(name)), 3)
    x = np.random.default_rng(seed).normal(size=(3, *graph.shape(graph.inputs["x"])[1:]))
    coupled = pruning.coupling(graph)
    scores = np.random.default_rng(seed).random(10_000)
    removed = pruning.least(coupled, [0.5] * len(coupled.groups), scores)
    small = pruning.without(graph, coupled, removed)
    got = output(small, x)
    whole = zeroed(graph, coupled, removed) if name == "recurrent" else silenced(graph, coupled, removed)
    np.testing.assert_allclose(got, output(whole, x), rtol=1e-9, atol=1e-12)
    assert not np.allclose(got, output(graph, x), rtol=1e-3), "the removed channels said nothing"
    size = sum(v.type.size for v in small.parameters().values())
    assert size <= LEFT[name] * sum(v.type.size for v in graph.parameters().values())


@pytest.mark.parametrize("name", LEFT)
def test_a_pruned_model_learns(name):
    graph = pruning.prune(graph_of(name), channels=0.4, criterion="l1")
    loss = models.MODELS[name][3] if name in models.MODELS else "cross_entropy"
    x = np.random.default_rng(0).normal(size=(8, *graph.shape(graph.inputs["x"])[1:])).astype(np.float32)
    y = models.batch(name, 8)[1] if name in models.MODELS else np.arange(8) % 3
    if loss == "mse":
        y = x
    plan = acclimate.plan(graph, scheme="full", loss=loss, batch_size=4, optimizer=acclimate.SGD(lr=0.05))
    learner = acclimate.Learner(plan).fit(x, y, epochs=30)
    assert np.mean(learner.loss_history[-4:]) < np.mean(learner.loss_history[:4])


# -- connections -------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": acclimate.SGD(lr=0.1, weight_decay=0.01),
    "momentum": acclimate.SGD(lr=0.05, momentum=0.9, nesterov=True),
    "adam": acclimate.Adam(lr=0.01, weight_decay=0.01),
    "adamw": acclimate.AdamW(lr=0.01),
    "accumulated": acclimate.SGD(lr=0.1, accumulate=2),
    "clipped": acclimate.SGD(lr=0.1, clip_norm=0.5),
}


def digits(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(16, 1, 8, 8)).astype(np.float32), rng.integers(0, 10, 16)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_pruned_connections_stay_pruned(optimizer):
    whole = digits_cnn()
    graph = pruning.prune(whole, connections={"*.weight": 0.8})
    plan = acclimate.plan(graph, scheme="full", batch_size=8, optimizer=OPTIMIZERS[optimizer])
    learner = acclimate.Learner(plan).fit(*digits(), epochs=5)
    for name, value in graph.parameters().items():
        now = learner.parameters()[name]
        assert value.sparse == (value.data.ndim > 1)
        if value.sparse:
            assert np.mean(value.data == 0) == pytest.approx(0.8, abs=1 / value.data.size)
            assert np.array_equal(now == 0, value.data == 0), name
        assert not np.array_equal(now, value.data), f"{name} did not learn"
    dense = acclimate.plan(whole, scheme="full", batch_size=8, optimizer=OPTIMIZERS[optimizer])
    assert plan.arena_bytes == dense.arena_bytes, "masks take memory"
    assert len(plan.program.bytes) < 1.02 * len(dense.program.bytes)


def test_pruned_connections_stay_pruned_where_channels_learn(tmp_path):
    graph = pruning.prune(digits_cnn(), connections={"body.conv.weight": 0.7, "head.weight": 0.5})
    scheme = {"body.conv.weight": [1, 4, 9], "head.weight": None}
    plan = acclimate.plan(graph, scheme=scheme, batch_size=8, optimizer="momentum")
    learner = acclimate.Learner(plan)
    gradients = learner.gradients(*digits())
    learner.fit(*digits(), epochs=3)
    for name in scheme:
        zero = graph.values[name].data == 0
        assert not gradients[name][zero].any() and gradients[name].any()
        assert np.array_equal(learner.parameters()[name] == 0, zero)
    learner.save(tmp_path / "a.acu")
    again = acclimate.Learner(plan).restore(tmp_path / "a.acu")
    assert all(np.array_equal(a, learner.parameters()[n]) for n, a in again.parameters().items())


def test_a_pruned_graph_is_saved_and_loaded(tmp_path):
    graph = pruning.prune(digits_cnn(), channels=0.5, connections=0.5)
    acclimate.save(graph, tmp_path / "small.npz")
    again = acclimate.load(tmp_path / "small.npz")
    assert {n: v.sparse for n, v in again.values.items()} == {n: v.sparse for n, v in graph.values.items()}
    assert str(again) == str(graph)


# -- what is removed ---------------------------------------------------------------------------------------------------


def test_fisher_and_taylor_are_the_loss_along_a_channel():
    """w g summed over the weights that a channel meets is the slope of the loss as that channel is turned down."""
    graph = predict_graph(models.exported("classic")[1])
    x, y = models.batch("classic", 3)
    coupled = pruning.coupling(graph)
    scores = {c: pruning.unit_scores(graph, coupled, c, (x, y)) for c in ("taylor", "fisher")}
    plan = acclimate.plan(graph, scheme="full", batch_size=1)
    group = coupled.groups[1]
    for unit in group.units[:3]:
        slopes = []
        for i in range(3):
            losses = []
            for scale in (1.01, 0.99):
                data = {}
                for name, axes in coupled.met.items():
                    data[name] = np.array(graph.values[name].data)
                    for axis in axes:
                        at = coupled.labels[name][axis] == unit
                        data[name][(slice(None),) * axis + (at,)] *= scale
                learner = acclimate.Learner(replace(plan, model=graph.with_data(data)))
                losses.append(learner.evaluate(x[i : i + 1], y[i : i + 1])["loss"])
            slopes.append((losses[0] - losses[1]) / 0.02)
        assert scores["taylor"][unit] == pytest.approx(np.mean(np.abs(slopes)), rel=5e-3, abs=1e-5)
        assert scores["fisher"][unit] == pytest.approx(np.mean(np.square(slopes)) / 2, rel=1e-2, abs=1e-7)


def test_the_least_go_first_and_one_stays():
    graph = digits_cnn()
    weight = np.array(graph.values["stem.conv.weight"].data)
    weight[[1, 6]] = 1e-3
    small = pruning.prune(
        graph.with_data({"stem.conv.weight": weight}), channels={"stem.*": 0.25}, criterion="l1"
    )
    kept = [0, 2, 3, 4, 5, 7]
    np.testing.assert_array_equal(small.values["stem.conv.weight"].data, weight[kept])
    np.testing.assert_array_equal(
        small.values["body.conv.weight"].data, graph.values["body.conv.weight"].data[:, kept]
    )
    assert small.shape("tail.conv.weight") == graph.shape("tail.conv.weight")
    assert pruning.prune(graph, channels=0.99).shape("stem.conv.weight")[0] == 1


def test_skips_share_one_choice():
    graph = models.exported("residual")[1]
    groups = {g.name: g.weights for g in pruning.coupling(graph).groups}
    assert groups["stem.weight"] == ("stem.weight", *(f"blocks.{i}.conv2.weight" for i in range(3)))
    small = pruning.prune(graph, channels={"stem.weight": 0.5})
    assert small.shape("blocks.0.conv2.weight") == (4, 8, 3, 3)
    assert small.shape("blocks.1.conv2.weight") == (12, 16, 3, 3), "8 channels of its own stay"


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({}, "nothing is to be pruned"),
        ({"channels": 1.0}, "lies in"),
        ({"channels": -0.1}, "lies in"),
        ({"channels": "half"}, "lies in"),
        ({"channels": {"head.weight": 0.5}}, "is called so"),
        ({"connections": {"nothing": 0.5}}, "is called so"),
        ({"channels": 0.5, "criterion": "best"}, "no criterion"),
        ({"channels": 0.5, "criterion": "fisher"}, "labelled samples"),
    ],
)
def test_wrong_use_is_refused(options, what):
    with pytest.raises(WrongUse, match=what):
        pruning.prune(digits_cnn(), **options)


def test_shares_of_coupled_layers_must_agree():
    with pytest.raises(WrongUse, match="several shares"):
        pruning.prune(
            models.exported("residual")[1], channels={"stem.weight": 0.5, "blocks.0.conv2.weight": 0.25}
        )


def test_rescaling_one_layer_against_the_next_changes_nothing():
    graph = predict_graph(models.exported("classic")[1])
    factor = np.random.default_rng(0).uniform(0.1, 10, graph.shape("3.weight")[0]).astype(np.float32)
    weight, bias, after = (graph.values[n].data for n in ("3.weight", "3.bias", "7.weight"))
    scaled = {
        "3.weight": weight * factor[:, None, None, None],
        "3.bias": bias * factor,
        "7.weight": after / np.repeat(factor, 9),
    }
    for criterion in ("l1", "l2"):
        a = pruning.prune(graph, channels={"3.weight": 0.5}, criterion=criterion)
        b = pruning.prune(graph.with_data(scaled), channels={"3.weight": 0.5}, criterion=criterion)
        x = models.batch("classic", 1)[0]
        np.testing.assert_allclose(output(a, x), output(b, x), rtol=1e-4, atol=1e-6)
