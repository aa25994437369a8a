"""What a model charges for tokens: given by the user, or read from the price list of ``genai-prices``.

The list is the one that the installed package ships; nothing here opens a connection. A model is matched the
way ``genai-prices`` matches it, by the address of the server and the model's name. What it does not know is
:class:`Unpriced`, with the reason: a price is never guessed, and one price never mixes two sources.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from importlib import metadata
from ipaddress import ip_address
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from ._require import require
from .errors import InputError, MissingDependencyError

__all__ = [
    "FREE",
    "Price",
    "Pricing",
    "Quote",
    "Rates",
    "Unpriced",
    "find_price",
    "is_billed",
    "own_price",
    "quote_run",
]

# The package states no date for its list; these are the days on which its versions appeared.
_LIST_DATES = {"0.2.3": "2026-11-10"}
_BATCH = {"processing": "batch"}


@dataclass(frozen=True, slots=True)
class Rates:
    """Money per million tokens; ``None`` where no such price is known.

    Attributes
    ----------
    input : Decimal
        Prompt tokens that no cache has.
    output : Decimal or None
        Completion tokens.
    cached_input : Decimal or None
        Prompt tokens read from the provider's prompt cache.
    cache_write : Decimal or None
        Prompt tokens written to that cache, in place of ``input``. ``None``: writing costs no more than
        ``input``.
    """

    input: Decimal
    output: Decimal | None = None
    cached_input: Decimal | None = None
    cache_write: Decimal | None = None


@dataclass(frozen=True, slots=True)
class Price:
    """The price of one model.

    Attributes
    ----------
    rates : Rates
        For prompts up to the first of ``tiers``.
    batch : Rates or None
        The same for calls sent through the provider's batch interface.
    tiers : tuple of (int, Rates, Rates or None)
        Prompts of more tokens than the number pay these rates, for all their tokens.
    provider, model : str
        What the price list calls them; empty for a price given by the user.
    source : str
        Where the price is from.
    date : str
        Of what date it is; empty if the source does not say.
    currency : str
    note : str
        What else to know about it.
    """

    rates: Rates
    batch: Rates | None = None
    tiers: tuple[tuple[int, Rates, Rates | None], ...] = ()
    provider: str = ""
    model: str = ""
    source: str = ""
    date: str = ""
    currency: str = "USD"
    note: str = ""

    def at(self, prompt_tokens: float, *, batch: bool = False) -> Rates | None:
        """Rates of a call with so many prompt tokens; ``None`` if there is no batch price.

        Examples
        --------
        >>> low, high = Rates(Decimal(2)), Rates(Decimal(4))
        >>> price = Price(low, tiers=((1000, high, None),))
        >>> [int(price.at(n).input) for n in (1000, 1001)]
        [2, 4]
        """
        found = (self.rates, self.batch)
        for start, rates, cheaper in self.tiers:
            if prompt_tokens > start:
                found = (rates, cheaper)
        return found[1] if batch else found[0]

    @property
    def name(self) -> str:
        """Provider and model as the price list names them, e.g. ``openai/gpt-5.4-mini``."""
        return f"{self.provider}/{self.model}" if self.model else ""


@dataclass(frozen=True, slots=True)
class Unpriced:
    """No price, and why; ``hint`` says what would give one."""

    reason: str
    hint: str = ""


Quote: TypeAlias = Price | Unpriced


@dataclass(frozen=True, slots=True)
class Pricing:
    """What the models of a run charge; ``proxies`` by the name of the model."""

    target: Quote = Unpriced("no price was given")
    proxies: Mapping[str, Quote] = field(default_factory=dict)


FREE = Price(Rates(Decimal(0), Decimal(0), Decimal(0), Decimal(0)), source="a model on this machine")
"""What a local model charges."""


def own_price(
    *,
    input: float,
    output: float | None = None,
    cached_input: float | None = None,
    cache_write: float | None = None,
    batch_discount: float | None = None,
    currency: str = "USD",
    date: str = "",
    source: str = "given by the user",
) -> Price:
    """A price given by the user; what is left out is unknown and not taken from anywhere else.

    Parameters
    ----------
    input, output, cached_input, cache_write : float
        Money per million tokens.
    batch_discount : float, optional
        Share taken off in batches, e.g. 0.5.

    Examples
    --------
    >>> own_price(input=2.5, output=10, batch_discount=0.5).batch
    Rates(input=Decimal('1.25'), output=Decimal('5.0'), cached_input=None, cache_write=None)
    """
    rates = Rates(_decimal(input), *(_optional(x) for x in (output, cached_input, cache_write)))
    batch = None
    if batch_discount is not None:
        rest = 1 - _decimal(batch_discount)
        batch = _scaled(rates, lambda rate: rate * rest)
    return Price(rates, batch, source=source, date=date, currency=currency)


def find_price(
    identity: Mapping[str, Any], *, model: str | None = None, at: datetime | None = None
) -> Price | Unpriced:
    """Look a model up in the price list that ``genai-prices`` ships.

    Parameters
    ----------
    identity : mapping
        A backend's identity. A server named by ``base_url`` is looked up by that address and ``model``.
    model : str, optional
        ``"provider/model"`` to look up instead, for example of a gateway whose address tells nothing.
    at : datetime, optional
        Moment whose price counts; default: now.

    Returns
    -------
    Price or Unpriced
        Unpriced: ``genai-prices`` is not installed, or knows no such provider or model, or the model is not
        reached over a network.

    Raises
    ------
    InputError
        If ``model`` does not name a provider and a model.

    Notes
    -----
    Only a model that somebody bills for can have a listed price: one behind a ``base_url``. Scripts, recordings and
    models on this machine cost no money.
    """
    if model is not None:
        provider, slash, name = model.partition("/")
        if not (provider and slash and name):
            raise InputError(
                f"price_model: got {model!r}; the form is provider/model.", hint="E.g. openai/gpt-5.4-mini."
            )
        where: dict[str, str | None] = {"provider_id": provider, "provider_api_url": None}
    elif is_billed(identity):
        name, where = str(identity["model"]), {"provider_id": None, "provider_api_url": identity["base_url"]}
    else:
        return Unpriced(
            "the target does not run at a provider that bills by the token",
            "Give price_input_per_million, or price_model to count as another model.",
        )
    try:
        data, snapshot = (
            require("genai_prices.data", "prices"),
            require("genai_prices.data_snapshot", "prices"),
        )
    except MissingDependencyError as error:
        return Unpriced(
            "the price list, package genai-prices, is not installed",
            f"{error.hint}; or give price_input_per_million.",
        )
    # A snapshot of the shipped data, never the package's global one, which may have been updated over a network.
    shipped = snapshot.DataSnapshot(providers=data.providers, from_auto_update=False)
    try:
        found_provider, found = shipped.find_provider_model(
            name, None, where["provider_id"], where["provider_api_url"]
        )
    except LookupError:
        version = metadata.version("genai-prices")
        at_what = where["provider_id"] or where["provider_api_url"]
        return Unpriced(
            f"genai-prices {version} lists no price of {name!r} at {at_what!r}",
            "Give price_input_per_million, or price_model = provider/model.",
        )
    return _listed(found_provider, found, at or datetime.now(UTC))


def quote_run(
    target: Mapping[str, Any],
    proxies: Mapping[str, Mapping[str, Any]],
    *,
    own: Price | None = None,
    model: str | None = None,
) -> Pricing:
    """Prices of a target and its proxies, by their backends' identities.

    Parameters
    ----------
    target : mapping
    proxies : mapping of str to mapping
    own : Price, optional
        The user's price of the target; the list is then asked only for the names, by which caching rules go.
    model : str, optional
        See :func:`find_price`; for the target.

    Notes
    -----
    A proxy on this machine is free; one on a server is priced by the list.
    """
    quote: Quote
    if own is None:
        quote = find_price(target, model=model)
    else:
        listed = find_price(target) if is_billed(target) else None
        quote = (
            replace(own, provider=listed.provider, model=listed.model) if isinstance(listed, Price) else own
        )
    others = {name: find_price(it) if is_billed(it) else FREE for name, it in proxies.items()}
    return Pricing(quote, others)


def is_billed(identity: Mapping[str, Any]) -> bool:
    """Whether a backend's identity is that of a server on another machine.

    Examples
    --------
    >>> is_billed({"provider": "openai-compatible", "base_url": "https://api.openai.com/v1", "model": "m"})
    True
    >>> is_billed({"provider": "openai-compatible", "base_url": "http://127.0.0.1:8080/v1", "model": "m"})
    False
    """
    host = urlsplit(str(identity.get("base_url") or "")).hostname
    if host is None or host == "localhost":
        return False
    try:
        return not ip_address(host).is_loopback
    except ValueError:
        return True


def _listed(provider: Any, model: Any, at: datetime) -> Price | Unpriced:
    standard = model.get_prices(at)
    batch = None
    if any(variant.when == _BATCH for variant in model.price_variants or ()):
        batch = model.get_prices(at, _BATCH)
    version = metadata.version("genai-prices")
    starts = sorted({tier.start for name in _KEYS for tier in getattr(getattr(standard, name), "tiers", ())})
    rates = _rates(standard, 0)
    if rates is None:
        return Unpriced(
            f"genai-prices {version} lists no price per input token of {provider.id}/{model.id}",
            "Give price_input_per_million.",
        )
    tiers = []
    for start in starts:
        above = _rates(standard, start + 1)
        assert above is not None  # the key is there, or the first rates would be None
        tiers.append((start, above, _rates(batch, start + 1) if batch else None))
    return Price(
        rates,
        _rates(batch, 0) if batch else None,
        tuple(tiers),
        provider=provider.id,
        model=model.id,
        source=f"genai-prices {version}",
        date=_LIST_DATES.get(version, ""),
        note=_hours(model, at),
    )


_KEYS = ("input_mtok", "output_mtok", "cache_read_mtok", "cache_write_mtok")


def _rates(prices: Any, prompt_tokens: int) -> Rates | None:
    given, output, cached, write = (_one(getattr(prices, name), prompt_tokens) for name in _KEYS)
    return None if given is None else Rates(given, output, cached, write)


def _one(value: Any, prompt_tokens: int) -> Decimal | None:
    rate = getattr(value, "base", value)
    for tier in getattr(value, "tiers", ()):  # in ascending order
        if prompt_tokens > tier.start:
            rate = tier.price
    return None if rate is None else Decimal(rate)


def _hours(model: Any, at: datetime) -> str:
    parts = model.prices if isinstance(model.prices, list) else []
    if any(hasattr(part.constraint, "start_time") for part in parts):
        return f"The price depends on the hour; this is the one of {at:%H:%M} UTC."
    return ""


def _scaled(rates: Rates, scale: Callable[[Decimal], Decimal]) -> Rates:
    parts = (rates.output, rates.cached_input, rates.cache_write)
    return Rates(scale(rates.input), *(None if part is None else scale(part) for part in parts))


def _decimal(value: float) -> Decimal:
    # Through the shortest text, so that 0.1 is a tenth and not the binary number next to it.
    return Decimal(str(value))


def _optional(value: float | None) -> Decimal | None:
    return None if value is None else _decimal(value)
