"""The whole path through a user's chain."""

from __future__ import annotations

import asyncio
import json
import stat
import warnings
from pathlib import Path
from typing import Any

import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.example_selectors import LengthBasedExampleSelector, SemanticSimilarityExampleSelector
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, FewShotPromptTemplate, PromptTemplate
from langchain_core.runnables import RunnableLambda
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_proxyprompt import (
    PruneDemonstrations,
    PrunedExampleSelector,
    apply_artifact,
    aprune_examples,
    materialize,
    prune_examples,
)
from planted_chain import LABELS, chat_prompt, examples, few_shot, planted, queries

from proxyprompt import Artifact, Settings
from proxyprompt.errors import (
    ArtifactError,
    DataError,
    InputError,
    PromptMismatchError,
    PromptMismatchWarning,
)

QUICK = Settings(
    keep_labels=False, relabel="off", clean_prior="off", fit_coalitions=18, oracle_queries=6, clean_rounds=1
)
SIZES = {"explain": 6, "select": 24, "sealed": 36}
LINE = PromptTemplate.from_template("Q: {input}\nA: {output}")


def prune(chain: Any, path: Path, **options: Any) -> Any:
    given: dict[str, Any] = {"settings": QUICK, "sizes": SIZES, "ledger": path / "ledger.db", **options}
    if "labels" not in given and "metric" not in given:
        given["labels"] = LABELS
    return prune_examples(chain, queries=given.pop("queries", queries(66)), **given)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("prune")
    model = planted()
    chain = (chat_prompt() | model | StrOutputParser()).with_retry()
    return chain, prune(chain, path), model, path


def test_the_poison_leaves_and_the_chain_is_of_its_own_type(done: Any) -> None:
    chain, result, model, _ = done
    assert "ex2" in result.removed
    assert result.certified
    assert type(result.chain) is type(chain)
    assert result.chain.bound.first.messages[1].examples == [examples()[int(i[2:])] for i in result.kept]
    assert chain.bound.first.messages[1].examples == examples()
    model.calls.clear()
    result.chain.invoke({"input": "query 7"})
    assert [m.content for m in model.calls[0]] == [
        m.content for m in result.chain.bound.first.format_messages(input="query 7")
    ]
    assert "demonstrations" in result.report


def test_a_second_run_buys_nothing(done: Any) -> None:
    chain, result, model, path = done
    model.calls.clear()
    again = prune(chain, path)
    assert model.calls == []
    assert again.kept == result.kept


def test_a_run_stopped_in_the_middle_goes_on(done: Any, tmp_path: Path) -> None:
    _, result, _, _ = done
    model = planted()
    chain = (chat_prompt() | model | StrOutputParser()).with_retry()
    limited = Settings(**{**QUICK.to_dict(), "budget_calls": 230})
    with pytest.raises(Exception, match="230"):
        prune(chain, tmp_path, settings=limited)
    assert 0 < len(model.calls) <= 230
    bought = len(model.calls)
    assert prune(chain, tmp_path).kept == result.kept
    assert len(model.calls) > bought


def test_saved_files_are_private_and_applied_again(done: Any, tmp_path: Path) -> None:
    chain, result, _, _ = done
    files = result.save(tmp_path)
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o600 for p in files.values())
    again = apply_artifact(chain, files["artifact"])
    assert again.bound.first.messages[1].examples == result.chain.bound.first.messages[1].examples
    assert chain.bound.first.messages[1].examples == examples()


def test_another_example_is_never_pruned_by_a_stored_result(done: Any) -> None:
    _, result, _, _ = done
    rows = examples()
    rows[3] = {"input": "demo 3!", "output": "neg"}
    with pytest.raises(ArtifactError, match="example 'ex3' differs"):
        apply_artifact(chat_prompt(few_shot(rows)) | planted(), result.artifact)
    with pytest.raises(ArtifactError, match="4 examples instead of 5"):
        apply_artifact(chat_prompt(few_shot(examples()[:4])) | planted(), result.artifact)


def test_what_is_not_certified_is_not_applied(done: Any) -> None:
    chain, result, _, _ = done
    body = json.loads(json.dumps(result.artifact.body))
    body["certificate"]["decision"] = "not_certified"
    with pytest.raises(ArtifactError, match="without a certificate"):
        apply_artifact(chain, Artifact(body))


