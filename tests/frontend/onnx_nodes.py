"""The ONNX package's own node tests, through our front end and the C runtime: passed, refused and why, or wrong.

python tests/frontend/onnx_nodes.py writes the table docs/onnx.md; `--check` only compares.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests")]

from cases import run_c  # noqa: E402

from acclimate.errors import BadInput, Unsupported  # noqa: E402
from acclimate.frontend.onnx import fixed_graph  # noqa: E402
from acclimate.frontend.onnx_ops import TABLE  # noqa: E402

PAGE = ROOT / "docs/onnx.md"


#: types that the front end reads as float32
FLOATS = {"float16", "float32", "float64"}


@dataclass(frozen=True)
class Result:
    """Of one test. `op`: what it tests; `outcome`: "passed", "refused", "wrong"; `why`: of the last two."""

    name: str
    op: str
    outcome: str
    why: str = ""


def node_tests():
    """The package's tests all of whose operators stand in our table."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        tests = load_model_tests(kind="node")
    return [
        t
        for t in tests
        if t.model is not None
        and {n.op_type for n in t.model.graph.node} <= set(TABLE)
        and not {o.domain for o in t.model.opset_import} - {"", "ai.onnx"}
    ]


def tested(test) -> str:
    """The operator that a test is about; one that is written out as others is about the name that it bears."""
    ops = [n.op_type for n in test.model.graph.node]
    return ops[0] if len(ops) == 1 else f"{test.name.split('_')[1]} (as a function)"


def _with_constants(model, values: dict[str, np.ndarray], constant: set[str]):
    """A copy of the model in which some inputs are initializers."""
    from onnx import ModelProto, numpy_helper

    new = ModelProto()
    new.CopyFrom(model)
    kept = [i for i in new.graph.input if i.name not in constant]
    del new.graph.input[:]
    new.graph.input.extend(kept)
    new.graph.initializer.extend(numpy_helper.from_array(values[n], n) for n in sorted(constant))
    return new


def _runnable(test, inputs) -> str:
    """Why a test is none for a runtime of float32 tensors; "" where it is one."""
    if any(isinstance(v, (list, dict, type(None))) for v in inputs.values()):
        return "a sequence or an optional, not a tensor"
    if not all(hasattr(v, "dtype") for v in inputs.values()):
        return "a type that is not taken"  # eight bits and fewer, which numpy does not know
    kinds = {str(v.dtype) for v in inputs.values()}
    if not kinds & FLOATS:
        return "integers, strings or booleans alone"
    if kinds - FLOATS - {"int64", "int32", "bool"}:
        return "a type that is not taken"
    if any(o.type.tensor_type.elem_type not in (1, 10, 11) for o in test.model.graph.output):
        return "an output that is not a float"
    if any(v.size == 0 for v in inputs.values() if str(v.dtype) in FLOATS):
        return "an empty tensor"
    return ""


def run(test) -> Result:
    """One test, with all float inputs given at run time; where that is refused, with all but the first constant."""
    op = tested(test)
    names = [i.name for i in test.model.graph.input]
    whys: list[str] = []
    for given, wanted in test.data_sets or ():
        given = [np.asarray(v) if isinstance(v, np.generic) else v for v in given]
        inputs = dict(zip(names, given, strict=True))
        why = _runnable(test, inputs)
        if why:
            return Result(test.name, op, "refused", why)
        floats = [n for n, v in inputs.items() if str(v.dtype) in FLOATS]
        half = any(v.dtype == np.float16 for v in inputs.values())
        atol = max(test.atol, 1e-3 if half else 1e-6)
        for live in dict.fromkeys((tuple(floats), tuple(floats[:1]))):
            constant = set(inputs) - set(live)
            try:
                graph = fixed_graph(_with_constants(test.model, inputs, constant), test.name)
            except Unsupported as error:
                whys.append(error.nodes[0].why if error.nodes else error.what)
                continue
            except BadInput as error:
                whys.append(error.what)
                continue
            if any(v.kind == "state" for v in graph.values.values()):
                return Result(test.name, op, "refused", "random numbers, which are our own")
            feeds = {graph.inputs[n]: inputs[n].astype(np.float32) for n in graph.inputs}
            got = run_c(graph, feeds)
            for output, want in zip(test.model.graph.output, wanted, strict=True):
                have = got[output.name]
                if have.shape != want.shape:
                    return Result(test.name, op, "wrong", f"shape {have.shape}, must be {want.shape}")
                if not np.allclose(have, want, test.rtol, atol, equal_nan=True):
                    return Result(test.name, op, "wrong", f"differs by {np.abs(have - want).max()}")
            break
        else:
            return Result(test.name, op, "refused", _general(whys[-1]))
    return Result(test.name, op, "passed")


def _general(why: str) -> str:
    """A reason without the numbers of one test."""
    return re.sub(r"\s*[\(\[].*[\)\]].*$|\d+(\.\d+)?", "", why).strip(" :")


def table(results: list[Result]) -> str:
    """The page."""
    count = Counter(r.outcome for r in results)
    ops: dict[str, list[Result]] = defaultdict(list)
    for r in results:
        ops[r.op].append(r)
    lines = [
        "<!-- Generated by tests/frontend/onnx_nodes.py. Do not edit. -->",
        "# ONNX operators",
        "",
        "The node tests that come with the onnx package, of all operators that are taken, run through the front end and"
        " the C runtime (halves and doubles as float32) and compared with the stored outputs:"
        f" {count['passed']} passed, {count['refused']} refused with the reason below, {count['wrong']} wrong.",
        "",
        "| operator | passed | refused | why |",
        "|---|---|---|---|",
    ]
    for op in sorted(ops, key=str.lower):
        mine = Counter(r.outcome for r in ops[op])
        whys = Counter(r.why for r in ops[op] if r.outcome != "passed")
        text = "; ".join(f"{why} ({n})" for why, n in sorted(whys.items()))
        lines.append(f"| `{op}` | {mine['passed']} | {mine['refused'] + mine['wrong']} | {text} |")
    return "\n".join([*lines, ""])


def main() -> int:
    results = [run(t) for t in node_tests()]
    for r in results:
        if r.outcome == "wrong":
            print(f"wrong: {r.name}: {r.why}", file=sys.stderr)
    text = table(results)
    if "--check" in sys.argv:
        return int(not PAGE.exists() or PAGE.read_text() != text)
    PAGE.write_text(text)
    print(f"wrote {PAGE.relative_to(ROOT)}: {dict(Counter(r.outcome for r in results))}")
    return int(any(r.outcome == "wrong" for r in results))


if __name__ == "__main__":
    sys.exit(main())
