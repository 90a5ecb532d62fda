"""The benchmark runs as its docstring says, and the README's figures are the committed ones."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_benchmark_runs_on_a_random_model(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [
        "--models",
        "janus-tiny",
        "--parts",
        "sampler",
        "--batches",
        "3",
        "--repeats",
        "1",
        "--threads",
        "1",
    ]
    subprocess.run(
        [sys.executable, "jobs/benchmark.py", *command, "--out", str(out)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    found = json.loads(out.read_text())["janus-tiny"]["sampler"]
    assert found["hardware"]["machine"]
    row = found["1 threads"]["batches"]["3"]
    assert row["greedy_tokens_equal"] == 1
    assert row["ours_images_per_s"] > 0


def test_the_readme_has_the_committed_figures() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    figures = json.loads((ROOT / "tests" / "results" / "benchmark.json").read_text())["pictogram"]
    for row in figures["sampler"]["1 threads"]["batches"].values():
        assert row["greedy_tokens_equal"] == 1
    until = figures["guidance"]["1 threads"]
    assert f"without guidance: {until['0.5'] / until['1.0']:.1f} times as fast" in readme
    picture = runpy.run_path(str(ROOT / "jobs" / "benchmark_picture.py"))
    assert picture["table"](figures) in readme
    slower = json.loads((ROOT / "tests" / "results" / "benchmark-avx2.json").read_text())[
        "pictogram"
    ]["sampler"]
    *times, last = (f"{row['times_stock']:.1f}" for row in slower["1 threads"]["batches"].values())
    assert f"{', '.join(times)} and {last} times as fast as stock" in readme
    for name in ("edited", "edited and fine-tuned"):
        deciding, more = (
            f"{figures['rounds'][name][f'{part}_share']:.0%}" for part in ("deciding", "going_on")
        )
        assert f" {deciding}" in readme
        assert f" {more}" in readme
    assert (
        picture["costs"](json.loads((ROOT / "tests" / "results" / "demo-avx2.json").read_text()))
        in readme
    )
