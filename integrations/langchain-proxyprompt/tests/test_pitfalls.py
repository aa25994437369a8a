"""What would go wrong silently: half a replacement, another model's answer, a repeated one, a label off the wrong token."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.globals import set_llm_cache
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGeneration, ChatResult, LLMResult
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables import RunnableLambda
from langchain_core.runnables.history import RunnableWithMessageHistory
from langchain_core.tools import StructuredTool
from langchain_openai import ChatOpenAI
from langchain_proxyprompt import ChatModelBackend, aprune_examples, prune_examples
from langchain_proxyprompt._finding import find_template, replace_parts
from langchain_proxyprompt._running import ChainRunner, failure, usage_of
from langchain_proxyprompt._site import open_site
from langchain_proxyprompt.models import ask_labels
from planted_chain import LABELS, Planted, chat_prompt, few_shot, planted, queries
from pydantic import Field

from proxyprompt import Settings
from proxyprompt.backends.base import Message, ScoreRequest, Usage
from proxyprompt.errors import BackendError, InputError

QUICK = Settings(
    keep_labels=False, relabel="off", clean_prior="off", clean=False, fit_coalitions=18, oracle_queries=6
)
KEPT = ("ex0", "ex3")


def masked(chain: Any) -> Any:
    found = find_template(chain).template
    new = open_site(found, pool=None, freeze=False, output_key=None).masked()
    return replace_parts(chain, lambda part: new if part is found else None)


def ask(runner: ChainRunner, number: int = 1) -> Any:
    inputs = {"input": f"query {number}"}
    return runner.run(KEPT, inputs, runner.render(KEPT, inputs))


# --- never half replaced ------------------------------------------------------------------------------


def test_a_template_that_a_function_uses_too_is_refused() -> None:
    shared = chat_prompt()
    inner = shared | planted()
    chain = (shared | planted()).with_fallbacks([RunnableLambda(lambda x: inner.invoke(x))])
    with pytest.raises(InputError, match="lives inside a function"):
        find_template(chain)
    with pytest.raises(InputError, match="lives inside a function"):
        find_template(chain, shared.messages[1])


def test_a_function_without_source_hides_nothing() -> None:
    names: dict[str, Any] = {"inner": chat_prompt() | planted()}
    exec("def make(inner):\n    return lambda x: inner.invoke(x)\nanswer = make(inner)", names)
    exec("def other(x):\n    return inner.invoke(x)", names)
    for function in (names["answer"], names["other"], names["inner"].invoke):
        with pytest.raises(InputError, match="lives inside a function"):
            find_template(RunnableLambda(function))


def test_a_template_in_a_function_beside_another_is_not_passed_over() -> None:
    hidden = chat_prompt() | planted()
    chain = RunnableLambda(lambda x: hidden.invoke(x) and x) | chat_prompt() | planted()
    with pytest.raises(InputError, match="2 few-shot templates"):
        find_template(chain)


def test_a_copy_forgets_what_the_original_says_of_itself() -> None:
    """LangChain caches a prompt's serialized form, examples included, and traces show it."""
    prompt = chat_prompt()
    prompt.invoke({"input": "x"})
    cached = prompt.__dict__.get("_serialized")
    template = prompt.messages[1]
    site = open_site(template, pool=None, freeze=False, output_key=None)
    new = site.keeping(["ex0"])
    copy = replace_parts(prompt, lambda part: new if part is template else None)
    copy.invoke({"input": "x"})
    assert cached is None or copy._serialized is not cached
    assert "demo 1" not in str(copy._serialized)
    assert prompt.__dict__.get("_serialized") is cached


def graph_of(node: Any) -> Any:
    from langgraph.graph import END, START, StateGraph

    graph: Any = StateGraph(dict)
    graph.add_node("ask", node)
    graph.add_edge(START, "ask")
    graph.add_edge("ask", END)
    return graph.compile()


HIDDEN: dict[str, Any] = {
    "tool": lambda: StructuredTool.from_function(
        lambda q: (chat_prompt() | planted()).invoke(q), name="classify", description="Classifies."
    ),
    "graph with a chain as its node": lambda: graph_of(chat_prompt() | planted()),
    "graph inside a chain": lambda: StrOutputParser() | graph_of(chat_prompt() | planted()),
    "placeholder that is filled at call time": lambda: (
        ChatPromptTemplate.from_messages([MessagesPlaceholder("examples"), ("human", "{input}")]) | planted()
    ),
    "message history": lambda: RunnableWithMessageHistory(
        chat_prompt() | planted(), lambda session_id: InMemoryChatMessageHistory(), input_messages_key="input"
    ),
}


@pytest.mark.parametrize("where", HIDDEN)
def test_what_cannot_be_replaced_is_refused_with_advice(where: str) -> None:
    with pytest.raises(InputError, match="chain: ") as caught:
        find_template(HIDDEN[where]())
    assert "ass the" in str(caught.value.hint)  # Pass the inner chain; pass the chain that holds ...


# --- whose answer it is -------------------------------------------------------------------------------


