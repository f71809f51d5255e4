"""Small models that need no other package, for the demonstration and for tests."""

from __future__ import annotations

import numpy as np

from .ir import Dim, Graph
from .ops import emit, verify

#: Module, input channels, output channels, stride: each a 3x3 convolution with batch norm and ReLU.
_STAGES = (("stem", 1, 8, 1), ("body", 8, 16, 2), ("tail", 16, 32, 2))
_DIGITS = (1, 8, 8)  # C, H, W
_CLASSES = 10


def digits_cnn(seed: int = 0) -> Graph:
    """An untrained network for the embedded digits: x (N, 1, 8, 8) -> logits (N, 10), about 7,000 weights.

    Modules stem, body, tail and head; weights from `seed` (He et al., 2015, arXiv 1502.01852). Batch norm
    runs on batch statistics; `grad.predict_graph` gives the network as it predicts, to adapt at batch 1.

    >>> graph = digits_cnn()
    >>> graph.shape(graph.outputs["output"]), sum(v.type.size for v in graph.parameters().values())
    ((N, 10), 7234)
    """
    random = np.random.default_rng(seed)
    graph = Graph()
    x = graph.input("x", (Dim(1, 1), *_DIGITS))
    for module, inputs, outputs, stride in _STAGES:
        drawn = random.standard_normal((outputs, inputs, 3, 3)) * np.sqrt(2 / (9 * inputs))
        weight = graph.persistent(f"{module}.conv.weight", drawn)
        x = emit(
            graph,
            "conv",
            x,
            weight,
            name=f"{module}.conv",
            stride=(stride, stride),
            before=(1, 1),
            after=(1, 1),
            dilation=(1, 1),
        )
        norm = [
            graph.persistent(f"{module}.norm.weight", np.ones(outputs)),
            graph.persistent(f"{module}.norm.bias", np.zeros(outputs)),
            graph.persistent(f"{module}.norm.running_mean", np.zeros(outputs), "state"),
            graph.persistent(f"{module}.norm.running_var", np.ones(outputs), "state"),
        ]
        x, *_ = emit(graph, "batch_norm_train", x, *norm, name=f"{module}.norm")
        x = emit(graph, "relu", x, name=f"{module}.relu")
    features = int(np.prod(graph.shape(x)[1:]))
    x = emit(graph, "reshape", x, name="flatten", shape=(Dim(1, 1), features))
    bound = 1 / np.sqrt(features)
    weight = graph.persistent("head.weight", random.uniform(-bound, bound, (_CLASSES, features)))
    bias = graph.persistent("head.bias", np.zeros(_CLASSES))
    graph.outputs["output"] = emit(graph, "matmul", x, weight, bias, name="head", tb=1)
    return verify(graph)
