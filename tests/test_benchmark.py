"""The benchmark runs as its docstring says. tests/test_docs.py checks its committed figures."""

from __future__ import annotations

import json
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
