"""SN304: the optimizer still has what the model has lost."""

from __future__ import annotations

from collections.abc import Iterator

from stillnorm.diagnosis.evidence import CannotTell, Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.rule import Rule
from stillnorm.diagnosis.training_step.orphans import find_strangers
from stillnorm.reports.numbers import count

SHOWN = 4


class OrphanedParameter(Rule):
    """The optimizer holds parameters that the model had and has no longer.

    What it finds:
        Parameters of the optimizer that are not the model's and that were: its names or its order
        show their place. Either the model has others there now, of those names or like them in
        shape, which no group holds; or a norm stood there: a weight and a bias with an element for
        each output of the layer before, between two parameters of the model.

        Where nothing shows whose they are (a second network, the temperature of a loss), the rule
        says that it cannot tell.

    Why it matters:
        No step trains the new parameters, and nothing says so. The old ones and their moments stay
        in memory, are decayed, and make a state dict that fits no new optimizer.

    When it is fine:
        When another optimizer trains what stands there now. Not reported: parameters of other
        modules; `nn.ModuleList([model, loss])` as the model has them looked at too.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> net[1] = nn.GroupNorm(2, 8)
        >>> check(net, optimizer=optimizer).findings[0].evidence["untrained"]
        ('1.weight', '1.bias')

    Fix:
        Advice: `sn.repair.repair_optimizer(model, optimizer)` removes what is not the model's, with
        its state, and names what is missing, for `optimizer.add_param_group`. Or make the optimizer
        when the model is complete.

    References:
        mosaicml/composer#43 (model surgery after the optimizer was made); FasterAI-Labs/fasterai#92
        and microsoft/nni#4521 (pruned layers no longer train); pytorch/pytorch#54765.
    """

    code = "SN304"
    slug = "orphaned-parameter"
    severity = "warning"
    needs = ("optimizer",)

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding about all parameters that were the model's."""
        optimizer = evidence.request.optimizer
        if optimizer is None:
            raise CannotTell("needs optimizer=")
        seen = find_strangers(evidence.model, optimizer)
        orphans = seen.orphans
        if not seen.own:
            raise CannotTell("the optimizer holds no parameter of this model")
        if not orphans and seen.unknown:
            raise CannotTell(
                f"{count(seen.unknown, 'parameter')} of the optimizer are not the model's, and "
                "nothing shows whether they were"
            )
        if not orphans:
            return
        untrained = tuple(x.heir for x in orphans if x.heir is not None)
        yield self.finding(
            tuple(dict.fromkeys(x.place for x in orphans)),
            f"the optimizer holds {count(len(orphans), 'parameter')} that the model no longer has",
            evidence={
                "orphans": len(orphans),
                "with_state": sum(x.parameter in optimizer.state for x in orphans),
                "untrained": untrained,
                "unknown": seen.unknown,
            },
            note=f"in their place, in no group: {_listed(untrained)}" if untrained else "",
            help="sn.repair.repair_optimizer(model, optimizer)"
            + (", then optimizer.add_param_group for what is new" if untrained else ""),
        )


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
