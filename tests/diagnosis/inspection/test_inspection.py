"""`inspect` promises: the truth about every kind of norm layer, and the model left as found."""

from __future__ import annotations

import copy
import inspect
import json
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import stillnorm as sn
from stillnorm.errors import BatchError
from support import zoo

HAS_BIAS = "bias" in inspect.signature(nn.BatchNorm2d).parameters


def only(model: nn.Module, batch: object = None) -> object:
    (row,) = sn.inspect(model, batch).layers
    return row


def switches(row) -> tuple[object, ...]:
    """The columns train(), eval(), updates, affine, held."""
    return (
        row.normalizes_by_in_train,
        row.normalizes_by_in_eval,
        row.updates_statistics,
        row.trains_affine,
        row.held,
    )


FREE = ("batch", "running", True, True, None)


class OwnTrain(nn.Module):
    """Freezes its norms in `train()`, as mmdetection's backbones do."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.BatchNorm2d(4)

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.bn.eval()
        return self

    def forward(self, x):
        return self.head(self.bn(x))


class Twice(nn.Module):
    """One layer under two names, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.BatchNorm2d(4)
        self.b = self.a
        self.idle = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.b(self.a(x) * 2)


# ------------------------------------------------------------------------ kinds of layers


@pytest.mark.parametrize(
    ("layer", "kind", "expected"),
    [
        (nn.BatchNorm1d(4), "BatchNorm1d", FREE),
        (nn.BatchNorm2d(4), "BatchNorm2d", FREE),
        (nn.BatchNorm3d(4), "BatchNorm3d", FREE),
        (nn.SyncBatchNorm(4), "SyncBatchNorm", FREE),
        (nn.BatchNorm2d(4, affine=False), "BatchNorm2d", ("batch", "running", True, False, None)),
        (nn.BatchNorm2d(4, momentum=0.0), "BatchNorm2d", ("batch", "running", False, True, None)),
        (nn.BatchNorm2d(4, momentum=None), "BatchNorm2d", FREE),
        (
            nn.BatchNorm2d(4, track_running_stats=False),
            "BatchNorm2d",
            ("batch", "batch", False, True, None),
        ),
        (nn.InstanceNorm2d(4), "InstanceNorm2d", ("sample", "sample", False, False, None)),
        (
            nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
            "InstanceNorm2d",
            ("sample", "running", True, True, None),
        ),
        (zoo.timm.layers.BatchNormAct2d(4), "BatchNormAct2d", FREE),
        (
            zoo.torchvision.ops.FrozenBatchNorm2d(4),
            "FrozenBatchNorm2d",
            ("running", "running", False, False, "torchvision FrozenBatchNorm2d"),
        ),
        (
            zoo.timm.layers.FrozenBatchNormAct2d(4),
            "FrozenBatchNormAct2d",
            ("running", "running", False, False, "timm FrozenBatchNormAct2d"),
        ),
        (
            zoo.transformers.models.detr.modeling_detr.DetrFrozenBatchNorm2d(4),
            "DetrFrozenBatchNorm2d",
            ("running", "running", False, False, "transformers DetrFrozenBatchNorm2d"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_switches_of_every_kind(layer, kind, expected):
    row = only(nn.Sequential(layer))
    assert (row.path, row.paths, row.kind, row.num_features) == ("0", ("0",), kind, 4)
    assert switches(row) == expected


@pytest.mark.skipif(not HAS_BIAS, reason="this torch has no bias= in BatchNorm")
def test_a_batch_norm_without_bias_learns_its_weight():
    row = only(nn.BatchNorm2d(4, bias=False))
    assert (row.has_affine, row.trains_affine) == (True, True)


def test_a_lazy_layer_before_and_after_its_first_forward():
    net = nn.Sequential(nn.LazyBatchNorm2d())
    row = only(net)
    assert (row.kind, row.num_features, row.variance) == ("LazyBatchNorm2d", 0, None)
    assert "lazy" in str(sn.inspect(net))
    net(torch.randn(2, 3, 4, 4))
    assert (only(net).kind, only(net).num_features) == ("BatchNorm2d", 3)


def test_a_layer_on_the_meta_device_has_no_variance_to_read():
    row = only(nn.BatchNorm2d(4, device="meta"))
    assert (row.variance, row.batches_seen) == (None, None)
    assert switches(row) == FREE


def test_a_scripted_module():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(4)))
    assert sn.inspect(scripted).model == "Sequential"
    assert only(scripted).kind == "BatchNorm2d"
    assert switches(only(scripted)) == FREE


def test_a_model_that_is_a_norm_layer():
    row = only(nn.BatchNorm2d(4))
    assert row.path == ""
    assert "(root)" in str(sn.inspect(nn.BatchNorm2d(4)))


def test_a_model_without_norms_is_no_error():
    seen = sn.inspect(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    assert seen.layers == ()
    assert str(seen).startswith("Sequential: no norm layers")


# ------------------------------------------------------------------------ who holds it


def test_held_by_stillnorm():
    net = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sn.StillnormWarning)
        sn.freeze(net, "0")
        sn.freeze(net, "1", affine="trains")
    first, second, third = sn.inspect(net).layers
    assert switches(first) == ("running", "running", False, False, "stillnorm")
    assert switches(second) == ("running", "running", False, True, "stillnorm")
    assert switches(third) == FREE
    assert first.kind == "BatchNorm2d"
    assert "3 norm layers, 2 held, train mode now" in str(sn.inspect(net))


def test_held_by_a_train_of_the_users_own():
    """Found without calling `train()` first, and in either mode."""
    for net in (OwnTrain(), OwnTrain().train(), OwnTrain().eval()):
        held, free = sn.inspect(net).layers
        assert switches(held) == ("running", "running", False, True, "OwnTrain.train()")
        assert switches(free) == FREE


def test_in_eval_is_not_held():
    net = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)).train()
    net[0].eval()
    row = sn.inspect(net).layers[0]
    assert (row.training, row.held) == (False, None)
    assert "train mode now, 1 of the norms in eval" in str(sn.inspect(net))


