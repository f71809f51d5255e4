"""A Plan as a C project for a board: the runtime's files, the Program in flash, memory blocks of its sizes, an app.

Every file but ac_project.[ch] (and ac_unrolled.c) is a copy of one in the package. See `export`.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import BadInput, WrongUse
from ..ops import TABLE
from ..planner import Plan, kib
from ..program import HEADER_WORDS, Program
from ..runtime import SOURCE

HERE = Path(__file__).parent
MODES = ("interpreter", "unrolled")
MARK = "ac_project.h"  # a folder with this in src/ was made by export, and may be written again


@dataclass(frozen=True)
class Project:
    """A project that was written: its folder, and what it takes."""

    folder: Path
    target: str
    mode: str
    sources: tuple[Path, ...]  # C files to compile, all with `includes` and `defines`
    includes: tuple[Path, ...]
    defines: tuple[str, ...]
    program_bytes: int
    state_bytes: int
    arena_bytes: int
    slot_bytes: int


def export(
    plan: Plan,
    folder: str | Path,
    target: str = "linux",
    mode: str = "interpreter",
    room_for: Sequence[Plan] = (),
) -> Project:
    """Write a C project that runs the plan on a board; `make` or CMake builds it. Returns what was written.

    target: one of TARGETS. mode: "interpreter", which can also run Programs that are sent to it later, or "unrolled":
    direct calls of the kernels that this Program needs, nothing else linked. room_for: plans of the same model whose
    Programs may be sent later; memory is set aside for the largest. Raises WrongUse for an unknown target or mode,
    BadInput where the folder holds something else.

    >>> acclimate.export(plan, "firmware", target="cortex-m4")                         # doctest: +SKIP
    """
    if target not in TARGETS:
        raise WrongUse("there is no such target", number=repr(target), action=f"one of {', '.join(TARGETS)}")
    if mode not in MODES:
        raise WrongUse("there is no such mode", number=repr(mode), action=f"one of {', '.join(MODES)}")
    if room_for and mode == "unrolled":
        raise WrongUse(
            "unrolled firmware runs the one Program that it was made of",
            number=f"room for {len(room_for)} more",
            action="mode='interpreter'",
        )
    folder = Path(folder)
    _clear(folder)
    programs = [plan.program, *(other.program for other in room_for)]
    slot = max((len(p.bytes) for p in programs[1:]), default=0)
    sizes = {
        "PROGRAM": len(plan.program.bytes),
        "STATE": max(4, *(p.state_bytes for p in programs)),
        "ARENA": max(4, *(p.arena_bytes for p in programs)),
        "SLOT": slot,
    }
    layout = TARGETS[target]
    files = {
        f"src/{p.name}": p.read_bytes() for p in [SOURCE / "acclimate.h", *sorted(SOURCE.glob("ac_*.[ch]"))]
    }
    files |= {f"src/{p.name}": p.read_bytes() for p in sorted((HERE / "c").glob("ac_app.[ch]"))}
    files |= {f"src/{to}": (HERE / "c" / at).read_bytes() for to, at in layout.main.items()}
    generated = {"src/ac_project.h": header(sizes, mode), "src/ac_project.c": program_words(plan.program)}
    if mode == "unrolled":
        generated["src/ac_unrolled.c"] = unrolled(plan.program)
    files["program.acp"] = plan.program.bytes
    files |= {name: text.encode() for name, text in generated.items()}
    for name, raw in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)
    sources = tuple(folder / name for name in sorted(files) if name.endswith(".c"))
    return Project(
        folder,
        target,
        mode,
        sources,
        (folder / "src",),
        ("AC_UNROLLED=1",) if mode == "unrolled" else (),
        sizes["PROGRAM"],
        sizes["STATE"],
        sizes["ARENA"],
        slot,
    )


@dataclass(frozen=True)
class Layout:
    """How a target's project is laid out. main: file in src -> file of firmware/c."""

    title: str
    main: dict[str, str]


TARGETS = {"linux": Layout("a Linux process", {"main.c": "linux/main.c"})}


