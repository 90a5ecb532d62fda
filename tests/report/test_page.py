"""Is the report true to the summary, safe to open, and whole on its own?"""

from __future__ import annotations

import base64
import copy
import io
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from isic_ray.metrics.statistics import PairedTest, wilson
from isic_ray.report.gallery import GalleryItem, pixelate
from isic_ray.report.numbers import table
from isic_ray.report.page import MAX_BYTES, build

SCRIPT = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


def _rate(k: int, n: int) -> dict[str, Any]:
    return wilson(k, n).to_dict()


def _round(number: int, unsafe: int, said: int, exact: int, **more: Any) -> dict[str, Any]:
    return {
        "round": number,
        "unsafe": {"self": _rate(said, 180), "audit": _rate(unsafe, 180)},
        "benign": {
            "audit": _rate(exact, 210),
            "flagged": _rate(3, 210),
            "psnr": 28.5 if number else None,
        },
        "kept": True,
        "note": "",
        "seconds": 97.2,
        "sampled": 390,
        "per_concept": {"weapon": {"self": _rate(said // 2, 90), "audit": _rate(unsafe // 2, 90)}},
        "per_group": {"held-out words": {"audit": _rate(unsafe // 3, 60)}},
        **more,
    }


@pytest.fixture
def summary() -> dict[str, Any]:
    return {
        "schema": 1,
        "status": "complete",
        "model": {"name": "pictogram", "digest": "sha256:3f9c0a"},
        "rounds": [
            _round(0, 178, 177, 198),
            _round(1, 51, 25, 193, test=PairedTest(180, 128, 1, 3e-30).to_dict()),
            _round(2, 49, 21, 170, kept=False, note="benign loss too high"),
        ],
        "best_round": 1,
        "arms": {"random": _round(0, 165, 166, 166), "paper": _round(0, 115, 113, 128)},
        "alarm": None,
    }


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


def test_headline_quotes_the_numbers(summary: dict[str, Any]) -> None:
    page = build(summary)
    assert (
        "Unsafe pictures fell from <b>98.9%</b> to <b>28.3%</b>; <b>91.9%</b> of benign pictures"
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
    ):
        assert text in page


def test_page_and_table_round_alike(summary: dict[str, Any]) -> None:
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
def test_the_story_follows_the_numbers(summary: dict[str, Any], unsafe: int, words: str) -> None:
    summary["rounds"][1]["unsafe"]["audit"] = _rate(unsafe, 180)
    assert words in build(summary)


def test_no_kept_round_is_said_plainly(summary: dict[str, Any]) -> None:
    summary["best_round"] = 0
    page = build(summary)
    assert "No edit was kept" in page
    assert "fell from" not in page


def test_without_an_auditor_the_report_says_so(summary: dict[str, Any]) -> None:
    for entry in [*summary["rounds"], *summary["arms"].values()]:
        del entry["unsafe"]["audit"], entry["benign"]["audit"]
    page = build(summary)
    assert "No independent auditor took part" in page
    assert "no auditor took part" in page
    assert "fell from <b>98.3%</b> to <b>13.9%</b>" in page


def test_alarm_and_status_stand_out(summary: dict[str, Any]) -> None:
    assert 'role="alert"' not in build(summary)
    summary.update(alarm="judge and auditor diverge", status="degraded")
    page = build(summary)
    assert 'role="alert"' in page
    assert "degraded" in page
    assert "ALARM: judge and auditor diverge" in table(summary)


def _paths(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    return [
        found for key, value in children for found in [(*path, key), *_paths(value, (*path, key))]
    ]


@pytest.mark.parametrize("damage", ["absent", None, "text", []])
def test_any_missing_or_odd_piece_is_tolerated(summary: dict[str, Any], damage: object) -> None:
    summary["calibration"] = {
        "self": {"sensitivity": _rate(9, 10), "kappa": {"value": 0.5, "n": 10, "ci": [0.1, 0.9]}}
    }
    del summary["arms"]["paper"]
    for path in _paths({key: value for key, value in summary.items() if key != "rounds"}) + [
        ("rounds", *path) for path in _paths(summary["rounds"][:2]) if path[0] == 1
    ]:
        broken = copy.deepcopy(summary)
        parent: Any = broken
        for key in path[:-1]:
            parent = parent[key]
        if damage == "absent":
            del parent[path[-1]]
        else:
            parent[path[-1]] = damage
        assert build(broken).endswith("</html>")
        assert table(broken)


def test_nothing_measured_yet() -> None:
    assert "no measured unsafe rate" in build({})
    assert "unsafe, auditor" in table({})
    empty = {
        "rounds": [{"round": 0, "unsafe": {"self": _rate(0, 0)}, "benign": {"audit": _rate(0, 0)}}],
        "best_round": 0,
    }
    assert "no measured unsafe rate" in build(empty)


def test_nan_is_no_number(summary: dict[str, Any]) -> None:
    summary["rounds"][1]["benign"]["psnr"] = float("nan")
    summary["rounds"][1]["unsafe"]["audit"]["rate"] = float("nan")
    page = build(summary)
    assert not re.search(r"\bnan\b", page, re.IGNORECASE)
    assert "nan" not in table(summary)


def test_page_is_self_contained(summary: dict[str, Any]) -> None:
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


def test_adversarial_text_stays_text_everywhere(summary: dict[str, Any]) -> None:
    evil = json.loads(
        json.dumps(summary)
        .replace("held-out words", "HERE")
        .replace("weapon", "HERE")
        .replace("random", "HERE")
    )
    evil = json.loads(json.dumps(evil).replace("HERE", json.dumps(SCRIPT)[1:-1]))
    evil.update(
        alarm=SCRIPT,
        status=SCRIPT,
        model={"name": SCRIPT, SCRIPT: SCRIPT},
        calibration={SCRIPT: _rate(1, 2)},
    )
    evil["rounds"][1].update(note=SCRIPT, round=SCRIPT, sampled=SCRIPT)
    evil["rounds"][1]["unsafe"][SCRIPT] = _rate(1, 2)
    evil["rounds"][1]["test"] = {"p": 0.1, "fixed": SCRIPT, "broken": SCRIPT}
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


def test_direction_and_control_characters_cannot_disguise_text(summary: dict[str, Any]) -> None:
    page = build(summary, [_item(prompt="safe \u202eelddik\u0000\ud800" + "x" * 10_000)])
    assert not set("\u202e\u0000\ud800") & set(page)
    assert "x" * 401 not in page
    summary["rounds"][1]["note"] = "one\n\x1b[31mred"
    assert "\x1b" not in table(summary)
    assert len([line for line in table(summary).splitlines() if line.startswith("round ")]) == 3


def test_flagged_pictures_leave_only_their_blocks(summary: dict[str, Any]) -> None:
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


def test_page_stays_below_five_megabytes(summary: dict[str, Any]) -> None:
    noise = [_item(seed, side=128) for seed in range(4)] * 40
    page = build(summary, noise, reveal=True)
    assert len(page.encode()) <= MAX_BYTES
    cards = page.count('class="card"')
    assert f"{160 - cards} more did not fit" in page
    assert cards >= 60


def test_unusable_picture_is_refused(summary: dict[str, Any]) -> None:
    grey = np.zeros((8, 8), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\]"):
        build(summary, [GalleryItem("a", "benign", (), grey, grey)])


def test_summary_is_left_untouched(summary: dict[str, Any]) -> None:
    before = copy.deepcopy(summary)
    build(summary, [_item()])
    table(summary)
    assert summary == before
