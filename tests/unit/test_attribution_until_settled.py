"""Buying coalitions until a decision is settled: the draw, the errors, the decisions, the stopping."""

from __future__ import annotations

import numpy as np
import pytest

from proxyprompt.attribution import (
    LIME,
    Banzhaf,
    Below,
    BottomK,
    ExactShapley,
    FullRanking,
    KernelSHAP,
    TopK,
    WeightedBanzhaf,
    attribute_until_settled,
)
from proxyprompt.attribution._nested import draw_nested
from proxyprompt.attribution.until_settled import _contrasts, law_of
from proxyprompt.coalitions import enumerate_coalitions, row_keys
from proxyprompt.errors import InconclusiveError, InputError
from proxyprompt.testing import AdditiveGame, UnanimityGame

EXPLAINERS = [WeightedBanzhaf(), Banzhaf(), KernelSHAP()]


def tangled(n_units: int, n_queries: int = 3, scale: float = 0.1) -> UnanimityGame:
    """Unit 0 far ahead, units 1 and 2 clearly behind, the others near 0, with interactions of three."""
    rng = np.random.default_rng(4)
    alone = [2.0, -1.0, -1.0, *[0.0] * (n_units - 3)]
    terms = [((unit,), pay + scale * rng.normal(size=n_queries)) for unit, pay in enumerate(alone)]
    for _ in range(3 * n_units):
        terms.append((tuple(rng.choice(n_units, 3, replace=False)), scale * rng.normal(size=n_queries)))
    return UnanimityGame(n_units, terms)


@pytest.mark.parametrize("explainer", EXPLAINERS, ids=lambda e: e.method)
@pytest.mark.parametrize("n_units", [2, 5, 8])
def test_the_whole_draw_is_every_coalition_with_the_mass_of_the_law(explainer, n_units):
    law = law_of(explainer, n_units)
    everything = sum(law.n_clusters(size) for size in law.sizes())
    prefix = draw_nested(law, everything, rng=np.random.default_rng(0)).prefix(everything)
    assert prefix.design.exact
    assert len(set(row_keys(prefix.design.coalitions))) == prefix.design.n_coalitions == 2**n_units
    game = tangled(max(n_units, 3)) if n_units > 2 else UnanimityGame(2, [((0, 1), 1.0), ((0,), 0.3)])
    fitted = explainer.fit(prefix.design, game(prefix.design.coalitions))
    wanted = explainer.attribute(game, n_units, budget=2**n_units, rng=np.random.default_rng(0))
    np.testing.assert_allclose(fitted.values, wanted.values, atol=1e-9)


@pytest.mark.parametrize("explainer", EXPLAINERS, ids=lambda e: e.method)
@pytest.mark.parametrize("n_units", [7, 8, 40])
def test_prefixes_are_nested_and_distinct_and_pairs_stay_together(explainer, n_units):
    law = law_of(explainer, n_units)
    draw = draw_nested(law, 40, rng=np.random.default_rng(1))
    small, large = draw.prefix(15), draw.prefix(40)
    np.testing.assert_array_equal(small.design.coalitions, large.design.coalitions[: 2 + 15 * law.members])
    assert len(set(row_keys(large.design.coalitions))) == 2 + 40 * law.members
    assert (large.chance[:15] >= small.chance).all()
    if law.paired:
        np.testing.assert_array_equal(large.design.coalitions[2::2], ~large.design.coalitions[3::2])


@pytest.mark.parametrize("explainer", EXPLAINERS, ids=lambda e: e.method)
def test_weighted_sums_over_a_prefix_are_unbiased(explainer):
    """Over all coalitions: the mass of the law times any function; here one that varies within and between sizes."""
    n_units, law = 7, law_of(explainer, 7)
    rows, rng = enumerate_coalitions(7), np.random.default_rng(2)
    function = rng.normal(size=128) + rows.sum(axis=1)
    whole = float(law.mass[rows.sum(axis=1)] @ function)
    sums, errors = [], []
    for _ in range(1500):
        prefix = draw_nested(law, 20, rng=rng).prefix(20)
        terms = prefix.design.weights * function[prefix.design.coalitions @ (1 << np.arange(n_units))]
        sums.append(terms.sum())
        by_cluster = terms[2:].reshape(20, -1).sum(axis=1)
        errors.append(((1 - prefix.chance) * by_cluster**2).sum())
    noise = np.std(sums) / np.sqrt(len(sums))
    assert abs(np.mean(sums) - whole) < 4 * noise
    assert np.mean(errors) == pytest.approx(np.var(sums), rel=0.12)


