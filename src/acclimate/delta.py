"""What was learned, as a file (.acu): only the tensors and channels that changed, bound to the model they belong to.

Written beside the target, synced, then renamed over it: after a crash at any point the old file or the new one
is there, whole. Read back with length, version, checksum, model and every shape checked before anything is used.
docs/format.md describes the bytes.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import BadInput
from .grad import Channels
from .ir import DTYPES, Type

MAGIC = int.from_bytes(b"ACUP", "little")
FORMAT = 1
HEADER = struct.Struct(
    "<6I"
)  # magic, format, total bytes, crc32 of what follows it, model hash, number of records
RECORD = struct.Struct("<HBBII")  # length of name, dtype, axis (255: whole tensor), channels, elements
DTYPE_LIST = ("f32", "i32", "i8", "i16")
MAX_ELEMENTS = 2**31 - 1
_OTHER_PLAN = "restore it with the scheme and optimiser that it was saved with"


@dataclass(frozen=True)
class Record:
    """New content of a tensor, or of some of its channels. `data` holds those channels only."""

    name: str
    data: np.ndarray
    channels: Channels | None = None
    dtype: str = "f32"

    def apply(self, array: np.ndarray) -> np.ndarray:
        """`array` (the whole tensor) with this content in it."""
        if self.channels is None:
            return self.data.reshape(array.shape)
        out = array.copy()
        out[(slice(None),) * self.channels.axis + (np.array(self.channels.index),)] = self.data.reshape(
            *array.shape[: self.channels.axis],
            len(self.channels.index),
            *array.shape[self.channels.axis + 1 :],
        )
        return out


def encode(records: list[Record], model: int) -> bytes:
    """The bytes of a delta."""
    body = b""
    for r in records:
        name = r.name.encode()
        index = np.array([] if r.channels is None else r.channels.index, "<u4")
        body += RECORD.pack(
            len(name),
            DTYPE_LIST.index(r.dtype),
            255 if r.channels is None else r.channels.axis,
            index.size,
            r.data.size,
        )
        body += (
            name
            + index.tobytes()
            + np.ascontiguousarray(r.data, np.dtype(DTYPES[r.dtype]).newbyteorder("<")).tobytes()
        )
    rest = struct.pack("<2I", model, len(records)) + body
    return struct.pack("<4I", MAGIC, FORMAT, 16 + len(rest), zlib.crc32(rest)) + rest


def decode(raw: bytes, where: str = "") -> tuple[int, list[Record]]:
    """(model hash, records) from bytes of any origin; BadInput says what is wrong with them."""

    def bad(what: str, number: str = "") -> BadInput:
        return BadInput(
            f"this is not a usable delta: {what}",
            where=where,
            number=number,
            action="save it again; an older copy may still be whole",
        )

    if len(raw) < HEADER.size:
        raise bad("it is cut off", f"{len(raw)} bytes")
    magic, version, total, crc, model, count = HEADER.unpack_from(raw)
    if magic != MAGIC:
        raise bad("it does not start as one")
    if version != FORMAT:
        raise bad("its format version is unknown", f"version {version}, this acclimate reads {FORMAT}")
    if total != len(raw):
        raise bad("it is cut off or has bytes too many", f"{len(raw)} bytes, the header says {total}")
    if zlib.crc32(raw[16:]) != crc:
        raise bad("the checksum does not match: bytes were changed")
    at, records = HEADER.size, []
    for _ in range(count):
        if at + RECORD.size > total:
            raise bad("a record is cut off", f"at byte {at}")
        name_len, dtype, axis, n_channels, n = RECORD.unpack_from(raw, at)
        at += RECORD.size
        if dtype >= len(DTYPE_LIST) or n > MAX_ELEMENTS or (axis == 255) != (n_channels == 0):
            raise bad("a record is not valid", f"at byte {at}")
        kind = np.dtype(DTYPES[DTYPE_LIST[dtype]])
        if at + name_len + 4 * n_channels + kind.itemsize * n > total:
            raise bad("a record is cut off", f"at byte {at}")
        try:
            name = raw[at : at + name_len].decode()
        except UnicodeDecodeError:
            raise bad("a name is not text", f"at byte {at}") from None
        at += name_len
        index = tuple(int(i) for i in np.frombuffer(raw, "<u4", n_channels, at))
        at += 4 * n_channels
        data = np.frombuffer(raw, kind.newbyteorder("<"), n, at).astype(kind)
        at += kind.itemsize * n
        records.append(Record(name, data, Channels(axis, index) if n_channels else None, DTYPE_LIST[dtype]))
    if at != total:
        raise bad("there are bytes after the last record", f"{total - at} bytes")
    return model, records


def check(records: list[Record], types: Mapping[str, Type], where: str = "") -> None:
    """BadInput unless every record names a known tensor, once, and has its shape, element type and finite values."""
    seen: set[str] = set()
    for r in records:
        type_, place = types.get(r.name), f"{where} {r.name}".strip()
        if type_ is None:
            raise BadInput(
                "the delta names a tensor that this plan does not learn",
                where=place,
                number=f"this one has {len(types)}",
                action=_OTHER_PLAN,
            )
        if r.name in seen:
            raise BadInput(
                "the delta holds a tensor twice",
                where=place,
                number=f"{len(records)} records",
                action="save it again",
            )
        seen.add(r.name)
        if r.dtype != type_.dtype:
            raise BadInput(
                "the delta has another element type",
                where=place,
                number=f"{r.dtype}, {type_.dtype} needed",
                action=_OTHER_PLAN,
            )
        shape = tuple(type_.shape)
        want = int(np.prod(shape))
        if r.channels is not None:
            ok = (
                r.channels.axis < len(shape)
                and max(r.channels.index) < shape[r.channels.axis]
                and len(set(r.channels.index)) == len(r.channels.index)
            )
            if not ok:
                raise BadInput(
                    "the delta's channels do not exist, or are given twice",
                    where=place,
                    number=f"shape {shape}",
                    action=_OTHER_PLAN,
                )
            want = want // shape[r.channels.axis] * len(r.channels.index)
        if r.data.size != want:
            raise BadInput(
                "the delta has another shape",
                where=place,
                number=f"{r.data.size} values, {want} needed",
                action=_OTHER_PLAN,
            )
        if not np.isfinite(r.data).all():
            raise BadInput(
                "the delta holds NaN or infinity",
                where=place,
                number=f"{int((~np.isfinite(r.data)).sum())} of {r.data.size} values",
                action="learning diverged: go back to an older state, and lower the learning rate",
            )


def write(path: str | Path, raw: bytes) -> None:
    """Write a file so that a crash leaves the old content or the new, never a mixture."""
    path = Path(path)
    temporary = path.with_name(
        f".acclimate.{os.getpid()}.{threading.get_ident()}.part"
    )  # of this writer alone
    try:
        with open(temporary, "wb") as f:
            f.write(raw)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        raise BadInput(
            "the delta could not be written",
            where=str(path),
            number=str(error),
            action="check the folder and the free space; the old file is as it was",
        ) from error
    if hasattr(os, "O_DIRECTORY"):
        with contextlib.suppress(
            OSError
        ):  # some file systems cannot; the old file or the new is there either way
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadInput(
            "the delta could not be read",
            where=str(path),
            number=error.strerror or str(error),
            action="check the path",
        ) from error
