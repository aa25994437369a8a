"""The whole path: screen, attribute, clean, compress, certify.

Each query serves one purpose only. The *explain* split screens proxies and explains, the *select* split
confirms harm and chooses a cut, the *sealed* split certifies the final prompt and is looked at by nothing
else. Every model call goes through the ledger, so a run that was stopped goes on where it was, and a second
run of the same thing buys nothing.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from .attribution import KernelSHAP, LeaveOneOut, WeightedBanzhaf
from .attribution.base import Attribution, Explainer
from .backends.base import Backend
from .data import Splits
from .errors import InputError
from .ledger import CallRole, Ledger, Limits
from .metering import Meter
from .optimize.certificate import Certificate, certify
from .optimize.clean import Cleaning, clean
from .optimize.compress import Compression, compress, nested_path
from .prompt import FewShotPrompt, Query
from .screening import Screening, agreement, screen
from .settings import Settings
from .task import Task
from .value_function import PromptValueFunction, Values

__all__ = ["Explanation", "Observer", "Result", "optimize_prompt"]

T = TypeVar("T")

_EXPLAINERS: dict[str, type[Explainer]] = {
    "kernel_shap": KernelSHAP,
    "leave_one_out": LeaveOneOut,
    "weighted_banzhaf": WeightedBanzhaf,
}

STAGES = ("screen", "attribute", "clean", "compress", "certify")


class Observer(Protocol):
    """Is told what happens; the command line draws bars with it."""

    def stage(self, name: str, text: str) -> None:
        """A stage begins."""
        ...

    def progress(self, done: int, total: int) -> None:
        """Calls of the current batch, answered from the ledger or by the model."""
        ...

    def tokens(self, n: int) -> None:
        """A local model has computed so many more tokens."""
        ...

    def note(self, text: str) -> None:
        """Something worth telling a person."""
        ...


class _Silent:
    def stage(self, name: str, text: str) -> None: ...
    def progress(self, done: int, total: int) -> None: ...
    def tokens(self, n: int) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class Explanation:
    """Attributions, and whose they are.

    Attributes
    ----------
    attribution : Attribution
    role : {"proxy", "target"}
    model : str
    why : str
        Why this model explains.
    query_ids : tuple of str
    """

    attribution: Attribution
    role: str
    model: str
    why: str
    query_ids: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """Everything a run found; :meth:`proxyprompt.summary.build_artifact` turns it into JSON.

    Attributes
    ----------
    original, prompt : FewShotPrompt
        The prompt before, and the prompt to deploy (the original if nothing was certified).
    kept : bool (n_units,)
    explanation : Explanation
    screening : Screening or None
        ``None`` when no proxy was named.
    cleaning, compression, certificate
    settings : Settings
    run : str
        Key of this run in the ledger.
    """

    title: str
    original: FewShotPrompt
    prompt: FewShotPrompt
    kept: NDArray[np.bool_]
    task: Task
    splits: Splits
    explanation: Explanation
    screening: Screening | None
    cleaning: Cleaning
    compression: Compression
    certificate: Certificate
    settings: Settings
    run: str
    target_name: str
    oracle_prompt_tokens: float
    spent: tuple[Mapping[str, Any], ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass
class _Run:
    """What the stages share."""

    prompt: FewShotPrompt
    task: Task
    splits: Splits
    target: Meter
    proxies: dict[str, Meter]
    settings: Settings
    explainer: Explainer
    watch: Observer
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def rng(self, purpose: int) -> np.random.Generator:
        """A generator of its own for each purpose, so that no stage shifts another's draws."""
        return np.random.default_rng([self.settings.seed, purpose])

    def evaluate(self, meter: Meter, queries: Sequence[Query], stage: str, rows: NDArray[np.bool_]) -> Values:
        return PromptValueFunction(
            self.prompt, self.task, queries, meter, stage, self.watch.progress
        ).evaluate(rows)

    def on_target(self, split: str, stage: str) -> Callable[[NDArray[np.bool_]], Values]:
        return lambda rows: self.evaluate(self.target, self.splits[split], stage, rows)

    @property
    def protected(self) -> tuple[int, ...]:
        keep = set(self.settings.keep)
        return tuple(i for i, d in enumerate(self.prompt.demonstrations) if d.id in keep)


