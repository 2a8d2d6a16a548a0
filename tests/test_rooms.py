"""The rooms import each other downwards only, wherever in a file the import stands.

The order is that of the design; what stands on one line may not import each other.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import stillnorm

ROOT = Path(stillnorm.__file__).parent

ORDER = (
    ("errors",),
    ("reports", "convolutions"),
    ("norms",),
    ("holding",),
    ("state",),
    ("tracing",),
    ("folding",),
    ("freezing", "calibration"),
    ("repair", "averages"),
    ("diagnosis",),
    ("testing", "export", "porting"),
    ("cli", "demo"),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}

# demo's one command lives in cli, and cli starts the demo: the last two are one floor.
ALLOWED = {("cli", "demo")}

# Packages that only these files may import; whoever calls them pays for the import.
CONFINED = {
    "click": ("cli/",),
    "rich": ("reports/", "cli/", "demo/"),
    "jinja2": ("reports/",),
    "safetensors": ("state/",),
    "sklearn": ("demo/",),
    "onnx": ("demo/", "diagnosis/files/onnx_file.py", "export/onnx_graph.py"),
    "onnxscript": ("export/onnx_graph.py",),
    "onnxruntime": ("export/onnx_graph.py",),
    "onnx_ir": ("export/onnx_graph.py",),
    "torchvision": ("demo/half.py",),
    "keras": ("holding/keras.py", "porting/keras/"),
    "jax": (),
    "timm": (),
    "transformers": (),
    "detectron2": (),
}


def imports(source: str, package: str) -> list[tuple[int, str]]:
    """Return (line, module) of every import in a file, in functions and conditions too."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            stem = ".".join(base) if node.level else ""
            module = ".".join(filter(None, (stem, node.module)))
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and _is_import_module(node.func):
            (name, *_) = node.args
            if isinstance(name, ast.Constant):
                found.append((node.lineno, str(name.value)))
    return found


def _is_import_module(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in ("import_module", "__import__")


def room_of(module: str) -> str | None:
    """Return the room that an absolute module name is in, or None."""
    parts = module.split(".")
    if parts[0] != "stillnorm" or len(parts) < 2:
        return None
    return parts[1] if parts[1] in LEVEL else None


def upward(room: str, source: str, package: str = "stillnorm") -> list[str]:
    """Return the imports of a file in `room` that do not go down."""
    return [
        f"line {line}: {room} imports {module}"
        for line, module in imports(source, package)
        if (other := room_of(module)) is not None
        and other != room
        and LEVEL[other] >= LEVEL[room]
        and (room, other) not in ALLOWED
    ]


FILES = sorted(
    path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] != "__init__.py"
)


def _room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_every_room_has_its_place() -> None:
    assert {_room(path) for path in FILES} <= set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    package = ".".join(("stillnorm", *path.relative_to(ROOT).parent.parts))
    assert upward(_room(path), path.read_text(), package) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_are_imported_where_they_belong_only(path: Path) -> None:
    where = path.relative_to(ROOT).as_posix()
    for line, module in imports(path.read_text(), "stillnorm"):
        homes = CONFINED.get(module.split(".")[0])
        assert homes is None or where.startswith(homes), f"line {line}: {module}"


def test_no_room_uses_what_another_hides() -> None:
    """A name with an underscore belongs to its own room."""
    for path in FILES:
        for line, module in imports(path.read_text(), "stillnorm"):
            hidden = module.split(".")[-1].startswith("_") and room_of(module) is not None
            assert not hidden or room_of(module) == _room(path), f"{path}:{line}: {module}"


@pytest.mark.parametrize(
    "line",
    [
        "import stillnorm.freezing",
        "import stillnorm.freezing.freeze as f",
        "from stillnorm import freezing",
        "from stillnorm.freezing import freeze",
        "from stillnorm.freezing.freeze import freeze",
        "from ..freezing import freeze",
        "def f():\n    from stillnorm.freezing import freeze",
        "if TYPE_CHECKING:\n    from stillnorm.freezing import freeze",
        "import importlib\nimportlib.import_module('stillnorm.freezing')",
    ],
)
def test_these_tests_can_fail(line: str) -> None:
    """Every way to import upwards is seen; the same line further up is allowed."""
    assert upward("norms", line, "stillnorm.norms") != []
    assert upward("calibration", line, "stillnorm.calibration") != []
    assert upward("diagnosis", line, "stillnorm.diagnosis") == []
    assert upward("freezing", line, "stillnorm.freezing") == []
