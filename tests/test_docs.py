"""README and docs: their figures are those of the committed results, and what they name exists."""

from __future__ import annotations

import argparse
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from isic_ray.cli.main import build_parser
from isic_ray.config.run import RECIPES
from isic_ray.metrics.summary import RESULTS_VERSION, Summary
from isic_ray.report.numbers import table
from isic_ray.report.sweep import pareto_svg

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RESULTS = ROOT / "tests" / "results"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
PROSE = " ".join(TEXT.split())  # a sentence may be broken between lines anywhere

FAULTS = {  # key in faults.json: how its row in the table begins
    "SIGKILL at every moment of storage operations": "SIGKILL at each of the {moments} moments",
    "SIGKILL of the driver in each stage": "SIGKILL of the driver",
    "SIGKILL of a worker in each stage": "SIGKILL of an actor",
    "loss of a Ray node in each stage": "loss of the Ray node",
    "a fifth of S3 requests spoiled": "{requests} requests to Ceph's S3 gateway",
    "S3 server killed for 20 s": "that S3 server killed for 20 s",
    "two drivers on one run on S3": "two drivers at once on S3",
}


def result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def interval(figure: dict[str, Any]) -> str:
    low, high = figure["ci"]
    return f"{figure['rate']:.1%} [{low:.1%}, {high:.1%}]"


# Figures


def test_the_demo_table_is_the_committed_result() -> None:
    summary = Summary.from_record(result("demo"), "demo.json")
    assert table(summary).strip() in PAGES[0].read_text(encoding="utf-8")


def test_the_demo_on_another_machine_is_the_committed_result() -> None:
    other = result("demo-avx2")
    unsafe = other["rounds"][other["best_round"]]["unsafe"]["audit"]
    assert f"the same command left {interval(unsafe)}" in PROSE


def test_the_embedded_models_figures_are_the_committed_ones() -> None:
    for name, figure in result("pictogram")["figures"].items():
        if "rate" in figure:
            assert f"{name}: {interval(figure)}" in PROSE


def test_the_evidence_quoted_is_the_committed_result() -> None:
    found = result("evidence")
    for name, arm in found["arms"].items():
        unsafe, benign = arm["unsafe"]["audit"], arm["benign"]["audit"]
        assert f"| {name} | {interval(unsafe)} | {interval(benign)} |" in PROSE
    assert f"it took {found['seconds'] / 60:.1f} minutes" in PROSE


def test_what_speaks_against_the_edit_is_the_committed_result() -> None:
    found = result("evidence")
    rewriting = found["arms"]["rewriting the prompt"]["unsafe"]["audit"]
    two = found["challenges"]["two unsafe objects"]["after"]["unsafe"]["audit"]
    concepts = found["held_out_concepts"].values()
    unseen = min(concept["never saw it"]["audit"]["rate"] for concept in concepts)
    words, seeds = (found["attacks"][kind]["audit"]["after"] for kind in ("words", "seeds"))
    seen = found["judges"]["after"]["calibration"]["audit"]["sensitivity"]
    recovered = found["recovery"]["after 40 steps"]["audit"]
    # README quotes two of them beside the pages.
    assert PROSE.count(f"on the embedded model it leaves {rewriting['rate']:.1%} unsafe") == 2
    assert f"the edit leaves {two['rate']:.1%} unsafe" in PROSE
    assert f"A concept that built no edit stays above {int(unseen * 100)}%" in PROSE
    assert f"an unsafe picture for {words['rate']:.1%} of {words['n']} prompts" in PROSE
    assert f"a search over seeds for {seeds['rate']:.1%}" in PROSE
    assert f"the self-judge sees {seen['rate']:.1%} of what the auditor still finds" in PROSE
    recovery = f"40 steps of fine-tuning the edited table bring back {recovered['rate']:.1%}"
    assert PROSE.count(recovery) == 2


@pytest.mark.parametrize("fault", FAULTS)
def test_the_table_of_faults_is_the_committed_result(fault: str) -> None:
    found = result("faults")["faults"][fault]
    injected = found.get("injected", found.get("killed", "–"))
    rows, again = f"{found['rows']:,}", found["shards_done_over"]
    cells = [injected, rows, found["lost"], found["duplicated"], again]
    label = f"| {FAULTS[fault].format(**found)}"
    row = next(line for line in TEXT.splitlines() if line.startswith(label))
    assert row.endswith(f"| {' | '.join(map(str, cells))} |")


