"""Every forward row that torch knows, against torch: value and gradient, in float64."""

import functools

import numpy as np
import pytest
from cases import SMOOTH, arrays, case_id, dtype_of

torch = pytest.importorskip("torch", reason="torch is not installed (the test extra)")
from torch.nn import functional as F  # noqa: E402

from acclimate.grad import differentiate  # noqa: E402
from acclimate.ir import Graph  # noqa: E402
from acclimate.ops import TABLE, emit, evaluate  # noqa: E402


def _axes(a, x):
    return [i for i in range(x.ndim) if a["axes"] >> i & 1]


def _padded(a, x, value=0.0):
    pairs = list(zip(a["before"], a["after"], strict=True))
    return F.pad(x, [v for pair in reversed(pairs) for v in pair], value=value)


def _conv(a, x, w, b=None):
    fn = F.conv1d if x.ndim == 3 else F.conv2d
    return fn(_padded(a, x), w, b, a["stride"], 0, a["dilation"], a["groups"])


def _conv_transpose(a, d, w):
    """By the definition: the gradient of a convolution."""
    x = torch.zeros((d.shape[0], w.shape[1] * a["groups"], *a["size"]), dtype=d.dtype, requires_grad=True)
    return torch.autograd.grad(_conv(a, x, w), x, d, create_graph=True)[0]


def _max_pool(a, x):
    fn = F.max_pool1d if x.ndim == 3 else F.max_pool2d
    return fn(_padded(a, x, float("-inf")), a["kernel"], a["stride"], 0, a["dilation"])


def _avg_pool(a, x):
    if any(a["extra"]) or a["before"] != a["after"]:
        pytest.skip("torch has this only in ceil mode; the finite differences cover it")
    fn = F.avg_pool1d if x.ndim == 3 else F.avg_pool2d
    return fn(x, a["kernel"], a["stride"], a["before"], False, bool(a["include_pad"]))


def _slice(a, x):
    for i, (s, t, n) in enumerate(zip(a["start"], a["step"], a["size"], strict=True)):
        x = x[(slice(None),) * i + (slice(s, s + (n - 1) * t + 1, t),)]
    return x


def _matmul(a, x, y, b=None):
    out = (x.mT if a["ta"] else x) @ (y.mT if a["tb"] else y)
    return out if b is None else out + b


def _masked(a, z, y):
    keep = y >= 0 if a["masked"] else torch.ones_like(y, dtype=torch.bool)
    return F.binary_cross_entropy_with_logits(z[keep], y[keep])


def _recurrent(kind, a, x, w_ih, w_hh, b_ih=None, b_hh=None, *states):
    """The layer's outputs; torch has no backward direction alone, and GRU's reset gate after the product only."""
    if a.get("reset_after") == 0:
        pytest.skip("torch has no such GRU; the finite differences cover it")
    x = x.flip(1) if a["reverse"] else x
    zero = x.new_zeros(len(x), w_hh.shape[1])
    states = [(zero if s is None else s)[None] for s in (*states, None, None)[: 1 + (kind == "lstm")]]
    weights = [w for w in (w_ih, w_hh, b_ih, b_hh) if w is not None]
    fn = getattr(torch, ("rnn_relu" if a["relu"] else "rnn_tanh") if kind == "rnn" else kind)
    state = states if kind == "lstm" else states[0]
    y = fn(x, state, weights, len(weights) == 4, 1, 0.0, False, False, True)[0]
    return y.flip(1) if a["reverse"] else y


def _fake_quant(a, x, scale):
    """Rounding as a constant that is added, so that the gradient goes past it; the scale's is a part (LSQ)."""
    axis, high = a["axis"], a["high"] - a["zero"]
    gain = 1 / (x.numel() / scale.numel() * high) ** 0.5
    scale = scale * gain + (scale * (1 - gain)).detach()
    scale = scale.reshape([-1 if i == axis else 1 for i in range(x.ndim)]) if len(scale) > 1 else scale
    v = x / scale
    whole = torch.sign(v) * torch.floor(v.abs() + 0.5)
    return ((v + (whole - v).detach()).clamp(a["low"] - a["zero"], high)) * scale


