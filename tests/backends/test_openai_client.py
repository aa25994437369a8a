"""wrap_openai: every way to call the SDK sends the smaller prompt, and everything else is sent as it is."""

from __future__ import annotations

import asyncio
import copy
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama import llama_server
from pydantic import BaseModel

from proxyprompt import Artifact, Demonstration, FewShotPrompt, PruneCounter, Query, wrap_openai
from proxyprompt._pruned_requests import RequestPruner
from proxyprompt.errors import ArtifactError, InputError, PromptMismatchError, PromptMismatchWarning

from .scripted_server import Reply, Scripted, scripted_server

Turn = dict[str, Any]
DEMOS = tuple(
    Demonstration(i, {"input": text}, label)
    for i, text, label in [
        ("d1", "a fine film", "good"),
        ("d2", "a dull film", "bad"),
        ("d3", "what a cast", "good"),
        ("d4", "I slept", "bad"),
    ]
)
PROMPT = FewShotPrompt(
    DEMOS,
    instruction="Good or bad?",
    demonstration_template="Review: {input}\nAnswer: {output}",
    style="chat",
)
QUERY = Query("q", {"input": "too long"}, "bad")


def artifact(prompt: FewShotPrompt = PROMPT, kept: tuple[str, ...] = ("d1", "d4"), **more: Any) -> Artifact:
    ids = [d.id for d in prompt.demonstrations]
    return Artifact(
        {
            "kind": "proxyprompt-artifact",
            "schema": 1,
            "original_prompt": prompt.to_dict(),
            "kept": list(kept),
            "removed": [i for i in ids if i not in kept],
            "certificate": {"decision": "certified"},
            "summary": {"before": {"tokens": 100}, "after": {"tokens": 60}},
            **more,
        }
    )


FULL = PROMPT.to_messages(QUERY)
SMALL = artifact().prompt.to_messages(QUERY)
TEXT = FewShotPrompt(
    DEMOS, instruction="Good or bad?", demonstration_template="Review: {input}\nAnswer: {output}"
)
FULL_TEXT, SMALL_TEXT = (str(p.render(None, QUERY)) for p in (TEXT, artifact(TEXT).prompt))


# --- a server that answers in every dialect ------------------------------------------------------------


def _events(*bodies: dict[str, Any]) -> Reply:
    text = "".join(f"event: {b.get('type', 'message')}\ndata: {json.dumps(b)}\n\n" for b in bodies)
    return 200, (text + "data: [DONE]\n\n").encode(), {"content-type": "text/event-stream"}


def _response(status: str) -> dict[str, Any]:
    part = {"type": "output_text", "text": '{"label": "bad"}', "annotations": []}
    item = {"id": "m", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
    return {
        "id": "r", "object": "response", "created_at": 1, "status": status, "model": "m",
        "output": [item] if status == "completed" else [], "parallel_tool_calls": False, "tool_choice": "auto",
        "tools": [],
    }  # fmt: skip


def answer(path: str, body: dict[str, Any]) -> Reply:
    base = {"id": "c", "created": 1, "model": "m"}
    stream = body.get("stream")
    if path.endswith("/responses"):
        if not stream:
            return _response("completed")
        return _events(
            {"type": "response.created", "sequence_number": 0, "response": _response("in_progress")},
            {"type": "response.completed", "sequence_number": 1, "response": _response("completed")},
        )
    if path.endswith("/chat/completions"):
        text = {"role": "assistant", "content": '{"label": "bad"}'}
        if stream:
            chunk = {"index": 0, "delta": text, "finish_reason": "stop"}
            return _events({**base, "object": "chat.completion.chunk", "choices": [chunk]})
        choice = {"index": 0, "message": text, "finish_reason": "stop"}
        return {**base, "object": "chat.completion", "choices": [choice]}
    if path.endswith("/completions"):
        choice = {"index": 0, "text": "bad", "finish_reason": "stop", "logprobs": None}
        return {**base, "object": "text_completion", "choices": [choice]}
    return {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.0]}], "model": "m",
            "usage": {"prompt_tokens": 1, "total_tokens": 1}}  # fmt: skip


