"""Values: arithmetic, missing kept apart, duplicates sent once."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from proxyprompt.backends.base import ScoreRequest, ScoreResult
from proxyprompt.backends.scripted import ScriptedBackend
from proxyprompt.errors import BackendError, InconclusiveError, InputError
from proxyprompt.metering import Meter
from proxyprompt.prompt import Demonstration, FewShotPrompt, Query
from proxyprompt.task import LabelTask, TextTask
from proxyprompt.units import InstructionSentences, QueryWords
from proxyprompt.value_function import PromptValueFunction, evaluate_together

PROMPT = FewShotPrompt(tuple(Demonstration(f"d{i}", {"input": f"i{i}"}, "a") for i in range(3)))
QUERIES = (Query("q0", {"input": "x"}, "a"), Query("q1", {"input": "y"}, "b"))
TASK = LabelTask(("a", "b"))


def count_kept(request: ScoreRequest) -> dict[str, float]:
    kept = str(request.prompt).count("i0") + str(request.prompt).count("i1") + str(request.prompt).count("i2")
    p = 0.2 + 0.2 * kept
    return {" a": math.log(p / 2), " b": math.log((1 - p) / 2)}


def function(backend: ScriptedBackend, queries: tuple[Query, ...] = QUERIES) -> PromptValueFunction:
    return PromptValueFunction(PROMPT, TASK, queries, Meter(backend, None, role="target", run="r"))


def test_utility_is_the_normalised_log_probability_of_the_reference() -> None:
    rows = np.array([[False] * 3, [True, False, True], [True] * 3])
    values = function(ScriptedBackend(score=count_kept)).evaluate(rows)
    p = np.array([0.2, 0.6, 0.8])
    np.testing.assert_allclose(values.utility, np.log(np.stack([p, 1 - p], axis=1)), atol=1e-12)
    np.testing.assert_allclose(values.probabilities[:, 0], np.stack([p, 1 - p], axis=1), atol=1e-12)
    assert values.performance.tolist() == [[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]
    assert values.scale == "log-probability"


def test_equal_requests_are_sent_once() -> None:
    backend = ScriptedBackend(score=count_kept)
    function(backend).evaluate(np.array([[True] * 3, [True] * 3, [False] * 3]))
    assert backend.score_calls == 4


def test_failed_calls_are_missing_with_their_reason_and_never_zero() -> None:
    def fail_on_y(request: ScoreRequest) -> dict[str, float]:
        if str(request.prompt).endswith("y\nOutput:"):
            raise BackendError("overloaded")
        return count_kept(request)

    values = function(ScriptedBackend(score=fail_on_y)).evaluate(np.ones((1, 3), dtype=bool))
    assert np.isnan(values.utility[0, 1])
    assert np.isnan(values.performance[0, 1])
    assert values.predictions[0, 1] == -1
    ((i, j, why),) = values.missing
    assert (i, j) == (0, 1)
    assert "overloaded" in why
    with pytest.raises(InconclusiveError, match=r"1 of 2 values are missing.*overloaded"):
        values.require_complete("test")


def test_label_only_models_give_right_or_wrong() -> None:
    backend = ScriptedBackend(score=lambda r: {" a": 0.0, " b": None})
    values = function(backend).evaluate(np.ones((1, 3), dtype=bool))
    assert values.scale == "accuracy"
    assert values.utility.tolist() == [[1.0, 0.0]]
    assert values.probabilities.tolist() == [[[1.0, 0.0], [1.0, 0.0]]]


def test_sampled_texts_give_shares() -> None:
    def sampled(request: ScoreRequest) -> ScoreResult:
        # For the first query a quarter of the texts was no label.
        logs = (math.log(0.25), math.log(0.5)) if "x" in str(request.prompt) else (None, 0.0)
        return ScoreResult(logs, (True, True), evidence="texts", samples=8)

    values = function(ScriptedBackend(score=sampled)).evaluate(np.ones((1, 3), dtype=bool))
    assert values.scale == "accuracy"
    np.testing.assert_allclose(values.utility, [[0.25, 1.0]])
    np.testing.assert_allclose(values.probabilities, [[[0.25, 0.5], [0.0, 1.0]]])
    assert values.performance.tolist() == [[0.0, 1.0]]


def test_queries_with_fewer_choices_have_probability_zero_beyond_their_own() -> None:
    queries = (
        Query("q0", {"input": "x"}, "p", ("p", "q", "r")),
        Query("q1", {"input": "y"}, "s", ("s", "t")),
    )
    demos = (Demonstration("d", {"input": "i"}, "p", ("p", "q")),)
    backend = ScriptedBackend(score=lambda r: [-1.0] * len(r.candidates))
    values = PromptValueFunction(
        FewShotPrompt(demos), LabelTask(None), queries, Meter(backend, None, role="target", run="r")
    ).evaluate(np.ones((1, 1), dtype=bool))
    np.testing.assert_allclose(values.probabilities[0], [[1 / 3] * 3, [0.5, 0.5, 0.0]])


def test_text_tasks_score_generated_text() -> None:
    backend = ScriptedBackend(generate=lambda r: "blue" if "i0" in str(r.prompt) else "red")
    queries = (Query("q0", {"input": "x"}, "blue"),)
    values = PromptValueFunction(
        PROMPT, TextTask("exact_match"), queries, Meter(backend, None, role="target", run="r")
    ).evaluate(np.array([[True, True, True], [False, True, True]]))
    assert values.utility.tolist() == [[1.0], [0.0]]
    assert values.outputs == (("blue",), ("red",))


def test_wrong_matrices_are_refused() -> None:
    with pytest.raises(InputError, match=r"boolean matrix \(n_coalitions, 3\)"):
        function(ScriptedBackend(score=count_kept)).evaluate(np.ones((2, 4), dtype=bool))
    with pytest.raises(InputError, match="boolean matrix"):
        function(ScriptedBackend(score=count_kept)).evaluate(np.ones((2, 3)))


def test_upper_bounds_alone_name_no_winner() -> None:
    class Censoring(ScriptedBackend):
        def score(self, requests, **options):  # type: ignore[no-untyped-def]
            yield [(i, ScoreResult((-9.0, -9.0), (True, True))) for i in range(len(requests))]

    values = function(Censoring(score=count_kept)).evaluate(np.ones((1, 3), dtype=bool))
    assert (values.predictions == -1).all()
    assert "no label among" in values.missing[0][2]


def test_instruction_sentences_are_units_of_every_query() -> None:
    prompt = FewShotPrompt(PROMPT.demonstrations, "i0 matters. So does i1! Not this.", "{input}: {output}")
    units = InstructionSentences(prompt, demonstrations=True)

    def count_i0(request: ScoreRequest) -> list[float]:
        p = 0.1 + 0.1 * str(request.prompt).count("i0")
        return [math.log(p), math.log(1 - p)]

    backend = ScriptedBackend(score=count_i0)
    function = PromptValueFunction(units, TASK, QUERIES, Meter(backend, None, role="target", run="r"))
    rows = np.array(
        [[True] * 6, [False, True, True, True, True, True], [False, True, True, False, True, True]]
    )
    np.testing.assert_allclose(
        function.evaluate(rows).probabilities[:, :, 0], [[0.3] * 2, [0.2] * 2, [0.1] * 2]
    )


def test_evaluating_together_is_evaluating_one_by_one_in_one_batch() -> None:
    asked: list[int] = []

    class Counting(ScriptedBackend):
        def score(self, requests, **options):  # type: ignore[no-untyped-def]
            asked.append(len(requests))
            return super().score(requests, **options)

    meter = Meter(Counting(score=count_kept), None, role="target", run="r")
    first = PromptValueFunction(PROMPT, TASK, QUERIES, meter)
    query = Query("w", {"input": "two words"}, "b")
    second = PromptValueFunction(QueryWords(PROMPT.keep(["d0"]), query), TASK, [query], meter)
    matrices = [np.array([[True, False, True], [False] * 3]), np.array([[True, False]])]
    values = evaluate_together([first, second], matrices)
    assert asked == [5]
    for got, function, matrix in zip(values, (first, second), matrices, strict=True):
        alone = function.evaluate(matrix)
        np.testing.assert_array_equal(got.utility, alone.utility)
        np.testing.assert_array_equal(got.coalitions, matrix)
    assert evaluate_together([], []) == []


def test_generated_texts_of_several_functions_find_their_own_queries() -> None:
    backend = ScriptedBackend(generate=lambda r: str(r.prompt).split("Input: ")[-1].split("\n")[0])
    meter = Meter(backend, None, role="target", run="r")
    task = TextTask("exact_match")
    functions = [
        PromptValueFunction(
            PROMPT,
            task,
            [Query(f"{name}{k}", {"input": f"{name}{k}"}, f"{name}{k}") for k in range(n)],
            meter,
        )
        for name, n in (("x", 2), ("y", 3))
    ]
    two, three = evaluate_together(
        functions, [np.ones((1, 3), dtype=bool), np.array([[True] * 3, [False] * 3])]
    )
    assert two.outputs == (("x0", "x1"),)
    assert three.outputs == (("y0", "y1", "y2"),) * 2
    assert (three.utility == 1).all()


def test_functions_of_two_models_are_not_one_batch() -> None:
    one, other = (function(ScriptedBackend(score=count_kept)) for _ in range(2))
    with pytest.raises(InputError, match="do not share one meter, task, stage and repeat"):
        evaluate_together([one, other], [np.ones((1, 3), dtype=bool)] * 2)
    with pytest.raises(InputError, match="1 matrices for 2 value functions"):
        evaluate_together([one, one], [np.ones((1, 3), dtype=bool)])


@pytest.mark.parametrize("units", ["words", "instruction"])
def test_a_backend_that_hides_demonstrations_refuses_other_units(units: str) -> None:
    class Masking(ScriptedBackend):
        masks_units = True

    query = Query("q", {"input": "two words"}, "a")
    prompt = (
        QueryWords(PROMPT, query)
        if units == "words"
        else InstructionSentences(replace(PROMPT, instruction="One. Two."))
    )
    backend = Masking(score=count_kept, name="approximate")
    asked = PromptValueFunction(prompt, TASK, [query], Meter(backend, None, role="proxy", run="r"))
    with pytest.raises(
        InputError,
        match=r"'approximate' hides demonstrations .*the units of .* without approximate",
    ):
        asked.evaluate(np.ones((1, 2), dtype=bool))
    assert backend.score_calls == 0