def test_a_step_prunes_what_the_prompt_rendered(done: Any) -> None:
    _, result, model, _ = done
    step = PruneDemonstrations(result.artifact, on_mismatch="raise")
    value = chat_prompt().invoke({"input": "query 5"})
    pruned = step.invoke(value)
    left = [m.content for i in result.kept for m in few_shot([examples()[int(i[2:])]]).format_messages()]
    assert [m.content for m in pruned.to_messages()] == ["Classify.", *left, "query 5"]
    assert pruned.to_messages()[0] is value.to_messages()[0]
    assert asyncio.run(step.ainvoke(value)) == pruned
    model.calls.clear()
    (chat_prompt() | step | model).invoke({"input": "query 5"})
    assert len(model.calls[0]) == 2 + 2 * len(result.kept)


def test_the_step_changes_no_other_prompt(done: Any) -> None:
    _, result, _, _ = done
    other = chat_prompt(few_shot([*examples()[:4], {"input": "new", "output": "pos"}])).invoke(
        {"input": "query 1"}
    )
    assert PruneDemonstrations(result.artifact).invoke(other) == other
    with pytest.warns(PromptMismatchWarning, match="sent as it is"):
        assert PruneDemonstrations(result.artifact, on_mismatch="warn").invoke(other) == other
    with pytest.raises(PromptMismatchError, match="sent as it is"):
        PruneDemonstrations(result.artifact, on_mismatch="raise").invoke(other)
    with pytest.raises(InputError, match="on_mismatch: got 'x'"):
        PruneDemonstrations(result.artifact, on_mismatch="x")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="input: got a int"):
        PruneDemonstrations(result.artifact).invoke(3)


def test_written_out_the_result_can_be_serialised(done: Any) -> None:
    from langchain_core.load import dumps

    fixed = materialize(done[1].chain.bound.first)
    assert "not_implemented" not in dumps(fixed)
    assert fixed.format_messages(input="q") == done[1].chain.bound.first.format_messages(input="q")


def test_asynchronously_on_the_callers_loop(tmp_path: Path, done: Any) -> None:
    loops: set[int] = set()

    async def step(inputs: Any) -> Any:  # has no synchronous form
        loops.add(id(asyncio.get_running_loop()))
        return inputs

    chain = RunnableLambda(step) | chat_prompt() | planted() | StrOutputParser()

    async def main() -> Any:
        return await aprune_examples(
            chain, queries=queries(66), labels=LABELS, settings=QUICK, sizes=SIZES, ledger=tmp_path / "l.db"
        )

    assert asyncio.run(main()).kept == done[1].kept
    assert len(loops) == 1
    with pytest.raises(InputError, match=r"unknown \['lables'\]"):
        asyncio.run(aprune_examples(chain, queries=queries(10), lables=LABELS))


def test_fixed_turns_and_string_templates(tmp_path: Path) -> None:
    rows = examples(4)
    fixed = [turn for row in rows for turn in (HumanMessage(row["input"]), AIMessage(row["output"]))]
    prompt = ChatPromptTemplate.from_messages([("system", "s"), *fixed, ("human", "{input}")])
    result = prune(prompt | planted(), tmp_path)
    assert "ex2" in result.removed
    assert [m.content for m in result.chain.first.messages[1:-1]] == [
        text for i in result.kept for text in rows[int(i[2:])].values()
    ]
    template = FewShotPromptTemplate(examples=rows, example_prompt=LINE, prefix="P", suffix="Q: {input}\nA:")
    result = prune(template | planted() | StrOutputParser(), tmp_path)
    assert "ex2" in result.removed
    assert result.chain.first.examples == [rows[int(i[2:])] for i in result.kept]


def test_a_metric_of_the_user_gets_what_the_chain_gives(tmp_path: Path) -> None:
    seen: list[Any] = []

    def metric(output: Any, reference: Any) -> float:
        seen.append((output, reference))
        return float(output["answer"] == reference["label"])

    chain = chat_prompt() | planted() | StrOutputParser() | RunnableLambda(lambda text: {"answer": text})
    rows = [(inputs, {"label": label}) for inputs, label in queries(66)]
    result = prune(chain, tmp_path, queries=rows, metric=metric, binary=True)
    assert "ex2" in result.removed
    assert result.certified
    assert all(isinstance(o, dict) and isinstance(r, dict) for o, r in seen)
    with pytest.raises(InputError, match="the chain's output is a dict, no text"):
        prune(chain, tmp_path, queries=rows, metric="exact_match")


def test_the_metric_by_default_is_exact_match(tmp_path: Path) -> None:
    result = prune(chat_prompt() | planted(), tmp_path, metric="exact_match")
    assert "ex2" in result.removed


