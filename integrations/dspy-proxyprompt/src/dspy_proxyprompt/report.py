"""What a pruning found and did: to read, to store beside the program, and to apply again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from proxyprompt import Artifact
from proxyprompt.artifact import SCHEMA as ARTIFACT_SCHEMA
from proxyprompt.data import write_private
from proxyprompt.errors import ArtifactError

from ._program import Template, plain, predictors, replace_demos

__all__ = ["DemoReport", "PredictorReport", "PruneReport", "apply", "demo_hash"]

KIND = "dspy-proxyprompt-report"
SCHEMA = 1
_LIMIT = 64 * 1024 * 1024


def demo_hash(demo: Any) -> str:
    """SHA-256 of a demo's fields; the same for an example and for the dictionary that ``load`` makes of it.

    Parameters
    ----------
    demo : dspy.Example or dict
    """
    return hashlib.sha256(json.dumps(plain(demo), ensure_ascii=True, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class DemoReport:
    """One demo.

    Attributes
    ----------
    position : int
        In the predictor's ``demos``, from 0. Adapters show incomplete demos first, so it is not the place in the prompt.
    sha256 : str
        See :func:`demo_hash`.
    kept : bool
    verdict : str
        ``"dropped by the adapter"``: it was never shown. ``"frozen"``: not asked about. Else that of the report:
        harmful, redundant and so on.
    reason : str
    attribution, standard_error : float or None
        In points of the metric, all predictors' demos together; positive helps. ``None`` where it was not asked about.
    own_attribution, own_standard_error : float or None
        The same with the demos of all other predictors in place (``per_predictor=True``).
    augmented : bool
        Made by bootstrapping, not taken from the train set as it is.
    incomplete : bool
        Lacks a field of the signature.
    """

    position: int
    sha256: str
    kept: bool
    verdict: str
    reason: str = ""
    attribution: float | None = None
    standard_error: float | None = None
    own_attribution: float | None = None
    own_standard_error: float | None = None
    augmented: bool = False
    incomplete: bool = False


@dataclass(frozen=True)
class PredictorReport:
    """The demos of one predictor.

    Attributes
    ----------
    path : str
        As ``named_predictors`` writes it.
    frozen : bool
        Whether it belongs to a compiled sub-module, which DSPy's own listings leave out.
    demos : tuple of DemoReport
        In the order they had.
    order : tuple of int
        Positions that stay, in their order after the pruning.
    """

    path: str
    frozen: bool
    demos: tuple[DemoReport, ...]
    order: tuple[int, ...]

    @property
    def total_attribution(self) -> float | None:
        """What all its demos contribute together, in points of the metric."""
        known = [d.attribution for d in self.demos if d.attribution is not None]
        return sum(known) if known else None


@dataclass(frozen=True)
class PruneReport:
    """What :class:`~dspy_proxyprompt.ProxyPrune` found and did.

    Attributes
    ----------
    predictors : tuple of PredictorReport
        Those with demos.
    artifact : Artifact or None
        ProxyPrompt's own record: attributions, screening, certificate, costs; ``None`` if no model was asked
        because the adapter shows none of the demos.
    notes : tuple of str
        What else a reader should know.
    """

    predictors: tuple[PredictorReport, ...]
    artifact: Artifact | None = None
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def certified(self) -> bool:
        """Whether the smaller program carries a certificate."""
        return self.artifact is not None and self.artifact.certified

    @property
    def n_before(self) -> int:
        """Demos before."""
        return sum(len(p.demos) for p in self.predictors)

    @property
    def n_after(self) -> int:
        """Demos after."""
        return sum(len(p.order) for p in self.predictors)

    @property
    def tokens(self) -> tuple[int | None, int | None]:
        """Mean prompt tokens of a run of the program before and after, all its calls together, as metered."""
        if self.artifact is None:
            return None, None
        summary = self.artifact.summary
        return summary["before"]["tokens"], summary["after"]["tokens"]

    @property
    def money(self) -> Mapping[str, Any] | None:
        """Bills before and after, as in the artifact's summary; ``None`` without a price."""
        return None if self.artifact is None else self.artifact.summary["cost"]["money"]

    def _costs(self) -> str:
        before, after = self.tokens
        said = "" if before is None or after is None else f"Prompt tokens of a run: {before} -> {after}."
        if said and self.money is not None:
            money = self.money
            said += (
                f" Saved in a thousand runs: {money['saved_per_thousand_calls']:.3g} {money['currency']}"
                f" ({money['source']})."
            )
        return said

    def __str__(self) -> str:
        headline = (
            self.artifact.summary["verdict"]["headline"]
            if self.artifact is not None
            else f"{self.n_before} demos, {self.n_after} of them shown by the adapter; no model was asked"
        )
        lines = [headline + "."]
        if self.artifact is not None:
            lines += self.artifact.summary["verdict"]["sentences"]
        for p in self.predictors:
            total = "" if p.total_attribution is None else f", together {p.total_attribution:+.3f}"
            lines.append(f"{p.path}: {len(p.demos)} demos, {len(p.order)} stay{total}")
            for d in p.demos:
                found = "" if d.attribution is None else f" {d.attribution:+.3f} ± {d.standard_error:.3f}"
                own = "" if d.own_attribution is None else f" (alone {d.own_attribution:+.3f})"
                lines.append(f"  {'+' if d.kept else '-'} {d.position:3d}{found}{own}  {d.verdict}")
        return "\n".join(filter(None, [*lines, self._costs(), *self.notes]))

    def to_json(self) -> str:
        """Text of the file."""
        body = {
            "kind": KIND,
            "schema": SCHEMA,
            "predictors": [asdict(p) for p in self.predictors],
            "notes": list(self.notes),
            "versions": dict(self.versions),
            "artifact": None if self.artifact is None else self.artifact.body,
        }
        return json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report beside the program, readable by its owner only: it holds the text of the demos."""
        write_private(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PruneReport:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ArtifactError
            Not readable, not such a report, of another schema, or inconsistent in itself.
        """
        path = Path(path)
        try:
            if path.stat().st_size > _LIMIT:
                raise ArtifactError(f"{path}: larger than {_LIMIT >> 20} MiB; not a report of ours.")
            body = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read ({error.strerror or error}).") from error
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{path}: not valid JSON ({error}).") from error
        if not isinstance(body, dict) or body.get("kind") != KIND or body.get("schema") != SCHEMA:
            raise ArtifactError(
                f"{path}: not a report of dspy-proxyprompt of schema {SCHEMA}.",
                hint="Give the file that PruneReport.save wrote.",
            )
        try:
            return cls(
                tuple(_predictor(p) for p in body["predictors"]),
                _artifact(body["artifact"]),
                tuple(body["notes"]),
                dict(body["versions"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path}: the report is not complete ({error}).") from error


def _predictor(body: Mapping[str, Any]) -> PredictorReport:
    demos = tuple(DemoReport(**d) for d in body["demos"])
    order = tuple(int(i) for i in body["order"])
    if sorted(order) != [d.position for d in demos if d.kept] or [d.position for d in demos] != list(
        range(len(demos))
    ):
        raise ValueError(f"the kept demos of {body['path']!r} do not add up")
    return PredictorReport(str(body["path"]), bool(body["frozen"]), demos, order)


def _artifact(body: Mapping[str, Any] | None) -> Artifact | None:
    if body is None:
        return None
    if body.get("schema") != ARTIFACT_SCHEMA:
        raise ValueError(f"artifact of schema {body.get('schema')!r}; this version reads {ARTIFACT_SCHEMA}")
    return Artifact(body)


def apply(program: Any, report: PruneReport | str | os.PathLike[str]) -> Any:
    """A copy of a program with the demos that a report removes taken out.

    Parameters
    ----------
    program : dspy.Module
        With the demos that it had before the pruning, compiled or loaded; stays as it is.
    report : PruneReport or path

    Raises
    ------
    ArtifactError
        If a predictor of the report is missing, or has other demos: nothing is removed on a guess.
    """
    if not isinstance(report, PruneReport):
        report = PruneReport.load(report)
    at = {_loose(p.path): p for p in predictors(program)}
    chosen: dict[int, Sequence[Any]] = {}
    for part in report.predictors:
        found = at.get(_loose(part.path))
        if found is None:
            raise ArtifactError(
                f"program: it has no predictor {part.path!r}; it has {', '.join(p.path for p in at.values())}.",
                hint="Apply a report to the program that was pruned.",
            )
        hashes = [demo_hash(d) for d in found.demos]
        wanted = [d.sha256 for d in part.demos]
        if hashes != wanted:
            same = sum(a == b for a, b in zip(hashes, wanted, strict=False))
            raise ArtifactError(
                f"program: {part.path!r} has {len(hashes)} demos, the report was made for {len(wanted)}; {same} are at"
                " their place unchanged.",
                hint="Apply it to the program as it was before the pruning, or prune this one.",
            )
        chosen[found.index] = [found.demos[i] for i in part.order]
    result = Template(program).copy()
    replace_demos(result, chosen)
    result._compiled = True
    return result


def _loose(path: str) -> str:
    return path.replace("'", "")
