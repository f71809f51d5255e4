"""Fast kernels compute what the plain ones do, within rounding; whatever the processor and the number of threads."""

import multiprocessing
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
from cases import arrays as inputs_of
from cases import one_node, run_c
from runtime.fast_cases import cases, program_of, run
from runtime.native import ROOT, call
from runtime.nets import plans, samples

from acclimate.ir import Graph
from acclimate.layout import Buffer, Layout
from acclimate.learner import Learner
from acclimate.ops import TABLE, emit
from acclimate.ops.row import Example
from acclimate.program import build
from acclimate.runtime import Session, best_isa

ISAS = ["base", "v3", "v4"][: ["base", "v3", "v4"].index(best_isa()) + 1]
#: Of the largest value: sums of up to some thousands of products, added in another order and fused
TOLERANCE = 1e-5


def test_every_fast_row_is_tried():
    tried = {op for op, _, _ in cases(0, 1)}
    assert {row.name for row in TABLE.values() if row.fast} == tried


@pytest.mark.parametrize("isa", ISAS)
def test_against_plain_kernels(isa):
    differ = 0
    for op, arrays, attrs in cases(1, 60):
        program = program_of(op, arrays, attrs)
        want = run(program, arrays, kernels="plain")
        got = run(program, arrays, kernels="fast", isa=isa)
        # Rounding is that of the sums before a clamp.
        free = {k: v for k, v in attrs.items() if k not in ("low", "high")}
        size = np.abs(
            want if free == attrs else run(program_of(op, arrays, free), arrays, kernels="plain")
        ).max()
        assert got.dtype == np.float32 or np.array_equal(got, want), (op, attrs)  # integers are exact
        worst = np.abs(got - want).max() / max(size, 1.0)
        assert worst <= TOLERANCE, (op, [np.shape(a) for a in arrays], attrs, worst)
        differ += got.tobytes() != want.tobytes()
    assert differ > 60, "the fast kernels were not run"


@pytest.mark.parametrize("isa", ISAS)
def test_threads_do_not_change_a_bit(isa):
    for op, arrays, attrs in cases(2, 25):
        program = program_of(op, arrays, attrs)
        one, *others = (run(program, arrays, kernels="fast", isa=isa, threads=t) for t in (1, 2, 3, 7))
        assert all(one.tobytes() == o.tobytes() for o in others), (op, [np.shape(a) for a in arrays], attrs)


@pytest.mark.parametrize(
    ("op", "attrs", "example"),
    [
        ("relu", {}, Example(((7, 13, 37, 11),))),
        ("add", {"low": -0.3}, Example(((7, 13, 37, 11),) * 2)),
        ("batch_norm", {"low": 0.0}, Example(((7, 13, 37, 11), *[(13,)] * 4), {}, {4: "positive"})),
        ("batch_norm", {"low": 0.0}, Example(((96, 8, 9, 9), *[(8,)] * 4), {}, {4: "positive"})),
        (
            "max_pool",
            {"kernel": (2, 2), "stride": (2, 2), "before": (0, 0), "after": (0, 0), "dilation": (1, 1)},
            Example(((7, 13, 38, 12),)),
        ),
        ("layer_norm", {}, Example(((7, 5, 1001), (1001,), (1001,)))),
    ],
)
def test_all_outputs_of_divided_ops(op, attrs, example):
    """Masks, positions and statistics too are the plain kernel's, where a word of bits would be two threads'."""
    row = TABLE[op]
    graph, feeds = one_node(row, replace(example, attrs=attrs), inputs_of(row, example, dtype=np.float32))
    want = run_c(graph, feeds)
    for threads in (2, 3, 5):
        got = run_c(graph, feeds, kernels="fast", threads=threads)
        assert {k: v.tobytes() for k, v in got.items()} == {k: v.tobytes() for k, v in want.items()}


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_is_touched_past_an_argument(isa):
    script = ROOT / "tests/runtime/fast_cases.py"
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *sys.path])}
    assert "all within bounds" in call(sys.executable, script, 3, 25, isa, env={**os.environ, **paths}).stdout


