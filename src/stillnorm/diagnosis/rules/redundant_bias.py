"""SN204: a bias that the norm after it takes away."""

from __future__ import annotations

from collections.abc import Iterator

from stillnorm.diagnosis.evidence import CannotTell, Evidence
from stillnorm.diagnosis.finding import Finding, Fix
from stillnorm.diagnosis.rule import Rule
from stillnorm.errors import StillnormError
from stillnorm.repair.bias import Absorbable, absorbable_biases
from stillnorm.reports.numbers import count
from stillnorm.tracing import call, first_line


class RedundantBias(Rule):
    """A convolution or linear layer has a bias, and a norm that takes it away again follows.

    What it finds:
        Biases of convolutions, transposed convolutions and linear layers whose output goes to one
        norm and nowhere else, in both modes, where that norm normalises by the batch in train mode.

    Why it matters:
        The norm subtracts the mean, and the bias with it: in train mode its gradient is zero up to
        rounding, and its values are those of the start, or what weight decay made of them. It costs
        a parameter and optimizer state for each channel, and a running mean of a large offset.

    When it is fine:
        It is waste, not a fault. Not reported: biases before frozen norms, where they act and
        learn; outputs that something else uses too; layers that are used more than once.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> check(net, torch.randn(64, 4), select="SN204").findings[0].evidence["biases"]
        {'0': '1'}

    Fix:
        `sn.repair.absorb_bias(model, batch)` subtracts it from the running mean and removes it
        (unsafe: a key leaves the `state_dict`, and an optimizer keeps an orphan). Both modes
        compute what they did, up to rounding. In new code, `bias=False`.

    References:
        Ioffe & Szegedy, "Batch Normalization", arXiv 1502.03167, section 3.2;
        milesial/Pytorch-UNet#325; matterport/Mask_RCNN#1455.
    """

    code = "SN204"
    slug = "redundant-bias"
    severity = "info"
    needs = ("forward",)

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names the norms."""
        trains = {x.module: x for x in evidence.layers if evidence.trains_by_batch(x)}
        found = [one for one in _absorbable(evidence) if one.norm.module in trains]
        if not found:
            return
        layers = evidence.in_order([trains[one.norm.module] for one in found])
        paths = tuple(dict.fromkeys(layer.path for layer in layers))
        values = sum(one.bias.numel() for one in found)
        yield self.finding(
            paths,
            f"{count(len(found), 'bias')} before norms, {values} values, do nothing in training",
            evidence={"biases": {one.path: one.norm.path for one in found}, "values": values},
            help="sn.repair.absorb_bias(model, batch); in new code, bias=False",
            fix=Fix("absorb the biases", "unsafe", "absorb", paths),
            where=evidence.where(*layers),
        )


def _absorbable(evidence: Evidence) -> tuple[Absorbable, ...]:
    """Ask the repair itself, so that it does not refuse what is found."""
    runs = evidence.measured
    try:
        found, _ = absorbable_biases(
            evidence.model,
            runs.batches[0],
            forward=lambda model, batch: call(model, batch, runs.forward),
        )
    except StillnormError as error:
        raise CannotTell(error.fact) from error
    except Exception as error:  # a model that wants targets in train mode
        reason = f"the model cannot be called in train mode: {first_line(error)}"
        raise CannotTell(reason) from error
    return found
