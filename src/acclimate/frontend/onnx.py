"""ONNX files.

Each operator is taken by one small function of `_TABLE`, `(b, n)`: `n.x` is the first input, `n.get(i)` any
other, `n.attr(name, default)` an attribute. What depends on no input is computed once, when the file is read;
tensors of sizes that hold the batch are numpy object arrays of `Size`s.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import numpy as np

from ..errors import AcclimateError, BadInput, Unsupported, missing_extra
from ..ir import Dim, Graph
from . import common as c
from .common import LOST, Builder, Ref, Retry, Untaken

OLDEST_OPSET = 7
MOST_ELEMENTS = 1 << 26  # of a constant that a file does not hold, but asks to be made
_ORIGINAL = "pkg.torch.onnx.original_node_name"
_KIND = "pkg.torch.export.graph_signature.InputSpec.kind"


def load_onnx(path: str | PathLike[str]) -> Graph:
    """The Graph of an ONNX file, for batches of any size, also where the file was exported for one.

    Raises BadInput for a file that is no ONNX model or whose external data is missing, Unsupported with all nodes
    that cannot be taken.
    """
    file = c.check_file(path, ".onnx")
    proto = _read(file)
    try:
        model = _Model(proto, file.name)
    except AcclimateError:
        raise
    except (
        Exception
    ) as error:  # tensors that are not what the file says of them: onnx and numpy raise what they like
        raise BadInput(
            "this ONNX file is damaged",
            where=str(file),
            number=c.first_line(error),
            action="export the model again",
        ) from error
    try:
        return c.attempts(lambda b: _Walk(b, model).run(), model.baked)
    except Unsupported:
        if model.baked is not None:
            raise
        try:  # a dynamic batch dimension over shapes that were traced with a batch of one
            return c.attempts(lambda b: _Walk(b, model).run(), 1)
        except Unsupported:
            pass
        raise


def _read(file: Any) -> Any:
    """The checked ModelProto with all tensors loaded and local functions inlined."""
    try:
        import onnx
        from onnx import inliner
    except ImportError as error:
        raise missing_extra("onnx", "onnx") from error
    try:
        proto = onnx.load(str(file), load_external_data=False)
        for output in proto.graph.output:
            output.type.tensor_type.shape.SetInParent()  # many exporters leave it out; the checker wants it there
        if not _external(proto):
            onnx.checker.check_model(proto)
    except Exception as error:
        raise BadInput(
            "this is no valid ONNX file",
            where=str(file),
            number=c.first_line(error),
            action="export the model again",
        ) from error
    try:
        onnx.load_external_data_for_model(proto, str(file.parent))
    except Exception as error:
        names = ", ".join(sorted(_external(proto)))
        raise BadInput(
            "the file that holds the model's weights cannot be read",
            where=names,
            number=c.first_line(error),
            action=f"copy {names} next to {file.name}: the export wrote both",
        ) from error
    return inliner.inline_local_functions(proto) if proto.functions else proto


def _external(proto: Any) -> set[str]:
    """The files that a model's tensors lie in besides its own."""
    tensors = (t for t in proto.graph.initializer if t.data_location == 1)
    return {e.value for t in tensors for e in t.external_data if e.key == "location"}


# -- what a file holds -----------------------------------------------------------------------------------------------


def _metadata(proto: Any) -> dict[str, str]:
    return {p.key: p.value for p in getattr(proto, "metadata_props", ())}


class _Node:
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


