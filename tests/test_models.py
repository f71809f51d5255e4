"""Whole models against torch autograd in float64: gradients, trajectories, both modes, partial update sets."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (the test extra)")
from models import MODELS, batch, exported, torch_loss  # noqa: E402

import acclimate  # noqa: E402
from acclimate.grad import Channels  # noqa: E402

MODES = [False, True]


def learner_for(name, n, train=False, **plan):
    net, model = exported(name, train)
    plan = {"scheme": "full", "loss": MODELS[name][3], "batch_size": n, **plan}
    return net, acclimate.Learner(acclimate.plan(model, **plan))


def exact_gradients(net, name, x, y):
    exact = copy.deepcopy(net).double()
    torch_loss(name, exact(torch.as_tensor(x).double()), y).backward()
    return {k: p.grad.numpy() for k, p in exact.named_parameters()}


def assert_close(got, want, tolerance=1e-4):
    top = max(np.linalg.norm(g) for g in want.values())
    for k, g in want.items():
        error = np.linalg.norm(got[k] - g) / max(np.linalg.norm(g), 1e-3 * top)
        assert error < tolerance, f"{k}: relative error {error:.1e}"


@pytest.mark.parametrize("train", MODES, ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_every_gradient(name, train):
    net, learner = learner_for(name, 5, train)
    x, y = batch(name, 5)
    want = exact_gradients(net, name, x, y)
    got = learner.gradients(x, y)
    assert set(got) == set(want)
    assert_close(got, want)


OPTIMIZERS = {
    "sgd": (acclimate.SGD(lr=0.05), lambda p: torch.optim.SGD(p, 0.05)),
    "momentum": (
        acclimate.SGD(lr=0.02, momentum=0.9, weight_decay=1e-3),
        lambda p: torch.optim.SGD(p, 0.02, 0.9, weight_decay=1e-3),
    ),
    "nesterov": (
        acclimate.SGD(lr=0.02, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.02, 0.9, nesterov=True),
    ),
    "adam": (
        acclimate.Adam(lr=1e-3, weight_decay=1e-3),
        lambda p: torch.optim.Adam(p, 1e-3, weight_decay=1e-3),
    ),
    "adamw": (acclimate.AdamW(lr=1e-3), lambda p: torch.optim.AdamW(p, 1e-3)),
}


@pytest.mark.parametrize("train", MODES, ids=["eval", "train"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", ["residual", "signal", "attention"])
def test_trajectory(name, kind, train):
    """Ten steps: losses, parameters and running statistics end where float64 torch ends."""
    ours, theirs = OPTIMIZERS[kind]
    net, learner = learner_for(name, 6, train, optimizer=ours)
    exact = copy.deepcopy(net).double()
    optimizer = theirs(exact.parameters())
    losses = []
    for step in range(10):
        x, y = batch(name, 6, seed=step)
        optimizer.zero_grad()
        loss = torch_loss(name, exact(torch.as_tensor(x).double()), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        learner.partial_fit(x, y)
    np.testing.assert_allclose(learner.loss_history, losses, rtol=2e-3, atol=1e-4)
    got = learner.parameters()
    for k, p in exact.named_parameters():
        assert np.linalg.norm(got[k] - p.detach().numpy()) <= 2e-3 * max(1.0, p.norm().item()), k
    statistics = learner.statistics()
    for k, b in exact.named_buffers():
        if "running" in k:
            np.testing.assert_allclose(statistics[k], b.numpy(), rtol=2e-3, atol=1e-4, err_msg=k)
    exact.eval()
    x, _ = batch(name, 4, seed=99)
    np.testing.assert_allclose(
        learner.decision_function(x),
        exact(torch.as_tensor(x).double()).detach().numpy(),
        rtol=0.02,
        atol=0.02,
    )


def test_gradient_clipping_and_accumulation():
    """Clipping by the common norm, and two micro-batches that make one step, as torch would."""
    ours = acclimate.SGD(lr=0.1, momentum=0.9, clip_norm=0.05, accumulate=2)
    net, learner = learner_for("residual", 4, optimizer=ours)
    exact = copy.deepcopy(net).double()
    optimizer = torch.optim.SGD(exact.parameters(), 0.1, 0.9)
    for step in range(3):
        x, y = batch("residual", 8, seed=step)
        learner.partial_fit(x, y)
        optimizer.zero_grad()
        torch_loss("residual", exact(torch.as_tensor(x).double()), y).backward()
        torch.nn.utils.clip_grad_norm_(exact.parameters(), 0.05)
        optimizer.step()
    got = learner.parameters()
    for k, p in exact.named_parameters():
        assert np.linalg.norm(got[k] - p.detach().numpy()) <= 1e-4 * max(1.0, p.norm().item()), k


@pytest.mark.parametrize("scheme", ["last", "last-2", "bias", "norm", "block:stem,head", "match:blocks.1.*"])
def test_only_the_update_set_moves(scheme):
    net, learner = learner_for("residual", 4, scheme=scheme)
    x, y = batch("residual", 4)
    want = exact_gradients(net, "residual", x, y)
    got = learner.gradients(x, y)
    chosen = set(learner.plan.update_set.names())
    assert set(got) == chosen and 0 < len(chosen) < len(want)
    assert_close(got, {k: want[k] for k in chosen})
    before = learner.parameters()
    learner.partial_fit(x, y)
    moved = {k for k, v in learner.parameters().items() if not np.array_equal(v, before[k])}
    assert moved == chosen


@pytest.mark.parametrize(
    "name",
    ["blocks.1.conv1.weight", "blocks.1.conv2.weight", "stem.weight", "head.weight", "blocks.2.bn1.weight"],
)
@pytest.mark.parametrize("axis", [0, 1])
def test_some_channels_learn(name, axis):
    """Gradient and update of chosen channels equal those of the whole tensor there; the others stay."""
    net, model = exported("residual")
    if axis >= len(model.shape(name)):
        pytest.skip("a vector has one axis")
    channels = Channels(axis, tuple(range(model.shape(name)[axis]))[1::2])
    plan = acclimate.plan(
        model, scheme={name: channels}, batch_size=4, optimizer=acclimate.SGD(lr=0.1, momentum=0.9)
    )
    learner = acclimate.Learner(plan)
    x, y = batch("residual", 4)
    want = exact_gradients(net, "residual", x, y)[name]
    inside = np.zeros(want.shape, bool)
    inside[(slice(None),) * axis + (list(channels.index),)] = True
    assert_close(learner.gradients(x, y), {name: np.where(inside, want, 0)})
    before = learner.parameters()
    learner.partial_fit(x, y)
    step = before[name] - learner.parameters()[name]
    assert_close({name: step}, {name: np.where(inside, 0.1 * want, 0)}, 2e-3)
    assert not step[~inside].any()
    full = acclimate.plan(
        model, scheme={name: None}, batch_size=4, optimizer=acclimate.SGD(lr=0.1, momentum=0.9)
    )
    assert plan.macs_per_step <= full.macs_per_step and plan.state_bytes <= full.state_bytes


def test_tied_weights_are_one():
    net, learner = learner_for("tied", 4)
    x, y = batch("tied", 4)
    got = learner.gradients(x, y)
    assert_close(got, exact_gradients(net, "tied", x, y))
    assert "encoder.weight" in got


def test_dropout_learns_and_predicts():
    """On in training (replayable from its counter), off in prediction, its gradient the same mask."""
    net = torch.nn.Sequential(
        torch.nn.Linear(30, 40), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.Linear(40, 3)
    ).train()
    model = acclimate.from_torch(net, torch.zeros(1, 30))
    plan = acclimate.plan(model, scheme="full", batch_size=16)
    x = np.random.default_rng(0).normal(size=(16, 30)).astype(np.float32)
    y = np.arange(16) % 3
    runs = []
    for _ in range(2):
        learner = acclimate.Learner(plan)
        for _ in range(5):
            learner.partial_fit(x, y)
        runs.append(learner.loss_history)
    assert runs[0] == runs[1]
    assert (
        len(
            {
                round(v, 6)
                for v in acclimate.Learner(plan)
                .partial_fit(np.tile(x, (4, 1)), np.tile(y, 4), lr=0)
                .loss_history
            }
        )
        == 4
    )
    net.eval()
    np.testing.assert_allclose(
        acclimate.Learner(plan).decision_function(x), net(torch.as_tensor(x)).detach().numpy(), atol=1e-5
    )


def test_rest_of_a_data_set():
    """A last batch that is smaller is learned as a smaller batch, as torch would."""
    net, learner = learner_for("classic", 4)
    x, y = batch("classic", 10)
    exact = copy.deepcopy(net).double()
    optimizer = torch.optim.SGD(exact.parameters(), 0.01)
    for i in (0, 4, 8):
        optimizer.zero_grad()
        torch_loss("classic", exact(torch.as_tensor(x[i : i + 4]).double()), y[i : i + 4]).backward()
        optimizer.step()
    learner.partial_fit(x, y)
    got = learner.parameters()
    for k, p in exact.named_parameters():
        np.testing.assert_allclose(got[k], p.detach().numpy(), atol=1e-5, err_msg=k)


@pytest.mark.parametrize(
    ("loss", "reference"),
    [
        (acclimate.CrossEntropy(smoothing=0.1), lambda: torch.nn.CrossEntropyLoss(label_smoothing=0.1)),
        (
            acclimate.CrossEntropy(class_weights=(0.2, 1.0, 3.0, 0.5)),
            lambda: torch.nn.CrossEntropyLoss(torch.tensor([0.2, 1, 3, 0.5]).double()),
        ),
        (
            acclimate.CrossEntropy(0.2, (0.2, 1.0, 3.0, 0.5)),
            lambda: torch.nn.CrossEntropyLoss(torch.tensor([0.2, 1, 3, 0.5]).double(), label_smoothing=0.2),
        ),
    ],
)
def test_cross_entropy_variants(loss, reference):
    net, learner = learner_for("classic", 6, loss=loss)
    x, y = batch("classic", 6)
    exact = copy.deepcopy(net).double()
    value = reference()(exact(torch.as_tensor(x).double()), torch.as_tensor(y))
    value.backward()
    assert_close(learner.gradients(x, y), {k: p.grad.numpy() for k, p in exact.named_parameters()})
    assert learner.evaluate(x, y)["loss"] == pytest.approx(value.item(), rel=1e-5)


def test_masked_binary_cross_entropy():
    """Targets below zero do not count."""
    net, learner = learner_for("signal", 6, loss=acclimate.BinaryCrossEntropy(masked=True))
    x, y = batch("signal", 6)
    y[0, 1], y[3, :] = -1, -1
    exact = copy.deepcopy(net).double()
    keep = torch.as_tensor(y >= 0)
    out = exact(torch.as_tensor(x).double())
    torch.nn.functional.binary_cross_entropy_with_logits(
        out[keep], torch.as_tensor(y).double()[keep]
    ).backward()
    assert_close(learner.gradients(x, y), {k: p.grad.numpy() for k, p in exact.named_parameters()})


def test_a_part_and_the_whole():
    """A gradient that fills a part of a value is still whole where something else needs it too."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (torch.nn.Linear(6, 6) for _ in range(3))

        def forward(self, x):
            h = self.a(x)
            y = h + self.b(x)
            return self.c(y[:, -1] + h.mean(1)) + (h + h)[:, 0]

    torch.manual_seed(0)
    net = Net()
    x, y = np.random.default_rng(0).normal(size=(4, 3, 6)).astype(np.float32), np.arange(4)
    learner = acclimate.Learner(
        acclimate.plan(acclimate.from_torch(net, torch.zeros(1, 3, 6)), scheme="full")
    )
    exact = copy.deepcopy(net).double()
    torch.nn.functional.cross_entropy(exact(torch.as_tensor(x).double()), torch.as_tensor(y)).backward()
    assert_close(learner.gradients(x, y), {k: p.grad.numpy() for k, p in exact.named_parameters()})


