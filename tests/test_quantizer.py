"""From float to int8: calibration, weights, which layers, accuracy on real data, reports, saved graphs, the verb."""

import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import acclimate
from acclimate import data, errors
from acclimate.ir import Dim, Graph
from acclimate.ops import emit, evaluate, verify, with_batch
from acclimate.ops.integer import Int, affine, float_nodes, lower, rescale, to_int8
from acclimate.ops.quantized import multiplier, scaled
from acclimate.quantizer import METHODS, Quantization, calibrate, fold, weight_scales

DATA = Path(os.environ.get("ACCLIMATE_DATA", "nowhere"))


def run(graph, x):
    """A graph's output on float x, by the references."""
    graph = with_batch(graph, len(x))
    value = graph.values[graph.inputs["x"]]
    fed = to_int8(x, value.quant.scale[0], value.quant.zero) if value.quant else x
    return evaluate(graph, {value.name: fed})[graph.outputs["output"]]


def chain(*layers, shape=(3, 8, 8), seed=0):
    """A float graph: each layer is (op, shapes of parameters, attributes)."""
    rng = np.random.default_rng(seed)
    graph = Graph()
    x = graph.input("x", (Dim(1, 1), *shape))
    for i, (op, parameters, attrs) in enumerate(layers):
        names = [
            graph.persistent(f"l{i}.{what}", rng.normal(0, 0.3, s))
            for what, s in zip(("weight", "bias"), parameters, strict=False)
        ]
        x = emit(graph, op, x, *names, name=f"l{i}", **attrs)
        x = x if isinstance(x, str) else x[0]
    graph.outputs["output"] = x
    return verify(graph)


CONV = {"stride": (1, 1), "before": (1, 1), "after": (1, 1), "dilation": (1, 1)}


def conv(o, c, k=3, **attrs):
    return "conv", ((o, c, k, k), (o,)), {**CONV, **attrs}


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_ranges_hold_zero_exactly():
    rng = np.random.default_rng(0)
    for low, high in [*rng.normal(0, 3, (200, 2)), (0, 0), (1, 2), (-2, -1), (0, 1e-30), (-1e30, 1e30)]:
        low, high = min(low, high), max(low, high)
        scale, zero = affine(low, high)
        assert -128 <= zero <= 127 and scale > 0 and np.float32(scale) == scale
        q = to_int8([min(low, 0), 0, max(high, 0)], scale, zero)
        assert q[1] == zero
        ends = scale * (q[[0, 2]].astype(np.float64) - zero)
        assert np.abs(ends - [min(low, 0), max(high, 0)]).max() <= 1.01 * scale or high - low < 1e-30
    with pytest.raises(errors.BadInput):
        affine(0, np.inf)


def test_multiplier_is_its_number_to_31_bits():
    """For every size of ratio, also at the ends of the range and at powers of two."""
    rng = np.random.default_rng(0)
    for real in [*np.exp(rng.uniform(-20, 20, 500)), *(2.0**k for k in range(-30, 30)), 1 - 2**-40, 0.0]:
        m, shift = multiplier(float(real))
        assert (m == 0) == (real == 0) and (2**30 <= m < 2**31 or not m)
        assert abs(m * 2.0 ** (shift - 31) - real) <= real * 2**-31
    acc = rng.integers(-(2**30), 2**30, 400)
    for real in np.exp(rng.uniform(-15, 0, 50)):
        exact = acc * real
        assert np.abs(scaled(acc, *multiplier(real)) - exact).max() <= 0.5 + 1e-6 + 2**30 * real * 2**-30


def test_rescaling_is_rounding():
    graph = Graph()
    x = Int(graph.input("x", (Dim(1, 1), 256), "i8", affine_quant(0.1, 3)), 0.1, 3)
    assert rescale(graph, x, (0.1, 3), "same") is x
    y = rescale(graph, x, (0.04, -20), "y")
    graph.outputs["output"] = y.name
    q = np.arange(-128, 128).astype(np.int8)[None]
    want = to_int8((q.astype(np.float64) - 3) * 0.1, 0.04, -20).astype(int)
    assert np.abs(evaluate(graph, {"x": q})[y.name].astype(int) - want).max() <= 1


