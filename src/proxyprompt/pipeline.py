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
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ._explaining import Explanation, ask_members, explain, propose, screen_proxies
from ._query_use import note_use, refuse_used
from ._run import Observer, Run, Silent, recorded_money
from ._shrinking import Explained, Shrinking, certify_shrinking, plan, shrink
from ._verify_stage import target_token_counts, verify_proposal
from .attribution import Banzhaf, KernelSHAP, Lasso, LeaveOneOut, PermutationShapley, WeightedBanzhaf
from .attribution.base import Explainer
from .backends.base import Backend
from .data import Splits
from .errors import InputError
from .ledger import CallRole, Ledger, Limits
from .metering import Meter
from .optimize.certificate import Certificate
from .optimize.clean import Cleaning, clean
from .optimize.compress import Compression
from .optimize.reexplain import Reexplainer
from .optimize.relabel import Relabeling, own_queries, propose_relabels, zero_shot_doubts
from .prices import FREE, Price, Pricing, Quote, quote_run
from .prompt import FewShotPrompt, Query
from .screening import Screening
from .settings import Settings
from .task import LabelTask, Task
from .value_function import Values

__all__ = ["Explanation", "Observer", "Result", "optimize_prompt"]

T = TypeVar("T")

_EXPLAINERS: dict[str, type[Explainer]] = {
    "banzhaf": Banzhaf,
    "kernel_shap": KernelSHAP,
    "lasso": Lasso,
    "leave_one_out": LeaveOneOut,
    "permutation_shapley": PermutationShapley,
    "weighted_banzhaf": WeightedBanzhaf,
}

STAGES = ("screen", "attribute", "verify", "clean", "compress", "certify")


@dataclass(frozen=True)
class Result:
    """Everything a run found; :meth:`proxyprompt.summary.build_artifact` turns it into JSON.

    Attributes
    ----------
    original, prompt : FewShotPrompt
        The prompt before, and the prompt to deploy, in the order that was certified (the original if nothing was).
    kept : bool (n_units,)
    explanation : Explanation
    screening : Screening or None
        ``None`` when no proxy was named.
    cleaning, compression, certificate
    shrinking : Shrinking
        How the choice came about: surrogate of the path, swaps, orders, caps.
    relabeling : Relabeling or None
        Labels that the target contradicts; ``None`` when that was not asked.
    settings : Settings
    run : str
        Key of this run in the ledger.
    completion_tokens : float
        Mean length of the target's answers.
    pricing : Pricing
        What the target and the proxies charge, or why that is not known.
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
    shrinking: Shrinking
    certificate: Certificate
    settings: Settings
    run: str
    target_name: str
    oracle_prompt_tokens: float
    relabeling: Relabeling | None = None
    spent: tuple[Mapping[str, Any], ...] = ()
    completion_tokens: float = 0.0
    pricing: Pricing = field(default_factory=Pricing)
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


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
        Candidates to stand in for it: the cheapest accepted one explains (models on this machine first, then by the price
        of a prompt token, then in this order; without a known price last). Empty: the target explains itself.
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
        The next calls would pass ``budget_calls``, ``budget_tokens``, ``budget_usd`` or ``budget_cost`` of the settings.
    """
    settings = settings or Settings()
    check_run(prompt, task, splits, settings)
    if not isinstance(ledger, Ledger):
        with Ledger(ledger) as opened:
            return optimize_prompt(
                prompt, task, splits, target=target, proxies=proxies, settings=settings, ledger=opened,
                observer=observer, title=title, notes=notes,
            )  # fmt: skip
    run, key, pricing = prepare_run(
        prompt, task, splits, target, proxies, settings, ledger, observer or Silent(), notes
    )
    watch = run.watch
    refuse_used(ledger, key, prompt, splits["sealed"])
    watch.note(plan(settings, task, len(splits["sealed"])))
    note_use(ledger, key, "explain", prompt, splits["explain"])
    screening = _timed(run, "screen", screen_proxies)
    explanation = _explain(run, screening)
    note_use(ledger, key, "select", prompt, splits["select"])
    cleaning, relabeling = _timed(run, "clean", lambda r: _clean(r, explanation))
    compression, shrinking = _timed(run, "compress", lambda r: _compress(r, explanation, screening, cleaning))
    note_use(ledger, key, "sealed", prompt, splits["sealed"])
    certificate = _timed(run, "certify", lambda r: _certify(r, compression, shrinking, ledger, key))
    return Result(
        title=title,
        original=prompt,
        prompt=prompt.reorder([prompt.demonstrations[i].id for i in certificate.order]),
        kept=certificate.kept,
        task=task,
        splits=splits,
        explanation=explanation,
        screening=screening,
        cleaning=cleaning,
        relabeling=relabeling,
        compression=compression,
        shrinking=shrinking,
        certificate=certificate,
        settings=settings,
        run=key,
        target_name=target.name,
        oracle_prompt_tokens=_oracle_tokens(run, compression),
        spent=_spent(ledger, run, key),
        completion_tokens=_completion_tokens(run),
        pricing=pricing,
        seconds=run.seconds,
        notes=tuple(run.notes),
    )


