"""Boards and computers: memory, clock, cycles an operation and power, each number with its source.

A source starts with what kind it is: "datasheet" (of the maker, not measured here), "published" (somebody's
measurement), "derived" (worked out from those, as shown), "definition", "system" (asked of this machine) or
"estimate" (our judgement, with its reason). Latency and energy of a plan are no better than these words; once
a step was timed on the board itself, `Device.calibrated` replaces the estimates by that measurement.
"""

from __future__ import annotations

import difflib
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from .errors import WrongUse

#: Units of work that `Device.cycles` prices.
OP_CLASSES: dict[str, str] = {
    "mac": "one float32 multiply-accumulate of a convolution or a matrix product, its loads included",
    "dw_mac": "one float32 multiply-accumulate of a depthwise convolution, its loads included",
    "elementwise": "one float32 operation on one element, with its load and store",
    "transcendental": "one exp, log, tanh or the like on one element",
    "byte": "one byte moved by a node that only moves data",
    "call": "one node: fetching it from the program and calling its kernel",
}

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True)
class Device:
    """A board or computer that a plan is made for.

    ram_bytes is one block of addresses, as an arena needs it; reserve_bytes of it are for the stack and the
    system. power_kind says what active_power_w is: "net" of idle, "total" of the processor chip, or "board".
    cycles: class of OP_CLASSES -> cycles a unit on one core. sources: field, or "cycles.<class>" -> text.

    >>> board = get("nano33ble")
    >>> board.usable_ram_bytes // 1024, round(board.latency_us({"mac": 64_000_000})) / 1e6
    (248, 5.0)
    >>> board.sources["ram_bytes"]
    'datasheet: nRF52840 product specification, memory: 256 KB RAM'
    """

    name: str
    title: str
    cpu: str
    ram_bytes: int
    reserve_bytes: int
    flash_bytes: int
    runtime_ram_bytes: int
    runtime_flash_bytes: int
    clock_hz: int
    threads: int
    has_fpu: bool
    simd: str
    active_power_w: float
    power_kind: str
    cycles: dict[str, float] = field(hash=False)
    sources: dict[str, str] = field(hash=False)

    def __post_init__(self) -> None:
        if set(self.cycles) != set(OP_CLASSES):
            raise WrongUse(
                "a device prices every class of work",
                where=f"device {self.name}",
                number=f"it has {sorted(self.cycles)}",
                action=f"give cycles for {sorted(OP_CLASSES)}",
            )
        if self.power_kind not in ("net", "total", "board"):
            raise WrongUse(
                "power_kind is net, total or board", where=f"device {self.name}", number=self.power_kind
            )
        if (
            not 0 <= self.reserve_bytes < self.ram_bytes
            or self.clock_hz <= 0
            or min(self.cycles.values()) < 0
        ):
            raise WrongUse("a device has memory, a clock and costs from zero", where=f"device {self.name}")

    @property
    def usable_ram_bytes(self) -> int:
        """Bytes that a plan's peak may take: ram_bytes without reserve_bytes."""
        return self.ram_bytes - self.reserve_bytes

    def latency_us(self, counts: Mapping[str, float], threads: int = 1) -> float:
        """Microseconds for `counts` (class of OP_CLASSES -> units): sum of units times cycles over the clock.

        With several threads, work is shared evenly and the calls are not; more than the device has count as
        what it has. Raises WrongUse for an unknown class.
        """
        unknown = sorted(set(counts) - set(OP_CLASSES))
        if unknown or threads < 1:
            raise WrongUse(
                "unknown class of work" if unknown else "at least one thread works",
                where=f"device {self.name}",
                number=", ".join(unknown) or str(threads),
                action=f"one of {', '.join(OP_CLASSES)}" if unknown else "threads=1",
            )
        calls = counts.get("call", 0) * self.cycles["call"]
        work = sum(units * self.cycles[name] for name, units in counts.items() if name != "call")
        return (calls + work / min(threads, self.threads)) / self.clock_hz * 1e6

    def energy_uj(self, counts: Mapping[str, float]) -> float:
        """Microjoules for `counts`: the time of one thread times active_power_w (see power_kind)."""
        return self.latency_us(counts) * self.active_power_w

    def calibrated(self, counts: Mapping[str, float], measured_us: float, note: str = "") -> Device:
        """This device with all cycles scaled so that latency_us(counts) is what one thread took.

        >>> round(get("pi4").calibrated({"mac": 1e6}, 900.0).latency_us({"mac": 2e6}))
        1800
        """
        predicted_us = self.latency_us(counts)
        if not (predicted_us > 0 and 0 < measured_us < float("inf")):
            raise WrongUse(
                "nothing to calibrate on", number=f"{predicted_us} us predicted, {measured_us} us measured"
            )
        factor = measured_us / predicted_us
        said = f"measured: a step took {measured_us:.6g} us, {factor:.3g} times the estimate. {note}".strip()
        sources = {**self.sources, **{f"cycles.{name}": said for name in OP_CLASSES}}
        return replace(
            self, cycles={name: value * factor for name, value in self.cycles.items()}, sources=sources
        )

    def explain(self) -> str:
        """Every number of the device, a line each, with its source."""
        lines = [f"{self.name}: {self.title}"]
        for name, source in sorted(self.sources.items()):
            value = self.cycles[name[7:]] if name.startswith("cycles.") else getattr(self, name)
            lines.append(f"  {name} = {value:g}" if isinstance(value, float) else f"  {name} = {value}")
            lines[-1] += f"  [{source}]"
        return "\n".join(lines)


