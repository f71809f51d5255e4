"""Recurrent layers in whole models: what torch computes, in plans, in segments of time, and by the C runtime."""

import copy

import numpy as np
import pytest
from frontend import cases

import acclimate
from acclimate import errors, passes
from acclimate.frontend import from_torch
from acclimate.grad import Channels, UpdateSet
from acclimate.ops import TABLE
from acclimate.planner import Plan

torch, nn = cases.torch, cases.nn
T, F = 9, 5


class Sequence(nn.Module):
    """A recurrent layer, given its states or not, and a head on what is picked of its results."""

    def __init__(self, layer, pick, given=False, first=True):
        super().__init__()
        self.layer, self.pick, self.given, self.first = layer, pick, given, first
        sides = 2 if layer.bidirectional else 1
        count, h = layer.num_layers * sides, layer.hidden_size
        self.start = nn.Parameter(torch.randn(2, count, 1, h) * 0.5) if given else None
        self.head = nn.Linear(h * (sides if pick == "all" else count), 3)

    def forward(self, x):
        x = x if self.first else x.transpose(0, 1)
        states = ()
        if self.given:
            n = x.shape[0 if self.first else 1]
            h, c = (self.start[i].expand(-1, n, -1) for i in (0, 1))
            states = ((h, c) if isinstance(self.layer, nn.LSTM) else h,)
        y, last = self.layer(x, *states)
        if self.pick == "all":
            return self.head(y if self.first else y.transpose(0, 1)).mean(1)
        last = last if isinstance(last, tuple) else (last,)
        return self.head(last["hc".index(self.pick)].transpose(0, 1).flatten(1))


def lstm(pick="h", given=False, **more):
    more = {"batch_first": True, **more}
    return lambda: Sequence(nn.LSTM(F, 6, **more), pick, given, more["batch_first"])


def gru(pick="h", given=False, **more):
    more = {"batch_first": True, **more}
    return lambda: Sequence(nn.GRU(F, 6, **more), pick, given, more["batch_first"])


def rnn(pick="h", given=False, **more):
    more = {"batch_first": True, **more}
    return lambda: Sequence(nn.RNN(F, 6, **more), pick, given, more["batch_first"])


class Cells(nn.Module):
    """Steps unrolled by hand."""

    def __init__(self, cell):
        super().__init__()
        self.cell, self.head = cell, nn.Linear(6, 3)

    def forward(self, x):
        state = None
        for t in range(3):
            state = self.cell(x[:, t], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


MODELS = {
    "lstm": lstm(),
    "lstm_all": lstm("all"),
    "lstm_c": lstm("c"),
    "lstm_given": lstm("h", True),
    "lstm_c_given": lstm("c", True, num_layers=2, bidirectional=True),
    "lstm_time_first": lstm("all", batch_first=False),
    "lstm_deep": lstm("all", num_layers=3, bidirectional=True, bias=False),
    "gru": gru(),
    "gru_given": gru("all", True, batch_first=False, bidirectional=True),
    "gru_deep": gru("h", num_layers=2, bias=False),
    "rnn_tanh": rnn("h", True, num_layers=2),
    "rnn_relu": rnn("all", nonlinearity="relu", bidirectional=True),
    "lstm_cell": lambda: Cells(nn.LSTMCell(F, 6)),
    "gru_cell": lambda: Cells(nn.GRUCell(F, 6, bias=False)),
    "rnn_cell": lambda: Cells(nn.RNNCell(F, 6)),
}


@pytest.mark.parametrize("segment", [0, 1, 4, None])
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_torchs(name, segment):
    module = cases.seeded(MODELS[name])
    graph = passes.segment_time(from_torch(module, torch.randn(2, T, F)), segment)
    cases.same(graph, module, (T, F))
    assert set(graph.parameters()) == {
        n for n, p in module.named_parameters() if name != "lstm" or "start" not in n
    }
    compared = 0
    for tensor, got, want in cases.gradients(graph, module, (T, F)):
        np.testing.assert_allclose(
            got, want, rtol=1e-4, atol=1e-5 * max(1, np.abs(want).max()), err_msg=tensor
        )
        compared += 1
    assert compared == 1 + len(list(module.parameters()))


def _plan(graph, names, batch=2):
    update = UpdateSet(names).check(graph)
    plan = acclimate.plan(graph, scheme=update, loss="cross_entropy", batch_size=batch)
    assert isinstance(plan, Plan)
    return plan


def _data(n=2, t=T):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, t, F)).astype(np.float32), rng.integers(0, 3, n)


@pytest.mark.parametrize("segment", [0, 4])
@pytest.mark.parametrize("name", ["lstm_c_given", "gru_given", "rnn_tanh", "lstm_deep"])
def test_the_runtime_gives_torchs_gradients(name, segment):
    module = cases.seeded(MODELS[name])
    graph = passes.segment_time(from_torch(module, torch.randn(2, T, F)), segment)
    x, y = _data()
    found = acclimate.Learner(_plan(graph, dict.fromkeys(graph.parameters()))).gradients(x, y)
    module = copy.deepcopy(module)
    nn.functional.cross_entropy(module(torch.from_numpy(x)), torch.from_numpy(y)).backward()
    for tensor, p in module.named_parameters():
        if p.grad is None:
            continue
        want = p.grad.numpy()
        np.testing.assert_allclose(found[tensor], want, rtol=1e-4, atol=2e-6, err_msg=tensor)


