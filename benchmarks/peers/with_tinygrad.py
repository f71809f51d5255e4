"""tinygrad on its CPU back end (which compiles its kernels with clang), the whole step under TinyJit."""

from __future__ import annotations

import os
from typing import Any

import plain
import worker


class Ops:
    """The operations of plain.py, channels first."""

    def conv(self, x, w, b=None, stride=1, pads=None, depthwise=False):
        n = x.ndim - 2
        pads = ((0, 0),) * n if pads is None else tuple(q if isinstance(q, tuple) else (q, q) for q in pads)
        if any(map(any, pads)):
            x = x.pad((None, None, *pads))
        return x.conv2d(w, b, groups=x.shape[1] if depthwise else 1, stride=stride)

    def norm(self, x, p, at):
        scale = p[at + ".weight"] * (p[at + ".running_var"] + plain.EPS).rsqrt()
        shift = p[at + ".bias"] - p[at + ".running_mean"] * scale
        per_channel = (1, -1, *[1] * (x.ndim - 2))
        return x * scale.reshape(per_channel) + shift.reshape(per_channel)

    def avg_pool(self, x, k):
        return x.avg_pool2d((k,) * (x.ndim - 2))

    def max_pool(self, x, k):
        return x.max_pool2d((k,) * (x.ndim - 2))

    def mean(self, x):
        return x.mean(tuple(range(2, x.ndim)))

    def flatten(self, x):
        return x.flatten(1)

    def tokens(self, x):
        return x.flatten(2).transpose(1, 2)

    def pad_channels(self, x, extra):
        return x.pad((None, (0, extra), *[None] * (x.ndim - 2)))

    def attention(self, qkv, heads):
        n, tokens, width = qkv.shape
        q, k, v = qkv.reshape(n, tokens, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4).chunk(3)
        y = q[0].scaled_dot_product_attention(k[0], v[0])
        return y.transpose(1, 2).reshape(n, tokens, width // 3)

    def layer_norm(self, x, w, b):
        return x.layernorm(eps=plain.EPS) * w + b

    def linear(self, x, w, b):
        return x.linear(w.T, b)

    def mean_tokens(self, x):
        return x.mean(1)

    def gelu(self, x):
        return x * 0.5 * (1 + (x * 0.5**0.5).erf())

    def leaky_relu(self, x, slope):
        return x.leaky_relu(slope)

    def add(self, a, b):
        return a + b

    def relu(self, x):
        return x.relu()

    def relu6(self, x):
        return x.relu6()

    def tanh(self, x):
        return x.tanh()

    def sigmoid(self, x):
        return x.sigmoid()


def build(job: worker.Job) -> worker.Step:
    os.environ |= {"DEV": "CPU", "NUM_CPU_THREADS": str(job.threads), "TRAINING": "1"}
    from tinygrad import Device, Tensor, TinyJit
    from tinygrad.nn.optim import SGD, AdamW

    o, net = Ops(), plain.NETS[job.net]
    x, y, parameters, statistics = job.arrays()
    x, y = Tensor(x).realize(), Tensor(y).realize()
    p = {k: Tensor(v).realize() for k, v in {**parameters, **statistics}.items()}
    for name, t in p.items():
        t.requires_grad = name in job.learn
    optimizer = {"sgd": SGD, "adamw": AdamW}[job.optimizer]([p[k] for k in job.learn], lr=job.lr)

    @TinyJit
    def whole() -> Any:
        optimizer.zero_grad()
        z = net(o, p, x)
        loss = (
            z.sparse_categorical_crossentropy(y)
            if job.loss == "cross_entropy"
            else z.binary_crossentropy_logits(y)
        )
        loss.backward()
        return loss.realize(*optimizer.schedule_step())

    def step() -> float:
        loss = whole()
        Device[Device.DEFAULT].synchronize()
        return float(loss.item())

    return step


if __name__ == "__main__":
    worker.main(build)
