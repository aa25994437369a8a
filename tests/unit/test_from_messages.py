"""Demonstrations in chat messages are found by what says so, and never guessed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyprompt import FewShotPrompt, Query
from proxyprompt._demonstration_turns import find_demonstrations, structure_score
from proxyprompt.backends.base import Message, ScoreRequest
from proxyprompt.backends.openai import prompt_fields
from proxyprompt.errors import DataError, InputError

Turn = dict[str, Any]


def turns(pairs: list[tuple[str, str]], query: str, system: str | None = None) -> list[Turn]:
    head = [] if system is None else [{"role": "system", "content": system}]
    body = [{"role": r, "content": c} for p in pairs for r, c in zip(("user", "assistant"), p, strict=True)]
    return [*head, *body, {"role": "user", "content": query}]


def asked(text: str) -> Query:
    return Query("q", {"input": text}, "")


REVIEWS = [("a fine film", "good"), ("a dull film", "bad"), ("a great cast", "good"), ("too long", "bad")]
FRAMED = [(f"Review: {t}\nSentiment:", a) for t, a in REVIEWS]

FEW_SHOT = {
    "labels in a frame": (FRAMED, "Review: x\nSentiment:"),
    "bare labels, repeated": (REVIEWS * 2, "a long way home"),
    "JSON extraction": (
        [("Text: Jo lives in Rome.", '{"name": "Jo"}'), ("Text: Al is 30.", '{"name": "Al"}')],
        "Text: Bo sleeps.",
    ),
    "translation": (
        [("English: dog", "chien"), ("English: cat", "chat"), ("English: cow", "vache")],
        "English: pig",
    ),
    "arithmetic": ([("Q: 2 + 2\nA:", "4"), ("Q: 3 * 5\nA:", "15")], "Q: 9 - 1\nA:"),
    "frame behind the text": (
        [("good film [label]", "pos"), ("bad film [label]", "neg")],
        "odd film [label]",
    ),
    "polite frame": (
        [("Please classify: fine", "pos"), ("Please classify: dull", "neg")],
        "Please classify: so so",
    ),
}
CONVERSATIONS = {
    "support": (
        [
            ("How do I reset my password?", "Go to Settings and choose Reset."),
            ("Thanks. And my e-mail address?", "That is in Settings too."),
        ],
        "What about my phone number?",
    ),
    "coding": (
        [
            ("Write a function that adds numbers.", "def add(a, b):\n    return a + b"),
            ("Make it handle None.", "def add(a, b):\n    return (a or 0) + (b or 0)"),
        ],
        "Now add type hints.",
    ),
    "short answers, reference to earlier turns": (
        [("Is Rome in Italy?", "Yes"), ("And Paris?", "No"), ("Thanks, is it in France?", "Yes")] * 2,
        "And Lyon?",
    ),
    "answers that talk": (
        [
            ("Note: buy milk", "Sure, noted!"),
            ("Note: buy eggs", "Sure, noted!"),
            ("Note: run", "Sure, noted!"),
        ],
        "Note: sleep",
    ),
    "one pair": ([("Review: fine", "good")], "Review: dull"),
    "bare labels, too few to tell": (REVIEWS[:3], "a long way home"),
    "explanations in a frame": (
        [
            ("Question: why is the sky blue?", "Because air scatters short waves more than long ones."),
            (
                "Question: why is grass green?",
                "Chlorophyll absorbs red and blue light, so green is left over.",
            ),
        ],
        "Question: why is snow white?",
    ),
    "greetings": (
        [("hi", "Hello! How can I help?"), ("tell me a joke", "Why did the hen cross?")],
        "another one",
    ),
}


@pytest.mark.parametrize("case", FEW_SHOT)
def test_structure_that_leaves_no_doubt(case: str) -> None:
    pairs, query = FEW_SHOT[case]
    messages = turns(pairs, query, "Do it.")
    before = copy.deepcopy(messages)
    prompt = FewShotPrompt.from_messages(messages)
    assert messages == before
    assert [(d.inputs["input"], d.output) for d in prompt.demonstrations] == pairs
    assert prompt.to_messages(asked(query)) == messages
    assert find_demonstrations(messages).how == "structure"


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_a_conversation_is_never_taken_for_demonstrations(case: str) -> None:
    pairs, query = CONVERSATIONS[case]
    score, signs = structure_score([u for u, _ in pairs], [a for _, a in pairs], query)
    assert score < 0.8, signs
    messages = turns(pairs, query)
    with pytest.raises(
        InputError, match=r"may be a conversation.*0\.8 is needed.*demonstrations=\[positions"
    ):
        FewShotPrompt.from_messages(messages)
    explicit = FewShotPrompt.from_messages(messages, demonstrations=range(0, len(messages) - 1, 2))
    assert explicit.to_messages(asked(query)) == messages


def test_names_and_ids_and_positions_say_it_themselves() -> None:
    query = {"role": "user", "content": "q"}
    named = [
        {"role": "developer", "content": "Do it."},
        {"role": "system", "name": "example_user", "content": "why?"},
        {"role": "system", "name": "example_assistant", "content": "Sure, because."},
        query,
    ]
    prompt = FewShotPrompt.from_messages(named)
    assert prompt.to_messages(asked("q")) == named
    assert FewShotPrompt.from_dict(prompt.to_dict()) == prompt
    assert prompt.subset([False]).to_messages(asked("q")) == [named[0], query]

    marked = [
        {"role": "user", "content": "why?", "id": "pp-ex-7"},
        {"role": "assistant", "content": "Sure.", "id": "pp-ex-7-answer"},
        query,
    ]
    prompt = FewShotPrompt.from_messages(marked)
    assert [d.id for d in prompt.demonstrations] == ["pp-ex-7"]
    assert prompt.to_messages(asked("q")) == [{k: v for k, v in t.items() if k != "id"} for t in marked]

    plain = turns([("why?", "Sure."), ("how?", "So.")], "q")
    for positions in ([0, 2], [0, 1, 2, 3], (2, 0)):
        assert FewShotPrompt.from_messages(plain, demonstrations=positions).to_messages(asked("q")) == plain


def test_the_frame_can_be_a_template() -> None:
    messages = turns(FRAMED, "Review: x\nSentiment:")
    prompt = FewShotPrompt.from_messages(messages, user_template="Review: {input}\nSentiment:")
    assert [d.inputs["input"] for d in prompt.demonstrations] == [t for t, _ in REVIEWS]
    assert prompt.to_messages(asked("x")) == messages
    with pytest.raises(InputError, match=r"does not fit messages\[8\]"):
        FewShotPrompt.from_messages(messages, user_template="Text: {input}")
    for bad in ("no slot", "{input} {input}", "{output}"):
        with pytest.raises(InputError, match="user_template"):
            FewShotPrompt.from_messages(messages, user_template=bad)


USER, ANSWER = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("messages", "more", "reason"),
    [
        ([], {}, "a list of chat turns"),
        ("text", {}, "a list of chat turns"),
        ([3], {}, r"messages\[0\]: got 3"),
        ([USER, ANSWER], {}, "last turn must be a user turn"),
        ([USER], {}, "no demonstrations were recognised"),
        ([USER, USER, ANSWER, USER], {}, "no demonstrations were recognised"),
        ([USER, {**ANSWER, "tool_calls": [1]}, USER], {}, "has tool_calls"),
        ([USER, {"role": "tool", "content": "x", "tool_call_id": "1"}, USER], {}, "role 'tool'"),
        ([USER, {"role": "assistant", "content": None}, USER], {}, "has content None"),
        ([USER, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}, USER], {}, "has content"),
        ([USER, ANSWER, {"role": "system", "content": "s"}, USER], {}, "second system turn"),
        ([{"role": "system", "content": ""}, USER], {}, "empty instruction"),
        ([{**USER, "name": "ann"}, ANSWER, USER], {"demonstrations": [4]}, "positions?|each position once"),
        ([USER, ANSWER, USER], {"demonstrations": []}, "each position once"),
        ([USER, ANSWER, USER], {"demonstrations": [0, 0]}, "each position once"),
        ([USER, ANSWER, USER], {"demonstrations": [True]}, "whole numbers"),
        ([USER, ANSWER, USER], {"demonstrations": [1]}, "no user turn before it"),
        (
            [USER, ANSWER, USER, ANSWER, USER],
            {"demonstrations": [2]},
            r"messages\[0\] is a user turn: neither",
        ),
        ([{**USER, "name": "example_user"}, ANSWER, USER], {}, "marked by names .* are not pairs"),
        (
            [{**USER, "name": "example_user"}, {**ANSWER, "name": "example_assistant"}, USER, ANSWER, USER],
            {},
            r"messages\[2\] is a user turn: neither",
        ),
        (
            [USER, ANSWER, {**USER, "name": "b"}, ANSWER, USER],
            {"demonstrations": [0, 2]},
            "different roles or names",
        ),
    ],
)
def test_what_is_refused(messages: Any, more: Turn, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        FewShotPrompt.from_messages(messages, **more)


words = st.text(min_size=1, max_size=40)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.tuples(st.text(max_size=40), st.text(max_size=40)), min_size=1, max_size=6),
    st.text(max_size=40),
    st.none() | st.tuples(st.sampled_from(["system", "developer"]), words),
    st.sampled_from([("user", "assistant"), ("system", "system"), ("developer", "developer")]),
    st.booleans(),
)
def test_round_trip_byte_for_byte(
    pairs: list[tuple[str, str]],
    query: str,
    head: tuple[str, str] | None,
    roles: tuple[str, str],
    named: bool,
) -> None:
    named = named or roles[0] != "user"
    names = ("example_user", "example_assistant")
    messages: list[Turn] = [] if head is None else [{"role": head[0], "content": head[1]}]
    for pair in pairs:
        for k in (0, 1):
            messages.append({"role": roles[k], "content": pair[k], **({"name": names[k]} if named else {})})
    messages.append({"role": "user", "content": query})
    first = len(messages) - 1 - 2 * len(pairs)
    prompt = FewShotPrompt.from_messages(
        messages, demonstrations=None if named else range(first, len(messages) - 1)
    )
    back = prompt.to_messages(asked(query))
    assert back == messages
    stored = FewShotPrompt.from_dict(prompt.to_dict())
    assert stored == prompt
    assert stored.to_messages(asked(query)) == messages


def test_names_reach_the_wire_and_the_key() -> None:
    from proxyprompt._request_keys import RequestKeys

    turn = Message("system", "a", "example_user")
    assert prompt_fields((turn,), "chat") == {
        "messages": [{"role": "system", "content": "a", "name": "example_user"}]
    }
    maker = RequestKeys({"model": "m"}, "score", {})
    plain, named = (
        ScoreRequest((m, Message("user", "q")), ("x", "y")) for m in (Message("system", "a"), turn)
    )
    assert maker.key(plain) != maker.key(named)


def test_forms_that_are_no_chat_form() -> None:
    base = {"demonstrations": [{"id": "a", "input": "x", "output": "y"}], "style": "chat"}
    for form in ({"other": 1}, {"user": "user"}, {"user": ["tool", None]}, {"instruction_role": "user"}, "x"):
        with pytest.raises((DataError, InputError), match="chat_form"):
            FewShotPrompt.from_dict({**base, "chat_form": form})


def test_a_stored_prompt_names_no_file(tmp_path: Any) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": "a", "input": "secret", "output": "y"}\n')
    with pytest.raises(DataError, match="must be a list of rows"):
        FewShotPrompt.from_dict({"demonstrations": str(rows)})
