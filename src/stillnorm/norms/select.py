"""The one selector: which norm layers of a model an operation is about."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from stillnorm.errors import SelectorError
from stillnorm.norms.find import find_norms
from stillnorm.norms.layer import NormLayer
from stillnorm.norms.paths import clean_path, every_module, without_wrappers

Layers = (
    None | str | nn.Module | type[nn.Module] | Callable[[str, nn.Module], bool] | Iterable["Layers"]
)


def select(model: nn.Module, layers: Layers = None) -> tuple[NormLayer, ...]:
    """Return the norm layers that `layers` selects, in registration order.

    Args:
        model: The model.
        layers: None for all; a glob on path components, which selects the subtree below
            (``"backbone"``, ``"layer1.*.bn2"``); a module; a class, of the layers themselves or
            of a module around them; a predicate ``(path, module) -> bool``; or a collection of
            these.

    Raises:
        SelectorError: A selector matches nothing. The message names the nearest paths.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(4), nn.Sequential(nn.BatchNorm1d(4)))
        >>> select(net, "1")
        (NormLayer(1.0: BatchNorm1d(4)),)
    """
    norms = find_norms(model)
    if layers is None:
        return norms
    chosen = _matches(model, norms, layers)
    return tuple(norm for norm in norms if id(norm) in chosen)


def _matches(model: nn.Module, norms: tuple[NormLayer, ...], layers: Layers) -> set[int]:
    """Return the ids of the views that one selector, or a collection of them, matches."""
    if isinstance(layers, Iterable) and not isinstance(layers, str | nn.Module):
        parts = list(layers)
        if not parts:
            raise SelectorError("layers= is empty", help="leave layers= out to select all layers")
        return set[int]().union(*(_matches(model, norms, part) for part in parts))
    test = matcher(layers)
    chosen = {id(norm) for norm in norms if test(norm)}
    if not chosen:
        raise _nothing(model, norms, layers)
    return chosen


def matcher(layers: Layers) -> Callable[[NormLayer], bool]:
    """Return the test that a selector, other than None, puts to each layer."""
    if isinstance(layers, str):
        pattern = layers
        return lambda norm: any(globs(path, pattern) for path in norm.paths)
    if isinstance(layers, nn.Module):
        inside = {id(module) for module in every_module(layers)}
        return lambda norm: id(norm.module) in inside
    if isinstance(layers, type):
        kind = layers
        return lambda norm: any(isinstance(m, kind) for m in (norm.module, *norm.above))
    if isinstance(layers, Iterable):
        tests = [matcher(part) for part in layers]
        return lambda norm: any(test(norm) for test in tests)
    if callable(layers):
        predicate: Callable[[str, nn.Module], bool] = layers
        return lambda norm: any(predicate(path, norm.module) for path in norm.paths)
    raise SelectorError(
        f"layers= cannot be {type(layers).__name__} {layers!r}",
        help="give a path or glob, a module, a class, a predicate (path, module) -> bool, "
        "or a list of these",
    )


def globs(path: str, pattern: str) -> bool:
    """Tell whether the pattern matches the path or a module above it, component by component.

    Each ``module`` at its front may be a wrapper's or the user's own: all readings count.

    Example:
        >>> globs("layer1.0.bn2", "layer1.*.bn2"), globs("layer1.0.bn2", "layer1"), globs("a", "b")
        (True, True, False)
    """
    names, globs = path.split("."), without_wrappers(pattern)
    while not (len(globs) <= len(names) and all(map(fnmatchcase, names, globs))):
        if globs[0] != "module" or len(globs) == 1:
            return False
        globs = globs[1:]
    return True


def _nothing(model: nn.Module, norms: tuple[NormLayer, ...], layers: Layers) -> SelectorError:
    """Say why nothing matched, and what is nearest."""
    name = type(model).__name__
    if not norms:
        return SelectorError(f"{name} has no norm layers", help="leave layers= out")
    if isinstance(layers, str):
        if any(clean_path(raw) == clean_path(layers) for raw, _ in model.named_modules()):
            fact = f"{layers!r} is in {name}, but there is no norm layer in it"
        else:
            fact = f"{layers!r} matches no norm layer of {name}"
        prefixes = dict.fromkeys(
            ".".join(parts[:depth])
            for norm in norms
            for parts in [norm.path.split(".")]
            for depth in range(len(parts), 0, -1)
        )
        near = get_close_matches(layers, prefixes, n=3, cutoff=0.4) or list(prefixes)[:3]
        return SelectorError(fact, help=f"nearest: {', '.join(near)}")
    if isinstance(layers, nn.Module):
        inside = any(module is layers for module in every_module(model))
        where = "has no norm layer in it" if inside else f"is not part of {name}"
        return SelectorError(
            f"the {type(layers).__name__} given as layers= {where}",
            help="give a module of this very model (a copy is another module)",
        )
    what = layers.__name__ if isinstance(layers, type) else "the predicate given as layers="
    kinds = ", ".join(sorted({norm.kind for norm in norms}))
    return SelectorError(f"{what} matches no norm layer of {name}", help=f"its norms are: {kinds}")
