"""A Plan: one model, update set, loss, optimiser, batch size and device, compiled, with what it costs.

The planner decides feasibility: `compile_plan` either returns a plan that fits or raises CannotFit with the
cheapest changes that would, each of them planned in full and so known to the byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from . import device as devices
from . import schemes
from .device import Device
from .errors import CannotFit, WrongUse
from .grad import UpdateSet, gradient_graph, predict_graph, step_graphs
from .ir import Graph
from .layout import Layout, arrange, persistent_layout
from .objective import LOSSES, OPTIMIZERS, SGD, Loss, Optimizer, resolve
from .ops import TABLE, cost, with_batch
from .passes import prepare
from .passes import run as run_passes
from .program import Program, build

MAX_BATCH = 65536
MAX_THREADS = 64  # AC_MAX_THREADS


@dataclass(frozen=True)
class Plan:
    """What will learn, how, where, and exactly what it takes. Made by `acclimate.plan`.

    model: the Graph as it was loaded. memory_bytes: the caller's limit on peak_bytes, if any.
    """

    model: Graph
    update_set: UpdateSet
    loss: Loss
    optimizer: Optimizer
    device: Device
    batch_size: int = 1
    memory_bytes: int | None = None
    threads: int = 1
    explanation: str = ""  # why this scheme, where it was chosen automatically
    tried: tuple[Mapping[str, Any], ...] = field(default=(), compare=False)  # rows of what else was tried

    # -- compiled ------------------------------------------------------------------------------------------------
    @cached_property
    def layouts(self) -> dict[str, Layout]:
        """Entry name -> order and places: "predict" and "step" (or "accumulate" and "apply")."""
        model = self._prepared(self.batch_size)
        steps = step_graphs(model, self.update_set, self.loss, self.optimizer)
        return _arranged({"predict": predict_graph(model), **steps})

    @cached_property
    def state_layout(self) -> tuple[dict[str, int], int]:
        """Offsets of the persistent values, and the bytes of all: the same for every batch size."""
        return persistent_layout([p.graph for p in self.layouts.values()])

    @cached_property
    def program(self) -> Program:
        """What the runtime runs."""
        return build(self.layouts, self.state_layout)

    def train_program(self, batch_size: int) -> Program:
        """All entries for another batch size, on the same block of persistent values."""
        return build(self.with_batch_size(batch_size).layouts, self.state_layout)

    def predict_program(self, batch_size: int) -> Program:
        """Only the entry "predict", for another batch size, on the same block of persistent values."""
        return build(_arranged({"predict": predict_graph(self._prepared(batch_size))}), self.state_layout)

    def gradient_program(self, batch_size: int) -> Program:
        """The entry "gradient": loss and gradients as outputs, nothing updated. For inspection on the host."""
        graph = gradient_graph(self._prepared(batch_size), self.update_set, self.loss)
        return build(_arranged({"gradient": graph}), self.state_layout)

    def _prepared(self, batch_size: int) -> Graph:
        """The model at a batch size, with all that never changes folded away."""
        return prepare(with_batch(self.model, batch_size), set(self.update_set.tensors))

    def with_batch_size(self, batch_size: int) -> Plan:
        """The same plan for another batch size, without its limits."""
        return replace(self, batch_size=batch_size, memory_bytes=None)

    @property
    def train_entry(self) -> str:
        """The entry that takes a batch with labels."""
        return "step" if "step" in self.layouts else "accumulate"

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: getattr(self, name) for name in self.__dataclass_fields__
        }  # what was compiled is compiled again

    # -- memory --------------------------------------------------------------------------------------------------
    @property
    def arena_bytes(self) -> int:
        """Activations, gradients and inputs: the block that every run works in."""
        return max(p.arena_bytes for p in self.layouts.values())

    @property
    def lower_bound_bytes(self) -> int:
        """The largest set of tensors alive at once: no arena for this order can be smaller."""
        return max(p.lower_bound_bytes for p in self.layouts.values())

    @property
    def state_bytes(self) -> int:
        """Trainable weights, optimiser state, running statistics, counters."""
        return self.program.state_bytes

    @property
    def peak_bytes(self) -> int:
        """All RAM of learning on the device: arena, state, and the runtime's own."""
        return self.arena_bytes + self.state_bytes + self.device.runtime_ram_bytes

    @property
    def flash_bytes(self) -> int:
        """The Program (constants, initial weights, ops) and the runtime's code."""
        return len(self.program.bytes) + self.device.runtime_flash_bytes

    @property
    def update_bytes(self) -> int:
        """Bytes of the weights that learn, as a delta sends them."""
        return 4 * self.update_set.size(self.model)

    # -- cost ----------------------------------------------------------------------------------------------------
    @cached_property
    def counts(self) -> dict[str, int]:
        """Work of one training step by the device's classes."""
        return count_work([p for name, p in self.layouts.items() if name != "predict"])

    @property
    def macs_per_step(self) -> int:
        """Multiply-accumulates of forward, backward and update for one batch."""
        return self.counts["mac"] + self.counts["dw_mac"]

    @property
    def latency_us(self) -> float:
        """Estimated time of a step; see the device's sources for what the estimate rests on."""
        return self.device.latency_us(self.counts, self.threads)

    @property
    def energy_uj(self) -> float:
        """Estimated energy of a step."""
        return self.device.energy_uj(self.counts)

    # -- answers -------------------------------------------------------------------------------------------------
    @property
    def ram_limit_bytes(self) -> int:
        usable = self.device.usable_ram_bytes
        return usable if self.memory_bytes is None else min(usable, self.memory_bytes)

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.ram_limit_bytes and self.flash_bytes <= self.device.flash_bytes

    def row(self) -> dict[str, Any]:
        """The figures of this plan, one row of a comparison."""
        return {
            "scheme": self.update_set.scheme,
            "fits": self.fits,
            "arena_bytes": self.arena_bytes,
            "lower_bound_bytes": self.lower_bound_bytes,
            "peak_bytes": self.peak_bytes,
            "flash_bytes": self.flash_bytes,
            "macs_per_step": self.macs_per_step,
            "latency_us": self.latency_us,
            "energy_uj": self.energy_uj,
            "update_bytes": self.update_bytes,
            "trainable": self.update_set.size(self.model),
            "batch_size": self.batch_size,
        }

    def timeline(self) -> list[dict[str, Any]]:
        """For each node of a training step in order: its op, the tensor it makes, and the arena bytes alive."""
        layout = self.layouts[self.train_entry]
        return [
            {"op": node.op, "value": node.outputs[0] if node.outputs else node.inputs[0], "live_bytes": live}
            for node, live in zip(layout.nodes, layout.live_bytes(), strict=True)
        ]

    def at_peak(self) -> list[tuple[str, int, str]]:
        """What is alive at the peak of the training step, largest first: (tensor, bytes, why it is kept)."""
        layout = self.layouts[self.train_entry]
        live = layout.live_bytes()
        peak = live.index(max(live))
        out = []
        for b in layout.buffers:
            if b.start <= peak <= b.end:
                last = layout.nodes[b.end] if b.end < len(layout.nodes) else None
                out.append((b.values[-1], b.size_bytes, f"until {last.op}" if last else "an output"))
        return sorted(out, key=lambda t: -t[1])

    def __str__(self) -> str:
        weights = self.update_set.size(self.model)
        total = sum(v.type.size for v in self.model.parameters().values())
        limit = self.ram_limit_bytes
        lines = [
            f"plan for {self.device.title}, batch {self.batch_size}, scheme {self.update_set.scheme}",
            f"  learns        {weights:,} of {total:,} weights in {len(self.update_set.tensors)} tensors",
            f"  arena         {kib(self.arena_bytes)} (lower bound {kib(self.lower_bound_bytes)})",
            f"  peak RAM      {kib(self.peak_bytes)} of {kib(limit)}: {'fits' if self.fits else 'does not fit'}",
            f"  flash         {kib(self.flash_bytes)} of {kib(self.device.flash_bytes)}",
            f"  a step        {self.macs_per_step / 1e6:.2f} MMAC, about {self.latency_us / 1e3:.2f} ms, "
            f"{self.energy_uj / 1e3:.3f} mJ (estimates)",
            f"  {'tensor':40s} {'learns':>16s}  why",
        ]
        for name, channels in self.update_set.tensors.items():
            shape = self.model.shape(name)
            what = (
                "x".join(map(str, shape))
                if channels is None
                else f"{len(channels.index)}/{shape[channels.axis]} axis {channels.axis}"
            )
            lines.append(f"  {name:40s} {what:>16s}  {self.update_set.reasons.get(name, '')}")
        if self.explanation:
            lines.append(f"  {self.explanation}")
        return "\n".join(lines)


