"""A family of covariance functions on coalitions whose Shapley values are known in closed form.

``SurrogateSHAP`` models a value function as an additive game plus a Gaussian process with such a covariance. This
module knows the covariances, their derivatives, and what the Shapley value does to them; it knows nothing of data.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

from proxyprompt.coalitions import BoolArray, FloatArray

__all__ = ["CubeKernel", "shapley_weights"]

_NUGGET = 1e-9
_BLOCK = 256  # rows of a covariance computed at a time, to save memory
# Each product component falls by exp(-slope * relevance) for a unit that "differs"; what differs is, with z and t
# the two coalitions' indicators of the unit,   0: z != t,   1: not both keep it,   2: not both drop it,
# that is, a + b (z + t) + c z t with these (a, b, c):
_DIFFERS = np.array([[0.0, 1.0, -2.0], [1.0, 0.0, -1.0], [0.0, 1.0, -1.0]])
_PRODUCTS = len(_DIFFERS)
_HEAD = 2 * _PRODUCTS + 4  # parameters in front of the relevances


@dataclass(frozen=True, eq=False)
class CubeKernel:
    """Covariance of a random game, a sum of six parts.

    Parameters
    ----------
    log_parameters : ndarray of float64, shape (10 + n_units,)
        Logarithms of: variances of the three product parts, their slopes, variances of the second and third
        order parts, variance of the unstructured part, variance of the units' own effects around their mean,
        and the relevance ``r`` of each unit.

    Notes
    -----
    With ``s = 2 z - 1`` the parts are

    * ``exp(-slope sum_i r_i d_i)``, ``d_i = 1`` where the coalitions differ on unit ``i`` (smooth in every unit), where not
      both keep it (sums of unanimity games: what takes several units together), or where not both drop it (their
      duals: what any one of several units gives);
    * ``e_2(r s s')`` and ``e_3(r s s')``, elementary symmetric polynomials: all games of order two and three;
    * ``1`` if the coalitions are equal: games without structure.

    Beside them stands an additive game, whose effects have a free mean and a variance around it.

    The Shapley value of unit ``i`` in a game with multilinear extension ``f`` is the integral of ``df/dx_i`` along
    the diagonal (Owen, "Multilinear Extensions of Games", 1972). For a product over units that is a polynomial of
    degree ``n - 1``, which Gauss-Legendre quadrature with ``n / 2`` nodes integrates without error. A parity over
    an odd number of units ``k`` gives each of them ``2 / k``, over an even number nothing.
    """

    log_parameters: FloatArray

    @classmethod
    def start(cls, n_units: int) -> CubeKernel:
        """Where the search for parameters begins, which is also the centre of their prior."""
        head = [*[-1.0] * _PRODUCTS, *[np.log(2.0 / n_units)] * _PRODUCTS, -1.0, -1.0, -3.0, 4.0]
        return cls(np.r_[head, np.zeros(n_units)])

    @property
    def n_units(self) -> int:
        """Number of units."""
        return len(self.log_parameters) - _HEAD

    @property
    def relevance(self) -> FloatArray:
        """Relevance of each unit."""
        return np.asarray(np.exp(self.log_parameters[_HEAD:]), dtype=np.float64)

    @property
    def variances(self) -> FloatArray:
        """Of the product parts, the orders two and three, the unstructured part, and the effects."""
        head = np.exp(self.log_parameters[:_HEAD])
        return np.concatenate([head[:_PRODUCTS], head[2 * _PRODUCTS :]])

    def additive(self) -> CubeKernel:
        """The same with free effects: additive games are then exact."""
        log_parameters = self.log_parameters.copy()
        log_parameters[_HEAD - 1] = np.inf
        return CubeKernel(log_parameters)

    def effects_precision(self) -> FloatArray:
        """Prior precision of a constant and the units' effects, whose mean is free; shape (n_units + 1, n_units + 1)."""
        n = self.n_units
        precision = np.zeros((n + 1, n + 1))
        precision[1:, 1:] = (np.eye(n) - 1 / n) / self.variances[6]
        return precision

    @property
    def slopes(self) -> FloatArray:
        """Of the three product parts."""
        return np.asarray(np.exp(self.log_parameters[_PRODUCTS : 2 * _PRODUCTS]), dtype=np.float64)

    def gram(self, rows: BoolArray) -> FloatArray:
        """Covariance of the values of distinct coalitions, shape (n_coalitions, n_coalitions)."""
        kept = rows.astype(np.float64)
        gram = np.empty((len(rows), len(rows)))
        for at in range(0, len(rows), _BLOCK):
            gram[at : at + _BLOCK] = self._covariance(kept[at : at + _BLOCK], kept)
        gram[np.diag_indices(len(rows))] += self.variances[5] + _NUGGET
        return gram

    def _covariance(self, kept: FloatArray, others: FloatArray) -> FloatArray:
        """Covariance without the unstructured part."""
        r, variances, n = self.relevance, self.variances, self.n_units
        both, either = (kept * r) @ others.T, (kept @ r)[:, None] + others @ r
        signed = 4 * both - 2 * either + r.sum()  # p_1, the first power sum of r s s'; p_2 and p_3 follow
        p2, p3 = float((r**2).sum()), ((2 * kept - 1) * r**3) @ (2 * others - 1).T
        out: FloatArray = variances[3] / _pairs(n) * (signed**2 - p2)
        out += variances[4] / _triples(n) * ((signed**2 - 3 * p2) * signed + 2 * p3)
        for (a, b, c), variance, slope in zip(_DIFFERS, variances, self.slopes, strict=False):
            out += variance * np.exp(-slope * (a * r.sum() + b * either + c * both))
        return out

    def gradient(self, rows: BoolArray, outer: FloatArray) -> FloatArray:
        """Derivative of ``sum(outer * covariance)`` by the log-parameters, for symmetric ``outer``; effects included."""
        kept, r = rows.astype(np.float64), self.relevance
        both, own = (kept * r) @ kept.T, kept @ r
        either = own[:, None] + own
        variances, n = self.variances, self.n_units
        slope = np.zeros(len(self.log_parameters))
        mixed = np.zeros_like(both)  # d/d(both) and d/d(either), then d/d(sum of r), of the whole
        alone = np.zeros_like(both)
        constant = 0.0
        for k, (a, b, c) in enumerate(_DIFFERS):
            distance = self.slopes[k] * (a * r.sum() + b * either + c * both)
            part = outer * (variances[k] * np.exp(-distance))
            slope[k] = part.sum()
            part_distance = part * distance
            slope[_PRODUCTS + k] = -part_distance.sum()
            mixed -= self.slopes[k] * c * part
            alone -= self.slopes[k] * b * part
            constant -= self.slopes[k] * a * slope[k]
        signed = 4 * both - 2 * either + r.sum()
        p2 = float((r**2).sum())
        sign = 2 * kept - 1
        second, third = variances[3] / _pairs(n), variances[4] / _triples(n)
        total, moment = float(outer.sum()), float((outer * signed).sum())
        cubes = np.einsum("ij,ij->j", sign, outer @ sign)
        slope[6] = second * (float((outer * signed**2).sum()) - p2 * total)
        slope[7] = third * (float((outer * (signed**2 - 3 * p2) * signed).sum()) + 2 * float(r**3 @ cubes))
        slope[8] = variances[5] * float(np.trace(outer))
        by_signed = outer * (2 * second * signed + third * (3 * signed**2 - 3 * p2))
        mixed += 4 * by_signed
        alone -= 2 * by_signed
        constant += float(by_signed.sum())
        centred = kept - kept.mean(axis=1, keepdims=True)
        slope[9] = variances[6] * float((centred * (outer @ centred)).sum())
        by_unit = constant + 2 * (alone.sum(axis=1) @ kept) + np.einsum("ij,ij->j", kept, mixed @ kept)
        by_unit += -2 * second * r * total + third * (6 * r**2 * cubes - 6 * r * moment)
        slope[_HEAD:] = by_unit * r
        return slope

    def shapley(self, rows: BoolArray) -> FloatArray:
        """Shapley values of the games ``k(., t)``, one for each row ``t``; shape (n_units, n_coalitions)."""
        n, r, variances = self.n_units, self.relevance, self.variances
        nodes, node_weights = _quadrature(n)
        kept = rows.astype(np.float64)
        answer = np.zeros((n, len(rows)))
        for k in range(_PRODUCTS):
            factors = self._factors(k)  # (2, 2, n): factor by (z, t)
            # E[factor] over a z that keeps each unit with the node's probability, by t: (2, nodes, n)
            average = nodes[:, None] * factors[1][:, None] + (1 - nodes[:, None]) * factors[0][:, None]
            logs = np.log(average)
            product = np.exp(logs[0].sum(axis=1)[:, None] + (logs[1] - logs[0]) @ kept.T)
            product *= variances[k] * node_weights[:, None]
            step = (factors[1] - factors[0])[:, None] / average
            answer += np.where(rows.T, step[1].T @ product, step[0].T @ product)
        own = (2 * kept - 1) * r  # the parity of three units needs e_2 of the others' r s
        p1, p2 = own.sum(axis=1)[:, None], (own**2).sum(axis=1)[:, None]
        others = ((p1 - own) ** 2 - (p2 - own**2)) / 2
        answer += (variances[4] * 2 / 3 / comb(n, 3) if n > 2 else 0.0) * (own * others).T
        answer += (variances[5] + _NUGGET) * shapley_weights(rows)
        return answer

    def _factors(self, k: int) -> NDArray[np.float64]:
        """Factor of each unit in product part ``k``, by what the two coalitions do with it: (2, 2, n_units)."""
        a, b, c = _DIFFERS[k]
        differs = np.array([[a, a + b], [a + b, a + 2 * b + c]])
        decay = self.slopes[k] * differs[:, :, None] * self.relevance
        factors: FloatArray = np.exp(-np.minimum(decay, 600.0))  # bounded, because its logarithm is taken
        return factors


def shapley_weights(rows: BoolArray) -> FloatArray:
    """What each coalition's value counts in each unit's Shapley value; shape (n_units, n_coalitions)."""
    n = rows.shape[1]
    by_size = np.array([1.0 / (n * comb(n - 1, s)) for s in range(n)])  # of v(S + i) - v(S), S of that size
    sizes = rows.sum(axis=1)
    with_it, without = by_size[np.maximum(sizes - 1, 0)], -by_size[np.minimum(sizes, n - 1)]
    return np.asarray(np.where(rows.T, with_it, without), dtype=np.float64)


def _pairs(n: int) -> float:
    return 2.0 * max(comb(n, 2), 1)


def _triples(n: int) -> float:
    return 6.0 * max(comb(n, 3), 1)


def _quadrature(n_units: int) -> tuple[FloatArray, FloatArray]:
    """Nodes and weights on [0, 1] that integrate polynomials of degree n_units - 1 without error."""
    nodes, weights = np.polynomial.legendre.leggauss(n_units // 2 + 1)
    return (nodes + 1) / 2, weights / 2
