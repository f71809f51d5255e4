"""The wheel and the source distribution: what they hold, and that the wheel learns with numpy and nothing else."""

import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

from acclimate import __version__

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]


def run(*args: object, **more) -> str:
    done = subprocess.run([str(a) for a in args], capture_output=True, text=True, timeout=900, **more)
    assert done.returncode == 0, f"{args}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A source distribution of a clean copy, and the wheel that is built from it."""
    pytest.importorskip("mesonpy", reason="meson-python is not installed")
    if subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("this is no git checkout")
    folder = tmp_path_factory.mktemp("dist")
    run("git", "clone", "-q", "--no-hardlinks", ROOT, folder / "clone")
    code = "import mesonpy, sys; print(mesonpy.build_sdist(sys.argv[1]))"
    run(sys.executable, "-c", code, folder, cwd=folder / "clone")
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    code = "import mesonpy, sys; print(mesonpy.build_wheel(sys.argv[1]))"
    run(sys.executable, "-c", code, folder, cwd=folder / sdist.name.removesuffix(".tar.gz"))
    return folder


def test_the_source_distribution(dist):
    """Everything that is tracked, the metadata, and nothing else."""
    (sdist,) = dist.glob("*.tar.gz")
    assert sdist.name == f"acclimate-{__version__}.tar.gz"
    with tarfile.open(sdist) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    assert {
        "PKG-INFO",
        "LICENSE",
        "meson.build",
        "meson.options",
        "src/acclimate/runtime/acclimate.h",
    } <= names
    committed = set(run("git", "ls-tree", "-r", "--name-only", "HEAD", cwd=ROOT).splitlines())
    assert names - {"PKG-INFO"} == committed
    assert sdist.stat().st_size < 1 << 20


def test_the_wheel(dist):
    (wheel,) = dist.glob("*.whl")
    assert re.fullmatch(
        rf"acclimate-{re.escape(__version__)}-cp311-abi3-(linux|manylinux)_\w+\.whl", wheel.name
    )
    committed = set(
        run("git", "ls-tree", "-r", "--name-only", "HEAD", "src/acclimate", cwd=ROOT).splitlines()
    )
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
    built = {"acclimate/runtime/_core.abi3.so"}
    assert names == {n.removeprefix("src/") for n in committed} | built
    assert wheel.stat().st_size < 2 << 20


def test_the_wheel_learns_with_numpy_alone(dist, tmp_path):
    """In a new environment: no torch, no onnx, no compiler; from the embedded digits."""
    (wheel,) = dist.glob("*.whl")
    venv.create(tmp_path / "v", with_pip=True)
    python = tmp_path / "v/bin/python"
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel)
    numpy = Path(np.__file__).parents[1]
    for name in ("numpy", "numpy.libs"):  # as installed here: the test needs no network
        if (numpy / name).exists():
            (next((tmp_path / "v/lib").iterdir()) / "site-packages" / name).symlink_to(numpy / name)
    code = (
        "import sys; sys.path.append(sys.argv[1])\n"
        "import acclimate, make_program\nfrom acclimate.data import digits\n"
        "d, learner = digits(), acclimate.Learner(make_program.plan())\n"
        "learner.fit(d.x, d.y, epochs=5)\nlearner.save(sys.argv[2])\n"
        "print(acclimate.Learner(make_program.plan()).restore(sys.argv[2]).score(d.x_val, d.y_val))\n"
        "print([m for m in ('torch', 'onnx', 'typer') if m in sys.modules], acclimate.__file__)"
    )
    score, rest = run(
        python, "-I", "-c", code, ROOT / "examples/c", tmp_path / "a.acu", cwd=tmp_path
    ).splitlines()
    assert float(score) > 0.9 and rest.startswith("[] ") and str(tmp_path) in rest
