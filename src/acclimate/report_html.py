"""A Report as one self-contained HTML page: tables, plots as inline SVG, no scripts, nothing from elsewhere.

Every plot is a pure function from its block to SVG text, and takes its colours from the page, light or dark.
All text that comes from users goes through `escape`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib import resources
from textwrap import wrap
from typing import Any

from .report import (
    Bars,
    Block,
    Curve,
    Facts,
    Note,
    Parts,
    Report,
    Scatter,
    Section,
    Table,
    Timeline,
    Trade,
    sound,
    text,
    thin,
)

WIDTH = 640  # of every plot, in its own units; the page scales it
CHAR = 7.6  # width of a letter of the plots' text, at most about
LINE = 16  # height of a line of text
MAX_STEPS = 400  # nodes of a timeline that are drawn one by one
BYTE_STEPS = tuple(2**k for k in range(41))
WHOLE_STEPS = tuple(m * 10**k for k in range(10) for m in (1, 2, 5))


# -- small parts --------------------------------------------------------------------------------------


def _n(value: float) -> str:
    """A coordinate, short."""
    return f"{value:.1f}".rstrip("0").rstrip(".")


def _text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}"{style}>{escape(words)}</text>'


def _paragraph(x: float, y: float, words: str, width: float) -> list[str]:
    """Lines of text that stay within `width`, from the baseline y downwards."""
    return [_text(x, y + i * LINE, line) for i, line in enumerate(wrap(words, max(int(width / CHAR), 10)))]


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}" class="{kind}"/>'


def _box(x: float, y: float, width: float, height: float, kind: str, title: str = "") -> str:
    inside = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(max(width, 0))}" height="{_n(max(height, 0))}" '
        f'class="{kind}">'
        f"{inside}</rect>"
    )


def _dot(x: float, y: float, radius: float, kind: str, title: str = "") -> str:
    inside = f"<title>{escape(title)}</title>" if title else ""
    return f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}" class="{kind}">{inside}</circle>'


def _svg(title: str, description: str, height: float, parts: Iterable[str]) -> str:
    return (
        f'<svg role="img" aria-label="{escape(title)}. {escape(description)}" '
        f'viewBox="0 0 {WIDTH} {_n(height)}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{''.join(parts)}</svg>"
    )


def finite(value: Any) -> bool:
    """Whether a figure can be drawn."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def ticks(low: float, high: float, count: int = 5, steps: Sequence[float] = ()) -> list[float]:
    """About `count` round numbers from `low` to `high`, one of `steps` apart, or 1, 2 or 5 times 10^k."""
    span = high - low
    if not span > 0:
        return [low]
    if not steps:
        power = 10.0 ** math.floor(math.log10(span / count))
        steps = tuple(m * power for m in (1, 2, 5, 10, 20))
    step = next((s for s in steps if span / s <= count), steps[-1])
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _tick(value: float, unit: str) -> str:
    """The figure at a tick: round, so without the digits of a measured one."""
    if unit == "share":
        return f"{100 * value:.4g}\N{NO-BREAK SPACE}%"
    return text(value, unit).replace(".0\N{NO-BREAK SPACE}", "\N{NO-BREAK SPACE}")


def _range(
    values: Sequence[float], pad: float = 0.08, low: float | None = None, high: float | None = None
) -> tuple[float, float]:
    """A range around finite values, a little wider, and never empty; held within low and high."""
    bottom, top = (min(values), max(values)) if values else (0.0, 1.0)
    extra = (top - bottom) * pad or abs(top) * 0.1 or 0.5
    bottom, top = bottom - extra, top + extra
    bottom, top = bottom if low is None else max(bottom, low), top if high is None else min(top, high)
    return (bottom, top) if top > bottom else (bottom - extra, top + extra)


