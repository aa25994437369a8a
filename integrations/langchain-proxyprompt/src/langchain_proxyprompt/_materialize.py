"""Few-shot templates written out, so that LangChain can serialise what holds them."""

from __future__ import annotations

from typing import Any

from langchain_core.messages import BaseMessage
from langchain_core.prompts import (
    ChatPromptTemplate,
    FewShotChatMessagePromptTemplate,
    FewShotPromptTemplate,
    PromptTemplate,
)

from proxyprompt.errors import InputError

__all__ = ["written_out"]


def written_out(part: Any, template: Any) -> Any:
    """What stands in for a part of a chain, or None where nothing is to do.

    Parameters
    ----------
    part : object
        Any part of the chain.
    template : object
        The few-shot template; of a chat template that holds it the list of messages changes.
    """
    if isinstance(template, FewShotChatMessagePromptTemplate):
        if part is template:
            return ChatPromptTemplate(messages=_messages(template))
        if isinstance(part, ChatPromptTemplate) and any(item is template for item in part.messages):
            items = [
                new for item in part.messages for new in (_messages(template) if item is template else [item])
            ]
            return part.model_copy(update={"messages": items})
        return None
    if part is template and isinstance(template, FewShotPromptTemplate):
        return _text(template)
    return None


def _listed(template: Any) -> list[dict[str, Any]]:
    if template.examples is None:
        raise InputError(
            "template: its examples are chosen by a selector for each query; they cannot be written out.",
            hint="Use freeze_selector=True when pruning.",
        )
    return list(template.examples)


def _messages(template: FewShotChatMessagePromptTemplate) -> list[BaseMessage]:
    shown = template.example_prompt
    return [
        message
        for example in _listed(template)
        for message in shown.format_messages(**{name: example[name] for name in shown.input_variables})
    ]


def _text(template: FewShotPromptTemplate) -> PromptTemplate:
    shown = template.example_prompt
    examples = [shown.format(**{n: e[n] for n in shown.input_variables}) for e in _listed(template)]
    # LangChain formats the joined text, examples included, so the joined text is the template.
    text = template.example_separator.join(p for p in (template.prefix, *examples, template.suffix) if p)
    return PromptTemplate(
        template=text,
        input_variables=template.input_variables,
        template_format=template.template_format,
        partial_variables=template.partial_variables,
    )