def prepare_run(
    prompt: FewShotPrompt,
    task: Task,
    splits: Splits,
    target: Backend,
    proxies: Sequence[Backend],
    settings: Settings,
    ledger: Ledger | None,
    watch: Observer,
    notes: Sequence[str] = (),
) -> tuple[Run, str, Pricing]:
    """What the stages share, the run's key in the ledger, and prices; nothing is loaded or sent."""
    if settings.verify != "off" and not proxies:
        raise InputError(
            f"verify = {settings.verify!r}: no proxy model is named that could propose anything.",
            hint="Name a proxy, or set verify = 'off': then the target explains itself.",
        )
    pricing = quote_run(
        target.identity,
        {p.name: p.identity for p in proxies},
        own=settings.own_price(),
        model=settings.price_model,
    )
    # The first accepted proxy explains, so the cheapest comes first; equal prices keep the order given.
    proxies = sorted(proxies, key=lambda p: _price_of(pricing.proxies[p.name]))
    key = _run_key(prompt, task, splits, settings, [target, *proxies])
    if ledger is not None:
        key = ledger.conceal(key)[:16]  # who knows all texts but one could try that one
    limits, of_proxies = run_limits(settings, pricing)
    run = Run(
        prompt=prompt,
        task=task,
        splits=splits,
        target=Meter(
            target,
            ledger,
            role="target",
            run=key,
            limits=limits if ledger is not None else None,
            on_tokens=watch.tokens,
            price=price_of_calls(target, pricing.target),
        ),
        proxies={
            p.name: Meter(
                p,
                ledger,
                role="proxy",
                run=key,
                limits=of_proxies if ledger is not None else None,
                on_tokens=watch.tokens,
                price=price_of_calls(p, pricing.proxies[p.name]),
            )
            for p in proxies
        },
        settings=settings,
        explainer=_EXPLAINERS[settings.explainer](),
        watch=watch,
        notes=list(notes),
        target_price=pricing.target if isinstance(pricing.target, Price) else None,
    )
    return run, key, pricing


def check_run(prompt: FewShotPrompt, task: Task, splits: Splits, settings: Settings) -> None:
    if prompt.n_units == 0:
        raise InputError("prompt: no demonstrations; there is nothing to attribute.")
    task.validate(prompt.demonstrations, (q for queries in splits.values() for q in queries))
    unknown = sorted(set(settings.keep) - {d.id for d in prompt.demonstrations})
    if unknown:
        raise InputError(f"keep: {unknown} name no demonstration of the prompt.")


