"""Coalitions bought in instalments: every prefix of one random order is a design of its own.

A design drawn for 200 coalitions cannot in general be extended to 300, because what was drawn without
replacement from a class of coalitions was drawn with another chance. Here each coalition (for KernelSHAP each
complement pair) gets a priority ``uniform / mass`` with its mass under the law of the technique, and is bought in
ascending order of priority. Given the priority ``t`` of the first one that is not bought, a coalition of mass
``p`` is in the prefix with chance ``min(1, p t)``, so that weights ``max(p, 1 / t)`` make sums over the prefix
unbiased for sums over all coalitions, and terms of different coalitions are uncorrelated (priority sampling;
Duffield, Lund & Thorup 2007). A prefix of everything carries the law's own weights and is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np

from proxyprompt.coalitions import BoolArray, FloatArray, row_keys
from proxyprompt.errors import InputError

from .base import Attribution, Design

_SPARE = 1e-6


@dataclass(frozen=True, eq=False)
class Law:
    """Which coalitions a technique regresses on, and with what mass.

    Parameters
    ----------
    mass : ndarray of float64, shape (n_units + 1,)
        Regression weight of one coalition of each size, over all coalitions; 0 for the empty and the full one when
        they are constraints and not observations.
    paired : bool
        Whether a coalition is bought with its complement.
    constrained : bool
        Whether the credits add up to v(full) - v(empty); otherwise the regression has an intercept.
    """

    mass: FloatArray
    paired: bool
    constrained: bool

    @property
    def n_units(self) -> int:
        """Number of units."""
        return len(self.mass) - 1

    @property
    def members(self) -> int:
        """Coalitions in a cluster, which is what is drawn."""
        return 2 if self.paired else 1

    @property
    def n_parameters(self) -> int:
        """Free coefficients of the regression."""
        return self.n_units - 1 if self.constrained else self.n_units + 1

    def sizes(self) -> range:
        """Sizes that clusters are numbered by; the complement of a member has the other size."""
        return range(1, self.n_units // 2 + 1) if self.paired else range(1, self.n_units)

    def n_clusters(self, size: int) -> int:
        """Clusters of one size; of coalitions of half the units, two make one pair."""
        half = self.paired and 2 * size == self.n_units
        return comb(self.n_units, size) // (2 if half else 1)


def banzhaf_law(keep: float, n_units: int) -> Law:
    """Each unit kept with probability ``keep``, independently."""
    sizes = np.arange(n_units + 1)
    return Law(keep**sizes * (1 - keep) ** (n_units - sizes), paired=False, constrained=False)


def shapley_law(n_units: int) -> Law:
    """The Shapley kernel, coalitions bought with their complements."""
    inner = [(n_units - 1) / (comb(n_units, s) * s * (n_units - s)) for s in range(1, n_units)]
    mass = np.array([0.0, *inner, 0.0])[: n_units + 1]
    return Law(mass / 2.0, paired=True, constrained=True)


@dataclass(frozen=True, eq=False)
class NestedDraw:
    """Clusters in the order in which they are bought.

    Parameters
    ----------
    law : Law
    rows : ndarray of bool, shape (2 + n_clusters * members, n_units)
        The empty and the full coalition, then the clusters; all rows are distinct.
    mass : ndarray of float64, shape (n_clusters,)
        Mass of one coalition of each cluster.
    priority : ndarray of float64, shape (n_clusters + 1,)
        Ascending; the last one is that of the first cluster not drawn, infinite when none is left.
    """

    law: Law
    rows: BoolArray
    mass: FloatArray
    priority: FloatArray

    def prefix(self, n_clusters: int) -> Prefix:
        """Return the design that buys the first ``n_clusters`` clusters."""
        threshold = self.priority[n_clusters]
        exact = bool(np.isinf(threshold))
        mass = self.mass[:n_clusters]
        weights = np.repeat(mass if exact else np.maximum(mass, 1 / threshold), self.law.members)
        rows = self.rows[: 2 + len(weights)]
        chance = np.ones(n_clusters) if exact else np.minimum(1.0, mass * threshold)
        return Prefix(
            Design(rows, np.concatenate([self.law.mass[[0, -1]], weights]), exact), chance, self.law
        )


def draw_nested(law: Law, n_clusters: int, *, rng: np.random.Generator) -> NestedDraw:
    """Draw the order up to ``n_clusters``, or up to all clusters if there are fewer.

    Parameters
    ----------
    law : Law
    n_clusters : int
        At least 0.
    rng : numpy.random.Generator
        The only source of chance.
    """
    priorities, owners = [np.zeros(0)], [np.zeros(0, dtype=np.int64)]
    for size in law.sizes():
        total = law.n_clusters(size)
        count = min(total, n_clusters + 1)
        # Ascending order statistics of `total` uniforms, of which only the first are needed.
        gaps = rng.exponential(size=count) / (float(total) - np.arange(count))
        priorities.append(-np.expm1(-np.cumsum(gaps)) / law.mass[size])
        owners.append(np.full(count, size))
    joined, owner = np.concatenate(priorities), np.concatenate(owners)
    order = np.argsort(joined, kind="stable")[: n_clusters + 1]
    bought = owner[order[:n_clusters]]
    first = np.zeros((len(bought), law.n_units), dtype=bool)
    for size in np.unique(bought).tolist():
        first[bought == size] = _subsets(law, size, int((bought == size).sum()), rng)
    rows = np.repeat(first, law.members, axis=0)
    if law.paired:
        rows[1::2] = ~rows[1::2]
    ends = np.repeat([[False], [True]], law.n_units, axis=1)
    priority = np.append(joined[order], np.inf)[: len(bought) + 1]
    return NestedDraw(law, np.vstack([ends, rows]), law.mass[bought], priority)


def _subsets(law: Law, size: int, count: int, rng: np.random.Generator) -> BoolArray:
    """Draw ``count`` clusters of one size without replacement, in random order; the first member of each."""
    n_units, total = law.n_units, law.n_clusters(size)
    if 2 * count > total:
        members = np.array(list(combinations(range(n_units), size)))[:total]
        listed = np.zeros((total, n_units), dtype=bool)
        np.put_along_axis(listed, members, True, axis=1)
        picked: BoolArray = listed[rng.permutation(total)[:count]]
        return picked
    found: dict[bytes, BoolArray] = {}
    while len(found) < count:
        places = np.argsort(rng.random((count, n_units)), axis=1)[:, :size]
        drawn = np.zeros((count, n_units), dtype=bool)
        np.put_along_axis(drawn, places, True, axis=1)
        if law.paired and 2 * size == n_units:
            drawn ^= ~drawn[:, :1]
        for key, row in zip(row_keys(drawn), drawn, strict=True):
            found.setdefault(key, row)
    return np.array(list(found.values())[:count])


@dataclass(frozen=True, eq=False)
class Errors:
    """Rows whose sums of squares and products estimate covariance matrices; all of shape (n_clusters, n_units).

    Parameters
    ----------
    shared : ndarray of float64
        ``shared.T @ shared`` estimates the covariance of the mean credits given the queries.
    even : ndarray of float64
        The same if residuals are equally spread over all coalitions.
    own : ndarray of float64
        ``own.T @ own`` estimates what the choice of coalitions adds to the covariance of the queries' credits, divided
        by their number. Zero for a single query.
    df : float
        Degrees of freedom.

    Notes
    -----
    With ``B`` the inverse of the weighted second moments of the regressors ``x``, residuals ``e`` of the mean over
    queries, weights ``w``, leverages ``h`` and inclusion probabilities ``f``, the row of ``shared`` is
    ``sqrt(1 - f) sum_z w(z) e(z) B x(z) / (1 - h)``: linearization, the variance of priority sampling, and the
    leave-one-cluster-out correction of residuals. ``even`` has the root mean square of the residuals in place of
    ``e / (1 - h)``. Where coalitions that are certain to be bought show a residual that the few uncertain ones happen
    not to show, ``shared`` is too small and ``even`` is not. ``own`` has the standard error over queries in place of
    ``e``. A missing value counts as a residual of 0.
    """

    shared: FloatArray
    even: FloatArray
    own: FloatArray
    df: float


@dataclass(frozen=True, eq=False)
class Prefix:
    """A design that was bought, and the chance that each of its clusters had to be in it.

    Parameters
    ----------
    design : Design
    chance : ndarray of float64, shape (n_clusters,)
        Inclusion probability of each cluster, given the priority of the next one.
    law : Law
    """

    design: Design
    chance: FloatArray
    law: Law

    @property
    def sound(self) -> bool:
        """Whether the units are determined, and stay so without any one cluster."""
        if self.design.exact:
            return True
        inverse, _, leverage = self._factor(self.design.weights)
        return inverse is not None and bool((leverage < 1 - _SPARE).all())

    def errors(self, fitted: Attribution, values: FloatArray) -> Errors:
        """What each cluster contributes to the error that the credits have from the choice of coalitions.

        Parameters
        ----------
        fitted : Attribution
            From this design and these values.
        values : ndarray of float64, shape (n_coalitions, n_queries)

        Raises
        ------
        InputError
            When what is not missing does not determine the units.
        """
        design, members = self.design, self.law.members
        kept = np.delete(values, fitted.dropped_queries, axis=1)
        gaps = kept - fitted.predict(design.coalitions)
        missing = np.isnan(gaps)
        inverse, x, leverage = self._factor(design.weights * (1 - missing.mean(axis=1)))
        if inverse is None:
            raise InputError(
                f"The {design.n_coalitions} coalitions less those that failed do not determine {design.n_units} units.",
                hint="Repeat the failed calls, or raise first.",
            )
        by_cluster = np.where(missing, 0.0, gaps)[2:].reshape(-1, members, kept.shape[1])
        # The regressors of a complement are those of its partner with the sign turned.
        gap = by_cluster[:, 0] - by_cluster[:, 1] if self.law.paired else by_cluster[:, 0]
        size = design.weights[2::members] * np.sqrt(1 - self.chance)
        plain = size[:, None] * (x[2::members] @ inverse)
        reach = plain / np.maximum(1 - leverage, _SPARE)[:, None]
        spread = gap.var(axis=1, ddof=1) / gap.shape[1] if gap.shape[1] > 1 else np.zeros(len(gap))
        mean = gap.mean(axis=1)
        spare = max(len(gap) - self.law.n_parameters, 1)
        return Errors(
            shared=reach * mean[:, None],
            even=plain * np.sqrt((mean**2).sum() / spare),
            own=reach * np.sqrt(spread)[:, None],
            df=float(max(min(spare, int((self.chance < 1).sum()) - 1), 1)),
        )

    def _factor(self, weights: FloatArray) -> tuple[FloatArray | None, FloatArray, FloatArray]:
        """Inverse moments (None when singular), centred regressors, and leverages of the clusters."""
        z = self.design.coalitions.astype(np.float64)
        # A constraint on the sum removes the mean over units; an intercept removes the mean over rows.
        x = z - (z.mean(axis=1, keepdims=True) if self.law.constrained else weights @ z / weights.sum())
        moments = (x * weights[:, None]).T @ x
        level, axes = np.linalg.eigh(moments)
        rank = self.law.n_units - 1 if self.law.constrained else self.law.n_units
        usable = level > 1e-12 * level[-1]
        if usable.sum() < rank:
            return None, x, np.zeros(0)
        inverse: FloatArray = (axes[:, usable] / level[usable]) @ axes[:, usable].T
        rows = weights * np.einsum("iu,iu->i", x @ inverse, x)
        if not self.law.constrained:
            rows = rows + weights / weights.sum()
        return inverse, x, rows[2:].reshape(-1, self.law.members).sum(axis=1)