def test_a_selectors_choice_is_measured_as_it_is_deployed(tmp_path: Path) -> None:
    selector = LengthBasedExampleSelector(examples=examples(), example_prompt=LINE, max_length=16)
    model = planted()
    chain = chat_prompt(few_shot(example_selector=selector)) | model
    result = prune(chain, tmp_path)
    assert max(len(call) for call in model.calls) < 2 + 2 * 5, "the selector never shows all"
    new = result.chain.first.messages[1]
    assert isinstance(new.example_selector, PrunedExampleSelector)
    assert "ex2" in result.removed
    chosen = selector.select_examples({"input": "query 1"})
    kept = [e for e in chosen if e in [examples()[int(i[2:])] for i in result.kept]]
    assert new.example_selector.select_examples({"input": "query 1"}) == kept
    assert chain.first.messages[1].example_selector is selector


def test_a_selector_can_be_frozen_into_examples(tmp_path: Path) -> None:
    store = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
    selector = SemanticSimilarityExampleSelector.from_examples(
        examples(), DeterministicFakeEmbedding(size=8), InMemoryVectorStore, k=2
    )
    assert not store.store
    chain = chat_prompt(few_shot(example_selector=selector)) | planted()
    result = prune(chain, tmp_path, freeze_selector=True)
    shown = result.chain.first.messages[1]
    assert shown.example_selector is None
    assert all("poison" not in e["input"] for e in shown.examples)
    assert len(shown.examples) == len(result.kept)


class _Opaque(LengthBasedExampleSelector):
    pass


def test_a_pool_that_cannot_be_listed_must_be_given(tmp_path: Path) -> None:
    from langchain_core.example_selectors import BaseExampleSelector

    class Hidden(BaseExampleSelector):
        def add_example(self, example: Any) -> Any: ...

        def select_examples(self, input_variables: Any) -> list[dict[str, Any]]:
            return examples()[1:4]

    chain = chat_prompt(few_shot(example_selector=Hidden())) | planted()
    with pytest.raises(InputError, match="pool: the examples that a Hidden may choose cannot be listed"):
        prune(chain, tmp_path)
    with pytest.raises(InputError, match="chose 2 examples that are not among the 1 of the pool"):
        prune(chain, tmp_path, pool=examples()[1:2])
    assert "ex2" in prune(chain, tmp_path, pool=examples()).removed


def test_a_pruned_selector_marks_what_was_never_measured() -> None:
    selector = PrunedExampleSelector(examples(), [examples()[2]])
    assert len(selector.select_examples({})) == 4
    selector.add_example({"input": "new", "output": "pos"})
    assert selector.unmeasured == [{"input": "new", "output": "pos"}]
    assert len(asyncio.run(selector.aselect_examples({}))) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": [("only", "one", "three")]}, "each is a pair"),
        ({"queries": {"tune": queries(3)}}, r"unknown splits \['tune'\]"),
        ({"labels": LABELS, "metric": "exact_match"}, "give one of them"),
        ({"proxy": 3}, "proxy: got a int"),
        ({"pool": examples()}, "lists its examples itself"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_asked(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = planted()
    with pytest.raises((InputError, DataError), match=message):
        prune(chat_prompt() | model, tmp_path, **options)
    assert model.calls == []


def test_named_splits_are_used(tmp_path: Path) -> None:
    named = {"explain": queries(10), "select": queries(30, 10), "sealed": queries(60, 40)}
    result = prune(chat_prompt() | planted(), tmp_path, queries=named, sizes=None)
    assert result.result.splits["sealed"][0].inputs["input"] == '{"input": "query 40"}'


def test_the_examples_own_inputs_are_asked_where_they_have_the_fields(tmp_path: Path) -> None:
    """Relabelling and the zero-shot prior need them; without the fields the report says that they were left out."""
    usual = Settings(**{**QUICK.to_dict(), "clean_prior": "zero_shot", "relabel": "propose"})
    rows = [
        {"input": f"query {i} poison" if i == 2 else f"query {i}", "output": LABELS[i % 2]} for i in range(5)
    ]
    model = planted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune(chat_prompt(few_shot(rows)) | model, tmp_path, settings=usual, queries=queries(66, 10))
    assert any(len(call) == 2 and call[-1].content == "query 3" for call in model.calls)
    prompt = ChatPromptTemplate.from_messages([("system", "s"), few_shot(), ("human", "{question}")])
    others = [({"question": f"query {i}"}, label) for i, (_, label) in enumerate(queries(66))]
    result = prune(prompt | planted(), tmp_path, settings=usual, queries=others)
    assert any("do not have the fields of a query" in note for note in result.result.notes)
