"""The JSON Schema of `check`'s report.

`python -m stillnorm.diagnosis.writing.schema > docs/check.schema.json` writes it anew.
"""

from __future__ import annotations

import json

from stillnorm.diagnosis.report import SCHEMA_VERSION, Report
from stillnorm.reports.schema import schema_of

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema() -> str:
    """Return the schema, as the file holds it."""
    body = schema_of(Report, omit=("table",))
    version = {"schema_version": {"const": SCHEMA_VERSION}}
    whole = {"$schema": _DIALECT, "title": "stillnorm check"} | body
    whole["properties"] = version | body["properties"]
    whole["required"] = [*version, *body["required"]]
    return json.dumps(whole, indent=2, ensure_ascii=False)


if __name__ == "__main__":
    print(schema())
