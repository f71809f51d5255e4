#!/usr/bin/env python3
"""A training step against eager torch: alternating in one process, one thread each, medians, as a ratio.

Above one, acclimate is faster. ACCLIMATE_KERNELS=plain times the plain kernels instead of the fast ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import torch
from nets import NETS, torch_loss

import acclimate


def compare(name: str, batch: int, scheme: str, repeats: int) -> dict[str, float | str | int]:
    net = NETS[name].module()
    model = acclimate.from_torch(net, torch.zeros(1, *NETS[name].shape))
    plan = acclimate.plan(model, scheme=scheme, loss=NETS[name].loss, batch_size=batch)
    loss = torch_loss(NETS[name].loss)
    learner = acclimate.Learner(plan)
    if scheme == "last":
        for p in list(net.parameters())[:-2]:
            p.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.01)
    x, y = NETS[name].batch(batch)
    xt, yt = torch.as_tensor(x), torch.as_tensor(y)
    ours, theirs = [], []
    for i in range(repeats + 3):
        t0 = time.perf_counter()
        learner.partial_fit(x, y)
        t1 = time.perf_counter()
        optimizer.zero_grad()
        loss(net(xt), yt).backward()
        optimizer.step()
        t2 = time.perf_counter()
        if i >= 3:
            ours.append(t1 - t0)
            theirs.append(t2 - t1)
    a, b = statistics.median(ours), statistics.median(theirs)
    return {
        "net": name,
        "batch": batch,
        "scheme": scheme,
        "torch_over_acclimate": b / a,
        "acclimate_ms": a * 1e3,
        "torch_ms": b * 1e3,
        "gmacs_per_s": plan.macs_per_step / a / 1e9,
        "arena_bytes": plan.arena_bytes,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--net", action="append", choices=list(NETS))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in args.net or NETS:
        for batch in (1, 8, 32):
            for scheme in ("full", "last"):
                rows.append(compare(name, batch, scheme, args.repeats))
                if not args.json:
                    r = rows[-1]
                    print(
                        f"{name:10s} batch {batch:3d} {scheme:5s} torch/acclimate {r['torch_over_acclimate']:5.2f}   "
                        f"({r['acclimate_ms']:.2f} ms, {r['gmacs_per_s']:.1f} GMAC/s)",
                        flush=True,
                    )
    if args.json:
        print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
