"""Remove as many demonstrations as the target model allows [PE 5.1], for few target calls.

Candidates lie on a nested path. The target is asked for some points of it on the selection split, from the
smallest prompt up, a block of queries at a time, and a point is left as soon as it is clear on which side of the line
the whole split would put it. The smallest prompt that holds the line is the choice. Performance here is a point
estimate on queries that choose; what may be claimed is for :mod:`proxyprompt.optimize.certificate` and its sealed
queries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from proxyprompt.errors import InputError
from proxyprompt.value_function import Values

from ._early import side_of_line
from .requirement import Requirement

__all__ = ["Compression", "EvaluateTarget", "PathPoint", "compress", "interval", "measured_point"]

_BETWEEN = 2
"""Points between start and choice that are proposed as well; each costs the target the whole sealed split."""


class EvaluateTarget(Protocol):
    """Ask the target model for coalitions of the whole prompt."""

    def __call__(self, rows: NDArray[np.bool_], queries: NDArray[np.int64] | None = None, /) -> Values:
        """Values on the queries with these indices into the split; ``None``: on all."""
        ...


@dataclass(frozen=True)
class PathPoint:
    """Performance of the target with one coalition of the path.

    Attributes
    ----------
    kept : bool (n_units,)
    performance : float
        Mean over the queries asked; higher is better.
    low, high : float
        95 % interval of that mean.
    difference : float
        How far above the line, paired by query: mean of ``performance - reference's performance`` over the queries
        asked, plus what may be lost. 0 or more holds the line.
    difference_se : float
    tokens : float
        Mean tokens of the rendered prompts; 0 where not known.
    n_queries : int
        Queries asked; fewer than the split has where it was clear before.
    holds : bool
        Whether the point holds the line.
    """

    kept: NDArray[np.bool_]
    performance: float
    low: float
    high: float
    difference: float
    difference_se: float
    tokens: float
    n_queries: int
    holds: bool

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
            "n_queries": self.n_queries,
            "holds": self.holds,
        }


@dataclass(frozen=True)
class Compression:
    """The measured path and the choice.

    Attributes
    ----------
    full : PathPoint
        The deployed prompt.
    zero_shot : PathPoint
        The prompt without any demonstration, whether or not it lies on the path.
    reference : float
        Performance from which the requirement counts: that of the better of the full and the cleaned prompt.
    points : tuple of PathPoint
        Measured points of the path, from most to fewest demonstrations.
    chosen : PathPoint
        Fewest demonstrations that hold the line (the paper's rule).
    candidates : tuple of PathPoint
        Nested, from most to fewest demonstrations, ending with ``chosen``: what to certify, in this order.
    requirement : Requirement
    n_queries : int
        Size of the split.
    cap : PathPoint or None
        The first point of the path that obeys the caps, asked on the whole split; ``None``: no cap, or none obeys.
    calls, calls_saved : int
        Answers asked for along the path, and those that were not needed because it was clear before.
    """

    full: PathPoint
    zero_shot: PathPoint
    reference: float
    points: tuple[PathPoint, ...]
    chosen: PathPoint
    candidates: tuple[PathPoint, ...]
    requirement: Requirement
    n_queries: int
    cap: PathPoint | None = None
    calls: int = 0
    calls_saved: int = 0

    @property
    def line(self) -> float:
        """Performance that has to be held on the selection split."""
        return self.requirement.line(self.reference)

    @property
    def cleaned_is_better(self) -> bool:
        """Whether the bar is the cleaned prompt, not the full one."""
        return self.reference > self.full.performance

    @property
    def compression_ratio(self) -> float:
        """``1 - |S_kept| / |S|`` [PE 5.1] of the choice."""
        n = len(self.full.kept)
        return 1.0 - self.chosen.n_kept / n if n else 0.0


def compress(
    path: NDArray[np.bool_],
    evaluate: EvaluateTarget,
    *,
    requirement: Requirement,
    rng: np.random.Generator,
    max_evaluations: int = 12,
    level: float = 0.1,
    block: int | None = None,
    cap: int | None = None,
) -> Compression:
    """Measure the target along a nested path and choose the largest cut.

    Parameters
    ----------
    path : bool (n_steps, n_units)
        From :func:`~proxyprompt.optimize.path.nested_path` or ``surrogate_path``.
    evaluate : callable
        Target values of coalitions of the whole prompt, on the selection split.
    requirement : Requirement
    rng : numpy.random.Generator
        Order in which queries are asked.
    max_evaluations : int
        Points of the path to measure.
    level : float
        In [0, 1). Chance, over the order of the queries, with which a point may be left on another side of the
        line than the whole split would put it; 0 leaves a point only when no further answer could change that.
    block : int, optional
        Queries asked at once; by default a quarter of the split, and at least ten.
    cap : int, optional
        Step of the path that is measured in any case, on the whole split: the first that obeys the user's caps.

    Returns
    -------
    Compression

    Raises
    ------
    InputError
        When an argument is out of range.
    InconclusiveError
        Too many answers missing.

    Notes
    -----
    The full, the cleaned and the empty prompt are asked on the whole split. Then an even grid over the path is
    gone through from the smallest prompt up, to the first point that holds; larger points of the grid cannot be the
    choice and are not asked. The gap below that point is halved while evaluations are left. Two points between the
    start and the choice are measured last, to have something to certify should the choice fail there.
    """
    if max_evaluations < 2:
        raise InputError(f"max_evaluations: got {max_evaluations!r}; at least 2 (both ends of the path).")
    if not 0.0 <= level < 1.0:
        raise InputError(f"level: got {level!r}; it lies in [0, 1).")
    search = _Search.begin(path, evaluate, requirement, rng, level, block)
    last = len(path) - 1
    if cap is not None:
        search.measure(cap, whole=True)
    n_grid = min(last + 1, max(2, (2 * max_evaluations) // 3))
    for step in sorted({round(float(x)) for x in np.linspace(0, last, n_grid)}, reverse=True):
        if len(search.found) < max_evaluations and search.measure(step).holds:
            break
    while len(search.found) < max_evaluations:
        below = min((s for s in search.found if s > search.chosen), default=None)
        if below is None or below - search.chosen < 2:
            break
        search.measure((search.chosen + below) // 2)
    chosen = search.chosen
    between = sorted({round(float(x)) for x in np.linspace(0, chosen, _BETWEEN + 2)})[1:-1]
    for step in between:
        if len(search.found) < max_evaluations:
            search.measure(step)
    proposed = sorted({0, *(s for s in between if s in search.found and search.found[s].holds), chosen})
    return Compression(
        full=search.full,
        zero_shot=search.empty,
        reference=float(np.nanmean(search.reference)),
        points=tuple(search.found[s] for s in sorted(search.found)),
        chosen=search.found[chosen],
        candidates=tuple(search.found[s] for s in proposed),
        requirement=requirement,
        n_queries=len(search.reference),
        cap=None if cap is None else search.found[cap],
        calls=sum(p.n_queries for p in search.found.values()),
        calls_saved=sum(len(search.reference) - p.n_queries for p in search.found.values()),
    )


@dataclass
class _Search:
    """What has been measured of one path."""

    path: NDArray[np.bool_]
    evaluate: EvaluateTarget
    requirement: Requirement
    order: NDArray[np.int64]
    reference: NDArray[np.float64]
    level: float
    block: int
    full: PathPoint
    empty: PathPoint
    found: dict[int, PathPoint] = field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        path: NDArray[np.bool_],
        evaluate: EvaluateTarget,
        requirement: Requirement,
        rng: np.random.Generator,
        level: float,
        block: int | None,
    ) -> _Search:
        """Ask for the full prompt, the start of the path, and no demonstration at all."""
        ends = np.vstack([np.ones_like(path[0]), path[0], np.zeros_like(path[0])])
        values = evaluate(ends)
        values.require_complete("measuring the path on the target")
        n = values.performance.shape[1]
        if block is None:
            block = max(10, ceil(n / 4))
        elif block < 1:
            raise InputError(f"block: got {block!r}; at least one query.")
        reference = max(values.performance[:2], key=lambda row: float(np.nanmean(row)))
        points = [
            measured_point(ends[k], values.performance[k], values.prompt_tokens[k], reference, requirement)
            for k in range(3)
        ]
        search = cls(
            path, evaluate, requirement, rng.permutation(n), reference, level, block, points[0], points[2]
        )
        search.found[0] = points[1]
        if not path[-1].any():
            search.found[len(path) - 1] = points[2]
        return search

    @property
    def chosen(self) -> int:
        """Step of the smallest prompt that holds the line, or of the start."""
        return max((step for step, point in self.found.items() if point.holds), default=0)

    def measure(self, step: int, *, whole: bool = False) -> PathPoint:
        """One point of the path; known ones are not asked again."""
        if step in self.found:
            return self.found[step]
        row, n = self.path[step], len(self.reference)
        performance, tokens = np.full(n, np.nan), np.zeros(n, dtype=np.int64)
        line = -self.requirement.allowance(float(np.nanmean(self.reference)))
        side, asked = None, 0
        while side is None and asked < n:
            upto = n if whole else min(asked + self.block, n)
            batch = self.order[asked:upto]
            values = self.evaluate(row[None, :], batch)
            values.require_complete("measuring the path on the target")
            performance[batch], tokens[batch] = values.performance[0], values.prompt_tokens[0]
            asked = upto
            if asked < n:
                d = (performance - self.reference)[self.order[:asked]]
                d = d[~np.isnan(d)]
                side, _ = side_of_line(d, n - (asked - len(d)), line, level=self.level)
        self.found[step] = measured_point(
            row, performance, tokens, self.reference, self.requirement, side, asked
        )
        return self.found[step]


def measured_point(
    kept: NDArray[np.bool_],
    performance: NDArray[np.float64],
    tokens: NDArray[np.int64],
    reference: NDArray[np.float64],
    requirement: Requirement,
    side: str | None = None,
    asked: int | None = None,
) -> PathPoint:
    """A point from its answers on the split, NaN where not asked or missing."""
    d = (performance - reference)[~np.isnan(performance) & ~np.isnan(reference)]
    low, high = interval(performance)
    known = tokens[tokens > 0]
    above = float(d.mean()) + requirement.allowance(float(np.nanmean(reference)))
    return PathPoint(
        kept=kept.copy(),
        performance=float(np.nanmean(performance)),
        low=low,
        high=high,
        difference=above,
        difference_se=float(d.std(ddof=1) / np.sqrt(len(d))) if len(d) > 1 else 0.0,
        tokens=float(known.mean()) if len(known) else 0.0,
        n_queries=len(performance) if asked is None else asked,
        holds=above >= -1e-12 if side is None else side == "holds",
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
