"""What ProxyPrompt asks of a model: batches of requests in, blocks of results out.

Two capabilities, two protocols. A :class:`Scorer` gives the log-probability of each candidate
continuation of a prompt; a :class:`Generator` gives text. A backend may be both.

A backend sees the whole batch and may answer in any order and in blocks of any size, because it knows
best what is cheap: a local engine shares prefixes, a remote one bounds its concurrency. It *yields* each
block as soon as it is complete and computes the next one only when asked, so that whoever consumes the
iterator can write a block down before anything more is spent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

Role: TypeAlias = Literal["system", "developer", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """One chat turn; ``name`` is OpenAI's optional name of the speaker, such as ``example_user``."""

    role: Role
    content: str
    name: str | None = None

    def to_dict(self) -> dict[str, str]:
        """The dictionary that chat APIs take."""
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": self.content, **named}


Rendered: TypeAlias = str | tuple[Message, ...]
"""A prompt ready to send: plain text for completion, turns for chat."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call as the model's own tokenizer or the provider counts them.

    ``prompt_tokens`` counts the whole prompt, whether or not an engine shared its prefix; ``cached_tokens``
    is the part that a provider bills as cached input, ``cache_write_tokens`` the part it bills for keeping.
    ``reasoning_tokens`` is the part of ``completion_tokens`` that is not shown. Where one answer took several
    calls, all of them are counted.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
            self.cache_write_tokens + other.cache_write_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
        )


@dataclass(frozen=True, slots=True)
class UnitMask:
    """Which units of a whole prompt a model shall not look at; for backends that say ``masks_units`` only.

    Parameters
    ----------
    spans : tuple of (int, int)
        Where each unit begins and ends in the prompt, in characters; in order, without overlap.
    kept : tuple of bool, shape (n_units,)
        Which of them stay visible.
    """

    spans: tuple[tuple[int, int], ...]
    kept: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Ask for ``log P(candidate | prompt)`` of every candidate.

    Parameters
    ----------
    prompt : str or tuple of Message
        What stands before the candidate. With chat turns the model's own template is applied and the
        candidate is the beginning of the assistant's turn.
    candidates : tuple of str
        Exact continuations, white space included (``" billing"``).
    mask : UnitMask, optional
        Asks for the candidates given the *whole* prompt with units hidden from the model's attention, which is
        not the same as leaving them out. Whoever asks checks ``masks_units`` first.
    """

    prompt: Rendered
    candidates: tuple[str, ...]
    mask: UnitMask | None = None


Evidence: TypeAlias = Literal["logprobs", "decisions", "texts"]
"""How the values of a :class:`ScoreResult` were got.

``"logprobs"``: log-probabilities of tokens. ``"decisions"``: probabilities that a provider's decisions endpoint
states, as fine as it rounds them. ``"texts"``: the model was asked for text, ``samples`` times, and the labels in
the texts were counted.
"""


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """Answer to a :class:`ScoreRequest`.

    Attributes
    ----------
    logprobs : tuple of float or None
        Natural-log probability of each candidate, summed over its tokens; higher is more likely. Where
        ``censored`` is true it is an upper bound. ``None`` where the model gave nothing.
    censored : tuple of bool
        Whether the entry is only an upper bound (label outside the listed top log-probabilities).
    usage : Usage
    error : str or None
        Why the whole call has no answer; the values are then all ``None`` (missing, never zero).
    model_returned : str or None
        The model's name as the server reports it.
    uncertain : int
        Of the calls announced for this request, those that brought no answer and may have been billed all the
        same (a time limit that ran out after sending, an answer that broke off); ``usage`` is the sum over the others.
    evidence : {"logprobs", "decisions", "texts"}
        How the values were got; values of different evidence are not comparable. With ``"texts"`` a label that was
        seen has the logarithm of its share of the samples, one that was not seen has ``None``, and all are
        ``censored``: a share is no log-probability.
    samples : int
        Number of texts with a label that the values rest on; 0 without ``"texts"``.
    fingerprint : str or None
        What the server calls its configuration (``system_fingerprint``).
    """

    logprobs: tuple[float | None, ...]
    censored: tuple[bool, ...] = ()
    usage: Usage = field(default_factory=Usage)
    error: str | None = None
    model_returned: str | None = None
    uncertain: int = 0
    evidence: Evidence = "logprobs"
    samples: int = 0
    fingerprint: str | None = None


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Ask for a continuation at temperature 0, at most ``max_tokens`` long, cut before any of ``stop``."""

    prompt: Rendered
    max_tokens: int = 64
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """Answer to a :class:`GenerateRequest`; ``text`` is ``None`` when ``error`` says why.

    The other fields are those of :class:`ScoreResult`.
    """

    text: str | None
    usage: Usage = field(default_factory=Usage)
    error: str | None = None
    model_returned: str | None = None
    uncertain: int = 0
    fingerprint: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a batch would cost a local engine, known before it runs.

    ``distinct_tokens`` is the number of nodes of the token trie of the batch, ``naive_tokens`` what one
    full pass per (prompt, candidate) pair would compute.
    """

    n_requests: int
    distinct_tokens: int
    naive_tokens: int


