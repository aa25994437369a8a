"""Coalition matrices: which units of a prompt are kept, one boolean row per coalition.

Everything here returns booleans of shape ``(n_coalitions, n_units)``; ``True`` keeps the unit. Nothing
here knows what a unit is. Every function that draws takes ``rng`` and uses no other source of chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations, islice
from math import comb

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import InputError

__all__ = [
    "MAX_ENUMERATED_UNITS",
    "bernoulli_coalitions",
    "enumerate_coalitions",
    "leave_one_out_coalitions",
    "outside_in_coalitions",
    "row_keys",
    "shapley_kernel_coalitions",
    "uniform_coalitions",
]

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]

MAX_ENUMERATED_UNITS = 20
"""Largest number of units whose ``2**n_units`` coalitions are listed (about 20 MB of booleans)."""


# Up to so many units all coalitions are listed and drawn from; drawing until enough are distinct could take long.
_SMALL = 12


def enumerate_coalitions(n_units: int) -> BoolArray:
    """List all ``2**n_units`` coalitions.

    Parameters
    ----------
    n_units : int
        Number of units, 1 to ``MAX_ENUMERATED_UNITS``.

    Returns
    -------
    ndarray of bool, shape (2**n_units, n_units)
        Row ``k`` keeps unit ``i`` when bit ``i`` of ``k`` is set: row 0 is empty, the last row is full.

    Raises
    ------
    InputError
        When ``n_units`` is below 1 or above ``MAX_ENUMERATED_UNITS``.

    Examples
    --------
    >>> enumerate_coalitions(2).astype(int).tolist()
    [[0, 0], [1, 0], [0, 1], [1, 1]]
    """
    n_units = check_n_units(n_units)
    if n_units > MAX_ENUMERATED_UNITS:
        raise InputError(
            f"n_units={n_units}: listing all coalitions is limited to {MAX_ENUMERATED_UNITS} units "
            f"(2**{n_units} rows).",
            hint="Sample instead, with shapley_kernel_coalitions or uniform_coalitions.",
        )
    codes = np.arange(2**n_units, dtype=np.int64)
    bits: BoolArray = (codes[:, None] >> np.arange(n_units)) & 1 == 1
    return bits


def leave_one_out_coalitions(n_units: int) -> BoolArray:
    """List the coalitions that leave-one-out needs.

    Parameters
    ----------
    n_units : int
        Number of units, at least 1.

    Returns
    -------
    ndarray of bool, shape (n_units + 2, n_units)
        The empty coalition, the full one, then the full one without unit 0, 1, ... For one unit the
        third row would repeat the first, and the shape is (2, 1).

    Raises
    ------
    InputError
        When ``n_units`` is below 1.

    Examples
    --------
    >>> leave_one_out_coalitions(2).astype(int).tolist()
    [[0, 0], [1, 1], [0, 1], [1, 0]]
    """
    n_units = check_n_units(n_units)
    ends = _ends(n_units)
    return ends if n_units == 1 else np.vstack([ends, ~np.eye(n_units, dtype=bool)])


def shapley_kernel_coalitions(
    n_units: int, budget: int, *, rng: np.random.Generator
) -> tuple[BoolArray, FloatArray]:
    """Draw distinct coalitions for KernelSHAP, with the weights its regression needs.

    Parameters
    ----------
    n_units : int
        Number of units, at least 1.
    budget : int
        Largest number of rows, at least 2. Rows past the first two come as complement pairs, so an odd
        budget leaves one row unused; from ``2**n_units`` on, all coalitions are returned.
    rng : numpy.random.Generator
        The only source of chance.

    Returns
    -------
    coalitions : ndarray of bool, shape (n_coalitions, n_units)
        Distinct rows, ``n_coalitions <= budget``. Row 0 is empty, row 1 full; rows ``2k`` and ``2k + 1``
        are complements of each other.
    weights : ndarray of float64, shape (n_coalitions,)
        Regression weights, summing to 1 (to 0 for one unit). Rows 0 and 1 carry 0: they enter the
        regression as exact constraints, where the Shapley kernel is infinite.

    Raises
    ------
    InputError
        When ``n_units`` is below 1 or ``budget`` below 2.

    Notes
    -----
    The Shapley kernel gives a coalition of size ``s`` the weight ``(n-1) / (C(n,s) s (n-s))`` [1]_,
    hence all coalitions of that size together a mass proportional to ``1 / (s (n-s))``. Sizes ``s`` and
    ``n-s`` form one class. From the outside in, a class is listed completely while its share of the
    remaining budget is at least its number of rows, the rule of the reference KernelSHAP; each of its
    rows then weighs its exact share of the mass. What is left of the budget goes to the remaining
    classes in proportion to their mass by systematic sampling (each class gets its share rounded up or
    down, its expectation exact), and within a class complement pairs [2]_ are drawn without
    replacement. Each sampled row weighs (remaining mass) / (number of sampled rows), the inverse of
    its inclusion probability times its kernel weight, so that weighted sums over the rows are unbiased
    for the sums over all coalitions.

    Departures: the reference draws with replacement and counts repeats; here no coalition is paid for
    twice. And from ``2 n + 2`` to ``4 n - 1`` coalitions the class of single units is listed first even
    where its share is smaller. Purely random rows are there nearly as few as the units, and the
    regression nearly singular: on games with interactions of 24 and 64 units the mean squared error of
    the Shapley values fell 2 to 5 times at ``2.3 n`` to ``3 n`` coalitions and over 20 times at ``2.1 n``;
    at ``4 n`` the plain rule is as good or better.

    References
    ----------
    .. [1] Lundberg & Lee, "A Unified Approach to Interpreting Model Predictions", 2017, Theorem 2.
    .. [2] Covert & Lee, "Improving KernelSHAP: Practical Shapley Value Estimation Using Linear
       Regression", 2021, section 4.2 (paired sampling).

    Examples
    --------
    >>> rows, weights = shapley_kernel_coalitions(8, 40, rng=np.random.default_rng(0))
    >>> rows.shape, bool((rows[2] == ~rows[3]).all()), round(float(weights.sum()), 12)
    ((40, 8), True, 1.0)
    """
    n_units = check_n_units(n_units)
    if budget < 2:
        raise InputError(
            f"budget={budget}: at least 2 coalitions are needed, the empty and the full one.",
            hint="Raise the budget.",
        )
    halves: list[BoolArray] = []
    weights: list[FloatArray] = []
    for rows, weight in _classes(n_units, budget, rng):
        halves.append(rows)
        weights.append(np.full(2 * len(rows), weight))
    if not halves:
        return _ends(n_units), np.zeros(2)
    all_weights = np.concatenate([np.zeros(2), *weights])
    return np.vstack([_ends(n_units), _paired(halves, n_units)]), all_weights / all_weights.sum()


def outside_in_coalitions(n_units: int, budget: int, *, rng: np.random.Generator) -> BoolArray:
    """Draw distinct complement pairs, whole sizes from the smallest and largest coalitions inward.

    Parameters
    ----------
    n_units : int
        Number of units, at least 1.
    budget : int
        Largest number of rows, at least 2; an odd one leaves a row unused. From ``2**n_units`` on, all coalitions are
        returned.
    rng : numpy.random.Generator
        The only source of chance.

    Returns
    -------
    ndarray of bool, shape (n_coalitions, n_units)
        Distinct rows in the order of :func:`shapley_kernel_coalitions`: row 0 is empty, row 1 full, rows ``2k`` and
        ``2k + 1`` are complements of each other.

    Raises
    ------
    InputError
        When ``n_units`` is below 1 or ``budget`` below 2.

    Notes
    -----
    Sizes ``s`` and ``n - s`` form one class. From the outside in, a class is listed while the budget holds all of it;
    the rest goes to the remaining classes in proportion to ``1 / (s (n - s))``, as in
    :func:`shapley_kernel_coalitions`. A coalition's weight in the Shapley value falls steeply from the outside
    in, and whole classes determine low-order interactions, which is what a regression that models interactions
    needs; one that takes them for noise does better with :func:`shapley_kernel_coalitions`.

    Examples
    --------
    >>> outside_in_coalitions(5, 20, rng=np.random.default_rng(0)).sum(axis=1)[:12].tolist()
    [0, 5, 1, 4, 1, 4, 1, 4, 1, 4, 1, 4]
    """
    n_units = check_n_units(n_units)
    if budget < 2:
        raise InputError(
            f"budget={budget}: at least 2 coalitions are needed, the empty and the full one.",
            hint="Raise the budget.",
        )
    halves = [rows for rows, _ in _classes(n_units, budget, rng, whole_first=True)]
    return np.vstack([_ends(n_units), _paired(halves, n_units)])


def uniform_coalitions(
    n_units: int, n: int, *, rng: np.random.Generator, exclude: ArrayLike | None = None
) -> BoolArray:
    """Draw distinct coalitions that keep each unit with probability one half.

    Parameters
    ----------
    n_units : int
        Number of units, at least 1.
    n : int
        Number of rows wanted, at least 1.
    rng : numpy.random.Generator
        The only source of chance.
    exclude : array_like of bool, shape (n_excluded, n_units), optional
        Coalitions that must not be drawn, such as those a surrogate was fitted on.

    Returns
    -------
    ndarray of bool, shape (n, n_units)
        Distinct rows, uniform over all coalitions that are not excluded.

    Raises
    ------
    InputError
        When fewer than ``n`` coalitions are left, or a shape is wrong.

    Examples
    --------
    >>> uniform_coalitions(10, 5, rng=np.random.default_rng(0)).shape
    (5, 10)
    """
    n_units = check_n_units(n_units)
    if n < 1:
        raise InputError(f"n={n}: at least 1 coalition must be asked for.", hint="Pass n >= 1.")
    excluded = np.zeros((0, n_units), dtype=bool) if exclude is None else check_coalitions(exclude, "exclude")
    if excluded.shape[1] != n_units:
        raise InputError(
            f"exclude has {excluded.shape[1]} units, n_units={n_units}.", hint="Use rows of the same prompt."
        )
    seen = set(row_keys(excluded))
    available = 2**n_units - len(seen)
    if n > available:
        raise InputError(
            f"n={n}: only {available} coalitions of {n_units} units are left, {len(seen)} being excluded.",
            hint="Ask for fewer, or exclude fewer.",
        )
    if n_units <= MAX_ENUMERATED_UNITS and 2 * (n + len(seen)) > 2**n_units:
        everything = enumerate_coalitions(n_units)
        allowed = [i for i, key in enumerate(row_keys(everything)) if key not in seen]
        chosen: BoolArray = everything[rng.permutation(allowed)[:n]]
        return chosen

    def draw(size: int) -> BoolArray:
        return rng.random((size, n_units)) < 0.5

    return _draw_distinct(draw, n, seen)


def bernoulli_coalitions(
    n_units: int, n: int, *, keep: float, rng: np.random.Generator, exclude: ArrayLike | None = None
) -> BoolArray:
    """Draw distinct coalitions that keep each unit with probability ``keep``, independently.

    Parameters
    ----------
    n_units, n, rng, exclude
        As for :func:`uniform_coalitions`, which is the case of one half.
    keep : float
        In (0, 1); near 1 the coalitions stay close to the full prompt.

    Returns
    -------
    ndarray of bool, shape (n, n_units)

    Raises
    ------
    InputError
        When ``keep`` is out of range, fewer than ``n`` coalitions are left, or a shape is wrong.

    Examples
    --------
    >>> rows = bernoulli_coalitions(20, 50, keep=0.8, rng=np.random.default_rng(0))
    >>> rows.shape, bool(rows.mean() > 0.75)
    ((50, 20), True)
    """
    if not 0 < keep < 1:
        raise InputError(
            f"keep={keep}: a probability strictly between 0 and 1 is needed.", hint="0.8 is usual."
        )
    n_units = check_n_units(n_units)
    if n_units > _SMALL or n < 1:
        excluded = (
            np.zeros((0, n_units), dtype=bool) if exclude is None else check_coalitions(exclude, "exclude")
        )
        if n >= 1 and excluded.shape[1] == n_units:
            return _draw_distinct(lambda size: rng.random((size, n_units)) < keep, n, set(row_keys(excluded)))
    allowed = uniform_coalitions(n_units, n, rng=rng, exclude=exclude)  # raises what is wrong
    everything = enumerate_coalitions(n_units)
    banned = set() if exclude is None else set(row_keys(check_coalitions(exclude, "exclude")))
    free = everything[[key not in banned for key in row_keys(everything)]]
    kept = free.sum(axis=1)
    chance = keep**kept * (1 - keep) ** (n_units - kept)
    chosen: BoolArray = free[rng.choice(len(free), size=len(allowed), replace=False, p=chance / chance.sum())]
    return chosen


def row_keys(coalitions: BoolArray) -> list[bytes]:
    """One hashable key per row, equal when the rows are equal.

    Parameters
    ----------
    coalitions : ndarray of bool, shape (n_coalitions, n_units)

    Returns
    -------
    list of bytes, length n_coalitions
    """
    return [row.tobytes() for row in np.packbits(coalitions, axis=1)]


def check_n_units(n_units: int) -> int:
    """Return ``n_units`` as a Python integer of at least 1, or raise InputError."""
    if isinstance(n_units, bool) or not isinstance(n_units, int | np.integer) or n_units < 1:
        raise InputError(
            f"n_units={n_units!r}: an integer of at least 1 is needed.", hint="Pass the number of units."
        )
    return int(n_units)  # numpy integers would overflow in 2**n_units


def check_coalitions(coalitions: ArrayLike, name: str = "coalitions") -> BoolArray:
    """Return ``coalitions`` as a boolean matrix, or raise InputError."""
    array = np.asarray(coalitions)
    if array.dtype != np.bool_:
        raise InputError(
            f"{name} has dtype {array.dtype}: coalitions are boolean, True keeps the unit.",
            hint=f"Pass {name}.astype(bool) if it holds zeros and ones.",
        )
    if array.ndim != 2 or array.shape[1] < 1:
        raise InputError(
            f"{name} has shape {array.shape}: (n_coalitions, n_units) is needed.", hint="Reshape it."
        )
    return array


def _ends(n_units: int) -> BoolArray:
    return np.vstack([np.zeros(n_units, dtype=bool), np.ones(n_units, dtype=bool)])


def _paired(halves: list[BoolArray], n_units: int) -> BoolArray:
    """Each row of the halves, followed by its complement."""
    half = np.vstack([np.zeros((0, n_units), dtype=bool), *halves])
    paired = np.empty((2 * len(half), n_units), dtype=bool)
    paired[0::2], paired[1::2] = half, ~half
    return paired


def _classes(
    n_units: int, budget: int, rng: np.random.Generator, *, whole_first: bool = False
) -> Iterator[tuple[BoolArray, float]]:
    """Yield (rows, weight of each row and of its complement) per size class, from the outside in."""
    sizes = list(range(1, n_units // 2 + 1))
    mass = {s: (1.0 if 2 * s == n_units else 2.0) / (s * (n_units - s)) for s in sizes}
    pairs = {s: comb(n_units, s) // (2 if 2 * s == n_units else 1) for s in sizes}
    left = min((budget - 2) // 2, sum(pairs.values()))
    # The single units first when pairs are few: a nearly square random design is nearly singular.
    scarce = bool(sizes) and n_units <= left < 2 * n_units - 1
    while sizes and (
        scarce
        or (whole_first and left >= pairs[sizes[0]])
        or left * mass[sizes[0]] >= pairs[sizes[0]] * sum(mass[s] for s in sizes) * (1 - 1e-12)
    ):
        scarce = False
        s = sizes.pop(0)
        left -= pairs[s]
        yield _first_subsets(n_units, s, pairs[s]), mass[s] / (2 * pairs[s])
    if not sizes or left == 0:
        return
    remaining = sum(mass[s] for s in sizes)
    edges = np.cumsum([mass[s] for s in sizes]) * (left / remaining)
    edges[-1] = left
    # One uniform shift for all classes: each count is its share rounded up or down, unbiased.
    ends = np.floor(edges + rng.random()).astype(int)
    ends[-1] = left
    for s, count in zip(sizes, np.diff(ends, prepend=0), strict=True):
        if count:
            yield _some_subsets(n_units, s, int(count), pairs[s], rng), remaining / (2 * left)


def _first_subsets(n_units: int, size: int, count: int) -> BoolArray:
    """List ``count`` subsets of one size; for half the units, the first half holds one of each pair."""
    members = np.array(list(islice(combinations(range(n_units), size), count)))
    rows = np.zeros((count, n_units), dtype=bool)
    np.put_along_axis(rows, members, True, axis=1)
    return rows


def _some_subsets(n_units: int, size: int, count: int, pairs: int, rng: np.random.Generator) -> BoolArray:
    """Draw ``count`` of the ``pairs`` subsets of one size, no two of them equal or complements."""
    if 2 * count > pairs:
        return _first_subsets(n_units, size, pairs)[rng.permutation(pairs)[:count]]

    def draw(n_draws: int) -> BoolArray:
        members = np.argsort(rng.random((n_draws, n_units)), axis=1)[:, :size]
        rows = np.zeros((n_draws, n_units), dtype=bool)
        np.put_along_axis(rows, members, True, axis=1)
        if 2 * size == n_units:
            rows ^= ~rows[:, :1]
        return rows

    return _draw_distinct(draw, count, set())


def _draw_distinct(draw: Callable[[int], BoolArray], n: int, seen: set[bytes]) -> BoolArray:
    """Collect ``n`` rows of ``draw(size)`` that are new, in the order drawn."""
    seen = set(seen)
    kept: list[BoolArray] = []
    while len(kept) < n:
        rows = draw(2 * (n - len(kept)) + 8)
        for row, key in zip(rows, row_keys(rows), strict=True):
            if key not in seen and len(kept) < n:
                seen.add(key)
                kept.append(row)
    return np.array(kept)
