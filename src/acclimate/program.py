"""The Program: one flat, checksummed, position-independent file that the C runtime runs as it is.

Little-endian. Sixteen 32-bit words of header, then the sections one after another, so that no offset between
sections can be wrong: tensors (40 bytes each), op stream, entries, bindings, names, constants, initial state.
docs/format.md describes it; `ac_load` in runtime/ac_core.c checks every field of it once.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import BadInput
from .ir import DTYPES, PERSISTENT, Graph, Node, Type
from .layout import Layout, persistent_layout
from .ops import TABLE, parse, table_hash
from .ops.row import MAX_RANK

MAGIC = int.from_bytes(b"ACCP", "little")
FORMAT = 1
HEADER_WORDS = 16
ABSENT = 0xFFFF
DTYPE_CODES = {"f32": 0, "i32": 1, "u8": 2, "u16": 3, "i8": 4, "bit": 5, "i16": 6}
CONST, STATE, ARENA = 0, 1, 2
STATE_ENTRY = "state"  # an entry without ops, whose bindings name every persistent value
#: Entries without ops that name, for each tensor of which the state holds but some channels along axis 1, the constants
#: that hold the whole of it as it was trained, and the indices of those channels.
FIXED_ENTRY, CHANNELS_ENTRY = "fixed", "channels"


@dataclass(frozen=True)
class Binding:
    """A named tensor of an entry: where it lies and what it is."""

    name: str
    type: Type
    area: int
    offset: int  # bytes from the start of its area
    is_output: bool


@dataclass(frozen=True)
class Operation:
    """An op of a Program's stream: its row, the types of its inputs and outputs (None where one is absent), and the
    indices of the outputs' tensor records."""

    op: str
    inputs: tuple[Type | None, ...]
    outputs: tuple[Type | None, ...]
    records: tuple[int, ...]

    @property
    def shapes(self) -> str:
        """The types in a line, inputs -> outputs."""
        sides = [[str(t) if t else "-" for t in side] for side in (self.inputs, self.outputs)]
        return " -> ".join(", ".join(side) for side in sides)


@dataclass(frozen=True)
class Program:
    """A Program's bytes and what Python needs to know of them."""

    bytes: bytes
    entries: Mapping[str, Mapping[str, Binding]]
    state_bytes: int
    arena_bytes: int

    @property
    def op_counts(self) -> dict[str, int]:
        """Number of ops of each entry."""
        return {name: count for name, (_, count) in _entry_words(self.bytes).items()}

    def place(self, record: int) -> tuple[int, int]:
        """Area and offset of a tensor record."""
        _, _, area, _, offset = struct.unpack_from("<4BI", self.bytes, 4 * HEADER_WORDS + 40 * record)
        return area, offset