@pytest.fixture
def server() -> Iterator[Scripted]:
    with scripted_server() as running:
        running.reply = lambda body: answer(running.requests[-1][0], body)
        yield running


@pytest.fixture
def plain(server: Scripted) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="none", base_url=server.url, max_retries=0) as client:
        yield client


@pytest.fixture
def client(server: Scripted) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="none", base_url=server.url, max_retries=0) as client:
        yield wrap_openai(client, artifact(), on_mismatch="raise")


class Label(BaseModel):
    label: str


def _all(stream: Any) -> Any:
    with stream as events:
        return list(events)


def _raw(response: Any) -> Any:
    with response as raw:
        return raw.read()


CHAT: dict[str, Callable[[Any, Any], Any]] = {
    "create": lambda c, m: c.chat.completions.create(model="m", messages=m),
    "create stream": lambda c, m: list(c.chat.completions.create(model="m", messages=m, stream=True)),
    "parse": lambda c, m: c.chat.completions.parse(model="m", messages=m, response_format=Label),
    "beta parse": lambda c, m: c.beta.chat.completions.parse(model="m", messages=m, response_format=Label),
    "stream": lambda c, m: _all(c.chat.completions.stream(model="m", messages=m)),
    "raw": lambda c, m: c.chat.completions.with_raw_response.create(model="m", messages=m).parse(),
    "raw parse": lambda c, m: c.chat.completions.with_raw_response.parse(
        model="m", messages=m, response_format=Label
    ).parse(),
    "client raw": lambda c, m: c.with_raw_response.chat.completions.create(model="m", messages=m).parse(),
    "streaming response": lambda c, m: _raw(
        c.chat.completions.with_streaming_response.create(model="m", messages=m)
    ),
    "with_options": lambda c, m: c.with_options(timeout=9).chat.completions.create(model="m", messages=m),
    "copy of a copy": lambda c, m: c.copy().with_options(max_retries=0).chat.completions.parse(
        model="m", messages=m, response_format=Label
    ),
    "post": lambda c, m: c.post("/chat/completions", cast_to=object, body={"model": "m", "messages": m}),
}  # fmt: skip
RESPONSES: dict[str, Callable[[Any, Any], Any]] = {
    "create": lambda c, m: c.responses.create(model="m", input=m),
    "create stream": lambda c, m: list(c.responses.create(model="m", input=m, stream=True)),
    "parse": lambda c, m: c.responses.parse(model="m", input=m, text_format=Label),
    "stream": lambda c, m: _all(c.responses.stream(model="m", input=m)),
    "raw": lambda c, m: c.responses.with_raw_response.create(model="m", input=m).parse(),
    "streaming response": lambda c, m: _raw(c.responses.with_streaming_response.create(model="m", input=m)),
    "with_options": lambda c, m: c.with_options(timeout=9).responses.create(model="m", input=m),
}
WAYS = [
    *((f"chat {k}", v, "messages") for k, v in CHAT.items()),
    *((f"responses {k}", v, "input") for k, v in RESPONSES.items()),
]


@pytest.mark.parametrize(("call", "field"), [pytest.param(c, f, id=k) for k, c, f in WAYS])
def test_every_way_to_call_sends_the_smaller_prompt(
    client: openai.OpenAI, plain: openai.OpenAI, server: Scripted, call: Any, field: str
) -> None:
    mine = copy.deepcopy(FULL)
    call(client, mine)
    assert mine == FULL
    call(plain, SMALL)
    (path, sent), (plain_path, expected) = server.requests
    assert sent[field] == SMALL
    assert (path, sent) == (plain_path, expected)


