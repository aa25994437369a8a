"""Cost reduction ratio [PE 4.3.1], term by term, from what the ledger says was bought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from .money import Call, bill_call, bill_run
from .pipeline import Result
from .prices import Price, Pricing, Unpriced

__all__ = ["StageCost", "cost_reduction", "stage_cost"]

_EXPLAINING = ("screen", "attribute", "verify")


@dataclass(frozen=True)
class StageCost:
    """Calls, tokens and money of some stages of a run; ``money`` is None where a part has no price."""

    calls: int
    tokens: int
    money: Decimal | None
    currency: str | None

    def to_dict(self, name: str) -> dict[str, Any]:
        """A row of the report."""
        money = None if self.money is None else float(self.money)
        return {"name": name, "calls": self.calls, "tokens": self.tokens, "money": money}


def stage_cost(
    spent: Sequence[Mapping[str, Any]], pricing: Pricing, stages: Sequence[str], role: str
) -> StageCost:
    """What the target, or all proxies, cost in some stages."""
    rows = [r for r in spent if r["role"] == role and r["stage"] in stages]
    quotes = [pricing.target if role == "target" else pricing.proxies[r["model"]] for r in rows]
    currency = pricing.target.currency if isinstance(pricing.target, Price) else None
    money: Decimal | None = None
    if currency is not None and not any(isinstance(q, Unpriced) for q in quotes):
        cost = bill_run(rows, pricing.target, pricing.proxies)
        # A gap is a price that is missing or in another currency: then no sum is given, rather than a wrong one.
        money = None if cost.gaps else cost.total
    return StageCost(sum(r["calls"] for r in rows), sum(r["tokens"] for r in rows), money, currency)


def cost_reduction(result: Result) -> dict[str, Any] | None:
    """What oracle explanations would cost, over what was paid instead; ``None`` when nothing was screened or verified.

    ``CRR = C_oracle / (C_proxy + C_fallback + C_screen)`` [PE 4.3.1]. The numerator is the proxy's own number of
    coalitions, asked of the target on every explain query. Answers that another run had bought count as if this one had,
    so that the ratio is that of the method and not of what happened to be in the ledger.
    """
    if (
        result.screening is None and result.explanation.verification is None
    ) or not result.oracle_prompt_tokens:
        return None
    spent, pricing = [_as_if_bought(row) for row in result.spent], result.pricing
    elsewhere = sum(
        row["calls"] - was["calls"]
        for row, was in zip(spent, result.spent, strict=True)
        if row["stage"] in _EXPLAINING and row["role"] == "target"
    )
    screen = stage_cost(spent, pricing, ("screen",), "target")
    fallback = stage_cost(spent, pricing, ("attribute", "verify"), "target")
    proxy = stage_cost(spent, pricing, _EXPLAINING, "proxy")
    calls = result.settings.n_proxy(result.original.n_units) * len(result.splits["explain"])
    oracle = _oracle(result, calls)
    local = not any(
        isinstance(pricing.proxies.get(name), Unpriced) or _charges(pricing.proxies.get(name))
        for name in {r["model"] for r in spent if r["role"] == "proxy"}
    )
    priced_tokens = 0 if local else _at_target_price(proxy, pricing)
    paid_calls = screen.calls + fallback.calls
    paid_tokens = screen.tokens + fallback.tokens + priced_tokens
    terms = (screen.money, fallback.money, proxy.money if not local else Decimal(0))
    paid = None if None in terms else sum((t for t in terms if t is not None), Decimal(0))
    return {
        "calls": calls / paid_calls if paid_calls else None,
        "tokens": oracle.tokens / paid_tokens if paid_tokens else None,
        "money": float(oracle.money / paid) if paid and oracle.money is not None else None,
        "currency": oracle.currency,
        "oracle_tokens": oracle.tokens,
        "proxy_tokens_priced": priced_tokens,
        "screen_tokens": screen.tokens,
        "fallback_tokens": fallback.tokens,
        "terms": [
            oracle.to_dict("oracle: the target explains every query"),
            proxy.to_dict("proxies: screening and explaining"),
            fallback.to_dict("fallback, instance screen and verification: the target's own part"),
            screen.to_dict("screen: the target's side of the pairs"),
        ],
        "text": _text(calls, local, elsewhere),
    }


def _as_if_bought(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row with what its stage's answers cost when they were bought, also where another run bought them."""
    if row["answers"] <= row["calls"]:
        return row
    prompt, completion = row["answer_prompt_tokens"], row["answer_completion_tokens"]
    return {
        **{name: value for name, value in row.items() if name not in ("recorded", "unpriced")},
        "calls": row["answers"],
        "tokens": prompt + completion,
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "cached_tokens": row["answer_cached_tokens"],
    }


def _oracle(result: Result, calls: int) -> StageCost:
    price = result.pricing.target
    tokens = round(calls * result.oracle_prompt_tokens)
    if not isinstance(price, Price):
        return StageCost(calls, tokens, None, None)
    rates = price.at(result.oracle_prompt_tokens) or price.rates
    one = bill_call(Call(result.oracle_prompt_tokens, 0, result.completion_tokens), rates)
    return StageCost(calls, tokens, calls * one.total, price.currency)


def _charges(quote: Any) -> bool:
    return isinstance(quote, Price) and any(part for part in (quote.rates.input, quote.rates.output))


def _at_target_price(proxy: StageCost, pricing: Pricing) -> int:
    """Proxy tokens in tokens of the target's price; where a price is not known, each counts as one of the target's."""
    target = pricing.target
    if proxy.money is None or not isinstance(target, Price) or not target.rates.input:
        return proxy.tokens
    return round(proxy.money / target.rates.input * 1_000_000)


def _text(calls: int, local: bool, elsewhere: int) -> str:
    where = (
        "Proxies ran on this machine and are counted as free."
        if local
        else "Proxies count at their price; one without a price as if its tokens cost what the target's do."
    )
    text = (
        f"Oracle: {calls} target calls for explanations with the same number of coalitions as the proxy's, at the mean"
        f" length of a prompt with half of its demonstrations. The ratio in calls is of target calls. {where} Screening is"
        " paid once per task and shared by every later explanation."
    )
    if elsewhere:
        text += (
            f" {elsewhere} of the target calls counted here were recorded by other runs and cost nothing now; they count at"
            " what they took then."
        )
    return text
