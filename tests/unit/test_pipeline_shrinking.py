"""A whole run that shrinks a prompt: caps, margins, orders, what is said before it starts, and what it refuses."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proxyprompt._shrinking import plan
from proxyprompt.artifact import Artifact
from proxyprompt.backends.base import ScoreRequest
from proxyprompt.backends.scripted import ScriptedBackend
from proxyprompt.data import Splits
from proxyprompt.demo import demo_config
from proxyprompt.errors import ConfigError, DataError, InputError
from proxyprompt.pipeline import Result, optimize_prompt
from proxyprompt.prompt import Demonstration, FewShotPrompt, Query
from proxyprompt.report import render_html, render_markdown
from proxyprompt.settings import Settings
from proxyprompt.summary import build_artifact, build_summary
from proxyprompt.task import LabelTask, TextTask

LABELS = ("left", "right", "up")
WORTH = {0: 1.2, 1: 1.2, 5: 1.2}
N = 8


def prompt() -> FewShotPrompt:
    long = "and many more words " * 5
    return FewShotPrompt(
        tuple(
            Demonstration(f"d{i}", {"input": f"demo {i}; {long if i in (2, 6) else ''}"}, LABELS[i % 3])
            for i in range(N)
        ),
        "Pick.",
        "Q {input}\nA: {output}",
    )


def splits(start: int = 0) -> Splits:
    sizes = {"explain": 30, "select": 40, "sealed": 80}
    parts, at = {}, start
    for name, n in sizes.items():
        parts[name] = [Query(f"{name}{i}", {"input": f"query {i}"}, LABELS[i % 3]) for i in range(at, at + n)]
        at += n
    return Splits(parts)


def normal(text: str, scale: float) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return np.random.default_rng(seed).normal(0, scale, 3)


class Model:
    """Helped by three demonstrations, and by d0 standing last if ``late``; counts what it is asked."""

    def __init__(self, *, late: float = 0.0) -> None:
        self.late = late
        self.asked = 0
        self.backend = ScriptedBackend(score=self.score, name=f"target {late}", block_size=200)

    def score(self, request: ScoreRequest) -> list[float]:
        self.asked += 1
        head, query = str(request.prompt).rsplit("\n\n", 1)
        margin = -0.5 + sum(w for i, w in WORTH.items() if f"demo {i};" in head)
        margin += self.late * ("demo 0;" in head.rsplit("\n\n", 1)[-1])
        truth = int(query.split()[2].rstrip(";")) % 3
        x = normal(query, 1.0) + margin * (np.arange(3) == truth)
        return [float(v) for v in x - math.log(np.exp(x).sum())]


class Notes:
    """An observer that remembers what was said, and how many calls had been made by then."""

    def __init__(self, model: Model) -> None:
        self.model, self.said = model, []

    def stage(self, name: str, text: str) -> None: ...
    def progress(self, done: int, total: int) -> None: ...
    def tokens(self, n: int) -> None: ...

    def note(self, text: str) -> None:
        self.said.append((self.model.asked, text))


def run(
    folder: Path, model: Model | None = None, *, queries: Splits | None = None, **settings: Any
) -> Result:
    model = model or Model()
    watch = Notes(model)
    defaults = {"fit_coalitions": 40, "relabel": "off", "max_evaluations": 8}
    result = optimize_prompt(
        prompt(),
        LabelTask(LABELS),
        queries or splits(),
        target=model.backend,
        settings=Settings(**(defaults | settings)),
        ledger=folder / "ledger.db",
        observer=watch,
    )
    assert watch.said[0][0] == 0
    assert "80 sealed queries the smallest certifiable loss" in watch.said[0][1]
    return result


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(tmp_path_factory.mktemp("plain"))


def kept(result: Result) -> list[str]:
    return [d.id for d in result.prompt.demonstrations]


def test_the_useful_ones_stay_and_every_label_keeps_one(plain: Result) -> None:
    assert {"d0", "d1", "d5"} <= set(kept(plain))
    assert {d.output for d in plain.prompt.demonstrations} == set(LABELS)
    assert plain.certificate.decision == "certified"
    assert len(kept(plain)) < N


def test_the_reports_say_how_the_cut_was_chosen(plain: Result) -> None:
    summary = build_summary(plain)
    text = " ".join(summary["curve"]["choice"])
    assert "by a surrogate of" in text
    assert "No label loses its last demonstration" in text
    if plain.compression.calls_saved:
        assert "calls were not needed" in text
    assert summary["zero_shot"]["value"] < 0.5
    for page in (render_html(summary), render_markdown(summary)):
        assert "leaves first" in page
    body = build_artifact(plain).body["compression"]
    assert body["surrogate"]["kind"] in ("additive", "pairwise")
    assert (body["tau"], body["margin"]) == (0.9, None)


def test_a_cap_that_cannot_be_met_is_said_plainly(tmp_path: Path) -> None:
    result = run(tmp_path, max_demonstrations=1, keep_labels=False)
    said = " ".join(build_summary(result)["verdict"]["sentences"])
    assert (
        "The cap of 1 demonstrations costs more than is allowed: with 1 demonstrations the target reached"
        in said
    )
    assert "points below the line" in said
    assert f"The prompt that is proposed has {len(kept(result))}." in said
    assert len(kept(result)) >= 3
    must = run(tmp_path / "b", max_demonstrations=1, keep=("d2", "d3"))
    assert "cannot be met: the" in " ".join(build_summary(must)["verdict"]["sentences"])


def test_tokens_are_counted_from_the_answers(tmp_path: Path) -> None:
    result = run(tmp_path, per="token", max_tokens=150)
    tokens = result.shrinking.unit_tokens
    assert tokens is not None
    words = [len(f"Q {d.inputs['input']}\nA: {d.output}".split()) for d in prompt().demonstrations]
    assert tokens == pytest.approx(words)
    # The two long ones leave first.
    first = result.compression.points[1].kept if len(result.compression.points) > 1 else None
    assert first is not None
    assert not first[2] or not first[6]

    def silent(request: ScoreRequest) -> Any:
        from proxyprompt.backends.base import ScoreResult

        return ScoreResult(tuple(Model().score(request)))

    with pytest.raises(InputError, match="reports no token counts"):
        optimize_prompt(
            prompt(), LabelTask(LABELS), splits(), settings=Settings(per="token", fit_coalitions=40),
            target=ScriptedBackend(score=silent, name="silent"), ledger=tmp_path / "silent.db",
        )  # fmt: skip


def test_a_margin_takes_the_place_of_tau(tmp_path: Path) -> None:
    result = run(tmp_path, margin=0.15)
    body = build_artifact(result).body
    assert (body["certificate"]["tau"], body["certificate"]["margin"]) == (None, 0.15)
    assert "loses at most 15 points" in body["certificate"]["text"]
    line = body["summary"]["curve"]
    assert line["tau_line"] == pytest.approx(body["compression"]["reference"] - 0.15)
    assert line["line_text"].endswith("15 points")
    assert "loses at most" in render_html(body["summary"])


def test_a_better_order_is_certified_stored_and_loaded(tmp_path: Path) -> None:
    result = run(tmp_path, Model(late=1.5), orders=2)
    assert result.shrinking.orders is not None
    assert result.shrinking.orders.confirmed
    assert kept(result)[-1] == "d0"
    assert kept(result) != sorted(kept(result))
    assert result.certificate.shipped.order is not None
    artifact = build_artifact(result)
    artifact.save(tmp_path / "artifact.json")
    back = Artifact.load(tmp_path / "artifact.json")
    assert back.prompt == result.prompt
    assert list(back.kept) == kept(result)
    assert sorted([*back.kept, *back.removed]) == sorted(d.id for d in prompt().demonstrations)
    summary = back.summary
    assert "new order" in " ".join(summary["verdict"]["sentences"])
    assert "new order" in render_html(summary)
    assert "new order" in render_markdown(summary)


def test_an_order_that_does_not_matter_stays(tmp_path: Path) -> None:
    result = run(tmp_path, orders=1)
    assert result.shrinking.orders is not None
    assert not result.shrinking.orders.confirmed
    assert kept(result) == sorted(kept(result))


def test_bets_are_an_option_for_right_or_wrong_answers(tmp_path: Path) -> None:
    result = run(tmp_path, certificate_method="betting", certificate_block=20)
    assert result.certificate.method == "betting"
    assert {t.evidence_name for t in result.certificate.tests if t.tested} == {"e-value"}


def test_another_run_on_the_same_sealed_queries_says_so(tmp_path: Path) -> None:
    first = run(tmp_path)
    assert first.certificate.earlier_looks == 0
    assert run(tmp_path).certificate.earlier_looks == 0  # the same run again is not another look
    second = run(tmp_path, tau=0.85)
    assert second.certificate.earlier_looks == 1
    assert "earlier run" in second.certificate.text
    assert "up to 0.1" in " ".join(build_summary(second)["verdict"]["sentences"])


def test_queries_that_chose_in_an_earlier_run_are_refused_before_anything_is_asked(tmp_path: Path) -> None:
    run(tmp_path)
    model = Model()
    # Selected were the queries 30 to 69; sealed are now 60 to 139.
    parts = {"explain": range(200, 230), "select": range(240, 280), "sealed": range(60, 140)}
    shifted = Splits(
        {k: [Query(f"q{i}", {"input": f"query {i}"}, LABELS[i % 3]) for i in v] for k, v in parts.items()}
    )
    with pytest.raises(DataError, match=r"10 of the 80 sealed queries served to select in an earlier run"):
        run(tmp_path, model, queries=shifted)
    assert model.asked == 0


def test_the_settings_of_shrinking_are_read_and_checked(tmp_path: Path) -> None:
    given = {
        "compress": {
            "per": "token", "interactions": "off", "max_demonstrations": 4, "max_tokens": 300, "orders": 2,
            "keep_labels": False, "search_level": 0.0,
        },
        "certificate": {"method": "betting", "block": 20},
    }  # fmt: skip
    s = demo_config(tmp_path, overrides=given).settings
    assert (s.per, s.interactions, s.max_demonstrations, s.max_tokens) == ("token", "off", 4, 300)
    assert (s.orders, s.keep_labels, s.search_level) == (2, False, 0.0)
    assert (s.certificate_method, s.certificate_block) == ("betting", 20)
    with pytest.raises(ConfigError, match="tau and margin"):
        demo_config(tmp_path, overrides={"margin": 0.02})
    for wrong, name in (
        ({"margin": 1.0}, "margin"),
        ({"search_level": -0.1}, "search_level"),
        ({"per": "word"}, "per"),
        ({"interactions": "all"}, "interactions"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"orders": -1}, "orders"),
        ({"keep_labels": 1}, "keep_labels"),
        ({"certificate_block": 20}, "certificate_block"),
        ({"certificate_method": "t-test"}, "certificate_method"),
    ):
        with pytest.raises(InputError, match=name):
            Settings(**wrong)


def test_the_exact_test_is_refused_for_graded_scores_before_anything_is_asked() -> None:
    with pytest.raises(InputError, match="metric gives others"):
        plan(Settings(certificate_method="exact"), TextTask(metric="token_f1"), 60)
    assert "60 sealed queries" in plan(Settings(), TextTask(metric="token_f1"), 60)
