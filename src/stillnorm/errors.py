"""Every error and warning that stillnorm raises.

    Exception
    └── StillnormError                 catch this for all of them
        ├── SelectorError              also ValueError: `layers=` matches nothing
        ├── RefusedError               also RuntimeError: strict=True, and a layer was refused
        ├── BatchError                 also TypeError: a batch cannot be passed to the model
        ├── CallError                  also TypeError: a function given to check cannot be used
        ├── CalibrationError           also ValueError: the data cannot give statistics
        ├── RepairError                also ValueError: a repair that cannot be meant
        ├── PortError                  also ValueError: two models that are not the same
        ├── VerifyError                also AssertionError: a layer moved or is not frozen
        ├── RuleError                  also ValueError: no rule has that code or slug
        ├── FindingsError              also AssertionError: findings at or above a severity
        ├── DependenceError            also AssertionError: an answer depends on its batch mates
        ├── ConfigError                also ValueError: a configuration says what cannot be meant
        ├── ExportError                also RuntimeError: a model that cannot be exported right
        ├── FileFormatError            also ValueError: a file cannot be read as what it should be
        ├── TargetError                also ValueError: a command-line target cannot be loaded
        └── StateError                 also RuntimeError: the model is no longer what it was
    UserWarning
    └── StillnormWarning

A message is one line of fact with path and numbers, then ``help:`` and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence


class StillnormError(Exception):
    """Base of all errors of stillnorm.

    Args:
        fact: One line: what is the case, with path and numbers.
        help: What the user can do about it.
    """

    def __init__(self, fact: str, *, help: str = "") -> None:
        super().__init__(fact, help)
        self.fact = fact
        self.help = help

    def __str__(self) -> str:
        return f"{self.fact}\n  help: {self.help}" if self.help else self.fact

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.fact, self.help)


def _rebuild(kind: type[StillnormError], fact: str, help: str) -> StillnormError:
    return kind(fact, help=help)


class ModelError(StillnormError, TypeError):
    """Something that was given as the model and is none of torch's."""


class SelectorError(StillnormError, ValueError):
    """A `layers=` selector that matches no norm layer."""


class RefusedError(StillnormError, RuntimeError):
    """An operation with `strict=True` that could not be done to every selected layer."""


class BatchError(StillnormError, TypeError):
    """A batch that cannot be passed to the model as it is."""


class CallError(StillnormError, TypeError):
    """A function of the user's that raised, or is or returns what it must not."""


class CalibrationError(StillnormError, ValueError):
    """Data from which no statistics can be estimated."""


class RepairError(StillnormError, ValueError):
    """A repair that was asked for something it cannot be meant to do."""


class PortError(StillnormError, ValueError):
    """Models of two frameworks that are not the same, layer by layer or in what they compute."""


class VerifyError(StillnormError, AssertionError):
    """A layer that was said to be frozen and is not, or has moved."""


class RuleError(StillnormError, ValueError):
    """A code or slug that names no rule."""


class FindingsError(StillnormError, AssertionError):
    """Findings at or above the severity asked for."""


class DependenceError(StillnormError, AssertionError):
    """An answer that depends on what else is in the batch, or on chance."""


class ConfigError(StillnormError, ValueError):
    """A configuration that says something which cannot be meant."""


class ExportError(StillnormError, RuntimeError):
    """A model that cannot be exported, or a file that does not compute what the model does.

    Args:
        fact: One line: what is the case.
        help: What the user can do about it.
        findings: What `check` found that speaks against it.
    """

    def __init__(self, fact: str, *, help: str = "", findings: Sequence[object] = ()) -> None:
        super().__init__(fact, help=help)
        self.findings = tuple(findings)


class FileFormatError(StillnormError, ValueError):
    """A file that is not readable as what it should be."""


class TargetError(StillnormError, ValueError):
    """A command-line target that cannot be loaded."""


class StateError(StillnormError, RuntimeError):
    """A model that is no longer in the state an operation needs."""


class StillnormWarning(UserWarning):
    """A fact the user should know, though nothing failed."""
