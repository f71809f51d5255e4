"""The delta file: only what changed, whole after any crash, and nothing from outside is trusted."""

import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime.nets import cnn, mlp, samples

from acclimate import delta
from acclimate.errors import BadInput
from acclimate.grad import Channels
from acclimate.ir import Type
from acclimate.learner import Learner
from acclimate.objective import SGD, Adam
from acclimate.planner import compile_plan

MODEL = 0x12345678
RECORDS = [
    delta.Record("layer.weight", np.arange(6, dtype=np.float32).reshape(2, 3) - 2.5, Channels(1, (4, 0, 2))),
    delta.Record("layer.bias", np.array([1e-40, -0.0, 3e38], np.float32)),
    delta.Record("optimizer.steps", np.array([2**31 - 1], np.int32), None, "i32"),
    delta.Record("größe", np.float32([[7]]), Channels(0, (1,))),
]
TYPES = {
    "layer.weight": Type((2, 5)),
    "layer.bias": Type((3,)),
    "optimizer.steps": Type((1,), "i32"),
    "größe": Type((3, 1)),
}


def sealed(
    body: bytes, magic: int = delta.MAGIC, version: int = delta.FORMAT, model: int = MODEL, count: int = 1
) -> bytes:
    """A delta around records that are given as bytes, with length and checksum as they must be."""
    rest = struct.pack("<2I", model, count) + body
    return struct.pack("<4I", magic, version, 16 + len(rest), zlib.crc32(rest)) + rest


def refused(raw: bytes) -> str:
    with pytest.raises(BadInput) as caught:
        delta.decode(raw, "mine.acu")
    assert caught.value.where == "mine.acu" and caught.value.action
    return str(caught.value)


def learner(seed: int = 0, **plan) -> Learner:
    plan = {"batch_size": 4, "optimizer": Adam(lr=0.02), **plan}
    return Learner(compile_plan(mlp(seed=seed), **plan))


def trained(steps: int = 10, **plan) -> Learner:
    it = learner(**plan)
    return it.partial_fit(*samples(it.plan.model, 4 * steps, 3))


def snapshot(it: Learner) -> tuple[bytes, int]:
    return it._main.state.tobytes(), it._pending


# -- round trip ----------------------------------------------------------------------------------------------------


def test_round_trip_with_channels_and_integers():
    model, records = delta.decode(delta.encode(RECORDS, MODEL))
    assert model == MODEL and len(records) == len(RECORDS)
    for got, want in zip(records, RECORDS, strict=True):
        assert (got.name, got.channels, got.dtype) == (want.name, want.channels, want.dtype)
        assert got.data.dtype == want.data.dtype and got.data.tobytes() == want.data.tobytes()
    delta.check(records, TYPES)


def test_bytes_are_as_documented():
    raw = delta.encode(RECORDS[:1], MODEL)
    assert raw[:4] == b"ACUP" and struct.unpack_from("<5I", raw, 4) == (
        1,
        len(raw),
        zlib.crc32(raw[16:]),
        MODEL,
        1,
    )
    assert struct.unpack_from("<HBBII", raw, 24) == (12, 0, 1, 3, 6)
    assert raw[36:48] == b"layer.weight"
    assert struct.unpack_from("<3I6f", raw, 48) == (4, 0, 2, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5)
    assert len(raw) == 84


def test_apply_writes_only_the_channels():
    whole = np.full((2, 5), 9, np.float32)
    out = RECORDS[0].apply(whole)
    assert (whole == 9).all()
    np.testing.assert_array_equal(out, [[-1.5, 9, -0.5, 9, -2.5], [1.5, 9, 2.5, 9, 0.5]])
    new = delta.Record("b", np.arange(10, dtype=np.float32)).apply(whole)
    np.testing.assert_array_equal(new, np.arange(10).reshape(2, 5))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(max_size=20), st.lists(st.floats(width=32), max_size=5), st.none() | st.integers(0, 5)
        ),
        max_size=4,
    )
)
def test_any_record_comes_back(parts):
    records = [
        delta.Record(
            name,
            np.array(data, np.float32),
            None if axis is None else Channels(axis, tuple(range(len(data)))),
        )
        for name, data, axis in parts
        if axis is None or data
    ]
    _, found = delta.decode(delta.encode(records, 1))
    assert [(r.name, r.channels, r.data.tobytes()) for r in found] == [
        (r.name, r.channels, r.data.tobytes()) for r in records
    ]


