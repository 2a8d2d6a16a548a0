"""Every Python block of the README and of the docs runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text())


def a_users_script() -> dict[str, object]:
    """The names that a page takes from its reader: a model, loaders, a score, a training loop."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
            self.head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 36, 10))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.backbone(x))

    model = Net()
    loader = [(torch.randn(16, 3, 8, 8), torch.randint(10, (16,))) for _ in range(4)]
    for x, _ in loader * 8:
        model(x)

    def accuracy(output: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
        return float((output.argmax(1) == batch[1]).float().mean())

    def train(model: nn.Module) -> None:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    return {
        "model": model,
        "train_loader": loader,
        "val_loader": loader,
        "accuracy": accuracy,
        "train": train,
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_blocks_of_a_page_run_in_order(page: Path) -> None:
    names = a_users_script()
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)


def test_the_pages_have_python_blocks() -> None:
    assert sum(len(blocks(page)) for page in PAGES) >= 2
