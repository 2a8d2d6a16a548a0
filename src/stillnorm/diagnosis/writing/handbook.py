"""All that the rules' docstrings say, as a page of Markdown: `docs/rules.md`.

The docstrings are written so that they read as Markdown already.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from stillnorm.diagnosis.evidence.request import Need
from stillnorm.diagnosis.rule import Rule

_INTRODUCTION = """\
# The rules

What [`check`](checking.md) looks for. A code and a slug keep their meaning for ever.
`stillnorm explain --markdown` writes this page from the rules themselves; `stillnorm explain SN201`
shows one of them in the terminal.

An **error** means that results are or will be silently wrong, a **warning** a measurable loss, an
**info** waste or advice. A rule runs when it has been given what it needs. One in *preview* runs
only when it is selected by its own name."""
_NEEDS: dict[Need, str] = {
    "state": "the tensors",
    "tree": "the model",
    "forward": "batches",
    "score": "`score`",
    "predict": "`predict`",
    "step": "`train_step`",
    "optimizer": "`optimizer`",
    "checkpoint": "a file",
    "group": "several processes",
}
_LITERAL = re.compile(r"``(.+?)``")


def page(rules: Iterable[type[Rule]]) -> str:
    """Return the page of these rules, without a newline at the end."""
    rules = tuple(rules)
    return "\n\n".join([_INTRODUCTION, _overview(rules), *map(_explained, rules)])


def _overview(rules: tuple[type[Rule], ...]) -> str:
    rows = ["| code | rule | severity | finds | needs |", "|---|---|---|---|---|"]
    for rule in rules:
        anchor = f"#{rule.code.lower()}-{rule.slug}"
        finds = " ".join(_prose(rule.sections()[""]).split()).replace("|", "\\|")
        row = (f"[{rule.code}]({anchor})", rule.slug, _standing(rule), finds, _needs(rule))
        rows.append(f"| {' | '.join(row)} |")
    return "\n".join(rows)


def _explained(rule: type[Rule]) -> str:
    return "\n\n".join(
        [f"## {rule.code} {rule.slug}", f"*{_standing(rule)}; needs {_needs(rule)}*", *_texts(rule)]
    )


def _texts(rule: type[Rule]) -> Iterator[str]:
    for heading, text in rule.sections().items():
        if heading:
            yield f"**{heading}**"
        yield f"```pycon\n{text}\n```" if text.startswith(">>>") else _prose(text)


def _standing(rule: type[Rule]) -> str:
    return f"{rule.severity}, preview" if rule.preview else rule.severity


def _needs(rule: type[Rule]) -> str:
    return ", ".join(_NEEDS[need] for need in rule.needs)


def _prose(text: str) -> str:
    """Return the text of a docstring with literals as Markdown writes them."""
    return _LITERAL.sub(r"`\1`", text)
