"""Do the commands that read a finished run say in a sentence why they cannot read one?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from isic_ray.cli import main as cli
from isic_ray.config.run import RunConfig
from isic_ray.runs.run import Run, fingerprint
from tests.report.summaries import make_summary

COMMANDS = [
    ["report", "RUN"],
    ["compare", "RUN", "RUN"],
    ["export", "--run", "RUN", "--to", "DIRECTORY"],
    ["explain", "RUN"],
    ["audit", "sample", "RUN", "--to", "DIRECTORY"],
    ["audit", "import", "RUN", "labels.csv"],
]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    config = RunConfig()
    record = {"config": asdict(config), "fingerprint": fingerprint(config), "plan": {}}
    return Run.create_or_resume(str(tmp_path / "run"), {**record, "model_digest": "0"})


def refusal(run: Run, argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line that a command ends with; nothing is printed or written beside it."""
    values = {"RUN": run.store.uri, "DIRECTORY": str(tmp_path / "new")}
    assert cli.main([values.get(word, word) for word in argv]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert not (tmp_path / "new").exists()
    return err


@pytest.mark.parametrize("argv", COMMANDS, ids=lambda argv: " ".join(argv[:2]))
def test_a_run_that_has_not_ended(
    run: Run, argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(run, argv, tmp_path, capsys) == (
        f"isic: the run at {run.store.uri} has not ended; "
        "give the same `isic run` command again to go on with it.\n"
    )


@pytest.mark.parametrize("argv", COMMANDS, ids=lambda argv: " ".join(argv[:2]))
def test_results_of_an_older_version(
    run: Run, argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.write_summary({**make_summary().to_record(), "schema": 1})
    assert refusal(run, argv, tmp_path, capsys) == (
        f"isic: {run.store.uri}/summary.json has results of version 1, but this isic_ray reads "
        "version 2; give the command that wrote this file once more: it writes the file again "
        "from what the run has stored.\n"
    )
