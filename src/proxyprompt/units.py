"""Units beyond demonstrations: sentences of the instruction, retrieved documents, sentences and words of a query.

Each class here is a :class:`~proxyprompt.prompt.UnitPrompt`: a :class:`~proxyprompt.value_function.PromptValueFunction`
takes it in place of the prompt, and every explainer works on what comes out. Units of the instruction are those of
every query. Units of a query belong to that query alone, so its value function has one column;
:func:`~proxyprompt.explanation.explain_queries` explains many queries in one batch.

When every unit is kept, the model reads exactly the text that it reads without units.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as private
from types import MappingProxyType
from typing import Literal, TypeAlias

from ._segments import Segments, sentence_spans, word_spans
from .backends.base import Rendered
from .errors import InputError
from .prompt import FewShotPrompt, Query, Unit

__all__ = [
    "LIME_MASK",
    "InstructionSentences",
    "QueryDocuments",
    "QuerySentences",
    "QueryUnits",
    "QueryWords",
]

Split: TypeAlias = Literal["whitespace", "lime"]
Removal: TypeAlias = Literal["delete", "mask"]
Repeated: TypeAlias = Literal["separate", "together"]

LIME_MASK = "UNKWORDZ"
"""What LIME's reference implementation puts in place of a word."""


@dataclass(frozen=True)
class InstructionSentences:
    """The sentences of a prompt's instruction as units, alone or before its demonstrations.

    Parameters
    ----------
    prompt : FewShotPrompt
    demonstrations : bool
        Whether the demonstrations are units too, behind the sentences. If not, they always stay.

    Raises
    ------
    InputError
        If the prompt has no instruction.

    Notes
    -----
    A sentence that stays takes along the white space before it, the first one the white space before the whole
    instruction. Where a sentence ends is decided by a rule for English (abbreviations, numbers, list items and
    hard-wrapped lines are known to it).

    Examples
    --------
    >>> prompt = FewShotPrompt((), "Be kind. Answer yes or no.", "Q: {input}\\nA: {output}")
    >>> units = InstructionSentences(prompt)
    >>> units.render([False, True], Query("q", {"input": "Is it late?"}, "yes"))
    'Answer yes or no.\\n\\nQ: Is it late?\\nA:'
    """

    prompt: FewShotPrompt
    demonstrations: bool = False
    _instruction: Segments = private(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        text = self.prompt.instruction
        segments = Segments(text, sentence_spans(text))
        if not segments.spans:
            raise InputError(
                "prompt: it has no instruction, so there are no sentences to leave out.",
                hint="The demonstrations alone are the units of the prompt itself.",
            )
        object.__setattr__(self, "_instruction", segments)

    @property
    def units(self) -> tuple[Unit, ...]:
        """The sentences, then the demonstrations if they are units."""
        sentences = tuple(
            Unit("instruction", f"instruction-{i}", text) for i, text in enumerate(self._instruction.texts, 1)
        )
        return sentences + (self.prompt.units if self.demonstrations else ())

    @property
    def n_units(self) -> int:
        """Number of sentences, and of demonstrations if they are units."""
        return len(self._instruction.spans) + (self.prompt.n_units if self.demonstrations else 0)

    def render(self, coalition: Sequence[bool] | None, query: Query) -> Rendered:
        """The prompt for ``query`` with only the units of the coalition; ``None`` keeps all."""
        if coalition is None:
            return self.prompt.render(None, query)
        _check_length(coalition, self.n_units)
        n = len(self._instruction.spans)
        shown = coalition[n:] if self.demonstrations else None
        return self.prompt.render(shown, query, instruction=self._instruction.joined(coalition[:n]))

    def candidate(self, answer: str, choices: Sequence[str] | None = None) -> str:
        """As :meth:`FewShotPrompt.candidate <proxyprompt.prompt.FewShotPrompt.candidate>`."""
        return self.prompt.candidate(answer, choices)


@dataclass(frozen=True)
class QueryUnits(ABC):
    """A prompt together with one query, a field of which is made of units; the base of the classes below.

    Parameters
    ----------
    prompt : FewShotPrompt
        Demonstrations and instruction always stay.
    query : Query
        The only one that can be asked.
    """

    prompt: FewShotPrompt
    query: Query

    @property
    @abstractmethod
    def units(self) -> tuple[Unit, ...]:
        """The units, in the order of the text."""

    @abstractmethod
    def inputs(self, coalition: Sequence[bool]) -> Mapping[str, str]:
        """The query's fields with only the units of the coalition, shape (n_units,)."""

    @property
    def n_units(self) -> int:
        """Number of units."""
        return len(self.units)

    def render(self, coalition: Sequence[bool] | None, query: Query) -> Rendered:
        """The prompt with only the units of the coalition; ``None`` keeps all.

        Raises
        ------
        InputError
            If ``query`` is not the one whose units these are, or the coalition has another length.
        """
        if query != self.query:
            raise InputError(
                f"query: {query.id!r} asked with the units of {self.query.id!r}; they belong to one query.",
                hint="Make a value function of its own per query, or use explain_queries.",
            )
        if coalition is None:
            coalition = [True] * self.n_units
        _check_length(coalition, self.n_units)
        return self.prompt.render(None, replace(query, inputs=self.inputs(coalition)))

    def candidate(self, answer: str, choices: Sequence[str] | None = None) -> str:
        """As :meth:`FewShotPrompt.candidate <proxyprompt.prompt.FewShotPrompt.candidate>`."""
        return self.prompt.candidate(answer, choices)


@dataclass(frozen=True)
class QueryWords(QueryUnits):
    """The words of a query as units.

    Parameters
    ----------
    prompt : FewShotPrompt
    query : Query
    field : str
        The field of the query that is cut into words.
    split : {"whitespace", "lime"}
        ``"whitespace"``: what stands between white space, punctuation attached. Every visible character then belongs to
        a unit, so that nothing of the text is left when no unit is, and no word of any script is cut inside.
        ``"lime"``: runs of letters, digits and underscores, as LIME splits; punctuation always stays.
    removal : {"delete", "mask"}
        Words that are left out are deleted, as in [PE], or replaced by ``mask``, as LIME does when it tells
        occurrences of a word apart.
    mask : str
        Only used to mask.
    repeated : {"separate", "together"}
        Whether each occurrence of a word is a unit of its own, or all of them are one.

    Raises
    ------
    InputError
        If the query has no such field or no word in it, the prompt does not show the field, or an option is unknown.

    Notes
    -----
    Deleting: with ``split="whitespace"`` a word goes with the white space before it, and text that begins and ends without
    white space still does; with ``split="lime"`` only the word goes, and gaps stay, double blanks included.

    LIME's text explainer by default (``bow=True``) is ``split="lime", removal="delete", repeated="together"``, and with
    ``bow=False`` it is ``split="lime", removal="mask"``.

    Examples
    --------
    >>> prompt = FewShotPrompt((), "", "Review: {input}\\nMood: {output}")
    >>> query = Query("q", {"input": "bad , very bad"}, "negative")
    >>> keep = [False, True, True, True]
    >>> QueryWords(prompt, query).render(keep, query)
    'Review: , very bad\\nMood:'
    >>> QueryWords(prompt, query, removal="mask").render(keep, query)
    'Review: UNKWORDZ , very bad\\nMood:'
    >>> [unit.text for unit in QueryWords(prompt, query, split="lime", repeated="together").units]
    ['bad', 'very']
    """

    field: str = "input"
    split: Split = "whitespace"
    removal: Removal = "delete"
    mask: str = LIME_MASK
    repeated: Repeated = "separate"
    _segments: Segments = private(init=False, repr=False, compare=False)
    _owners: tuple[int, ...] = private(init=False, repr=False, compare=False)
    _units: tuple[Unit, ...] = private(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _one_of("split", self.split, ("whitespace", "lime"))
        _one_of("removal", self.removal, ("delete", "mask"))
        _one_of("repeated", self.repeated, ("separate", "together"))
        text = _field_text(self.prompt, self.query, self.field)
        segments = Segments(text, word_spans(text, self.split))
        if not segments.spans:
            raise InputError(
                f"query {self.query.id!r}: no word in its field {self.field!r}, which is {text[:40]!r}.",
                hint="Leave such queries out; without units there is nothing to explain.",
            )
        words = segments.texts
        first = (
            {word: i for i, word in reversed(list(enumerate(words)))} if self.repeated == "together" else {}
        )
        leaders = [first.get(word, i) for i, word in enumerate(words)]
        number = {leader: i for i, leader in enumerate(dict.fromkeys(leaders))}
        object.__setattr__(self, "_segments", segments)
        object.__setattr__(self, "_owners", tuple(number[leader] for leader in leaders))
        object.__setattr__(
            self,
            "_units",
            tuple(Unit("word", f"word-{i + 1}", words[leader]) for leader, i in number.items()),
        )

    @property
    def units(self) -> tuple[Unit, ...]:
        """The words, in the order of the text."""
        return self._units

    def inputs(self, coalition: Sequence[bool]) -> Mapping[str, str]:
        """The query's fields with only the words of the coalition, shape (n_units,)."""
        kept = [coalition[owner] for owner in self._owners]
        if self.removal == "mask":
            text = self._segments.replaced(kept, self.mask)
        elif self.split == "lime":
            text = self._segments.replaced(kept, "")
        else:
            text = self._segments.joined(kept)
        return {**self.query.inputs, self.field: text}


@dataclass(frozen=True)
class QuerySentences(QueryUnits):
    """The sentences of a query as units; those left out are deleted with the white space before them.

    Parameters
    ----------
    prompt : FewShotPrompt
    query : Query
    field : str
        The field of the query that is cut into sentences, by the rule of :class:`InstructionSentences`.

    Raises
    ------
    InputError
        If the query has no such field or no sentence in it, or the prompt does not show the field.
    """

    field: str = "input"
    _segments: Segments = private(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        text = _field_text(self.prompt, self.query, self.field)
        segments = Segments(text, sentence_spans(text))
        if not segments.spans:
            raise InputError(
                f"query {self.query.id!r}: no sentence in its field {self.field!r}, which is {text[:40]!r}.",
                hint="Leave such queries out; without units there is nothing to explain.",
            )
        object.__setattr__(self, "_segments", segments)

    @property
    def units(self) -> tuple[Unit, ...]:
        """The sentences, in the order of the text."""
        return tuple(
            Unit("sentence", f"sentence-{i}", text) for i, text in enumerate(self._segments.texts, 1)
        )

    def inputs(self, coalition: Sequence[bool]) -> Mapping[str, str]:
        """The query's fields with only the sentences of the coalition, shape (n_units,)."""
        return {**self.query.inputs, self.field: self._segments.joined(coalition)}


@dataclass(frozen=True)
class QueryDocuments(QueryUnits):
    """The documents retrieved for a query as units.

    Parameters
    ----------
    prompt : FewShotPrompt
        Its query template has a slot for the documents, e.g. ``"{documents}\\n\\nQuestion: {input}\\nAnswer:"``.
    query : Query
        Need not hold the documents; if it does, they must be what is given here, joined.
    documents : mapping of str to str
        Text by name, in the order in which they are shown.
    field : str
        Name of the slot.
    separator : str
        Stands between two documents.

    Raises
    ------
    InputError
        If there is no document, one has no text, the prompt has no such slot, or the query holds another text for it.

    Examples
    --------
    >>> prompt = FewShotPrompt((), "", "{input} {output}", query_template="{documents}\\nQ: {input}\\nA:")
    >>> query = Query("q", {"input": "Capital of Peru?"}, "Lima")
    >>> units = QueryDocuments(prompt, query, {"atlas": "Lima is in Peru.", "menu": "Soup, 5."}, separator="\\n")
    >>> units.render([True, False], query)
    'Lima is in Peru.\\nQ: Capital of Peru?\\nA:'
    """

    documents: Mapping[str, str]
    field: str = "documents"
    separator: str = "\n\n"

    def __post_init__(self) -> None:
        object.__setattr__(self, "documents", MappingProxyType(dict(self.documents)))
        _check_shown(self.prompt, self.field)
        empty = sorted(name for name, text in self.documents.items() if not text.strip())
        if not self.documents or empty:
            what = f"{empty} have no text" if empty else "none given"
            raise InputError(
                f"documents of query {self.query.id!r}: {what}.", hint="Leave the query out, or them."
            )
        whole = self.separator.join(self.documents.values())
        if self.query.inputs.get(self.field, whole) != whole:
            raise InputError(
                f"query {self.query.id!r}: its field {self.field!r} differs from the documents joined by"
                f" {self.separator!r}.",
                hint="Leave the field out of the query, or give its documents and separator as they are there.",
            )

    @property
    def units(self) -> tuple[Unit, ...]:
        """The documents, in the order given."""
        return tuple(Unit("document", name, text) for name, text in self.documents.items())

    def inputs(self, coalition: Sequence[bool]) -> Mapping[str, str]:
        """The query's fields with only the documents of the coalition, shape (n_units,)."""
        kept = [text for text, keep in zip(self.documents.values(), coalition, strict=True) if keep]
        return {**self.query.inputs, self.field: self.separator.join(kept)}


def _field_text(prompt: FewShotPrompt, query: Query, name: str) -> str:
    _check_shown(prompt, name)
    if name not in query.inputs:
        raise InputError(
            f"query {query.id!r}: no field {name!r}; given: {', '.join(sorted(query.inputs)) or 'nothing'}.",
            hint="Name the field whose text is cut into units.",
        )
    return query.inputs[name]


def _check_shown(prompt: FewShotPrompt, name: str) -> None:
    if name not in prompt.query_fields:
        raise InputError(
            f"field: the prompt's query template does not show {name!r}; its slots: {', '.join(prompt.query_fields)}.",
            hint="Units of a text that the model never reads have no effect.",
        )


def _check_length(coalition: Sequence[bool], n_units: int) -> None:
    if len(coalition) != n_units:
        raise InputError(f"coalition: {len(coalition)} entries for {n_units} units; one each is needed.")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name}: got {value!r}; allowed: {', '.join(allowed)}.")
