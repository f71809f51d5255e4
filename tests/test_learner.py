"""The Learner: the habits of scikit-learn, exactness of everything kept, and typed errors that change nothing."""

import copy
import pickle
import re

import numpy as np
import pytest
from runtime.nets import cnn, mlp, samples

from acclimate.errors import AcclimateError, BadInput, WrongUse
from acclimate.learner import Learner
from acclimate.objective import MSE, SGD, Adam, BinaryCrossEntropy, CrossEntropy
from acclimate.planner import compile_plan
from acclimate.runtime import Session

CLASSES = 3


def learner(model=None, **plan) -> Learner:
    plan = {"batch_size": 4, "optimizer": SGD(lr=0.05, momentum=0.9), **plan}
    return Learner(compile_plan(mlp() if model is None else model, **plan))


def data(count: int = 40, seed: int = 0):
    return samples(mlp(), count, CLASSES, seed)


def snapshot(it: Learner):
    """Everything that a call could change."""
    return (
        it._main.state.tobytes(),
        it._pending,
        it.lr,
        tuple(it.loss_history),
        it._saved[0].tobytes(),
        it._saved[1],
    )


KINDS = {
    "momentum": dict(optimizer=SGD(lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)),
    "adam": dict(optimizer=Adam(lr=0.02, clip_norm=1.0)),
    "channels": dict(optimizer=Adam(lr=0.02), scheme={"one.weight": [0, 3], "two.bias": None}),
    "accumulate": dict(optimizer=SGD(lr=0.05, momentum=0.9, accumulate=3)),
    "mse": dict(loss=MSE()),
    "labels": dict(loss=BinaryCrossEntropy()),
    "dropout": dict(model=cnn(), optimizer=Adam(lr=0.01)),
}


def of_kind(kind: str, count: int = 20):
    it = learner(**KINDS[kind])
    classes = 4 if kind == "dropout" else CLASSES
    x, y = samples(it.plan.model, count, classes)
    return it, x, np.eye(classes, dtype=np.float32)[y] if kind in ("mse", "labels") else y


# -- the habits of scikit-learn ------------------------------------------------------------------------------------


def test_fit_and_partial_fit_return_self():
    it, (x, y) = learner(), data()
    assert it.fit(x, y) is it and it.partial_fit(x, y) is it and it.rollback() is it
    assert it.fit(x, y, epochs=0) is it


def test_it_learns():
    it, (x, y) = learner(), data(200)
    before = it.score(x, y)
    it.fit(x, y, epochs=15)
    assert before < 0.7 and it.score(x, y) > 0.95
    assert it.loss_history[-1] < 0.2 * it.loss_history[0] and len(it.loss_history) == 15 * 50
    assert all(type(v) is float for v in it.loss_history)


@pytest.mark.parametrize("count", [1, 3, 4, 41, 300])
def test_shapes_of_predictions(count):
    it, (x, y) = learner(), data(count)
    assert it.decision_function(x).shape == (count, CLASSES) and it.decision_function(x).dtype == np.float32
    assert it.predict(x).shape == (count,) and set(it.predict(x)) <= {0, 1, 2}
    p = it.predict_proba(x)
    assert p.shape == (count, CLASSES) and p.dtype == np.float32 and (p >= 0).all()
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-6)
    np.testing.assert_array_equal(p.argmax(1), it.predict(x))
    assert it.score(x, y) == pytest.approx((it.predict(x) == y).mean())
    result = it.evaluate(x, y)
    assert result["accuracy"] == it.score(x, y) and result["samples"] == count
    assert result["loss"] == pytest.approx(-np.log(p[np.arange(count), y]).mean(), rel=1e-4)


def test_predictions_of_several_labels_and_values():
    it, x, y = of_kind("labels")
    assert it.predict(x).shape == (20, 3) and set(np.unique(it.predict(x))) <= {0, 1}
    p = it.predict_proba(x)
    np.testing.assert_array_equal(p > 0.5, it.predict(x) == 1)
    assert 0 <= it.score(x, y) <= 1
    it, x, y = of_kind("mse")
    out = it.predict(x)
    assert out.shape == (20, 3) and out.dtype == np.float32
    assert it.score(x, y) == pytest.approx(
        1 - ((out - y) ** 2).sum() / ((y - y.mean(0)) ** 2).sum(), rel=1e-5
    )
    with pytest.raises(WrongUse, match="no probabilities"):
        it.predict_proba(x)


