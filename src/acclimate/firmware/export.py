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
#: What the Program of an unrolled firmware does without: its loader, and the table of all ops.
LOADER = ("ac_checks.c", "ac_checks_shape.c", "ac_table.c")
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
    copied = [p for p in sorted(SOURCE.glob("ac_*.[ch]")) if mode == "interpreter" or p.name not in LOADER]
    files = {f"src/{p.name}": p.read_bytes() for p in [SOURCE / "acclimate.h", *copied]}
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
    raise NotImplementedError
