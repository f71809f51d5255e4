"""Classes that come on the device: spare outputs, prototypes; and one sample at a time with accumulated gradients."""

from dataclasses import replace

import numpy as np
import pytest
from runtime.nets import cnn, mlp

from acclimate.classes import IN_USE, NOT_IN_USE, prototype_graphs, reserve_classes
from acclimate.errors import BadInput, WrongUse
from acclimate.ir import Dim, Graph
from acclimate.learner import Learner
from acclimate.objective import SGD, Adam, AdamW
from acclimate.ops import emit, evaluate
from acclimate.planner import compile_plan
from acclimate.prototypes import Prototypes, prototype_program
from acclimate.runtime import Session


def conv_head(classes: int = 4) -> Graph:
    """A 1 x 1 convolution as the last layer, flattened after it."""
    rng, g = np.random.default_rng(0), Graph()
    x = g.input("x", (Dim(1, 1), 5, 1, 1))
    geometry = {"stride": (1, 1), "before": (0, 0), "after": (0, 0), "dilation": (1, 1)}
    h = emit(
        g, "relu", emit(g, "conv", x, g.persistent("a.weight", rng.normal(size=(6, 5, 1, 1))), **geometry)
    )
    weight, bias = (
        g.persistent("head.weight", rng.normal(size=(classes, 6, 1, 1))),
        g.persistent("head.bias", np.ones(classes)),
    )
    g.outputs["output"] = emit(
        g, "reshape", emit(g, "conv", h, weight, bias, **geometry), shape=(Dim(1, 1), classes)
    )
    return g


def untransposed(classes: int = 4) -> Graph:
    """A last layer whose weight is (features, classes), without a bias, as ONNX's MatMul has it."""
    g = Graph()
    weight = g.persistent("w", np.random.default_rng(0).normal(size=(6, classes)))
    g.outputs["output"] = emit(g, "matmul", g.input("x", (Dim(1, 1), 6)), weight)
    return g


MODELS = {"mlp": mlp(), "cnn": cnn(train=False), "conv": conv_head(), "untransposed": untransposed()}


def inputs(model: Graph, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, *model.shape("x")[1:])).astype(np.float32)


# -- spare outputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_spare_classes_change_nothing_until_they_are_used(name):
    """Outputs, and after some steps every parameter of the known classes, are those of the model without spares."""
    model = MODELS[name]
    known = model.shape(model.outputs["output"])[-1]
    x, y = inputs(model, 12), np.random.default_rng(1).integers(0, known, 12)
    optimizer = AdamW(lr=0.01) if name == "cnn" else SGD(lr=0.05, momentum=0.9)
    plain, spare = (
        Learner(compile_plan(m, batch_size=4, optimizer=optimizer), "plain")
        for m in (model, reserve_classes(model, 3))
    )
    np.testing.assert_array_equal(spare.decision_function(x)[:, :known], plain.decision_function(x))
    assert (spare.predict_proba(x)[:, known:] == 0).all() and (spare.predict(x) < known).all()
    for one in (plain, spare):
        one.fit(x, y, epochs=3)
    np.testing.assert_allclose(spare.loss_history, plain.loss_history, rtol=1e-6)
    after = spare.parameters()
    for key, value in plain.parameters().items():
        part = after[key][tuple(slice(0, n) for n in value.shape)]
        np.testing.assert_allclose(part, value, rtol=1e-5, atol=1e-7)
    with pytest.raises(BadInput, match=rf"learner.add_class\({known}\)"):
        spare.partial_fit(x, np.full(12, known))


@pytest.mark.parametrize("name", MODELS)
def test_a_class_added_on_the_device_is_learned(name, tmp_path):
    """By the entry alone, in the same Program; kept in the delta with everything else."""
    model = reserve_classes(MODELS[name], 2)
    new = model.shape(IN_USE)[0] - 2
    plan = compile_plan(model, scheme="last", batch_size=4, optimizer=SGD(lr=0.1))
    learner = Learner(plan)
    x, y = inputs(model, 40), np.where(np.arange(40) % 2, new, 0)
    x += np.where(y == new, 3, -3).reshape(-1, *[1] * (x.ndim - 1)).astype(np.float32)
    program = plan.program.bytes
    learner.add_class(new).add_class(new)
    mask = learner.statistics()[IN_USE]
    assert mask[new] == 0 and mask[new + 1] == np.float32(NOT_IN_USE)
    learner.fit(x, y, epochs=15)
    assert learner.score(x, y) > 0.9 and (learner.predict(x) == new).any()
    learner.save(tmp_path / "a.acu")
    again = Learner(plan).restore(tmp_path / "a.acu")
    np.testing.assert_array_equal(again.decision_function(x), learner.decision_function(x))
    assert plan.program.bytes == program and (learner.predict(x) <= new).all()
    with pytest.raises(BadInput, match="label"):
        learner.add_class(new + 2)
    with pytest.raises(BadInput, match="not in use"):
        learner.partial_fit(x[:4], np.full(4, new + 1))


