"""The whole path on a scripted target whose reasons are known: what is decided, resumed, refused."""

from __future__ import annotations

import hashlib
import json
import math
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from proxyprompt.artifact import Artifact
from proxyprompt.attribution import WeightedBanzhaf
from proxyprompt.backends.base import ScoreRequest
from proxyprompt.backends.scripted import ScriptedBackend
from proxyprompt.data import Splits
from proxyprompt.errors import BackendError, BudgetExceededError, DataError, InputError
from proxyprompt.pipeline import Result, _price_of, optimize_prompt
from proxyprompt.prices import FREE, Price, Rates, Unpriced
from proxyprompt.prompt import Demonstration, FewShotPrompt, Query
from proxyprompt.report import render_html, render_markdown
from proxyprompt.settings import Settings
from proxyprompt.summary import build_artifact
from proxyprompt.task import LabelTask

LABELS = ("left", "right", "up")
HARMFUL = (3, 8)
USEFUL = (0, 1, 5)
N = 10


def prompt(n: int = N) -> FewShotPrompt:
    return FewShotPrompt(
        tuple(Demonstration(f"d{i}", {"input": f"demo {i};"}, LABELS[i % 3]) for i in range(n)),
        "Pick.",
        "Q {input}\nA: {output}",
    )


def splits(explain: int = 60, select: int = 60, sealed: int = 150) -> Splits:
    sizes = {"explain": explain, "select": select, "sealed": sealed}
    return Splits(
        {
            name: [Query(f"{name}{i}", {"input": f"{name} {i}"}, LABELS[i % 3]) for i in range(n)]
            for name, n in sizes.items()
        }
    )


