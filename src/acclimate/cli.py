"""The command line. Thin: it reads arguments, shows progress, and prints what adapt.py and demo.py give.

Results go to stdout, as a page or (--json) as exactly one JSON object; progress and errors go to stderr.
Exit codes: 0 done, 2 wrong use, 3 cannot fit, 4 bad input, 5 refused by the guard, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from .errors import AcclimateError, BadInput, WrongUse, missing_extra

try:
    import click
    import typer
    from rich.console import Console
except ImportError as error:
    print(f"acclimate: {missing_extra(str(error.name), 'cli')}", file=sys.stderr)
    raise SystemExit(WrongUse.exit_code) from None

from . import __version__, report

STOPPED = 130  # as shells have it for Ctrl-C
#: As datasheets of microcontrollers have it, a KB of memory is 1024 bytes, like a KiB.
MEMORY_UNITS = {"": 1, "b": 1} | {
    letter + end: 1 << 10 * power for power, letter in enumerate("kmg", 1) for end in ("", "b", "ib")
}

app = typer.Typer(
    name="acclimate",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Makes a trained model learn on the device it runs on, inside a memory budget known to the byte.",
)


# -- what several verbs take --------------------------------------------------------------------------


def memory_bytes(words: str) -> int:
    """Bytes from 96KB, 96KiB, 1MB, 0.5MB or 131072; a KB and a KiB are both 1024 bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", words.lower())
    size = float(match[1]) * MEMORY_UNITS.get(match[2], 0) if match else 0
    if not 1 <= size < 2**53:
        raise WrongUse(
            "--memory is not an amount of memory",
            number=repr(words),
            action="such as 96KB, 1MB or 131072 (bytes)",
        )
    return int(size)


def _numbers(words: str | None, option: str) -> list[float] | None:
    """One number, or one a channel: 0.5 or 0.485,0.456,0.406."""
    if words is None:
        return None
    try:
        return [float(word) for word in words.split(",")]
    except ValueError:
        raise WrongUse(
            f"{option} takes a number, or one a channel", number=repr(words), action=f"{option} 0.5,0.5,0.5"
        ) from None


Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="The model: an .onnx, .pt2 or .npz file.", show_default=False)
]
Data = Annotated[
    Path,
    typer.Option(
        "--data",
        metavar="FILE",
        help="Labelled data: .npz with x and y, .csv, or a folder with one sub-folder of images a class.",
        show_default=False,
    ),
]
MaybeData = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="FILE",
        help="Labelled data, on which --scheme auto holds a race.",
        show_default=False,
    ),
]
DeviceName = Annotated[
    str, typer.Option("--device", metavar="NAME", help="Where it will learn; `acclimate devices` lists them.")
]
Scheme = Annotated[
    str,
    typer.Option(
        "--scheme",
        metavar="S",
        help="What learns: auto, full, last, last-3, bias, norm, block:NAME,... or match:PATTERN,...",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="A limit on peak RAM below the device's own, such as 96KB (1024 bytes each) or 131072.",
        show_default=False,
    ),
]
Batch = Annotated[int, typer.Option("--batch", metavar="N", help="Samples a training step.")]
Recompute = Annotated[
    str,
    typer.Option(
        "--recompute",
        metavar="R",
        help="What runs again instead of being kept: auto (where it does not fit otherwise), none, exact, or VALUE,...",
    ),
]
MicroBatches = Annotated[
    int | None,
    typer.Option(
        "--micro-batches",
        metavar="N",
        help="Parts that a batch is learned in; by default as many as it takes to fit.",
        show_default=False,
    ),
]
Gradients = Annotated[
    str,
    typer.Option(
        "--gradients",
        metavar="G",
        help="What flows back through the layers of an int8 model: float32, or int16 or int8 in blocks.",
    ),
]
Loss = Annotated[
    str | None,
    typer.Option(
        "--loss",
        metavar="L",
        help="cross_entropy, binary_cross_entropy or mse; by default what suits the labels.",
        show_default=False,
    ),
]
OptimizerName = Annotated[str, typer.Option("--optimizer", metavar="O", help="sgd, momentum, adam or adamw.")]
Rate = Annotated[
    float | None,
    typer.Option(
        "--lr",
        metavar="RATE",
        help="Learning rate; without it adapt tries three around the optimizer's own.",
        show_default=False,
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(
        "--mean",
        metavar="M",
        help="For uint8 images: (x / 255 - mean) / std, a number or one a channel.",
        show_default=False,
    ),
]
Std = Annotated[str | None, typer.Option("--std", metavar="S", help="See --mean.", show_default=False)]
Label = Annotated[str, typer.Option("--label", metavar="COLUMN", help="The label column of a CSV file.")]
Resize = Annotated[bool, typer.Option("--resize", help="Bring images to the model's size.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of everything random.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a page.")]


def _model(path: Path) -> Any:
    from .frontend import load

    if not path.exists():
        raise BadInput("there is no such model file", where=str(path), action="check the path")
    return load(path)


def _dataset(
    path: Path, model: Any, seed: int, label: str, mean: str | None, std: str | None, resize: bool
) -> Any:
    from . import data

    return data.load(
        path,
        [int(s) for s in model.shape(model.inputs["x"])[1:]],
        label,
        _numbers(mean, "--mean"),
        _numbers(std, "--std"),
        seed,
        resize,
    )


# -- showing ------------------------------------------------------------------------------------------


def _stderr() -> Console:
    return Console(stderr=True)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int, str], None]]:
    """A bar a stage on stderr; yields what is told of progress."""
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:>6}"),
        BarColumn(30),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[remark]}"),
    )
    with Progress(*columns, console=_stderr()) as bars:
        tasks: dict[str, Any] = {}

        def tell(stage: str, done: int, total: int, remark: str) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, remark="")
            bars.update(tasks[stage], completed=done, total=total, remark=escape(remark))

        yield tell


