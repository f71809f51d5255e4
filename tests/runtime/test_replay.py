"""The replay buffer: C and Python keep the same bytes, keep what they say, and a step from latents is the step."""

import ctypes
import pickle

import numpy as np
import pytest
from runtime.nets import cnn, mlp
from test_quantized import small_net

from acclimate.errors import BadInput, WrongUse
from acclimate.learner import Learner
from acclimate.objective import SGD, Adam
from acclimate.planner import compile_plan
from acclimate.replay import CODES, KEEPS, Buffer, Replay, codebook

FLOATS = ctypes.POINTER(ctypes.c_float)


class Config(ctypes.Structure):
    _fields_ = [
        *(
            (n, ctypes.c_uint32)
            for n in ("code", "keep", "elements", "element_bytes", "capacity", "classes", "seed")
        ),
        ("scale", ctypes.c_float),
        ("zero", ctypes.c_int32),
        ("parts", ctypes.c_uint32),
        ("codes", ctypes.c_uint32),
        ("codebook", ctypes.c_void_p),
    ]


class InC:
    """The same buffer in the C library."""

    def __init__(self, library, like: Buffer) -> None:
        self.ac, self.like = ctypes.CDLL(str(library)), like
        book = like.book
        self.config = Config(
            CODES.index(like.code),
            KEEPS.index(like.keep),
            like.elements,
            1 if like.dtype == "i8" else 4,
            like.capacity,
            like.classes,
            like.seed,
            like.scale,
            like.zero,
            *((len(book), book.shape[1], book.ctypes.data) if book is not None else (0, 0, None)),
        )
        self.block = np.zeros(like.block.nbytes // 4, np.uint32).view(np.uint8)
        self.replay = ctypes.create_string_buffer(128)
        assert self.ac.ac_replay_bytes(ctypes.byref(self.config)) == like.block.nbytes
        assert self.open() == 0

    def open(self, short: int = 0) -> int:
        size = ctypes.c_size_t(self.block.nbytes - short)
        return self.ac.ac_replay_open(
            self.replay, ctypes.byref(self.config), ctypes.c_void_p(self.block.ctypes.data), size
        )

    def add(self, sample: np.ndarray, label: int) -> int:
        sample = np.ascontiguousarray(sample)
        return self.ac.ac_replay_add(self.replay, ctypes.c_void_p(sample.ctypes.data), label)

    def draw(self) -> int:
        return self.ac.ac_replay_draw(self.replay)

    def get(self, index: int) -> tuple[np.ndarray, int] | None:
        to = np.full(self.like.shape, 7, np.int8 if self.like.dtype == "i8" else np.float32)
        label = ctypes.c_uint32(0)
        if self.ac.ac_replay_get(self.replay, index, ctypes.c_void_p(to.ctypes.data), ctypes.byref(label)):
            return None
        return to, label.value


def stream(count: int, elements: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Samples of classes that come unequally often, one after another and mixed."""
    rng = np.random.default_rng(seed)
    y = np.minimum(rng.geometric(0.5, count) - 1, classes - 1)
    y[count // 2 :] = np.sort(y[count // 2 :])
    return (rng.normal(size=(count, elements)) * 3 + y[:, None]).astype(np.float32), y


def buffers() -> dict[str, Buffer]:
    x, _ = stream(300, 24, 5)
    book = codebook(x, 6, 16)
    made = {}
    for keep in KEEPS:
        made[f"int8-{keep}"] = Buffer((2, 12), 5, 37, "int8", keep, 3, 0.05, -11)
        if keep != "diverse":
            made[f"pq-{keep}"] = Buffer((24,), 5, 19, "pq", keep, 4, book=book)
            made[f"raw-{keep}"] = Buffer((24,), 5, 20, "raw", keep, 5)
        made[f"i8-{keep}"] = Buffer((24,), 5, 21, "raw", keep, 6, dtype="i8")
    made["one"] = Buffer((24,), 5, 1, "int8", "diverse", 1, 0.1)
    return made


@pytest.mark.parametrize("name", buffers())
def test_c_keeps_the_same_bytes(library, name):
    twin = buffers()[name]
    c = InC(library, twin)
    x, y = stream(700, 24, 5, seed=1)
    x[5] *= 1e30  # what saturates
    x[200, :3] = [np.inf, -np.inf, np.nan] if twin.code == "int8" else 0
    x = np.clip(x, -128, 127).astype(np.int8) if twin.dtype == "i8" else x
    with np.errstate(invalid="ignore", over="ignore"):
        for i, (sample, label) in enumerate(zip(x, y, strict=True)):
            assert c.add(sample, int(label)) == twin.add(sample.reshape(twin.shape), int(label))
            if i % 50 == 0 or i > 600:
                assert c.block.tobytes() == twin.block.tobytes(), i
                assert c.draw() == twin.draw()
    for i in range(len(twin)):
        (a, b), (p, q) = c.get(i), twin.get(i)
        assert a.tobytes() == p.tobytes() and b == q
    assert c.get(len(twin)) is None and c.add(x[0], 5) == -1
    assert c.block.tobytes() == twin.block.tobytes() and twin.seen == 700
    again = Buffer(twin.shape, 5, twin.capacity, twin.code, twin.keep, twin.seed, twin.scale, twin.zero, twin.book,
                   twin.dtype, c.block.copy())  # fmt: skip
    assert again.draw() == c.draw() == twin.draw()


def test_a_damaged_block_is_refused(library):
    rng = np.random.default_rng(0)
    x, y = stream(100, 24, 5)
    refused = 0
    for name in ("int8-diverse", "pq-balanced"):
        twin = buffers()[name]
        c = InC(library, twin)
        for sample, label in zip(x, y, strict=True):
            twin.add(sample.reshape(twin.shape), int(label))
        good = twin.block.copy()
        for _ in range(300):
            c.block[:] = good
            at = int(rng.integers(0, 12 if rng.random() < 0.3 else len(good)))
            c.block[at] = rng.integers(0, 256)
            try:
                again = Buffer(twin.shape, 5, twin.capacity, twin.code, twin.keep, twin.seed, twin.scale, twin.zero,
                               twin.book, twin.dtype, c.block.copy())  # fmt: skip
            except BadInput:
                assert c.open() == 15  # AC_E_VALUE
                refused += 1
                continue
            assert c.open() == 0
            for i in range(20):
                assert c.add(x[i], int(y[i])) == again.add(x[i].reshape(twin.shape), int(y[i]))
            assert c.block.tobytes() == again.block.tobytes()
    assert refused > 20
    assert c.open(short=1) == 19  # AC_E_ROOM


def test_what_each_keeps():
    x, y = stream(2000, 8, 5)
    counts = {}
    for keep in KEEPS:
        buffer = Buffer((8,), 5, 60, "int8", keep, 0, 0.1)
        for sample, label in zip(x, y, strict=True):
            buffer.add(sample, int(label))
        counts[keep] = np.bincount(buffer.labels, minlength=5)
        assert len(buffer) == 60
        if keep == "diverse":
            spread = buffer
    assert (counts["balanced"] == 12).all()
    share = np.bincount(y) / len(y)
    assert abs(counts["reservoir"] / 60 - share).max() < 0.15 and counts["reservoir"][0] > 20
    random = x[np.random.default_rng(0).permutation(2000)[:60]]
    held = np.stack([spread.get(i)[0] for i in range(60)])

    def least(points: np.ndarray) -> float:
        d = ((points[:, None] - points[None]) ** 2).sum(-1) + np.eye(60) * 1e9
        return float(d.min())

    assert least(held) > 3 * least(random)


def test_reservoir_is_fair():
    """Each sample of the stream is kept equally often: chi-squared over 300 seeds."""
    kept = np.zeros(40)
    for seed in range(300):
        buffer = Buffer((1,), 1, 10, "raw", "reservoir", seed)
        for i in range(40):
            buffer.add(np.array([i], np.float32), 0)
        for i in range(10):
            kept[int(buffer.get(i)[0][0])] += 1
    expected = 300 * 10 / 40
    assert ((kept - expected) ** 2 / (expected * 0.75)).sum() < 39 + 4 * np.sqrt(2 * 39)


def test_codes_are_close():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 32)).astype(np.float32)
    x[:, 1::2] = x[:, ::2] * 0.5  # parts of a latent go together
    for replay, limit in ((Replay(code="int8"), 2e-4), (Replay(code="pq", parts=16, codes=64), 0.02)):
        buffer = replay.buffer(x, 2)
        for sample in x[:50]:
            buffer.add(sample, 1)
        error = np.mean([(buffer.get(i)[0] - x[i]) ** 2 for i in range(50)]) / np.mean(x**2)
        assert error < limit, (replay.code, error)
        assert buffer.block.nbytes <= 8192
    assert Replay(code="pq", parts=16, codes=64).buffer(x, 2).capacity > 1.5 * Replay().buffer(x, 2).capacity


def test_what_cannot_be():
    x = np.zeros((10, 12), np.float32)
    for arguments in (
        {"code": "zip"}, {"keep": "newest"}, {"share": 1.0}, {"share": 0}, {"memory_bytes": 20},
        {"code": "pq", "parts": 5}, {"code": "pq", "codes": 64, "parts": 4}, {"code": "raw", "keep": "diverse"},
        {"code": "pq", "parts": 4, "codes": 4, "keep": "diverse"},
    ):  # fmt: skip
        with pytest.raises(WrongUse):
            Replay(**arguments).buffer(x, 3)


# -- steps from latents ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [SGD(momentum=0.9), Adam(), SGD(accumulate=2)])
@pytest.mark.parametrize("model", [cnn(train=False), mlp()])
def test_a_step_from_latents_is_the_step(model, optimizer):
    """The frozen front, then the rest: the same loss and state bit for bit, and the front alone in "features"."""
    plan = compile_plan(model, scheme="last", optimizer=optimizer, batch_size=4, latent=True)
    rng = np.random.default_rng(0)
    learner, other = Learner(plan, "plain"), Learner(plan, "plain", Replay(memory_bytes=4096))
    for _ in range(5):
        x = rng.normal(size=(4, *model.shape("x")[1:])).astype(np.float32)
        y = rng.integers(0, 3, 4).astype(np.int32)
        latent = other._kept_as(x)
        assert latent.shape[0] == 4 and latent[0].size in (48, 5)
        assert learner._step(x, y, 0.1) == other._step(latent, y, 0.1, "_latent")
        assert learner._main.state.tobytes() == other._main.state.tobytes()
    features = plan.layouts["features"]
    work = plan.layouts[plan.train_entry]
    assert len(features.nodes) < len(work.nodes) and "y" not in features.graph.inputs
    assert not any(v.kind == "parameter" for v in features.graph.values.values())


@pytest.mark.parametrize("code", ["int8", "pq"])
def test_latents_of_integers(code):
    """A quantised model's latents are int8 already: kept as they are, and the step from them is the step."""
    model = small_net(batch=1)
    learned = {"head.weight": None, "head.bias": None}
    plan = compile_plan(model, scheme=learned, optimizer="sgd", batch_size=4, latent=True)
    rng = np.random.default_rng(0)
    x, y = rng.integers(-128, 128, (12, 3, 8, 8)).astype(np.int8), rng.integers(0, 5, 12).astype(np.int32)
    learner, other = (Learner(plan, "plain", Replay(1024, code, parts=2, codes=4)) for _ in range(2))
    latent = learner._kept_as(x)
    assert latent.dtype == np.int8
    if code == "pq":
        with pytest.raises(WrongUse, match="int8"):
            learner.remember(x, y)
        return
    learner.remember(x, y)
    assert learner.buffer.dtype == "i8" and (learner.buffer.get(3)[0] == latent[3]).all()
    for i in range(0, 12, 4):
        assert learner._step(x[i : i + 4], y[i : i + 4], 0.5) == other._step(
            latent[i : i + 4], y[i : i + 4], 0.5, "_latent"
        )
        assert learner._main.state.tobytes() == other._main.state.tobytes()
    assert learner._main.state.tobytes() != Learner(plan)._main.state.tobytes()
    before = learner.parameters()["head.weight"].copy()
    learner.fit(x, y, epochs=3, lr=0.5)
    assert (learner.parameters()["head.weight"] != before).any()


def test_latents_come_without_batch_statistics():
    """A front in training mode is taken as it predicts: latents kept must not change with the batch they came in."""
    plan = compile_plan(cnn(train=True), scheme="last", batch_size=4, latent=True, optimizer="sgd")
    x = np.random.default_rng(0).normal(size=(4, 1, 8, 8)).astype(np.float32)
    learner = Learner(plan, replay=Replay())
    both, one = learner._kept_as(x), np.concatenate([learner._kept_as(x[i : i + 1]) for i in range(4)])
    np.testing.assert_allclose(both, one, rtol=1e-5, atol=1e-6)


def test_nothing_frozen():
    with pytest.raises(WrongUse, match="nothing is frozen"):
        compile_plan(mlp(), scheme="full", latent=True)
    plan = compile_plan(mlp(), scheme="full", batch_size=4)
    with pytest.raises(WrongUse, match="no entries"):
        Learner(plan, replay=Replay())
    with pytest.raises(WrongUse, match="class"):
        Learner(compile_plan(mlp(), loss="mse"), replay=Replay(latent=False))
    with pytest.raises(WrongUse, match="room"):
        Learner(compile_plan(mlp()), replay=Replay(latent=False)).partial_fit(
            np.zeros((2, 6)), np.zeros(2, int)
        )
    with pytest.raises(WrongUse, match="no replay"):
        Learner(plan).remember(np.zeros((2, 6)), np.zeros(2, int))


@pytest.mark.parametrize("latent", [True, False])
def test_replay_keeps_what_was_known(latent):
    """Two classes first, then a third alone: without replay the first two are forgotten, with 2 KB they are not."""
    rng = np.random.default_rng(0)
    centres = np.random.default_rng(3).normal(size=(3, 6)) * 3
    y = np.repeat([0, 1, 2], 80)
    x = (centres[y] + rng.normal(size=(240, 6))).astype(np.float32)
    old, new = y < 2, y == 2
    scores = {}
    for name, replay in (("none", None), ("replay", Replay(2048, latent=latent))):
        plan = compile_plan(mlp(hidden=16), scheme="last" if latent else "full", batch_size=8, latent=latent)
        learner = Learner(plan, replay=replay)
        if replay is not None:
            learner.remember(x[old][:8], y[old][:8])
        learner.fit(x[old], y[old], epochs=8, lr=0.1)
        assert learner.score(x[old], y[old]) > 0.9
        learner.fit(x[new], y[new], epochs=20, lr=0.1)
        scores[name] = learner.score(x[old], y[old]), learner.score(x[new], y[new])
    assert scores["none"][0] < 0.7 and scores["none"][1] == 1
    assert scores["replay"][0] > 0.9 and scores["replay"][1] > 0.9
    assert learner.buffer.block.nbytes <= 2048
    copy = pickle.loads(pickle.dumps(learner))
    for one in (copy, learner):
        one.partial_fit(x[new], y[new])
    assert copy.buffer.block.tobytes() == learner.buffer.block.tobytes()
    assert copy._main.state.tobytes() == learner._main.state.tobytes()
