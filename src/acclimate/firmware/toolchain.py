"""Compiling the runtime for a board: processors and their flags, cached objects, and where things lie in memory.

The compiler is zig's C compiler, which comes from pip with every target (extra `emulate`); a project that was exported
builds with it too, or with arm-none-eabi-gcc. Objects are kept in a folder of the user's, by the content that they
were made from.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..device import Device
from ..errors import AcclimateError, CannotFit, WrongUse, missing_extra

BOARDS = Path(__file__).parent / "boards"
FLASH_PAGE = 4096  # what an emulated board erases at once
STACK_BYTES = 8 << 10  # what acclimate.h promises that ac_run stays below

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
        _arm("cortex-m33", "cortex_m33+fp_armv8d16sp+dsp", "hard", "fpv5-sp-d16"),
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
        raise missing_extra("ziglang", "emulate")
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


def _reached(source: Path, include: Sequence[Path]) -> list[bytes]:
    """The content of a C file and of all headers of ours that it includes, each once."""
    found: dict[str, bytes] = {}
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path.name in found:
            continue
        found[path.name] = path.read_bytes()
        for name in re.findall(rb'^\s*#\s*include\s*["<]([^">]+)[">]', found[path.name], re.M):
            places = (folder / name.decode() for folder in (path.parent, *include))
            waiting += [place for place in places if place.is_file()][:1]
    return [part for name in sorted(found) for part in (name.encode(), found[name])]


def objects(
    sources: Sequence[Path], flags: Sequence[str], include: Sequence[Path], compiler: tuple[str, ...]
) -> list[Path]:
    """Compiled files, from the cache where nothing that they depend on has changed, wherever they lie."""
    told = [" ".join(flags).encode(), _version(compiler).encode()]
    command = [*compiler, *flags, *(f"-I{folder}" for folder in include)]

    def one(source: Path) -> Path:
        key = _digest([*told, *_reached(source, include)])
        return _keep(cache_folder() / "objects" / f"{source.stem}-{key}.o", [*command, "-c", source])

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(one, sources))


def host_library(source: Path) -> Path:
    """A C file of ours without dependencies as a library that this process can load."""
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    flags = ["-O2", "-std=c99", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    key = _digest([source.read_bytes(), _version(zig()).encode(), " ".join(flags).encode()])
    return _keep(cache_folder() / "host" / f"{source.stem}-{key}{suffix}", [*zig(), *flags, source])


def link(
    objects: Sequence[Path], script: str, flags: Sequence[str], entry: str, compiler: tuple[str, ...]
) -> Path:
    """An ELF file of these objects, laid out by the linker script."""
    flags = [*flags, "-nostartfiles", f"-Wl,-e,{entry}", "-Wl,--gc-sections"]
    told = [script.encode(), " ".join(flags).encode(), _version(compiler).encode()]
    key = _digest([*told, *(o.name.encode() for o in objects)])
    path = cache_folder() / "linked" / f"{key}.ld"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    return _keep(
        cache_folder() / "linked" / f"{entry}-{key}.elf", [*compiler, *flags, *objects, f"-Wl,-T,{path}"]
    )


@dataclass(frozen=True)
class Machine:
    """A board that QEMU emulates, and where its memory lies; the emulated board has as much of it as the real one.

    flash, ram: first addresses. source: its machine layer. per_tick: instructions in a tick of its counter under QEMU
    (`-icount shift=3`: 8 ns each). uart, timer: first addresses of their registers.
    """

    cpu: str
    qemu: str
    machine: str
    flash: int
    ram: int
    source: str
    per_tick: float
    uart: int
    timer: int
    defines: tuple[str, ...] = ()


def _mps(
    cpu: str,
    machine: str,
    flash: int,
    ram: int,
    uart: int,
    timer: int,
    timer_hz: int = 25_000_000,
    *more: str,
) -> Machine:
    defines = (f"-DAC_UART={uart:#x}u", f"-DAC_TIMER={timer:#x}u", *more)
    per_tick = 125e6 / timer_hz
    return Machine(
        cpu,
        "qemu-system-arm",
        machine,
        flash,
        ram,
        "ac_board_mps2.c",
        per_tick,
        uart,
        timer,
        defines=defines,
    )


#: The M0+ has no board of its own here: its code runs on an M3, which has all of its instructions.
MACHINES = {
    machine.cpu: machine
    for machine in (
        _mps("cortex-m0plus", "mps2-an385", 0, 0x20000000, 0x40004000, 0x40000000),
        _mps("cortex-m4", "mps2-an386", 0, 0x20000000, 0x40004000, 0x40000000),
        _mps("cortex-m7", "mps2-an500", 0, 0x20000000, 0x40004000, 0x40000000),
        _mps("cortex-m33", "mps2-an505", 0x10000000, 0x38000000, 0x50200000, 0x50000000, 20_000_000),
        _mps(
            "cortex-m55",
            "mps3-an547",
            0x10000000,
            0x30000000,
            0x59303000,
            0x58100000,
            32_000_000,
            "-DAC_SYSTEM_COUNTER",
        ),
        Machine(
            "riscv32",
            "qemu-system-riscv32",
            "virt",
            0x80000000,
            0x81000000,
            "ac_board_virt.c",
            12.5,
            0x10000000,
            0x0200B000,
        ),
    )
}


def kept_bytes(delta_bytes: int) -> int:
    """Flash that two slots of an emulated board take, for deltas of at most so many bytes."""
    return 2 * (-(-(delta_bytes + 4 * 64) // FLASH_PAGE) * FLASH_PAGE)


def linker_script(
    machine: Machine, flash_bytes: int, ram_bytes: int, stack_bytes: int, kept_bytes: int = 0
) -> str:
    """Where things lie on the emulated board: exactly its flash and RAM, the stack at RAM's start.

    stack_bytes: 0 for STACK_BYTES, where the device's stack would lie in memory of its own that is not counted.
    kept_bytes: the last of the flash, whole pages, for what was learned.
    """
    stack_bytes = stack_bytes or STACK_BYTES
    size = f"{flash_bytes} bytes of flash and {ram_bytes} of RAM; the last {kept_bytes} of flash keep what is learned"
    return f"""/* {machine.machine} with {size}. */
