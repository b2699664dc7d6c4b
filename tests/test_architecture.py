"""The import rule, read off the syntax trees: a module imports its own folder or a strictly lower tier."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "detection"

TIERS = {
    "types": 0,
    "config": 1,
    "distributed": 1,
    "ops": 2,
    "data": 3,
    "model": 3,
    "assignment": 3,
    "losses": 3,
    "calibration": 3,
    "evaluation": 3,
    "engine": 4,
    "report": 5,
    "experiment": 6,
    "analysis": 7,
    "classification_task": 7,
    "export": 7,
    "prediction": 7,
    "repair": 7,
    "reporting": 7,
    "screening": 7,
    "study": 8,
}

OWNERS = {
    "timm": ("detection/model/backbone.py",),
    "albumentations": ("detection/data/transforms.py",),
    "triton": ("detection/ops/focal_triton.py",),
    "pycocotools": ("detection/evaluation/reference.py",),
    "matplotlib": ("detection/report/",),
    "sklearn": ("detection/data/digits.py", "detection/calibration/"),
    "torchvision": ("detection/ops/nms.py",),
    "ray": ("detection/study/ray_cluster.py",),
    "rich": ("detection/engine/", "detection/report/"),
    "pydantic": ("detection/",),
}

MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(dotted module name, line) of every import statement, nested ones included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            yield node.module, node.lineno


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_the_tiers(path: Path) -> None:
    unit = unit_of(path)
    if unit == "__init__":
        assert not [m for m, _ in imports(path) if m.startswith(("torch", "detection"))]
        return
    assert unit in TIERS, f"{path} stands in no tier"
    for module, line in imports(path):
        if module.split(".")[0] != "detection":
            continue
        assert module.count("."), f"{path}:{line}: import the module, not the package"
        other = module.split(".")[1]
        allowed = other == unit or TIERS[other] < TIERS[unit]
        assert allowed, f"{path}:{line}: {unit} (tier {TIERS[unit]}) imports {other} (tier {TIERS[other]})"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_libraries_have_one_owner(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    for module, line in imports(path):
        owners = OWNERS.get(module.split(".")[0])
        assert owners is None or name.startswith(owners), f"{name}:{line}: {module} belongs to {owners}"


@pytest.mark.parametrize("path", [p for p in MODULES if unit_of(p) == "ops"], ids=lambda p: p.name)
def test_ops_need_torch_alone(path: Path) -> None:
    allowed = {"torch", "triton", "torchvision", "detection", *sys.stdlib_module_names, "jaxtyping"}
    assert {module.split(".")[0] for module, _ in imports(path)} <= allowed


@pytest.mark.parametrize("path", sorted((ROOT / "tools").glob("*.py")), ids=lambda p: p.name)
def test_tools_are_thin(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 45
    allowed = {
        *("analysis", "classification_task", "export", "prediction", "repair", "reporting", "screening"),
        *("experiment", "report", "config", "study"),
    }
    for module, line in imports(path):
        parts = module.split(".")
        assert parts[0] != "detection" or parts[1] in allowed, f"{path}:{line}: {module}"


def test_nothing_imports_tools() -> None:
    for path in MODULES:
        assert not [m for m, _ in imports(path) if m.split(".")[0] == "tools"], path


def test_import_detection_is_light() -> None:
    code = "import sys, detection; print([m for m in ('torch', 'numpy', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_resolve() -> None:
    import detection

    for name in detection.__all__:
        assert getattr(detection, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        detection.nothing  # noqa: B018