def draws(text: str, scale: float) -> np.ndarray:
    """Three normal numbers that depend on the text alone."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return np.random.default_rng(seed).normal(0, scale, 3)


class Model:
    """A model that is helped by some demonstrations and hurt by others; queries differ, models differ a little."""

    def __init__(
        self, name: str, *, sign: float = 1.0, effect: float = 1.0, fail_after: int | None = None
    ) -> None:
        self.sign, self.effect, self.fail_after = sign, effect, fail_after
        self.asked = 0
        self.backend = ScriptedBackend(score=self.score, name=name, block_size=50)

    def score(self, request: ScoreRequest) -> list[float]:
        self.asked += 1
        if self.fail_after is not None and self.asked > self.fail_after:
            raise KeyboardInterrupt
        text = str(request.prompt)
        head, query = text.rsplit("\n\n", 1) if "\n\n" in text else ("", text)
        margin = 0.3
        for i in range(N):
            if f"demo {i};" in head:
                margin += self.sign * self.effect * (-0.9 if i in HARMFUL else 0.5 if i in USEFUL else 0.02)
        noise = draws(query, 1.0) + draws(f"{self.backend.name}{query}", 0.2)
        truth = int(query.split()[2].split("\n")[0].rstrip(";")) % 3
        x = noise + margin * (np.arange(3) == truth)
        return [float(v) for v in x - math.log(np.exp(x).sum())]


def run(
    folder: Path, target: Model, *proxies: Model, settings: Settings | None = None, **more: object
) -> Result:
    return optimize_prompt(
        prompt(),
        LabelTask(LABELS),
        more.pop("splits", splits()),  # type: ignore[arg-type]
        target=target.backend,
        proxies=[p.backend for p in proxies],
        settings=settings or Settings(fit_coalitions=64, proxy_coalitions=96),
        ledger=folder / "ledger.db",
    )


def ids(indices: tuple[int, ...]) -> set[str]:
    return {f"d{i}" for i in indices}


@pytest.fixture(scope="module")
def accepted(tmp_path_factory: pytest.TempPathFactory) -> Result:
    settings = Settings(tau=0.98, fit_coalitions=64, proxy_coalitions=96)
    return run(tmp_path_factory.mktemp("a"), Model("target"), Model("proxy"), settings=settings)


def test_an_accepted_proxy_explains_and_the_target_confirms_and_certifies(accepted: Result) -> None:
    assert accepted.screening is not None
    assert accepted.screening.accepted == ("proxy",)
    assert accepted.explanation.role == "proxy"
    assert accepted.certificate.decision == "certified"
    removed = {
        d.id for d, keep in zip(accepted.original.demonstrations, accepted.kept, strict=True) if not keep
    }
    assert ids(HARMFUL) <= removed
    assert not ids(USEFUL) & removed
    assert accepted.certificate.shipped is not None
    assert accepted.certificate.shipped.performance > accepted.certificate.full.performance


def test_with_too_few_queries_to_screen_the_target_explains_itself(tmp_path: Path) -> None:
    result = run(tmp_path, Model("target"), Model("proxy"), splits=splits(explain=9))
    assert result.screening is not None
    assert [p.decision for p in result.screening.proxies] == ["undecided"]
    assert not [row for row in result.spent if row["stage"] == "screen"]
    assert result.explanation.role == "target"
    assert "with 9 queries to explain not even a perfect one could be accepted" in result.explanation.why
    assert set(result.explanation.query_ids) == {f"explain{i}" for i in range(9)}
    summary = build_artifact(result).summary
    (shown,) = summary["screening"]["proxies"]
    assert (shown["decision"], shown["agreement"], shown["path"]) == ("not_tested", None, None)
    for text in (render_html(summary), render_markdown(summary)):
        assert "not tested" in text
        assert "too few queries" in text


class Shaky(Model):
    """A model whose answers vary from call to call, as those of remote models do."""

    def __init__(self, name: str, jitter: float, **more: float) -> None:
        super().__init__(name, **more)  # type: ignore[arg-type]
        self.backend.deterministic = False
        self.rng, self.jitter = np.random.default_rng(0), jitter

    def score(self, request: ScoreRequest) -> list[float]:
        x = np.array(super().score(request)) + self.rng.normal(0, self.jitter, 3)
        return [float(v) for v in x - math.log(np.exp(x).sum())]


def test_a_target_that_may_vary_is_asked_the_same_again_and_the_report_says_what_came_out(
    tmp_path: Path,
) -> None:
    target, proxy = Shaky("target", 0.3), Model("proxy")
    result = run(tmp_path, target, proxy)
    assert result.screening is not None
    noise = result.screening.noise
    assert noise is not None
    assert (noise.repeats, len(noise.query_ids), noise.freedom) == (2, 10, 20)
    assert 0.05 < noise.spread < 0.6
    (bought,) = (r for r in result.spent if (r["stage"], r["role"]) == ("screen", "target"))
    assert bought["calls"] == result.screening.target_pairs
    artifact = build_artifact(result)
    assert artifact.body["screening"]["noise"]["floor"] == noise.floor
    (shown,) = artifact.summary["screening"]["proxies"]
    assert 0 < shown["own_rank_correlation"] <= 1
    assert 0 < shown["ceiling"] < 1
    for text in (render_html(artifact.summary), render_markdown(artifact.summary)):
        assert "2 more times for the same 10 whole prompts" in text
        assert "Rank correlation of attributions, target with itself" in text
        assert "Agreement that the noise of the target allows" in text
    asked = target.asked
    again = run(tmp_path, target, proxy)
    assert target.asked == asked
    assert again.screening is not None
    assert again.screening.noise is not None
    assert again.screening.noise.spread == noise.spread


@pytest.mark.parametrize(
    ("deterministic", "repeats", "asked"), [(True, "auto", 0), (False, 0, 0), (True, 1, 10)]
)
def test_what_answers_the_same_each_time_is_not_asked_again(
    tmp_path: Path, deterministic: bool, repeats: int | str, asked: int
) -> None:
    target = Model("target")
    target.backend.deterministic = deterministic
    settings = Settings(fit_coalitions=64, proxy_coalitions=96, screening_repeats=repeats)  # type: ignore[arg-type]
    result = run(tmp_path, target, Model("proxy"), settings=settings)
    assert result.screening is not None
    assert (result.screening.noise is None) == (not asked)
    if asked:
        assert result.screening.noise is not None
        assert result.screening.noise.floor == 0.0
        assert "answered the same" in build_artifact(result).summary["screening"]["noise"]
    else:
        assert build_artifact(result).summary["screening"]["noise"] is None


def test_the_artifact_and_the_reports_say_so(accepted: Result, tmp_path: Path) -> None:
    artifact = build_artifact(accepted, created="2026-01-01T00:00:00+00:00")
    artifact.save(tmp_path / "artifact.json")
    back = Artifact.load(tmp_path / "artifact.json")
    assert back.certified
    assert back.prompt == accepted.prompt
    verdicts = {d["id"]: d["verdict"] for d in back.summary["demonstrations"]}
    assert {verdicts[i] for i in ids(HARMFUL)} == {"harmful"}
    assert {verdicts[i] for i in ids(USEFUL)} == {"useful"}
    assert all(d["source"] == "estimated" for d in back.summary["demonstrations"])
    page = render_html(back.summary)
    assert back.summary["verdict"]["headline"] in page
    assert "d3" in render_markdown(back.summary)
    assert "hold against the cleaned prompt" not in page
    harder = {**back.summary, "certificate": {**back.summary["certificate"], "bar": "cleaned"}}
    assert "hold against the cleaned prompt" in render_html(harder)


def test_reports_show_no_more_text_than_asked(accepted: Result) -> None:
    kept = next(d for d, keep in zip(accepted.original.demonstrations, accepted.kept, strict=True) if keep)
    gone = next(
        d for d, keep in zip(accepted.original.demonstrations, accepted.kept, strict=True) if not keep
    )
    for mode, shows_kept, shows_gone in (
        ("all", True, True),
        ("removed", False, True),
        ("none", False, False),
    ):
        page = render_html(build_artifact(accepted, report_text=mode).summary)  # type: ignore[arg-type]
        assert (kept.inputs["input"] in page) == shows_kept
        assert (gone.inputs["input"] in page) == shows_gone


def test_a_refused_proxy_leads_to_the_target_and_its_calls_are_used_again(tmp_path: Path) -> None:
    target, proxy = Model("target"), Model("contrary", sign=-1.0)
    result = run(tmp_path, target, proxy)
    assert result.screening is not None
    assert result.screening.accepted == ()
    assert result.explanation.role == "target"
    assert "no proxy" in result.explanation.why
    bought = next(r for r in result.spent if r["stage"] == "attribute" and r["role"] == "target")
    # 64 coalitions x 30 queries would be 1,920; screening has bought some of them.
    assert bought["reused_now"] > 0
    assert ids(HARMFUL) <= {
        d.id for d, k in zip(result.original.demonstrations, result.kept, strict=True) if not k
    }


def test_without_proxies_the_target_explains_itself(tmp_path: Path) -> None:
    result = run(tmp_path, Model("target"))
    assert result.screening is None
    assert result.explanation.role == "target"
    assert build_artifact(result).summary["screening"] is None


def test_a_second_run_buys_nothing_and_says_the_same(tmp_path: Path) -> None:
    first = run(tmp_path, Model("target"), Model("proxy"))
    target, proxy = Model("target"), Model("proxy")
    second = run(tmp_path, target, proxy)
    assert (target.asked, proxy.asked) == (0, 0)
    one, two = (build_artifact(r, created="x").body for r in (first, second))
    for body in (one, two):
        for stage in body["summary"]["cost"]["stages"]:
            for key in ("calls_bought", "calls_reused", "tokens_bought", "tokens_reused"):
                stage.pop(key)
        for row in body["spent"]:
            for key in ("bought_now", "reused_now", "tokens_now"):
                row.pop(key)
    assert json.dumps(one) == json.dumps(two)


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = Model("target")
    run(tmp_path / "whole", whole, Model("proxy"))
    first = Model("target", fail_after=1500)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", first, Model("proxy"))
    second = Model("target")
    run(tmp_path / "cut", second, Model("proxy"))
    # At most the block in flight is asked again.
    assert whole.asked <= 1500 + second.asked <= whole.asked + 50


def test_budgets_stop_before_sending(tmp_path: Path) -> None:
    target = Model("target")
    with pytest.raises(BudgetExceededError, match="500"):
        run(tmp_path, target, Model("proxy"), settings=Settings(budget_calls=500))
    assert target.asked <= 500


def test_a_target_that_ignores_demonstrations_ends_with_none(tmp_path: Path) -> None:
    models = Model("target", effect=0.0), Model("proxy", effect=0.0)
    result = run(tmp_path, *models, settings=Settings(keep_labels=False))
    assert result.prompt.n_units == 0
    assert result.certificate.decision == "certified"
    assert result.cleaning.flagged == ()


def test_labels_are_checked_before_anything_is_asked(tmp_path: Path) -> None:
    target = Model("target")
    bad = Splits({**splits(), "select": [Query("x", {"input": "select 1"}, "down")]})
    with pytest.raises(DataError, match="'down' is not allowed"):
        run(tmp_path, target, splits=bad)
    assert target.asked == 0


def test_a_failing_target_is_an_error_not_a_result(tmp_path: Path) -> None:
    def broken(request: ScoreRequest) -> list[float]:
        raise BackendError("no such model")

    with pytest.raises(Exception, match=r"missing|no such model"):
        optimize_prompt(
            prompt(),
            LabelTask(LABELS),
            splits(),
            target=ScriptedBackend(score=broken, name="broken"),
            ledger=tmp_path / "ledger.db",
        )


@pytest.mark.parametrize("explainer", ["kernel_shap", "leave_one_out", "weighted_banzhaf"])
def test_every_explainer_finds_the_harmful_ones(tmp_path: Path, explainer: str) -> None:
    result = run(tmp_path, Model("target"), settings=Settings(explainer=explainer))  # type: ignore[arg-type]
    assert result.explanation.attribution.method == explainer
    assert set(result.cleaning.removed) == set(HARMFUL)


@pytest.mark.parametrize("n", [6, 7])
def test_prompts_with_few_coalitions_left_to_judge_on(tmp_path: Path, n: int) -> None:
    result = optimize_prompt(
        prompt(n), LabelTask(LABELS), splits(), target=Model("target").backend, proxies=[Model("proxy").backend],
        ledger=tmp_path / "ledger.db",
    )  # fmt: skip
    assert result.screening is not None
    assert len(result.screening.judge_coalitions) >= 16


@pytest.mark.parametrize("n", [1, 2])
def test_tiny_prompts(tmp_path: Path, n: int) -> None:
    result = optimize_prompt(
        prompt(n), LabelTask(LABELS), splits(), target=Model("target").backend, proxies=[Model("proxy").backend],
        ledger=tmp_path / "ledger.db",
    )  # fmt: skip
    assert result.explanation.attribution.exact
    build_artifact(result)


def test_all_identical_demonstrations(tmp_path: Path) -> None:
    same = FewShotPrompt(
        tuple(Demonstration(f"s{i}", {"input": "demo 0;"}, "left") for i in range(6)),
        "",
        "Q {input}\nA: {output}",
    )
    target = Model("target")
    result = optimize_prompt(
        same, LabelTask(LABELS), splits(), target=target.backend, ledger=tmp_path / "ledger.db"
    )
    assert result.prompt.n_units <= 2
    assert result.certificate.decision == "certified"


def test_the_cheapest_proxy_comes_first_and_the_unpriced_last() -> None:
    quotes = [Unpriced("not in the list"), Price(Rates(Decimal(2)), source="list"), FREE]
    assert sorted(quotes, key=_price_of) == quotes[::-1]


def test_the_screen_says_what_it_can_find_and_reports_both_kinds_of_evidence(tmp_path: Path) -> None:
    said: list[str] = []

    class Watch:
        def stage(self, name: str, text: str) -> None: ...
        def progress(self, done: int, total: int) -> None: ...
        def tokens(self, n: int) -> None: ...
        def note(self, text: str) -> None:
            said.append(text)

    result = optimize_prompt(
        prompt(), LabelTask(LABELS), splits(), target=Model("target").backend, proxies=[Model("proxy").backend],
        ledger=tmp_path / "ledger.db", observer=Watch(),
    )  # fmt: skip
    assert result.screening is not None
    assert said.index(result.screening.plan.text) < next(i for i, text in enumerate(said) if "proxy:" in text)
    page = render_markdown(build_artifact(result).summary)
    assert result.screening.plan.text[:40] in page
    for fact in (
        "Agreement of attributions, target with itself",
        "Fidelity to the target, explained by itself",
    ):
        assert fact in page


class Half(Model):
    """Sees some of what the target does, and noise of its own: too little alone, enough together with another."""

    def __init__(self, name: str, blind: tuple[int, ...]) -> None:
        super().__init__(name)
        self.blind = blind

    def score(self, request: ScoreRequest) -> list[float]:
        text = str(request.prompt)
        head, query = text.rsplit("\n\n", 1) if "\n\n" in text else ("", text)
        kept = [line for line in head.split("\n\n") if not any(f"demo {i};" in line for i in self.blind)]
        return super().score(ScoreRequest("\n\n".join([*kept, query]), request.candidates))


def test_proxies_that_fail_alone_explain_together(tmp_path: Path) -> None:
    """Each is blind to two demonstrations that matter, so only the mean of both has the target's reasons."""
    halves = [Half("left half", (3, 0)), Half("right half", (8, 5))]
    settings = Settings(fit_coalitions=64, proxy_coalitions=96, screening_tau=0.8)
    result = run(tmp_path, Model("target"), *halves, settings=settings)
    assert result.screening is not None
    together = result.screening["left half + right half"]
    assert result.screening.accepted == (together.name,)
    assert result.screening["left half"].rule.settings["delta"] == pytest.approx(0.05 / 3)
    assert result.explanation.role == "proxy"
    assert result.explanation.model == together.name
    assert list(result.explanation.members) == ["left half", "right half"]
    assert "none of them alone" in result.explanation.why
    assert set(np.argsort(result.explanation.attribution.mean)[-3:].tolist()) == set(USEFUL)
    # The values kept for pairs are the ensemble's: the same fit gives the same attributions.
    assert result.explanation.design is not None
    again = WeightedBanzhaf().fit(result.explanation.design, result.explanation.utility)
    assert again.mean == pytest.approx(result.explanation.attribution.mean)
    dropped = {d.id for d, keep in zip(result.original.demonstrations, result.kept, strict=True) if not keep}
    assert ids(HARMFUL) <= dropped
    proxies = build_artifact(result).summary["screening"]["proxies"]
    assert [p["members"] for p in proxies] == [["left half"], ["right half"], ["left half", "right half"]]
    assert "left half + right half" in render_html(build_artifact(result).summary)


