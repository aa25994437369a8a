"""Verify mode through the whole path: a scripted target that is helped and hurt by known demonstrations."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from proxyprompt.artifact import Artifact
from proxyprompt.backends.base import ScoreRequest
from proxyprompt.backends.scripted import ScriptedBackend
from proxyprompt.config import load_config
from proxyprompt.data import Splits
from proxyprompt.errors import ConfigError, InputError
from proxyprompt.estimate import estimate_run
from proxyprompt.pipeline import Result, optimize_prompt
from proxyprompt.prompt import Demonstration, FewShotPrompt, Query
from proxyprompt.report import print_terminal, render_html, render_markdown
from proxyprompt.settings import Settings
from proxyprompt.summary import build_artifact
from proxyprompt.task import LabelTask

LABELS = ("left", "right")
N = 16
EFFECTS = np.array([0.5, 0.4, -1.2, 0.3, 0.45, 0.35, 0.5, 0.3, 0.4, -0.9, 0.35, 0.5, 0.3, 0.4, 0.45, 0.35])
HARMFUL = {"d2", "d9"}
VERIFY: dict[str, Any] = {"verify": "harmful", "screening_method": "off", "proxy_coalitions": 64}


def prompt() -> FewShotPrompt:
    return FewShotPrompt(
        tuple(Demonstration(f"d{i}", {"input": f"demo {i};"}, LABELS[i % 2]) for i in range(N)),
        "Pick.",
        "Q {input}\nA: {output}",
    )


def splits(explain: int = 40, select: int = 50, sealed: int = 80) -> Splits:
    sizes = {"explain": explain, "select": select, "sealed": sealed}
    return Splits(
        {
            s: [Query(f"{s}{i}", {"input": f"{s} {i}"}, LABELS[i % 2]) for i in range(n)]
            for s, n in sizes.items()
        }
    )


class Model:
    """Log-odds of the truth add up over the demonstrations, in a scale of the model's own."""

    def __init__(self, name: str, effects: np.ndarray = EFFECTS, scale: float = 0.4) -> None:
        self.name, self.effects, self.scale, self.asked = name, effects, scale, 0
        self.backend = ScriptedBackend(score=self.score, name=name, block_size=50)

    def score(self, request: ScoreRequest) -> list[float]:
        self.asked += 1
        head, query = str(request.prompt).rsplit("\n\n", 1)
        margin = 0.8 + self.scale * sum(e for i, e in enumerate(self.effects) if f"demo {i};" in head)
        margin += float(np.random.default_rng(sum(map(ord, query + self.name))).normal(0, 0.3))
        truth = int(query.split()[2].split("\n")[0].rstrip(";")) % 2
        odds = margin if truth == 0 else -margin
        return [-math.log1p(math.exp(-odds)), -math.log1p(math.exp(odds))]


def run(folder: Path, proxies: list[Model], target: Model | None = None, **settings: Any) -> Result:
    return optimize_prompt(
        prompt(),
        LabelTask(LABELS),
        splits(),
        target=(target or Model("target")).backend,
        proxies=[p.backend for p in proxies],
        settings=Settings(**{**VERIFY, **settings}),
        ledger=folder / "ledger.db",
    )


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(tmp_path_factory.mktemp("v"), [Model("proxy", scale=0.2)])


def spent(result: Result, stage: str, role: str = "target") -> int:
    return sum(r["calls"] for r in result.spent if r["stage"] == stage and r["role"] == role)


def test_the_target_measures_in_the_proxys_order_and_later_stages_use_what_it_measured(
    verified: Result,
) -> None:
    found = verified.explanation.verification
    assert found is not None
    ids = [d.id for d in verified.original.demonstrations]
    assert {ids[i] for i in found.named} == HARMFUL
    assert {ids[i] for i in found.order[:2]} == HARMFUL
    assert found.outcome == "settled"
    assert len(found.order) < N
    assert verified.explanation.role == "proxy"
    assert verified.explanation.model == "proxy"
    assert "measured" in verified.explanation.why
    assert "No proxy was screened" in verified.explanation.why
    # 30 queries: a coalition each, and one more call for each unit that was measured; nothing else, and no screen.
    assert spent(verified, "screen") == 0
    assert spent(verified, "verify") <= found.target_calls == 30 * (1 + len(found.order))
    assert spent(verified, "verify") >= found.target_calls - 30  # coalitions may coincide
    assert spent(verified, "attribute") == 40  # the full prompt
    attribution, proposal = verified.explanation.attribution, verified.explanation.proposal
    assert proposal is not None
    known = verified.explanation.measured
    assert np.array_equal(attribution.mean[known], found.measured[known])
    # The proxy's scale is half the target's; what is expected of the others is in the target's.
    assert np.abs(attribution.mean / proposal.attribution.mean)[~known].mean() > 1.3
    assert {ids[c.unit] for c in verified.cleaning.confirmations if c.confirmed} == HARMFUL
    assert not HARMFUL & {d.id for d in verified.prompt.demonstrations}
    assert "effects are the target's where it measured them" in verified.shrinking.surrogate.why
    assert verified.certificate.decision == "certified"


