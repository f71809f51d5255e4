#!/usr/bin/env python3
"""What a deployed learner takes: bytes on disk, resident memory, time to import. Linux.

Each figure of memory is the peak of a process of its own (VmHWM), which this one, without numpy, starts; the lines of
Python read their own, those of C are watched until they end. The time is that of the processor, the least of nine.
The library and the wheel are built from this tree.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS, BATCH = 20, 8
PEAK = "print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))"

#: Written by a process that may import torch: Programs are all that the measured ones get.
MAKE = f"""
import sys; sys.path += [sys.argv[1] + "/benchmarks", sys.argv[1] + "/examples/c"]
from pathlib import Path
import torch, acclimate, make_program
from nets import NETS
from torch import nn
lenet = nn.Sequential(nn.Conv2d(1, 6, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(),
    nn.MaxPool2d(2), nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10))
folder = Path(sys.argv[2])
for name, net, shape in (("lenet", lenet, (1, 28, 28)), ("resnet26", NETS["resnet26"][0](), (3, 32, 32))):
    model = acclimate.from_torch(net.eval(), torch.zeros(1, *shape))
    plan = acclimate.plan(model, scheme="full", optimizer=acclimate.SGD(momentum=0.9), batch_size={BATCH})
    (folder / (name + ".acp")).write_bytes(plan.program.bytes)
make_program.main(folder)
"""
TRAIN = f"""
import sys
import numpy as np
from pathlib import Path
from acclimate.runtime import Session, load
session = Session(load(Path(sys.argv[1]).read_bytes()))
x = session.view("step", "x")
rng = np.random.default_rng(0)
for _ in range({STEPS}):
    loss = session.run("step", x=rng.normal(size=x.shape).astype(np.float32), y=rng.integers(0, 10, len(x)), lr=0.01)
assert not {{"torch", "onnx"}} & set(sys.modules)
{PEAK}
print(session.program.state_bytes + session.program.arena_bytes + len(session.program.bytes))
"""


def run(*args: object) -> str:
    done = subprocess.run([str(a) for a in args], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, args))[:300]}\n{done.stderr[-2000:]}")
    return done.stdout


def python(code: str, *args: object) -> list[str]:
    return run(sys.executable, "-c", code, *args).split()


def watched(*args: object) -> int:
    """Peak resident KiB of a command, read while it runs."""
    peak, process = 0, subprocess.Popen([str(a) for a in args], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            text = Path(f"/proc/{process.pid}/status").read_text()
            name = text.split()[1]
            found = [int(line.split()[1]) for line in text.splitlines() if line.startswith("VmHWM")]
            if found and name == Path(str(args[0])).name[:15]:  # not before the child has become the command
                peak = found[0]
        except OSError:
            pass
        time.sleep(0.001)
    if process.returncode or not peak:
        sys.exit(f"{args[0]} failed or was over too soon")
    return peak


def tree_bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)


def measure(folder: Path) -> dict[str, int | float]:
    out: dict[str, int | float] = {}
    meson = [sys.executable, "-m", "mesonbuild.mesonmain"]
    run(
        *meson,
        "setup",
        folder / "build",
        ROOT,
        f"--prefix={folder}",
        "--libdir=lib",
        "-Dlibrary=true",
        "-Db_ndebug=if-release",
    )
    run(*meson, "install", "-C", folder / "build")
    library, stripped = folder / "lib/libacclimate.so", folder / "stripped.so"
    run("strip", "-o", stripped, library)
    out["libacclimate_so_bytes"] = stripped.stat().st_size
    run(
        sys.executable,
        "-c",
        "import mesonpy, os, sys; os.chdir(sys.argv[1]); mesonpy.build_wheel(sys.argv[2])",
        ROOT,
        folder,
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    out["wheel_bytes"], out["package_bytes"] = wheel.stat().st_size, tree_bytes(folder / "installed")
    numpy = Path(python("import numpy; print(numpy.__file__)")[0]).parent
    out["numpy_bytes"] = tree_bytes(numpy) + tree_bytes(numpy.with_name("numpy.libs"))

    run(sys.executable, "-c", MAKE, ROOT, folder)
    out["python_kib"] = int(python(PEAK)[0])
    out["import_numpy_kib"] = int(python(f"import numpy\n{PEAK}")[0])
    names = "import acclimate; acclimate.Learner, acclimate.plan"
    out["import_acclimate_kib"] = int(python(f"{names}\n{PEAK}")[0])
    timed = f"import time; t = time.process_time()\n{names}\nprint(time.process_time() - t)"
    out["import_acclimate_s"] = round(min(float(python(timed)[0]) for _ in range(9)), 3)
    for name in ("lenet", "resnet26"):
        peak, own = python(TRAIN, folder / f"{name}.acp")
        out[f"learner_{name}_kib"], out[f"program_and_memory_{name}_bytes"] = int(peak), int(own)
    digits = (folder / "digits.acp", folder / "digits.acd")
    kept = folder / "kept.acu"
    include = ["-O2", ROOT / "examples/c/learn.c", f"-I{folder / 'include'}"]
    for kind, link in (
        ("shared", [f"-L{folder / 'lib'}", "-lacclimate", f"-Wl,-rpath,{folder / 'lib'}"]),
        ("static", ["-static", folder / "lib/libacclimate.a", "-pthread"]),
    ):
        run(os.environ.get("CC", "cc"), *include, *link, "-o", folder / f"learn_{kind}")
        run("strip", folder / f"learn_{kind}")
        out[f"c_example_{kind}_bytes"] = (folder / f"learn_{kind}").stat().st_size
        out[f"c_example_{kind}_kib"] = watched(folder / f"learn_{kind}", *digits, "--state", kept)
        kept.unlink()
    bare = Path(shutil.which("python3", path="/usr/bin") or sys.executable).resolve()
    out["bare_python_kib"] = watched(
        bare, "-I", "-S", ROOT / "examples/minimal/learn.py", library, *digits, kept
    )
    return out


def table(found: dict[str, int | float]) -> str:
    def mib(key: str, unit: int = 1 << 20) -> str:
        return f"{found[key] / unit:.1f} MiB"

    rows = [
        ("libacclimate.so, stripped, kernels for three instruction sets", mib("libacclimate_so_bytes"), ""),
        (
            "C example on it, digits",
            f"{found['c_example_shared_bytes'] / 1024:.0f} KiB",
            mib("c_example_shared_kib", 1024),
        ),
        (
            "C example, static, no library needed",
            mib("c_example_static_bytes"),
            mib("c_example_static_kib", 1024),
        ),
        ("bare Python with libacclimate.so, digits", "", mib("bare_python_kib", 1024)),
        ("Python alone", "", mib("python_kib", 1024)),
        ("numpy", mib("numpy_bytes"), mib("import_numpy_kib", 1024)),
        (
            f"acclimate (import takes {found['import_acclimate_s'] * 1000:.0f} ms, with numpy's)",
            mib("package_bytes"),
            mib("import_acclimate_kib", 1024),
        ),
    ]
    for name, title in (("lenet", "LeNet"), ("resnet26", "ResNet-26")):
        own = mib(f"program_and_memory_{name}_bytes")
        rows.append(
            (
                f"all of {title} learns, batches of {BATCH} (Program and memory: {own})",
                "",
                mib(f"learner_{name}_kib", 1024),
            )
        )
    lines = ["| | on disk | resident |", "|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if "numpy" in sys.modules:
        sys.exit("the parent must be light")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    print(json.dumps(found) if args.json else table(found))


if __name__ == "__main__":
    main()
