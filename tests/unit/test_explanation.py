"""Explanations of single queries: closed forms, one batch, fidelity, refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from proxyprompt.attribution import LIME, KernelSHAP
from proxyprompt.backends.base import GenerateRequest, ScoreRequest
from proxyprompt.backends.scripted import ScriptedBackend
from proxyprompt.errors import BackendError, InconclusiveError, InputError
from proxyprompt.explanation import QueryExplanation, explain_queries
from proxyprompt.metering import Meter
from proxyprompt.prompt import Demonstration, FewShotPrompt, Query
from proxyprompt.task import LabelTask, TextTask
from proxyprompt.units import QueryDocuments, QuerySentences, QueryUnits, QueryWords

PROMPT = FewShotPrompt(
    (Demonstration("d", {"input": "fine"}, "good"),), "Rate it.", "Text: {input}\nMood: {output}"
)
TASK = LabelTask(("bad", "mixed", "good"))
EFFECTS = {"awful": (0.3, 0.1, -0.4), "but": (-0.1, 0.2, -0.1), "great": (-0.2, -0.2, 0.4)}
START = np.array([0.3, 0.3, 0.4])


def last_text(request: ScoreRequest | GenerateRequest) -> str:
    return str(request.prompt).rpartition("Text: ")[2].removesuffix("\nMood:")


def probabilities(request: ScoreRequest) -> list[float]:
    """Additive in the words that are there, each occurrence counting once."""
    p = START + sum(np.array(EFFECTS[w]) for w in last_text(request).split() if w in EFFECTS)
    return [math.log(x) for x in np.clip(p, 1e-9, None)]


def meter(script: Any = probabilities, **scripts: Any) -> Meter:
    return Meter(ScriptedBackend(script, **scripts), None, role="target", run="r")


def words(*texts: str) -> list[QueryWords]:
    return [QueryWords(PROMPT, Query(f"q{i}", {"input": text}, "good")) for i, text in enumerate(texts)]


def explain(units: list[Any], by: Meter, task: Any = TASK, **more: Any) -> tuple[QueryExplanation, ...]:
    settings = {"explainer": KernelSHAP(), "budget": 64, "rng": np.random.default_rng(0)} | more
    return explain_queries(units, task, by, **settings)


def test_every_label_gets_the_additive_effect_of_every_word() -> None:
    one, two, three = explain(words("great but slow", "an awful film", "so great"), meter())
    assert [u.text for u in one.units] == ["great", "but", "slow"]
    for explanation in (one, two, three):
        for i, label in enumerate(TASK.labels or ()):
            expected = [EFFECTS.get(u.text, (0.0,) * 3)[i] for u in explanation.units]
            np.testing.assert_allclose(explanation.by_label[label].mean, expected, atol=1e-6)
    assert (one.predicted, two.predicted, three.predicted) == ("good", "bad", "good")
    np.testing.assert_allclose(two.prediction.mean, two.by_label["bad"].mean)
    # The utility is about the reference, in nats, and adds up to what the sentence changes.
    assert two.utility.mean.sum() == pytest.approx(math.log(1e-9) - math.log(0.4), rel=1e-6)


def test_one_word_and_repeated_words() -> None:
    one, twice = explain(words("great", "but so but"), meter())
    assert one.by_label["good"].values.tolist() == [[pytest.approx(0.4)]]
    assert [u.text for u in twice.units] == ["but", "so", "but"]
    np.testing.assert_allclose(twice.by_label["mixed"].mean, [0.2, 0.0, 0.2], atol=1e-9)


def test_all_queries_go_in_one_batch_and_get_what_they_would_get_alone() -> None:
    batches: list[int] = []

    class Counting(ScriptedBackend):
        def score(self, requests, **options):  # type: ignore[no-untyped-def]
            batches.append(len(requests))
            return super().score(requests, **options)

    by = Meter(Counting(probabilities), None, role="target", run="r")
    seen: list[tuple[int, int]] = []
    together = explain(
        words("great but slow", "awful"), by, progress=lambda done, total: seen.append((done, total))
    )
    assert len(batches) == 1
    assert seen[-1] == (10, 10)
    for explanation, own in zip(together, words("great but slow", "awful"), strict=True):
        (alone,) = explain([own], meter())
        np.testing.assert_array_equal(explanation.prediction.values, alone.prediction.values)


def test_fidelity_to_itself_and_to_another_model() -> None:
    def contrary(request: ScoreRequest) -> list[float]:
        return probabilities(request)[::-1]

    units = words("great but slow awful plot and a long end", "so and so a great and slow film")
    target, proxy = (
        explain(units, meter(script), budget=40, judge=30) for script in (probabilities, contrary)
    )
    for of_target, of_proxy in zip(target, proxy, strict=True):
        held_out, design = of_target.held_out, of_target.design.coalitions
        assert held_out.shape == (30, of_target.design.n_units)
        assert not {row.tobytes() for row in held_out} & {row.tobytes() for row in design}
        m = len(design)
        truth = of_target.values.predictions[m:, 0]
        guess = np.stack([a.predict(held_out)[:, 0] for a in of_proxy.by_label.values()]).argmax(axis=0)
        assert of_proxy.fidelity_to(of_target) == pytest.approx((guess == truth).mean())
        assert of_target.fidelity_to(of_target) > of_proxy.fidelity_to(of_target)


def test_fidelity_needs_equal_coalitions() -> None:
    units = words("great but slow awful plot and a film")
    (first,) = explain(units, meter(), budget=30, judge=5)
    (other,) = explain(units, meter(), budget=30, judge=5, rng=np.random.default_rng(1))
    (none,) = explain(units, meter(), budget=30)
    with pytest.raises(InputError, match="explains query 'q0' in another way"):
        first.fidelity_to(other)
    with pytest.raises(InputError, match="no coalition was held out"):
        none.fidelity_to(none)


def test_generated_text_is_explained_by_its_likeness_to_the_whole_querys_and_by_its_score() -> None:
    def answer(request: GenerateRequest) -> str:
        text = str(request.prompt)
        return "Lima" if "atlas" in text else "Cusco" if "guide" in text else "unknown"

    rag = FewShotPrompt((), "", "{input}{output}", query_template="{documents}\nQ: {input}\nA:")
    query = Query("q", {"input": "Capital?"}, "Cusco")
    units = QueryDocuments(rag, query, {"a": "the atlas", "b": "the guide", "c": "a menu"})
    by = Meter(ScriptedBackend(generate=answer), None, role="target", run="r")
    (found,) = explain([units], by, TextTask("exact_match"))
    assert found.predicted is None
    assert found.by_label == {}
    # "Lima" needs the atlas alone; "Cusco", the reference, needs the guide without the atlas.
    np.testing.assert_allclose(found.prediction.mean, [1.0, 0.0, 0.0], atol=1e-9)
    np.testing.assert_allclose(found.utility.mean, [-0.5, 0.5, 0.0], atol=1e-9)
    words_of = QueryWords(
        FewShotPrompt((), "", "Text: {input}\nMood: {output}"), Query("w", {"input": "a b atlas c d e"}, "x")
    )
    (judged,) = explain([words_of], by, TextTask("exact_match"), budget=24, judge=10)
    assert judged.fidelity_to(judged) == 1.0


def test_sentences_are_units_too() -> None:
    unit: QueryUnits = QuerySentences(PROMPT, Query("q", {"input": "It was great . The end came ."}, "good"))
    (found,) = explain([unit], meter())
    np.testing.assert_allclose(found.by_label["good"].mean, [0.4, 0.0], atol=1e-9)


def test_refusals_name_the_query() -> None:
    with pytest.raises(InputError, match="query 'q1' with 12 units: budget=10: LIME needs at least 14"):
        explain(words("ok", " ".join("abcdefghijkl")), meter(), explainer=LIME(), budget=10)
    with pytest.raises(InputError, match="query 'q0' with 2 units: n=5: only 0 coalitions"):
        explain(words("ok then"), meter(), judge=5)
    with pytest.raises(InputError, match="judge: got -1"):
        explain(words("ok then"), meter(), judge=-1)
    assert explain([], meter()) == ()


def test_a_failed_query_is_named_with_its_reason() -> None:
    def fail(request: ScoreRequest) -> list[float]:
        if last_text(request) == "great film":
            raise BackendError("content filter")
        return probabilities(request)

    with pytest.raises(
        InconclusiveError, match=r"1 of 2 queries lack too many values: 'q1'; .*content filter"
    ):
        explain(words("awful film", "great film"), meter(fail))
