"""Which loss could a certificate show, said before any query is spent?

Public through :mod:`proxyprompt.sequential`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log, sqrt
from types import MappingProxyType
from typing import Any, Literal

from ._noninferiority import check_rule
from ._trinomial import critical_score, power
from .errors import InputError

__all__ = ["CertifiableLoss", "smallest_certifiable_loss"]


@dataclass(frozen=True)
class CertifiableLoss:
    """What a certificate can show with ``n`` queries, stated before any is spent.

    Parameters
    ----------
    loss : float or None
        Largest true loss, mean(full) - mean(pruned), that is still certified with chance ``power``; below
        0 it is a gain the smaller prompt must have. None when not even a gain of ``discordance`` is
        certified that often.
    power_at_no_loss : float
        Chance of a certificate when the smaller prompt is exactly as good.
    smallest_allowance : float or None
        Smallest margin (for ``tau``: smallest ``1 - tau``) at which no true loss is certified with
        chance ``power``; None when none below 1 is.
    n : int
    method : {"exact", "betting"}
        ``"exact"``: computed from the trinomial law; ``"betting"``: normal approximation.
    settings : mapping
    """

    loss: float | None
    power_at_no_loss: float
    smallest_allowance: float | None
    n: int
    method: Literal["exact", "betting"]
    settings: Mapping[str, Any]


def smallest_certifiable_loss(
    n: int,
    *,
    tau: float | None = None,
    margin: float | None = None,
    level: float = 0.05,
    power: float = 0.8,
    discordance: float = 0.1,
    full_score: float = 0.8,
    method: Literal["exact", "betting"] = "exact",
) -> CertifiableLoss:
    """State, before a run, which true loss ``n`` queries can still certify.

    Parameters
    ----------
    n : int
        Sealed queries, at least 1.
    tau, margin, level
        As for :func:`non_inferiority`.
    power : float
        Chance of a certificate asked for.
    discordance : float
        Share of queries on which the two prompts' 0/1 scores differ; a larger loss raises it to the loss.
    full_score : float
        Mean score of the full prompt; used with ``tau`` only.
    method : {"exact", "betting"}
        Which test is planned for.

    Returns
    -------
    CertifiableLoss

    Raises
    ------
    InputError
        When an argument is out of range, or the score leaves no room for the discordance.

    Notes
    -----
    ``"exact"``: the power of the exact test, summed over all outcomes; with ``tau`` at the expected
    number of queries that either prompt gets right. ``"betting"``: normal approximation with the
    boundary ``sqrt(2 ln(1/level))`` standard errors, slightly pessimistic.

    Examples
    --------
    >>> plan = smallest_certifiable_loss(180, tau=0.95)
    >>> round(plan.power_at_no_loss, 2), round(plan.loss, 3), round(1 - plan.smallest_allowance, 2)
    (0.49, -0.02, 0.92)
    """
    check_rule(tau, margin, level)
    for name, share in (("power", power), ("discordance", discordance), ("full_score", full_score)):
        if not 0 < share <= 1 or (name == "power" and share == 1):
            raise InputError(f"{name}={share}: a share above 0 is needed.", hint="See the default.")
    if n < 1 or method not in ("exact", "betting"):
        raise InputError(
            f"n={n}, method={method!r}: n >= 1, 'exact' or 'betting'.", hint="See the docstring."
        )
    if tau is not None and discordance / 2 > min(full_score, 1 - full_score):
        raise InputError(
            f"discordance={discordance}, full_score={full_score}: "
            "equally good prompts cannot differ so often.",
            hint=f"Use a discordance of at most {2 * min(full_score, 1 - full_score):.3g}.",
        )
    plan = _Plan(n, tau is not None, level, discordance, full_score, method)
    allowance = float(1 - tau if tau is not None else margin or 0.0)
    loss = _last_at_least(lambda x: plan.chance(allowance, x), -plan.largest_gain, plan.largest_loss, power)
    kept = _last_at_least(lambda x: plan.chance(1 - x, 0.0), 0.01, 1.0, power)
    return CertifiableLoss(
        loss=loss,
        power_at_no_loss=plan.chance(allowance, 0.0),
        smallest_allowance=None if kept is None else 1 - kept,
        n=n,
        method=method,
        settings=MappingProxyType(
            {
                "tau": tau,
                "margin": margin,
                "level": level,
                "power": power,
                "discordance": discordance,
                "full_score": full_score,
            }
        ),
    )


@dataclass(frozen=True)
class _Plan:
    n: int
    ratio: bool
    level: float
    discordance: float
    full_score: float
    method: str

    @property
    def largest_gain(self) -> float:
        room = 2 * (1 - self.full_score) - self.discordance if self.ratio else 1.0
        return min(self.discordance, room)

    @property
    def largest_loss(self) -> float:
        return min(self.discordance, self.full_score) if self.ratio else self.discordance

    def chance(self, allowance: float, loss: float) -> float:
        """Chance of a certificate at the given true loss."""
        q_loss = max((self.discordance + loss) / 2, loss, 0.0)
        q_win = max(q_loss - loss, 0.0)
        n, keep = self.n, 1.0
        if self.ratio:
            used = self.full_score + q_win
            n, keep = max(round(self.n * used), 1), 1 - allowance
            q_loss, q_win = q_loss / used, q_win / used
        if self.method == "exact":
            return power(n, allowance, keep, critical_score(n, allowance, keep, self.level), q_win, q_loss)
        from scipy.special import ndtr

        mean = allowance - q_loss + keep * q_win
        variance = q_loss + keep**2 * q_win - (q_loss - keep * q_win) ** 2
        return float(ndtr(mean * sqrt(n / max(variance, 1e-12)) - sqrt(2 * log(1 / self.level))))


def _last_at_least(chance: Callable[[float], float], low: float, high: float, wanted: float) -> float | None:
    """Largest x in [low, high] at which a falling ``chance`` is still at least ``wanted``."""
    if chance(low) < wanted:
        return None
    if chance(high) >= wanted:
        return high
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if chance(middle) >= wanted else (low, middle)
    return low