def test_predicting_changes_nothing():
    it, (x, y) = learner(model=cnn()), samples(cnn(), 9, 4)
    before = snapshot(it)
    first = it.decision_function(x)
    it.score(x, y), it.evaluate(x, y), it.gradients(x, y), it.measured_peak_bytes(x, y), it.parameters()
    assert snapshot(it) == before
    assert it.decision_function(x).tobytes() == first.tobytes()


def test_batches_of_prediction_do_not_matter():
    """A sample's output does not depend on the samples beside it."""
    it, (x, _) = learner(model=cnn()), samples(cnn(), 300, 4)
    whole = it.decision_function(x)
    one_by_one = np.concatenate([it.decision_function(x[i : i + 1]) for i in range(0, 300, 37)])
    assert whole[::37].tobytes() == one_by_one.tobytes()


def test_fit_shuffles_by_seed():
    x, y = data()
    runs = {
        key: learner().fit(x, y, epochs=2, **args).loss_history
        for key, args in {"a": {}, "b": {"seed": 0}, "c": {"seed": 1}, "d": {"shuffle": False}}.items()
    }
    assert runs["a"] == runs["b"] != runs["c"] and runs["d"] not in (runs["a"], runs["c"])
    twice = learner().partial_fit(x, y).partial_fit(x, y)
    assert twice.loss_history == runs["d"]


def test_the_rest_of_a_data_set_is_a_smaller_batch():
    it, (x, y) = learner(), data(10)
    events = []
    it.partial_fit(x, y, callback=events.append)
    assert [e["samples"] for e in events] == [4, 8, 10]
    split = learner().partial_fit(x[:4], y[:4]).partial_fit(x[4:8], y[4:8]).partial_fit(x[8:], y[8:])
    assert snapshot(split) == snapshot(it)


def test_callbacks():
    it, (x, y) = learner(), data(8)
    events = []
    it.fit(x, y, epochs=2, callback=events.append)
    assert [(e["epoch"], e["epochs"], e["step"], e["steps"]) for e in events] == [
        (1, 2, 1, 2),
        (1, 2, 2, 2),
        (2, 2, 1, 2),
        (2, 2, 2, 2),
    ]
    assert [e["loss"] for e in events] == it.loss_history


def test_a_callback_that_raises_stops_between_steps():
    it, (x, y) = learner(), data(12)

    def stop(event):
        if event["step"] == 2:
            raise StopIteration

    with pytest.raises(StopIteration):
        it.partial_fit(x, y, callback=stop)
    assert snapshot(it) == snapshot(learner().partial_fit(x[:8], y[:8]))


def test_learning_rate_at_call_time():
    x, y = data(4)
    it = learner(optimizer=SGD(lr=0.1))
    start = it.parameters()["one.weight"]

    def moved(**args):
        it.rollback().partial_fit(x, y, **args)
        return it.parameters()["one.weight"] - start

    assert not moved(lr=0).any()
    base = moved()
    np.testing.assert_allclose(moved(lr=0.2), 2 * base, rtol=1e-4, atol=1e-7)
    assert it.lr == 0.1
    it.lr = 0.05
    np.testing.assert_allclose(moved(), base / 2, rtol=1e-4, atol=1e-7)
    assert moved(lr=np.float32(0.1)).tobytes() == moved(lr=float(np.float32(0.1))).tobytes()


@pytest.mark.parametrize(
    "convert",
    [
        lambda x, y: (x.tolist(), y.tolist()),
        lambda x, y: (x.astype(np.float64), y.astype(np.float64)),
        lambda x, y: (x, y.astype(np.uint8)),
        lambda x, y: (np.asfortranarray(x), y[:, None]),
        lambda x, y: (np.repeat(x, 2, 0)[::2], np.repeat(y, 2)[::2]),
        lambda x, y: (x.astype(">f4"), y.astype(">i8")),
        lambda x, y: (tuple(x), tuple(y)),
    ],
    ids=["lists", "float64", "uint8", "fortran", "strided", "big-endian", "tuples"],
)
def test_kinds_of_arrays(convert):
    x, y = data(10)
    xs, ys = convert(x, y)
    it = learner().partial_fit(xs, ys).fit(xs, ys)
    assert snapshot(it) == snapshot(learner().partial_fit(x, y).fit(x, y))
    assert it.score(xs, ys) == it.score(x, y) and it.predict(xs).tolist() == it.predict(x).tolist()


def test_integers_and_booleans_are_numbers():
    x, y = data(10)
    whole = (x * 3).astype(np.int64)
    assert (
        learner().partial_fit(whole, y).loss_history
        == learner().partial_fit(whole.astype(np.float32), y).loss_history
    )
    assert np.isfinite(learner().partial_fit(x > 0, y % 2 == 1).loss_history).all()