def test_the_ensemble_is_left_out_on_request(tmp_path: Path) -> None:
    settings = Settings(fit_coalitions=48, proxy_coalitions=48, screening_ensemble=False, clean=False)
    few = splits(explain=20, select=20, sealed=20)
    result = run(tmp_path, Model("target"), Model("a"), Model("b"), settings=settings, splits=few)
    assert result.screening is not None
    assert [p.name for p in result.screening.proxies] == ["a", "b"]


def test_every_candidate_shows_what_it_bought_and_the_ratio_its_terms(tmp_path: Path) -> None:
    settings = Settings(
        fit_coalitions=64, proxy_coalitions=96, price_input_per_million=2.0, price_output_per_million=8.0
    )
    result = run(tmp_path, Model("target"), Model("contrary", sign=-1.0), Model("proxy"), settings=settings)
    summary = build_artifact(result).summary
    screened, crr = summary["screening"], summary["cost"]["crr"]
    rows = {(r["stage"], r["role"]): r for r in result.spent}
    paid = rows["screen", "target"]
    tokens = paid["prompt_tokens"] * 2.0 / 1e6 + paid["completion_tokens"] * 8.0 / 1e6
    assert screened["money"] == pytest.approx(tokens)
    for candidate, proxy in zip(screened["proxies"], result.screening.proxies, strict=True):  # type: ignore[union-attr]
        held_out = len(result.screening.judge_coalitions)  # type: ignore[union-attr]
        values = proxy.n_seen + proxy.n_agree * (64 + held_out - 1)
        assert candidate["target_pairs"] == values <= screened["target_pairs"]
        assert candidate["money"] == pytest.approx(tokens * values / screened["target_pairs"])
    terms = {t["name"].split(":")[0]: t for t in crr["terms"]}
    assert terms["screen"]["calls"] == paid["calls"]
    assert terms["screen"]["money"] == pytest.approx(tokens)
    assert terms["proxies"]["calls"] == sum(
        r["calls"] for r in result.spent if r["role"] == "proxy" and r["stage"] in ("screen", "attribute")
    )
    fallback = next(t for name, t in terms.items() if name.startswith("fallback"))
    assert crr["calls"] == pytest.approx(terms["oracle"]["calls"] / (paid["calls"] + fallback["calls"]))
    for text in (render_html(summary), render_markdown(summary)):
        assert "Target values bought for it" in text
        assert "Term of the ratio" in text


