"""Designs of growing size that contain each other, for techniques whose coalitions can be bought in instalments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from proxyprompt.errors import InputError

from ._nested import Law, banzhaf_law, draw_nested, shapley_law
from .base import Design, Explainer
from .kernel_shap import KernelSHAP
from .weighted_banzhaf import WeightedBanzhaf

__all__ = ["law_of", "nested_designs"]

_REDRAWS = 100


def law_of(explainer: Explainer, n_units: int) -> Law:
    """Return the law of a technique whose designs can be extended.

    Raises
    ------
    InputError
        When the explainer is none of those.
    """
    if isinstance(explainer, KernelSHAP):
        return shapley_law(n_units)
    if isinstance(explainer, WeightedBanzhaf):
        return banzhaf_law(explainer.keep, n_units)
    raise InputError(
        f"explainer={type(explainer).__name__}: its coalitions cannot be bought in instalments.",
        hint="Use WeightedBanzhaf or KernelSHAP, or explainer.attribute with a fixed budget.",
    )


def nested_designs(
    explainer: Explainer, n_units: int, budgets: Sequence[int], *, rng: np.random.Generator
) -> tuple[Design, ...]:
    """Draw designs of which each begins with the rows of the one before.

    Parameters
    ----------
    explainer : KernelSHAP or WeightedBanzhaf
    n_units : int
        Number of units, at least 1.
    budgets : sequence of int
        Largest numbers of coalitions, ascending; from ``2**n_units`` on a design is exact.
    rng : numpy.random.Generator
        The only source of chance.

    Returns
    -------
    tuple of Design
        One a budget. Rows are those of one priority order, so every design is a sound one by itself.

    Raises
    ------
    InputError
        For another explainer, budgets that do not ascend, or a first budget that does not determine the units.

    Examples
    --------
    >>> few, many = nested_designs(WeightedBanzhaf(), 10, (40, 200), rng=np.random.default_rng(0))
    >>> few.n_coalitions, many.n_coalitions, bool((many.coalitions[:40] == few.coalitions).all())
    (40, 200, True)
    """
    law = law_of(explainer, n_units)
    if not budgets or list(budgets) != sorted(budgets) or budgets[0] < 2:
        raise InputError(
            f"budgets={tuple(budgets)}: ascending numbers of coalitions from 2 on are needed.",
            hint="Sort them.",
        )
    for _ in range(_REDRAWS):
        draw = draw_nested(law, (budgets[-1] - 2) // law.members, rng=rng)
        prefixes = [draw.prefix(min((budget - 2) // law.members, len(draw.mass))) for budget in budgets]
        if prefixes[0].sound:
            return tuple(prefix.design for prefix in prefixes)
    raise InputError(
        f"budgets={tuple(budgets)}: {_REDRAWS} draws of {budgets[0]} coalitions did not determine {n_units} units.",
        hint=f"Begin with {4 * n_units} or more.",
    )
