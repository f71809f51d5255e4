"""torch modules and .pt2 files become graphs that compute the same, for any batch."""

import copy

import numpy as np
import pytest
from frontend import cases

from acclimate import errors, ops
from acclimate.frontend import from_torch, load, load_torch
from acclimate.grad import differentiate

torch, nn, F = cases.torch, cases.nn, cases.F


@pytest.mark.parametrize("name", cases.MODELS)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_models(name, train):
    make, shape = cases.MODELS[name]
    module = cases.seeded(make, train)
    for m in module.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    graph = from_torch(module, torch.randn(1, *shape))
    cases.same(graph, module, shape, (2, 3) if train else (1, 3))
    assert list(graph.parameters()) == [n for n, _ in module.named_parameters()]
    for name, value in module.named_parameters():
        np.testing.assert_array_equal(graph.values[name].data, value.detach())
    assert all(node.where for node in graph.nodes)
    for name, got, want in cases.gradients(graph, module, shape):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3 * max(1, np.abs(want).max()), err_msg=name)


@pytest.mark.parametrize("name", cases.LAYERS)
def test_layers(name):
    make, shape = cases.LAYERS[name]
    module = cases.seeded(make)
    graph = from_torch(module, torch.randn(2, *shape))
    cases.same(graph, module, shape)
    if name == "no_grad":  # what learns is for the update set to say
        return
    for name, got, want in cases.gradients(graph, module, shape):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * max(1, np.abs(want).max()), err_msg=name)


# -- what a graph says of the module -------------------------------------------------------------------------------


def test_names_kinds_and_places():
    module = cases.seeded(cases.ResNet)
    graph = from_torch(module, torch.randn(4, 3, 8, 8))
    assert graph.batch == 4 and graph.shape(graph.inputs["x"]) == (4, 3, 8, 8)
    assert list(graph.outputs) == ["output"] and repr(graph.shape(graph.inputs["x"])[0]) == "N"
    kinds = {v.name: v.kind for v in graph.values.values()}
    assert kinds["layer1.0.conv1.weight"] == "parameter" and kinds["layer1.0.bn1.running_mean"] == "state"
    assert any("in forward: y = self.conv1(F.relu(self.bn1(x)))" in n.where for n in graph.nodes)
    assert not any("num_batches_tracked" in name for name in graph.values)


def test_a_table_is_a_constant_and_unused_tensors_are_gone():
    module = cases.seeded(cases.ClassToken)
    module.unused = nn.Linear(3, 3)
    graph = from_torch(module, torch.randn(1, 8, 6))
    assert graph.values["table"].kind == "constant"
    assert not any("unused" in name for name in graph.values)


def test_the_module_is_left_alone():
    module = cases.seeded(cases.ResNet, train=True)
    before = copy.deepcopy(module.state_dict())
    with torch.no_grad():
        from_torch(module, torch.randn(1, 3, 8, 8), mode="eval")
    assert module.training and all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_modes():
    module = cases.seeded(cases.ResNet, train=True)
    module.bn.eval()  # a frozen batch norm in a net that trains

    def norms(**more):
        return [
            n.op
            for n in from_torch(module, torch.randn(2, 3, 8, 8), **more).nodes
            if n.op.startswith("batch_norm")
        ]

    assert norms() == ["batch_norm_train"] * 4 + ["batch_norm"]
    assert set(norms(mode="eval")) == {"batch_norm"} and set(norms(mode="train")) == {"batch_norm_train"}
    with pytest.raises(errors.WrongUse):
        norms(mode="frozen")


def test_batch_norm_attributes():
    module = cases.seeded(lambda: nn.BatchNorm1d(6, eps=1e-3, momentum=0.3), train=True)
    (node,) = from_torch(module, torch.randn(2, 6, 5)).nodes
    assert (node.attrs["eps"], node.attrs["momentum"]) == (1e-3, 0.3)
    assert node.inputs[3:] == ("running_mean", "running_var")


def test_dropout():
    layers = nn.Sequential(
        nn.Linear(12, 8), nn.Dropout(0.3), nn.Linear(8, 8), nn.Dropout(0.1), nn.Dropout(0.0)
    )
    graph = from_torch(layers.train(), torch.randn(1, 12))
    found = [n for n in graph.nodes if n.op == "dropout"]
    assert [n.attrs["p"] for n in found] == [0.3, 0.1] and len({n.attrs["salt"] for n in found}) == 2
    step = graph.values["dropout_step"]
    assert {n.inputs[1] for n in found} == {"dropout_step"}
    assert (step.kind, step.type.dtype, step.shape, int(step.data[0])) == ("state", "i32", (1,), 0)
    assert not [n for n in from_torch(layers.eval(), torch.randn(1, 12)).nodes if n.op == "dropout"]


@pytest.mark.parametrize("make", [lambda: nn.Dropout2d(0.5), lambda: nn.Dropout1d(0.5)], ids=["2d", "1d"])
def test_dropout_of_channels(make):
    shape = (64, 4, 4) if isinstance(make(), nn.Dropout2d) else (64, 8)
    graph = ops.with_batch(from_torch(make().train(), torch.randn(1, *shape)), 3)
    y = ops.evaluate(graph, {"x": np.ones((3, *shape), np.float32)})[graph.outputs["output"]].reshape(
        3, 64, -1
    )
    assert (y == y[:, :, :1]).all() and set(np.unique(y)) == {0, 2} and 0.3 < (y > 0).mean() < 0.7


