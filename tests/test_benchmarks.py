"""The benchmark against peers measures what it says: a peer that does other work is not compared."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed (the test extra)")
FOLDER = Path(__file__).parents[1] / "benchmarks"
if not hasattr(os, "sched_setaffinity"):
    pytest.skip("processes are held to processors, which this system cannot do", allow_module_level=True)


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location("benchmark_of_peers", FOLDER / "peers.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_torch_beside_acclimate():
    """One small net in both, as a user would call it."""
    command = [sys.executable, FOLDER / "peers.py", "--net", "mlp", "--batch", "4", "--threads", "1"]
    done = subprocess.run(
        [*command, "--peer", "torch", "--repeats", "2", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ours, torch = json.loads(done.stdout)["rows"]
    assert (ours["peer"], torch["peer"]) == ("acclimate", "torch")
    assert torch["agrees"] and torch["loss_difference"] < 1e-4
    assert torch["macs_per_step"] == ours["macs_per_step"] == 4 * (3 * (64 * 32 + 32 * 10) - 64 * 32)
    assert 0 < ours["share_of_peak"] < 1 and ours["over_acclimate"] == 1
    assert ours["peak_resident_mib"] < torch["peak_resident_mib"]


def test_a_peer_that_does_not_learn_differs(peers):
    ours = [2.3 - 0.02 * i for i in range(peers.CHECKED_STEPS)]
    assert peers.differs(ours, [v * (1 + 1e-5) for v in ours]) < peers.TOLERANCE
    assert peers.differs(ours, ours[:1] * len(ours)) > peers.TOLERANCE
    assert peers.differs(ours, [*ours[:-1], float("nan")]) > peers.TOLERANCE


def test_results_merge(peers, tmp_path):
    """A later run replaces its own rows, and no others."""
    key = {"net": "mlp", "threads": 1, "scheme": "full", "optimizer": "sgd"}
    row = {**key, "batch": 1, "peer": "torch", "step_ms": 1.0}
    path = tmp_path / "results.json"
    peers.merge([row, {**row, "batch": 8}], path)
    peers.merge([{**row, "step_ms": 2.0}, {**row, "peer": "acclimate"}], path)
    rows = json.loads(path.read_text())["rows"]
    assert [(r["batch"], r["peer"], r["step_ms"]) for r in rows] == [
        (1, "acclimate", 1.0),
        (1, "torch", 2.0),
        (8, "torch", 1.0),
    ]


@pytest.mark.slow
def test_published_time_and_energy_of_a_pi():
    """Within 10 % on average on the cells of the table that nothing was fitted to."""
    done = subprocess.run([sys.executable, FOLDER / "energy.py", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for what, fitted in (("seconds", 1), ("joules", 2)):
        errors = [
            abs(c[what] / c[f"published_{what}"] - 1) for c in found["cells"] if not c[f"{what}_fitted"]
        ]
        assert len(errors) == 10 - fitted and sum(errors) / len(errors) < 0.10