#: Figures that fill pages; they stand in run.json, not on stdout.
BULK = ("plan", "loss_history", "loss_every", "epoch_rows")


def _show(figures: Mapping[str, Any], as_json: bool, error: AcclimateError | None = None) -> None:
    """Print a verb's result, and with it the error that it ended in."""
    if as_json:
        kept = {
            k: v
            for k, v in figures.items()
            if figures["kind"] not in ("adapt", "plan", "demo") or k not in BULK
        }
        print(report.to_json(kept | ({} if error is None else _described(error))))
    else:
        report.print_report(report.report_of(report.plain(figures)), Console())
    if error is not None:
        _complain(error)
        raise typer.Exit(error.exit_code)


def _described(error: AcclimateError) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "type": type(error).__name__,
        "what": error.what,
        "where": error.where,
        "number": error.number,
        "action": error.action,
    }
    for name in ("fixes", "nodes"):
        if getattr(error, name, ()):
            fields[name] = list(getattr(error, name))
    return {"error": fields, "exit_code": error.exit_code}


def _complain(error: AcclimateError) -> None:
    """What, where, the number and the next action, as one block on stderr."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 1))
    for head, words, style in (
        ("error", error.what, "bold red"),
        ("where", error.where, ""),
        ("number", error.number, ""),
        ("next", error.action, "bold"),
    ):
        if words:
            grid.add_row(report.terminal_text(head, "dim"), report.terminal_text(words, style))
    for node in getattr(error, "nodes", ()):
        grid.add_row("", report.terminal_text(str(node)))
    _stderr().print(grid)


# -- the verbs ----------------------------------------------------------------------------------------


@app.command(epilog="Example:  acclimate demo --device stm32f4")
def demo(
    device: DeviceName = "nano33ble",
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the report goes.")] = Path(
        "acclimate-demo"
    ),
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """The main job on embedded data, in under a minute.

    A network trained on handwritten digits meets three drifts, and adapts to each on a small board.
    """
    from .adapt import write_run
    from .demo import demo as run

    with _progress() as tell:
        figures = run(device, seed, tell)
    figures["report"] = str(write_run(figures, out))
    _show(figures, as_json)
    _point_at(figures, as_json)


def _point_at(figures: Mapping[str, Any], as_json: bool) -> None:
    if not as_json:
        _stderr().print(f"report: {figures['report']}", markup=False, highlight=False, soft_wrap=True)


@app.command(epilog="Example:  acclimate inspect model.onnx --device nano33ble")
def inspect(model: Model, device: DeviceName = "nano33ble", seed: Seed = 0, as_json: AsJson = False) -> None:
    """Layers of a model, and what learning takes.

    MODEL is an .onnx, .pt2 or .npz file. Weights and MACs of each layer, and the memory of each scheme at batch
    1, exact to the byte.
    """
    from .adapt import inspect as run

    graph = _model(model)
    with _progress() as tell:
        figures = run(graph, model.stem, device, tell)
    _show(figures, as_json)


@app.command(epilog="Example:  acclimate plan model.onnx --device nano33ble --memory 96KB")
def plan(
    model: Model,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="NAME",
            help="Where it will learn; `acclimate devices` lists them.",
            show_default=False,
        ),
    ],
    data: MaybeData = None,
    scheme: Scheme = "auto",
    memory: Memory = None,
    batch: Batch = 1,
    recompute: Recompute = "auto",
    micro_batches: MicroBatches = None,
    gradients: Gradients = "float32",
    curve: Annotated[
        bool, typer.Option("--curve", help="Also bytes against time, as memory shrinks.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FOLDER", help="Also write run.json and report.html.", show_default=False
        ),
    ] = None,
    loss: Loss = None,
    optimizer: OptimizerName = "sgd",
    lr: Rate = None,
    mean: Mean = None,
    std: Std = None,
    label: Label = "label",
    resize: Resize = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Will it fit? Every scheme, exact to the byte.

    MODEL is an .onnx, .pt2 or .npz file. Where it cannot fit, the cheapest changes that do, and exit code 3.
    """
    from .adapt import will_it_fit, write_run
    from .planner import RECOMPUTE

    limit = None if memory is None else memory_bytes(memory)
    graph = _model(model)
    dataset = None if data is None else _dataset(data, graph, seed, label, mean, std, resize)
    with _progress() as tell:
        figures, error = will_it_fit(
            graph,
            model.stem,
            device,
            scheme,
            dataset,
            limit,
            loss,
            optimizer,
            lr,
            batch,
            seed,
            tell,
            recompute if recompute in RECOMPUTE else [name.strip() for name in recompute.split(",")],
            micro_batches,
            curve,
            gradients,
        )
    if out is not None:
        figures["report"] = str(write_run(figures, out))
        _point_at(figures, as_json)
    _show(figures, as_json, error)