class _Frame:
    """The axes of a plot: from data to the page's coordinates."""

    def __init__(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        height: float,
        left: float = 82,
        right: float = 16,
        top: float = 14,
        bottom: float = 44,
    ) -> None:
        self.x_range, self.y_range = x, y
        self.left, self.right, self.top, self.bottom = left, WIDTH - right, top, height - bottom

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def axes(
        self,
        x_title: str,
        x_unit: str,
        y_title: str,
        y_unit: str,
        x_steps: Sequence[float] = (),
        y_steps: Sequence[float] = (),
    ) -> list[str]:
        """Grid, ticks with their figures, and a title with the unit for each axis."""
        parts = []
        for value in ticks(*self.y_range, 5, y_steps):
            parts += [
                _line(self.left, self.y(value), self.right, self.y(value), "grid"),
                _text(self.left - 6, self.y(value) + 4, _tick(value, y_unit), "end", "tick"),
            ]
        for value in ticks(*self.x_range, 6, x_steps):
            parts += [
                _line(self.x(value), self.bottom, self.x(value), self.bottom + 4, "axis"),
                _text(
                    self.x(value),
                    self.bottom + 17,
                    _tick(value, x_unit),
                    "end" if self.x(value) > WIDTH - 25 else "middle",
                    "tick",
                ),
            ]
        parts.append(_line(self.left, self.bottom, self.right, self.bottom, "axis"))
        parts.append(_text((self.left + self.right) / 2, self.bottom + 36, x_title, "middle", "tick"))
        middle = (self.top + self.bottom) / 2
        parts.append(
            f'<text x="12" y="{_n(middle)}" text-anchor="middle" class="tick" '
            f'transform="rotate(-90 12 {_n(middle)})">{escape(y_title)}</text>'
        )
        return parts


Rect = tuple[float, float, float, float]  # left, top, right, bottom


