"""From a result to plain data: the summary that reports show, and the artifact that is stored.

Pure: no model, no file. Numbers are what the run measured; sentences say what they mean and no more.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from typing import Any, Literal

import numpy as np

from ._summary_cost import cost_of
from ._summary_screening import screening_of
from ._summary_shrinking import choice_sentences, line_text, near_copies, shrinking_dict, verdict_sentences
from ._verify_stage import verification_text
from ._version import __version__
from .artifact import KIND, SCHEMA, Artifact
from .optimize.certificate import Certificate
from .optimize.classes import classify
from .optimize.clean import Round
from .optimize.relabel import Relabeling
from .pipeline import Result
from .task import TextTask

__all__ = ["build_artifact", "build_summary"]

ReportText = Literal["all", "removed", "none"]

LIMITS = (
    "Every statement is about the queries given here, and about the model and the date named here.",
    "A demonstration called harmful lowers the result on these queries; it may be honest and merely unhelpful.",
    "A trigger that the queries never fire cannot be seen by any method that measures influence.",
    "The certificate is about the prompt in its exact final order; another order is another prompt.",
)


def build_artifact(
    result: Result, *, report_text: ReportText = "removed", created: str | None = None
) -> Artifact:
    """The stored form of a result.

    Parameters
    ----------
    result : Result
    report_text : {"all", "removed", "none"}
        Which demonstrations' texts the report may show. The artifact itself always holds the prompt.
    created : str, optional
        ISO 8601 time; default: now, in UTC.
    """
    summary = build_summary(result, report_text=report_text, created=created)
    ids = [d.id for d in result.original.demonstrations]
    kept = [ids[i] for i in result.certificate.order]
    c, path = result.certificate, result.compression
    return Artifact(
        {
            "kind": KIND,
            "schema": SCHEMA,
            "version": __version__,
            "created": summary["created"],
            "title": result.title,
            "run": result.run,
            "target": result.target_name,
            "original_prompt": result.original.to_dict(),
            "kept": kept,
            "removed": [i for i in ids if i not in set(kept)],
            "attribution": {
                "unit_ids": ids,
                "query_ids": list(result.explanation.query_ids),
                "role": result.explanation.role,
                "model": result.explanation.model,
                "why": result.explanation.why,
                "source": _sources(result),
                **result.explanation.attribution.to_dict(),
            },
            "verification": _verification(result),
            "calibration": _calibration(result),
            "screening": result.screening.to_dict() if result.screening else None,
            "cleaning": {
                "level": result.cleaning.level,
                "n_queries": result.cleaning.n_queries,
                "flagged": [ids[i] for i in result.cleaning.flagged],
                "confirmations": [{"id": ids[x.unit], **x.to_dict()} for x in result.cleaning.confirmations],
                "rounds": [
                    {
                        "explained_without": [i for i, here in zip(ids, r.context, strict=True) if not here],
                        "flagged": [ids[i] for i in r.flagged],
                        "confirmed": [ids[i] for i in r.confirmed],
                        "level": r.level,
                    }
                    for r in result.cleaning.rounds
                ],
                "stopped": result.cleaning.stopped,
            },
            "relabeling": _relabeling(result.relabeling, ids),
            "compression": {
                "tau": path.requirement.tau,
                "margin": path.requirement.margin,
                "n_queries": path.n_queries,
                "calls": path.calls,
                "calls_saved": path.calls_saved,
                "full": path.full.to_dict(),
                "zero_shot": path.zero_shot.to_dict(),
                "reference": path.reference,
                "points": [p.to_dict() for p in path.points],
                "chosen": path.chosen.to_dict(),
                "compression_ratio": path.compression_ratio,
                "candidates": [p.to_dict() for p in path.candidates],
                "cap": path.cap.to_dict() if path.cap else None,
                **shrinking_dict(result.shrinking, ids),
            },
            "certificate": c.to_dict(),
            "splits": {n: {"n": len(q), "sha256": result.splits.digest(n)} for n, q in result.splits.items()},
            "settings": result.settings.to_dict(),
            "spent": [dict(row) for row in result.spent],
            "versions": _versions(),
            "summary": summary,
        }
    )


def _sources(result: Result) -> list[str]:
    """For every demonstration, whether its attribution was measured on the target or estimated."""
    return ["measured" if yes else "estimated" for yes in result.explanation.measured]


def _verification(result: Result) -> dict[str, Any] | None:
    """What proxies estimated and what the target measured, in lists of their own."""
    found = result.explanation.verification
    if found is None:
        return None
    ids = [d.id for d in result.original.demonstrations]
    return {
        "unit_ids": ids,
        "proposed_by": result.explanation.model,
        "measured_by": result.target_name,
        "estimand": result.explanation.estimand,
        "n_queries": len(found.effects),
        "text": verification_text(found, result.target_name),
        **found.to_dict(),
    }


def _calibration(result: Result) -> dict[str, Any] | None:
    """How far proxies helped the target's own attributions; those without their help included."""
    found = result.explanation.calibration
    if found is None:
        return None
    data = found.to_dict()
    return {key: data[key] for key in data if key != "attribution"}