def test_the_ratio_counts_what_another_run_had_bought(tmp_path: Path) -> None:
    given = {"fit_coalitions": 64, "proxy_coalitions": 96, "price_input_per_million": 2.0}
    models = Model("target"), Model("contrary", sign=-1.0), Model("proxy")
    first = run(tmp_path, *models, settings=Settings(**given))  # type: ignore[arg-type]
    again = run(tmp_path, *models, settings=Settings(**given, clean_level=0.01))  # type: ignore[arg-type]
    assert first.run != again.run
    assert not [r for r in again.spent if r["stage"] in ("screen", "attribute") and r["calls"]]
    bought, found = (build_artifact(r).summary["cost"]["crr"] for r in (first, again))
    assert {k: found[k] for k in ("calls", "tokens", "money")} == pytest.approx(
        {k: bought[k] for k in ("calls", "tokens", "money")}
    )
    assert [t["calls"] for t in found["terms"]] == [t["calls"] for t in bought["terms"]]
    assert "recorded by other runs" in found["text"]
    assert "recorded by other runs" not in bought["text"]
    # A second pass of the same run is its own, not another's.
    same = build_artifact(run(tmp_path, *models, settings=Settings(**given))).summary["cost"]["crr"]  # type: ignore[arg-type]
    assert same == bought


