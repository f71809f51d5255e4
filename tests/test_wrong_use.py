"""What a user may get wrong with quantising, replay, spare classes and prototypes; each says what to do."""

import numpy as np
import pytest

import acclimate
from acclimate import BadInput, WrongUse
from acclimate.zoo import digits_cnn


@pytest.fixture(scope="module")
def data():
    random = np.random.default_rng(0)
    return random.normal(size=(24, 1, 8, 8)).astype(np.float32), np.arange(24) % 10


@pytest.fixture(scope="module")
def int8(data):
    return acclimate.quantize(digits_cnn(), data[0])


def test_a_saved_graph_is_planned_as_the_one_in_memory(int8, tmp_path):
    for i, graph in enumerate((int8, acclimate.prune(digits_cnn(), connections=0.5))):
        path = tmp_path / f"{i}.npz"
        acclimate.save(graph, path)
        plans = [acclimate.plan(g, scheme="full").program.bytes for g in (graph, path)]
        assert plans[0] == plans[1]


@pytest.mark.parametrize("fake", [False, True])
def test_spare_classes_are_quantised_and_come_into_use(data, fake, tmp_path):
    x, _ = data
    model = acclimate.reserve_classes(digits_cnn(), 2)
    graph = acclimate.quantize(acclimate.fake_quantize(model, x) if fake else model, x if not fake else None)
    acclimate.save(graph, tmp_path / "model.npz")
    learner = acclimate.Learner(acclimate.plan(tmp_path / "model.npz", scheme="last"))
    assert learner.predict(x).max() < 10
    with pytest.raises(BadInput, match="not in use"):
        learner.partial_fit(x[:1], [11])
    learner.add_class(11).fit(x, np.full(len(x), 11), epochs=20, lr=0.1)
    assert set(learner.predict(x)) == {11}


def test_a_replay_is_offered_each_sample_once(data):
    x, y = data
    plan = acclimate.plan(digits_cnn(), scheme="last", batch_size=4, latent=True)
    learner = acclimate.Learner(plan, replay=acclimate.Replay(memory_bytes=65536))
    learner.partial_fit(x[:6], y[:6])
    assert (learner.buffer.seen, sorted(learner.buffer.labels)) == (6, sorted(y[:6]))
    learner.fit(x[6:12], y[6:12], epochs=3)
    assert learner.buffer.seen == 12


def test_prototypes_refuse_before_they_learn(data):
    x, y = data
    head = acclimate.Prototypes(digits_cnn(), 10)
    for bad in ([0, 10], [0, -1], [0, 0.5], [0], ["a", "b"]):
        with pytest.raises(BadInput):
            head.learn(x[:2], bad)
    for bad in (x[:0], x[0], x[:, :, :3], np.full_like(x, np.nan)):
        with pytest.raises(BadInput):
            head.predict(bad)
    assert not head.counts().any()
    assert head.learn(x, y).counts().sum() == len(x)


def test_impossible_arguments(data, int8, tmp_path):
    x, y = data
    model = digits_cnn()
    fake = acclimate.fake_quantize(model, x)
    reserved = acclimate.Learner(acclimate.plan(acclimate.reserve_classes(model, 1), scheme="last"))
    plan = acclimate.plan(model, scheme="last")
    wrong = [
        lambda: acclimate.quantize("model.onnx", x),
        lambda: acclimate.quantize(fake, bits=4),
        lambda: acclimate.quantize(fake, x),
        lambda: acclimate.quantize(model, x, method="percentile", percentile="most"),
        lambda: acclimate.plan(None),
        lambda: acclimate.plan(model, scheme="last", gradients="int8"),
        lambda: acclimate.prune(None, channels=0.5),
        lambda: acclimate.reserve_classes(None, 2),
        lambda: acclimate.reserve_classes(model, True),
        lambda: acclimate.reserve_classes(int8, 2),
        lambda: acclimate.Prototypes(int8, 2),
        lambda: acclimate.save(plan, tmp_path / "model.npz"),
        lambda: acclimate.export(model, tmp_path / "project", target="linux"),
        lambda: acclimate.Replay(memory_bytes="4KB"),
        lambda: acclimate.Replay(share="half"),
        lambda: reserved.add_class("cat"),
        lambda: reserved.add_class(2.5),
    ]
    for i, call in enumerate(wrong):
        with pytest.raises(WrongUse) as error:
            call()
        assert error.value.what, i
    with pytest.raises(BadInput, match="differ in length"):
        acclimate.quantization_report(model, x, x, y[:3])
    with pytest.raises(BadInput, match="could not be written"):
        acclimate.save(int8, tmp_path / "nowhere" / "model.npz")
    assert not list(tmp_path.iterdir())


def test_an_erased_flash_says_that_it_holds_nothing(data, tmp_path):
    learner = acclimate.Learner(acclimate.plan(digits_cnn(), scheme="last"))
    (tmp_path / "flash.bin").write_bytes(b"\xff" * 4096)
    with pytest.raises(BadInput, match="holds no slot"):
        learner.restore(tmp_path / "flash.bin")