def test_only_what_changed_is_in_the_file(tmp_path):
    it = learner(scheme={"one.weight": [3, 1], "two.bias": None})
    size = it.save(tmp_path / "none.acu")
    assert size == 24 and delta.decode(delta.read(tmp_path / "none.acu"))[1] == []
    it.partial_fit(*samples(it.plan.model, 8, 3))
    size = it.save(tmp_path / "all.acu")
    assert size == (tmp_path / "all.acu").stat().st_size
    records = {r.name: r for r in delta.decode(delta.read(tmp_path / "all.acu"))[1]}
    assert set(records) == {
        "one.weight",
        "two.bias",
        "optimizer.steps",
        "one.weight.mean",
        "one.weight.variance",
        "two.bias.mean",
        "two.bias.variance",
    }
    assert records["one.weight"].channels == Channels(0, (3, 1)) and records["one.weight"].data.size == 2 * 6
    assert records["optimizer.steps"].data.tolist() == [2] and records["optimizer.steps"].dtype == "i32"
    it.save(tmp_path / "weights.acu", optimizer=False)
    assert [r.name for r in delta.decode(delta.read(tmp_path / "weights.acu"))[1]] == [
        "one.weight",
        "two.bias",
    ]


def test_batch_norm_statistics_are_kept(tmp_path):
    plan = compile_plan(cnn(), batch_size=4, scheme="last")
    it = Learner(plan).partial_fit(*samples(plan.model, 8, 4))
    it.save(tmp_path / "a.acu", optimizer=False)
    names = {r.name for r in delta.decode(delta.read(tmp_path / "a.acu"))[1]}
    assert names == {"head.weight", "head.bias", "bn.running_mean", "bn.running_var", "dropout.steps"}


# -- from outside --------------------------------------------------------------------------------------------------


def test_every_single_bit_flip_is_refused():
    raw = bytearray(delta.encode(RECORDS, MODEL))
    for at in range(len(raw)):
        for bit in range(8):
            raw[at] ^= 1 << bit
            refused(bytes(raw))
            raw[at] ^= 1 << bit


def test_truncated_or_grown_at_every_length():
    raw = delta.encode(RECORDS, MODEL)
    for length in range(len(raw)):
        assert "cut off" in refused(raw[:length])
    assert "bytes too many" in refused(raw + b"\0")


def test_truncated_with_length_and_checksum_corrected():
    body = delta.encode(RECORDS, MODEL)[24:]
    for length in range(len(body)):
        refused(sealed(body[:length], count=len(RECORDS)))
    assert "after the last record" in refused(sealed(body, count=len(RECORDS) - 1))
    assert "cut off" in refused(sealed(body, count=2**32 - 1))


def test_each_fault_of_the_header_has_its_own_text():
    raw = delta.encode(RECORDS, MODEL)
    body = raw[24:]
    texts = [
        refused(b""),
        refused(sealed(body, magic=1)),
        refused(sealed(body, version=2)),
        refused(raw + b"\0"),
        refused(raw[:-1] + bytes([raw[-1] ^ 1])),
    ]
    assert len(set(texts)) == 5
    for text, word in zip(texts, ("cut off", "start", "version 2", "too many", "checksum"), strict=True):
        assert word in text


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (delta.RECORD.pack(1, 4, 255, 0, 0) + b"w", "element type"),
        (delta.RECORD.pack(1, 0, 255, 1, 1) + b"w" + bytes(8), "channels of a whole tensor"),
        (delta.RECORD.pack(1, 0, 0, 0, 1) + b"w" + bytes(4), "no channels"),
        (delta.RECORD.pack(1, 0, 255, 0, 2**31 - 1) + b"w" + bytes(4), "elements"),
        (delta.RECORD.pack(1, 0, 255, 0, 2**32 - 1) + b"w" + bytes(4), "elements"),
        (delta.RECORD.pack(1, 0, 1, 2**32 - 1, 1) + b"w" + bytes(4), "channels"),
        (delta.RECORD.pack(2**16 - 1, 0, 255, 0, 0) + b"w", "name"),
        (delta.RECORD.pack(2, 0, 255, 0, 0) + b"\xff\xfe", "text"),
        (delta.RECORD.pack(1, 0, 255, 0, 1), "nothing"),
    ],
)
def test_records_that_are_not_valid(record, why):
    refused(sealed(record))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_hostile_bytes_with_a_good_checksum(data):
    """Structure-aware: words and bytes of good records changed, the seal made right again. Refused, or sound."""
    raw = bytearray(delta.encode(RECORDS, MODEL)[24:])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        new = data.draw(
            st.sampled_from([b"\0", b"\xff", b"\x7f", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f"])
            | st.binary(min_size=1, max_size=4)
        )
        raw[at : at + len(new)] = new
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw))) :]
    try:
        _, records = delta.decode(
            sealed(bytes(raw), count=data.draw(st.sampled_from([4, 3, 5, 0, 2**32 - 1])))
        )
        delta.check(records, TYPES)
    except BadInput:
        return
    for r in records:
        type_ = TYPES[r.name]
        out = r.apply(np.zeros(type_.shape, r.data.dtype))
        assert out.shape == type_.shape and np.isfinite(out).all()