def test_spare_rows_start_as_the_mean():
    model = reserve_classes(MODELS["mlp"], 2)
    weight, bias = (model.values[n].data for n in ("two.weight", "two.bias"))
    np.testing.assert_allclose(weight[3:], np.repeat(weight[:3].mean(0, keepdims=True), 2, 0), rtol=1e-6)
    assert bias.shape == (5,) and (MODELS["mlp"].values["two.weight"].data == weight[:3]).all()


def test_what_cannot_have_spare_classes():
    soft = mlp()
    soft.outputs["output"] = emit(soft, "softmax", soft.outputs["output"])
    for model in (soft, reserve_classes(mlp(), 1)):
        with pytest.raises(WrongUse):
            reserve_classes(model, 1)
    for n in (0, -1, 1.5):
        with pytest.raises(WrongUse):
            reserve_classes(mlp(), n)
    with pytest.raises(WrongUse, match="spare"):
        Learner(compile_plan(mlp())).add_class(1)


# -- prototypes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("name", MODELS)
def test_prototypes_against_numpy(name, metric):
    model = MODELS[name]
    x, y = inputs(model, 30), np.random.default_rng(2).integers(0, 4, 30)
    y[y == 2] = 3  # class 2 has no sample
    head = Prototypes(model, 6, metric).learn(x[:20], y[:20])
    graph = prototype_graphs(model, 6, metric)["learn"]
    (feature,) = {n.inputs[1] for n in graph.nodes if n.op == "matmul" and n.attrs["ta"]}
    rows = [evaluate(graph, {"x": s[None], "y": np.array([0], np.int32)})[feature].reshape(-1) for s in x]
    f = np.array(rows, np.float64)
    means = {c: f[:20][y[:20] == c].mean(0) for c in set(y[:20])}
    scores = np.full((30, 6), -np.inf)
    for c, mean in means.items():
        if metric == "euclidean":
            scores[:, c] = f @ mean - (mean**2).sum() / 2
        else:
            scores[:, c] = f @ mean / (np.linalg.norm(f, axis=1) * np.linalg.norm(mean) + 1e-12)
    got = head.decision_function(x)
    np.testing.assert_allclose(got[:, sorted(means)], scores[:, sorted(means)], rtol=1e-4, atol=1e-5)
    assert (got[:, [2, 4, 5]] < -1e8).all() and (head.predict(x) == scores.argmax(1)).all()
    assert (head.counts() == np.bincount(y[:20], minlength=6)).all()


def test_one_sample_makes_a_class():
    """A class that never was: one sample, and it is told apart; in batches as one by one."""
    model = mlp()
    x = np.concatenate([inputs(model, 20) * 0.1 + c for c in (-2.0, 0.5, 3.0)])
    y = np.repeat([0, 1, 2], 20)
    head = Prototypes(model, 3).learn(x[:40], y[:40])
    assert (head.predict(x[40:]) != 2).all()
    head.learn(x[40:41], [2])
    assert (head.predict(x[40:]) == 2).all() and (head.predict(x[:40]) != 2).all()
    session = Session(prototype_program(model, 3, batch_size=20))
    for i in range(0, 40, 20):
        session.run("learn", x=x[i : i + 20], y=y[i : i + 20])
    np.testing.assert_allclose(
        session.view("state", "prototype.sum")[:2],
        head._session.view("state", "prototype.sum")[:2],
        rtol=1e-5,
    )
    with pytest.raises(BadInput):
        head.learn(x[:1], [3])
    with pytest.raises(BadInput):
        head.learn(x[:1, :3], [0])
    for arguments in ((3, "manhattan"), (0, "cosine")):
        with pytest.raises(WrongUse):
            Prototypes(model, *arguments)


# -- one sample at a time ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer", [SGD(lr=0.1, momentum=0.9, weight_decay=1e-3), Adam(lr=0.01), SGD(lr=0.1, clip_norm=0.5)]
)
@pytest.mark.parametrize("name", MODELS)
def test_accumulated_single_samples_are_the_batch(name, optimizer):
    """Eight samples one by one, then the update: the parameters that a batch of eight gives."""
    model = MODELS[name]
    x, y = inputs(model, 24), np.random.default_rng(3).integers(0, 3, 24)
    batch = Learner(compile_plan(model, batch_size=8, optimizer=optimizer)).partial_fit(x, y)
    one = Learner(compile_plan(model, batch_size=1, optimizer=replace(optimizer, accumulate=8))).partial_fit(
        x, y
    )
    assert one._pending == 0 and len(one.loss_history) == 24
    np.testing.assert_allclose(
        np.mean(np.reshape(one.loss_history, (3, 8)), 1), batch.loss_history, rtol=1e-5
    )
    for key, value in batch.parameters().items():
        np.testing.assert_allclose(one.parameters()[key], value, rtol=1e-4, atol=1e-6, err_msg=key)
        assert (value != model.values[key].data).any()
    single = compile_plan(model, batch_size=1, optimizer=replace(optimizer, accumulate=8))
    assert single.arena_bytes < compile_plan(model, batch_size=8, optimizer=optimizer).arena_bytes
