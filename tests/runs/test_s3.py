"""The store and a run on a real S3 server (Ceph's gateway), started here.

    pytest -m slow tests/runs/test_s3.py

Needs `apt-get install ceph-mon ceph-osd ceph-common radosgw`; skipped without.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest

from isic_ray.errors import UserError
from isic_ray.runs.run import Run
from isic_ray.runs.schema import Verdict
from isic_ray.runs.store import Conflict, Store

BINARIES = ("ceph-mon", "ceph-osd", "ceph", "radosgw", "radosgw-admin", "curl")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(shutil.which, BINARIES)), reason=f"needs {', '.join(BINARIES)}"),
]
ROWS = [Verdict(f"p{n}", "c", "self", ("weapon",), (n / 8,)) for n in range(8)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, port = tmp_path_factory.mktemp("ceph") / "data", free_port()
    script = Path(__file__).with_name("ceph_rgw.sh")
    subprocess.run(
        ["bash", str(script), str(folder), str(port), str(free_port())], check=True, timeout=120
    )
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "testkey",
        "AWS_SECRET_ACCESS_KEY": "testsecret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        import s3fs

        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("isic-test")
        yield "s3://isic-test"
    for pid in (folder / "run").glob("*.pid.sh"):
        os.kill(int(pid.read_text()), signal.SIGKILL)


@pytest.fixture
def uri(bucket: str) -> str:
    return f"{bucket}/{uuid4().hex}/run"


def test_objects(uri: str) -> None:
    store = Store.open(uri)
    assert store.list("a") == []
    assert not store.exists("a/b")
    with pytest.raises(FileNotFoundError):
        store.get("a/b")
    assert store.put_if_absent("a/b", b"1") is True
    assert store.put_if_absent("a/b", b"1") is False
    with pytest.raises(Conflict):
        store.put_if_absent("a/b", b"2")
    store.put("a/c", b"")
    store.put("a/c", b"\0\xff")
    assert store.get("a/c") == b"\0\xff"
    store.put_if_absent("a/d/e=f+g@h,(i)?#%20*", b"odd but valid")
    assert store.list("a") == ["a/b", "a/c", "a/d/e=f+g@h,(i)?#%20*"]
    assert store.get("a/d/e=f+g@h,(i)?#%20*") == b"odd but valid"
    assert store.exists("a/b")
    assert not store.exists("a/d")
    store.delete("a/b")
    store.delete("a/b")
    assert not store.exists("a/b")
    assert pickle.loads(pickle.dumps(store)).get("a/c") == b"\0\xff"
    store.probe()


def test_large_objects_are_created_once_too(uri: str) -> None:
    """Above s3fs's multipart threshold, where Ceph would ignore the condition."""
    store = Store.open(uri)
    data = bytes(101 * 2**20)
    store.put_if_absent("big", data)
    with pytest.raises(Conflict):
        store.put_if_absent("big", b"\1" + data)
    assert store.get("big") == data


def test_one_winner_of_eight(uri: str) -> None:
    stores = [Store.open(uri) for _ in range(8)]  # eight connections
    for attempt in range(5):
        barrier = threading.Barrier(8)

        def race(n: int, key: str = f"k{attempt}", barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            try:
                return stores[n].put_if_absent(key, b"%d" % n * 1000)
            except Conflict:
                return False

        with ThreadPoolExecutor(8) as pool:
            wins = list(pool.map(race, range(8)))
        assert wins.count(True) == 1
        assert Store.open(uri).get(f"k{attempt}") == b"%d" % wins.index(True) * 1000


COMMIT = """
import sys
from isic_ray.runs.run import Run
from isic_ray.runs.schema import Verdict
run = Run.open(sys.argv[1])
rows = [Verdict(f"p{n}", "c", "self", ("weapon",), (n / 8,)) for n in range(int(sys.argv[2]) + 1)]
print(run.commit("verdicts", "0000", rows, Verdict, {"by": sys.argv[2]}).sha256)
"""


def test_racing_processes_agree_on_one_commit(uri: str) -> None:
    run = Run.create_or_resume(uri, {"fingerprint": "f", "config": {}})
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", COMMIT, uri, str(n)], stdout=subprocess.PIPE, text=True
        )
        for n in range(4)
    ]
    digests = {worker.communicate(timeout=120)[0].strip() for worker in workers}
    assert digests == {run.committed("verdicts")["0000"].sha256}
    assert run.verify() == []


def test_a_run(uri: str) -> None:
    run = Run.create_or_resume(uri, {"fingerprint": "f", "config": {"edit": {"rank": 2}}})
    for n in range(20):
        run.commit("verdicts", f"{n:04d}", ROWS, Verdict)
    run.put_blob("codebooks/abc", bytes(1000))
    run.commit_round(1, {"keep": True})
    run.write_summary({"schema": 1})
    again = Run.create_or_resume(uri, {"fingerprint": "f", "config": {}})
    assert again.read("verdicts", Verdict) == ROWS * 20
    assert again.pending("verdicts", ["0019", "0020"]) == ["0020"]
    assert again.verify() == []
    target = again.committed("verdicts")["0003"].object
    again.store.put(target, b"x" + again.store.get(target)[1:])
    assert [problem.split()[0] for problem in again.verify()] == [f"{uri}/{target}"]
    with pytest.raises(UserError, match=r"edit\.rank: 3 here, 2 in the run"):
        Run.create_or_resume(uri, {"fingerprint": "g", "config": {"edit": {"rank": 3}}})


def test_what_the_user_can_fix(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="is not a run"):
        Run.open(uri)
    for operation in (Run.open, lambda where: Run.create_or_resume(where, {"fingerprint": "f"})):
        with pytest.raises(UserError, match="there is no such bucket"):
            operation("s3://isic-test-missing/run")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(UserError, match="permission denied to read"):
            Run.open(uri)
        with pytest.raises(UserError, match=r"permission denied to (read|write)"):
            Store.open(uri).put_if_absent("k", b"")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
        pauses: list[float] = []
        with pytest.raises(UserError, match="check the network and AWS_ENDPOINT_URL"):
            Store(uri, sleep=pauses.append).get("k")
        assert len(pauses) == 9
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
        patch.setenv("AWS_CONFIG_FILE", "/nonexistent")
        with pytest.raises(UserError, match="no AWS credentials"):
            Store.open(uri).get("k")