@pytest.mark.parametrize(
    ("record", "what"),
    [
        (delta.Record("other", np.zeros(3, np.float32)), "does not learn"),
        (delta.Record("", np.zeros(3, np.float32)), "does not learn"),
        (delta.Record("layer.bias", np.zeros(4, np.float32)), "shape"),
        (delta.Record("layer.bias", np.zeros(0, np.float32)), "shape"),
        (delta.Record("layer.bias", np.float32([0, np.nan, 0])), "NaN"),
        (delta.Record("layer.bias", np.float32([0, 0, -np.inf])), "NaN"),
        (delta.Record("layer.bias", np.zeros(3, np.int32), None, "i32"), "element type"),
        (delta.Record("optimizer.steps", np.float32([1e30])), "element type"),
        (delta.Record("layer.weight", np.zeros(4, np.float32), Channels(1, (2, 2))), "twice"),
        (delta.Record("layer.weight", np.zeros(2, np.float32), Channels(1, (5,))), "do not exist"),
        (delta.Record("layer.weight", np.zeros(2, np.float32), Channels(1, (2**32 - 1,))), "do not exist"),
        (delta.Record("layer.weight", np.zeros(2, np.float32), Channels(2, (0,))), "do not exist"),
        (delta.Record("layer.weight", np.zeros(2, np.float32), Channels(254, (0,))), "do not exist"),
        (delta.Record("layer.weight", np.zeros(3, np.float32), Channels(1, (0,))), "shape"),
        (
            delta.Record("layer.weight", np.zeros(12, np.float32), Channels(1, tuple(range(6)))),
            "do not exist",
        ),
    ],
)
def test_what_does_not_fit_the_plan(record, what):
    _, records = delta.decode(delta.encode([record], MODEL))
    with pytest.raises(BadInput, match=what) as caught:
        delta.check(records, TYPES, "mine.acu")
    assert caught.value.where.startswith("mine.acu") and caught.value.number and caught.value.action


def test_a_tensor_that_stands_twice():
    with pytest.raises(BadInput, match="twice"):
        delta.check([RECORDS[1], RECORDS[0], RECORDS[1]], TYPES)


# -- a learner restores --------------------------------------------------------------------------------------------


def test_restore_is_exact(tmp_path):
    it = trained()
    it.save(tmp_path / "a.acu")
    other = learner().restore(tmp_path / "a.acu")
    assert snapshot(other) == snapshot(it)
    for name, array in it.parameters().items():
        assert other.parameters()[name].tobytes() == array.tobytes()


def test_negative_zero_is_kept(tmp_path):
    it = learner()
    it._main.view("state", "one.bias")[...] = -0.0
    it.save(tmp_path / "a.acu")
    assert snapshot(learner().restore(tmp_path / "a.acu")) == snapshot(it)


