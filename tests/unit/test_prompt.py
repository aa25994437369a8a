"""Rendering is single-pass, total, and keeps order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyprompt.backends.base import Message
from proxyprompt.errors import DataError, InputError
from proxyprompt.prompt import Demonstration, FewShotPrompt, Query, Template, Unit

HOSTILE = [
    *("{input}", "{output}", "{{", "}}", "{", "}", "{{ 7*7 }}", "{% raw %}", "%s %(x)d", "${PATH}", "{0}"),
    *("{a.b}", "\\n", "\x00", "</s>", "{input:>200000000}"),
]
TEXT = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=40))


def demo(i: int, text: str = "a", output: str = "x") -> Demonstration:
    return Demonstration(f"d{i}", {"input": text}, output)


QUERY = Query("q", {"input": "?"}, "x")


def test_completion_prompt_has_instruction_demonstrations_in_order_and_the_query() -> None:
    prompt = FewShotPrompt((demo(1, "one", "A"), demo(2, "two", "B")), "Do it.", "In: {input}\nOut: {output}")
    assert prompt.render(None, QUERY) == "Do it.\n\nIn: one\nOut: A\n\nIn: two\nOut: B\n\nIn: ?\nOut:"
    assert prompt.candidate("A") == " A"


def test_empty_and_full_coalitions_render_validly() -> None:
    prompt = FewShotPrompt((demo(1), demo(2)), "", "I {input} O {output}")
    assert prompt.render([False, False], QUERY) == "I ? O"
    assert prompt.render([True, True], QUERY) == prompt.render(None, QUERY)


def test_chat_prompt_alternates_turns() -> None:
    prompt = FewShotPrompt((demo(1, "one", "A"),), "Be brief.", "Q: {input}\nA: {output}", style="chat")
    assert prompt.render(None, QUERY) == (
        Message("system", "Be brief."),
        Message("user", "Q: one\nA:"),
        Message("assistant", "A"),
        Message("user", "Q: ?\nA:"),
    )
    assert prompt.candidate("A") == "A"


def test_coalitions_keep_order() -> None:
    prompt = FewShotPrompt(tuple(demo(i, str(i)) for i in range(5)), "", "{input}={output}", separator="|")
    assert prompt.render([True, False, True, False, True], QUERY) == "0=x|2=x|4=x|?="


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), max_size=5), TEXT, TEXT)
def test_rendering_equals_plain_concatenation(
    rows: list[tuple[str, str]], instruction: str, query: str
) -> None:
    demonstrations = tuple(Demonstration(f"d{i}", {"input": a}, b) for i, (a, b) in enumerate(rows))
    prompt = FewShotPrompt(demonstrations, instruction, "<{input}> [{{literal}}] {output}")
    expected = [*([instruction] if instruction else []), *(f"<{a}> [{{literal}}] {b}" for a, b in rows)]
    expected.append(f"<{query}> [{{literal}}]")
    assert prompt.render(None, Query("q", {"input": query}, "x")) == "\n\n".join(expected)


@pytest.mark.parametrize("text", ["{", "}", "a {b.c}", "{0}", "{x!r}", "{x:>9}", "{ x }", "{}"])
def test_templates_refuse_anything_but_plain_slots(text: str) -> None:
    with pytest.raises(InputError, match="a slot is"):
        Template(text)


def test_template_needs_exactly_one_output() -> None:
    with pytest.raises(InputError, match="0 slots"):
        FewShotPrompt((), "", "{input}")
    with pytest.raises(InputError, match="2 slots"):
        FewShotPrompt((), "", "{input} {output} {output}")
    with pytest.raises(InputError, match="must not hold"):
        FewShotPrompt((), "", "{input} {output}", query_template="{output}")


def test_missing_fields_and_duplicate_ids_are_named() -> None:
    with pytest.raises(DataError, match=r"demonstration 'd1': the template needs a field 'title'"):
        FewShotPrompt((demo(1),), "", "{title} {output}")
    with pytest.raises(DataError, match="'d1' is used twice"):
        FewShotPrompt((demo(1), demo(1)))


def test_wrong_coalition_length_is_refused() -> None:
    with pytest.raises(InputError, match="3 entries for 1 demonstrations"):
        FewShotPrompt((demo(1),)).render([True] * 3, QUERY)


def test_letter_answers() -> None:
    choices = ("red", "blue")
    d = Demonstration("d", {"input": "sky"}, "blue", choices)
    prompt = FewShotPrompt((d,), "", "{input}\n{choices}\nAnswer: {output}", answer_style="letter")
    assert prompt.render(None, Query("q", {"input": "rose"}, "red", choices)) == (
        "sky\nA. red\nB. blue\nAnswer: B\n\nrose\nA. red\nB. blue\nAnswer:"
    )
    assert prompt.candidate("blue", choices) == " B"
    with pytest.raises(DataError, match="letter"):
        prompt.candidate("green", choices)


def test_subset_and_keep() -> None:
    prompt = FewShotPrompt(tuple(demo(i) for i in range(4)))
    assert [d.id for d in prompt.keep(["d3", "d1"]).demonstrations] == ["d1", "d3"]
    with pytest.raises(InputError, match="nope"):
        prompt.keep(["nope"])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), max_size=4), TEXT)
def test_json_round_trip(rows: list[tuple[str, str]], instruction: str) -> None:
    prompt = FewShotPrompt(
        tuple(
            Demonstration(f"d{i}", {"input": a, "more": b}, b, ("p", "q")) for i, (a, b) in enumerate(rows)
        ),
        instruction,
        style="chat",
    )
    assert FewShotPrompt.from_dict(prompt.to_dict()) == prompt


def test_units_are_the_demonstrations() -> None:
    prompt = FewShotPrompt((demo(1, "one", "A"), demo(2, "two", "B")), "Do it.", "In: {input}\nOut: {output}")
    assert prompt.units == (
        Unit("demonstration", "d1", "In: one\nOut: A"),
        Unit("demonstration", "d2", "In: two\nOut: B"),
    )
    assert len(prompt.units) == prompt.n_units
    assert prompt.query_fields == ("input",)


def test_another_instruction_can_stand_in() -> None:
    prompt = FewShotPrompt((demo(1),), "Do it.", "{input}={output}", separator="|")
    assert prompt.render(None, QUERY, instruction="Now.") == "Now.|a=x|?="
    assert prompt.render([False], QUERY, instruction="") == "?="
    assert prompt.render(None, QUERY) == "Do it.|a=x|?="