def test_inputs_are_not_changed():
    x, y = data(10)
    kept = x.copy(), y.copy()
    learner().fit(x, y, epochs=2).score(x, y)
    assert x.tobytes() == kept[0].tobytes() and y.tobytes() == kept[1].tobytes()
    x.setflags(write=False)
    learner().fit(x, y)


def test_what_is_returned_is_a_copy():
    it, (x, y) = learner(model=cnn()), samples(cnn(), 4, 4)
    before = snapshot(it)
    for array in (
        *it.parameters().values(),
        *it.statistics().values(),
        it.decision_function(x),
        *it.gradients(x, y).values(),
    ):
        array[...] = 9
    assert snapshot(it) == before
    assert (
        not (it.parameters()["conv.weight"] == 9).any()
        and not (it.plan.model.values["conv.weight"].data == 9).any()
    )


def test_two_learners_of_a_plan_do_not_share():
    plan = compile_plan(mlp(), batch_size=4)
    a, b = Learner(plan), Learner(plan)
    before = snapshot(b)
    a.fit(*data())
    assert snapshot(b) == before != snapshot(a)


# -- exactness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied", [lambda it: pickle.loads(pickle.dumps(it)), copy.deepcopy], ids=["pickle", "deepcopy"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_copied_in_the_middle_of_training(kind, copied):
    it, x, y = of_kind(kind)
    it.partial_fit(x[:15], y[:15])
    it.lr = 0.03
    other = copied(it)
    assert snapshot(other) == snapshot(it) and other is not it
    for one in (it, other):
        one.partial_fit(x, y).fit(x, y, epochs=2)
    assert snapshot(other) == snapshot(it)
    assert other.predict(x).tobytes() == it.predict(x).tobytes()
    assert snapshot(other.rollback()) == snapshot(it.rollback())


@pytest.mark.parametrize("kind", KINDS)
def test_saved_in_the_middle_of_training(kind, tmp_path):
    """Parameters, moments, counters, statistics and dropout's place: all goes on as if nothing had been."""
    it, x, y = of_kind(kind)
    it.partial_fit(x[:15], y[:15])
    it.save(tmp_path / "a.acu")
    other = learner(**KINDS[kind]).restore(tmp_path / "a.acu")
    history = list(it.loss_history)
    for one in (it, other):
        one.partial_fit(x, y)
    assert other._main.state.tobytes() == it._main.state.tobytes() and other._pending == it._pending
    assert other.loss_history == it.loss_history[len(history) :]


@pytest.mark.parametrize("kind", KINDS)
def test_rollback_is_exact(kind, tmp_path):
    it, x, y = of_kind(kind)
    fresh = snapshot(it)[:2]
    it.partial_fit(x, y)
    assert snapshot(it)[:2] != fresh
    assert snapshot(it.rollback())[:2] == fresh
    it.partial_fit(x[:15], y[:15])
    it.save(tmp_path / "a.acu")
    kept = snapshot(it)[:2]
    first = it.partial_fit(x, y).loss_history[-5:]
    it.rollback()
    assert snapshot(it)[:2] == kept
    assert it.partial_fit(x, y).loss_history[-5:] == first  # the same way again
    assert snapshot(it.rollback().rollback())[:2] == kept


def test_a_batch_of_another_size_shares_what_was_learned():
    it, (x, y) = learner(optimizer=Adam(lr=0.01)), data(11)
    it.partial_fit(x, y)
    assert it._main.view("state", "optimizer.steps")[0] == 3
    assert len(it._sessions) >= 3 and len({id(s.state) for s in it._sessions.values()}) == 1


# -- bad input -----------------------------------------------------------------------------------------------------

X, Y = data(6)


def with_x(at, value):
    x = X.copy()
    x[at] = value
    return x


