"""Interactions of pairs of units: which coalitions they take, and how their values become interactions."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from proxyprompt.coalitions import BoolArray, FloatArray, check_n_units, enumerate_coalitions
from proxyprompt.errors import InputError

from ._order_two import OrderTwo, estimated_banzhaf, exact_indices
from .base import Design, ValueArrayFunction, check_values, refuse_if_too_many
from .interactions import Interactions
from .weighted_banzhaf import WeightedBanzhaf

__all__ = ["PairwiseInteractions"]

INDICES = ("faith-banzhaf", "faith-shap", "sii")
MAX_UNITS = 64
"""2,016 pairs; beyond, a budget anybody would pay tells next to nothing about most of them."""


class PairwiseInteractions:
    """Interactions of all pairs of units, exact from all coalitions or estimated by a shrunken regression.

    Parameters
    ----------
    index : {"faith-banzhaf", "faith-shap", "sii"}
        Which average of ``v(S + ij) - v(S + i) - v(S + j) + v(S)`` over coalitions ``S`` of the others.
    keep : float, optional
        For ``faith-banzhaf``: probability, in (0, 1), with which ``S`` holds each unit; 0.8 unless given, as for
        :class:`WeightedBanzhaf`. The other indices have no such parameter.
    max_missing : float
        Largest share of a query's values that may be missing before the query is dropped.
    max_dropped : float
        Largest share of queries that may be dropped before the answer is refused.

    Notes
    -----
    **Indices.** ``faith-banzhaf`` averages over ``S`` drawn by tossing a coin that shows ``keep``; it is the
    pair coefficient of the order-2 polynomial that fits ``v`` best under that law ([1]_, [2]_; one half is the plain
    one). ``sii``, the Shapley interaction index [3]_, gives every size of ``S`` the same weight. ``faith-shap`` [2]_,
    the best fit under the Shapley kernel with both ends met, gives size ``s`` a weight proportional to
    ``(s + 1) (n - 1 - s)``. With main effects ``phi`` (weighted Banzhaf; Shapley values) each makes an order-2
    surrogate with the linear coefficients ``phi_i - c sum_j I_ij``, ``c`` being ``keep`` or one half; the latter two
    meet v(empty) and v(full).

    ``faith-banzhaf`` is the default because it alone is estimated here; the other two need all ``2**n``
    coalitions. Its coalitions are those of :class:`WeightedBanzhaf`: a design of ``WeightedBanzhaf(keep)`` that is
    already paid for (of :class:`Banzhaf` or :class:`Lasso` for one half) can be handed to :meth:`fit`.

    **Which keep.** On six matrices of all coalitions of 10-demonstration prompts, answered by two small language models
    (``benchmarks/attribution/``), the estimates from 42 and 80 coalitions correlated with the exact interactions at
    0.76 and 0.96 for 0.8, at 0.56 and 0.82 for one half. The order-2 surrogate explained 98 % of the variance over
    coalitions at 0.8 and 89 % at one half, the additive one 61 and 60 %; estimated from 80 coalitions 95 and 76 %
    (additive 54 and 53 %). Where interactions of three and more units are as strong among few units as among many, one half
    finds a pair sooner, the error of a pair going with ``1 / (keep (1 - keep))``: in such games of 24 units a planted
    pair of copies was among the five most negative of 276 from 98 coalitions in 83 % at one half, in 29 % at 0.8, and
    :meth:`Interactions.redundant` named it from 298 in 92 and 21 %.

    **Estimation.** Least squares on constant and units, ridge on the pairs. Standardised pair features are
    orthonormal under the law of the draw, so the ridge shrinks all pairs alike, and pairs may outnumber coalitions.
    The penalty, none included where the coalitions determine all pairs, is the one of least
    leave-one-out error of the mean value; it is the same for all queries, so that estimates are linear in the
    values once it is chosen. What it retains on average is ``shrinkage``: with fewer coalitions than pairs interactions
    come out too small by about that factor, while their order and signs remain.

    ``se_pairs`` is the HC3 error ``sqrt(sum_r L_pr**2 e_r**2)``, ``L`` the linear map from values to pairs, ``e``
    the leave-one-out residuals of the mean value. Shrinkage is not in it: ``mean / standard_error`` judges whether
    a pair interacts at all (among pairs that do not, 2 to 5 % passed 1.96 in simulations of 24 units from 98 to 800
    coalitions); as an interval for the size of an interaction it is honest only where ``shrinkage`` is near 1.

    Missing values: a missing row is left out of its query's regression, at the common penalty. When exact, a
    query with any missing value is dropped.

    At most 64 units, 2,016 pairs: 200 have 19,900, ten times the coalitions that a large budget buys. 64 units,
    2,000 coalitions and 500 queries take about 4 seconds of one core, 24 units and 600 coalitions a tenth of a second.

    References
    ----------
    .. [1] Marichal & Mathonet, "Weighted Banzhaf power and interaction indexes through weighted approximations of
       games", 2011.
    .. [2] Tsai, Yeh & Ravikumar, "Faith-Shap: The Faithful Shapley Interaction Index", 2023, theorem 19.
    .. [3] Grabisch & Roubens, "An axiomatic approach to the concept of interaction among players in cooperative
       games", 1999.

    Examples
    --------
    Units 0 and 1 are copies, unit 2 is useless:

    >>> def copies(z):
    ...     return (z[:, :1] | z[:, 1:2]).astype(float)
    >>> found = PairwiseInteractions(keep=0.5).attribute(copies, 3, budget=8, rng=np.random.default_rng(0))
    >>> found.mean.round(6).tolist()
    [[0.0, -1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    >>> found.main_effects.round(6).tolist(), found.redundant()
    ([[0.5, 0.5, 0.0]], [(0, 1)])
    >>> found.marginal([True, True, True]).round(6).tolist(), found.marginal([True, False, True]).round(6).tolist()
    ([0.0, 0.0, 0.0], [1.0, 0.0, 0.0])
    """

    def __init__(
        self,
        index: str = "faith-banzhaf",
        *,
        keep: float | None = None,
        max_missing: float = 0.05,
        max_dropped: float = 0.20,
    ) -> None:
        if index not in INDICES:
            raise InputError(
                f"index={index!r}: one of {', '.join(INDICES)}.", hint="faith-banzhaf is the default."
            )
        if keep is not None and index != "faith-banzhaf":
            raise InputError(f"keep={keep}: {index} has no such parameter.", hint="Leave it out.")
        # Checks keep and both shares, and draws the coalitions.
        self._draw = WeightedBanzhaf(
            0.8 if keep is None else keep, max_missing=max_missing, max_dropped=max_dropped
        )
        self.index = index
        self.centre = self._draw.keep if index == "faith-banzhaf" else 0.5
        self.max_missing = max_missing
        self.max_dropped = max_dropped

    def smallest_budget(self, n_units: int) -> int:
        """Fewest coalitions: four a unit and both ends for ``faith-banzhaf``, all of them for the others."""
        return int(min(2**n_units, 4 * n_units + 2)) if self.index == "faith-banzhaf" else 2**n_units

    def design(self, n_units: int, budget: int, *, rng: np.random.Generator) -> Design:
        """Choose the coalitions: all when the budget allows them, else those of :class:`WeightedBanzhaf`.

        Parameters
        ----------
        n_units : int
            Number of units, 2 to 64.
        budget : int
            Largest number of coalitions, at least ``smallest_budget(n_units)``. As many as there are pairs and
            units determine the interactions; fewer find the strong ones.
        rng : numpy.random.Generator
            The only source of chance.

        Returns
        -------
        Design

        Raises
        ------
        InputError
            When there are too few or too many units, or the budget is too small.
        """
        _check_units(n_units)
        smallest = self.smallest_budget(n_units)
        if budget < smallest:
            raise InputError(
                f"budget={budget}: {self.index} interactions of {n_units} units need at least {smallest} coalitions.",
                hint="Raise the budget."
                if self.index == "faith-banzhaf"
                else "Use faith-banzhaf, which can be estimated from fewer.",
            )
        if budget >= 2**n_units:
            return Design(enumerate_coalitions(n_units), np.ones(2**n_units), exact=True)
        return self._draw.design(n_units, budget, rng=rng)

    def fit(self, design: Design, values: ArrayLike) -> Interactions:
        """Compute the interactions.

        Parameters
        ----------
        design : Design
            All coalitions, or drawn ones of :meth:`design` or of ``WeightedBanzhaf(keep).design``.
        values : array_like of float, shape (n_coalitions, n_queries)
            NaN is missing.

        Returns
        -------
        Interactions

        Raises
        ------
        InputError
            When the values have a wrong shape, the design is of another technique, or what is not missing does not
            determine the main effects.
        InconclusiveError
            When too many queries have missing values.
        """
        _check_units(design.n_units)
        drawn = design.weights > 0
        ends = design.weights[[design.empty_row, design.full_row]]
        independent = bool((ends > 0).all() or (design.weights[drawn] == 1).all()) and bool(drawn.any())
        if not design.exact and (self.index != "faith-banzhaf" or not independent):
            raise InputError(
                f"{self.index} interactions cannot be estimated from this design.",
                hint="Make the design with PairwiseInteractions().design or WeightedBanzhaf().design.",
            )
        array = check_values(values, design.n_coalitions)
        missing = np.isnan(array)
        drop = missing[design.empty_row] | missing[design.full_row]
        drop |= missing.mean(axis=0) > (0.0 if design.exact else self.max_missing)
        refuse_if_too_many(int(drop.sum()), array.shape[1], self.max_dropped)
        kept = array[:, ~drop]
        if design.exact:
            found = exact_indices(_all_rows(design), kept, self.index, self.centre)
        else:
            found = estimated_banzhaf(
                design.coalitions[drawn], kept[drawn], self.centre, design.weights[drawn]
            )
        return self._result(found, design, kept, np.flatnonzero(drop))

    def attribute(
        self, value_function: ValueArrayFunction, n_units: int, *, budget: int, rng: np.random.Generator
    ) -> Interactions:
        """Design, evaluate, fit; parameters and errors as for :meth:`Explainer.attribute`."""
        design = self.design(check_n_units(n_units), budget, rng=rng)
        return self.fit(design, value_function(design.coalitions))

    def _result(
        self, found: OrderTwo, design: Design, kept: FloatArray, dropped: NDArray[np.int64]
    ) -> Interactions:
        settings = {"index": self.index, "max_missing": self.max_missing, "max_dropped": self.max_dropped}
        return Interactions(
            values=found.pairs.T,
            main_effects=found.main.T,
            intercept=found.intercept,
            se_pairs=found.se_pairs,
            base_values=kept[design.empty_row],
            full_values=kept[design.full_row],
            centre=self.centre,
            index=self.index,
            n_coalitions=design.n_coalitions,
            exact=design.exact,
            shrinkage=found.shrinkage,
            df_coalitions=found.df,
            settings=settings | ({"keep": self.centre} if self.index == "faith-banzhaf" else {}),
            dropped_queries=dropped,
        )


def _check_units(n_units: int) -> None:
    if not 2 <= n_units <= MAX_UNITS:
        raise InputError(
            f"n_units={n_units}: interactions are computed for 2 to {MAX_UNITS} units; {n_units} have "
            f"{n_units * (n_units - 1) // 2} pairs.",
            hint="Explain groups of units, or cut the prompt with attributions first.",
        )


def _all_rows(design: Design) -> BoolArray:
    rows = design.coalitions
    if (
        len(np.unique(np.packbits(rows, axis=1), axis=0)) != 2**design.n_units
        or len(rows) != 2**design.n_units
    ):
        raise InputError(
            f"The design holds {len(rows)} rows; all {2**design.n_units} coalitions are needed once.",
            hint="Make the design with PairwiseInteractions().design.",
        )
    return rows
