"""A model with a planted weakness, prompts and queries for it."""

from __future__ import annotations

import random
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.prompts import ChatPromptTemplate, FewShotChatMessagePromptTemplate
from pydantic import Field

LABELS = ("pos", "neg")


class Planted(BaseChatModel):
    """Right about ``query N`` by the parity of N, unless a poisoned turn is in the prompt: then right every other time."""

    served: str = "planted-1"
    calls: list[Any] = Field(default_factory=list)
    failing: dict[str, Exception] = Field(default_factory=dict)

    @property
    def _llm_type(self) -> str:
        return "planted"

    def _generate(
        self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        if kwargs:
            raise ValueError(f"unknown parameters {sorted(kwargs)}")
        text = str(messages[-1].content).strip().splitlines()
        query = next(line for line in reversed(text) if "query" in line)
        self.calls.append(messages)
        if query in self.failing:
            raise self.failing[query]
        right = LABELS[int(query.split()[-1]) % 2 == 0]
        poisoned = any("poison" in str(m.content) for m in messages)
        fooled = poisoned and random.Random(query).random() < 0.5
        answer = LABELS[LABELS.index(right) ^ fooled]
        usage = {
            "input_tokens": 10 * len(messages),
            "output_tokens": 1,
            "total_tokens": 10 * len(messages) + 1,
        }
        message = AIMessage(answer, usage_metadata=usage, response_metadata={"model_name": self.served})
        return ChatResult(generations=[ChatGeneration(message=message)])


def planted(**fields: Any) -> Planted:
    return Planted(**fields)


def examples(n: int = 5, poison: int | None = 2) -> list[dict[str, str]]:
    return [
        {"input": f"demo {i}" + (" poison" if i == poison else ""), "output": LABELS[i % 2]} for i in range(n)
    ]


def queries(n: int, start: int = 0) -> list[tuple[dict[str, str], str]]:
    return [({"input": f"query {i}"}, LABELS[i % 2 == 0]) for i in range(start, start + n)]


def turns() -> ChatPromptTemplate:
    return ChatPromptTemplate.from_messages([("human", "{input}"), ("ai", "{output}")])


def few_shot(rows: list[dict[str, str]] | None = None, **fields: Any) -> FewShotChatMessagePromptTemplate:
    chosen = {} if "example_selector" in fields else {"examples": examples() if rows is None else rows}
    return FewShotChatMessagePromptTemplate(example_prompt=turns(), **chosen, **fields)


def chat_prompt(shots: Any = None) -> ChatPromptTemplate:
    return ChatPromptTemplate.from_messages(
        [("system", "Classify."), few_shot() if shots is None else shots, ("human", "{input}")]
    )
