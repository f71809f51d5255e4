"""Memory of integer training: published update sets, tensors that the state holds a part of."""

from dataclasses import replace

import numpy as np
import pytest
from cases import run_c, run_poisoned
from mcunet import mcunet, needs_mcunet
from overlaps import assert_no_overlap
from test_quantized import conv, small_net

import acclimate
from acclimate import blocks, delta, layout, passes, schemes
from acclimate.errors import BadInput, WrongUse
from acclimate.grad import Channels, UpdateSet
from acclimate.ir import Dim, Graph, Quant
from acclimate.layout import arrange
from acclimate.ops import TABLE, emit, evaluate, verify
from acclimate.ops.quantized import add_attrs
from acclimate.passes import freeze
from acclimate.planner import compile_plan
from acclimate.runtime import Session

TTE = ("49kb", "74kb", "99kb", "124kb", "148kb")


def plan_of(name, **options):
    return compile_plan(mcunet(), "stm32f7", f"tte:{name}", must_fit=False, **options)


# -- schemes -------------------------------------------------------------------------------------------------------


def label_kib(graph, update_set):
    """The figure that a published set is called after: what learns, and what is saved for it, the head's input too."""
    total = 0
    layers = [(n, *n.inputs[1:3]) for n in graph.nodes if TABLE[n.op].roles.get(1) == "weight"]
    *convs, head = layers
    for node, weight, bias in convs:
        if weight in update_set.tensors:
            channels, shape = update_set.tensors[weight], graph.shape(weight)
            count = shape[1] if channels is None else len(channels.index)
            total += shape[0] * count + count * np.prod(graph.shape(node.inputs[0])[2:])
        if bias in update_set.tensors:
            total += 4 * graph.type(bias).size + graph.type(node.outputs[0]).size / 8
    return (total + graph.type(head[0].inputs[0]).size) / 1024


@needs_mcunet
@pytest.mark.parametrize(("name", "kib"), [*zip(TTE, (49.8, 74.8, 99.8, 125.0, 148.4), strict=True)])
def test_published_sets_take_what_their_names_say(name, kib):
    graph = mcunet()
    for pick in ("", ",first"):
        update_set = schemes.resolve(f"tte:{name}{pick}").choose(graph)
        assert round(label_kib(graph, update_set), 1) == kib
        assert {"classifier.weight", "classifier.bias"} < set(update_set.tensors)


@needs_mcunet
def test_channels_are_the_largest_of_what_the_weights_stand_for():
    graph = mcunet()
    chosen = schemes.resolve("tte:49kb").choose(graph).tensors["8.pointwise1.weight"]
    value = graph.values["8.pointwise1.weight"]
    norms = np.square(value.quant.real(value.data)).sum((0, 2, 3))
    assert sorted(norms[list(chosen.index)]) == sorted(norms)[-12:]
    assert list(chosen.index) != list(range(12))
    assert schemes.resolve("tte:49kb,first").choose(graph).tensors["8.pointwise1.weight"].index == tuple(
        range(12)
    )


def test_a_published_set_is_refused_for_other_models():
    with pytest.raises(WrongUse, match="does not fit this model"):
        acclimate.plan(small_net(), scheme="tte:49kb")
    with pytest.raises(WrongUse, match="tte:49kb"):
        acclimate.plan(small_net(), scheme="tte:50kb")


def test_a_sparse_update_of_any_model():
    update = schemes.Sparse(2, {2: 0.25}).choose(small_net())
    assert update.names() == ["d.bias", "p.weight", "p.bias", "head.weight", "head.bias"]
    assert len(update.tensors["p.weight"].index) == 2


# -- a part in RAM, the rest in flash ------------------------------------------------------------------------------

PART = {"a.weight": Channels(1, (2,)), "p.weight": Channels(1, (6, 1, 4)), "head.bias": None}


