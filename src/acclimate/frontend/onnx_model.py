"""What an ONNX file holds: its nodes, its tensors, which of them are learned, and everything constant folded.

What depends on no input is computed once, when the file is read.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from typing import Any

import numpy as np

from ..errors import Unsupported
from ..ir import Dim
from . import common as c
from .common import Ref, Untaken
from .onnx_quantized import read_weights

OLDEST_OPSET = 7
MOST_ELEMENTS = 1 << 26  # of a constant that a file does not hold, but asks to be made
_ORIGINAL = "pkg.torch.onnx.original_node_name"
_KIND = "pkg.torch.export.graph_signature.InputSpec.kind"

#: element types of integers, which a float holds exactly up to 2^24
WHOLE = (2, 3, 4, 5, 6, 7, 12, 13)


def _metadata(proto: Any) -> dict[str, str]:
    return {p.key: p.value for p in getattr(proto, "metadata_props", ())}


class Node:
    """A NodeProto with its inputs as things."""

    def __init__(self, proto: Any, opset: int) -> None:
        from onnx import helper

        self.op, self.opset, self.domain = proto.op_type, opset, proto.domain
        self.inputs, self.outputs = list(proto.input), list(proto.output)
        self.attrs = {a.name: helper.get_attribute_value(a) for a in proto.attribute}
        self.proto, self.name, self.metadata = proto, proto.name, _metadata(proto)
        self.things: list[Any] = []
        self.wanted = 1  # how many outputs are read

    @property
    def x(self) -> Any:
        return self.things[0]

    def get(self, i: int) -> Any:
        """Input i, or None."""
        return self.things[i] if i < len(self.things) else None

    def attr(self, name: str, default: Any = None) -> Any:
        value = self.attrs.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def ints(self, name: str, i: int) -> Any:
        """Integers that newer opsets give as input i and older ones as an attribute; None where there are none."""
        if name in self.attrs:
            value = self.attrs[name]
            return list(value) if isinstance(value, (list, tuple)) else [value]
        value = self.get(i)
        if isinstance(value, Ref):
            raise Untaken(f"{name} depends on the data")
        return (
            None
            if value is None
            else [v if isinstance(v, Dim) else int(v) for v in np.asarray(value).reshape(-1)]
        )

    @property
    def where(self) -> str:
        line = c.user_line(self.metadata.get("pkg.torch.onnx.stack_trace", ""))
        return line or f"node {self.name or self.outputs[0]}"

    @property
    def scope(self) -> str:
        """The layer that the node belongs to, by the names that torch's exporters leave."""
        scopes = re.findall(r"'([^']*)'", self.metadata.get("pkg.torch.onnx.name_scopes", ""))
        if scopes:
            return scopes[-2] if len(scopes) > 1 else ""
        path: list[str] = []
        for part in self.name.strip("/").split("/")[:-1] if self.name.startswith("/") else []:
            path = [*path[:-1], part] if path and part.startswith(path[-1] + ".") else [*path, part]
        return ".".join(path)


