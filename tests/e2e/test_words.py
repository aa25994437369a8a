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
    found = verify_queries(
        planted(),
        LabelTask(("negative", "positive")),
        meter("embedded:gemma-3-270m", "target"),
        [meter("embedded:smollm2-135m", "proxy")],
        explainer=LeaveOneOut(),
        budget=10,
        rng=np.random.default_rng(0),
        on_disagreement="follow",
        top=2,
    )
    assert found.floor < 1e-6  # a model on this machine repeats itself
    for q in found.queries:
        assert int(np.isfinite(q.result.measured).sum()) == 2
        assert q.best is not None
        assert q.best.text == q.query.id
    # Of nine calls a query, the whole one (twice) and two without a word.
    assert found.target_calls == 3 * 4
    assert found.oracle_calls == 3 * 9
