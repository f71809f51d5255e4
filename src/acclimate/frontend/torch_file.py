"""What of a .pt2 file may reach torch.export.load, which unpickles, imports and evaluates what files hold.

Only the entries of an exported program are taken, and of those only data: tensors as plain bytes, calls of known
namespaces, sizes without code in them. They go into a new archive, so that what was checked is what torch reads.
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODEL = "models/model.json"
CONFIGS = {
    "weights": "data/weights/model_weights_config.json",
    "constants": "data/constants/model_constants_config.json",
}
_TENSORS = re.compile(r"data/(weights/weight|constants/tensor)_\d+")
_KEPT = {MODEL, *CONFIGS.values(), "archive_format", "archive_version", "byteorder", ".data/version"}
_DROPPED = re.compile(r"data/sample_inputs/model\.pt|\.data/serialization_id|extra/.*")
_CALLS = re.compile(
    r"torch\.ops\.(aten|prims|higher_order)\.\w+(\.\w+)?|torch\.sym_\w+|math\.(ceil|floor|trunc|sqrt)"
    r"|_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_|not_)"
)
_SIZE = re.compile(
    r"(Symbol\('[a-z]+\d+'(, (positive|nonnegative|integer)=True)*\)|Integer|Add|Mul|FloorDiv|Mod|PythonMod|CleanDiv"
    r"|Max|Min|[su]\d+|\d{1,18}|[-+*/(), ])*"
)


class NotData(Exception):
    """The archive holds more than data, or is damaged; the text says what."""


def checked(file: Path) -> io.BytesIO:
    """The archive that torch may read, or NotData."""
    entries = _entries(file)
    try:
        model = json.loads(entries[MODEL])
        _check_model(model)
        model["guards_code"] = []  # Python source, checks of inputs that nobody here makes
        entries[MODEL] = json.dumps(model).encode()
        for kind, name in CONFIGS.items():
            _check_tensors(kind, json.loads(entries[name]), entries)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise NotData(f"{type(error).__name__}: {error}") from error
    # An example input is stored as a pickle, and an empty one is allowed.
    out, entries = io.BytesIO(), {**entries, "data/sample_inputs/model.pt": b""}
    with zipfile.ZipFile(out, "w") as archive:
        for name, raw in entries.items():
            archive.writestr(f"model/{name}", raw)
    out.seek(0)
    return out


def _entries(file: Path) -> dict[str, bytes]:
    """The entries that count, by name without the first folder."""
    with zipfile.ZipFile(file) as archive:
        found: dict[str, bytes] = {}
        infos = archive.infolist()
        if sum(i.file_size for i in infos) > file.stat().st_size:
            raise NotData("it unpacks to more than it holds")
        for info in infos:
            name = info.filename.partition("/")[2]
            if name in found:
                raise NotData(f"{name} stands twice")
            if info.compress_type != zipfile.ZIP_STORED:
                raise NotData(f"{info.filename} is compressed")
            if name in _KEPT or _TENSORS.fullmatch(name):
                found[name] = archive.read(info)
            elif not _DROPPED.fullmatch(name):
                raise NotData(f"{info.filename} is no part of an exported program")
    return found


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """Every (key, value) of nested JSON."""
    stack = [value]
    while stack:
        at = stack.pop()
        if isinstance(at, dict):
            yield from at.items()
            stack += at.values()
        elif isinstance(at, list):
            stack += at


def _check_model(model: Any) -> None:
    for key, value in _items(model):
        if key in ("target", "as_operator") and isinstance(value, str) and not _CALLS.fullmatch(value):
            raise NotData(f"it calls {value[:80]!r}")
        if key == "expr_str" and not (isinstance(value, str) and len(value) < 400 and _SIZE.fullmatch(value)):
            raise NotData(f"a size is computed by {str(value)[:80]!r}")
        if key == "expr_str" and "**" in value:
            raise NotData(f"a size is a power: {value[:80]!r}")
        if key == "as_custom_obj":
            raise NotData("it holds a custom object")


def _check_tensors(kind: str, config: Any, entries: dict[str, bytes]) -> None:
    for name, payload in config["config"].items():
        at = f"data/{kind}/{payload['path_name']}"
        if payload["use_pickle"] or not _TENSORS.fullmatch(at):
            raise NotData(f"{name} is not stored as a plain tensor but as Python code (a pickle)")
        sizes = [int(s["as_int"]) for s in payload["tensor_meta"]["sizes"]]
        if min(sizes, default=1) < 0 or math.prod(sizes) > len(entries[at]):
            raise NotData(f"{name} has {math.prod(sizes)} elements, the file {len(entries[at])} bytes of it")
