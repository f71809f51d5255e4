"""The Program file: every field says something, every damage is refused, and equal plans give equal bytes."""

import itertools
import re
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from runtime.nets import cnn, mlp, plans, samples

from acclimate import delta, runtime, store
from acclimate.errors import BadInput
from acclimate.ops import TABLE, table_hash
from acclimate.planner import compile_plan
from acclimate.program import (
    ARENA,
    CONST,
    DTYPE_CODES,
    FORMAT,
    HEADER_WORDS,
    MAGIC,
    STATE,
    STATE_ENTRY,
    Program,
    build,
    decode,
    pack_bits,
)

FIELDS = (
    "magic",
    "format",
    "total",
    "crc",
    "table",
    "tensors",
    "op_words",
    "entries",
    "bindings",
    "names",
    "constants",
    "initial",
    "state",
    "arena",
    "model",
    "reserved",
)
BASE = 4 * HEADER_WORDS


@pytest.fixture(scope="module")
def program() -> Program:
    return compile_plan(mlp(3, 2, 2), batch_size=2).program


def header(raw: bytes) -> dict[str, int]:
    return dict(zip(FIELDS, struct.unpack_from(f"<{HEADER_WORDS}I", raw), strict=True))


def sealed(raw: bytes | bytearray, **fields: int) -> bytes:
    """The bytes with header fields replaced, and length and checksum right again unless they are given."""
    raw = bytearray(raw)
    fields.setdefault("total", len(raw))
    for name, value in fields.items():
        struct.pack_into("<I", raw, 4 * FIELDS.index(name), value)
    if "crc" not in fields:
        struct.pack_into("<I", raw, 12, zlib.crc32(raw[16:]))
    return bytes(raw)


def refused(raw: bytes) -> str:
    """The text of the refusal."""
    with pytest.raises(BadInput) as caught:
        runtime.load(raw)
    assert caught.value.number and caught.value.action
    return str(caught.value)


def sections(raw: bytes) -> dict[str, slice]:
    """Where each part of the file lies, from the header alone."""
    h, at, out = header(raw), BASE, {}
    for name, size in (
        ("tensors", 40 * h["tensors"]),
        ("ops", 4 * h["op_words"]),
        ("entries", 24 * h["entries"]),
        ("bindings", 12 * h["bindings"]),
        ("names", h["names"]),
        ("constants", h["constants"]),
        ("initial", h["initial"]),
    ):
        out[name] = slice(at, at + size)
        at += size
    assert at == len(raw)
    return out


def poke(raw: bytes, at: int, form: str, *values: float) -> bytes:
    raw = bytearray(raw)
    struct.pack_into("<" + form, raw, at, *values)
    return sealed(raw)


# -- what is in it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", plans())
def test_header_fields(name):
    plan = plans()[name]
    raw = plan.program.bytes
    h, parts = header(raw), sections(raw)
    assert raw[:4] == b"ACCP" and h["magic"] == MAGIC and h["format"] == FORMAT == 1
    assert h["total"] == len(raw) and h["crc"] == zlib.crc32(raw[16:]) and h["table"] == table_hash()
    assert h["state"] == plan.state_bytes == plan.program.state_bytes
    assert h["arena"] == plan.arena_bytes == plan.program.arena_bytes
    assert h["entries"] == len(plan.layouts) + 1 == len(plan.program.entries)
    assert h["model"] == plans()[name].model_hash and h["reserved"] == 0
    for part in parts.values():
        assert part.start % 4 == 0
    assert h["initial"] <= h["state"]


def test_state_starts_from_the_trained_values():
    plan = compile_plan(cnn(), batch_size=2, optimizer="momentum")
    session = runtime.Session(plan.program)
    for name, value in plan.model.values.items():
        if value.kind in ("parameter", "state"):
            np.testing.assert_array_equal(session.view(STATE_ENTRY, name), value.data)
    moments = [n for n in session.state_names() if n.endswith(".momentum")]
    assert len(moments) == 6
    assert not any(session.view(STATE_ENTRY, n).any() for n in moments)


def test_zeros_at_the_end_of_the_state_take_no_bytes():
    sgd, momentum = (compile_plan(mlp(), optimizer=o).program for o in ("sgd", "momentum"))
    assert momentum.state_bytes - sgd.state_bytes == 4 * (30 + 5 + 15 + 3)
    assert header(momentum.bytes)["initial"] == header(sgd.bytes)["initial"]


