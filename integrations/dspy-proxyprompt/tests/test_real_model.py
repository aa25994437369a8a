"""A real model behind a real server: the example, the README, tokens, DSPy's cache, threads."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy_proxyprompt._predictions import Codec
from dspy_proxyprompt._running import Students
from dspy_proxyprompt._sets import make_sets

from proxyprompt.backends.base import GenerateRequest
from proxyprompt.program import Call

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def topics() -> Any:
    path = HERE / "examples" / "what_it_is_about.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def lm(llama: str) -> Any:
    return dspy.LM("openai/smol", api_base=llama, api_key="none", temperature=0.0, max_tokens=6)


def test_the_example_saves_tokens_and_money_with_proof(
    topics: Any, llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pruner = topics.main(llama, "smol", tmp_path)
    printed = capsys.readouterr().out
    report = pruner.report
    assert report.certified
    assert report.n_before == 8
    assert report.n_after <= 5
    before, after = report.tokens
    assert after < 0.75 * before
    assert report.money["saved_per_thousand_calls"] > 0
    assert f"Prompt tokens of a run: {before} -> {after}. Saved in a thousand runs" in printed
    assert "certified at 95% confidence" in printed
    spent = sum(row["prompt_tokens"] for row in report.artifact.body["spent"])
    assert spent > 300 * after  # every run is metered
    assert (tmp_path / "program.json").exists()


def students(program: Any, topics: Any) -> tuple[Students, Any]:
    sets = make_sets(
        [dspy.Example(review=f"The {t} was fine.", topic=t).with_inputs("review") for t in topics.THINGS[:6]],
        [dspy.Example(review="The spa was fine.", topic="spa").with_inputs("review")],
        [],
        explain_share=0.5,
        seed=0,
    )
    made = Students(
        program,
        {},
        fixed={},
        examples=sets.by_query,
        codec=Codec({}),
        max_errors=10,
        unparsable="wrong",
        num_threads=1,
    )
    return made, sets.splits["explain"][0]


def run(made: Students, query: Any) -> Any:
    rendered = made.renderings.render(Call((), query))
    [[(_, result)]] = list(made.target().generate([GenerateRequest(rendered, 10, ())]))
    return result


def test_what_dspy_has_cached_is_asked_and_metered_all_the_same(topics: Any, lm: Any) -> None:
    program = dspy.Predict("review -> topic")
    with dspy.context(lm=lm, adapter=topics.Terse(), track_usage=True):
        made, query = students(program, topics)
        inputs = made._examples[query.id].inputs()
        first = program(**inputs).get_lm_usage()["openai/smol"]
        assert program(**inputs).get_lm_usage() in ({}, None)  # a hit costs nothing, and says nothing
        with dspy.track_usage():  # a tracker around everything would take the usage away from predictions
            result = run(made, query)
    assert result.usage.prompt_tokens == first["prompt_tokens"] > 10
    assert result.usage.completion_tokens == first["completion_tokens"]
    assert made.counts.unmetered == 0


def test_tokens_of_threads_inside_the_program_are_counted(topics: Any, lm: Any) -> None:
    class Fan(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.step = dspy.Predict("review -> topic")

        def forward(self, review: str) -> Any:
            pairs = [(self.step, {"review": f"{review} {i}"}) for i in range(3)]
            return dspy.Parallel(num_threads=2, disable_progress_bar=True, provide_traceback=True)(pairs)[0]

    with dspy.context(lm=lm, adapter=topics.Terse()):
        made, query = students(Fan(), topics)
        three = run(made, query).usage
        alone, _ = students(dspy.Predict("review -> topic"), topics)
        one = run(alone, query).usage
    assert three.prompt_tokens > 2.5 * one.prompt_tokens


def test_an_outage_of_a_real_client_is_missing(topics: Any) -> None:
    gone = dspy.LM(
        "openai/smol", api_base="http://127.0.0.1:9/v1", api_key="none", num_retries=0, max_tokens=6
    )
    with dspy.context(lm=gone):
        made, query = students(dspy.Predict("review -> topic"), topics)
        result = run(made, query)
    assert result.text is None
    assert re.search("Error", result.error)
    assert made.counts.failed == 1


def test_the_histories_of_dspy_hold_nothing_of_the_runs(topics: Any, lm: Any) -> None:
    from dspy.clients.base_lm import GLOBAL_HISTORY

    before = len(GLOBAL_HISTORY)
    with dspy.context(lm=lm, adapter=topics.Terse()):
        made, query = students(dspy.Predict("review -> topic"), topics)
        assert run(made, query).text
    assert len(GLOBAL_HISTORY) == before
    assert not lm.history
