"""The float64 twin of an int8 graph in torch: gradients by definition, to hold ours against.

Each integer op becomes real arithmetic on what its integers stand for, plus a constant that makes its value the integer
one, so that the forward pass agrees exactly and autograd's gradient is the straight-through one; where a clamp held an
output back that constant is all there is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from acclimate.ir import Graph
from acclimate.ops import TABLE, evaluate


def ratio(multiplier: int, shift: int) -> float:
    return multiplier * 2.0 ** (shift - 31)


def scales(graph: Graph) -> dict[str, tuple[float, int]]:
    """(scale, zero) of every int8 value."""
    found: dict[str, tuple[float, int]] = {}
    for value in graph.values.values():
        if value.kind == "input" and value.quant is not None:
            found[value.name] = (float(value.quant.scale[0]), value.quant.zero)
    for node in graph.nodes:
        a = node.attrs
        if "x_scale" in a:
            found[node.inputs[0]], found[node.outputs[0]] = (
                (a["x_scale"], a["x_zero"]),
                (a["y_scale"], a["y_zero"]),
            )
        elif node.op == "q_add":
            most = 2 * max(found[n][0] for n in node.inputs)
            found[node.outputs[0]] = (most / 2**20 / ratio(a["y_multiplier"], a["y_shift"]), a["y_zero"])
        elif node.op == "q_rescale":
            found[node.outputs[0]] = (
                found[node.inputs[0]][0] / ratio(a["multiplier"], a["shift"]),
                a["y_zero"],
            )
        elif node.op in ("q_avg_pool", "reshape") and node.inputs[0] in found:
            found[node.outputs[0]] = found[node.inputs[0]]
    return found


def twin(graph: Graph, x: np.ndarray) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(parameters as what they stand for, logits) for int8 samples x; float64."""
    env = evaluate(graph, {graph.inputs["x"]: x})
    known, leaves = scales(graph), {}
    for name, value in graph.parameters().items():
        assert value.quant is not None
        leaves[name] = torch.tensor(value.quant.real(env[name]).astype(np.float64), requires_grad=True)
    given: dict[str, Any] = dict(leaves)

    def real(name: str) -> torch.Tensor:
        if name not in given:
            scale, zero = known[name]
            given[name] = torch.tensor((env[name].astype(np.float64) - zero) * scale)
        return given[name]

    for node in graph.nodes:
        a, y = node.attrs, node.outputs[0]
        if node.op == "reshape":
            given[y] = real(node.inputs[0]).reshape(tuple(graph.shape(y)))
            continue
        if node.op == "dequantize":
            given[y] = real(node.inputs[0])
            continue
        if node.op == "q_conv":
            assert tuple(a["before"]) == tuple(a["after"])
            conv = torch.nn.functional.conv1d if len(a["stride"]) == 1 else torch.nn.functional.conv2d
            weight = real(node.inputs[1])
            bias = real(node.inputs[2]) if node.inputs[2] else None
            v = conv(real(node.inputs[0]), weight, bias, a["stride"], a["before"], a["dilation"], a["groups"])
        elif node.op == "q_add":
            v = real(node.inputs[0]) + real(node.inputs[1])
        elif node.op == "q_rescale":
            v = real(node.inputs[0]) * 1
        elif node.op == "q_avg_pool":
            assert not any((*a["before"], *a["after"], *a["extra"]))
            v = torch.nn.functional.avg_pool2d(real(node.inputs[0]), a["kernel"], a["stride"])
        else:
            raise ValueError(f"the twin knows no {node.op}: extend benchmarks/twin.py")
        scale, zero = known[y]
        want = torch.tensor((env[y].astype(np.float64) - zero) * scale)
        results = TABLE[node.op].ref(a, *[env[n] if n else None for n in node.inputs])
        inside = torch.tensor(results[1]) if len(results) > 1 else torch.ones_like(want, dtype=torch.bool)
        away = float((want - v.detach())[inside].abs().max()) / scale
        assert away < 1.5, f"{node.op} {y} is {away:.2f} steps away"
        given[y] = torch.where(inside, v + (want - v).detach(), want)
    return leaves, given[graph.outputs["output"]]


def gradients(graph: Graph, x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """Of the mean cross entropy, for every parameter."""
    leaves, logits = twin(graph, x)
    torch.nn.functional.cross_entropy(logits, torch.as_tensor(y)).backward()
    return {name: leaf.grad.numpy() for name, leaf in leaves.items()}
