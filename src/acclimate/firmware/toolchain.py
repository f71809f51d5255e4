"""Compiling the runtime for a board: processors and their flags, cached objects, and where things lie in memory.

The compiler is zig's C compiler, which comes from pip with every target (extra `emulate`); a project that was exported
builds with it too, or with arm-none-eabi-gcc. Objects are kept in a folder of the user's, by the content that they
were made from.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..errors import AcclimateError, WrongUse, missing_extra

BOARDS = Path(__file__).parent / "boards"

#: What the runtime is compiled with on every processor: the same bits everywhere.
FLAGS = (
    "-std=c99",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
)


@dataclass(frozen=True)
class Cpu:
    """A processor: what the compilers call it."""

    name: str
    zig: tuple[str, ...]
    gcc: tuple[str, ...]

    @property
    def is_arm(self) -> bool:
        return self.name.startswith("cortex")


def _arm(name: str, zig: str, float_abi: str, fpu: str) -> Cpu:
    hard = "hf" if float_abi == "hard" else ""
    gcc = (f"-mcpu={name}", "-mthumb", f"-mfloat-abi={float_abi}", *((f"-mfpu={fpu}",) if fpu else ()))
    return Cpu(name, ("-target", f"thumb-freestanding-eabi{hard}", f"-mcpu={zig}"), gcc)


#: The M7 as most have it, with single precision only; zig's plain cortex_m4 and cortex_m7 would mean soft float.
CPUS = {
    cpu.name: cpu
    for cpu in (
        _arm("cortex-m0plus", "cortex_m0plus", "soft", ""),
        _arm("cortex-m4", "cortex_m4+vfp4d16sp", "hard", "fpv4-sp-d16"),
        _arm("cortex-m7", "cortex_m7+fp_armv8d16sp", "hard", "fpv5-sp-d16"),
        _arm("cortex-m33", "cortex_m33+fp_armv8d16sp", "hard", "fpv5-sp-d16"),
        _arm("cortex-m55", "cortex_m55+mve_fp", "hard", "auto"),
        Cpu(
            "riscv32",
            ("-target", "riscv32-freestanding-none", "-mcpu=generic_rv32+m+a+c"),
            ("-march=rv32imac", "-mabi=ilp32"),
        ),
    )
}


def cpu_of(name: str) -> Cpu:
    """The processor of that name. Raises WrongUse with the list of all."""
    if name not in CPUS:
        raise WrongUse(f"there is no emulated processor {name!r}", action=f"one of {', '.join(CPUS)}")
    return CPUS[name]


def cache_folder() -> Path:
    """Where compiled objects are kept: ACCLIMATE_CACHE, or acclimate in the user's folder of caches."""
    if given := os.environ.get("ACCLIMATE_CACHE"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(base) if base else Path.home() / ".cache") / "acclimate"


@cache
def zig() -> tuple[str, ...]:
    """The command that starts zig's C compiler. Raises WrongUse with the install hint where it is not installed."""
    if importlib.util.find_spec("ziglang") is None:
        raise WrongUse(missing_extra("ziglang", "emulate"))
    return (sys.executable, "-m", "ziglang", "cc")


@cache
def _version(command: tuple[str, ...]) -> str:
    if command[1:2] == ("-m",):
        from importlib.metadata import version

        return version("ziglang")
    return subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout


def _run(command: Sequence[str | Path]) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise AcclimateError(
            "a file could not be compiled", where=str(command[-1]), number=done.stderr.strip()[-3000:]
        )


def _keep(made: Path, command: Sequence[str | Path]) -> Path:
    """Run a command that writes -o `made`, unless it is there; renamed into place, so that two may do it at once."""
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        part = made.with_name(f"{made.stem}.{os.getpid()}{made.suffix}")
        _run([*command, "-o", part])
        part.replace(made)
    return made


def _digest(parts: Iterable[bytes]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()[:32]


def objects(
    sources: Sequence[Path], flags: Sequence[str], include: Sequence[Path], compiler: tuple[str, ...]
) -> list[Path]:
    """Compiled files, from the cache where nothing that they depend on has changed."""
    headers = [h.read_bytes() for folder in include for h in sorted(folder.glob("*.h"))]
    told = [" ".join(flags).encode(), _version(compiler).encode(), *headers]
    command = [*compiler, *flags, *(f"-I{folder}" for folder in include)]

    def one(source: Path) -> Path:
        key = _digest([*told, source.name.encode(), source.read_bytes()])
        return _keep(cache_folder() / "objects" / f"{source.stem}-{key}.o", [*command, "-c", source])

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(one, sources))


def host_library(source: Path) -> Path:
    """A C file of ours without dependencies as a library that this process can load."""
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    flags = ["-O2", "-std=c99", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    key = _digest([source.read_bytes(), _version(zig()).encode(), " ".join(flags).encode()])
    return _keep(cache_folder() / "host" / f"{source.stem}-{key}{suffix}", [*zig(), *flags, source])


def link(objects: Sequence[Path], script: str, cpu: Cpu, entry: str, more: Sequence[str] = ()) -> Path:
    """An ELF file of these objects, laid out by the linker script."""
    flags = [*cpu.zig, "-nostartfiles", f"-Wl,-e,{entry}", "-Wl,--gc-sections", *more]
    key = _digest([script.encode(), " ".join(flags).encode(), *(o.name.encode() for o in objects)])
    path = cache_folder() / "linked" / f"{key}.ld"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    return _keep(
        cache_folder() / "linked" / f"{entry}-{key}.elf", [*zig(), *flags, *objects, f"-Wl,-T,{path}"]
    )