def test_dropout_in_attention():
    graph = from_torch(cases.seeded(lambda: cases.ViT(dropout=0.1), train=True), torch.randn(1, 3, 16, 16))
    assert sum(n.op == "dropout" for n in graph.nodes) == 8


def test_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.decode = nn.Linear(12, 12), nn.Linear(12, 12)
            self.decode.weight = self.encode.weight

        def forward(self, x):
            return self.decode(F.relu(self.encode(x)))

    module = cases.seeded(Tied)
    graph = from_torch(module, torch.randn(1, 12))
    assert graph.aliases == {"decode.weight": "encode.weight"}
    assert list(graph.parameters()) == ["encode.weight", "encode.bias", "decode.bias"]
    cases.same(graph, module, (12,))


def test_a_weight_that_is_transposed_stays_a_parameter():
    module = cases.Fn(lambda x, w: F.relu(x @ w.t()) @ w, w=cases.par(7, 12))
    graph = from_torch(module, torch.randn(1, 12))
    assert [n.op for n in graph.nodes] == ["matmul", "relu", "matmul"]
    assert [n.attrs["tb"] for n in graph.nodes if n.op == "matmul"] == [1, 0]


def test_attention_cuts_before_it_permutes():
    graph = from_torch(cases.seeded(cases.ViT), torch.randn(2, 3, 16, 16))
    assert max(len(graph.shape(n)) for node in graph.nodes for n in node.outputs if n) <= 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_floats_become_float32(dtype):
    module = cases.seeded(cases.mlp)
    graph = from_torch(copy.deepcopy(module).to(dtype), torch.randn(1, 1, 8, 8, dtype=dtype))
    assert all(v.type.dtype == "f32" for v in graph.values.values())
    cases.same(graph, module, (1, 8, 8), tolerance=1e-5 if dtype == torch.float64 else 0.02)


def test_the_names_x_and_dropout_step_may_be_the_users():
    module = cases.Fn(lambda x, w: x * w, x=cases.par(12))
    graph = from_torch(module, torch.randn(1, 12))
    assert list(graph.parameters()) == ["x"]
    cases.same(graph, module, (12,))


def test_examples():
    module = cases.seeded(cases.mlp)
    for example in (
        np.zeros((1, 1, 8, 8), np.float32),
        (torch.zeros(3, 1, 8, 8),),
        torch.zeros(1, 1, 8, 8).double(),
    ):
        cases.same(from_torch(module, example), module, (1, 8, 8))


def test_where_the_batch_is_baked_into_forward():
    """The module only runs at its own batch size; the graph runs at any."""
    module = cases.Fn(lambda x, f: f(x.view(4, -1)).view(4, 5, 1)[:, :, 0], nn.Linear(48, 5)).eval()
    graph = from_torch(module, torch.randn(4, 3, 16))
    assert graph.batch == 4
    x = np.random.default_rng(0).normal(size=(4, 3, 16)).astype(np.float32)
    whole = ops.evaluate(graph, {"x": x})[graph.outputs["output"]]
    np.testing.assert_allclose(whole, module(torch.from_numpy(x)).detach(), atol=1e-5)
    one = ops.with_batch(graph, 1)
    np.testing.assert_allclose(ops.evaluate(one, {"x": x[2:3]})[one.outputs["output"]], whole[2:3], atol=1e-5)


# -- .pt2 files ------------------------------------------------------------------------------------------------------


def save(module, shape, path, batch, dynamic=False):
    more = {"dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},)} if dynamic else {}
    torch.export.save(torch.export.export(module, (torch.randn(batch, *shape),), **more), str(path))
    return path


@pytest.mark.parametrize("name", cases.MODELS)
@pytest.mark.parametrize("batch", [1, 2, 7, 0], ids=["1", "2", "7", "dynamic"])
def test_pt2_of_any_batch(name, batch, tmp_path):
    make, shape = cases.MODELS[name]
    module = cases.seeded(make)
    graph = load(save(module, shape, tmp_path / "m.pt2", batch or 2, not batch))
    cases.same(graph, module, shape)
    assert list(graph.parameters()) == [n for n, _ in module.named_parameters()]


def test_pt2_keeps_ties_and_mode(tmp_path):
    module = cases.seeded(
        lambda: nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Linear(12, 12)), train=True
    )
    module[2].weight = module[0].weight
    graph = load_torch(save(module, (12,), tmp_path / "m.pt2", 2))
    assert graph.aliases == {"2.weight": "0.weight"} and [n.op for n in graph.nodes][1] == "batch_norm_train"


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_a_model_that_takes_integers(dtype):
    """Whole numbers arrive as floats; an embedding learns, but for its padding row."""
    module = cases.seeded(cases.Text)
    example = torch.randint(0, 20, (3, 10)).to(dtype)
    example[:, -2:] = 0
    graph = from_torch(module, example)
    y = module(example)
    y.square().sum().backward()
    env = ops.evaluate(graph, {"x": example.numpy()})
    np.testing.assert_allclose(env[graph.outputs["output"]], y.detach(), atol=1e-5)
    squares = ops.emit(graph, "sum", ops.emit(graph, "square", graph.outputs["output"]), axes=3)
    found = differentiate(graph, ops.emit(graph, "reshape", squares, shape=(1,)), ["words.weight"])
    got = ops.evaluate(graph, {"x": example.numpy()})[found["words.weight"]]
    np.testing.assert_allclose(got, module.words.weight.grad, atol=1e-5)
    assert not got[0].any() and got[1:].any()
