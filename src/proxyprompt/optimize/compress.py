"""Remove as many demonstrations as the target model allows [PE 5.1].

Candidates lie on a nested path: demonstrations leave in order of increasing attribution. The target is asked
for its performance at some points of the path on the selection split; the largest cut whose performance stays
at ``tau`` times that of the full prompt is the choice. Performance here is a point estimate on queries that
choose; what may be claimed is for :mod:`proxyprompt.optimize.certificate` and its sealed queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from proxyprompt.errors import InputError
from proxyprompt.value_function import Values

__all__ = ["Compression", "PathPoint", "compress", "interval", "nested_path"]

# Each candidate costs the target the whole sealed split.
_MOST_CANDIDATES = 5

EvaluateTarget: TypeAlias = Callable[[NDArray[np.bool_]], Values]


@dataclass(frozen=True)
class PathPoint:
    """Performance of the target with one coalition of the path.

    Attributes
    ----------
    kept : bool (n_units,)
    performance : float
        Mean over queries; higher is better.
    low, high : float
        95 % interval of that mean.
    difference : float
        Mean of ``performance - tau * performance of the reference``, paired by query.
    difference_se : float
    tokens : float
        Mean tokens of the rendered prompts; 0 where not known.
    """

    kept: NDArray[np.bool_]
    performance: float
    low: float
    high: float
    difference: float
    difference_se: float
    tokens: float

    @property
    def n_kept(self) -> int:
        """Number of demonstrations left."""
        return int(self.kept.sum())

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form."""
        return {
            "kept": [int(i) for i in np.flatnonzero(self.kept)],
            "performance": self.performance,
            "low": self.low,
            "high": self.high,
            "difference": self.difference,
            "difference_se": self.difference_se,
            "tokens": self.tokens,
        }


@dataclass(frozen=True)
class Compression:
    """The measured path and the choice.

    Attributes
    ----------
    full : PathPoint
        The deployed prompt.
    reference : float
        Performance that ``tau`` is a share of: the better of the full and the cleaned prompt.
    points : tuple of PathPoint
        Measured points of the path, from most to fewest demonstrations.
    chosen : PathPoint
        Fewest demonstrations with ``difference >= 0`` (the paper's rule).
    candidates : tuple of PathPoint
        Nested, from most to fewest demonstrations, ending with ``chosen``: what to certify, in this order.
    tau : float
    n_queries : int
    """

    full: PathPoint
    reference: float
    points: tuple[PathPoint, ...]
    chosen: PathPoint
    candidates: tuple[PathPoint, ...]
    tau: float
    n_queries: int

    @property
    def cleaned_is_better(self) -> bool:
        """Whether the bar is the cleaned prompt, not the full one."""
        return self.reference > self.full.performance

    @property
    def compression_ratio(self) -> float:
        """``1 - |S_kept| / |S|`` [PE 5.1] of the choice."""
        n = len(self.full.kept)
        return 1.0 - self.chosen.n_kept / n if n else 0.0


def nested_path(
    scores: NDArray[np.float64], start: NDArray[np.bool_], *, protected: tuple[int, ...] = ()
) -> NDArray[np.bool_]:
    """Coalitions from ``start`` down to the empty one, lowest score leaving first.

    Parameters
    ----------
    scores : float (n_units,)
        Attribution; higher stays longer. Ties leave from the end of the prompt first.
    start : bool (n_units,)
        The prompt before compression, e.g. cleaned.
    protected : tuple of int
        Units that never leave.

    Returns
    -------
    bool (n_steps + 1, n_units)
    """
    kept = np.asarray(start, dtype=np.bool_).copy()
    order = sorted(
        (int(i) for i in np.flatnonzero(kept) if i not in protected), key=lambda i: (scores[i], -i)
    )
    rows = [kept.copy()]
    for unit in order:
        kept[unit] = False
        rows.append(kept.copy())
    return np.array(rows, dtype=np.bool_)