OnSend: TypeAlias = Callable[[Sequence[int]], None]
"""Called with the batch indices of requests immediately before they leave (or are computed).

May be called from any thread. When it returns, the ledger knows durably that these calls are made and their money is
set aside; when it raises, for example because a limit would be passed, they must not be sent. Calls of several threads
share one write to the disk, so a backend that keeps many requests in flight should announce the next ones while others
are on the wire.

An index is announced again before every further call for the same request that costs money: a retry after an attempt
that may have been billed (see ``uncertain`` in the results), or one more sample. Each announcement counts as one call.
A retry after an attempt that certainly cost nothing (refused with status 429, never connected) is not announced.
"""


def announce_soon(on_send: OnSend | None, indices: Sequence[int]) -> None:
    """Say which requests will leave next, in this order, just before announcing others or yielding a block of results.

    A promise of nothing: they are announced to ``on_send`` all the same when they leave. But the ledger can then write
    that down together with the block's results, and the calls leave without waiting for the disk a second time.

    Parameters
    ----------
    on_send : callable or None
        What the backend was given.
    indices : sequence of int
        Not announced so far. As many as the block has results leave next; those after them are marked ahead. A few
        suffice: after a power cut each of them counts as a call that may have been made.
    """
    soon = getattr(on_send, "soon", None)
    if soon is not None:
        soon(indices)


def announce_unsent(on_send: OnSend | None, indices: Sequence[int]) -> None:
    """Say that requests that were announced, once, did not leave and will not: they cost nothing and have no result."""
    unsent = getattr(on_send, "unsent", None)
    if unsent is not None and indices:
        unsent(indices)


def may_leave(on_send: OnSend | None, index: int) -> bool:
    """Whether a request, announced now, could leave without waiting for the disk."""
    ready = getattr(on_send, "ready", None)
    return on_send is None if ready is None else bool(ready(index))


OnTokens: TypeAlias = Callable[[int], None]
"""Called with the number of tokens computed since the last call; drives progress bars."""


@runtime_checkable
class Backend(Protocol):
    """What every backend can say of itself."""

    @property
    def name(self) -> str:
        """Name a person recognises, e.g. ``embedded:smollm2-135m``."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything that decides the answers besides the request; JSON values only, no secrets.

        Goes into the ledger key: provider, endpoint, model, revision or weight hash, dtype, template.
        Must be known without loading weights, so that a fully recorded run loads none.
        """
        ...


class Journal(Protocol):
    """Where a backend whose work outlives the process writes down what is under way.

    A backend that sets ``keeps_journal`` gets one as ``score(..., journal=)`` and ``generate(..., journal=)``, and
    answers ``under_way(journal)``.

    Attributes
    ----------
    keys : sequence of str
        ``keys[i]`` names ``requests[i]`` of the batch, the same in every process: its key in the ledger.

    Notes
    -----
    A journal may have ``former_keys`` too: what an earlier version called the same requests in its entries.
    """

    keys: Sequence[str]

    def read(self) -> Mapping[str, str]:
        """All entries by name."""
        ...

    def write(self, name: str, entry: str | None) -> None:
        """Make one entry durable, readable by its owner only, before returning; ``None`` removes it."""
        ...


@dataclass(frozen=True, slots=True)
class BatchStatus:
    """Where a batch stands that is written down and not wholly collected.

    Attributes
    ----------
    id : str or None
        The provider's name of it; ``None`` if its sender stopped before it had one. A run looks whether it is there.
    status : str
        In the provider's words; ``"gone"`` if the provider does not know it, ``"not accepted yet"`` without an id.
    n_requests, n_left : int
        Requests in it, and those of them that nobody has collected.
    created : float
        When it was written down, in seconds since 1970.
    """

    id: str | None
    status: str
    n_requests: int
    n_left: int
    created: float


def keeps_journal(backend: Backend) -> bool:
    """Whether a backend's work outlives the process, so that it needs a :class:`Journal`."""
    return bool(getattr(backend, "keeps_journal", False))


def is_deterministic(backend: Backend) -> bool:
    """Whether a backend says of itself that it answers the same request the same each time (``deterministic = True``).

    Of one that says nothing it is not assumed: a remote model may answer differently from call to call.
    """
    return bool(getattr(backend, "deterministic", False))


def masks_units(backend: Backend) -> bool:
    """Whether a backend answers requests with a :class:`UnitMask`, and answers no others."""
    return bool(getattr(backend, "masks_units", False))


@runtime_checkable
class Scorer(Backend, Protocol):
    """Gives log-probabilities of candidate continuations."""

    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        on_send: OnSend | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Iterator[Sequence[tuple[int, ScoreResult]]]:
        """Yield blocks of ``(index into requests, result)``, each index exactly once, in any order."""
        ...


@runtime_checkable
class Generator(Backend, Protocol):
    """Gives text."""

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        *,
        on_send: OnSend | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Iterator[Sequence[tuple[int, GenerateResult]]]:
        """Yield blocks of ``(index into requests, result)``, each index exactly once, in any order."""
        ...


@runtime_checkable
class Bounded(Protocol):
    """A backend that knows how many completion tokens one call may cost at most; money is set aside by that."""

    def most_completion_tokens(self, request: ScoreRequest | GenerateRequest) -> int:
        """Upper bound for each announced call: the ``max_tokens`` that is sent, reasoning tokens included."""
        ...


@runtime_checkable
class Planner(Protocol):
    """A local backend that can price a batch in tokens before running it, and count tokens of a text."""

    def plan(self, requests: Sequence[ScoreRequest]) -> Plan:
        """Count tokens without running the network."""
        ...

    def count_tokens(self, prompt: Rendered) -> int:
        """Tokens of one rendered prompt, special tokens included."""
        ...
