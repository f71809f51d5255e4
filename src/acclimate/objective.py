"""What is minimised, and how: losses and optimisers as data, each with the one function that writes its nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import BadInput, WrongUse
from .ir import Type


def _classes_of(output: Type) -> int:
    if len(output.shape) != 2:
        raise WrongUse(
            "cross entropy takes an output of (N, classes)",
            where=f"the model gives {output}",
            action="flatten the output, or use another loss",
        )
    return output.shape[1]


# -- losses --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CrossEntropy:
    """Mean of -log softmax(z)[y] over integer labels; label smoothing and class weights as in torch."""

    smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        weights = self.class_weights or ()
        if not 0 <= self.smoothing <= 1 or not all(np.isfinite(w) and w > 0 for w in weights):
            raise WrongUse(
                "smoothing lies in 0..1 and class weights are finite numbers above zero",
                number=f"smoothing {self.smoothing}, weights {self.class_weights}",
            )

    @property
    def mean_of_parts(self) -> bool:
        """Whether the mean over equal parts of a batch is the mean over the batch."""
        return self.class_weights is None

    def target(self, output: Type) -> Type:
        """Type of y for a model output of the given type."""
        _classes_of(output)
        return Type(output.shape[:1], "i32")

    def build(self, tape: Any, output: str, target: str) -> str:
        extra = ()
        if self.class_weights is not None:
            if len(self.class_weights) != tape.graph.shape(output)[1]:
                raise WrongUse(
                    "class_weights needs one weight >= 0 a class",
                    number=f"{len(self.class_weights)} given, {tape.graph.shape(output)[1]} classes",
                )
            extra = (tape.graph.constant("class_weights", np.array(self.class_weights)),)
        return tape.emit("cross_entropy", output, target, *extra, smoothing=self.smoothing)

    def check(self, y: np.ndarray, output: Type) -> np.ndarray:
        """Labels as the Program takes them; BadInput where they are not whole numbers in 0..classes-1."""
        classes = _classes_of(output)
        if y.ndim == 2 and y.shape[1] == 1:
            y = y[:, 0]
        if y.ndim != 1:
            raise BadInput(
                "cross entropy takes one label a sample",
                number=f"y has shape {y.shape}",
                action='for several labels a sample use loss="binary_cross_entropy"',
            )
        if y.dtype.kind not in "iub" and not (y.dtype.kind == "f" and np.array_equal(y, np.round(y))):
            raise BadInput("labels must be whole numbers", number=f"y is {y.dtype}")
        if y.size and not (y.min() >= 0 and y.max() < classes):
            bad = np.flatnonzero((y < 0) | (y >= classes))
            raise BadInput(
                "a label is outside the classes of the model",
                where=f"row {bad[0]} and {bad.size - 1} more",
                number=f"label {y[bad[0]]}, classes 0..{classes - 1}",
                action="map the labels to the model's classes",
            )
        return y.astype(np.int32)

    def correct(self, output: np.ndarray, y: np.ndarray) -> float:
        """Share of samples whose largest output is the label."""
        return float((output.argmax(-1) == y.reshape(-1)).mean())

    def probabilities(self, output: np.ndarray) -> np.ndarray:
        e = np.exp(output - output.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)


def _same_shape(y: np.ndarray, output: Type, what: str) -> np.ndarray:
    shape = (len(y), *output.shape[1:])
    if y.shape != shape and y.size != int(np.prod(shape)):
        raise BadInput(f"{what} takes targets of the output's shape", number=f"y {y.shape}, output {shape}")
    y = y.astype(np.float32).reshape(shape)
    if not np.isfinite(y).all():
        raise BadInput(
            "y holds NaN or infinity",
            where=f"row {np.argwhere(~np.isfinite(y))[0][0]}",
            number=f"{int((~np.isfinite(y)).sum())} values",
        )
    return y


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """Mean binary cross entropy on logits over all labels; with `masked`, targets below zero do not count."""

    masked: bool = False

    @property
    def mean_of_parts(self) -> bool:
        """Whether the mean over equal parts of a batch is the mean over the batch."""
        return not self.masked

    def target(self, output: Type) -> Type:
        return output

    def build(self, tape: Any, output: str, target: str) -> str:
        return tape.emit("binary_cross_entropy", output, target, masked=int(self.masked))

    def check(self, y: np.ndarray, output: Type) -> np.ndarray:
        y = _same_shape(np.asarray(y), output, "binary cross entropy")
        bad = (y > 1) | ((y < 0) & (not self.masked))
        if bad.any():
            raise BadInput(
                "targets of binary cross entropy lie in 0..1",
                where=f"row {np.argwhere(bad)[0][0]}",
                number=f"{y[bad][0]}",
                action="BinaryCrossEntropy(masked=True) skips targets below zero",
            )
        return y

    def correct(self, output: np.ndarray, y: np.ndarray) -> float:
        """Share of labels on the right side of one half."""
        keep = y >= 0
        return float(((output > 0) == (y > 0.5))[keep].mean()) if keep.any() else 0.0

    def probabilities(self, output: np.ndarray) -> np.ndarray:
        return np.where(
            output >= 0,
            1 / (1 + np.exp(-np.abs(output))),
            np.exp(-np.abs(output)) / (1 + np.exp(-np.abs(output))),
        )


@dataclass(frozen=True)
class MSE:
    """Mean squared error over all elements."""

    @property
    def mean_of_parts(self) -> bool:
        """Whether the mean over equal parts of a batch is the mean over the batch."""
        return True

    def target(self, output: Type) -> Type:
        return output

    def build(self, tape: Any, output: str, target: str) -> str:
        return tape.emit("mse", output, target)

    def check(self, y: np.ndarray, output: Type) -> np.ndarray:
        return _same_shape(np.asarray(y), output, "mean squared error")

    def correct(self, output: np.ndarray, y: np.ndarray) -> float:
        """Coefficient of determination, over all outputs together."""
        total = float(((y - y.mean(0)) ** 2).sum())
        return 1 - float(((output - y) ** 2).sum()) / total if total else 0.0

    def probabilities(self, output: np.ndarray) -> np.ndarray:
        raise WrongUse("a regression has no probabilities", action="use predict")


Loss = CrossEntropy | BinaryCrossEntropy | MSE
LOSSES: Mapping[str, Loss] = {
    "cross_entropy": CrossEntropy(),
    "binary_cross_entropy": BinaryCrossEntropy(),
    "mse": MSE(),
}


# -- optimisers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent as torch.optim.SGD. `clip_norm` bounds the norm of all gradients together.

    `accumulate`: micro-batches whose mean gradient makes one step.
    """

    lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    clip_norm: float | None = None
    accumulate: int = 1

    def __post_init__(self) -> None:
        _check_optimizer(self)
        if self.nesterov and not self.momentum:
            raise WrongUse("Nesterov's method needs a momentum", action="SGD(momentum=0.9, nesterov=True)")

    def build(self, tape: Any, name: str, grad: str, lr: str, index: str, axis: int) -> None:
        buffer = tape.state(f"{name}.momentum", tape.graph.shape(grad)) if self.momentum else ""
        tape.update(
            "sgd",
            name,
            grad,
            lr,
            buffer,
            index,
            axis=axis,
            momentum=self.momentum,
            nesterov=int(self.nesterov),
            weight_decay=self.weight_decay,
        )