@pytest.mark.parametrize("name", plans())
def test_round_trip(name):
    """build -> bytes -> load gives the same entries, and a run from the loaded bytes gives the same bits."""
    plan = plans()[name]
    loaded = runtime.load(plan.program.bytes)
    assert loaded == plan.program
    assert loaded.op_counts == plan.program.op_counts
    assert list(loaded.entries) == [*plan.layouts, STATE_ENTRY]
    for entry, layout in plan.layouts.items():
        for role, value in (*layout.graph.inputs.items(), *layout.graph.outputs.items()):
            b = loaded.entries[entry][role]
            assert (b.type.shape, b.type.dtype) == (
                tuple(layout.graph.shape(value)),
                layout.graph.type(value).dtype,
            )
            assert b.is_output == (role in layout.graph.outputs)
            assert b.area in ((ARENA,) if role in layout.graph.inputs else (ARENA, STATE, CONST))
    x, _ = samples(plan.model, plan.batch_size, 3)
    outputs = [runtime.Session(p).run("predict", x=x)["output"] for p in (plan.program, loaded)]
    assert outputs[0].tobytes() == outputs[1].tobytes() and np.isfinite(outputs[0]).all()


def test_bytes_like_inputs_are_taken(program):
    for kind in (bytes, bytearray, memoryview):
        assert runtime.load(kind(program.bytes)).bytes == program.bytes
    assert runtime.load(memoryview(b"\0" + program.bytes)[1:]).bytes == program.bytes


@pytest.mark.parametrize("name", plans())
def test_equal_plans_give_equal_bytes(name):
    assert plans()[name].program.bytes == plans()[name].program.bytes


def test_build_does_not_depend_on_what_was_built_before():
    first = compile_plan(mlp(), batch_size=2)
    again = first.program.bytes
    compile_plan(cnn(), batch_size=4).program  # noqa: B018
    assert build(first.layouts, model=first.model_hash).bytes == again


def test_batch_sizes_share_the_state_layout():
    plan = plans()["cnn-train"]
    other = plan.with_batch_size(7).program
    assert other.bytes != plan.program.bytes and other.state_bytes == plan.program.state_bytes
    assert other.entries[STATE_ENTRY] == plan.program.entries[STATE_ENTRY]
    state = slice(-header(other.bytes)["initial"], None)
    assert other.bytes[state] == plan.program.bytes[state]


def test_bits_are_packed_lowest_first():
    bits = np.zeros(35, bool)
    bits[[0, 5, 31, 32, 34]] = True
    assert pack_bits(bits).tolist() == [1 | 1 << 5 | 1 << 31, 0b101]


# -- damage --------------------------------------------------------------------------------------------------------


def test_truncated_at_every_length(program):
    raw = program.bytes
    assert len(raw) < 2000  # else this test is slow
    for length in range(len(raw)):
        assert "cut off" in refused(raw[:length]) or length < 4
    for extra in (b"\0", b"\0\0\0\0", raw):
        assert "cut off or has bytes too many" in refused(raw + extra)


def test_truncated_with_the_length_corrected(program):
    """The sections no longer add up to the file, whatever the header's length says."""
    raw = program.bytes
    for length in range(0, len(raw), 4):
        text = refused(sealed(raw[:length]) if length >= BASE else raw[:length])
        assert "outside its area" in text or "cut off" in text


def test_every_single_bit_flip_is_refused(program):
    raw = bytearray(program.bytes)
    texts = set()
    for at in range(len(raw)):
        for bit in range(8):
            raw[at] ^= 1 << bit
            status, text, handle = runtime._core.load(raw, "auto", True)
            assert status and handle is None, f"byte {at} bit {bit} went unnoticed"
            texts.add(text)
            raw[at] ^= 1 << bit
    assert len(texts) == 6  # magic, version, length, table, section sizes, checksum
    assert runtime._core.load(raw, "auto", True)[0] == 0


