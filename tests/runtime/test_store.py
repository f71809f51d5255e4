"""What a board keeps in flash survives every power cut, is refused where it is damaged, and is read in Python."""

import ctypes
import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from runtime.native import STRICT, call, compile_all, compiler
from runtime.nets import mlp, plans, samples
from runtime.test_delta import CLearner
from test_quantized import small_net

import acclimate.runtime
from acclimate import delta, store
from acclimate.adapt import updated_model
from acclimate.errors import BadInput
from acclimate.ir import Dim, Graph
from acclimate.learner import Learner
from acclimate.ops import emit
from acclimate.planner import compile_plan

POWER = Path(__file__).with_name("power.c")
SOURCE = acclimate.runtime.SOURCE / "ac_store.c"
KEPT = Path(__file__).parents[1] / "kept"

# -- power cuts --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def power(harness, tmp_path_factory):
    """The fault injector over the sanitized runtime, and a small Program to run it on."""
    folder = tmp_path_factory.mktemp("power")
    objects = [o for o in harness.objects if o.stem != "fuzz"]
    (driver,) = compile_all([POWER], folder, [*STRICT, *harness.flags])
    call(compiler(), *harness.flags, driver, *objects, "-o", folder / "power")
    plan = compile_plan(mlp(), batch_size=1, scheme={"one.bias": None}, optimizer="sgd")
    (folder / "small.acp").write_bytes(plan.program.bytes)
    (folder / "large.acp").write_bytes(plans()["mlp-adam-channels"].program.bytes)
    (folder / "int8.acp").write_bytes(INTEGER.program.bytes)
    return folder


def cuts(power: Path, program: str, *geometry: int) -> dict:
    return json.loads(call(power / "power", power / program, *geometry).stdout)


@pytest.mark.parametrize(
    ("page", "unit", "pages", "slots", "mapped", "pairs"),
    [
        (128, 1, 9, 2, 0, 1),
        (128, 4, 8, 2, 1, 1),
        (512, 16, 3, 3, 1, 1),
        (1024, 256, 2, 2, 0, 0),
        (64, 32, 40, 8, 0, 0),
    ],
)
def test_a_cut_at_every_byte(power, page, unit, pages, slots, mapped, pairs):
    """Of saves and rollbacks, in four ways each; then (pairs) of a second save after every cut of the first."""
    for program, twice in (("small.acp", pairs), ("large.acp", 0), ("int8.acp", 0)):
        room = pages if program == "small.acp" else 12 * pages
        found = cuts(power, program, page, unit, room, slots, mapped, twice)
        assert found["cuts"] > 2000 and found["old"] > 1000 and found["new"] > 100
        assert not twice or found["pairs"] > 50_000
        assert slots > 2 or found["rollbacks"] > 100


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("if (i == s->current)", "if (i != s->current && s->current < s->slots)"),
        (
            "const uint32_t seal[3] = {SEAL_MAGIC, header[W_SEQUENCE], w.crc};",
            "const uint32_t *seal = header;",
        ),
        ("if (f->erase(f->argument, first + i))", "if ((void)first, 0)"),
        ("w.address += w.line; /* the mark of retirement stays erased */", "w.address += 2 * w.line;"),
        ("++*sequence;", ""),
        ("header[W_ERASES + target]++;", ""),
        ("if (in_use <= 0)", "if (in_use < 0)"),
    ],
)
def test_a_planted_fault_is_found(harness, power, tmp_path, line, instead):
    text = SOURCE.read_text()
    assert text.count(line) == 1
    (tmp_path / "ac_store.c").write_text(text.replace(line, instead))
    objects = [o for o in harness.objects if o.stem not in ("fuzz", "ac_store")]
    flags = [*harness.flags, f"-I{SOURCE.parent}", "-Wno-unused"]
    call(compiler(), *flags, tmp_path / "ac_store.c", power / "power.o", *objects, "-o", tmp_path / "power")
    done = call(tmp_path / "power", power / "small.acp", 128, 4, 8, 2, 0, 0, expect=1)
    assert "FINDING" in done.stderr or "Sanitizer" in done.stderr


# -- a board in Python -------------------------------------------------------------------------------------------------

CALL = (ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint32)
READ = ctypes.CFUNCTYPE(ctypes.c_int, *CALL)
ERASE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint32)


