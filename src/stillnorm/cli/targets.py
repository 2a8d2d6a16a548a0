"""Targets: what a user names on the command line, as Python objects.

``package.module:factory``, ``file.py:factory``, or a call with literal arguments,
``"timm:create_model('resnet50')"``. A class or a function is called without arguments. Arguments
are read as literals, never evaluated; the module itself is the user's own code and is run. A
checkpoint or an exported graph, ``run3.ckpt``, is read; nothing in it is run. A file of Keras,
``model.keras``, is a model: it is read, on the torch backend, and no code in it is run.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from stillnorm.cli.failures import WHOLE, describe
from stillnorm.errors import TargetError

if TYPE_CHECKING:
    from torch import nn

    from stillnorm.diagnosis.files.skeleton import Stored

Function = Callable[..., Any]

_FORMS = "package.module:factory, file.py:factory, or \"package.module:factory('literal', 10)\""
FILES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".onnx", ".pt2")
_FACTORY = re.compile("make|build|create|model|net", re.IGNORECASE)
_TARGET = re.compile(r"((?:[A-Za-z]:[\\/])?[^:]*):(.+)", re.DOTALL)  # C:\net.py is one name


def load_model(target: str) -> nn.Module:
    """Return the model that a target makes.

    Raises:
        TargetError: There is no such file, module or name, it raises, or it makes something else.
    """
    from torch import nn

    is_file = ":" not in target[2:] and target.endswith(".keras")
    model = _read_keras(target) if is_file else _made(target)
    if not isinstance(model, nn.Module):
        raise TargetError(
            f"{target} gives {_a(model)}, not a torch.nn.Module",
            help="KERAS_BACKEND=torch: on other backends a Keras model is none"
            if is_file
            else "name a function or a class that returns the model",
        )
    return model


def _read_keras(path: str) -> object:
    """Return the model in a file of Keras, on the backend that is set, or torch's."""
    from stillnorm.porting import read_keras

    model: object = read_keras(path)
    return model


def load_file(target: str) -> Stored | None:
    """Return what is in the file that a target names; None for a target that is none.

    Raises:
        FileFormatError: The file cannot be read.
    """
    if ":" in target[2:] or Path(target).suffix.lower() not in FILES:
        return None
    from stillnorm.diagnosis.files.checkpoint import read_target

    return read_target(target)


def file_of(target: str) -> Path:
    """Return the file that a target names, or the module."""
    match = _TARGET.fullmatch(target)
    return Path(match[1] if match and match[1] else target)


def load_data(target: str) -> object:
    """Return the batches that a target makes.

    Raises:
        TargetError: There is no such file, module or name, or it raises.
    """
    return _made(target)


def load_function(target: str, *takes: str, also: tuple[str, ...] = ()) -> Function:
    """Return the function that a target names; it is not called.

    Args:
        target: The target.
        takes: The names of the positional arguments that it is going to be given.
        also: Further ones that it may take.

    Raises:
        TargetError: There is no such file, module or name, it is not a function, or one of other
            arguments.
    """
    from torch import nn

    found, called = _named(target)
    if not callable(found) or isinstance(found, type | nn.Module):
        raise TargetError(
            f"{target} {'makes' if called else 'is'} {_a(found)}, not a function",
            help=f"write a function ({', '.join(takes)}) -> ... and name it",
        )
    signature = _signature(found)
    if signature is not None and all(
        _unbindable(signature, given, {}) for given in (takes, (*takes, *also))
    ):
        raise TargetError(
            f"{target}{signature} is called with ({', '.join((*takes, *also))})",
            help="give it these arguments, in this order",
        )
    function: Function = found
    return function


def _made(target: str) -> object:
    """Return the object itself, or what it returns when it is a class, a function or a partial."""
    from torch import nn

    found, called = _named(target)
    makes = callable(found) and not isinstance(found, nn.Module | Iterable)
    return _call(target, found) if makes and not called else found


# ------------------------------------------------------------------------------- reading


def _named(target: str) -> tuple[Any, bool]:
    """Return what a target names, and whether its own call has been made."""
    where, what = _split(target)
    try:
        expression = ast.parse(what.strip(), mode="eval").body
    except SyntaxError:
        raise TargetError(f"{what!r} in {target} is not Python", help=_FORMS) from None
    call = expression if isinstance(expression, ast.Call) else None
    names = _dotted(call.func if call else expression, target)
    args, kwargs = _literals(call, target) if call else ((), {})
    found: Any = _module(where)
    for i, name in enumerate(names):
        found = _attribute(found, name, ".".join([where, *names[:i]]) if i else where)
    return (_call(target, found, *args, **kwargs), True) if call else (found, False)


