"""The numbers of a run, checked in one place."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from .errors import InputError
from .prices import Price, own_price

__all__ = ["Settings"]

_EXPLAINERS = ("weighted_banzhaf", "banzhaf", "kernel_shap", "lasso", "leave_one_out", "permutation_shapley")


@dataclass(frozen=True)
class Settings:
    """Everything that steers a run besides prompt, task, queries and models.

    Parameters
    ----------
    tau : float
        Share of the full prompt's performance that the smaller one must keep, in (0, 1].
    margin : float or None
        Performance that the smaller one may lose, in [0, 1): 0.02 is two points. Given, it takes the place of ``tau``.
    confidence : float
        Level of the certificate, e.g. 0.95.
    explainer : {"weighted_banzhaf", "banzhaf", "kernel_shap", "lasso", "leave_one_out", "permutation_shapley"}
        Technique of the attributions, and of the surrogates that screening compares.
    screening_method : {"betting", "paper", "off"}
        ``"off"``: no proxy is screened; they only propose what the target verifies (needs ``verify``).
    screening_on : {"attribution", "fidelity"} or None
        Which agreement with the target decides: of attributions, or of the labels that surrogates predict. Default:
        attributions; fidelity for the paper's method. The other is reported beside it.
    screening_tau : float
        Share of the oracle's fidelity that a proxy must reach.
    screening_delta : float
        Probability of accepting a proxy that does not.
    screening_ensemble : bool
        With several proxies, whether their ensemble (the mean of standardised attributions) is a candidate too. It is the
        dearest one, so it explains only where no proxy is accepted alone.
    screening_repeats : int or "auto"
        Times that the target is asked the whole prompts of ten explain queries again, to see how far its answers vary from
        call to call. ``"auto"``: 2 for a target that may (a remote one), 0 for one that answers the same each time (models
        on this machine, recordings).
    max_pairs : int
        Most pairs a screening uses.
    screening_block : int
        Queries the target is asked at once while screening.
    fit_coalitions, judge_coalitions : int or None
        Coalitions on which surrogates are fitted and judged. Default for fitting: three per demonstration (four for
        KernelSHAP), at least 48, all of them when that is few.
    proxy_coalitions : int or None
        Coalitions of an accepted proxy's attribution. Default: twice as many as screening fits on.
    calibrate : bool
        Whether proxies that were not accepted may still make the target's own attributions more precise.
    attribution_error : float or None
        Wanted median standard error (coalitions' part, in units of the value function) of the target's own attributions,
        where the target explains: more coalitions are bought until it is expected, up to those the proxies are asked.
    attribution_calls, attribution_money : int, float or None
        Most that these further coalitions may take, in target calls and in money (which needs a price); without
        ``attribution_error`` they are spent.
    verify : {"off", "harmful", "top", "all"}
        Whether the target measures what proxies propose, accepted or not: in their order, until what is left can hardly
        change which demonstrations are harmful, or which ``verify_top`` are the most useful; or all of them. Then the
        target's own attributions are not bought.
    verify_top : int
    verify_level : float
        Expected number of demonstrations left unmeasured that would change the answer, at which measuring stops.
    verify_calls : int or None
        Most target calls for it.
    oracle_queries : int or None
        Queries of the target's own attribution when no proxy is accepted, and of verification. Default: all that screening
        bought, and at least 30 if there are so many.
    clean : bool
        Whether to look for harmful demonstrations.
    clean_level : float
        Largest chance that any harmless demonstration is called harmful (family-wise, over all rounds, on the target).
    suspect_level : float
        Level at which a negative attribution makes a suspect, which the target is then asked about.
    max_suspects : int
        At most so many suspects in a round; each costs the target two coalitions.
    clean_rounds : int
        Most rounds of suspects. After a round that confirms one, the prompt without its strongest is explained anew.
    reexplain_calls : int or None
        Most target calls that these further explanations may take in all, where the target explains. Default:
        half of what the first explanation took.
    clean_prior : {"zero_shot", "off"}
        Whether the target, asked without demonstrations, may widen the list of suspects: a label that it contradicts
        needs no more than a mean attribution below zero. One short call per demonstration (label tasks).
    relabel : {"propose", "off"}
        Whether to ask the target for each demonstration's own input, and propose another label where it contradicts the
        demonstration's more strongly than it contradicts the references of queries (label tasks). Nothing is changed.
    relabel_level : float
        Share of the proposals that may be expected to be wrong.
    max_evaluations : int
        Points of the compression path that the target is asked for.
    search_level : float
        Chance, in [0, 1), with which a point of the path may be left on another side of the line than the whole
        selection split would put it; 0 leaves it only when no further answer could change that. The certificate
        does not depend on it.
    per : {"demonstration", "token"}
        Whether the path takes the demonstration that costs least, or the one that costs least for each token it frees.
    interactions : {"auto", "off"}
        Whether pairs may steer the path, so that of two near-copies one stays: only where they predict coalitions
        that were left out better than single demonstrations do.
    max_demonstrations, max_tokens : int or None
        Caps on the smaller prompt (``max_tokens``: mean length of a whole prompt).
    keep_labels : bool
        No label loses its last demonstration to compression (tasks with fixed labels).
    orders : int
        0: the order stays. Else so many random orders of what is left are tried, beside reversed and by attribution.
    certificate_method : {"auto", "exact", "betting"}
        ``"auto"``: the exact test for right-or-wrong scores, bets for others. ``"betting"`` asks the sealed queries in
        blocks and stops when it is decided; it needs more queries for the same claim.
    certificate_block : int or None
        Sealed queries asked at once with bets. Default: a quarter, at least ten.
    keep : tuple of str
        Ids of demonstrations that must stay.
    budget_calls, budget_tokens : int or None
        Hard limits on what the target may be asked, over all resumptions of the run (``[budget] max_calls``,
        ``max_tokens``).
    budget_usd, budget_cost : float or None
        Hard limit on the money for target and proxies together, in US dollars or in the currency of the price
        (``[budget] max_usd``, ``max_cost``). Every model that is billed must have a price then.
    price_input_per_million, price_output_per_million : float or None
        Money per million prompt and completion tokens of the target. Without the first the price list of
        ``genai-prices`` is asked, if that is installed; a model that it does not know is unpriced, and money is not
        reported. With it, nothing is taken from the list.
    price_cached_input_per_million, price_cache_write_per_million : float or None
        Money per million prompt tokens that the provider's prompt cache has, or writes.
    price_batch_discount : float or None
        Share taken off in batches, in [0, 1].
    price_currency : str
    price_source, price_date : str
        Where these prices come from and of what date; shown in the report.
    price_model : str or None
        ``"provider/model"`` to look up in the list instead of the target's own name.
    cache_minimum_tokens, cache_increment_tokens : int or None
        From which length on the target's provider caches the beginning of a prompt, and in which steps; by default
        what is recorded for its family.
    cache_hit_rate : float or None
        Share of production calls that find the prompt's beginning cached, in [0, 1]. By default both ends are reported.
    calls_per_hour : float or None
        From which the hit rate is derived instead.
    seed : int
    """

    tau: float = 0.9
    margin: float | None = None
    confidence: float = 0.95
    explainer: Literal[
        "weighted_banzhaf", "banzhaf", "kernel_shap", "lasso", "leave_one_out", "permutation_shapley"
    ] = "weighted_banzhaf"
    screening_method: Literal["betting", "paper", "off"] = "betting"
    screening_on: Literal["attribution", "fidelity"] | None = None
    screening_tau: float = 0.8
    screening_delta: float = 0.05
    screening_ensemble: bool = True
    screening_repeats: int | Literal["auto"] = "auto"
    max_pairs: int = 100
    screening_block: int = 10
    fit_coalitions: int | None = None
    judge_coalitions: int = 24
    proxy_coalitions: int | None = None
    calibrate: bool = True
    attribution_error: float | None = None
    attribution_calls: int | None = None
    attribution_money: float | None = None
    verify: Literal["off", "harmful", "top", "all"] = "off"
    verify_top: int = 3
    verify_level: float = 0.1
    verify_calls: int | None = None
    oracle_queries: int | None = None
    clean: bool = True
    clean_level: float = 0.05
    suspect_level: float = 0.2
    max_suspects: int = 12
    clean_rounds: int = 3
    reexplain_calls: int | None = None
    clean_prior: Literal["zero_shot", "off"] = "zero_shot"
    relabel: Literal["propose", "off"] = "propose"
    relabel_level: float = 0.2
    max_evaluations: int = 12
    search_level: float = 0.1
    per: Literal["demonstration", "token"] = "demonstration"
    interactions: Literal["auto", "off"] = "auto"
    max_demonstrations: int | None = None
    max_tokens: int | None = None
    keep_labels: bool = True
    orders: int = 0
    certificate_method: Literal["auto", "exact", "betting"] = "auto"
    certificate_block: int | None = None
    keep: tuple[str, ...] = ()
    budget_calls: int | None = None
    budget_tokens: int | None = None
    budget_usd: float | None = None
    budget_cost: float | None = None
    price_input_per_million: float | None = None
    price_output_per_million: float | None = None
    price_cached_input_per_million: float | None = None
    price_cache_write_per_million: float | None = None
    price_batch_discount: float | None = None
    price_currency: str = "USD"
    price_source: str = "given by the user"
    price_date: str = ""
    price_model: str | None = None
    cache_minimum_tokens: int | None = None
    cache_increment_tokens: int | None = None
    cache_hit_rate: float | None = None
    calls_per_hour: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", tuple(self.keep))
        for name in ("tau", "screening_tau"):
            _number(name, getattr(self, name), 0.0, 1.0, "(0, 1]", top=True)
        for name in (
            "confidence",
            "screening_delta",
            "clean_level",
            "suspect_level",
            "relabel_level",
            "verify_level",
        ):
            _number(name, getattr(self, name), 0.0, 1.0, "(0, 1)")
        if self.explainer not in _EXPLAINERS:
            raise InputError(f"explainer: got {self.explainer!r}; allowed: {', '.join(_EXPLAINERS)}.")
        if self.screening_method not in ("betting", "paper", "off"):
            raise InputError(
                f"screening_method: got {self.screening_method!r}; allowed: betting, paper, off."
            )
        if self.screening_method == "off" and self.verify == "off":
            raise InputError(
                "screening_method = 'off' with verify = 'off': a proxy that is not screened may not explain.",
                hint="Set verify = 'harmful', so that the target measures what the proxies propose; or name no proxy.",
            )
        if self.screening_on not in (None, "attribution", "fidelity"):
            raise InputError(f"screening_on: got {self.screening_on!r}; allowed: attribution, fidelity.")
        if self.screening_method == "paper" and self.screening_on == "attribution":
            raise InputError("screening_on: the paper's method compares fidelities; leave it out.")
        for name, allowed in (
            ("verify", ("off", "harmful", "top", "all")),
            ("clean_prior", ("zero_shot", "off")),
            ("relabel", ("propose", "off")),
            ("per", ("demonstration", "token")),
            ("interactions", ("auto", "off")),
            ("certificate_method", ("auto", "exact", "betting")),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}: got {getattr(self, name)!r}; allowed: {', '.join(allowed)}.")
        if self.screening_repeats != "auto":
            _count("screening_repeats", self.screening_repeats, 0)
        if self.reexplain_calls is not None:
            _count("reexplain_calls", self.reexplain_calls, 0)
        for name, least in (
            ("max_suspects", 1),
            ("clean_rounds", 1),
            ("max_pairs", 2),
            ("screening_block", 1),
            ("judge_coalitions", 1),
            ("max_evaluations", 2),
            ("verify_top", 1),
        ):
            _count(name, getattr(self, name), least)
        for name in (
            "fit_coalitions",
            "proxy_coalitions",
            "oracle_queries",
            "verify_calls",
            "budget_calls",
            "budget_tokens",
        ):
            if getattr(self, name) is not None:
                _count(name, getattr(self, name), 1)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise InputError(f"seed: got {self.seed!r}; a whole number from 0 on.")
        self._check_shrinking()
        self._check_money()

    def _check_shrinking(self) -> None:
        for name in ("margin", "search_level"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not 0.0 <= value < 1.0):
                raise InputError(f"{name}: got {value!r}; it lies in [0, 1).")
        _count("orders", self.orders, 0)
        for name in ("max_demonstrations", "max_tokens"):
            if getattr(self, name) is not None:
                _count(name, getattr(self, name), 0 if name == "max_demonstrations" else 1)
        if not isinstance(self.calibrate, bool):
            raise InputError(f"calibrate: got {self.calibrate!r}; true or false.")
        if self.attribution_error is not None:
            _number("attribution_error", self.attribution_error, 0.0, 1e9, "(0, 1e9)")
        if self.attribution_calls is not None:
            _count("attribution_calls", self.attribution_calls, 0)
        _amount("attribution_money", self.attribution_money, 1e9, "an amount, 0 or more")
        for name in ("attribution_error", "attribution_calls", "attribution_money"):
            if self.verify != "off" and getattr(self, name) is not None:
                raise InputError(
                    f"{name} with verify = {self.verify!r}: the target's own coalitions are not bought then.",
                    hint="Leave it out; verify_calls limits what verification asks.",
                )
        if not isinstance(self.screening_ensemble, bool):
            raise InputError(f"screening_ensemble: got {self.screening_ensemble!r}; true or false.")
        if not isinstance(self.keep_labels, bool):
            raise InputError(f"keep_labels: got {self.keep_labels!r}; true or false.")
        if self.certificate_block is not None:
            _count("certificate_block", self.certificate_block, 1)
            if self.certificate_method != "betting":
                raise InputError(
                    f"certificate_block: got {self.certificate_block} with certificate_method ="
                    f" {self.certificate_method!r}; the exact test is valid for one look only.",
                    hint="Set certificate_method = 'betting'.",
                )

    def _check_money(self) -> None:
        for name in ("budget_usd", "budget_cost"):
            _amount(name, getattr(self, name), 1e6, "an amount of money, 0 or more")
        if self.budget_usd is not None and self.budget_cost is not None:
            raise InputError("budget_usd and budget_cost are both given; one of them decides.")
        for name in _PRICES:
            _amount(name, getattr(self, name), 1e9, "a price per million tokens, 0 or more")
        for name in ("price_batch_discount", "cache_hit_rate"):
            _amount(name, getattr(self, name), 1.0, "a share in [0, 1]", top=True)
        _amount("calls_per_hour", self.calls_per_hour, 1e9, "a number, 0 or more")
        for name in ("cache_minimum_tokens", "cache_increment_tokens"):
            if getattr(self, name) is not None:
                _count(name, getattr(self, name), 1)
        for name in ("price_currency", "price_source", "price_date", "price_model"):
            if not isinstance(getattr(self, name) or "", str):
                raise InputError(f"{name}: got {getattr(self, name)!r}; a text.")
        others = [n for n in (*_PRICES, "price_batch_discount") if getattr(self, n) is not None]
        if others and self.price_input_per_million is None:
            raise InputError(
                f"{others[0]} is given without price_input_per_million; a price never mixes two sources.",
                hint="Give price_input_per_million too.",
            )
        if self.price_model is not None and self.price_input_per_million is not None:
            raise InputError("price_model and price_input_per_million are both given; one of them decides.")
        if self.cache_increment_tokens is not None and self.cache_minimum_tokens is None:
            raise InputError("cache_increment_tokens is given without cache_minimum_tokens.")
        if self.cache_hit_rate is not None and self.calls_per_hour is not None:
            raise InputError(
                "cache_hit_rate and calls_per_hour are both given; the second would derive the first."
            )

    def own_price(self) -> Price | None:
        """The target's price as given here; ``None`` if none is."""
        if self.price_input_per_million is None:
            return None
        return own_price(
            input=self.price_input_per_million,
            output=self.price_output_per_million,
            cached_input=self.price_cached_input_per_million,
            cache_write=self.price_cache_write_per_million,
            batch_discount=self.price_batch_discount,
            currency=self.price_currency,
            source=self.price_source,
            date=self.price_date,
        )

    def decisive(self) -> dict[str, Any]:
        """What decides which calls a run makes: everything but budgets, prices and caching."""
        return {
            k: v
            for k, v in self.to_dict().items()
            if not k.startswith(("budget_", "price_", "cache_", "calls_per_hour"))
        }

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
        per_unit = {"kernel_shap": 4, "permutation_shapley": 8}.get(self.explainer, 3)
        return given or min(2 ** min(n_units, 30), times * max(48, per_unit * n_units))


_PRICES = (
    "price_input_per_million",
    "price_output_per_million",
    "price_cached_input_per_million",
    "price_cache_write_per_million",
)


def _amount(name: str, value: Any, high: float, rule: str, *, top: bool = False) -> None:
    if value is None:
        return
    ok = not isinstance(value, bool) and isinstance(value, int | float) and value >= 0
    if not ok or not (value <= high if top else value < high):
        raise InputError(f"{name}: got {value!r}; {rule}.")


def _number(name: str, value: Any, low: float, high: float, rule: str, *, top: bool = False) -> None:
    ok = not isinstance(value, bool) and isinstance(value, int | float) and low < value
    if not ok or not (value <= high if top else value < high):
        raise InputError(f"{name}: got {value!r}; it lies in {rule}.")


def _count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name}: got {value!r}; a whole number, at least {least}.")
