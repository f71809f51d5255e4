"""Firmware of one small net, exported for Linux and built with sanitizers; once for all tests in this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from firmware.boards import built, plan
from runtime.native import SANITIZE, STRICT, compile_all, sources

from acclimate.firmware.export import Project, export
from acclimate.firmware.link import Board, Process


@pytest.fixture(scope="session")
def runtime(tmp_path_factory) -> list[Path]:
    """The runtime's files, which are the same in every project."""
    return compile_all(sources(), tmp_path_factory.mktemp("runtime"), [*STRICT, *SANITIZE])


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Project:
    """Learns everything; has room for the Programs of two other schemes."""
    others = [plan("last"), plan("bias")]
    slot = sum(len(p.program.bytes) for p in others)
    return export(plan(), tmp_path_factory.mktemp("firmware") / "project", room_for=others, slot_bytes=slot)


@pytest.fixture(scope="session")
def firmware(project, runtime) -> Path:
    return built(project, runtime)


@pytest.fixture
def board(firmware) -> Iterator[Board]:
    with Board(Process([firmware])) as board:
        yield board


@pytest.fixture(scope="session")
def unrolled(tmp_path_factory, runtime) -> Path:
    return built(export(plan(), tmp_path_factory.mktemp("unrolled") / "project", mode="unrolled"), runtime)