def _overlaps(a: Rect, b: Rect) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def place_labels(
    points: Sequence[tuple[float, float, str]], bounds: Rect, taken: Sequence[Rect] = ()
) -> list[Rect]:
    """A place for each label, in the order given: the nearest where it covers no other label and no point.

    points: x, y, label. Where a crowd leaves no free place within the bounds, it is the one beside the point.
    """
    blocked = [*taken, *((x - 6, y - 6, x + 6, y + 6) for x, y, _ in points)]
    rows = range(int(bounds[1]), int(bounds[3] - LINE), LINE // 2)
    placed: list[Rect] = []
    for x, y, label in points:
        width, half = CHAR * len(label), LINE / 2
        near = [
            (x + 9, y - half),
            (x - 9 - width, y - half),
            (x - width / 2, y - half - 15),
            (x - width / 2, y - half + 15),
        ]
        far = [
            (left, float(top))
            for top in rows
            for left in (x - width - 14, x - width / 2, x + 14, x - 2 * width, x + width)
        ]
        far.sort(key=lambda at: math.hypot(at[0] + width / 2 - x, at[1] + half - y))
        for left, top in (*near, *far):
            rect = (left, top, left + width, top + LINE)
            inside = left >= bounds[0] and rect[2] <= bounds[2] and top >= bounds[1] and rect[3] <= bounds[3]
            if inside and not any(_overlaps(rect, other) for other in blocked):
                break
        else:
            left = min(max(x + 9, bounds[0]), max(bounds[2] - width, bounds[0]))
            rect = (left, y - half, left + width, y + half)
        blocked.append(rect)
        placed.append(rect)
    return placed


def _label(x: float, y: float, rect: Rect, words: str, kind: str) -> str:
    """A point's label in its place, and a thin line to it where it does not stand beside the point."""
    anchor, at = (
        ("middle", (rect[0] + rect[2]) / 2)
        if rect[0] < x < rect[2]
        else (("start", rect[0]) if rect[0] >= x else ("end", rect[2]))
    )
    near_x, near_y = min(max(x, rect[0]), rect[2]), min(max(y, rect[1] + 3), rect[3] - 3)
    far = math.hypot(near_x - x, near_y - y) > 14
    return (_line(x, y, near_x, near_y, "leader") if far else "") + _text(
        at, rect[1] + 12, words, anchor, kind
    )


# -- plots --------------------------------------------------------------------------------------------


def parts_svg(block: Parts) -> str:
    """One bar: what the RAM is used for, against what there is."""
    total = sum(size for _, size in block.parts)
    top = max(total, block.limit_bytes)
    if total and block.limit_bytes > 8 * total:  # the parts would be a sliver: show them alone
        top = total
    share = total / block.limit_bytes if block.limit_bytes else math.inf
    left, right, y, height = 2.0, WIDTH - 2.0, 8.0 if share <= 1 else 26.0, 30.0
    scale = (right - left) / max(top, 1)
    body, x, legend = [], left, []
    for i, (name, size) in enumerate(block.parts):
        body.append(_box(x, y, size * scale, height, f"part{i % 4}", f"{name}: {size:,} bytes"))
        x += size * scale
        legend.append((f"part{i % 4}", f"{name} {text(size, 'bytes')}"))
    body.append(_box(left, y, right - left if top > total else total * scale, height, "outline"))
    if share > 1:
        limit, words = left + block.limit_bytes * scale, f"limit {text(block.limit_bytes, 'bytes')}"
        body += [
            _line(limit, y - 6, limit, y + height + 6, "limit"),
            _text(limit, y - 10, words, "start" if limit < 100 else "end"),
        ]
    verdict = (
        f"{text(total, 'bytes')} in all, {text(share, 'share')} of the {text(block.limit_bytes, 'bytes')} "
        f"that {block.limit_name} has for it"
    )
    if top == total and share <= 1:
        verdict += " (not drawn to that scale)"
    at, row = left, y + height + 24
    for kind, words in legend:
        width = 18 + CHAR * len(words) + 14
        if at + width > right and at > left:
            at, row = left, row + LINE + 2
        body += [_box(at, row - 10, 11, 11, kind), _text(at + 17, row, words)]
        at += width
    lines = _paragraph(left, row + LINE + 4, verdict, right - left)
    return _svg(block.title, verdict, row + LINE * len(lines) + 12, [*body, *lines])


def timeline_svg(block: Timeline) -> str:
    """Bytes alive in the arena, node by node, with the bound, the arena, the room there is, and the peak."""
    live = [float(p["live_bytes"]) for p in block.points]
    if not live:
        return _svg(block.title, "there is no step to show", 30, [_text(0, 20, "there is no step to show")])
    every = -(-len(live) // MAX_STEPS)
    shown = [max(live[i : i + every]) for i in range(0, len(live), every)]
    peak = max(range(len(live)), key=lambda i: live[i])
    tops = [block.arena_bytes, *shown]
    room_drawn = 0 < block.room_bytes <= 2.5 * max(tops)
    if room_drawn:
        tops.append(block.room_bytes)
    height = 300.0
    frame = _Frame((0, len(live)), (0, max(max(tops) * 1.16, 1)), height, right=20)
    body = frame.axes(
        "node of the training step, in the order they run",
        "count",
        "arena bytes alive",
        "bytes",
        y_steps=BYTE_STEPS,
        x_steps=WHOLE_STEPS,
    )
    path = [f"M{_n(frame.x(0))} {_n(frame.y(0))}"]
    for i, value in enumerate(shown):
        start, end = i * every, min((i + 1) * every, len(live))
        path.append(f"L{_n(frame.x(start))} {_n(frame.y(value))}L{_n(frame.x(end))} {_n(frame.y(value))}")
    path.append(f"L{_n(frame.x(len(live)))} {_n(frame.y(0))}Z")
    body.append(f'<path d="{"".join(path)}" class="area"/>')
    for i, point in enumerate(block.points if every == 1 else ()):
        label = f"{i + 1}. {point['op']} makes {point['value']}: {text(live[i], 'bytes')} alive"
        body.append(
            _box(frame.x(i), frame.top, frame.x(i + 1) - frame.x(i), frame.bottom - frame.top, "hover", label)
        )
    arena_y = frame.y(block.arena_bytes)
    same = block.arena_bytes == block.lower_bound_bytes
    words = f"arena {text(block.arena_bytes, 'bytes')}" + (", equal to the lower bound" if same else "")
    body += [
        _line(frame.left, arena_y, frame.right, arena_y, "arena"),
        _text(frame.right, arena_y - 6, words, "end", "strong"),
    ]
    if not same:
        y = frame.y(block.lower_bound_bytes)
        body += [
            _line(frame.left, y, frame.right, y, "bound"),
            _text(frame.right, y + 15, f"lower bound {text(block.lower_bound_bytes, 'bytes')}", "end"),
        ]
    if room_drawn:
        y = frame.y(block.room_bytes)
        body += [
            _line(frame.left, y, frame.right, y, "limit"),
            _text(frame.left + 6, y - 6, f"room for the arena {text(block.room_bytes, 'bytes')}", "start"),
        ]
    elif block.room_bytes > 0:
        body.append(
            _text(
                frame.left + 6,
                frame.top + 4,
                f"room for the arena: {text(block.room_bytes, 'bytes')}, above this picture",
                "start",
            )
        )
    x = frame.x(peak + 0.5)
    op = str(block.points[peak]["op"])
    body += [
        _line(x, frame.y(live[peak]), x, frame.bottom, "peak"),
        _dot(x, frame.y(live[peak]), 4, "marked", f"peak at {op}"),
    ]
    largest = [
        f"{_short(name, 40)}, {text(size, 'bytes')}, kept {why}" for name, size, why in block.at_peak[:3]
    ]
    more = len(block.at_peak) - len(largest)
    notes = [
        f"Peak at node {peak + 1} ({op}): {text(live[peak], 'bytes')} alive"
        + (", of them" if largest else ""),
        *largest,
    ]
    if more > 0:
        notes.append(f"and {more} smaller")
    lines: list[str] = []
    for note in notes:
        lines += _paragraph(frame.left, height + 14 + len(lines) * LINE, note, frame.right - frame.left)
    return _svg(block.title, ". ".join(notes), height + 18 + LINE * len(lines), [*body, *lines])


def _short(name: str, limit: int = 26) -> str:
    return (
        name
        if len(name) <= limit
        else f"{name[: limit // 2]}\N{HORIZONTAL ELLIPSIS}{name[-limit // 2 + 1 :]}"
    )


def scatter_svg(block: Scatter) -> str:
    """Accuracy against arena bytes, a labelled point a scheme; a dashed line for the accuracy before."""
    points = [p for p in block.points if finite(p[1]) and finite(p[2])]
    missing = len(block.points) - len(points)
    before = block.before if finite(block.before) else None
    shares = [p[2] for p in points] + ([] if before is None else [before])
    x_top = max([p[1] for p in points], default=1) * 1.12
    frame = _Frame(
        (0, x_top or 1),
        _range(
            shares,
            0.12,
            0 if min(shares, default=0) >= 0 else None,
            1 if max(shares, default=1) <= 1 else None,
        ),
        300,
        right=20,
    )
    body = frame.axes("arena bytes", "bytes", "accuracy", "share", x_steps=BYTE_STEPS)
    taken: list[Rect] = []
    spots = [(frame.x(a), frame.y(s), _short(label)) for label, a, s in points]
    if before is not None:
        y, words = frame.y(before), f"before {text(before, 'share')}"
        width = CHAR * len(words)
        crowded = any(x > frame.right - width - 9 and abs(at - y) < 2 * LINE for x, at, _ in spots)
        left = frame.left + 6 if crowded else frame.right - width
        body += [
            _line(frame.left, y, frame.right, y, "before"),
            _text(left if crowded else frame.right, y - 5, words, "start" if crowded else "end"),
        ]
        taken.append((left, y - 5 - LINE, left + width, y))
    for (label, arena, share), (x, y, _) in zip(points, spots, strict=True):
        marked = label == block.marked
        body.append(
            _dot(
                x,
                y,
                6 if marked else 4.5,
                "marked" if marked else "dot",
                f"{label}: {text(share, 'share')}, {text(arena, 'bytes')}",
            )
        )
    bounds = (frame.left, frame.top - 10, frame.right + 16, frame.bottom)
    for (label, _, _), (x, y, words), rect in zip(
        points, spots, place_labels(spots, bounds, taken), strict=True
    ):
        body.append(_label(x, y, rect, words, "strong" if label == block.marked else ""))
    best = max(points, key=lambda p: p[2], default=None)
    described = f"{len(points)} schemes" + (
        "" if best is None else f"; most accurate is {best[0]} with {text(best[2], 'share')}"
    )
    height = 300.0
    if not points:
        body.append(_text(frame.left + 10, frame.top + 14, "nothing to show"))
    if missing:
        body.append(_text(frame.left, height + 6, f"not drawn, as it is not a number: {missing}"))
        height += LINE
    return _svg(block.title, described, height, body)


def bars_svg(block: Bars) -> str:
    """A horizontal bar a scheme, from 0 to 100 %, with a line for the accuracy before."""
    names = [_short(name, 20) for name, _ in block.bars]
    left = 14 + CHAR * max([len(n) for n in names] + [4])
    pitch, top = 24.0, 22.0
    height = top + pitch * len(block.bars) + 42
    frame = _Frame((0, 1), (0, 1), height, left=left, right=72, top=top)
    body = []
    for value in (0, 0.25, 0.5, 0.75, 1):
        x = frame.x(value)
        body += [
            _line(x, top, x, frame.bottom, "grid"),
            _text(x, frame.bottom + 17, f"{100 * value:.0f}", "middle", "tick"),
        ]
    body.append(
        _text(
            (frame.left + frame.right) / 2,
            frame.bottom + 35,
            "accuracy on held-out samples, %",
            "middle",
            "tick",
        )
    )
    for i, (name, share) in enumerate(block.bars):
        y, marked = top + pitch * i + 4, name == block.marked
        kind = "strong" if marked else ""
        body.append(_text(left - 8, y + 13, names[i], "end", kind))
        if finite(share):
            body += [
                _box(
                    left,
                    y,
                    frame.x(min(max(share, 0), 1)) - left,
                    pitch - 7,
                    "bar marked" if marked else "bar",
                    f"{name}: {text(share, 'share')}",
                ),
                _text(frame.x(min(max(share, 0), 1)) + 6, y + 13, text(share, "share"), kind=kind),
            ]
        else:
            body.append(_text(left + 6, y + 13, "not a number"))
    if block.before is not None and finite(block.before):
        x, words = frame.x(block.before), f"before {text(block.before, 'share')}"
        anchor = "start" if x < WIDTH / 3 else "middle" if x < WIDTH * 0.8 else "end"
        body += [_line(x, top - 4, x, frame.bottom, "before"), _text(x, top - 8, words, anchor)]
    best = max((b for b in block.bars if finite(b[1])), key=lambda b: b[1], default=None)
    return _svg(
        block.title,
        "nothing to show" if best is None else f"best is {best[0]} with {text(best[1], 'share')}",
        height,
        body,
    )


def curve_svg(block: Curve) -> str:
    """Loss by step: thin as it was, thick as a running mean; gaps where it is not a number."""
    values, more = thin([v if finite(v) else math.nan for v in block.values], 600)
    every = block.every * more
    known = [v for v in values if math.isfinite(v)]
    steps = len(block.values) * block.every
    top = _range(known, 0.05, low=0)[1]
    usual = 1.3 * sorted(known)[int(0.98 * (len(known) - 1))] if known else top
    if 0 < 3 * usual < top:  # a few outliers would flatten the rest
        top = usual
    frame = _Frame((0, max(steps, 1)), (0, top), 280)
    body = frame.axes("training step", "count", "loss", "number", x_steps=WHOLE_STEPS)
    window = max(1, len(values) // 30)
    smooth = [
        _mean(values[max(0, i - window) : i + window + 1]) if math.isfinite(values[i]) else math.nan
        for i in range(len(values))
    ]
    for series, kind in ((values, "thin"), (smooth, "thick")):
        body.append(
            _path(
                [
                    (frame.x((i + 0.5) * every), frame.y(min(v, top))) if math.isfinite(v) else None
                    for i, v in enumerate(series)
                ],
                kind,
            )
        )
    for i, (step, what) in enumerate(block.marks):
        if 0 < step <= steps:
            x = frame.x(step)
            body += [
                _line(x, frame.top, x, frame.bottom, "before"),
                _text(
                    x - 5 if x > WIDTH / 2 else x + 5,
                    frame.top + 8 + 13 * (i % 3),  # neighbours one below the other
                    what,
                    "end" if x > WIDTH / 2 else "start",
                ),
            ]
    height = 280.0
    said = f"{steps} steps" if every == 1 else f"each point is the mean of {every} steps"
    if known:
        said += f"; the first is {text(known[0], 'number')}, the last {text(known[-1], 'number')}"
        clipped = sum(v > top for v in known)
        said += f"; {clipped} above the picture" if clipped else ""
    lost = len(values) - len(known)
    said += f"; {lost} not a number" if lost else ""
    lines = _paragraph(frame.left, height + 8, said, frame.right - frame.left)
    return _svg(block.title, said, height + LINE * len(lines), [*body, *lines])


def trade_svg(block: Trade) -> str:
    """Peak RAM against time, a point a plan; a line through them, and a dashed one for the limit."""
    points = [p for p in block.points if finite(p[0]) and finite(p[1])]
    times, most = [p[1] for p in points], max([p[0] for p in points], default=1)
    frame = _Frame((0, 1.12 * most), _range(times, 0.15, low=0), 280)
    body = frame.axes("peak RAM", "bytes", "time of a step", "us", x_steps=BYTE_STEPS)
    if block.limit_bytes <= 1.12 * most:
        x = frame.x(block.limit_bytes)
        body += [_line(x, frame.top, x, frame.bottom, "before"), _text(x - 5, frame.top + 8, "limit", "end")]
    body.append(_path([(frame.x(b), frame.y(t)) for b, t, _ in points], "thick"))
    for size, time, parts in points:
        split = f", {parts} micro-batches" if parts > 1 else ""
        body.append(
            _dot(
                frame.x(size), frame.y(time), 4.5, "dot", f"{text(size, 'bytes')}: {text(time, 'us')}{split}"
            )
        )
    said = f"{len(points)} plans"
    if points:
        ends = [f"{text(b, 'bytes')} at {text(t, 'us')}" for b, t, _ in (points[0], points[-1])]
        said += f", from {ends[0]} to {ends[1]}"
    return _svg(block.title, said, 280, body)


def _mean(values: Sequence[float]) -> float:
    known = [v for v in values if math.isfinite(v)]
    return sum(known) / len(known) if known else math.nan


def _path(points: Sequence[tuple[float, float] | None], kind: str) -> str:
    """A line through points, broken at None; a lone point is drawn as a dot."""
    text_, lone, down = [], [], False
    for i, point in enumerate(points):
        if point is None:
            down = False
            continue
        text_.append(f"{'L' if down else 'M'}{_n(point[0])} {_n(point[1])}")
        if not down and (i + 1 == len(points) or points[i + 1] is None):
            lone.append(f'<circle cx="{_n(point[0])}" cy="{_n(point[1])}" r="2.5" class="dot"/>')
        down = True
    return f'<path d="{"".join(text_)}" class="{kind}"/>' + "".join(lone)


_SCROLL = "<div class=scroll tabindex=0 role=group>"  # what is too wide for a phone scrolls, also by keyboard


# -- the page -----------------------------------------------------------------------------------------


def _facts(block: Facts) -> str:
    items = "".join(
        f"<div><dt>{escape(what)}</dt><dd>{escape(figure)}</dd><dd class=remark>{escape(remark)}</dd></div>"
        for what, figure, remark in block.items
    )
    return f"<dl class=facts>{items}</dl>"


def _note(block: Note) -> str:
    return f'<p class="{"warning" if block.tone == "warning" else "note"}">{escape(block.text)}</p>'


def _table(block: Table) -> str:
    heads, rows = [], []
    for c in block.columns:
        heads.append(f"<th scope=col{'' if c.unit == 'text' else ' class=figure'}>{escape(c.title)}</th>")
    for i, row in enumerate(block.rows):
        cells = []
        for c in block.columns:
            value = row.get(c.key)
            title = f' title="{value:,} bytes"' if c.unit == "bytes" and isinstance(value, int) else ""
            kind = "" if c.unit == "text" else " class=figure"
            cells.append(f"<td{kind}{title}>{escape(text(value, c.unit))}</td>")
        rows.append(f"<tr{' class=marked' if i == block.marked else ''}>{''.join(cells)}</tr>")
    caption = f"<p class=caption>{escape(block.caption)}</p>" if block.caption else ""
    return (
        f"<div><h3>{escape(block.title)}</h3>{_SCROLL}<table><thead><tr>{''.join(heads)}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>{caption}</div>"
    )


def _figure(draw: Callable[[Any], str]) -> Callable[[Any], str]:
    return lambda block: (
        f"<figure><figcaption>{escape(block.title)}</figcaption>{_SCROLL}{draw(block)}</div></figure>"
    )


_DRAW: dict[type, Callable[[Any], str]] = {
    Facts: _facts,
    Note: _note,
    Table: _table,
    Parts: _figure(parts_svg),
    Timeline: _figure(timeline_svg),
    Scatter: _figure(scatter_svg),
    Bars: _figure(bars_svg),
    Curve: _figure(curve_svg),
    Trade: _figure(trade_svg),
}


def _block(block: Block) -> str:
    return _DRAW[type(block)](block)


def _section(section: Section) -> str:
    """Neighbouring plots, and tables of details after them, stand side by side where the page is wide."""
    out: list[str] = []
    figures: list[str] = []
    for block in (*section.blocks, None):
        if isinstance(block, (Parts, Timeline, Scatter, Bars, Curve, Trade)) or (
            figures and isinstance(block, Table) and block.detail
        ):
            figures.append(_block(block))
            continue
        if figures:
            out.append(f"<div class=figures>{''.join(figures)}</div>")
            figures = []
        if block is not None:
            out.append(_block(block))
    head = f"<h2>{escape(section.title)}</h2>" if section.title else ""
    return f"<section>{head}{''.join(out)}</section>" if out else ""


def render(report: Report) -> str:
    """The page. It loads nothing, and its policy forbids it to. BadInput for figures that make no sense."""
    with sound():
        sections = "".join(_section(s) for s in report.sections)
    style = resources.files(__package__).joinpath("assets/report.css").read_text("utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(report.title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>{escape(report.title)}</h1>
<p class="subtitle">{escape(report.subtitle)}</p>
{sections}
<footer>Made by acclimate. Bytes and MACs of a Program are exact;
the runtime's own bytes, time and energy are estimates.</footer>
</main>
</body>
</html>
"""
