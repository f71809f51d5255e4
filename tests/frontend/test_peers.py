"""The published int8 networks, against integer arithmetic written down a second time, from TFLite's definition."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

import acclimate
from acclimate import errors
from acclimate.ops import evaluate, with_batch

PEERS = Path(os.environ.get("ACCLIMATE_PEERS", "nowhere"))
NETS = ("mcunet-5fps", "mbv2-w0.35", "proxyless-w0.3")


def peer(name):
    path = PEERS / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"{path.name} is not in ACCLIMATE_PEERS")
    return path


# -- a second implementation: int64 and Python's own integers, channels last, straight from config.json ----------------


def fixed_point(real):
    """(mantissa of 31 bits, exponent) of a positive number, by repeated doubling."""
    exponent = 0
    while real >= 1:
        real, exponent = real / 2, exponent + 1
    while real < 0.5:
        real, exponent = real * 2, exponent - 1
    mantissa = int(real * 2**31 + 0.5)
    return (mantissa // 2, exponent + 1) if mantissa == 2**31 else (mantissa, exponent)


def requantise(acc, real):
    """acc * real, rounded in the two steps of TFLite's reference: doubling high product, then a rounding shift."""
    mantissa, exponent = fixed_point(real)
    if exponent < -31:
        return np.zeros_like(acc)
    left, right = max(exponent, 0), max(-exponent, 0)
    product = acc * 2**left * mantissa
    nudge = np.where(product >= 0, 2**30, 1 - 2**30)
    high = np.sign(product + nudge) * (np.abs(product + nudge) // 2**31)  # C's division: towards zero
    whole, rest = high // 2**right, high % 2**right  # an arithmetic shift
    limit = (2**right - 1) // 2 + (high < 0)
    return whole + (rest > limit)


def truncate(acc, real):
    """What Tiny Training Engine's C does: a float product cut off towards zero."""
    return np.trunc(acc.astype(np.float32) * np.float32(real)).astype(np.int64)


def conv(x, told, arrays, step):
    """x (H, W, C) int64 -> int64, and the same from truncation on the same input."""
    p = told["params"]
    w, b, s = (arrays[p[k]["array"]] for k in ("weight", "bias", "w_scales"))
    k, stride, groups = w.shape[2], told["stride"], told["groups"]
    pad = (k - 1) // 2
    x = np.pad(x - p["x_zero"], ((pad, pad), (pad, pad), (0, 0)))
    rows, cols = ((n - k) // stride + 1 for n in x.shape[:2])
    acc = np.zeros((rows, cols, w.shape[0]), np.int64) + b.astype(np.int64)
    for i in range(k):
        for j in range(k):
            part = x[i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (cols - 1) + 1 : stride]
            tap = w[:, :, i, j].astype(np.int64)
            acc += part * tap[:, 0] if groups > 1 else part @ tap.T
    ratio = np.float64(np.float32(p["x_scale"])) * s.astype(np.float64) / np.float64(np.float32(p["y_scale"]))
    out, cut = (
        np.stack(
            [np.clip(f(acc[..., o], float(r)) + p["y_zero"], -128, 127) for o, r in enumerate(ratio)], -1
        )
        for f in (requantise, truncate)
    )
    step.append((int((out != cut).sum()), out.size))
    return out


def add(a, b, pa, pb, py):
    scales = [np.float64(np.float32(p[0])) for p in (pa, pb, py)]
    most = 2 * max(scales[:2])
    parts = [
        requantise((v - p[1]) * 2**20, float(s / most))
        for v, p, s in ((a, pa, scales[0]), (b, pb, scales[1]))
    ]
    return np.clip(requantise(sum(parts), float(most / (2**20 * scales[2]))) + py[1], -128, 127)


def forward(told, arrays, x):
    """(int8 logits of an image (C, H, W), share of convolution outputs that truncation changes)."""
    steps = []
    y = conv(x.transpose(1, 2, 0).astype(np.int64), told["first_conv"], arrays, steps)
    for block in told["blocks"]:
        skip = y
        last = None
        for part in ("pointwise1", "depthwise", "pointwise2"):
            if block[part] is not None:
                y, last = conv(y, block[part], arrays, steps), block[part]["params"]
        if block["residual"] is not None:
            r = block["residual"]["params"]
            y = add(
                skip,
                y,
                (r["x_scale"], r["x_zero"]),
                (last["y_scale"], last["y_zero"]),
                (r["y_scale"], r["y_zero"]),
            )
    total, count = y.sum((0, 1)), y.shape[0] * y.shape[1]
    mean = np.where(total > 0, (total + count // 2) // count, -((-total + count // 2) // count))
    logits = conv(mean[None, None], told["classifier"], arrays, steps)
    return logits[0, 0], sum(s[0] for s in steps) / sum(s[1] for s in steps)


@pytest.mark.parametrize("name", NETS)
def test_forward_is_bit_exact(name):
    path = peer(name)
    with np.load(path) as file:
        arrays = {k: file[k] for k in file.files}
    told = json.loads(arrays["config.json"].tobytes())
    graph = with_batch(acclimate.load(path), 2)
    rng = np.random.default_rng(3)
    x = rng.integers(-128, 128, (2, 3, 128, 128)).astype(np.int8)
    x[1] = np.clip(np.cumsum(rng.normal(0, 8, x[1].shape), -1), -128, 127)  # smooth, as pictures are
    found = evaluate(graph, {"x": x})["logits"]
    for one, logits in zip(x, found, strict=True):
        want, cut = forward(told, arrays, one)
        assert np.array_equal(want, logits)
        assert 0.2 < cut < 0.7  # rounding is not truncation
    plan = acclimate.plan(acclimate.load(path), scheme="last", batch_size=2)
    scale = next(n.attrs["scale"] for n in graph.nodes if n.op == "dequantize")
    zero = next(n.attrs["zero"] for n in graph.nodes if n.op == "dequantize")
    assert np.array_equal(
        acclimate.Learner(plan).decision_function(x),
        np.float32(scale) * (found.astype(np.float32) - zero),
    )


@pytest.mark.parametrize("name", NETS)
def test_parameters_are_the_files_own(name):
    path = peer(name)
    graph = acclimate.load(path)
    with np.load(path) as file:
        arrays = {k: file[k] for k in file.files}
    assert len(graph.parameters()) * 3 == 2 * (len(arrays) - 1)
    for key in arrays:
        if key.endswith("/weight"):
            place = key.replace("/params/", ".").replace("/", ".")
            value = graph.parameters()[place]
            assert np.array_equal(value.data, arrays[key])
            assert np.array_equal(value.quant.scale, arrays[key.replace("/weight", "/w_scales")])
            bias, given = (
                graph.parameters()[place.replace(".weight", ".bias")],
                arrays[key.replace("/weight", "/bias")],
            )
            room = (
                2**31 - 1 - 255 * 128 * value.data[0].size
            )  # dead channels have biases that a sum would wrap over
            assert np.array_equal(bias.data, np.clip(given, -room, room)) and bias.type.dtype == "i32"
            assert np.mean(bias.data == given) > 0.8


def test_another_classifier_learns():
    path = peer("mcunet-5fps")
    graph = acclimate.load(path, classes=4, seed=1)
    again = acclimate.load(path, classes=4, seed=1)
    assert graph.shape(graph.outputs["output"])[1] == 4
    weight = graph.parameters()["classifier.weight"]
    assert weight.shape == (4, 160, 1, 1) and np.abs(weight.data).max() == 127
    assert np.array_equal(weight.data, again.parameters()["classifier.weight"].data)
    rng = np.random.default_rng(0)
    x = rng.integers(-128, 128, (4, 3, 128, 128)).astype(np.int8)
    x = np.clip(x / 4 + np.linspace(-80, 80, 4)[:, None, None, None], -128, 127).astype(np.int8)
    plan = acclimate.plan(graph, scheme="last", batch_size=4, optimizer=acclimate.SGD(lr=0.05))
    learner = acclimate.Learner(plan).fit(x, np.arange(4), epochs=6)
    assert learner.loss_history[-1] < 0.7 * learner.loss_history[0]


# -- files that are not what they should be ----------------------------------------------------------------------------


def changed(tmp_path, change):
    """Load the smallest network after `change(config, arrays)`."""
    with np.load(peer("mbv2-w0.35")) as file:
        arrays = {k: file[k] for k in file.files}
    told = json.loads(arrays["config.json"].tobytes())
    result = change(told, arrays)
    told = told if result is None else result
    arrays["config.json"] = np.frombuffer(json.dumps(told).encode(), np.uint8)
    path = tmp_path / "changed.npz"
    np.savez(path, **arrays)
    return acclimate.load(path)


def _set(*keys, value):
    def change(told, arrays):
        for key in keys[:-1]:
            told = told[key]
        told[keys[-1]] = value

    return change


def _array(name, array):
    def change(told, arrays):
        arrays[name] = array

    return change


FIRST = ("first_conv", "params")


@pytest.mark.parametrize(
    "change",
    [
        _set(*FIRST, "x_scale", value=-1.0),
        _set(*FIRST, "x_scale", value="1"),
        _set(*FIRST, "y_zero", value=300),
        _set(*FIRST, "y_scale", value=0.5),
        _set(*FIRST, "weight", "array", value="elsewhere"),
        _set(*FIRST, "weight", value=None),
        _set("first_conv", "stride", value=0),
        _set("first_conv", "groups", value=7),
        _set("first_conv", "kernel_size", value=[5, 5]),
        _set("first_conv", "in_shape", value=10**9),
        _set("blocks", value=3),
        _set("blocks", 0, "depthwise", value=[]),
        _set("classifier", value=None),
        _array("first_conv/params/bias", np.zeros(3, np.int32)),
        _array("first_conv/params/bias", np.zeros(16, np.float32)),
        _array("first_conv/params/w_scales", np.full(16, np.nan, np.float32)),
        lambda told, arrays: [],
        lambda told, arrays: {},
    ],
)
def test_damaged_files(change, tmp_path):
    with pytest.raises(errors.BadInput) as caught:
        changed(tmp_path, change)
    assert "changed.npz" in caught.value.where and caught.value.action


def test_what_no_published_net_has(tmp_path):
    with pytest.raises(errors.Unsupported, match="squeeze"):
        changed(tmp_path, _set("blocks", 0, "se", value={}))
    with pytest.raises(errors.Unsupported, match="skip"):
        changed(tmp_path, _set("blocks", 2, "residual", "kernel_size", value=[1, 1]))
    with pytest.raises(errors.WrongUse):
        acclimate.load(peer("mbv2-w0.35"), classes=0)