def run_limits(settings: Settings, pricing: Pricing) -> tuple[Limits, Limits | None]:
    """What bounds the target's calls, and what bounds the proxies'."""
    money = settings.budget_usd if settings.budget_cost is None else settings.budget_cost
    currency = "USD"
    if settings.budget_cost is not None and isinstance(pricing.target, Price):
        currency = pricing.target.currency
    limits = Limits(settings.budget_calls, settings.budget_tokens, money, currency)
    return limits, None if money is None else Limits(max_money=money, currency=currency)


def price_of_calls(backend: Backend, quote: Quote) -> Price | None:
    """The price by which calls are counted; models that no server runs cost nothing, whatever prices are compared with."""
    if not backend.identity.get("base_url"):
        return FREE
    return quote if isinstance(quote, Price) else None


def _price_of(quote: Quote) -> Decimal:
    """Money per million prompt tokens; a model without a known price comes last."""
    return quote.rates.input if isinstance(quote, Price) else Decimal("Infinity")


def _timed(run: Run, stage: str, step: Callable[[Run], T]) -> T:
    start = time.perf_counter()
    value = step(run)
    run.seconds[stage] = time.perf_counter() - start
    return value


def _explain(run: Run, screening: Screening | None) -> Explanation:
    if run.settings.verify == "off":
        return _timed(run, "attribute", lambda r: explain(r, screening))
    proposal, trusted = _timed(run, "attribute", lambda r: propose(r, screening))
    return _timed(run, "verify", lambda r: verify_proposal(r, proposal, screening, trusted=trusted))


def _clean(run: Run, explanation: Explanation) -> tuple[Cleaning, Relabeling | None]:
    s = run.settings
    run.watch.stage("clean", "Does the target confirm what looks harmful?")
    if not s.clean:
        whole = np.ones(run.prompt.n_units, dtype=np.bool_)
        return Cleaning((), whole, s.clean_level, 0, "cleaning was not asked for"), None
    own = own_queries(run.prompt, run.task)

    def ask(queries: Sequence[Query], rows: NDArray[np.bool_]) -> Values:
        return run.evaluate(run.target, queries, "clean", rows)

    cleaning = clean(
        explanation.attribution,
        run.on_target("select", "clean"),
        level=s.clean_level,
        suspect_level=s.suspect_level,
        max_suspects=s.max_suspects,
        protected=run.protected,
        doubted=zero_shot_doubts(own, ask) if own is not None and s.clean_prior == "zero_shot" else (),
        rounds=s.clean_rounds,
        reexplain=_reexplainer(run, explanation),
    )
    if s.relabel == "off" or own is None or not isinstance(run.task, LabelTask):
        return cleaning, None
    labelled = [*run.splits["explain"], *run.splits["select"]]
    return cleaning, propose_relabels(
        run.prompt, run.task, labelled, cleaning.kept, ask, rng=run.rng(6), level=s.relabel_level
    )


def _reexplainer(run: Run, explanation: Explanation) -> Reexplainer:
    """Whoever explained explains again; the target's calls are limited."""

    def on_target(queries: Sequence[Query], rows: NDArray[np.bool_]) -> Values:
        return run.evaluate(run.target, queries, "clean", rows)

    s, by_id = run.settings, {q.id: q for q in run.splits["explain"]}
    explanation = explanation.proposal or explanation
    queries = [by_id[i] for i in explanation.query_ids]
    of_target = explanation.role == "target"
    ask = on_target if of_target else ask_members(run, explanation, "clean")
    half = explanation.attribution.n_coalitions * len(queries) // 2
    return Reexplainer(
        explainer=run.explainer,
        ask=ask,
        queries=queries,
        budget=s.n_fit if of_target else s.n_proxy,
        rng=run.rng(5),
        calls=None if not of_target else half if s.reexplain_calls is None else s.reexplain_calls,
    )


