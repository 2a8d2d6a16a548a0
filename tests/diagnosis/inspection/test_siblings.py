"""Collapsing promises: nothing is lost, nothing is put together that differs."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillnorm.diagnosis.inspection.siblings import collapse

names = st.lists(
    st.sampled_from(["layer", "bn", "norm", "branch3x"]).flatmap(
        lambda stem: st.sampled_from(["", *map(str, range(5))]).map(stem.__add__)
    )
    | st.integers(0, 12).map(str),
    min_size=1,
    max_size=4,
).map(".".join)
items = st.lists(st.tuples(names, st.booleans()), max_size=40, unique_by=lambda item: item[0])


def rows(items):
    return collapse(items, path=lambda item: item[0], alike=lambda item: item[1])


def matches(pattern: str, path: str) -> bool:
    """Tell whether a path is one of those that a pattern stands for."""
    parts, names = pattern.split("."), path.split(".")
    if ".." in pattern:  # a range: put it back together before comparing components
        parts = re.sub(r"(\w*?)(\d+)\.\.(\d+)", r"\1#\2-\3", pattern).split(".")
    if len(parts) != len(names):
        return False
    for part, name in zip(parts, names, strict=True):
        stem, _, ends = part.partition("#")
        number = name.removeprefix(stem.removesuffix("*"))
        if ends:
            low, high = map(int, ends.split("-"))
            if not (name.startswith(stem) and number.isdigit() and low <= int(number) <= high):
                return False
        elif part.endswith("*"):
            if not (name.startswith(stem.removesuffix("*")) and number[:1].isdigit()):
                return False
        elif part != name:
            return False
    return True


@given(items)
def test_every_item_is_in_one_row_whose_pattern_it_matches(items):
    grouped = rows(items)
    assert sorted(item for _, members in grouped for item in members) == sorted(items)
    for pattern, members in grouped:
        assert len({alike for _, alike in members}) == 1
        assert all(matches(pattern, path) for path, _ in members)


@given(items)
def test_rows_stand_in_the_order_of_their_first_members(items):
    firsts = [items.index(members[0]) for _, members in rows(items)]
    assert firsts == sorted(firsts)


def resnet(blocks: tuple[int, ...], norms: int) -> list[str]:
    paths = ["bn1"]
    for stage, depth in enumerate(blocks, 1):
        for block in range(depth):
            paths += [f"layer{stage}.{block}.bn{i}" for i in range(1, norms + 1)]
            paths += [f"layer{stage}.0.downsample.1"] * (block == 0)
    return paths


def test_a_stage_is_a_row():
    grouped = collapse(resnet((3, 4, 6, 3), 3), path=str, alike=lambda path: 0)
    assert [(pattern, len(members)) for pattern, members in grouped] == [
        ("bn1", 1),
        ("layer1.*.bn1..3", 9),
        ("layer1.0.downsample.1", 1),
        ("layer2.*.bn1..3", 12),
        ("layer2.0.downsample.1", 1),
        ("layer3.*.bn1..3", 18),
        ("layer3.0.downsample.1", 1),
        ("layer4.*.bn1..3", 9),
        ("layer4.0.downsample.1", 1),
    ]


def test_a_small_model_shows_every_layer():
    paths = [f"bn_{i}" for i in range(1, 8)]
    assert [pattern for pattern, _ in collapse(paths, path=str, alike=lambda path: 0)] == paths


def test_stages_collapse_where_there_would_be_too_many_rows():
    paths = [f"features.{i}.conv.{j}.1" for i in range(30) for j in (0, 1)]
    grouped = collapse(paths, path=str, alike=lambda path: 0)
    assert [(pattern, len(members)) for pattern, members in grouped] == [
        ("features.*.conv.*.1", 60)
    ]


def test_numbers_inside_names_collapse_last():
    paths = [
        f"Mixed_{block}.{branch}.bn"
        for block in ("5b", "5c", "5d", "6a", "6b", "6c", "7a", "7b")
        for branch in ("branch1x1", "branch5x5_1", "branch5x5_2", "branch_pool")
    ]
    grouped = collapse(paths, path=str, alike=lambda path: 0)
    assert [(pattern, len(members)) for pattern, members in grouped] == [
        ("Mixed_*.branch*.bn", 24),
        ("Mixed_*.branch_pool.bn", 8),
    ]


def test_one_that_differs_has_a_row_of_its_own():
    paths = resnet((2, 2, 2, 2), 2)
    grouped = collapse(paths, path=str, alike=lambda path: path == "layer2.1.bn2")
    assert ("layer2.1.bn2", ("layer2.1.bn2",)) in grouped


@pytest.mark.parametrize(
    ("numbers", "pattern"), [((0, 1, 2), "bn0..2"), ((1, 3), "bn*"), ((9, 10, 11), "bn9..11")]
)
def test_numbers_without_a_gap_are_a_range(numbers, pattern):
    paths = [f"block0.{i}.bn{n}" for n in numbers for i in range(6)]
    ((written, _),) = collapse(paths, path=str, alike=lambda path: 0)
    assert written == f"block0.*.{pattern}"
