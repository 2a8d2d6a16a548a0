"""Which sizes of the inputs are left open, and with which others the file is tried."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram, ShapesCollection

from stillnorm.export.call import Call


def open_batch(call: Call, size: int) -> Any:
    """Return the `dynamic_shapes` that leave open the first size of all inputs that share it."""
    shapes = ShapesCollection()  # type: ignore[no-untyped-call]
    for leaf in call.leaves:
        if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == size:
            shapes[leaf] = {0: Dim.AUTO}
    return shapes.dynamic_shapes(call.module, call.args, call.kwargs)  # type: ignore[no-untyped-call]


def opened(program: ExportedProgram, call: Call) -> dict[int, torch.SymInt]:
    """Return, by number of the input, the first sizes that torch has left open."""
    names = program.graph_signature.user_inputs
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    found: dict[int, torch.SymInt] = {}
    for number, name in enumerate(names if len(names) == len(call.leaves) else ()):
        value = values.get(name) if isinstance(name, str) else None
        if not isinstance(value, Tensor) or not value.dim():
            continue
        size = value.shape[0]
        if isinstance(size, torch.SymInt) and not str(size).isdigit():
            found[number] = size
    return found


def with_other_sizes(
    call: Call, program: ExportedProgram, sizes: Mapping[int, torch.SymInt], *, asked: bool
) -> list[tuple[int, Call]]:
    """Return the call with other batch sizes: one sample, one more than there are, three.

    Args:
        call: The call on the example.
        program: What torch has captured.
        sizes: What it has left open.
        asked: Whether the user has said which sizes are open, and in which range.
    """
    if not sizes:
        return []
    symbol = str(next(iter(sizes.values())))
    if not symbol.isidentifier():  # a multiple, or a sum: which sizes there are is not known here
        return []
    # What never meets in the forward has a symbol each; without orders all are the batch size.
    group = [number for number, size in sizes.items() if not asked or str(size) == symbol]
    now = len(call.leaves[group[0]])
    others = dict.fromkeys(n for n in (1, now + 1, 3 if now == 1 else 1) if n != now)
    if asked:
        allowed = next((r for s, r in program.range_constraints.items() if str(s) == symbol), None)
        others = dict.fromkeys(n for n in others if allowed is None or n in allowed)
    return [(n, call.resized(n, group.__contains__)) for n in others]
