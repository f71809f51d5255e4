"""ONNX Runtime training (on-device training API). Its four artifacts are made ahead of time from a plain ONNX graph.

Batch norm on given statistics has no gradient there, so it is written as a product and a sum, which have.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import plain
import worker

OPSET = 17


def without_torch() -> None:
    """Its package imports torch at its top, which neither artifacts nor the API need: import them past it."""
    import onnxruntime

    package = types.ModuleType("onnxruntime.training")
    package.__path__ = [str(Path(onnxruntime.__file__).parent / "training")]
    sys.modules[package.__name__] = package


class Ops:
    """The operations of plain.py as nodes of an ONNX graph; a value is (name, shape without the batch)."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.nodes: list[Any] = []
        self.arrays = arrays  # initializers

    def emit(self, op, *inputs, shape, more=(), **attributes):
        from onnx import helper

        name = f"v{len(self.nodes)}"
        outputs = [name, *(f"{name}_{kept}" for kept in more)]
        self.nodes.append(
            helper.make_node(op, list(inputs), outputs, name=f"n{len(self.nodes)}", **attributes)
        )
        return name, shape

    def constant(self, value):
        name = f"c{len(self.arrays)}"
        self.arrays[name] = np.asarray(value)
        return name

    def conv(self, x, w, b=None, stride=1, pads=None, depthwise=False):
        kernel = self.arrays[w].shape
        n = len(kernel) - 2
        pads = ((0, 0),) * n if pads is None else tuple(q if isinstance(q, tuple) else (q, q) for q in pads)
        space = [(s + sum(q) - k) // stride + 1 for s, q, k in zip(x[1][1:], pads, kernel[2:], strict=True)]
        return self.emit(
            "Conv",
            *(x[0], w, *((b,) if b else ())),
            shape=(kernel[0], *space),
            kernel_shape=list(kernel[2:]),
            strides=[stride] * n,
            pads=[q[0] for q in pads] + [q[1] for q in pads],
            group=x[1][0] if depthwise else 1,
        )

    def norm(self, x, p, at):
        per_channel = (-1, *[1] * (len(x[1]) - 1))
        for name in ("weight", "bias"):
            self.arrays[f"{at}.{name}"] = self.arrays[f"{at}.{name}"].reshape(per_channel)
        deviation = np.sqrt(p.statistics[f"{at}.running_var"] + np.float32(plain.EPS)).reshape(per_channel)
        mean = self.constant(p.statistics[f"{at}.running_mean"].reshape(per_channel) / deviation)
        y, _ = self.emit("Div", x[0], self.constant(deviation), shape=x[1])
        y, _ = self.emit("Sub", y, mean, shape=x[1])
        y, _ = self.emit("Mul", y, f"{at}.weight", shape=x[1])
        return self.emit("Add", y, f"{at}.bias", shape=x[1])

    def avg_pool(self, x, k):
        """By a mean over a reshape: the gradient of AveragePool fails at run time or ends the process."""
        c, h, w = x[1]
        parts = self.reshape(x, (c, h // k, k, w // k, k))
        return self.emit("ReduceMean", parts[0], shape=(c, h // k, w // k), axes=[3, 5], keepdims=0)

    def max_pool(self, x, k):
        n = len(x[1]) - 1
        shape = (x[1][0], *(s // k for s in x[1][1:]))
        return self.emit("MaxPool", x[0], shape=shape, kernel_shape=[k] * n, strides=[k] * n)

    def mean(self, x):
        return self.emit("ReduceMean", x[0], shape=x[1][:1], axes=list(range(2, len(x[1]) + 1)), keepdims=0)

    def mean_tokens(self, x):
        return self.emit("ReduceMean", x[0], shape=x[1][1:], axes=[1], keepdims=0)

    def reshape(self, x, shape):
        return self.emit("Reshape", x[0], self.constant(np.array([-1, *shape], np.int64)), shape=shape)

    def flatten(self, x):
        return self.reshape(x, (int(np.prod(x[1])),))

    def tokens(self, x):
        c, s = x[1][0], int(np.prod(x[1][1:]))
        return self.emit("Transpose", self.reshape(x, (c, s))[0], shape=(s, c), perm=[0, 2, 1])

    def pad_channels(self, x, extra):
        n = len(x[1])
        pads = self.constant(np.array([0] * (n + 2) + [extra] + [0] * (n - 1), np.int64))
        return self.emit("Pad", x[0], pads, shape=(x[1][0] + extra, *x[1][1:]))

    def attention(self, qkv, heads):
        tokens, width = qkv[1][0], qkv[1][1] // 3
        size = width // heads
        parts = []
        for i in range(3):
            ends = [self.constant(np.array([v], np.int64)) for v in (i * width, (i + 1) * width, 2)]
            part = self.emit("Slice", qkv[0], *ends, shape=(tokens, width))
            split = self.reshape(part, (tokens, heads, size))
            perm, shape = (
                ([0, 2, 3, 1], (heads, size, tokens)) if i == 1 else ([0, 2, 1, 3], (heads, tokens, size))
            )
            parts.append(self.emit("Transpose", split[0], shape=shape, perm=perm))
        q, k, v = parts
        scores, _ = self.emit("MatMul", q[0], k[0], shape=(heads, tokens, tokens))
        scores, shape = self.emit(
            "Mul", scores, self.constant(np.float32(size**-0.5)), shape=(heads, tokens, tokens)
        )
        y, _ = self.emit("MatMul", self.emit("Softmax", scores, shape=shape, axis=-1)[0], v[0], shape=v[1])
        y = self.emit("Transpose", y, shape=(tokens, heads, size), perm=[0, 2, 1, 3])
        return self.reshape(y, (tokens, width))

    def layer_norm(self, x, w, b):
        kept = ("mean", "deviation")  # optional outputs that its gradient reads
        return self.emit("LayerNormalization", x[0], w, b, shape=x[1], more=kept, axis=-1, epsilon=plain.EPS)

    def linear(self, x, w, b):
        if len(x[1]) == 1:
            return self.emit("Gemm", x[0], w, b, shape=(len(self.arrays[b]),), transB=1)
        turned, _ = self.emit("Transpose", w, shape=(), perm=[1, 0])
        y, _ = self.emit("MatMul", x[0], turned, shape=())
        return self.emit("Add", y, b, shape=(*x[1][:-1], len(self.arrays[b])))

    def gelu(self, x):
        y, _ = self.emit("Mul", x[0], self.constant(np.float32(0.5**0.5)), shape=x[1])
        y, _ = self.emit("Erf", y, shape=x[1])
        y, _ = self.emit("Add", y, self.constant(np.float32(1)), shape=x[1])
        y, _ = self.emit("Mul", x[0], y, shape=x[1])
        return self.emit("Mul", y, self.constant(np.float32(0.5)), shape=x[1])

    def leaky_relu(self, x, slope):
        return self.emit("LeakyRelu", x[0], shape=x[1], alpha=slope)

    def add(self, a, b):
        return self.emit("Add", a[0], b if isinstance(b, str) else b[0], shape=a[1])

    def relu(self, x):
        return self.emit("Relu", x[0], shape=x[1])

    def relu6(self, x):
        ends = [self.constant(np.float32(v)) for v in (0, 6)]
        return self.emit("Clip", x[0], *ends, shape=x[1])

    def tanh(self, x):
        return self.emit("Tanh", x[0], shape=x[1])

    def sigmoid(self, x):
        return self.emit("Sigmoid", x[0], shape=x[1])


class _Names(dict):
    """Parameter name -> initializer of that name; the statistics, which become constants, beside them."""

    def __init__(self, parameters, statistics):
        super().__init__({k: k for k in parameters})
        self.statistics = statistics


def prepare(job: worker.Job) -> None:
    import onnx

    without_torch()
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime.training import artifacts

    x, _, parameters, statistics = job.arrays()
    o = Ops(dict(parameters))
    z, shape = plain.NETS[job.net](o, _Names(parameters, statistics), ("x", x.shape[1:]))
    graph = helper.make_graph(
        o.nodes,
        job.net,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *x.shape[1:]])],
        [helper.make_tensor_value_info(z, TensorProto.FLOAT, ["N", *shape])],
        [numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in o.arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    onnx.checker.check_model(model)
    artifacts.generate_artifacts(
        model,
        requires_grad=job.learn,
        frozen_params=[k for k in o.arrays if k not in job.learn],
        loss={
            "cross_entropy": artifacts.LossType.CrossEntropyLoss,
            "binary_cross_entropy": artifacts.LossType.BCEWithLogitsLoss,
        }[job.loss],
        optimizer={"sgd": artifacts.OptimType.SGD, "adamw": artifacts.OptimType.AdamW}[job.optimizer],
        artifact_directory=_folder(job, make=True),
    )


def _folder(job: worker.Job, make: bool = False) -> Path:
    folder = Path(job.folder) / "onnxruntime"
    if make:
        folder.mkdir(exist_ok=True)
    return folder


def build(job: worker.Job) -> worker.Step:
    without_torch()
    from onnxruntime import SessionOptions
    from onnxruntime.training.api import CheckpointState, Module, Optimizer

    x, y = job.arrays()[:2]
    folder, options = _folder(job), SessionOptions()
    options.intra_op_num_threads = job.threads
    state = CheckpointState.load_checkpoint(folder / "checkpoint")
    net = Module(folder / "training_model.onnx", state, folder / "eval_model.onnx", session_options=options)
    optimizer = Optimizer(folder / "optimizer_model.onnx", net)
    optimizer.set_learning_rate(job.lr)
    net.train()

    def step() -> float:
        loss = net(x, y)
        optimizer.step()
        net.lazy_reset_grad()
        return float(loss)

    return step


if __name__ == "__main__":
    worker.main(build, prepare)
