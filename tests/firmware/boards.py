"""Exported firmware as processes of this machine, for the tests in this folder."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from runtime.native import SANITIZE, STRICT, call, compiler
from runtime.nets import cnn

from acclimate.firmware.export import Project
from acclimate.firmware.link import Transport
from acclimate.objective import SGD
from acclimate.planner import Plan, compile_plan

CLASSES, SIZE = 4, 8


def plan(scheme: str = "full", batch_size: int = 2, seed: int = 1, **more: Any) -> Plan:
    """Of a small convolutional net, whose batch norm is frozen."""
    more = {"optimizer": SGD(lr=0.05, momentum=0.9), **more}
    return compile_plan(cnn(CLASSES, SIZE, False, seed), scheme=scheme, batch_size=batch_size, **more)


def samples(count: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 1, SIZE, SIZE)).astype(np.float32)
    return x, rng.integers(0, CLASSES, count).astype(np.int32)


def built(project: Project, runtime: Sequence[Path]) -> Path:
    """The firmware of a Linux project, from the runtime's sanitized objects and the project's other files."""
    done = {o.stem for o in runtime}
    own = [s for s in project.sources if s.stem not in done]
    flags = [*STRICT, *SANITIZE, *(f"-D{d}" for d in project.defines), *(f"-I{i}" for i in project.includes)]
    call(compiler(), *flags, *own, *runtime, "-o", project.folder / "firmware")
    return project.folder / "firmware"


class Lossy:
    """A line that loses, changes and repeats bytes, the same ones each time."""

    def __init__(self, line: Transport, rate: float, seed: int = 0) -> None:
        self.line, self.rate, self._random = line, rate, random.Random(seed)
        self.name, self.harm = "lossy", 0

    def _harmed(self, data: bytes) -> bytes:
        out = bytearray()
        for byte in data:
            kind = self._random.random() / self.rate
            self.harm += kind < 1
            out += (
                b""
                if kind < 0.4
                else bytes([byte ^ 1 << self._random.randrange(8)])
                if kind < 1
                else bytes([byte])
            )
        return bytes(out)

    def write(self, data: bytes) -> None:
        self.line.write(self._harmed(data))

    def read(self, timeout_s: float) -> bytes:
        data = self.line.read(timeout_s)
        return (self._harmed(data) or b"\0") if data else b""

    def close(self) -> None:
        self.line.close()
