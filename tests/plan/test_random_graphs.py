"""Small random networks, each learned from once: gradients, overlap, measured bytes, and how tight arenas are."""

from __future__ import annotations

import os

import numpy as np
import pytest
from overlaps import assert_no_overlap

import acclimate
from acclimate import schemes
from acclimate.grad import gradient_graph
from acclimate.ir import Dim, Graph
from acclimate.ops import emit, evaluate, verify, with_batch
from acclimate.planner import _step, compile_plan

#: Graphs of a run; CI takes few of a fixed sequence, `ACCLIMATE_RANDOM_GRAPHS=5000` takes more of it.
COUNT = int(os.environ.get("ACCLIMATE_RANDOM_GRAPHS", "400"))
BATCH, CLASSES = 3, 4
ACTIVATIONS = ("relu", "tanh", "sigmoid", "silu", "hard_tanh", "leaky_relu", "elu", "gelu")


def random_model(seed: int) -> Graph:
    """Convolutions (grouped, strided), norms, pools, residuals, gates, concatenations, slices and fan-out."""
    rng, g = np.random.default_rng(seed), Graph()
    channels, size = int(rng.integers(1, 4)) * 2, int(rng.choice([4, 6, 8]))
    values = [g.input("x", (Dim(1, 1), channels, size, size))]
    train = rng.random() < 0.3

    def conv(x: str, i: int) -> str:
        c, kernel = g.shape(x)[1], int(rng.choice([1, 3]))
        groups = int(rng.choice([1, 2])) if c % 2 == 0 else 1
        out = int(rng.integers(1, 5)) * 2
        stride = 2 if g.shape(x)[2] >= 4 and g.shape(x)[2] % 2 == 0 and rng.random() < 0.25 else 1
        weight = g.persistent(
            f"conv{i}.weight",
            rng.normal(0, (c / groups * kernel**2) ** -0.5, (out, c // groups, kernel, kernel)),
        )
        bias = [g.persistent(f"conv{i}.bias", rng.normal(0, 0.1, out))] if rng.random() < 0.5 else []
        pad = (kernel // 2,) * 2
        return emit(
            g,
            "conv",
            x,
            weight,
            *bias,
            stride=(stride,) * 2,
            before=pad,
            after=pad,
            dilation=(1, 1),
            groups=groups,
        )

    def norm(x: str, i: int) -> str:
        c = g.shape(x)[1]
        given = [
            g.persistent(f"norm{i}.weight", rng.uniform(0.5, 1.5, c)),
            g.persistent(f"norm{i}.bias", rng.normal(0, 0.1, c)),
            g.persistent(f"norm{i}.running_mean", rng.normal(0, 0.1, c), "state"),
            g.persistent(f"norm{i}.running_var", rng.uniform(0.5, 1.5, c), "state"),
        ]
        if train:
            return emit(g, "batch_norm_train", x, *given, unused=())[0]
        return emit(g, "batch_norm", x, *given)

    for i in range(int(rng.integers(3, 20))):
        x = values[-1 - int(rng.integers(0, min(4, len(values))))]
        kind = rng.random()
        alike = [v for v in values if v != x and g.shape(v) == g.shape(x)]
        same_map = [v for v in values if v != x and g.shape(v)[2:] == g.shape(x)[2:]]
        if kind < 0.35 or i == 0:
            y = conv(x, i)
        elif kind < 0.5:
            y = norm(x, i)
        elif kind < 0.65:
            y = emit(g, str(rng.choice(ACTIVATIONS)), x)
        elif kind < 0.75 and alike:
            y = emit(g, str(rng.choice(["add", "mul", "sub"])), x, str(rng.choice(alike)))
        elif kind < 0.83 and same_map:
            y = emit(g, "concat", x, str(rng.choice(same_map)), axis=1)
        elif kind < 0.9 and g.shape(x)[1] >= 4:
            half = g.shape(x)[1] // 2
            size = (g.shape(x)[0], half, *g.shape(x)[2:])
            start = (0, int(rng.integers(0, 2)) * half, 0, 0)
            y = emit(g, "slice", x, start=start, step=(1, 1, 1, 1), size=size)
        elif kind < 0.95 and g.shape(x)[2] >= 4:
            window = {"kernel": (2, 2), "stride": (2, 2), "before": (0, 0), "after": (0, 0)}
            pool = str(rng.choice(["max_pool", "avg_pool"]))
            y = emit(
                g,
                pool,
                x,
                **window,
                **({"dilation": (1, 1)} if pool == "max_pool" else {"extra": (0, 0), "include_pad": 0}),
            )
        elif train:
            counter = g.persistent(f"drop{i}.steps", np.zeros(1), "state", "i32")
            y = emit(g, "dropout", x, counter, p=0.3, salt=i)
        else:
            y = emit(g, "affine", x, scale=0.7, shift=0.1)
        values.append(y)
    used = {n for node in g.nodes for n in node.inputs}
    ends = [v for v in values if v not in used] or values[-1:]
    parts = [emit(g, "reshape", v, shape=(Dim(1, 1), int(np.prod(g.shape(v)[1:])))) for v in ends]
    flat = emit(g, "concat", *parts, axis=1) if len(parts) > 1 else parts[0]
    width = g.shape(flat)[1]
    head = g.persistent("head.weight", rng.normal(0, width**-0.5, (CLASSES, width)))
    g.outputs["output"] = emit(g, "matmul", flat, head, tb=1)
    return verify(g)


def plan_of(seed: int, **more):
    """A model and one of its schemes, by turns."""
    model = random_model(seed)
    options = schemes.candidates(model)
    scheme = options[seed % len(options)]
    return compile_plan(model, scheme=scheme, batch_size=BATCH, **more)


def data(plan, seed: int):
    rng = np.random.default_rng(seed)
    shape = plan.model.shape(plan.model.inputs["x"])[1:]
    return rng.normal(size=(BATCH, *shape)).astype(np.float32), rng.integers(0, CLASSES, BATCH)


def float64_gradients(plan, x, y):
    """Of the model as it was loaded: no pass, no fused op, no layout, no C."""
    graph = gradient_graph(with_batch(plan.model, BATCH), plan.update_set, plan.loss)
    env = evaluate(graph, {"x": x, "y": y}, np.float64)
    return {
        name: env[graph.outputs[f"d_{name}"]]
        for name in plan.update_set.names()
        if f"d_{name}" in graph.outputs
    }


def ratio(layout) -> float:
    return layout.arena_bytes / max(layout.lower_bound_bytes, 1)


@pytest.mark.parametrize("part", range(8))
def test_random_graphs(part):
    """What the C runtime computes in the planned arena is the float64 gradient of the unoptimised model."""
    for seed in range(part, COUNT, 8):
        plan = plan_of(seed)
        for layout in plan.layouts.values():
            assert_no_overlap(layout)
        x, y = data(plan, seed)
        learner = acclimate.Learner(plan)
        assert learner.measured_peak_bytes(x, y) == plan.arena_bytes, seed
        before = learner.parameters()
        learner.partial_fit(x, y, lr=1.0)
        after = learner.parameters()
        for name, want in float64_gradients(plan, x, y).items():
            scale = max(np.abs(want).max(), 1e-2)
            np.testing.assert_allclose(
                before[name] - after[name], want, atol=2e-3 * scale, err_msg=f"seed {seed} {name}"
            )


@pytest.mark.parametrize("part", range(4))
def test_recomputing_changes_nothing(part):
    """Random values of random graphs are recomputed: the same bits, no overlap, measured = planned."""
    for seed in range(part, COUNT // 2, 4):
        plain = plan_of(seed, recompute="none")
        candidates = _step(plain, plain._choice).candidates
        rng = np.random.default_rng(seed)
        names = [n for n in candidates if rng.random() < 0.5]
        plan = plan_of(seed, recompute=names)
        assert_no_overlap(plan.layouts["step"])
        x, y = data(plan, seed)
        a, b = acclimate.Learner(plain), acclimate.Learner(plan)
        for learner in (a, b):
            learner.partial_fit(x, y)
            learner.partial_fit(x, y)
        assert a.loss_history == b.loss_history and np.array_equal(a._main.state, b._main.state), seed
        assert b.measured_peak_bytes(x, y) == plan.arena_bytes


def test_arenas_are_tight():
    """Arena over lower bound, of training steps of random graphs under every scheme."""
    ratios = np.array([ratio(plan_of(seed).layouts["step"]) for seed in range(COUNT)])
    assert ratios.min() >= 1
    print(
        f"{(ratios == 1).mean():.3f} at the bound, {(ratios > 1.01).mean():.4f} above 1.01, most {ratios.max():.3f}"
    )
    assert (ratios > 1.01).mean() <= 0.005 and ratios.max() <= 1.05
