"""Quantised ONNX files: what comes out is within a step of the ONNX reference, and made of integer rows.

Not bit-exact by nature: the file rounds the float result of an operator half to even; the integer rows round an integer
accumulator times a 31-bit multiplier, and halves away from zero.
"""

import numpy as np
import pytest

import acclimate
from acclimate import errors
from acclimate.ops import evaluate, with_batch
from acclimate.ops.integer import float_nodes

onnx = pytest.importorskip("onnx", reason="onnx is not installed (the onnx extra)")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402


class Build:
    """An ONNX graph in the QDQ form under construction. Activations are of `dtype`."""

    def __init__(self, shape, dtype=np.int8, seed=0):
        self.nodes, self.tensors, self.count = [], [], 0
        self.rng, self.dtype, self.shape = np.random.default_rng(seed), dtype, shape

    def tensor(self, name, array):
        self.tensors.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, op, *inputs, **attrs):
        self.count += 1
        out = f"{op}_{self.count}"
        self.nodes.append(helper.make_node(op, list(inputs), [out], **attrs))
        return out

    def qdq(self, x, scale, zero):
        """x rounded to int8 or uint8; zero as int8 has it."""
        self.count += 1
        zero += 128 if self.dtype == np.uint8 else 0
        pair = [
            self.tensor(f"s{self.count}", np.float32(scale)),
            self.tensor(f"z{self.count}", self.dtype(zero)),
        ]
        return self.node("DequantizeLinear", self.node("QuantizeLinear", x, *pair), *pair)

    def weight(self, name, shape, axis=0, per_channel=True):
        """A stored int8 weight, de-quantised."""
        o = shape[axis] if per_channel else 1
        scale = self.rng.uniform(0.5, 1.5, o).astype(np.float32) * np.float32(
            0.5 / np.prod(shape) ** 0.3 / 40
        )
        q = self.rng.integers(-127, 128, shape).astype(np.int8)
        self.tensor(f"{name}_quantized", q)
        pair = [
            self.tensor(f"{name}_scale", scale if per_channel else scale[0]),
            self.tensor(f"{name}_zero", np.zeros(o, np.int8) if per_channel else np.int8(0)),
        ]
        attrs = {"axis": axis} if per_channel else {}
        return self.node("DequantizeLinear", f"{name}_quantized", *pair, **attrs), q, scale

    def bias(self, name, x_scale, w_scale, o):
        scale = np.broadcast_to(np.float32(x_scale) * w_scale, (o,)).astype(np.float32)
        self.tensor(f"{name}_quantized", self.rng.integers(-3000, 3000, o).astype(np.int32))
        pair = [self.tensor(f"{name}_scale", scale), self.tensor(f"{name}_zero", np.zeros(o, np.int32))]
        return self.node("DequantizeLinear", f"{name}_quantized", *pair, axis=0)

    def model(self, out):
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *self.shape])],
            [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)],
            self.tensors,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def differ(b, out, tmp_path, n=3, shift=0.0):
    """(the imported graph, the differences from the ONNX reference in steps of the last scale)."""
    model = b.model(out)
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    graph = with_batch(acclimate.load(path), n)
    x = (b.rng.normal(0, 1, (n, *b.shape)) + shift).astype(np.float32)
    (want,) = ReferenceEvaluator(model).run(None, {"x": x})
    value = graph.values["x"]
    fed = np.clip(np.rint(x / value.quant.scale[0]) + value.quant.zero, -128, 127).astype(np.int8)
    found = evaluate(graph, {"x": fed})[graph.outputs["output"]]
    step = next(node.attrs["scale"] for node in reversed(graph.nodes) if node.op == "dequantize")
    assert found.shape == want.shape and np.ptp(want) > 20 * step  # the case is not saturated away
    return graph, np.abs(found - want) / step


def conv(b, per_channel=True, clip=None):
    x = b.qdq("x", 0.03, 5)
    w, _, scale = b.weight("c.weight", (6, 3, 3, 3), per_channel=per_channel)
    y = b.node("Conv", x, w, b.bias("c.bias", 0.03, scale, 6), pads=[1, 1, 1, 1], strides=[2, 2])
    if clip == "Relu":
        y = b.node("Relu", y)
    elif clip == "Clip":
        y = b.node("Clip", y, b.tensor("lo", np.float32(0)), b.tensor("hi", np.float32(0.7)))
    return b.qdq(y, 0.006, -128 if clip else 3)