def devices() -> dict[str, Device]:
    """All known devices by name, the smallest first; "host" is this machine, as it is now."""
    return {**_BOARDS, "host": _host()}


def get(name: str) -> Device:
    """The device of that name. Raises WrongUse with the nearest name and the list of all."""
    if name == "host":
        return _host()
    if name in _BOARDS:
        return _BOARDS[name]
    names = [*_BOARDS, "host"]
    squeezed = "".join(letter for letter in str(name).lower() if letter.isalnum())
    near = difflib.get_close_matches(squeezed, [n.replace("-", "") for n in names], n=1, cutoff=0.5)
    hint = f"did you mean {next(n for n in names if n.replace('-', '') == near[0])}? " if near else ""
    raise WrongUse(f"there is no device {name!r}", action=f"{hint}devices are {', '.join(names)}")


# --- the boards -----------------------------------------------------------------------------------

_RUNTIME = {
    "runtime_ram_bytes": "estimate: the interpreter has no globals; one session record and the program's "
    "tables, about 64 bytes a node for 30 nodes; the linked firmware's map has the true figure",
    "runtime_flash_bytes": "estimate: an exported project with every kernel, interpreted, takes 147 KiB on a "
    "Cortex-M4 (arm-none-eabi-gcc 12.2 -O2, without its Program); --mode unrolled links only what a Program needs",
}
_BARE_METAL = (
    "estimate: 4 KiB of stack and 4 KiB for vectors, start-up and a serial port, without an operating "
    "system; a radio stack takes tens of KiB more"
)
_ONE_CORE = "definition: the runtime uses one core of a microcontroller"
_CORTEX_M4 = {
    "cycles.mac": "estimate: 1 + 1 cycles for VMUL and VADD (Arm DDI 0439, FPU instruction timing; VFMA is "
    "3), two loads of which a tiled loop saves some, one stall and the loop. Other engines' training kernels "
    "take 3 to 41 instructions, counted under emulation",
    "cycles.dw_mac": "estimate: as mac, but no load is shared between outputs, and short inner loops",
    "cycles.elementwise": "estimate: load 2, operation 1, store 1 to 2, loop 1 (Arm DDI 0439)",
    "cycles.transcendental": "estimate: about 14 multiply-adds of a polynomial at 2 to 3 cycles and a "
    "division of 14 (Arm DDI 0439)",
    "cycles.byte": "estimate: a load and a store of a word, 3 cycles for 4 bytes",
    "cycles.call": "estimate: about 40 fields of a node decoded at 5 cycles",
}
_CORTEX_M7 = {
    "cycles.mac": "derived: a published step of Tiny Training Engine (MCUNet, STM32F746) takes 546 ms at "
    "216 MHz; its 49 KB scheme has 32.4 million multiply-accumulates, so 3.6 cycles each with all other "
    "work of the step; which scheme was timed is not stated, and its forward pass is int8",
    "cycles.dw_mac": "estimate: half as much again as mac, as no load is shared between outputs",
    "cycles.elementwise": "estimate: dual issue hides the loop and part of the loads of the Cortex-M4's 6",
    "cycles.transcendental": "estimate: the Cortex-M4's 45, less what dual issue hides; a division is 16",
    "cycles.byte": "estimate: a word a cycle in, a word a cycle out, caches warm",
    "cycles.call": "estimate: as on a Cortex-M4, less what dual issue hides",
}


