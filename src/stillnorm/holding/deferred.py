"""The output of a convolution that is not computed yet: it waits for the norm after it.

A `Deferred` is a tensor without memory. The held norm that it was made for computes both in one
convolution. Anything else that touches it finds the true output, computed then and once; writes
and views go to that, and from then on the norm reads it, too. Nothing needs to know who will use
the output: a second consumer, a skipped norm, an in-place change, NumPy, a hook.

It has the convolution's own history: what takes it below `__torch_function__` (functions of
`torch.autograd`, reentrant checkpointing) sends its gradient through the convolution.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from stillnorm.convolutions import Convolution, convolve, convolve_normalized
from stillnorm.convolutions.algebra import gradients
from stillnorm.convolutions.folded import are_saved_tensors_hooked
from stillnorm.errors import StateError
from stillnorm.norms.pair import Pair

# What can be read of a tensor without its values.
METADATA = frozenset(
    {
        Tensor.dim,
        Tensor.size,
        Tensor.numel,
        Tensor.__len__,
        Tensor.is_floating_point,
        Tensor.shape.__get__,  # type: ignore[attr-defined]
        Tensor.ndim.__get__,  # type: ignore[attr-defined]
        Tensor.dtype.__get__,  # type: ignore[attr-defined]
        Tensor.device.__get__,
        Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
        Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    }
)


class Deferred(Tensor):
    """A tensor that stands for the output of a convolution not made yet.

    Args:
        call: The convolution.
        pair: Whose norm may compute it.
    """

    call: Convolution
    pair: Pair
    _node: Any  # the history that it was made with; None without gradients
    _output: Tensor | None
    _of: Any  # the history that the output has
    _as_computed: int  # the output's version when it was computed
    _is_folded: bool  # whether its norm has computed it

    @staticmethod
    def __new__(cls, call: Convolution, pair: Pair) -> Deferred:
        """Make one, without memory."""
        made: Deferred = Tensor._make_wrapper_subclass(
            cls, call.shape, dtype=call.dtype, device=call.x.device
        )
        made.call, made.pair, made._node, made._output = call, pair, None, None
        made._of, made._is_folded = None, False
        return made

    def __init__(self, call: Convolution, pair: Pair) -> None:
        pass  # all is done in __new__, where the tensor is made

    def output(self) -> Tensor:
        """Return the convolution's true output, computed at the first call.

        Where a function of others has returned the stand-in as its own output (reentrant
        checkpointing), or has written to it, the true output gets the history that this gave it.
        """
        node = self._history
        if self._output is None or node is not self._of:
            with _unwatched():
                self._output = self.call() if node is self._node else _with_history_of(self)
            self._of, self._as_computed = node, self._output._version
        return self._output

    @property
    def _history(self) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return self.grad_fn

    @property
    def may_fold(self) -> bool:
        """Whether the norm may compute the convolution.

        It may where nothing has asked for the output, which could have been written to, and where
        its gradient goes to the convolution; and where it did before, so that a checkpoint computes
        the same again.
        """
        if self._history is not self._node:
            return False
        if self._output is None:
            return True
        return self._is_folded and self._output._version == self._as_computed

    @property
    def has_output(self) -> bool:
        """Whether something has asked for the true output."""
        return self._output is not None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what needs no values; for everything else stand aside for the true output."""
        kwargs = kwargs or {}
        if func in METADATA and not args[0].has_output:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _OF_HISTORY:
            _must_not_be_folded(func, args, kwargs)
        result = func(*_settled(args), **_settled(kwargs))
        in_place = args and isinstance(args[0], Deferred) and result is args[0]._output
        return args[0] if in_place else result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Give the values to what asks below autograd; the history is the stand-in's own."""
        if func._schema.is_mutable:
            raise StateError(
                f"{func} writes into the output of a convolution that is folded into its norm",
                help="freeze the norm after it without fold_on=",
            )
        values = _values(args), _values(kwargs or {})
        return func(*values[0], **values[1])


# What asks for the gradient at a tensor; where the norm has folded, none passes there.
_OF_HISTORY = frozenset(
    {
        Tensor.register_hook,
        Tensor.retain_grad,
        torch.autograd.grad,
        torch.autograd.backward,
    }
)


def _must_not_be_folded(func: Any, args: Any, kwargs: Any) -> None:
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Deferred) and leaf._is_folded:
            raise StateError(
                f"{getattr(func, '__name__', func)} asks for the gradient at the output "
                f"{leaf.call.shape} of a convolution that its norm has been computed in",
                help="ask before the norm is called, or freeze that norm without fold_on=",
            )


def _unwatched() -> contextlib.AbstractContextManager[Any]:
    """Keep hooks on saved tensors out.

    The output is kept: a checkpoint that saw it computed would wait for it in vain when it computes
    the rest again.
    """
    if not are_saved_tensors_hooked():
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


def _settled(arguments: Any) -> Any:
    return tree_map_only(Deferred, Deferred.output, arguments)


def _values(arguments: Any) -> Any:
    return tree_map_only(Deferred, _value, arguments)


def _value(deferred: Deferred) -> Tensor:
    # Below autograd: an output computed here would have no history, and must not be kept.
    if deferred._output is not None:
        return deferred._output.detach()
    x, weight, bias = deferred.call.tensors()
    bias = None if bias is None else bias.detach().to(x.dtype)
    return convolve(x.detach(), weight.detach().to(x.dtype), bias, deferred.call.geometry)


def defer(call: Convolution, pair: Pair) -> Tensor:
    """Return a tensor that stands for the output of the call."""
    if call.requires_grad:
        made: Tensor = _Defer.apply(call, pair, call.x, call.weight, call.bias)  # type: ignore[no-untyped-call]
        return made
    return Deferred(call, pair)


class _Defer(torch.autograd.Function):
    """The convolution's history: the gradients of z = conv(x, W) + b.

    The tensors are kept by reference and not as saved tensors: hooks on those (offloading to the
    host) would copy them though this node is dropped as soon as the norm has folded.
    """

    @staticmethod
    def forward(
        ctx: Any, call: Convolution, pair: Pair, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Make the stand-in."""
        ctx.call = call
        made = Deferred(call, pair)
        made._node = ctx
        return made

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of the convolution; they can be differentiated again."""
        x, weight, _ = ctx.call.tensors()
        needed = ctx.needs_input_grad[2:]
        return None, None, *gradients(dz, x, weight.to(x.dtype), ctx.call.geometry, needed)


def _with_history_of(deferred: Deferred) -> Tensor:
    """Return the true output as the function that made the stand-in its own left it."""
    output = deferred._output
    with torch.inference_mode(False), torch.enable_grad():
        values = (deferred.call() if output is None else output).detach()
        made: Tensor = _Value.apply(deferred, values)  # type: ignore[no-untyped-call]
    return made


class _Value(torch.autograd.Function):
    """Values with the history of a stand-in."""

    @staticmethod
    def forward(ctx: Any, deferred: Deferred, values: Tensor) -> Tensor:
        """Return the values."""
        return values.detach()

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, None]:
        """Hand the gradient on."""
        return dz, None


def normalized(
    deferred: Deferred,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> Tensor:
    """Compute the convolution and the norm after it in one."""
    x, weight, bias = deferred.call.tensors()
    geometry = deferred.call.geometry
    deferred._is_folded = True
    return convolve_normalized(x, weight, bias, gamma, beta, mean, var, eps, geometry)
