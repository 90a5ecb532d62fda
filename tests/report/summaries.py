"""Summaries for tests, built from counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from isic_ray.metrics.statistics import PairedTest, agreement, wilson
from isic_ray.metrics.summary import (
    AUDIT,
    SELF,
    Arm,
    BenignFigures,
    Figures,
    ModelName,
    Rates,
    Round,
    Summary,
)


def figures(unsafe: int, said: int, exact: int, psnr: float | None = 28.5, n: int = 180) -> Figures:
    """Return figures of ``n`` pictures of either role.

    The auditor flags ``unsafe`` of the unsafe prompts' pictures, the self-judge ``said`` of them;
    ``exact`` benign pictures show what was asked.
    """

    def rates(audit: int, own: int, count: int) -> Rates:
        return {SELF: wilson(own, count), AUDIT: wilson(audit, count)}

    few = min(3, n)
    return Figures(
        unsafe=rates(unsafe, said, n),
        benign=BenignFigures({AUDIT: wilson(exact, n)}, rates(few, few, n), psnr),
        per_concept={"weapon": rates(unsafe // 2, said // 2, n // 2)},
        per_group={"held-out words": {AUDIT: wilson(unsafe // 3, n // 3)}},
    )


def without_auditor(of: Figures) -> Figures:
    """Return the figures as they are when nobody but the model judges."""

    def own(rates: Rates) -> Rates:
        return {SELF: rates[SELF]} if SELF in rates else {}

    benign = of.benign
    return Figures(
        own(of.unsafe),
        BenignFigures({SELF: benign.exact[AUDIT]}, own(benign.flagged), benign.psnr),
        {name: own(rates) for name, rates in of.per_concept.items()},
        {name: own(rates) for name, rates in of.per_group.items()},
    )


def change_figures(of: Round, **changes: Any) -> Round:
    """Return a round with some of its figures replaced."""
    return replace(of, figures=replace(of.figures, **changes))


def make_round(number: int, found: Figures, **more: Any) -> Round:
    """Return a kept round."""
    shape: dict[str, Any] = {"kept": True, "pairs": 40, "sampled": 390, "seconds": 97.2, **more}
    return Round(number, codebook=f"c{number}", figures=found, **shape)


def make_summary(unsafe: int = 51, **more: Any) -> Summary:
    """Return a summary of three rounds: the auditor flags ``unsafe`` of 180 after the best one."""
    test = PairedTest(180, 128, 1, 3e-30)
    note = "benign loss too high"
    shape: dict[str, Any] = {
        "status": "complete",
        "model": ModelName("pictogram", "janus", "sha256:3f9c0a"),
        "fingerprint": "325026e1022d7652",
        "judge_threshold": 0.5,
        "rounds": (
            make_round(0, figures(178, 177, 170, psnr=99.0)),
            make_round(1, figures(unsafe, 25, 165), test=test, tried="c1", strength=1.0),
            make_round(2, figures(49, 21, 140), kept=False, note=note, tried="c2"),
        ),
        "best_round": 1,
        "safe_codebook": "codebooks/c1.safetensors",
        "arms": {
            "random": Arm("r", figures(165, 166, 168)),
            "paper": Arm("p", figures(115, 113, 110)),
        },
        "calibration": {AUDIT: agreement([True, True, False], [True, False, False])},
        **more,
    }
    return Summary(**shape)


def of_round_zero(**more: Any) -> Summary:
    """Return a summary of a run that kept no edit and compared no arms."""
    first = make_summary().first
    return make_summary(rounds=(first,), best_round=0, arms={}, **more)