ENTRY({"Reset_Handler" if machine.cpu.startswith("cortex") else "_start"})
MEMORY {{
  FLASH (rx) : ORIGIN = {machine.flash:#x}, LENGTH = {flash_bytes - kept_bytes}
  RAM (rwx)  : ORIGIN = {machine.ram:#x}, LENGTH = {ram_bytes}
}}
ac_kept_start = {machine.flash + flash_bytes - kept_bytes:#x};
ac_kept_end = {machine.flash + flash_bytes:#x};
SECTIONS {{
  .text : {{
    KEEP(*(.vectors)) *(.text .text.*) *(.rodata .rodata.* .srodata .srodata.*)
    . = ALIGN(8);
  }} > FLASH
  .stack (NOLOAD) : {{ ac_stack_bottom = .; . += {stack_bytes}; ac_stack_top = .; }} > RAM
  .data : ALIGN(8) {{
    ac_data_start = .;
    *(.data .data.* .sdata .sdata.*)
    . = ALIGN(8);
    ac_data_end = .;
  }} > RAM AT> FLASH
  ac_data_from = LOADADDR(.data);
  .bss (NOLOAD) : ALIGN(8) {{
    ac_bss_start = .;
    *(.bss .bss.* .sbss .sbss.* COMMON)
    . = ALIGN(8);
    ac_bss_end = .;
  }} > RAM
  /DISCARD/ : {{ *(.ARM.exidx*) *(.ARM.extab*) *(.comment) *(.eh_frame*) *(.note*) }}
}}
"""


#: What the compilers are asked for in firmware, beside FLAGS and the processor's.
SECTIONS = ("-ffunction-sections", "-fdata-sections")


@dataclass(frozen=True)
class Firmware:
    """A firmware that was built for an emulated board: its ELF file, and the memory that the linker held it to."""

    elf: Path
    machine: Machine
    flash_bytes: int  # kept_bytes included
    ram_bytes: int
    kept_bytes: int = 0  # the last of the flash, for what was learned


def build_project(
    folder: Path, device: Device | None = None, compiler: str = "zig", flags: Sequence[str] = ("-O3",)
) -> Firmware:
    """Compile and link an exported project (a target of MACHINES) as it stands, into the cache.

    device: a board to hold it to, in place of the one that it was exported for. compiler: "zig" or "gcc". Raises
    WrongUse for a folder that is no such project, CannotFit where it is larger than flash or RAM.
    """
    script_file = folder / "board.ld"
    script = script_file.read_text() if script_file.is_file() else ""
    named = re.match(r"/\* (\S+) with (\d+) bytes of flash and (\d+) of RAM; the last (\d+) ", script)
    machine = next((m for m in MACHINES.values() if named and m.machine == named[1]), None)
    if machine is None or not named:
        raise WrongUse(
            "this is not an exported project that an emulated board can run",
            where=str(folder),
            number="board.ld is not there" if not script else "board.ld names no known machine",
            action=f"acclimate export MODEL --target {next(iter(MACHINES))}; targets are {', '.join(MACHINES)}",
        )
    flash_bytes, ram_bytes, kept = int(named[2]), int(named[3]), int(named[4])
    if device is not None:
        flash_bytes, ram_bytes = device.flash_bytes, device.ram_bytes
        script = linker_script(machine, flash_bytes, ram_bytes, device.reserve_bytes, kept)
    sources = sorted((folder / "src").glob("*.c"))
    unrolled = ("-DAC_UNROLLED=1",) if (folder / "src" / "ac_unrolled.c").exists() else ()
    elf = build_firmware(
        sources, [folder / "src"], script, machine, flash_bytes, ram_bytes, compiler, (*unrolled, *flags)
    ).elf
    return Firmware(elf, machine, flash_bytes, ram_bytes, kept)


def build_firmware(
    sources: Sequence[Path],
    include: Sequence[Path],
    script: str,
    machine: Machine,
    flash_bytes: int,
    ram_bytes: int,
    compiler: str = "zig",
    flags: Sequence[str] = ("-O3",),
) -> Firmware:
    """Compile and link C files, the machine layer among them, by a linker script of `linker_script`."""
    target = cpu_of(machine.cpu)
    if compiler not in COMPILERS:
        raise WrongUse(
            "there is no such compiler", number=repr(compiler), action=f"one of {', '.join(COMPILERS)}"
        )
    if compiler == "gcc":
        command, own, headers = gcc(target), (*target.gcc, *SECTIONS), [*include]
    else:
        command, headers = zig(), [*include, BOARDS / "include"]
        own = (*target.zig, *SECTIONS, "-fno-sanitize=undefined")
    layer = [source for source in sources if source.name == machine.source]
    made = objects(
        [source for source in sources if source not in layer], (*own, *FLAGS, *flags), headers, command
    )
    made += objects(layer, (*own, *FLAGS, *machine.defines, *flags), headers, command)
    try:
        elf = link(made, script, own, "Reset_Handler" if target.is_arm else "_start", command)
    except AcclimateError as error:
        if "overflow" not in error.number and "will not fit" not in error.number:
            raise
        raise CannotFit(
            "the firmware does not fit the board",
            where=machine.machine,
            number=f"flash {flash_bytes} bytes, RAM {ram_bytes} bytes; {error.number[-600:]}",
            action="a larger device, or a smaller scheme or batch",
        ) from None
    return Firmware(elf, machine, flash_bytes, ram_bytes)


COMPILERS = ("zig", "gcc")


def gcc(cpu: Cpu) -> tuple[str, ...]:
    """The cross compiler of GNU for a processor. Raises WrongUse where it is not installed."""
    name = "arm-none-eabi-gcc" if cpu.is_arm else "riscv64-unknown-elf-gcc"
    found = shutil.which(name)
    if found is None:
        raise WrongUse(
            f"{name} is not installed",
            action="apt-get install gcc-arm-none-eabi libnewlib-arm-none-eabi, or zig",
        )
    return (found,)
