"""A held layer of Keras: the same object, of a class of its own that stays in inference mode.

Train mode has two doors in Keras, and both are closed. The argument ``training=`` of a call, which
`fit` gives: `call` is told False. And `trainable`, which a model hands to all layers in it
(``base.trainable = True``, before fine-tuning): noted, and not followed.

Keras writes the name of a layer's class into its files, and copies and pickles by writing and
reading one. The held class is therefore called what its base is called: what is read back is a
layer of the base, ``trainable=False`` where its affine was frozen, which stillnorm does not hold.

Source: keras/src/layers/layer.py, keras/src/saving/serialization_lib.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, cast

from torch import nn

from stillnorm.norms import same_bits, write
from stillnorm.norms.adapters.keras import core_of, in_mode, others, position_of_training
from stillnorm.norms.hold import HOLD, Affine, Hold, hold_of


class Guard:
    """What makes a layer of Keras stay as it is."""

    is_held_class = True
    held_base: Any
    takes_training: int | None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a layer of the base, which nobody holds: `from_config` and clones call this."""
        return cls.held_base(*args, **kwargs)

    def __reduce__(self) -> Any:
        """Pickle and copy a layer of the base, which nobody holds."""
        made, *rest = cast("tuple[Any, ...]", super().__reduce__())
        if getattr(made, "__self__", None) is type(self):  # Keras' `_unpickle_model`
            made = getattr(self.held_base, made.__name__)
        return made, *rest

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Normalise by the running statistics, whatever `training` says."""
        held: Hold = self.__dict__[HOLD]
        if held.affine == "frozen":
            _stop_learning(self, held)
        args, kwargs = in_mode(self.takes_training, args, kwargs, training=False)
        return super().call(*args, **kwargs)  # type: ignore[misc]

    @property
    def trainable(self) -> bool:
        """Whether the layer's variables learn."""
        return bool(self.held_base.trainable.fget(self))

    @trainable.setter
    def trainable(self, value: bool) -> None:
        held: Hold = self.__dict__[HOLD]
        if held.affine == "trains":
            self.held_base.trainable.fset(self, value)
        else:
            held.asked = bool(value)
            held.required_grad.update(dict.fromkeys(held.required_grad, bool(value)))

    def __repr__(self) -> str:
        """Say what is held."""
        held = "statistics, affine" if self.__dict__[HOLD].affine == "frozen" else "statistics"
        return f"{super().__repr__().removesuffix('>')}, held=({held})>"


@cache
def held_class(base: type) -> type[nn.Module]:
    """Return the class of a held layer whose class is `base`; always the same one."""
    core: Any = core_of(base)
    made: Any = type(
        base.__name__,
        (Guard, base) if base is core else (Guard, base, _inferring(core)),
        {
            "__module__": base.__module__,
            "__doc__": f"A {base.__name__} held by stillnorm.",
            "held_base": base,
            "takes_training": _position_of_training(base),
        },
    )
    _register_as(base, made)
    return made  # type: ignore[no-any-return]


@cache
def _inferring(core: Any) -> type:
    """Make what the ``super().call()`` of a user's class reaches: Keras' own, in inference mode."""
    position = _position_of_training(core)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = in_mode(position, args, kwargs, training=False)
        return core.call(self, *args, **kwargs)

    return type(core.__name__, (core,), {"__module__": core.__module__, "call": call})


def _position_of_training(kind: Any) -> int | None:
    """Return where the `call` of a class takes ``training=``, the layer itself not counted."""
    position = position_of_training(kind.call)
    return None if position is None else position - 1


def _register_as(base: type, made: type) -> None:
    """Let Keras write the name that it, or the user, has registered for the base; it reads it."""
    from keras.saving import get_custom_objects, get_registered_name, register_keras_serializable
    from keras.src.api_export import REGISTERED_OBJS_TO_NAMES as public

    if base in public:  # keras.layers.BatchNormalization
        public[made] = public[base]
    registered = get_registered_name(base)
    package, registers, name = registered.partition(">")
    if registers:
        register_keras_serializable(package, name)(made)
        get_custom_objects()[registered] = base