def test_each_fault_has_its_own_text(program):
    raw = program.bytes
    first_op = sections(raw)["ops"].start
    texts = [
        refused(raw[:-4]),
        refused(sealed(raw, magic=MAGIC ^ 1)),
        refused(sealed(raw, format=FORMAT + 1)),
        refused(sealed(raw, table=table_hash() ^ 1)),
        refused(sealed(raw, crc=header(raw)["crc"] ^ 1)),
        refused(sealed(raw, tensors=header(raw)["tensors"] + 1)),
        refused(poke(raw, BASE, "B", 9)),
        refused(poke(raw, first_op, "H", len(TABLE))),
        refused(poke(raw, BASE + 16, "2i", *reversed(struct.unpack_from("<2i", raw, BASE + 16)))),
    ]
    assert len(set(texts)) == len(texts), texts
    for text, word in zip(
        texts,
        (
            "cut off",
            "not a Program",
            "version",
            "op table",
            "checksum",
            "offset",
            "tensor",
            "op's number",
            "shapes",
        ),
        strict=True,
    ):
        assert word in text


@pytest.mark.parametrize("field", ["names", "constants", "initial", "state", "arena"])
@pytest.mark.parametrize("value", [1, 2**31, 2**32 - 4, 2**32 - 1])
def test_sizes_in_the_header(program, field, value):
    assert "outside its area" in refused(sealed(program.bytes, **{field: value}))


@pytest.mark.parametrize("field", ["reserved"])
def test_reserved_words_must_be_zero(program, field):
    assert "outside its area" in refused(sealed(program.bytes, **{field: 1}))


@pytest.mark.parametrize("field", ["tensors", "op_words", "entries", "bindings"])
@pytest.mark.parametrize("value", [0, 2**16, 2**30, 2**32 - 1])
def test_counts_in_the_header(program, field, value):
    """Sizes are summed in 64 bits: no count can wrap around to a sum that fits."""
    assert "outside its area" in refused(sealed(program.bytes, **{field: value}))


def test_counts_that_add_up_but_shift_the_sections(program):
    """One tensor record less and ten words of ops more: the sum is right, the content is not."""
    h = header(program.bytes)
    for tensors, words in ((-1, 10), (1, -10)):
        refused(sealed(program.bytes, tensors=h["tensors"] + tensors, op_words=h["op_words"] + words))


@pytest.mark.parametrize(
    ("at", "form", "values"),
    [
        (0, "B", (7,)),
        (0, "B", (255,)),  # dtype
        (1, "B", (7,)),
        (1, "B", (0,)),  # rank; with rank 0 the dims must be one
        (2, "B", (3,)),
        (3, "B", (1,)),
        (12, "I", (1,)),  # area, reserved
        (8, "I", (0,)),
        (8, "I", (2**32 - 1,)),  # size
        (16, "i", (0,)),
        (16, "i", (-1,)),
        (16, "i", (2**31 - 1,)),  # dims
        (36, "i", (2,)),
        (16, "6i", (2**16,) * 6),
        (16, "2i", (2**16, 2**16)),
    ],
)
def test_tensor_records(program, at, form, values):
    assert "tensor's rank, dimension or type" in refused(poke(program.bytes, BASE + at, form, *values))


@pytest.mark.parametrize(("rank", "size"), [(2, 0), (2, 2**31), (4, 0), (6, 0)])
def test_products_of_dimensions_do_not_wrap(program, rank, size):
    """2^16 along each dimension: 2^32, 2^64 and 2^96 elements, which are none where the product wraps around."""
    raw = poke(program.bytes, BASE + 1, "B", rank)
    raw = poke(raw, BASE + 16, f"{rank}i", *(2**16,) * rank)
    assert "tensor's rank" in refused(poke(raw, BASE + 8, "I", size))


@pytest.mark.parametrize("offset", [1, 2, 3, 2**31, 2**32 - 4])
def test_tensor_offsets(program, offset):
    assert "outside its area" in refused(poke(program.bytes, BASE + 4, "I", offset))


def test_the_last_byte_of_an_area_can_be_used_and_none_beyond(program):
    size = struct.unpack_from("<I", program.bytes, BASE + 8)[0]
    area = program.bytes[BASE + 2]
    room = {ARENA: program.arena_bytes, STATE: program.state_bytes}[area]
    for beyond in (0, 4):
        raw = poke(program.bytes, BASE + 4, "I", room - 4 * size + beyond)
        if beyond:
            assert "outside its area" in refused(raw)
        else:
            runtime.load(raw)


