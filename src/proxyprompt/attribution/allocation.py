"""How many coalitions the target should be asked for: for a wanted standard error, within calls or money."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf, sqrt
from typing import Any, Literal

import numpy as np

from proxyprompt.errors import InputError

from .base import Attribution
from .calibrated import CalibratedAttribution

__all__ = ["Allocation", "allocate"]


@dataclass(frozen=True)
class Allocation:
    """What to buy of the target.

    Attributes
    ----------
    n_target : int
        Coalitions a query, those bought already included.
    calls : int
        Calls that this takes beyond those bought already.
    standard_error : float
        Expected median over units of ``se_coalitions`` with them.
    limited_by : {"nothing", "calls", "money", "design"}
        What kept it from the wanted error: ``"design"``: even the proxies' own coalitions are too few.
    """

    n_target: int
    calls: int
    standard_error: float
    limited_by: Literal["nothing", "calls", "money", "design"]

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form."""
        return {
            "n_target": self.n_target,
            "calls": self.calls,
            "standard_error": self.standard_error,
            "limited_by": self.limited_by,
        }


def allocate(
    found: CalibratedAttribution | Attribution,
    *,
    n_queries: int,
    largest: int,
    standard_error: float | None = None,
    calls: int | None = None,
    money: float | None = None,
    call_price: float | None = None,
) -> Allocation:
    """Decide how many target coalitions to buy, from what a first fit showed.

    Parameters
    ----------
    found : CalibratedAttribution or Attribution
        The first fit, with or without proxies.
    n_queries : int
        Queries it is about; each coalition is one call for each of them.
    largest : int
        Coalitions there are to ask: the proxies' design, which begins with the target's.
    standard_error : float, optional
        Wanted median coalition error of the mean attributions. Without it the limits are spent.
    calls : int, optional
        Most further calls.
    money : float, optional
        Most that further calls may cost; needs ``call_price``, the cost of one.

    Returns
    -------
    Allocation

    Raises
    ------
    InputError
        When neither an error nor a limit is given, or a number is out of range.

    Notes
    -----
    The error of ``n`` coalitions is ``sqrt(own^2 n0 / n + rest^2)``, from the ``n0`` bought so far: ``own`` is what
    sampling the target's coalitions adds, ``rest`` what the proxies' own design leaves (0 without proxies).

    Examples
    --------
    >>> from proxyprompt.attribution import WeightedBanzhaf
    >>> from proxyprompt.testing import UnanimityGame
    >>> game = UnanimityGame(10, [((0, 1), 1.0), ((2, 3), -1.0)])
    >>> first = WeightedBanzhaf(0.5).attribute(game, 10, budget=60, rng=np.random.default_rng(0))
    >>> half = float(np.median(first.se_coalitions)) / 2
    >>> allocate(first, n_queries=1, largest=400, standard_error=half)
    Allocation(n_target=240, calls=180, standard_error=..., limited_by='nothing')
    """
    _check(n_queries, largest, standard_error, calls, money, call_price)
    if isinstance(found, CalibratedAttribution):
        bought, settings = found.n_target, found.attribution.settings
        own, rest = (float(np.median(settings[k])) for k in ("se_target", "se_proxy"))
    else:
        bought, own, rest = found.n_coalitions, float(np.median(found.se_coalitions)), 0.0

    def expected(n: int) -> float:
        return sqrt(own**2 * bought / n + rest**2)

    limits: dict[Literal["calls", "money", "design"], float] = {"design": largest}
    if calls is not None:
        limits["calls"] = bought + calls // n_queries
    if money is not None and call_price:
        limits["money"] = bought + int(money / call_price / n_queries + 1e-9)
    tightest = min(limits, key=lambda name: limits[name])
    most = max(int(min(limits[tightest], largest)), bought)
    wanted: float = inf
    if standard_error is not None:
        room = standard_error**2 - rest**2
        wanted = inf if room <= 0 else max(bought, ceil(bought * own**2 / room - 1e-6))
    n = int(min(wanted, most))
    reached = standard_error is not None and expected(n) <= standard_error * (1 + 1e-6)
    return Allocation(n, (n - bought) * n_queries, expected(n), "nothing" if reached else tightest)


def _check(
    n_queries: int,
    largest: int,
    standard_error: float | None,
    calls: int | None,
    money: float | None,
    call_price: float | None,
) -> None:
    if standard_error is None and calls is None and money is None:
        raise InputError(
            "allocate: neither a standard error nor a limit is given.",
            hint="Give standard_error, calls or money.",
        )
    if standard_error is not None and not standard_error > 0:
        raise InputError(f"standard_error={standard_error}: above 0 is needed.", hint="0.05 is usual.")
    if n_queries < 1 or largest < 2:
        raise InputError(
            f"n_queries={n_queries}, largest={largest}: at least 1 query and 2 coalitions.",
            hint="Pass what was explained.",
        )
    for name, value in (("calls", calls), ("money", money), ("call_price", call_price)):
        if value is not None and not value >= 0:
            raise InputError(f"{name}={value}: 0 or more.", hint="Leave it out for no limit.")
    if money is not None and call_price is None:
        raise InputError("money is given without call_price, the cost of one call.", hint="Give both.")
