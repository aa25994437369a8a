"""Stages of a run that explain the prompt: proxies are screened, and whoever may explains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ._oracle_size import coalitions_within, fit_oracle, proxies_fit, screen_within
from ._run import Run
from .attribution import KernelSHAP, WeightedBanzhaf
from .attribution.allocation import Allocation, allocate
from .attribution.base import Attribution, Design
from .attribution.calibrated import CalibratedAttribution, calibrate
from .attribution.ensemble import ensemble, ensemble_weights
from .attribution.extending import nested_designs
from .attribution.verified_units import UnitVerification
from .backends.base import is_deterministic
from .errors import InputError
from .metering import Meter
from .money import Call, bill_call
from .prompt import Query
from .screening import ProxyScreening, Screening, ScreeningPlan, agreement, averaged, plan_screen, screen
from .value_function import Values

__all__ = [
    "Explanation",
    "ask_members",
    "explain",
    "noise_repeats",
    "oracle_queries",
    "propose",
    "screen_proxies",
    "screening_plan",
    "screening_rows",
]

_REPEATS = 2
_LEAST_GAIN = 0.005
"""Share of the sampling error that proxies must explain to be let into the target's attributions."""


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
    calibration : CalibratedAttribution or None
        How proxies that were not accepted made the target's own attributions more precise; ``None`` when they did not.
    design : Design or None
    utility : float (n_coalitions, n_queries) or None
        What the attributions were fitted on; of an ensemble, its members' values added up with their weights.
    members : mapping of str to float
        Proxies that explained, with what their values count for; one, unless it was an ensemble.
    verification : UnitVerification or None
        What the target measured of the proxies' proposal, where that was asked for; ``attribution`` then holds
        measurements where there are any, and what the measured units let expect of the others.
    proposal : Explanation or None
        The proxies' own explanation, which was verified.
    estimand : str
        What the target measured of a unit; empty where nothing was verified.
    """

    attribution: Attribution
    role: str
    model: str
    why: str
    query_ids: tuple[str, ...]
    calibration: CalibratedAttribution | None = None
    design: Design | None = field(default=None, repr=False)
    utility: NDArray[np.float64] | None = field(default=None, repr=False)
    members: Mapping[str, float] = field(default_factory=dict)
    verification: UnitVerification | None = None
    proposal: Explanation | None = field(default=None, repr=False)
    estimand: str = ""

    @property
    def measured(self) -> NDArray[np.bool_]:
        """Bool (n_units,): which attributions the target measured; all or none, unless they were verified."""
        if self.verification is not None:
            return self.verification.is_measured
        return np.full(self.attribution.n_units, self.role == "target")


def screen_proxies(run: Run) -> Screening | None:
    if not run.proxies or run.settings.screening_method == "off":
        return None
    s, n = run.settings, run.prompt.n_units
    rows = screening_rows(run)
    if rows is None:
        # With so few units every coalition is in the design; nothing is left to judge on.
        run.notes.append(
            f"With {n} demonstrations every coalition can be asked; no proxy is needed or screened."
        )
        return None
    design, judges = rows
    names = ", ".join(run.proxies)
    run.watch.stage("screen", f"May {names} stand in for {run.target.backend.name}?")
    queries, cut = list(run.splits["explain"]), ""
    if screening_plan(run, len(judges)).n_screened:
        # To see what fits, the target may be asked already.
        queries, cut = screen_within(run, design.n_coalitions + len(judges))
    if cut:
        run.most_screened = len(queries)
        run.notes.append(cut)
        run.watch.note(cut)
    run.watch.note(screening_plan(run, len(judges)).text)

    def ask(meter: Meter) -> Callable[[Sequence[Query], NDArray[np.bool_]], Values]:
        return lambda queries, rows: run.evaluate(meter, queries, "screen", rows)

    screening = screen(
        ask(run.target),
        {name: ask(meter) for name, meter in run.proxies.items()},
        queries,
        explainer=run.explainer,
        design=design,
        judge_coalitions=judges,
        rng=run.rng(3),
        method=_rule(run),
        on=s.screening_on,
        tau=s.screening_tau,
        delta=s.screening_delta,
        ensemble=_with_ensemble(run),
        max_pairs=s.max_pairs,
        block=s.screening_block,
        again=lambda queries, rows, repeat: run.evaluate(run.target, queries, "screen", rows, repeat=repeat),
        repeats=noise_repeats(run),
    )
    if screening.noise is not None:
        run.watch.note(screening.noise.text)
    for proxy in screening.proxies[: screening.plan.n_screened]:
        run.watch.note(f"{proxy.name}: {proxy.decision} after {proxy.rule.n_used} pairs")
    return screening


def _rule(run: Run) -> Literal["betting", "paper"]:
    method = run.settings.screening_method
    assert method != "off", "nothing is screened then"
    return method


def noise_repeats(run: Run) -> int:
    """How often the target is asked the same again, to see its noise."""
    wanted = run.settings.screening_repeats
    if wanted == "auto":
        return 0 if is_deterministic(run.target.backend) else _REPEATS
    return wanted


def _with_ensemble(run: Run) -> bool:
    return run.settings.screening_ensemble and len(run.proxies) > 1


def screening_plan(run: Run, n_judge: int) -> ScreeningPlan:
    """What the screen of this run can find, and which candidates it asks at all."""
    s = run.settings
    return plan_screen(
        len(run.splits["explain"]) if run.most_screened is None else run.most_screened,
        len(run.proxies) + _with_ensemble(run),
        method=_rule(run),
        on=s.screening_on,
        tau=s.screening_tau,
        delta=s.screening_delta,
        max_pairs=s.max_pairs,
        n_judge=n_judge,
    )


def screening_rows(run: Run) -> tuple[Design, NDArray[np.bool_]] | None:
    """Coalitions that the screen fits on and judges on; ``None`` where all of them are to be asked anyway."""
    s, n = run.settings, run.prompt.n_units
    if s.screening_method == "off":
        return None
    design = _screening_design(run)
    if design.n_coalitions == 2**n:
        return None
    n_judge = s.judge_coalitions if n > 30 else min(s.judge_coalitions, 2**n - design.n_coalitions)
    taken = (
        run.wide if run.wide is not None and run.wide.n_coalitions + n_judge <= 2 ** min(n, 30) else design
    )
    return design, run.explainer.held_out(n, n_judge, rng=run.rng(2), exclude=taken.coalitions)


def _screening_design(run: Run) -> Design:
    """Coalitions to fit on; ``run.wide`` has more of them, for proxies only, and begins with the same rows."""
    s, n = run.settings, run.prompt.n_units
    if not s.calibrate or not isinstance(run.explainer, KernelSHAP | WeightedBanzhaf):
        return run.explainer.design(n, s.n_fit(n), rng=run.rng(1))
    few, many = s.n_fit(n), max(s.n_fit(n), s.n_proxy(n))
    design, wide = nested_designs(run.explainer, n, (few, many), rng=run.rng(1))
    run.wide = wide if wide.n_coalitions > design.n_coalitions else None
    return design


def explain(run: Run, screening: Screening | None) -> Explanation:
    """The cheapest accepted choice explains, else the next; else the target, with the proxies' help where that helps."""
    accepted = [] if screening is None else [screening[name] for name in screening.accepted]
    for candidate in accepted:
        explanation = _by_proxy(run, candidate)
        if explanation is not None:
            return explanation
    return _by_target(run, screening)


