"""What a cut saves per call, after how many calls the run has paid for itself, and where a cut raises the bill.

Whether a provider's cache holds the beginning of a production call is not known here. It is an assumption, and it
is named: unless a hit rate is given, both ends are reported, never and always.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from ._provider_caching import CachingRule
from .money import Bill, Call, RunCost, bill_call, break_even_calls
from .prices import Price

__all__ = ["Savings", "Scenario", "compare_bills", "hit_rate_of"]

# The query may have more or fewer tokens per byte than the demonstrations; a third covers prose, code and digits.
_TAIL_ERROR = 1 / 3


@dataclass(frozen=True, slots=True)
class Scenario:
    """One call's bill with the full and with the smaller prompt, under one way of paying.

    Attributes
    ----------
    name : str
    before, after : Bill
    run_cost : Decimal
    """

    name: str
    before: Bill
    after: Bill
    run_cost: Decimal

    @property
    def saved(self) -> Decimal:
        """Money that the smaller prompt saves per call; negative if it costs more."""
        return self.before.total - self.after.total

    @property
    def break_even_calls(self) -> float:
        """Calls after which the run has paid for itself; infinite if it never does."""
        return break_even_calls(self.run_cost, self.saved)


@dataclass(frozen=True, slots=True)
class Savings:
    """Money side of a cut.

    Attributes
    ----------
    price : Price
    before, after : Call
    run : RunCost
    scenarios : tuple of Scenario
        No caching; caching, where its rule and price are known; batch, where it has a price.
    assumed : Scenario
        The one that headlines quote: caching if a hit rate was given, else no caching.
    warnings : tuple of str
        A bill that rises, or a cache that the smaller prompt misses.
    notes : tuple of str
        Assumptions and what is not in the amounts.
    """

    price: Price
    before: Call
    after: Call
    run: RunCost
    scenarios: tuple[Scenario, ...]
    assumed: Scenario
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form; amounts as floats, ``None`` for a break-even that never comes."""
        rates = self.price.at(self.before.prompt_tokens) or self.price.rates
        return {
            "currency": self.price.currency,
            "price_input_per_million": _plain(rates.input),
            "source": self.price.source,
            "date": self.price.date,
            "model": self.price.name,
            "run_cost": _plain(self.run.total),
            "saved_per_thousand_calls": _plain(1000 * self.assumed.saved),
            "stable_tokens": [self.before.stable_tokens, self.after.stable_tokens],
            "scenarios": [
                {
                    "name": s.name,
                    "before": _plain(s.before.total),
                    "after": _plain(s.after.total),
                    "saved_per_thousand_calls": _plain(1000 * s.saved),
                    "break_even_calls": _count(s.break_even_calls),
                    "terms_before": _terms(s.before),
                    "terms_after": _terms(s.after),
                }
                for s in self.scenarios
            ],
            "warnings": list(self.warnings),
            "notes": list(self.notes),
        }


def hit_rate_of(calls_per_hour: float, lifetime: float) -> float:
    """Share of calls that follow the one before within the cache's lifetime, if they arrive at random.

    Parameters
    ----------
    calls_per_hour : float
    lifetime : float
        Seconds that an entry lives after its last use.

    Returns
    -------
    float
        ``1 - exp(-calls_per_hour * lifetime / 3600)``: the gaps of a Poisson process.

    Examples
    --------
    >>> round(hit_rate_of(12, 300), 3)
    0.632
    """
    return -math.expm1(-calls_per_hour * lifetime / 3600)


def compare_bills(
    before: Call,
    after: Call,
    price: Price,
    run: RunCost,
    *,
    rule: CachingRule | None = None,
    hit_rate: float | None = None,
    calls_per_hour: float | None = None,
) -> Savings:
    """Bills before and after a cut in every way of paying, and warnings where one rises.

    Parameters
    ----------
    before, after : Call
    price : Price
    run : RunCost
    rule : CachingRule, optional
    hit_rate, calls_per_hour : float, optional
        The share of calls whose stable beginning is cached, or what it follows from. Neither: every call.
    """
    notes: list[str] = [price.note] if price.note else []
    plain = _scenario("no prompt caching", before, after, price, run)
    scenarios = [plain]
    caching = None
    why_not = _no_caching(price, before, rule)
    if rule is not None and not why_not:
        given, rate, how = _hit_rate(rule, hit_rate, calls_per_hour)
        if how:
            notes.append(how)
        name = f"beginning cached in {rate:.0%} of calls" if given else "beginning cached in every call"
        caching = _scenario(name, before, after, price, run, rule=rule, hit_rate=rate)
        scenarios.append(caching)
        notes.append(_describe(rule, before, after))
    else:
        given = False
        notes.append(f"Prompt caching is not reported: {why_not}.")
    if price.batch is not None:
        scenarios.append(_scenario("batch, nothing cached", before, after, price, run, batch=True))
    if price.rates.output is None:
        notes.append("Completion tokens are not in these amounts: no output price is given.")
    return Savings(
        price,
        before,
        after,
        run,
        tuple(scenarios),
        caching if caching is not None and given else plain,
        _warn(before, after, scenarios, caching, rule),
        (*notes, *run.notes, *run.gaps),
    )


