"""ONNX files become graphs that compute the same as the torch module they came from, for any batch."""

import warnings

import numpy as np
import pytest
from frontend import cases

from acclimate import ops
from acclimate.frontend import from_torch, load, load_onnx

torch, nn = cases.torch, cases.nn
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

#: layers that the exporter does not write, or writes as something else, and what
NOT_EXPORTED = {
    "sdpa_3d": "the exporter takes attention on four axes only",
    "adaptive_odd": "the exporter writes gathers on eight axes",
    "write": "the exporter writes scatters",
}
NOT_BY_LEGACY = {
    "rms_norm": "not exported",
    **dict.fromkeys(
        (
            "spectral_norm",
            "adaptive_max_odd",
            "adaptive_max_1d",
            "adaptive_up",
            "area",
            "nearest_exact",
            "channel_shuffle_layer",
            "sinh",
            "rounded",
            "logaddexp",
            "threshold_jump",
            "triangles",
            "index_triangle",
            "rotate",
            "difference",
            "sdpa_grouped",
            "bilinear",
        ),
        "not exported",
    ),
    "local_response_norm": "a branch by the rank, and pooling over three dimensions",
    "avg_pool_divisor": "the exporter drops the divisor",
    "threshold": "not exported",
    "masked_fill": "mT is not exported",
    "adaptive_1d": "not exported",
    "bn_no_statistics": "statistics over a flattened batch, which a file for one batch size does not tell from samples",
}


def export(module, shape, path, dynamo=True, batch=1, dynamic=False, **more):
    """Write an ONNX file as a user would."""
    if dynamic:
        batch = 2
        more |= (
            {"dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},)}
            if dynamo
            else {"dynamic_axes": {"x": {0: "n"}}, "input_names": ["x"]}
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (torch.randn(batch, *shape),), str(path), dynamo=dynamo, verbose=False, **more
        )
    return path


@pytest.mark.parametrize("name", cases.MODELS)
@pytest.mark.parametrize("batch", [1, 3, 0], ids=["1", "3", "dynamic"])
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "legacy"])
def test_models(name, dynamo, batch, tmp_path):
    make, shape = cases.MODELS[name]
    module = cases.seeded(make)
    graph = load(export(module, shape, tmp_path / "m.onnx", dynamo, batch, not batch))
    assert graph.batch == (batch or 1)
    cases.same(graph, module, shape)


LAYERS = [
    pytest.param(
        dynamo, name, id=f"{'dynamo' if dynamo else 'legacy'}-{name}", marks=[pytest.mark.slow] * dynamo
    )
    for dynamo in (True, False)
    for name in cases.LAYERS
    if name not in (NOT_EXPORTED if dynamo else NOT_EXPORTED | NOT_BY_LEGACY)
]


@pytest.mark.parametrize("dynamo, name", LAYERS)
def test_layers(dynamo, name, tmp_path):
    make, shape = cases.LAYERS[name]
    module = cases.seeded(make)
    cases.same(load_onnx(export(module, shape, tmp_path / "m.onnx", dynamo)), module, shape)


def test_exclusions_exist():
    assert set(NOT_EXPORTED | NOT_BY_LEGACY) <= set(cases.LAYERS)


# -- the same graph from both front ends -----------------------------------------------------------------------------


def structure(graph):
    """Operators, attributes and which parameters they read, without the views that exporters place differently."""
    return [
        (
            n.op,
            {k: round(v, 6) if isinstance(v, float) else v for k, v in n.attrs.items()},
            [i for i in n.inputs if i in graph.parameters()],
        )
        for n in graph.nodes
        if n.op != "reshape"
    ]


@pytest.mark.parametrize("name", ["mlp", "lenet", "vit"])
@pytest.mark.parametrize("how", ["random", "fresh"])
def test_same_names_and_nodes_as_from_torch(name, how, tmp_path):
    """Also for a model as it was constructed, whose equal biases and scales the exporter merges or drops."""
    make, shape = cases.MODELS[name]
    torch.manual_seed(0)
    module = cases.seeded(make) if how == "random" else make().eval()
    here, there = (
        from_torch(module, torch.randn(1, *shape)),
        load_onnx(export(module, shape, tmp_path / "m.onnx")),
    )
    assert set(here.parameters()) == set(there.parameters())
    for parameter, value in here.parameters().items():
        np.testing.assert_array_equal(value.data, there.values[parameter].data)
    a, b = structure(here), structure(there)
    assert sorted(map(str, a)) == sorted(map(str, b))
    if name != "vit":  # there the exporter computes keys and queries in another order
        assert a == b