@app.command(
    epilog="Example:  acclimate export model.onnx --target cortex-m4 --device nano33ble --scheme last"
)
def export(
    model: Model,
    target: Annotated[
        str,
        typer.Option(
            "--target",
            metavar="T",
            help="cortex-m0plus, -m4, -m7, -m33, -m55, riscv32, esp32, arduino, zephyr or linux.",
            show_default=False,
        ),
    ],
    device: DeviceName = "host",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FOLDER",
            help="Where the project goes; by default MODEL-TARGET.",
            show_default=False,
        ),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            "--mode",
            metavar="M",
            help="interpreter, which can be sent other Programs, or unrolled: only the kernels that this one needs.",
        ),
    ] = "interpreter",
    room_for: Annotated[
        list[str] | None,
        typer.Option(
            "--room-for",
            metavar="SCHEME",
            help="Set memory aside for this scheme's Program too, to be sent later; may be given again.",
            show_default=False,
        ),
    ] = None,
    data: MaybeData = None,
    scheme: Scheme = "auto",
    memory: Memory = None,
    batch: Batch = 1,
    recompute: Recompute = "auto",
    micro_batches: MicroBatches = None,
    gradients: Gradients = "float32",
    loss: Loss = None,
    optimizer: OptimizerName = "sgd",
    lr: Rate = None,
    mean: Mean = None,
    std: Std = None,
    label: Label = "label",
    resize: Resize = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Write a C project that learns on a board.

    MODEL is an .onnx or .pt2 file. The runtime, the Program in flash, memory blocks of its exact sizes, and an app that
    learns from samples over a serial line. Where it cannot fit the device: exit code 3.
    """
    from .adapt import plan_of
    from .firmware.export import check, figures
    from .firmware.export import export as write
    from .planner import RECOMPUTE

    check(target, mode)
    limit = None if memory is None else memory_bytes(memory)
    graph = _model(model)
    dataset = None if data is None else _dataset(data, graph, seed, label, mean, std, resize)
    ways = recompute if recompute in RECOMPUTE else [name.strip() for name in recompute.split(",")]
    with _progress() as tell:
        plans = [
            plan_of(
                graph,
                device,
                s,
                dataset,
                limit,
                loss,
                optimizer,
                lr,
                batch,
                seed,
                tell,
                ways,
                micro_batches,
                gradients,
            )
            for s in (scheme, *(room_for or ()))
        ]
        project = write(plans[0], out or Path(f"{model.stem}-{target}"), target, mode, plans[1:])
    _show(figures(project, plans[0], model.stem), as_json)


@app.command(epilog="Example:  acclimate adapt model.onnx --data mine.npz --device nano33ble --memory 96KB")
def adapt(
    model: Model,
    data: Data,
    device: DeviceName = "host",
    scheme: Scheme = "auto",
    memory: Memory = None,
    epochs: Annotated[int, typer.Option("--epochs", metavar="N", help="Passes over the data.")] = 10,
    lr: Rate = None,
    batch: Batch = 1,
    optimizer: OptimizerName = "sgd",
    loss: Loss = None,
    mean: Mean = None,
    std: Std = None,
    label: Label = "label",
    resize: Resize = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="RUN",
            help="Folder of the run, or the .acu file to write; by default MODEL-run.",
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Learn from data; keep it if held-out samples agree.

    MODEL is an .onnx, .pt2 or .npz file. Chooses what learns, learns, and saves the update (update.acu), run.json and
    report.html. Ctrl-C stops it with the best so far. Where held-out samples get worse nothing is saved, and
    the exit code is 5.
    """
    from .adapt import adapt as run

    limit = None if memory is None else memory_bytes(memory)
    graph = _model(model)
    dataset = _dataset(data, graph, seed, label, mean, std, resize)
    with _progress() as tell:
        outcome = run(
            graph,
            dataset,
            out or Path(f"{model.stem}-run"),
            model.stem,
            device,
            scheme,
            limit,
            loss,
            optimizer,
            lr,
            batch,
            epochs,
            seed,
            tell,
        )
    if outcome.refusal is None:
        _show(outcome.figures, as_json)
        _point_at(outcome.figures, as_json)
    elif as_json:
        _show(outcome.figures, True, outcome.refusal)
    else:
        raise outcome.refusal