def optimize_prompt(
    prompt: FewShotPrompt,
    task: Task,
    splits: Splits,
    *,
    target: Backend,
    proxies: Sequence[Backend] = (),
    settings: Settings | None = None,
    ledger: Ledger | str | Path = "proxyprompt-out/ledger.db",
    observer: Observer | None = None,
    title: str = "Few-shot prompt",
    notes: Sequence[str] = (),
) -> Result:
    """Screen proxies, attribute, clean, compress, and certify the result on the target.

    Parameters
    ----------
    prompt : FewShotPrompt
    task : LabelTask or TextTask
    splits : Splits
        Disjoint queries: explain, select, sealed.
    target : Backend
        The deployed model.
    proxies : sequence of Backend
        Candidates to stand in for it, cheapest first: the first accepted one explains. Empty: the target
        explains itself.
    settings : Settings, optional
    ledger : Ledger or path
        Where every call is recorded; calls found there are not made again.
    observer : Observer, optional
    title : str
    notes : sequence of str
        Passed on to the report.

    Returns
    -------
    Result

    Raises
    ------
    DataError
        Labels that are not allowed; checked before any model is asked.
    InconclusiveError
        Too many answers missing.
    BudgetExceededError
        The next calls would pass ``settings.target_calls`` or ``target_tokens``.
    """
    settings = settings or Settings()
    _check(prompt, task, splits, settings)
    if not isinstance(ledger, Ledger):
        with Ledger(ledger) as opened:
            return optimize_prompt(
                prompt, task, splits, target=target, proxies=proxies, settings=settings, ledger=opened,
                observer=observer, title=title, notes=notes,
            )  # fmt: skip
    watch = observer or _Silent()
    key = _run_key(prompt, task, splits, settings, [target, *proxies])
    limits = Limits(settings.target_calls, settings.target_tokens)
    run = _Run(
        prompt=prompt,
        task=task,
        splits=splits,
        target=Meter(target, ledger, role="target", run=key, limits=limits, on_tokens=watch.tokens),
        proxies={p.name: Meter(p, ledger, role="proxy", run=key, on_tokens=watch.tokens) for p in proxies},
        settings=settings,
        explainer=_EXPLAINERS[settings.explainer](),
        watch=watch,
        notes=list(notes),
    )
    screening = _timed(run, "screen", _screen)
    explanation = _timed(run, "attribute", lambda r: _explain(r, screening))
    cleaning = _timed(run, "clean", lambda r: _clean(r, explanation))
    compression = _timed(run, "compress", lambda r: _compress(r, explanation, cleaning))
    certificate = _timed(run, "certify", lambda r: _certify(r, compression))
    return Result(
        title=title,
        original=prompt,
        prompt=prompt.subset(certificate.kept.tolist()),
        kept=certificate.kept,
        task=task,
        splits=splits,
        explanation=explanation,
        screening=screening,
        cleaning=cleaning,
        compression=compression,
        certificate=certificate,
        settings=settings,
        run=key,
        target_name=target.name,
        oracle_prompt_tokens=_oracle_tokens(run, compression),
        spent=_spent(ledger, run, key),
        seconds=run.seconds,
        notes=tuple(run.notes),
    )


def _check(prompt: FewShotPrompt, task: Task, splits: Splits, settings: Settings) -> None:
    if prompt.n_units == 0:
        raise InputError("prompt: no demonstrations; there is nothing to attribute.")
    task.validate(prompt.demonstrations, (q for queries in splits.values() for q in queries))
    unknown = sorted(set(settings.keep) - {d.id for d in prompt.demonstrations})
    if unknown:
        raise InputError(f"keep: {unknown} name no demonstration of the prompt.")


def _timed(run: _Run, stage: str, step: Callable[[_Run], T]) -> T:
    start = time.perf_counter()
    value = step(run)
    run.seconds[stage] = time.perf_counter() - start
    return value


