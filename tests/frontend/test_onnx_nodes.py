"""The onnx package's node tests: none wrong, and each that is refused has one of the reasons listed here."""

import re
from collections import Counter

import pytest

pytest.importorskip("onnx")
from frontend import onnx_nodes

#: Why a node test may be refused. Anything else is an error of ours.
REASONS = (
    # what the runtime is not for
    "integers, strings or booleans alone",
    "a type that is not taken",
    "an output that is not a float",
    "an empty tensor",
    "an empty slice of",
    "a sequence or an optional, not a tensor",
    "random numbers, which are our own",
    # what an operator can say and ours cannot
    "a further output that is not computed here",
    "attention on three axes, or with a cache",
    r"attention with (left_window_size|qk_matmul_output_mode|right_window_size|softcap)",
    "a row of the attention mask that keeps nothing",
    "dilated average pooling",
    "pooling over .*one or two are taken",
    "a divisor that is not one constant",
    "an index that differs along another axis",
    "a transposed convolution over .*one or two are taken",
    "a running sum that is reversed or exclusive",
    "einsum .*a letter that is repeated in one operand",
    "a result that does not depend on the input",
    "normalisation by another norm than the second",
    "Resize with (antialias|crops|keep_aspect_ratio_policy)",
    "peepholes",
)
LEAST_PASSED = 530


@pytest.fixture(scope="module")
def results():
    return [onnx_nodes.run(test) for test in onnx_nodes.node_tests()]


def test_none_is_wrong(results):
    assert [r for r in results if r.outcome == "wrong"] == []


def test_what_is_refused_has_a_known_reason(results):
    refused = [r for r in results if r.outcome == "refused"]
    assert [r for r in refused if not any(re.match(p, r.why) for p in REASONS)] == []


def test_reasons_are_in_use(results):
    whys = {r.why for r in results}
    assert [p for p in REASONS if not any(re.match(p, w) for w in whys)] == []


def test_most_of_what_can_run_passes(results):
    count = Counter(r.outcome for r in results)
    assert count["passed"] >= LEAST_PASSED, count


def test_the_page_is_current(results):
    """Next: python tests/frontend/onnx_nodes.py."""
    assert onnx_nodes.PAGE.read_text() == onnx_nodes.table(results)
