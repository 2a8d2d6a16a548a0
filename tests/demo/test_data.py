"""The data: seeded, divided into training and test, scenes whose labels are where they say."""

from __future__ import annotations

import torch

from stillnorm.demo import data


def scenes(seed: int = 0, negative: bool = False) -> data.Labelled:
    known, _ = data.digits(0)
    return data.scenes("china.jpg", known, 4, columns=(0, 1), negative=negative, seed=seed)


def test_no_digit_is_in_both_sets() -> None:
    train, test = data.digits(0)
    assert (len(train), len(test)) == (1437, 360)
    both = torch.cat([train.x, test.x]).flatten(1)
    everything = data.digits(1)
    assert torch.equal(both.sum(0), torch.cat([d.x for d in everything]).flatten(1).sum(0))


def test_the_seed_decides_everything() -> None:
    assert torch.equal(scenes(3).x, scenes(3).x)
    assert not torch.equal(scenes(3).x, scenes(4).x)
    train, _ = data.digits(0)
    assert all(map(torch.equal, train.shuffled(64, 30, 5), train.shuffled(64, 30, 5)))


def test_an_epoch_shows_every_sample_once() -> None:
    train, _ = data.digits(0)
    steps = train.shuffled(64, 2 * 23, seed=0)
    first, second = torch.cat(steps[:23]), torch.cat(steps[23:])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(1437))
    assert not torch.equal(first, second)


def test_a_sticker_is_where_its_label_is() -> None:
    """The negative of a scene differs exactly on the stickers; each carries one class of digits."""
    plain, negative = scenes(), scenes(negative=True)
    differs = (plain.x != negative.x).any(1)
    assert not differs[plain.y == 0].any()
    assert differs[plain.y > 0].float().mean() > 0.95  # equal where ink is exactly half
    for label in plain.y:
        assert 1 <= len(label.unique()) - 1 <= data.STICKERS
        assert int((label > 0).sum()) >= data.STICKERS * (data.SIDE // 2 - 6) ** 2
