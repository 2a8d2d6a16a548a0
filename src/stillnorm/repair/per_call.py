"""A norm for every call: the module that takes the place of a layer called several times."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from stillnorm.errors import StateError


class SplitNorm(nn.Module):
    """One norm per call of a layer, told apart by their order in the owner's forward.

    The owner is the smallest module whose forward encloses all calls; when its forward begins, the
    count begins anew. Fewer calls are fine; one too many raises, and so does one from elsewhere.

    Args:
        norm: The layer that is called several times.
        path: Its path, for errors.
        calls: The number of calls.
        shared: Whether the norms share their parameters: the same objects.

    Shape:
        That of the layer.
    """

    def __init__(self, norm: nn.Module, path: str, calls: int, *, shared: bool) -> None:
        super().__init__()
        self.training = norm.training
        self.sites = nn.ModuleList(twin(norm, shared=shared or i == 0) for i in range(calls))
        self.path = path
        self.shared = shared
        self.register_load_state_dict_post_hook(_tie)  # type: ignore[no-untyped-call]
        self._next = _OVER
        self._thread = 0
        self._within = -1  # the backward that the owner's forward belongs to; -1: to none

    def restart(self) -> None:
        """Begin counting anew: the owner's forward begins."""
        self._next = 0
        if not torch.compiler.is_compiling():
            self._within, self._thread = torch._C._current_graph_task_id(), threading.get_ident()

    def finish(self) -> None:
        """End the count: the owner's forward has ended."""
        self._next = _OVER

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call the norm whose turn it is."""
        turn, calls = self._next, len(self.sites)
        watched = not torch.compiler.is_compiling()
        if watched and torch._C._current_graph_task_id() != self._within:
            raise StateError(
                f"{self.path}: a part of the forward that calls it {calls} times is computed again "
                "in backward (activation checkpointing), where the calls cannot be told apart",
                help="checkpoint the whole module that makes these calls, or none of it",
            )
        if watched and self._thread and threading.get_ident() != self._thread:
            raise StateError(
                f"{self.path}: two threads run the module that calls it, and their calls cannot be "
                "told apart",
                help="give each thread a copy of the model",
            )
        if turn == _OVER:
            raise StateError(
                f"{self.path}: called from outside the module whose forward makes its {calls} "
                "calls",
                help="which of them this is cannot be told: call that module, or undo the split",
            )
        if turn == calls:
            raise StateError(
                f"{self.path}: call {turn + 1} of {calls} in one forward; when it was split, there "
                f"were {calls}",
                help="undo, and split again with batches that make all the calls",
            )
        self._next = turn + 1
        output: Tensor = self.sites[turn](*args, **kwargs)
        return output

    def __getattr__(self, name: str) -> Any:
        """Answer for the layer (`num_features`, `eps`, `weight`, ...) by its first norm."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "sites" or name.startswith("__"):
                raise
            return getattr(self.sites[0], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set what is the layer's on every norm."""
        if name in _OF_THE_LAYER and "sites" in self.__dict__.get("_modules", ()):
            for site in self.sites:
                setattr(site, name, value)
        if name not in _OF_THE_LAYER or name == "training":
            super().__setattr__(name, value)

    def reset_running_stats(self) -> None:
        """Reset the statistics of every norm."""
        for site in self.sites:
            site.reset_running_stats()  # type: ignore[operator]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take the tensors of a checkpoint from before the split, each for every norm."""
        own = {f"{prefix}{name}": name for name in self.sites[0].state_dict()}
        for key, name in own.items():
            if key in state_dict:
                value = state_dict.pop(key)
                for i in range(len(self.sites)):
                    # With assign=True the tensors themselves become the norms': each its own.
                    own_value = value if i == 0 else value.clone()
                    state_dict.setdefault(f"{prefix}sites.{i}.{name}", own_value)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Say how many calls there are."""
        return f"{len(self.sites)} calls"


class Finish:
    """A hook on the owner, to be called after its forward.

    Args:
        norm: The norm whose calls are over.
    """

    def __init__(self, norm: SplitNorm) -> None:
        self.norm = norm

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """End the count: a call from elsewhere is none of these."""
        self.norm.finish()


class Restart:
    """A hook on the owner, to be called before its forward.

    Args:
        norm: The norm whose calls are to be counted anew.
    """

    def __init__(self, norm: SplitNorm) -> None:
        self.norm = norm

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Begin counting anew."""
        self.norm.restart()


def twin(norm: nn.Module, *, shared: bool) -> nn.Module:
    """Return a copy of a layer with statistics of its own, and parameters shared or of its own."""
    memo: dict[int, Any] = {id(p): p for p in norm.parameters()} if shared else {}
    for module in norm.modules():  # hooks hang on the user's objects
        for name, hooks in vars(module).items():
            if name.endswith("_hooks") and isinstance(hooks, dict):
                memo.update((id(hook), hook) for hook in hooks.values())
    with torch.inference_mode(False):
        made = copy.deepcopy(norm, memo)
    if shared and [*map(id, made.parameters())] != [*map(id, norm.parameters())]:
        raise StateError(
            f"a copy of {type(norm).__name__} does not keep its parameters",
            help='its class has a __deepcopy__ of its own; affine="private" makes new ones',
        )
    return made


# In place of the number of the next call: the owner's forward is not running.
_OVER = -1

# Attributes that users set on a layer.
_OF_THE_LAYER = frozenset({"training", "momentum", "eps", "track_running_stats"})


def _tie(module: nn.Module, _: Any) -> None:
    """Make parameters that are shared the same objects again: assign=True loads one for each."""
    first, *others = module.sites  # type: ignore[misc]
    if not module.shared:
        return
    for other in others:
        for here, there in zip(first.modules(), other.modules(), strict=True):
            there._parameters.update(here._parameters)


def shared_state_dict(model: nn.Module) -> dict[str, Any]:
    r"""Return a model's state as it would be with its split norms shared again.

    For code that makes the model as it was before `split_shared`: the keys are the old ones. Shared
    statistics are the moments of all calls together, each call counting the same:

    .. math:: \mu = \frac{1}{K} \sum_k \mu_k, \qquad
              \sigma^2 = \frac{1}{K} \sum_k \left( \sigma_k^2 + (\mu_k - \mu)^2 \right)

    They fit the calls as badly as they did. The way back is `load_state_dict`: a split model takes
    a checkpoint from before as it is. A layer that was registered at several places and is a norm
    at each now has the same keys as before; a model that shares it loads the last of them.

    Args:
        model: The model, with `SplitNorm` in it.

    Returns:
        The state, detached; tensors that were not split are the model's own.

    Raises:
        StateError: The calls have parameters of their own that differ: one layer has one of each.

    Example:
        >>> model = nn.Sequential(SplitNorm(nn.BatchNorm1d(2), "0", 2, shared=True))
        >>> list(shared_state_dict(model))
        ['0.weight', '0.bias', '0.running_mean', '0.running_var', '0.num_batches_tracked']
    """
    state = model.state_dict()
    metadata = getattr(state, "_metadata", None)
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, SplitNorm):
            continue
        prefix = f"{path}." if path else ""
        sites = [site.state_dict() for site in module.sites]
        merged = {f"{prefix}{name}": _merged(path, name, sites) for name in sites[0]}
        inside = f"{prefix}sites."
        put = False
        renewed: OrderedDict[str, Any] = OrderedDict()
        for key, value in state.items():  # in the order that the keys had
            if not key.startswith(inside):
                renewed[key] = value
            elif not put:
                renewed.update(merged)
                put = True
        state = renewed
    if metadata is not None:
        state._metadata = metadata  # type: ignore[attr-defined]
    return state


def _merged(path: str, name: str, sites: list[dict[str, Any]]) -> Tensor:
    values = [site[name] for site in sites]
    first: Tensor = values[0]
    if name == "running_mean":
        return torch.stack(values).double().mean(0).to(first.dtype)
    if name == "running_var":
        means = torch.stack([site["running_mean"] for site in sites]).double()
        var = torch.stack(values).double().mean(0) + means.var(0, correction=0)
        return var.to(first.dtype)
    if name != "num_batches_tracked" and not all(torch.equal(v, first) for v in values):
        raise StateError(
            f"{path}: its calls have each their own {name}, and one layer has but one",
            help='split_shared(..., affine="shared") keeps them the same',
        )
    return first
