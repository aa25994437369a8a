"""What all three reports say: the checked summary plus the figures and sentences derived from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from . import _text as t
from ._schema import read
from .verified import verification_rows

__all__ = ["build", "performance_format"]

_STATUS = {
    "certified": ("Certified", "good"),
    "not_certified": ("Not certified", "warn"),
    "unchanged": ("Prompt unchanged", "calm"),
}

_DECISIONS = {"accepted": "good", "rejected": "warn", "undecided": "calm", "not_tested": "calm"}

_GROUPS = (
    (
        False,
        "harmful",
        "Harmful on these queries",
        "Answers get better without them. They may well be honest examples.",
    ),
    (False, "redundant", "Redundant", "They cost tokens and add nothing that the kept ones do not give."),
    (
        False,
        "unclear",
        "Effect too small to tell",
        "Removed to save tokens; no effect could be told from noise.",
    ),
    (
        False,
        "useful",
        "Useful, but not needed to hold the line",
        "They help a little; the target holds without them.",
    ),
    (True, "useful", "Useful", "They earn their tokens."),
    (True, "unclear", "Unclear", "No effect could be told from noise, so they stay."),
    (
        True,
        "redundant",
        "Redundant, kept all the same",
        "Removing them as well was not shown to be safe for accuracy.",
    ),
    (
        True,
        "harmful",
        "Harmful on these queries, kept all the same",
        "No prompt without them could be certified.",
    ),
)

# Month names do not come from strftime: it would follow the machine's locale.
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
    "November", "December",
)  # fmt: skip

_POINTS = "\u00a0points"
_PERCENT_NAMES = {"accuracy", "exact match", "exact_match", "balanced accuracy"}


def performance_format(name: str) -> Callable[[float | None], str]:
    """Per cent for accuracies, three decimals for any other metric."""
    return t.percent if name.lower() in _PERCENT_NAMES else t.fixed


def build(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Check ``summary`` and add what the renderers share.

    Returns
    -------
    dict
        The checked summary and ``status``, ``figures``, ``groups``, ``explained``, ``verified``, ``certificate_sentences``,
        ``sequence``, ``relabels``, ``proxies``, ``money_sentences``, ``money_rows``, ``money_terms``, ``money_notes``,
        ``money_warnings``, ``crr_sentence``, ``crr_terms``, ``settings_rows``.
    """
    view = read(summary)
    label, tone = _STATUS[view["verdict"]["status"]]
    view["status"] = {"label": label, "tone": tone}
    view["when"] = _when(view["created"])
    view["n_removed"] = sum(not d["kept"] for d in view["demonstrations"])
    view["figures"] = _figures(view)
    view["groups"] = _groups(view["demonstrations"])
    view["explained"] = _explained(view)
    view["verified"] = verification_rows(view["verification"])
    view["relabels"] = [_relabel(r) for r in (view["cleaning"] or {"relabels": None})["relabels"] or ()]
    view["certificate_sentences"] = _certificate(view)
    view["sequence"] = _sequence(view)
    steps = (view["certificate"] or {"sequence": []})["sequence"]
    retained = any(step["retained_lower_bound"] is not None for step in steps)
    view["sequence_unit"] = ", points" if performance_format(view["performance_name"]) is t.percent else ""
    view["sequence_bound"] = "Keeps at least" if retained else f"Lower bound{view['sequence_unit']}"
    view["prompts"] = _prompts(view)
    view["proxies"] = [_proxy(p) for p in (view["screening"] or {"proxies": []})["proxies"]]
    view["money_sentences"] = _money(view["cost"])
    priced = view["cost"]["money"] or {"scenarios": None, "warnings": None, "notes": None}
    view["money_rows"] = [_scenario(s, priced["currency"]) for s in priced["scenarios"] or ()]
    view["money_terms"] = [row for s in priced["scenarios"] or () for row in _terms(s, priced["currency"])]
    view["money_warnings"], view["money_notes"] = priced["warnings"] or [], priced["notes"] or []
    view["crr_sentence"] = _crr(view["cost"]["crr"])
    view["crr_terms"] = _crr_terms(view["cost"]["crr"])
    view["settings_rows"] = _rows(view["settings"])
    view["versions_rows"] = _rows(view["versions"])
    return view


