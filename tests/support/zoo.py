"""Real architectures that nobody here wrote, with random weights and calibrated statistics.

torchvision's compiled operators do not load beside a CPU build of torch: their two schemas are
enough for its models, which are plain Python.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn


def _define_schemas() -> None:
    schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    for name in ("nms", "qnms"):
        try:
            torch.library.define(f"torchvision::{name}", schema)
        except RuntimeError:
            return  # torchvision brings its own


_define_schemas()

import timm  # noqa: E402
import torchvision  # noqa: E402
import transformers  # noqa: E402


class Logits(nn.Module):
    """A transformers model that takes a tensor and returns one, as the others here do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).logits


def _resnet_hf() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic"
    )
    return Logits(transformers.ResNetForImageClassification(config))


def _mobilenet_hf() -> nn.Module:
    return Logits(
        transformers.MobileNetV2ForImageClassification(
            transformers.MobileNetV2Config(depth_multiplier=0.35)
        )
    )


# name: factory; every one takes (N, 3, 64, 64) and returns a tensor in eval mode.
CLASSIFIERS: dict[str, Callable[[], nn.Module]] = {
    f"torchvision/{name}": partial(torchvision.models.get_model, name, num_classes=10)
    for name in (
        "resnet18",
        "mobilenet_v2",
        "mobilenet_v3_small",
        "shufflenet_v2_x0_5",
        "mnasnet0_5",
        "regnet_y_400mf",
    )
} | {
    "timm/resnet10t": partial(timm.create_model, "resnet10t", num_classes=10),
    "timm/efficientnet_lite0": partial(timm.create_model, "efficientnet_lite0", num_classes=10),
    "timm/ghostnet_050": partial(timm.create_model, "ghostnet_050", num_classes=10),
    "timm/regnety_002": partial(timm.create_model, "regnety_002", num_classes=10),
    "timm/dla46_c": partial(timm.create_model, "dla46_c", num_classes=10),
    "timm/lcnet_050": partial(timm.create_model, "lcnet_050", num_classes=10),
    "transformers/resnet": _resnet_hf,
    "transformers/mobilenet_v2": _mobilenet_hf,
}


# More of the same, each with something of its own between convolution and norm. The smallest size
# that the architecture takes, in pixels.
MORE: dict[str, int] = {
    "torchvision/efficientnet_b0": 32,
    "torchvision/googlenet": 32,
    "torchvision/densenet121": 32,
    "timm/tf_efficientnet_lite0": 32,  # Conv2dSame pads in a forward of its own
    "timm/hrnet_w18_small": 64,
    "timm/resnetv2_50": 32,  # pre-activation
    "timm/repvgg_a0": 32,  # norms without a convolution beside those with one
    "timm/res2net50_14w_8s": 32,  # splits and concatenations
    "timm/mixnet_s": 32,  # convolutions whose outputs are concatenated before the norm
    "timm/ese_vovnet19b_dw": 32,
    "timm/mobilenetv4_conv_small": 32,
    "timm/fbnetc_100": 32,
    "timm/levit_128s": 64,  # linear layers on (N, L, C)
    "timm/tinynet_e": 32,
    "timm/rexnet_100": 32,
    "timm/skresnet18": 32,  # one module calls two pairs and adds
    "timm/hardcorenas_a": 32,
}
ALL: dict[str, int] = dict.fromkeys(CLASSIFIERS, 32) | MORE


def _create(name: str) -> nn.Module:
    """Build any architecture of the two dictionaries, with ten classes."""
    if name in CLASSIFIERS:
        return CLASSIFIERS[name]()
    library, _, short = name.partition("/")
    if library == "timm":
        options = {"img_size": 64} if "levit" in short else {}
        return timm.create_model(short, num_classes=10, **options)
    options = {"aux_logits": False, "init_weights": False} if short == "googlenet" else {}
    return torchvision.models.get_model(short, num_classes=10, **options)


def images(n: int, seed: int = 0, size: int = 64) -> Tensor:
    """Smooth random images, (n, 3, size, size): each with its own brightness, contrast, texture."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 3, 8, 8, generator=g)
    smooth = nn.functional.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
    fine = torch.randn(n, 3, size, size, generator=g)
    contrast = 0.5 + torch.rand(n, 1, 1, 1, generator=g)
    return contrast * (smooth + 0.3 * fine) + 0.2 * torch.randn(n, 3, 1, 1, generator=g)


def make(name: str, seed: int = 0, calibrated: bool = True) -> nn.Module:
    """Build an architecture with seeded random weights; affine and statistics away from initial.

    The statistics are torch's own cumulative average over two batches in train mode.
    """
    torch.manual_seed(seed)
    model = _create(name)
    if not calibrated:
        return model.eval()
    g = torch.Generator().manual_seed(seed)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for norm in norms:
            if norm.weight is not None:
                norm.weight.copy_(0.7 + 0.6 * torch.rand(norm.weight.shape, generator=g))
                norm.bias.copy_(0.2 * torch.randn(norm.bias.shape, generator=g))
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = None
        model.train()
        for part in range(2):
            model(images(32, seed=100 * seed + part))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return model.eval()
