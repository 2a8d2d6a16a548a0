"""assert_batch_independent: fails where answers depend on the batch, whatever answers are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diagnosis.nets import conv_net, data, estimated
from stillnorm.errors import BatchError, DependenceError
from stillnorm.testing import assert_batch_independent
from support.zoo import images, make

KINDS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda out: out,
    "mapping": lambda out: {"logits": out, "mean": out.mean()},
    "pair": lambda out: (out, None),
    "array": lambda out: out.numpy(),
    "numbers": lambda out: out.sum(1).tolist(),
    "detections": lambda out: [{"score": row.max(), "label": int(row.argmax())} for row in out],
    "time first": lambda out: out[None].repeat(3, 1, 1),
}


def fails(predict: Callable[[Any], Any], batch: object, message: str, **how: float) -> None:
    with pytest.raises(DependenceError, match=message) as raised:
        assert_batch_independent(predict, batch, **how)
    assert isinstance(raised.value, AssertionError)
    assert raised.value.help


@pytest.mark.parametrize("kind", KINDS)
def test_eval_mode_passes_and_train_mode_fails(kind: str) -> None:
    net = estimated(conv_net())

    @torch.no_grad()
    def predict(x: Tensor) -> Any:
        return KINDS[kind](net(x))

    net.eval()
    answer = assert_batch_independent(predict, data(8))
    torch.testing.assert_close(answer, predict(data(8)), equal_nan=True, check_stride=False)
    net.train()
    fails(predict, data(8), "of 4 answers change with the batch: sample 0 .* among 4 instead of 8")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision/resnet18", "change with the batch"),
        ("torchvision/mobilenet_v2", "asked twice"),
    ],
)
def test_real_models(name: str, message: str) -> None:
    net = make(name)
    with torch.inference_mode():
        assert_batch_independent(net, images(6))
        fails(net.train(), images(6), message)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_pass(dtype: torch.dtype) -> None:
    net = estimated(conv_net()).to(dtype).eval()
    assert_batch_independent(net, data(8).to(dtype))


def test_batches_may_be_mappings_lists_and_arrays() -> None:
    net = estimated(conv_net()).eval()
    x = data(4)
    assert_batch_independent(lambda b: net(b["x"]), {"x": x, "names": list("abcd")})
    assert_batch_independent(lambda b: net(b[0]), (x, torch.arange(4)))
    assert_batch_independent(lambda b: net(torch.from_numpy(b)), x.numpy())


class TestFails:
    @pytest.mark.parametrize(
        ("predict", "what"),
        [
            (lambda x: x - x.mean(0), "halves"),
            (lambda x: x / x.norm(dim=0), "norm over the batch"),
            (lambda x: x.argsort(0), "ranks"),
            (lambda x: x + x.roll(1, 0), "neighbours"),
            (lambda x: x + (len(x) == 1), "alone"),
            (lambda x: x + (len(x) == 7), "seven"),
            (lambda x: x + torch.arange(len(x))[:, None], "place in the batch"),
            (lambda x: ["many" if len(x) > 1 else "one"] * len(x), "labels"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_for_whatever_mixes_samples(self, predict: Callable[[Tensor], Any], what: str) -> None:
        fails(predict, torch.randn(8, 3), "change with the batch")

    def test_for_an_order_that_only_another_one_shows(self) -> None:
        fails(lambda x: x.sort(0).values, torch.arange(24.0).reshape(8, 3), "of 7 answers change")

    def test_where_a_part_cannot_be_answered(self) -> None:
        net = nn.BatchNorm1d(3)
        fails(net, torch.randn(2, 3), "raises on 1 sample of it: ValueError: Expected more than 1")

    def test_where_answers_are_random(self) -> None:
        fails(nn.Dropout(0.5), torch.ones(8, 3), "asked twice for the same batch")
        state = iter(range(100))
        fails(lambda x: [next(state)] * len(x), torch.ones(8, 3), "asked twice")

    def test_beyond_a_tolerance_in_spreads(self) -> None:
        x = torch.randn(8, 3)
        spread = float(x.std())

        def predict(x: Tensor) -> Tensor:
            return x + 0.01 * spread * (len(x) < 8)

        fails(predict, x, r"moves by 0\.01 of their spread")
        assert_batch_independent(predict, x, tolerance=0.02)
        fails(predict, x, "change", tolerance=0.005)


def test_what_cannot_be_compared_is_an_error_of_another_kind() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(BatchError, match="the batch has one sample"):
        assert_batch_independent(lambda x: x, x[:1])
    with pytest.raises(BatchError, match="nothing in the answer belongs to one sample"):
        assert_batch_independent(lambda x: float(np.float64(2)), x)


def test_the_batch_is_left_alone() -> None:
    x = torch.randn(4, 3)
    before = x.clone()
    assert_batch_independent(lambda x: x.mul_(2), x)
    assert torch.equal(x, before)
