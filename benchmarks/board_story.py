#!/usr/bin/env python3
"""A board's whole life on one page: an int8 model, personalised on an emulated board of 256 KB, through power cuts.

A net for activity recognition learns from the phones of half of the people of har_spsw (ACCLIMATE_DATA), becomes
int8, and is exported for an Arduino Nano 33 BLE: Cortex-M4, 256 KB of RAM, 1 MB of flash. The board is emulated,
instruction by instruction, with exactly that memory; all talk with it goes over its serial protocol. The other people
wear their phone as a watch. Each one's board learns from the first half of their recordings, one window at a time;
accuracy is what the board predicts of the other half. The learning rate is the one that does best, in Python, on the
people that are known.

For the first of them the story goes on. What was learned is saved to the board's flash; it learns on; power fails in
the middle of the second save, in every operation of the flash in turn (with --quick in some of them, the worst among
them); the board starts again. A later lesson has wrong labels, and is rolled back. The flash is read out, restored in
Python, and the delta in it loaded on boards with other processors: all must predict the same, to the last bit.

The run fails where any of this does not hold. Instructions are not cycles, and nothing here says how long a step takes.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_data import watch_model
from rich.console import Console

import acclimate
from acclimate import report, report_html, store
from acclimate.errors import AcclimateError
from acclimate.firmware import trial
from acclimate.firmware.emulator import UnicornMachine, read_elf
from acclimate.firmware.link import Board
from acclimate.firmware.toolchain import Firmware
from acclimate.quantizer import quantized
from acclimate.report import Bars, Column, Curve, Facts, Note, Parts, Report, Section, Table

DEVICE = "nano33ble"
RATES = (0.003, 0.01, 0.03)
#: processor -> the device whose memory its board has
OTHERS = {"cortex-m7": "stm32f7", "riscv32": DEVICE, "cortex-m33": DEVICE, "cortex-m0plus": DEVICE}
LINE_WORDS = 16  # words of a line of the store: the header's, the seal's


@dataclass(frozen=True)
class Person:
    """Windows of one person: to learn from, in an order of their own, and kept out. x: as the int8 model takes it."""

    name: str
    x: np.ndarray
    y: np.ndarray
    x_val: np.ndarray
    y_val: np.ndarray


@dataclass
class Story:
    """What happened, in order. `losses` of all steps; `marks`: (step, what)."""

    losses: list[float] = field(default_factory=list)
    marks: list[tuple[int, str]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    def tell(self, what: str, accuracy: float | None = None, remark: str = "", mark: str = "") -> None:
        self.events.append({"event": what, "steps": len(self.losses), "accuracy": accuracy, "remark": remark})
        if mark:
            self.marks.append((len(self.losses), mark))


def people(
    data: Path, quick: bool, seed: int
) -> tuple[acclimate.Graph, list[Person], list[Person], list[str]]:
    """The int8 model, the people that are known and the others, and the names of the classes."""
    model, x, y, known, others = watch_model(data, quick)
    with np.load(data / "har_spsw.npz", allow_pickle=False) as f:
        keep = f["purity"] >= 0.75
        subject, execution = f["subject"][keep], f["execution"][keep]
        classes = [str(name) for name in f["class_names"]]
    rng = np.random.default_rng(seed)
    known_people = np.isin(subject, subject[known])
    int8 = acclimate.quantize(model, x[known_people][::4])
    raw = quantized(int8.values[int8.inputs["x"]], x)

    def of(rows: np.ndarray) -> Iterator[Person]:
        for who in np.unique(subject[rows]):
            mine = rows[subject[rows] == who]
            early = execution[mine] <= np.median(np.unique(execution[mine]))
            learn, late = rng.permutation(mine[early]), mine[~early]
            yield Person(f"person {who}", raw[learn], y[learn].astype(np.int32), raw[late], y[late])

    return int8, list(of(known)), list(of(np.flatnonzero(others))), classes


def best_rate(plan: acclimate.Plan, known: Sequence[Person], epochs: int) -> float:
    """Of RATES, the one that does best on people who are known, in Python."""

    def mean_accuracy(lr: float) -> float:
        found = []
        for p in known:
            learner = acclimate.Learner(plan)
            for _ in range(epochs):
                learner.partial_fit(p.x, p.y, lr=lr)
            found.append(learner.score(p.x_val, p.y_val))
        return float(np.mean(found))

    return max(RATES, key=mean_accuracy)


def must(holds: bool, what: str) -> None:
    if not holds:
        raise AcclimateError("the story does not hold", where=what)


def right(board: Board, person: Person) -> float:
    return float(np.mean(board.predict(person.x_val).argmax(1) == person.y_val))


def learn(
    board: Board, person: Person, lr: float, losses: list[float], labels: np.ndarray | None = None
) -> None:
    """One pass over a person's windows, one step for each."""
    for i in range(len(person.x)):
        y = person.y if labels is None else labels
        losses.append(board.step(person.x[i : i + 1], y[i : i + 1], lr))