def learned(update, steps=6, gradients="float32", **options):
    graph = small_net(5)
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, (2 * steps, 3, 8, 8)).astype(np.float32), rng.integers(0, 5, 2 * steps)
    plan = acclimate.plan(
        graph,
        scheme=UpdateSet(update),
        batch_size=2,
        optimizer=acclimate.SGD(lr=0.5, **options),
        gradients=gradients,
    )
    return acclimate.Learner(plan, "plain").partial_fit(x, y), x, y


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9}, {"rounding": "residual"}, {"accumulate": 2}, {"gradients": "int16"}],
    ids=str,
)
def test_the_state_holds_what_learns_and_no_more(options):
    some, x, y = learned(PART, **options)
    whole, *_ = learned(dict.fromkeys(PART), **options)
    state = some.plan.program.entries["state"]
    assert state["p.weight"].type.shape == (8, 3, 1, 1) and state["a.weight"].type.shape == (8, 1, 3, 3)
    assert some.plan.state_bytes < whole.plan.state_bytes
    trained = some.plan.model.values["p.weight"].data
    now = some.parameters()["p.weight"]
    assert now.shape == trained.shape
    assert np.array_equal(now[:, [0, 2, 3, 5, 7]], trained[:, [0, 2, 3, 5, 7]])
    assert not np.array_equal(now[:, [1, 4, 6]], trained[:, [1, 4, 6]])
    fresh = acclimate.Learner(whole.plan, "plain")
    every, part = fresh.gradients(x[:2], y[:2]), acclimate.Learner(some.plan, "plain").gradients(x[:2], y[:2])
    for name, channels in PART.items():
        index = slice(None) if channels is None else (slice(None), sorted(channels.index))
        assert np.array_equal(part[name][index], every[name][index]), name
        assert channels is None or np.count_nonzero(part[name]) == np.count_nonzero(part[name][index])


def test_deltas_of_parts(tmp_path):
    """Between plans whose parts differ: what fits is taken over, what would change flash is refused."""
    some, x, _ = learned(PART)
    some.save(tmp_path / "some.acu")
    records = {r.name: r for r in delta.decode((tmp_path / "some.acu").read_bytes())[1]}
    assert records["p.weight"].channels == Channels(1, (1, 4, 6))
    for update in (
        dict.fromkeys(PART),
        {**PART, "p.weight": Channels(1, (0, 1, 4, 6, 7))},
        {**PART, "p.weight": Channels(1, (1, 4, 6)), "d.bias": None},
    ):
        plan = acclimate.plan(some.plan.model, scheme=UpdateSet(update), batch_size=2)
        other = acclimate.Learner(plan, "plain").restore(tmp_path / "some.acu")
        assert np.array_equal(other.decision_function(x), some.decision_function(x))
        other.save(tmp_path / "other.acu")  # and back, with records of other channels or of whole tensors
        back = acclimate.Learner(some.plan, "plain").restore(tmp_path / "other.acu")
        assert np.array_equal(back.decision_function(x), some.decision_function(x))
    plan = acclimate.plan(
        some.plan.model, scheme=UpdateSet({**PART, "p.weight": Channels(1, (1, 4))}), batch_size=2
    )
    with pytest.raises(BadInput, match="keeps constant"):
        acclimate.Learner(plan, "plain").restore(tmp_path / "some.acu")


def test_part_of_axis_0_stays_whole():
    learner, *_ = learned({"p.weight": Channels(0, (1, 3))})
    assert learner.plan.program.entries["state"]["p.weight"].type.shape == (8, 8, 1, 1)


# -- blocks of convolutions, a few rows at a time -------------------------------------------------------------------


