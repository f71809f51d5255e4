"""Hostile ONNX files: a Graph or a typed error, whatever the bytes. For longer: python fuzz/onnx_files.py."""

import signal
import sys

import pytest
from runtime.native import ROOT

pytest.importorskip("onnx", reason="onnx is not installed")
if not hasattr(signal, "setitimer"):
    pytest.skip("this system has no interval timer", allow_module_level=True)
sys.path.insert(0, str(ROOT / "fuzz"))
import onnx_files

sys.path.remove(str(ROOT / "fuzz"))


def test_the_seeds_are_models(tmp_path):
    for model in onnx_files.seeds():
        assert onnx_files.attempt(model.SerializeToString(), tmp_path / "m.onnx") == "graph"


@pytest.mark.parametrize("count", [800, pytest.param(20_000, marks=pytest.mark.slow)])
def test_mutants(count):
    outcomes, findings = onnx_files.fuzz(count, seed=0)
    print(f"\n{dict(outcomes)}")
    assert not findings, "\n".join(findings[:20])
    assert (
        outcomes["graph"] > 0.05 * count
        and outcomes["BadInput"] > 0.3 * count
        and outcomes["Unsupported"] > 0.02 * count
    )


def test_a_mutant_is_the_same_each_time():
    models = onnx_files.seeds()
    assert (
        onnx_files.mutant(models, 0, 5) == onnx_files.mutant(models, 0, 5) != onnx_files.mutant(models, 0, 6)
    )
