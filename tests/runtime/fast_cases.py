"""Random calls of the rows that have a fast kernel.

Run as a script, it puts each argument in turn at the end of readable memory, so that a kernel that reads or writes
past it is killed by the system.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np
from cases import arrays as inputs_of

from acclimate.ir import Graph, Type
from acclimate.layout import Buffer, Layout, arrange
from acclimate.ops import TABLE, emit, infer, parse
from acclimate.ops.quantized import add_attrs
from acclimate.program import Program, build
from acclimate.runtime import Session

PAGE = mmap.PAGESIZE
DTYPES = {"int8": "i8", "int32": "i32"}


def dtype_of(a: np.ndarray) -> str:
    return DTYPES.get(str(a.dtype), "f32")


def convolution(rng: np.random.Generator) -> tuple[dict, tuple, tuple]:
    """Attributes, shape of x and shape of w of a convolution that has an output."""
    if rng.random() < 0.2:  # what minimal filtering is for
        c, o, h, w = (int(rng.integers(*r)) for r in ((8, 70), (8, 70), (3, 34), (3, 34)))
        pads = {k: tuple(int(i) for i in rng.integers(0, 3, 2)) for k in ("before", "after")}
        attrs = {"stride": (1, 1), "dilation": (1, 1), "groups": 1, **pads}
        return attrs, (int(rng.integers(1, 4)), c, h, w), (o, c, 3, 3)
    dims = 2 if rng.random() < 0.7 else 1
    if rng.random() < 0.35:  # depthwise
        groups, c, o = int(rng.integers(1, 20)), 1, 1
    else:
        groups, c, o = int(rng.choice([1, 1, 1, 2, 3])), int(rng.integers(1, 12)), int(rng.integers(1, 20))
    kernel, stride = rng.integers(1, 6, dims), rng.integers(1, 4, dims)
    dilation, before, after = rng.integers(1, 3, dims), rng.integers(0, 3, dims), rng.integers(0, 3, dims)
    size = np.maximum((kernel - 1) * dilation + 1 - before - after, 1) + rng.integers(0, 30, dims)
    if rng.random() < 0.1:
        size[-1] += 100 * rng.integers(1, 30)  # more columns than a band holds
    geometry = {"stride": stride, "before": before, "after": after, "dilation": dilation}
    attrs = {k: tuple(int(i) for i in v) for k, v in geometry.items()} | {"groups": groups}
    n = int(rng.integers(1, 6))
    return attrs, (n, c * groups, *map(int, size)), (o * groups, c, *map(int, kernel))


def cases(seed: int, count: int):
    """Yields (op, arrays, attributes)."""
    rng = np.random.default_rng(seed)

    def array(*shape):
        return rng.normal(size=shape).astype(np.float32)

    for _ in range(count):
        attrs, x, w = convolution(rng)
        inputs = [Type(x), Type(w), Type(w[:1])]
        y = infer(TABLE["conv"], attrs, inputs)[0].shape
        limits = {"low": -1.0, "high": 2.0} if rng.random() < 0.3 else {}
        yield "conv", [array(*x), array(*w), array(w[0])], attrs | limits
        yield "conv_input_grad", [array(*y), array(*w)], {**attrs, "size": x[2:]}
        yield "conv_weight_grad", [array(*x), array(*y)], {**attrs, "kernel": w[2:]}
        x_q, w_q = (rng.integers(-128, 128, s).astype(np.int8) for s in (x, w))
        scaling = [rng.integers(2**30, 2**31, w[0]), rng.integers(-12, 2, w[0])]
        bias = rng.integers(-9000, 9000, w[0]).astype(np.int32) if rng.random() < 0.7 else None
        zeros = {"x_zero": int(rng.integers(-128, 128)), "y_zero": int(rng.integers(-128, 128))}
        scaling = [s.astype(np.int32) for s in scaling]
        yield "q_conv", [x_q, w_q, bias, *scaling], {**attrs, **zeros, "low": -100, "high": 120}
        added = add_attrs((0.03, 4), (0.05, -9), (0.06, 2), -100, 100)
        size = int(rng.integers(1, 200))
        yield "q_add", [rng.integers(-128, 128, size).astype(np.int8) for _ in "ab"], added
        row = TABLE["q_block"]
        block = row.examples[int(rng.integers(len(row.examples)))]
        yield "q_block", inputs_of(row, block, int(rng.integers(1000))), dict(block.attrs)
        scale = rng.uniform(0.1, 1, w[0]).astype(np.float32)
        yield "q_conv_input_grad", [array(*y), w_q, scale], {**attrs, "size": x[2:]}
        weight_of = {"kernel": w[2:], "x_zero": zeros["x_zero"], "x_scale": 0.02}
        yield "q_conv_weight_grad", [x_q, array(*y)], {**attrs, **weight_of}
        learned = {k: weight_of[k] for k in ("x_zero", "x_scale")}
        rate = np.float32([0.01])
        yield "q_conv_sgd", [w_q, x_q, array(*y), rate, np.float32([0.013])], {**attrs, **learned}
        m, n, k = (
            int(rng.choice([rng.integers(1, 12), rng.integers(1, 80), rng.integers(1, 300)])) for _ in "mnk"
        )
        ta, tb, stack = (
            int(rng.integers(2)),
            int(rng.integers(2)),
            (int(rng.integers(1, 6)),) * int(rng.integers(2)),
        )
        a, b = array(*stack, *((k, m) if ta else (m, k))), array(*stack, *((n, k) if tb else (k, n)))
        yield "matmul", [a, b, *([array(n)] if rng.random() < 0.5 else [])], {"ta": ta, "tb": tb} | limits

        shape = tuple(int(rng.integers(1, high)) for high in (9, 30, 24, 24))
        x, d, vector, rows = array(*shape), array(*shape), shape[1], shape[3]
        gamma, beta, mean, var = array(vector), array(vector), array(vector), np.abs(array(vector))
        yield "relu", [x], {}
        yield "hard_tanh", [x], {"low": -0.5, "high": 0.5}
        yield "gelu", [x], {}
        yield "gelu_grad", [d, x], {}
        yield "add", [x, d if rng.random() < 0.7 else array(*shape[2:])], {"high": 1.0}
        yield "batch_norm", [x, gamma, beta, mean, var], {"low": 0.0}
        yield "batch_norm_grad", [d, None, x, gamma, mean, var], {}
        yield "layer_norm", [x, array(rows), array(rows)], {}
        yield "softmax", [x], {}
        yield "softmax_grad", [d, x], {}
        window = {"kernel": (2, 2), "stride": (2, 2), "before": (1, 1), "after": (1, 1)}
        yield "max_pool", [x], window | {"dilation": (1, 1)}
        window["extra"] = (0, 0)
        yield "avg_pool", [x], window
        half = infer(TABLE["avg_pool"], TABLE["avg_pool"].fill(window), [Type(shape)])[0].shape
        yield "avg_pool_grad", [array(*half)], window | {"size": shape[2:]}


def program_of(op: str, arrays: list[np.ndarray], attrs: dict, last: int = -1) -> Program:
    """A Program that runs one op; of its tensors (inputs, then the output) number `last` ends the arena."""
    graph = Graph()
    fixed = TABLE[op].fixed
    names = [
        ""
        if a is None
        else graph.constant(f"i{i}", a, "i32")
        if i in fixed
        else graph.persistent(f"i{i}", a, "parameter", dtype_of(a))
        if i in TABLE[op].updates
        else graph.input(f"i{i}", a.shape, dtype_of(a))
        for i, a in enumerate(arrays)
    ]
    others = tuple(i for i, p in enumerate(parse(TABLE[op].signature)[1]) if i and p.optional)
    out = emit(graph, op, *names, unused=others, **attrs)
    if out:
        graph.outputs["o"] = out if isinstance(out, str) else out[0]
    if last < 0:
        return build({"run": arrange(graph)})
    more = [] if isinstance(out, str) else [n for n in out[1:] if n]
    tensors = [*more, *graph.inputs.values(), *graph.outputs.values()]
    tensors.append(tensors.pop(len(more) + last))
    buffers, offsets, at = [], {}, 0
    for name in tensors:
        size = graph.type(name).size_bytes
        buffers.append(Buffer([name], size, 0, 1, at))
        offsets[name] = at
        at += size
    return build({"run": Layout(graph, graph.nodes, buffers, offsets, at, at)})


def run(program: Program, arrays: list[np.ndarray], session: Session | None = None, **how) -> np.ndarray:
    session = session or Session(program, **how)
    session.arena[:] = 0xFF  # not a number: what is not written is seen
    session.feed("run", {f"i{i}": a for i, a in enumerate(arrays) if f"i{i}" in program.entries["run"]})
    session.run_range("run")
    entry, name = (
        ("run", "o") if "o" in program.entries["run"] else ("state", "i0")
    )  # what an op without outputs writes
    return session.view(entry, name).copy()


def guarded(size: int) -> np.ndarray:
    """`size` bytes, a multiple of 4, of which the last is followed by a page that cannot be touched."""
    pages = -(-size // PAGE) + 1
    block = mmap.mmap(-1, pages * PAGE)
    raw = np.frombuffer(block, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    guard = ctypes.c_void_p(raw.ctypes.data + (pages - 1) * PAGE)
    if libc.mprotect(guard, ctypes.c_size_t(PAGE), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    end = (pages - 1) * PAGE
    return raw[end - size : end]


def main(seed: int, count: int, isa: str) -> None:
    for op, arrays, attrs in cases(seed, count):
        inside = {*TABLE[op].fixed, *TABLE[op].updates}
        given = sum(a is not None and i not in inside for i, a in enumerate(arrays))
        for last in range(given + (len(parse(TABLE[op].signature)[1]) > 0)):
            program = program_of(op, arrays, attrs, last)
            session = Session(program, isa=isa, kernels="fast", threads=2)
            session.arena = guarded(program.arena_bytes)
            run(program, arrays, session)
    print("all within bounds")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
