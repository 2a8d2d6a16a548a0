"""SN006: inference that normalises by the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.evidence.prediction import Prediction
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer
from stillnorm.reports.document import Table
from stillnorm.reports.numbers import count, short

SHOWN = 3


class TrainModeInference(Rule):
    """The user's own inference normalises by the batch, or moves the running statistics.

    What it finds:
        `predict` is run on the first batch, on the model as it was found. Reported are layers that
        have running statistics and normalise by the batch all the same, and layers whose statistics
        are others afterwards. Then `predict` is run on half of the batch, and the same samples'
        answers are compared: how many change, and by how much.

        It is an error where answers change or statistics move, and where several samples are
        normalised together and nothing can be compared (random answers, one sample in the batch); a
        warning where no answer changes.

    Why it matters:
        `torch.no_grad()` and `torch.inference_mode()` switch off gradients, not train mode: the
        answer for one sample then depends on which others are in the batch, scores depend on the
        batch size, and every validation changes the model by what it validates on. Measured: eval
        outputs off by 1.39 after validating once on shifted data.

    When it is fine:
        Adapting to the test data on purpose (AdaBN, TENT), transductive few-shot learning, and
        generators that are sampled in train mode do just this; that cannot be told from a mistake:
        ignore the code. Not reported: dropout layers alone in train mode, instance norm, which
        never mixes samples, and layers without running statistics, which are SN107's.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> def predict(model, batch):
        ...     with torch.no_grad():  # and no eval()
        ...         return model(batch)
        >>> report = check(net, torch.randn(16, 4), predict=predict, select="SN006")
        >>> report.findings[0].evidence["answers_changed"], report.findings[0].evidence["answers"]
        (8, 8)

    Fix:
        Advice: infer inside `with sn.eval_mode(model):`, which afterwards gives every module the
        mode that it had. For Monte Carlo dropout call `train()` there on the dropout layers only.

    References:
        yaodongyu/TRADES#3 (accuracy depends on the batch size); discuss.pytorch.org/t/7146;
        MIC-DKFZ/nnUNet#170 and unit8co/darts#2312 (dropout at inference by `model.train()`).
    """

    code = "SN006"
    slug = "train-mode-inference"
    severity = "error"
    needs = ("predict",)
    explains = ("SN306",)

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names every such layer."""
        seen = evidence.prediction
        by_batch = [x for x in seen.by_batch if x.normalizes_by(training=False) != "batch"]
        moved = [x for x in seen.moved if not x.updates_statistics(training=False)]
        if not by_batch and not moved:
            return
        layers = evidence.in_order(list(dict.fromkeys((*by_batch, *moved))))
        mates = seen.mates if by_batch else None
        changed = () if mates is None else mates.changed
        together = any(seen.by_batch[layer] > 1 for layer in by_batch)
        proved = bool(changed or moved or (together and seen.mates is None))
        yield self.finding(
            tuple(layer.path for layer in layers),
            _message(by_batch, moved),
            severity="error" if proved else "warning",
            evidence={
                "by_batch": {x.path: seen.by_batch[x] for x in by_batch},
                "mean_moved": {x.path: seen.moved[x] for x in moved},
                "answers": None if mates is None else len(mates.places),
                "answers_changed": None if mates is None else len(changed),
                "answers_moved": None if mates is None else mates.moved,
            },
            note=_note(evidence, seen, by_batch),
            also=count(len(layers) - SHOWN, "more layer") if len(layers) > SHOWN else "",
            help="infer inside `with sn.eval_mode(model):`"
            + (", and train() there the dropout layers only" if seen.dropout else ""),
            table=_table(seen, layers),
            where=evidence.where(layers[0]),
        )


def _message(by_batch: Sequence[NormLayer], moved: Sequence[NormLayer]) -> str:
    does = []
    if by_batch:
        does.append(f"normalises by the batch in {count(len(by_batch), 'layer')}")
    if moved:
        does.append(f"moves the statistics of {count(len(moved), 'layer')}")
    return f"predict {' and '.join(does)}"


def _note(evidence: Evidence, seen: Prediction, by_batch: Sequence[NormLayer]) -> str:
    notes = []
    mates = seen.mates
    if by_batch and mates is not None:
        by = "" if not mates.moved else f", by {short(mates.moved)} of their spread"
        of = f"{len(mates.changed)} of {count(len(mates.places), 'answer')}"
        notes.append(f"without half of the batch {of} change{by if mates.changed else ''}")
    elif by_batch:
        notes.append(f"whether answers depend on the batch was not measured: {seen.unknown}")
    if evidence.model.training:
        notes.append("the model came in train mode")
    if not seen.gradients:
        notes.append("gradients are off, which is not eval()")
    if seen.dropout:
        notes.append("dropout is active too")
    return "; ".join(notes)


def _table(seen: Prediction, layers: Sequence[NormLayer]) -> Table:
    rows = []
    for layer in layers[:SHOWN]:
        samples, moved = seen.by_batch.get(layer), seen.moved.get(layer)
        rows.append(
            (
                layer.path or "(root)",
                "-" if samples is None else count(samples, "sample"),
                "-" if moved is None else f"{short(moved)} sigma",
            )
        )
    return Table(("", "normalised together", "mean moved by"), tuple(rows), "lrr", gap=3)