def why_not(module: Any, affine: Affine) -> str | None:
    """Return the reason why the layer cannot be held so, or None when it can."""
    if "call" in vars(module):
        return "its call was replaced on the instance, past its class: freeze first"
    if not getattr(inspect.getattr_static(type(module), "trainable"), "fset", None):
        return "its class replaces the property trainable of Keras' layers by one that is not set"
    if hold_of(module) is not None or affine == "frozen":
        return None
    if position_of_training(type(module).call) is None:
        return "its call takes no training=, so its mode is its own: affine='frozen' holds it"
    return None


def hold(module: Any, affine: Affine) -> None:
    """Hold a layer, or change what of a held layer's affine is frozen.

    Mutates:
        The class; with ``affine="frozen"`` `trainable`, of its variables and the layers in it too,
        and their `.grad`. No variable's value.
    """
    held = hold_of(module)
    if held is None:
        held = Hold("trains", bool(module.trainable), {})
        base: type = type(module)
        kind = held_class(base)
        module.__dict__[HOLD] = held
        module.__class__ = kind
    if affine == "frozen" and held.affine == "trains":
        held.asked = bool(module.trainable)
        held.required_grad.update({k: bool(one.trainable) for k, one in _switched(module).items()})
        module.held_base.trainable.fset(module, False)
        for variable in _variables(module):
            variable.value.grad = None
    elif affine == "trains" and held.affine == "frozen":
        _trainable_as_asked(module, held)
    held.affine = affine


def release(module: Any) -> None:
    """Make a held layer what it would be now had it never been held.

    Mutates:
        The class, and `trainable` of the layer, its variables and the layers in it. No variable's
        value.
    """
    held: Hold = module.__dict__[HOLD]
    if held.affine == "frozen":
        _trainable_as_asked(module, held)
    module.__class__ = module.held_base
    del module.__dict__[HOLD]


def remember(module: nn.Module) -> Callable[[], None]:
    """Return what gives the layer back what it has besides attributes and its four tensors.

    That is the `trainable` of its variables and of the layers in it, the gradients, and the values
    of what it counts besides.
    """
    switches = [(one, one.trainable) for one in _switched(module).values()]
    gradients = [(v.value, v.value.grad) for v in _variables(module)]
    values = [(tensor, tensor.detach().clone()) for tensor in others(module).values()]

    def put_back() -> None:
        for one, trainable in switches:
            if one.trainable != trainable:
                one.trainable = trainable
        for tensor, grad in gradients:
            if tensor.grad is not grad:
                tensor.grad = grad
        for tensor, value in values:
            if not same_bits(tensor, value):
                write(tensor, value)

    return put_back


def _variables(module: Any) -> list[Any]:
    """Return the variables that `trainable` decides about."""
    layers = (module, *module._flatten_layers(include_self=False))
    return [variable for layer in layers for variable in layer._trainable_variables]


def _switched(module: Any) -> dict[str, Any]:
    """Return what the layer's `trainable` sets too, by a name of its own.

    The layers in it, from the outermost, and the variables, of which two may have one path.
    """
    every = (*module._flatten_layers(include_self=False), *_variables(module))
    return {f"{i} {one.path}": one for i, one in enumerate(every)}


def _stop_learning(module: Any, held: Hold) -> None:
    """Note what learns although the layer does not, set past it, and stop it."""
    learning = [(name, one) for name, one in _switched(module).items() if one.trainable]
    for name, one in learning:
        held.required_grad[name] = True
        one.trainable = False


def _trainable_as_asked(module: Any, held: Hold) -> None:
    _stop_learning(module, held)
    module.held_base.trainable.fset(module, held.asked)
    for name, one in _switched(module).items():
        one.trainable = held.required_grad.get(name, held.asked)
    held.required_grad.clear()
