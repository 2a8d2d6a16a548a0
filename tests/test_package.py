"""The package as a whole: public names, their documentation, and what importing it costs."""

from __future__ import annotations

import ast
import inspect
import operator
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest

import stillnorm as sn

ROOT = Path(sn.__file__).parent

# Named in the design and not in this list: what later versions bring.
PUBLIC = {
    "Snapshot",
    "StillnormError",
    "StillnormWarning",
    "check",
    "eval_mode",
    "export_onnx",
    "fold",
    "freeze",
    "inspect",
    "is_frozen",
    "no_updates",
    "preserved",
    "recalibrate",
    "replace",
    "snapshot",
    "split_shared",
    "track_statistics",
    "unfreeze",
}

# Modules of rarer tools, with what is called in them.
TOOLS = {
    "averages": ("match_average", "pool_statistics"),
    "export": ("export_program",),
    "port": ("compare", "from_keras", "read_keras", "table", "to_keras"),
    "repair": (
        "absorb_bias",
        "clamp_variance",
        "clone_inference_tensors",
        "convert_variance",
        "drop_stale_gradients",
        "repair_optimizer",
        "reset_statistics",
        "shared_state_dict",
        "to_float32",
    ),
    "testing": ("assert_batch_independent", "assert_frozen_through", "assert_healthy"),
}


def python(code: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ------------------------------------------------------------------------------- public names


def test_the_public_names_are_a_contract() -> None:
    assert set(sn.__all__) == PUBLIC | set(TOOLS)
    assert sn.__all__ == sorted(sn.__all__)
    assert set(dir(sn)) >= PUBLIC | set(TOOLS)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_is_there(name: str) -> None:
    thing = getattr(sn, name)
    assert thing is getattr(sn, name)
    assert thing.__module__.startswith("stillnorm.")


def test_the_table_and_the_imports_for_type_checkers_agree() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    declared = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert declared == {
        **{name: f"stillnorm.{room}" for name, room in sn._ROOM_OF.items()},
        **dict.fromkeys(TOOLS, "stillnorm"),
    }


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'freze'"):
        sn.freze  # noqa: B018
    assert not hasattr(sn, "anything")


def test_version_and_typing_marker() -> None:
    assert sn.__version__ == version("stillnorm")
    assert (ROOT / "py.typed").exists()


# ------------------------------------------------------------------------------- documentation


@pytest.mark.parametrize(
    "name", [*sorted(PUBLIC), *(f"{tool}.{name}" for tool in TOOLS for name in TOOLS[tool])]
)
def test_every_public_name_is_documented(name: str) -> None:
    """A summary; a word on every argument; what comes back; and where it has one, an example."""
    thing = operator.attrgetter(name)(sn)
    doc = inspect.getdoc(thing)
    assert doc
    assert doc.splitlines()[0].endswith(".")
    if inspect.isclass(thing):
        return
    assert ">>> " in doc
    assert "Returns:" in doc or "Yields:" in doc
    arguments = inspect.signature(thing).parameters
    section = doc.partition("Args:")[2]
    for argument in arguments:
        assert f"    {argument}:" in section, argument


PUBLIC_METHODS = [
    (cls, name)
    for cls in (sn.Snapshot,)
    for name, method in vars(cls).items()
    if not name.startswith("_") and callable(getattr(cls, name))
]


@pytest.mark.parametrize(("cls", "name"), PUBLIC_METHODS)
def test_every_public_method_is_documented(cls: type, name: str) -> None:
    assert inspect.getdoc(getattr(cls, name))


# ------------------------------------------------------------------------------- cost of importing

NEW_PACKAGES = """
import sys, torch
before = set(sys.modules)
{code}
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(*sorted(new - set(sys.stdlib_module_names) - {{"stillnorm", "torch"}}))
"""


def test_importing_pulls_in_nothing_but_torch() -> None:
    """Neither click, rich, jinja2 nor any extra: they are loaded by what needs them."""
    assert python(NEW_PACKAGES.format(code="import stillnorm")) == ""


def test_using_it_pulls_in_no_extra() -> None:
    """Reports are written with rich and snapshots with safetensors; nothing else is loaded."""
    code = """
import stillnorm as sn
net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
sn.recalibrate(net, [torch.randn(8, 2)])
print(*(str(thing) for thing in (sn.freeze(net), sn.inspect(net))), file=sys.stderr)
sn.snapshot(net).verify(net)
"""
    loaded = set(python(NEW_PACKAGES.format(code=code)).split())
    extras = {"click", "jinja2", "sklearn", "PIL", "onnx", "onnxscript", "onnxruntime"}
    extras |= {"torchvision", "timm", "transformers", "keras"}
    assert not loaded & extras
    assert {"rich", "safetensors"} <= loaded  # this test can see what is loaded


def test_the_test_above_can_fail() -> None:
    assert "rich" in python(NEW_PACKAGES.format(code="import stillnorm, rich")).split()


def test_importing_stillnorm_does_not_import_torch() -> None:
    """The command line prints its help without it."""
    assert python("import sys, stillnorm; print('torch' in sys.modules)") == "False"


def test_importing_costs_less_than_50_ms_beyond_torch() -> None:
    code = (
        "import time, torch; start = time.perf_counter(); import stillnorm; "
        "print(1e3 * (time.perf_counter() - start))"
    )
    assert any(float(python(code)) < 50 for _ in range(3))  # the machine may be busy


def test_dependencies_are_few() -> None:
    """torch and four small ones; everything else is an extra."""
    needed = {r.partition(";")[0].strip() for r in requires("stillnorm") or () if "extra" not in r}
    names = {r.replace(">", " ").replace("=", " ").split()[0] for r in needed}
    assert names == {"torch", "click", "rich", "safetensors", "jinja2"}
