"""Hostile Programs and deltas, sent to a board over its protocol: the exported firmware as a process under sanitizers.

    PYTHONPATH=src:tests python fuzz/board_files.py --seconds 60 --seed 3

The board runs an int8 net. It gets its own Program and delta, changed, most with their length and checksum mended, so
that the deep checks are met. It must take them up or answer with a status; what is refused must change nothing; and
after each it must predict as before. What it takes up is run, on any numbers. `protocol.c` has the hostile messages.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from runtime.nets import integer_plans, samples

from acclimate.errors import BadInput, WrongUse
from acclimate.firmware.link import Board
from acclimate.ir import DTYPES
from acclimate.planner import Plan
from acclimate.quantizer import quantized

WORDS = (0, 1, 2, 3, 4, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFC, 0xFFFFFFFF)
HEAD = 16  # bytes of a Program's and a delta's head: magic, version, length, checksum of the rest


def plan() -> Plan:
    return integer_plans()["int8-residual"]


def room(of: Plan) -> int:
    """Bytes of a slot that the firmware needs here: two Programs, of which one has grown."""
    return 2 * len(of.program.bytes) + 256


def mutant(raw: bytes, rng: np.random.Generator) -> bytes:
    """`raw` with some words changed, or bytes cut off, doubled or moved."""
    data = bytearray(raw)
    for _ in range(rng.geometric(0.6)):
        at = 4 * int(rng.integers(len(data) // 4))
        old = struct.unpack_from("<I", data, at)[0]
        near = (*WORDS, old + 1, old - 1, old ^ 1 << int(rng.integers(32)), old ^ 1 << int(rng.integers(32)))
        struct.pack_into("<I", data, at, int(near[rng.integers(len(near))]) & 0xFFFFFFFF)
    kind = rng.integers(12)
    a, b = sorted(4 * int(k) for k in rng.integers(HEAD // 4, len(data) // 4 + 1, 2))
    if kind == 0:
        del data[a:b]
    if kind == 1:
        data += data[a:b][:256]
    if kind == 2:
        del data[max(a, 1) :]
    if rng.integers(8) and len(data) >= HEAD:
        struct.pack_into("<I", data, 8, len(data))
    if rng.integers(8) and len(data) >= HEAD:
        struct.pack_into("<I", data, 12, zlib.crc32(data[HEAD:]))
    return bytes(data)


def use(board: Board, rng: np.random.Generator) -> Counter[str]:
    """Run all entries of a Program that was taken up on any numbers; how it went."""
    went: Counter[str] = Counter()
    for name, entry in board.entries.items():
        try:
            for role, (_, place) in entry.bindings.items():
                if not place.is_output and place.type.dtype != "bit":
                    dtype = np.dtype(DTYPES[place.type.dtype])
                    some = rng.integers(0, 256, place.type.size * dtype.itemsize, np.uint8).view(dtype)
                    board.feed(name, **{role: some.reshape(place.type.shape)})
            board.run(name)
            went["run"] += 1
        except (BadInput, WrongUse):
            went["refused to run"] += 1
    return went


def hostile(
    board: Board, of: Plan, seed: int, count: int = sys.maxsize, seconds: float = 1e9
) -> Counter[str]:
    """Send mutants to a board that runs `of`, with `room(of)`. What became of them; AssertionError for a finding, and
    the AcclimateError of a line that broke where the firmware died."""
    x, y = samples(of.model, 4 * of.batch_size, 4)
    x = quantized(of.model.values[of.model.inputs["x"]], x)
    y = y.astype(np.int32)
    board.reset()
    for i in range(0, len(x), of.batch_size):
        board.step(x[i : i + of.batch_size], y[i : i + of.batch_size], 0.05)
    learned, state, logits = board.delta(), board.state(), board.predict(x).tobytes()
    found: Counter[str] = Counter()
    end = time.monotonic() + seconds
    for i in range(count):
        if time.monotonic() > end:
            break
        rng = np.random.default_rng([seed, i])
        kind = "Program" if rng.integers(2) else "delta"
        raw = mutant(of.program.bytes if kind == "Program" else learned, rng)
        try:
            if kind == "Program":
                board.load_program(raw, keep=bool(rng.integers(2)))
            else:
                board.load_delta(raw)
            found[f"{kind} taken up"] += 1
            found += use(board, rng)
            board.revert_program(keep=False)
            board.load_delta(learned)
        except BadInput as error:
            found[f"{kind} refused: {error.what.rpartition(': ')[2]}"] += 1
        assert board.program() == of.program.bytes, f"mutant {i}: the Program"
        assert board.state() == state, f"mutant {i}: the state"
        assert board.predict(x).tobytes() == logits, f"mutant {i}: the predictions"
        found["mutants"] += 1
    return found


def main() -> int:
    from firmware.boards import built
    from runtime.native import SANITIZE, STRICT, compile_all, sources

    from acclimate.firmware.export import export
    from acclimate.firmware.link import Process

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    of = plan()
    with tempfile.TemporaryDirectory() as scratch:
        runtime = compile_all(sources(), Path(scratch), [*STRICT, *SANITIZE])
        project = export(of, Path(scratch) / "project", slot_bytes=room(of))
        with Board(Process([built(project, runtime)]), timeout_s=20) as board:
            print(json.dumps(hostile(board, of, args.seed, seconds=args.seconds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
