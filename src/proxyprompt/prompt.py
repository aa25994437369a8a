"""Few-shot prompts as data: demonstrations, queries, templates, and single-pass rendering.

A template is split once into literal text and field names; values are then joined between the literals and
never looked at again. Braces, Jinja tags, ``%s`` or anything else inside a demonstration or a query
therefore stay what they are, byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeAlias

from ._demonstration_turns import Turns, find_demonstrations
from ._prompt_template import FIELD, ChatForm, Template, one_of
from .backends.base import Message, Rendered, UnitMask
from .errors import DataError, InputError

__all__ = ["ChatForm", "Demonstration", "FewShotPrompt", "Query", "Template", "Unit", "UnitPrompt"]

Style: TypeAlias = Literal["completion", "chat"]
AnswerStyle: TypeAlias = Literal["text", "letter"]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Demonstration:
    """One in-context example: the player that attributions are about.

    Parameters
    ----------
    id : str
        Unique within its prompt.
    inputs : mapping of str to str
        Values of the template's fields, usually just ``{"input": ...}``.
    output : str
        The answer shown to the model.
    choices : tuple of str, optional
        The answers offered by a multiple-choice demonstration.
    """

    id: str
    inputs: Mapping[str, str]
    output: str
    choices: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Query:
    """One evaluation input with its reference answer.

    Parameters
    ----------
    id : str
        Unique over all splits.
    inputs : mapping of str to str
        Values of the template's fields.
    reference : str
        The right answer.
    choices : tuple of str, optional
        The answers offered, for multiple choice.
    references : tuple of str, optional
        Every accepted answer of a text task; ``reference`` is always accepted.
    """

    id: str
    inputs: Mapping[str, str]
    reference: str
    choices: tuple[str, ...] | None = None
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unit:
    """A part of a prompt that a coalition keeps or leaves out.

    Parameters
    ----------
    kind : str
        ``"demonstration"``, ``"instruction"``, ``"document"``, ``"sentence"`` or ``"word"`` (the last two: of
        the query).
    id : str
        Unique among the units of its kind.
    text : str
        As it stands in the prompt.
    """

    kind: str
    id: str
    text: str


class UnitPrompt(Protocol):
    """A prompt made of units: what a value function needs in order to leave some of them out."""

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units, in the order of a coalition's entries."""
        ...

    @property
    def n_units(self) -> int:
        """Number of units."""
        ...

    def render(self, coalition: Sequence[bool] | None, query: Query) -> Rendered:
        """The prompt for ``query`` with only the units of the coalition; ``None`` keeps all."""
        ...

    def candidate(self, answer: str, choices: Sequence[str] | None = None) -> str:
        """The exact continuation that stands for ``answer``."""
        ...


