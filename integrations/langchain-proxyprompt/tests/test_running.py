"""Runs of the chain: nothing but what was measured is sent, nothing is counted that was not asked."""

from __future__ import annotations

import asyncio
import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.globals import set_llm_cache
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.rate_limiters import InMemoryRateLimiter
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_proxyprompt import MaskLostError, prune_examples
from langchain_proxyprompt._finding import find_template, replace_parts
from langchain_proxyprompt._mask import MASK_KEY, Mask
from langchain_proxyprompt._running import ChainRunner, RunFailedError, describe, to_rendered
from langchain_proxyprompt._site import open_site
from planted_chain import chat_prompt, planted, queries

from proxyprompt import Settings
from proxyprompt.errors import BackendError, InconclusiveError, InputError

QUICK = Settings(
    keep_labels=False, relabel="off", clean_prior="off", clean=False, fit_coalitions=18, oracle_queries=6
)


def masked(chain: Any) -> Any:
    found = find_template(chain).template
    new = open_site(found, pool=None, freeze=False, output_key=None).masked()
    return replace_parts(chain, lambda part: new if part is found else None)


def ask(runner: ChainRunner, kept: tuple[str, ...] = ("ex0", "ex3"), number: int = 1) -> Any:
    inputs = {"input": f"query {number}"}
    return runner.run(kept, inputs, runner.render(kept, inputs))


def test_the_model_sees_the_kept_examples_and_nothing_else() -> None:
    model = planted()
    outcome = ask(ChainRunner(masked(chat_prompt() | model | StrOutputParser())))
    assert [m.content for m in model.calls[0]] == ["Classify.", "demo 0", "pos", "demo 3", "neg", "query 1"]
    assert (outcome.output, outcome.usage.prompt_tokens, outcome.usage.completion_tokens) == ("pos", 60, 1)
    assert outcome.model == "planted-1"


def test_rendering_asks_no_model_whatever_is_around_it() -> None:
    model = planted()
    chain = (chat_prompt() | model | StrOutputParser()).with_retry().with_fallbacks([chat_prompt() | model])
    runner = ChainRunner(masked_all(chain))
    rendered = runner.render(("ex1",), {"input": "query 1"})
    assert [m.content for m in rendered] == ["Classify.", "demo 1", "neg", "query 1"]
    assert model.calls == []


def masked_all(chain: Any) -> Any:
    from langchain_proxyprompt import find_templates

    news = {
        id(f.template): open_site(f.template, pool=None, freeze=False, output_key=None).masked()
        for f in find_templates(chain)
    }
    return replace_parts(chain, lambda part: news.get(id(part)))