def entry_at(raw: bytes, index: int) -> int:
    return sections(raw)["entries"].start + 24 * index


@pytest.mark.parametrize(
    ("word", "value"),
    [
        (0, 2**32 - 1),
        (1, 1),
        (1, 2**32 - 1),
        (2, 2**32 - 1),
        (3, 0),
        (3, 2**32 - 1),
        (4, 2**32 - 1),
        (5, 2**32 - 1),
    ],
)
def test_entries(program, word, value):
    text = refused(poke(program.bytes, entry_at(program.bytes, 1) + 4 * word, "I", value))
    assert "outside its area" in text or "op's number" in text or "shapes" in text


def test_entries_do_not_share_ops(program):
    """Else a small file could make the loader check the same ops over and over."""
    first = struct.unpack_from("<6I", program.bytes, entry_at(program.bytes, 0))
    raw = poke(program.bytes, entry_at(program.bytes, 1) + 4, "3I", *first[1:4])
    assert "outside its area" in refused(raw)


def test_many_entries_are_checked_in_linear_time():
    """A file of 4 MB, half of it entries: one pass, not entries times ops."""
    raw = compile_plan(mlp(3, 2, 2)).program.bytes
    parts, h = sections(raw), header(raw)
    count = 40_000
    copies = 2000
    step = struct.unpack_from("<6I", raw, entry_at(raw, 1))
    ops = raw[parts["ops"]][4 * step[1] : 4 * step[2]] * copies
    words, n_ops = len(ops) // 4, step[3] * copies
    entries = [struct.pack("<6I", step[0], 0, words, n_ops, 0, 0)] * count
    body = b"".join(
        [
            raw[parts["tensors"]],
            ops,
            *entries,
            raw[parts["bindings"]],
            raw[parts["names"]],
            raw[parts["constants"]],
            raw[parts["initial"]],
        ]
    )
    hostile = sealed(raw[:BASE] + body, op_words=words, entries=count)
    start = time.perf_counter()
    refused(hostile)
    honest = [struct.pack("<6I", step[0], 0, words, n_ops, 0, 0)]
    body = b"".join(
        [
            raw[parts["tensors"]],
            ops,
            *honest,
            raw[parts["bindings"]],
            raw[parts["names"]],
            raw[parts["constants"]],
            raw[parts["initial"]],
        ]
    )
    runtime.load(sealed(raw[:BASE] + body, op_words=words, entries=1))
    assert time.perf_counter() - start < 5
    assert h["entries"] == 3


@pytest.mark.parametrize(("word", "value"), [(0, 2**32 - 1), (1, 2**32 - 1), (2, 2)])
def test_bindings(program, word, value):
    at = sections(program.bytes)["bindings"].start
    assert "outside its area" in refused(poke(program.bytes, at + 4 * word, "I", value))


def test_an_input_cannot_be_a_constant():
    """Whoever feeds an input writes to its address, and constants were checked, and may lie in flash."""
    raw = plans()["cnn-channels"].program.bytes
    parts = sections(raw)
    areas = [raw[parts["tensors"].start + 40 * i + 2] for i in range(header(raw)["tensors"])]
    at = parts["bindings"].start
    assert "outside its area" in refused(poke(raw, at + 4, "I", areas.index(CONST)))
    runtime.load(poke(raw, at + 4, "2I", areas.index(CONST), 1))  # as an output it is only read


def test_names_must_end(program):
    part = sections(program.bytes)["names"]
    assert "outside its area" in refused(poke(program.bytes, part.stop - 1, "B", 65))


def test_a_name_that_is_not_text(program):
    part = sections(program.bytes)["names"]
    text = refused(poke(program.bytes, part.start, "B", 0xFF))
    assert "not text" in text


def test_python_and_c_decode_the_same_entry_where_names_repeat(program):
    """Two entries of one name: the first counts for both, or the file is refused; never one here and one there."""
    raw = program.bytes
    step = struct.unpack_from("<I", raw, entry_at(raw, 1))[0]
    doubled = poke(raw, entry_at(raw, 0), "I", step)
    with pytest.raises(BadInput, match="twice"):
        runtime.load(doubled)


