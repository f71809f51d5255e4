"""The C runtime compiled by itself, plainly and with sanitizers; once for all tests in this folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from runtime.native import ROOT, SANITIZE, STRICT, Harness, call, compile_all, compiler, sources


@pytest.fixture(scope="session")
def plain_objects(tmp_path_factory) -> list[Path]:
    """The runtime as a board compiles it; a warning is an error."""
    return compile_all(sources(), tmp_path_factory.mktemp("plain"), [*STRICT, "-O2"])


@pytest.fixture(scope="session")
def harness(tmp_path_factory) -> Harness:
    folder, cc = tmp_path_factory.mktemp("sanitized"), compiler()
    (folder / "probe.c").write_text("int main(void) { return 0; }\n")
    flags = SANITIZE + ["-fsanitize=float-cast-overflow"]
    if call(cc, *flags, folder / "probe.c", "-o", folder / "probe", expect=None).returncode:
        pytest.skip(f"{cc} has no address and undefined-behaviour sanitizers")
    objects = compile_all([*sources(), ROOT / "fuzz/fuzz.c"], folder, [*STRICT, *flags])
    call(cc, *flags, *objects, "-o", folder / "fuzz")
    seeds = folder / "seeds.bin"
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    call(sys.executable, ROOT / "fuzz/seeds.py", seeds, env={**os.environ, "PYTHONPATH": path})
    return Harness(folder / "fuzz", objects, flags, seeds)