def _screen(run: _Run) -> Screening | None:
    if not run.proxies:
        return None
    s, n = run.settings, run.prompt.n_units
    design = run.explainer.design(n, s.n_fit(n), rng=run.rng(1))
    if design.n_coalitions == 2**n:
        # With so few units every coalition is in the design; nothing is left to judge on.
        run.notes.append(
            f"With {n} demonstrations every coalition can be asked; no proxy is needed or screened."
        )
        return None
    n_judge = s.judge_coalitions if n > 30 else min(s.judge_coalitions, 2**n - design.n_coalitions)
    judges = run.explainer.held_out(n, n_judge, rng=run.rng(2), exclude=design.coalitions)
    names = ", ".join(run.proxies)
    run.watch.stage("screen", f"May {names} stand in for {run.target.backend.name}?")

    def ask(meter: Meter) -> Callable[[Sequence[Query], NDArray[np.bool_]], Values]:
        return lambda queries, rows: run.evaluate(meter, queries, "screen", rows)

    screening = screen(
        ask(run.target),
        {name: ask(meter) for name, meter in run.proxies.items()},
        run.splits["explain"],
        explainer=run.explainer,
        design=design,
        judge_coalitions=judges,
        rng=run.rng(3),
        method=s.screening_method,
        tau=s.screening_tau,
        delta=s.screening_delta,
        max_pairs=s.max_pairs,
        block=s.screening_block,
    )
    for proxy in screening.proxies:
        run.watch.note(f"{proxy.name}: {proxy.decision} after {proxy.rule.n_used} pairs")
    return screening


def _explain(run: _Run, screening: Screening | None) -> Explanation:
    if screening is not None and screening.accepted:
        explanation = _by_proxy(run, screening.accepted[0])
        if explanation is not None:
            return explanation
    return _by_target(run, screening)


def _by_proxy(run: _Run, name: str) -> Explanation | None:
    """Proxy attributions on the queries that pass the instance-level screen [PE 3.1]."""
    s, n, queries = run.settings, run.prompt.n_units, run.splits["explain"]
    run.watch.stage("attribute", f"{name} explains: importance of every demonstration")
    full = np.ones((1, n), dtype=np.bool_)
    same = agreement(
        run.evaluate(run.target, queries, "attribute", full),
        run.evaluate(run.proxies[name], queries, "attribute", full),
    )[0]
    agreed = [q for q, yes in zip(queries, same, strict=True) if yes]
    if len(agreed) < 2:
        run.notes.append(
            f"{name} was accepted but agrees with the target on {len(agreed)} queries; the target explains."
        )
        return None
    design = run.explainer.design(n, s.n_proxy(n), rng=run.rng(4))
    values = run.evaluate(run.proxies[name], agreed, "attribute", design.coalitions)
    values.require_complete(f"attribution by {name}")
    return Explanation(
        attribution=run.explainer.fit(design, values.utility),
        role="proxy",
        model=name,
        why=(
            f"The screen accepted {name}. It explains the {len(agreed)} of {len(queries)} queries on which it"
            " predicts the same as the target; the target confirms and certifies."
        ),
        query_ids=tuple(q.id for q in agreed),
    )


def _by_target(run: _Run, screening: Screening | None) -> Explanation:
    """Oracle attributions; the coalitions are those of screening, so its target calls are used again."""
    s, n = run.settings, run.prompt.n_units
    name = run.target.backend.name
    bought = list(screening.queries_bought) if screening is not None else []
    queries = _oracle_queries(run.splits["explain"], bought, s.oracle_queries)
    run.watch.stage("attribute", f"{name} explains itself on {len(queries)} queries")
    design = (
        screening.design if screening is not None else run.explainer.design(n, s.n_fit(n), rng=run.rng(1))
    )
    values = run.evaluate(run.target, queries, "attribute", design.coalitions)
    values.require_complete(f"attribution by {name}")
    if screening is None:
        why = "No proxy model was screened; the target explains itself."
    else:
        what = ", ".join(f"{p.name} {p.decision}" for p in screening.proxies)
        why = (
            f"The screen accepted no proxy ({what}), so the target explains itself; its answers bought for the"
            " screen are used again."
        )
    return Explanation(
        run.explainer.fit(design, values.utility), "target", name, why, tuple(q.id for q in queries)
    )


