"""Write what learn.c needs: a Program that trains a small network, and the embedded digits as samples.

    python make_program.py [FOLDER]

FOLDER (default: here) gets digits.acp, the same as the C header digits.h, and digits.acd.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np

from acclimate.data import digits
from acclimate.ir import Dim, Graph
from acclimate.objective import SGD
from acclimate.ops import emit
from acclimate.planner import Plan, compile_plan

SAMPLES_MAGIC = int.from_bytes(b"ACDS", "little")
BATCH = 8


def network() -> Graph:
    """Two convolutions and a dense layer for 8 x 8 images, with random weights: it learns from nothing."""
    rng, g = np.random.default_rng(0), Graph()

    def weight(name: str, *shape: int) -> str:
        return g.persistent(name, rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape))

    same = {"stride": (1, 1), "before": (1, 1), "after": (1, 1), "dilation": (1, 1)}
    halve = {"kernel": (2, 2), "stride": (2, 2), "before": (0, 0), "after": (0, 0), "dilation": (1, 1)}
    y = g.input("x", (Dim(1, 1), 1, 8, 8))
    for name, c_in, c_out in (("conv1", 1, 8), ("conv2", 8, 16)):
        y = emit(
            g,
            "conv",
            y,
            weight(f"{name}.weight", c_out, c_in, 3, 3),
            g.persistent(f"{name}.bias", np.zeros(c_out)),
            **same,
        )
        y = emit(g, "max_pool", emit(g, "relu", y), **halve)
    y = emit(g, "reshape", y, shape=(Dim(1, 1), 64))
    g.outputs["output"] = emit(
        g, "matmul", y, weight("head.weight", 10, 64), g.persistent("head.bias", np.zeros(10)), tb=1
    )
    return g


def plan() -> Plan:
    return compile_plan(network(), batch_size=BATCH, optimizer=SGD(momentum=0.9))


def write_samples(path: Path) -> None:
    """A header of four words, then label and floats of each sample; those that are held out come last."""
    data = digits()
    x = np.concatenate([data.x, data.x_val]).reshape(len(data.x) + len(data.x_val), -1).astype("<f4")
    y = np.concatenate([data.y, data.y_val]).astype("<i4")
    rows = np.concatenate([y[:, None].view("<u4"), x.view("<u4")], axis=1)
    path.write_bytes(struct.pack("<4I", SAMPLES_MAGIC, len(x), x.shape[1], len(data.x_val)) + rows.tobytes())


def write_header(path: Path, raw: bytes) -> None:
    """The Program as a C array of words, which a board keeps in flash."""
    words = [f"0x{w:08X}u" for w in struct.unpack(f"<{len(raw) // 4}I", raw)]
    lines = [", ".join(words[i : i + 8]) for i in range(0, len(words), 8)]
    path.write_text("static const uint32_t program_words[] = {\n    " + ",\n    ".join(lines) + "};\n")


def main(folder: Path) -> None:
    raw = plan().program.bytes
    (folder / "digits.acp").write_bytes(raw)
    write_header(folder / "digits.h", raw)
    write_samples(folder / "digits.acd")
    print(f"wrote digits.acp ({len(raw)} bytes), digits.h and digits.acd to {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