TORCH = {
    "fake_quant": _fake_quant,
    **{kind: functools.partial(_recurrent, kind) for kind in ("lstm", "gru", "rnn")},
    "relu": lambda a, x: F.relu(x),
    "hard_tanh": lambda a, x: F.hardtanh(x, a["low"], a["high"]),
    "leaky_relu": lambda a, x: F.leaky_relu(x, a["slope"]),
    "sigmoid": lambda a, x: torch.sigmoid(x),
    "tanh": lambda a, x: torch.tanh(x),
    "gelu": lambda a, x: F.gelu(x, approximate="tanh" if a["tanh"] else "none"),
    "silu": lambda a, x: F.silu(x),
    "hard_swish": lambda a, x: F.hardswish(x),
    "hard_sigmoid": lambda a, x: F.hardsigmoid(x),
    "elu": lambda a, x: F.elu(x, a["alpha"]),
    "softplus": lambda a, x: F.softplus(x),
    "exp": lambda a, x: torch.exp(x),
    "log": lambda a, x: torch.log(x),
    "sqrt": lambda a, x: torch.sqrt(x),
    "pow": lambda a, x: torch.pow(x, a["exponent"]),
    "erf": lambda a, x: torch.erf(x),
    "sin": lambda a, x: torch.sin(x),
    "round": lambda a, x: (torch.floor, torch.ceil, torch.round, torch.trunc)[a["mode"]](x),
    "square": lambda a, x: torch.square(x),
    "abs": lambda a, x: torch.abs(x),
    "reciprocal": lambda a, x: torch.reciprocal(x),
    "add": lambda a, x, y: x + y,
    "sub": lambda a, x, y: x - y,
    "mul": lambda a, x, y: x * y,
    "div": lambda a, x, y: x / y,
    "greater": lambda a, x, y: (x > y).to(x.dtype) + 0 * x * y,
    "keep": lambda a, x, y: torch.where(y.detach() != 0, x, 0.0),
    "affine": lambda a, x: x * a["scale"] + a["shift"],
    "sum": lambda a, x: x.sum(_axes(a, x), keepdim=bool(a["keep"])),
    "mean": lambda a, x: x.mean(_axes(a, x), keepdim=bool(a["keep"])),
    "conv": _conv,
    "conv_input_grad": _conv_transpose,
    "matmul": _matmul,
    "softmax": lambda a, x: torch.softmax(x, -1),
    "log_softmax": lambda a, x: torch.log_softmax(x, -1),
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "batch_norm": lambda a, x, g, b, m, v: F.batch_norm(x, m, v, g, b, False, 0.1, a["eps"]),
    "batch_norm_train": lambda a, x, g, b, m, v: F.batch_norm(
        x, m.clone(), v.clone(), g, b, True, 0.1, a["eps"]
    ),
    "layer_norm": lambda a, x, g=None, b=None: F.layer_norm(x, x.shape[-1:], g, b, a["eps"]),
    "reshape": lambda a, x: x.reshape(a["shape"]),
    "transpose": lambda a, x: x.permute(a["perm"]),
    "expand": lambda a, x: x.expand(a["shape"]),
    "concat": lambda a, *xs: torch.cat(xs, a["axis"]),
    "slice": _slice,
    "take": lambda a, x, index: x.index_select(a["axis"], index.long()),
    "embedding": lambda a, table, index: F.embedding(
        index.long(), table, padding_idx=a["padding"] if a["padding"] >= 0 else None
    ),
    "detach": lambda a, x: x.detach() + 0 * x,
    "pad": lambda a, x: _padded(a, x, a["value"]),
    "cross_entropy": lambda a, z, y, w=None: F.cross_entropy(z, y.long(), w, label_smoothing=a["smoothing"]),
    "binary_cross_entropy": _masked,
    "mse": lambda a, z, y: F.mse_loss(z, y),
}
#: rows with a gradient that torch has no equal of, and why
WITHOUT = {"dropout": "the random generator is ours; tests/test_models.py checks it"}


def test_every_differentiable_row_is_compared():
    rounded = {row.name for row in TABLE.values() if row.grad} - {row.name for row, _ in SMOOTH}
    assert {r.name for r in TABLE.values() if r.grad} == set(TORCH) | set(WITHOUT) | rounded


@pytest.mark.parametrize(("row", "example"), [c for c in SMOOTH if c[0].name in TORCH], ids=case_id)
def test_value_and_gradient(row, example):
    inputs = arrays(row, example, seed=7)
    learned = {
        i
        for i, a in enumerate(inputs)
        if a is not None
        and dtype_of(a) == "f32"
        and not (row.name.startswith("batch_norm") and i > 2)
        and not (row.name in ("cross_entropy", "mse") and i > 0)
        and not (row.name == "binary_cross_entropy" and i > 0)
        and not (row.name in ("keep", "embedding") and i == 1)
    }
    tensors = [
        None if a is None else torch.tensor(a, requires_grad=i in learned) for i, a in enumerate(inputs)
    ]
    attrs = row.fill(example.attrs)
    want = TORCH[row.name](attrs, *tensors)
    if row.clamps:
        want = want.clamp(attrs["low"], attrs["high"])
    r = torch.tensor(np.random.default_rng(1).normal(size=tuple(want.shape) or (1,)))
    (want.reshape(r.shape) * r).sum().backward()

    graph, names = Graph(), []
    for i, a in enumerate(inputs):
        names.append("" if a is None else graph.persistent(f"p{i}", a, "parameter", dtype_of(a)))
    out = emit(
        graph, row.name, *names, unused=() if row.name == "batch_norm_train" else None, **example.attrs
    )
    out = out[0] if isinstance(out, tuple) else out
    weighted = emit(graph, "mul", out, graph.constant("r", r.numpy()))
    loss = emit(graph, "reshape", emit(graph, "sum", weighted, axes=(1 << r.ndim) - 1), shape=(1,))
    grads = differentiate(graph, loss, [names[i] for i in sorted(learned)])
    env = evaluate(graph, {n: a for n, a in zip(names, inputs, strict=True) if n}, np.float64)
    np.testing.assert_allclose(
        env[out].reshape(r.shape), want.detach().numpy().reshape(r.shape), rtol=1e-6, atol=1e-6
    )
    for i in learned:
        got = env[grads[names[i]]] if grads[names[i]] else np.zeros(inputs[i].shape)
        np.testing.assert_allclose(got, tensors[i].grad.numpy(), rtol=1e-6, atol=1e-6, err_msg=f"input {i}")