class Flash(ctypes.Structure):
    _fields_ = [
        ("argument", ctypes.c_void_p),
        ("read", READ),
        ("erase", ERASE),
        ("program", READ),
        ("mapped", ctypes.c_void_p),
        *((name, ctypes.c_uint32) for name in ("page_bytes", "write_bytes", "pages")),
    ]


class Store(ctypes.Structure):
    _fields_ = [
        ("flash", ctypes.c_void_p),
        *((name, ctypes.c_uint32) for name in ("slots", "slot_bytes", "current")),
        ("refused", ctypes.c_int),
    ]


class Board(CLearner):
    """A Program with flash beside it. `image`: what is in that flash; the store's statuses come back as text."""

    def __init__(self, library, plan, image=None, page=256, unit=8, pages=32, slots=2) -> None:
        super().__init__(library, plan)
        self.image = np.full(page * pages, 255, np.uint8) if image is None else image
        self.failing = ""

        def read(_, address, to, size):
            assert address + size <= self.image.size
            ctypes.memmove(to, self.image[address:].ctypes.data, size)
            return self.failing == "read"

        def erase(_, index):
            self.image[index * page : (index + 1) * page] = 255
            return self.failing == "erase"

        def program(_, address, source, size):
            if self.failing != "silently":
                self.image[address : address + size] &= np.frombuffer(
                    ctypes.string_at(source, size), np.uint8
                )
            return self.failing == "program"

        self.flash = Flash(None, READ(read), ERASE(erase), READ(program), None, page, unit, pages)
        self.store = Store()
        self.opened = self.text(
            self.ac.ac_store_open(ctypes.byref(self.store), ctypes.byref(self.flash), slots)
        )

    def text(self, status: int) -> str:
        return self.ac.ac_status_text(status).decode() if status else ""

    def call(self, name: str, scratch: int = 1 << 16) -> str:
        """ac_store_<name>; "" where it succeeds."""
        room = ctypes.create_string_buffer(scratch)
        pending = ctypes.byref(ctypes.c_uint32(0))
        more = (0,) if name == "save" else (room, ctypes.c_size_t(scratch), pending)
        function = getattr(self.ac, f"ac_store_{name}")
        return self.text(function(ctypes.byref(self.store), self.program, self.memory, *more))

    def slot(self, index: int) -> str:
        return self.text(
            self.ac.ac_store_slot(ctypes.byref(self.store), index, ctypes.create_string_buffer(64))
        )

    def take(self, learner: Learner) -> bytes:
        """What a Learner has learned, put into the board's memory; its bytes."""
        self.state[:] = learner._main.state
        return self.state.tobytes()


def trained(plan, steps: int) -> Learner:
    x, y = samples(plan.model, steps * plan.batch_size, 3)
    return Learner(plan).partial_fit(x, y)


PLAN = plans()["mlp-sgd"]
INTEGER = compile_plan(small_net(batch=1), scheme={"head.weight": None, "head.bias": None}, optimizer="sgd")


@pytest.fixture(scope="module")
def states() -> list[Learner]:
    return [trained(PLAN, n) for n in (1, 2, 3)]


def test_python_reads_the_flash(library, states, tmp_path):
    board = Board(library, PLAN)
    assert board.opened == "" and "nothing was kept" in board.call("load")
    for learner in states:
        board.take(learner)
        assert board.call("save") == ""
    dump = (
        np.random.default_rng(0).integers(0, 256, 640, np.uint8).tobytes() + board.image.tobytes() + b"more"
    )
    found = store.read(dump)
    assert [s.fault for s in found] == ["", ""] and found[0].sequence == found[1].sequence + 1
    assert {s.address for s in found} == {640, 640 + 16 * 256} and sum(found[0].erases) == found[0].sequence
    (tmp_path / "flash.bin").write_bytes(dump)
    again = Learner(PLAN).restore(tmp_path / "flash.bin")
    assert again._main.state.tobytes() == states[2]._main.state.tobytes()
    assert store.newest(dump) == found[0].delta == store.delta_in(dump, PLAN.model_hash)
    updated = updated_model(PLAN.model, tmp_path / "flash.bin")
    for name, value in again.parameters().items():
        assert (updated.values[name].data == value).all()
    assert delta.decode(found[1].delta)[0] == PLAN.model_hash