def affine_quant(scale, zero):
    return Int("", scale, zero).quant


def test_weight_scales():
    rng = np.random.default_rng(0)
    w = rng.normal(0, 1, (6, 4, 3, 3))
    w[2] = 0
    w[3] *= 1e-20
    scales = weight_scales(w, None, 0.1)
    peak = np.abs(w).reshape(6, -1).max(1) / 127
    assert np.allclose(scales[[0, 1, 4, 5]], peak[[0, 1, 4, 5]])
    assert scales[2] == pytest.approx(np.median(peak[peak > 0]))  # dead channels: a usual scale
    assert scales[3] == pytest.approx(scales[2] * 2**-12)  # nearly dead ones: not smaller than can be learned
    assert weight_scales(np.zeros((3, 5)), None, 0.1) == pytest.approx(1 / 127)
    assert weight_scales(w, None, 0.1, per_channel=False) == pytest.approx(peak.max())
    assert weight_scales(w, None, 0.1, bits=4)[0] == pytest.approx(peak[0] * 127 / 7)


def test_sums_cannot_overflow():
    """A bias that is huge against the weights widens their scale, until bias and any sum fit into an int32."""
    w, bias = np.full((2, 9), 1e-6), np.array([1e6, 0.0])
    scales = weight_scales(w, bias, 0.01).astype(np.float64)
    assert bias[0] / (0.01 * scales[0]) + 9 * 255 * 127 <= 2**31 - 1
    assert scales[1] == pytest.approx(1e-6 / 127)
    with pytest.raises(errors.BadInput, match="int32"):
        weight_scales(np.ones((1, 70000)), np.ones(1), 0.1)


def test_calibrations_on_known_numbers():
    """Ranges of 100,000 normal numbers with one far outlier: all of it, the middle, the least error."""
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (1000, 100)).astype(np.float32)
    x[3, 4] = 40.0
    graph = chain(("affine", (), {"scale": 1.0}), shape=(100,))
    found = {m: calibrate(graph, ["l0", "x"], {"x": x}, m) for m in METHODS}
    assert found["minmax"]["l0"] == (x.min(), 40.0) == found["minmax"]["x"]
    low, high = found["percentile"]["l0"]
    assert -4.5 < low < -3.4 and 3.4 < high < 4.5

    def error(ends):
        scale, zero = affine(*ends)
        return ((scale * (to_int8(x, scale, zero).astype(np.float64) - zero) - x) ** 2).mean()

    errors_of = {m: error(found[m]["l0"]) for m in METHODS}
    assert errors_of["mse"] < 0.9 * errors_of["minmax"] and errors_of["mse"] <= 1.05 * errors_of["percentile"]


# -- structure ---------------------------------------------------------------------------------------------------------


def quantised(graph, n=64, seed=1, **options):
    x = np.random.default_rng(seed).normal(0, 1, (n, *graph.shape("x")[1:])).astype(np.float32)
    done = Quantization(graph, x, **options)
    want = run(graph, x)
    step = next(node.attrs["scale"] for node in reversed(done.graph.nodes) if node.op == "dequantize")
    return done, np.abs(run(done.graph, x) - want) / step


def ops(graph):
    return [n.op for n in graph.nodes if n.op != "reshape"]


def test_clamps_go_into_the_layer_before():
    graph = chain(conv(8, 3), ("relu", (), {}), conv(4, 8), ("hard_tanh", (), {"low": 0.0, "high": 6.0}))
    done, steps = quantised(graph)
    assert ops(done.graph) == ["q_conv", "q_conv", "dequantize"]
    first, second = (n for n in done.graph.nodes if n.op == "q_conv")
    assert first.attrs["y_zero"] == -128 == first.attrs["low"]
    top = second.attrs["y_scale"] * (second.attrs["high"] - second.attrs["y_zero"])
    assert top <= 6 * 1.01
    assert steps.mean() < 1.5