def compress(
    path: NDArray[np.bool_],
    evaluate: EvaluateTarget,
    *,
    tau: float = 0.9,
    max_evaluations: int = 12,
) -> Compression:
    """Measure the target along a nested path and choose the largest cut.

    Parameters
    ----------
    path : bool (n_steps, n_units)
        From :func:`nested_path`.
    evaluate : callable
        Target values of coalitions of the whole prompt, on the selection split.
    tau : float
        Share of the reference performance that must remain, in (0, 1].
    max_evaluations : int
        Points of the path to measure: an even grid first, then halving between the choice and the next
        smaller point that failed.

    Returns
    -------
    Compression
    """
    if not 0.0 < tau <= 1.0:
        raise InputError(f"tau: got {tau!r}; it lies in (0, 1].")
    if max_evaluations < 2:
        raise InputError(f"max_evaluations: got {max_evaluations!r}; at least 2 (both ends of the path).")
    last = len(path) - 1
    whole = np.ones((1, path.shape[1]), dtype=np.bool_)
    n_grid = min(last + 1, max(2, (2 * max_evaluations) // 3))
    grid = sorted({round(float(x)) for x in np.linspace(0, last, n_grid)})
    values = evaluate(np.vstack([whole, path[grid]]))
    values.require_complete("measuring the path on the target")
    reference = max(values.performance[:2], key=lambda row: float(np.nanmean(row)))
    full = _point(whole[0], values.performance[0], reference, tau, values.prompt_tokens[0])
    measured = {
        step: _point(path[step], values.performance[1 + k], reference, tau, values.prompt_tokens[1 + k])
        for k, step in enumerate(grid)
    }
    while len(measured) < min(max_evaluations, last + 1):
        step = _next_step(measured, last)
        if step is None:
            break
        more = evaluate(path[[step]])
        measured[step] = _point(path[step], more.performance[0], reference, tau, more.prompt_tokens[0])
    chosen = _chosen(measured)
    return Compression(
        full=full,
        reference=float(np.nanmean(reference)),
        points=tuple(measured[s] for s in sorted(measured)),
        chosen=measured[chosen],
        candidates=_candidates(measured, chosen),
        tau=tau,
        n_queries=len(reference),
    )


def _chosen(measured: dict[int, PathPoint]) -> int:
    good = [step for step, point in measured.items() if point.difference >= 0]
    return max(good, default=min(measured))


def _next_step(measured: dict[int, PathPoint], last: int) -> int | None:
    """Halve the gap between the choice and the next smaller measured prompt."""
    chosen = _chosen(measured)
    below = min((s for s in measured if s > chosen), default=None)
    if below is None or below - chosen < 2:
        return None
    return (chosen + below) // 2


def _candidates(measured: dict[int, PathPoint], chosen: int) -> tuple[PathPoint, ...]:
    """The cleaned start, the choice, and some measured steps between them that held the line."""
    good = sorted(
        {min(measured), *(s for s, p in measured.items() if s <= chosen and p.difference >= 0), chosen}
    )
    picks = np.linspace(0, len(good) - 1, min(len(good), _MOST_CANDIDATES))
    return tuple(measured[good[round(float(k))]] for k in picks)


def _point(
    kept: NDArray[np.bool_],
    performance: NDArray[np.float64],
    reference: NDArray[np.float64],
    tau: float,
    tokens: NDArray[np.int64],
) -> PathPoint:
    both = ~np.isnan(performance) & ~np.isnan(reference)
    d = performance[both] - tau * reference[both]
    low, high = interval(performance)
    known = tokens[tokens > 0]
    return PathPoint(
        kept=kept.copy(),
        performance=float(np.nanmean(performance)),
        low=low,
        high=high,
        difference=float(d.mean()),
        difference_se=float(d.std(ddof=1) / np.sqrt(len(d))) if len(d) > 1 else 0.0,
        tokens=float(known.mean()) if len(known) else 0.0,
    )


def interval(performance: NDArray[np.float64], *, level: float = 0.95) -> tuple[float, float]:
    """Two-sided interval for the mean of scores in [0, 1]: Wilson's for 0/1 values, else Student's, clipped.

    Parameters
    ----------
    performance : float (n_queries,)
        NaN entries are left out.
    level : float

    References
    ----------
    E. B. Wilson (1927), Journal of the American Statistical Association 22, 209-212.
    """
    from scipy.stats import norm, t

    x = performance[~np.isnan(performance)]
    n = len(x)
    if n == 0:
        return 0.0, 1.0
    mean = float(x.mean())
    if np.isin(x, (0.0, 1.0)).all():
        z = float(norm.isf((1 - level) / 2))
        centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * np.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
        return max(0.0, float(centre - half)), min(1.0, float(centre + half))
    if n == 1:
        return 0.0, 1.0
    half = float(t.isf((1 - level) / 2, n - 1) * x.std(ddof=1) / np.sqrt(n))
    return max(0.0, mean - half), min(1.0, mean + half)
