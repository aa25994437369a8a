"""Strings and numbers as a reader sees them. Every dynamic string of a report passes :func:`visible`."""

from __future__ import annotations

import math
import re
import unicodedata

__all__ = [
    "NOT_AVAILABLE",
    "clip",
    "count",
    "fixed",
    "interval",
    "money",
    "one_line",
    "p_value",
    "percent",
    "plural",
    "rate",
    "share",
    "signed",
    "visible",
]

NOT_AVAILABLE = "n/a"

# Printable by Python's rules and yet without ink: fillers, joiners and variation selectors. Plain text or
# emoji presentation (U+FE0E, U+FE0F) is left alone, because nearly every emoji carries it.
_NO_INK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0d\uffa0\U000e0100-\U000e01ef]"
)

_CURRENCY_SIGNS = {"USD": "$", "EUR": "\u20ac", "GBP": "\u00a3"}


def visible(text: str) -> str:
    """Make characters without ink visible as code points, such as ``[U+202E]``.

    Parameters
    ----------
    text : str
        Any text, lone surrogates included.

    Returns
    -------
    str
        The text without control, bidirectional, zero-width, tag, private-use or unassigned characters. Line
        feeds and tabs stay; a carriage return before a line feed is dropped.

    Examples
    --------
    >>> visible("pay" + chr(0x200b) + "pal")
    'pay[U+200B]pal'
    """
    text = text.replace("\r\n", "\n")
    if text.isprintable() and not _NO_INK.search(text):
        return text
    return "".join(c if _has_ink(c) else f"[U+{ord(c):04X}]" for c in text)


def _has_ink(character: str) -> bool:
    if character in "\n\t" or unicodedata.category(character) == "Zs":
        return True
    return character.isprintable() and not _NO_INK.match(character)


def one_line(text: str) -> str:
    """Fold every run of white space into one space."""
    return " ".join(text.split())


def clip(text: str, limit: int) -> str:
    """Cut ``text`` to at most ``limit`` characters, the last of them an ellipsis if anything was cut.

    Examples
    --------
    >>> clip("abcdef", 4)
    'abc\u2026'
    """
    return text if len(text) <= limit else text[: max(limit - 1, 0)].rstrip() + "\u2026"


def plural(n: float | None, noun: str, many: str | None = None) -> str:
    """Count a noun.

    Examples
    --------
    >>> plural(1, "query", "queries"), plural(1200, "call")
    ('1 query', '1,200 calls')
    """
    return f"{count(n)} {noun if n == 1 else many or noun + 's'}"


def count(value: float | None) -> str:
    """Whole number with thousands separators."""
    return NOT_AVAILABLE if value is None else _minus(f"{value:,.0f}")


def fixed(value: float | None, digits: int = 3) -> str:
    """Plain number: fixed decimals in the readable range, powers of ten outside it."""
    if value is None:
        return NOT_AVAILABLE
    if value != 0 and not 10.0**-digits <= abs(value) < 1e6:
        return _minus(f"{value:.1e}")
    if abs(value) >= 100:
        return _minus(f"{value:,.0f}")
    return _minus(f"{value:.{digits}f}")


def signed(value: float | None, digits: int = 3) -> str:
    """Number with its sign; values that round to zero carry none."""
    if value is None:
        return NOT_AVAILABLE
    text = f"{value:+.{digits}f}" if abs(value) < 1e6 else f"{value:+.1e}"
    return _minus(text if any(c in "123456789" for c in text) else text[1:])


def percent(value: float | None, digits: int = 1) -> str:
    """Share in [0, 1] as per cent."""
    return NOT_AVAILABLE if value is None else _minus(f"{100 * value:.{digits}f}\u00a0%")


def share(value: float | None) -> str:
    """Share in whole per cent, unless it would round to a misleading 0 or 100."""
    if value is None:
        return NOT_AVAILABLE
    return percent(value, 0 if value in (0, 1) or 0.01 <= abs(value) <= 0.99 else 1)


def interval(low: str, high: str) -> str:
    """``low to high``, the unit said once."""
    unit = "\u00a0%"
    both = low.endswith(unit) and high.endswith(unit)
    return f"{low.removesuffix(unit) if both else low} to {high}"


def p_value(value: float | None) -> str:
    """``p = 0.012``, or ``p < 0.001``."""
    if value is None:
        return f"p {NOT_AVAILABLE}"
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def money(value: float | None, currency: str) -> str:
    """Amount with its currency, with more decimals the smaller it is.

    Examples
    --------
    >>> [money(amount, "USD") for amount in (12.5, 0.0123, 0.000825)]
    ['$12.50', '$0.0123', '$0.000825']
    """
    if value is None:
        return NOT_AVAILABLE
    sign = "\u2212" if value < 0 else ""
    size = abs(value)
    if size >= 0.1 or value == 0:
        amount = f"{size:,.2f}"
    elif size < 1e-6:
        amount = f"{size:.1e}"
    else:
        # three significant digits, so that fractions of a cent can be told apart; at least four decimals
        amount = f"{size:.{2 - math.floor(math.log10(size))}f}"
        amount = amount[:6] + amount[6:].rstrip("0")
    symbol = _CURRENCY_SIGNS.get(currency)
    return f"{sign}{symbol}{amount}" if symbol else f"{sign}{amount}\u00a0{currency}"


def rate(value: float | None, currency: str) -> str:
    """Price as it is listed: every decimal that it has, two at least.

    Examples
    --------
    >>> rate(2.5, "USD"), rate(0.375, "USD"), rate(0.0625, "EUR")
    ('$2.50', '$0.375', '\u20ac0.0625')
    """
    if value is None:
        return NOT_AVAILABLE
    symbol = _CURRENCY_SIGNS.get(currency)
    whole, _, decimals = f"{value:,.9f}".partition(".")
    amount = f"{whole}.{decimals.rstrip('0').ljust(2, '0')}"
    return f"{symbol}{amount}" if symbol else f"{amount}\u00a0{currency}"


def _minus(text: str) -> str:
    return text.replace("-", "\u2212", 1) if text.startswith("-") else text