def _cycles(*values: float) -> dict[str, float]:
    """Cycles in the order of OP_CLASSES: mac, dw_mac, elementwise, transcendental, byte, call."""
    return dict(zip(OP_CLASSES, values, strict=True))


_NANO33BLE = Device(
    name="nano33ble",
    title="Arduino Nano 33 BLE Sense (nRF52840)",
    cpu="cortex-m4",
    ram_bytes=256 * KIB,
    reserve_bytes=8 * KIB,
    flash_bytes=1 * MIB,
    runtime_ram_bytes=2 * KIB,
    runtime_flash_bytes=148 * KIB,
    clock_hz=64_000_000,
    threads=1,
    has_fpu=True,
    simd="",
    active_power_w=0.0099,
    power_kind="total",
    cycles=_cycles(5.0, 8.0, 6.0, 45.0, 0.75, 200.0),
    sources={
        "ram_bytes": "datasheet: nRF52840 product specification, memory: 256 KB RAM",
        "reserve_bytes": _BARE_METAL,
        "flash_bytes": "datasheet: nRF52840 product specification, memory: 1 MB flash; a bootloader takes "
        "some",
        "clock_hz": "datasheet: nRF52840 product specification, CPU: 64 MHz",
        "threads": _ONE_CORE,
        "active_power_w": "derived: 3.3 mA at 3 V, CPU running from flash with the DC/DC converter, as the "
        "8.1 mA of the product specification (current consumption, compounded, IS0) less 4.8 mA of its "
        "radio; the chip alone, a Nano's regulators and lamps come on top",
        **_RUNTIME,
        **_CORTEX_M4,
    },
)

_STM32F4 = Device(
    name="stm32f4",
    title="STM32F407 / STM32F446 class, the smaller figure of the two",
    cpu="cortex-m4",
    ram_bytes=128 * KIB,
    reserve_bytes=8 * KIB,
    flash_bytes=512 * KIB,
    runtime_ram_bytes=2 * KIB,
    runtime_flash_bytes=148 * KIB,
    clock_hz=168_000_000,
    threads=1,
    has_fpu=True,
    simd="",
    active_power_w=0.13,
    power_kind="total",
    cycles=_cycles(5.0, 8.0, 6.0, 45.0, 0.75, 200.0),
    sources={
        "ram_bytes": "datasheet: STM32F407 (DS8626) and STM32F446 (DS10693), memories: 112 + 16 KB in one "
        "block; the F407's 64 KB of core-coupled RAM lie elsewhere and may hold the stack",
        "reserve_bytes": _BARE_METAL,
        "flash_bytes": "datasheet: STM32F446 (DS10693), memories: up to 512 KB; an F407 has up to 1 MB",
        "clock_hz": "datasheet: STM32F407 (DS8626), maximum frequency 168 MHz; an F446 reaches 180 MHz",
        "threads": _ONE_CORE,
        "active_power_w": "estimate: 40 mA at 3.3 V, the order of the run-mode supply current in the "
        "STM32F407 datasheet (DS8626) at 168 MHz with peripherals off; the exact row was not checked",
        **_RUNTIME,
        **_CORTEX_M4,
    },
)

