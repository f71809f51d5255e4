"""The example in C is built and run, learns what Python learns to the last bit, and needs nothing of the machine."""

import re
import struct
import sys

import numpy as np
import pytest
from runtime.native import ROOT, STRICT, call, compiler, sources, tool

import acclimate.runtime
from acclimate.data import digits
from acclimate.learner import Learner
from acclimate.objective import SGD
from acclimate.planner import compile_plan

EXAMPLE = ROOT / "examples/c"
MINIMAL = ROOT / "examples/minimal/learn.py"
sys.path.insert(0, str(EXAMPLE))
import make_program  # noqa: E402

sys.path.remove(str(EXAMPLE))

#: What the runtime may ask of a C library, and of the compiler's own one on small processors.
ALLOWED = {"memcpy", "memset", "memmove", "sqrtf"}
COMPILER = re.compile(
    r"__(stack_chk_\w+|aeabi_\w+|u?(div|mod)[dst]i\d|cpu_model|cpu_indicator_init)|_GLOBAL_OFFSET_TABLE_"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, plain_objects):
    """make_program.py's files and the compiled example."""
    folder = tmp_path_factory.mktemp("example")
    call(sys.executable, EXAMPLE / "make_program.py", folder)
    include = f"-I{acclimate.runtime.SOURCE}"
    call(compiler(), *STRICT, "-O2", include, EXAMPLE / "learn.c", *plain_objects, "-o", folder / "learn")
    return folder


def learn(folder, *args, state="a.acu", program="digits.acp", data="digits.acd", expect=0, wrapper=()):
    done = call(
        *wrapper,
        folder / "learn",
        folder / program,
        folder / data,
        "--state",
        folder / state,
        *args,
        expect=expect,
    )
    return done.stdout if expect == 0 else done.stderr


def test_it_learns_and_survives_a_power_cycle(folder):
    text = learn(folder, state="learned.acu")
    losses = [float(v) for v in re.findall(r"mean loss ([\d.]+)", text)]
    before, after, again = (
        float(re.search(rf"{what} +([\d.]+)", text)[1])
        for what in ("accuracy before", "accuracy after", "after power cycle")
    )
    assert before < 0.2 and after > 0.9 and again == after
    assert len(losses) > 10 and losses[-1] < 0.3 * losses[0]
    assert "starting from the model" in text
    text = learn(folder, "--steps", 1, state="learned.acu")
    assert "going on from what was learned before" in text
    assert float(re.search(r"accuracy before +([\d.]+)", text)[1]) == after


@pytest.mark.parametrize("steps", [1, 40])
def test_the_same_bits_as_python(folder, steps, monkeypatch):
    """After k steps: parameters and momentum, from two processes and two compilers' flags."""
    monkeypatch.setenv("ACCLIMATE_KERNELS", "plain")
    kept = folder / f"{steps}.acu"
    learn(folder, "--steps", steps, "--lr", 0.02, state=kept.name)
    learner, data, n = Learner(make_program.plan()), digits(), make_program.BATCH * steps
    assert (folder / "digits.acp").read_bytes() == learner.plan.program.bytes
    learner.partial_fit(data.x[:n], data.y[:n], lr=float(np.float32(0.02)))
    for name in learner.parameters():
        assert (learner.parameters()[name] != learner.plan.model.values[name].data).any(), (
            f"{name} did not learn"
        )
    from_c = Learner(make_program.plan()).restore(kept)
    assert from_c._main.state.tobytes() == learner._main.state.tobytes()


def test_python_and_c_take_over_from_each_other(folder, monkeypatch):
    """Python learns, C goes on, Python goes on: the same bits as Python alone."""
    monkeypatch.setenv("ACCLIMATE_KERNELS", "plain")
    data, batch, rate = digits(), make_program.BATCH, float(np.float32(0.02))
    alone = Learner(make_program.plan())
    alone.partial_fit(data.x[: 4 * batch], data.y[: 4 * batch], lr=rate)
    alone.save(folder / "both.acu")
    learn(folder, "--steps", 3, "--lr", 0.02, state="both.acu")
    both = Learner(make_program.plan()).restore(folder / "both.acu")
    for learner, first in ((alone, 0), (alone, 3), (both, 3)):
        part = slice(first * batch, 3 * batch if first == 0 else 7 * batch)
        learner.partial_fit(data.x[part], data.y[part], lr=rate)
    assert both._main.state.tobytes() == alone._main.state.tobytes()


def test_embedded_program(folder, plain_objects):
    flags = [f"-I{acclimate.runtime.SOURCE}", f"-I{folder}", '-DEMBEDDED="digits.h"']
    call(compiler(), *STRICT, "-O2", *flags, EXAMPLE / "learn.c", *plain_objects, "-o", folder / "embedded")
    own = call(folder / "embedded", folder / "digits.acd", "--steps", 20, "--state", folder / "e.acu").stdout
    assert own == learn(folder, "--steps", 20, state="f.acu")
    assert (folder / "e.acu").read_bytes() == (folder / "f.acu").read_bytes()


