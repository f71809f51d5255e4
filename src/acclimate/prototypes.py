"""A classifier whose classes are the means of what it was shown: one sample makes a class, none is forgotten."""

from __future__ import annotations

import numpy as np

from .classes import COUNT, SUM, prototype_graphs
from .errors import BadInput
from .ir import Graph, graph_of
from .ops import with_batch
from .passes import prepare
from .planner import arranged
from .program import STATE_ENTRY, Program, build, model_hash
from .runtime import Session


def prototype_program(model: Graph, classes: int, metric: str = "euclidean", batch_size: int = 1) -> Program:
    """A Program with the entries "learn" and "predict" of classes.prototype_graphs, as a board runs it.

    What it learned is kept as deltas are (ac_delta_save), under the model's hash.
    """
    graphs = prototype_graphs(with_batch(graph_of(model), batch_size), classes, metric)
    prepared = {name: prepare(graph, {SUM, COUNT}) for name, graph in graphs.items()}
    return build(arranged(prepared), model=model_hash(model))


class Prototypes:
    """Nearest class mean over the features of a model, one sample at a time; `classes` there may ever be.

    >>> head = Prototypes(model, classes=10).learn(x, y)                              # doctest: +SKIP
    >>> head.predict(x_new)                                                           # doctest: +SKIP
    """

    def __init__(self, model: Graph, classes: int, metric: str = "euclidean") -> None:
        """metric: "euclidean" or "cosine"."""
        self._session = Session(prototype_program(model, classes, metric))
        self._classes = classes
        self._shape = self._session.view("learn", "x").shape[1:]

    def _samples(self, x: np.ndarray) -> np.ndarray:
        x = np.asarray(x, np.float32)
        if x.shape[1:] != self._shape or not len(x):
            raise BadInput(
                "x does not have the shape that the model takes",
                where="x",
                number=f"{x.shape}, must be (n, {', '.join(map(str, self._shape))}) with n from 1",
            )
        if not np.isfinite(x).all():
            bad = int(np.argmax(~np.isfinite(x).reshape(len(x), -1).all(1)))
            raise BadInput("x holds NaN or infinity", where=f"row {bad}", action="drop or repair that sample")
        return x

    def learn(self, x: np.ndarray, y: np.ndarray) -> Prototypes:
        """Count samples (n, ...) in the means of their classes (n,). Returns self."""
        x, y = self._samples(x), np.asarray(y)
        if y.shape != (len(x),) or y.dtype.kind not in "iu":
            raise BadInput(
                "y must hold a whole number for each sample",
                where="y",
                number=f"{y.dtype} {y.shape}, must be ({len(x)},)",
                action="map the labels to 0..classes-1",
            )
        if y.min() < 0 or y.max() >= self._classes:
            raise BadInput(
                "a label is outside the classes",
                where="y",
                number=f"{y.min()} to {y.max()}, classes 0..{self._classes - 1}",
                action="Prototypes(model, classes=...) with as many as there may ever be",
            )
        for sample, label in zip(x, y.astype(np.int32), strict=True):
            self._session.run("learn", x=sample[None], y=label[None])
        return self

    def decision_function(self, x: np.ndarray) -> np.ndarray:
        """How near each class is, (n, classes); see classes.prototype_graphs."""
        return np.concatenate([self._session.run("predict", x=s[None])["output"] for s in self._samples(x)])

    def predict(self, x: np.ndarray) -> np.ndarray:
        """The nearest class of those that have a sample, (n,)."""
        return self.decision_function(x).argmax(1)

    def counts(self) -> np.ndarray:
        """Samples that each class has seen."""
        return self._session.view(STATE_ENTRY, COUNT).astype(np.int64)
