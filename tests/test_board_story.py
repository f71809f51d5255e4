"""The whole story of a board, on measured data: the benchmark itself fails where a part of it does not hold."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("torch", "unicorn", "ziglang", "elftools"):
    pytest.importorskip(package)
DATA = os.environ.get("ACCLIMATE_DATA", "")
BENCHMARK = Path(__file__).parents[1] / "benchmarks/board_story.py"


@pytest.mark.slow
def test_the_story(tmp_path):
    if not DATA or not (Path(DATA) / "har_spsw.npz").exists():
        pytest.skip(f"har_spsw.npz is not in ACCLIMATE_DATA ({DATA or 'not set'})")
    page = tmp_path / "story.html"
    done = subprocess.run(
        [sys.executable, BENCHMARK, "--quick", "--json", "--html", page], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["accuracy_after"] > found["accuracy_before"] + 0.2
    assert found["accuracy_rolled_back"] == found["accuracy_after"] > found["accuracy_spoiled"]
    cuts = {r["part"]: r for r in found["power_cuts"]}
    assert all(r["cuts"] == r["old"] + r["new"] > 0 for r in cuts.values())
    assert cuts["erasing"]["new"] == cuts["delta"]["new"] == 0 < cuts["seal"]["new"]
    assert all(p["same"] for p in found["same_predictions"]) and len(found["same_predictions"]) == 3
    assert found["ram_bytes"] <= found["ram_limit_bytes"] == 256 << 10
    assert 0 < found["stack_bytes"] < found["stack_room_bytes"]
    assert found["arena_bytes"] <= found["arena_planned_bytes"]
    assert found["erases_counted"] == max(found["erases_of_pages"]) > 0
    assert "person" in page.read_text() and "<svg" in page.read_text()