def test_what_is_damaged_is_refused(folder):
    learn(folder, "--steps", 2)
    good = (folder / "a.acu").read_bytes()
    texts = {
        0: "not a Program, or not a delta",
        5: "format version",
        9: "cut off",
        13: "checksum",
        16: "checksum",
        len(good) - 1: "checksum",
    }
    for at, text in texts.items():
        raw = bytearray(good)
        raw[at] ^= 4
        (folder / "bad.acu").write_bytes(raw)
        assert text in learn(folder, state="bad.acu", expect=1)
        assert (folder / "bad.acu").read_bytes() == raw
    (folder / "bad.acu").write_bytes(good[:-1])
    assert "cut off" in learn(folder, state="bad.acu", expect=1)

    other = compile_plan(make_program.network(), batch_size=make_program.BATCH, optimizer="sgd").program.bytes
    (folder / "other.acp").write_bytes(other)
    assert "does not fit" in learn(folder, program="other.acp", expect=1)
    model = make_program.network()
    model.values["conv1.bias"].data[0] = 1
    other = compile_plan(model, batch_size=make_program.BATCH, optimizer=SGD(momentum=0.9)).program.bytes
    (folder / "other.acp").write_bytes(other)
    assert "another model" in learn(folder, program="other.acp", expect=1)

    raw = bytearray((folder / "digits.acp").read_bytes())
    raw[-1] ^= 1
    (folder / "bad.acp").write_bytes(raw)
    assert "checksum" in learn(folder, program="bad.acp", expect=1)
    assert "too large" in learn(folder, program="digits.acd", expect=1)
    assert "not a Program" in learn(folder, program="a.acu", expect=1)
    (folder / "bad.acd").write_bytes((folder / "digits.acd").read_bytes()[:400])
    assert "not a file of samples" in learn(folder, data="digits.acp", expect=1)
    assert "cannot be read" in learn(folder, data="bad.acd", expect=1)
    assert "cannot be read" in learn(folder, program="missing.acp", expect=1)
    assert "cannot be opened" in learn(folder, data="missing.acd", expect=1)


def test_labels_outside_the_classes_are_refused(folder):
    raw = bytearray((folder / "digits.acd").read_bytes())
    struct.pack_into("<i", raw, 16 + 3 * (4 + 4 * 64), 10)
    (folder / "labels.acd").write_bytes(raw)
    assert "label is outside the classes" in learn(folder, data="labels.acd", state="none.acu", expect=1)
    assert not (folder / "none.acu").exists()


def test_the_makefile(folder):
    """`make` with the runtime's files alone, and no package: what the README says."""
    target = folder / "make"
    target.mkdir()
    for name in ("learn.c", "Makefile", "make_program.py"):
        (target / name).write_bytes((EXAMPLE / name).read_bytes())
    for name in ("digits.acp", "digits.acd", "digits.h"):
        (target / name).write_bytes((folder / name).read_bytes())
    plan = call(
        tool("make"), "-n", "learn", "embedded", f"RUNTIME={acclimate.runtime.SOURCE}", "CC=cc", cwd=target
    ).stdout
    assert "-Werror" in plan and "ac_python" not in plan and all(str(s) in plan for s in sources())
    assert (
        call(tool("make"), "-n", "run", f"PYTHON={sys.executable}", cwd=target).stdout.count(
            str(acclimate.runtime.SOURCE)
        )
        > 3
    )


def test_a_bare_python_learns_with_the_library_alone(folder, library):
    """examples/minimal: no site-packages, no environment; what it kept is what Python restores."""
    args = (library, folder / "digits.acp", folder / "digits.acd", folder / "bare.acu")
    first, second = (call(sys.executable, "-I", "-S", MINIMAL, *args).stdout for _ in range(2))
    scores = [float(v) for text in (first, second) for v in re.findall(r"accuracy \w+ +([\d.]+)", text)]
    assert scores[0] < 0.2 and scores[1] > 0.85 and scores[2] == scores[1] and scores[3] >= scores[1] - 0.02
    data = digits()
    restored = Learner(make_program.plan()).restore(folder / "bare.acu")
    assert restored.score(data.x_val, data.y_val) == pytest.approx(scores[3], abs=1e-3)
    text = MINIMAL.read_text()
    assert "numpy" not in text.split('"""')[2] and "acclimate" not in text.split('"""')[2]
    (folder / "bare.acu").write_bytes(b"x" * 64)
    done = call(sys.executable, "-I", "-S", MINIMAL, *args, expect=1)
    assert "not a delta" in done.stderr


