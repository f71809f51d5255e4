#!/usr/bin/env python3
"""The main job on real drifts: accuracy before and after learning on the device's own data, by scheme, with its cost.

cifar10   ResNet-26 with published weights (ACCLIMATE_PEERS), on the JPEG copies of CIFAR-10's test set: an input drift
watch     activity from a phone's sensors, then worn as a watch (har_spsw): trained on the phone, adapted to the watch
waist     activity from a waist phone (har_hapt): trained on some people, adapted to each of a few others
ecg       beats (mitbih_beats): trained on other patients, adapted on a patient's first 5 minutes, tested on the rest
windows   ECG of 10 s with several labels (mitbih_windows): the same protocol; macro accuracy of the labels

Nothing here is simulated, and nothing is tuned on what is reported: for each scheme the learning rate (of RATES, the
same for all tasks) and the epoch are those that do best on a fifth of the samples to learn from, kept out of
learning, as `acclimate adapt` does it; with fewer than 40 samples the library's default rate and the last epoch.
All is done for several seeds, which choose samples, their order and what is kept out, from one pretrained model;
figures are means over seeds, with their standard deviation. `--quick` takes a part of the data, fewer epochs, one seed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import figures
import numpy as np
import torch
from nets import ResNet26, signal_net
from rich.console import Console
from torch import nn

import acclimate
from acclimate.adapt import MIN_VALIDATED, carved, learn_at_best_rate
from acclimate.data import Dataset

SCHEMES = ("last", "bias", "norm", "full", "auto")
RATES = (0.0003, 0.001, 0.003, 0.01, 0.03)
SEEDS = 3
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "real_data.json"
#: task -> what README calls it, and its samples to learn from
TITLES = {
    "watch": ("activity, phone worn as a watch", "windows"),
    "waist": ("activity, a new person", "windows"),
    "ecg": ("ECG beats, a new patient, first 5 minutes", "beats"),
    "windows": ("ECG of 10 s, 9 labels, a new patient", "windows"),
    "cifar10": ("CIFAR-10, JPEG copies, published ResNet-26", "images"),
}


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


@dataclass(frozen=True)
class Setting:
    """What a run of the benchmark does alike in all tasks."""

    quick: bool
    seed: int
    data: Path

    def adapt(self, model, x, y, x_test, y_test, loss="cross_entropy", batch=8, epochs=10, schemes=SCHEMES):
        """One row a scheme. The test part is met once, after everything has been chosen."""
        rows = []
        known = Dataset(x, y)
        fit, validation = carved(known, self.seed)
        for scheme in schemes:
            started = time.perf_counter()
            plan = acclimate.plan(
                model,
                scheme=scheme,
                loss=loss,
                batch_size=batch,
                data=(x, y) if scheme == "auto" else None,
                optimizer=acclimate.SGD(momentum=0.9),
                seed=self.seed,
            )
            rates = RATES if validation is not None else (plan.optimizer.lr,)
            kept, _ = learn_at_best_rate(plan, rates, fit, validation, 3 if self.quick else epochs, self.seed)
            rows.append(
                {
                    "scheme": scheme if scheme != "auto" else f"auto: {plan.update_set.scheme}",
                    "accuracy_before": acclimate.Learner(plan).score(x_test, y_test),
                    "accuracy_after": kept.learner.score(x_test, y_test),
                    "samples": len(x),
                    "lr": kept.lr,
                    "arena_bytes": plan.arena_bytes,
                    "peak_bytes": plan.peak_bytes,
                    "macs_per_step": plan.macs_per_step,
                    "update_bytes": plan.update_bytes,
                    "seconds": time.perf_counter() - started,
                }
            )
        return rows


def name_of(row):
    """`auto` may take another scheme for each user and seed."""
    return row["scheme"].split(":")[0] if row["scheme"].startswith("auto") else row["scheme"]


def mean_rows(runs, count):
    """The mean over runs (users, or seeds) of each scheme's row. `count`: the key that tells how many there were."""
    out = []
    for rows in zip(*runs, strict=True):
        row = {k: float(np.mean([r[k] for r in rows])) for k in rows[0] if k != "scheme"}
        out.append({"scheme": name_of(rows[0]), **row, count: len(rows)})
    return out


def over_seeds(runs):
    """The mean over seeds, and the standard deviation of the accuracy after (0 of one seed)."""
    out = mean_rows(runs, "seeds")
    for row, rows in zip(out, zip(*runs, strict=True), strict=True):
        row["accuracy_after_spread"] = (
            float(np.std([r["accuracy_after"] for r in rows], ddof=1)) if len(rows) > 1 else 0.0
        )
    return out