def test_results_are_those_of_the_sdk(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(model="m", messages=FULL, response_format=Label)  # type: ignore[arg-type]
    assert parsed.choices[0].message.parsed == Label(label="bad")
    with client.chat.completions.stream(model="m", messages=FULL, response_format=Label) as stream:  # type: ignore[arg-type]
        assert stream.get_final_completion().choices[0].message.parsed == Label(label="bad")
    assert client.responses.parse(model="m", input=FULL, text_format=Label).output_parsed == Label(
        label="bad"
    )  # type: ignore[arg-type]


def test_async_in_every_way(server: Scripted) -> None:
    counter = PruneCounter()

    async def all_ways() -> None:
        async with openai.AsyncOpenAI(api_key="none", base_url=server.url, max_retries=0) as made:
            c: Any = wrap_openai(made, artifact(), on_mismatch="raise", on_request=counter)
            assert c is made
            chat, args = c.chat.completions, {"model": "m", "messages": FULL}
            await chat.create(**args)
            assert [chunk async for chunk in await chat.create(**args, stream=True)]
            assert (await chat.parse(**args, response_format=Label)).choices[0].message.parsed == Label(
                label="bad"
            )
            async with chat.stream(**args) as stream:
                assert [event async for event in stream]
            await chat.with_raw_response.create(**args)
            async with chat.with_streaming_response.create(**args) as raw:
                await raw.read()
            await c.with_options(timeout=9).chat.completions.create(**args)
            await c.responses.create(model="m", input=FULL)
            await c.responses.parse(model="m", input=FULL, text_format=Label)
            async with c.responses.stream(model="m", input=FULL) as events:
                assert [event async for event in events]
            await asyncio.gather(*(c.chat.completions.create(**args) for _ in range(8)))
            with pytest.raises(PromptMismatchError, match="none of the artifact's 4"):
                await chat.create(model="m", messages=[{"role": "user", "content": "x"}])

    asyncio.run(all_ways())
    assert len(server.requests) == 18
    assert all(body.get("messages", body.get("input")) == SMALL for _, body in server.requests)
    assert (counter.requests, counter.pruned, counter.mismatched) == (19, 18, 1)
    assert counter.saved_tokens_estimate == 18 * 40


def test_resources_that_were_looked_up_before_wrapping(plain: openai.OpenAI, server: Scripted) -> None:
    completions, raw = plain.chat.completions, plain.chat.completions.with_raw_response
    responses, create = plain.responses, plain.chat.completions.create
    wrap_openai(plain, artifact())
    for call in (completions.create, raw.create, create):
        call(model="m", messages=FULL)  # type: ignore[arg-type]
    responses.create(model="m", input=FULL)  # type: ignore[arg-type]
    assert all(body.get("messages", body.get("input")) == SMALL for _, body in server.requests)


def test_the_client_stays_what_it_was(plain: openai.OpenAI, server: Scripted) -> None:
    wrapped = wrap_openai(plain, artifact())
    assert wrapped is plain
    assert isinstance(wrapped, openai.OpenAI)
    assert type(wrapped).__name__ == "OpenAI"
    kind = type(wrapped).__mro__
    again = wrap_openai(wrapped, artifact(), on_mismatch="raise")
    assert again is wrapped
    assert len(type(again).__mro__) == len(kind)
    again.chat.completions.create(model="m", messages=FULL)  # type: ignore[arg-type]
    assert server.requests[-1][1]["messages"] == SMALL
    with pytest.raises(PromptMismatchError):
        again.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}])
    # Another client of the same class is not touched.
    other = openai.OpenAI(api_key="none", base_url=server.url)
    other.chat.completions.create(model="m", messages=FULL)  # type: ignore[arg-type]
    assert server.requests[-1][1]["messages"] == FULL
    other.close()


def test_several_prompts_on_one_client(plain: openai.OpenAI, server: Scripted) -> None:
    other = FewShotPrompt(DEMOS[:2], demonstration_template="{input}{output}", style="chat")
    counter = PruneCounter()
    wrap_openai(plain, artifact(), on_request=counter)
    wrap_openai(plain, artifact(other, ("d2",)), on_mismatch="raise", on_request=counter)
    for messages, expected in (
        (FULL, SMALL),
        (other.to_messages(QUERY), other.keep(["d2"]).to_messages(QUERY)),
    ):
        plain.chat.completions.create(model="m", messages=messages)  # type: ignore[arg-type]
        assert server.requests[-1][1]["messages"] == expected
    assert (counter.pruned, counter.mismatched) == (2, 0)
    with pytest.raises(PromptMismatchError, match=r"none of the artifact's 4.*; none of the artifact's 2"):
        plain.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}])