def test_the_example_in_the_header(tmp_path):
    """The shortest example of acclimate.h compiles as it stands there."""
    text = (acclimate.runtime.SOURCE / "acclimate.h").read_text()
    body = text.split("The shortest one:")[1].split("C99; no malloc")[0]
    lines = [re.sub(r"^ \* {0,5}", "", line) for line in body.splitlines()]
    code = "\n".join(line for line in lines if line.strip())
    assert "ac_load" in code and "ac_run" in code
    (tmp_path / "shortest.c").write_text(
        '#include "acclimate.h"\n#define STATE_BYTES 4096\n#define ARENA_BYTES 4096\n'
        "void read_sensor(float *x, int32_t *y);\nvoid report(float loss);\n"
        "int learn(const void *program_bytes, size_t program_size);\n"
        f"int learn(const void *program_bytes, size_t program_size) {{\n{code}\nreturn 0; }}\n"
    )
    call(
        compiler(),
        *STRICT,
        f"-I{acclimate.runtime.SOURCE}",
        "-c",
        tmp_path / "shortest.c",
        "-o",
        tmp_path / "shortest.o",
    )


# -- what the runtime needs of a machine ---------------------------------------------------------------------------


def test_no_symbols_but_memcpy_and_its_like(plain_objects):
    undefined, defined = set(), set()
    for line in call(tool("nm"), *plain_objects).stdout.splitlines():
        if re.match(r"^ +[Uw] ", line):
            undefined.add(line.split()[-1])
        elif re.match(r"^[0-9a-f]+ [A-Za-z] ", line):
            defined.add(line.split()[-1])
    assert {"ac_load", "ac_run", "ac_table_base"} <= defined
    needed = {s.lstrip("_") if sys.platform == "darwin" else s for s in undefined - defined}
    assert "memcpy" in needed
    assert {s for s in needed - ALLOWED if not COMPILER.fullmatch(s)} == set()


def test_no_mutable_globals(plain_objects):
    """Sections that a board would have to keep in RAM; constants with addresses in them are not among those."""
    found = {}
    for line in call(tool("size"), "-A", "-d", *plain_objects).stdout.splitlines():
        name, *numbers = line.split() or [""]
        if (
            re.match(r"\.(data|bss|tdata|tbss|sdata|sbss)", name)
            and not name.startswith(".data.rel.ro")
            and numbers[0] != "0"
        ):
            found[name] = numbers[0]
    assert found == {}


def test_stack(plain_objects):
    """What acclimate.h says of the stack: no frame of unknown size, and the largest below the interpreter's fits."""
    frames = {}
    for path in {o.parent for o in plain_objects}.pop().glob("*.su"):
        for line in path.read_text().splitlines():
            place, size, kind = line.split("\t")
            assert kind in ("static", "dynamic,bounded"), line
            frames[path.stem, place.rsplit(":", 1)[1]] = int(size)
    if not frames:
        pytest.skip("this compiler does not say how much stack a function takes")
    text = (acclimate.runtime.SOURCE / "acclimate.h").read_text()
    load, run = (
        int(v) << 10
        for v in re.search(r"ac_load: under (\d+) KiB; of ac_run: under (\d+) KiB", text).groups()
    )
    core = {f: size for (file, f), size in frames.items() if file == "ac_core"}
    checks = max(size for (file, _), size in frames.items() if file.startswith("ac_checks"))
    assert core.get("ac_load_with", 0) + core["check_entry"] + checks < load
    delta = {f: size for (file, f), size in frames.items() if file == "ac_delta"}
    deepest = max(size for f, size in delta.items() if f not in ("ac_delta_save", "ac_delta_load"))
    assert (
        max(delta["ac_delta_save"], delta["ac_delta_load"]) + 2 * deepest
        < int(re.search(r"Stack of both: under (\d+) KiB", text)[1]) << 10
    )
    assert (
        core["ac_run_range"]
        + max(size for (file, _), size in frames.items() if file.startswith("ac_kernels"))
        < run
    )


def test_every_public_name_begins_with_ac(plain_objects):
    for line in call(tool("nm"), "-g", "--defined-only", *plain_objects).stdout.splitlines():
        if re.match(r"^[0-9a-f]+ [A-Z] ", line):
            assert line.split()[-1].startswith("ac_")


def test_valgrind(folder):
    """No byte is read before it was written, and none beside what was asked for."""
    raw = bytearray((folder / "digits.acd").read_bytes())
    struct.pack_into("<I", raw, 4, 60)
    struct.pack_into("<I", raw, 12, 10)
    (folder / "few.acd").write_bytes(raw[: 16 + 60 * 260])
    wrapper = [tool("valgrind"), "--error-exitcode=9", "--quiet", "--leak-check=full"]
    text = learn(folder, "--steps", 5, state="v.acu", data="few.acd", wrapper=wrapper)
    assert "after power cycle" in text
    learn(folder, "--steps", 5, state="w.acu", data="few.acd")
    assert (folder / "v.acu").read_bytes() == (folder / "w.acu").read_bytes()