def propose(run: Run, screening: Screening | None) -> tuple[Explanation, bool]:
    """The proxies' explanation that the target is to verify, and whether a screen accepted it.

    Without an accepted choice all proxies propose together; the order of an untested explanation is worth what the
    target's measurements show it to be.
    """
    for candidate in [] if screening is None else [screening[name] for name in screening.accepted]:
        explanation = _by_proxy(run, candidate)
        if explanation is not None:
            return explanation, True
    members, queries = tuple(run.proxies), run.splits["explain"]
    name = " + ".join(members)
    agreed = _agreeing(run, members)
    used = agreed if len(agreed) >= 2 else list(queries)
    on = f"on the {len(used)} of {len(queries)} queries on which the prediction is the target's"
    if used is not agreed:
        on = (
            f"on all {len(queries)} queries, for the prediction is the target's on {len(agreed)} of them only"
        )
    why = "No proxy was screened" if screening is None else "The screen accepted no proxy"
    return _of_members(run, name, members, used, f"{why}; {name} only proposes an order, {on}."), False


def _by_proxy(run: Run, candidate: ProxyScreening) -> Explanation | None:
    """Attributions of a proxy, or of several together, on the queries of the instance-level screen [PE 3.1]."""
    queries, name, members = run.splits["explain"], candidate.name, candidate.members
    agreed = _agreeing(run, members)
    if len(agreed) < 2:
        run.notes.append(
            f"{name} was accepted but agrees with the target on {len(agreed)} queries; it does not explain."
        )
        return None
    who = f"{name} (the mean of their standardised attributions)" if len(members) > 1 else name
    return _of_members(
        run,
        name,
        members,
        agreed,
        f"The screen accepted {who}{_passed_over(run, candidate)}. It explains the {len(agreed)} of {len(queries)}"
        " queries on which it predicts the same as the target; the target confirms and certifies.",
    )


