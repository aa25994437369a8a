"""How fast to send: calls in flight, and calls and tokens a minute; no clock of its own, no network.

Calls in flight follow the server: a refusal for load cuts them once per episode, a clean round lets them grow again.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from ._openai_faults import Allowance

_START = 4
_CUT = 0.7
_LONGEST_HOLD = 60.0


class Pace:
    """Says how many calls may be in flight and when the next one may leave; safe for several threads.

    Parameters
    ----------
    most : int
        Upper bound of calls in flight; the limit starts at 4 or there.
    rpm, tpm : float, optional
        Requests and tokens a minute. Calls are spread evenly, without bursts, so that no window of a minute has more.
    clock : callable
        Seconds, monotonic.

    Notes
    -----
    The limit falls to 70 % when the server says that it is overloaded (429, 500, 502, 503, 529); calls that were sent
    before the last cut do not cut again. It grows by one with every success before the first cut, which doubles it each
    round, and after that when as many calls as the limit have succeeded in a row.
    """

    def __init__(
        self,
        most: int,
        *,
        rpm: float | None = None,
        tpm: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most = most
        self._limit = float(min(_START, most))
        self._clean = 0
        self._cut_at = -math.inf
        self._per_request = 60 / rpm if rpm else 0.0
        self._per_token = 60 / tpm if tpm else 0.0
        self._next_request = self._next_token = self._held_until = -math.inf
        self._left: int | None = None
        self._left_until = -math.inf
        self._clock = clock
        self._lock = threading.Lock()

    @property
    def limit(self) -> int:
        """Calls that may be in flight now."""
        with self._lock:
            limit = max(1, int(self._limit))
            if self._left is not None and self._clock() < self._left_until:
                limit = min(limit, max(1, self._left))
            return limit

    def delay(self) -> float:
        """Seconds until the next call may leave; 0 for now."""
        with self._lock:
            due = max(self._next_request, self._next_token, self._held_until)
            return max(0.0, due - self._clock())

    def take(self, tokens: int) -> float:
        """Note that a call of about ``tokens`` tokens leaves; gives the time of its leaving."""
        with self._lock:
            now = self._clock()
            self._next_request = max(now, self._next_request) + self._per_request
            self._next_token = max(now, self._next_token) + tokens * self._per_token
            if self._left is not None:
                self._left = max(0, self._left - 1)
            return now

    def correct(self, tokens: int) -> None:
        """A call took so many tokens more (or, negative, fewer) than :meth:`take` was told."""
        with self._lock:
            self._next_token += tokens * self._per_token

    def succeeded(self, allowance: Allowance) -> None:
        """A call was answered; ``allowance`` is what the server says is left."""
        with self._lock:
            self._clean += 1
            never_refused = self._cut_at == -math.inf
            if never_refused or self._clean >= int(self._limit):
                self._clean = 0
                self._limit = min(self._limit + 1, float(self._most))
            now = self._clock()
            self._left, self._left_until = allowance.requests, now + (allowance.requests_reset or 0.0)
            refilled = allowance.until_refilled
            if refilled is not None:
                self._held_until = max(self._held_until, now + min(refilled, _LONGEST_HOLD))

    def overloaded(self, sent_at: float, pause: float | None) -> None:
        """A call sent at ``sent_at`` was refused for load; nothing leaves for ``pause`` seconds."""
        with self._lock:
            now = self._clock()
            self._clean = 0
            if sent_at >= self._cut_at:
                self._limit = max(1.0, self._limit * _CUT)
                self._cut_at = now
            if pause:
                self._held_until = max(self._held_until, now + min(pause, _LONGEST_HOLD))