def named(served: str, **fields: Any) -> Any:
    """A model that says its name to LangChain, and whose server calls all models alike."""

    class Named(Planted):
        asked: str = served

        def _get_ls_params(self, stop: Any = None, **kwargs: Any) -> Any:
            return {**super()._get_ls_params(stop, **kwargs), "ls_model_name": self.asked}

    return Named(served="default", **fields)


def test_a_fallback_that_answers_from_the_first_call_on_is_noticed() -> None:
    main, other = named("big"), named("small")
    main.failing["query 1"] = ConnectionError("gone")
    runner = ChainRunner(masked(chat_prompt() | main.with_fallbacks([other])))
    with pytest.raises(BackendError, match="A fallback, small, answered"):
        ask(runner, 1)
    assert ask(ChainRunner(masked(chat_prompt() | main.with_fallbacks([other]))), 2).output.content == "neg"


class _Flaky(Planted):
    failures: list[str] = Field(default_factory=lambda: ["once"])

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        if self.failures:
            self.failures.pop()
            raise ConnectionError("once")
        return super()._generate(messages, *args, **kwargs)


def test_a_retry_of_the_same_model_is_no_fallback() -> None:
    runner = ChainRunner(masked(chat_prompt() | _Flaky().with_retry(wait_exponential_jitter=False)))
    assert ask(runner).output.content == "pos"


def test_a_cached_answer_of_a_model_out_of_reach_is_refused() -> None:
    hidden = planted()

    def answer(value: Any) -> Any:
        return getattr(hidden, "invoke")(value)  # noqa: B009

    chain = masked(chat_prompt() | RunnableLambda(answer))
    set_llm_cache(InMemoryCache())
    try:
        ask(ChainRunner(chain))
        with pytest.raises(BackendError, match="LangChain's cache answered in the model's place"):
            ask(ChainRunner(chain))
    finally:
        set_llm_cache(None)
    assert len(hidden.calls) == 1


# --- what it cost -------------------------------------------------------------------------------------


def test_every_kind_of_token_is_billed() -> None:
    message = AIMessage(
        "x",
        usage_metadata={
            "input_tokens": 100,
            "output_tokens": 20,
            "total_tokens": 120,
            "input_token_details": {"cache_read": 40, "cache_creation": 30},
            "output_token_details": {"reasoning": 15},
        },
    )
    assert usage_of(message, LLMResult(generations=[])) == Usage(100, 20, 40, 30, 15)


def test_a_surrounding_run_sees_and_gives_nothing(tmp_path: Path) -> None:
    started: list[Any] = []

    class Seen(BaseCallbackHandler):
        def on_chat_model_start(self, serialized: Any, messages: Any, **kwargs: Any) -> None:
            started.append(messages)

    def step(value: Any) -> Any:
        return ask(ChainRunner(masked(chat_prompt() | planted() | StrOutputParser()))).output

    config = {"callbacks": [Seen()], "configurable": {"proxyprompt_mask": None}}
    assert RunnableLambda(step).invoke("x", config) == "pos"
    assert started == []


def real(base_url: str, **fields: Any) -> ChatOpenAI:
    return ChatOpenAI(model="smollm2", base_url=base_url, api_key="x", temperature=0, **fields)


def test_a_stream_without_usage_counts_as_not_known(base_url: str) -> None:
    """LangChain does not ask another server than OpenAI's own for usage when it streams."""
    outcome = ask(ChainRunner(masked(chat_prompt() | real(base_url, streaming=True, max_tokens=2))))
    assert outcome.output.content
    assert outcome.usage == Usage()


# --- which label it is --------------------------------------------------------------------------------


def logprobs(**values: float) -> dict[str, Any]:
    top = [{"token": token, "logprob": value, "bytes": None} for token, value in values.items()]
    return {"content": [{**top[0], "top_logprobs": top}]}


def decide(
    own: str, given: str, found: dict[str, Any], *, must_agree: bool = True
) -> tuple[str, tuple[float | None, ...], bool]:
    """What is made of a model's answer and of what the chain gives for it."""
    known: dict[str, bool] = {}
    message = AIMessage(own, response_metadata={"logprobs": found})
    result = ask_labels(
        lambda with_logprobs: (message, given, Usage(5, 1), "m"),
        LABELS,
        known,
        threading.Lock(),
        must_agree=must_agree,
    )
    return result.evidence, result.logprobs, known["logprobs"]


def test_log_probabilities_count_only_if_they_name_the_chains_label() -> None:
    yes, neither = logprobs(pos=-0.1, neg=-2.3), logprobs(Let=-0.1, pos=-1.0, neg=-2.3)
    assert decide("pos", "pos", yes) == ("logprobs", (-0.1, -2.3), True)
    # A parser that changes the form, not the label.
    assert decide("pos.", "POS", yes) == ("logprobs", (-0.1, -2.3), True)
    # One that turns the answer round: the model's first token says the opposite of what the chain gives.
    assert decide("pos", "neg", yes) == ("texts", (None, 0.0), False)
    # An answer behind an explanation.
    assert decide("Let me see: neg", "neg", neither) == ("texts", (None, 0.0), False)
    # Handed on as it stands, an answer that is no label still has its first token.
    assert decide("Let me see", "Let me see", neither) == ("logprobs", (-1.0, -2.3), True)
    # A proxy is asked for its first token, whatever it goes on to say.
    assert decide("Let me see", "x", neither, must_agree=False) == ("logprobs", (-1.0, -2.3), True)