@pytest.mark.parametrize("explainer", EXPLAINERS, ids=lambda e: e.method)
def test_the_covariance_is_that_of_repeated_draws(explainer):
    n_units, law, game = 9, law_of(explainer, 9), tangled(9, n_queries=4)
    count = 60 // law.members
    means, stated, own, spread = [], [], [], []
    rng = np.random.default_rng(3)
    for _ in range(300):
        prefix = draw_nested(law, count, rng=rng).prefix(count)
        values = game(prefix.design.coalitions)
        fitted = explainer.fit(prefix.design, values)
        errors = prefix.errors(fitted, values)
        means.append(fitted.mean)
        stated.append(errors.shared.T @ errors.shared)
        own.append((errors.own**2).sum())
        spread.append(fitted.values - fitted.mean)
    # Differences of two units, which is what is compared: variances of the whole matrix, not of its diagonal.
    contrast = np.eye(n_units)[:-1] - np.eye(n_units)[1:]
    seen = np.diag(contrast @ np.cov(np.array(means).T) @ contrast.T)
    said = np.diag(contrast @ np.mean(stated, axis=0) @ contrast.T)
    assert 0.9 < (said / seen).mean() < 1.35
    noise = np.array(spread).var(axis=0, ddof=1).sum() / (4 * 3)
    assert 0.8 < np.mean(own) / noise < 1.35


def test_contrasts_are_sums_over_differences_of_columns():
    rows = np.random.default_rng(6).normal(size=(30, 4))
    variance, freedom = _contrasts(rows, np.array([0, 2, 4]), np.array([1, 0, 3]))
    for k, difference in enumerate((rows[:, 0] - rows[:, 1], rows[:, 2] - rows[:, 0], -rows[:, 3])):
        square = difference**2
        assert variance[k] == pytest.approx(square.sum())
        assert freedom[k] == pytest.approx(square.sum() ** 2 / (square**2).sum())
    assert _contrasts(np.ones((5, 2)), np.array([0]), np.array([1]))[0] == 0


@pytest.mark.parametrize("explainer", EXPLAINERS, ids=lambda e: e.method)
def test_stops_early_with_the_right_answer_and_pays_once(explainer):
    game, asked = tangled(12), []

    def record(rows):
        asked.append(rows)
        return game(rows)

    result = attribute_until_settled(
        explainer, record, 12, decision=TopK(1), budget=1000, rng=np.random.default_rng(0)
    )
    assert result.settled
    assert (result.reason, result.answer, result.undecided) == ("settled", (0,), ())
    assert result.n_coalitions == sum(map(len, asked)) == game.evaluations < 400
    assert len(set(row_keys(np.vstack(asked)))) == game.evaluations
    assert [look.n_coalitions for look in result.looks] == np.cumsum([len(rows) for rows in asked]).tolist()
    assert result.share_spent == pytest.approx(game.evaluations / 1000)
    again = attribute_until_settled(
        explainer, game, 12, decision=TopK(1), budget=1000, rng=np.random.default_rng(0)
    )
    np.testing.assert_array_equal(again.attribution.mean, result.attribution.mean)
    assert again.looks == result.looks
    asked.clear()
    longer = attribute_until_settled(
        explainer, record, 12, decision=FullRanking(), budget=150, rng=np.random.default_rng(0)
    )
    assert len(longer.looks) == len(asked) > 2
    assert len(set(row_keys(np.vstack(asked)))) == sum(map(len, asked)) == longer.n_coalitions == 150


def test_an_easy_decision_stops_before_a_hard_one():
    spent = [
        attribute_until_settled(
            KernelSHAP(), tangled(12), 12, decision=decision, budget=1500, rng=np.random.default_rng(0)
        ).n_coalitions
        for decision in (BottomK(2), Below(-0.4), FullRanking(tie=0.5), FullRanking())
    ]
    assert spent[0] < spent[3] == 1500
    assert spent[1] < 1500
    assert spent[2] < 1500


