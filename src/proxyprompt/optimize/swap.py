"""Single swaps: one demonstration of the choice for one that left, where the surrogate says that it helps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._harm import p_value
from .compress import Compression, EvaluateTarget, measured_point
from .path import Predict

__all__ = ["Swap", "try_swaps"]


@dataclass(frozen=True)
class Swap:
    """One swap that the target was asked about.

    Attributes
    ----------
    out, into : int
        The unit that would leave, and the one that would come back.
    predicted : float
        Gain that the surrogate promised, in units of the value function.
    gain : float
        Mean gain in utility on the selection split, paired by query.
    p_value : float
        One-sided, of "no gain".
    accepted : bool
    """

    out: int
    into: int
    predicted: float
    gain: float
    p_value: float
    accepted: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form without the units."""
        return {
            "predicted": self.predicted,
            "gain": self.gain,
            "p_value": self.p_value,
            "accepted": self.accepted,
        }


def try_swaps(
    found: Compression,
    predict: Predict,
    evaluate: EvaluateTarget,
    start: NDArray[np.bool_],
    *,
    smallest_gain: float = 0.0,
    most: int = 2,
    level: float = 0.05,
    protected: Sequence[int] = (),
    labels: Sequence[str] | None = None,
    tokens: NDArray[np.float64] | None = None,
) -> tuple[Compression, tuple[Swap, ...]]:
    """Ask the target about the most promising swaps; the first that it confirms replaces the choice.

    Parameters
    ----------
    found : Compression
    predict : callable
        The surrogate.
    evaluate : callable
        Target values on the selection split.
    start : bool (n_units,)
        Start of the path: what is not in it (harmful demonstrations) never comes back.
    smallest_gain : float
        Swaps that promise no more are not tried; the error of the surrogate is a sensible bound.
    most : int
        At most so many are tried; each costs the target the selection split.
    level : float
        Of the paired test of the gain in utility, divided by the number tried. Performance must not fall either.
    protected, labels, tokens
        As for the path; with ``tokens`` no swap may lengthen the prompt.

    Returns
    -------
    Compression
        With ``chosen`` and ``candidates`` replaced if a swap was confirmed; candidates that do not hold the new
        choice are left out, so that they stay nested.
    tuple of Swap
    """
    kept = found.chosen.kept
    pairs = _promising(kept, predict, start, smallest_gain, protected, labels, tokens)[:most]
    tried: list[Swap] = []
    for predicted, out, into in pairs:
        row = kept.copy()
        row[out], row[into] = False, True
        values = evaluate(np.vstack([kept, row]))
        values.require_complete("trying a swap on the target")
        gain, _, p = p_value(values.utility[1] - values.utility[0], discrete=values.scale == "accuracy")
        better = float(np.nanmean(values.performance[1])) >= float(np.nanmean(values.performance[0]))
        accepted = p <= level / len(pairs) and better
        tried.append(Swap(out, into, predicted, gain, p, accepted))
        if accepted:
            reference = max(evaluate(np.vstack([np.ones_like(start), start])).performance, key=np.nanmean)
            chosen = measured_point(
                row, values.performance[1], values.prompt_tokens[1], reference, found.requirement
            )
            milder = tuple(c for c in found.candidates[:-1] if c.kept[row].all())
            return replace(found, chosen=chosen, candidates=(*milder, chosen)), tuple(tried)
    return found, tuple(tried)


def _promising(
    kept: NDArray[np.bool_],
    predict: Predict,
    start: NDArray[np.bool_],
    smallest_gain: float,
    protected: Sequence[int],
    labels: Sequence[str] | None,
    tokens: NDArray[np.float64] | None,
) -> list[tuple[float, int, int]]:
    """Swaps by predicted gain, best first: (gain, out, into)."""
    pairs = []
    for out in (int(i) for i in np.flatnonzero(kept) if i not in set(protected)):
        last = labels is not None and sum(labels[int(i)] == labels[out] for i in np.flatnonzero(kept)) == 1
        for into in (int(i) for i in np.flatnonzero(start & ~kept)):
            if last and labels is not None and labels[into] != labels[out]:
                continue
            if tokens is not None and tokens[into] > tokens[out]:
                continue
            pairs.append((out, into))
    if not pairs:
        return []
    rows = np.repeat(kept[None, :], len(pairs), axis=0)
    for row, (out, into) in zip(rows, pairs, strict=True):
        row[out], row[into] = False, True
    gains = predict(rows) - predict(kept[None, :])[0]
    ranked = sorted(zip(gains.tolist(), pairs, strict=True), key=lambda item: (-item[0], item[1]))
    return [(gain, *pair) for gain, pair in ranked if gain > max(smallest_gain, 1e-9)]
