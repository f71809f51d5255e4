"""PyTorch modules and .pt2 files, by way of torch.export.

Each ATen operator is taken by one small function of `_TABLE`, `(b, a)`: `a` holds the operator's arguments under
the names of its schema, and its first one also as `a.x`.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from os import PathLike
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..errors import BadInput, Unsupported, WrongUse, missing_extra
from ..ir import Dim, Graph
from . import common as c
from .common import LOST, Builder, Ref, Untaken

#: The attribute by which a buffer's tensor remembers its name.
_STEM = "acclimate_name"


# -- from modules and files ------------------------------------------------------------------------------------------


def _import_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise missing_extra("torch", "torch") from error
    return torch


def from_torch(module: Any, example: Any, mode: str | None = None) -> Graph:
    """The Graph of an nn.Module, for batches of any size.

    `example`: one float tensor (or numpy array) as the module takes it, axis 0 the batch. The module's own
    train() and eval() decide how batch norm and dropout behave, each submodule by itself; `mode` "train" or
    "eval" overrides them. What learns is for the update set to say: requires_grad and torch.no_grad are not read.
    The module is not changed. Raises Unsupported with all nodes that cannot be taken.

    >>> import torch
    >>> graph = from_torch(torch.nn.Linear(4, 2), torch.zeros(1, 4))
    >>> list(graph.parameters())
    ['weight', 'bias']
    """
    torch = _import_torch()
    module = getattr(module, "_orig_mod", module)  # what torch.compile wraps
    if not isinstance(module, torch.nn.Module):
        raise WrongUse(
            f"from_torch takes a torch.nn.Module, not {type(module).__name__}",
            action="acclimate.load takes files",
        )
    if mode not in (None, "train", "eval"):
        raise WrongUse("mode is None, 'train' or 'eval'", number=repr(mode))
    example = _example(torch, example)
    copied = _copied(torch, module, mode)
    program, baked = _export(torch, copied, example)
    return _convert(program, baked, example.shape[0], type(module).__name__)


def load_torch(path: str | PathLike[str]) -> Graph:
    """The Graph of a .pt2 file, as torch.export.save writes it; it may have been exported at any batch size."""
    torch = _import_torch()
    file = c.check_file(path, ".pt2")
    try:
        with _quietly():
            program = torch.export.load(str(file)).run_decompositions({})
    except Exception as error:
        raise BadInput(
            "this is no .pt2 file that torch can read",
            where=str(file),
            number=c.first_line(error),
            action="write it with torch.export.save(torch.export.export(module, (example,)), path)",
        ) from error
    shape = _user_input(program, str(file)).meta["val"].shape
    dynamic = any(not isinstance(s, int) for s in shape)
    if dynamic and isinstance(shape[0], int):
        raise Unsupported(
            "a dimension other than the batch is dynamic",
            where=str(file),
            number=str(tuple(shape)),
            action="export with dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)",
        )
    return _convert(program, None if dynamic else int(shape[0]), 1 if dynamic else int(shape[0]), file.name)


def _example(torch: Any, example: Any) -> Any:
    """The example as one float32 tensor."""
    if isinstance(example, (tuple, list)) and len(example) == 1:
        example = example[0]
    if isinstance(example, np.ndarray):
        example = torch.from_numpy(np.ascontiguousarray(example))
    if not isinstance(example, torch.Tensor):
        raise WrongUse(
            "the example is one tensor, axis 0 the batch",
            number=type(example).__name__,
            action="a model with several inputs is not taken: join them to one tensor and split it inside",
        )
    if not example.is_floating_point():
        raise Unsupported("the model takes integers", number=str(example.dtype), action=_EMBED)
    if example.dim() == 0 or example.shape[0] == 0:
        raise WrongUse(
            "axis 0 of the example is the batch, of one or more", number=f"shape {tuple(example.shape)}"
        )
    return example.detach().to("cpu", torch.float32)


_EMBED = "give the model float inputs: do the embedding outside of it, or pass x as one-hot floats"


def _copied(torch: Any, module: Any, mode: str | None) -> Any:
    """A float32 copy on the CPU, in the wanted mode."""
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if value.is_quantized or value.dtype in (torch.int8, torch.uint8) or value.is_complex():
            raise Unsupported(
                "the model is quantised or complex already",
                where=name,
                number=str(value.dtype),
                action="bring the float model; acclimate.quantize makes an int8 graph of it",
            )
    try:
        module = copy.deepcopy(module)
    except Exception as error:
        raise BadInput(
            "the module cannot be copied",
            number=c.first_line(error),
            action="detach the tensors among its attributes that hold a gradient history",
        ) from error
    module = module.to("cpu").float()
    return module if mode is None else module.train(mode == "train")


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """No warnings, logs or fused inference paths of torch's, which say nothing that our errors do not."""
    import torch

    before, fused = logging.root.manager.disable, torch.backends.mha.get_fastpath_enabled()
    logging.disable(logging.ERROR)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), torch.inference_mode(False), torch.enable_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        torch.backends.mha.set_fastpath_enabled(fused)


