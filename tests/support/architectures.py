"""Over sixty real architectures with random weights, each with data that it takes.

Weights are as they are drawn; affine parameters are moved away from their initial values, so that
layers count as trained. Statistics come from `recalibrate` on data like those of the check.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stillnorm import recalibrate
from support.zoo import images, timm, torchvision, transformers

Forward = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Architecture:
    """How to build a model, what to feed it, and how to call it.

    Args:
        make: Builds it.
        inputs: ``(n, seed)``: n samples.
        forward: How to call it on a batch, where ``model(batch)`` is not the way.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], Tensor]
    forward: Forward | None = None

    def healthy(self, seed: int = 0) -> nn.Module:
        """Build it as if trained, with statistics of 64 samples in batches of 16."""
        torch.manual_seed(seed)
        model = self.make()
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for norm in model.modules():
                if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.affine:
                    norm.weight.copy_(0.7 + 0.6 * torch.rand(norm.weight.shape, generator=g))
                    norm.bias.copy_(0.2 * torch.randn(norm.bias.shape, generator=g))
        batches = list(self.inputs(64, seed + 2).split(16))
        recalibrate(model, batches, forward=self.forward)
        return model.eval()


def _pixels(size: int) -> Callable[[int, int], Tensor]:
    return lambda n, seed: images(n, seed=seed, size=size)


def _timm(name: str, size: int = 32, **options: object) -> Architecture:
    return Architecture(partial(timm.create_model, name, num_classes=10, **options), _pixels(size))


def _vision(name: str, size: int = 32, **options: object) -> Architecture:
    make = partial(torchvision.models.get_model, name, weights=None, num_classes=10, **options)
    return Architecture(make, _pixels(size))


def _segmenter(name: str, size: int = 64) -> Architecture:
    options = {"weights": None, "weights_backbone": None, "num_classes": 4}
    make = partial(torchvision.models.get_model, name, **options)
    return Architecture(make, _pixels(size))


def _detector(name: str, run: Forward) -> Architecture:
    """A detector of torchvision up to its heads: picking boxes needs compiled operators."""
    options = {"weights": None, "weights_backbone": None, "num_classes": 4}
    make = partial(torchvision.models.get_model, name, trainable_backbone_layers=6, **options)
    return Architecture(make, _pixels(64), forward=run)


def _single_shot(model: nn.Module, batch: Tensor) -> Tensor:
    return model.head(list(model.backbone(batch).values()))["cls_logits"]


def _video(name: str) -> Architecture:
    def frames(n: int, seed: int) -> Tensor:
        return images(4 * n, seed=seed, size=24).reshape(n, 4, 3, 24, 24).transpose(1, 2)

    make = partial(torchvision.models.get_model, name, weights=None, num_classes=10)
    return Architecture(make, frames)


def _hf(kind: str, size: int = 64, output: str = "logits", **config: object) -> Architecture:
    """A model of transformers by the name of its class, called with pixel values."""

    def make() -> nn.Module:
        model = getattr(transformers, kind)
        return model(model.config_class(**config))

    return Architecture(
        make,
        _pixels(size),
        forward=lambda model, batch: getattr(model(pixel_values=batch), output),
    )


