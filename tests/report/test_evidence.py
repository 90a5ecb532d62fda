"""Does the report show the evidence as it is, whole or in part, and the model card the run?"""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from isic_ray.config.run import EditConfig, JudgeConfig, RunConfig
from isic_ray.metrics.labels import LabelFigures, LabelledJudge
from isic_ray.metrics.statistics import (
    Agreement,
    Estimate,
    paired_difference,
    paired_improvement,
    wilson,
)
from isic_ray.metrics.summary import AUDIT, SELF, Arm, Figures, ModelName, Summary
from isic_ray.report.evidence import evidence_table, explanation_table, sections
from isic_ray.report.model_card import model_card
from isic_ray.report.page import build
from isic_ray.report.spot_check import human_table, sheet
from tests.report.summaries import figures, make_round, make_summary

SCRIPT = "<script>alert(1)</script>"


def _rate(k: int, n: int = 300) -> dict[str, Any]:
    return wilson(k, n).to_dict()


def _paired(k: int) -> dict[str, Any]:
    before, after = np.ones(300, dtype=bool), np.arange(300) < k
    return {
        "difference": paired_difference(before, after).to_dict(),
        "test": paired_improvement(before, after).to_dict(),
    }


def _figures(unsafe: int, exact: int) -> Figures:
    return figures(unsafe + 5, unsafe, exact, psnr=30.0, n=300)


def _against(unsafe: int, exact: int) -> dict[str, Any]:
    return {"unsafe": {"audit": _paired(unsafe)}, "benign": {"audit": _paired(exact)}}


def _arm(unsafe: int, exact: int) -> dict[str, Any]:
    return {**_figures(unsafe, exact).to_record(), "against": _against(unsafe, exact)}


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
                "against": _against(1, 1),
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
def summary() -> Summary:
    return make_summary(
        model=ModelName("pictogram", "janus", "3f9c0a"),
        rounds=(make_round(0, _figures(290, 280)), make_round(1, _figures(60, 270))),
        arms={"random": Arm("r", _figures(280, 270))},
    )


def test_page_and_console_quote_the_same_evidence(
    summary: Summary, evidence: dict[str, Any]
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
    summary: Summary, evidence: dict[str, Any], damage: object
) -> None:
    for path in _paths(evidence):
        if path[0] == "arms" and len(path) > 2 and path[2] != "against":
            continue  # the figures of an arm are whole: `Figures` wrote them
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


def test_text_in_the_evidence_stays_text(summary: Summary, evidence: dict[str, Any]) -> None:
    evidence["arms"][SCRIPT] = _arm(1, 2)
    evidence["challenges"][SCRIPT] = evidence["challenges"]["unseen words"]
    evidence["held_out_concepts"][SCRIPT] = evidence["held_out_concepts"]["gore"]
    evidence["alarm"] = SCRIPT
    page = build(summary, evidence=evidence, pictures=[(SCRIPT, np.zeros((4, 4, 3), np.uint8))])
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_a_part_that_was_not_measured_does_not_show(evidence: dict[str, Any]) -> None:
    assert [grid.title for grid in sections(evidence).grids] == [
        "Against no edit, on the same prompts",
        "On new prompts",
        "Concepts that built no edit",
        "Searching for unsafe pictures",
        "Undoing the edit",
        "Fidelity",
        "Benign kinds that can still be seen",
        "How far the self-judge can be trusted",
        "What the edit changed",
    ]
    for key in set(evidence) - {"codebook", "arms", "alarm"}:
        evidence[key] = {}
    found = sections(evidence)
    assert [grid.title for grid in found.grids] == ["Against no edit, on the same prompts"]
    assert found.pareto is not None
    assert explanation_table(evidence["explanation"]) == "nothing was changed\n"


def test_the_model_card_quotes_the_run(summary: Summary, evidence: dict[str, Any]) -> None:
    config = RunConfig(
        edit=EditConfig(method="transport"),
        judge=JudgeConfig(questions={"weapon": "a weapon?", "gore": "gore?"}),
    )
    card = model_card(summary, config, evidence)
    assert (
        "| unsafe pictures, auditor | 98.3% [96.2, 99.3], n = 300 | 21.7% [17.4, 26.7], n = 300 |"
        in card
    )
    assert "`transport`, round 1" in card
    assert "other words" in card
    assert "so that pictures of weapon, gore come out harmless" in card
    assert "Further evidence" not in model_card(summary, config)
    assert "**Alarm:** look" in model_card(replace(summary, alarm="look"), config)


def test_human_labels_as_text() -> None:
    errors = Agreement(wilson(9, 10), wilson(8, 10), Estimate(0.7, 20, (0.4, 1.0)))
    judge = LabelledJudge(wilson(9, 20), wilson(8, 20), errors)
    text = human_table({"after": LabelFigures(wilson(7, 20), {SELF: judge, AUDIT: judge})})
    assert "after the edit, people" in text
    assert "35.0%" in text
    assert "after the edit, self-judge" in text
    assert re.search(r"after the edit, auditor +45\.0% \[.*\] +40\.0% \[.*\] +90\.0% ", text)


def test_the_sheet_loads_nothing_and_tells_nothing() -> None:
    picture = np.zeros((4, 4, 3), np.uint8)
    page = sheet([("one", picture), (SCRIPT, picture)], "labels.csv", ["gore", SCRIPT])
    assert "default-src 'none'" in page
    assert "<h1>2 pictures to label</h1>" in page
    assert page.count('<img alt="" src="data:image/png;base64,') == 2
    assert "any of: gore, &lt;script&gt;" in page
    assert "<script" not in page
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\]"):
        sheet([("grey", picture[..., 0])], "labels.csv", ["gore"])
