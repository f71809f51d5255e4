"""Integer convolutions and their gradients in every form that the kernels have: against the plain definition, and with
the same bits on emulated processors with and without instructions for them."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from cases import one_node, run_c

from acclimate.firmware import emulator, toolchain
from acclimate.layout import arrange
from acclimate.ops import TABLE
from acclimate.ops.quantized import scaled
from acclimate.ops.row import Example
from acclimate.program import build, pack_bits
from acclimate.runtime import Session

MISSING = [n for n in ("ziglang", "unicorn", "elftools") if importlib.util.find_spec(n) is None]
CPUS = ["cortex-m7", *(pytest.param(c, marks=pytest.mark.slow) for c in ("cortex-m33", "cortex-m0plus"))]


def geometry(stride=1, pad=0, dilation=1, groups=1):
    pairs = {"stride": stride, "before": pad, "after": pad, "dilation": dilation}
    return {name: (v, v) for name, v in pairs.items()} | {"groups": groups}


#: x, w, geometry; what is particular about it.
FORMS = {
    "pixels": ((1, 8, 8, 8), (6, 8, 1, 1), geometry()),
    "pixels left over": ((2, 8, 5, 7), (6, 8, 1, 1), geometry()),
    "taps left over": ((2, 13, 3, 3), (5, 13, 1, 1), geometry()),
    "few taps": ((1, 2, 4, 5), (3, 2, 1, 1), geometry()),
    "one pixel": ((3, 40, 1, 1), (10, 40, 1, 1), geometry()),
    "many taps": ((1, 580, 2, 3), (40, 580, 1, 1), geometry()),
    "many taps left over": ((1, 1157, 2, 3), (33, 1157, 1, 1), geometry()),
    "strided": ((1, 6, 7, 9), (4, 6, 1, 1), geometry(stride=2)),
    "windows": ((1, 3, 16, 18), (7, 3, 3, 3), geometry(2, 1)),
    "groups": ((2, 4, 9, 9), (6, 2, 3, 3), geometry(1, 2, 2, 2)),
    "bands": ((1, 2, 70, 60), (2, 1, 3, 3), geometry(1, 1, groups=2)),
    "two of each": ((1, 3, 9, 9), (6, 1, 3, 3), geometry(1, 1, groups=3)),
    "wide": ((1, 1, 6, 130), (1, 1, 3, 3), geometry(1, 1)),
    **{
        f"depthwise {k}, step {s}": ((2, 5, 11, 13), (5, 1, k, k), geometry(s, k // 2, groups=5))
        for k in (3, 5, 7)
        for s in (1, 2)
    },
    "depthwise 4": ((1, 3, 9, 8), (3, 1, 4, 4), geometry(1, 2, groups=3)),
}
CLAMPS = {"full": (-128, 127), "relu": (-20, 127), "both": (-100, 50)}


def output_shape(x, w, g):
    sides = (
        (x[i + 2] + 2 * g["before"][i] - g["dilation"][i] * (w[i + 2] - 1) - 1) // g["stride"][i] + 1
        for i in range(2)
    )
    return (x[0], w[0], *sides)


def sums(x, w, g):
    """Integer sums of (x, zero point subtracted) * w by the definition, one tap after another."""
    n, o, rows, cols = output_shape(x.shape, w.shape, g)
    pad, each = g["before"], o // g["groups"]
    x = np.pad(x.astype(np.int64), ((0, 0), (0, 0), (pad[0], pad[0]), (pad[1], pad[1])))
    acc = np.zeros((n, o, rows, cols), np.int64)
    for k in range(o):
        part = x[:, k // each * w.shape[1] : (k // each + 1) * w.shape[1]]
        for i in range(w.shape[2]):
            for j in range(w.shape[3]):
                top, left = i * g["dilation"][0], j * g["dilation"][1]
                seen = part[:, :, top:, left:][:, :, :: g["stride"][0], :: g["stride"][1]][:, :, :rows, :cols]
                acc[:, k] += np.einsum("nchw,c->nhw", seen, w[k, :, i, j].astype(np.int64))
    return acc


def forward(form, clamp):
    """(graph, feeds, y, bits): biases and scalings of every size, some past what the quick way takes."""
    x_shape, w_shape, g = FORMS[form]
    rng = np.random.default_rng(len(form))
    x, w = (rng.integers(-128, 128, s).astype(np.int8) for s in (x_shape, w_shape))
    o, taps = w_shape[0], int(np.prod(w_shape[1:]))
    b = rng.integers(-200 * taps, 200 * taps + 1, o).astype(np.int32)
    m = rng.integers(2**30, 2**31, o).astype(np.int32)
    shift = (rng.integers(-4, -1, o) - int(np.log2(taps) / 2 + 6)).astype(np.int32)
    odd = np.arange(o) % 5
    shift[odd == 3], b[odd == 3] = -25, 2**31 - 1 - taps * 32640
    shift[odd == 4] = rng.integers(-1, 3, (odd == 4).sum())
    low, high = CLAMPS[clamp]
    attrs = {**g, "x_zero": 5, "y_zero": -7, "low": low, "high": high}
    acc = sums(x.astype(np.int64) - 5, w, g) + b.reshape(1, -1, 1, 1)
    channel = (1, -1, 1, 1)
    v = scaled(acc, m.reshape(channel), shift.reshape(channel)) - 7
    graph, feeds = one_node(
        TABLE["q_conv"], Example((x_shape, w_shape, (o,), (o,), (o,)), attrs), [x, w, b, m, shift]
    )
    return graph, feeds, np.clip(v, low, high), (v >= low) & (v <= high)


def gradients(form, gated=True):
    """(graph, feeds) of both gradients. gated: d counts where bits say so."""
    x_shape, w_shape, g = FORMS[form]
    rng = np.random.default_rng(len(form))
    x, w = (rng.integers(-128, 128, s).astype(np.int8) for s in (x_shape, w_shape))
    d = rng.normal(size=output_shape(x_shape, w_shape, g)).astype(np.float32)
    scale, bits = rng.uniform(0.01, 0.1, w_shape[0]).astype(np.float32), rng.random(d.shape) < 0.7
    row = TABLE["q_conv_input_grad"]
    dx = one_node(row, Example((), {**g, "size": x_shape[2:]}), [d, w, scale, bits if gated else None])
    row = TABLE["q_conv_weight_grad"]
    dw = one_node(row, Example((), {**g, "kernel": w_shape[2:], "x_zero": -3, "x_scale": 0.05}), [x, d])
    return dx, dw


def in_blocks(form, bits, hostile=False):
    """(graph, feeds) of both gradients from blocks, of the update made with one, and of what is done to blocks alone.

    hostile: the largest and smallest mantissas and weights only, so that sums wrap.
    """
    x_shape, w_shape, g = FORMS[form]
    rng, top = np.random.default_rng(len(form)), 2 ** (bits - 1)
    kind = np.int16 if bits == 16 else np.int8
    shape = output_shape(x_shape, w_shape, g)
    x, w = (rng.integers(-128, 128, s).astype(np.int8) for s in (x_shape, w_shape))
    m, other = (rng.integers(-top, top, shape).astype(kind) for _ in range(2))
    if hostile:
        m, w = (rng.choice((-t, -t, t - 1), v.shape).astype(v.dtype) for v, t in ((m, top), (w, 128)))
    m[:, ::3] //= 2**9 if bits == 16 else 2**4
    m[0, -1] = 0
    e, f = (rng.integers(-20, 5, shape[:2]).astype(np.int32) for _ in range(2))
    e[0, -1] = -512
    seen, ratio = rng.random(shape) < 0.7, rng.integers(2**14, 2**15 + 1, w_shape[0]).astype(np.int32)
    lr, scale = np.float32([0.3]), rng.uniform(0.01, 0.1, w_shape[0]).astype(np.float32)
    power, of_x = np.full(w_shape[0], -15, np.int32), {**g, "x_zero": -3, "x_scale": 0.05}
    calls = [
        ("bf_conv_input_grad", [m, e[:, 0], w], {**g, "size": x_shape[2:], "bits": 24 - bits}),
        ("bf_conv_input_grad", [m, e[:, 0], w], {**g, "size": x_shape[2:], "bits": bits}),
        ("bf_conv_weight_grad", [x, m, e], {**of_x, "kernel": w_shape[2:]}),
        ("bf_conv_sgd", [w, x, m, e, lr, scale], of_x),
        ("bf_gate", [m, seen], {}),
        ("bf_align", [m, e, ratio, power], {"spare": 1}),
        ("bf_add", [m, e, other, f], {}),
        ("bf_sum", [m, e], {}),
    ]
    if w_shape[1] > 4:
        index = np.sort(rng.permutation(w_shape[1])[:4]).astype(np.int32)
        part = rng.integers(-128, 128, (w_shape[0], 4, *w_shape[2:])).astype(np.int8)
        calls.append(
            ("bf_conv_input_grad", [m, e[:, 0], w, part, index], {**g, "size": x_shape[2:], "bits": 16})
        )
    return [(*one_node(TABLE[op], Example((), attrs), inputs), inputs) for op, inputs, attrs in calls]


def on_board(graph, feeds, cpu):
    """Raw bytes of each output and of the state on an emulated processor and here, and the emulated run."""
    program = build({"run": arrange(graph)})
    session = Session(program, kernels="plain")
    session.feed("run", {name: pack_bits(v) if v.dtype == bool else v for name, v in feeds.items()})
    session.run_range("run")
    harness, size = emulator.Harness(program, cpu), program.state_bytes
    run = harness.run("run", **feeds)
    places = [b for b in program.entries["run"].values() if b.is_output]
    here = {b.name: session.arena[b.offset : b.offset + b.type.size_bytes].tobytes() for b in places}
    there = {name: run.outputs[name].tobytes() for name in here}
    here = {name: raw[: len(there[name])] for name, raw in here.items()}  # the rest rounds up
    return {**there, "": harness.state[:size]}, {**here, "": session.state.tobytes()[:size]}, run


@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("form", FORMS)
def test_convolution_by_definition(form, clamp):
    graph, feeds, y, bits = forward(form, clamp)
    found = run_c(graph, feeds)
    assert np.array_equal(found["o0"], y) and np.array_equal(found["o1"], bits)
    assert bits.any() and (bits.shape[1] < 5 or not bits.all())  # of five channels one is scaled up


@pytest.mark.parametrize("form", FORMS)
def test_gradients_by_definition(form):
    for graph, feeds in gradients(form):
        node = graph.nodes[0]
        want = TABLE[node.op].ref(
            node.attrs,
            *[
                np.asarray(feeds[n], np.float64) if feeds[n].dtype == np.float32 else feeds[n]
                for n in node.inputs
                if n
            ],
        )[0]
        found = run_c(graph, feeds)["o0"]
        assert np.abs(found - want).max() <= 3e-6 * np.abs(want).max()


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_in_blocks_by_definition(form, bits):
    for hostile in (False, True):
        for graph, feeds, inputs in in_blocks(form, bits, hostile):
            node, row = graph.nodes[0], TABLE[graph.nodes[0].op]
            want = row.ref(
                node.attrs, *[v.astype(np.float64) if v.dtype == np.float32 else v for v in inputs]
            )
            if row.updates:
                continue  # compared on boards, and with the gradient's own op where the update is tested
            found = run_c(graph, feeds)
            for k, v in enumerate(want):
                if v.dtype.kind == "i":
                    assert np.array_equal(found[f"o{k}"], v), (node.op, k)
                else:
                    assert np.abs(found[f"o{k}"] - v).max() <= 3e-6 * np.abs(v).max(), node.op


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (extra emulate)")
@pytest.mark.parametrize("cpu", CPUS)
def test_the_same_bits_on_boards(cpu):
    for form in FORMS:
        for graph, feeds in (*(forward(form, c)[:2] for c in CLAMPS), *gradients(form, gated=False)):
            there, here, run = on_board(graph, feeds, cpu)
            assert there == here, (form, graph.nodes[0].op)
            assert run.stack_bytes <= toolchain.STACK_BYTES - 1024, form


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (extra emulate)")
@pytest.mark.parametrize("cpu", CPUS)
def test_the_same_bits_in_blocks_on_boards(cpu):
    for form, bits in ((form, bits) for form in FORMS for bits in (16, 8)):
        for graph, feeds, _ in in_blocks(form, bits, hostile=bits == 16):
            there, here, run = on_board(graph, feeds, cpu)
            assert there == here, (form, bits, graph.nodes[0].op)
            assert run.stack_bytes <= toolchain.STACK_BYTES - 1024, form
