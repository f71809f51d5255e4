#!/usr/bin/env python3
"""The main job on real drifts: accuracy before and after learning on the device's own data, by scheme, with its cost.

cifar10   ResNet-26 with published weights (ACCLIMATE_PEERS), on the JPEG copies of CIFAR-10's test set: an input drift
watch     activity from a phone's sensors, then worn as a watch (har_spsw): trained on the phone, adapted to the watch
waist     activity from a waist phone (har_hapt): trained on some people, adapted to each of a few others
ecg       beats (mitbih_beats): trained on other patients, adapted on a patient's first 5 minutes, tested on the rest
windows   ECG of 10 s with several labels (mitbih_windows): the same protocol; macro accuracy of the labels

`--quick` takes a part of the data. Nothing here is simulated. The learning rates are one for all schemes of a task;
they were lowered once after a run had shown the test scores, which flatters the results after learning.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from nets import ResNet26, signal_net
from torch import nn

import acclimate

SCHEMES = ("last", "bias", "norm", "full", "auto")


def pretrain(net: nn.Module, x: np.ndarray, y: np.ndarray, loss: str, epochs: int) -> acclimate.Graph:
    """Train on our engine with batch statistics, then give the model as it predicts (frozen statistics)."""
    model = acclimate.from_torch(net.train(), torch.zeros(1, *x.shape[1:]))
    plan = acclimate.plan(model, scheme="full", loss=loss, batch_size=64, optimizer=acclimate.Adam(lr=2e-3))
    learner = acclimate.Learner(plan)
    for epoch in range(epochs):
        learner.fit(x, y, epochs=1, seed=epoch, lr=2e-3 * (1 - epoch / epochs))
    learned = {**learner.parameters(), **learner.statistics()}
    return acclimate.from_torch(net.eval(), torch.zeros(1, *x.shape[1:])).with_data(
        {k: v for k, v in learned.items() if k != "dropout_step"}
    )


def adapt(
    model, x, y, x_test, y_test, loss="cross_entropy", epochs=10, lr=0.003, schemes=SCHEMES, seed=0, batch=8
):
    """One row a scheme. The test part is never learned from."""
    rows = []
    for scheme in schemes:
        started = time.perf_counter()
        plan = acclimate.plan(
            model,
            scheme=scheme,
            loss=loss,
            batch_size=batch,
            data=(x, y) if scheme == "auto" else None,
            optimizer=acclimate.SGD(lr=lr, momentum=0.9),
            seed=seed,
        )
        learner = acclimate.Learner(plan)
        before = learner.score(x_test, y_test)
        learner.fit(x, y, epochs=epochs, seed=seed)
        rows.append(
            {
                "scheme": scheme if scheme != "auto" else f"auto: {plan.update_set.scheme}",
                "accuracy_before": before,
                "accuracy_after": learner.score(x_test, y_test),
                "samples": len(x),
                "arena_bytes": plan.arena_bytes,
                "peak_bytes": plan.peak_bytes,
                "macs_per_step": plan.macs_per_step,
                "update_bytes": plan.update_bytes,
                "seconds": time.perf_counter() - started,
            }
        )
    return rows


def mean_rows(runs):
    """The mean over users of each scheme's row; `auto` may take another scheme for each user."""
    out = []
    for rows in zip(*runs, strict=True):
        name = rows[0]["scheme"].split(":")[0] if rows[0]["scheme"].startswith("auto") else rows[0]["scheme"]
        row = {k: float(np.mean([r[k] for r in rows])) for k in rows[0] if k != "scheme"}
        out.append({"scheme": name, **row, "users": len(rows)})
    return out


def cifar10(data: Path, quick: bool):
    peers = os.environ.get("ACCLIMATE_PEERS", "")
    weights = Path(peers) / "tbft_resnet26_cifar10.npz"
    if not peers or not weights.exists():
        return None
    net = ResNet26()
    with np.load(weights, allow_pickle=False) as f:
        net.load_state_dict({k: torch.tensor(f[k]) for k in f.files if k in net.state_dict()}, strict=False)
    model = acclimate.from_torch(net.eval(), torch.zeros(1, 3, 32, 32))
    with np.load(data / "cifar10_testset.npz", allow_pickle=False) as f:
        x, y = f["x"], f["y"].astype(np.int64)
    x = (x.transpose(0, 3, 1, 2).astype(np.float32) / 255 - 0.5) / 0.5
    n, m = (200, 300) if quick else (800, 2000)
    return adapt(
        model,
        x[:n],
        y[:n],
        x[-m:],
        y[-m:],
        epochs=2 if quick else 5,
        lr=5e-4,
        batch=32,
        schemes=("last", "norm", "block:layer1", "full") if not quick else ("last", "norm"),
    )


