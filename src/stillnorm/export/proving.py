"""Running what was written beside the model, and comparing what the two return."""

from __future__ import annotations

from torch import Tensor

from stillnorm.errors import ExportError
from stillnorm.export.artifact import Artifact
from stillnorm.export.call import Call, numbers, size_of
from stillnorm.export.compare import OutputError, Tolerance, errors
from stillnorm.export.report import Run
from stillnorm.export.sizes import with_other_sizes
from stillnorm.reports.numbers import short
from stillnorm.state import preserved


def proved(artifact: Artifact, call: Call, *, asked: bool) -> tuple[Run, ...]:
    """Run a file on the example and on its samples in other batch sizes.

    Args:
        artifact: The file.
        call: The call on the example.
        asked: Whether the user has said which sizes are open, and in which range.

    Raises:
        ExportError: It computes something else than the model; or other batch sizes are open in it,
            and the model takes none.
    """
    runs = [_compared(artifact, call, size_of(call.leaves), call.run())]
    others = with_other_sizes(call, artifact.program, artifact.opened, asked=asked)
    for size, other in others:
        try:
            output = other.run()
        except Exception:  # the model does not take that many samples
            continue
        runs.append(_compared(artifact, other, size, output))
    if others and len(runs) == 1 and not asked:
        raise ExportError("the model itself takes no other")
    return tuple(runs)


def must_repeat(call: Call) -> None:
    """Raise where the model's output is another one each time, or holds nothing to compare.

    Raises:
        ExportError: It draws random numbers, goes by state of its own, or has no finite number.
    """
    with preserved(call.module):
        first, again = numbers(call.run()), numbers(call.run())
    for y in first:
        if y.numel() and not bool(y.isfinite().any()):
            raise ExportError(
                "the model in eval mode returns NaN or infinity throughout: there is nothing to "
                "compare",
                help="sn.check(model, batches) says which layer it comes from, if it is a norm",
            )
    names = [""] * len(first)
    allows = _tolerance(call, first).allows
    if len(again) != len(first) or not all(map(allows, errors(again, first, names))):
        raise ExportError(
            "the model in eval mode returns another output each time: nothing can be compared",
            help="dropout by function needs the mode: F.dropout(x, training=self.training); other "
            "random numbers can be an input. If the output depends on a buffer that the forward "
            "itself changes, a cache or a counter, change it only if self.training",
        )


def _tolerance(call: Call, outputs: list[Tensor]) -> Tolerance:
    """Return how far outputs may be off: by the coarsest dtype that the model computes in."""
    model = call.module
    return Tolerance.of([*model.parameters(), *model.buffers(), *numbers(call.leaves), *outputs])


def _compared(artifact: Artifact, call: Call, size: int | None, output: object) -> Run:
    """Run the file and compare it with the model.

    Raises:
        ExportError: It computes something else.
    """
    expected = numbers(output)
    got = artifact.run(call)
    names = [port.name for port in artifact.outputs]
    if len(got) != len(expected) or len(names) != len(expected):
        raise ExportError(
            f"the file returns {len(got)} tensors and the model {len(expected)}",
            help="forward=lambda model, example: ... that returns the tensors alone",
        )
    found = errors(got, expected, names)
    tolerance = _tolerance(call, expected)
    wrong = [error for error in found if not tolerance.allows(error)]
    if wrong and not _rounds_so_itself(found, call, expected, tolerance):
        raise _wrong(wrong[0], tolerance, call, expected, size)
    constant = (name for name, y in zip(names, expected, strict=True) if _is_constant(y))
    return Run(size, found, tuple(constant))


def _is_constant(output: Tensor) -> bool:
    return output.numel() > 1 and bool((output == output.flatten()[0]).all())


def _rounds_so_itself(
    found: tuple[OutputError, ...], call: Call, expected: list[Tensor], tolerance: Tolerance
) -> bool:
    """Tell whether the model's own rounding, against float64, explains the errors."""
    try:
        exact = numbers(call.in_float64().run())
        own = errors(expected, exact, [""] * len(exact))
    except Exception:  # it does not copy, or does not run in float64
        return False
    return len(own) == len(found) and all(
        tolerance.raised_to(one).allows(error) for one, error in zip(own, found, strict=True)
    )


def _wrong(
    error: OutputError, tolerance: Tolerance, call: Call, expected: list[Tensor], size: int | None
) -> ExportError:
    """Tell a file that is wrong from a model that gives nothing to compare."""
    if not all(bool(y.isfinite().all()) for y in expected if y.is_floating_point()):
        return ExportError(
            f"the model in eval mode returns NaN or infinity at batch size {size}, and the file "
            "something else: nothing can be compared",
            help="sn.check(model, batches) says which layer it comes from, if it is a norm",
        )
    return ExportError(
        f"{error.name} of the file is off by {short(error.max)} of its largest value (rms "
        f"{short(error.rms)}) from the model in eval mode, at batch size {size}; allowed are "
        f"{short(tolerance.max)} and {short(tolerance.rms)}",
        help="nothing was written; where only some batch sizes are wrong, dynamic=False",
    )