@dataclass(frozen=True)
class Adam:
    """Adam as torch.optim.Adam, or AdamW with `decoupled`. `clip_norm` and `accumulate` as in SGD."""

    lr: float = 0.001
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    clip_norm: float | None = None
    accumulate: int = 1

    def __post_init__(self) -> None:
        _check_optimizer(self)
        if not all(0 <= b < 1 for b in self.betas):
            raise WrongUse("betas lie in 0..1", number=str(self.betas))

    def build(self, tape: Any, name: str, grad: str, lr: str, index: str, axis: int) -> None:
        shape = tape.graph.shape(grad)
        steps = tape.state("optimizer.steps", (1,), "i32")
        tape.update(
            "adam",
            name,
            grad,
            lr,
            tape.state(f"{name}.mean", shape),
            tape.state(f"{name}.variance", shape),
            steps,
            index,
            axis=axis,
            beta1=self.betas[0],
            beta2=self.betas[1],
            eps=self.eps,
            weight_decay=self.weight_decay,
            decoupled=int(self.decoupled),
        )
        tape.count(steps)


def AdamW(lr: float = 0.001, weight_decay: float = 0.01, **rest: Any) -> Adam:
    """Adam with decoupled weight decay, with torch.optim.AdamW's defaults."""
    return Adam(lr=lr, weight_decay=weight_decay, decoupled=True, **rest)


def _check_optimizer(o: Any) -> None:
    numbers = [o.lr, o.weight_decay, getattr(o, "momentum", 0.0), 1.0 if o.clip_norm is None else o.clip_norm]
    fine = all(isinstance(n, (int, float, np.number)) and np.isfinite(n) and n >= 0 for n in numbers)
    whole = isinstance(o.accumulate, int) and o.accumulate >= 1
    if not (fine and whole and numbers[2] < 1 and numbers[3] > 0):
        raise WrongUse(
            "an optimiser's number is out of range",
            where=str(o),
            action="finite lr, weight_decay >= 0; momentum in [0, 1); accumulate a whole number >= 1; clip_norm > 0",
        )


Optimizer = SGD | Adam
OPTIMIZERS: Mapping[str, Optimizer] = {
    "sgd": SGD(),
    "momentum": SGD(momentum=0.9),
    "adam": Adam(),
    "adamw": AdamW(),
}


def resolve(value: Any, table: Mapping[str, Any], what: str) -> Any:
    """An object as it is, a name by its table entry."""
    if isinstance(value, str):
        if value not in table:
            raise WrongUse(f"no {what} is called {value}", action=f"one of {', '.join(table)}")
        return table[value]
    return value
