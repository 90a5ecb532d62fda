"""Does `isic` do what its help says, exit as promised, and speak in sentences?

The loop itself is not run here: the modules that load torch are replaced, and their signatures
compared by source.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from isic_ray.cli import main as cli
from isic_ray.config.run import RunConfig, load_config
from isic_ray.errors import UserError
from isic_ray.metrics.summary import Quarantined, Summary
from isic_ray.runs.run import Run, fingerprint
from isic_ray.runs.schema import Prompt
from tests.report.summaries import make_summary


class Fake:
    """Stands in for the loop, the report and the export, and remembers what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.summary = make_summary()
        self.error: BaseException | None = None
        for name, function in (
            ("isic_ray.workflows.loop", self.run_isic),
            ("isic_ray.report.write", self.write_report),
            ("isic_ray.workflows.export", self.export_run),
        ):
            module = ModuleType(name)
            setattr(module, function.__name__, function)
            monkeypatch.setitem(sys.modules, name, module)

    def run_isic(self, config: RunConfig, out: str, verbose: bool = False) -> Summary:
        self.calls.append((config, out, verbose))
        if self.error:
            raise self.error
        return self.summary

    def write_report(self, uri: str, reveal: bool = False, to: str | None = None) -> str:
        self.calls.append((uri, reveal, to))
        return to or f"{uri}/report/index.html"

    def export_run(self, uri: str, directory: str) -> str:
        self.calls.append((uri, directory))
        return directory


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(monkeypatch)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    config = RunConfig()
    record = {
        "config": dataclasses.asdict(config),
        "fingerprint": fingerprint(config),
        "plan": {},
        "model_digest": "0",
    }
    found = Run.create_or_resume(str(tmp_path / "run"), record)
    found.commit("prompts", "all", [Prompt("1", "a cup", "benign", "build")], Prompt)
    return found


