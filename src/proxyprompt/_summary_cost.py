"""The bill's part of the summary: what was bought at each stage, what the cut saves, when it has paid."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from math import isinf
from typing import Any

from ._cost_reduction import cost_reduction
from ._provider_caching import CachingRule, caching_rule
from .money import Call, bill_run, break_even_calls, stable_tokens
from .pipeline import Result
from .prices import Unpriced
from .savings import Savings, compare_bills

__all__ = ["cost_of"]


def cost_of(result: Result) -> dict[str, Any]:
    """Stages with their calls and tokens, tokens and money saved by each call, calls until that has paid."""
    spent = result.spent
    target_tokens = sum(r["tokens"] for r in spent if r["role"] == "target")
    proxy_tokens = sum(r["tokens"] for r in spent if r["role"] == "proxy")
    c = result.certificate
    before, after = c.full.tokens, (c.shipped or c.full).tokens
    known = before > 0 and after > 0
    saved = before - after if known else None
    savings = _savings(result, before, after) if known else None
    pays = break_even_calls(Decimal(target_tokens), Decimal(str(saved or 0)))
    if savings is not None:
        pays = savings.assumed.break_even_calls
    quote = result.pricing.target
    return {
        "stages": [
            {
                "name": r["stage"],
                "role": r["role"],
                "calls_bought": r["bought_now"],
                "calls_reused": max(0, r["calls"] - r["bought_now"]),
                "tokens_bought": r["tokens_now"],
                "tokens_reused": max(0, r["tokens"] - r["tokens_now"]),
                "seconds": None,
            }
            for r in spent
        ],
        "target_tokens_total": target_tokens,
        "proxy_tokens_total": proxy_tokens,
        "saved_tokens_per_call": round(saved) if saved is not None else None,
        "saved_share": saved / before if saved is not None else None,
        "break_even_calls": None if isinf(pays) else int(pays),
        "money": savings.to_dict() if savings is not None else None,
        "unpriced": f"{quote.reason}. {quote.hint}".strip() if isinstance(quote, Unpriced) else None,
        "crr": cost_reduction(result),
    }


def _savings(result: Result, before: float, after: float) -> Savings | None:
    """The money side of the cut; ``None`` if the target has no price."""
    price, settings = result.pricing.target, result.settings
    if isinstance(price, Unpriced):
        return None
    queries = result.splits["sealed"]
    calls = [
        Call(n, stable_tokens([prompt.render(None, query) for query in queries], n), result.completion_tokens)
        for prompt, n in ((result.original, before), (result.prompt, after))
    ]
    rule = caching_rule(price.provider, price.model)
    if settings.cache_minimum_tokens is not None:
        given = CachingRule(
            "the provider",
            settings.cache_minimum_tokens,
            settings.cache_increment_tokens or 1,
            source="given by the user",
        )
        rule = given if rule is None else replace(given, lifetime=rule.lifetime, request=rule.request)
    return compare_bills(
        calls[0],
        calls[1],
        price,
        bill_run(result.spent, price, result.pricing.proxies),
        rule=rule,
        hit_rate=settings.cache_hit_rate,
        calls_per_hour=settings.calls_per_hour,
    )