def test_artifact_and_reports_keep_measured_and_estimated_apart(verified: Result, tmp_path: Path) -> None:
    artifact = build_artifact(verified, created="2026-01-01T00:00:00+00:00")
    artifact.save(tmp_path / "artifact.json")
    body = Artifact.load(tmp_path / "artifact.json").body
    found = body["verification"]
    measured = [v is not None for v in found["measured"]]
    assert measured == [v is None for v in found["expected"]]
    assert all(v is not None for v in found["estimated"])
    assert body["attribution"]["source"] == ["measured" if m else "estimated" for m in measured]
    assert [d["source"] for d in body["summary"]["demonstrations"]] == body["attribution"]["source"]
    assert (found["proposed_by"], found["measured_by"]) == ("proxy", "target")
    assert found["estimand"].startswith("weighted Banzhaf")
    assert body["summary"]["cost"]["crr"]["terms"][2]["calls"] == spent(verified, "verify") + 40
    page, text = render_html(body["summary"]), render_markdown(body["summary"])
    for shown in (page, text):
        assert "What the proxy proposed and the target measured" in shown
        assert f"{sum(measured)} of {N} demonstrations" in shown
        assert "not measured" in shown
    # Filled and hollow: each unit in both drawings and in the table; the legend has two filled marks and a hollow one.
    assert page.count('class="mark-measured') == 3 * sum(measured) + 2
    assert page.count('class="mark-estimated') == 3 * (N - sum(measured)) + 1
    print_terminal(body["summary"], console := Console(record=True, width=160, file=io.StringIO()))
    assert "not measured" in console.export_text()


@pytest.mark.parametrize("kind", ["useless", "inverted"])
def test_a_bad_proxy_costs_calls_and_never_the_answer(tmp_path: Path, kind: str) -> None:
    effects = -EFFECTS if kind == "inverted" else np.random.default_rng(4).normal(0.2, 0.4, N)
    target = Model("target")
    found = run(
        tmp_path, [Model("proxy", effects)], target, clean=False, max_evaluations=2
    ).explanation.verification
    assert found is not None
    ids = {f"d{i}" for i in found.named}
    assert ids == HARMFUL
    if kind == "useless":
        assert found.outcome == "measured_all"


def test_a_limit_on_its_calls_is_kept_and_the_rest_is_called_undecided(tmp_path: Path) -> None:
    result = run(tmp_path, [Model("proxy")], verify_calls=95, clean=False, max_evaluations=2)
    found = result.explanation.verification
    assert found is not None
    assert (found.outcome, len(found.order)) == ("limit", 2)
    assert spent(result, "verify") <= 90
    assert "undecided" in result.explanation.why
    none = run(tmp_path, [Model("proxy")], verify_calls=30, clean=False, max_evaluations=2)
    assert none.explanation.verification is not None
    assert none.explanation.verification.order == ()
    assert spent(none, "verify") == 0
    assert none.explanation.attribution is none.explanation.proposal.attribution  # type: ignore[union-attr]
    render_html(build_artifact(none).summary)


def test_an_accepted_proxy_is_trusted_to_stop_earlier_and_two_propose_together(tmp_path: Path) -> None:
    accepted = run(
        tmp_path,
        [Model("proxy")],
        screening_method="betting",
        screening_delta=0.3,
        screening_tau=0.5,
        max_pairs=40,
    )
    assert accepted.screening is not None
    assert accepted.screening.accepted
    assert accepted.explanation.verification is not None
    assert accepted.explanation.why.startswith("The screen accepted proxy")
    both = run(tmp_path / "two", [Model("one"), Model("two", scale=0.3)], clean=False, max_evaluations=2)
    assert set(both.explanation.members) == {"one", "two"}
    assert both.explanation.model == "one + two"