def _clear(folder: Path) -> None:
    """Remove what an earlier export wrote; refuse a folder that holds anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / "src" / MARK).is_file():
        raise BadInput(
            "the folder is not empty, and not an exported project",
            where=str(folder),
            action="give a new folder, or empty this one",
        )
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


# -- generated C ---------------------------------------------------------------------------------------------------


def header(sizes: dict[str, int], mode: str) -> str:
    """ac_project.h: the Program, and the bytes of each block."""
    lines = [
        "/* Generated by acclimate export. */",
        "#ifndef AC_PROJECT_H",
        "#define AC_PROJECT_H",
        "",
        "#include <stdint.h>",
        "",
        *(f"#define AC_PROJECT_{name}_BYTES {size}" for name, size in sizes.items()),
        "",
        "extern const uint32_t ac_project_program[AC_PROJECT_PROGRAM_BYTES / 4];",
    ]
    return "\n".join([*lines, "", "#endif", ""])


def program_words(program: Program) -> str:
    """ac_project.c: the Program as constant words, 4-byte aligned, in flash."""
    words = struct.unpack(f"<{len(program.bytes) // 4}I", program.bytes)
    rows = (
        "    " + " ".join(f"0x{word:08X}u," for word in words[at : at + 8]) for at in range(0, len(words), 8)
    )
    return "\n".join(
        [
            "/* Generated by acclimate export: program.acp. */",
            '#include "ac_project.h"',
            "",
            "const uint32_t ac_project_program[AC_PROJECT_PROGRAM_BYTES / 4] = {",
            *rows,
            "};",
            "",
        ]
    )


def unrolled(program: Program) -> str:
    """ac_unrolled.c: the Program's entries as direct calls of kernels, in place of the loader and the interpreter."""
    raw, names = program.bytes, list(TABLE)
    head = struct.unpack_from(f"<{HEADER_WORDS}I", raw)
    tensors, op_words, entries, bindings, name_bytes, constants, initial, state, arena, model = head[5:15]
    at = HEADER_WORDS
    places = {}
    for section, words in (
        ("tensors", 10 * tensors),
        ("ops", op_words),
        ("entries", 6 * entries),
        ("bindings", 3 * bindings),
        ("names", name_bytes // 4),
        ("constants", constants // 4),
        ("initial", 0),
    ):
        places[section] = at
        at += words
    fields = {
        "bytes": "(const uint8_t *)ac_project_program",
        "tensors": f"(const ac_tensor *)(const void *)(ac_project_program + {places['tensors']})",
        **{name: f"ac_project_program + {places[name]}" for name in ("ops", "entries", "bindings")},
        **{
            name: f"(const uint8_t *)(ac_project_program + {places[name]})"
            for name in ("names", "constants", "initial")
        },
        "n_tensors": tensors,
        "op_words": op_words,
        "n_entries": entries,
        "n_bindings": bindings,
        "name_bytes": name_bytes,
        "constant_bytes": constants,
        "initial_bytes": initial,
        "state_bytes": state,
        "arena_bytes": arena,
        "model": f"0x{model:08X}u",
    }
    image = "\n".join(f"    .{name} = {value}," for name, value in fields.items())
    runs, cases = [], []
    for k in range(entries):
        _, first, end, count, _, _ = struct.unpack_from("<6I", raw, 4 * (places["entries"] + 6 * k))
        if not count:
            continue
        calls, at = [], first
        while at < end:
            word = int.from_bytes(raw[4 * (places["ops"] + at) :][:4], "little")
            op, arguments = names[word & 0xFFFF], (word >> 16 & 0xFF) + (word >> 24)
            calls.append(f"    DO({len(calls)}, {at}, {op})")
            at += 1 + (arguments + 1) // 2 + sum(a.words for a in TABLE[op].encoded().values())
        runs.append(
            f"static ac_status run_{k}(const ac_program *p, const ac_memory *m, uint32_t first, uint32_t end) {{\n"
            "    ac_call call;\n    ac_status status;\n" + "\n".join(calls) + "\n    return AC_OK;\n}\n"
        )
        cases.append(f"    case {first}: return run_{k}(p, m, first, end);")
    return UNROLLED.format(image=image, runs="\n".join(runs), cases="\n".join(cases))


UNROLLED = """\
/* Generated by acclimate export: the Program's entries as direct calls of the kernels that it needs. The Program still
 * says where its tensors lie; nothing of it is looked up in a table, and no other Program can run. */
#include "ac_app.h"
#include "ac_ops.h"
#include "ac_project.h"

static const ac_program image = {{
{image}
}};

ac_status ac_unrolled_load(ac_program *program, const void *bytes, size_t size) {{
    const uint32_t *h = ac_project_program;
    if (bytes != h || size != AC_PROJECT_PROGRAM_BYTES) return AC_E_TABLE;
    if (ac_crc32(0, h + 4, size - 16) != h[3]) return AC_E_CHECKSUM;
    *program = image;
    return AC_OK;
}}

/* The call whose op stands at word `at`. */
static void prepare(const ac_program *p, const ac_memory *m, uint32_t at, ac_call *call) {{
    const uint32_t word = p->ops[at], n_in = word >> 16 & 0xFFu, n = n_in + (word >> 24);
    call->n_in = n_in;
    call->n_out = word >> 24;
    for (uint32_t i = 0; i < n; i++) {{
        const uint32_t index = p->ops[at + 1 + i / 2] >> (i % 2 * 16) & 0xFFFFu;
        call->tensor[i] = index == 0xFFFFu ? NULL : p->tensors + index;
        call->data[i] = call->tensor[i] ? ac_address(p, m, call->tensor[i]) : NULL;
    }}
    call->attr = p->ops + at + 1 + (n + 1) / 2;
    call->workers = m->workers;
}}

#define DO(number, at, op)                           \\
    if (number >= end) return AC_OK;                 \\
    if (number + 1u > first) {{                       \\
        prepare(p, m, at, &call);                    \\
        status = AC_KERNEL(op)(&call);               \\
        if (status != AC_OK) return status;          \\
    }}

{runs}
ac_status ac_unrolled_run_range(const ac_program *p, const ac_memory *m, const ac_entry *entry, uint32_t first,
                                uint32_t end) {{
    if (entry->n_ops == 0) return AC_OK;
    switch (entry->first_word) {{
{cases}
    default: return AC_E_NAME;
    }}
}}
"""
