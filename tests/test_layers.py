"""Do imports go one way (design, "The house"), and does `import isic_ray` stay light?"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "isic_ray"
HEAVY = {"ray", "torch", "transformers", "deepspeed"}
# The packages from the lowest floor to the highest: a module imports from its own package and from
# lower floors, so packages of one floor do not know each other.
FLOORS = [
    {"errors"},
    {"config", "runs"},
    {"codebook", "pictogram"},
    {"prompts", "metrics", "models"},
    {"judges", "report", "execution"},
    {"workflows"},
    {"cli"},
]
PACKAGES = set().union(*FLOORS[1:])


class Import(NamedTuple):
    target: str  # dotted module
    eager: bool  # at module level: runs whenever the module is imported
    typing: bool  # below `if TYPE_CHECKING`: never runs


@cache
def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(module: str) -> list[Import]:
    return list(_walk(ast.parse(modules()[module].read_text(encoding="utf-8")), True, False))


def _walk(node: ast.AST, eager: bool, typing: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, eager, typing) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative import"
            known, base = modules(), str(child.module)
            names = [f"{base}.{alias.name}" for alias in child.names]
            yield from (Import(name if name in known else base, eager, typing) for name in names)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _walk(ast.Module(child.body, []), eager, True)
            yield from _walk(ast.Module(child.orelse, []), eager, typing)
        else:
            yield from _walk(
                child, eager and not isinstance(child, ast.FunctionDef | ast.Lambda), typing
            )


def floor(module: str) -> int:
    name = module.split(".")[1]
    return next(index for index, names in enumerate(FLOORS) if name in names)


def allowed(module: str, target: str) -> bool:
    """Whether one module may import the other; the conformance suite may import anything."""
    package, other = module.split(".")[1], target.split(".")[1]
    return package in ("testing", other) or floor(target) < floor(module)


def running(module: str) -> list[Import]:
    return [found for found in imports(module) if not found.typing]


def outside(module: str) -> set[str]:
    return {found.target.split(".")[0] for found in running(module)} - {"isic_ray"}


def inside(*parts: str) -> list[str]:
    return [
        module for module in modules() if module.split(".")[1:2] and module.split(".")[1] in parts
    ]


def loaded_by(module: str) -> set[str]:
    """Every module that importing this one imports, packages above it included."""
    found, todo = set(), [module]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += [name.rpartition(".")[0]] if "." in name else []
            todo += (
                [each.target for each in running(name) if each.eager] if name in modules() else []
            )
    return found


def test_there_are_twelve_packages() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert rooms - {"__init__", "__pycache__", "errors", "testing"} == PACKAGES
    assert len(PACKAGES) == 12


def test_imports_go_down() -> None:
    wrong = [
        f"{module} imports {found.target}"
        for module in modules()
        for found in running(module)
        if "." in module and found.target.startswith("isic_ray.")
        if not allowed(module, found.target)
    ]
    assert wrong == []


def test_no_two_modules_need_each_other_to_load() -> None:
    graph = {
        module: {found.target for found in running(module) if found.eager} - {module}
        for module in modules()
    }
    TopologicalSorter(graph).prepare()


def test_only_execution_knows_ray_and_deepspeed() -> None:
    assert [module for module in modules() if {"ray", "deepspeed"} & outside(module)] == [
        module for module in inside("execution") if {"ray", "deepspeed"} & outside(module)
    ]


def test_the_method_stands_alone() -> None:
    for module in inside("codebook"):
        assert not outside(module) & {"ray", "transformers", "deepspeed"}, module
        typed_too = {found.target for found in imports(module)}
        assert not [name for name in typed_too if name.startswith("isic_ray.models")], module


@pytest.mark.parametrize(
    "module",
    [
        *(
            "config.run",
            "config.reading",
            "prompts.sets",
            "prompts.tables",
            "runs.schema",
            "runs.shards",
        ),
        *(
            "runs.store",
            "models.catalogue",
            "workflows.estimate",
            "runs.run",
            "metrics.statistics",
            "report.page",
        ),
    ],
)
def test_plain_modules_load_neither_ray_nor_torch(module: str) -> None:
    assert not loaded_by(f"isic_ray.{module}") & HEAVY
    assert not outside(f"isic_ray.{module}") & HEAVY


def test_processes_that_pass_units_on_load_little() -> None:
    assert not loaded_by("isic_ray.execution.pool") & (HEAVY | {"pyarrow", "pydantic", "numpy"})


def test_the_command_line_is_quick_to_load() -> None:
    modules = ["isic_ray.cli.main", *inside("commands")]
    eager = {found.target for module in modules for found in running(module) if found.eager}
    ours = {target for target in eager if target.startswith("isic_ray")}
    assert all(target.startswith(("isic_ray.cli", "isic_ray.errors")) for target in ours)
    assert {target.split(".")[0] for target in eager - ours} <= set(sys.stdlib_module_names)


def test_the_package_is_light_and_lazy() -> None:
    code = (
        "import sys, isic_ray, isic_ray.cli.main; isic_ray.RunConfig, isic_ray.load_config\n"
        "assert set(isic_ray.__all__) <= set(dir(isic_ray)) and isic_ray.__version__\n"
        f"sys.exit(' '.join({HEAVY!r} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_public_names_exist() -> None:
    import isic_ray

    for home, name in isic_ray._HOME.values():
        tree = ast.parse(modules()[home].read_text(encoding="utf-8"))
        bound = {
            node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef)
        }
        bound |= {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        assert name in bound, (home, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        isic_ray.nothing  # noqa: B018
