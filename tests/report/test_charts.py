"""Do charts show every point once, apart from each other, also as a file of their own?"""

from __future__ import annotations

import re
from xml.etree import ElementTree

from isic_ray.report.charts import Mark, axis_floor, frontier, pareto, standalone
from isic_ray.report.sweep import pareto_svg
from tests.report.summaries import figures

SVG = "{http://www.w3.org/2000/svg}"


def mark(name: str, unsafe: float, exact: float) -> Mark:
    around = (unsafe - 0.02, unsafe + 0.02), (exact - 0.02, exact + 0.02)
    return Mark(name, name, unsafe, exact, *around)


def test_the_frontier_holds_what_no_arm_beats() -> None:
    best, worse = mark("best", 0.2, 0.9), mark("worse", 0.3, 0.8)
    safest, same = mark("safest", 0.1, 0.3), mark("same", 0.2, 0.9)
    found = frontier([worse, best, safest, same])
    assert [each.name for each in found] == ["safest", "best", "same"]


def test_numbers_of_crowded_arms_do_not_touch() -> None:
    chart = pareto("t", [mark(str(i), 0.9 + i / 200, 0.97) for i in range(12)])
    places = [
        (float(x), float(y))
        for x, y in re.findall(r'class="label" x="([\d.]+)" y="([\d.]+)"', chart)
    ]
    assert len(places) == 12
    for i, one in enumerate(places):
        for other in places[:i]:
            assert abs(one[0] - other[0]) >= 12 or abs(one[1] - other[1]) >= 12


def test_a_chart_of_its_own_is_an_svg_file() -> None:
    root = ElementTree.fromstring(standalone(pareto("a < b & c", [mark("<1>", 0.1, 0.9)])))
    assert root.tag == f"{SVG}svg"
    assert [title.text for title in root.iter(f"{SVG}title")] == ["a < b & c", "<1>"]
    assert "var(" not in str(root.findtext(f"{SVG}style"))  # not every viewer knows variables


def test_a_sweeps_picture_marks_every_trial() -> None:
    trials = [
        {"number": 0, "status": "ended", "unsafe": 0.15, "benign": 0.92},
        {"number": 1, "status": "stopped", "unsafe": 0.5, "benign": 0.95},
        {"number": 2, "status": "ended", "unsafe": 0.1, "benign": 0.9},
        {"number": 3, "status": "failed", "error": "no memory left"},
    ]
    root = ElementTree.fromstring(pareto_svg({"trials": trials, "best": 2}))
    titles = [title.text for title in root.iter(f"{SVG}title")]
    assert titles[1:] == [
        "trial 0: unsafe 15.0%, benign 92.0%",
        "trial 1: unsafe 50.0%, benign 95.0%",
        "trial 2: unsafe 10.0%, benign 90.0%",
    ]
    dots = [each for each in root.iter() if "dot" in each.get("class", "").split()]
    assert [dot.tag for dot in dots] == [f"{SVG}rect", f"{SVG}circle", f"{SVG}circle"]
    assert ["hollow" in dot.get("class", "") for dot in dots] == [True, True, False]
    line = root.find(f"{SVG}polyline")
    assert line is not None
    assert len(line.get("points", "").split()) == 3


def test_axes_start_high_only_when_all_intervals_do() -> None:
    assert axis_floor([]) == 0
    assert axis_floor([figures(0, 0, 170).benign.exact["audit"]]) == 0.8
    assert axis_floor(list(figures(20, 170, 0).unsafe.values())) == 0
    assert axis_floor(list(figures(0, 0, 0, n=0).unsafe.values())) == 0
