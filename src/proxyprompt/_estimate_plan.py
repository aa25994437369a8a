"""What each stage of a run asks of a model at most, and what it is expected to ask."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from ._estimate_loads import Load, Model, Work, recorded_calls
from ._explaining import noise_repeats, oracle_queries, screening_plan
from ._oracle_size import MEASURED, later_calls
from ._run import Run
from ._screening_noise import noise_queries
from ._shrinking import certificate_method
from ._verify_stage import verification_bases
from .attribution.base import Design
from .optimize.relabel import own_queries

__all__ = ["Plan"]

# Guesses for the expected numbers only; no bound depends on them.
_AGREE = 0.7  # share of queries on which a proxy predicts what the target predicts


@dataclass(frozen=True)
class Plan:
    """Which calls each stage makes of one model; the counts follow the stages' own code."""

    run: Run
    model: Model
    rows: tuple[Design, NDArray[np.bool_]] | None

    @property
    def of_target(self) -> bool:
        return self.model.role == "target"

    @property
    def screened(self) -> bool:
        """Whether the screen asks this model anything; with few queries some proxies are left out, or all."""
        assert self.rows is not None
        plan, names = screening_plan(self.run, len(self.rows[1])), list(self.run.proxies)
        if self.of_target or plan.n_screened > len(names):  # the ensemble asks all of them
            return plan.n_screened > 0
        return names.index(self.model.name) < plan.n_screened

    def size(self, split: str) -> int:
        return len(self.run.splits[split])

    def stages(self) -> dict[str, Work]:
        """By stage; what the run has recorded is subtracted."""
        bounds = {
            "screen": self.screen(),
            "attribute": self.attribute(),
            "verify": self.verify(),
            "clean": self.clean(),
            "compress": self.compress(),
            "certify": self.certify(),
        }
        return {stage: work for stage, work in bounds.items() if work is not None}

    def left(self, stage: str, split: str, high: float, expected: float) -> tuple[Load, Load]:
        """Highest and expected load of calls that are known by number only, without those of this run so far."""
        meter = self.model.meter
        done = 0
        if meter.ledger is not None:
            done = recorded_calls(meter.ledger, meter.run, self.model, stage)
        return (
            self.model.any_rows(split, max(0.0, high - done)),
            self.model.usual_rows(split, max(0.0, expected - done)),
        )

    def screen(self) -> Work | None:
        """All queries, the full prompt first; where proxy and target agree, all coalitions."""
        if self.rows is None or not self.screened:
            return None
        queries, s = self.run.splits["explain"], self.run.settings
        order = [queries[int(i)] for i in self.run.rng(3).permutation(len(queries))]
        everything = np.vstack([self.rows[0].coalitions, self.rows[1], self.model.full])
        full, high = self.model.fresh(queries, self.model.full), self.model.fresh(queries, everything)
        more = Load(high.calls - full.calls, high.bytes - full.bytes)
        first, again = order[: s.screening_block], Load()
        repeats = noise_repeats(self.run) if self.of_target else 0
        if repeats:
            repeated = noise_queries(order)
            first += [q for q in repeated if q not in first]
            for repeat in range(1, repeats + 1):
                again += self.model.fresh(repeated, self.model.full, repeat)
        return Work(
            self.model.fresh(first, self.model.full) + again,
            full + more.times(_AGREE) + again,
            high + again,
        )

    def attribute(self) -> Work | None:
        run, s, n = self.run, self.run.settings, self.run.prompt.n_units
        queries = run.splits["explain"]
        if s.verify != "off":
            return self.propose()
        if self.rows is None:
            if not self.of_target:
                return None
            design = run.explainer.design(n, s.n_fit(n), rng=run.rng(1))
            exact = self.model.fresh(oracle_queries(queries, [], s.oracle_queries), design.coalitions)
            return Work(exact, exact, exact)
        fitted = self.rows[0].n_coalitions
        if not screening_plan(run, len(self.rows[1])).n_screened:
            asked_first = oracle_queries(queries, [], s.oracle_queries)
            if not self.of_target and run.wide is None:
                return None
            rows = self.rows[0] if self.of_target or run.wide is None else run.wide
            exact = self.model.fresh(asked_first, rows.coalitions)
            likely, most_more = self.further(len(asked_first), fitted)
            return Work(
                exact,
                exact + self.model.usual_rows("explain", likely),
                exact + self.model.any_rows("explain", most_more),
            )
        if self.of_target:
            # A proxy explains: the full prompt everywhere. None does: what the screen has not bought of so many queries.
            asked = min(len(queries), s.oracle_queries or 30)
            unbought = max(0.0, asked - _AGREE * len(queries))
            # The screen may have bought more queries than these, and further coalitions are asked for all of them.
            likely, most_more = self.further(s.oracle_queries or max(len(queries), 1), fitted)
            high, expected = self.left(
                "attribute",
                "explain",
                max(asked * fitted, len(queries)) + most_more,
                unbought * fitted + likely,
            )
            rows = run.wide if most_more and run.wide is not None else self.rows[0]
            most = self.model.fresh(queries, np.vstack([rows.coalitions, self.model.full]))
            return Work(high=min(high, most, key=lambda x: x.calls), expected=expected)
        wide = run.wide.n_coalitions if run.wide is not None else 0
        accepted = len(queries) * (1 + s.n_proxy(n))
        usual = _AGREE * len(queries) * max(0, wide - fitted)
        high, expected = self.left("attribute", "explain", max(accepted, len(queries) * wide), usual)
        return Work(high=high, expected=expected)

    def further(self, n_queries: int, fitted: int) -> tuple[float, float]:
        """Expected and most target calls for further coalitions, where an error, calls or money were named for them."""
        s, wide = self.run.settings, self.run.wide
        named = (s.attribution_error, s.attribution_calls, s.attribution_money)
        if not self.of_target or wide is None or named == (None, None, None):
            return 0.0, 0.0
        most = float(n_queries * (wide.n_coalitions - fitted))
        if s.attribution_calls is not None:
            most = min(most, s.attribution_calls)
        if s.attribution_money is not None and self.model.price is not None:
            most = min(most, s.attribution_money / max(self.model.least_money(), 1e-12))
        # Limits alone are spent; for an error it is seen after a first fit.
        return (most if s.attribution_error is None else most / 2), most

    @property
    def unscreened(self) -> bool:
        """Whether no screen is held: then all proxies propose what the target verifies."""
        return self.rows is None or not screening_plan(self.run, len(self.rows[1])).n_screened

    def propose(self) -> Work:
        """The full prompt everywhere; of proxies that propose, their coalitions on the queries that agree."""
        run, queries = self.run, self.run.splits["explain"]
        full = self.model.fresh(queries, self.model.full)
        low = full if self.unscreened else Load()
        if self.of_target:
            return Work(low, low, full)
        n = run.prompt.n_units
        design = run.explainer.design(n, run.settings.n_proxy(n), rng=run.rng(4))
        high = self.model.fresh(queries, np.vstack([design.coalitions, self.model.full]))
        return Work(low, full + Load(high.calls - full.calls, high.bytes - full.bytes).times(_AGREE), high)

    def verify(self) -> Work | None:
        """The target measures: the coalition of each query, and then the same without or with each demonstration."""
        run, s, n = self.run, self.run.settings, self.run.prompt.n_units
        if s.verify == "off" or not self.of_target:
            return None
        explain = run.splits["explain"]
        queries = oracle_queries(explain, [], s.oracle_queries)
        size = len(queries)
        if not self.unscreened:  # as many as the screen bought
            size = min(len(explain), max(s.oracle_queries or len(explain), 1))
        most = size * (n + 1) if s.verify_calls is None else min(size * (n + 1), s.verify_calls)
        if most < 2 * min(size, len(queries)):
            return None
        share = 1.0 if s.verify == "all" else MEASURED
        high, expected = self.left("verify", "explain", most, min(most, size * (1 + share * n)))
        if not self.unscreened:
            return Work(high=high, expected=expected)
        bases, _ = verification_bases(run, len(queries))
        low = Load()
        for query, base in zip(queries, bases, strict=True):
            # The full prompt is asked before.
            low += Load() if base.all() else self.model.fresh([query], base[None, :])
        high, expected = (max(x, low, key=lambda load: load.calls) for x in (high, expected))
        return Work(low, expected, high)

    def clean(self) -> Work | None:
        run, s, n = self.run, self.run.settings, self.run.prompt.n_units
        if not s.clean:
            return None
        explain, select, rounds = self.size("explain"), self.size("select"), s.clean_rounds
        if not self.of_target:
            again = (rounds - 1) * s.n_proxy(n) * explain
            return Work(high=self.left("clean", "explain", again, 0)[0])
        suspects = min(n - len(run.protected), rounds * s.max_suspects)
        high = select * (2 * suspects + 2 * min(rounds, suspects) + 5)
        expected = later_calls(run)["clean"]
        if rounds > 1:
            fitted = self.rows[0].n_coalitions if self.rows is not None else s.n_fit(n)
            high += fitted * explain // 2 if s.reexplain_calls is None else s.reexplain_calls
        own = own_queries(run.prompt, run.task)
        doubts = Load()
        if own is not None and s.clean_prior == "zero_shot":
            high += n
            doubts = self.model.fresh(own, self.model.empty)
        if own is not None and s.relabel == "propose":
            high += n + explain + select
        longest = (
            "explain"
            if self.model.any_rows("explain", 1).bytes > self.model.any_rows("select", 1).bytes
            else "select"
        )
        most, usual = self.left("clean", longest, high, expected)
        return Work(doubts, usual, most)

    def compress(self) -> Work | None:
        s, select, explain = self.run.settings, self.size("select"), self.size("explain")
        orders = 4 + s.orders if s.orders else 0
        if not self.of_target:
            if not orders:
                return None
            return Work(high=self.left("compress", "explain", orders * explain, 0)[0])
        # Both ends and the empty prompt, the points of the path, the cap, three prompts of two swaps.
        high = select * (3 + s.max_evaluations + 1 + 3)
        if orders:
            high += orders * ceil(select / 4) + 2 * select
        most, usual = self.left("compress", "select", high, later_calls(self.run)["compress"])
        return Work(self.model.fresh(self.run.splits["select"], self.model.empty), usual, most)

    def certify(self) -> Work | None:
        s, sealed = self.run.settings, self.run.splits["sealed"]
        if not self.of_target:
            return None
        # The full prompt, at most four nested candidates, and one in another order.
        prompts = 6 if s.orders else 5
        most, usual = self.left("certify", "sealed", prompts * len(sealed), later_calls(self.run)["certify"])
        full = self.model.fresh(sealed, self.model.full)
        if certificate_method(s, self.run.task) == "betting":
            block = s.certificate_block or max(10, ceil(len(sealed) / 4))
            full = full.times(min(1.0, block / len(sealed))) if full.calls == len(sealed) else Load()
            full = Load(int(full.calls), full.bytes / 2)  # which queries come first is not looked up
        return Work(full, usual, most)
