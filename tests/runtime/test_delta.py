"""The delta in C: reads what Python writes and the other way round, refuses what Python refuses, never half-loads."""

import ctypes
import struct
import zlib

import numpy as np
import pytest
from runtime.nets import plans, samples
from test_memory import PART, learned

from acclimate import delta
from acclimate.errors import BadInput
from acclimate.learner import Learner

SINK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
PLANS = plans()


class CLearner:
    """A Program and its state in the C library, as a product in C has them."""

    def __init__(self, library, plan) -> None:
        self.ac = ctypes.CDLL(str(library))
        self.ac.ac_status_text.restype = ctypes.c_char_p
        self.plan, raw = plan, plan.program.bytes
        self.code, self.program = ctypes.create_string_buffer(raw, len(raw)), ctypes.create_string_buffer(512)
        self.state = np.zeros(plan.program.state_bytes // 4, np.uint32).view(np.uint8)
        self.memory = (ctypes.c_void_p * 3)(self.state.ctypes.data, self.state.ctypes.data, None)
        assert self.ac.ac_load(self.program, self.code, ctypes.c_size_t(len(raw))) == 0
        assert self.ac.ac_reset(self.program, self.memory) == 0

    def save(self, pending: int = 0, fail_at: int = -1) -> bytes | str:
        parts: list[bytes] = []
        size = ctypes.c_uint32(0)

        def take(_, data, count):
            parts.append(ctypes.string_at(data, count))
            return len(parts) == fail_at

        status = self.ac.ac_delta_save(self.program, self.memory, pending, None, None, ctypes.byref(size))
        wrote = self.ac.ac_delta_save(self.program, self.memory, pending, SINK(take), None, None)
        if wrote:
            return self.ac.ac_status_text(wrote).decode()
        assert status == 0 and size.value == len(b"".join(parts))
        return b"".join(parts)

    def load(self, raw: bytes, pending: bool = True) -> int | str:
        """The count of pending micro-batches, or the reason of the refusal."""
        waiting = ctypes.c_uint32(7)
        to = ctypes.byref(waiting) if pending else None
        status = self.ac.ac_delta_load(self.program, self.memory, raw, ctypes.c_size_t(len(raw)), to)
        return self.ac.ac_status_text(status).decode() if status else waiting.value


def trained(plan, steps: int = 3) -> Learner:
    x, y = samples(plan.model, steps * plan.batch_size, 3)
    if type(plan.loss).__name__ != "CrossEntropy":
        y = np.eye(3, dtype=np.float32)[y]
    return Learner(plan).partial_fit(x, y)


def saved(learner: Learner, path) -> bytes:
    learner.save(path)
    return path.read_bytes()


@pytest.mark.parametrize("name", PLANS)
def test_both_ways(name, library, tmp_path):
    plan = PLANS[name]
    learner = trained(plan, 4)
    raw = saved(learner, tmp_path / "python.acu")
    c = CLearner(library, plan)
    assert c.load(raw) == learner._pending
    assert c.state.tobytes() == learner._main.state.tobytes()
    back = c.save(learner._pending)
    (tmp_path / "c.acu").write_bytes(back)
    again = Learner(plan).restore(tmp_path / "c.acu")
    assert again._main.state.tobytes() == learner._main.state.tobytes() and again._pending == learner._pending
    assert len(back) <= len(raw)
    assert CLearner(library, plan).save() == delta.encode([], plan.model_hash), (
        "nothing learned, nothing kept"
    )


def test_rows_that_did_not_change_are_left_out(library):
    plan = PLANS["mlp-sgd"]
    c = CLearner(library, plan)
    place = plan.program.entries["state"]["one.weight"]
    weights = (
        c.state[place.offset : place.offset + 4 * place.type.size].view(np.float32).reshape(place.type.shape)
    )
    weights[[0, 3]] += 1
    _, (record,) = delta.decode(c.save())
    assert record.name == "one.weight" and record.channels.axis == 0 and record.channels.index == (0, 3)
    assert (record.data.reshape(2, -1) == weights[[0, 3]]).all()
    weights += 1
    _, (record,) = delta.decode(c.save())
    assert record.channels is None and (record.data.reshape(weights.shape) == weights).all()


def test_channels_of_any_axis_and_order(library):
    plan = PLANS["mlp-sgd"]
    model = plan.model_hash
    shape = plan.model.shape("one.weight")
    for channels in (delta.Channels(1, (4, 0, 2)), delta.Channels(1, (1, 5)), delta.Channels(0, (4, 1))):
        kept = [s if d != channels.axis else len(channels.index) for d, s in enumerate(shape)]
        record = delta.Record("one.weight", np.arange(np.prod(kept), dtype=np.float32), channels)
        c = CLearner(library, plan)
        assert c.load(delta.encode([record], model)) == 0
        place = plan.program.entries["state"]["one.weight"]
        got = c.state[place.offset :].view(np.float32)[: place.type.size].reshape(shape)
        assert (got == record.apply(plan.model.values["one.weight"].data)).all()


BIAS = delta.Record("one.bias", np.ones(5, np.float32))


@pytest.mark.parametrize(
    ("records", "why"),
    [
        ([delta.Record("other", np.zeros(3, np.float32))], "does not fit"),
        ([delta.Record("", np.zeros(3, np.float32))], "does not fit"),
        ([delta.Record("one.bia", np.ones(5, np.float32))], "does not fit"),
        ([delta.Record("one.bias\0", np.ones(5, np.float32))], "does not fit"),
        ([delta.Record("one.bias", np.ones(4, np.float32))], "does not fit"),
        ([delta.Record("one.bias", np.ones(5, np.int32), None, "i32")], "does not fit"),
        ([BIAS, BIAS], "does not fit"),
        ([delta.Record("one.bias", np.float32([0, 0, np.nan, 0, 0]))], "NaN"),
        ([delta.Record("one.bias", np.float32([0, 0, -np.inf, 0, 0]))], "NaN"),
        ([delta.Record("one.bias", np.ones(1, np.float32), delta.Channels(0, (5,)))], "does not fit"),
        ([delta.Record("one.bias", np.ones(2, np.float32), delta.Channels(0, (1, 1)))], "does not fit"),
        ([delta.Record("one.bias", np.ones(3, np.float32), delta.Channels(0, (2, 1, 2)))], "does not fit"),
        (
            [delta.Record("one.bias", np.ones(6, np.float32), delta.Channels(0, (0, 1, 2, 3, 4, 0)))],
            "does not fit",
        ),
        ([delta.Record("one.bias", np.ones(1, np.float32), delta.Channels(1, (0,)))], "does not fit"),
        ([delta.Record("one.bias", np.ones(2, np.float32), delta.Channels(0, (0,)))], "does not fit"),
        ([delta.Record("optimizer.pending", np.ones(1, np.int32), None, "i32")], "does not fit"),
    ],
)
def test_what_does_not_fit_changes_nothing(library, records, why):
    plan = PLANS["mlp-sgd"]
    good = delta.Record("two.bias", np.full(3, 9, np.float32))
    c = CLearner(library, plan)
    before = c.state.tobytes()
    assert c.load(delta.encode([good], plan.model_hash)) == 0 and c.state.tobytes() != before
    before = c.state.tobytes()
    assert why in c.load(
        delta.encode([delta.Record("two.bias", np.zeros(3, np.float32)), *records], plan.model_hash)
    )
    assert c.state.tobytes() == before


def test_each_fault_of_the_header(library):
    plan = PLANS["mlp-sgd"]
    good, c = delta.encode([BIAS], plan.model_hash), CLearner(library, plan)
    assert "cut off" in c.load(good[:23]) and "cut off" in c.load(good + b"\0")
    assert "not a delta" in c.load(b"ACCP" + good[4:])
    assert "version" in c.load(good[:4] + b"\2" + good[5:])
    assert "another model" in c.load(delta.encode([BIAS], plan.model_hash ^ 1))
    for count in (0, 2, 2**32 - 1):
        rest = good[16:20] + struct.pack("<I", count) + good[24:]
        assert "outside" in c.load(good[:12] + struct.pack("<I", zlib.crc32(rest)) + rest)
    for bit in range(8 * len(good)):
        raw = bytearray(good)
        raw[bit // 8] ^= 1 << bit % 8
        assert isinstance(c.load(bytes(raw)), str)


def test_pending_micro_batches(library):
    plan = PLANS["mlp-accumulate"]
    c = CLearner(library, plan)
    raw = c.save(2)
    assert c.load(raw) == 2 and c.load(c.save()) == 0
    assert "does not fit" in c.load(raw, pending=False)
    assert "does not fit" in c.save(2**31)
    negative = delta.Record("optimizer.pending", np.array([-1], np.int32), None, "i32")
    assert "does not fit" in c.load(delta.encode([negative], plan.model_hash))


def test_what_cannot_be_restored_is_not_written(library):
    c = CLearner(library, PLANS["mlp-sgd"])
    c.state[:4].view(np.float32)[:] = np.inf
    assert "NaN" in c.save()


@pytest.mark.parametrize("at", [1, 2, 6, 7, 9])
def test_a_sink_that_refuses(library, at):
    plan = PLANS["mlp-sgd"]
    c = CLearner(library, plan)
    c.load(delta.encode([BIAS, delta.Record("two.bias", np.zeros(3, np.float32) + 1)], plan.model_hash))
    assert "could not be written" in c.save(fail_at=at)


def test_a_program_without_a_model_has_no_deltas(library):
    plan = PLANS["mlp-sgd"]
    raw = bytearray(plan.program.bytes)
    raw[56:60] = bytes(4)
    raw[12:16] = struct.pack("<I", zlib.crc32(raw[16:]))
    c = CLearner(library, plan)
    c.code = ctypes.create_string_buffer(bytes(raw), len(raw))
    assert c.ac.ac_load(c.program, c.code, ctypes.c_size_t(len(raw))) == 0
    assert "another model" in c.load(delta.encode([], 0)) and "another model" in c.save()


def test_python_refuses_the_same(library):
    """Mutants of real deltas, sealed again: C and Python agree on each, and on the state that follows."""
    rng = np.random.default_rng(0)
    taken = refused = 0
    for plan in (PLANS["mlp-adam-channels"], PLANS["cnn-channels"], PLANS["mlp-accumulate"]):
        learner = trained(plan, 4)
        good = delta.encode(learner._records(True), plan.model_hash)
        types, names = learner._types(), {r.name for r in learner._records(True)}
        c = CLearner(library, plan)
        for _ in range(1500):
            raw = bytearray(good)
            for _ in range(rng.integers(1, 3)):
                at = int(rng.integers(20, len(raw)))
                raw[at] = rng.choice([0, 1, 2, 255, raw[at] ^ 1 << int(rng.integers(8))])
            raw[12:16] = struct.pack("<I", zlib.crc32(raw[16:]))
            before = c.state.tobytes()
            got = c.load(bytes(raw))
            try:
                _, records = delta.decode(bytes(raw))
                delta.check(records, types)
            except BadInput:
                assert isinstance(got, str) and c.state.tobytes() == before
                refused += 1
                continue
            if any(r.name == "optimizer.pending" and r.data[0] < 0 for r in records):
                continue
            assert got == next((int(r.data[0]) for r in records if r.name == "optimizer.pending"), 0), names
            fresh = Learner(plan)
            for r in records:
                if r.name != "optimizer.pending":
                    view = fresh._main.view("state", r.name)
                    view[...] = r.apply(view.copy())
            assert c.state.tobytes() == fresh._main.state.tobytes()
            taken += 1
    assert taken > 300 and refused > 300


def test_tensors_of_which_the_state_holds_a_part(library, tmp_path):
    """C and Python write the same bytes, and C refuses what would change the channels in flash."""
    learner, x, _ = learned(PART)
    raw = saved(learner, tmp_path / "python.acu")
    c = CLearner(library, learner.plan)
    assert c.load(raw) == 0
    assert c.state.tobytes() == learner._main.state.tobytes()
    model, want = delta.decode(raw)
    want = {r.name: r for r in want}
    got = {r.name: r for r in delta.decode(c.save())[1]}
    assert got["p.weight"].channels == want["p.weight"].channels
    assert got["p.weight"].data.tobytes() == want["p.weight"].data.tobytes()
    trained, now = learner.plan.model.values["p.weight"].data, learner.parameters()["p.weight"]
    other = trained.copy()
    other[:, 3] += 1
    take = delta.Channels(0, (5, 2))
    for record, fits in (
        (delta.Record("p.weight", now, None, "i8"), True),
        (delta.Record("p.weight", now[list(take.index)], take, "i8"), True),
        (delta.Record("p.weight", now[:, [6, 4]], delta.Channels(1, (6, 4)), "i8"), True),
        (delta.Record("p.weight", now, delta.Channels(2, (0,)), "i8"), True),
        (delta.Record("p.weight", trained[:, [3, 4]], delta.Channels(1, (3, 4)), "i8"), True),
        (delta.Record("p.weight", other, None, "i8"), False),
        (delta.Record("p.weight", other[:, [3, 4]], delta.Channels(1, (3, 4)), "i8"), False),
        (delta.Record("p.weight", other, delta.Channels(3, (0,)), "i8"), False),
        (delta.Record("p.weight", now[:, :3], None, "i8"), False),
    ):
        c, before = CLearner(library, learner.plan), CLearner(library, learner.plan).state.tobytes()
        status = c.load(delta.encode([record], model))
        assert (status == 0) == fits, (record, status)
        if not fits:
            assert "does not fit" in status and c.state.tobytes() == before
            continue
        (tmp_path / "one.acu").write_bytes(delta.encode([record], model))
        python = Learner(learner.plan).restore(tmp_path / "one.acu")
        assert c.state.tobytes() == python._main.state.tobytes()
