"""Training steps as people write them, for the tests of the rules that read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from diagnosis.nets import conv_net, data, estimated
from stillnorm.diagnosis.evidence.request import Request
from stillnorm.diagnosis.training_step.step import Step, run_step
from stillnorm.norms import find_norms

TrainStep = Callable[[nn.Module, Any], object]


def loss_of(output: Tensor) -> Tensor:
    """A loss that needs no target and has a gradient everywhere."""
    return (output - 0.5).square().mean()


def sgd(net: nn.Module, lr: float = 0.1, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD((p for p in net.parameters() if p.requires_grad), lr=lr, **options)


def plain(optimizer: torch.optim.Optimizer, forward: Any = None) -> TrainStep:
    """Zero, forward, backward, step."""

    def train_step(model: nn.Module, x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of((forward or nn.Module.__call__)(model, x))
        loss.backward()
        optimizer.step()
        return loss.detach()

    return train_step


def checkpointed(optimizer: torch.optim.Optimizer, reentrant: bool, **options: Any) -> TrainStep:
    """The whole model recomputed in backward."""

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        x = x.requires_grad_() if reentrant else x
        return checkpoint(model, x, use_reentrant=reentrant, **options)

    return plain(optimizer, forward)


def checkpointed_in_parts(optimizer: torch.optim.Optimizer, reentrant: bool) -> TrainStep:
    def forward(model: nn.Sequential, x: Tensor) -> Tensor:
        return checkpoint_sequential(model, 3, x.requires_grad_(), use_reentrant=reentrant)

    return plain(optimizer, forward)


def accumulating(
    optimizer: torch.optim.Optimizer, parts: int = 2, set_to_none: bool = True
) -> TrainStep:
    """One optimizer step on several micro-batches."""

    def train_step(model: nn.Module, x: Tensor) -> None:
        optimizer.zero_grad(set_to_none)
        for part in x.chunk(parts):
            (loss_of(model(part)) / parts).backward()
        optimizer.step()

    return train_step


def siamese(optimizer: torch.optim.Optimizer) -> TrainStep:
    """Two forwards, one loss."""

    def train_step(model: nn.Module, x: Tensor) -> None:
        optimizer.zero_grad()
        a, b = x.chunk(2)
        (model(a) - model(b)).square().mean().backward()
        optimizer.step()

    return train_step


def multi_crop(optimizer: torch.optim.Optimizer) -> TrainStep:
    """Two large crops, four small ones, one loss."""

    def train_step(model: nn.Module, x: Tensor) -> None:
        optimizer.zero_grad()
        crops = [x, x.flip(3), *(x[:, :, i : i + 4, i : i + 4] for i in range(4))]
        outputs = [model(crop) for crop in crops]
        sum(loss_of(output) for output in outputs).backward()
        optimizer.step()

    return train_step


def sam(optimizer: torch.optim.Optimizer, quietly: Any = None, data: bool = False) -> TrainStep:
    """Sharpness-aware minimisation; `quietly(model)` is entered around its second forward.

    With `data` the weights are put back by assignment, as davda54/sam does.
    """

    def train_step(model: nn.Module, x: Tensor) -> None:
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        weights = [p for p in model.parameters() if p.grad is not None]
        before = [p.detach().clone() for p in weights]
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in weights]).norm()
            for p in weights:
                p.add_(0.05 * p.grad / (norm + 1e-12))
        optimizer.zero_grad()
        if quietly is None:
            loss_of(model(x)).backward()
        else:
            with quietly(model):
                loss_of(model(x)).backward()
        with torch.no_grad():
            for p, value in zip(weights, before, strict=True):
                if data:
                    p.data = value
                else:
                    p.copy_(value)
        optimizer.step()

    return train_step


def attacking(optimizer: torch.optim.Optimizer, by_backward: bool, steps: int = 2) -> TrainStep:
    """Adversarial training: forwards that look for the worst input, then the one that trains."""

    def train_step(model: nn.Module, x: Tensor) -> None:
        attacked = x.clone()
        for _ in range(steps):
            attacked = attacked.detach().requires_grad_()
            loss = loss_of(model(attacked))
            if by_backward:
                loss.backward()
                direction = attacked.grad
            else:
                (direction,) = torch.autograd.grad(loss, attacked)
            attacked = attacked + 0.1 * direction.sign()
        optimizer.zero_grad()
        loss_of(model(attacked.detach())).backward()
        optimizer.step()

    return train_step


def virtual_adversarial(optimizer: torch.optim.Optimizer) -> TrainStep:
    """VAT: targets under no_grad, a direction by autograd.grad, then both losses."""

    def train_step(model: nn.Module, x: Tensor) -> None:
        with torch.no_grad():
            target = model(x)
        d = torch.randn_like(x).requires_grad_()
        (direction,) = torch.autograd.grad((model(x + 0.1 * d) - target).square().mean(), d)
        optimizer.zero_grad()
        loss = loss_of(model(x)) + (model(x + direction.sign()) - target).square().mean()
        loss.backward()
        optimizer.step()

    return train_step


def validating(optimizer: torch.optim.Optimizer, quietly: Any = None) -> TrainStep:
    """A plain step and then a look at the loss under no_grad."""
    step = plain(optimizer)

    def train_step(model: nn.Module, x: Tensor) -> None:
        step(model, x)
        with torch.no_grad():
            if quietly is None:
                model(x)
            else:
                with quietly(model):
                    model(x)

    return train_step


def penalised(optimizer: torch.optim.Optimizer, steps: bool = True) -> TrainStep:
    """WGAN-GP's critic: the norm of each sample's input gradient."""

    def train_step(model: nn.Module, x: Tensor) -> None:
        optimizer.zero_grad()
        x = x.detach().requires_grad_()
        score = model(x)
        (grad,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        penalty = (grad.flatten(1).norm(dim=1) - 1).square().mean()
        (score.mean() + 10 * penalty).backward()
        optimizer.step()

    return train_step


class Both(nn.Module):
    """A generator and a discriminator."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
        self.discriminator = conv_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.discriminator(self.generator(x))