class _Model:
    """An ONNX graph with its tensors, which of them are learned, and everything constant folded."""

    def __init__(self, proto: Any, source: str) -> None:
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
        self.nodes = [_Node(n, self.opset) for n in graph.node]
        self.uses = Counter(name for n in self.nodes for name in n.inputs)
        self.input, self.shape = self._input(graph)
        first = self.shape[0]
        self.baked = first if isinstance(first, int) else None
        outputs = [o.name for o in graph.output]
        if len(outputs) != 1:
            raise Unsupported(
                "the model returns several tensors",
                where=source,
                number=f"outputs {', '.join(outputs)}",
                action="keep only the one that the loss is computed from (onnx.utils.extract_model)",
            )
        self.output = outputs[0]
        info = {v.name: _metadata(v) for v in graph.value_info}
        self.parameters: dict[str, np.ndarray] = {}
        self.aliases: dict[str, str] = {}
        self._recover(info)
        self._fold()
        self._sort(info)

    def _input(self, graph: Any) -> tuple[str, list[Any]]:
        """The one input and its shape: ints, and a string for what is dynamic."""
        given = [i for i in graph.input if i.name not in self.tensors]
        if len(given) != 1:
            raise Unsupported(
                f"the model takes {'several inputs' if given else 'no input'}",
                where=self.source,
                number=", ".join(i.name for i in given),
                action="join them to one and split it inside the model",
            )
        tensor = given[0].type.tensor_type
        if tensor.elem_type not in (1, 10, 11, 16):
            raise Unsupported(
                "the model takes integers",
                where=given[0].name,
                action="do the embedding outside of the model and give it floats",
            )
        shape = [d.dim_value if d.dim_value > 0 else d.dim_param or "?" for d in tensor.shape.dim]
        if not shape or any(isinstance(s, str) for s in shape[1:]):
            raise Unsupported(
                "a dimension other than the batch is not fixed",
                where=given[0].name,
                number=str(shape),
                action="fix it: onnx.tools.update_model_dims, or export with only axis 0 dynamic",
            )
        return given[0].name, shape

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

    def _by_bias(self, node: _Node) -> str:
        """The name of a matrix whose product is only read by the addition of a named bias."""
        adds = [n for n in self.nodes if n.op == "Add" and node.outputs[0] in n.inputs]
        other = [n for a in adds for n in a.inputs if n != node.outputs[0]]
        return re.sub(r"bias$", "weight", other[0]) if len(other) == 1 and other[0].endswith("bias") else ""

    def _transposed(self, node: _Node, i: int, name: str) -> None:
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
        turn = _Node(helper.make_node("Transpose", [name], [turned], perm=[1, 0]), self.opset)
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
                and node.op not in _RANDOM
                and node.inputs
                and not node.domain
                and all(not n or n in self.constants or n in fixed for n in node.inputs)
                and not _has_graph(node)
            ):
                values = {n: self.constants.get(n, self.tensors.get(n)) for n in node.inputs if n}
                try:
                    self.constants.update(zip(node.outputs, _evaluated(node, values), strict=False))
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
        ahead = {self.input}  # the input and what only constants were applied to: pixel means and scales
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


def _has_graph(node: _Node) -> bool:
    return any(a.type in (5, 10) for a in node.proto.attribute)


def _arguments(node: _Node) -> dict[int, str]:
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


def _constant(node: _Node) -> np.ndarray:
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


def _bounded(elements: float) -> None:
    if elements > MOST_ELEMENTS:
        raise Untaken(
            f"it makes a constant of {elements:.0f} elements, and at most {MOST_ELEMENTS} are taken"
        )


def _evaluated(node: _Node, values: dict[str, Any]) -> list[Any]:
    """The outputs of a node on constants, by ONNX's own reference."""
    from onnx import TypeProto, helper
    from onnx.reference import ReferenceEvaluator

    _bounded(_made(node.op, [np.asarray(v) for v in values.values()]))
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


_RANDOM = {
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
    **dict.fromkeys(
        ("BatchNormalization", "LayerNormalization", "InstanceNormalization", "GroupNormalization"), (1, 2)
    ),
}
_FIXED = {
    "Pow": (1,),
    "Pad": (2,),
    "Dropout": (1,),
    "Upsample": (1,),
    **dict.fromkeys(("Clip", "Where", "Resize"), (1, 2)),
}


# -- the walk over a file ----------------------------------------------------------------------------------------------