def test_the_figures_of_scale_are_the_committed_ones() -> None:
    cluster, sweep, retrained = result("cluster"), result("sweep"), result("retrain")
    for row in cluster["weak_scaling"]:
        assert row["efficiency"] >= 0.95
        assert f"| {row['actors']} | {row['efficiency']:.1%} |" in PROSE
    assert f"Ray costs {cluster['overhead']['overhead']:.1%} over a plain loop" in PROSE
    assert f"takes {max(row['peak_driver_mib'] for row in cluster['memory'])} MiB" in PROSE
    assert f"tried {len(sweep['trials'])} settings in {sweep['seconds'] / 60:.1f} minutes" in PROSE
    for name in ("start", "best"):
        assert interval(sweep["retest"][name]["unsafe"]["audit"]) in PROSE
    picture = (RESULTS / "sweep.svg").read_text(encoding="utf-8")
    assert pareto_svg(sweep) == picture
    losses = list(retrained["one_worker"]["evaluation"].values())
    assert f"from {losses[0]:.4f} to {losses[-1]:.4f}" in PROSE
    trainings = ("one_worker", "two_workers", "one_of_two_killed")
    harmful = max(retrained[name]["largest_harmful_component"] for name in trainings)
    assert f"never reaches more than {harmful:.0e} into the harmful space" in PROSE
    for name in trainings[1:]:
        assert f"{retrained[name]['apart']:.1%}" in PROSE


def test_the_figures_of_speed_are_the_committed_ones() -> None:
    figures = result("benchmark")["pictogram"]
    for row in figures["sampler"]["1 threads"]["batches"].values():
        assert row["greedy_tokens_equal"] == 1
    until = figures["guidance"]["1 threads"]
    assert f"without guidance: {until['0.5'] / until['1.0']:.1f} times as fast" in PROSE
    picture = runpy.run_path(str(ROOT / "jobs" / "benchmark_picture.py"))
    assert picture["table"](figures) in TEXT
    slower = result("benchmark-avx2")["pictogram"]["sampler"]
    *times, last = (f"{row['times_stock']:.1f}" for row in slower["1 threads"]["batches"].values())
    assert f"{', '.join(times)} and {last} times as fast as stock" in PROSE
    for name in ("edited", "edited and fine-tuned"):
        parts = (figures["rounds"][name][f"{part}_share"] for part in ("deciding", "going_on"))
        deciding, more = (f"{share:.0%}" for share in parts)
        assert f" {deciding}" in PROSE
        assert f" {more}" in PROSE
    assert picture["costs"](result("demo-avx2")) in TEXT


# Names


def test_every_relative_link_resolves() -> None:
    for page in PAGES:
        links = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
        assert links or page.parent == DOCS
        for link in links:
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_job_test_and_recipe_named_exists() -> None:
    for job in re.findall(r"jobs/\w+\.py", TEXT):
        assert (ROOT / job).exists(), job
    for recipe in re.findall(r"--config ([^\s`]+)", TEXT.replace("--config FILE", "")):
        assert (RECIPES / f"{recipe}.yaml").exists(), recipe
    for test in re.findall(r"\btest_\w+\.py", TEXT):
        assert any((ROOT / "tests").rglob(test)), test


def test_readme_and_docs_list_every_recipe() -> None:
    for page in (PAGES[0], DOCS / "families.md"):
        text = page.read_text(encoding="utf-8")
        assert all(re.search(rf"\b{path.stem}\b", text) for path in RECIPES.glob("*.yaml")), page


def test_every_command_and_flag_exists() -> None:
    top = subparsers(build_parser())
    assert set(re.findall(r"\bisic (\w+)", TEXT)) <= set(top)
    for command, rest in re.findall(r"(?:^|`)isic (\w+)([^`\n]*)", TEXT, flags=re.MULTILINE):
        parser = top[command]
        deeper = subparsers(parser)
        if deeper:
            parser = deeper[rest.split()[0]]
        known = {option for action in parser._actions for option in action.option_strings}
        assert set(re.findall(r"(?<!\S)--[\w-]+", rest)) <= known, (command, rest)


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= action.choices
    return found


def test_every_key_of_a_summary_is_explained() -> None:
    page = (DOCS / "runs.md").read_text(encoding="utf-8")
    keys = {**result("demo"), **result("demo")["rounds"][0]["benign"]}
    assert [key for key in keys if f"`{key}`" not in page] == []
    assert f"`summary.json`, schema {RESULTS_VERSION}" in page
    assert f"| `schema`, `status` | {RESULTS_VERSION};" in page


# Shape


def test_readme_is_a_screen_and_a_half() -> None:
    lines = PAGES[0].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 130
    assert [line for line in lines if len(line) > 120] == []


def test_the_page_of_settings_is_what_its_generator_writes() -> None:
    page = runpy.run_path(str(DOCS / "make_configuration.py"))["page"]()
    assert (DOCS / "configuration.md").read_text(encoding="utf-8") == page


def test_the_site_lists_exactly_the_pages() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = [page for entry in nav for page in entry.values()]
    assert sorted(listed) == [page.name for page in sorted(DOCS.glob("*.md"))]
