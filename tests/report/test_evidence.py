"""Does the report show the evidence as it is, whole or in part, and does the model card quote
the run?
"""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest

from isic_ray.metrics.statistics import paired_difference, paired_improvement, wilson
from isic_ray.report.charts import Arm, frontier, pareto
from isic_ray.report.evidence import evidence_table, human_table, sections
from isic_ray.report.model_card import model_card
from isic_ray.report.numbers import Shown
from isic_ray.report.page import build

SCRIPT = "<script>alert(1)</script>"


def _rate(k: int, n: int = 300) -> dict[str, Any]:
    return wilson(k, n).to_dict()


def _paired(k: int) -> dict[str, Any]:
    before, after = np.ones(300, dtype=bool), np.arange(300) < k
    return {
        "difference": paired_difference(before, after).to_dict(),
        "test": paired_improvement(before, after).to_dict(),
    }


def _arm(unsafe: int, exact: int) -> dict[str, Any]:
    return {
        "unsafe": {"self": _rate(unsafe), "audit": _rate(unsafe + 5)},
        "benign": {"audit": _rate(exact), "psnr": 30.0},
        "against": {"unsafe": {"audit": _paired(unsafe)}, "benign": {"audit": _paired(exact)}},
    }


@pytest.fixture
def evidence() -> dict[str, Any]:
    two = {
        "before": {"audit": {"cup": _rate(99, 100)}},
        "after": {"audit": {"cup": _rate(77, 100)}},
    }
    return {
        "codebook": "c",
        "arms": {
            "no edit": _arm(290, 280),
            "paper": _arm(90, 60),
            "negative prompt": _arm(270, 281),
            "this run": _arm(60, 270),
        },
        "challenges": {
            "unseen words": {
                "role": "unsafe",
                "before": _arm(290, 0),
                "after": _arm(75, 0),
                "against": _arm(1, 1)["against"],
            },
            "near-neighbours": {
                "role": "benign",
                "before": _arm(0, 271),
                "after": _arm(0, 262),
                "kinds": two,
            },
        },
        "held_out_concepts": {
            "gore": {
                "no edit": {"audit": _rate(99, 100)},
                "never saw it": {"audit": _rate(88, 100)},
                "saw it": {"audit": _rate(33, 100)},
            }
        },
        "attacks": {
            "words": {"audit": {"before": _rate(9, 32), "after": _rate(31, 32)}, "queries": 20.0}
        },
        "recovery": {"edited table": {"audit": _rate(60)}, "after 10 steps": {"audit": _rate(222)}},
        "quality": {"ssim": {"value": 0.9712, "n": 300, "ci": [0.9651, 0.9777]}},
        "judges": {
            "after": {
                "calibration": {
                    "audit": {"sensitivity": _rate(80, 100), "specificity": _rate(199, 200)}
                },
                "self_raw": _rate(60),
                "self_corrected": _rate(74),
                "audit": _rate(72),
            }
        },
        "explanation": {
            "rows": 1024,
            "distortion": {"changed": 143, "colliding": 25, "dead": 0},
            "usage": {"harmful": 0.359},
        },
        "plan": {"budget": {"rounds": 6, "proposals": 8}, "recovery_pictures": 64},
        "alarm": None,
    }


@pytest.fixture
def summary() -> dict[str, Any]:
    return {
        "status": "complete",
        "model": {"name": "pictogram", "digest": "3f9c0a"},
        "rounds": [{"round": 0, **_arm(290, 280)}, {"round": 1, **_arm(60, 270)}],
        "best_round": 1,
        "arms": {"random": _arm(280, 270)},
        "alarm": None,
    }


def test_page_and_console_quote_the_same_evidence(
    summary: dict[str, Any], evidence: dict[str, Any]
) -> None:
    page, text = build(summary, evidence=evidence), evidence_table(evidence)
    plain = re.sub(r"<[^>]+>|\s+", " ", page)
    for number in ("96.9%", "0.971", "[0.965, 0.978]", "35.9%", "143 of 1024", "-80.0 [-8"):
        assert number in plain, number
        assert number in text, number
    assert "at most 49 a prompt" in plain
    assert "other words" in text
    assert plain.index("negative prompt") < plain.index(
        "Round by round"
    )  # the first screen compares with it
    assert "random" not in plain[: plain.index("Round by round")]


def _paths(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = tree.items() if isinstance(tree, dict) else ()
    return [
        found for key, value in children for found in [(*path, key), *_paths(value, (*path, key))]
    ]


@pytest.mark.parametrize("damage", ["absent", None])
def test_any_missing_piece_is_tolerated(
    summary: dict[str, Any], evidence: dict[str, Any], damage: object
) -> None:
    for path in _paths(evidence):
        broken = copy.deepcopy(evidence)
        parent: Any = broken
        for key in path[:-1]:
            parent = parent[key]
        if damage == "absent":
            del parent[path[-1]]
        else:
            parent[path[-1]] = damage
        assert evidence_table(broken)
        sections(broken)
    assert build(summary, evidence={}).endswith("</html>")


def test_text_in_the_evidence_stays_text(summary: dict[str, Any], evidence: dict[str, Any]) -> None:
    evidence["arms"][SCRIPT] = _arm(1, 2)
    evidence["challenges"][SCRIPT] = evidence["challenges"]["unseen words"]
    evidence["held_out_concepts"][SCRIPT] = evidence["held_out_concepts"]["gore"]
    evidence["alarm"] = SCRIPT
    page = build(summary, evidence=evidence, pictures=[(SCRIPT, np.zeros((4, 4, 3), np.uint8))])
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def _shown(value: float) -> Shown:
    return Shown(value, 100, value - 0.02, value + 0.02)


def test_the_frontier_holds_what_no_arm_beats() -> None:
    best, worse = Arm("best", _shown(0.2), _shown(0.9)), Arm("worse", _shown(0.3), _shown(0.8))
    safest, same = Arm("safest", _shown(0.1), _shown(0.3)), Arm("same", _shown(0.2), _shown(0.9))
    assert [arm.label for arm in frontier([worse, best, safest, same])] == [
        "safest",
        "best",
        "same",
    ]


def test_numbers_of_crowded_arms_do_not_touch() -> None:
    chart = pareto("t", [Arm(str(i), _shown(0.9 + i / 200), _shown(0.97)) for i in range(12)])
    places = [
        (float(x), float(y))
        for x, y in re.findall(r'class="label" x="([\d.]+)" y="([\d.]+)"', chart)
    ]
    assert len(places) == 12
    for i, one in enumerate(places):
        for other in places[:i]:
            assert abs(one[0] - other[0]) >= 12 or abs(one[1] - other[1]) >= 12


def test_the_model_card_quotes_the_run(summary: dict[str, Any], evidence: dict[str, Any]) -> None:
    config = {"edit": {"method": "transport"}, "judge": {"questions": {"weapon": "…", "gore": "…"}}}
    card = model_card(summary, config, evidence)
    assert (
        "| unsafe pictures, auditor | 98.3% [96.2, 99.3], n = 300 | 21.7% [17.4, 26.7], n = 300 |"
        in card
    )
    assert "`transport`, round 1" in card
    assert "other words" in card
    assert "Further evidence" not in model_card(summary, config)


def test_human_labels_as_text() -> None:
    judge = {
        "raw": _rate(9, 20),
        "corrected": _rate(8, 20),
        "sensitivity": _rate(9, 10),
        "specificity": _rate(9, 10),
    }
    text = human_table({"after": {"human": _rate(7, 20), "judges": {"self": judge}}})
    assert "after the edit, people" in text
    assert "35.0%" in text
    assert "after the edit, self-judge" in text
