#!/usr/bin/env python3
"""Training steps on an emulated Cortex-M7: instructions, memory, flash, and how right the gradients are.

A case is a function that returns one row. Instructions are what the emulator counts for the whole step, all of its
micro-batches and the update included; instructions are not cycles. SRAM is state, arena, the runtime's records and the
stack as it was touched; the samples of one run of the Program lie in the arena and so are counted too. Flash is the
Program and the runtime with its interpreter and every kernel. The time on x86 is that of the fast kernels, one thread,
the best of many steps. The gradient's error is the largest difference to float64 autograd of torch, as a part of a
parameter's largest gradient, with gradients computed on the emulated processor.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from twin import gradients

import acclimate
from acclimate.firmware.emulator import RECORDS_BYTES, Harness

CPU = "cortex-m7"
BATCH = 32
Row = dict[str, Any]


def learn_a_batch(
    plan: acclimate.Plan, x: np.ndarray, y: np.ndarray, flags: tuple[str, ...]
) -> dict[str, int]:
    """What one step of a plan takes on the emulated processor."""
    harness = Harness(plan.program, CPU, flags=flags)
    size, instructions, stack = plan.micro_batch_size, 0, 0
    entries = (
        [("accumulate", i) for i in range(plan.parts)] + [("apply", 0)] if plan.parts > 1 else [("step", 0)]
    )
    for entry, part in entries:
        at = slice(part * size, (part + 1) * size)
        given = {"x": x[at], "y": y[at], "lr": 0.01}
        run = harness.run(entry, **{k: v for k, v in given.items() if k in harness.program.entries[entry]})
        instructions, stack = instructions + run.instructions, max(stack, run.stack_bytes)
    return {
        "instructions_per_step": instructions,
        "sram_bytes": plan.state_bytes + plan.arena_bytes + RECORDS_BYTES + stack,
        "state_bytes": plan.state_bytes,
        "arena_bytes": plan.arena_bytes,
        "stack_bytes": stack,
        "flash_bytes": harness.flash_bytes,
        "micro_batches": plan.parts,
    }


def gradient_error(plan: acclimate.Plan, net: nn.Module, x: np.ndarray, y: np.ndarray) -> float:
    """Of gradients from the emulated processor, against torch's in float64."""
    run = Harness(plan.gradient_program(len(x)), CPU).run("gradient", x=x, y=y)
    exact = net.double()
    exact.zero_grad()
    nn.functional.cross_entropy(exact(torch.as_tensor(x).double()), torch.as_tensor(y)).backward()
    worst = 0.0
    for name, parameter in exact.named_parameters():
        want = parameter.grad.numpy()
        worst = max(
            worst,
            float(np.abs(run.outputs[f"d_{name}"].reshape(want.shape) - want).max() / np.abs(want).max()),
        )
    net.float()
    return worst


def x86_ms(plan: acclimate.Plan, x: np.ndarray, y: np.ndarray, repeats: int = 50) -> float:
    """The best time of a step here, in milliseconds."""
    learner, best = acclimate.Learner(plan), float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        learner.partial_fit(x, y)
        best = min(best, time.perf_counter() - start)
    return best * 1e3


def float32_case(
    net: nn.Module, shape: tuple[int, ...], parts: int, theirs: Row, flags: tuple[str, ...]
) -> Row:
    """All of a network learns, batches of 32, SGD, cross entropy: in so many micro-batches, and other splits beside."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH, *shape)).astype(np.float32)
    y = rng.integers(0, 10, BATCH)
    model = acclimate.from_torch(net.eval(), torch.zeros(1, *shape))

    def plan_of(parts: int) -> acclimate.Plan:
        return acclimate.plan(
            model,
            scheme="full",
            loss="cross_entropy",
            optimizer=acclimate.SGD(),
            batch_size=BATCH,
            micro_batches=parts,
        )

    splits = [learn_a_batch(plan_of(n), x, y, flags) for n in (1, 4, 8, 16, 32)]
    plan = plan_of(parts)
    return {
        **next(s for s in splits if s["micro_batches"] == parts),
        "x86_ms_per_step": x86_ms(plan_of(1), x, y),
        "gradient_error": gradient_error(plan, net, x, y),
        "macs_per_step": plan.macs_per_step,
        "splits": splits,
        "theirs": theirs,
    }


def aifes_mlp(flags: tuple[str, ...]) -> Row:
    """64-32-10. AIfES 2.2.0, built by gcc -O3 and counted by QEMU, in slices of 1 and 32 samples of a batch of 32; its
    memory is what it reports for training in slices of 1 and for parameters, without samples and stack."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    theirs = {
        "instructions_per_step": 1_862_000,
        "slice_1_instructions": 3_208_000,
        "sram_bytes": 18_504 + 9_640,
    }
    return float32_case(net, (64,), 8, theirs, flags)


