"""From which prefix on a provider caches prompts, by model family; every row has its source and date.

Prices are not here: what a cached or a written token costs comes with the price of the model. The rows are
what the providers' own documentation said on the date given; a model that no row names has no rule, and its
caching is then not reported. ``cache_minimum_tokens`` and ``cache_increment_tokens`` override any row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["CachingRule", "caching_rule"]


@dataclass(frozen=True, slots=True)
class CachingRule:
    """How a provider caches the beginning of prompts.

    Attributes
    ----------
    family : str
        Which models it is about.
    minimum : int
        Tokens of the shortest prefix that is cached.
    increment : int
        Prefixes are cached in steps of so many tokens beyond ``minimum``.
    lifetime : float or None
        Seconds an entry lives after its last use; ``None``: not stated.
    request : str
        What a request must do to be cached; empty if nothing.
    source, date : str
        Where this is written, and of what date the text is.
    """

    family: str
    minimum: int
    increment: int = 1
    lifetime: float | None = None
    request: str = ""
    source: str = ""
    date: str = ""

    def cached_tokens(self, prefix: int) -> int:
        """Tokens of a stable prefix that a warm cache holds.

        Examples
        --------
        >>> rule = CachingRule("a family", minimum=1024, increment=128)
        >>> [rule.cached_tokens(n) for n in (1023, 1024, 1151, 1152)]
        [0, 1024, 1024, 1152]
        """
        if prefix < self.minimum:
            return 0
        return self.minimum + (prefix - self.minimum) // self.increment * self.increment


_MARK = "marks the end of the demonstrations with cache_control"
_BREAK = "puts a prompt_cache_breakpoint behind the demonstrations; the automatic one comes after the query"


def _claude(minimum: int, models: str) -> CachingRule:
    return CachingRule(
        models, minimum, lifetime=300.0, request=_MARK,
        source="Anthropic documentation, 'Prompt caching', cache limitations", date="2026-10",
    )  # fmt: skip


def _gemini(minimum: int, models: str) -> CachingRule:
    return CachingRule(
        models,
        minimum,
        source="Gemini API documentation, 'Context caching', implicit caching",
        date="2026-10-23",
    )


# OpenAI's guide says of models before GPT-5.6 that the minimum varies with the request; its cookbook says 1,024.
_OPENAI = CachingRule(
    "OpenAI models before GPT-5.6", 1024, 128, 300.0,
    source="OpenAI Cookbook, 'Prompt Caching 201'", date="2026-11",
)  # fmt: skip
_OPENAI_NEW = CachingRule(
    "OpenAI models from GPT-5.6 on", 1024, 1, 1800.0, _BREAK,
    source="OpenAI documentation, 'Prompt caching'", date="2026-10",
)  # fmt: skip

# By the ids of genai-prices. Claude Haiku 5.5 and Fable 5.2 are missing: no text of Anthropic's named them yet.
_CLAUDE = (
    (
        _claude(512, "Claude Opus 5 and 5.5, Sonnet 5.5, Fable 5 and 5.1"),
        "claude-opus-5 claude-opus-5-5 claude-sonnet-5-5 claude-fable-5 claude-fable-5-1",
    ),
    (
        _claude(1024, "Claude Sonnet 4 to 5, Opus 4, 4.1 and 4.8"),
        "claude-sonnet-5 claude-sonnet-4-6 claude-sonnet-4-5 claude-sonnet-4-0 claude-4-sonnet claude-opus-4-8"
        " claude-opus-4-1 claude-opus-4-0 claude-4-opus",
    ),
    (
        _claude(2048, "Claude Opus 4.7, Haiku 3.5"),
        "claude-opus-4-7 claude-3-5-haiku-latest claude-3-5-haiku",
    ),
    (
        _claude(4096, "Claude Opus 4.5 and 4.6, Haiku 4.5"),
        "claude-opus-4-6 claude-opus-4-5 claude-haiku-4-5",
    ),
)
_GEMINI = (
    (_gemini(2048, "Gemini 2.5 Flash and Pro"), "gemini-2.5-flash gemini-2.5-pro"),
    (
        _gemini(4096, "Gemini 3.1 Pro, 3.5 to 3.8 Flash, 4 Argon"),
        "gemini-3.1-pro-preview gemini-3.5-flash gemini-3.6-flash gemini-3.7-flash gemini-3.8-flash gemini-4-argon",
    ),
)
_CLAUDE_AT = ("anthropic", "google", "azure")  # Bedrock documents minimums of its own
_OPENAI_NAME = re.compile(r"(?:gpt-(\d+)(?:\.(\d+))?|o\d)(?![\d.])")


def caching_rule(provider: str, model: str) -> CachingRule | None:
    """The rule for a model, by the names of the price list; ``None`` where none is recorded.

    Examples
    --------
    >>> caching_rule("openai", "gpt-5.4-mini").increment, caching_rule("openai", "gpt-6-luna").increment
    (128, 1)
    >>> caching_rule("anthropic", "claude-haiku-4-5").minimum
    4096
    """
    if provider in ("openai", "azure") and (found := _OPENAI_NAME.match(model)):
        version = (int(found[1] or 0), int(found[2] or 0))
        return _OPENAI_NEW if version >= (5, 6) else _OPENAI
    rows = (*(_CLAUDE if provider in _CLAUDE_AT else ()), *(_GEMINI if provider == "google" else ()))
    return next((rule for rule, models in rows if model in models.split()), None)
