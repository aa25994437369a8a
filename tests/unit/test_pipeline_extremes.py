"""Whole runs at the edges: prompts of every size, all alike, all poison, one label, targets that ignore or know all."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proxyprompt.backends.base import ScoreRequest
from proxyprompt.backends.scripted import ScriptedBackend
from proxyprompt.data import Splits
from proxyprompt.errors import InputError
from proxyprompt.pipeline import Result, optimize_prompt
from proxyprompt.prompt import Demonstration, FewShotPrompt, Query
from proxyprompt.report import render_html, render_markdown
from proxyprompt.settings import Settings
from proxyprompt.summary import build_artifact
from proxyprompt.task import LabelTask

LABELS = ("left", "right", "up")
Worth = Callable[[frozenset[int]], float]
"""What the demonstrations present, by number, add to the log-odds of the right answer."""


def few_shot(n: int, *, labels: tuple[str, ...] = LABELS, same: bool = False) -> FewShotPrompt:
    return FewShotPrompt(
        tuple(
            Demonstration(
                f"d{i}", {"input": f"demo {0 if same else i};"}, labels[0 if same else i % len(labels)]
            )
            for i in range(n)
        ),
        "Pick.",
        "Q {input}\nA: {output}",
    )


def splits(explain: int = 24, select: int = 40, sealed: int = 120) -> Splits:
    sizes = {"explain": explain, "select": select, "sealed": sealed}
    return Splits(
        {
            name: [Query(f"{name}{i}", {"input": f"{name} {i}"}, LABELS[i % 3]) for i in range(n)]
            for name, n in sizes.items()
        }
    )


def target(worth: Worth, *, spread: float = 1.0, sealed: Worth | None = None) -> ScriptedBackend:
    """Log-odds of the right answer: ``worth`` of the demonstrations shown, and the query's own difficulty."""

    def score(request: ScoreRequest) -> list[float]:
        head, _, query = str(request.prompt).rpartition("\n\n")
        shown = [int(part.split()[2].rstrip(";")) for part in head.split("\n\n") if part.startswith("Q demo")]
        counted = frozenset(shown) if len(set(shown)) == len(shown) else frozenset(range(len(shown)))
        kind, number = query.split()[1:3]
        if kind == "demo":
            return [math.log(1 / 3)] * 3
        seed = int.from_bytes(hashlib.sha256(f"{kind} {number}".encode()).digest()[:8], "big")
        x = np.random.default_rng(seed).normal(0, spread, 3)
        x[int(number) % 3] += (sealed if sealed is not None and kind == "sealed" else worth)(counted)
        return [float(v) for v in x - math.log(np.exp(x).sum())]

    return ScriptedBackend(score=score, name="planted", block_size=4000)


def run(folder: Path, prompt: FewShotPrompt, backend: ScriptedBackend, **settings: Any) -> Result:
    result = optimize_prompt(
        prompt, LabelTask(LABELS), splits(), target=backend, settings=Settings(**settings),
        ledger=folder / "ledger.db",
    )  # fmt: skip
    # Whatever comes out can be stored and shown, and is what the certificate speaks of.
    summary = build_artifact(result, report_text="all").summary
    assert summary["verdict"]["headline"] in render_html(summary)
    assert summary["verdict"]["headline"] in render_markdown(summary)
    assert [d.id for d in result.prompt.demonstrations] == [
        prompt.demonstrations[i].id for i in result.certificate.order
    ]
    return result


def removed(result: Result) -> set[int]:
    return {int(i) for i in np.flatnonzero(~result.kept)}