def test_ops_write_only_to_the_arena_or_to_what_they_update(program):
    """An output in the state, or an update of a constant, would outlive its checks."""
    raw = program.bytes
    tensors = sections(raw)["tensors"]
    moved = 0
    for at in range(tensors.start, tensors.stop, 40):
        for area in {CONST, STATE, ARENA} - {raw[at + 2]}:
            status = runtime._core.load(poke(raw, at, "4BI", *raw[at : at + 2], area, 0, 0), "auto", True)[0]
            moved += status == 8  # AC_E_OP
    assert moved > 10


def test_decode_is_what_load_returns(program):
    assert decode(program.bytes) == runtime.load(program.bytes)


@pytest.mark.parametrize("junk", [b"", b"\0" * 64, b"ACCP", b"ACCP" + b"\xff" * 60, bytes(range(256)) * 8])
def test_junk(junk):
    refused(junk)


# -- docs/format.md ------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]


def tables_of_the_page() -> list[list[list[str]]]:
    """Every table of the page: rows of cells, without the head."""
    tables, rows = [], []
    for line in (ROOT / "docs/format.md").read_text().splitlines() + [""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            tables.append(rows[2:])
            rows = []
    return tables


def test_the_page_says_what_the_code_does():
    program_header, tensor, delta_header, record, _, slot = tables_of_the_page()
    assert [(int(r[0]), int(r[1]), r[2]) for r in program_header] == [
        (4 * i, i, name) for i, name in enumerate(FIELDS)
    ]
    source = (runtime.SOURCE / "ac_core.c").read_text()
    words = re.search(r"enum \{ (H_MAGIC.*?), HEADER_WORDS \}", source, re.DOTALL)[1]
    assert [w.strip()[2:].lower() for w in words.split(",")] == list(FIELDS)
    assert f"0x{MAGIC:08X}" in program_header[0][3] and program_header[1][3] == str(FORMAT)

    struct_text = re.search(
        r"40 bytes. \*/\ntypedef struct \{(.*?)\} ac_tensor;",
        (runtime.SOURCE / "acclimate.h").read_text(),
        re.DOTALL,
    )
    declared = [n.split("[")[0] for n in re.findall(r"(\w+(?:\[\w+\])?)[,;]", struct_text[1])]
    assert [r[2] for r in tensor] == declared
    sizes = {"u8": 1, "u32": 4, "i32 x 6": 24}
    assert [int(r[0]) for r in tensor] == list(
        itertools.accumulate([sizes[r[1]] for r in tensor[:-1]], initial=0)
    )
    assert tensor[0][3] == ", ".join(f"{code} {name}" for name, code in DTYPE_CODES.items())
    for name, size in (("ENTRY_WORDS", 24), ("BINDING_WORDS", 12)):
        assert f"{name} = {size // 4}" in source
    page = (ROOT / "docs/format.md").read_text()
    for title in ("Tensors, 40 bytes each", "Entries, 24 bytes each", "Bindings, 12 bytes each"):
        assert title in page

    assert [int(r[0]) for r in delta_header] == list(range(0, delta.HEADER.size, 4))
    assert f"0x{delta.MAGIC:08X}" in delta_header[0][2] and delta_header[1][2] == str(delta.FORMAT)
    assert [int(r[0]) for r in record] == [0, 2, 3, 4, 8, delta.RECORD.size]
    assert record[1][3] == ", ".join(f"{i} {name}" for i, name in enumerate(delta.DTYPE_LIST))
    source = (runtime.SOURCE / "ac_store.c").read_text()
    words = [
        w.strip()[2:].lower()
        for w in re.search(r"enum \{\s*(W_MAGIC.*?) = 15", source, re.DOTALL)[1].split(",")
    ]
    assert [r[1] for r in slot] == words and slot[-1][0] == "15" and store.HEADER.size == 60
    assert f"0x{int.from_bytes(store.MAGIC, 'little'):08X}" in slot[0][2] and slot[1][2] == str(store.FORMAT)
    assert f"0x{int.from_bytes(store.SEAL, 'little'):08X}" in page
    raw = delta.encode([delta.Record("ab", np.zeros(3, np.float32))], 7)
    assert struct.unpack_from("<HBBII", raw, delta.HEADER.size) == (2, 0, 255, 0, 3)
