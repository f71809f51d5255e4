"""Integer graphs: gradients against the de-quantised twin, the update rules, learning, deltas."""

from pathlib import Path

import numpy as np
import pytest

import acclimate
from acclimate import delta
from acclimate.errors import WrongUse
from acclimate.grad import Channels, UpdateSet, predict_graph
from acclimate.ir import Dim, Graph, Quant
from acclimate.ops import TABLE, emit, evaluate, verify
from acclimate.ops.quantized import add_attrs, conv_attrs, half_away, multiplier, scaled

GEOMETRY = {"stride": (1, 1), "before": (1, 1), "after": (1, 1), "dilation": (1, 1), "groups": 1}


def conv(graph, x, x_q, name, o, kernel, y_q, rng, low=-128, **geometry):
    """One integer convolution with random weights; returns its output's name."""
    g = {**GEOMETRY, **geometry}
    c = graph.shape(x)[1] // g["groups"]
    scale = rng.uniform(0.5, 1.5, o).astype(np.float32) * np.float32(0.9 / np.sqrt(c * kernel * kernel) / 40)
    w = rng.integers(-60, 61, (o, c, kernel, kernel))
    quant = Quant(scale)
    graph.persistent(f"{name}.weight", w, "parameter", "i8", quant)
    graph.persistent(f"{name}.bias", rng.integers(-200, 200, o), "parameter", "i32", Quant(x_q[0] * scale))
    attrs, m, shift = conv_attrs(x_q, scale, y_q)
    m, shift = graph.constant(f"{name}.multiplier", m, "i32"), graph.constant(f"{name}.shift", shift, "i32")
    return emit(
        graph, "q_conv", x, f"{name}.weight", f"{name}.bias", m, shift, name=name, low=low, **g, **attrs
    )


def small_net(seed=0, batch=2):
    """Convolution, depthwise, a residual addition, mean pooling and a head: every integer op that learns."""
    rng = np.random.default_rng(seed)
    graph = Graph(batch)
    x_q, a_q, r_q = (0.02, 3), (0.03, -10), (0.04, 5)
    x = graph.input("x", (Dim(1, batch), 3, 8, 8), "i8", Quant(x_q[0], x_q[1]))
    a = conv(graph, x, x_q, "a", 8, 3, a_q, rng, low=a_q[1])
    d = conv(graph, a, a_q, "d", 8, 3, a_q, rng, groups=8)
    p = conv(graph, d, a_q, "p", 8, 1, a_q, rng, before=(0, 0), after=(0, 0))
    s = emit(graph, "q_add", a, p, name="s", **add_attrs(a_q, a_q, r_q))
    s = emit(
        graph,
        "q_rescale",
        s,
        x_zero=5,
        y_zero=-7,
        multiplier=multiplier(0.04 / 0.05)[0],
        shift=multiplier(0.8)[1],
    )
    pool = emit(
        graph, "q_avg_pool", s, kernel=(8, 8), stride=(8, 8), before=(0, 0), after=(0, 0), extra=(0, 0)
    )
    head = conv(graph, pool, (0.05, -7), "head", 5, 1, (0.01, 0), rng, before=(0, 0), after=(0, 0))
    out = emit(graph, "dequantize", head, scale=0.01, zero=0)
    graph.outputs["output"] = emit(graph, "reshape", out, shape=(Dim(1, batch), 5))
    return verify(graph)


@pytest.mark.parametrize("seed", range(4))
def test_gradients_are_those_of_the_dequantised_net(seed, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import twin

    graph = small_net(seed)
    rng = np.random.default_rng(100 + seed)
    x, y = rng.integers(-128, 128, (2, 3, 8, 8)).astype(np.int8), rng.integers(0, 5, 2)
    exact = twin.gradients(graph, x, y)
    learner = acclimate.Learner(acclimate.plan(graph, scheme="full", batch_size=2))
    found = learner.gradients(x, y)
    assert set(found) == set(exact)
    for name, want in exact.items():
        scale = np.abs(want).max()
        assert scale > 0
        assert np.abs(found[name] - want).max() <= 1e-5 * scale, name


def test_forward_is_the_same_in_c_and_numpy():
    graph = small_net(7)
    x = np.random.default_rng(1).integers(-128, 128, (2, 3, 8, 8)).astype(np.int8)
    want = evaluate(predict_graph(graph), {"x": x})[graph.outputs["output"]]
    learner = acclimate.Learner(acclimate.plan(graph, scheme="last", batch_size=2))
    assert np.array_equal(learner.decision_function(x), want.astype(np.float32))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "residual"])