def _agreeing(run: Run, members: Sequence[str]) -> list[Query]:
    """Queries on which these proxies, by their mean, predict what the target predicts [PE 3.1]."""
    queries = run.splits["explain"]
    run.watch.stage("attribute", f"{' + '.join(members)} explains: importance of every demonstration")
    full = np.ones((1, run.prompt.n_units), dtype=np.bool_)
    said = averaged([run.evaluate(run.proxies[m], queries, "attribute", full) for m in members])
    same = agreement(run.evaluate(run.target, queries, "attribute", full), said)[0]
    return [q for q, yes in zip(queries, same, strict=True) if yes]


def _of_members(
    run: Run, name: str, members: Sequence[str], queries: Sequence[Query], why: str
) -> Explanation:
    design = run.explainer.design(
        run.prompt.n_units, run.settings.n_proxy(run.prompt.n_units), rng=run.rng(4)
    )
    utilities = []
    for member in members:
        values = run.evaluate(run.proxies[member], queries, "attribute", design.coalitions)
        values.require_complete(f"attribution by {member}")
        utilities.append(values.utility)
    fits = [run.explainer.fit(design, utility) for utility in utilities]
    weights = ensemble_weights(fits).tolist() if len(fits) > 1 else [1.0]
    return Explanation(
        attribution=ensemble(fits) if len(fits) > 1 else fits[0],
        role="proxy",
        model=name,
        why=why,
        query_ids=tuple(q.id for q in queries),
        design=design,
        utility=_added(utilities, weights),
        members=dict(zip(members, weights, strict=True)),
    )


def _passed_over(run: Run, candidate: ProxyScreening) -> str:
    if len(candidate.members) > 1:
        return ", and none of them alone"
    before = list(run.proxies)[: list(run.proxies).index(candidate.name)]
    return f"; cheaper, but not accepted or not agreeing: {', '.join(before)}" if before else ""


def _added(values: Sequence[NDArray[np.float64]], weights: Sequence[float]) -> NDArray[np.float64]:
    total: NDArray[np.float64] = np.einsum("m,mcq->cq", np.asarray(weights), np.stack(values))
    return total


def ask_members(
    run: Run, explanation: Explanation, stage: str
) -> Callable[[Sequence[Query], NDArray[np.bool_]], Values]:
    """Values of the proxies that explained, added up as in the explanation."""

    def ask(queries: Sequence[Query], rows: NDArray[np.bool_]) -> Values:
        found = [run.evaluate(run.proxies[m], queries, stage, rows) for m in explanation.members]
        utility = _added([v.utility for v in found], list(explanation.members.values()))
        return found[0] if len(found) == 1 else replace(averaged(found), utility=utility)

    return ask


def _by_target(run: Run, screening: Screening | None) -> Explanation:
    """Oracle attributions; the coalitions are those of screening, so its target calls are used again."""
    s, n = run.settings, run.prompt.n_units
    name = run.target.backend.name
    bought = list(screening.queries_bought) if screening is not None else []
    queries = oracle_queries(run.splits["explain"], bought, s.oracle_queries)
    design = (
        screening.design if screening is not None else run.explainer.design(n, s.n_fit(n), rng=run.rng(1))
    )
    queries, design, cut = fit_oracle(run, queries, design)
    run.watch.stage("attribute", f"{name} explains itself on {len(queries)} queries")
    if cut:
        run.notes.append(cut)
        run.watch.note(cut)
    values = run.evaluate(run.target, queries, "attribute", design.coalitions)
    values.require_complete(f"attribution by {name}")
    attribution, calibration = run.explainer.fit(design, values.utility), None
    if screening is None:
        why = "No proxy model was screened; the target explains itself."
    else:
        what = ", ".join(
            f"{p.name} {p.decision if k < screening.plan.n_screened else 'not screened'}"
            for k, p in enumerate(screening.proxies)
        )
        why = (
            f"{screening.plan.text} So the target explains itself."
            if not screening.plan.n_screened
            else f"The screen accepted no proxy ({what}), so the target explains itself; its answers bought for the"
            " screen are used again."
            if not screening.accepted
            else f"Accepted by the screen ({what}), but agreeing with the target on too few queries; so the target explains"
            " itself."
        )
        calibration = _calibrate(run, queries, design, values.utility)
        more = _allocate(run, calibration or attribution, design, values, queries)
        if more is not None and more.calls:
            design = _longer(run, design, more.n_target)
            values = run.evaluate(run.target, queries, "attribute", design.coalitions)
            values.require_complete(f"attribution by {name}")
            attribution = run.explainer.fit(design, values.utility)
            calibration = _calibrate(run, queries, design, values.utility)
        if more is not None:
            why += _bought(more, s.attribution_error)
        if calibration is not None:
            attribution = calibration.attribution
            why += (
                f" What it says of {design.n_coalitions} coalitions is completed by {', '.join(run.proxies)} on"
                f" {calibration.n_proxy}: they explain {calibration.rho2:.0%} of the error from sampling coalitions, worth"
                f" {calibration.multiplier:.2f} times as many target calls."
            )
    return Explanation(
        attribution=attribution,
        calibration=calibration,
        role="target",
        model=name,
        why=why,
        query_ids=tuple(q.id for q in queries),
        design=design,
        utility=values.utility,
    )