def test_names_shapes_and_scales():
    graph = chain(
        conv(8, 3),
        ("relu", (), {}),
        ("mean", (), {"axes": 12}),
        ("matmul", ((5, 8), (5,)), {"tb": 1}),
    )
    done, steps = quantised(graph)
    assert list(done.graph.parameters()) == list(graph.parameters())
    for name, value in done.graph.parameters().items():
        was = graph.values[name]
        assert value.shape == was.shape and value.type.dtype == ("i8" if "weight" in name else "i32")
        assert value.quant.scale.shape == (was.shape[0],)
        assert np.abs(value.quant.real(value.data) - was.data).max() <= value.quant.scale.max() * 0.51
    assert ops(done.graph) == ["q_conv", "q_avg_pool", "q_conv", "dequantize"] and steps.max() < 5
    x = done.graph.values["x"]
    assert x.type.dtype == "i8" and x.kind == "input" and x.quant is not None


def test_a_matrix_along_its_rows_is_stored_turned():
    graph = chain(("matmul", ((6, 9), (9,)), {"tb": 0}), shape=(6,))
    done, steps = quantised(graph)
    assert done.graph.shape("l0.weight") == (9, 6) and steps.max() < 3


def test_what_keeps_its_scale():
    graph = chain(
        conv(8, 3),
        (
            "max_pool",
            (),
            {"kernel": (2, 2), "stride": (2, 2), "before": (0, 0), "after": (0, 0), "dilation": (1, 1)},
        ),
        ("transpose", (), {"perm": (0, 1, 3, 2)}),
        ("pad", (), {"before": (0, 0, 1, 1), "after": (0, 0, 1, 1)}),
        conv(4, 8, before=(0, 0), after=(0, 0)),
    )
    done, steps = quantised(graph)
    assert ops(done.graph) == ["q_conv", "max_pool", "transpose", "pad", "q_conv", "dequantize"]
    pad, last = (next(n for n in done.graph.nodes if n.op == op) for op in ("pad", "dequantize"))
    assert pad.attrs["value"] == next(n for n in done.graph.nodes if n.op == "q_conv").attrs["y_zero"]
    assert len({layer.output for layer in done.layers if layer.output}) == 2 and last and steps.mean() < 2


@pytest.mark.parametrize("op", ["sigmoid", "tanh", "hard_swish", "gelu", "silu", "elu", "leaky_relu", "abs"])
def test_tables(op):
    done, steps = quantised(chain(conv(4, 3), (op, (), {})), seed=2)
    assert ops(done.graph) == ["q_conv", "q_table", "dequantize"]
    slopes = next(n for n in done.graph.nodes if n.op == "q_table").attrs["slopes"]
    node = next(n for n in done.float_graph.nodes if n.op == op)
    scale, zero = done.ranges["l0"]
    at = (np.arange(-128, 128) - zero) * scale
    y, d = (evaluate_slope(node, at + h) for h in (0, 1e-4))
    inside = np.abs(at) > 1e-3  # but where they have a corner
    out_scale, out_zero = done.ranges["l1"]
    kept = (to_int8(y, out_scale, out_zero) > -128) & (to_int8(y, out_scale, out_zero) < 127)
    corner = np.abs(np.abs(at) - 3) < 1e-3
    ok = inside & kept & ~corner
    assert ok.sum() > 50 and np.abs((d - y)[ok] / 1e-4 - np.array(slopes)[ok]).max() < 1e-3
    assert steps.mean() < 1.5


def evaluate_slope(node, at):
    from acclimate.ops import TABLE

    return TABLE[node.op].ref(node.attrs, at)[0]


def branches(join):
    """Two convolutions of very different size that meet; one also goes on by itself."""
    rng = np.random.default_rng(0)
    graph = Graph()
    x = graph.input("x", (Dim(1, 1), 3, 6, 6))
    a, b = (
        emit(
            graph,
            "conv",
            x,
            graph.persistent(f"{n}.weight", s * rng.normal(0, 1, (4, 3, 3, 3))),
            name=n,
            **CONV,
        )
        for n, s in (("a", 1.0), ("b", 0.1))
    )
    y = emit(graph, "concat", a, b, name="y", axis=1) if join else emit(graph, "add", a, b, name="y")
    w = graph.persistent("c.weight", rng.normal(0, 0.3, (5, graph.shape(y)[1], 3, 3)))
    y = emit(graph, "conv", emit(graph, "relu", y, name="r"), w, name="c", **CONV)
    if join:
        y = emit(
            graph,
            "add",
            y,
            emit(
                graph,
                "conv",
                b,
                graph.persistent("d.weight", rng.normal(0, 1, (5, 4, 1, 1))),
                name="d",
                **{**CONV, "before": (0, 0), "after": (0, 0)},
            ),
            name="e",
        )
    graph.outputs["output"] = y
    return verify(graph)