def proposed(view: Mapping[str, Any]) -> bool:
    """Whether the smaller prompt is a proposal that is not shipped."""
    return bool(view["verdict"]["status"] == "not_certified" and view["n_removed"])


def _when(created: str) -> str:
    try:
        moment = datetime.fromisoformat(created.replace("Z", "+00:00"))
    except ValueError:
        return created
    zone = f" {moment.tzname()}" if moment.tzinfo else ""
    return f"{moment.day} {_MONTHS[moment.month - 1]} {moment.year}, {moment:%H:%M}{zone}"


def _figures(view: dict[str, Any]) -> list[dict[str, str]]:
    before, after, cost = view["before"], view["after"], view["cost"]
    show = performance_format(view["performance_name"])
    full, small = before["performance"], after["performance"]
    maybe = " (proposal)" if proposed(view) else ""
    gone = "proposed for removal" if maybe else "removed"
    n_before, n_after = before["n_demonstrations"], after["n_demonstrations"]
    removed = None if n_before is None or n_after is None else n_before - n_after
    sealed = "sealed " if view["certificate"] else ""
    saved = cost["saved_share"]
    tokens = [t.count(before["tokens"]), t.count(after["tokens"])]
    priced = cost["money"]
    return [
        {
            "label": "Demonstrations" + maybe,
            "before": t.count(n_before),
            "after": t.count(n_after),
            "note": f"{t.count(removed)} {gone} ({t.share(removed / n_before)})"
            if removed and n_before
            else "none removed",
        },
        {
            "label": view["performance_name"][:1].upper() + view["performance_name"][1:] + maybe,
            "before": show(full["value"]),
            "after": show(small["value"]),
            "note": f"95\u00a0% interval {t.interval(show(small['low']), show(small['high']))}, on "
            f"{t.count(small['n'])} {sealed}queries",
        },
        {
            "label": "Tokens saved per call" + maybe,
            "before": "",
            "after": t.share(saved),
            "note": f"{tokens[0]} \u2192 {tokens[1]} tokens"
            if before["tokens"] is not None
            else "tokens not counted",
        },
        {
            "label": "Paid for itself after" + maybe,
            "before": "",
            "after": t.plural(cost["break_even_calls"], "call")
            if cost["break_even_calls"] is not None
            else "\u2013",
            "note": _pays(cost, priced),
        },
    ]


def _pays(cost: Mapping[str, Any], priced: Mapping[str, Any] | None) -> str:
    if cost["break_even_calls"] is None:
        if priced is not None and (priced["saved_per_thousand_calls"] or 0) < 0:
            return "never: each call costs more"
        return "nothing is saved per call" if not cost["saved_tokens_per_call"] else "not computed"
    if priced is None:
        return "in tokens; no prices given"
    warned = "; see the warning" if priced["warnings"] else ""
    return f"then saves {t.money(priced['saved_per_thousand_calls'], priced['currency'])} per 1,000 calls{warned}"


