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
    return compile_all(
        sources(), tmp_path_factory.mktemp("plain"), [*STRICT, "-O2", "-fPIC", "-fstack-usage"]
    )


@pytest.fixture(scope="session")
def library(plain_objects, tmp_path_factory) -> Path:
    """The same files as a shared library: what an installed libacclimate.so has, but for the fast kernels."""
    path = tmp_path_factory.mktemp("library") / "libacclimate.so"
    call(compiler(), "-shared", *plain_objects, "-o", path)
    return path


def build_harness(folder: Path, *more: str) -> Harness:
    cc = compiler()
    (folder / "probe.c").write_text("int main(void) { return 0; }\n")
    flags = [*SANITIZE, "-fsanitize=float-cast-overflow", *more]
    if call(cc, *flags, folder / "probe.c", "-o", folder / "probe", expect=None).returncode:
        pytest.skip(f"{cc} cannot build with {' '.join(flags)}")
    objects = compile_all([*sources(), ROOT / "fuzz/fuzz.c"], folder, [*STRICT, *flags])
    call(cc, *flags, *objects, "-o", folder / "fuzz")
    objects, drivers = objects[:-1], [ROOT / "fuzz/delta.c", ROOT / "fuzz/store.c"]
    for driver in compile_all(drivers, folder, [*STRICT, *flags]):
        call(cc, *flags, *objects, driver, "-o", folder / driver.stem)
    seeds, pairs = folder / "seeds.bin", folder / "pairs.bin"
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    call(sys.executable, ROOT / "fuzz/seeds.py", seeds, pairs, env={**os.environ, "PYTHONPATH": path})
    return Harness(folder / "fuzz", [*objects, folder / "fuzz.o"], flags, seeds, folder / "delta", pairs)


@pytest.fixture(scope="session")
def harness(tmp_path_factory) -> Harness:
    return build_harness(tmp_path_factory.mktemp("sanitized"))


@pytest.fixture(scope="session")
def native_harness(tmp_path_factory) -> Harness:
    """With the vector instructions of this processor, for which kernels take other tile sizes."""
    return build_harness(tmp_path_factory.mktemp("native"), "-march=native")