def test_concatenation_shares_a_scale_or_rescales():
    done, steps = quantised(branches(join=True))
    assert ops(done.graph).count("q_rescale") == 1  # b goes elsewhere too; a takes the whole's range
    assert done.ranges["a"] == done.ranges["y"] != done.ranges["b"]
    assert steps.mean() < 2 and not float_nodes(done.graph)


def test_addition_takes_the_clamp():
    done, steps = quantised(branches(join=False))
    assert ops(done.graph) == ["q_conv", "q_conv", "q_add", "q_conv", "dequantize"]
    add = next(n for n in done.graph.nodes if n.op == "q_add")
    assert add.attrs["low"] == add.attrs["y_zero"] == -128 and steps.mean() < 2


def test_batch_norms_fold_or_stand_alone():
    """The first norm folds; the second follows a sum, and becomes a depthwise convolution under its own names."""
    models = pytest.importorskip("models", reason="torch is not installed (the test extra)")
    _, graph = models.exported("residual")
    x, _ = models.batch("residual", 64)
    folded = fold(graph)
    assert not any("batch_norm" in n.op for n in folded.nodes)
    assert np.allclose(run(folded, x), run(graph, x), atol=2e-4)
    done = Quantization(graph, x)
    names = done.graph.parameters()
    assert names["blocks.0.bn1.weight"].shape == (8, 1, 1, 1) and "blocks.0.bn2.weight" not in names
    assert names["blocks.0.conv1.bias"].type.dtype == "i32"
    assert np.abs(names["blocks.0.bn1.weight"].data).min() == 127  # one number a channel: exact
    assert not float_nodes(done.graph)


def test_one_norm_for_two_places():
    """A gamma that several norms share is not overwritten by one of them."""
    rng = np.random.default_rng(0)
    graph = Graph()
    x = graph.input("x", (Dim(1, 1), 4, 5, 5))
    gamma = graph.persistent("gamma", np.ones(4))
    for i in range(2):
        rest = [
            graph.persistent(f"beta{i}", rng.normal(0, 1, 4)),
            graph.persistent(f"mean{i}", rng.normal(0, 1, 4), "state"),
            graph.persistent(f"var{i}", rng.uniform(0.1, 4, 4), "state"),
        ]
        x = emit(graph, "relu", emit(graph, "batch_norm", x, gamma, *rest, name=f"n{i}"), name=f"r{i}")
        w = graph.persistent(f"c{i}.weight", rng.normal(0, 0.4, (4, 4, 3, 3)))
        x = emit(graph, "conv", x, w, name=f"c{i}", **CONV)
    graph.outputs["output"] = x
    verify(graph)
    data_in = rng.normal(0, 1, (16, 4, 5, 5)).astype(np.float32)
    assert np.allclose(run(fold(graph), data_in), run(graph, data_in), atol=1e-4)
    _, steps = quantised(graph)
    assert steps.mean() < 2


def test_several_inputs():
    rng = np.random.default_rng(0)
    graph = Graph()
    a, b = graph.input("x", (Dim(1, 1), 6)), graph.input("state", (Dim(1, 1), 6))
    parts = [
        emit(graph, "matmul", v, graph.persistent(f"{n}.weight", rng.normal(0, 0.4, (5, 6))), name=n, tb=1)
        for n, v in (("p", a), ("q", b))
    ]
    graph.outputs["output"] = emit(graph, "add", *parts, name="sum")
    verify(graph)
    feeds = {r: rng.normal(0, 1, (32, 6)).astype(np.float32) for r in ("x", "state")}
    done = Quantization(graph, feeds)
    assert ops(done.graph) == ["q_conv", "q_conv", "q_add", "dequantize"]
    row = done.report(feeds)["layers"][-1]
    assert row["name"] == "sum" and row["snr_db"] > 30
    with pytest.raises(errors.BadInput, match="inputs"):
        acclimate.quantize(graph, feeds["x"])


