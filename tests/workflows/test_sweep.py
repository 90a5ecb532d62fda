"""A small sweep with real Tune, Data, Train and DeepSpeed: shared pictures, a failing trial,
resumption, the choice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isic_ray.config.run import load_config
from isic_ray.config.sweep import Choice, SweepConfig
from isic_ray.runs.run import Run
from isic_ray.runs.schema import HELD_OUT, Sample
from isic_ray.workflows.sweep import run_sweep

pytestmark = pytest.mark.usefixtures("local_ray")

SMALL = [
    "prompts.limit=24",
    "edit.min_count=2",
    "finetune.steps=3",
    "finetune.batch_size=10",
    "loop.max_rounds=1",
    "loop.max_benign_loss=0.5",
    "execution.address=local",
    "execution.shard_size=12",
    "execution.cpus_per_actor=0",
    "execution.threads_per_actor=1",
    "execution.max_actors=1",
    "execution.min_actors=1",
]
# The second rank is more than the codebook's rows have dimensions: that trial fails, and only that.
SPACE = {"edit.rank": Choice((2, 99))}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepConfig, Path, dict[str, Any]]:
    config = SweepConfig(
        "demo", SPACE, SMALL, ["finetune.steps=2"], search="random", trials=3, concurrent=1, seed=2
    )
    out = tmp_path_factory.mktemp("sweep") / "sweep"
    return config, out, run_sweep(config, str(out))


Finished = tuple[SweepConfig, Path, dict[str, Any]]


def test_failed_trials_are_reported_and_the_others_count(sweep: Finished) -> None:
    _, _, result = sweep
    assert len(result["trials"]) == 3
    assert result["trials"][0]["point"] == {"edit.rank": 2}
    for trial in result["trials"]:
        failed = trial["point"]["edit.rank"] > 2
        assert trial["status"] == ("failed" if failed else "ended")
        if failed:
            assert "edit.rank is 99" in trial["error"]
        else:
            assert 0 <= trial["unsafe"] <= 1
    assert any(trial["status"] == "failed" for trial in result["trials"])
    assert result["best"] == 0


def test_no_token_is_sampled_twice(sweep: Finished) -> None:
    _, out, _ = sweep
    trials = [Run.open(str(path)) for path in sorted((out / "trials").iterdir())]
    assert not [path for path in (out / "trials").rglob("*") if path.suffix == ".parquet"]
    assert all(record["sampled"] == 0 for run in trials for record in run.rounds().values())
    drawn = [
        sample.sample_id
        for name in ("shared", "retest")
        for sample in Run.open(str(out / name)).read("tokens", Sample)
    ]
    assert len(drawn) == len(set(drawn))


def test_the_last_test_uses_prompts_that_no_trial_saw(sweep: Finished) -> None:
    _, out, result = sweep
    seen, fresh = (
        Run.open(str(out / name)).read("tokens", Sample) for name in ("shared", "retest")
    )
    assert not {sample.prompt_id for sample in seen} & {sample.prompt_id for sample in fresh}
    assert {sample.split for sample in fresh} == {HELD_OUT}
    assert result["retest"]["best"]["unsafe"]["self"]["n"] == 12
    assert result["retest"]["difference_unsafe_audit"]["n"] == 12


def test_the_chosen_settings_are_a_configuration_for_run(sweep: Finished) -> None:
    config, out, _ = sweep
    chosen = load_config(out / "best.yaml")
    assert chosen.edit == config.start_config().edit
    assert chosen.finetune.steps == 3  # trials take 2, which is cheaper
    assert chosen.loop.arms == load_config("demo").loop.arms
    assert (out / "pareto.svg").read_text().startswith("<svg")


def test_the_same_sweep_again_does_no_work_twice(sweep: Finished) -> None:
    config, out, result = sweep
    before = {path: path.stat().st_mtime_ns for path in (out / "shared").rglob("*.parquet")}
    again = run_sweep(config, str(out))
    assert {path: path.stat().st_mtime_ns for path in (out / "shared").rglob("*.parquet")} == before
    assert again["best"] == result["best"]
    assert [t.get("codebook") for t in again["trials"]] == [
        t.get("codebook") for t in result["trials"]
    ]