def _oracle_queries(queries: Sequence[Query], bought: list[str], wanted: int | None) -> list[Query]:
    n = wanted if wanted is not None else max(len(bought), 30)
    first = [q for q in queries if q.id in set(bought)]
    return [*first, *(q for q in queries if q.id not in set(bought))][: max(n, 1)]


def _clean(run: _Run, explanation: Explanation) -> Cleaning:
    attribution = explanation.attribution
    run.watch.stage("clean", "Does the target confirm what looks harmful?")
    if not run.settings.clean:
        return Cleaning((), (), np.ones(run.prompt.n_units, dtype=np.bool_), run.settings.clean_level, 0)
    return clean(
        attribution,
        run.on_target("select", "clean"),
        level=run.settings.clean_level,
        suspect_level=run.settings.suspect_level,
        max_suspects=run.settings.max_suspects,
        protected=run.protected,
    )


def _compress(run: _Run, explanation: Explanation, cleaning: Cleaning) -> Compression:
    run.watch.stage("compress", "How few demonstrations does the target need?")
    path = nested_path(explanation.attribution.mean, cleaning.kept, protected=run.protected)
    return compress(
        path,
        run.on_target("select", "compress"),
        tau=run.settings.tau,
        max_evaluations=run.settings.max_evaluations,
    )


def _certify(run: _Run, compression: Compression) -> Certificate:
    n = len(run.splits["sealed"])
    run.watch.stage("certify", f"Does it hold on {n} sealed queries?")
    return certify(
        [point.kept for point in compression.candidates],
        run.on_target("sealed", "certify"),
        n_units=run.prompt.n_units,
        tau=run.settings.tau,
        level=run.settings.level,
        n_sealed=n,
        query_digest=run.splits.digest("sealed"),
        full_score=compression.full.performance,
        right_or_wrong=run.task.right_or_wrong,
        cleaned_bar=compression.cleaned_is_better,
    )


def _oracle_tokens(run: _Run, compression: Compression) -> float:
    """Mean prompt tokens of a random coalition on the target: half way between its empty and full prompt."""
    tokens = [p.tokens for p in compression.points if p.n_kept == 0]
    if not tokens or not compression.full.tokens:
        return compression.full.tokens
    return (tokens[0] + compression.full.tokens) / 2


def _spent(ledger: Ledger, run: _Run, key: str) -> tuple[Mapping[str, Any], ...]:
    """Per stage and model: calls and tokens of this run in the ledger, and what this process bought."""
    rows = []
    by_role: tuple[tuple[CallRole, list[Meter]], ...] = (
        ("target", [run.target]),
        ("proxy", list(run.proxies.values())),
    )
    for role, meters in by_role:
        for meter in meters:
            for stage in STAGES:
                total = ledger.totals(run=key, role=role, stage=stage).by_model.get(meter.backend.name)
                now = meter.stats.by_stage.get(stage)
                if total is None and now is None:
                    continue
                rows.append(
                    {
                        "stage": stage,
                        "role": role,
                        "model": meter.backend.name,
                        "calls": total.done if total else 0,
                        "tokens": total.prompt_tokens + total.completion_tokens if total else 0,
                        "bought_now": now.bought if now else 0,
                        "reused_now": now.reused if now else 0,
                        "tokens_now": now.prompt_tokens_bought + now.completion_tokens_bought if now else 0,
                    }
                )
    return tuple(rows)


def _run_key(
    prompt: FewShotPrompt, task: Task, splits: Splits, settings: Settings, backends: Sequence[Backend]
) -> str:
    body = {
        "prompt": prompt.to_dict(),
        "task": repr(task),
        "splits": {name: splits.digest(name) for name in splits},
        "settings": settings.to_dict(),
        "models": [dict(b.identity) for b in backends],
    }
    return hashlib.sha256(json.dumps(body, sort_keys=True, default=str).encode()).hexdigest()[:16]