def test_learning_moves_the_loss(rounding):
    graph = small_net(3, batch=8)
    rng = np.random.default_rng(0)
    y = np.arange(8) % 5
    x = (rng.normal(0, 0.8, (5, 3, 1, 1))[y] + rng.normal(0, 0.1, (8, 3, 8, 8))).astype(np.float32)
    plan = acclimate.plan(
        graph, scheme="full", batch_size=8, optimizer=acclimate.SGD(lr=0.05, rounding=rounding)
    )
    learner = acclimate.Learner(plan)
    for _ in range(150):
        learner.partial_fit(x, y)
    share = np.mean(learner.loss_history[-5:]) / learner.loss_history[0]
    assert share < (0.99 if rounding == "nearest" else 0.8), (
        share
    )  # nearest loses what is below half a quantum


def _steps(rounding, lr, steps, w, g):
    """An int8 tensor after `steps` updates with the same gradient."""
    row, rest = TABLE["q_sgd"], np.zeros(w.shape, np.int8) if rounding == "residual" else None
    attrs = row.fill({"rounding": int(rounding == "stochastic"), "salt": 3})
    for i in range(steps):
        w, _, rest = row.ref(attrs, w, g, [lr], np.array([0.01]), None, rest, np.array([i]))
    return w


def test_truncation_shrinks_weights_and_ours_does_not():
    """A gradient with mean zero: steps below one quantum, cut off towards zero, drive every weight to zero."""
    rng = np.random.default_rng(0)
    start = rng.integers(-100, 101, 4000).astype(np.int8)
    cut, ours = start.astype(np.float64), dict.fromkeys(("nearest", "stochastic", "residual"), start)
    rest = np.zeros(start.shape, np.int8)
    row = TABLE["q_sgd"]
    for i in range(100):
        g = rng.normal(0, 0.3, start.size)  # quanta a step
        cut = np.trunc(cut - g)  # what int8 -= float is in C
        for rounding in ours:
            attrs = row.fill({"rounding": int(rounding == "stochastic")})
            kept = rest if rounding == "residual" else None
            ours[rounding], _, kept = row.ref(
                attrs, ours[rounding], g * 0.01, [1.0], np.array([0.01]), None, kept, np.array([i])
            )
            rest = kept if rounding == "residual" else rest
    size = np.abs(start.astype(int)).sum()
    assert np.abs(cut).sum() < 0.5 * size
    for rounding, w in ours.items():
        assert abs(np.abs(w.astype(int)).sum() / size - 1) < 0.02, rounding


def test_small_steps_add_up():
    """A tenth of a quantum a step: nearest stands still, stochastic and residual arrive where floats would."""
    w, g = np.zeros(2000, np.int8), np.full(2000, 0.001)
    assert np.all(_steps("nearest", 1.0, 100, w, g) == 0)
    assert np.all(np.abs(_steps("residual", 1.0, 100, w, g) + 10) <= 1)
    moved = _steps("stochastic", 1.0, 100, w, g)
    assert abs(moved.mean() + 10) < 0.3 and moved.std() > 0.5


def test_update_saturates():
    w, g = np.array([120, -120], np.int8), np.array([-10.0, 10.0])
    for rounding in ("nearest", "stochastic", "residual"):
        assert _steps(rounding, 1.0, 1, w, g).tolist() == [127, -128]


