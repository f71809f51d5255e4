"""Compiling and calling the C runtime by itself, for the tests in this folder; the fixtures are in conftest.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

import acclimate.runtime

ROOT = Path(__file__).resolve().parents[2]
STRICT = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
SANITIZE = [
    "-g",
    "-O1",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
]


def sources() -> list[Path]:
    """The C files that a board compiles; what only a larger machine has use for is in a folder of its own."""
    return sorted(acclimate.runtime.SOURCE.glob("ac_*.c"))


def compiler() -> str:
    found = next((c for c in (os.environ.get("CC", ""), "cc", "gcc", "clang") if c and shutil.which(c)), None)
    if found is None:
        pytest.skip("there is no C compiler (cc, gcc or clang)")
    return found


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def call(*args: object, expect: int | None = 0, **more) -> subprocess.CompletedProcess:
    """Run a command; its exit status must be `expect` (None: any)."""
    done = subprocess.run([str(a) for a in args], capture_output=True, text=True, timeout=600, **more)
    if expect is not None and done.returncode != expect:
        pytest.fail(
            f"{' '.join(map(str, args))}\nexit status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        )
    return done


def compile_all(files: list[Path], folder: Path, flags: list[str]) -> list[Path]:
    """Object files, two compilers at a time."""
    cc = compiler()
    objects = [folder / f"{f.stem}.o" for f in files]
    with ThreadPoolExecutor(2) as pool:
        list(
            pool.map(
                lambda pair: call(cc, *flags, f"-I{acclimate.runtime.SOURCE}", "-c", pair[0], "-o", pair[1]),
                zip(files, objects, strict=True),
            )
        )
    return objects


@dataclass(frozen=True)
class Harness:
    """The fuzz harness, built with the address and undefined-behaviour sanitizers."""

    binary: Path
    objects: list[Path]
    flags: list[str]
    seeds: Path
    delta_binary: Path
    pairs: Path

    def run(self, *args: object, expect: int | None = 0, binary: Path | None = None) -> dict:
        """The summary of a run, which must end without a finding."""
        done = call(binary or self.binary, *args, expect=expect)
        return json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr}

    def replay(self, corpus: Path) -> bytes:
        """Load and run the Programs of a corpus as they are; their statuses."""
        out = corpus.with_suffix(".out")
        self.run(corpus, "--replay", out)
        return out.read_bytes()