class _Walk:
    """One pass over the nodes of a model."""

    def __init__(self, b: Builder, model: _Model) -> None:
        self.b, self.model = b, model
        self.env: dict[str, Any] = dict(model.constants)

    def run(self) -> Graph:
        for name, array in self.model.parameters.items():
            self.env[name] = self.b.parameter(name, array)
        self.env[self.model.input] = self.b.input(self.model.shape)
        for node in self.model.nodes:
            results = self._call(node)
            for name, value in zip(node.outputs, results, strict=False):
                self.env[name] = value
                if self.model.uses[name] > 1 and isinstance(value, Ref):
                    self.b.shared.add(value)
        self.b.where = ""
        batch = self.model.baked or 1
        return self.b.finish(self.env.get(self.model.output), batch, self.model.aliases, self.model.source)

    def _call(self, node: _Node) -> Sequence[Any]:
        """The node's results; LOST where it could not be taken."""
        b, lost = self.b, [LOST] * len(node.outputs)
        b.where, b.stem = node.where, node.scope
        taken = node.op in _TABLE and node.domain in ("", "ai.onnx")
        things = [self.env.get(n, LOST) if n else None for n in node.inputs]
        node.things, node.wanted = (
            things,
            sum(self.model.uses[o] > 0 or o == self.model.output for o in node.outputs),
        )
        if any(t is LOST for t in things):
            if not taken:
                self._fail(node, Untaken("this operator is not known here"))
            return lost
        try:
            fixed = bool(things) and not any(isinstance(t, (Ref, c.Erf, c.Compared)) for t in things)
            sized = fixed and any(isinstance(t, np.ndarray) and t.dtype == object for t in things)
            if sized and node.op in _SIZES:
                return [_settled(_SIZES[node.op](node))]
            if (
                fixed
                and not sized
                and node.op not in _RANDOM | {"Shape", "ConstantOfShape"}
                and not _has_graph(node)
            ):
                return _evaluated(node, {n: t for n, t in zip(node.inputs, things, strict=True) if n})
            if not taken:
                raise Untaken("this operator is not known here")
            result = _TABLE[node.op](b, node)
            return result if isinstance(result, (tuple, list)) else [result]
        except Untaken as error:
            self._fail(node, error)
        except (AcclimateError, Retry):
            raise
        except Exception as error:  # of onnx's reference and numpy, which raise what they like
            self._fail(node, Untaken(f"its arguments are not understood ({c.first_line(error)})"))
        return lost

    def _fail(self, node: _Node, error: Untaken) -> None:
        self.b.fail(node.op, error, REWRITES.get(node.op, ""))


# -- arithmetic on sizes ---------------------------------------------------------------------------------------------


def _objects(values: Any) -> np.ndarray:
    """An object array, whose elements keep their type."""
    out = np.empty(np.shape(values), object)
    out[...] = values
    return out


def _settled(result: Any) -> np.ndarray:
    """A result of arithmetic on sizes: plain integers where no batch is left in it."""
    result = _objects(result)  # numpy unpacks rank 0
    return result if any(isinstance(v, Dim) for v in result.flat) else np.array(result.tolist())


def _size_slice(n: _Node) -> Any:
    starts, ends = n.ints("starts", 1), n.ints("ends", 2)
    axes, steps = n.ints("axes", 3) or range(len(starts)), n.ints("steps", 4) or [1] * len(starts)
    x = n.x
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        x = x[(slice(None),) * (axis % x.ndim) + (slice(start, end, step),)]
    return x


