"""Learning some channels costs less than learning all, in multiply-accumulates and in bytes."""

import pytest
from models import batch, exported

import acclimate
from acclimate import passes
from acclimate.learner import Learner
from acclimate.schemes import Explicit


def _plan(share, axis):
    model = exported("residual")[1]
    convolutions = [n for n in model.parameters() if ".conv" in n]
    scheme = Explicit(dict.fromkeys(convolutions, share), axis=axis)
    return acclimate.plan(model, scheme=scheme, batch_size=4, optimizer=acclimate.SGD(momentum=0.9))


@pytest.mark.parametrize(("axis", "arena"), [(0, 1.05), (1, 0.75)], ids=["out", "in"])
def test_half_the_channels(axis, arena):
    """Half of the weight gradient and of the momentum; of input channels also half of what is kept for it.

    Output channels are taken from a gradient that is still needed whole: the copy may lie at the peak.
    """
    half, full = _plan(0.5, axis), _plan(1.0, axis)
    sizes = [p.update_set.size(p.model) for p in (half, full)]
    assert sizes[0] * 2 == sizes[1]
    assert half.macs_per_step < 0.88 * full.macs_per_step
    assert half.state_bytes == full.state_bytes - 4 * sizes[0]  # the other half has no momentum
    assert half.arena_bytes <= arena * full.arena_bytes


@pytest.mark.parametrize("axis", [0, 1], ids=["out", "in"])
def test_selecting_early_changes_no_bit(axis, monkeypatch):
    monkeypatch.setenv("ACCLIMATE_KERNELS", "plain")
    x, y = batch("residual", 12)
    results, arenas = [], []
    for pipeline in (passes.PIPELINE, tuple(p for p in passes.PIPELINE if p is not passes.select_early)):
        monkeypatch.setattr(passes, "PIPELINE", pipeline)
        plan = _plan(0.5, axis)
        results.append(Learner(plan).partial_fit(x, y)._main.state.tobytes())
        arenas.append(plan.arena_bytes)
    assert results[0] == results[1]
    assert arenas[0] <= arenas[1] and (axis == 0 or arenas[0] < 0.8 * arenas[1])
