"""ExecuTorch's training extension: forward, loss and backward exported to one program, SGD beside it.

It is measured through its Python binding, which loads torch for its tensors; that is in its memory and start-up.
"""

from __future__ import annotations

from pathlib import Path

import torch
import worker
from torch.nn import functional as F
from with_torch import module, torch_loss

# Operations for which it has no gradient kernel (max-pool: a wrong one), by others with the same values.


def avg_pool2d(x: torch.Tensor, k: int) -> torch.Tensor:
    n, c, h, w = x.shape
    return x.reshape(n, c, h // k, k, w // k, k).mean((3, 5))


def max_pool1d(x: torch.Tensor, k: int) -> torch.Tensor:
    return x.reshape(*x.shape[:2], x.shape[2] // k, k).amax(3)


def max_pool2d(x: torch.Tensor, k: int) -> torch.Tensor:
    n, c, h, w = x.shape
    return x.reshape(n, c, h // k, k, w // k, k).amax((3, 5))


def pad(x: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
    """With zeros after the channels."""
    n, _, h, w = x.shape
    return torch.cat((x, x.new_zeros(n, widths[-1], h, w)), 1)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


def convolve_signal(self: torch.nn.Conv1d, x: torch.Tensor) -> torch.Tensor:
    weight, padding = self.weight.unsqueeze(2), self.padding
    if padding == "same":
        n, c, _ = x.shape
        before, after = (self.kernel_size[0] - 1) // 2, self.kernel_size[0] // 2
        x, padding = torch.cat((x.new_zeros(n, c, before), x, x.new_zeros(n, c, after)), 2), (0,)
    return F.conv2d(x.unsqueeze(2), weight, self.bias, (1, *self.stride), (0, *padding)).squeeze(2)


def use_stand_ins() -> None:
    F.avg_pool2d, F.max_pool1d, F.pad, F.scaled_dot_product_attention = avg_pool2d, max_pool1d, pad, attention
    torch.nn.AvgPool2d.forward = lambda self, x: avg_pool2d(x, self.kernel_size)
    torch.nn.MaxPool2d.forward = lambda self, x: max_pool2d(x, self.kernel_size)
    torch.nn.Conv1d.forward = convolve_signal


class Training(torch.nn.Module):
    """The net with its loss."""

    def __init__(self, job: worker.Job) -> None:
        super().__init__()
        self.net, self.loss_of = module(job), torch_loss(job.loss)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.loss_of(self.net(x), y)


def program_file(job: worker.Job) -> Path:
    return Path(job.folder) / "executorch.pte"


def prepare(job: worker.Job) -> None:
    from executorch.exir import to_edge
    from torch.export.experimental import _export_forward_backward

    use_stand_ins()
    x, y = (torch.tensor(a) for a in job.arrays()[:2])
    exported = _export_forward_backward(torch.export.export(Training(job), (x, y), strict=True))
    program_file(job).write_bytes(to_edge(exported).to_executorch().buffer)


def build(job: worker.Job) -> worker.Step:
    from executorch.extension.training import _load_for_executorch_for_training, get_sgd_optimizer

    if job.optimizer != "sgd":
        raise ValueError("its one optimiser is SGD")
    torch.set_num_threads(job.threads)
    x, y = (torch.tensor(a) for a in job.arrays()[:2])
    program = _load_for_executorch_for_training(str(program_file(job)))
    optimizer = None

    def step() -> float:
        nonlocal optimizer
        loss = program.forward_backward("forward", (x, y))[0]
        if optimizer is None:  # its parameters are known after the first run
            optimizer = get_sgd_optimizer(program.named_parameters(), job.lr, 0, 0, 0, False)
        optimizer.step(program.named_gradients())
        return loss.item()

    return step


if __name__ == "__main__":
    worker.main(build, prepare)