def gan_step(model: Both) -> tuple[TrainStep, list[torch.optim.Optimizer]]:
    """The usual order: the discriminator on real and on fake samples, then the generator."""
    optimizers = [torch.optim.Adam(p.parameters()) for p in (model.generator, model.discriminator)]
    generator, discriminator = optimizers

    def train_step(model: Both, x: Tensor) -> None:
        discriminator.zero_grad()
        fake = model.generator(torch.randn_like(x))
        loss_of(model.discriminator(x)).backward()
        loss_of(model.discriminator(fake.detach())).backward()
        discriminator.step()
        generator.zero_grad()
        loss_of(model.discriminator(fake)).backward()
        generator.step()

    return train_step, optimizers


def uncoupled() -> list[Any]:
    """Steps that take unusual gradients, but no sample's through batch statistics."""

    def meta(model: nn.Module, x: Tensor) -> None:
        """MAML: gradients of weights, and of weights that a step has made."""
        names, weights = zip(*model.named_parameters(), strict=True)
        for _ in range(2):
            output = torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (x,))
            grads = torch.autograd.grad(loss_of(output), weights, create_graph=True)
            weights = [w - 0.1 * g for w, g in zip(weights, grads, strict=True)]
        output = torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (x,))
        loss_of(output).backward()

    def attack(model: nn.Module, x: Tensor) -> None:
        x.requires_grad_()
        torch.autograd.grad(model(x).sum(), x)

    def in_eval(model: nn.Module, x: Tensor) -> None:
        x.requires_grad_()
        torch.autograd.grad(model.eval()(x).sum(), x, create_graph=True)

    return [meta, attack, in_eval]


class WithTeacher(nn.Module):
    """A student, and an average of it that makes the targets in train mode (BYOL, MoCo)."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = (
            estimated(conv_net()).train(),
            estimated(conv_net()).train().requires_grad_(False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.student(x)


def distilling(model: WithTeacher) -> TrainStep:
    optimizer = torch.optim.SGD(model.student.parameters(), lr=0.1)

    def train_step(model: WithTeacher, x: Tensor) -> None:
        with torch.no_grad():
            target = model.teacher(x)
        optimizer.zero_grad()
        (model.student(x) - target).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            pairs = zip(model.teacher.parameters(), model.student.parameters(), strict=True)
            for average, new in pairs:
                average.lerp_(new, 0.01)

    return train_step


def seen(net: nn.Module, train_step: Any, x: Any = None, **given: Any) -> Step:
    x = data(16) if x is None else x
    return run_step(Request(net, x, train_step=train_step, **given), x, find_norms(net))


def net_() -> nn.Sequential:
    return estimated(conv_net()).train()
