"""Torch networks that the benchmarks share."""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F


class PreActBlock(nn.Module):
    """Block of the published CIFAR ResNet-26: pre-activation, parameter-free shortcut."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(c_out), nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.grow = c_out - c_in

    def forward(self, x):
        y = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return y + (F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 0, self.grow)) if self.grow else x)


class ResNet26(nn.Module):
    """The CIFAR ResNet-26 of the TBFT paper, by its published parameter names."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.layer1 = nn.Sequential(*[PreActBlock(16, 16, 1) for _ in range(4)])
        self.layer2 = nn.Sequential(PreActBlock(16, 32, 2), *[PreActBlock(32, 32, 1) for _ in range(3)])
        self.layer3 = nn.Sequential(PreActBlock(32, 64, 2), *[PreActBlock(64, 64, 1) for _ in range(3)])
        self.bn, self.fc = nn.BatchNorm2d(64), nn.Linear(64, classes)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(F.avg_pool2d(F.relu(self.bn(x)), 8).flatten(1))


def signal_net(channels: int, classes: int, width: int = 16) -> nn.Module:
    """Three strided convolutions over time with batch norm, mean over time, a linear head."""
    layers: list[nn.Module] = []
    for c_in, c_out in ((channels, width), (width, 2 * width), (2 * width, 2 * width)):
        layers += [nn.Conv1d(c_in, c_out, 7, 2, 3, bias=False), nn.BatchNorm1d(c_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2 * width, classes))


def separable(c_in: int, c_out: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(c_in, c_in, 3, stride, 1, groups=c_in, bias=False),
        nn.BatchNorm2d(c_in),
        nn.ReLU6(),
        nn.Conv2d(c_in, c_out, 1, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU6(),
    ]


def mobile_net(classes: int = 10) -> nn.Module:
    """Depthwise-separable convolutions on 48x48 images."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        *separable(16, 32, 1),
        *separable(32, 48, 2),
        *separable(48, 48, 1),
        *separable(48, 64, 2),
        *separable(64, 64, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, classes),
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


#: name -> (constructor, input shape without the batch, classes)
NETS = {
    "mlp": (mlp, (1, 8, 8), 10),
    "signal": (lambda: signal_net(6, 5), (6, 128), 5),
    "mobilenet": (mobile_net, (3, 48, 48), 10),
    "resnet26": (ResNet26, (3, 32, 32), 10),
}