def build_summary(
    result: Result, *, report_text: ReportText = "removed", created: str | None = None
) -> dict[str, Any]:
    """What the report shows; see :mod:`proxyprompt.report`."""
    certificate = result.certificate
    cost = cost_of(result)
    return {
        "schema": 1,
        "title": result.title,
        "created": created or datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "verdict": _verdict(result, cost),
        "target": {"name": result.target_name},
        "performance_name": _performance_name(result),
        "explained_by": {
            "role": result.explanation.role,
            "name": result.explanation.model,
            "why": result.explanation.why,
        },
        "verification": _verification(result),
        "demonstrations": _demonstrations(result, report_text),
        "attribution_unit": _unit(result),
        "before": _prompt(certificate, full=True, n=result.original.n_units),
        "after": _prompt(certificate, full=False, n=result.prompt.n_units),
        "zero_shot": _zero_shot(result),
        "certificate": _certificate(certificate),
        "curve": _curve(result),
        "cleaning": _cleaning(result, report_text),
        "screening": screening_of(result),
        "cost": cost,
        "limits": [*result.notes, *LIMITS],
        "settings": result.settings.to_dict(),
        "versions": _versions(),
    }


def _performance_name(result: Result) -> str:
    return result.task.metric_name if isinstance(result.task, TextTask) else "accuracy"


def _unit(result: Result) -> str:
    full, base = result.explanation.attribution.full_values, result.explanation.attribution.base_values
    if result.explanation.verification is not None:
        base = full  # the empty prompt was not asked
    if isinstance(result.task, TextTask):
        return f"points of {result.task.metric_name}; positive helps"
    if np.isin(full, (0.0, 1.0)).all() and np.isin(base, (0.0, 1.0)).all():
        return "share of right answers; positive helps"
    return "nats of log-probability of the reference label; positive helps"


def _verdict(result: Result, cost: Mapping[str, Any]) -> dict[str, Any]:
    c = result.certificate
    before, after = result.original.n_units, result.prompt.n_units
    name, level = _performance_name(result), f"{1 - c.level:.0%}"
    if c.decision == "certified" and after < before:
        status = "certified"
        headline = (
            f"{before} demonstrations can become {after}: {name} holds, certified at {level} confidence"
        )
    elif c.decision == "certified" and c.tests:
        status = "certified"
        headline = f"All {before} demonstrations stay, in a new order, certified at {level} confidence"
    elif c.decision == "certified":
        status, headline = (
            "unchanged",
            f"All {before} demonstrations stay: no smaller prompt was good enough to propose",
        )
    else:
        status, headline = "not_certified", f"Not certified: keep all {before} demonstrations"
    sentences = []
    shipped = c.shipped
    if shipped is not None and after < before:
        sentences.append(
            f"On {c.n} sealed queries the target's {name} went from {c.full.performance:.1%} with all {before} to"
            f" {shipped.performance:.1%} with {after}."
        )
    harmful = [x for x in result.cleaning.confirmations if x.confirmed]
    if harmful:
        verb = "were" if len(harmful) > 1 else "was"
        sentences.append(
            f"{len(harmful)} of the demonstrations {verb} harmful on these queries, confirmed on the target."
        )
    if status == "not_certified":
        tried = min((t.n_kept for t in c.tests if t.tested), default=before)
        sentences.append(
            f"The first smaller prompt tried kept {tried} demonstrations; the sealed queries do not prove that it holds"
            f" what is required ({c.requirement.symbols}). The original prompt is the answer."
        )
    sentences += verdict_sentences(result)
    if cost["saved_share"] and after < before:
        sentences.append(f"Each call costs {cost['saved_share']:.0%} fewer prompt tokens.")
    if cost["money"] is not None:
        sentences += cost["money"]["warnings"]
    return {"status": status, "headline": headline, "sentences": sentences}


