"""A small real model, explained word by word: the word that was planted is the word that is found."""

from __future__ import annotations

import numpy as np

from proxyprompt import (
    Demonstration,
    FewShotPrompt,
    KernelSHAP,
    LabelTask,
    LeaveOneOut,
    Query,
    QueryWords,
    explain_queries,
    open_model,
    verify_queries,
)
from proxyprompt.metering import Meter

SHOWN = [
    ("a warm and funny story told with real charm", "positive"),
    ("dull from the first scene to the last", "negative"),
    ("the acting is superb and the music a delight", "positive"),
    ("a lazy , tired script that goes nowhere", "negative"),
]
PLANTED = {"boring": "negative", "wonderful": "positive", "beautiful": "positive"}


def prompt() -> FewShotPrompt:
    return FewShotPrompt(
        tuple(Demonstration(f"d{i}", {"input": text}, label) for i, (text, label) in enumerate(SHOWN)),
        "Is the sentence from a film review positive or negative? The sentence may be empty.",
        "Sentence: {input}\nSentiment: {output}",
    )


def planted() -> list[QueryWords]:
    return [
        QueryWords(prompt(), Query(w, {"input": f"we saw a {w} film on tuesday evening"}, label))
        for w, label in PLANTED.items()
    ]


def meter(model: str, role: str) -> Meter:
    return Meter(open_model(model, options={"threads": 1}), None, role=role, run="test")  # type: ignore[arg-type]


def test_planted_words_get_the_largest_attribution() -> None:
    found = explain_queries(
        planted(),
        LabelTask(("negative", "positive")),
        meter("embedded:smollm2-135m", "proxy"),
        explainer=KernelSHAP(),
        budget=32,
        rng=np.random.default_rng(0),
    )
    for explanation in found:
        credit = explanation.by_label["positive"].mean
        words = [unit.text for unit in explanation.units]
        word = explanation.query.id
        assert words[int(np.abs(credit).argmax())] == word
        assert (credit[words.index(word)] > 0) == (PLANTED[word] == "positive")
        np.testing.assert_allclose(credit, -explanation.by_label["negative"].mean, atol=1e-9)


def test_a_real_target_measures_the_words_that_a_real_proxy_proposes() -> None:
    """What is measured is the target's own leave-one-out effect, and what is estimated stays the proxy's."""
    task, queries, target = (
        LabelTask(("negative", "positive")),
        planted()[:1],
        meter("embedded:gemma-3-270m", "target"),
    )
    explainer, rng = LeaveOneOut(), np.random.default_rng(0)
    proxy = meter("embedded:smollm2-135m", "proxy")
    found = verify_queries(
        queries, task, target, [proxy], explainer=explainer, budget=10, rng=rng, on_disagreement="follow"
    )
    (own,) = explain_queries(queries, task, target, explainer=explainer, budget=10, rng=rng)
    (q,) = found.queries
    assert found.floor < 1e-6  # a model on this machine repeats itself
    assert (found.target_calls, found.oracle_calls) == (4, 9)  # the whole query twice, and two without a word
    two = np.isfinite(q.result.measured)
    assert np.flatnonzero(two).tolist() == sorted(np.argsort(-np.abs(q.result.estimated))[:2].tolist())
    np.testing.assert_allclose(q.result.measured[two], own.prediction.mean[two], atol=1e-3)
    assert q.predicted == own.predicted
    assert q.result.best == int(np.where(two, np.abs(own.prediction.mean), -1).argmax())