@pytest.mark.parametrize("explainer", EXPLAINERS, ids=lambda e: e.method)
@pytest.mark.parametrize("decision", [TopK(3), BottomK(2), Below(), FullRanking()], ids=str)
def test_all_coalitions_settle_everything(explainer, decision):
    game = tangled(6)
    result = attribute_until_settled(
        explainer, game, 6, decision=decision, budget=100, rng=np.random.default_rng(0)
    )
    exact = explainer.attribute(game, 6, budget=64, rng=np.random.default_rng(0))
    assert result.settled
    assert result.n_coalitions <= 64
    if result.n_coalitions == 64:
        assert result.attribution.exact
        np.testing.assert_allclose(result.attribution.mean, exact.mean, atol=1e-9)
        assert not result.attribution.se_coalitions.any()
        assert result.looks[-1].half_width == 0
    assert result.answer == tuple(decision.answer(exact.mean).tolist())


def test_equal_units_use_up_the_budget_unless_a_tie_is_good_enough():
    """Units 0 and 1 are copies, and the best: a single best unit does not exist."""
    rng = np.random.default_rng(0)
    terms = [((0,), 1.0), ((1,), 1.0), ((2,), 0.3)]
    terms += [(tuple(rng.choice(np.arange(2, 12), 3, replace=False)), 0.2 * rng.normal()) for _ in range(30)]
    game = UnanimityGame(12, terms)

    def run(tie):
        return attribute_until_settled(
            WeightedBanzhaf(), game, 12, decision=TopK(1, tie=tie), budget=600, rng=np.random.default_rng(0)
        )

    strict, loose = run(0.0), run(0.1)
    assert (strict.settled, strict.reason, strict.n_coalitions) == (False, "budget", 600)
    assert strict.undecided in (((0, 1),), ((1, 0),))
    assert strict.looks[-1].n_comparisons == 11
    assert loose.settled
    assert loose.n_coalitions < 400


def test_the_level_is_spent_over_looks_and_comparisons():
    """Sum over looks of the single levels times the number of possible comparisons: the whole, but for Sidak's gain."""
    for decision, family in ((FullRanking(), 66), (TopK(2), 66), (Below(), 12)):
        result = attribute_until_settled(
            KernelSHAP(), tangled(12), 12, decision=decision, budget=300, rng=np.random.default_rng(0)
        )
        spent = sum(1 - look.level for look in result.looks) * family
        if result.reason == "budget":
            assert spent == pytest.approx(0.05, rel=0.03)
        assert spent <= 0.0515
        levels = [1 - look.level for look in result.looks]
        assert levels[0] * family == pytest.approx(0.05 * 48 / 300, rel=0.03)


def test_decisions_name_units_and_the_comparisons_they_rest_on():
    mean = np.array([0.1, 0.5, -0.2, 0.3])

    def pairs(decision):
        return set(zip(*(side.tolist() for side in decision.comparisons(mean)), strict=True))

    assert pairs(TopK(2)) == {(1, 0), (1, 2), (3, 0), (3, 2)}
    assert pairs(BottomK(1)) == {(0, 2), (1, 2), (3, 2)}
    assert pairs(FullRanking()) == {(1, 3), (1, 0), (1, 2), (3, 0), (3, 2), (0, 2)}
    assert pairs(Below(0.2)) == {(4, 0), (1, 4), (4, 2), (3, 4)}
    assert Below(0.2).answer(mean).tolist() == [2, 0]


