"""What a run will ask and cost, before anything is sent: calls, tokens and money of each stage, between bounds.

The coalitions of the first two stages follow from the seed, so their requests are written out and looked up in the
ledger one by one. What later stages ask depends on answers; their bounds follow from the settings, and what this run has
already recorded is subtracted. Retries, and several samples of one request, are in no bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

from ._estimate_loads import Bounds, Model, RunEstimate, StageEstimate, recorded_calls
from ._estimate_plan import Plan
from ._explaining import screening_rows
from ._run import Silent
from .backends.base import Backend
from .data import Splits
from .ledger import Ledger
from .pipeline import STAGES, check_run, prepare_run
from .prices import FREE, Unpriced
from .prompt import FewShotPrompt
from .settings import Settings
from .task import Task

__all__ = ["Bounds", "RunEstimate", "StageEstimate", "estimate_run"]


def estimate_run(
    prompt: FewShotPrompt,
    task: Task,
    splits: Splits,
    *,
    target: Backend,
    proxies: Sequence[Backend] = (),
    settings: Settings | None = None,
    ledger: Ledger | None = None,
) -> RunEstimate:
    """Calls, tokens and money of each stage of :func:`~proxyprompt.optimize_prompt`, before anything is sent.

    Parameters
    ----------
    prompt, task, splits, target, proxies, settings
        As for :func:`~proxyprompt.optimize_prompt`.
    ledger : Ledger, optional
        What is recorded there is not bought again, and subtracted.

    Returns
    -------
    RunEstimate
        No call is made and no weights are loaded; a local model's tokenizer may be.

    Raises
    ------
    DataError, InputError
        As the run itself would.

    Notes
    -----
    Tokens are counted by the model's own tokenizer on a sample of prompts, else by what it reported for prompts that are
    in the ledger, else from bytes: between one sixteenth of them and all. ``counting`` says which.
    """
    settings = settings or Settings()
    check_run(prompt, task, splits, settings)
    # Limits are compared below; the run's key does not depend on them.
    unlimited = replace(settings, budget_calls=None, budget_tokens=None, budget_usd=None, budget_cost=None)
    run, key, pricing = prepare_run(prompt, task, splits, target, proxies, unlimited, ledger, Silent())
    rows = screening_rows(run) if run.proxies else None
    models = [Model(run, run.target, "target", pricing.target, rows)]
    models += [Model(run, m, "proxy", pricing.proxies[name], rows) for name, m in run.proxies.items()]
    stages: list[StageEstimate] = []
    for model in models:
        for stage, work in Plan(run, model, rows).stages().items():
            if work.high.calls:
                stages.append(model.priced(stage, work, recorded_calls(ledger, key, model, stage)))
    stages.sort(key=lambda s: (STAGES.index(s.stage), s.role != "target"))
    estimate = RunEstimate(
        tuple(stages),
        {m.name: m.price.currency if m.price is not None else "" for m in models},
        {m.name: m.counting for m in models},
        (),
        key,
    )
    return replace(estimate, notes=tuple(_notes(estimate, models, settings, ledger)))


def _notes(
    estimate: RunEstimate, models: Iterable[Model], settings: Settings, ledger: Ledger | None
) -> Iterable[str]:
    name = "max_cost" if settings.budget_usd is None else "max_usd"
    limit = settings.budget_cost if settings.budget_usd is None else settings.budget_usd
    for model in models:
        if model.price is None:
            why = model.quote.reason if isinstance(model.quote, Unpriced) else "it is not known"
            yield f"{model.name} has no price ({why}); its money is not estimated."
            if limit is not None:
                yield f"{name} is set, and {model.name} has no price: the run is refused. Give the price, or limit calls."
        elif model.price is not FREE and model.price.rates.output is None:
            yield f"The price of {model.name} says nothing of completion tokens; they are not in the money."
    totals = ledger.totals(run=estimate.run) if ledger is not None else None
    spent = ledger.totals(run=estimate.run, role="target") if ledger is not None else None
    done = spent.done + spent.unknown if spent is not None else 0
    tokens = spent.prompt_tokens + spent.completion_tokens if spent is not None else 0
    yield from _against("max_calls", settings.budget_calls, estimate.calls(), done)
    yield from _against("max_tokens", settings.budget_tokens, estimate.tokens(), tokens)
    if limit is not None:
        for currency, bounds in estimate.money().items():
            so_far = totals.money.get(currency, Decimal(0)) if totals is not None else Decimal(0)
            if bounds.high:
                yield from _against(f"{name} ({currency})", Decimal(str(limit)), bounds, so_far)
    if any(
        x is not None
        for x in (settings.attribution_error, settings.attribution_calls, settings.attribution_money)
    ):
        yield (
            "Further coalitions for [attribution] error, calls or money are in the upper bound of attribute, as many as"
            " these settings and the proxies' design allow; how many there will be is seen after a first fit."
        )
    yield "Retries, and further samples of the same request, are in no bound."


def _against(name: str, limit: Any, bounds: Bounds, spent: Any) -> Iterable[str]:
    if limit is None:
        return
    left = limit - spent
    if bounds.high <= left:
        yield f"{name} = {limit}: the run stays within it."
    elif bounds.low > left:
        yield f"{name} = {limit}: too little; {spent} is spent and at least {bounds.low} more is needed."
    elif bounds.expected > left:
        yield (
            f"{name} = {limit}: more is expected; screen and explanation are cut to fit where that can do, else the run"
            " stops before its end, and all answers up to then are kept."
        )
    else:
        yield f"{name} = {limit}: expected to do, but the upper bound of {bounds.high} passes it."
