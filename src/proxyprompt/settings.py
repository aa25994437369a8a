"""The numbers of a run, checked in one place."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from .errors import InputError

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """Everything that steers a run besides prompt, task, queries and models.

    Parameters
    ----------
    tau : float
        Share of the full prompt's performance that the smaller one must keep, in (0, 1].
    confidence : float
        Level of the certificate, e.g. 0.95.
    explainer : {"weighted_banzhaf", "kernel_shap", "leave_one_out"}
        Technique of the attributions, and of the surrogates that screening compares.
    screening_method : {"betting", "paper"}
    screening_tau : float
        Share of the oracle's fidelity that a proxy must reach.
    screening_delta : float
        Probability of accepting a proxy that does not.
    max_pairs : int
        Most pairs a screening uses.
    screening_block : int
        Queries the target is asked at once while screening.
    fit_coalitions, judge_coalitions : int or None
        Coalitions on which surrogates are fitted and judged. Default for fitting: three per demonstration (four for
        KernelSHAP), at least 48, all of them when that is few.
    proxy_coalitions : int or None
        Coalitions of an accepted proxy's attribution. Default: twice as many as screening fits on.
    oracle_queries : int or None
        Queries of the target's own attribution when no proxy is accepted. Default: all that screening
        bought, and at least 30 if there are so many.
    clean : bool
        Whether to look for harmful demonstrations.
    clean_level : float
        Largest chance that any harmless demonstration is called harmful (family-wise, on the target).
    suspect_level : float
        Level at which a negative attribution makes a suspect, which the target is then asked about.
    max_suspects : int
        At most so many suspects; each costs the target two coalitions.
    max_evaluations : int
        Points of the compression path that the target is asked for.
    keep : tuple of str
        Ids of demonstrations that must stay.
    target_calls, target_tokens : int or None
        Hard limits on what the target may be asked.
    price_input_per_million : float or None
        Money per million prompt tokens of the target; ``None``: unpriced, money is not reported.
    price_source : str
        Where that price comes from and of what date; shown in the report.
    seed : int
    """

    tau: float = 0.9
    confidence: float = 0.95
    explainer: Literal["weighted_banzhaf", "kernel_shap", "leave_one_out"] = "weighted_banzhaf"
    screening_method: Literal["betting", "paper"] = "betting"
    screening_tau: float = 0.8
    screening_delta: float = 0.05
    max_pairs: int = 100
    screening_block: int = 10
    fit_coalitions: int | None = None
    judge_coalitions: int = 24
    proxy_coalitions: int | None = None
    oracle_queries: int | None = None
    clean: bool = True
    clean_level: float = 0.05
    suspect_level: float = 0.2
    max_suspects: int = 12
    max_evaluations: int = 12
    keep: tuple[str, ...] = ()
    target_calls: int | None = None
    target_tokens: int | None = None
    price_input_per_million: float | None = None
    price_source: str = "given by the user"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", tuple(self.keep))
        for name in ("tau", "screening_tau"):
            _number(name, getattr(self, name), 0.0, 1.0, "(0, 1]", top=True)
        for name in ("confidence", "screening_delta", "clean_level", "suspect_level"):
            _number(name, getattr(self, name), 0.0, 1.0, "(0, 1)")
        if self.explainer not in ("weighted_banzhaf", "kernel_shap", "leave_one_out"):
            raise InputError(
                f"explainer: got {self.explainer!r}; allowed: weighted_banzhaf, kernel_shap, leave_one_out."
            )
        if self.screening_method not in ("betting", "paper"):
            raise InputError(f"screening_method: got {self.screening_method!r}; allowed: betting, paper.")
        for name, least in (
            ("max_pairs", 2),
            ("screening_block", 1),
            ("judge_coalitions", 1),
            ("max_evaluations", 2),
        ):
            _count(name, getattr(self, name), least)
        for name in ("fit_coalitions", "proxy_coalitions", "oracle_queries", "target_calls", "target_tokens"):
            if getattr(self, name) is not None:
                _count(name, getattr(self, name), 1)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise InputError(f"seed: got {self.seed!r}; a whole number from 0 on.")
        price = self.price_input_per_million
        if price is not None and (
            isinstance(price, bool) or not isinstance(price, int | float) or not 0 <= price < 1e9
        ):
            raise InputError(
                f"price_input_per_million: got {price!r}; a price per million tokens, 0 or more."
            )

    @property
    def level(self) -> float:
        """Error level of the certificate, ``1 - confidence``."""
        return round(1.0 - self.confidence, 12)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form."""
        return asdict(self) | {"keep": list(self.keep)}

    def n_fit(self, n_units: int) -> int:
        """Coalitions on which screening fits its surrogates."""
        return self._coalitions(self.fit_coalitions, n_units, 1)

    def n_proxy(self, n_units: int) -> int:
        """Coalitions of an accepted proxy's attribution."""
        return self._coalitions(self.proxy_coalitions, n_units, 2)

    def _coalitions(self, given: int | None, n_units: int, times: int) -> int:
        if self.explainer == "leave_one_out":
            return n_units + 2
        per_unit = 4 if self.explainer == "kernel_shap" else 3
        return given or min(2 ** min(n_units, 30), times * max(48, per_unit * n_units))


def _number(name: str, value: Any, low: float, high: float, rule: str, *, top: bool = False) -> None:
    ok = not isinstance(value, bool) and isinstance(value, int | float) and low < value
    if not ok or not (value <= high if top else value < high):
        raise InputError(f"{name}: got {value!r}; it lies in {rule}.")


def _count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name}: got {value!r}; a whole number, at least {least}.")
