"""What a smaller prompt must hold: a share of the full prompt's performance, or all of it but a margin."""

from __future__ import annotations

from dataclasses import dataclass

from proxyprompt.errors import InputError

__all__ = ["Requirement"]


@dataclass(frozen=True)
class Requirement:
    """``performance(smaller) >= tau * performance(full)``, or ``>= performance(full) - margin``.

    Parameters
    ----------
    tau : float, optional
        In (0, 1].
    margin : float, optional
        In [0, 1). Exactly one of the two.

    Raises
    ------
    InputError
        Both or neither given, or out of range.

    Examples
    --------
    >>> Requirement(tau=0.5).line(0.8), Requirement(margin=0.02).line(0.8)
    (0.4, 0.78)
    """

    tau: float | None = None
    margin: float | None = None

    def __post_init__(self) -> None:
        if (self.tau is None) == (self.margin is None):
            raise InputError(f"tau={self.tau}, margin={self.margin}: exactly one of the two is needed.")
        if self.tau is not None and not 0.0 < self.tau <= 1.0:
            raise InputError(f"tau: got {self.tau!r}; it lies in (0, 1].")
        if self.margin is not None and not 0.0 <= self.margin < 1.0:
            raise InputError(f"margin: got {self.margin!r}; it lies in [0, 1).")

    def line(self, reference: float) -> float:
        """What must be reached when the reference prompt has this performance."""
        return reference - self.allowance(reference)

    def allowance(self, reference: float) -> float:
        """What may be lost when the reference prompt has this performance."""
        if self.tau is not None:
            return (1.0 - self.tau) * reference
        assert self.margin is not None
        return self.margin

    @property
    def symbols(self) -> str:
        """As the user set it: ``tau = 0.9`` or ``margin = 0.02``."""
        return f"tau = {self.tau:g}" if self.tau is not None else f"margin = {self.margin:g}"

    def claim(self, of: str) -> str:
        """What holds, after the words "the prompt ..."."""
        if self.tau is not None:
            return f"keeps at least {_percent(self.tau)} of {of} performance"
        assert self.margin is not None
        return f"loses at most {100 * self.margin:.3g} points against {of} performance"


def _percent(share: float) -> str:
    return f"{100 * share:.4g}%"
