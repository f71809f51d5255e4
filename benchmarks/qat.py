#!/usr/bin/env python3
"""What weights of few bits cost on real data, and what quantisation-aware training gives back.

The networks and data of benchmarks/prune.py. Accuracy on the test part of the float network; of the integer graph made
from it by calibration alone (bits of a weight; activations are int8 always); and of the integer graph made after some
epochs of learning through fake quantisation, with the scales of the weights as calibration gave them, and learned.
The float network learns on as long, at the same rate. Means over seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
from prune import TASKS, TUNING
from rich.console import Console

import acclimate

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "qat.json"
BITS = (8, 4, 3, 2)
CALIBRATION = 256  # samples


def learn(graph, train, seed, epochs):
    learner = acclimate.Learner(acclimate.plan(graph, scheme="full", optimizer=TUNING, batch_size=32))
    for epoch in range(epochs):
        learner.fit(*train, epochs=1, seed=seed + epoch, lr=TUNING.lr * (1 - epoch / epochs))
    return graph.with_data(learner.parameters())


def accuracy(graph, test):
    return acclimate.Learner(acclimate.plan(graph, scheme="last")).score(*test)


def measure(model, train, test, seed, epochs):
    """A row a number of bits."""
    seen = train[0][np.random.default_rng(seed).permutation(len(train[0]))[:CALIBRATION]]
    whole = {
        "float": accuracy(model, test),
        "float_learned": accuracy(learn(model, train, seed, epochs), test),
    }
    rows = []
    for bits in BITS:
        row = {
            "bits": bits,
            **whole,
            "calibrated": accuracy(acclimate.quantize(model, seen, bits=bits), test),
        }
        for key, scales in (("learned", False), ("learned_scales", True)):
            fake = learn(acclimate.fake_quantize(model, seen, scales, bits=bits), train, seed, epochs)
            row[key] = accuracy(acclimate.quantize(fake), test)
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--save", action="store_true", help=f"merge into {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    folder = os.environ.get("ACCLIMATE_DATA", "")
    out = {}
    for name in args.tasks:
        if name == "har" and not (Path(folder) / "har_hapt.npz").exists():
            print("har: left out, ACCLIMATE_DATA holds no har_hapt.npz", file=sys.stderr)
            continue
        with Console(stderr=True).status(name):
            runs = [measure(*TASKS[name](Path(folder), s), s, args.epochs) for s in range(args.seeds)]
        out[name] = [
            {k: float(np.mean([r[k] for r in rows])) for k in rows[0]} | {"seeds": len(rows)}
            for rows in zip(*runs, strict=True)
        ]
        if not args.json:
            print(f"\n{name}\n  bits   float  float, learned on  calibrated  learned  with scales")
            for r in out[name]:
                print(
                    f"  {r['bits']:4.0f} {r['float']:7.1%} {r['float_learned']:17.1%} {r['calibrated']:11.1%} "
                    f"{r['learned']:8.1%} {r['learned_scales']:12.1%}",
                    flush=True,
                )
    if args.save:
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps({**kept, **out}, indent=1) + "\n")
    if args.json:
        print(json.dumps(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
