"""One plain word for every demonstration, with the statistics behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from proxyprompt.attribution.base import Attribution

from .clean import Cleaning, Confirmation

__all__ = ["DemonstrationClass", "classify"]

Name: TypeAlias = Literal["harmful", "redundant", "useful", "unclear"]

_LEVEL = 0.95


@dataclass(frozen=True)
class DemonstrationClass:
    """What is known of one demonstration.

    Attributes
    ----------
    unit : int
    name : {"harmful", "redundant", "useful", "unclear"}
        The first that holds. Harmful, on these queries: the target confirmed that it does better without it
        (family-wise level of :class:`Cleaning`), and the cleaned prompt does without it. Redundant: not harmful, and
        the certified prompt does without it. Useful: the one-sided 95 % lower bound of its attribution in the whole
        prompt is above zero, a bound for each demonstration, not corrected for their number. Unclear: none of these.
    reason : str
        In a sentence or two.
    kept : bool
        Whether the shipped prompt holds it.
    lower_bound : float
        Of its attribution.
    suspected : bool
    confirmation : Confirmation or None
        The target's word, where it was suspected and asked.
    """

    unit: int
    name: Name
    reason: str
    kept: bool
    lower_bound: float
    suspected: bool
    confirmation: Confirmation | None


def classify(
    attribution: Attribution,
    cleaning: Cleaning,
    kept: NDArray[np.bool_],
    *,
    near_copies: Mapping[int, str] | None = None,
) -> tuple[DemonstrationClass, ...]:
    """Class of every demonstration.

    Parameters
    ----------
    attribution : Attribution
        Of the whole prompt.
    cleaning : Cleaning
    kept : bool (n_units,)
        The shipped prompt: certified, or everything.
    near_copies : mapping of int to str, optional
        For units that do the same work as another: the id of that one.

    Returns
    -------
    tuple of DemonstrationClass
        In the prompt's order.
    """
    lower = attribution.lower_bound(_LEVEL)
    found = {c.unit: c for c in cleaning.confirmations}
    flagged, spared = set(cleaning.flagged), set(cleaning.spared)
    copies = near_copies or {}
    out = []
    for unit in range(attribution.n_units):
        confirmation = found.get(unit)
        name, reason = _judge(
            kept=bool(kept[unit]),
            suspected=unit in flagged,
            spared=unit in spared,
            confirmed=confirmation is not None and confirmation.confirmed and unit not in spared,
            useful=bool(lower[unit] > 0),
            removed_any=not kept.all(),
        )
        if unit in spared:
            reason += " It did harm in the prompt as it was; with the worse ones gone, the target did better with it."
        if unit in copies:
            reason += f" It does much the same work as {copies[unit]}."
        out.append(
            DemonstrationClass(
                unit, name, reason, bool(kept[unit]), float(lower[unit]), unit in flagged, confirmation
            )
        )
    return tuple(out)


def _judge(
    *, kept: bool, suspected: bool, spared: bool, confirmed: bool, useful: bool, removed_any: bool
) -> tuple[Name, str]:
    if confirmed and not kept:
        return "harmful", "Lowers the result on these queries; removing it helped the target."
    if confirmed:
        return "harmful", "Lowers the result on these queries, but no prompt without it could be certified."
    if not kept and suspected and not spared:
        return (
            "redundant",
            "Suspected of harm, which the target did not confirm. It does as well without it.",
        )
    if not kept:
        return "redundant", "The target does as well without it, given the demonstrations that stay."
    if useful:
        return "useful", "Raises the result with confidence."
    if suspected and not spared:
        return "unclear", "Suspected of harm; the target did not confirm that."
    if removed_any:
        return "unclear", "No clear effect by itself; a smaller prompt without it was not certified."
    return "unclear", "No clear effect."
