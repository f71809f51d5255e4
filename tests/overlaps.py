"""Shared by the tests of the memory plan: no two live values overlap, by brute force from the nodes alone."""

from __future__ import annotations

from acclimate.layout import Layout
from acclimate.ops import TABLE


def value_lifetimes(layout: Layout) -> tuple[dict[str, int], dict[str, int]]:
    """First and last node that touches each arena value, found anew from the nodes alone."""
    first, last = {}, {}
    for name in layout.graph.inputs.values():
        first[name] = last[name] = -1
    for i, node in enumerate(layout.nodes):
        for name in node.outputs:
            if name in layout.offsets:
                first.setdefault(name, i)
                last.setdefault(name, i)
        for name in node.inputs:
            if name in layout.offsets:
                last[name] = i
    for name in layout.graph.outputs.values():
        last[name] = len(layout.nodes)
    return first, last


def roots(layout: Layout) -> dict[str, str]:
    """What each value is a view of."""
    out = {}
    for node in layout.nodes:
        if TABLE[node.op].view:
            out[node.outputs[0]] = out.get(node.inputs[0], node.inputs[0])
    return out


def assert_no_overlap(layout: Layout) -> None:
    """All pairs. Two values may share bytes only as views, or where one is made by overwriting the other as it dies."""
    first, last = value_lifetimes(layout)
    view_of = roots(layout)
    maker = {n: node for node in layout.nodes for n in node.outputs if n}
    names = [n for n in layout.offsets if n in first]
    for a in names:
        for b in names:
            if a >= b or view_of.get(a, a) == view_of.get(b, b):
                continue
            if first[a] > last[b] or first[b] > last[a]:
                continue
            end_a = layout.offsets[a] + layout.graph.type(a).size_bytes
            end_b = layout.offsets[b] + layout.graph.type(b).size_bytes
            if layout.offsets[a] >= end_b or layout.offsets[b] >= end_a:
                continue
            new, old = (a, b) if first[a] >= first[b] else (b, a)
            node = maker[new]
            allowed = [node.inputs[i] for i in TABLE[node.op].in_place if i < len(node.inputs)]
            assert (
                first[new] == last[old]
                and layout.offsets[new] == layout.offsets[old]
                and any(view_of.get(i, i) == view_of.get(old, old) for i in allowed)
            ), f"{a} and {b} overlap"
