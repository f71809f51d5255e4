"""Write the seeds of the fuzz harness: a Program for each example of each op, and whole training steps.

PYTHONPATH=src:tests python fuzz/seeds.py OUT
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

from cases import CASES, arrays, one_node
from runtime.nets import plans

from acclimate.layout import arrange
from acclimate.program import build


def record(raw: bytes) -> bytes:
    """A Program as the harness reads it from its file."""
    return struct.pack("<I", len(raw)) + raw + bytes(-len(raw) % 4)


def programs() -> list[bytes]:
    """One Program for each example, first with all outputs and then with the required ones; then training steps."""
    out = []
    for all_outputs in (True, False):
        for row, example in CASES:
            graph, _ = one_node(row, example, arrays(row, example), all_outputs)
            out.append(build({"run": arrange(graph)}).bytes)
    steps = [plan.program.bytes for plan in plans().values()]
    return [*dict.fromkeys(out), *steps * 8]  # steps hold many ops each: they are picked more often


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(b"".join(map(record, programs())))
