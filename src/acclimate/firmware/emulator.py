"""The runtime on an emulated processor: the same C files, compiled for it, in exactly the board's memory.

`measure` and `Harness` run a Program's entries without any firmware around them, for benchmarks and profiles:
instructions of every op and function, outputs, state, stack and arena as they were touched. What they count are
instructions, as QEMU counts them. Instructions are not cycles: a load that misses, a division or a wait state of the
flash takes many, and nothing here is cycle-accurate; see Device.latency_us for a model of time.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import select
import shutil
import struct
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..device import Device
from ..device import get as get_device
from ..errors import AcclimateError, BadInput, CannotFit, WrongUse, missing_extra
from ..ir import DTYPES
from ..program import ARENA, STATE_ENTRY, Binding, Program, decode, operations, pack_bits
from ..runtime import LABEL_ERROR, PAINT, SOURCE
from . import toolchain
from .toolchain import BOARDS, FLAGS, SECTIONS, STACK_BYTES, Cpu, Firmware, cpu_of

FLASH, RAM = 0x08000000, 0x20000000
ROOMY_RAM_BYTES = ROOMY_FLASH_BYTES = 64 << 20  # where no device is given
PAGE = 4096
RECORDS_BYTES = 256  # ac_program, ac_memory and ac_entry of the harness
MEMORY_AT, ENTRY_AT, NAME_AT = 128, 160, 192  # places among them
#: What the harness calls.
ROOTS = ("ac_load", "ac_reset", "ac_find_entry", "ac_run", "ac_run_range")


@dataclass(frozen=True)
class OpCount:
    """Instructions of one op of a run, the interpreter's for fetching the next one included."""

    op: str
    shapes: str
    instructions: int


@dataclass(frozen=True)
class Run:
    """One run of an entry. `functions`: name -> instructions spent in it, without those that it calls."""

    outputs: dict[str, np.ndarray]
    instructions: int
    ops: list[OpCount]
    functions: dict[str, int]
    stack_bytes: int
    arena_bytes: int


@dataclass(frozen=True)
class Image:
    """A linked ELF file, as it lies in memory."""

    flash: bytes  # what initialised data starts from included
    ram_bytes: int  # of stack and all data
    symbols: dict[str, tuple[int, int]]  # name -> address, bytes
    entry: int