def test_legacy_names_of_transposed_weights(tmp_path):
    module = cases.seeded(lambda: nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)))
    graph = load_onnx(export(module, (10, 16), tmp_path / "m.onnx", dynamo=False))
    assert {n: v.shape for n, v in graph.parameters().items()} == {
        n: tuple(v.shape) for n, v in module.named_parameters()
    }


def test_training_is_kept_where_the_exporter_keeps_it(tmp_path):
    module = cases.seeded(
        lambda: nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.Dropout(0.2)),
        train=True,
    )
    path = export(
        module,
        (6, 8, 8),
        tmp_path / "m.onnx",
        dynamo=False,
        do_constant_folding=False,
        training=torch.onnx.TrainingMode.PRESERVE,
    )
    graph = load_onnx(path)
    assert [n.op for n in graph.nodes] == ["conv", "batch_norm_train", "dropout"]
    assert graph.nodes[1].attrs["momentum"] == pytest.approx(0.3) and graph.nodes[2].attrs[
        "p"
    ] == pytest.approx(0.2)
    assert graph.nodes[1].inputs[3:] == ("1.running_mean", "1.running_var")
    assert graph.values["1.running_mean"].kind == "state"


def test_places(tmp_path):
    module = cases.seeded(cases.ResNet)
    graph = load_onnx(export(module, (3, 8, 8), tmp_path / "m.onnx"))
    assert any("in forward: y = self.conv1(F.relu(self.bn1(x)))" in n.where for n in graph.nodes)
    graph = load_onnx(export(module, (3, 8, 8), tmp_path / "n.onnx", dynamo=False))
    assert any(n.where == "node /conv1/Conv" for n in graph.nodes)


# -- files of other exporters ------------------------------------------------------------------------------------------


def model(nodes, shape, tensors=(), opset=13, out="y", shape_out=None):
    """A ModelProto from (op, inputs, outputs, attributes) and named arrays."""
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op, i.split(), o.split(), **a) for op, i, o, a in nodes],
        "g",
        [onnx.helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, shape)],
        [onnx.helper.make_tensor_value_info(out, onnx.TensorProto.FLOAT, shape_out)],
        [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in dict(tensors).items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)


def loaded(proto, path):
    onnx.save(proto, str(path))
    return load_onnx(path)


def reference(proto, x):
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(proto).run(None, {"input": x})[0]


def transposed(**attributes):
    w = np.random.default_rng(2).normal(size=(3, 2, 3, 3)).astype(np.float32)
    return (13, [("ConvTranspose", "input w b", "y", attributes)], {"w": w, "b": np.float32([0.3, -1])})


def resized(target, **attributes):
    return (
        18,
        [("Resize", "input _ _ s", "y", {**attributes, "axes": [2, 3]})],
        {"s": np.array(target)},
    )


def mapped(op, **attributes):
    return (18, [(op, "input", "y", attributes)], {})


W = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
V = np.random.default_rng(1).normal(size=(8,)).astype(np.float32)
BY_HAND = {
    "same_upper": (13, [("Conv", "input w", "y", {"auto_pad": "SAME_UPPER", "strides": [2, 2]})], {"w": W}),
    "same_lower": (13, [("Conv", "input w", "y", {"auto_pad": "SAME_LOWER"})], {"w": W[:, :, :2, :2]}),
    "old_attributes": (
        11,
        [
            ("Unsqueeze", "input", "a", {"axes": [1]}),
            ("Squeeze", "a", "b", {"axes": [1]}),
            ("Split", "b", "c d", {"axis": 3, "split": [3, 5]}),
            ("ReduceSum", "c", "e", {"axes": [3]}),
            ("ReduceMean", "d", "f", {"axes": [-1]}),
            ("Add", "e f", "y", {}),
        ],
        {},
    ),
    "old_clip": (
        7,
        [("Clip", "input", "a", {"min": -0.5, "max": 0.4}), ("Dropout", "a", "y", {"ratio": 0.5})],
        {},
    ),
    "old_pad": (7, [("Pad", "input", "y", {"pads": [0, 0, 1, 2, 0, 0, 0, 1], "value": 0.5})], {}),
    "old_upsample": (
        9,
        [("Upsample", "input s", "y", {"mode": "nearest"})],
        {"s": np.array([1, 1, 2, 3], np.float32)},
    ),
    "layer_norm_by_hand": (
        13,
        [
            ("ReduceMean", "input", "m", {"axes": [-1]}),
            ("Sub", "input m", "d", {}),
            ("Pow", "d two", "s", {}),
            ("ReduceMean", "s", "v", {"axes": [-1]}),
            ("Add", "v e", "w", {}),
            ("Sqrt", "w", "r", {}),
            ("Div", "d r", "n", {}),
            ("Mul", "n g", "o", {}),
            ("Add", "o h", "y", {}),
        ],
        {"two": np.float32(2), "e": np.float32(1e-5), "g": V, "h": V[::-1].copy()},
    ),
    "gelu_by_hand": (
        13,
        [
            ("Div", "input r", "a", {}),
            ("Erf", "a", "b", {}),
            ("Add", "b one", "c", {}),
            ("Mul", "input c", "d", {}),
            ("Mul", "d half", "y", {}),
        ],
        {"r": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)},
    ),
    "flatten_axes": (13, [("Flatten", "input", "a", {"axis": 2}), ("Flatten", "a", "y", {"axis": 1})], {}),
    "global_pools": (
        13,
        [
            ("GlobalAveragePool", "input", "a", {}),
            ("GlobalMaxPool", "input", "b", {}),
            ("Sum", "a b a", "y", {}),
        ],
        {},
    ),
    "reductions": (
        13,
        [
            ("ReduceMax", "input", "a", {"axes": [2, 3]}),
            ("ReduceL2", "input", "b", {"axes": [2, 3]}),
            ("ReduceMin", "input", "c", {"axes": [2, 3]}),
            ("Mean", "a b c", "y", {}),
        ],
        {},
    ),
    "depth_to_space": (
        13,
        [
            ("Concat", "input input input input", "a", {"axis": 1}),
            ("DepthToSpace", "a", "y", {"blocksize": 2}),
        ],
        {},
    ),
    "resize_linear": (
        13,
        [("Resize", "input  s", "y", {"mode": "linear", "coordinate_transformation_mode": "asymmetric"})],
        {"s": np.array([1, 1, 1.5, 2], np.float32)},
    ),
    "transposed": transposed(strides=[2, 2], pads=[1, 0, 0, 1], output_padding=[1, 0]),
    "transposed_dilated": transposed(dilations=[2, 1], strides=[1, 3]),
    "transposed_same": transposed(strides=[2, 2], auto_pad="SAME_UPPER"),
    **{
        op: mapped(op)
        for op in ("Sin", "Cos", "Sinh", "Cosh", "Floor", "Ceil", "Round", "Sign", "Erf", "HardSwish")
    },
    "Tan": (18, [("Tanh", "input", "a", {}), ("Tan", "a", "y", {})], {}),
    "ThresholdedRelu": mapped("ThresholdedRelu", alpha=0.3),
    "Shrink": mapped("Shrink", lambd=0.4, bias=0.2),
    "LeakyRelu": mapped("LeakyRelu", alpha=-0.4),
    "SpaceToDepth": mapped("SpaceToDepth", blocksize=2),
    "MeanVariance": mapped("MeanVarianceNormalization", axes=[2, 3]),
    "ReduceLogSumExp": (13, [("ReduceLogSumExp", "input", "y", {"axes": [1, 3]})], {}),
    "ReduceLogSum": (13, [("Abs", "input", "a", {}), ("ReduceLogSum", "a", "y", {"axes": [2]})], {}),
    "power_any": (
        13,
        [
            ("Abs", "input", "a", {}),
            ("Pow", "a p", "b", {}),
            ("Pow", "a q", "c", {}),
            ("Add", "b c", "y", {}),
        ],
        {"p": np.float32(0.7), "q": np.abs(V)},
    ),
    "modulo": (13, [("Mod", "input p", "y", {"fmod": 1})], {"p": np.float32(0.7)}),
    "clip_tensor": (13, [("Relu", "input", "a", {}), ("Max", "a p", "y", {})], {"p": V}),
    "choices": (
        16,
        [
            ("ReduceMean", "input", "m", {"axes": [3]}),
            ("Greater", "input m", "a", {}),
            ("LessOrEqual", "input p", "b", {}),
            ("Or", "a b", "c", {}),
            ("Not", "b", "d", {}),
            ("And", "c d", "e", {}),
            ("Xor", "e b", "g", {}),
            ("Where", "g input m", "h", {}),
            ("Cast", "a", "i", {"to": 1}),
            ("Mul", "h i", "j", {}),
            ("Round", "input", "k", {}),
            ("Equal", "k z", "l", {}),
            ("Where", "l j z", "y", {}),
        ],
        {"p": np.float32(-0.4), "z": np.float32(0)},
    ),
    "embedding": (
        13,
        [
            ("Abs", "input", "a", {}),
            ("Cast", "a", "i", {"to": 7}),
            ("Gather", "t i", "g", {}),
            ("ReduceSum", "g k", "y", {"keepdims": 0}),
        ],
        {"t": np.random.default_rng(3).normal(size=(9, 5)).astype(np.float32), "k": np.array([1, 2])},
    ),
    "resize_nearest_down": resized([5, 3], mode="nearest", nearest_mode="floor"),
    "resize_half_pixel": resized([11, 5], mode="linear"),
    "resize_corners": resized([15, 16], mode="linear", coordinate_transformation_mode="align_corners"),
    "resize_cubic": resized([12, 16], mode="cubic", cubic_coeff_a=-0.5),
    "trilu_slice": (
        14,
        [("Trilu", "input", "a", {"upper": 0}), ("Slice", "a i j k l", "y", {})],
        {"i": np.array([7, -1]), "j": np.array([-100, 2**40]), "k": np.array([2, 3]), "l": np.array([-1, 1])},
    ),
    "prelu_where": (
        13,
        [("PRelu", "input p", "a", {}), ("Where", "m a z", "y", {})],
        {"p": V.reshape(1, 1, 8), "m": V > 0, "z": np.float32(0)},
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name, tmp_path):
    opset, nodes, tensors = BY_HAND[name]
    nodes = [(op, i.replace("  ", " _ "), o, a) for op, i, o, a in nodes]
    proto = model(nodes, ["n", 3, 8, 8], tensors, opset)
    for node in proto.graph.node:
        node.input[:] = ["" if i == "_" else i for i in node.input]
    graph = loaded(proto, tmp_path / "m.onnx")
    for n in (1, 3):
        x = np.random.default_rng(n).normal(size=(n, 3, 8, 8)).astype(np.float32)
        at = ops.verify(ops.with_batch(graph, n))
        got = ops.evaluate(at, {"x": x})[at.outputs["output"]]
        np.testing.assert_allclose(got, reference(proto, x), rtol=1e-5, atol=1e-5)