_STM32F7 = Device(
    name="stm32f7",
    title="STM32F746",
    cpu="cortex-m7",
    ram_bytes=320 * KIB,
    reserve_bytes=8 * KIB,
    flash_bytes=1 * MIB,
    runtime_ram_bytes=2 * KIB,
    runtime_flash_bytes=148 * KIB,
    clock_hz=216_000_000,
    threads=1,
    has_fpu=True,
    simd="",
    active_power_w=0.33,
    power_kind="total",
    cycles=_cycles(3.6, 5.4, 4.0, 35.0, 0.5, 150.0),
    sources={
        "ram_bytes": "datasheet: STM32F746 (DS10916), memories: 64 KB DTCM, 240 KB and 16 KB SRAM, end to "
        "end",
        "reserve_bytes": _BARE_METAL,
        "flash_bytes": "datasheet: STM32F746 (DS10916), memories: up to 1 MB",
        "clock_hz": "datasheet: STM32F746 (DS10916), maximum frequency 216 MHz",
        "threads": _ONE_CORE,
        "active_power_w": "estimate: 100 mA at 3.3 V, the order of the run-mode supply current in the "
        "STM32F746 datasheet (DS10916) at 216 MHz with peripherals off; the exact row was not checked",
        **_RUNTIME,
        **_CORTEX_M7,
    },
)

_STM32H7 = Device(
    name="stm32h7",
    title="STM32H743",
    cpu="cortex-m7",
    ram_bytes=512 * KIB,
    reserve_bytes=0,
    flash_bytes=2 * MIB,
    runtime_ram_bytes=2 * KIB,
    runtime_flash_bytes=148 * KIB,
    clock_hz=480_000_000,
    threads=1,
    has_fpu=True,
    simd="",
    active_power_w=0.45,
    power_kind="total",
    cycles=_cycles(3.6, 5.4, 4.0, 35.0, 0.5, 150.0),
    sources={
        "ram_bytes": "datasheet: STM32H743 (DS12110), memories: 512 KB AXI SRAM, the largest block of about"
        " 1 MB",
        "reserve_bytes": "definition: stack and system fit the 128 KB DTCM and the other blocks, which are "
        "not counted",
        "flash_bytes": "datasheet: STM32H743 (DS12110), memories: up to 2 MB",
        "clock_hz": "datasheet: STM32H743 (DS12110), maximum frequency 480 MHz (revision V; 400 MHz before)",
        "threads": _ONE_CORE,
        "active_power_w": "estimate: 135 mA at 3.3 V, the order of the run-mode supply current in the "
        "STM32H743 datasheet (DS12110) at full clock with peripherals off; the exact row was not checked",
        **_RUNTIME,
        **_CORTEX_M7,
        "cycles.mac": _CORTEX_M7["cycles.mac"] + "; carried over to this chip of the same core",
    },
)