def cifar10(run: Setting):
    peers = os.environ.get("ACCLIMATE_PEERS", "")
    weights = Path(peers) / "tbft_resnet26_cifar10.npz"
    if not peers or not weights.exists():
        return None
    net = ResNet26()
    with np.load(weights, allow_pickle=False) as f:
        net.load_state_dict({k: torch.tensor(f[k]) for k in f.files if k in net.state_dict()}, strict=False)
    model = acclimate.from_torch(net.eval(), torch.zeros(1, 3, 32, 32))
    with np.load(run.data / "cifar10_testset.npz", allow_pickle=False) as f:
        x, y = f["x"], f["y"].astype(np.int64)
    x = (x.transpose(0, 3, 1, 2).astype(np.float32) / 255 - 0.5) / 0.5
    n, m = (200, 300) if run.quick else (600, 2000)
    learn = np.random.default_rng(run.seed).permutation(len(x) - m)[:n]
    schemes = ("last", "norm") if run.quick else ("last", "norm", "block:layer1", "full")
    return run.adapt(model, x[learn], y[learn], x[-m:], y[-m:], batch=32, epochs=3, schemes=schemes)


@cache
def watch_model(data: Path, quick: bool):
    with np.load(data / "har_spsw.npz", allow_pickle=False) as f:
        keep = f["purity"] >= 0.75
        x = (f["x"][keep].astype(np.float32) * f["lsb"]).transpose(0, 2, 1)
        y, device, subject = f["y"][keep].astype(np.int64), f["device"][keep], f["subject"][keep]
    phone, people = device == 0, subject <= np.median(subject)
    seen = phone & people
    model = pretrain(signal_net(6, 5), x[seen], y[seen], "cross_entropy", 4 if quick else 15)
    return model, x, y, np.flatnonzero(~phone & people), ~phone & ~people


def watch(run: Setting):
    model, x, y, learn, test = watch_model(run.data, run.quick)
    index = np.random.default_rng(run.seed).permutation(learn)[: 200 if run.quick else 400]
    return run.adapt(model, x[index], y[index], x[test], y[test])


@cache
def waist_model(data: Path, quick: bool):
    with np.load(data / "har_hapt.npz", allow_pickle=False) as f:
        keep = f["y"] < 6
        x = (f["x"][keep].astype(np.float32) * f["lsb"]).transpose(0, 2, 1)
        y, subject = f["y"][keep].astype(np.int64), f["subject"][keep]
    people = np.unique(subject)
    known = len(people) * 2 // 3
    train = np.isin(subject, people[:known])
    model = pretrain(signal_net(9, 6), x[train], y[train], "cross_entropy", 2 if quick else 8)
    return model, x, y, [np.flatnonzero(subject == who) for who in people[known:][: 2 if quick else 8]]


def waist(run: Setting):
    model, x, y, people = waist_model(run.data, run.quick)
    runs = []
    for mine in people:
        mine = np.random.default_rng(run.seed).permutation(mine)
        learn, test = mine[:100], mine[100:]
        runs.append(run.adapt(model, x[learn], y[learn], x[test], y[test]))
    return mean_rows(runs, "users")


@cache
def ecg_model(data: Path, quick: bool):
    with np.load(data / "mitbih_beats.npz", allow_pickle=False) as f:
        paced = np.isin(f["record"], (102, 104, 107, 217)) | (f["y"] == 4)
        x = (f["x"][~paced].astype(np.float32) * f["lsb_mV"])[:, None]
        y, patient, seconds = (f[k][~paced] for k in ("y", "patient", "time_s"))
    y = y.astype(np.int64)
    held = np.random.default_rng(0).permutation(np.unique(patient))[: 3 if quick else 10]
    train = ~np.isin(patient, held)
    model = pretrain(signal_net(1, 4), x[train], y[train], "cross_entropy", 2 if quick else 10)
    parts = [((patient == w) & (seconds < 300), (patient == w) & (seconds >= 300)) for w in held]
    return model, x, y, [(learn, test) for learn, test in parts if learn.sum() >= 20 and test.sum() >= 20]


def ecg(run: Setting):
    model, x, y, parts = ecg_model(run.data, run.quick)
    return mean_rows([run.adapt(model, x[a], y[a], x[b], y[b]) for a, b in parts], "users")


