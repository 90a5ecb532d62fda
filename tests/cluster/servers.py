"""Servers for the tests of this folder: an S3 server, and Ray heads with a job server, each on
ports of its own.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

CEPH = ("ceph-mon", "ceph-osd", "ceph", "radosgw", "radosgw-admin", "curl")
RAY = str(Path(sys.executable).with_name("ray"))
TOKEN = "0123456789abcdef0123456789abcdef"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def has_s3_server() -> bool:
    return all(map(shutil.which, CEPH))


@contextmanager
def s3_server(folder: Path, bucket: str) -> Iterator[dict[str, str]]:
    """A real S3 server with one bucket; yields the environment that reaches it."""
    port = free_port()
    script = Path(__file__).parents[1] / "runs" / "ceph_rgw.sh"
    subprocess.run(
        ["bash", str(script), str(folder), str(port), str(free_port())], check=True, timeout=120
    )
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "testkey",
        "AWS_SECRET_ACCESS_KEY": "testsecret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    code = f"import s3fs; s3fs.S3FileSystem().mkdir({bucket!r})"
    subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, check=True, timeout=60
    )
    try:
        yield environment
    finally:
        for pid in (folder / "run").glob("*.pid.sh"):
            os.kill(int(pid.read_text()), signal.SIGKILL)


@contextmanager
def ray_head(
    folder: Path, environment: dict[str, str], options: Sequence[str], port: int = 0
) -> Iterator[dict[str, str]]:
    """A Ray head with token authentication and a job server; yields the environment of its clients.

    It listens at ``port`` (0: a free one). ``folder`` must have a short path: Ray puts sockets
    there.
    """
    ports = {
        name: free_port() for name in ("port", "dashboard-port", "dashboard-agent-listen-port")
    }
    ports["port"] = port or ports["port"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    clean["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"  # jobs say `python`
    server = {
        **clean,
        **environment,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "OMP_NUM_THREADS": "1",
    }
    command = [RAY, "start", "--head", "--block", f"--temp-dir={folder}", "--disable-usage-stats"]
    command += [
        "--dashboard-host=127.0.0.1",
        *(f"--{name}={port}" for name, port in ports.items()),
        *options,
    ]
    head = subprocess.Popen(
        command, env=server, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    try:
        _wait_for(address, head)
        yield {**server, "RAY_ADDRESS": address, "GCS_ADDRESS": f"127.0.0.1:{ports['port']}"}
    finally:
        head.terminate()  # it stops the processes that it started, and no others
        head.wait(timeout=60)


def _wait_for(address: str, head: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 180
    while True:
        assert head.poll() is None, "the Ray head ended"
        assert time.monotonic() < deadline, "the job server does not answer"
        request = urllib.request.Request(
            f"{address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except OSError:
            time.sleep(1)