ONCE = {"stride": (1, 1), "dilation": (1, 1), "before": (0, 0), "after": (0, 0), "groups": 1}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("stride", [(1 << 16, 1 << 16), (1 << 24, 1 << 8), (641, 6700417)])
def test_strides_of_which_the_product_is_no_int(isa, stride):
    """2^32 and 2^32 + 1 must not be taken for 0 and 1."""
    rng = np.random.default_rng(3)
    x, w, d = (rng.normal(size=s).astype(np.float32) for s in ((1, 2, 5, 4), (3, 2, 3, 3), (1, 3, 1, 1)))
    attrs = ONCE | {"stride": stride}
    for op, arrays, more in (
        ("conv", [x, w], {}),
        ("conv_input_grad", [d, w], {"size": x.shape[2:]}),
        ("conv_weight_grad", [x, d], {"kernel": w.shape[2:]}),
    ):
        program = program_of(op, arrays, attrs | more)
        plain, fast = (run(program, arrays, isa=isa, kernels=k) for k in ("plain", "fast"))
        np.testing.assert_allclose(fast, plain, rtol=1e-5, atol=1e-5, err_msg=op)


@pytest.mark.parametrize("isa", ISAS)
def test_an_integer_convolution_of_one_channel_over_its_input(isa):
    """It is depthwise, so the planner lets the output have the place of the input."""
    rng = np.random.default_rng(5)
    x, w = (rng.integers(-128, 128, s).astype(np.int8) for s in ((1, 1, 9, 20), (1, 1, 3, 3)))
    graph = Graph()
    scaling = [graph.constant(n, np.array([v], np.int32), "i32") for n, v in (("m", 2**30), ("s", -7))]
    names = [graph.input("i0", x.shape, "i8"), graph.input("i1", w.shape, "i8")]
    attrs = ONCE | {"before": (1, 1), "after": (1, 1), "x_zero": 3, "y_zero": -5, "low": -128, "high": 127}
    graph.outputs["o"] = y = emit(graph, "q_conv", *names, "", *scaling, unused=(1,), **attrs)[0]
    buffers = [Buffer(["i0", y], x.size, 0, 1, 0), Buffer(["i1"], 12, 0, 1, x.size)]
    offsets, size = {"i0": 0, y: 0, "i1": x.size}, x.size + 12
    program = build({"run": Layout(graph, graph.nodes, buffers, offsets, size, size)})
    plain, fast = (run(program, [x, w], isa=isa, kernels=k) for k in ("plain", "fast"))
    apart = run(
        program_of("q_conv", [x, w, None, *(np.array([v], np.int32) for v in (2**30, -7))], attrs), [x, w]
    )
    np.testing.assert_array_equal(plain, apart)
    np.testing.assert_array_equal(fast, apart)


def test_an_integer_gradient_of_so_many_columns_that_their_product_is_no_int():
    """49 rows of them are more than an int holds: they must not be taken for few enough to lie on the stack."""
    d, w = np.array([[[[2, 3, 5]]]], np.float32), np.full((1, 1, 49, 1), 7, np.int8)
    columns, step = 43_826_200, 1 << 24
    attrs = ONCE | {"before": (24, 0), "after": (24, 0), "stride": (1, step), "size": (1, columns)}
    arrays = [d, w, np.array([0.5], np.float32)]
    program = program_of("q_conv_input_grad", arrays, attrs)
    dx = run(program, arrays, kernels="plain")[0, 0, 0]
    np.testing.assert_array_equal(dx[::step], [7.0, 10.5, 17.5])
    assert np.count_nonzero(dx) == 3


