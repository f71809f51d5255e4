"""The same bits everywhere: every op's examples and 200 steps of training, compiled for other processors and emulated.

The cross compiler is zig's (`make targets` installs it), the emulator is QEMU's user mode (apt-get install qemu-user).
"""

import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path

import pytest
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


@pytest.mark.slow
def test_the_comparison_can_fail(corpus, expected, tmp_path):
    """With products and sums fused, as a processor with FMA would by default, the bits do differ."""
    if platform.machine() != "x86_64" or "fma" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("needs an x86-64 processor with FMA")
    program = build([compiler()], tmp_path, "-O2", "-mfma", "-ffp-contract=fast")
    assert len(differences(call(program, corpus, STEPS).stdout.splitlines(), expected)) > 20