@pytest.mark.parametrize("kind", ["AzureOpenAI", "subclass"])
def test_subclasses_of_the_client(server: Scripted, kind: str) -> None:
    class Own(openai.OpenAI):
        def __init__(self, **more: Any) -> None:
            self.calls = 0
            super().__init__(**more)

    made: openai.OpenAI = (
        openai.AzureOpenAI(
            api_key="none", api_version="2026-01-01", azure_endpoint=server.url.removesuffix("/v1")
        )
        if kind == "AzureOpenAI"
        else Own(api_key="none", base_url=server.url)
    )
    with made:
        wrap_openai(made, artifact())
        made.chat.completions.create(model="m", messages=FULL)  # type: ignore[arg-type]
        made.with_options(timeout=3).chat.completions.create(model="m", messages=FULL)  # type: ignore[arg-type]
        assert type(made).__name__ == ("Own" if kind == "subclass" else kind)
    assert [body["messages"] for _, body in server.requests] == [SMALL, SMALL]
    if kind == "AzureOpenAI":
        assert "/deployments/m/chat/completions" in server.requests[0][0]


# --- what is recognised, and what is not ---------------------------------------------------------------


def edited(
    messages: Any, *, pruner: RequestPruner | None = None, path: str = "/chat/completions", **more: Any
) -> Any:
    field = {"/chat/completions": "messages", "/responses": "input", "/completions": "prompt"}[path]
    body = {"model": "m", field: messages, **more}
    before = copy.deepcopy(body)
    found = (pruner or RequestPruner(artifact())).edit(path, body)
    assert body == before
    assert found is not None
    new, edit = found
    assert {k: v for k, v in new.items() if k != field} == {k: v for k, v in body.items() if k != field}
    if edit.status != "pruned":
        assert new is body
    return new[field], edit


def swap(messages: list[Turn], i: int, **more: Any) -> list[Turn]:
    return [{**t, **more} if k == i else t for k, t in enumerate(messages)]


SYSTEM, BODY, LAST = FULL[0], FULL[1:-1], FULL[-1]
PAIRS = [BODY[i : i + 2] for i in range(0, 8, 2)]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
MISMATCHES: dict[str, tuple[Any, str]] = {
    "nothing": ([], "none of the artifact's 4 demonstrations"),
    "a plain question": ([LAST], "none of the artifact's 4"),
    "a real conversation": (
        [SYSTEM, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}, LAST],
        "none of the artifact's 4",
    ),
    "one missing": ([SYSTEM, *BODY[2:], LAST], "missing or changed: 'd1'"),
    "only removed ones": ([SYSTEM, *PAIRS[1], *PAIRS[2], LAST], "missing or changed: 'd1', 'd4'"),
    "one changed": (swap(FULL, 3, content="Review: a DULL film\nAnswer:"), "missing or changed: 'd2'"),
    "one answer changed": (swap(FULL, 4, content="good"), "missing or changed: 'd2'"),
    "white space": (swap(FULL, 3, content=FULL[3]["content"] + " "), "missing or changed: 'd2'"),
    "another order": ([SYSTEM, *PAIRS[1], *PAIRS[0], *PAIRS[2], *PAIRS[3], LAST], "another order"),
    "an unknown one between": (
        [
            SYSTEM,
            *PAIRS[0],
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "y"},
            *BODY[2:],
            LAST,
        ],
        r"messages\[3\] stands before or between",
    ),
    "an unknown one before": (
        [SYSTEM, {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, *BODY, LAST],
        r"messages\[1\] stands before or between",
    ),
    "an unknown one behind, named": (
        [*FULL[:-1], {"role": "user", "name": "example_user", "content": "x"}, LAST],
        r"messages\[9\] is one more demonstration",
    ),
    "a system turn between": (
        [SYSTEM, *PAIRS[0], {"role": "system", "content": "x"}, *BODY[2:], LAST],
        r"messages\[3\] stands before or between",
    ),
    "names that were not measured": (swap(FULL, 1, name="example_user"), "missing or changed: 'd1'"),
    "another instruction": (swap(FULL, 0, content="Be brief."), "the instruction is not"),
    "no instruction": (FULL[1:], "the instruction is not"),
    "two instructions": ([SYSTEM, *FULL], "the instruction is not"),
    "no query": (FULL[:-1], "no query follows"),
    "tool call on an answer": (swap(FULL, 2, tool_calls=[{"id": "1"}]), "missing or changed: 'd1'"),
    "a cache mark on a turn": (
        swap(
            FULL,
            8,
            content=[{"type": "text", "text": "bad", "prompt_cache_breakpoint": {"mode": "explicit"}}],
        ),
        "missing or changed: 'd4'",
    ),
    "two parts": (
        swap(FULL, 1, content=[{"type": "text", "text": FULL[1]["content"]}, IMAGE]),
        "missing or changed: 'd1'",
    ),
    "not a list": ("text", "not a list of turns"),
    "turns that are none": ([3, None, "x"], "none of the artifact's 4"),
}


