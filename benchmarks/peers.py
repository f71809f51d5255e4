#!/usr/bin/env python3
"""A whole training step (forward, loss, backward, update) here and in other software, side by side.

Each peer has a process of its own, and where versions clash a virtual environment of its own (`--setup` makes them).
All train the same net from the same weights on the same batch. After the first steps their losses must agree with
ours: a peer whose losses don't is shown, but not compared. Then the processes take turns, a few steps each, round
after round, on the same processors; times are medians over all steps, ratios are medians over rounds. On one thread
the clock is the processor's own, of all threads of the process: it equals the wall's where nothing else runs, and
does not favour short steps, which are interrupted less, where something does. On more threads it is the wall's, and
what was measured beside other work is worth nothing: `load` tells.

The input lies in the peer's own kind of array before the clock starts; ours is numpy's, and is checked and copied
in every step. Batch norm uses given statistics and its scale and bias learn, as on a device at batch 1.

`--save` merges what was measured into results/peers.json; `--docs` writes docs/benchmarks.md's table and pictures
from there. Exit status: 0 done, 2 wrong use, 1 where acclimate itself fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import select
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import figures
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BUILD = ROOT / "build" / "peers"
RESULTS = HERE / "results" / "peers.json"
DOCS = ROOT / "docs" / "benchmarks.md"

CHECKED_STEPS = 10  # whose losses must agree with ours
TOLERANCE = 5e-3  # of a loss, relative: float32 in another order, through ten steps
TURN_S = 0.08  # a turn takes about so long,
TURN_STEPS = (
    2,
    200,
)  # in so many steps; the first finds another worker's data in the caches and does not count
RATES = {"sgd": 0.05, "adamw": 0.003}
NETS = ("mlp", "lenet", "resnet26", "mobilenet", "dscnn", "ecg", "vit")
OURS = "acclimate"


@dataclass(frozen=True)
class Peer:
    """Where its code is, what it needs, and what it is told. `venv`: "" for the environment of this script."""

    file: str
    title: str
    venv: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    programs: tuple[str, ...] = ()  # that it calls, which must be on PATH
    package: str = ""  # whose version is told


PEERS = {
    OURS: Peer("with_acclimate.py", "acclimate", package="acclimate"),
    "torch": Peer("with_torch.py", "torch, eager", package="torch"),
    "torch-channels-last": Peer(
        "with_torch.py", "torch, channels last", options={"channels_last": True}, package="torch"
    ),
    "torch-compile": Peer(
        "with_torch.py", "torch.compile", options={"compile": True}, programs=("g++",), package="torch"
    ),
    "jax": Peer("with_jax.py", "JAX, jit", "jax", package="jax"),
    "jax-channels-last": Peer(
        "with_jax.py", "JAX, jit, channels last", "jax", {"channels_last": True}, package="jax"
    ),
    "onnxruntime": Peer(
        "with_onnxruntime.py", "ONNX Runtime training", "onnxruntime", package="onnxruntime-training"
    ),
    "executorch": Peer("with_executorch.py", "ExecuTorch training", "executorch", package="executorch"),
    "tinygrad": Peer("with_tinygrad.py", "tinygrad", "tinygrad", programs=("clang",), package="tinygrad"),
}

#: What pip installs into each environment.
REQUIREMENTS = {
    "jax": ("jax==0.10.2",),
    "onnxruntime": ("onnxruntime-training==1.19.2", "onnx==1.16.2", "numpy<2", "protobuf<5"),
    "executorch": ("executorch==1.5.1", "torch==2.13.0"),
    "tinygrad": ("tinygrad==0.14.0", "numpy"),
}

tell = Console(stderr=True)


# -- environments ----------------------------------------------------------------------------------------------------


def python_of(venv: str) -> Path:
    return Path(sys.executable) if not venv else BUILD / "venv" / venv / "bin" / "python"


def missing(peer: Peer) -> str:
    """Why a peer cannot run here, or ""."""
    if peer.venv and not (BUILD / "venv" / peer.venv / ".ready").exists():
        return "its environment is not set up (benchmarks/peers.py --setup)"
    absent = [p for p in peer.programs if shutil.which(p) is None]
    return f"{' and '.join(absent)} is not installed" if absent else ""


def setup(names: Iterable[str]) -> None:
    """Make the virtual environments; one that cannot be made is said, and left out."""
    for venv in sorted({PEERS[n].venv for n in names if PEERS[n].venv}):
        folder, wanted = BUILD / "venv" / venv, "\n".join(REQUIREMENTS[venv])
        ready = folder / ".ready"
        if ready.exists() and ready.read_text() == wanted:
            tell.print(f"{venv}: is there")
            continue
        tell.print(f"{venv}: installing {', '.join(REQUIREMENTS[venv])}", highlight=False)
        shutil.rmtree(folder, ignore_errors=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        for command in ([sys.executable, "-m", "venv", str(folder)], [*pip, *REQUIREMENTS[venv]]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                lines = [
                    line for line in done.stderr.splitlines() if "ERROR" in line
                ] or done.stderr.splitlines()
                tell.print(f"{venv}: left out: {' '.join(lines[:2])}", highlight=False)
                break
        else:
            ready.write_text(wanted)
    for name in names:
        if why := missing(PEERS[name]):
            tell.print(f"{name}: left out: {why}", highlight=False)


def version_of(name: str) -> str:
    """The version of a peer; of acclimate with the commit, where the source is under git."""
    if name == OURS:
        import acclimate

        done = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        return f"{acclimate.__version__} {done.stdout.strip()}".strip()
    peer = PEERS[name]
    code = f"from importlib import metadata; print(metadata.version({peer.package!r}))"
    done = subprocess.run([python_of(peer.venv), "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


# -- the machine -----------------------------------------------------------------------------------------------------


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def pinned(threads: int) -> list[int]:
    """The processors that every worker is held to."""
    free = sorted(os.sched_getaffinity(0))
    return free[:threads]


def peak_gflops(threads: int) -> tuple[float, str]:
    """(fused multiply-adds of float32 a second, twice, in 1e9, of all threads together; how it was measured)."""
    program, source = BUILD / "fma_peak", HERE / "peers" / "fma_peak.c"
    command = ["gcc", "-O3", "-march=native", "-pthread", str(source), "-o", str(program)]
    built = shutil.which("gcc") and subprocess.run(command, capture_output=True).returncode == 0
    hold = set(pinned(threads))
    if built:
        done = subprocess.run(
            [program, str(threads)],
            capture_output=True,
            text=True,
            check=True,
            preexec_fn=lambda: os.sched_setaffinity(0, hold),
        )
        return float(done.stdout), "a loop of fused multiply-adds, gcc -O3 -march=native"
    a = np.ones((1024, 1024), np.float32)  # no compiler: what a good matrix product reaches
    best = min(_timed(lambda: a @ a) for _ in range(5))
    return 2 * 1024**3 / best / 1e9, "numpy's matrix product (no gcc), with numpy's own threads"


def _timed(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# -- workers ---------------------------------------------------------------------------------------------------------


class Failed(Exception):
    """A peer cannot do this; the text says why."""


class Worker:
    """A peer's process, from its start to its end. `startup_s`: from the start of the process to its first loss."""

    def __init__(self, name: str, job: dict[str, Any], log: Path, limit_s: float) -> None:
        peer = PEERS[name]
        self.name, self.limit_s, self.log = name, limit_s, log
        threads = job["threads"]
        hold = set(pinned(threads))
        scratch = Path(job["folder"]) / f"{name}-cache"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "OPENBLAS_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "TORCHINDUCTOR_CACHE_DIR": str(scratch),  # start-up is without what an earlier run has compiled
            "XDG_CACHE_HOME": str(scratch),
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p.endswith("src")) if not peer.venv else "",
        }
        command = [str(python_of(peer.venv)), str(HERE / "peers" / peer.file)]
        described = json.dumps({**job, "options": peer.options})
        with log.open("w") as errors:
            try:
                ahead = subprocess.run(
                    [*command, "prepare", described],
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=environment,
                    text=True,
                    timeout=limit_s,
                )
            except subprocess.TimeoutExpired:
                raise Failed(f"took more than {limit_s:.0f} s ahead of time") from None
            self._message(ahead.stdout)
            start = time.perf_counter()
            self.process = subprocess.Popen(
                [*command, described],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                text=True,
                preexec_fn=lambda: os.sched_setaffinity(0, hold),
            )
        try:
            first = self._read()
        except Failed:
            self.kill()
            raise
        self.startup_s = time.perf_counter() - start
        self.losses, self.facts = [first["first_loss"]], first["facts"]

    def _message(self, line: str) -> dict[str, Any]:
        try:
            message = json.loads(line.strip().splitlines()[-1])
        except (IndexError, json.JSONDecodeError):
            raise Failed(f"its process ended without an answer, see {self.log}") from None
        if "error" in message:
            raise Failed(message["error"])
        return message

    def _read(self) -> dict[str, Any]:
        ready, _, _ = select.select([self.process.stdout], [], [], self.limit_s)
        if not ready:
            raise Failed(f"no answer after {self.limit_s:.0f} s")
        return self._message(self.process.stdout.readline())

    def ask(self, **request: Any) -> dict[str, Any]:
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return self._read()
        except BrokenPipeError:
            raise Failed(f"its process ended, see {self.log}") from None

    def steps(self, count: int) -> dict[str, list[float]]:
        """Seconds of `count` steps by clock, "wall" and "processor"; the losses are kept."""
        answer = self.ask(steps=count)
        self.losses += answer.pop("losses")
        return answer

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