# ------------------------------------------------------------------------ paths


def test_a_layer_registered_twice_is_one_row_with_both_paths():
    shared, idle = sn.inspect(Twice()).layers
    assert (shared.path, shared.paths) == ("a", ("a", "b"))
    assert idle.paths == ("idle",)
    assert "a = b" in str(sn.inspect(Twice()))


class Parallel(nn.Module):
    """Puts the model under `module`, as DistributedDataParallel does, whose name it has."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, Parallel])
def test_wrappers_do_not_show(wrap):
    assert only(wrap(nn.Sequential(nn.BatchNorm2d(4)))).path == "0"
    assert sn.inspect(wrap(nn.Sequential(nn.BatchNorm2d(4)))).model == "Sequential"


# ------------------------------------------------------------------------ numbers


def test_numbers_are_those_of_the_tensors():
    layer = nn.BatchNorm2d(3, eps=1e-3, momentum=0.25)
    layer.running_var.copy_(torch.tensor([0.5, 4.0, 2.0]))
    layer.num_batches_tracked.fill_(7)
    row = only(layer)
    assert (row.eps, row.momentum, row.batches_seen) == (1e-3, 0.25, 7)
    assert row.variance == (0.5, 4.0)
    assert row.dtype == "float32"


def test_a_layer_of_two_dtypes_says_both():
    layer = nn.BatchNorm2d(3)
    layer.weight.data = layer.weight.data.half()
    layer.bias.data = layer.bias.data.half()
    assert only(layer).dtype == "float16/float32"


def test_a_variance_that_is_not_finite_is_said():
    layer = nn.BatchNorm2d(3)
    layer.running_var[1] = torch.nan
    assert "not finite" in str(sn.inspect(layer))


def test_statistics_without_a_count():
    layer = nn.BatchNorm2d(3)
    layer.num_batches_tracked = None
    assert only(layer).batches_seen is None


# ------------------------------------------------------------------------ with a batch


def test_without_a_batch_nothing_is_said_about_use():
    assert only(nn.BatchNorm2d(4)).used is None
    assert "used" not in str(sn.inspect(nn.BatchNorm2d(4)))


def test_what_the_forward_used_and_how_often():
    x = torch.randn(8, 4, 5, 5)
    shared, idle = sn.inspect(Twice().train(), x).layers
    assert (shared.used, idle.used) == (("batch", "batch"), ())
    shared, _ = sn.inspect(Twice().eval(), x).layers
    assert shared.used == ("running", "running")
    written = str(sn.inspect(Twice().eval(), x))
    assert "running x2" in written
    assert "never called" in written


def test_only_the_first_of_several_batches_is_run():
    batches = [torch.randn(8, 4, 5, 5), torch.randn(8, 4, 5, 5)]
    assert only(nn.Sequential(nn.BatchNorm2d(4)), batches).used == ("batch",)


class IgnoresItsFlag(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True)


def test_what_was_used_is_what_ran_and_not_what_the_flags_say():
    net = nn.Sequential(IgnoresItsFlag(4)).eval()
    row = only(net, torch.randn(8, 4, 5, 5))
    assert row.normalizes_by_in_eval == "running"
    assert row.used == ("batch",)


def test_a_call_of_the_users_own():
    net = nn.Sequential(nn.BatchNorm2d(4)).eval()
    batch = {"image": torch.randn(8, 4, 5, 5), "label": torch.zeros(8)}
    with pytest.raises(BatchError, match="forward="):
        sn.inspect(net, batch)
    seen = sn.inspect(net, batch, forward=lambda model, batch: model(batch["image"]))
    assert seen.layers[0].used == ("running",)


# ------------------------------------------------------------------------ only looks


def fingerprint(model: nn.Module) -> list[object]:
    """Everything about a model that looking could disturb."""
    facts: list[object] = [torch.get_rng_state().tolist()]
    for name, module in model.named_modules():
        hooks = [len(v) for k, v in sorted(vars(module).items()) if k.endswith("_hooks")]
        facts.append((name, type(module), module.training, hooks, sorted(vars(module))))
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                grad = None if tensor.grad is None else tensor.grad.tolist()
                facts.append((key, id(tensor), tensor._version, tensor.tolist(), grad))
    return facts


@pytest.mark.parametrize("make", [OwnTrain, Twice], ids=["own train()", "registered twice"])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("batch", [None, torch.ones(2, 4, 3, 3)], ids=["", "with a batch"])
def test_the_model_is_left_as_it_was(make, mode, batch):
    model = make().train(mode)
    model(torch.randn(4, 4, 3, 3)).square().sum().backward()
    before = fingerprint(model)
    sn.inspect(model, batch)
    assert fingerprint(model) == before


def test_the_model_is_left_as_it_was_when_its_forward_raises():
    class Raises(OwnTrain):
        def forward(self, x):
            super().forward(x)
            raise RuntimeError("in the middle")

    model, x = Raises().train(), torch.randn(4, 4, 3, 3)
    before = fingerprint(model)
    with pytest.raises(BatchError, match="in the middle"):
        sn.inspect(model, x)
    assert fingerprint(model) == before


# ------------------------------------------------------------------------ the screen


def test_the_screen():
    """The whole screen of a model with three things to see, character by character."""
    net = nn.Sequential()
    net.add_module("stem", nn.BatchNorm2d(8))
    net.add_module("head", nn.BatchNorm2d(16, momentum=0.0))
    net.add_module("aux", nn.BatchNorm2d(16, track_running_stats=False))
    net.stem.num_batches_tracked.fill_(312)
    net.stem.running_var.uniform_(0.5, 0.5).mul_(torch.linspace(0.2, 8, 8))
    net.stem.weight.requires_grad_(False)
    net.stem.bias.requires_grad_(False)
    sn.freeze(net, "stem")
    assert (
        str(sn.inspect(net))
        == """\