@pytest.mark.parametrize("name", ["classic", "residual", "inverted", "signal", "attention", "branches"])
def test_gradients_go_the_same_way(name):
    """Those of the int8 graph against the folded float one's, for every parameter, on the same batch."""
    models = pytest.importorskip("models", reason="torch is not installed (the test extra)")
    _, graph = models.exported(name)
    x, y = models.batch(name, 16)
    loss = models.MODELS[name][3]
    both = [
        acclimate.Learner(acclimate.plan(g, scheme="full", loss=loss, batch_size=16)).gradients(x, y)
        for g in (acclimate.quantize(graph, x), fold(graph))
    ]
    assert set(both[0]) == set(both[1])
    for parameter, found in both[0].items():
        want = both[1][parameter]
        size = np.linalg.norm(want)
        if size > 1e-6:
            assert (found * want).sum() / size / np.linalg.norm(found) > 0.9, parameter


def test_what_stays_float_is_listed():
    graph = chain(conv(4, 3), ("softmax", (), {}), conv(4, 4), ("sigmoid", (), {}), conv(2, 4))
    done, steps = quantised(graph)
    listed = done.float_layers()
    assert [(r["op"], r["why"]) for r in listed] == [
        ("softmax", "no integer form"),
    ] and ops(done.graph).count("quantize") == 1
    done, _ = quantised(graph, keep_float=("l4", "l3"))
    assert [(r["name"], r["why"]) for r in done.float_layers()][1:] == [
        ("l3", "kept by keep_float"),
        ("l4", "kept by keep_float"),
    ]
    assert done.graph.parameters()["l4.weight"].type.dtype == "f32"
    with pytest.raises(errors.WrongUse, match="no layer") as caught:
        quantised(graph, keep_float="head")
    assert "l0" in caught.value.action


def test_fake_quantisation_is_what_the_integers_do():
    """The rounded float graph and the integer one differ by the rounding of sums alone."""
    graph = chain(conv(8, 3), ("relu", (), {}), conv(4, 8), ("gelu", (), {}), conv(3, 4))
    done, _ = quantised(graph)
    x = np.random.default_rng(5).normal(0, 1, (16, 3, 8, 8)).astype(np.float32)
    fake, real = run(done.fake(), x), run(done.graph, x)
    step = done.ranges["l4"][0]
    assert np.abs(fake - real).max() <= 3.01 * step and np.abs(fake - real).mean() < 0.2 * step
    assert lower(graph) is graph


@pytest.mark.parametrize("name", ["classic", "post", "inverted", "signal", "attention", "branches"])
def test_models_of_all_kinds(name):
    """Networks as users bring them keep their outputs: float islands, one and two dimensions, attention."""
    models = pytest.importorskip("models", reason="torch is not installed (the test extra)")
    _, graph = models.exported(name)
    x, _ = models.batch(name, 64)
    done = Quantization(graph, x)
    want, found = run(graph, x), run(done.graph, x)
    noise = ((want - found) ** 2).sum() / ((want - want.mean(0)) ** 2).sum()
    assert noise < 0.02, noise
    assert all(v.type.dtype in ("i8", "i32", "f32") for v in done.graph.parameters().values())
    learner = acclimate.Learner(acclimate.plan(done.graph, scheme="last", loss=models.MODELS[name][3]))
    assert np.allclose(learner.decision_function(x[:8]), found[:8], atol=1e-4)


# -- real data ---------------------------------------------------------------------------------------------------------


def trained(net, x, y, epochs, seed=0):
    torch = pytest.importorskip("torch", reason="torch is not installed (the test extra)")
    torch.manual_seed(seed)
    for layer in net.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    x, y = torch.from_numpy(x), torch.from_numpy(y.astype(np.int64))
    for _ in range(epochs):
        for i in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x[i]), y[i]).backward()
            optimizer.step()
    return acclimate.from_torch(net.eval(), x[:2])


