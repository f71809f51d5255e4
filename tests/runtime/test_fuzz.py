"""Mutated Programs against the loader and the kernels, under sanitizers. For longer: fuzz/README.md."""

from pathlib import Path

import pytest
from runtime.native import call, compiler

import acclimate.runtime
from acclimate.ops import TABLE

MUTANTS = 100_000
#: A view has no kernel: no Program may call it.
REACHABLE = {name for name, row in TABLE.items() if not row.view}
#: What only a delta is refused for.
OF_DELTAS = {
    "the delta was learned from another model",
    "a record of the delta does not fit: its name, type, shape or channels are not the Program's",
    "there is NaN or infinity among what was learned",
    "the bytes could not be written",
}


def check(summary: dict) -> None:
    """The mutants reached everything: each refusal's reason, and each op's kernel in a Program that was changed."""
    share = summary["accepted_changed"] / summary["mutants"]
    least = sorted(summary["ops"].items(), key=lambda item: item[1])[1:6]
    taken = summary["accepted"] / summary["mutants"]
    print(
        f"\n{summary['mutants']} mutants, {taken:.1%} accepted, {share:.1%} with other tensors or ops; least: {least}"
    )
    assert share > 0.03 and summary["run"] > 0.9 * summary["accepted"]
    assert {name for name, count in summary["ops"].items() if count} == REACHABLE
    unreached = {text for text, count in summary["refused"].items() if not count}
    assert unreached == {
        "no entry or binding has this name",
        "a label is outside the classes of the model, or an index outside its table",
        "a block of memory is not 4-byte aligned",
        *OF_DELTAS,
    }


def test_mutants(harness):
    summary = harness.run(harness.seeds, "--count", MUTANTS)
    assert summary["mutants"] == MUTANTS
    check(summary)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_more_mutants(harness, seed):
    check(harness.run(harness.seeds, "--count", 10 * MUTANTS, "--seed", seed))


@pytest.mark.slow
def test_mutants_with_vector_instructions(native_harness):
    out = native_harness.seeds.with_suffix(".statuses")
    native_harness.run(native_harness.seeds, "--replay", out)
    assert not any(out.read_bytes())
    check(native_harness.run(native_harness.seeds, "--count", 5 * MUTANTS, "--seed", 4))


def test_a_mutant_is_the_same_each_time(harness, tmp_path):
    for name in "ab":
        harness.run(harness.seeds, "--only", 12345, "--save", tmp_path / name)
    harness.run(harness.seeds, "--only", 12346, "--save", tmp_path / "c")
    first = (tmp_path / "a").read_bytes()
    assert first == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()


@pytest.mark.parametrize("op", ["slice", "take", "matmul", "concat", "conv_input_grad"])
def test_a_missing_check_is_found(harness, tmp_path, op):
    """The harness is worth its time: without the loader's check of one op it soon ends in a finding in that op."""
    planted, table = tmp_path / "planted.c", next(o for o in harness.objects if o.stem == "ac_table")
    planted.write_text(
        '#include "ac_kernel.h"\nac_status planted(const ac_call *c);\n'
        "ac_status planted(const ac_call *c) { (void)c; return AC_OK; }\n"
    )
    source = acclimate.runtime.SOURCE
    flags = [*harness.flags, f"-I{source}", f"-Dac_check_{op}=planted"]
    others = [o for o in harness.objects if o != table]
    call(compiler(), *flags, source / "ac_table.c", planted, *others, "-o", tmp_path / "fuzz")
    crash = tmp_path / "crash.acp"
    error = harness.run(
        harness.seeds, "--count", MUTANTS, "--save", crash, binary=tmp_path / "fuzz", expect=1
    )["error"]
    assert f"in op {op};" in error
    index = error.split("--only ")[1].split()[0]
    kept = crash.read_bytes()
    again = harness.run(harness.seeds, "--only", index, "--save", crash, binary=tmp_path / "fuzz", expect=1)[
        "error"
    ]
    assert f"in op {op};" in again and crash.read_bytes() == kept


