"""Permutation Shapley values: marginal contributions along random orders and their reverses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import factorial
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from proxyprompt.coalitions import MAX_ENUMERATED_UNITS, BoolArray, FloatArray, row_keys
from proxyprompt.errors import InputError

from .base import Attribution, Design, Explainer, frozen, refuse_if_too_many, summarize
from .exact import ExactShapley

__all__ = ["PermutationDesign", "PermutationShapley"]

IntArray = NDArray[np.int64]

_PRIOR_PAIRS = 2


@dataclass(frozen=True, eq=False)
class PermutationDesign(Design):
    """Distinct coalitions, and the orders whose prefixes they are.

    Parameters
    ----------
    coalitions, weights, exact
        As for :class:`Design`; the weights are 0, nothing is regressed on.
    permutations : ndarray of int64, shape (n_pairs, n_units)
        Forward orders; each is also walked in reverse.

    Raises
    ------
    InputError
        When a row is not a permutation of the units, or there are fewer than two.
    """

    permutations: IntArray

    def __post_init__(self) -> None:
        super().__post_init__()
        orders = np.asarray(self.permutations, dtype=np.int64)
        if orders.ndim != 2 or len(orders) < 2 or (np.sort(orders) != np.arange(self.n_units)).any():
            raise InputError(
                f"permutations of shape {orders.shape}: two or more orders of {self.n_units} units are needed.",
                hint="Use the design as PermutationShapley made it.",
            )
        object.__setattr__(self, "permutations", frozen(orders))


class PermutationShapley(Explainer):
    """Shapley values as mean marginal contributions along random orders, each walked both ways.

    Parameters
    ----------
    max_missing : float
        Largest share of a query's values that may be missing before the query is dropped.
    max_dropped : float
        Largest share of queries that may be dropped before the answer is refused.

    Notes
    -----
    The Shapley value is the mean, over all orders of the units, of what a unit adds to those before it
    [1]_. An order and its reverse make a pair; the two halves err in opposite directions where units
    interact, which lowers the variance [2]_, and on a game of pairs both halves together are exact. A
    pair takes ``2 (n - 1)`` coalitions beside the empty and the full one. Pairs are drawn without
    replacement until the next one would pass the budget; coalitions met before are not paid for again.
    That stopping rule leaves the estimate unbiased: renaming the units changes neither the chance of a list
    of orders nor its cost, so each order stays uniform given how many fitted. When the
    budget allows all ``2**n`` coalitions the values are those of :class:`ExactShapley`.

    **Error from sampling.** With ``d_p`` the marginal contributions of pair ``p``, averaged over its two halves and
    over queries, ``s_i**2 = sum_p (d_pi - mean d_i)**2 / (m - 1)`` is a unit's variance over the ``m`` pairs. Few pairs may
    agree on a unit by chance, which would pass for certainty, so it is drawn towards its mean over units as if
    two more pairs had shown that: ``t_i**2 = (2 mean s**2 + (m - 1) s_i**2) / (m + 1)`` and ``se_coalitions**2 =
    (1 - m / M) t_i**2 / m``, ``M = n! / 2``, on ``m - 1`` degrees of freedom. In games of 5 to 24 units 95 %
    intervals covered 96 to 100 % (the worst unit 90 %); without that, from two pairs, 80 to 92 %. Pairs that share
    coalitions are treated as independent.

    Missing values: a pair any of whose coalitions a query lacks is left out for that query, and a query
    that keeps fewer than two pairs is dropped. A pair of many units has many chances to be hit; where calls fail
    at random, :class:`KernelSHAP` loses less. In the exact case a query with any missing value is dropped.

    References
    ----------
    .. [1] Castro, Gomez & Tejada, "Polynomial calculation of the Shapley value based on sampling", 2009.
    .. [2] Mitchell, Cooper, Frank & Holmes, "Sampling Permutations for Shapley Value Estimation", 2022,
       section 3.

    Examples
    --------
    >>> from proxyprompt.testing import UnanimityGame
    >>> game = UnanimityGame(6, [((0, 1), 1.0), ((2,), 0.5), ((4, 5), -1.0)])
    >>> result = PermutationShapley().attribute(game, 6, budget=24, rng=np.random.default_rng(0))
    >>> result.exact, result.mean.round(4).tolist()
    (False, [0.5, 0.5, 0.5, 0.0, -0.5, -0.5])
    """

    method: ClassVar[str] = "permutation_shapley"

    @staticmethod
    def smallest_budget(n_units: int) -> int:
        """Fewest coalitions: both ends and two pairs of orders, ``min(2**n, 4 n - 2)``."""
        return int(min(2**n_units, 4 * n_units - 2))

    def design(self, n_units: int, budget: int, *, rng: np.random.Generator) -> Design:
        """Draw pairs of orders as long as their coalitions fit into the budget.

        Parameters
        ----------
        n_units : int
            Number of units, at least 1.
        budget : int
            Largest number of distinct coalitions, at least ``smallest_budget(n_units)``.
        rng : numpy.random.Generator
            The only source of chance.

        Returns
        -------
        Design
            A :class:`PermutationDesign`, or all coalitions (``exact``) when the budget allows them.

        Raises
        ------
        InputError
            When the budget is below two pairs of orders.
        """
        smallest = self.smallest_budget(n_units)
        if budget < smallest:
            raise InputError(
                f"budget={budget}: two orders of {n_units} units and their reverses take {smallest} coalitions.",
                hint=f"Use {smallest} or more, or KernelSHAP, which needs fewer.",
            )
        if n_units <= MAX_ENUMERATED_UNITS and budget >= 2**n_units:
            return ExactShapley().design(n_units, budget, rng=rng)
        rows: dict[bytes, BoolArray] = {}
        drawn: dict[bytes, IntArray] = {}
        while True:
            order = rng.permutation(n_units)
            order = order if order[0] < order[-1] else order[::-1]
            prefixes = _prefixes(order[None]).reshape(-1, n_units)
            new = {key: row for key, row in zip(row_keys(prefixes), prefixes, strict=True) if key not in rows}
            if len(rows) + len(new) > budget:
                break
            rows |= new
            drawn[order.tobytes()] = order
        coalitions = np.array(list(rows.values()))
        orders = np.array(list(drawn.values()), dtype=np.int64)
        return PermutationDesign(coalitions, np.zeros(len(coalitions)), exact=False, permutations=orders)

    def fit(self, design: Design, values: ArrayLike) -> Attribution:
        """Average the marginal contributions.

        Parameters
        ----------
        design : Design
            As :meth:`design` makes it.
        values : array_like of float, shape (n_coalitions, n_queries)
            NaN is missing.

        Returns
        -------
        Attribution
            ``values.sum(axis=1)`` equals v(full) - v(empty) for every query.

        Raises
        ------
        InputError
            When the values have a wrong shape, or the design is not one of this class.
        InconclusiveError
            When too many queries have missing values.
        """
        settings = {"max_missing": self.max_missing, "max_dropped": self.max_dropped}
        if design.exact:
            exact = ExactShapley(max_dropped=self.max_dropped).fit(design, values)
            return replace(exact, method=self.method, settings=settings)
        if not isinstance(design, PermutationDesign):
            raise InputError(
                "The design does not say which orders its coalitions come from.",
                hint="Make the design with PermutationShapley().design.",
            )
        kept, where, dropped = self._complete_enough(design, values)
        walks = _Walks.make(design)
        missing = np.isnan(kept)
        whole = {
            int(q): ~missing[walks.steps, q].any(axis=(1, 2)) for q in np.flatnonzero(missing.any(axis=0))
        }
        lost = np.array([q for q, pairs in whole.items() if pairs.sum() < 2], dtype=np.int64)
        refuse_if_too_many(len(dropped) + len(lost), len(dropped) + len(where), self.max_dropped)
        phi = walks.operator(slice(None)) @ np.where(missing, 0.0, kept)
        for query, pairs in whole.items():
            if query not in lost:
                phi[:, query] = walks.operator(pairs) @ np.where(missing[:, query], 0.0, kept[:, query])
        scores = walks.scores(kept, phi, whole, lost)
        stay = np.setdiff1d(np.arange(len(where)), lost)
        m = len(scores)
        own = (scores**2).sum(axis=0) / (m - 1)
        shared = (_PRIOR_PAIRS * own.mean() + (m - 1) * own) / (_PRIOR_PAIRS + m - 1)
        se_coalitions = np.sqrt((1 - m / (factorial(design.n_units) // 2)) * shared / m)
        phi = phi[:, stay].T
        mean, se, se_queries, se_coalitions = summarize(phi, se_coalitions)
        base = kept[design.empty_row, stay]
        return Attribution(
            values=phi,
            mean=mean,
            standard_error=se,
            se_queries=se_queries,
            se_coalitions=se_coalitions,
            base_values=base,
            full_values=kept[design.full_row, stay],
            intercept=base,
            n_coalitions=design.n_coalitions,
            exact=False,
            method=self.method,
            settings=settings,
            dropped_queries=np.sort(np.concatenate([dropped, where[lost]])),
            df_coalitions=float(m - 1),
        )


@dataclass(frozen=True, eq=False)
class _Walks:
    """Where each step of each order finds its value."""

    orders: IntArray  # (n_pairs, n_units)
    steps: IntArray  # (n_pairs, 2, n_units + 1): rows of the prefixes, forward and reverse
    n_rows: int

    @classmethod
    def make(cls, design: PermutationDesign) -> _Walks:
        number = {key: row for row, key in enumerate(row_keys(design.coalitions))}
        n_pairs, n_units = design.permutations.shape
        steps = np.empty((n_pairs, 2, n_units + 1), dtype=np.int64)
        for pair, order in enumerate(design.permutations):
            keys = row_keys(_prefixes(order[None]).reshape(-1, n_units))
            if not number.keys() >= set(keys):
                raise InputError(
                    f"The coalitions lack a prefix of order {pair}.",
                    hint="Use the design as PermutationShapley made it.",
                )
            steps[pair] = np.array([number[key] for key in keys]).reshape(2, n_units + 1)
        return cls(design.permutations, steps, design.n_coalitions)

    def operator(self, pairs: slice | NDArray[np.bool_]) -> FloatArray:
        """The matrix (n_units, n_rows) that takes values to mean marginal contributions over ``pairs``."""
        orders, steps = self.orders[pairs], self.steps[pairs]
        n_units = orders.shape[1]
        units = np.stack([orders, orders[:, ::-1]], axis=1)  # (n_pairs, 2, n_units), in step order
        total = np.zeros(n_units * self.n_rows)
        for ends, sign in ((steps[:, :, 1:], 1.0), (steps[:, :, :-1], -1.0)):
            total += sign * np.bincount((units * self.n_rows + ends).ravel(), minlength=len(total))
        operator: FloatArray = total.reshape(n_units, self.n_rows) / (2 * len(orders))
        return operator

    def marginals(self, values: FloatArray) -> FloatArray:
        """Marginal contributions, shape (n_pairs, n_units), of ``values`` (n_rows,), both halves averaged."""
        gains = np.diff(values[self.steps], axis=2)
        found = np.empty(self.orders.shape)
        np.put_along_axis(found, self.orders, (gains[:, 0] + gains[:, 1, ::-1]) / 2, axis=1)
        return found

    def scores(
        self, kept: FloatArray, phi: FloatArray, whole: dict[int, NDArray[np.bool_]], lost: IntArray
    ) -> FloatArray:
        """What each pair moves the mean by, times ``n_pairs``: shape (n_pairs, n_units), summing to zero."""
        n_pairs, n_queries = len(self.orders), kept.shape[1] - len(lost)
        complete = np.setdiff1d(np.arange(kept.shape[1]), list(whole))
        total = self.marginals(kept[:, complete].sum(axis=1)) - phi[:, complete].sum(axis=1)
        for query in set(whole) - set(lost.tolist()):
            pairs = whole[query]
            gap = self.marginals(np.nan_to_num(kept[:, query])) - phi[:, query]
            total += np.where(pairs[:, None], gap, 0.0) * (n_pairs / pairs.sum())
        scores: FloatArray = total / n_queries
        return scores


def _prefixes(orders: IntArray) -> BoolArray:
    """Coalitions along each order and its reverse: bool (n_orders, 2, n_units + 1, n_units)."""
    n_units = orders.shape[1]
    place = np.argsort(orders, axis=1)[:, None, :]
    forward = place < np.arange(n_units + 1)[:, None]
    return np.stack([forward, ~forward[:, ::-1]], axis=1)
