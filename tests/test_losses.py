"""Losses against torch's own functions, through the C runtime: value, gradient, prediction, score, and refusals."""

import numpy as np
import pytest
from frontend import cases

import acclimate as ac
from acclimate.objective import LOSSES

torch, nn, F = cases.torch, cases.nn, cases.F

N, INPUTS, CLASSES = 7, 6, 4
RNG = np.random.default_rng(3)
X = RNG.normal(size=(N, INPUTS)).astype(np.float32)
LABELS = RNG.integers(0, CLASSES, N)
MANY = RNG.integers(0, 2, (N, CLASSES)).astype(np.float32)
VALUES = RNG.normal(size=(N, CLASSES)).astype(np.float32)
TEACHER = (3 * RNG.normal(size=(N, CLASSES))).astype(np.float32)
SOFT = torch.softmax(torch.tensor(TEACHER), 1).numpy()
SOFT[0] = [1, 0, 0, 0]  # a probability of zero has no logarithm
PLACES = RNG.normal(size=(CLASSES + 1, CLASSES)).astype(np.float32)
SIDES = RNG.choice([-1.0, 1.0], (N, 1)).astype(np.float32)


def beside(*arrays):
    return np.concatenate([a if a.ndim == 2 else a[:, None].astype(np.float32) for a in arrays], 1)


def focal(z, y, gamma, alpha=None):
    log_p = F.log_softmax(z, 1).gather(1, y[:, None])[:, 0]
    weight = 1.0 if alpha is None else torch.tensor(alpha)[y]
    return (-weight * (1 - log_p.exp()) ** gamma * log_p).mean()


def binary_focal(z, y, gamma, alpha):
    """As torchvision writes it."""
    p, ce = torch.sigmoid(z), F.binary_cross_entropy_with_logits(z, y, reduction="none")
    loss = ce * (1 - (p * y + (1 - p) * (1 - y))) ** gamma
    return (loss if alpha is None else (alpha * y + (1 - alpha) * (1 - y)) * loss).mean()


def distilled(z, t, temperature):
    return (
        F.kl_div(F.log_softmax(z / temperature, 1), F.softmax(t / temperature, 1), reduction="batchmean")
        * temperature**2
    )


def thresholded(z, t, bound, alpha=0.0, y=None):
    hard = F.binary_cross_entropy_with_logits(z, (t > bound).float())
    return hard if y is None else (1 - alpha) * hard + alpha * F.binary_cross_entropy_with_logits(z, y)


def cosine_logits(z):
    return F.linear(F.normalize(z), F.normalize(torch.tensor(PLACES)))


