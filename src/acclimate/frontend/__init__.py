"""Foreign models become Graphs here: a PyTorch module, a .pt2 file, an ONNX file, an archive of arrays."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path

from ..errors import BadInput, WrongUse
from ..ir import Graph
from .archive import load_archive, save
from .onnx import load_onnx
from .torch import from_torch, load_torch

#: file suffix -> what reads it
LOADERS: dict[str, Callable[[str | PathLike[str]], Graph]] = {
    ".onnx": load_onnx,
    ".pt2": load_torch,
    ".npz": load_archive,
}


def load(path: str | PathLike[str], classes: int | None = None, seed: int = 0) -> Graph:
    """The Graph of a model file, read by its suffix; BadInput for a file that is missing, empty or of no known kind.

    .onnx (also quantised, with QuantizeLinear and DequantizeLinear), .pt2, a graph that `save` wrote, or a published
    int8 network. classes, seed: of a published network, replace its classifier by a fresh one; see `peers.published`.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in LOADERS:
        raise BadInput(
            "a model file of this kind is not known",
            where=str(path),
            number=f"suffix {suffix!r}",
            action=f"save the model as {' or '.join(LOADERS)}",
        )
    if suffix == ".npz":
        return load_archive(path, classes, seed)
    if classes is not None:
        raise WrongUse("only a published network can be given other classes", where=str(path))
    return LOADERS[suffix](path)


__all__ = ["LOADERS", "from_torch", "load", "load_archive", "load_onnx", "load_torch", "save"]
