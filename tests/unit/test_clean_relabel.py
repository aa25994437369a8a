"""What the target answers to the demonstrations' own inputs: doubts, proposals, and when there are none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from proxyprompt.errors import InputError
from proxyprompt.optimize.relabel import (
    Relabeling,
    contradiction,
    own_queries,
    propose_relabels,
    zero_shot_doubts,
)
from proxyprompt.prompt import Demonstration, FewShotPrompt, Query
from proxyprompt.task import LabelTask, TextTask
from proxyprompt.value_function import Values

LABELS = ("a", "b", "c")
TASK = LabelTask(LABELS)


def prompt(n: int, wrong: Sequence[int] = ()) -> FewShotPrompt:
    """Demonstration ``i`` is truly of label ``i % 3``; the wrong ones have the next label."""
    return FewShotPrompt(
        tuple(Demonstration(f"d{i}", {"input": str(i)}, LABELS[(i + (i in wrong)) % 3]) for i in range(n))
    )


def queries(n: int) -> list[Query]:
    return [Query(f"q{i}", {"input": str(i)}, LABELS[i % 3]) for i in range(n)]


def proposals(*given: object, level: float = 0.2) -> Relabeling:
    return propose_relabels(*given, rng=np.random.default_rng(0), level=level)  # type: ignore[arg-type]


class Target:
    """Knows the truth, except for inputs in ``errs``; how sure it is varies with the input."""

    def __init__(
        self,
        errs: Sequence[str] = (),
        *,
        missing: Sequence[str] = (),
        label_only: bool = False,
        copies: bool = False,
    ) -> None:
        self.errs, self.missing, self.label_only, self.copies = set(errs), set(missing), label_only, copies
        self.rows: list[tuple[tuple[str, ...], NDArray[np.bool_]]] = []

    def __call__(self, asked: Sequence[Query], rows: NDArray[np.bool_]) -> Values:
        assert len(rows) == 1
        self.rows.append((tuple(q.id for q in asked), rows[0]))
        p = np.full((1, len(asked), 3), 0.0)
        for j, q in enumerate(asked):
            k = int(q.inputs["input"])
            sure = 0.9 + 0.05 * np.random.default_rng([k, q.id.startswith("own")]).random()
            answer = (k + (q.id in self.errs)) % 3
            if self.copies and q.id.startswith("own:") and rows[0, k]:
                answer = LABELS.index(q.reference)  # a model that repeats a label it has just read
            p[0, j] = (1 - sure) / 2
            p[0, j, answer] = sure
            if self.label_only:
                p[0, j] = np.eye(3)[answer]
            if q.id in self.missing:
                p[0, j] = np.nan
        best = np.where(np.isnan(p).any(axis=2), -1, p.argmax(axis=2))
        reference = np.array([LABELS.index(q.reference) for q in asked])
        right = np.where(best < 0, np.nan, (best == reference).astype(float))
        lost = tuple((0, j, "timeout") for j, q in enumerate(asked) if q.id in self.missing)
        return Values(
            rows, right, right, best, p, np.zeros(best.shape, dtype=np.int64), "log-probability", lost
        )


def test_zero_shot_doubts_are_contradicted_labels_and_cost_one_empty_prompt_each() -> None:
    target = Target(missing=["own:d7"])
    own = own_queries(prompt(9, [2, 7]), TASK)
    assert own is not None
    assert zero_shot_doubts(own, target) == (2,)  # a missing answer doubts nothing
    assert [row.any() for _, row in target.rows] == [False]


def test_wrong_labels_are_proposed_with_the_target_s_answer() -> None:
    shown = prompt(16, [3, 8])
    found = proposals(shown, TASK, queries(100), np.ones(16, dtype=bool), Target())
    assert [(p.unit, p.label, p.answer) for p in found.proposals] == [(3, "b", "a"), (8, "a", "c")]
    assert all(p.probability > 0.9 and p.p_value == pytest.approx(1 / 101) for p in found.proposals)
    assert (found.contradicted, found.n_queries, found.agreement) == (2, 100, 1.0)


def test_no_demonstration_is_asked_while_the_prompt_shows_its_label() -> None:
    kept = np.ones(20, dtype=bool)
    kept[[4, 5]] = False
    target = Target(copies=True)
    found = proposals(prompt(20, [3, 4]), TASK, queries(120), kept, target)
    assert [p.unit for p in found.proposals] == [3, 4]
    asked = [i for ids, _ in target.rows for i in ids if i.startswith("own:")]
    assert sorted(asked) == sorted(f"own:d{i}" for i in range(20))
    for ids, row in target.rows:
        assert not row[[4, 5]].any()
        assert not any(row[int(i[5:])] for i in ids if i.startswith("own:"))
        shown = {LABELS[(int(i[5:]) + (int(i[5:]) in (3, 4))) % 3] for i in ids if i.startswith("own:")}
        assert {LABELS[int(i[1:]) % 3] for i in ids if i.startswith("q")} <= shown
        assert row.sum() >= 14  # no more than a group is left out


def test_a_target_that_errs_as_strongly_on_queries_proposes_nothing() -> None:
    poor = Target(errs=[f"q{i}" for i in range(0, 100, 4)])
    found = proposals(prompt(16, [3, 8]), TASK, queries(100), np.ones(16, dtype=bool), poor)
    assert found.proposals == ()
    assert found.contradicted == 2
    assert found.agreement == 0.75


def test_a_lone_proposal_needs_n_over_level_queries() -> None:
    shown, whole = prompt(16, [3]), np.ones(16, dtype=bool)
    assert len(proposals(shown, TASK, queries(79), whole, Target()).proposals) == 1
    assert proposals(shown, TASK, queries(78), whole, Target()).proposals == ()


def test_a_model_without_probabilities_proposes_only_where_it_is_nearly_always_right() -> None:
    shown, whole = prompt(16, [3, 8]), np.ones(16, dtype=bool)
    right = Target(label_only=True)
    assert len(proposals(shown, TASK, queries(100), whole, right).proposals) == 2
    erring = Target(errs=["q1", "q2", "q3"], label_only=True)
    assert proposals(shown, TASK, queries(100), whole, erring).proposals == ()


@pytest.mark.parametrize("n", [1, 2, 8, 64, 200])
def test_prompts_of_every_size(n: int) -> None:
    wrong = [n // 2]
    found = proposals(prompt(n, wrong), TASK, queries(5 * n + 5), np.ones(n, dtype=bool), Target())
    assert [p.unit for p in found.proposals] == wrong


def test_prompts_that_are_all_of_a_kind() -> None:
    whole = np.ones(8, dtype=bool)
    every = proposals(prompt(8, range(8)), TASK, queries(60), whole, Target())
    assert len(every.proposals) == 8
    none = proposals(prompt(8, range(8)), TASK, queries(60), ~whole, Target())
    assert len(none.proposals) == 8
    one = FewShotPrompt(tuple(Demonstration(f"d{i}", {"input": str(3 * i)}, "a") for i in range(8)))
    assert proposals(one, TASK, queries(60), whole, Target()).contradicted == 0
    unanswered = Target(missing=[f"own:d{i}" for i in range(8)])
    assert proposals(prompt(8, [1]), TASK, queries(60), whole, unanswered).proposals == ()


def test_what_cannot_be_asked_is_not_asked() -> None:
    assert own_queries(prompt(3), TextTask()) is None
    other = FewShotPrompt(
        prompt(3).demonstrations, demonstration_template="{input} {output}", query_template="{question}"
    )
    assert own_queries(other, TASK) is None
    with pytest.raises(InputError, match="cannot be asked"):
        proposals(other, TASK, queries(9), np.ones(3, dtype=bool), Target())
    with pytest.raises(InputError, match="level"):
        proposals(prompt(3), TASK, queries(9), np.ones(3, dtype=bool), Target(), level=0.0)


def test_contradiction_is_a_log_odds() -> None:
    p = np.array([[0.7, 0.2, 0.1], [0.2, 0.6, 0.2], [np.nan] * 3, [1.0, 0.0, 0.0]])
    got = contradiction(p, np.array([0, 0, 0, 1]))
    assert got[:2] == pytest.approx(np.log([0.2 / 0.7, 0.6 / 0.2]))
    assert np.isnan(got[2])
    assert got[3] > 25
