"""Files from outside run no code, read nothing beside themselves and end soon in a typed error: .pt2 and ONNX."""

import io
import json
import pickle
import random
import resource
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import acclimate
from acclimate import errors
from acclimate.frontend import load_onnx, load_torch

# -- .pt2 --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def entries(tmp_path_factory) -> dict[str, bytes]:
    """A good .pt2 file, entry by entry."""
    path = tmp_path_factory.mktemp("pt2") / "m.pt2"
    module = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)
    ).eval()
    program = torch.export.export(
        module, (torch.randn(2, 1, 8, 8),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    )
    torch.export.save(program, str(path))
    with zipfile.ZipFile(path) as archive:
        return {n: archive.read(n) for n in archive.namelist()}


def written(entries: dict[str, bytes], path, compression: int = zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, raw in entries.items():
            archive.writestr(name, raw)
    return path


def edited(entries: dict[str, bytes], name: str, change) -> dict[str, bytes]:
    value = json.loads(entries[name])
    change(value)
    return {**entries, name: json.dumps(value).encode()}


MODEL, WEIGHTS, CONSTANTS = (
    "m/models/model.json",
    "m/data/weights/model_weights_config.json",
    "m/data/constants/model_constants_config.json",
)


def test_a_file_that_was_packed_again_is_read(entries, tmp_path):
    graph = load_torch(written(entries, tmp_path / "m.pt2"))
    assert list(graph.parameters()) == ["0.weight", "0.bias", "1.weight", "1.bias", "4.weight", "4.bias"]


class Bomb:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def armed(path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Bomb(path), buffer)
    return buffer.getvalue()


def test_pickles_are_never_run(entries, tmp_path):
    """In the example inputs, which torch unpickles without restriction, in weights and constants, new style and old."""
    mark, good = tmp_path / "mark", load_torch(written(entries, tmp_path / "m.pt2"))
    torch.load(io.BytesIO(armed(mark)), weights_only=False).close()
    assert mark.exists(), "the bomb works"
    mark.unlink()
    path = written({**entries, "m/data/sample_inputs/model.pt": armed(mark)}, tmp_path / "a.pt2")
    assert str(load_torch(path)) == str(good)

    def as_pickle(config) -> None:
        config["config"]["0.weight"]["use_pickle"] = True

    def opaque(config) -> None:
        config["config"]["c"] = {
            "path_name": "opaque_obj_0",
            "is_param": False,
            "use_pickle": True,
            "tensor_meta": None,
        }

    for hostile in (
        {**edited(entries, WEIGHTS, as_pickle), "m/data/weights/weight_0": armed(mark)},
        {**edited(entries, CONSTANTS, opaque), "m/data/constants/opaque_obj_0": pickle.dumps(Bomb(mark))},
        edited(entries, CONSTANTS, opaque),
        {**entries, "m/data/weights/model.pt": armed(mark)},
        {**entries, "m/data/constants/model.pt": armed(mark)},
        {**entries, "m/data/aotinductor/model/x.so": b"\x7fELF"},
        {
            "version": b"5.1",
            "serialized_exported_program.json": b"{}",
            "serialized_state_dict.pt": armed(mark),
        },
    ):
        with pytest.raises(errors.BadInput, match="more than the data"):
            load_torch(written(hostile, tmp_path / "b.pt2"))
    assert not mark.exists()


def test_names_and_expressions_are_never_run(entries, tmp_path):
    mark = tmp_path / "mark"
    code = f"open({str(mark)!r}, 'w')"

    def calls(target):
        return lambda m: m["graph_module"]["graph"]["nodes"][0].__setitem__("target", target)

    def sized(expression):
        def change(model) -> None:
            found = [v for k, v in _items(model) if k == "as_expr"]
            assert found
            for value in found:
                value["expr_str"] = expression

        return change

    for change in (
        *map(
            calls,
            ("torch.os.system", "_operator.methodcaller", "math.os", "#x:y", "torch.ops.load_library", "x"),
        ),
        *map(
            sized,
            (
                code,
                f"__import__('os').system('touch {mark}')",
                "s0.__class__",
                "9**9**9",
                "s0+" * 500,
                "exec",
            ),
        ),
    ):
        with pytest.raises(errors.BadInput):
            load_torch(written(edited(entries, MODEL, change), tmp_path / "m.pt2"))
    path = written(edited(entries, MODEL, lambda m: m.update(guards_code=[code])), tmp_path / "m.pt2")
    load_torch(path)
    assert not mark.exists()


def _items(value):
    from acclimate.frontend.torch_file import _items

    return _items(value)


def test_archives_that_are_made_to_mislead(entries, tmp_path):
    with pytest.raises(errors.BadInput, match="unpacks|compressed"):
        load_torch(
            written({**entries, "m/extra/x": bytes(1 << 26)}, tmp_path / "m.pt2", zipfile.ZIP_DEFLATED)
        )
    for name in ("m/../../x", "/etc/passwd", "m/data/weights/../x", "m/data/weights/weight_1/x"):
        with pytest.raises(errors.BadInput):
            load_torch(written({**entries, name: b"x"}, tmp_path / "m.pt2"))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "m.pt2", "w") as archive:
        for name, raw in [*entries.items(), (MODEL, b"{}")]:
            archive.writestr(name, raw)
    with pytest.raises(errors.BadInput, match="twice"):
        load_torch(tmp_path / "m.pt2")

    def huge(config) -> None:
        config["config"]["0.weight"]["tensor_meta"]["sizes"] = [{"as_int": 1 << 40}]

    for hostile in (
        edited(entries, WEIGHTS, huge),
        {**edited(entries, WEIGHTS, huge), "m/data/weights/weight_0": b""},
        {k: v for k, v in entries.items() if k != "m/data/weights/weight_0"},
        {k: v for k, v in entries.items() if k != WEIGHTS},
        {**entries, MODEL: b"[" * 100_000},
    ):
        with pytest.raises(errors.BadInput):
            load_torch(written(hostile, tmp_path / "m.pt2"))


@pytest.mark.parametrize("count", [60, pytest.param(1500, marks=pytest.mark.slow)])
def test_mutated_pt2_files(count, entries, tmp_path):
    """Bytes of the JSON and of the archive changed: a Graph or a typed error."""
    rng, outcomes = random.Random(0), {"graph": 0, "refused": 0}
    names = [MODEL, MODEL, WEIGHTS]
    for i in range(count):
        changed = dict(entries)
        name = rng.choice(names)
        raw = bytearray(changed[name])
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(raw))
            raw[at : at + rng.choice((1, 1, 3))] = rng.choice(
                (b"0", b"9", b"-", b"", b"null", b'"', b"99999999")
            )
        changed[name] = bytes(raw)
        path = written(changed, tmp_path / "m.pt2")
        if i % 4 == 0:
            whole = bytearray(path.read_bytes())
            whole[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            path.write_bytes(whole)
        start = time.monotonic()
        try:
            load_torch(path)
            outcomes["graph"] += 1
        except errors.AcclimateError:
            outcomes["refused"] += 1
        assert time.monotonic() - start < 20, f"file {i} took too long"
    assert outcomes["refused"] > 0.3 * count, outcomes


# -- ONNX --------------------------------------------------------------------------------------------------------------


def proto(nodes, weights=None, shape=("n", 4), inputs=(), functions=()):
    graph = helper.make_graph(
        [helper.make_node(*n) if isinstance(n, tuple) else n for n in nodes],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape), *inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in (weights or {}).items()],
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("f", 1)],
        ir_version=9,
        functions=functions,
    )


