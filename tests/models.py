"""Torch models of the kinds that users bring, for whole-model tests. Small, so that float64 references are quick."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

import acclimate

torch = pytest.importorskip("torch", reason="torch is not installed (the test extra)")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402


class Residual(nn.Module):
    """Pre-activation block whose shortcut pools and pads channels: gradients must add up at every fan-out."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(c_out), nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.grow = c_out - c_in

    def forward(self, x):
        y = self.conv1(F.relu(self.bn1(x)))
        y = self.conv2(F.relu(self.bn2(y)))
        if self.grow:
            x = F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 0, self.grow))
        return x + y


class ResidualNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(Residual(8, 8, 1), Residual(8, 16, 2), Residual(16, 16, 1))
        self.bn, self.head = nn.BatchNorm2d(16), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(F.relu(self.bn(self.blocks(self.stem(x)))).mean((2, 3)))


class PostActivation(nn.Module):
    """A residual block that ends in its activation, a norm without one, and a stretched sum."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU())
        self.a, self.bn_a = nn.Conv2d(6, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6)
        self.b, self.bn_b = nn.Conv2d(6, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6)
        self.shift = nn.Parameter(torch.randn(6, 1, 1))
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(x + self.bn_b(self.b(F.relu(self.bn_a(self.a(x))))))
        return self.head(F.relu(self.norm(F.relu6(x + self.shift).mean((2, 3)))))


class Inverted(nn.Module):
    """Expand, depthwise, project, with ReLU6 and a skip."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.body = nn.Sequential(
            nn.Conv2d(8, 24, 1, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU6(),
            nn.Conv2d(24, 24, 5, 1, 2, groups=24, bias=False),
            nn.BatchNorm2d(24),
            nn.Hardswish(),
            nn.Conv2d(24, 8, 1, bias=False),
            nn.BatchNorm2d(8),
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.body(x)).mean((2, 3)))


class Signal(nn.Module):
    """One-dimensional, multi-label, even kernels with 'same' padding, dilation and a max-pooled shortcut."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv1d(4, 8, 8, padding="same", bias=False)
        self.bn = nn.BatchNorm1d(8)
        self.b = nn.Conv1d(8, 12, 5, 2, 4, dilation=2)
        self.short = nn.Conv1d(8, 12, 1)
        self.head = nn.Linear(12 * 16, 3)

    def forward(self, x):
        x = F.silu(self.bn(self.a(x)))
        y = self.b(x) + self.short(F.max_pool1d(x, 2))
        return self.head(F.elu(y).flatten(1))


class Attention(nn.Module):
    def __init__(self, dim=16, heads=2):
        super().__init__()
        self.patch = nn.Conv2d(1, dim, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 9, dim) * 0.02)
        self.block = nn.TransformerEncoderLayer(
            dim, heads, 2 * dim, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 6)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.block(x))[:, 1:].mean(1))


class Tied(nn.Module):
    """An autoencoder whose decoder is the encoder's transposed weight."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(20, 8)
        self.bias = nn.Parameter(torch.zeros(20))

    def forward(self, x):
        return F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.t(), self.bias)


class Branches(nn.Module):
    """Concatenation, splitting, grouped convolution, softplus gating, average pooling with uncounted padding."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, (1, 5), padding=(0, 2), groups=2)
        self.c = nn.Conv2d(8, 8, 3, 2, 1, groups=4)
        self.pool = nn.AvgPool2d(3, 2, 1, count_include_pad=False)
        self.head = nn.Linear(8 * 3 * 2, 3)

    def forward(self, x):
        y = torch.cat([torch.sigmoid(self.a(x)), F.leaky_relu(self.b(x), 0.2)], 1)
        u, v = self.c(y).chunk(2, 1)
        return self.head(self.pool(torch.cat([u * F.softplus(v), v], 1)).flatten(1))


def classic():
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, padding=2),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Flatten(),
        nn.Linear(54, 12),
        nn.Dropout(0.0),
        nn.LeakyReLU(0.1),
        nn.Linear(12, 4),
    )


#: name -> (constructor, input shape with batch 1, outputs, loss)
MODELS = {
    "classic": (classic, (1, 1, 14, 14), 4, "cross_entropy"),
    "residual": (ResidualNet, (1, 3, 12, 12), 5, "cross_entropy"),
    "post": (PostActivation, (1, 2, 7, 9), 4, "cross_entropy"),
    "inverted": (Inverted, (1, 3, 16, 16), 4, "cross_entropy"),
    "signal": (Signal, (1, 4, 32), 3, "binary_cross_entropy"),
    "attention": (Attention, (1, 1, 12, 12), 6, "cross_entropy"),
    "tied": (Tied, (1, 20), 20, "mse"),
    "branches": (Branches, (1, 2, 9, 8), 3, "cross_entropy"),
}


def make(name, train=False, seed=0):
    """The module with batch statistics that are not trivial, and its example input."""
    torch.manual_seed(seed)
    build, shape, _, _ = MODELS[name]
    net = build()
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    return net.train(train), torch.zeros(shape)


@cache
def exported(name, train=False):
    """(module, Graph): exported once for all tests, which change neither."""
    net, example = make(name, train)
    return net, acclimate.from_torch(net, example)


def batch(name, n, seed=0):
    """Random x and y as numpy arrays."""
    _, shape, outputs, loss = MODELS[name]
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, *shape[1:])).astype(np.float32)
    if loss == "cross_entropy":
        return x, rng.integers(0, outputs, n)
    if loss == "mse":
        return x, rng.normal(size=(n, outputs)).astype(np.float32)
    return x, (rng.random((n, outputs)) > 0.6).astype(np.float32)


def torch_loss(name, out, y):
    y = torch.as_tensor(y)
    kind = MODELS[name][3]
    if kind == "cross_entropy":
        return F.cross_entropy(out, y)
    y = y.to(out.dtype)
    return F.mse_loss(out, y) if kind == "mse" else F.binary_cross_entropy_with_logits(out, y)
