"""What a call costs, and what a run cost: bills, term by term.

Arithmetic in :class:`~decimal.Decimal`, so that fractions of a cent add up exactly: a term is tokens times
rate, a bill the sum of its terms, and nothing is rounded before it is shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from typing import Any

from ._provider_caching import CachingRule
from .backends.base import Rendered, Usage
from .errors import InputError
from .prices import Price, Quote, Rates, Unpriced

__all__ = [
    "Bill",
    "Call",
    "RunCost",
    "Term",
    "bill_call",
    "bill_run",
    "break_even_calls",
    "call_bound",
    "call_cost",
    "stable_tokens",
]

_MILLION = Decimal(1_000_000)


@dataclass(frozen=True, slots=True)
class Call:
    """Tokens of an average production call.

    Attributes
    ----------
    prompt_tokens : float
    stable_tokens : int
        Those at its beginning that every call has alike: instruction and demonstrations up to the query.
    completion_tokens : float
    """

    prompt_tokens: float
    stable_tokens: int = 0
    completion_tokens: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.stable_tokens <= self.prompt_tokens or not 0 <= self.completion_tokens < math.inf:
            raise InputError(
                f"{self}: tokens are at least 0, and the stable ones no more than the prompt's.",
                hint="Count the whole prompt in prompt_tokens.",
            )


@dataclass(frozen=True, slots=True)
class Term:
    """``tokens`` at ``rate`` money per million."""

    name: str
    tokens: Decimal
    rate: Decimal

    @property
    def cost(self) -> Decimal:
        """Money."""
        return self.tokens * self.rate / _MILLION


@dataclass(frozen=True, slots=True)
class Bill:
    """A sum of terms, and of ``recorded`` money that stands in the ledger."""

    terms: tuple[Term, ...]
    recorded: Decimal = Decimal(0)

    @property
    def total(self) -> Decimal:
        """Money."""
        return sum((term.cost for term in self.terms), self.recorded)


@dataclass(frozen=True, slots=True)
class RunCost:
    """What a run bought, by stage and model, and what of it has no price.

    Attributes
    ----------
    bills : tuple of (str, str, str, Bill)
        Stage, role, model and bill.
    gaps : tuple of str
        Sentences on what the total leaves out.
    notes : tuple of str
        Sentences on which prices it is at.
    """

    bills: tuple[tuple[str, str, str, Bill], ...] = ()
    gaps: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> Decimal:
        """Money."""
        return sum((bill.total for *_, bill in self.bills), Decimal(0))


def stable_tokens(prompts: Sequence[Rendered], prompt_tokens: float) -> int:
    """Tokens at the beginning of the prompts that all of them share.

    Parameters
    ----------
    prompts : sequence of str or of tuple of Message
        The same prompt rendered for many queries.
    prompt_tokens : float
        Their mean length as the target counts it.

    Returns
    -------
    int
        The mean length times the shared share of the bytes, rounded down. An estimate: only the target knows
        its tokens, and it tells their number for whole prompts alone. It is off by the difference between the
        query's and the demonstrations' bytes per token, times the query's tokens.

    Examples
    --------
    >>> stable_tokens(["Pick a team.\\n\\nQ: where", "Pick a team.\\n\\nQ: broken"], 8)
    6
    """
    if not prompts or prompt_tokens <= 0:
        return 0
    texts = [prompt if isinstance(prompt, str) else _flat(prompt) for prompt in prompts]
    first, last = min(texts), max(texts)  # what these two share, all share
    end = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    shared = len(first[:end].encode("utf-8", "surrogatepass"))
    mean = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts) / len(texts)
    return int(prompt_tokens * shared / mean) if mean else 0


def bill_call(call: Call, rates: Rates, *, rule: CachingRule | None = None, hit_rate: float = 1.0) -> Bill:
    """The expected bill of one call.

    Parameters
    ----------
    call : Call
    rates : Rates
    rule : CachingRule, optional
        Without one nothing is cached.
    hit_rate : float
        Share of calls that find their stable beginning in the cache; the others write it.

    Examples
    --------
    >>> rates = Rates(Decimal(3), Decimal(15), Decimal("0.3"), Decimal("3.75"))
    >>> rule = CachingRule("Claude", 1024)
    >>> [str(bill_call(Call(2100, 2000, 10), rates, rule=rule, hit_rate=h).total) for h in (1, 0)]
    ['0.00105', '0.00795']
    """
    prompt, held = Decimal(str(call.prompt_tokens)), Decimal(0)
    if rule is not None and rates.cached_input is not None:
        held = Decimal(rule.cached_tokens(call.stable_tokens))
    read = held * Decimal(str(hit_rate))
    written = held - read if rates.cache_write is not None else Decimal(0)
    terms = [Term("input", prompt - read - written, rates.input)]
    if rates.cached_input is not None:
        terms.append(Term("cached input", read, rates.cached_input))
    if rates.cache_write is not None:
        terms.append(Term("cache write", written, rates.cache_write))
    if rates.output is not None:
        terms.append(Term("output", Decimal(str(call.completion_tokens)), rates.output))
    return Bill(tuple(term for term in terms if term.tokens))


def bill_run(rows: Sequence[Mapping[str, Any]], target: Quote, proxies: Mapping[str, Quote]) -> RunCost:
    """Price what the ledger says a run has bought.

    Parameters
    ----------
    rows : sequence of mapping
        Per stage and model: ``stage``, ``role``, ``model``, ``calls``, ``prompt_tokens``,
        ``completion_tokens``, ``cached_tokens``, ``unknown`` (calls whose outcome is not known). ``recorded``, where the
        ledger priced the calls when they were made: by currency ``calls``, ``unknown`` and ``money``; ``unpriced``: the
        same counts as the row's, of the other calls, or None.
    target : Price or Unpriced
    proxies : mapping of str to (Price or Unpriced)
        By model.

    Notes
    -----
    Recorded money is taken as it stands in the ledger, so that the two agree; calls of unknown outcome count at what was
    set aside. ``target`` and ``proxies`` price only what was recorded without a price. As prices may have changed in
    between, ``notes`` say which were taken.
    """
    bills: list[tuple[str, str, str, Bill]] = []
    gaps: dict[str, None] = {}
    counted: dict[str, list[int]] = {}
    currency = target.currency if isinstance(target, Price) else "USD"
    for row in rows:
        model = row["model"]
        quote = target if row["role"] == "target" else proxies[model]
        paid, recorded = _recorded(row, quote, currency, gaps)
        rest = row.get("unpriced") if recorded else row
        terms = None if rest is None else _terms(model, rest, quote, currency, gaps)
        if paid is None and terms is None:
            continue
        bills.append((row["stage"], row["role"], model, Bill(terms or (), paid or Decimal(0))))
        counts = counted.setdefault(model, [0, 0, 0])
        if paid:
            counts[0] += recorded[currency]["calls"]
            counts[1] += recorded[currency]["unknown"]
        if recorded and terms and isinstance(quote, Price) and any(term.rate for term in terms):
            counts[2] += rest["calls"] if rest is not None else 0
    quotes = {row["model"]: target if row["role"] == "target" else proxies[row["model"]] for row in rows}
    return RunCost(tuple(bills), tuple(gaps), tuple(_sources(counted, quotes)))


def _recorded(
    row: Mapping[str, Any], quote: Quote, currency: str, gaps: dict[str, None]
) -> tuple[Decimal | None, Mapping[str, Any]]:
    """Money that the ledger recorded in the run's currency, and all that it recorded."""
    recorded: Mapping[str, Any] = row.get("recorded") or {}
    for other, part in recorded.items():
        if other != currency and Decimal(part["money"]):
            gaps[f"What {row['model']} cost is in {other} and not in the run's cost."] = None
    if currency not in recorded:
        return None, recorded
    if isinstance(quote, Price) and quote.rates.output is None and row["completion_tokens"]:
        gaps[f"Completion tokens of {row['model']} are not in the run's cost: no output price is given."] = (
            None
        )
    return Decimal(recorded[currency]["money"]), recorded