@pytest.mark.parametrize("scheme", ["full", "last"])
def test_frozen_norm_after_stacked_matrices(scheme):
    """The norm's channels are not the columns of a stacked matrix product: nothing may fold there."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.bn = torch.nn.Parameter(torch.randn(4, 4)), torch.nn.BatchNorm1d(4)
            self.head = torch.nn.Linear(16, 3)
            self.bn.running_var.uniform_(0.5, 2)

        def forward(self, x):
            y = self.bn(torch.bmm(x, self.w.expand(x.shape[0], 4, 4)))
            return self.head(y.flatten(1))

    torch.manual_seed(0)
    net = Net().eval()
    x = np.random.default_rng(0).normal(size=(3, 4, 4)).astype(np.float32)
    plan = acclimate.plan(acclimate.from_torch(net, torch.zeros(2, 4, 4)), scheme=scheme, batch_size=3)
    want = net(torch.as_tensor(x)).detach().numpy()
    np.testing.assert_allclose(acclimate.Learner(plan).decision_function(x), want, atol=1e-5)


def test_many_threads_predict_with_one_learner():
    from concurrent.futures import ThreadPoolExecutor

    _, learner = learner_for("classic", 4)
    xs = [batch("classic", 3, seed=i)[0] for i in range(8)]
    want = [learner.decision_function(x) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(learner.decision_function, xs * 50))
    assert all(np.array_equal(g, want[i % 8]) for i, g in enumerate(got))


def test_one_sample_has_no_batch_statistics():
    """torch refuses it too; the running statistics and the weights stay as they were."""
    net = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)).train()
    learner = acclimate.Learner(
        acclimate.plan(acclimate.from_torch(net, torch.zeros(2, 5)), scheme="full", batch_size=4)
    )
    before = learner.parameters()
    with pytest.raises(acclimate.WrongUse, match="more than one value"):
        learner.partial_fit(np.ones((5, 5)), np.zeros(5, int))
    assert all(np.array_equal(v, before[k]) for k, v in learner.parameters().items())


@pytest.mark.parametrize("bad", [
    lambda: acclimate.SGD(lr=float("nan")), lambda: acclimate.SGD(momentum=2.0), lambda: acclimate.SGD(accumulate=1.5),
    lambda: acclimate.Adam(clip_norm=0.0), lambda: acclimate.CrossEntropy(smoothing=2),
    lambda: acclimate.CrossEntropy(class_weights=(1.0, float("nan"))),
])  # fmt: skip
def test_numbers_out_of_range(bad):
    with pytest.raises(acclimate.WrongUse):
        bad()
