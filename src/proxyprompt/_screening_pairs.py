"""Judging one block of queries for the screen: surrogates on the design, both kinds of evidence on other coalitions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ._screening_noise import TargetNoise
from .agreement import (
    held_out_agreement,
    predicted_agreement,
    rank_agreement,
    self_agreement,
    top_mass,
)
from .attribution.base import Design, Explainer
from .attribution.ensemble import ensemble
from .coalitions import BoolArray, FloatArray
from .errors import InputError
from .fidelity import label_fidelity, score_fidelity
from .prompt import Query
from .value_function import Values

Evaluate: TypeAlias = Callable[[Sequence[Query], NDArray[np.bool_]], Values]
"""Ask one model for a matrix of coalitions on some queries."""

KINDS = ("attribution", "fidelity")
SAME_SCORE = 0.5


@dataclass
class Candidate:
    """What is known so far of one proxy, or of an ensemble of several."""

    name: str
    members: tuple[str, ...]
    ids: list[str] = field(default_factory=list)
    q_proxy: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    q_oracle: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    utility: list[list[FloatArray]] = field(default_factory=list)
    target_utility: list[FloatArray] = field(default_factory=list)
    n_seen: int = 0
    n_agree: int = 0
    n_tied: int = 0
    ceilings: list[float] = field(default_factory=list)
    target_pairs: int = 0

    def pairs(self, kind: str) -> tuple[tuple[str, ...], FloatArray, FloatArray]:
        """Ids, ``q_proxy`` and ``q_oracle`` of the pairs on which this kind of evidence could be had."""
        proxy, oracle = np.array(self.q_proxy[kind]), np.array(self.q_oracle[kind])
        good = ~(np.isnan(proxy) | np.isnan(oracle))
        return tuple(i for i, yes in zip(self.ids, good, strict=True) if yes), proxy[good], oracle[good]


@dataclass(frozen=True)
class Judges:
    """Fits surrogates on the design and judges them on the held-out coalitions; ``noise`` is the target's, if known."""

    explainer: Explainer
    design: Design
    held_out: BoolArray
    noise: TargetNoise | None = None

    @property
    def all_rows(self) -> BoolArray:
        return np.vstack([self.design.coalitions, self.held_out])

    def fidelity(self, fitted_on: Values, judged_on: Values) -> FloatArray:
        """Fidelity per query of the surrogate of one model to the other, on the held-out rows."""
        m = self.design.n_coalitions
        if fitted_on.probabilities is None:
            return score_fidelity(
                self.design,
                fitted_on.utility[:m],
                self.held_out,
                judged_on.utility[m:],
                judged_base=judged_on.utility[self.design.empty_row],
                judged_full=judged_on.utility[self.design.full_row],
                explainer=self.explainer,
            ).side_agreement
        return label_fidelity(
            self.design,
            fitted_on.probabilities[:m],
            self.held_out,
            judged_on.predictions[m:],
            explainer=self.explainer,
        )

    def agreement(self, fitted_on: Sequence[Values], judged_on: Values) -> FloatArray:
        """Agreement per query of attributions (of an ensemble, if several) with the other model's held-out values."""
        m = self.design.n_coalitions
        judged = judged_on.utility[m:]
        if len(fitted_on) == 1:
            return held_out_agreement(
                self.design, fitted_on[0].utility[:m], self.held_out, judged, explainer=self.explainer
            )
        found = np.full(judged.shape[1], np.nan)
        complete = ~np.any([np.isnan(v.utility[:m]).any(axis=0) for v in fitted_on], axis=0)
        if complete.any():
            fits = [self.explainer.fit(self.design, v.utility[:m, complete]) for v in fitted_on]
            found[complete] = predicted_agreement(
                ensemble(fits), self.design, self.held_out, judged[:, complete]
            )
        return found

    def add_pairs(
        self, c: Candidate, on_target: Values, on_members: Sequence[Values], queries: Sequence[Query], by: str
    ) -> None:
        """Judge the agreeing queries of a block; ``by``: the kind of evidence that a pair must have."""
        mean = averaged(on_members)
        q_proxy = {
            "attribution": self.agreement(on_members, on_target),
            "fidelity": self.fidelity(mean, on_target),
        }
        q_oracle = {
            "attribution": self.agreement([on_target], on_target),
            "fidelity": self.fidelity(on_target, on_target),
        }
        m = self.design.n_coalitions
        if self.noise is not None:
            # For information: a pair that is all noise stays one, as leaving such pairs out costs more than it gives.
            c.n_tied += int((~self.noise.distinct(on_target.utility[m:])).sum())
            c.ceilings += self.noise.ceiling(on_target.utility[m:]).tolist()
        for k, query in enumerate(queries):
            if np.isnan(q_proxy[by][k]) or np.isnan(q_oracle[by][k]):
                continue
            c.ids.append(query.id)
            for kind in KINDS:
                c.q_proxy[kind].append(float(q_proxy[kind][k]))
                c.q_oracle[kind].append(float(q_oracle[kind][k]))
            c.utility.append([v.utility[:m, k] for v in on_members])
            c.target_utility.append(on_target.utility[:m, k])

    def mean_agreement(self, c: Candidate) -> tuple[float | None, float | None]:
        """Rank correlation of mean attributions, and share of the target's mass in the candidate's top quarter.

        The share is relative to that of the target's own top quarter, so that 1 means the same units.
        """
        if len(c.ids) < 2 or self.design.n_units < 3:
            return None, None
        from scipy.stats import spearmanr

        columns = [np.stack(of_member, axis=1) for of_member in zip(*c.utility, strict=True)]
        complete = ~np.any([np.isnan(v).any(axis=0) for v in columns], axis=0)
        if len(columns) > 1 and not complete.any():
            return None, None
        fits = [self.explainer.fit(self.design, v if len(columns) == 1 else v[:, complete]) for v in columns]
        of_proxy = (fits[0] if len(fits) == 1 else ensemble(fits)).mean
        of_target = self.explainer.fit(self.design, np.stack(c.target_utility, axis=1)).mean
        if np.ptp(of_target) == 0 or np.ptp(of_proxy) == 0:
            return None, None
        mass = self._relative_mass(of_proxy[None], of_target[None])
        return float(spearmanr(of_target, of_proxy).statistic), float(mass[0])

    def _relative_mass(self, proposed: FloatArray, reference: FloatArray) -> FloatArray:
        k = max(1, round(self.design.n_units / 4))
        share: FloatArray = top_mass(proposed, reference, k) / top_mass(reference, reference, k)
        return share

    def own_agreement(self, c: Candidate, rng: np.random.Generator) -> tuple[float | None, float | None]:
        """What the target reaches with another run of itself, by the measures of :meth:`mean_agreement`.

        On the candidate's queries, with noise drawn from that of the repeated prompts; ``None`` where it is not known.
        """
        if self.noise is None or len(c.ids) < 2 or self.design.n_units < 3:
            return None, None
        values = np.stack(c.target_utility, axis=1)
        if np.isnan(values).all(axis=0).any() or np.ptp(self.explainer.fit(self.design, values).mean) == 0:
            return None, None

        def attribute(v: FloatArray) -> FloatArray:
            return self.explainer.fit(self.design, v).mean[None]

        rank, mass = (
            float(self_agreement(measure, attribute, values, self.noise.residuals, rng=rng)[0])
            for measure in (rank_agreement, self._relative_mass)
        )
        return (None if np.isnan(rank) else rank), (None if np.isnan(mass) else mass)


