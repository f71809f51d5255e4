"""Fusing changes what a step costs, and nothing that it computes."""

import pytest
import torch
from models import MODELS, batch, exported

import acclimate
from acclimate import passes
from acclimate.learner import Learner
from acclimate.ops import TABLE
from acclimate.schemes import Full, Last, Norm, candidates

#: Models in which each activation that clamps follows an op that does so
FUSED = ("residual", "inverted", "post")


@pytest.fixture
def unfused(monkeypatch):
    """Calls a function without the pass."""

    def call(function):
        with monkeypatch.context() as m:
            m.setattr(passes, "PIPELINE", tuple(p for p in passes.PIPELINE if p is not passes.fuse))
            return function()

    return call


def _compiled(name, train, scheme, n):
    plan = acclimate.plan(exported(name, train)[1], scheme=scheme, loss=MODELS[name][3], batch_size=n)
    assert plan.program
    return plan


def _largest_mask(plan):
    graph = plan.layouts[plan.train_entry].graph
    return max((v.type.size_bytes for v in graph.values.values() if v.type.dtype == "bit"), default=0)


@pytest.mark.parametrize("scheme", [Full(), Last(2), Norm()], ids=lambda s: s.label)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_whole_models(name, train, scheme, unfused, monkeypatch):
    """The same bits with the plain kernels, in no larger arena, with the same multiply-accumulates."""
    if scheme not in candidates(exported(name, train)[1]):
        pytest.skip("the model has nothing of the kind to learn")
    monkeypatch.setenv("ACCLIMATE_KERNELS", "plain")
    x, y = batch(name, 12)
    results = []
    for compile_plan in (lambda f: f(), unfused):

        def work():
            plan = _compiled(name, train, scheme, 4)
            learner = Learner(plan).partial_fit(x, y)
            return plan, learner._main.state.tobytes(), learner.predict(x).tobytes()

        results.append(compile_plan(work))
    (plan, *bits), (before, *want) = results
    assert bits == want
    bits = _largest_mask(
        plan
    )  # alive a moment earlier: together with all that the op before the activation reads
    assert plan.lower_bound_bytes <= before.lower_bound_bytes + bits
    assert (
        plan.arena_bytes <= before.arena_bytes + bits + before.arena_bytes // 2000
    )  # what a layout settles for
    assert plan.macs_per_step == before.macs_per_step
    assert plan.counts["elementwise"] == before.counts["elementwise"]
    activations = sum(bool(TABLE[n.op].bounds) for n in before.layouts[before.train_entry].nodes)
    assert plan.counts["call"] + activations * (name in FUSED) <= before.counts["call"]


@pytest.mark.parametrize("window", [(2, 2, 0), (3, 2, 1)], ids=str)
@pytest.mark.parametrize("clamp", [torch.nn.ReLU, torch.nn.ReLU6], ids=lambda c: c.__name__)
def test_clamps_come_after_pooling(clamp, window, monkeypatch):
    """The same bits with the plain kernels, with fewer elements clamped and no more memory."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(2, 6, 3), clamp(), torch.nn.MaxPool2d(*window), torch.nn.Flatten()]
    shape = torch.nn.Sequential(*layers)(torch.zeros(1, 2, 11, 11)).shape
    net = torch.nn.Sequential(*layers, torch.nn.Linear(shape[1], 3))
    x, y = 4 * torch.randn(8, 2, 11, 11).numpy(), torch.arange(8).numpy() % 3
    results = []
    for late in (True, False):
        if not late:
            monkeypatch.setattr(passes, "clamp_late", lambda graph: graph.copy())
        plan = acclimate.plan(
            acclimate.from_torch(net, torch.zeros(1, 2, 11, 11)), scheme="full", batch_size=8
        )
        learner = Learner(plan, kernels="plain").partial_fit(x, y)
        results.append((plan, learner._main.state.tobytes(), learner.predict(x).tobytes()))
    (plan, *bits), (before, *want) = results
    assert bits == want
    assert plan.counts["elementwise"] < before.counts["elementwise"]
    assert plan.arena_bytes <= before.arena_bytes


def test_sums_over_micro_batches_take_no_copy(monkeypatch):
    """The gradient of a matrix is added where it is summed: the same bits, and its bytes are not needed twice."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.ReLU(), torch.nn.Linear(30, 3))
    x, y = torch.randn(8, 40).numpy(), torch.arange(8).numpy() % 3
    results = []
    for added in (True, False):
        if not added:
            monkeypatch.setattr(passes, "PIPELINE", tuple(p for p in passes.PIPELINE if p is not passes.fuse))
        model = acclimate.from_torch(net, torch.zeros(1, 40))
        plan = acclimate.plan(model, scheme="full", batch_size=8, micro_batches=4)
        results.append((plan, Learner(plan, kernels="plain").partial_fit(x, y)._main.state.tobytes()))
    (plan, bits), (before, want) = results
    assert bits == want
    assert plan.arena_bytes < 40 * 30 * 4 <= before.arena_bytes
