"""Imports point downwards only; nothing unpickles; no file grows past its subject."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tprune"
FILES = sorted(PACKAGE.rglob("*.py"))
FORBIDDEN = {
    "core": ("tprune.methods", "tprune.models", "tprune.pipelines", "tprune.commands", "tprune.data")
    + ("tprune.evaluate", "tprune.recipe", "tprune.artifact", "timm", "transformers"),
    "methods": ("tprune.models", "tprune.pipelines", "tprune.commands", "tprune.data", "tprune.evaluate")
    + ("timm", "transformers"),
    "models": ("tprune.pipelines", "tprune.commands", "tprune.evaluate"),
    "data": ("tprune.pipelines", "tprune.commands", "tprune.models", "tprune.methods", "timm"),
    "pipelines": ("tprune.commands",),
    "evaluate": ("tprune.commands", "tprune.methods"),
}


def imports(file):
    """Every module a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_point_downwards(folder):
    for file in sorted((PACKAGE / folder).rglob("*.py")):
        for name in imports(file):
            assert not name.startswith(FORBIDDEN[folder]), f"{file.relative_to(PACKAGE)} imports {name}"


def test_nothing_unpickles_or_runs_code_from_a_hub():
    banned = {
        ("torch", "load"),
        ("yaml", "load"),
        ("yaml", "unsafe_load"),
        ("numpy", "load"),
        ("joblib", "load"),
    }
    for file in FILES:
        tree = ast.parse(file.read_text())
        assert not {"pickle", "dill", "cloudpickle", "shelve", "marshal"} & {
            n.split(".")[0] for n in imports(file)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in banned, f"{file.name}: {node.value.id}.{node.attr}"
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant)
                assert node.value.value is False


def test_method_files_are_short():
    for file in sorted((PACKAGE / "methods").glob("*/*.py")):
        assert len(file.read_text().splitlines()) <= 200, file.name
