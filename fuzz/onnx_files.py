"""Hostile ONNX files against the frontend: each is either a Graph or an AcclimateError, soon and in little memory.

    PYTHONPATH=src python fuzz/onnx_files.py [--count N | --seconds S] [--seed K] [--only I]

Mutant I depends on K and I alone. Half of them are good files with changed bytes, half are good models with changed
attributes, shapes, element types, names, ops and initialisers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnx  # noqa: TID253
from onnx import TensorProto, helper, numpy_helper  # noqa: TID253

from acclimate.errors import AcclimateError
from acclimate.frontend import load_onnx
from acclimate.ops import verify

SECONDS = 5  # for one file
NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    64,
    255,
    1000,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    -(2**31),
    2**40,
    2**62,
    -(2**63),
    2**63 - 1,
)


def _model(
    nodes: list, shape: tuple[int | str, ...], weights: dict[str, np.ndarray], out: str = "y"
) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, shape)],
        [value(out, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def seeds() -> list[onnx.ModelProto]:
    """Small models that meet most of the frontend."""
    rng, node = np.random.default_rng(0), helper.make_node

    def w(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    conv = _model(
        [
            node(
                "Conv",
                ["x", "w", "b"],
                ["c"],
                kernel_shape=[3, 3],
                pads=[1, 1, 1, 1],
                strides=[2, 1],
                group=2,
            ),
            node("BatchNormalization", ["c", "s", "b", "m", "v"], ["n"], epsilon=1e-5),
            node("Clip", ["n", "low", "high"], ["r"]),
            node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
            node("AveragePool", ["p"], ["q"], kernel_shape=[2, 2], pads=[0, 0, 1, 1], count_include_pad=1),
            node("Flatten", ["q"], ["f"], axis=1),
            node("Gemm", ["f", "fw", "fb"], ["y"], transB=1, alpha=0.5),
        ],
        ("n", 2, 8, 8),
        {
            "w": w(4, 1, 3, 3),
            "b": w(4),
            "s": w(4),
            "m": w(4),
            "v": w(4) ** 2,
            "low": np.float32(0),
            "high": np.float32(6),
            "fw": w(3, 32),
            "fb": w(3),
        },
    )
    shapes = _model(
        [
            node("Shape", ["x"], ["sh"]),
            node("Gather", ["sh", "zero"], ["n"], axis=0),
            node("Unsqueeze", ["n", "zeros"], ["n1"]),
            node("Concat", ["n1", "rest"], ["to"], axis=0),
            node("Reshape", ["x", "to"], ["a"]),
            node("Transpose", ["a"], ["t"], perm=[0, 2, 1]),
            node("Slice", ["t", "start", "end", "axes", "steps"], ["s"]),
            node("Split", ["s", "parts"], ["u", "v"], axis=1),
            node("Mul", ["u", "v"], ["m"]),
            node("Pad", ["m", "pads"], ["p"]),
            node("ReduceMean", ["p"], ["y"], axes=[2], keepdims=0),
        ],
        (2, 24),
        {
            "zero": np.int64(0),
            "zeros": np.int64([0]),
            "rest": np.int64([4, 6]),
            "start": np.int64([0]),
            "end": np.int64([2**31]),
            "axes": np.int64([1]),
            "steps": np.int64([1]),
            "parts": np.int64([3, 3]),
            "pads": np.int64([0, 1, 0, 0, 0, 2]),
        },
    )
    attention = _model(
        [
            node("MatMul", ["x", "q"], ["a"]),
            node("Transpose", ["a"], ["b"], perm=[0, 2, 1]),
            node("MatMul", ["a", "b"], ["c"]),
            node("Softmax", ["c"], ["d"], axis=-1),
            node("MatMul", ["d", "x"], ["e"]),
            node("Add", ["e", "bias"], ["f"]),
            node("LayerNormalization", ["f", "g", "bias"], ["h"], axis=-1),
            node("Sigmoid", ["h"], ["i"]),
            node("Expand", ["i", "to"], ["j"]),
            node("ReduceSum", ["j", "axes"], ["k"], keepdims=1),
            node("Squeeze", ["k", "axes"], ["y"]),
        ],
        (1, 5, 6),
        {"q": w(6, 6), "bias": w(6), "g": w(6), "to": np.int64([1, 5, 6]), "axes": np.int64([1])},
    )
    filled = _model(
        [
            node(
                "ConstantOfShape", ["of"], ["z"], value=helper.make_tensor("v", TensorProto.FLOAT, [1], [0.5])
            ),
            node("Range", ["r0", "r1", "r2"], ["r"]),
            node("Cast", ["r"], ["rf"], to=TensorProto.FLOAT),
            node("Add", ["x", "z"], ["a"]),
            node("Add", ["a", "rf"], ["b"]),
            node("Where", ["mask", "b", "x"], ["c"]),
            node("Tile", ["c", "tiles"], ["d"]),
            node("DepthToSpace", ["x4"], ["e"], blocksize=2),
            node("Resize", ["e", "", "scales"], ["f"], mode="nearest"),
            node("CumSum", ["d", "r2"], ["y"]),
        ],
        (1, 4),
        {
            "of": np.int64([1, 4]),
            "r0": np.int64(0),
            "r1": np.int64(4),
            "r2": np.int64(1),
            "mask": np.array([[True, False] * 2]),
            "tiles": np.int64([1, 1]),
            "x4": w(1, 4, 2, 2),
            "scales": np.float32([1, 1, 2, 2]),
        },
    )
    return [conv, shapes, attention, filled]


# -- mutations -----------------------------------------------------------------------------------------------------


def _number(rng: random.Random, old: int) -> int:
    return rng.choice((*NUMBERS, old + 1, old - 1, 2 * old, -old))


def _change_attribute(rng: random.Random, model: onnx.ModelProto) -> None:
    nodes = [n for n in model.graph.node if n.attribute]
    a = rng.choice(rng.choice(nodes).attribute)
    if a.ints and rng.random() < 0.8:
        kind = rng.randrange(4)
        if kind == 0:
            a.ints.append(_number(rng, 1))
        elif kind == 1:
            del a.ints[rng.randrange(len(a.ints))]
        else:
            i = rng.randrange(len(a.ints))
            a.ints[i] = max(-(2**63), min(2**63 - 1, _number(rng, a.ints[i])))
    elif a.type == onnx.AttributeProto.INT:
        a.i = max(-(2**63), min(2**63 - 1, _number(rng, a.i)))
    elif a.type == onnx.AttributeProto.FLOAT:
        a.f = rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e38))
    else:
        a.type = rng.randrange(12)


def _change_initializer(rng: random.Random, model: onnx.ModelProto) -> None:
    t = rng.choice(model.graph.initializer)
    kind = rng.randrange(6)
    if kind == 0 and t.dims:
        i = rng.randrange(len(t.dims))
        t.dims[i] = max(-(2**63), min(2**63 - 1, _number(rng, t.dims[i])))
    elif kind == 1:
        t.data_type = rng.randrange(24)
    elif kind == 2:
        t.raw_data = t.raw_data[: rng.randrange(len(t.raw_data) + 1)]
    elif kind == 3:
        t.dims.append(rng.choice((0, 1, 2, 2**40)))
    elif t.data_type in (TensorProto.INT64, TensorProto.BOOL) or kind == 4:
        raw = bytearray(t.raw_data)
        for at in range(0, len(raw) - 7, 8):
            if rng.random() < 0.5:
                raw[at : at + 8] = max(-(2**63), min(2**63 - 1, _number(rng, 3))).to_bytes(
                    8, "little", signed=True
                )
        t.raw_data = bytes(raw)
    else:
        model.graph.initializer.remove(t)


def _change_graph(rng: random.Random, model: onnx.ModelProto) -> None:
    g = model.graph
    node, other = rng.choice(g.node), rng.choice(g.node)
    names = (
        [n for m in g.node for n in (*m.input, *m.output)]
        + [t.name for t in g.initializer]
        + ["", "x", "nowhere"]
    )
    kind = rng.randrange(11)
    if kind == 0:
        node.op_type = rng.choice(
            (other.op_type, "Relu", "Loop", "If", "NonZero", "QLinearConv", "", "Conv", "LSTM", "\x00")
        )
    elif kind == 1 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(names)
    elif kind == 2 and node.output:
        node.output[rng.randrange(len(node.output))] = rng.choice(names)
    elif kind == 3:
        node.input.append(rng.choice(names))
    elif kind == 4 and node.input:
        del node.input[rng.randrange(len(node.input))]
    elif kind == 5:
        g.node.remove(node)
    elif kind == 6:
        g.node.append(node)
    elif kind == 7:
        dims = g.input[0].type.tensor_type.shape.dim
        if dims:
            dims[rng.randrange(len(dims))].dim_value = max(-(2**63), min(2**63 - 1, _number(rng, 3)))
    elif kind == 8:
        g.input[0].type.tensor_type.elem_type = rng.randrange(24)
    elif kind == 9:
        rng.choice((g.input[0], g.output[0])).name = rng.choice(names)
    else:
        model.opset_import[0].version = rng.choice((0, 1, 6, 7, 11, 12, 13, 18, 22, 10**6, -1))


def mutant(models: list[onnx.ModelProto], seed: int, index: int) -> bytes:
    """The bytes of a mutated file."""
    rng = random.Random(f"{seed}/{index}")
    model = onnx.ModelProto()
    model.CopyFrom(rng.choice(models))
    bytewise = rng.random() < 0.3
    for _ in range(0 if bytewise else rng.randint(1, 3)):
        rng.choice((_change_attribute, _change_initializer, _change_graph))(rng, model)
    raw = bytearray(model.SerializeToString())
    for _ in range(rng.randint(1, 6) if bytewise else 0):
        at = rng.randrange(len(raw))
        kind = rng.randrange(3)
        if kind == 0:
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            raw[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        else:
            del raw[at : at + rng.randint(1, 8)]
    return bytes(raw)


class TooSlow(Exception):
    """A file kept the frontend busy for more than SECONDS."""


def _alarm(number: int, frame: object) -> None:
    raise TooSlow


def attempt(raw: bytes, path: Path) -> str:
    """What became of a file: "graph" or the error's class; any other exception is a finding and gets out."""
    path.write_bytes(raw)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        graph = load_onnx(path)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        verify(graph)
        return "graph"
    except AcclimateError as error:
        str(error)
        return type(error).__name__
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def fuzz(count: int, seed: int, first: int = 0, seconds: float = 0) -> tuple[Counter[str], list[str]]:
    """Outcomes by name, and the findings, of `count` mutants; or of as many as `seconds` allow."""
    outcomes: Counter[str] = Counter()
    findings = []
    models = seeds()
    signal.signal(signal.SIGALRM, _alarm)
    with tempfile.TemporaryDirectory() as folder:
        end = time.monotonic() + seconds
        for index in itertools.count(first) if seconds else range(first, first + count):
            if seconds and time.monotonic() > end:
                break
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    outcomes[attempt(mutant(models, seed, index), Path(folder) / "m.onnx")] += 1
            except Exception as error:  # what must not be
                outcomes["finding"] += 1
                place = traceback.extract_tb(error.__traceback__)[-1]
                findings.append(
                    f"mutant {index}: {type(error).__name__}: {error} at {Path(place.filename).name}:{place.lineno}"
                )
    return outcomes, findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0, help="for so long, instead of --count")
    parser.add_argument("--only", type=int, default=-1)
    args = parser.parse_args()
    if args.only >= 0:
        args.count = 1
    outcomes, findings = fuzz(args.count, args.seed, max(args.only, 0), args.seconds)
    print(json.dumps(outcomes))
    print("\n".join(findings), file=sys.stderr)
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