Sequential: 3 norm layers, 1 held, train mode now

everywhere: BatchNorm2d, eps 1e-05, float32

path   C  train()  eval()   updates  affine  held       seen  variance
stem   8  running  running  -        frozen  stillnorm   312  0.1 .. 4
head  16  batch    running  0        learns  no            0  1 .. 1    !
aux   16  batch    batch    -        learns  no            -  none      !

train()/eval(): what normalises in that mode.  updates: torch momentum, the weight of a new batch.
variance: running_var, not a deviation.  seen: num_batches_tracked, 0 can be a legacy checkpoint.

!  head  momentum 0 is not frozen: train mode normalises by the batch, and eval by running
         statistics that never move (SN002)
!  aux   1 layer has no running statistics: eval normalises by the batch (SN107)
run: stillnorm check to measure it, stillnorm explain CODE to read about it"""
    )


@pytest.mark.parametrize("name", sorted(zoo.CLASSIFIERS))
def test_real_architectures_fit_the_page(name):
    """Few rows, nothing wider than the page, the numbers of layers right."""
    model = zoo.make(name)
    seen = sn.inspect(model)
    norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert len(seen.layers) == norms
    written = str(seen)
    assert f"{norms} norm layers" in written
    assert all(len(line) <= 100 for line in written.splitlines())
    assert len(written.splitlines()) <= 30


def test_all_shows_every_layer():
    seen = sn.inspect(zoo.make("torchvision/resnet18"))
    (table,) = [b for b in seen.document(all=True).blocks if type(b).__name__ == "Table"]
    assert [row[0] for row in table.rows] == [layer.path for layer in seen.layers]


def test_json_has_every_layer():
    seen = sn.inspect(copy.deepcopy(zoo.make("torchvision/resnet18")))
    data = json.loads(seen.to_json())
    assert [layer["path"] for layer in data["layers"]] == [layer.path for layer in seen.layers]
    assert data["layers"][0]["normalizes_by_in_train"] == "batch"