CASES = {
    "conv": ((3, 9, 8), conv),
    "conv of one scale": ((3, 9, 8), lambda b: conv(b, per_channel=False)),
    "conv, relu": ((3, 9, 8), lambda b: conv(b, clip="Relu")),
    "conv, clip": ((3, 9, 8), lambda b: conv(b, clip="Clip")),
    "max pool": (
        (3, 8, 8),
        lambda b: b.qdq(b.node("MaxPool", b.qdq("x", 0.02, 1), kernel_shape=[2, 2], strides=[2, 2]), 0.02, 1),
    ),
    "average": (
        (3, 8, 8),
        lambda b: b.qdq(
            b.node("AveragePool", b.qdq("x", 0.02, 1), kernel_shape=[3, 3], pads=[1, 1, 1, 1]), 0.02, 1
        ),
    ),
    "average that counts zeros": (
        (3, 8, 8),
        lambda b: b.qdq(
            b.node(
                "AveragePool",
                b.qdq("x", 0.02, 9),
                kernel_shape=[3, 3],
                pads=[1, 1, 1, 1],
                count_include_pad=1,
            ),
            0.02,
            9,
        ),
    ),
    "mean": ((4, 8, 8), lambda b: b.qdq(b.node("GlobalAveragePool", b.qdq("x", 0.02, 1)), 0.02, 1)),
    "sigmoid": ((40,), lambda b: b.qdq(b.node("Sigmoid", b.qdq("x", 0.03, 4)), 1 / 256, -128)),
    "gelu-like": ((40,), lambda b: b.qdq(b.node("HardSwish", b.qdq("x", 0.05, 4)), 0.03, -100)),
}


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("name", CASES)
def test_one_operator(name, dtype, tmp_path):
    shape, make = CASES[name]
    b = Build(shape, dtype)
    apart = np.linspace(-1, 1, 4)[:, None, None] if name == "mean" else 0.0  # means of noise are near 0
    graph, steps = differ(b, make(b), tmp_path, shift=apart)
    assert steps.max() <= 1.01
    assert not float_nodes(graph)
    assert graph.type("x").dtype == "i8"


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_names_and_numbers_are_the_files_own(dtype, tmp_path):
    b = Build((3, 9, 8), dtype)
    graph, _ = differ(b, conv(b), tmp_path)
    stored = {t.name: numpy_helper.to_array(t) for t in b.tensors}
    weight, bias = graph.parameters()["c.weight"], graph.parameters()["c.bias"]
    assert np.array_equal(weight.data, stored["c.weight_quantized"])
    assert np.array_equal(weight.quant.scale, stored["c.weight_scale"])
    assert np.array_equal(bias.data, stored["c.bias_quantized"])
    assert graph.values["x"].quant.zero == 5


def test_a_whole_net(tmp_path):
    """Residual sum, concatenation, flatten, Gemm of both orientations, MatMul with an addition."""
    b = Build((3, 8, 8))
    x = b.qdq("x", 0.03, 5)
    w, _, s = b.weight("a.weight", (8, 3, 3, 3))
    a = b.qdq(
        b.node("Relu", b.node("Conv", x, w, b.bias("a.bias", 0.03, s, 8), pads=[1, 1, 1, 1])), 0.02, -128
    )
    w, _, s = b.weight("d.weight", (8, 1, 3, 3))
    d = b.qdq(b.node("Conv", a, w, b.bias("d.bias", 0.02, s, 8), pads=[1, 1, 1, 1], group=8), 0.02, 7)
    r = b.qdq(b.node("Add", a, d), 0.03, -40)
    j = b.qdq(b.node("Concat", r, a, axis=1), 0.03, -40)
    p = b.node("MaxPool", j, kernel_shape=[4, 4], strides=[4, 4])
    f = b.qdq(b.node("Flatten", b.qdq(p, 0.03, -40)), 0.03, -40)
    w, _, s = b.weight("g.weight", (12, 64))
    g = b.qdq(b.node("Gemm", f, w, b.bias("g.bias", 0.03, s, 12), transB=1), 0.02, 0)
    w, _, s = b.weight("h.weight", (12, 10), axis=1)
    h = b.qdq(b.node("Gemm", g, w, b.bias("h.bias", 0.02, s, 10)), 0.01, 0)
    w, _, s = b.weight("m.weight", (10, 5), axis=1)
    m = b.node("Add", b.node("MatMul", h, w), b.tensor("m.bias", b.rng.normal(0, 0.1, 5).astype(np.float32)))
    out = b.qdq(m, 0.004, 3)
    graph, steps = differ(b, out, tmp_path, n=8)
    ops = [n.op for n in graph.nodes]
    assert not float_nodes(graph) and ops.count("q_conv") == 5 and ops.count("q_add") == 1
    assert {"g.weight", "h.weight", "m.weight", "m.bias"} <= set(graph.parameters())
    assert graph.shape("h.weight") == (10, 12)
    assert np.mean(steps) < 0.5 and steps.max() <= 4  # roundings of seven layers add up