@dataclass(frozen=True)
class FewShotPrompt:
    """An instruction, demonstrations in a fixed order, and a slot for the query.

    Parameters
    ----------
    demonstrations : sequence of Demonstration
        Kept in this order by every coalition.
    instruction : str
        Text before the demonstrations (completion) or the system turn (chat); may be empty.
    demonstration_template : str
        Slots for the fields of a demonstration and exactly one ``{output}``, e.g.
        ``"Message: {input}\\nTeam: {output}"``. ``{choices}`` lists the offered answers with letters.
    query_template : str, optional
        Default: the demonstration template up to ``{output}``, white space before it removed.
    separator : str
        Between the parts of a completion prompt.
    style : {"completion", "chat"}
        One text, or turns (user: query template; assistant: the output).
    answer_style : {"text", "letter"}
        Whether an answer is written out, or given as the letter of its choice.
    chat_form : ChatForm
        Roles and names of the turns, in chat style.

    Notes
    -----
    In a completion prompt the white space between the query and the answer belongs to the answer
    (``answer_prefix``, usually one space), because tokenizers join it to the following word.
    """

    demonstrations: tuple[Demonstration, ...]
    instruction: str = ""
    demonstration_template: str = "Input: {input}\nOutput: {output}"
    query_template: str | None = None
    separator: str = "\n\n"
    style: Style = "completion"
    answer_style: AnswerStyle = "text"
    chat_form: ChatForm = field(default_factory=ChatForm)
    _query: Template = field(init=False, repr=False, compare=False)
    _prefix: str = field(init=False, repr=False, compare=False)
    _blocks: tuple[Any, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "demonstrations", tuple(self.demonstrations))
        one_of("style", self.style, ("completion", "chat"))
        one_of("answer_style", self.answer_style, ("text", "letter"))
        _unique_ids(self.demonstrations)
        template = Template(self.demonstration_template)
        if template.fields.count("output") != 1:
            raise InputError(
                f"demonstration_template: {self.demonstration_template!r} has"
                f" {template.fields.count('output')} slots {{output}}; exactly one is needed.",
                hint="Example: 'Message: {input}\\nTeam: {output}'.",
            )
        before = self.demonstration_template[: _slot_position(self.demonstration_template, "output")]
        object.__setattr__(self, "_prefix", before[len(before.rstrip()) :])
        query = Template(self.query_template if self.query_template is not None else before.rstrip())
        if "output" in query.fields:
            raise InputError(
                f"query_template: {query.text!r} must not hold {{output}}; it ends where the answer begins."
            )
        object.__setattr__(self, "_query", query)
        object.__setattr__(
            self, "_blocks", tuple(self._render_demonstration(d, template) for d in self.demonstrations)
        )

    @property
    def n_units(self) -> int:
        """Number of demonstrations."""
        return len(self.demonstrations)

    @property
    def units(self) -> tuple[Unit, ...]:
        """The demonstrations, as units."""
        return tuple(
            Unit(
                "demonstration",
                demo.id,
                block if isinstance(block, str) else "\n".join(t.content for t in block),
            )
            for demo, block in zip(self.demonstrations, self._blocks, strict=True)
        )

    @property
    def query_fields(self) -> tuple[str, ...]:
        """Names of the slots of a query, in order."""
        return self._query.fields

    @property
    def answer_prefix(self) -> str:
        """What stands between a rendered query and its answer (empty in chat)."""
        return self._prefix if self.style == "completion" else ""

    def candidate(self, answer: str, choices: Sequence[str] | None = None) -> str:
        """The exact continuation that stands for ``answer``: with its prefix, or as the choice's letter."""
        return self.answer_prefix + self._shown(answer, choices, "answer")

    def render(
        self, coalition: Sequence[bool] | None, query: Query, *, instruction: str | None = None
    ) -> Rendered:
        """The prompt for one query with only the demonstrations of the coalition.

        Parameters
        ----------
        coalition : sequence of bool, shape (n_units,), or None
            Which demonstrations to keep; ``None`` keeps all. Order never changes.
        query : Query
        instruction : str, optional
            Stands in for the prompt's own; may be empty.

        Returns
        -------
        str or tuple of Message
        """
        kept = self._kept(coalition)
        text = self._query.render(self._fields(query.inputs, query.choices), what=f"query {query.id!r}")
        head = self.instruction if instruction is None else instruction
        if self.style == "completion":
            return self.separator.join([*([head] if head else []), *kept, text])
        turns = [Message(self.chat_form.instruction_role, head)] if head else []
        return (*turns, *(turn for pair in kept for turn in pair), Message("user", text))

    def unit_mask(self, coalition: Sequence[bool]) -> UnitMask:
        """Where the demonstrations stand in the whole prompt, and which of them the coalition keeps.

        Parameters
        ----------
        coalition : sequence of bool, shape (n_units,)

        Returns
        -------
        UnitMask
            Spans in ``render(None, query)``, which are the same for every query; each takes in the separator
            behind its demonstration, so that what is left of the text is ``render(coalition, query)``.

        Raises
        ------
        InputError
            If the prompt is made of chat turns.
        """
        self._kept(coalition)
        if self.style != "completion":
            raise InputError(
                f"style: units of a {self.style!r} prompt cannot be hidden from a model's attention.",
                hint="Leave approximate out, or render the prompt in completion style.",
            )
        spans: list[tuple[int, int]] = []
        at = len(self.instruction + self.separator) if self.instruction else 0
        for block in self._blocks:
            spans.append((at, at + len(block) + len(self.separator)))
            at = spans[-1][1]
        return UnitMask(tuple(spans), tuple(bool(kept) for kept in coalition))

    def subset(self, coalition: Sequence[bool]) -> FewShotPrompt:
        """The same prompt with only the demonstrations of the coalition, order kept."""
        self._kept(coalition)
        return replace(
            self, demonstrations=tuple(d for d, k in zip(self.demonstrations, coalition, strict=True) if k)
        )

    def keep(self, ids: Sequence[str]) -> FewShotPrompt:
        """The same prompt with only the named demonstrations, in the prompt's own order."""
        unknown = sorted(set(ids) - {d.id for d in self.demonstrations})
        if unknown:
            raise InputError(f"ids: {unknown} name no demonstration of this prompt.")
        return self.subset([d.id in set(ids) for d in self.demonstrations])

    def reorder(self, ids: Sequence[str]) -> FewShotPrompt:
        """The same prompt with only the named demonstrations, in the order of ``ids``.

        Raises
        ------
        InputError
            If an id is unknown or named twice.
        """
        found = {d.id: d for d in self.demonstrations}
        unknown = sorted(set(ids) - set(found))
        if unknown or len(set(ids)) < len(ids):
            raise InputError(
                f"ids: {unknown} name no demonstration of this prompt."
                if unknown
                else f"ids: {list(ids)} names a demonstration twice."
            )
        return replace(self, demonstrations=tuple(found[i] for i in ids))

    def to_messages(self, query: Query) -> list[dict[str, str]]:
        """The full prompt as the message dictionaries that chat APIs take."""
        rendered = self.render(None, query)
        if isinstance(rendered, str):
            return [{"role": "user", "content": rendered}]
        return [turn.to_dict() for turn in rendered]

    @classmethod
    def from_messages(
        cls,
        messages: Sequence[Mapping[str, Any]],
        *,
        demonstrations: Sequence[int] | None = None,
        user_template: str = "{input}",
    ) -> FewShotPrompt:
        """Find the demonstrations among the messages of a chat request; never on a guess.

        Parameters
        ----------
        messages : sequence of mapping
            An instruction (a system or developer turn) or none, the demonstrations, then the user turn that
            holds a query. They are not changed.
        demonstrations : sequence of int, optional
            Positions in ``messages`` of the turns of demonstrations, or of their user turns only. Without it,
            demonstrations are recognised by marks, else by structure (see Notes).
        user_template : str
            What user turns have in common, with slots: ``"Review: {input}\\nSentiment:"``. With it a query
            is ``{"input": ...}`` without the words around; by default it is the whole turn.

        Returns
        -------
        FewShotPrompt
            In chat style; demonstrations are called ``demo-1``, ``demo-2``, ... in their order, or as their
            ``id`` says. ``to_messages`` of the query that was in ``messages`` gives the messages back (less
            the ``id`` marks, which chat APIs do not take).

        Raises
        ------
        InputError
            If the demonstrations cannot be told from a conversation, or the messages hold what a prompt
            cannot: tool calls, lists of content parts, turns between demonstrations. The message says what to give.

        Notes
        -----
        In this order: ``demonstrations``; turns whose ``id`` begins with ``pp-ex-``; turns whose ``name`` is
        ``example_user`` or ``example_assistant``; the structure, which counts for at most 1 and must reach 0.8:
        user turns that begin or end alike, answers that are alike (few different short ones, the same JSON
        keys, the same kind of number), no words that refer to earlier turns.

        Examples
        --------
        >>> shots = [("a fine film", "good"), ("a dull film", "bad"), ("a great cast", "good")]
        >>> turns = [{"role": r, "content": c} for t, a in shots for r, c in (("user", f"Review: {t}"), ("assistant", a))]
        >>> query = {"role": "user", "content": "Review: too long"}
        >>> prompt = FewShotPrompt.from_messages([*turns, query], user_template="Review: {input}")
        >>> [d.inputs["input"] for d in prompt.demonstrations]
        ['a fine film', 'a dull film', 'a great cast']
        """
        return _prompt_of_turns(cls, find_demonstrations(messages, demonstrations), Template(user_template))

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form; :meth:`from_dict` is its inverse."""
        return {
            "instruction": self.instruction,
            "demonstration_template": self.demonstration_template,
            "query_template": self.query_template,
            "separator": self.separator,
            "style": self.style,
            "answer_style": self.answer_style,
            # Younger than stored prompts: absent, it leaves the keys of older runs as they are.
            **({} if self.chat_form == ChatForm() else {"chat_form": self.chat_form.to_dict()}),
            "demonstrations": [
                {"id": d.id, "inputs": dict(d.inputs), "output": d.output}
                | ({"choices": list(d.choices)} if d.choices is not None else {})
                for d in self.demonstrations
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FewShotPrompt:
        """Read what :meth:`to_dict` wrote, or a prompt file (see :func:`proxyprompt.data.load_prompt`)."""
        from .data import prompt_from_mapping

        return prompt_from_mapping(data)

    def _kept(self, coalition: Sequence[bool] | None) -> list[Any]:
        if coalition is None:
            return list(self._blocks)
        if len(coalition) != self.n_units:
            raise InputError(
                f"coalition: {len(coalition)} entries for {self.n_units} demonstrations; one each is needed."
            )
        return [block for block, keep in zip(self._blocks, coalition, strict=True) if keep]

    def _render_demonstration(self, demo: Demonstration, template: Template) -> Any:
        what = f"demonstration {demo.id!r}"
        values = self._fields(demo.inputs, demo.choices)
        shown = self._shown(demo.output, demo.choices, what)
        if self.style == "chat":
            (asks, asker), (answers, answerer) = self.chat_form.user, self.chat_form.assistant
            turn = Message(asks, self._query.render(values, what=what), asker)
            return (turn, Message(answers, shown, answerer))
        return template.render({**values, "output": shown}, what=what)

    def _fields(self, inputs: Mapping[str, str], choices: Sequence[str] | None) -> dict[str, str]:
        values = dict(inputs)
        if choices is not None and "choices" not in values:
            values["choices"] = "\n".join(f"{LETTERS[i]}. {c}" for i, c in enumerate(choices))
        return values

    def _shown(self, answer: str, choices: Sequence[str] | None, what: str) -> str:
        if self.answer_style == "text":
            return answer
        if choices is None or answer not in choices:
            raise DataError(
                f"{what}: answer_style='letter' needs the answer {answer!r} among its choices; got {choices!r}."
            )
        return LETTERS[list(choices).index(answer)]


def _prompt_of_turns(kind: type[FewShotPrompt], turns: Turns, template: Template) -> FewShotPrompt:
    if not template.fields or "output" in template.fields or len(set(template.fields)) < len(template.fields):
        raise InputError(
            f"user_template: {template.text!r} needs one slot or more, each once, and no {{output}}.",
            hint="Example: 'Review: {input}\\nSentiment:'.",
        )
    pattern = re.compile(
        "".join(
            re.escape(literal) + (f"(?P<{name}>.*?)" if name else "") for literal, name in template.parts
        ),
        re.DOTALL,
    )

    def fields(position: int, text: str) -> dict[str, str]:
        found = pattern.fullmatch(text)
        if found is None:
            raise InputError(
                f"user_template: {template.text!r} does not fit messages[{position}], {text!r:.80}.",
                hint="Leave user_template out to take whole turns.",
            )
        return found.groupdict()

    fields(turns.query[0], turns.query[1])
    return kind(
        demonstrations=tuple(
            Demonstration(name, fields(position, user), assistant)
            for name, position, user, assistant in turns.demonstrations
        ),
        instruction=turns.instruction,
        demonstration_template=template.text + "{output}",
        query_template=template.text,
        style="chat",
        chat_form=ChatForm(turns.instruction_role, turns.user, turns.assistant),
    )


def _slot_position(text: str, name: str) -> int:
    for match in FIELD.finditer(text):
        if match.group(1) == name:
            return match.start()
    raise AssertionError("the caller has counted the slots")


def _unique_ids(demonstrations: Sequence[Demonstration]) -> None:
    seen: set[str] = set()
    for demo in demonstrations:
        if demo.id in seen:
            raise DataError(f"demonstrations: the id {demo.id!r} is used twice; ids are unique.")
        if demo.choices is not None and len(demo.choices) > len(LETTERS):
            raise DataError(
                f"demonstration {demo.id!r}: {len(demo.choices)} choices; at most {len(LETTERS)}."
            )
        seen.add(demo.id)
