"""SN001: fires on a frozen backbone whose statistics move, and on nothing that must move."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diagnosis import steps
from diagnosis.nets import batches, conv_net, data, estimated, found
from stillnorm import check, freeze, is_frozen
from stillnorm.diagnosis import Finding
from support.zoo import torchvision


class Pair(nn.Module):
    """Two named parts, called one after the other in the order given."""

    def __init__(self, order: str, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.calls = order.split()

    def forward(self, x: Tensor) -> Tensor:
        for name in self.calls:
            x = getattr(self, name)(x)
        return x


def backbone() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())


def head() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def test_a_frozen_backbone_before_a_head_drifts() -> None:
    net = Pair("backbone head", backbone=frozen(backbone()), head=head())
    assert found(check(net, select="SN001")) == {"SN001": ("backbone.1",)}


def test_the_drift_that_it_warns_of_is_real() -> None:
    """The near miss of the near misses: parameters bit-equal, features moved."""
    net = Pair("backbone head", backbone=frozen(backbone()), head=head())
    before = net.backbone.eval()(data())
    net.train()(data(seed=5))
    assert not torch.equal(before, net.backbone.eval()(data()))


def test_the_first_layers_of_a_flat_network_drift() -> None:
    net = conv_net()
    frozen(net[:3])
    assert found(check(net, select="SN001")) == {"SN001": ("1",)}


def test_a_partly_frozen_resnet_is_named_up_to_where_it_trains() -> None:
    net = torchvision.models.resnet18(num_classes=4)
    for part in (net.conv1, net.bn1, net.layer1):
        frozen(part)
    paths = found(check(net, select="SN001"))["SN001"]
    assert paths == ("bn1", *(f"layer1.{i}.bn{j}" for i in (0, 1) for j in (1, 2)))


def test_a_head_registered_first_is_no_excuse_when_the_forward_is_seen() -> None:
    net = Pair("backbone head", head=head(), backbone=frozen(backbone()))
    assert found(check(net, batches(), select="SN001")) == {"SN001": ("backbone.1",)}


def test_a_norm_without_affine_parameters_drifts_with_its_frozen_producer() -> None:
    net = conv_net(affine=False)
    frozen(net[0])
    assert found(check(net, select="SN001")) == {"SN001": ("1",)}


class TestNearMisses:
    def silent(self, net: nn.Module) -> None:
        assert found(check(net, select="SN001")) == {}
        assert found(check(net, batches(), select="SN001")) == {}

    def test_a_model_that_trains(self) -> None:
        self.silent(conv_net())

    def test_a_teacher_is_frozen_whole(self) -> None:
        self.silent(frozen(conv_net()))

    @pytest.mark.parametrize("names", [("student", "teacher"), ("teacher", "student")])
    def test_a_teacher_beside_its_student(self, names: tuple[str, str]) -> None:
        class Both(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                for name in names:
                    setattr(self, name, conv_net())
                frozen(self.teacher)

            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                return tuple(getattr(self, name)(x) for name in names)

        self.silent(Both())

    @pytest.mark.parametrize("first", ["generator", "discriminator"])
    def test_a_discriminator_between_its_steps(self, first: str) -> None:
        """Its input is what the generator makes, so its statistics have to move."""
        parts = {"generator": backbone(), "discriminator": frozen(head_with_norm())}
        if first == "discriminator":
            parts = dict(reversed(parts.items()))
            net = Pair("generator discriminator", **parts)
            assert found(check(net, batches(), select="SN001")) == {}
        else:
            self.silent(Pair("generator discriminator", **parts))

    def test_affine_false_while_everything_trains(self) -> None:
        self.silent(conv_net(affine=False))

    def test_norms_frozen_alone_while_their_producers_train(self) -> None:
        net = conv_net()
        for layer in (net[1], net[4]):
            frozen(layer)
        self.silent(net)

    def test_norms_that_train_alone(self) -> None:
        net = frozen(conv_net())
        for layer in (net[1], net[4]):
            layer.requires_grad_(True)
        self.silent(net)

    def test_a_normalised_input_without_parameters(self) -> None:
        self.silent(nn.Sequential(nn.BatchNorm2d(3, affine=False), *conv_net()))

    def test_a_held_backbone(self) -> None:
        net = estimated(conv_net())
        frozen(net[:3])
        freeze(net, "1")
        self.silent(net)

    def test_instance_norm_does_not_depend_on_the_batch(self) -> None:
        net = conv_net()
        net[1] = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
        frozen(net[:3])
        self.silent(net)


def head_with_norm() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def test_the_fix_holds_what_was_frozen_and_the_finding_is_gone() -> None:
    net = estimated(conv_net()).train()
    frozen(net[:3])
    before = net.eval()(data())
    check(net.train(), select="SN001").fix()
    assert found(check(net, select="SN001")) == {}
    assert is_frozen(net, "1")
    assert not is_frozen(net, "4")
    assert torch.equal(before, net.eval()(data()))


class TestWithAStep:
    """What trains is what the step trains, and the movement is proved."""

    def of(self, net: nn.Module, step: steps.TrainStep, **given: object) -> list[Finding]:
        report = check(net, data(16), train_step=step, select="SN001", **given)
        assert not report.crashed
        return list(report.findings)

    def test_frozen_by_flags(self) -> None:
        net = estimated(conv_net()).train()
        frozen(net[:3])
        (finding,) = self.of(net, steps.plain(steps.sgd(net)))
        assert finding.severity == "error"
        assert finding.paths == ("1",)
        assert finding.fix.applicability == "safe"
        assert finding.evidence["moved"] > 0
        assert finding.message.startswith("1 layer is frozen by requires_grad alone: one training")

    def test_a_backbone_under_no_grad(self) -> None:
        net = estimated(conv_net()).train()
        optimizer = steps.sgd(net)

        def step(model: nn.Module, x: Tensor) -> None:
            optimizer.zero_grad()
            with torch.no_grad():
                x = model[:3](x)
            steps.loss_of(model[3:](x)).backward()
            optimizer.step()

        (finding,) = self.of(net, step)
        assert finding.paths == ("1",)
        assert finding.severity == "error"
        assert finding.fix.applicability == "unsafe"

    def test_no_grad_inside_the_forward(self) -> None:
        class Probe(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.backbone, self.head = estimated(backbone()), head()

            def forward(self, x: Tensor) -> Tensor:
                with torch.no_grad():
                    x = self.backbone(x)
                return self.head(x)

        net = Probe().train()
        (finding,) = self.of(net, steps.plain(steps.sgd(net)))
        assert finding.paths == ("backbone.1",)

    def test_a_learning_rate_of_zero(self) -> None:
        net = estimated(conv_net()).train()
        groups = [{"params": net[:3].parameters(), "lr": 0}, {"params": net[3:].parameters()}]
        (finding,) = self.of(net, steps.plain(torch.optim.SGD(groups, lr=0.1)))
        assert finding.paths == ("1",)

    def test_parameters_that_the_optimizer_does_not_hold(self) -> None:
        net = estimated(conv_net()).train()
        optimizer = steps.sgd(net[3:])
        step = steps.plain(optimizer)
        (finding,) = self.of(net, step, optimizer=optimizer)
        assert finding.paths == ("1",)
        # Another optimizer may hold them, which a generator's step has not called.
        assert self.of(net, step) == []
        assert self.of(net, step, optimizer=optimizer, restore=[steps.sgd(net[:3])]) == []

    def test_the_fix(self) -> None:
        net = estimated(conv_net()).train()
        optimizer = steps.sgd(net[3:])
        given = {"train_step": steps.plain(optimizer), "optimizer": optimizer, "select": "SN001"}
        check(net, data(16), **given).fix(unsafe=True)
        assert is_frozen(net, "1")
        assert found(check(net, data(16), **given)) == {}

    def test_a_resnet_and_its_fix(self) -> None:
        x = torch.randn(4, 3, 32, 32)
        net = estimated(torchvision.models.resnet18(num_classes=4), x)
        for part in (net.conv1, net.bn1, net.layer1):
            frozen(part)
        step = steps.plain(steps.sgd(net))
        report = check(net, x, train_step=step, select="SN001")
        assert report.findings[0].paths[0] == "bn1"
        assert len(report.findings[0].paths) == 5
        report.fix()
        assert found(check(net, x, train_step=step, select="SN001")) == {}

    def test_a_step_that_keeps_the_backbone_in_eval_does_not_move_it(self) -> None:
        net = estimated(conv_net()).train()
        frozen(net[:3])
        once = steps.plain(steps.sgd(net))

        def step(model: nn.Module, x: Tensor) -> None:
            model[1].eval()
            once(model, x)

        assert self.of(net, step) == []

    def test_a_step_that_trains_nothing_leaves_it_to_the_flags(self) -> None:
        net = estimated(conv_net()).train()
        frozen(net[:3])
        (finding,) = self.of(net, lambda model, x: model(x))
        assert finding.severity == "warning"
        assert finding.evidence["moved"] is None

    def test_a_warm_up_from_zero_trains_nothing(self) -> None:
        net = estimated(conv_net()).train()
        assert self.of(net, steps.plain(steps.sgd(net, lr=0.0))) == []

    @pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
    def test_a_gradient_of_zero_trains_all_the_same(self, optimizer: str) -> None:
        """Zero-initialised residual branches."""
        net = torchvision.models.resnet18(num_classes=4, zero_init_residual=True)
        step = steps.plain(getattr(torch.optim, optimizer)(net.parameters(), lr=0.1))
        report = check(net, torch.randn(4, 3, 32, 32), train_step=step, select="SN001")
        assert found(report) == {}

    def test_a_discriminator_between_its_steps(self) -> None:
        model = steps.Both()
        step, _ = steps.gan_step(model)
        assert self.of(model, step) == []

    def test_a_step_of_the_discriminator_only(self) -> None:
        model = steps.Both().train()
        optimizer = steps.sgd(model.discriminator)

        def step(model: steps.Both, x: Tensor) -> None:
            optimizer.zero_grad()
            steps.loss_of(model.discriminator(model.generator(x).detach())).backward()
            optimizer.step()

        assert self.of(model, step) == []

    def test_an_average_of_weights_as_a_teacher(self) -> None:
        model = steps.WithTeacher()
        assert self.of(model, steps.distilling(model)) == []

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing(self, reentrant: bool) -> None:
        net = estimated(conv_net()).train()
        assert self.of(net, steps.checkpointed(steps.sgd(net), reentrant)) == []
