"""What cannot be taken is said at once, with the place and the next action."""

import pickle

import numpy as np
import pytest
from frontend import cases

from acclimate import errors
from acclimate.frontend import LOADERS, from_torch, load, load_onnx, load_torch

torch, nn, F = cases.torch, cases.nn, cases.F


class Many(nn.Module):
    """Three nodes that cannot be taken, one after another."""

    def __init__(self):
        super().__init__()
        self.up, self.volume = nn.Linear(8, 8), nn.Conv3d(1, 1, 2)

    def forward(self, x):
        x = self.volume(self.up(x).unsqueeze(1))
        x = x.sort(1)[0]
        return x.atan().flatten(1)


def test_all_unsupported_nodes_are_listed():
    with pytest.raises(errors.Unsupported) as caught:
        from_torch(Many(), torch.randn(2, *cases.IMAGE))
    nodes = caught.value.nodes
    assert [n.op for n in nodes] == ["conv3d", "sort", "atan"]
    assert "in forward: x = self.volume(self.up(x)" in nodes[0].where and "conv2d" in nodes[0].rewrite
    assert "outside" in nodes[1].rewrite and "return x.atan().flatten(1)" in nodes[2].where
    for node in nodes:
        assert node.op in str(caught.value) and node.rewrite in str(caught.value)
    assert caught.value.exit_code == 4 and pickle.loads(pickle.dumps(caught.value)).nodes == nodes


def test_all_unsupported_nodes_of_a_file_are_listed(tmp_path):
    class Two(nn.Module):
        def forward(self, x):
            return torch.topk(x, 3).values.atan().flatten(1)

    path = tmp_path / "m.onnx"
    torch.onnx.export(Two().eval(), (torch.randn(1, *cases.IMAGE),), str(path), dynamo=True, verbose=False)
    with pytest.raises(errors.Unsupported) as caught:
        load(path)
    assert [n.op for n in caught.value.nodes] == ["TopK", "Atan"] and caught.value.nodes[0].rewrite


@pytest.mark.parametrize(
    "fn, shape, word",
    [
        (lambda x: F.avg_pool2d(x, 3, ceil_mode=True, divisor_override=3), cases.IMAGE, "divisor_override"),
        (lambda x: x.sort(1)[0], cases.VECTOR, "not known"),
        (lambda x: x[x > 0].sum() + x, cases.VECTOR, "indexing by data"),
        (lambda x: torch.rand_like(x) + x, cases.VECTOR, "not known"),
        (lambda x: F.conv3d(x.unsqueeze(1), torch.ones(1, 1, 2, 2, 2)), cases.IMAGE, "spatial dimensions"),
        (lambda x: x * x.shape[0], cases.VECTOR, "batch size"),
    ],
    ids=["divisor", "sort", "index", "random", "conv3d", "batch as number"],
)
def test_unsupported(fn, shape, word):
    with pytest.raises(errors.Unsupported) as caught:
        from_torch(cases.Fn(fn), torch.randn(2, *shape))
    assert word in str(caught.value) and "in forward: return self.fn(x, *extra)" in str(caught.value)


def test_control_flow():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(errors.Unsupported, match="decides by the data") as caught:
        from_torch(Branch(), torch.randn(2, 3))
    assert "return x if x.sum() > 0 else -x" in caught.value.where


@pytest.mark.parametrize(
    "module, word",
    [
        (cases.Fn(lambda x: (x, x)), "several tensors"),
        (cases.Fn(lambda x: torch.ones(2, 3)), "does not depend"),
        (cases.Fn(lambda x: x.mean(0)), "a row a sample"),
        (cases.Fn(lambda x: x.undefined()), "cannot trace"),
    ],
    ids=["outputs", "constant", "no batch", "raises"],
)
def test_modules_of_another_kind(module, word):
    with pytest.raises(errors.BadInput, match=word):
        from_torch(module, torch.randn(2, 3))


def test_a_buffer_that_forward_writes():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(3))

        def forward(self, x):
            self.seen.add_(x.mean(0))
            return x - self.seen

    with pytest.raises(errors.Unsupported, match="writes its buffer seen"):
        from_torch(Counts(), torch.randn(2, 3))


