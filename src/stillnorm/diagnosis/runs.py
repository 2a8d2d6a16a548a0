"""What the model's forwards showed: three flows over the same batches, the user's score in each.

All are in eval mode but for the norms themselves:

- the **eval flow**, running statistics everywhere: what the user ships;
- the **batch flow**, batch statistics wherever `train()` would use them: what was trained, and
  what running statistics estimate;
- the **recalibrated** flow, the eval flow after `recalibrate` on these batches: what that repairs.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.data import DataLoader

from stillnorm.calibration import recalibrate
from stillnorm.diagnosis.request import Request
from stillnorm.errors import BatchError, CalibrationError
from stillnorm.norms import find_norms, probe_modes
from stillnorm.state import preserved
from stillnorm.tracing import Forward, Trace, batch_size, each_batch, trace

Flow = Literal["eval", "batch", "recalibrated"]

MATTERS = 0.05  # of a score: less is what other samples might have shown


@dataclass(frozen=True)
class Head:
    """The user's own score, higher is better, three ways.

    Args:
        eval: With running statistics: what ships.
        batch: With batch statistics: what was trained.
        recalibrated: With statistics re-estimated on the same batches; None where nothing could be.
    """

    eval: float
    batch: float
    recalibrated: float | None

    def matters(self, difference: float) -> bool:
        """Tell a gain from what other samples might have shown: five points, or five percent."""
        scores = [s for s in (self.eval, self.batch, self.recalibrated) if s is not None]
        fractions = all(0 <= score <= 1 for score in scores)
        return difference > MATTERS * (1 if fractions else max(map(abs, scores)))

    @property
    def recalibration_pays(self) -> bool:
        """Whether recalibrating raises the score by what matters."""
        return self.recalibrated is not None and self.matters(self.recalibrated - self.eval)


@dataclass(frozen=True, eq=False)
class Runs:
    """What the forwards showed.

    Args:
        batches: The batches that were run.
        batch_sizes: Samples in each.
        traces: By flow; no ``"recalibrated"`` where there was nothing to recalibrate.
        head: The scores, or None without `score`.
        called: The modules in order of their first call in the eval flow.
        after: By path: running mean and variance after recalibration.
        forward: How the user calls the model.
        loader: The DataLoader they came from, or None.
    """

    batches: tuple[object, ...]
    batch_sizes: tuple[int, ...]
    traces: dict[Flow, Trace]
    head: Head | None
    called: tuple[nn.Module, ...]
    after: dict[str, tuple[Tensor, Tensor]]
    forward: Forward | None
    loader: DataLoader[object] | None

    @property
    def total(self) -> int | None:
        """How many batches the loader has; over an iterable dataset it may not know."""
        if self.loader is None:
            return None
        try:
            return len(self.loader)
        except TypeError:
            return None


def run_flows(request: Request, max_batches: int | None) -> Runs:
    """Run the flows one after the other, and leave the model as it was.

    Raises:
        BatchError: There is no batch, or the model cannot be called on one.
    """
    model, batches = request.model, request.batches
    forward, score = request.forward, request.score
    with preserved(model):  # iterating a DataLoader draws from the global generators
        taken = tuple(islice(each_batch(batches), max_batches))
        if not taken:
            raise BatchError("there is no batch in batches=", help="give at least one batch")
        sizes = tuple(batch_size(batch) for batch in taken)

        def run(flow: Literal["eval", "batch"]) -> tuple[Trace, float | None]:
            scores: list[float] = []

            def keep_score(output: object, batch: object) -> None:
                if score is not None:
                    scores.append(float(score(output, batch)))

            seen = trace(model, iter(taken), forward=forward, flow=flow, on_output=keep_score)
            return seen, _weighted(scores, sizes) if scores else None

        called: dict[nn.Module, None] = {}
        noted = register_module_forward_pre_hook(lambda module, _: called.setdefault(module, None))
        try:
            in_eval, eval_score = run("eval")
        finally:
            noted.remove()
        by_batch, batch_score = run("batch")
        traces: dict[Flow, Trace] = {"eval": in_eval, "batch": by_batch}
        after: dict[str, tuple[Tensor, Tensor]] = {}
        recalibrated_score = None
        if _can_recalibrate(model, in_eval):
            # Inputs that give no statistics (NaN, say) leave two numbers to report, not three.
            with suppress(CalibrationError):
                report = recalibrate(model, iter(taken), forward=forward, group="self")
                after = {done.path: (done.mean_after, done.var_after) for done in report.layers}
                traces["recalibrated"], recalibrated_score = run("eval")
    head = None
    if eval_score is not None and batch_score is not None:
        head = Head(eval_score, batch_score, recalibrated_score)
    inside = set(model.modules())
    return Runs(
        batches=taken,
        batch_sizes=sizes,
        traces=traces,
        head=head,
        called=tuple(module for module in called if module in inside),
        after=after,
        forward=forward,
        loader=batches if isinstance(batches, DataLoader) else None,
    )


def _weighted(values: list[float], weights: tuple[int, ...]) -> float:
    """Average per batch, each batch weighing as many samples as it has."""
    return sum(v * w for v, w in zip(values, weights, strict=True)) / max(sum(weights), 1)


def _can_recalibrate(model: nn.Module, seen: Trace) -> bool:
    modes = probe_modes(model)
    return any(
        layer.has_statistics and layer.path in seen.reached and modes.held_by(layer) is None
        for layer in find_norms(model)
    )
