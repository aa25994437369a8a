"""Nested paths: in which order demonstrations leave, and what must not leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from proxyprompt.errors import InputError

__all__ = ["Predict", "first_within", "nested_path", "removable", "surrogate_path"]

Predict: TypeAlias = Callable[[NDArray[np.bool_]], NDArray[np.float64]]
"""Coalitions, bool (m, n_units), to the mean value that a surrogate predicts, float (m,)."""

_TIE = 1e-9


def nested_path(
    scores: NDArray[np.float64],
    start: NDArray[np.bool_],
    *,
    protected: Sequence[int] = (),
    labels: Sequence[str] | None = None,
    tokens: NDArray[np.float64] | None = None,
) -> NDArray[np.bool_]:
    """Coalitions from ``start`` down, lowest score leaving first [PE 5.1].

    Parameters
    ----------
    scores : float (n_units,)
        Attribution; higher stays longer. Ties leave from the end of the prompt first.
    start, protected, labels, tokens
        As for :func:`surrogate_path`.

    Returns
    -------
    bool (n_steps + 1, n_units)

    Examples
    --------
    >>> nested_path(np.array([0.3, 0.1, 0.2]), np.ones(3, dtype=bool)).astype(int).tolist()
    [[1, 1, 1], [1, 0, 1], [1, 0, 0], [0, 0, 0]]
    """
    weights = np.asarray(scores, dtype=np.float64)
    return surrogate_path(
        lambda rows: rows @ weights, start, protected=protected, labels=labels, tokens=tokens
    )


def surrogate_path(
    predict: Predict,
    start: NDArray[np.bool_],
    *,
    protected: Sequence[int] = (),
    labels: Sequence[str] | None = None,
    tokens: NDArray[np.float64] | None = None,
) -> NDArray[np.bool_]:
    """Coalitions from ``start`` down; at each step the unit leaves whose loss costs the surrogate least.

    With an additive surrogate this is the order of the attributions. With one that knows pairs, a near-copy
    costs nothing while the other is there and its whole worth once the other has left, so that one of two stays.

    Parameters
    ----------
    predict : callable
    start : bool (n_units,)
        The prompt before compression, e.g. cleaned.
    protected : sequence of int
        Units that never leave.
    labels : sequence of str, length n_units, optional
        The last unit left with a label stays.
    tokens : float (n_units,), optional
        Positive. Given: the unit leaves that costs least for each token it frees.

    Returns
    -------
    bool (n_steps + 1, n_units)
        Down to the empty coalition, or to what must stay. Ties leave from the end of the prompt first.

    Raises
    ------
    InputError
        When ``tokens`` are not positive.
    """
    if tokens is not None and not (np.asarray(tokens) > 0).all():
        raise InputError(f"tokens: got {tokens!r}; every unit has a positive number of tokens.")
    kept = np.asarray(start, dtype=np.bool_).copy()
    rows = [kept.copy()]
    while True:
        units = removable(kept, protected, labels)
        if not len(units):
            return np.array(rows, dtype=np.bool_)
        smaller = np.repeat(kept[None, :], len(units), axis=0)
        smaller[np.arange(len(units)), units] = False
        loss = predict(kept[None, :])[0] - predict(smaller)
        if tokens is not None:
            loss = loss / np.asarray(tokens)[units]
        least = loss.min() + _TIE * max(1.0, float(np.abs(loss).max()))
        kept[units[np.flatnonzero(loss <= least)[-1]]] = False
        rows.append(kept.copy())


def removable(
    kept: NDArray[np.bool_], protected: Sequence[int] = (), labels: Sequence[str] | None = None
) -> NDArray[np.int64]:
    """Units of ``kept`` that may leave: not protected, and not the last one with their label."""
    held = [int(i) for i in np.flatnonzero(kept)]
    counts: dict[str, int] = {}
    for i in held if labels is not None else ():
        counts[labels[i]] = counts.get(labels[i], 0) + 1  # type: ignore[index]
    free = [i for i in held if i not in set(protected) and (labels is None or counts[labels[i]] > 1)]
    return np.array(free, dtype=np.int64)


def first_within(
    path: NDArray[np.bool_],
    *,
    max_demonstrations: int | None = None,
    max_tokens: float | None = None,
    tokens: NDArray[np.float64] | None = None,
) -> int | None:
    """First step of a path that obeys the caps; ``None`` if none does.

    Parameters
    ----------
    path : bool (n_steps, n_units)
    max_demonstrations : int, optional
    max_tokens : float, optional
        Of a whole prompt.
    tokens : float (n_steps,), optional
        Mean tokens of the whole prompt at each step; needed with ``max_tokens``.
    """
    fits = np.ones(len(path), dtype=np.bool_)
    if max_demonstrations is not None:
        fits &= path.sum(axis=1) <= max_demonstrations
    if max_tokens is not None:
        if tokens is None:
            raise InputError("max_tokens is given, but not how many tokens the prompts have.")
        fits &= np.asarray(tokens) <= max_tokens
    return int(np.argmax(fits)) if fits.any() else None
