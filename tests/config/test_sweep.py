"""Is a sweep read strictly, and are its trials' settings, front and table right?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from isic_ray.config.run import load_config
from isic_ray.config.sweep import SWEEPS, Between, Choice, SweepConfig, load_sweep
from isic_ray.errors import UserError
from isic_ray.report.sweep import mark_front, pareto_svg, sweep_table

GOOD = "config: demo\nspace: {edit.rank: [1, 2], edit.strength: {low: 0.5, high: 1.0}}\n"


def read(tmp_path: Path, text: str) -> SweepConfig:
    (tmp_path / "sweep.yaml").write_text(text)
    return load_sweep(tmp_path / "sweep.yaml")


@pytest.mark.parametrize("name", sorted(path.stem for path in SWEEPS.glob("*.yaml")))
def test_every_shipped_sweep_parses_and_starts_from_its_recipe(name: str) -> None:
    sweep = load_sweep(name)
    assert sweep.config_at(sweep.first_point()) == sweep.start_config()
    assert sweep.start_config().loop.arms == []


def test_the_starting_value_is_always_in_the_space(tmp_path: Path) -> None:
    sweep = read(
        tmp_path,
        "config: demo\nspace: {edit.smoothing: [7.0, 8.0], edit.strength: {low: 0.1, high: 0.2}}\n",
    )
    start = sweep.start_config().edit
    assert sweep.domain("edit.smoothing") == Choice((7.0, 8.0, start.smoothing))
    assert sweep.domain("edit.strength") == Between(0.1, start.strength)


def test_a_point_becomes_a_configuration_with_three_digits(tmp_path: Path) -> None:
    config = read(tmp_path, GOOD).config_at({"edit.rank": 1, "edit.strength": 0.123456})
    assert (config.edit.rank, config.edit.strength) == (1, 0.123)


def test_what_makes_trials_cheap_is_not_in_the_chosen_settings(tmp_path: Path) -> None:
    sweep = read(tmp_path, GOOD + "cheap: [finetune.steps=7]\n")
    assert sweep.trial_config({"edit.rank": 1}).finetune.steps == 7
    assert sweep.config_at({"edit.rank": 1}) == replace(
        sweep.trial_config({"edit.rank": 1}), finetune=sweep.start_config().finetune
    )


def test_the_shared_run_has_the_lowest_threshold(tmp_path: Path) -> None:
    sweep = read(tmp_path, "config: demo\nspace: {judge.threshold: [0.3, 0.5, 0.7]}\n")
    assert sweep.shared_config().judge.threshold == 0.3
    assert sweep.start_config().judge.threshold == 0.5


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (GOOD + "trails: 3\n", "unknown key trails; did you mean trials"),
        ("config: demo\n", "space is missing"),
        ("config: demo\nspace: {sampling.seed: [0, 1]}\n", "would change what is drawn"),
        ("config: demo\nspace: {edit.rang: [0, 1]}\n", "edit.rank"),
        ("config: demo\nspace: {edit.rank: [1, 2, -3]}\n", "edit.rank is -3"),
        (
            "config: demo\nspace: {loop.backoff: {low: 0.1, high: 0.9, log: true}}\n",
            "cannot hold 0",
        ),
        ("config: demo\nspace: {edit.strength: {low: 1, high: 0.5}}\n", "low below high"),
        (
            "config: demo\nspace: {finetune.regulariser: {low: 0, high: 1, log: true}}\n",
            "above 0 with log",
        ),
        ("config: demo\nspace: {edit.rank: []}\n", "a list of values"),
        (
            "config: demo\nspace: {finetune.workers: [1, 2]}\n",
            "space.finetune.workers cannot be searched",
        ),
        (GOOD + "cheap: [edit.rank=2]\n", "edit.rank=2 does not fit"),
        (GOOD + "cheap: [prompts.limit=2]\n", "prompts.limit=2 does not fit"),
        (GOOD + "cheap: [finetune.steps=-2]\n", "finetune.steps is -2"),
        (GOOD + "search: grid\n", "one of random, asha, optuna"),
        (GOOD + "trials: 0\n", "1 or more"),
        (GOOD.replace("demo", "damo"), "neither a file nor a recipe"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, text)
    assert complaint in str(caught.value)


def test_an_unknown_sweep_names_the_shipped_ones() -> None:
    with pytest.raises(UserError, match=r"shipped \(demo"):
        load_sweep("damo")


def trial(number: int, unsafe: float, benign: float) -> dict[str, Any]:
    figures = {"unsafe": unsafe, "benign": benign, "audit_unsafe": unsafe, "rounds": 1}
    return {"number": number, "point": {"edit.rank": number}, "status": "ended", **figures}


FAILED = {"number": 9, "point": {"edit.rank": 9}, "status": "failed", "error": "no <memory> left"}


def test_the_front_holds_what_nothing_beats() -> None:
    trials = [
        trial(0, 0.5, 0.9),
        trial(1, 0.2, 0.8),
        trial(2, 0.3, 0.7),
        trial(3, 0.5, 0.85),
        trial(4, 0.2, 0.8),
        FAILED,
    ]
    assert [t["number"] for t in mark_front(trials) if t["pareto"]] == [0, 1, 4]


def test_table_and_plot_show_failures_and_the_choice() -> None:
    rate = {"rate": 0.5, "n": 10, "ci": [0.2, 0.8]}
    figures = {"unsafe": {"self": rate, "audit": rate}, "benign": {"self": rate}}
    result = {
        "trials": mark_front([trial(0, 0.5, 0.9), trial(1, 0.2, 0.8), FAILED]),
        "cheap": ["finetune.steps=9"],
        "finals": [trial(1, 0.12, 0.88), trial(0, 0.34, 0.9)],
        "best": 1,
        "retest": {"before": figures, "start": figures, "best": figures},
    }
    lines = sweep_table(result).splitlines()
    assert lines[1].split()[:2] == ["1*", "20.0%"]
    assert "no <memory> left" in lines[3]
    assert "again without finetune.steps=9" in lines
    assert lines[lines.index("again without finetune.steps=9") + 1].split()[:2] == ["1*", "12.0%"]
    plot = pareto_svg(result)
    assert plot.count("<circle") == 1
    assert plot.count("<title>trial") == 2


def test_the_chosen_settings_can_be_run(tmp_path: Path) -> None:
    from isic_ray.config.describe import to_yaml

    chosen = load_sweep("demo").config_at({"edit.strength": 0.789, "loop.max_rounds": 2})
    (tmp_path / "best.yaml").write_text("# chosen\n" + to_yaml(chosen))
    assert load_config(tmp_path / "best.yaml") == chosen