def _groups(demonstrations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    groups = []
    for kept, verdict, title, meaning in _GROUPS:
        rows = [d for d in demonstrations if d["kept"] is kept and d["verdict"] == verdict]
        rows.sort(
            key=lambda d: (d["attribution"] is None, d["attribution"] or 0.0),
            reverse=kept and verdict == "useful",
        )
        for d in rows:
            d["checked"] = _confirmation(d["confirmation"])
            d["credit"] = f"{t.signed(d['attribution'])} \u00b1 {t.fixed(d['standard_error'])}"
        if rows:
            groups.append(
                {"kept": kept, "verdict": verdict, "title": title, "meaning": meaning, "rows": rows}
            )
    return groups


def _confirmation(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    outcome = "confirmed" if found["confirmed"] else "not confirmed"
    return (
        f"Checked on the target: {outcome} (difference {t.signed(found['difference'])} \u00b1 "
        f"{t.fixed(found['standard_error'])}, {t.p_value(found['p_value'])})."
    )


def _relabel(found: Mapping[str, Any]) -> dict[str, str]:
    hidden = "not shown"
    return {
        "id": found["id"],
        "label": found["label"] if found["label"] is not None else hidden,
        "answer": found["answer"] if found["answer"] is not None else hidden,
        "probability": t.share(found["probability"]),
        "evidence": t.p_value(found["p_value"]),
    }


def _explained(view: dict[str, Any]) -> str:
    who = view["explained_by"]
    found = view["verification"]
    if found is not None and found["order"]:
        n, done = len(view["demonstrations"]), sum(d["source"] == "measured" for d in view["demonstrations"])
        rest = (
            f"; the others were estimated from what the proxy model {found['proposed_by']} said"
            if done < n
            else ""
        )
        return (
            f"Attributions of {t.count(done)} of {t.plural(n, 'demonstration')} were measured on the target model"
            f" {found['measured_by']}{rest}. {who['why']}"
        ).strip()
    how = "measured on the target model" if who["role"] == "target" else "estimated with the proxy model"
    return f"Attributions were {how} {who['name']}. {who['why']}".strip()


def _certificate(view: dict[str, Any]) -> list[str]:
    found = view["certificate"]
    if found is None:
        return []
    name, show = view["performance_name"], performance_format(view["performance_name"])
    level = t.share(found["level"])
    passed = found["decision"] == "certified"
    if found["tau"] is not None:
        tau = t.fixed(found["tau"], 2)
        rule = f"keeps at least {t.share(found['tau'])} of the {name} of the full one (tau = {tau})"
    else:
        margin = _points(found["margin"], show).removeprefix("+")
        rule = f"loses at most {margin} of {name} against the full one"
    full, small = (show(view[k]["performance"]["value"]) for k in ("before", "after"))
    opening = f"On {t.plural(found['n'], 'query', 'queries')} that no earlier step had seen, the full prompt "
    if view["n_removed"]:
        opening += f"reached {full} and the smaller one {small}."
    else:
        opening += f"reached {full}."
    which = "the smaller prompt" if view["n_removed"] else "a smaller prompt"
    verb = "At" if passed else "It could not be shown at"
    joint = which if passed else f"that {which}"
    evidence = found["evidence"]
    needed = "n/a" if found["level"] is None else t.fixed(1 - found["level"], 2)
    if evidence["name"] == "e-value":
        bar = "n/a" if found["level"] is None or found["level"] >= 1 else t.count(1 / (1 - found["level"]))
        strength = f"The evidence is an e-value of {t.fixed(evidence['value'], 1)}, where {bar} is needed."
    else:
        strength = f"The evidence is {t.p_value(evidence['value'])}, where at most {needed} is needed."
    return [
        opening,
        f"{verb} {level} confidence {joint} {rule}.",
        _bound(found, show, level),
        strength,
        f"The {'two' if (found['bar'] or 'full') == 'full' else 'smaller and the ' + found['bar']} prompts differ in"
        f" outcome on {t.plural(found['n_discordant'], 'query', 'queries')}.",
    ]


def _bound(found: Mapping[str, Any], show: Callable[[float | None], str], level: str) -> str:
    bar = found["bar"] or "full"
    line = f"The difference to that line is {_points(found['difference'], show)}"
    if bar != "full":
        line = (
            f"It also had to hold against the {bar} prompt, which did better than the full one: the difference to that"
            f" line is {_points(found['difference'], show)}"
        )
    if found["retained_lower_bound"] is not None:
        kept = t.percent(found["retained_lower_bound"])
        return f"{line}; what is kept is, at {level} confidence, at least {kept} of the {bar} prompt's."
    bound = _points(found["lower_bound"], show)
    return f"{line}, its lower bound {bound}; a certificate needs a bound above 0."


def _points(value: float | None, show: Callable[[float | None], str]) -> str:
    if value is None or show is t.fixed:
        return t.signed(value)
    return t.signed(100 * value, 1) + _POINTS


def _sequence(view: dict[str, Any]) -> list[dict[str, str]]:
    show = performance_format(view["performance_name"])
    rows = []
    for step in (view["certificate"] or {"sequence": []})["sequence"]:
        outcome = ("passed" if step["passed"] else "failed") if step["tested"] else "not tested"
        rows.append(
            {
                "n_kept": t.count(step["n_kept"]) + (", new order" if step["new_order"] else ""),
                "performance": show(step["performance"]) if step["tested"] else "\u2013",
                "difference": _points(step["difference"], show).removesuffix(_POINTS)
                if step["tested"]
                else "\u2013",
                "lower_bound": _lower(step, show) if step["tested"] else "\u2013",
                "outcome": outcome,
                "tone": {"passed": "good", "failed": "warn"}.get(outcome, "calm"),
            }
        )
    return rows


def _lower(step: Mapping[str, Any], show: Callable[[float | None], str]) -> str:
    if step["retained_lower_bound"] is not None:
        return t.percent(step["retained_lower_bound"])
    return _points(step["lower_bound"], show).removesuffix(_POINTS)


def _prompts(view: dict[str, Any]) -> list[dict[str, Any]]:
    show = performance_format(view["performance_name"])
    rows = [("Full prompt", view["before"])]
    if view["n_removed"]:
        rows.append(("Smaller prompt" + (" (proposal)" if proposed(view) else ""), view["after"]))
    if view["zero_shot"]:
        rows.append(
            ("No demonstrations", {"n_demonstrations": 0, "tokens": None, "performance": view["zero_shot"]})
        )
    return [
        {
            "name": name,
            "n": t.count(prompt["n_demonstrations"]),
            "tokens": t.count(prompt["tokens"]) if prompt["tokens"] is not None else "\u2013",
            "value": show(prompt["performance"]["value"]),
            "interval": t.interval(show(prompt["performance"]["low"]), show(prompt["performance"]["high"])),
            "performance": prompt["performance"],
        }
        for name, prompt in rows
    ]


def _proxy(proxy: dict[str, Any]) -> dict[str, Any]:
    decides = proxy.get("decided_by") or t.NOT_AVAILABLE
    facts = [
        ("Query pairs used", t.count(proxy["n_used"])),
        ("Target values bought for it", t.count(proxy.get("target_pairs"))),
        ("Money for these", t.money(proxy.get("money"), proxy.get("currency") or "")),
        ("Decided by", {"attribution": "agreement of attributions"}.get(decides, decides)),
        ("Agreement of attributions, proxy with target", t.fixed(proxy.get("mean_agreement_proxy"))),
        ("Agreement of attributions, target with itself", t.fixed(proxy.get("mean_agreement_oracle"))),
        ("Agreement that the noise of the target allows", t.fixed(proxy.get("ceiling"))),
        ("Fidelity to the target, explained by the proxy", t.fixed(proxy["mean_q_proxy"])),
        ("Fidelity to the target, explained by itself", t.fixed(proxy["mean_q_oracle"])),
        ("Same answer on the full prompt", t.share(proxy["agreement"])),
        ("Rank correlation of attributions, proxy with target", t.fixed(proxy["rank_correlation"], 2)),
        (
            "Rank correlation of attributions, target with itself",
            t.fixed(proxy.get("own_rank_correlation"), 2),
        ),
        (
            "Target's attribution mass in the proxy's top quarter, relative to its own",
            t.share(proxy.get("top_mass")),
        ),
        ("The same, of another run of the target", t.share(proxy.get("own_top_mass"))),
        (
            "Queries on which the target's values are no more than noise",
            t.count(proxy.get("n_tied")) if proxy.get("n_tied") else t.NOT_AVAILABLE,
        ),
        ("The other evidence, by the same rule", proxy.get("beside") or t.NOT_AVAILABLE),
    ]
    paper = proxy["paper_rule"]
    said = ""
    if paper is not None:
        said = f"{paper['decision']} after {t.plural(paper['n_used'], 'pair')}. {paper['note']}".strip()
    decision = proxy["decision"].replace("_", " ")
    return {
        **proxy,
        "facts": [(k, v) for k, v in facts if v != t.NOT_AVAILABLE],
        "label": decision,
        "tone": _DECISIONS[proxy["decision"]],
        "paper": said,
    }


def _money(cost: dict[str, Any]) -> list[str]:
    bought = (
        f"Bought for this run: {t.count(cost['target_tokens_total'])} target tokens and "
        f"{t.count(cost['proxy_tokens_total'])} proxy tokens."
    )
    saved = cost["saved_tokens_per_call"]
    if saved is not None and saved < 0:
        saving = f"The smaller prompt uses {t.count(-saved)} more tokens per call."
    elif saved:
        share = t.share(cost["saved_share"])
        saving = f"Each call with the smaller prompt saves {t.count(saved)} tokens ({share})."
    else:
        saving = "No tokens are saved per call."
    pays = cost["break_even_calls"]
    if saved and pays is not None:
        saving += f" The run has paid for itself after {t.plural(pays, 'call')}."
    priced = cost["money"]
    if priced is None:
        why = cost["unpriced"] or "no price was given."
        return [bought, saving, f"Unpriced: {why} Everything is stated in tokens."]
    currency = priced["currency"]
    saved_money = priced["saved_per_thousand_calls"]
    per_thousand = f"save {t.money(saved_money, currency)}"
    if saved_money is not None and saved_money < 0:
        per_thousand = f"cost {t.money(-saved_money, currency)} more"
    source = ", ".join(part for part in (priced["model"], priced["source"], priced["date"]) if part)
    price = (
        f"In money: the run cost {t.money(priced['run_cost'], currency)}; 1,000 calls {per_thousand}, at "
        f"{t.rate(priced['price_input_per_million'], currency)} per million input tokens ({source})."
    )
    return [bought, saving, price]


def _scenario(scenario: Mapping[str, Any], currency: str) -> dict[str, str]:
    calls = scenario["break_even_calls"]
    return {
        "name": scenario["name"],
        "before": t.money(scenario["before"], currency),
        "after": t.money(scenario["after"], currency),
        "saved": t.money(scenario["saved_per_thousand_calls"], currency),
        "pays": t.plural(calls, "call") if calls is not None else "never",
    }


def _terms(scenario: Mapping[str, Any], currency: str) -> list[dict[str, str]]:
    return [
        {
            "scenario": scenario["name"],
            "prompt": prompt,
            "name": term["name"],
            "tokens": t.fixed(term["tokens"], 1),
            "rate": t.rate(term["rate"], currency),
            "cost": t.money(term["cost"], currency),
        }
        for prompt, terms in (("full", scenario["terms_before"]), ("smaller", scenario["terms_after"]))
        for term in terms
    ]


def _crr(crr: dict[str, Any] | None) -> str:
    if crr is None:
        return ""
    ratios = [
        f"{t.fixed(crr.get(k), 1)} in {k}" for k in ("calls", "tokens", "money") if crr.get(k) is not None
    ]
    return (
        f"Cost reduction ratio: {' and '.join(ratios) or t.NOT_AVAILABLE}. In tokens: "
        f"{t.count(crr['oracle_tokens'])} to explain with the target alone, against "
        f"{t.count(crr['proxy_tokens_priced'])} (proxy, at its price) + "
        f"{t.count(crr['fallback_tokens'])} (fallback) + {t.count(crr['screen_tokens'])} (screening). "
        f"{crr['text']}"
    ).strip()


def _crr_terms(crr: dict[str, Any] | None) -> list[dict[str, str]]:
    if crr is None:
        return []
    currency = crr.get("currency") or ""
    return [
        {
            "name": term["name"],
            "calls": t.count(term["calls"]),
            "tokens": t.count(term["tokens"]),
            "money": t.money(term["money"], currency) if term["money"] is not None else "\u2013",
        }
        for term in crr.get("terms") or ()
    ]


def _rows(values: Any) -> list[tuple[str, str]]:
    if not isinstance(values, Mapping):
        return [("", json.dumps(values, ensure_ascii=False))]
    return [(k, v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)) for k, v in values.items()]