def agreement(first: Values, second: Values) -> NDArray[np.bool_]:
    """Instance-level screening [PE 3.1]: do two models predict the same? Shape ``(n_coalitions, n_queries)``.

    Labels: the predicted label is equal. Generated text: the scores differ by less than one half, which for
    exact match means both right or both wrong. A missing value never agrees.
    """
    if first.scale == "score" or second.scale == "score":
        with np.errstate(invalid="ignore"):
            return np.asarray(np.abs(first.performance - second.performance) < SAME_SCORE, dtype=np.bool_)
    return np.asarray((first.predictions == second.predictions) & (first.predictions >= 0), dtype=np.bool_)


def averaged(members: Sequence[Values]) -> Values:
    """What an ensemble predicts: the mean of its members' probabilities or scores; missing where one is missing."""
    first = members[0]
    if len(members) == 1:
        return first
    utility = np.mean([v.utility for v in members], axis=0)
    performance = np.mean([v.performance for v in members], axis=0)
    listed = [v.probabilities for v in members]
    if first.probabilities is None:
        return replace(first, utility=utility, performance=performance)
    mean = np.mean([p for p in listed if p is not None], axis=0)
    missing = np.isnan(mean).any(axis=2)
    predictions = np.where(missing, -1, np.nan_to_num(mean).argmax(axis=2)).astype(np.int64)
    return replace(
        first, utility=utility, performance=performance, predictions=predictions, probabilities=mean
    )


