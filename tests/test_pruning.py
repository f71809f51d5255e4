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