def _allocate(
    run: Run,
    first: CalibratedAttribution | Attribution,
    design: Design,
    values: Values,
    queries: Sequence[Query],
) -> Allocation | None:
    """What more the target is asked for, if an error, calls or money were named."""
    s = run.settings
    if s.attribution_error is None and s.attribution_calls is None and s.attribution_money is None:
        return None
    if run.wide is None or design.exact:
        run.notes.append(
            "attribution_error, attribution_calls and attribution_money buy no further coalitions here: there is no design"
            " that goes on (calibrate = false, another explainer, or all coalitions are asked)."
        )
        return None
    price = None
    if s.attribution_money is not None:
        if run.target_price is None:
            raise InputError(
                f"attribution_money is set, and {run.target.backend.name} has no price.",
                hint="Give the price ([price] input_per_million), or use attribution_calls.",
            )
        tokens = float(values.prompt_tokens[values.prompt_tokens > 0].mean())
        price = float(bill_call(Call(tokens), run.target_price.at(tokens) or run.target_price.rates).total)
    largest, name = coalitions_within(run, queries, run.wide, design.n_coalitions)
    if name:
        run.notes.append(
            f"To stay within {name}, the target is asked for no more than {largest} coalitions a query."
        )
    return allocate(
        first,
        n_queries=len(queries),
        largest=largest,
        standard_error=s.attribution_error,
        calls=s.attribution_calls,
        money=s.attribution_money,
        call_price=price,
    )


def _longer(run: Run, design: Design, n_target: int) -> Design:
    """The design of so many coalitions that begins with this one; the same draw, cut off later."""
    assert run.wide is not None
    budgets = (design.n_coalitions, min(n_target, run.wide.n_coalitions), run.wide.n_coalitions)
    return nested_designs(run.explainer, design.n_units, budgets, rng=run.rng(1))[1]


def _bought(more: Allocation, wanted: float | None) -> str:
    text = (
        f" After a first fit {more.calls} further target calls were bought, {more.n_target} coalitions a query, for an"
        f" expected median standard error of {more.standard_error:.3g}"
    )
    if wanted is None:
        return text + f" (all that the limit on {more.limited_by} allows)."
    limit = "" if more.limited_by == "nothing" else f", which the limit ({more.limited_by}) keeps it from"
    return text + f"; wanted: {wanted:g}{limit}."


def _calibrate(
    run: Run, queries: Sequence[Query], design: Design, utility: NDArray[np.float64]
) -> CalibratedAttribution | None:
    """Target attributions with the proxies' help; ``None`` when they are of none, or cannot say."""
    if run.wide is None or not run.proxies or design.exact:
        return None
    if not proxies_fit(run, queries, design, run.wide):
        run.notes.append(
            "The budget leaves too little to ask the proxies for more coalitions; the target's attributions are its own."
        )
        return None
    values = [
        run.evaluate(meter, queries, "attribute", run.wide.coalitions) for meter in run.proxies.values()
    ]
    if any(np.isnan(v.utility).any() for v in values):
        run.notes.append(
            "A proxy's answers were incomplete; the target's attributions were not calibrated with them."
        )
        return None
    found = calibrate(
        run.explainer,
        run.wide,
        np.stack([v.utility for v in values]),
        np.arange(design.n_coalitions),
        utility,
        rng=run.rng(20),
        measured_design=design,
    )
    # Weights that the other folds chose and this one does not confirm add noise and no precision.
    if not found.lam.any() or found.rho2 < _LEAST_GAIN:
        run.notes.append(
            f"{', '.join(run.proxies)} would not have made the target's attributions more precise; they are its own."
        )
        return None
    return found


def oracle_queries(queries: Sequence[Query], bought: list[str], wanted: int | None) -> list[Query]:
    n = wanted if wanted is not None else max(len(bought), 30)
    first = [q for q in queries if q.id in set(bought)]
    return [*first, *(q for q in queries if q.id not in set(bought))][: max(n, 1)]
