"""The same bits everywhere: every op's examples and 200 steps of training, compiled for other processors and emulated.

The cross compiler is zig's (`make targets` installs it), the emulator is QEMU's user mode (apt-get install qemu-user).
"""

import importlib.util
import os
import platform
import re
import shutil
import struct
import sys
from pathlib import Path

import pytest
from runtime.fast_cases import cases, program_of
from runtime.native import ROOT, STRICT, call, compiler, sources

import acclimate.runtime

STEPS = 200
DRIVER = Path(__file__).parent / "bits.c"
#: zig's name of a target -> the emulator, and what more the compiler should be told.
TARGETS = {
    "aarch64-linux-musl": ("qemu-aarch64", []),
    "arm-linux-musleabihf": ("qemu-arm", ["-mcpu=cortex_a7"]),
    "riscv64-linux-musl": ("qemu-riscv64", []),
    "x86-linux-musl": ("qemu-i386", ["-msse2", "-mfpmath=sse"]),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Every op's examples, whole training steps of the tests' nets, and the digits of examples/c."""
    path = tmp_path_factory.mktemp("bits") / "corpus.bin"
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    code = (
        "import sys; sys.path += sys.argv[1:3]\n"
        "import seeds, make_program\n"
        "programs = dict.fromkeys([*seeds.programs(), make_program.plan().program.bytes])\n"
        "open(sys.argv[3], 'wb').write(b''.join(map(seeds.record, programs)))"
    )
    call(sys.executable, "-c", code, ROOT / "fuzz", ROOT / "examples/c", path, env=env)
    return path


def build(command: list[str], folder: Path, *flags: str) -> Path:
    out = folder / "bits"
    call(*command, *STRICT, *flags, f"-I{acclimate.runtime.SOURCE}", DRIVER, *sources(), "-o", out)
    return out


@pytest.fixture(scope="module")
def expected(corpus, tmp_path_factory) -> list[str]:
    lines = call(
        build([compiler()], tmp_path_factory.mktemp("host"), "-O2"), corpus, STEPS
    ).stdout.splitlines()
    assert len(lines) > 150 and len(set(lines)) > 0.9 * len(lines), "the checksums tell Programs apart"
    trained = [line for line in lines if line.split()[1] != "00000000"]
    assert len(trained) >= 8 and all(line.endswith(" 0") for line in trained[-8:]), "no step was refused"
    return lines


def differences(lines: list[str], expected: list[str]) -> list[str]:
    assert len(lines) == len(expected)
    return [
        f"Program {i}: {a}, must be {b}"
        for i, (a, b) in enumerate(zip(lines, expected, strict=True))
        if a != b
    ]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_another_processor(target, corpus, expected, tmp_path):
    emulator, flags = TARGETS[target]
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("there is no cross compiler: pip install ziglang (make targets)")
    if shutil.which(emulator) is None:
        pytest.skip(f"there is no {emulator}: apt-get install qemu-user")
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", target, "-static"]
    for level in ("-O3", "-O0"):
        program = build(zig, tmp_path, level, "-fno-sanitize=all", *flags)
        assert differences(call(emulator, program, corpus, STEPS).stdout.splitlines(), expected) == []


@pytest.mark.slow
@pytest.mark.parametrize("cc", ["gcc", "clang", "zig"])
@pytest.mark.parametrize("flags", ["-O0", "-O1", "-O3", "-Os", "-O3 -march=native"])
def test_another_compiler(cc, flags, corpus, expected, tmp_path):
    if cc == "zig":
        if importlib.util.find_spec("ziglang") is None:
            pytest.skip("there is no zig: pip install ziglang (make targets)")
        command = [sys.executable, "-m", "ziglang", "cc", "-fno-sanitize=all"]
    elif shutil.which(cc) is None:
        pytest.skip(f"{cc} is not installed")
    else:
        command = [cc]
    program = build(command, tmp_path, *flags.split())
    assert differences(call(program, corpus, STEPS).stdout.splitlines(), expected) == []


def test_a_processor_without_vectors(corpus, expected, tmp_path):
    """Its loops are others, four by four outputs at a time; this one can run them too."""
    program = build([compiler()], tmp_path, "-O1", "-DAC_SCALAR=1")
    assert differences(call(program, corpus, STEPS).stdout.splitlines(), expected) == []


@pytest.mark.slow
def test_the_comparison_can_fail(corpus, expected, tmp_path):
    """With products and sums fused, as a processor with FMA would by default, the bits do differ."""
    if platform.machine() != "x86_64" or "fma" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("needs an x86-64 processor with FMA")
    program = build([compiler()], tmp_path, "-O2", "-mfma", "-ffp-contract=fast")
    assert len(differences(call(program, corpus, STEPS).stdout.splitlines(), expected)) > 20


@pytest.mark.slow
def test_fast_kernels_on_neon(tmp_path):
    """Compiled for AArch64 and emulated, within rounding of the plain kernels."""
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("there is no cross compiler: pip install ziglang (make targets)")
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("there is no qemu-aarch64: apt-get install qemu-user")
    corpus, objects = tmp_path / "corpus.bin", []
    programs = [
        program_of(op, arrays, {k: v for k, v in attrs.items() if k not in ("low", "high")}).bytes
        for op, arrays, attrs in cases(5, 40)
        if op.startswith("conv") or op == "matmul"
    ]  # the others are plain kernels on parts
    corpus.write_bytes(b"".join(struct.pack("<I", len(p)) + p + bytes(-len(p) % 4) for p in programs))
    zig = [
        sys.executable,
        "-m",
        "ziglang",
        "cc",
        "-target",
        "aarch64-linux-musl",
        "-O3",
        "-fno-sanitize=all",
        "-DAC_HAVE_FAST=1",
        f"-I{acclimate.runtime.SOURCE}",
    ]
    table = acclimate.runtime.SOURCE / "ac_table.c"
    fast = [*sorted(acclimate.runtime.SOURCE.glob("host/ac_fast_*.c")), table]
    for files, flags in ((sources(), ["-ffp-contract=off"]), (fast, ["-ffp-contract=fast", "-DAC_FAST=1"])):
        for file in files:
            objects.append(tmp_path / f"{len(objects)}.o")
            call(*zig, *flags, "-c", file, "-o", objects[-1])
    call(*zig, "-static", DRIVER.with_name("fast.c"), *objects, "-lm", "-o", tmp_path / "fast")
    text = call("qemu-aarch64", tmp_path / "fast", corpus).stdout
    count, differ, wrong = (int(n) for n in re.findall(r"\d+", text.splitlines()[-1]))
    assert count == len(programs) and differ > count // 3 and wrong == 0, text