def _compress(
    run: Run, explanation: Explanation, screening: Screening | None, cleaning: Cleaning
) -> tuple[Compression, Shrinking]:
    run.watch.stage("compress", "How few demonstrations does the target need?")
    by_id = {q.id: q for q in run.splits["explain"]}
    source = explanation.proposal or explanation
    explained = Explained(
        attribution=explanation.attribution,
        design=source.design,
        utility=source.utility,
        proxies=tuple(run.proxies[name] for name in explanation.members),
        queries=[by_id[i] for i in source.query_ids],
        proposal=source.attribution if explanation.verification is not None else None,
        slope=0.0 if explanation.verification is None else explanation.verification.slope,
        target_tokens=lambda: _target_tokens(run, explanation, screening),
    )
    return shrink(run, explained, cleaning.kept)


def _target_tokens(
    run: Run, explanation: Explanation, screening: Screening | None
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Token counts of coalitions that the target has answered, from the ledger."""
    if explanation.verification is not None:
        return target_token_counts(run, explanation)
    if explanation.role == "target" and explanation.design is not None:
        rows, query_id = explanation.design.coalitions, explanation.query_ids[0]
    elif screening is not None and screening.queries_bought:
        rows, query_id = screening.design.coalitions, screening.queries_bought[0]
    else:
        return np.zeros((0, run.prompt.n_units), dtype=np.bool_), np.zeros(0, dtype=np.int64)
    queries = [q for q in run.splits["explain"] if q.id == query_id]
    return rows, run.evaluate(run.target, queries, "attribute", rows).prompt_tokens[:, 0]


def _certify(
    run: Run, compression: Compression, shrinking: Shrinking, ledger: Ledger, key: str
) -> Certificate:
    run.watch.stage("certify", f"Does it hold on {len(run.splits['sealed'])} sealed queries?")
    return certify_shrinking(run, compression, shrinking, ledger, key)


def _oracle_tokens(run: Run, compression: Compression) -> float:
    """Mean prompt tokens of a random coalition on the target: half way between its empty and full prompt."""
    if not compression.zero_shot.tokens or not compression.full.tokens:
        return compression.full.tokens
    return (compression.zero_shot.tokens + compression.full.tokens) / 2


def _spent(ledger: Ledger, run: Run, key: str) -> tuple[Mapping[str, Any], ...]:
    """Per stage and model: calls and tokens of this run in the ledger, what this process bought, and what it took.

    ``answers`` may have been bought by this run or by others; each counts once, in the first stage that used it.
    """
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
                        "prompt_tokens": total.prompt_tokens if total else 0,
                        "completion_tokens": total.completion_tokens if total else 0,
                        "cached_tokens": total.cached_tokens if total else 0,
                        "unknown": total.unknown if total else 0,
                        **(recorded_money(total) if total else {}),
                        "bought_now": now.bought if now else 0,
                        "reused_now": now.reused if now else 0,
                        "tokens_now": now.prompt_tokens_bought + now.completion_tokens_bought if now else 0,
                        "answers": now.found + now.bought if now else 0,
                        "answer_prompt_tokens": now.prompt_tokens_found + now.prompt_tokens_bought
                        if now
                        else 0,
                        "answer_completion_tokens": (
                            now.completion_tokens_found + now.completion_tokens_bought if now else 0
                        ),
                        "answer_cached_tokens": now.cached_tokens_found + now.cached_tokens_bought
                        if now
                        else 0,
                    }
                )
    return tuple(rows)


def _completion_tokens(run: Run) -> float:
    """Mean completion tokens of the target's answers, bought or found."""
    stats = run.target.stats
    answers = stats.bought + stats.reused
    return (stats.completion_tokens_bought + stats.completion_tokens_reused) / answers if answers else 0.0


def _run_key(
    prompt: FewShotPrompt, task: Task, splits: Splits, settings: Settings, backends: Sequence[Backend]
) -> str:
    body = {
        "prompt": prompt.to_dict(),
        "task": repr(task),
        "splits": {name: splits.digest(name) for name in splits},
        "settings": settings.decisive(),
        "models": [dict(b.identity) for b in backends],
    }
    return hashlib.sha256(json.dumps(body, sort_keys=True, default=str).encode()).hexdigest()[:16]