BAD_X = {
    "unbatched": (X[0], "does not have the shape", r"\(6,\)", "x[None]"),
    "a column less": (X[:, :5], "does not have the shape", r"\(6, 5\)", "reshape"),
    "an axis more": (X[:, None], "does not have the shape", r"\(6, 1, 6\)", "reshape"),
    "one number": (3.0, "no samples", r"\(\)", "n > 0"),
    "empty": (X[:0], "no samples", r"\(0, 6\)", "n > 0"),
    "empty list": ([], "no samples", r"\(0,\)", "n > 0"),
    "NaN": (with_x((2, 1), np.nan), "NaN", "1 values", "drop"),
    "infinity": (with_x((2, 1), -np.inf), "NaN", "1 values", "drop"),
    "beyond float32": (with_x((2, 1), 1).astype(np.float64) * 1e300, "NaN", "values", "drop"),
    "strings": (X.astype(str), "numbers", "<U", "astype"),
    "objects": (X.astype(object), "numbers", "object", "astype"),
    "complex": (X.astype(complex), "numbers", "complex", "astype"),
    "dates": (np.zeros((6, 6), "M8[s]"), "numbers", "M8|datetime", "astype"),
    "none": (None, "no samples", r"\(\)", "n > 0"),
    "ragged": ([[1.0] * 6, [1.0] * 5] * 3, "not an array", "shape", "numpy array"),
}

BAD_Y = {
    "shorter": (Y[:5], "differ in length", r"\(5,\)", "one label"),
    "longer": (np.append(Y, 0), "differ in length", r"\(7,\)", "one label"),
    "one number": (1, "differ in length", r"\(\)", "one label"),
    "too large": (Y + 2, "outside the classes", r"classes 0\.\.2", "map"),
    "negative": (Y - 1 - Y.min(), "outside the classes", "label -1", "map"),
    "fractional": (Y + 0.5, "whole numbers", "float", ""),
    "NaN": (np.where(Y == Y[0], np.nan, Y), "whole numbers", "float", ""),
    "infinity": (np.where(Y == Y[0], np.inf, Y), "outside the classes", "inf", "map"),
    "huge": (np.full(6, 2**62), "outside the classes", str(2**62), "map"),
    "one hot": (np.eye(3)[Y], "one label a sample", r"\(6, 3\)", "binary_cross_entropy"),
    "strings": (np.array(list("abcabc")), "numbers", "<U1", "map class names"),
    "objects": (Y.astype(object), "numbers", "object", "map class names"),
    "none": (None, "differ in length", r"\(\)", "one label"),
    "ragged": ([[0], [1, 2]] * 3, "not an array", "shape", "numpy array"),
}

CALLS = {
    "partial_fit": lambda it, x, y: it.partial_fit(x, y),
    "fit": lambda it, x, y: it.fit(x, y, epochs=2),
    "score": lambda it, x, y: it.score(x, y),
    "evaluate": lambda it, x, y: it.evaluate(x, y),
    "gradients": lambda it, x, y: it.gradients(x, y),
    "measured_peak_bytes": lambda it, x, y: it.measured_peak_bytes(x, y),
}
CALLS_X = {
    "predict": lambda it, x: it.predict(x),
    "predict_proba": lambda it, x: it.predict_proba(x),
    "decision_function": lambda it, x: it.decision_function(x),
}


@pytest.fixture(scope="module")
def used() -> Learner:
    return learner().partial_fit(*data(8))


def refuse(it: Learner, call, case, error=BadInput) -> None:
    _, what, number, action = case
    before = snapshot(it)
    with pytest.raises(error, match=what) as caught:
        call()
    assert re.search(number, caught.value.number), caught.value.number
    assert action in caught.value.action
    assert snapshot(it) == before
    assert type(pickle.loads(pickle.dumps(caught.value))) is error


@pytest.mark.parametrize("call", [*CALLS, *CALLS_X])
@pytest.mark.parametrize("case", BAD_X)
def test_bad_x(used, case, call):
    x = BAD_X[case][0]
    refuse(
        used,
        (lambda: CALLS[call](used, x, Y)) if call in CALLS else (lambda: CALLS_X[call](used, x)),
        BAD_X[case],
    )


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("case", BAD_Y)
def test_bad_y(used, case, call):
    refuse(used, lambda: CALLS[call](used, X, BAD_Y[case][0]), BAD_Y[case])


@pytest.mark.parametrize("kind", ["mse", "labels"])
def test_bad_targets(kind):
    it, x, y = of_kind(kind, 6)
    nan, huge = y.copy(), y.astype(np.float64)
    nan[3, 1], huge[3, 1] = np.nan, 1e300
    cases = [
        (y[:, :2], "output's shape", r"\(6, 2\)", ""),
        (y[:5], "differ in length", r"\(5, 3\)", "one label"),
        (nan, "NaN", "1 values", ""),
        (huge, "NaN", "1 values", ""),
    ]
    if kind == "labels":
        cases += [(y * 2, r"lie in 0\.\.1", "2", "masked"), (y - 1, r"lie in 0\.\.1", "-1", "masked")]
    for case in cases:
        for call in CALLS.values():
            refuse(it, lambda call=call, case=case: call(it, x, case[0]), case)