def test_examples_of_another_kind():
    module = nn.Linear(3, 3)
    for example in (
        (torch.zeros(1, 3), torch.zeros(1, 3)),
        {"x": torch.zeros(1, 3)},
        torch.tensor(1.0),
        torch.zeros(0, 3),
    ):
        with pytest.raises(errors.WrongUse):
            from_torch(module, example)
    with pytest.raises(errors.Unsupported, match="complex"):
        from_torch(module, torch.zeros(1, 3, dtype=torch.complex64))
    with pytest.raises(errors.WrongUse, match="nn.Module"):
        from_torch(lambda x: x, torch.zeros(1, 3))
    quantised = nn.Linear(3, 3)
    quantised.register_buffer("codes", torch.zeros(3, dtype=torch.int8))
    with pytest.raises(errors.Unsupported, match="quantised"):
        from_torch(quantised, torch.zeros(1, 3))


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", LOADERS)
@pytest.mark.parametrize(
    "content",
    [None, b"", b"\x08", b"not a model", b"PK\x03\x04" + bytes(200), bytes(range(256)) * 40],
    ids=["missing", "empty", "short", "text", "zip", "noise"],
)
def test_files_that_are_no_models(suffix, content, tmp_path):
    path = tmp_path / f"m{suffix}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(errors.BadInput) as caught:
        load(path)
    assert str(path) in str(caught.value) and caught.value.action


def test_a_file_that_is_cut_off(tmp_path):
    module = cases.seeded(cases.lenet)
    for suffix in LOADERS:
        path = tmp_path / f"m{suffix}"
        if suffix == ".onnx":
            torch.onnx.export(module, (torch.randn(1, 1, 16, 16),), str(path), dynamo=True, verbose=False)
        else:
            torch.export.save(torch.export.export(module, (torch.randn(1, 1, 16, 16),)), str(path))
        data = path.read_bytes()
        for part in (0.1, 0.5, 0.9):
            path.write_bytes(data[: int(len(data) * part)])
            with pytest.raises(errors.BadInput):
                load(path)


def test_an_unknown_suffix(tmp_path):
    path = tmp_path / "m.h5"
    path.write_bytes(b"1")
    with pytest.raises(errors.BadInput, match=".h5") as caught:
        load(path)
    assert ".onnx" in caught.value.action
    with pytest.raises(errors.BadInput):
        load(tmp_path)


def test_external_data(tmp_path):
    import onnx

    path, module = tmp_path / "m.onnx", cases.seeded(cases.mlp)
    torch.onnx.export(module, (torch.randn(1, 1, 8, 8),), str(path), dynamo=True, verbose=False)
    proto = onnx.load(str(path))
    onnx.save_model(proto, str(path), save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    cases.same(load_onnx(path), module, (1, 8, 8))
    (tmp_path / "m.onnx.data").rename(tmp_path / "gone")
    with pytest.raises(errors.BadInput, match="m.onnx.data") as caught:
        load_onnx(path)
    assert "copy" in caught.value.action


def test_kinds_of_onnx_models(tmp_path):
    import onnx
    from onnx import TensorProto, helper

    def check(
        word, nodes=(("Relu", ["input"], ["y"]),), inputs=(("input", 1, [1, 3]),), outputs=("y",), opset=13
    ):
        graph = helper.make_graph(
            [helper.make_node(*n) for n in nodes],
            "g",
            [helper.make_tensor_value_info(*i) for i in inputs],
            [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs],
        )
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        onnx.save(proto, str(tmp_path / "m.onnx"))
        with pytest.raises(errors.BadInput, match=word):
            load(tmp_path / "m.onnx")

    two = (("input", 1, [1, 3]), ("other", 1, [1, 3]))
    check("several inputs", (("Add", ["input", "other"], ["y"]),), two)
    check("several tensors", (("Relu", ["input"], ["y"]), ("Neg", ["input"], ["z"])), outputs=("y", "z"))
    check("neither floats nor integers", (("Identity", ["input"], ["y"]),), (("input", 9, [1, 3]),))
    check("other than the batch", inputs=(("input", 1, ["n", "m"]),))
    check("too old", opset=6)
    check("not known here", (("Atan", ["input"], ["y"]),))


def test_pt2_of_another_kind(tmp_path):
    class TwoInputs(nn.Module):
        def forward(self, x, y):
            return x + y

    path = tmp_path / "m.pt2"
    torch.export.save(torch.export.export(TwoInputs(), (torch.zeros(2, 3), torch.zeros(2, 3))), str(path))
    with pytest.raises(errors.Unsupported, match="several inputs"):
        load_torch(path)
    torch.export.save(
        torch.export.export(
            cases.Fn(lambda x: x * 2), (torch.zeros(2, 3),), dynamic_shapes=({1: torch.export.Dim.DYNAMIC},)
        ),
        str(path),
    )
    with pytest.raises(errors.Unsupported, match="other than the batch"):
        load_torch(path)
    path.write_bytes(np.arange(10).tobytes())
    with pytest.raises(errors.BadInput):
        load_torch(path)


def test_missing_packages(monkeypatch, tmp_path):
    import sys

    path = tmp_path / "m.onnx"
    path.write_bytes(b"1")
    for package in ("torch", "onnx"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(errors.WrongUse, match="torch") as caught:
        from_torch(None, None)
    assert "pip install" in caught.value.action
    with pytest.raises(errors.WrongUse, match="onnx"):
        load(path)