def test_values_that_fit_without_any_residual_settle_nothing_before_the_end():
    """Ten equal answers show no error to judge by; 0/1 values often look like this at first."""
    result = attribute_until_settled(
        WeightedBanzhaf(), AdditiveGame(np.arange(10.0)), 10, decision=TopK(3), budget=200,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    assert (result.settled, result.n_coalitions) == (False, 200)
    assert result.looks[-1].half_width == np.inf


def test_queries_that_are_too_few_stop_it():
    """Unit 1 helps half the queries and harms the others: no number of coalitions tells its sign for all queries."""
    rng, n_queries = np.random.default_rng(0), 8
    sign = np.repeat([1.0, -1.0], n_queries // 2)
    terms = [((0,), 2.0 + 0.05 * rng.normal(size=n_queries)), ((1,), sign + 0.1)]
    terms += [((unit,), 1.0 + 0.05 * rng.normal(size=n_queries)) for unit in range(2, 12)]
    terms += [(tuple(rng.choice(12, 3, replace=False)), 0.1 * rng.normal(size=n_queries)) for _ in range(36)]
    game = UnanimityGame(12, terms)

    def run(over):
        return attribute_until_settled(
            KernelSHAP(), game, 12, decision=Below(), budget=2000, rng=np.random.default_rng(0), over=over
        )

    fixed, sampled = run("coalitions"), run("queries")
    assert fixed.settled
    assert (sampled.settled, sampled.reason) == (False, "queries")
    assert sampled.n_coalitions < 500
    assert sampled.undecided == ((1,),)
    every = attribute_until_settled(
        KernelSHAP(), game, 12, decision=Below(), budget=4096, rng=np.random.default_rng(0), over="queries",
        first=4096,
    )  # fmt: skip
    assert (every.attribution.exact, every.reason, every.undecided) == (True, "queries", ((1,),))
    with pytest.raises(InputError, match="single query"):
        attribute_until_settled(
            KernelSHAP(), tangled(12, n_queries=1), 12, decision=Below(), budget=500,
            rng=np.random.default_rng(0), over="queries",
        )  # fmt: skip


@pytest.mark.parametrize("explainer", EXPLAINERS, ids=lambda e: e.method)
def test_missing_values_are_left_out_and_never_read(explainer):
    game = tangled(10, n_queries=20)
    rng = np.random.default_rng(5)

    def holes(rows):
        values = game(rows)
        values[:, 3] = np.nan
        inner = rows.any(axis=1) & ~rows.all(axis=1)
        values[(rng.random(values.shape) < 0.02) & inner[:, None]] = np.nan
        return values

    result = attribute_until_settled(
        explainer, holes, 10, decision=TopK(1), budget=400, rng=np.random.default_rng(0)
    )
    assert 3 in result.attribution.dropped_queries
    assert result.settled
    assert result.answer == (0,)
    with pytest.raises(InconclusiveError):
        attribute_until_settled(
            explainer, lambda rows: np.full((len(rows), 3), np.nan), 10, decision=TopK(1), budget=400,
            rng=np.random.default_rng(0),
        )  # fmt: skip


def test_first_and_growth_choose_the_looks():
    def sizes(**options):
        result = attribute_until_settled(
            WeightedBanzhaf(), tangled(12), 12, decision=FullRanking(), budget=800,
            rng=np.random.default_rng(0), **options,
        )  # fmt: skip
        return [look.n_coalitions for look in result.looks]

    assert sizes(first=100, growth=2) == [100, 200, 400, 800]
    assert sizes(first=800) == [800]
    assert sizes()[0] == 48


def test_errors_name_the_rule_and_the_remedy():
    game, rng = tangled(8), np.random.default_rng(0)

    def run(explainer=KernelSHAP(), decision=TopK(2), budget=100, n_units=8, f=game, **options):  # noqa: B008
        return attribute_until_settled(
            explainer, f, n_units, decision=decision, budget=budget, rng=rng, **options
        )

    for explainer in (LIME(), ExactShapley()):
        with pytest.raises(InputError, match="Use WeightedBanzhaf or KernelSHAP"):
            run(explainer)
    with pytest.raises(InputError, match=r"budget=20: 8 units need at least 22"):
        run(budget=20)
    with pytest.raises(InputError, match=r"first=101: from 22 to 100"):
        run(first=101)
    with pytest.raises(InputError, match="growth=1"):
        run(growth=1.0)
    with pytest.raises(InputError, match="confidence=95"):
        run(confidence=95)
    with pytest.raises(InputError, match="over='units'"):
        run(over="units")
    with pytest.raises(InputError, match=r"k=8: an integer from 1 to 7"):
        run(decision=TopK(8))
    with pytest.raises(InputError, match="k=True"):
        run(decision=BottomK(True))
    with pytest.raises(InputError, match="nothing to compare"):
        run(decision=FullRanking(), n_units=1, budget=2)
    with pytest.raises(InputError, match="tie=-1"):
        TopK(2, tie=-1)
    with pytest.raises(InputError, match="value=nan"):
        Below(float("nan"))
    calls = iter((3, 1))
    with pytest.raises(InputError, match="gave 1 queries after 3"):
        run(f=lambda rows: game(rows)[:, : next(calls)], decision=FullRanking())