def _terms(
    model: str, row: Mapping[str, Any], quote: Quote, currency: str, gaps: dict[str, None]
) -> tuple[Term, ...] | None:
    """Tokens at the rates of today; None where there are none, or no price for them."""
    prompt, completion = row["prompt_tokens"], row["completion_tokens"]
    if row["unknown"]:
        gaps[
            f"The outcome of {row['unknown']} calls to {model} is unknown; if they were billed, more was paid."
        ] = None
    if not prompt and not completion:
        return None
    if isinstance(quote, Unpriced):
        gaps[f"What {model} cost is not in the run's cost: {quote.reason}."] = None
        return None
    rates = quote.at(prompt / max(row["calls"], 1)) or quote.rates
    if quote.currency != currency and any(part for part in (rates.input, rates.output)):
        gaps[f"What {model} cost is in {quote.currency} and not in the run's cost."] = None
        return None
    if rates.output is None and completion:
        gaps[f"Completion tokens of {model} are not in the run's cost: no output price is given."] = None
    if rates.cache_write is not None and rates.cache_write > rates.input:
        gaps[f"What {model} charges beyond the input price for writing its cache is not recorded."] = None
    cached = row["cached_tokens"] if rates.cached_input is not None else 0
    terms = [Term("input", Decimal(prompt - cached), rates.input)]
    if rates.cached_input is not None:
        terms.append(Term("cached input", Decimal(cached), rates.cached_input))
    if rates.output is not None:
        terms.append(Term("output", Decimal(completion), rates.output))
    return tuple(term for term in terms if term.tokens)


