"""A user's project: a folder with files of their own, left without a trace."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from stillnorm.cli.main import main

NET = '''
import functools

import torch
from torch import nn

print("printed on import")


class Net(nn.Module):
    """Calls one norm twice: the third thread."""

    def __init__(self, width=8):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 10)

    def forward(self, x):
        x = self.bn(self.conv1(x).relu() * 5)
        x = self.bn(self.conv2(x).relu() + 3)
        return self.fc(x.mean((2, 3)))


def make():
    torch.manual_seed(0)
    print("printed by the factory")
    net = Net()
    for _ in range(30):
        net.train()(torch.randn(32, 3, 8, 8))
    return net


def healthy():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def zero_momentum():
    net = healthy()
    net[1].momentum = 0.0
    return net


def val():
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 3, 8, 8, generator=g), torch.zeros(16).long()) for _ in range(4)]


def accuracy(output, batch):
    return (output.argmax(1) == batch[1]).float().mean()


def one_argument(output):
    return 0.0


def of_five_channels():
    return torch.randn(4, 5, 8, 8)


def dicts():
    return [{"image": torch.randn(4, 3, 8, 8), "label": torch.zeros(4)}]


def of_dicts(model, batch):
    return model(batch["image"])


def needs(a, b=1):
    return Net(a)


def gives_a_dict():
    return {"model": Net()}


def raises():
    raise ValueError("no such thing\\nand more")


def quits():
    raise SystemExit(2)


def interrupted():
    raise KeyboardInterrupt


class Namespace:
    inner = healthy


partial = functools.partial(Net, width=4)


number = 3
'''


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with `net.py` in it, which is the folder now."""
    (tmp_path / "net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


@pytest.fixture
def run(project: Path) -> Callable[..., Result]:
    """Run the program in the project."""

    def run(*args: str) -> Result:
        return CliRunner().invoke(main, [str(arg) for arg in args])

    return run


@pytest.fixture
def fails(run: Callable[..., Result]) -> Callable[..., tuple[str, str]]:
    """Run the program, which must end with one line of fact and one of help; return the two."""

    def fails(*args: str) -> tuple[str, str]:
        result = run(*args)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        said = [line for line in result.stderr.splitlines() if not line.startswith("printed")]
        assert len(said) == 2, result.stderr
        assert said[0].startswith("error: ")
        assert said[1].startswith("  help: ")
        return said[0].removeprefix("error: "), said[1].removeprefix("  help: ")

    return fails