def _scenario(
    name: str,
    before: Call,
    after: Call,
    price: Price,
    run: RunCost,
    *,
    rule: CachingRule | None = None,
    hit_rate: float = 1.0,
    batch: bool = False,
) -> Scenario:
    bills = []
    for call in (before, after):
        rates = price.at(call.prompt_tokens, batch=batch)
        assert rates is not None  # tiers of a price with batch rates have them too
        bills.append(bill_call(call, rates, rule=rule, hit_rate=hit_rate))
    return Scenario(name, bills[0], bills[1], run.total)


def _hit_rate(
    rule: CachingRule, hit_rate: float | None, calls_per_hour: float | None
) -> tuple[bool, float, str]:
    """Whether the user gave one, the rate, and a sentence where it was derived."""
    if hit_rate is not None:
        return True, hit_rate, ""
    if calls_per_hour is None:
        return False, 1.0, ""
    if rule.lifetime is None:
        return False, 1.0, f"calls_per_hour is not used: how long {rule.family} keep an entry is not stated."
    rate = hit_rate_of(calls_per_hour, rule.lifetime)
    return (
        True,
        rate,
        f"{calls_per_hour:g} calls an hour, arriving at random, find an entry that lives {rule.lifetime:g} s after its"
        f" last use in {rate:.0%} of cases.",
    )


def _no_caching(price: Price, before: Call, rule: CachingRule | None) -> str:
    """Why there is no caching row; empty if there is one."""
    if price.rates.cached_input is None:
        return "no price of cached input is known for this model"
    if rule is None:
        return "from which length on this model's provider caches is not recorded; give cache_minimum_tokens"
    if not before.stable_tokens:
        return "the prompts of different queries have no common beginning"
    return ""


def _describe(rule: CachingRule, before: Call, after: Call) -> str:
    steps = f" in steps of {rule.increment}" if rule.increment > 1 else ""
    must = f", if the request {rule.request}" if rule.request else ""
    written = f" ({rule.source}, {rule.date})" if rule.date else f" ({rule.source})" if rule.source else ""
    smaller = "" if before == after else f", with the smaller one {after.stable_tokens:,}"
    return (
        f"Caching: {rule.family} cache a beginning of {rule.minimum:,} tokens or more{steps}{must}{written}. With the"
        f" full prompt about {before.stable_tokens:,} tokens are alike in every call{smaller}."
    )


def _warn(
    before: Call,
    after: Call,
    scenarios: Sequence[Scenario],
    caching: Scenario | None,
    rule: CachingRule | None,
) -> tuple[str, ...]:
    found = [_rises(s) for s in scenarios if s.saved < 0]
    if caching is None or rule is None or before == after:
        return tuple(found)
    full, small = (rule.cached_tokens(call.stable_tokens) for call in (before, after))
    if small < full and (caching.saved < 0 or not small):
        costs = "" if caching.saved < 0 else " It still costs less."
        left = f"{small:,}" if small else "none"
        found.append(
            f"Of the smaller prompt's beginning (about {after.stable_tokens:,} tokens) {left} can be cached; of the full"
            f" one's (about {before.stable_tokens:,}) {full:,} can: {rule.family} cache from {rule.minimum:,} tokens"
            f" on.{costs}"
        )
    for name, call in (("full", before), ("smaller", after)):
        error = _TAIL_ERROR * (call.prompt_tokens - call.stable_tokens)
        if abs(call.stable_tokens - rule.minimum) <= error:
            found.append(
                f"The beginning of the {name} prompt, about {call.stable_tokens:,} tokens, is too close to the"
                f" {rule.minimum:,} from which {rule.family} cache to say on which side it lies; count it with the"
                " provider's tokenizer."
            )
    return tuple(found)


def _rises(scenario: Scenario) -> str:
    cost = scenario.before.total
    more = f"{-scenario.saved / cost:.0%} more" if cost else "more"
    return f"The cut raises the bill ({scenario.name}): each call costs {more}."


def _terms(bill: Bill) -> list[dict[str, Any]]:
    return [
        {"name": t.name, "tokens": _plain(t.tokens), "rate": _plain(t.rate), "cost": _plain(t.cost)}
        for t in bill.terms
    ]


def _count(calls: float) -> int | None:
    return None if math.isinf(calls) else int(calls)


def _plain(amount: Decimal) -> float:
    return float(amount) + 0.0  # a zero without a sign
