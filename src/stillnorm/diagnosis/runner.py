"""`check`: gather the evidence, run the rules, let causes stand for their symptoms."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.jit._trace import TopLevelTracedModule
from torch.optim import Optimizer

from stillnorm.calibration.ranks import Group
from stillnorm.diagnosis.causes import causes_first
from stillnorm.diagnosis.codes import Names, choose
from stillnorm.diagnosis.evidence import CannotTell, Evidence
from stillnorm.diagnosis.evidence.peers import gather
from stillnorm.diagnosis.evidence.request import Predict, Request, Score, TrainStep
from stillnorm.diagnosis.evidence.runs import run_flows
from stillnorm.diagnosis.files.checkpoint import Target, opened
from stillnorm.diagnosis.finding import SEVERITIES, Finding
from stillnorm.diagnosis.fixing.fixes import can_be_done
from stillnorm.diagnosis.fixing.trials import tried
from stillnorm.diagnosis.gap import explain_gap
from stillnorm.diagnosis.report import Crash, Data, Layer, NotRun, Report
from stillnorm.diagnosis.rule import Rule
from stillnorm.diagnosis.verdict import judge
from stillnorm.errors import CallError, StateError
from stillnorm.tracing import Forward


def check(
    model: nn.Module | Target,
    batches: object = None,
    *,
    forward: Forward | None = None,
    score: Score | None = None,
    predict: Predict | None = None,
    train_step: TrainStep | None = None,
    optimizer: Optimizer | None = None,
    restore: Iterable[Any] = (),
    max_batches: int | None = 8,
    select: Names | None = None,
    ignore: Names | None = None,
    group: Group = "self",
) -> Report:
    """Find what is wrong with a model's norm layers, prove it on your data, say what repairs it.

    Only looks: afterwards modes, tensors, hooks, gradients, random states and batches are as they
    were, also after an exception. What a forward of the model's own writes elsewhere, to a counter,
    a list or a parameter that is no norm's, stays written.

    Args:
        model: The model. Or a file, for which the rules run that need no more: a checkpoint
            (``.safetensors``, ``.pt``, ``.pth``, ``.ckpt``, ``.bin``), of which only tensors are
            unpickled, an ``.onnx`` graph, or a ``.pt2`` of `torch.export`. Or a state dict.
        batches: A DataLoader, a list of batches or one batch, best of training data and as large
            as in training. Without it the rules that need only the modules run, and the report
            says which did not.
        forward: How to call the model: ``forward(model, batch)``. By default ``model(inputs)``
            with the first item of a pair, or ``model(**batch)`` with a mapping.
        score: ``score(output, batch)``, higher is better, in your own unit. The report then begins
            with the score in eval mode, with batch statistics, and recalibrated.
        predict: ``predict(model, batch)``: how you infer, modes and all.
        train_step: ``train_step(model, batch)``, or ``train_step(model, batch, optimizer)``: one
            step of your training. It runs, and what it changed is put back: everything that is
            reachable from the model, the optimizer, `restore` and the global generators. What else
            the function itself owns is yours to keep.
        optimizer: What the step steps.
        restore: Whatever else the step changes and has a `state_dict`: a scheduler, a scaler, an
            average of the weights.
        max_batches: How many batches are read; None for all.
        select: Only these rules: codes, beginnings of codes, or slugs.
        ignore: Not these rules.
        group: A process group, or None for all processes, whose ranks are compared; every one of
            them has to call `check` then. By default no other process is asked.

    Returns:
        The findings, what was not checked and why, and the verdict: freeze, recalibrate or train.

    Raises:
        BatchError: The model cannot be called on a batch; the message has the line to write. Or
            batches were given with a file, or `max_batches` is less than 1.
        CallError: `score`, `predict` or `train_step` cannot be called; `predict` or `train_step`
            raised; the score is no number. An exception in `score` comes through.
        FileFormatError: The file cannot be read.
        StateError: The model is a trace of TorchScript.
        CalibrationError: There is no such group.
        RuleError: `select` or `ignore` names no rule.

    Cost:
        Three forwards per batch with statistics taken at every norm, and up to a dozen of the first
        batch. One backward to the norms, of the first batch, where a gap is to be explained. With
        four batches that is 5 to 7.4 eval forwards over them for ResNet-50, 8 to 12 for
        MobileNetV2, whose norms weigh more (benchmarks/check.py). `train_step` and `predict` cost
        what they cost; a score is taken of every fix that needs data.

    Example:
        >>> import torch
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=0), nn.Linear(8, 2))
        >>> report = check(net)
        >>> report.findings[0].code, report.findings[0].paths
        ('SN002', ('1',))
    """
    started = time.perf_counter()
    chosen = choose(select, ignore)
    if isinstance(model, TopLevelTracedModule):
        raise StateError(
            "the model is a trace of TorchScript: its layers have no modes and no settings",
            help="check the Python model, before torch.jit.trace",
        )
    file, tree = (None, model) if isinstance(model, nn.Module) else opened(model)
    request = Request(
        tree,
        batches,
        forward,
        score,
        predict,
        train_step,
        optimizer,
        tuple(restore),
        file=file,
        peers=None if file is not None else gather(tree, group),
    )
    runs = None if batches is None else run_flows(request, max_batches)
    evidence = Evidence(request, runs)
    outcome = _run(chosen, evidence)
    findings = tried([_told(finding, evidence) for finding in outcome.findings], evidence)
    findings.sort(key=lambda finding: (SEVERITIES.index(finding.severity), finding.code))
    return Report(
        model=type(model).__name__ if file is None else file.name,
        layers=tuple(Layer(x.path, x.kind, x.num_features) for x in evidence.layers),
        findings=tuple(findings),
        not_run=tuple(sorted(outcome.not_run, key=lambda missed: missed.code)),
        crashed=tuple(outcome.crashed),
        head=None if runs is None else runs.head,
        gap=explain_gap(evidence, findings, outcome.ran),
        verdict=judge(evidence, findings),
        data=None if runs is None else Data.describe(runs),
        seconds=time.perf_counter() - started,
        ran=tuple(sorted(outcome.ran)),
        file="" if file is None else file.title,
        _evidence=evidence,
    )


@dataclass
class _Outcome:
    """What became of each rule."""

    findings: list[Finding] = field(default_factory=list)
    not_run: list[NotRun] = field(default_factory=list)
    crashed: list[Crash] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)


def _run(rules: Iterable[type[Rule]], evidence: Evidence) -> _Outcome:
    """Run the rules, causes first."""
    outcome = _Outcome()
    for rule in causes_first(rules):
        if lacking := evidence.request.lacks(rule.needs):
            outcome.not_run.append(NotRun(rule.code, lacking))
            continue
        try:
            found = list(rule().find(evidence))
        except CannotTell as reason:
            outcome.not_run.append(NotRun(rule.code, str(reason)))
        except CallError:  # what the user gave does not work: that is for the user to see
            raise
        except Exception as error:  # one broken rule must not take the others' findings with it
            outcome.crashed.append(Crash(rule.code, f"{type(error).__name__}: {error}"))
        else:
            outcome.ran.append(rule.code)
            outcome.findings += found
            for finding in found:
                paths = evidence.from_here(finding.paths) if rule.spreads else finding.paths
                evidence.causes.add(finding.code, rule().symptoms(finding), paths)
    return outcome


def _told(finding: Finding, evidence: Evidence) -> Finding:
    """Return the finding with what only all rules together tell; of a file nothing is fixed."""
    fix = None if evidence.request.file is not None else finding.fix
    return replace(
        finding,
        fix=fix if fix is not None and can_be_done(fix, evidence.layers) else None,
        explains=evidence.causes.told_by(finding.code),
        sites=evidence.sites(finding.where, finding.paths),
    )