def test_what_is_not_quantised_stays_float(tmp_path):
    b = Build((6,))
    w, _, _ = b.weight("a.weight", (8, 6))
    y = b.node("Gemm", b.qdq("x", 0.03, 5), w, transB=1)
    out = b.qdq(b.node("Softmax", b.qdq(y, 0.02, 0)), 1 / 256, -128)
    graph, steps = differ(b, out, tmp_path)
    assert [n.op for n in float_nodes(graph)] == ["softmax"]
    assert steps.max() <= 1.5


def test_rounded_float_weights_count_as_stored(tmp_path):
    """As after quantisation-aware training: float weight -> QuantizeLinear -> DequantizeLinear."""
    b = Build((6,))
    real = b.rng.normal(0, 0.4, (8, 6)).astype(np.float32)
    pair = [b.tensor("ws", np.float32(0.01)), b.tensor("wz", np.int8(0))]
    w = b.node("DequantizeLinear", b.node("QuantizeLinear", b.tensor("a.weight", real), *pair), *pair)
    graph, steps = differ(b, b.qdq(b.node("Gemm", b.qdq("x", 0.03, 5), w, transB=1), 0.02, 0), tmp_path)
    assert np.array_equal(
        graph.parameters()["a.weight"].data, np.clip(np.rint(real / np.float32(0.01)), -128, 127)
    )
    assert steps.max() <= 1.01 and not float_nodes(graph)


def test_weights_alone(tmp_path):
    """Nothing is rounded but the weights: a float graph."""
    b = Build((6,))
    w, q, scale = b.weight("a.weight", (8, 6))
    out = b.node("Gemm", "x", w, transB=1)
    path = tmp_path / "m.onnx"
    onnx.save(b.model(out), path)
    value = acclimate.load(path).parameters()["a.weight"]
    assert value.type.dtype == "f32" and value.quant is None
    assert np.allclose(value.data, q * scale[:, None])


def test_what_is_refused(tmp_path):
    def load(b, out):
        path = tmp_path / "m.onnx"
        onnx.save(b.model(out), path)
        return acclimate.load(path)

    b = Build((6,))
    b.tensor("w", np.full((4, 6), 200, np.uint8))
    pair = [b.tensor("ws", np.float32(0.01)), b.tensor("wz", np.uint8(7))]
    w = b.node("DequantizeLinear", "w", *pair)
    with pytest.raises(errors.Unsupported, match="zero point"):
        load(b, b.qdq(b.node("Gemm", b.qdq("x", 0.1, 0), w, transB=1), 0.1, 0))

    b = Build((6,))
    pair = [b.tensor("s", np.full(6, 0.1, np.float32)), b.tensor("z", np.zeros(6, np.int8))]
    per_channel = b.node("DequantizeLinear", b.node("QuantizeLinear", "x", *pair, axis=1), *pair, axis=1)
    with pytest.raises(errors.Unsupported) as caught:
        load(b, b.node("Relu", per_channel))
    assert "6 scales" in str(caught.value.nodes[0])

    b = Build((6,))
    w, _, _ = b.weight("a.weight", (8, 6))
    b.tensor("b", np.full(8, 1e9, np.float32))
    with pytest.raises(errors.BadInput, match="int32"):
        load(b, b.qdq(b.node("Gemm", b.qdq("x", 1e-3, 0), w, "b", transB=1), 1e8, 0))
