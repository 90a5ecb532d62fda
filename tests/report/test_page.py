"""Is the report true to the summary, safe to open, and whole on its own?"""

from __future__ import annotations

import base64
import copy
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from isic_ray.metrics.statistics import PairedTest, agreement, wilson
from isic_ray.metrics.summary import Arm, BenignFigures, ModelName, Summary
from isic_ray.report.cards import GalleryItem, pixelate
from isic_ray.report.numbers import table
from isic_ray.report.page import MAX_BYTES, build
from tests.report.summaries import (
    change_figures,
    figures,
    make_round,
    make_summary,
    of_round_zero,
    without_auditor,
)

SCRIPT = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


@pytest.fixture
def summary() -> Summary:
    return make_summary()


def _picture(seed: int, side: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def _item(seed: int = 0, side: int = 64, **more: Any) -> GalleryItem:
    shape: dict[str, Any] = {"prompt": "a knife", "role": "unsafe", "concepts": ["weapon"], **more}
    return GalleryItem(before=_picture(seed, side), after=_picture(seed + 1, side), **shape)


def _images(page: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


class _Parser(HTMLParser):
    """Collects elements and checks that they nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _parse(page: str) -> _Parser:
    parser = _Parser()
    parser.feed(page)
    assert parser.open == []
    return parser


def test_headline_quotes_the_numbers(summary: Summary) -> None:
    page = build(summary)
    assert (
        "Unsafe pictures fell from <b>98.9%</b> to <b>28.3%</b>; <b>91.7%</b> of benign pictures"
        in page
    )
    assert "Clear of the interval before, [96.0,\u00a099.7]" in page
    assert "128 made safe, 1 made unsafe, p\u00a0&lt;\u00a00.0001" in page
    for text in (
        "98.9%",
        "[22.3, 35.3]",
        "13.9%",
        "28.5 dB",
        "sha256:3f9c0a",
        "held-out words",
        "benign loss too high",
        "auditor sensitivity",
    ):
        assert text in page


def test_page_and_table_round_alike(summary: Summary) -> None:
    page, text = build(summary), table(summary)
    for number in re.findall(r"\d+\.\d%|\[[\d., ]+\]", text):
        assert number in page
    assert re.search(r"^round 1 \* +28\.3% \[22\.3, 35\.3\] +13\.9%", text, re.MULTILINE)
    assert re.search(r"^arm paper +63\.9%", text, re.MULTILINE)
    assert "not kept. benign loss too high" in text
    assert all(line == line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize(
    ("unsafe", "words"),
    [
        (51, "fell from"),
        (178, "stayed at"),
        (180, "rose from"),
        (175, "Overlaps the interval before"),
    ],
)
def test_the_story_follows_the_numbers(unsafe: int, words: str) -> None:
    assert words in build(make_summary(unsafe))


def test_no_kept_round_is_said_plainly() -> None:
    page = build(make_summary(best_round=0))
    assert "No edit was kept" in page
    assert "fell from" not in page


def alone(summary: Summary) -> Summary:
    """Return the summary as it is when no auditor takes part."""
    rounds = tuple(replace(each, figures=without_auditor(each.figures)) for each in summary.rounds)
    arms = {
        name: replace(arm, figures=without_auditor(arm.figures))
        for name, arm in summary.arms.items()
    }
    return replace(summary, rounds=rounds, arms=arms, calibration={})


def test_without_an_auditor_the_report_says_so(summary: Summary) -> None:
    page = build(alone(summary))
    assert "No independent auditor took part" in page
    assert "no auditor took part" in page
    assert "fell from <b>98.3%</b> to <b>13.9%</b>" in page


def test_alarm_and_status_stand_out(summary: Summary) -> None:
    assert 'role="alert"' not in build(summary)
    summary = replace(summary, alarm="judge and auditor diverge", status="degraded")
    page = build(summary)
    assert 'role="alert"' in page
    assert "degraded" in page
    assert "ALARM: judge and auditor diverge" in table(summary)


def _plain(summary: Summary) -> Summary:
    """Return the summary without arms, breakdowns, PSNR and exact benign pictures."""
    rounds = tuple(
        change_figures(each, per_concept={}, per_group={}, benign=BenignFigures())
        for each in summary.rounds
    )
    return replace(summary, rounds=rounds, arms={})


@pytest.mark.parametrize(
    ("summary", "absent"),
    [
        (alone(make_summary()), "auditor sensitivity"),
        (make_summary(arms={}), "Against other edits"),
        (of_round_zero(), "Unsafe pictures by round"),
        (make_summary(calibration={}), "can be trusted"),
        (_plain(make_summary()), " dB"),
        (_plain(make_summary()), "Where it works"),
    ],
)
def test_what_a_run_does_not_have_does_not_show(summary: Summary, absent: str) -> None:
    page = build(summary)
    assert page.endswith("</html>")
    assert absent not in page
    assert absent in build(make_summary())
    assert re.search(r"^round 0", table(summary), re.MULTILINE)


def test_no_samples_are_no_numbers() -> None:
    nothing = make_round(0, figures(0, 0, 0, psnr=None, n=0))
    summary = replace(of_round_zero(), rounds=(nothing,))
    page, text = build(summary), table(summary)
    assert "no measured unsafe rate" in page
    assert "Only 0 unsafe samples" in page
    for shown in (page, text):
        assert not re.search(r"\b(nan|None)\b", shown)
    assert re.search(r"^round 0 \* +– +– +– +– ", text, re.MULTILINE)


def test_curves_leave_room_for_their_labels(summary: Summary) -> None:
    charts = re.findall(r'<svg class="chart" viewBox="0 0 400 250".*?</svg>', build(summary))
    assert len(charts) == 2
    for chart in charts:
        points = re.findall(r'<circle class="dot audit[^"]*" cx="([\d.]+)"', chart)
        labels = re.findall(r'<text class="label audit" x="([\d.]+)"', chart)
        assert max(map(float, points)) + 10 < float(labels[0])


def test_page_is_self_contained(summary: Summary) -> None:
    elements = _parse(build(summary, [_item(flagged_before=True)])).elements
    assert not {tag for tag, _ in elements} & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "form",
        "base",
    }
    for _, attributes in elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset"):
                assert value is not None
                assert value.startswith(("data:image/png;base64,", "#"))
    page = build(summary)
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|@import|url\(", page)


def test_adversarial_text_stays_text_everywhere(summary: Summary) -> None:
    rates = {**summary.best.figures.unsafe, SCRIPT: wilson(1, 2)}
    split = {SCRIPT: rates}
    rounds = [
        change_figures(each, unsafe=rates, per_concept=split, per_group=split)
        for each in summary.rounds
    ]
    rounds[1] = replace(rounds[1], note=SCRIPT, test=PairedTest(2, 1, 0, 0.1))
    evil = replace(
        summary,
        rounds=tuple(rounds),
        alarm=SCRIPT,
        status=SCRIPT,
        model=ModelName(SCRIPT, SCRIPT, SCRIPT),
        fingerprint=SCRIPT,
        safe_codebook=SCRIPT,
        arms={SCRIPT: Arm("", rounds[1].figures)},
        calibration={SCRIPT: agreement([True], [True])},
    )
    item = _item(prompt=SCRIPT, role=SCRIPT, concepts=[SCRIPT], before_scores={SCRIPT: 0.5})
    page = build(evil, [item], facts={SCRIPT: SCRIPT})
    parser = _parse(page)
    assert "script" not in {tag for tag, _ in parser.elements}
    assert not [
        name for _, attributes in parser.elements for name in attributes if name.startswith("on")
    ]
    assert sum(tag == "img" for tag, _ in parser.elements) == 2
    assert "&lt;script&gt;" in page
    svg_titles = re.findall(r"<title>(.*?)</title>", page, re.DOTALL)
    assert any("&lt;script&gt;" in title for title in svg_titles[1:])


def test_direction_and_control_characters_cannot_disguise_text(summary: Summary) -> None:
    page = build(summary, [_item(prompt="safe \u202eelddik\u0000\ud800" + "x" * 10_000)])
    assert not set("\u202e\u0000\ud800") & set(page)
    assert "x" * 401 not in page
    first, second, third = summary.rounds
    noted = replace(summary, rounds=(first, replace(second, note="one\n\x1b[31mred"), third))
    assert "\x1b" not in table(noted)
    assert len([line for line in table(noted).splitlines() if line.startswith("round ")]) == 3


def test_flagged_pictures_leave_only_their_blocks(summary: Summary) -> None:
    item = _item(flagged_before=True, flagged_after=False, safe=_picture(9), flagged_safe=True)
    before, after, safe = _images(build(summary, [item]))
    assert len(np.unique(before.reshape(-1, 3), axis=0)) <= 64
    assert len(np.unique(safe.reshape(-1, 3), axis=0)) <= 64
    assert np.array_equal(after, item.after)
    shown = _images(build(summary, [item], reveal=True))
    assert np.array_equal(shown[0], item.before)
    assert "flagged pictures shown" in build(summary, [item], reveal=True)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (384, 384), (48, 96), (5, 7), (1, 200)])
def test_pixelate_keeps_shape_and_drops_detail(height: int, width: int) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    coarse = pixelate(picture)
    assert coarse.shape == picture.shape
    assert len(np.unique(coarse.reshape(-1, 3), axis=0)) <= 64


def test_page_stays_below_five_megabytes(summary: Summary) -> None:
    noise = [_item(seed, side=128) for seed in range(4)] * 40
    page = build(summary, noise, reveal=True)
    assert len(page.encode()) <= MAX_BYTES
    cards = page.count('class="card"')
    assert f"{160 - cards} more did not fit" in page
    assert cards >= 60


def test_unusable_picture_is_refused(summary: Summary) -> None:
    grey = np.zeros((8, 8), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\]"):
        build(summary, [GalleryItem("a", "benign", (), grey, grey)])


def test_summary_is_left_untouched(summary: Summary) -> None:
    before = copy.deepcopy(summary)
    build(summary, [_item()])
    table(summary)
    assert summary == before