@pytest.mark.parametrize("case", MISMATCHES)
@pytest.mark.parametrize("policy", ["pass", "warn", "raise"])
def test_a_mismatch_is_sent_as_it_is_or_not_at_all(server: Scripted, case: str, policy: Any) -> None:
    messages, reason = MISMATCHES[case]
    edits: list[Any] = []
    with openai.OpenAI(api_key="none", base_url=server.url, max_retries=0) as made:
        client: Any = wrap_openai(made, artifact(), on_mismatch=policy, on_request=edits.append)

        def send() -> None:
            client.post("/chat/completions", cast_to=object, body={"model": "m", "messages": messages})

        if policy == "raise":
            with pytest.raises(PromptMismatchError, match=f"{reason}.*Nothing was sent"):
                send()
        elif policy == "warn":
            with pytest.warns(PromptMismatchWarning, match=f"{reason}.*sent as it is") as caught:
                send()
            assert caught[0].filename == __file__
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                send()
    assert [body for _, body in server.requests] == (
        [] if policy == "raise" else [{"model": "m", "messages": messages}]
    )
    assert [edit.status for edit in edits] == ["mismatch"]


def test_reasons_show_no_text() -> None:
    for messages, _ in MISMATCHES.values():
        reason = edited(messages)[1].reason
        assert not any(str(d.inputs["input"]) in reason for d in DEMOS)


def test_what_follows_is_forwarded_untouched() -> None:
    picture = {"role": "user", "content": [{"type": "text", "text": "x"}, IMAGE]}
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
            {"role": "tool", "tool_call_id": "1", "content": "r"}, LAST]  # fmt: skip
    repeated = [*PAIRS[1], LAST]  # what a user really said may equal a demonstration
    for rest in ([picture], talk, repeated):
        new, edit = edited([SYSTEM, *BODY, *rest])
        assert new == [*SMALL[:-1], *rest]
        assert edit.removed == ("d2", "d3")
    assert edit.saved_characters == sum(len(t["content"]) for p in PAIRS[1:3] for t in p)
    assert edit.saved_tokens == 40


def test_content_as_one_part_and_developer_turns_are_recognised() -> None:
    parts = [{**t, "content": [{"type": "text", "text": t["content"]}]} for t in FULL]
    assert edited(parts)[0] == [parts[i] for i in (0, 1, 2, 7, 8, 9)]
    developer = swap(FULL, 0, role="developer")
    assert edited(developer)[0] == swap(SMALL, 0, role="developer")


def test_the_smaller_prompt_is_no_mismatch() -> None:
    assert edited(SMALL)[1].status == "already_pruned"
    once, edit = edited(FULL)
    assert edit.status == "pruned"
    assert edited(once)[1].status == "already_pruned"
    nothing = RequestPruner(artifact(kept=("d1", "d2", "d3", "d4")))
    assert edited(FULL, pruner=nothing)[1].status == "already_pruned"


