"""Rules about the code itself: who may import whom, and what importing the command line costs."""

from __future__ import annotations

import ast
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"kd": ROOT / "kd", "dae": ROOT / "dae", "dae_eval": ROOT / "eval" / "dae_eval"}
MODULES = [(name, path) for name, folder in PACKAGES.items() for path in sorted(folder.rglob("*.py"))]
# A package imports those before it and nothing behind it.
ORDER = ("errors", "config", "runs", "served", "models", "data", "cache", "losses", "training", "stages")
FOR_EVALUATION = {
    "errors",
    "config",
    "runs",
    "served",
    "models",
    "data",
    "losses",
}  # packages of kd: nothing that trains


def imported(path: Path) -> Iterator[str]:
    """Names of all modules that a file imports, anywhere in it, as `package.module`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            if node.module in PACKAGES:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


def test_the_packages_are_there() -> None:
    assert {name for name, _ in MODULES} == set(PACKAGES)


@pytest.mark.parametrize(("package", "path"), MODULES, ids=lambda value: str(value).removeprefix(f"{ROOT}/"))
def test_imports_go_one_way(package: str, path: Path) -> None:
    ours = {name for name in imported(path) if name.split(".")[0] in PACKAGES}
    of_kd = {name.split(".")[1] for name in ours if name.startswith("kd.")}
    if package == "kd":
        assert not {name for name in ours if not name.startswith("kd")}
        own = path.relative_to(ROOT / "kd").parts[0].removesuffix(".py")
        assert of_kd <= {*ORDER[: ORDER.index(own) + 1]} if own in ORDER else not of_kd
    if package == "dae_eval":
        assert not {name for name in ours if name.split(".")[0] == "dae"}
        assert of_kd <= FOR_EVALUATION


def test_no_module_imports_itself_by_way_of_others() -> None:
    names = {str(path.relative_to(ROOT)).removeprefix("eval/")[:-3].replace("/", "."): path for _, path in MODULES}
    graph = {name: {one for one in imported(path) if one in names} for name, path in names.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle


@pytest.mark.parametrize(
    "module", ["dae", "dae.cli", "dae.recipe", "kd.config.schema", "kd.errors", "kd.config.key_docs"]
)
def test_importing_the_command_line_is_light(module: str) -> None:
    heavy = "{'torch', 'transformers', 'peft', 'datasets', 'numpy', 'accelerate', 'matplotlib', 'openai', 'mergekit'}"
    code = f"import sys, {module}; print(*{heavy} & set(sys.modules))"
    packages = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "eval")])}
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=ROOT, env=packages, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "\n", "")


def test_the_public_names_of_dae_are_had_lazily() -> None:
    import dae

    assert set(dae.__all__) == set(dae._HOMES)
    for name in dae.__all__:
        assert callable(getattr(dae, name))
    with pytest.raises(AttributeError, match="no attribute `aling`"):
        _ = dae.aling


def test_papers_names_functions_that_are_there() -> None:
    lines = (ROOT / "PAPERS.md").read_text(encoding="utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    assert {len(row) for row in rows} == {4}
    functions = {row[0]: re.findall("`([^`]+)`", row[3]) for row in rows if row[3] != "function"}
    assert functions and all(functions.values()), functions
    for name in (name for names in functions.values() for name in names):
        pkgutil.resolve_name(name)
