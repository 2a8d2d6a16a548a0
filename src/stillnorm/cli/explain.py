"""`stillnorm explain`."""

from __future__ import annotations

import click

from stillnorm.cli.options import show_text


@click.command("explain")
@click.argument("rule", required=False)
@click.option("--markdown", is_flag=True, help="As a page of Markdown, every rule in full.")
def explain(rule: str | None, markdown: bool) -> None:
    """Explain a rule, or list them all.

    What it finds, why it matters, when it is fine, and what repairs it.

    RULE is a code (SN201) or a slug (shared-layer). Without it, or with the beginning of a code
    (SN2), the rules are listed.
    """
    from stillnorm.diagnosis.codes import CODES, lookup
    from stillnorm.diagnosis.rule import Rule
    from stillnorm.diagnosis.writing.handbook import page
    from stillnorm.reports import Block, Code, Document, Heading, Line, Table

    def listed(rules: tuple[type[Rule], ...]) -> Document:
        rows = tuple((r.code, r.slug, r.severity, r.sections()[""]) for r in rules)
        return Document("", (Table(("code", "slug", "severity", "finds"), rows, "llll"),))

    def explained(rule: type[Rule]) -> Document:
        summary, *sections = rule.sections().items()
        blocks: list[Block] = [Line(line) for line in summary[1].splitlines()]
        for heading, content in sections:
            blocks.append(Heading(heading, level=3))
            example = content.startswith(">>>")
            blocks += [Code(content)] if example else map(Line, content.splitlines())
        return Document(f"{rule.code} {rule.slug} ({rule.severity})", tuple(blocks))

    found = tuple(CODES.values()) if rule is None else lookup(rule)
    if markdown:
        click.echo(page(found))
        return
    show_text(explained(found[0]) if len(found) == 1 else listed(found))