def _demonstrations(result: Result, report_text: ReportText) -> list[dict[str, Any]]:
    attribution = result.explanation.attribution
    classes = classify(attribution, result.cleaning, result.kept, near_copies=near_copies(result))
    source = _sources(result)
    rows = []
    for i, demo in enumerate(result.original.demonstrations):
        found = classes[i]
        show = report_text == "all" or (report_text == "removed" and not found.kept)
        rows.append(
            {
                "id": demo.id,
                "position": i + 1,
                "input": "\n".join(demo.inputs.values()) if show else None,
                "output": demo.output if show else None,
                "attribution": float(attribution.mean[i]),
                "standard_error": float(attribution.standard_error[i]),
                "source": source[i],
                "verdict": found.name,
                "kept": found.kept,
                "reason": found.reason,
                "confirmation": found.confirmation.to_dict() if found.confirmation else None,
                "tokens": None,
            }
        )
    return rows


def _prompt(c: Certificate, *, full: bool, n: int) -> dict[str, Any]:
    measured = c.full if full or c.shipped is None else c.shipped
    asked = (
        c.shipped.n_asked
        if c.shipped is not None and not full
        else max([t.n_asked for t in c.tests], default=c.n)
    )
    return {
        "n_demonstrations": n,
        "tokens": round(measured.tokens) if measured.tokens else None,
        "performance": {
            "value": measured.performance,
            "low": measured.low,
            "high": measured.high,
            "n": asked,
        },
    }


def _zero_shot(result: Result) -> dict[str, Any]:
    point = result.compression.zero_shot
    return {"value": point.performance, "low": point.low, "high": point.high, "n": point.n_queries}


def _certificate(c: Certificate) -> dict[str, Any] | None:
    if not c.tests:
        return None
    shown = c.shipped or c.tests[0]
    return {
        "decision": c.decision,
        "level": round(1 - c.level, 12),
        "tau": c.requirement.tau,
        "margin": c.requirement.margin,
        "n": shown.n_asked,
        "difference": shown.difference,
        "lower_bound": shown.lower_bound,
        "retained_lower_bound": shown.retained_lower_bound,
        "bar": shown.bar,
        "evidence": {"name": shown.evidence_name, "value": shown.evidence},
        "n_discordant": shown.n_discordant,
        "sequence": [
            {
                "n_kept": t.n_kept,
                "performance": t.performance,
                "difference": t.difference,
                "lower_bound": t.lower_bound,
                "retained_lower_bound": t.retained_lower_bound,
                "passed": t.passed,
                "tested": t.tested,
                "n": t.n_asked,
                "new_order": t.order is not None,
            }
            for t in c.tests
        ],
        "power_statement": c.power_statement,
        "sealed_digest": c.sealed_digest,
        "text": c.text,
    }


