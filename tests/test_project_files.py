"""Are the files that a stranger expects there, and do they agree with pyproject and Makefile?"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
BIN = ".venv/bin"


def read_yaml(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    return found


def commands_of(target: str) -> list[str]:
    """Return the commands of a target of the Makefile, with the variable BIN filled in."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert recipe is not None
    return [line.strip().replace("$(BIN)", BIN) for line in recipe[1].splitlines()]


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "CITATION.cff"])
def test_it_is_there(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8").strip()


def test_the_license_is_the_one_that_pyproject_names() -> None:
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert PROJECT["project"]["license-files"] == ["LICENSE"]
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert re.search(r"Apache License\s+Version 2\.0, January 2004", text)
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_types_travel_with_the_package() -> None:
    assert (ROOT / "isic_ray" / "py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["isic_ray"]


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "isic_ray").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_ci_runs_on_every_python_that_pyproject_names() -> None:
    job = read_yaml(".github/workflows/ci.yml")["jobs"]["test"]
    pythons = job["strategy"]["matrix"]["python"]
    prefix = "Programming Language :: Python :: "
    assert [prefix + python for python in pythons] == PROJECT["project"]["classifiers"]
    assert PROJECT["project"]["requires-python"] == f">={pythons[0]}"
    assert PROJECT["tool"]["mypy"]["python_version"] == pythons[0]


def test_ci_runs_what_a_developer_runs() -> None:
    workflow = read_yaml(".github/workflows/ci.yml")
    runs = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    make = "make PYTHON=python${{ matrix.python }}"
    assert runs == [f"{make} check", f"{make} test"]
    assert workflow["permissions"] == {"contents": "read"}


def test_pre_commit_runs_what_make_check_runs() -> None:
    [local] = read_yaml(".pre-commit-config.yaml")["repos"]
    hooks = local["hooks"]
    assert [hook["entry"] for hook in hooks] == commands_of("check")
    assert {(hook["language"], hook["pass_filenames"]) for hook in hooks} == {("system", False)}


def test_one_version_everywhere() -> None:
    version = PROJECT["project"]["version"]
    assert read_yaml("CITATION.cff")["version"] == version
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