def hostile(it: Learner, tmp_path: Path, **replaced: delta.Record) -> list[tuple[str, bytes]]:
    """Files that must be refused by this learner: (what is wrong, bytes)."""
    model = it.plan.model_hash
    good = it._records(True)
    raw = delta.encode(good, model)
    bias = next(r for r in good if r.name == "one.bias")

    def with_bias(*new: delta.Record) -> bytes:
        return delta.encode([*(r for r in good if r.name != "one.bias"), *new], model)

    return [
        ("missing", None),
        ("empty", b""),
        ("cut off", raw[:-1]),
        ("changed", raw[:-1] + bytes([raw[-1] ^ 1])),
        ("other model", delta.encode(good, model ^ 1)),
        ("unknown tensor", with_bias(delta.Record("three.bias", bias.data))),
        ("wrong shape", with_bias(delta.Record("one.bias", bias.data[:-1]))),
        ("NaN", with_bias(delta.Record("one.bias", bias.data * np.float32(np.nan)))),
        ("twice", with_bias(bias, bias)),
        ("twice the channel", with_bias(delta.Record("one.bias", bias.data[:2], Channels(0, (1, 1))))),
        ("no such channel", with_bias(delta.Record("one.bias", bias.data[:1], Channels(0, (5,))))),
        ("integers", with_bias(delta.Record("one.bias", bias.data.astype(np.int32), None, "i32"))),
        ("pending", with_bias(delta.Record("optimizer.pending", np.int32([1]), None, "i32"))),
    ]


def test_a_refused_restore_changes_nothing(tmp_path):
    it = trained()
    files = hostile(it, tmp_path)
    other = trained(3)
    before, saved = snapshot(other), other._saved
    for what, raw in files:
        path = tmp_path / f"{what}.acu"
        if raw is not None:
            path.write_bytes(raw)
        with pytest.raises(BadInput) as caught:
            other.restore(path)
            pytest.fail(f"{what} was taken")
        assert str(path) in caught.value.where, what
        assert caught.value.action, what
        assert snapshot(other) == before and other._saved is saved, what
    assert other.rollback() is other and snapshot(other) != before


def test_another_model_is_told_from_its_weights(tmp_path):
    it = trained()
    it.save(tmp_path / "a.acu")
    with pytest.raises(BadInput, match="another model") as caught:
        learner(seed=5).restore(tmp_path / "a.acu")
    assert "load the model that it was saved with" in caught.value.action


def test_another_scheme_or_optimizer(tmp_path):
    it = trained()
    it.save(tmp_path / "a.acu")
    with pytest.raises(BadInput, match="does not learn"):
        learner(scheme="bias").restore(tmp_path / "a.acu")
    it.save(tmp_path / "weights.acu", optimizer=False)
    other = learner(optimizer="sgd").restore(tmp_path / "weights.acu")
    assert other.parameters()["one.weight"].tobytes() == it.parameters()["one.weight"].tobytes()


def test_accumulated_gradients_are_kept(tmp_path):
    """Saved between two micro-batches, learning goes on as if nothing had been."""
    optimizer = SGD(lr=0.1, momentum=0.9, accumulate=3)
    it = trained(4, optimizer=optimizer)
    assert it._pending == 1
    it.save(tmp_path / "a.acu")
    other = learner(optimizer=optimizer).restore(tmp_path / "a.acu")
    assert snapshot(other) == snapshot(it)
    x, y = samples(it.plan.model, 20, 3, seed=9)
    it.partial_fit(x, y)
    other.partial_fit(x, y)
    assert snapshot(other) == snapshot(it) and it._pending == 0
    it.rollback()
    assert it._pending == 1
    it.partial_fit(x, y)
    assert snapshot(other) == snapshot(it)
    for pending in (3, -1, 2**31 - 1):
        raw = delta.encode(
            [delta.Record("optimizer.pending", np.int32([pending]), None, "i32")],
            it.plan.model_hash,
        )
        (tmp_path / "b.acu").write_bytes(raw)
        with pytest.raises(BadInput, match="micro-batches"):
            it.restore(tmp_path / "b.acu")
    assert snapshot(other) == snapshot(it)


def test_what_could_not_be_restored_is_not_saved(tmp_path):
    """A run that diverged must not replace the last good file."""
    it = trained()
    it.save(tmp_path / "a.acu")
    good = (tmp_path / "a.acu").read_bytes()
    it._main.view("state", "two.bias")[1] = np.nan
    with pytest.raises(BadInput, match="NaN") as caught:
        it.save(tmp_path / "a.acu")
    assert "two.bias" in caught.value.where and "go back" in caught.value.action
    assert (tmp_path / "a.acu").read_bytes() == good
    assert np.isfinite(it.rollback().parameters()["two.bias"]).all()