def test_another_board_and_another_program(library, states, tmp_path):
    """The slot that one board wrote is taken up by one with other flash, and by another Program of the same model."""
    first = Board(library, PLAN)
    first.take(states[1])
    assert first.call("save") == ""
    (tmp_path / "first.bin").write_bytes(first.image)
    wider = compile_plan(mlp(), batch_size=7, optimizer=PLAN.optimizer)
    assert wider.program.bytes != PLAN.program.bytes
    second = Board(library, wider, image=first.image.copy())
    assert second.call("load") == ""
    learner = Learner(wider).restore(tmp_path / "first.bin")
    assert second.state.tobytes() == learner._main.state.tobytes()
    x, _ = samples(mlp(), 20, 3)
    assert (
        learner.decision_function(x) == Learner(PLAN).restore(tmp_path / "first.bin").decision_function(x)
    ).all()
    third = Board(library, PLAN, page=64, unit=4, pages=96, slots=3)
    assert third.load(store.newest(first.image.tobytes())) == 0
    assert third.call("save") == "" and third.call("load") == ""
    assert third.state.tobytes() == states[1]._main.state.tobytes()
    (kept,) = [s for s in store.read(third.image.tobytes()) if not s.fault]
    assert kept.delta == store.newest(first.image.tobytes())


def test_integer_weights(library, tmp_path):
    """What a quantised model learned, in flash and back: int8 weights and int32 biases."""
    learner = Learner(INTEGER)
    rng = np.random.default_rng(0)
    learner.partial_fit(
        rng.integers(-128, 128, (20, 3, 8, 8)).astype(np.int8), rng.integers(0, 5, 20), lr=0.5
    )
    board = Board(library, INTEGER)
    start = board.state.tobytes()
    kept = board.take(learner)
    assert kept != start and board.call("save") == ""
    again = Board(library, INTEGER, image=board.image)
    assert again.call("load") == "" and again.state.tobytes() == kept
    (tmp_path / "flash.bin").write_bytes(board.image)
    assert Learner(INTEGER).restore(tmp_path / "flash.bin")._main.state.tobytes() == kept
    assert {r.dtype for r in delta.decode(store.newest(board.image.tobytes()))[1]} == {"i8", "i32"}


def test_rollback(library, states):
    board = Board(library, PLAN, slots=3)
    start = board.state.tobytes()
    known = []
    for learner in states:
        known.append(board.take(learner))
        assert board.call("save") == ""
    assert board.call("rollback") == "" and board.state.tobytes() == known[1]
    assert board.slot(2) == "what was kept here was given up by a rollback"
    board.take(states[2])
    assert board.call("save") == "" and board.store.current == 2, "what was given up is written first"
    again = Board(library, PLAN, image=board.image, slots=3)
    assert again.call("load") == "" and again.state.tobytes() == known[2]
    for expected in (known[1], known[0]):
        assert again.call("rollback") == "" and again.state.tobytes() == expected
    assert "nothing was kept" in again.call("rollback") and again.state.tobytes() == start
    assert "nothing was kept" in Board(library, PLAN, image=board.image, slots=3).call("load")
    assert {s.fault for s in store.read(board.image.tobytes())} == {"rolled back"}
    with pytest.raises(BadInput, match="rolled back"):
        store.newest(board.image.tobytes())


def test_a_damaged_new_slot_leaves_the_old_one(library, states):
    board = Board(library, PLAN)
    board.take(states[0])
    assert board.call("save") == ""
    old = board.state.tobytes()
    board.take(states[1])
    assert board.call("save") == ""
    board.image[board.store.current * board.store.slot_bytes + 200] ^= 1
    assert "checksum" in board.slot(board.store.current)
    again = Board(library, PLAN, image=board.image)
    assert again.call("load") == "" and again.state.tobytes() == old
    assert "checksum" in again.text(again.store.refused)
    assert [s.fault for s in store.read(board.image.tobytes())] == ["changed", ""]
    damaged = again.image.copy()
    assert again.call("save") == "" and again.store.refused
    assert (again.image != damaged)[: again.store.slot_bytes].any() != (again.store.current == 1)