@pytest.mark.parametrize("n", [1, 2, 8, 64, 200])
def test_prompts_of_every_size(tmp_path: Path, n: int) -> None:
    """One demonstration gives nearly everything, a second does harm, the others nothing."""

    def worth(shown: frozenset[int]) -> float:
        return -0.5 + 3.0 * (0 in shown) - 1.5 * (1 in shown)

    result = run(
        tmp_path, few_shot(n), target(worth), keep_labels=False, fit_coalitions=None if n < 64 else n + 40
    )
    assert 0 not in removed(result)
    assert result.certificate.decision == "certified"
    if n >= 2:
        assert set(result.cleaning.removed) == {1}
        assert 1 in removed(result)
    assert result.prompt.n_units <= max(1, n // 4)


def test_of_identical_demonstrations_few_are_kept_and_none_is_blamed(tmp_path: Path) -> None:
    """The first copy is worth all; which one stays does not matter."""
    result = run(tmp_path, few_shot(8, same=True), target(lambda shown: -0.5 + 3.0 * bool(shown)))
    assert result.prompt.n_units == 1
    assert result.certificate.decision == "certified"
    assert result.cleaning.removed == ()


@pytest.mark.parametrize("n", [2, 8, 16])
def test_of_poison_alone_nothing_is_left(tmp_path: Path, n: int) -> None:
    """Everything does harm; the certified prompt has none of it, and does better than the full one."""
    result = run(tmp_path, few_shot(n), target(lambda shown: 2.0 - 6.0 / n * len(shown)), keep_labels=False)
    assert result.prompt.n_units == 0
    assert result.certificate.decision == "certified"
    assert len(result.cleaning.removed) >= 1
    assert result.certificate.shipped is not None
    assert result.certificate.shipped.performance > result.certificate.full.performance + 0.3


def test_poison_of_which_some_must_stay(tmp_path: Path) -> None:
    result = run(
        tmp_path, few_shot(8), target(lambda shown: 2.0 - 0.75 * len(shown)), keep=("d3",), keep_labels=False
    )
    assert [d.id for d in result.prompt.demonstrations] == ["d3"]


def test_one_label_only(tmp_path: Path) -> None:
    """All demonstrations have the same label: one of them stays, unless it is said that none need."""
    prompt = few_shot(6, labels=("up",))
    idle = target(lambda shown: 1.5)
    kept = run(tmp_path / "a", prompt, idle)
    assert kept.prompt.n_units == 1
    assert kept.shrinking.labels == ("up",)
    said = " ".join(build_artifact(kept).summary["curve"]["choice"])
    assert "No label loses its last demonstration" in said
    assert "keep_labels = false" in said
    assert run(tmp_path / "b", prompt, idle, keep_labels=False).prompt.n_units == 0


@pytest.mark.parametrize("n", [1, 8, 64])
def test_a_target_that_ignores_demonstrations_is_certified_without_any(tmp_path: Path, n: int) -> None:
    result = run(tmp_path, few_shot(n), target(lambda shown: 1.0), keep_labels=False)
    assert result.prompt.n_units == 0
    assert result.certificate.decision == "certified"
    assert result.certificate.shipped is not None
    assert result.certificate.shipped.n_discordant == 0
    assert result.cleaning.flagged == ()
    assert {d["verdict"] for d in build_artifact(result).summary["demonstrations"]} == {"redundant"}


def test_a_target_that_is_always_right(tmp_path: Path) -> None:
    """Accuracy 1.0 whatever is shown, although log-probabilities differ: nothing harmful, nothing needed."""
    result = run(
        tmp_path,
        few_shot(8),
        target(lambda shown: 30.0 + 0.3 * len(shown), spread=0.5),
        keep_labels=False,
    )
    assert result.certificate.full.performance == 1.0
    assert result.prompt.n_units == 0
    assert result.certificate.decision == "certified"
    assert result.cleaning.removed == ()


def test_a_target_that_is_always_right_with_demonstrations_and_seldom_without(tmp_path: Path) -> None:
    result = run(tmp_path, few_shot(8), target(lambda shown: 30.0 if shown else -2.0), keep_labels=False)
    assert result.certificate.full.performance == 1.0
    assert result.prompt.n_units == 1


def test_ties_leave_from_the_end(tmp_path: Path) -> None:
    """Interchangeable demonstrations, three of which are needed: the first three are chosen, run after run."""

    def worth(shown: frozenset[int]) -> float:
        return -6.0 + 3.0 * min(len(shown), 3)

    first, second = (
        run(
            tmp_path / name, few_shot(8), target(worth), explainer="leave_one_out", keep_labels=False, tau=1.0
        )
        for name in "ab"
    )
    assert np.ptp(first.explanation.attribution.mean) < 1e-9
    for result in (first, second):
        assert np.flatnonzero(result.compression.chosen.kept).tolist() == [0, 1, 2]
    # Equal on every sealed query, and still no proof that nothing at all is lost: the original is the answer.
    summary = build_artifact(first).summary
    assert first.certificate.tests[0].n_discordant == 0
    assert summary["verdict"]["headline"] == "Not certified: keep all 8 demonstrations"
    assert first.prompt == first.original


def test_what_only_the_selection_split_believes_is_not_shipped(tmp_path: Path) -> None:
    """On the sealed queries d1 is needed as well: the largest cut that holds there is the answer, and that is said."""
    result = run(
        tmp_path,
        few_shot(8),
        target(
            lambda shown: -1.0 + 4.0 * (0 in shown),
            sealed=lambda shown: -5.0 + 4.0 * (0 in shown) + 4.0 * (1 in shown),
        ),
        keep_labels=False,
    )
    assert result.compression.chosen.n_kept == 1
    assert result.certificate.decision == "certified"
    assert 2 <= result.prompt.n_units < 8
    assert {"d0", "d1"} <= {d.id for d in result.prompt.demonstrations}
    said = build_artifact(result).summary["verdict"]["sentences"]
    assert (
        "The selection split proposed as few as 1, but the sealed queries do not prove that the prompt with 1 holds:"
        f" {result.prompt.n_units} is the smallest number that is certified."
    ) in said


def test_a_target_that_is_never_right_certifies_nothing_it_should_not(tmp_path: Path) -> None:
    """Nothing to keep and nothing to lose: at tau any share of nothing holds, and no number is undefined."""
    result = run(tmp_path, few_shot(6), target(lambda shown: -30.0, spread=0.1))
    assert result.certificate.full.performance == 0.0
    assert np.isfinite(result.compression.line)


def test_a_prompt_without_demonstrations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to attribute"):
        run(tmp_path, few_shot(0), target(lambda shown: 1.0))