def test_everything_removed_and_another_order() -> None:
    none = RequestPruner(artifact(kept=()))
    assert edited(FULL, pruner=none)[0] == [SYSTEM, LAST]
    assert edited([SYSTEM, LAST], pruner=none)[1].status == "already_pruned"
    assert edited([SYSTEM, *PAIRS[0], LAST], pruner=none)[1].status == "mismatch"
    moved = RequestPruner(artifact(kept=("d4", "d1")))
    assert edited(FULL, pruner=moved)[0] == [SYSTEM, *PAIRS[3], *PAIRS[0], LAST]
    assert edited([SYSTEM, *PAIRS[3], *PAIRS[0], LAST], pruner=moved)[1].status == "already_pruned"
    assert edited(SMALL, pruner=moved)[1].status == "mismatch"


def test_any_instruction() -> None:
    pruner = RequestPruner(artifact(), "any")
    dated = swap(FULL, 0, content="Good or bad? It is Monday.")
    assert edited(dated, pruner=pruner)[0] == swap(SMALL, 0, content="Good or bad? It is Monday.")
    assert edited(FULL[1:], pruner=pruner)[0] == SMALL[1:]


def test_names_are_part_of_a_turn() -> None:
    named = [
        {"role": "system", "name": f"example_{who}", "content": text}
        for d in DEMOS
        for who, text in (("user", d.inputs["input"]), ("assistant", d.output))
    ]
    messages = [{"role": "developer", "content": "Good or bad?"}, *named, {"role": "user", "content": "x"}]
    prompt = FewShotPrompt.from_messages(messages)
    pruner = RequestPruner(artifact(prompt, ("demo-2",)))
    assert edited(messages, pruner=pruner)[0] == [messages[0], *named[2:4], messages[-1]]


def items(messages: list[Turn]) -> list[Turn]:
    """The same turns as items of the Responses API."""
    kinds = {"user": "input_text", "system": "input_text", "assistant": "output_text"}
    return [
        {
            "type": "message",
            "role": t["role"],
            "content": [{"type": kinds[t["role"]], "text": t["content"]}],
            **({"id": f"msg_{i}", "status": "completed"} if t["role"] == "assistant" else {}),
        }
        for i, t in enumerate(messages)
    ]


def test_responses_with_instructions_and_items() -> None:
    given = items(FULL[1:])
    new, _ = edited(given, path="/responses", instructions="Good or bad?")
    assert new == [given[i] for i in (0, 1, 6, 7, 8)]
    for more, reason in (
        ({"instructions": "Other"}, "instruction"),
        ({}, "instruction"),
        ({"instructions": "Good or bad?", "previous_response_id": "r"}, "previous_response_id"),
        ({"instructions": "Good or bad?", "conversation": "c"}, "conversation"),
        ({"instructions": "Good or bad?", "prompt": {"id": "p"}}, "prompt"),
    ):
        assert reason in edited(given, path="/responses", **more)[1].reason
    assert edited("one text", path="/responses")[1].status == "mismatch"


def test_extra_body_that_replaces_the_messages(client: openai.OpenAI, server: Scripted) -> None:
    with pytest.raises(PromptMismatchError, match="extra_body replaces the messages"):
        client.chat.completions.create(model="m", messages=FULL, extra_body={"messages": [LAST]})  # type: ignore[arg-type]
    client.chat.completions.create(model="m", messages=FULL, extra_body={"top_k": 1})  # type: ignore[arg-type]
    assert server.requests[-1][1] == {"model": "m", "messages": SMALL, "top_k": 1}