def columns_of(values: Values, columns: Sequence[int]) -> Values:
    """The values of some of the queries."""
    at = list(columns)
    return Values(
        coalitions=values.coalitions,
        utility=values.utility[:, at],
        performance=values.performance[:, at],
        predictions=values.predictions[:, at],
        probabilities=None if values.probabilities is None else values.probabilities[:, at],
        prompt_tokens=values.prompt_tokens[:, at],
        scale=values.scale,
    )


def screen_block(
    part: Sequence[Query],
    target: Evaluate,
    proxies: Mapping[str, Evaluate],
    active: Sequence[Candidate],
    judges: Judges,
    by: str,
) -> list[str]:
    """Ask a block of queries and add its pairs to the active candidates; returns the ids bought of the target.

    One buffer of target values serves all candidates, and a proxy that is a candidate of its own and a member of
    the ensemble is asked once.
    """
    full = np.ones((1, judges.design.n_units), dtype=np.bool_)
    target_full = target(part, full)
    names = list(dict.fromkeys(name for c in active for name in c.members))
    proxy_full = {name: proxies[name](part, full) for name in names}
    agreed = {
        c.name: np.flatnonzero(agreement(target_full, averaged([proxy_full[m] for m in c.members]))[0])
        for c in active
    }
    for c in active:
        c.n_seen += len(part)
        c.n_agree += len(agreed[c.name])
        # The full prompt of the design is the one that was asked already.
        c.target_pairs += len(part) + len(agreed[c.name]) * (len(judges.all_rows) - 1)
    wanted = sorted({int(j) for c in active for j in agreed[c.name]})
    if not wanted:
        return []
    on_target = target([part[j] for j in wanted], judges.all_rows)
    on_proxy: dict[str, tuple[list[int], Values]] = {}
    for name in names:
        mine = sorted({int(j) for c in active if name in c.members for j in agreed[c.name]})
        if mine:
            # The held-out rows judge against the target's values alone; a proxy's own would be paid for in vain.
            on_proxy[name] = mine, proxies[name]([part[j] for j in mine], judges.design.coalitions)
    for c in active:
        mine = agreed[c.name].tolist()
        if mine:
            members = [
                columns_of(values, [asked.index(j) for j in mine])
                for asked, values in (on_proxy[m] for m in c.members)
            ]
            own = columns_of(on_target, [wanted.index(j) for j in mine])
            judges.add_pairs(c, own, members, [part[j] for j in mine], by)
    return [part[j].id for j in wanted]


def candidates_of(proxies: Mapping[str, Evaluate], with_ensemble: bool) -> list[Candidate]:
    """Each proxy, in order, and their ensemble last: it costs what all of them cost."""
    found = [Candidate(name, (name,)) for name in proxies]
    if with_ensemble:
        if len(proxies) < 2:
            raise InputError(
                f"ensemble=True with {len(proxies)} proxy.", hint="Give two or more, of different families."
            )
        found.append(Candidate(" + ".join(proxies), tuple(proxies)))
    return found
