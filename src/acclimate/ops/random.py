"""Dropout, from one counter-based generator that C and Python share, so that any run can be replayed anywhere."""

from __future__ import annotations

from typing import Any

import numpy as np

from .row import Attr, Example, Row


def hash_u32(x: np.ndarray) -> np.ndarray:
    """A well-mixed 32-bit hash of a 32-bit counter ("lowbias32", C. Wellons), the same in C (ac_hash_u32)."""
    x = x.astype(np.uint32)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def uniform(step: int, salt: int, size: int) -> np.ndarray:
    """`size` floats in [0, 1), a pure function of the step counter and the salt."""
    key = hash_u32(np.array([(step * 0x9E3779B9 + salt) & 0xFFFFFFFF], np.uint32))
    bits = hash_u32(np.arange(size, dtype=np.uint32) ^ key)
    bits = hash_u32(bits + key)
    return (bits >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def _dropout(a: Any, x: Any, step: Any) -> list[Any]:
    p = np.float32(a["p"])  # as the kernel reads it
    keep = uniform(int(step[0]), int(a["salt"]), x.size).reshape(x.shape) >= p
    return [np.where(keep, x * x.dtype.type(np.float32(1) / (np.float32(1) - p)), 0)]


ROWS = (
    Row(
        "dropout",
        "*, 1:i32 -> *",
        "Zero each element with probability p and scale the rest by 1 / (1 - p). The mask follows from the step "
        "counter and the salt, so the gradient is the same op again and nothing is saved.",
        _dropout,
        (Example(((3, 50), (1,)), {"p": 0.3, "salt": 7}, {1: "step"}),),
        attrs={"p": Attr("f"), "salt": Attr("i", 0)},
        in_place=(0,),
        grad=lambda tape, node, d: [tape.emit("dropout", d, node.inputs[1], **node.attrs), ""],
        effects=lambda tape, node: tape.count(node.inputs[1]),
        predict=lambda node: ("", (0,), {}),
    ),
)
