"""libacclimate as `make c-library` installs it: what it exports, and that a product builds against it and learns."""

import re
import sys

import pytest
from runtime.native import ROOT, STRICT, call, compiler, tool

import acclimate.runtime
from acclimate import __version__

pytestmark = pytest.mark.slow
EXAMPLE = ROOT / "examples/c"


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """Where it is installed."""
    pytest.importorskip("mesonbuild", reason="meson is not installed")
    folder = tmp_path_factory.mktemp("library")
    meson = [sys.executable, "-m", "mesonbuild.mesonmain"]
    call(
        *meson,
        "setup",
        folder / "build",
        ROOT,
        f"--prefix={folder / 'usr'}",
        "--libdir=lib",
        "-Dlibrary=true",
        "-Dwerror=true",
    )
    call(*meson, "install", "-C", folder / "build")
    return folder / "usr"


@pytest.fixture(scope="module")
def flags(prefix) -> list[str]:
    env = {"PKG_CONFIG_PATH": str(prefix / "lib/pkgconfig"), "PATH": "/usr/bin:/bin"}
    assert call(tool("pkg-config"), "--modversion", "acclimate", env=env).stdout.strip() == __version__
    return call("pkg-config", "--cflags", "--libs", "acclimate", env=env).stdout.split()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    call(sys.executable, EXAMPLE / "make_program.py", folder)
    return folder


def declared(header: str) -> set[str]:
    return set(re.findall(r"^\w[\w ]*\*?(ac_\w+)\(", header, re.MULTILINE))


def test_what_is_installed(prefix):
    files = {p.relative_to(prefix).as_posix() for p in prefix.rglob("*") if not p.is_dir()}
    assert files == {
        "include/acclimate.h",
        "include/ac_threads.h",
        "lib/libacclimate.a",
        "lib/libacclimate.so",
        f"lib/libacclimate.so.{__version__.split('.')[0]}",
        f"lib/libacclimate.so.{__version__}",
        "lib/pkgconfig/acclimate.pc",
    }
    header = prefix / "include/acclimate.h"
    assert header.read_bytes() == (acclimate.runtime.SOURCE / "acclimate.h").read_bytes()


def test_only_what_the_headers_declare_is_exported(prefix):
    lines = call(tool("nm"), "-D", "--defined-only", prefix / "lib/libacclimate.so").stdout.splitlines()
    public = set().union(*(declared(p.read_text()) for p in (prefix / "include").glob("*.h")))
    assert {line.split()[-1] for line in lines} == public and "ac_run" in public
    needed = call(tool("readelf"), "-d", prefix / "lib/libacclimate.so").stdout
    assert f"soname: [libacclimate.so.{__version__.split('.')[0]}]" in needed
    assert set(re.findall(r"Shared library: \[(\w+)", needed)) <= {"libc", "libm"}
    for line in call("nm", "-g", "--defined-only", prefix / "lib/libacclimate.a").stdout.splitlines():
        if re.match(r"^[0-9a-f]+ [A-Z] ", line):
            assert line.split()[-1].startswith("ac_")


@pytest.mark.parametrize("kind", ["shared", "static"])
def test_a_product_learns_with_it(kind, prefix, flags, digits, tmp_path):
    """Twice, the second time from the file that the first run kept."""
    program = tmp_path / "learn"
    how = [f"-Wl,-rpath,{prefix / 'lib'}"]
    if kind == "static":
        flags = [f for f in flags if not f.startswith("-l")]
        how = [prefix / "lib/libacclimate.a", "-pthread"]
    call(compiler(), *STRICT, "-O2", EXAMPLE / "learn.c", *flags, *how, "-o", program)
    args = (program, digits / "digits.acp", digits / "digits.acd", "--state", tmp_path / "kept.acu")
    text = call(*args).stdout
    assert float(re.search(r"after power cycle ([\d.]+)", text)[1]) > 0.9
    assert "going on from what was learned before" in call(*args, "--steps", 1).stdout


def test_the_example_by_its_makefile(prefix, digits, tmp_path):
    for name in ("learn.c", "Makefile"):
        (tmp_path / name).write_bytes((EXAMPLE / name).read_bytes())
    env = {"PKG_CONFIG_PATH": str(prefix / "lib/pkgconfig"), "PATH": "/usr/bin:/bin"}
    call(tool("make"), "linked", f"PYTHON={sys.executable}", cwd=tmp_path, env=env)
    text = call(
        tmp_path / "linked", digits / "digits.acp", digits / "digits.acd", "--steps", 5, cwd=tmp_path
    ).stdout
    assert "after power cycle" in text and (tmp_path / "learned.acu").stat().st_size > 10_000


def test_in_c_plus_plus(prefix, tmp_path):
    (tmp_path / "a.cc").write_text(
        "#include <acclimate.h>\n#include <ac_threads.h>\nint main() { ac_program p;"
        " ac_workers_close(ac_workers_open(2));"
        " return ac_load(&p, &p, 0) == AC_E_TRUNCATED ? 0 : 1; }\n"
    )
    library = prefix / "lib"
    call(
        tool("g++"),
        "-Wall",
        "-Wextra",
        "-Werror",
        "-pedantic",
        f"-I{prefix / 'include'}",
        tmp_path / "a.cc",
        f"-L{library}",
        "-lacclimate",
        f"-Wl,-rpath,{library}",
        "-o",
        tmp_path / "a",
    )
    call(tmp_path / "a")


def test_a_bare_python(prefix, digits, tmp_path):
    args = (
        prefix / "lib/libacclimate.so",
        digits / "digits.acp",
        digits / "digits.acd",
        tmp_path / "kept.acu",
    )
    text = call(sys.executable, "-I", "-S", ROOT / "examples/minimal/learn.py", *args).stdout
    assert float(re.search(r"accuracy after +([\d.]+)", text)[1]) > 0.85
