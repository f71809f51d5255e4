"""The nets of ../nets.py for peers that do not take torch modules: functions over a few operations of theirs.

`o` supplies the operations, `p` maps torch's parameter names to the peer's tensors. That both definitions are the
same net is checked by every run of the benchmark: all peers must have the same losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def mlp(o: Any, p: Mapping[str, Any], x: Any) -> Any:
    x = o.relu(o.linear(o.flatten(x), p["1.weight"], p["1.bias"]))
    return o.linear(x, p["3.weight"], p["3.bias"])


def lenet(o: Any, p: Mapping[str, Any], x: Any) -> Any:
    x = o.avg_pool(o.tanh(o.conv(x, p["0.weight"], p["0.bias"], pads=(2, 2))), 2)
    x = o.max_pool(o.sigmoid(o.conv(x, p["3.weight"], p["3.bias"])), 2)
    x = o.leaky_relu(o.linear(o.flatten(x), p["7.weight"], p["7.bias"]), 0.1)
    return o.linear(x, p["9.weight"], p["9.bias"])


def resnet26(o: Any, p: Mapping[str, Any], x: Any) -> Any:
    x = o.conv(x, p["conv1.weight"], pads=(1, 1))
    for layer, width in ((1, 16), (2, 32), (3, 64)):
        for block in range(4):
            at, stride = f"layer{layer}.{block}.", 2 if layer > 1 and block == 0 else 1
            y = o.conv(o.relu(o.norm(x, p, at + "bn1")), p[at + "conv1.weight"], stride=stride, pads=(1, 1))
            y = o.conv(o.relu(o.norm(y, p, at + "bn2")), p[at + "conv2.weight"], pads=(1, 1))
            x = o.add(y, o.pad_channels(o.avg_pool(x, 2), width // 2) if stride == 2 else x)
    return o.linear(o.mean(o.relu(o.norm(x, p, "bn"))), p["fc.weight"], p["fc.bias"])


def mobilenet(o: Any, p: Mapping[str, Any], x: Any) -> Any:
    x = o.relu6(o.norm(o.conv(x, p["stem.0.weight"], stride=2, pads=(1, 1)), p, "stem.1"))
    for i, (kernel, stride, skip) in enumerate(((3, 1, 1), (5, 2, 0), (3, 1, 1), (7, 2, 0), (3, 1, 1))):
        at = f"blocks.{i}."
        y = o.relu6(o.norm(o.conv(x, p[at + "expand.0.weight"]), p, at + "expand.1"))
        y = depthwise(o, y, p[at + "depthwise.0.weight"], kernel // 2, stride)
        y = o.relu6(o.norm(y, p, at + "depthwise.1"))
        y = o.norm(o.conv(y, p[at + "project.0.weight"]), p, at + "project.1")
        x = o.add(x, y) if skip else y
    return o.linear(o.mean(x), p["head.weight"], p["head.bias"])


def depthwise(o: Any, x: Any, weight: Any, pad: int, stride: int = 1) -> Any:
    return o.conv(x, weight, stride=stride, pads=(pad, pad), depthwise=True)


def dscnn(o: Any, p: Mapping[str, Any], x: Any) -> Any:
    x = o.conv(x, p["stem.0.weight"], stride=2, pads=((5, 5), (1, 1)))
    x = o.relu(o.norm(x, p, "stem.1"))
    for i in range(0, 24, 6):
        x = o.relu(o.norm(depthwise(o, x, p[f"body.{i}.weight"], 1), p, f"body.{i + 1}"))
        x = o.relu(o.norm(o.conv(x, p[f"body.{i + 3}.weight"]), p, f"body.{i + 4}"))
    return o.linear(o.mean(x), p["head.weight"], p["head.bias"])


def ecg(o: Any, p: Mapping[str, Any], x: Any) -> Any:
    same = ((7, 8),)  # torch's "same" for a kernel of 16
    x = o.relu(o.norm(o.conv(x, p["conv.weight"], pads=same), p, "bn"))
    for at in ("blocks.0.", "blocks.1."):
        y = o.relu(o.norm(o.conv(x, p[at + "conv1.weight"], pads=same), p, at + "bn1"))
        y = o.conv(y, p[at + "conv2.weight"], stride=4, pads=((6, 6),))
        short = o.conv(o.max_pool(x, 4), p[at + "short.weight"])
        x = o.relu(o.norm(o.add(y, short), p, at + "bn2"))
    return o.linear(o.flatten(x), p["head.weight"], p["head.bias"])


def vit(o: Any, p: Mapping[str, Any], x: Any) -> Any:
    x = o.add(o.tokens(o.conv(x, p["patch.weight"], p["patch.bias"], stride=4)), p["position"])
    for at in ("blocks.0.", "blocks.1."):
        qkv = _linear(o, _layer_norm(o, x, p, at + "norm1"), p, at + "qkv")
        x = o.add(x, _linear(o, o.attention(qkv, 3), p, at + "out"))
        y = o.gelu(_linear(o, _layer_norm(o, x, p, at + "norm2"), p, at + "up"))
        x = o.add(x, _linear(o, y, p, at + "down"))
    return _linear(o, o.mean_tokens(_layer_norm(o, x, p, "norm")), p, "head")


def _linear(o: Any, x: Any, p: Mapping[str, Any], at: str) -> Any:
    return o.linear(x, p[at + ".weight"], p[at + ".bias"])


def _layer_norm(o: Any, x: Any, p: Mapping[str, Any], at: str) -> Any:
    return o.layer_norm(x, p[at + ".weight"], p[at + ".bias"])


#: name -> logits(o, parameters and statistics, x)
NETS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (mlp, lenet, resnet26, mobilenet, dscnn, ecg, vit)
}
EPS = 1e-5  # of batch and layer norms, as torch has it
