"""Every kernel under the address and undefined-behaviour sanitizers, each argument in a block of exactly its size."""

import struct

import numpy as np
import pytest
from cases import CASES, arrays, one_node
from runtime.native import ROOT, STRICT, call, compiler, tool
from runtime.nets import plans, samples

from acclimate.layout import arrange
from acclimate.ops import TABLE
from acclimate.program import build
from acclimate.runtime import SOURCE, Session


def test_every_example_and_whole_training_steps(harness):
    """All Programs of the seeds are accepted and run to their end, and between them they call every kernel."""
    out = harness.seeds.with_suffix(".statuses")
    summary = harness.run(harness.seeds, "--replay", out)
    statuses = out.read_bytes()
    assert len(statuses) == summary["run"] == summary["mutants"] > len(TABLE)
    assert statuses == bytes(len(statuses))
    assert {name for name, count in summary["ops"].items() if not count} == {
        n for n, row in TABLE.items() if row.view
    }


def test_the_seeds_hold_every_example(harness):
    raw, at, held = harness.seeds.read_bytes(), 0, set()
    while at < len(raw):
        size = struct.unpack_from("<I", raw, at)[0]
        held.add(raw[at + 4 : at + 4 + size])
        at += 4 + (size + 3) // 4 * 4
    for row, example in CASES:
        graph, _ = one_node(row, example, arrays(row, example))
        assert build({"run": arrange(graph)}).bytes in held, row.name
    for plan in plans().values():
        assert plan.program.bytes in held


@pytest.mark.slow
def test_valgrind_on_every_example(harness, plain_objects, tmp_path):
    """Every kernel reads only what was written, which no other sanitizer here sees."""
    valgrind, driver = tool("valgrind"), ROOT / "tests/runtime/bits.c"
    call(compiler(), *STRICT, "-O1", "-g", f"-I{SOURCE}", driver, *plain_objects, "-o", tmp_path / "bits")
    flags = ["--error-exitcode=9", "--quiet", "--leak-check=full", "--undef-value-errors=yes"]
    checked = call(valgrind, *flags, tmp_path / "bits", harness.seeds, 2).stdout
    assert checked == call(tmp_path / "bits", harness.seeds, 2).stdout and checked.count("\n") > len(TABLE)


def test_memory_at_the_end_of_a_page():
    """State and arena of exactly the size that the Program asks for, 4-byte aligned and no better."""
    for name, plan in plans().items():
        entry = plan.train_entry
        x, y = samples(plan.model, plan.batch_size, 3)
        if plan.layouts[entry].graph.type("y").dtype == "f32":
            y = np.eye(3, dtype=np.float32)[y]
        losses = []
        for shift in (0, 4, 8, 12):
            session = Session(plan.program)
            for block in ("state", "arena"):
                old = getattr(session, block)
                raw = np.zeros(old.nbytes + 64, np.uint8)
                start = -raw.ctypes.data % 64 + shift
                new = raw[start : start + old.nbytes]
                new[:] = old
                setattr(session, block, new)
            feeds = {"x": x, "y": y} | ({"lr": 0.1} if entry == "step" else {})
            losses.append(session.run(entry, **feeds)["loss"].tobytes() + session.state.tobytes())
        assert len(set(losses)) == 1, name
