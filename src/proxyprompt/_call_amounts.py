"""What a call of a model takes, in tokens and money: at most before it leaves, probably when planned, in fact when back."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from dataclasses import replace
from decimal import ROUND_CEILING, Decimal

from ._purchase import Terms
from ._token_bounds import likely_tokens, most_completion, most_tokens, n_bytes
from .backends.base import Backend, GenerateRequest, Planner, ScoreRequest, Usage
from .errors import InputError
from .ledger import PICO, Limits
from .money import call_bound, call_cost
from .prices import Price

__all__ = ["CallAmounts"]


class CallAmounts:
    """Tokens, and money in units of :data:`PICO`, of the calls of one backend; learns from what comes back.

    Parameters
    ----------
    backend : Scorer or Generator
    limits : Limits or None
        Of the run; with one on money a price in its currency is needed.
    price : Price or None
    """

    def __init__(self, backend: Backend, limits: Limits | None, price: Price | None) -> None:
        self._backend = backend
        self._limits = limits if limits is not None and limits.any else None
        self._plans = isinstance(backend, Planner)
        self._lock = threading.Lock()
        self._bytes = self._prompt_tokens = 0
        self._excess = Decimal(1)
        self.price = price
        if limits is not None and limits.max_money is not None:
            self._require_price(limits.currency)

    def _require_price(self, currency: str) -> None:
        price, name = self.price, self._backend.name
        if price is None:
            raise InputError(
                f"max_money is set, and {name} has no price; a limit on money cannot be kept without one.",
                hint="Give the price ([price] input_per_million and output_per_million), or limit calls or tokens.",
            )
        call_bound(1, 1, price)  # refuses a price without completion tokens
        if price.currency != currency:
            if not call_bound(1, 1, price):
                self.price = replace(price, currency=currency)  # nothing is nothing in any currency
                return
            raise InputError(
                f"max_money is in {currency}, but the price of {name} is in {price.currency}.",
                hint="Give the limit in the currency of the price.",
            )

    @property
    def in_batch(self) -> bool:
        """Whether calls are billed as batches."""
        return bool(getattr(self._backend, "batch", False))

    @property
    def currency(self) -> str:
        """Of the price; empty without one."""
        return self.price.currency if self.price is not None else ""

    @property
    def _limited(self) -> bool:
        """Whether tokens or money are bounded, so that each call's must be known before it leaves."""
        return self._limits is not None and (self._limits.max_tokens, self._limits.max_money) != (None, None)

    def terms(self) -> Terms:
        """How the calls of a purchase are bounded and priced."""
        # A local model's tokenizer is not asked about every prompt for the sake of a price of nothing.
        if not self._limited and (self.price is None or not self._amount(1, 1)):
            return Terms(self._limits)
        return Terms(self._limits, self._most, self.cost)

    def planned(
        self, requests: Sequence[ScoreRequest | GenerateRequest]
    ) -> tuple[list[int] | None, list[int] | None]:
        """Tokens and money that each request will probably take; ``None`` where neither is bounded."""
        if not self._limited:
            return None, None
        likely = [self._likely(request) for request in requests]
        return [sum(pair) for pair in likely], [self._amount(*pair) for pair in likely]

    def cost(self, usage: Usage) -> int | None:
        """What a call has cost; ``None`` where that is not known."""
        if self.price is None:
            return None
        cost = call_cost(usage, self.price, batch=self.in_batch)
        return None if cost is None else _picos(cost)

    def learn(self, request: ScoreRequest | GenerateRequest, usage: Usage) -> None:
        """Keep in mind how many tokens a byte makes, and whether a bound was too low."""
        if self._plans or not usage.prompt_tokens:
            return
        most = most_tokens(request.prompt)
        with self._lock:
            self._bytes += n_bytes(request.prompt)
            self._prompt_tokens += usage.prompt_tokens
            if usage.prompt_tokens <= most * self._excess:
                return
            self._excess = Decimal(usage.prompt_tokens) / most
        if not self._limited:
            return
        warnings.warn(
            f"{self._backend.name} counts {usage.prompt_tokens} tokens for a prompt of at most {most} by its bytes; from"
            " now on more is set aside for each call.",
            RuntimeWarning,
            stacklevel=2,
        )

    def _likely(self, request: ScoreRequest | GenerateRequest) -> tuple[int, int]:
        """Prompt and completion tokens that a call will probably take."""
        with self._lock:
            per_byte = self._prompt_tokens / self._bytes if self._bytes and self._prompt_tokens else None
        prompt = likely_tokens(request.prompt, self._backend, per_byte)
        if isinstance(request, GenerateRequest):
            return prompt, request.max_tokens
        return prompt, max((likely_tokens(candidate) for candidate in request.candidates), default=0)

    def _most(self, request: ScoreRequest | GenerateRequest) -> tuple[int, int]:
        """Tokens and money that a call may take at most."""
        prompt = int(
            (most_tokens(request.prompt, self._backend) * self._excess).to_integral_value(ROUND_CEILING)
        )
        completion = most_completion(request, self._backend)
        return prompt + completion, self._amount(prompt, completion)

    def _amount(self, prompt_tokens: int, completion_tokens: int) -> int:
        price = self.price
        if price is None:
            return 0
        if price.rates.output is None:
            # Without a limit on money this is for information, and what is not known is left out.
            completion_tokens, price = 0, replace(price, rates=replace(price.rates, output=Decimal(0)))
        return _picos(call_bound(prompt_tokens, completion_tokens, price, batch=self.in_batch))


def _picos(amount: Decimal) -> int:
    return min(int((amount * PICO).to_integral_value(ROUND_CEILING)), _MOST_MONEY)


_MOST_MONEY = 10**6 * PICO
"""For one call: no limit is as high (see ``Limits``), and SQLite has room for it."""
