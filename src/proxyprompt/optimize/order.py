"""The order of what is left: another order is another prompt, and sometimes a better one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from proxyprompt.value_function import Values

from ._harm import p_value

__all__ = ["EvaluateOrder", "OrderSearch", "candidate_orders", "try_orders"]

_SCOUTED = 0.25


class EvaluateOrder(Protocol):
    """Ask a model for the prompt that holds these units in this order."""

    def __call__(self, order: tuple[int, ...], queries: NDArray[np.int64] | None = None, /) -> Values:
        """Values of one prompt, shape (1, n_queries); ``queries``: indices into the split, ``None``: all."""
        ...


@dataclass(frozen=True)
class OrderSearch:
    """What was tried, and whether the best of it may be proposed.

    Attributes
    ----------
    scores : mapping of str to float
        Mean utility of each order where they were compared; ``"original"`` among them.
    orders : mapping of str to tuple of int
        Units in the order in which they stand in the prompt.
    scout : {"proxy", "target"}
        Who compared them.
    best : str
        The best of the comparison.
    gain, p_value : float
        Mean gain of the best over the original on the target's selection split, paired, and its one-sided p value, on
        queries that did not compare; 0 and 1 where the original was best.
    confirmed : bool
        Only then is the order proposed to the certificate.
    """

    scores: Mapping[str, float]
    orders: Mapping[str, tuple[int, ...]]
    scout: str
    best: str
    gain: float
    p_value: float
    confirmed: bool

    @property
    def order(self) -> tuple[int, ...] | None:
        """The confirmed order, if there is one."""
        return self.orders[self.best] if self.confirmed else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form; orders by index of the demonstration."""
        return {
            "scores": dict(self.scores),
            "orders": {name: list(order) for name, order in self.orders.items()},
            "scout": self.scout,
            "best": self.best,
            "gain": self.gain,
            "p_value": self.p_value,
            "confirmed": self.confirmed,
        }


def candidate_orders(
    kept: NDArray[np.bool_], scores: NDArray[np.float64], k: int, *, rng: np.random.Generator
) -> dict[str, tuple[int, ...]]:
    """The original order, reversed, by attribution both ways, and ``k`` random ones; each order once.

    Parameters
    ----------
    kept : bool (n_units,)
    scores : float (n_units,)
        Attribution.
    k : int
    rng : numpy.random.Generator

    Examples
    --------
    >>> kept, rng = np.array([True, False, True]), np.random.default_rng(0)
    >>> candidate_orders(kept, np.array([0.3, 0.0, 0.1]), 1, rng=rng)
    {'original': (0, 2), 'reversed': (2, 0)}
    """
    units = [int(i) for i in np.flatnonzero(kept)]
    rising = tuple(sorted(units, key=lambda i: (scores[i], i)))
    named = {
        "original": tuple(units),
        "reversed": tuple(reversed(units)),
        "most useful last": rising,
        "most useful first": tuple(reversed(rising)),
        **{f"random {i + 1}": tuple(int(u) for u in rng.permutation(units)) for i in range(k)},
    }
    found: dict[str, tuple[int, ...]] = {}
    for name, order in named.items():
        if order not in found.values():
            found[name] = order
    return found


def try_orders(
    orders: Mapping[str, tuple[int, ...]],
    on_target: EvaluateOrder,
    n_queries: int,
    *,
    on_proxy: EvaluateOrder | None = None,
    rng: np.random.Generator,
    level: float = 0.05,
) -> OrderSearch | None:
    """Compare orders where that is cheap, then let the target confirm the best against the original.

    Parameters
    ----------
    orders : mapping
        From :func:`candidate_orders`.
    on_target : callable
        On the selection split.
    n_queries : int
        Size of the selection split.
    on_proxy : callable, optional
        An accepted proxy, on its own queries. Without one, a quarter of the selection split compares on the
        target, and the other queries confirm.
    rng : numpy.random.Generator
    level : float
        Of the paired test of the gain in utility. Performance must not fall either.

    Returns
    -------
    OrderSearch or None
        ``None`` with fewer than two different orders.
    """
    if len(orders) < 2:
        return None
    shuffled = rng.permutation(n_queries)
    few = ceil(_SCOUTED * n_queries)
    confirming: NDArray[np.int64] = shuffled if on_proxy is not None else shuffled[few:]
    scores: dict[str, float] = {}
    for name, order in orders.items():
        values = on_proxy(order) if on_proxy is not None else on_target(order, shuffled[:few])
        scores[name] = float(np.nanmean(values.utility))
    best = max(scores, key=lambda name: (scores[name], name == "original"))
    gain, p, confirmed = 0.0, 1.0, False
    if best != "original" and len(confirming):
        new, old = (on_target(orders[name], confirming) for name in (best, "original"))
        for values in (new, old):
            values.require_complete("confirming an order on the target")
        gain, _, p = p_value(new.utility[0] - old.utility[0], discrete=new.scale == "accuracy")
        better = float(np.nanmean(new.performance)) >= float(np.nanmean(old.performance))
        confirmed = p <= level and better
    return OrderSearch(
        scores, dict(orders), "target" if on_proxy is None else "proxy", best, gain, p, confirmed
    )
