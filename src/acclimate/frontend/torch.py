"""PyTorch modules and .pt2 files, by way of torch.export: export, loading, and the walk over an exported program.

What each ATen operator becomes is in `torch_ops`.
"""

from __future__ import annotations

import contextlib
import copy
import logging
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
from . import torch_file
from .common import LOST, Builder, Ref, Untaken
from .torch_ops import COMPARED, RANDOM, REWRITES, TABLE

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
    """The Graph of a .pt2 file, as torch.export.save writes it; it may have been exported at any batch size.

    Nothing in the file is run: BadInput for one that holds pickles, compiled code or expressions.
    """
    torch = _import_torch()
    file = c.check_file(path, ".pt2")
    try:
        with _quietly():
            program = torch.export.load(torch_file.checked(file)).run_decompositions({})
    except torch_file.NotData as error:
        raise BadInput(
            "this .pt2 file holds more than the data of a model, or is damaged",
            where=str(file),
            number=str(error),
            action="write it with torch.export.save(torch.export.export(module, (example,)), path), without extras",
        ) from error
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
    if example.is_complex():
        raise Unsupported(
            "the model takes complex numbers", number=str(example.dtype), action="split them in two"
        )
    if example.dim() == 0 or example.shape[0] == 0:
        raise WrongUse(
            "axis 0 of the example is the batch, of one or more", number=f"shape {tuple(example.shape)}"
        )
    return example.detach().to("cpu", torch.float32 if example.is_floating_point() else example.dtype)


def _copied(torch: Any, module: Any, mode: str | None) -> Any:
    """A float32 copy on the CPU, in the wanted mode."""
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if value.is_quantized or value.dtype in (torch.int8, torch.uint8) or value.is_complex():
            raise Unsupported(
                "the model is quantised or complex already",
                where=name,
                number=str(value.dtype),
                action="bring the float model",
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
        value = self.entry.meta["val"]
        self.env[self.entry] = self.b.input(value.shape, whole=not value.dtype.is_floating_point)

    def _call(self, node: Any) -> Any:
        """What a node's result is; LOST where it could not be taken."""
        name = _name(node.target)
        self.b.where, self.b.stem = _where(node), _stem(node)
        args, kwargs = (_map(lambda n: self._given(n, name), v) for v in (node.args, node.kwargs))
        if name == "getitem":
            if args[0] is LOST:
                return LOST
            if isinstance(args[0], tuple) and args[1] >= len(args[0]):
                self._fail(name, Untaken("the statistics of a batch norm that is used twice"))
                return LOST
            return args[0][args[1]]
        leaves = list(_leaves((args, tuple(kwargs.values()))))
        taken = name in TABLE or not hasattr(node.target, "_schema")
        if any(leaf is LOST for leaf in leaves):
            if not taken:
                self._fail(name, Untaken("this operator is not known here"))
            return LOST
        try:
            if not hasattr(node.target, "_schema"):
                return self._python(node, args, kwargs)
            if (
                not any(isinstance(leaf, (Ref, Dim, c.Erf, c.Compared)) for leaf in leaves)
                and name not in RANDOM
            ):
                return _folded(node.target, args, kwargs)
            if not taken:
                raise Untaken("this operator is not known here")
            return TABLE[name](self.b, _bound(node.target, args, kwargs))
        except Untaken as error:
            self._fail(name, error)
        except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as error:
            self._fail(name, Untaken(f"its arguments are not understood ({c.first_line(error)})"))
        return LOST

    def _given(self, node: Any, reader: str) -> Any:
        """What a node's result is to an operator; a comparison becomes a value where it is not read as one."""
        value = self.env.get(node, node)
        if isinstance(value, c.Compared) and reader not in COMPARED:
            value = self.env[node] = self.b.value(value)
        return value

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
    return full if full in TABLE else name


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