def test_a_thread_pool_that_loses_the_context_is_an_error_not_a_full_prompt() -> None:
    model = planted()
    inner = masked(chat_prompt() | model)

    def in_a_pool(inputs: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(inner.invoke, inputs).result()

    runner = ChainRunner(RunnableLambda(in_a_pool))
    with pytest.raises(MaskLostError, match="lost its mask"):
        runner.render(("ex0",), {"input": "query 1"})
    assert model.calls == []

    def with_context(inputs: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(copy_context().run, inner.invoke, inputs).result()

    assert len(ChainRunner(RunnableLambda(with_context)).render(("ex0",), {"input": "query 1"})) == 4


def test_masks_of_a_batch_do_not_mix() -> None:
    model = planted()
    chain = masked(chat_prompt() | model)
    masks = [Mask((f"ex{i}",)) for i in range(5)]
    configs = [{"configurable": {MASK_KEY: mask}} for mask in masks]
    chain.batch([{"input": "query 1"}] * 5, configs)
    asyncio.run(chain.abatch([{"input": "query 1"}] * 5, configs))
    assert sorted(call[1].content for call in model.calls) == sorted(
        2 * ["demo 0", "demo 1", "demo 2 poison", "demo 3", "demo 4"]
    )
    assert [mask.uses for mask in masks] == [2] * 5


def test_a_retry_of_the_chain_reads_its_mask_again_and_pays_twice() -> None:
    model = planted()
    failures = iter([ValueError("once")])

    def flaky(message: AIMessage) -> str:
        for error in failures:
            raise error
        return str(message.content)

    chain = masked((chat_prompt() | model | RunnableLambda(flaky)).with_retry(wait_exponential_jitter=False))
    outcome = ask(ChainRunner(chain))
    assert (outcome.output, len(model.calls), outcome.usage.prompt_tokens) == ("pos", 2, 120)


def test_what_changes_between_rendering_and_sending_is_refused_before_it_is_sent() -> None:
    model = planted()
    tick = itertools.count()
    chain = masked(
        RunnablePassthrough.assign(input=lambda x: f"{x['input']} {next(tick)}") | chat_prompt() | model
    )
    with pytest.raises(InputError, match="another prompt than it rendered"):
        ask(ChainRunner(chain))
    assert model.calls == []


def test_a_model_before_the_prompt_is_refused_unasked() -> None:
    first, second = planted(), planted()
    before = RunnableLambda(lambda x: [HumanMessage(x["input"])]) | first
    chain = masked(RunnablePassthrough.assign(note=before) | chat_prompt() | second)
    with pytest.raises(InputError, match="a model is asked before the few-shot prompt"):
        ChainRunner(chain).render((), {"input": "query 1"})
    assert first.calls == second.calls == []


def test_a_chain_without_a_model_is_refused() -> None:
    with pytest.raises(InputError, match="ended without asking a model"):
        ChainRunner(masked(chat_prompt())).render((), {"input": "query 1"})


def test_answers_of_two_models_are_not_mixed() -> None:
    main, other = planted(), planted(served="planted-2")
    main.failing["query 2"] = ConnectionError("gone")
    runner = ChainRunner(masked_all((chat_prompt() | main).with_fallbacks([chat_prompt() | other])))
    ask(runner, number=1)
    with pytest.raises(BackendError, match="planted-1, planted-2"):
        ask(runner, number=2)


class _StatusError(Exception):
    def __init__(self, status: int) -> None:
        super().__init__("sk-secret in the message")
        self.status_code = status


def test_a_failed_run_is_missing_and_keeps_the_message_to_itself() -> None:
    model = planted()
    model.failing["query 1"] = _StatusError(503)
    with pytest.raises(RunFailedError) as caught:
        ask(ChainRunner(masked(chat_prompt() | model)))
    assert (caught.value.uncertain, caught.value.refused) == (1, False)
    assert str(caught.value) == "it failed with _StatusError (status 503)"


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_fails_for_every_call_stops_the_run(status: int) -> None:
    model = planted()
    model.failing["query 1"] = _StatusError(status)
    with pytest.raises(BackendError, match=f"refuses every request: _StatusError .status {status}"):
        ask(ChainRunner(masked(chat_prompt() | model)))


def test_an_outage_is_never_a_score_of_zero(tmp_path: Path) -> None:
    model = planted()
    for i in range(0, 80, 5):
        model.failing[f"query {i}"] = _StatusError(503)
    with pytest.raises(InconclusiveError, match="values are missing"):
        prune_examples(
            chat_prompt() | model,
            queries=queries(80),
            labels=("pos", "neg"),
            settings=QUICK,
            ledger=tmp_path / "l.db",
        )


def test_langchains_cache_answers_nothing_that_is_measured() -> None:
    model = planted()
    set_llm_cache(InMemoryCache())
    try:
        from langchain_proxyprompt.models import uncached

        chain = masked(chat_prompt() | uncached(model))
        for _ in range(3):
            ask(ChainRunner(chain))
        assert len(model.calls) == 3
        (chat_prompt() | model).invoke({"input": "query 1"})
        before = len(model.calls)
        (chat_prompt() | model).invoke({"input": "query 1"})
        assert len(model.calls) == before, "the cache is on for the user's own calls"
    finally:
        set_llm_cache(None)


class _Seen(BaseCallbackHandler):
    def __init__(self) -> None:
        self.names: list[str | None] = []
        self.tags: set[str] = set()

    def on_chain_start(
        self, serialized: Any, inputs: Any, *, tags: Any = None, name: Any = None, **kwargs: Any
    ) -> None:
        self.names.append(name)
        self.tags |= set(tags or ())


def test_the_users_callbacks_config_and_rate_limit_apply() -> None:
    own, of_model = _Seen(), _Seen()
    limiter = InMemoryRateLimiter(requests_per_second=20, check_every_n_seconds=0.01, max_bucket_size=1)
    model = planted(rate_limiter=limiter, callbacks=[of_model])
    seen: list[Any] = []
    chain = masked(
        RunnableLambda(lambda x, config: seen.append(config["configurable"]["user"]) or x)
        | chat_prompt()
        | model
    )
    runner = ChainRunner(chain, config={"callbacks": [own], "configurable": {"user": "u1"}, "tags": ["mine"]})
    start = time.monotonic()
    for i in range(1, 5):
        ask(runner, number=i)
    assert time.monotonic() - start > 0.1
    assert set(seen) == {"u1"}
    assert own.names.count("proxyprompt:run") == 4
    assert {"mine", "proxyprompt"} <= own.tags


def test_tracing_is_off_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from langsmith.utils import tracing_is_enabled

    monkeypatch.setenv("LANGSMITH_TRACING", "true")
    seen: list[Any] = []
    chain = masked(
        RunnableLambda(lambda x: seen.append(tracing_is_enabled()) or x) | chat_prompt() | planted()
    )
    ChainRunner(chain).render((), {"input": "query 1"})
    assert seen == [False]


def test_more_than_text_is_refused() -> None:
    with pytest.raises(InputError, match="more than text"):
        to_rendered([HumanMessage([{"type": "image_url", "image_url": {"url": "x"}}])])
    with pytest.raises(InputError, match="more than text"):
        to_rendered([ToolMessage("x", tool_call_id="1")])
    assert to_rendered([HumanMessage("x", name="example_user")])[0].name == "example_user"


def test_one_loop_serves_an_asynchronous_run() -> None:
    loops: set[int] = set()

    async def step(inputs: Any) -> Any:
        loops.add(id(asyncio.get_running_loop()))
        return inputs

    chain = masked(RunnableLambda(step) | chat_prompt() | planted() | StrOutputParser())

    async def main() -> list[Any]:
        runner = ChainRunner(chain, loop=asyncio.get_running_loop())
        return [await asyncio.to_thread(ask, runner, ("ex0",), i) for i in (1, 2)]

    assert [o.output for o in asyncio.run(main())] == ["pos", "neg"]
    assert len(loops) == 1


def test_structure_names_code_and_parameters_but_no_query() -> None:
    def one(x: Any) -> Any:
        return x

    def other(x: Any) -> Any:
        return {**x}

    base = chat_prompt() | planted()
    assert describe(base) == describe(chat_prompt() | planted())
    assert describe(RunnableLambda(one) | base) != describe(RunnableLambda(other) | base)
    assert describe(chat_prompt() | planted().bind(stop=["a"])) != describe(
        chat_prompt() | planted().bind(stop=["b"])
    )