def test_more_coalitions_are_bought_for_a_wanted_error_within_calls(tmp_path: Path) -> None:
    """The refused proxy's design goes on where the target's ends; what was bought is used again."""
    base = {
        "fit_coalitions": 64,
        "proxy_coalitions": 128,
        "max_pairs": 20,
        "oracle_queries": 20,
        "clean": False,
    }
    plain = run(
        tmp_path,
        Model("target"),
        Model("contrary", sign=-1.0),
        splits=splits(30, 20, 30),
        settings=Settings(**base),
    )
    assert plain.explanation.attribution.n_coalitions == 64
    settings = Settings(**base, attribution_error=1e-6, attribution_calls=20 * 30)
    more = run(
        tmp_path, Model("target"), Model("contrary", sign=-1.0), splits=splits(30, 20, 30), settings=settings
    )
    assert more.explanation.design is not None
    assert more.explanation.design.n_coalitions == 94
    assert (more.explanation.design.coalitions[:64] == plain.explanation.design.coalitions).all()  # type: ignore[union-attr]
    assert "600 further target calls" in more.explanation.why
    assert "the limit (calls)" in more.explanation.why
    spent = next(r for r in more.spent if r["stage"] == "attribute" and r["role"] == "target")
    assert spent["bought_now"] == 600
    with pytest.raises(InputError, match="attribution_money is set, and target has no price"):
        run(
            tmp_path,
            Model("target"),
            Model("contrary", sign=-1.0),
            splits=splits(30, 20, 30),
            settings=Settings(**base, attribution_money=1.0),
        )
    priced = Settings(
        **base, attribution_money=0.01, price_input_per_million=1.0, price_output_per_million=1.0
    )
    bought = run(
        tmp_path, Model("target"), Model("contrary", sign=-1.0), splits=splits(30, 20, 30), settings=priced
    ).explanation
    assert bought.attribution.n_coalitions > 64
    assert "the limit on money allows" in bought.why