def test_text_prompts(server: Scripted) -> None:
    pruner = RequestPruner(artifact(TEXT))
    assert edited(FULL_TEXT, pruner=pruner, path="/completions")[0] == SMALL_TEXT
    new, edit = edited([FULL_TEXT, FULL_TEXT], pruner=pruner, path="/completions")
    assert new == [SMALL_TEXT] * 2
    assert edit.saved_characters == 2 * (len(FULL_TEXT) - len(SMALL_TEXT))
    assert edited(FULL_TEXT, pruner=pruner, path="/responses")[0] == SMALL_TEXT
    user = {"role": "user", "content": FULL_TEXT}
    for message in (user, {**user, "content": [{"type": "text", "text": FULL_TEXT}]}):
        [sent], edit = edited([message], pruner=pruner)
        assert sent == {
            **message,
            "content": SMALL_TEXT if message is user else [{"type": "text", "text": SMALL_TEXT}],
        }
    assert edited([{**user, "content": SMALL_TEXT}], pruner=pruner)[1].status == "already_pruned"
    for bad in (
        [SYSTEM, user],
        [user, {"role": "assistant", "content": "x"}, user],
        [{**user, "content": FULL_TEXT.replace("dull", "DULL")}],
        [{**user, "content": " " + FULL_TEXT}],
        [{**user, "content": FULL_TEXT[: FULL_TEXT.rindex("Review")]}],
        FULL,
    ):
        assert edited(bad, pruner=pruner)[1].status == "mismatch"
    for prompt in ([1, 2, 3], [[1, 2]], [], [FULL_TEXT, "other"], None):
        assert edited(prompt, pruner=pruner, path="/completions")[1].status == "mismatch"
    with openai.OpenAI(api_key="none", base_url=server.url) as made:
        made = wrap_openai(made, artifact(TEXT), on_mismatch="raise")
        made.completions.create(model="m", prompt=FULL_TEXT)
        list(made.completions.create(model="m", prompt=FULL_TEXT, stream=False).choices)
    assert [body["prompt"] for _, body in server.requests] == [SMALL_TEXT] * 2


def test_a_smaller_text_that_begins_the_full_one() -> None:
    """The kept demonstrations come first, so a changed full prompt begins with the smaller one."""
    pruner = RequestPruner(artifact(TEXT, ("d1", "d2")))
    changed = FULL_TEXT.replace("what a cast", "what a bore")
    assert edited(changed, pruner=pruner, path="/completions")[1].status == "mismatch"
    small = str(TEXT.keep(["d1", "d2"]).render(None, QUERY))
    assert edited(small, pruner=pruner, path="/completions")[1].status == "already_pruned"


def test_other_endpoints_are_not_touched(client: openai.OpenAI, server: Scripted) -> None:
    client.embeddings.create(model="m", input=FULL_TEXT, encoding_format="float")
    assert server.requests == [
        ("/v1/embeddings", {"model": "m", "input": FULL_TEXT, "encoding_format": "float"})
    ]


def test_a_retry_counts_once_and_an_error_is_the_sdks(server: Scripted) -> None:
    counter = PruneCounter()
    server.reply = None
    server.replies = [(429, {"error": {"message": "slow down"}}, {"retry-after-ms": "1"}), answer("/chat/completions", {}),
                      (400, {"error": {"message": "no"}})]  # fmt: skip
    with openai.OpenAI(api_key="none", base_url=server.url, max_retries=1) as made:
        client: Any = wrap_openai(made, artifact(), on_request=counter)
        client.chat.completions.create(model="m", messages=FULL)
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="m", messages=FULL)
    assert [body["messages"] for _, body in server.requests] == [SMALL] * 3
    assert (counter.requests, counter.pruned) == (2, 2)


def test_arguments(plain: openai.OpenAI, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="client is a str"):
        wrap_openai("client", artifact())  # type: ignore[type-var]
    with pytest.raises(InputError, match="on_mismatch: got 'ignore'"):
        wrap_openai(plain, artifact(), on_mismatch="ignore")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="instruction: got 'none'"):
        wrap_openai(plain, artifact(), instruction="none")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="on_request: got 3"):
        wrap_openai(plain, artifact(), on_request=3)  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match="cannot be read"):
        wrap_openai(plain, tmp_path / "none.json")
    with pytest.raises(ArtifactError, match="certificate does not hold"):
        wrap_openai(plain, artifact(certificate={"decision": "not_certified"}))
    assert type(plain) is openai.OpenAI
    path = tmp_path / "artifact.json"
    artifact().save(path)
    assert wrap_openai(plain, str(path)) is plain


