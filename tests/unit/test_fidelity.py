"""Fidelity of a surrogate to a model on coalitions it was not fitted on."""

import numpy as np
import pytest

from proxyprompt.attribution import KernelSHAP
from proxyprompt.coalitions import uniform_coalitions
from proxyprompt.errors import InconclusiveError, InputError
from proxyprompt.fidelity import label_fidelity, score_fidelity
from proxyprompt.testing import AdditiveGame, UnanimityGame

N_UNITS, N_QUERIES = 8, 12


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    design = KernelSHAP().design(N_UNITS, 60, rng=rng)
    return design, uniform_coalitions(N_UNITS, 40, rng=rng, exclude=design.coalitions)


def probabilities(coalitions, seed=0, noise=0.0):
    """Three labels whose probabilities are additive in the units, plus noise, per query."""
    rng = np.random.default_rng(seed)
    raw = np.stack(
        [AdditiveGame(rng.random((N_QUERIES, N_UNITS)), rng.random(N_QUERIES))(coalitions) for _ in range(3)],
        axis=-1,
    )
    return raw / 20 + noise * rng.normal(size=raw.shape)


def test_additive_model_is_explained_perfectly(rows):
    design, judge = rows
    labels = probabilities(judge).argmax(axis=2)
    q = label_fidelity(design, probabilities(design.coalitions), judge, labels, explainer=KernelSHAP())
    assert q.shape == (N_QUERIES,)
    assert q.tolist() == [1.0] * N_QUERIES


def test_surrogate_of_another_model_is_judged_by_the_target(rows):
    design, judge = rows
    labels = probabilities(judge).argmax(axis=2)
    proxy = label_fidelity(
        design, probabilities(design.coalitions, seed=1), judge, labels, explainer=KernelSHAP()
    )
    assert proxy.mean() < 0.8
    surrogate_labels = probabilities(judge, seed=1).argmax(axis=2)
    np.testing.assert_allclose(proxy, (surrogate_labels == labels).mean(axis=0))


def test_missing_labels_are_left_out_and_missing_queries_are_nan(rows):
    design, judge = rows
    fitted, labels = probabilities(design.coalitions), probabilities(judge).argmax(axis=2)
    labels[:30, 0] = -1
    labels[30:, 0] = (labels[30:, 0] + 1) % 3
    labels[:, 1] = -1
    fitted[design.full_row, 2, 1] = np.nan  # one label of the full prompt: the query cannot be fitted
    fitted[7, 3, 0] = np.nan  # one label of one coalition: the coalition is left out for the query
    q = label_fidelity(design, fitted, judge, labels, explainer=KernelSHAP())
    assert q[0] == 0.0
    assert np.isnan(q[[1, 2]]).all()
    assert (q[3:] == 1.0).all()


def test_too_many_missing_are_inconclusive(rows):
    design, judge = rows
    fitted = probabilities(design.coalitions)
    fitted[0, :5, 0] = np.nan
    with pytest.raises(InconclusiveError, match="5 of 12 queries were dropped"):
        label_fidelity(design, fitted, judge, probabilities(judge).argmax(axis=2), explainer=KernelSHAP())


def test_label_errors(rows):
    design, judge = rows
    fitted, labels = probabilities(design.coalitions), probabilities(judge).argmax(axis=2)

    def run(fitted=fitted, judge=judge, labels=labels):
        return label_fidelity(design, fitted, judge, labels, explainer=KernelSHAP())

    with pytest.raises(InputError, match=r"judge_coalitions: 1 of 41 rows \(first: 40\) were fitted on"):
        run(judge=np.vstack([judge, design.coalitions[5]]), labels=np.vstack([labels, labels[:1]]))
    with pytest.raises(InputError, match=r"judge_coalitions has shape \(40, 7\)"):
        run(judge=judge[:, :7])
    with pytest.raises(InputError, match=r"probabilities has shape \(60, 12\)"):
        run(fitted=fitted[:, :, 0])
    with pytest.raises(InputError, match="with at least 2 labels"):
        run(fitted=fitted[:, :, :1])
    with pytest.raises(InputError, match=r"judged_labels has dtype float64"):
        run(labels=labels.astype(float))
    with pytest.raises(InputError, match=r"integers of shape \(40, 12\)"):
        run(labels=labels[:, :3])
    with pytest.raises(InputError, match="judged_labels spans 0 to 3: -1 to 2 is allowed"):
        run(labels=np.where(labels == 2, 3, labels))


def score(rows, fitted, judged, **ends):
    design, judge = rows
    ends = {
        "judged_base": judged(np.zeros((1, N_UNITS), dtype=bool))[0],
        "judged_full": judged(np.ones((1, N_UNITS), dtype=bool))[0],
        **ends,
    }
    return score_fidelity(
        design, fitted(design.coalitions), judge, judged(judge), explainer=KernelSHAP(), **ends
    )


