"""The memory plan: proved by brute force over all pairs, then by poisoned memory at run time."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed (the test extra)")
from cases import run_poisoned
from models import MODELS, batch, exported
from overlaps import assert_no_overlap, value_lifetimes

import acclimate
from acclimate.layout import Buffer, place
from acclimate.runtime import Session

SCHEMES = ["full", "last", "bias"]


def plan_for(name, scheme, n=4, train=False, **more):
    return acclimate.plan(exported(name, train)[1], scheme=scheme, loss=MODELS[name][3], batch_size=n, **more)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_no_two_live_values_overlap(name, scheme, train):
    """All pairs. Two values may share bytes only as views, or where one is made by overwriting the other as it dies."""
    if scheme == "bias" and name == "tied":
        pytest.skip("its biases are not all in the loss")
    plan = plan_for(name, scheme, train=train)
    for layout in plan.layouts.values():
        assert_no_overlap(layout)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_arena_is_tight_and_as_measured(name, scheme):
    plan = plan_for(name, scheme)
    assert plan.arena_bytes <= 1.05 * plan.lower_bound_bytes
    learner = acclimate.Learner(plan)
    assert learner.measured_peak_bytes(*batch(name, 4)) == plan.arena_bytes


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_poisoned_memory(name, train):
    """Every byte that the plan says is dead is filled with garbage after every op; nothing changes."""
    plan = plan_for(name, "full", train=train)
    x, y = batch(name, 4)
    clean, dirty = Session(plan.program), Session(plan.program)
    want = clean.run("step", x=x, y=y, lr=0.05)["loss"]
    run_poisoned(dirty, plan.layouts["step"], x=x, y=y, lr=0.05)
    assert dirty.view("step", "loss")[0] == want[0]
    assert np.array_equal(clean.state, dirty.state)


def test_dead_weights_cost_nothing():
    """What is frozen is neither differentiated nor saved: memory and work fall with the update set."""
    plans = {
        s: plan_for("residual", s)
        for s in ("full", "last", "bias", "block:head", "match:blocks.2.*,bn.*,head.*")
    }
    full = plans["full"]
    for name, plan in plans.items():
        if name != "full":
            assert (
                plan.arena_bytes < full.arena_bytes
                and plan.macs_per_step < full.macs_per_step
                and plan.state_bytes < full.state_bytes
            )
    ops = {n.op for n in plans["last"].layouts["step"].nodes}
    assert not ops & {"conv_input_grad", "conv_weight_grad"}
    folded = plan_for("inverted", "last").layouts["step"]
    assert "batch_norm" not in {
        n.op for n in folded.nodes
    }  # frozen norms disappear into the convolutions before them
    bias = plans["bias"].layouts["step"]
    assert "conv_weight_grad" not in {n.op for n in bias.nodes}
    assert "gate_bits" in {n.op for n in bias.nodes}  # one bit an element is what remains


def test_updates_run_as_soon_as_they_can():
    """No gradient of a weight waits: of all weight gradients at most two are ever alive together."""
    layout = plan_for("residual", "full").layouts["step"]
    grads = {n.inputs[1] for n in layout.nodes if n.op == "sgd"}
    first, last = value_lifetimes(layout)
    convs = [g for g in grads if len(layout.graph.shape(g)) == 4]
    assert len(convs) == 7
    assert max(sum(first[g] <= i <= last[g] for g in convs) for i in range(len(layout.nodes))) <= 2


def test_identical_lifetimes_do_not_collide():
    """The case that a known planner gets wrong."""
    buffers = [Buffer(["x"], 100, 0, 1), Buffer(["y"], 80, 0, 1)]
    assert place(buffers, 180) == 180
    assert {b.offset for b in buffers} in ({0, 100}, {0, 80})


@pytest.mark.parametrize("seed", range(30))
def test_random_placements(seed):
    """No overlap, and close to the bound, on random lifetimes."""
    rng = np.random.default_rng(seed)
    buffers = []
    for i in range(60):
        start = int(rng.integers(0, 50))
        buffers.append(
            Buffer([str(i)], int(rng.integers(1, 200)) * 4, start, start + int(rng.geometric(0.2)))
        )
    live = [sum(b.size_bytes for b in buffers if b.start <= t <= b.end) for t in range(120)]
    top = place(buffers, max(live))
    for i, a in enumerate(buffers):
        for b in buffers[:i]:
            if a.start <= b.end and b.start <= a.end:
                assert a.offset + a.size_bytes <= b.offset or b.offset + b.size_bytes <= a.offset
    assert max(b.offset + b.size_bytes for b in buffers) == top <= 1.15 * max(live)