def _size_divide(n: _Node) -> Any:
    return np.frompyfunc(lambda p, q: p // q, 2, 1)(n.x, n.get(1))


_SIZES: dict[str, Callable[[_Node], Any]] = {
    "Add": lambda n: n.x + n.get(1),
    "Sub": lambda n: n.x - n.get(1),
    "Mul": lambda n: n.x * n.get(1),
    "Div": _size_divide,
    "Gather": lambda n: _objects(np.take(n.x, np.asarray(n.get(1)).astype(int), n.attr("axis", 0))),
    "Concat": lambda n: np.concatenate([_objects(t) for t in n.things], n.attr("axis")),
    "Unsqueeze": lambda n: np.expand_dims(n.x, tuple(n.ints("axes", 1))),
    "Squeeze": lambda n: np.squeeze(n.x, tuple(n.ints("axes", 1) or ()) or None),
    "Reshape": lambda n: n.x.reshape([int(v) for v in n.get(1)]),
    "Slice": _size_slice,
    "Cast": lambda n: n.x,
    "Identity": lambda n: n.x,
    "Equal": lambda n: np.asarray(n.x == n.get(1), bool),
    "Where": lambda n: _objects(np.where(np.asarray(n.x, bool), _objects(n.get(1)), _objects(n.get(2)))),
    "ReduceProd": lambda n: _objects(math.prod(n.x.reshape(-1).tolist())).reshape(
        [1] if n.attr("keepdims", 1) else []
    ),
}


def _shape(b: Builder, n: _Node) -> Any:
    return _settled(b.shape(n.x)[n.attr("start", 0) : n.attr("end", None)])


def _size(b: Builder, n: _Node) -> Any:
    return _settled(math.prod(b.shape(n.x)))


def _filled(b: Builder, n: _Node) -> Any:
    from onnx import numpy_helper

    value = numpy_helper.to_array(n.attrs["value"]).reshape(-1)[0] if "value" in n.attrs else np.float32(0)
    shape = [v if isinstance(v, Dim) else int(v) for v in n.x]
    sizes = [1 if isinstance(s, Dim) else s for s in shape]
    _bounded(math.prod(sizes))
    small = np.full(sizes, value)
    return c.expand(b, small, shape) if any(isinstance(s, Dim) for s in shape) else small


# -- operators ---------------------------------------------------------------------------------------------------------


def _geometry(
    b: Builder, n: _Node, kernel: Sequence[int]
) -> tuple[list[int], list[int], list[int], list[int]]:
    """stride, padding before, padding after, dilation."""
    rank = len(kernel)
    stride, dilation = n.attr("strides", [1] * rank), n.attr("dilations", [1] * rank)
    pads, auto = n.attr("pads", [0] * 2 * rank), n.attr("auto_pad", "NOTSET")
    if auto.startswith("SAME"):
        total = [
            max((-(-s // t) - 1) * t + d * (k - 1) + 1 - s, 0)
            for s, t, d, k in zip(b.shape(n.x)[2:], stride, dilation, kernel, strict=True)
        ]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        return stride, *((small, large) if auto == "SAME_UPPER" else (large, small)), dilation
    if min(pads) < 0:
        raise Untaken(f"negative padding {pads}")
    return stride, pads[:rank], pads[rank:], dilation


def _conv(b: Builder, n: _Node) -> Any:
    stride, before, after, dilation = _geometry(b, n, b.shape(n.get(1))[2:])
    return c.convolution(
        b,
        n.x,
        n.get(1),
        n.get(2),
        stride=stride,
        before=before,
        after=after,
        dilation=dilation,
        groups=n.attr("group", 1),
    )


def _gemm(b: Builder, n: _Node) -> Any:
    x, w, bias, alpha, beta = n.x, n.get(1), n.get(2), n.attr("alpha", 1.0), n.attr("beta", 1.0)
    x = c.swap(b, x, 0, 1) if n.attr("transA", 0) else x
    if bias is None or (alpha == beta == 1 and len(b.shape(bias)) == 1 and b.shape(bias)[0] != 1):
        return c.affine(b, c.linear(b, x, w, bias, tb=n.attr("transB", 0)), alpha)
    y = c.affine(b, c.linear(b, x, w, None, tb=n.attr("transB", 0)), alpha)
    return c.binary(b, "add", y, c.affine(b, bias, beta))


def _batch_norm(b: Builder, n: _Node) -> Any:
    training = bool(n.attr("training_mode", 0))
    y = c.batch_norm(
        b,
        n.x,
        n.get(1),
        n.get(2),
        n.get(3),
        n.get(4),
        training,
        1 - n.attr("momentum", 0.9),
        n.attr("epsilon", 1e-5),
    )
    return [y, *[LOST] * 4][: max(1, len(n.outputs))]


def _layer_norm(b: Builder, n: _Node) -> Any:
    shape = b.shape(n.x)
    return c.normalize(
        b, n.x, shape[n.attr("axis", -1) % len(shape) :], n.get(1), n.get(2), n.attr("epsilon", 1e-5)
    )


def _rms_norm(b: Builder, n: _Node) -> Any:
    rank = len(b.shape(n.x))
    power = c.reduce(b, "mean", c.unary(b, "square", n.x), range(n.attr("axis", -1) % rank, rank), True)
    y = c.binary(b, "mul", n.x, c.power(b, c.affine(b, power, 1.0, n.attr("epsilon", 1e-5)), -0.5))
    return c.binary(b, "mul", y, n.get(1))


def _group_norm(b: Builder, n: _Node) -> Any:
    groups, channels = n.attr("num_groups"), b.length(n.x, 1)
    gamma, beta = n.get(1), n.get(2)
    if n.opset < 21:  # one scale a group
        gamma, beta = (
            c.view(b, c.expand(b, c.view(b, v, [groups, 1]), [groups, channels // groups]), [channels])
            for v in (gamma, beta)
        )
    return c.group_norm(b, n.x, groups, gamma, beta, n.attr("epsilon", 1e-5))


def _pool(op: str) -> Callable[..., Any]:
    def rule(b: Builder, n: _Node) -> Any:
        kernel = n.attr("kernel_shape")
        stride, before, after, dilation = _geometry(b, n, kernel)
        more = (
            {"dilation": dilation}
            if op == "max_pool"
            else {"include_pad": bool(n.attr("count_include_pad", 0))}
        )
        if op == "avg_pool" and set(dilation) != {1}:
            raise Untaken("dilated average pooling")
        return [c.pool(b, op, n.x, kernel, stride, before, after, bool(n.attr("ceil_mode", 0)), **more), LOST]

    return rule


def _global(largest: bool) -> Callable[..., Any]:
    def rule(b: Builder, n: _Node) -> Any:
        axes = range(2, len(b.shape(n.x)))
        return c.largest(b, n.x, axes, True) if largest else c.reduce(b, "mean", n.x, axes, True)

    return rule


def _dropout(b: Builder, n: _Node) -> Any:
    training = c.number(n.get(2)) if n.get(2) is not None else 0
    ratio = n.attr("ratio", 0.5) if n.get(1) is None else c.number(n.get(1)) or 0.0
    return [c.dropout(b, n.x, ratio) if training else n.x, LOST]


def _number(n: _Node, i: int, name: str) -> float | None:
    """A bound that newer opsets give as input i."""
    return n.attr(name) if n.get(i) is None else c.number(n.get(i))


def _clip(b: Builder, n: _Node) -> Any:
    return c.clamp(b, n.x, _number(n, 1, "min"), _number(n, 2, "max"))


def _softmax(log: bool) -> Callable[..., Any]:
    def rule(b: Builder, n: _Node) -> Any:
        shape = b.shape(n.x)
        axis = n.attr("axis", 1 if n.opset < 13 else -1) % len(shape)
        if n.opset < 13 and axis < len(shape) - 1:  # once, all axes from this one on
            return c.view(b, c.softmax(b, c.flatten(b, n.x, axis, -1), -1, log), shape)
        return c.softmax(b, n.x, axis, log)

    return rule


def _reduce(fn: Callable[..., Any]) -> Callable[..., Any]:
    def rule(b: Builder, n: _Node) -> Any:
        axes = n.ints("axes", 1)
        if not axes and n.attr("noop_with_empty_axes", 0):
            return n.x
        return fn(b, n.x, axes, bool(n.attr("keepdims", 1)))

    return rule


def _sum_of(op: str) -> Callable[..., Any]:
    return lambda b, x, axes, keep: c.reduce(b, "sum", c.unary(b, op, x), axes, keep)


def _log_sum_exp(b: Builder, x: Any, axes: Any, keep: bool) -> Any:
    axes = axes or range(len(b.shape(x)))
    if len(axes) != 1:
        raise Untaken("ReduceLogSumExp over several axes")
    y = c.slice_axis(b, c.binary(b, "sub", x, c.softmax(b, x, axes[0], log=True)), axes[0], 0, 1)
    return y if keep else c.squeeze(b, y, axes)


def _binary(op: str) -> Callable[..., Any]:
    return lambda b, n: c.binary(b, op, n.x, n.get(1))


def _variadic(fn: Callable[..., Any]) -> Callable[..., Any]:
    def rule(b: Builder, n: _Node) -> Any:
        y = n.x
        for other in n.things[1:]:
            y = fn(b, y, other)
        return y

    return rule


def _hard_sigmoid(b: Builder, n: _Node) -> Any:
    alpha, beta = n.attr("alpha", 0.2), n.attr("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return c.unary(b, "hard_sigmoid", n.x)
    return c.clamp(b, c.affine(b, n.x, alpha, beta), 0.0, 1.0)


def _leaky_relu(b: Builder, n: _Node) -> Any:
    if n.attr("alpha", 0.01) < 0:
        raise Untaken("a leaky relu of negative slope")
    return c.unary(b, "leaky_relu", n.x, slope=n.attr("alpha", 0.01))


def _swish(b: Builder, n: _Node) -> Any:
    alpha = n.attr("alpha", 1.0)
    return c.affine(b, c.unary(b, "silu", c.affine(b, n.x, alpha)), 1 / alpha)


def _celu(b: Builder, n: _Node) -> Any:
    alpha = n.attr("alpha", 1.0)
    return c.affine(b, c.unary(b, "elu", c.affine(b, n.x, 1 / alpha), alpha=1.0), alpha)


def _prelu(b: Builder, n: _Node) -> Any:
    slope = n.get(1)
    if len(b.shape(slope)) == 1:  # ONNX aligns at the end, torch at the channels
        slope = c.view(b, slope, [*[1] * (len(b.shape(n.x)) - 1), *b.shape(slope)])
    return c.prelu(b, n.x, slope)


def _reshape(b: Builder, n: _Node) -> Any:
    target = n.ints("shape", 1)
    if not n.attr("allowzero", 0):
        target = [b.shape(n.x)[i] if not isinstance(t, Dim) and t == 0 else t for i, t in enumerate(target)]
    return c.reshape(b, n.x, target)


def _flatten(b: Builder, n: _Node) -> Any:
    axis, rank = n.attr("axis", 1), len(b.shape(n.x))
    axis += rank if axis < 0 else 0
    if axis == 0 or axis == rank:
        y = c.flatten(b, n.x, 0, -1)
        return c.unsqueeze(b, y, [axis and 1])
    return c.flatten(b, c.flatten(b, n.x, axis, -1), 0, axis - 1)


def _slice(b: Builder, n: _Node) -> Any:
    starts, ends, x = n.ints("starts", 1), n.ints("ends", 2), n.x
    axes, steps = n.ints("axes", 3) or range(len(starts)), n.ints("steps", 4) or [1] * len(starts)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step < 0:
            x = c.take(
                b,
                x,
                axis,
                np.arange(b.length(x, axis))[
                    start if start < 2**31 else None : end if end > -(2**31) else None : step
                ],
            )
        else:
            x = c.slice_axis(b, x, axis, start, end, step)
    return x


def _split(b: Builder, n: _Node) -> Any:
    axis, parts = n.attr("axis", 0), n.ints("split", 1)
    size = b.length(n.x, axis)
    if parts is None:
        each = -(-size // n.attr("num_outputs", len(n.outputs)))
        parts = [min(each, size - i) for i in range(0, size, each)]
    return c.split(b, n.x, axis, parts)


def _gather(b: Builder, n: _Node) -> Any:
    axis, index = n.attr("axis", 0), n.get(1)
    if isinstance(index, Ref):
        raise Untaken("an index that depends on the data")
    if np.ndim(index) == 0:
        return c.select(b, n.x, axis, int(index))
    return c.take(b, n.x, axis, index)


def _gather_nd(b: Builder, n: _Node) -> Any:
    if isinstance(n.get(1), Ref) or n.attr("batch_dims", 0):
        raise Untaken("an index that depends on the data, or on the sample")
    return c.take_many(b, n.x, n.get(1))


def _expand(b: Builder, n: _Node) -> Any:
    target, shape = n.ints("shape", 1), b.shape(n.x)
    rank = max(len(target), len(shape))
    target, shape = [1] * (rank - len(target)) + target, (1,) * (rank - len(shape)) + shape
    return c.expand(
        b, n.x, [s if not isinstance(t, Dim) and t == 1 else t for s, t in zip(shape, target, strict=True)]
    )


def _pad(b: Builder, n: _Node) -> Any:
    pads, mode, rank = n.ints("pads", 1), n.attr("mode", "constant"), len(b.shape(n.x))
    axes = [a % rank for a in n.ints("", 3) or range(rank)]
    before, after = [0] * rank, [0] * rank
    for i, axis in enumerate(axes):
        before[axis], after[axis] = pads[i], pads[i + len(axes)]
    if mode == "constant":
        return c.pad(b, n.x, before, after, _number(n, 2, "value") or 0.0)
    x = n.x
    for axis in range(rank):
        x = c.pad_by_copies(b, x, axis, before[axis], after[axis], mode) if before[axis] or after[axis] else x
    return x


def _resize(b: Builder, n: _Node) -> Any:
    """Interpolation, which treats each axis by itself: one constant matrix an axis, what it makes of the identity."""
    from onnx import helper

    shape, x = b.shape(n.x), n.x
    scales = n.get(1) if n.op == "Upsample" else n.get(2)
    sizes = n.get(3)
    goal = (
        list(sizes)
        if sizes is not None
        else [math.floor(s * f) for s, f in zip(shape[2:], scales[2:], strict=True)]
    )
    goal = [int(g) for g in goal[-len(shape[2:]) :]]
    kept = ("mode", "coordinate_transformation_mode", "nearest_mode", "cubic_coeff_a", "exclude_outside")
    attrs = {k: v for k, v in n.attrs.items() if k in kept}
    for i, axis in enumerate(range(2, len(shape))):
        size = b.length(x, axis)
        if size == goal[i]:
            continue
        proto = helper.make_node("Resize", ["x", "", "scales"], ["y"], **attrs)
        factor = np.float32(goal[i] / size if scales is None or len(scales) == 0 else scales[axis])
        matrix = _evaluated(
            _Node(proto, max(n.opset, 13)),
            {"x": np.eye(size, dtype=np.float32), "scales": np.array([1, factor], np.float32)},
        )[0].T
        if np.array_equal(matrix, np.repeat(np.eye(size), goal[i] // size, 0)):
            x = c.upsample_nearest(b, x, [goal[i] if a == axis else s for a, s in enumerate(b.shape(x))][2:])
        else:
            x = c.along(b, x, axis, matrix)
    return x


def _depth_to_space(b: Builder, n: _Node) -> Any:
    r = n.attr("blocksize")
    if n.attr("mode", "DCR") == "CRD":
        return c.pixel_shuffle(b, n.x, r)
    batch, channels, h, w = b.shape(n.x)
    y = c.transpose(b, c.view(b, n.x, [batch, r, r, channels // (r * r), h, w]), [0, 3, 4, 1, 5, 2])
    return c.view(b, y, [batch, channels // (r * r), h * r, w * r])


def _attention(b: Builder, n: _Node) -> Any:
    q, k, v = n.things[:3]
    if len(b.shape(q)) != 4 or len(n.things) > 4 or b.shape(q)[1] != b.shape(k)[1]:
        raise Untaken("attention on three axes, with a cache, or with fewer heads for keys")
    return c.attention(b, q, k, v, n.get(3), bool(n.attr("is_causal", 0)), 0.0, n.attr("scale"))


def _cast(b: Builder, n: _Node) -> Any:
    if isinstance(n.x, Ref) and n.attr("to") not in (1, 10, 11, 16):
        raise Untaken("a conversion of the data to integers")
    return n.x


def _lp_normalization(b: Builder, n: _Node) -> Any:
    if n.attr("p", 2) != 2:
        raise Untaken("normalisation by another norm than the second")
    return c.binary(b, "div", n.x, c.unary(b, "sqrt", _sum_of("square")(b, n.x, [n.attr("axis", -1)], True)))


def _cumsum(b: Builder, n: _Node) -> Any:
    axis = int(c.number(n.get(1)) or 0)
    if n.attr("exclusive", 0) or n.attr("reverse", 0):
        raise Untaken("a running sum that is reversed or exclusive")
    size = b.length(n.x, axis)
    return c.along(b, n.x, axis, np.tril(np.ones((size, size))))


def _trilu(b: Builder, n: _Node) -> Any:
    k, ones = int(c.number(n.get(1)) or 0), np.ones((b.length(n.x, -2), b.length(n.x, -1)), np.float32)
    return c.binary(b, "mul", n.x, np.triu(ones, k) if n.attr("upper", 1) else np.tril(ones, k))


def _simple(op: str) -> Callable[..., Any]:
    return lambda b, n: c.unary(b, op, n.x)


def _affine(scale: float = 1.0, shift: float = 0.0) -> Callable[..., Any]:
    return lambda b, n: c.affine(b, n.x, scale, shift)


_TABLE: dict[str, Callable[[Builder, _Node], Any]] = {
    # layers
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": lambda b, n: c.matmul(b, n.x, n.get(1)),
    "Attention": _attention,
    "Einsum": lambda b, n: c.einsum(b, n.attr("equation"), n.things),
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": lambda b, n: c.group_norm(
        b, n.x, b.length(n.x, 1), n.get(1), n.get(2), n.attr("epsilon", 1e-5)
    ),
    "RMSNormalization": _rms_norm,
    "LpNormalization": _lp_normalization,
    "Dropout": _dropout,
    "MaxPool": _pool("max_pool"),
    "AveragePool": _pool("avg_pool"),
    "GlobalAveragePool": _global(False),
    "GlobalMaxPool": _global(True),
    "Resize": _resize,
    "Upsample": _resize,
    "DepthToSpace": _depth_to_space,
    # activations
    "Relu": _simple("relu"),
    "Sigmoid": _simple("sigmoid"),
    "Tanh": _simple("tanh"),
    "Exp": _simple("exp"),
    "Log": _simple("log"),
    "Sqrt": _simple("sqrt"),
    "Abs": _simple("abs"),
    "Reciprocal": _simple("reciprocal"),
    "HardSwish": _simple("hard_swish"),
    "HardSigmoid": _hard_sigmoid,
    "LeakyRelu": _leaky_relu,
    "Swish": _swish,
    "Gelu": lambda b, n: c.unary(b, "gelu", n.x, tanh=int(n.attr("approximate", "none") == "tanh")),
    "Erf": lambda b, n: c.Erf(n.x),
    "Clip": _clip,
    "PRelu": _prelu,
    "Celu": _celu,
    "Elu": lambda b, n: c.unary(b, "elu", n.x, alpha=n.attr("alpha", 1.0)),
    "Selu": lambda b, n: c.affine(
        b, c.unary(b, "elu", n.x, alpha=n.attr("alpha", 1.67326319)), n.attr("gamma", 1.05070102)
    ),
    "Softplus": lambda b, n: c.softplus(b, n.x),
    "Softsign": lambda b, n: c.binary(b, "div", n.x, c.affine(b, c.unary(b, "abs", n.x), 1.0, 1.0)),
    "Mish": lambda b, n: c.binary(b, "mul", n.x, c.unary(b, "tanh", c.softplus(b, n.x))),
    "Softmax": _softmax(False),
    "LogSoftmax": _softmax(True),
    # arithmetic
    "Add": _binary("add"),
    "Sub": _binary("sub"),
    "Mul": _binary("mul"),
    "Div": _binary("div"),
    "Neg": _affine(-1.0),
    "Pow": lambda b, n: c.power(b, n.x, n.get(1)),
    **dict.fromkeys(("Greater", "GreaterOrEqual"), lambda b, n: c.compare(b, n.x, n.get(1), True)),
    **dict.fromkeys(("Less", "LessOrEqual"), lambda b, n: c.compare(b, n.x, n.get(1), False)),
    "Sum": _variadic(lambda b, x, y: c.binary(b, "add", x, y)),
    "Mean": lambda b, n: c.affine(
        b, _variadic(lambda b, x, y: c.binary(b, "add", x, y))(b, n), 1 / len(n.things)
    ),
    "Max": _variadic(c.larger),
    "Min": _variadic(lambda b, x, y: c.larger(b, x, y, -1.0)),
    "ReduceMean": _reduce(lambda b, x, axes, keep: c.reduce(b, "mean", x, axes, keep)),
    "ReduceSum": _reduce(lambda b, x, axes, keep: c.reduce(b, "sum", x, axes, keep)),
    "ReduceMax": _reduce(c.largest),
    "ReduceMin": _reduce(
        lambda b, x, axes, keep: c.affine(b, c.largest(b, c.affine(b, x, -1.0), axes, keep), -1.0)
    ),
    "ReduceL1": _reduce(_sum_of("abs")),
    "ReduceSumSquare": _reduce(_sum_of("square")),
    "ReduceL2": _reduce(lambda b, x, axes, keep: c.unary(b, "sqrt", _sum_of("square")(b, x, axes, keep))),
    "ReduceLogSumExp": _reduce(_log_sum_exp),
    "CumSum": _cumsum,
    "Trilu": _trilu,
    "IsNaN": lambda b, n: np.zeros((), np.bool_),
    "Where": lambda b, n: c.where(b, n.x, n.get(1), n.get(2)),
    # shapes
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Slice": _slice,
    "Split": _split,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Expand": _expand,
    "Pad": _pad,
    "Shape": _shape,
    "Size": _size,
    "ConstantOfShape": _filled,
    "Transpose": lambda b, n: c.transpose(b, n.x, n.attr("perm", range(len(b.shape(n.x)))[::-1])),
    "Squeeze": lambda b, n: c.squeeze(b, n.x, n.ints("axes", 1)),
    "Unsqueeze": lambda b, n: c.unsqueeze(b, n.x, n.ints("axes", 1)),
    "Concat": lambda b, n: c.concat(b, n.things, n.attr("axis")),
    "Tile": lambda b, n: c.repeat(b, n.x, n.ints("repeats", 1)),
    "Identity": lambda b, n: n.x,
    "Cast": _cast,
    "CastLike": lambda b, n: n.x,
}

_QUANTISED = "bring the float model; acclimate.quantize makes an int8 graph of it"

#: operator -> the nearest thing that is taken
REWRITES: dict[str, str] = {
    "ConvTranspose": "Resize by nearest and a convolution",
    **dict.fromkeys(("LSTM", "GRU", "RNN"), c.RECURRENT),
    **dict.fromkeys(
        (
            "QuantizeLinear",
            "DequantizeLinear",
            "QLinearConv",
            "QLinearMatMul",
            "ConvInteger",
            "MatMulInteger",
            "DynamicQuantizeLinear",
        ),
        _QUANTISED,
    ),
    **dict.fromkeys(
        (
            "Greater",
            "Less",
            "GreaterOrEqual",
            "LessOrEqual",
            "Equal",
            "Not",
            "And",
            "Or",
            "Sign",
            "Floor",
            "Ceil",
            "Round",
            "Where",
        ),
        "Relu, Clip or Sigmoid; comparisons have no gradient",
    ),
    **dict.fromkeys(("If", "Loop", "Scan"), "export the one branch that is needed"),
    **dict.fromkeys(("ArgMax", "ArgMin", "TopK", "NonMaxSuppression"), c.OUTSIDE),
    **dict.fromkeys(("GatherElements", "ScatterND", "ScatterElements"), "Slice and Concat"),
    "Gather": "one constant index, Slice and Concat",
    "Pow": "products and Sqrt",
    "Erf": "Gelu",
    "LRN": "BatchNormalization",
}