def external(location: str, **more):
    model = proto([("MatMul", ["x", "w"], ["y"])], {"w": np.ones((4, 4), np.float32)})
    t = model.graph.initializer[0]
    t.ClearField("raw_data")
    t.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **more}.items():
        entry = t.external_data.add()
        entry.key, entry.value = key, str(value)
    return model


def test_external_data_that_escapes_the_folder(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(np.full(16, 7, np.float32).tobytes())
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "w.data").write_bytes(np.full(16, 7, np.float32).tobytes())
    (inside / "link").symlink_to(secret)
    path = inside / "m.onnx"

    def refused(model) -> None:
        path.write_bytes(model.SerializeToString())
        with pytest.raises(errors.BadInput):
            load_onnx(path)

    path.write_bytes(external("w.data").SerializeToString())
    assert (load_onnx(path).values["w"].data == 7).all()
    for location in (
        "../secret",
        str(secret),
        "../inside/../secret",
        "link",
        "./../secret",
        "",
        ".",
        "/dev/zero",
        "w.data\0",
    ):
        refused(external(location))
    for more in (
        {"length": 2**40},
        {"offset": 2**40},
        {"length": -1},
        {"offset": -4},
        {"offset": "x"},
        {"length": 8},
    ):
        refused(external("w.data", **more))
    # The same where the tensor is not an initializer but a constant's value.
    inner = external("../secret").graph.initializer[0]
    refused(proto([helper.make_node("Constant", [], ["w"], value=inner), ("MatMul", ["x", "w"], ["y"])]))