@pytest.mark.parametrize("name", ["lstm", "lstm_c_given", "gru", "gru_given", "rnn_tanh"])
def test_segments_give_the_same_bits(name):
    module = cases.seeded(MODELS[name])
    graph = from_torch(module, torch.randn(2, T, F))
    x, y = _data()
    names = dict.fromkeys(graph.parameters())
    want = acclimate.Learner(_plan(graph, names)).gradients(x, y)
    for k in (1, 2, 4, T):
        got = acclimate.Learner(_plan(passes.segment_time(graph, k), names)).gradients(x, y)
        assert all(got[n].tobytes() == want[n].tobytes() for n in want), k


def test_parts_of_the_parameters_learn():
    """Only the tensors and channels that are asked for, with the bits that they have among all."""
    module = cases.seeded(MODELS["lstm_deep"])
    graph = from_torch(module, torch.randn(2, T, F))
    x, y = _data()
    whole = acclimate.Learner(_plan(graph, dict.fromkeys(graph.parameters()))).gradients(x, y)
    part = {"layer.weight_hh_l1": None, "layer.weight_ih_l2": Channels(0, (1, 7, 20)), "head.bias": None}
    plan = _plan(graph, part)
    found = acclimate.Learner(plan).gradients(x, y)
    assert set(found) == set(part)
    np.testing.assert_array_equal(found["layer.weight_hh_l1"], whole["layer.weight_hh_l1"])
    want = np.zeros_like(whole["layer.weight_ih_l2"])
    want[[1, 7, 20]] = whole["layer.weight_ih_l2"][[1, 7, 20]]
    np.testing.assert_array_equal(found["layer.weight_ih_l2"], want)
    step = plan.layouts["step"].graph
    given = [n for node in step.nodes if node.op == "lstm_grad" for n in node.outputs[1:5] if n]
    assert len(given) == 2, given  # of ten tensors, the gradients of two


def test_only_biases_learn():
    module = cases.seeded(MODELS["gru"])
    graph = from_torch(module, torch.randn(2, T, F))
    x, y = _data()
    whole = acclimate.Learner(_plan(graph, dict.fromkeys(graph.parameters()))).gradients(x, y)
    plan = _plan(graph, {"layer.bias_ih_l0": None, "layer.bias_hh_l0": None})
    found = acclimate.Learner(plan).gradients(x, y)
    assert set(found) == {"layer.bias_ih_l0", "layer.bias_hh_l0"}
    assert all(np.array_equal(found[n], whole[n]) for n in found)
    node = next(n for n in plan.layouts["step"].graph.nodes if n.op == "gru_grad")
    assert [bool(n) for n in node.outputs] == [False, False, False, True, True, False, True]
    assert plan.macs_per_step < _plan(graph, dict.fromkeys(graph.parameters())).macs_per_step


@pytest.mark.parametrize("kind, ratio", [(nn.LSTM, 5), (nn.GRU, 4)])
def test_segments_take_less_memory(kind, ratio):
    """Of a long sequence whose last state is used: the arena falls towards the sequences themselves."""
    module = cases.seeded(lambda: Sequence(kind(F, 24, batch_first=True), "h"))
    t = 100
    graph = from_torch(module, torch.randn(1, t, F))
    names = dict.fromkeys(graph.parameters())
    plans = {k: _plan(passes.segment_time(graph, k), names, 1) for k in (0, 10, 50, None)}
    sequences = 4 * t * (F + 24)  # x and y
    over = {k: p.arena_bytes - sequences for k, p in plans.items()}
    assert over[None] == over[10] < over[50] < over[0]
    assert over[0] >= ratio * over[10] / 2
    assert plans[10].macs_per_step > plans[0].macs_per_step
    learner = acclimate.Learner(plans[10])
    x, y = _data(1, t)
    assert learner.measured_peak_bytes(x, y) <= plans[10].peak_bytes


def test_learning_and_dropout_between_layers():
    """A task that needs memory: the sign of what came six steps before the end."""
    torch.manual_seed(1)
    module = Sequence(nn.GRU(F, 16, 2, batch_first=True, dropout=0.1), "h").train()
    graph = passes.segment_time(from_torch(module, torch.randn(2, T, F)))
    assert [n.op for n in graph.nodes].count("dropout") == 1
    rng = np.random.default_rng(2)
    x = rng.normal(size=(256, T, F)).astype(np.float32)
    y = (x[:, 2, 0] > 0).astype(np.int64)
    plan = acclimate.plan(graph, scheme="full", optimizer=acclimate.Adam(lr=0.01), batch_size=16)
    learner = acclimate.Learner(plan)
    before = learner.score(x, y)
    learner.fit(x, y, epochs=30)
    assert learner.score(x, y) > max(0.9, before)


def test_what_is_refused():
    for module, word in (
        (cases.Fn(lambda x, r: r(x)[0], nn.LSTM(F, 6, batch_first=True, proj_size=3)), "proj_size"),
        (cases.Fn(lambda x, r: r(x)[0], nn.GRU(F, 4)), "mix|batch"),
    ):
        shape = (2, T, F) if "proj" in word else (T, F)
        with pytest.raises(errors.Unsupported, match=word):
            from_torch(module, torch.randn(*shape))


def test_attributes_that_make_no_sense():
    x, w_ih, w_hh = (acclimate.ir.Type(s) for s in ((2, 5, 3), (16, 3), (16, 4)))
    from acclimate.ops import infer

    row = TABLE["lstm"]
    with pytest.raises(errors.BadInput, match="segment"):
        infer(row, row.fill({"segment": 6}), [x, w_ih, w_hh])
    with pytest.raises(errors.BadInput, match="4 rows a unit"):
        infer(row, row.fill({}), [x, acclimate.ir.Type((12, 3)), acclimate.ir.Type((12, 4))])