def aifes_cnn(flags: tuple[str, ...]) -> Row:
    """16 x 16 pixels, 3 x 3 convolutions to 8 and 16 channels, each pooled by two, and a linear layer. AIfES as above,
    its memory that of slices of one sample."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, 1, 1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, 1, 1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    theirs = {
        "instructions_per_step": 374_800_000,
        "slice_1_instructions": 377_800_000,
        "sram_bytes": 57_576 + 15_272,
    }
    return float32_case(net, (1, 16, 16), 16, theirs, flags)


def int8_case(scheme: str, theirs: Row, flags: tuple[str, ...]) -> Row:
    """A scheme of Tiny Training Engine on its own network, 128 x 128 pixels, ten classes, batch 1, its head new.

    `variants`: the same with gradients as int16 and int8 in blocks; their error is that of rounding them."""
    model = acclimate.load(peer("mcunet-5fps.npz"), classes=10)
    rng = np.random.default_rng(0)
    x, y = rng.integers(-128, 128, (1, 3, 128, 128)).astype(np.int8), np.array([3])
    exact, rows = gradients(model, x, y), []
    for kind in ("float32", "int16", "int8"):
        plan = acclimate.plan(model, device="stm32f7", scheme=scheme, gradients=kind)
        run = Harness(plan.gradient_program(1), CPU).run("gradient", x=x, y=y)
        worst = 0.0
        for name, channels in plan.update_set.tensors.items():
            want = exact[name] if channels is None else exact[name][:, list(channels.index)]
            found = run.outputs[f"d_{name}"].reshape(want.shape)
            worst = max(worst, float(np.abs(found - want).max() / np.abs(want).max()))
        rows.append(
            {
                "gradients": kind,
                **learn_a_batch(plan, x, y, flags),
                "x86_ms_per_step": x86_ms(plan, x, y),
                "gradient_error": worst,
                "macs_per_step": plan.macs_per_step,
            }
        )
    return {**rows[0], "variants": rows[1:], "theirs": theirs}


def peer(name: str) -> Path:
    folder = os.environ.get("ACCLIMATE_PEERS", "")
    if not folder or not (Path(folder) / name).exists():
        sys.exit(f"set ACCLIMATE_PEERS to the folder that holds {name}")
    return Path(folder) / name


def mcunet_49kb(flags: tuple[str, ...]) -> Row:
    """Theirs: counted by QEMU at -Ofast; arena, trainable weights and runtime as their generator and linker say."""
    theirs = {"instructions_per_step": 105_720_000, "sram_bytes": 237_456, "x86_ms_per_step": 13.75}
    return int8_case("tte:49kb", theirs, flags)


def mcunet_148kb(flags: tuple[str, ...]) -> Row:
    """The largest of the published schemes; no figures of theirs to set beside it."""
    return int8_case("tte:148kb", {}, flags)


CASES: dict[str, Callable[[tuple[str, ...]], Row]] = {
    "mcunet_49kb": mcunet_49kb,
    "mcunet_148kb": mcunet_148kb,
    "aifes_mlp": aifes_mlp,
    "aifes_cnn": aifes_cnn,
}


def table(found: dict[str, Row]) -> str:
    lines = ["| case | instructions | SRAM | flash | x86 | gradient error |", "|---|---|---|---|---|---|"]
    for name, row in found.items():
        lines.append(
            f"| {name} | {row['instructions_per_step'] / 1e6:.3f} M | {row['sram_bytes']:,} B "
            f"| {row['flash_bytes']:,} B | {row['x86_ms_per_step']:.3f} ms | {row['gradient_error']:.1e} |"
        )
        for split in row.get("splits", []):
            lines.append(
                f"| in {split['micro_batches']} parts | {split['instructions_per_step'] / 1e6:.3f} M "
                f"| {split['sram_bytes']:,} B | | | |"
            )
        for variant in row.get("variants", []):
            lines.append(
                f"| gradients as {variant['gradients']} | {variant['instructions_per_step'] / 1e6:.3f} M "
                f"| {variant['sram_bytes']:,} B | {variant['flash_bytes']:,} B | {variant['x86_ms_per_step']:.3f} ms "
                f"| {variant['gradient_error']:.1e} |"
            )
        if row.get("theirs"):
            other = row["theirs"]
            lines.append(
                f"| theirs | {other['instructions_per_step'] / 1e6:.3f} M | {other['sram_bytes']:,} B | | | |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--flag", action="append", help="of the compiler, instead of -O3")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: CASES[name](tuple(args.flag or ("-O3",))) for name in args.case or CASES}
    print(json.dumps(found) if args.json else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
