"""The house's floors: imports point down only, and light parts import lightly."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "ban_fast"

# What each floor may import; everything below an allowed floor is allowed too. `errors` is the lowest.
FLOORS: dict[str, set[str]] = {
    "errors": set(),
    "option_checks": {"errors"},
    "config": {"option_checks"},
    "_native": set(),
    "backends": {"_native", "errors"},
    "ops": {"backends"},
    "losses": {"ops"},
    "models": {"ops"},
    "data": {"ops"},
    "evaluation": {"losses", "models", "data", "config"},
    "recipes": {"config"},
    "training": {"evaluation", "losses", "models", "data", "config"},
    "report": {"evaluation"},
    "studies": {"recipes", "training", "report"},
    "cli": {"studies", "recipes", "training", "report", "config"},
    "__main__": {"cli"},
}


def below(floor: str) -> set[str]:
    """Every floor that `floor` may import: the arrows, followed down."""
    reached: set[str] = set()
    waiting = set(FLOORS[floor])
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting |= FLOORS[name] - reached
    return reached


def modules() -> list[tuple[str, Path]]:
    """(dotted name below ban_fast, file) of every module."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(p for p in parts if p != "__init__") or "__init__"
        found.append((name, path))
    return found


def imports(path: Path, name: str) -> list[tuple[int, str]]:
    """(line, dotted name below ban_fast) of everything of ours that a file imports, at any depth of the code."""
    package = ["ban_fast", *([] if name == "__init__" else name.split("."))]
    if path.name != "__init__.py":
        package = package[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, a.name) for a in node.names if a.name.split(".")[0] == "ban_fast"]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            full = [*base, *(node.module.split(".") if node.module else [])]
            if full[:1] == ["ban_fast"]:
                found += [(node.lineno, ".".join([*full, a.name] if len(full) == 1 else full)) for a in node.names]
    return [(line, full.removeprefix("ban_fast").lstrip(".")) for line, full in found]


@pytest.mark.parametrize(("name", "path"), modules(), ids=[name for name, _ in modules()])
def test_imports_point_down(name: str, path: Path) -> None:
    floor = name.split(".")[0]
    if floor == "__init__":
        allowed = {"__version__"}
    else:
        assert floor in FLOORS, f"ban_fast/{floor} stands on no floor: give it one here and in CONTRIBUTING.md"
        allowed = below(floor) | {floor, "__version__"}
    wrong = [f"line {line}: ban_fast.{full}" for line, full in imports(path, name) if full.split(".")[0] not in allowed]
    assert not wrong, f"{path.name} imports from a floor that is not below it: {wrong}"


def test_an_upward_import_is_seen(tmp_path: Path) -> None:
    """The reader above finds relative, absolute and nested imports."""
    file = tmp_path / "kd.py"
    file.write_text("from ..training import run\nimport ban_fast.cli\ndef f():\n    from .. import report\n")
    assert imports(file, "ops.kd") == [(1, "training"), (2, "cli"), (4, "report")]


def test_nothing_imports_tests_or_benchmarks() -> None:
    for _, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {n.split(".")[0] for n in names} & {"tests", "benchmarks"}, path


LIGHT = {
    "ban_fast.losses": {"torchvision", "rich", "matplotlib", "typer", "safetensors", "triton"},
    "ban_fast.training": {"rich", "matplotlib", "typer", "torchvision"},
    "ban_fast.config": {"torch", "numpy", "rich", "typer"},
    "ban_fast.cli": {"torch", "matplotlib", "torchvision"},
}


@pytest.mark.parametrize("module", LIGHT)
def test_imports_are_light(module: str) -> None:
    """`import ban_fast.losses` needs torch alone, training torch and safetensors, and the command's help no torch."""
    # What torch itself brings along is torch's affair.
    code = (
        f"import sys\n{'' if 'torch' in LIGHT[module] else 'import torch'}\nbefore = set(sys.modules)\n"
        f"import {module}\nprint(*sorted(set(sys.modules) - before))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {m.split(".")[0] for m in out.stdout.split()} & LIGHT[module]