def function(name, calls):
    return helper.make_function(
        "f", name, ["a"], ["b"], calls, [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    )


def deep(levels: int):
    """If in If in If: nested graphs."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "g", [], [helper.make_tensor_value_info("y", 1, None)]
    )
    for _ in range(levels):
        node = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
        body = helper.make_graph([node], "g", [], [helper.make_tensor_value_info("y", 1, None)])
    return body.node[0]


def _doubling(levels: int):
    """Functions that each call the one below twice: 2^levels nodes once they are inlined."""
    made = [function("f0", [helper.make_node("Relu", ["a"], ["b"])])]
    for i in range(1, levels):
        below = f"f{i - 1}"
        calls = [
            helper.make_node(below, ["a"], ["m"], domain="f"),
            helper.make_node(below, ["m"], ["b"], domain="f"),
        ]
        made.append(function(f"f{i}", calls))
    return proto([helper.make_node(f"f{levels - 1}", ["x"], ["y"], domain="f")], functions=made)


HOSTILE = {
    "a cycle": lambda: proto([("Add", ["x", "b"], ["a"]), ("Relu", ["a"], ["b"]), ("Relu", ["b"], ["y"])]),
    "itself": lambda: proto([("Add", ["x", "y"], ["y"])]),
    "a missing initializer": lambda: proto([("MatMul", ["x", "w"], ["y"])]),
    "a name twice": lambda: proto([("Relu", ["x"], ["y"]), ("Neg", ["x"], ["y"])]),
    "an initializer named as the input": lambda: proto(
        [("Relu", ["x"], ["y"])], {"x": np.ones(4, np.float32)}
    ),
    "an input of 2^40": lambda: proto([("Relu", ["x"], ["y"])], shape=(1, 2**40)),
    "an input of 2^62 by 2^62": lambda: proto([("Relu", ["x"], ["y"])], shape=(2**62, 2**62)),
    "an expansion to 2^40": lambda: proto(
        [("Expand", ["x", "s"], ["y"])], {"s": np.int64([2**20, 2**20, 1, 4])}
    ),
    "a constant of 2^40": lambda: proto(
        [("ConstantOfShape", ["s"], ["c"]), ("Add", ["x", "c"], ["y"])], {"s": np.int64([2**40])}
    ),
    "a range of 2^60": lambda: proto(
        [("Range", ["a", "b", "d"], ["c"]), ("Cast", ["c"], ["e"]), ("Add", ["x", "e"], ["y"])],
        {"a": np.int64(0), "b": np.int64(2**60), "d": np.int64(1)},
    ),
    "tiles of 2^40": lambda: proto(
        [("Tile", ["c", "t"], ["e"]), ("Add", ["x", "e"], ["y"])],
        {"c": np.ones((1, 4), np.float32), "t": np.int64([2**40, 1])},
    ),
    "padding of 2^40": lambda: proto([("Pad", ["x", "p"], ["y"])], {"p": np.int64([0, 2**40, 0, 0])}),
    "a function that calls itself": lambda: proto(
        [helper.make_node("f0", ["x"], ["y"], domain="f")],
        functions=[function("f0", [helper.make_node("f0", ["a"], ["b"], domain="f")])],
    ),
    "functions that double 40 times": lambda: _doubling(40),
    "12 nested graphs": lambda: proto([("Cast", ["x"], ["c"]), *[deep(12)]]),
    "20000 nodes in a row": lambda: proto(
        [("Atan", ["x" if i == 0 else f"v{i}"], [f"v{i + 1}" if i < 19_999 else "y"]) for i in range(20_000)]
    ),
}
#: Sizes are numbers to a graph: the plan says that these do not fit.
ONLY_LARGE = {"an input of 2^40", "an input of 2^62 by 2^62", "padding of 2^40"}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_onnx_graphs(name, tmp_path):
    """In a process of its own with 6 GB of addresses and 40 s: a typed error, not a crash, and no other exception."""
    path = tmp_path / "m.onnx"
    path.write_bytes(HOSTILE[name]().SerializeToString())
    code = (
        "import sys\nfrom acclimate.errors import AcclimateError\nfrom acclimate.frontend import load_onnx\n"
        "try:\n    load_onnx(sys.argv[1])\nexcept AcclimateError as error:\n    print(type(error).__name__, error)\n"
        "else:\n    print('a graph')\n"
    )

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))

    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60, preexec_fn=limit
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-800:]}"
    allowed = ("BadInput", "Unsupported", *(["a graph"] if name in ONLY_LARGE else []))
    assert done.stdout.startswith(allowed), done.stdout
    assert time.monotonic() - start < 40


@pytest.mark.parametrize("name", sorted(ONLY_LARGE))
def test_what_is_only_large_does_not_fit(name, tmp_path):
    (tmp_path / "m.onnx").write_bytes(HOSTILE[name]().SerializeToString())
    with pytest.raises(errors.AcclimateError):
        acclimate.plan(load_onnx(tmp_path / "m.onnx"), scheme="full", loss="mse").program  # noqa: B018
