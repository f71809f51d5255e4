"""Quantisation-aware training: the fake-quantised float graph is the int8 graph, and what it learns stays learned."""

from __future__ import annotations

from functools import cache

import models
import numpy as np
import pytest

import acclimate
from acclimate.data import digits
from acclimate.errors import WrongUse
from acclimate.grad import predict_graph
from acclimate.grad import prune as without_unused
from acclimate.ops import TABLE
from acclimate.quantizer import _values
from acclimate.zoo import digits_cnn

NAMES = [n for n in models.MODELS if n != "tied"]  # one weight in two layouts has no int8 form


def outputs(graph, x):
    return np.concatenate([a for (a,) in _values(graph, [graph.outputs["output"]], {"x": x})])


def step_of(fake):
    """The largest scale at which a value is rounded last: what one unit of the int8 output is."""
    return max(n.attrs["scale"] for n in fake.nodes if n.outputs[0] == fake.outputs["output"])


def same_graph(a, b):
    assert str(a) == str(b)
    for name, value in a.parameters().items():
        assert np.array_equal(value.data, b.values[name].data), name
        assert (value.quant is None) == (b.values[name].quant is None)
        if value.quant is not None:
            assert np.array_equal(value.quant.scale, b.values[name].quant.scale), name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [8, 4])
def test_the_fake_graph_is_the_integer_graph(name, bits):
    """Nothing learned: the same parameters and scales to the last bit, logits within rounding, the same decisions."""
    model = models.exported(name)[1]
    x, _ = models.batch(name, 64)
    fake = acclimate.fake_quantize(model, x, bits=bits)
    int8 = acclimate.quantize(fake)
    same_graph(int8, acclimate.quantize(model, x, bits=bits))
    a, b = outputs(fake, x), outputs(int8, x)
    assert np.abs(a - b).max() <= 4 * step_of(fake), np.abs(a - b).max() / step_of(fake)
    assert np.mean(np.abs(a - b)) <= step_of(fake)
    sure = np.sort(a, -1)[:, -1] - np.sort(a, -1)[:, -2] > 2 * np.abs(a - b).max()
    assert sure.any() and (a.argmax(-1) == b.argmax(-1))[sure].all()
    weighted = [n for n in fake.nodes if TABLE[n.op].fakes]
    assert len(weighted) == sum(v.type.dtype == "i8" for v in int8.parameters().values())


@cache
def trained():
    """A network for digits as it predicts, and its data."""
    data = digits()
    graph = digits_cnn()
    plan = acclimate.plan(graph, scheme="full", batch_size=32, optimizer=acclimate.Adam(lr=3e-3))
    learner = acclimate.Learner(plan).fit(data.x, data.y, epochs=8)
    learned = {**learner.parameters(), **learner.statistics()}
    return without_unused(predict_graph(graph)).with_data(learned), data


def learn(fake, data, epochs, lr=0.003, scheme="full"):
    plan = acclimate.plan(fake, scheme=scheme, batch_size=32, optimizer=acclimate.Adam(lr=lr))
    learner = acclimate.Learner(plan).fit(data.x, data.y, epochs=epochs)
    return fake.with_data(learner.parameters()), learner


def accuracy(graph, data):
    return float((outputs(graph, data.x_val).argmax(-1) == data.y_val).mean())


@pytest.mark.parametrize("learn_scales", [False, True])
def test_learning_recovers_what_two_bits_lose(learn_scales):
    model, data = trained()
    calibration = data.x[:256]
    whole = accuracy(model, data)
    after = accuracy(acclimate.quantize(model, calibration, bits=2), data)
    fake = acclimate.fake_quantize(model, calibration, learn_scales, bits=2)
    assert after < whole - 0.2, "two bits cost nothing, so nothing is shown"
    tuned, learner = learn(fake, data, 6)
    int8 = acclimate.quantize(tuned)
    assert accuracy(int8, data) > whole - 0.05
    assert accuracy(int8, data) == pytest.approx(learner.score(data.x_val, data.y_val), abs=0.01)
    for name, value in int8.parameters().items():
        if value.type.dtype == "i8":
            assert np.abs(value.data).max() <= 1, "two bits hold -1, 0 and 1"
            scale, start = value.quant.scale, fake.values[f"{name}.scale"].data
            assert np.array_equal(scale, tuned.values[f"{name}.scale"].data)
            assert np.array_equal(scale, start) != learn_scales
    assert ("head.weight.scale" in fake.parameters()) == learn_scales
    a, b = outputs(tuned, data.x_val), outputs(int8, data.x_val)
    assert np.abs(a - b).max() <= 6 * step_of(tuned)
    assert (a.argmax(-1) == b.argmax(-1)).mean() > 0.98


def test_pruned_connections_stay_pruned_through_it_all():
    model, data = trained()
    pruned = acclimate.prune(model, channels=0.25, connections=0.5)
    tuned, _ = learn(acclimate.fake_quantize(pruned, data.x[:128], bits=4), data, 1)
    int8 = acclimate.quantize(tuned)
    for name, value in int8.parameters().items():
        if value.type.dtype == "i8":
            assert np.mean(value.data == 0) >= 0.5 - 1 / value.data.size, name
            assert not value.data[pruned.values[name].data == 0].any(), name


def test_schemes_name_its_parameters():
    model, data = trained()
    fake = acclimate.fake_quantize(model, data.x[:64])
    plan = acclimate.plan(fake, scheme="last")
    assert {"head.weight", "head.bias"} == set(plan.update_set.names())
    assert set(fake.parameters()) == set(acclimate.quantize(fake).parameters())


def test_wrong_use_is_refused():
    model, data = trained()
    fake = acclimate.fake_quantize(model, data.x[:64])
    with pytest.raises(WrongUse, match="holds its scales"):
        acclimate.quantize(fake, data.x[:64])
    with pytest.raises(WrongUse, match="measured on samples"):
        acclimate.quantize(model)
    with pytest.raises(WrongUse, match="already"):
        acclimate.fake_quantize(acclimate.quantize(fake), data.x[:64])


def test_a_scale_may_cross_zero():
    """The function does not change with the sign of a scale, and an integer graph has positive ones."""
    model, data = trained()
    fake = acclimate.fake_quantize(model, data.x[:64], learn_scales=True, bits=4)
    scale = fake.values["head.weight.scale"].data
    signs = np.where(np.arange(len(scale)) % 2, -1, 1).astype(np.float32)
    turned = fake.with_data({"head.weight.scale": scale * signs})
    np.testing.assert_array_equal(outputs(turned, data.x_val), outputs(fake, data.x_val))
    same_graph(acclimate.quantize(turned), acclimate.quantize(fake))
