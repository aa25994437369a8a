"""A template's demonstrations as data, and the template with only some of them."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.example_selectors import BaseExampleSelector, LengthBasedExampleSelector
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate, FewShotChatMessagePromptTemplate, PromptTemplate

from proxyprompt.errors import InputError
from proxyprompt.prompt import Demonstration

from ._finding import copied, turn_pairs
from ._mask import MaskedSelector, MaskedTurns
from .selector import PrunedExampleSelector, example_key

__all__ = ["Pool", "Site", "open_site"]


@dataclass(frozen=True)
class Pool:
    """All examples of a template, and which of them a query sees.

    Parameters
    ----------
    examples : mapping of str to dict
        By id, in the order of the prompt.
    selector : BaseExampleSelector, optional
        Chooses for each query, as deployed; without one every kept example is shown.
    """

    examples: Mapping[str, dict[str, Any]]
    selector: BaseExampleSelector | None = None

    def show(self, kept: Sequence[str], inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """The kept examples that a call shows, in its order."""
        if self.selector is None:
            return [self.examples[i] for i in kept]
        return self._known(self.selector.select_examples(inputs), kept)

    async def ashow(self, kept: Sequence[str], inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """The same, asynchronously."""
        if self.selector is None:
            return [self.examples[i] for i in kept]
        return self._known(await self.selector.aselect_examples(inputs), kept)

    def _known(self, selected: Sequence[dict[str, Any]], kept: Sequence[str]) -> list[dict[str, Any]]:
        ids = {example_key(e): i for i, e in self.examples.items()}
        unknown = [e for e in selected if example_key(e) not in ids]
        if unknown:
            raise InputError(
                f"pool: the example selector chose {len(unknown)} examples that are not among the {len(ids)} of the pool.",
                hint="Pass every example the selector may choose as pool=.",
            )
        return [e for e in selected if ids[example_key(e)] in set(kept)]


@dataclass(frozen=True)
class Site:
    """One template with demonstrations.

    Attributes
    ----------
    template : object
        As found.
    demonstrations : tuple of Demonstration
        What ProxyPrompt sees of them; ids in the order of the prompt.
    digests : dict of str to str
        SHA-256 of what each demonstration puts into the prompt.
    """

    template: Any
    demonstrations: tuple[Demonstration, ...]
    digests: Mapping[str, str]
    pool: Pool | None = None
    turns: Mapping[str, list[BaseMessage]] | None = None

    def masked(self) -> Any:
        """The template whose calls say which demonstrations they show."""
        if self.turns is not None:
            return self._with_turns([MaskedTurns(turns=dict(self.turns))])
        return copied(self.template, examples=None, example_selector=MaskedSelector(self.pool))

    def keeping(self, kept: Sequence[str]) -> Any:
        """The template with the kept demonstrations only, in that order."""
        if self.turns is not None:
            return self._with_turns([turn for i in kept for turn in self.turns[i]])
        assert self.pool is not None
        if self.pool.selector is None:
            chosen = [self.pool.examples[i] for i in kept]
            return copied(self.template, examples=chosen, example_selector=None)
        removed = [e for i, e in self.pool.examples.items() if i not in set(kept)]
        selector = PrunedExampleSelector(self.pool.selector, removed)
        return copied(self.template, examples=None, example_selector=selector)

    def _with_turns(self, turns: Sequence[Any]) -> Any:
        at = turn_pairs(self.template)
        items = self.template.messages
        return copied(self.template, messages=[*items[: at.start], *turns, *items[at.stop :]])


def open_site(
    template: Any, *, pool: Sequence[dict[str, Any]] | None, freeze: bool, output_key: str | None
) -> Site:
    """Read the demonstrations of a template.

    Raises
    ------
    InputError
        If they cannot be listed, or LangChain would format one of them a second time.
    """
    if isinstance(template, ChatPromptTemplate):
        if pool is not None or freeze:
            raise InputError(
                "pool, freeze_selector: this prompt's demonstrations are fixed turns; leave both out."
            )
        return _turn_site(template)
    examples, selector = _examples(template, pool)
    ids = _ids(examples)
    by_id = dict(zip(ids, examples, strict=True))
    site_pool = Pool(by_id, None if freeze else selector)
    if isinstance(template, FewShotChatMessagePromptTemplate):
        shown = {i: _messages(template, i, e) for i, e in by_id.items()}
        demonstrations = tuple(_demonstration_of_turns(i, turns) for i, turns in shown.items())
        digests = {i: _digest([[t.type, _text(t, i)] for t in turns]) for i, turns in shown.items()}
        return Site(template, demonstrations, digests, site_pool)
    texts = {i: _once(template, i, e) for i, e in by_id.items()}
    key = _output_key(template, output_key)
    demonstrations = tuple(_demonstration(template, i, e, key) for i, e in by_id.items())
    return Site(template, demonstrations, {i: _digest(text) for i, text in texts.items()}, site_pool)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=True).encode()).hexdigest()


def _turn_site(template: ChatPromptTemplate) -> Site:
    at = turn_pairs(template)
    messages: list[BaseMessage] = []
    for item in template.messages[at.start : at.stop]:
        messages += [item] if isinstance(item, BaseMessage) else item.format_messages()
    turns = {f"ex{i // 2}": messages[i : i + 2] for i in range(0, len(messages), 2)}
    return Site(
        template,
        tuple(_demonstration_of_turns(i, pair) for i, pair in turns.items()),
        {i: _digest([[t.type, _text(t, i)] for t in pair]) for i, pair in turns.items()},
        turns=turns,
    )


def _examples(
    template: Any, pool: Sequence[dict[str, Any]] | None
) -> tuple[list[dict[str, Any]], BaseExampleSelector | None]:
    # With both set LangChain silently ignores the selector, and so do we.
    if template.examples is not None:
        if pool is not None:
            raise InputError("pool: the template lists its examples itself; leave it out.")
        return list(template.examples), None
    selector = template.example_selector
    found: Any = pool if pool is not None else _pool_of(selector)
    if not found:
        raise InputError(
            f"pool: the examples that a {type(selector).__name__} may choose cannot be listed.",
            hint="Pass them as pool=[{...}, ...].",
        )
    return [dict(e) for e in found], selector


def _pool_of(selector: Any) -> Sequence[dict[str, Any]]:
    if isinstance(selector, LengthBasedExampleSelector):
        return selector.examples
    store = getattr(getattr(selector, "vectorstore", None), "store", None)
    if isinstance(store, Mapping):  # LangChain's in-memory store keeps the examples as metadata
        held = [row.get("metadata") for row in store.values() if isinstance(row, Mapping)]
        return [m for m in held if isinstance(m, dict)] if all(held) else []
    examples = getattr(selector, "examples", None)
    return examples if isinstance(examples, list) else []


def _ids(examples: Sequence[dict[str, Any]]) -> list[str]:
    own = [e.get("id") for e in examples]
    if all(isinstance(i, str) and i for i in own) and len(set(own)) == len(own):
        return [str(i) for i in own]
    return [f"ex{i}" for i in range(len(examples))]


def _values(template: Any, example_id: str, example: Mapping[str, Any]) -> dict[str, Any]:
    names = template.example_prompt.input_variables
    missing = [name for name in names if name not in example]
    if missing:
        raise InputError(
            f"example {example_id!r}: the example prompt needs {missing[0]!r}, which it does not have."
        )
    return {name: example[name] for name in names}


def _messages(template: Any, example_id: str, example: Mapping[str, Any]) -> list[BaseMessage]:
    return list(template.example_prompt.format_messages(**_values(template, example_id, example)))


def _text(turn: BaseMessage, example_id: str) -> str:
    if not isinstance(turn.content, str):
        raise InputError(
            f"example {example_id!r}: a turn of it holds more than text ({type(turn.content).__name__});"
            " only text can be measured."
        )
    return turn.content


def _demonstration_of_turns(example_id: str, turns: Sequence[BaseMessage]) -> Demonstration:
    texts = [_text(turn, example_id) for turn in turns]
    plain = len(turns) == 2 and isinstance(turns[0], HumanMessage) and isinstance(turns[1], AIMessage)
    if not plain and (not turns or not isinstance(turns[-1], AIMessage)):
        raise InputError(
            f"example {example_id!r}: its last turn is not the model's; there is no answer to read."
        )
    return Demonstration(example_id, {"input": "\n".join(texts[:-1])}, texts[-1])


def _once(template: Any, example_id: str, example: Mapping[str, Any]) -> str:
    """Text of an example, formatted once; refused where LangChain's second pass over it would do more than unescape."""
    text: str = template.example_prompt.format(**_values(template, example_id, example))
    if template.template_format == "jinja2":
        live = any(mark in text for mark in ("{{", "{%", "{#"))
    else:
        try:
            live = any(name is not None for _, name, _, _ in string.Formatter().parse(text))
        except ValueError:  # a lone brace, on which LangChain fails at every call
            live = True
    if live:
        raise InputError(
            f"example {example_id!r}: {type(template).__name__} formats the text of its examples a second time, as part of"
            " its own template, and this one holds template syntax: it would be evaluated, not shown.",
            hint="Use FewShotChatMessagePromptTemplate, which formats once, or take the braces out of the example.",
        )
    return text


def _output_key(template: Any, given: str | None) -> str:
    prompt = template.example_prompt
    names = list(prompt.input_variables)
    if given is not None:
        if given not in names:
            raise InputError(
                f"output_key: got {given!r}; the example prompt shows {', '.join(sorted(names))}."
            )
        return given
    if isinstance(prompt, PromptTemplate) and prompt.template_format == "f-string":
        order = [n for _, n, _, _ in string.Formatter().parse(prompt.template) if n in names]
        if order:
            return str(order[-1])  # the answer stands last
    raise InputError(
        f"output_key: which of {', '.join(sorted(names))} is the answer of an example cannot be told.",
        hint="Name it with output_key=.",
    )


def _demonstration(template: Any, example_id: str, example: Mapping[str, Any], key: str) -> Demonstration:
    values = _values(template, example_id, example)
    inputs = {"input": "\n".join(str(v) for name, v in values.items() if name != key)}
    return Demonstration(example_id, inputs, str(values[key]))