def resealed(board: Board, index: int, change) -> None:
    """Change a slot as somebody would who knows its format: both checksums are made right again."""
    at = index * board.store.slot_bytes
    raw = bytearray(board.image[at : at + board.store.slot_bytes].tobytes())
    size = struct.unpack_from("<I", raw, 12)[0]
    change(raw)
    struct.pack_into("<I", raw, 60, zlib.crc32(raw[:60]))
    seal = 128 + -(-size // 64) * 64
    if seal + 64 <= len(raw):
        crc = zlib.crc32(raw[128 : 128 + size], zlib.crc32(raw[:64]))
        struct.pack_into("<2I", raw, seal + 4, struct.unpack_from("<I", raw, 8)[0], crc)
    board.image[at : at + len(raw)] = np.frombuffer(bytes(raw), np.uint8)


@pytest.mark.parametrize(
    ("word", "value", "why"),
    [
        (0, 0x12345678, "not a Program"),
        (1, 0, "format version"),
        (1, 2, "format version"),
        (3, 1 << 14, "outside its area"),
        (3, 2**32 - 1, "outside its area"),
        (5, 3 | 64 << 16, "outside its area"),
        (5, 2 | 1 << 8 | 64 << 16, "outside its area"),
        (5, 2 | 128 << 16, "outside its area"),
        (6, 256, "outside its area"),
    ],
)
def test_each_fault_of_a_header(library, states, word, value, why):
    board = Board(library, PLAN)
    start = board.state.tobytes()
    board.take(states[0])
    assert board.call("save") == "" and board.store.current == 0
    resealed(board, 0, lambda raw: struct.pack_into("<I", raw, 4 * word, value))
    assert why in board.slot(0)
    again = Board(library, PLAN, image=board.image)
    assert why in again.call("load") and again.state.tobytes() == start
    assert again.call("save") == "" and again.call("load") == ""


def test_other_models_and_plans(library, states):
    board = Board(library, PLAN)
    board.take(states[0])
    assert board.call("save") == ""
    mine = board.state.tobytes()
    other = Board(library, compile_plan(mlp(seed=5), optimizer=PLAN.optimizer), image=board.image)
    assert "another model" in other.call("load")
    other.state[:4].view(np.float32)[:] += 1
    assert other.call("save") == "" and other.store.current == 1, "neither is of use to it: the least worn"
    assert other.call("save") == "" and other.store.current == 0
    board.take(states[0])
    assert board.call("save") == ""
    narrow = Board(library, compile_plan(mlp(), scheme="last", optimizer="sgd"), image=board.image)
    assert "does not fit" in narrow.call("load"), "it holds tensors that this Program does not learn"
    with pytest.raises(BadInput, match="model"):
        store.newest(board.image.tobytes(), 1)
    assert board.call("load") == "" and board.state.tobytes() == mine


def test_what_cannot_be_kept(library, states):
    board = Board(library, PLAN)
    board.take(states[0])
    assert board.call("save") == ""
    image = board.image.copy()
    board.state[:4].view(np.float32)[:] = np.nan
    assert "NaN" in board.call("save") and (board.image == image).all()
    small = Board(library, PLAN, page=256, pages=2)
    small.take(states[0])
    assert "room" in small.call("save") and (small.image == 255).all()
    assert "room" in board.call("load", scratch=64)
    for geometry in (
        {"unit": 3},
        {"unit": 512, "page": 512},
        {"page": 100},
        {"pages": 1},
        {"slots": 1},
        {"slots": 9},
    ):
        assert "room" in Board(library, PLAN, **geometry).opened


@pytest.mark.parametrize("what", ["read", "erase", "program", "silently"])
def test_flash_that_fails(library, states, what):
    board = Board(library, PLAN)
    board.take(states[0])
    assert board.call("save") == ""
    old = board.state.tobytes()
    board.take(states[1])
    board.failing = what
    assert "flash could not be" in board.call("save")
    if what == "read":
        assert (
            "flash could not be" in board.call("load")
            and board.state.tobytes() == states[1]._main.state.tobytes()
        )
    if what == "program":
        assert "flash could not be" in board.call("rollback")
    board.failing = ""
    again = Board(library, PLAN, image=board.image)
    if what == "program":  # the mark was written, whatever the driver said of it
        assert "cut off" in again.call("load")
    else:
        assert again.call("load") == "" and again.state.tobytes() == old


def test_wear(library, states):
    """Counted in every header and read back by C and Python; equal on all slots."""
    board = Board(library, PLAN, slots=4)
    for n in range(21):
        board.take(states[n % 3])
        assert board.call("save") == ""
    newest = store.read(board.image.tobytes())[0]
    assert newest.sequence == 21 and newest.erases == (6, 5, 5, 5)
    assert board.ac.ac_store_wear(ctypes.byref(board.store)) == 6


def test_python_refuses_the_same(library, states):
    """Mutants of an image, some sealed again: C and Python agree on every slot, and on what is loaded."""
    rng = np.random.default_rng(0)
    board = Board(library, PLAN)
    for learner in states[:2]:
        board.take(learner)
        assert board.call("save") == ""
    good, ends = board.image.copy(), (0, board.store.slot_bytes)
    faults = {
        "": "",
        "nothing was kept": "empty",
        "not a Program": "no slot",
        "format version": "format",
        "checksum": "changed",
        "cut off": "torn",
        "rollback": "rolled back",
    }
    seen = set()
    for _ in range(3000):
        board.image[:] = good
        slot = int(rng.integers(2))
        for _ in range(rng.integers(1, 3)):
            at = ends[slot] + int(
                rng.choice([rng.integers(0, 64), rng.integers(64, 128), rng.integers(128, 1200)])
            )
            board.image[at] = rng.choice([0, 255, 1, board.image[at] ^ 1 << int(rng.integers(8))])
        if rng.random() < 0.5:
            resealed(board, slot, lambda raw: None)
        raw = board.image.tobytes()
        told = {s.index: s.fault for s in store.read(raw)}
        if any("outside" in board.slot(i) for i in (0, 1)):
            seen.add("outside")  # how the flash is divided is what Python takes from the headers
            continue
        for i in (0, 1):
            text = board.slot(i)
            (key,) = [k for k in faults if k and k in text] or [""]
            assert told[i].startswith(faults[key]) and bool(told[i]) == bool(text), (text, told)
            seen.add(key)
        try:
            want = store.newest(raw, PLAN.model_hash)
            delta.check(delta.decode(want)[1], Learner(PLAN)._types())
        except BadInput:
            continue
        assert board.call("load") == "" and Board(library, PLAN).load(want) == 0
    assert seen >= {"outside", *faults} - {"nothing was kept"}


# -- the next version --------------------------------------------------------------------------------------------------


def fixed_net() -> Graph:
    """The same weights in every version of every library: what was kept from it must go on loading."""
    g = Graph()
    x = g.input("x", (Dim(1, 1), 4))
    w = g.persistent("layer.weight", np.arange(12, dtype=np.float32).reshape(3, 4) / 8 - 0.5)
    g.outputs["output"] = emit(g, "matmul", x, w, g.persistent("layer.bias", np.zeros(3)), tb=1)
    return g


def test_what_format_1_kept_still_loads(library, tmp_path):
    """Files that the first version wrote, byte for byte: a change of format must go on reading them."""
    plan = compile_plan(fixed_net(), optimizer="sgd")
    learner = Learner(plan).restore(KEPT / "delta_1.acu")
    weight = np.arange(12, dtype=np.float32).reshape(3, 4) / 8 - 0.5
    weight[1] += 1
    assert (learner.parameters()["layer.weight"] == weight).all()
    assert (learner.parameters()["layer.bias"] == [0.5, -0.25, 2]).all()
    from_flash = Learner(plan).restore(KEPT / "flash_1.bin")
    assert from_flash._main.state.tobytes() == learner._main.state.tobytes()
    image = np.fromfile(KEPT / "flash_1.bin", np.uint8)
    board = Board(library, plan, image=image, page=256, unit=4, pages=4)
    assert board.call("load") == "" and board.state.tobytes() == learner._main.state.tobytes()
    assert CLearner(library, plan).load((KEPT / "delta_1.acu").read_bytes()) == 0


# -- what it takes -----------------------------------------------------------------------------------------------------


def test_stack_of_the_store(plain_objects):
    """What ac_store.h says of the stack."""
    frames = {}
    for name in ("ac_store", "ac_delta"):
        path = plain_objects[0].with_name(f"{name}.su")
        if not path.exists():
            pytest.skip("this compiler does not say how much stack a function takes")
        for line in path.read_text().splitlines():
            place, size, kind = line.split("\t")
            assert kind in ("static", "dynamic,bounded")
            frames[place.rsplit(":", 1)[1]] = int(size)
    limit = int(re.search(r"under (\d+) KiB", (SOURCE.with_suffix(".h")).read_text())[1]) << 10
    save = sum(frames[f] for f in ("ac_store_save", "take", "flush")) + frames.get("write_slot", 0)
    assert save + 1024 < limit, "ac_delta_save stays under 1 KiB"
    load = sum(frames[f] for f in ("ac_store_rollback", "ac_store_load", "ac_store_slot"))
    assert load + 1024 < limit
