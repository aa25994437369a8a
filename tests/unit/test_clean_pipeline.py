"""Cleaning inside a whole run: the target's money, what is proposed, and what the reports say of it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from proxyprompt.attribution import WeightedBanzhaf
from proxyprompt.backends.base import ScoreRequest
from proxyprompt.backends.scripted import ScriptedBackend
from proxyprompt.config import config_from_mapping
from proxyprompt.data import Splits
from proxyprompt.errors import ConfigError, InputError
from proxyprompt.optimize.reexplain import Reexplainer
from proxyprompt.pipeline import Result, optimize_prompt
from proxyprompt.prompt import Demonstration, FewShotPrompt, Query
from proxyprompt.report import render_html, render_markdown
from proxyprompt.settings import Settings
from proxyprompt.summary import build_artifact
from proxyprompt.task import LabelTask
from proxyprompt.value_function import Values

LABELS = ("left", "right")
N, WRONG = 8, (2, 5)


def answer(request: ScoreRequest) -> list[float]:
    """Right by itself; every demonstration with a wrong label in the prompt costs it a nat, a right one brings a tenth."""
    text = str(request.prompt)
    head, query = text.rsplit("\n\n", 1)
    number = int(query.split()[2])
    margin = 1.5 + 0.5 * math.sin(number)
    for i in range(N):
        if f"no {900 + i} " in head:
            margin += -1.0 - 0.1 * math.cos(number + i) if i in WRONG else 0.1
    x = margin * (np.arange(2) == number % 2)
    return [float(v) for v in x - math.log(np.exp(x).sum())]


def run(folder: Path, **settings: object) -> tuple[Result, list[str]]:
    prompt = FewShotPrompt(
        tuple(
            Demonstration(f"d{i}", {"input": f"no {900 + i} x"}, LABELS[(i + (i in WRONG)) % 2])
            for i in range(N)
        ),
        "Pick.",
        "Q {input}\nA: {output}",
    )
    splits = Splits(
        {
            name: [Query(f"{name}{i}", {"input": f"no {start + i} {name}"}, LABELS[i % 2]) for i in range(n)]
            for name, start, n in (("explain", 0, 30), ("select", 100, 40), ("sealed", 200, 60))
        }
    )
    asked: list[str] = []

    def score(request: ScoreRequest) -> list[float]:
        asked.append(str(request.prompt))
        return answer(request)

    result = optimize_prompt(
        prompt, LabelTask(LABELS), splits, target=ScriptedBackend(score=score, name="t"),
        ledger=folder / "ledger.db", settings=Settings(fit_coalitions=40, **settings),  # type: ignore[arg-type]
    )  # fmt: skip
    return result, asked


def own(asked: list[str]) -> list[str]:
    return [text for text in asked if text.rsplit("\n\n", 1)[1].startswith("Q no 90")]


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, list[str]]:
    return run(tmp_path_factory.mktemp("cleaned"))


def test_wrong_labels_are_removed_and_the_right_ones_proposed(cleaned: tuple[Result, list[str]]) -> None:
    result, asked = cleaned
    assert set(result.cleaning.removed) == set(WRONG)
    assert result.relabeling is not None
    assert [(p.unit, p.label, p.answer) for p in result.relabeling.proposals] == [
        (i, LABELS[(i + 1) % 2], LABELS[i % 2]) for i in WRONG
    ]
    assert len(own(asked)) == 2 * N  # once without demonstrations, once with those of the other groups


def test_what_is_off_is_not_asked(tmp_path: Path) -> None:
    result, asked = run(tmp_path / "a", relabel="off", clean_prior="off", clean_rounds=1)
    assert result.relabeling is None
    assert own(asked) == []
    assert len(result.cleaning.rounds) == 1
    result, asked = run(tmp_path / "b", clean=False)
    assert result.relabeling is None
    assert own(asked) == []
    assert result.cleaning.rounds == ()
    assert build_artifact(result).summary["cleaning"] is None


def test_no_target_calls_for_another_explanation(tmp_path: Path) -> None:
    result, _ = run(tmp_path, reexplain_calls=0)
    assert set(result.cleaning.removed) == set(WRONG)
    assert "limit" in result.cleaning.stopped


def test_reports_and_artifact_tell_of_rounds_and_proposals(cleaned: tuple[Result, list[str]]) -> None:
    result, _ = cleaned
    body = build_artifact(result, report_text="all").body
    assert [r["id"] for r in body["relabeling"]["proposals"]] == ["d2", "d5"]
    assert set(body["cleaning"]["rounds"][0]["confirmed"]) == {"d2", "d5"}
    assert body["cleaning"]["rounds"][0]["explained_without"] == []
    assert body["settings"]["clean_rounds"] == 3
    found = body["summary"]["cleaning"]
    assert [(r["id"], r["label"], r["answer"]) for r in found["relabels"]] == [
        ("d2", "right", "left"), ("d5", "left", "right")
    ]  # fmt: skip
    for page in (render_html(body["summary"]), render_markdown(body["summary"])):
        assert "Labels that the target contradicts" in page
        assert "nothing was changed" in page
    hidden = build_artifact(result, report_text="none").summary["cleaning"]["relabels"]
    assert [(r["label"], r["answer"]) for r in hidden] == [(None, None)] * 2


def test_another_explanation_keeps_to_its_calls() -> None:
    spent: list[int] = []

    def ask(queries: list[Query], rows: np.ndarray) -> Values:
        assert not rows[:, [0, 3]].any()
        spent.append(len(queries) * len(rows))
        v = rows[:, 1:2] - 0.5 * rows[:, 2:3] + 0.01 * np.arange(len(queries))
        zeros = np.zeros(v.shape, dtype=np.int64)
        return Values(rows, v, v, zeros, None, zeros, "log-probability")

    queries = [Query(f"q{i}", {"input": "x"}, "left") for i in range(20)]
    kept = np.array([False, True, True, False, True, True])
    again = Reexplainer(
        WeightedBanzhaf(), ask, queries, lambda n: 2**n, np.random.default_rng(0), calls=16 * 29
    )  # type: ignore[arg-type]
    first = again(kept)
    assert first is not None
    assert first.mean == pytest.approx([1.0, -0.5, 0.0, 0.0])
    assert again(kept) is not None  # 9 of 20 queries can still be paid
    assert again(kept) is None
    assert spent == [16 * 20, 16 * 9]
    free = Reexplainer(WeightedBanzhaf(), ask, queries, lambda n: 2**n, np.random.default_rng(0))  # type: ignore[arg-type]
    assert all(free(kept) is not None for _ in range(3))


@pytest.mark.parametrize(
    "wrong",
    [
        {"clean_rounds": 0}, {"clean_rounds": 1.5}, {"max_suspects": 0}, {"reexplain_calls": -1}, {"clean_prior": "yes"},
        {"relabel": True}, {"relabel_level": 0.0}, {"relabel_level": 1.0},
    ],
)  # fmt: skip
def test_settings_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Settings(**wrong)  # type: ignore[arg-type]


def test_settings_in_a_configuration() -> None:
    raw = {
        "prompt": {"demonstrations": [{"id": "a", "input": "x", "output": "left"}]},
        "queries": {"file": "q.jsonl"},
        "target": {"model": "embedded:gemma-3-270m"},
        "clean": {"rounds": 0},
    }
    with pytest.raises(ConfigError, match="clean_rounds"):
        config_from_mapping(raw, folder=Path())
    with pytest.raises(ConfigError, match="unknown keys"):
        config_from_mapping({**raw, "clean": {"clean_rounds": 2}}, folder=Path())
    from proxyprompt.config import _settings

    given = {"rounds": 2, "reexplain_calls": 500, "prior": "off", "relabel": "off", "relabel_level": 0.1}
    settings = _settings({"clean": given}, "config")
    assert (settings.clean_rounds, settings.reexplain_calls, settings.clean_prior) == (2, 500, "off")
    assert (settings.relabel, settings.relabel_level) == ("off", 0.1)
    assert {"clean_rounds", "relabel", "clean_prior"} <= set(settings.decisive())
