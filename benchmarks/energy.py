#!/usr/bin/env python3
"""The model of time and energy against a published table: one training step of TBFT's ResNet-26 on a Raspberry Pi.

The table (TBFT, README of its repository): seconds and joules of one step with Adam, batch 1, one block or all of the
net trained, at 32 x 32 and 128 x 128 pixels. The model of the Pi and the software's overhead are not told; joules are
above idle, by a meter. Ours: the plan's work by class times `Device.cycles` of pi4, over its clock, times net power.

Fitted, and left out of the errors: one factor on all cycles (so that training all at 32 pixels takes the 0.53 s of the
table), and net power at each of the two sizes (0.106 J / 0.53 s and 2.030 J / 8.12 s). All other cells are predicted:
nine of seconds, ten of joules less those two. What trains in each column follows the code that measured it: its test
for the name "conv1" also matched every layer's conv1, so that the column Block1 trains those as well.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

import nets
import torch
from torch import nn
from torch.nn import functional as F

import acclimate
from acclimate import device

SIZES = {32: 10, 128: 17}  # pixels -> classes
SCHEMES = {
    "block1": "match:conv1.weight,layer1.*,layer*.conv1.weight",
    "block2": "match:layer2.*",
    "block3": "match:layer3.*",
    "fc": "match:fc.*",
    "all": "full",
}
#: Seconds and joules as published; the mean over blocks is left out, since it follows from the four.
PUBLISHED = {
    32: {
        "block1": (0.45, 0.090),
        "block2": (0.33, 0.066),
        "block3": (0.29, 0.058),
        "fc": (0.17, 0.034),
        "all": (0.53, 0.106),
    },
    128: {
        "block1": (6.82, 1.705),
        "block2": (5.40, 1.350),
        "block3": (4.28, 1.070),
        "fc": (2.46, 0.615),
        "all": (8.12, 2.030),
    },
}
FITTED_SECONDS = ((32, "all"),)
FITTED_JOULES = ((32, "all"), (128, "all"))


class AnySize(nets.ResNet26):
    """The net for images of any size: its last pooling takes the mean of what there is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(F.relu(self.bn(x)).mean((2, 3)))


def plan_of(pixels: int, scheme: str, net: nn.Module) -> acclimate.Plan:
    model = acclimate.from_torch(net.eval(), torch.zeros(1, 3, pixels, pixels))
    return acclimate.plan(model, device="pi4", scheme=scheme, optimizer="adam", batch_size=1)


def measure() -> dict[str, Any]:
    plans = {
        (pixels, name): plan_of(pixels, scheme, AnySize(classes))
        for pixels, classes in SIZES.items()
        for name, scheme in SCHEMES.items()
    }
    (fitted,) = FITTED_SECONDS
    seconds, joules = PUBLISHED[fitted[0]][fitted[1]]
    pi = device.get("pi4").calibrated(plans[fitted].counts, seconds * 1e6, "published by TBFT")
    cells = []
    for (pixels, name), plan in plans.items():
        seconds, joules = PUBLISHED[pixels][name]
        whole_seconds, whole_joules = PUBLISHED[pixels]["all"]
        board = replace(pi, active_power_w=whole_joules / whole_seconds, power_kind="net")
        ours = board.latency_us(plan.counts) / 1e6, board.energy_uj(plan.counts) / 1e6
        cells.append(
            {
                "pixels": pixels,
                "trained": name,
                "macs": plan.macs_per_step,
                "seconds": round(ours[0], 4),
                "published_seconds": seconds,
                "seconds_error": round(ours[0] / seconds - 1, 4),
                "seconds_fitted": (pixels, name) in FITTED_SECONDS,
                "joules": round(ours[1], 4),
                "published_joules": joules,
                "joules_error": round(ours[1] / joules - 1, 4),
                "joules_fitted": (pixels, name) in FITTED_JOULES,
            }
        )

    def mean_error(what: str) -> float:
        errors = [abs(c[f"{what}_error"]) for c in cells if not c[f"{what}_fitted"]]
        return round(sum(errors) / len(errors), 4)

    return {
        "cells": cells,
        "factor_on_cycles": round(pi.cycles["mac"] / device.get("pi4").cycles["mac"], 3),
        "mac_cycles": round(pi.cycles["mac"], 3),
        "power_w": {p: round(t["all"][1] / t["all"][0], 4) for p, t in PUBLISHED.items()},
        "seconds_mean_error": mean_error("seconds"),
        "joules_mean_error": mean_error("joules"),
    }


def table(found: dict[str, Any]) -> str:
    lines = [
        "| pixels | trained | s | published | error | J | published | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c in found["cells"]:
        marks = [
            "fitted" if c[f"{w}_fitted"] else f"{100 * c[f'{w}_error']:+.1f} %" for w in ("seconds", "joules")
        ]
        lines.append(
            f"| {c['pixels']} | {c['trained']} | {c['seconds']:.3f} | {c['published_seconds']} | {marks[0]} "
            f"| {c['joules']:.3f} | {c['published_joules']} | {marks[1]} |"
        )
    lines.append(
        f"\nMean error of what was not fitted: seconds {100 * found['seconds_mean_error']:.1f} %, "
        f"joules {100 * found['joules_mean_error']:.1f} %"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = measure()
    print(json.dumps(found) if args.json else table(found))


if __name__ == "__main__":
    main()
