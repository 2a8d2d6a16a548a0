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

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

from stillnorm.norms.adapters.keras import in_mode, position_of_training
from stillnorm.norms.hold import HOLD, Affine, Hold, hold_of


class Guard:
    """What makes a layer of Keras stay as it is."""

    is_held_class = True
    held_base: Any
    takes_training: int | None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a layer of the base, which nobody holds: `from_config` and clones call this."""
        return cls.held_base(*args, **kwargs)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Normalise by the running statistics, whatever `training` says."""
        held: Hold = self.__dict__[HOLD]
        if held.affine == "frozen":
            for variable in _variables(self):
                if variable.trainable:  # set past the layer
                    held.required_grad[variable.path] = True
                    variable.trainable = False
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
    made: Any = type(
        base.__name__,
        (Guard, base),
        {
            "__module__": base.__module__,
            "__doc__": f"A {base.__name__} held by stillnorm.",
            "held_base": base,
            "takes_training": position_of_training(base.call),  # type: ignore[attr-defined]
        },
    )
    _register_as(base, made)
    return made  # type: ignore[no-any-return]


def _register_as(base: type, made: type) -> None:
    """Let Keras write the name under which a user has registered the base; it reads the base."""
    from keras.saving import get_custom_objects, get_registered_name, register_keras_serializable

    registered = get_registered_name(base)
    package, registers, name = registered.partition(">")
    if registers:
        register_keras_serializable(package, name)(made)
        get_custom_objects()[registered] = base


def why_not(module: Any, affine: Affine) -> str | None:
    """Return the reason why the layer cannot be held so, or None when it can."""
    if "call" in vars(module):
        return "its call was replaced on the instance, past its class: freeze first"
    if hold_of(module) is not None or affine == "frozen":
        return None
    if position_of_training(type(module).call) is None:
        return "its call takes no training=, so its mode is its own: affine='frozen' holds it"
    return None


def hold(module: Any, affine: Affine) -> None:
    """Hold a layer, or change what of a held layer's affine is frozen.

    Mutates:
        The class; with ``affine="frozen"`` `trainable`, of its variables too, and their `.grad`.
        No variable's value.
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
        held.required_grad.update({v.path: v.trainable for v in _variables(module)})
        module.held_base.trainable.fset(module, False)
        for variable in _variables(module):
            variable.value.grad = None
    elif affine == "trains" and held.affine == "frozen":
        _trainable_as_asked(module, held)
    held.affine = affine


def release(module: Any) -> None:
    """Make a held layer what it would be now had it never been held.

    Mutates:
        The class, and `trainable` of the layer and its variables. No variable's value.
    """
    held: Hold = module.__dict__[HOLD]
    if held.affine == "frozen":
        _trainable_as_asked(module, held)
    module.__class__ = module.held_base
    del module.__dict__[HOLD]


def remember(module: nn.Module) -> Callable[[], None]:
    """Return what gives the layer's variables the `trainable` and the gradient that they have."""
    before = [(v, v.trainable, v.value.grad) for v in _variables(module)]

    def put_back() -> None:
        for variable, trainable, grad in before:
            if variable.trainable != trainable:
                variable.trainable = trainable
            if variable.value.grad is not grad:
                variable.value.grad = grad

    return put_back


def _variables(module: Any) -> list[Any]:
    """Return the variables that `trainable` decides about."""
    return list(module._trainable_variables)


def _trainable_as_asked(module: Any, held: Hold) -> None:
    module.held_base.trainable.fset(module, held.asked)
    for variable in _variables(module):
        variable.trainable = held.required_grad.get(variable.path, held.asked)
    held.required_grad.clear()