class Model:
    """An ONNX graph with its tensors, which of them are learned, and everything constant folded.

    fixed: take any number of inputs and outputs, all of fixed shapes, and know no batch.
    """

    def __init__(self, proto: Any, source: str, fixed: bool = False) -> None:
        from onnx import numpy_helper

        self.source = source
        versions = {o.domain: o.version for o in proto.opset_import}
        self.opset = versions.get("", versions.get("ai.onnx", 0))
        if self.opset < OLDEST_OPSET:
            raise Unsupported(
                "the file's operator set is too old",
                where=source,
                number=f"opset {self.opset}",
                action=f"convert it with onnx.version_converter to {OLDEST_OPSET} or later",
            )
        graph = proto.graph
        if graph.sparse_initializer:
            raise Unsupported("the file holds sparse tensors", where=source, action="export dense ones")
        self.tensors = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        self.nodes = [Node(n, self.opset) for n in graph.node]
        self.quants = read_weights(self.nodes, self.tensors, source)
        self.uses = Counter(name for n in self.nodes for name in n.inputs)
        self.whole: set[str] = set()  # inputs of integers
        self.inputs = self._inputs(graph, fixed)
        first = 1 if fixed else self.inputs[0][1][0]
        self.baked = first if isinstance(first, int) else None
        self.outputs = [o.name for o in graph.output]
        if len(self.outputs) != 1 and not fixed:
            raise Unsupported(
                "the model returns several tensors",
                where=source,
                number=f"outputs {', '.join(self.outputs)}",
                action="keep only the one that the loss is computed from (onnx.utils.extract_model)",
            )
        info = {v.name: _metadata(v) for v in graph.value_info}
        self.parameters: dict[str, np.ndarray] = {}
        self.aliases: dict[str, str] = {}
        self._recover(info)
        self._fold()
        self._sort(info)

    def _inputs(self, graph: Any, fixed: bool) -> list[tuple[str, list[Any]]]:
        """The one input (or all of them) and their shapes: ints, and a string for what is dynamic."""
        given = [i for i in graph.input if i.name not in self.tensors]
        if len(given) != 1 and not (fixed and given):
            raise Unsupported(
                f"the model takes {'several inputs' if given else 'no input'}",
                where=self.source,
                number=", ".join(i.name for i in given),
                action="join them to one and split it inside the model",
            )
        return [(i.name, self._shape(i, fixed)) for i in given]

    def _shape(self, given: Any, fixed: bool) -> list[Any]:
        tensor = given.type.tensor_type
        if tensor.elem_type not in (1, 10, 11, 16, *WHOLE):
            raise Unsupported(
                "the model takes neither floats nor integers",
                where=given.name,
                number=f"element type {tensor.elem_type}",
                action="give it float32",
            )
        self.whole.update([given.name] if tensor.elem_type in WHOLE else [])
        shape = [d.dim_value if d.dim_value > 0 else d.dim_param or "?" for d in tensor.shape.dim]
        if any(isinstance(s, str) for s in shape[not fixed :]) or not (shape or fixed):
            raise Unsupported(
                "a dimension other than the batch is not fixed",
                where=given.name,
                number=str(shape),
                action="fix it: onnx.tools.update_model_dims, or export with only axis 0 dynamic",
            )
        return shape

    # -- names that an exporter's optimiser lost ---------------------------------------------------------------------
    def _recover(self, info: dict[str, dict[str, str]]) -> None:
        """Give weights that were transposed, merged or dropped by an exporter their own names and places again."""
        known = set(self.tensors)
        names = {meta[_ORIGINAL]: name for name, meta in info.items() if _ORIGINAL in meta}
        for node in self.nodes:
            for i, original in _arguments(node).items():
                name = names.get(original) or _dotted(original, node.scope)
                have = node.inputs[i] if i < len(node.inputs) else ""
                if node.op == "Add":
                    i = next((j for j, n in enumerate(node.inputs) if n in self.tensors), -1)
                    have = node.inputs[i] if i >= 0 else ""
                if have == name or (have and have not in self.tensors) or i < 0:
                    continue
                if not have:  # a bias of zeros, which was dropped
                    weight = self.tensors.get(node.inputs[1])
                    if weight is not None and name not in self.tensors:
                        self.tensors[name] = np.zeros(
                            weight.shape[0 if node.attr("transB", 1) else -1], np.float32
                        )
                        node.inputs += [name]
                elif node.op == "MatMul":
                    self._transposed(node, i, name)
                elif (
                    np.ptp(self.tensors[have]) == 0 and name not in self.tensors
                ):  # equal by chance, at the start
                    self.tensors[name] = self.tensors[have]
                    node.inputs[i] = name
                elif name not in self.tensors:
                    self.aliases[name] = have
        for node in self.nodes:
            if node.op == "MatMul" and node.inputs[1].startswith("onnx::") and node.inputs[1] in self.tensors:
                self._transposed(node, 1, self._by_bias(node) or f"{node.scope}.weight")
        self.recovered = set(self.tensors) - known

    def _by_bias(self, node: Node) -> str:
        """The name of a matrix whose product is only read by the addition of a named bias."""
        adds = [n for n in self.nodes if n.op == "Add" and node.outputs[0] in n.inputs]
        other = [n for a in adds for n in a.inputs if n != node.outputs[0]]
        return re.sub(r"bias$", "weight", other[0]) if len(other) == 1 and other[0].endswith("bias") else ""

    def _transposed(self, node: Node, i: int, name: str) -> None:
        """Read a matrix (K, O) as the transpose of the parameter (O, K) called `name`."""
        stored = self.tensors[node.inputs[i]]
        if name in self.tensors and self.tensors[name].shape == stored.T.shape:
            if not np.array_equal(self.tensors[name], stored.T):
                return
        elif name in self.tensors or name.startswith("."):
            return
        from onnx import helper

        self.tensors[name] = np.ascontiguousarray(stored.T)
        turned = f"{node.outputs[0]}.{i}.turned"
        turn = Node(helper.make_node("Transpose", [name], [turned], perm=[1, 0]), self.opset)
        self.nodes.insert(self.nodes.index(node), turn)
        node.inputs[i] = turned

    # -- what is constant, what is learned -----------------------------------------------------------------------------
    def _fold(self) -> None:
        """Compute what depends on no input and on no tensor that could be learned."""
        self.constants: dict[str, np.ndarray] = {}
        fixed = {n for n, t in self.tensors.items() if t.dtype.kind not in "fV" or t.ndim == 0}
        rest = []
        for node in self.nodes:
            if node.op == "Constant":
                self.constants[node.outputs[0]] = _constant(node)
            elif (
                node.op != "ConstantOfShape"
                and node.op not in RANDOM
                and node.inputs
                and not node.domain
                and all(not n or n in self.constants or n in fixed for n in node.inputs)
                and not has_graph(node)
            ):
                values = {n: self.constants.get(n, self.tensors.get(n)) for n in node.inputs if n}
                try:
                    self.constants.update(zip(node.outputs, evaluated(node, values), strict=False))
                except Exception:  # whatever it is: the walk meets it again, and lists it with all the others
                    rest.append(node)
            else:
                rest.append(node)
        self.nodes = rest

    def _sort(self, info: dict[str, dict[str, str]]) -> None:
        """Which tensors are parameters: floats, but not statistics, masks, factors, or what the file says is not."""
        told = {name: meta[_KIND] for name, meta in info.items() if _KIND in meta}
        used = [(n, i, name) for n in self.nodes for i, name in enumerate(n.inputs) if name in self.tensors]
        weights = {name for n, i, name in used if i in _WEIGHTS.get(n.op, ())}
        statistics = {name for n, i, name in used if n.op == "BatchNormalization" and i > 2}
        fixed = {name for n, i, name in used if i in _FIXED.get(n.op, ())}
        ahead = {
            name for name, _ in self.inputs
        }  # the input and what only constants were applied to: pixel means and scales
        for n in self.nodes:
            if n.op in ("Sub", "Div", "Mul", "Cast", "Identity", "Transpose") and any(
                i in ahead for i in n.inputs
            ):
                ahead.update(n.outputs)
                if n.op in ("Sub", "Div"):
                    fixed.update(i for i in n.inputs if i in self.tensors)
        for name, array in self.tensors.items():
            if array.dtype.kind not in "fV" or name not in {u[2] for u in used} or name in statistics:
                learned = False
            elif name in told:
                learned = told[name] == "PARAMETER"
            elif name in weights or name in self.recovered:
                learned = True
            else:
                mask = not np.isfinite(array).all() or array.size and array.min() <= -1e4
                factor = array.size <= 1 and re.match(r"(val_|onnx::|_|/|Constant|scalar)", name)
                learned = not (told or mask or factor or name in fixed or array.ndim == 0)
            if learned:
                self.parameters[name] = _floats(array)
            else:
                self.constants[name] = c.constant(_floats(array) if array.dtype.kind in "fV" else array, name)