# -- crashes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["replace", "fsync", "open"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "interrupted"]
)
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, call, error):
    it = trained(2)
    it.save(tmp_path / "a.acu")
    old, saved = (tmp_path / "a.acu").read_bytes(), it._saved
    it.partial_fit(*samples(it.plan.model, 8, 3))

    def broken(*args, **kwargs):
        raise error

    if call == "open":
        monkeypatch.setattr("builtins.open", broken)
    else:
        monkeypatch.setattr(os, call, broken)
    with pytest.raises(BadInput if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        it.save(tmp_path / "a.acu")
    monkeypatch.undo()
    if isinstance(error, OSError):
        assert "No space left" in caught.value.number and "old file is as it was" in caught.value.action
    assert (tmp_path / "a.acu").read_bytes() == old
    assert os.listdir(tmp_path) == ["a.acu"]  # and no rubbish
    assert it._saved is saved


def test_a_short_write_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "a.acu").write_bytes(b"old")
    with monkeypatch.context() as patch:
        real = open

        def full(*args, **kwargs):
            f = real(*args, **kwargs)
            write = f.write

            class Full:
                def __enter__(self):
                    return self

                def __exit__(self, *_):
                    f.close()

                def write(self, raw):
                    write(raw[: len(raw) // 2])
                    raise OSError(28, "No space left on device")

            return Full()

        patch.setattr("builtins.open", full)
        with pytest.raises(BadInput, match="could not be written"):
            delta.write(tmp_path / "a.acu", b"new" * 100)
    assert (tmp_path / "a.acu").read_bytes() == b"old" and os.listdir(tmp_path) == ["a.acu"]


def test_a_folder_that_cannot_be_synced_is_no_failure(tmp_path, monkeypatch):
    real, calls = os.fsync, []

    def fsync(fd):
        calls.append(fd)
        if len(calls) > 1:
            raise OSError(22, "Invalid argument")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    delta.write(tmp_path / "a.acu", b"new")
    assert (tmp_path / "a.acu").read_bytes() == b"new" and len(calls) == 2


@pytest.mark.parametrize(
    "where", ["missing/a.acu", "file/a.acu", "folder", "a" * 300, "a" * 250], ids=lambda w: w[:12]
)
def test_places_that_cannot_be_written(tmp_path, where):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    if where == "a" * 250:
        delta.write(tmp_path / where, b"x")  # the longest names that the file system takes do work
        return
    with pytest.raises(BadInput, match="could not be written") as caught:
        delta.write(tmp_path / where, b"x")
    assert caught.value.where == str(tmp_path / where)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


KILLED = """
import sys
from acclimate import delta
import numpy as np
n = 0
while True:
    n += 1
    data = np.full(20000, n, np.float32)
    delta.write(sys.argv[1], delta.encode([delta.Record("w", data), delta.Record("v", data)], n))
    if n == 3: print("ready", flush=True)
"""


def test_killed_while_saving_the_file_is_always_whole(tmp_path):
    """SIGKILL at random moments of a loop that saves: each time one whole version is there, and never an older one."""
    if not hasattr(signal, "SIGKILL"):
        pytest.skip("this system has no SIGKILL")
    path, last = tmp_path / "a.acu", 0
    rng = np.random.default_rng(0)
    for _ in range(6):
        with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0, 0.05))
            process.kill()
        model, records = delta.decode(path.read_bytes())
        assert [r.name for r in records] == ["w", "v"] and model >= 3
        for r in records:
            assert r.data.shape == (20000,) and (r.data == model).all()
        last = max(last, model)
    assert last > 3


def test_two_threads_do_not_mix(tmp_path):
    path, errors = tmp_path / "a.acu", []

    def save(n: int) -> None:
        try:
            for _ in range(20):
                delta.write(path, bytes([n]) * 40_000)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(n,)) for n in (1, 2, 3)]
    for t in threads:
        t.start()
    while any(t.is_alive() for t in threads):
        if path.exists():
            raw = path.read_bytes()
            assert len(raw) == 40_000 and len(set(raw)) == 1
    for t in threads:
        t.join()
    assert not errors
