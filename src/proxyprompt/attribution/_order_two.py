"""Arithmetic of pairs: exact indices from all coalitions, and a shrunken regression on drawn ones.

Pairs are in the order of ``np.triu_indices(n_units, 1)`` throughout. Matrices of pair features are built in blocks
of rows, never whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import comb, factorial

import numpy as np

from proxyprompt.coalitions import BoolArray, FloatArray
from proxyprompt.errors import InputError

_BLOCK = 512
_PENALTIES = np.logspace(-6.0, 3.0, 37)
_RANK = 1e-10
_LEVERAGE = 1e-8


@dataclass(frozen=True, eq=False)
class OrderTwo:
    """An order-2 surrogate of every query, in powers of ``z - centre``."""

    pairs: FloatArray  # (n_pairs, n_queries)
    main: FloatArray  # (n_units, n_queries)
    intercept: FloatArray  # (n_queries,): value of the surrogate at the empty coalition
    se_pairs: FloatArray  # (n_pairs,): of the mean over queries, because the coalitions are a sample
    df: float
    shrinkage: float


def exact_indices(rows: BoolArray, values: FloatArray, index: str, centre: float) -> OrderTwo:
    """Interaction indices of all pairs from all ``2**n_units`` coalitions, no value missing."""
    n_units = rows.shape[1]
    size = rows.sum(axis=1)
    second, first = _derivative_weights(index, n_units, centre)
    padded = np.concatenate([[0.0, 0.0], second, [0.0, 0.0]])
    both, one, none = padded[size], -padded[size + 1], padded[size + 2]
    linear = rows.T @ ((one - none)[:, None] * values)
    i, j = np.triu_indices(n_units, 1)
    pairs = pair_sums(rows.astype(np.float64), (both - 2 * one + none)[:, None] * values)
    pairs += linear[i] + linear[j] + none @ values
    padded = np.concatenate([[0.0], first, [0.0]])
    holding, lacking = padded[size], padded[size + 1]
    main = rows.T @ ((holding + lacking)[:, None] * values) - lacking @ values
    if index == "faith-banzhaf":
        level = (centre**size * (1 - centre) ** (n_units - size)) @ values
        intercept = level - centre * main.sum(axis=0) + centre**2 * pairs.sum(axis=0)
    else:
        intercept = values[int(np.argmin(size))]
    return OrderTwo(pairs, main, intercept, np.zeros(len(pairs)), float("inf"), 1.0)


def estimated_banzhaf(rows: BoolArray, values: FloatArray, keep: float, weights: FloatArray) -> OrderTwo:
    """Regress values, NaN where missing, on units and shrunken pairs; rows drawn with probability ``keep``."""
    seen = ~np.isnan(values).all(axis=1)
    rows, root = rows[seen], np.sqrt(weights[seen] / weights[seen].mean())
    values = values[seen] * root[:, None]
    spread = keep * (1 - keep)
    # The pair features are products of two columns, so each column carries half of the row's weight.
    units_only = (rows - keep) / np.sqrt(spread)
    psi = units_only * np.sqrt(root)[:, None]
    q, r = np.linalg.qr(root[:, None] * np.column_stack([np.ones(len(psi)), units_only]))
    n_rows, n_units = psi.shape
    if n_rows <= n_units + 1 or np.abs(np.diag(r)).min() < 1e-9 * np.abs(np.diag(r)).max():
        raise InputError(
            f"{n_rows} coalitions do not determine the main effects of {n_units} units.",
            hint="Raise the budget, or repeat the failed calls.",
        )
    smoother = _Smoother.make(psi, q, values, root)
    values = smoother.completed(values)
    weight = smoother.basis @ ((smoother.basis.T @ values) / smoother.stiffness[:, None])
    pairs = pair_sums(psi, weight)
    main = np.linalg.solve(r, q.T @ values - pair_sums(psi, q).T @ pairs)
    gaps = smoother.left_out(values.mean(axis=1))
    reach = pair_sums(psi, smoother.basis) / smoother.stiffness
    variance = np.empty(len(reach))
    for block in _blocks(len(reach)):
        variance[block] = (reach[block] @ smoother.basis.T) ** 2 @ gaps**2
    pairs, units = pairs / spread, main[1:] / np.sqrt(spread)
    intercept = main[0] - keep * units.sum(axis=0) + keep**2 * pairs.sum(axis=0)
    used = float(smoother.filter.sum())
    df = max(n_rows - n_units - 1 - used, 1.0)
    return OrderTwo(pairs, units, intercept, np.sqrt(variance) / spread, df, used / len(pairs))


def pair_sums(z: FloatArray, weights: FloatArray) -> FloatArray:
    """``sum_r z_ri z_rj weights_rq`` for each pair: shape (n_pairs, n_columns)."""
    i, j = np.triu_indices(z.shape[1], 1)
    total = np.zeros((len(i), weights.shape[1]))
    for block in _blocks(len(z)):
        total += (z[block][:, i] * z[block][:, j]).T @ weights[block]
    return total


def pair_values(z: FloatArray, pairs: FloatArray) -> FloatArray:
    """``sum_ij z_ri z_rj pairs_ijq``: shape (n_rows, n_columns)."""
    i, j = np.triu_indices(z.shape[1], 1)
    found = np.empty((len(z), pairs.shape[1]))
    for block in _blocks(len(z)):
        found[block] = (z[block][:, i] * z[block][:, j]) @ pairs
    return found


@dataclass(frozen=True, eq=False)
class _Smoother:
    """Least squares on ``q``, ridge on the pairs beyond it: fitted = (q q' + basis filter basis') values."""

    q: FloatArray  # (n_rows, n_units + 1): orthonormal basis of constant and units
    basis: FloatArray  # (n_rows, rank): of the pairs, orthonormal, orthogonal to q
    power: FloatArray  # (rank,): squared singular values of the pair features beyond q
    penalty: float

    @classmethod
    def make(cls, psi: FloatArray, q: FloatArray, values: FloatArray, root: FloatArray) -> _Smoother:
        """Choose the penalty by leave-one-out error of the mean over queries, those that lack nothing if they are half."""
        basis, power = _pair_basis(psi, q)
        whole = ~np.isnan(values).any(axis=0)
        if 2 * whole.sum() >= values.shape[1]:
            target = values[:, whole].mean(axis=1)
        else:  # levels apart, or which queries a row lacks would look like its value
            plain = values / root[:, None]
            target = root * np.nanmean(plain - np.nanmean(plain, axis=0), axis=1)
        penalties = _PENALTIES * (power.max() if len(power) else 1.0)
        if len(power) == psi.shape[1] * (psi.shape[1] - 1) // 2:
            penalties = np.r_[0.0, penalties]
        chosen, least = None, np.inf
        beyond = target - q @ (q.T @ target)
        along, squares, free = basis.T @ target, basis**2, 1 - (q**2).sum(axis=1)
        for penalty in penalties:
            kept = power / (power + penalty)
            freedom = free - squares @ kept
            if freedom.min() < _LEVERAGE:
                continue
            error = float((((beyond - basis @ (kept * along)) / freedom) ** 2).mean())
            if error < least:
                chosen, least = float(penalty), error
        if chosen is None:
            raise InputError(
                f"Some unit rests on one of the {len(psi)} coalitions alone: no error can be judged.",
                hint="Raise the budget.",
            )
        return cls(q, basis, power, chosen)

    @property
    def stiffness(self) -> FloatArray:
        return self.power + self.penalty

    @property
    def filter(self) -> FloatArray:
        return self.power / self.stiffness

    @property
    def freedom(self) -> FloatArray:
        """One minus the leverage of each row."""
        freedom: FloatArray = 1 - (self.q**2).sum(axis=1) - self.basis**2 @ self.filter
        return freedom

    def left_out(self, target: FloatArray) -> FloatArray:
        """Residual of each row when the fit lacks that row."""
        fitted = self.q @ (self.q.T @ target) + self.basis @ (self.filter * (self.basis.T @ target))
        gaps: FloatArray = (target - fitted) / self.freedom
        return gaps

    def completed(self, values: FloatArray) -> FloatArray:
        """Missing values replaced by what the fit without them predicts, which leaves that fit unchanged."""
        values = values.copy()
        for query in np.flatnonzero(np.isnan(values).any(axis=0)):
            lacking = np.isnan(values[:, query])
            reach = self.q[lacking] @ self.q.T + (self.basis[lacking] * self.filter) @ self.basis.T
            own = np.eye(int(lacking.sum())) - reach[:, lacking]
            if np.linalg.svd(own, compute_uv=False).min() < _LEVERAGE:
                raise InputError(
                    f"Query {query} of those kept lacks {int(lacking.sum())} coalitions, and the others do not "
                    "determine the units.",
                    hint="Repeat the failed calls, or raise the budget.",
                )
            values[lacking, query] = np.linalg.solve(own, reach[:, ~lacking] @ values[~lacking, query])
        return values


def _pair_basis(psi: FloatArray, q: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Left singular vectors and squared singular values of the pair features, ``q`` projected out."""
    n_rows, n_units = psi.shape
    i, j = np.triu_indices(n_units, 1)
    if len(i) >= n_rows:
        kernel = ((psi @ psi.T) ** 2 - psi**2 @ (psi**2).T) / 2
        kernel -= q @ (q.T @ kernel)
        kernel -= (kernel @ q) @ q.T
        power, basis = np.linalg.eigh((kernel + kernel.T) / 2)
        firm = power > _RANK * power.max()
        return basis[:, firm], power[firm]
    along = pair_sums(psi, q)
    gram = -along @ along.T
    for block in _blocks(n_rows):
        features = psi[block][:, i] * psi[block][:, j]
        gram += features.T @ features
    power, directions = np.linalg.eigh(gram)
    firm = power > _RANK * power.max(initial=1.0)
    power, directions = power[firm], directions[:, firm]
    beyond = pair_values(psi, directions) - q @ (along.T @ directions)
    return beyond / np.sqrt(power), power


def _derivative_weights(index: str, n_units: int, keep: float) -> tuple[FloatArray, FloatArray]:
    """Weights of the second differences by size 0..n-2, and of the first differences by size 0..n-1."""
    n = n_units
    if index == "faith-banzhaf":
        second = [keep**s * (1 - keep) ** (n - 2 - s) for s in range(n - 1)]
        return np.array(second), np.array([keep**s * (1 - keep) ** (n - 1 - s) for s in range(n)])
    first = [1 / (n * comb(n - 1, s)) for s in range(n)]
    if index == "sii":
        return np.array([1 / ((n - 1) * comb(n - 2, s)) for s in range(n - 1)]), np.array(first)
    faithful = [6 * factorial(s + 1) * factorial(n - s - 1) / factorial(n + 1) for s in range(n - 1)]
    return np.array(faithful), np.array(first)


def _blocks(length: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, length, _BLOCK))