def block(i, o, stride):
    from torch import nn

    return [nn.Conv1d(i, o, 5, stride, 2, bias=False), nn.BatchNorm1d(o), nn.ReLU()]


@cache
def activity():
    """(model, x, y): a 1-D network on windows of phones and watches; tested on people it has not seen."""
    pytest.importorskip("torch", reason="torch is not installed (the test extra)")
    from torch import nn

    path = DATA / "har_spsw.npz"
    if not path.is_file():
        pytest.skip("har_spsw.npz is not in ACCLIMATE_DATA")
    d = np.load(path)
    x = (d["x"].astype(np.float32) * d["lsb"]).transpose(0, 2, 1)
    x, y = np.ascontiguousarray(x), d["y"]
    seen = d["subject"] % 4 != 0
    net = nn.Sequential(
        *block(6, 16, 2),
        *block(16, 32, 2),
        *block(32, 32, 1),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(32, 5),
    )
    return trained(net, x[seen], y[seen], 6), x[seen][::8], x[~seen], y[~seen]


@cache
def beats():
    """A small residual network on heart beats, on patients it has not seen."""
    torch = pytest.importorskip("torch", reason="torch is not installed (the test extra)")
    from torch import nn

    path = DATA / "mitbih_beats.npz"
    if not path.is_file():
        pytest.skip("mitbih_beats.npz is not in ACCLIMATE_DATA")
    d = np.load(path)
    x = (d["x"].astype(np.float32) * 0.005)[:, None]
    y, patient = d["y"], d["patient"]
    seen = patient % 3 != 0

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body = nn.Sequential(*block(1, 16, 2)), nn.Sequential(*block(16, 16, 1))
            self.tail, self.head = nn.Sequential(*block(16, 32, 2)), nn.Linear(32, 5)

        def forward(self, x):
            x = self.stem(x)
            return self.head(self.tail(torch.relu(x + self.body(x))).mean(-1))

    return trained(Net(), x[seen], y[seen], 3), x[seen][::20], x[~seen], y[~seen]


@cache
def digits():
    pytest.importorskip("torch", reason="torch is not installed (the test extra)")
    from torch import nn

    d = data.digits()
    net = nn.Sequential(
        nn.Conv2d(1, 12, 3, 1, 1, bias=False), nn.BatchNorm2d(12), nn.Hardswish(),
        nn.Conv2d(12, 12, 3, 1, 1, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU6(),
        nn.Conv2d(12, 24, 1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(384, 10),
    )  # fmt: skip
    return trained(net, d.x, d.y, 12), d.x[::4], d.x_val, d.y_val


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [activity, beats, digits])
def test_accuracy_on_real_data(make, method):
    """At most one point lost against float, with every calibration."""
    model, calibration, x, y = make()
    report = acclimate.quantization_report(model, calibration, x[:1000], y[:1000], method=method)
    assert report["accuracy_float"] > 0.6
    assert report["accuracy_int8"] >= report["accuracy_float"] - 0.01
    assert not report["float_layers"]
    assert report["parameter_bytes_int8"] < 0.4 * report["parameter_bytes_float"]
    for row in report["layers"]:
        assert row["snr_db"] > 12 and row["cosine"] > 0.97
        assert abs(row["cost"]) <= 0.02 and row["cost"] == report["accuracy_float"] - row["accuracy_alone"]


def test_fewer_bits_cost_more():
    model, calibration, x, y = digits()
    snr = [
        acclimate.quantization_report(model, calibration, x, bits=bits)["layers"][-1]["snr_db"]
        for bits in (8, 5, 3)
    ]
    assert snr[0] > snr[1] + 5 > snr[2] + 10
    low = acclimate.quantize(model, calibration, bits=3)
    assert max(np.abs(v.data).max() for v in low.parameters().values() if v.type.dtype == "i8") == 3
    one = acclimate.quantize(model, calibration, per_channel=False)
    assert all(v.quant.scale.size == 1 for v in one.parameters().values() if v.type.dtype == "i8")


def test_learning_goes_on_in_int8():
    model, calibration, x, y = digits()
    int8 = acclimate.quantize(model, calibration)
    plan = acclimate.plan(int8, scheme="last", batch_size=8, optimizer=acclimate.SGD(lr=0.02))
    learner = acclimate.Learner(plan)
    relabelled = (y + 1) % 10
    before = learner.score(x, relabelled)
    learner.fit(x[:300], relabelled[:300], epochs=3)
    assert before < 0.1 and learner.score(x[300:], relabelled[300:]) > 0.7


# -- what cannot be done -----------------------------------------------------------------------------------------------


def test_wrong_uses():
    graph = chain(conv(4, 3))
    x = np.zeros((4, 3, 8, 8), np.float32)
    for options in (
        {"method": "guess"},
        {"bits": 9},
        {"bits": True},
        {"percentile": 3, "method": "percentile"},
    ):
        with pytest.raises(errors.WrongUse):
            acclimate.quantize(graph, x, **options)
    for bad in (x[:, :2], x[:0], np.full_like(x, np.nan), [["a"]], {"y": x}):
        with pytest.raises(errors.BadInput):
            acclimate.quantize(graph, bad)
    with pytest.raises(errors.WrongUse, match="already"):
        acclimate.quantize(acclimate.quantize(graph, x), x)
    with pytest.raises(errors.BadInput, match="no layer"):
        acclimate.quantize(chain(("softmax", (), {})), x)


def test_nothing_but_zeros():
    """Calibration data without a signal give scales that are numbers."""
    graph = acclimate.quantize(chain(conv(4, 3), ("relu", (), {})), np.zeros((2, 3, 8, 8), np.float32))
    assert np.isfinite(run(graph, np.zeros((1, 3, 8, 8), np.float32))).all()


# -- saved graphs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    graph = chain(
        conv(8, 3), ("relu", (), {}), ("mean", (), {"axes": 12}), ("matmul", ((5, 8), (5,)), {"tb": 1})
    )
    int8 = acclimate.quantize(graph, np.random.default_rng(0).normal(0, 1, (8, 3, 8, 8)).astype(np.float32))
    path = tmp_path / "m.npz"
    assert acclimate.save(int8, path) == path.stat().st_size
    return int8, path