def _floats(array: np.ndarray) -> np.ndarray:
    """float32 of any float type, bfloat16 too."""
    return np.asarray(array).astype(np.float32)


def has_graph(node: Node) -> bool:
    return any(a.type in (5, 10) for a in node.proto.attribute)


def _arguments(node: Node) -> dict[int, str]:
    """Which input of a node was which parameter of the torch program, by what torch left in the metadata."""
    called = node.metadata.get("pkg.torch.onnx.fx_node", "")
    found = re.search(r"target=torch\.ops\.aten\.(\w+)\.\w+\]\(args = \((.*)\), kwargs", called)
    if not found:
        return {}
    depth, args = 0, [""]
    for char in found[2]:
        depth += (char in "[(") - (char in "])")
        args = [*args, ""] if char == "," and not depth else [*args[:-1], args[-1] + char]
    where = {
        ("linear", "Gemm"): {1: 1, 2: 2},
        ("linear", "MatMul"): {1: 1},
        ("linear", "Add"): {1: 2},
        ("layer_norm", "LayerNormalization"): {1: 2, 2: 3},
    }.get((found[1], node.op), {})
    if node.op == "Conv" and found[1].startswith("conv"):
        where = {1: 1, 2: 2}
    args = [a.strip().lstrip("%") for a in args]
    return {i: args[j] for i, j in where.items() if j < len(args) and args[j].startswith("p_")}


