"""Rows of the ledger: what goes in, what comes out, and the hash that tells a damaged one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, Literal, TypeAlias

from ._ledger_calls import TAKEN_OVER
from .backends.base import Usage
from .errors import InputError

__all__ = [
    "PICO",
    "Answer",
    "CallRole",
    "Claim",
    "Failure",
    "Leaving",
    "Limits",
    "RunSummary",
    "StoredResponse",
    "Totals",
]

CallRole: TypeAlias = Literal["target", "proxy"]

PICO = 10**12
"""Money is stored in whole millionths of millionths: a token at $0.000001 per million still counts exactly."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run may spend, over all processes and resumptions that share the ledger.

    Parameters
    ----------
    max_calls : int, optional
        Calls of the target: done, under way, of unknown outcome, or failed after they were billed.
    max_tokens : int, optional
        Prompt plus completion tokens of the target: as reported for finished calls, as set aside for the others.
    max_money : Decimal or number, optional
        Money for target and proxies together, in ``currency``: the price of finished calls, and what is set
        aside for the others.
    currency : str
    """

    max_calls: int | None = None
    max_tokens: int | None = None
    max_money: Decimal | float | None = None
    currency: str = "USD"

    def __post_init__(self) -> None:
        for name in ("max_calls", "max_tokens"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise InputError(
                    f"{name}={value!r} must be a whole number of at least 0, or None.",
                    hint="Leave it out for no limit.",
                )
        money = self.max_money
        if money is None:
            return
        ok = isinstance(money, int | float | Decimal) and not isinstance(money, bool)
        if not ok or not (math.isfinite(money) and 0 <= money < 1_000_000):
            raise InputError(
                f"max_money={money!r} must be an amount from 0 to below a million, or None.",
                hint="Leave it out for no limit.",
            )
        # Through the shortest text, so that 0.1 is a tenth and not the binary number next to it.
        object.__setattr__(self, "max_money", Decimal(str(money)))

    @property
    def picos(self) -> int | None:
        """``max_money`` as stored amounts are counted, rounded down."""
        return None if self.max_money is None else int(self.max_money * PICO)

    @property
    def any(self) -> bool:
        """Whether anything is limited."""
        return (self.max_calls, self.max_tokens, self.max_money) != (None, None, None)


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A verified row; ``request`` is the canonical request text if it was kept, else ``None``."""

    key: str
    body: str
    usage: Usage
    model_returned: str | None
    created_at: float
    request: str | None


@dataclass(frozen=True, slots=True)
class Answer:
    """A successful call to be recorded; ``request`` is stored only if given.

    ``cost`` is its price in units of :data:`PICO`; ``None`` where that is not known, then what was set aside counts.
    ``extra``: further attempts that went into this answer (samples of the same request); ``usage`` and ``cost`` are the
    sum over all.
    """

    attempt: int
    key: str
    body: str
    usage: Usage = field(default_factory=Usage)
    model_returned: str | None = None
    request: str | None = None
    cost: int | None = None
    extra: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Failure:
    """A call that brought no answer; it will be asked again.

    ``uncertain``: it may have been billed all the same, so it becomes ``unknown`` and counts as spent.
    ``cost`` is the price of the tokens that it reports, in units of :data:`PICO`.
    """

    attempt: int
    error: str
    usage: Usage = field(default_factory=Usage)
    cost: int = 0
    uncertain: bool = False


@dataclass(frozen=True, slots=True)
class Leaving:
    """Reserved calls that leave next, and the most that each may take.

    ``ahead``: they do not leave at once. After the death of the process they count as never sent, after that of the machine
    as calls of unknown outcome.
    """

    ids: Sequence[int]
    tokens: Sequence[int] | None = None
    money: Sequence[int] | None = None
    limits: Limits | None = None
    ahead: bool = False


@dataclass(frozen=True, slots=True)
class Claim:
    """Outcome of :meth:`Ledger.claim`: attempts entered, by position of the key, and positions held by others."""

    attempts: Mapping[int, int]
    held: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Totals:
    """Calls by outcome, tokens and money; ``open`` are reserved or sent by a process that is still at work.

    ``taken_over``: found under way at the provider by a later process, and counted by that one. ``money`` by currency: the
    price of finished calls, and what is set aside for sent and unknown ones. ``by_currency``, of
    each model: ``""`` are calls that were recorded without a price.
    """

    done: int = 0
    failed: int = 0
    unknown: int = 0
    open: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    by_model: Mapping[str, Totals] = field(default_factory=dict)
    money: Mapping[str, Decimal] = field(default_factory=dict)
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0
    by_currency: Mapping[str, Totals] = field(default_factory=dict)
    taken_over: int = 0


