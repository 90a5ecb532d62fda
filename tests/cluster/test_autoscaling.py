"""The real autoscaler over fake nodes with a custom accelerator: `pytest -m slow
tests/cluster/test_autoscaling.py`.

A run starts without workers, grows to four, survives a machine that is killed in the middle, and
leaves none.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.util import get_node_ip_address

from isic_ray.runs.run import Run
from tests.cluster.servers import TOKEN, free_port, ray_head

pytestmark = pytest.mark.slow

ACCELERATOR = "fake_gpu"
COMMANDS = (
    "cluster_synced_files",
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
AUTOSCALING: dict[str, Any] = {
    "cluster_name": "fake",
    "max_workers": 4,
    "idle_timeout_minutes": 0.1,
    "upscaling_speed": 20,
    "provider": {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "disable_node_updaters": True,  # fake nodes start Ray by themselves
        "use_node_id_as_ip": True,  # they all have the address of this machine
    },
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
        "worker": {
            "resources": {"CPU": 1, ACCELERATOR: 1, "object_store_memory": 100_000_000},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 4,
        },
    },
    "head_node_type": "ray.head.default",
    "auth": {},
    "docker": {},
    "file_mounts": {},
    **{name: [] for name in COMMANDS},  # the autoscaler insists on them
}
SMALL = [
    "prompts.limit=300",
    "loop.max_rounds=0",
    "loop.arms=[]",
    "execution.shard_size=4",
    "execution.batch_size=4",
]
ELASTIC = [
    f"execution.accelerator={ACCELERATOR}",
    "execution.cpus_per_actor=0",
    "execution.threads_per_actor=1",
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    folder = Path(tempfile.mkdtemp(prefix="ia-", dir="/tmp"))
    port = free_port()
    provider = {**AUTOSCALING["provider"], "gcs_address": f"{get_node_ip_address()}:{port}"}
    (folder / "autoscaling.json").write_text(json.dumps({**AUTOSCALING, "provider": provider}))
    environment = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    options = ["--num-cpus=2", f"--autoscaling-config={folder / 'autoscaling.json'}"]
    try:
        with ray_head(folder / "ray", environment, options, port) as client:
            yield {**client, "FOLDER": str(folder / "ray")}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Watch(threading.Thread):
    """Counts the worker nodes that are alive, once a second; `largest` is the most there have
    been.
    """

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self.address, self.alive, self.largest, self.seen = address, 0, 0, [0]
        self.count()
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):  # the head's end is the watch's end
            while True:
                time.sleep(1)
                self.count()

    def count(self) -> None:
        request = urllib.request.Request(
            f"{self.address}/api/v0/nodes", headers={"Authorization": f"Bearer {TOKEN}"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            nodes: list[dict[str, Any]] = json.load(answer)["data"]["result"]["result"]
        self.alive = sum(node["state"] == "ALIVE" and not node["is_head_node"] for node in nodes)
        self.largest = max(self.largest, self.alive)
        if self.seen[-1] != self.alive:
            self.seen.append(self.alive)


def run(out: Path, environment: dict[str, str], *settings: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "isic_ray.cli.main",
        "run",
        "--config",
        "demo",
        "--out",
        str(out),
        "--set",
        *SMALL,
    ]
    return subprocess.Popen(
        [*command, *settings], env=environment, stderr=subprocess.PIPE, text=True
    )


def digests(out: Path) -> dict[str, str]:
    """What was drawn, judged and paired, by shard."""
    found = Run.open(str(out))
    stages = ["tokens", "pairs", *(path.name for path in (out / "commits").glob("verdicts-*"))]
    return {
        f"{stage}/{name}": commit.sha256
        for stage in stages
        for name, commit in found.committed(stage).items()
    }


def kill_a_node(folder: str) -> None:
    """SIGKILL to the raylet of one worker node, as a spot machine goes."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text()
        except OSError:
            continue
        if "raylet/raylet" in command and folder in command and f"{ACCELERATOR},1" in command:
            os.kill(int(process.name), signal.SIGKILL)
            return
    raise AssertionError("there is no worker node to kill")


def test_a_run_grows_from_none_to_four_survives_a_loss_and_leaves_none(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    alone = run(
        tmp_path / "alone",
        clean,
        "execution.address=local",
        "execution.max_actors=1",
        "execution.min_actors=1",
    )
    assert alone.wait(timeout=900) == 0, alone.stderr.read() if alone.stderr else ""

    watch = Watch(cluster["RAY_ADDRESS"])
    assert watch.alive == 0
    environment = {**cluster, "RAY_ADDRESS": cluster["GCS_ADDRESS"]}
    out = tmp_path / "elastic"
    elastic = run(
        out,
        environment,
        *ELASTIC,
        "execution.min_actors=1",
        "execution.max_actors=4",
        "execution.address=auto",
        "execution.keep_workers=false",
    )
    deadline = time.monotonic() + 180
    while watch.alive < 4 or not list((out / "commits").glob("tokens/*.json")):
        assert elastic.poll() is None, elastic.stderr.read() if elastic.stderr else ""
        assert time.monotonic() < deadline, watch.seen
        time.sleep(0.2)
    kill_a_node(cluster["FOLDER"])
    assert elastic.wait(timeout=900) == 0, elastic.stderr.read() if elastic.stderr else ""
    assert digests(out) == digests(tmp_path / "alone")

    deadline = time.monotonic() + 120
    while watch.alive:
        assert time.monotonic() < deadline, watch.seen
        time.sleep(1)
    print("worker nodes over time:", watch.seen)
    assert watch.largest == 4