@pytest.mark.parametrize("lr", [-1, -1e-9, np.nan, np.inf, 1e300, "fast", [0.1, 0.2], 1j], ids=str)
def test_bad_learning_rates(used, lr):
    refuse(used, lambda: used.partial_fit(X, Y, lr=lr), (lr, "learning rate", "", "lr="), WrongUse)
    refuse(used, lambda: used.fit(X, Y, lr=lr), (lr, "learning rate", "", "lr="), WrongUse)


@pytest.mark.parametrize("epochs", [-1, 1.5, "3", None])
def test_bad_epochs(used, epochs):
    refuse(used, lambda: used.fit(X, Y, epochs=epochs), (epochs, "epochs", "", "epochs="), WrongUse)


def test_a_bad_sample_at_the_end_stops_before_the_first_step(used):
    x = np.concatenate([data(40)[0], with_x((5, 0), np.nan)])
    y = np.concatenate([data(40)[1], Y])
    refuse(used, lambda: used.partial_fit(x, y), (x, "NaN", "1 values", "drop"))
    y[-1] = 7
    refuse(used, lambda: used.fit(np.nan_to_num(x), y), (y, "outside the classes", "label 7", "map"))


def test_measuring_needs_a_whole_batch(used):
    refuse(
        used,
        lambda: used.measured_peak_bytes(X[:3], Y[:3]),
        (X, "whole batch", "3 samples, batch_size 4", ""),
        WrongUse,
    )


def test_every_error_is_one_that_a_user_can_catch(used):
    for case in BAD_X.values():
        with pytest.raises(AcclimateError) as caught:
            used.fit(case[0], Y)
        assert "Next: " in str(caught.value) and caught.value.exit_code == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_diverging_run_does_not_crash(kind, tmp_path):
    """What it gives is useless, but it gives it, can be told from the loss, and can be rolled back."""
    it, x, y = of_kind(kind)
    good = it.partial_fit(x[:12], y[:12])._main.state.tobytes()
    it.save(tmp_path / "a.acu")
    for _ in range(30):
        it.partial_fit(x, y, lr=1e9)
    if kind in ("momentum", "accumulate", "mse"):
        assert not np.isfinite(it.loss_history[-1]) or it.loss_history[-1] > 1e3
    assert it.predict(x).shape[0] == 20
    it.score(x, y)
    with np.errstate(all="ignore"):
        it.gradients(x, y)
        if kind != "mse":
            it.predict_proba(x)
    assert it.rollback()._main.state.tobytes() == good
    assert np.isfinite(it.partial_fit(x, y).loss_history[-1])


def test_a_refused_label_leaves_no_trace_in_the_session():
    """The runtime's own check: whoever feeds it by hand cannot poison the state either."""
    plan = learner(model=cnn(), optimizer=Adam()).plan
    session = Session(plan.program)
    x, y = samples(cnn(), 4, 4)
    session.run("step", x=x, y=y, lr=0.1)
    before = session.state.tobytes()
    for bad in (4, -1, 2**31 - 1, -(2**31)):
        with pytest.raises(BadInput, match="label"):
            session.run("step", x=x, y=np.append(y[:3], bad), lr=0.1)
        assert session.state.tobytes() == before
    session.run("step", x=x, y=y, lr=0.1)
    assert session.state.tobytes() != before


@pytest.mark.parametrize(
    "make",
    [
        lambda: Adam(eps=float("nan")),
        lambda: Adam(eps=-1.0),
        lambda: Adam(betas=(0.9,)),
        lambda: Adam(betas="ab"),
        lambda: CrossEntropy(class_weights="abcd"),
        lambda: CrossEntropy(class_weights=np.array([1.0, -1.0])),
    ],
)
def test_numbers_that_break_learning_are_refused(make):
    with pytest.raises(WrongUse):
        make()


def test_arrays_of_class_weights():
    assert CrossEntropy(class_weights=np.ones(3)) == CrossEntropy(class_weights=(1.0, 1.0, 1.0))
    assert Adam(betas=[0.8, 0.9]) == Adam(betas=(0.8, 0.9))


@pytest.mark.parametrize(
    "wrong", [{"memory_bytes": float("nan")}, {"memory_bytes": "96KB"}, {"threads": True}, {"threads": 65}]
)
def test_limits_are_whole_numbers(wrong):
    with pytest.raises(WrongUse, match="whole number"):
        compile_plan(mlp(), **wrong)
