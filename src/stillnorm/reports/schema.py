"""JSON Schema of what `reports.json` writes: from the fields, their types and their docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

_ARGUMENT = re.compile(r"^    (\w+): (.*(?:\n(?: {8}.*|$))*)", re.MULTILINE)
_SCALARS: dict[object, dict[str, Any]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"anyOf": [{"type": "number"}, {"enum": ["nan", "inf", "-inf"]}]},
    types.NoneType: {"type": "null"},
    object: {},
}


def schema_of(kind: type, *, omit: Collection[str] = ()) -> dict[str, Any]:
    """Return the schema of a dataclass, with those of the dataclasses in it under ``$defs``.

    Args:
        kind: The dataclass. Its docstring describes its fields, under ``Args:``.
        omit: Names of fields that are not written.

    Raises:
        TypeError: A field has a type that is not data.

    Example:
        >>> @dataclasses.dataclass
        ... class Known:
        ...     paths: tuple[str, ...]
        >>> schema_of(Known)["properties"]
        {'paths': {'type': 'array', 'items': {'type': 'string'}}}
    """
    definitions: dict[str, dict[str, Any]] = {}

    def of(hint: Any) -> dict[str, Any]:
        if hint in _SCALARS:
            return dict(_SCALARS[hint])
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            return {"anyOf": [of(arg) for arg in args]}
        if origin is typing.Literal:
            return {"enum": list(args)}
        if origin is tuple:
            if args[-1] is Ellipsis:
                return {"type": "array", "items": of(args[0])}
            return {"type": "array", "prefixItems": [of(arg) for arg in args], "items": False}
        if origin is not None and issubclass(origin, Mapping):
            return {"type": "object", "additionalProperties": of(args[1])}
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            if hint.__name__ not in definitions:
                definitions[hint.__name__] = {}  # it may hold itself
                definitions[hint.__name__] = fields(hint)
            return {"$ref": f"#/$defs/{hint.__name__}"}
        raise TypeError(f"{hint} is not data that JSON can hold")

    def fields(owner: type) -> dict[str, Any]:
        hints = typing.get_type_hints(owner)
        told = described(owner)
        properties = {
            field.name: of(hints[field.name]) | told.get(field.name, {})
            for field in dataclasses.fields(owner)
            if not field.name.startswith("_") and field.name not in omit
        }
        summary = (inspect.getdoc(owner) or "").partition("\n\n")[0]
        return {
            "type": "object",
            "description": " ".join(summary.split()),
            "properties": properties,
            "required": list(properties),
        }

    whole = fields(kind)
    return whole | {"$defs": dict(sorted(definitions.items()))}


def described(owner: type) -> dict[str, dict[str, str]]:
    """Return what a docstring says of the fields under ``Args:``."""
    _, _, arguments = (inspect.getdoc(owner) or "").partition("Args:\n")
    return {
        name: {"description": " ".join(text.split())} for name, text in _ARGUMENT.findall(arguments)
    }