_RP2040 = Device(
    name="rp2040",
    title="Raspberry Pi Pico (RP2040)",
    cpu="cortex-m0plus",
    ram_bytes=264 * KIB,
    reserve_bytes=8 * KIB,
    flash_bytes=2 * MIB,
    runtime_ram_bytes=2 * KIB,
    runtime_flash_bytes=176 * KIB,
    clock_hz=125_000_000,
    threads=1,
    has_fpu=False,
    simd="",
    active_power_w=0.083,
    power_kind="board",
    cycles=_cycles(140.0, 145.0, 80.0, 1900.0, 1.0, 400.0),
    sources={
        "ram_bytes": "datasheet: RP2040 datasheet, SRAM: 264 KB in six banks, end to end",
        "reserve_bytes": _BARE_METAL,
        "flash_bytes": "datasheet: Raspberry Pi Pico product brief: 2 MB on the board",
        "clock_hz": "datasheet: 125 MHz, long the default system clock of the Pico SDK; 133 MHz is the rated "
        "maximum",
        "threads": _ONE_CORE + "; the RP2040 has two",
        "active_power_w": "estimate: 25 mA at 3.3 V for a Pico with one core busy; users report 18 to 38 mA",
        **_RUNTIME,
        "runtime_flash_bytes": _RUNTIME["runtime_flash_bytes"] + "; Thumb-1 code and soft float are larger",
        "cycles.mac": "estimate: no FPU; an add of about 70 and a multiply of about 60 cycles, the order of"
        " the averages that the RP2040 datasheet gives for the float routines in its boot ROM, and 10 for "
        "loads and calls",
        "cycles.dw_mac": "estimate: as mac; arithmetic hides what depthwise costs elsewhere",
        "cycles.elementwise": "estimate: one soft-float operation of 60 to 70 cycles, its call, load and "
        "store",
        "cycles.transcendental": "estimate: about 14 soft-float multiply-adds",
        "cycles.byte": "estimate: a load and a store of a word, 4 cycles for 4 bytes",
        "cycles.call": "estimate: twice a Cortex-M4, for its shorter instructions",
    },
)

_ESP32S3 = Device(
    name="esp32s3",
    title="ESP32-S3",
    cpu="xtensa-lx7",
    ram_bytes=320 * KIB,
    reserve_bytes=64 * KIB,
    flash_bytes=8 * MIB,
    runtime_ram_bytes=2 * KIB,
    runtime_flash_bytes=176 * KIB,
    clock_hz=240_000_000,
    threads=1,
    has_fpu=True,
    simd="",
    active_power_w=0.18,
    power_kind="total",
    cycles=_cycles(5.1, 7.0, 6.0, 60.0, 0.75, 200.0),
    sources={
        "ram_bytes": "estimate: of the 512 KB SRAM in the ESP32-S3 datasheet, what is left to data in one "
        "block once caches and code in RAM are served",
        "reserve_bytes": "estimate: FreeRTOS, its stacks and drivers, without Wi-Fi and Bluetooth",
        "flash_bytes": "estimate: 8 MB, a usual module; modules come with 4 to 32 MB",
        "clock_hz": "datasheet: ESP32-S3 datasheet, CPU clock up to 240 MHz",
        "threads": _ONE_CORE + "; the ESP32-S3 has two",
        "active_power_w": "estimate: 55 mA at 3.3 V: 32 mA awake without work (published by users of the "
        "DevKit) and some 23 mA for one busy core at 240 MHz, radio off",
        **_RUNTIME,
        "cycles.mac": "published: Espressif's ESP-DSP benchmark, dsps_dotprod_f32 of 256 points in C takes "
        "1311 cycles (432 in assembly for the S3)",
        "cycles.dw_mac": "estimate: as mac, with shorter inner loops",
        "cycles.elementwise": "estimate: load, operation and store of one float in order, and the loop",
        "cycles.transcendental": "estimate: about 14 multiply-adds and a division that the FPU does in steps",
        "cycles.byte": "estimate: a load and a store of a word, 3 cycles for 4 bytes",
        "cycles.call": "estimate: as on a Cortex-M4",
    },
)

_LINUX_RUNTIME = {
    "runtime_ram_bytes": "estimate: session record and program tables, and the shared library's data; "
    "Python apart",
    "runtime_flash_bytes": "estimate: the shared library with kernels for each instruction set; Python apart",
    "flash_bytes": "estimate: 8 GB, a small card; the system takes about half of it",
}

