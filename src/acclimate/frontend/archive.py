"""Graphs as .npz files: an archive of plain arrays, one of which, `graph.json`, is the bytes of a JSON text.

    {"format": 1, "batch": 1, "inputs": {"x": name}, "outputs": {"output": name}, "aliases": {},
     "values": [{"name", "shape", "dtype", "kind", "data": key or null, "quant": {"scale": key, "zero": int} or null}],
     "nodes": [{"op", "inputs", "outputs", "attrs", "where"}]}

A dimension that scales with the batch is {"batch": coefficient}; a float that JSON cannot hold is the text "inf" or
"-inf". Nothing is unpickled. A file from anywhere is checked here once: every type, shape, name, attribute and op.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..data import read_arrays
from ..errors import AcclimateError, BadInput
from ..ir import DTYPES, Dim, Graph, Node, Quant, Type, Value, graph_of
from ..ops import TABLE, verify
from ..ops.row import MAX_RANK
from . import common as c
from .peers import CONFIG, published

FORMAT = 1
GRAPH = "graph.json"
MOST_NODES = 1 << 18
MOST_BATCH = 1 << 20
KINDS = ("input", "constant", "parameter", "state", "temp")
_HINT = "save the graph again with acclimate.save(graph, path)"


def save(graph: Graph, path: str | PathLike[str]) -> int:
    """Write a Graph, float or int8, to an .npz file that `load` reads; returns its bytes.

    The file is replaced as a whole. Raises BadInput for a path of another suffix.
    """
    file = Path(path)
    if file.suffix.lower() != ".npz":
        raise BadInput("a graph is saved as .npz", where=str(path), action=f"{file.stem}.npz")
    arrays: dict[str, np.ndarray] = {}

    def put(array: np.ndarray) -> str:
        key = f"a{len(arrays)}"
        arrays[key] = np.ascontiguousarray(array)
        return key

    values = []
    for v in graph_of(graph).values.values():
        quant = None if v.quant is None else {"scale": put(v.quant.scale), "zero": v.quant.zero}
        values.append(
            {
                "name": v.name,
                "shape": [_plain(s) for s in v.shape],
                "dtype": v.type.dtype,
                "kind": v.kind,
                "data": None if v.data is None else put(v.data),
                "quant": quant,
                "sparse": v.sparse,
            }
        )
    nodes = [
        {
            "op": n.op,
            "inputs": n.inputs,
            "outputs": n.outputs,
            "attrs": {k: _plain(a) for k, a in n.attrs.items()},
            "where": n.where,
        }
        for n in graph.nodes
    ]
    roles = {"inputs": graph.inputs, "outputs": graph.outputs, "aliases": graph.aliases}
    text = json.dumps({"format": FORMAT, "batch": graph.batch, **roles, "values": values, "nodes": nodes})
    out = io.BytesIO()
    np.savez_compressed(out, **arrays, **{GRAPH: np.frombuffer(text.encode(), np.uint8)})  # type: ignore[arg-type]
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        part.write_bytes(out.getvalue())
        os.replace(part, file)
    except OSError as error:
        raise BadInput(
            "the graph could not be written",
            where=str(path),
            number=error.strerror or str(error),
            action="check the folder and the free space; the old file is as it was",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return len(out.getvalue())


def _plain(value: Any) -> Any:
    if isinstance(value, Dim):
        return {"batch": value.coefficient}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else repr(float(value))
    return int(value)


def load_archive(path: str | PathLike[str], classes: int | None = None, seed: int = 0) -> Graph:
    """The Graph of an .npz file: one that `save` wrote, or a published int8 network (see `peers`).

    classes, seed: of a published network, replace its classifier by a fresh one.
    """
    file = c.check_file(path, ".npz")
    arrays, names = read_arrays(file, None, _HINT)
    found = [n for n in (GRAPH, CONFIG) if n in names]
    if len(found) != 1 or not all(isinstance(a, np.ndarray) for a in arrays.values()):
        raise BadInput(
            "the archive holds no graph",
            where=str(file),
            number=f"it has {', '.join(names[:8]) or 'nothing'}",
            action=_HINT,
        )
    try:
        told = json.loads(arrays.pop(found[0]).astype(np.uint8).tobytes().decode())
        if found == [CONFIG]:
            return published(told, arrays, classes, seed)
        if classes is not None:
            raise BadInput("only a published network can be given other classes", action="leave classes= out")
        return _graph(told, arrays)
    except AcclimateError as error:
        error.where = f"{file}: {error.where}" if error.where else str(file)
        error.action = error.action or _HINT
        raise
    except (
        Exception
    ) as error:  # what a damaged text leads to: json, numpy and shape rules raise what they like
        raise BadInput(
            "this graph file is damaged", where=str(file), number=c.first_line(error), action=_HINT
        ) from error


def _whole(value: Any, low: int, high: int, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BadInput(f"{what} is out of range", number=f"{value!r}, from {low} to {high}"[:100])
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or len(value) > 4096:
        raise BadInput(f"{what} is no name", number=repr(value)[:60])
    return value


def _roles(value: Any, what: str) -> dict[str, str]:
    return {_text(k, what): _text(v, what) for k, v in dict(value).items()}


def _read(value: Any, batch: int, depth: int = 0) -> Any:
    """An attribute or a shape back from JSON."""
    if isinstance(value, list) and depth < 3:
        return tuple(_read(v, batch, depth + 1) for v in value)
    if isinstance(value, dict) and set(value) == {"batch"}:
        return Dim(_whole(value["batch"], 1, 2**31 - 1, "a dimension"), batch)
    if isinstance(value, str) and value in ("inf", "-inf", "nan"):
        return float(value)
    if isinstance(value, float) and math.isfinite(value):
        return value
    return _whole(value, -(2**31), 2**32 - 1, "an attribute")


def _graph(told: Any, arrays: Mapping[str, np.ndarray]) -> Graph:
    if told.get("format") != FORMAT:
        raise BadInput(
            "the graph was saved by another version",
            number=f"format {told.get('format')!r}, this one reads {FORMAT}",
            action="save it again with this version",
        )
    batch = _whole(told["batch"], 1, MOST_BATCH, "the batch")
    graph = Graph(
        batch, inputs=_roles(told["inputs"], "an input"), outputs=_roles(told["outputs"], "an output")
    )
    if len(told["values"]) > 4 * MOST_NODES or len(told["nodes"]) > MOST_NODES:
        raise BadInput("the graph is too large", number=f"{len(told['nodes'])} nodes, at most {MOST_NODES}")
    for v in told["values"]:
        graph.add(_value(v, batch, arrays))
    for n in told["nodes"]:
        graph.nodes.append(_node(n, batch))
    graph.aliases = _roles(told["aliases"], "an alias")
    inputs = {n for n, v in graph.values.items() if v.kind == "input"}
    if inputs != set(graph.inputs.values()) or not inputs or "output" not in graph.outputs:
        raise BadInput(
            "a graph's inputs and output must be named", number=f"{graph.inputs} {graph.outputs}"[:200]
        )
    if any(
        not v.shape or not isinstance(v.shape[0], Dim) for v in graph.values.values() if v.kind == "input"
    ):
        raise BadInput(
            "axis 0 of an input must be the batch", number=str([str(graph.type(n)) for n in inputs])
        )
    if any(graph.values[n].kind != "parameter" for n in graph.aliases.values()):
        raise BadInput("an alias must name a parameter", number=str(graph.aliases)[:100])
    made = {n for node in graph.nodes for n in node.outputs}
    loose = [n for n, v in graph.values.items() if v.kind == "temp" and n not in made]
    if loose:
        raise BadInput("a value is never made", where=loose[0])
    return verify(graph, "loading")


def _value(told: Any, batch: int, arrays: Mapping[str, np.ndarray]) -> Value:
    name, kind, dtype = (_text(told[k], k) for k in ("name", "kind", "dtype"))
    shape = _read(told["shape"], batch)
    if kind not in KINDS or dtype not in DTYPES or not isinstance(shape, tuple) or len(shape) > MAX_RANK:
        raise BadInput("a value is not understood", where=name, number=f"{kind}, {dtype}, {shape}"[:100])
    for size in shape:
        _whole(int(size) if isinstance(size, Dim) else size, 0, 2**31 - 1, "a dimension")
    if math.prod(shape) >= 2**31:
        raise BadInput("a value is too large", where=name, number=str(shape))
    data = None
    if (told["data"] is None) != (kind in ("input", "temp")):
        raise BadInput("a value's data do not suit its kind", where=name, number=kind)
    if told["data"] is not None:
        data = arrays[_text(told["data"], "data")]
        if data.dtype != np.dtype(DTYPES[dtype]) or data.shape != tuple(int(s) for s in shape):
            raise BadInput(
                "a value's data are of another type", where=name, number=f"{data.dtype}{data.shape}"
            )
        data = np.array(data, order="C")
    quant = None
    if told["quant"] is not None:
        scale = arrays[_text(told["quant"]["scale"], "scale")]
        zero = _whole(told["quant"]["zero"], -128, 127, "a zero point")
        one_each = shape[0] if shape and kind != "input" else 1
        good = scale.dtype == np.float32 and scale.ndim == 1 and scale.size in (1, one_each)
        if dtype not in ("i8", "i32") or not good or not (np.isfinite(scale) & (scale > 0)).all():
            raise BadInput(
                "a scale must be positive, one or one a channel", where=name, number=f"{scale.shape}"
            )
        quant = Quant(scale, zero)
    elif kind in ("input", "parameter") and dtype == "i8":
        raise BadInput("an int8 value has no scale", where=name)
    sparse = bool(_whole(int(told.get("sparse", False)), 0, 1, "sparse"))
    if sparse and (kind != "parameter" or dtype != "f32"):
        raise BadInput("only a float parameter is sparse", where=name, number=f"{kind}, {dtype}")
    return Value(name, Type(shape, dtype), kind, data, quant, sparse=sparse)


def _node(told: Any, batch: int) -> Node:
    op = _text(told["op"], "an op")
    row = TABLE.get(op)
    if row is None or row.updates:
        raise BadInput("no op of a model is called that", number=repr(op)[:60])
    attrs = row.fill({_text(k, "an attribute"): _read(v, batch) for k, v in dict(told["attrs"]).items()})
    for name, attr in row.attrs.items():
        value = attrs[name]
        if attr.kind == "f":
            fits = isinstance(value, (int, float))
        elif attr.kind == "i":
            fits = isinstance(value, int)
        elif attr.kind == "-":
            fits = True
        else:
            fits = (
                isinstance(value, tuple)
                and len(value) <= attr.words
                and all(isinstance(v, int) for v in value)
            )
        if not fits:
            raise BadInput(f"attribute {name} of {op} is of another kind", number=repr(value)[:60])
    inputs, outputs = (tuple(_text(n, f"{op}'s {k}") for n in told[k]) for k in ("inputs", "outputs"))
    return Node(op, inputs, outputs, attrs, _text(told["where"], "where"))