def test_local_response_norm(tmp_path):
    """Against torch: the reference of the onnx package mixes up samples and channels."""
    opset, nodes, _ = mapped("LRN", size=3, alpha=0.2, beta=0.6, bias=1.5)
    graph = ops.with_batch(loaded(model(nodes, ["n", 5, 4, 4], {}, opset), tmp_path / "m.onnx"), 2)
    x = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    want = torch.nn.functional.local_response_norm(x, 3, 0.2, 0.6, 1.5)
    got = ops.evaluate(graph, {"x": x.numpy()})[graph.outputs["output"]]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_transposed_convolution_to_a_given_shape(tmp_path):
    """What is over is cut off at the front first, as the standard says."""
    opset, nodes, tensors = transposed(strides=[2, 2], output_shape=[17, 16])
    graph = loaded(model(nodes, [1, 3, 8, 8], tensors, opset), tmp_path / "m.onnx")
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    w, bias = (torch.tensor(tensors[k]) for k in "wb")
    want = torch.nn.functional.conv_transpose2d(x, w, bias, 2)[..., 1:]
    got = ops.evaluate(graph, {"x": x.numpy()})[graph.outputs["output"]]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_file_that_takes_integers(tmp_path):
    module = cases.seeded(cases.Text)
    x = torch.randint(0, 20, (3, 10), generator=torch.Generator().manual_seed(0))
    x[:, -2:] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), str(tmp_path / "m.onnx"), dynamo=False)
    graph = load_onnx(tmp_path / "m.onnx")
    got = ops.evaluate(graph, {"x": x.numpy()})[graph.outputs["output"]]
    np.testing.assert_allclose(got, module(x).detach(), rtol=1e-5, atol=1e-5)
    assert "words.weight" in graph.parameters()


