"""A secret in the environment reaches workers by their machine's environment only; nothing we
write holds it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from isic_ray.cli.main import main
from isic_ray.execution.session import LOCATION, _location_settings
from isic_ray.models.base import ModelSpec
from tests.faults.inline import Remembering, drive

CANARY = "canary-0b51d9e4-do-not-store"
SECRETS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "RAY_AUTH_TOKEN",
)


@pytest.fixture(autouse=True)
def canary(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, CANARY)


def test_no_artifact_log_or_report_holds_it(
    tmp_path: Path, facts: ModelSpec, remembering: Remembering, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    drive(str(out), facts)
    for command in (
        ["report", str(out)],
        ["status", str(out)],
        ["verify", str(out)],
        ["gc", str(out)],
    ):
        assert main(command) == 0
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) > 30
    assert out / "report" / "index.html" in files
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    shown = capfd.readouterr()
    assert CANARY not in shown.out + shown.err


def test_only_the_stores_place_goes_into_a_runtime_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    for name in LOCATION:
        monkeypatch.setenv(name, "http://s3.example")
    assert _location_settings() == dict.fromkeys(LOCATION, "http://s3.example")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:{CANARY}@s3.example")
    assert "AWS_ENDPOINT_URL" not in _location_settings()