def test_delta_of_integers(tmp_path):
    graph = small_net(5)
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, (2, 3, 8, 8)).astype(np.float32), np.array([1, 2])
    update = UpdateSet({"p.weight": Channels(1, (1, 4, 6)), "head.bias": None})
    plan = acclimate.plan(graph, scheme=update, batch_size=2, optimizer=acclimate.SGD(lr=0.5))
    learner = acclimate.Learner(plan)
    for _ in range(20):
        learner.partial_fit(x, y)
    before = graph.values["p.weight"].data
    now = learner.parameters()["p.weight"]
    assert now.dtype == np.int8 and not np.array_equal(now, before)
    kept = [0, 2, 3, 5, 7]
    assert np.array_equal(now[:, kept], before[:, kept])
    learner.save(tmp_path / "a.acu")
    records = {r.name: r for r in delta.decode((tmp_path / "a.acu").read_bytes())[1]}
    assert records["p.weight"].dtype == "i8" and records["p.weight"].channels.index == (1, 4, 6)
    other = acclimate.Learner(plan).restore(tmp_path / "a.acu")
    assert np.array_equal(other.parameters()["p.weight"], now)
    assert np.array_equal(other.decision_function(x), learner.decision_function(x))


def test_adam_on_integers_is_refused():
    with pytest.raises(WrongUse, match="Adam"):
        acclimate.plan(small_net(), scheme="last", optimizer="adam")


def test_multiplier_against_exact_arithmetic():
    rng = np.random.default_rng(0)
    for real in np.exp(rng.uniform(-15, 2, 200)):
        m, shift = multiplier(real)
        assert 2**30 <= m < 2**31 and abs(m * 2.0 ** (shift - 31) / real - 1) < 2**-30
        x = rng.integers(-(2**20), 2**20, 50)
        assert np.abs(scaled(x, m, shift) - x * real).max() <= 1.0
    assert half_away(np.array([0.5, -0.5, 1.5, 2.4999, -2.5])).tolist() == [1, -1, 2, 2, -3]


@pytest.mark.parametrize(("gradients", "tolerance"), [("int16", 2e-4), ("int8", 6e-2)])
@pytest.mark.parametrize("update", ["full", "p"])
def test_integer_gradients_are_close_to_float_ones(gradients, tolerance, update):
    graph = small_net(1)
    rng = np.random.default_rng(4)
    x, y = rng.integers(-128, 128, (2, 3, 8, 8)).astype(np.int8), rng.integers(0, 5, 2)
    scheme = "full" if update == "full" else UpdateSet({"p.weight": Channels(1, (1, 4, 6)), "a.bias": None})
    args = {"scheme": scheme, "batch_size": 2}
    want = acclimate.Learner(acclimate.plan(graph, **args)).gradients(x, y)
    plan = acclimate.plan(graph, gradients=gradients, **args)
    found = acclimate.Learner(plan).gradients(x, y)
    for name, w in want.items():
        error = np.linalg.norm(found[name] - w) / np.linalg.norm(w)
        assert error <= tolerance, (name, error)
    layout = plan.layouts["step"]
    ops = [n.op for n in layout.nodes]
    assert "q_conv_input_grad" not in ops and "bf_conv_input_grad" in ops and "bf_unpack" not in ops
    learner = acclimate.Learner(plan)
    for _ in range(5):
        learner.partial_fit(x, y)
    assert np.isfinite(learner.loss_history).all()


@pytest.mark.parametrize("gradients", ["float32", "int16"])
def test_only_the_channels_with_the_largest_gradients_move(gradients):
    graph = small_net(2, batch=1)
    rng = np.random.default_rng(4)
    x, y = rng.integers(-128, 128, (1, 3, 8, 8)).astype(np.int8), np.array([1])
    update = UpdateSet({"p.weight": None})
    full = acclimate.Learner(acclimate.plan(graph, scheme=update))
    gradient = full.gradients(x, y)["p.weight"]
    optimizer = acclimate.SGD(lr=1e4 / np.abs(gradient).max(), share=0.25)
    learner = acclimate.Learner(
        acclimate.plan(graph, scheme=update, optimizer=optimizer, gradients=gradients)
    )
    learner.partial_fit(x, y)
    moved = (learner.parameters()["p.weight"] != graph.values["p.weight"].data).reshape(8, -1).any(1)
    assert moved.sum() == 2  # a quarter of eight channels
