"""The Python binding by itself: whatever it is called with, it raises or does what it says."""

import datetime
import threading

import numpy as np
import pytest
from runtime.nets import cnn, plans, samples

from acclimate import runtime
from acclimate.errors import BadInput
from acclimate.planner import compile_plan
from acclimate.runtime import Session, _core


@pytest.fixture(scope="module")
def plan():
    return compile_plan(cnn(), batch_size=4, optimizer="momentum")


@pytest.fixture
def session(plan):
    return Session(plan.program)


def loaded(plan):
    status, text, handle = _core.load(plan.program.bytes, "auto", True)
    assert (status, text) == (0, "done")
    return handle


def run(session, **changed):
    args = {
        "handle": session._handle,
        "entry": "predict",
        "state": session.state,
        "arena": session.arena,
        "first": 0,
        "end": -1,
        "workers": session._workers,
    }
    return _core.run(*{**args, **changed}.values())


@pytest.mark.parametrize("raw", [None, 3, "text", [1, 2], np.zeros((4, 4), np.uint8)[:, ::2]])
def test_load_takes_bytes_alone(raw):
    with pytest.raises((TypeError, BufferError, ValueError)):
        _core.load(raw, "auto", True)


def test_unknown_instruction_sets(plan):
    for isa in ("", "v5", "AUTO", "base\0"):
        with pytest.raises(ValueError):
            _core.load(plan.program.bytes, isa, True)
    with pytest.raises(TypeError):
        _core.load(plan.program.bytes, None, True)


@pytest.mark.parametrize(
    "handle", [None, 1, object(), datetime.datetime_CAPI], ids=["none", "number", "object", "other capsule"]
)
def test_only_a_program_is_a_program(session, handle):
    for call in (lambda: run(session, handle=handle), lambda: _core.reset(handle, session.state)):
        with pytest.raises((TypeError, ValueError)):
            call()


def test_unknown_entries(session):
    for name in ("", "Predict", "predict ", "output"):
        with pytest.raises(KeyError, match="no entry"):
            run(session, entry=name)
    with pytest.raises((ValueError, TypeError)):
        run(session, entry="pre\0dict")


def wrong_memory(block):
    yield block[:-4]
    yield block[:0]
    yield np.zeros(len(block) + 8, np.uint8)[(-np.zeros(1, np.uint8).ctypes.data) % 4 :][1 : 1 + len(block)]
    yield np.zeros(2 * len(block), np.uint8)[::2]
    frozen = block.copy()
    frozen.setflags(write=False)
    yield frozen
    yield bytes(len(block))
    yield None


@pytest.mark.parametrize("name", ["state", "arena"])
def test_memory_that_is_too_small_or_cannot_be_written(session, name):
    refused = 0
    for block in wrong_memory(getattr(session, name)):
        if (
            isinstance(block, np.ndarray)
            and len(block) >= len(session.state)
            and block.ctypes.data % 4 == 0
            and block.flags.c_contiguous
        ):
            if block.flags.writeable:
                continue  # aligned by chance
        with pytest.raises((ValueError, BufferError, TypeError)):
            run(session, **{name: block})
        refused += 1
        if name == "state" and not (isinstance(block, np.ndarray) and len(block) > 4):
            with pytest.raises((ValueError, BufferError, TypeError)):
                _core.reset(session._handle, block)
    assert refused >= 6


def test_misaligned_memory(session):
    for name in ("state", "arena"):
        size = len(getattr(session, name))
        raw = np.zeros(size + 16, np.uint8)
        start = -raw.ctypes.data % 4
        for by in (1, 2, 3):
            with pytest.raises(ValueError, match="aligned"):
                run(session, **{name: raw[start + by : start + by + size]})
        assert run(session, **{name: raw[start : start + size]}) == 0


def test_ranges_of_ops(plan, session):
    """first and end are clamped to the ops there are; nothing outside of them runs."""
    count = plan.program.op_counts["predict"]
    x, _ = samples(plan.model, 4, 4)
    want = session.run("predict", x=x)["output"]
    session.arena[:] = 0
    session.feed("predict", {"x": x})
    for first, end in ((count, -1), (count, count), (3, 2), (2**31, -1), (2**32, -1), (2**62, 2**62), (0, 0)):
        before = session.arena.copy()
        assert run(session, first=first, end=end) == 0
        assert (session.arena == before).all(), (first, end)
    for k in range(count):
        run(session, first=k, end=k + 1)
    assert session.view("predict", "output").tobytes() == want.tobytes()
    session.feed("predict", {"x": x})
    assert run(session, first=-5, end=2**40) == 0
    assert session.view("predict", "output").tobytes() == want.tobytes()
    with pytest.raises(OverflowError):
        run(session, first=2**64)


def test_a_program_keeps_its_own_bytes(plan):
    raw = bytearray(plan.program.bytes)
    status, _, handle = _core.load(raw, "auto", True)
    session = Session(plan.program)
    session._handle = handle
    x, _ = samples(plan.model, 4, 4)
    want = session.run("predict", x=x)["output"]
    raw[:] = bytes(len(raw))
    assert status == 0 and session.run("predict", x=x)["output"].tobytes() == want.tobytes()


def test_texts_of_statuses():
    texts = [_core.status_text(i) for i in range(21)]
    assert len(set(texts)) == 21 and texts[0] == "done"
    for beyond in (21, -1, 255, 2**31 - 1):
        assert _core.status_text(beyond) == "unknown status"
    assert runtime.LABEL_ERROR == next(i for i, t in enumerate(texts) if "label" in t)


def test_nothing_leaks(plan):
    """Loads that succeed, loads that are refused, and errors, many times over."""
    resource = pytest.importorskip("resource", reason="this system does not say how much memory is used")
    session, broken = Session(plan.program), plan.program.bytes[:-4]

    def work(times):
        for _ in range(times):
            loaded(plan)
            assert _core.load(broken, "auto", True)[0] == 1
            with pytest.raises(KeyError):
                run(session, entry="none")
            with pytest.raises(ValueError):
                run(session, state=session.state[:8])

    work(300)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work(3000)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < 300 * len(plan.program.bytes), f"{grown} KiB more"


def test_sessions_in_threads(plan):
    """The lock of the interpreter is let go while ops run: sessions of one Program do not disturb each other."""
    x, y = samples(plan.model, 4, 4)
    handle = Session(plan.program)._handle

    def steps(out):
        session = Session(plan.program)
        session._handle = handle
        for _ in range(50):
            session.run("step", x=x, y=y, lr=0.01)
        out.append(session.state.tobytes())

    results: list[bytes] = []
    threads = [threading.Thread(target=steps, args=(results,)) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 4 and len(set(results)) == 1


@pytest.mark.parametrize("name", plans())
def test_hostile_programs_from_python(name):
    """load refuses with the status' text, whichever bytes are changed."""
    raw = bytearray(plans()[name].program.bytes)
    rng = np.random.default_rng(0)
    for _ in range(100):
        at = int(rng.integers(0, len(raw)))
        old, raw[at] = raw[at], raw[at] ^ int(rng.integers(1, 256))
        with pytest.raises(BadInput, match="cannot be run") as caught:
            runtime.load(raw)
        assert "status" in caught.value.number
        raw[at] = old