@app.command(epilog="Example:  acclimate evaluate model.onnx --update model-run/update.acu --data mine.npz")
def evaluate(
    model: Model,
    data: Data,
    update: Annotated[
        Path | None,
        typer.Option(
            "--update",
            metavar="FILE",
            help="What was learned: an .acu file, or the raw flash in which a board keeps it.",
            show_default=False,
        ),
    ] = None,
    loss: Loss = None,
    mean: Mean = None,
    std: Std = None,
    label: Label = "label",
    resize: Resize = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Accuracy and loss, with or without an update.

    MODEL is an .onnx, .pt2 or .npz file. On x_val and y_val where the data has them, else on all of it.
    """
    from .adapt import evaluate as run

    graph = _model(model)
    _show(
        run(graph, _dataset(data, graph, seed, label, mean, std, resize), model.stem, update, loss), as_json
    )


@app.command(
    epilog="Example:  acclimate quantize model.onnx --data mine.npz --out model-int8.npz --method percentile"
)
def quantize(
    model: Model,
    data: Data,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="The int8 graph; by default MODEL-int8.npz.", show_default=False
        ),
    ] = None,
    method: Annotated[
        str, typer.Option("--method", metavar="M", help="How ranges are chosen: minmax, percentile or mse.")
    ] = "minmax",
    samples: Annotated[int, typer.Option("--samples", metavar="N", help="Calibrate on so many.")] = 256,
    keep_float: Annotated[
        str,
        typer.Option(
            "--keep-float", metavar="LAYER,...", help="Layers that stay in float.", show_default=False
        ),
    ] = "",
    per_tensor: Annotated[
        bool, typer.Option("--per-tensor", help="One weight scale a tensor instead of one a channel.")
    ] = False,
    bits: Annotated[int, typer.Option("--bits", metavar="B", help="Of a weight, 2 to 8.")] = 8,
    loss: Loss = None,
    mean: Mean = None,
    std: Std = None,
    label: Label = "label",
    resize: Resize = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """A float model to int8, and what it costs by layer.

    MODEL is an .onnx, .pt2 or .npz file. Ranges come from the data; accuracy is measured on x_val and y_val where the
    data has them, else on all of it. FILE is read by every other verb.
    """
    from .adapt import quantize as run

    graph = _model(model)
    dataset = _dataset(data, graph, seed, label, mean, std, resize)
    with _progress() as tell:
        figures = run(
            graph,
            dataset,
            out or model.with_name(f"{model.stem}-int8.npz"),
            model.stem,
            loss,
            samples,
            seed,
            tell,
            method=method,
            per_channel=not per_tensor,
            keep_float=[name.strip() for name in keep_float.split(",") if name.strip()],
            bits=bits,
        )
    _show(figures, as_json)


def _shares(words: str | None, option: str) -> list[float]:
    shares = _numbers(words, option) or []
    if any(not 0 <= share < 1 for share in shares):
        raise WrongUse(
            f"{option} takes shares from 0, below 1", number=repr(words), action=f"{option} 0.25,0.5"
        )
    return shares


@app.command(epilog="Example:  acclimate prune model.onnx --data mine.npz --channels 0.25,0.5 --sensitivity")
def prune(
    model: Model,
    data: Data,
    channels: Annotated[
        str | None,
        typer.Option(
            "--channels",
            metavar="SHARE,...",
            help="Of each group of layers, the shares of channels to remove; 0.5 if nothing is given.",
            show_default=False,
        ),
    ] = None,
    connections: Annotated[
        str | None,
        typer.Option(
            "--connections",
            metavar="SHARE,...",
            help="Of each weight, the shares of elements to set to zero for good.",
            show_default=False,
        ),
    ] = None,
    criterion: Annotated[
        str, typer.Option("--criterion", metavar="C", help="What is kept: l1, l2, taylor, fisher or random.")
    ] = "l2",
    sensitivity: Annotated[
        bool,
        typer.Option("--sensitivity", help="Also what each group of layers costs alone, at the first share."),
    ] = False,
    epochs: Annotated[
        int, typer.Option("--epochs", metavar="N", help="Passes over the data after pruning; 0: none.")
    ] = 5,
    device: DeviceName = "nano33ble",
    lr: Rate = None,
    batch: Batch = 8,
    optimizer: OptimizerName = "sgd",
    loss: Loss = None,
    mean: Mean = None,
    std: Std = None,
    label: Label = "label",
    resize: Resize = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Save the pruned model (.npz), which every verb takes as MODEL; of one pair of shares.",
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Remove channels or connections, and what it costs.

    Accuracy right after and after learning on, weights, MACs, arena and flash, for each pair of shares, beside the
    whole model learning as long.
    """
    from .adapt import prune as run
    from .frontend import save

    gone, cut = _shares(channels, "--channels"), _shares(connections, "--connections")
    gone = gone or ([] if cut else [0.5])
    if out is not None and max(len(gone), 1) * max(len(cut), 1) > 1:
        raise WrongUse(
            "--out takes one pair of shares", number=f"{channels} and {connections}", action="--channels 0.5"
        )
    graph = _model(model)
    dataset = _dataset(data, graph, seed, label, mean, std, resize)
    with _progress() as tell:
        figures, graphs = run(
            graph,
            dataset,
            model.stem,
            gone,
            cut,
            criterion,
            device,
            loss,
            optimizer,
            lr,
            batch,
            epochs,
            (gone or [0.5])[0] if sensitivity else None,
            seed,
            tell,
        )
    if out is not None:
        figures |= {"out": str(out), "out_bytes": save(graphs[-1], out)}
    _show(figures, as_json)


@app.command("report", epilog="Example:  acclimate report model-run")
def report_verb(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="The folder that adapt or demo made, or its run.json.", show_default=False
        ),
    ],
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Show a run again, and write its page anew.

    RUN is the folder that adapt or demo made, or the run.json in it.
    """
    from .adapt import write_run

    figures = report.read_run(run)
    report.report_of(figures)  # refuse what is not a run before anything is written
    figures["report"] = str(write_run(figures, run if run.is_dir() else run.parent))
    _show(figures, as_json)
    _point_at(figures, as_json)


EngineName = Annotated[
    str,
    typer.Option("--engine", metavar="E", help="unicorn (from pip alone) or qemu (where it is installed)."),
]
CpuName = Annotated[
    str,
    typer.Option(
        "--cpu",
        metavar="C",
        help="Processor to build for, by default the device's: cortex-m0plus, -m4, -m7, -m33, -m55 (QEMU) or riscv32.",
        show_default=False,
    ),
]
CompilerName = Annotated[
    str, typer.Option("--compiler", metavar="CC", help="zig (from pip) or gcc (where it is installed).")
]


def _firmware_plan(
    path: Path,
    data: Path,
    device: str,
    scheme: str,
    batch: int,
    optimizer: str,
    lr: float | None,
    loss: str | None,
    seed: int,
    label: str,
    mean: str | None,
    std: str | None,
    resize: bool,
) -> tuple[Any, Any]:
    """A model's plan for a board and the data set, a held-out part with it."""
    from . import data as data_sets
    from .adapt import HELD_OUT, choose_loss, optimizer_of
    from .auto import plan as plan_of

    graph = _model(path)
    dataset = data_sets.split(_dataset(data, graph, seed, label, mean, std, resize), HELD_OUT, seed)
    loss = loss or choose_loss(graph.type(graph.outputs["output"]), dataset.y)[0]
    plan = plan_of(
        graph,
        device,
        scheme,
        loss,
        optimizer_of(optimizer, lr),
        batch,
        data=(dataset.x, dataset.y),
        seed=seed,
    )
    return plan, dataset


