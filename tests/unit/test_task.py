"""Tasks check labels and score texts."""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyprompt.errors import DataError, InputError
from proxyprompt.prompt import Demonstration, Query
from proxyprompt.task import LabelTask, TextTask, exact_match, similarity_to_full, token_f1

GOOD = Query("q", {"input": "x"}, "a")


def test_labels_are_checked_on_demonstrations_and_queries() -> None:
    task = LabelTask(("a", "b"))
    task.validate((Demonstration("d", {}, "b"),), (GOOD,))
    with pytest.raises(DataError, match=r"query 'q2': the label 'c' is not allowed; allowed: 'a', 'b'"):
        task.validate((), (Query("q2", {}, "c"),))
    with pytest.raises(DataError, match="demonstration 'd'"):
        task.validate((Demonstration("d", {}, "B"),), ())


@pytest.mark.parametrize(
    ("labels", "message"), [(("a",), "at least two"), (("a", "a"), "twice"), (("a", " "), "empty")]
)
def test_bad_label_sets(labels: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LabelTask(labels)


def test_choices_per_query() -> None:
    task = LabelTask(None)
    assert task.answers(Query("q", {}, "x", ("x", "y", "z"))) == ("x", "y", "z")
    with pytest.raises(DataError, match="no choices"):
        task.answers(GOOD)


# Worked out by hand from SQuAD's rules: lower case, then no punctuation, then no articles, then white space.
@pytest.mark.parametrize(
    ("output", "references", "match", "f1"),
    [
        ("The  Cat!", ["a cat"], 1, 1),
        ("red big dog", ["the big dog"], 0, 4 / 5),
        ("dog", ["big dog"], 0, 2 / 3),
        ("a dog and a dog", ["dog dog dog"], 0, 2 * (2 / 3) * (2 / 3) / (4 / 3)),
        ("x y", ["z", "x y", "y"], 1, 1),
        ("x y", ["y", "q"], 0, 2 / 3),
        ("x", [], 0, 0),
        ("", ["x"], 0, 0),
        ("x", [""], 0, 0),
        ("", [""], 1, 1),
        (" \n\t", ["x"], 0, 0),
        ("theory", ["ory"], 0, 0),
        ("pizza", ["pizz"], 0, 0),
        ("an-other", ["another"], 1, 1),
        ("the.end", ["theend"], 1, 1),
        ("1,000", ["1000"], 1, 1),
        ("1.5", ["15"], 1, 1),
        ("$5.00", ["5"], 0, 0),
        ("ÉCOLE d'été", ["école dété"], 1, 1),
        ("cafe\u0301", ["caf\u00e9"], 0, 0),
        ("\u00abbonjour\u00bb", ["bonjour"], 0, 0),
        ("東京", ["東京"], 1, 1),
        ("東京\u3000都", ["東京 都"], 1, 1),
        ("ab\u00a0cd", ["ab cd"], 1, 1),
        # Where we depart: what is nothing but articles and punctuation is compared as it is written.
        ("A", ["A"], 1, 1),
        ("A", ["The"], 0, 0),
        ("the", ["x"], 0, 0),
        ("+", ["-"], 0, 0),
        ("", ["a"], 0, 0),
    ],
)
def test_exact_match_and_token_f1(output: str, references: list[str], match: float, f1: float) -> None:
    assert exact_match(output, references) == match
    assert token_f1(output, references) == pytest.approx(f1, abs=1e-12)


def by_definition(output: str, references: Sequence[str]) -> tuple[float, float]:
    """SQuAD's two scores from precision and recall, with words counted by hand."""

    def words(text: str) -> list[str]:
        kept = "".join(c for c in text.lower() if c not in string.punctuation)
        return [w for w in kept.split() if w not in ("a", "an", "the")]

    def f1(ours: list[str], theirs: list[str]) -> float:
        left, common = list(theirs), 0
        for word in ours:
            if word in left:
                left.remove(word)
                common += 1
        if not common:
            return float(not ours and not theirs)
        precision, recall = common / len(ours), common / len(theirs)
        return 2 * precision * recall / (precision + recall)

    mine = words(output)
    return (
        max(float(words(r) == mine) for r in references),
        max(f1(mine, words(r)) for r in references),
    )


WORDS = st.lists(
    st.sampled_from(["the", "an", "Big", "big", "dog.", "dog", "1,0", "10", "é", "-"]), max_size=6
).map(lambda words: " ".join([*words, "end"]))


@given(output=WORDS, references=st.lists(WORDS, min_size=1, max_size=3))
def test_text_scores_follow_their_definition(output: str, references: list[str]) -> None:
    match, f1 = by_definition(output, references)
    assert exact_match(output, references) == match
    assert token_f1(output, references) == pytest.approx(f1, abs=1e-12)


def test_a_task_scores_with_its_metric() -> None:
    assert TextTask("exact_match").score(["x", "a y"], [["x"], ["z", "y"]]) == [1.0, 1.0]
    assert TextTask("token_f1").score(["x q"], [["z", "x y"]]) == [0.5]
    assert TextTask(lambda out, refs: 0.25).score(["x"], [["y"]]) == [0.25]
    assert TextTask(lambda out, refs: out in refs).score(["x"], [["y", "x"]]) == [1.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (2.0, r"returned 2\.0; scores lie in \[0, 1\]"),
        (-0.1, r"returned -0\.1"),
        (float("nan"), "returned nan"),
        (None, "returned None, which is no number"),
        ("high", "returned 'high'"),
    ],
)
def test_user_metrics_are_held_to_their_range(returned: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TextTask(lambda out, refs: returned).score(["x"], [["y"]])  # type: ignore[arg-type,return-value]


def test_bad_text_tasks() -> None:
    with pytest.raises(InputError, match="metric: got 'bleu'; allowed: exact_match, token_f1, embedding"):
        TextTask("bleu")
    with pytest.raises(InputError, match="max_tokens: got 0"):
        TextTask(max_tokens=0)
    with pytest.raises(InputError, match="stop: got the text 'END'"):
        TextTask(stop="END")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="holds an empty text"):
        TextTask(stop=("\n", ""))
    with pytest.raises(DataError, match="'q': an accepted answer is empty"):
        TextTask().validate((), (Query("q", {}, " "),))
    with pytest.raises(DataError, match="would make silence right"):
        TextTask().validate((), (GOOD, Query("q2", {}, "x", references=("y", ""))))
    TextTask().validate((), (GOOD, Query("q2", {}, "x", references=("y",))))


def test_prediction_of_a_text_is_its_similarity_to_the_output_on_the_full_prompt() -> None:
    outputs = [["big dog", "Rome", None], ["big red dog", "the Rome", "x"]]
    full = ["big red dog", "Rome", "x"]
    values = similarity_to_full(outputs, full, metric="token_f1")
    np.testing.assert_allclose(values, [[0.8, 1.0, np.nan], [1.0, 1.0, 1.0]])
    values = similarity_to_full(outputs, ["big red dog", None, "y"], metric="exact_match")
    np.testing.assert_array_equal(values, [[0.0, np.nan, np.nan], [1.0, np.nan, 0.0]])
    assert similarity_to_full([[None]], ["x"], metric="token_f1").shape == (1, 1)
    with pytest.raises(InputError, match="row 1 has 2 queries, full_outputs 3"):
        similarity_to_full([["a", "b", "c"], ["a", "b"]], full, metric="token_f1")