_PI_ZERO2 = Device(
    name="pi-zero2",
    title="Raspberry Pi Zero 2 W",
    cpu="cortex-a53",
    ram_bytes=512 * MIB,
    reserve_bytes=192 * MIB,
    flash_bytes=8_000_000_000,
    runtime_ram_bytes=1 * MIB,
    runtime_flash_bytes=2 * MIB,
    clock_hz=1_000_000_000,
    threads=4,
    has_fpu=True,
    simd="neon",
    active_power_w=2.2,
    power_kind="board",
    cycles=_cycles(1.2, 2.4, 1.0, 25.0, 0.4, 200.0),
    sources={
        "ram_bytes": "datasheet: Raspberry Pi Zero 2 W product brief: 512 MB",
        "reserve_bytes": "estimate: 64 MB for graphics and 128 MB for a Linux system without a desktop",
        "clock_hz": "datasheet: Raspberry Pi Zero 2 W product brief: quad-core 64-bit Cortex-A53 at 1 GHz",
        "threads": "datasheet: Raspberry Pi Zero 2 W product brief: four cores",
        "active_power_w": "derived: TinyTrain (arXiv 2307.09988) reports 1.2 kJ in 9 minutes on a Pi Zero "
        "2, which is 2.2 W; its full training, which swaps, runs at 0.8 W; idle power is not said to be "
        "taken off",
        **_LINUX_RUNTIME,
        "cycles.mac": "estimate: NEON at two multiply-accumulates a cycle, of which 40 % are reached: a "
        "Cortex-A53 cannot load 128 bits beside one",
        "cycles.dw_mac": "estimate: half of mac's rate, as no load is shared between outputs",
        "cycles.elementwise": "estimate: four floats a vector, bound by loads and stores",
        "cycles.transcendental": "estimate: a polynomial of 14 steps, in order, not vectorised",
        "cycles.byte": "estimate: about 2.5 GB/s of memory traffic on one core",
        "cycles.call": "estimate: decoding a node with warm caches",
    },
)

_PI4 = Device(
    name="pi4",
    title="Raspberry Pi 4 Model B (1 GB)",
    cpu="cortex-a72",
    ram_bytes=1 * GIB,
    reserve_bytes=256 * MIB,
    flash_bytes=8_000_000_000,
    runtime_ram_bytes=1 * MIB,
    runtime_flash_bytes=2 * MIB,
    clock_hz=1_500_000_000,
    threads=4,
    has_fpu=True,
    simd="neon",
    active_power_w=0.85,
    power_kind="net",
    cycles=_cycles(0.8, 1.6, 0.6, 15.0, 0.3, 200.0),
    sources={
        "ram_bytes": "datasheet: Raspberry Pi 4 Model B product brief: 1 GB, the smallest variant",
        "reserve_bytes": "estimate: 76 MB for graphics and 180 MB for a Linux system without a desktop",
        "clock_hz": "datasheet: Raspberry Pi 4 Model B product brief: quad-core Cortex-A72 at 1.5 GHz; 1.8 "
        "GHz later",
        "threads": "datasheet: Raspberry Pi 4 Model B product brief: four cores",
        "active_power_w": "derived: published measurements of a board (geerlingguy/sbc-reviews, issue 4) "
        "give 1.6 W idle and 5.0 W with four cores of matrix work: 0.85 W a core net of idle. TBFT reports"
        " 0.20 to 0.25 W net on a Raspberry Pi of unnamed model",
        **_LINUX_RUNTIME,
        "cycles.mac": "derived: the same page gives 7.2 W and 1.64 Gflops/W for Linpack: 11.8 Gflops in "
        "double precision on four cores at 1.8 GHz, so 0.6 cycles for a float multiply-accumulate in the "
        "best library; a third is added for small layers",
        "cycles.dw_mac": "estimate: half of mac's rate, as no load is shared between outputs",
        "cycles.elementwise": "estimate: four floats a vector, bound by loads and stores",
        "cycles.transcendental": "estimate: a polynomial of 14 steps, out of order, not vectorised",
        "cycles.byte": "estimate: about 5 GB/s of memory traffic on one core",
        "cycles.call": "estimate: decoding a node with warm caches",
    },
)