def _arranged(graphs: Mapping[str, Graph]) -> dict[str, Layout]:
    return {name: arrange(run_passes(graph)) for name, graph in graphs.items()}


def kib(n: int) -> str:
    """Bytes for people: KiB below a MiB, MiB below a GiB."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} B"


def count_work(layouts: list[Layout]) -> dict[str, int]:
    """Work of running each of the layouts once, by the classes of device.OP_CLASSES."""
    counts = dict.fromkeys(devices.OP_CLASSES, 0)
    for layout in layouts:
        graph = layout.graph
        for node in layout.nodes:
            if TABLE[node.op].view:
                continue
            c = cost(graph, node)
            counts["mac"] += c.mac
            counts["dw_mac"] += c.dw_mac
            counts["elementwise"] += c.elementwise
            counts["transcendental"] += c.transcendental
            counts["call"] += 1
            if not (c.mac or c.dw_mac or c.elementwise or c.transcendental):
                counts["byte"] += sum(graph.type(n).size_bytes for n in node.outputs if n)
    return counts


def compile_plan(
    model: Graph,
    device: str | Device = "host",
    scheme: Any = "full",
    loss: str | Loss = "cross_entropy",
    optimizer: str | Optimizer = "sgd",
    batch_size: int = 1,
    memory_bytes: int | None = None,
    threads: int | None = None,
    must_fit: bool = True,
) -> Plan:
    """Compile one scheme. Raises CannotFit, with `fixes`, where it does not fit and `must_fit` is left on.

    model: a Graph. device: a name of acclimate.devices() or a Device. memory_bytes: a limit on peak RAM below the
    device's own. The other arguments are those of acclimate.plan.
    """
    whole = isinstance(batch_size, (int, np.integer)) and not isinstance(batch_size, bool)
    if not whole or not 1 <= batch_size <= MAX_BATCH:
        raise WrongUse("batch_size must be a whole number", number=f"{batch_size}, from 1 to {MAX_BATCH}")
    if memory_bytes is not None and memory_bytes <= 0:
        raise WrongUse("memory_bytes must be positive", number=str(memory_bytes))
    if threads is not None and not (isinstance(threads, int) and 1 <= threads <= MAX_THREADS):
        raise WrongUse("threads must be a whole number", number=f"{threads}, from 1 to {MAX_THREADS}")
    chosen = schemes.resolve(scheme)
    update_set = chosen if isinstance(chosen, UpdateSet) else chosen.choose(model)
    target = devices.get(device) if isinstance(device, str) else device
    plan = Plan(
        model,
        update_set.check(model),
        resolve(loss, LOSSES, "loss"),
        resolve(optimizer, OPTIMIZERS, "optimizer"),
        target,
        int(batch_size),
        memory_bytes,
        threads or 1,
    )
    if must_fit and not plan.fits:
        raise cannot_fit(plan)
    return plan


def cannot_fit(plan: Plan) -> CannotFit:
    """The error for a plan that does not fit: what is largest, and the cheapest fixes."""
    found = fixes(plan)
    name, size, why = plan.at_peak()[0]
    if plan.peak_bytes > plan.ram_limit_bytes:
        limit = (
            "the limit"
            if plan.memory_bytes is not None and plan.memory_bytes <= plan.device.usable_ram_bytes
            else plan.device.name
        )
        number = (
            f"needs {kib(plan.peak_bytes)} of RAM ({plan.peak_bytes} bytes), {limit} has {kib(plan.ram_limit_bytes)} "
            f"({plan.ram_limit_bytes}); largest is {name} ({kib(size)}), kept {why}"
        )
    else:
        number = (
            f"needs {kib(plan.flash_bytes)} of flash, {plan.device.name} has {kib(plan.device.flash_bytes)}"
        )
    action = "; or ".join(f["text"] for f in found) or (
        "no scheme of this model fits: take a smaller model, a smaller input, or a device with more memory"
    )
    return CannotFit(
        f"scheme {plan.update_set.scheme} cannot fit",
        where=f"{plan.device.title}, batch {plan.batch_size}",
        number=number,
        action=action,
        fixes=tuple(found),
    )


def fixes(plan: Plan, limit: int = 3) -> list[dict[str, Any]]:
    """Changes that make it fit, each compiled and checked: those that keep most weights learning come first."""
    options: list[tuple[str, dict[str, Any]]] = []
    if plan.batch_size > 1:
        options.append(("--batch 1", {"batch_size": 1}))
    if getattr(plan.optimizer, "momentum", 0) or hasattr(plan.optimizer, "betas"):
        options.append(("--optimizer sgd", {"optimizer": SGD(lr=plan.optimizer.lr)}))
    for scheme in schemes.candidates(plan.model):
        options.append((f"--scheme {scheme.label}", {"update_set": scheme.choose(plan.model)}))
        if plan.batch_size > 1:
            options.append(
                (
                    f"--scheme {scheme.label} --batch 1",
                    {"update_set": scheme.choose(plan.model), "batch_size": 1},
                )
            )
    found: list[dict[str, Any]] = []
    for text, change in options:
        other = replace(plan, **change)
        if other.fits:
            saved = plan.peak_bytes - other.peak_bytes
            found.append(
                {
                    "text": f"{text} ({saved / 1024:.1f} KiB less RAM)",
                    "option": text,
                    "peak_bytes": other.peak_bytes,
                    "flash_bytes": other.flash_bytes,
                    "saved_bytes": saved,
                    "trainable": other.update_set.size(plan.model),
                    "changes": len(text.split("--")) - 1,
                }
            )
    found.sort(key=lambda f: (f["changes"], -f["trainable"]))
    return found[:limit]