@cache
def windows_model(data: Path, quick: bool):
    with np.load(data / "mitbih_windows.npz", allow_pickle=False) as f:
        x = (f["x"].astype(np.float32) * f["lsb_mV"])[:, None]
        y, patient, start = f["y"].astype(np.float32), f["patient"], f["start_s"]
    held = np.random.default_rng(1).permutation(np.unique(patient))[: 2 if quick else 8]
    train = np.flatnonzero(~np.isin(patient, held))[:: 4 if quick else 1]
    model = pretrain(signal_net(1, 9), x[train], y[train], "binary_cross_entropy", 2 if quick else 8)
    return model, x, y, [((patient == w) & (start < 300), (patient == w) & (start >= 300)) for w in held]


def windows(run: Setting):
    model, x, y, parts = windows_model(run.data, run.quick)
    what = dict(loss="binary_cross_entropy", schemes=("last", "bias", "full", "auto"))
    return mean_rows([run.adapt(model, x[a], y[a], x[b], y[b], **what) for a, b in parts], "users")


TASKS = {"cifar10": cifar10, "watch": watch, "waist": waist, "ecg": ecg, "windows": windows}


def markdown(results):
    """README's paragraph and table."""
    first = next(iter(results.values()))[0]
    out = [
        "Real drifts, eight samples a step on this host (CIFAR-10: 32), mean over the people held out where there are",
        "several. `python benchmarks/real_data.py` (needs the data sets that `benchmarks/README.md` names). For each",
        "scheme, learning rate and epoch are chosen on a fifth of the samples to learn from (the library's rate, and",
        f"the last epoch, where there are fewer than {MIN_VALIDATED}); mean and standard deviation of",
        f"{first['seeds']:.0f} seeds.",
        "",
        "| accuracy, % | learned from | before | " + " | ".join(SCHEMES) + " |",
        "|---|---|---|" + "---|" * len(SCHEMES),
    ]
    for task, (title, unit) in TITLES.items():
        rows = {r["scheme"]: r for r in results.get(task, ())}
        if rows:
            known = next(iter(rows.values()))
            cells = [
                f"{100 * rows[s]['accuracy_after']:.1f} ± {100 * rows[s]['accuracy_after_spread']:.1f}"
                if s in rows
                else "-"
                for s in SCHEMES
            ]
            before = f"{100 * known['accuracy_before']:.1f}"
            out.append(f"| {title} | {known['samples']:.0f} {unit} | {before} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def show(name, rows):
    print(f"\n{name}")
    print(
        f"  {'scheme':14s} {'before':>7s} {'after':>16s} {'samples':>8s} {'lr':>8s} {'arena KiB':>10s} "
        f"{'peak KiB':>9s} {'MMAC/step':>10s} {'delta KiB':>10s}"
    )
    for r in rows:
        after = f"{r['accuracy_after']:.1%} +- {r['accuracy_after_spread']:.1%}"
        print(
            f"  {r['scheme']:14s} {r['accuracy_before']:7.1%} {after:>16s} {r['samples']:8.0f} {r['lr']:8.2g} "
            f"{r['arena_bytes'] / 1024:10.1f} {r['peak_bytes'] / 1024:9.1f} {r['macs_per_step'] / 1e6:10.2f} "
            f"{r['update_bytes'] / 1024:10.1f}",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--seeds", type=int, help=f"how many, default {SEEDS}, with --quick 1")
    parser.add_argument("--quick", action="store_true", help="a part of the data")
    parser.add_argument("--save", action="store_true", help=f"merge into {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--docs", action="store_true", help="write README's table from there, and end")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    if args.docs:
        page = ROOT / "README.md"
        page.write_text(
            figures.between(page.read_text(), "real data", markdown(json.loads(RESULTS.read_text())))
        )
        return 0
    if args.save and args.quick:
        parser.error("what --quick gives is no result to keep")
    folder = os.environ.get("ACCLIMATE_DATA", "")
    if not folder or not Path(folder).is_dir():
        print("ACCLIMATE_DATA does not point at a folder of data sets", file=sys.stderr)
        return 4
    seeds = args.seeds or (1 if args.quick else SEEDS)
    tell = Console(stderr=True)
    out = {}
    for name in args.tasks:
        runs = []
        with tell.status("") as status:
            for seed in range(seeds):
                status.update(f"{name}, seed {seed + 1} of {seeds}")
                torch.manual_seed(0)
                runs.append(TASKS[name](Setting(args.quick, seed, Path(folder))))
        if runs[0] is None:
            print(f"{name}: left out, its files are absent", file=sys.stderr)
            continue
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
