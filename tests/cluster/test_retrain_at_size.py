"""Retraining on 20,000 pictures in a bucket, about 15 minutes on two cores:

    pytest -m slow tests/cluster/test_retrain_at_size.py --figures tests/results/retrain.json

One worker, two workers, and two of which one is killed in the middle of an epoch.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isic_ray.config.retrain import retrain_config
from isic_ray.execution.pictures import find_pictures
from isic_ray.execution.retrain_log import RetrainLog
from isic_ray.execution.retraining import HARMLESS
from isic_ray.runs.store import Store
from isic_ray.workflows.loop import run_isic
from isic_ray.workflows.retrain import retrain
from tests.cluster.pictures import write_pictures
from tests.cluster.servers import has_s3_server, s3_server
from tests.cluster.worker_loss import one_worker_killed
from tests.small_run import SMALL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_s3_server(), reason="needs Ceph's S3 server"),
]

COUNT, SHARD = 20_000, 200
STEPS, SAVE_EVERY = 300, 50
SETTINGS = [
    f"steps={STEPS}",
    f"save_every={SAVE_EVERY}",
    "batch_size=64",
    "micro_batch=16",
    "learning_rate=0.01",
]
# steps that are averaged before curves are compared: each worker count has batches of its own
WINDOW = 50
TOLERANCE = (
    0.03  # relative difference of such averages, and of the losses on the pictures set aside
)
BUCKET = "s3://retrain"

Curves = dict[str, Any]


@pytest.fixture(scope="module")
def bucket() -> Iterator[None]:
    """Pictures and a finished run in a real bucket, which this process reaches as any would."""
    folder = Path(tempfile.mkdtemp(prefix="ir-", dir="/tmp"))
    try:
        with s3_server(folder, "retrain") as environment, pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            write_pictures(f"{BUCKET}/pictures", COUNT, SHARD)
            run_isic(SMALL, f"{BUCKET}/run")
            yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def trained(name: str, *settings: str) -> Curves:
    """Retrains into the bucket; its record, its losses by step and its evaluations."""
    started = time.monotonic()
    config = retrain_config(f"{BUCKET}/run", f"{BUCKET}/pictures", [*SETTINGS, *settings])
    result = retrain(config, f"{BUCKET}/{name}")
    rows = RetrainLog.read(Store.open(f"{BUCKET}/{name}"))
    losses = [row for row in rows if "loss" in row]
    assert [row["step"] for row in losses] == list(range(1, STEPS + 1))
    assert (
        max(row["harmful_component"] for row in rows)
        == result["largest_harmful_component"]
        < HARMLESS
    )
    assert result["after"]["evaluation_loss"] < result["before"]["evaluation_loss"]
    return {
        "seconds": round(time.monotonic() - started),
        "loss": np.array([row["loss"] for row in losses])
        .reshape(-1, WINDOW)
        .mean(1)
        .round(5)
        .tolist(),
        "evaluation": {
            row["step"]: round(row["evaluation_loss"], 5)
            for row in rows
            if "evaluation_loss" in row
        },
        "largest_harmful_component": result["largest_harmful_component"],
    }


def apart(one: Curves, other: Curves) -> float:
    """The largest relative difference between two trainings' curves."""
    pairs = [*zip(one["loss"], other["loss"], strict=True)]
    pairs += [(one["evaluation"][step], other["evaluation"][step]) for step in one["evaluation"]]
    return max(abs(a - b) / a for a, b in pairs)


def test_workers_and_their_loss_change_nothing_but_the_time(
    bucket: None, request: pytest.FixtureRequest
) -> None:
    alone = trained("alone", "workers=1")
    two = trained("two", "workers=2")
    store = Store.open(f"{BUCKET}/killed")
    with one_worker_killed(lambda: len(RetrainLog.read(store)) > STEPS // 3):
        killed = trained("killed", "workers=2")
    found = {
        "hardware": "2-core x86-64 VM (AMD EPYC), no GPU, pictures on Ceph's S3 server",
        "pictures": COUNT,
        "trained_on": SHARD * len(find_pictures(f"{BUCKET}/pictures").train),
        "settings": SETTINGS,
        "averaged_steps": WINDOW,
        "one_worker": alone,
        "two_workers": {**two, "apart": round(apart(alone, two), 4)},
        "one_of_two_killed": {**killed, "apart": round(apart(alone, killed), 4)},
    }
    print(json.dumps(found, indent=1))
    if path := request.config.getoption("--figures"):
        Path(path).write_text(json.dumps(found, indent=1) + "\n")
    assert apart(alone, two) < TOLERANCE
    assert apart(alone, killed) < TOLERANCE