# -- one comparison --------------------------------------------------------------------------------------------------


def write_data(net_name: str, batch: int, scheme: str) -> tuple[Path, str, list[str]]:
    """(folder with the batch and the weights, the loss, names of what learns)."""
    import torch
    from nets import NETS as nets

    net = nets[net_name]
    with torch.no_grad():
        module = net.module()
        parameters = {k: v.numpy() for k, v in module.named_parameters()}
        kept = {k: v.numpy() for k, v in module.named_buffers() if not k.endswith("num_batches_tracked")}
    x, y = net.batch(batch)
    folder = BUILD / "jobs" / f"{net_name}-{batch}-{scheme}"
    folder.mkdir(parents=True, exist_ok=True)
    named = {**{f"p:{k}": v for k, v in parameters.items()}, **{f"s:{k}": v for k, v in kept.items()}}
    np.savez(folder / "data.npz", x=x, y=y, **named)
    learn = list(parameters)
    return folder, net.loss, learn if scheme == "full" else learn[-2:]


def differs(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest relative difference of the first losses."""
    pairs = zip(ours[:CHECKED_STEPS], theirs[:CHECKED_STEPS], strict=True)
    return max(abs(b - a) / max(abs(a), 1e-3) if np.isfinite(b) else np.inf for a, b in pairs)


def compare(
    net: str, batch: int, threads: int, names: Sequence[str], args: argparse.Namespace, advance: Any
) -> list[dict[str, Any]]:
    """A row a peer. Ours is first; without it there is nothing to compare with, and Failed is raised."""
    folder, loss, learn = write_data(net, batch, args.scheme)
    job = {
        "net": net,
        "loss": loss,
        "batch": batch,
        "threads": threads,
        "optimizer": args.optimizer,
        "lr": RATES[args.optimizer],
        "learn": learn,
        "folder": str(folder),
    }
    key = {"net": net, "batch": batch, "threads": threads, "scheme": args.scheme, "optimizer": args.optimizer}
    workers: dict[str, Worker] = {}
    rows: dict[str, dict[str, Any]] = {}
    logs = BUILD / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    try:
        for name in names:
            advance(f"{net}, batch {batch}, {threads} thread{'s' * (threads > 1)}: starting {name}", 0)
            rows[name] = {**key, "peer": name}
            try:
                log = logs / f"{net}-{batch}-{threads}-{name}.txt"
                workers[name] = worker = Worker(name, job, log, args.limit)
                worker.steps(CHECKED_STEPS - 1)
                rows[name]["startup_s"] = worker.startup_s
                rows[name]["loss_difference"] = differs(workers[OURS].losses, worker.losses)
            except Failed as failure:
                if name == OURS:
                    raise
                rows[name]["error"] = str(failure)
                if name in workers:
                    workers.pop(name).kill()
            advance("", 1)
        ours = workers[OURS].losses
        moved = abs(ours[CHECKED_STEPS - 1] - ours[0]) / abs(ours[0])
        if moved < 4 * TOLERANCE:
            raise Failed(f"the loss moved by {moved:.1%} only: whether peers agree could not be seen")
        peak, how = peak_gflops(threads)
        times = measure(workers, args.repeats, lambda text: advance(text, 0))
        clock = "processor" if threads == 1 else "wall"
        peak = max(peak, peak_gflops(threads)[0])
        macs = workers[OURS].facts["macs_per_step"]
        for name, worker in workers.items():
            row = rows[name]
            step_s = _median(times[name], clock)
            pairs = zip(times[OURS], times[name], strict=True)
            ratios = [statistics.median(b[clock]) / statistics.median(a[clock]) for a, b in pairs]
            row |= {
                "step_ms": 1e3 * step_s,
                "clock": clock,
                "wall_ms": 1e3 * _median(times[name], "wall"),
                "processor_ms": 1e3 * _median(times[name], "processor"),
                "steps_timed": sum(len(turn[clock]) for turn in times[name]),
                "over_acclimate": statistics.median(ratios),
                "over_acclimate_quartiles": [float(q) for q in np.quantile(ratios, (0.25, 0.75))],
                "gflops": 2 * macs / step_s / 1e9,
                "peak_gflops": peak,
                "peak_measured_by": how,
                "share_of_peak": 2 * macs / step_s / 1e9 / peak,
                "agrees": bool(row["loss_difference"] <= TOLERANCE and np.isfinite(worker.losses).all()),
                "peak_resident_mib": worker.ask(end=1)["peak_resident_kib"] / 1024,
                **worker.facts,
            }
            row.setdefault("macs_per_step", macs)
    finally:
        for worker in workers.values():
            worker.kill()
    return list(rows.values())


def measure(workers: dict[str, Worker], rounds: int, say: Any) -> dict[str, list[dict[str, list[float]]]]:
    """For each peer a turn a round: the seconds of its counted steps by clock."""
    count = {}
    for name, worker in workers.items():
        typical = statistics.median(worker.steps(3)["processor"])
        count[name] = 1 + int(np.clip(TURN_S / typical, *TURN_STEPS))
    turns: dict[str, list[dict[str, list[float]]]] = {name: [] for name in workers}
    order = list(workers)
    for r in range(rounds):
        say(f"round {r + 1} of {rounds}")
        for name in order[r % len(order) :] + order[: r % len(order)]:
            turns[name].append({clock: t[1:] for clock, t in workers[name].steps(count[name]).items()})
    return turns


def _median(turns: list[dict[str, list[float]]], clock: str) -> float:
    return statistics.median(t for turn in turns for t in turn[clock])


# -- results ---------------------------------------------------------------------------------------------------------

KEY = ("net", "batch", "threads", "scheme", "optimizer", "peer")


def merge(rows: list[dict[str, Any]], path: Path) -> None:
    """Put rows into the stored ones, in place of those of the same net, batch, threads, scheme, optimiser and peer."""
    stored = json.loads(path.read_text())["rows"] if path.exists() else []
    found = {tuple(r[k] for k in KEY): r for r in [*stored, *rows]}
    path.parent.mkdir(exist_ok=True)
    ordered = [found[k] for k in sorted(found, key=_place)]
    path.write_text(json.dumps({"rows": ordered}, indent=1) + "\n")


def _place(key: tuple[Any, ...]) -> tuple[Any, ...]:
    net, batch, threads, scheme, optimizer, peer = key
    rank = list(PEERS).index(peer) if peer in PEERS else len(PEERS)
    return (NETS.index(net) if net in NETS else len(NETS), net, threads, scheme, optimizer, batch, rank)


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="a training step")
    for head in ("net", "batch", "threads", "peer"):
        table.add_column(head)
    for head in ("ms", "peer / ours", "of peak", "start-up s", "resident MiB", "loss differs"):
        table.add_column(head, justify="right")
    for r in rows:
        at = (r["net"], str(r["batch"]), str(r["threads"]), r["peer"])
        if "error" in r:
            table.add_row(*at, f"[red]{r['error'][:70]}", *[""] * 5)
            continue
        ratio = f"{r['over_acclimate']:.2f}" if r["agrees"] else "[red]other losses"
        table.add_row(
            *at,
            f"{r['step_ms']:.3f}",
            ratio,
            f"{r['share_of_peak']:.1%}",
            f"{r['startup_s']:.1f}",
            f"{r['peak_resident_mib']:.0f}",
            f"{r['loss_difference']:.0e}",
        )
    console.print(table)


def docs(path: Path) -> None:
    """Tables and pictures of the stored results, into docs/."""
    rows = json.loads(path.read_text())["rows"]
    DOCS.write_text(figures.between(DOCS.read_text(), "peers", "\n".join(markdown(rows))))
    for threads in sorted({r["threads"] for r in rows}):
        mine = [
            r for r in rows if r["threads"] == threads and r["scheme"] == "full" and r["optimizer"] == "sgd"
        ]
        (DOCS.parent / f"peers-{threads}.svg").write_text(picture(mine, threads))


def _compared(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in rows if r.get("agrees")]


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """Times, start-up and memory, what was not compared, and where all that was measured."""
    out: list[str] = []
    for group in sorted({(r["threads"], r["scheme"], r["optimizer"]) for r in rows}):
        mine = [r for r in rows if (r["threads"], r["scheme"], r["optimizer"]) == group]
        out += [*_times(mine, *group), ""]
        if group[1:] == ("full", "sgd"):
            out += [f"![Share of the peak, by net and batch](peers-{group[0]}.svg)", ""]
    out += [
        "Start-up to the first finished step, s, and peak resident memory, MiB, at batch 1 on one thread:",
        "",
    ]
    first = [
        r for r in rows if (r["batch"], r["threads"], r["scheme"]) == (1, 1, "full") and "error" not in r
    ]
    nets = list(dict.fromkeys(r["net"] for r in first))
    out += ["| | " + " | ".join(nets) + " |", "|---|" + "---|" * len(nets)]
    for p in PEERS:
        at = {r["net"]: r for r in first if r["peer"] == p}
        cells = [
            f"{at[n]['startup_s']:.1f}, {at[n]['peak_resident_mib']:.0f}" if n in at else "" for n in nets
        ]
        if at:
            out.append(f"| {PEERS[p].title} | " + " | ".join(cells) + " |")
    reasons: dict[tuple[str, str], dict[str, None]] = {}
    for r in rows:
        if not r.get("agrees") and "layout" not in r.get("error", ""):  # a net without channels is no failure
            why = r.get("error") or f"its losses differ from ours by {r['loss_difference']:.0%}"
            reasons.setdefault((r["peer"], why), {})[f"{r['net']} at batch {r['batch']}"] = None
    if reasons:
        out += ["", "Not compared:", ""]
        out += [f"- {PEERS[p].title}, {', '.join(at)}: {why}" for (p, why), at in reasons.items()]
    return [*out, "", *_circumstances(rows)]


def _times(rows: list[dict[str, Any]], threads: int, scheme: str, optimizer: str) -> list[str]:
    """A peer's time over ours and its share of the peak, a line for each net and batch."""
    present = [p for p in PEERS if p != OURS and any(r["peer"] == p for r in rows)]
    what = {"full": "everything learns", "last": "the last layer learns"}[scheme]
    out = [
        f"**{threads} thread{'s' * (threads > 1)}, {what}, {optimizer.upper()}.** A peer's time over ours, "
        "and its share of the peak:",
        "",
        "| net | batch | ours, ms | share | " + " | ".join(PEERS[p].title for p in present) + " |",
        "|---|---|---|---|" + "---|" * len(present),
    ]
    for net, batch in dict.fromkeys((r["net"], r["batch"]) for r in rows):
        at = {r["peer"]: r for r in rows if (r["net"], r["batch"]) == (net, batch)}
        if OURS in at:
            ours = f"{at[OURS]['step_ms']:.3g} | {_share(at[OURS])}"
            out.append(
                f"| {net} | {batch} | {ours} | " + " | ".join(_cell(at.get(p)) for p in present) + " |"
            )
    return out


def _cell(row: dict[str, Any] | None) -> str:
    if row is None or "layout" in row.get("error", ""):
        return ""
    if "error" in row:
        return "fails"
    return f"{row['over_acclimate']:.2f} ({_share(row)})" if row["agrees"] else "other losses"


def _share(row: dict[str, Any]) -> str:
    return f"{row['share_of_peak']:.{0 if row['share_of_peak'] >= 0.1 else 1}%}"


def _circumstances(rows: list[dict[str, Any]]) -> list[str]:
    """When, where and with what; how busy the machine was."""

    def listed(values: Iterable[str]) -> str:
        return ", ".join(dict.fromkeys(values))

    peaks = {}
    for r in rows:
        if "peak_gflops" in r:
            peaks[r["threads"]] = max(peaks.get(r["threads"], 0), r["peak_gflops"])
    loads = [r["load"] for r in rows]
    return [
        f"Measured {listed(sorted(r['date'] for r in rows))} on {listed(r['processor'] for r in rows)}. "
        f"Peak: {', '.join(f'{v:.0f} GFLOP/s on {t} thread' + 's' * (t > 1) for t, v in sorted(peaks.items()))}. "
        f"Processes that were running before it began: {min(loads):.1f} to {max(loads):.1f} (times on more than one "
        "thread mean something only where that is near zero). "
        f"Versions: {listed(sorted(PEERS[r['peer']].package + ' ' + r['version'] for r in rows))}."
    ]


def picture(rows: list[dict[str, Any]], threads: int) -> str:
    """Share of the machine's peak, a group of bars for each net and batch."""
    compared = _compared(rows)
    names = [p for p in PEERS if any(r["peer"] == p for r in compared)]
    groups = []
    for net, batch in dict.fromkeys((r["net"], r["batch"]) for r in compared):
        at = {r["peer"]: r for r in compared if (r["net"], r["batch"]) == (net, batch)}
        groups.append((f"{net}, {batch}", [at[p]["share_of_peak"] if p in at else None for p in names]))
    title = f"A training step: share of the peak of {threads} thread{'s' * (threads > 1)}, by net and batch"
    return figures.bars(
        title, [PEERS[p].title for p in names], groups, "share of the measured peak", percent=True
    )


# -- the command -----------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--net", action="append", choices=NETS, help="one or more times; default: all")
    parser.add_argument("--batch", action="append", type=int, help="default: 1, 8 and 32")
    parser.add_argument(
        "--peer", action="append", choices=list(PEERS), help="default: all; acclimate always runs"
    )
    parser.add_argument("--threads", action="append", type=int, help="default: 1 and 2")
    parser.add_argument("--scheme", choices=("full", "last"), default="full", help="what learns")
    parser.add_argument("--optimizer", choices=tuple(RATES), default="sgd")
    parser.add_argument("--repeats", type=int, default=15, help="rounds (15)")
    parser.add_argument(
        "--limit", type=float, default=600, help="seconds a peer may take for its first step (600)"
    )
    parser.add_argument("--setup", action="store_true", help="make the peers' environments, and end")
    parser.add_argument("--save", action="store_true", help=f"merge into {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--docs", action="store_true", help="write the docs from the stored results, and end")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    names = [n for n in PEERS if not args.peer or n in args.peer or n == OURS]
    if args.setup:
        setup(names)
        return 0
    if args.docs:
        docs(RESULTS)
        return 0
    usable = len(os.sched_getaffinity(0))
    threads = args.threads or [t for t in (1, 2) if t <= usable]
    if min([*threads, args.repeats, *(args.batch or [1])]) < 1 or max(threads) > usable:
        parser.error(f"batches, threads and repeats are whole numbers from 1; there are {usable} processors")
    for name in [n for n in names if missing(PEERS[n])]:
        tell.print(f"{name}: left out: {missing(PEERS[name])}", highlight=False)
        names.remove(name)
    about = {
        "date": date.today().isoformat(),
        "processor": processor(),
        "load": os.getloadavg()[0],
    }
    if about["load"] > 0.5 and max(threads) > 1:
        tell.print(
            f"other work is running (load {about['load']:.1f}): times on several threads will mean little"
        )
    versions = {n: version_of(n) for n in names}
    tasks = [(n, b, t) for n in args.net or NETS for b in args.batch or (1, 8, 32) for t in threads]
    rows: list[dict[str, Any]] = []
    status = 0
    bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bars, console=tell) as progress:
        shown = progress.add_task("", total=len(tasks) * len(names))

        def advance(text: str, by: int) -> None:
            progress.update(shown, advance=by, **({"description": text} if text else {}))

        for net, batch, count in tasks:
            try:
                new = compare(net, batch, count, names, args, advance)
            except Failed as failure:
                tell.print(f"{net}, batch {batch}, {count} threads: {failure}", highlight=False)
                status = 1
                continue
            new = [{**r, **about, "version": versions[r["peer"]]} for r in new]
            rows += new
            if args.save:
                merge(new, RESULTS)
    if args.json:
        print(json.dumps({"rows": rows}))
    else:
        show(rows, Console(width=None if sys.stdout.isatty() else 140))
    return status


if __name__ == "__main__":
    sys.exit(main())
