"""The baseline: faults that were there when somebody began to check, so that only new ones count.

A JSON file, sorted, a line for each layer: what a review of it has to read is what has changed.

    {
      "stillnorm_baseline": 1,
      "models": {
        "Net": {
          "SN201": ["bn_6"]
        }
      }
    }
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.report import Report
from stillnorm.diagnosis.suppression import without
from stillnorm.errors import FileFormatError
from stillnorm.state.files import write_whole

VERSION = 1
Faults = Mapping[str, Mapping[str, tuple[str, ...]]]  # model: code: paths


@dataclass(frozen=True)
class Baseline:
    """Known faults of models, which are told apart by the names of their classes.

    Args:
        name: What the file is called.
        models: By model and code, the paths.
    """

    name: str
    models: Faults

    @classmethod
    def read(cls, path: Path) -> Baseline:
        """Read a baseline.

        Raises:
            FileFormatError: It cannot be read, or is none.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise FileFormatError(
                f"{path} cannot be read: {error.strerror}",
                help=f"--write-baseline {path} makes one",
            ) from error
        except (ValueError, RecursionError) as error:
            raise FileFormatError(f"{path} is not JSON: {error}", help=_remake(path)) from error
        version = data.get("stillnorm_baseline") if isinstance(data, dict) else None
        if version != VERSION:
            what = "not a baseline" if version is None else f"a baseline of version {version}"
            raise FileFormatError(f"{path} is {what}", help=_remake(path))
        if not _is_faults(models := data.get("models")):
            raise FileFormatError(
                f'{path}: "models" has to hold paths by model and code', help=_remake(path)
            )
        return cls(
            path.name,
            {
                model: {code: tuple(paths) for code, paths in codes.items()}
                for model, codes in models.items()
            },
        )

    def write(self, path: Path) -> None:
        """Write the baseline, whole or not at all.

        Raises:
            FileFormatError: The file cannot be written; what was there is still there.
        """
        models = {
            model: {code: sorted(paths) for code, paths in sorted(codes.items()) if paths}
            for model, codes in sorted(self.models.items())
        }
        data = {"stillnorm_baseline": VERSION, "models": models}
        write_whole(path, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())

    def updated(self, report: Report) -> Baseline:
        """Return the baseline with what a report found, for the rules that ran in it."""
        kept = {c: p for c, p in self._known(report).items() if c not in report.ran}
        found: dict[str, list[str]] = {}
        for finding in report.findings:
            found.setdefault(finding.code, []).extend(finding.paths or ("",))
        now = kept | {code: tuple(dict.fromkeys(paths)) for code, paths in found.items()}
        return replace(self, models={**self.models, report.model: now})

    def hidden(self, report: Report) -> Report:
        """Return the report without what is known."""
        known = self._known(report)

        def accepted(finding: Finding, path: str) -> str | None:
            return "" if path in known.get(finding.code, ()) else None

        return without(report, accepted, self.name)

    def gone(self, report: Report) -> list[tuple[str, str]]:
        """Return the faults (code, path) that rules looked for and did not find any more.

        Args:
            report: What `hidden` returned.
        """
        met = {(s.code, path) for s in report.suppressed for path in s.paths}  # whoever hides it
        known = [(code, path) for code, paths in self._known(report).items() for path in paths]
        return [fault for fault in known if fault[0] in report.ran and fault not in met]

    def _known(self, report: Report) -> Mapping[str, tuple[str, ...]]:
        return self.models.get(report.model, {})


def _remake(path: Path) -> str:
    return f"move it away, and --write-baseline {path} makes one"


def _is_faults(models: object) -> bool:
    return isinstance(models, dict) and all(
        isinstance(codes, dict)
        and all(
            isinstance(paths, list) and all(isinstance(path, str) for path in paths)
            for paths in codes.values()
        )
        for codes in models.values()
    )