def test_a_real_chain_that_turns_its_models_answer_round_is_measured_by_what_it_gives(
    base_url: str, tmp_path: Path
) -> None:
    rows = [
        {"input": text, "output": verdict}
        for text, verdict in [
            ("Sentence: The room is lovely.", "Positive"),
            ("Sentence: The room is awful.", "Negative"),
            ("Sentence: The view is lovely.", "Positive"),
        ]
    ]
    prompt = ChatPromptTemplate.from_messages(
        [
            ("system", "Is the sentence Positive or Negative? Answer with one word."),
            few_shot(rows),
            ("human", "{input}"),
        ]
    )
    llm = ChatOpenAI(model="smollm2", base_url=base_url, api_key="x", temperature=0, max_tokens=3)

    def turned(text: str) -> str:
        return "Positive" if text.strip().startswith("Neg") else "Negative"

    things = ["bed", "pool", "dinner", "service", "lobby", "sauna", "breakfast", "garden"]
    asked = [
        ({"input": f"Sentence: The {t} was {w}."}, v)
        for t in things
        for w, v in [("lovely", "Positive"), ("awful", "Negative")]
    ]
    options: Any = {
        "queries": asked,
        "labels": ["Positive", "Negative"],
        "settings": QUICK,
        "sizes": {"explain": 2, "select": 4, "sealed": 10},
        "concurrency": 1,
    }
    straight = prune_examples(prompt | llm | StrOutputParser(), ledger=tmp_path / "a.db", **options)
    round_about = prune_examples(
        prompt | llm | StrOutputParser() | RunnableLambda(turned), ledger=tmp_path / "b.db", **options
    )
    values = [r.result.explanation.utility for r in (straight, round_about)]
    assert (values[0] < 0).all()  # nats
    assert set(values[1].ravel()) <= {0.0, 1.0}  # right or wrong
    right = [r.result.certificate.full.performance for r in (straight, round_about)]
    assert right[0] + right[1] == pytest.approx(1.0)


def test_the_responses_api_loses_log_probabilities_and_its_answers_count(base_url: str) -> None:
    prompt = (
        Message("system", "Answer with one word."),
        Message("user", "Is fire hot or cold?"),
        Message("assistant", "hot"),
        Message("user", "Is ice hot or cold?"),
    )
    request = ScoreRequest(prompt, ("hot", "cold", "Hot"))
    [(_, result)] = [
        pair
        for block in ChatModelBackend(real(base_url, use_responses_api=True, max_tokens=16)).score([request])
        for pair in block
    ]
    assert result.error is None
    assert result.evidence == "texts"
    assert sum(value is not None for value in result.logprobs) == 1


# --- when it ends -------------------------------------------------------------------------------------


class _Slow(BaseChatModel):
    calls: list[Any] = Field(default_factory=list)

    @property
    def _llm_type(self) -> str:
        return "slow"

    def _generate(self, *args: Any, **kwargs: Any) -> ChatResult:
        raise AssertionError("asked in a thread")

    async def _agenerate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        self.calls.append(messages)
        await asyncio.sleep(0.02)
        return ChatResult(generations=[ChatGeneration(message=AIMessage("pos"))])


def test_a_cancelled_job_spends_no_more(tmp_path: Path) -> None:
    model = _Slow()

    async def main() -> tuple[int, int]:
        job = asyncio.ensure_future(
            aprune_examples(
                chat_prompt() | model,
                queries=queries(66),
                labels=LABELS,
                settings=QUICK,
                ledger=tmp_path / "l.db",
            )
        )
        while len(model.calls) < 10:
            await asyncio.sleep(0.01)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        at_the_end = len(model.calls)
        await asyncio.sleep(0.3)
        return at_the_end, len(model.calls)

    at_the_end, later = asyncio.run(main())
    assert later == at_the_end < 30


def test_a_whole_job_of_an_asynchronous_client_stays_on_one_loop(base_url: str, tmp_path: Path) -> None:
    llm = real(base_url, max_tokens=2)
    chain = chat_prompt() | llm | StrOutputParser()

    async def job() -> Any:
        return await aprune_examples(
            chain,
            queries=queries(10),
            settings=QUICK,
            sizes={"explain": 2, "select": 3, "sealed": 5},
            ledger=tmp_path / "l.db",
            concurrency=1,
        )

    result = asyncio.run(job())
    assert sum(row["calls"] for row in result.result.spent) > 40
    again = asyncio.run(job())  # nothing is asked again, so the closed loop does not matter
    assert sum(row["bought_now"] for row in again.result.spent) == 0


def test_a_closed_loop_is_said_to_be_one() -> None:
    error = failure(RuntimeError("Event loop is closed"), Usage(), 1)
    assert isinstance(error, BackendError)
    assert "inside the asyncio.run" in str(error.hint)
