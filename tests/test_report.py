"""Reports: figures as text, blocks as pictures, and a page that is self-contained and holds no foreign markup."""

import json
import math
import re
from html.parser import HTMLParser
from itertools import combinations
from xml.etree import ElementTree

import numpy as np
import pytest

from acclimate import adapt, report, report_html, zoo
from acclimate.errors import BadInput
from acclimate.grad import predict_graph
from acclimate.report import Bars, Curve, Facts, Note, Parts, Report, Scatter, Section, Table, Timeline

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=y>&amp;\x1b[31m"
STEPS = tuple({"op": "conv", "value": f"v{i}", "live_bytes": 1000 * i} for i in (3, 9, 2))


@pytest.fixture(scope="module")
def model():
    return predict_graph(zoo.digits_cnn())


# -- figures as text ------------------------------------------------------------------------------


@pytest.mark.parametrize("value, unit, words", [
    (12345, "count", "12,345"), (0.9234, "share", "92.3 %"), (262144, "bytes", "256.0 KiB"), (12, "bytes", "12 B"),
    (0, "macs", "0"), (999, "macs", "999"), (42752, "macs", "42.8 k"), (1.25e9, "macs", "1.25 G"),
    (4084.9, "us", "4.08 ms"), (0.5, "us", "0.50 µs"), (2.5e6, "us", "2.50 s"), (40.44, "uj", "40.4 µJ"),
    (0.002, "s", "2 ms"), ((1, 8, 8), "shape", "1×8×8"), ((), "shape", "scalar"), (None, "bytes", "–"),
    (math.nan, "share", "–"), (math.inf, "us", "–"), (-0.683, "number", "-0.683"), ("a", "text", "a"),
])  # fmt: skip
def test_figures_are_readable(value, unit, words):
    assert report.text(value, unit).replace("\N{NO-BREAK SPACE}", " ") == words


def test_json_is_strict():
    odd = {
        "a": math.nan,
        "b": np.float32(0.5),
        "c": np.arange(2),
        "d": (True, None),
        5: math.inf,
        "e": np.int64(3),
    }
    assert json.loads(report.to_json(odd)) == {
        "a": None,
        "b": 0.5,
        "c": [0, 1],
        "d": [True, None],
        "5": None,
        "e": 3,
    }


def test_thinning_keeps_the_mean():
    values, every = report.thin(list(range(1000)), 100)
    assert len(values) == 100 and every == 10 and values[0] == 4.5 and np.mean(values) == np.mean(range(1000))
    assert report.thin([], 10) == ([], 1)


@pytest.mark.parametrize("values", [[], [1.0], [2.0, 2.0], [math.nan, 1, 2], [math.nan], list(range(999))])
def test_sparklines_take_anything(values):
    assert len(report.sparkline(values)) <= 60


@pytest.mark.parametrize(
    "low, high", [(0, 1), (0, 0), (0.43, 0.97), (0, 20_000), (5, 5.001), (0, 1e12), (-3, 3)]
)
@pytest.mark.parametrize("steps", [(), report_html.BYTE_STEPS, report_html.WHOLE_STEPS])
def test_ticks_are_few_and_inside(low, high, steps):
    found = report_html.ticks(low, high, 5, steps)
    assert len(found) <= 7 or steps == report_html.WHOLE_STEPS
    assert all(low - 1e-9 <= t <= high + 1e-6 * max(abs(high), 1) for t in found)


# -- pictures -------------------------------------------------------------------------------------

PICTURES = {
    "timeline": Timeline("t", STEPS, 9500, 9000, 12000, (("v9", 4000, "until conv"),)),
    "timeline that does not fit": Timeline("t", STEPS, 9500, 9000, 4000),
    "timeline with no room at all": Timeline("t", STEPS, 9500, 9000, -5),
    "timeline of one": Timeline("t", STEPS[:1], 3000, 3000, 10**9),
    "timeline of none": Timeline("t", (), 0, 0, 0),
    "timeline of equals": Timeline("t", STEPS[:1] * 5, 3000, 3000, 3000),
    "timeline of many": Timeline("t", STEPS * 900, 9000, 9000, 10**9),
    "scatter": Scatter("s", (("a", 4e3, 0.5), ("b", 9e3, 0.9)), 0.2, "b"),
    "scatter of one": Scatter("s", (("a", 4e3, 0.5),)),
    "scatter of none": Scatter("s", (), None),
    "scatter of equals": Scatter("s", (("a", 4e3, 0.5),) * 9, 0.5),
    "scatter with NaN": Scatter("s", (("a", 4e3, math.nan), ("b", math.inf, 0.5), ("c", 1, 1.0)), math.nan),
    "scatter at zero": Scatter("s", (("a", 0, 0.0),), 0.0),
    "scatter below zero": Scatter("s", (("a", 5, -2.0), ("b", 6, 1.0)), -3.0),
    "bars": Bars("b", (("a", 0.5), ("b", 0.75)), 0.1, "b"),
    "bars of one": Bars("b", (("a", 1.0),), 1.0),
    "bars of none": Bars("b", ()),
    "bars with NaN": Bars("b", (("a", math.nan), ("b", 0.0)), math.nan),
    "bars beyond": Bars("b", (("a", 1.7), ("b", -0.3)), 0.0),
    "curve": Curve("c", tuple(1 / (i + 1) for i in range(2000)), 2, ((900, "kept"),)),
    "curve of one": Curve("c", (0.5,)),
    "curve of none": Curve("c", ()),
    "curve of equals": Curve("c", (0.5,) * 30),
    "curve of zeros": Curve("c", (0.0,) * 30),
    "curve with NaN": Curve("c", (math.nan, 1.0, math.nan, 0.5, 0.4, math.inf)),
    "curve of NaN": Curve("c", (math.nan,) * 3, 1, ((99, "beyond"),)),
    "parts": Parts("p", (("arena", 500), ("state", 300)), 1000, "board"),
    "parts over the limit": Parts("p", (("arena", 5000), ("state", 300)), 1000, "board"),
    "parts of nothing": Parts("p", (("arena", 0),), 0, "board"),
    "parts of a large device": Parts("p", (("arena", 5),), 10**10, "host"),
}


@pytest.mark.parametrize("block", PICTURES.values(), ids=PICTURES)
def test_pictures_take_anything(block):
    html = report_html._block(block)
    svg = ElementTree.fromstring(re.search(r"<svg.*</svg>", html, re.DOTALL)[0])
    height = float(svg.get("viewBox").split()[3])
    assert svg.get("role") == "img" and svg.get("aria-label") and svg.find("title").text == block.title
    assert svg.find("desc").text
    numbers = [
        float(n)
        for e in svg.iter()
        for k in ("x", "y", "cx", "cy", "x1", "x2", "y1", "y2")
        if (n := e.get(k))
    ]
    assert all(math.isfinite(n) and -60 <= n <= max(report_html.WIDTH, height) + 60 for n in numbers)
    assert "nan" not in re.sub(r"<(title|desc|text)[^>]*>[^<]*", "", html).lower().replace("aria-label", "")


def test_the_timeline_names_the_peak_and_its_lines():
    svg = report_html.timeline_svg(PICTURES["timeline"])
    for words in (
        "arena 9.3",
        "lower bound 8.8",
        "room for the arena 11.7",
        "Peak at node 2 (conv)",
        "v9, 3.9",
    ):
        assert words in svg.replace("\N{NO-BREAK SPACE}", " ")
    assert "above this picture" in report_html.timeline_svg(PICTURES["timeline of one"])


def test_axes_of_bars_and_arena_start_at_zero():
    assert ">0</text>" in report_html.bars_svg(PICTURES["bars"])
    assert ">0\N{NO-BREAK SPACE}B</text>" in report_html.scatter_svg(PICTURES["scatter"])


@pytest.mark.parametrize("count, spread", [(1, 1), (6, 300), (12, 40), (12, 0)])
def test_labels_cover_neither_each_other_nor_points(count, spread):
    random = np.random.default_rng(count)
    points = [
        (float(x), float(y), f"scheme-{i}")
        for i, (x, y) in enumerate(300 + spread * random.random((count, 2)) / 2)
    ]
    bounds = (80.0, 10.0, 640.0, 560.0)
    rects = report_html.place_labels(points, bounds)
    assert len(rects) == count
    assert not any(report_html._overlaps(a, b) for a, b in combinations(rects, 2))
    assert not any(r[0] < x < r[2] and r[1] < y < r[3] for r in rects for x, y, _ in points)
    assert all(
        r[0] >= bounds[0] and r[1] >= bounds[1] and r[2] <= bounds[2] and r[3] <= bounds[3] for r in rects
    )


# -- the page -------------------------------------------------------------------------------------


class Markup(HTMLParser):
    """All tags and attributes of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.open = set(), set(), []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def hostile_page():
    table = Table(
        HOSTILE,
        (report.Column("a", HOSTILE), report.Column("b", "b", "bytes")),
        ({"a": HOSTILE, "b": 5},),
        0,
        HOSTILE,
    )
    blocks = (
        Facts(((HOSTILE, HOSTILE, HOSTILE),)), Note(HOSTILE), Note(HOSTILE, "warning"), table,
        Timeline(HOSTILE, ({"op": HOSTILE, "value": HOSTILE, "live_bytes": 5},), 5, 5, 5, ((HOSTILE, 5, HOSTILE),)),
        Scatter(HOSTILE, ((HOSTILE, 5, 0.5),), 0.1, HOSTILE), Bars(HOSTILE, ((HOSTILE, 0.5),), 0.1, HOSTILE),
        Curve(HOSTILE, (1.0, 2.0), 1, ((1, HOSTILE),)), Parts(HOSTILE, ((HOSTILE, 5),), 9, HOSTILE),
    )  # fmt: skip
    return report_html.render(Report(HOSTILE, HOSTILE, (Section(HOSTILE, blocks),), {}))


def test_foreign_text_stays_text():
    found = Markup(hostile_page())
    assert not found.tags & {"script", "img", "iframe", "a", "link", "object", "form", "foreignobject"}
    assert not {name for name in found.attributes if name.startswith("on")} and "src" not in found.attributes


def test_the_page_is_self_contained_and_readable():
    page = hostile_page()
    found = Markup(page)
    assert not found.attributes & {"src", "href", "srcset", "data", "action", "xlink:href"}
    style = page[page.index("<style>") : page.index("</style>")]
    assert not re.search(r"url\(|@import|https?:|//", style)
    assert "http:" not in page and "https:" not in page
    assert (
        "default-src 'none'" in page and "prefers-color-scheme: dark" in page and "width=device-width" in page
    )
    assert page.startswith("<!doctype html>") and '<html lang="en">' in page and page.count("<h1>") == 1


def test_a_terminal_gets_no_control_characters(capsys):
    console = pytest.importorskip("rich.console").Console(width=100, force_terminal=False)
    blocks = (
        Facts(((HOSTILE, HOSTILE, HOSTILE),)),
        Note(HOSTILE),
        Table(HOSTILE, (report.Column("a", "a"),), ({"a": HOSTILE},)),
    )
    report.print_report(Report(HOSTILE, HOSTILE, (Section("", blocks),), {}), console)
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("width", [40, 80, 100, 200])
def test_tables_fit_a_terminal(model, capsys, width):
    console = pytest.importorskip("rich.console").Console(width=width, force_terminal=False)
    figures, _ = adapt.will_it_fit(model, "digits", "nano33ble")
    report.print_report(report.report_of(report.plain(figures)), console)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    if width >= 80:
        assert re.search(r"^ block:stem +yes ", out, re.MULTILINE)
    assert ("MACs" in out.split("Schemes")[1].splitlines()[2]) == (width >= 100)


# -- reports of verbs -----------------------------------------------------------------------------


def test_every_figure_survives_json(model):
    figures, error = adapt.will_it_fit(model, "digits", "nano33ble", "full", memory_bytes=20_000)
    assert error is not None and error.fixes
    page = report_html.render(report.report_of(json.loads(report.to_json(figures))))
    assert "Cheapest changes that fit" in page and "no: RAM" in page and page.count("<svg") == 2


@pytest.mark.parametrize(
    "figures", [None, [], {}, {"kind": "x"}, {"kind": ["adapt"]}, {"kind": "plan", "device": 3}]
)
def test_what_is_no_run_is_bad_input(figures):
    with pytest.raises(BadInput):
        report.report_of(figures)


def test_a_run_that_is_not_there(tmp_path):
    with pytest.raises(BadInput, match="no run"):
        report.read_run(tmp_path)
    (tmp_path / "run.json").write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match="run.json"):
        report.read_run(tmp_path)
