"""Programs and deltas that were tampered with, sent to a board: refused with a status, or harmless; it goes on."""

from __future__ import annotations

import importlib.util

import pytest
from firmware.boards import built
from runtime.native import ROOT

from acclimate.errors import AcclimateError
from acclimate.firmware.export import export
from acclimate.firmware.link import Board, Process

spec = importlib.util.spec_from_file_location("board_files", ROOT / "fuzz/board_files.py")
fuzz = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)


def project(folder):
    return export(fuzz.plan(), folder / "project", slot_bytes=fuzz.room(fuzz.plan()))


def test_on_a_sanitized_process(runtime, tmp_path):
    with Board(Process([built(project(tmp_path), runtime)]), timeout_s=20) as board:
        found = fuzz.hostile(board, fuzz.plan(), seed=1, count=600)
    assert found["mutants"] == 600
    assert found["Program taken up"] and found["delta taken up"] and found["run"] > 100
    kinds = {k for k in found if k.startswith("Program refused")}
    assert len(kinds) >= 6 and sum(found[k] for k in kinds) > 200
    assert len({k for k in found if k.startswith("delta refused")}) >= 5


def test_a_missing_check_is_found(runtime, tmp_path):
    """A loader that does not ask whether tensors lie within their memory."""
    made = project(tmp_path)
    source = made.folder / "src/ac_core.c"
    text = source.read_text()
    check = "if (t->offset % 4 || t->offset + (ac_tensor_bytes(t) + 3) / 4 * 4 > room) return AC_E_OFFSET;"
    assert text.count(check) == 1
    source.write_text(text.replace(check, "(void)room;"))
    with (
        Board(Process([built(made, [o for o in runtime if o.stem != "ac_core"])]), timeout_s=20) as board,
        pytest.raises((AcclimateError, AssertionError)),
    ):
        fuzz.hostile(board, fuzz.plan(), seed=1, count=5000)


@pytest.mark.slow
@pytest.mark.parametrize("cpu", ["cortex-m4", "riscv32"])
def test_on_an_emulated_board(cpu, tmp_path):
    """Whatever touches memory that the board has not got ends the emulation."""
    for package in ("unicorn", "ziglang", "elftools"):
        pytest.importorskip(package)
    from dataclasses import replace

    from acclimate import device
    from acclimate.firmware import toolchain, trial

    plan = replace(fuzz.plan(), device=device.get("nano33ble"))
    folder = export(plan, tmp_path / "project", target=cpu, slot_bytes=fuzz.room(plan)).folder
    with trial.start(toolchain.build_project(folder)) as board:
        assert fuzz.hostile(board, plan, seed=2, count=400)["mutants"] == 400
