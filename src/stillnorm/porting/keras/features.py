"""In which order a layer takes its features, after a map was flattened.

Keras flattens (height, width, C) as it lies, torch (C, height, width). Only a functional or
sequential model, with those inside it, has a graph that tells which layer comes before which.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import torch
from keras import layers
from torch import Tensor

from stillnorm.porting.algebra import flat_order
from stillnorm.porting.part import Refusal

# What hands every feature on in its place.
_KEEPING = (
    layers.Activation,
    layers.ActivityRegularization,
    layers.Add,
    layers.AlphaDropout,
    layers.Average,
    layers.BatchNormalization,
    layers.Dropout,
    layers.ELU,
    layers.GaussianDropout,
    layers.GaussianNoise,
    layers.Identity,
    layers.LeakyReLU,
    layers.Maximum,
    layers.Minimum,
    layers.Multiply,
    layers.ReLU,
    layers.Rescaling,
    layers.Softmax,
    layers.Subtract,
)


@dataclass(frozen=True)
class Graph:
    """The calls that make up a model and the models inside it.

    Args:
        nodes: The ids of Keras' records of them: a layer has those of other models, too.
        outside: What each input of an inner model stands for, by its id.
    """

    nodes: frozenset[int]
    outside: Mapping[int, Sequence[Any]]

    def calls(self, op: Any) -> list[Any]:
        """Return the records of the calls of a layer."""
        return [node for node in op._inbound_nodes if id(node) in self.nodes]


def graph_of(model_layers: Iterable[Any]) -> Graph:
    """Return the graph of a model with these layers, itself among them."""
    models = [layer for layer in model_layers if isinstance(layer, keras.Model)]
    functions = [getattr(model, "_functional", None) or model for model in models]
    depths = [nodes for one in functions for nodes in getattr(one, "_nodes_by_depth", {}).values()]
    nodes = {id(node) for nodes in depths for node in nodes}
    outside: dict[int, list[Any]] = defaultdict(list)
    graph = Graph(frozenset(nodes), outside)
    for model in models:
        for node in graph.calls(model):
            inputs = getattr(model, "inputs", None) or ()
            for inner, outer in zip(inputs, node.input_tensors, strict=False):
                outside[id(inner)].append(outer)
    return graph


def feature_order(layer: Any, graph: Graph) -> Tensor | None:
    """Return where Keras has each of torch's features; None where both have the same order.

    Raises:
        Refusal: It cannot be told.
    """
    return _same([_order(node.input_tensors[0], graph) for node in graph.calls(layer)], layer)


def _order(tensor: Any, graph: Graph) -> Tensor | None:
    """Return the order of what a tensor (N, features) holds."""
    if len(tensor.shape) != 2:
        return None
    op, given = _before(tensor, graph)
    if isinstance(op, keras.Model | layers.InputLayer):
        return _same([_order(one, graph) for one in given], op)
    if maps := [one for one in given if len(one.shape) > 2]:
        return _flattened(op, maps[0], tensor.shape[1], graph)
    if isinstance(op, layers.Dense):
        return None  # its rows change places, what it gives does not
    orders = [_order(one, graph) for one in given]
    if all(order is None for order in orders):
        return None
    if isinstance(op, layers.Concatenate):
        sizes = [one.shape[1] for one in given]
        parts = [
            sum(sizes[:i]) + (torch.arange(sizes[i]) if order is None else order)
            for i, order in enumerate(orders)
        ]
        return torch.cat(parts)
    if isinstance(op, _KEEPING) or type(op).__module__ == "keras.src.ops.nn":
        return _same(orders, op)
    raise Refusal(f"takes a flattened map through {op.name}: in which order is not known")


def _before(tensor: Any, graph: Graph) -> tuple[Any, Sequence[Any]]:
    """Return what made a tensor, and what of; an inner model is made of its own last tensor."""
    op, node, output = tensor._keras_history
    if isinstance(op, layers.InputLayer):
        return op, graph.outside.get(id(tensor), ())
    if isinstance(op, keras.Model):
        return op, [op.outputs[output]] if getattr(op, "outputs", None) else []
    return op, op._inbound_nodes[node].input_tensors


def _flattened(op: Any, given: Any, features: int, graph: Graph) -> Tensor | None:
    """Return the order of a map that an operation makes features of."""
    size = given.shape[1:]
    channels_first = _is_channels_first(given, graph)
    if None in size or features != math.prod(size) or channels_first is None:
        return None  # pooled, or a map in which no axis is known for channels
    moved = isinstance(op, layers.Flatten) and op.data_format == "channels_first"
    order = flat_order(size, moved=moved, channels_first=channels_first)
    return None if torch.equal(order, torch.arange(features)) else order


def _is_channels_first(tensor: Any, graph: Graph) -> bool | None:
    """Tell by the nearest layer that knows which axis of a map is its channels; None for none."""
    while True:
        op, given = _before(tensor, graph)
        if isinstance(op, layers.BatchNormalization):
            return bool(op.axis % len(tensor.shape) == 1)
        if (order := getattr(op, "data_format", None)) is not None:
            return bool(order == "channels_first")
        if not given:
            return None
        tensor = given[0]


def _same(orders: Sequence[Tensor | None], op: Any) -> Tensor | None:
    """Return the order that all have."""
    first = orders[0] if orders else None
    for other in orders[1:]:
        same = first is other if first is None or other is None else torch.equal(first, other)
        if not same:
            raise Refusal(f"takes features in several orders at {op.name}, flattened and not")
    return first
