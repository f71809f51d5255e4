"""Write docs/operators.md from the front ends' tables and the losses; `--check` only compares.

python -m acclimate.frontend.generate [--check]
"""

from __future__ import annotations

import inspect
import sys

from .. import objective
from ..objective import LOSSES, Loss
from ..ops.generate import ROOT, publish
from . import onnx_ops, torch_ops


def _names(table: object) -> str:
    return ", ".join(f"`{name}`" for name in sorted(table, key=str.lower))  # type: ignore[call-overload]


def _rewrites(table: dict[str, str], taken: object) -> list[str]:
    """What is not taken, by what to do instead."""
    groups: dict[str, list[str]] = {}
    for name, advice in table.items():
        if name not in taken:  # type: ignore[operator]
            groups.setdefault(advice, []).append(f"`{name}`")
    return [f"- {', '.join(names)}: {advice}" for advice, names in groups.items()]


def _losses() -> list[str]:
    named: dict[type, str] = {}
    for name, loss in LOSSES.items():
        named.setdefault(type(loss), name)
    lines = ["| loss | as a string | what |", "|---|---|---|"]
    for cls in vars(objective).values():
        if isinstance(cls, type) and issubclass(cls, Loss) and cls is not Loss and cls.__name__[0] != "_":
            what = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split()).replace("|", "\\|")
            name = f'`"{named[cls]}"`' if cls in named else "needs its parameters"
            call = ", ".join(
                p.name if p.default is p.empty else f"{p.name}={p.default!r}"
                for p in inspect.signature(cls).parameters.values()
            )
            lines.append(f"| `{cls.__name__}({call})` | {name} | {what} |")
    return lines


def docs() -> str:
    lines = [
        "<!-- Generated from src/acclimate/frontend and objective.py by `make generate`. Do not edit. -->",
        "# Operators and losses",
        "",
        "What a model may be made of, in `forward` and in a file, and what it may learn by. Arithmetic on shapes and",
        "on constants is done at import, whatever its operators. Convolution and pooling are over one or two spatial",
        "dimensions; a tensor has six dimensions at most, and axis 0 of input and output is the batch. An input of",
        "integers is fed as float32, which holds them up to 2^24. A model that uses anything else is refused with a",
        "list of all such places in the user's code.",
        "",
        f"## PyTorch: {len(torch_ops.TABLE)} ATen operators",
        "",
        "Named as `torch.export` names them after its decompositions; a layer such as `nn.MultiheadAttention` or",
        "`nn.TransformerEncoderLayer` is made of these.",
        "",
        _names(torch_ops.TABLE),
        "",
        "Not taken, and what to do instead:",
        "",
        *_rewrites(torch_ops.REWRITES, torch_ops.TABLE),
        "",
        f"## ONNX: {len(onnx_ops.TABLE)} operators",
        "",
        _names(onnx_ops.TABLE),
        "",
        "Not taken, and what to do instead:",
        "",
        *_rewrites(onnx_ops.REWRITES, onnx_ops.TABLE),
        "",
        "## Losses",
        "",
        "A name stands for the loss with its default parameters; `acclimate.Huber(delta=0.5)` sets them.",
        "",
        *_losses(),
    ]
    return "\n".join([*lines, ""])


def main() -> int:
    return publish({ROOT / "docs/operators.md": docs()})


if __name__ == "__main__":
    sys.exit(main())