def test_scores_of_an_additive_game(rows):
    game = AdditiveGame(np.random.default_rng(0).normal(size=(N_QUERIES, N_UNITS)), base=2.0)
    result = score(rows, game, game)
    np.testing.assert_allclose(result.r2, 1.0)
    assert (result.side_agreement == 1.0).all()
    assert (result.n_judged == 40).all()
    assert result.dropped_queries.size == 0


def test_scale_and_level_cost_r2_and_not_the_side(rows):
    credits = np.random.default_rng(0).normal(size=(N_QUERIES, N_UNITS))
    result = score(rows, AdditiveGame(credits), AdditiveGame(10 * credits, base=50.0))
    assert (result.r2 < 0).all()
    assert (result.side_agreement == 1.0).all()


def test_a_surrogate_that_points_the_other_way_agrees_nowhere(rows):
    """Its attributions are the judged model's, reversed: a fidelity of 1 would let them rank demonstrations."""
    credits = np.random.default_rng(0).normal(size=(N_QUERIES, N_UNITS))
    result = score(rows, AdditiveGame(credits), AdditiveGame(-credits))
    assert (result.side_agreement == 0.0).all()


def test_ties_do_not_hang_on_rounding(rows):
    """Equal credits: half of the units is exactly the midpoint, which sums of floats miss to either side."""
    design, judge = rows
    half = judge[judge.sum(axis=1) == N_UNITS // 2]
    assert len(half) >= 5
    game = AdditiveGame(np.full((4, N_UNITS), 1.0) * [[0.1], [0.3], [0.7], [0.9]], base=[0.3, 0.3, 0.1, 0.77])
    for judged, agree in ((0.0, 1.0), (1.0, 0.0)):
        result = score_fidelity(
            design,
            game(design.coalitions),
            half,
            np.full((len(half), 4), judged),
            judged_base=np.zeros(4),
            judged_full=np.ones(4),
            explainer=KernelSHAP(),
        )
        assert result.side_agreement.tolist() == [agree] * 4
    steps = np.array([0.05, 0.1, 0.11, 0.09, 0.02])
    p = 0.5 + steps * (design.coalitions.sum(axis=1) - N_UNITS // 2)[:, None]
    both = np.stack([1 - p, p], axis=2)
    for label, agree in ((0, 1.0), (1, 0.0)):
        labels = np.full((len(half), len(steps)), label)
        q = label_fidelity(design, both, half, labels, explainer=KernelSHAP())
        assert q.tolist() == [agree] * len(steps)


def test_interactions_cost_r2(rows):
    game = UnanimityGame(N_UNITS, [((0, 1), np.ones(N_QUERIES)), ((4,), 1.0), ((5,), 1.0)])
    result = score(rows, game, game)
    assert ((result.r2 > 0) & (result.r2 < 0.95)).all()


def test_undefined_scores_are_missing(rows):
    credits = np.random.default_rng(0).normal(size=(N_QUERIES, N_UNITS))
    constant = credits.copy()
    constant[4] = 0.0
    base = np.full(N_QUERIES, 0.1)
    result = score(rows, AdditiveGame(credits), AdditiveGame(constant, base=base))
    assert np.flatnonzero(np.isnan(result.r2)).tolist() == [4]
    assert np.flatnonzero(np.isnan(result.side_agreement)).tolist() == [4]
    gone = base.copy()
    gone[6] = np.nan
    result = score(rows, AdditiveGame(credits), AdditiveGame(credits, base=base), judged_base=gone)
    assert np.flatnonzero(np.isnan(result.side_agreement)).tolist() == [6]
    assert not np.isnan(result.r2).any()


def test_missing_scores(rows):
    game = AdditiveGame(np.random.default_rng(0).normal(size=(N_QUERIES, N_UNITS)))
    design, judge = rows
    fitted, judged = game(design.coalitions), game(judge)
    fitted[design.empty_row, 3] = np.nan
    judged[:10, 5] = np.nan
    ends = {"judged_base": np.zeros(N_QUERIES), "judged_full": game.shapley_values.sum(axis=1)}
    result = score_fidelity(design, fitted, judge, judged, explainer=KernelSHAP(), **ends)
    assert result.dropped_queries.tolist() == [3]
    assert np.isnan(result.r2[3])
    assert result.n_judged.tolist() == [40] * 3 + [0, 40, 30] + [40] * 6
    np.testing.assert_allclose(np.delete(result.r2, 3), 1.0)


def test_score_errors(rows):
    game = AdditiveGame(np.ones((N_QUERIES, N_UNITS)))
    other = AdditiveGame(np.ones((3, N_UNITS)))
    with pytest.raises(InputError, match=r"judged_values has 3 queries, .* 3, values 12"):
        score(rows, game, other)
    with pytest.raises(InputError, match=r"judged_base has shape \(\)"):
        score(rows, game, game, judged_base=0.0)