def test_a_saved_graph_is_the_same(saved, tmp_path):
    int8, path = saved
    for graph in (int8, chain(conv(4, 3), ("hard_tanh", (), {"low": -np.inf, "high": 1.5}))):
        acclimate.save(graph, path)
        again = acclimate.load(path)
        assert str(again) == str(graph) and list(again.values) == list(graph.values)
        x = np.random.default_rng(1).normal(0, 1, (3, 3, 8, 8)).astype(np.float32)
        assert np.array_equal(run(again, x), run(graph, x))
        for name, value in graph.values.items():
            assert again.values[name].kind == value.kind
            assert (again.values[name].quant is None) == (value.quant is None)
    models = pytest.importorskip("models", reason="torch is not installed (the test extra)")
    for name in models.MODELS:
        _, graph = models.exported(name, True)
        acclimate.save(graph, path)
        assert str(acclimate.load(path)) == str(graph)
    with pytest.raises(errors.BadInput, match="npz"):
        acclimate.save(int8, tmp_path / "m.onnx")
    with pytest.raises(errors.BadInput, match="classes"):
        acclimate.load(path, classes=3)


def rewritten(path, change):
    """Load the saved graph after a change of its JSON text and arrays."""
    with np.load(path) as file:
        arrays = {k: file[k] for k in file.files}
    told = json.loads(arrays["graph.json"].tobytes())
    result = change(told, arrays)
    text = json.dumps(told if result is None else result)
    arrays["graph.json"] = np.frombuffer(text.encode(), np.uint8)
    np.savez(path, **arrays)
    return acclimate.load(path)