T, L = torch.tensor(TEACHER), torch.tensor(LABELS)
CASES = {
    # name: (loss, y, what torch makes of the output)
    "l1": ("l1", VALUES, lambda z: F.l1_loss(z, torch.tensor(VALUES))),
    "huber": ("huber", VALUES, lambda z: F.huber_loss(z, torch.tensor(VALUES))),
    "huber_delta": (ac.Huber(0.3), VALUES, lambda z: F.huber_loss(z, torch.tensor(VALUES), delta=0.3)),
    "smooth_l1": (ac.SmoothL1(0.5), VALUES, lambda z: F.smooth_l1_loss(z, torch.tensor(VALUES), beta=0.5)),
    "hinge": ("hinge", LABELS, lambda z: F.multi_margin_loss(z, L)),
    "hinge_2": (ac.Hinge(0.5, 2), LABELS, lambda z: F.multi_margin_loss(z, L, p=2, margin=0.5)),
    "binary_hinge": (
        ac.BinaryHinge(0.8),
        MANY,
        lambda z: F.relu(0.8 - (2 * torch.tensor(MANY) - 1) * z).mean(),
    ),
    "focal": ("focal", LABELS, lambda z: focal(z, L, 2.0)),
    "focal_alpha": (
        ac.Focal(0.5, (0.1, 0.2, 0.3, 0.4)),
        LABELS,
        lambda z: focal(z, L, 0.5, (0.1, 0.2, 0.3, 0.4)),
    ),
    "focal_0": (ac.Focal(0.0), LABELS, lambda z: F.cross_entropy(z, L)),
    "binary_focal": ("binary_focal", MANY, lambda z: binary_focal(z, torch.tensor(MANY), 2.0, 0.25)),
    "binary_focal_plain": (
        ac.BinaryFocal(1.5, None),
        MANY,
        lambda z: binary_focal(z, torch.tensor(MANY), 1.5, None),
    ),
    "distillation": ("distillation", TEACHER, lambda z: distilled(z, T, 2.0)),
    "distillation_mixed": (
        ac.Distillation(4.0, 0.3),
        beside(TEACHER, LABELS),
        lambda z: 0.3 * distilled(z, T, 4.0) + 0.7 * F.cross_entropy(z, L),
    ),
    "distillation_hard": (
        ac.Distillation(4.0, 0.0),
        beside(TEACHER, LABELS),
        lambda z: F.cross_entropy(z, L),
    ),
    "kl_divergence": (
        "kl_divergence",
        SOFT,
        lambda z: F.kl_div(F.log_softmax(z, 1), torch.tensor(SOFT), reduction="batchmean"),
    ),
    "thresholded": ("thresholded_distillation", TEACHER, lambda z: thresholded(z, T, 0.0)),
    "thresholded_at": (
        ac.ThresholdedDistillation(0.8, 0.1),
        beside(TEACHER, MANY),
        lambda z: thresholded(z, T, np.log(4.0), 0.1, torch.tensor(MANY)),
    ),
    "thresholded_probabilities": (
        ac.ThresholdedDistillation(0.3, targets="probabilities"),
        SOFT,
        lambda z: thresholded(z, torch.tensor(SOFT), 0.3),
    ),
    "cosine": (
        "cosine_embedding",
        VALUES,
        lambda z: F.cosine_embedding_loss(z, torch.tensor(VALUES), torch.ones(N)),
    ),
    "cosine_pairs": (
        ac.CosineEmbedding(0.2, pairs=True),
        beside(VALUES, SIDES),
        lambda z: F.cosine_embedding_loss(z, torch.tensor(VALUES), torch.tensor(SIDES[:, 0]), 0.2),
    ),
    "prototype": (
        ac.Prototype(PLACES),
        LABELS,
        lambda z: F.cross_entropy(-(torch.cdist(z, torch.tensor(PLACES)) ** 2), L),
    ),
    "prototype_cosine": (
        ac.Prototype(PLACES, "cosine", 10.0),
        LABELS,
        lambda z: F.cross_entropy(10 * cosine_logits(z), L),
    ),
}


def module():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def learner(loss, batch_size=N):
    model = ac.from_torch(module(), torch.zeros(1, INPUTS))
    return ac.Learner(ac.plan(model, scheme="full", loss=loss, batch_size=batch_size, optimizer="sgd"))


