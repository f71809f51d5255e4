"""Where the batch lies in a shape that was exported for one batch size."""

import numpy as np
import pytest

from acclimate import errors, ops
from acclimate.frontend import common as c
from acclimate.frontend import layers
from acclimate.frontend import lowering as f


@pytest.mark.parametrize(
    "before, baked, source, target, want",
    [
        (1, 2, (2, 16, 25), (2, 400), (0, 1)),  # flatten
        (1, 2, (2, 32, 3), (64, 3), (0, 1)),  # the batch merged with what follows
        (1, 1, (1, 16, 25), (1, 400), (0, 1)),
        (64, 1, (64, 48), (64, 1, 48), (1, 1)),  # its own axis is likelier than a merged one
        (64, 2, (64, 2, 48), (128, 48), (0, 64)),  # tokens first
        (64, 2, (64, 2, 48), (64, 6, 16), (1, 1)),  # heads
        (64, 1, (64, 1, 48), (64, 3, 16), (1, 1)),
        (64, 1, (64, 1, 3, 16), (64, 48), (0, 64)),
        (1, 1, (1, 3, 8), (1, 1, 24), (0, 1)),
    ],
    ids=str,
)
def test_first_reading(before, baked, source, target, want):
    assert c.batch_readings(before, baked, source, target)[0] == want


def test_readings_that_are_open():
    assert c.batch_readings(1, 1, (1, 3, 8), (1, 1, 24), free=1)[0] == (1, 1)  # the user left this axis open
    assert c.batch_readings(64, 1, (64, 1, 48), (64, 48)) == [(0, 64), (1, 1)]  # (64N, 48) or (64, 48N)
    assert c.batch_readings(3, 2, (3, 2, 3), (4, 5)) == []


def test_size_arithmetic():
    n = c.Size(1)
    assert (n * 3).coefficient == (3 * n).coefficient == 3 and (n * 6 // 2).coefficient == 3
    assert sum([n, n]).coefficient == 2 and n * 4 // n == 4 and repr(n * 5) == "5N"
    assert not isinstance(n + 1, c.Size) and not isinstance(n * n, c.Size)


def walk(fn, baked, shape):
    """A graph from a function of (builder, x), as a front end would call it."""

    def convert(b):
        try:
            return b.finish(fn(b, b.input(shape)), baked or 1, {}, "test")
        except c.Untaken as error:
            b.fail("node", error)
            return b.finish(None, 1, {}, "test")

    return c.attempts(convert, baked)


@pytest.mark.parametrize("baked", [1, 2, 7])
def test_attention_with_tokens_first(baked):
    """The shapes of nn.MultiheadAttention, exported at one batch: every reshape is ambiguous at batch one."""
    length, heads, dim = 16, 3, 24
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(dim, dim)).astype(np.float32)

    def build(b, x):
        w = b.parameter("w", weight)
        x = f.linear(b, c.transpose(b, x, [1, 0, 2]), w)
        heads_first = c.transpose(b, c.reshape(b, x, [length, baked * heads, dim // heads]), [1, 0, 2])
        q = c.reshape(b, heads_first, [baked, heads, length, dim // heads])
        y = layers.attention(b, q, q, q, None, False, 0.0, None)
        y = c.reshape(b, c.transpose(b, y, [2, 0, 1, 3]), [length * baked, dim])
        y = c.reshape(b, f.linear(b, y, w), [length, baked, dim])
        return c.transpose(b, y, [1, 0, 2])

    graph = walk(build, baked, (baked, length, dim))
    x = rng.normal(size=(5, length, dim)).astype(np.float32)
    whole = ops.with_batch(graph, 5)
    y = ops.evaluate(whole, {"x": x})[whole.outputs["output"]]
    one = ops.with_batch(graph, 1)
    for i in range(5):  # each sample by itself gives the same: nothing mixes
        np.testing.assert_allclose(
            ops.evaluate(one, {"x": x[i : i + 1]})[one.outputs["output"]][0], y[i], rtol=1e-4, atol=1e-4
        )
    h = (x @ weight.T).reshape(5, length, heads, -1).transpose(0, 2, 1, 3)
    s = np.exp(h @ h.swapaxes(-1, -2) / np.sqrt(dim // heads))
    want = (s / s.sum(-1, keepdims=True) @ h).transpose(0, 2, 1, 3).reshape(5, length, dim) @ weight.T
    np.testing.assert_allclose(y, want, rtol=1e-3, atol=1e-3)


def test_a_constant_that_was_repeated_for_the_baked_batch():
    token = np.ones((1, 1, 4), np.float32)

    def build(b, x):
        p = b.parameter("token", token)
        return f.binary(
            b, "add", c.concat(b, [c.expand(b, p, [2, 1, 4]), x], 1), np.ones((2, 4, 4), np.float32)
        )

    graph = walk(build, 2, (2, 3, 4))
    at = ops.with_batch(graph, 5)
    assert ops.evaluate(at, {"x": np.zeros((5, 3, 4))})[at.outputs["output"]].shape == (5, 4, 4)


def test_a_shape_that_cannot_hold_the_batch():
    with pytest.raises(errors.Unsupported, match="batch"):
        walk(lambda b, x: c.reshape(b, x, [3, 4]), 4, (4, 3))
    with pytest.raises(errors.Unsupported):
        walk(lambda b, x: c.part(b, x, [0, 0], [1, 1], [2, 3]), None, ("n", 3))
