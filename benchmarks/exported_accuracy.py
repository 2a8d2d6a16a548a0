"""A model that works only in train mode, deployed: accuracy of its files before and after.

A network learns scikit-learn's digits, and an average of its weights is kept, as many training
scripts do it: a copy, whose parameters follow those of the network, and whose buffers stay what
they were. The average is right in train mode and wrong in eval mode. Then `sn.recalibrate`,
`sn.export_onnx`.

    python benchmarks/exported_accuracy.py --seeds 5
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stillnorm as sn
from stillnorm.demo.data import Labelled, digits

Predict = Callable[[Tensor], Tensor]


def network() -> nn.Module:
    def block(before: int, after: int) -> Iterator[nn.Module]:
        yield nn.Conv2d(before, after, 3, padding=1, bias=False)
        yield nn.BatchNorm2d(after)
        yield nn.ReLU()

    layers = [*block(1, 16), *block(16, 32), nn.MaxPool2d(2), *block(32, 32)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def averaged(train: Labelled, seed: int, steps: int = 300) -> nn.Module:
    """Train, and return the average of the weights."""
    torch.manual_seed(seed)
    model = network().train()
    average = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for index in train.shuffled(64, steps, seed):
        optimizer.zero_grad()
        F.cross_entropy(model(train.x[index]), train.y[index]).backward()
        optimizer.step()
        with torch.no_grad():
            for kept, new in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(new, 0.03)
    return average


@torch.no_grad()
def accuracy(predict: Predict, test: Labelled, size: int) -> float:
    right = sum(int((predict(x).argmax(1) == y).sum()) for x, y in test.batches(size))
    return 100 * right / len(test)


def in_onnxruntime(path: Path) -> Predict:
    runtime = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = runtime.get_inputs()[0].name
    return lambda x: torch.from_numpy(runtime.run(None, {name: x.numpy()})[0])


def by_torch(model: nn.Module, path: Path, x: Tensor) -> Predict:
    """Export as it is, in train mode, with `torch.export` alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            model.train(), (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)
        )
    torch.export.save(program, path)
    return torch.export.load(path).module()


def measure(seed: int) -> dict[str, float]:
    train, test = digits(seed)
    model = averaged(train, seed)
    x = test.x[:8]
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with sn.preserved(model):
            found["train mode, batches of 64"] = accuracy(model.train(), test, 64)
        with sn.preserved(model):
            found["train mode, batches of 4"] = accuracy(model.train(), test, 4)
        with sn.preserved(model):
            theirs = by_torch(model, folder / "theirs.pt2", x)
            found["torch.export of it in train mode, batches of 64"] = accuracy(theirs, test, 64)
            found["the same, one at a time"] = accuracy(theirs, test, 1)
        sn.export_onnx(model, x, folder / "before.onnx")
        before = in_onnxruntime(folder / "before.onnx")
        found["export_onnx as it is"] = accuracy(before, test, 64)
        sn.recalibrate(model, train.batches(64))
        report = sn.export_onnx(model, x, folder / "after.onnx")
        after = in_onnxruntime(folder / "after.onnx")
        found["recalibrate, then export_onnx, batches of 64"] = accuracy(after, test, 64)
        found["the same file, one at a time"] = accuracy(after, test, 1)
        found["eval mode in torch"] = accuracy(model.eval(), test, 64)
        found["largest difference to it, in 1e-6"] = 1e6 * report.max_error
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    torch.set_num_threads(1)
    runs = [measure(seed) for seed in seeds]
    print(f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, mean of {len(runs)}")
    for name in runs[0]:
        every = [run[name] for run in runs]
        mean = sum(every) / len(every)
        print(f"{name:50s} {mean:6.1f}   {' '.join(f'{one:.1f}' for one in every)}")


if __name__ == "__main__":
    main()
