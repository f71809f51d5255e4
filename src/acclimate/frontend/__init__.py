"""Foreign models become Graphs here: a PyTorch module, a .pt2 file, an ONNX file."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path

from ..errors import BadInput
from ..ir import Graph
from .onnx import load_onnx
from .torch import from_torch, load_torch

#: file suffix -> what reads it
LOADERS: dict[str, Callable[[str | PathLike[str]], Graph]] = {".onnx": load_onnx, ".pt2": load_torch}


def load(path: str | PathLike[str]) -> Graph:
    """The Graph of a model file, read by its suffix; BadInput for a file that is missing, empty or of no known kind."""
    suffix = Path(path).suffix.lower()
    if suffix not in LOADERS:
        raise BadInput(
            "a model file of this kind is not known",
            where=str(path),
            number=f"suffix {suffix!r}",
            action=f"save the model as {' or '.join(LOADERS)}",
        )
    return LOADERS[suffix](path)


__all__ = ["LOADERS", "from_torch", "load", "load_onnx", "load_torch"]
