"""PyTorch: eager, with channels last, and compiled by inductor (forward, loss, backward, and the update)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import worker

sys.path.insert(0, str(Path(__file__).parents[1]))
from nets import NETS, torch_loss


def module(job: worker.Job) -> torch.nn.Module:
    """The net of the job with its weights, in eval mode; only what learns asks for gradients."""
    _, _, parameters, statistics = job.arrays()
    net = NETS[job.net].make().eval()
    net.load_state_dict({k: torch.tensor(v) for k, v in {**parameters, **statistics}.items()}, strict=False)
    for name, p in net.named_parameters():
        p.requires_grad_(name in job.learn)
    return net


def build(job: worker.Job) -> worker.Step:
    torch.set_num_threads(job.threads)
    net: Any = module(job)
    x, y = (torch.tensor(a) for a in job.arrays()[:2])
    if job.options.get("channels_last"):
        if x.ndim != 4:
            raise ValueError("channels last is a layout of images, and this net takes none")
        net, x = net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    make = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[job.optimizer]
    optimizer = make([p for p in net.parameters() if p.requires_grad], lr=job.lr)
    loss_of = torch_loss(job.loss)

    def forward(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return loss_of(net(x), y)

    update: Any = optimizer.step
    if job.options.get("compile"):
        forward, update = torch.compile(forward), torch.compile(update)

    def step() -> float:
        optimizer.zero_grad()
        loss = forward(x, y)
        loss.backward()
        update()
        return loss.item()

    return step


if __name__ == "__main__":
    worker.main(build)