def signals(channels: int, length: int) -> Callable[[int, int], Tensor]:
    """Random walks, (n, channels, length), each with a level and a scale of its own."""

    def make(n: int, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        walk = torch.randn(n, channels, length, generator=g).cumsum(2) / length**0.5
        scale = 0.5 + torch.rand(n, 1, 1, generator=g)
        return scale * walk + 0.2 * torch.randn(n, channels, 1, generator=g)

    return make


ARCHITECTURES: dict[str, Architecture] = {
    **{
        f"torchvision/{name}": _vision(name)
        for name in (
            "resnet18",
            "resnet50",
            "mobilenet_v2",
            "mobilenet_v3_small",
            "shufflenet_v2_x0_5",
            "mnasnet0_5",
            "regnet_y_400mf",
            "regnet_x_400mf",
            "efficientnet_b0",
            "densenet121",
        )
    },
    "torchvision/googlenet": _vision("googlenet", aux_logits=False, init_weights=False),
    "torchvision/inception_v3": _vision("inception_v3", 80, aux_logits=True, init_weights=False),
    **{
        f"torchvision/{name}": _segmenter(name)
        for name in ("deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
    },
    "torchvision/fcn_resnet50": _segmenter("fcn_resnet50", 32),
    "torchvision/ssdlite320": _detector("ssdlite320_mobilenet_v3_large", _single_shot),
    "torchvision/fasterrcnn": _detector(
        "fasterrcnn_mobilenet_v3_large_320_fpn", lambda model, batch: model.backbone(batch)["0"]
    ),
    **{f"torchvision/{name}": _video(name) for name in ("r3d_18", "r2plus1d_18")},
    **{
        f"timm/{name}": _timm(name)
        for name in (
            "resnet10t",
            "resnet26d",
            "seresnet18",
            "efficientnet_lite0",
            "tf_efficientnet_lite0",
            "efficientnet_b0",
            "ghostnet_050",
            "regnety_002",
            "regnetz_005",
            "dla46_c",
            "lcnet_050",
            "tinynet_e",
            "mixnet_s",
            "mnasnet_small",
            "mobilenetv3_small_050",
            "mobilenetv4_conv_small",
            "hardcorenas_a",
            "fbnetc_100",
            "rexnet_100",
            "repvgg_a0",
            "res2net50_14w_8s",
            "resnest14d",
            "skresnet18",
            "ese_vovnet19b_dw",
            "resnetv2_50",
            "cspresnet50",
            "selecsls42",
            "hrnet_w18_small",
            "gernet_s",
            "repghostnet_050",
            "fasternet_t0",
        )
    },
    "timm/levit_128s": _timm("levit_128s", 64, img_size=64),
    "timm/mobilevit_xxs": _timm("mobilevit_xxs", 64),
    "timm/efficientvit_b0": _timm("efficientvit_b0", 64),
    "timm/repvit_m0_9": _timm("repvit_m0_9", 64),
    "timm/vit_small_patch16_224": _timm(
        "vit_small_patch16_224", 64, img_size=64
    ),  # no norm of ours
    "transformers/resnet": _hf(
        "ResNetForImageClassification",
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[1, 1, 1],
    ),
    "transformers/regnet": _hf(
        "RegNetForImageClassification",
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[1, 1, 1],
        groups_width=16,
    ),
    "transformers/mobilenet_v1": _hf("MobileNetV1ForImageClassification", depth_multiplier=0.25),
    "transformers/mobilenet_v2": _hf("MobileNetV2ForImageClassification", depth_multiplier=0.35),
    "transformers/efficientnet": _hf(
        "EfficientNetForImageClassification",
        image_size=64,
        width_coefficient=0.3,
        depth_coefficient=0.4,
        hidden_dim=384,
    ),
    "transformers/levit": _hf(
        "LevitForImageClassification",
        image_size=64,
        hidden_sizes=[32, 48, 64],
        num_attention_heads=[2, 3, 4],
        key_dim=[8, 8, 8],
        depths=[1, 1, 1],
    ),
    "transformers/mobilevit": _hf(
        "MobileViTForImageClassification",
        image_size=64,
        hidden_sizes=[24, 32, 40],
        neck_hidden_sizes=[8, 8, 16, 24, 32, 40, 80],
    ),
    "transformers/segformer": _hf(
        "SegformerForSemanticSegmentation",
        hidden_sizes=[8, 16, 32, 64],
        depths=[1, 1, 1, 1],
        decoder_hidden_size=32,
        num_labels=4,
    ),
}


class Signal(nn.Module):
    """A 1-D residual network, as people write them for audio and sensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(4, 16, 5, 2, bias=False), nn.BatchNorm1d(16), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv1d(16, 16, 3, padding=1, bias=False),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Conv1d(16, 16, 3, padding=1, bias=False),
            nn.BatchNorm1d(16),
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.block(x)).relu().mean(2))


ARCHITECTURES["here/signal"] = Architecture(Signal, signals(4, 64))
