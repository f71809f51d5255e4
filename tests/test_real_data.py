"""The main job on measured data: the benchmark's quick runs must show that learning on the device helps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed (the test extra)")
DATA = os.environ.get("ACCLIMATE_DATA", "")
BENCHMARK = Path(__file__).parents[1] / "benchmarks/real_data.py"


def quick(task, *files):
    """Rows of one task by scheme."""
    for file in files:
        if not DATA or not (Path(DATA) / file).exists():
            pytest.skip(f"{file} is not in ACCLIMATE_DATA ({DATA or 'not set'})")
    done = subprocess.run(
        [sys.executable, BENCHMARK, task, "--quick", "--json"], capture_output=True, text=True, check=True
    )
    rows = json.loads(done.stdout).get(task)
    if rows is None:
        pytest.skip(f"{task}: {done.stderr.strip()}")
    return {r["scheme"].split(":")[0]: r for r in rows}


def test_phone_to_watch():
    """Trained on the phone, worn as a watch: near chance before, far better after, whatever learns."""
    rows = quick("watch", "har_spsw.npz")
    assert all(r["accuracy_after"] > r["accuracy_before"] + 0.1 for r in rows.values())
    assert rows["auto"]["accuracy_after"] > 0.7
    assert rows["last"]["arena_bytes"] < rows["full"]["arena_bytes"]


def test_another_patients_ecg():
    rows = quick("ecg", "mitbih_beats.npz")
    assert rows["auto"]["accuracy_after"] > rows["auto"]["accuracy_before"]


def test_published_network_on_cifar10():
    """The published ResNet-26 imports with its own weights and scores what its data's notes say; learning keeps it."""
    rows = quick("cifar10", "cifar10_testset.npz")
    assert rows["last"]["accuracy_before"] == pytest.approx(0.79, abs=0.04)
    assert rows["last"]["accuracy_after"] > rows["last"]["accuracy_before"] - 0.03
