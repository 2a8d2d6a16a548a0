"""The configuration of the command line: `[tool.stillnorm]` in the nearest pyproject.toml.

    [tool.stillnorm]
    select = ["SN1", "SN2"]
    fail-on = "warning"
    baseline = "stillnorm-baseline.json"

    [tool.stillnorm.per-path-ignores]
    "backbone.*" = ["SN105"]
    "aux.bn" = { rules = ["SN114"], reason = "a head of training only" }

Each key is the default of the option of the same name: what the command line says replaces it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stillnorm.errors import ConfigError

if TYPE_CHECKING:
    from stillnorm.diagnosis.suppression import Ignore

FILE = "pyproject.toml"
FAIL_ON = ("error", "warning", "info", "never")
_IGNORES = "per-path-ignores"


@dataclass(frozen=True)
class Config:
    """What a configuration says.

    Args:
        file: Where it was read from; None when there is none.
        options: Defaults of options, by parameter.
        ignores: By pattern of paths: the rules, and the reason.
    """

    file: Path | None
    options: Mapping[str, object]
    ignores: Mapping[str, tuple[tuple[str, ...], str]]

    @property
    def name(self) -> str:
        """What the file is called."""
        return FILE if self.file is None else self.file.name

    def ignored(self) -> list[Ignore]:
        """Return the rules that are ignored, as the library takes them."""
        from stillnorm.diagnosis.suppression import Ignore

        return [Ignore(pattern, *told) for pattern, told in self.ignores.items()]


def read(file: Path | None, start: Path) -> Config:
    """Read a configuration.

    Args:
        file: The file; None for the nearest pyproject.toml with a `[tool.stillnorm]`.
        start: The folder from which to look upwards.

    Raises:
        ConfigError: A file cannot be read, or says what cannot be meant.
    """
    if file is not None:
        table = _table(file)
        if table is None:
            raise ConfigError(f"{file} has no [tool.stillnorm]", help="add it, or name another")
        return _parsed(file, table)
    for folder in (start, *start.parents):
        found = folder / FILE
        if found.is_file() and (table := _table(found)) is not None:
            return _parsed(found, table)
    return Config(None, {}, {})


def configured(ctx: click.Context, param: click.Parameter, file: Path | None) -> Config:
    """Make the configuration's keys the defaults of the command's options: click's callback."""
    config = read(file, Path.cwd())
    ctx.default_map = {**(ctx.default_map or {}), **config.options}
    return config


def _table(file: Path) -> Any:
    """Return the `[tool.stillnorm]` of a file, or None."""
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read: {error.strerror}", help="check the path"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not TOML: {error}", help="mend it there") from error
    tool = data.get("tool")
    return tool.get("stillnorm") if isinstance(tool, dict) else None


def _parsed(file: Path, table: Any) -> Config:
    if not isinstance(table, dict):
        raise ConfigError(f"{file.name}: tool.stillnorm is not a table", help="[tool.stillnorm]")
    options: dict[str, object] = {}
    for key, value in table.items():
        if key == _IGNORES:
            continue
        if key not in _KEYS:
            known = [*_KEYS, _IGNORES]
            near = get_close_matches(key, known, n=1, cutoff=0.5)
            raise ConfigError(
                f"{file.name}: [tool.stillnorm] has no key {key!r}",
                help=f"nearest: {near[0]}" if near else f"the keys are {', '.join(known)}",
            )
        read_value, form = _KEYS[key]
        parsed = read_value(value)
        if parsed is None:
            raise ConfigError(
                f"{file.name}: {key} = {value!r} cannot be meant", help=f"write {form}"
            )
        options[key.replace("-", "_")] = parsed
    if "baseline" in options:
        options["baseline"] = file.parent / str(options["baseline"])
    return Config(file, options, _ignores(file, table.get(_IGNORES, {})))


def _ignores(file: Path, table: Any) -> dict[str, tuple[tuple[str, ...], str]]:
    if not isinstance(table, dict):
        raise ConfigError(f"{file.name}: {_IGNORES} is not a table", help=_FORM_OF_IGNORES)
    ignores = {}
    for pattern, value in table.items():
        told = value if isinstance(value, dict) else {"rules": value}
        rules, reason = _names(told.get("rules")), told.get("reason", "")
        if rules is None or not isinstance(reason, str) or not {*told} <= {"rules", "reason"}:
            raise ConfigError(
                f"{file.name}: {_IGNORES}: {pattern!r} = {value!r} cannot be meant",
                help=_FORM_OF_IGNORES,
            )
        ignores[pattern] = (tuple(rules.split(",")), reason)
    return ignores


_FORM_OF_IGNORES = (
    'write "backbone.*" = ["SN105"], or '
    '"backbone.*" = { rules = ["SN105"], reason = "another domain" }'
)


def _names(value: Any) -> str | None:
    """Return rules as the command line takes them; None for what are none."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        return ",".join(value)
    return None


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


_RULES = 'codes, their beginnings, or slugs: ["SN1", "shared-layer"]'
_KEYS: dict[str, tuple[Callable[[Any], object], str]] = {
    "select": (_names, _RULES),
    "extend-select": (_names, _RULES),
    "ignore": (_names, _RULES),
    "fail-on": (
        lambda value: value if value in FAIL_ON else None,
        f"one of {', '.join(FAIL_ON)}",
    ),
    "max-batches": (_number, "a number from 1 on"),
    "baseline": (lambda value: value if isinstance(value, str) else None, "a file's name"),
}