def _at(*keys, value):
    def change(told, arrays):
        for key in keys[:-1]:
            told = told[key]
        told[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _at("format", value=99),
        _at("batch", value=0),
        _at("batch", value=True),
        _at("inputs", value={}),
        _at("inputs", value={"x": "output"}),
        _at("outputs", value={"output": "nothing"}),
        _at("outputs", value=[]),
        _at("aliases", value={"a": "x"}),
        _at("values", 0, "shape", value=[{"batch": 1}, 10**12]),
        _at("values", 0, "shape", value=[4, 3, 8, 8]),
        _at("values", 0, "shape", value=[1] * 9),
        _at("values", 0, "shape", value=[-1]),
        _at("values", 0, "dtype", value="f64"),
        _at("values", 0, "kind", value="state"),
        _at("values", 0, "name", value="l0.weight"),
        _at("values", 0, "quant", value=None),
        _at("values", 0, "quant", "zero", value=1000),
        _at("values", 1, "quant", "scale", value="nowhere"),
        _at("values", 1, "data", value=None),
        _at("values", 1, "data", value="a0"),
        _at("values", value={}),
        _at("values", value=[]),
        _at("nodes", value=[]),
        _at("nodes", 0, "op", value="sgd"),
        _at("nodes", 0, "op", value="no such op"),
        _at("nodes", 0, "inputs", value=["x"]),
        _at("nodes", 0, "inputs", value=["x"] * 100),
        _at("nodes", 0, "inputs", value=[3]),
        _at("nodes", 0, "outputs", value=["x", ""]),
        _at("nodes", 0, "attrs", value={}),
        _at("nodes", 0, "attrs", "stride", value=[0, 1]),
        _at("nodes", 0, "attrs", "stride", value=[1, 1, 1]),
        _at("nodes", 0, "attrs", "stride", value="inf"),
        _at("nodes", 0, "attrs", "groups", value=1.5),
        _at("nodes", 0, "attrs", "groups", value=2**40),
        _at("nodes", 0, "attrs", "stride", value=[[[[1]]]]),
        lambda told, arrays: [],
        lambda told, arrays: arrays.update(
            {k: v.astype(np.float64) for k, v in arrays.items() if k != "graph.json"}
        ),
        lambda told, arrays: arrays.update({k: -v for k, v in arrays.items() if v.dtype == np.float32}),
    ],
)
def test_damaged_graph_files(change, saved):
    _, path = saved
    with pytest.raises(errors.BadInput) as caught:
        rewritten(path, change)
    assert "m.npz" in caught.value.where and caught.value.action


def test_graph_files_of_any_bytes(saved):
    _, path = saved
    good, rng = path.read_bytes(), np.random.default_rng(0)
    loaded = 0
    for i in range(60):
        bad = bytearray(good)
        for at in rng.integers(0, len(bad), 1 + i % 5):
            bad[at] = rng.integers(256)
        path.write_bytes(bytes(bad) if i % 3 else good[: rng.integers(len(good))])
        try:
            acclimate.load(path)
            loaded += 1
        except errors.AcclimateError as error:
            assert str(path.name) in error.where
    assert loaded < 30
    np.savez(path, x=np.zeros(3))
    with pytest.raises(errors.BadInput, match="no graph"):
        acclimate.load(path)
    np.savez(path, **{"graph.json": np.array([{}], object)})
    with pytest.raises(errors.BadInput, match="objects"):
        acclimate.load(path)


# -- the verb ----------------------------------------------------------------------------------------------------------


def test_the_verb(tmp_path, capsys):
    pytest.importorskip("typer", reason="typer is not installed (the cli extra)")
    from acclimate import cli

    model, _, _, _ = digits()
    d = data.digits()
    acclimate.save(model, tmp_path / "m.npz")
    np.savez(tmp_path / "d.npz", x=d.x, y=d.y, x_val=d.x_val, y_val=d.y_val)
    where = [str(tmp_path / "m.npz"), "--data", str(tmp_path / "d.npz"), "--out", str(tmp_path / "q.npz")]
    assert cli.main(["quantize", *where, "--method", "mse", "--keep-float", "9", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["accuracy_int8"] >= told["accuracy_float"] - 0.01
    assert [r["name"] for r in told["float_layers"]] and told["calibration_samples"] == 256
    assert cli.main(["evaluate", str(tmp_path / "q.npz"), "--data", str(tmp_path / "d.npz"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(told["accuracy_int8"])
    assert cli.main(["quantize", *where]) == 0
    page = capsys.readouterr().out
    assert "SNR" in page and "0" in page and "calibration" in page
    assert cli.main(["quantize", *where, "--method", "guess", "--json"]) == errors.WrongUse.exit_code