class _Watch(ctypes.Structure):
    """ac_watch of boards/host/ac_emulate.c."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("total", "limit")),
        *((name, ctypes.c_void_p) for name in ("code",)),
        *((name, ctypes.c_uint64) for name in ("base", "bytes")),
        *((name, ctypes.c_void_p) for name in ("known", "marks", "by_place", "by_op")),
        *((name, ctypes.c_uint64) for name in ("ops", "op", "left", "is_thumb", "why")),
        *((name, ctypes.c_void_p) for name in ("stop", "input")),
        *((name, ctypes.c_uint64) for name in ("in_at", "in_end")),
        *((name, ctypes.c_void_p) for name in ("output",)),
        *((name, ctypes.c_uint64) for name in ("out_end", "out_room", "polls")),
        *((name, ctypes.c_void_p) for name in ("kept",)),
        *((name, ctypes.c_uint64) for name in ("kept_bytes", "kept_at")),
        *((name, ctypes.c_void_p) for name in ("erases",)),
        *((name, ctypes.c_uint64) for name in ("operations", "power_until", "torn_state")),
    ]


def _pointer(array: np.ndarray | Any) -> int:
    return (
        array.ctypes.data if isinstance(array, np.ndarray) else ctypes.cast(array, ctypes.c_void_p).value or 0
    )


class Watch:
    """Counts instructions of blocks in flash and is the board's devices, by hooks in C: hooks in Python would take most
    of the time."""

    MAX_OPS = 65536

    def __init__(self, engine: Any, flash: bytes, base: int, cpu: Cpu) -> None:
        from unicorn import UC_HOOK_BLOCK
        from unicorn.unicorn_py3.unicorn import uclib

        self._uclib, self._engine, self.base = uclib, engine, base
        self.flash = np.frombuffer(flash + bytes(-len(flash) % 4 + 4), np.uint8)  # kept: the hook reads it
        places = len(self.flash) // 2
        self.known = np.zeros(places, np.uint32)
        self.marks = np.zeros(places, np.uint8)
        self.by_place = np.zeros(places, np.uint64)
        self.by_op = np.zeros(self.MAX_OPS, np.uint64)
        self.output = np.zeros(1 << 20, np.uint8)
        self.input = np.zeros(0, np.uint8)
        self._library = ctypes.CDLL(str(toolchain.host_library(BOARDS / "host" / "ac_emulate.c")))
        self.record = _Watch(
            limit=1 << 63,
            code=_pointer(self.flash),
            base=base,
            bytes=len(flash),
            known=_pointer(self.known),
            marks=_pointer(self.marks),
            by_place=_pointer(self.by_place),
            by_op=_pointer(self.by_op),
            ops=self.MAX_OPS,
            is_thumb=int(cpu.is_arm),
            stop=_pointer(uclib.uc_emu_stop),
            output=_pointer(self.output),
            out_room=self.output.size,
        )
        self._user = ctypes.c_void_p(ctypes.addressof(self.record))
        hook, always = ctypes.c_size_t(), (ctypes.c_uint64(1), ctypes.c_uint64(0))
        self._check(
            uclib.uc_hook_add(
                engine._uch,
                ctypes.byref(hook),
                UC_HOOK_BLOCK,
                self._callback("ac_watch_block"),
                self._user,
                *always,
            )
        )

    def _callback(self, name: str) -> ctypes.c_void_p:
        return ctypes.cast(getattr(self._library, name), ctypes.c_void_p)

    def _check(self, status: int) -> None:
        if status:
            raise AcclimateError("the emulator took no hook", number=f"unicorn's status {status}")

    def device(self, at: int, reader: str, writer: str) -> None:
        """Map a page of registers that two functions of boards/host/ac_emulate.c are."""
        callbacks = [self._callback(f"ac_{name}") for name in (f"{reader}_read", f"{writer}_write")]
        self._check(
            self._uclib.uc_mmio_map(
                self._engine._uch, at, PAGE, callbacks[0], self._user, callbacks[1], self._user
            )
        )

    def mark(self, symbols: Mapping[str, tuple[int, int]], kernels: Sequence[int]) -> None:
        """Tell the interpreter's code and the first instruction of each kernel."""
        for name in ("ac_run_range", "read_op", "ac_address"):
            if name in symbols:
                at, size = symbols[name]
                self.marks[((at & ~1) - self.base) // 2 : ((at & ~1) - self.base + size) // 2] = 1
        for at in kernels:
            self.marks[((at & ~1) - self.base) // 2] = 2

    def restart(self) -> None:
        """Count from zero."""
        self.record.total = self.record.op = self.record.left = 0
        self.by_op[:] = 0
        self.by_place[:] = 0

    @property
    def total(self) -> int:
        return int(self.record.total)

    def functions(self, symbols: Mapping[str, tuple[int, int]]) -> dict[str, int]:
        """Instructions by the function that they stand in, the most first."""
        found: dict[str, int] = {}
        end = self.base + len(self.flash)
        starts = sorted(
            (at & ~1, name) for name, (at, size) in symbols.items() if self.base <= at < end and size
        )
        at = np.array([start for start, _ in starts])
        places = np.flatnonzero(self.by_place)
        owners = np.searchsorted(at, places * 2 + self.base, side="right") - 1
        for place, owner in zip(places, owners, strict=True):
            name = starts[owner][1] if owner >= 0 else "?"
            found[name] = found.get(name, 0) + int(self.by_place[place])
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def board_files() -> list[Path]:
    """The C files of the runtime that boards compile."""
    return sorted(SOURCE.glob("ac_*.c"))


def read_elf(path: Path, flash_at: int = FLASH, ram_at: int = RAM) -> Image:
    """The loadable bytes and the symbols of an ELF file whose code lies from flash_at on and whose data from ram_at."""
    try:
        from elftools.elf.elffile import ELFFile
        from elftools.elf.sections import SymbolTableSection
    except ImportError:
        raise missing_extra("pyelftools", "emulate") from None
    flash, ram_bytes = bytearray(), 0
    with path.open("rb") as file:
        elf = ELFFile(file)
        for segment in elf.iter_segments("PT_LOAD"):
            data, at, load = segment.data(), segment["p_vaddr"], segment["p_paddr"] - flash_at
            if at >= ram_at:
                ram_bytes = max(ram_bytes, at - ram_at + segment["p_memsz"])
            if data:
                flash.extend(bytes(max(0, load - len(flash))))
                flash[load : load + len(data)] = data
        table = elf.get_section_by_name(".symtab")
        symbols = {
            s.name: (int(s["st_value"]), int(s["st_size"]))
            for s in (table.iter_symbols() if isinstance(table, SymbolTableSection) else ())
            if s["st_info"]["type"] in ("STT_FUNC", "STT_OBJECT", "STT_NOTYPE") and not s.name.startswith("$")
        }
        return Image(bytes(flash), ram_bytes, symbols, int(elf["e_entry"]))


HARNESS_SCRIPT = f"""MEMORY {{
  FLASH (rx) : ORIGIN = {FLASH:#x}, LENGTH = 64M
  RAM (rwx)  : ORIGIN = {RAM:#x}, LENGTH = 64M
}}
SECTIONS {{
  .text : {{ {" ".join(f"KEEP(*(.text.{name}))" for name in ROOTS)} *(.text*) *(.rodata*) *(.srodata*) }} > FLASH
  .data : {{ *(.data*) *(.sdata*) }} > RAM
  .bss : {{ *(.bss*) *(.sbss*) *(COMMON) }} > RAM
  /DISCARD/ : {{ *(.ARM.exidx*) *(.ARM.extab*) *(.comment) *(.eh_frame*) }}
}}
"""


@cache
def _image(cpu: str, flags: tuple[str, ...]) -> Image:
    target = cpu_of(cpu)
    own = (*target.zig, *SECTIONS, "-fno-sanitize=undefined")
    made = toolchain.objects(
        board_files(), (*own, *FLAGS, *flags), [SOURCE, BOARDS / "include"], toolchain.zig()
    )
    return read_elf(toolchain.link(made, HARNESS_SCRIPT, own, "ac_run", toolchain.zig()))


def open_engine(cpu: Cpu) -> Any:
    """A unicorn of that processor, without memory. Raises WrongUse where it has none, or is not installed."""
    try:
        import unicorn
        from unicorn import arm_const, riscv_const
    except ImportError:
        raise missing_extra("unicorn", "emulate") from None
    if not cpu.is_arm:
        engine = unicorn.Uc(unicorn.UC_ARCH_RISCV, unicorn.UC_MODE_RISCV32)
        engine.ctl_set_cpu_model(riscv_const.UC_CPU_RISCV32_ANY)
        return engine
    models = {
        "cortex-m0plus": arm_const.UC_CPU_ARM_CORTEX_M0,
        "cortex-m4": arm_const.UC_CPU_ARM_CORTEX_M4,
        "cortex-m7": arm_const.UC_CPU_ARM_CORTEX_M7,
        "cortex-m33": arm_const.UC_CPU_ARM_CORTEX_M33,
    }
    if cpu.name not in models:
        raise WrongUse(
            "unicorn does not emulate this processor", number=cpu.name, action="use --engine qemu for it"
        )
    engine = unicorn.Uc(unicorn.UC_ARCH_ARM, unicorn.UC_MODE_THUMB | unicorn.UC_MODE_MCLASS)
    engine.ctl_set_cpu_model(models[cpu.name])
    return engine


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


def whole_pages(size: int, what: str) -> int:
    """The size, which must be mapped exactly. Raises WrongUse where it is not whole pages."""
    if size % PAGE:
        raise WrongUse(
            f"{what} of an emulated board is whole pages",
            number=f"{size} bytes",
            action=f"a multiple of {PAGE}",
        )
    return size


class Harness:
    """A Program on an emulated processor: like runtime.Session, and every run is counted.

    RAM holds, from its start: stack, the runtime's records, state, arena; flash the runtime and then the Program.
    With a device, exactly its memory is mapped, and a Program that does not fit is refused (CannotFit).

    >>> Harness(program, "cortex-m7", "stm32f7").run("step", x=x, y=y, lr=0.01).instructions   # doctest: +SKIP
    """

    def __init__(
        self,
        program: Program | bytes,
        cpu: str = "",
        device: str | Device | None = None,
        flags: Sequence[str] = ("-O3",),
        stack_bytes: int = STACK_BYTES,
    ) -> None:
        """`cpu`: a name of toolchain.CPUS; "" is the device's. `flags`: of the compiler, beside the common ones."""
        board = get_device(device) if isinstance(device, str) else device
        self.program = decode(program) if isinstance(program, bytes) else program
        self.cpu = cpu_of(cpu or (board.cpu if board else "cortex-m7"))
        self.image = _image(self.cpu.name, tuple(flags))
        raw = self.program.bytes
        self.engine = open_engine(self.cpu)
        self.program_at = FLASH + -(-len(self.image.flash) // 16) * 16
        self.until = self.program_at + -(-len(raw) // 16) * 16
        self.flash_bytes = self.until + 4 - FLASH
        self.data_at = RAM + stack_bytes
        if self.image.ram_bytes:
            raise AcclimateError("the runtime must have no globals", number=f"{self.image.ram_bytes} bytes")
        self.state_at = self.data_at + RECORDS_BYTES
        self.arena_at = self.state_at + -(-self.program.state_bytes // 16) * 16
        self.ram_bytes = self.arena_at + self.program.arena_bytes - RAM
        limits = (board.flash_bytes, board.ram_bytes) if board else (ROOMY_FLASH_BYTES, ROOMY_RAM_BYTES)
        for kind, needed, there in zip(
            ("flash", "RAM"), (self.flash_bytes, self.ram_bytes), limits, strict=True
        ):
            if needed > there:
                raise CannotFit(
                    f"this does not fit the {kind} of the emulated board",
                    where=board.name if board else self.cpu.name,
                    number=f"{needed} bytes, it has {there}",
                    action="a larger device, or a smaller scheme or batch",
                )
        self.mapped_ram_bytes = whole_pages(limits[1], "RAM") if board else _pages(self.ram_bytes)
        self.engine.mem_map(FLASH, limits[0] // PAGE * PAGE if board else _pages(self.flash_bytes), 5)
        self.engine.mem_map(RAM, self.mapped_ram_bytes, 3)
        self.engine.mem_write(FLASH, self.image.flash)
        self.engine.mem_write(self.program_at, raw)
        self.stack_bytes = stack_bytes
        self.watch = Watch(self.engine, self.image.flash, FLASH, self.cpu)
        self.watch.mark(self.image.symbols, self._kernels())
        self._check(self._call("ac_load", self.data_at, self.program_at, len(raw)), "ac_load")
        self.load_instructions = self.watch.total
        self._put(self.data_at + MEMORY_AT, struct.pack("<3I", self.state_at, self.arena_at, 0))
        self._check(self._call("ac_reset", self.data_at, self.data_at + MEMORY_AT), "ac_reset")

    def _kernels(self) -> list[int]:
        """Addresses in the op table; a row is five words, the fourth of them the kernel's."""
        at, size = self.image.symbols["ac_table_base"]
        words = struct.unpack_from(f"<{size // 4}I", self.image.flash, at - FLASH)
        return [w for w in words[3::5] if w]

    def _put(self, at: int, raw: bytes) -> None:
        self.engine.mem_write(at, raw)

    def _call(self, name: str, *arguments: int) -> int:
        from unicorn import UcError, arm_const, riscv_const

        self.watch.restart()
        at = self.image.symbols[name][0]
        if self.cpu.is_arm:
            registers = [arm_const.UC_ARM_REG_R0 + i for i in range(4)]
            stack, link, until = arm_const.UC_ARM_REG_SP, arm_const.UC_ARM_REG_LR, self.until | 1
            at |= 1
        else:
            registers = [riscv_const.UC_RISCV_REG_A0 + i for i in range(8)]
            stack, link, until = riscv_const.UC_RISCV_REG_SP, riscv_const.UC_RISCV_REG_RA, self.until
        for register, value in zip(registers, arguments, strict=False):
            self.engine.reg_write(register, value)
        top = RAM + self.stack_bytes - 16
        self._put(top, struct.pack("<4I", *(*arguments[len(registers) :], 0, 0, 0, 0)[:4]))
        self.engine.reg_write(stack, top)
        self.engine.reg_write(link, until)
        try:
            self.engine.emu_start(at, until & ~1)
        except UcError as error:
            pc = self.engine.reg_read(
                arm_const.UC_ARM_REG_PC if self.cpu.is_arm else riscv_const.UC_RISCV_REG_PC
            )
            raise AcclimateError(
                f"the emulated processor stopped: {error}", where=name, number=f"at {pc:#x}"
            ) from None
        return int(self.engine.reg_read(registers[0]))

    def _check(self, status: int, what: str) -> None:
        if status == LABEL_ERROR:
            raise BadInput(
                "the step was refused: a label or an index is out of range",
                action="map the labels to the classes",
            )
        if status:
            raise AcclimateError(f"{what} failed on the emulated processor", number=f"status {status}")

    def _address(self, b: Binding) -> int:
        return (self.arena_at if b.area == ARENA else self.state_at) + b.offset

    def feed(self, entry: str, inputs: Mapping[str, Any]) -> None:
        """Copy inputs to their places in the emulated memory; bits are one number an element."""
        for name, value in inputs.items():
            b = self.program.entries[entry][name]
            data = np.asarray(value, DTYPES[b.type.dtype])
            if data.size != b.type.size:
                raise BadInput(
                    "an input does not have the shape of its place",
                    where=f"{entry}, {name}",
                    number=f"{data.shape}, must be {b.type.shape}",
                )
            self._put(self._address(b), (pack_bits(data) if b.type.dtype == "bit" else data).tobytes())

    def read(self, entry: str, name: str) -> np.ndarray:
        """A copy of an input, an output, or (entry "state") a persistent value; bits as words of 32."""
        b = self.program.entries[entry][name]
        raw = bytes(self.engine.mem_read(self._address(b), b.type.size_bytes))
        if b.type.dtype == "bit":
            return np.frombuffer(raw, np.uint32)
        dtype = np.dtype(DTYPES[b.type.dtype])
        return np.frombuffer(raw[: b.type.size * dtype.itemsize], dtype).reshape(b.type.shape)

    @property
    def arena(self) -> bytes:
        """The whole arena."""
        return bytes(self.engine.mem_read(self.arena_at, self.program.arena_bytes))

    @property
    def state(self) -> bytes:
        """The whole state block."""
        return bytes(self.engine.mem_read(self.state_at, self.program.state_bytes))

    def _touched(self, at: int, size: int, from_top: bool) -> int:
        """Bytes from an end of a painted block to the last that changed."""
        block = np.frombuffer(bytes(self.engine.mem_read(at, size)), np.uint8)
        changed = np.flatnonzero(block != PAINT[0])
        if not changed.size:
            return 0
        return size - int(changed[0]) if from_top else int(changed[-1]) + 1

    def run(self, entry: str, first: int = 0, end: int | None = None, **inputs: Any) -> Run:
        """Feed, run ops first..end-1 (all), and tell what it took. Stack and arena are painted before each run."""
        n_ops = len(operations(self.program, entry))
        whole = first == 0 and (end is None or end >= n_ops)
        self._put(RAM, bytes([PAINT[0]]) * self.stack_bytes)
        if first == 0:
            self._put(self.arena_at, bytes([PAINT[0]]) * self.program.arena_bytes)
        self.feed(entry, inputs)
        name_at = self.data_at + NAME_AT
        self._put(name_at, entry.encode()[: RECORDS_BYTES - NAME_AT - 1] + b"\0")
        self._check(
            self._call("ac_find_entry", self.data_at, name_at, self.data_at + ENTRY_AT), "ac_find_entry"
        )
        self._put(RAM, bytes([PAINT[0]]) * self.stack_bytes)
        memory_at, entry_at = self.data_at + MEMORY_AT, self.data_at + ENTRY_AT
        if whole:
            status = self._call("ac_run", self.data_at, memory_at, entry_at)
        else:
            status = self._call("ac_run_range", self.data_at, memory_at, entry_at, first, end or n_ops)
        self._check(status, entry)
        counts = self.watch.by_op[1 : n_ops + 1]
        ops = [
            OpCount(o.op, o.shapes, int(c))
            for o, c in zip(operations(self.program, entry), counts, strict=True)
        ]
        outputs = {
            b.name: self.read(entry, b.name) for b in self.program.entries[entry].values() if b.is_output
        }
        return Run(
            outputs,
            self.watch.total,
            ops,
            self.watch.functions(self.image.symbols),
            self._touched(RAM, self.stack_bytes, True),
            self._touched(self.arena_at, self.program.arena_bytes, False),
        )

    def parameters(self) -> dict[str, np.ndarray]:
        """Copies of all persistent values by name."""
        return {name: self.read(STATE_ENTRY, name) for name in self.program.entries[STATE_ENTRY]}


class UnicornMachine:
    """An emulated board in this process: exactly its RAM and flash are mapped, anything else faults. A link.Transport.

    limit: instructions that the firmware may run without asking for bytes.

    What the firmware keeps lies in NOR flash of its own (see `kept`), which is erased in pages and programmed in words;
    `lose_power_in` cuts the power in the middle of one of these operations, and the board starts again.
    """

    name, per_tick = "emulator", 1.0  # its counter counts instructions / per_tick
    GOES_ON, WAITS, RESET, TOO_LONG, FULL, NO_POWER = range(6)

    def __init__(self, firmware: Firmware, limit: int = 1 << 40) -> None:
        machine = firmware.machine
        self.cpu, self.limit = cpu_of(machine.cpu), limit
        self.image = read_elf(firmware.elf, machine.flash, machine.ram)
        self.engine = open_engine(self.cpu)
        kept_bytes = firmware.kept_bytes
        self.engine.mem_map(machine.flash, whole_pages(firmware.flash_bytes, "flash") - kept_bytes, 5)
        self.engine.mem_map(machine.ram, whole_pages(firmware.ram_bytes, "RAM"), 3)
        self.engine.mem_write(machine.flash, self.image.flash)
        self.watch = Watch(self.engine, self.image.flash, machine.flash, self.cpu)
        self._ram = machine.ram, firmware.ram_bytes
        self._block = mmap.mmap(
            -1, max(kept_bytes, PAGE)
        )  # whole pages of the host, as the emulator needs them
        self._kept = np.frombuffer(self._block, np.uint8)[:kept_bytes]
        self._kept[:] = 0xFF
        #: Erases of each page of the flash for what was learned.
        self.erases = np.zeros(kept_bytes // PAGE, np.uint32)
        if kept_bytes:
            at = machine.flash + firmware.flash_bytes - kept_bytes
            self.engine.mem_map_ptr(at, kept_bytes, 1, _pointer(self._kept))
        record = self.watch.record
        record.kept, record.kept_bytes, record.erases = (
            _pointer(self._kept),
            kept_bytes,
            _pointer(self.erases),
        )
        if self.cpu.is_arm:
            self.watch.device(machine.uart, "uart", "uart")
            self.watch.device(machine.timer, "timer", "timer")
            self.watch.device(0xE000E000, "nothing", "control")
        else:
            self.watch.device(machine.uart, "16550", "16550")
            self.watch.device(machine.timer, "clint", "nothing")
            self.watch.device(0x00100000, "finisher", "finisher")
        self._pending, self._said = bytearray(), bytearray()
        self._reset()

    def _reset(self) -> None:
        from unicorn import arm_const

        self._pc = self.image.entry
        if self.cpu.is_arm:
            stack, self._pc = struct.unpack_from("<2I", self.image.flash)
            self.engine.reg_write(arm_const.UC_ARM_REG_SP, stack)

    def _go(self) -> None:
        """Run until the board waits for bytes."""
        from unicorn import UcError, arm_const, riscv_const

        pc = arm_const.UC_ARM_REG_PC if self.cpu.is_arm else riscv_const.UC_RISCV_REG_PC
        record = self.watch.record
        self.watch.input = np.frombuffer(bytes(self._pending), np.uint8)  # kept: the port reads it
        record.input, record.in_at, record.in_end = _pointer(self.watch.input), 0, len(self._pending)
        record.limit = record.total + self.limit
        self._pending.clear()
        while True:
            record.why = record.polls = 0
            try:
                self.engine.emu_start(self._pc, 0xFFFFFFFE)
            except UcError as error:
                at = self.engine.reg_read(pc)
                raise AcclimateError(
                    f"the firmware stopped: {error}",
                    where=self.function_at(at),
                    number=f"at {at:#x}, stack {self.stack_left()}",
                ) from None
            self._pc = self.engine.reg_read(pc) | int(self.cpu.is_arm)
            self._said += self.watch.output[: record.out_end].tobytes()
            record.out_end = 0
            if record.why == self.RESET:
                self._reset()
            elif record.why == self.NO_POWER:
                record.in_at, record.power_until = record.in_end, 0
                noise = np.random.default_rng(record.torn_state).bytes(self._ram[1])
                self.engine.mem_write(self._ram[0], noise)
                self._reset()
            elif record.why == self.WAITS:
                return
            elif record.why != self.FULL:
                at = self._pc & ~1
                raise AcclimateError(
                    "the firmware runs without end",
                    where=self.function_at(at),
                    number=f"at {at:#x}, {self.limit} instructions without looking at the serial line",
                )

    def function_at(self, address: int) -> str:
        """Name of the function that an address lies in."""
        for name, (at, size) in self.image.symbols.items():
            if at & ~1 <= address < (at & ~1) + size:
                return name
        return "no function of it"

    def stack_left(self) -> str:
        """Where the stack pointer stands, in words."""
        from unicorn import arm_const, riscv_const

        sp = self.engine.reg_read(arm_const.UC_ARM_REG_SP if self.cpu.is_arm else riscv_const.UC_RISCV_REG_SP)
        left = sp - self.image.symbols["ac_stack_bottom"][0]
        return f"{left} bytes from its end" if left >= 0 else f"{-left} bytes past its end"

    def write(self, data: bytes) -> None:
        """Send bytes to the board, which takes them when it runs next."""
        self._pending += data

    def read(self, timeout_s: float = 0.0) -> bytes:
        """Let the board run until it waits for bytes, and give what it has sent; the time does not count."""
        self._go()
        said = bytes(self._said)
        self._said.clear()
        return said

    def close(self) -> None:
        """Nothing is left behind."""

    @property
    def kept(self) -> bytes:
        """The flash that what was learned is kept in; may be set, as one flashes a chip."""
        return self._kept.tobytes()

    @kept.setter
    def kept(self, raw: bytes) -> None:
        self._kept[:] = np.frombuffer(raw, np.uint8)

    @property
    def flash_operations(self) -> int:
        """Pages erased and words programmed so far."""
        return int(self.watch.record.operations)

    def lose_power_in(self, operation: int, seed: int = 0) -> None:
        """Cut the power in the middle of the operation-th page erased or word programmed from now on (1: the next).

        Of the bits that it would have changed, a random half is. Then RAM holds noise, and the board starts again.
        """
        self.watch.record.power_until = self.flash_operations + operation
        self.watch.record.torn_state = seed

    @property
    def instructions(self) -> int:
        """Instructions since power on."""
        return self.watch.total


class QemuMachine:
    """An emulated board in a process of QEMU, for all processors there are. A link.Transport.

    RAM and flash are the linker script's: QEMU's own board has more, and a stray access to that does not fault.
    """

    def __init__(self, firmware: Firmware) -> None:
        machine = firmware.machine
        program = shutil.which(machine.qemu)
        if program is None:
            raise WrongUse(
                "QEMU is not installed",
                where=machine.qemu,
                action="apt-get install qemu-system-arm qemu-system-misc, or --engine unicorn",
            )
        self.name, self.machine, self.per_tick = machine.machine, machine, machine.per_tick
        bios = [] if machine.cpu.startswith("cortex") else ["-bios", "none"]
        self._process = subprocess.Popen(
            [
                *(program, "-M", machine.machine, *bios, "-display", "none", "-monitor", "none"),
                *("-chardev", "stdio,id=line,signal=off", "-serial", "chardev:line"),
                *(
                    "-semihosting-config",
                    "enable=on,target=native",
                    "-icount",
                    "shift=3",
                    "-kernel",
                    str(firmware.elf),
                ),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._end = weakref.finalize(self, _end_process, self._process)  # also where nobody calls close

    def write(self, data: bytes) -> None:
        """Send bytes to the board."""
        assert self._process.stdin
        try:
            self._process.stdin.write(data)
            self._process.stdin.flush()
        except BrokenPipeError:
            self._ended()

    def read(self, timeout_s: float = 0.0) -> bytes:
        """What the board has sent, as soon as there is something; nothing once the time is over."""
        assert self._process.stdout
        if not select.select([self._process.stdout], [], [], max(timeout_s, 0.0))[0]:
            return b""
        said = os.read(self._process.stdout.fileno(), 1 << 16)
        if not said:
            self._ended()
        return said

    def _ended(self) -> None:
        assert self._process.stderr
        status = self._process.wait(10)
        raise AcclimateError(
            "the firmware stopped: a fault, or QEMU ended",
            where=self.machine.machine,
            number=f"status {status} {self._process.stderr.read().decode(errors='replace')[-500:]}".strip(),
        )

    def close(self) -> None:
        """End the emulation."""
        self._end()


def _end_process(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


#: Ways of emulating a board: name -> a link.Transport from a toolchain.Firmware.
ENGINES = {"unicorn": UnicornMachine, "qemu": QemuMachine}


def measure(
    program: Program | bytes,
    entry: str = "step",
    feeds: Mapping[str, Any] | None = None,
    cpu: str = "cortex-m7",
    device: str | Device | None = None,
    flags: Sequence[str] = ("-O3",),
) -> Run:
    """Run one entry of a Program once on an emulated processor.

    feeds: input -> array or number; inputs that are left out are random numbers, labels zero, the learning rate 0.01.
    Raises CannotFit where a device is given and its memory is too small, AcclimateError where the run fails.
    """
    harness = Harness(program, cpu, device, flags)
    return harness.run(entry, **(default_feeds(harness.program, entry) | dict(feeds or {})))


def default_feeds(program: Program, entry: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Something for every input of an entry: normal numbers, labels 0, a learning rate of 0.01."""
    rng, feeds = np.random.default_rng(seed), {}
    for b in program.entries[entry].values():
        if b.is_output:
            continue
        dtype = np.dtype(DTYPES[b.type.dtype])
        if b.name == "lr":
            feeds[b.name] = np.full(b.type.shape, 0.01, dtype)
        elif dtype == np.int8:
            feeds[b.name] = rng.integers(-128, 128, b.type.shape).astype(dtype)
        elif dtype.kind == "f":
            feeds[b.name] = rng.normal(size=b.type.shape).astype(dtype)
        else:
            feeds[b.name] = np.zeros(b.type.shape, dtype)
    return feeds


def main(arguments: Sequence[str] | None = None) -> int:
    """Instructions of a Program's ops on an emulated processor: python -m acclimate.firmware.emulator FILE.acp."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("program", type=Path, help="a Program (.acp): plan.program.bytes")
    parser.add_argument("--entry", default="step")
    parser.add_argument("--cpu", default="", help=f"one of {', '.join(toolchain.CPUS)}")
    parser.add_argument("--device", help="map exactly this board's memory")
    parser.add_argument("--flags", default="-O3", help="of the compiler")
    parser.add_argument("--functions", action="store_true", help="also by function")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    harness = Harness(args.program.read_bytes(), args.cpu, args.device, args.flags.split())
    feeds: dict[str, Any] = default_feeds(harness.program, args.entry)
    run = harness.run(args.entry, **feeds)
    figures = {
        "cpu": harness.cpu.name,
        "instructions": run.instructions,
        "load_instructions": harness.load_instructions,
        "stack_bytes": run.stack_bytes,
        "arena_bytes": run.arena_bytes,
        "code_bytes": len(harness.image.flash),
        "flash_bytes": harness.flash_bytes,
        "ops": [[o.op, o.shapes, o.instructions] for o in run.ops],
        "functions": run.functions,
    }
    if args.json:
        print(json.dumps(figures))
        return 0
    for i, o in enumerate(run.ops):
        print(f"{i:4}  {o.instructions:12,}  {o.op:28} {o.shapes}")
    by_op: dict[str, int] = {}
    for o in run.ops:
        by_op[o.op] = by_op.get(o.op, 0) + o.instructions
    print("\nby op")
    for name, count in sorted(by_op.items(), key=lambda item: -item[1]):
        print(f"      {count:12,}  {100 * count / run.instructions:5.1f} %  {name}")
    if args.functions:
        print("\nby function")
        for name, count in run.functions.items():
            print(f"      {count:12,}  {100 * count / run.instructions:5.1f} %  {name}")
    print(
        f"\n{harness.cpu.name}: {run.instructions:,} instructions (not cycles), stack {run.stack_bytes}, "
        f"arena {run.arena_bytes} of {harness.program.arena_bytes}, code {len(harness.image.flash)} bytes"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