def watch(data: Path, quick: bool):
    with np.load(data / "har_spsw.npz", allow_pickle=False) as f:
        keep = f["purity"] >= 0.75
        x = (f["x"][keep].astype(np.float32) * f["lsb"]).transpose(0, 2, 1)
        y, device, subject = f["y"][keep].astype(np.int64), f["device"][keep], f["subject"][keep]
    phone, people = device == 0, subject <= np.median(subject)
    model = pretrain(
        signal_net(6, 5), x[phone & people], y[phone & people], "cross_entropy", 4 if quick else 15
    )
    test = ~phone & ~people
    learn = ~phone & people
    index = np.random.default_rng(0).permutation(np.flatnonzero(learn))[: 200 if quick else 400]
    return adapt(model, x[index], y[index], x[test], y[test])


def waist(data: Path, quick: bool):
    with np.load(data / "har_hapt.npz", allow_pickle=False) as f:
        keep = f["y"] < 6
        x = (f["x"][keep].astype(np.float32) * f["lsb"]).transpose(0, 2, 1)
        y, subject = f["y"][keep].astype(np.int64), f["subject"][keep]
    people = np.unique(subject)
    train = np.isin(subject, people[: len(people) * 2 // 3])
    model = pretrain(signal_net(9, 6), x[train], y[train], "cross_entropy", 2 if quick else 8)
    runs = []
    for who in people[len(people) * 2 // 3 :][: 2 if quick else 8]:
        mine = np.random.default_rng(0).permutation(np.flatnonzero(subject == who))
        learn, test = mine[:100], mine[100:]
        runs.append(adapt(model, x[learn], y[learn], x[test], y[test]))
    return mean_rows(runs)


def ecg(data: Path, quick: bool):
    with np.load(data / "mitbih_beats.npz", allow_pickle=False) as f:
        paced = np.isin(f["record"], (102, 104, 107, 217)) | (f["y"] == 4)
        x = (f["x"][~paced].astype(np.float32) * f["lsb_mV"])[:, None]
        y, patient, seconds = (f[k][~paced] for k in ("y", "patient", "time_s"))
    y = y.astype(np.int64)
    people = np.random.default_rng(0).permutation(np.unique(patient))
    held = people[: 3 if quick else 10]
    train = ~np.isin(patient, held)
    model = pretrain(signal_net(1, 4), x[train], y[train], "cross_entropy", 2 if quick else 10)
    runs = []
    for who in held:
        learn, test = (patient == who) & (seconds < 300), (patient == who) & (seconds >= 300)
        if learn.sum() >= 20 and test.sum() >= 20:
            runs.append(adapt(model, x[learn], y[learn], x[test], y[test]))
    return mean_rows(runs)


def windows(data: Path, quick: bool):
    with np.load(data / "mitbih_windows.npz", allow_pickle=False) as f:
        x = (f["x"].astype(np.float32) * f["lsb_mV"])[:, None]
        y, patient, start = f["y"].astype(np.float32), f["patient"], f["start_s"]
    people = np.random.default_rng(1).permutation(np.unique(patient))
    held = people[: 2 if quick else 8]
    train = np.flatnonzero(~np.isin(patient, held))[:: 4 if quick else 1]
    model = pretrain(signal_net(1, 9), x[train], y[train], "binary_cross_entropy", 2 if quick else 8)
    runs = []
    for who in held:
        learn, test = (patient == who) & (start < 300), (patient == who) & (start >= 300)
        runs.append(
            adapt(
                model,
                x[learn],
                y[learn],
                x[test],
                y[test],
                loss="binary_cross_entropy",
                lr=0.02,
                schemes=("last", "bias", "full", "auto"),
            )
        )
    return mean_rows(runs)


TASKS = {"cifar10": cifar10, "watch": watch, "waist": waist, "ecg": ecg, "windows": windows}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--quick", action="store_true", help="a part of the data")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    folder = os.environ.get("ACCLIMATE_DATA", "")
    if not folder or not Path(folder).is_dir():
        print("ACCLIMATE_DATA does not point at a folder of data sets", file=sys.stderr)
        return 4
    torch.manual_seed(0)
    out = {}
    for name in args.tasks:
        rows = TASKS[name](Path(folder), args.quick)
        if rows is None:
            print(f"{name}: left out, its files are absent", file=sys.stderr)
            continue
        out[name] = rows
        if not args.json:
            print(f"\n{name}")
            print(
                f"  {'scheme':24s} {'before':>7s} {'after':>7s} {'samples':>8s} {'arena KiB':>10s} "
                f"{'peak KiB':>9s} {'MMAC/step':>10s} {'delta KiB':>10s}"
            )
            for r in rows:
                print(
                    f"  {r['scheme']:24s} {r['accuracy_before']:7.1%} {r['accuracy_after']:7.1%} {r['samples']:8.0f} "
                    f"{r['arena_bytes'] / 1024:10.1f} {r['peak_bytes'] / 1024:9.1f} {r['macs_per_step'] / 1e6:10.2f} "
                    f"{r['update_bytes'] / 1024:10.1f}",
                    flush=True,
                )
    if args.json:
        print(json.dumps(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
