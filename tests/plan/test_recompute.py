"""Memory against time: recomputing and micro-batches change bytes and time, and nothing else."""

import itertools

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed (the test extra)")
import torch
from cases import run_poisoned
from models import MODELS, batch, exported

import acclimate
from acclimate import recompute
from acclimate.layout import buffers_of, live_bytes_of
from acclimate.planner import _plain, _step
from acclimate.runtime import Session


def plan_for(name, scheme, n=4, train=False, **more):
    return acclimate.plan(exported(name, train)[1], scheme=scheme, loss=MODELS[name][3], batch_size=n, **more)


def step_of(plan):
    return _step(plan, _plain(plan, plan.parts))


def limit_for(plan, share):
    """A limit on peak_bytes under which the arena may take a share of what it takes."""
    return int(plan.arena_bytes * share) + plan.peak_bytes - plan.arena_bytes


def least(step):
    return min(step.cost(s).peak_bytes for s in (frozenset(), *step.segments))


@pytest.mark.parametrize("kernels", ["plain", "fast"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_same_bits_whatever_is_recomputed(name, train, kernels):
    """Three steps with all, with some, and with a random part recomputed: equal states and losses."""
    plain = plan_for(name, "full", train=train, optimizer="adam", recompute="none")
    x, y = batch(name, 4)
    candidates = step_of(plain).candidates
    rng = np.random.default_rng(0)
    states = []
    choices = [(), candidates, candidates[::2], [n for n in candidates if rng.random() < 0.5]]
    for names in choices:
        plan = plan_for(name, "full", train=train, optimizer="adam", recompute=list(names))
        assert set(plan.recomputed) == set(names)
        learner = acclimate.Learner(plan, kernels=kernels)
        for _ in range(3):
            learner.partial_fit(x, y)
        state = {n: learner._main.view("state", n).copy() for n in learner._main.state_names()}
        states.append((state, learner.loss_history))
        if names:
            assert plan.latency_us > plain.latency_us and plan.macs_per_step >= plain.macs_per_step
            assert plan.recompute_us > 0
    for state, history in states[1:]:
        assert history == states[0][1]
        assert all(np.array_equal(state[n], states[0][0][n]) for n in state)


def test_random_masks_replay_and_statistics_move_once():
    """Dropout draws the mask that it drew before, and running statistics take one step a step."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.Dropout(0.4), torch.nn.Tanh(),
        torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.Dropout(0.3), torch.nn.Tanh(),
        torch.nn.Flatten(), torch.nn.Linear(8 * 36, 3),
    ).train()  # fmt: skip
    model = acclimate.from_torch(net, torch.zeros(2, 1, 6, 6))
    make = {"scheme": "full", "batch_size": 4}
    plain = acclimate.plan(model, recompute="none", **make)
    again = acclimate.plan(model, recompute=step_of(plain).candidates, **make)
    ops = [n.op for n in again.layouts["step"].nodes]
    assert ops.count("dropout") == 2 + 2 + 2  # forward, again, backward
    assert ops.count("batch_norm_train") == 2 and ops.count("ema") == 2 and ops.count("increment") == 1
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(12, 1, 6, 6)).astype(np.float32), rng.integers(0, 3, 12)
    a, b = (acclimate.Learner(p).fit(x, y, epochs=3) for p in (plain, again))
    assert a.loss_history == b.loss_history
    assert np.array_equal(a._main.state, b._main.state)


@pytest.mark.parametrize("name", MODELS)
def test_poisoned_memory_under_recomputation(name):
    """Every byte that the plan says is dead is filled with garbage after every op; nothing changes."""
    plain = plan_for(name, "full", recompute="none")
    plan = plan_for(name, "full", recompute=step_of(plain).candidates)
    x, y = batch(name, 4)
    clean, dirty = Session(plain.program), Session(plan.program)
    want = clean.run("step", x=x, y=y, lr=0.05)["loss"]
    run_poisoned(dirty, plan.layouts["step"], x=x, y=y, lr=0.05)
    assert dirty.view("step", "loss")[0] == want[0]
    assert np.array_equal(clean.state, dirty.state)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_cost_is_that_of_the_layout(name, train):
    """What the search counts with is what the rewritten graph takes in its own order, bytes and time."""
    plan = plan_for(name, "full", train=train, recompute="none")
    step = step_of(plan)
    rng = np.random.default_rng(2)
    base = sum(step._price(step.graph, n) for n in step.graph.nodes)
    for share in (0.0, 0.1, 0.3, 0.5, 0.9, 1.0):
        again = frozenset(n for n in step.candidates if rng.random() < share)
        graph = step.rewrite(again)
        cost = step.cost(again)
        assert max(live_bytes_of(buffers_of(graph, graph.nodes), len(graph.nodes))) == cost.peak_bytes
        assert sum(step._price(graph, n) for n in graph.nodes) == pytest.approx(base + cost.time_us)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_that_does_not_fit_is_made_to(name):
    """Half way between the plain arena and the least known, "auto" fits, measured; "none" refuses."""
    plain = plan_for(name, "full", n=1, recompute="none")
    step = step_of(plain)
    others = plain.layouts["predict"].arena_bytes
    goal = (plain.arena_bytes + max(least(step), others)) // 2
    if goal > 0.99 * plain.arena_bytes:
        pytest.skip("this model keeps next to nothing that could be recomputed")
    limit = goal + plain.peak_bytes - plain.arena_bytes
    with pytest.raises(acclimate.CannotFit):
        plan_for(name, "full", n=1, recompute="none", memory_bytes=limit)
    plan = plan_for(name, "full", n=1, memory_bytes=limit)
    assert plan.fits and plan.recomputed and plan.arena_bytes <= goal
    assert acclimate.Learner(plan).measured_peak_bytes(*batch(name, 1)) == plan.arena_bytes
    assert plan.row()["recomputed"] == list(plan.recomputed)
    text = str(plan)
    assert f"recomputes    {len(plan.recomputed)} values" in text


def random_step(seed):
    """A small net with fan-out, of which every choice can be tried."""
    from acclimate.grad import step_graphs
    from acclimate.ir import Dim, Graph
    from acclimate.layout import arrange
    from acclimate.objective import SGD, CrossEntropy
    from acclimate.ops import emit
    from acclimate.passes import run
    from acclimate.schemes import resolve

    rng = np.random.default_rng(seed)
    graph = Graph(2)
    values = [graph.input("x", (Dim(1, 2), 4))]
    for i in range(int(rng.integers(3, 6))):
        source = values[-1 - int(rng.integers(0, min(2, len(values))))]
        width = int(rng.integers(2, 9))
        weight = graph.persistent(f"w{i}", rng.normal(size=(width, graph.shape(source)[1])))
        value = emit(graph, "matmul", source, weight, tb=1)
        if rng.random() < 0.7:
            value = emit(graph, str(rng.choice(["tanh", "relu", "silu"])), value)
        alike = [v for v in values if graph.shape(v) == graph.shape(value)]
        if alike and rng.random() < 0.7:
            value = emit(graph, str(rng.choice(["add", "mul"])), value, alike[0])
        values.append(value)
    head = graph.persistent("head", rng.normal(size=(3, graph.shape(values[-1])[1])))
    graph.outputs["output"] = emit(graph, "matmul", values[-1], head, tb=1)
    update_set = resolve("full").choose(graph).check(graph)
    layout = arrange(run(step_graphs(graph, update_set, CrossEntropy(), SGD())["step"]))
    prices = {}
    return recompute.Step(layout, lambda g, n: prices.setdefault(n.outputs, 1.0 + len(prices) % 5))


@pytest.mark.parametrize("seed", range(25))
def test_exact_is_the_best_of_all_choices(seed):
    """Integer program = brute force over all subsets, at several limits; the greedy choice is never quicker."""
    pytest.importorskip("scipy", reason="scipy is not installed (the exact extra)")
    from acclimate.exact import solve

    step = random_step(seed)
    assert 2 <= len(step.candidates) <= 13
    table = [
        step.cost(frozenset(c))
        for k in range(len(step.candidates) + 1)
        for c in itertools.combinations(step.candidates, k)
    ]
    peaks = sorted({c.peak_bytes for c in table})
    for target in {peaks[0] - 4, peaks[0], peaks[len(peaks) // 2], peaks[-1]}:
        fitting = [c.time_us for c in table if c.peak_bytes <= target]
        solution, greedy = solve(step, target), step.greedy(target)
        if not fitting:
            assert solution is None and greedy is None
            continue
        assert solution is not None and solution.proven
        assert step.cost(solution.again).peak_bytes <= target
        assert step.cost(solution.again).time_us == pytest.approx(min(fitting))
        if greedy is not None:
            assert step.cost(greedy).time_us >= min(fitting) - 1e-6


@pytest.mark.slow
def test_greedy_is_close_to_exact():
    """On whole models: a step takes at most 1.03 times as long as with the choice that is proved to be the quickest."""
    pytest.importorskip("scipy", reason="scipy is not installed (the exact extra)")
    from acclimate.exact import solve

    proven = 0
    for name in ("classic", "residual", "inverted", "signal", "branches"):
        step = step_of(plan_for(name, "full", n=2, recompute="none"))
        whole = sum(step._price(step.graph, n) for n in step.graph.nodes)
        top, low = step.cost(frozenset()).peak_bytes, least(step)
        for share in (0.25, 0.5, 0.75, 1.0):
            target = int(top - (top - low) * share)
            greedy, solution = step.greedy(target), solve(step, target, 20.0)
            assert greedy is not None and solution is not None
            best = step.cost(solution.again).time_us
            assert best <= step.cost(greedy).time_us
            if solution.proven:
                proven += 1
                assert whole + step.cost(greedy).time_us <= 1.03 * (whole + best), (name, share)
    assert proven >= 12


def test_exact_plan():
    """The planner takes it by name, and says whether the answer is proven."""
    pytest.importorskip("scipy", reason="scipy is not installed (the exact extra)")
    plain = plan_for("classic", "full", n=1, recompute="none")
    plan = plan_for("classic", "full", n=1, recompute="exact", memory_bytes=limit_for(plain, 0.9))
    assert plan.fits and plan.recomputed and plan.row()["recompute_proven"]
    auto = plan_for("classic", "full", n=1, memory_bytes=limit_for(plain, 0.9))
    assert plan.recompute_us <= auto.recompute_us and not auto.row()["recompute_proven"]


def test_what_cannot_be_recomputed_is_refused():
    with pytest.raises(acclimate.WrongUse, match="cannot be recomputed"):
        plan_for("classic", "full", recompute=["nothing"])
    with pytest.raises(acclimate.WrongUse, match="way of choosing"):
        plan_for("classic", "full", recompute="sometimes")


# -- micro-batches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer", ["sgd", acclimate.SGD(momentum=0.9, clip_norm=0.5)], ids=["sgd", "clipped"]
)
@pytest.mark.parametrize("name", MODELS)
def test_micro_batches_take_the_same_steps(name, optimizer):
    """Losses and weights agree with whole batches up to rounding, also for the rest of the data."""
    x, y = batch(name, 14)
    learners = [
        acclimate.Learner(plan_for(name, "full", n=6, optimizer=optimizer, micro_batches=k))
        for k in (1, 2, 6)
    ]
    for learner in learners:
        learner.partial_fit(x, y, lr=0.01)
        learner.partial_fit(x, y, lr=0.01)
    whole = learners[0]
    for learner in learners[1:]:
        assert learner.plan.micro_batch_size * learner.plan.parts == 6
        assert learner.plan.arena_bytes < whole.plan.arena_bytes
        assert learner.plan.macs_per_step == whole.plan.macs_per_step
        np.testing.assert_allclose(learner.loss_history, whole.loss_history, rtol=2e-4)
        for key, want in whole.parameters().items():
            np.testing.assert_allclose(learner.parameters()[key], want, rtol=2e-3, atol=2e-4, err_msg=key)
        assert learner.measured_peak_bytes(x, y) == learner.plan.arena_bytes
        np.testing.assert_allclose(
            learner.decision_function(x), whole.decision_function(x), rtol=2e-3, atol=2e-3
        )


def test_micro_batches_make_it_fit():
    """Under a limit, the quicker of micro-batches and recomputing is taken; either can be ruled out."""
    plain = plan_for("inverted", "full", n=8, recompute="none", micro_batches=1)
    floor = max(least(step_of(plain)), plain.layouts["predict"].arena_bytes)
    limit = limit_for(plain, (floor / plain.arena_bytes + 1) / 2)
    both = plan_for("inverted", "full", n=8, memory_bytes=limit)
    split = plan_for("inverted", "full", n=8, memory_bytes=limit, recompute="none")
    again = plan_for("inverted", "full", n=8, memory_bytes=limit, micro_batches=1)
    assert split.parts > 1 and not split.recomputed and again.parts == 1 and again.recomputed
    assert both.fits and split.fits and again.fits
    assert both.latency_us <= min(split.latency_us, again.latency_us)
    with pytest.raises(acclimate.CannotFit) as caught:
        plan_for("inverted", "full", n=8, memory_bytes=limit, micro_batches=1, recompute="none")
    options = [f["option"] for f in caught.value.fixes]
    assert any("--recompute" in o or "--micro-batches" in o for o in options), options
    assert "time)" in caught.value.action


def test_a_step_stopped_on_the_way_leaves_no_trace():
    learner = acclimate.Learner(plan_for("classic", "full", n=4, micro_batches=2))
    x, y = batch("classic", 4)
    before = learner._main.state.copy()
    y = y.astype(np.int32)
    y[3] = 99  # in the second part; the runtime refuses it
    with pytest.raises(acclimate.BadInput):
        learner._step(x, y, 0.1)
    assert np.array_equal(before, learner._main.state)


class Centred(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(5, 3)

    def forward(self, x):
        return self.head(x - x.mean(0, keepdim=True))


class Across(torch.nn.Module):
    """Samples that see each other, though every value has one row a sample."""

    def __init__(self, how):
        super().__init__()
        self.head, self.how = torch.nn.Linear(5, 3), how

    def forward(self, x):
        y = self.head(x)
        if self.how == "softmax":
            return y * torch.softmax(y, 0)
        if self.how == "log_softmax":
            return torch.log_softmax(y.t(), -1).t()
        return (y @ y.t()) @ y


@pytest.mark.parametrize(
    "net, shape, more, why",
    [
        (Across("softmax"), (2, 5), {}, "softmax"),
        (Across("matmul"), (2, 5), {}, "matmul"),
        (Across("log_softmax"), (2, 5), {}, "log_softmax"),
        (
            torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3)).train(),
            (2, 5), {}, "batch_norm_train",
        ),
        (torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Dropout(0.5)).train(), (2, 5), {}, "dropout"),
        (Centred(), (2, 5), {}, "mean"),
        (torch.nn.Linear(5, 3), (2, 5), {"loss": acclimate.CrossEntropy(class_weights=(1.0, 2.0, 3.0))}, "weighs"),
        (torch.nn.Linear(5, 3), (2, 5), {"loss": acclimate.BinaryCrossEntropy(masked=True)}, "weighs"),
        (torch.nn.Linear(5, 3), (2, 5), {"optimizer": acclimate.SGD(accumulate=2)}, "accumulates"),
    ],
)  # fmt: skip
def test_micro_batches_are_refused_where_they_would_change_the_step(net, shape, more, why):
    model = acclimate.from_torch(net, torch.zeros(*shape))
    with pytest.raises(acclimate.WrongUse, match="micro-batches") as caught:
        acclimate.plan(model, scheme="full", batch_size=4, micro_batches=2, **more)
    assert why in caught.value.where
    plan = acclimate.plan(model, scheme="full", batch_size=4, **more)
    assert plan.parts == 1 and why in plan.cannot_split


class Recurrent(torch.nn.Module):
    def __init__(self, kind, **more):
        super().__init__()
        self.layer, self.first = (
            getattr(torch.nn, kind)(4, 6, bidirectional=True, **more),
            "batch_first" in more,
        )
        self.head = torch.nn.Linear(12, 3)

    def forward(self, x):
        y = self.layer(x if self.first else x.transpose(0, 1))[0]
        return self.head(y[:, -1] if self.first else y[-1])


@pytest.mark.parametrize("more", [{"batch_first": True}, {}], ids=["batch_first", "time_first"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_recurrent_batch_can_be_split(kind, more):
    """Scratch of a layer does not grow with the batch, and mixes nothing."""
    torch.manual_seed(0)
    model = acclimate.from_torch(Recurrent(kind, **more), torch.zeros(2, 5, 4))
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 5, 4)).astype(np.float32), rng.integers(0, 3, 6)
    whole, parts = (
        acclimate.Learner(acclimate.plan(model, scheme="full", batch_size=6, micro_batches=k)) for k in (1, 3)
    )
    assert parts.plan.arena_bytes < whole.plan.arena_bytes
    want, got = (learner.partial_fit(x, y).parameters() for learner in (whole, parts))
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_parts_must_divide_the_batch():
    with pytest.raises(acclimate.WrongUse, match="divide"):
        plan_for("classic", "full", n=4, micro_batches=3)


# -- the curve -----------------------------------------------------------------------------------------------------


def test_curve():
    """Less memory takes more time, each row can be had by its limit, and ends are told as they are done."""
    plan = plan_for("residual", "full", n=8)
    told = []
    rows = plan.curve(4, lambda done, total: told.append((done, total)))
    assert len(rows) >= 3 and rows[0]["extra_time"] == 0 and not rows[0]["recomputed"]
    assert told[-1] == (16, 16)
    for a, b in itertools.pairwise(rows):
        assert a["peak_bytes"] > b["peak_bytes"] and a["latency_us"] <= b["latency_us"]
    again = plan_for("residual", "full", n=8, memory_bytes=rows[-1]["peak_bytes"])
    assert again.peak_bytes <= rows[-1]["peak_bytes"]
    assert any(r["recomputed"] for r in rows) and any(r["micro_batches"] > 1 for r in rows)