def machine_of(board: Board) -> UnicornMachine:
    line = board.link.line
    assert isinstance(line, UnicornMachine)
    return line


def cut_save(board: Board, operation: int, seed: int) -> bool:
    """Save, with the power cut in one of the flash's operations; whether the board did lose power."""
    machine_of(board).lose_power_in(operation, seed)
    try:
        board.save()
    except AcclimateError as error:
        must("restarted" in str(error), f"a cut in operation {operation}: {error}")
        board.connect()
        return True
    return False


def part_of_save(operation: int, erases: int, operations: int) -> str:
    """What a save was doing in its operation 1, 2, ...; see docs/format.md."""
    if operation <= erases:
        return "erasing"
    if operation <= erases + LINE_WORDS:
        return "header"
    return "delta" if operation <= operations - LINE_WORDS else "seal"


def all_cuts(
    firmware: Firmware,
    image: bytes,
    old: bytes,
    new: bytes,
    delta: bytes,
    size: tuple[int, int],
    quick: bool,
    seed: int,
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Cut the power in each operation of a save, on a board with the flash as it was before; what it starts with then.

    size: pages that are erased and all operations of that save.
    """
    erases, operations = size
    rng = np.random.default_rng(seed)
    points = range(1, operations + 1)
    if quick:  # each page, the ends of header, delta and seal, and some between them
        ends = (1, LINE_WORDS, LINE_WORDS + 1)
        worst = {
            *range(1, erases + 1),
            *(erases + e for e in ends),
            *(operations - k for k in range(LINE_WORDS + 2)),
        }
        points = sorted(worst | {int(k) for k in rng.integers(1, operations, 12)})
    rows = {
        part: {"part": part, "cuts": 0, "old": 0, "new": 0} for part in ("erasing", "header", "delta", "seal")
    }
    with trial.start(firmware) as board:
        for operation in points:
            if operation % 50 == 0:
                tell(f"power cut in operation {operation} of {operations}")
            machine_of(board).kept = image
            board.restart()
            must(board.state() == old, "a board starts with what was saved")
            board.load_delta(delta)
            must(
                cut_save(board, operation, int(rng.integers(1 << 60))),
                f"power is cut in operation {operation}",
            )
            found = board.state()
            must(
                found in (old, new),
                f"after a cut in operation {operation} the state is the old or the new one",
            )
            row = rows[part_of_save(operation, erases, operations)]
            row["cuts"] += 1
            row["old" if found == old else "new"] += 1
    return list(rows.values())


def run(data: Path, quick: bool, seed: int, tell: Callable[[str], None], folder: Path) -> dict[str, Any]:
    torch.manual_seed(seed)
    tell("training the float model on other people")
    int8, known, others, classes = people(data, quick, seed)
    epochs = 2 if quick else 4
    others = others[:2] if quick else others

    def plan_for(device: str) -> acclimate.Plan:
        options = dict(scheme="full", batch_size=1, gradients="int8", optimizer=acclimate.SGD(), seed=seed)
        return acclimate.plan(int8, device=device, **options)

    plan = plan_for(DEVICE)
    tell("choosing the learning rate on people who are known")
    lr = best_rate(plan, known[:3] if quick else known, epochs)
    tell("compiling the firmware")
    firmware = trial.firmware_of(plan, folder / "firmware")
    image = read_elf(firmware.elf, firmware.machine.flash, firmware.machine.ram)
    first, persons = others[0], []
    for person in others[1:]:
        tell(f"{person.name} on a board")
        with trial.start(firmware) as board:
            before = right(board, person)
            for _ in range(epochs):
                learn(board, person, lr, [])
            persons.append(
                {
                    "person": person.name,
                    "windows": len(person.x),
                    "before": before,
                    "after": right(board, person),
                    "kept_out": len(person.y_val),
                }
            )

    story = Story()
    board = trial.start(firmware)
    machine = machine_of(board)
    before_logits = board.predict(first.x_val)
    predicted = board.ticks
    before = float(np.mean(before_logits.argmax(1) == first.y_val))
    story.tell("as shipped", before, "int8, learned from other people's phones")
    board.paint()
    tell(f"{first.name} learns")
    learn(board, first, lr, story.losses)
    instructions, measured = board.ticks, board.measure()
    board.save()
    old, old_image = board.state(), machine.kept
    story.tell("one pass, saved", right(board, first), f"save {board.kept()['sequence']}", "saved")
    lost_from = len(story.losses)
    for _ in range(epochs - 1):
        learn(board, first, lr, story.losses)
    new, delta, after = board.state(), board.delta(), right(board, first)
    story.tell("learned on", after, "not saved yet")
    # The size of a save, from one on a board beside this one.
    with trial.start(firmware) as twin:
        machine_of(twin).kept = old_image
        twin.restart()
        twin.load_delta(delta)
        done, worn = machine_of(twin).flash_operations, int(machine_of(twin).erases.sum())
        twin.save()
        size = int(machine_of(twin).erases.sum()) - worn, machine_of(twin).flash_operations - done
    where = int(np.random.default_rng(seed).integers(size[0] + LINE_WORDS, size[1] - LINE_WORDS))
    must(cut_save(board, where, seed), "power is cut")
    must(board.state() == old, "the board has the state of the first save after a cut in the second")
    torn = [s.fault for s in store.read(machine.kept)]
    must("torn" in torn, "the slot that was being written is torn")
    story.tell(
        "power cut",
        right(board, first),
        f"in operation {where:,} of {size[1]:,} of the second save; the first is whole",
        "power cut",
    )
    relearned: list[float] = []
    for _ in range(epochs - 1):
        learn(board, first, lr, relearned)
    must(
        relearned == story.losses[lost_from:] and board.state() == new,
        "the lost steps, learned again, are the same",
    )
    story.losses += relearned
    board.save()
    story.tell(
        "learned again, saved",
        right(board, first),
        f"save {board.kept()['sequence']}, the same bits as before the cut",
        "saved; then wrong labels",
    )
    cuts = all_cuts(firmware, old_image, old, new, delta, size, quick, seed, tell)
    wrong = (first.y + 1) % len(classes)
    tell("a bad lesson, and back")
    learn(board, first, lr, story.losses, wrong)
    board.save()
    spoiled = right(board, first)
    story.tell("wrong labels, saved", spoiled, f"save {board.kept()['sequence']}")
    stack_bytes = max(measured.stack_bytes, board.measure().stack_bytes)
    board.rollback()
    after_logits = board.predict(first.x_val)
    restored = float(np.mean(after_logits.argmax(1) == first.y_val))
    must(board.state() == new and restored == after > spoiled, "a rollback brings back what was saved before")
    story.tell("rolled back", restored, f"to save {board.kept()['sequence']}, bit for bit")
    board.restart()
    must(board.state() == new, "what was rolled back stays so after a restart")
    persons.insert(
        0,
        {
            "person": first.name,
            "windows": len(first.x),
            "before": before,
            "after": after,
            "kept_out": len(first.y_val),
        },
    )
    kept, worn = board.kept(), machine.erases.tolist()

    tell("reading the flash in Python")
    dump = folder / "flash.bin"
    dump.write_bytes(machine.kept)
    slots = [
        {"slot": s.index, "sequence": s.sequence, "bytes": len(s.delta), "fault": s.fault or "whole"}
        for s in store.read(dump.read_bytes())
    ]
    places = []
    for kernels in ("plain", None):
        learner = acclimate.Learner(plan, **({"kernels": kernels} if kernels else {})).restore(dump)
        logits = learner.decision_function(_real(int8, first.x_val))
        same = logits.tobytes() == after_logits.tobytes()
        places.append(
            {"place": f"Python, {kernels or 'fastest'} kernels", "memory": "this computer", "same": same}
        )
    raw = store.newest(dump.read_bytes(), plan.model_hash)
    for cpu, device in dict(list(OTHERS.items())[: 1 if quick else None]).items():
        tell(f"the same delta on {cpu}")
        there = plan_for(device)
        with trial.start(trial.firmware_of(there, folder / cpu, cpu)) as other:
            fresh = other.predict(first.x_val).tobytes() == before_logits.tobytes()
            other.load_delta(raw)
            same = fresh and other.predict(first.x_val).tobytes() == after_logits.tobytes()
            places.append({"place": f"{cpu} ({other.link.name})", "memory": there.device.title, "same": same})
    must(all(p["same"] for p in places), "the same predictions, to the last bit, everywhere")

    by_class = []
    for k, name in enumerate(classes):
        mine = first.y_val == k
        if mine.any():
            share = [float(np.mean(z[mine].argmax(1) == k)) for z in (before_logits, after_logits)]
            by_class.append(
                {"class": name, "kept_out": int(mine.sum()), "before": share[0], "after": share[1]}
            )
    stack_room = image.symbols["ac_stack_top"][0] - image.symbols["ac_stack_bottom"][0]
    return {
        "kind": "board_story",
        "device": plan.device.title,
        "cpu": firmware.machine.cpu,
        "emulated": True,
        "seed": seed,
        "quick": quick,
        "lr": lr,
        "epochs": epochs,
        "person": first.name,
        "accuracy_before": before,
        "accuracy_after": after,
        "accuracy_spoiled": spoiled,
        "accuracy_rolled_back": restored,
        "persons": persons,
        "classes": by_class,
        "events": story.events,
        "losses": story.losses,
        "marks": [list(m) for m in story.marks],
        "power_cuts": cuts,
        "save_operations": size[1],
        "save_page_erases": size[0],
        "slots": slots,
        "sequence": kept["sequence"],
        "delta_bytes": len(raw),
        "erases_counted": kept["erases"],
        "erases_of_pages": worn,
        "same_predictions": places,
        "instructions_per_step": instructions,
        "instructions_per_prediction": predicted,
        "macs_per_step": plan.macs_per_step,
        "stack_bytes": stack_bytes,
        "stack_room_bytes": stack_room,
        "arena_bytes": measured.arena_bytes,
        "arena_planned_bytes": board.info.arena_bytes,
        "arena_room_bytes": board.info.arena_room,
        "state_bytes": board.info.state_bytes,
        "ram_bytes": image.ram_bytes,
        "ram_limit_bytes": firmware.ram_bytes,
        "flash_bytes": len(image.flash),
        "kept_bytes": firmware.kept_bytes,
        "program_bytes": board.info.program_bytes,
        "flash_limit_bytes": firmware.flash_bytes,
    }


def _real(model: acclimate.Graph, raw: np.ndarray) -> np.ndarray:
    """int8 samples as the numbers that they stand for, which a Learner quantises to the same ones."""
    quant = model.values[model.inputs["x"]].quant
    assert quant is not None
    return (raw.astype(np.float32) - quant.zero) * quant.scale[0]


def page(d: dict[str, Any]) -> Report:
    """The figures as one page."""
    share = lambda v: report.text(v, "share")  # noqa: E731
    cuts = sum(r["cuts"] for r in d["power_cuts"])
    facts = Facts(
        (
            (
                d["person"],
                f"{share(d['accuracy_before'])} \N{RIGHTWARDS ARROW} {share(d['accuracy_after'])}",
                "accuracy on windows kept out, predicted on the board",
            ),
            ("power cuts in a save", f"{cuts:,}", "each left the old state or the new one, whole"),
            (
                "wrong labels, rolled back",
                f"{share(d['accuracy_spoiled'])} \N{RIGHTWARDS ARROW} {share(d['accuracy_rolled_back'])}",
                "to the state before them, bit for bit",
            ),
            (
                "a step",
                f"{d['instructions_per_step']:,} instructions",
                "of one window; instructions are not cycles",
            ),
            ("a prediction", f"{d['instructions_per_prediction']:,} instructions", "of one window"),
            (
                "stack, arena",
                f"{d['stack_bytes']:,} and {d['arena_bytes']:,} bytes",
                f"painted; of {d['stack_room_bytes']:,} and {d['arena_planned_bytes']:,}",
            ),
            ("RAM", f"{d['ram_bytes']:,} bytes", f"of {d['ram_limit_bytes']:,}; nothing else is mapped"),
            (
                "flash",
                f"{d['flash_bytes']:,} bytes",
                f"of {d['flash_limit_bytes']:,}, and {d['kept_bytes']:,} for slots",
            ),
            (
                "wear",
                f"{d['erases_counted']} erases",
                f"of the most worn page, as the board counts; pages: "
                f"{', '.join(map(str, d['erases_of_pages']))}",
            ),
        )
    )
    shown = [e for e in d["events"] if e["accuracy"] is not None]
    stages = Bars(
        f"{d['person']}: accuracy as the story goes",
        tuple((e["event"], e["accuracy"]) for e in shown),
        d["accuracy_before"],
        shown[-1]["event"],
    )
    each = Bars(
        "People who took no part in training: before, and after",
        tuple(
            (f"{p['person']}{stage}", p[key])
            for p in d["persons"]
            for key, stage in (("before", ", before"), ("after", ""))
        ),
    )
    accuracy = (
        Column("kept_out", "kept out", "count"),
        Column("before", "before", "share"),
        Column("after", "after", "share"),
    )
    blocks = {
        "stack": d["stack_room_bytes"],
        "arena": d["arena_planned_bytes"],
        "room for a delta": d["arena_room_bytes"] - d["arena_planned_bytes"],
        "state": d["state_bytes"],
    }
    app = d["ram_bytes"] - sum(blocks.values())
    ram = Parts("RAM of the board", (*blocks.items(), ("app", app)), d["ram_limit_bytes"], "the board's RAM")
    flash = Parts(
        "Flash of the board",
        (
            ("code", d["flash_bytes"] - d["program_bytes"]),
            ("Program", d["program_bytes"]),
            ("slots", d["kept_bytes"]),
        ),
        d["flash_limit_bytes"],
        "the board's flash",
    )
    return Report(
        "One board's life",
        f"{d['device']}, emulated ({d['cpu']}): no real board took part",
        (
            Section(
                "",
                (
                    facts,
                    stages,
                    each,
                    Curve(
                        "Loss, step by step", tuple(d["losses"]), 1, tuple((int(s), w) for s, w in d["marks"])
                    ),
                ),
            ),
            Section(
                "What happened",
                (
                    Table(
                        "",
                        (
                            Column("event", "event"),
                            Column("steps", "steps", "count"),
                            Column("accuracy", "accuracy", "share"),
                            Column("remark", "remark", spare=1),
                        ),
                        tuple(d["events"]),
                    ),
                    Note(
                        f"A bare-metal int8 model and its int8 gradients, one window a step, learning rate {d['lr']:g}."
                    ),
                ),
            ),
            Section(
                "Who it was for",
                (
                    Table(
                        "People held out",
                        (Column("person", "person"), Column("windows", "learned from", "count"), *accuracy),
                        tuple(d["persons"]),
                    ),
                    Table(
                        f"Classes of {d['person']}",
                        (Column("class", "class"), *accuracy),
                        tuple(d["classes"]),
                    ),
                ),
            ),
            Section(
                "Power cuts",
                (
                    Table(
                        "Power cut in the second save, and what the board started with",
                        (
                            Column("part", "while writing"),
                            Column("cuts", "cuts", "count"),
                            Column("old", "old state", "count"),
                            Column("new", "new state", "count"),
                        ),
                        tuple(d["power_cuts"]),
                        caption=f"A save erases {d['save_page_erases']} pages and writes "
                        f"{d['save_operations'] - d['save_page_erases']:,} words; "
                        + (
                            "some of these operations, the worst among them."
                            if d["quick"]
                            else "every one of them was cut."
                        ),
                    ),
                    Table(
                        "Slots of the flash at the end",
                        (
                            Column("slot", "slot", "count"),
                            Column("sequence", "save", "count"),
                            Column("bytes", "delta", "bytes"),
                            Column("fault", "state"),
                        ),
                        tuple(d["slots"]),
                    ),
                ),
            ),
            Section(
                "The same everywhere",
                (
                    Table(
                        "What the board's flash gives elsewhere",
                        (
                            Column("place", "place"),
                            Column("memory", "memory"),
                            Column("same", "the same logits"),
                        ),
                        tuple({**p, "same": "yes" if p["same"] else "NO"} for p in d["same_predictions"]),
                    ),
                ),
            ),
            Section("Memory", (ram, flash)),
        ),
        d,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument(
        "--quick", action="store_true", help="two people, fewer passes, some of the power cuts"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the net, the orders, and the power cuts")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also as a page with pictures")
    args = parser.parse_args()
    data = Path(os.environ.get("ACCLIMATE_DATA", ""))
    if not (data / "har_spsw.npz").is_file():
        print("ACCLIMATE_DATA must name the folder that holds har_spsw.npz", file=sys.stderr)
        return 4
    with Console(stderr=True).status("") as status, tempfile.TemporaryDirectory() as scratch:
        figures = report.plain(run(data, args.quick, args.seed, status.update, Path(scratch)))
    if args.html:
        args.html.write_text(report_html.render(page(figures)), encoding="utf-8")
    if args.json:
        print(report.to_json(figures))
    else:
        report.print_report(page(figures), Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
