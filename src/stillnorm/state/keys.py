"""What the keys of a state dict say: wrappers around the model, and which are norm layers'."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from stillnorm.norms import clean_path


def clean_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop the wrapper components from the keys of a state dict.

    A leading ``module.`` is a wrapper's only if every key has it; else it is the user's own name.

    Example:
        >>> import torch
        >>> list(clean_keys({"module._orig_mod.bn.weight": torch.ones(2)}))
        ['bn.weight']
        >>> list(clean_keys({"module.bn.weight": torch.ones(2), "head.weight": torch.ones(2)}))
        ['module.bn.weight', 'head.weight']
    """
    # A component in front keeps clean_path from taking a leading ``module`` for a wrapper.
    inside = {clean_path(f".{key}")[1:]: tensor for key, tensor in state.items()}
    wrapped = all(key.startswith("module.") for key in inside)
    cleaned = {clean_path(key): tensor for key, tensor in state.items()} if wrapped else inside
    # Two keys that would become one are no wrapper's doing.
    return cleaned if len(cleaned) == len(state) else dict(state)


def norm_prefixes(state: Mapping[str, Tensor]) -> list[str]:
    """Return the prefixes that have a `running_mean` and a `running_var`.

    Example:
        >>> import torch
        >>> norm_prefixes({"bn.running_mean": torch.ones(2), "bn.running_var": torch.ones(2)})
        ['bn']
    """
    mean, var = "running_mean", "running_var"
    prefixes = [key.removesuffix(mean) for key in state if f".{key}".endswith(f".{mean}")]
    return [prefix.removesuffix(".") for prefix in prefixes if prefix + var in state]