@app.command(epilog="Example:  acclimate emulate model.onnx --data mine.npz --device nano33ble")
def emulate(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL|PROJECT",
            help="An .onnx or .pt2 file, or a folder that export wrote.",
            show_default=False,
        ),
    ],
    data: Data,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="NAME",
            help="The board, by default nano33ble, or the one that the project was exported for.",
            show_default=False,
        ),
    ] = None,
    scheme: Scheme = "last",
    epochs: Annotated[int, typer.Option("--epochs", metavar="N", min=0, help="Passes over the data.")] = 1,
    steps: Annotated[
        int | None,
        typer.Option("--steps", metavar="N", min=0, help="Training steps at most.", show_default=False),
    ] = None,
    engine: EngineName = "unicorn",
    cpu: CpuName = "",
    compiler: CompilerName = "zig",
    batch: Batch = 1,
    optimizer: OptimizerName = "sgd",
    lr: Rate = None,
    loss: Loss = None,
    mean: Mean = None,
    std: Std = None,
    label: Label = "label",
    resize: Resize = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Run the firmware on an emulated board, and learn there.

    The firmware is built as it is exported, in exactly the board's RAM and flash, and gets the data over its serial
    protocol. Instructions are counted; instructions are not cycles.
    """
    from . import data as data_sets
    from .adapt import HELD_OUT
    from .device import get
    from .firmware import trial

    if model.is_dir():
        what, shape = model, trial.sample_shape(model)
        found = data_sets.load(
            data, shape, label, _numbers(mean, "--mean"), _numbers(std, "--std"), seed, resize
        )
        dataset, board, rate = (
            data_sets.split(found, HELD_OUT, seed),
            get(device) if device else None,
            0.01 if lr is None else lr,
        )
    else:
        what, dataset = _firmware_plan(
            model,
            data,
            device or "nano33ble",
            scheme,
            batch,
            optimizer,
            lr,
            loss,
            seed,
            label,
            mean,
            std,
            resize,
        )
        board, rate = None, what.optimizer.lr
    with _progress() as tell:
        figures = trial.emulate(
            what,
            (dataset.x, dataset.y),
            (dataset.x_val, dataset.y_val),
            engine,
            cpu,
            compiler,
            board,
            epochs,
            steps,
            rate,
            seed,
            tell,
        )
    _show(figures | {"name": model.stem}, as_json)


@app.command(
    epilog="Example:  acclimate check model.onnx --data mine.npz --device nano33ble --port /dev/ttyACM0,115200"
)
def check(
    model: Model,
    data: Data,
    device: DeviceName = "nano33ble",
    scheme: Scheme = "last",
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=1, help="Training steps to replay.")] = 4,
    engine: EngineName = "unicorn",
    cpu: CpuName = "",
    compiler: CompilerName = "zig",
    port: Annotated[
        str | None,
        typer.Option(
            "--port",
            metavar="ADDRESS",
            help="Also a real board: a serial device with its rate (/dev/ttyACM0,115200), or tcp://HOST:PORT.",
            show_default=False,
        ),
    ] = None,
    batch: Batch = 1,
    optimizer: OptimizerName = "sgd",
    lr: Rate = None,
    loss: Loss = None,
    mean: Mean = None,
    std: Std = None,
    label: Label = "label",
    resize: Resize = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Does a step give the same here, emulated and on a board?

    Replays training steps on the host, an emulated board and (--port) a real one, and against references in float64.
    All must give equal bits. Where one differs its first tensor is named, and the exit code is 4.
    """
    import tempfile
    from contextlib import ExitStack

    from .firmware import trial
    from .firmware.link import Board

    plan, dataset = _firmware_plan(
        model, data, device, scheme, batch, optimizer, lr, loss, seed, label, mean, std, resize
    )
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as open_boards, _progress() as tell:
        firmware = trial.firmware_of(plan, Path(scratch) / "project", cpu, compiler)
        places = {f"{engine} {firmware.machine.cpu}": trial.start(firmware, engine)}
        if port is not None:
            places[port] = Board(port, timeout_s=60.0)
            places[port].reset()
        for board in places.values():
            open_boards.enter_context(board)
        figures = trial.check(plan, dataset.x, dataset.y, places, steps, plan.optimizer.lr, tell=tell)
    error = None
    if figures["differences"]:
        place, found = next(iter(figures["differences"].items()))
        error = BadInput(
            "a step does not give the same everywhere",
            where=f"{place}, {found['op']} -> {found['tensor']}",
            number=f"step {found['step']}, {found['shapes']}",
            action="report it with this model, the device and both versions of acclimate",
        )
    _show(figures | {"name": model.stem}, as_json, error)


