"""Templates are found wherever they can be replaced; the copy is of the same type and the original stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.example_selectors import LengthBasedExampleSelector
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import (
    ChatPromptTemplate,
    FewShotPromptTemplate,
    PromptTemplate,
    SystemMessagePromptTemplate,
)
from langchain_core.prompts.few_shot_with_templates import FewShotPromptWithTemplates
from langchain_core.runnables import (
    ConfigurableField,
    RouterRunnable,
    RunnableBranch,
    RunnableLambda,
    RunnableParallel,
    RunnablePassthrough,
)
from langchain_proxyprompt import find_templates
from langchain_proxyprompt._finding import find_template, language_models, replace_parts
from langchain_proxyprompt._site import open_site
from planted_chain import chat_prompt, examples, few_shot, planted, turns

from proxyprompt.errors import InputError

MODEL = planted()
LINE = PromptTemplate.from_template("Q: {input}\nA: {output}")


def string_template(rows: list[dict[str, str]] | None = None) -> FewShotPromptTemplate:
    return FewShotPromptTemplate(
        examples=examples() if rows is None else rows,
        example_prompt=LINE,
        prefix="Classify.",
        suffix="Q: {input}\nA:",
    )


def with_templates() -> FewShotPromptWithTemplates:
    return FewShotPromptWithTemplates(
        examples=examples(),
        example_prompt=LINE,
        prefix=PromptTemplate.from_template("Classify."),
        suffix=PromptTemplate.from_template("Q: {input}\nA:"),
        input_variables=["input"],
    )


def pairs() -> ChatPromptTemplate:
    return ChatPromptTemplate.from_messages(
        [
            ("system", "s"),
            ("human", "a {{b}}"),
            ("ai", "pos"),
            HumanMessage("c {x}"),
            AIMessage("neg"),
            ("human", "{input}"),
        ]
    )


def sequence() -> Any:
    return chat_prompt() | MODEL | StrOutputParser()


STRUCTURES: dict[str, Callable[[], Any]] = {
    "the prompt itself": chat_prompt,
    "sequence": sequence,
    "config": lambda: sequence().with_config(tags=["x"]),
    "retry": lambda: sequence().with_retry(),
    "bind": lambda: chat_prompt() | MODEL.bind(stop=["x"]),
    "assign": lambda: RunnablePassthrough.assign(out=sequence()),
    "parallel": lambda: RunnableParallel(a=sequence(), b=RunnablePassthrough()),
    "each": lambda: sequence().map(),
    "pick": lambda: RunnablePassthrough.assign(out=sequence()).pick("out"),
    "fallbacks": lambda: (StrOutputParser() | MODEL).with_fallbacks([sequence()]),
    "branch": lambda: RunnableBranch((lambda x: True, sequence()), StrOutputParser()),
    "router": lambda: RouterRunnable({"a": sequence(), "b": StrOutputParser()}),
    "alternatives": lambda: StrOutputParser().configurable_alternatives(
        ConfigurableField(id="x"), other=sequence()
    ),
    "nested chat prompt": lambda: (
        ChatPromptTemplate.from_messages([chat_prompt(), ("human", "more")]) | MODEL
    ),
    "in the system message": lambda: ChatPromptTemplate.from_messages(
        [SystemMessagePromptTemplate(prompt=string_template()), ("human", "{input}")]
    ),
    "string": lambda: string_template() | MODEL,
    "string with templates": lambda: with_templates() | MODEL,
    "fixed turns": lambda: pairs() | MODEL,
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_found_and_replaced(name: str) -> None:
    chain = STRUCTURES[name]()
    found = find_template(chain)
    site = open_site(found.template, pool=None, freeze=False, output_key=None)
    before = [d.id for d in site.demonstrations]
    new = site.keeping(before[1:])
    copy = replace_parts(chain, lambda part: new if part is found.template else None)
    assert type(copy) is type(chain)
    again = open_site(find_template(copy).template, pool=None, freeze=False, output_key=None)
    assert [d.output for d in again.demonstrations] == [d.output for d in site.demonstrations[1:]]
    untouched = open_site(find_template(chain).template, pool=None, freeze=False, output_key=None)
    assert [d.id for d in untouched.demonstrations] == before
    assert find_template(chain, found.path).template is found.template


def test_the_examples_list_of_the_user_is_not_shared() -> None:
    rows = examples()
    chain = chat_prompt(few_shot(rows)) | MODEL
    site = open_site(find_template(chain).template, pool=None, freeze=False, output_key=None)
    site.keeping(["ex0"]).examples.append({"input": "x", "output": "y"})
    assert rows == examples()


def test_fixed_turns_keep_their_braces() -> None:
    site = open_site(pairs(), pool=None, freeze=False, output_key=None)
    assert [(d.inputs["input"], d.output) for d in site.demonstrations] == [
        ("a {b}", "pos"),
        ("c {x}", "neg"),
    ]


def test_turns_without_a_query_behind_are_no_demonstrations() -> None:
    prompt = ChatPromptTemplate.from_messages([("human", "hello"), ("ai", "hi")])
    with pytest.raises(InputError, match="no few-shot template found"):
        find_template(prompt)


def test_several_templates_are_never_guessed_between() -> None:
    first, second = few_shot(), few_shot(examples(3))
    chain = (
        ChatPromptTemplate.from_messages([first, ("human", "{input}"), second, ("human", "again")]) | MODEL
    )
    with pytest.raises(InputError, match=r"2 few-shot templates: first\.messages\[0\], first\.messages\[2\]"):
        find_template(chain)
    assert find_template(chain, second).template is second
    assert find_template(chain, "first.messages[0]").template is first
    with pytest.raises(InputError, match="is not in the chain"):
        find_template(chain, "first.messages[7]")


def test_one_template_in_two_places_is_one() -> None:
    shared = chat_prompt()
    chain = (shared | MODEL).with_fallbacks([shared | planted()])
    assert len(find_templates(chain)) == 1
    new = shared.model_copy()
    copy = replace_parts(chain, lambda part: new if part is shared else None)
    assert copy.runnable.first is copy.fallbacks[0].first is new


def test_a_closure_is_found_and_refused() -> None:
    inner = sequence()
    chain = RunnableLambda(lambda x: inner.invoke(x)) | StrOutputParser()
    with pytest.raises(InputError, match="lives inside a function") as caught:
        find_template(chain)
    assert "Pass the inner chain" in str(caught.value.hint)


class Holder:
    def __init__(self) -> None:
        self.chain = sequence()

    def run(self, x: Any) -> Any:
        return self.chain.invoke(x)


@pytest.mark.parametrize("function", [Holder().run, sequence().invoke])
def test_what_a_method_holds_is_refused_with_advice(function: Any) -> None:
    with pytest.raises(InputError, match="lives inside a function") as caught:
        find_template(RunnableLambda(function) | StrOutputParser())
    assert "Pass the inner chain" in str(caught.value.hint)


def test_what_cannot_be_seen_is_refused_with_advice() -> None:
    with pytest.raises(
        InputError, match=r"no few-shot template found .*functions that cannot be looked into"
    ) as caught:
        find_template(RunnableLambda(lambda x: Holder().run(x)) | StrOutputParser())
    assert "pass that inner chain" in str(caught.value.hint)


def test_a_graph_is_refused() -> None:
    from langgraph.graph import END, START, StateGraph

    chain = sequence()
    graph: Any = StateGraph(dict)
    graph.add_node("ask", lambda state: {"out": chain.invoke(state)})
    graph.add_edge(START, "ask")
    graph.add_edge("ask", END)
    with pytest.raises(InputError, match="CompiledStateGraph runs functions") as caught:
        find_template(graph.compile())
    assert "use result.chain in the node" in str(caught.value.hint)
    with pytest.raises(InputError, match="no few-shot template found"):
        find_template(StrOutputParser() | graph.compile())


def test_models_are_found_behind_bindings() -> None:
    chain = (chat_prompt() | MODEL.bind(stop=["x"])).with_retry()
    assert language_models(chain) == [MODEL]


def test_examples_win_over_a_selector_as_langchain_has_it() -> None:
    selector = LengthBasedExampleSelector(examples=examples(), example_prompt=LINE)
    both = few_shot([]).model_copy(update={"example_selector": selector})
    assert both.format_messages(input="x") == []
    assert open_site(both, pool=None, freeze=False, output_key=None).demonstrations == ()
    site = open_site(few_shot(), pool=None, freeze=False, output_key=None)
    assert site.masked().examples is None
    assert site.keeping(["ex0"]).example_selector is None


def test_ids_of_the_examples_are_kept() -> None:
    rows = [dict(row, id=f"row-{i}") for i, row in enumerate(examples())]
    site = open_site(few_shot(rows), pool=None, freeze=False, output_key=None)
    assert [d.id for d in site.demonstrations] == [row["id"] for row in rows]
    twice = [dict(row, id="same") for row in rows]
    assert [
        d.id for d in open_site(few_shot(twice), pool=None, freeze=False, output_key=None).demonstrations
    ][:2] == ["ex0", "ex1"]


def test_an_example_that_lacks_a_field_is_named() -> None:
    with pytest.raises(InputError, match=r"example 'ex1': the example prompt needs 'output'"):
        open_site(few_shot([examples()[0], {"input": "x"}]), pool=None, freeze=False, output_key=None)


def test_an_answer_that_cannot_be_told_must_be_named() -> None:
    template = FewShotPromptTemplate(
        examples=[{"output": "pos", "input": "a"}],
        example_prompt=PromptTemplate.from_template("{output} is the answer to {input}"),
        suffix="{q}",
    )
    assert open_site(template, pool=None, freeze=False, output_key="output").demonstrations[0].output == "pos"
    assert open_site(template, pool=None, freeze=False, output_key=None).demonstrations[0].output == "a"
    with pytest.raises(InputError, match="output_key: got 'x'"):
        open_site(template, pool=None, freeze=False, output_key="x")


def test_an_example_without_an_answer_is_refused() -> None:
    shots = few_shot().model_copy(
        update={"example_prompt": ChatPromptTemplate.from_messages([("human", "{input}")])}
    )
    with pytest.raises(InputError, match="its last turn is not the model's"):
        open_site(shots, pool=None, freeze=False, output_key=None)
    assert turns().input_variables == ["input", "output"]
