"""Every job, submitted to a real job server, with all its data on a real S3 server: `pytest -m
slow tests/cluster`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from isic_ray.runs.run import Run
from isic_ray.runs.store import Store
from tests.cluster.servers import RAY, has_s3_server, ray_head, s3_server

ROOT = Path(__file__).parents[2]
SMALL = [
    "prompts.limit=24",
    "loop.max_rounds=1",
    "loop.arms=[]",
    "finetune.steps=2",
    "execution.shard_size=8",
]
SWEEP = """
config: demo
set:
- prompts.limit=24
- finetune.steps=2
- execution.shard_size=12
- execution.cpus_per_actor=0
- loop.max_rounds=1
trials: 2
space: {edit.strength: [1.0, 0.5]}
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_s3_server(), reason="needs Ceph's S3 server"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """Environment of a client that shares nothing with the cluster but the bucket."""
    folder = Path(tempfile.mkdtemp(prefix="ij-", dir="/tmp"))
    try:
        with (
            s3_server(folder / "s3", "jobs") as bucket,
            ray_head(folder / "ray", bucket, ["--num-cpus=2"]) as client,
            pytest.MonkeyPatch.context() as patch,
        ):
            for name, value in bucket.items():
                patch.setenv(name, value)
            yield client
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def submit(cluster: dict[str, str], name: str, *job: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "jobs" / "submit.py"), "--id", name, "--", *job]
    return subprocess.Popen(
        command, env=cluster, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(job: subprocess.Popen[str]) -> str:
    output, _ = job.communicate(timeout=900)
    assert job.returncode == 0, output
    return output


def stop(cluster: dict[str, str], name: str, job: subprocess.Popen[str]) -> None:
    subprocess.run(
        [RAY, "job", "stop", name], env=cluster, check=True, capture_output=True, timeout=120
    )
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 130, output
    assert "the same command goes on with it" in output


def wait_for(store: Store, folder: str, count: int, job: subprocess.Popen[str]) -> dict[str, bytes]:
    deadline = time.monotonic() + 600
    while len(keys := store.list(folder)) < count:
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.5)
    return {key: store.get(key) for key in keys}


def test_a_run_is_stopped_submitted_again_and_finished(cluster: dict[str, str]) -> None:
    uri, job = (
        "s3://jobs/run",
        ("jobs/run.py", "--config", "demo", "--out", "s3://jobs/run", "--set", *SMALL),
    )
    first = submit(cluster, "run", *job)
    kept = wait_for(Store.open(uri), "commits/tokens", 3, first)
    stop(cluster, "run", first)

    output = finish(submit(cluster, "run", *job))
    assert "report: s3://jobs/run/report/index.html" in output
    run = Run.open(uri)
    assert run.summary()["status"] == "complete"
    assert run.verify() == []
    assert {key: run.store.get(key) for key in kept} == kept

    assert "report:" in finish(submit(cluster, "run", *job))  # has succeeded: only its output again
    other = submit(cluster, "run", "jobs/run.py", "--config", "demo", "--out", "s3://jobs/other")
    assert "is another job" in other.communicate(timeout=120)[0]
    assert other.returncode == 2


def test_a_report_is_written_again(cluster: dict[str, str]) -> None:
    Store.open("s3://jobs/run").delete("report/index.html")
    finish(submit(cluster, "report", "jobs/report.py", "s3://jobs/run"))
    assert Store.open("s3://jobs/run").exists("report/index.html")


def test_a_bad_setting_fails_with_the_programs_exit_code(cluster: dict[str, str]) -> None:
    job = submit(
        cluster,
        "bad",
        "jobs/run.py",
        "--config",
        "demo",
        "--set",
        "edit.rang=2",
        "--out",
        "s3://jobs/bad",
    )
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 2, output
    assert "did you mean edit.rank" in output


def test_a_run_goes_on_from_what_generate_drew(cluster: dict[str, str]) -> None:
    Store.open("s3://jobs").put("small.yaml", yaml_of(SMALL).encode())
    options = ("--config", "s3://jobs/small.yaml", "--out", "s3://jobs/drawn")
    assert "pairs" in finish(submit(cluster, "generate", "jobs/generate.py", *options))
    tokens = Store.open("s3://jobs/drawn").list("commits/tokens")
    finish(submit(cluster, "drawn", "jobs/run.py", *options))
    assert Store.open("s3://jobs/drawn").list("commits/tokens") == tokens


def test_a_sweep_is_stopped_and_goes_on(cluster: dict[str, str]) -> None:
    Store.open("s3://jobs").put("sweep.yaml", SWEEP.encode())
    job = ("jobs/sweep.py", "--config", "s3://jobs/sweep.yaml", "--out", "s3://jobs/sweep")
    first = submit(cluster, "sweep", *job)
    wait_for(Store.open("s3://jobs/sweep"), "trials", 1, first)
    stop(cluster, "sweep", first)
    finish(submit(cluster, "sweep", *job))
    result = json.loads(Store.open("s3://jobs/sweep").get("sweep.json"))
    assert [trial["status"] for trial in result["trials"]] == ["ended", "ended"]


def test_a_codebook_is_retrained_from_the_bucket(cluster: dict[str, str], tmp_path: Path) -> None:
    from tests.cluster.pictures import write_pictures

    write_pictures("s3://jobs/pictures", count=400, shard=100)
    settings = (
        "steps=8",
        "batch_size=32",
        "micro_batch=16",
        "save_every=2",
        "evaluate=32",
        "shuffle=64",
    )
    job = ("jobs/retrain_codebook.py", "--run", "s3://jobs/run", "--pictures", "s3://jobs/pictures")
    job = (*job, "--out", "s3://jobs/codebook", "--set", *settings)
    first = submit(cluster, "codebook", *job)
    wait_for(Store.open("s3://jobs/codebook"), "tensorboard", 1, first)
    stop(cluster, "codebook", first)
    assert "codebook: s3://jobs/codebook/codebooks/" in finish(submit(cluster, "codebook", *job))


def yaml_of(overrides: list[str]) -> str:
    from isic_ray.config.describe import to_yaml
    from isic_ray.config.run import load_config

    return to_yaml(load_config("demo", overrides))


def test_the_docstring_of_every_job_says_how_to_submit_it() -> None:
    for path in (ROOT / "jobs").glob("*.py"):
        text = path.read_text()
        if path.name in (
            "submit.py",
            "readme_picture.py",
            "benchmark_picture.py",
            "measure_pictogram.py",
        ):
            continue
        assert f"jobs/{path.name}" in text.split('"""')[1], path
        assert "ray job submit" in text.split('"""')[1], path
    assert os.access(ROOT / "jobs" / "submit.py", os.R_OK)