def isic(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    try:
        code = cli.main(argv)
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_the_loop_and_the_report_are_called_as_they_are_defined() -> None:
    package = Path(cli.__file__).parents[1]
    for file, name, wanted in [
        ("workflows/loop.py", "run_isic", ["config", "out", "verbose"]),
        ("report/write.py", "write_report", ["uri", "reveal", "to"]),
        ("workflows/export.py", "export_run", ["uri", "directory"]),
    ]:
        tree = ast.parse((package / file).read_text(encoding="utf-8"))
        found = next(
            node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name
        )
        assert [argument.arg for argument in found.args.args][: len(wanted)] == wanted


def test_demo(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = isic(capsys, "demo")
    assert (code, err) == (0, "")
    assert out.endswith("report: runs/demo/report/index.html\n")
    assert "unsafe, auditor" in out
    assert fake.calls == [(load_config("demo"), "runs/demo", False), ("runs/demo", False, None)]


def test_run_with_settings(fake: Fake, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("edit: {rank: 1}")
    argv = [
        "--config",
        str(tmp_path / "mine.yaml"),
        "--set",
        "loop.max_rounds=1",
        "loop.arms=[]",
        "--set",
        "edit.rank=3",
    ]
    assert isic(capsys, "run", *argv, "--out", "s3://b/run", "--verbose")[0] == 0
    config, out, verbose = fake.calls[0]
    assert (config.edit.rank, config.loop.max_rounds, config.loop.arms) == (3, 1, [])
    assert (out, verbose) == ("s3://b/run", True)
    isic(capsys, "run", *argv)
    assert fake.calls[2][1] == "runs/mine"


def test_a_degraded_run_exits_1(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    lost = Quarantined(3, 0.03, {"ValueError: x": 3})
    fake.summary = replace(fake.summary, status="degraded", quarantined=lost)
    code, out, _ = isic(capsys, "demo")
    assert code == 1
    assert "3 rows (3.0% of the pictures) were set aside in runs/demo/quarantine" in out


def test_user_errors_are_one_line_without_traceback(
    fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.error = UserError("the bucket\nis gone.")
    assert isic(capsys, "demo") == (2, "", "isic: the bucket is gone.\n")
    fake.error = RuntimeError("RayTaskError")
    fake.error.cause = UserError("a worker found no model.")  # type: ignore[attr-defined]
    assert isic(capsys, "demo") == (2, "", "isic: a worker found no model.\n")
    fake.error = RuntimeError("TrainingFailedError")
    fake.error.worker_failures = {1: RuntimeError("RayTaskError")}  # type: ignore[attr-defined]
    failure: Any = fake.error.worker_failures[1]  # type: ignore[attr-defined]
    failure.cause = UserError("a worker found no tower.")
    assert isic(capsys, "demo") == (2, "", "isic: a worker found no tower.\n")
    fake.error = UserError("the file is no table.")
    fake.error.__cause__ = ValueError("column 3")
    assert isic(capsys, "demo") == (2, "", "isic: the file is no table.\n")


def test_bugs_keep_their_traceback(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["demo"])


def test_ctrl_c(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.error = KeyboardInterrupt()
    assert isic(capsys, "demo") == (
        130,
        "",
        "\nisic: stopped; run the same command again to go on\n",
    )


def test_a_closed_pipe_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def fileno(self) -> int:
            return file.fileno()

    with (tmp_path / "out").open("w") as file:
        monkeypatch.setattr(sys, "stdout", Closed())
        assert cli.main(["config"]) == 0


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["run"], "isic: the following arguments are required: --config; see isic run --help"),
        (["rnu"], "isic: argument COMMAND: invalid choice: 'rnu'"),
        (["demo", "--ou", "x"], "isic: unrecognized arguments: --ou x; see isic"),
        (["demo", "--set", "edit.rnak=1"], "did you mean edit.rank?"),
        (
            ["run", "--config", "none.yaml"],
            "isic: config 'none.yaml' is neither a file nor a recipe",
        ),
        (
            ["plan", "--config", "janus-pro-1b"],
            "isic: prompts.unsafe: path/to/unsafe.csv does not exist; ",
        ),
        (["prompts"], "isic: the following arguments are required: inspect"),
        (["report", "no/run"], "no/run is not a run"),
        (["verify", "no/run"], "no/run is not a run"),
        (["export", "--run", "no/run", "--to", "x"], "no/run is not a run"),
    ],
)
def test_bad_input_exits_2_with_one_line(
    argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = isic(capsys, *argv)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


def test_plan_counts_prompts_pictures_and_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = isic(
        capsys,
        "plan",
        "--config",
        "demo",
        "--set",
        "prompts.samples_per_prompt=2",
        "prompts.limit=100",
    )
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["model", "pictogram"]
    assert lines[3].split() == ["unsafe", "100", "100", "pictogram:unsafe"]
    assert "pictures   800 in 12 shards of at most 75" in out
    assert "at most 200 more" in out
    assert "tokens     28,800 to 36,000 (36 a picture)" in out


def test_plan_of_an_unknown_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,split\na,build\nb,held_out\nB,build\n")
    files = [f"prompts.{role}={tmp_path / 'p.csv'}" for role in ("unsafe", "benign")]
    code, out, _ = isic(capsys, "plan", "--config", "demo", "--set", "model.name=me/mine", *files)
    assert code == 0
    assert "tokens     not known before this model is loaded" in out
    assert "1 duplicates left out" in out


def test_report(fake: Fake, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert isic(capsys, "report", run.store.uri) == (0, f"{run.store.uri}/report/index.html\n", "")
    isic(capsys, "report", run.store.uri, "--reveal", "--out", "page.html")
    assert fake.calls[-1] == (run.store.uri, True, "page.html")


def test_verify_names_what_is_damaged(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert isic(capsys, "verify", run.store.uri) == (
        0,
        f"{run.store.uri}: every object is whole\n",
        "",
    )
    (key,) = run.store.list("data")
    run.store.put(key, b"x")
    code, out, _ = isic(capsys, "verify", run.store.uri)
    assert code == 1
    assert key in out
    assert out.endswith("1 found damaged or missing\n")
    run.store.put("run.json", b"{}")
    code, out, _ = isic(capsys, "verify", run.store.uri)
    assert code == 1
    assert "run.json is damaged" in out


def test_export(fake: Fake, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = isic(capsys, "export", "--run", run.store.uri, "--to", "safe")
    assert (code, fake.calls) == (0, [(run.store.uri, "safe")])
    assert out.startswith("safe: ")


def test_prompts_inspect(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("Sensitive Prompt,categories,seed\na,gore,1\nA,gore,2\nb,gore;hate,3\n")
    code, out, _ = isic(capsys, "prompts", "inspect", str(path))
    assert code == 0
    first, columns, splits, categories = out.splitlines()
    assert first == f"{path}: 3 rows, 2 distinct prompts, 1 duplicates"
    assert columns == "columns     Sensitive Prompt (text), categories (concepts), seed (not used)"
    assert splits.endswith("(by hash, no split column)")
    assert categories == "categories  gore 2, hate 1"
    assert (
        "build 400, held_out 300 (by scene)"
        in isic(capsys, "prompts", "inspect", "pictogram:unsafe")[1]
    )


def test_config_prints_what_can_be_given_back(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, _ = isic(capsys, "config", "--config", "janus-pro-7b", "--set", "edit.rank=1")
    assert code == 0
    (tmp_path / "mine.yaml").write_text(out)
    assert load_config(tmp_path / "mine.yaml") == load_config("janus-pro-7b", ["edit.rank=1"])


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert isic(capsys, "version")[1].startswith("isic-ray 0.")
    code, out, _ = isic(capsys, "--help")
    assert code == 0
    for command in (
        "demo",
        "run",
        "plan",
        "report",
        "verify",
        "export",
        "prompts",
        "config",
        "version",
    ):
        assert f"\n    {command} " in out
        assert isic(capsys, command, "--help")[0] == 0
    assert isic(capsys)[0] == 2
