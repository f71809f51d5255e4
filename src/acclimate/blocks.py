"""Blocks: integer convolutions that follow one another become one op, of whose inner tensors only a few rows exist.

Done to what does not learn and is not saved for backward, only where memory asks for it: an op for each convolution is
quicker, as it works on whole planes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .ir import Graph, Node, Value
from .ops import TABLE, infer, verify
from .ops.quantized import MAX_STAGES, block_attrs

PIXELS = (256, 128, 64, 32, 16, 0)  # of a channel that a convolution makes at once, if there is room


@dataclass(frozen=True)
class Run:
    """Convolutions of which each alone reads the one before, and the addition of the first one's input at the end."""

    nodes: tuple[Node, ...]
    add: Node | None = None


def _joins(graph: Graph, node: Node) -> bool:
    """Whether a node can be part of a block."""
    return (
        node.op == "q_conv"
        and not node.outputs[1]
        and not any(node.inputs[5:])
        and all(not n or graph.values[n].kind == "constant" for n in node.inputs[1:])
        and len(graph.shape(node.inputs[0])) == 4
        and tuple(node.attrs["dilation"]) == (1, 1)
    )


def runs(graph: Graph) -> list[Run]:
    """All of a graph, in order, each as long as can be."""
    uses, kept = graph.consumers(), set(graph.outputs.values())
    found, taken = [], set[int]()
    for node in graph.nodes:
        if id(node) in taken or not _joins(graph, node):
            continue
        nodes, add = [node], None
        while len(uses[nodes[-1].outputs[0]]) == 1 and nodes[-1].outputs[0] not in kept:
            after = uses[nodes[-1].outputs[0]][0]
            if _joins(graph, after) and after.inputs[0] == nodes[-1].outputs[0]:
                nodes.append(after)
                continue
            if after.op == "q_add" and not after.outputs[1] and node.inputs[0] in after.inputs:
                add = after
            break
        taken |= {id(n) for n in nodes}
        found.append(Run(tuple(nodes), add))
    return found


def _tables(node: Node, graph: Graph) -> np.ndarray:
    """(3, O) int32: bias, multiplier and shift."""
    bias, multiplier, shift = (np.asarray(graph.values[n].data) if n else None for n in node.inputs[2:5])
    assert multiplier is not None and shift is not None
    return np.stack([np.zeros_like(multiplier) if bias is None else bias, multiplier, shift])


def _block(graph: Graph, run: Run, first: int, end: int, pixels: int) -> tuple[dict, Node | None]:
    """Attributes of convolutions first to end - 1 as one op, and the addition if it is a part of it."""
    nodes = run.nodes[first:end]
    add = run.add if first == 0 and end == len(run.nodes) else None
    sizes = [graph.shape(n.outputs[0])[2:] for n in nodes]
    rows = tuple(max(1, min(pixels // width, height)) for height, width in sizes)
    swapped = add is not None and add.inputs[0] != nodes[-1].outputs[0]
    return block_attrs([n.attrs for n in nodes], rows, None if add is None else add.attrs, swapped), add


def _bytes(graph: Graph, run: Run, first: int, end: int, pixels: int) -> int:
    """Bytes alive while convolutions first to end - 1 run: as one op, or the only one as it is."""
    nodes = run.nodes[first:end]
    used = {nodes[0].inputs[0], nodes[-1].outputs[0]}
    if run.add is not None:
        used.add(run.nodes[0].inputs[0])
    total = sum(graph.type(n).size_bytes for n in used)
    if len(nodes) == 1:
        return total
    types = [graph.type(nodes[0].inputs[0])]
    for node in nodes:
        weight = graph.type(node.inputs[1])
        types += [weight, replace(weight, shape=(3, weight.shape[0]), dtype="i32")]
    attrs, _ = _block(graph, run, first, end, pixels)
    return total + infer(TABLE["q_block"], attrs, types)[1].size_bytes


def _cut(graph: Graph, run: Run, room_bytes: int) -> list[tuple[int, int]]:
    """Where to cut a run: the fewest convolutions in blocks that fit the room, or the least bytes where none do."""
    best: list[tuple[int, int, list[tuple[int, int]]]] = [(0, 0, [])]
    for end in range(1, len(run.nodes) + 1):
        ways = []
        for first in range(max(0, end - MAX_STAGES), end):
            most, fused, pieces = best[first]
            size = max(most, _bytes(graph, run, first, end, 0), room_bytes)
            ways.append((size, fused + (end - first if end - first > 1 else 0), [*pieces, (first, end)]))
        best.append(min(ways, key=lambda way: way[:2]))
    return [piece for piece in best[-1][2] if piece[1] - piece[0] > 1]


def fuse(graph: Graph, room_bytes: int = 0) -> Graph:
    """Blocks where convolutions one by one take more than `room_bytes`, of as many rows at once as fit there.

    The same integers. room_bytes 0: as few bytes as can be.
    """
    made: dict[int, Node] = {}
    gone: set[int] = set()
    new = graph.copy()
    for run in runs(graph):
        for first, end in _cut(graph, run, room_bytes):
            nodes = run.nodes[first:end]
            pixels = next((p for p in PIXELS if _bytes(graph, run, first, end, p) <= room_bytes), 0)
            attrs, add = _block(graph, run, first, end, pixels)
            last = add or nodes[-1]
            inputs = [nodes[0].inputs[0]]
            for node in nodes:
                inputs += [
                    node.inputs[1],
                    new.constant(f"{node.outputs[0]}.table", _tables(node, graph), "i32"),
                ]
            types = infer(TABLE["q_block"], attrs, [new.type(n) for n in inputs])
            work = new.add(Value(new.fresh(f"{last.outputs[0]}.rows"), types[1]))
            made[id(last)] = Node("q_block", tuple(inputs), (last.outputs[0], work), attrs, last.where)
            gone |= {id(n) for n in nodes} - {id(last)}
    new.nodes = [made.get(id(n), n) for n in graph.nodes if id(n) not in gone]
    used = {n for node in new.nodes for n in (*node.inputs, *node.outputs)} | set(new.outputs.values())
    new.values = {k: v for k, v in new.values.items() if k in used or k in set(new.inputs.values())}
    return verify(new, "making blocks of convolutions")
