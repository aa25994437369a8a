"""LangChain's own rendering, byte for byte, or a refusal."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.load import dumps, loads
from langchain_core.messages import HumanMessage
from langchain_core.prompts import (
    ChatPromptTemplate,
    FewShotPromptTemplate,
    PromptTemplate,
    SystemMessagePromptTemplate,
)
from langchain_proxyprompt import materialize
from langchain_proxyprompt._finding import find_template, replace_parts
from langchain_proxyprompt._running import ChainRunner, to_rendered
from langchain_proxyprompt._site import open_site
from planted_chain import few_shot, planted

from proxyprompt.errors import InputError

LINE = PromptTemplate.from_template("Q: {input}\nA: {output}")
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
PLAIN = TEXT.filter(lambda t: "{" not in t and "}" not in t)
RUNS = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


def string_template(rows: list[dict[str, str]], **fields: Any) -> FewShotPromptTemplate:
    return FewShotPromptTemplate(
        examples=rows, example_prompt=LINE, prefix="P", suffix="Q: {input}\nA:", **fields
    )


def rendered(chain: Any, kept: tuple[str, ...], inputs: Any) -> Any:
    found = find_template(chain)
    masked = open_site(found.template, pool=None, freeze=False, output_key=None).masked()
    return ChainRunner(replace_parts(chain, lambda p: masked if p is found.template else None)).render(
        kept, inputs
    )


@RUNS
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), TEXT, st.data())
def test_chat_examples_are_rendered_as_they_are(rows: list[tuple[str, str]], query: str, data: Any) -> None:
    """Any text, braces and tags included: one pass, and what LangChain renders with these examples alone."""
    listed = [{"input": i, "output": o} for i, o in rows]
    prompt = ChatPromptTemplate.from_messages([("system", "s"), few_shot(listed), ("human", "{input}")])
    kept = data.draw(st.lists(st.integers(0, len(rows) - 1), unique=True))
    got = rendered(prompt | planted(), tuple(f"ex{i}" for i in kept), {"input": query})
    single = [
        ("system", "s"),
        *(t for i in kept for t in (("user", rows[i][0]), ("assistant", rows[i][1]))),
        ("user", query),
    ]
    assert [(m.role, m.content) for m in got] == single
    alone = ChatPromptTemplate.from_messages(
        [("system", "s"), few_shot([listed[i] for i in kept]), ("human", "{input}")]
    )
    assert got == to_rendered(alone.format_messages(input=query))


@RUNS
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), TEXT)
def test_string_examples_are_rendered_once_or_refused(rows: list[tuple[str, str]], query: str) -> None:
    listed = [{"input": i, "output": o} for i, o in rows]
    template = string_template(listed)
    once = "\n\n".join(["P", *(f"Q: {i}\nA: {o}" for i, o in rows), f"Q: {query}\nA:"])
    try:
        theirs = template.format(input=query)
    except (KeyError, ValueError, IndexError, AttributeError):
        theirs = None
    braces = any("{" in t or "}" in t for row in rows for t in row)
    if not braces:
        assert theirs == once
        got = rendered(template | planted(), tuple(f"ex{i}" for i in range(len(rows))), {"input": query})
        assert got[0].content == once
        return
    refusal = None
    try:
        open_site(template, pool=None, freeze=False, output_key=None)
    except InputError as error:
        refusal = str(error)
    if refusal is not None:
        assert "formats the text of its examples a second time" in refusal
        return
    # Only doubled braces, which LangChain writes as single ones whatever the query is.
    shown = "\n\n".join(["P", *(f"Q: {i}\nA: {o}" for i, o in rows)])
    assert theirs == shown.replace("{{", "{").replace("}}", "}") + f"\n\nQ: {query}\nA:"


@pytest.mark.parametrize(
    "text", ['{"a": 1}', "{input}", "{input.__class__}", "{input:>200000000}", "a } b", "{0}", "{input!r}"]
)
def test_an_example_that_would_be_evaluated_is_refused_by_name(text: str) -> None:
    template = string_template([{"input": "fine", "output": "pos"}, {"input": text, "output": "neg"}])
    with pytest.raises(
        InputError, match=r"example 'ex1': .*formats the text of its examples a second time"
    ) as caught:
        open_site(template, pool=None, freeze=False, output_key=None)
    assert "FewShotChatMessagePromptTemplate" in str(caught.value.hint)


def test_the_attack_is_real_in_langchain() -> None:
    """Why it is refused: what example text does in the library itself."""
    poisoned = string_template([{"input": "{input.__class__}", "output": "x"}])
    try:
        shown = poisoned.format(input="secret")
    except ValueError:
        return  # a release that refuses it by itself
    assert "{input.__class__}" not in shown


def test_jinja_examples_are_refused() -> None:
    jinja = PromptTemplate.from_template("Q: {{ input }} A: {{ output }}", template_format="jinja2")
    template = FewShotPromptTemplate(
        examples=[{"input": "{{ 1 + 1 }}", "output": "x"}],
        example_prompt=jinja,
        suffix="{{ q }}",
        template_format="jinja2",
    )
    with pytest.raises(InputError, match="would be evaluated"):
        open_site(template, pool=None, freeze=False, output_key="output")


def test_an_example_that_renders_to_nothing_is_dropped_by_langchain_and_costs_nothing() -> None:
    blank = PromptTemplate.from_template("{input}{output}")
    template = FewShotPromptTemplate(
        examples=[{"input": "", "output": ""}, {"input": "a", "output": "b"}],
        example_prompt=blank,
        suffix="Q {input}",
    )
    chain = template | planted()
    whole = rendered(chain, ("ex0", "ex1"), {"input": "x"})
    assert whole == rendered(chain, ("ex1",), {"input": "x"})


def chains() -> list[Any]:
    rows = [{"input": "a {b}", "output": "pos"}, {"input": "c", "output": "neg"}]
    plain = [{"input": "a", "output": "pos"}, {"input": "c", "output": "neg"}]
    return [
        ChatPromptTemplate.from_messages([("system", "s"), few_shot(rows), ("human", "{input}")]),
        few_shot(rows),
        string_template(plain),
        string_template(plain).partial(input="x"),
        ChatPromptTemplate.from_messages(
            [SystemMessagePromptTemplate(prompt=string_template(plain)), ("human", "{input}")]
        ),
        ChatPromptTemplate.from_messages([HumanMessage("a {b}"), ("ai", "pos"), ("human", "{input}")]),
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("i", range(6))
def test_written_out_it_renders_the_same_and_can_be_serialised(i: int) -> None:
    prompt = chains()[i]
    fixed = materialize(prompt)
    assert fixed.invoke({"input": "q {x}"}).to_messages() == prompt.invoke({"input": "q {x}"}).to_messages()
    text = dumps(fixed)
    assert "not_implemented" not in text
    try:
        back = loads(text, allowed_objects="all")
    except TypeError:  # releases before the parameter
        back = loads(text)
    assert back.invoke({"input": "q"}).to_messages() == prompt.invoke({"input": "q"}).to_messages()


def test_langchain_cannot_serialise_a_few_shot_template_itself() -> None:
    assert "not_implemented" in dumps(chains()[0])
