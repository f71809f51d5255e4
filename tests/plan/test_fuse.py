"""Fusing changes what a step costs, and nothing that it computes."""

import pytest
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