def _dotted(original: str, scope: str) -> str:
    """A parameter's name from its flat one, `p_blocks_0_norm_weight`, and the layer that uses it."""
    prefix = "p_" + scope.replace(".", "_") + "_"
    rest = original.removeprefix(prefix if scope else "p_")
    if not re.match(r"(in|q|k|v)_proj_(weight|bias)$", rest):
        rest = re.sub(r"_(weight|bias)$", r".\1", rest)
    return f"{scope}.{rest}" if scope and original.startswith(prefix) else rest


def _constant(node: Node) -> np.ndarray:
    from onnx import numpy_helper

    ((name, value),) = node.attrs.items()
    return (
        numpy_helper.to_array(value)
        if name == "value"
        else np.array(value, {"f": np.float32, "i": np.int64}.get(name.removeprefix("value_")[:1]))
    )


def _made(op: str, values: list[np.ndarray]) -> float:
    """How many elements an operator makes of a few numbers that say how many."""
    if op == "Range" and len(values) == 3:
        start, limit, delta = (float(v.reshape(-1)[0]) for v in values)
        return abs((limit - start) / delta) if delta else 0
    if op in ("Expand", "Tile") and len(values) == 2:
        return float(np.prod(np.abs(values[1].astype(np.float64)))) * (values[0].size if op == "Tile" else 1)
    if op == "Pad" and len(values) > 1:
        return float(np.prod(np.abs(values[1].astype(np.float64)) + 1)) * values[0].size
    return 0


def bounded(elements: float) -> None:
    if elements > MOST_ELEMENTS:
        raise Untaken(
            f"it makes a constant of {elements:.0f} elements, and at most {MOST_ELEMENTS} are taken"
        )


def evaluated(node: Node, values: dict[str, Any]) -> list[Any]:
    """The outputs of a node on constants, by ONNX's own reference."""
    from onnx import TypeProto, helper
    from onnx.reference import ReferenceEvaluator

    bounded(_made(node.op, [np.asarray(v) for v in values.values()]))
    graph = helper.make_graph(
        [node.proto],
        "constant",
        [helper.make_value_info(n, TypeProto()) for n in values],
        [helper.make_value_info(o, TypeProto()) for o in node.outputs if o],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", node.opset)])
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        found = ReferenceEvaluator(model).run(None, {k: np.asarray(v) for k, v in values.items()})
    results = iter(found)
    return [np.asarray(next(results)) if o else None for o in node.outputs]


RANDOM = {
    "RandomNormal",
    "RandomUniform",
    "RandomNormalLike",
    "RandomUniformLike",
    "Bernoulli",
    "Multinomial",
}
#: where an operator takes what can be learned, and where it takes what cannot
_WEIGHTS = {
    "Conv": (1, 2),
    "Gemm": (0, 1, 2),
    "MatMul": (0, 1),
    "Einsum": (0, 1),
    "PRelu": (1,),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), (1, 2, 3)),
    **dict.fromkeys(
        ("BatchNormalization", "LayerNormalization", "InstanceNormalization", "GroupNormalization"), (1, 2)
    ),
}
_FIXED = {
    "Pow": (1,),
    "Pad": (2,),
    "Dropout": (1,),
    "Upsample": (1,),
    **dict.fromkeys(("Clip", "Where", "Resize", "QuantizeLinear", "DequantizeLinear"), (1, 2)),
}
