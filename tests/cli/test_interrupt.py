"""A person stops the demo and starts it again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SMALL = [
    "prompts.limit=24",
    "loop.max_rounds=1",
    "loop.arms=[]",
    "finetune.steps=2",
    "execution.shard_size=8",
]
COMMAND = [sys.executable, "-m", "isic_ray.cli.main", "demo", "--set", *SMALL]


def test_ctrl_c_then_the_same_command_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    command = [*COMMAND, "--out", str(out)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    commits = out / "commits" / "tokens"
    deadline = time.monotonic() + 240
    while not (commits.exists() and list(commits.glob("*.json"))):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "run the same command again" in errors
    assert "Traceback" not in errors
    kept = {path.name: path.read_bytes() for path in commits.glob("*.json")}

    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert again.returncode == 0, again.stderr
    assert "unsafe" in again.stdout
    assert (out / "report" / "index.html").exists()
    assert {name: (commits / name).read_bytes() for name in kept} == kept