def chain_net(rng):
    """Random convolutions one after another, some depthwise, some in residual branches."""
    graph = Graph(2)
    size = int(rng.integers(7, 14))
    q = (0.02, int(rng.integers(-9, 9)))
    x = graph.input("x", (Dim(1, 2), 3, size, size + 1), "i8", Quant(*q))
    for i in range(int(rng.integers(3, 9))):
        kind, to = rng.integers(0, 4), (0.03, int(rng.integers(-9, 9)))
        c = graph.shape(x)[1]
        if kind == 0:  # a residual branch
            a = conv(graph, x, q, f"{i}a", 5, 1, to, rng, before=(0, 0), after=(0, 0))
            d = conv(graph, a, to, f"{i}d", 5, 3, to, rng, groups=5)
            p = conv(graph, d, to, f"{i}p", c, 1, to, rng, before=(0, 0), after=(0, 0))
            pair = (x, p) if rng.random() < 0.5 else (p, x)
            scales = [q if n == x else to for n in pair]
            x, q = emit(graph, "q_add", *pair, **add_attrs(*scales, (0.05, 1))), (0.05, 1)
        elif kind == 1:
            k = int(rng.choice([3, 5, 7]))
            stride = (int(rng.integers(1, 3)),) * 2
            x, q = (
                conv(
                    graph,
                    x,
                    q,
                    f"{i}",
                    c,
                    k,
                    to,
                    rng,
                    groups=c,
                    stride=stride,
                    before=(k // 2,) * 2,
                    after=(k // 2,) * 2,
                ),
                to,
            )
        else:
            x, q = conv(graph, x, q, f"{i}", int(rng.integers(2, 9)), 1 + 2 * int(kind == 2), to, rng), to
        if min(graph.shape(x)[2:]) < 3:
            break
    graph.outputs["output"] = x
    return verify(graph)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("share", [0.0, 0.6, 0.9])
def test_blocks_give_the_same_integers(seed, share):
    """C against numpy, which knows no rows; as few rows as can be, and some more."""
    rng = np.random.default_rng(seed)
    graph = freeze(chain_net(rng), set())
    plain = arrange(graph)
    fused = blocks.fuse(graph, int(plain.arena_bytes * share))
    lean = arrange(fused)
    assert lean.arena_bytes <= plain.arena_bytes
    assert (
        share
        or any(n.op == "q_block" for n in fused.nodes)
        or not any(len(r.nodes) > 1 for r in blocks.runs(graph))
    )
    x = rng.integers(-128, 128, graph.shape("x")).astype(np.int8)
    want = evaluate(graph, {"x": x})[graph.outputs["output"]]
    assert np.array_equal(run_c(fused, {"x": x}, layout=lean)["output"], want)
    assert np.array_equal(evaluate(fused, {"x": x})[fused.outputs["output"]], want)


@needs_mcunet
def test_mcunet_in_blocks():
    graph = freeze(mcunet(), set())
    fused = blocks.fuse(graph)
    plain, rows = arrange(graph), arrange(fused)
    assert plain.arena_bytes == 163840
    assert rows.arena_bytes <= 79000
    assert [len(r.nodes) for r in blocks.runs(graph)][:3] == [6, 3, 3]
    x = np.random.default_rng(0).integers(-128, 128, graph.shape("x")).astype(np.int8)
    want = run_c(graph, {"x": x}, layout=plain)["output"]
    assert np.array_equal(run_c(fused, {"x": x}, layout=rows)["output"], want)
    assert len(np.unique(want)) > 3


# -- a whole step --------------------------------------------------------------------------------------------------


def apart(monkeypatch):
    """Plans as they would be without blocks, joint updates and convolutions in place."""
    monkeypatch.setattr(blocks, "fuse", lambda graph, room_bytes=0: graph)
    monkeypatch.setattr(passes, "PIPELINE", tuple(p for p in passes.PIPELINE if p is not passes.join_updates))
    rows = {n: replace(r, in_place=() if r.in_place_if else r.in_place) for n, r in TABLE.items()}
    monkeypatch.setattr(layout, "TABLE", rows)


def compare_steps(monkeypatch, plan, x, y):
    """Three steps leave the same bits in the state with all that saves memory and without it."""
    lean = acclimate.Learner(plan, kernels="plain").partial_fit(x, y)
    apart(monkeypatch)
    plain = acclimate.Learner(replace(plan), kernels="plain").partial_fit(x, y)
    assert plain.plan.arena_bytes >= plan.arena_bytes
    assert lean.loss_history == plain.loss_history
    for name, array in plain.parameters().items():
        assert np.array_equal(lean.parameters()[name], array), name
    assert lean._main.state.tobytes() == plain._main.state.tobytes()
    first = acclimate.Learner(plan, "plain").gradients(x[:1], y[:1])
    for name, g in acclimate.Learner(plain.plan, "plain").gradients(x[:1], y[:1]).items():
        assert np.array_equal(first[name], g), name
    return lean


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        {"rounding": "residual"},
        {"rounding": "stochastic"},
    ],
    ids=str,
)
def test_what_saves_memory_changes_no_bit(monkeypatch, options):
    graph, rng = small_net(9, 4), np.random.default_rng(1)
    optimizer = acclimate.SGD(lr=0.3, **options)
    update = UpdateSet(
        {"d.weight": None, "p.weight": Channels(1, (0, 3)), "p.bias": None, "head.weight": None}
    )
    plan = acclimate.plan(graph, scheme=update, batch_size=4, optimizer=optimizer)
    assert any(n.op == "q_conv_sgd" for n in plan.layouts["step"].nodes)
    x, y = rng.normal(0, 1, (12, 3, 8, 8)).astype(np.float32), rng.integers(0, 5, 12)
    compare_steps(monkeypatch, plan, x, y)


