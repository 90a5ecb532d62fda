"""A real S3 server (Ceph's gateway) that can be killed and started again; its data outlive it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from tests.cluster.servers import free_port

BINARIES = ("ceph-mon", "ceph-osd", "ceph", "radosgw", "radosgw-admin", "curl")
needs_ceph = pytest.mark.skipif(
    not all(map(shutil.which, BINARIES)), reason=f"needs {', '.join(BINARIES)}"
)


class Ceph:
    """Under ``folder``, with the given secret; ``port`` is where the gateway answers."""

    def __init__(self, folder: Path, key: str = "testkey", secret: str = "testsecret") -> None:
        self.folder, self.port, self.key, self.secret = folder, free_port(), key, secret
        script = Path(__file__).parents[1] / "runs" / "ceph_rgw.sh"
        environment = {**os.environ, "S3_ACCESS": key, "S3_SECRET": secret}
        command = ["bash", str(script), str(folder), str(self.port), str(free_port())]
        subprocess.run(command, check=True, timeout=300, env=environment, stdout=subprocess.DEVNULL)
        self._gateway: subprocess.Popen[bytes] | None = None

    def environment(self, port: int = 0) -> dict[str, str]:
        """What clients need; ``port`` is a proxy's."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port or self.port}",
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def kill_gateway(self) -> None:
        os.kill(int((self.folder / "run" / "rgw.pid.sh").read_text()), signal.SIGKILL)

    def start_gateway(self) -> None:
        command = ["radosgw", "-c", str(self.folder / "ceph.conf"), "-n", "client.admin", "-f"]
        with (self.folder / "log" / "again.out").open("wb") as log:
            self._gateway = subprocess.Popen(command, stdout=log, stderr=log)
        (self.folder / "run" / "rgw.pid.sh").write_text(str(self._gateway.pid))
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=5).close()
                return
            except OSError:
                time.sleep(0.1)
        raise TimeoutError("the gateway does not answer")

    def stop(self) -> None:
        for pid in (self.folder / "run").glob("*.pid.sh"):
            try:
                os.kill(int(pid.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                continue
        if self._gateway:
            self._gateway.wait(timeout=30)