def _split(target: str) -> tuple[str, str]:
    match = _TARGET.fullmatch(target)
    if match and match[1]:
        return match[1], match[2]
    path = Path(target.rstrip(":"))
    if path.suffix.lower() in FILES:
        graph = path.suffix.lower() in (".onnx", ".pt2")
        raise TargetError(
            f"{path.name} is {'an exported graph' if graph else 'a checkpoint'}, and this needs "
            "the model itself",
            help="name what makes it: net.py:make"
            if graph
            else f"put it into its model: net.py:make --weights {path}",
        )
    if path.suffix == ".py":
        _must_exist(path)
        raise TargetError(
            f"{target} does not say what in the file makes the model",
            help=f"name it: {' or '.join(f'{path}:{name}' for name in _definitions(path)[:3])}",
        )
    raise TargetError(f"{target!r} is not a target", help=f"write {_FORMS}")


def _definitions(path: Path) -> list[str]:
    """List the functions and classes of a file without running it, likely factories first."""
    try:
        body = ast.parse(path.read_text(encoding="utf-8")).body
    except (SyntaxError, UnicodeDecodeError):
        return ["make"]
    names = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return sorted(names, key=lambda name: not _FACTORY.search(name)) or ["make"]


def _dotted(expression: ast.expr, target: str) -> list[str]:
    if isinstance(expression, ast.Name):
        return [expression.id]
    if isinstance(expression, ast.Attribute):
        return [*_dotted(expression.value, target), expression.attr]
    raise TargetError(f"{target} is neither a name nor a call of one", help=f"write {_FORMS}")


def _literals(call: ast.Call, target: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    try:
        if any(keyword.arg is None for keyword in call.keywords):
            raise ValueError
        args = tuple(ast.literal_eval(arg) for arg in call.args)
        return args, {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except ValueError:
        raise TargetError(
            f"{target} has an argument that is not a literal",
            help="numbers, strings, lists, dicts, True, False and None can be written here; "
            "for anything else write a function of your own",
        ) from None


# ------------------------------------------------------------------------------- running


def _module(where: str) -> ModuleType:
    path = Path(where)
    if path.suffix == ".py":
        return _file(path)
    if "/" in where or "\\" in where:
        raise TargetError(f"{where} is not a .py file", help=f"write {_FORMS}")
    _make_importable(Path.cwd())
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name and f"{where}.".startswith(f"{error.name}."):
            raise TargetError(
                f"there is no module {where!r}",
                help="install it, run this where it lies, or name a file: net.py:make",
            ) from None
        raise _raised(f"importing {where}", error) from error
    except (Exception, SystemExit) as error:
        raise _raised(f"importing {where}", error) from error


def _file(path: Path) -> ModuleType:
    """Run a file as a module, once, whatever its name; its neighbours can be imported."""
    _must_exist(path)
    path = path.resolve()
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == str(path):
            return module
    name = path.stem if path.stem not in sys.modules else f"stillnorm_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TargetError(f"{path} cannot be imported", help=f"write {_FORMS}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _make_importable(path.parent)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _raised(f"importing {path.name}", error) from error
    return module


def _must_exist(path: Path) -> None:
    if not path.is_file():
        near = get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=3)
        raise TargetError(
            f"there is no file {path}",
            help=f"nearest: {', '.join(near)}" if near else f"the folder now is {Path.cwd()}",
        )


def _make_importable(folder: Path) -> None:
    """Put the folder first on the path, as `python file.py` and `python -m module` do."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _attribute(owner: Any, name: str, where: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        names = [n for n in dir(owner) if not n.startswith("_")]
        near = get_close_matches(name, names, n=3, cutoff=0.5)
        raise TargetError(
            f"there is no {name!r} in {where}",
            help=f"nearest: {', '.join(near)}" if near else f"write {_FORMS}",
        ) from None


# ------------------------------------------------------------------------------- calling


def _call(target: str, factory: Any, *args: Any, **kwargs: Any) -> Any:
    if not callable(factory):
        raise TargetError(f"{target}: {_a(factory)} cannot be called", help=f"write {_FORMS}")
    signature = _signature(factory)
    if signature is not None and (why := _unbindable(signature, args, kwargs)):
        name = target.partition("(")[0]
        raise TargetError(
            f"{name}{signature}: {why}", help=f'write the call: "{name}({_example(signature)})"'
        )
    try:
        return factory(*args, **kwargs)
    except (Exception, SystemExit) as error:
        raise _raised(target, error) from error


def _signature(function: Any) -> inspect.Signature | None:
    """Return the signature; None for a builtin that does not tell."""
    try:
        return inspect.signature(function)
    except ValueError:
        return None


def _unbindable(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Say why the arguments do not fit; nothing when they do."""
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    return ""


def _example(signature: inspect.Signature) -> str:
    required = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    return ", ".join(f"{name}=..." for name in required)


def _raised(what: str, error: BaseException) -> TargetError:
    help = WHOLE
    if isinstance(error, ModuleNotFoundError) and error.name == "tensorflow":
        frames = traceback.extract_tb(error.__traceback__)
        if any("keras" in Path(frame.filename).parts for frame in frames):  # its default backend
            help = "KERAS_BACKEND=torch stillnorm ... runs Keras on torch"
    return TargetError(f"{what} raised {describe(error)}", help=help)


def _a(value: object) -> str:
    name = "class" if isinstance(value, type) else type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