def photos(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(-128, 128, (count, 3, 128, 128)).astype(np.int8), rng.integers(0, 10, count)


@needs_mcunet
def test_mcunet_step_changes_no_bit(monkeypatch):
    lean = compare_steps(monkeypatch, plan_of("49kb", optimizer=acclimate.SGD(lr=0.05)), *photos(3))
    moved = lean.parameters()["9.pointwise1.weight"] != lean.plan.model.values["9.pointwise1.weight"].data
    assert moved.any() and moved.any((0, 2, 3)).sum() <= 24
    assert lean.plan.arena_bytes <= 91148


@needs_mcunet
@pytest.mark.parametrize("name", ["49kb", "148kb"])
def test_no_dead_byte_is_read(name):
    plan = plan_of(name, optimizer=acclimate.SGD(lr=0.05))
    step = plan.layouts["step"]
    assert_no_overlap(step)
    (x, y), lr = photos(1), np.float32([0.05])
    sessions = [Session(plan.program, kernels="plain") for _ in range(2)]
    sessions[0].run("step", x=x, y=y, lr=lr)
    run_poisoned(sessions[1], step, x=x, y=y, lr=lr)
    assert sessions[0].state.tobytes() == sessions[1].state.tobytes()


#: bytes of the arena and of all RAM on a Cortex-M7 that a step on one image of 128 x 128 may take
BYTES = {
    "49kb": (91148, 125304),
    "74kb": (98828, 150968),
    "99kb": (101004, 176344),
    "124kb": (101644, 201112),
    "148kb": (102284, 224344),
}


@needs_mcunet
@pytest.mark.parametrize("name", TTE)
def test_bytes_of_a_training_step(name):
    plan = plan_of(name)
    arena, total = BYTES[name]
    assert plan.arena_bytes <= arena and plan.peak_bytes <= total
    assert plan.peak_bytes == plan.arena_bytes + plan.state_bytes + plan.device.runtime_ram_bytes
    assert total <= {"49kb": 160 << 10, "148kb": 256 << 10}.get(name, 256 << 10)
    learner = acclimate.Learner(plan, kernels="plain")
    assert learner.measured_peak_bytes(*photos(1)) <= arena


@needs_mcunet
def test_bytes_with_gradients_in_blocks():
    plan = plan_of("49kb", gradients="int16")
    assert plan.arena_bytes <= 77320 and plan.peak_bytes <= 111476
    plan = plan_of("148kb", gradients="int16")
    assert plan.arena_bytes <= 92300 and plan.peak_bytes <= 214360
