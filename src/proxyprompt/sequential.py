"""Decisions that keep their error rate: at every look, over a path of candidates, over several tests.

Arrays only: per-query differences in, a decision out. The tests that certify a smaller prompt
(:func:`non_inferiority`) and the rules of the screen (:func:`betting_rule`) live in modules of their own and are offered
here as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._certifiable import CertifiableLoss, smallest_certifiable_loss
from ._noninferiority import NonInferiority, non_inferiority
from ._sequential_rules import (
    SequentialDecision,
    betting_rule,
    earliest_acceptance,
    paired_t_rule,
    smallest_possible_acceptance,
)
from .errors import InputError

__all__ = [
    "CertifiableLoss",
    "FixedSequence",
    "NonInferiority",
    "SequentialDecision",
    "betting_rule",
    "earliest_acceptance",
    "fixed_sequence",
    "holm",
    "non_inferiority",
    "paired_t_rule",
    "smallest_certifiable_loss",
    "smallest_possible_acceptance",
]


@dataclass(frozen=True)
class FixedSequence:
    """Outcome of tests run in a fixed order.

    Parameters
    ----------
    last_passed : int or None
        Index of the last test that passed; None when the first failed.
    results : tuple
        What the tests that were run returned, in order.
    """

    last_passed: int | None
    results: tuple[Any, ...]

    @property
    def n_run(self) -> int:
        """Number of tests run."""
        return len(self.results)


def fixed_sequence(tests: Sequence[Callable[[], NonInferiority | bool]]) -> FixedSequence:
    """Run tests in the given order until one fails.

    Parameters
    ----------
    tests : sequence of callables
        Each takes no argument and returns a bool, or a result with a boolean ``certified``. A test
        after the first failure is not called, so it costs nothing.

    Returns
    -------
    FixedSequence

    Raises
    ------
    InputError
        When there is no test, or one returns something else.

    Notes
    -----
    With an order fixed before the data are seen, each test at the full level keeps the chance of any
    false pass at that level: a false pass needs the first true null hypothesis to be rejected (Maurer,
    Hothorn & Lehmacher 1995). The level is each test's own; all must use the same.

    Examples
    --------
    >>> fixed_sequence([lambda: True, lambda: False, lambda: True]).last_passed
    0
    """
    if not tests:
        raise InputError("tests is empty.", hint="Pass at least one test.")
    results: list[Any] = []
    last: int | None = None
    for index, test in enumerate(tests):
        results.append(test())
        passed = getattr(results[-1], "certified", results[-1])
        if not isinstance(passed, bool | np.bool_):
            raise InputError(
                f"tests[{index}] returned {type(results[-1]).__name__}: a bool or a result with `certified`.",
                hint="Return the NonInferiority itself.",
            )
        if not passed:
            break
        last = index
    return FixedSequence(last, tuple(results))


def holm(p_values: ArrayLike, level: float) -> NDArray[np.bool_]:
    """Which hypotheses Holm's procedure rejects.

    Parameters
    ----------
    p_values : array_like of float, shape (n_tests,)
    level : float
        Largest chance of any false rejection, whatever the dependence between the tests.

    Returns
    -------
    ndarray of bool, shape (n_tests,)

    Raises
    ------
    InputError
        When ``level`` or a p-value is out of range.

    References
    ----------
    .. [1] Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979.

    Examples
    --------
    >>> holm([0.01, 0.04, 0.03], 0.05).tolist()
    [True, False, False]
    """
    p = np.asarray(p_values, dtype=np.float64)
    if not 0 < level < 1:
        raise InputError(f"level={level}: strictly between 0 and 1.", hint="See the default.")
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise InputError(
            f"p_values of shape {p.shape}: a list of numbers in [0, 1] is needed.",
            hint="NaN is not a p-value.",
        )
    order = np.argsort(p, kind="stable")
    below = p[order] <= level / np.arange(len(p), 0, -1)
    rejected = np.zeros(len(p), dtype=np.bool_)
    rejected[order] = np.logical_and.accumulate(below)
    return rejected