def test_softmax_before_opset_13_is_over_all_further_axes(tmp_path):
    graph = loaded(
        model([("Softmax", "input", "y", {"axis": 2})], [1, 3, 8, 8], opset=11), tmp_path / "m.onnx"
    )
    x = np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)
    want = np.exp(x) / np.exp(x).sum((2, 3), keepdims=True)
    np.testing.assert_allclose(ops.evaluate(graph, {"x": x})[graph.outputs["output"]], want, rtol=1e-5)


def test_patterns_become_one_node(tmp_path):
    for name, wanted in (("layer_norm_by_hand", ["layer_norm", "mul", "add"]), ("gelu_by_hand", ["gelu"])):
        opset, nodes, tensors = BY_HAND[name]
        graph = loaded(model(nodes, ["n", 3, 8, 8], tensors, opset), tmp_path / "m.onnx")
        assert [n.op for n in graph.nodes] == wanted


def test_what_is_learned(tmp_path):
    """Pixel means, masks, exponents and factors are no parameters; weights and position tables are."""
    nodes = [
        ("Sub", "input mean", "a", {}),
        ("Div", "a std", "b", {}),
        ("Add", "b table", "c", {}),
        ("Add", "c mask", "d", {}),
        ("Conv", "d w", "e", {}),
        ("Mul", "e val_1", "y", {}),
    ]
    three = np.ones((1, 3, 1, 1), np.float32)
    mask = np.where(np.eye(8) > 0, 0, -np.inf).astype(np.float32)
    graph = loaded(
        model(
            nodes,
            [1, 3, 8, 8],
            {
                "mean": three,
                "std": 2 * three,
                "table": np.zeros((1, 3, 8, 8), np.float32),
                "mask": mask,
                "w": W,
                "val_1": np.array([2.0], np.float32),
            },
        ),
        tmp_path / "m.onnx",
    )
    assert set(graph.parameters()) == {"table", "w"}
    assert all(np.isfinite(v.data).all() for v in graph.values.values() if v.data is not None)


def test_half_precision_weights_become_float32(tmp_path):
    proto = model([("Conv", "input w", "y", {})], [1, 3, 8, 8], {"w": W.astype(np.float16)})
    proto.graph.input[0].type.tensor_type.elem_type = proto.graph.output[0].type.tensor_type.elem_type = 10
    graph = loaded(proto, tmp_path / "m.onnx")
    assert graph.type("w").dtype == "f32"


def test_a_local_function_is_inlined(tmp_path):
    body = [onnx.helper.make_node("Relu", ["p"], ["q"]), onnx.helper.make_node("Neg", ["q"], ["r"])]
    function = onnx.helper.make_function(
        "mine", "Twice", ["p"], ["r"], body, [onnx.helper.make_opsetid("", 13)]
    )
    proto = model([("Twice", "input", "y", {"domain": "mine"})], [2, 3, 8, 8])
    proto.functions.append(function)
    proto.opset_import.append(onnx.helper.make_opsetid("mine", 1))
    assert [n.op for n in loaded(proto, tmp_path / "m.onnx").nodes] == ["relu", "affine"]
