#!/usr/bin/env python3
"""What pruning saves and costs on real data: right after, and after learning on.

har       activity from a waist phone (har_hapt, ACCLIMATE_DATA): a small 1-D net, tested on people that it never saw
digits    the embedded digits: a small 2-D net

For each share of channels (removed) or connections (zero for good), by each criterion: accuracy on the test part before
any learning and after some epochs on the training part at one rate; weights, MACs, arena and flash are exact. The whole
model learns on as long, so that what learning alone gives is not taken for the pruning's. Means over seeds, which train
the network and order the samples.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
from rich.console import Console

import acclimate
from acclimate import pruning
from acclimate.data import digits as embedded
from acclimate.grad import predict_graph
from acclimate.grad import prune as without_unused
from acclimate.zoo import digits_cnn

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "prune.json"
CHANNELS = (0.25, 0.5, 0.75)
CONNECTIONS = (0.5, 0.8, 0.9, 0.95)
TUNING = acclimate.Adam(lr=1e-3)


def har(data: Path, seed: int):
    """(model as it predicts, its training part, its test part)."""
    import torch
    from nets import signal_net
    from real_data import pretrain

    with np.load(data / "har_hapt.npz", allow_pickle=False) as f:
        keep = f["y"] < 6
        x = (f["x"][keep].astype(np.float32) * f["lsb"]).transpose(0, 2, 1)
        y, subject = f["y"][keep].astype(np.int64), f["subject"][keep]
    people = np.unique(subject)
    train = np.isin(subject, people[: len(people) * 2 // 3])
    torch.manual_seed(seed)
    model = pretrain(signal_net(9, 6), x[train], y[train], "cross_entropy", 6)
    return model, (x[train], y[train]), (x[~train], y[~train])


def digits(data: Path, seed: int):
    known = embedded(seed=seed)
    graph = digits_cnn(seed)
    plan = acclimate.plan(graph, scheme="full", batch_size=32, optimizer=acclimate.Adam(lr=3e-3))
    learner = acclimate.Learner(plan).fit(known.x, known.y, epochs=20, seed=seed)
    learned = {**learner.parameters(), **learner.statistics()}
    model = without_unused(predict_graph(graph)).with_data(learned)
    return model, (known.x, known.y), (known.x_val, known.y_val)


TASKS = {"har": har, "digits": digits}


def measure(model, train, test, seed, epochs, criteria):
    """A row for the whole model, and one for each share and criterion."""
    rows = []
    ways = [(0.0, 0.0, "whole")]
    ways += [(c, 0.0, by) for c in CHANNELS for by in criteria]
    ways += [(0.0, k, by) for k in CONNECTIONS for by in criteria]
    for channels, connections, by in ways:
        small = pruning.prune(
            model, channels, connections, criterion="l2" if by == "whole" else by, data=train, seed=seed
        )
        size = acclimate.plan(small, device="nano33ble", scheme="full", optimizer=TUNING)
        learner = acclimate.Learner(acclimate.plan(small, scheme="full", optimizer=TUNING, batch_size=32))
        row = {"channels": channels, "connections": connections, "criterion": by, **pruning.size(small)}
        row |= {k: getattr(size, k) for k in ("arena_bytes", "flash_bytes", "macs_per_step")}
        row["accuracy"] = learner.score(*test)
        for epoch in range(epochs):
            learner.fit(*train, epochs=1, seed=seed + epoch, lr=TUNING.lr * (1 - epoch / epochs))
        rows.append({**row, "accuracy_learned": learner.score(*test)})
    return rows


def over_seeds(runs):
    out = []
    for rows in zip(*runs, strict=True):
        mean = {k: float(np.mean([r[k] for r in rows])) for k in rows[0] if k != "criterion"}
        spread = float(np.std([r["accuracy_learned"] for r in rows], ddof=1)) if len(rows) > 1 else 0.0
        out.append({**mean, "criterion": rows[0]["criterion"], "spread": spread, "seeds": len(rows)})
    return out


def show(name, rows):
    print(
        f"\n{name}\n  {'channels':>8s} {'connect.':>8s} {'by':8s} {'after':>7s} {'learned on':>16s} {'weights':>8s} "
        f"{'MACs':>10s} {'arena KiB':>10s} {'flash KiB':>10s}"
    )
    for r in rows:
        print(
            f"  {r['channels']:8.0%} {r['connections']:8.0%} {r['criterion']:8s} {r['accuracy']:7.1%} "
            f"{r['accuracy_learned']:8.1%} +- {r['spread']:4.1%} {r['nonzero']:8,.0f} {r['macs']:10,.0f} "
            f"{r['arena_bytes'] / 1024:10.1f} {r['flash_bytes'] / 1024:10.1f}",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--criteria", default="random,l1,l2,taylor,fisher", help=", ".join(pruning.CRITERIA))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4, help="of learning after pruning")
    parser.add_argument("--save", action="store_true", help=f"merge into {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    folder = os.environ.get("ACCLIMATE_DATA", "")
    out = {}
    for name in args.tasks:
        if name == "har" and not (Path(folder) / "har_hapt.npz").exists():
            print("har: left out, ACCLIMATE_DATA holds no har_hapt.npz", file=sys.stderr)
            continue
        runs = []
        with Console(stderr=True).status("") as status:
            for seed in range(args.seeds):
                status.update(f"{name}, seed {seed + 1} of {args.seeds}")
                task = TASKS[name](Path(folder), seed)
                runs.append(measure(*task, seed, args.epochs, args.criteria.split(",")))
        out[name] = over_seeds(runs)
        if not args.json:
            show(name, out[name])
    if args.save:
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps({**kept, **out}, indent=1) + "\n")
    if args.json:
        print(json.dumps(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