@app.command(epilog="Example:  acclimate devices nano33ble")
def devices(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", help="One device, with the source of each number.", show_default=False
        ),
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """The devices to plan for.

    With a NAME, every number of that device with its source.
    """
    from dataclasses import asdict

    from .device import devices as known
    from .device import get

    found = known() if name is None else {name: get(name)}
    _show(
        {
            "kind": "devices",
            "devices": {n: asdict(d) | {"usable_ram_bytes": d.usable_ram_bytes} for n, d in found.items()},
        },
        as_json,
    )


def _version(asked: bool) -> None:
    if asked:
        print(f"acclimate {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# -- the program --------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without these letters is no reason to fail
    try:
        code = app(given or ["--help"], standalone_mode=False, prog_name="acclimate") or 0
        sys.stdout.flush()
        if code == STOPPED:  # typer takes Ctrl-C for itself, and tells by this code
            raise KeyboardInterrupt
        return code
    except AcclimateError as error:
        return _failed(error, given)
    except click.exceptions.ClickException as error:
        command = (
            error.ctx.command_path
            if isinstance(error, click.exceptions.UsageError) and error.ctx
            else "acclimate"
        )
        return _failed(WrongUse(error.format_message(), action=f"{command} --help"), given)
    except (click.exceptions.Abort, KeyboardInterrupt):
        return _failed(AcclimateError("stopped: nothing was kept, and no file was changed"), given, STOPPED)
    except ImportError as error:
        return _failed(WrongUse(str(error)), given)
    except BrokenPipeError:  # what reads our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _failed(
            BadInput(
                "a file could not be read or written",
                where=str(error.filename or ""),
                number=error.strerror or str(error),
                action="check the path and the free space",
            ),
            given,
        )


def _failed(error: AcclimateError, given: Sequence[str], code: int | None = None) -> int:
    code = error.exit_code if code is None else code
    if "--json" in given:
        print(report.to_json(_described(error) | {"exit_code": code}))
    _complain(error)
    return code
