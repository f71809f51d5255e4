"""Small models and single layers, each with an input shape whose axis 0 is the batch."""

import copy
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from acclimate import ops
from acclimate.grad import differentiate


class Fn(nn.Module):
    """A function of x and of some layers, as a module."""

    def __init__(self, fn, *layers, **tensors):
        super().__init__()
        self.fn = fn
        self.layers = nn.ModuleList(layers)
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                setattr(self, name, tensor)
            else:
                self.register_buffer(name, tensor)

    def forward(self, x):
        extra = [*self.layers, *self._parameters.values(), *self._buffers.values()]
        return self.fn(x, *extra)


def par(*shape):
    return nn.Parameter(torch.randn(*shape))


# -- whole models --------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Pre-activation block with a pooled, zero-padded shortcut."""

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


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.layer1 = nn.Sequential(Residual(8, 8, 1), Residual(8, 16, 2))
        self.bn, self.fc = nn.BatchNorm2d(16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.layer1(self.conv1(x))
        return self.fc(F.avg_pool2d(F.relu(self.bn(x)), 4).flatten(1))


class Inverted(nn.Module):
    def __init__(self, c_in, c_out, stride, kernel=3):
        super().__init__()
        mid = c_in * 3
        self.body = nn.Sequential(
            nn.Conv2d(c_in, mid, 1, bias=False),
            nn.BatchNorm2d(mid),
            nn.ReLU6(),
            nn.Conv2d(mid, mid, kernel, stride, kernel // 2, groups=mid, bias=False),
            nn.BatchNorm2d(mid),
            nn.ReLU6(),
            nn.Conv2d(mid, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out),
        )
        self.skip = stride == 1 and c_in == c_out

    def forward(self, x):
        return x + self.body(x) if self.skip else self.body(x)


class MobileNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.blocks = nn.Sequential(Inverted(8, 8, 1), Inverted(8, 12, 2, 5))
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class KeywordNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, (10, 4), (2, 2), (5, 1), bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(F.adaptive_avg_pool2d(self.body(x), 1).flatten(1))


class ECGNet(nn.Module):
    """One-dimensional; "same" padding with an even kernel."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv1d(3, 8, 16, padding="same", bias=False), nn.BatchNorm1d(8), nn.ReLU()
        )
        self.pad, self.conv = nn.ConstantPad1d((6, 6), 0.0), nn.Conv1d(8, 12, 16, 4, bias=False)
        self.bn, self.short = nn.BatchNorm1d(12), nn.Conv1d(8, 12, 1, bias=False)
        self.head = nn.Linear(12 * 16, 6)

    def forward(self, x):
        x = self.stem(x)
        y = self.conv(self.pad(x))
        return self.head(F.relu(self.bn(y + self.short(F.max_pool1d(x, 4)))).flatten(1))


class ViT(nn.Module):
    def __init__(self, dim=24, heads=3, dropout=0.0):
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 16, dim) * 0.02)
        self.blocks = nn.ModuleList(
            [
                nn.TransformerEncoderLayer(
                    dim, heads, 2 * dim, dropout, "gelu", batch_first=True, norm_first=True
                )
                for _ in range(2)
            ]
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class ClassToken(nn.Module):
    """Attention written by hand, a class token that is repeated for each sample, a registered table."""

    def __init__(self, dim=16, heads=2):
        super().__init__()
        self.heads, self.embed = heads, nn.Linear(6, dim)
        self.token = par(1, 1, dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.register_buffer("table", torch.randn(9, dim))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 4)

    def forward(self, x):
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.embed(x)], 1) + self.table
        n, length, dim = x.shape
        q, k, v = (
            self.qkv(self.norm(x)).reshape(n, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        )
        weights = (q @ k.transpose(-2, -1) * (dim // self.heads) ** -0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(n, length, dim))
        return self.head(x[:, 0])


class WindowAttention(nn.Module):
    """One shifted-window block: windows become batch rows and go back; a learned bias is picked by constant indices."""

    def __init__(self, dim=12, heads=2, window=4):
        super().__init__()
        self.dim, self.heads, self.window = dim, heads, window
        self.embed, self.norm = nn.Conv2d(3, dim, 2, 2), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias = par((2 * window - 1) ** 2, heads)
        at = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        step = at[:, :, None] - at[:, None] + window - 1
        self.register_buffer("index", step[0] * (2 * window - 1) + step[1])
        self.head = nn.Linear(dim, 5)

    def forward(self, x):
        x = self.embed(x).permute(0, 2, 3, 1)
        n, h, w, dim = x.shape
        y = torch.roll(self.norm(x), (-2, -2), (1, 2))
        y = y.view(n, h // 4, 4, w // 4, 4, dim).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, dim)
        q, k, v = (
            self.qkv(y).reshape(-1, 16, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        )
        bias = self.bias[self.index.view(-1)].view(16, 16, -1).permute(2, 0, 1)
        a = (q @ k.transpose(-2, -1) * 0.4 + bias.unsqueeze(0)).softmax(-1)
        y = self.out((a @ v).transpose(1, 2).reshape(-1, 16, dim))
        y = y.view(-1, h // 4, w // 4, 4, 4, dim).permute(0, 1, 3, 2, 4, 5).reshape(-1, h, w, dim)
        return self.head((x + torch.roll(y, (2, 2), (1, 2))).flatten(1, 2).mean(1))


class ConvNeXt(nn.Module):
    """Depthwise convolution, layer norm on channels last, layer scale."""

    def __init__(self, dim=8):
        super().__init__()
        self.stem, self.dw = nn.Conv2d(3, dim, 4, 4), nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.gamma, self.head = par(dim), nn.Linear(dim, 5)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return self.head((x + y.permute(0, 3, 1, 2)).mean([-2, -1]))


class Shuffle(nn.Module):
    """Channel split, shuffle and squeeze-and-excitation."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16)
        self.branch, self.pool = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.MaxPool2d(3, 2, 1)
        self.squeeze, self.excite, self.head = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1), nn.Linear(16, 5)

    def forward(self, x):
        x = self.pool(F.silu(self.bn(self.stem(x))))
        a, b = x.chunk(2, 1)
        x = torch.cat([a, self.branch(b)], 1)
        n, c, h, w = x.size()
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
        scale = F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        return self.head((x * scale).mean([2, 3]))


class UNet(nn.Module):
    """Down, up, and a skip that is concatenated; an output of one map a class."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(3, 6, 3, padding=1),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.Conv2d(14, 4, 3, padding=1),
        )
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x):
        a = F.relu(self.a(x))
        b = F.relu(self.norm(self.b(F.max_pool2d(a, 2))))
        return self.c(torch.cat([a, F.interpolate(b, scale_factor=2.0)], 1))


class Mixer(nn.Module):
    """Products over tokens and over channels in turn."""

    def __init__(self, tokens=16, dim=12):
        super().__init__()
        self.patch, self.norm = nn.Linear(48, dim), nn.LayerNorm(dim)
        self.tokens, self.channels, self.head = (
            nn.Linear(tokens, tokens),
            nn.Linear(dim, dim),
            nn.Linear(dim, 5),
        )

    def forward(self, x):
        n = x.shape[0]
        x = x.reshape(n, 3, 4, 4, 4, 4)
        x = self.patch(x.permute(0, 2, 4, 3, 5, 1).reshape(n, 16, 48))
        x = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return self.head((x + F.gelu(self.channels(x))).mean(dim=1))


class Conformer(nn.Module):
    """Sequence convolution with gates, relative to attention over time on tokens first."""

    def __init__(self, dim=16):
        super().__init__()
        self.inp, self.dw, self.bn = (
            nn.Conv1d(6, 2 * dim, 1),
            nn.Conv1d(dim, dim, 7, padding=3, groups=dim),
            nn.BatchNorm1d(dim),
        )
        self.attention, self.norm = nn.MultiheadAttention(dim, 4), nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 5)

    def forward(self, x):
        x = F.silu(self.bn(self.dw(F.glu(self.inp(x), 1)))).permute(2, 0, 1)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head(x).log_softmax(-1).permute(1, 0, 2)


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5))


def lenet():
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 8, 5),
        nn.Sigmoid(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 12),
        nn.LeakyReLU(0.1),
        nn.Dropout(0.2),
        nn.Linear(12, 5),
    )


MODELS = {
    "mlp": (mlp, (1, 8, 8)),
    "lenet": (lenet, (1, 16, 16)),
    "resnet": (ResNet, (3, 8, 8)),
    "mobilenet": (MobileNet, (3, 16, 16)),
    "keyword": (KeywordNet, (1, 25, 10)),
    "ecg": (ECGNet, (3, 64)),
    "vit": (ViT, (3, 16, 16)),
    "class_token": (ClassToken, (8, 6)),
    "window_attention": (WindowAttention, (3, 16, 16)),
    "convnext": (ConvNeXt, (3, 16, 16)),
    "shuffle": (Shuffle, (3, 16, 16)),
    "unet": (UNet, (3, 8, 8)),
    "mixer": (Mixer, (3, 16, 16)),
    "conformer": (Conformer, (6, 20)),
}

# -- single layers ---------------------------------------------------------------------------------------------------

IMAGE, SEQUENCE, VECTOR, SIGNAL = (6, 8, 8), (10, 16), (12,), (6, 20)

LAYERS = {
    # name: (constructor, input shape without the batch)
    "conv_plain": (partial(nn.Conv2d, 6, 4, 3), IMAGE),
    "conv_geometry": (partial(nn.Conv2d, 6, 4, (3, 2), (2, 1), (1, 2), (1, 2), bias=False), IMAGE),
    "conv_groups": (partial(nn.Conv2d, 6, 4, 3, groups=2), IMAGE),
    "conv_depthwise": (partial(nn.Conv2d, 6, 12, 3, padding=1, groups=6), IMAGE),
    "conv_same_even": (partial(nn.Conv2d, 6, 4, (4, 3), padding="same"), IMAGE),
    "conv_valid": (partial(nn.Conv2d, 6, 4, 2, padding="valid"), IMAGE),
    "conv_circular": (partial(nn.Conv2d, 6, 4, 3, padding=1, padding_mode="circular"), IMAGE),
    "conv1d": (partial(nn.Conv1d, 6, 4, 5, 2, 2), SIGNAL),
    "conv1d_same_even": (partial(nn.Conv1d, 6, 4, 4, padding="same", dilation=3), SIGNAL),
    "linear": (partial(nn.Linear, 12, 5), VECTOR),
    "linear_no_bias": (partial(nn.Linear, 12, 5, bias=False), VECTOR),
    "linear_3d": (partial(nn.Linear, 16, 5), SEQUENCE),
    "linear_4d": (partial(nn.Linear, 8, 5), IMAGE),
    "matmul_weight": (lambda: Fn(lambda x, w: x @ w, w=par(16, 7)), SEQUENCE),
    "matmul_transposed": (lambda: Fn(lambda x, w: x @ w.t(), w=par(7, 16)), SEQUENCE),
    "addmm": (lambda: Fn(lambda x, w, v: torch.addmm(v, x, w), w=par(12, 7), v=par(7)), VECTOR),
    "addmm_scaled": (
        lambda: Fn(lambda x, w, v: torch.addmm(v, x, w, beta=0.5, alpha=2), w=par(12, 7), v=par(7)),
        VECTOR,
    ),
    "bmm": (lambda: Fn(lambda x: torch.bmm(x, x.transpose(1, 2))), SEQUENCE),
    "matmul_4d": (lambda: Fn(lambda x: x @ x.transpose(-1, -2)), IMAGE),
    "matmul_broadcast": (lambda: Fn(lambda x, w: w @ x, w=par(6, 3, 8)), IMAGE),
    "matmul_left": (lambda: Fn(lambda x, w: w @ x, w=par(3, 10)), SEQUENCE),
    "matmul_vector": (lambda: Fn(lambda x, w: x @ w, w=par(16)), SEQUENCE),
    "baddbmm": (
        lambda: Fn(lambda x, w: torch.baddbmm(w, x, x.transpose(1, 2), beta=2.0, alpha=0.5), w=par(10, 10)),
        SEQUENCE,
    ),
    "einsum": (lambda: Fn(lambda x: torch.einsum("nld,nmd->nlm", x, x)), SEQUENCE),
    "einsum_weight": (
        lambda: Fn(lambda x, w: torch.einsum("nld,hdk->nhlk", x, w), w=par(2, 16, 3)),
        SEQUENCE,
    ),
    "einsum_sum": (lambda: Fn(lambda x: torch.einsum("nld->nd", x)), SEQUENCE),
    "bn2d": (partial(nn.BatchNorm2d, 6), IMAGE),
    "bn1d": (partial(nn.BatchNorm1d, 6, eps=1e-3, momentum=0.3), SIGNAL),
    "bn_vector": (partial(nn.BatchNorm1d, 12), VECTOR),
    "bn_plain": (partial(nn.BatchNorm2d, 6, affine=False), IMAGE),
    "bn_no_statistics": (partial(nn.BatchNorm2d, 6, track_running_stats=False), IMAGE),
    "layer_norm": (partial(nn.LayerNorm, 16), SEQUENCE),
    "layer_norm_multi": (partial(nn.LayerNorm, (8, 8), eps=1e-3), IMAGE),
    "layer_norm_plain": (partial(nn.LayerNorm, 16, elementwise_affine=False), SEQUENCE),
    "layer_norm_no_bias": (partial(nn.LayerNorm, 16, bias=False), SEQUENCE),
    "rms_norm": (partial(nn.RMSNorm, 16), SEQUENCE),
    "group_norm": (partial(nn.GroupNorm, 2, 6), IMAGE),
    "group_norm_plain": (partial(nn.GroupNorm, 3, 6, affine=False), SIGNAL),
    "instance_norm": (partial(nn.InstanceNorm2d, 6, affine=True), IMAGE),
    "instance_norm_1d": (partial(nn.InstanceNorm1d, 6), SIGNAL),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(12, 5)), VECTOR),
    "normalize": (lambda: Fn(lambda x: F.normalize(x, dim=1)), VECTOR),
    # activations
    **{
        f.__name__: (f, VECTOR)
        for f in (
            nn.ReLU,
            nn.ReLU6,
            nn.Hardtanh,
            nn.LeakyReLU,
            nn.Sigmoid,
            nn.Tanh,
            nn.GELU,
            nn.SiLU,
            nn.Hardswish,
            nn.Hardsigmoid,
            nn.ELU,
            nn.CELU,
            nn.SELU,
            nn.Softplus,
            nn.LogSigmoid,
            nn.Mish,
            nn.Softsign,
            nn.Tanhshrink,
            nn.GLU,
            nn.Identity,
        )
    },
    "gelu_tanh": (partial(nn.GELU, approximate="tanh"), VECTOR),
    "gelu_by_hand": (lambda: Fn(lambda x: x * 0.5 * (1.0 + torch.erf(x / 2**0.5))), VECTOR),
    "gelu_by_hand_2": (lambda: Fn(lambda x: 0.5 * x * (torch.erf(x * 0.70710678) + 1)), VECTOR),
    "elu_alpha": (partial(nn.ELU, 0.5), VECTOR),
    "softplus_beta": (partial(nn.Softplus, 2.0), VECTOR),
    "prelu": (partial(nn.PReLU, 6), IMAGE),
    "prelu_one": (nn.PReLU, VECTOR),
    "threshold": (partial(nn.Threshold, 0.1, 0.1), VECTOR),
    "clamp": (lambda: Fn(lambda x: x.clamp(-0.3, 0.5)), VECTOR),
    "clamp_min": (lambda: Fn(lambda x: x.clamp(min=0)), VECTOR),
    "clamp_max": (lambda: Fn(lambda x: x.clamp(max=0.2)), VECTOR),
    "exp_log": (lambda: Fn(lambda x: torch.log(x.exp() + 1)), VECTOR),
    "sqrt_abs": (lambda: Fn(lambda x: x.abs().sqrt()), VECTOR),
    "rsqrt": (lambda: Fn(lambda x: (x * x + 1).rsqrt()), VECTOR),
    "neg_reciprocal": (lambda: Fn(lambda x: -(x.abs() + 1).reciprocal()), VECTOR),
    "powers": (lambda: Fn(lambda x: x**2 + x**3 - x**5), VECTOR),
    "powers_positive": (lambda: Fn(lambda x: (x.abs() + 1) ** 0.5 + (x.abs() + 1) ** -1.5 + 2.0**x), VECTOR),
    "softmax": (partial(nn.Softmax, -1), SEQUENCE),
    "softmax_axis": (partial(nn.Softmax, 1), IMAGE),
    "log_softmax": (partial(nn.LogSoftmax, 1), SEQUENCE),
    "logsumexp": (lambda: Fn(lambda x: x.logsumexp(1)), SEQUENCE),
    "where": (lambda: Fn(lambda x: torch.where(x > 0, x, 0.1 * x) + torch.where(x < 0.5, x, 0.5)), VECTOR),
    # pooling and resizing
    "max_pool": (partial(nn.MaxPool2d, 2), IMAGE),
    "max_pool_1d": (partial(nn.MaxPool1d, 3, 2, 1), SIGNAL),
    "max_pool_ceil": (partial(nn.MaxPool2d, 3, 2, 1, ceil_mode=True), IMAGE),
    "max_pool_dilated": (partial(nn.MaxPool2d, 2, 1, dilation=2), IMAGE),
    "avg_pool": (partial(nn.AvgPool2d, 2), IMAGE),
    "avg_pool_1d": (partial(nn.AvgPool1d, 4, 3, 1), SIGNAL),
    "avg_pool_ceil": (partial(nn.AvgPool2d, 3, 2, 1, ceil_mode=True), IMAGE),
    "avg_pool_no_pad": (partial(nn.AvgPool2d, 3, 2, 1, count_include_pad=False), IMAGE),
    "avg_pool_ceil_no_pad": (
        partial(nn.AvgPool2d, 3, 2, 1, ceil_mode=True, count_include_pad=False),
        (6, 7, 8),
    ),
    "adaptive_1": (partial(nn.AdaptiveAvgPool2d, 1), IMAGE),
    "adaptive_even": (partial(nn.AdaptiveAvgPool2d, (4, None)), IMAGE),
    "adaptive_odd": (partial(nn.AdaptiveAvgPool2d, (3, 5)), IMAGE),
    "adaptive_1d": (partial(nn.AdaptiveAvgPool1d, 7), SIGNAL),
    "adaptive_max": (partial(nn.AdaptiveMaxPool2d, 2), IMAGE),
    "upsample": (partial(nn.Upsample, scale_factor=2), IMAGE),
    "upsample_linear": (partial(nn.Upsample, scale_factor=2, mode="bilinear"), IMAGE),
    "pixel_shuffle": (partial(nn.PixelShuffle, 2), (8, 3, 4)),
    "unfold": (partial(nn.Unfold, 3, padding=1, stride=2), IMAGE),
    # reductions
    "mean_all_but_batch": (lambda: Fn(lambda x: x.mean((1, 2, 3), keepdim=True)), IMAGE),
    "mean_one": (lambda: Fn(lambda x: x.mean(-1)), IMAGE),
    "sum": (lambda: Fn(lambda x: x.sum((1, 3))), IMAGE),
    "var_std": (lambda: Fn(lambda x: x.var(1) + x.std(1, unbiased=False)), SEQUENCE),
    "max_min": (
        lambda: Fn(lambda x: x.amax(1) + x.amin(1) + x.max(1)[0] + x.amax((1, 2), keepdim=True)[:, 0]),
        SEQUENCE,
    ),
    "norm_1": (lambda: Fn(lambda x: x.norm(p=1, dim=1)), SEQUENCE),
    "cumsum": (lambda: Fn(lambda x: x.cumsum(1)), SEQUENCE),
    # arithmetic
    "scalars": (lambda: Fn(lambda x: 2 - (x * 3 + 1) / 4 - x), VECTOR),
    "scalar_over": (lambda: Fn(lambda x: 2 / (x * x + 1)), VECTOR),
    "alpha": (lambda: Fn(lambda x: torch.add(x, x * x, alpha=0.5) - torch.sub(x, 1, alpha=3)), VECTOR),
    "buffers": (
        lambda: Fn(lambda x, m, s: (x - m) / s, m=torch.randn(6, 1, 1), s=torch.rand(6, 1, 1) + 1),
        IMAGE,
    ),
    "scalar_parameter": (lambda: Fn(lambda x, g: x * g, g=nn.Parameter(torch.tensor(0.7))), VECTOR),
    "layer_scale": (lambda: Fn(lambda x, g: x + g * torch.tanh(x), g=par(16)), SEQUENCE),
    # transposed convolution
    "transposed": (partial(nn.ConvTranspose2d, 6, 4, 2, 2), IMAGE),
    "transposed_extra": (partial(nn.ConvTranspose2d, 6, 4, 3, 2, 1, output_padding=1), IMAGE),
    "transposed_geometry": (
        partial(nn.ConvTranspose2d, 6, 4, (3, 2), (2, 3), (1, 0), (1, 2), 2, dilation=(2, 1)),
        IMAGE,
    ),
    "transposed_long_extra": (partial(nn.ConvTranspose2d, 6, 4, 3, 1, 1, 1, dilation=2), IMAGE),
    "transposed_depthwise": (partial(nn.ConvTranspose2d, 6, 6, 4, 2, 1, groups=6, bias=False), IMAGE),
    "transposed_1d": (partial(nn.ConvTranspose1d, 6, 4, 5, 3, 2, 1), SIGNAL),
    "transposed_to_size": (
        lambda: Fn(lambda x, m: m(x, output_size=[16, 16]), nn.ConvTranspose2d(6, 4, 3, 2, 1)),
        IMAGE,
    ),
    # weights and statistics
    "standardised": (lambda: Standardised(6, 4, 3), IMAGE),
    "standardised_2": (lambda: Standardised2(6, 4, 3), IMAGE),
    "instance_norm_statistics": (
        lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True).eval(),
        IMAGE,
    ),
    "spectral_norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(12, 5)).eval(), VECTOR),
    "local_response_norm": (partial(nn.LocalResponseNorm, 3), IMAGE),
    "std_mean": (lambda: Fn(lambda x: torch.std_mean(x, 1)[0]), IMAGE),
    "norm_3": (lambda: Fn(lambda x: x.norm(p=3, dim=1)), IMAGE),
    "norm_inf": (lambda: Fn(lambda x: x.norm(p=float("inf"), dim=1)), IMAGE),
    "norm_matrix": (lambda: Fn(lambda x: torch.linalg.norm(x, dim=(2, 3))), IMAGE),
    "logsumexp_axes": (lambda: Fn(lambda x: x.logsumexp((1, 2))), SEQUENCE),
    "product": (lambda: Fn(lambda x: x.prod(1)), (5,)),
    # pooling and resizing to any size
    "adaptive_max_odd": (partial(nn.AdaptiveMaxPool2d, (3, 5)), IMAGE),
    "adaptive_max_1d": (partial(nn.AdaptiveMaxPool1d, 7), SIGNAL),
    "adaptive_up": (partial(nn.AdaptiveAvgPool2d, 12), IMAGE),
    "global_max_large": (partial(nn.AdaptiveMaxPool2d, 1), (1, 270, 260)),
    "max_long": (lambda: Fn(lambda x: x.amax(1)), (70000,)),
    "avg_pool_divisor": (partial(nn.AvgPool2d, 3, 2, 1, divisor_override=5), IMAGE),
    "lp_pool": (partial(nn.LPPool2d, 2, 2), IMAGE),
    "nearest_any": (partial(nn.Upsample, size=(11, 13)), IMAGE),
    "nearest_down": (lambda: Fn(lambda x: F.interpolate(x, scale_factor=0.5)), IMAGE),
    "nearest_exact": (lambda: Fn(lambda x: F.interpolate(x, size=(11, 5), mode="nearest-exact")), IMAGE),
    "bilinear_corners": (partial(nn.Upsample, scale_factor=2, mode="bilinear", align_corners=True), IMAGE),
    "bilinear_size": (lambda: Fn(lambda x: F.interpolate(x, size=(5, 11), mode="bilinear")), IMAGE),
    "bilinear_factor": (lambda: Fn(lambda x: F.interpolate(x, scale_factor=1.3, mode="bilinear")), IMAGE),
    "linear_1d": (partial(nn.Upsample, scale_factor=2, mode="linear"), SIGNAL),
    "bicubic": (partial(nn.Upsample, scale_factor=2, mode="bicubic"), IMAGE),
    "area": (lambda: Fn(lambda x: F.interpolate(x, size=(4, 5), mode="area")), IMAGE),
    "pixel_unshuffle": (partial(nn.PixelUnshuffle, 2), IMAGE),
    "channel_shuffle_layer": (partial(nn.ChannelShuffle, 3), IMAGE),
    # powers and elementary functions
    "power_any": (lambda: Fn(lambda x: F.relu(x) ** 1.7 + (x.abs() + 0.1) ** 0.3), VECTOR),
    "power_learned": (
        lambda: Fn(
            lambda x, p: F.avg_pool2d(x.clamp(min=1e-6).pow(p), 8).pow(1 / p),
            p=nn.Parameter(torch.ones(1) * 3),
        ),
        IMAGE,
    ),
    "sine": (lambda: Fn(lambda x: x + torch.sin(3 * x) ** 2 + torch.cos(x) + torch.tan(0.3 * x)), VECTOR),
    "erf": (lambda: Fn(torch.erf), VECTOR),
    "sinh": (lambda: Fn(lambda x: torch.sinh(x) + torch.cosh(x)), VECTOR),
    "rounded": (
        lambda: Fn(lambda x: x * x.floor() + x.round() + x.ceil() * x + x.trunc() + x.remainder(2.0)),
        VECTOR,
    ),
    "straight_through": (lambda: Fn(lambda x: x + (x.round() - x).detach()), VECTOR),
    "logaddexp": (lambda: Fn(lambda x: torch.logaddexp(x, -x) + torch.logit(x.sigmoid())), VECTOR),
    "softshrink": (partial(nn.Softshrink, 0.3), VECTOR),
    "hardshrink": (partial(nn.Hardshrink, 0.3), VECTOR),
    "prelu_negative": (partial(nn.PReLU, 6, -0.3), IMAGE),
    "leaky_relu_negative": (partial(nn.LeakyReLU, -0.3), VECTOR),
    "threshold_jump": (partial(nn.Threshold, 0.1, 5.0), VECTOR),
    # choices by the data
    "where_tensors": (lambda: Fn(lambda x: torch.where(x > x.mean(1, keepdim=True), x, -x)), VECTOR),
    "where_both": (
        lambda: Fn(lambda x: torch.where((x > -0.5) & (x <= 0.5) | (x < -2), x**2, 3 * x)),
        VECTOR,
    ),
    "where_not": (lambda: Fn(lambda x: torch.where(~(x >= 0), x**2, 3 * x)), VECTOR),
    "where_guarded": (lambda: Fn(lambda x: torch.where(x > 0.1, x.clamp(min=0.1).log(), 0.0)), VECTOR),
    "where_constant": (lambda: Fn(lambda x, m: torch.where(m, x, 0.0), m=torch.arange(12) % 2 == 0), VECTOR),
    "mask_as_number": (lambda: Fn(lambda x: x * (x > 0.2) + (x <= 0.1).float() * 2), VECTOR),
    "signs": (lambda: Fn(lambda x: x * torch.sign(x - 0.1)), VECTOR),
    "clamp_tensors": (lambda: Fn(lambda x, l: x.clamp(min=l, max=l + 1), l=par(12)), VECTOR),
    "masked_fill_data": (lambda: Fn(lambda x: x.masked_fill(x < 0, -1.0)), VECTOR),
    "masked_keys": (
        lambda: Fn(lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=(x[:, :, 0] < 1)[:, None, :])),
        SEQUENCE,
    ),
    "triangles": (lambda: Fn(lambda x: (x @ x.mT).triu(1) + (x @ x.mT).tril(-1)), SEQUENCE),
    # indices
    "index_pair": (lambda: Fn(lambda x: x[:, [0, 1, 2], [1, 2, 3]]), IMAGE),
    "index_apart": (
        lambda: Fn(lambda x, w: (x * w)[:, [0, 1, 2], :, [1, 2, 3]].transpose(0, 1), w=par(8)),
        IMAGE,
    ),
    "index_triangle": (
        lambda: Fn(lambda x: (x @ x.mT)[:, *torch.tril_indices(10, 10, -1)]),
        SEQUENCE,
    ),
    "gather": (
        lambda: Fn(lambda x: x.gather(1, torch.tensor([[0, 3, 5]]).expand(x.size(0), 3))),
        VECTOR,
    ),
    "embedding_large": (
        lambda: Fn(lambda x, e: x + e(torch.arange(100) * 7 % 500), nn.Embedding(500, 16)),
        (100, 16),
    ),
    "embedding_padding": (
        lambda: Fn(lambda x, e: x + e(torch.arange(10) % 4), nn.Embedding(20, 16, padding_idx=2)),
        SEQUENCE,
    ),
    "embedding_of_data": (
        lambda: Fn(
            lambda x, e: x[:, :8] + e((3 * x).abs().long()).mean(1), nn.Embedding(30, 8, padding_idx=1)
        ),
        VECTOR,
    ),
    "repeat_interleave": (lambda: Fn(lambda x: x.repeat_interleave(3, 1)), IMAGE),
    "windows": (lambda: Fn(lambda x: x.unfold(2, 4, 2)), SIGNAL),
    "rotate": (lambda: Fn(lambda x: torch.rot90(x, 1, [2, 3]) + x.flip([2, 3])), IMAGE),
    "difference": (lambda: Fn(lambda x: x.diff(dim=1)), VECTOR),
    # products
    "einsum_any_rank": (lambda: Fn(lambda x, w: torch.einsum("...d,dk->...k", x, w), w=par(16, 5)), SEQUENCE),
    "einsum_three": (
        lambda: Fn(lambda x, w, v: torch.einsum("nld,dk,kj->nlj", x, w, v), w=par(16, 5), v=par(5, 3)),
        SEQUENCE,
    ),
    "einsum_implied": (lambda: Fn(lambda x, w: torch.einsum("ald,dm", x, w), w=par(16, 5)), SEQUENCE),
    "einsum_attention": (
        lambda: Fn(
            lambda x: torch.einsum("bhqk,bkhd->bqhd", torch.einsum("bqhd,bkhd->bhqk", x, x).softmax(-1), x)
        ),
        IMAGE,
    ),
    "matmul_5d": (
        lambda: Fn(lambda x, w: x.unflatten(1, (2, 3)).unsqueeze(1) @ w, w=par(4, 1, 3, 8, 5)),
        IMAGE,
    ),
    "sdpa_grouped": (
        lambda: Fn(lambda x: F.scaled_dot_product_attention(x, x[:, :2], x[:, :2], enable_gqa=True)),
        IMAGE,
    ),
    "decoder_layer": (
        lambda: Fn(lambda x, m: m(x, x), nn.TransformerDecoderLayer(16, 4, 32, 0.0, batch_first=True)),
        SEQUENCE,
    ),
    "bilinear": (lambda: Fn(lambda x, m: m(x, x), nn.Bilinear(12, 12, 5)), VECTOR),
    "cosine_head": (
        lambda: Fn(lambda x, w: F.cosine_similarity(x[:, None], w[None], dim=-1), w=par(5, 12)),
        VECTOR,
    ),
    "distances": (lambda: Fn(lambda x, w: torch.cdist(x, w), w=par(5, 12)), VECTOR),
    "prototypes": (lambda: Fn(lambda x, w: -((x[:, None] - w[None]) ** 2).sum(-1), w=par(5, 12)), VECTOR),
    "maximum": (lambda: Fn(lambda x: torch.maximum(x, x * x) + torch.minimum(x, -x)), VECTOR),
    "addcmul_lerp": (
        lambda: Fn(lambda x: torch.addcmul(x, x, x, value=0.3) + torch.lerp(x, x * x, 0.25)),
        VECTOR,
    ),
    "arange": (lambda: Fn(lambda x: x + torch.arange(12)), VECTOR),
    # shapes
    "flatten": (nn.Flatten, IMAGE),
    "view": (lambda: Fn(lambda x: x.view(x.size(0), -1)), IMAGE),
    "view_minus": (lambda: Fn(lambda x: x.view(-1, 384)), IMAGE),
    "permute": (lambda: Fn(lambda x: x.permute(0, 3, 1, 2).contiguous().flatten(1)), IMAGE),
    "squeeze": (lambda: Fn(lambda x: x.unsqueeze(1).unsqueeze(-1).squeeze(1).squeeze()), VECTOR),
    "slices": (lambda: Fn(lambda x: x[:, 1:5:2, :-2, -3:]), IMAGE),
    "select": (lambda: Fn(lambda x: x[:, -1] + x[:, 2]), IMAGE),
    "narrow": (lambda: Fn(lambda x: x.narrow(1, 2, 3)), IMAGE),
    "chunk_cat": (lambda: Fn(lambda x: torch.cat(x.chunk(3, 1)[::-1], 1)), IMAGE),
    "split": (lambda: Fn(lambda x: x.split([2, 4], 1)[1]), IMAGE),
    "unbind": (lambda: Fn(lambda x: x.unbind(1)[2]), IMAGE),
    "stack": (lambda: Fn(lambda x: torch.stack([x, x * 2], 2)), SEQUENCE),
    "index": (lambda: Fn(lambda x: x[:, [0, 2, 5]]), IMAGE),
    "index_many": (lambda: Fn(lambda x, w: (x * w)[:, [i * 7 % 12 for i in range(40)]], w=par(12)), VECTOR),
    "embedding": (lambda: Fn(lambda x, e: x + e(torch.arange(10)), nn.Embedding(20, 16)), SEQUENCE),
    "flip_roll": (lambda: Fn(lambda x: x.flip(1) + x.roll(2, 2)), SEQUENCE),
    "repeat": (lambda: Fn(lambda x: x.repeat(1, 2, 3)), SEQUENCE),
    "expand": (lambda: Fn(lambda x: x.unsqueeze(1).expand(-1, 4, -1)), VECTOR),
    "pads": (lambda: Fn(lambda x: F.pad(x, (1, 2, -1, 3), value=0.5)), IMAGE),
    "pad_reflect": (lambda: Fn(lambda x: F.pad(x, (1, 2, 1, 1), mode="reflect")), IMAGE),
    "pad_replicate": (lambda: Fn(lambda x: F.pad(x, (3, 2), mode="replicate")), SIGNAL),
    "channel_shuffle": (
        lambda: Fn(lambda x: x.view(x.size(0), 2, 3, 8, 8).transpose(1, 2).reshape(x.size(0), 6, 8, 8)),
        IMAGE,
    ),
    "zeros_cat": (
        lambda: Fn(lambda x: torch.cat([torch.zeros(x.shape[0], 3), x, torch.ones_like(x)], 1)),
        VECTOR,
    ),
    "write": (lambda: Fn(lambda x: _write(x)), IMAGE),
    "double": (lambda: Fn(lambda x: x.double().mean(1).float()), VECTOR),
    "in_place": (lambda: Fn(lambda x: F.relu_((x + 1).mul_(2)) + 1), VECTOR),
    "no_grad": (lambda: Fn(lambda x, f: _frozen(x, f), nn.Linear(12, 5)), VECTOR),
    # attention
    "sdpa": (lambda: Fn(lambda x: F.scaled_dot_product_attention(x, x, x)), IMAGE),
    "sdpa_causal": (
        lambda: Fn(lambda x: F.scaled_dot_product_attention(x, x * 2, x, is_causal=True, scale=0.3)),
        IMAGE,
    ),
    "sdpa_mask": (
        lambda: Fn(
            lambda x, m: F.scaled_dot_product_attention(x, x, x, attn_mask=m),
            m=torch.ones(8, 8, dtype=torch.bool).tril(),
        ),
        IMAGE,
    ),
    "sdpa_bias": (
        lambda: Fn(lambda x, m: F.scaled_dot_product_attention(x, x, x, attn_mask=m), m=par(8, 8)),
        IMAGE,
    ),
    "sdpa_3d": (lambda: Fn(lambda x: F.scaled_dot_product_attention(x, x, x)), SEQUENCE),
    "masked_fill": (
        lambda: Fn(
            lambda x: (x @ x.mT).masked_fill(torch.ones(10, 10).tril() == 0, float("-inf")).softmax(-1)
        ),
        SEQUENCE,
    ),
    "mha": (lambda: Fn(lambda x, m: m(x, x, x)[0], nn.MultiheadAttention(16, 4, batch_first=True)), SEQUENCE),
    "mha_fused": (
        lambda: Fn(
            lambda x, m: m(x, x, x, need_weights=False)[0], nn.MultiheadAttention(16, 4, batch_first=True)
        ),
        SEQUENCE,
    ),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True), 2),
        SEQUENCE,
    ),
    "lstm": (
        lambda: Fn(lambda x, e: e(x)[0], nn.LSTM(16, 5, 2, batch_first=True, bidirectional=True)),
        SEQUENCE,
    ),
    "gru": (lambda: Fn(lambda x, e: e(x)[0], nn.GRU(16, 5, batch_first=True)), SEQUENCE),
    "gru_last": (lambda: Fn(lambda x, e: e(x.transpose(0, 1))[1][0], nn.GRU(16, 5)), SEQUENCE),
    "rnn": (lambda: Fn(lambda x, e: e(x)[0], nn.RNN(16, 5, batch_first=True, nonlinearity="relu")), SEQUENCE),
    "decoder_mask": (
        lambda: Fn(
            lambda x, e: e(x, src_mask=nn.Transformer.generate_square_subsequent_mask(10), is_causal=True),
            nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True),
        ),
        SEQUENCE,
    ),
}


class Standardised(nn.Conv2d):
    """Weight standardisation, as it is written by hand."""

    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = w / (w.view(w.size(0), -1).std(1).view(-1, 1, 1, 1) + 1e-5)
        return F.conv2d(x, w, self.bias)


class Standardised2(nn.Conv2d):
    def forward(self, x):
        var, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, unbiased=False)
        return F.conv2d(x, (self.weight - mean) * torch.rsqrt(var + 1e-6), self.bias)


class Text(nn.Module):
    """Words by their numbers: an embedding with padding, positions, a mask made of the data, attention."""

    def __init__(self, dim=8, words=20):
        super().__init__()
        self.words, self.places = nn.Embedding(words, dim, padding_idx=0), nn.Embedding(10, dim)
        self.qkv, self.head = nn.Linear(dim, 3 * dim), nn.Linear(dim, 3)

    def forward(self, x):
        empty = x == 0
        y = self.words(x) + self.places(torch.arange(x.shape[1]))
        q, k, v = self.qkv(y).chunk(3, -1)
        scores = (q @ k.transpose(1, 2)).masked_fill(empty.unsqueeze(1), float("-inf"))
        y = scores.softmax(-1) @ v
        full = (~empty).unsqueeze(-1).float()
        return self.head((y * full).sum(1) / full.sum(1).clamp(min=1))


def _write(x):
    y = x.clone()
    y[:, 0] = 0.0
    y[:, :, 1:3] = y[:, :, 2:4] * 2
    return y


def _frozen(x, layer):
    with torch.no_grad():
        y = layer(x)
    return y * 2


# -- checking --------------------------------------------------------------------------------------------------------


def seeded(make, train=False):
    """A module with random weights and statistics."""
    torch.manual_seed(0)
    module = make()
    for m in module.modules():
        if getattr(m, "running_mean", None) is not None:
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
        if (
            isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm))
            and m.weight is not None
        ):
            nn.init.normal_(m.weight)
            if m.bias is not None:
                nn.init.normal_(m.bias)
    return module.train(train)


def same(graph, module, shape, batches=(1, 3), tolerance=1e-5):
    """The graph is valid and computes what the module does, at each batch size."""
    for n in batches:
        x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(n))
        with torch.no_grad():
            want = copy.deepcopy(module)(x).numpy()
        at = ops.verify(ops.with_batch(graph, n))
        got = ops.evaluate(at, {graph.inputs["x"]: x.numpy()})[graph.outputs["output"]]
        if want.shape != got.shape:  # torch's squeeze() also drops a batch of one
            assert want.size == got.size
            want = want.reshape(got.shape)
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * max(1, np.abs(want).max()))


def gradients(graph, module, shape, n=2):
    """(name, the graph's gradient, torch's) of a weighted sum of the outputs, for the input and each parameter."""
    rng = torch.Generator().manual_seed(5)
    x = torch.randn(n, *shape, generator=rng).requires_grad_()
    module = copy.deepcopy(module)
    y = module(x)
    weights = torch.randn(y.shape, generator=rng)
    (y * weights).sum().backward()
    graph = ops.with_batch(graph, n).copy()
    product = ops.emit(graph, "mul", graph.outputs["output"], graph.constant("weights", weights.numpy()))
    total = ops.emit(graph, "sum", product, axes=(1 << y.dim()) - 1)
    entry = graph.inputs["x"]
    found = differentiate(graph, ops.emit(graph, "reshape", total, shape=(1,)), [entry, *graph.parameters()])
    env = ops.evaluate(ops.verify(graph), {entry: x.detach().numpy()})
    for name, tensor in ((entry, x), *module.named_parameters()):
        if name in found and tensor.grad is not None:
            yield name, env[found[name]] if found[name] else np.zeros(tensor.shape), tensor.grad.numpy()