@pytest.mark.parametrize("count", [40_000, pytest.param(2_000_000, marks=pytest.mark.slow)])
def test_deltas(harness, count):
    """The same for what was learned: every reason of refusal but those that bytes cannot give, and many taken."""
    summary = harness.run(harness.pairs, "--count", count, binary=harness.delta_binary)
    print(f"\n{summary}")
    assert summary["mutants"] > count and summary["accepted_changed"] > 0.05 * count
    reached = {text for text, number in summary["refused"].items() if number}
    assert reached == {
        "the file is cut off or has bytes too many",
        "the file is not a Program, or not a delta where one is read",
        "the file has a format version that this runtime does not read",
        "the checksum does not match: bytes were changed",
        "an offset or size points outside its area",
    } | (OF_DELTAS - {"the bytes could not be written"})


def fuzzer_without(harness, folder: Path, name: str, check: str, without: str) -> Path:
    """The fuzzer fuzz/`name`.c on a runtime whose ac_`name`.c has something else in place of a check."""
    source = (acclimate.runtime.SOURCE / f"ac_{name}.c").read_text()
    assert source.count(check) == 1
    changed = folder / f"ac_{name}.c"
    changed.write_text(source.replace(check, without))
    others = [o for o in harness.objects if o.stem not in (f"ac_{name}", "fuzz")]
    flags = [*harness.flags, f"-I{acclimate.runtime.SOURCE}", "-Wno-unused"]
    driver = harness.delta_binary.with_name(f"{name}.o")
    call(compiler(), *flags, changed, driver, *others, "-o", folder / name)
    return folder / name


@pytest.mark.parametrize(
    ("check", "without"),
    [
        ("if (index >= count) return 0;", ""),
        ("if (bytes > (uint64_t)(end - at - RECORD_BYTES)) return NULL;", ""),
        ("if (r->size != want) return AC_E_RECORD;", ""),
        ("r->axis >= t->rank ||", ""),
        ("if (stands_twice(&r, first, at, end)) return AC_E_RECORD;", "apply(&r, m->state);"),
    ],
)
def test_a_missing_check_of_deltas_is_found(harness, tmp_path, check, without):
    binary = fuzzer_without(harness, tmp_path, "delta", check, without)
    kept = tmp_path / "finding.acu"
    done = harness.run(harness.pairs, "--count", 300_000, "--save", kept, binary=binary, expect=1)
    assert "FINDING: mutant" in done["error"] and "a seed is refused" not in done["error"]
    assert kept.stat().st_size > 0


@pytest.mark.parametrize("count", [5_000, pytest.param(500_000, marks=pytest.mark.slow)])
def test_flash(harness, count):
    """And for the flash of a board: every reason of refusal that its bytes can give."""
    summary = harness.run(harness.pairs, "--count", count, binary=harness.delta_binary.with_name("store"))
    assert summary["mutants"] > count and summary["accepted_changed"] > 0.3 * count
    reached = {text for text, number in summary["refused"].items() if number}
    assert reached == {
        "the file is cut off or has bytes too many",
        "the file is not a Program, or not a delta where one is read",
        "the file has a format version that this runtime does not read",
        "the checksum does not match: bytes were changed",
        "an offset or size points outside its area",
        "nothing was kept here yet",
        "it does not fit into the room that there is",
    } | (OF_DELTAS - {"the bytes could not be written"})


@pytest.mark.parametrize(
    ("check", "without"),
    [
        ("needed(h[W_BYTES], line_of(f)) > s->slot_bytes", "0"),
        ("if (in_use <= 0)", "if (in_use < 0)"),
    ],
)
def test_a_missing_check_of_flash_is_found(harness, tmp_path, check, without):
    binary = fuzzer_without(harness, tmp_path, "store", check, without)
    done = harness.run(harness.pairs, "--count", 30_000, binary=binary, expect=1)
    assert "FINDING: mutant" in done["error"] and "a seed is refused" not in done["error"]
