"""JAX: the whole step under jit, parameters donated; channels first, or with the option, last."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import plain
import worker
from jax import lax


class Ops:
    """The operations of plain.py. `last`: channels are the last axis, and kernels are (..., in, out)."""

    def __init__(self, last: bool) -> None:
        self.last = last

    def _space(self, x: Any) -> tuple[int, ...]:
        return tuple(range(1, x.ndim - 1)) if self.last else tuple(range(2, x.ndim))

    def _channels(self, v: Any, x: Any) -> Any:
        return v if self.last else v.reshape(-1, *[1] * (x.ndim - 2))

    def conv(self, x, w, b=None, stride=1, pads=None, depthwise=False):
        n = x.ndim - 2
        pads = ((0, 0),) * n if pads is None else tuple(q if isinstance(q, tuple) else (q, q) for q in pads)
        space = "HW"[-n:]
        layout = (
            (f"N{space}C", f"{space}IO", f"N{space}C")
            if self.last
            else (f"NC{space}", f"OI{space}", f"NC{space}")
        )
        groups = x.shape[-1 if self.last else 1] if depthwise else 1
        y = lax.conv_general_dilated(
            x, w, (stride,) * n, pads, dimension_numbers=layout, feature_group_count=groups
        )
        return y if b is None else y + self._channels(b, y)

    def norm(self, x, p, at):
        scale = p[at + ".weight"] * lax.rsqrt(p[at + ".running_var"] + plain.EPS)
        shift = p[at + ".bias"] - p[at + ".running_mean"] * scale
        return x * self._channels(scale, x) + self._channels(shift, x)

    def _pool(self, x, k, start, function):
        window = tuple(k if i in self._space(x) else 1 for i in range(x.ndim))
        return lax.reduce_window(x, start, function, window, window, "VALID")

    def avg_pool(self, x, k):
        return self._pool(x, k, 0.0, lax.add) / k ** (x.ndim - 2)

    def max_pool(self, x, k):
        return self._pool(x, k, -jnp.inf, lax.max)

    def mean(self, x):
        return x.mean(self._space(x))

    def flatten(self, x):
        return (jnp.moveaxis(x, -1, 1) if self.last else x).reshape(len(x), -1)

    def tokens(self, x):
        return x.reshape(len(x), -1, x.shape[-1]) if self.last else x.reshape(*x.shape[:2], -1).swapaxes(1, 2)

    def pad_channels(self, x, extra):
        return jnp.pad(x, [(0, extra if i == (x.ndim - 1 if self.last else 1) else 0) for i in range(x.ndim)])

    def attention(self, qkv, heads):
        n, tokens, width = qkv.shape
        q, k, v = jnp.unstack(qkv.reshape(n, tokens, 3, heads, width // 3 // heads), axis=2)
        return jax.nn.dot_product_attention(q, k, v).reshape(n, tokens, width // 3)

    def layer_norm(self, x, w, b):
        centred = x - x.mean(-1, keepdims=True)
        return centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + plain.EPS) * w + b

    def linear(self, x, w, b):
        return x @ w.T + b

    def mean_tokens(self, x):
        return x.mean(1)

    def gelu(self, x):
        return jax.nn.gelu(x, approximate=False)

    def leaky_relu(self, x, slope):
        return jax.nn.leaky_relu(x, slope)

    add, relu, relu6 = staticmethod(jnp.add), staticmethod(jax.nn.relu), staticmethod(jax.nn.relu6)
    tanh, sigmoid = staticmethod(jnp.tanh), staticmethod(jax.nn.sigmoid)


def build(job: worker.Job) -> worker.Step:
    o, net = Ops(bool(job.options.get("channels_last"))), plain.NETS[job.net]
    x, y, parameters, fixed = job.arrays()
    if o.last:
        if x.ndim < 3:
            raise ValueError("channels last is a layout of images and signals, and this net takes none")
        x = jnp.moveaxis(jnp.asarray(x), 1, -1)
        parameters = {
            k: v.transpose(*range(2, v.ndim), 1, 0) if _is_kernel(k, v) else v for k, v in parameters.items()
        }
    x, y = jnp.asarray(x), jnp.asarray(y)
    fixed = {k: jnp.asarray(v) for k, v in {**parameters, **fixed}.items() if k not in job.learn}
    learned = {k: jnp.asarray(parameters[k]) for k in job.learn}

    def loss_of(learned, x, y):
        z = net(o, {**fixed, **learned}, x)
        if job.loss == "cross_entropy":
            return -jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], 1).mean()
        return (jnp.maximum(z, 0) - z * y + jnp.log1p(jnp.exp(-jnp.abs(z)))).mean()

    def sgd(learned, moments, gradients):
        return jax.tree.map(lambda w, g: w - job.lr * g, learned, gradients), moments

    def adamw(learned, moments, gradients):
        mean, variance, t = moments
        t = t + 1
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, gradients)
        variance = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, variance, gradients)

        def new(w, m, v):
            root = jnp.sqrt(v / (1 - 0.999**t)) + 1e-8
            return w * (1 - 0.01 * job.lr) - job.lr * m / (1 - 0.9**t) / root

        return jax.tree.map(new, learned, mean, variance), (mean, variance, t)

    zeros = {k: jnp.zeros_like(v) for k, v in learned.items()}
    moments = () if job.optimizer == "sgd" else (zeros, {k: v + 0 for k, v in zeros.items()}, jnp.zeros(()))
    update = {"sgd": sgd, "adamw": adamw}[job.optimizer]

    def whole(learned, moments, x, y):
        loss, gradients = jax.value_and_grad(loss_of)(learned, x, y)
        return *update(learned, moments, gradients), loss

    compiled = jax.jit(whole, donate_argnums=(0, 1))

    def step() -> float:
        nonlocal learned, moments
        learned, moments, loss = compiled(learned, moments, x, y)
        jax.block_until_ready((learned, moments))
        return float(loss)

    return step


def _is_kernel(name: str, value: Any) -> bool:
    """Whether a parameter is a convolution's weight; those of linear layers have two axes."""
    return name.endswith("weight") and value.ndim > 2


if __name__ == "__main__":
    worker.main(build)