def _export(torch: Any, module: Any, example: Any) -> tuple[Any, int | None]:
    """The exported program, and the batch that it holds where it could not be exported for any."""
    pair = torch.cat([example, example])[
        : max(2, example.shape[0])
    ]  # a copy, as export marks its example as dynamic
    with _quietly():
        try:
            program = torch.export.export(module, (pair,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
            return program.run_decompositions({}), None
        except Exception as error:
            dynamic = error
        try:
            return torch.export.export(module, (example,)).run_decompositions({}), int(example.shape[0])
        except Exception as error:
            control = "data-dependent" in f"{dynamic}{error}"
            raise Unsupported(
                "the module decides by the data what it does"
                if control
                else "torch.export cannot trace this module",
                where=_user_frame(error) or type(module).__name__,
                number=c.first_line(error),
                action="use torch.where, or decide outside of forward()"
                if control
                else "make torch.export.export(module, (example,)) work; forward() takes one tensor",
            ) from dynamic


def _user_frame(error: BaseException) -> str:
    """Where in the user's own code an exception came from."""
    return c.user_line("".join(traceback.format_tb(error.__traceback__)))


# -- the walk over an exported program -------------------------------------------------------------------------------


def _user_input(program: Any, source: str) -> Any:
    """The one placeholder that the user feeds."""
    names = program.graph_signature.user_inputs
    nodes = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in names]
    if len(nodes) != 1:
        raise Unsupported(
            "the model takes several inputs" if nodes else "the model takes no tensor",
            where=source,
            number=f"{len(nodes)} inputs",
            action="join them to one tensor and split it inside the model",
        )
    return nodes[0]


def _convert(program: Any, baked: int | None, batch: int, source: str) -> Graph:
    """The Graph of an exported program."""
    entry = _user_input(program, source)
    value = entry.meta["val"]
    if not value.dtype.is_floating_point:
        raise Unsupported("the model takes integers", where=source, number=str(value.dtype), action=_EMBED)
    outputs = [s for s in program.graph_signature.output_specs if s.kind.name == "USER_OUTPUT"]
    if len(outputs) != 1:
        raise Unsupported(
            "the model returns several tensors",
            where=source,
            number=f"{len(outputs)} outputs",
            action="return only the one that the loss is computed from",
        )
    return c.attempts(lambda b: _Walk(b, program, entry, source).run(batch), baked)


class _Walk:
    """One pass over the nodes of an exported program."""

    def __init__(self, b: Builder, program: Any, entry: Any, source: str) -> None:
        self.b, self.program, self.entry, self.source = b, program, entry, source
        self.env: dict[Any, Any] = {}
        self.aliases: dict[str, str] = {}

    def run(self, batch: int) -> Graph:
        self._placeholders()
        results: Any = ()
        for node in self.program.graph.nodes:
            if node.op == "output":
                results = node.args[0]
            elif node.op == "call_function":
                self.env[node] = self._call(node)
                if len(node.users) > 1 and isinstance(self.env[node], Ref):
                    self.b.shared.add(self.env[node])
            elif node.op == "get_attr":
                self.env[node] = self._attribute(node.target)
        self.b.where = ""
        specs = self.program.graph_signature.output_specs
        output = None
        for spec, result in zip(specs, results, strict=True):
            value = self.env.get(result, result)
            if spec.kind.name == "USER_OUTPUT":
                output = value
            elif spec.kind.name == "BUFFER_MUTATION" and isinstance(value, Ref):
                self.b.where = spec.target
                self.b.fail(
                    "buffer update",
                    Untaken(f"forward() writes its buffer {spec.target}"),
                    "keep what is tracked in batch norm, or outside of the model",
                )
        return self.b.finish(output, batch, self.aliases, self.source)

    def _attribute(self, target: str) -> Any:
        module = self.program.graph_module
        for name in target.split("."):
            module = getattr(module, name)
        return module

    def _placeholders(self) -> None:
        """Parameters and the input become values; buffers and other tensors stay constants until they are used."""
        import torch

        tensors = {**self.program.constants, **self.program.state_dict}
        seen: dict[Any, str] = {}
        for spec, node in zip(
            self.program.graph_signature.input_specs,
            (n for n in self.program.graph.nodes if n.op == "placeholder"),
            strict=True,
        ):
            if node is self.entry:
                continue
            if spec.kind.name == "PARAMETER":
                tensor = tensors[spec.target]
                key = (
                    tensor.untyped_storage().data_ptr(),
                    tensor.storage_offset(),
                    tensor.shape,
                    tensor.stride(),
                )
                key = key if tensor.numel() else spec.target
                if key in seen:
                    self.aliases[spec.target] = seen[key]
                else:
                    seen[key] = spec.target
                    self.b.parameter(spec.target, _numpy(tensor))
                self.env[node] = Ref(seen[key])
            else:
                tensor = tensors.get(spec.target)
                if isinstance(tensor, torch.Tensor):
                    tensor = tensor.detach().clone()
                    setattr(tensor, _STEM, spec.target)
                self.env[node] = tensor
        self.env[self.entry] = self.b.input(self.entry.meta["val"].shape)

    def _call(self, node: Any) -> Any:
        """What a node's result is; LOST where it could not be taken."""
        args = _map(lambda n: self.env.get(n, n), node.args)
        kwargs = _map(lambda n: self.env.get(n, n), node.kwargs)
        name = _name(node.target)
        self.b.where, self.b.stem = _where(node), _stem(node)
        if name == "getitem":
            if args[0] is LOST:
                return LOST
            if isinstance(args[0], tuple) and args[1] >= len(args[0]):
                self._fail(name, Untaken("the statistics of a batch norm that is used twice"))
                return LOST
            return args[0][args[1]]
        leaves = list(_leaves((args, tuple(kwargs.values()))))
        taken = name in _TABLE or not hasattr(node.target, "_schema")
        if any(leaf is LOST for leaf in leaves):
            if not taken:
                self._fail(name, Untaken("this operator is not known here"))
            return LOST
        try:
            if not hasattr(node.target, "_schema"):
                return self._python(node, args, kwargs)
            if (
                not any(isinstance(leaf, (Ref, Dim, c.Erf, c.Compared)) for leaf in leaves)
                and name not in _RANDOM
            ):
                return _folded(node.target, args, kwargs)
            if not taken:
                raise Untaken("this operator is not known here")
            return _TABLE[name](self.b, _bound(node.target, args, kwargs))
        except Untaken as error:
            self._fail(name, error)
        except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as error:
            self._fail(name, Untaken(f"its arguments are not understood ({c.first_line(error)})"))
        return LOST

    def _fail(self, name: str, error: Untaken) -> None:
        self.b.fail(name, error, REWRITES.get(name.split(".")[0], ""))

    def _python(self, node: Any, args: Any, kwargs: Any) -> Any:
        """Arithmetic on sizes, picking from tuples, and regions that only switch gradients off."""
        name = getattr(node.target, "__name__", str(node.target))
        if name in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            inner = next(a for a in args if hasattr(a, "graph"))
            return self._inline(inner, args[list(args).index(inner) + 1 :])
        if any(isinstance(leaf, Ref) for leaf in _leaves((args, tuple(kwargs.values())))):
            raise Untaken("control flow that depends on the data")
        return node.target(*args, **kwargs)

    def _inline(self, inner: Any, args: Any) -> Any:
        for node in inner.graph.nodes:
            if node.op == "placeholder":
                self.env[node], args = args[0], args[1:]
            elif node.op == "call_function":
                self.env[node] = self._call(node)
            elif node.op == "output":
                return _map(lambda n: self.env.get(n, n), node.args[0])
        return ()


def _map(fn: Callable[[Any], Any], tree: Any) -> Any:
    """`fn` of each fx node in nested arguments."""
    if isinstance(tree, (tuple, list)):
        return (
            type(tree)(_map(fn, t) for t in tree)
            if type(tree) in (tuple, list)
            else [_map(fn, t) for t in tree]
        )
    if isinstance(tree, dict):
        return {k: _map(fn, v) for k, v in tree.items()}
    return fn(tree) if hasattr(tree, "all_input_nodes") else tree


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _leaves(item)
    else:
        yield tree


def _name(target: Any) -> str:
    """ "conv2d", or "conv2d.padding" where that overload has its own row."""
    if not hasattr(target, "_schema"):
        return getattr(target, "__name__", str(target))
    name = target._schema.name.split("::")[-1]
    full = f"{name}.{target._schema.overload_name}"
    return full if full in _TABLE else name


def _numpy(tensor: Any) -> np.ndarray:
    """A tensor's content; halves become float32."""
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.float()
    return c.constant(tensor.contiguous().numpy(), getattr(tensor, _STEM, ""))


def _folded(target: Any, args: Any, kwargs: Any) -> Any:
    """The result of an operator on constants alone, computed by torch."""
    import torch

    try:
        with torch.no_grad():
            return target(*args, **kwargs)
    except Exception as error:
        raise Untaken(f"torch cannot compute this constant ({c.first_line(error)})") from error


def _bound(target: Any, args: Any, kwargs: Any) -> SimpleNamespace:
    """Arguments by the names of the operator's schema, tensors as numpy arrays."""
    import torch

    def plain(v: Any) -> Any:
        if isinstance(v, (tuple, list)):
            return [plain(i) for i in v]
        if isinstance(v, torch.Tensor):
            return c.constant(_numpy(v), getattr(v, _STEM, ""))
        return v

    out = SimpleNamespace()
    for i, argument in enumerate(target._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
        setattr(out, argument.name, plain(value))
        if i == 0:
            out.x = plain(value)
    return out


def _where(node: Any) -> str:
    """The user's source line of a node, or the layer where only torch's own code is on its stack."""
    line = c.user_line(node.meta.get("stack_trace") or "")
    if line:
        return line
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if stack:
        path, kind = stack[-1]
        kind = kind if isinstance(kind, str) else kind.__name__
        return f"layer {_path(path) or '(top)'} ({kind.split('.')[-1]})"
    return node.name


def _path(path: str) -> str:
    """A module's name as the user writes it."""
    return (
        re.sub(r"\['?|'?\]", ".", re.sub(r"^L\['self'\]\.?|^self\.?", "", path)).replace("..", ".").strip(".")
    )


def _stem(node: Any) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return _path(stack[-1][0]) if stack else ""


# -- operators -------------------------------------------------------------------------------------------------------


def _same(kernel: Any, dilation: Any) -> tuple[list[int], list[int]]:
    """Padding before and after that keeps the size; the odd one goes to the end."""
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return [t // 2 for t in total], [t - t // 2 for t in total]


def _conv(b: Builder, a: Any) -> Any:
    kernel = b.shape(a.weight)[2:]
    if getattr(a, "transposed", False):
        raise Untaken("a transposed convolution")
    dilation, padding = c.spread(a.dilation, len(kernel)), a.padding
    if isinstance(padding, str):
        before, after = _same(kernel, dilation) if padding == "same" else ([0], [0])
    else:
        before = after = padding
    return c.convolution(
        b,
        a.x,
        a.weight,
        a.bias,
        stride=a.stride,
        before=before,
        after=after,
        dilation=dilation,
        groups=a.groups,
    )


def _addmm(b: Builder, a: Any) -> Any:
    x, w = (a.mat1, a.mat2) if hasattr(a, "mat1") else (a.batch1, a.batch2)
    if a.alpha == 1 and a.beta == 1 and len(b.shape(a.x)) == 1 and len(b.shape(x)) == 2:
        return c.linear(b, x, w, a.x, tb=0)
    product = c.affine(b, c.matmul(b, x, w), a.alpha)
    return product if a.beta == 0 else c.binary(b, "add", product, c.affine(b, a.x, a.beta))


def _add(op: str) -> Callable[..., Any]:
    def rule(b: Builder, a: Any) -> Any:
        other = a.other if a.alpha == 1 else c.binary(b, "mul", a.other, a.alpha)
        return c.binary(b, op, a.x, other)

    return rule


def _rsub(b: Builder, a: Any) -> Any:
    return c.binary(b, "sub", a.other, a.x if a.alpha == 1 else c.affine(b, a.x, a.alpha))


def _div(b: Builder, a: Any) -> Any:
    if getattr(a, "rounding_mode", None):
        raise Untaken("a division that rounds")
    return c.binary(b, "div", a.x, a.other)


def _pow(b: Builder, a: Any) -> Any:
    return c.power(b, a.x, a.exponent)


def _batch_norm(b: Builder, a: Any) -> Any:
    mean, var = getattr(a, "running_mean", None), getattr(a, "running_var", None)
    if mean is None:
        return (c.batch_only_norm(b, a.x, a.weight, a.bias, a.eps), None, None)
    training = getattr(a, "training", False)
    y = c.batch_norm(b, a.x, a.weight, a.bias, mean, var, training, a.momentum, a.eps)
    return (y, None, None, None, None)


def _instance_norm(b: Builder, a: Any) -> Any:
    if a.use_input_stats:
        if a.running_mean is not None:
            raise Untaken("instance norm that tracks statistics while it trains")
        return c.group_norm(b, a.x, b.length(a.x, 1), a.weight, a.bias, a.eps)
    return c.batch_norm(b, a.x, a.weight, a.bias, a.running_mean, a.running_var, False, 0.0, a.eps)


def _rms_norm(b: Builder, a: Any) -> Any:
    axes = range(-len(a.normalized_shape), 0)
    eps = a.eps if a.eps is not None else float(np.finfo(np.float32).eps)
    power = c.reduce(b, "mean", c.unary(b, "square", a.x), axes, True)
    y = c.binary(b, "mul", a.x, c.power(b, c.affine(b, power, 1.0, eps), -0.5))
    return y if a.weight is None else c.binary(b, "mul", y, a.weight)


def _native_dropout(b: Builder, a: Any) -> Any:
    return (c.dropout(b, a.x, a.p if a.train in (None, True) else 0.0), None)


def _bernoulli(b: Builder, a: Any) -> Any:
    """The mask of dropout of whole channels: ones that are dropped, scaled back."""
    ones = _filled(b, 1.0, b.shape(a.x))
    return c.affine(b, c.dropout(b, b.value(ones), 1 - a.p), a.p)


def _filled(b: Builder, value: float, shape: Any) -> Any:
    """A constant of one value; its axes that are the batch are expanded."""
    small = np.full([1 if isinstance(s, Dim) else int(s) for s in shape], value, np.float32)
    return c.expand(b, small, shape) if any(isinstance(s, Dim) for s in shape) else small


def _creation(value: float | None, argument: str = "size") -> Callable[..., Any]:
    def rule(b: Builder, a: Any) -> Any:
        shape = b.shape(a.x) if argument == "like" else getattr(a, argument)
        fill = c.number(a.fill_value) if value is None else value
        if fill is None:
            raise Untaken("a tensor filled with a value that depends on the data")
        return _filled(b, fill, shape)

    return rule


def _max_pool(rank: int, tuple_: bool = False) -> Callable[..., Any]:
    def rule(b: Builder, a: Any) -> Any:
        y = c.pool(
            b,
            "max_pool",
            a.x,
            c.spread(a.kernel_size, rank),
            a.stride,
            a.padding,
            ceil=a.ceil_mode,
            dilation=a.dilation,
        )
        return (y, LOST) if tuple_ else y

    return rule


def _avg_pool(b: Builder, a: Any) -> Any:
    if getattr(a, "divisor_override", None) is not None:
        raise Untaken("average pooling with divisor_override")
    return c.pool(
        b,
        "avg_pool",
        a.x,
        a.kernel_size,
        a.stride,
        a.padding,
        ceil=a.ceil_mode,
        include_pad=a.count_include_pad,
    )


def _pad(b: Builder, a: Any) -> Any:
    rank, mode = len(b.shape(a.x)), getattr(a, "mode", "constant")
    before, after = [0] * rank, [0] * rank
    for i in range(len(a.pad) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = a.pad[2 * i], a.pad[2 * i + 1]
    if mode == "constant":
        return c.pad(b, a.x, before, after, float(a.value or 0))
    x = a.x
    for axis in range(rank):
        x = c.pad_by_copies(b, x, axis, before[axis], after[axis], mode) if before[axis] or after[axis] else x
    return x


def _index(b: Builder, a: Any) -> Any:
    given = [(axis, i) for axis, i in enumerate(a.indices) if i is not None]
    if len(given) != 1 or isinstance(given[0][1], Ref):
        raise Untaken("indexing by several tensors, or by one that depends on the data")
    axis, index = given[0]
    if np.asarray(index).dtype == np.bool_:
        index = np.flatnonzero(index) if np.ndim(index) == 1 else None
    if index is None:
        raise Untaken("indexing by a mask of several dimensions")
    return c.take(b, a.x, axis, index)


def _constant_index(b: Builder, a: Any) -> Any:
    if isinstance(a.index, Ref):
        raise Untaken("an index that depends on the data")
    return c.take(b, a.x, a.dim, np.asarray(a.index).reshape(-1))


def _embedding(b: Builder, a: Any) -> Any:
    if isinstance(a.indices, (Ref, Dim)):
        raise Untaken("an embedding of the input")
    return c.take(b, a.weight, 0, a.indices)


def _scatter(b: Builder, a: Any, start: int, end: int, step: int, source: Any) -> Any:
    """x with a part along one axis replaced."""
    shape = b.shape(a.x)
    axis = a.dim % len(shape)
    if isinstance(shape[axis], Dim) and not start and (end is None or end >= shape[axis]):
        return c.expand(b, source, shape)
    at = range(*slice(start, end, step).indices(b.length(a.x, axis)))
    if len(at) == shape[axis]:
        return c.expand(b, source, shape)
    if step != 1:
        raise Untaken("a write to every n-th element")
    parts = [
        c.slice_axis(b, a.x, axis, 0, at.start) if at.start else None,
        source,
        c.slice_axis(b, a.x, axis, at.stop, None) if at.stop < shape[axis] else None,
    ]
    return c.concat(b, [p for p in parts if p is not None], axis)


def _select_scatter(b: Builder, a: Any) -> Any:
    size = b.length(a.x, a.dim)
    source = c.unsqueeze(b, a.src, [a.dim % len(b.shape(a.x))])
    return _scatter(b, a, a.index % size, a.index % size + 1, 1, source)


def _slice_scatter(b: Builder, a: Any) -> Any:
    return _scatter(b, a, a.start, a.end, a.step, a.src)


def _split(b: Builder, a: Any) -> Any:
    size = b.length(a.x, a.dim)
    step = a.split_size
    return c.split(b, a.x, a.dim, [min(step, size - i) for i in range(0, size, step)])


def _chunk(b: Builder, a: Any) -> Any:
    a.split_size = -(-b.length(a.x, a.dim) // a.chunks)
    return _split(b, a)


def _unbind(b: Builder, a: Any) -> Any:
    return tuple(c.select(b, a.x, a.dim, i) for i in range(b.length(a.x, a.dim)))


def _flip(b: Builder, a: Any) -> Any:
    x = a.x
    for axis in a.dims:
        x = c.take(b, x, axis, np.arange(b.length(x, axis))[::-1])
    return x


def _roll(b: Builder, a: Any) -> Any:
    x = a.x
    if not a.dims:
        raise Untaken("a roll of the flattened tensor")
    for shift, axis in zip(a.shifts, a.dims, strict=True):
        x = c.take(b, x, axis, np.roll(np.arange(b.length(x, axis)), shift))
    return x


def _cumsum(b: Builder, a: Any) -> Any:
    n = b.length(a.x, a.dim)
    return c.along(b, a.x, a.dim, np.tril(np.ones((n, n))))


def _attention(b: Builder, a: Any) -> Any:
    if getattr(a, "enable_gqa", False):
        raise Untaken("attention with fewer heads for keys than for queries")
    return c.attention(b, a.query, a.key, a.value, a.attn_mask, a.is_causal, a.dropout_p, a.scale)


def _upsample_nearest(b: Builder, a: Any) -> Any:
    shape = b.shape(a.x)[2:]
    sizes = a.output_size or [int(s * f) for s, f in zip(shape, a.scale_factors, strict=True)]
    return c.upsample_nearest(b, a.x, sizes)


def _interpolate(mode: str) -> Callable[..., Any]:
    """Linear or cubic interpolation is one constant matrix a spatial dimension."""

    def rule(b: Builder, a: Any) -> Any:
        import torch

        x, shape = a.x, b.shape(a.x)
        for i, axis in enumerate(range(2, len(shape))):
            n = b.length(x, axis)
            eye = torch.eye(n).reshape(n, 1, n, 1) if mode == "bicubic" else torch.eye(n).reshape(n, 1, n)
            how = {"size": a.output_size[i]} if a.output_size else {"scale_factor": a.scale_factors[i]}
            if mode == "bicubic":
                how = {k: (v, 1) for k, v in how.items()}
            matrix = torch.nn.functional.interpolate(eye, **how, mode=mode, align_corners=a.align_corners)
            x = c.along(b, x, axis, matrix.reshape(n, -1).T.numpy())
        return x

    return rule


def _weight_norm(b: Builder, a: Any) -> Any:
    v, g = a.x, a.g
    axes = [i for i in range(len(b.shape(v))) if i != a.dim] if a.dim != -1 else None
    length = c.power(b, c.reduce(b, "sum", c.unary(b, "square", v), axes, True), 0.5)
    return c.binary(b, "mul", v, c.binary(b, "div", g, length))


def _norm(b: Builder, a: Any) -> Any:
    order = c.number(getattr(a, "ord", getattr(a, "p", 2)))
    order = 2.0 if order is None else order
    axes, keep = getattr(a, "dim", None), getattr(a, "keepdim", False)
    if order == 1:
        return c.reduce(b, "sum", c.unary(b, "abs", a.x), axes, keep)
    if order == math.inf:
        return c.largest(b, c.unary(b, "abs", a.x), axes, keep)
    if order != 2:
        raise Untaken(f"a norm of order {order}")
    return c.unary(b, "sqrt", c.reduce(b, "sum", c.unary(b, "square", a.x), axes, keep))


def _reduce(op: str) -> Callable[..., Any]:
    def rule(b: Builder, a: Any) -> Any:
        dim = getattr(a, "dim", None)
        return c.reduce(
            b, op, a.x, [dim] if isinstance(dim, int) else dim, bool(getattr(a, "keepdim", False))
        )

    return rule


def _variance(root: bool) -> Callable[..., Any]:
    def rule(b: Builder, a: Any) -> Any:
        unbiased = getattr(a, "unbiased", True)
        correction = getattr(a, "correction", None)
        correction = float(unbiased) if correction is None else float(correction)
        y = c.variance(b, a.x, getattr(a, "dim", None), correction, bool(getattr(a, "keepdim", False)))
        return c.unary(b, "sqrt", y) if root else y

    return rule


def _extreme(sign: float) -> Callable[..., Any]:
    """max or min, over axes or between two tensors."""

    def rule(b: Builder, a: Any) -> Any:
        if hasattr(a, "other"):
            return c.larger(b, a.x, a.other, sign)
        dim = getattr(a, "dim", None)
        axes = [dim] if isinstance(dim, int) else dim
        y = c.affine(b, c.largest(b, c.affine(b, a.x, sign), axes, bool(getattr(a, "keepdim", False))), sign)
        return (y, LOST) if isinstance(dim, int) and not hasattr(a, "amax") else y

    return rule


def _amax(sign: float) -> Callable[..., Any]:
    return lambda b, a: c.affine(b, c.largest(b, c.affine(b, a.x, sign), a.dim, a.keepdim), sign)


def _log_sum_exp(b: Builder, a: Any) -> Any:
    axes = [a.dim] if isinstance(a.dim, int) else a.dim
    if len(axes) != 1:
        raise Untaken("logsumexp over several axes")
    rest = c.binary(b, "sub", a.x, c.softmax(b, a.x, axes[0], log=True))  # the same along the axis
    y = c.slice_axis(b, rest, axes[0], 0, 1)
    return y if a.keepdim else c.squeeze(b, y, axes)


def _glu(b: Builder, a: Any) -> Any:
    half = b.length(a.x, a.dim) // 2
    x, gate = c.split(b, a.x, a.dim, [half, half])
    return c.binary(b, "mul", x, c.unary(b, "sigmoid", gate))


def _elu(b: Builder, a: Any) -> Any:
    alpha, scale = float(a.alpha), float(getattr(a, "scale", 1.0))
    if float(getattr(a, "input_scale", 1.0)) != 1:
        raise Untaken("elu with input_scale")
    return c.affine(b, c.unary(b, "elu", a.x, alpha=alpha), scale)


def _celu(b: Builder, a: Any) -> Any:
    return c.affine(b, c.unary(b, "elu", c.affine(b, a.x, 1 / a.alpha), alpha=1.0), a.alpha)


def _selu(b: Builder, a: Any) -> Any:
    return c.affine(b, c.unary(b, "elu", a.x, alpha=1.6732632423543772), 1.0507009873554805)


def _leaky_relu(b: Builder, a: Any) -> Any:
    if a.negative_slope < 0:
        raise Untaken(f"a leaky relu of negative slope {a.negative_slope}")
    return c.unary(b, "leaky_relu", a.x, slope=float(a.negative_slope))


def _rrelu(b: Builder, a: Any) -> Any:
    if getattr(a, "training", False):
        raise Untaken("rrelu draws random slopes")
    return c.unary(b, "leaky_relu", a.x, slope=(a.lower + a.upper) / 2)


def _softplus(b: Builder, a: Any) -> Any:
    return c.softplus(b, a.x, float(a.beta))


def _threshold(b: Builder, a: Any) -> Any:
    if a.threshold != a.value:
        raise Untaken("a threshold that jumps")
    return c.clamp(b, a.x, a.threshold, None)


def _clamp(b: Builder, a: Any) -> Any:
    low, high = getattr(a, "min", None), getattr(a, "max", None)
    bounds = [None if v is None else c.number(v) for v in (low, high)]
    if any(v is None and w is not None for v, w in zip(bounds, (low, high), strict=True)):
        x = a.x if low is None else c.larger(b, a.x, low)
        return x if high is None else c.larger(b, x, high, -1.0)
    return c.clamp(b, a.x, *bounds)


def _cast(b: Builder, a: Any) -> Any:
    import torch

    dtype = getattr(a, "dtype", None)
    if isinstance(dtype, torch.dtype) and not dtype.is_floating_point and isinstance(a.x, Ref):
        raise Untaken(f"a conversion of the data to {dtype}")
    return a.x


def _masked_fill(b: Builder, a: Any) -> Any:
    return c.where(b, a.mask, a.value, a.x)


def _where_self(b: Builder, a: Any) -> Any:
    return c.where(b, a.condition, a.x if a.x is not a.condition else a.self, a.other)


def _outer(b: Builder, a: Any) -> Any:
    other = a.vec2 if hasattr(a, "vec2") else a.other
    return c.binary(b, "mul", c.unsqueeze(b, a.x, [1]), c.unsqueeze(b, other, [0]))


def _add_product(op: str) -> Callable[..., Any]:
    def rule(b: Builder, a: Any) -> Any:
        return c.binary(b, "add", a.x, c.affine(b, c.binary(b, op, a.tensor1, a.tensor2), float(a.value)))

    return rule


def _lerp(b: Builder, a: Any) -> Any:
    return c.binary(b, "add", a.x, c.binary(b, "mul", c.binary(b, "sub", a.end, a.x), a.weight))


def _expand_as(b: Builder, a: Any) -> Any:
    return c.expand(b, a.x, b.shape(a.other))


def _same_shape(b: Builder, a: Any) -> Any:
    return c.reshape(b, a.x, b.shape(a.other))


def _size(b: Builder, a: Any) -> Any:
    return b.shape(a.x)[a.dim] if hasattr(a, "dim") else list(b.shape(a.x))


def _fill(b: Builder, a: Any) -> Any:
    value = c.number(a.value)
    if value is None:
        raise Untaken("a fill with a value that depends on the data")
    return _filled(b, value, b.shape(a.x))


def _squeeze(b: Builder, a: Any) -> Any:
    dim = getattr(a, "dim", None)
    return c.squeeze(b, a.x, [dim] if isinstance(dim, int) else dim)


def _unfold(b: Builder, a: Any) -> Any:
    """Patches as columns: a convolution whose weight is the identity."""
    n, channels = b.shape(a.x)[:2]
    area = math.prod(a.kernel_size)
    eye = np.tile(np.eye(area, dtype=np.float32).reshape(area, 1, *a.kernel_size), (int(channels), 1, 1, 1))
    y = c.convolution(
        b,
        a.x,
        eye,
        None,
        stride=a.stride,
        before=a.padding,
        after=a.padding,
        dilation=a.dilation,
        groups=channels,
    )
    return c.flatten(b, y, 2, 3)


def _detach(b: Builder, a: Any) -> Any:
    if a.x in b.learned:
        raise Untaken("a gradient is stopped in the middle of what learns")
    return a.x


def _simple(op: str) -> Callable[..., Any]:
    return lambda b, a: c.unary(b, op, a.x)


def _nothing(b: Builder, a: Any) -> Any:
    return a.x


_RANDOM = {
    "bernoulli",
    "rand",
    "randn",
    "randint",
    "rand_like",
    "randn_like",
    "normal",
    "normal_functional",
    "uniform",
    "native_dropout",
    "dropout",
    "randperm",
    "multinomial",
    "rrelu_with_noise_functional",
    "alpha_dropout",
    "feature_alpha_dropout",
    "exponential",
}

_TABLE: dict[str, Callable[[Builder, Any], Any]] = {
    # layers
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "_convolution"), _conv),
    "linear": lambda b, a: c.linear(b, a.x, a.weight, a.bias),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm"), _addmm),
    "addmv": lambda b, a: c.binary(
        b, "add", c.affine(b, c.matmul(b, a.mat, a.vec), a.alpha), c.affine(b, a.x, a.beta)
    ),
    **dict.fromkeys(("mm", "bmm"), lambda b, a: c.matmul(b, a.x, a.mat2)),
    **dict.fromkeys(("matmul", "__matmul__"), lambda b, a: c.matmul(b, a.x, a.other)),
    "mv": lambda b, a: c.matmul(b, a.x, a.vec),
    **dict.fromkeys(
        ("dot", "vdot"), lambda b, a: c.matmul(b, a.x, a.tensor if hasattr(a, "tensor") else a.other)
    ),
    **dict.fromkeys(("outer", "ger"), _outer),
    "einsum": lambda b, a: c.einsum(b, a.equation, a.tensors),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(
        (
            "_native_batch_norm_legit",
            "_native_batch_norm_legit_functional",
            "native_batch_norm",
            "_native_batch_norm_legit_no_training",
            "cudnn_batch_norm",
            "_batch_norm_with_update_functional",
            "_batch_norm_no_update",
        ),
        _batch_norm,
    ),
    "batch_norm": lambda b, a: _batch_norm(b, a)[0],
    "layer_norm": lambda b, a: c.normalize(b, a.x, a.normalized_shape, a.weight, a.bias, a.eps),
    "native_layer_norm": lambda b, a: (
        c.normalize(b, a.x, a.normalized_shape, a.weight, a.bias, a.eps),
        None,
        None,
    ),
    "group_norm": lambda b, a: c.group_norm(b, a.x, a.num_groups, a.weight, a.bias, a.eps),
    "native_group_norm": lambda b, a: (c.group_norm(b, a.x, a.group, a.weight, a.bias, a.eps), None, None),
    "instance_norm": _instance_norm,
    "rms_norm": _rms_norm,
    "_weight_norm": _weight_norm,
    "embedding": _embedding,
    # dropout
    "native_dropout": _native_dropout,
    "dropout": lambda b, a: c.dropout(b, a.x, a.p if a.train else 0.0),
    "bernoulli.p": _bernoulli,
    # pooling and resizing
    "max_pool1d": _max_pool(1),
    "max_pool2d": _max_pool(2),
    "max_pool1d_with_indices": _max_pool(1, True),
    "max_pool2d_with_indices": _max_pool(2, True),
    "avg_pool1d": _avg_pool,
    "avg_pool2d": _avg_pool,
    **dict.fromkeys(
        ("adaptive_avg_pool1d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d"),
        lambda b, a: c.adaptive_pool(b, "avg_pool", a.x, a.output_size),
    ),
    **dict.fromkeys(
        ("adaptive_max_pool1d", "adaptive_max_pool2d"),
        lambda b, a: (c.adaptive_pool(b, "max_pool", a.x, a.output_size), LOST),
    ),
    "upsample_nearest1d": _upsample_nearest,
    "upsample_nearest2d": _upsample_nearest,
    "upsample_linear1d": _interpolate("linear"),
    "upsample_bilinear2d": _interpolate("linear"),
    "upsample_bicubic2d": _interpolate("bicubic"),
    "pixel_shuffle": lambda b, a: c.pixel_shuffle(b, a.x, a.upscale_factor),
    "im2col": _unfold,
    # activations
    **{
        op: _simple(op)
        for op in ("relu", "sigmoid", "tanh", "silu", "exp", "log", "sqrt", "square", "abs", "reciprocal")
    },
    "hardswish": _simple("hard_swish"),
    "hardsigmoid": _simple("hard_sigmoid"),
    "relu6": lambda b, a: c.clamp(b, a.x, 0.0, 6.0),
    "hardtanh": lambda b, a: c.clamp(b, a.x, a.min_val, a.max_val),
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max", "clip"), _clamp),
    "leaky_relu": _leaky_relu,
    "rrelu": _rrelu,
    "elu": _elu,
    "celu": _celu,
    "selu": _selu,
    "threshold": _threshold,
    "prelu": lambda b, a: c.prelu(b, a.x, a.weight),
    "_prelu_kernel": lambda b, a: c.prelu(b, a.x, a.weight),
    "gelu": lambda b, a: c.unary(b, "gelu", a.x, tanh=int(a.approximate == "tanh")),
    "softplus": _softplus,
    "log_sigmoid": lambda b, a: c.affine(b, c.softplus(b, c.affine(b, a.x, -1.0)), -1.0),
    "log_sigmoid_forward": lambda b, a: (c.affine(b, c.softplus(b, c.affine(b, a.x, -1.0)), -1.0), None),
    "mish": lambda b, a: c.binary(b, "mul", a.x, c.unary(b, "tanh", c.softplus(b, a.x))),
    "softsign": lambda b, a: c.binary(b, "div", a.x, c.affine(b, c.unary(b, "abs", a.x), 1.0, 1.0)),
    "tanhshrink": lambda b, a: c.binary(b, "sub", a.x, c.unary(b, "tanh", a.x)),
    "glu": _glu,
    "erf": lambda b, a: c.Erf(a.x),
    **dict.fromkeys(("softmax", "_softmax", "_safe_softmax"), lambda b, a: c.softmax(b, a.x, a.dim)),
    **dict.fromkeys(("log_softmax", "_log_softmax"), lambda b, a: c.softmax(b, a.x, a.dim, log=True)),
    "logsumexp": _log_sum_exp,
    # arithmetic
    "add": _add("add"),
    "sub": _add("sub"),
    "rsub": _rsub,
    "div": _div,
    "pow": _pow,
    **dict.fromkeys(("mul", "multiply"), lambda b, a: c.binary(b, "mul", a.x, a.other)),
    "true_divide": _div,
    "divide": _div,
    "addcmul": _add_product("mul"),
    "addcdiv": _add_product("div"),
    "lerp": _lerp,
    "neg": lambda b, a: c.affine(b, a.x, -1.0),
    "rsqrt": lambda b, a: c.power(b, a.x, -0.5),
    "log1p": lambda b, a: c.unary(b, "log", c.affine(b, a.x, 1.0, 1.0)),
    "expm1": lambda b, a: c.affine(b, c.unary(b, "exp", a.x), 1.0, -1.0),
    "exp2": lambda b, a: c.unary(b, "exp", c.affine(b, a.x, math.log(2))),
    "log2": lambda b, a: c.affine(b, c.unary(b, "log", a.x), 1 / math.log(2)),
    "log10": lambda b, a: c.affine(b, c.unary(b, "log", a.x), 1 / math.log(10)),
    "mean": _reduce("mean"),
    "sum": _reduce("sum"),
    "var": _variance(False),
    "std": _variance(True),
    "var_mean": lambda b, a: (_variance(False)(b, a), _reduce("mean")(b, a)),
    "max": _extreme(1.0),
    "min": _extreme(-1.0),
    "amax": _amax(1.0),
    "amin": _amax(-1.0),
    "maximum": _extreme(1.0),
    "minimum": _extreme(-1.0),
    "linalg_vector_norm": _norm,
    "norm": _norm,
    "cumsum": _cumsum,
    **dict.fromkeys(("gt", "ge"), lambda b, a: c.compare(b, a.x, a.other, True)),
    **dict.fromkeys(("lt", "le"), lambda b, a: c.compare(b, a.x, a.other, False)),
    "isnan": lambda b, a: np.zeros((), np.bool_),
    "masked_fill": _masked_fill,
    "where": _where_self,
    "fill": _fill,
    # shapes
    **dict.fromkeys(
        ("view", "_unsafe_view", "reshape", "_reshape_copy"),
        lambda b, a: c.reshape(b, a.x, a.size if hasattr(a, "size") else a.shape),
    ),
    "copy": lambda b, a: c.expand(b, a.src, b.shape(a.x)),
    "view_as": _same_shape,
    "reshape_as": _same_shape,
    "expand_as": _expand_as,
    "flatten": lambda b, a: c.flatten(b, a.x, a.start_dim, a.end_dim),
    "unflatten": lambda b, a: c.reshape(
        b,
        a.x,
        [
            *b.shape(a.x)[: a.dim % len(b.shape(a.x))],
            *a.sizes,
            *b.shape(a.x)[a.dim % len(b.shape(a.x)) + 1 :],
        ],
    ),
    "permute": lambda b, a: c.transpose(b, a.x, a.dims),
    **dict.fromkeys(("transpose", "swapaxes"), lambda b, a: c.swap(b, a.x, a.dim0, a.dim1)),
    **dict.fromkeys(("t", "numpy_T"), lambda b, a: c.swap(b, a.x, 0, -1)),
    **dict.fromkeys(("mT", "adjoint"), lambda b, a: c.swap(b, a.x, -1, -2)),
    "unsqueeze": lambda b, a: c.unsqueeze(b, a.x, [a.dim]),
    "squeeze": _squeeze,
    "expand": lambda b, a: c.expand(b, a.x, a.size),
    "broadcast_to": lambda b, a: c.expand(b, a.x, a.size),
    "repeat": lambda b, a: c.repeat(b, a.x, a.repeats),
    "tile": lambda b, a: c.repeat(b, a.x, a.dims),
    "cat": lambda b, a: c.concat(b, a.tensors, a.dim),
    "stack": lambda b, a: c.concat(b, [c.unsqueeze(b, t, [a.dim]) for t in a.tensors], a.dim),
    "split": _split,
    "chunk": _chunk,
    "unbind": _unbind,
    "split_with_sizes": lambda b, a: c.split(b, a.x, a.dim, a.split_sizes),
    "slice": lambda b, a: c.slice_axis(b, a.x, a.dim, a.start, a.end, a.step),
    "select": lambda b, a: c.select(b, a.x, a.dim, a.index),
    "narrow": lambda b, a: c.slice_axis(b, a.x, a.dim, a.start, a.start + a.length),
    "select_scatter": _select_scatter,
    "slice_scatter": _slice_scatter,
    "index": _index,
    "index_select": _constant_index,
    "flip": _flip,
    "roll": _roll,
    "pad": _pad,
    "constant_pad_nd": _pad,
    # creation, with a size that holds the batch
    **{
        new + name: _creation(v)
        for new in ("", "new_")
        for name, v in (("zeros", 0.0), ("ones", 1.0), ("empty", 0.0), ("full", None))
    },
    **{
        f"{name}_like": _creation(v, "like")
        for name, v in (("zeros", 0.0), ("ones", 1.0), ("empty", 0.0), ("full", None))
    },
    # no-ops
    "detach": _detach,
    **dict.fromkeys(
        (
            "clone",
            "contiguous",
            "alias",
            "lift_fresh_copy",
            "lift",
            "dropout_",
            "feature_dropout",
            "view_of",
            "positive",
            "_assert_tensor_metadata",
            "_assert_scalar",
            "_assert_async",
            "sym_constrain_range",
            "sym_constrain_range_for_size",
        ),
        _nothing,
    ),
    **dict.fromkeys(("to", "_to_copy", "type_as", "float", "double", "half"), _cast),
    **dict.fromkeys(("sym_size", "size"), _size),
    "sym_numel": lambda b, a: math.prod(b.shape(a.x)),
}


#: operator -> the nearest thing that is taken
REWRITES: dict[str, str] = {
    **dict.fromkeys(
        ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution"),
        "nn.Upsample(scale_factor=2) and a convolution",
    ),
    "conv3d": "fold one spatial dimension into the channels and use conv2d",
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell"), c.RECURRENT),
    **dict.fromkeys(
        ("gt", "lt", "ge", "le", "eq", "ne", "sign", "floor", "ceil", "round", "where", "heaviside"),
        "compute it with relu, clamp or sigmoid; comparisons have no gradient",
    ),
    **dict.fromkeys(("argmax", "argmin", "topk", "sort", "argsort"), c.OUTSIDE),
    **dict.fromkeys(
        ("sin", "cos", "tan", "erf", "atan", "sinh", "cosh"),
        "compute constant tables in __init__; use tanh or gelu",
    ),
    "embedding": "embed outside of the model and pass floats, or multiply one-hot floats by a linear layer",
    "avg_pool2d": "avg_pool2d without divisor_override, and a multiplication",
    "index": "slices and torch.cat; or index_select by one constant index",
    "gather": "slices and torch.cat, or a product with a one-hot mask",
    "instance_norm": "track_running_stats=False, or .eval() on this layer",
    "adaptive_max_pool2d": "a max_pool2d with a fixed kernel",
    "upsample_nearest2d": "an integer scale_factor, or mode='bilinear'",
    "pow": "squares, products, sqrt; or exp(p * log(x)) where x is positive",
    "detach": "leave it out; what learns is for the update set to say",
    "buffer update": "keep what is tracked in batch norm, or outside of the model",
    "alpha_dropout": "nn.Dropout",
    "feature_alpha_dropout": "nn.Dropout2d",
    "hardshrink": "x - clamp(x, -lambd, lambd), which is a soft shrink",
    "cdist": "a product of matrices and sums of squares",
}