def test_tokens_that_were_not_counted() -> None:
    counter = PruneCounter()
    _, edit = edited(FULL, pruner=RequestPruner(artifact(summary={})))
    assert edit.saved_tokens is None
    counter(edit)
    counter(edited(FULL)[1])
    assert counter.saved_tokens_estimate is None
    assert "pruned=2" in repr(counter)


texts = st.text(max_size=8)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(texts, texts), min_size=1, max_size=5),
    st.data(),
    st.lists(st.builds(lambda r, c: {"role": r, "content": c}, st.sampled_from(["user", "assistant"]), texts), max_size=4),
)  # fmt: skip
def test_what_is_sent_is_the_artifacts_prompt(pairs: Any, data: Any, rest: list[Turn]) -> None:
    prompt = FewShotPrompt(
        tuple(Demonstration(str(i), {"input": u}, a) for i, (u, a) in enumerate(pairs)),
        instruction=data.draw(texts),
        demonstration_template="{input}{output}",
        style="chat",
    )
    ids = [d.id for d in prompt.demonstrations]
    kept = tuple(data.draw(st.permutations(ids))[: data.draw(st.integers(0, len(ids)))])
    pruner = RequestPruner(artifact(prompt, kept))
    query = {"role": "user", "content": "q"}
    full = prompt.to_messages(Query("q", {"input": "q"}, ""))
    new, edit = edited([*full[:-1], query, *rest], pruner=pruner)
    assert edit.status in ("pruned", "already_pruned")
    assert new == [*prompt.reorder(kept).to_messages(Query("q", {"input": "q"}, "")), *rest]


# --- a real model --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> Iterator[str]:
    """Base URL of a real server."""
    yield from llama_server()


def test_a_real_model_reads_fewer_tokens_and_answers_the_same(llama: str) -> None:
    """The answer to the full request through the wrapper is the answer to the small one without it."""
    with (
        openai.OpenAI(api_key="none", base_url=llama) as plain,
        openai.OpenAI(api_key="none", base_url=llama) as made,
    ):
        client: Any = wrap_openai(made, artifact(), on_mismatch="raise")
        more: Any = {"model": "smol", "max_tokens": 4, "temperature": 0}
        whole = plain.chat.completions.create(messages=FULL, **more)  # type: ignore[arg-type]
        small = plain.chat.completions.create(messages=SMALL, **more)  # type: ignore[arg-type]
        wrapped = client.chat.completions.create(messages=FULL, **more)
        assert wrapped.usage.prompt_tokens == small.usage.prompt_tokens < whole.usage.prompt_tokens
        assert wrapped.choices[0].message.content == small.choices[0].message.content
        chunks = list(client.chat.completions.create(messages=FULL, stream=True, **more))
        assert (
            "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
            == small.choices[0].message.content
        )
        parsed = client.chat.completions.parse(
            model="smol", messages=FULL, response_format=Label, max_tokens=60, temperature=0
        )
        assert isinstance(parsed.choices[0].message.parsed, Label)
        answers = [
            c.responses.create(model="smol", input=items(m), max_output_tokens=4)  # type: ignore[arg-type]
            for c, m in ((client, FULL), (plain, SMALL), (plain, FULL))
        ]
        counts = [a.usage.input_tokens for a in answers if a.usage]
        assert counts[0] == counts[1] < counts[2]


def test_a_real_model_async(llama: str) -> None:
    async def ask() -> tuple[int, int]:
        async with openai.AsyncOpenAI(api_key="none", base_url=llama) as made:
            more: Any = {"model": "smol", "max_tokens": 2, "messages": FULL}
            whole = await made.chat.completions.create(**more)
            wrap_openai(made, artifact(), on_mismatch="raise")
            small = await made.chat.completions.create(**more)
            streamed = [c async for c in await made.chat.completions.create(stream=True, **more)]
            assert streamed
            assert whole.usage is not None
            assert small.usage is not None
            return whole.usage.prompt_tokens, small.usage.prompt_tokens

    whole, small = asyncio.run(ask())
    assert small < whole
