#!/usr/bin/env python3
"""How the cost of a training step grows: with the batch, the width, the depth, and the channels that learn.

One family of nets: a 3x3 convolution, pre-activation residual blocks of one width on 16x16 images, a linear head;
SGD with momentum, one thread. One of the four grows at a time. Bytes are the plan's, exact. Times are medians of
the processor's time for steps that alternate between all points of a curve in one process, and are given as a
multiple of the first point's.

Channels are those with the largest norm, the same share in every convolution of a block: `out` takes output channels
(gradient and momentum shrink), `in` takes input channels (the activations kept for the gradient shrink too).
The stem and all vectors (biases, batch norm) are frozen there, so that the share is what grows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import figures
import numpy as np
import torch
from nets import PreActBlock
from rich.console import Console
from rich.progress import Progress
from torch import nn

import acclimate
from acclimate.schemes import Explicit

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "growth.json"
DOCS = ROOT / "docs" / "benchmarks.md"
SIZE, CLASSES = 16, 10
BASE = {"batch": 8, "width": 32, "depth": 4}
CURVES: dict[str, tuple[Any, ...]] = {
    "batch": (1, 2, 4, 8, 16, 32),
    "width": (8, 16, 32, 64, 128),
    "depth": (1, 2, 4, 8, 16),
    "channels out": (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0),
    "channels in": (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0),
}
BYTES = ("arena_bytes", "state_bytes", "ram_bytes")


def net(width: int, depth: int) -> nn.Module:
    torch.manual_seed(0)
    blocks = [PreActBlock(width, width, 1) for _ in range(depth)]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))
    return nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), *blocks, *head).eval()


def planned(curve: str, value: Any) -> acclimate.Plan:
    """The plan of a point of a curve."""
    at = {**BASE, **({curve: value} if curve in BASE else {})}
    model = acclimate.from_torch(net(at["width"], at["depth"]), torch.zeros(1, 3, SIZE, SIZE))
    scheme: Any = "full"
    if curve.startswith("channels"):
        blocks = [n for n in model.parameters() if ".conv" in n]
        scheme = Explicit(dict.fromkeys(blocks, float(value)), axis=("out", "in").index(curve.split()[1]))
    optimizer = acclimate.SGD(lr=0.01, momentum=0.9)
    return acclimate.plan(model, scheme=scheme, optimizer=optimizer, batch_size=at["batch"])


def measure(curve: str, repeats: int, advance: Any) -> list[dict[str, Any]]:
    """A row a point, the points' steps alternating."""
    rows, learners = [], []
    random = np.random.default_rng(0)
    for value in CURVES[curve]:
        plan = planned(curve, value)
        x = random.standard_normal((plan.batch_size, 3, SIZE, SIZE), np.float32)
        learners.append((acclimate.Learner(plan), x, random.integers(0, CLASSES, plan.batch_size)))
        rows.append(
            {
                "curve": curve,
                "value": value,
                "arena_bytes": plan.arena_bytes,
                "state_bytes": plan.state_bytes,
                "ram_bytes": plan.arena_bytes + plan.state_bytes,
                "macs_per_step": plan.macs_per_step,
                "weights": plan.update_set.size(plan.model),
            }
        )
    times: list[list[float]] = [[] for _ in rows]
    for r in range(repeats + 1):
        for (learner, x, y), taken in zip(learners, times, strict=True):
            start = time.process_time()
            learner.partial_fit(x, y)
            if r:  # the first round warms up
                taken.append(time.process_time() - start)
        advance()
    for row, taken in zip(rows, times, strict=True):
        row["step_ms"] = 1e3 * statistics.median(taken)
        row["time_ratio"] = statistics.median(a / b for a, b in zip(taken, times[0], strict=True))
    return rows


def words(value: Any) -> str:
    return f"1/{round(1 / value)}" if isinstance(value, float) and value < 1 else f"{value:g}"


def table(rows: list[dict[str, Any]]) -> list[str]:
    out = [
        "| grows | point | time | arena KiB | weights and state KiB | both KiB | MMAC a step | weights that learn |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        kib = " | ".join(f"{r[k] / 1024:.1f}" for k in BYTES)
        out.append(
            f"| {r['curve']} | {words(r['value'])} | {r['time_ratio']:.2f} | {kib} | "
            f"{r['macs_per_step'] / 1e6:.1f} | {r['weights']:,} |"
        )
    return out


def picture(rows: list[dict[str, Any]]) -> str:
    """Every figure as a multiple of the first point's."""
    panels = []
    for curve in dict.fromkeys(r["curve"] for r in rows):
        mine = [r for r in rows if r["curve"] == curve]
        series = [[r["time_ratio"] for r in mine], *([r[k] / mine[0][k] for r in mine] for k in BYTES[::2])]
        panels.append((curve, [words(r["value"]) for r in mine], series))
    title = "Cost of a training step, as a multiple of the first point"
    return figures.curves(title, ["time", "arena", "arena, weights and state"], panels)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--curve", action="append", choices=list(CURVES))
    parser.add_argument("--repeats", type=int, default=30, help="steps of each point (30)")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--docs", action="store_true", help="write the docs from the stored results, and end")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    if args.docs:
        rows = json.loads(RESULTS.read_text())["rows"]
        DOCS.write_text(figures.between(DOCS.read_text(), "growth", "\n".join(table(rows))))
        (DOCS.parent / "growth.svg").write_text(picture(rows))
        return 0
    rows = []
    with Progress(console=Console(stderr=True)) as progress:
        chosen = args.curve or list(CURVES)
        shown = progress.add_task("steps", total=len(chosen) * (args.repeats + 1))
        for curve in chosen:
            progress.update(shown, description=curve)
            rows += measure(curve, args.repeats, lambda: progress.advance(shown))
    if args.save:
        kept = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
        found = {(r["curve"], r["value"]): r for r in [*kept, *rows]}
        rows_kept = [found[c, v] for c in CURVES for v in CURVES[c] if (c, v) in found]
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({"rows": rows_kept}, indent=1) + "\n")
    print(json.dumps({"rows": rows}) if args.json else "\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
