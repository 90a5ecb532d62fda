"""The README's figures are those of the committed result files, and what it names exists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from isic_ray.cli.main import build_parser
from isic_ray.config.run import RECIPES
from isic_ray.report.numbers import table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "tests" / "results"


def test_the_demo_table_is_the_committed_result() -> None:
    assert table(json.loads((RESULTS / "demo.json").read_text())).strip() in README


def test_the_demo_on_another_machine_is_the_committed_result() -> None:
    other = json.loads((RESULTS / "demo-avx2.json").read_text())
    unsafe = other["rounds"][other["best_round"]]["unsafe"]["audit"]
    assert (
        f"the same command left {unsafe['rate']:.1%} [{unsafe['ci'][0]:.1%}, {unsafe['ci'][1]:.1%}]"
        in README
    )


def test_the_embedded_models_figures_are_the_committed_ones() -> None:
    figures = json.loads((RESULTS / "pictogram.json").read_text())["figures"]
    for name, figure in figures.items():
        if "rate" in figure:
            low, high = figure["ci"]
            assert f"{name}: {figure['rate']:.1%} [{low:.1%}, {high:.1%}]" in README


def test_the_evidence_quoted_is_the_committed_result() -> None:
    found = json.loads((RESULTS / "evidence.json").read_text())

    def cell(figure: dict[str, Any]) -> str:
        return f"{figure['rate']:.1%} [{figure['ci'][0]:.1%}, {figure['ci'][1]:.1%}]"

    for name, arm in found["arms"].items():
        assert (
            f"| {name} | {cell(arm['unsafe']['audit'])} | {cell(arm['benign']['audit'])} |"
            in README
        )
    assert f"it took {found['seconds'] / 60:.1f} minutes" in README


def test_the_figures_of_scale_are_the_committed_ones() -> None:
    cluster, sweep, retrained = (
        json.loads((RESULTS / f"{name}.json").read_text())
        for name in ("cluster", "sweep", "retrain")
    )
    for row in cluster["weak_scaling"]:
        assert row["efficiency"] >= 0.95
        assert f"| {row['actors']} | {row['efficiency']:.1%} |" in README
    assert f"Ray costs {cluster['overhead']['overhead']:.1%} over a plain loop" in README
    assert f"takes {max(row['peak_driver_mib'] for row in cluster['memory'])} MiB" in README
    assert f"tried {len(sweep['trials'])} settings in {sweep['seconds'] / 60:.1f} minutes" in README
    for name in ("start", "best"):
        rate = sweep["retest"][name]["unsafe"]["audit"]
        assert f"{rate['rate']:.1%} [{rate['ci'][0]:.1%}, {rate['ci'][1]:.1%}]" in README
    losses = list(retrained["one_worker"]["evaluation"].values())
    assert f"from {losses[0]:.4f} to {losses[-1]:.4f}" in README
    for name in ("two_workers", "one_of_two_killed"):
        assert f"{retrained[name]['apart']:.1%}" in README


def test_everything_named_exists() -> None:
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
    for job in re.findall(r"jobs/\w+\.py", README):
        assert (ROOT / job).exists(), job
    for recipe in re.findall(r"--config (\S+)", README):
        assert (RECIPES / f"{recipe}.yaml").exists(), recipe
    commands = set(re.findall(r"`?isic (\w+)", README)) - {"_ray"}
    help_text = build_parser().format_help()
    assert all(command in help_text for command in commands), commands
