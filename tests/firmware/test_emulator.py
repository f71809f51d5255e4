"""The runtime and whole firmware on emulated processors: the same bits, counted instructions, enforced memory."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil

import numpy as np
import pytest
from test_quantized import small_net

import acclimate
from acclimate import device
from acclimate.data import digits
from acclimate.errors import AcclimateError, CannotFit, WrongUse
from acclimate.firmware import emulator, toolchain, trial
from acclimate.firmware.export import export
from acclimate.ir import Dim, Graph
from acclimate.ops import emit
from acclimate.program import operations
from acclimate.runtime import Session

MISSING = [n for n in ("ziglang", "unicorn", "elftools") if importlib.util.find_spec(n) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (extra emulate)")
CPUS = ["cortex-m7", *(pytest.param(c, marks=pytest.mark.slow) for c in toolchain.CPUS if c != "cortex-m7")]


def mlp() -> Graph:
    """Two dense layers for the digits, with random weights."""
    rng, g = np.random.default_rng(0), Graph()
    y = emit(g, "reshape", g.input("x", (Dim(1, 1), 1, 8, 8)), shape=(Dim(1, 1), 64))
    for name, k, o in (("hidden", 64, 32), ("head", 32, 10)):
        y = emit(g, "relu", y) if name == "head" else y
        weight = g.persistent(f"{name}.weight", rng.normal(0, (2 / k) ** 0.5, (o, k)))
        y = emit(g, "matmul", y, weight, g.persistent(f"{name}.bias", np.zeros(o)), tb=1)
    g.outputs["output"] = y
    return g


@pytest.fixture(scope="module")
def int8_plan():
    return acclimate.plan(small_net(), device="stm32f7", scheme="full", batch_size=2)


@pytest.fixture(scope="module")
def float_plan():
    return acclimate.plan(mlp(), device="stm32f7", scheme="full", batch_size=4)


@pytest.fixture(scope="module")
def project(float_plan, tmp_path_factory):
    return export(float_plan, tmp_path_factory.mktemp("firmware") / "mlp", target="cortex-m7").folder


@pytest.fixture(scope="module")
def firmware(project):
    return toolchain.build_project(project)


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("kind", ["int8", "float"])
def test_the_same_bits_as_here(cpu, kind, int8_plan, float_plan):
    if cpu not in toolchain.MACHINES or cpu == "cortex-m55":
        pytest.skip(f"unicorn does not emulate {cpu}")
    program = (int8_plan if kind == "int8" else float_plan).program
    harness, session = emulator.Harness(program, cpu, "stm32f7"), Session(program, kernels="plain")
    for seed in range(3):
        feeds = emulator.default_feeds(program, "step", seed)
        run, here = harness.run("step", **feeds), session.run("step", **feeds)
        assert harness.state == session.state.tobytes()[: program.state_bytes]
        assert run.outputs["loss"].tobytes() == here["loss"].tobytes()
    assert run.instructions >= sum(op.instructions for op in run.ops) > 0.95 * run.instructions
    assert run.instructions == sum(run.functions.values())
    assert [op.op for op in run.ops] == [op.op for op in operations(program, "step")]
    assert all(op.instructions > 0 for op in run.ops)
    assert 0 < run.stack_bytes <= toolchain.STACK_BYTES and run.arena_bytes <= program.arena_bytes
    again = emulator.Harness(program, cpu, "stm32f7").run(
        "step", **emulator.default_feeds(program, "step", 0)
    )
    first = emulator.Harness(program, cpu, "stm32f7").run(
        "step", **emulator.default_feeds(program, "step", 0)
    )
    assert again.instructions == first.instructions, "counts can be repeated"


def test_a_program_that_does_not_fit_is_refused(float_plan):
    small = dataclasses.replace(device.get("stm32f7"), name="small", ram_bytes=12 << 10, reserve_bytes=0)
    with pytest.raises(CannotFit, match="RAM of the emulated board"):
        emulator.Harness(float_plan.program, "cortex-m7", small)


def test_a_firmware_larger_than_the_board_does_not_link(project):
    for change in ({"ram_bytes": 8 << 10, "reserve_bytes": 4 << 10}, {"flash_bytes": 64 << 10}):
        with pytest.raises(CannotFit, match="does not fit the board"):
            toolchain.build_project(
                project, dataclasses.replace(device.get("stm32f7"), name="small", **change)
            )


def test_a_stack_that_grows_out_of_ram_faults(project):
    """RAM starts with the stack: with too little of it the store past its end is outside of what is mapped."""
    little = dataclasses.replace(device.get("stm32f7"), name="little", reserve_bytes=512)
    with pytest.raises(AcclimateError, match="past its end"):
        trial.start(toolchain.build_project(project, little))


def test_learning_on_an_emulated_board(float_plan):
    data = digits()
    x, x_val = data.x, data.x_val
    figures = trial.emulate(float_plan, (x, data.y), (x_val[:80], data.y_val[:80]), steps=60, lr=0.1)
    learner = acclimate.Learner(float_plan, kernels="plain")
    order = np.random.default_rng(0).permutation(len(x))[: 60 * 4]
    learner.partial_fit(x[order], data.y[order], lr=0.1)
    assert figures["loss_history"] == [float(v) for v in learner.loss_history], "the very same losses"
    assert figures["accuracy_after"] == learner.score(x_val[:80], data.y_val[:80])
    assert figures["accuracy_after"] > figures["accuracy_before"] + 0.2
    assert (
        figures["ram_bytes"] <= figures["ram_limit_bytes"]
        and figures["flash_bytes"] <= figures["flash_limit_bytes"]
    )
    assert 0 < figures["stack_bytes"] < figures["stack_room_bytes"]
    assert figures["arena_bytes"] <= figures["arena_planned_bytes"]
    assert figures["instructions_per_step"] > figures["instructions_per_prediction"] > 0


@pytest.mark.parametrize("cpu", ["cortex-m7", pytest.param("riscv32", marks=pytest.mark.slow)])
def test_what_is_kept_outlives_power_cuts(cpu, int8_plan, tmp_path):
    """Old or new, whatever operation of the flash the power is cut in; what was not saved is gone."""
    x, y = _samples(int8_plan)
    x = emulator.default_feeds(int8_plan.program, "step")["x"]
    y = y[: len(x)]
    with trial.start(trial.firmware_of(int8_plan, tmp_path / "project", cpu)) as board:
        machine = board.link.line
        assert not machine.erases.any() and set(machine.kept) == {0xFF}
        states = []
        for _ in range(2):
            board.step(x, y, 0.1)
            board.save()
            states.append(board.state())
        old, image, before = states[1], machine.kept, machine.flash_operations
        board.step(x, y, 0.1)
        new, delta = board.state(), board.delta()
        erased = int(machine.erases.sum())
        board.save()
        whole, operations = np.frombuffer(machine.kept, np.uint8), machine.flash_operations - before
        erased = int(machine.erases.sum()) - erased
        assert len({*states, new}) == 3 and operations > len(delta) // 4 and erased >= 1
        seen = set()
        for operation in [*range(1, erased + 3), operations // 2, *range(operations - 20, operations + 1)]:
            machine.kept = image
            board.restart()
            assert board.state() == old
            board.load_delta(delta)
            machine.lose_power_in(operation, seed=operation)
            with pytest.raises(AcclimateError, match="restarted"):
                board.save()
            torn = np.frombuffer(machine.kept, np.uint8)
            if operation > erased:  # some of the bits that are to be cleared are not yet
                assert (torn & whole == whole).all()
            board.connect()
            assert board.state() in (old, new)
            seen.add(board.state())
        assert seen == {old, new}
        machine.kept = image
        board.restart()
        board.load_delta(delta)
        board.save()
        assert board.kept()["erases"] > 1
        (tmp_path / "flash.bin").write_bytes(machine.kept)
        learner = acclimate.Learner(int8_plan, kernels="plain").restore(tmp_path / "flash.bin")
        assert learner._main.state.tobytes()[: len(new)] == board.state() == new
        board.rollback()
        assert board.state() == old


@pytest.mark.parametrize("kind", ["int8", "float"])
def test_check_finds_all_equal(kind, int8_plan, float_plan, tmp_path):
    plan = int8_plan if kind == "int8" else float_plan
    x, y = _samples(plan)
    with trial.start(trial.firmware_of(plan, tmp_path / "project")) as board:
        found = trial.check(plan, x, y, {"emulator": board}, steps=3)
    assert found["equal"] and found["differences"] == {}
    assert 0 < found["largest_error"]["error"] < 1e-4


def test_check_names_the_first_tensor_that_differs(float_plan, tmp_path):
    """A board whose ReLU is another one: a file of its project was changed."""
    x, y = _samples(float_plan)
    folder = export(float_plan, tmp_path / "changed", target="cortex-m7").folder
    source = folder / "src" / "ac_kernels_elementwise.c"
    text = source.read_text()
    head = "ac_status AC_KERNEL(gate_bits)(const ac_call *call) {"
    spoil = "for (uint32_t i = 0; i < AC_IN_T(call, 0)->size; i++) ((float *)AC_IN(call, 0))[i] = 1.0f;"
    assert head in text
    source.write_text(text.replace(head, f"{head}\n    {spoil}\n"))
    with trial.start(toolchain.build_project(folder)) as board:
        found = trial.check(float_plan, x, y, {"changed": board}, steps=2)
    first = found["differences"]["changed"]
    assert not found["equal"] and (first["op"], first["step"]) == ("gate_bits", 0)
    assert first["tensor"] in float_plan.layouts["step"].graph.values


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(WrongUse, match="board.ld is not there"):
        toolchain.build_project(tmp_path)


def _pairs():
    """Quick: what the other tests have compiled already."""
    for cpu in toolchain.MACHINES:
        for compiler in toolchain.COMPILERS:
            quick = (cpu, compiler) == ("cortex-m7", "zig")
            yield pytest.param(cpu, compiler, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("cpu", "compiler"), list(_pairs()))
def test_qemu_agrees(cpu, compiler, int8_plan, tmp_path):
    machine = toolchain.MACHINES[cpu]
    cross = "arm-none-eabi-gcc" if cpu.startswith("cortex") else "riscv64-unknown-elf-gcc"
    for tool in (machine.qemu, *((cross,) if compiler == "gcc" else ())):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    x, y = _samples(int8_plan)
    firmware = trial.firmware_of(int8_plan, tmp_path / "project", cpu, compiler)
    counts = {}
    for engine in ("qemu", "unicorn") if cpu != "cortex-m55" else ("qemu",):
        with trial.start(firmware, engine) as board:
            assert trial.check(int8_plan, x, y, {engine: board}, steps=2)["equal"]
            counts[engine] = board.ticks * getattr(board.link.line, "per_tick", 1.0)
    assert all(abs(count - counts["qemu"]) < 200 for count in counts.values()), "the same instructions"


def test_the_verbs(tmp_path, float_plan, project, monkeypatch, capsys):
    for package in ("typer", "torch"):
        pytest.importorskip(package)
    import torch

    from acclimate import cli

    monkeypatch.chdir(tmp_path)
    data = digits()
    dense = [torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)]
    net = torch.nn.Sequential(*dense).eval()
    torch.export.save(torch.export.export(net, (torch.zeros(1, 1, 8, 8),)), "mlp.pt2")
    np.savez("mine.npz", x=data.x[:120], y=data.y[:120], x_val=data.x_val[:24], y_val=data.y_val[:24])
    common = ["--data", "mine.npz", "--steps", "3", "--json"]
    for arguments, key in (
        (["emulate", "mlp.pt2", "--device", "stm32f7", "--scheme", "last"], "instructions_per_step"),
        (["emulate", str(project)], "instructions_per_step"),
        (["check", "mlp.pt2", "--device", "stm32f7"], "equal"),
    ):
        assert cli.main([*arguments, *common]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["steps"] == 3 and found[key]
    assert cli.main(["emulate", str(tmp_path), "--data", "mine.npz"]) == 2
    assert "program.acp is not there" in capsys.readouterr().err


def _samples(plan) -> tuple[np.ndarray, np.ndarray]:
    binding = plan.program.entries["step"]["x"]
    rng, shape = np.random.default_rng(1), (12, *binding.type.shape[1:])
    x = rng.normal(size=shape).astype(np.float32)
    return x, rng.integers(0, 3, 12)
