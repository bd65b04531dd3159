"""The import law: each layer imports only layers before it, and torch and ray only where they belong."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "raytron"
LAYERS = [{"deal", "errors"}, {"reading"}, {"config", "stages"}, {"rules"}, {"presets"}, {"plan"}, {"kernels"}, {"parallel"},
          {"model", "optim", "data", "checkpoint", "observe"}, {"training"}, {"actors"}, {"cli", "__init__", "__main__"},
          {"testing"}]  # fmt: skip
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
RAY = ("actors/", "data/feed.py", "data/tokenize.py", "testing/")
NO_TORCH = {"deal", "errors", "reading", "config", "stages", "rules", "presets", "plan"}
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


def imports(tree):
    """(module, whether inside a function) of every import of a file."""
    hidden = {
        id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in hidden) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write absolute imports"
            own = node.module == "raytron"
            yield from ((f"raytron.{a.name}" if own else node.module, id(node) in hidden) for a in node.names)


@pytest.mark.parametrize("file", FILES)
def test_a_file_keeps_the_law(file):
    layer = file.split("/")[0].removesuffix(".py")
    assert layer in LEVEL, f"{layer} has no place among the layers"
    for module, hidden in imports(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        package, _, rest = module.partition(".")
        other = rest.partition(".")[0]
        if package == "raytron" and other in LEVEL:
            assert not hidden, f"{file} hides its import of {module} in a function"
            allowed = other == layer or layer == "__init__" or LEVEL[other] < LEVEL[layer]
            assert allowed, f"{file} may not import {module}"
        assert package != "ray" or file.startswith(RAY), f"{file} may not import ray"
        assert package != "torch" or layer not in NO_TORCH, f"{file} may not import torch"
