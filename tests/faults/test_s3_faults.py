"""A run on a real S3 server, through a proxy that spoils a fifth of the requests, and with the
server killed.

Needs `apt-get install ceph-mon ceph-osd ceph-common radosgw`; skipped without.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from isic_ray.models.base import ModelSpec
from isic_ray.runs.run import Run
from isic_ray.runs.shards import TOKENS
from isic_ray.workflows.worker import ShardWorker
from tests.faults.ceph import Ceph, needs_ceph
from tests.faults.inline import Remembering, drive
from tests.faults.proxy import FaultyProxy
from tests.faults.small import account, essence

pytestmark = [pytest.mark.slow, needs_ceph]
CANARY = "canary-7f3a91c2-do-not-store"


@pytest.fixture(scope="module")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ceph]:
    server = Ceph(tmp_path_factory.mktemp("ceph") / "data", secret=CANARY)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        import s3fs

        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("faults")
    yield server
    server.stop()


@pytest.fixture
def direct(ceph: Ceph, monkeypatch: pytest.MonkeyPatch) -> Ceph:
    for name, value in ceph.environment().items():
        monkeypatch.setenv(name, value)
    return ceph


def check(uri: str, finished: Path) -> dict[str, Any]:
    """The run on S3 is the one on disk, whole, and nothing of it was done twice. Returns its
    account.
    """
    run = Run.open(uri)
    assert essence(run) == essence(Run.open(str(finished)))
    assert run.verify() == []
    found = account(run, Run.open(str(finished)))
    assert (found["lost"], found["duplicated"], found["shards_done_over"]) == (0, 0, 0)
    return found


def test_a_proxy_that_spoils_a_fifth_of_the_requests(
    direct: Ceph,
    finished: Path,
    facts: ModelSpec,
    monkeypatch: pytest.MonkeyPatch,
    figures: Callable[..., None],
) -> None:
    proxy = FaultyProxy(direct.port)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        drive("s3://faults/proxied", facts)
    proxy.stop()
    assert proxy.faults >= 0.1 * proxy.counts["requests"]
    assert set(proxy.counts) > {"503", "reset", "lost reply", "torn reply", "slow"}
    found = check("s3://faults/proxied", finished)
    figures(
        "a fifth of S3 requests spoiled", {"injected": proxy.faults, **dict(proxy.counts), **found}
    )


def test_the_server_is_killed_for_20_seconds(
    direct: Ceph,
    finished: Path,
    facts: ModelSpec,
    monkeypatch: pytest.MonkeyPatch,
    figures: Callable[..., None],
) -> None:
    uri, killed = "s3://faults/killed", threading.Event()

    def outage() -> None:
        direct.kill_gateway()
        time.sleep(20)
        direct.start_gateway()

    def draw(worker: ShardWorker, name: str) -> dict[str, object]:
        if worker.run.committed(TOKENS) and not killed.is_set():
            killed.set()
            thread.start()
        return undisturbed(worker, name)

    thread, undisturbed = threading.Thread(target=outage), ShardWorker.draw
    with monkeypatch.context() as patch:
        patch.setattr(ShardWorker, "draw", draw)
        drive(uri, facts)
    thread.join()
    assert killed.is_set()
    figures("S3 server killed for 20 s", {"injected": 1, **check(uri, finished)})


def test_two_drivers_on_one_run(
    direct: Ceph,
    finished: Path,
    facts: ModelSpec,
    remembering: Remembering,
    figures: Callable[..., None],
) -> None:
    uri, failures = "s3://faults/raced", list[BaseException]()

    def race() -> None:
        try:
            drive(uri, facts)
        except BaseException as error:
            failures.append(error)

    drivers = [threading.Thread(target=race) for _ in range(2)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert failures == []
    run = Run.open(uri)
    assert essence(run) == essence(Run.open(str(finished)))
    assert run.verify() == []
    figures("two drivers on one run on S3", account(run, Run.open(str(finished))))


def test_the_secret_is_nowhere_in_the_bucket(
    direct: Ceph, facts: ModelSpec, remembering: Remembering, capfd: pytest.CaptureFixture[str]
) -> None:
    drive("s3://faults/secret", facts)
    run = Run.open("s3://faults/secret")
    keys = run.store.list("")
    assert len(keys) > 30
    assert [key for key in keys if CANARY.encode() in run.store.get(key)] == []
    shown = capfd.readouterr()
    assert CANARY not in shown.out + shown.err
