#!/usr/bin/env python3
"""What a replay buffer of N KB keeps: a device learns a class that is new to it, alone, and is asked for the old ones.

Activity from a phone's sensors (har_spsw, ACCLIMATE_DATA), 64 x 6 samples a window. A net is trained on the first half
of the people with all classes but one, which has a spare output. On the device it then meets windows of that one
class, of the same people, in batches of 8, of which three quarters are replayed. Before that the buffer is offered the
training windows once. Accuracy is on the other half of the people, who took no part in anything, as the mean over
classes. Figures are means over the new class being each of the five in turn and over seeds. The learning rate is the
same in all rows. The last row learns old and new windows together, all in memory: what replay could reach at best.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nets import signal_net

import acclimate
from acclimate.classes import IN_USE

CLASSES, EPOCHS, RATE, BATCH = 5, 5, 0.01, 8
SHARE = 0.75  # of a batch is replayed: four of five classes are old ones
KB = 1 << 10


def kept(memory_bytes: int, **options: Any) -> acclimate.Replay:
    return acclimate.Replay(memory_bytes, share=SHARE, **options)


#: name -> what is kept
WAYS = {
    "no replay": None,
    "latents, int8, balanced, 1 KB": kept(1 * KB),
    "latents, int8, balanced, 2 KB": kept(2 * KB),
    "latents, int8, balanced, 4 KB": kept(4 * KB),
    "latents, int8, balanced, 16 KB": kept(16 * KB),
    "latents, int8, reservoir, 4 KB": kept(4 * KB, keep="reservoir"),
    "latents, int8, diverse, 4 KB": kept(4 * KB, keep="diverse"),
    "latents, 8 parts of 64 codes, 1 KB": kept(1 * KB, code="pq", parts=8, codes=64),
    "latents, float32, 4 KB": kept(4 * KB, code="raw"),
    "windows, int8, balanced, 4 KB": kept(4 * KB, latent=False),
    "windows, int8, balanced, 16 KB": kept(16 * KB, latent=False),
}


def windows(data: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x (n, 6, 64) in g and rad/s, y, and whether a window is of the people that are learned from."""
    with np.load(data / "har_spsw.npz", allow_pickle=False) as f:
        keep = (f["purity"] >= 0.75) & (f["device"] == 0)
        x = (f["x"][keep].astype(np.float32) * f["lsb"]).transpose(0, 2, 1)
        return x, f["y"][keep].astype(np.int64), f["subject"][keep] <= np.median(f["subject"][keep])


def trained(x: np.ndarray, y: np.ndarray, seed: int) -> acclimate.Graph:
    """A net of CLASSES - 1 classes, trained on our engine, as it predicts."""
    torch.manual_seed(seed)
    net = signal_net(6, CLASSES - 1)
    model = acclimate.from_torch(net.train(), torch.zeros(1, *x.shape[1:]))
    plan = acclimate.plan(model, scheme="full", batch_size=64, optimizer=acclimate.Adam(lr=2e-3))
    learner = acclimate.Learner(plan)
    for epoch in range(15):
        learner.fit(x, y, epochs=1, seed=seed + epoch, lr=2e-3 * (1 - epoch / 15))
    learned = {**learner.parameters(), **learner.statistics()}
    return acclimate.from_torch(net.eval(), torch.zeros(1, *x.shape[1:])).with_data(learned)


def device(model: acclimate.Graph, replay: acclimate.Replay | None) -> acclimate.Learner:
    latent = replay is not None and replay.latent
    optimizer = acclimate.SGD(lr=RATE, momentum=0.9)
    plan = acclimate.plan(model, scheme="last", batch_size=BATCH, optimizer=optimizer, latent=latent)
    return acclimate.Learner(plan, replay=replay).add_class(CLASSES - 1)


def macro(learner: acclimate.Learner, x: np.ndarray, label: np.ndarray) -> float:
    """The mean over classes of the share of each that is right: most windows are of one class."""
    right = learner.predict(x) == label
    return float(np.mean([right[label == k].mean() for k in np.unique(label)]))


def measure(data: Path, seed: int, new: int) -> list[dict[str, float]]:
    """A row for each way, with class `new` as the one that comes late."""
    x, y, mine = windows(data)
    label = np.where(y == new, CLASSES - 1, y - (y > new))  # the new class last
    old = label < CLASSES - 1
    model = acclimate.reserve_classes(trained(x[mine & old], label[mine & old], seed), 1)
    late = np.random.default_rng(seed).permutation(np.flatnonzero(mine & ~old))[:100]
    known = np.random.default_rng(seed).permutation(np.flatnonzero(mine & old))
    rows = []
    for name, replay in [*WAYS.items(), ("all windows together", None)]:
        learner = device(model, replay)
        row: dict[str, float] = {"old_before": macro(learner, x[~mine & old], label[~mine & old])}
        if replay is not None:
            learner.remember(x[known], label[known])
        if name in WAYS:
            learner.fit(x[late], label[late], epochs=EPOCHS, seed=seed)
        else:
            both = np.concatenate([known, np.repeat(late, max(len(known) // len(late) // (CLASSES - 1), 1))])
            learner.fit(x[both], label[both], epochs=2, seed=seed)
        buffer = learner.buffer
        held = 0 if buffer is None else len(buffer)
        rows.append(
            row
            | {
                "old_after": macro(learner, x[~mine & old], label[~mine & old]),
                "new_after": learner.score(x[~mine & ~old], label[~mine & ~old]),
                "bytes": 0 if buffer is None else buffer.block.nbytes,
                "samples": held,
                "flash_bytes": 0 if buffer is None or buffer.book is None else buffer.book.nbytes,
            }
        )
        assert learner.statistics()[IN_USE][CLASSES - 1] == 0
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one seed, two of the classes")
    given = parser.parse_args()
    data = Path(os.environ.get("ACCLIMATE_DATA", ""))
    if not (data / "har_spsw.npz").exists():
        print("ACCLIMATE_DATA must name the folder that holds har_spsw.npz", file=sys.stderr)
        return 2
    runs = [
        measure(data, seed, new)
        for seed in range(1 if given.quick else given.seeds)
        for new in range(2 if given.quick else CLASSES)
    ]
    rows = [
        {"way": name, **{k: float(np.mean([r[k] for r in each])) for k in each[0]}, "runs": len(runs)}
        for name, each in zip([*WAYS, "all windows together"], zip(*runs, strict=True), strict=True)
    ]
    if given.json:
        print(json.dumps({"rows": rows, "epochs": EPOCHS, "lr": RATE, "batch": BATCH, "share": SHARE}))
        return 0
    print(f"{'':38s} {'old before':>10s} {'old after':>10s} {'new after':>10s} {'bytes':>7s} {'held':>6s}")
    for r in rows:
        print(
            f"{r['way']:38s} {r['old_before']:10.3f} {r['old_after']:10.3f} {r['new_after']:10.3f} "
            f"{r['bytes']:7.0f} {r['samples']:6.0f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
