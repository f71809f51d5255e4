#!/usr/bin/env python3
"""Learning in int8 against learning in float32: the same model, update set, samples, order and learning rate.

watch     activity, a phone's model on a watch (har_spsw)
ecg       beats of a new patient, the first 5 minutes (mitbih_beats); the mean over patients
flowers   five kinds (flowers64, made 128 pixels wide) on the published mcunet-5fps with a new head; its 49 KB scheme

The float model, its batch norms folded into the layers before, learns in float32; its quantised twin in int8 by each
rounding of the update, with gradients in float32 or in integers, and with only a quarter of the channels updated at
each step. One learning rate (--lr) for all of them, nothing tuned. Figures are the accuracy on samples that were kept
out, means over seeds with their standard deviation.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
from real_data import ecg_model, watch_model
from rich.console import Console
from rich.table import Table
from twin import scales

import acclimate
from acclimate.ir import Graph
from acclimate.ops import emit, verify
from acclimate.quantizer import fold

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "int8_training.json"
SCHEMES = ("last", "bias", "full")
#: name -> (quantised?, arguments of SGD, what gradients flow in)
WAYS = {
    "float32": (False, {}, "float32"),
    "int8 stochastic": (True, {"rounding": "stochastic"}, "float32"),
    "int8 residual": (True, {"rounding": "residual"}, "float32"),
    "int8 nearest": (True, {"rounding": "nearest"}, "float32"),
    "int8 stochastic, int16 gradients": (True, {"rounding": "stochastic"}, "int16"),
    "int8 stochastic, int8 gradients": (True, {"rounding": "stochastic"}, "int8"),
    "int8 stochastic, a quarter of the channels": (
        True,
        {"rounding": "stochastic", "share": 0.25},
        "float32",
    ),
}


def learned(model, scheme, numbers, gradients, x, y, test, epochs, seed):
    """(accuracy before, accuracy after, bytes of RAM) of one way to learn."""
    optimizer = acclimate.SGD(**numbers)
    plan = acclimate.plan(model, scheme=scheme, batch_size=8, optimizer=optimizer, gradients=gradients)
    learner = acclimate.Learner(plan)
    before = learner.score(*test)
    learner.fit(x, y, epochs=epochs, seed=seed)
    return before, learner.score(*test), plan.arena_bytes + plan.state_bytes


def watch(data, quick):
    model, x, y, learn, test = watch_model(data, quick)
    index = learn[: 200 if quick else 400]
    yield fold(model), acclimate.quantize(model, x[index]), x, y, index, np.flatnonzero(test)


def ecg(data, quick):
    model, x, y, parts = ecg_model(data, quick)
    for learn, test in parts:
        yield fold(model), acclimate.quantize(model, x[learn]), x, y, learn, test


def flowers(data, quick):
    """Split by photographer. The float model has the weights that the published integers stand for."""
    peers = Path(os.environ.get("ACCLIMATE_PEERS", "")) / "mcunet-5fps.npz"
    if not os.environ.get("ACCLIMATE_PEERS") or not peers.exists():
        return
    with np.load(data / "flowers64.npz", allow_pickle=False) as f:
        x, y, author = f["x"], f["y"].astype(np.int64), f["photographer"]
    x = np.repeat(np.repeat(x, 2, axis=1), 2, axis=2).transpose(0, 3, 1, 2)
    x = (x.astype(np.float32) / 127.5 - 1).astype(np.float32)
    order = np.random.default_rng(0).permutation(np.unique(author))
    learn = np.isin(author, order[: len(order) * 3 // 4])
    twin = acclimate.load(peers, classes=5)
    yield real_twin(twin), twin, x, y, np.flatnonzero(learn)[:: 4 if quick else 1], np.flatnonzero(~learn)


def real_twin(graph: Graph) -> Graph:
    """The float graph of an integer one: the numbers that its weights stand for, and its clamps."""
    new = Graph(graph.batch)
    names = {graph.inputs["x"]: new.input("x", graph.shape(graph.inputs["x"]))}
    for name, value in graph.parameters().items():
        names[name] = new.persistent(name, value.quant.real(value.data))
    known = scales(graph)
    for node in graph.nodes:
        a, given = node.attrs, [names[n] for n in node.inputs if n in names]
        y = node.outputs[0]
        if node.op == "dequantize":
            names[y] = given[0]
            continue
        if node.op == "reshape":
            names[y] = emit(new, "reshape", *given, shape=a["shape"])
            continue
        if node.op == "q_conv":
            geometry = {k: a[k] for k in ("stride", "before", "after", "dilation", "groups")}
            names[y] = emit(new, "conv", *given, **geometry)
        elif node.op == "q_add":
            names[y] = emit(new, "add", *given)
        else:
            window = {k: a[k] for k in ("kernel", "stride", "before", "after", "extra")}
            names[y] = emit(new, "avg_pool", *given, include_pad=0, **window)
        scale, zero = known[y]
        low, high = ((a[k] - zero) * scale for k in ("low", "high"))
        names[y] = emit(new, "hard_tanh", names[y], low=low, high=high)
    new.outputs["output"] = names[graph.outputs["output"]]
    return verify(new)


TASKS = {"watch": watch, "ecg": ecg, "flowers": flowers}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--quick", action="store_true", help="less data, two epochs, one seed")
    parser.add_argument("--task", action="append", choices=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    console = Console(stderr=True)
    data = Path(os.environ.get("ACCLIMATE_DATA", ""))
    if not (data / "har_spsw.npz").exists():
        console.print("set ACCLIMATE_DATA to the folder with har_spsw.npz and mitbih_beats.npz")
        return 4
    seeds, epochs = (1, 2) if args.quick else (args.seeds, args.epochs)
    rows = []
    for task in args.task or TASKS:
        parts = TASKS[task]
        runs: dict[tuple[str, str], list[list[tuple[float, float, int]]]] = {}
        for model, twin, x, y, learn, test in parts(data, args.quick):
            for seed in range(seeds):
                for scheme in SCHEMES if task != "flowers" else ("tte:49kb",):
                    for way, (integer, numbers, gradients) in WAYS.items():
                        numbers = {"lr": args.lr, "momentum": 0.0, **numbers}
                        found = learned(
                            twin if integer else model, scheme, numbers, gradients,
                            x[learn], y[learn], (x[test], y[test]), epochs, seed,
                        )  # fmt: skip
                        runs.setdefault((scheme, way), [[] for _ in range(seeds)])[seed].append(found)
        for (scheme, way), by_seed in runs.items():
            means = np.array([np.mean(part, axis=0) for part in by_seed])
            rows.append(
                {
                    "task": task,
                    "scheme": scheme,
                    "way": way,
                    "accuracy_before": means[:, 0].mean(),
                    "accuracy_after": means[:, 1].mean(),
                    "spread": float(means[:, 1].std(ddof=1)) if seeds > 1 else 0.0,
                    "ram_bytes": means[:, 2].mean(),
                    "seeds": seeds,
                    "epochs": epochs,
                    "lr": args.lr,
                }
            )
        if runs:
            console.print(table([r for r in rows if r["task"] == task]))
    result = {"rows": rows}
    if not args.quick:
        kept = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
        result["rows"] = [r for r in kept if r["task"] not in {r["task"] for r in rows}] + rows
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result))
    return 0


def table(rows) -> Table:
    out = Table(title=f"{rows[0]['task']}: accuracy after learning, %")
    for name in ("scheme", "way", "before", "after", "against float32", "RAM"):
        out.add_column(name, justify="left" if name in ("scheme", "way") else "right")
    for r in rows:
        base = next(b for b in rows if b["scheme"] == r["scheme"] and b["way"] == "float32")
        out.add_row(
            r["scheme"],
            r["way"],
            f"{100 * r['accuracy_before']:.1f}",
            f"{100 * r['accuracy_after']:.1f} ± {100 * r['spread']:.1f}",
            f"{100 * (r['accuracy_after'] - base['accuracy_after']):+.1f}",
            f"{r['ram_bytes'] / 1024:.1f} KiB",
        )
    return out


if __name__ == "__main__":
    sys.exit(main())
