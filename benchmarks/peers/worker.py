"""A peer's process: builds a training step, then runs steps when the benchmark asks, and tells their times.

Called as `python with_PEER.py [prepare] JOB`, where JOB is JSON: the fields of `Job`. What a peer makes ahead of time
on another machine (an exported program) is made by `prepare`, in a process of its own that is not measured.
Messages are lines of JSON on standard output; what libraries print there goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

#: One whole step, with the update done when it returns: the loss before the update.
Step = Callable[[], float]


@dataclass
class Job:
    """What is trained, and how. `learn`: names of the parameters that learn; all others stay as they are."""

    net: str
    loss: str
    batch: int
    threads: int
    optimizer: str
    lr: float
    learn: list[str]
    folder: str
    options: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)  # what the peer has to say about itself

    def arrays(self) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
        """x, y, parameters and batch norm's statistics, by torch's names."""
        with np.load(Path(self.folder) / "data.npz", allow_pickle=False) as f:
            named = {k: f[k] for k in f.files}
        parameters = {k[2:]: v for k, v in named.items() if k.startswith("p:")}
        statistics = {k[2:]: v for k, v in named.items() if k.startswith("s:")}
        return named["x"], named["y"], parameters, statistics


def peak_resident_kib() -> int:
    """The most memory that was resident in this process at any time."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise OSError("/proc/self/status has no VmHWM")


def main(build: Callable[[Job], Step], prepare: Callable[[Job], None] | None = None) -> None:
    """Serve requests until the input ends: {"steps": n} gives seconds by clock and losses, {"end": 1} the memory."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    try:
        job = Job(**json.loads(sys.argv[-1]))
        if sys.argv[1] == "prepare":
            if prepare is not None:
                prepare(job)
            tell(prepared=True)
            return
        step = build(job)
        tell(first_loss=step(), facts=job.facts)
        for line in sys.stdin:
            request = json.loads(line)
            if "end" in request:
                tell(peak_resident_kib=peak_resident_kib())
                return
            wall, processor, losses = [], [], []
            for _ in range(request["steps"]):
                worked, start = time.process_time(), time.perf_counter()
                losses.append(step())
                wall.append(time.perf_counter() - start)
                processor.append(time.process_time() - worked)
            tell(wall=wall, processor=processor, losses=losses)
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines()
        tell(error=f"{type(error).__name__}: {lines[0] if lines else ''}"[:300])
        sys.exit(1)