@pytest.mark.parametrize("name", CASES)
def test_value_gradient_and_a_step(name):
    loss, y, fn = CASES[name]
    net = module()
    want = fn(net(torch.tensor(X)))
    want.backward()
    ours = learner(loss)
    got = ours.evaluate(X, y)
    assert got["loss"] == pytest.approx(want.item(), rel=1e-4, abs=1e-5) and got["samples"] == N
    gradients = ours.gradients(X, y)
    for key, tensor in net.named_parameters():
        np.testing.assert_allclose(gradients[key], tensor.grad.numpy(), rtol=1e-3, atol=2e-6, err_msg=key)
    ours.partial_fit(X, y, lr=0.1)
    assert ours.loss_history == [pytest.approx(want.item(), rel=1e-4, abs=1e-5)]
    with torch.no_grad():
        for tensor in net.parameters():
            tensor -= 0.1 * tensor.grad
    for key, tensor in net.named_parameters():
        np.testing.assert_allclose(ours.parameters()[key], tensor.detach(), rtol=1e-4, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("name", CASES)
def test_learning_lowers_the_loss(name):
    loss, y, _ = CASES[name]
    ours = learner(loss, batch_size=3)  # the last batch is smaller
    before = ours.evaluate(X, y)["loss"]
    ours.fit(X, y, epochs=20, lr=0.05)
    assert ours.evaluate(X, y)["loss"] < before


def test_every_loss_that_has_a_name_is_compared():
    named = {loss for loss, _, _ in CASES.values() if isinstance(loss, str)}
    assert named | {"smooth_l1", "binary_hinge", "cross_entropy", "binary_cross_entropy", "mse"} == set(
        LOSSES
    )


@pytest.mark.parametrize("name", CASES)
def test_predictions_and_score(name):
    loss, y, _ = CASES[name]
    ours = learner(loss)
    z = ours.decision_function(X)
    kind = ours.plan.loss.kind
    answer = ours.predict(X)
    score = ours.score(X, y)
    assert score == ours.evaluate(X, y)["accuracy"]
    if kind == "classes":
        logits = z
        if name == "prototype":
            logits = -(torch.cdist(torch.tensor(z), torch.tensor(PLACES)) ** 2).numpy()
        if name == "prototype_cosine":
            logits = 10 * cosine_logits(torch.tensor(z)).numpy()
        truth = (
            TEACHER.argmax(1)
            if name == "distillation"
            else SOFT.argmax(1)
            if name == "kl_divergence"
            else LABELS
        )
        np.testing.assert_array_equal(answer, logits.argmax(1))
        np.testing.assert_allclose(
            ours.predict_proba(X), torch.softmax(torch.tensor(logits), 1), rtol=1e-4, atol=1e-6
        )
        assert score == pytest.approx((answer == truth).mean())
    elif kind == "labels":
        truth = {"thresholded": TEACHER > 0, "thresholded_probabilities": SOFT > 0.3}.get(name, MANY > 0)
        np.testing.assert_array_equal(answer, z > 0)
        np.testing.assert_allclose(ours.predict_proba(X), 1 / (1 + np.exp(-z)), rtol=1e-5)
        assert score == pytest.approx((answer == truth).mean())
    else:
        np.testing.assert_array_equal(answer, z)
        with pytest.raises(ac.WrongUse, match="no probabilities"):
            ours.predict_proba(X)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ac.Huber(0),
        lambda: ac.SmoothL1(float("nan")),
        lambda: ac.Hinge(-1),
        lambda: ac.Hinge(p=3),
        lambda: ac.BinaryHinge("wide"),
        lambda: ac.Focal(-0.1),
        lambda: ac.Focal(alpha=0.25),
        lambda: ac.BinaryFocal(alpha=2),
        lambda: ac.Distillation(0),
        lambda: ac.Distillation(alpha=1.5),
        lambda: ac.Distillation(targets="labels"),
        lambda: ac.ThresholdedDistillation(1.0),
        lambda: ac.ThresholdedDistillation(alpha=-1),
        lambda: ac.CosineEmbedding(2),
        lambda: ac.Prototype([[1.0, 2.0]]),
        lambda: ac.Prototype([[1.0], [np.nan]]),
        lambda: ac.Prototype("many"),
        lambda: ac.Prototype(PLACES, "manhattan"),
        lambda: ac.Prototype(PLACES, scale=0),
        lambda: learner("hubert"),
        lambda: learner(ac.Focal(alpha=(1.0, 2.0))),
        lambda: learner(ac.Prototype(PLACES[:, :2])),
    ],
)
def test_parameters_out_of_range_are_refused(make):
    with pytest.raises(ac.WrongUse):
        make()


@pytest.mark.parametrize(
    "loss, y",
    [
        ("focal", LABELS + CLASSES),
        ("hinge", MANY),
        (ac.Prototype(PLACES), LABELS + 10),
        ("huber", LABELS),
        ("binary_hinge", MANY / 2),
        ("kl_divergence", TEACHER),
        ("distillation", LABELS),
        (ac.Distillation(alpha=0.5), TEACHER),
        (ac.Distillation(alpha=0.5), beside(TEACHER, LABELS + 0.5)),
        (ac.Distillation(alpha=0.5), beside(TEACHER, np.ones((N, CLASSES)))),
        (ac.ThresholdedDistillation(alpha=0.5), beside(TEACHER, MANY + 1)),
        (ac.ThresholdedDistillation(targets="probabilities"), TEACHER),
        (ac.CosineEmbedding(pairs=True), beside(VALUES, LABELS)),
        ("l1", np.full_like(VALUES, np.nan)),
    ],
)
def test_targets_that_do_not_fit_are_refused(loss, y):
    with pytest.raises(ac.BadInput):
        learner(loss).partial_fit(X, y)


def test_prototypes_of_features():
    loss = ac.Prototype.of(VALUES, np.array([0, 1, 2, 0, 1, 2, 2]))
    np.testing.assert_allclose(loss.prototypes[0], (VALUES[0] + VALUES[3]) / 2, rtol=1e-6)
    with pytest.raises(ac.BadInput, match="no sample"):
        ac.Prototype.of(VALUES, np.array([0, 2, 2, 2, 2, 2, 2]))
    with pytest.raises(ac.BadInput, match="features"):
        ac.Prototype.of(VALUES[0], LABELS)
