"""On measured data, a few kilobytes of replay keep most of what is forgotten without."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed (the test extra)")
DATA = os.environ.get("ACCLIMATE_DATA", "")
BENCHMARK = Path(__file__).parents[1] / "benchmarks/replay.py"


@pytest.mark.slow
def test_a_class_learned_alone():
    if not DATA or not (Path(DATA) / "har_spsw.npz").exists():
        pytest.skip(f"har_spsw.npz is not in ACCLIMATE_DATA ({DATA or 'not set'})")
    done = subprocess.run(
        [sys.executable, BENCHMARK, "--quick", "--json"], capture_output=True, text=True, check=True
    )
    rows = {r["way"]: r for r in json.loads(done.stdout)["rows"]}
    without, kept = rows["no replay"], rows["latents, int8, balanced, 1 KB"]
    assert without["old_after"] < 0.5 < 0.7 < kept["old_after"] and kept["bytes"] <= 1024
    assert min(r["new_after"] for r in rows.values()) > 0.6
    assert (
        rows["windows, int8, balanced, 4 KB"]["old_after"] < rows["latents, int8, diverse, 4 KB"]["old_after"]
    )
