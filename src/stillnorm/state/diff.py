"""What changed between two states of norm layers: exact, per tensor, by bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from stillnorm.norms import same_bits
from stillnorm.reports import Block, Document, Line, Table, json, text
from stillnorm.reports.numbers import count, number
from stillnorm.state.change import Change, SwitchChange, TensorChange, changes, figure
from stillnorm.state.keys import clean_keys, norm_prefixes
from stillnorm.state.record import Recorded, dotted, shown


@dataclass(frozen=True)
class Others:
    """How many tensors outside of norm layers changed; which ones is not said."""

    changed: int
    unchanged: int
    gone: int
    new: int

    def __str__(self) -> str:
        parts = [f"{self.changed} changed, {self.unchanged} unchanged"]
        parts += [f"{self.gone} gone"] if self.gone else []
        parts += [f"{self.new} new"] if self.new else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Difference:
    """What changed in norm layers; false, and of length 0, when nothing did.

    Args:
        layers: The number of layers compared.
        tensors: The number of tensors compared.
        changes: Every tensor and switch that changed, in the order of the layers.
        gone: Paths at which there was a norm layer and is none.
        new: Paths of layers that were not there.
        others: Tensors outside of norm layers, of checkpoints; they do not count as a difference.
    """

    layers: int
    tensors: int
    changes: tuple[Change, ...]
    gone: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    others: Others | None = None

    def __len__(self) -> int:
        return len(self.changes) + len(self.gone) + len(self.new)

    def document(self) -> Document:
        """Return the difference as a document."""
        tensors = [change for change in self.changes if isinstance(change, TensorChange)]
        switches = [change for change in self.changes if isinstance(change, SwitchChange)]
        blocks: list[Block] = []
        if tensors:
            blocks += [Line(""), _tensor_table(tensors)]
        if switches:
            blocks += [Line(""), _switch_table(switches)]
        for name, paths in (("gone", self.gone), ("new", self.new)):
            if paths:
                blocks += [Line(""), Line(f"{name}: {', '.join(map(shown, paths))}")]
        if self.others is not None and self.others != Others(0, 0, 0, 0):
            blocks += [Line(""), Line(f"other tensors: {self.others}")]
        return Document(self._title(), tuple(blocks))

    def _title(self) -> str:
        compared = count(self.layers, "norm layer")
        if not self:
            return f"no difference, bit for bit: {compared}, {count(self.tensors, 'tensor')}"
        changed = {change.path for change in self.changes}
        parts = [f"{len(changed)} of {compared} changed"]
        parts += [f"{len(self.gone)} gone"] if self.gone else []
        parts += [f"{len(self.new)} new"] if self.new else []
        return f"{count(len(self), 'difference')}: {', '.join(parts)}"

    def __str__(self) -> str:
        return text.write(self.document())

    def to_json(self) -> str:
        """Return the difference as JSON."""
        return json.dumps(self)


def diff_states(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Difference:
    """Compare the norm layers of two state dicts, bit for bit.

    A norm layer is recognised by its keys: a prefix with `running_mean` and `running_var` in
    either state. Layers without running statistics count among the other tensors, which are only
    counted. Wrapper prefixes (``module.``, ``_orig_mod.``) do not matter, nor does the device.

    Args:
        a: The state before, of `state_dict()` or `read_state`.
        b: The state after.

    Returns:
        What changed, naming layer, tensor, channel and size.

    Example:
        An audit that compares the average of each tensor passes here: two channels have changed
        places.

        >>> import torch
        >>> a = {"bn.running_mean": torch.tensor([1.0, 3.0]), "bn.running_var": torch.ones(2)}
        >>> b = {"bn.running_mean": torch.tensor([3.0, 1.0]), "bn.running_var": torch.ones(2)}
        >>> bool(a["bn.running_mean"].mean() == b["bn.running_mean"].mean())
        True
        >>> print(diff_states(a, b))
        1 difference: 1 of 1 norm layer changed
        <BLANKLINE>
        layer  tensor        changed  channel  before  after    by
        bn     running_mean   2 of 2        0       1      3  2.00

    Averages also hide a change in one of many channels below their rounding, one that others
    make up for, and everything that is not a tensor: with momentum 0 all tensors stand still while
    the layer normalises by the batch. `Snapshot.verify` checks that too.
    """
    a, b = clean_keys(a), clean_keys(b)
    prefixes = tuple(dict.fromkeys((*norm_prefixes(a), *norm_prefixes(b))))
    before, after = _recorded(a, prefixes), _recorded(b, prefixes)
    in_norms = {dotted(r.path, name) for r in (*before, *after) for name in r.tensors}
    rest_a = {key: tensor for key, tensor in a.items() if key not in in_norms}
    rest_b = {key: tensor for key, tensor in b.items() if key not in in_norms}
    return diff_layers(before, after, others=_others(rest_a, rest_b))


def diff_layers(
    before: Iterable[Recorded], after: Iterable[Recorded], others: Others | None = None
) -> Difference:
    """Compare recorded layers path by path; the paths of a layer with several are all looked at."""
    before, after = tuple(before), tuple(after)
    now = {path: layer for layer in after for path in layer.paths}
    then = {path: layer for layer in before for path in layer.paths}
    found = list[Change]()
    layers = tensors = 0
    for layer in before:
        # One layer, unless what was registered twice has become two.
        standing = {id(now[path]): path for path in reversed(layer.paths) if path in now}
        for path in reversed(standing.values()):
            layers, tensors = layers + 1, tensors + len(layer.tensors)
            found += changes(layer, now[path], path)
    return Difference(
        layers,
        tensors,
        tuple(found),
        gone=tuple(path for path in then if path not in now),
        new=tuple(layer.path for layer in after if not any(path in then for path in layer.paths)),
        others=others,
    )


def _recorded(state: Mapping[str, Tensor], prefixes: Iterable[str]) -> list[Recorded]:
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    layers = (
        Recorded((prefix,), {n: state[key] for n in names if (key := dotted(prefix, n)) in state})
        for prefix in prefixes
    )
    return [layer for layer in layers if layer.tensors]


def _others(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Others:
    both = [key for key in a if key in b]
    unchanged = sum(same_bits(_plain(a[key]), _plain(b[key])) for key in both)
    return Others(
        changed=len(both) - unchanged,
        unchanged=unchanged,
        gone=len(a) - len(both),
        new=len(b) - len(both),
    )


def _plain(tensor: Tensor) -> Tensor:
    """Return the tensor dense and on the CPU."""
    return (tensor.dequantize() if tensor.is_quantized else tensor.to_dense()).cpu()


def _tensor_table(found: list[TensorChange]) -> Table:
    header = ("layer", "tensor", "changed", "channel", "before", "after", "by", "")
    rows = tuple(
        (
            shown(change.path),
            change.tensor,
            f"{change.changed} of {change.of}" if change.of else "",
            "" if change.channel is None else str(change.channel),
            figure(change.before),
            figure(change.after),
            _by(change.size),
            change.note,
        )
        for change in found
    )
    noted = any(change.note for change in found)
    width = len(header) if noted else len(header) - 1
    return Table(header[:width], tuple(row[:width] for row in rows), "llrrrrrl"[:width])


def _by(size: float | None) -> str:
    if size is None:
        return ""
    if size == 0:
        return "bits"
    return str(size) if isinstance(size, int) else number(size)


def _switch_table(found: list[SwitchChange]) -> Table:
    """One row per kind of change: a switch is usually thrown on many layers at once."""
    kinds = Counter((c.switch, str(c.before), str(c.after)) for c in found)
    first = {(c.switch, str(c.before), str(c.after)): shown(c.path) for c in reversed(found)}
    return Table(
        ("layer", "switch", "before", "after"),
        tuple(
            (first[kind] + (f" and {n - 1} more" if n > 1 else ""), *kind)
            for kind, n in kinds.items()
        ),
        "llll",
    )