@pytest.mark.parametrize("isa", ISAS)
def test_a_last_band_that_is_shorter_than_a_vector(isa):
    """A weight gradient of 31 bands of 32 rows and one of a single point: what follows x, not a number, has no say."""
    rng = np.random.default_rng(4)
    arrays = [rng.normal(size=s).astype(np.float32) for s in ((2, 4, 993, 22), (2, 8, 993, 1))]
    program = program_of("conv_weight_grad", arrays, ONCE | {"kernel": (1, 22)}, last=0)
    session = Session(program, isa=isa, kernels="fast")
    session.arena = np.zeros(program.arena_bytes + 64, np.uint8)  # run() fills it with 0xFF
    fast = run(program, arrays, session)
    np.testing.assert_allclose(fast, run(program, arrays, isa=isa, kernels="plain"), rtol=1e-3, atol=1e-3)


def test_large_shapes():
    """Bands of rows, of columns, several images to a band."""
    rng = np.random.default_rng(0)
    same = {"stride": (1, 1), "before": (1, 1), "after": (1, 1), "dilation": (1, 1), "groups": 1}
    for x, w, attrs in (
        ((1, 24, 120, 130), (8, 24, 3, 3), same),
        ((9, 16, 4, 4), (24, 16, 3, 3), same),
        (
            (1, 8, 5000),
            (6, 8, 16),
            {"stride": (1,), "before": (7,), "after": (8,), "dilation": (1,), "groups": 1},
        ),
        (
            (1, 64, 3000),
            (4, 64, 5),
            {"stride": (2,), "before": (2,), "after": (2,), "dilation": (1,), "groups": 1},
        ),
        ((1, 1000, 9, 9), (4, 1000, 3, 3), same),
        ((2, 24, 90, 90), (24, 1, 3, 3), {**same, "groups": 24}),
    ):
        image, weight = (rng.normal(size=s).astype(np.float32) for s in (x, w))
        program = program_of("conv", [image, weight], attrs)
        d = run(program, [image, weight], kernels="plain")
        for op, arrays, more in (
            ("conv", [image, weight], {}),
            ("conv_input_grad", [d, weight], {"size": x[2:]}),
            ("conv_weight_grad", [image, d], {"kernel": w[2:]}),
        ):
            program = program_of(op, arrays, attrs | more)
            want, got, shared = (
                run(program, arrays, kernels=k, threads=t)
                for k, t in (("plain", 1), ("fast", 1), ("fast", 3))
            )
            assert np.abs(got - want).max() <= TOLERANCE * np.abs(want).max(), (op, x, w)
            assert got.tobytes() == shared.tobytes(), (op, x, w)


def test_whole_models_do_not_depend_on_threads():
    for name, plan in plans().items():
        x, y = samples(plan.model, 2 * plan.batch_size, 3)
        if plan.layouts[plan.train_entry].graph.type("y").dtype == "f32":
            y = np.eye(3, dtype=np.float32)[y]
        states = []
        for threads in (1, 2, 4):
            learner = Learner(replace(plan, threads=threads))
            states.append(learner.partial_fit(x, y)._main.state.tobytes())
        assert len(set(states)) == 1, name


def _child(session, x, queue):
    queue.put(session.run("predict", x=x)["output"].tobytes())


def test_threads_after_a_fork():
    """A forked child has none of its parent's threads, and starts its own."""
    plan = next(iter(plans().values()))
    x, _ = samples(plan.model, plan.batch_size, 3)
    session = Session(plan.program, threads=3)
    want = session.run("predict", x=x)["output"].tobytes()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(session, x, queue))
    child.start()
    assert queue.get(timeout=60) == want
    child.join(60)
    assert child.exitcode == 0 and session.run("predict", x=x)["output"].tobytes() == want


def test_plain_kernels_by_the_environment(monkeypatch):
    plan = next(iter(plans().values()))
    monkeypatch.setenv("ACCLIMATE_KERNELS", "plain")
    assert Session(plan.program).kernels == "plain"
    monkeypatch.delenv("ACCLIMATE_KERNELS")
    assert Session(plan.program).kernels == "fast"


def test_pools_come_and_go():
    plan = next(iter(plans().values()))
    x, _ = samples(plan.model, plan.batch_size, 3)
    outputs = {
        Session(plan.program, threads=t).run("predict", x=x)["output"].tobytes()
        for t in (*range(1, 9), 64) * 3
    }
    assert len(outputs) == 1
