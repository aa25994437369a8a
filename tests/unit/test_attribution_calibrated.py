"""Calibrated attributions: arithmetic, shapes, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest

from proxyprompt.attribution import LIME, Attribution, KernelSHAP, WeightedBanzhaf
from proxyprompt.attribution.calibrated import calibrate, choose_measured
from proxyprompt.attribution.extending import nested_designs
from proxyprompt.errors import InputError
from proxyprompt.testing import UnanimityGame

GAME = UnanimityGame(10, [((0, 1), 1.0), ((2, 3), -1.0), ((4, 5, 6), 0.5)])
BANZHAF = WeightedBanzhaf(0.5)


def setting(explainer=BANZHAF, n_proxy=400, n_target=60, seed=0):
    rng = np.random.default_rng(seed)
    design = explainer.design(10, n_proxy, rng=rng)
    rows = choose_measured(explainer, design, n_target, rng=rng)
    return design, rows, GAME(design.coalitions), rng


@pytest.mark.parametrize("explainer", [BANZHAF, KernelSHAP()])
def test_a_scaled_and_shifted_copy_of_the_target_gives_the_attribution_of_the_large_design(explainer):
    design, rows, values, rng = setting(explainer)
    found = calibrate(explainer, design, 3.0 - 4.0 * (-values), rows, values[rows], rng=rng)
    assert np.allclose(found.attribution.mean, explainer.fit(design, values).mean, atol=1e-9)
    assert found.lam == pytest.approx([0.25])
    assert found.rho2 > 0.999
    assert found.n_target <= 60
    assert found.n_proxy == design.n_coalitions
    assert found.oracle_share == pytest.approx(found.n_target / found.n_proxy)


def test_shapley_values_still_add_up_to_the_target_s_own_gain():
    explainer = KernelSHAP()
    design, rows, values, rng = setting(explainer)
    proxy = values + np.random.default_rng(5).normal(size=values.shape)
    found = calibrate(explainer, design, proxy, rows, values[rows], rng=rng).attribution
    assert found.values.sum(axis=1) == pytest.approx(found.full_values - found.base_values)
    assert found.full_values == pytest.approx(values[design.full_row])


def test_the_better_of_two_proxies_carries_the_weight():
    design, rows, values, rng = setting()
    noise = np.random.default_rng(6).normal(size=values.shape)
    found = calibrate(BANZHAF, design, np.stack([noise, values]), rows, values[rows], rng=rng)
    assert found.lam[1] > 0.5
    assert found.lam[0] < 0.1


def test_all_measured_is_the_target_s_own_explanation_whatever_the_proxy_says():
    design, _, values, rng = setting(n_proxy=80)
    rows = np.arange(design.n_coalitions)
    proxy = np.random.default_rng(2).normal(size=values.shape)
    found = calibrate(BANZHAF, design, proxy, rows, values, rng=rng)
    assert found.oracle_share == 1.0
    assert np.allclose(found.attribution.mean, found.oracle.mean, atol=0.05)


def test_missing_target_values_are_left_out_and_counted():
    design, rows, values, rng = setting()
    wide = np.hstack([values] * 6)
    target = wide[rows].copy()
    target[7, 1] = np.nan
    target[:, 2] = np.nan
    found = calibrate(BANZHAF, design, wide, rows, target, rng=rng)
    assert found.attribution.dropped_queries.tolist() == [2]
    assert np.allclose(found.attribution.mean, BANZHAF.fit(design, values).mean, atol=1e-6)


def test_an_interval_needs_fifty_target_values():
    design, rows, values, rng = setting(n_target=40)
    assert calibrate(BANZHAF, design, values, rows, values[rows], rng=rng).interval() is None
    design, rows, values, rng = setting(n_target=52)
    proxy = values + 0.1 * np.random.default_rng(1).normal(size=values.shape)
    low, high = calibrate(BANZHAF, design, proxy, rows, values[rows], rng=rng).interval(0.9)
    assert (low < high).all()


def test_the_plan_for_a_wanted_error_follows_the_square_root_law():
    design, rows, values, rng = setting()
    proxy = values + 0.3 * np.random.default_rng(1).normal(size=values.shape)
    found = calibrate(BANZHAF, design, proxy, rows, values[rows], rng=rng)
    own = np.median(found.attribution.settings["se_target"])
    floor = np.median(found.attribution.settings["se_proxy"])
    assert found.target_coalitions_for(float(np.hypot(own, floor))) in (found.n_target, found.n_target + 1)
    half = found.target_coalitions_for(float(np.hypot(own / 2, floor)))
    assert half == pytest.approx(4 * found.n_target, abs=2)
    assert found.target_coalitions_for(floor * 0.99) is None
    with pytest.raises(InputError, match="above 0"):
        found.target_coalitions_for(0.0)


def test_the_record_is_json_and_the_attribution_survives_it():
    design, rows, values, rng = setting()
    found = calibrate(BANZHAF, design, values, rows, values[rows], rng=rng)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert np.allclose(Attribution.from_dict(data["attribution"]).mean, found.attribution.mean)


def test_measured_rows_hold_both_ends_and_whole_complement_pairs():
    design, rows, _, _ = setting(KernelSHAP(), n_target=51)
    chosen = design.coalitions[rows]
    assert {design.empty_row, design.full_row} <= set(rows.tolist())
    assert len(rows) <= 51
    assert {r.tobytes() for r in chosen} == {r.tobytes() for r in ~chosen}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"explainer": LIME()}, "not linear"),
        (lambda a: a | {"measured": a["measured"][2:]}, "lacks the empty or the full"),
        (lambda a: a | {"measured": np.r_[a["measured"][:-1], a["measured"][0]]}, "distinct row numbers"),
        (lambda a: a | {"measured": np.r_[a["measured"][:-1], 10**6]}, "rows from 0 to"),
        (lambda a: a | {"proxy_values": a["proxy_values"][:-1]}, "without missing values"),
        (lambda a: a | {"proxy_values": np.where(True, np.nan, a["proxy_values"])}, "without missing values"),
        (lambda a: a | {"target_values": np.hstack([a["target_values"]] * 2)}, "must be the same"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    design, rows, values, rng = setting()
    arguments = {
        "explainer": BANZHAF,
        "design": design,
        "proxy_values": values,
        "measured": rows,
        "target_values": values[rows],
    }
    with pytest.raises(InputError, match=message):
        calibrate(**change(arguments), rng=rng)


def test_too_few_coalitions_to_determine_the_units_are_refused():
    design, *_, rng = setting()
    with pytest.raises(InputError, match="did not determine"):
        choose_measured(BANZHAF, design, 8, rng=rng)


@pytest.mark.parametrize("explainer", [BANZHAF, KernelSHAP()])
def test_nested_designs_contain_each_other_and_calibrate(explainer):
    rng = np.random.default_rng(4)
    few, many = nested_designs(explainer, 10, (60, 400), rng=rng)
    rows = np.arange(few.n_coalitions)
    values = GAME(many.coalitions)
    found = calibrate(explainer, many, values, rows, values[rows], rng=rng, measured_design=few)
    assert np.allclose(found.attribution.mean, explainer.fit(many, values).mean, atol=1e-6)
    with pytest.raises(InputError, match="rows are not those"):
        calibrate(explainer, many, values, rows[::-1], values[rows[::-1]], rng=rng, measured_design=few)
    with pytest.raises(InputError, match="ascending"):
        nested_designs(explainer, 10, (400, 60), rng=rng)
    with pytest.raises(InputError, match="instalments"):
        nested_designs(LIME(), 10, (60, 400), rng=rng)
