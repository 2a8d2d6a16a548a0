"""The exact copy of a model's norm state, and what can be done with it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from stillnorm.norms import Layers, find_norms
from stillnorm.reports.numbers import count
from stillnorm.state.diff import Difference, diff_layers
from stillnorm.state.files import StrPath
from stillnorm.state.record import Recorded, record
from stillnorm.state.restore import restore
from stillnorm.state.snapshot_file import read_snapshot, write_snapshot
from stillnorm.state.verify import verify


def snapshot(model: nn.Module) -> Snapshot:
    """Copy the state of every norm layer: tensors, switches, holds.

    Paths leave out the components of wrappers, so that a snapshot of the bare model fits the one
    wrapped by DistributedDataParallel or `torch.compile`, and the other way round.

    Args:
        model: The model. It is only looked at.

    Returns:
        The copy, on the CPU.

    Raises:
        StateError: A tensor is on the meta device and has no value.

    Cost:
        Four vectors of C elements per layer.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))
        >>> before = snapshot(net)
        >>> _ = net(torch.randn(8, 2))
        >>> [change.tensor for change in before.diff(net).changes]
        ['running_mean', 'running_var', 'num_batches_tracked']
        >>> _ = before.restore(net)
        >>> bool(before.diff(net))
        False
    """
    return Snapshot(tuple(record(norm) for norm in find_norms(model)))


@dataclass(frozen=True, eq=False, repr=False)
class Snapshot:
    """The norm state of a model at one moment; `snapshot` takes it.

    Of a sharded model (FSDP2) every process must call each of the methods.

    Args:
        layers: What was recorded of each layer, in registration order.
    """

    layers: tuple[Recorded, ...]

    def diff(self, model: nn.Module) -> Difference:
        """Return everything that changed since, bit for bit.

        Compared are all tensors (by their bits: -0 is not 0, and one NaN is not another) and all
        switches, `training` included, whose change may well be intended: `verify` says whether a
        change matters. A held layer's `training` stands still. Devices are not compared.

        Args:
            model: The same model, or one with the same paths. It is only looked at.

        Returns:
            The changes; false when there are none.

        Raises:
            StateError: A tensor is on the meta device and has no value.

        Example:
            >>> net = nn.Sequential(nn.BatchNorm1d(4))
            >>> before = snapshot(net)
            >>> net[0].momentum = 0.5
            >>> print(before.diff(net))
            1 difference: 1 of 1 norm layer changed
            <BLANKLINE>
            layer  switch    before  after
            0      momentum  0.1     0.5
        """
        return diff_layers(self.layers, snapshot(model).layers)

    def verify(self, model: nn.Module, layers: Layers = None) -> None:
        """Prove that layers are frozen: raise unless they are as recorded and nothing moves them.

        A layer passes when

        - the bits of its running statistics, of `num_batches_tracked` and of its affine parameters
          are those recorded, or exactly their cast where the model has been cast (`.half()`);
        - `momentum`, `eps` and `track_running_stats` are those recorded;
        - `requires_grad` of weight and bias has not been switched on;
        - it would neither normalise by the batch nor update statistics, as it stands now and after
          `model.train()`: it is held, or another library's frozen layer, or the model's own
          `train()` keeps it in eval mode. Momentum 0 is not enough: the statistics stand still,
          and the layer normalises by the batch;
        - if it was held, it still is. `convert_sync_batchnorm` and `torch.jit.script` undo a hold;
        - it is in the model, and in the snapshot.

        The snapshot may be taken before or after `freeze`: that a layer has been held since, that
        `requires_grad` has been switched off, and that `train()` and `eval()` have been called is
        no fault. Affine parameters that learn by choice (held with ``affine="trains"`` when
        recorded or, if it was not held then, now) may move.

        Not checked: weights outside of norm layers, devices, hooks, what a forward patched over
        the layer's own does, whether ``layer.train()`` on a layer that only the model's `train()`
        keeps in eval would thaw it, and whether the statistics suit the data (`sn.check`).

        Args:
            model: The same model, or one with the same paths. It is only looked at.
            layers: Which layers; see `select`. Layers that were selected so when recorded and have
                gone since are named, too.

        Raises:
            VerifyError: A layer does not pass; the message names the first with tensor, channel
                and size of the change or the switch, and counts the others.
            SelectorError: `layers` matches nothing.
            StateError: A tensor is on the meta device and has no value.

        Example:
            Momentum 0 and no gradients: the thread's averages agree, its results do not.

            >>> net = nn.Sequential(nn.BatchNorm1d(4, momentum=0)).requires_grad_(False)
            >>> before = snapshot(net)
            >>> before.verify(net)
            Traceback (most recent call last):
            ...
            stillnorm.errors.VerifyError: 0: would normalise by the batch in train(): momentum 0
            stops only the updates
              help: ...
        """
        verify(self.layers, model, layers)

    def restore(self, model: nn.Module) -> Difference:
        """Put tensors, switches and holds back, all or nothing.

        Layers that were held then are held again in the same way, and those that were not are
        released. Layers that the snapshot does not have are left alone; so are a layer's class
        other than by holding, gradients, and hooks.

        Args:
            model: The same model, or one with the same paths.

        Returns:
            What differed, and is now as recorded.

        Raises:
            StateError: A layer cannot be what was recorded: it is gone, has other shapes, or
                cannot be held or released. Nothing has changed.

        Mutates:
            The tensors that differ, in place (`copy_`; identity, device and dtype stay, so that a
            model cast since gets the cast of what was recorded); the switches and holds that
            differ. On any exception nothing but version counters.

        Example:
            >>> net = nn.Sequential(nn.BatchNorm1d(4))
            >>> before = snapshot(net)
            >>> _ = net[0].running_var.mul_(2)
            >>> len(before.restore(net).changes), float(net[0].running_var.sum())
            (1, 4.0)
        """
        return restore(self.layers, model)

    def save(self, path: StrPath) -> None:
        """Write the snapshot to a safetensors file, whole or not at all.

        Its tensors have the keys of a `state_dict`, so that ``stillnorm diff`` reads it too.

        Args:
            path: Where to; `.safetensors` by convention.

        Raises:
            FileFormatError: The file cannot be written; what was there is still there.
        """
        write_snapshot(path, self.layers)

    @classmethod
    def load(cls, path: StrPath) -> Snapshot:
        """Read a snapshot that `save` wrote.

        Args:
            path: The file.

        Returns:
            The snapshot, with the bits that were saved.

        Raises:
            FileFormatError: The file is missing, damaged, or no snapshot.

        Example:
            >>> import tempfile
            >>> net = nn.Sequential(nn.BatchNorm1d(4))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     snapshot(net).save(f"{folder}/norms.safetensors")
            ...     bool(Snapshot.load(f"{folder}/norms.safetensors").diff(net))
            False
        """
        return cls(read_snapshot(path))

    def __repr__(self) -> str:
        held = sum(layer.hold is not None for layer in self.layers)
        return f"Snapshot({count(len(self.layers), 'norm layer')}, {held} held)"