@dataclass(frozen=True, slots=True)
class RunSummary:
    """One run: when it first and last touched the ledger (seconds since 1970) and what it did."""

    run: str
    started_at: float
    last_at: float
    totals: Totals


def as_bytes(text: str | None) -> bytes | None:
    """UTF-8 in which any Python text has a place."""
    return None if text is None else text.encode("utf-8", "surrogatepass")


def as_text(stored: bytes | None) -> str | None:
    """The text again."""
    return None if stored is None else stored.decode("utf-8", "surrogatepass")


def counts(usage: Usage) -> tuple[int, int, int, int, int]:
    """Tokens in the order of the columns."""
    return (
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.cached_tokens,
        usage.cache_write_tokens,
        usage.reasoning_tokens,
    )


def split(usage: Usage, cost: int | None, n: int) -> list[tuple[Usage, int | None]]:
    """Usage and cost of ``n`` calls that are known as a sum only: equal shares, the first takes the remainder."""
    share = Usage(*(part // n for part in counts(usage)))
    first = Usage(*(part - (n - 1) * (part // n) for part in counts(usage)))
    if cost is None:
        return [(first, None), *[(share, None)] * (n - 1)]
    return [(first, cost - (n - 1) * (cost // n)), *[(share, cost // n)] * (n - 1)]


def printable(error: str) -> str:
    """Error texts may quote a broken answer; SQLite refuses the lone surrogates in it."""
    return error.encode("utf-8", "backslashreplace").decode()[:2000]


def row_hash(row: Sequence[Any]) -> bytes:
    """Hash of all columns but the hash; lengths first, so that no byte can wander between columns."""
    key, body, prompt, completion, cached, model, _, schema, created, request, *later = row
    lengths = [-1 if part is None else len(part) for part in (key, body, model, request)]
    # Rows of the first schema were hashed without the columns that came later, which are 0 in them.
    more = "" if schema == 1 and later == [0, 0] else f"{later} "
    numbers = f"{schema!r} {prompt!r} {completion!r} {cached!r} {created!r} {lengths}{more}|"
    digest = hashlib.sha256(numbers.encode())
    for part in (key, body, model, request):
        digest.update(part or b"")
    return digest.digest()


def intact(row: Sequence[Any]) -> bool:
    """Whether a row matches its own hash."""
    try:
        return bool(row_hash(row) == row[6])
    except (TypeError, ValueError):  # a flipped bit can change the type of a column
        return False


def sum_models(rows: Sequence[Sequence[Any]]) -> Totals:
    """Totals of rows (model, state, count, five sums of tokens, currency, money), over all and of each model."""
    by_model = {}
    for model in dict.fromkeys(row[0] for row in rows):
        own = [row[1:] for row in rows if row[0] == model]
        currencies = dict.fromkeys(row[-2] for row in own)
        parts = {one: _sum_states([row for row in own if row[-2] == one]) for one in currencies}
        by_model[model] = replace(_sum_states(own), by_currency=parts)
    return replace(_sum_states([row[1:] for row in rows]), by_model=by_model)


def _sum_states(rows: Sequence[Sequence[Any]]) -> Totals:
    states: dict[str, int] = {}
    money: dict[str, Decimal] = {}
    for state, count, *_, currency, amount in rows:
        states[state] = states.get(state, 0) + count
        if amount:
            money[currency] = money.get(currency, Decimal(0)) + Decimal(amount) / PICO
    tokens = [sum(row[column] for row in rows) for column in range(2, 7)]
    still_open = states.get("reserved", 0) + states.get("sent", 0)
    return Totals(
        done=states.get("done", 0),
        failed=states.get("failed", 0),
        unknown=states.get("unknown", 0),
        open=still_open,
        prompt_tokens=tokens[0],
        completion_tokens=tokens[1],
        cached_tokens=tokens[2],
        cache_write_tokens=tokens[3],
        reasoning_tokens=tokens[4],
        money=money,
        taken_over=states.get(TAKEN_OVER, 0),
    )