def pack_bits(array: np.ndarray) -> np.ndarray:
    """Booleans as words of 32, lowest bit first."""
    flat = np.zeros((array.size + 31) // 32 * 32, np.uint8)
    flat[: array.size] = array.reshape(-1)
    return np.packbits(flat, bitorder="little").view("<u4")


def _raw(data: np.ndarray, type_: Type) -> bytes:
    raw = (
        pack_bits(data).tobytes()
        if type_.dtype == "bit"
        else np.ascontiguousarray(data, DTYPES[type_.dtype]).tobytes()
    )
    return raw + bytes(type_.size_bytes - len(raw))


def encode_attrs(op: str, attrs: Mapping[str, Any]) -> bytes:
    """Attributes as the generated C struct of the op lays them out."""
    out = b""
    for name, attr in TABLE[op].encoded().items():
        value = attrs[name]
        if attr.kind == "f":
            out += struct.pack("<f", value)
        elif attr.kind == "i":
            value = int(value)
            out += struct.pack("<i", value - 2**32 if value >= 2**31 else value)
        else:
            count = int(attr.kind[1:])
            if len(value) > count:
                raise BadInput(
                    f"attribute {name} of {op} is too long", number=f"{len(value)}, at most {count}"
                )
            out += struct.pack(f"<{count}i", *(attr.pad,) * (count - len(value)), *(int(v) for v in value))
    return out


def _view_sources(layout: Layout) -> dict[str, str]:
    """What each view is a view of, all the way down."""
    sources: dict[str, str] = {}
    for node in layout.nodes:
        if TABLE[node.op].view:
            sources[node.outputs[0]] = sources.get(node.inputs[0], node.inputs[0])
    return sources


class _Writer:
    def __init__(self, layouts: Mapping[str, Layout], state: tuple[Mapping[str, int], int] | None) -> None:
        self.layouts = layouts
        self.offsets, self.state_bytes = state or persistent_layout([p.graph for p in layouts.values()])
        self.tensors: list[bytes] = []
        self.tensor_index: dict[tuple, int] = {}
        self.constants = bytearray()
        self.constant_at: dict[bytes, int] = {}
        self.names = bytearray()
        self.bindings: list[tuple[int, int, int]] = []
        self.initial = bytearray(self.state_bytes)
        self.sources = {id(p.graph): _view_sources(p) for p in layouts.values()}

    def tensor(self, graph: Graph, name: str, layout: Layout) -> int:
        """Index of the record for a value; equal records are written once."""
        area, offset = self._place(graph, name, layout)
        type_ = graph.type(name)
        shape = tuple(int(s) for s in type_.shape)
        key = (area, offset, type_.dtype, shape)
        if key not in self.tensor_index:
            if len(shape) > MAX_RANK or len(self.tensors) >= ABSENT:
                raise BadInput("a tensor cannot be written to a Program", where=name, number=f"{shape}")
            self.tensor_index[key] = len(self.tensors)
            self.tensors.append(
                struct.pack(
                    "<4BIII6i",
                    DTYPE_CODES[type_.dtype],
                    len(shape),
                    area,
                    0,
                    offset,
                    type_.size,
                    0,
                    *shape,
                    *(1,) * (MAX_RANK - len(shape)),
                )
            )
        return self.tensor_index[key]

    def _place(self, graph: Graph, name: str, layout: Layout) -> tuple[int, int]:
        value = graph.values[self.sources[id(graph)].get(name, name)]
        if value.kind in PERSISTENT:
            return STATE, self.offsets[value.name]
        if value.kind == "constant":
            assert value.data is not None
            raw = _raw(value.data, value.type)
            if raw not in self.constant_at:
                self.constant_at[raw] = len(self.constants)
                self.constants += raw
            return CONST, self.constant_at[raw]
        return ARENA, layout.offsets[value.name]

    def name(self, text: str) -> int:
        raw = text.encode() + b"\0"
        at = self.names.find(raw)
        while at > 0 and self.names[at - 1] != 0:  # only whole strings
            at = self.names.find(raw, at + 1)
        if at < 0:
            at = len(self.names)
            self.names += raw
        return at

    def entry(self, name: str, layout: Layout, stream: bytearray) -> tuple[int, ...]:
        graph, first, n_ops = layout.graph, len(stream) // 4, 0
        for node in layout.nodes:
            if not TABLE[node.op].view:
                stream += self._op(graph, node, layout)
                n_ops += 1
        first_binding = len(self.bindings)
        for roles, is_output in ((graph.inputs, 0), (graph.outputs, 1)):
            for role, value in roles.items():
                self.bindings.append((self.name(role), self.tensor(graph, value, layout), is_output))
        return self.name(name), first, len(stream) // 4, n_ops, first_binding, len(self.bindings)

    def _op(self, graph: Graph, node: Node, layout: Layout) -> bytes:
        ins, outs = parse(TABLE[node.op].signature)
        n_in = len(node.inputs) if ins and ins[-1].repeated else len(ins)
        inputs = (*node.inputs, *("",) * (n_in - len(node.inputs)))
        args = [self.tensor(graph, n, layout) if n else ABSENT for n in (*inputs, *node.outputs)]
        args += [ABSENT] * (len(args) % 2)
        return struct.pack(
            f"<HBB{len(args)}H", list(TABLE).index(node.op), n_in, len(outs), *args
        ) + encode_attrs(node.op, node.attrs)

    def state_entry(self, at: int) -> tuple[int, ...]:
        first_binding = len(self.bindings)
        for layout in self.layouts.values():
            for value in layout.graph.values.values():
                if value.kind in PERSISTENT:
                    assert value.data is not None
                    raw = _raw(value.data, value.type)
                    self.initial[self.offsets[value.name] : self.offsets[value.name] + len(raw)] = raw
                    binding = (self.name(value.name), self.tensor(layout.graph, value.name, layout), 0)
                    if binding not in self.bindings[first_binding:]:
                        self.bindings.append(binding)
        return self.name(STATE_ENTRY), at, at, 0, first_binding, len(self.bindings)

    def part_entries(self, at: int) -> list[tuple[int, ...]]:
        parts = {
            v.name: (p, v.part)
            for p in self.layouts.values()
            for v in p.graph.values.values()
            if v.part is not None and all(n in p.graph.values for n in v.part)
        }
        entries: list[tuple[int, ...]] = []
        for i, entry in enumerate((FIXED_ENTRY, CHANNELS_ENTRY) if parts else ()):
            first = len(self.bindings)
            for name, (layout, part) in parts.items():
                self.bindings.append((self.name(name), self.tensor(layout.graph, part[i], layout), 1))
            entries.append((self.name(entry), at, at, 0, first, len(self.bindings)))
        return entries


def model_hash(model: Graph) -> int:
    """CRC-32 of a model's parameter names, shapes and trained values: a delta fits the model it was learned from."""
    crc = 0
    for name, value in sorted(model.parameters().items()):
        assert value.data is not None
        crc = zlib.crc32(f"{name}{tuple(int(s) for s in value.shape)}".encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(value.data).tobytes(), crc)
    return crc


def build(
    layouts: Mapping[str, Layout], state: tuple[Mapping[str, int], int] | None = None, model: int = 0
) -> Program:
    """Write the Program whose entries are the given layouts. Persistent values are shared between entries by name.

    `state`: offsets and bytes of another Program's persistent values, for one that works on the same block.
    `model`: the model's hash, by which the C runtime knows the deltas that fit; 0 for none.
    """
    writer, stream, entries = _Writer(layouts, state), bytearray(), []
    for name, layout in layouts.items():
        entries.append(writer.entry(name, layout, stream))
    entries.append(writer.state_entry(len(stream) // 4))
    entries += writer.part_entries(len(stream) // 4)
    arena = max((p.arena_bytes for p in layouts.values()), default=0)
    names = bytes(writer.names) + bytes(-len(writer.names) % 4)
    initial = bytes(writer.initial).rstrip(b"\0")
    initial += bytes(-len(initial) % 4)
    body = b"".join(
        [
            *writer.tensors,
            bytes(stream),
            *(struct.pack("<6I", *e) for e in entries),
            *(struct.pack("<3I", *b) for b in writer.bindings),
            names,
            bytes(writer.constants),
            initial,
        ]
    )
    total = 4 * HEADER_WORDS + len(body)
    if total >= 2**31 or arena >= 2**31 or writer.state_bytes >= 2**31:
        raise BadInput(
            "the Program is too large",
            number=f"{total} bytes, arena {arena}",
            action="use a smaller batch_size",
        )
    tail = struct.pack(
        "<12I",
        table_hash(),
        len(writer.tensors),
        len(stream) // 4,
        len(entries),
        len(writer.bindings),
        len(names),
        len(writer.constants),
        len(initial),
        writer.state_bytes,
        arena,
        model,
        0,
    )
    crc = zlib.crc32(body, zlib.crc32(tail))
    return decode(struct.pack("<4I", MAGIC, FORMAT, total, crc) + tail + body)


def _entry_words(raw: bytes) -> dict[str, tuple[tuple[int, int], int]]:
    """Entry name -> (its range of bindings, number of ops). The bytes must have been checked."""
    return {name: ((b0, b1), n) for name, _, _, n, b0, b1 in _read_entries(raw)[0]}


def _read_entries(raw: bytes) -> tuple[list[tuple], int, int, int]:
    header = struct.unpack_from(f"<{HEADER_WORDS}I", raw)
    n_tensors, op_words, n_entries, n_bindings, name_bytes = header[5:10]
    at = 4 * HEADER_WORDS + 40 * n_tensors + 4 * op_words
    bindings_at = at + 24 * n_entries
    names_at = bindings_at + 12 * n_bindings
    entries = [struct.unpack_from("<6I", raw, at + 24 * i) for i in range(n_entries)]
    names = raw[names_at : names_at + name_bytes]
    return [(_string(names, e[0]), *e[1:]) for e in entries], bindings_at, names_at, name_bytes


def _string(names: bytes, at: int) -> str:
    try:
        return names[at : names.index(b"\0", at)].decode()
    except UnicodeDecodeError:
        raise BadInput(
            "a name in the Program is not text",
            number=f"at byte {at} of the names",
            action="make the Program again from its model",
        ) from None


def decode(raw: bytes) -> Program:
    """What Python needs to know of a Program's bytes, which must be our own or checked: see runtime.load."""
    header = struct.unpack_from(f"<{HEADER_WORDS}I", raw)
    codes = {code: name for name, code in DTYPE_CODES.items()}
    entries, bindings_at, names_at, name_bytes = _read_entries(raw)
    names = raw[names_at : names_at + name_bytes]
    out: dict[str, dict[str, Binding]] = {}

    def once(name: str, known: Mapping[str, Any]) -> None:
        if name in known:  # the C runtime finds the first; a dict would hold the last
            raise BadInput(
                "a name stands twice in the Program",
                where=name,
                number=f"among {len(known)}",
                action="make the Program again from its model",
            )

    for name, _, _, _, first, end in entries:
        once(name, out)
        out[name] = {}
        for i in range(first, end):
            name_at, tensor, is_output = struct.unpack_from("<3I", raw, bindings_at + 12 * i)
            dtype, rank, area, _, offset, _, _, *dims = struct.unpack_from(
                "<4BIII6i", raw, 4 * HEADER_WORDS + 40 * tensor
            )
            text = _string(names, name_at)
            once(text, out[name])
            out[name][text] = Binding(
                text, Type(tuple(dims[:rank]), codes[dtype]), area, offset, bool(is_output)
            )
    return Program(bytes(raw), out, header[12], header[13])


def operations(program: Program, entry: str) -> list[Operation]:
    """The ops of an entry in the order in which they run."""
    raw, found = program.bytes, []
    n_tensors = struct.unpack_from("<I", raw, 20)[0]
    codes, rows = {code: name for name, code in DTYPE_CODES.items()}, list(TABLE.values())
    stream = 4 * HEADER_WORDS + 40 * n_tensors

    def type_of(index: int) -> Type | None:
        if index == ABSENT:
            return None
        dtype, rank, _, _, _, _, _, *dims = struct.unpack_from("<4BIII6i", raw, 4 * HEADER_WORDS + 40 * index)
        return Type(tuple(dims[:rank]), codes[dtype])

    for name, at, end, *_ in _read_entries(raw)[0]:
        while name == entry and at < end:
            op, n_in, n_out = struct.unpack_from("<HBB", raw, stream + 4 * at)
            indices = struct.unpack_from(f"<{n_in + n_out}H", raw, stream + 4 * at + 4)
            types = [type_of(i) for i in indices]
            row = rows[op]
            found.append(Operation(row.name, tuple(types[:n_in]), tuple(types[n_in:]), indices[n_in:]))
            at += 1 + (n_in + n_out + 1) // 2 + sum(a.words for a in row.encoded().values())
    return found