_BOARDS: dict[str, Device] = {
    board.name: board
    for board in (_STM32F4, _NANO33BLE, _RP2040, _ESP32S3, _STM32F7, _STM32H7, _PI_ZERO2, _PI4)
}


# --- this machine ---------------------------------------------------------------------------------


def _host() -> Device:
    """This machine: memory, cores and clock as the system tells them, costs as estimates."""
    machine = platform.machine().lower()
    wide = machine in ("x86_64", "amd64")
    mac, simd = (0.25, "avx2") if wide else (0.5, "neon" if machine in ("aarch64", "arm64") else "")
    ram_bytes, clock_hz = _host_ram_bytes(), _host_clock_hz()
    return Device(
        name="host",
        title=f"this machine ({platform.system()} {platform.machine()})",
        cpu=machine or "unknown",
        ram_bytes=ram_bytes or 4 * GIB,
        reserve_bytes=(ram_bytes or 4 * GIB) // 4,
        flash_bytes=shutil.disk_usage(Path.home() if Path.home().exists() else Path.cwd()).free,
        runtime_ram_bytes=1 * MIB,
        runtime_flash_bytes=2 * MIB,
        clock_hz=clock_hz or 2_500_000_000,
        threads=_host_threads(),
        has_fpu=True,
        simd=simd,
        active_power_w=10.0,
        power_kind="net",
        cycles=_cycles(mac, 4 * mac, 0.5, 8.0, 0.15, 150.0),
        sources={
            **_LINUX_RUNTIME,
            "ram_bytes": "system: physical memory, or the container's limit where that is less"
            if ram_bytes
            else "estimate: the system does not tell; 4 GiB",
            "reserve_bytes": "estimate: a quarter for the system and other programs",
            "flash_bytes": "system: free space on the disk of the home folder",
            "clock_hz": "system: the processor's highest clock, or the present one where that is all it tells"
            if clock_hz
            else "estimate: the system does not tell; 2.5 GHz",
            "threads": "system: the processors that this process may use",
            "active_power_w": "estimate: 10 W more than idle for one busy core of a laptop or server "
            "processor",
            "cycles.mac": "estimate: a quarter of the peak of two vector units (16 multiply-accumulates a "
            "cycle with AVX2, 8 with NEON): small layers at batch 1; PyTorch reaches 28 % there on one Zen"
            " 4 core",
            "cycles.dw_mac": "estimate: a quarter of mac's rate; PyTorch is seven times slower there",
            "cycles.elementwise": "estimate: a vector a cycle, bound by loads and stores",
            "cycles.transcendental": "estimate: a polynomial of 14 steps, partly vectorised",
            "cycles.byte": "estimate: about 15 GB/s of memory traffic on one core",
            "cycles.call": "estimate: decoding a node with warm caches",
        },
    )


def _host_ram_bytes() -> int:
    """Physical memory or the container's limit, whichever is less; 0 where the system does not tell."""
    found = []
    try:
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        found.append(_windows_ram_bytes())
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min((value for value in found if value > 0), default=0)


def _windows_ram_bytes() -> int:
    import ctypes

    if not hasattr(ctypes, "windll"):
        return 0
    status = (ctypes.c_ulonglong * 8)()  # MEMORYSTATUSEX: two words of 32 bits, then seven of 64
    ctypes.cast(status, ctypes.POINTER(ctypes.c_ulong))[0] = ctypes.sizeof(status)
    return int(status[1]) if ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)) else 0


def _host_threads() -> int:
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _host_clock_hz() -> int:
    """The processor's clock, 0 where the system does not tell."""
    try:
        return int(Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").read_text()) * 1000
    except (OSError, ValueError):
        pass
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return int(max(float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")) * 1e6)
    except (OSError, ValueError):
        return 0