def _curve(result: Result) -> dict[str, Any]:
    path = result.compression
    n_units, n_shipped = result.original.n_units, result.prompt.n_units

    def point(p: Any, *, full: bool) -> dict[str, Any]:
        return {
            "n_kept": p.n_kept,
            "tokens": round(p.tokens) if p.tokens else None,
            "value": p.performance,
            "low": p.low,
            "high": p.high,
            "chosen": p.n_kept == n_shipped,
            "full": full,
            "n": p.n_queries,
        }

    points = [point(p, full=False) for p in path.points if p.n_kept < n_units]
    return {
        "split": "select",
        "tau_line": path.line,
        "line_text": line_text(path),
        "points": [*reversed(points), point(path.full, full=True)],
        "choice": choice_sentences(result),
    }


def _cleaning(result: Result, report_text: ReportText) -> dict[str, Any] | None:
    if not result.settings.clean:
        return None
    cleaning = result.cleaning
    ids = [d.id for d in result.original.demonstrations]
    intro = (
        "A demonstration is called harmful only if the target itself, on queries that the attribution did not use, does"
        " better without it."
    )
    if not cleaning.rounds:
        intro = "No demonstration has an attribution clearly below zero; nothing was suspected."
    elif len(cleaning.rounds) > 1 or cleaning.removed:
        intro += (
            f" Over all rounds the chance of confirming any harmless one is at most {cleaning.level:g}. No further round:"
            f" {cleaning.stopped}."
        )
    if cleaning.spared:
        intro += f" {len(cleaning.spared)} of the confirmed stay: with the others gone, the target did better with them."
    return {
        "rounds": [_round(r, k, ids, cleaning.n_queries) for k, r in enumerate(cleaning.rounds)],
        "text": intro,
        "relabels": _relabels(result, report_text),
        "relabel_text": _relabel_text(result.relabeling),
    }


def _round(r: Round, place: int, ids: list[str], n_queries: int) -> dict[str, Any]:
    flagged, confirmed = [ids[i] for i in r.flagged], [ids[i] for i in r.confirmed]
    where = (
        "" if place == 0 else " in the prompt without the strongest suspects so far, which was explained anew"
    )
    asked = (
        f"on {n_queries} other queries the target confirmed {len(confirmed)} of them (level {r.level:.2g})"
    )
    return {
        "flagged": flagged,
        "confirmed": confirmed,
        "not_confirmed": [i for i in flagged if i not in set(confirmed)],
        "text": (
            f"{len(flagged)} of {int(r.context.sum())} demonstrations were suspected for their negative attribution{where};"
            f" {asked if r.confirmations else 'the target was not asked'}."
        ),
    }


def _relabels(result: Result, report_text: ReportText) -> list[dict[str, Any]]:
    rows = []
    for p in result.relabeling.proposals if result.relabeling else ():
        show = report_text == "all" or (report_text == "removed" and not result.kept[p.unit])
        rows.append(
            {
                "id": result.original.demonstrations[p.unit].id,
                "label": p.label if show else None,
                "answer": p.answer if show else None,
                "probability": p.probability,
                "p_value": p.p_value,
            }
        )
    return rows


def _relabel_text(found: Relabeling | None) -> str | None:
    if found is None:
        return None
    text = (
        f"Asked for the input of each demonstration while that was out of the prompt, the target gave another label to"
        f" {found.contradicted}. "
    )
    if not found.proposals:
        return text + (
            f"None of these stands out against its answers to {found.n_queries} labelled queries, {found.agreement:.0%} of"
            " them right, so no label is questioned."
        )
    return text + (
        f"{len(found.proposals)} it contradicts more strongly than right labels ({found.n_queries} labelled queries; at"
        f" most {found.level:.0%} of such proposals are expected to be wrong). Look at them; nothing was changed."
    )


def _relabeling(found: Relabeling | None, ids: list[str]) -> dict[str, Any] | None:
    if found is None:
        return None
    body = found.to_dict()
    body["proposals"] = [{"id": ids[p.unit], **p.to_dict()} for p in found.proposals]
    return body


def _versions() -> dict[str, str]:
    found = {"proxyprompt-core": __version__, "python": platform.python_version()}
    for name in ("numpy", "scipy", "torch", "transformers", "openai", "genai-prices"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