def test_the_second_run_buys_nothing_and_per_token_paths_find_their_counts(tmp_path: Path) -> None:
    first = run(tmp_path, [Model("proxy")], clean=False, max_evaluations=2, per="token")
    assert first.shrinking.unit_tokens is not None
    assert (
        np.ptp(first.shrinking.unit_tokens) < 2.5
    )  # "demo 3; left" or "demo 12; right": five or six words and signs
    target = Model("target")
    again = run(tmp_path, [Model("proxy")], target, clean=False, max_evaluations=2, per="token")
    assert target.asked == 0
    assert build_artifact(again).body["verification"] == build_artifact(first).body["verification"]


def test_settings_that_contradict_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="may not explain"):
        Settings(screening_method="off")
    with pytest.raises(InputError, match="attribution_calls with verify"):
        Settings(verify="harmful", attribution_calls=5)
    with pytest.raises(InputError, match="verify: got 'bad'"):
        Settings(verify="bad")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="verify_level"):
        Settings(verify="all", verify_level=0.0)
    target = Model("target")
    with pytest.raises(InputError, match="no proxy model is named"):
        run(tmp_path, [], target)
    with pytest.raises(InputError, match="no proxy model is named"):
        estimate_run(
            prompt(), LabelTask(LABELS), splits(), target=target.backend, settings=Settings(verify="all")
        )
    assert target.asked == 0


def test_the_configuration_has_the_mode(tmp_path: Path) -> None:
    rows = [{"id": f"r{i}", "input": f"text {i}", "label": LABELS[i % 2]} for i in range(30)]
    for name, part in (("demos", rows[:6]), ("queries", rows[6:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    text = """
[prompt]
demonstrations = "demos.jsonl"
[queries]
file = "queries.jsonl"
[target]
model = "embedded:gemma-3-270m"
[[proxies]]
model = "embedded:smollm2-135m"
[screening]
method = "off"
[attribution]
verify = "top"
verify_top = 2
verify_level = 0.2
verify_calls = 500
"""
    (tmp_path / "c.toml").write_text(text)
    s = load_config(tmp_path / "c.toml").settings
    assert (s.screening_method, s.verify, s.verify_top, s.verify_level, s.verify_calls) == (
        "off",
        "top",
        2,
        0.2,
        500,
    )
    assert replace(s, verify="all").decisive() != s.decisive()
    (tmp_path / "c.toml").write_text(text.replace('verify = "top"\n', ""))
    with pytest.raises(ConfigError, match="may not explain"):
        load_config(tmp_path / "c.toml")


@pytest.mark.parametrize("limit", ["budget_calls", "budget_tokens"])
def test_verification_leaves_later_stages_their_part_of_a_budget(
    limit: str, verified: Result, tmp_path: Path
) -> None:
    what = limit.removeprefix("budget_")
    all_of_it, of_verify = (
        sum(r[what] for r in verified.spent if r["role"] == "target" and r["stage"] in stages)
        for stages in ({r["stage"] for r in verified.spent}, ("verify",))
    )
    assert of_verify > 0.1 * all_of_it
    # Enough for what later stages are expected to take, and for a part of what verification would.
    options = {"verify": "all", "clean": False, "max_evaluations": 20}
    calls = 40 + 50 * (3 + 0.5 * 20) + 3 * 80 + 30 * 6
    settings = {limit: int(calls if what == "calls" else calls * verified.certificate.full.tokens)}
    cut = run(tmp_path, [Model("proxy", scale=0.2)], **options, **settings)
    found = cut.explanation.verification
    assert found is not None
    assert found.outcome == "limit"
    assert 1 <= len(found.order) < N
    assert f"To stay within max_{what} = {settings[limit]}, verification takes" in cut.explanation.why
    assert sum(r[what] for r in cut.spent if r["role"] == "target") <= settings[limit]
    assert cut.certificate is not None
    again = run(tmp_path, [Model("proxy", scale=0.2)], **options, **settings)
    assert again.explanation.why == cut.explanation.why
    assert [r["bought_now"] for r in again.spent] == [0] * len(again.spent)
