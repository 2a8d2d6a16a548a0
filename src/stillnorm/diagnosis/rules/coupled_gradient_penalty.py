"""SN311: the gradient of one sample's input, through its batch mates."""

from __future__ import annotations

from collections.abc import Iterator

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.rule import Rule
from stillnorm.reports.numbers import count


class CoupledGradientPenalty(Rule):
    """Gradients of each sample's input are taken through statistics that the samples share.

    What it finds:
        Layers that normalise by the batch and lie between an output and an input of which a
        training step takes the gradient with `torch.autograd.grad(..., create_graph=True)`: a
        gradient penalty (WGAN-GP, R1), or the derivatives of a physics-informed network.

    Why it matters:
        Such a loss is about each sample's own gradient. Through batch statistics the output of a
        sample depends on every input, so the gradient of a sum is not that of the sample. Measured:
        a Jacobian of 0.17 across samples, and of 0 with LayerNorm or in eval mode.

    When it is fine:
        When the penalty is about the batch as a whole. Not reported: gradients of parameters and of
        weights that a step has computed (meta-learning), gradients without a graph (attacks,
        saliency), layers in eval mode or held, and instance norms.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        >>> def train_step(model, x):
        ...     score = model(x.requires_grad_())
        ...     (grad,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        ...     (score.mean() + (grad.norm(dim=1) - 1).square().mean()).backward()
        >>> report = check(net, torch.randn(64, 4), train_step=train_step, select="SN311")
        >>> report.findings[0].paths
        ('1',)

    Fix:
        None that stillnorm could apply without changing the model: ``sn.replace(model, "layer")``
        before training.

    References:
        Gulrajani et al., "Improved Training of Wasserstein GANs", arXiv 1704.00028, section 4: "we
        omit batch normalization in the critic"; junyanz/pytorch-CycleGAN-and-pix2pix#513;
        jiamings/wgan#1.
    """

    code = "SN311"
    slug = "coupled-gradient-penalty"
    severity = "warning"
    needs = ("step",)
    preview = True

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names every such layer."""
        step = evidence.step
        layers = [layer for layer in evidence.layers if layer in step.coupled]
        if not layers:
            return
        yield self.finding(
            tuple(layer.path for layer in layers),
            "per-sample gradients of the input are taken through the batch statistics of "
            f"{count(len(layers), 'layer')}",
            evidence={"layers": len(layers)},
            help='sn.replace(model, "layer"), or "group", before training',
            where=step.where([call for layer in layers for call in step.of(layer)]),
        )