def _sources(counted: Mapping[str, Sequence[int]], quotes: Mapping[str, Quote]) -> Iterator[str]:
    """Which prices the money of each model is at."""
    for model, (recorded, unknown, later) in counted.items():
        if recorded:
            yield (
                f"The cost of {recorded} calls to {model} is what the ledger recorded when they were made, at the price of"
                " that time."
            )
        if unknown:
            yield (
                f"The outcome of {unknown} of these calls to {model} is unknown; they count as spent, at the most that was"
                " set aside."
            )
        quote = quotes[model]
        if later and isinstance(quote, Price):
            when = f" of {quote.date}" if quote.date else ""
            yield (
                f"{later} calls to {model} were recorded without a price; they are counted at the price{when} that is"
                f" known now ({quote.source})."
            )


def call_cost(usage: Usage, price: Price, *, batch: bool = False) -> Decimal | None:
    """What one call costs, as far as a limit on money is concerned: never less than the bill.

    Parameters
    ----------
    usage : Usage
    price : Price
    batch : bool

    Returns
    -------
    Decimal or None
        ``None`` where the usage or a price that it needs is not known.

    Notes
    -----
    Where writing to the cache costs more than reading the prompt anew and the usage names no token as written, all that
    were not read from the cache are taken to be: not every server says.
    """
    rates = price.at(usage.prompt_tokens, batch=batch) or price.at(usage.prompt_tokens)
    assert rates is not None
    if not (usage.prompt_tokens or usage.completion_tokens):
        return Decimal(0) if _free(rates) else None
    if usage.completion_tokens and rates.output is None:
        return None
    cached = min(usage.cached_tokens, usage.prompt_tokens) if rates.cached_input is not None else 0
    rest, write = usage.prompt_tokens - cached, max(rates.input, rates.cache_write or rates.input)
    written = min(usage.cache_write_tokens, rest) or rest
    total = written * write + (rest - written) * rates.input + cached * (rates.cached_input or 0)
    return (total + usage.completion_tokens * (rates.output or 0)) / _MILLION


def call_bound(prompt_tokens: int, completion_tokens: int, price: Price, *, batch: bool = False) -> Decimal:
    """The most that a call of at most so many tokens can cost: at the dearest of the price's tiers.

    Raises
    ------
    InputError
        If the price says nothing of completion tokens.
    """
    bounds = []
    for tokens in (0, *(start + 1 for start, *_ in price.tiers)):
        if tokens and tokens > prompt_tokens:
            continue
        rates = price.at(tokens, batch=batch) or price.at(tokens)
        assert rates is not None
        if rates.output is None:
            raise InputError(
                f"The price of {price.name or 'the model'} ({price.source}) says nothing of completion tokens; money"
                " cannot be limited with it.",
                hint="Give price_output_per_million ([price] output_per_million).",
            )
        dearest = max(rates.input, rates.cache_write or rates.input)
        bounds.append((prompt_tokens * dearest + completion_tokens * rates.output) / _MILLION)
    return max(bounds)


def _free(rates: Rates) -> bool:
    return not any((rates.input, rates.output, rates.cached_input, rates.cache_write))


def break_even_calls(run_cost: Decimal, saved: Decimal) -> float:
    """Calls after which savings cover the run: a whole number, or infinity where nothing is saved.

    Examples
    --------
    >>> [break_even_calls(Decimal("0.5"), Decimal(s)) for s in ("0.2", "0", "-1")]
    [3, inf, inf]
    """
    if saved <= 0:
        return math.inf
    return int((run_cost / saved).to_integral_value(ROUND_CEILING))


def _flat(turns: Sequence[Any]) -> str:
    return "".join(f"{turn.role}\n{turn.name or ''}{turn.content}\n" for turn in turns)
