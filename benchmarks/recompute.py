#!/usr/bin/env python3
"""Time that less memory costs: recomputation planned by bytes, against torch's checkpoints, at equal shares.

Each side is held to a share of what its own step takes without recomputing. Ours: the arena of the training step,
exact, the batch held whole. torch: bytes of all storages that operators of a step make (activations, gradients,
temporaries; not weights, nor what an operator allocates inside), counted by a dispatch mode from first to last
reference, with checkpoint_sequential over 1..n segments; the quickest of those below the share is taken. Times are
medians of processor time of steps that alternate between plain and recomputing, one thread: overheads are ratios
of one run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from nets import NETS
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint_sequential

import acclimate
from acclimate import recompute
from acclimate.planner import _plain, _step

SHARES = (0.75, 0.5, 0.35)


class Storages(TorchDispatchMode):
    """Bytes of the storages that torch's operators made and that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}  # key of a storage -> its bytes
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in given and id(storage) not in self.alive:
                    self.alive[id(storage)] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, id(storage))
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, key: int) -> None:
        self.now -= self.alive.pop(key)

    def peak_of(self, step: Callable[[], None]) -> int:
        with self:
            step()
        return self.peak


def modules(net: nn.Module) -> nn.Sequential:
    """The net as the sequence that checkpoints may cut."""
    if isinstance(net, nn.Sequential):
        return net
    head = nn.Sequential(net.bn, nn.ReLU(), nn.AvgPool2d(8), nn.Flatten(), net.fc)
    return nn.Sequential(net.conv1, *net.layer1, *net.layer2, *net.layer3, *head)


def overhead(plain: Callable[[], object], other: Callable[[], object], repeats: int) -> float:
    """Median time of `other` over that of `plain`, alternating, minus one."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(repeats + 2):
        for run, kept in zip((plain, other), times, strict=True):
            start = time.process_time()
            run()
            if i >= 2:
                kept.append(time.process_time() - start)
    return statistics.median(times[1]) / statistics.median(times[0]) - 1


def torch_rows(name: str, batch: int, train: bool, repeats: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    net = modules(NETS[name].make()).train(train)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    x, y = (torch.as_tensor(a) for a in NETS[name].batch(batch))

    def step(segments: int) -> Callable[[], None]:
        def run() -> None:
            optimizer.zero_grad()
            out = checkpoint_sequential(net, segments, x, use_reentrant=False) if segments else net(x)
            F.cross_entropy(out, y).backward()
            optimizer.step()

        return run

    peaks = {n: Storages().peak_of(step(n)) for n in range(len(net) + 1)}
    rows = []
    for share in SHARES:
        fitting = [n for n, peak in peaks.items() if n and peak <= share * peaks[0]]
        tried = {n: overhead(step(0), step(n), max(2, repeats // 4)) for n in fitting}
        best = min(tried, key=tried.__getitem__, default=None)
        rows.append(
            {
                "share": share,
                "reached": None if best is None else peaks[best] / peaks[0],
                "overhead": None if best is None else overhead(step(0), step(best), repeats),
                "plain_bytes": peaks[0],
                "least_share": min(peaks.values()) / peaks[0],
                "what": "not reached" if best is None else f"{best} segments",
            }
        )
    return rows


def our_rows(name: str, batch: int, train: bool, repeats: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    net = NETS[name].make().train(train)
    model = acclimate.from_torch(net, torch.zeros(2, *NETS[name].shape))
    asked = {"scheme": "full", "batch_size": batch, "micro_batches": 1}
    plain = acclimate.plan(model, recompute="none", **asked)
    x, y = NETS[name].batch(batch)
    first = acclimate.Learner(plain)
    step = _step(plain, _plain(plain, 1))
    rows = []
    for share in SHARES:
        start = time.perf_counter()
        found = recompute.fit(step, int(share * plain.arena_bytes))
        seconds = time.perf_counter() - start
        row: dict[str, Any] = {"share": share, "plain_bytes": plain.arena_bytes, "what": "not reached"}
        row |= {"reached": None, "overhead": None, "predicted_overhead": None, "search_s": seconds}
        if found is not None:
            plan = acclimate.plan(model, recompute=found.recomputed, **asked)
            other = acclimate.Learner(plan)
            row |= {
                "reached": plan.arena_bytes / plain.arena_bytes,
                "overhead": overhead(
                    lambda: first.partial_fit(x, y), lambda it=other: it.partial_fit(x, y), repeats
                ),
                "predicted_overhead": plan.latency_us / plain.latency_us - 1,
                "macs_overhead": plan.macs_per_step / plain.macs_per_step - 1,
                "what": f"{len(plan.recomputed)} values",
            }
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--net", action="append", choices=["resnet26", "separable"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--eval", action="store_true", help="frozen batch norm instead of batch statistics")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = []
    for name in args.net or ["resnet26", "separable"]:
        ours = our_rows(name, args.batch, not args.eval, args.repeats)
        theirs = torch_rows(name, args.batch, not args.eval, args.repeats)
        for a, b in zip(ours, theirs, strict=True):
            out.append({"net": name, "batch": args.batch, "acclimate": a, "torch": b})
            if not args.json:
                line = f"acclimate {_shown(a)} ({a['what']})   torch {_shown(b)} ({b['what']})"
                print(f"{name:10s} {a['share']:4.0%}  {line}", flush=True)
    if args.json:
        print(json.dumps(out))
    return 0


def _shown(row: dict[str, Any]) -> str:
    if row["overhead"] is None:
        return "   -   "
    return f"{row['overhead']:+6.1%} at {row['reached']:.0%}, {row['reached'] * row['plain_bytes'] / 2**20:.2f} MiB"


if __name__ == "__main__":
    sys.exit(main())
